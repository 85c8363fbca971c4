"""The LSTM (long short-term memory) layer, which computes the input products of all time steps at once.

Hochreiter, Schmidhuber 1997, "Long Short-Term Memory", in the form of Zaremba, Sutskever, Vinyals 2014, arXiv 1409.2329,
section 3.1:

    i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of the four parts of a_t = x_t W + h_{t-1} U + b
    c_t = f c_{t-1} + i g        h_t = o tanh(c_t)

Only the product with U depends on the previous time step. So x W + b is one matrix product over all steps, and the loop over
time steps contains only h U and the gates. The gradient with respect to U is one matrix product over all steps, too. If JAX
differentiated the loop, it would add to an array as large as U in each step.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from squeeze_jax.nn import varying
from squeeze_jax.nn.dtypes import as_float
from squeeze_jax.nn.intercept import tap
from squeeze_jax.nn.parameter import parameter
from squeeze_jax.nn.reshaped import features

Carry = dict[str, jax.Array]  # {"hidden": [b, d], "cell": [b, d]}, float32


class LSTM(nn.Module):
    """An LSTM layer for sequences [b, l, c].

    The parameters hold the gates side by side, in PyTorch's order i, f, g, o:

        kernel [c, 4 d]              `weight_ih_l0` transposed
        recurrent_kernel [d, 4 d]    `weight_hh_l0` transposed
        bias [4 d]                   `bias_ih_l0 + bias_hh_l0`

    Inputs, both kernels and outputs pass through taps, where other code can replace them; see `nn/intercept.py`. The hidden
    states inside the loop do not. Gates and carried state are float32. The gradient can be differentiated again in reverse mode
    only.

    Attributes:
      features: d, the number of channels of hidden state and cell.
      fixed: if True, an enclosing `Reshaped` that changes `features` raises an error; see `nn/reshaped.py`.
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
        """Returns the hidden states of all time steps, and the state after the last step.

        Args:
          x: [b, l, c].
          carry: state before the first step; None for zeros.

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
            name: parameter(self, name, self.kernel_init, shape, jnp.float32)
            for name, shape in shapes.items()
        }
        bias = parameter(self, "bias", self.bias_init, (4 * size,), jnp.float32)
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
    """Returns the state before the first time step: hidden state and cell, zeros of float32 [rows, size] each."""
    # Two separate arrays, because a training step that donates its state cannot donate one array twice.
    return {name: jnp.zeros((rows, size), jnp.float32) for name in ("hidden", "cell")}


@jax.custom_vjp
def recurrence(
    products: jax.Array, recurrent: jax.Array, hidden: jax.Array, cell: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the loop over time steps.

    Args:
      products: x W + b of all steps, float32 [l, b, 4 d].
      recurrent: U, [d, 4 d]; its dtype is the dtype in which h U is computed.
      hidden, cell: state before the first step, float32 [b, d].

    Returns:
      The hidden states of all steps [l, b, d], the last hidden state [b, d] and the last cell [b, d].
    """

    def step(state, product):
        state, _ = _step(recurrent, state, product)
        return state, state[0]

    (last, cell), outputs = _scan(step, (hidden, cell), products)
    return outputs, last, cell


def _step(recurrent, state, product):
    """Computes one time step; returns the next state (h, c), and the gates i, f, g, o."""
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
        new_state, gates = _step(recurrent, state, product)
        return new_state, (*new_state, gates)

    (last, last_cell), (outputs, cells, gates) = _scan(step, (hidden, cell), products)
    hidden_before = jnp.concatenate([hidden[None], outputs[:-1]])
    cells_before = jnp.concatenate([cell[None], cells[:-1]])
    residuals = (recurrent, hidden_before, cells_before, cells, gates)
    return (outputs, last, last_cell), residuals


def _backward(residuals, cotangents):
    """Returns the cotangents of the arguments of `recurrence`; x_bar is the cotangent of x."""
    recurrent, hidden_before, cells_before, cells, gates = residuals
    outputs_bar, last_bar, last_cell_bar = cotangents
    transposed = recurrent.T

    def step(state_bar, step_values):
        hidden_bar, cell_bar = state_bar
        output_bar, cell_before, cell, (i, f, g, o) = step_values
        hidden_bar = hidden_bar + output_bar
        tanh_cell = jnp.tanh(cell)
        cell_bar = cell_bar + hidden_bar * o * (1 - tanh_cell**2)
        gate_bars = (
            cell_bar * g * i * (1 - i),
            cell_bar * cell_before * f * (1 - f),
            cell_bar * i * (1 - g**2),
            hidden_bar * tanh_cell * o * (1 - o),
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
        (last_bar, last_cell_bar),
        (outputs_bar, cells_before, cells, gates),
        reverse=True,
    )
    recurrent_bar = jnp.einsum(
        "lbd,lbe->de", hidden_before, products_bar, preferred_element_type=jnp.float32
    )
    return products_bar, recurrent_bar.astype(recurrent.dtype), hidden_bar, cell_bar


recurrence.defvjp(_forward, _backward)


def _scan(step, state, inputs, reverse=False):
    # Unrolling the loop was not faster on a CPU: measured for 1 to 35 steps per iteration, with 200 and 650 features.
    return lax.scan(step, state, inputs, reverse=reverse)
