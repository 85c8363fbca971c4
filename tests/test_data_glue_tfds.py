"""GLUE as TFDS prepares it: written by TFDS itself, read without TensorFlow."""

import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from squeeze_jax import data
from squeeze_jax.data import glue
from squeeze_jax.errors import UserError


def prepare(data_dir, config, features, splits, file_format="array_record"):
    """Lets TFDS write what its own `glue` would: {split: [example, …]}."""

    class Glue(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version="2.0.0")]  # noqa: RUF012

        def _info(self):
            described = tfds.features.FeaturesDict(features | {"idx": np.int32})
            return tfds.core.DatasetInfo(builder=self, features=described)

        def _split_generators(self, manager):
            return {name: enumerate(rows) for name, rows in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Glue.name = "glue"
    tfds.disable_progress_bar()
    Glue(data_dir=data_dir, file_format=file_format).download_and_prepare()


TEXT = tfds.features.Text()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    rows = [
        {"sentence": f"été {n}", "label": ("positive", "negative")[n % 2], "idx": n}
        for n in range(12)
    ]
    classes = tfds.features.ClassLabel(names=["positive", "negative"])  # other order
    test = [row | {"label": -1} for row in rows[:3]]
    splits = {"train": rows, "validation": rows[:5], "test": test}
    prepare(root, "sst2", {"sentence": TEXT, "label": classes}, splits)
    pairs = [{"sentence1": "a", "sentence2": f"b{n}", "label": n / 2, "idx": n} for n in range(4)]  # fmt: skip
    features = {"sentence1": TEXT, "sentence2": TEXT, "label": np.float32}
    splits = {"train": pairs, "validation": pairs}
    splits["test"] = [row | {"label": -1.0} for row in pairs]
    prepare(root, "stsb", features, splits)
    classes = tfds.features.ClassLabel(names=glue.TASKS["mnli"].names)
    features = {"premise": TEXT, "hypothesis": TEXT, "label": classes}
    rows = [{"premise": "p", "hypothesis": f"h{n}", "label": n % 3, "idx": n} for n in range(6)]  # fmt: skip
    hidden = [row | {"label": -1} for row in rows]
    splits = {"train": rows, "validation_matched": rows[:4], "validation_mismatched": rows[:2],
              "test_matched": hidden[:3], "test_mismatched": hidden[:1]}  # fmt: skip
    prepare(root, "mnli", features, splits)
    prepare(root, "ax", features, {"test": hidden[:2]})
    return root


@pytest.fixture
def make(prepared, vocabulary):
    def make(task, root=prepared, **options):
        options = dict(tokenizer=vocabulary, length=16, data_dir=str(root)) | options
        return data.make(name="glue", task=task, **options)

    return make


def test_prepared_by_tfds(make):
    made = make("sst2")
    assert made.train_split.texts == ([f"été {n}" for n in range(12)],)
    # Named by the data set's own order, numbered in ours: positive is 1.
    assert made.train_split.labels.tolist() == [1, 0] * 6
    assert made.num_eval == 5
    rows = [row for b in made.test(2) for row in b["index"][b["mask"]]]
    assert rows == [0, 1, 2]
    made = make("stsb", train="train[50%:]")
    assert made.train_split.texts == (["a", "a"], ["b2", "b3"])
    assert made.train_split.labels.tolist() == [1.0, 1.5]
    made = make("mnli")
    assert (made.num_train, made.num_eval, made.matched) == (6, 6, 4)
    assert glue.read_test(made.files, "mnli").parts == {
        "test_matched": 3,
        "test_mismatched": 1,
        "diagnostic": 2,
    }


@pytest.mark.parametrize("task", ["sst2", "stsb", "mnli"])
@pytest.mark.parametrize("use", ["train", "eval"])
def test_a_split_without_labels_is_refused(make, task, use):
    """The test sets of GLUE have no labels; in their place TFDS writes -1."""
    with pytest.raises(UserError, match=rf"{task}/2.0.0 test.* has no labels .*'dev'"):
        make(task, **{use: "test"})


def test_what_tfds_has_not_prepared(make, prepared, tmp_path):
    with pytest.raises(UserError, match=r"glue/rte/validation is not there"):
        make("rte")
    with pytest.raises(UserError, match=r"glue/sst2/extra is not there"):
        make("sst2", train="extra")
    rows = [{"text": "a", "idx": 0}]
    prepare(tmp_path, "sst2", {"text": TEXT}, {"validation": rows})
    with pytest.raises(UserError, match=r"is not GLUE's sst2: it lacks sentence, label and has idx, text"):  # fmt: skip
        make("sst2", tmp_path)
    rows = [{"sentence": "a", "label": 0, "idx": 0}]
    features = {"sentence": TEXT, "label": tfds.features.ClassLabel(names=["0", "1"])}
    prepare(tmp_path, "cola", features, {"validation": rows})
    with pytest.raises(UserError, match=r"has the labels 0, 1, not unacceptable, acc"):
        make("cola", tmp_path)
    shutil.copytree(prepared, tmp_path / "g")
    for file in (tmp_path / "g/glue/sst2/2.0.0").glob("*.array_record*"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"cannot read .*2.0.0 validation"):
        make("sst2", tmp_path / "g")
    described = tmp_path / "g/glue/sst2/2.0.0/dataset_info.json"
    text = described.read_text().replace("array_record", "tfrecord")
    described.write_text(text)
    with pytest.raises(UserError, match=r"holds tfrecord files, not ArrayRecord: delete it and run `tfds build glue/sst2"):  # fmt: skip
        make("sst2", tmp_path / "g")
