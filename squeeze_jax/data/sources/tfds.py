"""Any image classification dataset of TensorFlow Datasets (TFDS), read from ArrayRecord files without TensorFlow.

`tfds build NAME --file_format=array_record` or `python -m squeeze_jax.data.convert` makes the files. Images stay encoded here:
Pillow decodes them later, in the threads or worker processes of the pipeline.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from squeeze_jax import files
from squeeze_jax.data.source import Example, Source
from squeeze_jax.data.survey import Survey
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.ranges import PathStr

FORMAT = tfds.core.FileFormat.ARRAY_RECORD
VERSION = re.compile(r"\d+\.\d+\.\d+")


def make(
    dataset: PathStr,
    data_dir: PathStr = "~/tensorflow_datasets",
    train: PathStr = "train",
    eval: PathStr = "test",
) -> Source:
    """Opens a prepared dataset.

    Args:
      dataset: the dataset's name as TFDS writes it: "cifar10", "imagenet_resized/32x32", "cifar10:1.0.0"; without a
        version, the newest.
      data_dir: the folder of datasets; `~` is expanded.
      train, eval: the splits to train and to evaluate on, or slices of splits such as "train[:90%]".

    Raises:
      UserError: there is no such folder, dataset, config, version or split; the dataset is not for image classification; or
        its files are not ArrayRecord files.
    """
    folder = find(dataset, data_dir)
    builder = tfds.builder_from_directory(folder)
    info = builder.info
    if FORMAT not in info.available_file_formats():
        raise UserError(
            f"{folder} holds {info.file_format.value} files, not ArrayRecord: {_recipe(dataset, data_dir)}"
        )
    features, keys = dict(info.features), info.supervised_keys or ("image", "label")
    kinds = tuple(type(features.get(k)) for k in keys if isinstance(k, str))
    if kinds != (tfds.features.Image, tfds.features.ClassLabel):
        raise UserError(
            f"{dataset} is not an image classification set: its features are {', '.join(features)}"
        )
    image, label = keys
    splits = tuple(
        _Records(_open(builder, split), image, label, f"{dataset} {split}")
        for split in (train, eval)
    )
    return Source(
        label_names=tuple(features[label].names),
        channels=3 if features[image].shape[-1] != 1 else 1,
        train=splits[0],
        eval=splits[1],
        survey=_survey(features[image].shape, sum(map(len, splits))),
    )


def _survey(shape: tuple[int | None, ...], total: int) -> Survey:
    """Counts the images by the (h, w, c) in the dataset's metadata, which is None for a side that differs among images."""
    height, width, channels = shape
    sizes = {(width, height): total} if height and width else {}
    grey = total if channels == 1 else 0
    transparent = total if channels in (2, 4) else 0
    return Survey(total, sizes, grey, total - grey, transparent)


def find(dataset: str, data_dir: str) -> Path:
    """Returns the folder `data_dir/name[/config]/version` of a prepared dataset.

    Args:
      dataset, data_dir: see `make`.

    Raises:
      UserError: there is no such dataset; the error names those that exist.
    """
    base = Path(data_dir).expanduser()
    files.check_utf8(base, "config.data.source.data_dir")
    if not base.is_dir():
        raise UserError(
            f"config.data.source.data_dir = {data_dir!r} is not a folder: prepare {dataset} there, {_recipe(dataset, data_dir)}"
        )
    prepared = _prepared(base)
    path, _, version = dataset.partition(":")
    if path not in prepared:
        configs = [p for p in prepared if p.startswith(f"{path}/")]
        if configs:
            raise UserError(f"{path} has configs; choose from {', '.join(configs)}")
        raise UserError(
            f"no data set {path!r} in {base}{nearest(path, prepared)}; to prepare it, {_recipe(dataset, data_dir)}"
        )
    if version and version not in prepared[path]:
        raise UserError(
            f"no version {version!r} of {path} in {base}{nearest(version, prepared[path])}"
        )
    newest = max(prepared[path], key=lambda v: tuple(map(int, v.split("."))))
    return base / path / (version or newest)


def _prepared(base: Path) -> dict[str, list[str]]:
    """Returns `{"name" or "name/config": versions}` for the complete datasets in a folder."""
    versions = {}
    for pattern in "*/*/dataset_info.json", "*/*/*/dataset_info.json":
        for file in sorted(base.glob(pattern)):
            path = file.parent.parent.relative_to(base).as_posix()
            if VERSION.fullmatch(file.parent.name) and not path.startswith("."):
                versions.setdefault(path, []).append(file.parent.name)
    return versions


def _recipe(dataset: str, data_dir: str) -> str:
    name = re.split("[/:]", dataset)[0]
    return (
        f"run `python -m squeeze_jax.data.convert ARCHIVE.npz --name={name} --data_dir={data_dir}`"
        f" or `tfds build {name} --file_format=array_record --data_dir={data_dir}`"
    )


def _open(builder, split: str) -> Sequence[bytes]:
    try:
        return builder.as_data_source(
            split=split,
            file_format=FORMAT,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
    except ValueError:
        splits = list(builder.info.splits)
        raise UserError(
            f"{builder.info.name} has no split {split!r}{nearest(split, splits)}"
        ) from None


@dataclasses.dataclass(frozen=True)
class _Records:
    """Serialized examples. It reads only the image and the label, because TFDS spends time on every feature."""

    records: Sequence[bytes]
    image: str
    label: str
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> list[Example]:
        examples = []
        try:
            rows = self.records.__getitems__([int(i) for i in indices])
            for i, row in zip(indices, rows, strict=True):
                feature = tf_example_pb2.Example.FromString(row).features.feature
                image = feature[self.image].bytes_list.value[0]
                label = feature[self.label].int64_list.value[0]
                examples.append(Example(image, label, f"{self.name}[{i}]"))
        # ArrayRecord and protobuf raise these for damaged files; a truncated file may also give empty records.
        except (RuntimeError, IndexError, DecodeError) as error:
            raise UserError(
                f"cannot read {self.name}: {' '.join(str(error).split())}; delete and prepare it again"
            ) from None
        return examples
