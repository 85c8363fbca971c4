"""Encoders compute what the classes of `transformers` compute: outputs, all layers, losses and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from squeeze_jax import models, registry, tree
from squeeze_jax.nn import activations, encoder
from squeeze_jax.weights import foreign, huggingface

# Compiled as users run it, but for XLA's own backend: see `jit`.
pytestmark = pytest.mark.usefixtures("optimized", "transformers")

MODELS = "squeeze_jax.models"
# Of the smallest kind; the epsilon is so large that ignoring it shows.
CONFIG = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=24,
    layer_norm_eps=0.01,
)
CONFIGS = {
    "albert": dict(CONFIG, embedding_size=16, hidden_act="relu"),
    "bert": dict(CONFIG, hidden_act="gelu_new"),
    # Its epsilon is not for config.json to say.
    "distilbert": dict(
        {k: v for k, v in CONFIG.items() if k[:5] not in ("inter", "layer")},
        hidden_dim=64,
        activation="relu",
    ),
    "electra": dict(CONFIG, embedding_size=16, hidden_act="gelu_new"),
    # It has no padding of its own.
    "gpt2": dict(
        vocab_size=99,
        n_embd=32,
        n_layer=1,
        n_head=4,
        n_inner=48,
        n_positions=24,
        layer_norm_epsilon=0.01,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "mobilebert": dict(
        CONFIG,
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
    ),
    # Two more rows in the table of positions.
    "roberta": dict(
        CONFIG, hidden_act="gelu_new", max_position_embeddings=26, type_vocab_size=2
    ),
    "squeezebert": dict(CONFIG, embedding_size=32, q_groups=2, post_attention_groups=2),
}
CASES = [
    (name, task)
    for name in registry.names(MODELS)
    if hasattr(registry.load(MODELS, name), "HUGGINGFACE")
    for task in registry.load(MODELS, name).HUGGINGFACE.classes
]
TOLERANCE = 1e-4
# Quick to compile: the numbers are the same to rounding, and here compiling takes all the time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def theirs(name, task, **options):
    """A network of `transformers` with weights that hide nothing: no zero bias, no scale of one."""
    import transformers

    config = transformers.AutoConfig.for_model(
        name, **CONFIGS[name] | options, attn_implementation="eager"
    )
    classes = registry.load(MODELS, name).HUGGINGFACE.classes
    torch.manual_seed(0)
    net = getattr(transformers, classes[task])(config).eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            norm = "norm" in key.lower() and key.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.3)
    return net


def batch(name, task):
    """(our input, theirs): three sequences of 17 tokens, two of them padded, or as many choices of two questions."""
    rng = np.random.default_rng(0)
    shape = (2, 3, 17) if task == "choice" else (3, 17)
    length = np.broadcast_to([17, 9, 12], shape[:-1])[..., None]
    mask = np.arange(17) < length
    x = {
        # 1 is padding to RoBERTa, to all others 0.
        "tokens": np.where(mask, rng.integers(2, 99, shape), name == "roberta"),
        "segments": (np.arange(17) >= 6).astype(np.int32) * mask,
        "attended": mask,
    }
    keys = {
        "input_ids": "tokens",
        "token_type_ids": "segments",
        "attention_mask": "attended",
    }
    if name in ("distilbert", "gpt2"):
        keys.pop("token_type_ids")
    given = {key: torch.tensor(x[ours]).long() for key, ours in keys.items()}
    if name == "gpt2" and task == "choice":
        given["mc_token_ids"] = torch.tensor(length[..., 0] - 1)
    return x, given


def labels(task, classes):
    """What each loss is told, by the names in `transformers`; -100 stands for tokens that do not count."""
    rng = np.random.default_rng(1)
    masked = np.where(rng.random((3, 17)) < 0.3, rng.integers(0, 99, (3, 17)), -100)
    order = rng.integers(0, 2, 3)
    some = rng.integers(0, classes, 3)
    real = np.arange(17) < np.array([[17], [9], [12]])
    return {
        "masked_lm": {"labels": masked},
        "causal_lm": {"labels": masked},
        "next_sentence": {"labels": order},
        "pretraining": {"labels": masked, "next_sentence_label": order},
        "classification": {
            "labels": some if classes > 1 else rng.normal(size=3).astype(np.float32)
        },
        "tokens": {"labels": rng.integers(0, classes, (3, 17))},
        "replaced": {"labels": np.where(real, rng.integers(0, 2, (3, 17)), -100)},
        "span": {
            "start_positions": np.array([1, 3, 5]),
            "end_positions": np.array([4, 3, 9]),
        },
        "choice": {"labels": np.array([2, 0])},
    }[task]


def loss(task, logits, told):
    """The published losses: cross entropies, their sum or mean where there are two, squared error of a regression."""

    def cross_entropy(logits, labels):
        counts = labels >= 0
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.where(counts, labels, 0)[..., None], -1
        )
        return -(picked[..., 0] * counts).sum() / counts.sum()

    match task:
        case "pretraining":
            first = cross_entropy(logits["masked_lm"], told["labels"])
            return first + cross_entropy(
                logits["next_sentence"], told["next_sentence_label"]
            )
        case "causal_lm":
            return cross_entropy(logits[:, :-1], told["labels"][:, 1:])
        case "span":
            start = cross_entropy(logits["start"], told["start_positions"])
            return (start + cross_entropy(logits["end"], told["end_positions"])) / 2
        case "replaced":
            counts = told["labels"] >= 0
            wrong = jnp.where(told["labels"] == 1, -logits, logits)
            return (jax.nn.softplus(wrong) * counts).sum() / counts.sum()
    if logits.shape[-1] == 1:
        return ((logits[:, 0] - told["labels"]) ** 2).mean()
    return cross_entropy(logits, told["labels"])


def outputs(task, found):
    """Their logits as ours are arranged."""
    match task:
        case "features":
            return found.last_hidden_state
        case "pretraining":
            return {
                "masked_lm": found.prediction_logits,
                "next_sentence": found.get(
                    "sop_logits", found.get("seq_relationship_logits")
                ),
            }
        case "span":
            return {"start": found.start_logits, "end": found.end_logits}
    return found.get("mc_logits", found.logits)


def close(found, expected, tolerance=TOLERANCE):
    """Compares relative to the largest value, where that is above one."""
    expected = np.asarray(expected)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


def loaded(net, folder, **options):
    net.save_pretrained(folder)
    return models.load(folder, **options)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_outputs_and_losses_equal_transformers(tmp_path, name, task):
    # A span is of two labels: start and end; ALBERT's order of sentences, too.
    net = theirs(name, task, num_labels=2 if task in ("span", "pretraining") else 3)
    x, given = batch(name, task)
    told = {} if task == "features" else labels(task, 3)
    for key, label in told.items():
        their = (
            key if name != "albert" else key.replace("next_sentence", "sentence_order")
        )
        if "mc_token_ids" in given:
            their = "mc_labels"
        given[their] = torch.tensor(label)
    with torch.no_grad():
        expected = net(**given)
    ours, variables = loaded(net, tmp_path)
    assert ours.task == task
    logits, endpoints = jit(ours.apply)(variables, x)
    jax.tree.map(close, logits, jax.tree.map(np.asarray, outputs(task, expected)))
    if task != "features":
        close(loss(task, logits, told), expected.get("mc_loss", expected.loss))
    elif ours.pooler:
        close(endpoints["pooled"], expected.pooler_output)


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_a_regression_is_a_classification_of_one_class(tmp_path, name):
    net = theirs(name, "classification", num_labels=1)
    x, given = batch(name, "classification")
    told = labels("classification", 1)
    with torch.no_grad():
        expected = net(**given, labels=torch.tensor(told["labels"]))
    ours, variables = loaded(net, tmp_path)
    logits, _ = jit(ours.apply)(variables, x)
    assert logits.shape == (3, 1)
    close(loss("classification", logits, told), expected.loss)


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_every_layer_equals_transformers(tmp_path, name):
    net = theirs(name, "features", num_hidden_layers=2)
    x, given = batch(name, "features")
    with torch.no_grad():
        expected = net(**given, output_hidden_states=True, output_attentions=True)
    ours, variables = loaded(net, tmp_path)
    last, endpoints = jit(ours.apply)(variables, x)
    # The last of theirs is what the heads see: to GPT-2 normalised once more.
    stages = [endpoints["embeddings"], endpoints["layer1"], last]
    for stage, state in zip(stages, expected.hidden_states, strict=True):
        close(stage, state)
    if name != "gpt2":
        np.testing.assert_array_equal(endpoints["layer2"], last)
    for number, attention in enumerate(expected.attentions, 1):
        probabilities, scores = (
            endpoints[f"{kind}{number}"] for kind in ("attention", "scores")
        )
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
        assert not probabilities[1, :, :, 9:].any()  # padding
        # A softmax changes by up to a quarter of the change of its scores.
        largest = float(np.abs(scores)[np.asarray(probabilities) > 0].max())
        limit = TOLERANCE * max(1.0, largest / 4)
        if name == "squeezebert":
            # Those of its class are masked scores, and called attentions all the same.
            close(scores[0], attention[0])
            close(scores[1, ..., :9], attention[1, ..., :9])
            close(probabilities, attention.softmax(-1), limit)
        else:
            close(probabilities, attention, limit)


@pytest.mark.parametrize("name", huggingface.ACTIVATIONS)
def test_activations_are_those_that_transformers_calls_so(name):
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 97, dtype=np.float32)
    found = jit(activations.by_name(huggingface.ACTIVATIONS[name]))(x)
    # The two kinds of GELU are up to 5e-4 apart.
    np.testing.assert_allclose(found, ACT2FN[name](torch.tensor(x)), atol=1e-5)


def test_positions_of_roberta_count_real_tokens_alone(tmp_path):
    # Padding stands before the tokens.
    net = theirs("roberta", "features")
    x, given = batch("roberta", "features")
    x = {key: array[:, ::-1] for key, array in x.items()}
    given = {key: array.flip(1) for key, array in given.items()}
    with torch.no_grad():
        expected = net(**given)
    ours, variables = loaded(net, tmp_path)
    logits, _ = jit(ours.apply)(variables, x)
    close(logits, expected.last_hidden_state)


def test_layers_of_albert_may_share_weights_in_groups(tmp_path):
    net = theirs("albert", "features", num_hidden_layers=3, num_hidden_groups=2)
    x, given = batch("albert", "features")
    with torch.no_grad():
        expected = net(**given)
    ours, variables = loaded(net, tmp_path)
    layers = {key for key in variables["params"] if key.startswith("layer")}
    assert layers == {"layer1", "layer2"}
    logits, _ = jit(ours.apply)(variables, x)
    close(logits, expected.last_hidden_state)


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_dropout_is_where_it_is_in_transformers(tmp_path, name):
    bert = ("attention_probs_dropout_prob", "hidden_dropout_prob")
    own = {
        "distilbert": ("attention_dropout", "dropout"),
        "gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    }
    rates = dict.fromkeys(own.get(name, bert), 0.0)
    # Those two have one place more than theirs, as their files say.
    tested = list(rates)[: 1 if name in ("albert", "distilbert") else None]
    x, given = batch(name, "features")
    for rate in tested:
        # At a rate of almost one nothing is left to chance.
        net = theirs(name, "features", **rates | {rate: 1 - 2**-24})
        with torch.no_grad():
            whole, expected = (n(**given)[0] for n in map(net.train, (False, True)))
        assert (whole - expected).abs().max() > 0.1
        ours, variables = loaded(net, tmp_path)
        rngs = {"dropout": jax.random.key(0)}
        found, _ = jit(partial(ours.apply, train=True, rngs=rngs))(variables, x)
        close(found, expected)


def test_gradients_equal_transformers(tmp_path):
    net = theirs("bert", "pretraining")
    x, given = batch("bert", "pretraining")
    told = labels("pretraining", 2)
    net(**given, **{k: torch.tensor(v) for k, v in told.items()}).loss.backward()
    ours, variables = loaded(net, tmp_path)

    @jit
    def gradient(params):
        def objective(params):
            return loss("pretraining", ours.apply({"params": params}, x)[0], told)

        return jax.grad(objective)(params)

    names = registry.load(MODELS, "bert").huggingface_names(ours)
    flat = tree.flatten(gradient(variables["params"]))
    found = foreign.to_torch(flat, names, sequences=False)
    expected = {
        key.removeprefix("bert."): p.grad.numpy() for key, p in net.named_parameters()
    }
    assert found.keys() == expected.keys()
    for key, g in expected.items():
        if key == "embeddings.word_embeddings.weight":
            # PyTorch's embedding keeps the padding token's row as it is; ours learns it, as the paper's code does.
            found[key], g = found[key][1:], g[1:]
        scale = np.abs(g).max()
        # Adding the same to all keys changes no probability.
        assert scale > 1e-4 or key.endswith("key.bias"), key
        np.testing.assert_allclose(found[key], g, rtol=0, atol=1e-3 * scale + 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {
            "use_bottleneck_attention": True,
            "key_query_shared_bottleneck": False,
            "trigram_input": False,
        },
        {
            "key_query_shared_bottleneck": False,
            "intra_bottleneck_size": 32,
            "num_feedforward_networks": 1,
            "classifier_activation": False,
            "normalization_type": "layer_norm",
        },
    ],
)
def test_every_kind_of_mobilebert_equals_transformers(tmp_path, options):
    net = theirs("mobilebert", "features", **options)
    x, given = batch("mobilebert", "features")
    with torch.no_grad():
        expected = net(**given)
    ours, variables = loaded(net, tmp_path)
    found, endpoints = jit(ours.apply)(variables, x)
    close(found, expected.last_hidden_state)
    close(endpoints["pooled"], expected.pooler_output)
    models.save(tmp_path / "ours", ours, variables)
    assert models.load(tmp_path / "ours")[0] == ours


@pytest.mark.parametrize("epsilon", [1e-12, 0.01])
def test_the_layers_of_squeezebert_ignore_the_epsilon_of_its_config(tmp_path, epsilon):
    net, _ = loaded(
        theirs("squeezebert", "masked_lm", layer_norm_eps=epsilon), tmp_path
    )
    assert (net.settings.epsilon, net.layer_epsilon) == (epsilon, 1e-12)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_equals_that_of_pytorch(norm_first, causal):
    torch.manual_seed(0)
    options = dict(dropout=0.0, activation="gelu", batch_first=True)
    their = nn.TransformerEncoderLayer(
        16, 4, 24, norm_first=norm_first, layer_norm_eps=1e-3, **options
    )
    with torch.no_grad():
        for parameter in their.parameters():
            parameter.normal_(0.0, 0.4)
    x, mask = torch.randn(2, 7, 16), torch.arange(7) < torch.tensor([[7], [5]])
    hidden = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1) if causal else None
    # In training, as in evaluation it takes another way; without dropout the numbers are the same.
    expected = their(x, src_mask=hidden, src_key_padding_mask=~mask).detach().numpy()
    arrays = {key: value.detach().numpy() for key, value in their.state_dict().items()}
    for end in ("weight", "bias"):
        joined = np.split(arrays.pop(f"self_attn.in_proj_{end}"), 3)
        for name, part in zip(("query", "key", "value"), joined, strict=True):
            arrays[f"{name}.{end}"] = part
    names = {f"attention/{name}": name for name in ("query", "key", "value")}
    names |= {"attention/output": "self_attn.out_proj", "attention_norm": "norm1"}
    names |= {"ffn_in": "linear1", "ffn_out": "linear2", "ffn_norm": "norm2"}
    layer = encoder.Layer(4, 24, epsilon=1e-3, norm_first=norm_first, causal=causal)
    variables = foreign.fit(
        arrays, foreign.variable_shapes(layer, jnp.zeros((1, 2, 16))), names
    )
    found, _ = jit(layer.apply)(variables, x.numpy(), mask.numpy())
    close(found, expected)
