"""Checkpoints: exact, on any number of devices, and never a damaged one in silence."""

import asyncio
import contextlib
import json
import os
import shutil
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from squeeze_jax.errors import UserError
from squeeze_jax.files import DiskFull
from squeeze_jax.train import sharding, state
from squeeze_jax.train.checkpoint import Checkpoints, checksums

pytestmark = pytest.mark.usefixtures("four_devices")

EXAMPLE = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)


class Net(nn.Module):
    width: int = 64

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(self.width, name="head")(x.reshape(x.shape[0], -1)), {}


def make(width=64, seed=0, mesh=None, ema=True):
    """A state whose every array is random, and its description."""
    mesh = mesh or sharding.make_mesh(data=4)

    def create(key):
        fresh = state.create(Net(width), optax.adam(1e-3), EXAMPLE, key, ema=ema)
        leaves, tree = jax.tree.flatten(fresh)
        noise = [
            jax.random.normal(jax.random.fold_in(key, i), x.shape)
            for i, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(
            tree, [(10 * n).astype(x.dtype) for n, x in zip(noise, leaves, strict=True)]
        )

    shapes = jax.eval_shape(create, jax.random.key(seed))
    placed = sharding.shard_state(shapes, mesh)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
    )
    return jax.jit(create, out_shardings=placed)(jax.random.key(seed)), like


def at(saved, step):
    return saved._replace(step=jax.numpy.int32(step))


def save(directory, *steps, metrics=None, **options):
    """Saves a different state for each step; returns them."""
    checkpoints = Checkpoints(directory, **options)
    states = {}
    for step in steps:
        states[step] = at(make(seed=step)[0], step)
        checkpoints.save(states[step], 10 * step, {"lr": 0.1})
        if metrics:
            checkpoints.record_scores(step, metrics[step])
    checkpoints.wait()
    checkpoints.close()
    return states


@pytest.mark.parametrize("ema", [True, False])
def test_comes_back_exactly_with_its_position(tmp_path, ema):
    saved, like = make(ema=ema)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(saved, 7), 448, {})
    checkpoints.wait()
    restored = Checkpoints(tmp_path).restore(like)
    assert restored.position == 448
    assert jax.tree.structure(restored.state) == jax.tree.structure(saved)
    chex.assert_trees_all_equal(
        jax.device_get(restored.state), jax.device_get(at(saved, 7))
    )


def test_nothing_there_is_none(tmp_path):
    assert Checkpoints(tmp_path).restore(make()[1]) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (dict(fsdp=4), "one"),
        ("one", dict(fsdp=4)),
        (dict(data=4), dict(fsdp=2, data=2)),
    ],
)
def test_moves_between_numbers_of_devices(tmp_path, before, after):
    one = jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])
    meshes = [one if m == "one" else sharding.make_mesh(**m) for m in (before, after)]
    saved, _ = make(mesh=meshes[0])
    _, like = make(mesh=meshes[1])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(saved, 1), 0, {})
    checkpoints.wait()
    restored = Checkpoints(tmp_path).restore(like).state
    kernel = restored.params["head"]["kernel"]
    assert kernel.sharding == like.params["head"]["kernel"].sharding
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(at(saved, 1)))


def test_keeps_the_newest_and_the_best(tmp_path):
    accuracy = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.6}
    metrics = {s: {"eval_accuracy": a} for s, a in accuracy.items()}
    save(tmp_path, 1, 2, 3, 4, metrics=metrics, keep=1)
    _, like = make()
    assert Checkpoints(tmp_path, read_only=True).saved_steps() == [2, 4]
    for use, step in ("newest", 4), ("best", 2):
        trained = Checkpoints(tmp_path, use=use, read_only=True).restore_trained(like)
        assert trained.state.step == step
    later = Checkpoints(tmp_path, keep=1)
    later.save(at(make(seed=5)[0], 5), 0, {})
    later.record_scores(5, {"eval_accuracy": 0.1})
    assert later.saved_steps() == [2, 5]


def test_there_is_no_best_without_an_evaluation(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"was evaluated with a finite eval_accuracy: set config"
    ):
        Checkpoints(tmp_path, use="best", read_only=True).restore_trained(make()[1])


def test_a_look_leaves_a_save_in_progress_alone(tmp_path):
    save(tmp_path, 1)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert Checkpoints(tmp_path, read_only=True).saved_steps() == [1]
    assert unfinished.exists()


def files(checkpoint):
    """The array files that a restore reads, largest first."""
    return sorted(
        (checkpoint / "state" / "d").iterdir(), key=lambda p: -p.stat().st_size
    )


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 4, len(content) // 2):
        content[i] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [truncate, flip, os.unlink], ids=["truncated", "corrupted", "missing"]
)
def test_a_damaged_newest_is_skipped_with_a_warning(tmp_path, harm):
    states = save(tmp_path, 1, 2)
    harm(files(tmp_path / "2")[0])
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=r"/2 is damaged and skipped"):
        restored = checkpoints.restore(make()[1])
    chex.assert_trees_all_equal(
        jax.device_get(restored.state), jax.device_get(states[1])
    )
    assert restored.position == 10
    # The damaged one does not stand in the way of its step's next save.
    checkpoints.save(states[2], 20, {})
    checkpoints.wait()
    again = Checkpoints(tmp_path, read_only=True).restore(make()[1])
    chex.assert_trees_all_equal(jax.device_get(again.state), jax.device_get(states[2]))
    assert (tmp_path / "damaged-2").exists()


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [truncate, empty])
def test_every_file_of_the_newest_is_damaged(tmp_path, harm, caplog):
    states = save(tmp_path, 1, 2, metrics={1: {"eval_accuracy": 0.5}, 2: {}})
    for path in [p for p in (tmp_path / "2").rglob("*") if p.is_file()]:
        harm(path)
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=r"/2 is damaged and skipped"):
        restored = checkpoints.restore(make()[1])
    chex.assert_trees_all_equal(
        jax.device_get(restored.state), jax.device_get(states[1])
    )
    assert not caplog.records  # the libraries' own words


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"x": {}}', b"\xff\xfe"])
def test_damaged_scores_are_said_and_written_anew(tmp_path, content):
    metrics = {s: {"eval_accuracy": a} for s, a in {1: 0.9, 2: 0.5}.items()}
    save(tmp_path, 1, 2, metrics=metrics)
    (tmp_path / "scores.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"scores.json is damaged"):
        checkpoints = Checkpoints(tmp_path, use="best")
    assert not checkpoints.has_scores(1)
    checkpoints.record_scores(2, {"eval_accuracy": 0.5})
    checkpoints.close()
    later = Checkpoints(tmp_path, use="best", read_only=True)
    assert later.restore_trained(make()[1]).state.step == 2


def test_scores_of_earlier_versions_count(tmp_path):
    """They stand in a file of each checkpoint."""
    save(tmp_path, 1, 2)
    for step, accuracy in (1, b'{"eval_accuracy": 0.9}'), (2, b""):
        (tmp_path / f"{step}/metrics").mkdir()
        (tmp_path / f"{step}/metrics/metrics").write_bytes(accuracy)
    with pytest.warns(UserWarning, match=r"2/metrics/metrics is damaged"):
        checkpoints = Checkpoints(tmp_path, use="best", read_only=True)
    assert [checkpoints.has_scores(step) for step in (1, 2)] == [True, False]
    assert checkpoints.restore_trained(make()[1]).state.step == 1
    # A read-only object leaves the damaged file, and the arrays beside it can be read.
    assert (tmp_path / "2/metrics/metrics").exists()
    assert checkpoints.saved_shapes(None, 2) is not None


def test_a_full_disk_is_one_line_that_names_what_is_safe(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    saved, like = make()
    checkpoints.save(at(saved, 1), 10, {})
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DiskFull, match=r"cannot save step 2.* of step 1 is whole"):
            checkpoints.save(at(saved, 2), 20, {})
        with pytest.raises(DiskFull, match=r"cannot save a step, 0\.\d MB: no space"):
            checkpoints.check_free_space(jax.eval_shape(lambda: saved))  # of shapes

    def full():
        raise ValueError(
            "RESOURCE_EXHAUSTED: ... [OS error 28: No space left on device]"
        )

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", full)
        patch.setattr(checkpoints._manager, "all_steps", lambda: [1, 2])  # 2 has begun
        with pytest.raises(DiskFull, match=r"no space left in .* of step 1 is whole"):
            checkpoints.wait()
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).restore(like).state.step == 1


def test_all_damaged_is_an_error(tmp_path):
    save(tmp_path, 1)
    truncate(files(tmp_path / "1")[0])
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(UserError, match=r"no checkpoint in .* can be read"),
    ):
        Checkpoints(tmp_path).restore(make()[1])


class Late:
    """As a read that is abandoned: it fails where nobody can catch it."""

    def __init__(self, error):
        self.error = error

    def __del__(self):
        raise self.error


def test_reads_given_up_are_not_reported_but_all_else_is(tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: reported.append(u.exc_value))
    for _ in range(2):
        assert Checkpoints(tmp_path).restore(make()[1]) is None
    reported.clear()  # what came late of another test's damaged checkpoint
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as closed:
        loop.call_soon_threadsafe(print)
    Late(closed.value)
    assert not reported
    other = RuntimeError("something else")
    Late(other)
    assert reported == [other]


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    """What a kill during a save leaves is a directory under a temporary name."""
    save(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp-0").mkdir()
    assert Checkpoints(tmp_path).saved_steps() == [1]


def test_another_model_is_named_with_both_shapes(tmp_path):
    save(tmp_path, 1)
    words = r"does not fit the model: params/head/bias: expected \(65,\), found \(64,\); params/head/kernel: expected"
    with pytest.raises(UserError, match=words):
        Checkpoints(tmp_path).restore(make(width=65)[1])


def test_another_optimizer_or_dtype_is_named(tmp_path):
    save(tmp_path, 1)
    like = make()[1]
    half = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), like.params)
    with pytest.raises(UserError, match=r"has params/.* in float32, .* in bfloat16"):
        Checkpoints(tmp_path).restore(like._replace(params=half))
    with pytest.raises(UserError, match=r"opt/0/count: found \(\), not expected"):
        Checkpoints(tmp_path).restore(like._replace(opt=optax.EmptyState()))


def test_checksums_see_every_bit_and_no_sharding():
    saved, _ = make(mesh=sharding.make_mesh(fsdp=4))
    first = checksums(saved)
    assert first == checksums(jax.device_get(saved))
    kernel = np.array(saved.params["head"]["kernel"])
    kernel.view(np.uint32)[3, 5] ^= 1
    changed = saved._replace(params={"head": saved.params["head"] | {"kernel": kernel}})
    assert [k for k, v in checksums(changed).items() if v != first[k]] == [
        "params/head/kernel"
    ]


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8", "bool", "complex64"]
)
def test_checksums_see_the_last_bit_of_every_dtype(dtype):
    value = np.asarray(jnp.asarray([0.25, 1.0, -3.0]).astype(dtype))
    first, seen = checksums({"x": value})["x"], set()
    for bit in range(8 * value.nbytes if dtype != "bool" else 0):
        raw = bytearray(value.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        seen.add(checksums({"x": np.frombuffer(bytes(raw), value.dtype)})["x"])
    if dtype == "bool":
        seen = {checksums({"x": ~value})["x"]}
    assert seen
    assert first not in seen


def test_checksums_of_earlier_versions_are_still_accepted(tmp_path):
    """They were over values: 0.25 and 0.5 of bfloat16 had the checksum of 0."""
    half = {"x": jnp.asarray([0.25, 0.5], jnp.bfloat16)}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(half, step=1)
        checkpoints.wait()
        (note,) = tmp_path.glob("1/note/metadata")
        content = json.loads(note.read_text())
        assert content["checksums"].values() != [0]
        assert content.pop("checksums_over_bits")
        content["checksums"] = {
            name: 0 if "x" in name else value
            for name, value in content["checksums"].items()
        }
        note.write_text(json.dumps(content))
        restored = checkpoints.restore(half)
    np.testing.assert_array_equal(restored.state["x"], half["x"])


@pytest.mark.parametrize(
    ("lowest", "scores", "best"),
    [
        (True, (5.0, 3.0, 4.0), 2),
        (False, (5.0, 3.0, 4.0), 1),
        (True, (float("nan"), 3.0, 4.0), 2),
        (False, (2.0, 3.0, float("nan")), 2),
    ],
)
def test_the_best_is_the_lowest_of_what_should_be_low(tmp_path, lowest, scores, best):
    """A perplexity and an accuracy; what is not a number is never the best."""
    settings = dict(keep=1, best="score", lowest=lowest)
    checkpoints = Checkpoints(tmp_path, **settings)
    state_, like = make()
    for step, score in enumerate(scores, 1):
        checkpoints.save(at(state_, step), 0, {})
        checkpoints.record_scores(step, {"score": score})
    checkpoints.wait()
    assert checkpoints.saved_steps() == sorted({best, 3})
    checkpoints.close()
    opened = Checkpoints(tmp_path, use="best", read_only=True, **settings)
    assert opened.restore_trained(like).state.step == best
