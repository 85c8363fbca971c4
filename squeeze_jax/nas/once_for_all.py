"""Trains all networks of a space at once: each step trains some of them, on slices of the largest network's weights.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791 (once-for-all): sampled networks, learned matrices for smaller kernels,
distillation from the largest network. Yu and Huang 2019, arXiv 1903.05134, and Yu et al. 2020, arXiv 2003.11142 (BigNAS):
the sandwich rule, which also trains the largest and the smallest network in each step. The gradients of a step's networks
are added up.

This is a method of the plug point `gradients`. The network of the config is the largest of its space, and an ordinary network of
the zoo. A step costs what the arithmetic of its networks costs, see `nas/pieces.py`.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.in_order import in_order
from squeeze_jax.methods import METHODS, Gradients, Passes, Plain
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas import subnetwork
from squeeze_jax.nas.family import Family
from squeeze_jax.nas.matrices import read as read_matrices
from squeeze_jax.nas.matrices import replaced
from squeeze_jax.nas.pieces import Runner, Sums, endpoints_read
from squeeze_jax.nas.sandwich import soft_cross_entropy, soft_labels
from squeeze_jax.ranges import NonNegative, OptionalPath, Positive, Whole
from squeeze_jax.registry import checked


@checked
def make(
    rule: Literal["sandwich", "random"] = "sandwich",
    random: Whole = 2,
    choices: Mapping[str, Any] | None = None,
    transforms: bool = True,
    matrices: OptionalPath = "",
    temperature: Positive = 1.0,
    labels: NonNegative = 0.0,
    distill: NonNegative = 1.0,
    teacher: Literal["moving", "fixed"] = "moving",
) -> Gradients:
    """Returns the method, for networks whose file has a function `elastic`.

    Args:
      rule: "sandwich" trains the largest network on the labels, and the smallest and `random` others on the largest one's
        probabilities. "random" trains `random` networks only; the largest one still supplies probabilities.
      random: number of random networks in each step.
      choices: {option: values}, which restrict the space, such as {"kernel": (7,)} in a phase of progressive shrinking;
        None for the whole space.
      transforms: whether learned matrices change the kernels of smaller networks, which are otherwise only cropped.
      matrices: a file of weights that once-for-all's authors released, whose matrices training begins with; "" begins with
        those that leave kernels as they are.
      temperature: temperature of the probabilities, above 0.
      labels: weight of the config's objective in the loss of a smaller network.
      distill: weight of the cross-entropy with the largest network's probabilities in that loss.
      teacher: which largest network supplies the probabilities: "moving" is the one that trains with the others, "fixed" the
        one with which the first phase of this method begins, as in arXiv 1908.09791. "fixed" costs one more forward
        pass in each step.

    Raises:
      UserError: no network would be trained, or smaller networks would have no loss. When the method meets the network:
        see `Family`.
    """
    if rule == "random" and not random:
        raise UserError(
            "nas.once_for_all: rule = 'random' with random = 0 trains no network: set it to at least 1"
        )
    if labels == distill == 0:
        raise UserError(
            "nas.once_for_all: labels = 0 and distill = 0 leave smaller networks without a loss: set one above 0"
        )
    if matrices and not transforms:
        raise UserError(
            "nas.once_for_all: matrices has no effect with transforms = False: leave it out"
        )
    weights = _Weights(temperature, labels, distill)

    def bind(options: Mapping[str, Any], plain: Plain) -> Gradients:
        family = Family(options, plain, choices)
        sizes = family.kernel_sizes() if transforms else {}
        spare = family.spare_shapes()

        @functools.lru_cache(maxsize=2)  # a new run has new passes
        def trainer(passes):
            return _Trainer(passes, family, weights)

        def compute(passes, params, stats, batch, own):
            made = trainer(passes).compute(params, stats, batch, own, rule, random)
            return (*made, own.state) if teacher == "fixed" else made

        def init(key, params):
            del params
            start = subnetwork.identity_transforms(sizes)
            if matrices:
                released = read_matrices(matrices, family.holder())
                start = replaced(start, released)
            return start | subnetwork.initial_parameters(key, spare)

        own = init if sizes or spare else None
        state = _copied if teacher == "fixed" else None
        return Gradients(compute, init=own, state=state, fused=False)

    return Gradients(_compute_unbound, bind=bind, fused=False, softmax=distill > 0)


def _copied(params):
    """Returns a copy of parameters, which the step may not write to."""
    return jax.tree.map(jnp.copy, params)


def _compute_unbound(*_):
    raise UserError(
        "nas.once_for_all depends on the network's options: call the method's field `bind` with them"
    )


class _Weights:
    """Temperature of distillation, and the weights of the two losses of a smaller network."""

    def __init__(self, temperature: float, labels: float, distill: float):
        self.temperature, self.labels, self.distill = temperature, labels, distill


class _Trainer:
    """Computes the gradients of training steps."""

    def __init__(self, passes: Passes, family: Family, weights: _Weights):
        self._passes, self._family, self._weights = passes, family, weights
        self._holder, self._endpoints = family.holder().pieces, None
        self._runner = Runner(passes, self._holder)
        self._pieces = functools.lru_cache(maxsize=512)(self._pieces_of)
        self._inputs = in_order(jax.jit(passes.inputs))
        self._sample = jax.jit(self._random_archs, static_argnames="count")
        self._soft_labels = jax.jit(
            functools.partial(soft_labels, temperature=weights.temperature)
        )
        losses = self._largest_loss, self._smaller_loss
        options = dict(argnums=(0, 1, 2), has_aux=True)
        self._largest, self._smaller = (
            in_order(jax.jit(jax.value_and_grad(loss, **options))) for loss in losses
        )

    def compute(self, params, stats, batch, own, rule, random):
        """Returns (grads, stats, metrics) of one step, see `methods.Gradients`."""
        # First, so that the host does not wait for the pieces when it reads the architectures.
        drawn = self._sample(own.key, count=random) if random else ()
        inputs, sums = self._inputs(batch), Sums()
        sandwich = rule == "sandwich"
        if self._endpoints is None:
            self._endpoints = endpoints_read(
                self._passes, params, stats, batch, own.key
            )
        names, before = self._endpoints, stats
        largest = self._runner.run(
            self._holder,
            params,
            stats,
            own.params,
            inputs,
            own.key,
            endpoints=names,
            update=True,
            differentiate=sandwich,
        )
        stats, metrics, losses = largest.stats, {}, []
        if sandwich:
            (loss, (stats, metrics)), gradients = self._largest(
                largest.logits, largest.endpoints, params, batch, own.key, stats
            )
            self._add(largest, gradients, sums)
            metrics = {"loss": loss, **metrics}
        teacher = largest.logits
        if own.state is not None:
            fixed = dict(endpoints=(), differentiate=False)
            teacher = self._runner.run(
                self._holder, own.state, before, own.params, inputs, own.key, **fixed
            ).logits
        targets = self._soft_labels(teacher)
        del largest
        for arch in self._archs(sandwich, drawn):
            smaller = self._runner.run(
                self._pieces(arch),
                params,
                stats,
                own.params,
                inputs,
                own.key,
                endpoints=names if self._weights.labels else (),
            )
            (loss, record), gradients = self._smaller(
                smaller.logits,
                smaller.endpoints,
                params,
                batch,
                own.key,
                stats,
                targets,
            )
            self._add(smaller, gradients, sums)
            losses.append(loss)
            metrics = metrics or {"loss": loss, **record}
        if sandwich:
            metrics["smallest"] = losses.pop(0)
        if random:
            metrics["random"] = sum(losses) / random
        return _with_transforms(sums, params, own.params), stats, metrics

    def _add(self, run, gradients, sums):
        """Adds the gradients of one network; `gradients` are those with respect to its logits, endpoints and parameters."""
        of_logits, of_endpoints, of_params = gradients
        sums.add_whole(of_params)
        self._runner.pull(run, of_logits, of_endpoints, sums)

    def _largest_loss(self, logits, endpoints, params, batch, key, stats):
        loss, metrics, stats = self._passes.objective(
            logits, endpoints, batch, params, key, stats
        )
        return loss, (stats, metrics)

    def _smaller_loss(self, logits, endpoints, params, batch, key, stats, targets):
        weights, loss, metrics = self._weights, 0.0, {}
        if weights.distill:
            soft = soft_cross_entropy(
                logits, targets, batch["mask"], weights.temperature
            )
            loss += weights.distill * soft
        if weights.labels:
            hard, metrics, _ = self._passes.objective(
                logits, endpoints, batch, params, key, stats
            )
            loss += weights.labels * hard
        return loss, metrics

    def _random_archs(self, key, count: int) -> list:
        """Returns random architectures; they depend on the key only."""
        keys = jax.random.split(jax.random.fold_in(key, 1), count)
        return [spaces.sample(self._family.space, k) for k in keys]

    def _archs(self, smallest: bool, drawn) -> list[tuple]:
        """Returns the architectures of a step as nested tuples, which can be hashed."""
        archs = [self._family.space.smallest()] if smallest else []
        archs += jax.device_get(list(drawn))
        return [
            tuple(tuple(np.asarray(field).tolist()) for field in arch) for arch in archs
        ]

    def _pieces_of(self, arch: tuple):
        fields = (np.asarray(field, np.int32) for field in arch)
        return self._family.network(self._family.space.arch_type(*fields)).pieces


def _with_transforms(sums: Sums, params, transforms):
    """Returns the gradients with respect to all parameters; the matrices are the method's own parameters."""
    grads = sums.total()
    for name, own in params.get(METHODS, {}).items():
        if own is transforms:
            of_own = {
                layer: sums.transforms.get(layer, jax.tree.map(np.zeros_like, matrices))
                for layer, matrices in transforms.items()
            }
            grads[METHODS] = grads[METHODS] | {name: of_own}
    return grads
