"""Folders of tokenizers, with every file and option that changes token ids, give the ids of `transformers`."""

import json
from base64 import b64encode

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from squeeze_jax.data import token_classes, tokens
from squeeze_jax.errors import UserError

TEXTS = (
    "The Cafés unable <y>",
    "北京 a <z>東京 <new>",
    " a <x>, B![MASK]<mask> b<pad> <img> <s>",
    "Größe  naïve Ångström\tcafe\u0301 größe",
    "привет, мир! مرحبا a",
    "नमस्ते ``the'' İstanbul <NEW> <|endoftext|>",
    "",
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cafe", "café", "##s", "un", "##able", "北", "京", "北京", "東", "a", "B", "b", "!", ",", "<x>", "x", "<", ">", "##x", "gro", "##ß", "##e", "naive", "мир", "привет", "नमस", "`", "'", "<s>", "</s>", "مرحبا", "is", "##tan", "##bul"]  # fmt: skip
PIECES = [(piece, -float(n)) for n, piece in enumerate(("▁", "▁a", "▁the", "▁The", "a", "e", "ß", "▁gro", "ö", "o", "é", "e\u0301", "▁мир", "京", "北", '"', "!", "<", ">", "x", "s"))]  # fmt: skip
LETTERS = sorted(ByteLevel.alphabet())
MERGES = [("Ġ", "a"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "Ł")]
JSON, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"


def byte_level(*special):
    return {t: n for n, t in enumerate([*special, *LETTERS, *map("".join, MERGES)])}


def unigram(*special):
    return [*((token, 0.0) for token in special), *PIECES]


ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
VOCABULARIES = {
    "BertTokenizer": {"vocab": {word: n for n, word in enumerate(WORDS)}},
    "RobertaTokenizer": {"vocab": byte_level(*ROBERTA), "merges": MERGES},
    "GPT2Tokenizer": {
        "vocab": byte_level("<|endoftext|>", "<s>", "</s>"),
        "merges": MERGES,
    },
    "AlbertTokenizer": {"vocab": unigram("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")},
    "XLMRobertaTokenizer": {"vocab": unigram(*ROBERTA)},
}
SLOW = ("BertTokenizer", "RobertaTokenizer", "GPT2Tokenizer")


@pytest.fixture(scope="module")
def bases(transformers, tmp_path_factory):
    """{class: the contents of the files that it saves, with its vocabulary in other formats}."""
    contents = {}
    for name, vocabulary in VOCABULARIES.items():
        folder = tmp_path_factory.mktemp("bases") / name
        made = getattr(transformers, name)(**vocabulary)
        made.save_pretrained(folder)
        if name in SLOW:
            made.backend_tokenizer.model.save(str(folder))
        contents[name] = {p.name: p.read_text("utf-8") for p in folder.iterdir()}
    return contents


def write(folder, base, changes, stored):
    """A folder with the files of a base and changes to them; without its tokenizer.json unless `stored`."""
    folder.mkdir()
    files = dict(base)
    if not stored:
        files.pop(JSON)
    for name, change in changes.items():
        if name in (CONFIG, JSON):
            if name == JSON and not stored:
                continue
            content = json.loads(files[name]) | change
            removed = [key for key, value in content.items() if value is REMOVED]
            change = {k: v for k, v in content.items() if k not in removed}
        files[name] = json.dumps(change)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


REMOVED = object()


def same(transformers, folder, length=99):
    """Compares all ids and segments of a folder's tokenizer with those of `transformers`."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokens.load(folder)
    assert ours.size == len(theirs)
    options = dict(truncation=True, max_length=length, return_token_type_ids=True)
    ids = ours.encode_many(TEXTS)
    for n, text in enumerate(TEXTS):
        want = theirs(text, **options)
        got = [array.tolist() for array in ours.single(ids[n], length)]
        assert got == [want["input_ids"], want["token_type_ids"]], text
        second = (n + 1) % (len(TEXTS) - 1)  # transformers takes an empty one for none
        want = theirs(text, TEXTS[second], **options)
        got = [array.tolist() for array in ours.pair(ids[n], ids[second], length)]
        assert got == [want["input_ids"], want["token_type_ids"]], text
    for role in ("pad", "cls", "sep", "mask"):
        id = getattr(theirs, f"{role}_token_id")
        assert getattr(ours, role) == id or id is None
    return ours


def token(content, **flags):
    flags = (
        dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | flags
    )
    return {"__type": "AddedToken", "content": content} | flags


def plain(content, **flags):
    return {k: v for k, v in token(content, **flags).items() if k != "__type"}


NUMBERED = {"901": plain("<y>", special=True), "900": plain("<z>", normalized=True)}
ADDED_TOKENS = {"<z>": 901, "<y>": 900, "größe": 902}
CHANGES = {
    "nothing": {},
    "added tokens": {ADDED: ADDED_TOKENS},
    "special added tokens": {
        ADDED: ADDED_TOKENS,
        SPECIAL: {"additional_special_tokens": ["<z>"], "mask_token": plain("<y>", lstrip=True)},
    },
    "numbered tokens": {CONFIG: {"added_tokens_decoder": NUMBERED}},
    "numbered tokens count alone": {
        CONFIG: {"added_tokens_decoder": NUMBERED, "mask_token": "<y>"},
        ADDED: {"<new>": 905},
        SPECIAL: {"pad_token": "<img>", "mask_token": "<z>"},
    },
    "the map counts before the configuration": {
        CONFIG: {"mask_token": "<y>", "pad_token": "<z>", "add_prefix_space": True},
        SPECIAL: {"mask_token": "<z>", "pad_token": None, "add_prefix_space": False},
    },
    "new special tokens": {
        CONFIG: {"pad_token": "<new>", "bos_token": "<y>", "eos_token": token("<z>", lstrip=True)},
    },
    "new tokens around texts": {
        CONFIG: {"cls_token": "<new>", "sep_token": "<y>", "bos_token": "<new>", "eos_token": "<y>"},
    },
    "cls alone": {CONFIG: {"cls_token": "<s>"}},
    "sep alone": {CONFIG: {"sep_token": "</s>"}},
    "further tokens by both names": {
        CONFIG: {"additional_special_tokens": ["<y>"], "extra_special_tokens": ["<z>", token("<new>", rstrip=True)]},
    },
    "further tokens": {CONFIG: {"additional_special_tokens": ["<y>", token("<new>", rstrip=True)]}},
    "further tokens of the map": {
        CONFIG: {"extra_special_tokens": ["<new>"]},
        SPECIAL: {"extra_special_tokens": ["<y>", plain("<z>", lstrip=True)]},
    },
    "tokens with names": {
        CONFIG: {"image_token": "<img>", "extra_special_tokens": {"video_token": "<y>"}},
        SPECIAL: {"audio_token": "<z>"},
    },
    "flags": {
        CONFIG: {
            "mask_token": token("<y>", lstrip=True, rstrip=True),
            "pad_token": token("<pad>", single_word=True),
            "additional_special_tokens": [token("GRÖSSE", normalized=True), token("größe", normalized=True)],
        },
    },
    "special tokens as text": {CONFIG: {"split_special_tokens": True}},
    "a space before texts": {CONFIG: {"add_prefix_space": True}},
    "no space before texts": {CONFIG: {"add_prefix_space": False}},
    "letters": {CONFIG: {"do_lower_case": False, "keep_accents": True, "strip_accents": False}},
    "words": {
        CONFIG: {"tokenize_chinese_chars": False, "never_split": ["<new>"], "do_basic_tokenize": False},
    },
    "tokens around texts": {CONFIG: {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}},
    "no template": {
        CONFIG: {"add_bos_token": True, "add_eos_token": True},
        JSON: {"post_processor": None},
    },
    "a type of model": {
        CONFIG: {"tokenizer_class": REMOVED},
        "config.json": {"model_type": ...},
    },
    "a class in config.json": {
        CONFIG: {"tokenizer_class": REMOVED},
        "config.json": {"tokenizer_class": ...},
    },
    "the file as it is": {CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False, "mask_token": "<y>"}},
    "the file as it is, with other flags": {
        CONFIG: {"tokenizer_class": "TokenizersBackend", "added_tokens_decoder": {"4": plain("[MASK]", lstrip=True)}, "mask_token": "[MASK]"},
    },
    "padding": {
        CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": REMOVED},
        JSON: {"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0, "pad_token": "<new>"}},
    },
}  # fmt: skip
MODEL_TYPES = {
    "BertTokenizer": "distilbert",
    "RobertaTokenizer": "roberta",
    "GPT2Tokenizer": "gpt2",
    "AlbertTokenizer": "albert",
    "XLMRobertaTokenizer": "xlm-roberta",
}


# Only three of the classes read other files than a tokenizer.json. transformers crashes if ALBERT's vocabulary lacks its ends.
CRASHES = ("new tokens around texts", "cls alone", "sep alone")
CASES = [
    (change, name, stored)
    for change, files in CHANGES.items()
    for name in VOCABULARIES
    for stored in (True, False)
    if (stored and (name != "AlbertTokenizer" or change not in CRASHES))
    or (
        name in SLOW
        and not stored
        and JSON not in files
        and files.get(CONFIG, {}).get("tokenizer_class", REMOVED) is REMOVED
    )
]


@pytest.mark.parametrize(("change", "name", "stored"), CASES)
def test_folders(transformers, bases, tmp_path, change, name, stored):
    changes = dict(CHANGES[change])
    if "config.json" in changes:
        (key,) = changes["config.json"]
        value = MODEL_TYPES[name] if key == "model_type" else f"{name}Fast"
        changes["config.json"] = {key: value}
    same(transformers, write(tmp_path / "t", bases[name], changes, stored))


@pytest.mark.parametrize("change", ["flags", "the file as it is"])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_saved_again(transformers, bases, tmp_path, name, change):
    ours = tokens.load(write(tmp_path / "t", bases[name], CHANGES[change], True))
    tokens.save(ours, tmp_path / "saved")
    again = same(transformers, tmp_path / "saved")
    for one, other in zip(*(t.encode_many(TEXTS) for t in (ours, again)), strict=True):
        assert one.tolist() == other.tolist()


def test_a_file_without_a_class_and_a_template(transformers, bases, tmp_path, caplog):
    base = bases["RobertaTokenizer"]
    theirs = transformers.AutoTokenizer.from_pretrained(
        write(tmp_path / "named", base, {}, True)
    )
    change = {CONFIG: {"tokenizer_class": REMOVED}, JSON: {"post_processor": None}}
    ours = tokens.load(write(tmp_path / "t", base, change, True))
    got, _ = ours.pair(*ours.encode_many(TEXTS[:2]), 99)
    assert got.tolist() == theirs(*TEXTS[:2])["input_ids"]
    assert "puts nothing around texts, and no tokenizer_class" in caplog.text


@pytest.mark.parametrize("name", ["AlbertTokenizer", "XLMRobertaTokenizer"])
def test_files_of_version_4(transformers, bases, tmp_path, caplog, name):
    """They have a table of characters, here one that changes none, and replace spaces instead of dividing words there."""
    table = (1024).to_bytes(4, "little") + bytes(1024)
    steps = [
        *(json.loads(bases[name][JSON])["normalizer"] or {}).get("normalizers", ()),
        {"type": "Precompiled", "precompiled_charsmap": b64encode(table).decode()},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    mark = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    change = {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": mark}  # fmt: skip
    same(transformers, write(tmp_path / "t", bases[name], {JSON: change}, True))
    assert "text is divided at white space first, as" in caplog.text


CLASSES = [
    (name, kind.classes)
    for name, kind in zip(VOCABULARIES, token_classes.KINDS.values(), strict=False)
]


@pytest.mark.parametrize(
    ("base", "name"), [(base, name) for base, names in CLASSES for name in names]
)
def test_classes(transformers, bases, tmp_path, base, name):
    same(
        transformers,
        write(tmp_path / "t", bases[base], {CONFIG: {"tokenizer_class": name}}, True),
    )


def test_types_of_models(transformers):
    names = transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES
    for kind in token_classes.KINDS.values():
        assert {names[model] for model in kind.models} <= set(kind.classes)


@pytest.mark.parametrize("length", [5, 9])
@pytest.mark.parametrize("stored", [True, False])
def test_the_beginning_is_cut_off(transformers, bases, tmp_path, stored, length):
    change = {CONFIG: {"truncation_side": "left"}}
    folder = write(tmp_path / "t", bases["BertTokenizer"], change, stored)
    ours = same(transformers, folder, length)
    tokens.save(ours, tmp_path / "saved")
    assert same(transformers, tmp_path / "saved", length).truncation_side == "left"


def test_a_file_that_cuts_off_the_beginning(transformers, bases, tmp_path):
    cut = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}  # fmt: skip
    change = {JSON: {"truncation": cut}}
    folder = write(tmp_path / "t", bases["RobertaTokenizer"], change, True)
    same(transformers, folder, 9)


BERT, GPT2 = "BertTokenizer", "GPT2Tokenizer"


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (BERT, {CONFIG: {"tokenizer_class": "T5TokenizerFast"}}, r"tokenizer_config.json: tokenizer_class = 'T5TokenizerFast' has a tokenizer of its own"),
        (BERT, {CONFIG: {"tokenizer_class": REMOVED}, "config.json": {"model_type": "xlnet"}}, r"config.json: model_type = 'xlnet' has a tokenizer of its own"),
        (BERT, {CONFIG: {"sep_token": None}}, r"tokenizer_config.json: sep_token = null, but tokenizers of this class need one"),
        (BERT, {CONFIG: {"unk_token": "<new>"}}, r"tokenizer.json lacks the token '<new>' that tokenizer_config.json beside it names as its unk_token"),
        ("AlbertTokenizer", {CONFIG: {"cls_token": "<s>"}}, r"tokenizer.json lacks the token '<s>' that tokenizer_config.json beside it names as its cls_token"),
        (BERT, {CONFIG: {"do_lower_case": "yes"}}, r"do_lower_case = 'yes' should be true or false"),
        (BERT, {CONFIG: {"truncation_side": "top"}}, r"truncation_side = 'top' should be \"left\" or \"right\""),
        (BERT, {CONFIG: {"fast_tokenizer_files": ["tokenizer.4.0.json"]}}, r"fast_tokenizer_files names 'tokenizer.4.0.json', which is not read"),
        (BERT, {CONFIG: {"extra_special_tokens": "<y>"}}, r"extra_special_tokens should be a list of tokens"),
        (BERT, {CONFIG: {"added_tokens_decoder": {"7": "<y>"}}}, r"added_tokens_decoder has '<y>' for the id 7"),
        (BERT, {CONFIG: {"added_tokens_decoder": ["<y>"]}}, r"added_tokens_decoder should be {id: token}"),
        (BERT, {CONFIG: {"mask_token": {"lstrip": True}}}, r"the added token {'lstrip': True} has no content"),
        (BERT, {ADDED: {"<y>": "7"}}, r"added_tokens.json: '<y>' has the id '7', which should be a number"),
        (BERT, {JSON: {"normalizer": {"type": "NFC"}}}, r"tokenizer.json: its normalizer is NFC, but BertTokenizer takes BertNormalizer: \"tokenizer_class\": \"PreTrained"),
        (BERT, {JSON: {"pre_tokenizer": None}}, r"its pre_tokenizer is none, but BertTokenizer takes BertPreTokenizer"),
        (GPT2, {JSON: {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}, CONFIG: {"add_prefix_space": REMOVED}}, r"its pre_tokenizer has add_prefix_space = true, but GPT2Tokenizer takes false: set add_prefix_space in tokenizer_config.json, or"),
        (BERT, {JSON: {"normalizer": {"type": "BertNormalizer", "lowercase": False, "strip_accents": None, "handle_chinese_chars": True, "clean_text": True}}, CONFIG: {"do_lower_case": REMOVED}}, r"its normalizer has lowercase = false, but BertTokenizer takes true: set do_lower_case"),
        (BERT, {CONFIG: {"tokenizer_class": REMOVED, "do_lower_case": False}}, r"tokenizer.json: do_lower_case = false beside it contradicts the file, which has true: name its class"),
        (BERT, {CONFIG: {"tokenizer_class": REMOVED, "unk_token": "a"}}, r"unk_token = \"a\" beside it contradicts the file, which has \"\[UNK\]\""),
        (BERT, {CONFIG: {"tokenizer_class": REMOVED, "cls_token": "a"}}, r"tokenizer.json does not put the token 'a' around texts"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_one_line(bases, tmp_path, base, changes, message):
    folder = write(tmp_path / "t", bases[base], changes, True)
    with pytest.raises(UserError, match=message) as caught:
        tokens.load(folder)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_of_another_class(bases, tmp_path):
    change = {CONFIG: {"tokenizer_class": "RobertaTokenizer"}}
    folder = write(tmp_path / "t", bases[BERT], change, False)
    with pytest.raises(UserError, match=r"holds no tokenizer for RobertaTokenizer: looked for tokenizer.json and vocab.json with merges.txt$"):  # fmt: skip
        tokens.load(folder)
    with pytest.raises(UserError, match=r"vocab.txt is no vocabulary for RobertaTokenizer"):  # fmt: skip
        tokens.load(folder / "vocab.txt")


def test_new_tokens_and_padding_are_said(bases, tmp_path, caplog):
    change = {CONFIG: {"eos_token": "<new>", "padding_side": "left"}}
    tokens.load(write(tmp_path / "t", bases[BERT], change, False))
    assert f"become new tokens at its end: <new> = {len(WORDS)}" in caplog.text
    assert 'padding_side = "left" has no effect' in caplog.text
