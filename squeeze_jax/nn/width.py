"""The rule that scales a network's channel counts by a width multiplier."""


def scaled(features: int, width: float, divisor: int = 8) -> int:
    """Returns `features * width`, rounded to a multiple of `divisor`.

    This is the rule in the code of the MobileNet papers: halves are rounded up, the result is at least `divisor`, and it is
    never more than a tenth below the exact product.
    """
    exact = features * width
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * exact else rounded + divisor
