"""Named arrays from other projects' weight files: npz, safetensors and PyTorch and Keras checkpoints."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from squeeze_jax import files as atomic
from squeeze_jax.errors import UserError

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


def read(path: str | Path, notes: list[str] | None = None) -> Arrays:
    """Reads `{name: array}` from a file; its ending (.npz, .safetensors, .pt, .pth, .bin, .h5) says of which kind it is.

    Args:
      path: of the file.
      notes: gets a line for what was unwrapped, such as the weights of a training checkpoint.

    Raises:
      UserError: no such file, an unknown ending, a file that is damaged or was not fetched, or a checkpoint of something
        else than tensors by name; names the file.
    """
    path = atomic.path(path)
    check(path)
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"weights file {path} is a pointer of Git LFS, not the weights: run git lfs pull where it was cloned"
                )
        reader = _READERS[path.suffix]
        return reader(path, notes) if reader is _torch else reader(path)
    except UserError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,  # a header of other types than it should have
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


def check(path: str | Path) -> None:
    """Raises a UserError for a file that is not there, or whose ending is unknown."""
    path = atomic.path(path)
    if path.suffix not in _READERS:
        raise UserError(
            f"weights {path} have an unknown ending: use {', '.join(_READERS)}"
        )
    if not path.is_file():
        raise UserError(f"no weights file {path}: check the path")


def _npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except ValueError:
        # NumPy's own message tells how to run the code in a file.
        raise ValueError("it is no archive of plain arrays") from None


def _safetensors(path: Path) -> Arrays:
    """The length of the header (8 bytes), the header as JSON, the bytes of all tensors."""
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
_WRAPPERS += ("model_ema", "state_dict_ema", "module")
_WANTED = "it should be what a network's state_dict() gives; save that alone"


def _torch(path: Path, notes: list[str] | None = None) -> Arrays:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"reading {path} needs PyTorch: install it, or save the weights as .npz or .safetensors"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # Its own message tells how to run the code in a file.
        reason = "it is no checkpoint of tensors alone, and code in one is not run"
        raise ValueError(reason) from None
    except Exception as error:  # its own errors are of many kinds
        raise ValueError(error) from error
    state = _unwrapped(state, [] if notes is None else notes)
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


def _unwrapped(state: Any, notes: list[str]) -> Any:
    """Returns the weights inside of a training checkpoint, and notes what they were in and what is left out."""
    while isinstance(state, dict):
        wrappers = [k for k in _WRAPPERS if isinstance(state.get(k), dict)]
        if not wrappers:
            break
        others = [str(key) for key in state if key != wrappers[0]]
        left = f"; {', '.join(others)} left out" if others else ""
        notes.append(f"the weights are the checkpoint's {wrappers[0]!r}{left}")
        state = state[wrappers[0]]
    return state


def _hdf5(path: Path) -> Arrays:
    """Reads datasets by their path; Keras' legacy layout repeats a layer's name, and ends names in ":0"."""
    arrays = {}

    def collect(group, path):
        for key in group:
            name = f"{path}{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise ValueError(f"{name} is a link to another place")
            item = group[key]
            if isinstance(item, h5py.Group):
                collect(item, f"{name}/")
            elif item.external:
                raise ValueError(f"{name} lies in another file")
            elif item.size and not item.id.get_storage_size():
                raise ValueError(f"{name} of shape {item.shape} is not stored")
            else:
                arrays[name.removesuffix(":0")] = np.asarray(item)

    with h5py.File(path) as file:
        collect(file.get("model_weights", file), "")
    return {_once(name): array for name, array in arrays.items()}


def _once(name: str) -> str:
    """Removes a repeated first part: `conv1/conv1/kernel` becomes `conv1/kernel`."""
    first, _, rest = name.partition("/")
    return rest if rest.startswith(f"{first}/") else name


_READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
    ".bin": _torch,
    ".h5": _hdf5,
}
