"""Raw text as tokens in sentences and documents, and examples for pretraining cut from them."""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from squeeze_jax.data import pipeline, text_files
from squeeze_jax.data.pipeline import Batch
from squeeze_jax.data.text import Progress
from squeeze_jax.data.tokens import END, Tokenizer
from squeeze_jax.errors import UserError

# Lines that are tokenized at once.
LINES = 8192
MARKS = (".", "!", "?")
Sentences = Literal["lines", "marks"]
Order = Literal["sentence_order", "next_sentence"]


class Documents(NamedTuple):
    """Text of documents of sentences.

    Attributes:
      tokens: of all, one after the other, uint16 where that holds them, else int32 [n].
      sentences: where each begins in `tokens`, and the end of the last, int64 [sentences + 1].
      documents: the sentence that each begins with, and the number of sentences, int64 [documents + 1].
    """

    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents) - 1


def read(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    sentences: Sentences = "lines",
    newlines: bool = False,
) -> Documents:
    """Reads text files; a blank line ends a document, as does a file.

    Args:
      paths: UTF-8 text, gzipped where the name ends in ".gz".
      tokenizer: for the text.
      sentences: end with lines, or also after the marks . ! ? within them.
      newlines: whether the ends of lines are text as well.

    Raises:
      UserError: a file that is not there or is no text, or files without text.
    """
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.int32
    marks = _marks(tokenizer) if sentences == "marks" else None
    # Arrays of many lines each: one for every line would take several times the memory of the tokens.
    tokens, ends, documents = [], [], []
    count = places = read = 0
    tell = Progress("lines")
    for path in paths:
        fresh = True
        for lines in _chunks(path):
            texts = [f"{line}\n" if newlines and line else line for line in lines]
            found = tokenizer.encode_many(texts)
            some, closing, opening = _sentences(found, fresh, marks)
            fresh = not len(found[-1])
            documents.append(opening + count)
            ends.append(closing + places)
            tokens.append(some.astype(dtype))
            count, places = count + len(closing), places + len(some)
            tell(read := read + len(lines))
    if not count:
        raise UserError(f"no text in {', '.join(map(str, paths)) or 'no files'}")
    return Documents(
        np.concatenate(tokens),
        np.concatenate([[0], *ends]),
        np.concatenate([*documents, [count]]),
    )


def _sentences(lines: list[np.ndarray], fresh: bool, marks: np.ndarray | None):
    """Tokens of lines after each other, where sentences end in them, and which sentences begin documents, int64.

    Args:
      lines: ids of each; none ends a document.
      fresh: whether the first begins a document.
      marks: ids that end sentences within a line, or None.
    """
    tokens = np.concatenate(lines)
    sizes = np.array([len(ids) for ids in lines])
    there = sizes > 0
    after = np.cumsum(sizes)
    begins = np.append(fresh, ~there[:-1]) & there
    ends = after[there]
    if marks is not None:
        ends = np.union1d(np.flatnonzero(np.isin(tokens, marks)) + 1, ends)
    return tokens, ends, np.searchsorted(ends, (after - sizes)[begins], side="right")


def _marks(tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the marks that end sentences.

    They are looked up, as a text of a mark alone may be another token: after the space that some put before a text.
    """
    found = (tokenizer.backend.token_to_id(mark) for mark in MARKS)
    return np.array([id for id in found if id is not None], np.int64)


def _chunks(path: str | Path) -> Iterator[list[str]]:
    """Lines of a file without white space around them, so many at once."""
    lines = (line.strip() for line in text_files.read_lines(Path(path).expanduser()))
    while some := list(itertools.islice(lines, LINES)):
        yield some


def hold_out(text: Documents, share: float) -> tuple[Documents, Documents]:
    """Documents to train on, and every so many-th, a share of them, to evaluate on.

    Raises:
      UserError: a share out of range, or too few documents.
    """
    if not 0 < share < 1:
        raise UserError(
            f"config.data.eval = {share} should be files, or a share of the documents between 0 and 1"
        )
    steps = np.floor(np.arange(len(text) + 1) * share + 1e-9)
    held = np.diff(steps) > 0
    if not held.any():
        raise UserError(
            f"config.data.eval = {share} of {len(text)} documents is none: name files to evaluate on instead"
        )
    return _take(text, ~held), _take(text, held)


def _take(text: Documents, which: np.ndarray) -> Documents:
    """The documents that are told, bool [documents]."""
    sentences = np.repeat(which, np.diff(text.documents))
    lengths = np.diff(text.sentences)
    return Documents(
        text.tokens[np.repeat(sentences, lengths)],
        np.concatenate([[0], np.cumsum(lengths[sentences])]),
        np.concatenate([[0], np.cumsum(np.diff(text.documents)[which])]),
    )


class Examples:
    """Batches of what is cut from text, see `pipeline.Reader`.

    They have "tokens", "segments" int32 [b, l], "attended" bool [b, l], "draw" int32 [b] (a number for what is random on the
    accelerator), "mask" bool [b] and, where the cut labels examples, "label" int32 [b]. Where tokens shall be masked they
    have "original" int32 [b, l] as well, the text's tokens.

    Args:
      cut: `Blocks` or `Pairs`: a function of an example's index and its uniform numbers [draws - 1].
      length: of a sequence.
      pad: the token after its end.
      masked: what evaluation's tokens become, ("draw", "tokens", "attended") → [b, l]; None where none are masked.
    """

    draws = 8

    def __init__(
        self,
        cut: "Blocks | Pairs",
        length: int,
        pad: int,
        masked: Callable | None = None,
    ):
        self._cut, self._length, self._pad, self._masked = cut, length, pad, masked

    def __len__(self) -> int:
        return len(self._cut)

    def empty(self, rows: int) -> Batch:
        """So many rows of padding."""
        shape = (rows, self._length)
        more = {"label": np.zeros(rows, np.int32)} if self._cut.labelled else {}
        if self._masked:
            more["original"] = np.full(shape, self._pad, np.int32)
        return more | {
            "tokens": np.full(shape, self._pad, np.int32),
            "segments": np.zeros(shape, np.int32),
            "attended": np.zeros(shape, bool),
            "draw": np.zeros(rows, np.int32),
            "mask": np.zeros(rows, bool),
        }

    def still(self, indices: np.ndarray) -> Batch:
        """As `random`, with numbers that the indices decide, and masked."""
        each = [pipeline.draws(0, int(i), 1, self.draws) for i in indices]
        batch = self.random(indices, np.concatenate(each))
        if self._masked:
            given = (batch[k] for k in ("draw", "tokens", "attended"))
            batch["tokens"] = self._masked(*given)
        return batch

    def random(self, indices: np.ndarray, draws: np.ndarray) -> Batch:
        """Examples int [b]; what is random of them is decided by uniform numbers [b, draws]."""
        batch = self.empty(len(indices))
        batch["mask"][:] = True
        batch["draw"][:] = draws[:, 0] * 2**31
        for row, index in enumerate(indices):
            ids, segments, label = self._cut(index, draws[row, 1:])
            batch["tokens"][row, : len(ids)] = ids
            batch["segments"][row, : len(ids)] = segments
            batch["attended"][row, : len(ids)] = True
            if self._cut.labelled:
                batch["label"][row] = label
        return batch | ({"original": batch["tokens"]} if self._masked else {})


class Blocks:
    """Neighbouring tokens, as many as there is room for, over the ends of documents, where there is a separator.

    These are the FULL-SENTENCES of Liu et al., arXiv 1907.11692, section 4.2, except that a block may begin and end within
    a sentence. The last block of the text may be shorter.

    Args:
      text, tokenizer: what to cut, and whose special tokens to use.
      length: of a sequence.
      bare: whether there are no special tokens around a block.
    """

    labelled = False

    def __init__(self, text: Documents, tokenizer: Tokenizer, length: int, bare: bool):
        separator = tokenizer.sep
        if separator is None:
            separator = tokenizer.backend.token_to_id(END)
        self._tokens = text.tokens
        if separator is not None:
            between = text.sentences[text.documents[1:-1]]
            self._tokens = np.insert(text.tokens, between, separator)
        self._tokenizer, self._length, self._bare = tokenizer, length, bare
        self._room = length if bare else tokenizer.room(length)

    def __len__(self) -> int:
        return -(-len(self._tokens) // self._room)

    def __call__(self, index: int, draws: np.ndarray):
        ids = self._tokens[index * self._room : (index + 1) * self._room]
        if self._bare:
            return ids, 0, 0
        return *self._tokenizer.single(ids, self._length), 0


class Pairs:
    """Two segments of whole sentences, and a label, which tells how the second goes with the first.

    Neighbouring sentences of one document, as many as there is room for, are divided after any of them. By half of the draws
    the two parts then change places ("sentence_order": Lan et al., arXiv 1909.11942, section 3.1), or the second is of
    another document ("next_sentence": Devlin et al., arXiv 1810.04805, section 3.1): label 1. Sentences of more than half the
    room are cut into equal pieces, and a document of one piece is left out.

    Args:
      text, tokenizer: what to cut, and whose special tokens to use.
      length: of a sequence.
      order: what the label tells.
      use: what for, to be named by errors: "to train on".

    Raises:
      UserError: no document of two sentences; for next sentences, not two of them.
    """

    labelled = True

    def __init__(
        self,
        text: Documents,
        tokenizer: Tokenizer,
        length: int,
        order: Order,
        use: str,
    ):
        self._tokenizer, self._length, self._order = tokenizer, length, order
        self._tokens, self._room = text.tokens, tokenizer.room(length, pair=True)
        self._starts, documents = _pieces(text, max(1, self._room // 2))
        chunks = list(_packed(self._starts, documents, self._room))
        self._chunks = np.array(chunks, np.int64).reshape(-1, 3)
        if not chunks:
            raise UserError(
                f"config.data.order = {order!r} needs documents of two sentences, where blank lines end documents and"
                f" config.data.sentences tells what ends sentences: there are none {use}"
            )
        if order == "next_sentence" and chunks[0][2] == chunks[-1][2]:
            raise UserError(
                "config.data.order = 'next_sentence' takes every other sentence from another document, and blank lines end"
                f" documents: there is one {use}; choose 'sentence_order'"
            )

    def __len__(self) -> int:
        return len(self._chunks)

    def __call__(self, index: int, draws: np.ndarray):
        first, last, document = self._chunks[index]
        middle = first + 1 + int(draws[0] * (last - first - 1))
        a, b = self._text(first, middle), self._text(middle, last)
        other = draws[1] < 0.5
        if other and self._order == "sentence_order":
            a, b = b, a
        elif other:
            b = self._elsewhere(document, draws)[: self._room - len(a)]
        return *self._tokenizer.pair(a, b, self._length), other

    def _text(self, first: int, last: int) -> np.ndarray:
        return self._tokens[self._starts[first] : self._starts[last]]

    def _elsewhere(self, document: int, draws: np.ndarray) -> np.ndarray:
        """Sentences of any chunk of another document, from any of them on."""
        low, high = np.searchsorted(self._chunks[:, 2], [document, document + 1])
        index = int(draws[2] * (len(self._chunks) - (high - low)))
        first, last, _ = self._chunks[index + (index >= low) * (high - low)]
        return self._text(first + int(draws[3] * (last - first)), last)


def _pieces(text: Documents, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Sentences in equal pieces of at most so many tokens: where each begins, and the end; the first of each document."""
    sizes = np.diff(text.sentences)
    counts = -(-sizes // most)
    before = np.concatenate([[0], np.cumsum(counts)])
    sentence = np.repeat(np.arange(len(sizes)), counts)
    nth = np.arange(len(sentence)) - before[sentence]
    starts = text.sentences[sentence] + nth * sizes[sentence] // counts[sentence]
    return np.append(starts, text.sentences[-1]), before[text.documents]


def _packed(
    starts: np.ndarray, documents: np.ndarray, room: int
) -> Iterator[tuple[int, int, int]]:
    """Chunks (first piece, the one after the last, document): at least two pieces each, as many as there is room for."""
    starts = starts.tolist()
    for number, (low, high) in enumerate(itertools.pairwise(documents)):
        first = int(low)
        while first < high:
            last = (
                bisect.bisect_right(starts, starts[first] + room, first, high + 1) - 1
            )
            if last - first > 1:
                yield first, last, number
            first = last
