"""Losses of distillation: values by hand, PyTorch's functions, gradients, real encoders and networks of images, errors."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from squeeze_jax import methods
from squeeze_jax.distill import (
    attention,
    attention_transfer,
    cosine,
    feature_map,
    hidden,
    soft_logits,
)
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _objective
from squeeze_jax.nas import sandwich

LOWEST = np.finfo(np.float32).min


def shapes(outputs):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), outputs)


def value(made, ours, theirs, batch=None, params=None, **more):
    """The loss of outputs as they are; `theirs` may be a tuple of several teachers'."""
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    ours, *theirs = (
        jax.tree.map(
            partial(np.asarray, dtype=np.float32),
            each,
            is_leaf=lambda x: isinstance(x, list),
        )
        for each in (ours, *theirs)
    )
    bound = made.bind(shapes(ours), [shapes(each) for each in theirs])
    rows = len(jax.tree.leaves(ours)[0])
    batch = {"mask": np.ones(rows, bool), **(batch or {}), **more}
    batch["teacher"] = tuple(theirs)
    params = bound.init(jax.random.key(0)) if params is None else params
    total, metrics = jax.jit(bound.loss)(ours.get("logits"), ours, batch, params)
    (only,) = metrics.values()
    assert total.shape == ()
    assert only == total
    return float(total)


def logits(*rows):
    return {"logits": np.array(rows, np.float32)}


# Soft logits. The student's probabilities are q = (1/4, 3/4), the teacher's p = (1/2, 1/2):
# KL(p || q) = 1/2 ln(1/2 : 1/4) + 1/2 ln(1/2 : 3/4) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3.
LN3 = math.log(3)
KL = 0.5 * math.log(4 / 3)


@pytest.mark.parametrize(
    ("options", "ours", "theirs", "wanted"),
    [
        ({}, logits([0, LN3]), logits([5, 5]), KL),
        # Of logits twice as large the probabilities at T = 2 are the same; T^2 = 4.
        ({"temperature": 2.0}, logits([0, 2 * LN3]), logits([5, 5]), 4 * KL),
        # The entropy of p is ln 2.
        ({"kind": "cross_entropy"}, logits([0, LN3]), logits([5, 5]), KL + math.log(2)),
        # The mean of p = (1/2, 1/2) and (1/4, 3/4) is (3/8, 5/8).
        (
            {},
            logits([0, LN3]),
            (logits([5, 5]), logits([1, 1 + LN3])),
            3 / 8 * math.log(3 / 2) + 5 / 8 * math.log(5 / 6),
        ),
        # Logits themselves: the mean of (1 - 3)^2 and (2 - 3)^2; of two teachers the mean, (2, 4): (1 + 4) / 2.
        ({"kind": "mse"}, logits([1, 2]), logits([3, 3]), 2.5),
        ({"kind": "mse"}, logits([1, 2]), (logits([3, 3]), logits([1, 5])), 2.5),
        # One class is a regression: (1 - 4)^2 and (2 - 3)^2, and T has no say.
        ({"temperature": 3.0}, logits([1], [2]), logits([4], [3]), 5.0),
        ({}, logits([1]), (logits([4]), logits([0])), 1.0),
    ],
)
def test_soft_logits_by_hand(options, ours, theirs, wanted):
    assert value(soft_logits.make(**options), ours, theirs) == pytest.approx(
        wanted, rel=1e-5
    )


def test_examples_that_do_not_count_weigh_nothing():
    ours, theirs = logits([0, LN3], [9, 1]), logits([5, 5], [-7, 1])
    found = value(soft_logits.make(), ours, theirs, mask=np.array([True, False]))
    assert found == pytest.approx(KL, rel=1e-5)
    nothing = value(soft_logits.make(), ours, theirs, mask=np.zeros(2, bool))
    assert nothing == 0


def test_of_a_span_only_real_positions_compete():
    # The first two positions are real and as in the first row above; starts agree, so half of it is left.
    ours = {"logits": {"start": [[1, 2, 50.0]], "end": [[0, LN3, -9]]}}
    theirs = {"logits": {"start": [[0, 1, -80.0]], "end": [[5, 5, 99]]}}
    attended = np.array([[True, True, False]])
    found = value(soft_logits.make(), ours, theirs, attended=attended)
    assert found == pytest.approx(KL / 2, rel=1e-5)
    # Mean squared errors of the real ones: 1 and 1 for starts, 25 and (ln 3 - 5)^2 for ends.
    found = value(soft_logits.make(kind="mse"), ours, theirs, attended=attended)
    wanted = (1 + (25 + (LN3 - 5) ** 2) / 2) / 2
    assert found == pytest.approx(wanted, rel=1e-5)


def test_logits_of_tokens_count_where_tokens_are_real_or_chosen():
    ours = logits([[0, LN3], [3, 1], [8, 8]])
    theirs = logits([[5, 5], [4, 2], [0, 9]])
    attended = np.array([[True, True, False]])
    # Differences of logits agree in the second token.
    found = value(soft_logits.make(), ours, theirs, attended=attended)
    assert found == pytest.approx(KL / 2, rel=1e-5)
    chosen = {"attended": attended, "chosen": np.array([[True, False, False]])}
    made = soft_logits.make(positions="chosen")
    assert value(made, ours, theirs, chosen) == pytest.approx(KL, rel=1e-5)
    with pytest.raises(UserError, match="the data chooses no tokens"):
        value(made, ours, theirs, attended=attended)
    # Logits of two places, the second of which is the padded one.
    some = [{"logits": each["logits"][:, [0, 2]]} for each in (ours, theirs)]
    places = {"attended": attended, "positions": np.array([[0, 2]])}
    assert value(soft_logits.make(), *some, places) == pytest.approx(KL, rel=1e-5)
    # Fewer are chosen than there are places: the third points to anything, here to the token that agrees.
    some = [{"logits": each["logits"][:, [0, 2, 1]]} for each in (ours, theirs)]
    places = places | {
        "positions": np.array([[0, 2, 1]]),
        "chosen": np.array([[True, False, False]]),
    }
    assert value(soft_logits.make(), *some, places) == pytest.approx(KL, rel=1e-5)
    both = {"masked_lm": ours["logits"], "next_sentence": [[2.0, 2 - LN3]]}
    given = {"masked_lm": theirs["logits"], "next_sentence": [[1.0, 1]]}
    # The second head is the first row of the table with its classes swapped; heads are averaged.
    found = value(made, {"logits": both}, {"logits": given}, chosen)
    assert found == pytest.approx(KL, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_logits_are_as_in_pytorch(temperature):
    rng = np.random.default_rng(0)
    ours, one, two = (rng.normal(0, 3, (5, 7)).astype(np.float32) for _ in range(3))
    made = soft_logits.make(temperature)

    def probabilities(x):
        return F.softmax(torch.tensor(x) / temperature, -1)

    for theirs in (one,), (one, two):
        target = sum(map(probabilities, theirs)) / len(theirs)
        log_q = F.log_softmax(torch.tensor(ours) / temperature, -1)
        wanted = F.kl_div(log_q, target, reduction="batchmean") * temperature**2
        found = value(made, {"logits": ours}, tuple({"logits": x} for x in theirs))
        assert found == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "ours", "theirs", "wanted"),
    [
        # Each class alone: sigmoid(ln 3) = 3/4 against 1/2, and 1/2 against itself.
        (
            {},
            logits([LN3, 0]),
            logits([0, 0]),
            (math.log(2 / 3) / 2 + math.log(2) / 2) / 2,
        ),
        # A softmax does not change if all logits grow by the same number; these probabilities do: the KL of 1/2 from 3/4.
        (
            {},
            logits([0, 0]),
            logits([LN3, LN3]),
            3 / 4 * math.log(3 / 2) + math.log(1 / 2) / 4,
        ),
        # One class is no regression: T^2 times the KL of 3/4 from 1/2.
        (
            {"temperature": 2.0},
            logits([2 * LN3]),
            logits([0]),
            4 * (math.log(2 / 3) / 2 + math.log(2) / 2),
        ),
        # The mean of two teachers' 1/4 and 3/4 is the student's 1/2.
        ({}, logits([0]), (logits([LN3]), logits([-LN3])), 0.0),
        ({"kind": "mse"}, logits([1, 2]), logits([3, 3]), 2.5),
    ],
)
def test_soft_logits_of_several_labels_by_hand(options, ours, theirs, wanted):
    made = soft_logits.make(**options).multi_label
    assert value(made, ours, theirs) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_logits_of_several_labels_are_as_in_pytorch(temperature):
    """The binary cross-entropy of the teacher's probabilities, without their entropy."""
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(0, 3, (5, 7)).astype(np.float32) for _ in range(2))
    z, t = (torch.tensor(x, dtype=torch.float64) / temperature for x in (ours, theirs))
    p, measure = t.sigmoid(), F.binary_cross_entropy_with_logits
    wanted = (measure(z, p) - measure(t, p)) * temperature**2
    for kind, target in (
        ("kl", wanted),
        ("cross_entropy", measure(z, p) * temperature**2),
    ):
        made = soft_logits.make(temperature, kind=kind).multi_label
        found = value(made, {"logits": ours}, {"logits": theirs})
        assert found == pytest.approx(target.item(), rel=1e-5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_losses_are_bound_for_the_labels_of_the_data(multi_label):
    """All labels of the teacher are far more likely than the student's; a softmax does not tell."""
    ours, theirs = logits([0, 1]), logits([10, 11])
    losses = (_objective.Loss("soft_logits", 1.0, soft_logits.make()),)
    bound = _objective.bind_losses(
        losses, shapes(ours), (shapes(theirs),), multi_label=multi_label
    )
    batch = {"mask": np.ones(1, bool), "teacher": (theirs,)}
    own = methods.Own({}, None, None, 0, True)
    loss, _ = bound.terms[0].objective.loss(ours["logits"], {}, batch, {}, own)
    assert (loss > 0.1) == multi_label


def test_gradient_of_soft_logits():
    # T^2 dKL/dz = T (q - p): 2 (1/4 - 1/2) and 2 (3/4 - 1/2). The teacher's is zero.
    made = soft_logits.make(temperature=2.0)
    ours, theirs = logits([0, 2 * LN3]), logits([5, 5])
    bound = made.bind(shapes(ours), shapes(theirs))

    def loss(z, t):
        batch = {"mask": np.ones(1, bool), "teacher": ({"logits": t},)}
        return bound.loss(z, {}, batch, {})[0]

    to_student, to_teacher = jax.grad(loss, (0, 1))(ours["logits"], theirs["logits"])
    np.testing.assert_allclose(to_student, [[-0.5, 0.5]], rtol=1e-5)
    np.testing.assert_array_equal(to_teacher, 0)


# Hidden states: one sequence of two tokens and padding, two channels.
STATES = {"layer1": [[[1, 2], [0, 3], [9, 9]]]}
TAUGHT = {"layer1": [[[1, 4], [1, 1], [-50, 7]]]}
REAL = {"attended": np.array([[True, True, False]])}


def test_hidden_states_by_hand():
    # Tokens: (0 + 4) / 2 = 2 and (1 + 4) / 2 = 2.5.
    assert value(hidden.make(), STATES, TAUGHT, REAL) == pytest.approx(2.25)
    first = hidden.make(tokens="first")
    assert value(first, STATES, TAUGHT, REAL) == pytest.approx(2)
    # W takes (1, 2) to (1, 2, 3) and (0, 3) to (0, 3, 3): (1 + 0 + 4) / 3 and (0 + 9 + 9) / 3.
    weight = {"layer1_layer1": np.array([[1, 0, 1], [0, 1, 1]], np.float32)}
    wide = {"layer1": [[[0, 2, 1], [0, 0, 0], [7, 7, 7]]]}
    assert value(hidden.make(), STATES, wide, REAL, weight) == pytest.approx(23 / 6)
    # Of length 1: (3, 4) / 5 and (4, 3) / 5 differ by 1/5 in each.
    ours, theirs = {"layer1": [[[3, 4]]]}, {"layer1": [[[8, 6]]]}
    found = value(hidden.make(normalise=True), ours, theirs)
    assert found == pytest.approx(0.04, rel=1e-5)


def test_cosine_by_hand_and_as_in_pytorch():
    # cos((3, 4), (8, 6)) = (24 + 24) / 50.
    ours, theirs = {"layer1": [[[3, 4]]]}, {"layer1": [[[8, 6]]]}
    assert value(cosine.make(), ours, theirs) == pytest.approx(0.04, rel=1e-5)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 5, 8)).astype(np.float32)
    attended = np.arange(5) < np.array([[5], [2], [3]])
    mask = np.array([True, True, False])
    real = torch.tensor(attended & mask[:, None])
    a_real, b_real = torch.tensor(a)[real], torch.tensor(b)[real]
    wanted = F.cosine_embedding_loss(a_real, b_real, torch.ones(len(a_real)))
    both = {"attended": attended, "mask": mask}
    found = value(cosine.make(), {"layer1": a}, {"layer1": b}, both)
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    wanted = F.mse_loss(a_real, b_real)
    found = value(hidden.make(), {"layer1": a}, {"layer1": b}, both)
    assert found == pytest.approx(wanted.item(), rel=1e-5)


def test_projected_hidden_states_are_as_in_pytorch():
    rng = np.random.default_rng(1)
    ours = {name: rng.standard_normal((2, 4, 3)) for name in ("embeddings", "layer1")}
    theirs = {
        name: rng.standard_normal((2, 4, 6))
        for name in ("embeddings", "layer1", "layer2")
    }
    weights = {
        name: rng.standard_normal((3, 6)).astype(np.float32)
        for name in ("layers", "embeddings_embeddings")
    }
    made = hidden.make(embeddings=True, shared=True)
    wanted = 0.0
    for s, t, w in (
        ("layer1", "layer2", "layers"),
        ("embeddings", "embeddings", "embeddings_embeddings"),
    ):
        state = torch.tensor(ours[s]).float() @ torch.tensor(weights[w])
        wanted += F.mse_loss(state, torch.tensor(theirs[t]).float()).item()
    assert value(made, ours, theirs, params=weights) == pytest.approx(wanted, rel=1e-5)
    init = made.bind(shapes(ours), shapes(theirs)).init(jax.random.key(0))
    assert {name: w.shape for name, w in init.items()} == dict.fromkeys(weights, (3, 6))
    many = {"layer1": np.zeros((1, 1, 300)), "layer2": np.zeros((1, 1, 300))}
    made = hidden.make(project=True)
    drawn = made.bind(shapes(many), shapes(many)).init(jax.random.key(0))
    assert set(drawn) == {"layer1_layer1", "layer2_layer2"}
    one, two = drawn.values()
    # A normal distribution cut off at two deviations has 0.8796 of its deviation.
    assert np.std(one) == pytest.approx(0.02 * 0.8796, rel=0.02)
    assert np.abs(one - two).max() > 0.01


# Attention: one head, two real tokens and padding, whose key no query sees.
SCORES = {"scores1": [[[[1, 2, LOWEST], [0, LN3, LOWEST], [5, 5, LOWEST]]]]}
TEACHER_SCORES = {"scores1": [[[[2, 4, LOWEST], [0, 0, LOWEST], [1, 2, LOWEST]]]]}


def test_attention_by_hand():
    # Squared errors of what is seen: 1, 4, 0 and (ln 3)^2.
    found = value(attention.make(), SCORES, TEACHER_SCORES, REAL)
    assert found == pytest.approx((5 + LN3**2) / 4, rel=1e-5)
    # Kept in float16 the teacher's lowest is -inf.
    stored = {"scores1": np.array(TEACHER_SCORES["scores1"], np.float32)}
    stored["scores1"][..., 2] = -np.inf
    found = value(attention.make(), SCORES, stored, REAL)
    assert found == pytest.approx((5 + LN3**2) / 4, rel=1e-5)
    # Of two heads (1, 2) and (3, 0) the mean is (2, 1), against one head (2, 4).
    ours = {"scores1": [[[[1, 2], [1, 2]], [[3, 0], [3, 0]]]]}
    theirs = {"scores1": [[[[2, 4], [2, 4]]]]}
    found = value(attention.make(heads="mean"), ours, theirs)
    assert found == pytest.approx(4.5)


def test_attention_probabilities_by_hand():
    made = attention.make("probabilities", layers=((-1, -1),))
    # The first query agrees, q = (1/2, 1/2); the second is the first row of soft logits.
    ours = {"scores1": [[[[2, 2, LOWEST], [0, LN3, LOWEST], [9, 0, LOWEST]]]]}
    theirs = {"attention1": [[[[0.5, 0.5, 0], [0.5, 0.5, 0], [1, 0, 0]]]]}
    assert value(made, ours, theirs, REAL) == pytest.approx(KL / 2, rel=1e-5)
    # Heads (1/2, 1/2) and (0, 1) of the student: mean (1/4, 3/4).
    ours = {"scores1": [[[[2, 2]] * 2, [[-80, 80]] * 2]]}
    theirs = {"attention1": [[[[0.5, 0.5]] * 2]]}
    made = attention.make("probabilities", heads="mean")
    assert value(made, ours, theirs) == pytest.approx(KL, rel=1e-5)


def test_causal_attention_counts_what_a_query_sees():
    # Scores above the diagonal are the lowest; below and on it the differences are 1, 2 and 3.
    ours = {"scores1": [[[[1, LOWEST], [2, 3]]]]}
    theirs = {"scores1": [[[[0, LOWEST], [0, 0]]]]}
    assert value(attention.make(), ours, theirs) == pytest.approx(14 / 3)
    # A student that sees more than its teacher learns of what both see.
    more = {"scores1": [[[[1, 7], [2, 3]]]]}
    assert value(attention.make(), more, theirs) == pytest.approx(14 / 3)


def test_attention_is_as_in_pytorch():
    rng = np.random.default_rng(2)
    ours, theirs = rng.normal(0, 2, (2, 3, 4, 5, 5)).astype(np.float32)
    attended = np.arange(5) < np.array([[5], [2], [3]])
    pad = np.where(attended, 0, LOWEST).astype(np.float32)[:, None, None, :]
    ours, theirs = ours + pad, theirs + pad
    square, divergence, queries = 0.0, 0.0, 0
    for row, length in enumerate((5, 2, 3)):
        s, t = (torch.tensor(x[row, :, :length, :length]) for x in (ours, theirs))
        square += F.mse_loss(s, t, reduction="sum").item()
        log_q, p = F.log_softmax(s, -1), F.softmax(t, -1)
        divergence += F.kl_div(log_q, p, reduction="sum").item()
        queries += 4 * length
    pairs = 4 * (25 + 4 + 9)
    teacher = {"scores1": theirs, "attention1": np.array(jax.nn.softmax(theirs, -1))}
    batch = {"attended": attended}
    found = value(attention.make(), {"scores1": ours}, teacher, batch)
    assert found == pytest.approx(square / pairs, rel=1e-5)
    made = attention.make("probabilities")
    found = value(made, {"scores1": ours}, teacher, batch)
    assert found == pytest.approx(divergence / queries, rel=1e-4)


def test_feature_maps_of_text():
    # (1, 3) is normalised to (-1, 1), (6, 2) to (1, -1); means 2 and 4, variances 1 and 4.
    ours, theirs = {"layer1": [[[1, 3]]]}, {"layer1": [[[6, 2]]]}
    make = feature_map.make
    assert value(make(), ours, theirs) == pytest.approx(4, rel=1e-5)
    assert value(make(mean=10), ours, theirs) == pytest.approx(44, rel=1e-5)
    assert value(make(variance=10), ours, theirs) == pytest.approx(34, rel=1e-5)
    # (25 + 1) / 2
    assert value(make(normalise=False), ours, theirs) == pytest.approx(13)
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 2, 3, 8)).astype(np.float32)
    norm = partial(F.layer_norm, normalized_shape=(8,), eps=1e-12)
    wanted = F.mse_loss(norm(torch.tensor(a)), norm(torch.tensor(b)))
    found = value(make(), {"layer1": a}, {"layer1": b})
    assert found == pytest.approx(wanted.item(), rel=1e-5)


def test_feature_maps_of_images_are_as_in_pytorch():
    rng = np.random.default_rng(4)
    a = rng.standard_normal((2, 8, 4, 3)).astype(np.float32)
    b = rng.standard_normal((2, 4, 4, 5)).astype(np.float32)
    weight = rng.standard_normal((3, 5)).astype(np.float32)

    def channels_first(x):
        return torch.tensor(x).permute(0, 3, 1, 2)

    kernel = torch.tensor(weight.T)[:, :, None, None]
    regressed = F.avg_pool2d(F.conv2d(channels_first(a), kernel), (2, 1))
    wanted = F.mse_loss(regressed, channels_first(b)).item()
    made = feature_map.make(layers=(("fire2", "conv3"),))
    params = {"fire2_conv3": weight}
    found = value(made, {"fire2": a}, {"conv3": b}, params=params)
    assert found == pytest.approx(wanted, rel=1e-4)
    # The second image does not count.
    one = value(
        made, {"fire2": a}, {"conv3": b}, {"mask": np.array([True, False])}, params
    )
    wanted = F.mse_loss(regressed[:1], channels_first(b)[:1]).item()
    assert one == pytest.approx(wanted, rel=1e-4)
    # A regressor keeps the size: the variance of its weights is 1 / 200.
    many = {"a": np.zeros((1, 2, 2, 200))}
    made = feature_map.make(layers=(("a", "a"),), project=True)
    drawn = made.bind(shapes(many), shapes(many)).init(jax.random.key(0))
    assert np.std(drawn["a_a"]) == pytest.approx(200**-0.5, rel=0.02)


def test_attention_transfer_by_hand_and_as_in_pytorch():
    # Sums of squares (3, 4) and (8, 6) become (0.6, 0.8) and (0.8, 0.6): the mean of 0.04 and 0.04.
    ours = {"a": [[[[1, 1, 1], [2, 0, 0]]]]}
    theirs = {"b": [[[[2, 2], [1, math.sqrt(5)]]]]}
    made = attention_transfer.make(layers=(("a", "b"),))
    assert value(made, ours, theirs) == pytest.approx(0.04, rel=1e-5)
    rng = np.random.default_rng(5)
    a = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    b = rng.standard_normal((2, 8, 8, 6)).astype(np.float32)

    def energy(x):
        return torch.tensor(x).pow(2).sum(-1)

    pooled = F.avg_pool2d(energy(b)[:, None], 2)[:, 0]
    one, two = (F.normalize(x.flatten(1)) for x in (energy(a), pooled))
    wanted = (one - two).pow(2).mean().item()
    assert value(made, {"a": a}, {"b": b}) == pytest.approx(wanted, rel=1e-5)


def test_in_place():
    # The labels are (1/2, 1/2) and q = (1/4, 3/4): the cross-entropy is that of the table above.
    big, small = jnp.array([[5.0, 5], [1, 2]]), jnp.array([[0, LN3], [4, 0]])
    mask = jnp.array([True, False])
    soft = sandwich.soft_labels(big)
    np.testing.assert_allclose(soft[0], [0.5, 0.5])
    found = sandwich.soft_cross_entropy(small, soft, mask)
    assert float(found) == pytest.approx(KL + math.log(2), rel=1e-5)
    found = sandwich.soft_cross_entropy(
        2 * small, sandwich.soft_labels(2 * big, 2.0), mask, 2.0
    )
    assert float(found) == pytest.approx(4 * (KL + math.log(2)), rel=1e-5)

    def both(big, small):
        return sandwich.soft_cross_entropy(small, sandwich.soft_labels(big), mask)

    to_big, to_small = jax.grad(both, (0, 1))(big, small)
    np.testing.assert_array_equal(to_big, 0)
    np.testing.assert_allclose(to_small, [[-0.25, 0.25], [0, 0]], atol=1e-6)
    wanted = F.cross_entropy(
        torch.tensor(np.array(small)), torch.tensor(np.array(soft))
    )
    found = sandwich.soft_cross_entropy(small, soft, jnp.ones(2, bool))
    assert float(found) == pytest.approx(wanted.item(), rel=1e-5)


def test_one_teacher_of_several_and_bfloat16():
    one, two = {"layer1": [[[1, 4]]]}, {"layer1": [[[1, 2]]]}
    ours = {"layer1": [[[1, 2]]]}
    assert value(hidden.make(teacher=0), ours, (one, two)) == pytest.approx(2)
    assert value(hidden.make(teacher=1), ours, (one, two)) == 0
    # Losses are float32 whatever the networks compute in: in bfloat16 256.5 would be 256, and the loss 0.
    half = {"layer1": jnp.full((1, 1, 2), 256, jnp.bfloat16)}
    taught = {"layer1": jnp.full((1, 1, 2), 256.5, jnp.float16)}
    bound = hidden.make().bind(shapes(half), shapes(taught))
    batch = {"mask": np.ones(1, bool), "teacher": (taught,)}
    total, _ = bound.loss(None, half, batch, {})
    assert total.dtype == jnp.float32
    assert float(total) == 0.25
