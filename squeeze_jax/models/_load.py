"""Loads published weights into a network in one call, and recognises which framework's names a file has.

What a load converts, omits or initialises is logged as warnings under the name "squeeze_jax". Python prints these unless a
program configures logging otherwise.
"""

import logging
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from squeeze_jax import files, tree
from squeeze_jax.errors import UserError
from squeeze_jax.models import _folder, _make
from squeeze_jax.nn.mode import mode_argument
from squeeze_jax.nn.reshaped import Reshaped
from squeeze_jax.weights import foreign, pretrained

_log = logging.getLogger("squeeze_jax")
# A file has a naming if it has at least this share of a network's layers by that naming; a classifier may be missing.
_MIN_SHARE = 0.5


def load(
    path: str | Path,
    model: nn.Module | str | None = None,
    example: Any = None,
    *,
    names: pretrained.Names | None = None,
    under: str = "",
    key: str = "",
    fresh: jax.Array | None = None,
    **options: Any,
) -> Any:
    """Loads published weights into a network.

        variables = load("squeezenet_v1_0.npz", model=models.make("squeezenet"))
        net, variables = load("mobilenet_v2.pth", model="mobilenet_v2", num_classes=7)
        net, variables = load("bert-base-uncased", task="classification", num_classes=3)
        logits, endpoints = net.apply(variables, x, train=False)

    Args:
      path: a file (.safetensors, .pth, .pt, .bin, .npz, .h5, .keras), or a folder in the format of `transformers`. Code in
        them is never run.
      model: a network, or the name of a file of `models`; None for a folder, whose config.json names the architecture.
      example: an input of the network, or its shape (b, h, w, c); None for images (1, 224, 224, 3) or for one token.
      names: naming of a file's arrays, see `pretrained.load`; None recognises it.
      under: prefix of the network's names in the file, such as "backbone".
      key: the part of a PyTorch checkpoint that holds the weights, such as "model_ema"; "" for the first suitable part.
      fresh: a key from `jax.random.key` that initialises a classifier which the file lacks or has for other classes; None
        for `jax.random.key(0)`.
      **options: options of the network's `make`, such as num_classes=7; not allowed if `model` is a network.

    Returns:
      variables, {"params": …, "batch_stats": …} in float32, if `model` is a network; else (network, variables).

    Raises:
      UserError: the file cannot be read, its names are not recognised, or arrays are missing, unexpected or of another shape;
        the message names the first of each.
    """
    is_network = isinstance(model, nn.Module)
    if is_network and options:
        raise UserError(
            f"{next(iter(options))} has no effect on an existing network: give the network's name as model, or build it with that option"
        )
    if fresh is None:
        fresh = jax.random.key(0)
    try:
        if files.path(path).is_dir():
            unused = {"names": names, "under": under, "key": key}
            if first := next((name for name, value in unused.items() if value), None):
                raise UserError(f"{first} has no effect on the folder {path}")
            net, variables = _load_folder(path, model, fresh, options)
        else:
            if model is None:
                raise UserError(
                    f"{path} does not name its network: give model=models.make(…) or its name"
                )
            net = model if is_network else _make.make(model, **options)
            variables = _load_file(path, net, example, names, under, key, fresh)
    except UserError as error:
        raise UserError(_as_argument(error)) from None
    return variables if is_network else (net, variables)


def complete_variables(
    net: nn.Module, loaded: Mapping[str, Any], example: Any, fresh: jax.Array
) -> dict[str, Any]:
    """Returns all variables of a network: loaded ones, and initial values for the others.

    Args:
      net: the network.
      loaded: {"params", "batch_stats"} without some of the parameters, or {name: array} of the loaded ones.
      example: as for `load`.
      fresh: a key from `jax.random.key` for the initial values.
    """
    example, arrays = example_input(net, example), tree.flatten(dict(loaded))
    mode = mode_argument(net, False)
    shapes = tree.flatten(dict(foreign.variable_shapes(net, example, **mode)))
    missing = [name for name in shapes if name not in arrays]
    if missing:

        @jax.jit
        def init(key):
            initial = tree.flatten(dict(net.init(key, example, **mode)))
            return {name: initial[name] for name in missing}

        arrays |= jax.tree.map(np.asarray, init(fresh))
    ordered = {name: arrays[name] for name in shapes}
    return traverse_util.unflatten_dict(ordered, sep="/")


def _load_folder(path, model, fresh, options):
    """Returns (network, variables) of a folder in the format of `transformers`."""
    stored = _folder.options(path)["name"]
    if isinstance(model, nn.Module):
        net, (variables, layers) = model, _folder.load_into(path, model, fresh)
    elif model not in (None, stored):
        raise UserError(f"{path} holds the network {stored!r}, not {model!r}")
    else:
        task = options.pop("task", None)
        net, variables, layers = _folder.load_and_list_fresh(path, task, fresh, options)
    if layers:
        _log.warning("%s: %s initialised anew: train it", path, ", ".join(layers))
    return net, variables


def _load_file(path, net, example, names, under, key, fresh):
    """Returns a network's variables from a file, and logs the conversions."""
    module = module_of(net)
    arrays, lines = pretrained.read(path, under=under, key=key)
    if names is None:
        names, line = recognise_names(arrays, net, module, path)
        lines.append(line)
    elif names != pretrained.OWN and names not in pretrained.known_namings(module):
        pretrained.check(path, names, _model_name(module), module, net)
    mode = mode_argument(net, False)
    like = foreign.variable_shapes(net, example_input(net, example), **mode)
    variables, fit_lines = pretrained.fit(arrays, names, net, module, like, path)
    for line in map(_as_argument, lines + fit_lines):
        counters = line.endswith("counters of batches ignored")
        _log.log(logging.INFO if counters else logging.WARNING, "%s: %s", path, line)
    return complete_variables(net, variables, example, fresh)


def _as_argument(message: object) -> str:
    """Returns an error message with names of arguments instead of config keys."""
    return str(message).replace("config.init.", "").replace("config.model.", "")


def recognise_names(
    arrays: Mapping[str, Any], net: nn.Module, module: types.ModuleType, path
) -> tuple[str, str]:
    """Finds the naming of a file's arrays: the one by which the file has the most of the network's layers.

    Args:
      arrays: {name: array}, as `pretrained.read` returns them.
      net: the network.
      module: its file, as a module.
      path: path of the weights, for errors.

    Returns:
      (a value of `pretrained.Names`, a line for the log about it).

    Raises:
      UserError: by no naming does the file have half of the network's layers, or the network computes differently from the
        published one.
    """
    if any(name.startswith("params/") for name in arrays):
        return pretrained.OWN, f"the names are {pretrained.OWN}'s own"
    shares, errors = {}, []
    is_keras = files.suffix(path) in (".h5", ".keras")
    for naming in pretrained.known_namings(module):
        if is_keras != (naming == "keras"):
            continue
        try:
            layers = getattr(module, f"{naming}_names")(net)
        except UserError as error:
            errors.append(error)
            continue
        shares[naming] = _share_present(layers, arrays)
    best = max(shares, key=shares.get, default=None)
    if best is not None and shares[best] >= _MIN_SHARE:
        return best, f"the names are recognised as those of {best}"
    if errors:
        raise errors[0]
    raise UserError(_describe_unknown_names(arrays, net, module, path, shares))


def _share_present(layers, arrays) -> float:
    """Returns the share of a network's layers that have arrays, 0..1."""
    stored = {name.rpartition("/")[0] for name in arrays}
    stored |= {name.rpartition(".")[0] for name in arrays}
    alternatives = [(n,) if isinstance(n, str) else n for n in layers.values()]
    return sum(not stored.isdisjoint(a) for a in alternatives) / max(len(layers), 1)


def _describe_unknown_names(arrays, net, module, path, shares) -> str:
    """Returns the error message for unrecognised names: a prefix that fits, or the first missing layer."""
    first = next(iter(arrays), "nothing")
    prefixes = dict.fromkeys(name.partition(".")[0] for name in arrays if "." in name)
    for prefix in prefixes:
        start = f"{prefix}."
        candidates = {n.removeprefix(start) for n in arrays if n.startswith(start)}
        for naming in shares:
            layers = getattr(module, f"{naming}_names")(net)
            if _share_present(layers, candidates) >= _MIN_SHARE:
                return f"{path}: the names of {naming} begin with {start!r}: give under={prefix!r}"
    if not shares:
        return f"{path}: {_model_name(module)} has no map of names that the file has, such as {first}: rename them to squeeze_jax's own, such as params/conv1/kernel"
    best = max(shares, key=shares.get)
    layers = getattr(module, f"{best}_names")(net)
    missing = next(
        (ours, theirs)
        for ours, theirs in layers.items()
        if not _share_present({"": theirs}, arrays)
    )
    return (
        f"{path} does not fit {_model_name(module)} by the names of {', '.join([*shares, pretrained.OWN])}: {missing[0]} would be"
        f" {missing[1]} in {best}'s, but the file has {first}, for example: choose another model, or give names and under"
    )


def _inner_net(net: nn.Module) -> nn.Module:
    """Returns the network inside `Reshaped`, or the network itself."""
    return net.net if isinstance(net, Reshaped) else net


def module_of(net: nn.Module) -> types.ModuleType:
    """Returns the file of a network, as a module, which has its maps of names."""
    return sys.modules[type(_inner_net(net)).__module__]


def _model_name(module: types.ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def example_input(net: nn.Module, example: Any) -> Any:
    """Returns an input of zeros for a network.

    Args:
      net: the network.
      example: an input or its shape, as for `load`; None for one image or one token, depending on what its file reads.
    """
    if isinstance(example, tuple) and all(isinstance(n, int) for n in example):
        return jnp.zeros(example, jnp.float32)
    if example is not None:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), example)
    if getattr(module_of(net), "INPUTS", "images") == "images":
        return jnp.zeros((1, 224, 224, 3), jnp.float32)
    choices = getattr(_inner_net(net), "task", "") == "choice"
    return {"tokens": jnp.zeros((1,) * (2 + choices), jnp.int32)}
