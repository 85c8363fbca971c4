"""Loads published weights into our networks: from a file of another framework to {"params", "batch_stats"}.

A model file maps its layers to those of a published checkpoint, with one function for each naming: `torchvision_names(net)`,
`timm_names(net)`, `keras_names(net)`, `caffe_names(net)`, and `released_names(net)` for weights that a paper's authors
released. Each returns {our layer: their layer, or a tuple of names that versions of the framework use}. It raises a UserError
for a network that pads or normalises differently from the published one.
"""

import io
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np
from flax import traverse_util

from squeeze_jax import files, tree
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.weights import foreign, weight_files

Names = Literal["torchvision", "timm", "keras", "caffe", "released", "squeeze_jax"]

OWN = "squeeze_jax"
_PREFIXES_NAMED = 12  # an error names so many prefixes of a file's names
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
    pattern, omission = getattr(module, "APART", {}).get(names, (None, ""))
    if apart := [n for n in arrays if pattern and re.search(pattern, n)]:
        notes.append(f"{len(apart)} {omission}")
        arrays = {n: a for n, a in arrays.items() if n not in apart}
    counters = [n for n in arrays if n.endswith("num_batches_tracked")]
    if counters:
        notes.append(f"{len(counters)} counters of batches ignored")
    try:
        fitted = foreign.fit(
            arrays,
            like,
            layers,
            ignore=ignored,
            channels_last=names == "keras",
            advice=foreign.advice_for(module),
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
    if files.suffix(path) not in (".safetensors", ".npz"):
        raise UserError(f"cannot write weights to {path}: use .safetensors or .npz")
    arrays = {
        name: np.asarray(array)
        for name, array in tree.flatten(
            {k: variables.get(k, {}) for k in ("params", "batch_stats")}
        ).items()
    }
    if files.suffix(path) == ".npz":
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
        raise UserError(
            f"config.init.under = {under!r}: no name in {path} begins with {start!r}{_near_prefixes(arrays, start)}"
        )
    omitted = len(arrays) - len(selected)
    note = f"{omitted} arrays outside of {start!r} left out"
    return selected, [note] if omitted else []


def _near_prefixes(arrays, start: str) -> str:
    """Returns the end of an error about an unknown prefix: the prefixes of a file's names, to the depth of `start`."""
    separator = start[-1]
    depth = start.count(separator)
    parts = [name.split(separator)[:-1] for name in arrays]
    prefixes = dict.fromkeys(
        separator.join(p[:n])
        for n in range(1, depth + 1)
        for p in parts
        if p[: n - 1] != p[:n]
    )
    if not prefixes:
        return "; its names have no prefixes: leave under out"
    return nearest(start[:-1], list(prefixes)[:_PREFIXES_NAMED])


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


def fit_same_names(
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    classifier: Sequence[str],
    module: types.ModuleType,
    place: str | Path,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Fits arrays whose names are those of a network's variables.

    Leaves out the arrays of a classifier for other classes. In a network whose file names no classifier, it is the layers
    that differ in their number of outputs alone, if everything else fits.

    Args:
      arrays: {name: array}, such as "params/conv1/kernel".
      expected: {name: shape} of the network's variables.
      classifier: layers that depend on the classes.
      module: the network's file, for the error.
      place: where the arrays are from, for the error.

    Returns:
      ({name: array} of what fits, in the dtypes of `expected`; a line about each array that was left out).

    Raises:
      UserError: arrays outside the classifier are missing, unexpected, of another shape or of integers.
    """
    if not classifier:
        classifier = _layers_of_other_widths(arrays, expected)
    heads = tuple(f"{layer}/" for layer in classifier)

    def in_classifier(name):
        return name.partition("/")[2].startswith(heads)

    taken, notes = {}, []
    for name, shape in expected.items():
        array = arrays.get(name)
        if array is not None and np.shape(array) == tuple(shape.shape):
            taken[name] = array
        elif in_classifier(name):
            is_now = "missing" if array is None else f"of shape {np.shape(array)}"
            notes.append(f"classifier {name} is initialised anew: {is_now} in the file")
    notes += [
        f"classifier {name} left out: the network has none"
        for name in arrays
        if name not in expected and in_classifier(name)
    ]
    problems = tree.differences(
        {n: s for n, s in expected.items() if n in taken or not in_classifier(n)},
        {n: a for n, a in arrays.items() if n in taken or not in_classifier(n)},
    )
    if problems:
        raise foreign.misfit(str(place), problems, foreign.advice_for(module))
    for name, array in taken.items():
        if array.dtype.kind not in "fV":
            raise UserError(
                f"{place}: {name} is {array.dtype}, not floats: weights of integers need their scales"
            )
    values = {n: np.asarray(a, expected[n].dtype) for n, a in taken.items()}
    return values, notes


def _layers_of_other_widths(arrays, expected) -> tuple[str, ...]:
    """Returns the layers whose arrays all have another number of outputs; () if anything else does not fit.

    A layer before others cannot be among them: the inputs of the next layer would have another size too.
    """
    layers: dict[str, list[bool]] = {}
    for name, shape in expected.items():
        found, wanted = np.shape(arrays.get(name, ())), tuple(shape.shape)
        if found == wanted:
            continue
        only_width = len(found) == len(wanted) > 0 and found[:-1] == wanted[:-1]
        if not only_width or not name.startswith("params/"):
            return ()
        layers.setdefault(name.rpartition("/")[0], []).append(len(wanted) > 1)
    if any(name not in expected for name in arrays) or not all(
        map(any, layers.values())
    ):
        return ()
    return tuple(layer.partition("/")[2] for layer in layers)


def _fit_own_names(arrays, module, like, notes, path):
    """Fits arrays that have our own names; appends lines about a new classifier to `notes`."""
    wanted = {k: like.get(k, {}) for k in ("params", "batch_stats")}
    values, lines = fit_same_names(
        arrays, tree.flatten(wanted), _classifier_layers(module), module, path
    )
    fitted = traverse_util.unflatten_dict(values, sep="/")
    return {k: fitted.get(k, {}) for k in wanted}, notes + lines
