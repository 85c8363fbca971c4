"""Reads named arrays from Keras files: HDF5 of Keras 1 and 2 (.h5), and Keras 3's .weights.h5 files and .keras archives.

In all three formats an array is named layer/array, such as "block_1_expand/kernel". A layer of a nested network has that
network's name before its own. Keras 3 stores arrays under paths such as layers/conv2d_3/vars/0. The layer's name is an
attribute of that group or, in files of the first versions of Keras 3, only in the archive's config.json.
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
_WEIGHTS = "model_weights"  # group of the weights in a .h5 file of a whole model


def read_hdf5(path: Path, notes: list[str]) -> Arrays:
    """Reads a .h5 file, and notes the omitted groups, such as an optimizer's."""
    with h5py.File(path) as file:
        return _read_arrays(file, {}, notes)


def read_archive(path: Path, notes: list[str]) -> Arrays:
    """Reads a .keras archive."""
    with zipfile.ZipFile(path) as file:
        if "model.weights.h5" not in file.namelist():
            raise ValueError("it holds no model.weights.h5")
        content = io.BytesIO(file.read("model.weights.h5"))
        config = json.loads(file.read("config.json"))
    with h5py.File(content) as file:
        return _read_arrays(file, dict(_names_in_config(config, "")), notes)


def _read_arrays(
    file: h5py.File, names_by_path: Mapping[str, str], notes: list[str]
) -> Arrays:
    """Reads the arrays of a file.

    Args:
      file: the opened file.
      names_by_path: {path of a layer in the file: its name}, from the config of a Keras 3 archive.
      notes: a list that receives a line about omitted groups.
    """
    datasets = dict(_datasets(file, ""))
    if any("vars" in path.split("/") for path in datasets):
        return _read_keras3(file, datasets, names_by_path, notes)
    is_whole_model = _WEIGHTS in file
    if is_whole_model and (others := [key for key in file if key != _WEIGHTS]):
        notes.append(f"{', '.join(others)} left out")
    root, start = (file[_WEIGHTS], f"{_WEIGHTS}/") if is_whole_model else (file, "")
    datasets = {
        path.removeprefix(start): item
        for path, item in datasets.items()
        if path.startswith(start)
    }
    arrays, listed = {}, set()
    for layer in _string_list(root, "layer_names"):
        weights = _string_list(root[layer], "weight_names")
        leaves = [name.rpartition("/")[2] for name in weights]
        # A nested network lists the arrays of all its layers.
        is_network = len(set(leaves)) < len(leaves)
        for name, leaf in zip(weights, leaves, strict=True):
            path = f"{layer}/{name}"
            full = _remove_repeated_part(path) if is_network else f"{layer}/{leaf}"
            arrays[full.removesuffix(":0")] = _read_array(datasets[path])
            listed.add(path)
    for path, item in datasets.items():
        if path not in listed:
            arrays[_remove_repeated_part(path).removesuffix(":0")] = _read_array(item)
    return arrays


def _datasets(group: h5py.Group, path: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yields (path, dataset) of all datasets below a group.

    Raises:
      ValueError: a dataset is a link, lies in another file, or is not stored.
    """
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


def _read_array(dataset: h5py.Dataset) -> np.ndarray:
    """Reads a dataset. HDF5 has no bfloat16, so Keras stores its two bytes as an opaque type."""
    array = np.asarray(dataset)
    return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array


def _string_list(group: h5py.Group, key: str) -> list[str]:
    """Returns an attribute that is a list of names.

    Keras splits a list that is too long for one attribute into key0, key1, and so on.
    """
    chunks = [group.attrs[key]] if key in group.attrs else []
    while not key[-1].isdigit() and f"{key}{len(chunks)}" in group.attrs:
        chunks.append(group.attrs[f"{key}{len(chunks)}"])
    names = [name for chunk in chunks for name in np.ravel(chunk)]
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]


def _remove_repeated_part(name: str) -> str:
    """Removes a repeated first part: `conv1/conv1/kernel` becomes `conv1/kernel`."""
    first, _, remainder = name.partition("/")
    return remainder if remainder.startswith(f"{first}/") else name


def _read_keras3(
    file, datasets, names_by_path: Mapping[str, str], notes: list[str]
) -> Arrays:
    """Reads the arrays of a Keras 3 file; arguments as for `_read_arrays`, with {path: dataset}."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for path, item in datasets.items():
        layer, _, number = f"/{path}".rpartition("/vars/")
        layers.setdefault(layer.removeprefix("/"), {})[number] = item
    arrays = {}
    for layer, variables in layers.items():
        if layer.partition("/")[0] == "optimizer":
            continue
        name = _layer_name(file, layer, names_by_path)
        layer_arrays = [_read_array(variables[n]) for n in sorted(variables, key=int)]
        leaves = _array_names(layer_arrays)
        for leaf, array in zip(leaves, layer_arrays, strict=True):
            if f"{name}/{leaf}" in arrays:
                raise UserError(
                    f"two layers of {Path(file.filename).name} are called {name}: give each layer a name of its own"
                )
            arrays[f"{name}/{leaf}"] = array
    if "optimizer" in file:
        notes.append("optimizer left out")
    return arrays


def _layer_name(file, layer: str, names_by_path: Mapping[str, str]) -> str:
    """Returns a layer's name, preceded by the names of the networks around it."""
    parts, names = layer.split("/"), []
    for end in range(1, len(parts) + 1):
        path = "/".join(parts[:end])
        attributes = file[f"{path}/vars"].attrs if f"{path}/vars" in file else {}
        if name := attributes.get("name", names_by_path.get(path)):
            names.append(str(name))
        elif end == len(parts):
            raise UserError(
                f"the weights file does not name the layer {layer}, because the first versions of Keras 3 store no names: save"
                " the model as .keras or .h5"
            )
    return "/".join(names)


def _array_names(arrays: list[np.ndarray]) -> list[str]:
    """Returns the names of a layer's arrays, which are in Keras' order, from their numbers of axes."""
    axes = [array.ndim for array in arrays]
    if axes == [1, 1, 1, 1]:
        return ["gamma", "beta", "moving_mean", "moving_variance"]
    if len(axes) <= 2 and axes[0] >= 2 and axes[1:] in ([], [1]):
        return ["kernel", "bias"][: len(axes)]
    if len(axes) == 3 and axes[2] == 0:
        return ["mean", "variance", "count"]
    return [f"vars/{n}" for n in range(len(arrays))]


def _names_in_config(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Yields (path in the weights, name) of each layer in a model's config.

    Args:
      config: the config of a model or of a nested network.
      path: path of the nested network, "" for the model.
    """
    counts: dict[str, int] = {}
    for layer in config.get("config", {}).get("layers", ()):
        kind = _snake_case(layer["class_name"])
        number = counts[kind] = counts.get(kind, -1) + 1
        layer_path = f"{path}layers/{kind}" + (f"_{number}" if number else "")
        yield layer_path, layer["config"]["name"]
        yield from _names_in_config(layer, f"{layer_path}/")


def _snake_case(name: str) -> str:
    """Converts a class name as Keras does in paths: DepthwiseConv2D becomes depthwise_conv2d."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
