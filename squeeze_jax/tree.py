"""Parameter trees by name: the one rule language, sizes and differences.

A name is the path of a leaf joined by "/", such as `fire2/expand3x3/kernel`. Rules are ordered `(regex, value)` pairs;
the first regex that is found in a name (`re.search`) decides. Sharding, weight decay, freezing, sparsity and bits all
use them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from squeeze_jax.errors import UserError

Rules = Sequence[tuple[str, Any]]


def name(path) -> str:
    """Returns the name of a key path from `jax.tree_util.tree_flatten_with_path`: its parts, joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree) -> dict[str, Any]:
    """Returns `{name: leaf}` in the order of the tree."""
    return {
        name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def map_named(fn: Callable[..., Any], tree, *rest):
    """Maps `fn(name, leaf, *leaves of rest)` over the leaves of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(name(path), *leaves), tree, *rest
    )


def compile_rules(rules: Any, where: str) -> list[tuple[re.Pattern, Any]]:
    """Returns pairs (regular expression, value), compiled.

    Raises:
      UserError: a rule is no such pair, or its expression is malformed.
    """
    for rule in rules:
        if not (
            isinstance(rule, list | tuple)
            and len(rule) == 2
            and isinstance(rule[0], str)
        ):
            raise UserError(
                f"{where}: {rule!r} should be a pair (regular expression, value)"
            )
    try:
        return [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise UserError(
            f"{where}: {error.pattern!r} is not a regular expression ({error})"
        ) from None


def apply_rules(rules: Rules, tree, *, default: Any = None, where: str = "rules"):
    """Returns a tree of the same structure whose leaves are the values of the first matching rules.

    Args:
      rules: ordered `(regex, value)` pairs.
      tree: any pytree; only its names matter.
      default: the value of a leaf that no rule matches.
      where: the name of the rules in an error, such as "config.optim.decay".

    Raises:
      UserError: a regex is malformed or matches no name at all; a dead rule is a mistake.
    """
    compiled = compile_rules(rules, where)
    names = list(flatten(tree))
    for pattern, _ in compiled:
        if not any(pattern.search(n) for n in names):
            some = ", ".join(names[:3])
            raise UserError(
                f"{where}: the rule {pattern.pattern!r} matches no parameter; names look like {some}"
            )
    return map_named(
        lambda n, _: next((v for p, v in compiled if p.search(n)), default), tree
    )


def value_at(arrays: Any, path: str) -> Any:
    """Returns what stands at a path in nested dicts; {} if there is nothing."""
    for name in path.split("/"):
        arrays = arrays.get(name, {})
    return arrays


def with_value_at(arrays: Any, path: str, value: Any) -> dict[str, Any]:
    """Returns nested dicts with another value at a path."""
    name, _, rest = path.partition("/")
    return {
        **arrays,
        name: with_value_at(arrays.get(name, {}), rest, value) if rest else value,
    }


def size(tree) -> int:
    """Returns the number of elements in all leaves, which are arrays or shapes (of `jax.eval_shape`)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    """Returns the number of bytes in all leaves, which are arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def differences(expected, found) -> list[str]:
    """Compares two trees; returns one line for each leaf that one of them lacks or has with another shape, [] if they fit."""
    expected, found = flatten(expected), flatten(found)
    lines = []
    for key in list(expected) + [k for k in found if k not in expected]:
        if key not in found:
            lines.append(f"{key}: expected {tuple(expected[key].shape)}, not there")
        elif key not in expected:
            lines.append(f"{key}: found {tuple(found[key].shape)}, not expected")
        elif tuple(expected[key].shape) != tuple(found[key].shape):
            lines.append(
                f"{key}: expected {tuple(expected[key].shape)}, found {tuple(found[key].shape)}"
            )
    return lines


def owner(name: str, shape: Sequence[int], parameters: Mapping[str, Any]) -> str | None:
    """Returns the parameter that a leaf of a training state belongs to, such as a momentum; None if it is of none.

    What an optimizer or an average keeps for a parameter ends in the parameter's own name and has its shape.

    Args:
      name: of the leaf, such as "opt/1/trace/conv1/kernel".
      shape: of the leaf.
      parameters: {name: array or shape} of all parameters.
    """
    parts = name.split("/")
    for i in range(len(parts)):
        ending = "/".join(parts[i:])
        if ending in parameters and tuple(parameters[ending].shape) == tuple(shape):
            return ending
    return None


def overlaid(whole, parts):
    """Returns `whole` with the leaves of `parts` that have the same name and shape in their places."""
    named = flatten(parts)

    def leaf(name, value):
        part = named.get(name)
        return value if part is None or part.shape != value.shape else part

    return map_named(leaf, whole)
