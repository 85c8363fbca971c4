"""Reads published tables of latencies: those of ProxylessNAS and once-for-all, and of FBNet.

Cai, Zhu, Han 2019, arXiv 1812.00332, and Cai et al. 2019, arXiv 1908.09791: a YAML file with a mean for each operator, whose
name has its shapes. Wu et al. 2019, arXiv 1812.03443 (FBNet): a matrix of layers and operators.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from squeeze_jax import files
from squeeze_jax.cost.latency_table import Table, Timing, key_of
from squeeze_jax.errors import UserError, shortened
from squeeze_jax.nas.costs import Pieces, Placed, output_of


class Matrix(NamedTuple):
    """The latencies of FBNet's operators.

    Attributes:
      operators: their names, such as "ir_k3_e6".
      ms: [layers, operators].
    """

    operators: tuple[str, ...]
    ms: np.ndarray


def read_operators(path: str | Path) -> dict[str, Timing]:
    """Reads a YAML file of ProxylessNAS or once-for-all: {operator: latency}.

    Raises:
      UserError: the file cannot be read, or an operator has no mean above 0.
    """
    path = files.path(path)
    try:
        content = yaml.safe_load(files.read_file(path))
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is no table of latencies: it is no YAML") from None
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} is no table of latencies: it names no operator")
    operators = {}
    for name, entry in content.items():
        try:
            mean, count = float(entry["mean"]), int(entry.get("count", 1))
            deviation = float(entry.get("var", 0.0)) ** 0.5
        except (TypeError, ValueError, KeyError, AttributeError):
            mean = 0.0
        if not 0 < mean < np.inf:
            raise UserError(
                f"{path}: {shortened(str(name), 80)} has no mean above 0: correct the entry, or remove it"
            )
        operators[str(name).rstrip(":")] = Timing(mean, deviation / mean, count)
    return operators


def read_matrix(path: str | Path) -> Matrix:
    """Reads FBNet's text file: a line with the operators' names, then for each layer the microseconds of each operator.

    Raises:
      UserError: the file cannot be read, or is no such matrix.
    """
    path = files.path(path)
    try:
        names, *rows = files.read_file(path).decode().strip().splitlines()
        microseconds = np.asarray([[float(x) for x in row.split()] for row in rows])
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(
            f"{path} is no matrix of latencies: {shortened(str(error), 80)}"
        ) from None
    operators = tuple(names.split())
    if microseconds.ndim != 2 or microseconds.shape[1:] != (len(operators),):
        raise UserError(
            f"{path} is no matrix of latencies: each line should have {len(operators)} numbers, one for each operator"
        )
    return Matrix(operators, microseconds / 1e3)


def proxylessnas(path: str | Path, device: str, pieces: Pieces) -> Table:
    """Returns the latencies of the pieces of a space of ProxylessNAS' blocks from a published file.

    The file that the authors have measured on a Pixel 1 fits `ofa_proxyless` with width 1.0 and the expansions 3 and 6, at 224
    pixels.

    Args:
      path: a file for `read_operators`.
      device: name of the device that was measured.
      pieces: of the space.

    Raises:
      UserError: see `read_operators`; or the file lacks an operator of the space.
    """
    operators, found = read_operators(path), {}
    for placed in pieces.distinct:
        name = operator_name(placed)
        if name not in operators:
            raise UserError(
                f"{path} has no operator {name}: the table of Pixel 1 fits config.model = {{'name': 'ofa_proxyless', 'width':"
                " 1.0}} with the choices {'expand': (3, 6)} at 224 pixels"
            )
        key = key_of(placed.piece.module, placed.example)
        found[key] = operators[name]
    about = dict(device=device, runtime=f"published in {Path(path).name}")
    return Table(about | dict(format="file", threads=1, statistic="mean"), found)


def operator_name(placed: Placed) -> str:
    """Returns ProxylessNAS' name of a piece, such as "Conv-input:224x224x3-output:112x112x32".

    Raises:
      UserError: the piece is none of that paper's operators.
    """
    module, shape = placed.piece.module, placed.example.shape
    kind, output = type(module).__name__, output_of(placed).shape
    if kind == "Stem":
        return f"Conv-input:{_sides(shape)}-output:{_sides(output)}"
    if kind == "Head":
        mixed = (*shape[:-1], output[-1])
        return f"Conv_1-input:{_sides(shape)}-output:{_sides(mixed)}"
    if kind == "Classifier":
        return f"Logits-input:7x7x{shape[-1]}-output:{output[-1]}"
    if kind == "Bottleneck":
        ratio = round(module.expand / module.inputs)
        return (
            f"expanded_conv-input:{_sides(shape)}-output:{_sides(output)}-expand:{ratio}-kernel:{module.kernel}"
            f"-stride:{module.strides}-idskip:{int(module.residual)}"
        )
    raise UserError(
        f"{kind} is no operator of ProxylessNAS: choose config.model.name = 'ofa_proxyless'"
    )


def _sides(shape: tuple[Any, ...]) -> str:
    return "x".join(map(str, shape[1:]))
