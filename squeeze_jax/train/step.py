"""One training step, pure: `(state, batch, key, *frozen) → (state, metrics)`, in four parts with five plug points.

    prepare      augmentation, and the teachers' outputs
    gradients    one forward pass and `jax.value_and_grad` of it, or a method of the plug point `gradients`;
                 forward: see `train/forward.py`; objective: the sum of the loss terms
    exchange     reduces gradients over the devices inside `jax.shard_map`; without a method the compiler does
    update       the ordered list of gradient transforms with the optimizer in it, then the averaged weights

Sharding stays outside: the arrays that come in carry it. Only an explicit gradient exchange needs the mesh.
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
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.nn import means
from squeeze_jax.train import forward, split
from squeeze_jax.train.arguments import (
    Term,
    check_state,
    exchange_of,
    image,
    settled,
    with_mask,
)
from squeeze_jax.train.forward import Network
from squeeze_jax.train.sharding import BATCH
from squeeze_jax.train.split import Named
from squeeze_jax.train.state import Owner, State, create


class Parts(NamedTuple):
    """The parts of a step, each pure.

    Attributes:
      prepare: (state, batch, key, *frozen) → batch.
      gradients: (state, batch, key) → `Computed`; exchanged already.
      update: (state, computed, examples, key) → (state, metrics).
      fused: whether `gradients` may be traced.
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
    """A training step and the state that it begins with, so that settings which must agree are given once.

    Attributes:
      run: (state, batch, key, *frozen) → (state, metrics).
      create: (key, batch, given) → state.
    """

    run: Callable
    create: Callable

    def __call__(self, state: State, batch: dict, key: jax.Array, *frozen):
        """Does one step; see `make`."""
        return self.run(state, batch, key, *frozen)

    def init(
        self, key: jax.Array, batch: dict, *, given: Mapping[str, Any] | None = None
    ) -> State:
        """Creates the state: weights, the optimizer's state, averaged weights, what methods own, a carry.

        Args:
          key: the seed of the initial weights.
          batch: one batch, or the shapes of one, {name: [b, ...]}.
          given: see `state.create`: weights to begin with instead.
        """
        return self.create(key, batch, given)


def make(network: Network | Any, update: Any, objective: Any, **plugs) -> Step:
    """Builds the whole step as one function; the arguments are those of `parts`.

        step = make(model, optax.adam(1e-3), cross_entropy.make(), ema=0.999)
        state = step.init(key, batch)
        step = jax.jit(step)
        state, metrics = step(state, batch, key)

    A batch is a dict of arrays [b, ...]; "mask", bool [b], says which examples count, by default all. The module's call
    may return logits alone, and tells training from evaluation by one of the arguments that `forward.mode` names.

    Returns:
      (state, batch, key, *frozen) → (state, metrics), and `init`. Metrics are float32 scalars: "loss", "grad_norm",
      "examples" (how many counted) and the objective's own. A step whose gradients are compiled in pieces compiles its
      other parts itself.

    Raises:
      UserError: when called, a state that does not fit the step, or a batch whose arrays are not equally long.
    """
    creates = functools.partial(_created, network, update, objective, plugs)
    return Step(whole(parts(network, update, objective, **plugs)), creates)


def _created(network, update, objective, plugs, key, batch, given) -> State:
    network, update, terms = settled(network, update, objective)
    exchange, mesh = exchange_of(plugs.get("exchange")), plugs.get("mesh")
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH)
    shapes = jax.eval_shape(with_mask, batch)
    read = plugs.get("inputs", image)
    example = jax.eval_shape(read, shapes)
    owners = {}
    if network.forwards:
        accepted = forward.taps(network.model, example, network.forwards.values())
        for (name, f), taps in zip(network.forwards.items(), accepted, strict=True):
            owners[name] = Owner(
                f.init and (lambda key, params, f=f, t=taps: f.init(key, params, t)),
                f.state and (lambda params, f=f, t=taps: f.state(params, t)),
            )
    for term in terms:
        owners[term.name] = Owner(term.objective.init, term.objective.state)
    if plugs.get("gradients") is not None:
        name, method = plugs["gradients"]
        owners[name] = Owner(method.init, method.state)
    if exchange is not None:
        owners[exchange.name] = Owner(None, exchange.method.state, devices)
    rows = (
        jax.tree.leaves(shapes)[0].shape[0]
        if hasattr(network.model, "initial_carry")
        else 0
    )
    creates = functools.partial(
        create,
        network.model,
        update.tx,
        example,
        given=given,
        owners={name: o for name, o in owners.items() if o.init or o.state},
        ema=bool(plugs.get("ema")),
        carry_rows=rows,
    )
    return jax.jit(creates)(key)


def whole(pieces: Parts, **compiled) -> Callable:
    """Composes the parts of a step, see `make`.

    Args:
      pieces: the parts.
      **compiled: how `jax.jit` compiles the update where the gradients are compiled in pieces, such as out_shardings.
    """
    prepare, finish = pieces.prepare, pieces.update
    if not pieces.fused:
        prepare, finish = jax.jit(prepare), jax.jit(finish, **compiled)

    def step(state: State, batch: dict, key: jax.Array, *frozen) -> tuple[State, dict]:
        batch = prepare(state, batch, key, *frozen)
        examples = jnp.sum(batch["mask"].astype(jnp.float32))
        computed = pieces.gradients(state, batch, key)
        return finish(state, computed, examples, key)

    return step


def parts(
    network: Network | Any,
    update: methods.Update | optax.GradientTransformation,
    objective: Callable | Sequence[Term],
    *,
    prepare: Callable = lambda key, batch: batch,
    inputs: Callable = image,
    teach: Callable | None = None,
    gradients: Named | None = None,
    exchange: Named | Callable | None = None,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
) -> Parts:
    """Builds the parts of a step.

    Args:
      network: of `forward.make`, or a Linen module alone.
      update: gradient transforms in order, see `optim.chain`, or one optax transform.
      objective: the terms of the loss, or one plain loss.
      prepare: (key, batch) → batch on the accelerator: augmentation.
      inputs: batch → what the network reads.
      teach: (frozen, batch) → what the objective finds as `batch["teacher"]`: outputs of other networks, whose weights
        `frozen` the step takes as its fourth argument. It is outside of what is differentiated.
      gradients: a method of that plug point; None for one forward pass.
      exchange: a method of that plug point, or a plain function; None leaves the mean to the compiler.
      mesh: needed by `exchange`, whose parameters must be replicated.
      accumulate: split the batch into so many parts, one after the other. A mean of the loss by `nn.means.mean` is that
        of the whole batch, as over the devices of an exchange; whatever else a loss returns is averaged over the parts by
        their examples that count.
      ema: decay of the averaged weights, 0 for none; it warms up as (1 + t) / (10 + t).
    """
    network, update, objective = settled(network, update, objective)
    exchange = exchange_of(exchange)
    fused = gradients is None or gradients.method.fused
    compute, weigh = _computed(network, objective, inputs, gradients)
    if accumulate > 1 or exchange is not None:
        axes = BATCH if exchange is not None else ()
        compute = functools.partial(split.in_parts, compute, weigh, accumulate, axes)
    if exchange is not None:
        compute = split.exchanged(compute, exchange, network.first, mesh)

    def prepared(state, batch, key, *frozen):
        check_state(state, update, ema)
        prepare_key, _ = _keys(key, state.step)
        batch = prepare(prepare_key, with_mask(batch))
        if teach is not None:
            batch = batch | {"teacher": teach(*frozen, batch)}
        return batch

    def computed(state, batch, key):
        _, forward_key = _keys(key, state.step)
        stats = {"batch_stats": state.stats, "step": state.step}
        stats["extra"] = dict(state.extra or {})
        grads, stats, carry, metrics = compute(
            state.params, stats, state.carry, batch, forward_key
        )
        extra = stats["extra"] or None
        return Computed(grads, stats["batch_stats"], extra, carry, metrics)

    def updated(state, computed, examples, key):
        _, forward_key = _keys(key, state.step)
        return _updated(
            state, computed, examples, forward_key, update, ema, network.first
        )

    return Parts(prepared, computed, updated, fused)


def _keys(key, step):
    return jax.random.split(jax.random.fold_in(key, step))


def make_evaluation(
    network: Network | Any,
    measure: Callable,
    *,
    inputs: Callable = image,
):
    """Builds `(variables, batch) → (sums, rows)`, see `metrics._metric.Metric`; rows get "mask" and "index" too.

    With a carry as the third argument it returns ((sums, rows), carry).

    Args:
      network, inputs: as in `parts`.
      measure: (logits, batch) → (sums, rows).
    """
    if not isinstance(network, Network):
        network = Network(network)

    def evaluate(variables: dict[str, Any], batch: dict, carry=None):
        options, batch = {} if carry is None else {"carry": carry}, with_mask(batch)
        outputs, _ = forward.run(network, variables, inputs(batch), **options)
        sums, rows = measure(outputs[0], batch)
        kept = [k for k in ("mask", "index") if k in batch and rows]
        scored = sums, rows | {k: batch[k] for k in kept}
        return scored if carry is None else (scored, outputs[1]["carry"])

    return evaluate


def _computed(network, terms, inputs, gradients):
    """Returns two functions of (params, stats, carry, batch, key), where the batch may be a part of one.

    The first returns (grads, stats, carry, metrics). The second returns by term the sums of weights of the loss' means,
    in a forward pass that the compiler leaves out, but for what these sums depend on.
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
            value, record, *state = _checked(term.name, returned)
            if state:
                extra[term.name] = state[0]
            if len(terms) > 1 or term.weight != 1:
                record = {term.name: value} | record
            total = total + term.weight * value
            records |= record
        return total, records, stats | {"extra": extra}

    def loss(params, stats, batch, key, **options):
        logits, endpoints, stats = outputs(params, stats, batch, key, **options)
        value, metrics, stats = objective(logits, endpoints, batch, params, key, stats)
        return value, (stats, {"loss": value, **metrics})

    passes = methods.Passes(outputs, objective, loss)

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
            grads, stats, metrics, *state = method.compute(
                passes, params, stats, batch, own
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
            one = functools.partial(objective, terms=(term,))
            with means.record_weight_sums() as counts:
                one(logits, endpoints, batch, params, key, stats)
            totals[term.name] = tuple(counts)
        return totals

    return compute, weigh


def _checked(name: str, returned: Any) -> tuple:
    """Returns what a loss returned; raises a UserError if that is not (scalar, metrics) or (scalar, metrics, state)."""
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        raise UserError(
            f"the loss {name} returns a {type(returned).__name__}: return (scalar, metrics), or (scalar, metrics, state)"
        )
    value, record, *_ = returned
    if jnp.shape(value) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise UserError(
            f"the loss {name} returns {jnp.result_type(value)} {list(jnp.shape(value))}: return one float, such as the mean"
        )
    if not isinstance(record, Mapping) or any(jnp.shape(m) for m in record.values()):
        raise UserError(
            f"the loss {name} returns metrics that are no dict of scalars: {shortened(repr(record), 100)}"
        )
    return returned


def _with_carry(stats, carry):
    return stats if carry is None else stats | {"carry": carry}


def _updated(state, computed, examples, key, update, ema, first):
    """Returns the next state and the metrics."""
    params, opt = apply_update(
        update, computed.grads, state.opt, state.params, key, state.step - first
    )
    average = state.ema
    if ema:
        t = state.step.astype(jnp.float32)  # the average goes on over the phases
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
        metrics |= update.metrics(params, opt)
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
    """Returns (params, optimizer state) after the gradient transforms.

    Args:
      update: of `optim.chain`.
      grads, opt, params: of a state.
      key: random, for transforms that draw.
      step: int32 [], updates done in this phase.
    """
    tx = optax.with_extra_args_support(update.tx)
    key = jax.random.fold_in(key, 2)
    updates, opt = tx.update(grads, opt, params, grads=grads, key=key, step=step)
    params = optax.apply_updates(params, updates)
    if update.project is not None:
        params = update.project(params, opt)
    return params, opt
