"""Named arrays from other projects' weight files: npz, safetensors and PyTorch checkpoints."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from squeeze_jax.errors import UserError

Arrays = dict[str, np.ndarray]

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: str | Path) -> Arrays:
    """Reads `{name: array}` from a file; its ending (.npz, .safetensors, .pt, .pth, .bin) says of which kind it is.

    Raises:
      UserError: no such file, an unknown ending, or a damaged file; names the file.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise UserError(
            f"weights {path} have an unknown ending: use {', '.join(_READERS)}"
        )
    if not path.is_file():
        raise UserError(f"no weights file {path}: check the path")
    try:
        return _READERS[path.suffix](path)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"weights file {path} is damaged ({reason}): fetch it again"
        ) from error


def _npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _safetensors(path: Path) -> Arrays:
    """The length of the header (8 bytes), the header as JSON, the bytes of all tensors."""
    content = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        flat = np.frombuffer(
            content[start + first : start + last],
            _SAFETENSORS_DTYPES[entry["dtype"]],
        )
        arrays[name] = flat.reshape(entry["shape"])
    return arrays


def write_safetensors(path: str | Path, arrays: Arrays) -> None:
    """Writes `{name: array}` as a .safetensors file, whole or not at all."""
    path, dtypes = Path(path), {np.dtype(t): n for n, t in _SAFETENSORS_DTYPES.items()}
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
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with new.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
    new.replace(path)


def _torch(path: Path) -> Arrays:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"reading {path} needs PyTorch: install it, or save the weights as .npz or .safetensors"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its own errors are of many kinds
        raise ValueError(error) from error
    state = state.get("state_dict", state)
    return {
        name: value.float().numpy() if value.is_floating_point() else value.numpy()
        for name, value in state.items()
    }


_READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
    ".bin": _torch,
}
