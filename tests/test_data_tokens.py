"""Tokenizers against those of `transformers`, on real text; what they write; how mistakes are named."""

import gzip
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import tokenizers

from squeeze_jax.data import tokens
from squeeze_jax.errors import UserError

ODD = [
    "",
    " ",
    "Élan vital, naïve Ångström — 3.14 €?",
    "東京 is 23,5 % larger; don't  you\tthink?",
    "a [MASK] b <mask> c <|endoftext|>",
    "xqzzyk\u200b \U0001f600 \x00 e\u0301",
    "supercalifragilisticexpialidocious" * 4,
]
SPECIAL = {"pad": "[PAD]", "unknown": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
SPECIAL["mask"] = "[MASK]"


@pytest.fixture(scope="module")
def sentences(shared):
    with gzip.open(shared / "data/text/glue/MRPC/dev.tsv.gz", "rt", "utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:151]
    return [text for row in rows for text in row[3:]] + ODD


def folder(path, **files):
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uncased(shared, tmp_path_factory):
    text = (shared / "data/text/bert_uncased_vocab.txt").read_text("utf-8")
    return folder(tmp_path_factory.mktemp("uncased") / "t", vocab__txt=text)


@pytest.fixture(scope="module")
def cased(tmp_path_factory, sentences):
    """A small cased vocabulary, with letters of both kinds and with accents."""
    letters = sorted({c for s in sentences for c in s if not c.isspace()} - {"\x00"})
    words = {w for s in sentences[:60] for w in re.findall(r"\w+", s) if len(w) > 1}
    pieces = [*letters, *(f"##{c}" for c in letters), *sorted(words)]
    text = "\n".join([*SPECIAL.values(), *pieces]) + "\n"
    path = tmp_path_factory.mktemp("cased") / "t"
    return folder(path, vocab__txt=text, tokenizer_config__json='{"do_lower_case": false}')  # fmt: skip


def byte_level(path, special, sentences):
    """A byte-level BPE of 400 tokens, as vocab.json and merges.txt."""
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(sentences, 400, special_tokens=special)
    path.mkdir()
    backend.save_model(str(path))
    return path


@pytest.fixture(scope="module")
def roberta(tmp_path_factory, sentences):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return byte_level(tmp_path_factory.mktemp("roberta") / "t", special, sentences)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, sentences):
    path = tmp_path_factory.mktemp("gpt2") / "t"
    return byte_level(path, ["<|endoftext|>"], sentences)


CASES = {
    "uncased": "BertTokenizer",
    "cased": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "gpt2": "GPT2Tokenizer",
}


@pytest.fixture(scope="module", params=CASES)
def both(request, transformers):
    """(ours, theirs) of one kind, from the same folder."""
    path = request.getfixturevalue(request.param)
    theirs = getattr(transformers, CASES[request.param]).from_pretrained(path)
    return tokens.load(path), theirs


def test_ids_and_offsets(both, sentences):
    ours, theirs = both
    many = ours.encode_many(sentences)
    for text, ids in zip(sentences, many, strict=True):
        if "<mask>" in text and ours.token(ours.mask or 0) == "<mask>":
            continue  # see below: theirs forgets that it takes the space before it
        want = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        got, offsets = ours.encode(text)
        assert got.tolist() == ids.tolist() == want["input_ids"], text
        assert offsets.tolist() == list(map(list, want["offset_mapping"])), text
        assert got.dtype == ids.dtype == offsets.dtype == np.int32
        assert offsets.shape == (len(ids), 2)


@pytest.mark.parametrize("length", [9, 20, 64])
def test_one_and_two_texts_cut_to_a_length(both, sentences, length):
    ours, theirs = both
    texts = [t for t in sentences[-80:] if "<mask>" not in t]
    options = dict(truncation=True, max_length=length, return_token_type_ids=True)
    ids = ours.encode_many(texts)
    for n, a in enumerate(texts):
        got, segments = ours.single(ids[n], length)
        want = theirs(a, **options)
        assert got.tolist() == want["input_ids"], a
        assert segments.tolist() == want["token_type_ids"]
        m = (n + 1 + n % 2) % len(texts)  # the next, or the one after
        got, segments = ours.pair(ids[n], ids[m], length)
        want = {k: v[0] for k, v in theirs([(a, texts[m])], **options).items()}
        assert got.tolist() == want["input_ids"], (a, texts[m])
        assert segments.tolist() == want["token_type_ids"]


def test_special_tokens(both):
    ours, theirs = both
    assert ours.size == len(theirs)
    assert ours.unknown == theirs.unk_token_id
    for role in ("pad", "cls", "sep", "mask"):
        assert getattr(ours, role) == getattr(theirs, f"{role}_token_id")
    for id in (0, 7, ours.size - 1):
        assert ours.token(id) == theirs.convert_ids_to_tokens(id)
    ids = ours.single(ours.encode("the company said")[0], 20)[0]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_saved_tokenizer_is_the_same_for_transformers_and_us(
    both, transformers, sentences, tmp_path
):
    ours, _ = both
    tokens.save(ours, tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = tokens.load(tmp_path / "saved")
    (tmp_path / "saved/tokenizer.json").unlink()
    third = tokens.load(tmp_path / "saved")  # from the vocabulary alone
    for role in (
        "size",
        "pad",
        "unknown",
        "cls",
        "sep",
        "mask",
        "single_template",
        "pair_template",
    ):
        assert getattr(again, role) == getattr(ours, role)
        assert getattr(third, role) == getattr(ours, role)
    for text in sentences:
        ids, offsets = ours.encode(text)
        for other in (again, third):
            assert other.encode(text)[0].tolist() == ids.tolist()
            assert other.encode(text)[1].tolist() == offsets.tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    a, b = ours.encode(sentences[0])[0], ours.encode(sentences[1])[0]
    got = ours.pair(a, b, 40)[0].tolist()
    assert theirs(sentences[0], sentences[1], truncation=True, max_length=40)["input_ids"] == got  # fmt: skip


def test_a_mask_of_roberta_takes_the_space_before_it(roberta):
    # So do the published tokenizers: the masked word's token holds its space.
    tokenizer = tokens.load(roberta)
    ids, _ = tokenizer.encode("a <mask> b")
    a, b = tokenizer.encode("a")[0][0], tokenizer.encode(" b")[0][0]
    assert ids.tolist() == [a, tokenizer.mask, b]


def test_known_numbers_of_bert(shared):
    # The ids that the tutorials of BERT show.
    tokenizer = tokens.load(shared / "data/text/bert_uncased_vocab.txt")
    ids = tokenizer.encode("Hello, my dog is cute")[0]
    assert ids.tolist() == [7592, 1010, 2026, 3899, 2003, 10140]
    assert tokenizer.size == 30522
    assert (tokenizer.pad, tokenizer.unknown, tokenizer.cls) == (0, 100, 101)
    assert (tokenizer.sep, tokenizer.mask) == (102, 103)
    assert tokenizer.room(128) == 126
    assert tokenizer.room(128, pair=True) == 125


def test_a_vocabulary_with_capitals_is_cased_unless_it_says_otherwise(cased, tmp_path):
    text = (cased / "vocab.txt").read_text("utf-8")
    alone = folder(tmp_path / "alone", vocab__txt=text)
    assert tokens.load(alone).encode("E")[0] != tokens.load(alone).encode("e")[0]
    (alone / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert tokens.load(alone).encode("E")[0] == tokens.load(alone).encode("e")[0]


def test_a_tokenizer_json_that_cuts_and_pads_does_neither(uncased, tmp_path):
    backend = tokens.load(uncased).backend
    backend = tokenizers.Tokenizer.from_str(backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    path = folder(tmp_path / "t", tokenizer__json=backend.to_str())
    assert len(tokens.load(path).encode("one two three four five six")[0]) == 6


def test_special_tokens_by_other_names(transformers, tmp_path):
    path = folder(
        tmp_path / "t",
        vocab__txt="<nil>\n<unk>\n<cls>\n<sep>\na\n##b\n",
        tokenizer_config__json=json.dumps(
            {
                "pad_token": "<nil>",
                "unk_token": {"__type": "AddedToken", "content": "<unk>"},
                "cls_token": "<cls>",
                "sep_token": "<sep>",
            }
        ),
    )
    tokenizer = tokens.load(path)
    ids, segments = tokenizer.pair(
        tokenizer.encode("ab")[0], tokenizer.encode("c")[0], 9
    )
    assert ids.tolist() == [2, 4, 5, 3, 1, 3]
    assert segments.tolist() == [0, 0, 0, 0, 1, 1]
    theirs = transformers.BertTokenizer.from_pretrained(path)
    assert tokenizer.pad == theirs.pad_token_id == 0
    assert tokenizer.mask == theirs.mask_token_id == 6  # a new token


def test_a_tokenizer_of_another_kind(transformers, tmp_path):
    # As ALBERT's: pieces with probabilities, a special sign before words, its own way to join texts.
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("▁a", -1.0), ("▁b", -2.0), ("b", -3.0)]  # fmt: skip
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 1, False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<pad>", "<unk>", "[CLS]", "[SEP]"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = tokens.load(folder(tmp_path / "t", tokenizer__json=backend.to_str()))
    assert (tokenizer.pad, tokenizer.unknown, tokenizer.mask) == (0, 1, None)
    ids, segments = tokenizer.pair(*(tokenizer.encode(t)[0] for t in ("a", "bb")), 9)
    assert ids.tolist() == [2, 4, 3, 5, 6, 3]
    assert segments.tolist() == [0, 0, 0, 1, 1, 1]
    tokens.save(tokenizer, tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("a", "bb")["input_ids"] == ids.tolist()
    again = tokens.load(tmp_path / "saved")
    assert (again.single_template, again.pair_template, again.size) == (
        tokenizer.single_template,
        tokenizer.pair_template,
        7,
    )


def test_pickling(uncased):
    tokenizer = tokens.load(uncased)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("unbelievable")[0].tolist() == tokenizer.encode("unbelievable")[0].tolist()  # fmt: skip
    assert again.pair_template == tokenizer.pair_template


def test_training_a_vocabulary(shared, transformers, tmp_path):
    file = shared / "data/text/glue/MRPC/train.tsv.gz"
    tokenizer = tokens.train([file], 900)
    assert tokenizer.size == 900
    assert [tokenizer.token(i) for i in range(5)] == list(SPECIAL.values())
    assert tokenizer.unknown == 1
    # Frequent words are whole, others made of pieces that spell them.
    assert len(tokenizer.encode("The company said")[0]) == 3
    pieces = [tokenizer.token(i) for i in tokenizer.encode("Zebrafish")[0]]
    assert "".join(p.removeprefix("##") for p in pieces) == "zebrafish"
    assert len(pieces) > 1
    again = tokens.train([file], 900)
    assert again.backend.to_str() == tokenizer.backend.to_str()
    tokens.save(tokenizer, tmp_path / "t")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    text = "Shares of Café Zürich fell 3.5% on Monday"
    ids = tokenizer.single(tokenizer.encode(text)[0], 64)[0].tolist()
    assert theirs(text)["input_ids"] == ids
    assert tokenizer.unknown not in ids


def test_training_with_capitals(tmp_path):
    (tmp_path / "text").write_text("Anna und Otto und Anna\n" * 9, encoding="utf-8")
    tokenizer = tokens.train([tmp_path / "text"], 64, lower=False)
    assert [tokenizer.token(i) for i in tokenizer.encode("Anna und")[0]] == ["Anna", "und"]  # fmt: skip
    with pytest.raises(UserError, match="size = 8 is too small"):
        tokens.train([tmp_path / "text"], 8)


GOOD = "\n".join(SPECIAL.values())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"t holds no tokenizer: looked for tokenizer.json, vocab.txt, and vocab.json with merges.txt$"),
        ({"vocab__txt": f"{GOOD}\n\na\n"}, r"vocab.txt:6 is empty"),
        ({"vocab__txt": f"{GOOD}\na\nb\na\n"}, r"vocab.txt:8 has the token 'a' of line 6 again"),
        ({"vocab__txt": ""}, r"vocab.txt lacks the special tokens \[PAD\], \[UNK\], \[CLS\], \[SEP\]:"),
        ({"vocab__txt": "[PAD]\n[UNK]\n[SEP]\na"}, r"vocab.txt lacks the special tokens \[CLS\]: if they"),
        ({"tokenizer__json": "{"}, r"tokenizer.json is no tokenizer.json: "),
        ({"vocab__json": "[]", "merges__txt": ""}, r"vocab.json holds no JSON object"),
        ({"vocab__json": "{"}, r"vocab.json is not JSON: "),
        ({"vocab__json": '{"a": 0}'}, r"cannot read .*merges.txt: No such file"),
        ({"vocab__json": '{"a": 0}', "merges__txt": "a b c"}, r"t holds no byte-level BPE in vocab.json and merges.txt: "),
        ({"vocab__json": '{"a": 0}', "merges__txt": ""}, r"vocab.json lacks special tokens: neither <s> and </s> "),
        ({"vocab__json": '{"<s>": 0}', "merges__txt": ""}, r"vocab.json lacks the special tokens <pad>, <unk>, </s>, <mask>"),
        ({"vocab__txt": GOOD, "tokenizer_config__json": "x"}, r"tokenizer_config.json is not JSON: "),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        tokens.load(folder(tmp_path / "t", **files))
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path, uncased):
    with pytest.raises(UserError, match=r"no tokenizer .*nowhere: there is no such"):
        tokens.load(tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"model.bin is no tokenizer: give a folder"):
        tokens.load(tmp_path / "model.bin")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"vocab.txt:1 is not UTF-8 text"):
        tokens.load(tmp_path)
    with pytest.raises(UserError, match=r"vocab.txt:1 is not UTF-8 text"):
        tokens.train([tmp_path / "vocab.txt"], 100)
    with pytest.raises(UserError, match=r"cannot read .*nothing: No such file"):
        tokens.train([tmp_path / "nothing"], 100)
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match=r"empty holds no text"):
        tokens.train([tmp_path / "empty"], 100)
    with pytest.raises(UserError, match=r"without text files"):
        tokens.train([], 100)
    shutil.copy(uncased / "vocab.txt", tmp_path / "a file")
    with pytest.raises(UserError, match="cannot write to"):
        tokens.save(tokens.load(uncased), tmp_path / "a file" / "t")


@pytest.mark.parametrize(("pair", "length", "special"), [(False, 2, 2), (True, 4, 3)])
def test_no_room_for_text(uncased, pair, length, special):
    tokenizer = tokens.load(uncased)
    with pytest.raises(UserError, match=f"length = {length} leaves .* {special} special"):  # fmt: skip
        tokenizer.room(length, pair)
    assert tokenizer.room(length + 1, pair) == length + 1 - special


@pytest.mark.parametrize(
    "text", [os.fsdecode(b"caf\xe9"), json.loads('"half a face: \\ud83d"')]
)
def test_what_is_no_text(uncased, text):
    tokenizer = tokens.load(uncased)
    for encode in tokenizer.encode_many, tokenizer.locate_many:
        with pytest.raises(UserError, match="is no text: it has bytes that are not"):
            encode(["a text", text])
