"""Encoders from and to folders of Hugging Face's `transformers`."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from squeeze_jax import files, registry, tree
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.nn.reshaped import Reshaped
from squeeze_jax.weights import foreign, huggingface

# What may be initialised instead of read.
FRESH = re.compile(r"^(head|pooler)/")
NO_WEIGHTS = (
    r"(^|\.)(position_ids|token_type_ids)$",
    r"(^|\.)attn\.(masked_)?bias$",  # the causal mask of old GPT-2s
)


def load(
    folder: str | Path,
    *,
    task: str | None = None,
    fresh: jax.Array | None = None,
    **options: Any,
) -> tuple[nn.Module, dict]:
    """Builds the encoder that a folder holds, with its weights.

    Args:
      folder: config.json beside model.safetensors or pytorch_model.bin, in one file or several.
      task: for which head, see `nn.heads.Head`; None for that of the folder. Other heads in the folder are passed over.
      fresh: a key from `jax.random.key` to initialise what the folder lacks of head and pooler, or has for another
        number of classes; without it that is an error.
      **options: of the architecture's `make`, instead of what config.json says, such as dropout=0.0, num_classes=3.

    Returns:
      The net and its variables, numpy arrays in float32.

    Raises:
      UserError: an unknown architecture or option, no weights, tensors that are missing, left over or of another shape.
    """
    net, variables, _ = loaded(folder, task, fresh, options)
    return net, variables


def loaded(
    folder: str | Path,
    task: str | None,
    fresh: jax.Array | None,
    options: Mapping[str, Any],
) -> tuple[nn.Module, dict, tuple[str, ...]]:
    """As `load`, and returns the layers that are initialised too."""
    folder = files.path(folder)
    config = huggingface.read_config(folder)
    module = _module(config, folder)
    family = module.HUGGINGFACE
    task = task or huggingface.task(config, family)
    if task is None:
        named = config.get("architectures") or "no architecture"
        known = ", ".join(family.classes.values())
        raise UserError(
            f"{folder / huggingface.CONFIG} names {named}: give a task, or a folder of one of {known}"
        )
    try:
        given = {"task": task, "num_classes": huggingface.labels(config)}
        given |= module.from_huggingface(config) | options
        registry.check(module.make, given, "options")
        net = module.make(**given)
        return net, *_fitted(net, huggingface.read_arrays(folder), module, fresh)
    except UserError as error:
        where = "" if str(folder) in str(error) else f"{folder}: "
        raise UserError(f"{where}{error}") from None


def fitted(
    folder: str | Path, net: nn.Module, fresh: jax.Array | None
) -> tuple[dict, tuple[str, ...]]:
    """Returns the variables of an encoder that is already made from a folder, and the layers that are initialised.

    Args:
      folder, fresh: see `load`.
      net: an encoder of `models`.

    Raises:
      UserError: the folder holds another architecture, or see `load`.
    """
    folder = files.path(folder)
    module = _module(huggingface.read_config(folder), folder)
    if sys.modules[type(net).__module__] is not module:
        raise UserError(
            f"{folder} holds the network {module.HUGGINGFACE.model_type!r}, not {type(net).__name__}"
        )
    try:
        return _fitted(net, huggingface.read_arrays(folder), module, fresh)
    except UserError as error:
        where = "" if str(folder) in str(error) else f"{folder}: "
        raise UserError(f"{where}{error}") from None


def options(folder: str | Path) -> dict[str, Any]:
    """What `models.make` is called with for the encoder of a folder, but for its task and classes.

    Raises:
      UserError: no config.json, or an unknown architecture.
    """
    folder = files.path(folder)
    config = huggingface.read_config(folder)
    module = _module(config, folder)
    return {"name": module.HUGGINGFACE.model_type, **module.from_huggingface(config)}


def class_names(folder: str | Path) -> tuple[str, ...] | None:
    """The names of the classes of a folder's head; None where it has no head for classes, or does not name them.

    Raises:
      UserError: no config.json, an unknown architecture, or labels that are no names by number.
    """
    folder = files.path(folder)
    config = huggingface.read_config(folder)
    task = huggingface.task(config, _module(config, folder).HUGGINGFACE)
    return (
        huggingface.class_names(config)
        if task in ("classification", "tokens")
        else None
    )


def save(
    folder: str | Path,
    net: nn.Module,
    variables: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `transformers` and `load` read: config.json and model.safetensors in float32.

    Where `transformers` has a pooler for the task and the net has none, which then does not need it, a fresh one is
    written; where it has none, the net's is left out.

    Args:
      folder: is made where it is not there; other files in it, such as the tokenizer's, stay.
      net: an encoder of `models`.
      variables: its {"params": …}.
      config: more for config.json, such as {"id2label": {0: "negative", 1: "positive"}}.

    Raises:
      UserError: `transformers` has no class for the net, or could not compute what it computes; or the variables are
        another net's.
    """
    if isinstance(net, Reshaped):
        raise UserError(
            "transformers has no encoder with widths or absent layers of its own: it could not load this network"
        )
    if getattr(net, "num_classes", 0) is None:
        raise UserError(
            "the net has no head, num_classes = None: save it with task='features'"
        )
    module = sys.modules[type(net).__module__]
    if not hasattr(module, "HUGGINGFACE"):
        raise UserError(f"{type(net).__name__} is no encoder that transformers has")
    family = module.HUGGINGFACE
    if net.task not in family.classes:
        raise UserError(
            f"transformers has no {family.model_type} for task {net.task!r}: save it for one of"
            f" {', '.join(family.classes)}"
        )
    lines = tree.differences(
        foreign.shapes(net, _example(net))["params"], variables["params"]
    )
    if lines:
        raise UserError(f"the variables are not the net's ({len(lines)}): {lines[0]}")
    params = tree.flatten(variables["params"])
    params = {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}
    pooled = net.task in family.pooled
    params = {k: v for k, v in params.items() if pooled or not k.startswith("pooler/")}
    if pooled and not net.pooler:
        net = net.clone(pooler=True)
        params |= _initial(net, jax.random.key(0), lambda k: k.startswith("pooler/"))
    names = module.huggingface_names(net)
    if net.task != "features":
        names = {
            ours: theirs if ours.startswith("head/") else f"{family.prefix}.{theirs}"
            for ours, theirs in names.items()
        }
    written = {
        "architectures": [family.classes[net.task]],
        "model_type": family.model_type,
        "dtype": "float32",
        **module.to_huggingface(net),
    }
    if net.task in ("classification", "tokens"):
        written["id2label"] = {n: f"LABEL_{n}" for n in range(net.num_classes)}
    written |= config or {}
    if "id2label" in written:
        classes = written["id2label"]
        if len(classes) != net.num_classes:
            raise UserError(
                f"config has {len(classes)} labels in id2label: the net has num_classes = {net.num_classes}"
            )
        numbers = {name: int(n) for n, name in classes.items()}
        written.setdefault("label2id", numbers)
    arrays = foreign.state(params, names, sequences=family.conv1d)
    huggingface.write(folder, written, family.packed(arrays, net))


def _module(config: Mapping[str, Any], folder: Path):
    """The file of an architecture, which is called as its `model_type`."""
    kind = config.get("model_type")
    package = __package__
    if kind in registry.names(package):
        module = registry.load(package, kind)
        if hasattr(module, "HUGGINGFACE"):
            return module
    every = [registry.load(package, name) for name in registry.names(package)]
    known = [m.HUGGINGFACE.model_type for m in every if hasattr(m, "HUGGINGFACE")]
    what = "no model_type" if kind is None else f"unknown model_type {kind!r}"
    raise UserError(
        f"{folder / huggingface.CONFIG}: {what}{nearest(kind or '', known)}"
    )


def _fitted(net, arrays, module, fresh):
    names, family = module.huggingface_names(net), module.HUGGINGFACE
    shapes = tree.flatten(foreign.shapes(net, _example(net))["params"])
    arrays = _used(huggingface.without_prefix(arrays, family), net, names, family)
    arrays = family.unpacked(huggingface.tied(arrays, family), net)
    lacking = _lacking(shapes, names, arrays)
    if lacking and fresh is None:
        layers = ", ".join(sorted({k.rpartition("/")[0] for k in lacking}))
        without = "leave it out by pooler=False, " if net.task == "features" else ""
        raise UserError(
            f"no weights for {layers} of task {net.task!r} with these classes: {without}train them first, or give"
            " fresh=jax.random.key(0) to initialise them"
        )
    ignore = [*NO_WEIGHTS]
    for leaf in lacking:
        ignore.append(rf"^{re.escape(names[leaf.rpartition('/')[0]])}\.[^.]+$")
    wanted = {k: v for k, v in shapes.items() if k not in lacking}
    like = {"params": traverse_util.unflatten_dict(wanted, sep="/")}
    params = tree.flatten(foreign.fit(arrays, like, names, ignore=ignore)["params"])
    if lacking:
        params |= _initial(net, fresh, lambda name: name in lacking)
    layers = tuple(sorted({name.rpartition("/")[0] for name in lacking}))
    return {"params": traverse_util.unflatten_dict(params, sep="/")}, layers


def _used(arrays, net, names, family):
    """The arrays without those of other tasks' heads and of a pooler that the net has not."""

    def head(name):
        # A head may be named inside another's name: the longest counts.
        found = (h for h in family.heads if f"{name}.".startswith(f"{h}."))
        return max(found, key=len, default=None)

    asked = {head(name) for ours, name in names.items() if ours.startswith("head/")}
    asked.add(None)
    return {
        k: array
        for k, array in arrays.items()
        if head(k) in asked and (net.pooler or not k.startswith("pooler."))
    }


def _lacking(shapes, names, arrays) -> set[str]:
    """Leaves of head and pooler whose layer the arrays do not have, or have for another number of classes."""
    layers = {}
    for name in shapes:
        if FRESH.search(name):
            layers.setdefault(name.rpartition("/")[0], []).append(name)
    lacking = set()
    for layer, leaves in layers.items():
        theirs = [k for k in arrays if k.rpartition(".")[0] == names[layer]]
        outputs = {shapes[k].shape[-1] for k in leaves}
        other = layer == "head/classifier" and any(
            not outputs.intersection(np.shape(arrays[k])[:1]) for k in theirs
        )
        if other or not theirs:
            lacking |= set(leaves)
    return lacking


def _initial(net, key, wanted) -> dict[str, np.ndarray]:
    """Initial values of the leaves whose names are wanted, of the others nothing is computed."""

    @jax.jit
    def init(key):
        params = tree.flatten(net.init(key, _example(net))["params"])
        return {name: leaf for name, leaf in params.items() if wanted(name)}

    return jax.tree.map(np.asarray, init(key))


def _example(net) -> dict[str, jax.Array]:
    shape = (1, 1, 1) if net.task == "choice" else (1, 1)
    return {"tokens": jnp.zeros(shape, jnp.int32)}
