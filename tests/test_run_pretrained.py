"""Networks that runs begin with or learn from: what of a run goes on, and which of its checkpoints."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from squeeze_jax import data, models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _experiment,
    _model_json,
    _pretrained,
    _settings,
    _teachers,
    evaluate,
    fit,
)
from squeeze_jax.models import electra_pretraining
from squeeze_jax.train import log

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dull", "fine", "film")
SIZES = dict(layers=2, features=16, heads=2, ffn_features=24, positions=12)
SIZES |= dict(vocabulary=len(WORDS), embedding_features=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A vocabulary, a text, and two of GLUE's tasks."""
    root = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)

    def sentence():
        return " ".join(rng.choice(WORDS[5:], 6))

    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    document = "\n".join(sentence() for _ in range(40))
    (root / "text.txt").write_text(f"{document}\n\n{document}\n")
    (root / "glue" / "SST-2").mkdir(parents=True)
    (root / "glue" / "CoLA").mkdir()
    for split in "train", "dev":
        rows = [(sentence(), n % 2) for n in range(16)]
        sst2 = "".join(f"{text}\t{label}\n" for text, label in rows)
        (root / "glue" / "SST-2" / f"{split}.tsv").write_text(
            f"sentence\tlabel\n{sst2}"
        )
        cola = "".join(f"x\t{label}\t\t{text}\n" for text, label in rows)
        (root / "glue" / "CoLA" / f"{split}.tsv").write_text(cola)
    return root


def build(section, **changes):
    made = dict(
        data=section,
        optim=dict(name="adamw", lr=1e-2),
        batch=8,
        steps=3,
        log_every=1,
    )
    return _experiment.build(_experiment.check(_settings.with_tuples(made | changes)))


def pretraining(place, **changes):
    data = dict(name="pretraining", files=str(place / "text.txt"), kind="replaced")
    data |= dict(eval=0.5, length=12, tokenizer=str(place / "vocab.txt"))
    net = dict(name="electra_pretraining", variant="toy", dropout=0.0) | SIZES
    return build(data, **dict(model=net) | changes)


def glue(place, task="sst2", **changes):
    data = dict(name="glue", task=task, folder=str(place / "glue"), length=12)
    return build(data | dict(tokenizer=str(place / "vocab.txt")), **changes)


@pytest.fixture(scope="module")
def electra(place, tmp_path_factory):
    """(work directory, parameters by name): a run of a generator and a discriminator."""
    workdir = tmp_path_factory.mktemp("electra")
    built = pretraining(place)
    fit.run(built, workdir)
    state = jax.device_get(evaluate.trained_state(built, workdir))
    return workdir, tree.flatten(state.params)


def of_the_discriminator(params):
    """Its encoder's parameters, as those of a network alone are called."""
    encoder = {k: v for k, v in params.items() if k.startswith("embeddings/")}
    for name, value in params.items():
        whose, _, rest = name.partition("/")
        if whose == "discriminator" and not rest.startswith("head/"):
            encoder[rest] = value
    return encoder


def test_a_classifier_begins_with_the_discriminator(electra, place, tmp_path):
    workdir, params = electra
    built = glue(place, init=dict(workdir=str(workdir)), seed=7)
    # Table 1 of arXiv 2003.10555: the discriminator's sizes, of which the generator has a half here.
    net = models.make("electra", variant="toy", dropout=0.0, **SIZES)
    assert built.model == net
    begun = tree.flatten(jax.device_get(built.create(built.initial_variables()).params))
    expected = of_the_discriminator(params)
    assert {k.partition("/")[0] for k in expected} == {
        *("embeddings", "project", "layer1", "layer2")
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(begun.pop(name), value, err_msg=name)
    # The head is new: its first layer is called as the discriminator's.
    fresh = glue(place, model=dict(name="electra", variant="toy") | SIZES, seed=7)
    fresh = tree.flatten(jax.device_get(fresh.create().params))
    assert set(begun) == {
        f"head/{layer}/{leaf}"
        for layer in ("transform", "classifier")
        for leaf in ("kernel", "bias")
    }
    for name, value in begun.items():
        np.testing.assert_array_equal(value, fresh[name])
    fit.run(built, tmp_path)
    assert evaluate.trained_state(built, tmp_path).step == 3
    assert np.isfinite(log.read(tmp_path / "metrics.jsonl")[-1]["eval_loss"])


def test_pretraining_goes_on_with_both(electra, place):
    workdir, params = electra
    built = pretraining(place, init=dict(workdir=str(workdir)), model={}, seed=7)
    begun = tree.flatten(jax.device_get(built.create(built.initial_variables()).params))
    assert begun.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(begun[name], value, err_msg=name)


def test_some_layers_of_the_discriminator(electra, place):
    workdir, params = electra
    net = dict(name="electra", variant="toy") | SIZES | dict(layers=1)
    built = glue(place, model=net, init=dict(workdir=str(workdir), layers=(2,)))
    begun = tree.flatten(built.initial_variables()["params"])
    source = of_the_discriminator(params)
    assert "layer1/ffn_in/kernel" in begun
    for name, value in begun.items():
        np.testing.assert_array_equal(value, source[name.replace("layer1", "layer2")])


def test_layers_of_every_collection_are_renumbered():
    def variables(count):
        layers = {f"layer{n}": np.float32([n]) for n in range(1, count + 1)}
        few = {
            name: {"mean": value} for name, value in layers.items() if name != "layer3"
        }
        return {
            "params": {k: {"kernel": v} for k, v in layers.items()},
            "batch_stats": few | {"stem": {"mean": np.float32([9])}},
        }

    trained = _pretrained.PretrainedNetwork(
        {"name": "bert"}, lambda *_: (variables(4), ()), "run"
    )
    shapes = variables(2)
    del shapes["batch_stats"]["layer2"]
    shapes = jax.eval_shape(lambda: shapes)
    begun = _pretrained.initial_variables(
        trained, {"name": "bert"}, shapes, None, layers=(4, 3)
    )
    assert begun == {
        "params": {"layer1": {"kernel": [4]}, "layer2": {"kernel": [3]}},
        "batch_stats": {"layer1": {"mean": [4]}, "stem": {"mean": [9]}},
    }
    with pytest.raises(UserError, match="layers has 5: run has layers 1 to 4"):
        _pretrained.initial_variables(
            trained, {"name": "bert"}, shapes, None, layers=(5,)
        )


def test_what_is_fine_tuned_is_what_is_saved(electra):
    net = electra_pretraining.make("toy", generator=0.25, **SIZES)
    options, part = electra_pretraining.fine_tuned(
        dict(variant="toy", generator=0.25) | SIZES
    )
    params = {"embeddings": 1, "generator": {"a": 2}, "discriminator": {"a": 3}}
    alone, variables = electra_pretraining.split_networks(net, {"params": params})[0]
    assert models.make(**options) == alone
    assert part({"params": params}) == variables
    assert variables == {"params": {"embeddings": 1, "a": 3}}
    # What is not said is as `make` has it.
    usual, _ = electra_pretraining.fine_tuned({})
    assert models.make(**usual) == electra_pretraining.make().networks().discriminator


STUDENT = dict(name="bert", variant="toy") | SIZES | dict(features=8)
STUDENT.pop("embedding_features")
HIDDEN = (dict(name="losses.cross_entropy"), dict(name="distill.hidden"))


def taught(place, workdir, **changes):
    teachers = dict(teachers=(dict(workdir=str(workdir)),))
    made = dict(model=STUDENT, objective=HIDDEN, distill=teachers)
    return glue(place, **made | changes)


def test_the_discriminator_teaches(electra, place, tmp_path):
    workdir, params = electra
    built = taught(place, workdir)
    ((net, read, *_),) = built.teachers
    assert net.model.row == models.make("electra", variant="toy", **SIZES).row
    found = tree.flatten(read(None)["params"])
    for name, value in of_the_discriminator(params).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    fit.run(built, tmp_path)
    assert all("hidden" in r for r in log.read(tmp_path / "metrics.jsonl")[:3])
    # It classifies nothing.
    with pytest.raises(UserError, match=r"the student's logits are \(1, 2\), the"):
        taught(place, workdir, objective=dict(name="distill.soft_logits"))
    # In pretraining each network fills in tokens of its own.
    with pytest.raises(UserError, match=r"teachers\[0\] = .* draws tokens of its own"):
        pretraining(
            place,
            distill=dict(teachers=(dict(workdir=str(workdir)),)),
            objective=(dict(name="losses.replaced"), dict(name="distill.hidden")),
        )


def test_the_parameters_of_losses_are_none_of_the_network():
    own = {"methods": {"hidden": {"kernel": np.ones(2)}}}
    saved = {"params": {"conv1": {"kernel": np.ones(3)}} | own, "step": 4}
    network = _pretrained.PretrainedNetwork({}, lambda *_: (saved, ()), "here")
    assert list(network.plain_variables({}, None)[0]["params"]) == ["conv1"]


def test_an_unfinished_checkpoint_is_none(tmp_path):
    for name, is_one in ("2.orbax-checkpoint-tmp", False), ("2", True):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        assert _pretrained.has_checkpoint(tmp_path) == is_one


def test_a_network_without_embeddings_fits_every_vocabulary():
    assert _pretrained.vocabulary_fits(models.make("mobilenet_v2"), 9)
    bert = models.make("electra", variant="toy", **SIZES)
    assert [_pretrained.vocabulary_fits(bert, n) for n in (9, 10)] == [True, False]


def test_a_network_for_pretraining_is_none_for_a_task(place):
    net = dict(name="electra_pretraining", variant="toy") | SIZES
    with pytest.raises(
        UserError,
        match=r"config\.model\.name = 'electra_pretraining' is for 'pretraining', but",
    ):
        glue(place, model=net)


@pytest.mark.parametrize(
    ("noted", "message"),
    [
        (
            dict(STUDENT, vocabulary=300),
            r"the tokenizer has 9 tokens, config\.distill\.teachers\[0\] = .* 300: student",
        ),
        (
            dict(name="squeezenet"),
            r"teachers\[0\] = .* holds 'squeezenet', which reads images, but",
        ),
        (
            dict(STUDENT, num_classes=3),
            r"the student's logits are \(1, 2\), the teacher's \(1, 3\)",
        ),
    ],
)
def test_teachers_that_cannot_teach_are_named_at_once(place, tmp_path, noted, message):
    _model_json.write(tmp_path, noted, {})
    with pytest.raises(UserError, match=message) as error:
        taught(place, tmp_path, objective=dict(name="distill.soft_logits"))
    assert "\n" not in str(error.value)


def test_a_work_directory_is_no_folder_of_transformers(tmp_path):
    """And the other way round: the error says which key it is."""
    _model_json.write(tmp_path / "run", STUDENT, {})
    with pytest.raises(UserError, match=r"run' is the work directory of a run: write config\.init\.workdir"):  # fmt: skip
        _pretrained.network_from_init(folder=str(tmp_path / "run"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"it is a folder of transformers, write config\.init\.folder"):  # fmt: skip
        _pretrained.network_from_init(workdir=str(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"no model.json.*: train one there first"):
        _pretrained.network_from_init(workdir=str(tmp_path))


def test_a_teacher_of_other_classes_teaches_what_lies_below(place, tmp_path):
    """The head is its own, whatever the data of the student."""
    _model_json.write(tmp_path, dict(STUDENT, num_classes=3), {})
    ((net, *_),) = taught(place, tmp_path).teachers
    assert net.model.num_classes == 3


def test_layers_without_a_head_teach_what_they_say(place, tmp_path):
    """A folder of an encoder alone, as those for sentence embeddings are: its hidden states, but no logits."""
    net = models.make(**STUDENT | dict(task="features"))
    tokens = np.zeros((1, 12), np.int32)
    variables = net.init(jax.random.key(1), dict(tokens=tokens), train=False)
    folder = tmp_path / "encoder"
    models.save(folder, net, variables)
    data = dict(name="pretraining", files=str(place / "text.txt"), eval=0.5, length=12)
    data |= dict(tokenizer=str(place / "vocab.txt"), masked=0.0, random=0.0)
    made = dict(distill=dict(teachers=(dict(folder=str(folder)),)), model=STUDENT)
    hidden = dict(name="distill.hidden")
    built = build(data, objective=hidden, **made)
    # The tokens are as they were written: nothing is masked.
    batch = next(built.data.eval(4))
    x = built.data.inputs(batch)
    np.testing.assert_array_equal(x["tokens"], batch["original"])
    expected = net.apply(variables, x, train=False)[1]
    with _teachers.open_outputs(built, print) as outputs:
        (found,) = outputs.teach(outputs.step_arguments[0], batch)
    assert set(found) == {"layer1", "layer2"}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    # A student that is this network differs in nothing.
    begun = dict(init=dict(folder=str(folder)), optim=dict(name="sgd", lr=1e-9))
    same = made | dict(model=dict(dropout=0.0, attention_dropout=0.0))
    fit.run(build(data, objective=hidden, **same, **begun), tmp_path / "run")
    for record in log.read(tmp_path / "run" / "metrics.jsonl"):
        assert record.get("hidden", 0.0) < 1e-6
    built = build(data, objective=dict(name="distill.soft_logits"), **made)
    with pytest.raises(UserError, match=r"no weights for head/.* train them first"):
        fit.run(built, tmp_path / "logits")


def test_a_teacher_sees_pixels_as_in_its_training(tmp_path):
    data = dict(source=dict(name="digits"), size=8, mean=(0.1,))
    net = dict(name="squeezenet", variant="tiny", stem_strides=1)
    losses = dict(name="distill.soft_logits")
    teachers = dict(teachers=(dict(workdir=str(tmp_path)),))
    _model_json.write(tmp_path, dict(net, num_classes=10), {})
    (tmp_path / "config.json").write_text(json.dumps(dict(data=data)))
    build(data | dict(mean=(0.1,)), model=net, objective=losses, distill=teachers)
    data.pop("mean")
    with pytest.raises(
        UserError, match=r"trained with config\.data\.mean = \(0\.1,\), and a teacher"
    ):
        build(data, model=net, objective=losses, distill=teachers)


@pytest.mark.parametrize("use", ["newest", "best"])
def test_a_run_is_the_checkpoint_that_it_says(place, tmp_path, use):
    """CoLA is not scored by accuracy; of equal scores the first is the best."""
    net = STUDENT | dict(dropout=0.0)
    best = dict(use=use, keep=3)
    optim = dict(name="sgd", lr=1e-6, schedule="constant")
    built = glue(
        place, "cola", model=net, optim=optim, checkpoint=best, eval_every=1, steps=2
    )
    fit.run(built, tmp_path)
    scores = [
        r["eval_matthews"]
        for r in log.read(tmp_path / "metrics.jsonl")
        if "eval_matthews" in r
    ]
    assert scores[0] == scores[1]
    state = evaluate.trained_state(built, tmp_path)
    assert state.step == {"newest": 2, "best": 1}[use]
    begun = glue(place, "cola", init=dict(workdir=str(tmp_path)))
    found = tree.flatten(begun.initial_variables()["params"])
    for name, value in tree.flatten(state.params).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # Another choice later is noted when the run is asked for again.
    other = {"newest": "best", "best": "newest"}[use]
    again = glue(
        place,
        "cola",
        model=net,
        optim=optim,
        checkpoint=best | dict(use=other),
        eval_every=1,
        steps=2,
    )
    fit.run(again, tmp_path)
    noted = json.loads((tmp_path / _model_json.NAME).read_text())["checkpoint"]
    assert noted == {"best": "eval_matthews", "use": other, "keep": 3}
    # The newest is damaged: nothing tells of what it is.
    (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").unlink()
    skipped = pytest.warns(UserWarning, match="2 is damaged and skipped")
    with skipped if use == "newest" else contextlib.nullcontext():
        assert evaluate.trained_state(built, tmp_path).step == 1
    with skipped if other == "newest" else contextlib.nullcontext():
        begun = glue(place, "cola", init=dict(workdir=str(tmp_path)))
        assert (
            begun.initial_variables()["params"].keys() == state.plain()["params"].keys()
        )


@pytest.mark.parametrize("content", ["{", '{"name": "bert"}'])
def test_a_damaged_note_is_named(place, tmp_path, content):
    (tmp_path / _model_json.NAME).write_text(content)
    with pytest.raises(UserError, match=r"model\.json is .*: run the job fit there"):
        glue(place, init=dict(workdir=str(tmp_path)))


def test_what_is_on_disk_is_of_the_same_data_and_teacher(place, tmp_path):
    """Its teacher computes in bfloat16. Later a file of the data changes, the teacher's activation, what it computes in."""
    root, teacher, cache = (tmp_path / name for name in ("place", "teacher", "cache"))
    shutil.copytree(place, root)
    net = STUDENT | dict(dtype="bfloat16")
    fit.run(glue(root, model=net, steps=1), teacher)
    noted = json.loads((teacher / _model_json.NAME).read_text())

    def opened(dtype="float32", **settings):
        distill = dict(teachers=(dict(workdir=str(teacher)),), cache=str(cache))
        built = taught(root, teacher, distill=distill | settings, dtype=dtype)
        said = []
        with _teachers.open_outputs(built, said.append) as outputs:
            assert outputs.step_arguments == ()
        return said

    distill = dict(teachers=(dict(workdir=str(teacher)),), cache=str(cache))
    fit.run(taught(root, teacher, distill=distill), tmp_path / "student")
    assert opened() == []
    other = r"cache/0 holds .*, not .*: give another folder"
    for activation in "relu", "gelu":
        noted["model"]["activation"] = activation
        (teacher / _model_json.NAME).write_text(json.dumps(noted))
        if activation == "relu":
            with pytest.raises(UserError, match=other):
                opened()
    assert opened() == []
    for changes in dict(dtype="bfloat16"), dict(cache_dtype="float32"):
        with pytest.raises(UserError, match=other):
            opened(**changes)
    file = root / "glue" / "SST-2" / "train.tsv"
    file.write_text(file.read_text().replace("dull", "fine"))
    with pytest.raises(UserError, match=other):
        opened()
    # As float32 in another place; a row that is missing is the only one that is computed.
    cache = tmp_path / "exact"
    assert len(opened(cache_dtype="float32")) == 1
    rows = np.load(cache / "0" / "layer1.npy", mmap_mode="r+")
    assert rows.dtype == np.float32
    before = rows.copy()
    rows[:] = 0
    rows.flush()
    written = np.load(cache / "0" / "written.npy", mmap_mode="r+")
    written[3] = 0
    written.flush()
    assert len(opened(cache_dtype="float32")) == 1
    after = np.load(cache / "0" / "layer1.npy")
    there = after.any((1, 2))
    np.testing.assert_array_equal(after[there], before[there])
    assert there[3]
    assert there.sum() == 8  # its batch


def test_what_changes_is_not_kept_on_disk():
    images = data.make(source={"name": "digits"}, size=8, flip=True)
    settings = _teachers.Settings(teachers=({"workdir": "x"},), cache="c")
    with pytest.raises(UserError, match="training examples change from epoch to epoch"):
        _teachers.check_cache(settings, images)
    _teachers.check_cache(settings, data.make(source={"name": "digits"}, size=8))
