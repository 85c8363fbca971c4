"""What a user of Flax may get wrong in a call of `import squeeze_jax as sj` is one line with the culprit and the fix."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import squeeze_jax as sj


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name="head")(x.mean((1, 2)))


X, KEY = np.ones((4, 2, 2, 3), np.float32), jax.random.key(0)
BATCH = {"image": X, "label": np.array([0, 1, 2, 0])}
LOGITS = {"logits": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
VARIABLES = jax.eval_shape(Net().init, KEY, X)
TRAIN_STATE = TrainState.create(apply_fn=len, params={"w": X}, tx=optax.sgd(0.1))
CLASSIFIED = sj.losses.cross_entropy.make()
SOFT = sj.distill.soft_logits.make()


def step(loss=CLASSIFIED, **plugs):
    return sj.step.make(Net(), optax.sgd(0.1), loss, **plugs)


def traced(loss=CLASSIFIED, batch=BATCH, **plugs):
    train = step(loss, **plugs)
    state = jax.eval_shape(lambda: train.init(KEY, batch))
    return jax.eval_shape(lambda s: train(s, batch, KEY), state)


CALLS = {
    "key": (lambda: step().init(0, BATCH), r"key = 0 is no random key: .*random\.key\(0\)"),
    "key of a step": (lambda: step()(None, BATCH, 1), "key = 1 is no random key"),
    "variables as state": (lambda: step()(VARIABLES, BATCH, KEY), r"the state is a dict: create it by step\.init"),
    "TrainState": (lambda: step()(TRAIN_STATE, BATCH, KEY), "the state is a TrainState"),
    "misspelt": (lambda: step(acumulate=2), r"unknown key step\.make\.acumulate; did you mean 'accumulate'"),
    "ema": (lambda: step(ema=1.5), r"step\.make\.ema = 1\.5 should lie in \[0, 1\)"),
    "ema on": (lambda: step(ema=True), r"step\.make\.ema = True \(bool\) should be float"),
    "accumulate": (lambda: step(accumulate=0), r"step\.make\.accumulate = 0 should be at least 1"),
    "parts": (lambda: traced(accumulate=3), "accumulate = 3: a batch of 4 examples does not divide into 3"),
    "gradients": (lambda: step(gradients=len), r"step\.make\.gradients = .* should be Named or Gradients or None"),
    "loss of labels": (lambda: traced(lambda logits, labels: 0), r"the objective makes no loss but a function\(logits, labels\): a loss takes \(logits, endpoints"),
    "make of a loss": (lambda: traced(sj.losses.cross_entropy.make), r"a make\(\) returns one when it is called"),
    "loss alone": (lambda: traced(lambda l, e, b: l.mean()), r"returns a single array: return \(scalar, metrics\)"),
    "unbound": (lambda: traced(SOFT), r"without the shapes of both networks' outputs: give what its bind"),
    "no teacher": (lambda: traced(SOFT.bind(LOGITS, LOGITS)), "no teacher, which distill.soft_logits reads"),
    "bound to arrays": (lambda: SOFT.bind(X, X), "bound to a dict of outputs, .*not to a ndarray"),
    "chain": (lambda: sj.optim.chain([optax.sgd(0.1), len]), r"optim\.chain makes no gradient transform but"),
    "variables": (lambda: sj.forward.run(Net(), {"head": {}}, X), "a dict with head and no 'params'"),
    "state as variables": (lambda: sj.step.make_evaluation(Net(), len)(step().init(KEY, BATCH), BATCH), r"the variables are a State: give its variables\(\)"),
    "no module": (lambda: sj.forward.make(Net, X), r"the network is <class .*: give a Linen module"),
    "dtype": (lambda: sj.forward.make(Net(), X, dtype="bf16"), "dtype = 'bf16' should be float32, bfloat16 or float16"),
    "class": (lambda: sj.cost.macs(Net, X), r"Net is a class: give a network, Net\(…\)"),
    "counted variables": (lambda: sj.cost.macs(Net(), VARIABLES, X), "Net gets its variables as an input: give its inputs alone"),
    "momentum": (lambda: sj.BatchNorm(False, momentum=9.0).init(KEY, X), r"BatchNorm: momentum = 9\.0 should lie in \[0, 1\]"),
    "complex": (lambda: sj.BatchNorm(True).init(KEY, X + 1j), "BatchNorm: the input is complex64: normalise its real"),
    "hub": (lambda: sj.load("bert-base-uncased"), "there is no file or folder bert-base-uncased: .*snapshot_download"),
    "no path": (lambda: sj.load({"a": 1}, Net()), "{'a': 1} is no path: give a file of weights, a folder"),
    "class to load": (lambda: sj.load("w.npz", Net), r"model is the class Net: give a network, Net\(…\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_one_line(name):
    call, words = CALLS[name]
    with pytest.raises(sj.UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_short_forms_are_taken():
    """A network without `forward.make`, the value of a method without its name, a metric, a bound loss, a raw key."""
    variables = Net().init(KEY, X)
    (logits, _), _ = sj.forward.run(Net(), variables, X)
    np.testing.assert_array_equal(logits, Net().apply(variables, X))
    half = sj.forward.make(Net(), X, dtype=jnp.bfloat16)
    assert half == sj.forward.make(Net(), X, dtype="bfloat16")
    metric = sj.metrics.classification.make()
    short, full = (
        sj.step.make_evaluation(Net(), each)(variables, BATCH)
        for each in (metric, metric.measure)
    )
    jax.tree.map(np.testing.assert_array_equal, short, full)
    # A teacher with the student's own outputs: KL(p || p) = 0, also with a projection that is trained.
    batch = BATCH | {"teacher": ({"logits": logits},)}
    train = step(SOFT.bind(LOGITS, LOGITS))
    state = train.init(jax.random.PRNGKey(0), batch, given=variables)
    _, metrics = train(state, batch, KEY)
    assert float(metrics["loss"]) == pytest.approx(0, abs=1e-6)


def test_a_vector_is_normalised_as_by_flax():
    """Without a batch the variance is 0, and the outputs are the biases."""
    x = np.float32([0.5, -2.0, 3.0])
    for evaluate in True, False:
        (ours, new), (theirs, expected) = (
            layer(evaluate, momentum=0.5).init_with_output(KEY, x)
            for layer in (sj.BatchNorm, nn.BatchNorm)
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
        jax.tree.map(np.testing.assert_allclose, new, expected)
