"""Reads and writes folders of Hugging Face's `transformers`: config.json with model.safetensors or pytorch_model.bin.

A folder is read without `transformers`, and no code in it is ever run: the older pytorch_model.bin is a pickle, from which
PyTorch reads only tensors. An encoder's file describes its folders with a `Family`, the maps between its options and the
keys of config.json, and the names of its layers. `models.load` and `models.save` do the rest.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from squeeze_jax import files
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.weights import weight_files

_log = logging.getLogger("squeeze_jax")
Config = dict[str, Any]
CONFIG = "config.json"
# Weight files, in the order in which they are looked for. If the weights are split, an index maps tensors to files.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# {key of config.json: option of `make`} that BERT and most later encoders share.
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
# {their name of an activation: ours}. Of several names for one activation the first is written.
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
# {key of config.json: the only value that we support}; other values mean another computation.
ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


class Family(NamedTuple):
    """How `transformers` names an architecture and its parts.

    Attributes:
      model_type: value of that key in config.json.
      prefix: prefix of the encoder's tensors in a class with a head.
      classes: {task: class}; networks for other tasks cannot be written.
      pooled: the tasks whose class has a pooler, needed or not.
      heads: the layers of all heads; layers of other tasks' heads are ignored.
      tied: {tensor: the tensor whose values it shares}.
      conv1d: whether its layers are sequence convolutions, whose weights have one more axis, or matrices.
      unpack: (arrays without prefix, net) → arrays in the layout of PyTorch's own layers, one for each of ours. Some classes
        store arrays transposed, or several in one.
      pack: (arrays with prefix, net) → arrays as the class stores them: the inverse of `unpack`.
    """

    model_type: str
    prefix: str
    classes: Mapping[str, str]
    pooled: tuple[str, ...]
    heads: tuple[str, ...]
    tied: Mapping[str, str]
    conv1d: bool
    unpack: Callable = lambda arrays, net: arrays
    pack: Callable = lambda arrays, net: arrays


def read_config(folder: str | Path) -> Config:
    """Reads a folder's config.json.

    Raises:
      UserError: the folder or the file is missing, or the file is not a JSON object.
    """
    path = files.path(folder) / CONFIG
    if not path.is_file():
        problem = "has no" if Path(folder).is_dir() else "is not a folder with a"
        raise UserError(
            f"{folder} {problem} {CONFIG}: give a folder as transformers saves it"
        )
    try:
        config = files.read_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} should hold a JSON object: fetch it again")
    return config


def read_arrays(folder: str | Path) -> weight_files.Arrays:
    """Reads all tensors of a folder, from one file or from the files that an index names.

    Raises:
      UserError: the folder has no weights, or a file is missing or damaged.
    """
    folder, lines = files.path(folder), []
    for name in WEIGHTS:
        if (folder / name).is_file():
            arrays = weight_files.read(folder / name, lines)
            arrays, prefix_lines = weight_files.remove_prefixes(arrays)
            _log_lines(folder, lines + prefix_lines)
            return arrays
        index = folder / f"{name}.index.json"
        if index.is_file():
            arrays = _read_sharded(index)
            _log_lines(folder, weight_files.describe_casts(arrays))
            return arrays
    raise UserError(f"{folder} has no weights: it should have {' or '.join(WEIGHTS)}")


def _log_lines(folder: Path, lines: Sequence[str]) -> None:
    for line in lines:
        _log.warning("%s: %s", folder, line)


def _read_sharded(index: Path) -> weight_files.Arrays:
    """Reads tensors from the files that an index maps them to."""
    try:
        file_of = files.read_json(index)["weight_map"]
        parts = sorted(set(file_of.values()))
        valid = all(part == Path(part).name for part in parts)  # files beside the index
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise UserError(
            f"{index} should map tensors to files beside it: fetch it again"
        )
    arrays = {}
    for part in parts:
        arrays |= weight_files.read(index.parent / part)
    for name, part in file_of.items():
        if name not in arrays:
            raise UserError(
                f"{index.parent / part} lacks {name}, which {index.name} says is in it: fetch it again"
            )
    return arrays


def write(
    folder: str | Path, config: Mapping[str, Any], arrays: weight_files.Arrays
) -> None:
    """Writes config.json and model.safetensors, each atomically, and creates the folder if needed.

    Raises:
      UserError: the folder cannot be written to.
    """
    folder = files.path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weight_files.write_safetensors(folder / WEIGHTS[0], arrays)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from None
    files.write(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def options_from_config(
    config: Mapping[str, Any],
    keys: Mapping[str, str] = BERT_KEYS,
    only: Mapping[str, Any] = ONLY,
) -> dict[str, Any]:
    """Returns the options of `make` that config.json sets; the others keep their defaults.

    Args:
      config: the content of config.json.
      keys: {key of config.json: option}.
      only: {key of config.json: the only value that we support}.

    Raises:
      UserError: config.json has a value that we do not support.
    """
    for key, value in only.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{CONFIG}: {key} = {config[key]!r} is not supported, only {value!r}"
            )
    options = {}
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
        options[option] = value
    return options


def config_from_net(net, keys: Mapping[str, str] = BERT_KEYS) -> Config:
    """Returns the keys of config.json for a network.

    Args:
      net: the network; each option is an attribute of its `row`, of its `settings` or of the network itself.
      keys: {key of config.json: option}.

    Raises:
      UserError: the network has no segment embeddings, but the class of `transformers` has.
    """
    content = {}
    for key, option in keys.items():
        parts = (net.row, net.settings, net)
        value = next(getattr(p, option) for p in parts if hasattr(p, option))
        if option == "segments" and not value:
            raise UserError(
                f"transformers' {type(net).__name__} embeds segments: it could not load a network with segments = 0"
            )
        if option == "activation":
            value = next(
                theirs for theirs, ours in ACTIVATIONS.items() if ours == value
            )
        content[key] = value
    return content


def task_from_config(config: Mapping[str, Any], family: Family) -> str | None:
    """Returns the task of the class that config.json names, or None if it names no class of the family."""
    classes = config.get("architectures")
    first = classes[0] if classes and isinstance(classes, list) else None
    return next((t for t, name in family.classes.items() if name == first), None)


def count_classes(config: Mapping[str, Any]) -> int:
    """Returns the number of classes of a folder's classifier; 2 if config.json does not give it.

    Raises:
      UserError: config.json's id2label is not a mapping.
    """
    names, count = config.get("id2label"), config.get("num_labels")
    if names and not isinstance(names, dict):
        raise UserError(
            f"{CONFIG}: id2label = {names!r} should map numbers of classes to names"
        )
    return len(names or ()) or (2 if count is None else count)


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns a folder's class names in order; None if it has none, or only the default LABEL_0, LABEL_1, …

    Raises:
      UserError: config.json's id2label does not map the numbers from 0 on to names.
    """
    count, names = count_classes(config), config.get("id2label")
    if not names:
        return None
    try:
        numbered = {int(number): str(name) for number, name in names.items()}
        ordered = tuple(numbered[n] for n in range(count))
    except (KeyError, ValueError):
        raise UserError(
            f"{CONFIG}: id2label = {names!r} should name the classes 0 to {count - 1}"
        ) from None
    are_defaults = all(name == f"LABEL_{n}" for n, name in enumerate(ordered))
    return None if are_defaults else ordered


def remove_prefix(arrays: weight_files.Arrays, family: Family) -> weight_files.Arrays:
    """Removes the prefix of a class with a head, so that encoders with and without a head have the same names."""
    start = f"{family.prefix}."
    return {name.removeprefix(start): array for name, array in arrays.items()}


def merge_tied(arrays: weight_files.Arrays, family: Family) -> weight_files.Arrays:
    """Merges tied tensors: keeps one copy of each, under the name that the family ties to.

    Raises:
      UserError: tensors that should be tied differ.
    """
    merged = dict(arrays)
    for name, same in family.tied.items():
        array = merged.pop(name, None)
        if array is None:
            continue
        if same in merged and not np.array_equal(array, merged[same]):
            raise UserError(
                f"{name} differs from {same}: an output that is not tied to the input is not supported"
            )
        merged.setdefault(same, array)
    return merged
