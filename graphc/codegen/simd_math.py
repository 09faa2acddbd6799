"""Elementary functions as polynomials on SIMD values, in float32 and float64.

Every function takes and gives `Value`s of one float dtype and shape and is free of branches, so
that a tile's elements interleave.  The error bounds in the docstrings are asserted by
tests/test_simd.py against higher precision.  Sources: Cephes (S. Moshier), fdlibm (Sun Microsystems
1993, with the float32 versions of FreeBSD msun), Muller, "Handbook of Floating-Point Arithmetic",
2nd ed., sections 4.7 (error-free sums) and 10 (reduction and evaluation).
"""

from __future__ import annotations

import math

from graphc.codegen.simd_values import Value, fma, select

_INFINITY = math.inf
_NAN = math.nan


class _Format:
    """The constants of a float format that the formulas need."""

    def __init__(self, mantissa: int, bias: int, ln2: tuple[float, float], tiny: float):
        self.mantissa = mantissa  # stored mantissa bits
        self.bias = bias
        self.ln2_high, self.ln2_low = ln2  # the high part times any exponent is exact
        self.tiny = tiny  # the smallest normal number
        # Adding it to |t| < 2^(mantissa-1) rounds t to an integer and leaves it in the low bits,
        # which saves conversions (AVX2 has none between float64 and int64) and is defined for NaN.
        self.magic = 1.5 * 2.0**mantissa


_FORMATS = {
    "float32": _Format(23, 127, (6.9314575195e-01, 1.4286067653e-06), 2.0**-126),
    "float64": _Format(
        52, 1023, (6.93147180369123816490e-01, 1.90821492927058770002e-10), 2.0**-1022
    ),
}


def _format(x: Value) -> _Format:
    return _FORMATS[x.emitter.dtype]


def _polynomial(x: Value, coefficients) -> Value:
    """Horner's scheme with fma; coefficients from the constant term up."""
    *rest, last = coefficients
    result = x.emitter.constant(last)
    for coefficient in reversed(rest):
        result = fma(result, x, coefficient)
    return result


def _absolute(x: Value) -> Value:
    return x.emitter.call("fabs", x)


def _copy_sign(magnitude: Value, sign: Value) -> Value:
    return magnitude.emitter.call("copysign", magnitude, sign)


def _clamp(x: Value, low: float, high: float) -> Value:
    """x within [low, high]; NaN passes."""
    x = select(x > high, high, x)
    return select(x < low, low, x)


def _round_to_integer(t: Value, magic: float) -> tuple[Value, Value]:
    """The nearest integer to t as a float and as an integer."""
    shifted = t + magic
    return shifted - magic, shifted.bits() - t.emitter.constant(magic).bits()


def _power_of_two(n: Value) -> Value:
    """2^n as a float from an integer n within the normal range of exponents."""
    wide = n.emitter.dtype == "int64"
    mantissa, bias = (52, 1023) if wide else (23, 127)
    return ((n + bias) << mantissa).as_float()


# exp(r) - 1 - r = r^2 q(r): Taylor's series, whose first dropped term on |r| <= ln(2)/2 is below
# 2^-27 (float32) and 2^-57 (float64) of the result.
_EXP = {
    "float32": [1 / math.factorial(k) for k in range(2, 8)],
    "float64": [1 / math.factorial(k) for k in range(2, 14)],
}


def _expm1_reduced(x: Value, low: Value | None = None) -> tuple[Value, Value, Value]:
    """(exp(r) - 1, n as a float, n as an integer) with x + low = n ln 2 + r.

    |r| <= ln(2)/2, found with ln 2 in two parts (Cody and Waite).
    """
    form = _format(x)
    n_float, n = _round_to_integer(x * (1 / math.log(2)), form.magic)
    r = fma(n_float, -form.ln2_high, x)
    r = fma(n_float, -form.ln2_low, r)
    if low is not None:
        r = r + low
    return fma(r * r, _polynomial(r, _EXP[x.emitter.dtype]), r), n_float, n


def exp(x: Value) -> Value:
    """e^x, within 1.1 ulp, gradual underflow included."""
    return _exp_sum(x)


def _exp_sum(x: Value, low: Value | None = None) -> Value:
    """exp(x + low) for a low part far below x."""
    form = _format(x)
    x = _clamp(x, *((-104.0, 89.0) if form.bias == 127 else (-746.0, 710.0)))
    p, n_float, n = _expm1_reduced(x, low)
    # The scale is applied in two halves, neither of which leaves the normal range.
    _, half = _round_to_integer(n_float * 0.5, form.magic)
    return (p + 1) * _power_of_two(half) * _power_of_two(n - half)


def expm1(x: Value) -> Value:
    """e^x - 1, within 2 ulp."""
    form = _format(x)
    reduced = _clamp(x, *((-20.0, 89.0) if form.bias == 127 else (-40.0, 710.0)))
    p, _, n = _expm1_reduced(reduced)
    half_scale = _power_of_two(n - 1)
    return 2 * fma(half_scale, p, half_scale - 0.5)


def sigmoid(x: Value) -> Value:
    """1 / (1 + e^-x), within 2.5 ulp; written in e^-|x|, which neither overflows nor cancels."""
    z = exp(-_absolute(x))
    return select(x < 0, z, 1) / (z + 1)


def tanh(x: Value) -> Value:
    """tanh x = -m / (2 + m) for m = e^(-2|x|) - 1, with the sign of x; within 3 ulp."""
    m = expm1(-2 * _absolute(x))
    return _copy_sign(-m / (m + 2), x)


# log(1+f) = f - f^2/2 + s (f^2/2 + R(s^2)), s = f/(2+f): fdlibm e_log.c, FreeBSD e_logf.c.
_LOG = {
    "float32": [0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841],
    "float64": [
        6.666666666666735130e-01,
        3.999999999940941908e-01,
        2.857142874366239149e-01,
        2.222219843214978396e-01,
        1.818357216161805012e-01,
        1.531383769920937332e-01,
        1.479819860511658591e-01,
    ],
}
_HALF_SQRT = {"float32": 0x3F3504F3, "float64": 0x3FE6A09E667F3BCD}  # the bits of sqrt(1/2)


def _split_exponent(x: Value) -> tuple[Value, Value]:
    """(k as a float, m) with x = 2^k m and m in [sqrt(1/2), sqrt(2)), for a positive normal x."""
    form = _format(x)
    low = _HALF_SQRT[x.emitter.dtype]
    bits = x.bits()
    one = form.bias << form.mantissa
    shifted = bits + (one - low)
    m = ((shifted & ((1 << form.mantissa) - 1)) + low).as_float()
    magic = x.emitter.constant(form.magic).bits()
    k = ((shifted >> form.mantissa) - form.bias + magic).as_float() - form.magic
    return k, m


def _log_sum(f: Value, k: Value, correction: Value | None = None) -> Value:
    """k ln 2 + log(1+f) + correction, small terms first."""
    form = _format(f)
    s = f / (f + 2)
    z = s * s
    half_square = f * f * 0.5
    tail = s * fma(z, _polynomial(z, _LOG[f.emitter.dtype]), half_square)
    low = k * form.ln2_low
    if correction is not None:
        low = low + correction
    return fma(k, form.ln2_high, f - (half_square - (tail + low)))


def log(x: Value) -> Value:
    """Natural logarithm, within 1 ulp, denormals included."""
    form = _format(x)
    denormal = x < form.tiny
    up = form.mantissa + 2
    k, m = _split_exponent(select(denormal, x * 2.0**up, x))
    k = k - select(denormal, x.emitter.constant(up), 0)
    result = _log_sum(m - 1, k)
    result = select(x < _INFINITY, result, x)
    result = select(x.equals(0), -_INFINITY, result)
    return select(x < 0, _NAN, result)


def log1p(x: Value) -> Value:
    """log(1+x), within 1 ulp; what rounding 1+x lost (Knuth's TwoSum) is added as c/(1+x)."""
    u = x + 1
    added = u - 1
    lost = (1 - (u - added)) + (x - added)
    k, m = _split_exponent(u)
    small = k.equals(0)
    result = _log_sum(select(small, x, m - 1), k, select(small, 0, lost / u))
    result = select(x < _INFINITY, result, x)
    result = select(x.equals(-1), -_INFINITY, result)
    return select(x < -1, _NAN, result)


# erf x = x + x p(x^2) for |x| below the split, else 1 - exp(-|x| + |x| q(|x|)), the form of N.
# Juffa's public domain erff (2018), whose float32 coefficients these are.  The float64 ones are
# near-minimax fits (Lawson's iterated least squares in 60 digits): relative errors of erf 2^-56.9
# and 2^-61.6.
_ERF_SPLIT = {"float32": 475 / 512, "float64": 1.0}
_ERF_ONE = {"float32": 4.0, "float64": 6.0}  # from here erf rounds to 1
_ERF_SMALL = {
    "float32": [
        1.28379166e-1,
        -3.76125336e-1,
        1.12819925e-1,
        -2.67681349e-2,
        4.99119423e-3,
        -5.96761703e-4,
    ],
    "float64": [
        0.12837916709551256,
        -0.37612638903183515,
        0.11283791670944077,
        -0.02686617064309368,
        0.005223977605968349,
        -0.0008548325921941707,
        0.00012055293351704925,
        -1.4924707894348918e-05,
        1.6447076265977577e-06,
        -1.6205883670939845e-07,
        1.3709093594294721e-08,
        -7.775899816224435e-10,
    ],
}
_ERF_LARGE = {
    "float32": [
        -1.28717512e-1,
        -6.34846687e-1,
        -1.06777877e-1,
        2.42546219e-2,
        -3.88396438e-3,
        3.83197126e-4,
        -1.72853470e-5,
    ],
    "float64": [
        -0.128379201506657,
        -0.6366193604578991,
        -0.10277491935356745,
        0.0191365838475438,
        0.0001891557869976418,
        -0.0016594293166138643,
        0.0005379489567130471,
        3.265833814850246e-05,
        -0.00011710819760513643,
        6.779128231378902e-05,
        -2.5451495032778953e-05,
        7.147861247340225e-06,
        -1.5596531367664184e-06,
        2.655957055909085e-07,
        -3.479290062209861e-08,
        3.394162470570517e-09,
        -2.3243737581252948e-10,
        9.971194574519488e-12,
        -2.0155426435437278e-13,
    ],
}


def erf(x: Value) -> Value:
    """Error function, within 1.5 ulp."""
    dtype = x.emitter.dtype
    magnitude = _absolute(x)
    t = _clamp(magnitude, 0.0, _ERF_ONE[dtype])
    large = 1 - exp(fma(t, _polynomial(t, _ERF_LARGE[dtype]), -t))
    small = fma(x, _polynomial(x * x, _ERF_SMALL[dtype]), x)
    return select(magnitude > _ERF_SPLIT[dtype], _copy_sign(large, x), small)


# sin and cos on [-pi/4, pi/4]: Cephes sinf.c; fdlibm k_sin.c and k_cos.c.
_SIN = {
    "float32": [-1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4],
    "float64": [
        -1.66666666666666324348e-01,
        8.33333333332248946124e-03,
        -1.98412698298579493134e-04,
        2.75573137070700676789e-06,
        -2.50507602534068634195e-08,
        1.58969099521155010221e-10,
    ],
}
_COS = {
    "float32": [4.166664568298827e-002, -1.388731625493765e-003, 2.443315711809948e-005],
    "float64": [
        4.16666666666666019037e-02,
        -1.38888888888741095749e-03,
        2.48015872894767294178e-05,
        -2.75573143513906633035e-07,
        2.08757232129817482790e-09,
        -1.13596475577881948265e-11,
    ],
}
_HALF_PI = (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591833e-33)
_TRIGONOMETRIC_LIMIT = 2.0**40


def _reduce_half_pi(x: Value) -> tuple[Value, Value]:
    """(r, n) with x = n pi/2 + r, found in float64 with pi/2 in two or three parts."""
    wide = x.convert("float64")
    wide = select(_absolute(wide) < _TRIGONOMETRIC_LIMIT, wide, _NAN)
    n_float, n = _round_to_integer(wide * (2 / math.pi), _FORMATS["float64"].magic)
    r = wide
    for part in _HALF_PI[: 2 if x.emitter.dtype == "float32" else 3]:
        r = fma(n_float, -part, r)
    return r.convert(x.emitter.dtype), n


def _sine(x: Value, quadrant: int) -> Value:
    r, n = _reduce_half_pi(x)
    n = n + quadrant
    if x.emitter.dtype == "float32":
        n = n.convert("int32")
    z = r * r
    sine = fma(r * z, _polynomial(z, _SIN[x.emitter.dtype]), r)
    half = z * 0.5
    rounded = 1 - half
    cosine = rounded + fma(z * z, _polynomial(z, _COS[x.emitter.dtype]), (1 - rounded) - half)
    result = select((n & 1).equals(0), sine, cosine)
    sign_bit = (n >> 1) << (_format(x).mantissa + _format(x).bias.bit_length() + 1)
    return (result.bits() ^ sign_bit).as_float()


def sin(x: Value) -> Value:
    """Sine, within 1.6 ulp for |x| < 2^40 (1e12); NaN beyond (that needs Payne and Hanek)."""
    return _sine(x, 0)


def cos(x: Value) -> Value:
    """Cosine, within 1.6 ulp for |x| < 2^40; NaN beyond."""
    return _sine(x, 1)


def pow(x: Value, y: Value) -> Value:
    """x^y with the special cases of IEEE 754-2008 section 9.2.1, which are numpy's.

    float32 is computed in float64: within 1 ulp.  float64: relative error below (2 + |y|/8) 2^-52.
    """
    if x.emitter.dtype == "float32":
        return _pow(x.convert("float64"), y.convert("float64")).convert("float32")
    return _pow(x, y)


def _pow(x: Value, y: Value) -> Value:
    high, low = _log_pair(_absolute(x))
    product = y * high
    rest = fma(y, low, fma(y, high, -product))
    # Where the product is infinite or far out of exp's range the rest may be NaN and does not
    # matter.
    magnitude = _exp_sum(product, select(_absolute(product) < 1000, rest, 0))
    rounded = y.emitter.call("rint", y)
    half = y * 0.5
    odd = rounded.equals(y) & y.emitter.call("rint", half).differs(half)
    negative = x.bits() < 0  # -0.0 counts
    result = select(negative & odd, -magnitude, magnitude)
    result = select((x < 0) & (x > -_INFINITY) & rounded.differs(y), _NAN, result)
    one = y.equals(0) | x.equals(1) | (x.equals(-1) & _absolute(y).equals(_INFINITY))
    return select(one, 1, result)


def _log_pair(x: Value) -> tuple[Value, Value]:
    """log(x) for x >= 0 as an unevaluated sum with an absolute error near 2^-57.

    fdlibm's formula with the large terms added exactly: f - f^2/2 and k ln2_high by Dekker's and
    Knuth's sums.
    """
    form = _format(x)
    denormal = x < form.tiny
    up = form.mantissa + 2
    k, m = _split_exponent(select(denormal, x * 2.0**up, x))
    k = k - select(denormal, x.emitter.constant(up), 0)
    f = m - 1
    s = f / (f + 2)
    z = s * s
    half_square = f * f * 0.5
    half_square_low = fma(f * 0.5, f, -half_square)
    tail = s * fma(z, _polynomial(z, _LOG[x.emitter.dtype]), half_square)
    main = f - half_square
    main_low = (f - main) - half_square
    scaled = k * form.ln2_high
    total = scaled + main
    from_main = total - scaled
    total_low = (scaled - (total - from_main)) + (main - from_main)
    low = total_low + main_low - half_square_low + (tail + k * form.ln2_low)
    high = total + low
    low = low - (high - total)
    ordinary = (x > 0) & (x < _INFINITY)
    special = select(x.equals(0), -_INFINITY, x)
    return select(ordinary, high, special), select(ordinary, low, 0)
