"""ELECTRA's generator and discriminator as one network: what `transformers` computes of the two, and how they are joined."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from squeeze_jax import models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.models import electra, electra_pretraining
from squeeze_jax.train.losses import replaced

# Quick to compile: the numbers are the same to rounding, and here compiling takes all the time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LENGTH, PLACES, MASK = 17, 4, 3


def batch(rows=3, gathers=True):
    """Masked tokens of three lengths; one place of each row does not count, one example does not."""
    rng = np.random.default_rng(0)
    original = rng.integers(5, 99, (rows, LENGTH)).astype(np.int32)
    attended = np.arange(LENGTH) < np.resize([17, 9, 12], rows)[:, None]
    at = np.argsort(rng.random((rows, 9)), 1)[:, :PLACES].astype(np.int32)
    chosen = np.arange(PLACES) < PLACES - 1
    chosen = np.broadcast_to(chosen, at.shape)
    tokens, every = original.copy(), np.zeros(original.shape, bool)
    for row in range(rows):
        tokens[row, at[row, : PLACES - 1]] = MASK
        every[row, at[row, : PLACES - 1]] = True
    found = {
        "tokens": tokens,
        "segments": np.zeros_like(tokens),
        "attended": attended,
        "mask": np.arange(rows) < rows - 1,
    }
    if not gathers:
        return found | {"targets": original, "chosen": every}
    targets = np.take_along_axis(original, at, 1)
    return found | {"positions": at, "targets": targets, "chosen": chosen}


def inputs(batch):
    """What the network is called with, as the data make it of a batch."""
    return {k: v for k, v in batch.items() if k != "mask"}


def make(**options):
    rates = {"dropout": 0.0, "attention_dropout": 0.0}
    return models.make(
        "electra_pretraining", **{"variant": "toy", "layers": 1} | rates | options
    )


def filled(net, x):
    """Variables of noise: quicker than to compile the initialisation."""
    rng = np.random.default_rng(0)

    def noise(name, a):
        return rng.normal(name.endswith("/scale"), 0.3, a.shape).astype(np.float32)

    return tree.map_named(noise, jax.eval_shape(net.init, jax.random.key(0), x))


@pytest.fixture(scope="module")
def run():
    """Network, variables, what it is called with, and what it gives."""
    net, x = make(), inputs(batch())
    variables = filled(net, x)
    apply = jit(lambda v, x, key: net.apply(v, x, rngs={"sample": key}))
    return net, variables, x, *apply(variables, x, jax.random.key(0))


@pytest.mark.parametrize("variant", ["small", "base", "large"])
def test_generators_are_the_papers(variant):
    net = models.make("electra_pretraining", variant=variant)
    assert net.row == electra.VARIANTS[variant]
    assert net.generator_row == electra.VARIANTS[f"{variant}_generator"]


def test_both_are_as_in_transformers(transformers, tmp_path, run):
    net, variables, x, logits, endpoints = run
    parts = electra_pretraining.split_networks(net, variables)
    theirs = {}
    for name, part in parts._asdict().items():
        models.save(tmp_path / name, *part)
        kind = {"generator": "MaskedLM", "discriminator": "PreTraining"}[name]
        theirs[name] = getattr(transformers, f"ElectraFor{kind}").from_pretrained(
            tmp_path / name
        )
        assert models.load(tmp_path / name)[0] == part[0]
    told = batch()
    labels = np.full(x["tokens"].shape, -100)
    for row in range(2):
        at = x["positions"][row][x["chosen"][row]]
        labels[row, at] = x["targets"][row][x["chosen"][row]]
    original = np.where(labels < 0, x["tokens"], labels)[:2]
    corrupted = np.asarray(endpoints["corrupted"])
    mask = {"attention_mask": torch.tensor(x["attended"][:2]).long()}
    with torch.no_grad():
        first = theirs["generator"](
            torch.tensor(x["tokens"][:2]).long(),
            labels=torch.tensor(labels[:2]),
            **mask,
        )
        second = theirs["discriminator"](
            torch.tensor(corrupted[:2]).long(),
            labels=torch.tensor(corrupted[:2] != original).float(),
            **mask,
        )
    loss, metrics = replaced.make()(logits, endpoints, told)
    assert metrics["generator_loss"] == pytest.approx(first.loss.item(), rel=1e-4)
    assert metrics["replaced_loss"] == pytest.approx(second.loss.item(), rel=1e-4)
    expected = first.loss.item() + 50 * second.loss.item()
    assert loss == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(logits["replaced"][:2], second.logits, atol=1e-4)


def test_only_chosen_places_are_replaced(run):
    *_, logits, endpoints = run
    corrupted, told = (np.asarray(endpoints[k]) for k in ("corrupted", "is_replaced"))
    original = batch(gathers=False)["targets"]
    every = batch(gathers=False)["chosen"]
    np.testing.assert_array_equal(corrupted[~every], original[~every])
    np.testing.assert_array_equal(told, corrupted != original)
    assert told.any()
    np.testing.assert_array_equal(logits["is_replaced"], told)


def test_scoring_all_positions_gives_the_same_losses(run):
    net, variables, _, logits, _ = run
    x = inputs(batch(gathers=False))
    found, endpoints = jit(net.apply)(variables, x)
    at = batch()["positions"]
    assert found["masked_lm"].shape == (3, LENGTH, 99)
    few = np.take_along_axis(found["masked_lm"], at[..., None], 1)
    np.testing.assert_allclose(few, logits["masked_lm"], atol=1e-4)
    told = np.asarray(endpoints["is_replaced"])
    np.testing.assert_array_equal(told, endpoints["corrupted"] != x["targets"])
    assert told.any()
    assert not told[~x["chosen"]].any()


def test_tokens_are_drawn_from_the_generators_distribution():
    # The same place of many rows.
    net = make(vocabulary=8)
    rows = 2000
    x = {
        "tokens": np.full((rows, 3), MASK, np.int32),
        "positions": np.full((rows, 1), 1, np.int32),
        "targets": np.full((rows, 1), 7, np.int32),
        "chosen": np.ones((rows, 1), bool),
    }
    variables = filled(net, {k: v[:1] for k, v in x.items()})
    run = jit(lambda key: net.apply(variables, x, rngs={"sample": key}))
    logits, endpoints = run(jax.random.key(1))
    shares = np.asarray(jax.nn.softmax(logits["masked_lm"][0, 0]))
    drawn = np.asarray(endpoints["corrupted"][:, 1])
    counts = np.bincount(drawn, minlength=8)
    assert shares.max() < 0.9
    # Five standard deviations of a binomial distribution.
    sigma = np.sqrt(rows * shares * (1 - shares))
    assert (np.abs(counts - rows * shares) <= 5 * sigma + 1e-3).all()
    # One that is drawn as it was is not replaced.
    np.testing.assert_array_equal(endpoints["is_replaced"][:, 1], drawn != 7)
    assert counts[7] > 0


def test_draws_follow_their_key_and_are_fixed_without_one(run):
    net, variables, x, *_ = run

    @jit
    def corrupted(key):
        rngs = [{"sample": key}, {"dropout": key}, {}, {}]
        return [net.apply(variables, x, rngs=r)[1]["corrupted"] for r in rngs]

    sample, dropout, none, again = corrupted(jax.random.key(0))
    other = corrupted(jax.random.key(1))
    assert not np.array_equal(sample, other[0])
    np.testing.assert_array_equal(dropout, none)  # that stream is not for draws
    np.testing.assert_array_equal(none, again)
    np.testing.assert_array_equal(none, other[2])


def test_each_learns_by_its_own_loss_and_embeddings_by_both(run):
    net, variables, x, *_ = run
    told = batch()

    @jit
    def gradients(params):
        def loss(params, part):
            logits, endpoints = net.apply({"params": params}, x)
            _, metrics = replaced.make()(logits, endpoints, told)
            return metrics[part]

        return [jax.grad(loss)(params, p) for p in ("generator_loss", "replaced_loss")]

    first, second = gradients(variables["params"])

    def moves(grads):
        # Adding the same to all keys changes no probability.
        flat = {k: v for k, v in tree.flatten(grads).items() if "key/bias" not in k}
        assert all(np.isfinite(v).all() for v in flat.values())
        return {key for key, g in flat.items() if np.any(g)}, set(flat)

    for grads, learns in ((first, "generator"), (second, "discriminator")):
        moved, every = moves(grads)
        assert moved == {k for k in every if k.startswith((learns, "embeddings"))}


def test_without_targets_nothing_is_replaced(run):
    net, variables, x, *_ = run
    logits, endpoints = jit(net.apply)(variables, {"tokens": x["tokens"]})
    np.testing.assert_array_equal(endpoints["corrupted"], x["tokens"])
    assert not logits["is_replaced"].any()
    assert logits["masked_lm"].shape == (3, LENGTH, 99)


def test_taken_apart_they_are_those_that_were_trained(run):
    net, variables, x, logits, endpoints = run
    discriminator, generator = electra_pretraining.split_networks(net, variables)
    x = {k: v for k, v in x.items() if k not in ("targets", "chosen")}
    plain = {k: v for k, v in x.items() if k != "positions"}
    for part, given, expected in (
        (discriminator, plain | {"tokens": endpoints["corrupted"]}, logits["replaced"]),
        (generator, x, logits["masked_lm"]),
    ):
        alone, params = part
        assert type(alone) is electra.Electra
        found, _ = jit(alone.apply)(params, given)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variant": "smal"},
            r"unknown variant of electra_pretraining 'smal'.*'small'",
        ),
        ({"generator": 1.5}, r"generator = 1\.5 should lie in"),
        ({"heads": 3}, "do not divide into heads = 3"),
        ({"task": "replaced"}, r"unknown key config\.model\.task"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_the_number_of_parameters():
    # Those of `small` and of its generator, less one table of embeddings: tokens, positions, segments, normalisation.
    net = models.make("electra_pretraining", variant="small")
    like = {"tokens": jax.ShapeDtypeStruct((1, 4), jnp.int32)}
    found = tree.size(jax.eval_shape(net.init, jax.random.key(0), like))
    shared = (30522 + 512 + 2 + 2) * 128
    heads = math.prod((256, 256)) + 256 + 256 + 1  # the discriminator's
    heads += math.prod((64, 128)) + 128 + 2 * 128 + 30522  # the generator's
    assert found == 13_483_008 + 4_580_928 - shared + heads
