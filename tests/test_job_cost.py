"""The job cost, as a user calls it: from a config alone, in a folder that stays as it is."""

import json
import re

import pytest

import run as run_py
from squeeze_jax.errors import UserError


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


def test_the_digits(here, capsys):
    rows, rest = called(capsys)
    # 1→32 channels, 3x3 without bias, 16x16 → 14x14: 288 weights, 14·14·288 MACs, 64 bit operations each;
    # 256 + 288 + 6272 bytes; of activations 256 + 6272 at once
    assert rows["conv1"] == ["288", "56.4 k", "3.61 M", "6.82 kB", "8.28", "6.53 kB"]
    # scale and bias of 32 channels, joined to the convolution
    assert rows["conv1_norm"] == ["64", "-", "-", "-", "-", "6.27 kB"]
    # the 14x14 map and the pooled 7x7
    assert rows["SqueezeNet"][-1] == "7.84 kB"
    # the arena of TFLite Micro for this net's int8 file is 9,408 bytes
    assert rows["total"][-1] == rows["fire3"][-1] == "9.41 kB"
    assert "9.41 kB of activations, at concatenate in fire3: 1x7x7x64 + " in rest[1]
    assert rest[2].split() == ["in", "float32", "37.6", "kB"]  # four times as much
    assert re.fullmatch(
        r"XLA on \w+ +[\d.]+ kB of inputs, results and .* buffers", rest[3]
    )
    assert len(rest) == 4
    assert not list(here.iterdir())


TINY = "--config.model={'name': 'squeezenet', 'variant': 'tiny'}"


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
    assert list(here.rglob("*")) == [written.parent, written]


def test_takes_no_files(here):
    with pytest.raises(UserError, match=r"the job cost takes no files: a\.jpg"):
        run_py.main(["--job=cost", TINY, "a.jpg"])
    assert not list(here.iterdir())


def test_other_jobs_still_need_a_run(here):
    with pytest.raises(UserError, match="holds no experiment"):
        run_py.main(["--job=evaluate", TINY])
