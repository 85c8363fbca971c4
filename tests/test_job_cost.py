"""The job cost, as a user calls it: from a config alone, in a folder that holds a run or none."""

import csv
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from PIL import Image

import run as run_py
from squeeze_jax.cost import layers, memory
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _workdir, cost

WRITTEN = {"cost.csv", "cost.png"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(capsys, *arguments):
    """What the job prints: {layer: cells}, and the other lines."""
    run_py.main(["--job=cost", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("---"))
    last = next(i for i, line in enumerate(lines) if line.startswith("total "))
    assert len({len(line) for line in lines[first - 1 : last + 1]}) == 1  # aligned
    rows = [re.split(r"  +", line.strip()) for line in lines[first + 1 : last + 1]]
    return {name: cells for name, *cells in rows}, lines[last + 1 :]


def plain(path):
    """The rows of a CSV file: {layer: the other cells}."""
    with open(path, newline="") as file:
        return {row.pop("layer"): row for row in csv.DictReader(file)}


def test_the_digits(here, capsys):
    rows, rest = called(capsys)
    # 1→32 channels, 3x3 without bias, 16x16 → 14x14: 288 weights, 14·14·288 MACs, 64 bit operations each;
    # 256 + 288 + 6272 bytes; of activations 256 + 6272 at once; 56,448 of 709,760 MACs
    conv1 = ["288", "56.4 k", "8.0%", "3.61 M", "6.82 kB", "8.28", "6.53 kB"]
    assert rows["conv1"] == conv1
    # scale and bias of 32 channels, joined to the convolution
    assert rows["conv1_norm"] == ["64", "-", "-", "-", "-", "-", "6.27 kB"]
    # the 14x14 map and the pooled 7x7
    assert rows["SqueezeNet"][-1] == "7.84 kB"
    # the arena of TFLite Micro for this net's int8 file is 9,408 bytes
    assert rows["total"][-1] == rows["fire3"][-1] == "9.41 kB"
    assert rows["total"][2] == "100.0%"
    assert "9.41 kB of activations, at concatenate in fire3: 1x7x7x64 + " in rest[1]
    assert rest[2].split() == ["in", "float32", "37.6", "kB"]  # four times as much
    assert re.fullmatch(
        r"XLA on \w+ +[\d.]+ kB of inputs, results and .* buffers", rest[3]
    )
    assert rest[4].split() == [
        "written",
        "runs/digits/cost.csv",
        "and",
        "runs/digits/cost.png",
    ]
    assert len(rest) == 5


def test_what_it_writes(here, capsys):
    rows, _ = called(capsys, "--workdir=deep/here")
    folder = here / "deep" / "here"
    assert {p.name for p in folder.iterdir()} == WRITTEN
    found = plain(folder / "cost.csv")
    assert list(found) == list(rows)  # the same layers in the same order
    assert found["conv1"] == {
        "parameters": "288",
        "macs": "56448",
        "share": f"{56448 / int(found['total']['macs']):.6g}",
        "bops": str(64 * 56448),
        "bytes_moved": "6816",
        "macs_per_byte": "8.28169",
        "live_bytes": "6528",
        "not_counted": "",
    }
    assert found["conv1_norm"]["macs"] == found["conv1_norm"]["share"] == "0"
    assert found["conv1_norm"]["macs_per_byte"] == ""  # of no bytes
    *each, total = found.values()
    for key in ("parameters", "macs", "bops", "bytes_moved"):
        assert sum(int(row[key]) for row in each) == int(total[key])
    assert sum(float(row["share"]) for row in each) == pytest.approx(1, abs=1e-5)
    assert max(int(row["live_bytes"]) for row in each) == int(total["live_bytes"])
    with Image.open(folder / "cost.png") as image:
        assert min(image.size) > 500


class Uncounted(nn.Module):
    """A counted layer, one with two primitives that are not, and a loop outside both."""

    @nn.compact
    def __call__(self, x):  # [1, 4, 4, 1]
        x = nn.Dense(2, name="dense")(x)
        x = Spectrum(name="spectrum")(x)
        return jax.lax.while_loop(lambda v: v.sum() < 1, lambda v: v + 1, x)


class Spectrum(nn.Module):
    @nn.compact
    def __call__(self, x):
        square = x[..., 0] @ x[..., 1]  # [1, 4, 4]: 64 MACs
        return jnp.fft.fft(jnp.linalg.cholesky(square)).real


def test_what_is_not_counted_is_named():
    image = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    missing = cost.unknown(Uncounted(), image)
    assert missing == {
        "spectrum": ["cholesky", "fft"],
        "Uncounted": ["while beyond one iteration"],
    }
    rows = cost.rows(
        layers.layers(Uncounted(), image), memory.peak(Uncounted(), image), missing
    )
    assert [r["not_counted"] for r in rows if r["layer"] == "dense"] == [""]
    assert rows[-1]["not_counted"] == "cholesky; fft; while beyond one iteration"
    lines = cost.text(rows).splitlines()
    at = lines.index("spectrum   not counted: cholesky; fft")
    assert lines[at - 1].split()[:4] == ["spectrum", "-", "64", "66.7%"]  # of 96
    assert "Uncounted  not counted: while beyond one iteration" in lines
    assert lines[-1].split()[:4] == ["total", "4", "96", "100.0%"]
    assert cost.comma_separated(rows).count("\n") == 1 + len(rows)


def test_without_any_macs():
    image = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    rows = cost.rows((), memory.peak(lambda x: x + 1, image), {})
    assert cost.text(rows).splitlines()[-1].split()[:4] == ["total", "-", "-", "-"]
    assert cost.comma_separated(rows).splitlines()[-1] == "total,0,0,,0,0,,8,"


TINY = "--config.model={'name': 'squeezenet', 'variant': 'tiny'}"


def test_takes_the_config_of_a_work_directory(here, capsys):
    config = {
        "data": {"source": {"name": "digits"}, "size": 8},
        "model": {"name": "mobilenet_v2", "variant": "tiny"},
        "optim": {"name": "sgd", "lr": 0.1},
        "steps": 1,
        "batch": 4,  # one for each simulated device
    }
    written = here / "begun" / "config.json"
    written.parent.mkdir()
    written.write_text(json.dumps(config))
    rows, _ = called(capsys, "--workdir=begun")
    assert rows["classifier"][:2] == ["330", "320"]  # 32 → 10 and bias
    # another network than that of the run may be asked for
    rows, _ = called(capsys, "--workdir=begun", TINY)
    assert rows["conv10"][0] == "170"  # 16 → 10 and bias
    assert {p.name for p in written.parent.iterdir()} == {"config.json", *WRITTEN}
    assert json.loads(written.read_text()) == config
    assert list(here.iterdir()) == [written.parent]


def test_begins_no_run(here, capsys):
    called(capsys, "--workdir=here")
    with pytest.raises(UserError, match="holds no experiment"):
        run_py.main(["--job=evaluate", "--workdir=here"])
    # a later run in the directory is of its own config, and the job goes by that from then on
    run_py.main(["--job=fit", "--workdir=here", TINY, "--config.steps=1"])
    _workdir._locks.pop((here / "here").resolve()).close()
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    rows, _ = called(capsys, "--workdir=here")
    assert rows["conv10"][0] == "170"  # 16 → 10 and bias
    after = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    changed = {p.name for p in after if after[p] != before.get(p)}
    assert changed == WRITTEN
    assert before.keys() == after.keys()


@pytest.mark.parametrize("workdir", ["file", "file/below"])
def test_a_place_that_cannot_be_written_to(here, workdir):
    (here / "file").write_text("as it was")
    with pytest.raises(
        UserError, match=f"cannot write to the work directory {workdir}"
    ):
        run_py.main(["--job=cost", TINY, f"--workdir={workdir}"])
    assert (here / "file").read_text() == "as it was"


def test_takes_no_files(here):
    with pytest.raises(UserError, match=r"the job cost takes no files: a\.jpg"):
        run_py.main(["--job=cost", TINY, "a.jpg"])
    assert not list(here.iterdir())


def test_other_jobs_still_need_a_run(here):
    with pytest.raises(UserError, match="holds no experiment"):
        run_py.main(["--job=evaluate", TINY])
