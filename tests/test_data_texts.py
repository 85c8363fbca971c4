"""Tables of texts: the same examples from every kind of file, labels of three kinds, and mistakes named by line."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch

import run as run_py
from squeeze_jax import data
from squeeze_jax.data import tables
from squeeze_jax.errors import UserError
from squeeze_jax.train.losses import binary_cross_entropy
from squeeze_jax.train.metrics import labels, regression

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dull", "fine", "film", ",")
ROWS = [
    {"text": 'a "fine" film, a film', "label": "good"},
    {"text": "dull\nfilm", "label": "bad"},
    {"text": "a\tfine, fine film", "label": "good"},
    {"text": "ä film", "label": "bad"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return root


def opened(place, train, **options):
    path = str(place / "vocab.txt")
    return data.make(
        name="texts", train=str(train), tokenizer=path, length=16, **options
    )


def csv_file(path, rows, columns=("text", "label"), **style):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, **style)
        writer.writerow(columns)
        writer.writerows([row[name] for name in columns] for row in rows)
    return path


def lines_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "semicolon", "crlf", "bom", "gz", "jsonl"])
def test_every_kind_of_file_has_the_same_rows(tmp_path, kind):
    path, separator = tmp_path / "rows.csv", None
    if kind == "jsonl":
        path = lines_file(tmp_path / "rows.jsonl", ROWS)
    elif kind == "semicolon":
        separator = ";"
        csv_file(path, ROWS, delimiter=";")
    else:
        csv_file(path, ROWS, lineterminator="\r\n" if kind == "crlf" else "\n")
    if kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    if kind == "gz":
        packed = tmp_path / "rows.csv.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    table = tables.read(path, separator)
    assert table.rows == ROWS
    assert table.columns == ("text", "label")
    # The second text has a line break inside its cell, so that the third row begins on line 5 of a .csv file.
    assert table.lines == ([1, 2, 3, 4] if kind == "jsonl" else [2, 3, 5, 6])


def test_examples_are_those_of_glue(shared, vocabulary, tmp_path):
    folder = shared / "data/text/glue"
    same = dict(tokenizer=vocabulary, length=48, buckets=(16,))
    for task, columns, target in (
        ("sst2", ("sentence",), "class"),
        ("rte", ("sentence1", "sentence2"), "class"),
        ("stsb", ("sentence1", "sentence2"), "number"),
    ):
        theirs = data.make(name="glue", task=task, folder=str(folder), eval="dev[:64]", train=None, **same)  # fmt: skip
        split = theirs.eval_split
        answers = split.labels.tolist()
        if theirs.label_names:
            answers = [theirs.label_names[n] for n in answers]
        rows = [
            dict(zip((*columns, "answer"), values, strict=True))
            for values in zip(*split.texts, answers, strict=True)
        ]
        options = dict(text=columns, label="answer", target=target)
        if theirs.label_names:
            options["classes"] = theirs.label_names
        ours = data.make(
            name="texts",
            train=None,
            eval=str(csv_file(tmp_path / f"{task}.csv", rows, (*columns, "answer"))),
            **options,
            **same,
        )
        assert ours.label_names == theirs.label_names
        assert ours.model == theirs.model
        assert ours.objective == theirs.objective
        for a, b in zip(ours.eval(16), theirs.eval(16), strict=True):
            assert a.keys() == b.keys()
            for key, values in a.items():
                np.testing.assert_array_equal(values, b[key])
                assert values.dtype == b[key].dtype


def test_the_held_out_rows_depend_on_their_texts_alone(place, tmp_path):
    rows = [{"text": f"a film {n}", "label": "ab"[n % 2]} for n in range(400)]
    first = opened(place, csv_file(tmp_path / "a.csv", rows), holdout=0.25)
    assert first.num_train + first.num_eval == 400
    assert 60 < first.num_eval < 140  # 100 and five standard deviations of 8.7
    more = [{"text": f"new {n}", "label": "a"} for n in range(100)] + rows + rows
    second = opened(place, csv_file(tmp_path / "b.csv", more), holdout=0.25)
    held = set(second.eval_split.texts[0])
    assert set(first.eval_split.texts[0]) <= held
    assert not held & set(second.train_split.texts[0])  # a text that comes twice, too


@pytest.mark.parametrize("largest", [10, 11.5])
def test_numbers_are_not_scaled_and_a_line_tells_of_large_ones(
    place, tmp_path, largest
):
    rows = [{"text": f"a {n}", "label": x} for n, x in enumerate((-2, 0.5, largest))]
    path = lines_file(tmp_path / "a.jsonl", rows)
    made = opened(place, path, eval=str(path), target="number")
    assert made.train_split.labels.tolist() == [-2, 0.5, largest]
    line = f"{path}: labels from -2 to 11.5 are trained on as they are"
    notes = [note.partition(",")[0] for note in made.notes]
    assert notes == ([line] if largest > 10 else [])


def test_classes(place, tmp_path):
    made = opened(
        place, csv_file(tmp_path / "a.csv", ROWS), eval=str(tmp_path / "a.csv")
    )
    assert made.label_names == ("bad", "good")
    assert made.train_split.labels.tolist() == [1, 0, 1, 0]
    rows = [{"text": f"a {n}", "label": n % 11 + 1} for n in range(44)]
    numbered = opened(place, lines_file(tmp_path / "b.jsonl", rows), holdout=0.3)
    assert numbered.label_names == tuple(map(str, range(1, 12)))
    rows = [{"text": f"a {n}", "label": n % 2 == 0} for n in range(44)]
    binary = opened(
        place, lines_file(tmp_path / "c.jsonl", rows), classes=("true", "false")
    )
    assert binary.label_names == ("true", "false")


def test_several_labels(place, tmp_path):
    columns = ("toxic", "rude")
    rows = [("a", 1, 0), ("fine", 1, 1), ("film", 0, 0), ("dull", 0, 1)]
    matrix = [[1, 0], [1, 1], [0, 0], [0, 1]]
    several = [dict(zip(("text", *columns), row, strict=True)) for row in rows]
    path = csv_file(tmp_path / "columns.csv", several, ("text", *columns))
    names = [[n for n in columns if row[n]] for row in several]
    lists = [
        {"text": r["text"], "label": n} for r, n in zip(several, names, strict=True)
    ]
    joined = [row | {"label": "|".join(row["label"])} for row in lists]
    for made in (
        opened(place, path, label=columns, target="labels", eval=str(path)),
        *(
            opened(
                place, file, target="labels", eval=str(file), classes=columns, **more
            )
            for file, more in (
                (lines_file(tmp_path / "lists.jsonl", lists), {}),
                (csv_file(tmp_path / "joined.csv", joined), dict(label_separator="|")),
            )
        ),
    ):
        assert made.label_names == columns
        assert made.train_split.labels.tolist() == matrix
        assert made.train_split.labels.dtype == np.float32
        assert made.objective == {"name": "losses.binary_cross_entropy"}
    batch = next(made.train(4, seed=0))
    assert batch["label"].shape == (4, 2)


def test_one_column_of_flags_and_classes_that_are_equal_numbers(place, tmp_path):
    path = csv_file(
        tmp_path / "a.csv", [{"text": "a", "p": n} for n in (1, 0)], ("text", "p")
    )
    made = opened(place, path, eval=str(path), target="labels", label=("p",))
    assert made.label_names == ("p",)
    assert made.train_split.labels.tolist() == [[1], [0]]
    rows = [{"text": f"a {n}", "label": n} for n in ("1", "01", "2", "001") * 2]
    path = csv_file(tmp_path / "b.csv", rows)
    assert opened(place, path, eval=str(path)).label_names == ("001", "01", "1", "2")
    rows = [
        {"text": "a", "label": 1},
        {"text": "b", "label": 1.0},
        {"text": "c", "label": 2},
    ]
    path = lines_file(tmp_path / "c.jsonl", rows)
    made = opened(place, path, eval=str(path), classes=("1", "2", "3"))
    assert made.train_split.labels.tolist() == [0, 0, 1]
    assert made.notes == (f"{path}: no training row has the class 3",)


@pytest.mark.parametrize("target", ["class", "labels"])
def test_a_class_whose_rows_are_all_held_out_is_a_class(place, tmp_path, target):
    """A row's text alone decides whether it is held out."""
    rows = [{"text": f"a {n}", "label": "ab"[n % 2]} for n in range(40)]
    path = csv_file(tmp_path / "a.csv", rows)
    held = opened(place, path, holdout=0.2).eval_split.texts[0]
    assert 0 < len(held) < 40
    rows = [r | {"label": "rare"} if r["text"] == held[0] else r for r in rows]
    path = csv_file(tmp_path / "b.csv", rows)
    made = opened(place, path, holdout=0.2, target=target)
    assert made.label_names == ("a", "b", "rare")
    assert made.notes == (f"{path}: no training row has the class rare",)
    label = made.eval_split.labels[0]
    assert label.tolist() == ([0, 0, 1] if target == "labels" else 2)


def test_predictions_take_texts_files_and_tables(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = csv_file(Path("a.csv"), ROWS)
    made = opened(place, path, eval=str(path))
    Path("texts.txt").write_text("a film\n\nfine\n")
    Path("folder").mkdir()

    def run(batch):
        return np.tile([0.0, 1.0], (len(batch["tokens"]), 1))

    words = ["a dull film", "texts.txt", "a.csv", "gone.txt", "folder", "\udce9"]
    lines = []
    with pytest.raises(UserError, match="3 of 10 texts have no answer"):
        lines.extend(made.predict(words, run))
    assert [line.partition("  ")[2] for line in lines[:3]] == [
        "a dull film",
        "a film",
        "fine",
    ]
    assert [line.partition("  ")[2].strip() for line in lines[3:7]] == [
        r["text"] for r in ROWS
    ]
    assert lines[7:9] == [
        "no such file: gone.txt",
        "folder is a folder: name files of texts",
    ]
    assert "is not text" in lines[9]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.CSV", b"text,label\na film,x\nfine,y\n"),
        ("a.Tsv", b"text\tlabel\na film\tx\nfine\ty\n"),
        ("A.JSONL", b'{"text": "a film"}\n{"text": "fine"}\n'),
        ("a.csv.GZ", gzip.compress(b"text,label\na film,x\nfine,y\n", mtime=0)),
        ("A.TXT", b"a film\nfine\n"),
        ("A.TXT.GZ", gzip.compress(b"a film\nfine\n", mtime=0)),
    ],
)
def test_predictions_know_files_in_upper_case(place, tmp_path, monkeypatch, name, content):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = csv_file(Path("rows.csv"), ROWS)
    made = opened(place, path, eval=str(path))
    Path(name).write_bytes(content)

    def run(batch):
        return np.tile([0.0, 1.0], (len(batch["tokens"]), 1))

    texts = [line.partition("  ")[2] for line in made.predict([name], run)]
    assert texts == ["a film", "fine"]
    with pytest.raises(UserError, match=f"no such file: GONE{name}"):
        list(made.predict([f"GONE{name}"], run))


def test_rows_left_out_are_counted(place, tmp_path):
    rows = [*ROWS, {"text": " ", "label": "bad"}, {"text": "a", "label": ""}]
    path = csv_file(tmp_path / "a.csv", rows)
    made = opened(place, path, eval=str(path))
    assert made.num_train == 4
    assert made.notes == (
        f"{path}: 2 rows without a text or a label left out (line 7, line 8)",
    )
    tsv = tmp_path / "a.tsv"
    tsv.write_text('text\tlabel\n"a film"\tgood\n"fine" film\tbad\n')
    made = opened(place, tsv, eval=str(tsv))
    assert made.train_split.texts[0] == ['"a film"', '"fine" film']
    assert "1 cells stand in quotation marks" in made.notes[0]


def test_texts_that_are_cut_off_are_counted(place, tmp_path, caplog):
    rows = [{"text": "a " * n, "label": "ab"[n % 2]} for n in (1, 14, 15, 99)]
    path = csv_file(tmp_path / "a.csv", rows)
    next(opened(place, path, eval=str(path)).eval(4))
    assert "2 of 4 texts have more than config.data.length = 16 tokens" in caplog.text


A_B = "text,label\na,x\nb,y\n"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", None, {}, r"cannot read .*a\.csv: No such file"),
        ("a.xlsx", "x", {}, r"a\.xlsx is no table: expected \.csv, \.tsv, \.jsonl"),
        ("a.json", "[]", {}, r"a\.json is no table"),
        ("a.csv", "", {}, "is empty: its first line should name its columns"),
        ("a.csv", "text,label\n", {}, "has no rows"),
        ("a.csv", "text,label\n,x\n", {}, "has no row with a text and a label"),
        ("a.csv", "text,label,text\na,x,b\n", {}, "the column 'text' twice"),
        ("a.csv", "text;label\na;x\n", {}, "set config.data.separator = ';'"),
        ("a.csv", "txt,label\na,x\n", {}, "config.data.text = 'text' is no column of .*did you mean 'txt'"),
        ("a.csv", 'text,label\na,x\nb "q",y,z\n', {}, r"a\.csv:3 has 3 cells, the first line 2: text, label"),
        ("a.csv", 'text,label\na,x\n"b" q,y\n', {}, r"a\.csv:3 is no row of a \.csv file"),
        ("a.csv", 'text,label\na,x\n"b,y\n', {}, r"a\.csv:3 is no row of a \.csv file"),
        ("a.csv", "text,label\na,x\nb,x\n", {}, "has the one class 'x'"),
        ("a.csv", "text,label\na,1.5\nb,2.5\nc,1.5\n", {}, "labels such as 1.5: set config.data.target = 'number'"),
        ("a.csv", "text,label\na,p\nb,q\nc,r\n", {}, "has 3 classes in as many rows"),
        ("a.csv", A_B, dict(target="number"), r"a\.csv:2 has the label 'x', which is not a number"),
        ("a.csv", A_B, dict(classes=("x", "z")), r"a\.csv:3 has the label 'y', which is no class; choose from x, z$"),
        ("a.csv", A_B, dict(classes=("x", "yy")), r"a\.csv:3 has the label 'y', which is no class; did you mean 'yy'\? choose from x, yy$"),
        ("a.csv", A_B, dict(label=("text", "label"), target="labels"), "name the column 'text' twice"),
        ("a.csv", A_B, dict(label=("p", "q")), "several are for config.data.target = 'labels'"),
        ("a.csv", A_B, dict(text=("a", "b", "c")), "should be one column, or two"),
        ("a.csv", "text,p,q\na,1,2\n", dict(label=("p", "q"), target="labels"), r"a\.csv:2 has '2' in the column 'q': write 0 or 1"),
        ("a.csv", "text,p,q\na,1,\n", dict(label=("p", "q"), target="labels"), r"a\.csv:2 has no 'q': write 0 or 1"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', {}, r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", '["a"]\n', {}, r"a\.jsonl:1 holds .*, not an object"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', {}, r"a\.jsonl:1 has 5 in the column 'text', not a text"),
        ("a.jsonl", '{"text": "a", "label": {}}\n{"text": "b", "label": 1}\n', {}, r"a\.jsonl:1 has the label \{\}"),
        ("a.csv", A_B, dict(holdout=0.0, eval=None), "holdout = 0.0 leaves 2 rows to train on and 0 to evaluate on"),
        ("a.csv", A_B, dict(classes=("x", "y", "x")), "names 'x' twice"),
        ("a.csv", A_B, dict(classes=("x", " ")), "should not be empty"),
        ("a.csv", A_B, dict(classes=("x",)), "is one class"),
        ("a.csv", A_B, dict(classes=("x", "y"), target="number"), "leave one of them out"),
        ("a.csv", A_B, dict(separator=",,"), "separator = ',,' should be one character"),
        ("a.csv", A_B, dict(separator=""), "separator = '' should be one character"),
        ("a.csv", A_B, dict(label_separator=""), "label_separator is empty"),
        ("a.csv", "text,label\na,1e39\n", dict(target="number"), r"a\.csv:2 has the label 1e39, beyond 32-bit"),
        ("a.csv", "text,p\na,1\nb,0\n", dict(label="p", target="labels"), r"config.data.label = \('toxic',\)"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', {}, r"a\.jsonl:1 has the label nan, not a name"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', {}, r"a\.jsonl:1 is not text"),
        ("a.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}\n", {}, r"a\.jsonl:1 cannot be read: Exceeds the limit"),
        ("a.jsonl", "[" * 100_000 + "\n", {}, r"a\.jsonl:1 cannot be read"),
        ("a.csv", b"text,label\na,x\n\xff,y\n", {}, r"a\.csv:3 is not UTF-8"),
    ],
)  # fmt: skip
def test_mistakes_are_named(place, tmp_path, name, content, options, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        opened(place, path, **{"eval": str(path)} | options)


def test_the_loss_of_several_labels_is_pytorchs():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 3)).astype(np.float32) * 4
    label = (rng.random((5, 3)) < 0.5).astype(np.float32)
    mask = np.array([1, 1, 0, 1, 1], bool)
    loss, scores = binary_cross_entropy.make()(logits, {}, dict(label=label, mask=mask))
    chosen = [torch.tensor(x[mask]) for x in (logits, label)]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(*chosen)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    right = ((logits > 0) == (label > 0.5))[mask].mean()
    assert float(scores["label_accuracy"]) == pytest.approx(right)
    wrong = dict(label=label + 1, mask=mask)
    assert np.isnan(binary_cross_entropy.make()(logits, {}, wrong)[0])
    for bad in label.astype(int), label[:, :2]:
        with pytest.raises(UserError, match="give a float, 0 or 1, for each class"):
            binary_cross_entropy.make()(logits, {}, dict(label=bad, mask=mask))


def evaluated(metric, logits, label, mask):
    """The scores of two batches."""
    sums, rows = {}, []
    for part in slice(0, 7), slice(7, None):
        batch = dict(label=label[part], mask=mask[part])
        new, kept = metric.measure(logits[part], batch)
        sums = {k: np.asarray(v) + sums.get(k, 0) for k, v in new.items()}
        rows.append({k: np.asarray(v)[mask[part]] for k, v in kept.items()})
    keys = rows[0]
    return metric.score(sums, {k: np.concatenate([r[k] for r in rows]) for k in keys})


def test_scores_of_several_labels_are_scikit_learns():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 4)).astype(np.float32)
    label = (rng.random((40, 4)) < [0.5, 0.3, 0.1, 0.0]).astype(np.float32)
    logits[:, 3] = -1  # a class that is neither there nor predicted
    mask = rng.random(40) < 0.8
    found = evaluated(labels.make(), logits, label, mask)
    true, predicted = label[mask], logits[mask] >= 0
    f1 = sklearn.metrics.f1_score
    expected = {
        "eval_f1": f1(true, predicted, average="micro"),
        "eval_f1_macro": f1(true, predicted, average="macro", zero_division=0),
        "eval_exact": sklearn.metrics.accuracy_score(true, predicted),
        "eval_label_accuracy": 1 - sklearn.metrics.hamming_loss(true, predicted),
    }
    assert found.pop("eval_loss") > 0
    assert found == pytest.approx(expected)
    same = labels.make().agreement({"logits": logits}, {"logits": -logits})
    assert same.shape == (40,)
    assert same.max() == 0


def test_scores_of_a_regression_are_scikit_learns():
    rng = np.random.default_rng(2)
    outputs = rng.normal(size=(30, 1)).astype(np.float32)
    label = (outputs[:, 0] + rng.normal(size=30)).astype(np.float32)
    mask = rng.random(30) < 0.8
    found = evaluated(regression.make(), outputs, label, mask)
    true, predicted = label[mask], outputs[mask, 0]
    squared = sklearn.metrics.mean_squared_error(true, predicted)
    assert found["eval_loss"] == pytest.approx(squared, rel=1e-5)
    assert found["eval_rmse"] == pytest.approx(squared**0.5, rel=1e-5)
    absolute = sklearn.metrics.mean_absolute_error(true, predicted)
    assert found["eval_absolute_error"] == pytest.approx(absolute, rel=1e-5)
    assert found["eval_pearson"] == pytest.approx(np.corrcoef(true, predicted)[0, 1])
    metric = regression.make()
    assert metric.better("eval_rmse") is min
    assert metric.better("eval_pearson") is max


def test_it_learns_several_labels_and_is_exported(place, tmp_path, monkeypatch, capsys):
    """Each text holds any of three words; its labels are the words."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    names = ("dull", "fine", "film")
    rows = []
    for _ in range(300):
        chosen = [name for name in names if rng.random() < 0.5]
        words = [*chosen, *["a"] * int(rng.integers(1, 4))]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": ",".join(chosen)})
    csv_file(tmp_path / "texts.csv", rows)
    sizes = dict(layers=2, features=32, heads=2, ffn_features=64)
    model = dict(name="squeezebert", variant="toy", vocabulary=len(WORDS), positions=16)
    run_py.main([
        "--config=" + str(Path(__file__).parents[1] / "configs/texts.py"),
        "--config.data.train=texts.csv",
        f"--config.data.tokenizer={place / 'vocab.txt'}",
        "--config.data.target=labels",
        "--config.data.length=16",
        "--config.data.buckets=()",
        f"--config.model={json.dumps(model | sizes)}",
        "--config.init={}",
        "--config.optim.lr=5e-3",
        "--config.optim.decay=0",
        "--config.optim.freeze=()",
        "--config.batch=32",
        "--config.steps=400",
        "--config.eval_every=200",
        "--config.save_every=200",
        "--config.export.formats=('stablehlo',)",
        "--config.export.check=16",
        "--workdir=run",
    ])  # fmt: skip
    scores = [
        json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()
    ]
    assert [s["eval_exact"] for s in scores if "eval_exact" in s][-1] > 0.9
    assert "agreement 100.0%" in capsys.readouterr().out
    texts = ["a fine a film", "a a", "dull"]
    run_py.main(["--job=predict", "--workdir=run", *texts])
    answers = capsys.readouterr().out.splitlines()
    names = [{w for w in line.split("  ")[0].split() if w in names} for line in answers]
    assert names == [{"fine", "film"}, set(), {"dull"}]
    assert answers[1].startswith("no label  a a")
    # The table moves, and then it is gone: predictions need the network alone.
    (tmp_path / "texts.csv").rename("moved.csv")
    moved = "--config.data.train=moved.csv"
    run_py.main(["--job=evaluate", "--workdir=run", moved])
    assert "exact" in capsys.readouterr().out
    (tmp_path / "moved.csv").unlink()
    run_py.main(["--job=predict", "--workdir=run", *texts])
    first, *again = capsys.readouterr().out.splitlines()
    assert first.startswith("data       not opened: cannot read texts.csv")
    assert again == answers
