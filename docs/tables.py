"""Generates the tables of the documentation.

`python docs/tables.py` counts parameters and MACs of all networks and writes `docs/networks.md`, which takes minutes. The
recorded results in `docs/results` become tables whenever the documentation is built.
"""

import importlib
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from squeeze_jax import cost, models, registry
from squeeze_jax.report.units import count

RESULTS = pathlib.Path(__file__).parent / "results"
TEXT_TOKENS = 128
# Input size that an image network is made for, where it is not 224 pixels.
SIZES = {
    "efficientnet": dict(zip((f"b{n}" for n in range(8)), (224, 240, 260, 300, 380, 456, 528, 600), strict=True))
    | dict(zip((f"lite{n}" for n in range(5)), (224, 240, 260, 280, 300), strict=True)),
    "ofa_mobilenet_v3": {"cifar": 32},
    "slimmable": {"small": 16},
}  # fmt: skip
SMALL = ("tiny", "toy")  # variants for tests


def write(folder: pathlib.Path) -> None:
    """Writes a section `NAME.md` for each file of results to `folder`."""
    folder.mkdir(exist_ok=True)
    for path in sorted(RESULTS.glob("*.json")):
        (folder / f"{path.stem}.md").write_text(result(json.loads(path.read_text())))


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Returns a table in Markdown."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def result(recorded: Mapping[str, Any]) -> str:
    """Returns a section about one file of results: its title, how it was measured, and the table."""
    note = f"\n{recorded['note']}\n" if "note" in recorded else ""
    return (
        f"## {recorded['title']}\n\n{recorded['better']} Measured on {recorded['machine']}: {recorded['setting']}."
        f" Command: `{recorded['command']}`\n\n{table(recorded['columns'], recorded['rows'])}{note}\n"
    )


def variants() -> list[tuple[str, str, str]]:
    """Returns (name, variant, what it reads) of each published network."""
    found = []
    for name in registry.names("squeeze_jax.models"):
        module = importlib.import_module(f"squeeze_jax.models.{name}")
        reads = getattr(module, "INPUTS", "images")
        table = getattr(module, "VARIANTS", ())
        found += [(name, v, reads) for v in table if v not in SMALL]
    return found


def networks() -> str:
    """Returns the page about all networks and variants, with parameters and MACs counted from the code."""
    rows = {"images": [], "tokens": []}
    for name, variant, reads in variants():
        print(name, variant, flush=True)
        rows[reads].append(row(name, variant, reads))
    images = ("network", "variant", "pixels", "parameters", "MACs per image")
    tokens = ("network", "variant", "tokens", "parameters", "MACs per sequence")
    return (
        "# Networks and their variants\n\nParameters and multiply-accumulates (MACs) as the code counts them"
        " (`python docs/tables.py`): for images with 1,000\nclasses, for text with the head that each network has by default."
        "\n\n## Networks for images\n\n"
        + table(images, rows["images"])
        + "\n## Networks for text\n\n"
        + table(tokens, rows["tokens"])
    )


def row(name: str, variant: str, reads: str) -> tuple[str, ...]:
    """Returns name, variant, input size, parameters and MACs of one network."""
    if reads == "images":
        size = SIZES.get(name, {}).get(variant, 224)
        net = models.make(name=name, variant=variant, num_classes=1000)
        inputs = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    else:
        size = TEXT_TOKENS
        net = models.make(name=name, variant=variant)
        inputs = {"tokens": jax.ShapeDtypeStruct((1, size), jnp.int32)}
    macs, parameters = cost.macs(net, inputs), cost.parameters(net, inputs)
    return name, variant, str(size), count(parameters), count(macs.total)


if __name__ == "__main__":
    (pathlib.Path(__file__).parent / "networks.md").write_text(networks())
