"""Classes keep their names: a trained head is matched with the data by name, never by number alone."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import run as run_py
from squeeze_jax import methods
from squeeze_jax.errors import UserError
from squeeze_jax.export import load
from squeeze_jax.jobs import (
    _classes,
    _experiment,
    _model_json,
    _plain,
    _pretrained,
    _settings,
    _teachers,
    _transitions,
)
from squeeze_jax.train import forward

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dull", "fine", "film")
ORDERS = {
    "equal": ({0: "negative", 1: "positive"}, [0, 1], None),
    "swapped": ({0: "Positive", 1: "NEGATIVE"}, [1, 0], "is put into the order"),
    "generic": ({0: "LABEL_0", 1: "LABEL_1"}, [0, 1], "does not name its classes"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A vocabulary and the sentences of SST-2's two splits."""
    root = tmp_path_factory.mktemp("place")
    (root / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (root / "glue" / "SST-2").mkdir(parents=True)
    rows = "".join(f"a {WORDS[6 + n % 2]} film\t{n % 2}\n" for n in range(16))
    for split in "train", "dev":
        file = root / "glue" / "SST-2" / f"{split}.tsv"
        file.write_text(f"sentence\tlabel\n{rows}")
    return root


def build(place, **changes):
    data = dict(name="glue", task="sst2", folder=str(place / "glue"), length=12)
    config = dict(
        data=data | dict(tokenizer=str(place / "vocab.txt")),
        optim=dict(name="adamw", lr=1e-2),
        batch=8,
        steps=1,
    )
    checked = _experiment.check(_settings.with_tuples(config | changes))
    return _experiment.build(checked)


@pytest.fixture
def bert(transformers, tmp_path):
    """Saves a random classifier of transformers under names of classes; returns the network and its folder."""

    def save(names, **keys):
        config = transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=12,
            id2label=names,
            label2id={name: n for n, name in names.items()},
            **keys,
        )
        torch.manual_seed(0)
        net = transformers.BertForSequenceClassification(config).eval()
        net.save_pretrained(tmp_path / "bert")
        return net, tmp_path / "bert"

    return save


def expected(net, batch):
    """The logits of transformers for a batch."""
    with torch.no_grad():
        return net(
            input_ids=torch.tensor(batch["tokens"]).long(),
            attention_mask=torch.tensor(batch["attended"]).long(),
            token_type_ids=torch.tensor(batch["segments"]).long(),
        ).logits.numpy()


@pytest.mark.parametrize("names", ORDERS)
def test_a_head_begins_in_the_order_of_the_data(place, bert, names, capsys):
    id2label, places, said = ORDERS[names]
    net, folder = bert(id2label)
    built = build(place, init=dict(folder=str(folder)))
    given = built.initial_variables()
    printed = capsys.readouterr().out
    assert (said in printed) if said else not printed
    batch = next(built.data.eval(8))
    inputs = jax.tree.map(jnp.asarray, built.data.inputs(batch))
    (logits, _), _ = forward.run(built.network, given, inputs)
    np.testing.assert_allclose(logits, expected(net, batch)[:, places], atol=1e-5)


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
@pytest.mark.parametrize("use", ["init", "teacher"])
def test_a_line_tells_of_a_head_with_another_meaning(place, bert, kind, use, capsys):
    """GLUE's sst2 gives each sentence one of two classes."""
    names = dict(enumerate(("negative", "positive")))
    _, folder = bert(names, problem_type=f"{kind}_classification")
    if use == "init":
        build(place, init=dict(folder=str(folder))).initial_variables()
    else:
        model = dict(name="bert", variant="toy", vocabulary=9)
        teachers = dict(teachers=(dict(folder=str(folder)),))
        loss = dict(name="distill.soft_logits")
        built = build(place, model=model, distill=teachers, objective=loss)
        with _teachers.open_outputs(built, print):
            pass
    line = (
        f"classes    {folder} was trained with problem_type = 'multi_label_classification', and config.data is for"
        " 'single_label_classification'"
    )
    assert (line in capsys.readouterr().out) == (kind == "multi_label")


@pytest.mark.parametrize("method", ["nas.once_for_all", "nas.sandwich"])
def test_a_softmax_does_not_teach_several_labels(place, tmp_path, method):
    """Smaller networks would learn that a text's labels exclude each other."""
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + 'a film,"fine,film"\na dull film,dull\n' * 8)
    data = dict(name="texts", train=str(table), eval=str(table), length=12)
    data |= dict(tokenizer=str(place / "vocab.txt"), target="labels")
    model = dict(name="elastic_squeezebert", variant="tiny", vocabulary=9)
    own = dict(widths=(0.5, 1.0)) if method == "nas.sandwich" else {}
    gradients = dict(name=method, random=0) | own
    with pytest.raises(UserError, match="teaches networks by a softmax"):
        build(place, data=data, model=model, gradients=gradients)
    if method == "nas.once_for_all":
        by_labels = gradients | dict(distill=0.0, labels=1.0)
        build(place, data=data, model=model, gradients=by_labels)


@pytest.mark.parametrize("target", ["class", "labels"])
def test_a_run_compares_a_teacher_as_its_data_are(place, bert, tmp_path, target):
    """Logits that all grow by 10 change every sigmoid and no softmax."""
    _, folder = bert(dict(enumerate(("bad", "good"))))
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "a film,good\na dull film,bad\n" * 8)
    data = dict(name="texts", train=str(table), eval=str(table), length=12)
    built = build(
        place,
        data=data | dict(tokenizer=str(place / "vocab.txt"), target=target),
        model=dict(name="bert", variant="toy", vocabulary=9),
        distill=dict(teachers=(dict(folder=str(folder)),)),
        objective=dict(name="distill.soft_logits"),
    )
    ours = jnp.array([[0.0, 1.0]])
    batch = {"mask": jnp.ones(1, bool), "teacher": ({"logits": ours + 10},)}
    (term,) = built.objective.terms
    loss, _ = term.objective.loss(
        ours, {}, batch, {}, methods.Own({}, None, None, 0, True)
    )
    assert (float(loss) > 0.1) == (target == "labels")


@pytest.fixture
def encoder(transformers, bert, tmp_path):
    """Saves a network of transformers without a head, or with one for three classes; returns its folder."""

    def save(head):
        net, folder = bert(dict(enumerate("abc")))
        if not head:
            net.bert.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("head", [False, True])
def test_a_head_that_does_not_fit_begins_anew(place, encoder, head, capsys):
    built = build(place, init=dict(folder=str(encoder(head))))
    given = built.initial_variables()["params"]
    printed = capsys.readouterr().out
    assert "has no head/classifier for this task and these classes" in printed
    assert "classes    " not in printed
    assert given["head"]["classifier"]["kernel"].shape == (16, 2)


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (dict(name="distill.soft_logits"), "does not name its classes: its classif"),
        (dict(name="distill.hidden", layers=((1, 1),)), ""),
    ],
)
def test_a_line_tells_of_a_teacher_without_names(place, bert, encoder, loss, line):
    _, folder = bert(ORDERS["generic"][0]) if line else (None, encoder(False))
    model = dict(name="bert", variant="toy", vocabulary=9)
    teachers = dict(teachers=(dict(folder=str(folder)),))
    built, lines = build(place, model=model, distill=teachers, objective=loss), []
    with _teachers.open_outputs(built, lines.append):
        pass
    assert len(lines) == bool(line)
    assert line in "".join(lines)


def test_a_teacher_answers_in_the_order_of_the_data(place, bert):
    net, folder = bert(ORDERS["swapped"][0])
    source = build(place, model=dict(name="bert", variant="toy", vocabulary=9)).data
    network, read, *_ = _teachers.make_teacher(dict(folder=str(folder)), source, "here")
    batch = next(source.eval(8))
    inputs = jax.tree.map(jnp.asarray, source.inputs(batch))
    (logits, _), _ = forward.run(network, read(None), inputs)
    np.testing.assert_allclose(logits, expected(net, batch)[:, [1, 0]], atol=1e-5)


def test_other_classes_are_one_line(place, bert):
    _, folder = bert({0: "entailment", 1: "not_entailment"})
    words = r"was trained on the classes \(entailment, not_entailment\), config.data"
    with pytest.raises(UserError, match=words + ".*config.init.only"):
        build(place, init=dict(folder=str(folder))).initial_variables()
    teachers = dict(teachers=(dict(folder=str(folder)),))
    with pytest.raises(UserError, match=words + ".*choose a teacher"):
        build(place, model=dict(name="bert", variant="toy"), distill=teachers)


@pytest.mark.parametrize(
    ("theirs", "ours", "places"),
    [
        (("a", "b"), ("a", "b"), None),
        (("c", "a", "b"), ("a", "b", "c"), (1, 2, 0)),
        ((" A", "b "), ("B", "a"), (1, 0)),
        (("cat", "Dog"), ("CAT", "dog"), None),
        (("a", "A"), ("A", "a"), (1, 0)),
        (None, ("a",), None),
        (("a",), (), None),
    ],
)
def test_places_of_names(theirs, ours, places):
    assert _classes.class_positions(theirs, ours, "it", "") == places


def test_outputs_without_a_name_keep_their_places():
    places = _classes.class_positions(("a", "b"), ("b", "a"), "it", "", 4)
    assert places == (1, 0, 2, 3)


@pytest.mark.parametrize(
    "theirs", [("a", "c"), ("a",), ("a", "a", "b"), ("B", "b"), ("A", "b", "B")]
)
def test_names_that_differ(theirs):
    with pytest.raises(UserError, match="was trained on the classes"):
        _classes.class_positions(theirs, ("a", "b"), "it", "")


def photos(root, *classes):
    rng = np.random.default_rng(0)
    for split in "train", "test":
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(8):
                pixels = rng.integers(0, 60, (8, 8, 3)) + 60 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{n}.png")


@pytest.mark.parametrize(
    ("written", "section", "channels"),
    [
        ({"channels": 1}, {}, 1),
        ({"channels": 1, "classes": ["a"]}, {"name": "segmentation"}, 1),
        ({"source": {"name": "absent", "channels": 3}}, {}, 3),  # earlier versions
        ({"channels": 1}, {"channels": 3}, 3),  # compared with the run's config later
        ({"channels": 1}, {"name": "texts", "train": "a.csv"}, None),
        ({"channels": "1"}, {}, None),
        ({"source": {"channels": [3]}}, {}, None),
        ({}, {}, None),
    ],
)
def test_channels_of_a_run(tmp_path, written, section, channels):
    content = {"model": {"name": "resnet"}, "checkpoint": {}} | written
    (tmp_path / "model.json").write_text(json.dumps(content))
    if not section.keys() & {"name", "train"}:
        section = section | {"source": {"name": "digits"}}
    if section.get("name") == "segmentation":
        section = section | {"source": {"name": "pairs", "root": "x"}}
    config = _model_json.with_channels(tmp_path, {"data": section})
    assert config["data"].get("channels") == channels


def test_a_run_keeps_the_names_of_its_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", "blue", "red")
    arguments = [
        "--workdir=run",
        "--config.data.source={'name': 'folder', 'root': 'photos'}",
        "--config.data.size=8",
        "--config.data.pad=0",
        '--config.model={"name": "squeezenet", "variant": "tiny", "stem_strides": 1}',
        "--config.steps=2",
        "--config.batch=8",
        "--config.export.formats=('stablehlo',)",
        "--config.export.check=8",
    ]
    run_py.main(["--job=fit", *arguments])
    run_py.main(["--job=export", "--workdir=run"])
    listed = json.loads((tmp_path / "run/export/files.json").read_text())
    assert listed["stablehlo"]["classes"] == ["blue", "red"]
    assert load("run/export/model.stablehlo").classes == ("blue", "red")
    for split in "train", "test":
        shutil.copytree(f"photos/{split}/red", f"photos/{split}/sand")
    words = r"classes \(blue, red\), config.data has \(blue, red, sand\).*config.init"
    for job in "evaluate", "fit":
        with pytest.raises(UserError, match=words):
            run_py.main([f"--job={job}", "--workdir=run"])
    for split in "train", "test":
        shutil.rmtree(f"photos/{split}/sand")
    for split in "train", "test":
        shutil.move(f"photos/{split}/red", f"photos/{split}/aqua")
    words = (
        r"run was trained on the classes \(blue, red\), config.data has \(aqua, blue\)"
    )
    for job in "evaluate", "predict", "export", "fit":
        files = ["photos/test/aqua/0.png"] if job == "predict" else []
        with pytest.raises(UserError, match=words):
            run_py.main([f"--job={job}", "--workdir=run", *files])
    for split in "train", "test":
        shutil.move(f"photos/{split}/aqua", f"photos/{split}/red")
    capsys.readouterr()
    # Without the data predict answers as with them, and a float file is exported again.
    shutil.move("photos", "moved")
    run_py.main(["--job=predict", "--workdir=run", "moved/test/red/0.png"])
    without = capsys.readouterr().out.splitlines()
    assert "data       not opened: " in without[0]
    moved = "--config.data.source.root=moved"
    run_py.main(["--job=predict", "--workdir=run", moved, "moved/test/red/0.png"])
    assert without[1:] == capsys.readouterr().out.splitlines()
    run_py.main(["--job=export", "--workdir=run"])
    assert "agreement" in capsys.readouterr().out
    integer = "--config.export.formats=('tflite_int8',)"
    with pytest.raises(UserError, match="tflite_int8 needs the run's images"):
        run_py.main(["--job=export", "--workdir=run", integer])
    with pytest.raises(UserError, match="photos"):
        run_py.main(["--job=evaluate", "--workdir=run"])
    capsys.readouterr()
    run_py.main(["--job=evaluate", "--workdir=run", moved])
    assert "data       moved in place of photos" in capsys.readouterr().out
    # It also keeps its three channels: the same grey pixels are the same inputs, in one channel or in three.
    answers = []
    for mode in "L", "RGB":
        for split in "train", "test":
            for name in "blue", "red":
                grey = tmp_path / mode / split / name
                grey.mkdir(parents=True)
                for path in (tmp_path / "moved" / split / name).iterdir():
                    Image.open(path).convert("L").convert(mode).save(grey / path.name)
        capsys.readouterr()
        place = f"--config.data.source.root={mode}"
        run_py.main(["--job=evaluate", "--workdir=run", place])
        answers.append(capsys.readouterr().out.splitlines()[-1])
    assert answers[0] == answers[1]
    run_py.main(
        ["--job=fit", "--workdir=run", "--config.steps=3", place, arguments[-1]]
    )
    grey = ["--config.data.source.root=L", "--config.data.channels=1"]
    words = "data.channels = 3 there, 1 here"
    with pytest.raises(UserError, match=words):
        run_py.main(["--job=evaluate", "--workdir=run", *grey])
    # A run on "RED" and "blue", in this order, begins with the head for "blue" and "red".
    for split in "train", "test":
        shutil.move(f"moved/{split}/red", f"moved/{split}/RED")
    source = dict(name="folder", root="moved")
    config = dict(
        data=dict(source=source, size=8, pad=0),
        optim=dict(lr=0.1),
        batch=8,
        steps=1,
        init=dict(workdir="run"),
    )
    begun = _experiment.build(_experiment.check(config))
    assert begun.data.label_names == ("RED", "blue")
    given = begun.initial_variables()["params"]["conv10"]
    trained = _pretrained.read_checkpoint("run")["params"]["conv10"]
    for name in "kernel", "bias":
        np.testing.assert_array_equal(given[name], trained[name][..., [1, 0]])


def test_a_later_phase_has_the_same_classes(tmp_path):
    """Said before the first phase trains."""
    photos(tmp_path / "first", "blue", "red")
    photos(tmp_path / "second", "aqua", "red")

    def source(name):
        return dict(name="folder", root=str(tmp_path / name))

    config = dict(
        data=dict(source=source("first"), size=8, pad=0),
        model=dict(name="squeezenet", variant="tiny", stem_strides=1),
        optim=dict(lr=0.1),
        batch=8,
        phases=(dict(steps=1), dict(steps=1, data=dict(source=source("second")))),
    )
    built = _experiment.build(_experiment.check(config))
    words = r"phase 1/2 was trained on the classes \(blue, red\).*\(aqua, red\)"
    with pytest.raises(UserError, match=words) as caught:
        _transitions.rehearse(built)
    assert "config.init" not in str(caught.value)  # there is no such work directory


OWN_NETWORK = """
import flax.linen as nn

class Network(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2))
        return nn.Dense(self.num_classes, name="last")(x), {"mean": x}

def make(num_classes: int = 10) -> Network:
    return Network(num_classes)
"""


def test_a_network_that_does_not_name_its_head_and_has_unnamed_outputs(
    tmp_path, monkeypatch, capsys
):
    """Its file has no CLASSIFIER, and its last two outputs stand for no class of the data. The order follows the names'."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN_NETWORK)
    for folder, names in (
        ("photos", ("blue", "green", "red")),
        ("renamed", ("BLUE", "RED", "green")),  # capitals come first
        ("other", ("aqua", "lime", "ruby")),
    ):
        photos(tmp_path / folder, *names)

    def config(folder, **keys):
        source = dict(name="folder", root=folder)
        config = dict(data=dict(source=source, size=8, pad=0), optim=dict(lr=0.1))
        config |= dict(model=dict(name="./own.py", num_classes=5), batch=8, steps=1)
        return config | keys

    trained = config("photos", data=dict(config("photos")["data"], mean=0.4, std=0.3))
    arguments = [f"--config.{key}={value!r}" for key, value in trained.items()]
    run_py.main(["--job=fit", "--workdir=run", *arguments])
    head = _pretrained.read_checkpoint("run")["params"]["last"]
    order = [0, 2, 1, 3, 4]

    def build_from_run(folder, **keys):
        section = dict(config(folder)["data"], mean=0.4, std=0.3)
        settings = config(folder, **keys) | dict(data=section)
        return _experiment.build(_experiment.check(settings))

    capsys.readouterr()
    begun = build_from_run("renamed", init=dict(workdir="run")).initial_variables()
    assert "is put into the order of the data" in capsys.readouterr().out
    for name in "kernel", "bias":
        np.testing.assert_array_equal(
            begun["params"]["last"][name], head[name][..., order]
        )
    distill = dict(teachers=(dict(workdir="run"),))
    soft = dict(distill=distill, objective=dict(name="distill.soft_logits"))
    (teacher,) = build_from_run("renamed", **soft).teachers
    (same,) = build_from_run("photos", **soft).teachers
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    permuted, plain = (
        forward.run(t.network, t.read_variables(None), images)[0][0]
        for t in (teacher, same)
    )
    np.testing.assert_allclose(permuted, plain[:, order], atol=1e-6)
    words = r"run was trained on the classes \(blue, green, red\), config.data has"
    for keys in soft, dict(init=dict(workdir="run")):
        with pytest.raises(UserError, match=words):
            build_from_run("other", **keys).initial_variables()
    # Outputs without a name get one in exported files, as in predictions.
    small = ("--config.export.formats=('stablehlo',)", "--config.export.check=8")
    run_py.main(["--job=export", "--workdir=run", *small])
    named = ("blue", "green", "red", "class 3", "class 4")
    assert load("run/export/model.stablehlo").classes == named
    # A mean that is one number is said as the config has it.
    words = r"trained with config.data.mean = 0.4, and a teacher"
    with pytest.raises(UserError, match=words):
        _experiment.build(_experiment.check(config("photos", **soft)))


def test_equal_ids_stay_equal_tokens(tmp_path, monkeypatch, place):
    """A vocabulary of characters is sorted by frequency: more text gives the same weights other characters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("aab abc cab " * 40)
    data = dict(name="contiguous", train="text", eval="text", length=8)
    config = dict(
        data=data | dict(level="characters"),
        model=dict(name="lstm", variant="tiny"),
        optim=dict(lr=0.1),
        batch=2,
        steps=1,
    )
    arguments = [f"--config.{key}={value!r}" for key, value in config.items()]
    run_py.main(["--job=fit", "--workdir=run", *arguments])
    (tmp_path / "text").write_text("aab abc cab " * 40 + "cc" * 100)
    words = (
        r"run was trained with a vocabulary .* other ids than in config\.data\.train"
    )
    for job, inputs in (("evaluate", ()), ("predict", ("aab",)), ("fit", ())):
        with pytest.raises(UserError, match=words):
            run_py.main([f"--job={job}", "--workdir=run", *inputs])
    begun = config | dict(init=dict(workdir="run"))
    with pytest.raises(UserError, match=words + ".*by config.init.only"):
        _experiment.build(_experiment.check(begun))
    only = dict(workdir="run", only="^lstm")
    _experiment.build(_experiment.check(begun | dict(init=only)))
    (tmp_path / "text").write_text("aab abc cab " * 40)
    run_py.main(["--job=evaluate", "--workdir=run"])
    # A file of words, whose last two change their places.
    for name, words in (("a", WORDS), ("b", (*WORDS[:-2], WORDS[-1], WORDS[-2]))):
        (tmp_path / name).with_suffix(".txt").write_text("\n".join(words) + "\n")
    glue = dict(name="glue", task="sst2", folder=str(place / "glue"), length=12)
    model = dict(name="bert", variant="toy", vocabulary=9)
    trained = build(place, model=model, data=glue | dict(tokenizer="a.txt"))
    variables = dict(params=forward.parameters(trained.create().params))
    _plain.write("bert", trained.whole.config(), trained.options, variables)
    distill = dict(teachers=(dict(workdir="bert"),))
    soft = dict(distill=distill, objective=dict(name="distill.soft_logits"))
    build(place, model=model, data=glue | dict(tokenizer="a.txt"), **soft)
    words = r"bert was .* ids than in config\.data\.tokenizer: .*of the same tokenizer"
    with pytest.raises(UserError, match=words):
        build(place, model=model, data=glue | dict(tokenizer="b.txt"), **soft)
