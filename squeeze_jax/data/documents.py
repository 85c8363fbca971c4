"""Raw text as tokens, divided into sentences and documents, and pretraining examples that are cut from it."""

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

LINES = 8192  # lines tokenized at a time
MARKS = (".", "!", "?")  # tokens that end a sentence
Sentences = Literal["lines", "marks"]
Order = Literal["sentence_order", "next_sentence"]


class Documents(NamedTuple):
    """Tokenized documents, each a run of sentences.

    Attributes:
      tokens: the tokens of all documents, one after the other, [n]: uint16 if the vocabulary fits, otherwise int32.
      sentences: the position in `tokens` where each sentence begins, followed by n, int64 [sentences + 1].
      documents: the index of each document's first sentence, followed by the number of sentences, int64 [documents + 1].
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
    """Reads and tokenizes text files; a blank line or the end of a file ends a document.

    Args:
      paths: UTF-8 text files, gzipped if the name ends in ".gz".
      tokenizer: splits the text into tokens.
      sentences: "lines" if a sentence is a line; "marks" if the tokens . ! ? within a line also end sentences.
      newlines: whether a line's end is part of its text.

    Raises:
      UserError: a file is missing or not UTF-8 text, or the files hold no text.
    """
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.int32
    marks = _mark_ids(tokenizer) if sentences == "marks" else None
    # Each array holds many lines: one array per line would take several times the memory of the tokens.
    tokens, sentence_ends, document_begins = [], [], []
    num_sentences = num_tokens = num_lines = 0
    report = Progress("lines")
    for path in paths:
        begins_document = True
        for lines in _line_batches(path):
            texts = [f"{line}\n" if newlines and line else line for line in lines]
            ids = tokenizer.encode_many(texts)
            joined, ends, begins = _sentence_bounds(ids, begins_document, marks)
            begins_document = not len(ids[-1])
            document_begins.append(begins + num_sentences)
            sentence_ends.append(ends + num_tokens)
            tokens.append(joined.astype(dtype))
            num_sentences += len(ends)
            num_tokens += len(joined)
            report(num_lines := num_lines + len(lines))
    if not num_sentences:
        raise UserError(f"no text in {', '.join(map(str, paths)) or 'no files'}")
    return Documents(
        np.concatenate(tokens),
        np.concatenate([[0], *sentence_ends]),
        np.concatenate([*document_begins, [num_sentences]]),
    )


def _sentence_bounds(
    lines: list[np.ndarray], begins_document: bool, marks: np.ndarray | None
):
    """Joins the tokens of lines and finds where sentences and documents begin and end.

    Args:
      lines: the token ids of each line; a line without tokens ends a document.
      begins_document: whether the first line begins a document.
      marks: token ids that end sentences within a line, or None.

    Returns:
      The tokens of all lines; the position where each sentence ends; the index of each document's first sentence. The last two
      are int64.
    """
    tokens = np.concatenate(lines)
    lengths = np.array([len(ids) for ids in lines])
    has_text = lengths > 0
    line_ends = np.cumsum(lengths)
    opens = np.append(begins_document, ~has_text[:-1]) & has_text
    ends = line_ends[has_text]
    if marks is not None:
        ends = np.union1d(np.flatnonzero(np.isin(tokens, marks)) + 1, ends)
    starts = (line_ends - lengths)[opens]
    return tokens, ends, np.searchsorted(ends, starts, side="right")


def _mark_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Returns the ids of the marks that end sentences.

    They are looked up in the vocabulary, not encoded: some tokenizers put a space before a text, which makes another token.
    """
    ids = (tokenizer.backend.token_to_id(mark) for mark in MARKS)
    return np.array([id for id in ids if id is not None], np.int64)


def _line_batches(path: str | Path) -> Iterator[list[str]]:
    """Yields the lines of a file, `LINES` at a time, without white space around them."""
    lines = (line.strip() for line in text_files.read_lines(Path(path).expanduser()))
    while batch := list(itertools.islice(lines, LINES)):
        yield batch


def hold_out(text: Documents, share: float) -> tuple[Documents, Documents]:
    """Splits documents into those to train on and those to evaluate on, which are spread evenly over the text.

    Args:
      text: the documents.
      share: the fraction of them to evaluate on, between 0 and 1.

    Raises:
      UserError: the share is out of range, or too small for so few documents.
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
    return _select(text, ~held), _select(text, held)


def _select(text: Documents, kept: np.ndarray) -> Documents:
    """Returns the documents that `kept`, bool [documents], marks."""
    sentences = np.repeat(kept, np.diff(text.documents))
    lengths = np.diff(text.sentences)
    return Documents(
        text.tokens[np.repeat(sentences, lengths)],
        np.concatenate([[0], np.cumsum(lengths[sentences])]),
        np.concatenate([[0], np.cumsum(np.diff(text.documents)[kept])]),
    )


class Examples:
    """Examples that are cut from text, as a `pipeline.Reader`.

    Its batches have "tokens" and "segments" int32 [b, l], "attended" bool [b, l] (False: padding), "draw" int32 [b] (the random
    number that decides the masking on the accelerator), and "mask" bool [b]. If `cut` labels its examples, they have "label"
    int32 [b]. If tokens are to be masked, they have "original" int32 [b, l], the tokens before masking.

    Args:
      cut: `Blocks` or `Pairs`. It takes an example's index and uniform numbers [draws - 1], and returns (ids, segments, label).
      length: tokens of a sequence, l.
      pad: the id of the padding token.
      masked: masks the tokens of evaluation examples, (draw [b], tokens [b, l], attended [b, l]) → tokens [b, l]; None if no
        tokens are masked.
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
        """Returns a batch of `rows` rows of padding."""
        shape = (rows, self._length)
        extra = {"label": np.zeros(rows, np.int32)} if self._cut.labelled else {}
        if self._masked:
            extra["original"] = np.full(shape, self._pad, np.int32)
        return extra | {
            "tokens": np.full(shape, self._pad, np.int32),
            "segments": np.zeros(shape, np.int32),
            "attended": np.zeros(shape, bool),
            "draw": np.zeros(rows, np.int32),
            "mask": np.zeros(rows, bool),
        }

    def still(self, indices: np.ndarray) -> Batch:
        """Returns evaluation examples, with masked tokens; their random numbers depend on the indices, int [b], alone."""
        draws = [pipeline.draws(0, int(i), 1, self.draws) for i in indices]
        batch = self.random(indices, np.concatenate(draws))
        if self._masked:
            arguments = (batch[k] for k in ("draw", "tokens", "attended"))
            batch["tokens"] = self._masked(*arguments)
        return batch

    def random(self, indices: np.ndarray, draws: np.ndarray) -> Batch:
        """Returns training examples, not masked yet.

        Args:
          indices: int [b].
          draws: uniform numbers [b, self.draws] that decide everything random about each example.
        """
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
    """Cuts text into blocks of consecutive tokens, as many as fit into a sequence.

    Blocks run across the ends of documents, with a separator token between two documents. They are the FULL-SENTENCES of Liu
    et al., arXiv 1907.11692, section 4.2, except that a block may begin and end within a sentence. The last block of the text
    may be shorter.

    Args:
      text: the documents to cut.
      tokenizer: has the special tokens.
      length: tokens of a sequence.
      bare: whether blocks have no special tokens around them.
    """

    labelled = False

    def __init__(self, text: Documents, tokenizer: Tokenizer, length: int, bare: bool):
        separator = tokenizer.sep
        if separator is None:
            separator = tokenizer.backend.token_to_id(END)
        self._tokens = text.tokens
        if separator is not None:
            boundaries = text.sentences[text.documents[1:-1]]
            self._tokens = np.insert(text.tokens, boundaries, separator)
        self._tokenizer, self._length, self._bare = tokenizer, length, bare
        self._room = length if bare else tokenizer.room(length)

    def __len__(self) -> int:
        return -(-len(self._tokens) // self._room)

    def __call__(self, index: int, draws: np.ndarray):
        """Returns the example at an index; see the class."""
        ids = self._tokens[index * self._room : (index + 1) * self._room]
        if self._bare:
            return ids, 0, 0
        return *self._tokenizer.single(ids, self._length), 0


class Pairs:
    """Cuts text into pairs of segments of whole sentences, with a label for how the second segment follows the first.

    As many consecutive sentences of one document as fit are divided at a random sentence end. For half of the examples the
    second segment is then changed, and the label is 1: the two segments are swapped ("sentence_order", Lan et al., arXiv
    1909.11942, section 3.1), or the second one is replaced by sentences of another document ("next_sentence", Devlin et al.,
    arXiv 1810.04805, section 3.1). Otherwise the label is 0. A sentence of more than half the room is cut into equal pieces,
    and a document of only one piece is left out.

    Args:
      text: the documents to cut.
      tokenizer: has the special tokens.
      length: tokens of a sequence.
      order: the meaning of label 1, "sentence_order" or "next_sentence".
      use: the purpose of the examples for errors, such as "to train on".

    Raises:
      UserError: no document has two sentences; or, for "next_sentence", only one has.
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
        chunks = list(_chunks_of_pieces(self._starts, documents, self._room))
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
        """Returns the example at an index; see the class."""
        first, last, document = self._chunks[index]
        middle = first + 1 + int(draws[0] * (last - first - 1))
        a, b = self._text(first, middle), self._text(middle, last)
        changed = draws[1] < 0.5
        if changed and self._order == "sentence_order":
            a, b = b, a
        elif changed:
            b = self._other_document(document, draws)[: self._room - len(a)]
        return *self._tokenizer.pair(a, b, self._length), changed

    def _text(self, first: int, last: int) -> np.ndarray:
        return self._tokens[self._starts[first] : self._starts[last]]

    def _other_document(self, document: int, draws: np.ndarray) -> np.ndarray:
        """Returns the tokens of a random chunk of another document, from a random sentence on."""
        low, high = np.searchsorted(self._chunks[:, 2], [document, document + 1])
        index = int(draws[2] * (len(self._chunks) - (high - low)))
        first, last, _ = self._chunks[index + (index >= low) * (high - low)]
        return self._text(first + int(draws[3] * (last - first)), last)


def _pieces(text: Documents, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each sentence into equal pieces of at most `most` tokens.

    Returns:
      The position where each piece begins, followed by the end of the text; the index of each document's first piece, followed
      by the number of pieces.
    """
    sizes = np.diff(text.sentences)
    counts = -(-sizes // most)
    first_pieces = np.concatenate([[0], np.cumsum(counts)])
    sentence = np.repeat(np.arange(len(sizes)), counts)
    nth = np.arange(len(sentence)) - first_pieces[sentence]
    starts = text.sentences[sentence] + nth * sizes[sentence] // counts[sentence]
    return np.append(starts, text.sentences[-1]), first_pieces[text.documents]


def _chunks_of_pieces(
    starts: np.ndarray, documents: np.ndarray, room: int
) -> Iterator[tuple[int, int, int]]:
    """Yields chunks of consecutive pieces of one document: at least two pieces, and as many as fit into `room` tokens.

    Yields:
      (first piece, the piece after the last, document).
    """
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
