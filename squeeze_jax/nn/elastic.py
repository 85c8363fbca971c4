"""The options of a network that a search varies: one value for each block or stage."""

from collections.abc import Mapping
from typing import Any

from squeeze_jax.errors import UserError


def one_per_position(
    space: Mapping[str, tuple[tuple, ...]], options: Mapping[str, Any]
) -> dict[str, tuple]:
    """Returns for each elastic option one value per position.

    Args:
      space: {option: choices of each position}, ascending.
      options: {option: one value for all positions, one value for each, or None for the largest of each}.

    Raises:
      UserError: an option has another number of values than positions, or a value is not among its choices.
    """
    values = {}
    for name, choices in space.items():
        value = options.get(name)
        if value is None:
            value = tuple(c[-1] for c in choices)
        single_value = not isinstance(value, tuple | list)
        if single_value:
            value = (value,) * len(choices)
        if len(value) != len(choices):
            raise UserError(
                f"{name} has {len(value)} values: give one for all, or {len(choices)}, one for each position"
            )
        for place, (single, allowed) in enumerate(zip(value, choices, strict=True)):
            flags = any(isinstance(choice, bool) for choice in allowed)
            # True equals 1, but is no number of layers.
            if single not in allowed or isinstance(single, bool) != flags:
                where = name if single_value else f"{name}[{place}]"
                raise UserError(
                    f"{where} = {single!r} is not in the space: choose one of {', '.join(map(str, allowed))}"
                )
        values[name] = tuple(
            allowed[allowed.index(single)]  # 3, not 3.0
            for single, allowed in zip(value, choices, strict=True)
        )
    return values
