"""Text files: what is in them, whole and line by line, and what is said of those that cannot be read."""

import gzip

import pytest

from squeeze_jax.data import documents, questions, text_files, tokens, tsv
from squeeze_jax.errors import UserError

TEXT = "one\r\ntwo \u2028 \x85 \x0c still two\n\nfour, été"


@pytest.fixture
def write(tmp_path):
    def write(name, content: bytes):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_and_its_lines(write, name, mark):
    path = write(name, mark + TEXT.encode())
    assert text_files.read_text(path) == TEXT
    # Only the ends of lines end lines.
    assert [line.rstrip("\n") for line in lines(path)] == [
        "one",
        "two \u2028 \x85 \x0c still two",
        "",
        "four, été",
    ]


def damaged(write):
    """{what is said: file}"""
    whole = gzip.compress(b"some text\n" * 9000)
    garbled = bytearray(whole)
    garbled[20:60] = b"\xff" * 40
    paths = {
        "Not a gzipped file": "plain.gz",
        "Error -3": "garbled.gz",
        "ended before": "cut.gz",
    }
    contents = b"plain", bytes(garbled), whole[:-20]
    for name, content in zip(paths.values(), contents, strict=True):
        write(f"{name}.raw", content).rename(write("x", b"").with_name(name))
    folder = write("x", b"").parent
    found = {message: folder / name for message, name in paths.items()}
    return found | {"No such file": folder / "absent.txt"}


def lines(path):
    return list(text_files.read_lines(path))


READERS = {
    "text": text_files.read_text,
    "lines": lines,
    "documents": lambda path: documents.read([path], small(path.parent)),
    "questions": questions.read,
    "train": lambda path: tokens.train([path], 100),
    "tsv": tsv.read,
}


def small(folder):
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nword\n")
    return tokens.load(folder / "vocab.txt")


@pytest.mark.parametrize("reader", READERS)
def test_files_that_cannot_be_read(write, reader):
    for message, path in damaged(write).items():
        with pytest.raises(UserError, match=f"^cannot read {path}: .*{message}"):
            READERS[reader](path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_what_is_not_utf_8_is_named_by_its_line(write, name):
    # Far behind what is read at once.
    path = write(name, b"a line\n" * 5000 + "café\n".encode("latin-1") + b"more\n" * 99)
    for read in text_files.read_text, lines:
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path}:5001 is not UTF-8 text, as its byte 0xe9 tells: save the file as UTF-8"
        )


def test_a_vocabulary_with_a_byte_order_mark(write):
    small((path := write("vocab.txt", b"")).parent)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    made = tokens.load(path)
    assert (made.pad, made.size) == (0, 6)
    assert made.encode("word")[0].tolist() == [5]
