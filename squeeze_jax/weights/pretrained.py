"""Loads published weights into our networks: from a file of another framework to {"params", "batch_stats"}.

A model file maps its layers to those of a published checkpoint, with one function for each naming: `torchvision_names(net)`,
`timm_names(net)`, `keras_names(net)`, `caffe_names(net)`, and `released_names(net)` for weights that a paper's authors
released. Each returns {our layer: their layer, or a tuple of names that versions of the framework use}. It raises a UserError
for a network that pads or normalises differently from the published one.
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

from squeeze_jax import files, tree
from squeeze_jax.errors import UserError
from squeeze_jax.weights import foreign, weight_files

Names = Literal["torchvision", "timm", "keras", "caffe", "released", "squeeze_jax"]

OWN = "squeeze_jax"
# Statistics of Keras' layer Normalization, which normalises the inputs of a network.
_INPUT_STATISTICS = re.compile(r"^normalization(_\d+)?/(mean|variance|count)$")


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
    """Checks a weight file and its naming as far as possible without reading the weights.

    Args:
      path: the file.
      names: naming of its arrays, see `load`.
      model: the network's name, for errors.
      module: the network's file, as a module.
      net: the network.
      key: as for `load`.
      needed: whether the file must exist; a run that continues from a checkpoint does not read it again.

    Raises:
      UserError: the file is missing or of an unknown format, the network has no map for this naming, or it computes differently
        from the network that the weights were trained with.
    """
    if needed:
        weight_files.check(path, key=key)
    known = known_namings(module)
    if names != OWN and names not in known:
        raise UserError(
            f"config.init.names = {names!r}: {model} knows the names of {', '.join([*sorted(known), OWN])}; choose one"
        )
    if names != OWN:
        getattr(module, f"{names}_names")(net)


def known_namings(module: types.ModuleType) -> list[str]:
    """Returns the namings that a network's file has maps for, in the order in which they are tried."""
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
      names: naming of the file's arrays: "torchvision", "timm", "keras", "caffe", "released" (by a paper's authors), or
        "squeeze_jax" as `save` writes them.
      net: the network.
      module: its file, as a module, which has the map of names and the classifier's layers.
      like: {"params", "batch_stats"}, the shapes of its variables.
      under: prefix of the network's names in the file, such as "backbone".
      key: the part of a PyTorch checkpoint that holds the weights, such as "model_ema"; "" for the first suitable part.

    Returns:
      ({"params", "batch_stats"} with the structure of `like`, without a classifier for other classes; a line about each
      conversion and each group of arrays that was ignored or omitted).

    Raises:
      UserError: the file cannot be read, or arrays are missing, unexpected or of another shape; the message names the first of
        each.
    """
    arrays, read_notes = read(path, under=under, key=key)
    fitted, fit_notes = fit(arrays, names, net, module, like, path)
    return fitted, read_notes + fit_notes


def read(
    path: str | Path, *, under: str = "", key: str = ""
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads the arrays of a file and removes the prefixes that wrappers add to their names.

    Args:
      path, under, key: as for `load`.

    Returns:
      ({name: array}, a line about each part that was unwrapped or omitted).

    Raises:
      UserError: the file cannot be read, or no name starts with `under`.
    """
    notes = []
    arrays = weight_files.read(path, notes, key=key)
    if under and not any(name.startswith(f"{under.rstrip('./')}.") for name in arrays):
        arrays, prefix_notes = weight_files.remove_prefixes(arrays)
        notes += prefix_notes
    arrays, under_notes = _select_under(arrays, under, path)
    notes += under_notes
    arrays, prefix_notes = weight_files.remove_prefixes(arrays)
    notes += prefix_notes
    if not_finite := [n for n, a in arrays.items() if not _is_finite(a)]:
        notes.append(f"{len(not_finite)} arrays are not finite, {not_finite[0]} first")
    return arrays, notes


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
      names, net, module, like: as for `load`.
      path: the file, for errors.

    Returns:
      As `load`, with the lines about the conversions and omissions of this step.

    Raises:
      UserError: as `load`.
    """
    notes = []
    if names == OWN:
        return _fit_own_names(arrays, module, like, notes, path)
    layers = foreign.resolve_names(getattr(module, f"{names}_names")(net), arrays)
    if names == "keras":
        arrays, input_notes = _remove_input_statistics(arrays)
        notes += input_notes
    arrays = {name: _to_float32(array) for name, array in arrays.items()}
    like, ignored, classifier_notes = _remove_unfit_classifier(
        arrays, module, like, layers, names
    )
    notes += classifier_notes
    arrays, biases = foreign.fold_biases(arrays, like, layers)
    if biases:
        notes.append(
            f"{biases} biases of convolutions subtracted from the means of the normalisations after them"
        )
    if expected := getattr(module, "EXPECTS", {}).get(names):
        notes.append(
            f"the ImageNet weights of {names} expect {expected}: see docs/methods.md"
        )
    counters = [n for n in arrays if n.endswith("num_batches_tracked")]
    if counters:
        notes.append(f"{len(counters)} counters of batches ignored")
    try:
        fitted = foreign.fit(
            arrays, like, layers, ignore=ignored, channels_last=names == "keras"
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return fitted, notes


def save(path: str | Path, variables: Mapping[str, Any]) -> None:
    """Writes {"params", "batch_stats"} under our own names, such as "params/conv1/kernel".

    Args:
      path: the file, .safetensors or .npz; missing folders are created.
      variables: variables of a network.

    Raises:
      UserError: the file has another suffix or cannot be written.
    """
    path = files.path(path)
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
        files.write(path, content.getvalue())
    else:
        files.write(path, weight_files.to_safetensors(arrays))


def _is_finite(array) -> bool:
    return array.dtype.kind not in "fV" or bool(np.isfinite(_to_float32(array)).all())


def _select_under(arrays, under: str, path):
    """Returns the arrays whose names start with a prefix, without it, and a line about the others."""
    if not under:
        return arrays, []
    start = under.rstrip("./") + ("/" if any("/" in n for n in arrays) else ".")
    selected = {
        n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)
    }
    if not selected:
        first = next(iter(arrays), "nothing")
        raise UserError(
            f"config.init.under = {under!r}: no name in {path} begins with {start!r}; there is {first}, for example"
        )
    omitted = len(arrays) - len(selected)
    note = f"{omitted} arrays outside of {start!r} left out"
    return selected, [note] if omitted else []


def _remove_input_statistics(arrays):
    """Removes the statistics with which a Keras network normalises its inputs, and returns lines that state them."""
    statistics = {n: a for n, a in arrays.items() if _INPUT_STATISTICS.match(n)}
    notes = [
        f"{name} = {np.ravel(array).tolist()} left out: config.data.mean and .std normalise the inputs"
        for name, array in statistics.items()
        if not name.endswith("/count")
    ]
    return {n: a for n, a in arrays.items() if n not in statistics}, notes


def _to_float32(array):
    """Returns an array with floats of any width cast to float32; integers stay unchanged."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind in "fV" else array


def _classifier_layers(module) -> tuple[str, ...]:
    """Returns the layers of a network that depend on the classes."""
    return tuple(getattr(module, "CLASSIFIER", ()))


def _remove_unfit_classifier(arrays, module, like, layers, names):
    """Removes a classifier that the file lacks or has for other classes.

    Args:
      arrays: the file's arrays.
      module, like, names: as for `load`.
      layers: {our layer: their layer}.

    Returns:
      (the shapes without that classifier, regexes of the file's names to ignore, lines about it).
    """
    flat, notes, ignored = tree.flatten(like["params"]), [], []
    for layer in _classifier_layers(module):
        ours = {n: s for n, s in flat.items() if n.startswith(f"{layer}/")}
        theirs = layers.get(layer)
        if theirs is None:
            continue
        pattern = rf"^{re.escape(theirs)}[./]"
        if not ours:
            notes.append(f"classifier {theirs} left out: the network has none")
            ignored.append(pattern)
            continue
        wanted = {end.rpartition("/")[2]: shape.shape for end, shape in ours.items()}
        mismatch = foreign.describe_mismatch(
            arrays, theirs, wanted, channels_last=names == "keras"
        )
        if mismatch:
            notes.append(f"classifier {layer} is initialised anew: {mismatch}")
            flat = {n: s for n, s in flat.items() if n not in ours}
            ignored.append(pattern)
    params = traverse_util.unflatten_dict(flat, sep="/")
    return {**like, "params": params}, ignored, notes


def _fit_own_names(arrays, module, like, notes, path):
    """Fits arrays that have our own names; appends lines about a new classifier to `notes`."""
    wanted = {k: like.get(k, {}) for k in ("params", "batch_stats")}
    flat = tree.flatten(wanted)
    classifier = tuple(f"params/{layer}/" for layer in _classifier_layers(module))
    for name in [n for n in flat if n.startswith(classifier)]:
        array = arrays.get(name)
        if array is None or array.shape != flat[name].shape:
            shape = "missing" if array is None else f"of shape {array.shape}"
            notes.append(f"classifier {name} is initialised anew: {shape} in the file")
            flat.pop(name)
            arrays = {k: v for k, v in arrays.items() if k != name}
    problems = tree.differences(flat, arrays)
    if problems:
        others = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path}: weights do not fit: {'; '.join(problems[:3])}{others}; make the network with the options that the file"
            " belongs to, such as variant or width"
        )
    for name in flat:
        if arrays[name].dtype.kind not in "fV":
            raise UserError(
                f"{path}: {name} is {arrays[name].dtype}, not floats: weights of integers need their scales"
            )
    values = {k: np.asarray(arrays[k], flat[k].dtype) for k in flat}
    fitted = traverse_util.unflatten_dict(values, sep="/")
    return {k: fitted.get(k, {}) for k in wanted}, notes
