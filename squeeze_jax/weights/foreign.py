"""Fits the named arrays of another framework into our variables.

A model file maps its layers to those of a published checkpoint, as `{our layer: their layer}`. The names of the arrays in a
layer and the order of their axes are the same for all networks of a framework, and are defined here once.
"""

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from squeeze_jax import tree
from squeeze_jax.errors import UserError

# {our array: the ends of its name in PyTorch, in Caffe as blobs w and b, in Keras, and in the oldest BERT checkpoints}.
ENDINGS = {
    "kernel": (".weight", "/w", "/kernel", "/depthwise_kernel"),
    "scale": (".weight", ".gamma", "/gamma"),
    "bias": (".bias", "/b", ".beta", "/bias", "/beta"),
    "mean": (".running_mean", "/moving_mean"),
    "var": (".running_var", "/moving_variance"),
    "embedding": (".weight",),
    "recurrent_kernel": (".recurrent_weight",),
}
# Arrays that are not weights: PyTorch's counter of batches, and the state of Keras' random number generator.
NO_WEIGHTS = (r"\.num_batches_tracked$", r"(^|/)seed_generator")


def fit(
    arrays: Mapping[str, np.ndarray],
    like,
    names: Mapping[str, str],
    *,
    ignore: Sequence[str] = (),
    channels_last: bool = False,
    advice: str = "",
):
    """Returns variables with the structure of `like` and the values of `arrays`.

    A convolution kernel [out, in, kh, kw] becomes [kh, kw, in, out], and [out, in, k] becomes [k, in, out]. A matrix [out,
    in] becomes [in, out], or [1, in, out] if our layer is a sequence convolution. A 1x1 convolution kernel becomes a matrix
    if our layer is dense.

    Args:
      arrays: `{their name: array}`, such as a PyTorch state dict or the result of `weight_files.read`.
      like: our variables, or their shapes from `jax.eval_shape`: {"params": …, "batch_stats": …}.
      names: `{our layer: their layer}`. A layer's name is the name of its arrays without the last part.
      ignore: regexes of their names that have no counterpart here, such as an auxiliary head.
      channels_last: whether their kernels are [kh, kw, in, out] and [in, out] like ours, and depthwise kernels
        [kh, kw, c, 1], as in Keras.
      advice: the end of the error, see `advice_for`.

    Raises:
      UserError: names or shapes do not fit. The message counts the arrays that are missing, left over or of another shape,
        and names the first of each with both shapes.
    """
    used = set()
    problems = {"missing": [], "of another shape": [], "of integers": []}

    def value(name, leaf):
        ours = name.split("/", 1)[1]  # the name without its collection
        layer, _, end = ours.rpartition("/")
        theirs = _find_name(arrays, names.get(layer), end)
        if theirs is None:
            needed = f"{names[layer]}.*" if layer in names else "a name for the layer"
            problems["missing"].append(f"{ours} {tuple(leaf.shape)} needs {needed}")
            return leaf
        used.add(theirs)
        array = _to_our_layout(
            np.asarray(arrays[theirs]), end, leaf.shape, channels_last
        )
        if array.shape != tuple(leaf.shape):
            problems["of another shape"].append(
                f"{ours} should be {tuple(leaf.shape)}, {theirs} is {array.shape}"
            )
        elif array.dtype.kind not in "fV":
            problems["of integers"].append(f"{theirs} is {array.dtype}, not floats")
        return array.astype(leaf.dtype)

    fitted = tree.map_named(value, like)
    ignored = [re.compile(p) for p in (*NO_WEIGHTS, *ignore)]
    problems["left over"] = [
        f"{name} {np.shape(array)} has no place"
        for name, array in arrays.items()
        if name not in used and not any(p.search(name) for p in ignored)
    ]
    if any(problems.values()):
        counts = [f"{len(lines)} {kind}" for kind, lines in problems.items() if lines]
        first = [line for lines in problems.values() for line in lines[:3]]
        raise misfit("", first, advice, f" ({', '.join(counts)})")
    return fitted


def misfit(
    place: str, lines: Sequence[str], advice: str = "", counts: str = ""
) -> UserError:
    """Returns the error about weights that do not fit a network; all that loads weights raises it.

    Args:
      place: the file, folder or work directory of the weights; "" if the caller adds it.
      lines: a line about each array that does not fit.
      advice: what to do about it, see `advice_for`.
      counts: text about the numbers of such arrays; without it the first three lines and the number of the others are shown.
    """
    more = ""
    if not counts:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        lines = lines[:3]
    start, end = f"{place}: " if place else "", f"; {advice}" if advice else ""
    return UserError(
        f"{start}weights do not fit{counts}: {'; '.join(lines)}{more}{end}"
    )


def advice_for(module: types.ModuleType) -> str:
    """Returns what to do about weights that do not fit the network of a file.

    Args:
      module: the network's file; one of `models` has `make`, and may have VARIANTS and a CLASSIFIER.
    """
    own = module.__name__.rpartition(".")[0] != "squeeze_jax.models"
    advice = "make the network with the options that the weights belong to"
    if not hasattr(module, "make"):
        advice = "give the network the sizes that the weights have"
    if variants := ", ".join(getattr(module, "VARIANTS", ())):
        advice += f", such as variant (one of {variants})"
    if not own:
        name = module.__name__.rpartition(".")[2]
        advice += f"; python run.py --list=model.{name} lists them"
    elif not hasattr(module, "CLASSIFIER"):
        advice += (
            "; layers that depend on the classes are left fresh if the network's file names them, such as CLASSIFIER ="
            " ('head',)"
        )
    return advice


def check_options(
    names: str, options: Mapping[str, Any], *published: Mapping[str, Any]
) -> None:
    """Checks that a network has the same options as the published network whose weights it loads.

    It checks options that change the computation but do not show in the weights.

    Args:
      names: naming of the weights, such as "keras".
      options: options of the network, such as {"padding": "symmetric", "epsilon": 1e-5}.
      *published: the same options of the published network; several if its weights exist in several kinds.

    Raises:
      UserError: the options match none of the published ones. The message names the options to set.
    """
    if any(all(options[k] == v for k, v in choice.items()) for choice in published):
        return
    wanted = [
        " and ".join(f"config.model.{k} = {v!r}" for k, v in choice.items())
        for choice in published
    ]
    own = " and ".join(f"{k} = {options[k]!r}" for k in published[0])
    raise UserError(
        f"config.init.names = {names!r}: the published network does not have {own}: set {', or '.join(wanted)}"
    )


def resolve_names(
    names: Mapping[str, str | tuple[str, ...]], arrays: Iterable[str]
) -> dict[str, str]:
    """Chooses one name for each layer that versions of a framework name differently.

    Args:
      names: {our layer: their layer, or a tuple of its possible names}.
      arrays: names of a file's arrays, which decide. A layer that has no array in the file gets its first name.

    Returns:
      {our layer: their layer}.
    """
    layers = {name.rpartition(end)[0] for name in arrays for end in "/."}
    resolved = {}
    for ours, theirs in names.items():
        choices = (theirs,) if isinstance(theirs, str) else theirs
        resolved[ours] = next((c for c in choices if c in layers), choices[0])
    return resolved


def fold_biases(
    arrays: Mapping[str, np.ndarray], like, names: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], int]:
    """Removes the biases of convolutions that have no bias here, by folding them into the following batch normalisations.

    The bias is subtracted from the running mean, which leaves the normalised output unchanged:
    (w x + b - mean) / s = (w x - (mean - b)) / s. In training, the batch mean contains the bias, so the bias has no effect.

    Args:
      arrays, like, names: as in `fit`; the normalisation after "conv1" is "conv1_norm".

    Returns:
      (arrays without these biases, number of these biases).
    """
    arrays, count = dict(arrays), 0
    params = tree.flatten(like["params"])
    for layer, theirs in names.items():
        bias = _find_name(arrays, theirs, "bias")
        mean = _find_name(arrays, names.get(f"{layer}_norm"), "mean")
        if not (bias and mean) or f"{layer}/bias" in params:
            continue
        if arrays[bias].shape == arrays[mean].shape:
            arrays[mean] = arrays[mean] - arrays.pop(bias)
            count += 1
    return arrays, count


def to_torch(
    params: Mapping[str, np.ndarray], names: Mapping[str, str], *, sequences: bool
) -> dict[str, np.ndarray]:
    """Converts our parameters to a PyTorch state dict: the inverse of `fit`, for encoders.

    Args:
      params: {our name: array}, as from `tree.flatten`.
      names: as in `fit`.
      sequences: whether kernels [1, in, out] become convolution kernels [out, in, 1] instead of matrices [out, in]. Kernels
        longer than 1 always become convolution kernels.

    Returns:
      {their name: array}.
    """
    arrays = {}
    for name, leaf in params.items():
        layer, _, end = name.rpartition("/")
        array = np.asarray(leaf)
        if end == "kernel":
            single = array.ndim == 3 and len(array) == 1
            array = array[0].T if single and not sequences else array.T
        arrays[names[layer] + ENDINGS[end][0]] = array
    return arrays


def variable_shapes(module, *args, **kwargs):
    """Returns the shapes of a Linen module's variables for these arguments, which `fit` replaces with values."""

    def init(a):
        return module.init(jax.random.key(0), *a, **kwargs)

    return jax.eval_shape(init, args)


def _find_name(arrays, layer: str | None, end: str) -> str | None:
    """Returns the name in `arrays` of one of a layer's arrays, such as its "kernel"; None if it is not there."""
    endings = ENDINGS.get(end, ()) if layer is not None else ()
    return next((layer + e for e in endings if layer + e in arrays), None)


def describe_mismatch(
    arrays: Mapping[str, np.ndarray],
    layer: str,
    wanted: Mapping[str, Sequence[int]],
    *,
    channels_last: bool = False,
) -> str:
    """Describes why the arrays of another framework's layer do not fit our layer; returns "" if they fit.

    Args:
      arrays: as in `fit`.
      layer: their name of the layer.
      wanted: {our array, such as "kernel": its shape}.
      channels_last: as in `fit`.
    """
    for end, shape in wanted.items():
        name = _find_name(arrays, layer, end)
        if name is None:
            return f"the file has no {end} of {layer}"
        array = _to_our_layout(np.asarray(arrays[name]), end, shape, channels_last)
        if array.shape != tuple(shape):
            return f"{name} is {array.shape}, should be {tuple(shape)}"
    return ""


def _to_our_layout(
    array: np.ndarray, end: str, shape: Sequence[int], channels_last: bool
) -> np.ndarray:
    """Transposes another framework's kernel to our layout; see `fit`."""
    if end not in ("kernel", "recurrent_kernel"):
        return array
    if not channels_last:
        if array.ndim == 2 and len(shape) == 3:
            return array.T[None]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    elif array.ndim == len(shape) == 4 and array.shape[3] == shape[2] == 1:
        array = array.swapaxes(2, 3)  # a depthwise kernel, [kh, kw, c, 1]
    if array.ndim == 4 and len(shape) == 2 and array.shape[:2] == (1, 1):
        return array[0, 0]
    return array
