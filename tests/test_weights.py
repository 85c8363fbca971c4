"""Foreign files are read as their own libraries wrote them, and what does not fit is named and counted."""

import argparse
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from squeeze_jax import models
from squeeze_jax.errors import UserError
from squeeze_jax.models.squeezenet import torchvision_names
from squeeze_jax.weights import foreign, weight_files


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(4, 3, 2, 1)).astype(np.float32),
        "half": rng.normal(size=(3,)).astype(np.float16),
        "count": np.array(7),
    }


def test_safetensors_are_read_as_written(tmp_path, arrays):
    arrays["brain"] = np.asarray(jnp.linspace(-1, 1, 5).astype(jnp.bfloat16))
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    found = weight_files.read(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_npz_and_torch_files_are_read_as_written(tmp_path, arrays):
    np.savez(tmp_path / "w.npz", **arrays)
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    for name in ("w.npz", "w.pth"):
        found = weight_files.read(tmp_path / name)
        assert found.keys() == arrays.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[key], array)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.pt"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x10\0\0\0\0\0\0\0 not what it says it is")
    with pytest.raises(UserError, match=f"{name} is damaged") as error:
        weight_files.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "header",
    [
        "12",
        "[1]",
        '{"a": [1]}',
        '{"a": null}',
        '{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}',
        '{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_a_header_of_something_else_is_damaged(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(UserError, match=r"w\.safetensors is damaged"):
        weight_files.read(path)


def test_numbers_that_are_not_read_are_named(tmp_path):
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}'
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    with pytest.raises(UserError, match=r"a in .* is F8_E4M3, which is not read"):
        weight_files.read(path)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "w.bin"])
def test_what_git_left_instead_of_weights_is_named(tmp_path, name):
    # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
    )
    with pytest.raises(
        UserError, match=f"{name} is a pointer of Git LFS.*git lfs pull"
    ):
        weight_files.read(tmp_path / name)


def test_parameters_are_tensors(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "w.bin")
    assert weight_files.read(tmp_path / "w.bin")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list: it should be what a network's state_dict"),
        (torch.ones(2), "holds a Tensor: "),
        ({"state_dict": 1}, "holds 'state_dict', which is no tensor"),
        ({"net": {"a": torch.ones(2)}, "epoch": 3}, "holds 'net', which is no tensor"),
        ({"a": torch.ones(2).to_sparse()}, "holds 'a', which is no tensor"),
    ],
)
def test_checkpoints_of_something_else_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        weight_files.read(tmp_path / "w.pt")


def test_pickled_networks_and_programs_are_named(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    path = tmp_path / "w.pth"
    torch.save(net, path)
    with pytest.raises(UserError, match=r"holds a pickled torch\.nn.*\.Sequential, .*net\.state_dict") as error:  # fmt: skip
        weight_files.read(path)
    torch.save({"args": argparse.Namespace(lr=1), "w": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"holds a pickled argparse\.Namespace"):
        weight_files.read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), path)
    with pytest.raises(UserError, match="holds a TorchScript program"):
        weight_files.read(path)
    assert "damaged" not in str(error.value)


def test_casts_to_float32_are_said(tmp_path):
    kept = {"a": np.ones(2, np.float32), "n": np.ones(2, np.int64)}
    narrow = {"b": np.ones(2, np.float16), "c": np.ones(2, np.float16)}
    wide = {"d": np.float64([0.1])}
    said = ["2 arrays of float16 are cast to float32", "1 arrays of float64 are cast to float32"]  # fmt: skip
    np.savez(tmp_path / "w.npz", **kept, **narrow, **wide)
    tensors = {k: torch.tensor(v) for k, v in (kept | narrow | wide).items()}
    brain = {"e": torch.tensor([0.1, -3.0], dtype=torch.bfloat16)}
    torch.save(tensors, tmp_path / "w.pth")
    torch.save(brain, tmp_path / "brain.pth")
    for name in "w.npz", "w.pth":
        arrays = weight_files.read(tmp_path / name, notes := [])
        assert notes == said
        assert arrays["d"][0] == 0.1
        assert arrays["b"].dtype == np.float16
    found = weight_files.read(tmp_path / "brain.pth", notes := [])["e"]
    np.testing.assert_array_equal(found.astype("f4"), brain["e"].float().numpy())
    assert notes == ["1 arrays of bfloat16 are cast to float32"]


def test_a_truncated_safetensors_file_is_damaged(tmp_path, arrays):
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file(arrays, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="damaged"):
        weight_files.read(path)


def test_missing_files_and_unknown_endings_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no weights file .*w\.npz"):
        weight_files.read(tmp_path / "w.npz")
    with pytest.raises(UserError, match=r"unknown ending: use \.npz"):
        weight_files.read(tmp_path / "w.onnx")


@pytest.fixture(scope="module")
def tiny():
    """A net, its shapes, and a checkpoint of it in PyTorch's names and layout."""
    net = models.make("squeezenet", variant="tiny", num_classes=5)
    like = foreign.variable_shapes(net, jnp.zeros((1, 32, 32, 3)))
    rng, checkpoint = np.random.default_rng(0), {}
    for ours, theirs in torchvision_names(net).items():
        leaves = like["params"]
        for part in ours.split("/"):
            leaves = leaves[part]
        h, w, i, o = leaves["kernel"].shape
        checkpoint[f"{theirs}.weight"] = rng.normal(size=(o, i, h, w))
        checkpoint[f"{theirs}.bias"] = rng.normal(size=(o,))
    return net, like, checkpoint


def test_fitted_variables_have_the_structure_and_dtype_asked_for(tiny):
    net, like, checkpoint = tiny
    checkpoint = {**checkpoint, "classifier.1.num_batches_tracked": np.array(3)}
    fitted = foreign.fit(checkpoint, like, torchvision_names(net))

    def types(t):
        return jax.tree.map(lambda a: (a.shape, a.dtype), t)

    assert types(fitted) == types(like)
    kernel = fitted["params"]["fire2"]["expand3x3"]["kernel"]
    expected = checkpoint["features.3.expand3x3.weight"]
    np.testing.assert_array_equal(kernel[2, 0, 1, 3], expected[3, 1, 2, 0].astype("f4"))


def test_what_does_not_fit_is_named_and_counted(tiny):
    net, like, checkpoint = tiny
    checkpoint = dict(checkpoint)
    del checkpoint["features.3.squeeze.bias"]
    checkpoint["aux.weight"] = np.zeros((2, 3))
    checkpoint["features.0.weight"] = np.zeros((8, 3, 7, 7))
    with pytest.raises(UserError) as error:
        foreign.fit(checkpoint, like, torchvision_names(net))
    assert str(error.value) == (
        "weights do not fit (1 missing, 1 of another shape, 1 left over): "
        "fire2/squeeze1x1/bias (4,) needs features.3.squeeze.*; "
        "conv1/kernel should be (3, 3, 3, 8), features.0.weight is (7, 7, 3, 8); "
        "aux.weight (2, 3) has no place"
    )
    del checkpoint["features.0.weight"]
    with pytest.raises(UserError, match=r"\(2 missing\)"):
        foreign.fit(checkpoint, like, torchvision_names(net), ignore=["^aux"])


def test_a_layer_without_a_foreign_name_is_missing(tiny):
    _, like, checkpoint = tiny
    with pytest.raises(UserError, match=r"16 missing, 16 left over\): conv1/bias"):
        foreign.fit(checkpoint, like, {})
