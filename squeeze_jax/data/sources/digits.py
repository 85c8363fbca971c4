"""Handwritten digits that are part of scikit-learn: 1,797 images of 8x8 pixels in 17 grey levels, 10 classes, no download.

They are the test set of the UCI dataset "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998).
"""

import dataclasses
import gzip
import importlib.util
import pathlib
from collections.abc import Sequence

import numpy as np

from squeeze_jax.data.source import Example, Source
from squeeze_jax.data.survey import Survey

_FILE = "datasets/data/digits.csv.gz"  # within scikit-learn's package


def make() -> Source:
    """Returns 1,437 training and 360 evaluation images, with the grey levels 0..16 stretched to 0..255.

    The split is fixed and stratified: with the examples ordered by class, every fifth is for evaluation.
    """
    pixels, labels = _pixels_and_labels()
    images = np.round(pixels * (255 / 16)).astype(np.uint8)[..., None]
    order = np.argsort(labels, kind="stable")
    held_out = np.arange(len(order)) % 5 == 0
    train, test = np.sort(order[~held_out]), np.sort(order[held_out])
    return Source(
        label_names=tuple(map(str, range(10))),
        channels=1,
        train=_Arrays("digits train", images[train], labels[train]),
        eval=_Arrays("digits eval", images[test], labels[test]),
        survey=Survey(len(images), {(8, 8): len(images)}, grey=len(images)),
    )


def _pixels_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Returns grey levels 0..16 [1797, 8, 8] and labels [1797].

    scikit-learn takes a second to import, so its file is read directly where it is known to be.
    """
    package = importlib.util.find_spec("sklearn")
    file = pathlib.Path(package.origin if package else "").parent / _FILE
    if not file.is_file():
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target
    with gzip.open(file, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.int64)
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]


@dataclasses.dataclass(frozen=True)
class _Arrays:
    name: str
    images: np.ndarray  # uint8 [n, h, w, c]
    labels: np.ndarray  # [n]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> list[Example]:
        return [
            Example(self.images[i], int(self.labels[i]), f"{self.name}[{i}]")
            for i in indices
        ]
