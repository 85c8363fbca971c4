"""Reads named arrays from the weight files of other frameworks: npz, safetensors, PyTorch and Keras checkpoints."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from squeeze_jax import files
from squeeze_jax.errors import UserError, message_of
from squeeze_jax.weights import keras

Arrays = dict[str, np.ndarray]
# Start of the pointer that Git LFS leaves in a clone in place of a large file.
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
    """Reads `{name: array}` from a file. Its suffix determines the format: .npz, .safetensors, .pt, .pth, .bin, .h5, .keras.

    Args:
      path: the file.
      notes: a list that receives a line for each part that was unwrapped or omitted, such as an optimizer's state, and for
        each floating-point dtype other than float32.
      key: the part of a PyTorch checkpoint that holds the weights, such as "model_ema"; "" for the first suitable part.

    Raises:
      UserError: the file is missing, damaged, a Git LFS pointer, of an unknown format, or a checkpoint that does not map names
        to tensors. The message names the file.
    """
    path = files.path(path)
    check(path, key=key)
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"weights file {path} is a pointer of Git LFS, not the weights: run git lfs pull where it was cloned"
                )
        notes = [] if notes is None else notes
        reader = _READERS[files.suffix(path)]
        arrays = (
            reader(path, notes, key) if reader is _read_torch else reader(path, notes)
        )
    except UserError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,  # a header with wrong types
        AttributeError,  # likewise
        EOFError,
        OSError,
        MemoryError,  # a shape larger than any memory
        RecursionError,  # a header with a thousand nested brackets
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"weights file {path} is damaged ({message_of(error)}): fetch it again"
        ) from error
    notes += describe_casts(arrays)
    return arrays


def describe_casts(arrays: Arrays) -> list[str]:
    """Returns a line about the arrays of each floating-point dtype that networks cast to float32."""
    dtypes = [str(a.dtype) for a in arrays.values() if a.dtype.kind in "fV"]
    return [
        f"{dtypes.count(dtype)} arrays of {dtype} are cast to float32"
        for dtype in dict.fromkeys(dtypes)
        if dtype != "float32"
    ]


def is_known(path: Path) -> bool:
    """Returns whether a file of this name has a format that `read` reads."""
    return files.suffix(path) in _READERS


def check(path: str | Path, *, key: str = "") -> None:
    """Raises a UserError if a file is missing or of an unknown format, or if a key is given for a format without parts."""
    path = files.path(path)
    if not is_known(path):
        raise UserError(
            f"weights {path} have an unknown ending: use {', '.join(_READERS)}"
        )
    if not path.is_file():
        raise UserError(f"no weights file {path}: check the path")
    if key and _READERS[files.suffix(path)] is not _read_torch:
        raise UserError(
            f"config.init.key = {key!r}: only PyTorch's checkpoints have parts, and {path} is none: leave it out"
        )


def _read_npz(path: Path, notes: list[str]) -> Arrays:
    del notes
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except ValueError:
        # NumPy's own message explains how to run the code in a file.
        raise ValueError("it is no archive of plain arrays") from None


def _read_safetensors(path: Path, notes: list[str]) -> Arrays:
    """Reads a .safetensors file: the length of the header (8 bytes), the header as JSON, the bytes of all tensors."""
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


def to_safetensors(arrays: Arrays) -> bytes:
    """Returns `{name: array}` as the content of a .safetensors file."""
    dtypes = {np.dtype(t): n for n, t in _SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers requires it
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": dtypes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    parts = [len(text).to_bytes(8, "little"), text]
    parts += [np.ascontiguousarray(array).tobytes() for array in arrays.values()]
    return b"".join(parts)


def write_safetensors(path: str | Path, arrays: Arrays) -> None:
    """Writes `{name: array}` as a .safetensors file, atomically."""
    files.write(path, to_safetensors(arrays))


# Keys of a checkpoint under which training scripts store the weights.
_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict")
_WRAPPERS += ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "module")
# {prefix that a wrapper of a network adds to each name: the wrapper}.
_PREFIXES = {
    "module.": "data-parallel training or an averaged model",
    "_orig_mod.": "torch.compile",
    "model.": "a module around the network, such as Lightning's",
}
_AVERAGED = "n_averaged"  # torch's AveragedModel counts its updates
_EXPECTED = "it should be what a network's state_dict() gives; save that alone"


def _read_torch(path: Path, notes: list[str], key: str) -> Arrays:
    """Reads a PyTorch checkpoint without running any code in it."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"reading {path} needs PyTorch: install it, or save the weights as .npz or .safetensors"
        ) from None
    try:
        with warnings.catch_warnings():  # about pickles that it then rejects
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds of errors
        _raise_for_objects(path, str(error))
        # Some messages explain how to run the code in a file.
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            raise ValueError(
                "it is no checkpoint of tensors alone, and code in one is not run"
            ) from None
        raise ValueError(error) from error
    if key:
        state = _select_part(state, key, path, notes)
    state = _unwrap(state, notes)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}: {_EXPECTED}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise UserError(f"{path} holds {name!r}, which is no tensor: {_EXPECTED}")
        if value.untyped_storage().nbytes() < value.nbytes:
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} is not stored whole"
            )
    return {name: _to_numpy(value.detach()) for name, value in state.items()}


def _raise_for_objects(path: Path, message: str) -> None:
    """Raises a UserError if PyTorch's error says that a file holds an object or a program in place of tensors."""
    if "TorchScript" in message:
        raise UserError(
            f"{path} holds a TorchScript program, and code in a file is not run: save torch.jit.load(…).state_dict() by"
            " torch.save"
        )
    if found := re.search(
        r"[Uu]nsupported (?:global|class|GLOBAL)\W*(?:GLOBAL )?([\w.]+)", message
    ):
        raise UserError(
            f"{path} holds a pickled {found[1]}, and code in a file is not run: load it in PyTorch, and save the tensors alone"
            " by torch.save(net.state_dict(), …)"
        )


def _to_numpy(tensor) -> np.ndarray:
    """Returns a PyTorch tensor as an array of the same dtype; floats that NumPy lacks become float32."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    numpy_has = tensor.dtype in (torch.float16, torch.float32, torch.float64)
    if tensor.is_floating_point() and not numpy_has:
        tensor = tensor.float()
    return tensor.numpy()


def _select_part(state: Any, key: str, path: Path, notes: list[str]) -> Any:
    """Returns the part of a checkpoint with a key, and notes the omitted parts."""
    parts = state if isinstance(state, dict) else {}
    parts = [str(k) for k, part in parts.items() if isinstance(part, dict)]
    if key not in parts:
        advice = f"there is {', '.join(parts)}" if parts else "leave it out"
        raise UserError(f"config.init.key = {key!r}: {path} has no such part: {advice}")
    _note_selection(state, key, notes)
    return state[key]


def _note_selection(state: Mapping[str, Any], key: str, notes: list[str]) -> None:
    """Notes which part of a checkpoint was read, which were omitted, and how to read another part with weights."""
    others = [str(other) for other in state if other != key]
    omitted = f"; {', '.join(others)} left out" if others else ""
    alternatives = [k for k in _WRAPPERS if k != key and isinstance(state.get(k), dict)]
    advice = (
        f" (config.init.key = {alternatives[0]!r} takes that)" if alternatives else ""
    )
    notes.append(f"the weights are the checkpoint's {key!r}{omitted}{advice}")


def _unwrap(state: Any, notes: list[str]) -> Any:
    """Returns the weights inside a training checkpoint, and notes which parts they were in and which were omitted."""
    while isinstance(state, dict):
        wrappers = [k for k in _WRAPPERS if isinstance(state.get(k), dict)]
        if not wrappers:
            break
        _note_selection(state, wrappers[0], notes)
        state = state[wrappers[0]]
    return state


def remove_prefixes(arrays: Arrays) -> tuple[Arrays, list[str]]:
    """Removes the prefixes that wrappers of a network add to all names.

    Args:
      arrays: {name: array}, such as {"module.conv1.weight": …}.

    Returns:
      ({name without prefixes: array}, a line about each removed prefix).
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
    # If only a part of a network was compiled, the prefix of torch.compile is inside the names.
    infix = "._orig_mod."
    if any(infix in name for name in arrays):
        arrays = {k.replace(infix, "."): v for k, v in arrays.items()}
        lines.append("names without '_orig_mod.' of torch.compile")
    return arrays, lines


_READERS: dict[str, Callable[..., Arrays]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".h5": keras.read_hdf5,
    ".keras": keras.read_archive,
}
