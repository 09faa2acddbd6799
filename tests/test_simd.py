"""The SIMD vocabulary against NumPy, for 4, 8 and 16 lanes.

Every kernel costs 0.05 to 0.3 s to compile, so each evaluates many functions: one row of the output
for each.
"""

import ctypes
import mmap
import sys

import numpy as np
import pytest

pytest.importorskip("numba")
from simd_harness import LANES, POINTER, build

from graphc.codegen import simd

EXTENDED = np.finfo(np.longdouble).nmant > 60

# -- element-wise functions

FLOAT_FUNCTIONS = {
    "v.add(a, b)": lambda a, b: a + b,
    "v.sub(a, b)": lambda a, b: a - b,
    "v.mul(a, b)": lambda a, b: a * b,
    "v.div(a, b)": lambda a, b: a / b,
    "v.neg(a)": lambda a, b: -a,
    "v.maximum(a, b)": np.maximum,
    "v.minimum(a, b)": np.minimum,
    "v.relu(a)": lambda a, b: np.where(a < 0, a.dtype.type(0), a),
    "v.abs(a)": lambda a, b: np.abs(a),
    "v.sqrt(a)": lambda a, b: np.sqrt(a),
    "v.reciprocal(a)": lambda a, b: 1 / a,
    "v.rsqrt(a)": lambda a, b: 1 / np.sqrt(a),
    "v.floor(a)": lambda a, b: np.floor(a),
    "v.ceil(a)": lambda a, b: np.ceil(a),
    "v.rint(a)": lambda a, b: np.rint(a),
    "v.sign(a)": lambda a, b: np.sign(a),
    "v.select(v.lt(a, b), a, 7)": lambda a, b: np.where(a < b, a, 7),
    "v.select(v.le(a, b), a, 7)": lambda a, b: np.where(a <= b, a, 7),
    "v.select(v.gt(a, b), a, 7)": lambda a, b: np.where(a > b, a, 7),
    "v.select(v.ge(a, b), a, 7)": lambda a, b: np.where(a >= b, a, 7),
    "v.select(v.eq(a, b), 3.0, a)": lambda a, b: np.where(a == b, 3, a),
    "v.select(v.ne(a, b), 3.0, a)": lambda a, b: np.where(a != b, 3, a),
    "v.select(v.and_(v.lt(a, 1), v.gt(b, -1)), a, b)": lambda a, b: np.where(
        (a < 1) & (b > -1), a, b
    ),
    "v.select(v.or_(v.lt(a, 1), v.gt(b, -1)), a, b)": lambda a, b: np.where(
        (a < 1) | (b > -1), a, b
    ),
    "v.select(v.xor_(v.lt(a, 1), v.gt(b, -1)), a, b)": lambda a, b: np.where(
        (a < 1) ^ (b > -1), a, b
    ),
    "v.select(v.not_(v.lt(a, 1)), a, b)": lambda a, b: np.where(a < 1, b, a),
    "v.fma(a, 0.1, 2)": lambda a, b: (a.astype(np.longdouble) * a.dtype.type(0.1) + 2).astype(
        a.dtype
    ),
}


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float_functions(lanes, dtype):
    pointer = POINTER[dtype]
    lines = [
        f"a_, b_, y = {pointer}(aa), {pointer}(ba), {pointer}(ya)",
        f"for i in range(0, n, {lanes}):",
    ]
    lines += ["    a, b = v.load(a_, i), v.load(b_, i)"]
    lines += [f"    v.store(y, {k}*n + i, {text})" for k, text in enumerate(FLOAT_FUNCTIONS)]
    # the same on scalars
    lines += ["a, b = v.load_scalar(a_, 5), v.load_scalar(b_, 5)"]
    rows = len(FLOAT_FUNCTIONS)
    for k, text in enumerate(FLOAT_FUNCTIONS):
        lines += [f"v.store_scalar(y, {rows}*n + {k}, {text})"]
    kernel = build(lanes, "aa ba ya n", "\n".join(lines))
    generator = np.random.default_rng(3)
    special = np.array([0.0, -0.0, 1, -1, 2.5, -2.5, 0.5, np.inf, -np.inf, np.nan])
    grid = np.array(np.meshgrid(special, special)).reshape(2, -1)
    random = generator.normal(size=(2, 108)) * 10
    a, b = np.concatenate([grid, random], 1).astype(dtype)
    n = a.size
    assert n % 16 == 0
    y = np.zeros((rows + 1, n), dtype)
    kernel(a, b, y, n)
    with np.errstate(all="ignore"):
        for k, (text, function) in enumerate(FLOAT_FUNCTIONS.items()):
            expected = function(a, b)
            if "fma" in text and not EXTENDED and dtype == "float64":
                continue
            np.testing.assert_array_equal(y[k], expected, err_msg=text)
            np.testing.assert_array_equal(y[rows, k], expected[5], err_msg=f"scalar {text}")


def rotate(x, n):
    x = x.astype(np.uint32)
    return ((x << np.uint32(n)) | (x >> np.uint32(32 - n))).astype(np.int32)


INTEGER_FUNCTIONS = {
    "v.add(a, b)": lambda a, b: a + b,
    "v.sub(a, b)": lambda a, b: a - b,
    "v.mul(a, b)": lambda a, b: a * b,
    "v.fma(a, b, 3)": lambda a, b: a * b + 3,
    "v.neg(a)": lambda a, b: -a,
    "v.abs(a)": lambda a, b: np.abs(a),
    "v.sign(a)": lambda a, b: np.sign(a),
    "v.relu(a)": lambda a, b: np.maximum(a, 0),
    "v.maximum(a, b)": np.maximum,
    "v.minimum(a, b)": np.minimum,
    "v.bit_xor(a, b)": lambda a, b: a ^ b,
    "v.and_(a, b)": lambda a, b: a & b,
    "v.or_(a, b)": lambda a, b: a | b,
    "v.not_(a)": lambda a, b: ~a,
    "v.shift_left(a, 5)": lambda a, b: a << 5,
    "v.shift_right(a, 5)": lambda a, b: (a.astype(np.uint32) >> np.uint32(5)).astype(np.int32),
    "v.rotate_left(a, 13)": lambda a, b: rotate(a, 13),
    "v.select(v.lt(a, b), a, 7)": lambda a, b: np.where(a < b, a, 7),
    "v.select(v.ge(a, 5), a, b)": lambda a, b: np.where(a >= 5, a, b),
    "v.select(v.eq(a, b), 1, 2)": lambda a, b: np.where(a == b, 1, 2),
    "v.select(v.ne(a, 0), a, b)": lambda a, b: np.where(a != 0, a, b),
}


@pytest.mark.parametrize("lanes", LANES)
def test_integer_functions_and_casts(lanes):
    rows = len(INTEGER_FUNCTIONS)
    setup = "\n".join(f"to_{name} = v.cast('{name}')" for name in POINTER)
    lines = ["a_, b_, y = i32(aa), i32(ba), i32(ya)", "u = f32(ua)", "m = b8(ma)", "f = f32(fa)"]
    lines += ["d = f64(da)", "q = i64(qa)"]
    lines += [f"for i in range(0, n, {lanes}):", "    a, b = v.load(a_, i), v.load(b_, i)"]
    for k, text in enumerate(INTEGER_FUNCTIONS):
        text = text.replace("1, 2)", "to_int32(1), to_int32(2))")
        lines += [f"    v.store(y, {k}*n + i, {text})"]
    lines += [
        "    v.store(u, i, v.uint32_to_unit(a))",
        "    v.store(m, i, to_bool(a))",
        "    v.store(f, i, to_float32(a))",
        "    v.store(f, n + i, to_float32(v.load(m, i)))",
        "    v.store(d, i, to_float64(a))",
        "    v.store(q, i, to_int64(v.mul(to_float64(a), 1.7)))",
        "    x = v.mul(v.load(f, i), 1e-3)",
        f"    v.store(y, {rows}*n + i, to_int32(x))",
        f"    v.store(y, {rows + 1}*n + i, v.add(v.lane_index(), i))",
        f"    v.store(y, {rows + 2}*n + i, to_int32(v.tail_mask(n - 3 - i)))",
        "    v.store(m, n + i, to_bool(x))",
        "for i in range(n):",
        "    v.store_scalar(u, n + i, v.uint32_to_unit(v.load_scalar(a_, i)))",
        "    v.store_scalar(m, 2*n + i, to_bool(v.load_scalar(a_, i)))",
        "    v.store_scalar(f, 2*n + i, to_float32(v.load_scalar(m, i)))",
    ]
    kernel = build(lanes, "aa ba ya ua ma fa da qa n", "\n".join(lines), setup)
    generator = np.random.default_rng(4)
    a, b = generator.integers(-(2**31), 2**31, (2, 64)).astype(np.int32)
    a[:8] = [0, 1, -1, 2, -2, 5, 6, 2**31 - 1]
    b[::3] = a[::3]
    n = a.size
    y = np.zeros((rows + 3, n), np.int32)
    u = np.zeros((2, n), np.float32)
    m = np.zeros((3, n), np.uint8)
    f = np.zeros((3, n), np.float32)
    d, q = np.zeros(n), np.zeros(n, np.int64)
    kernel(a, b, y, u, m, f, d, q, n)
    with np.errstate(over="ignore"):
        for k, (text, function) in enumerate(INTEGER_FUNCTIONS.items()):
            np.testing.assert_array_equal(y[k], function(a, b), err_msg=text)
    unit = ((a.astype(np.uint32) >> np.uint32(8)) * 2.0**-24).astype(np.float32)
    np.testing.assert_array_equal(u, [unit, unit])
    assert 0 <= u.min() and u.max() < 1
    np.testing.assert_array_equal(m, [a != 0, a != 0, a != 0])
    np.testing.assert_array_equal(f, [a.astype(np.float32), a != 0, a != 0])
    np.testing.assert_array_equal(d, a)
    np.testing.assert_array_equal(q, (a * 1.7).astype(np.int64))
    np.testing.assert_array_equal(y[rows], (f[0] * np.float32(1e-3)).astype(np.int32))
    np.testing.assert_array_equal(y[rows + 1], np.arange(n))
    np.testing.assert_array_equal(y[rows + 2], np.arange(n) < n - 3)


@pytest.mark.parametrize("lanes", LANES)
def test_mixtures_of_scalars_vectors_and_tiles(lanes):
    setup = """
load2 = v.load_tile((2,), "vector")
store2 = v.store_tile((2,), "vector")
store_scalar2 = v.store_tile((2,), "scalar")
full2 = v.full(2)
"""
    body = """
x, y = f32(xa), f32(ya)
L = (lanes,)
a = v.load(x, 0)
t = load2(x, 0, L)
s = v.load_scalar(x, 3)
store2(y, 0, L, v.add(t, a))
store2(y, 2*lanes, L, v.fma(t, s, 0.5))
store2(y, 4*lanes, L, v.mul((s, s), a))
store2(y, 6*lanes, L, v.select(v.lt(s, 0.0), t, 1.0))
store2(y, 8*lanes, L, v.select(v.lt(t, a), s, a))
store2(y, 10*lanes, L, full2(2.0))
store2(y, 12*lanes, L, v.exp((a, a)))
store_scalar2(y, 14*lanes, (1,), v.add((s, s), (1.0, 2.0)))
v.store_scalar(y, 14*lanes + 2, v.mul(s, 0.1))
v.store(y, 15*lanes, s)
"""
    kernel = build(lanes, "xa ya lanes", body, setup)
    x = np.random.default_rng(5).normal(size=2 * lanes).astype(np.float32)
    y = np.zeros((16, lanes), np.float32)
    kernel(x, y, lanes)
    t, a, s = x.reshape(2, lanes), x[:lanes], x[3]
    fused = (t.astype(float) * s + 0.5).astype(np.float32)
    choice = t if s < 0 else np.ones_like(t)
    expected = [t + a, fused, [s * a, s * a], choice, np.where(t < a, s, a), np.full_like(t, 2)]
    np.testing.assert_array_equal(y[:12], np.concatenate(expected))
    np.testing.assert_allclose(y[12:14], [np.exp(a)] * 2, rtol=3e-7)
    np.testing.assert_array_equal(y[14, :3], [s + 1, s + 2, s * np.float32(0.1)])
    np.testing.assert_array_equal(y[15], np.full(lanes, s))


# -- memory


def sample(dtype: str, count: int) -> np.ndarray:
    generator = np.random.default_rng(6)
    if dtype == "bool":
        return generator.integers(0, 2, count).astype(np.uint8)
    return generator.integers(1, 1000, count).astype(dtype)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", list(POINTER))
def test_loads_and_stores_with_tails(lanes, dtype):
    """Tails of every length, negative and too long ones included, with guards around."""
    setup = """
vector_tail = v.load_tile((2,), "vector_tail")
strided_tail = v.load_tile((2,), "strided_tail")
store_vector_tail = v.store_tile((2,), "vector_tail")
store_strided_tail = v.store_tile((2,), "strided_tail")
"""
    body = f"""
x, y = {POINTER[dtype]}(xa), {POINTER[dtype]}(ya)
o = 1
v.store(y, o, v.load(x, 1)); o += size
v.store(y, o, v.load_splat(x, 2)); o += size
v.store(y, o, v.load_strided(x, 1, 3)); o += size
v.store_scalar(y, o, v.load_scalar(x, 5)); o += size
v.store_strided(y, o, 2, v.load(x, 3)); o += size
v.store(y, o, v.load_scalar(x, 4)); o += size
for n in range(-1, {lanes} + 3):
    v.store(y, o, v.load_tail(x, 3, n)); o += size
    v.store(y, o, v.load_strided_tail(x, 3, 2, n)); o += size
    v.store_tail(y, o, v.load(x, 7), n); o += size
    v.store_strided_tail(y, o, 3, v.load(x, 7), n); o += size
    t = vector_tail(x, 1, (5,), n)
    v.store(y, o, t[0]); o += size
    v.store(y, o, t[1]); o += size
    t = strided_tail(x, 1, (5,), 2, n)
    v.store(y, o, t[0]); o += size
    v.store(y, o, t[1]); o += size
    t = (v.load(x, 2), v.load(x, 9))
    store_vector_tail(y, o, (size,), t, n); o += 2*size
    store_strided_tail(y, o, (size,), t, 2, n); o += 2*size
"""
    kernel = build(lanes, "xa ya size", body, setup)
    size = 3 * lanes + 2
    x = sample(dtype, 64)
    guard = 9
    # bool memory holds 0 and 1; the guard value 9 must survive beside them
    rows = 6 + 12 * (lanes + 4)
    y = np.full(1 + rows * size, guard, x.dtype)
    kernel(x, y, size)
    expected = []

    def row(values, step=1):
        line = np.full(size, guard, x.dtype)
        line[: len(values) * step : step] = values
        expected.append(line)

    def tail(start, n, step=1):
        line = np.zeros(lanes, x.dtype)
        count = max(0, min(n, lanes))
        line[:count] = x[start : start + count * step : step]
        row(line)

    every = np.arange(lanes)
    row(x[1 + every])
    row(np.full(lanes, x[2]))
    row(x[1 + 3 * every])
    row(x[5:6])
    row(x[3 + every], 2)
    row(np.full(lanes, x[4]))
    for n in range(-1, lanes + 3):
        count = max(0, min(n, lanes))
        tail(3, n)
        tail(3, n, 2)
        row(x[7 : 7 + count])
        row(x[7 : 7 + count], 3)
        tail(1, n)
        tail(6, n)
        tail(1, n, 2)
        tail(6, n, 2)
        row(x[2 : 2 + count])
        row(x[9 : 9 + count])
        row(x[2 : 2 + count], 2)
        row(x[9 : 9 + count], 2)
    assert y[0] == guard
    np.testing.assert_array_equal(y[1:].reshape(rows, size), expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_tail_loads_touch_nothing_beyond(lanes, dtype):
    """The array ends where a page without access begins: a read beyond it would end the process."""
    body = f"""
x, y = {POINTER[dtype]}(xa), {POINTER[dtype]}(ya)
for n in range(-1, {lanes} + 1):
    m = max(n, 0)
    v.store(y, 0, v.load_tail(x, end - m, n))
    v.store(y, 0, v.load_strided_tail(x, end - (m - 1)*3 - 1, 3, n))
    v.store_tail(x, end - m, v.load(y, 0), n)
    v.store_strided_tail(x, end - (m - 1)*3 - 1, 3, v.load(y, 0), n)
"""
    kernel = build(lanes, "xa ya end", body)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    view = np.frombuffer(memory, np.uint8)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert mprotect(view.ctypes.data + page, page, 0) == 0
    try:
        item = 1 if dtype == "bool" else 4
        kernel(view.ctypes.data, np.zeros(64, np.float32), page // item)
    finally:
        assert mprotect(view.ctypes.data + page, page, 3) == 0


@pytest.mark.parametrize("lanes", LANES)
def test_tiles(lanes):
    setup = """
load_a = v.load_tile((2, 3), "vector", fixed=(None, 16))
load_b = v.load_tile((2,), "splat")
load_s = v.load_tile((3,), "scalar", fixed=(7,))
load_t = v.load_tile((2,), "strided")
load_one = v.load_tile((), "vector")
store_a = v.store_tile((3, 2), "vector", fixed=(None, None))
store_2 = v.store_tile((2,), "vector", fixed=(16,))
store_t = v.store_tile((2,), "strided")
store_one = v.store_tile((1, 1), "vector")
store_3 = v.store_tile((3,), "vector", fixed=(16,))
outer = v.tile_fma([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
turn = v.pick([5, 0, 4, 1, 3, 2])
pair = v.pick((1, 1))
join = v.join(2, 1)
groups = [[0, 1, 2], [5, 4, 3]]
total, product, largest, least = (v.tile_combine(n, groups) for n in ("sum", "prod", "max", "min"))
position = v.tile_argmax(groups)
"""
    body = """
x, y, z = f32(xa), f32(ya), i32(za)
a = load_a(x, 0, (48, 16))
b = load_b(x, 3, (5,))
acc = outer(a, a, b)
store_a(y, 0, (32, 16), turn(acc))
store_2(y, 96, (16,), pair(b))
store_2(y, 128, (16,), load_t(x, 2, (1,), 3))
store_one(y, 160, (0, 0), load_one(x, 5, ()))
store_t(y, 176, (1,), pair(a), 2)
s = load_s(x, 1, (7,))
store_3(y, 208, (16,), s)
store_3(y, 256, (16,), join(b, (s[2],)))
store_2(y, 304, (16,), total(a))
store_2(y, 336, (16,), product(a))
store_2(y, 368, (16,), largest(a))
store_2(y, 400, (16,), least(a))
best, where = position(a)
store_2(y, 432, (16,), best)
store_2(z, 0, (16,), where)
v.prefetch(x, 64)
"""
    kernel = build(lanes, "xa ya za", body, setup)
    generator = np.random.default_rng(7)
    x = generator.integers(-3, 4, 128).astype(np.float32)
    a = x[:96].reshape(6, 16)
    a[0, :3] = [np.nan, 1, 2]
    a[1, :3] = [5, np.nan, 2]
    a[2, :3] = [np.nan, np.nan, 2]
    y = np.zeros((29, 16), np.float32)
    z = np.zeros((2, 16), np.int32)
    kernel(x, y, z)
    a = a[:, :lanes]
    got = y[:, :lanes]
    b = x[[3, 8]]
    acc = a + a * np.repeat(b, 3)[:, None]
    np.testing.assert_array_equal(got[:6], acc[[5, 0, 4, 1, 3, 2]])
    np.testing.assert_array_equal(got[6:8], np.full((2, lanes), b[1]))
    step = 3 * np.arange(lanes)
    np.testing.assert_array_equal(got[8:10], [x[2 + step], x[3 + step]])
    np.testing.assert_array_equal(got[10], x[5 : 5 + lanes])
    np.testing.assert_array_equal(y.reshape(-1)[176 : 176 + 2 * lanes], np.repeat(a[1], 2))
    s = x[[1, 8, 15]]
    np.testing.assert_array_equal(got[13:16], np.repeat(s, lanes).reshape(3, lanes))
    joined = np.array([*b, s[2]])
    np.testing.assert_array_equal(got[16:19], np.repeat(joined, lanes).reshape(3, lanes))
    groups = np.stack([a[[0, 1, 2]], a[[5, 4, 3]]])
    np.testing.assert_array_equal(got[19:21], groups.sum(1))
    np.testing.assert_array_equal(got[21:23], groups.prod(1))
    np.testing.assert_array_equal(got[23:25], groups.max(1))
    np.testing.assert_array_equal(got[25:27], groups.min(1))
    np.testing.assert_array_equal(got[27:29], groups.max(1))
    np.testing.assert_array_equal(z[:, :lanes], groups.argmax(1))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_lane_reductions_and_transposition(lanes, dtype):
    sizes = (1, 2, 3, lanes, lanes + 1)
    names = ("sum", "prod", "max", "min")
    setup = "\n".join(
        [f"r_{name} = v.reduce_lanes('{name}')" for name in (*names, "any", "all")]
        + [f"l{n} = v.load_tile(({n},), 'vector', fixed=({lanes},))" for n in sizes]
        + [f"s{n} = v.store_tile(({n},), 'scalar', fixed=(1,))" for n in sizes]
    )
    pointer = POINTER[dtype]
    lines = [f"x, y, t = {pointer}(xa), {pointer}(ya), {pointer}(ta)", "b = b8(ba)", "o = 0"]
    for name in names:
        for n in sizes:
            lines += [f"s{n}(y, o, (1,), r_{name}(l{n}(x, 0, (0,))))", f"o += {n}"]
        lines += [f"v.store_scalar(y, o, r_{name}(v.load(x, 0)))", "o += 1"]
    lines += [f"v.transpose_block(x, 0, {lanes}, t, 3, {lanes + 5})"]
    lines += ["m = v.gt(v.load(x, 0), limit)"]
    lines += ["v.store_scalar(b, 0, r_any(m))", "v.store_scalar(b, 1, r_all(m))"]
    kernel = build(lanes, "xa ya ta ba limit", "\n".join(lines), setup)
    x = np.random.default_rng(8).integers(1, 4, (lanes + 1, lanes)).astype(dtype)
    rows = len(names) * (sum(sizes) + 1)
    y = np.zeros(rows, dtype)
    t = np.zeros(3 + lanes * (lanes + 5), dtype)
    for limit, some, every in ((0, 1, 1), (9, 0, 0), (1, (x[0] > 1).any(), (x[0] > 1).all())):
        b = np.full(3, 7, np.uint8)
        kernel(x, y, t, b, limit)
        np.testing.assert_array_equal(b, [some, every, 7])
    folded = {"sum": x.sum(1), "prod": x.prod(1), "max": x.max(1), "min": x.min(1)}
    expected = [folded[name][:n] for name in names for n in (*sizes, 1)]
    np.testing.assert_array_equal(y, np.concatenate(expected))
    block = t[3:].reshape(-1)[: lanes * (lanes + 5)].reshape(lanes, lanes + 5)
    np.testing.assert_array_equal(block[:, :lanes], x[:lanes].T)
    assert not t[:3].any() and not block[:, lanes:].any()


# -- interface


@pytest.mark.parametrize(
    "text, message",
    [
        ("v.add(v.load(f, 0), v.load(d, 0))", "vectors of different dtypes (float32, float64)"),
        ("v.add(v.load(i, 0), 0.5)", "a float64 scalar meets int32"),
        ("v.sqrt(v.load(i, 0))", "simd.sqrt is not defined for int32"),
        ("v.store(f, 0, v.load(d, 0))", "vectors of different dtypes (float32, float64)"),
        ("v.select(v.load(f, 0), 1.0, 2.0)", "the mask is float32, expected bool"),
        ("v.add((1.0, 2.0), (1.0, 2.0, 3.0))", "different numbers of tiles: [2, 3]"),
        ("pick(v.load(f, 0))", "expected a tile"),
        ("pick((1.0, 2.0))", "index 3 in a tile of 2"),
    ],
)
def test_errors_say_what_is_wrong(text, message):
    from numba.core.errors import TypingError

    body = f"f, d, i = f32(a), f64(a), i32(a)\n{text}"
    with pytest.raises(TypingError) as raised:
        build(8, "a", body, "pick = v.pick((3,))")
    assert message in str(raised.value)


def test_factories_are_memoised_and_checked():
    v = simd.vocabulary(8)
    assert simd.vocabulary(8) is v
    assert v.load_tile([2, 3], "vector", fixed=[8, None]) is v.load_tile(
        (2, 3), "vector", fixed=(8, None)
    )
    assert v.pick([0, 1]) is v.pick((0, 1))
    with pytest.raises(ValueError, match="unknown kind 'row'"):
        v.load_tile((2,), "row")
    with pytest.raises(ValueError, match="do not match counts"):
        v.load_tile((2,), "vector", fixed=(1, 2))
    with pytest.raises(ValueError, match="expected 4, 8 or 16"):
        simd.vocabulary(5)


def test_host_lanes(monkeypatch):
    monkeypatch.delenv("GRAPHC_SIMD_LANES", raising=False)
    assert simd.host_lanes() in LANES
    monkeypatch.setenv("GRAPHC_SIMD_LANES", "4")
    assert simd.host_lanes() == 4
    monkeypatch.setenv("GRAPHC_SIMD_LANES", "5")
    with pytest.raises(ValueError, match="GRAPHC_SIMD_LANES"):
        simd.host_lanes()


@pytest.mark.skipif(simd.host_lanes() < 8, reason="the register tile is that of AVX2")
def test_register_tile_stays_in_registers():
    """A 4 x 3 tile of accumulators in a loop: 12 fma, one vmaxps for a relu, no spills."""
    setup = """
load_x = v.load_tile((4,), "vector", fixed=(8,))
load_w = v.load_tile((3,), "splat")
multiply = v.tile_fma([k // 3 for k in range(12)], [k % 3 for k in range(12)])
store = v.store_tile((4, 3), "vector", fixed=(8, None))
full = v.full(12)
"""
    body = """
x, w, y = f32(xa), f32(wa), f32(ya)
acc = full(v.load_splat(y, 0))
i = 0
for c in range(channels):
    for kh in range(height):
        for kw in range(width):
            acc = multiply(acc, load_x(x, c*plane + kh*row + kw*8, (8,)), load_w(w, i, (step,)))
            i += 1
store(y, 0, (8, 32), v.relu(acc))
"""
    kernel = build(8, "xa wa ya channels height width plane row step", body, setup)
    lines = kernel.assembly.splitlines()
    assert sum("vfmadd" in line for line in lines) == 12
    assert sum("vmaxps" in line for line in lines) == 12
    stacked = [line for line in lines if "sp)" in line and "mm" in line]
    assert not stacked
