"""Fitting another project's named arrays into our variables.

A model file says where its layers are in a published checkpoint, as `{our layer: their layer}`; what follows the layer's
name and the order of axes are the same for every network of a framework, and said here once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from squeeze_jax import tree
from squeeze_jax.errors import UserError

# How others end the name of each of our leaves: PyTorch, Caffe as blobs of w and b, Keras, and the oldest BERTs.
ENDINGS = {
    "kernel": (".weight", "/w", "/kernel", "/depthwise_kernel"),
    "scale": (".weight", ".gamma", "/gamma"),
    "bias": (".bias", "/b", ".beta", "/bias", "/beta"),
    "mean": (".running_mean", "/moving_mean"),
    "var": (".running_var", "/moving_variance"),
    "embedding": (".weight",),
    "recurrent_kernel": (".recurrent_weight",),
}
# What carries no weights: PyTorch's counter of batches, and the state of Keras' random numbers.
NO_WEIGHTS = (r"\.num_batches_tracked$", r"(^|/)seed_generator")


def fit(
    arrays: Mapping[str, np.ndarray],
    like,
    names: Mapping[str, str],
    *,
    ignore: Sequence[str] = (),
    channels_last: bool = False,
):
    """Returns variables as `like` with the values of `arrays`.

    Convolutions [out, in, kh, kw] become [kh, kw, in, out] and [out, in, k] [k, in, out]; matrices [out, in] become
    [in, out], or [1, in, out] where the layer is a convolution of sequences. A 1x1 convolution becomes a matrix where the
    layer is dense.

    Args:
      arrays: `{their name: array}`, such as a PyTorch state dict or what `files.read` returns.
      like: our variables or their shapes from `jax.eval_shape`, {"params": …, "batch_stats": …}.
      names: `{our layer: their layer}`, a layer's name being its leaves' without the last part.
      ignore: regexes of their names that have no place here, such as an auxiliary head.
      channels_last: their kernels are [kh, kw, in, out] and [in, out] as ours, depthwise ones [kh, kw, c, 1]: Keras.

    Raises:
      UserError: the names or shapes do not fit; counts what is missing, left over and of another shape, and names the
        first with both shapes.
    """
    used = set()
    problems = {"missing": [], "of another shape": [], "of integers": []}

    def value(name, leaf):
        ours = name.split("/", 1)[1]  # without the collection
        layer, _, end = ours.rpartition("/")
        theirs = _find(arrays, names.get(layer), end)
        if theirs is None:
            found = f"{names[layer]}.*" if layer in names else "a name for the layer"
            problems["missing"].append(f"{ours} {tuple(leaf.shape)} needs {found}")
            return leaf
        used.add(theirs)
        array = _our_layout(np.asarray(arrays[theirs]), end, leaf.shape, channels_last)
        if array.shape != tuple(leaf.shape):
            problems["of another shape"].append(
                f"{ours} should be {tuple(leaf.shape)}, {theirs} is {array.shape}"
            )
        elif array.dtype.kind not in "fV":
            problems["of integers"].append(f"{theirs} is {array.dtype}, not floats")
        return array.astype(leaf.dtype)

    fitted = tree.map_named(value, like)
    known = [re.compile(p) for p in (*NO_WEIGHTS, *ignore)]
    problems["left over"] = [
        f"{name} {np.shape(array)} has no place"
        for name, array in arrays.items()
        if name not in used and not any(p.search(name) for p in known)
    ]
    if any(problems.values()):
        raise UserError(_message(problems))
    return fitted


def check_options(
    names: str, options: Mapping[str, Any], *published: Mapping[str, Any]
) -> None:
    """Checks that a network computes as those did whose weights it gets, where the weights cannot show the difference.

    Args:
      names: whose weights, such as "keras".
      options: the network's, such as {"padding": "symmetric", "epsilon": 1e-5}.
      *published: the same of the published networks; several if there are several kinds.

    Raises:
      UserError: the options are of none of them; says which to set.
    """
    if any(all(options[k] == v for k, v in each.items()) for each in published):
        return
    wanted = [
        " and ".join(f"config.model.{k} = {v!r}" for k, v in each.items())
        for each in published
    ]
    own = " and ".join(f"{k} = {options[k]!r}" for k in published[0])
    raise UserError(
        f"config.init.names = {names!r}: the weights are of a network with other options than {own}: set {', or '.join(wanted)}"
    )


def present(
    names: Mapping[str, str | tuple[str, ...]], arrays: Iterable[str]
) -> dict[str, str]:
    """Returns {our layer: their layer} where versions of a framework call a layer differently.

    Args:
      names: {our layer: their layer, or several names of it}.
      arrays: the names of a file's arrays; they decide. A layer that none of them belongs to keeps its first name.
    """
    layers = {name.rpartition("/")[0] for name in arrays}
    chosen = {}
    for ours, theirs in names.items():
        choices = (theirs,) if isinstance(theirs, str) else theirs
        chosen[ours] = next((c for c in choices if c in layers), choices[0])
    return chosen


def without_biases(
    arrays: Mapping[str, np.ndarray], like, names: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], int]:
    """Subtracts the biases of convolutions that have none here from the running means of the normalisations after them.

    A normalised output is the same: (w x + b - mean) / s = (w x - (mean - b)) / s. In training a batch's mean contains the
    bias, which so has no effect.

    Args:
      arrays, like, names: as in `fit`; the normalisation after "conv1" is "conv1_norm".

    Returns:
      The arrays without these biases, and how many they were.
    """
    arrays, count = dict(arrays), 0
    params = tree.flatten(like["params"])
    for layer, theirs in names.items():
        bias = _find(arrays, theirs, "bias")
        mean = _find(arrays, names.get(f"{layer}_norm"), "mean")
        if not (bias and mean) or f"{layer}/bias" in params:
            continue
        if arrays[bias].shape == arrays[mean].shape:
            arrays[mean] = arrays[mean] - arrays.pop(bias)
            count += 1
    return arrays, count


def state(
    params: Mapping[str, np.ndarray], names: Mapping[str, str], *, sequences: bool
) -> dict[str, np.ndarray]:
    """Our leaves by name as PyTorch has them: the inverse of `fit`, for encoders.

    Args:
      params: {our name: array} as from `tree.flatten`.
      names: as in `fit`.
      sequences: kernels [1, in, out] become convolutions [out, in, 1]; else matrices [out, in]. Longer ones are
        convolutions anyway.
    """
    found = {}
    for name, leaf in params.items():
        layer, _, end = name.rpartition("/")
        array = np.asarray(leaf)
        if end == "kernel":
            single = array.ndim == 3 and len(array) == 1
            array = array[0].T if single and not sequences else array.T
        found[names[layer] + ENDINGS[end][0]] = array
    return found


def shapes(module, *args, **kwargs):
    """The shapes of a Linen module's variables when called with these arguments, to be filled by `fit`."""

    def init(a):
        return module.init(jax.random.key(0), *a, **kwargs)

    return jax.eval_shape(init, args)


def _find(arrays, layer: str | None, end: str) -> str | None:
    endings = ENDINGS.get(end, ()) if layer is not None else ()
    return next((layer + e for e in endings if layer + e in arrays), None)


def misfit(
    arrays: Mapping[str, np.ndarray],
    layer: str,
    wanted: Mapping[str, Sequence[int]],
    *,
    channels_last: bool = False,
) -> str:
    """Returns why a layer of another project does not fit one of ours; "" if it does.

    Args:
      arrays: as in `fit`.
      layer: their name.
      wanted: {our leaf, such as "kernel": shape}.
      channels_last: as in `fit`.
    """
    for end, shape in wanted.items():
        name = _find(arrays, layer, end)
        if name is None:
            return f"the file has no {end} of {layer}"
        array = _our_layout(np.asarray(arrays[name]), end, shape, channels_last)
        if array.shape != tuple(shape):
            return f"{name} is {array.shape}, should be {tuple(shape)}"
    return ""


def _our_layout(
    array: np.ndarray, end: str, shape: Sequence[int], channels_last: bool
) -> np.ndarray:
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


def _message(problems: Mapping[str, list[str]]) -> str:
    counts = [f"{len(found)} {kind}" for kind, found in problems.items() if found]
    first = [line for found in problems.values() for line in found[:3]]
    return f"weights do not fit ({', '.join(counts)}): {'; '.join(first)}"
