"""The job cost, as a user calls it: from a config alone, in a folder that holds a run or none."""

import csv
import json
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from PIL import Image

import run as run_py
from squeeze_jax.cost import layers, memory
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _profile, _workdir, cost

WRITTEN = {"cost.csv", "cost.png"}
TIMES = ("latency_ms", "latency_share")
TINY = "--config.model={'name': 'squeezenet', 'variant': 'tiny'}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(capsys, *arguments):
    """What the job prints: {layer: cells}, and the other lines."""
    run_py.main(["--job=cost", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("---"))
    last = next(i for i, line in enumerate(lines) if line.startswith("total "))
    assert len({len(line) for line in lines[first - 1 : last + 1]}) == 1  # aligned
    rows = [re.split(r"  +", line.strip()) for line in lines[first + 1 : last + 1]]
    return {name: cells for name, *cells in rows}, lines[last + 1 :]


def plain(path):
    """The rows of a CSV file: {layer: the other cells}."""
    with open(path, newline="") as file:
        return {row.pop("layer"): row for row in csv.DictReader(file)}


def test_the_digits(here, capsys):
    rows, rest = called(capsys)
    # 1→32 channels, 3x3 without bias, 16x16 → 14x14: 288 weights, 14·14·288 MACs, 64 bit operations each;
    # 256 + 288 + 6272 bytes; of activations 256 + 6272 at once; 56,448 of 709,760 MACs
    conv1 = ["288", "56.4 k", "8.0%", "3.61 M", "6.82 kB", "8.28", "6.53 kB"]
    assert rows["conv1"] == conv1
    # scale and bias of 32 channels, joined to the convolution
    assert rows["conv1_norm"] == ["64", "-", "-", "-", "-", "-", "6.27 kB"]
    # the 14x14 map and the pooled 7x7
    assert rows["SqueezeNet"][-1] == "7.84 kB"
    # the arena of TFLite Micro for this net's int8 file is 9,408 bytes
    assert rows["total"][-1] == rows["fire3"][-1] == "9.41 kB"
    assert rows["total"][2] == "100.0%"
    assert "9.41 kB of activations, at concatenate in fire3: 1x7x7x64 + " in rest[1]
    assert rest[2].split() == ["in", "float32", "37.6", "kB"]  # four times as much
    assert re.fullmatch(
        r"XLA on \w+ +[\d.]+ kB of inputs, results and .* buffers", rest[3]
    )
    assert rest[4].split() == [
        "written",
        "runs/digits/cost.csv",
        "and",
        "runs/digits/cost.png",
    ]
    assert len(rest) == 5


def test_what_it_writes(here, capsys):
    rows, _ = called(capsys, "--workdir=deep/here")
    folder = here / "deep" / "here"
    assert {p.name for p in folder.iterdir()} == WRITTEN
    found = plain(folder / "cost.csv")
    assert list(found) == list(rows)  # the same layers in the same order
    assert found["conv1"] == {
        "parameters": "288",
        "macs": "56448",
        "share": f"{56448 / int(found['total']['macs']):.6g}",
        "bops": str(64 * 56448),
        "bytes_moved": "6816",
        "macs_per_byte": "8.28169",
        "live_bytes": "6528",
        "not_counted": "",
    }
    assert found["conv1_norm"]["macs"] == found["conv1_norm"]["share"] == "0"
    assert found["conv1_norm"]["macs_per_byte"] == ""  # of no bytes
    *each, total = found.values()
    for key in ("parameters", "macs", "bops", "bytes_moved"):
        assert sum(int(row[key]) for row in each) == int(total[key])
    assert sum(float(row["share"]) for row in each) == pytest.approx(1, abs=1e-5)
    assert max(int(row["live_bytes"]) for row in each) == int(total["live_bytes"])
    with Image.open(folder / "cost.png") as image:
        assert min(image.size) > 500


class Uncounted(nn.Module):
    """A counted layer, one with two primitives that are not, and a loop outside both."""

    @nn.compact
    def __call__(self, x):  # [1, 4, 4, 1]
        x = nn.Dense(2, name="dense")(x)
        x = Spectrum(name="spectrum")(x)
        return jax.lax.while_loop(lambda v: v.sum() < 1, lambda v: v + 1, x)


class Spectrum(nn.Module):
    @nn.compact
    def __call__(self, x):
        square = x[..., 0] @ x[..., 1]  # [1, 4, 4]: 64 MACs
        return jnp.fft.fft(jnp.linalg.cholesky(square)).real


def test_bits_from_the_config(here, capsys):
    rows, _ = called(
        capsys, "--config.cost.weight_bits=4", "--config.cost.activation_bits=16"
    )
    # 288 weights of 4 bits, 256 and 6272 activations of 16: 144 + 512 + 12,544 bytes; 64 bit operations a MAC as at 8 and 8
    assert rows["conv1"][3:5] == ["3.61 M", "13.2 kB"]
    assert rows["total"][-1] == "18.8 kB"  # twice the 9,408 bytes at 8 bits
    rules = '[("conv1/kernel", 2), ("kernel", 4)]'
    rows, _ = called(capsys, f"--config.cost.weight_bits={rules}")
    assert rows["conv1"][3] == "903 k"  # 56,448 MACs of 2 by 8 bits
    assert rows["conv10"][3] == "81.9 k"  # 2,560 of 4 by 8


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        ((), "weights and activations of 8 bits"),
        (("weight_bits=4",), "weights of 4 bits, activations of 8 bits"),
        (("weight_bits=[('kernel', 4)]",), "weights of bits by rules, activations of"),
    ],
)
def test_says_the_bits(here, capsys, arguments, title):
    run_py.main(["--job=cost", TINY, *(f"--config.cost.{a}" for a in arguments)])
    assert title in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("weight_bits=0", r"config.cost.weight_bits = 0 should lie in \[1, 64\]"),
        ("weight_bits=65", r"config.cost.weight_bits = 65 should lie in \[1, 64\]"),
        ("weight_bits=x", r"config.cost.weight_bits = 'x' \(str\) should be int or"),
        ("weight_bits=[('konv', 4)]", r"config.cost.weight_bits: the rule 'konv' matc"),
        ("weight_bits=[('conv', 0)]", r"config.cost.weight_bits\[0\]\[1\] = 0 should"),
        ("weight_bits=[4]", r"config.cost.weight_bits\[0\] = 4 \(int\) should"),
        ("activation_bits=80", r"config.cost.activation_bits = 80 should lie in"),
        ("latency=1", r"config.cost.latency = 1 \(int\) should be bool"),
        ("batch=0", r"config.cost.batch = 0 should be at least 1"),
        ("cores=100000", r"config.cost.cores = 100000, but this process may use \d+: "),
        ("bit=4", r"unknown key config.cost.bit"),
    ],
)
def test_bad_settings(here, argument, message):
    with pytest.raises(UserError, match=message):
        run_py.main(["--job=cost", TINY, f"--config.cost.{argument}"])
    assert not list(here.iterdir())


LATENCY = ("--config.cost.latency=True", "--config.cost.runs=5")


@pytest.mark.parametrize("more", [(), ("--config.cost.cores=1",)], ids=["here", "core"])
def test_latency(here, capsys, more):
    """On this process's device, and on one core in a process of its own."""
    batch = "--config.cost.batch=3"
    rows, rest = called(capsys, TINY, batch, *LATENCY, *more, "--workdir=here")
    found = plain(here / "here" / "cost.csv")
    assert list(found) == list(rows)
    assert list(found)[-2:] == ["elsewhere", "total"]
    *each, total = ({k: float(row[k]) for k in TIMES} for row in found.values())
    assert sum(row["latency_ms"] for row in each) == pytest.approx(
        total["latency_ms"], rel=1e-4
    )
    assert sum(row["latency_share"] for row in each) == pytest.approx(1, rel=1e-4)
    assert total["latency_share"] == 1
    # whatever takes time is shown as such
    assert float(found["conv1"]["latency_ms"]) > 0
    assert found["elsewhere"]["macs"] == found["elsewhere"]["parameters"] == "0"
    assert rows["elsewhere"][:7] == ["-"] * 7
    assert rows["total"][-1] == "100.0%"
    (whole,) = (line for line in rest if line.startswith("latency "))
    cores = "1 core" if more else rf"{len(os.sched_getaffinity(0))} cores?"
    number = r"[\d.]+ m?s"
    pattern = rf"p50 {number}, p90 {number}, p99 {number}, spread [\d.]+.*: 5 runs of 3 images in float32 on CPU, {cores}$"
    assert re.search(pattern, whole), whole
    (parts,) = (line for line in rest if line.startswith("by layer "))
    assert "elsewhere" in parts
    with Image.open(here / "here" / "cost.png") as image:
        assert min(image.size) > 300


def test_without_latency_nothing_is_measured(here, capsys):
    _, rest = called(capsys, TINY, "--workdir=here")
    assert not [line for line in rest if line.startswith(("latency", "by layer"))]
    assert "latency_ms" not in plain(here / "here" / "cost.csv")["conv1"]


def test_rows_with_times_by_hand():
    image = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    module = Uncounted()
    times = _profile.Measurement(
        {"dense": 3.0, "spectrum": 2.0, "new": 1.0}, 0.5, 1.5, 8.0, {}, ""
    )
    rows = cost.cost_rows(
        layers.layers(module, image), memory.peak(module, image), {}, times
    )
    by_name = {row["layer"]: row for row in rows}
    assert by_name["dense"]["latency_share"] == 3 / 8
    assert by_name["new"]["latency_ms"] == 1  # nothing else is known of it
    assert by_name["elsewhere"]["latency_ms"] == 2
    assert list(by_name)[-2:] == ["elsewhere", "total"]
    assert by_name["total"]["latency_ms"] == 8


def test_what_is_not_counted_is_named():
    image = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    missing = cost.uncounted_operations(Uncounted(), image)
    assert missing == {
        "spectrum": ["cholesky", "fft"],
        "Uncounted": ["while beyond one iteration"],
    }
    rows = cost.cost_rows(
        layers.layers(Uncounted(), image), memory.peak(Uncounted(), image), missing
    )
    assert [r["not_counted"] for r in rows if r["layer"] == "dense"] == [""]
    assert rows[-1]["not_counted"] == "cholesky; fft; while beyond one iteration"
    lines = cost.format_table(rows).splitlines()
    at = lines.index("spectrum   not counted: cholesky; fft")
    assert lines[at - 1].split()[:4] == ["spectrum", "-", "64", "66.7%"]  # of 96
    assert "Uncounted  not counted: while beyond one iteration" in lines
    assert lines[-1].split()[:4] == ["total", "4", "96", "100.0%"]
    assert cost.to_csv(rows).count("\n") == 1 + len(rows)


def test_without_any_macs():
    image = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    rows = cost.cost_rows((), memory.peak(lambda x: x + 1, image), {})
    assert cost.format_table(rows).splitlines()[-1].split()[:4] == [
        "total",
        "-",
        "-",
        "-",
    ]
    assert cost.to_csv(rows).splitlines()[-1] == "total,0,0,,0,0,,8,"


def test_takes_the_config_of_a_work_directory(here, capsys):
    config = {
        "data": {"source": {"name": "digits"}, "size": 8},
        "model": {"name": "mobilenet_v2", "variant": "tiny"},
        "optim": {"name": "sgd", "lr": 0.1},
        "steps": 1,
        "batch": 4,  # one for each simulated device
    }
    written = here / "begun" / "config.json"
    written.parent.mkdir()
    written.write_text(json.dumps(config))
    rows, _ = called(capsys, "--workdir=begun")
    assert rows["classifier"][:2] == ["330", "320"]  # 32 → 10 and bias
    # another network than that of the run may be asked for
    rows, _ = called(capsys, "--workdir=begun", TINY)
    assert rows["conv10"][0] == "170"  # 16 → 10 and bias
    assert {p.name for p in written.parent.iterdir()} == {"config.json", *WRITTEN}
    assert json.loads(written.read_text()) == config
    assert list(here.iterdir()) == [written.parent]


def test_begins_no_run(here, capsys):
    called(capsys, "--workdir=here")
    with pytest.raises(UserError, match="holds no experiment"):
        run_py.main(["--job=evaluate", "--workdir=here"])
    # a later run in the directory is of its own config, and the job goes by that from then on
    run_py.main(["--job=fit", "--workdir=here", TINY, "--config.steps=1"])
    _workdir._locks.pop((here / "here").resolve()).close()
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    rows, _ = called(capsys, "--workdir=here")
    assert rows["conv10"][0] == "170"  # 16 → 10 and bias
    after = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    changed = {p.name for p in after if after[p] != before.get(p)}
    assert changed == WRITTEN
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("file", "file is a file, not a folder: move it away"),
        ("file/below", "cannot write to the work directory file/below"),
    ],
)
def test_a_place_that_cannot_be_written_to(here, workdir, words):
    (here / "file").write_text("as it was")
    with pytest.raises(UserError, match=words):
        run_py.main(["--job=cost", TINY, f"--workdir={workdir}"])
    assert (here / "file").read_text() == "as it was"


def test_takes_no_files(here):
    with pytest.raises(UserError, match=r"the job cost takes no files: a\.jpg"):
        run_py.main(["--job=cost", TINY, "a.jpg"])
    assert not list(here.iterdir())


def test_other_jobs_still_need_a_run(here):
    with pytest.raises(UserError, match="holds no experiment"):
        run_py.main(["--job=evaluate", TINY])


ADAPTER = """
import jax.numpy as jnp
from squeeze_jax.methods import Forward

def make(integer: bool = False):
    def intercept(tap, x, own):
        return x @ own.params["mixing"], {}
    def init(key, params, taps):
        return {"mixing": jnp.eye(taps[0].shape[-1])}
    return Forward(intercept=intercept, init=init, taps=lambda n: n == "conv1/outputs", integer=integer)
"""


def test_counts_what_config_forward_computes_in_layers(here, capsys):
    (here / "adapter.py").write_text(ADAPTER)
    alone, _ = called(capsys, TINY)
    macs = int(plain("runs/digits/cost.csv")["conv1"]["macs"])
    _, rest = called(capsys, TINY, "--config.forward=({'name': './adapter.py'},)")
    # conv1 of the tiny variant has 7x7 positions; its channels are mixed by a matrix
    channels = int(plain("runs/digits/cost.csv")["conv1"]["parameters"]) // 9
    more = int(plain("runs/digits/cost.csv")["conv1"]["macs"]) - macs
    assert more == 7 * 7 * channels * channels
    assert "config.forward  adapter: counted in its layers" in rest
    same, rest = called(
        capsys, TINY, "--config.forward=({'name': './adapter.py', 'integer': True},)"
    )
    assert same == alone
    line = (
        "config.forward  adapter: not counted, an exported file has it in its weights"
    )
    assert line in rest
