"""The report: numbers as people read them, JSON that comes back, a picture without overlaps."""

import importlib.metadata
import io
import itertools
import json
import subprocess

import jax
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import squeeze_jax
from squeeze_jax.errors import UserError
from squeeze_jax.report import costs, curves, picture, provenance, record, table, units

ROWS = [
    table.row(
        "live model", {"accuracy": 0.98056}, parameters=1_244_448, macs=349_000_000
    ),
    table.row(
        "model.tflite",
        {
            "accuracy": 0.98056,
            "bytes": 4_801_234,
            "latency_ms": {"p50": 0.1523, "p90": 0.1709, "p99": 0.3},
            "peak_memory_mb": 12.34,
            "runtime": "ai-edge-litert 2.3.0",
            "outputs": np.zeros(3),
        },
        parameters=1_244_448,
        macs=349_000_000,
    ),
    table.row(
        "model_int8.tflite", {"accuracy": 0.975, "bytes": 1_310_000}, peak_memory_mb=0.5
    ),
]
METRICS = [
    {"step": 10, "loss": 2.0, "accuracy": 0.25},
    {"step": 20, "loss": 1.5, "accuracy": 0.5},
    {"step": 20, "eval_loss": 1.6, "eval_accuracy": 0.4},
    {"step": 30, "loss": 9.0, "accuracy": 0.0},
    {"step": 30, "loss": 1.0, "accuracy": 0.75},
]


def test_a_perplexity_is_a_number_and_no_share():
    rows = [table.row("live", {"accuracy": 82.704}, score="perplexity")]
    assert table.cells(rows) == [["model", "test perplexity"], ["live", "82.70"]]
    metrics = [{"step": 10, "eval_perplexity": 120.0}]
    figure = picture.draw(rows, title="lstm", metrics=metrics)
    figure.canvas.draw()
    written = [t.get_text() for t in figure.findobj(Text)]
    assert {"Test perplexity", "82.70", "120"} <= {*written}
    assert not [t for t in written if "%" in t]


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (units.count, 1_235_496, "1.24 M"),
        (units.count, 348_900_000, "349 M"),
        (units.count, 4_089_000_000, "4.09 G"),
        (units.count, 980, "980"),
        (units.count, 999_600, "1 M"),
        (units.count, 0, "0"),
        (units.count, None, "-"),
        (units.size, 4_800_000, "4.8 MB"),
        (units.size, 64_400, "64.4 kB"),
        (units.size, 12, "12 B"),
        (units.milliseconds, 0.15, "0.15 ms"),
        (units.milliseconds, 0.018838, "0.0188 ms"),
        (units.milliseconds, 234.2, "234 ms"),
        (units.milliseconds, 4100, "4.1 s"),
        (units.milliseconds, float("nan"), "-"),
        (units.megabytes, 51.32288, "51.3 MB"),
        (units.megabytes, 0.4, "400 kB"),
        (units.megabytes, None, "-"),
        (units.percent, 0.97222, "97.22%"),
        (units.percent, 1.0, "100.00%"),
    ],
)
def test_units(write, value, text):
    assert write(value) == text


def test_another_score_than_accuracy_is_named():
    rows = [table.row("a", {"accuracy": 0.5}, score="f1"), table.row("b", score="f1")]
    assert table.text(rows).split("\n")[0] == "model  test f1"
    titles = [ax.get_title(loc="left") for ax in picture.draw(rows, title="t").axes]
    assert "Test f1" in titles
    assert not [t for t in titles if "accuracy" in t.lower()]


def test_table_text():
    assert (
        table.text(ROWS)
        == """\
model              test accuracy  parameters   MACs     size  latency p50       p90  peak memory
-----------------  -------------  ----------  -----  -------  -----------  --------  -----------
live model                98.06%      1.24 M  349 M        -            -         -            -
model.tflite              98.06%      1.24 M  349 M   4.8 MB     0.152 ms  0.171 ms      12.3 MB
model_int8.tflite         97.50%           -      -  1.31 MB            -         -       500 kB"""
    )


def test_columns_that_no_row_fills_are_left_out():
    assert (
        table.text([{"model": "a", "bytes": 5}])
        == "model  size\n-----  ----\na       5 B"
    )


def test_json_round_trip(tmp_path):
    config = {
        "optim": {"lr": 0.1, "betas": (0.9, 0.99)},
        "path": tmp_path,
        "seed": None,
    }
    rows = [*ROWS, {"model": "nan", "accuracy": np.float32("nan"), "n": np.int64(3)}]
    path = tmp_path / "deep" / "report.json"
    written = record.write(path, rows, config=config, title="Ein Böhnchen")
    assert record.read(path) == written == json.loads(path.read_text())
    assert written["title"] == "Ein Böhnchen"
    assert written["config"]["optim"] == {"lr": 0.1, "betas": [0.9, 0.99]}
    assert written["config"]["path"] == str(tmp_path)
    assert written["rows"][1]["latency_ms"]["p50"] == 0.1523
    assert "outputs" not in written["rows"][1]
    assert written["rows"][3] == {"model": "nan", "accuracy": None, "n": 3}
    assert written["provenance"]["packages"]["jax"] == jax.__version__
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": []}'])
def test_json_that_is_no_report(content, tmp_path):
    path = tmp_path / "report.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=r"cannot read the report .*report\.json"):
        record.read(path)


def test_provenance():
    found = provenance.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["squeeze_jax"] == squeeze_jax.__version__
    assert found["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["devices"][0].startswith(jax.devices()[0].platform)
    assert provenance.versions(("numpy", "no-such-package")) == {
        "numpy": np.__version__
    }


def test_git_revision(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*args):
        who = [
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "-c",
            "commit.gpgsign=false",
        ]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *args], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert provenance.revision(tmp_path) is None
    git("init", "-q")
    inner = tmp_path / "venv"
    inner.mkdir()
    (inner / "x.py").write_text("1")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert provenance.revision(tmp_path) == {"revision": head, "changed": False}
    assert (
        provenance.revision(inner) is None
    )  # inside a repository, but none of its files
    (tmp_path / "code.py").write_text("2")
    assert provenance.revision(tmp_path) == {"revision": head, "changed": True}


def test_series_by_hand():
    steps, values = curves.series(METRICS, "loss")
    assert steps.tolist() == [10, 20, 30]
    assert values.tolist() == [2.0, 1.5, 1.0]  # of step 30 the later record
    steps, values = curves.series(METRICS, "eval_accuracy")
    assert (steps.tolist(), values.tolist()) == ([20], [0.4])
    assert curves.series(METRICS, "none")[0].size == 0


def test_reading_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in METRICS) + '{"step": 40, "lo')
    assert curves.read(path) == METRICS
    with pytest.raises(UserError, match=r"cannot read metrics .*gone\.jsonl"):
        curves.read(tmp_path / "gone.jsonl")


LONG = [
    dict(r, model=f"{r['model']} with a rather long name {i}")
    for i in range(3)
    for r in ROWS
]


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS, LONG], ids=["one", "three", "nine"])
@pytest.mark.parametrize(
    "metrics", [None, METRICS, []], ids=["plain", "curves", "none"]
)
def test_no_text_overlaps_or_leaves_the_picture(rows, metrics, monkeypatch):
    caption = "jax 0.10.2 · revision 0123456789 · latency at batch 1 on one core. " * 4
    figure = picture.draw(
        rows, title="squeezenet on digits " * 9, caption=caption, metrics=metrics
    )
    assert len(legible(figure, monkeypatch)) > 5 * len(rows)


def legible(figure, monkeypatch):
    """The texts of a figure, none of which overlaps another or leaves it."""
    drawn, draw = [], Text.draw

    def recording(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            drawn.append((self.get_text(), self.get_window_extent(renderer)))
        return draw(self, renderer, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", recording)
    figure.canvas.draw()
    for text, box in drawn:
        inside = min(box.x0, box.y0) >= 0 and (box.max <= figure.bbox.max).all()
        assert inside, text
    for (one, a), (two, b) in itertools.combinations(drawn, 2):
        assert not a.overlaps(b), (one, two)
    return [text for text, _ in drawn]


def test_picture_shows_what_it_should(tmp_path):
    path = picture.write(tmp_path / "r.png", ROWS, title="title", metrics=METRICS)
    image = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    assert image.shape[1] == 1650
    assert image.shape[0] > 900
    colors = {tuple(c) for c in image.reshape(-1, 3)}
    for i in range(3):  # every row's bar, and both curves
        assert tuple(bytes.fromhex(picture.COLORS[i][1:])) in colors
    assert tuple(bytes.fromhex(curves.TEST[1:])) in colors
    assert [p.name for p in tmp_path.iterdir()] == ["r.png"]


def layer(name, macs=0, parameters=0, live=None, missing="", share=0.0):
    return {
        "layer": name,
        "macs": macs,
        "share": share,
        "parameters": parameters,
        "live_bytes": live,
        "not_counted": missing,
    }


NET = [
    layer("conv", 999_000, 999_000, 600, share=0.999),
    layer("norm", 0, 64, 500),
    layer("concatenate", 0, 0, 999_000),
    layer("spectrum", 1000, 0, 900, "cholesky; fft", 0.001),
    layer("embedding", 0, 50_000),
    layer("sum", 0, 0, 300),
    layer("total", 1_000_000, 1_049_064, 999_000, "cholesky; fft", 1.0),
]


def test_costs_leave_out_what_shows_nothing():
    names = [row["layer"] for row in costs.visible_layers(NET[:-1])]
    # norm is beside the greater concatenate; sum is the only one after embedding, of which nothing is alive
    assert names == ["conv", "concatenate", "spectrum", "embedding", "sum"]
    assert costs.visible_layers([]) == []


WIDE = layer("encoder/layers_11/" * 5 + "query", 999_000, 999_000, 999_000, "fft " * 99)


@pytest.mark.parametrize(
    "rows",
    [
        NET,
        [dict(WIDE, share=1.0)] * 90 + [layer("total", 90 * 999_000, share=1.0)],
        [dict(NET[0], share=1.0), NET[-1]],
        [layer("total")],
    ],
    ids=["few", "many", "one", "none"],
)
def test_costs_are_legible(rows, monkeypatch):
    figure = costs.draw(rows, title="squeezenet " * 30, caption="peak at add " * 30)
    texts = legible(figure, monkeypatch)
    assert len(texts) > 4 * len(costs.visible_layers(rows[:-1]))
    if rows is NET:
        assert "not counted: cholesky; fft" in texts
        assert "MACs: 1 M in all" in texts
        assert "999 k (99.9%)" in texts


def test_costs_of_a_deep_network_fit_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "MAX_HEIGHT", 500)
    rows = [*[NET[0]] * 40, NET[-1]]
    path = costs.write(tmp_path / "c.png", rows, title="deep", caption="")
    with Image.open(path) as image:
        assert 490 < image.height <= 500
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]
