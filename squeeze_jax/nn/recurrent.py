"""Long short-term memory: a recurrent layer that computes the input products of all time steps at once.

Hochreiter, Schmidhuber 1997, "Long Short-Term Memory", in the form of Zaremba, Sutskever, Vinyals, arXiv 1409.2329, section 3.1:

    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the four parts of a_t = x_t W + h_{t-1} U + b
    c_t = f c_{t-1} + i g        h_t = o tanh(c_t)

Only the product with U depends on the step before. So x W + b is one matrix product over all steps, and the scan contains
nothing but h U and the gates. In the gradient, too, the product for U is one over all steps: a scan that JAX differentiates
would add to an array as large as U at each step.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import varying
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.intercept import tap
from squeeze_jax.nn.reshaped import features

Carry = dict[str, jax.Array]  # {"hidden": [b, d], "cell": [b, d]}, float32


class LSTM(nn.Module):
    """One layer of long short-term memory, over sequences [b, l, c].

    Parameters hold the gates in PyTorch's order i, f, g, o, side by side:

        kernel [c, 4 d]              `weight_ih_l0` transposed
        recurrent_kernel [d, 4 d]    `weight_hh_l0` transposed
        bias [4 d]                   `bias_ih_l0 + bias_hh_l0`

    The inputs, both kernels and the outputs pass through taps; see `nn/intercept.py`. The hidden states inside the loop do
    not. The gates and the carried state are float32. The gradient can be differentiated again in reverse mode only.

    Attributes:
      features: d, the size of the hidden state and of the cell.
      fixed: whether an enclosing `Reshaped` may not change it.
      kernel_init: initializer of both kernels.
      bias_init: initializer of the bias.
    """

    features: int
    fixed: bool = False
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, x: jax.Array, carry: Carry | None = None
    ) -> tuple[jax.Array, Carry]:
        """Returns the hidden states of all steps, and the state after the last.

        Args:
          x: [b, l, c].
          carry: the state before the first step; None for zeros.

        Returns:
          Hidden states [b, l, d] in the dtype of `x`, float32 for integers, and the carry.
        """
        x = as_float(x)
        size = features(self, self.features, fixed=self.fixed)
        shapes = {
            "kernel": (x.shape[-1], 4 * size),
            "recurrent_kernel": (size, 4 * size),
        }
        kernels = {
            name: self.param(name, self.kernel_init, shape, jnp.float32)
            for name, shape in shapes.items()
        }
        bias = self.param("bias", self.bias_init, (4 * size,), jnp.float32)
        kernel, recurrent = (
            tap(self, k, w.astype(x.dtype)) for k, w in kernels.items()
        )
        steps = jnp.swapaxes(tap(self, "inputs", x), 0, 1)
        products = jnp.matmul(steps, kernel, preferred_element_type=jnp.float32) + bias
        # Inside `shard_map` all operands of the loop must vary over the same devices.
        carry = jax.tree.map(
            lambda a: varying.like(a, x),
            initial_carry(x.shape[0], size) if carry is None else carry,
        )
        recurrent = varying.like(recurrent, products)
        hidden, last, cell = recurrence(
            products, recurrent, carry["hidden"], carry["cell"]
        )
        outputs = jnp.swapaxes(hidden, 0, 1).astype(x.dtype)
        return tap(self, "outputs", outputs), {"hidden": last, "cell": cell}


def initial_carry(rows: int, size: int) -> Carry:
    """Returns the zeros that sequences begin with: hidden state and cell, float32 [rows, size] each."""
    # Two arrays: a step that donates its state cannot donate one array twice.
    return {name: jnp.zeros((rows, size), jnp.float32) for name in ("hidden", "cell")}


@jax.custom_vjp
def recurrence(
    products: jax.Array, recurrent: jax.Array, hidden: jax.Array, cell: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the steps that depend on each other.

    Args:
      products: x W + b of all steps, [l, b, 4 d], float32.
      recurrent: U, [d, 4 d]; its dtype is that of the product h U.
      hidden, cell: the state before the first step, [b, d], float32.

    Returns:
      The hidden states [l, b, d]; the last one and the last cell [b, d].
    """

    def step(state, product):
        state, _ = _step(recurrent, state, product)
        return state, state[0]

    (last, cell), outputs = _scan(step, (hidden, cell), products)
    return outputs, last, cell


def _step(recurrent, state, product):
    """One time step: the next state (h, c), and the gates i, f, g, o."""
    hidden, cell = state
    a = product + jnp.matmul(
        hidden.astype(recurrent.dtype), recurrent, preferred_element_type=jnp.float32
    )
    i, f, g, o = jnp.split(a, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    cell = f * cell + i * g
    return (o * jnp.tanh(cell), cell), (i, f, g, o)


def _forward(products, recurrent, hidden, cell):
    def step(state, product):
        after, gates = _step(recurrent, state, product)
        return after, (*after, gates)

    (last, end), (outputs, cells, gates) = _scan(step, (hidden, cell), products)
    before = jnp.concatenate([hidden[None], outputs[:-1]])
    cells_before = jnp.concatenate([cell[None], cells[:-1]])
    return (outputs, last, end), (recurrent, before, cells_before, cells, gates)


def _backward(kept, cotangents):
    recurrent, before, cells_before, cells, gates = kept
    outputs_bar, last_bar, end_bar = cotangents
    transposed = recurrent.T

    def step(bars, at):
        hidden_bar, cell_bar = bars
        output_bar, cell_before, cell, (i, f, g, o) = at
        hidden_bar = hidden_bar + output_bar
        squashed = jnp.tanh(cell)
        cell_bar = cell_bar + hidden_bar * o * (1 - squashed**2)
        gate_bars = (
            cell_bar * g * i * (1 - i),
            cell_bar * cell_before * f * (1 - f),
            cell_bar * i * (1 - g**2),
            hidden_bar * squashed * o * (1 - o),
        )
        a_bar = jnp.concatenate(gate_bars, axis=-1)
        hidden_bar = jnp.matmul(
            a_bar.astype(transposed.dtype),
            transposed,
            preferred_element_type=jnp.float32,
        )
        return (hidden_bar, cell_bar * f), a_bar

    (hidden_bar, cell_bar), products_bar = _scan(
        step,
        (last_bar, end_bar),
        (outputs_bar, cells_before, cells, gates),
        reverse=True,
    )
    recurrent_bar = jnp.einsum(
        "lbd,lbe->de", before, products_bar, preferred_element_type=jnp.float32
    )
    return products_bar, recurrent_bar.astype(recurrent.dtype), hidden_bar, cell_bar


recurrence.defvjp(_forward, _backward)


def _scan(step, state, over, reverse=False):
    # Longer turns of the loop were not faster on a CPU: 1 to 35 steps, at 200 and 650 features.
    return lax.scan(step, state, over, reverse=reverse)
