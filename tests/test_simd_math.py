"""The elementary functions of the SIMD vocabulary against higher precision, with bounds in ulp."""

import math

import numpy as np
import pytest

pytest.importorskip("numba")
from simd_harness import LANES, POINTER, build

# Asserted bounds in ulp, which the docstrings of simd_math.py state.
ULP = {
    "exp": 1.1,
    "log": 1.0,
    "log1p": 1.0,
    "expm1": 2.0,
    "tanh": 3.0,
    "erf": 1.5,
    "sigmoid": 2.5,
    "sin": 1.6,
    "cos": 1.6,
}
EXTENDED = np.finfo(np.longdouble).nmant > 60


def exact(name: str, x: np.ndarray) -> np.ndarray:
    """The function in extended precision (erf: float64)."""
    x = x.astype(np.longdouble)
    if name == "erf":
        return np.vectorize(math.erf, otypes=[float])(x.astype(float)).astype(np.longdouble)
    if name == "sigmoid":
        z = np.exp(-np.abs(x))
        return np.where(x < 0, z, 1) / (1 + z)
    return getattr(np, name)(x)


def ulp_error(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance in units of the last place of the rounded expected value."""
    rounded = expected.astype(got.dtype)
    spacing = np.spacing(np.abs(np.where(np.isfinite(rounded), rounded, 1)))
    error = np.abs(got.astype(np.longdouble) - expected) / spacing
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    return np.where(same, 0, np.where(np.isfinite(error), error, np.inf)).astype(float)


def special_values(dtype) -> list:
    info = np.finfo(dtype)
    positive = [0.0, 1.0, 0.5, 2.0, info.tiny, info.smallest_subnormal, info.tiny / 4, info.max]
    positive += [info.eps, math.pi, 1e5, math.inf, math.nan]
    return positive + [-x for x in positive]


def wide_sample(dtype, count: int) -> np.ndarray:
    """Uniform on small, middle and the exponential's range, and all magnitudes of both signs."""
    generator = np.random.default_rng(1)
    info = np.finfo(dtype)
    largest = 1.2 * math.log(float(info.max))
    with np.errstate(over="ignore"):
        parts = [generator.uniform(-bound, bound, count) for bound in (1, 10, largest)]
        magnitude = generator.uniform(
            math.log(float(info.tiny)) - 12, math.log(float(info.max)), count
        )
        parts.append(np.exp(magnitude) * generator.choice([-1, 1], count))
        x = np.concatenate([special_values(dtype), *parts]).astype(dtype)
    return x[: x.size // 16 * 16]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elementary_functions(lanes, dtype):
    names = list(ULP)
    pointer = POINTER[dtype]
    body = f"x, y = {pointer}(xa), {pointer}(ya)\nfor i in range(0, n, {lanes}):\n"
    body += "    a = v.load(x, i)\n"
    body += "".join(f"    v.store(y, {k}*n + i, v.{name}(a))\n" for k, name in enumerate(names))
    kernel = build(lanes, "xa ya n", body)
    x = wide_sample(dtype, 1 << 16 if lanes == 8 else 1 << 12)
    y = np.zeros((len(names), x.size), dtype)
    kernel(x, y, x.size)
    with np.errstate(all="ignore"):
        for name, got in zip(names, y):
            supported = np.ones(x.size, bool)
            if name in ("sin", "cos"):
                supported = ~(np.abs(x) >= 2.0**40)
                assert np.isnan(got[~supported]).all()
            error = ulp_error(got, exact(name, x))[supported]
            bound = ULP[name] + (0 if EXTENDED or dtype == "float32" else 1)
            worst = error.argmax()
            assert error[worst] <= bound, (name, x[supported][worst], got[supported][worst])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pow(dtype):
    pointer = POINTER[dtype]
    body = f"""
x = {pointer}(xa)
y = {pointer}(ya)
z = {pointer}(za)
for i in range(0, n, 8):
    v.store(z, i, v.pow(v.load(x, i), v.load(y, i)))
for i in range(n):
    v.store_scalar(z, n + i, v.pow(v.load_scalar(x, i), v.load_scalar(y, i)))
"""
    kernel = build(8, "xa ya za n", body)
    generator = np.random.default_rng(2)
    info = np.finfo(dtype)
    special = special_values(dtype) + [3.0, -3.0, 4.0, -0.5, 1.5, 1e10]
    grid = np.array(np.meshgrid(special, special)).reshape(2, -1)
    count = 40000
    base = np.exp(generator.uniform(math.log(float(info.tiny)), math.log(float(info.max)), count))
    exponent = generator.uniform(-1.05, 1.05, count) * math.log(float(info.max)) / np.log(base)
    small = generator.uniform(-4, 4, count), generator.integers(-8, 9, count)
    near_one = generator.uniform(0.5, 2, count), generator.uniform(-30, 30, count)
    x = np.concatenate([grid[0], base, small[0], near_one[0]]).astype(dtype)
    y = np.concatenate([grid[1], exponent, small[1], near_one[1]]).astype(dtype)
    size = x.size // 8 * 8
    x, y = x[:size], y[:size]
    z = np.zeros((2, size), dtype)
    kernel(x, y, z, size)
    with np.errstate(all="ignore"):
        expected = np.power(x.astype(np.longdouble), y.astype(np.longdouble))
        error = ulp_error(z[0], expected)
        bound = 1.0 if dtype == "float32" else 2 + np.abs(y) / 8
        worst = np.nan_to_num(error - bound, nan=np.inf).argmax()
        good = error <= bound
        good |= np.isnan(bound) & (error == 0)
        assert good.all(), (x[worst], y[worst], z[0, worst], expected[worst], error[worst])
    np.testing.assert_array_equal(z[0], z[1])
