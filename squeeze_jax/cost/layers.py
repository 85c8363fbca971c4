"""Costs of each layer: parameters, MACs, bit operations, bytes moved and arithmetic intensity.

Counts the same operations as `count.macs`, under the same rules, and groups them by Linen module. So the columns add up to
the totals of `count.macs`.

**Bit operations**: BOPS = sum over MACs of b_w b_a, for weights of b_w bits and activations of b_a bits. In a product of
two activations both factors have b_a bits. This is the simple product of Bayesian Bits (van Baalen et al. 2020, arXiv
2005.07093) and of HAWQ-V3's tables (Yao et al. 2021, arXiv 2011.10680). UNIQ (Baskin et al. 2018, arXiv 1804.10969) adds
the accumulator, b_w b_a + b_w + b_a + log2(terms of a sum), and reports larger numbers: compare only counts under one
definition.

**Bytes**: each counted operation reads its inputs and weights once and writes its outputs once, as if no cache kept
anything between operations. Bias, normalisation and activations are fused into it. Intensity, in MACs per byte, tells
whether memory or arithmetic limits a layer: below the device's ratio of MACs/s to bytes/s, memory does (Williams et al.
2009, the roofline).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from squeeze_jax import tree
from squeeze_jax.cost import call, count, program
from squeeze_jax.cost.program import Value
from squeeze_jax.errors import UserError

FLOAT = 32  # bits of a parameter that matches no rule


class Layer(NamedTuple):
    """The cost of a layer, excluding the layers inside it.

    Attributes:
      name: path of the module, such as "fire2/squeeze1x1".
      parameters: number of trainable parameters.
      macs: multiply-accumulates.
      bops: bit operations.
      bytes: bytes that the operations counted in `macs` read and write.
    """

    name: str
    parameters: int = 0
    macs: int = 0
    bops: int = 0
    bytes: int = 0

    @property
    def intensity(self) -> float:
        """MACs per byte; 0 if the layer moves no bytes."""
        return self.macs / self.bytes if self.bytes else 0.0


def layers(
    fn: Callable | nn.Module,
    *args,
    weight_bits: int | tree.Rules = 8,
    activation_bits: int = 8,
    weight_argnums: int | Sequence[int] = (),
    **kwargs,
) -> tuple[Layer, ...]:
    """Counts the costs of each layer of `fn(*args, **kwargs)` without running it.

    Args:
      fn: any function that JAX can trace; arrays that it closes over are weights. For a Linen module the forward pass is
        counted, and layers are named as its parameters are. Only a Linen module has parameters.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s; for a module the arguments after the variables.
        Arguments without any array, such as `train=False`, are static.
      weight_bits: bits of all weights; or ordered (regex, bits) rules over parameter names, of which the first match
        decides. A parameter that matches no rule has 32 bits.
      activation_bits: bits of floating-point activations.
      weight_argnums: positions of a function's arguments that are weights.

    Returns:
      The layers that have parameters or MACs, in order of use.

    Raises:
      UserError: bits are not an integer from 1 to 64, a rule matches no parameter, rules are given for a function that is no
        Linen module, or the arguments do not fit the function.
    """
    program.check_bits(activation_bits, "activation_bits")
    params = {}
    if isinstance(fn, nn.Module):
        params = tree.flatten(
            call.variable_shapes(fn, *args, **kwargs).get("params", {})
        )
    bits = _bits(weight_bits, params, isinstance(fn, nn.Module))

    def width(v):
        return _width(v, bits, activation_bits)

    traced = program.trace(fn, *args, weight_argnums=weight_argnums, **kwargs)
    rows = {op.layer: Layer(op.layer) for op in traced.operations}
    for op, times, macs in program.executions(
        traced, lambda op: count.operation_macs(op) * op.devices
    ):
        if op.name in count.PRODUCTS and macs:
            row = rows.get(op.layer, Layer(op.layer))
            left, right = op.inputs
            moved_bytes = sum(v.nbytes(width(v)) for v in (left, right, *op.outputs))
            rows[op.layer] = row._replace(
                macs=row.macs + times * macs,
                bops=row.bops + times * macs * width(left) * width(right),
                bytes=row.bytes + times * op.devices * moved_bytes,
            )
    for name, leaf in params.items():
        layer = name.rpartition("/")[0] or program.root(fn)
        row = rows.get(layer, Layer(layer))
        rows[layer] = row._replace(parameters=row.parameters + leaf.size)
    return tuple(r for r in rows.values() if r.macs or r.parameters)


def total(rows: tuple[Layer, ...]) -> Layer:
    """Returns a layer named "total" with the summed costs of all layers."""
    columns = list(zip(*rows, strict=True))[1:] if rows else []
    return Layer("total", *map(sum, columns))


def _bits(weight_bits: Any, params: dict, module: bool) -> dict[str, int]:
    """Returns {parameter name: bits}; the key "" holds the bits of weights that are no parameters."""
    if isinstance(weight_bits, str) or not hasattr(weight_bits, "__iter__"):
        bits = program.check_bits(weight_bits, "weight_bits")
        return dict.fromkeys(params, bits) | {"": bits}
    if not module:
        raise UserError(
            "weight_bits: rules match names of parameters, which only a Linen module has; give one number of bits"
        )
    rules = [tuple(r) if isinstance(r, list) else r for r in weight_bits]
    bits_by_name = tree.apply_rules(rules, params, default=FLOAT, where="weight_bits")
    for pattern, bits in rules:
        program.check_bits(bits, f"weight_bits of {pattern!r}")
    return bits_by_name | {"": FLOAT}


def _width(v: Value, bits: dict[str, int], activation_bits: int) -> int:
    """Returns the bits of one element of a value.

    Weights computed from several parameters have the bits of the widest; weights without a parameter those under "".
    """
    if v.weights is None:
        return activation_bits
    names = (name.removeprefix("params/") for name in v.weights)
    return max((bits[n] for n in names if n in bits), default=bits[""])
