"""Images with boxes in COCO's format (arXiv 1405.0312): one JSON file of instances and one folder of images per split.

The JSON file lists `images` (id, file_name, width, height), `categories` (id, name) and `annotations` (image_id,
category_id, bbox [x, y, width, height] in pixels of the upright image, iscrowd). Category ids may have gaps: classes are
numbered from 0 in the order of their ids. Images without boxes stay in the dataset. Two kinds of annotations are left out,
and a log line counts them: crowds (iscrowd = 1), whose box holds many objects, and boxes of zero width or height, such as
the two in `instances_train2017.json`.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax.data import photos, survey
from squeeze_jax.data.annotations import checked_boxes
from squeeze_jax.data.source import Boxes, Example, Source
from squeeze_jax.data.sources.pairs import Folder, Zip, open_root
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.ranges import PathStr

log = logging.getLogger(__name__)

# In pixels. All numbers of a box must be smaller, which also excludes NaN and infinity.
LIMIT = 1e9
SHOWN = 20  # the number of file names that an error compares with
LISTS = ("images", "categories", "annotations")


def make(
    root: PathStr,
    *,
    train: PathStr = "annotations/instances_train2017.json",
    train_images: PathStr = "train2017",
    eval: PathStr = "annotations/instances_val2017.json",
    eval_images: PathStr = "val2017",
) -> Source:
    """Reads the annotations of both splits and checks them against the image files.

    Args:
      root: a folder, or a zip archive; `~` is expanded.
      train: the JSON file of the training split, below `root`.
      train_images: the folder of the training images, below `root`; "" for `root` itself.
      eval: the JSON file of the evaluation split, below `root`.
      eval_images: the folder of the evaluation images, below `root`; "" for `root` itself.

    Raises:
      UserError: a file or an image is missing, a file is not in COCO's format, a category or image id is unknown, a box lies
        outside its image, a split has no boxes, or the splits have different categories.
    """
    files = open_root(root)
    file_names = set(files.names())
    splits, categories = [], []
    for key, path, folder in (
        ("train", train, train_images),
        ("eval", eval, eval_images),
    ):
        tables = _tables(files, file_names, key, path)
        where = f"{files.root}/{path}"
        categories.append(_categories(tables["categories"], where))
        images = _images(tables["images"], where, folder)
        _check_files(images, file_names, files, where, key)
        boxes = _boxes(tables["annotations"], where, images, categories[-1])
        splits.append(_Split(files, *boxes))
    if categories[0] != categories[1]:
        raise UserError(
            f"{files.root}: {train} and {eval} have different categories: both should list the same ids and names"
        )
    names = tuple(name for _, name in sorted(categories[0].items()))
    paths = [image.path for split in splits for image in split.images]
    surveyed = survey.survey_images(paths, files.open)
    for split in splits:
        split.check(len(names))
    return Source(
        label_names=names,
        channels=surveyed.channels,
        train=splits[0],
        eval=splits[1],
        most_boxes=max((split.most_boxes() for split in splits), key=lambda m: m[1]),
        survey=surveyed,
        notes=_notes(files, file_names, set(paths), (train_images, eval_images)),
    )


def _notes(
    files: Folder | Zip, file_names: set[str], used: set[str], folders: tuple[str, str]
) -> tuple[str, ...]:
    """Returns a line that counts and names the images in the splits' folders that no JSON file lists."""
    places = {PurePosixPath(folder) for folder in folders}
    others = [
        name
        for name in photos.separate_images(file_names - used).images
        if PurePosixPath(name).parent in places
    ]
    if not others:
        return ()
    return (
        f"left out in {files.root}: {len(others)} images without annotations ({photos.join_names(others)})",
    )


class _Image(NamedTuple):
    path: str  # below the root
    size: tuple[int, int] | None  # (width, height)


@dataclasses.dataclass(frozen=True)
class _Split:
    files: Folder | Zip
    images: tuple[_Image, ...]
    # int [images + 1]: the boxes of image i are those from starts[i] to starts[i + 1].
    starts: np.ndarray
    corners: np.ndarray  # float32 [boxes, 4]
    labels: np.ndarray  # int32 [boxes]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> list[Example]:
        return [
            Example(
                self.files.read(self.images[i].path),
                0,
                self.name(i),
                boxes=self.boxes(i),
            )
            for i in indices
        ]

    def name(self, i: int) -> str:
        return f"{self.files.root}/{self.images[i].path}"

    def boxes(self, i: int) -> Boxes:
        rows = slice(self.starts[i], self.starts[i + 1])
        return Boxes(self.corners[rows], self.labels[rows], self.images[i].size)

    def check(self, num_classes: int) -> None:
        """Raises a UserError for a box outside its image; images whose size the file does not state are not checked."""
        for i, image in enumerate(self.images):
            if image.size is not None and self.starts[i] < self.starts[i + 1]:
                checked_boxes(self.boxes(i), image.size, num_classes, self.name(i))

    def most_boxes(self) -> tuple[str, int]:
        counts = np.diff(self.starts)
        return self.name(int(counts.argmax())), int(counts.max())


def _tables(
    files: Folder | Zip, file_names: set[str], key: str, path: str
) -> dict[str, list[dict]]:
    """Returns the three lists of a JSON file, whose entries are objects."""
    if path not in file_names:
        others = sorted(name for name in file_names if name.endswith(".json"))
        raise UserError(
            f"config.data.source.{key}: {files.root} has no {path}{nearest(path, others[:SHOWN])}"
        )
    where = f"{files.root}/{path}"
    try:
        content = json.loads(files.read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is no JSON: {error}; copy or download it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{where} should hold an object with {', '.join(LISTS)}")
    for name in LISTS:
        entries = content.get(name)
        if not isinstance(entries, list) or not entries:
            raise UserError(
                f"{where} has no {name}: it should list images, categories and annotations as COCO's instances do"
            )
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise UserError(f"{where}: {name}[{number}] should be an object")
    return {name: content[name] for name in LISTS}


def _field(entry: dict, key: str, kinds: tuple[type, ...], where: str) -> Any:
    """Returns an entry's value under a key; raises a UserError unless it has one of these types. A bool is not an int."""
    value = entry.get(key)
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{where} has {key} = {value!r}: it should be {expected}")
    return value


def _categories(entries: list[dict], where: str) -> dict[int, str]:
    categories = {}
    for number, entry in enumerate(entries):
        here = f"{where}: categories[{number}]"
        category = _field(entry, "id", (int,), here)
        if category in categories:
            raise UserError(f"{here} has the id {category} of an earlier one")
        categories[category] = _field(entry, "name", (str,), here)
    return categories


def _images(entries: list[dict], where: str, folder: str) -> dict[int | str, _Image]:
    images = {}
    for number, entry in enumerate(entries):
        here = f"{where}: images[{number}]"
        key = _field(entry, "id", (int, str), here)
        if key in images:
            raise UserError(f"{here} has the id {key} of an earlier one")
        size = None
        if "width" in entry or "height" in entry:
            size = tuple(_field(entry, k, (int,), here) for k in ("width", "height"))
        path = PurePosixPath(folder, _field(entry, "file_name", (str,), here))
        images[key] = _Image(path.as_posix(), size)
    return images


def _check_files(
    images: dict[int | str, _Image],
    file_names: set[str],
    files: Folder | Zip,
    where: str,
    key: str,
) -> None:
    missing = [image.path for image in images.values() if image.path not in file_names]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{files.root} lacks {missing[0]}{others} of the images in {where}: add them, or mend"
            f" config.data.source.{key}_images"
        )


def _boxes(
    entries: list[dict],
    where: str,
    images: dict[int | str, _Image],
    categories: dict[int, str],
) -> tuple[tuple[_Image, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Returns the fields of a `_Split`: images, starts, corners and labels, in the order of the file."""
    label = {category: i for i, category in enumerate(sorted(categories))}
    position = {key: i for i, key in enumerate(images)}
    owners, corners, labels = [], [], []
    crowds = empty = 0
    for number, entry in enumerate(entries):
        here = f"{where}: annotations[{number}]"
        for key, known in ("image_id", position), ("category_id", label):
            if _field(entry, key, (int, str), here) not in known:
                raise UserError(
                    f"{here} has {key} = {entry[key]!r}, which the file does not list"
                )
        x, y, w, h = _bbox(entry, here)
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise UserError(f"{here} has iscrowd = {crowd!r}: it should be 0 or 1")
        crowds += bool(crowd)
        empty += not crowd and not (w and h)
        if crowd or not (w and h):
            continue
        owners.append(position[entry["image_id"]])
        corners.append((x, y, x + w, y + h))
        labels.append(label[entry["category_id"]])
    if crowds or empty:
        log.warning(
            "%s: left out %d crowds and %d boxes without an area", where, crowds, empty
        )
    if not labels:
        raise UserError(
            f"{where} has no boxes beside crowds and boxes without an area: a detector needs some"
        )
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=len(images))
    return (
        tuple(images.values()),
        np.concatenate([[0], np.cumsum(counts)]),
        np.array(corners, np.float32)[order],
        np.array(labels, np.int32)[order],
    )


def _bbox(entry: dict, where: str) -> list[float]:
    """Returns x, y, width, height."""
    bbox = entry.get("bbox")
    is_four = isinstance(bbox, list) and len(bbox) == 4
    if not is_four or not all(type(v) in (int, float) and abs(v) < LIMIT for v in bbox):
        raise UserError(
            f"{where} has bbox = {bbox!r}: it should be four numbers, [x, y, width, height]"
        )
    if min(bbox[2:]) < 0:
        raise UserError(
            f"{where} has bbox = {bbox}: width and height should not be negative"
        )
    return bbox
