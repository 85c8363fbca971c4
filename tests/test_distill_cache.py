"""A teacher's outputs on disk: what is put comes back, interruptions, other folders, full disks."""

import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from squeeze_jax.distill.cache import Cached
from squeeze_jax.errors import UserError

# One example of a teacher with a head for spans and one layer of up to 6 tokens.
OUTPUTS = {
    "logits": {"start": np.zeros(6), "end": np.zeros(6)},
    "layer2": jax.ShapeDtypeStruct((6, 3), "float32"),
}


def batch(rng, rows, length):
    return {
        "logits": {
            key: rng.standard_normal((rows, length)) for key in ("start", "end")
        },
        "layer2": rng.standard_normal((rows, length, 3)),
    }


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2e-3), ("float32", 1e-6)])
def test_what_is_put_comes_back_in_any_order(tmp_path, dtype, error):
    rng = np.random.default_rng(0)
    given = batch(rng, 5, 6)
    with Cached.write(tmp_path / "a", OUTPUTS, 5, "teacher 1", dtype) as cache:
        assert not cache.complete
        for part in ([3, 1], [4, 0, 2]):
            cache.put(np.array(part), jax.tree.map(lambda x, p=part: x[p], given))
        assert cache.complete
    read = Cached.read(tmp_path / "a", "teacher 1").rows([2, 2, 0, 4])
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(read), jax.tree.leaves(given), strict=True
    ):
        assert found.dtype == dtype, path
        np.testing.assert_allclose(found, wanted[[2, 2, 0, 4]], atol=error, rtol=error)


def test_shorter_sequences_are_padded_with_zeros_and_cut_again(tmp_path):
    rng = np.random.default_rng(1)
    long, short = batch(rng, 2, 6), batch(rng, 2, 4)
    with Cached.write(tmp_path / "a", OUTPUTS, 2, "t", "float32") as cache:
        cache.put([0, 1], long)
        cache.put([1, -1], short)
    whole = cache.rows([1, 0])
    np.testing.assert_array_equal(whole["layer2"][0, 4:], 0)
    np.testing.assert_allclose(whole["layer2"][0, :4], short["layer2"][0], rtol=1e-6)
    np.testing.assert_allclose(whole["layer2"][1], long["layer2"][0], rtol=1e-6)
    shapes = {"logits": short["logits"], "layer2": np.zeros((2, 4, 3))}
    cut = cache.rows([1, -1], shapes)
    assert cut["logits"]["start"].shape == (2, 4)
    np.testing.assert_allclose(
        cut["logits"]["end"][0], short["logits"]["end"][0], rtol=1e-6
    )
    np.testing.assert_array_equal(cut["layer2"][1], 0)


# Two rows are put and one flush happens between them; then the process is gone without a word.
INTERRUPTED = """
import os, sys
import numpy as np
from squeeze_jax.distill.cache import Cached
cache = Cached.write(sys.argv[1], {"logits": np.zeros(2)}, 4, "t")
cache.put([2], {"logits": np.full((1, 2), 7.0)})
cache.flush()
cache.put([0], {"logits": np.full((1, 2), 8.0)})
os._exit(9)
"""


def test_an_interrupted_write_is_noticed_and_goes_on(tmp_path):
    folder = tmp_path / "a"
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(folder)], check=False)
    assert done.returncode == 9
    with pytest.raises(UserError, match="3 of 4 rows are missing"):
        Cached.read(folder)
    with Cached.write(folder, {"logits": np.zeros(2)}, 4, "t") as cache:
        assert cache.missing.tolist() == [0, 1, 3]
        with pytest.raises(UserError, match="incomplete"):
            cache.rows([0])
        cache.put(cache.missing, {"logits": np.zeros((3, 2))})
    rows = Cached.read(folder, "t").rows(np.arange(4))["logits"]
    np.testing.assert_array_equal(rows[:, 0], [0, 0, 7, 0])


@pytest.mark.parametrize("lost", ["logits.npy", "written.npy"])
def test_a_write_interrupted_while_files_are_made_starts_anew(tmp_path, lost):
    outputs = {"logits": np.zeros(2)}
    with Cached.write(tmp_path / "a", outputs, 2, "t") as cache:
        cache.put([0, 1], {"logits": np.ones((2, 2))})
    (tmp_path / "a" / lost).unlink()
    with pytest.raises(UserError, match=r"incomplete|absent"):
        Cached.read(tmp_path / "a")
    assert Cached.write(tmp_path / "a", outputs, 2, "t").missing.tolist() == [0, 1]


def test_rows_come_from_the_mapped_file(tmp_path):
    with Cached.write(
        tmp_path / "a", {"logits": np.zeros(2)}, 3, "t", "float32"
    ) as one:
        one.put([0, 1, 2], {"logits": np.arange(6).reshape(3, 2)})
    file = np.load(tmp_path / "a" / "logits.npy")
    np.testing.assert_array_equal(file, [[0, 1], [2, 3], [4, 5]])
    # Every byte has its place on the disk: no write to a mapped page can find it full.
    for path in (tmp_path / "a").glob("*.npy"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_folders_that_hold_something_else(tmp_path):
    folder = tmp_path / "a"
    Cached.write(folder, OUTPUTS, 3, "bert-base, sst2, 64 tokens")
    with pytest.raises(UserError) as error:
        Cached.write(folder, OUTPUTS, 3, "minilm, sst2, 64 tokens")
    assert "'bert-base, sst2, 64 tokens', not 'minilm, sst2, 64 tokens'" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"holds outputs of 'bert.*', not 'x'"):
        Cached.read(folder, "x")
    with pytest.raises(UserError, match="a count of 3, not 4"):
        Cached.write(folder, OUTPUTS, 4, "bert-base, sst2, 64 tokens")
    with pytest.raises(UserError, match=r"logits \(2,\) float16"):
        Cached.write(folder, {"logits": np.zeros(2)}, 3, "bert-base, sst2, 64 tokens")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "logits.npy").write_bytes(b"precious")
    with pytest.raises(UserError, match="holds no teacher's outputs"):
        Cached.write(mine, OUTPUTS, 3, "t")
    assert (mine / "logits.npy").read_bytes() == b"precious"
    with pytest.raises(UserError, match=r"manifest\.json is absent"):
        Cached.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"{", "manifest.json is damaged"),
        ("manifest.json", b'{"count": 3}', "manifest.json is damaged"),
        ("layer2.npy", b"", "layer2.npy is absent or damaged"),
    ],
)
def test_damage_is_named(tmp_path, name, content, message):
    Cached.write(tmp_path / "a", OUTPUTS, 3, "t")
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Cached.write(tmp_path / "a", OUTPUTS, 3, "t")


def test_a_full_disk_is_found_before_work_starts(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"disk is full: 2e\+09 GB"):
        Cached.write(tmp_path / "a", {"x": np.zeros(1)}, 10**18, "t")
    assert not (tmp_path / "a").exists()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="disk is full"):
            Cached.write(tmp_path / "a", OUTPUTS, 3, "t")
    # Once there is room again the same call goes on.
    assert len(Cached.write(tmp_path / "a", OUTPUTS, 3, "t").missing) == 3
    assert not list((tmp_path / "a").glob("*.part"))
    shutil.rmtree(tmp_path / "a")


def test_what_a_cache_cannot_hold(tmp_path):
    cache = Cached.write(tmp_path / "a", {"scores1": np.zeros((2, 2))}, 2, "t")
    lowest = np.finfo(np.float32).min
    # The lowest float32 stands where no key may be seen: as -inf it is still lower than all others.
    cache.put([0], {"scores1": np.array([[[1, lowest], [2, 3]]], np.float32)})
    assert cache.rows([0])["scores1"][0, 0, 1] == -np.inf
    with pytest.raises(
        UserError, match=r"1e\+05, which float16 cannot hold; keep it as"
    ):
        cache.put([1], {"scores1": np.full((1, 2, 2), 1e5)})
    with pytest.raises(UserError, match="nan"):
        cache.put([1], {"scores1": np.full((1, 2, 2), np.nan)})
    with pytest.raises(UserError, match="needs scores1, the outputs have logits"):
        cache.put([1], {"logits": np.zeros((1, 2))})
    with pytest.raises(UserError, match=r"is \(3, 2\), the cache holds \(2, 2\)"):
        cache.put([1], {"scores1": np.zeros((1, 3, 2))})
    with pytest.raises(
        UserError, match="holds 2 examples, there is none of the index 2"
    ):
        cache.put([2], {"scores1": np.zeros((1, 2, 2))})
    with pytest.raises(UserError, match="choose 'float16' or 'float32'"):
        Cached.write(tmp_path / "b", {}, 2, "t", "int8")
    with pytest.raises(UserError, match="no examples"):
        Cached.write(tmp_path / "b", {}, 0, "t")
    # What was refused is not there.
    assert cache.missing.tolist() == [1]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["arrays"] == {"scores1": [[2, 2], "float16"]}
