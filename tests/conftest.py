"""Fixtures for every test file.

Tests marked or fed by `shared` need the folder of real data and reference material beside the repository. Where it is
absent they are deselected, never skipped; in CI its absence is an error.
"""

import gc
import importlib.util
import io
import os
import sys
import tempfile
from pathlib import Path

# Most programs are compiled to run once, so LLVM alone compiles fusions, in one thread: a training step compiles 2.6 times as
# fast. This has to stand before jax is imported.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
# Programs are kept for this process and those that it starts, never among the user's.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="squeeze_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
# Those that are timed are optimized as for users: the fixture `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"
NEEDING = pytest.StashKey[int]()  # how many tests were left out for want of it


def pytest_addoption(parser):
    parser.addoption(
        "--whole-notebooks",
        action="store_true",
        help="run the notebooks with their own values instead of small ones",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "shared: needs the folder ../shared")


# Files that take a minute and more, the slowest first: they begin first, so that no worker waits for another at the end.
SLOW = (
    "test_configs.py",
    "test_run_methods.py",
    "test_run_text.py",
    "test_run_pretrained.py",
    "test_run.py",
    "test_notebooks.py",
    "test_export_text.py",
    "test_run_phases.py",
    "test_run_camvid.py",
)


def pytest_collection_finish():
    """Spares the garbage collector what was imported: tracing makes many objects, and each pass would look through all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    places = {name: place for place, name in enumerate(SLOW)}
    # Files that restart JAX come last: arrays that other files make on import then belong to the devices they run on.
    restarting = {item.path for item in items if "four_devices" in item.fixturenames}
    items.sort(
        key=lambda item: (
            item.path in restarting,
            places.get(item.path.name, len(SLOW)),
        )
    )
    if SHARED.is_dir():
        return
    needing = [
        item
        for item in items
        if item.get_closest_marker("shared") or "shared" in item.fixturenames
    ]
    if needing and os.environ.get("CI"):
        raise pytest.UsageError(f"{SHARED} is absent: CI must run the tests needing it")
    config.hook.pytest_deselected(items=needing)
    items[:] = [item for item in items if item not in needing]
    config.stash[NEEDING] = len(needing)
    if hasattr(config, "workeroutput"):  # of pytest-xdist
        config.workeroutput["needing"] = len(needing)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Each worker of pytest-xdist collects all tests; the process that reports collects none."""
    needing = getattr(node, "workeroutput", {}).get("needing", 0)
    node.config.stash[NEEDING] = max(node.config.stash.get(NEEDING, 0), needing)


def pytest_terminal_summary(terminalreporter, config):
    """Says how many tests were left out, and why."""
    if needing := config.stash.get(NEEDING, 0):
        terminalreporter.write_line(
            f"{needing} tests were left out: they need the folder of real data and weights {SHARED}, which is not there",
            yellow=True,
        )


@pytest.fixture
def optimized(monkeypatch):
    """Compiles as for users, in this process and in those it starts."""
    before = jax.config.read("jax_disable_most_optimizations")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def four_devices():
    """Four simulated devices in place of one, until the last test of the module.

    All other tests run on one: a program on four costs more, and two programs on four at once can wait for each other.
    """

    from tests.devices import simulated

    with simulated(4):
        yield


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Processes that run the same program read from disk what the first of them compiled."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("compiled"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(autouse=True)
def unlocked():
    """Unlocks the work directories of a test, which a process otherwise locks until it ends."""
    yield
    if workdirs := sys.modules.get("squeeze_jax.jobs._workdir"):
        while workdirs._locks:
            workdirs._locks.popitem()[1].close()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, weights and reference material."""
    return SHARED


@pytest.fixture(scope="session")
def vocabulary(shared) -> str:
    """The file of BERT's uncased vocabulary."""
    return str(shared / "data" / "text" / "bert_uncased_vocab.txt")


@pytest.fixture(scope="session")
def torchvision(shared):
    """torchvision, importable beside a CPU build of PyTorch."""
    if "torchvision_cpu" not in sys.modules:
        path = shared / "tools" / "torchvision_cpu.py"
        spec = importlib.util.spec_from_file_location("torchvision_cpu", path)
        # The module has to stay: what it declares ends with it.
        module = sys.modules["torchvision_cpu"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    import torchvision.transforms.autoaugment

    return torchvision


@pytest.fixture(scope="session")
def transformers(torchvision):
    """transformers, which imports torchvision where it is installed."""
    import transformers

    return transformers


@pytest.fixture(scope="session")
def cifar10(shared, tmp_path_factory) -> Path:
    """A `data_dir` with the whole of CIFAR-10, converted by our own command's function."""
    from squeeze_jax.data.convert import convert

    data_dir = tmp_path_factory.mktemp("tfds")
    convert(shared / "data" / "cifar10" / "cifar10_jpeg.npz", "cifar10", data_dir)
    return data_dir


def encode(array: np.ndarray, format: str = "PNG") -> bytes:
    """An image file's bytes of uint8 [h, w, c] or [h, w]."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder source: 3 classes, 20 training and 7 test images in all, of noise in different sizes, PNG and JPEG."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, counts in ("train", (9, 6, 5)), ("test", (3, 2, 2)):
        for name, count in zip(("ant", "bee", "cow"), counts, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + i, 24, 3), np.uint8)
                kind = ("PNG", "JPEG")[i % 2]
                path = folder / f"{i}.{kind.lower()}"
                path.write_bytes(encode(pixels, kind))
    return root
