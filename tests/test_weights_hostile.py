"""Weight files that would run code, write outside of themselves or never end: one line each, and nothing happens."""

import io
import os
import pickle
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
import torch

from squeeze_jax.errors import UserError
from squeeze_jax.weights import weight_files

NOT_RUN = "code in (one|a file) is not run"


class Code:
    """A pickle of it creates a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


class Inside:
    """Hides code in the state of a harmless object."""

    def __reduce__(self):
        return dict, (), {"weight": [Code()]}


def zipped(path):
    torch.save({"state_dict": {"weight": torch.ones(2), "more": [Code()]}}, path)


def legacy(path):
    """The format of PyTorch 1.5 and before, which is no zip archive."""
    torch.save({"weight": Code()}, path, _use_new_zipfile_serialization=False)


def nested(path):
    torch.save({"state_dict": Inside()}, path)


def system(path):
    """Protocol 0: GLOBAL os.system, called with a command."""
    path.write_bytes(b"cos\nsystem\n(S'mkdir owned'\ntR.")


def protocol_4(path):
    path.write_bytes(pickle.dumps({"weight": Code()}, protocol=4))


def replaced(path):
    """An archive of PyTorch in which another pickle lies."""
    good = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, good)
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            pickled = name.endswith("data.pkl")
            content = pickle.dumps(Code()) if pickled else archive.read(name)
            changed.writestr(name, content)


def tar(path):
    """The format of PyTorch before 0.1.10, with names that lead out of a folder."""
    with tarfile.open(path, "w") as archive:
        for name in ("../owned", "sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Code())
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def objects(path):
    np.savez(path, weight=np.array([Code()], dtype=object))


@pytest.mark.parametrize(
    ("write", "ending", "words"),
    [
        (zipped, "pth", NOT_RUN),
        (legacy, "pth", NOT_RUN),
        (nested, "pt", NOT_RUN),
        (system, "bin", NOT_RUN),
        (protocol_4, "pth", NOT_RUN),
        (replaced, "pth", NOT_RUN),
        (tar, "pth", NOT_RUN),
        (objects, "npz", "no archive of plain arrays"),
    ],
)
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, write, ending, words):
    folder = tmp_path / "inside"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / f"hostile.{ending}"
    write(path)
    with pytest.raises(UserError, match=words) as caught:
        weight_files.read(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # how to run it all the same
    assert sorted(tmp_path.rglob("*")) == [folder, path]


def test_names_that_lead_out_of_an_archive_write_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "inside"
    folder.mkdir()
    monkeypatch.chdir(folder)
    content = io.BytesIO()
    np.save(content, np.ones(2))
    with zipfile.ZipFile(folder / "w.npz", "w") as archive:
        archive.writestr("../owned.npy", content.getvalue())
    with zipfile.ZipFile(folder / "w.keras", "w") as archive:
        archive.writestr("../model.weights.h5", b"")
        archive.writestr("config.json", b"{}")
    torch.save({"weight": torch.ones(2)}, folder / "w.pth")
    with zipfile.ZipFile(folder / "w.pth", "a") as archive:
        archive.writestr("../owned", b"")
    assert list(weight_files.read(folder / "w.npz")) == ["../owned"]  # a name, no place
    for name, words in (
        ("w.pth", "not in a subdirectory"),
        ("w.keras", "holds no model"),
    ):
        with pytest.raises(UserError, match=rf"damaged \(.*{words}") as caught:
            weight_files.read(folder / name)
        assert "\n" not in str(caught.value)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["inside", "w.keras", "w.npz", "w.pth"]


def cycle(file):
    file["group/again"] = file["/"]


def unnumbered(file):
    file["layers/dense/vars/kernel"] = np.ones(2)
    file["layers/dense/vars"].attrs["name"] = "dense"


def missing(file):
    file.create_group("dense").attrs["weight_names"] = ["dense/kernel:0"]
    file.attrs["layer_names"] = ["dense"]


def outside(file):
    file["model_weights"] = h5py.ExternalLink("elsewhere.h5", "/")


@pytest.mark.parametrize("write", [cycle, unnumbered, missing, outside])
def test_hdf5_of_another_structure_is_one_line(tmp_path, write):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        write(file)
    with pytest.raises(UserError, match=r"w\.h5 is damaged") as caught:
        weight_files.read(tmp_path / "w.h5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [b"[1]", b'{"config": {"layers": [1]}}', b"{"])
def test_an_archive_with_another_config_is_one_line(tmp_path, config):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["layers/dense/vars/0"] = np.ones((2, 2))
    with zipfile.ZipFile(tmp_path / "w.keras", "w") as archive:
        archive.writestr("model.weights.h5", content.getvalue())
        archive.writestr("config.json", config)
    with pytest.raises(UserError, match=r"w\.keras is damaged") as caught:
        weight_files.read(tmp_path / "w.keras")
    assert "\n" not in str(caught.value)


def test_two_layers_of_one_name_are_refused(tmp_path):
    with h5py.File(tmp_path / "w.weights.h5", "w") as file:
        for layer in "dense", "dense_1":
            file[f"layers/{layer}/vars/0"] = np.ones((2, 2))
            file[f"layers/{layer}/vars"].attrs["name"] = "same"
    with pytest.raises(UserError, match=r"two layers of w\.weights\.h5 .* called same"):
        weight_files.read(tmp_path / "w.weights.h5")


def test_harmless_files_of_old_versions_are_read(tmp_path):
    state = {"weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(
        weight_files.read(tmp_path / "w.pth")["weight"], state["weight"].numpy()
    )
