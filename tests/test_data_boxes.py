"""Boxes move with their images; COCO's files; the task that reads both."""

import io
import json
import pickle
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from squeeze_jax import data
from squeeze_jax.data import vision
from squeeze_jax.data.annotations import BoxLists
from squeeze_jax.data.reader import ImageReader, readers
from squeeze_jax.data.source import Boxes, Example, Source
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import predict

CATEGORIES = [
    dict(id=90, name="red"),
    dict(id=3, name="blue"),
    dict(id=7, name="green"),
]
LAYOUT = {
    "train": "train.json",
    "train_images": "train",
    "eval": "eval.json",
    "eval_images": "eval",
}
CHANNEL = {0: 2, 1: 1, 2: 0}  # blue, green, red: the order of the ids


def encode(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def painted(width, height, seed):
    """An image with a red and a green rectangle, which may overlap, and their boxes as COCO's annotations."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.uint8)
    annotations = []
    for category, channel in (90, 0), (7, 1):
        w, h = (
            rng.integers(width // 6, width // 2),
            rng.integers(height // 6, height // 2),
        )
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        image[y : y + h, x : x + w, channel] = 255
        box = [int(x), int(y), int(w), int(h)]
        annotations.append(dict(category_id=category, bbox=box, iscrowd=0))
    return image, annotations


def write(root, images, split, annotations, /, **changes):
    """Writes {name: (bytes, width, height)} and annotations [image number, annotation] as one split of COCO's format."""
    (root / split).mkdir(exist_ok=True)
    for name, (content, _, _) in images.items():
        (root / split / name).write_bytes(content)
    listed = [
        dict(id=10 + i, file_name=name, width=w, height=h)
        for i, (name, (_, w, h)) in enumerate(images.items())
    ]
    content = dict(
        images=listed,
        categories=CATEGORIES,
        annotations=[
            dict(id=i, image_id=10 + image) | annotation
            for i, (image, annotation) in enumerate(annotations)
        ],
    )
    (root / f"{split}.json").write_text(json.dumps(content | changes))


def opened(root, size=(48, 64), source=(), **keys):
    source = dict(name="coco", root=str(root)) | LAYOUT | dict(source)
    return data.make("detection", **dict(source=source, size=size) | keys)


@pytest.fixture
def coco(tmp_path):
    """Six training and three evaluation images of different sizes, PNG and JPEG, a red and a green box each."""
    for split, count in ("train", 6), ("eval", 3):
        images, annotations = {}, []
        for i in range(count):
            width, height = 150 + 10 * i, 120
            image, own = painted(width, height, i)
            kind = ("PNG", "JPEG")[i % 2]
            images[f"{i}.{kind.lower()}"] = encode(image, kind), width, height
            annotations += [(i, annotation) for annotation in own]
        write(tmp_path, images, split, annotations)
    return tmp_path


def coloured(channel):
    """The bounding box of the pixels of a rectangle, or None where none is left."""
    y, x = np.nonzero(channel >= 128)
    return (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None


def agree(batch, stored=2):
    """Compares each box with its coloured pixels and returns how many boxes were compared and dropped."""
    compared = 0
    rows = zip(
        *(batch[k] for k in ("image", "boxes", "box_labels", "dropped_boxes")),
        strict=True,
    )
    for image, boxes, labels, dropped in rows:
        count = (labels >= 0).sum()
        assert count + dropped == stored
        assert (labels[:count] >= 0).all()
        assert not boxes[count:].any()
        present = dict(zip(labels[:count].tolist(), boxes, strict=False))
        for label, channel in CHANNEL.items():
            pixels = coloured(image[..., channel if image.shape[-1] == 3 else 0])
            if label in present and pixels is not None:
                np.testing.assert_allclose(present[label], pixels, atol=1)
                compared += 1
            elif label in present:  # what is left is too thin to colour a pixel
                left, top, right, bottom = present[label]
                assert min(right - left, bottom - top) <= 1
            else:
                assert pixels is None
    return compared, int(batch["dropped_boxes"].sum())


MOVES = {
    "resized": dict(),
    "enlarged": dict(size=(300, 200)),
    "flipped": dict(flip=True),
    "padded": dict(crop="pad", pad=20, flip=True),
    "centre": dict(eval_resize=64, flip=True),
    "centre and padded": dict(eval_resize=64, crop="pad", pad=16),
    "beyond": dict(size=(20, 90), eval_resize=24),
    "any area": dict(crop="random_resized", scale=(0.1, 1.0), flip=True),
    "small areas": dict(crop="random_resized", scale=(0.02, 0.1)),
}


@pytest.mark.parametrize("keys", MOVES.values(), ids=MOVES)
def test_boxes_stay_on_the_pixels_of_their_objects(coco, keys):
    split = opened(coco, max_boxes=3, **keys)
    batches = split.train(6, 0)
    counts = np.sum([agree(next(batches)) for _ in range(8)], 0)
    batches.close()
    still = set(keys) <= {"size", "flip"}
    assert counts[0] == 96 if still else counts[0] > 20
    # Crops of these kinds lose boxes; a resized image does not.
    if keys.get("crop"):
        assert counts[1] > 0
    (batch,) = split.eval(3)
    assert agree(batch)[0] > 3


def test_a_jpeg_decoded_at_reduced_scale_keeps_its_boxes(tmp_path):
    image, own = painted(1000, 800, 0)
    images = {"big.jpg": (encode(image, "JPEG"), 1000, 800)}
    for split in "train", "eval":
        write(tmp_path, images, split, [(0, annotation) for annotation in own])
    # Crops of half of the area are 20 times as wide as the result, and JPEG reads an eighth.
    split = opened(tmp_path, size=(32, 40), crop="random_resized", scale=(0.5, 1.0))
    batches = split.train(8, 0)
    assert agree(next(batches))[0] > 8
    batches.close()


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_boxes_are_in_pixels_of_the_upright_image(tmp_path, orientation):
    image, own = painted(160, 120, 3)
    # EXIF: 3 is shown turned by 180 degrees, 6 clockwise by 90, 8 counterclockwise by 90; it is stored the other way.
    turned = np.rot90(image, {3: 2, 6: 1, 8: 3}[orientation])
    exif = Image.Exif()
    exif[vision.ORIENTATION] = orientation
    photo = encode(turned, "JPEG", exif=exif)
    for split in "train", "eval":
        images = {"photo.jpg": (photo, 160, 120)}
        write(tmp_path, images, split, [(0, annotation) for annotation in own])
    for keys in dict(), dict(crop="random_resized", scale=(0.5, 1.0), flip=True):
        batches = opened(tmp_path, **keys).train(4, 0)
        assert agree(next(batches))[0] > 3
        batches.close()
    if (
        orientation != 3
    ):  # the size of the stored pixels: their boxes would be for the image as it is not shown
        wrong = [dict(id=10, file_name="photo.jpg", width=120, height=160)]
        small = [dict(id=0, image_id=10, category_id=3, bbox=[0, 0, 9, 9])]
        write(tmp_path, images, "eval", [], images=wrong, annotations=small)
        with pytest.raises(
            UserError, match=r"photo\.jpg has 160x120 pixels, .*120x160"
        ):
            list(opened(tmp_path).eval(1))


def test_a_grey_image_has_its_boxes(tmp_path):
    image = np.zeros((60, 80), np.uint8)
    image[10:40, 20:70] = 255
    own = [(0, dict(category_id=3, bbox=[20, 10, 50, 30]))]
    for split in "train", "eval":
        write(tmp_path, {"grey.png": (encode(image), 80, 60)}, split, own)
    split = opened(tmp_path, size=(30, 40), channels=1, flip=True)
    batches = split.train(8, 0)
    batch = next(batches)
    batches.close()
    for pixels, boxes in zip(batch["image"], batch["boxes"], strict=True):
        np.testing.assert_allclose(boxes[0], coloured(pixels[..., 0]), atol=1)
    # Half the size: (20, 10, 70, 40) → (10, 5, 35, 20), mirrored in 40 pixels (5, 5, 30, 20).
    found = {tuple(boxes[0].tolist()) for boxes in batch["boxes"]}
    assert found == {(10, 5, 35, 20), (5, 5, 30, 20)}


class InMemory(list):
    """A split of examples that lie in memory."""

    def read(self, indices):
        return [self[i] for i in indices]


def reader(corners, labels=None, *, belongs=None, limit=9, min_visible=0.0, **view):
    """Reads one black image of 40x20 pixels with these boxes; there are three classes."""
    corners = np.array(corners, np.float64).reshape(-1, 4)
    labels = np.zeros(len(corners), int) if labels is None else np.array(labels)
    boxes = Boxes(corners, labels, belongs)
    examples = InMemory(
        [Example(np.zeros((20, 40, 3), np.uint8), 0, "own[0]", boxes=boxes)]
    )
    view = vision.View(**dict(size=20, channels=3, eval_resize=20) | view)
    lists = BoxLists(view, 3, limit, min_visible)
    return ImageReader(examples, 3, view, skip=False, cached=False, annotation=lists)


# 40x20 pixels are cropped to columns 10 to 30. The first box ends at column 8: outside. The second lies half inside, the
# third entirely, the fourth with 1 column of its 4; the fifth begins at the border.
CROPPED = [
    (0, 5, 8, 10),
    (5, 0, 15, 20),
    (12, 3, 18, 9),
    (29, 0, 33, 4),
    (30, 0, 40, 9),
]
INSIDE = [(0, 0, 5, 20), (2, 3, 8, 9), (19, 0, 20, 4)]


@pytest.mark.parametrize(
    ("min_visible", "rows"),
    [(0.0, [0, 1, 2]), (0.25, [0, 1, 2]), (0.3, [0, 1]), (0.5, [0, 1]), (1.0, [1])],
)
def test_a_crop_drops_boxes_by_their_visible_share(min_visible, rows):
    batch = reader(CROPPED, [0, 1, 2, 0, 1], min_visible=min_visible).still(
        np.array([0])
    )
    count = len(rows)
    np.testing.assert_array_equal(batch["boxes"][0, :count], np.array(INSIDE)[rows])
    np.testing.assert_array_equal(
        batch["box_labels"][0, :count], np.array([1, 2, 0])[rows]
    )
    assert (batch["box_labels"][0, count:] == -1).all()
    assert not batch["boxes"][0, count:].any()
    np.testing.assert_array_equal(batch["dropped_boxes"], [5 - count])


def test_a_padded_crop_moves_boxes_by_the_numbers_of_the_image():
    numbers = np.full((1, vision.DRAWS), 0.75)
    # Padded by 4, there are 9 corners a side; 0.0 → 0: down by 4; 0.99 → 8: left by 4. 0.75: not mirrored.
    numbers[0, vision.CORNER] = 0.0, 0.99
    view = dict(size=(20, 40), eval_resize=0, crop="pad", pad=4, flip=True)
    boxes = [(0, 0, 4, 4), (1, 2, 9, 18), (20, 10, 30, 12)]
    batch = reader(boxes, **view).random(np.array([0]), numbers)
    # (0, 0, 4, 4) → (-4, 4, 0, 8): outside; (1, 2, 9, 18) → (-3, 6, 5, 22), clipped at 0 and 20.
    expected = [(0, 6, 5, 20), (16, 14, 26, 16)]
    np.testing.assert_array_equal(batch["boxes"][0, :2], expected)
    np.testing.assert_array_equal(batch["dropped_boxes"], [1])
    numbers[0, vision.FLIP] = 0.25
    batch = reader(boxes, **view).random(np.array([0]), numbers)
    np.testing.assert_array_equal(
        batch["boxes"][0, :3], [(35, 6, 40, 20), (14, 14, 24, 16), (0, 0, 0, 0)]
    )


def test_a_pixel_of_rounding_is_clipped():
    view = dict(size=(20, 40), eval_resize=0)
    batch = reader([(-0.9, 3, 40.9, 21)], **view).still(np.array([0]))
    np.testing.assert_array_equal(batch["boxes"][0, 0], (0, 3, 40, 20))


BOX = (1, 1, 5, 5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(corners=[BOX, (1, 1, 42, 5)]), r"box 1 of own\[0\], \(1, 1, 42, 5\) .*out of .* 40x20"),
        (dict(corners=[(-2, 1, 5, 5)]), r"box 0 of own\[0\].* reaches out"),
        (dict(corners=[(1, 1, 1e300, 5)]), r"box 0 of own\[0\].* reaches out"),
        (dict(corners=[(5, 1, 5, 5)]), r"own\[0\].* left < right"),
        (dict(corners=[(1, 7, 5, 5)]), r"own\[0\].* top < bottom"),
        (dict(corners=[(40.2, 1, 40.8, 5)]), r"own\[0\].* left < right .* inside"),
        (dict(corners=[(1, np.nan, 5, 5)]), r"own\[0\].* not finite"),
        (dict(corners=[BOX], labels=[3]), r"own\[0\].* label 3, has .* 3 classes"),
        (dict(corners=[BOX], labels=[-1]), r"own\[0\].* label -1, has"),
        (dict(corners=[BOX], labels=[0, 1]), r"own\[0\] has 2 labels of boxes, and corners of shape \(1, 4\)"),
        (dict(corners=[BOX] * 3, limit=2), r"own\[0\] has 3 boxes, more than config\.data\.max_boxes = 2"),
        (dict(corners=[BOX], belongs=(20, 40)), r"own\[0\] has 40x20 pixels, its boxes .* 20x40"),
    ],
)  # fmt: skip
def test_wrong_boxes_are_named(keys, message):
    with pytest.raises(UserError, match=message) as error:
        reader(**keys).still(np.array([0]))
    assert "\n" not in str(error.value)


def test_boxes_refuse_what_would_leave_them_behind(coco, photos):
    with pytest.raises(UserError, match=r"randaugment = 2 shears .* set it to 0"):
        reader([BOX], randaugment=2)
    for key in "randaugment", "mixup", "cutmix":
        with pytest.raises(UserError, match=rf"unknown key config\.data\.{key}"):
            opened(coco, **{key: 1})
    source = dict(name="coco", root=str(coco)) | LAYOUT
    with pytest.raises(UserError, match="'coco' has boxes and no label per image"):
        data.make("images", source=source, size=8, mixup=0.2)
    with pytest.raises(UserError, match="'coco' has boxes, and segmentation needs"):
        data.make("segmentation", source=source, size=8)
    source = dict(name="folder", root=str(photos))
    with pytest.raises(UserError, match="'folder' has one label per image, and detec"):
        data.make("detection", source=source, size=8)


def test_an_own_source_that_promises_boxes_has_to_have_them():
    pixels = np.zeros((8, 8, 3), np.uint8)
    examples = InMemory([Example(pixels, 0, "own[0]")])
    source = Source(("a",), 3, examples, examples, most_boxes=("own[0]", 0))
    view = vision.View(8, 3)
    lists = BoxLists(view, 1, 5)
    same = dict(workers=0, cache_mb=9, corrupt="raise", annotation=lists)
    with pytest.raises(UserError, match=r"own\[0\] has no boxes"):
        readers(source, view, **same)[1].still(np.array([0]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_boxes", 0, "max_boxes = 0 should be at least 1"),
        ("max_boxes", 1, r"train/0\.png has 2 boxes, more than .*max_boxes = 1: raise"),
        ("min_visible", 1.5, "min_visible = 1.5 should lie in"),
        ("threads", -1, r"config\.data\.threads = -1"),
        ("size", 0, r"config\.data\.size = 0"),
    ],
)
def test_keys_out_of_range_are_named(coco, key, value, message):
    with pytest.raises(UserError, match=message):
        opened(coco, **{key: value})


def same(first, second, count):
    for _ in range(count):
        a, b = next(first), next(second)
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    first.close()
    second.close()


@pytest.mark.parametrize("keys", [dict(), dict(crop="pad", pad=20, flip=True)], ids=str)
def test_the_cache_changes_nothing(coco, keys):
    first, second = (opened(coco, cache_mb=mb, **keys) for mb in (0, 99))
    same(first.train(4, 1), second.train(4, 1), 5)
    same(first.eval(2), second.eval(2), 2)


def test_workers_and_resuming_change_nothing(coco):
    keys = dict(crop="random_resized", flip=True)
    here, there = opened(coco, **keys), opened(coco, workers=1, **keys)
    same(here.train(4, 1, start=8), there.train(4, 1, start=8), 3)
    whole = here.train(4, 1)
    next(whole), next(whole)
    same(whole, here.train(4, 1, start=8), 2)


def test_a_skipped_image_has_no_boxes(coco):
    path = coco / "train" / "1.jpeg"
    path.write_bytes(b"no image")
    batches = opened(coco, corrupt="skip", crop="pad", flip=True).train(6, 0)
    batch = next(batches)
    batches.close()
    assert batch["mask"].sum() == 5
    assert (batch["box_labels"][~batch["mask"]] == -1).all()
    assert not batch["boxes"][~batch["mask"]].any()
    with pytest.raises(UserError, match=r"cannot decode image .*train/1\.jpeg"):
        next(opened(coco).train(6, 0))


def test_batches_are_what_the_task_promises(coco):
    split = opened(coco, max_boxes=5, mean=(0.0,), std=(1.0,))
    assert (split.num_train, split.num_eval, split.num_classes) == (6, 3, 3)
    assert split.describe == "6 train + 3 test images at 48x64x3 with boxes, 3 classes"
    assert (split.fixed, opened(coco, flip=True).fixed) == (True, False)
    (batch,) = split.eval(4)
    (specs,) = split.specs(4)
    for key, spec in specs.items():
        assert (batch[key].shape, batch[key].dtype) == (spec.shape, spec.dtype), key
    np.testing.assert_array_equal(batch["mask"], [True, True, True, False])
    np.testing.assert_array_equal(batch["index"], [0, 1, 2, -1])
    assert (batch["box_labels"][3] == -1).all()
    pixels = split.inputs(batch)
    np.testing.assert_allclose(pixels, batch["image"] / 255, rtol=1e-6)
    assert split.example().shape == (1, *pixels.shape[1:])
    assert split.augment(None, batch) is batch


def test_the_job_predict_names_data_without_predictions(coco):
    experiment = types.SimpleNamespace(data={"name": "detection"})
    built = types.SimpleNamespace(data=opened(coco), experiment=experiment)
    with pytest.raises(UserError, match="nothing to print for 'detection' data"):
        predict.run(built, coco, ["photo.jpg"])


def coco_file(root, **changes):
    """Writes one black image of 40x20 pixels in both splits; changes stand in the evaluation split's file."""
    image = {"a.png": (encode(np.zeros((20, 40, 3), np.uint8)), 40, 20)}
    own = [(0, dict(category_id=7, bbox=[1, 2, 10, 12]))]
    write(root, image, "train", own)
    write(root, image, "eval", own, **changes)


def annotation(**keys):
    return dict(id=0, image_id=10, category_id=3, bbox=[1, 2, 3, 4]) | keys


def test_cocos_files_by_hand(tmp_path, caplog):
    images = [
        dict(id=10, file_name="a.png", width=40, height=20),
        dict(id=11, file_name="b.png"),
    ]
    annotations = [
        annotation(category_id=90, bbox=[4.5, 2, 10.25, 8]),
        annotation(image_id=11, bbox=[0, 0, 40, 20], iscrowd=1),
        annotation(category_id=3, bbox=[30, 15, 10, 5], iscrowd=0),
        annotation(category_id=7, bbox=[9, 9, 0, 3]),
    ]
    coco_file(tmp_path, images=images, annotations=annotations)
    black = encode(np.zeros((20, 40, 3), np.uint8))
    (tmp_path / "eval" / "b.png").write_bytes(black)
    split = opened(tmp_path, size=(20, 40), max_boxes=2)
    # By their ids 3, 7 and 90.
    assert split.label_names == ("blue", "green", "red")
    (batch,) = split.eval(2)
    # x, y, width, height → left, top, right, bottom. The second image has only a crowd.
    expected = [[[4.5, 2, 14.75, 10], [30, 15, 40, 20]], [[0] * 4] * 2]
    np.testing.assert_array_equal(batch["boxes"], expected)
    np.testing.assert_array_equal(batch["box_labels"], [[2, 0], [-1, -1]])
    np.testing.assert_array_equal(batch["mask"], [True, True])
    np.testing.assert_array_equal(batch["dropped_boxes"], [0, 0])
    (line,) = caplog.messages
    assert line.endswith("eval.json: left out 1 crowds and 1 boxes without an area")


def test_a_zip_holds_the_same(coco, tmp_path):
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(coco.rglob("*.*")):
            if file != path:
                archive.write(file, file.relative_to(coco))
    copy = pickle.loads(pickle.dumps(opened(path)))
    same(opened(coco).eval(3), copy.eval(3), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(images=None), "has no images: it should list"),
        (dict(annotations=[]), "has no annotations: it should list"),
        (dict(categories={}), "has no categories: it should list"),
        (dict(annotations=[7]), r"annotations\[0\] should be an object"),
        (dict(annotations=[annotation(iscrowd=1)]), "has no boxes beside crowds"),
        (dict(annotations=[annotation(iscrowd=2)]), "has iscrowd = 2"),
        (dict(annotations=[annotation(category_id=4)]), r"annotations\[0\] has category_id = 4, which"),
        (dict(annotations=[annotation(image_id=4)]), r"annotations\[0\] has image_id = 4, which"),
        (dict(annotations=[annotation(image_id=[4])]), r"image_id = \[4\]: it should be int or str"),
        (dict(annotations=[annotation(bbox=[1, 2, 3])]), r"bbox = \[1, 2, 3\]: it should be four numbers"),
        (dict(annotations=[annotation(bbox=[1, 2, 3, "4"])]), "should be four numbers"),
        (dict(annotations=[annotation(bbox=[1, 2, float("nan"), 4])]), "should be four numbers"),
        (dict(annotations=[annotation(bbox=[10**400, 2, 3, 4])]), "should be four numbers"),
        (dict(annotations=[annotation(bbox=[9, 2, -3, 4])]), "should not be negative"),
        (dict(annotations=[annotation(bbox=[9, 2, 33, 4])]), r"box 0 of .*eval/a\.png, .*reaches out"),
        (dict(images=[dict(id=10, file_name="z.png")]), r"lacks eval/z\.png of the images in .*eval\.json"),
        (dict(images=[dict(id=10, file_name="a.png", width="40")]), r"images\[0\] has width = '40'"),
        (dict(images=[dict(id=10)]), r"images\[0\] has file_name = None: it should be str"),
        (dict(images=[dict(id=10, file_name="a.png")] * 2), r"images\[1\] has the id 10 of an earlier"),
        (dict(categories=CATEGORIES[:1] * 2), r"categories\[1\] has the id 90 of an earlier"),
        (dict(categories=CATEGORIES[1:]), "different categories"),
    ],
)  # fmt: skip
def test_mistakes_in_cocos_files_are_named(tmp_path, changes, message):
    coco_file(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_or_missing_files_of_coco_are_named(tmp_path):
    coco_file(tmp_path)
    with pytest.raises(UserError, match=r"source\.train: .* has no trian\.json; did you mean 'train\.json'"):  # fmt: skip
        opened(tmp_path, source=dict(train="trian.json"))
    whole = (tmp_path / "eval.json").read_bytes()
    for content in whole[:-9], b"\xff\xfe" + whole[:9], b"[" * 100_000, b"":
        (tmp_path / "eval.json").write_bytes(content)
        with pytest.raises(UserError, match=r"eval\.json is no JSON") as error:
            opened(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "eval.json").write_text("[]")
    with pytest.raises(UserError, match="should hold an object with images"):
        opened(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a zip archive"):
        opened(tmp_path / "absent")
