"""Reads GLUE as TFDS prepares it: ArrayRecord files in `DATA_DIR/glue/TASK/VERSION`, read without TensorFlow."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from squeeze_jax.data.glue import DIAGNOSTIC, TASKS, Split
from squeeze_jax.errors import UserError

FORMAT = tfds.core.FileFormat.ARRAY_RECORD


class Prepared(NamedTuple):
    """A folder of TFDS datasets; examples come in the order of their "idx", which is the order of GLUE's own files."""

    root: Path

    def read(self, task: str, part: str, labels: bool) -> Split | None:
        """Reads one split of the newest version; returns None if it is missing.

        Args:
          task: a key of `glue.TASKS`.
          part: the split's name in GLUE's own files, such as "train" or "dev_matched".
          labels: whether the split has labels.

        Raises:
          UserError: the files are in another format, damaged, or of another dataset; or the split should have labels and
            has none.
        """
        path, kind = self.path(task, part).parent, TASKS[task]
        versions = [p.parent for p in path.glob("*/dataset_info.json")]
        if not versions:
            return None
        newest = max(versions, key=lambda p: [int(n) for n in p.name.split(".")])
        builder = tfds.builder_from_directory(newest)
        name = self.path(task, part).name
        if name not in builder.info.splits:
            return None
        if FORMAT not in builder.info.available_file_formats():
            raise UserError(
                f"{newest} holds {builder.info.file_format.value} files, not ArrayRecord: delete it and run"
                f" `tfds build glue/{path.name} --file_format=array_record --data_dir={self.root}`"
            )
        features = dict(builder.info.features)
        required = [*kind.features, "idx", *(["label"] if labels else [])]
        if lacking := [name for name in required if name not in features]:
            raise UserError(
                f"{newest} is not GLUE's {task}: it lacks {', '.join(lacking)} and has {', '.join(sorted(features))}"
            )
        records = builder.as_data_source(
            split=name,
            file_format=FORMAT,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
        rows = _rows(records, f"{newest} {name}")
        rows.sort(key=lambda row: row["idx"].int64_list.value[0])
        texts = tuple(
            [row[name].bytes_list.value[0].decode() for row in rows]
            for name in kind.features
        )
        values = None
        if labels:
            _check_labelled(kind, rows, f"{newest} {name}")
            values = _labels(kind, features["label"], rows, newest)
        return Split(texts, values, {part: len(rows)})

    def path(self, task: str, part: str) -> Path:
        """Returns the folder of a task without its version, followed by the name of a split in TFDS."""
        if part == DIAGNOSTIC:
            return self.root / "glue" / "ax" / "test"
        return self.root / "glue" / task / part.replace("dev", "validation")


def _rows(records, name: str) -> list:
    try:
        rows = records.__getitems__(range(len(records)))
        return [tf_example_pb2.Example.FromString(row).features.feature for row in rows]  # fmt: skip
    # ArrayRecord and protobuf raise these for damaged files.
    except (RuntimeError, IndexError, DecodeError) as error:
        raise UserError(
            f"cannot read {name}: {' '.join(str(error).split())}; delete and prepare it again"
        ) from None


def _check_labelled(kind, rows, name: str) -> None:
    """Raises a UserError for a split without labels, such as GLUE's test sets, where TFDS writes -1 for each label."""
    for row in rows:
        label = row["label"]
        value = (label.int64_list if kind.names else label.float_list).value[0]
        if value < 0:
            raise UserError(
                f"{name} has no labels (its idx {row['idx'].int64_list.value[0]} has {value:g}): name a split with labels in"
                " config.data, such as 'dev'"
            )


def _labels(kind, feature, rows, path: Path) -> np.ndarray:
    if not kind.names:
        return np.array([row["label"].float_list.value[0] for row in rows], np.float32)
    tfds_names = getattr(feature, "names", ())
    if set(tfds_names) != set(kind.names):
        raise UserError(
            f"{path} has the labels {', '.join(tfds_names)}, not {', '.join(kind.names)}"
        )
    numbers = np.array([kind.names.index(name) for name in tfds_names], np.int32)
    return numbers[[row["label"].int64_list.value[0] for row in rows]]
