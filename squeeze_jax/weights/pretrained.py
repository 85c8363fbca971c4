"""Published weights for our networks: from a file of another project to {"params", "batch_stats"}.

A model file maps its layers to those of a published checkpoint, one function for each naming: `torchvision_names(net)`,
`timm_names(net)`, `keras_names(net)`, `caffe_names(net)`, and `released_names(net)` for weights that a paper's authors
released, all {our layer: their layer, or a tuple of names that versions of the framework gave it}. They raise a UserError for a network that pads or normalises differently from the published one.
"""

import io
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from flax import traverse_util

from squeeze_jax import files as atomic
from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.weights import files, foreign

Names = Literal["torchvision", "timm", "keras", "caffe", "released", "squeeze_jax"]

OWN = "squeeze_jax"
# Statistics of Keras' layer Normalization, which stands before a network.
_INPUTS = re.compile(r"^normalization(_\d+)?/(mean|variance|count)$")


def check(
    path: str,
    names: str,
    model: str,
    module: types.ModuleType,
    net: nn.Module,
    *,
    key: str = "",
    needed: bool = True,
) -> None:
    """Checks what can be known without reading the weights.

    Args:
      path: of the file.
      names: whose names it has.
      model: the network's name, for errors.
      module: the network's file.
      net: the network.
      key: see `load`.
      needed: whether the file has to exist; a run that continues from a checkpoint does not read it again.

    Raises:
      UserError: no such file, an unknown ending, names that the network has no map for, or a network that computes
        differently from the one whose weights they are.
    """
    if needed:
        files.check(path, key=key)
    known = namings(module)
    if names != OWN and names not in known:
        raise UserError(
            f"config.init.names = {names!r}: {model} knows the names of {', '.join([*sorted(known), OWN])}; choose one"
        )
    if names != OWN:
        getattr(module, f"{names}_names")(net)


def namings(module: types.ModuleType) -> list[str]:
    """Returns the names of the frameworks whose names a network's file maps, in the order in which they are tried."""
    return [n for n in Names.__args__ if callable(getattr(module, f"{n}_names", None))]


def load(
    path: str,
    names: str,
    net: nn.Module,
    module: types.ModuleType,
    like: Mapping[str, Any],
    *,
    under: str = "",
    key: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """Reads a network's weights from a file.

    Args:
      path: .safetensors, .pth, .pt, .bin, .npz, .h5 or .keras; code in a file is never run.
      names: whose names the file has: "torchvision", "timm", "keras", "caffe", "released" by a paper's authors, or
        "squeeze_jax" as `save` writes them.
      net: the network.
      module: its file, for the map of names and the classifier.
      like: {"params", "batch_stats"}, the shapes of its variables.
      under: what stands before each name in the file, such as "backbone".
      key: which part of a PyTorch checkpoint has the weights, such as "model_ema"; "" for the first that can.

    Returns:
      {"params", "batch_stats"} as in `like`, but for a classifier of other classes; and a line for each thing that was
      converted, ignored or left out.

    Raises:
      UserError: the file cannot be read; missing, unexpected or misshapen arrays, the first of each by name.
    """
    arrays, lines = read(path, under=under, key=key)
    fitted, more = fit(arrays, names, net, module, like, path)
    return fitted, lines + more


def read(
    path: str | Path, *, under: str = "", key: str = ""
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads the arrays of a file without what wrappers put before their names; the arguments are those of `load`.

    Returns:
      {name: array} and a line for each thing that was unwrapped or left out.

    Raises:
      UserError: the file cannot be read, or no name begins with `under`.
    """
    lines = []
    arrays = files.read(path, lines, key=key)
    if under and not any(name.startswith(f"{under.rstrip('./')}.") for name in arrays):
        arrays, more = files.unprefixed(arrays)
        lines += more
    arrays, more = _under(arrays, under, path)
    lines += more
    arrays, more = files.unprefixed(arrays)
    lines += more
    if spoiled := [n for n, a in arrays.items() if not _finite(a)]:
        lines.append(f"{len(spoiled)} arrays are not finite, {spoiled[0]} first")
    return arrays, lines


def fit(
    arrays: Mapping[str, np.ndarray],
    names: str,
    net: nn.Module,
    module: types.ModuleType,
    like: Mapping[str, Any],
    path: str | Path,
) -> tuple[dict[str, Any], list[str]]:
    """Fits the arrays that `read` returns into a network's variables.

    Args:
      arrays: {name: array}.
      names, net, module, like: see `load`.
      path: of the file, for errors.

    Returns:
      As `load`, with the lines of what was converted, ignored or left out here.

    Raises:
      UserError: see `load`.
    """
    lines = []
    if names == OWN:
        return _own(arrays, module, like, lines, path)
    layers = foreign.present(getattr(module, f"{names}_names")(net), arrays)
    arrays, more = _without_inputs(arrays) if names == "keras" else (arrays, [])
    lines += more
    arrays = {name: _comparable(array) for name, array in arrays.items()}
    like, ignored, more = _without_classifier(arrays, module, like, layers, names)
    lines += more
    arrays, biases = foreign.without_biases(arrays, like, layers)
    if biases:
        lines.append(
            f"{biases} biases of convolutions subtracted from the means of the normalisations after them"
        )
    if expected := getattr(module, "EXPECTS", {}).get(names):
        lines.append(
            f"the ImageNet weights of {names} expect {expected}: see docs/methods.md"
        )
    counters = [n for n in arrays if n.endswith("num_batches_tracked")]
    if counters:
        lines.append(f"{len(counters)} counters of batches ignored")
    try:
        fitted = foreign.fit(
            arrays, like, layers, ignore=ignored, channels_last=names == "keras"
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return fitted, lines


def save(path: str | Path, variables: Mapping[str, Any]) -> None:
    """Writes {"params", "batch_stats"} under our own names, such as "params/conv1/kernel".

    Args:
      path: ends in .safetensors or .npz; missing folders are made.
      variables: of a network.

    Raises:
      UserError: another ending, or a place that cannot be written to.
    """
    path = atomic.path(path)
    if path.suffix not in (".safetensors", ".npz"):
        raise UserError(f"cannot write weights to {path}: use .safetensors or .npz")
    arrays = {
        name: np.asarray(array)
        for name, array in tree.flatten(
            {k: variables.get(k, {}) for k in ("params", "batch_stats")}
        ).items()
    }
    if path.suffix == ".npz":
        content = io.BytesIO()
        np.savez(content, **arrays)
        atomic.write(path, content.getvalue())
    else:
        atomic.write(path, files.safetensors(arrays))


def _finite(array) -> bool:
    return array.dtype.kind not in "fV" or bool(np.isfinite(_comparable(array)).all())


def _under(arrays, under: str, path):
    if not under:
        return arrays, []
    start = under.rstrip("./") + ("/" if any("/" in n for n in arrays) else ".")
    inside = {
        n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)
    }
    if not inside:
        first = next(iter(arrays), "nothing")
        raise UserError(
            f"config.init.under = {under!r}: no name in {path} begins with {start!r}; there is {first}, for example"
        )
    left = len(arrays) - len(inside)
    return inside, [f"{left} arrays outside of {start!r} left out"] if left else []


def _without_inputs(arrays):
    """Removes the statistics that a Keras network normalises its inputs with, and says what they are."""
    inside = {n: a for n, a in arrays.items() if _INPUTS.match(n)}
    lines = [
        f"{name} = {np.ravel(array).tolist()} left out: config.data.mean and .std normalise the inputs"
        for name, array in inside.items()
        if not name.endswith("/count")
    ]
    return {n: a for n, a in arrays.items() if n not in inside}, lines


def _comparable(array):
    """Casts floats of any width to float32."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind in "fV" else array


def _head(module) -> tuple[str, ...]:
    return tuple(getattr(module, "CLASSIFIER", ()))


def _without_classifier(arrays, module, like, layers, names):
    """Leaves out a classifier that the file does not have or has for other classes.

    Returns the shapes of the rest, patterns of the file's names to ignore, and lines that say so.
    """
    flat, lines, ignored = tree.flatten(like["params"]), [], []
    for layer in _head(module):
        inside = {n: s for n, s in flat.items() if n.startswith(f"{layer}/")}
        theirs = layers.get(layer)
        if theirs is None:
            continue
        pattern = rf"^{re.escape(theirs)}[./]"
        if not inside:
            lines.append(f"classifier {theirs} left out: the network has none")
            ignored.append(pattern)
            continue
        wanted = {end.rpartition("/")[2]: shape.shape for end, shape in inside.items()}
        problem = foreign.misfit(arrays, theirs, wanted, channels_last=names == "keras")
        if problem:
            lines.append(f"classifier {layer} is initialised anew: {problem}")
            flat = {n: s for n, s in flat.items() if n not in inside}
            ignored.append(pattern)
    params = traverse_util.unflatten_dict(flat, sep="/")
    return {**like, "params": params}, ignored, lines


def _own(arrays, module, like, lines, path):
    """Fits arrays that have our own names."""
    wanted = {k: like.get(k, {}) for k in ("params", "batch_stats")}
    flat = tree.flatten(wanted)
    head = tuple(f"params/{layer}/" for layer in _head(module))
    for name in [n for n in flat if n.startswith(head)]:
        array = arrays.get(name)
        if array is None or array.shape != flat[name].shape:
            shape = "missing" if array is None else f"of shape {array.shape}"
            lines.append(f"classifier {name} is initialised anew: {shape} in the file")
            flat.pop(name)
            arrays = {k: v for k, v in arrays.items() if k != name}
    problems = tree.differences(flat, arrays)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: weights do not fit: {'; '.join(problems[:3])}{more}")
    for name in flat:
        if arrays[name].dtype.kind not in "fV":
            raise UserError(
                f"{path}: {name} is {arrays[name].dtype}, not floats: weights of integers need their scales"
            )
    taken = {k: np.asarray(arrays[k], flat[k].dtype) for k in flat}
    fitted = traverse_util.unflatten_dict(taken, sep="/")
    return {k: fitted.get(k, {}) for k in wanted}, lines
