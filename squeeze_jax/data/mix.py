"""mixup and CutMix on the accelerator, under jit.

mixup (arXiv 1710.09412): x = λ x_i + (1 - λ) x_j, y = λ y_i + (1 - λ) y_j, λ ~ Beta(α, α).
CutMix (arXiv 1905.04899): a box of x_j, of about 1 - λ of the area, is pasted into x_i; y is weighted by the areas.

Each example has its own λ. Its partner is the next example of the batch: the shuffled order makes that choice random, and
devices exchange only one row.
"""

import jax
import jax.numpy as jnp


def augment(key, batch, *, num_classes: int, mixup: float, cutmix: float):
    """Mixes each example with the next one of the batch, by mixup or CutMix.

    If both are on, a random half of the examples is mixed by each. An example stays as it is if it or its neighbour has
    "mask" False.

    Args:
      key: a jax random key.
      batch: dict with "image" [b, h, w, c], "label" int [b], "mask" bool [b]; other entries stay as they are.
      num_classes: the width of the soft labels.
      mixup, cutmix: α of the Beta distributions; 0 is off. With both off, the batch is returned unchanged.

    Returns:
      The batch with "label" float32 [b, num_classes], whose rows sum to 1, and "image" float32 in its old range, or in its
      old dtype if only CutMix is on.
    """
    if not mixup and not cutmix:
        return batch
    images, mask = batch["image"], batch["mask"]
    b, h, w, _ = images.shape
    labels = jax.nn.one_hot(batch["label"], num_classes)
    # A label that is not a class becomes NaN, because it could not be detected after mixing.
    outside = (batch["label"] < 0) | (batch["label"] >= num_classes)
    labels = jnp.where((outside & batch["mask"])[:, None], jnp.nan, labels)
    whole = ~(mask & jnp.roll(mask, -1))
    choose, lam_key, box_key = jax.random.split(key, 3)
    blended, pasted = (images, labels), (images, labels)
    if mixup:
        lam = jax.random.beta(lam_key, mixup, mixup, (b,))
        blended = blend(images, labels, jnp.where(whole, 1.0, lam))
    if cutmix:
        lam = jax.random.beta(lam_key, cutmix, cutmix, (b,))
        pasted = paste(images, labels, boxes(box_key, jnp.where(whole, 1.0, lam), h, w))
    if mixup and cutmix:
        first = jax.random.bernoulli(choose, 0.5, (b,))
        images = jnp.where(first[:, None, None, None], blended[0], pasted[0])
        labels = jnp.where(first[:, None], blended[1], pasted[1])
    else:
        images, labels = blended if mixup else pasted
    return {**batch, "image": images, "label": labels}


def blend(images, labels, lam):
    """Returns images [b, h, w, c] and labels [b, classes] mixed by mixup with λ [b]; images become float32."""
    pixel = lam[:, None, None, None]
    images = images.astype(jnp.float32)
    images = pixel * images + (1 - pixel) * jnp.roll(images, -1, axis=0)
    lam = lam[:, None]
    return images, lam * labels + (1 - lam) * jnp.roll(labels, -1, axis=0)


def paste(images, labels, boxes):
    """Returns images [b, h, w, c] and labels [b, classes] mixed by CutMix.

    Args:
      images, labels: of the batch.
      boxes: int [b, 4]: top, bottom, left, right; bottom and right are excluded.
    """
    _, h, w, _ = images.shape
    top, bottom, left, right = (boxes[:, i, None, None] for i in range(4))
    y, x = jnp.arange(h)[None, :, None], jnp.arange(w)[None, None, :]
    inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)  # [b, h, w]
    images = jnp.where(inside[..., None], jnp.roll(images, -1, axis=0), images)
    share = jnp.mean(inside, axis=(1, 2), dtype=jnp.float32)[:, None]
    return images, (1 - share) * labels + share * jnp.roll(labels, -1, axis=0)


def boxes(key, lam, h: int, w: int):
    """Returns random boxes, int [b, 4], whose sides are sqrt(1 - λ) of the image's, clipped at its border; λ is [b]."""
    cut = jnp.sqrt(1 - lam)
    across, down = jax.random.split(key)

    def span(key, length):
        middle = jax.random.randint(key, lam.shape, 0, length)
        half = (cut * length).astype(int) // 2
        return jnp.clip(middle - half, 0, length), jnp.clip(middle + half, 0, length)

    top, bottom = span(down, h)
    left, right = span(across, w)
    return jnp.stack([top, bottom, left, right], axis=1)
