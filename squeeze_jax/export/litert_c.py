"""Runs a network with the runtime's profiler, through the C interface of the library in the package ai-edge-litert.

Types and functions are those of LiteRT's headers litert_compiled_model.h, litert_tensor_buffer.h and litert_profiler.h at
`VERSION`. Other versions declare some of them differently, so only this version is called. A wrong call ends the process:
use it in a child process.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from squeeze_jax.errors import UserError

VERSION = "2.3.0"  # version of ai-edge-litert
CPU = 1  # accelerator
INSIDE = 8  # event type: an operator inside a delegate
OPERATOR = 2  # event type: an operator of the file, or a delegate as a whole
DELEGATE = "TfLite"  # prefix of delegate names
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
    """A `.tflite` file opened in LiteRT with its profiler. It stays open until its process ends.

    Args:
      path: the file.
      signature: position of the signature to run. For a file without signatures LiteRT creates one with the names of its
        tensors.

    Attributes:
      inputs, outputs: names of inputs and outputs, in the order of the signature; in the file's order without one.

    Raises:
      UserError: ai-edge-litert has another version or lacks its library.
      RuntimeError: LiteRT refused a call.
    """

    def __init__(self, path: Path, signature: int = 0):
        self._signature = ctypes.c_size_t(signature)
        self._loaded = ctypes.CDLL(str(library()))
        self._referenced: list[Any] = []  # objects that the library still points to
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
        """Runs the network once."""
        self._call(
            "RunCompiledModel",
            *(self._compiled, self._signature),
            *(ctypes.c_size_t(len(self._inputs)), self._inputs),
            *(ctypes.c_size_t(len(self._outputs)), self._outputs),
        )

    def write(self, position: int, values: np.ndarray) -> None:
        """Copies values to the input at `position` in `inputs`; they must have its dtype and size in the file."""
        values = np.ascontiguousarray(values)
        buffer = self._inputs[position]
        self._copy(buffer, WRITE, values.nbytes, values.ctypes.data)

    def read(self, position: int, shape, dtype) -> np.ndarray:
        """Returns a copy of the output at `position` in `outputs`."""
        values = np.empty(shape, dtype)
        buffer = self._outputs[position]
        self._copy(buffer, READ, values.nbytes, values.ctypes.data)
        return values

    def start_profiler(self) -> None:
        """Starts recording with the profiler."""
        self._call("StartProfiler", self._profiler)

    def events(self) -> list[tuple[str, int | None, int]]:
        """Returns (name, index in the file or None, µs) of each operator that ran since the last call, in order.

        An operator inside a delegate has no index. A delegate as a whole is omitted.
        """
        count = ctypes.c_int()
        self._call("GetNumProfilerEvents", self._profiler, ctypes.byref(count))
        events = (_Event * count.value)()
        if count.value:  # LiteRT refuses a call for no events
            self._call("GetProfilerEvents", self._profiler, count, events)
        operators = []
        for event in events:
            name = (event.tag or b"").decode(errors="replace")
            if event.type == INSIDE:
                name = name.removeprefix("Delegate/")
                operators.append((name, None, event.elapsed_us))
            elif event.type == OPERATOR and not name.startswith(DELEGATE):
                # The index of an operator in a loop's body is not one in the main graph.
                index = None if event.subgraph else event.index
                operators.append((name, index, event.elapsed_us))
        self._call("ResetProfiler", self._profiler)
        self.start_profiler()  # the reset has stopped it
        return operators

    def _options(self):
        """Creates the options to run on the CPU with the profiler."""
        options, runtime_options = self._new(), self._new()
        self._call("CreateOptions", ctypes.byref(options))
        self._call("SetOptionsHardwareAccelerators", options, CPU)
        text = ctypes.create_string_buffer(b"enable_profiling = true\n")
        deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
        self._referenced += [text, deleter]
        kind = ctypes.c_char_p(b"runtime_options_string")
        self._call(
            "CreateOpaqueOptions", kind, text, deleter, ctypes.byref(runtime_options)
        )
        self._call("AddOpaqueOptions", options, runtime_options)
        return options

    def _names(self, signature, side: str) -> list[str]:
        """Returns the names of a signature's inputs or outputs (side "Input" or "Output"), in its order."""
        count = ctypes.c_size_t()
        self._call(f"GetNumSignature{side}s", signature, ctypes.byref(count))
        names = []
        for i in range(count.value):
            name, position = ctypes.c_char_p(), ctypes.c_size_t(i)
            self._call(
                f"GetSignature{side}Name", signature, position, ctypes.byref(name)
            )
            names.append((name.value or b"").decode())
        return names

    def _buffer(self, environment, signature, side: str, index: int):
        """Allocates the buffer of an input or output (side "Input" or "Output")."""
        position = ctypes.c_size_t(index)
        tensor, requirements, buffer = self._new(), self._new(), self._new()
        tensor_type = ctypes.create_string_buffer(1024)  # larger than the type's struct
        self._call(
            f"GetSignature{side}TensorByIndex",
            signature,
            position,
            ctypes.byref(tensor),
        )
        self._call("GetRankedTensorType", tensor, tensor_type)
        self._call(
            f"GetCompiledModel{side}BufferRequirements",
            *(self._compiled, self._signature, position, ctypes.byref(requirements)),
        )
        self._call(
            "CreateManagedTensorBufferFromRequirements",
            *(environment, tensor_type, requirements, ctypes.byref(buffer)),
        )
        return buffer

    def _copy(self, buffer, mode: int, size: int, address: int) -> None:
        """Copies `size` bytes from a host address to a buffer (mode WRITE), or from the buffer to the address (READ)."""
        buffer, buffer_size = ctypes.c_void_p(buffer), self._size()
        self._call("GetTensorBufferPackedSize", buffer, ctypes.byref(buffer_size))
        if buffer_size.value != size:
            raise RuntimeError(f"a tensor has {buffer_size.value} bytes, not {size}")
        memory = self._new()
        self._call("LockTensorBuffer", buffer, ctypes.byref(memory), mode)
        target, source = (memory, address) if mode == WRITE else (address, memory)
        ctypes.memmove(target, source, size)
        self._call("UnlockTensorBuffer", buffer)

    def _call(self, name: str, *arguments) -> None:
        """Calls a function of the library; raises a RuntimeError unless it returns 0."""
        if status := getattr(self._loaded, f"LiteRt{name}")(*arguments):
            raise RuntimeError(f"LiteRt{name} returned the status {status}")

    def _new(self):
        return ctypes.c_void_p()

    def _size(self):
        return ctypes.c_size_t()


def library() -> Path:
    """Returns the path of the library, and checks that it has the version whose interface is declared here."""
    try:
        version = importlib.metadata.version("ai-edge-litert")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != VERSION:
        raise UserError(
            f"timing operators needs ai-edge-litert {VERSION}, but {version} is installed: pip install ai-edge-litert=={VERSION}"
        )
    (folder,) = importlib.util.find_spec("ai_edge_litert").submodule_search_locations
    path = Path(folder, "libLiteRt.so")
    if not path.is_file():
        raise UserError(
            "operators can be timed only on Linux: ai-edge-litert has no libLiteRt.so here"
        )
    return path
