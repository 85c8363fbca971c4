"""The conversion command: its files read by us and by TFDS, all of CIFAR-10, killed conversions, bad archives."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from squeeze_jax import data
from squeeze_jax.data import convert
from squeeze_jax.errors import UserError


def archive(path, sizes=((8, 8),), train=30, changes=None):
    """A small packed archive of flat pictures: red is the index, green the split."""
    arrays = {"classes": np.array(["cat", "dog", "emu"])}
    for green, (split, n) in enumerate({"train": train, "test": 4}.items()):
        files = []
        for i in range(n):
            buffer = io.BytesIO()
            color = (i * 8 % 256, green * 100, 50)
            Image.new("RGB", sizes[i % len(sizes)], color).save(buffer, "PNG")
            files.append(buffer.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        offsets = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_offsets"] = offsets.astype(np.uint32)
        arrays[f"{split}_labels"] = (np.arange(n) % 3).astype(np.uint8)
    arrays |= changes or {}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def opened(data_dir, name, size=8, **keys):
    source = {"name": "tfds", "dataset": name, "data_dir": str(data_dir)}
    return data.make(source=source, size=size, **keys)


def test_what_is_converted_is_read_in_order(tmp_path):
    seen = []
    folder, new = convert.convert(
        archive(tmp_path / "a.npz"), "pets", tmp_path / "d", lambda *p: seen.append(p)
    )
    assert (folder, new) == (tmp_path / "d" / "pets" / "1.0.0", True)
    assert seen == [("train", 0, 30), ("train", 30, 30), ("test", 0, 4), ("test", 4, 4)]
    read = opened(tmp_path / "d", "pets")
    assert read.label_names == ("cat", "dog", "emu")
    assert (read.num_train, read.num_eval, read.shape) == (30, 4, (8, 8, 3))
    (batch,) = read.eval(4)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], [0, 8, 16, 24])
    assert (batch["image"][..., 1] == 100).all()
    np.testing.assert_array_equal(batch["label"], [0, 1, 2, 0])
    batch = next(read.train(30, seed=0))
    np.testing.assert_array_equal(batch["image"][:, 3, 3, 0], batch["index"] * 8)
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


def png(kind, bits, row):
    """A PNG of 8x8 pixels by hand, after the PNG specification; all rows are the same bytes."""

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))  # fmt: skip

    header = struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header)
    parts += chunk(b"PLTE", bytes(range(9))) if kind == 3 else b""
    parts += chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# The kinds of colour in the PNG specification, table 11.1, and the channels without transparency.
PNGS = {
    "grey of 1 bit": (png(0, 1, b"\x55"), 1),
    "grey of 2 bits": (png(0, 2, b"\x1b" * 2), 1),
    "grey of 4 bits": (png(0, 4, b"\x1b" * 4), 1),
    "grey of 8 bits": (png(0, 8, bytes(range(8))), 1),
    "grey of 16 bits": (png(0, 16, bytes(range(16))), 1),
    "grey of 8 bits and alpha": (png(4, 8, bytes(range(200, 216))), 1),
    "palette": (png(3, 2, b"\x12" * 2), 3),
    "RGB": (png(2, 8, bytes(range(24))), 3),
    "RGBA": (png(6, 8, bytes(range(32))), 3),
}


@pytest.mark.parametrize("kinds", [*((kind,) for kind in PNGS), ("grey of 16 bits", "RGB")], ids=str)  # fmt: skip
def test_an_archive_has_the_channels_of_a_folder_of_its_files(tmp_path, kinds):
    files = [PNGS[kind][0] for kind in kinds] * (2 // len(kinds))
    arrays = {}
    for split in "train", "test":
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = np.arange(2)
        for label, content in zip(("cat", "dog"), files, strict=True):
            (tmp_path / "f" / split / label).mkdir(parents=True)
            (tmp_path / "f" / split / label / "0.png").write_bytes(content)
    np.savez(tmp_path / "a.npz", classes=np.array(["cat", "dog"]), **arrays)
    convert.convert(tmp_path / "a.npz", "pets", tmp_path / "d")
    converted = opened(tmp_path / "d", "pets")
    folder = data.make(source={"name": "folder", "root": str(tmp_path / "f")}, size=8)
    channels = max(PNGS[kind][1] for kind in kinds)
    assert converted.shape == folder.shape == (8, 8, channels)
    (first,), (second,) = converted.eval(2), folder.eval(2)
    np.testing.assert_array_equal(first["image"], second["image"])


def test_tfds_itself_reads_it(tmp_path):
    import tensorflow_datasets as tfds

    # Pictures of two sizes: the shape is open where they differ.
    packed = archive(tmp_path / "a.npz", sizes=((8, 8), (8, 6)))
    folder, _ = convert.convert(packed, "pets", tmp_path / "d")
    builder = tfds.builder_from_directory(folder)
    assert builder.info.features["image"].shape == (None, 8, 3)
    assert builder.info.features["label"].names == ["cat", "dog", "emu"]
    assert builder.info.supervised_keys == ("image", "label")
    assert builder.info.splits["train"].num_examples == 30
    source = builder.as_data_source("train")
    assert source[5]["image"].shape == (6, 8, 3)
    assert source[5]["image"][0, 0].tolist() == [40, 0, 50]
    assert [source[i]["label"] for i in range(4)] == [0, 1, 2, 0]
    assert "tensorflow" not in sys.modules


def test_all_of_cifar10(cifar10):
    read = opened(cifar10, "cifar10", 32)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert read.label_names == tuple(names.split())
    assert (read.num_train, read.num_eval) == (50_000, 10_000)
    batches = list(read.eval(2500))
    labels = np.concatenate([b["label"] for b in batches])
    assert np.bincount(labels).tolist() == [1000] * 10
    images = np.concatenate([b["image"] for b in batches])
    # Published per-channel means of CIFAR-10's training images are 0.491, 0.482, 0.447; the test set's are as close as this.
    np.testing.assert_allclose(
        images.mean((0, 1, 2)) / 255, [0.491, 0.482, 0.447], atol=0.006
    )
    # Sky and sea against land animals: mean blue less mean red tells the classes' names from others' order.
    blueness = images[..., 2].mean((1, 2)) - images[..., 0].mean((1, 2))
    per_class = dict(
        zip(
            read.label_names,
            [blueness[labels == i].mean() for i in range(10)],
            strict=True,
        )
    )
    bluest = sorted(per_class, key=per_class.get)[-2:]
    assert set(bluest) == {"airplane", "ship"}
    train = np.concatenate(
        [
            [e.label for e in read.train_reader.examples.read(range(i, i + 5000))]
            for i in range(0, 50_000, 5000)
        ]
    )
    assert np.bincount(train).tolist() == [5000] * 10


def command(*args):
    return subprocess.Popen(
        [sys.executable, "-m", "squeeze_jax.data.convert", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[1],
    )


@pytest.fixture
def long(tmp_path):
    """An archive that takes seconds to convert: one picture 40,000 times."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    file, n = np.frombuffer(buffer.getvalue(), np.uint8), 40_000
    changes = {
        "train_jpeg": np.tile(file, n),
        "train_offsets": (np.arange(n + 1) * len(file)).astype(np.uint32),
        "train_labels": np.zeros(n, np.uint8),
    }
    return archive(tmp_path / "long.npz", changes=changes)


@pytest.mark.parametrize("written", [1000, 39000])
def test_a_killed_conversion_never_looks_complete(tmp_path, long, written):
    base = tmp_path / "d"
    args = (long, "--name=pets", f"--data_dir={base}")
    with command(*args) as first:
        seen = b""
        while f"train {written}/40000".encode() not in seen:
            seen += os.read(first.stderr.fileno(), 1000)
        first.kill()
    assert first.returncode == -9
    assert (base / ".pets.incomplete").is_dir()
    with pytest.raises(UserError, match="no data set 'pets'"):
        opened(base, "pets")

    with command(*args) as second:
        out, err = second.communicate(timeout=120)
    folder = base / "pets" / "1.0.0"
    assert out.startswith(f"wrote {folder} in ".encode())
    assert b"\rpets: train 40000/40000 images\n" in err
    assert err.endswith(b"\rpets: test 4/4 images\n")
    assert os.listdir(base) == ["pets"]
    assert opened(base, "pets").num_train == 40_000
    assert convert.convert(long, "pets", base) == (folder, False)


def test_two_conversions_do_not_meet(tmp_path):
    packed, work = archive(tmp_path / "a.npz"), tmp_path / "d" / ".pets.incomplete"
    work.mkdir(parents=True)
    with convert._exclusive(work), pytest.raises(UserError) as error:
        convert.convert(packed, "pets", tmp_path / "d")
    assert str(error.value) == f"another conversion is writing to {work}"
    assert convert.convert(packed, "pets", tmp_path / "d")[1]


def test_the_command_speaks_in_one_line(tmp_path, capsys):
    packed = archive(tmp_path / "a.npz")
    args = [str(packed), "--name=pets", f"--data_dir={tmp_path}"]
    assert convert.main(args) == 0
    assert convert.main(args) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [f"already there: {tmp_path / 'pets' / '1.0.0'}"]
    assert convert.main([str(tmp_path / "no.npz"), "--name=other"]) == 2
    assert capsys.readouterr().err == f"error: no archive {tmp_path / 'no.npz'}\n"


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("Pets", {}, "--name=Pets: a data set's name is lower case"),
        ("../x", {}, "--name=../x: a data set's name is lower case"),
        ("pets", dict(classes=None), "lacks classes: it needs"),
        ("pets", dict(test_labels=None), "lacks test_labels: it needs"),
        ("pets", dict(train_jpeg=None, test_jpeg=None), "lacks SPLIT_jpeg: it needs"),
        (
            "pets",
            {"te st_jpeg": np.zeros(1), "te st_offsets": [0, 1], "te st_labels": [0]},
            "te st_jpeg: TFDS takes no split 'te st'",
        ),
        ("pets", dict(classes=np.array("cat")), "classes is <U3 []: it should be "),
        ("pets", dict(classes=np.arange(3)), "classes is int64 [3]: it should be str"),
        ("pets", dict(classes=np.zeros(0, str)), "classes is <U1 [0]: it should be "),
        ("pets", dict(classes=[["cat"]]), "classes is <U3 [1, 1]: it should be str"),
        (
            "pets",
            dict(classes=np.array(["cat", None], object)),
            "classes cannot be read (Object arrays cannot be loaded",
        ),
        ("pets", dict(classes=["cat", "dog", "dog "]), "[2] and [1] are both 'dog'"),
        ("pets", dict(classes=["cat", " ", "dog"]), "classes[1] is blank: give the"),
        ("pets", dict(classes=["cat", "", "dog"]), "classes[1] is blank: give the"),
        ("pets", dict(classes=["cat\n", "dog", "emu"]), "which has a line break: rena"),
        ("pets", dict(classes=["a\rb", "dog", "emu"]), "which has a line break: rena"),
        ("pets", dict(classes=["a\x85", "dog", "emu"]), "which has a line break: rena"),
        (
            "pets",
            dict(classes=[b"cat", b"\xe9", b"emu"]),
            "[1] is b'\\xe9', which is not",
        ),
        ("pets", dict(classes=["\ud800", "dog"]), "which is not UTF-8: rename the"),
        (
            "pets",
            dict(test_labels=[0, 1, 3, 2]),
            "test_labels[2] is 3: it should be an",
        ),
        (
            "pets",
            dict(test_labels=[0, -1, 3, 2]),
            "test_labels[1] is -1: it should be ",
        ),
        (
            "pets",
            dict(test_labels=[0, 1.9, 0, 2]),
            "test_labels[1] is 1.9: it should b",
        ),
        (
            "pets",
            dict(test_labels=[0, np.nan, 1, 2]),
            "test_labels[1] is nan: it shoul",
        ),
        (
            "pets",
            dict(test_labels=[[0], [1]]),
            "test_labels is int64 [2, 1]: it should",
        ),
        (
            "pets",
            dict(test_labels=["cat"] * 4),
            "test_labels is <U3 [4]: it should be ",
        ),
        (
            "pets",
            dict(test_labels=np.zeros(0, int)),
            "test_labels is empty: fill the s",
        ),
        (
            "pets",
            dict(test_labels=[0, 1]),
            "test_offsets has 5 entries: it should be 3 integers that rise from 0 to ",
        ),
        ("pets", dict(test_offsets=np.arange(5.0)), "test_offsets is float64 [5]: it"),
        (
            "pets",
            dict(test_offsets=[[0, 1]]),
            "test_offsets is int64 [1, 2]: it should",
        ),
        ("pets", dict(test_offsets=np.zeros(0, int)), "test_offsets has 0 entries: it"),
        (
            "pets",
            dict(test_offsets=[0, 9, 9, 10, 20], test_jpeg=np.zeros(20, np.uint8)),
            "test_offsets goes from 9 at 1 to 9 at 2: it should be 5 integers",
        ),
        (
            "pets",
            dict(
                test_offsets=np.array([0, 9, 5, 10, 20], np.uint64),
                test_jpeg=np.zeros(20, np.uint8),
            ),
            "test_offsets goes from 9 at 1 to 5 at 2: it should be 5 integers",
        ),
        (
            "pets",
            dict(test_offsets=[-1, 5, 9, 10, 20], test_jpeg=np.zeros(20, np.uint8)),
            "test_offsets goes from -1 to 20: it should be 5 integers",
        ),
        (
            "pets",
            dict(test_offsets=[0, 5, 9, 10, 20], test_jpeg=np.zeros(21, np.uint8)),
            "test_offsets goes from 0 to 20: it should be 5 integers that rise from 0 to 21",
        ),
        ("pets", dict(test_jpeg=np.zeros(9)), "test_jpeg is float64 [9]: it should be"),
        (
            "pets",
            dict(test_jpeg=np.zeros((2, 9), np.uint8)),
            "test_jpeg is uint8 [2, 9]",
        ),
        (
            "pets",
            dict(test_offsets=[0, 5, 9, 10, 20], test_jpeg=np.zeros(20, np.uint8)),
            "test_jpeg holds no image at 0, where test_offsets[0] begins: no known",
        ),
    ],
)
def test_bad_archives_are_named_before_anything_is_written(
    tmp_path, name, changes, line
):
    packed = archive(tmp_path / "a.npz", changes=changes)
    with pytest.raises(UserError) as error:
        convert.convert(packed, name, tmp_path / "d")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--name=" if name != "pets" else f"{packed}")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": np.array([b"caf\xc3\xa9", b"dog", b"emu"])},
        {"classes": ["café ", " dog", "emu"]},
        {"classes": ["café", "dog", "emu"], "test_labels": [0.0, 1.0, 2.0, 0.0]},
        {"classes": ["café", "dog", "emu"], "train_labels": np.zeros(30, bool)},
    ],
    ids=["bytes", "spaces", "floats", "bools"],
)
def test_other_dtypes_are_converted(tmp_path, changes):
    packed = archive(tmp_path / "a.npz", changes=changes)
    convert.convert(packed, "pets", tmp_path / "d")
    read = opened(tmp_path / "d", "pets")
    assert read.label_names == ("café", "dog", "emu")
    (batch,) = read.eval(4)
    np.testing.assert_array_equal(batch["label"], [0, 1, 2, 0])


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and no more"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz is not an npz archive"):
        convert.convert(path, "pets", tmp_path / "d")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    packed = archive(tmp_path / "a.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write to .*file/d: Not a directory"):
        convert.convert(packed, "pets", tmp_path / "file" / "d")
