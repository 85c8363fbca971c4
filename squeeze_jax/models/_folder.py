"""Loads encoders from folders in the format of Hugging Face's `transformers`, and saves them as such folders."""

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

# Layers that may be initialised if a folder lacks them.
INITIALISABLE = re.compile(r"^(head|pooler)/")
# Tensors that are not weights.
NO_WEIGHTS = (
    r"(^|\.)(position_ids|token_type_ids)$",
    r"(^|\.)attn\.(masked_)?bias$",  # the causal mask in old GPT-2 checkpoints
)


def load(
    folder: str | Path,
    *,
    task: str | None = None,
    fresh: jax.Array | None = None,
    **options: Any,
) -> tuple[nn.Module, dict]:
    """Builds the encoder of a folder and loads its weights.

    Args:
      folder: a folder with config.json and model.safetensors or pytorch_model.bin, in one file or several.
      task: the task of the head, see `nn.heads.Head`; None for the folder's. Other heads in the folder are ignored.
      fresh: a key from `jax.random.key` that initialises layers of the head and the pooler which the folder lacks or has for
        another number of classes; without a key, such layers are an error.
      **options: options of the architecture's `make` that replace those in config.json, such as dropout=0.0, num_classes=3.

    Returns:
      (the network, its variables as float32 NumPy arrays).

    Raises:
      UserError: the architecture or an option is unknown, there are no weights, or tensors are missing, left over or of
        another shape.
    """
    net, variables, _ = load_and_list_fresh(folder, task, fresh, options)
    return net, variables


def load_and_list_fresh(
    folder: str | Path,
    task: str | None,
    fresh: jax.Array | None,
    options: Mapping[str, Any],
) -> tuple[nn.Module, dict, tuple[str, ...]]:
    """Loads an encoder as `load` does; returns (network, variables, layers that were initialised)."""
    folder = files.path(folder)
    config = huggingface.read_config(folder)
    module = _module(config, folder)
    family = module.HUGGINGFACE
    task = task or huggingface.task_from_config(config, family)
    if task is None:
        architectures = config.get("architectures") or "no architecture"
        known = ", ".join(family.classes.values())
        raise UserError(
            f"{folder / huggingface.CONFIG} names {architectures}: give a task, or a folder of one of {known}"
        )
    try:
        make_options = {"task": task, "num_classes": huggingface.count_classes(config)}
        make_options |= module.from_huggingface(config) | options
        registry.check(module.make, make_options, "options")
        net = module.make(**make_options)
        return net, *_fit_arrays(net, huggingface.read_arrays(folder), module, fresh)
    except UserError as error:
        where = "" if str(folder) in str(error) else f"{folder}: "
        raise UserError(f"{where}{error}") from None


def load_into(
    folder: str | Path, net: nn.Module, fresh: jax.Array | None
) -> tuple[dict, tuple[str, ...]]:
    """Loads the variables of an existing encoder from a folder.

    Args:
      folder, fresh: as for `load`.
      net: an encoder of `models`.

    Returns:
      (variables, layers that were initialised).

    Raises:
      UserError: the folder holds another architecture; or as for `load`.
    """
    folder = files.path(folder)
    module = _module(huggingface.read_config(folder), folder)
    if sys.modules[type(net).__module__] is not module:
        raise UserError(
            f"{folder} holds the network {module.HUGGINGFACE.model_type!r}, not {type(net).__name__}"
        )
    try:
        return _fit_arrays(net, huggingface.read_arrays(folder), module, fresh)
    except UserError as error:
        where = "" if str(folder) in str(error) else f"{folder}: "
        raise UserError(f"{where}{error}") from None


def options(folder: str | Path) -> dict[str, Any]:
    """Returns the arguments of `models.make` for the encoder of a folder, without task and number of classes.

    Raises:
      UserError: the folder has no config.json, or the architecture is unknown.
    """
    folder = files.path(folder)
    config = huggingface.read_config(folder)
    module = _module(config, folder)
    return {"name": module.HUGGINGFACE.model_type, **module.from_huggingface(config)}


def class_names(folder: str | Path) -> tuple[str, ...] | None:
    """Returns the class names of a folder's head; None if its head has no classes or does not name them.

    Raises:
      UserError: the folder has no config.json, the architecture is unknown, or id2label does not map numbers to names.
    """
    folder = files.path(folder)
    config = huggingface.read_config(folder)
    task = huggingface.task_from_config(config, _module(config, folder).HUGGINGFACE)
    return (
        huggingface.class_names(config)
        if task in ("classification", "tokens")
        else None
    )


def problem_type(folder: str | Path) -> str:
    """Returns the `problem_type` of a folder's config.json; "" if it has none or the folder holds no classifier.

    Raises:
      UserError: the folder has no config.json, or the architecture is unknown.
    """
    folder = files.path(folder)
    config = huggingface.read_config(folder)
    task = huggingface.task_from_config(config, _module(config, folder).HUGGINGFACE)
    return str(config.get("problem_type") or "") if task == "classification" else ""


def save(
    folder: str | Path,
    net: nn.Module,
    variables: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes an encoder to a folder that `transformers` and `load` read: config.json and model.safetensors in float32.

    If the class in `transformers` has a pooler and the network has none, an initialised one is written: the network does not
    need it. If the class has no pooler, the network's is omitted.

    Args:
      folder: the folder, created if it does not exist; other files in it, such as the tokenizer's, stay.
      net: an encoder of `models`.
      variables: its {"params": …}.
      config: additional entries of config.json, such as {"id2label": {0: "negative", 1: "positive"}}.

    Raises:
      UserError: `transformers` has no class for the network or computes it differently, or the variables do not belong to the
        network.
    """
    if isinstance(net, Reshaped):
        raise UserError(
            "transformers supports no changed widths or absent layers: it could not load this network"
        )
    if getattr(net, "num_classes", 0) is None:
        raise UserError(
            "the net has no head, num_classes = None: save it with task='features'"
        )
    module = sys.modules[type(net).__module__]
    if not hasattr(module, "HUGGINGFACE"):
        raise UserError(f"transformers has no encoder {type(net).__name__}")
    family = module.HUGGINGFACE
    if net.task not in family.classes:
        raise UserError(
            f"transformers has no {family.model_type} for task {net.task!r}: save it for one of"
            f" {', '.join(family.classes)}"
        )
    lines = tree.differences(
        foreign.variable_shapes(net, _example(net))["params"], variables["params"]
    )
    if lines:
        raise foreign.misfit("the variables", lines, foreign.advice_for(module))
    params = tree.flatten(variables["params"])
    params = {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}
    pooled = net.task in family.pooled
    params = {k: v for k, v in params.items() if pooled or not k.startswith("pooler/")}
    if pooled and not net.pooler:
        net = net.clone(pooler=True)
        params |= _initial_values(
            net, jax.random.key(0), lambda k: k.startswith("pooler/")
        )
    names = module.huggingface_names(net)
    if net.task != "features":
        names = {
            ours: theirs if ours.startswith("head/") else f"{family.prefix}.{theirs}"
            for ours, theirs in names.items()
        }
    content = {
        "architectures": [family.classes[net.task]],
        "model_type": family.model_type,
        "dtype": "float32",
        **module.to_huggingface(net),
    }
    if net.task in ("classification", "tokens"):
        content["id2label"] = {n: f"LABEL_{n}" for n in range(net.num_classes)}
    content |= config or {}
    if "id2label" in content:
        classes = content["id2label"]
        if len(classes) != net.num_classes:
            raise UserError(
                f"config has {len(classes)} labels in id2label: the net has num_classes = {net.num_classes}"
            )
        numbers = {name: int(n) for n, name in classes.items()}
        content.setdefault("label2id", numbers)
    arrays = foreign.to_torch(params, names, sequences=family.conv1d)
    huggingface.write(folder, content, family.pack(arrays, net))


def _module(config: Mapping[str, Any], folder: Path):
    """Returns the file of an architecture as a module; its name is the `model_type` of config.json.

    Raises:
      UserError: `model_type` is missing or unknown.
    """
    kind = config.get("model_type")
    package = __package__
    if kind in registry.names(package):
        module = registry.load(package, kind)
        if hasattr(module, "HUGGINGFACE"):
            return module
    modules = [registry.load(package, name) for name in registry.names(package)]
    known = [m.HUGGINGFACE.model_type for m in modules if hasattr(m, "HUGGINGFACE")]
    problem = "no model_type" if kind is None else f"unknown model_type {kind!r}"
    raise UserError(
        f"{folder / huggingface.CONFIG}: {problem}{nearest(kind or '', known)}"
    )


def _fit_arrays(net, arrays, module, fresh):
    """Fits a folder's tensors into a network's variables.

    Args:
      net: the network.
      arrays: {name: tensor} of the folder.
      module: the network's file, as a module.
      fresh: as for `load`.

    Returns:
      (variables, layers that were initialised).
    """
    names, family = module.huggingface_names(net), module.HUGGINGFACE
    shapes = tree.flatten(foreign.variable_shapes(net, _example(net))["params"])
    arrays = _select_arrays(
        huggingface.remove_prefix(arrays, family), net, names, family
    )
    arrays = family.unpack(huggingface.merge_tied(arrays, family), net)
    missing = _missing_names(shapes, names, arrays)
    if missing and fresh is None:
        layers = ", ".join(sorted({k.rpartition("/")[0] for k in missing}))
        without = "leave it out by pooler=False, " if net.task == "features" else ""
        raise UserError(
            f"no weights for {layers} of task {net.task!r} with these classes: {without}train them first, or give"
            " fresh=jax.random.key(0) to initialise them"
        )
    ignore = [*NO_WEIGHTS]
    for name in missing:
        ignore.append(rf"^{re.escape(names[name.rpartition('/')[0]])}\.[^.]+$")
    wanted = {k: v for k, v in shapes.items() if k not in missing}
    like = {"params": traverse_util.unflatten_dict(wanted, sep="/")}
    advice = foreign.advice_for(module)
    fitted = foreign.fit(arrays, like, names, ignore=ignore, advice=advice)
    params = tree.flatten(fitted["params"])
    if missing:
        params |= _initial_values(net, fresh, lambda name: name in missing)
    layers = tuple(sorted({name.rpartition("/")[0] for name in missing}))
    return {"params": traverse_util.unflatten_dict(params, sep="/")}, layers


def _select_arrays(arrays, net, names, family):
    """Returns the arrays without those of other tasks' heads, and without a pooler that the network does not have."""

    def head(name):
        # One head's name may start with another's: the longest match counts.
        heads = (h for h in family.heads if f"{name}.".startswith(f"{h}."))
        return max(heads, key=len, default=None)

    used_heads = {
        head(name) for ours, name in names.items() if ours.startswith("head/")
    }
    used_heads.add(None)
    return {
        k: array
        for k, array in arrays.items()
        if head(k) in used_heads and (net.pooler or not k.startswith("pooler."))
    }


def _missing_names(shapes, names, arrays) -> set[str]:
    """Returns the parameters of head and pooler whose layer the arrays lack, or have for another number of classes.

    Args:
      shapes: {our parameter: its shape}.
      names: {our layer: their layer}.
      arrays: {their name: array}.
    """
    layers = {}
    for name in shapes:
        if INITIALISABLE.search(name):
            layers.setdefault(name.rpartition("/")[0], []).append(name)
    missing = set()
    for layer, ours in layers.items():
        theirs = [k for k in arrays if k.rpartition(".")[0] == names[layer]]
        outputs = {shapes[k].shape[-1] for k in ours}
        has_other_classes = layer == "head/classifier" and any(
            not outputs.intersection(np.shape(arrays[k])[:1]) for k in theirs
        )
        if has_other_classes or not theirs:
            missing |= set(ours)
    return missing


def _initial_values(net, key, wanted) -> dict[str, np.ndarray]:
    """Returns initial values of the parameters whose names satisfy `wanted`; the others are not computed."""

    @jax.jit
    def init(key):
        params = tree.flatten(net.init(key, _example(net))["params"])
        return {name: leaf for name, leaf in params.items() if wanted(name)}

    return jax.tree.map(np.asarray, init(key))


def _example(net) -> dict[str, jax.Array]:
    """Returns an input of one token."""
    shape = (1, 1, 1) if net.task == "choice" else (1, 1)
    return {"tokens": jnp.zeros(shape, jnp.int32)}
