"""What stands beside a tokenizer.json counts as it does for transformers: the same ids for every option."""

import json
import shutil

import pytest

from squeeze_jax.data import tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cafe", "café", "##s", "un", "##able", "北", "京", "北京", "a", "B", "b", "!", "##B", "<x>", "x"]  # fmt: skip
TEXTS = (
    "The Cafés",
    "THE café unable",
    "北京 a",
    "a <x> B!",
    "The cafe\u0301",
    "[MASK] a x",
    "  a  b ",
)
OPTIONS = (
    {},
    {"do_lower_case": False},
    {"do_lower_case": True},
    {"strip_accents": False},
    {"strip_accents": True, "do_lower_case": False},
    {"tokenize_chinese_chars": False},
    {"do_basic_tokenize": False},
    {"never_split": ["<x>"]},
    {"unk_token": "a"},
    {"cls_token": "B"},
    {"sep_token": "!", "pad_token": "x"},
    {"model_max_length": 4},
    {"model_specific_special_tokens": {"image_token": "<x>"}},
    {"clean_up_tokenization_spaces": False},
    {"wordpieces_prefix": "@@"},
    {"tokenizer_class": "TokenizersBackend", "do_lower_case": False, "unk_token": "a"},
)
LETTERS = [*"ab<>x", "Ġ", "Ġa", "ab", "<|endoftext|>", "<s>", "</s>", "<unk>", "<pad>", "<mask>"]  # fmt: skip


def ids(tokenizer, text):
    return tokenizer.single(tokenizer.encode_many([text])[0], 99)[0].tolist()


def changed(folder, copy, options):
    """A copy of a tokenizer's folder with other options."""
    shutil.copytree(folder, copy)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return copy


@pytest.fixture(scope="module")
def bert(transformers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "base"
    vocabulary = {word: n for n, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_wordpieces(bert, transformers, tmp_path, options):
    folder = changed(bert, tmp_path / "copy", options)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokens.load(folder)
    for text in TEXTS:
        assert ids(ours, text) == theirs(text)["input_ids"], text


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("ends", [(True, False), (False, True), (True, True)])
def test_tokens_around_gpt2_texts(transformers, tmp_path, ends, files):
    vocabulary = {t: n for n, t in enumerate(LETTERS) if t not in ("<s>", "</s>")}
    made = transformers.GPT2Tokenizer(vocab=vocabulary, merges=[("Ġ", "a")])
    made.save_pretrained(tmp_path / "base")
    options = dict(zip(("add_bos_token", "add_eos_token"), ends, strict=True))
    folder = changed(tmp_path / "base", tmp_path / "copy", options)
    if files == "vocab.json":
        made.backend_tokenizer.model.save(str(folder))
        (folder / "tokenizer.json").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokens.load(folder)
    assert ids(ours, "ab a") == theirs("ab a")["input_ids"]
    pair = ours.pair(*ours.encode_many(["ab a", "b"]), 99)[0].tolist()
    assert pair == theirs("ab a", "b")["input_ids"]


MASK = str(LETTERS.index("<mask>"))
STRIPPED = dict(content="<mask>", lstrip=True, rstrip=False, normalized=False)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask_token": "<mask>"},
        {"mask_token": STRIPPED | {"__type": "AddedToken"}},
        {"added_tokens_decoder": {MASK: STRIPPED | {"special": True}}},
    ],
    ids=lambda options: " ".join(options),
)
def test_the_space_before_a_masked_word(transformers, tmp_path, options, stored):
    vocabulary = {token: n for n, token in enumerate(LETTERS)}
    made = transformers.RobertaTokenizer(
        vocab=vocabulary,
        merges=[("Ġ", "a")],
        mask_token=transformers.AddedToken("<mask>", lstrip=stored),
    )
    made.save_pretrained(tmp_path / "base")
    folder = changed(tmp_path / "base", tmp_path / "copy", options)
    if not options:
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ids(tokens.load(folder), "a <mask> a") == theirs("a <mask> a")["input_ids"]


@pytest.mark.parametrize("options", [{}, {"mask_token": "<mask>"}], ids=str)
def test_the_mask_of_a_vocabulary_alone(transformers, tmp_path, caplog, options):
    """It takes the space, as in the published tokenizer.json; AutoTokenizer 5.23 does so only for a token with this flag."""
    vocabulary = {token: n for n, token in enumerate(LETTERS)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\n")
    config = {"tokenizer_class": "RobertaTokenizer"} | options
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    stripped = transformers.AddedToken("<mask>", lstrip=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, mask_token=stripped)
    ours = tokens.load(tmp_path)
    assert ids(ours, "a <mask> a") == theirs("a <mask> a")["input_ids"]
    assert "<mask> takes the space before it, as in RoBERTa's published" in caplog.text


def test_a_guess_of_the_case_is_said(bert, tmp_path, caplog):
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    ours = tokens.load(folder)
    assert ids(ours, "The") == [2, WORDS.index("The"), 3]
    assert "text keeps its capital letters" in caplog.text
