"""The emulated GPU itself: threads, barriers, shuffles, shared memory, and what it finds."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba.cuda.cudadrv", reason="numba-cuda is not installed")

from graphc import errors
from graphc.codegen.cuda_build import CudaSignature
from graphc.runtime.emulate import ORDERS, Emulator, thread_order
from graphc.runtime.linker import KernelSource, load_kernels

HEAD = """
from graphc.codegen import cuda_vocabulary as v
from graphc.codegen.numba_cuda import cuda, types
"""


def run(body, *arrays, numbers=(), grid=1, block=64, order="forward", head=HEAD, shared=0):
    """Run `body`, the source of `kernel`, on arrays in place."""
    kinds = tuple(a.dtype.name for a in arrays)
    threads = int(np.prod(block))
    wanted = CudaSignature("emulated", ((8, 0),), kinds, len(numbers), threads, 1, shared)
    (entry,) = load_kernels([KernelSource("kernel", head + body, wanted.text())]).addresses
    parameters = np.array([*(a.ctypes.data for a in arrays), *numbers], np.int64)
    sizes = [tuple(np.atleast_1d(n)) + (1,) * (3 - np.size(n)) for n in (grid, block)]
    Emulator(order).launch("kernel", entry, *sizes, parameters)
    return arrays[-1]


REVERSED = """
def kernel(a, b, n):
    part = cuda.shared.array(64, types.float32)
    i, j = v.thread(), v.member()
    part[j] = a[i]
    v.barrier()
    b[i] = part[63 - j]
"""


@pytest.mark.parametrize("order", ORDERS)
def test_barrier(rng, order):
    a = rng.standard_normal(256).astype(np.float32)
    b = run(REVERSED, a, np.zeros_like(a), numbers=(256,), grid=4, order=order)
    assert np.array_equal(b.reshape(4, 64), a.reshape(4, 64)[:, ::-1])


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier_is_found(rng, order):
    """Half of the threads read before anybody has written: NaN, in any order."""
    a = rng.standard_normal(256).astype(np.float32)
    planted = REVERSED.replace("    v.barrier()\n", "")
    b = run(planted, a, np.zeros_like(a), numbers=(256,), grid=4, order=order)
    assert np.isnan(b).sum() == 128


def test_race_shows_in_the_order_of_threads():
    """Shared memory that is written twice between barriers: orders disagree."""
    body = """
def kernel(a, n):
    part = cuda.shared.array(1, types.float32)
    part[0] = v.member()
    v.barrier()
    a[v.member()] = part[0]
"""
    results = [run(body, np.zeros(64, np.float32), numbers=(1,), order=order) for order in ORDERS]
    assert [r[0] for r in results[:2]] == [63, 0]
    assert (results[2] == thread_order("shuffled", 64)[-1]).all()


def test_barrier_that_not_all_threads_reach():
    body = """
def kernel(a, n):
    if v.member() < n:
        v.barrier()
    a[v.member()] = 1
"""
    with pytest.raises(
        errors.GraphcError, match=r"block \(0, 0, 0\): of 64 threads 10 wait at a bar"
    ):
        run(body, np.zeros(64, np.float32), numbers=(10,))


def test_shuffle_that_not_all_lanes_reach():
    body = """
def kernel(a, n):
    if v.member() < n:
        a[v.member()] = cuda.shfl_xor_sync(0xFFFFFFFF, a[0], 1)
"""
    with pytest.raises(errors.GraphcError, match="10 wait at a warp operation"):
        run(body, np.zeros(64, np.float32), numbers=(10,))


def test_warp_operations():
    """Against NumPy: every mode of shfl.sync, votes, a barrier that counts; all in one kernel."""
    body = """
def kernel(a, o, n):
    i = v.member()
    x, every = a[i], 0xFFFFFFFF
    o[i] = cuda.shfl_sync(every, x, 5)
    o[64 + i] = cuda.shfl_up_sync(every, x, 3)
    o[128 + i] = cuda.shfl_down_sync(every, x, 3)
    o[192 + i] = cuda.shfl_xor_sync(every, x, 6)
    o[256 + i] = cuda.ballot_sync(every, x > 50) & 0x7FFFFFFF
    o[320 + i] = cuda.all_sync(every, x < 40)
    o[384 + i] = cuda.any_sync(every, x == 40)
    o[448 + i] = cuda.syncthreads_count(types.int32(x > 60))
    o[512 + i] = cuda.laneid
"""
    a = np.random.default_rng(3).permutation(64).astype(np.int32)
    lane, warps = np.arange(32), a.reshape(2, 32)
    bits = ((warps > 50) * (1 << lane.astype(np.int64))).sum(1) & 0x7FFFFFFF
    expected = [
        np.repeat(warps[:, 5], 32),
        warps[:, np.where(lane >= 3, lane - 3, lane)].ravel(),
        warps[:, np.where(lane < 29, lane + 3, lane)].ravel(),
        warps[:, lane ^ 6].ravel(),
        np.repeat(bits, 32),
        np.repeat((warps < 40).all(1), 32),
        np.repeat((warps == 40).any(1), 32),
        np.full(64, (a > 60).sum()),
        np.tile(lane, 2),
    ]
    for order in ORDERS:
        got = run(body, a, np.zeros(576, np.int32), numbers=(64,), order=order)
        assert np.array_equal(got.reshape(9, 64), np.array(expected))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_folds(rng, dtype):
    """Sums and maxima over warps and blocks, the same in every thread."""
    body = """
block_sum, warp_max, warp_sum = v.block_fold("sum"), v.warp_fold("max"), v.warp_fold("sum")
block_min = v.block_fold("min")

def kernel(a, o, n):
    i = v.thread()
    x = v.load(a, i)
    v.store(o, i, block_sum(x))
    v.store(o, i + n, warp_max(x))
    v.store(o, i + 2 * n, warp_sum(x))
    v.store(o, i + 3 * n, block_min(x))
"""
    a = (100 * rng.standard_normal(192)).astype(dtype)
    blocks, warps = a.reshape(2, 96), a.reshape(6, 32)
    for order in ORDERS:
        o = np.zeros(768, dtype)
        got = run(body, a, o, numbers=(192,), grid=2, block=96, order=order).reshape(4, 192)
        close = {"rtol": 1e-5 if dtype == "float32" else 1e-12, "atol": 1e-4}
        sums = blocks.sum(1, keepdims=True) + 0 * blocks
        np.testing.assert_allclose(got[0].reshape(2, 96), sums, **close)
        assert np.array_equal(got[1].reshape(6, 32), warps.max(1, keepdims=True) + 0 * warps)
        sums = warps.sum(1, keepdims=True) + 0 * warps
        np.testing.assert_allclose(got[2].reshape(6, 32), sums, **close)
        assert np.array_equal(got[3].reshape(2, 96), blocks.min(1, keepdims=True) + 0 * blocks)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_folds_to_the_first_maximum(rng, dtype):
    """As numpy.argmax: the first of equals, the first NaN before any number; some threads have
    nothing to say."""
    body = """
block_argmax, warp_argmax = v.block_fold("argmax"), v.warp_fold("argmax")
to_int32 = v.cast("int32")

def kernel(a, o, n):
    i = v.thread()
    j = v.member()
    position = to_int32(j if j % 5 else -1)
    v.store(o, i, block_argmax(v.load(a, i), position))
    v.store(o, i + n, warp_argmax(v.load(a, i), position))
"""
    a = rng.integers(-9, -4, 192).astype(dtype)
    if dtype == "float32":
        a[[40, 41, 130]] = np.nan
    heard = np.where(np.arange(192) % 96 % 5, a, a.min() - 1 if dtype == "int32" else -np.inf)
    expected = [np.repeat(heard.reshape(2, 96).argmax(1), 96)]
    warps = heard.reshape(6, 32).argmax(1) + 32 * (np.arange(6) % 3)
    expected.append(np.repeat(warps, 32))
    for order in ORDERS:
        got = run(body, a, np.zeros(384, np.int32), numbers=(192,), grid=2, block=96, order=order)
        assert np.array_equal(got.reshape(2, 192), expected)


def test_positions_and_dynamic_shared_memory():
    body = """
def kernel(a, o, n):
    part = cuda.shared.array(0, types.int32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    part[4 * y + x] = 100 * cuda.blockIdx.y + 10 * y + x
    v.barrier()
    at = (cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x) * 32 + 4 * y + x
    o[at] = part[31 - 4 * y - x]
"""
    got = run(
        body,
        np.zeros(1, np.int32),
        np.zeros(192, np.int32),
        numbers=(1,),
        grid=(2, 3),
        block=(4, 8),
        shared=128,
    ).reshape(3, 2, 8, 4)
    y, x = np.meshgrid(np.arange(8), np.arange(4), indexing="ij")
    for block in range(3):
        assert np.array_equal(got[block, 1], (100 * block + 10 * y + x)[::-1, ::-1])


def test_atomics():
    body = """
def kernel(a, n):
    total, largest = cuda.shared.array(1, types.float32), cuda.shared.array(1, types.int32)
    i = v.member()
    if i == 0:
        total[0] = 0
        largest[0] = 0
    v.barrier()
    cuda.atomic.add(total, 0, types.float32(i))
    cuda.atomic.max(largest, 0, types.int32(i * 7 % 64))
    v.barrier()
    a[i] = total[0] + largest[0]
"""
    got = run(body, np.zeros(64, np.float32), numbers=(1,), order="shuffled")
    assert (got == 63 * 64 / 2 + 63).all()


def test_unknown_instruction_is_refused():
    body = """
def kernel(a, n):
    cuda.nanosleep(types.uint32(1))
"""
    with pytest.raises(errors.CompileError, match="does not know the instruction 'nanosleep"):
        run(body, np.zeros(1, np.float32), numbers=(1,))


def test_order_is_checked():
    with pytest.raises(errors.GraphcError, match="'forward', 'reverse', 'shuffled'"):
        Emulator("sideways")
