"""Networks of text through the jobs: trained, evaluated, asked, submitted, begun with and learnt from."""

import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
import torch

from squeeze_jax import models, tree
from squeeze_jax.errors import UserError
from squeeze_jax.export import Disagreement
from squeeze_jax.jobs import (
    _experiment,
    _model_json,
    _pretrained,
    _teachers,
    _workdir,
    cost,
    evaluate,
    fit,
    huggingface,
    predict,
    seeds,
    submit,
)
from squeeze_jax.train import log

GOOD, BAD = ("fine", "great", "warm"), ("dull", "grim", "weak")
OTHERS = ("a", "film", "the", "plot", "is", "and", "very")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A GLUE folder whose sentences have a good or a bad word each, and a vocabulary."""
    root = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    (root / "glue" / "SST-2").mkdir(parents=True)
    for split, count in ("train", 160), ("dev", 40), ("test", 9):
        lines = ["sentence\tlabel" if split != "test" else "index\tsentence"]
        for number in range(count):
            label = int(rng.integers(2))
            words = list(rng.choice(OTHERS, rng.integers(2, 9)))
            words.insert(rng.integers(len(words)), rng.choice((BAD, GOOD)[label]))
            text = " ".join(words)
            lines.append(f"{text}\t{label}" if split != "test" else f"{number}\t{text}")
        file = root / "glue" / "SST-2" / f"{split}.tsv"
        file.write_text("\n".join(lines) + "\n")
    words = (*SPECIAL, *GOOD, *BAD, *OTHERS)
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    return root


SIZES = dict(layers=2, features=32, heads=2, ffn_features=64)


def config(place, **changes):
    """A config of a small SqueezeBERT on the sentences; nested dicts are merged."""
    vocabulary = len(SPECIAL) + len(GOOD) + len(BAD) + len(OTHERS)
    made = dict(
        data=dict(
            name="glue",
            task="sst2",
            folder=str(place / "glue"),
            tokenizer=str(place / "vocab.txt"),
            length=16,
            buckets=(8,),
        ),
        model=dict(
            name="squeezebert", variant="toy", vocabulary=vocabulary, positions=16
        )
        | SIZES,
        optim=dict(name="adamw", lr=5e-3, warmup=0.1),
        batch=16,
        steps=300,
        log_every=100,
    )
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            made[key] = made[key] | value
        else:
            made[key] = value
    return _workdir.canonical(made)


def build(place, **changes):
    return _experiment.build(_experiment.check(config(place, **changes)))


def train(workdir, place, **changes):
    """Trains in a work directory; returns what was built."""
    built = build(place, **changes)
    fit.run(built, workdir)
    return built


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """(work directory, what was built): a network that tells good from bad."""
    workdir = tmp_path_factory.mktemp("trained")
    return workdir, train(workdir, place)


def test_it_learns_and_is_evaluated(trained, capsys):
    workdir, built = trained
    evaluate.run(built, workdir)
    printed = capsys.readouterr().out
    assert printed.startswith("step 300 · test accuracy ")
    assert printed.endswith("40 sequences\n")
    found = log.read(workdir / "metrics.jsonl")[-1]
    assert found["eval_accuracy"] == 1.0
    assert f"accuracy {found['eval_accuracy']:.4f}" in printed


def test_it_answers(trained, place, tmp_path, capsys):
    workdir, built = trained
    file = tmp_path / "lines.txt"
    file.write_text("the film is grim\nvery warm and fine\n")
    predict.run(built, workdir, ["a great plot", str(file)])
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    names = built.data.label_names
    assert labels == [names[1], names[0], names[1]]


def test_it_is_submitted(trained, place, capsys):
    workdir, built = trained
    submit.run(built, workdir)
    path = workdir / "submission" / "SST-2.tsv"
    assert str(path) in capsys.readouterr().out
    head, *rows = path.read_text().splitlines()
    assert head == "index\tprediction"
    lines = (place / "glue" / "SST-2" / "test.tsv").read_text().splitlines()[1:]
    for row, line in zip(rows, lines, strict=True):
        index, text = line.split("\t")
        assert row == f"{index}\t{int(bool(set(text.split()) & set(GOOD)))}"


def test_it_costs(trained, tmp_path, capsys):
    _, built = trained
    cost.run(built, tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("squeezebert, one sequence of 16 tokens")
    assert "layer2/ffn_out" in printed


def test_seeds_are_compared(place, tmp_path, capsys):
    built = build(place, seeds=(3, 4), steps=4, data=dict(buckets=()))
    seeds.run(built, tmp_path)
    written = json.loads((tmp_path / "seeds.json").read_text())
    losses = [written["seeds"][s]["eval_loss"] for s in ("3", "4")]
    assert losses[0] != losses[1]
    assert written["mean"]["eval_loss"] == pytest.approx(np.mean(losses))
    assert written["median"]["eval_loss"] == pytest.approx(np.mean(losses))
    assert written["deviation"]["eval_loss"] == pytest.approx(np.std(losses, ddof=1))
    scores = {int(s): written["seeds"][s]["eval_accuracy"] for s in written["seeds"]}
    assert scores[written["best"]] == max(scores.values())
    # What was trained is not trained again.
    capsys.readouterr()
    seeds.run(built, tmp_path)
    assert capsys.readouterr().out.count("already, to the last step") == 2
    for seed in 3, 4:
        _workdir._locks.pop((tmp_path / f"seed-{seed}").resolve()).close()


def leaves(built, workdir):
    state = jax.device_get(evaluate.trained_state(built, workdir))
    return tree.flatten(state.plain()["params"])


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_a_run_begins_with_another(trained, place):
    workdir, built = trained
    begun = build(place, init=dict(workdir=str(workdir)), model={}, steps=1)
    assert begun.options == built.options
    assert_equal(
        tree.flatten(begun.create(begun.initial_variables()).params),
        leaves(built, workdir),
    )


def test_a_run_begins_with_some_layers(trained, place):
    workdir, built = trained
    init = dict(workdir=str(workdir), layers=(2,))
    begun = build(place, init=init, model=dict(layers=1), steps=1)
    found = tree.flatten(begun.create(begun.initial_variables()).params)
    source = leaves(built, workdir)
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, source[name.replace("layer1/", "layer2/")])


def test_a_run_begins_with_what_a_regular_expression_finds(trained, place):
    init = dict(workdir=str(trained[0]), only="^embeddings/")
    begun = build(place, init=init, model=dict(groups=1), steps=1, seed=7)
    random = tree.flatten(build(place, model=dict(groups=1), seed=7).create().params)
    found, source = (
        tree.flatten(begun.create(begun.initial_variables()).params),
        leaves(*trained[::-1]),
    )
    for name, leaf in found.items():
        whose = source if name.startswith("embeddings/") else random
        np.testing.assert_array_equal(leaf, whose[name])


def test_a_run_begins_with_a_folder_of_transformers(trained, place, tmp_path):
    workdir, built = trained
    variables = jax.device_get(evaluate.trained_state(built, workdir).plain())
    models.save(tmp_path / "saved", built.model, variables)
    given = config(place, init=dict(folder=str(tmp_path / "saved"))) | dict(model={})
    begun = _experiment.build(_experiment.check(given))
    assert begun.options["name"] == "squeezebert"
    params = tree.flatten(begun.create(begun.initial_variables()).params)
    assert_equal(params, leaves(built, workdir))


LOSSES = (
    dict(name="losses.cross_entropy", weight=0.5),
    dict(name="distill.soft_logits", temperature=2.0, weight=0.5),
    dict(name="distill.hidden", layers=((1, 1), (2, 2)), embeddings=True),
    dict(name="distill.attention"),
)


def student(trained, **changes):
    """Changes that make a narrower student of the trained network."""
    teachers = dict(teachers=(dict(workdir=str(trained[0])),)) | changes.pop(
        "distill", {}
    )
    made = dict(
        model=dict(features=16, ffn_features=32, dropout=0.0, attention_dropout=0.0),
        distill=teachers,
        objective=LOSSES,
        steps=8,
        log_every=1,
        seed=5,
        data=dict(buckets=()),
    )
    return made | changes


def test_a_run_becomes_a_folder_of_transformers(trained, place, transformers, capsys):
    """transformers tokenizes the development set, and tells good from bad by the names of its classes."""
    workdir, built = trained
    huggingface.run(built, workdir)
    folder = workdir / "huggingface"
    assert f"written    {folder} · " in capsys.readouterr().out
    assert not list(workdir.glob(".huggingface*"))
    read = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    lines = (place / "glue" / "SST-2" / "dev.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    logits = net.eval()(**read(list(texts), padding=True, return_tensors="pt")).logits
    told = [net.config.id2label[int(n)] for n in logits.argmax(-1)]
    assert told == [("negative", "positive")[int(label)] for label in labels]
    # The same numbers.
    state = evaluate.trained_state(built, workdir)
    batch = next(built.data.eval(16))
    ours, _ = built.model.apply(state.plain(), built.data.inputs(batch))
    names = dict(input_ids="tokens", attention_mask="attended")
    names |= dict(token_type_ids="segments")
    given = {k: torch.tensor(batch[v]).long() for k, v in names.items()}
    theirs = net(**given).logits.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "labels", "activation"),
    [
        ("class", ("good", "bad"), "softmax"),
        ("labels", ("good,warm", "bad"), "sigmoid"),
        ("number", ("0.5", "1"), "none"),
    ],
)
def test_transformers_reads_the_outputs_as_they_were_trained(
    place, tmp_path, transformers, monkeypatch, target, labels, activation
):
    """A softmax, a sigmoid for each class, or the number itself: transformers' pipeline chooses by its own rule."""
    table = tmp_path / "table.csv"
    rows = [f'a film,"{label}"' for label in labels * 8]
    table.write_text("\n".join(["text,label", *rows]) + "\n")
    data = dict(name="texts", train=str(table), eval=str(table), target=target)
    data |= dict(tokenizer=str(place / "vocab.txt"), length=16)
    changed = config(place, model=dict(layers=1)) | dict(data=data)
    built = _experiment.build(_experiment.check(changed))
    monkeypatch.setattr(evaluate, "trained_state", lambda *_: built.create())
    agrees = types.SimpleNamespace(agrees=True, difference=0.0)
    monkeypatch.setattr(huggingface, "_compare_outputs", lambda *_: agrees)
    huggingface.run(built, tmp_path)
    folder = tmp_path / "huggingface"
    read = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    ask = transformers.pipeline("text-classification", model=net, tokenizer=read)
    answers = {a["label"]: a["score"] for a in ask("a film", top_k=None)}
    logits = net.eval()(**read("a film", return_tensors="pt")).logits[0]
    wanted = dict(softmax=logits.softmax(-1), sigmoid=logits.sigmoid(), none=logits)[
        activation
    ].tolist()
    scores = [answers[net.config.id2label[n]] for n in range(len(wanted))]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5)


def test_what_transformers_cannot_compute_is_no_folder(place, tmp_path):
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "config.json").write_text("an earlier one")
    groups = dict(groups=2, shuffle=True)
    built = train(tmp_path, place, model=groups, steps=1)
    with pytest.raises(UserError, match="shuffle"):
        huggingface.run(built, tmp_path)
    assert (tmp_path / "huggingface" / "config.json").read_text() == "an earlier one"
    assert not list(tmp_path.glob(".huggingface*"))


def test_a_folder_that_disagrees_does_not_count(trained, place, tmp_path, monkeypatch):
    workdir, built = trained
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    load = models.load

    def other(folder, **options):
        net, variables = load(folder, **options)
        return net, jax.tree.map(lambda x: 1.1 * x, variables)

    monkeypatch.setattr(models, "load", other)
    with pytest.raises(Disagreement, match="huggingface disagrees with the live mod"):
        huggingface.run(built, tmp_path)
    assert not (tmp_path / "huggingface").exists()
    assert (tmp_path / "huggingface.rejected" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def taught(trained, place, tmp_path_factory):
    """(work directory, what was built): a student that the trained network has taught in each step."""
    workdir = tmp_path_factory.mktemp("taught")
    return workdir, train(workdir, place, **student(trained))


def records(workdir):
    return [r for r in log.read(workdir / "metrics.jsonl") if "loss" in r]


def test_a_student_learns_from_a_teacher(taught):
    workdir, built = taught
    found = records(workdir)
    for record in found:
        parts = (record[part["name"].rpartition(".")[2]] for part in LOSSES)
        weighed = np.dot([0.5, 0.5, 1, 1], list(parts))
        assert record["loss"] == pytest.approx(weighed, rel=1e-5)
    assert found[-1]["hidden"] < found[0]["hidden"]
    # Projections are learnt, and are no part of the network.
    state = evaluate.trained_state(built, workdir)
    assert set(state.params["methods"]) == {"hidden"}
    begin = jax.device_get(built.create().params["methods"])
    for name, leaf in tree.flatten(begin).items():
        moved = tree.flatten(state.params["methods"])[name]
        assert leaf.shape == (16, 32)
        assert np.abs(np.asarray(moved) - leaf).max() > 1e-4
    assert "methods" not in state.plain()["params"]


def test_a_student_is_evaluated_without_its_teacher(taught, place):
    """Neither the losses nor the teachers nor the optimizer of the training are needed."""
    workdir, built = taught
    optim = dict(name="sgd", lr=1.0, freeze=("^methods/hidden/",))
    given = config(place, **student((workdir,)), optim=optim)
    begun = {"init": {"folder": "gone"}, "distill": {"teachers": ({"folder": "gone"},)}}
    alone, *_ = _pretrained.config_without_training(workdir, given | begun)
    bare = _experiment.build(_experiment.check(_workdir.canonical(alone)))
    assert bare.options == built.options
    assert_equal(leaves(bare, workdir), leaves(built, workdir))


def test_a_teacher_from_disk_says_the_same(trained, taught, place, tmp_path):
    distill = dict(cache=str(tmp_path / "cache"))
    built = train(tmp_path / "disk", place, **student(trained, distill=distill))
    losses = [[r["loss"] for r in records(w)] for w in (taught[0], tmp_path / "disk")]
    np.testing.assert_allclose(*losses, rtol=2e-3)  # of float16
    # It is there now, and nothing is computed again.
    said = []
    with _teachers.open_outputs(built, said.append) as outputs:
        assert outputs.step_arguments == ()
    assert not said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            dict(data=dict(task="sst")),
            "unknown GLUE task 'sst'; did you mean 'sst2'? choose from ",
        ),
        (
            dict(model=dict(vocabulary=500)),
            "the tokenizer has 18 tokens, the model's embedding 500: ",
        ),
        (
            dict(model=dict(positions=8)),
            "sequences of 16 tokens are longer than the 8 positions: ",
        ),
        (
            dict(model=dict(name="squeezenet")),
            "config.model.name = 'squeezenet' reads images, but config.data gives tokens: ",
        ),
        (
            dict(model=dict(task="span")),
            "config.model.task = 'span', but config.data is for 'classification': ",
        ),
        (
            dict(init=dict(workdir="nowhere")),
            "config.init.workdir = 'nowhere' holds no ",
        ),
        (dict(init=dict(folder="nowhere")), "nowhere"),
        (dict(init=dict()), None),
        (dict(init=dict(wrkdir="x")), "unknown key config.init.wrkdir; did you mean "),
        (
            dict(init=dict(folder="x", workdir="y")),
            "config.init should name a folder of transformers or a workdir",
        ),
        (
            dict(objective=dict(name="distill.hidden")),
            "config.objective: hidden compares with a teacher: name one in config.distill",
        ),
        (
            dict(objective=(dict(name="losses.cross_entropy", weight=0),)),
            "config.objective.weight = 0 should be positive",
        ),
        (dict(objective=()), "config.objective lists no loss: "),
        (
            dict(objective=dict(name="distill.cache")),
            "config.objective.name = 'distill.cache' is no method",
        ),
        (
            dict(objective=dict(name="comm.mean", dtype="float16")),
            "config.objective.dtype = 'float16'",
        ),
        (
            dict(distill=dict(teachers=("x",))),
            "config.distill.teachers[0] = 'x' (str) should be dict",
        ),
        (dict(checkpoint=dict(best="eval_f1")), "config.checkpoint.best = 'eval_f1'"),
        (dict(seeds=(1, -2)), "config.seeds[1] = -2 should not be negative"),
        (dict(seeds=(1, 0, 1)), "config.seeds = (1, 0, 1) names 1 twice"),
        (
            dict(distill=dict(cache="x")),
            "config.distill.cache has no effect without config.distill.teachers",
        ),
    ],
)
def test_mistakes_are_one_line_before_any_work(place, changes, line):
    if line is None:
        build(place, **changes)
        return
    with pytest.raises(UserError) as error:
        build(place, **changes)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_teachers_that_teach_nothing_are_named(trained, place):
    teachers = dict(teachers=(dict(workdir=str(trained[0])),))
    with pytest.raises(
        UserError, match=r"config\.distill.teachers has no effect: no loss"
    ):
        build(place, distill=teachers)


def test_a_network_that_does_not_fit_is_named(trained, place):
    built = build(
        place, init=dict(workdir=str(trained[0])), model=dict(ffn_features=32)
    )
    with pytest.raises(UserError, match="weights do not fit: layer1/ffn_in/") as error:
        built.initial_variables()
    assert "take only what fits by config.init.only" in str(error.value)
    built = build(place, init=dict(workdir=str(trained[0]), layers=(2, 3)))
    with pytest.raises(
        UserError, match=r"config\.init.layers has 3: .* has layers 1 to 2"
    ):
        built.initial_variables()


def test_a_run_without_a_checkpoint_is_named(place, tmp_path):
    _model_json.write(tmp_path, config(place)["model"], {})
    built = build(place, init=dict(workdir=str(tmp_path)))
    with pytest.raises(
        UserError, match=f"no checkpoint in {tmp_path}: train there first"
    ):
        built.initial_variables()
