"""Numbers that know how far any correct fp64 evaluation of them may lie from the exact one.

Standard model (Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3): an operation
returns the exact result times (1 + d), |d| <= u = 2^-53. A sum or product that went through n of them is off by
at most gamma(n) = n u / (1 - n u) times the SUM OF THE ABSOLUTE VALUES of its terms, in whatever order it was
added up. exp, log1p, erf and tanh are taken to be good to 4 ulps, the weakest promise of glibc, SLEEF and NumPy.
Data in these tests stay far from underflow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UNIT_ROUNDOFF = 2.0**-53

FUNCTION = 8
"""Error of exp, log1p, erf, tanh in units of u: 4 ulps, an ulp being at most 2 u."""

OWN_ROUNDING = 1.0 + 2.0**-40
"""Errors are computed in fp64 themselves, from fewer than 2^10 nonnegative terms each: relative error below
2^10 u = 2^-43; as much again for the (1 + u) where |value| stands for the exact result of an operation."""


def gamma(operations: float) -> float:
    """n u / (1 - n u)."""
    return operations * UNIT_ROUNDOFF / (1.0 - operations * UNIT_ROUNDOFF)


@dataclass(frozen=True)
class Rounded:
    """value: one correct evaluation; error: how far any of them, this one included, may be from the exact number.

    Two of them are at most 2 * error apart. Plain numbers and arrays beside it are exact.
    """

    value: np.ndarray
    error: np.ndarray

    @property
    def size(self) -> np.ndarray:
        """No correct evaluation is larger in magnitude: it is 2 errors from the value at most."""
        return np.abs(self.value) + 2.0 * self.error

    def __getitem__(self, index: object) -> "Rounded":
        return Rounded(self.value[index], self.error[index])

    def __add__(self, other: "Rounded | np.ndarray | float") -> "Rounded":
        """Errors add up; the result of computed operands is rounded, and lies 2 errors from the value at most."""
        other = exact(other)
        value, carried = self.value + other.value, self.error + other.error
        return _inflated(value, carried + UNIT_ROUNDOFF * (np.abs(value) + 2.0 * carried))

    def __mul__(self, other: "Rounded | np.ndarray | float") -> "Rounded":
        """|A B - a b| <= |a| eB + |b| eA + eA eB, where an exact |a| is at most |value| + eA."""
        other = exact(other)
        carried = (np.abs(self.value) * other.error + np.abs(other.value) * self.error
                   + 3.0 * self.error * other.error)
        return _inflated(self.value * other.value, carried + UNIT_ROUNDOFF * self.size * other.size)

    def __truediv__(self, other: "Rounded | np.ndarray | float") -> "Rounded":
        """|A / B - a / b| = |(A - a) - (a / b) (B - b)| / |B|; no B is nearer to 0 than |value| - 2 errors."""
        other = exact(other)
        least = np.abs(other.value) - 2.0 * other.error
        assert (least > 0.0).all(), "a divisor that could be zero"
        quotient = (np.abs(self.value) + self.error) / least
        carried = (self.error + quotient * other.error) / least
        return _inflated(self.value / other.value, carried + UNIT_ROUNDOFF * self.size / least)

    def clamp(self, low: float, high: float) -> "Rounded":
        """A clamp brings numbers no further apart and rounds nothing."""
        return Rounded(np.clip(self.value, low, high), self.error)

    def function(self, function: Callable[[np.ndarray], np.ndarray], slope: float) -> "Rounded":
        """A function of the library whose derivative is nowhere larger than `slope`."""
        value, carried = function(self.value), slope * self.error
        return _inflated(value, carried + gamma(FUNCTION) * (np.abs(value) + 2.0 * carried))

    def growing(self, function: Callable[[np.ndarray], np.ndarray], operations: float) -> "Rounded":
        """A positive function whose logarithm has no slope above 1: a factor of e^error at most, then rounding."""
        return relative(function(self.value), np.expm1(self.error) + np.exp(self.error) * gamma(operations))

    def total(self, axis: int) -> "Rounded":
        """The sum along an axis, in any order."""
        value, carried = self.value.sum(axis, keepdims=True), self.error.sum(axis, keepdims=True)
        return _inflated(value, carried + gamma(self.value.shape[axis]) * self.size.sum(axis, keepdims=True))


def exact(number: "Rounded | np.ndarray | float") -> Rounded:
    """A number without error."""
    if isinstance(number, Rounded):
        return number
    value = np.asarray(number, dtype=np.float64)
    return Rounded(value, np.zeros_like(value))


def relative(value: np.ndarray, error: np.ndarray) -> Rounded:
    """Off by `error` of the exact number, which is itself at most |value| / (1 - error)."""
    assert (np.asarray(error) < 0.5).all(), "nothing is known of such a number"
    return _inflated(value, np.abs(value) * error / (1.0 - error))


def contraction(pattern: str, left: Rounded, right: np.ndarray, terms: int) -> Rounded:
    """einsum with an exact array: sums of `terms` products in any order."""
    value, carried = np.einsum(pattern, left.value, right), np.einsum(pattern, left.error, np.abs(right))
    return _inflated(value, carried + gamma(terms) * np.einsum(pattern, left.size, np.abs(right)))


def _inflated(value: np.ndarray, error: np.ndarray) -> Rounded:
    return Rounded(value, error * OWN_ROUNDING)
