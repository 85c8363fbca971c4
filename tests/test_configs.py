"""Every config is whole and trains: two steps of its own network, made small where it is large, on a few of its own kind of examples."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import run as run_py
from squeeze_jax import models
from squeeze_jax.data import glue
from squeeze_jax.jobs import _experiment, _settings, fit
from squeeze_jax.train import log

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
WORDS = ("the", "film", "is", "fine", "and", "plot", "was", "not")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
SMALL = dict(layers=2, features=32, heads=2, ffn_features=32, positions=64)
SMALL |= dict(vocabulary=len(VOCABULARY))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten classes of noise, as a folder source of any size and channels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in ("train", 2), ("test", 1):
        for label in range(10):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """Noise with a map of CamVid's labels for each image."""
    root = tmp_path_factory.mktemp("targets")
    rng = np.random.default_rng(0)
    for split in "train", "test":
        for folder in split, f"{split}annot":
            (root / folder).mkdir()
        for i in range(8):
            pixels = rng.integers(0, 256, (32, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            labels = rng.integers(0, 12, (32, 40)).astype(np.uint8)
            Image.fromarray(labels).save(root / f"{split}annot" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """GLUE's files, questions, a text, a vocabulary, and encoders as transformers saves them."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)

    def sentence():
        return " ".join(rng.choice(WORDS, 6))

    (root / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    for name, columns, labels, splits in (
        ("SST-2", ("sentence",), ("0", "1"), ("train", "dev")),
        (
            "RTE",
            ("sentence1", "sentence2"),
            ("entailment", "not_entailment"),
            ("train", "dev"),
        ),
        (
            "MNLI",
            ("sentence1", "sentence2"),
            glue.TASKS["mnli"].names,
            ("train", "dev_matched"),
        ),
    ):
        (root / "glue" / name).mkdir(parents=True)
        for split in splits:
            label = "gold_label" if name == "MNLI" else "label"
            lines = ["\t".join(("index", *columns, label))]
            for number in range(16):
                row = (str(number), *(sentence() for _ in columns))
                lines.append("\t".join((*row, labels[number % len(labels)])))
            (root / "glue" / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    rows = "".join(f"{sentence()} {n},{n % 2}\n" for n in range(40))
    (root / "texts.csv").write_text("text,label\n" + rows)
    document = [sentence() + " ." for _ in range(40)]
    (root / "text.txt").write_text(
        "\n".join(document) + "\n\n" + "\n".join(document) + "\n"
    )
    answers = [{"text": WORDS[1], "answer_start": 4}]
    paragraph = {
        "context": f"the film {sentence()}",
        "qas": [
            {"id": str(n), "question": sentence(), "answers": answers} for n in range(9)
        ],
    }
    squad = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    (root / "squad.json").write_text(json.dumps(squad))
    for name, classes in ("squeezebert", 2), ("bert", 2), ("bert", 3):
        net = models.make(name=name, variant="toy", num_classes=classes, **SMALL)
        one = {"tokens": jnp.zeros((1, 4), jnp.int32)}
        variables = jax.jit(net.init)(jax.random.key(0), one)
        models.save(root / f"{name}{classes}", net, jax.device_get(variables))
    return root


def of_text(config, root):
    """A config of text with the small files, and a network that is small where it is no folder's."""
    if config["data"]["name"] == "contiguous":
        config["data"] |= dict.fromkeys(("train", "eval"), str(root / "text.txt"))
        config["data"]["length"] = 8
        config["model"]["variant"] = "tiny"
        return config
    config["data"]["tokenizer"] = str(root / "vocab.txt")
    config["data"]["length"] = 32
    config["data"].pop("buckets", None)
    match config["data"]["name"]:
        case "glue":
            config["data"]["folder"] = str(root / "glue")
        case "texts":
            config["data"] |= dict(train=str(root / "texts.csv"), holdout=0.3)
        case "squad":
            for split in "train", "eval":
                config["data"][split] = str(root / "squad.json")
            config["data"] |= dict(stride=8, max_question=8)
        case "pretraining":
            config["data"]["files"] = str(root / "text.txt")
            config["data"]["eval"] = str(root / "text.txt")
    init = config.get("init", {})
    if init:
        of_bert = "only" in init or "bert-base" in str(init)
        begins = "bert2" if of_bert else "squeezebert2"
        config["init"] = init | dict(folder=str(root / begins))
        config["init"].pop("workdir", None)
    if config.get("model", {}).get("name", "").startswith("elastic"):
        config["model"] |= dict(variant="tiny", vocabulary=len(VOCABULARY))
    elif not init or "only" in init:
        config["model"] |= SMALL
    if config.get("distill"):
        classes = 3 if config["data"].get("task") == "mnli" else 2
        config["distill"] = dict(teachers=(dict(folder=str(root / f"bert{classes}")),))
    return config


# Configs that another file trains to the end, with kills between.
ELSEWHERE = {
    "camvid_fcn": "test_run_camvid",
    "digits_group_lasso": "test_run_methods",
    "digits_int8_exchange": "test_run_methods",
    "digits_pruned": "test_run_methods",
    "digits_qat": "test_run_methods",
    "digits_shrunk": "test_run_phases",
    "digits_slimmable": "test_run_methods",
    "ofa_digits": "test_run_phases",
    "ofa_progressive_cifar10": "test_once_for_all",
}
HERE = [path for path in CONFIGS if path.stem not in ELSEWHERE]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_is_trained_elsewhere(name):
    content = pathlib.Path(__file__).with_name(f"{ELSEWHERE[name]}.py").read_text()
    assert f'config_of("{name}")' in content or f"configs/{name}.py" in content


@pytest.mark.parametrize("path", HERE, ids=lambda p: p.stem)
def test_trains_two_steps(path, images, targets, texts, tmp_path):
    config = _settings.with_tuples(run_py.load_config(path))
    if config["data"].get("name") == "segmentation":
        config["data"]["source"]["path"] = str(targets)
        config["data"]["size"] = (32, 40)
    elif config["data"].get("name", "images") != "images":
        config = of_text(config, texts)
    else:
        if config["data"]["source"]["name"] != "digits":
            config["data"]["source"] = {"name": "folder", "root": str(images)}
        if (
            "strides" in config["model"]
        ):  # one for each stage: the tiny variant has fewer
            own = _experiment.build(_experiment.check(config))
            assert len(own.abstract().params) > 1
            del config["model"]["strides"]
        config["model"]["variant"] = "tiny"
    phases = tuple(phase | dict(steps=1) for phase in config.get("phases", ()))
    for phase in phases:  # fewer pieces to compile
        if phase.get("gradients", {}).get("name") == "nas.once_for_all":
            phase["gradients"]["random"] = 0
    length = dict(phases=phases) if phases else dict(steps=2)
    config |= length | dict(batch=8, accumulate=1, log_every=1, eval_every=0)
    config["optim"] |= dict(warmup=0, lr=1e-3)
    built = _experiment.build(_experiment.check(config))
    fit.run(built, tmp_path)
    records = log.read(tmp_path / "metrics.jsonl")
    # A phase ends with an evaluation.
    assert [r["step"] for r in records] == ([1, 1, 2, 2] if phases else [1, 2, 2])
    trained = [r for r in records if "loss" in r]
    assert len(trained) == 2
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in trained)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_says_how_to_run_it(path):
    """The docstring is the lab notebook: it has the command."""
    notes = load(path).__doc__
    assert "python run.py" in notes
    assert path.stem == "digits" or f"--config=configs/{path.name}" in notes
