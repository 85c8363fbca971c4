"""The log of a search: the networks that were scored."""

import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from squeeze_jax import files, stop
from squeeze_jax.errors import UserError
from squeeze_jax.jobs._scores import Scorer
from squeeze_jax.jobs._search_problem import Problem
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.space import Arch


class Log:
    """The networks that were scored, in a file of JSON lines: {"options", "score", ...}; larger scores are better.

    Attributes:
      about: dict(step, calibration, examples, name, of): the weights, the examples and the kind of the scores.
      scores: {key of an architecture: (architecture, score)}.
      failed: keys of architectures whose score is not finite; they count as scored, and are never chosen.
    """

    def __init__(
        self,
        path: pathlib.Path,
        problem: Problem,
        scorer: Scorer,
        other: pathlib.Path | None,
    ):
        """Reads the log of this search and another one.

        Args:
          path: the log of this search; it need not exist.
          problem: the search.
          scorer: scores networks.
          other: the log of another search, or None.

        Raises:
          UserError: a log cannot be read, or has a line that is no scored network of the space.
        """
        self._path, self._problem, self._scorer = path, problem, scorer
        calibration, examples = scorer.examples
        self.about = {
            "step": int(scorer.step),
            "calibration": calibration,
            "examples": examples,
            "name": scorer.name,
            "of": scorer.fingerprint,
        }
        self.scores: dict[tuple, tuple[Arch, float]] = {}
        self.failed: set[tuple] = set()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read(path, strict=False)
            _drop_unfinished_line(path)
        if other is not None:
            known = set(self.scores)
            self._read(other, strict=True)
            for key, (arch, score) in self.scores.items():
                if key not in known:
                    self._append(arch, score)

    def _read(self, path: pathlib.Path, strict: bool) -> None:
        """Reads the scores of a log.

        The method ignores scores of other weights, of other examples or of another kind, and prints how many it ignores.

        Args:
          path: of the log.
          strict: whether the last line has to be whole, too.
        """
        others = 0
        try:
            lines = files.read_file(path).decode(errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"cannot read the log {path}: {error.strerror}") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                # Scores of earlier versions do not say of which weights and examples they are.
                about = {"of": ""} | {k: row[k] for k in self.about if k in row}
                score, _ = row["score"], [about[k] for k in self.about]
                if about == self.about:
                    arch = self._arch(row["options"])
                    if type(score) not in (float, int, type(None)):
                        raise ValueError("the score is no number")
                    score = score if score is None else float(score)
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                OverflowError,
                UserError,
            ):
                if number == len(lines) and not strict:
                    continue  # it was stopped while it wrote the line
                other = "leave config.search.log out" if strict else "the file"
                raise UserError(
                    f"{path}: line {number} is no scored network: delete the line, or {other}"
                ) from None
            if about != self.about:
                others += 1
                continue
            self._keep(arch, score)
        if others:
            print(
                f"log        {others} scores in {path} are of other weights, other examples or another score: left out"
            )

    def _arch(self, options: Mapping[str, Sequence]) -> Arch:
        """Returns the canonical architecture of a line's options; raises an error if they are not of the space."""
        space = self._problem.space
        if options.keys() != space.choices.keys():
            raise ValueError("other options")
        arch = space.arch({k: tuple(v) for k, v in options.items()})
        return spaces.unstack(self._problem.canonical(spaces.stack([arch])))[0]

    def score(self, archs: Sequence[Arch], what: str) -> None:
        """Scores those architectures that have no score yet, and logs each at once."""
        known = self.scores.keys() | self.failed
        new = [a for a in archs if spaces.key_of(a) not in known]
        show = progress(len(new), what)
        for number, arch in enumerate(new, 1):
            self.add(arch)
            show(number)

    def add(self, arch: Arch) -> float:
        """Returns the score of an architecture, -inf for one that is not finite; a new one is logged at once.

        Raises:
          Stopped: the run was asked to stop.
        """
        key = spaces.key_of(arch)
        if key not in self.scores and key not in self.failed:
            stop.check()
            score = self._scorer(arch)
            self._keep(arch, score)
            self._append(arch, score if math.isfinite(score) else None)
        return -math.inf if key in self.failed else self.scores[key][1]

    def _keep(self, arch: Arch, score: float | None) -> None:
        """Keeps a score."""
        key = spaces.key_of(arch)
        if score is not None and math.isfinite(score):
            self.scores[key] = arch, score
        else:
            self.failed.add(key)

    def check(self, least: int) -> None:
        """Prints how many scores are not finite; raises a UserError if fewer than `least` are finite."""
        if not self.failed:
            return
        count, total = len(self.failed), len(self.failed) + len(self.scores)
        if len(self.scores) < least:
            raise UserError(
                f"the {self._scorer.name} of {count} of {total} networks is not finite: train the networks further or at a"
                " lower learning rate, or choose another config.search.score"
            )
        print(
            f"warning    the {self._scorer.name} of {count} of {total} networks is not finite: they are left out"
        )

    def _append(self, arch: Arch, score: float | None) -> None:
        """Writes a line of the log."""
        options = {k: list(v) for k, v in self._problem.space.options(arch).items()}
        row = {"options": options, "score": score, **self.about}
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def best(self) -> tuple[Arch, float]:
        """Returns the network with the highest score among those that meet the limits."""
        archs, scores = self.arrays()
        share = np.asarray(self._problem.limits.share(archs))
        if not (share <= 1).any():
            raise UserError(
                f"no network within the limits has a finite {self._scorer.name}: raise the limits, or train the networks further"
            )
        best = int(np.where(share <= 1, scores, -np.inf).argmax())
        return jax.tree.map(lambda a: a[best], archs), float(scores[best])

    def arrays(self, count: int | None = None) -> tuple[Arch, np.ndarray]:
        """Returns (architectures with a leading axis, scores [n]) of all networks, or of the `count` that were scored first."""
        first = itertools.islice(self.scores.values(), count)
        archs, scores = zip(*first, strict=True)
        return spaces.stack(archs), np.asarray(scores)


def _drop_unfinished_line(path: pathlib.Path) -> None:
    """Removes the line that a stopped search has written in part; the next line would continue it."""
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def progress(total: int, what: str) -> Callable[[int], None]:
    """Returns a function of the number of scored networks, which prints it every ten seconds and at the end."""
    begin = shown = time.monotonic()

    def show(number):
        nonlocal shown
        now = time.monotonic()
        if now - shown > 10 or number == total:
            shown = now
            left = (now - begin) / number * (total - number)
            print(
                f"scored     {number} of {total} {what}, {left:.0f} s left", flush=True
            )

    return show
