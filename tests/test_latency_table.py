"""Latency tables: the fit of predictions, keys, files, the script for other devices, and the job on real runtimes."""

import json
import os
import stat
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import run as run_py
from squeeze_jax import stop
from squeeze_jax.cost import latency_table as tables
from squeeze_jax.cost import memory
from squeeze_jax.cost import timing as clock
from squeeze_jax.errors import UserError
from squeeze_jax.export import time_files
from squeeze_jax.jobs import _piece_files, _plugs, latency_table
from squeeze_jax.nas import costs, encode, space
from squeeze_jax.nas.family import Family

TINY = dict(name="ofa_mobilenet_v3", variant="tiny", num_classes=10, stem_strides=1)
ABOUT = dict(device="d", runtime="r 1", format="tflite", threads=1, statistic="median")


def image(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture(scope="module")
def family():
    return Family(TINY, _plugs.plain(image(2, 16, 16, 1)))


@pytest.fixture(scope="module")
def pieces(family):
    return costs.Pieces(family, image(1, 16, 16, 1))


def spread(family, count):
    return space.spread_networks(family.space, count, jax.random.key(0))


def timing(ms):
    return tables.Timing(ms, 0.0, 1)


def measured(ms, sum_ms, count, held_out=False):
    return tables.Whole({}, timing(ms), sum_ms, count, held_out)


def test_the_fit_finds_the_two_numbers_that_made_the_latencies():
    """latency = 1.25 * sum - 0.5 * (pieces - 1), for (sum, pieces) of (4, 2), (8, 3), (16, 4), (20, 4)."""
    rows = [(4.5, 4.0, 2), (9.0, 8.0, 3), (18.5, 16.0, 4), (23.5, 20.0, 4)]
    networks = [measured(*row, held_out=i == 3) for i, row in enumerate(rows)]
    scale, join_ms = tables.fit(networks[:3])
    assert (scale, join_ms) == (pytest.approx(1.25), pytest.approx(-0.5))
    table = tables.Table(ABOUT, {}, networks, scale, join_ms)
    assert table.error()["mean"] == pytest.approx(0, abs=1e-6)
    assert tables.fit([]) == (1.0, 0.0)
    # 0.47 * sum - 0.44 * (pieces - 1) fits best, and is below 0 for the first: the sum alone is scaled.
    rows = [(5.0, 1.0, 3), (4.0, 6.0, 1), (1.0, 6.0, 5)]
    scale, join_ms = tables.fit([measured(*row) for row in rows])
    assert scale > 0
    assert join_ms == 0
    # Networks of equally many pieces cannot tell the two apart: least squares of (sum * s / ms - 1).
    assert tables.fit([measured(2.0, 1.0, 1), measured(4.0, 2.0, 1)]) == (2.0, 0.0)


def test_rank_correlation_is_scipy_s():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, 30), rng.integers(0, 5, 30)
    expected = spearmanr(first, second).statistic
    assert tables.rank_correlation(first, second) == pytest.approx(expected)


class Block(nn.Module):
    """A block of a user's own file."""

    features: int
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x, *, train):
        return self.activation(nn.Dense(self.features)(x))


def test_keys_differ_where_pieces_differ_and_hold_no_addresses():
    x = image(1, 8)
    key = tables.key_of(Block(4), x)
    assert key == tables.key_of(Block(4), x)
    others = (
        tables.key_of(Block(5), x),
        tables.key_of(Block(4, nn.gelu), x),
        tables.key_of(Block(4, partial(nn.leaky_relu, negative_slope=0.3)), x),
        tables.key_of(Block(4), image(1, 9)),
        tables.key_of(Block(4), jax.ShapeDtypeStruct((1, 8), jnp.int8)),
    )
    assert len({key, *others}) == 6
    assert not any("0x" in k for k in (key, *others))
    assert "features=4" in key
    assert "float32[1, 8]" in key


def test_predictions_of_networks_are_sums_over_their_pieces(family, pieces):
    """By hand: each piece costs its number of parameters in microseconds, so a network costs its own number of parameters."""
    known = {}
    for placed in pieces.distinct:
        key = tables.key_of(placed.piece.module, placed.example)
        known[key] = timing(1e-3 * max(costs.parameters(placed), 1e-6))
    table = tables.Table(ABOUT, known, scale=2.0, join_ms=0.5)
    latency = jax.jit(jax.vmap(pieces.latency(table, "t.json")))
    archs = spread(family, 5)
    predicted = latency(jax.tree.map(lambda *rows: np.stack(rows), *archs))
    for arch, ms in zip(archs, predicted, strict=True):
        net = family.network(arch)
        shapes = family.shapes(net)["params"]
        total = sum(np.prod(a.shape) for a in jax.tree.leaves(shapes))
        expected = 2e-3 * total + 0.5 * (len(net.pieces) - 1)
        assert ms == pytest.approx(expected, rel=1e-4)
    del known[next(iter(known))]
    with pytest.raises(UserError, match=r"t\.json has no latency of .*latency_table"):
        pieces.latency(table, "t.json")


def test_the_peak_of_memory_is_that_of_the_whole_network(family, pieces):
    peak = pieces.tabulate(costs.peak_bytes, costs.largest)
    for arch in spread(family, 4):
        net = family.network(arch)
        whole = memory.peak(net, image(1, 16, 16, 1))
        assert float(peak(arch)) == whole.bytes


def test_equal_networks_have_one_canonical_architecture(family, pieces):
    """400 networks: each stage has 4 of one block and 16 of two."""
    keys = jax.random.split(jax.random.key(0), 8000)
    archs = jax.vmap(lambda k: space.sample(family.space, k))(keys)
    unique = np.unique(
        np.concatenate(
            jax.vmap(encode.canonical(family.space, pieces.columns))(archs), axis=1
        ),
        axis=0,
    )
    assert len(unique) == (4 + 16) ** 2 == pieces.number_of_networks()
    # One block in each stage: the kernels and expansions of the second blocks have no effect, 4 positions of 2 choices.
    features = encode.one_hot(family.space, pieces.columns)(family.space.smallest())
    assert features.shape == (20,)
    assert features.sum() == 10 - 4


def test_sampled_networks_reach_from_the_smallest_to_the_largest(family):
    archs = spread(family, 9)
    smallest, largest = family.space.smallest(), family.space.largest()
    jax.tree.map(
        np.testing.assert_array_equal, (archs[0], archs[-1]), (smallest, largest)
    )
    sizes = [sum(int(f.sum()) for f in arch) for arch in archs]
    assert sum(sizes[:3]) < sum(sizes[3:6]) < sum(sizes[6:])


def write_table(path, **changes):
    table = tables.Table(ABOUT, {"a": timing(1.0)}, [measured(1.0, 1.0, 2)])
    tables.write(path, table, {"command": "x"})
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))
    return table


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "t.json"
    table = write_table(path)
    read = tables.read(path)
    assert read == table._replace(networks=tuple(table.networks))
    assert read.name == "tflite on d, 1 thread"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(version=99), "no latency table of version 1, its version is 99"),
        (dict(pieces={"a": {"ms": -1, "spread": 0, "count": 1}}), "damaged"),
        (dict(pieces={"a": {"ms": float("nan"), "spread": 0, "count": 1}}), "damaged"),
        (dict(pieces=[1]), "damaged"),
        (dict(networks=[{}]), "damaged"),
        (dict(scale=None), "damaged"),
        (dict(scale=float("nan")), "damaged"),
        (dict(scale=float("inf")), "damaged"),
        (dict(join_ms=float("nan")), "damaged"),
        (dict(scale=10**400), "damaged"),
        (dict(scale=True), "damaged"),
        (dict(scale="1"), "damaged"),
        (dict(pieces={"a": {"ms": 10**400, "spread": 0, "count": 1}}), "damaged"),
        (dict(pieces={"a": {"ms": 1.0, "spread": 0, "count": 0.5}}), "damaged"),
        (dict(threads="one"), "damaged"),
        (dict(threads=True), "damaged"),
        (dict(device=7), "damaged"),
        (dict(format=["tflite"]), "damaged"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, changes, message):
    path = tmp_path / "t.json"
    write_table(path, **changes)
    with pytest.raises(UserError, match=message) as error:
        tables.read(path)
    assert "delete it, and measure it anew with --job=latency_table" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: No such file.*latency_table"):
        tables.read(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(
        UserError, match=r"text\.json is no latency table: it is no JSON; delete it"
    ):
        tables.read(tmp_path / "text.json")


ADB = """#!{python}
import json, os, sys
arguments = sys.argv[1:]
with open(os.environ["ADB_LOG"], "a") as file:
    file.write(json.dumps(arguments) + "\\n")
if arguments[:2] == ["shell", "getprop"]:
    print("Pixel 8")
if any(a.startswith("--graph=") for a in arguments):
    print("INFO: count=50 first=900 curr=800 min=790 max=950 avg=812.5 std=9")
    print("INFO: Inference timings in us: Init: 5685, First inference: 18535, Warmup (avg): 14462.3, Inference (avg): 812.5")
"""


def test_damaged_times_are_measured_again(tmp_path):
    """A row that is no JSON, no text or no row does not count; without its header, nothing in the file does."""
    path, header = tmp_path / "times.jsonl", {"device": "board"}
    rows = [b'{"file": "a", "round": 0}', b'{"file": "b", "rou', b"\xff\xfe", b"3", b'{"file": "c"}']  # fmt: skip
    path.write_bytes(b"\n".join([json.dumps(header).encode(), *rows]))
    assert time_files.read_done(path, header) == {("a", 0)}
    assert time_files.read_done(path, {"device": "another"}) is None
    path.write_bytes(b"\n".join([b'{"dev', *rows]))
    assert time_files.read_done(path, header) is None


HEADER = dict(version=1, device="board", runtime="litert", threads=1, statistic="mean")
ROW = dict(file="a.tflite", round=0, count=2, ms=0.5)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (None, [], "does not begin with the header of time_files.py: delete it"),
        ([1], [ROW], "does not begin with the header"),
        (HEADER | dict(version=0), [ROW], "of version 0: copy time_files.py"),
        ({"version": 1}, [ROW], "line 1: device = None: delete the file"),
        (HEADER | dict(device=5), [ROW], "line 1: device = 5"),
        (HEADER | dict(device=" "), [ROW], "line 1: device = ' '"),
        (HEADER | dict(threads="1"), [ROW], "line 1: threads = '1'"),
        (HEADER | dict(threads=-1), [ROW], "line 1: threads = -1"),
        (HEADER, [ROW, ROW | dict(ms=0.0)], "line 3: 'a.tflite' has ms = 0.0: delete"),
        (HEADER, [ROW | dict(ms=float("nan"))], "line 2: 'a.tflite' has ms = nan"),
        (HEADER, [ROW | dict(ms=-1)], "line 2: 'a.tflite' has ms = -1"),
        (HEADER, [ROW | dict(ms="1")], "line 2: 'a.tflite' has ms = '1'"),
        (HEADER, [ROW | dict(ms=float("inf"))], "has ms = inf"),
        (HEADER, [ROW | dict(ms=10**400)], "line 2: 'a.tflite' has ms = 1000"),
        (HEADER, [ROW | dict(count=0)], "has count = 0"),
        (HEADER, [ROW | dict(file=None)], "line 2: it names no file"),
        (HEADER, [3], "line 2: it names no file"),
        (HEADER, [], "lacks 1 of 1 files, such as a"),
    ],
)
def test_wrong_times_of_another_device_are_named(tmp_path, header, rows, message):
    path = tmp_path / "times_1.jsonl"
    lines = [json.dumps(row) + "\n" for row in (header, *rows) if row is not None]
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=message) as error:
        _piece_files.read_times(path, {"a"})
    assert str(path) in str(error.value)


def test_times_of_another_device_are_read(tmp_path, capsys):
    path = tmp_path / "times_1.jsonl"
    rows = HEADER, ROW, ROW | dict(round=1, ms=1)
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"file": "a.tfl')
    header, timings = _piece_files.read_times(path, {"a"}, 2)
    assert not capsys.readouterr().out
    _piece_files.read_times(path, {"a"}, 3)
    assert (
        "has fewer than 3 rounds of 1 files, such as a: run" in capsys.readouterr().out
    )
    assert header == HEADER
    assert timings == {"a": tables.Timing(0.5, 1.0, 4)}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("Pixel 8", "Pixel_8_tflite_4"),
        ("a/b\u00e9", "a_b__tflite_4"),
        ("x" * 300, "x" * 80 + "_tflite_4"),
    ],
)
def test_a_table_of_another_device_has_a_name_for_every_file_system(device, name):
    header = HEADER | dict(device=device, threads=4)
    assert latency_table.table_name(header, "tflite") == name


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-I", time_files.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_the_script_times_files_on_a_phone(tmp_path):
    """A stand-in for adb prints what LiteRT's benchmark binary prints; the script needs no package."""
    adb = tmp_path / "bin" / "adb"
    adb.parent.mkdir()
    adb.write_text(ADB.format(python=sys.executable))
    adb.chmod(adb.stat().st_mode | stat.S_IXUSR)
    folder = tmp_path / "files"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.tflite").write_bytes(b"x")
    log = tmp_path / "log"
    path = f"{adb.parent}{os.pathsep}{os.environ['PATH']}"
    done = run_script(folder, "--adb", "--rounds=2", PATH=path, ADB_LOG=str(log))
    assert done.returncode == 0, done.stderr
    header, *rows = map(json.loads, (folder / "times_1.jsonl").read_text().splitlines())
    assert header["device"] == "Pixel 8"
    assert header["statistic"] == "mean"
    assert [(r["file"], r["round"]) for r in rows] == [
        *(("a.tflite", 0), ("b.tflite", 0), ("a.tflite", 1), ("b.tflite", 1))
    ]
    assert all(r["ms"] == 0.8125 and r["count"] == 50 for r in rows)
    commands = [json.loads(line) for line in log.read_text().splitlines()]
    assert [
        "push",
        str(folder / "a.tflite"),
        f"{time_files.PHONE_FOLDER}/a.tflite",
    ] in commands
    # A second call has nothing to do, and another device is refused.
    again = run_script(folder, "--adb", "--rounds=2", PATH=path, ADB_LOG=str(log))
    assert again.returncode == 0
    assert len((folder / "times_1.jsonl").read_text().splitlines()) == 5
    other = run_script(folder, "--adb", "--device=other", PATH=path, ADB_LOG=str(log))
    assert other.returncode == 3
    assert "another device or runtime" in other.stderr


def test_the_script_says_what_is_missing(tmp_path):
    assert "no .tflite files" in run_script(tmp_path).stderr
    (tmp_path / "a.tflite").write_bytes(b"x")
    assert "--rounds should be at least 1" in run_script(tmp_path, "--rounds=0").stderr
    done = run_script(tmp_path, "--adb", PATH=str(tmp_path))
    assert done.returncode == 3
    assert "adb is missing" in done.stderr


def job(workdir, *overrides):
    section = [f"--config.latency_table.{o}" for o in overrides]
    run_py.main(
        [
            *("--job=latency_table", "--config=configs/ofa_digits.py"),
            *(f"--workdir={workdir}", *section),
        ]
    )


@pytest.fixture(scope="module")
def device_folder(tmp_path_factory):
    """The files of a small space for another device, which the script has timed here."""
    folder = tmp_path_factory.mktemp("device")
    job(folder / "run", *OPTIONS, f"device_folder={folder / 'files'}")
    return folder


OPTIONS = ("networks=4", "rounds=1", "runs=2", "seconds=0")


def test_files_for_another_device(device_folder, capsys):
    """The folder has what the script needs; the second call reads its times and writes the table."""
    files = device_folder / "files" / "tflite"
    again = (*OPTIONS, f"device_folder={device_folder / 'files'}")
    assert len(list(files.glob("*.tflite"))) == 20 + 4
    damaged = min(files.glob("network_*.tflite"))
    damaged.write_bytes(b"")
    job(device_folder / "run", *again)
    printed = capsys.readouterr().out
    assert "copy the folder to the device" in printed
    assert f"{damaged} is no TFLite file: it is converted anew" in printed
    assert damaged.read_bytes()[4:8] == b"TFL3"
    script = [
        sys.executable,
        str(files / "time_files.py"),
        str(files),
        "--device=Board 1",
    ]
    done = subprocess.run(
        [*script, "--rounds=1", "--runs=2", "--seconds=0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    job(device_folder / "run", *again)
    table = tables.read(device_folder / "run" / "latency" / "Board_1_tflite_1.json")
    assert table.about["device"] == "Board 1"
    assert len(table.pieces) == 20
    assert [n.held_out for n in table.networks] == [False, True, False, True]
    assert all(n.timing.ms > 0 for n in table.networks)
    # Times in another runtime do not replace the table.
    times = files / "times_1.jsonl"
    header, *lines = times.read_text().splitlines()
    header = json.dumps(json.loads(header) | {"runtime": "another"})
    times.write_text("\n".join([header, *lines]))
    with pytest.raises(UserError, match=r"Board_1_tflite_1.json is of the runtime '.*', and this is 'another'"):  # fmt: skip
        job(device_folder / "run", *again)


def test_equal_names_of_targets_mean_equal_networks(family, pieces):
    """The second of four networks is none of eight: times of an interrupted measurement are no others'."""
    four, eight, wide = (
        {t.name: space.key_of(t.arch) for t in _piece_files.targets(p, archs) if t.arch}
        for p, archs in (
            (pieces, spread(family, 4)),
            (pieces, spread(family, 8)),
            (costs.Pieces(family, image(1, 24, 24, 1)), spread(family, 4)),
        )
    )
    assert len(four) == 4
    assert len(eight) == 8
    both = four.keys() & eight.keys()
    assert 0 < len(both) < 4
    assert all(four[name] == eight[name] for name in both)
    assert not four.keys() & wide.keys()


def test_a_folder_of_another_space_is_refused(device_folder):
    folder = f"device_folder={device_folder / 'files'}"
    with pytest.raises(UserError, match="another space, format or number of networks"):
        job(device_folder / "run", "networks=5", folder)


def test_the_job_times_xla_and_keeps_a_finished_table(tmp_path, capsys, monkeypatch):
    """It was stopped after 15 times, and goes on with the others."""
    calls, measured = [], clock.times

    def counted(thunk, runs):
        if len(calls) == 2 * 15:
            raise stop.Stopped(15)
        calls.append(runs)
        return measured(thunk, runs)

    monkeypatch.setattr(clock, "times", counted)
    with pytest.raises(stop.Stopped):
        job(tmp_path, "formats=('xla',)", *OPTIONS)
    with open(tmp_path / "latency" / "times_xla.jsonl", "a") as lines:
        lines.write('{"file": "piece_')  # killed while it wrote
    calls.append(0)
    job(tmp_path, "formats=('xla',)", *OPTIONS)
    path = tmp_path / "latency" / "xla.json"
    table = tables.read(path)
    assert len(table.pieces) == 20
    assert len(calls) == 1 + 2 * (20 + len(table.networks))
    assert not (tmp_path / "latency" / "times_xla.jsonl").exists()
    assert table.about["runtime"] == f"jax {jax.__version__}"
    before = path.read_bytes()
    job(tmp_path, "formats=('xla',)", *OPTIONS)
    assert "measured   already" in capsys.readouterr().out
    assert path.read_bytes() == before
    content = json.loads(before) | {"device": "another"}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is of the device 'another', and this is"):
        job(tmp_path, "formats=('xla',)", *OPTIONS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["networks=2"], "networks = 2 should be 0, or at least 4"),
        (["formats=('tflie',)"], "tflie"),
        (["formats=()"], "should not be empty"),
        (["threads=(0,)"], "at least 1"),
        (["formats=('xla',)", "device_folder=x"], "XLA is timed on this machine only"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        job(tmp_path / "run", *overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_network_without_a_space_is_refused(tmp_path):
    with pytest.raises(UserError, match="elastic"):
        run_py.main(["--job=latency_table", f"--workdir={tmp_path / 'run'}"])
