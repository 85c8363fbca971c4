"""Channel counts of a network made wider or narrower."""


def scaled(features: int, width: float, divisor: int = 8) -> int:
    """Returns `features * width` rounded to a multiple of `divisor`, never more than a tenth below it.

    The rule of the MobileNet papers' code: halves round up, and at least `divisor` channels stay.
    """
    wanted = features * width
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * wanted else rounded + divisor
