"""Digits, folders and TFDS sets: what they hold, and what they say about mistakes."""

import io
import shutil

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from squeeze_jax import data
from squeeze_jax.data.sources import digits, folder, tfds
from squeeze_jax.errors import UserError


def says(error) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("file", [digits._FILE, "moved.csv.gz"])
def test_digits_are_scikit_learns_stretched_to_bytes(file, monkeypatch):
    """Read from its file, or by its function where the file has moved."""
    monkeypatch.setattr(digits, "_FILE", file)
    source = digits.make()
    assert source.label_names == tuple("0123456789")
    assert (len(source.train), len(source.eval), source.channels) == (1437, 360, 1)
    everything = [s.read(range(len(s))) for s in (source.train, source.eval)]
    # 16 grey levels above black: level 16 is 255, level 8 is 127.5, which rounds to the even 128.
    truth = sklearn.datasets.load_digits()
    wanted = sorted(
        (label, tuple(np.rint(image * 255 / 16).astype(int).ravel()))
        for image, label in zip(truth.images, truth.target, strict=True)
    )
    found = sorted((e.label, tuple(e.image.ravel())) for s in everything for e in s)
    assert found == wanted
    assert everything[0][0].image.shape == (8, 8, 1)
    # Stratified: a class holds 174 to 183 examples, a fifth of them is 35 or 36 (34.8 to 36.6, one more or less).
    counts = np.bincount([e.label for e in everything[1]])
    expected = np.bincount(truth.target) / 5
    assert (np.abs(counts - expected) < 1).all()


def test_digits_split_is_fixed():
    first, second = digits.make(), digits.make()
    for a, b in zip(
        first.eval.read(range(360)), second.eval.read(range(360)), strict=True
    ):
        np.testing.assert_array_equal(a.image, b.image)


def test_digits_can_be_learned():
    """The nearest training image has the right label: images and labels belong together."""
    source = digits.make()
    x, y = (
        (
            np.stack([e.image for e in s]).reshape(len(s), -1).astype(float),
            np.array([e.label for e in s]),
        )
        for s in (source.train.read(range(1437)), source.eval.read(range(360)))
    )
    distance = (y[0] ** 2).sum(1)[:, None] - 2 * y[0] @ x[0].T + (x[0] ** 2).sum(1)
    # scikit-learn's own example of nearest neighbours on these data is right in 98 to 99 of 100.
    assert (x[1][distance.argmin(1)] == y[1]).mean() > 0.97


@pytest.mark.parametrize("name", ["val", "validation", "eval"])
def test_folder_takes_the_usual_names_of_a_second_split(photos, tmp_path, name):
    root = tmp_path / "set"
    shutil.copytree(photos / "train", root / "train")
    shutil.copytree(photos / "test", root / name)
    source = folder.make(str(root))
    assert (len(source.train), len(source.eval)) == (20, 7)
    assert {e.name.split("/")[-3] for e in source.eval.read(range(7))} == {name}


def test_folder_reads_nested_files_and_ignores_others(photos, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(photos, root)
    (root / "train" / "ant" / "more").mkdir()
    shutil.move(root / "train" / "ant" / "0.png", root / "train" / "ant" / "more")
    (root / "train" / "ant" / "notes.txt").write_text("x")
    (root / "train" / "ant" / ".hidden.png").write_text("x")
    (root / "train" / ".cache").mkdir()
    source = folder.make(str(root))
    assert (len(source.train), source.label_names) == (20, ("ant", "bee", "cow"))


def test_folder_holdout_depends_on_each_file_alone(photos, tmp_path):
    root = tmp_path / "one"
    for copy in range(10):
        for file in (photos / "train").rglob("*.*g"):
            target = root / file.parent.name / f"{copy}-{file.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    before = folder.make(str(root), holdout=0.25)
    assert len(before.train) + len(before.eval) == 200
    assert abs(len(before.eval) - 50) < 5 * (200 * 0.25 * 0.75) ** 0.5
    held_out = {e.name for e in before.eval.read(range(len(before.eval)))}
    trained = {e.name for e in before.train.read(range(len(before.train)))}
    assert not held_out & trained
    for i in range(30):
        shutil.copy(photos / "train" / "ant" / "0.png", root / "ant" / f"new{i}.png")
    moved = root.rename(tmp_path / "elsewhere")
    after = folder.make(str(moved), holdout=0.25)
    again = {
        e.name.replace("elsewhere", "one")
        for e in after.eval.read(range(len(after.eval)))
    }
    assert {n for n in again if "new" not in n} == held_out


def test_folder_of_grey_images_has_one_channel(tmp_path):
    for place in "train/a", "train/b", "test/a":
        path = tmp_path / place
        path.mkdir(parents=True)
        Image.new("L", (9, 9), 77).save(path / "a.png")
    source = {"name": "folder", "root": str(tmp_path)}
    assert data.make(source=source, size=8).shape == (8, 8, 1)
    coloured = data.make(source=source, size=8, channels=3)
    (batch,) = coloured.eval(1)
    np.testing.assert_array_equal(batch["image"], np.full((1, 8, 8, 3), 77))


def test_folder_says_what_is_wrong(photos, tmp_path):
    def make(root, **keys):
        with pytest.raises(UserError) as error:
            folder.make(str(root), **keys)
        return says(error)

    missing = tmp_path / "missing"
    assert make(missing) == f"config.data.source.root = '{missing}' is not a folder"
    root = tmp_path / "set"
    shutil.copytree(photos, root)
    assert "leave holdout out" in make(root, holdout=0.1)
    assert "holdout=0.1" in make(root / "train")
    assert "it is 1.5, not between 0 and 1" in make(root / "train", holdout=1.5)
    assert "no image is left for evaluation" in make(root / "train", holdout=1e-9)
    (root / "test" / "bee").rename(root / "test" / "bees")
    line = make(root)
    assert line.startswith(f"{root / 'test' / 'bees'}: class 'bees' is not in")
    assert "did you mean 'bee'?" in line
    shutil.rmtree(root / "test")
    assert "no test or val or validation or eval folder" in make(root)
    (root / "test").mkdir()
    assert make(root).startswith(f"{root / 'test'} holds no folders")
    (root / "train" / "dog").mkdir()
    assert make(root).startswith(f"{root / 'train' / 'dog'} holds no images (.jpg ")


def test_folder_names_a_file_that_has_gone(photos, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(photos, root)
    source = folder.make(str(root))
    gone = root / "train" / "ant" / "1.jpeg"
    gone.unlink()
    with pytest.raises(UserError) as error:
        source.train.read([0, 1])
    assert says(error) == f"cannot read {gone}: No such file or directory"


def prepared(root, *paths):
    for path in paths:
        (root / path).mkdir(parents=True)
        (root / path / "dataset_info.json").write_text("{}")
    return str(root)


def test_tfds_finds_the_newest_version_config_and_exact_ones(tmp_path):
    data_dir = prepared(
        tmp_path,
        "mnist/3.0.1",
        "mnist/3.0.10",
        "mnist/2.9.9",
        "small/8x8/1.0.0",
        ".half.incomplete/half/1.0.0",
        "half/incomplete.XYZ_1.0.0",
    )
    (tmp_path / "empty" / "1.0.0").mkdir(parents=True)
    assert tfds.find("mnist", data_dir) == tmp_path / "mnist" / "3.0.10"
    assert tfds.find("mnist:3.0.1", data_dir) == tmp_path / "mnist" / "3.0.1"
    assert tfds.find("small/8x8", data_dir) == tmp_path / "small" / "8x8" / "1.0.0"
    for dataset, line in {
        "mnst": "no data set 'mnst' in {}; did you mean 'mnist'? choose from mnist, small/8x8; to prepare it, run",
        "half": "no data set 'half' in {}; choose from mnist, small/8x8; to prepare it, run `python -m squeeze_jax.data.convert",
        "empty": "no data set 'empty' in {}",
        "small": "small has configs; choose from small/8x8",
        "mnist:1.0.0": "no version '1.0.0' of mnist in {}; ",
    }.items():
        with pytest.raises(UserError) as error:
            tfds.find(dataset, data_dir)
        assert says(error).startswith(line.format(tmp_path))


def test_tfds_says_how_to_prepare_a_set_in_a_missing_folder(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(UserError) as error:
        data.make(
            source={"name": "tfds", "dataset": "mnist", "data_dir": str(missing)},
            size=8,
        )
    line = says(error)
    assert line.startswith(f"config.data.source.data_dir = '{missing}' is not a folder")
    assert f"`tfds build mnist --file_format=array_record --data_dir={missing}`" in line


def png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, features, rows, **keys):
    """A data set written by TFDS itself."""
    import tensorflow_datasets as tfds_

    class Made(tfds_.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds_.core.Version("1.0.0")

        def _info(self):
            return tfds_.core.DatasetInfo(
                builder=self, features=tfds_.features.FeaturesDict(features), **keys
            )

        def _split_generators(self, dl_manager):
            return {"train": enumerate(rows), "test": enumerate(rows)}

        def _generate_examples(self):
            raise NotImplementedError

    tfds_.disable_progress_bar()
    Made(data_dir=folder, file_format="array_record").download_and_prepare()


def test_tfds_reads_what_tfds_wrote(tmp_path):
    """Other features beside the two, other names for them, grey images, slices of splits."""
    import tensorflow_datasets as tfds_

    pixels = np.random.default_rng(0).integers(0, 256, (10, 7, 9, 1), np.uint8)
    features = {
        "picture": tfds_.features.Image(shape=(7, 9, 1)),
        "id": tfds_.features.Text(),
        "mask": tfds_.features.Image(shape=(7, 9, 1)),
        "kind": tfds_.features.ClassLabel(names=["no", "yes"]),
    }
    rows = [
        {"picture": png(p), "id": "x", "mask": png(255 - p), "kind": i % 2}
        for i, p in enumerate(pixels)
    ]
    write(
        tmp_path,
        features,
        rows,
        supervised_keys=("picture", "kind"),
        disable_shuffling=True,
    )
    source = tfds.make("made", str(tmp_path), train="train[:60%]", eval="train[60%:]")
    assert (source.label_names, source.channels) == (("no", "yes"), 1)
    assert (len(source.train), len(source.eval)) == (6, 4)
    assert [e.label for e in source.eval.read([0, 1, 3])] == [0, 1, 1]
    assert source.eval.read([3])[0].name == "made train[60%:][3]"
    keys = {"dataset": "made", "data_dir": str(tmp_path)}
    opened = data.make(source={"name": "tfds", **keys}, size=32, eval_resize=0)
    assert opened.shape == (32, 32, 1)
    for wrong, line in {
        "tset": "made has no split 'tset'; did you mean 'test'? choose from test, train",
        "train[x": "made has no split 'train[x'; did you mean 'train'?",
    }.items():
        with pytest.raises(UserError) as error:
            tfds.make("made", str(tmp_path), eval=wrong)
        assert says(error).startswith(line)


def test_tfds_names_an_example_whose_label_is_outside_the_classes(tmp_path):
    import tensorflow_datasets as tfds_

    features = {
        "image": tfds_.features.Image(shape=(8, 8, 3)),
        "label": tfds_.features.ClassLabel(num_classes=5),
    }
    image = png(np.zeros((8, 8, 3), np.uint8))
    rows = [{"image": image, "label": label} for label in (0, 1, 4, 2)]
    write(tmp_path, features, rows, disable_shuffling=True)
    # As a careless edit of the metadata would have it.
    file = tmp_path / "made" / "1.0.0" / "features.json"
    text = file.read_text()
    assert '"numClasses": "5"' in text
    file.write_text(text.replace('"numClasses": "5"', '"numClasses": "3"'))
    opened = data.make(
        source={"name": "tfds", "dataset": "made", "data_dir": str(tmp_path)}, size=8
    )
    assert opened.num_classes == 3
    for batches in opened.train(4, seed=0), opened.eval(4):
        with pytest.raises(UserError) as error:
            next(batches)
        assert "[2] has label 4, outside the data set's 3 classes" in says(error)


def test_tfds_refuses_what_is_no_classification_set_or_no_arrayrecord(tmp_path):
    import tensorflow_datasets as tfds_

    write(tmp_path, {"text": tfds_.features.Text()}, [{"text": "x"}])
    with pytest.raises(UserError) as error:
        tfds.make("made", str(tmp_path))
    line = "made is not an image classification set: its features are text"
    assert says(error) == line


def test_tfds_says_how_to_rebuild_files_that_need_tensorflow(tmp_path):
    import tensorflow_datasets as tfds_

    features = {
        "image": tfds_.features.Image(shape=(8, 8, 3)),
        "label": tfds_.features.ClassLabel(num_classes=2),
    }
    row = {"image": png(np.zeros((8, 8, 3), np.uint8)), "label": 0}
    write(tmp_path, features, [row])
    folder = tmp_path / "made" / "1.0.0"
    file = folder / "dataset_info.json"
    text = file.read_text()
    assert '"array_record"' in text
    file.write_text(text.replace('"array_record"', '"tfrecord"'))
    for record in folder.glob("*array_record*"):
        record.rename(str(record).replace("array_record", "tfrecord"))
    with pytest.raises(UserError) as error:
        tfds.make("made", str(tmp_path))
    line = says(error)
    assert line.startswith(f"{folder} holds tfrecord files, not ArrayRecord: run")
    assert f"--file_format=array_record --data_dir={tmp_path}`" in line


@pytest.mark.parametrize("damage", ["cut", "overwritten", "gone"])
def test_tfds_names_a_split_whose_files_are_damaged(tmp_path, damage):
    import tensorflow_datasets as tfds_

    features = {
        "image": tfds_.features.Image(shape=(8, 8, 3)),
        "label": tfds_.features.ClassLabel(num_classes=2),
    }
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    write(tmp_path, features, [{"image": png(p), "label": 0} for p in noise])
    (file,) = (tmp_path / "made" / "1.0.0").glob("*train*")
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        half = content[: len(content) // 2]
        rest = b"" if damage == "cut" else b"\x07" * (len(content) - len(half))
        file.write_bytes(half + rest)
    source = tfds.make("made", str(tmp_path))
    with pytest.raises(UserError, match=r"^cannot read made train: .*; delete and"):
        source.train.read(range(50))
    assert len(source.eval.read(range(50))) == 50
