"""Builds the training step, a pure function `(state, batch, key, *frozen) → (state, metrics)` with five plug points.

A step has four parts:

    prepare      augments the batch and computes the teachers' outputs
    gradients    one forward pass and `jax.value_and_grad` of it, or a method of the plug point `gradients`. The plug
                 point `forward` changes the network, see `train/forward.py`; `objective` is the sum of the losses
    exchange     reduces the gradients over the devices inside `jax.shard_map`; without a method the compiler does it
    update       applies the ordered list of gradient transforms, which contains the optimizer, and averages the weights

The step does not handle sharding, because its input arrays carry it. Only an explicit gradient exchange needs the mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from squeeze_jax import methods
from squeeze_jax.errors import UserError
from squeeze_jax.in_order import in_order
from squeeze_jax.nn import means
from squeeze_jax.ranges import Count, Rate
from squeeze_jax.train import contract, forward, split
from squeeze_jax.train.arguments import (
    Term,
    check_key,
    check_plugs,
    check_state,
    full_forms,
    image,
    named_exchange,
    named_gradients,
    with_mask,
)
from squeeze_jax.train.forward import Network
from squeeze_jax.train.sharding import BATCH
from squeeze_jax.train.split import Named
from squeeze_jax.train.state import Owner, State, create


class Parts(NamedTuple):
    """The parts of a training step, as pure functions.

    Attributes:
      prepare: (state, batch, key, *frozen) → batch.
      gradients: (state, batch, key) → `Computed`, including the exchange of gradients.
      update: (state, computed, examples, key) → (state, metrics); `examples` is the number of examples that count.
      fused: whether `gradients` may be traced and compiled together with the other parts.
    """

    prepare: Callable
    gradients: Callable
    update: Callable
    fused: bool


class Computed(NamedTuple):
    """The result of the part `gradients`: gradients, changed statistics, state and carry, and metrics."""

    grads: Any
    stats: Any
    extra: Any
    carry: Any
    metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A training step and the function that creates its initial state from the same settings.

    Attributes:
      run: (state, batch, key, *frozen) → (state, metrics).
      create: (key, batch, given) → state.
    """

    run: Callable
    create: Callable

    def __call__(self, state: State, batch: dict, key: jax.Array, *frozen):
        """Runs one training step; see `make`."""
        check_key(key)
        return self.run(state, batch, key, *frozen)

    def init(
        self, key: jax.Array, batch: dict, *, given: Mapping[str, Any] | None = None
    ) -> State:
        """Creates the initial state: weights, optimizer state, averaged weights, parameters and state of methods, carry.

        Args:
          key: random key of the initial weights.
          batch: one batch {name: [b, ...]}, or its shapes.
          given: pretrained values that replace initial ones, see `state.create`.
        """
        check_key(key)
        return self.create(key, batch, given)


def make(network: Network | Any, update: Any, objective: Any, **plugs) -> Step:
    """Builds a training step; the arguments are those of `parts`.

        step = make(model, optax.adam(1e-3), cross_entropy.make(), ema=0.999)
        state = step.init(key, batch)
        step = jax.jit(step)
        state, metrics = step(state, batch, key)

    A batch is a dict of arrays [b, ...]. Its "mask", bool [b], is true for the examples that count, by default for all. Losses and
    metrics leave the others out; batch normalisation in training still sees them.
    The module may return logits alone. Its call switches between training and evaluation by one of the arguments that
    `forward.mode_argument` names, or by none.

    Returns:
      The `Step`, a function (state, batch, key, *frozen) → (state, metrics) with a method `init`. Metrics are float32
      scalars: "loss", "grad_norm", "examples" (the number of examples that count) and the metrics of the objective. A
      step with a `gradients` method that is not fused cannot be jitted; it compiles its other parts itself.

    Raises:
      UserError: a plug is unknown or out of its range; the step was called with a state that does not fit it, or with a batch whose arrays have different
        numbers of examples.
    """
    check_plugs(parts, plugs)
    create_state = functools.partial(_create_state, network, update, objective, plugs)
    return Step(compose(parts(network, update, objective, **plugs)), create_state)


def _create_state(network, update, objective, plugs, key, batch, given) -> State:
    """Creates the initial state of a step; the arguments are those of `make` and `Step.init`."""
    network, update, terms = full_forms(network, update, objective)
    exchange, mesh = named_exchange(plugs.get("exchange")), plugs.get("mesh")
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)
    shapes = jax.eval_shape(with_mask, batch)
    inputs = plugs.get("inputs", image)
    example = jax.eval_shape(inputs, shapes)
    owners = {}
    if network.forwards:
        forwards = network.forwards.values()
        accepted = forward.accepted_taps(network.model, example, forwards)
        for (name, f), taps in zip(network.forwards.items(), accepted, strict=True):
            owners[name] = Owner(
                f.init and (lambda key, params, f=f, t=taps: f.init(key, params, t)),
                f.state and (lambda params, f=f, t=taps: f.state(params, t)),
            )
    for term in terms:
        owners[term.name] = Owner(term.objective.init, term.objective.state)
    if plugs.get("gradients") is not None:
        name, method = named_gradients(plugs["gradients"])
        owners[name] = Owner(method.init, method.state)
    if exchange is not None:
        owners[exchange.name] = Owner(None, exchange.method.state, devices)
    rows = (
        jax.tree.leaves(shapes)[0].shape[0]
        if hasattr(network.model, "initial_carry")
        else 0
    )
    create_jitted = functools.partial(
        create,
        network.model,
        update.tx,
        example,
        given=given,
        owners={name: o for name, o in owners.items() if o.init or o.state},
        ema=bool(plugs.get("ema")),
        carry_rows=rows,
    )
    return jax.jit(create_jitted)(key)


def compose(parts: Parts, **jit_options) -> Callable:
    """Composes the parts of a step to one function, (state, batch, key, *frozen) → (state, metrics).

    Args:
      parts: the parts that the function `parts` built.
      **jit_options: options of `jax.jit` for the part `update`, such as out_shardings. They serve parts that are not
        fused, whose `prepare` and `update` are jitted here one by one.
    """
    update = parts.update

    def prepare(*args):
        batch = parts.prepare(*args)
        return batch, jnp.sum(batch["mask"].astype(jnp.float32))

    if not parts.fused:
        prepare = in_order(jax.jit(prepare))
        update = in_order(jax.jit(update, **jit_options))

    def step(state: State, batch: dict, key: jax.Array, *frozen) -> tuple[State, dict]:
        batch, examples = prepare(state, batch, key, *frozen)
        computed = parts.gradients(state, batch, key)
        return update(state, computed, examples, key)

    return step


def parts(
    network: Network | Any,
    update: methods.Update | optax.GradientTransformation | Any,
    objective: Callable | Sequence[Term] | Any,
    *,
    prepare: Callable = lambda key, batch: batch,
    inputs: Callable = image,
    teach: Callable | None = None,
    gradients: Named | methods.Gradients | None = None,
    exchange: Named | methods.Exchange | Callable | None = None,
    mesh: Mesh | None = None,
    accumulate: Count = 1,
    ema: Rate = 0.0,
) -> Parts:
    """Builds the parts of a training step.

    Args:
      network: a network that `forward.make` built, or a Linen module alone.
      update: gradient transforms in order, see `optim.chain`, or one optax transform.
      objective: the terms of the objective, or one loss, (logits, endpoints, batch) → (scalar, metrics).
      prepare: (key, batch) → batch; augments the batch on the devices.
      inputs: batch → the inputs of the network.
      teach: (frozen, batch) → teacher outputs, which the objective finds in `batch["teacher"]`. `frozen`, the fourth
        argument of the step, holds the teachers' weights. No gradients flow into the teachers.
      gradients: a method of the plug point `gradients`; None for one forward pass.
      exchange: a method of the plug point `exchange`, or a plain function; None leaves the mean to the compiler.
      mesh: the mesh of `exchange`; its parameters must be replicated.
      accumulate: number of parts of a batch that are computed one after the other. Means by `nn.means.mean` are means over
        the whole batch, also over the devices of an exchange. Everything else that a loss returns is averaged over the
        parts, weighted by their numbers of examples that count.
      ema: decay of the averaged weights, 0 for none; after t updates it is at most (1 + t) / (10 + t).
    """
    network, update, objective = full_forms(network, update, objective)
    exchange, gradients = named_exchange(exchange), named_gradients(gradients)
    fused = gradients is None or gradients.method.fused
    compute, weigh = _gradient_functions(network, objective, inputs, gradients)
    if accumulate > 1 or exchange is not None:
        axes = BATCH if exchange is not None else ()
        compute = functools.partial(
            split.compute_in_parts, compute, weigh, accumulate, axes
        )
    if exchange is not None:
        compute = split.with_exchange(compute, exchange, network.first, mesh)

    def prepare_batch(state, batch, key, *frozen):
        check_state(state, update, ema)
        prepare_key, _ = _keys(key, state.step)
        batch = prepare(prepare_key, with_mask(batch))
        if teach is not None:
            batch = batch | {"teacher": teach(*frozen, batch)}
        return batch

    def compute_gradients(state, batch, key):
        _, forward_key = _keys(key, state.step)
        stats = {"batch_stats": state.stats, "step": state.step}
        stats["extra"] = dict(state.extra or {})
        grads, stats, carry, metrics = compute(
            state.params, stats, state.carry, batch, forward_key
        )
        extra = stats["extra"] or None
        if exchange is not None:
            what = f"the exchange {exchange.name} returns gradients"
            contract.check_like(grads, state.params, what)
        for name, before in (state.extra or {}).items():
            what = f"the method {name} returns state"
            contract.check_like((extra or {}).get(name), before, what)
        return Computed(grads, stats["batch_stats"], extra, carry, metrics)

    def update_state(state, computed, examples, key):
        _, forward_key = _keys(key, state.step)
        return _update_state(
            state, computed, examples, forward_key, update, ema, network.first
        )

    return Parts(prepare_batch, compute_gradients, update_state, fused)


def _keys(key, step):
    """Returns the random keys of a step: one for `prepare`, and one for the forward pass and the update."""
    return jax.random.split(jax.random.fold_in(key, step))


def make_evaluation(
    network: Network | Any,
    measure: Callable,
    *,
    inputs: Callable = image,
):
    """Builds an evaluation step, (variables, batch) → (sums, rows); see `metrics._metric.Metric`.

    If `measure` returns rows, the step adds "mask" and, if the batch has it, "index" to them. Called with the carry of a
    recurrent network as the third argument, the step returns ((sums, rows), carry).

    Args:
      network, inputs: see `parts`.
      measure: (logits, batch) → (sums, rows), or the `Metric` that has it.
    """
    measure = getattr(measure, "measure", measure)
    network = forward.as_network(network)

    def evaluate(variables: dict[str, Any], batch: dict, carry=None):
        options, batch = {} if carry is None else {"carry": carry}, with_mask(batch)
        outputs, _ = forward.run(network, variables, inputs(batch), **options)
        sums, rows = measure(outputs[0], batch)
        kept = [k for k in ("mask", "index") if k in batch and rows]
        measured = sums, rows | {k: batch[k] for k in kept}
        return measured if carry is None else (measured, outputs[1]["carry"])

    return evaluate


def _gradient_functions(network, terms, inputs, gradients):
    """Builds two functions, `compute` and `weigh`, of (params, stats, carry, batch, key); the batch may be a part of one.

    `compute` returns (grads, stats, carry, metrics). `weigh` returns for each term the sums of weights by which the means
    of its loss divide, {name: tuple of float32 []}. It runs a forward pass, of which the compiler keeps only what these
    sums depend on.

    Args:
      network: a `Network`.
      terms: the terms of the objective.
      inputs: batch → the inputs of the network.
      gradients: a named method of the plug point `gradients`, or None.
    """

    def outputs(params, stats, batch, key, **options):
        if stats.get("carry") is not None:
            options["carry"] = stats["carry"]
        variables = {"params": params, **stats}
        (logits, endpoints), changed = forward.run(
            network, variables, inputs(batch), train=True, key=key, **options
        )
        if stats.get("carry") is not None:
            changed["carry"] = endpoints["carry"]
        return logits, endpoints, stats | changed

    def objective(logits, endpoints, batch, params, key, stats, terms=terms):
        variables = {"params": params, **stats}
        plain = forward.parameters(params)
        total, records, extra = 0.0, {}, dict(stats["extra"])
        for term in terms:
            own = forward.own(term.name, variables, first=network.first, key=key)
            with means.divide_by(stats.get("divisors", {}).get(term.name)):
                returned = term.objective.loss(logits, endpoints, batch, plain, own)
            value, record, *state = check_returned(term.name, returned)
            declared = term.objective.state is not None
            contract.check_state(term.name, declared, bool(state))
            if state:
                extra[term.name] = state[0]
            weighted = len(terms) > 1 or term.weight != 1
            # Two losses may have a metric of one name, such as the accuracies of two heads.
            taken = {*records, *(t.name for t in terms if weighted)}
            record = {
                f"{term.name}_{k}" if k in taken else k: v for k, v in record.items()
            }
            if weighted:
                records = {**records, term.name: value}
            total = total + term.weight * value
            records = contract.add_metrics(records, record, f"the loss {term.name}")
        return total, records, stats | {"extra": extra}

    def loss(params, stats, batch, key, **options):
        logits, endpoints, stats = outputs(params, stats, batch, key, **options)
        value, metrics, stats = objective(logits, endpoints, batch, params, key, stats)
        return value, (stats, {"loss": value, **metrics})

    def run(model, params, stats, x, key):
        for name, method in network.forwards.items():
            if method.reparametrize is not None:
                raise UserError(
                    f"config.forward: {name} changes the parameters of the whole network, which runs in pieces here: leave it out"
                )
        (y, endpoints), changed = forward.run(
            network._replace(model=model),
            {"params": params, **stats},
            x,
            train=True,
            key=key,
        )
        return y, endpoints, stats | changed

    named = bool(network.forwards) or network.dtype != "float32"
    passes = methods.Passes(outputs, objective, loss, run, inputs, named)

    def compute(params, stats, carry, batch, key):
        before = stats
        stats = _with_carry(stats, carry)
        if gradients is None:
            (_, (stats, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
                params, stats, batch, key
            )
        else:
            variables = {"params": params, **stats}
            name, method = gradients
            own = forward.own(name, variables, first=network.first, key=key)
            returned = method.compute(passes, params, stats, batch, own)
            declared = method.state is not None
            grads, stats, metrics, *state = contract.check_computed(
                name, returned, params, declared
            )
            if state:
                stats = stats | {"extra": stats["extra"] | {name: state[0]}}
        after = {k: stats[k] for k in before}
        return grads, after, jax.lax.stop_gradient(stats.get("carry")), metrics

    def weigh(params, stats, carry, batch, key):
        stats = _with_carry(stats, carry)
        logits, endpoints, stats = outputs(params, stats, batch, key)
        totals = {}
        for term in terms:
            with means.record_weight_sums() as counts:
                objective(logits, endpoints, batch, params, key, stats, terms=(term,))
            totals[term.name] = tuple(counts)
        return totals

    return compute, weigh


def check_returned(name: str, returned: Any) -> tuple:
    """Returns the result of a loss unchanged, if it is (scalar, metrics) or (scalar, metrics, state).

    Raises:
      UserError: the loss called `name` returned anything else.
    """
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        kind = (
            "a single array"
            if hasattr(returned, "aval")
            else f"a {type(returned).__name__}"
        )
        raise UserError(
            f"the loss {name} returns {kind}: return (scalar, metrics), or (scalar, metrics, state)"
        )
    value, record, *_ = returned
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise UserError(
            f"the loss {name} returns {jnp.result_type(value)} {list(jnp.shape(value))}: return one float, such as the mean"
        )
    contract.check_metrics(f"the loss {name}", record)
    return returned


def _with_carry(stats, carry):
    return stats if carry is None else stats | {"carry": carry}


def _update_state(state, computed, examples, key, update, ema, first):
    """Returns the next state and the metrics of the step.

    Args:
      state: the state before the step.
      computed: the `Computed` of the step, whose gradients are exchanged.
      examples: float32 [], number of examples that count.
      key: random key of the forward pass.
      update, ema: see `parts`.
      first: the step at which the phase began.
    """
    params, opt = apply_update(
        update, computed.grads, state.opt, state.params, key, state.step - first
    )
    contract.check_like(params, state.params, "config.update leads to parameters")
    contract.check_like(
        opt, state.opt, "config.update leads to a state of the transforms"
    )
    average = state.ema
    if ema:
        t = state.step.astype(
            jnp.float32
        )  # counts over all phases, as the average does
        decay = jnp.minimum(ema, (1 + t) / (10 + t))
        fresh = {"params": params, "stats": computed.stats}
        average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, fresh)
        if update.project is not None:
            average |= {"params": update.project(average["params"], opt)}
    metrics = computed.metrics | {
        "grad_norm": optax.tree.norm(computed.grads),
        "examples": examples,
    }
    if update.metrics is not None:
        new = update.metrics(params, opt)
        metrics = contract.add_metrics(metrics, new, "config.update")
    after = State(
        step=state.step + 1,
        params=params,
        stats=computed.stats,
        opt=opt,
        ema=average,
        extra=computed.extra,
        carry=computed.carry,
    )
    return after, metrics


def apply_update(update: methods.Update, grads, opt, params, key, step):
    """Applies the gradient transforms; returns the new (params, optimizer state).

    Args:
      update: the gradient transforms, as `optim.chain` joins them.
      grads: gradients of `params`.
      opt: the state of the transforms.
      params: the parameters before the update.
      key: random key for transforms that draw random numbers.
      step: int32 [], number of updates so far in this phase.
    """
    tx = optax.with_extra_args_support(update.tx)
    key = jax.random.fold_in(key, 2)
    updates, opt = tx.update(grads, opt, params, grads=grads, key=key, step=step)
    params = optax.apply_updates(params, updates)
    if update.project is not None:
        params = update.project(params, opt)
    return params, opt
