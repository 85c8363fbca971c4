"""Handwritten digits that are part of scikit-learn: 1,797 images of 8x8 pixels in 17 grey levels, 10 classes, no download.

They are the test set of the UCI dataset "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from squeeze_jax.data.source import Example, Source
from squeeze_jax.data.survey import Survey


def make() -> Source:
    """Returns 1,437 training and 360 evaluation images, with the grey levels 0..16 stretched to 0..255.

    The split is fixed and stratified: with the examples ordered by class, every fifth is for evaluation.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.argsort(digits.target, kind="stable")
    held_out = np.arange(len(order)) % 5 == 0
    train, test = np.sort(order[~held_out]), np.sort(order[held_out])
    return Source(
        label_names=tuple(str(name) for name in digits.target_names),
        channels=1,
        train=_Arrays("digits train", images[train], digits.target[train]),
        eval=_Arrays("digits eval", images[test], digits.target[test]),
        survey=Survey(len(images), {(8, 8): len(images)}, grey=len(images)),
    )


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
