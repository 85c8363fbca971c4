"""Fitting another project's named arrays into our variables.

A model file says where its layers are in a published checkpoint, as `{our layer: their layer}`; what follows the layer's
name and the order of axes are the same for every network of a framework, and said here once.
"""

import re
from collections.abc import Mapping, Sequence

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
# What carries no weights: PyTorch's counter of batches.
NO_WEIGHTS = (r"\.num_batches_tracked$",)


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
    [in, out], or [1, in, out] where the layer is a convolution of sequences.

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
        array = _our_layout(
            np.asarray(arrays[theirs]), end, len(leaf.shape), channels_last, theirs
        )
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
        array = _our_layout(np.asarray(arrays[name]), end, len(shape), channels_last, name)  # fmt: skip
        if array.shape != tuple(shape):
            return f"{name} is {array.shape}, should be {tuple(shape)}"
    return ""


def _our_layout(
    array: np.ndarray, end: str, axes: int, channels_last: bool, name: str
) -> np.ndarray:
    if end not in ("kernel", "recurrent_kernel"):
        return array
    if channels_last:
        depthwise = name.endswith("/depthwise_kernel")
        return array.swapaxes(2, 3) if depthwise and array.ndim == 4 else array
    if array.ndim == 2 and axes == 3:
        return array.T[None]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _message(problems: Mapping[str, list[str]]) -> str:
    counts = [f"{len(found)} {kind}" for kind, found in problems.items() if found]
    first = [line for found in problems.values() for line in found[:3]]
    return f"weights do not fit ({', '.join(counts)}): {'; '.join(first)}"
