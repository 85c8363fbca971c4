"""Losses of distillation between real networks: all at once, padding, gradients; networks that do not fit."""

from functools import partial

import jax
import numpy as np
import pytest

from squeeze_jax import models, tree
from squeeze_jax.distill import (
    attention,
    attention_transfer,
    cosine,
    feature_map,
    hidden,
    soft_logits,
)
from squeeze_jax.errors import UserError

LOWEST = np.finfo(np.float32).min


def shapes(outputs):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), outputs)


# Real networks: encoders with two layers of 32 and four of 48 channels, four heads each.
TEXT = {
    "soft_logits": soft_logits.make(temperature=2.0),
    "hidden": hidden.make(embeddings=True),
    "attention": attention.make(),
    "probabilities": attention.make("probabilities", heads="mean"),
    "feature_map": feature_map.make(mean=1.0, variance=1.0),
    "cosine": cosine.make(),
}
ATTENDED = np.arange(6) < np.array([[6], [2], [4]])
BATCH = {"attended": ATTENDED, "mask": np.array([True, True, False])}
TOKENS = np.random.default_rng(0).integers(0, 99, (3, 6)).astype(np.int32)
X = {"tokens": TOKENS, "segments": np.zeros_like(TOKENS), "attended": ATTENDED}


def encoder(name, task, **options):
    options |= {"task": task, "dropout": 0.0, "attention_dropout": 0.0}
    return models.make(name, variant="toy", **options)


def outputs(net, variables, x):
    logits, endpoints = net.apply(variables, x)
    return {"logits": logits, **endpoints}


def specs(net, x):
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    return jax.eval_shape(partial(outputs, net), variables, x)


def invented(given, attended, seed=0):
    """Outputs of those shapes: noise, but for keys that may not be seen and probabilities, which follow from scores."""
    rng = np.random.default_rng(seed)
    noise = jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32), given)
    for name in [name for name in noise if name.startswith("scores")]:
        pad = np.where(attended, 0, LOWEST).astype(np.float32)
        scores = noise[name] = noise[name] + pad[:, None, None, :]
        noise[name.replace("scores", "attention")] = np.array(jax.nn.softmax(scores))
    return noise


def disturbed(given, real):
    """Outputs with other numbers where tokens are not `real`, bool [b, l]: positions, queries and keys."""

    def change(path, a):
        where = real[:, :1]  # of logits [b, classes]
        if a.ndim == 4:
            where = real[:, None, :, None] & real[:, None, None, :]
        elif a.ndim == 3:
            where = real[..., None]
        elif tree.name(path) in ("logits/start", "logits/end"):
            where = real
        return np.where(where, a, np.float32(3.5))

    return jax.tree_util.tree_map_with_path(change, given)


@pytest.mark.parametrize("task", ["classification", "span", "masked_lm", "pretraining"])
def test_padded_tokens_of_the_teacher_change_nothing(task):
    student = specs(encoder("squeezebert", task), X)
    teacher = specs(encoder("bert", task, layers=4, features=48), X)
    ours, theirs = invented(student, ATTENDED, 1), invented(teacher, ATTENDED, 2)
    bounds = {n: m.bind(student, teacher) for n, m in TEXT.items() if n != "cosine"}
    params = {name: bound.init(jax.random.key(0)) for name, bound in bounds.items()}

    @jax.jit
    def losses(theirs):
        return {
            name: bound.loss(
                ours["logits"],
                ours,
                BATCH | {"teacher": ({key: theirs[key] for key in bound.wants},)},
                params[name],
            )[0]
            for name, bound in bounds.items()
        }

    other = disturbed(theirs, ATTENDED & BATCH["mask"][:, None])
    real = disturbed(theirs, np.zeros_like(ATTENDED))
    found, same, changed = map(jax.device_get, map(losses, (theirs, other, real)))
    for name, loss in found.items():
        assert loss > 1e-3, name
        assert same[name] == pytest.approx(loss, rel=1e-5), name
        assert changed[name] != pytest.approx(loss, rel=1e-3), name


def test_all_losses_train_a_real_encoder_at_once():
    net = encoder("squeezebert", "classification", layers=1)
    student = specs(net, X)
    teacher = specs(encoder("bert", "classification", layers=2, features=48), X)
    bounds = {n: m.bind(student, teacher) for n, m in TEXT.items() if n != "cosine"}
    taught = invented(teacher, ATTENDED)
    wants = dict.fromkeys(name for b in bounds.values() for name in b.wants)
    batch = BATCH | {"teacher": ({name: taught[name] for name in wants},)}
    trained = {name: bound.init(jax.random.key(0)) for name, bound in bounds.items()}
    trained["net"] = invented(jax.eval_shape(net.init, jax.random.key(0), X), None)

    def total(trained):
        ours = outputs(net, trained["net"], X)
        return sum(
            bound.loss(ours["logits"], ours, batch, trained[name])[0]
            for name, bound in bounds.items()
        )

    found, grads = jax.jit(jax.value_and_grad(total))(trained)
    assert np.isfinite(found)
    for name, g in tree.flatten(grads).items():
        assert np.isfinite(g).all(), name
        assert np.abs(g).max() > 0, name
    grads.pop("net")
    assert {name: g.shape for name, g in tree.flatten(grads).items()} == {
        "feature_map/layer1_layer2": (32, 48),
        "hidden/embeddings_embeddings": (32, 48),
        "hidden/layer1_layer2": (32, 48),
    }


@pytest.mark.parametrize("name", TEXT)
def test_zero_at_the_teacher_and_no_gradient_to_it(name):
    same = invented(specs(encoder("bert", "classification"), X), ATTENDED)
    bound = TEXT[name].bind(shapes(same), shapes(same))
    given = {key: same[key] for key in bound.wants}
    read = [key.replace("attention", "scores") for key in bound.wants]
    assert bound.init(jax.random.key(0)) == {}

    def loss(ours, theirs):
        batch = BATCH | {"teacher": (theirs,)}
        return bound.loss(ours.get("logits"), ours, batch, {})[0]

    ours = {key: same[key] for key in read}
    noisy = {
        key: a + np.sin(np.arange(a.size)).reshape(a.shape).astype(np.float32)
        for key, a in ours.items()
    }
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    assert float(gradients(ours, given)[0]) == pytest.approx(0, abs=2e-6)
    found, (to_student, to_teacher) = gradients(noisy, given)
    assert found > 1e-3
    for key in bound.wants:
        np.testing.assert_array_equal(to_teacher[key], 0)
    for key in read:
        assert np.isfinite(to_student[key]).all()
        assert np.abs(to_student[key]).max() > 0


def test_multiple_choice():
    tokens = np.arange(2 * 3 * 5).reshape(2, 3, 5).astype(np.int32)
    attended = np.arange(5) < np.array([[5, 2, 4], [1, 5, 3]])[..., None]
    x = {"tokens": tokens, "segments": np.zeros_like(tokens), "attended": attended}
    rows = attended.reshape(6, 5)
    same = invented(specs(encoder("bert", "choice"), x), rows)
    # States differ by 1 in the tokens of the first example's three sequences and by 9 in all that does not count.
    counts = rows & np.repeat([True, False], 3)[:, None]
    moved = np.where(counts, np.float32(1), np.float32(9))[..., None]
    moved = same | {"layer2": same["layer2"] + moved}
    batch = {"attended": attended, "mask": np.array([True, False]), "teacher": (moved,)}
    for made, wanted in (hidden.make(), 1.0), (soft_logits.make(), 0.0):
        loss = made.bind(shapes(same), shapes(moved)).loss
        found, _ = jax.jit(loss)(same["logits"], same, batch, {})
        assert float(found) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_losses_of_networks_of_images():
    image = jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)
    make = partial(models.make, num_classes=5)
    student = specs(make("mobilenet_v2"), image)
    teacher = specs(make("resnet", variant="18"), image)
    ours, theirs = invented(student, None, 1), invented(teacher, None, 2)
    # 32 x 32 positions against 16 x 16, and 2 x 2 against 2 x 2.
    pairs = (("conv1", "conv2"), ("head", "conv5"))
    for made, channels in (
        (soft_logits.make(), []),
        (feature_map.make(layers=pairs), [(32, 64), (1280, 512)]),
        (attention_transfer.make(layers=pairs), []),
    ):
        bound = made.bind(student, teacher)
        params = bound.init(jax.random.key(1))
        assert [w.shape for w in params.values()] == channels
        batch = {"mask": np.ones(2, bool), "teacher": (theirs,)}

        def loss(ours, params, bound=bound, batch=batch):
            return bound.loss(ours["logits"], ours, batch, params)[0]

        found, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(ours, params)
        assert found > 0
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads[1]))


STATE = jax.ShapeDtypeStruct((2, 4, 8), np.float32)
WIDE = jax.ShapeDtypeStruct((2, 4, 12), np.float32)
HEADS = jax.ShapeDtypeStruct((2, 2, 4, 4), np.float32)
FOUR = jax.ShapeDtypeStruct((2, 4, 4, 4), np.float32)
CLASSES = jax.ShapeDtypeStruct((2, 3), np.float32)


def layers(count, state=STATE, name="layer"):
    return {f"{name}{n}": state for n in range(1, count + 1)}


@pytest.mark.parametrize(
    ("made", "student", "teacher", "message"),
    [
        (
            soft_logits.make(),
            layers(1),
            {"logits": CLASSES},
            "student has no logits, only layer1",
        ),
        (
            soft_logits.make(),
            {"logits": CLASSES},
            {},
            "teacher has no logits, only nothing",
        ),
        (
            soft_logits.make(),
            {"logits": CLASSES},
            {"logits": jax.ShapeDtypeStruct((2, 2), np.float32)},
            r"student's logits are \(2, 3\), the teacher's \(2, 2\)",
        ),
        (
            soft_logits.make(),
            {"logits": {"start": CLASSES, "end": CLASSES}},
            {"logits": {"start": CLASSES, "ends": CLASSES}},
            "no head 'end'; did you mean 'ends'",
        ),
        (
            soft_logits.make(positions="chosen"),
            {"logits": CLASSES},
            {"logits": CLASSES},
            "not of each token",
        ),
        (
            soft_logits.make(),
            {"logits": {"replaced": CLASSES}},
            {"logits": {"replaced": CLASSES}},
            "'replaced' are one number for each token, not classes",
        ),
        (
            hidden.make(),
            layers(5),
            layers(12),
            "12 layers do not divide into the student's 5",
        ),
        (
            hidden.make(layers="last"),
            layers(3),
            layers(2),
            "3 layers, the teacher only 2",
        ),
        (
            hidden.make(layers="skip"),
            layers(1),
            layers(2),
            "the student has one; choose 'uniform'",
        ),
        (
            hidden.make(),
            layers(2),
            {"logits": CLASSES},
            "the teacher has no numbered layers",
        ),
        (
            hidden.make(layers=((1, 9),)),
            layers(2),
            layers(4),
            "teacher has no endpoint 'layer9'",
        ),
        (
            hidden.make(layers=((3, 1),)),
            layers(2),
            layers(4),
            "student has no endpoint 'layer3'",
        ),
        (
            hidden.make(layers=((-3, 1),)),
            layers(2),
            layers(4),
            "student has no endpoint 'layer0'",
        ),
        (
            hidden.make(embeddings=True),
            layers(2),
            layers(2),
            "no endpoint 'embeddings'",
        ),
        (
            hidden.make(project=False),
            layers(1),
            layers(1, WIDE),
            "leave out project=False",
        ),
        (
            hidden.make(shared=True),
            layers(1),
            layers(1),
            "shared = True: no layer is projected",
        ),
        (
            hidden.make(shared=True, layers=((1, "layer1"), (1, "wide"))),
            layers(1),
            layers(1, WIDE) | {"wide": jax.ShapeDtypeStruct((2, 4, 16), np.float32)},
            "are .8, 16., of other layers .8, 12.; leave it out",
        ),
        (
            hidden.make(teacher=1),
            layers(1),
            layers(1),
            "teacher = 1: choose from 0 to 0",
        ),
        (hidden.make(), layers(1), layers(1, HEADS), "compares .b, l, features."),
        (cosine.make(), layers(1), layers(1, WIDE), "distill.hidden projects"),
        (
            attention.make(),
            layers(1, HEADS, "scores"),
            layers(1, FOUR, "scores"),
            "scores1 has 2 heads, the teacher's scores1 4: give heads='mean'",
        ),
        (
            attention.make("probabilities"),
            layers(1, HEADS, "scores"),
            layers(1),
            "no numbered layers",
        ),
        (
            feature_map.make(),
            {"conv2": HEADS},
            {"conv2": HEADS},
            "give pairs of endpoints' names",
        ),
        (
            feature_map.make(layers=(("a", "b"),)),
            {"a": jax.ShapeDtypeStruct((2, 6, 6, 4), np.float32)},
            {"b": FOUR},
            "has 6 x 6 positions, the teacher's b 4 x 4",
        ),
        (
            attention_transfer.make(layers=(("a", "b"),)),
            {"a": STATE},
            {"b": FOUR},
            "attention_transfer compares .b, h, w, channels.",
        ),
    ],
)
def test_networks_that_do_not_fit_are_named(made, student, teacher, message):
    with pytest.raises(UserError, match=message) as error:
        made.bind(student, teacher)
    assert "\n" not in str(error.value)
