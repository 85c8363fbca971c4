"""Whether an exported file computes what the live model computes, and where it goes apart: by hand."""

import numpy as np
import pytest

from squeeze_jax.export import parity


def compare(live, found, integer=False, **limits):
    """Of networks with one output."""
    limits = dict(tolerance=1e-4, int8_agreement=0.5) | limits
    return parity.compare(
        {"logits": live}, {"logits": found}, integer=integer, **limits
    )


def test_compare_by_hand():
    live = np.array([[1.0, 2.0, -8.0], [0.5, 0.25, 0.0]], np.float32)
    found = live + np.array([[0, 0, 0.0007], [0, 0.3, 0]], np.float32)
    verdict = compare(live, found)
    assert not verdict.agrees
    assert (verdict.output, verdict.index) == ("logits", (1, 1))
    np.testing.assert_allclose(verdict.difference, 0.3, rtol=1e-6)
    assert verdict.agreement == 0.5  # the second image's top class moved
    assert compare(live, found, integer=True).agrees
    assert not compare(live, found, integer=True, int8_agreement=0.51).agrees
    near = live + np.array([[0, 0, 0.0007], [0, 0, 0]], np.float32)  # 8e-4 is the limit
    assert compare(live, near).agrees
    near[0, 2] -= 0.0002 + 0.0014
    assert not compare(live, near).agrees


def test_both_ends_of_a_span_count():
    """Of four examples one has another start, one another end, one both: a quarter agrees."""
    live = {"start": np.eye(4, dtype=np.float32), "end": np.eye(4, dtype=np.float32)}
    found = {name: values.copy() for name, values in live.items()}
    found["start"][[0, 2], 3] = found["end"][[1, 2], 3] = 5
    limits = dict(integer=True, tolerance=1e-4)
    verdict = parity.compare(live, found, int8_agreement=0.25, **limits)
    assert verdict.agreement == 0.25
    assert verdict.agrees
    assert "25.0% agreement" in str(verdict)
    assert not parity.compare(live, found, int8_agreement=0.26, **limits).agrees


def test_each_output_has_its_own_scale():
    """A difference of 0.05 is nothing to a thousand and much to one, in whichever output it is."""
    live = {"large": np.full((2, 3), 1000.0), "small": np.ones((2, 5, 2))}
    limits = dict(integer=False, tolerance=1e-4, int8_agreement=0)
    found = live | {"large": live["large"] + 0.05}
    assert parity.compare(live, found, **limits).agrees
    found["small"] = live["small"].copy()
    found["small"][1, 4, 0] += 0.04
    verdict = parity.compare(live, found, **limits)
    assert not verdict.agrees
    assert (verdict.output, verdict.index) == ("small", (1, 4, 0))
    assert "at small[1, 4, 0]" in str(verdict)


def test_agreement_of_a_regression():
    """RMS errors of 1 in numbers of RMS 5: four fifths; and positions count as shares of an example."""
    live = np.array([[3.0], [-4.0], [5.0], [-np.sqrt(50)]], np.float32)
    found = live + np.array([[1], [-1], [1], [1]], np.float32)
    assert compare(live, found, integer=True).agreement == pytest.approx(0.8)
    assert compare(live, live, integer=True).agreement == 1
    assert compare(live, -9 * live, integer=True).agreement == 0
    scores = np.eye(4, dtype=np.float32)[None].repeat(2, 0)  # [2, 4 tokens, 4 classes]
    moved = scores.copy()
    moved[1, 0] = [0, 0, 0, 1]
    assert compare(scores, moved, integer=True).agreement == (1 + 0.75) / 2


@pytest.mark.parametrize("integer", [False, True])
def test_a_file_that_gives_no_number_disagrees(integer):
    live = np.ones((2, 3), np.float32)
    found = live.copy()
    found[1, 2] = np.nan
    verdict = compare(live, found, integer, tolerance=1e9, int8_agreement=0.0)
    assert not verdict.agrees
    assert verdict.difference == np.inf
    assert verdict.index == (1, 2)


def test_first_diverging_by_hand():
    live = {"a": np.full((1, 4), 100.0), "b": np.ones((1, 4)), "c": np.ones((1, 4))}
    found = {"a": live["a"] + 0.009, "b": live["b"] + 0.2, "c": live["c"] + 0.3}
    at = dict(integer=False, tolerance=1e-4)
    assert parity.first_diverging(live, found, **at) == ("b", pytest.approx(0.2))
    at = dict(integer=True, tolerance=1e-4)  # relative RMS errors 0.00009, 0.2, 0.3
    assert parity.first_diverging(live, found, **at) == ("c", pytest.approx(0.3))
    assert parity.first_diverging(live, live, **at) is None
    lowest = np.finfo(np.float32).min  # of what may not be seen
    live["a"][0, 1], found["a"][0, 1] = lowest, -1000.0
    assert parity.first_diverging(live, found, **at) == ("c", pytest.approx(0.3))


def test_the_agreement_is_the_tasks_own():
    """Agreements 1, 0.5 and 0 of three examples: 0.5 in the mean, whatever the top classes are."""
    live = {"boxes": np.float32([[0, 0], [0, 0], [0, 0]])}
    found = {"boxes": np.float32([[0, 0], [0, 1], [0, 2]])}
    limits = dict(integer=True, tolerance=1e-4)

    def overlap(live, found):
        return 1 - np.abs(live["boxes"] - found["boxes"]).max(-1) / 2

    verdict = parity.compare(
        live, found, int8_agreement=0.5, agreement=overlap, **limits
    )
    assert verdict.agrees
    assert verdict.agreement == pytest.approx(0.5)
    assert not parity.compare(
        live, found, int8_agreement=0.51, agreement=overlap, **limits
    ).agrees
    # By the top classes the first example alone is the same.
    verdict = parity.compare(live, found, int8_agreement=0.5, **limits)
    assert verdict.agreement == pytest.approx(1 / 3)


def test_a_map_of_classes_agrees_where_its_pixels_do():
    """Of 2 x 2 pixels three keep their class in the first map, all in the second: 7 / 8."""
    live = np.eye(3, dtype=np.float32)[[[[0, 1], [2, 0]], [[1, 1], [2, 2]]]]
    found = np.eye(3, dtype=np.float32)[[[[0, 1], [2, 1]], [[1, 1], [2, 2]]]]
    assert parity.same_answers({"map": live}, {"map": found}).tolist() == [0.75, 1.0]
