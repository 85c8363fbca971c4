"""Raw text to pretrain on: masked tokens, the order of sentences, tokens that were replaced, or the next token.

Files of plain text, UTF-8, gzipped or not; a blank line ends a document. Without an order a sequence is a block of the text,
see `documents.Blocks`; with one it has two segments, see `documents.Pairs`. Tokens are masked on the accelerator, anew in
every epoch, and in evaluation always the same, so that two runs compare; see `masking`.
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
from squeeze_jax.errors import UserError
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
      files: text to train on.
      tokenizer: a folder or a vocabulary, see `tokens.load`.
      length: tokens of a sequence, with special tokens.
      eval: text to evaluate on, or the share of the documents of `files` that is kept for that.
      kind: "masked": encoders that fill in masked tokens; "replaced": ELECTRA, arXiv 2003.10555; "causal": decoders that tell
        the next token.
      order: of "masked", whether there are two segments, and what is told of them: whether they have changed places, or
        whether the second is from elsewhere.
      sentences: what ends a sentence, where segments are cut: "lines", or also the "marks" . ! ? within them.
      share: of the tokens that are chosen.
      predictions: at most so many tokens of a sequence are chosen, and scores are computed for so many alone; None for `share`
        of `length`. 0 chooses as None does and computes the scores of all tokens, which is several times slower in a
        small network.
      masked, random: shares of the chosen tokens that become [MASK], and a random token; the others stay. None for 0.8 and
        0.1, of "replaced" for 0.85 and 0.
      whole_words: whether all tokens of a word are chosen, or none.
      threads: that prepare batches.

    Raises:
      UserError: a file that is not there, a value out of range, or text that is too little for what shall be done with it.
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
    usual = (0.85, 0.0) if kind == "replaced" else (0.8, 0.1)
    how = None
    if kind != "causal":
        how = masking.make(
            loaded,
            share=share,
            positions=predictions or math.ceil(share * length),
            masked=usual[0] if masked is None else masked,
            random=usual[1] if random is None else random,
            whole_words=whole_words,
        )
    elif length < 2:
        raise UserError("config.data.length = 1 has no next token: at least 2")

    def cut(split, use):
        if order == "none":
            return Blocks(split, loaded, length, bare=kind == "causal")
        return Pairs(split, loaded, length, order, use)

    host = masking.on_host(how) if how else None
    splits = _read(files, eval, loaded, sentences, kind == "causal")
    train, held = (
        Examples(cut(split, use), length, loaded.pad or 0, host)
        for split, use in zip(splits, ("to train on", "to evaluate on"), strict=True)
    )
    gathers = how is not None and predictions != 0 and how.positions < length
    return Pretraining(loaded, length, kind, order, how, gathers, train, held, threads)


def _read(files, eval, tokenizer, sentences, newlines):
    """Documents to train and to evaluate on."""

    def read(names):
        names = [names] if isinstance(names, str) else names
        return documents.read(names, tokenizer, sentences=sentences, newlines=newlines)

    if isinstance(eval, float | int):
        return documents.hold_out(read(files), eval)
    return read(files), read(eval)


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Text to pretrain on, see `pipeline.Data`; `make` builds it.

    Batches are those of `documents.Examples` and "index" int64 [b]; `masked` adds "targets" and "chosen" [b, p], and
    "positions" int32 [b, p] where only those are scored.

    Attributes:
      tokenizer, length, kind, order: see `make`.
      how: tokens are masked; None for "causal".
      gathers: whether only chosen positions are scored.
      train_reader, eval_reader: the splits.
      threads: see `make`.
    """

    reads = "tokens"
    noun = "sequence"
    metrics = "pretraining"
    label_names = ()

    tokenizer: tokens.Tokenizer
    length: int
    kind: Kind
    order: str
    how: masking.Masking | None
    gathers: bool
    train_reader: Examples
    eval_reader: Examples
    threads: int

    @property
    def fixed(self) -> bool:
        return self.kind == "causal"

    @property
    def describe(self) -> str:
        what = {
            "masked": "masked tokens",
            "replaced": "replaced tokens",
            "causal": "next tokens",
        }[self.kind]
        order = "" if self.order == "none" else f", {self.order.replace('_', ' ')}"
        return f"{self.num_train:,} train + {self.num_eval:,} test sequences of {self.length} tokens: {what}{order}"

    @property
    def model(self) -> dict[str, Any]:
        masked = "masked_lm" if self.order == "none" else "pretraining"
        tasks = {"masked": masked, "replaced": "pretraining", "causal": "causal_lm"}
        return {"task": tasks[self.kind]}

    @property
    def objective(self) -> dict[str, str]:
        loss = "masked_lm" if self.order == "none" else "pretraining_loss"
        names = {"masked": loss, "replaced": "replaced", "causal": "causal_lm"}
        return {"name": f"losses.{names[self.kind]}"}

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.size

    @property
    def num_train(self) -> int:
        return len(self.train_reader)

    @property
    def num_eval(self) -> int:
        return len(self.eval_reader)

    @property
    def exported(self) -> dict[str, jax.ShapeDtypeStruct]:
        return text.exported_inputs(self.length)

    def train(
        self, batch: int, seed: int, start: int = 0, process: tuple[int, int] = (0, 1)
    ) -> pipeline.Batches:
        """The endless stream of shuffled batches, see `pipeline.training`; tokens are not masked yet."""
        return pipeline.training(
            self.train_reader, batch, seed, start, process, threads=self.threads
        )

    def eval(self, batch: int, process: tuple[int, int] = (0, 1)) -> pipeline.Batches:
        """Every evaluation example once and in order, see `pipeline.evaluation`; tokens are masked."""
        return pipeline.evaluation(
            self.eval_reader, batch, process, threads=self.threads
        )

    def specs(self, rows: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """All batches have one shape."""
        like = self.eval_reader.empty(1)
        return [
            {
                k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype)
                for k, v in like.items()
            }
        ]

    def masked(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A batch with masked tokens and what they were, as "draw" decides; as it is where these are there, or for "causal"."""
        batch = dict(batch)
        if self.how is None or "targets" in batch:
            return batch
        original = batch["original"]
        batch["tokens"], at, targets, chosen = masking.apply(
            batch["draw"], original, batch["attended"], self.how
        )
        if self.gathers:
            return batch | {"positions": at, "targets": targets, "chosen": chosen}

        def spread(at, chosen):
            where = jnp.where(chosen, at, self.length)
            return jnp.zeros(self.length, bool).at[where].set(True, mode="drop")

        return batch | {"targets": original, "chosen": jax.vmap(spread)(at, chosen)}

    def augment(self, key: jax.Array | None, batch: dict) -> dict:
        """See `masked`: all that is random is a function of the batch, and so of the seed and the position in the stream."""
        del key
        return self.masked(batch)

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What an encoder is called with; tokens of "original" text are masked if they are not yet."""
        if "original" in batch:
            batch = self.masked(batch)
        x = text.inputs(batch)
        names = ("positions", "targets", "chosen")
        wanted = names if self.kind == "replaced" else names[:1]
        return x | {name: batch[name] for name in wanted if name in batch}

    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        return jax.eval_shape(self.inputs, self.specs(1)[0])

    def predict(self, given: Sequence[str], run: Callable) -> Iterator[str]:
        """Of each text the five likeliest tokens for each [MASK], or after its end; or how likely each token was replaced.

        Of a text that is too long the end is left out, or the beginning where the question is what comes after it.

        Raises:
          UserError: no text; after all answers, texts that are empty or lack a masked token.
        """
        if not given:
            raise UserError("the job predict needs texts: run.py --job=predict TEXT")
        reasons = []
        for each in given:
            row, reason = answering.attempt(self._row, each)
            if not reason:
                logits = self._logits(row, run)
                yield each
                yield from self._told(row, logits)
            elif len(given) > 1:
                yield reason
            reasons += [reason] if reason else []
        answering.check(reasons, len(given), "text")

    def _row(self, given: str) -> np.ndarray:
        """Returns the tokens that the network reads of a text, int [l], or raises a UserError."""
        ids, _ = self.tokenizer.encode(given)
        if not len(ids):
            raise UserError(f"{given!r} is an empty text: there is nothing to tell")
        row = ids[-self.length :]
        if self.kind != "causal":
            row, _ = self.tokenizer.single(ids, self.length)
        if self.kind == "masked" and self.tokenizer.mask not in row:
            mask = self.tokenizer.token(self.tokenizer.mask)
            raise UserError(
                f"{given!r} has no {mask} within {self.length} tokens: write it where a token shall be found"
            )
        return row

    def _logits(self, row: np.ndarray, run: Callable) -> Any:
        """Returns what the network answers to one row of tokens, padded to the length of the data."""
        filled = np.full(self.length, self.tokenizer.pad or 0, np.int32)
        filled[: len(row)] = row
        attended = (np.arange(self.length) < len(row)).astype(np.int32)
        segments = np.zeros(self.length, np.int32)
        batch = {"tokens": filled, "segments": segments, "attended": attended}
        return run({key: array[None] for key, array in batch.items()})

    def _told(self, row, logits) -> Iterator[str]:
        if self.kind == "replaced":
            shares = np.asarray(jax.nn.sigmoid(logits["replaced"]))[0]
            for id, share in zip(row, shares, strict=False):
                yield f"  {share:6.1%}  {self.tokenizer.token(id)}"
            return
        if isinstance(logits, Mapping):
            logits = logits["masked_lm"]
        places = [len(row) - 1]
        if self.kind == "masked":
            places = np.flatnonzero(row == self.tokenizer.mask)
        for place in places:
            shares = np.asarray(
                jax.nn.softmax(jnp.asarray(logits[0, place], jnp.float32))
            )
            best = np.argsort(-shares)[:5]
            found = (f"{self.tokenizer.token(i)} {shares[i]:.1%}" for i in best)
            yield "  " + ", ".join(found)
