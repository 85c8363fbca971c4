"""Pretraining on raw text: networks predict masked tokens, the order of sentences, replaced tokens, or the next token.

The files are plain UTF-8 text, gzipped or not; a blank line ends a document. A sequence is a block of the text (see
`documents.Blocks`), or two segments if the order of sentences is predicted too (see `documents.Pairs`). Tokens are masked on
the accelerator, anew in every epoch (see `masking`). In evaluation the same tokens are always masked, so that runs can be
compared.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.data import answering, documents, masking, pipeline, text, tokens
from squeeze_jax.data.documents import Blocks, Examples, Pairs
from squeeze_jax.errors import UserError, shown
from squeeze_jax.ranges import Count, Finite, Part, PathStr, Share, Threads, Whole

Kind = Literal["masked", "replaced", "causal"]


def make(
    files: PathStr | tuple[PathStr, ...],
    tokenizer: PathStr,
    length: Count = 128,
    *,
    eval: PathStr | tuple[PathStr, ...] | Finite = 0.05,
    kind: Kind = "masked",
    order: Literal["none", "sentence_order", "next_sentence"] = "none",
    sentences: documents.Sentences = "lines",
    share: Part = 0.15,
    predictions: Whole | None = None,
    masked: Share | None = None,
    random: Share | None = None,
    whole_words: bool = False,
    threads: Threads = 2,
) -> "Pretraining":
    """Reads and tokenizes text; the parameters are the keys of `config.data`.

    Args:
      files: text files to train on.
      tokenizer: a folder with the files of a tokenizer, or one of them: tokenizer.json, vocab.txt (WordPiece), or vocab.json
        beside merges.txt (byte-level BPE).
      length: tokens of a sequence, special tokens included.
      eval: text files to evaluate on, or the fraction of the documents in `files` that is held out for evaluation.
      kind: the networks and their task. "masked": encoders predict masked tokens; "replaced": ELECTRA, arXiv 2003.10555;
        "causal": decoders predict the next token.
      order: for kind = "masked", the second task. "none": only masked tokens are predicted. "sentence_order": predicts whether
        two segments were swapped; "next_sentence": predicts whether the second segment is from another document.
      sentences: "lines" if a sentence is a line; "marks" if . ! ? within a line also end sentences. Segments are cut at the
        ends of sentences.
      share: the fraction of the tokens that is chosen, for the network to predict.
      predictions: the largest number of chosen tokens in a sequence; logits are computed for these alone. None means `share`
        of `length`. 0 chooses as many as None but computes the logits of all tokens, which is several times slower in a small
        network.
      masked: the fraction of the chosen tokens that become [MASK]; None means 0.8, and for kind = "replaced" 0.85.
      random: the fraction of the chosen tokens that become a random token; None means 0.1, and for kind = "replaced" 0.
      whole_words: whether either all tokens of a word are chosen, or none.
      threads: the number of threads that prepare batches.

    Raises:
      UserError: a file is missing, a value is out of range, or there is too little text.
    """
    if kind != "masked" and order != "none":
        raise UserError(
            f"config.data.order = {order!r} is for kind = 'masked', not for {kind!r}: leave it out"
        )
    if predictions is not None and not 0 <= predictions <= length:
        raise UserError(
            f"config.data.predictions = {predictions} should be 0 to length = {length}"
        )
    if threads < 0:
        raise UserError(f"config.data.threads = {threads} should not be negative")
    loaded = tokens.load(tokenizer)
    defaults = (0.85, 0.0) if kind == "replaced" else (0.8, 0.1)
    masking_options = None
    if kind != "causal":
        masking_options = masking.make(
            loaded,
            share=share,
            positions=predictions or math.ceil(share * length),
            masked=defaults[0] if masked is None else masked,
            random=defaults[1] if random is None else random,
            whole_words=whole_words,
        )
    elif length < 2:
        raise UserError("config.data.length = 1 has no next token: at least 2")

    def cut(split, use):
        if order == "none":
            return Blocks(split, loaded, length, bare=kind == "causal")
        return Pairs(split, loaded, length, order, use)

    mask_on_host = masking.on_host(masking_options) if masking_options else None
    splits = _read_splits(files, eval, loaded, sentences, kind == "causal")
    train, evaluated = (
        Examples(cut(split, use), length, loaded.pad or 0, mask_on_host)
        for split, use in zip(splits, ("to train on", "to evaluate on"), strict=True)
    )
    gathers = (
        masking_options is not None
        and predictions != 0
        and masking_options.positions < length
    )
    return Pretraining(
        loaded, length, kind, order, masking_options, gathers, train, evaluated, threads
    )


def _read_splits(files, eval, tokenizer, sentences, newlines):
    """Returns the documents to train on and those to evaluate on."""

    def read(names):
        names = [names] if isinstance(names, str) else names
        return documents.read(names, tokenizer, sentences=sentences, newlines=newlines)

    if isinstance(eval, float | int):
        return documents.hold_out(read(files), eval)
    return read(files), read(eval)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Text to pretrain on, see `pipeline.Data`; `make` builds it.

    A batch has the arrays of `documents.Examples` and "index" int64 [b]. `masked` adds "targets" int32 and "chosen" bool. If
    logits are computed for chosen positions alone, both are [b, p], and "positions" int32 [b, p] is added; otherwise both are
    [b, l].

    Attributes:
      tokenizer, length, kind, order, threads: see `make`.
      masking: the options of masking; None for "causal".
      gathers: whether logits are computed for chosen positions alone.
      train_reader, eval_reader: the splits.
    """

    reads = "tokens"
    noun = "sequence"
    metrics = "pretraining"
    label_names = ()

    tokenizer: tokens.Tokenizer
    length: int
    kind: Kind
    order: str
    masking: masking.Masking | None
    gathers: bool
    train_reader: Examples
    eval_reader: Examples
    threads: int

    @property
    def fixed(self) -> bool:
        """Whether a training example is the same each time it comes; masked tokens are not."""
        return self.kind == "causal"

    @property
    def describe(self) -> str:
        """A phrase about the dataset."""
        targets = {
            "masked": "masked tokens",
            "replaced": "replaced tokens",
            "causal": "next tokens",
        }[self.kind]
        order = "" if self.order == "none" else f", {self.order.replace('_', ' ')}"
        return f"{self.num_train:,} train + {self.num_eval:,} test sequences of {self.length} tokens: {targets}{order}"

    @property
    def model(self) -> dict[str, Any]:
        """Options of the model that follow from the data, see `pipeline.Data`."""
        masked = "masked_lm" if self.order == "none" else "pretraining"
        tasks = {"masked": masked, "replaced": "pretraining", "causal": "causal_lm"}
        return {"task": tasks[self.kind]}

    @property
    def objective(self) -> dict[str, str]:
        """The default loss, see `pipeline.Data`."""
        loss = "masked_lm" if self.order == "none" else "pretraining_loss"
        names = {"masked": loss, "replaced": "replaced", "causal": "causal_lm"}
        return {"name": f"losses.{names[self.kind]}"}

    @property
    def vocabulary(self) -> int:
        """The number of token ids."""
        return self.tokenizer.size

    @property
    def num_train(self) -> int:
        """The number of training sequences."""
        return len(self.train_reader)

    @property
    def num_eval(self) -> int:
        """The number of evaluation sequences."""
        return len(self.eval_reader)

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of an exported file's inputs, without the batch axis."""
        return text.exported_inputs(self.length)

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> pipeline.Batches:
        """Returns the endless stream of shuffled batches, see `pipeline.training`; tokens are not masked yet."""
        return pipeline.training(
            self.train_reader, batch, seed, start, process, threads=self.threads
        )

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> pipeline.Batches:
        """Returns every evaluation example once and in order, see `pipeline.evaluation`; tokens are already masked."""
        return pipeline.evaluation(
            self.eval_reader, batch, process, threads=self.threads
        )

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """Returns the one shape that all batches of `rows` rows have."""
        example = self.eval_reader.empty(1)
        return [
            {
                k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype)
                for k, v in example.items()
            }
        ]

    def masked(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns a batch with masked tokens and their targets, chosen by its "draw"; runs under jit.

        A batch stays as it is if it has targets already, or for kind = "causal".
        """
        batch = dict(batch)
        if self.masking is None or "targets" in batch:
            return batch
        original = batch["original"]
        batch["tokens"], positions, targets, chosen = masking.apply(
            batch["draw"], original, batch["attended"], self.masking
        )
        if self.gathers:
            return batch | {
                "positions": positions,
                "targets": targets,
                "chosen": chosen,
            }

        def spread(positions, chosen):
            destinations = jnp.where(chosen, positions, self.length)
            flags = jnp.zeros(self.length, bool)
            return flags.at[destinations].set(True, mode="drop")

        chosen = jax.vmap(spread)(positions, chosen)
        return batch | {"targets": original, "chosen": chosen}

    def augment(self, key: jax.Array | None, batch: dict) -> dict:
        """Masks the tokens of a training batch, see `masked`.

        The batch holds its own random numbers, so the result depends only on the seed and the position in the stream.
        """
        del key
        return self.masked(batch)

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the network inputs of a batch; masks the tokens if the batch has "original" and no targets yet.

        Besides those of `text.inputs` they are "positions", and for "replaced" also "targets" and "chosen", if present.
        """
        if "original" in batch:
            batch = self.masked(batch)
        x = text.inputs(batch)
        names = ("positions", "targets", "chosen")
        extra = names if self.kind == "replaced" else names[:1]
        return x | {name: batch[name] for name in extra if name in batch}

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the network inputs for a batch of one example."""
        return jax.eval_shape(self.inputs, self.specs(1)[0])

    def predict(self, arguments: Sequence[str], run: Callable) -> Iterator[str]:
        """Yields the network's predictions for each text.

        For "masked" they are the five likeliest tokens at each [MASK], for "causal" those after the end of the text, and for
        "replaced" the probability that each token was replaced. A text that is too long loses its end, or for "causal" its
        beginning.

        Args:
          arguments: the texts.
          run: see `pipeline.Data`.

        Raises:
          UserError: there is no text; or, after all predictions, a text is empty or lacks a mask token.
        """
        if not arguments:
            raise UserError("the job predict needs texts: run.py --job=predict TEXT")
        reasons = []
        for line in arguments:
            row, reason = answering.attempt(self._row, line)
            if not reason:
                logits = self._logits(row, run)
                yield line
                yield from self._lines(row, logits)
            elif len(arguments) > 1:
                yield reason
            reasons += [reason] if reason else []
        answering.check(reasons, len(arguments), "text")

    def _row(self, line: str) -> np.ndarray:
        """Returns the tokens of a text that the network reads, int [l], or raises a UserError."""
        ids, _ = self.tokenizer.encode(line)
        if not len(ids):
            raise UserError(f"{line!r} is an empty text: there is nothing to tell")
        row = ids[-self.length :]
        if self.kind != "causal":
            row, _ = self.tokenizer.single(ids, self.length)
        if self.kind == "masked" and self.tokenizer.mask not in row:
            mask = self.tokenizer.token(self.tokenizer.mask)
            raise UserError(
                f"{shown(line, 200)} has no {mask} within {self.length} tokens: write it where a token shall be found"
            )
        return row

    def _logits(self, row: np.ndarray, run: Callable) -> Any:
        """Returns the network's logits for one row of tokens, padded to `length`."""
        filled = np.full(self.length, self.tokenizer.pad or 0, np.int32)
        filled[: len(row)] = row
        attended = (np.arange(self.length) < len(row)).astype(np.int32)
        segments = np.zeros(self.length, np.int32)
        batch = {"tokens": filled, "segments": segments, "attended": attended}
        return run({key: array[None] for key, array in batch.items()})

    def _lines(self, row, logits) -> Iterator[str]:
        if self.kind == "replaced":
            probabilities = np.asarray(jax.nn.sigmoid(logits["replaced"]))[0]
            for id, probability in zip(row, probabilities, strict=False):
                yield f"  {probability:6.1%}  {self.tokenizer.token(id)}"
            return
        if isinstance(logits, Mapping):
            logits = logits["masked_lm"]
        positions = [len(row) - 1]
        if self.kind == "masked":
            positions = np.flatnonzero(row == self.tokenizer.mask)
        for position in positions:
            probabilities = np.asarray(
                jax.nn.softmax(jnp.asarray(logits[0, position], jnp.float32))
            )
            best = np.argsort(-probabilities)[:5]
            names = (f"{self.tokenizer.token(i)} {probabilities[i]:.1%}" for i in best)
            yield "  " + ", ".join(names)
