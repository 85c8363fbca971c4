"""Classifies image files with the trained network: the five likeliest labels of each."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.jobs import evaluate, export
from squeeze_jax.jobs._experiment import Built

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
BATCH = 32


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints the top five of each image in `inputs`, files or folders.

    Raises:
      UserError: no input, a file that is missing or no image, an empty folder, or no checkpoint.
    """
    export.alone("predict")
    files = find(inputs)
    images = [built.data.decode(path) for path in files]
    classify = jax.jit(export.live(built, evaluate.trained(built, workdir)))
    names = built.data.label_names
    for begin in range(0, len(files), BATCH):
        some = np.stack(images[begin : begin + BATCH])
        probability = np.asarray(jax.nn.softmax(classify(some).astype(jnp.float32)))
        for path, row in zip(files[begin : begin + BATCH], probability, strict=True):
            best = np.argsort(-row)[:5]
            print(
                f"{path}\n"
                + "\n".join(f"  {row[i]:6.1%}  {name(names, i)}" for i in best)
            )


def find(inputs: Sequence[str]) -> list[pathlib.Path]:
    """The image files among files and folders (searched in depth), in order."""
    if not inputs:
        raise UserError(
            "the job predict needs image files or folders: run.py --job=predict --workdir=DIR PHOTO.jpg"
        )
    files = []
    for each in map(pathlib.Path, inputs):
        if not each.exists():
            raise UserError(f"no such file or folder: {each}")
        found = (
            [p for p in sorted(each.rglob("*")) if p.suffix.lower() in SUFFIXES]
            if each.is_dir()
            else [each]
        )
        if not found:
            raise UserError(f"{each} holds no image (looked for {' '.join(SUFFIXES)})")
        files += found
    return files


def name(names: Sequence[str], label: int) -> str:
    """A label's name; a network may have more classes than the data names."""
    return names[label] if label < len(names) else f"class {label}"
