"""Folders of Hugging Face's `transformers`: config.json beside model.safetensors or pytorch_model.bin.

A folder is read without `transformers`, and no code in it is ever run: the older pytorch_model.bin is a pickle, of which
PyTorch reads tensors alone. What an encoder's file has to say of its folders is a `Family`, the maps between its options
and the keys of config.json, and the names of its layers; `models.load` and `models.save` do the rest.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax import files as atomic
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.weights import files

_log = logging.getLogger("squeeze_jax")
Config = dict[str, Any]
CONFIG = "config.json"
# In the order in which they are looked for; an index tells which tensor is in which of several files.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# The keys that BERT and most encoders after it share: {key of config.json: option of `make`}.
BERT_KEYS = {
    "num_hidden_layers": "layers",
    "hidden_size": "features",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn_features",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "type_vocab_size": "segments",
    "hidden_act": "activation",
    "layer_norm_eps": "epsilon",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout": "head_dropout",
}
# Their names for our activations; the first of those for one of ours is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
# What would be another computation than ours.
ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


class Family(NamedTuple):
    """What `transformers` calls an architecture and its parts.

    Attributes:
      model_type: in config.json.
      prefix: of the encoder's tensors in a class with a head.
      classes: {task: class}; others than these cannot be written.
      pooled: the tasks whose class has a pooler, needed or not.
      heads: the layers of all heads; those of other tasks are passed over.
      tied: {tensor: the tensor that it is the same as}.
      conv1d: whether its layers are convolutions of sequences, which have another axis in their weights, or matrices.
      unpacked: (arrays without prefix, net) → arrays as PyTorch's own layers have them, one for each of ours, where the
        class keeps some otherwise, as transposed or several in one.
      packed: (arrays, net) → the inverse; names have the prefix.
    """

    model_type: str
    prefix: str
    classes: Mapping[str, str]
    pooled: tuple[str, ...]
    heads: tuple[str, ...]
    tied: Mapping[str, str]
    conv1d: bool
    unpacked: Callable = lambda arrays, net: arrays
    packed: Callable = lambda arrays, net: arrays


def read_config(folder: str | Path) -> Config:
    """The content of a folder's config.json.

    Raises:
      UserError: no folder, no such file, or no JSON object.
    """
    path = atomic.path(folder) / CONFIG
    if not path.is_file():
        what = "has no" if Path(folder).is_dir() else "is not a folder with a"
        raise UserError(
            f"{folder} {what} {CONFIG}: give a folder as transformers saves it"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} should hold a JSON object: fetch it again")
    return config


def read_arrays(folder: str | Path) -> files.Arrays:
    """All tensors of a folder, in one file or in those that an index names.

    Raises:
      UserError: no weights, a file of the index that is not there, or a damaged one.
    """
    folder = atomic.path(folder)
    for name in WEIGHTS:
        if (folder / name).is_file():
            arrays, lines = files.unprefixed(files.read(folder / name))
            for line in lines:
                _log.warning("%s: %s", folder, line)
            return arrays
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _sharded(index)
    raise UserError(f"{folder} has no weights: it should have {' or '.join(WEIGHTS)}")


def _sharded(index: Path) -> files.Arrays:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        parts = sorted(set(where.values()))
        inside = all(part == Path(part).name for part in parts)
    except (ValueError, KeyError, TypeError, AttributeError):
        inside = False
    if not inside:
        raise UserError(
            f"{index} should map tensors to files beside it: fetch it again"
        )
    arrays = {}
    for part in parts:
        arrays |= files.read(index.parent / part)
    for name, part in where.items():
        if name not in arrays:
            raise UserError(
                f"{index.parent / part} lacks {name}, which {index.name} says is in it: fetch it again"
            )
    return arrays


def write(folder: str | Path, config: Mapping[str, Any], arrays: files.Arrays) -> None:
    """Writes config.json and model.safetensors, each whole or not at all; makes the folder.

    Raises:
      UserError: the folder cannot be written to.
    """
    folder = atomic.path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_safetensors(folder / WEIGHTS[0], arrays)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from None
    atomic.write(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def options(
    config: Mapping[str, Any],
    keys: Mapping[str, str] = BERT_KEYS,
    only: Mapping[str, Any] = ONLY,
) -> dict[str, Any]:
    """Options of `make` from config.json; keys that it lacks keep the defaults.

    Args:
      config: the content of config.json.
      keys: {key of config.json: option}.
      only: {key of config.json: the one value that we compute}.

    Raises:
      UserError: a value that stands for something else than what we compute.
    """
    for key, value in only.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{CONFIG}: {key} = {config[key]!r} is not supported, only {value!r}"
            )
    found = {}
    for key, option in keys.items():
        value = config.get(key)
        if value is None:
            continue
        if option == "activation":
            if not isinstance(value, str) or value not in ACTIVATIONS:
                raise UserError(
                    f"{CONFIG}: unknown {key} {value!r}{nearest(value, ACTIVATIONS)}"
                )
            value = ACTIVATIONS[value]
        found[option] = value
    return found


def config(net, keys: Mapping[str, str] = BERT_KEYS) -> Config:
    """The keys of config.json from a net with these options as attributes of its row, its settings or itself.

    Raises:
      UserError: no segments, where the class has some.
    """
    found = {}
    for key, option in keys.items():
        parts = (net.row, net.settings, net)
        value = next(getattr(p, option) for p in parts if hasattr(p, option))
        if option == "segments" and not value:
            raise UserError(
                f"transformers' {type(net).__name__} embeds segments: it could not run one of segments = 0"
            )
        if option == "activation":
            value = next(
                theirs for theirs, ours in ACTIVATIONS.items() if ours == value
            )
        found[key] = value
    return found


def task(config: Mapping[str, Any], family: Family) -> str | None:
    """The task of the class that config.json names, or None where it names none of the family's."""
    found = config.get("architectures")
    first = found[0] if found and isinstance(found, list) else None
    return next((t for t, name in family.classes.items() if name == first), None)


def labels(config: Mapping[str, Any]) -> int:
    """How many classes a folder's classifier has; two where config.json does not say.

    Raises:
      UserError: labels that are no mapping.
    """
    names, count = config.get("id2label"), config.get("num_labels")
    if names and not isinstance(names, dict):
        raise UserError(
            f"{CONFIG}: id2label = {names!r} should map numbers of classes to names"
        )
    return len(names or ()) or (2 if count is None else count)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of a folder's classes by their numbers; None where it has none, or the usual LABEL_0, LABEL_1, …

    Raises:
      UserError: labels that are no mapping of the numbers from 0 on to names.
    """
    count, names = labels(config), config.get("id2label")
    if not names:
        return None
    try:
        numbered = {int(number): str(name) for number, name in names.items()}
        ordered = tuple(numbered[n] for n in range(count))
    except (KeyError, ValueError):
        raise UserError(
            f"{CONFIG}: id2label = {names!r} should name the classes 0 to {count - 1}"
        ) from None
    usual = all(name == f"LABEL_{n}" for n, name in enumerate(ordered))
    return None if usual else ordered


def without_prefix(arrays: files.Arrays, family: Family) -> files.Arrays:
    """The arrays named alike, whether they come from an encoder with a head or without."""
    start = f"{family.prefix}."
    return {name.removeprefix(start): array for name, array in arrays.items()}


def tied(arrays: files.Arrays, family: Family) -> files.Arrays:
    """The arrays with each of those that are the same once.

    Raises:
      UserError: tensors that should be the same and are not.
    """
    found = dict(arrays)
    for name, same in family.tied.items():
        array = found.pop(name, None)
        if array is None:
            continue
        if same in found and not np.array_equal(array, found[same]):
            raise UserError(
                f"{name} differs from {same}: an output that is not tied to the input is not supported"
            )
        found.setdefault(same, array)
    return found
