"""Every kind of folder of transformers is read, and what is wrong with one is said."""

import json
import os

import jax
import numpy as np
import pytest
import torch

from squeeze_jax import models, registry, tree
from squeeze_jax.errors import UserError
from squeeze_jax.weights import huggingface, weight_files

MODELS = "squeeze_jax.models"
FAMILIES = [
    name
    for name in registry.names(MODELS)
    if hasattr(registry.load(MODELS, name), "HUGGINGFACE")
]

pytestmark = pytest.mark.usefixtures("transformers")


def made(name, *, layers=1, **options):
    """(a small net, variables of noise)."""
    net = models.make(name, variant="toy", layers=layers, **options)
    rng = np.random.default_rng(0)
    tokens = np.zeros((1, 1, 1) if net.task == "choice" else (1, 1), np.int32)
    like = jax.eval_shape(net.init, jax.random.key(0), {"tokens": tokens})

    def noise(a):
        return rng.normal(0, 0.3, a.shape).astype(np.float32)

    return net, tree.map_named(lambda k, a: noise(a) + k.endswith("scale"), like)


def opened(transformers, folder, cls):
    """The network that `transformers` makes of a folder, to which nothing may be missing or left."""
    net, told = getattr(transformers, cls).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told.values()), told
    return net.eval()


def same(found, expected):
    assert tree.differences(expected, found) == []
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def folder(tmp_path):
    """(a folder of a BERT for masked words and next sentences, its variables)."""
    net, variables = made("bert", task="pretraining")
    models.save(tmp_path, net, variables)
    return tmp_path, variables


def rewrite(folder, change=lambda arrays: None, **config):
    """Changes a folder's arrays and config.json."""
    path = folder / "model.safetensors"
    arrays = weight_files.read(path)
    change(arrays)
    weight_files.write_safetensors(path, arrays)
    old = huggingface.read_config(folder)
    (folder / "config.json").write_text(json.dumps(old | config))


def test_files_of_older_kinds_are_read(folder):
    path, variables = folder
    arrays = weight_files.read(path / "model.safetensors")
    state = {
        # As the first BERTs call them.
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): torch.tensor(a)
        for k, a in arrays.items()
    }
    assert any(k.endswith("gamma") for k in state)
    word = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.weight"] = word
    state["cls.predictions.decoder.bias"] = state.pop("cls.predictions.bias")
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    same(models.load(path)[1], variables)


def test_files_in_parts_are_read(folder, transformers):
    path, variables = folder
    net = opened(transformers, path, "BertForPreTraining")
    net.save_pretrained(path / "parts", max_shard_size="20KB")
    assert len(list((path / "parts").glob("*.safetensors"))) > 1
    same(models.load(path / "parts")[1], variables)
    index = path / "parts" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    some = sorted(content["weight_map"])
    content["weight_map"]["extra"] = content["weight_map"][some[0]]
    index.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"lacks extra, which model\.safetensors\.index"
    ):
        models.load(path / "parts")
    content["weight_map"] = dict.fromkeys(some, "../model.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="should map tensors to files beside it"):
        models.load(path / "parts")


class Bomb:
    """What a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_no_code_in_a_folder_is_run(folder, monkeypatch):
    path, _ = folder
    monkeypatch.chdir(path)
    (path / "model.safetensors").unlink()
    torch.save({"bert.pooler.dense.weight": Bomb()}, path / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin holds a pickled \w+\.mkdir"
    ) as error:
        models.load(path)
    assert "\n" not in str(error.value)
    assert not (path / "exploded").exists()


def test_a_head_that_is_not_there_is_made_where_asked_for(folder):
    path, variables = folder
    message = "no weights for head/classifier of task 'classification'.*give fresh="
    with pytest.raises(UserError, match=message):
        models.load(path, task="classification", num_classes=3)
    key = jax.random.key(0)
    net, found = models.load(path, task="classification", num_classes=3, fresh=key)
    kernel = found["params"]["head"]["classifier"]["kernel"]
    assert (net.num_classes, kernel.shape) == (3, (32, 3))
    assert 0 < np.abs(kernel).max() <= 0.04
    shared = {k: v for k, v in variables["params"].items() if k != "head"}
    same({k: found["params"][k] for k in shared}, shared)
    # Also where the folder's is of other classes; one that fits is kept.
    models.save(path, net, found)
    with pytest.raises(UserError, match="no weights for head/classifier"):
        models.load(path, num_classes=5)
    _, other = models.load(path, num_classes=5, fresh=key)
    assert other["params"]["head"]["classifier"]["kernel"].shape == (32, 5)
    same(models.load(path, fresh=jax.random.key(1))[1], found)


def test_a_pooler_that_is_not_there_may_be_left_out(tmp_path):
    net, variables = made("bert", task="masked_lm")
    models.save(tmp_path, net, variables)
    message = "no weights for pooler/dense of task 'features'.* by pooler=False, "
    with pytest.raises(UserError, match=message):
        models.load(tmp_path, task="features")
    _, found = models.load(tmp_path, task="features", pooler=False)
    expected = {k: v for k, v in variables["params"].items() if k != "head"}
    same(found, {"params": expected})


def test_other_heads_are_passed_over(folder):
    path, variables = folder
    _, found = models.load(path, task="masked_lm")
    expected = {k: v for k, v in variables["params"].items() if k != "pooler"}
    head = {"masked_lm": expected["head"]["masked_lm"]}
    same(found, {"params": expected | {"head": head}})
    net, _ = models.load(path, task="features", dropout=0.0)
    assert (net.settings.dropout, net.pooler) == (0.0, True)


def test_what_tinybert_keeps_of_its_training_is_passed_over(folder):
    path, variables = folder
    for name in ("fit_dense.weight", "fit_denses.0.weight"):
        extra = {name: np.zeros((64, 32), np.float32)}
        rewrite(path, lambda arrays, extra=extra: arrays.update(extra))
    same(models.load(path)[1], variables)


@pytest.fixture
def gpt2(tmp_path):
    """(a folder of a GPT-2, its variables)."""
    net, variables = made("gpt2", task="causal_lm")
    models.save(tmp_path, net, variables)
    return tmp_path, variables


def test_the_masks_in_older_gpt2s_are_passed_over(gpt2):
    path, variables = gpt2

    def change(arrays):
        arrays["transformer.h.0.attn.bias"] = np.tri(40, dtype=np.float32)[None, None]
        arrays["transformer.h.0.attn.masked_bias"] = np.float32(-1e4)
        # The oldest have no prefix.
        for name in list(arrays):
            arrays[name.removeprefix("transformer.")] = arrays.pop(name)

    rewrite(path, change)
    same(models.load(path)[1], variables)


def test_a_gpt2_that_computes_something_else_is_named(gpt2):
    path, _ = gpt2
    for key, value in (
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
    ):
        rewrite(path, **{key: value})
        with pytest.raises(UserError, match=f"{key} = {value} is not supported"):
            models.load(path)
        rewrite(path, **{key: not value})

    def change(arrays):
        arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + 1
        name = "transformer.h.0.attn.c_attn.weight"
        arrays[name] = arrays[name][:, :95]

    rewrite(path, change)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from wte\.weight"):
        models.load(path)
    with pytest.raises(UserError, match=r"needs h\.0\.attn\.c_attn\.query.*") as error:
        models.load(path, task="features")
    assert "\n" not in str(error.value)


def test_a_head_whose_name_is_in_another_heads_is_not_that(tmp_path):
    # The classifier of sequences is classifier.dense and classifier.out_proj, that of tokens is classifier.
    message = "no weights for head/classifier.* of task"
    key = jax.random.key(0)
    for task, other in (("classification", "tokens"), ("tokens", "classification")):
        net, variables = made("roberta", task=task)
        models.save(tmp_path, net, variables)
        with pytest.raises(UserError, match=message):
            models.load(tmp_path, task=other)
        found = models.load(tmp_path, task=other, fresh=key)[1]["params"]
        expected = dict(variables["params"], head=found["head"])
        same(found, expected)


def test_tensors_that_do_not_fit_are_named(folder):
    path, _ = folder

    def change(arrays):
        arrays["bert.encoder.layer.1.output.dense.bias"] = np.zeros(3, np.float32)
        del arrays["bert.embeddings.LayerNorm.bias"]
        name = "bert.encoder.layer.0.output.dense.weight"
        arrays[name] = arrays[name][:, :5]

    rewrite(path, change)
    with pytest.raises(UserError) as error:
        models.load(path)
    assert str(error.value) == (
        f"{path}: weights do not fit (1 missing, 1 of another shape, 1 left over): "
        "embeddings/norm/bias (32,) needs embeddings.LayerNorm.*; "
        "layer1/ffn_out/kernel should be (1, 64, 32), encoder.layer.0.output.dense.weight is (1, 5, 32); "
        "encoder.layer.1.output.dense.bias (3,) has no place; make the network with the options that the weights belong to, such as"
        " variant (one of large, base, medium, small, mini, tiny, tinybert4, tinybert6, toy); python run.py --list=model.bert lists them"
    )


def test_an_output_that_is_not_tied_is_an_error(folder):
    path, variables = folder
    pooler = variables["params"]["pooler"]

    def change(arrays):
        word = arrays["bert.embeddings.word_embeddings.weight"]
        arrays["cls.predictions.decoder.weight"] = word + 1

    rewrite(path, change)
    with pytest.raises(UserError, match=r"decoder\.weight differs from embeddings\.wo"):
        models.load(path)
    # Other heads have nothing to do with it.
    same(models.load(path, task="next_sentence")[1]["params"]["pooler"], pooler)


def test_a_head_has_no_tensors_that_ours_has_not(folder):
    path, _ = folder
    extra = {"cls.predictions.transform.gate.weight": np.ones(3, np.float32)}
    rewrite(path, lambda arrays: arrays.update(extra))
    with pytest.raises(UserError, match=r"cls.*gate\.weight \(3,\) has no place"):
        models.load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "brt"}, "unknown model_type 'brt'; did you mean 'bert'"),
        ({"model_type": None}, "no model_type; choose from albert, bert, "),
        ({"architectures": {"a": 1}}, r"names {'a': 1}: give a task"),
        ({"id2label": 3}, "id2label = 3 should map numbers of classes to names"),
        ({"hidden_act": ["gelu"]}, r"unknown hidden_act \['gelu'\]"),
        (
            {"architectures": ["BertLMHeadModel"]},
            r"names \['BertLMHeadModel'\]: give a",
        ),
        ({"hidden_act": "gelo"}, r"unknown hidden_act 'gelo'; did you mean 'gelu'"),
        ({"is_decoder": True}, "is_decoder = True is not supported, only False"),
        (
            {"position_embedding_type": "relative_key"},
            "'relative_key' is not supported, only 'absolute'",
        ),
        ({"hidden_size": "32"}, r"options\.features = '32' \(str\) should be int"),
        ({"num_attention_heads": 5}, "features = 32 do not divide into heads = 5"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(folder, config, message):
    path, _ = folder
    rewrite(path, **config)
    with pytest.raises(UserError, match=message) as error:
        models.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("albert", {"inner_group_num": 2}, "inner_group_num = 2 is not supported"),
        ("albert", {"num_hidden_groups": 3}, "distinct = 3: should be from 1 to .* 1"),
        ("electra", {"summary_type": "mean"}, "'mean' is not supported, only 'first'"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id = 0 is not supported, only 1"),
        (
            "roberta",
            {"max_position_embeddings": "514"},
            r"options\.positions = '514' \(str\) should be int",
        ),
        ("gpt2", {"n_embd": [32], "n_inner": None}, r"options\.features = \[32\]"),
        ("squeezebert", {"q_groups": "4"}, "groups of query = '4': should be a posi"),
    ],
)
def test_what_an_architecture_has_not_is_named(tmp_path, name, config, message):
    models.save(tmp_path, *made(name, task="features"))
    rewrite(tmp_path, **config)
    with pytest.raises(UserError, match=message) as error:
        models.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_config_does_not_say_is_as_in_transformers(transformers, name):
    module = registry.load(MODELS, name)
    said = transformers.AutoConfig.for_model(name).to_dict()
    nets = [module.make(**module.from_huggingface(config)) for config in ({}, said)]
    assert nets[0] == nets[1]


def test_what_is_wrong_with_a_folder_is_named(folder):
    path, _ = folder
    with pytest.raises(UserError, match=r"nowhere is not a folder with a config\.json"):
        models.load(path / "nowhere")
    with pytest.raises(UserError, match=r"unknown key options\.droput.*'dropout'"):
        models.load(path, droput=0.0)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights: it should have model\.safet"):
        models.load(path)
    for content in ("{", "[]"):
        (path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json (is no|should hold a) JSON"):
            models.load(path)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        models.load(path)
