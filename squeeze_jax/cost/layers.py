"""What each layer costs: parameters, MACs, bit operations, bytes moved and arithmetic intensity.

The operations that `count.macs` counts, by its rules, grouped by Linen module; so the columns add up to its totals.

**Bit operations**: BOPS = sum over MACs of b_w b_a, for weights of b_w and activations of b_a bits; in a product of two
activations both have b_a. This is the simple product of Bayesian Bits (van Baalen et al. 2020, arXiv 2005.07093) and
of HAWQ-V3's tables (Yao et al. 2021, arXiv 2011.10680). UNIQ (Baskin et al. 2018, arXiv 1804.10969) adds the
accumulator, b_w b_a + b_w + b_a + log2(terms of a sum), and has larger numbers: compare only counts of one definition.

**Bytes**: each counted operation reads its inputs and weights and writes its outputs once, as where nothing stays in a
cache from one operation to the next; bias, normalisation and activations join it. Intensity, in MACs a byte, tells
what bounds a layer: below the device's MACs a second / bytes a second it is its memory (Williams et al. 2009, the
roofline).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from squeeze_jax import tree
from squeeze_jax.cost import call, count, program
from squeeze_jax.cost.program import Value
from squeeze_jax.errors import UserError

FLOAT = 32  # bits of a parameter that no rule matches


class Layer(NamedTuple):
    """The cost of a layer, without that of the layers in it.

    Attributes:
      name: of the module, such as "fire2/squeeze1x1".
      parameters: trainable ones.
      macs: multiply-accumulates.
      bops: bit operations.
      bytes: read and written by what is counted in `macs`.
    """

    name: str
    parameters: int = 0
    macs: int = 0
    bops: int = 0
    bytes: int = 0

    @property
    def intensity(self) -> float:
        """MACs a byte; 0 where nothing is counted."""
        return self.macs / self.bytes if self.bytes else 0.0


def layers(
    fn: Callable | nn.Module,
    *args,
    weight_bits: int | tree.Rules = 8,
    activation_bits: int = 8,
    weight_argnums: int | Sequence[int] = (),
    **kwargs,
) -> tuple[Layer, ...]:
    """Counts what each layer of `fn(*args, **kwargs)` costs, without running it.

    Args:
      fn: any function that JAX can trace; what it closes over are weights. Of a Linen module it is the forward pass,
        and layers are named as its parameters are; only a module has parameters.
      *args, **kwargs: pytrees of arrays or `jax.ShapeDtypeStruct`s; for a module what follows the variables. Arguments
        without any array, such as `train=False`, are static.
      weight_bits: of all weights; or ordered (regex, bits) rules over parameter names, the first that matches decides,
        32 where none does.
      activation_bits: of floating-point activations.
      weight_argnums: positions of the arguments of a function that are weights.

    Returns:
      The layers that have parameters or MACs, in order of use.

    Raises:
      UserError: bits that are no integer from 1 to 64, a rule that matches no parameter, rules without a module, or
        arguments that do not fit the function.
    """
    program.check_bits(activation_bits, "activation_bits")
    params = {}
    if isinstance(fn, nn.Module):
        params = tree.flatten(call.variables(fn, *args, **kwargs).get("params", {}))
    bits = _bits(weight_bits, params, isinstance(fn, nn.Module))

    def wide(v):
        return _width(v, bits, activation_bits)

    traced = program.trace(fn, *args, weight_argnums=weight_argnums, **kwargs)
    rows = {op.layer: Layer(op.layer) for op in traced.operations}
    for op, times, macs in program.runs(
        traced, lambda op: count.operation_macs(op) * op.devices
    ):
        if op.name in count.PRODUCTS and macs:
            row = rows.get(op.layer, Layer(op.layer))
            left, right = op.inputs
            moved = sum(v.nbytes(wide(v)) for v in (left, right, *op.outputs))
            rows[op.layer] = row._replace(
                macs=row.macs + times * macs,
                bops=row.bops + times * macs * wide(left) * wide(right),
                bytes=row.bytes + times * op.devices * moved,
            )
    for name, leaf in params.items():
        layer = name.rpartition("/")[0] or program.root(fn)
        row = rows.get(layer, Layer(layer))
        rows[layer] = row._replace(parameters=row.parameters + leaf.size)
    return tuple(r for r in rows.values() if r.macs or r.parameters)


def total(rows: tuple[Layer, ...]) -> Layer:
    """The sum of layers."""
    columns = list(zip(*rows, strict=True))[1:] if rows else []
    return Layer("total", *map(sum, columns))


def _bits(weight_bits: Any, params: dict, module: bool) -> dict[str, int]:
    """{parameter's name: its bits}, and under "" those of other weights."""
    if isinstance(weight_bits, str) or not hasattr(weight_bits, "__iter__"):
        bits = program.check_bits(weight_bits, "weight_bits")
        return dict.fromkeys(params, bits) | {"": bits}
    if not module:
        raise UserError(
            "weight_bits: rules go by the names of parameters, which only a Linen module has; give one number of bits"
        )
    rules = [tuple(r) if isinstance(r, list) else r for r in weight_bits]
    found = tree.apply_rules(rules, params, default=FLOAT, where="weight_bits")
    for pattern, bits in rules:
        program.check_bits(bits, f"weight_bits of {pattern!r}")
    return found | {"": FLOAT}


def _width(v: Value, bits: dict[str, int], activation_bits: int) -> int:
    """Bits of a number: of weights made of several parameters the most, of other weights those under ""."""
    if v.weights is None:
        return activation_bits
    names = (name.removeprefix("params/") for name in v.weights)
    return max((bits[n] for n in names if n in bits), default=bits[""])
