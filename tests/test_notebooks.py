"""Every notebook runs from its first cell to its last, in small, and is committed as it was written: without outputs.

Before a release they run whole, with their own values, in some minutes:

    python -m pytest -n 0 tests/test_notebooks.py --whole-notebooks
"""

import ast
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.devices import xla_flags

FOLDER = Path(__file__).parents[1] / "notebooks"

# Values for the names in each notebook's cell tagged "parameters"; "{tmp}" becomes an empty folder.
SMALL = {
    "01_first_run": {
        "STEPS": 6,
        "WORKDIR": "{tmp}/run",
        "CHANGES": [
            '--config.model={"name": "squeezenet", "variant": "tiny", "norm": True, "stem_strides": 1}',
            "--config.data.size=8",
            "--config.batch=16",
            "--config.log_every=2",
            "--config.optim.warmup=1",
            "--config.export.int8_agreement=0.0",
            "--config.benchmark.runs=5",
        ],
    },
    "02_convolutions": {
        "CHANNELS": 16,
        "BATCH": 1,
        "ROUNDS": 1,
        "ROWS": 64,
        "LAYERS": 5,
    },
    "03_squeezebert": {
        "STEPS": 2,
        "BATCH": 8,
        "LENGTH": 32,
        "VOCABULARY": 400,
        "FEATURES": 16,
        "DEPTH": 1,
        "WORKDIR": "{tmp}/run",
        "LAYERS": 1,
        "WIDTH": 128,
        "TIMED": 2,
        "ROUNDS": 2,
    },
    "05_once_for_all": {
        "STEPS": (1, 2),
        "SAMPLES": 10,
        "CALIBRATION": 64,
        "NETWORKS": 4,
        "ROUNDS": 1,
        "TRUTH": 3,
        "CHOICES": {"expand": 2},
        "WORKDIR": "{tmp}/run",
    },
}
# Code that runs behind a notebook's last cell: the small run takes the branches that the notebook's own values take.
BRANCHES = {
    "02_convolutions": "assert set(used) == {name for g in networks.values() for name in timeable(g)}",
}
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def shrink(notebook, values):
    """Gives the names that the cell tagged "parameters" assigns other values, in a cell after it."""
    tagged = [
        i
        for i, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    ]
    (at,) = tagged
    assigned = {
        target.id
        for node in ast.parse(notebook.cells[at].source).body
        for target in node.targets
    }
    assert values.keys() <= assigned
    if not values:
        return
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))


def sections(notebook):
    """[(heading, outputs of the section's cells)] of an executed notebook."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            found.append((cell.source.splitlines()[0], []))
        elif cell.cell_type == "code" and found:
            found[-1][1].extend(cell.outputs)
    return found


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Name of a kernel of the interpreter that runs the tests, whatever kernels are installed."""
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    folder = tmp_path / "jupyter" / "kernels" / "of_the_tests"
    folder.mkdir(parents=True)
    spec = {"argv": launch, "display_name": "of the tests", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return folder.name


def test_there_are_notebooks_and_each_has_small_values():
    assert NOTEBOOKS
    assert sorted(SMALL) == NOTEBOOKS
    assert BRANCHES.keys() <= SMALL.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_to_the_end(name, kernel, tmp_path, request):
    """A cell that raises ends the test with its traceback; each section but the last asks a question and shows an answer."""
    notebook = read(name)
    values = SMALL[name]
    if whole := request.config.getoption("whole_notebooks"):
        values = {"WORKDIR": "{tmp}/run"} if "WORKDIR" in values else {}
    shrink(notebook, json.loads(json.dumps(values).replace("{tmp}", str(tmp_path))))
    if name in BRANCHES:
        notebook.cells.append(nbformat.v4.new_code_cell(BRANCHES[name]))
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(devices=1),
        "JAX_PLATFORMS": "cpu",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    if whole:  # as users run it
        del environment["JAX_DISABLE_MOST_OPTIMIZATIONS"], environment["XLA_FLAGS"]
    started_in = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(
        notebook,
        kernel_name=kernel,
        timeout=3000 if whole else 300,
        resources=started_in,
    )
    client.execute(env=environment)
    if whole:
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    *questions, _ = sections(notebook)
    for title, outputs in questions:
        assert title.endswith("?")
        assert outputs, title
    types = {kind for _, outputs in questions for o in outputs for kind in o.get("data", ())}  # fmt: skip
    assert {"image/png", "text/markdown"} <= types


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_committed_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.source
            assert cell.execution_count is None, cell.source
