"""Image data as users have them: mixed files, hidden files, bad files, odd names, transparency, depth, and what is said of them."""

import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import types
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import run as run_py
from squeeze_jax import data, files
from squeeze_jax.data import photos, survey, text_files, vision
from squeeze_jax.data.sources import coco, folder, pairs, tfds
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _plan, _pretrained, fit

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)
LATIN = os.fsdecode(b"caf\xe9")  # no UTF-8


def encode(picture, format="PNG", **keys):
    """An image file's bytes of a picture, or of uint8 [h, w, c] or [h, w]."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format, **keys)
    return buffer.getvalue()


def put(root, name, content=None):
    """Writes an image file, or any bytes, below a folder."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(COLOUR) if content is None else content)
    return path


def line_of(call, *arguments, **keys):
    """The one line of the error that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- sources of the same images, in every layout -------------------------------------------------------------------------


def as_folder(root, images):
    for split in "train", "test":
        for name, content in images.items():
            put(root, f"{split}/a/{name}", content)
            put(root, f"{split}/b/{name}", content)
    return dict(name="folder", root=str(root)), "images", 4


def as_holdout(root, images):
    for name, content in images.items():
        put(root, f"a/{name}", content)
        put(root, f"b/{name}", content)
    return dict(name="folder", root=str(root), holdout=0.5), "images", 2


def as_pairs(root, images):
    for split in "train", "test":
        for name, content in images.items():
            put(root, f"{split}/{name}", content)
            target = f"{split}annot/{name.rpartition('.')[0]}.png"
            put(root, target, encode(np.zeros((8, 8), np.uint8)))
    keys = dict(name="pairs", root=str(root), classes=("a", "b"))
    return keys, "segmentation", 2


def as_zip(root, images):
    keys, task, times = as_pairs(root / "unpacked", images)
    with zipfile.ZipFile(root / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((root / "unpacked").rglob("*")):
            archive.write(path, path.relative_to(root / "unpacked"))
    return keys | dict(root=str(root / "all.zip")), task, times


def as_coco(root, images):
    rows = [
        dict(id=i, file_name=name, width=8, height=8) for i, name in enumerate(images)
    ]
    box = dict(id=1, image_id=0, category_id=1, bbox=[1, 1, 4, 4], iscrowd=0)
    tables = dict(images=rows, categories=[dict(id=1, name="a")], annotations=[box])
    for split in "train", "val":
        put(root, f"{split}.json", json.dumps(tables).encode())
        for name, content in images.items():
            put(root, f"{split}/{name}", content)
    keys = dict(train="train.json", eval="val.json")
    places = dict(train_images="train", eval_images="val")
    return dict(name="coco", root=str(root)) | keys | places, "detection", 2


LAYOUTS = dict(
    folder=as_folder, holdout=as_holdout, pairs=as_pairs, zip=as_zip, coco=as_coco
)


@pytest.fixture(params=LAYOUTS)
def opened(request, tmp_path):
    """Opens images {name: bytes} in one of the layouts; returns the data and how often each image is there."""

    def make(images, **keys):
        source, task, times = LAYOUTS[request.param](tmp_path, images)
        return data.make(task, source=source, size=8, **keys), times

    return make


def mixture(odd, other, at):
    """Nine images, of which one is odd."""
    images = {f"{i}.png": encode(other) for i in range(9)}
    return images | {f"{at}.png": encode(odd)}


# --- channels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 8])
@pytest.mark.parametrize("odd", ["grey", "colour"])
def test_all_files_decide_the_channels(opened, odd, at):
    arrays = (GREY, COLOUR) if odd == "grey" else (COLOUR, GREY)
    made, times = opened(mixture(*arrays, at))
    assert made.shape == (8, 8, 3)
    few, many = times, 8 * times
    grey, colour = (few, many) if odd == "grey" else (many, few)
    (note,) = made.notes
    said = f"{grey} grey, turned into 3 equal channels, beside {colour} in colour"
    assert note == f"{9 * times} images: {said}"
    # Nothing of a colour image is lost, wherever it stands, and a grey one is the same in each channel.
    seen = [b["image"][i] for b in made.eval(4) for i in np.flatnonzero(b["mask"])]
    three = np.repeat(GREY[..., None], 3, -1)
    kinds = [
        "colour" if (image == COLOUR).all() else "grey" if (image == three).all() else 0
        for image in seen
    ]
    assert set(kinds) <= {"grey", "colour"}
    assert "colour" in kinds


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_images_that_are_all_grey_have_one_channel(opened, mode):
    picture = Image.fromarray(GREY)
    wide = Image.fromarray(GREY.astype(np.uint16) * 257)
    pictures = {"I;16": wide, "1": picture.convert("1"), "LA": picture.convert("LA")}
    image = encode(pictures.get(mode, picture))
    made, _ = opened({"x.png": image, "y.png": encode(GREY)})
    assert made.shape == (8, 8, 1)
    assert not any("channels" in note for note in made.notes)


def test_channels_of_the_config_are_said(opened):
    made, times = opened(mixture(GREY, COLOUR, 0), channels=1)
    assert made.shape == (8, 8, 1)
    said = (
        f"{9 * times} images: {8 * times} in colour, turned grey, beside {times} grey"
    )
    assert made.notes == (said,)


def test_a_sample_of_many_files_is_stated(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "SAMPLE", 10)
    names = [f"{i:02}" for i in range(25)]
    for name in names:
        put(tmp_path, name, encode(GREY))
    looked = []

    def read(name):
        looked.append(name)
        return open(tmp_path / name, "rb")

    found = survey.survey_images(names, read)
    # Every 2.5th file.
    assert looked == ["00", "02", "05", "07", "10", "12", "15", "17", "20", "22"]
    assert (found.total, found.grey, found.channels) == (25, 10, 1)
    view = vision.View(size=4, channels=1)
    assert survey.describe_changes(found, view)[-1] == "counted in a sample of 10"


# --- files that are left out ---------------------------------------------------------------------------------------------

INTRUDERS = {
    ".ipynb_checkpoints/x.png": "hidden folder",
    "__MACOSX/._x.png": "hidden folder",
    "@eaDir/x.png": "hidden folder",
    "._x.jpg": "hidden file",
    ".x.png": "hidden file",
    "Thumbs.db": "hidden file",
    "notes.txt": ".txt file",
    "x.HEIC": ".heic file",
    "README": "file",
}


@pytest.mark.parametrize("name", INTRUDERS)
def test_what_is_no_image_is_left_out_counted_and_named(tmp_path, name):
    images = {f"{i}.png": encode(COLOUR) for i in range(4)}
    first = name.split("/")[0]
    # Training.
    for split in "train", "test":
        for image in images:
            put(tmp_path / "f", f"{split}/a/{image}")
            put(tmp_path / "f", f"{split}/b/{image}")
    put(tmp_path / "f", f"train/a/{name}")
    source = folder.make(str(tmp_path / "f"))
    assert (len(source.train), len(source.eval), source.label_names) == (8, 8, ("a", "b"))  # fmt: skip
    line = f"left out in {tmp_path / 'f' / 'train'}: 1 {INTRUDERS[name]} (a/{first})"
    assert source.notes == (line,)
    # Pairs.
    as_pairs(tmp_path / "p", images)
    put(tmp_path / "p", f"train/{name}")
    keys = as_pairs(tmp_path / "p", images)[0]
    keys.pop("name")
    source = pairs.make(**keys)
    assert (len(source.train), len(source.eval)) == (4, 4)
    line = f"left out in {tmp_path / 'p'}: 1 {INTRUDERS[name]} (train/{first})"
    assert source.notes == (line,)
    # The job predict.
    for image in images:
        put(tmp_path / "g", image)
    put(tmp_path / "g", name)
    paths, lines = photos.find_images([str(tmp_path / "g")])
    assert [path.name for path in paths] == list(images)
    assert lines == [f"left out in {tmp_path / 'g'}: 1 {INTRUDERS[name]} ({first})"]


@pytest.mark.parametrize(
    "suffix",
    [
        *("jpg", "jpeg", "jpe", "JFIF", "png", "webp", "bmp", "gif"),
        *("tif", "TIFF", "ppm", "pgm"),
    ],
)
def test_the_same_suffixes_count_everywhere(tmp_path, suffix):
    name = f"x.{suffix}"
    format = Image.registered_extensions()[f".{suffix.lower()}"]
    image = encode(COLOUR, format)
    as_folder(tmp_path / "f", {name: image})
    source = folder.make(str(tmp_path / "f"))
    assert len(source.train) == 2
    keys = as_pairs(tmp_path / "p", {name: image})[0]
    keys.pop("name")
    assert len(pairs.make(**keys).train) == 1
    paths, lines = photos.find_images([str(tmp_path / "f" / "train")])
    assert ([p.name for p in paths], lines) == ([name, name], [])


def test_hidden_class_folders_and_images_beside_classes_are_named(tmp_path):
    as_holdout(tmp_path, {"x.png": None, "y.png": None})
    put(tmp_path, ".git/x.png")
    put(tmp_path, "__MACOSX/a/._x.png")
    put(tmp_path, "cover.png")
    source = folder.make(str(tmp_path), holdout=0.5)
    assert source.label_names == ("a", "b")
    assert source.notes[0] == (
        f"left out in {tmp_path}: 2 hidden folders (.git, __MACOSX), 1 misplaced image (cover.png)"
    )


def test_links_that_lead_back_are_not_followed(tmp_path):
    as_folder(tmp_path, {"x.png": None})
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    put(tmp_path, "else/1/y.png")
    there = tmp_path / "train" / "b" / "linked"
    there.symlink_to(tmp_path / "else", target_is_directory=True)
    (tmp_path / "else" / "2").symlink_to(tmp_path / "else", target_is_directory=True)
    source = folder.make(str(tmp_path))
    assert len(source.train) == 3
    said = "2 backward links (a/up, b/linked/2)"
    assert source.notes == (
        f"left out in {tmp_path / 'train'}: {said}",
        f"not read: else in {tmp_path}",
    )


def test_splits_that_are_not_read_and_classes_without_images_are_named(tmp_path):
    as_folder(tmp_path, {"x.png": None})
    put(tmp_path, "val/a/x.png")
    put(tmp_path, "other/a/x.png")
    put(tmp_path, ".hidden/a/x.png")
    put(tmp_path, "train/c/x.png")
    notes = folder.make(str(tmp_path)).notes
    assert notes == (f"not read: other, val in {tmp_path}", "without an image for evaluation: c")  # fmt: skip


def test_a_class_of_unknown_files_names_them(tmp_path):
    as_folder(tmp_path, {"x.png": None})
    put(tmp_path, "train/c/x.heic")
    line = line_of(folder.make, str(tmp_path))
    assert line.endswith("fill or remove it (it has 1 .heic file (c/x.heic))")


@pytest.mark.parametrize("layout", [as_pairs, as_zip])
def test_results_of_predict_are_no_images(tmp_path, layout):
    """A file of the same name that the job has not written is an image, whose target is missing."""
    keys, _, _ = layout(tmp_path, {f"{i}.png": None for i in range(3)})
    keys.pop("name")
    text, result = PngInfo(), io.BytesIO()
    text.add_text("Software", "squeeze_jax predict")
    Image.new("P", (8, 8)).save(result, "PNG", pnginfo=text)

    def add(name, content):
        if layout is as_zip:
            with zipfile.ZipFile(keys["root"], "a") as archive:
                archive.writestr(name, content)
        else:
            put(tmp_path, name, content)

    add("train/0_classes.png", result.getvalue())
    source = pairs.make(**keys)
    assert (len(source.train), len(source.eval)) == (3, 3)
    said = "1 result of the job predict (train/0_classes.png)"
    assert source.notes == (f"left out in {keys['root']}: {said}",)
    add("train/1_classes.png", encode(GREY))
    assert "train/1_classes.png lacks its target" in line_of(lambda: pairs.make(**keys))


@pytest.mark.parametrize("layout", [as_pairs, as_zip])
def test_targets_without_an_image_are_named(tmp_path, layout):
    keys, _, _ = layout(tmp_path, {f"{i}.png": None for i in range(3)})
    if layout is as_zip:
        with zipfile.ZipFile(keys["root"], "a") as archive:
            archive.writestr("trainannot/9.png", b"x")
            archive.writestr("testannot/8.png", b"x")
    else:
        put(tmp_path, "trainannot/9.png")
        put(tmp_path, "testannot/8.png")
    keys.pop("name")
    source = pairs.make(**keys)
    assert (len(source.train), len(source.eval)) == (3, 3)
    said = "2 targets without an image (testannot/8.png, trainannot/9.png)"
    assert source.notes == (f"left out in {keys['root']}: {said}",)


def test_images_that_no_annotation_file_lists_are_named(tmp_path):
    keys, _, _ = as_coco(tmp_path, {"0.png": None})
    put(tmp_path, "train/9.png")
    keys.pop("name")
    said = "1 images without annotations (train/9.png)"
    assert coco.make(**keys).notes == (f"left out in {tmp_path}: {said}",)


# --- inputs of the job predict, good and bad -----------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path):
    """A folder with two good and three bad images."""
    for name, grey in ("a.png", 0), ("z.jpg", 255):
        format = "JPEG" if name.endswith("jpg") else "PNG"
        put(tmp_path, name, encode(np.full((8, 8), grey, np.uint8), format))
    put(tmp_path, "b.png", b"no image")
    put(tmp_path, "c.jpg", encode(COLOUR, "JPEG")[:300])
    put(tmp_path, "d.png", b"")
    put(tmp_path, "._a.png", b"of macOS")
    return tmp_path


def bright(batch):
    """Says class 1 of white images."""
    white = batch["image"].mean((1, 2, 3)) > 127
    return np.where(white[:, None], [0.0, 50.0], [50.0, 0.0])


BAD = ("b.png", "c.jpg", "d.png")


def collected(lines):
    """The lines before the error, and the error's."""
    seen = []
    with pytest.raises(UserError) as caught:
        seen.extend(lines)
    assert "\n" not in str(caught.value)
    return seen, str(caught.value)


def test_each_image_has_its_line(album):
    made = data.make(source={"name": "digits"}, size=8)
    missing = album / "missing.png"
    given = [str(missing), str(album), str(album / "._a.png"), "", "x" * 6000]
    lines, error = collected(made.predict(given, bright))
    assert lines[0] == f"left out in {album}: 1 hidden file (._a.png)"
    answers = dict(itertools.pairwise(lines))
    assert answers[str(album / "a.png")] == "  100.0%  0"
    assert answers[str(album / "z.jpg")] == "  100.0%  1"
    for name in (*BAD, "._a.png"):
        path = album / name
        assert answers[str(path)].startswith(f"  cannot decode image {path}: ")
    assert (
        answers[str(missing)] == f"  cannot read {missing}: No such file or directory"
    )
    assert answers["''"] == "  cannot read '': No such file or directory"
    assert max(map(len, lines)) < 500
    assert error.startswith(
        "7 of 9 images have no answer, the first because of: cannot"
    )
    assert "\n" not in error


def not_a_file(path, kind):
    """Puts something at a path that is no file; returns why it cannot be read."""
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
        return "it is a pipe, not a file"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            os.chdir(path.parent)  # the names of sockets are short
            listener.bind(path.name)
            os.chdir(here)
        return "it is a socket, not a file"
    if kind == "device":
        path.symlink_to("/dev/zero")
        return "it is a device, not a file"
    path.symlink_to(path.name)
    return "Too many levels of symbolic links"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "loop"])
def test_what_is_no_file_is_never_waited_for(tmp_path, kind):
    path = tmp_path / "in" / "x.png"
    reason = f"cannot read {path}: {not_a_file(path, kind)}"
    assert line_of(photos.decode, path, vision.View(8, 3)) == reason
    assert line_of(text_files.read_text, path) == reason
    assert line_of(list, text_files.read_lines(path)) == reason
    assert line_of(pairs.Folder(str(path.parent)).read, "x.png") == reason
    with pytest.raises(OSError):
        files.read_json(path)
    made = data.make(source={"name": "digits"}, size=8)
    assert line_of(list, made.predict([str(path)], None)) == reason
    assert run_py.place({"data": {"source": {"root": str(path)}}})


def test_each_image_of_many_has_its_line(tmp_path):
    """More than are decoded at a time, and bad ones in between."""
    for i in range(70):
        image = encode(np.full((8, 8), 255 * (i % 2), np.uint8))
        put(tmp_path, f"{i:02}.png", b"bad" if i % 7 == 3 else image)
    made = data.make(source={"name": "digits"}, size=8)
    lines, error = collected(made.predict([str(tmp_path)], bright))
    for i in range(70):
        answer = lines[lines.index(str(tmp_path / f"{i:02}.png")) + 1]
        assert ("cannot decode" in answer) == (i % 7 == 3)
        assert i % 7 == 3 or answer == f"  100.0%  {i % 2}"
    assert error.startswith("10 of 70 images")


def test_only_bad_images_have_their_lines_too(album):
    made = data.make(source={"name": "digits"}, size=8)
    lines, error = collected(made.predict([str(album / n) for n in BAD], None))
    assert [line for line in lines if not line.startswith(" ")] == [
        str(album / name) for name in BAD
    ]
    assert error.startswith("3 of 3 images")


def test_each_image_of_a_segmentation_has_its_line(album, tmp_path):
    keys = as_pairs(tmp_path / "pairs", {"x.png": encode(GREY)})[0]
    made = data.make("segmentation", source=keys, size=8)
    put(album, "z.png", encode(np.zeros((8, 8), np.uint8)))
    put(album, "old_classes.png")
    names = ["a.png", *BAD, "z.jpg", "z.png", "old_classes.png"]

    def run(batch):
        return bright(batch)[:, None, None] * np.ones((1, 8, 8, 1))

    given = [str(album / name) for name in names]
    lines, error = collected(made.predict(given, run))
    assert lines[0] == f"left out: 1 *_classes.png files ({album / 'old_classes.png'})"
    assert f"{album / 'a.png'} -> {album / 'a_classes.png'}" in lines
    assert lines[lines.index(f"{album / 'z.jpg'} -> {album / 'z_classes.png'}") + 1] == "  100.0%  b"  # fmt: skip
    for name in BAD:
        answer = lines[lines.index(str(album / name)) + 1]
        assert answer.startswith(f"  cannot decode image {album / name}: ")
    # Two images would have the same file: the first keeps it.
    answer = lines[lines.index(str(album / "z.png")) + 1]
    assert answer == f"  {album / 'z_classes.png'} holds the classes of {album / 'z.jpg'}: rename one of the images"  # fmt: skip
    assert np.asarray(Image.open(album / "z_classes.png")).min() == 1
    assert error.startswith("4 of 6 images")


def test_each_text_has_its_line(tmp_path):
    (tmp_path / "t.txt").write_text("abcabcabcabc")
    made = data.make(
        "contiguous",
        **dict.fromkeys(("train", "eval"), str(tmp_path / "t.txt")),
        **dict(length=3, level="characters"),
    )
    size = made.vocabulary
    given = ["ab", "xyz", " ", "ca"]
    lines, error = collected(made.predict(given, lambda b: np.zeros((1, 3, size))))
    assert [line for line in lines if line in given] == ["ab", "ca"]
    assert any(line.startswith("'xyz' has 3 characters") for line in lines)
    assert "' ' is an empty text: there is nothing to tell" in lines
    assert error.startswith("2 of 4 texts have no answer, the first because of: 'xyz'")


def test_a_folder_that_cannot_be_read_is_named(album, tmp_path, monkeypatch):
    """Training ends; predict answers the rest."""
    as_folder(tmp_path / "set", {"x.png": None})
    closed = {str(tmp_path / "set" / "train" / "b"), str(album / "closed")}
    put(album, "closed/x.png")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path) in closed:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    line = line_of(folder.make, str(tmp_path / "set"))
    assert line == f"cannot read the folder {tmp_path / 'set' / 'train' / 'b'}: Permission denied"  # fmt: skip
    made = data.make(source={"name": "digits"}, size=8)
    lines, error = collected(made.predict([str(album)], bright))
    answers = dict(itertools.pairwise(lines))
    assert answers[str(album / "closed")].startswith(f"  cannot read {album / 'closed'}: ")  # fmt: skip
    assert answers[str(album / "a.png")] == "  100.0%  0"
    # Five files and `closed`; of the set three files and `b`.
    assert error.startswith("5 of 10 images")


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("", "no such file or folder: ''"),
        ("x" * 5000, "no such file or folder: xxx"),
        ("none.png", "no such file or folder: none.png"),
    ],
)
def test_a_single_name_that_is_none(argument, line):
    made = data.make(source={"name": "digits"}, size=8)
    assert line_of(list, made.predict([argument], None)).startswith(line)


# --- names that are not UTF-8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["root", "class", "file"])
def test_names_that_are_not_utf_8_train(tmp_path, place):
    """The share of a file goes by the hash of its bytes; those of ordinary names stay what they were."""
    names = dict(root="set", **{"class": "a", "file": "x"}) | {place: LATIN}
    root = tmp_path / names["root"]
    for i in range(20):
        put(root, f"{names['class']}/{i}{names['file']}.png")
        put(root, f"b/{i}.png")
    made = data.make(source=dict(name="folder", root=str(root), holdout=0.5), size=8)
    examples = made.eval_reader.examples
    held_out = {e.name for e in examples.read(range(len(examples)))}
    for path in sorted(root.rglob("*.png")):
        name = os.fsencode(path.relative_to(root))
        share = int.from_bytes(hashlib.sha256(name).digest()[:8]) / 2**64
        assert (str(path) in held_out) == (share < 0.5)
    assert sum(b["mask"].sum() for b in made.eval(8)) == made.num_eval
    path = files.write(tmp_path / "names.json", json.dumps(made.label_names))
    assert tuple(json.loads(path.read_text())) == made.label_names


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "utf-8:strict"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=str,
)
def test_any_name_is_printed_in_any_encoding(environment):
    code = "from squeeze_jax.errors import print_any_name; print_any_name(); print('caf\\udce9 \\u00e9 \\u2192')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.match(rb"caf(\xe9|\\udce9) ", done.stdout)


def test_a_name_that_is_not_utf_8_is_read_from_the_command_line():
    config = {}
    run_py.override(config, f"--config.data.source={{'name': 'folder', 'root': '{LATIN}'}}")  # fmt: skip
    assert config["data"]["source"] == {"name": "folder", "root": LATIN}


def test_a_run_in_a_folder_that_is_not_utf_8_is_not_damaged(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    (folder / "checkpoints" / "5").mkdir(parents=True)
    line = line_of(_pretrained.read_checkpoint, str(folder))
    assert "is not UTF-8: rename the folder" in line


def test_damaged_checkpoints_of_another_run_are_counted(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    line = line_of(_pretrained.read_checkpoint, str(tmp_path))
    assert line.startswith(f"no checkpoint in {tmp_path / 'checkpoints'} can be read, of 5:")  # fmt: skip
    (tmp_path / "checkpoints" / "5").rmdir()
    line = line_of(_pretrained.read_checkpoint, str(tmp_path))
    assert line == f"no checkpoint in {tmp_path}: train there first"


def test_libraries_that_need_utf_8_are_not_asked(tmp_path):
    path = tmp_path / LATIN
    path.mkdir()
    line = line_of(tfds.find, "mnist", str(path))
    assert line.startswith("config.data.source.data_dir = ")
    assert line.endswith(
        "caf\\udce9' is not UTF-8: rename the folder or choose another"
    )
    assert line_of(files.check_utf8, path, "--workdir").startswith("--workdir = ")
    line = line_of(files.check_new_folder, path / "new", "config.search.to")
    assert line.startswith("config.search.to = ")


def test_a_folder_that_cannot_be_made_is_known_before_the_work(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    long = "x" * 250
    for name, reason in {
        "images": "the folder is not empty",
        "images/a.png": "it is a file",
        "images/a.png/new": f"no folder can be made in {tmp_path}/images/a.png: Not a directory",
        "link": "it is a link",
        "link/new": f"no folder can be made in {tmp_path}/link: No such file or directory",
        "/dev/null": "it is a file",
        "/proc/new": "no folder can be made in /proc: No such file or directory",
        long: f"no folder can be made in {tmp_path}: its name is too long",
    }.items():
        line = line_of(files.check_new_folder, tmp_path / name, "key", ".partial")
        assert line == f"key = '{tmp_path / name}': {reason}; choose another folder"
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name in "empty", "new", "a/b/new", long[:240]:
        files.check_new_folder(tmp_path / name, "key", ".partial")
    assert sorted(tmp_path.rglob("*")) == before


# --- splits, classes, settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("holdout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Training", "Testing"),
        ("TRAIN", "TEST"),
        ("training", "validation"),
        ("Train", "Valid"),
        ("dogs", "Test"),
    ],
)
def test_splits_of_other_names_are_no_classes(tmp_path, first, second, holdout):
    for split in first, second:
        for name in "ab":
            put(tmp_path, f"{split}/{name}/x.png")
    split = second if first == "dogs" else min(first, second)
    line = line_of(folder.make, str(tmp_path), holdout=holdout)
    assert line.startswith(f"{tmp_path} has a folder {split}, a split and not a class")


def test_splits_inside_of_a_split_are_no_classes(tmp_path):
    as_folder(tmp_path / "train", {"x.png": None})
    put(tmp_path, "test/a/x.png")
    line = line_of(folder.make, str(tmp_path))
    assert line.startswith(f"{tmp_path / 'train'} holds splits and not classes (test, train)")  # fmt: skip


def test_an_evaluation_split_of_another_name_is_pointed_at(tmp_path):
    as_folder(tmp_path, {"x.png": None})
    (tmp_path / "test").rename(tmp_path / "Testing")
    assert line_of(folder.make, str(tmp_path)).endswith("beside it: rename Testing")


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_one_class_is_too_few(tmp_path, holdout):
    for i in range(20):
        for split in ("",) if holdout else ("train/", "test/"):
            put(tmp_path, f"{split}only/{i}.png")
    source = dict(name="folder", root=str(tmp_path), holdout=holdout)
    line = line_of(data.make, source=source, size=8)
    assert line == "config.data.source has the one class 'only': a classifier needs two or more"  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        (dict(size=8, pad=1000, crop="pad"), 7),
        (dict(size=8, pad=8, crop="pad"), 7),
        (dict(size=(8, 20), pad=9, crop="pad"), 7),
        (dict(size=8, pad=1000), 7),
        (dict(size=2, pad=5), 4),
    ],
    ids=str,
)
def test_padding_leaves_something_of_the_image(keys, most):
    line = line_of(data.make, source={"name": "digits"}, **keys)
    assert line.endswith(f"should be at most {most} for images of this size")
    data.make(source={"name": "digits"}, **keys | {"pad": most})


@pytest.mark.parametrize("number", [0.25, 1])
def test_mean_and_std_may_be_one_number(opened, number):
    made, _ = opened(mixture(GREY, COLOUR, 3), mean=number, std=number)
    images = np.full((1, 8, 8, 3), 51, np.uint8)
    # (51 / 255 - m) / m = (0.2 - m) / m
    found = made.inputs({"image": images})
    np.testing.assert_allclose(found, (0.2 - number) / number, atol=1e-6)


@pytest.mark.parametrize("text", ["0.5", "1", "(0.5,)", "(0.4, 0.5, 0.6)", "[0.5]"])
def test_mean_on_the_command_line(text):
    config = {"data": {"source": {"name": "digits"}, "size": 8, "channels": 3}}
    run_py.override(config, f"--config.data.mean={text}")
    assert len(data.make(**config["data"]).mean) in (1, 3)


@pytest.mark.parametrize("key", ["mean", "std"])
@pytest.mark.parametrize("value", ["0.5", None, True, (0.5, "x")])
def test_mean_that_is_no_number(key, value):
    line = line_of(data.make, source={"name": "digits"}, size=8, **{key: value})
    wrong = f"{key}[1] = 'x'" if isinstance(value, tuple) else f"{key} = {value!r}"
    assert line.startswith(f"config.data.{wrong}")


# --- what the plan says --------------------------------------------------------------------------------------------------

LOOKED = survey.Survey(5, {(28, 28): 5}, grey=5)


@pytest.mark.parametrize(
    ("found", "view", "said"),
    [
        (LOOKED, dict(size=28, channels=1), []),
        (LOOKED, dict(size=16, channels=1), ["28x28 pixels, resized to 16x16"]),
        (
            LOOKED._replace(sizes={(28, 28): 3, (20, 40): 2}),
            dict(size=28, channels=1),
            ["20x40 to 28x28 (2 sizes) pixels, resized to 28x28 with another aspect ratio"],
        ),
        (
            LOOKED._replace(sizes={(28, 28): 3, (20, 40): 2}),
            dict(size=28, channels=1, resize="crop"),
            ["20x40 to 28x28 (2 sizes) pixels, resized to a short side of 28, of which the central 28x28 count"],
        ),
        (
            LOOKED._replace(sizes={(20, 40): 5}),
            dict(size=(20, 28), channels=1, resize="crop"),
            ["20x40 pixels, resized to cover 28x20, of which the central 28x20 count"],
        ),
        (LOOKED, dict(size=16, channels=1, resize="crop"), ["28x28 pixels, resized to 16x16"]),
        (
            LOOKED,
            dict(size=16, channels=3, eval_resize=20),
            [
                "28x28 pixels, resized to a short side of 20, of which the central 16x16 count",
                "5 grey, turned into 3 equal channels",
            ],
        ),
        (
            LOOKED,
            dict(size=16, channels=1, crop="random_resized"),
            ["28x28 pixels, resized to 16x16 (in training random crops, resized to 16x16)"],
        ),
        (
            survey.Survey(5, {(8, 8): 4}, 1, 3, 2, 1, (survey.Unreadable(0, "x.png", "no"),)),
            dict(size=8, channels=3),
            [
                "1 grey, turned into 3 equal channels, beside 3 in colour",
                "2 with transparency, laid on white",
                "1 of 16 or 32 bits, turned into 8 bits",
                "1 that cannot be read (x.png)",
            ],
        ),
        (
            survey.Survey(5, {(8, 8): 5}, colour=5, palette=1, rotated=2, frames=3, modes=(("CMYK", 4),)),
            dict(size=8, channels=3),
            [
                "1 with a palette, replaced by its colours",
                "4 in CMYK, turned into RGB",
                "2 turned upright as their EXIF data say",
                "3 of several frames or pages, of which the first counts",
            ],
        ),
    ],
)  # fmt: skip
def test_changes_of_images_in_words(found, view, said):
    assert survey.describe_changes(found, vision.View(**view)) == said


def test_headers_tell_all_that_is_counted(tmp_path):
    images = {
        "grey.png": encode(GREY),
        "colour.jpg": encode(COLOUR[:4], "JPEG"),
        "clear.png": encode(np.dstack([COLOUR, GREY])),
        "deep.tif": encode(Image.fromarray(np.float32(GREY) / 255), "TIFF"),
        "bad.png": b"bad",
    }
    paths = [str(put(tmp_path, name, image)) for name, image in images.items()]
    found = survey.survey_images([*paths, str(tmp_path / "none.png")], functools.partial(open, mode="rb"))  # fmt: skip
    assert found == survey.Survey(
        total=6,
        sizes={(8, 8): 3, (8, 4): 1},
        grey=2,
        colour=2,
        transparent=1,
        deep=1,
        unreadable=(
            (4, str(tmp_path / "bad.png"), "no known image format"),
            (5, str(tmp_path / "none.png"), "No such file or directory"),
        ),
    )


def deep_png():
    """A PNG of 16-bit colours, after the PNG specification."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))  # fmt: skip

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(8 * (1 + 8 * 6)))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def turned(orientation):
    exif = Image.Exif()
    exif[vision.ORIENTATION] = orientation
    return exif


PICTURE = Image.fromarray(COLOUR)
FRAMES = dict(save_all=True, append_images=[Image.fromarray(255 - COLOUR)])
KINDS = {
    "16-bit colours, PNG": (deep_png(), dict(deep=1)),
    "16-bit colours, PPM": (b"P6 8 8 65535\n" + bytes(8 * 8 * 6), dict(deep=1)),
    "palette": (encode(PICTURE.convert("P")), dict(palette=1)),
    "CMYK": (encode(PICTURE.convert("CMYK"), "JPEG"), dict(modes=(("CMYK", 1),))),
    "turned JPEG": (encode(PICTURE, "JPEG", exif=turned(6)), dict(rotated=1)),
    "turned PNG": (encode(PICTURE, exif=turned(3)), dict(rotated=1)),
    "turned TIFF": (encode(PICTURE, "TIFF", exif=turned(8)), dict(rotated=1)),
    "upright": (encode(PICTURE, "JPEG", exif=turned(1)), {}),
    "GIF of 2": (encode(PICTURE, "GIF", **FRAMES), dict(palette=1, frames=1)),
    "GIF of 1": (encode(PICTURE, "GIF"), dict(palette=1)),
    "PNG of 2": (encode(PICTURE, **FRAMES), dict(frames=1)),
    "WebP of 2": (encode(PICTURE, "WEBP", **FRAMES), dict(frames=1)),
    "TIFF of 2": (encode(PICTURE, "TIFF", **FRAMES), dict(frames=1)),
    "TIFF of 1": (encode(PICTURE, "TIFF"), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_headers_tell_every_conversion(kind):
    image, counts = KINDS[kind]
    found = survey.survey_images(["x"], lambda _: io.BytesIO(image))
    assert found == survey.Survey(1, {(8, 8): 1}, colour=1)._replace(**counts)
    vision.still(image, vision.View(8, 3))


CUT = encode(COLOUR)[:20]
BROKEN = {
    "empty.png": (b"", "the file is empty"),
    "text.jpg": (b"no image", "no known image format"),
    "cut.png": (CUT, ""),
    "int32.tif": (
        encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
        "its pixels are 32-bit integers",
    ),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("corrupt", ["raise", "skip"])
def test_images_that_cannot_be_read_are_known_before_training(tmp_path, split, corrupt):
    source, _, _ = as_folder(tmp_path, {f"{i}.png": None for i in range(4)})
    for name, (content, _) in BROKEN.items():
        put(tmp_path, f"{split}/a/{name}", content)
    os.mkfifo(tmp_path / split / "a" / "pipe.png")
    os.symlink("loop.png", tmp_path / split / "a" / "loop.png")
    made = data.make(source=source, size=8, corrupt=corrupt)
    reasons = {pathlib.Path(u.name).name: u.reason for u in made_survey(source)}
    assert reasons.keys() == {*BROKEN, "pipe.png", "loop.png"}
    for name, (_, reason) in BROKEN.items():
        assert reason in reasons[name]
    assert reasons["pipe.png"] == "it is a pipe, not a file"
    assert reasons["loop.png"] == "Too many levels of symbolic links"
    if (corrupt, split) == ("skip", "train"):
        assert made.unreadable == ""
        return
    line = made.unreadable
    assert line.startswith(f"6 images cannot be read: {tmp_path / split / 'a' / 'cut.png'} (")  # fmt: skip
    assert "replace or remove them" in line
    assert ("config.data.corrupt='skip'" in line) == (split == "train")
    built = types.SimpleNamespace(data=made)
    assert line_of(fit.ready, built) == line


def made_survey(source):
    return folder.make(source["root"]).survey.unreadable


def test_targets_that_cannot_be_read_are_known_before_training(tmp_path):
    keys, task, _ = as_pairs(tmp_path, {f"{i}.png": encode(GREY) for i in range(3)})
    put(tmp_path, "trainannot/1.png", encode(COLOUR))
    put(tmp_path, "testannot/2.png", b"")
    made = data.make(task, source=keys, size=8)
    assert made.unreadable.startswith(
        "2 images cannot be read: trainannot/1.png (a map of labels has 8-bit class numbers, this image has mode RGB),"
        " testannot/2.png (the file is empty); replace or remove them"
    )


def test_the_plan_says_what_changes(tmp_path):
    config = {
        "data": {"source": {"name": "digits"}, "size": 16, "channels": 3},
        "model": {"name": "squeezenet", "variant": "tiny", "num_classes": 12},
        "optim": {"lr": 0.1},
        "steps": 1,
        "batch": 4,
    }
    built = _experiment.build(_experiment.check(config))
    lines = _plan.plan(built, tmp_path).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("data"))
    # scikit-learn's digits are 1,797 grey images of 8x8 pixels.
    assert [line.strip() for line in lines[at + 1 : at + 3]] == [
        "1,797 images: 8x8 pixels, resized to 16x16; 1,797 grey, turned into 3 equal channels",
        "the network has 12 classes: 2 have no examples",
    ]  # fmt: skip
