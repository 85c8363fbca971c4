"""The library inside the package ai-edge-litert, through its C interface: a network with the runtime's profiler.

Types and functions are those of LiteRT's headers litert_compiled_model.h, litert_tensor_buffer.h and litert_profiler.h at
`VERSION`; other versions declare some of them differently, so no other is called. A wrong call ends the process: use it in
one of its own.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax.errors import UserError

VERSION = "2.3.0"  # of ai-edge-litert
CPU = 1  # of the accelerators
INSIDE = 8  # type of an event: an operator inside a delegate
OPERATOR = 2  # type of an event: an operator of the file, or a delegate as a whole
DELEGATE = "TfLite"  # how names of delegates begin
READ, WRITE = 0, 1


class _Event(ctypes.Structure):
    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory", ctypes.c_int64 * 6),  # before and after
        ("index", ctypes.c_uint64),
        ("subgraph", ctypes.c_uint64),
        ("source", ctypes.c_int32),
    )


class Network:
    """A `.tflite` file opened in LiteRT with its profiler; it lives as its process.

    Args:
      path: the file.
      signature: position of the signature to run. A file without signatures has one, with the names of its tensors.

    Attributes:
      inputs, outputs: their names, in the signature's order; without one in the file's.

    Raises:
      UserError: ai-edge-litert of another version, or without its library.
      RuntimeError: a call is refused.
    """

    def __init__(self, path: Path, signature: int = 0):
        self._signature = ctypes.c_size_t(signature)
        self._loaded = ctypes.CDLL(str(library()))
        self._kept: list[Any] = []  # what the library still points to
        environment, model = self._new(), self._new()
        self._call("CreateEnvironment", 0, None, ctypes.byref(environment))
        name = ctypes.c_char_p(os.fsencode(path))
        self._call("CreateModelFromFile", environment, name, ctypes.byref(model))
        self._compiled, self._profiler = self._new(), self._new()
        self._call(
            "CreateCompiledModel",
            *(environment, model, self._options(), ctypes.byref(self._compiled)),
        )
        self._call(
            "CompiledModelGetProfiler", self._compiled, ctypes.byref(self._profiler)
        )
        if not self._profiler:
            raise RuntimeError("LiteRT gave no profiler")
        signature = self._new()
        self._call("GetModelSignature", model, self._signature, ctypes.byref(signature))

        self.inputs = self._names(signature, "Input")
        self.outputs = self._names(signature, "Output")
        self._inputs, self._outputs = (
            (ctypes.c_void_p * len(names))(
                *(
                    self._buffer(environment, signature, side, i)
                    for i in range(len(names))
                )
            )
            for side, names in (("Input", self.inputs), ("Output", self.outputs))
        )

    def run(self) -> None:
        """Runs it once."""
        self._call(
            "RunCompiledModel",
            *(self._compiled, self._signature),
            *(ctypes.c_size_t(len(self._inputs)), self._inputs),
            *(ctypes.c_size_t(len(self._outputs)), self._outputs),
        )

    def write(self, position: int, values: np.ndarray) -> None:
        """Copies an input in, of the dtype and size that it has in the file; `position` is in `inputs`."""
        values = np.ascontiguousarray(values)
        buffer = self._inputs[position]
        self._locked(buffer, WRITE, values.nbytes, values.ctypes.data)

    def read(self, position: int, shape, dtype) -> np.ndarray:
        """Returns a copy of an output; `position` is in `outputs`."""
        values = np.empty(shape, dtype)
        buffer = self._outputs[position]
        self._locked(buffer, READ, values.nbytes, values.ctypes.data)
        return values

    def start(self) -> None:
        """Has the profiler record from now on."""
        self._call("StartProfiler", self._profiler)

    def events(self) -> list[tuple[str, int | None, int]]:
        """Takes (name, index in the file or None, µs) of each operator since the last call, in order.

        An operator inside a delegate has no index; a delegate as a whole is left out.
        """
        count = ctypes.c_int()
        self._call("GetNumProfilerEvents", self._profiler, ctypes.byref(count))
        events = (_Event * count.value)()
        if count.value:  # of none it would be refused
            self._call("GetProfilerEvents", self._profiler, count, events)
        found = []
        for event in events:
            name = (event.tag or b"").decode(errors="replace")
            if event.type == INSIDE:
                name = name.removeprefix("Delegate/")
                found.append((name, None, event.elapsed_us))
            elif event.type == OPERATOR and not name.startswith(DELEGATE):
                index = None if event.subgraph else event.index  # of a loop's body
                found.append((name, index, event.elapsed_us))
        self._call("ResetProfiler", self._profiler)
        self.start()  # a reset has stopped it
        return found

    def _options(self):
        """Options: on the CPU, with the profiler."""
        options, more = self._new(), self._new()
        self._call("CreateOptions", ctypes.byref(options))
        self._call("SetOptionsHardwareAccelerators", options, CPU)
        text = ctypes.create_string_buffer(b"enable_profiling = true\n")
        forget = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
        self._kept += [text, forget]
        kind = ctypes.c_char_p(b"runtime_options_string")
        self._call("CreateOpaqueOptions", kind, text, forget, ctypes.byref(more))
        self._call("AddOpaqueOptions", options, more)
        return options

    def _names(self, signature, side: str) -> list[str]:
        """The names of a signature's inputs or outputs, in its order."""
        count = ctypes.c_size_t()
        self._call(f"GetNumSignature{side}s", signature, ctypes.byref(count))
        found = []
        for i in range(count.value):
            name, at = ctypes.c_char_p(), ctypes.c_size_t(i)
            self._call(f"GetSignature{side}Name", signature, at, ctypes.byref(name))
            found.append((name.value or b"").decode())
        return found

    def _buffer(self, environment, signature, side: str, index: int):
        """Memory for an input or an output."""
        at = ctypes.c_size_t(index)
        tensor, needed, made = self._new(), self._new(), self._new()
        kind = ctypes.create_string_buffer(1024)  # more than a tensor's type takes
        self._call(
            f"GetSignature{side}TensorByIndex", signature, at, ctypes.byref(tensor)
        )
        self._call("GetRankedTensorType", tensor, kind)
        self._call(
            f"GetCompiledModel{side}BufferRequirements",
            *(self._compiled, self._signature, at, ctypes.byref(needed)),
        )
        self._call(
            "CreateManagedTensorBufferFromRequirements",
            *(environment, kind, needed, ctypes.byref(made)),
        )
        return made

    def _locked(self, buffer, mode: int, size: int, address: int) -> None:
        """Copies to or from a buffer."""
        buffer, there, bytes_there = ctypes.c_void_p(buffer), self._new(), self._size()
        self._call("GetTensorBufferPackedSize", buffer, ctypes.byref(bytes_there))
        if bytes_there.value != size:
            raise RuntimeError(f"a tensor has {bytes_there.value} bytes, not {size}")
        self._call("LockTensorBuffer", buffer, ctypes.byref(there), mode)
        target, source = (there, address) if mode == WRITE else (address, there)
        ctypes.memmove(target, source, size)
        self._call("UnlockTensorBuffer", buffer)

    def _call(self, name: str, *arguments) -> None:
        if status := getattr(self._loaded, f"LiteRt{name}")(*arguments):
            raise RuntimeError(f"LiteRt{name} returned the status {status}")

    def _new(self):
        return ctypes.c_void_p()

    def _size(self):
        return ctypes.c_size_t()


def library() -> Path:
    """The library of the one version whose interface is declared here."""
    try:
        version = importlib.metadata.version("ai-edge-litert")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != VERSION:
        raise UserError(
            f"operators are timed with ai-edge-litert {VERSION}, here is {version}: pip install ai-edge-litert=={VERSION}"
        )
    (folder,) = importlib.util.find_spec("ai_edge_litert").submodule_search_locations
    path = Path(folder, "libLiteRt.so")
    if not path.is_file():
        raise UserError("operators are timed on Linux alone: here is no libLiteRt.so")
    return path
