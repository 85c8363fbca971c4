"""Targets move with their images; sources with targets; the task that reads them."""

import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from squeeze_jax import data
from squeeze_jax.data import target, vision
from squeeze_jax.data.pipeline import draws
from squeeze_jax.errors import UserError


def encode(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def blocks(h, w, seed=0):
    """An image whose red channel is 20 times its map of labels, in blocks of 8x8 pixels."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, 5, (h // 8, w // 8)), np.ones((8, 8), int))
    labels = labels.astype(np.uint8)
    return np.stack([labels * 20, labels, labels], -1), labels


@pytest.fixture
def pairs(tmp_path):
    """Six training and three test images of 48x64 pixels."""
    for split, count in ("train", 6), ("test", 3):
        for folder in split, f"{split}annot":
            (tmp_path / folder).mkdir()
        for i in range(count):
            image, labels = blocks(48, 64, i)
            (tmp_path / split / f"{i}.png").write_bytes(encode(image))
            (tmp_path / f"{split}annot" / f"{i}.png").write_bytes(encode(labels))
    return tmp_path


def opened(root, **keys):
    source = dict(name="pairs", root=str(root), classes=tuple("abcde"))
    return data.make("segmentation", **dict(source=source, size=(24, 32)) | keys)


def agreement(batch):
    """Share of pixels whose red channel is nearest to their label's, without those that do not count."""
    counts = batch["target"] != 255
    assert counts.any()
    red = np.rint(batch["image"][..., 0] / 20)
    return (red == batch["target"])[counts].mean()


@pytest.mark.parametrize(
    "keys",
    [
        dict(),
        dict(flip=True),
        dict(crop="pad", pad=5, flip=True),
        dict(crop="random_resized", scale=(0.3, 1.0), flip=True),
        dict(eval_resize=24),
        dict(size=(40, 20), eval_resize=30),
        dict(size=(20, 90), eval_resize=24),
    ],
    ids=str,
)
def test_targets_stay_with_their_images(pairs, keys):
    split = opened(pairs, **keys)
    batches = split.train(6, 0)
    for _ in range(3):
        batch = next(batches)
        assert (
            batch["target"].shape == batch["image"].shape[:3] == (6, *split.shape[:2])
        )
        # Wrong only where interpolation blends the colours of neighbouring blocks; a shifted or unflipped target
        # agrees on a quarter of the pixels.
        assert agreement(batch) > 0.85
        # Padding is black, and red 0 is class 0: what is ignored has to be what was padded.
        assert not batch["image"][batch["target"] == 255].any()
    batches.close()


def test_padding_is_ignored_and_moves_by_the_numbers_of_the_image():
    maps = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3)
    numbers = np.full((1, vision.DRAWS), 0.5)
    # pad 1 → 3 corners a side; 0.0 → 0: moved down by 1; 0.99 → 2: moved left by 1.
    numbers[0, vision.CORNER] = 0.0, 0.99
    expected = [[255, 255, 255], [2, 3, 255], [5, 6, 255]]
    np.testing.assert_array_equal(target.pad_crop(maps, 1, numbers)[0], expected)


def test_a_map_takes_the_pixels_of_the_box_of_its_image():
    _, labels = blocks(64, 80)
    view = vision.View((32, 24), 3, crop="random_resized", scale=(0.3, 0.9))
    for row in draws(0, 0, 10, vision.DRAWS):
        left, top, right, bottom = vision.random_box(80, 64, view.scale, row)
        y = (top + (np.arange(32) + 0.5) * (bottom - top) / 32).astype(int)
        x = (left + (np.arange(24) + 0.5) * (right - left) / 24).astype(int)
        found = target.random_resized(labels, view, row)
        # Rounding decides where the centre of a pixel lies on the border of two.
        assert (found == labels[np.ix_(y, x)]).mean() > 0.97


def test_boxes_move_by_arithmetic():
    corners = np.array([[10, 20, 30, 40], [0, 0, 10, 10], [35, 35, 60, 60]], np.float32)
    boxes = target.Boxes(corners, np.array([3, 1, 2]))
    # The crop from (20, 20) to (60, 40) is resized from 40x20 to 80x80: times 2 across, times 4 down.
    # (10, 20, 30, 40) → (-20, 0, 20, 80), clipped; (0, 0, 10, 10) → left of it; (35, 35, 60, 60) → (30, 60, 80, 160).
    moved, dropped = target.crop_boxes(boxes, (20, 20, 60, 40), (80, 80))
    np.testing.assert_array_equal(moved.corners, [[0, 0, 20, 80], [30, 60, 80, 80]])
    np.testing.assert_array_equal(moved.labels, [3, 2])
    assert dropped == 1
    mirrored = target.flip_boxes(moved, 80)
    np.testing.assert_array_equal(mirrored.corners, [[60, 0, 80, 80], [0, 60, 50, 80]])


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def packed(numbers, bits):
    """Rows of numbers of so many bits, packed into bytes."""
    shifts = np.arange(bits)[::-1]
    unpacked = (numbers[..., None] >> shifts & 1).reshape(len(numbers), -1)
    return np.packbits(unpacked, axis=1)


def png(numbers, bits, palette=False):
    """A grey PNG by hand, after the PNG specification, or one with a palette."""
    h, w = numbers.shape
    header = struct.pack(">IIBBBBB", w, h, bits, 3 if palette else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in packed(numbers, bits))
    parts = chunk(b"IHDR", header)
    if palette:
        parts += chunk(b"PLTE", bytes(i % 256 for i in range(3 * 2**bits)[::-1]))
    parts += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(numbers, bits, photometric=1, order=1):
    """A grey TIFF by hand, after the TIFF 6.0 specification."""
    h, w = numbers.shape
    content = packed(numbers, bits).tobytes()
    if order == 2:
        content = bytes(int(f"{byte:08b}"[::-1], 2) for byte in content)
    tags = {256: w, 257: h, 258: bits, 259: 1, 262: photometric, 266: order, 273: 0, 277: 1, 278: h, 279: len(content)}  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags.items())
    return b"II" + struct.pack("<HIH", 42, 8, len(tags)) + entries + bytes(4) + content


def numbers_up_to(largest):
    return np.arange(5 * 13).reshape(5, 13) % (largest + 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["grey", "palette", "tiff", "tiff, bits reversed"])
def test_class_numbers_of_few_bits_are_those_in_the_file(bits, kind):
    numbers = numbers_up_to(min(2**bits - 1, 254))
    if kind.startswith("tiff"):
        stored = tiff(numbers, bits, order=2 if "reversed" in kind else 1)
    else:
        stored = png(numbers, bits, palette=kind == "palette")
    found = target.read(stored)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, numbers)


@pytest.mark.parametrize("largest", [1, 2, 7, 20, 254, 255])
def test_class_numbers_of_a_pgm_are_those_in_the_file(largest):
    numbers = numbers_up_to(largest)
    head = f"13 5\n{largest}\n"
    plain = f"P2\n{head}" + "\n".join(" ".join(map(str, row)) for row in numbers)
    for stored in b"P5\n" + head.encode() + bytes(numbers.ravel().tolist()), plain.encode():  # fmt: skip
        np.testing.assert_array_equal(target.read(stored), numbers)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_class_numbers_whose_0_is_white_are_an_error(bits):
    with pytest.raises(vision.Undecodable, match="in this image 0 is white"):
        target.read(tiff(numbers_up_to(2**bits - 1), bits, photometric=0))


def test_batches_have_the_class_numbers_of_a_png_of_2_bits(pairs):
    for i in range(3):
        labels = np.resize(np.arange(4), (48, 64))
        (pairs / "testannot" / f"{i}.png").write_bytes(png(labels, 2))
    (batch,) = opened(pairs, size=(48, 64)).eval(3)
    np.testing.assert_array_equal(batch["target"], np.stack([labels] * 3))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_of_class_names_may_have_a_byte_order_mark(pairs, tmp_path, mark):
    path = tmp_path / "classes.txt"
    path.write_bytes(mark + "ä\r\nb\n\nc d\ne\nf\n".encode())
    source = dict(name="pairs", root=str(pairs), classes=str(path))
    assert opened(pairs, source=source).label_names == ("ä", "b", "c d", "e", "f")


def test_evaluation_is_the_files_at_their_own_size(pairs):
    split = opened(pairs, size=(48, 64))
    (batch,) = split.eval(4)
    for i in range(3):
        image, labels = blocks(48, 64, i)
        np.testing.assert_array_equal(batch["image"][i], image)
        np.testing.assert_array_equal(batch["target"][i], labels)
    assert (batch["target"][3] == 255).all()
    np.testing.assert_array_equal(batch["mask"], [True, True, True, False])


def test_the_cache_changes_nothing(pairs):
    for keys in dict(crop="pad", flip=True), dict():
        first, second = (
            opened(pairs, cache_mb=mb, **keys).train(4, 1) for mb in (0, 99)
        )
        for _ in range(4):
            a, b = next(first), next(second)
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])


def test_ignored_labels_become_255(pairs):
    (batch,) = opened(pairs, size=(48, 64), ignore=2).eval(3)
    stored = np.stack([blocks(48, 64, i)[1] for i in range(3)])
    np.testing.assert_array_equal(batch["target"] == 255, stored == 2)
    (batch,) = opened(pairs, size=(48, 64)).eval(3)
    np.testing.assert_array_equal(batch["target"], stored)


@pytest.mark.parametrize("label", [-1, 300])
def test_ignored_labels_out_of_range_are_named(pairs, label):
    source = dict(name="pairs", root=str(pairs), classes=("a", "b", "c"))
    with pytest.raises(UserError, match=rf"= {label} should lie in \[0, 255\]"):
        data.make("segmentation", source=source | dict(ignored=(label,)), size=16)


def test_a_zip_holds_the_same(pairs, tmp_path):
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(pairs.rglob("*.png")):
            archive.write(file, file.relative_to(pairs))
    (expected,) = opened(pairs).eval(3)
    (found,) = pickle.loads(pickle.dumps(opened(path))).eval(3)
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


def test_mistakes_name_the_file(pairs):
    with pytest.raises(UserError, match="'pairs' has targets and no label per image"):
        data.make(
            "images",
            source=dict(name="pairs", root=str(pairs), classes=("a", "b")),
            size=8,
        )
    annot = pairs / "testannot" / "1.png"
    whole = annot.read_bytes()
    cases = [
        (encode(blocks(40, 64)[1]), r"1\.png has 64x40 pixels, the image 64x48"),
        (encode(np.full((48, 64), 7, np.uint8)), r"1\.png has label 7, outside .* 5"),
        (encode(blocks(48, 64)[0]), r"decode the target of .*1\.png: .* mode RGB"),
        (whole[:30], r"cannot decode the target of .*1\.png"),
    ]
    for content, message in cases:
        annot.write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(opened(pairs).eval(3))
    annot.unlink()
    with pytest.raises(UserError, match=r"test/1\.png lacks its target testannot/1"):
        opened(pairs)
    with pytest.raises(UserError, match="'digits' has one label per image"):
        data.make("segmentation", source={"name": "digits"}, size=8)
    with pytest.raises(UserError, match=r"config\.data\.randaugment"):
        opened(pairs, randaugment=2)


def test_camvid_is_the_archives_files(shared):
    path = shared / "data" / "camvid" / "camvid_480x360_webp90.zip"
    split = data.make(
        "segmentation",
        source={"name": "camvid", "path": str(path)},
        size=(360, 480),
        cache_mb=0,
    )
    # Of the SegNet tutorial: 367 training and 233 test images.
    assert (split.num_train, split.num_eval, split.num_classes) == (367, 233, 11)
    batch = next(split.eval(2))
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("testannot/"))
        for name, found in zip(names, batch["target"], strict=False):
            stored = np.asarray(Image.open(io.BytesIO(archive.read(name))))
            np.testing.assert_array_equal(found == 255, stored == 11)
            counts = stored < 11
            np.testing.assert_array_equal(found[counts], stored[counts])
    # A road lies at the bottom of the picture.
    assert np.bincount(batch["target"][0, -40:].reshape(-1)).argmax() == 3


def test_predictions_are_written_with_a_palette(pairs, tmp_path):
    split = opened(pairs)
    photo = tmp_path / "photo.png"
    photo.write_bytes(encode(blocks(48, 64)[0]))
    labels = np.zeros((24, 32), int)
    labels[:, :8] = 2

    def run(batch):
        assert batch["image"].shape == (1, 24, 32, 3)
        return np.eye(5)[labels][None]

    lines = list(split.predict([str(photo)], run))
    # 8 of 32 columns.
    assert lines[1:] == ["   75.0%  a", "   25.0%  c"]
    with Image.open(tmp_path / "photo_classes.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), labels)
        shown = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(shown, axis=0)) == 2


@pytest.mark.parametrize("kind", ["picture", "text", "folder", "link"])
def test_predictions_replace_only_their_own_files(pairs, tmp_path, kind):
    split = opened(pairs)
    photo, result = tmp_path / "q.png", tmp_path / "q_classes.png"
    photo.write_bytes(encode(blocks(48, 64)[0]))

    def predict(label):
        labels = np.full((24, 32), label)
        return list(split.predict([str(photo)], lambda _: np.eye(5)[labels][None]))

    predict(1)
    predict(3)  # over its own file
    assert np.asarray(Image.open(result)).max() == 3
    result.unlink()
    if kind == "folder":
        result.mkdir()
    elif kind == "link":
        result.symlink_to(tmp_path / "missing.png")
    else:
        result.write_bytes(encode(blocks(8, 8)[1]) if kind == "picture" else b"mine")
    before = result.read_bytes() if result.is_file() else None
    with pytest.raises(
        UserError, match=r"q_classes\.png exists and is no result of the"
    ):
        predict(2)
    assert before is None or result.read_bytes() == before
    assert not (tmp_path / "missing.png").exists()
