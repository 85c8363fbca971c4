"""Ranges of values in signatures: `momentum: Rate = 0.9` lets `registry.check` refuse 1.5 before any work starts.

A range is the second part of a `typing.Annotated` type. It is any object with a method `fault(value)`, which returns the
end of an error's sentence, such as "should lie in [0, 1)", or "" for a value inside the range.
"""

import math
from typing import Annotated, NamedTuple

import numpy as np

INT32 = 2**31 - 1
FLOAT32 = 3.4028235e38
SMALLEST = 1.1754944e-38  # positive number of full precision in float32


class Range(NamedTuple):
    """An interval of numbers.

    Attributes:
      low, high: the bounds.
      open_low, open_high: whether the bound itself lies outside.
    """

    low: float = -FLOAT32
    high: float = FLOAT32
    open_low: bool = False
    open_high: bool = False

    def fault(self, value) -> str:
        """Returns what is wrong with a number; "" if it lies in the interval."""
        if isinstance(value, float) and not math.isfinite(value):
            return "should be a finite number"
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if above and below and isinstance(value, float) and 0 < abs(value) < SMALLEST:
            zero = "" if self.open_low and self.low == 0 else "0 or "
            return f"should be {zero}at least {SMALLEST:.1e}, which is float32's smallest number of full precision"
        if above and below and self.open_high and np.float32(value) >= self.high:
            return f"should be further from {_number(self.high)}: it is {_number(self.high)} in float32"
        if above and below and isinstance(value, int) and abs(value) > INT32:
            return f"should be written as {value:.0e}: it is no integer of 32 bits"
        if above and below:
            return ""
        if self.high < INT32:
            return f"should lie in {self}"
        if above:
            return f"should be at most {_number(self.high)}"
        if self.low == 0:
            return "should be positive" if self.open_low else "should not be negative"
        return (
            f"should be {'above' if self.open_low else 'at least'} {_number(self.low)}"
        )

    def __str__(self) -> str:
        """Returns the interval as mathematicians write it, such as [0, 1)."""
        left, right = "[("[self.open_low], "])"[self.open_high]
        return f"{left}{_number(self.low)}, {_number(self.high)}{right}"


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:.8g}"


class Zero:
    """Zero as a special case beside a range, such as "0 for none"."""

    @staticmethod
    def fault(value) -> str:
        """Returns "" for 0."""
        return "" if value == 0 else "should be 0"


class Distinct:
    """A tuple that has nothing twice."""

    @staticmethod
    def fault(value) -> str:
        """Returns the first item that stands in a tuple twice; "" if there is none."""
        for item in value:
            if list(value).count(item) > 1:
                return f"names {item!r} twice: each once"
        return ""


class Filled:
    """A tuple or dict that is not empty, or a text that is not blank."""

    @staticmethod
    def fault(value) -> str:
        """Returns "" for what is not empty."""
        length = len(value.strip() if isinstance(value, str) else value)
        return "" if length else "should not be empty"


class Usable(NamedTuple):
    """A text that the system accepts as a path.

    Attributes:
      optional: whether "" stands for no path.
    """

    optional: bool = False

    def fault(self, value) -> str:
        """Returns what no path can have; "" for a text that can be one."""
        if not value.strip():
            named = self.optional and not value
            return "" if named else "should be a path, not empty"
        if "\0" in value:
            return "should be a path, without the character 0"
        if not value.isprintable() and "\n" in value:
            return "should be a path of one line"
        encoded = value.encode(errors="surrogatepass")
        if len(encoded) > 4095 or max(map(len, encoded.split(b"/"))) > 255:
            return "should be a path: names up to 255 bytes, 4095 in all"
        return ""


Count = Annotated[int, Range(1, INT32)]  # at least 1
Whole = Annotated[int, Range(0, INT32)]  # at least 0
Integer = Annotated[int, Range(-INT32 - 1, INT32)]
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]  # [0, 1]
Rate = Annotated[float, Range(0, 1, open_high=True)]  # [0, 1): dropout, momentum
Part = Annotated[float, Range(0, 1, open_low=True)]  # (0, 1]
Fraction = Annotated[float, Range(0, 1, True, True)]  # (0, 1)
# Statistics of pixels in units of 0..1; beyond them the networks' inputs overflow.
PixelMean = Annotated[float, Range(-1000, 1000)]
PixelStd = Annotated[float, Range(1e-4, 1e4)]

Bits = Annotated[int, Range(1, 64)]
Layers = Annotated[int, Range(1, 1000)]
Strides = Annotated[int, Range(1, 64)]
Multiplier = Annotated[float, Range(0, 100, open_low=True)]  # of channels or layers
Pixels = Annotated[int, Range(1, 16384)]  # of an image's side
Seed = Annotated[int, Range(0, INT32)]
Runs = Annotated[int, Range(1, 1_000_000)]  # of a measurement
Warmups = Annotated[int, Range(0, 1_000_000)]
Seconds = Annotated[float, Range(0, 3600)]
Threads = Annotated[int, Range(0, 256)]  # or processes; 0 for none beside the main one

Name = Annotated[str, Filled()]
PathStr = Annotated[str, Usable()]
OptionalPath = Annotated[str, Usable(optional=True)]
