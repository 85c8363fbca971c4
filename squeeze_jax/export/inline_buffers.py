"""Moves the weights of a TFLite file into the FlatBuffer, where every runtime reads them.

The quantizer writes the weights of files of 256 KiB and more behind the FlatBuffer. LiteRT reads them there. TensorFlow Lite Micro does
not: it takes such weights for activations, reserves memory for them, and computes with whatever this memory holds.
"""

import numpy as np

LARGEST = 2**31 - 2**20  # bytes of a FlatBuffer: its offsets are signed 32-bit numbers
ALIGNMENT = 16  # bytes, of weights


def inline_buffers(flatbuffer: bytes) -> bytes:
    """Returns the same file with all weights inside of the FlatBuffer; a file of 2 GB and more stays as it is."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    class Buffer(schema.BufferT):
        """Packs its data at once, and aligned."""

        def Pack(self, builder):
            builder.StartVector(1, len(self.data), ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data
            data = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, data)
            return schema.BufferEnd(builder)

    if len(flatbuffer) > LARGEST:
        return flatbuffer
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(flatbuffer))
    if not any(buffer.offset > 1 for buffer in model.buffers):
        return flatbuffer
    for number, buffer in enumerate(model.buffers):
        if buffer.offset > 1:
            data = flatbuffer[buffer.offset : buffer.offset + buffer.size]
        else:
            data = b"" if buffer.data is None else np.asarray(buffer.data).tobytes()
        if data:
            model.buffers[number] = Buffer(data)
    builder = flatbuffers.Builder(len(flatbuffer))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
