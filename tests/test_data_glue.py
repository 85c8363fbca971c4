"""GLUE: real files and made ones in the official layout; files to submit; what is said of mistakes."""

import gzip
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from squeeze_jax import data
from squeeze_jax.data import glue, tsv
from squeeze_jax.errors import UserError

# Train, dev, test of the paper's release; None where the shared folder does not have the file.
SIZES = {
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 872, 1821),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
    "mnli": (None, 9815, 1104),  # for a test the diagnostic set alone
    "qnli": (None, 5463, 5463),
    "rte": (2490, 277, 3000),
    "wnli": (635, 71, 146),
}


@pytest.fixture(scope="module")
def real(shared, vocabulary):
    def make(task, **options):
        options = dict(tokenizer=vocabulary, length=64) | options
        folder = str(shared / "data/text/glue")
        return data.make(name="glue", task=task, folder=folder, **options)

    return make


@pytest.mark.parametrize("task", SIZES)
def test_sizes_of_the_real_files(shared, task):
    files = glue.open_files(str(shared / "data/text/glue"), None)
    train, dev, test = SIZES[task]
    if train:
        assert len(glue.read(files, task, "train", "")) == train
    assert len(glue.read(files, task, "dev", "")) == dev
    assert len(glue.read_test(files, task)) == test


@pytest.mark.parametrize(
    ("task", "number", "texts", "label"),
    [
        ("cola", 0, ["The sailors rode the breeze clear of the rocks."], 1),
        ("sst2", 0, ["it 's a charming and often affecting journey . "], 1),
        ("wnli", 0, ["The drain is clogged with hair. It has to be cleaned.", "The hair has to be cleaned."], 0),
        ("stsb", 0, ["A man with a hard hat is dancing.", "A man wearing a hard hat is dancing."], 5.0),
        # not_entailment is the second of RTE's names, neutral the second of MNLI's, entailment the first of QNLI's
        ("rte", 0, ["Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, according to the Christopher Reeve Foundation.", "Christopher Reeve had an accident."], 1),
        ("mnli", 0, ["The new rights are nice enough", "Everyone really likes the newest benefits"], 1),
        ("qnli", 0, ["What came into force after the new constitution was herald?", "As of that day, the new constitution heralding the Second Republic came into force."], 0),
        # a cell that begins with a quotation mark which nothing closes
        ("mrpc", 0, ["He said the foodservice pie business doesn 't fit the company 's long-term growth strategy .", '" The foodservice pie business does not fit our long-term growth strategy .'], 1),
    ],
)  # fmt: skip
def test_the_first_examples(shared, task, number, texts, label):
    files = glue.open_files(str(shared / "data/text/glue"), None)
    split = glue.read(files, task, "dev", "")
    assert [column[number] for column in split.texts] == texts
    assert split.labels[number] == label
    kind = np.float32 if task == "stsb" else np.int32
    assert split.labels.dtype == kind


def test_a_task_as_data(real, transformers, vocabulary):
    made = real("rte", buckets=(32,))
    assert (made.num_train, made.num_eval, made.matched) == (2490, 277, 277)
    assert made.label_names == ("entailment", "not_entailment")
    assert made.model == {"task": "classification", "num_classes": 2}
    assert made.objective == {"name": "losses.cross_entropy"}
    assert (made.reads, made.metrics, made.vocabulary) == ("tokens", "glue", 30522)
    assert made.describe == "2,490 train + 277 test pairs of texts of GLUE's rte, up to 64 tokens"  # fmt: skip
    theirs = transformers.BertTokenizer(vocabulary)
    seen = []
    for batch in made.eval(32):
        for row in np.flatnonzero(batch["mask"]):
            index = batch["index"][row]
            seen.append(index)
            a, b = (column[index] for column in made.eval_split.texts)
            want = theirs(a, b, truncation=True, max_length=64, padding="max_length")
            width = batch["tokens"].shape[1]
            assert batch["tokens"][row].tolist() == want["input_ids"][:width]
            assert batch["segments"][row].tolist() == want["token_type_ids"][:width]
            assert batch["attended"][row].tolist() == [m == 1 for m in want["attention_mask"]][:width]  # fmt: skip
            assert sum(want["attention_mask"]) <= width
            assert batch["label"][row] == made.eval_split.labels[index]
    assert sorted(seen) == list(range(277))


def test_what_a_network_is_called_with(real):
    made = real("stsb", buckets=(32,), train="dev[:200]", eval="dev[200:]")
    assert made.model == {"task": "classification", "num_classes": 1}
    assert made.objective == {"name": "losses.squared_error"}
    assert made.label_names == ()
    batch = next(made.train(4, 0))
    assert batch["label"].dtype == np.float32
    assert {s["tokens"].shape for s in made.specs(4)} == {(4, 32), (4, 64)}
    assert all(s["label"].shape == (4,) for s in made.specs(4))
    inputs = jax.jit(made.inputs)(batch)
    assert set(inputs) == {"tokens", "segments", "attended"}
    assert inputs["attended"].dtype == bool
    assert (inputs["attended"] == batch["attended"]).all()
    # The exported function gives integers for "attended".
    from_export = made.inputs({k: batch[k].astype(np.int32) for k in made.exported})
    assert all((from_export[k] == inputs[k]).all() for k in inputs)
    example = made.example()
    assert {k: (v.shape, v.dtype) for k, v in example.items()} == {
        "tokens": ((1, 64), np.int32),
        "segments": ((1, 64), np.int32),
        "attended": ((1, 64), bool),
    }
    assert made.augment(jax.random.key(0), batch) is batch


def test_parts_of_splits(real, caplog):
    made = real("mnli", train="dev_matched[:90%]", eval="dev_matched[90%:]")
    assert (made.num_train, made.num_eval, made.matched) == (8833, 982, 982)
    whole = real("mnli", train=None)
    assert made.eval_split.texts[0] == whole.eval_split.texts[0][8833:]
    assert (made.train_split.labels == whole.eval_split.labels[:8833]).all()
    assert (whole.num_train, whole.label_names) == (0, ("entailment", "neutral", "contradiction"))  # fmt: skip
    assert "train" not in whole.describe
    with pytest.raises(UserError, match=r"config.data.train is None"):
        whole.train(4, 0)
    assert not caplog.messages
    real("wnli", train="dev[:40]", eval="dev[30:]")
    assert caplog.messages == ["config.data.train has 10 of the 41 examples of config.data.eval"]  # fmt: skip


def test_fewer_training_examples(real):
    few, more, again = (real("cola", limit_train=n).train_split for n in (50, 500, 50))
    assert (len(few), len(more)) == (50, 500)
    assert set(few.texts[0]) <= set(more.texts[0])
    assert few.texts == again.texts
    everything = real("cola").train_split
    number = {text: n for n, text in enumerate(everything.texts[0])}
    where = np.array([number[text] for text in more.texts[0]])
    # Doubled sentences aside, the labels are theirs, and they come from everywhere.
    assert (everything.labels[where] == more.labels).mean() > 0.99
    assert np.histogram(where, 5, (0, 8551))[0].min() > 60
    assert real("wnli", limit_train=9999).num_train == 635


TABLES = {
    "MNLI/train": "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n0\t1\ta b\tc\tneutral\tneutral\n",
    "MNLI/dev_matched": "index\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n0\ta\tb\tneutral\tneutral\tentailment\n1\tc\td\t-\t-\tcontradiction\n",
    "MNLI/dev_mismatched": "index\tsentence1\tsentence2\tgold_label\n0\te\tf\tneutral\n",
    "MNLI/test_matched": "index\tsentence1\tsentence2\n0\ta\tb\n1\tc\td\n",
    "MNLI/test_mismatched": "index\tsentence1\tsentence2\n0\te\tf\n",
    "diagnostic/diagnostic": "index\tsentence1\tsentence2\n0\tg\th\n1\ti\tj\n",
    "QQP/train": 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\twho "is\twhat?\t1\n8\t1\t2\ta line that\nbreaks\tb\t0\n9\t1\t2\tx\ty\t0\n',
    "QQP/dev": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\r\n7\t1\t2\tp\tq\t0\r\n",
    "QQP/test": "id\tquestion1\tquestion2\n0\tp\tq\n",
    "CoLA/train": "x\t0\t*\tHim is.\n",
    "CoLA/dev": "x\t1\t\tHe is.\n",
    "CoLA/test": "index\tsentence\n0\tHe.\n1\tHim.\n",
    "STS-B/train": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n",
    "STS-B/dev": "index\tsentence1\tsentence2\tscore\n0\ta\tb\t0\n",
    "STS-B/test": "index\tsentence1\tsentence2\n0\ta\tb\n1\ta\tb\n2\ta\tb\n",
    "RTE/train": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n",
    "RTE/dev": "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n",
    "SST-2/train": "sentence\tlabel\ngood\t1\n",
    "SST-2/dev": "sentence\tlabel\nbad\t0\n",
    "MRPC/train": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\t\" a\tb\n",
    "MRPC/dev": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tc\td\n",
}  # fmt: skip


def folder(root: Path, **changed: str) -> Path:
    """A folder in the official layout; "SST_2__dev" changes SST-2/dev.tsv."""
    changed = {k.replace("__", "/").replace("_2", "-2"): v for k, v in changed.items()}
    for name, content in (TABLES | changed).items():
        path = root / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return root


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("glue"))


@pytest.fixture
def make(official, vocabulary):
    def make(task, root=official, **options):
        options = dict(tokenizer=vocabulary, length=16, folder=str(root)) | options
        return data.make(name="glue", task=task, **options)

    return make


def test_both_genres_of_mnli(make):
    made = make("mnli")
    assert made.train_split.texts == (["a b"], ["c"])
    assert made.train_split.labels.tolist() == [1]
    assert made.eval_split.texts == (["a", "c", "e"], ["b", "d", "f"])
    assert made.eval_split.labels.tolist() == [0, 2, 1]
    assert made.matched == 2
    only = make("mnli", eval="dev_mismatched")
    assert (only.num_eval, only.matched) == (1, 0)


def test_lines_of_qqp_that_are_broken(make, caplog):
    made = make("qqp")
    assert made.train_split.texts == (['who "is', "x"], ["what?", "y"])
    assert made.train_split.labels.tolist() == [1, 0]
    assert made.eval_split.labels.tolist() == [0]  # Windows' ends of lines
    assert "QQP/train.tsv: 2 lines without all columns left out" in caplog.messages[0]


def test_examples_that_people_did_not_agree_about(tmp_path, caplog):
    # As in multinli_1.0_dev_matched.txt, where the label is the first column.
    rows = "gold_label\tsentence1\tsentence2\n-\ta\tb\nneutral\tc\td\n-\te\tf\n"
    root = folder(tmp_path, MNLI__dev_matched=rows)
    files = glue.open_files(str(root), None)
    split = glue.read(files, "mnli", "dev", "")
    assert split.texts == (["c", "e"], ["d", "f"])
    assert split.labels.tolist() == [1, 1]
    assert split.parts == {"dev_matched": 1, "dev_mismatched": 1}
    assert caplog.messages == [f"{root}/MNLI/dev_matched.tsv: 2 examples of the label '-' left out"]  # fmt: skip


def test_no_line_of_a_test_set_is_left_out(tmp_path):
    broken = "id\tquestion1\tquestion2\n0\tp\tq\n1\tr\n2\ts\tt\n"
    files = glue.open_files(str(folder(tmp_path, QQP__test=broken)), None)
    with pytest.raises(UserError, match=r"QQP/test.tsv:3 has 2 columns, not 3: id, q"):
        glue.read_test(files, "qqp")


def test_a_mark_before_the_header_and_compressed_files(official, make, tmp_path):
    root = shutil.copytree(official, tmp_path / "g")
    for path in list(root.glob("*/*.tsv")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    made = make("mrpc", root)
    assert made.train_split.texts == (['" a'], ["b"])
    assert (made.train_split.labels, made.eval_split.labels) == ([1], [0])


@pytest.mark.parametrize(
    ("task", "want"),
    [
        ("cola", {"CoLA.tsv": "index\tprediction\n0\t0\n1\t1\n"}),
        ("qqp", {"QQP.tsv": "index\tprediction\n0\t0\n"}),
        # logits below 0 and above 5 are brought into the range
        ("stsb", {"STS-B.tsv": "index\tprediction\n0\t0.000\n1\t1.250\n2\t5.000\n"}),
        (
            "mnli",
            {
                "MNLI-m.tsv": "index\tprediction\n0\tentailment\n1\tneutral\n",
                "MNLI-mm.tsv": "index\tprediction\n0\tcontradiction\n",
                "AX.tsv": "index\tprediction\n0\tentailment\n1\tneutral\n",
            },
        ),
    ],
)  # fmt: skip
def test_files_to_submit(make, task, want):
    made = make(task, buckets=(8,))
    batches = list(made.test(2))
    assert all("label" not in batch for batch in batches)
    index = np.concatenate([b["index"][b["mask"]] for b in batches])[::-1]
    if task == "stsb":
        logits = np.array([-0.3, 1.25, 7.0])[index][:, None]
    else:
        logits = np.eye(3 if task == "mnli" else 2)[index % 3]
    assert made.submission({"index": index, "logits": logits}) == want
    with pytest.raises(ValueError, match="each of"):
        made.submission({"index": index[1:], "logits": logits[1:]})


@pytest.mark.parametrize(
    ("task", "words"),
    [("qnli", ["entailment", "not_entailment"]), ("rte", ["entailment", "not_entailment"]),
     ("wnli", ["0", "1"]), ("mrpc", ["0", "1"]), ("sst2", ["0", "1"])],
)  # fmt: skip
def test_how_classes_are_submitted(task, words):
    files = glue.submission(task, {"test": np.array([0, 1])})
    (text,) = files.values()
    assert [line.split("\t")[1] for line in text.splitlines()[1:]] == words


def test_texts_of_the_command_line(make, tmp_path):
    def run(batch):
        assert {k: v.dtype for k, v in batch.items()} == dict.fromkeys(
            ("tokens", "segments", "attended"), np.dtype(np.int32)
        )
        assert batch["tokens"].shape[1] == 16
        # Class 1 wins where the text has "good", 2053 in BERT's numbers is "no", 2204 "good"
        return np.where((batch["tokens"] == 2204).any(1)[:, None], [0.0, 2.0], [1.0, 0])

    file = tmp_path / "some.txt"
    # A separator of lines that does not end one, and an end of Windows.
    file.write_text("so good\r\n\nno good\u2028at all\n" + "bad\n" * 40, newline="")
    lines = list(make("sst2").predict(["a good film", "a film" * 300, str(file)], run))
    # The softmax of a difference d: 1 / (1 + exp(-d)); d = 2: 0.8808, d = 1: 0.7311.
    assert lines[0] == "positive 88.1%  a good film"
    assert lines[1].startswith("negative 73.1%  a film")
    assert lines[2:4] == [
        "positive 88.1%  so good",
        "positive 88.1%  no good\u2028at all",
    ]
    assert lines[4:] == ["negative 73.1%  bad"] * 40

    def similar(batch):
        return 1.234 * (batch["segments"].max(1) + batch["attended"].sum(1))[:, None]

    file.write_text("a\tb\n", encoding="utf-8")
    lines = list(make("stsb").predict(["cat|||dog", str(file)], similar))
    # [CLS] cat [SEP] dog [SEP]: 5 tokens and segment 1.
    assert lines == ["7.40  cat ||| dog", "7.40  a ||| b"]


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("sst2", [], r"predict needs texts, or files of them: run.py .* 'A SENTENCE\.'$"),
        ("rte", [], r"'A SENTENCE\. \|\|\| ANOTHER\.'$"),
        ("sst2", ["a ||| b"], r"'a \|\|\| b': 2 texts where GLUE.s sst2 takes one"),
        ("rte", ["a"], r"'a': 1 texts where GLUE.s rte takes two, as 'a \|\|\| b'"),
        ("rte", ["a ||| "], r"1 texts where GLUE.s rte takes two"),
        ("rte", ["FILE"], r"file.txt:2: 1 texts where GLUE.s rte takes two"),
        ("rte", ["EMPTY"], r"empty.txt holds no text"),
    ],
)  # fmt: skip
def test_texts_that_do_not_fit(make, tmp_path, task, given, message):
    (tmp_path / "file.txt").write_text("\nc\n")
    (tmp_path / "empty.txt").write_text("\n")
    names = {"FILE": "file.txt", "EMPTY": "empty.txt"}
    given = [str(tmp_path / names[each]) if each in names else each for each in given]
    with pytest.raises(UserError, match=message):
        list(make(task).predict(given, None))


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("sst2", {"SST_2__train": "sentence\tlabel\ngood\t1\nbad 0\n"}, r"SST-2/train.tsv:3 has 1 columns, not 2: sentence, label"),
        ("sst2", {"SST_2__dev": "sentence\tlabel\ngood\t1\tx\n"}, r"SST-2/dev.tsv:2 has 3 columns, not 2"),
        ("cola", {"CoLA__train": "x\t0\t*\tHim\nx\t0\tHim\n"}, r"CoLA/train.tsv:2 has 3 columns, not 4"),
        ("sst2", {"SST_2__dev": "sentence\tlabel\ngood\t1\nbad\t2\n"}, r"SST-2/dev.tsv:3 has the unknown label '2'; choose from 0, 1$"),
        ("mnli", {"MNLI__dev_matched": "sentence1\tsentence2\tgold_label\na\tb\tnetral\n"}, r"dev_matched.tsv:2 has the unknown label 'netral'; did you mean 'neutral'\?"),
        ("qqp", {"QQP__train": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\nbroken\n7\t1\t2\ta\tb\tc\n"}, r"QQP/train.tsv:3 has the unknown label 'c'"),
        ("stsb", {"STS-B__dev": "sentence1\tsentence2\tscore\na\tb\t3.2\na\tb\thigh\n"}, r"STS-B/dev.tsv:3 has the label 'high', which is not a number"),
        ("stsb", {"STS-B__dev": "sentence1\tsentence2\tscore\na\tb\tnan\n"}, r"dev.tsv:2 has the label 'nan', which is not a number"),
        ("sst2", {"SST_2__dev": "sentence\tvalue\ngood\t1\n"}, r"SST-2/dev.tsv lacks the column 'label': it has sentence, value"),
        ("sst2", {"SST_2__dev": ""}, r"SST-2/dev.tsv is empty"),
        ("sst2", {"SST_2__dev": "sentence\tlabel\n"}, r"config.data.eval = 'dev' of sst2 has no examples"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(make, tmp_path, task, changed, message):
    with pytest.raises(UserError, match=message) as caught:
        make(task, folder(tmp_path, **changed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sst"}, r"unknown GLUE task 'sst'; did you mean 'sst2'\? choose from cola, mnli, "),
        ({"task": "qnli", "train": None}, r"QNLI/dev.tsv is not there: config.data.eval = 'dev' may name another split"),
        ({"train": "trian"}, r"SST-2/trian.tsv is not there: config.data.train = 'trian' may"),
        ({"train": "train[5]"}, r"config.data.train = 'train\[5\]' is no split: write "),
        ({"train": "train[1:]"}, r"config.data.train = 'train\[1:\]' of sst2 has no examples"),
        ({"folder": None}, r"config.data needs either folder"),
        ({"data_dir": "."}, r"config.data needs either folder"),
        ({"folder": "nowhere"}, r"config.data.folder = 'nowhere' is not a folder"),
        ({"tokenizer": "nowhere"}, r"no tokenizer nowhere"),
        ({"length": 2}, r"length = 2 leaves no room"),
        ({"task": "mnli", "length": 4}, r"length = 4 leaves no room"),
        ({"buckets": (32,)}, r"config.data.buckets = \(32,\) should be ascending"),
        ({"limit_train": -1}, r"config.data.limit_train = -1"),
    ],
)  # fmt: skip
def test_options_that_are_wrong(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**({"task": "sst2"} | options))


def test_a_test_set_that_is_not_there(make, official):
    with pytest.raises(UserError, match=r"SST-2/test.tsv is not there"):
        make("sst2").test(4)


def test_what_is_no_table(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"a.tsv:1 is not UTF-8 text"):
        tsv.read(tmp_path / "a.tsv")
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"a\tb\n" * 99)[:-9])
    with pytest.raises(UserError, match=r"cannot read .*a.tsv.gz"):
        tsv.read(tmp_path / "a.tsv.gz")
    (tmp_path / "b.tsv.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"cannot read .*b.tsv.gz"):
        tsv.read(tmp_path / "b.tsv.gz")
