"""Named arrays from other projects' weight files: npz, safetensors and PyTorch and Keras checkpoints."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from squeeze_jax import files as atomic
from squeeze_jax.errors import UserError
from squeeze_jax.weights import keras

Arrays = dict[str, np.ndarray]
# How a file begins that Git's extension for large ones left in a clone instead of the content.
_POINTER = b"version https://git-lfs"

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: str | Path, notes: list[str] | None = None, *, key: str = "") -> Arrays:
    """Reads `{name: array}` from a file; its ending (.npz, .safetensors, .pt, .pth, .bin, .h5, .keras) says of which kind it is.

    Args:
      path: of the file.
      notes: gets a line for what was unwrapped, such as the weights of a training checkpoint.
      key: which of a PyTorch checkpoint's parts has the weights, such as "model_ema"; "" for the first that can.

    Raises:
      UserError: no such file, an unknown ending, a file that is damaged or was not fetched, or a checkpoint of something
        else than tensors by name; names the file.
    """
    path = atomic.path(path)
    check(path, key=key)
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"weights file {path} is a pointer of Git LFS, not the weights: run git lfs pull where it was cloned"
                )
        notes = [] if notes is None else notes
        reader = _READERS[path.suffix]
        return reader(path, notes, key) if reader is _torch else reader(path, notes)
    except UserError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,  # a header of other types than it should have
        AttributeError,  # likewise
        EOFError,
        OSError,
        MemoryError,  # a shape beyond all memory
        RecursionError,  # a header of a thousand brackets
        zipfile.BadZipFile,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"weights file {path} is damaged ({reason}): fetch it again"
        ) from error


def check(path: str | Path, *, key: str = "") -> None:
    """Raises a UserError for a file that is not there, whose ending is unknown, or that has no parts to choose by a key."""
    path = atomic.path(path)
    if path.suffix not in _READERS:
        raise UserError(
            f"weights {path} have an unknown ending: use {', '.join(_READERS)}"
        )
    if not path.is_file():
        raise UserError(f"no weights file {path}: check the path")
    if key and _READERS[path.suffix] is not _torch:
        raise UserError(
            f"config.init.key = {key!r}: only PyTorch's checkpoints have parts, and {path} is none: leave it out"
        )


def _npz(path: Path, notes: list[str]) -> Arrays:
    del notes
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except ValueError:
        # NumPy's own message tells how to run the code in a file.
        raise ValueError("it is no archive of plain arrays") from None


def _safetensors(path: Path, notes: list[str]) -> Arrays:
    """The length of the header (8 bytes), the header as JSON, the bytes of all tensors."""
    del notes
    content = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content):
        raise ValueError("its header is cut off")
    header = json.loads(bytes(content[8:start]))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(
                f"{name} in {path} is {entry['dtype']}, which is not read: save it in one of"
                f" {', '.join(_SAFETENSORS_DTYPES)}"
            )
        if not 0 <= first <= last <= len(content) - start:
            raise ValueError(f"{name} lies outside of the file")
        flat = np.frombuffer(content[start + first : start + last], dtype)
        if any(n < 0 for n in entry["shape"]):
            raise ValueError(f"{name} has the shape {entry['shape']}")
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


def safetensors(arrays: Arrays) -> bytes:
    """Returns `{name: array}` as the content of a .safetensors file."""
    dtypes = {np.dtype(t): n for n, t in _SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers asks for one
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": dtypes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    parts = [len(text).to_bytes(8, "little"), text]
    parts += [np.ascontiguousarray(array).tobytes() for array in arrays.values()]
    return b"".join(parts)


def write_safetensors(path: str | Path, arrays: Arrays) -> None:
    """Writes `{name: array}` as a .safetensors file, whole or not at all."""
    atomic.write(path, safetensors(arrays))


_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict")
_WRAPPERS += ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "module")
# What wrappers of a network put before each name.
_PREFIXES = {
    "module.": "data-parallel training or an averaged model",
    "_orig_mod.": "torch.compile",
    "model.": "a module around the network, such as Lightning's",
}
_AVERAGED = "n_averaged"  # torch's AveragedModel counts its updates
_WANTED = "it should be what a network's state_dict() gives; save that alone"


def _torch(path: Path, notes: list[str], key: str) -> Arrays:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"reading {path} needs PyTorch: install it, or save the weights as .npz or .safetensors"
        ) from None
    try:
        with warnings.catch_warnings():  # of pickles that it then refuses
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its own errors are of many kinds
        # Some messages tell how to run the code in a file.
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise ValueError(
                "it is no checkpoint of tensors alone, and code in one is not run"
            ) from None
        raise ValueError(error) from error
    if key:
        state = _part(state, key, path, notes)
    state = _unwrapped(state, notes)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}: {_WANTED}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise UserError(f"{path} holds {name!r}, which is no tensor: {_WANTED}")
        if value.untyped_storage().nbytes() < value.nbytes:
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} is not stored whole"
            )
    return {
        name: (value.float() if value.is_floating_point() else value).detach().numpy()
        for name, value in state.items()
    }


def _part(state: Any, key: str, path: Path, notes: list[str]) -> Any:
    """Returns the part of a checkpoint that a key names, and notes what is left out."""
    parts = state if isinstance(state, dict) else {}
    parts = [str(k) for k, part in parts.items() if isinstance(part, dict)]
    if key not in parts:
        there = f"there is {', '.join(parts)}" if parts else "leave it out"
        raise UserError(f"config.init.key = {key!r}: {path} has no such part: {there}")
    _note(state, key, notes)
    return state[key]


def _note(state: Mapping[str, Any], key: str, notes: list[str]) -> None:
    others = [str(other) for other in state if other != key]
    left = f"; {', '.join(others)} left out" if others else ""
    rivals = [k for k in _WRAPPERS if k != key and isinstance(state.get(k), dict)]
    choice = f" (config.init.key = {rivals[0]!r} takes that)" if rivals else ""
    notes.append(f"the weights are the checkpoint's {key!r}{left}{choice}")


def _unwrapped(state: Any, notes: list[str]) -> Any:
    """Returns the weights inside of a training checkpoint, and notes what they were in and what is left out."""
    while isinstance(state, dict):
        wrappers = [k for k in _WRAPPERS if isinstance(state.get(k), dict)]
        if not wrappers:
            break
        _note(state, wrappers[0], notes)
        state = state[wrappers[0]]
    return state


def unprefixed(arrays: Arrays) -> tuple[Arrays, list[str]]:
    """Removes the prefixes that wrappers of a network put before all names, and returns a line for each.

    Args:
      arrays: {name: array}, such as {"module.conv1.weight": …}.
    """
    lines, changed = [], True
    if any(name.startswith("module.") for name in arrays) and _AVERAGED in arrays:
        arrays = {k: v for k, v in arrays.items() if k != _AVERAGED}
        lines.append(f"the weights are an average over updates; {_AVERAGED} left out")
    while changed and arrays:
        changed = False
        for prefix, origin in _PREFIXES.items():
            if all(name.startswith(prefix) for name in arrays):
                arrays = {k.removeprefix(prefix): v for k, v in arrays.items()}
                lines.append(f"names without {prefix!r} of {origin}")
                changed = True
    # torch.compile of a part of a network puts its prefix inside of names.
    inside = "._orig_mod."
    if any(inside in name for name in arrays):
        arrays = {k.replace(inside, "."): v for k, v in arrays.items()}
        lines.append("names without '_orig_mod.' of torch.compile")
    return arrays, lines


_READERS: dict[str, Callable[..., Arrays]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
    ".bin": _torch,
    ".h5": keras.hdf5,
    ".keras": keras.archive,
}
