"""GLUE as TFDS prepares it, `DATA_DIR/glue/TASK/VERSION`: ArrayRecord files, read without TensorFlow."""

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
    """A folder of TFDS's data sets; examples come in the order of their "idx", which is that of GLUE's files."""

    root: Path

    def read(self, task: str, part: str, labels: bool) -> Split | None:
        """One split; None where it is not there.

        Raises:
          UserError: files in another format, damaged, or of another data set.
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
        wanted = [*kind.features, "idx", *(["label"] if labels else [])]
        if lacking := [name for name in wanted if name not in features]:
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
        found = _labels(kind, features["label"], rows, newest) if labels else None
        return Split(texts, found, {part: len(rows)})

    def path(self, task: str, part: str) -> Path:
        """What lies where, but for the version: folder of a config, name of a split."""
        if part == DIAGNOSTIC:
            return self.root / "glue" / "ax" / "test"
        return self.root / "glue" / task / part.replace("dev", "validation")


def _rows(records, name: str) -> list:
    try:
        found = records.__getitems__(range(len(records)))
        return [tf_example_pb2.Example.FromString(row).features.feature for row in found]  # fmt: skip
    # What ArrayRecord and protobuf raise for damaged files.
    except (RuntimeError, IndexError, DecodeError) as error:
        raise UserError(
            f"cannot read {name}: {' '.join(str(error).split())}; delete and prepare it again"
        ) from None


def _labels(kind, feature, rows, path: Path) -> np.ndarray:
    if not kind.names:
        return np.array([row["label"].float_list.value[0] for row in rows], np.float32)
    theirs = getattr(feature, "names", ())
    if set(theirs) != set(kind.names):
        raise UserError(
            f"{path} has the labels {', '.join(theirs)}, not {', '.join(kind.names)}"
        )
    ours = np.array([kind.names.index(name) for name in theirs], np.int32)
    return ours[[row["label"].int64_list.value[0] for row in rows]]
