"""The compiler of kernels: Numba's passes cut down, with Numba's own as the way out."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from numba.core.errors import NumbaError
from simd_harness import Kernel

import graphc as gc
from graphc.codegen import native

MIXED = """
def kernel(args, thread, threads):
    x = 1
    if args[1] > 3:
        x = 2.5
    args[0] = int(2 * x)
"""
HELPER = """
from numba import njit

@njit
def twice(x):
    return 2 * x

def kernel(args, thread, threads):
    args[0] = twice(args[1])
"""


def run(source: str, value: int) -> int:
    args = np.array([0, value], np.int64)
    unused = ctypes.create_string_buffer(64)
    assert Kernel(source).function(unused, unused, args.ctypes.data, 0, 1) == 0
    return int(args[0])


def vocabulary(source: str) -> str:
    """Kernels read and write through the vocabulary, not through subscripts."""
    head = "from graphc.codegen import simd\n\nv = simd.vocabulary(8)\nload = v.load_scalar\n"
    return head + "store = v.store_scalar\n" + source


def test_a_value_of_the_last_iteration_is_read_after_the_loop():
    source = """
def kernel(args, thread, threads):
    total = 0
    for i in range(load(args, 1)):
        square = i * i
        for j in range(i):
            total = total + square - j
        last = square + thread
    store(args, 0, total + last)
"""
    python = sum(i * i - j for i in range(6) for j in range(i)) + 25
    assert run(vocabulary(source), 6) == python


def test_kernels_do_without_numbas_own_pipeline(monkeypatch):
    monkeypatch.setattr(native, "Compiler", None)
    source = """
def kernel(args, thread, threads):
    n = load(args, 1)
    for unit in range(n * thread // threads, n * (thread + 1) // threads):
        store(args, 0, unit - n)
"""
    assert run(vocabulary(source), 7) == -1


@pytest.mark.parametrize(("value", "result"), [(3, 2), (4, 5)])
def test_variables_of_two_types_get_numbas_own_inference(value, result):
    assert run(MIXED, value) == result


def test_jitted_functions_are_linked_in():
    assert run(HELPER, 21) == 42


def test_a_kernel_is_one_function():
    """LLVM's short pipeline is for one function: bounds of loops must not be calls of others."""
    g = gc.Graph("net")
    g.output(y=gc.max_pool2d(g.input("x", (1, 3, 9, 9)), 3, stride=2, padding=1))
    sources = {launch.call.source for launch in gc.compile(g, outputs=["y"]).launches}
    assert any("minimum(" in source for source in sources)
    for source in sources:
        library = native.compile_function(native.load_source(source, "kernel"))._library
        assert [f.is_declaration for f in library._final_module.functions].count(False) == 1


def test_errors_are_numbas_own():
    function = native.load_source(
        "def kernel(args, thread, threads):\n    args.missing()\n", "kernel"
    )
    with pytest.raises(NumbaError, match="missing"):
        native.compile_function(function)
