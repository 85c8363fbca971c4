"""Objectives and evaluations of pretraining: by hand, as `transformers` has them, and that a network learns by them."""

import gzip
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from squeeze_jax import data, models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.train import optim
from squeeze_jax.train.losses import causal_lm, masked_lm, pretraining_loss, replaced
from squeeze_jax.train.metrics import pretraining

# Quick to compile: the numbers are the same to rounding, and here compiling takes all the time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LENGTH = 16
VOCABULARY = 99
CONFIG = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data of random words in documents of 8 lines, made with some options."""
    folder = tmp_path_factory.mktemp("text")
    words = [f"w{n}" for n in range(VOCABULARY - 5)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(special + words))
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(80)]
    documents = ["\n".join(lines[n : n + 8]) for n in range(0, 80, 8)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return partial(
        data.make,
        "pretraining",
        files=str(folder / "text.txt"),
        eval=str(folder / "text.txt"),
        tokenizer=str(folder / "vocab.txt"),
        length=LENGTH,
    )


def first(made, rows=6):
    """The first evaluation batch, masked, and what a network is called with."""
    batch = next_of(made, made.eval(rows))
    batch = jit(made.augment)(None, batch)
    return batch, made.inputs(batch)


def next_of(made, batches):
    """What of the next batch goes to the devices."""
    batch = next(batches)
    return {key: batch[key] for key in made.specs(1)[0]}


def filled(net, x):
    """Variables of noise: quicker than to compile the initialisation."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(net.init, jax.random.key(0), x)
    return tree.map_named(
        lambda name, a: rng.normal(name.endswith("/scale"), 0.2, a.shape).astype(
            np.float32
        ),
        like,
    )


def published(transformers, folder, name, config, **options):
    """A network of `transformers` with weights that hide nothing, and ours with the same."""
    torch.manual_seed(0)
    net = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            norm = "norm" in key.lower() or "ln_" in key
            mean = 1.0 if norm and key.endswith("weight") else 0.0
            parameter.normal_(mean, 0.3)
    net.save_pretrained(folder)
    return net, *models.load(folder)


def told(batch):
    """What theirs is told: the original tokens, and -100 for those that were not chosen."""
    labels = np.full((len(batch["tokens"]), LENGTH), -100)
    for row, (at, chosen) in enumerate(
        zip(batch["positions"], batch["chosen"], strict=True)
    ):
        labels[row, at[chosen]] = batch["targets"][row][chosen]
    return torch.tensor(labels)


def given(x):
    names = {
        "input_ids": "tokens",
        "token_type_ids": "segments",
        "attention_mask": "attended",
    }
    return {k: torch.tensor(np.asarray(x[v])).long() for k, v in names.items()}


class TestMaskedLM:
    def test_by_hand(self):
        # Probabilities of the targets: 1/4, 1/2, one that is not chosen, and one of a row that does not count.
        shares = jnp.array([[[1, 3], [1, 1], [9, 1]], [[1, 7], [1, 7], [1, 7]]])
        batch = {
            "targets": jnp.array([[0, 0, 1], [0, 0, 0]]),
            "chosen": jnp.array([[True, True, False], [True, True, True]]),
            "mask": jnp.array([True, False]),
        }
        loss, metrics = masked_lm.make()(jnp.log(shares / 1.0), {}, batch)
        assert loss == pytest.approx((math.log(4) + math.log(2)) / 2)
        # Of equal ones the first is the likeliest.
        assert metrics == {"accuracy": pytest.approx(1 / 2)}
        none = batch | {"mask": jnp.array([False, False])}
        assert masked_lm.make()(jnp.log(shares / 1.0), {}, none)[0] == 0

    def test_scoring_chosen_positions_alone_changes_no_loss_and_no_gradient(self, made):
        few, every = made(), made(predictions=0)
        net = models.make("bert", variant="toy", task="masked_lm", layers=1)
        variables = filled(net, first(few)[1])

        def run(made):
            batch, x = first(made)

            def loss(params):
                logits, _ = net.apply({"params": params}, x)
                return masked_lm.make()(logits, {}, batch)[0]

            return jit(jax.value_and_grad(loss))(variables["params"])

        (a, ga), (b, gb) = run(few), run(every)
        assert a == pytest.approx(float(b), rel=1e-5)
        for key, g in tree.flatten(ga).items():
            np.testing.assert_allclose(g, tree.flatten(gb)[key], atol=1e-5)

    # One with a matrix of its own beside the embeddings, one with narrow embeddings, which widen.
    @pytest.mark.parametrize("name", ["mobilebert", "albert"])
    def test_an_encoder_scores_chosen_positions(self, made, name):
        batch, x = first(made())
        net = models.make(name, variant="toy", task="masked_lm", layers=1)
        variables = filled(net, x)
        every = {key: array for key, array in x.items() if key != "positions"}
        few, whole = jit(lambda v: [net.apply(v, x)[0], net.apply(v, every)[0]])(
            variables
        )
        assert few.shape == (6, math.ceil(0.15 * LENGTH), VOCABULARY)
        expected = np.take_along_axis(whole, np.asarray(x["positions"])[..., None], 1)
        np.testing.assert_allclose(few, expected, atol=1e-4)
        # A loss takes those of chosen positions itself, if it is given all.
        for found, other in zip(
            *(masked_lm.masked_losses(s, batch) for s in (few, whole)), strict=True
        ):
            np.testing.assert_allclose(found, other, atol=1e-4)

    def test_mistakes_are_named(self, made):
        batch, x = first(made())
        with pytest.raises(UserError, match=r"name='pretraining'"):
            masked_lm.make()(jnp.zeros((6, 3, 9)), {}, {"mask": batch["mask"]})
        with pytest.raises(UserError, match=r"tokens at \(6, 3\) places, .*\(6, 9\)"):
            masked_lm.make()(jnp.zeros((6, 9)), {}, batch)
        with pytest.raises(UserError, match=r"places, the network gives \('replaced',"):
            masked_lm.make()({"replaced": jnp.zeros((6, 9))}, {}, batch)
        with pytest.raises(UserError, match=r"network's replaced, .*gives masked_lm"):
            replaced.make()({"masked_lm": jnp.zeros((6, 3, 9))}, {}, batch)
        with pytest.raises(
            UserError, match="network's masked_lm, and it gives one arr"
        ):
            pretraining_loss.make()(jnp.zeros((6, 3, 9)), {}, batch)
        net = models.make("bert", variant="toy", task="masked_lm")
        wrong = x | {"positions": x["positions"][:3]}
        with pytest.raises(UserError, match=r"positions should be \[b, p\]"):
            jax.eval_shape(net.init, jax.random.key(0), wrong)


@pytest.mark.parametrize("name", ["Bert", "Albert"])
def test_masked_tokens_and_segments_as_in_transformers(
    transformers, tmp_path, made, name
):
    config = getattr(transformers, f"{name}Config")(
        **CONFIG
        | (
            {"embedding_size": 16, "classifier_dropout_prob": 0.0}
            if name == "Albert"
            else {}
        )
    )
    theirs, net, variables = published(
        transformers, tmp_path, f"{name}ForPreTraining", config
    )
    order = "next_sentence" if name == "Bert" else "sentence_order"
    batch, x = first(made(order=order))
    assert {0, 1} == set(batch["label"].tolist())
    key = {"Bert": "next_sentence_label", "Albert": "sentence_order_label"}[name]
    with torch.no_grad():
        labels = {"labels": told(batch), key: torch.tensor(batch["label"].tolist())}
        expected = theirs(**given(x), **labels)
    logits, endpoints = jit(net.apply)(variables, x)
    loss, metrics = pretraining_loss.make()(logits, endpoints, batch)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-4)
    scores = expected.get("sop_logits", expected.get("seq_relationship_logits"))
    right = (scores.argmax(-1).numpy() == batch["label"]).mean()
    assert metrics["order_accuracy"] == pytest.approx(right)
    hits = expected.prediction_logits.argmax(-1) == told(batch)
    accuracy = hits.sum().item() / (told(batch) >= 0).sum().item()
    assert metrics["accuracy"] == pytest.approx(accuracy)


def test_next_tokens_as_in_transformers(transformers, tmp_path, made):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=24,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs, net, variables = published(
        transformers, tmp_path, "GPT2LMHeadModel", config
    )
    # The last block, which is shorter, and a row of padding.
    made = made(kind="causal")
    rows = made.num_eval + 1
    batch, x = first(made, rows)
    assert not batch["attended"].all()
    labels = np.where(batch["attended"], batch["tokens"], -100)
    with torch.no_grad():
        ids, mask = (
            torch.tensor(np.asarray(x[k])).long() for k in ("tokens", "attended")
        )
        expected = theirs(
            ids[:-1], attention_mask=mask[:-1], labels=torch.tensor(labels[:-1]).long()
        )
    logits, endpoints = jit(net.apply)(variables, x)
    loss, _ = causal_lm.make()(logits, endpoints, batch)
    assert loss == pytest.approx(expected.loss.item(), rel=1e-4)
    # The evaluation of several batches is that of one.
    metric = pretraining.make(made)
    parts = np.array_split(np.arange(rows), 3)
    sums = [
        metric.measure(logits[at], {key: a[at] for key, a in batch.items()})[0]
        for at in parts
    ]
    scores = metric.score(jax.tree.map(lambda *s: sum(s), *sums), {})
    assert scores["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert sums[0]["examples"] == len(parts[0])
    assert sums[2]["examples"] == len(parts[2]) - 1


class TestReplaced:
    def test_by_hand(self):
        # Logits of 0 and ln 3: 1/2 and 3/4 for a replaced token. The last one of the row is padding.
        logits = jnp.log(jnp.array([[1.0, 3.0, 3.0, 1e9]]))
        batch = {
            "attended": jnp.array([[True, True, True, False]]),
            "mask": jnp.array([True]),
        }
        wrong, right, real = replaced.discriminator_losses(
            logits, jnp.array([[0, 1, 0, 0]]), batch
        )
        np.testing.assert_allclose(wrong[0, :3], np.log([2, 4 / 3, 4]), rtol=1e-6)
        assert right[0, :3].tolist() == [1, 1, 0]
        assert real.tolist() == [[1, 1, 1, 0]]

    def test_the_weights_of_the_losses(self):
        scores = jnp.log(jnp.array([[[1.0, 3.0]]]))
        logits = {"masked_lm": scores, "replaced": jnp.zeros((1, 2))}
        batch = {
            "targets": jnp.array([[0]]),
            "chosen": jnp.array([[True]]),
            "attended": jnp.array([[True, True]]),
            "mask": jnp.array([True]),
        }
        endpoints = {"is_replaced": jnp.array([[True, False]])}
        for options, weight in (({}, 50), ({"discriminator": 2.0}, 2)):
            loss, metrics = replaced.make(**options)(logits, endpoints, batch)
            assert loss == pytest.approx(math.log(4) + weight * math.log(2), rel=1e-6)
            assert metrics["generator_loss"] == pytest.approx(math.log(4))
            assert metrics["replaced_accuracy"] == 0.5
        with pytest.raises(
            UserError, match="discriminator = -1 should not be negative"
        ):
            replaced.make(discriminator=-1)


class TestMetric:
    def test_a_network_that_knows_nothing(self, made):
        made = made(order="sentence_order")
        batches = made.eval(6)
        metric, total = pretraining.make(made), None
        for batch in batches:
            batch = {key: batch[key] for key in made.specs(1)[0]}
            logits = {
                "masked_lm": jnp.zeros((6, 3, VOCABULARY)),
                "next_sentence": jnp.zeros((6, 2)),
            }
            sums, rows = jit(metric.measure)(logits, batch)
            assert rows == {}
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        assert total["examples"] == made.num_eval
        scores = metric.score(jax.device_get(total), {})
        assert metric.headline in scores
        # As many choices as there are tokens, and of two.
        assert scores["eval_perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
        assert scores["eval_loss"] == pytest.approx(math.log(2 * VOCABULARY), rel=1e-5)
        # Of equal scores the first counts: in order.
        assert 0.2 < scores["eval_order_accuracy"] < 0.8
        assert scores["eval_accuracy"] == 0

    def test_it_masks_as_what_the_network_sees(self, made):
        made = made()
        metric = pretraining.make(made)
        batch = next_of(made, made.eval(6))

        @jit
        def run(batch):
            x = made.inputs(batch)
            # Scores that know what was there.
            every = 9.0 * jax.nn.one_hot(batch["original"], VOCABULARY)
            few = jnp.take_along_axis(every, x["positions"][..., None], 1)
            return [metric.measure(logits, batch)[0] for logits in (few, every)]

        for sums in jax.device_get(run(batch)):
            scores = metric.score(sums, {})
            assert scores["eval_accuracy"] == 1
            assert "eval_order_accuracy" not in scores


@pytest.mark.shared
def test_a_small_network_learns_real_text(shared, tmp_path):
    # The frequencies of words alone give their entropy: what is below is learned of their order.
    folder = shared / "data" / "text" / "lm"
    content = gzip.decompress((folder / "ptb.train.txt.gz").read_bytes()).decode()
    lines = content.splitlines()[1:13]
    text, vocabulary = tmp_path / "text.txt", tmp_path / "vocab.txt"
    text.write_text("\n".join(line.replace("<unk>", "unknown") for line in lines))
    words = sorted(
        {*text.read_text().replace(".", " . ").replace("-", " - ").split(), "'", ","}
    )
    vocabulary.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    made = data.make(
        "pretraining",
        files=str(text),
        eval=str(text),
        tokenizer=str(vocabulary),
        length=32,
    )
    ids = np.concatenate([b["tokens"][b["attended"]] for b in made.eval(8)])
    shares = np.bincount(ids[ids > 4]) / (ids > 4).sum()
    entropy = -(shares * np.log(np.where(shares, shares, 1))).sum()
    rates = dict.fromkeys(("dropout", "attention_dropout"), 0.0)
    size = dict(vocabulary=made.vocabulary, layers=1)
    net = models.make("squeezebert", variant="toy", task="masked_lm", **size, **rates)
    steps = 50
    tx = optim.make("lamb", steps=steps, lr=0.1, warmup=5, schedule="linear")
    batches = made.train(16, 0)
    params = jit(net.init)(jax.random.key(0), made.inputs(next_of(made, batches)))
    params = params["params"]

    @jit
    def step(params, opt, batch):
        def loss(params):
            masked = made.augment(None, batch)
            logits, _ = net.apply({"params": params}, made.inputs(masked))
            return masked_lm.make()(logits, {}, masked)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, losses = tx.init(params), []
    for _ in range(steps):
        params, opt, value = step(params, opt, next_of(made, batches))
        losses.append(float(value))
    batches.close()
    assert losses[0] == pytest.approx(math.log(made.vocabulary), rel=0.05)
    assert np.mean(losses[-10:]) < 0.8 * entropy
