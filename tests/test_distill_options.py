"""Options of the losses of distillation: which layers are compared, and what makes no sense."""

import jax
import numpy as np
import pytest

from squeeze_jax import registry
from squeeze_jax.distill import attention, cosine, feature_map, hidden, soft_logits
from squeeze_jax.errors import UserError


@pytest.mark.parametrize(
    ("layers", "students", "teachers", "wanted"),
    [
        # TinyBERT, 1909.10351 section 4.1: n to 3 n.
        ("uniform", 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("uniform", 2, 2, [(1, 1), (2, 2)]),
        # 1908.09355, section 3.2: {2, 4, 6, 8, 10} and {7, 8, 9, 10, 11} of 12 for 6.
        ("skip", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),
        ("last", 6, 12, [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]),
        (((1, 5), (-1, -2)), 2, 7, [(1, 5), (2, 6)]),
        ([["layer1", -1]], 2, 7, [(1, 7)]),
    ],
)
def test_layers_are_mapped(layers, students, teachers, wanted):
    def states(count):
        state = jax.ShapeDtypeStruct((1, 1, 1), np.float32)
        return {f"layer{n}": state for n in range(1, count + 1)}

    made = hidden.make(layers=layers, project=True)
    bound = made.bind(states(students), states(teachers))
    assert list(bound.wants) == [f"layer{t}" for _, t in wanted]
    names = {f"layer{s}_layer{t}" for s, t in wanted}
    assert set(bound.init(jax.random.key(0))) == names


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            soft_logits.make,
            {"temperature": 0.0},
            "temperature = 0.0 should be positive",
        ),
        (soft_logits.make, {"temperature": -1.0}, "should be positive"),
        (soft_logits.make, {"kind": "mse", "temperature": 2.0}, "has no effect"),
        (hidden.make, {"layers": "unifrom"}, "did you mean 'uniform'"),
        (hidden.make, {"layers": (1, 2)}, r"layers\[0\] = 1 .int. should be tuple"),
        (cosine.make, {"layers": ((1, 2, 3),)}, "should be tuple"),
        (feature_map.make, {"layers": ()}, "at least one pair"),
        (
            feature_map.make,
            {"variance": -1.0},
            "variance = -1.0 should not be negative",
        ),
        (attention.make, {"layers": (("scores1", 2),)}, "two numbers of layers"),
    ],
)
def test_options_that_make_no_sense(make, options, message):
    with pytest.raises(UserError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


def test_options_are_checked_as_a_config_is():
    registry.check(hidden.make, {"layers": [[1, 2]], "project": True}, "config")
    with pytest.raises(UserError, match=r"kind = 'kld'"):
        registry.check(soft_logits.make, {"kind": "kld"}, "config.objective")
    found = registry.names("squeeze_jax.distill")
    assert {"soft_logits", "hidden", "attention", "cosine", "feature_map"} < set(found)
