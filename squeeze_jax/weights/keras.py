"""Named arrays from Keras' files: HDF5 of Keras 1 and 2 (.h5), Keras 3's .weights.h5 and its .keras archives.

In all three an array is called layer/array, such as "block_1_expand/kernel"; a layer of a network inside of another
network has that network's name before its own. Keras 3 stores arrays as layers/conv2d_3/vars/0: the layer's name is an
attribute there or, in files of its first versions, in the archive's config.json alone.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from squeeze_jax.errors import UserError

Arrays = dict[str, np.ndarray]
_WEIGHTS = "model_weights"  # where whole models, saved as .h5, have their weights


def hdf5(path: Path, notes: list[str]) -> Arrays:
    """Reads a .h5 file; notes the groups that are left out, such as an optimizer's."""
    with h5py.File(path) as file:
        return _arrays(file, {}, notes)


def archive(path: Path, notes: list[str]) -> Arrays:
    """Reads a .keras archive."""
    with zipfile.ZipFile(path) as file:
        if "model.weights.h5" not in file.namelist():
            raise ValueError("it holds no model.weights.h5")
        content = io.BytesIO(file.read("model.weights.h5"))
        config = json.loads(file.read("config.json"))
    with h5py.File(content) as file:
        return _arrays(file, dict(_configured(config, "")), notes)


def _arrays(file: h5py.File, configured: Mapping[str, str], notes: list[str]) -> Arrays:
    datasets = dict(_datasets(file, ""))
    if any("vars" in path.split("/") for path in datasets):
        return _third(file, datasets, configured, notes)
    whole = _WEIGHTS in file
    if whole and (others := [key for key in file if key != _WEIGHTS]):
        notes.append(f"{', '.join(others)} left out")
    root, start = (file[_WEIGHTS], f"{_WEIGHTS}/") if whole else (file, "")
    datasets = {
        path.removeprefix(start): item
        for path, item in datasets.items()
        if path.startswith(start)
    }
    arrays, listed = {}, set()
    for layer in _strings(root, "layer_names"):
        weights = _strings(root[layer], "weight_names")
        leaves = [name.rpartition("/")[2] for name in weights]
        # A network inside of this one lists the arrays of all its layers.
        inner = len(set(leaves)) < len(leaves)
        for name, leaf in zip(weights, leaves, strict=True):
            path = f"{layer}/{name}"
            called = _once(path) if inner else f"{layer}/{leaf}"
            arrays[called.removesuffix(":0")] = _array(datasets[path])
            listed.add(path)
    for path, item in datasets.items():
        if path not in listed:
            arrays[_once(path).removesuffix(":0")] = _array(item)
    return arrays


def _datasets(group: h5py.Group, path: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yields the path and the dataset of everything that is stored in the file itself."""
    for key in group:
        name = f"{path}{key}"
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is a link to another place")
        item = group[key]
        if isinstance(item, h5py.Group):
            yield from _datasets(item, f"{name}/")
        elif item.external:
            raise ValueError(f"{name} lies in another file")
        elif item.size and not item.id.get_storage_size():
            raise ValueError(f"{name} of shape {item.shape} is not stored")
        else:
            yield name, item


def _array(dataset: h5py.Dataset) -> np.ndarray:
    """Reads a dataset; HDF5 has no bfloat16, so that Keras stores its two bytes as opaque ones."""
    array = np.asarray(dataset)
    return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array


def _strings(group: h5py.Group, key: str) -> list[str]:
    """Returns an attribute's names; Keras cuts a list that is too long for one attribute into key0, key1, and so on."""
    chunks = [group.attrs[key]] if key in group.attrs else []
    while not key[-1].isdigit() and f"{key}{len(chunks)}" in group.attrs:
        chunks.append(group.attrs[f"{key}{len(chunks)}"])
    names = [name for chunk in chunks for name in np.ravel(chunk)]
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]


def _once(name: str) -> str:
    """Removes a repeated first part: `conv1/conv1/kernel` becomes `conv1/kernel`."""
    first, _, rest = name.partition("/")
    return rest if rest.startswith(f"{first}/") else name


def _third(file, datasets, configured: Mapping[str, str], notes: list[str]) -> Arrays:
    """Reads Keras 3's layout."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for path, item in datasets.items():
        layer, _, number = f"/{path}".rpartition("/vars/")
        layers.setdefault(layer.removeprefix("/"), {})[number] = item
    arrays = {}
    for layer, variables in layers.items():
        if layer.partition("/")[0] == "optimizer":
            continue
        name = _name(file, layer, configured)
        found = [_array(variables[n]) for n in sorted(variables, key=int)]
        for leaf, array in zip(_leaves(found), found, strict=True):
            if f"{name}/{leaf}" in arrays:
                raise UserError(
                    f"two layers of {Path(file.filename).name} are called {name}: give each layer a name of its own"
                )
            arrays[f"{name}/{leaf}"] = array
    if "optimizer" in file:
        notes.append("optimizer left out")
    return arrays


def _name(file, layer: str, configured: Mapping[str, str]) -> str:
    """Returns a layer's name, after the names of the networks that it is inside of."""
    parts, names = layer.split("/"), []
    for end in range(1, len(parts) + 1):
        path = "/".join(parts[:end])
        attributes = file[f"{path}/vars"].attrs if f"{path}/vars" in file else {}
        if name := attributes.get("name", configured.get(path)):
            names.append(str(name))
        elif end == len(parts):
            raise UserError(
                f"the weights file does not tell which layer {layer} is, as those of Keras' first version 3 do not: save"
                " the model as .keras or .h5"
            )
    return "/".join(names)


def _leaves(arrays: list[np.ndarray]) -> list[str]:
    """Returns the names of a layer's arrays by their shapes, in Keras' order."""
    axes = [array.ndim for array in arrays]
    if axes == [1, 1, 1, 1]:
        return ["gamma", "beta", "moving_mean", "moving_variance"]
    if len(axes) <= 2 and axes[0] >= 2 and axes[1:] in ([], [1]):
        return ["kernel", "bias"][: len(axes)]
    if len(axes) == 3 and axes[2] == 0:
        return ["mean", "variance", "count"]
    return [f"vars/{n}" for n in range(len(arrays))]


def _configured(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Yields each layer's path in the weights and its name, by a model's config."""
    counts: dict[str, int] = {}
    for layer in config.get("config", {}).get("layers", ()):
        kind = _snake(layer["class_name"])
        number = counts[kind] = counts.get(kind, -1) + 1
        place = f"{path}layers/{kind}" + (f"_{number}" if number else "")
        yield place, layer["config"]["name"]
        yield from _configured(layer, f"{place}/")


def _snake(name: str) -> str:
    """Writes a class's name as Keras does in paths: DepthwiseConv2D becomes depthwise_conv2d."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
