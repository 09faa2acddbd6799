"""How much work there is: operations and bytes of a kernel, operations of a graph.

Operations are what the algorithm needs, not what instructions do: a multiply-add is two, any other
floating-point function one, comparisons, selections and integer arithmetic none. Terms of a sum
that are zero by construction (outside a padded image, zeros of a transform's matrix) are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator

import numpy as np

from graphc.codegen import core
from graphc.codegen.kernel import Access, Kernel
from graphc.codegen.program import lower_node, remember, structure
from graphc.codegen.reductions import known_factor
from graphc.expr import FUNCTIONS, Expr, Index
from graphc.ir import SOURCES, Graph, Node, Value

_FREE = frozenset(
    "select cast lt le gt ge eq ne bit_xor shift_left shift_right rotate_left".split()
)
_FREE |= {"and_", "or_", "not_", "xor_"}

_seconds: dict[Hashable, float] = {}  # predictions by what they depend on


def points(kernel: Kernel, loops: Iterable[str]) -> int:
    """Iterations of a nest of loops; the short last block of a ragged loop counts as it is."""
    names = set(loops)
    count = 1
    for name in names:
        loop = kernel.loops[name]
        ragged_inside = any(kernel.loops[n].ragged and kernel.loops[n].block == name for n in names)
        if loop.ragged and loop.block in names:
            count *= loop.total or 0
        elif not ragged_inside:
            count *= loop.extent
    return count


def kernel_flops(kernel: Kernel, node: Node) -> int:
    """Floating-point operations of one launch, each value counted once where it is known first."""
    total = 0.0
    loops = _loops_of(kernel, node)
    terms: dict[int, float] = {}
    for e in kernel.expressions():
        if e.op == "reduce":
            body = e.args[0]
            terms[id(body)] = _present(kernel, e)
            while body.op == "within":
                body = body.args[0]
            terms[id(body)] = terms[id(e.args[0])]
    for e in kernel.expressions():
        if e.op == "reduce":
            total += points(kernel, loops(e.args[0])) * terms[id(e.args[0])]
        elif e.op in FUNCTIONS and e.op not in _FREE and e.dtype.startswith("float"):
            weight = 2 if e.op == "fma" else 1
            total += points(kernel, loops(e)) * weight * terms.get(id(e), 1.0)
    return round(total)


def _loops_of(kernel: Kernel, node: Node) -> Callable[[Expr], frozenset[str]]:
    """The loops that the value of an expression depends on. Scratch memory holds another block's
    values in each iteration of the first loop, at the same addresses."""
    scratch = _scratch(node)
    blocks = frozenset(kernel.outer[:1] if scratch else ())
    reads: set[int] = set()
    for e in kernel.expressions():  # operands first
        own = e.op == "load" and e.attributes["access"].buffer in scratch
        if own or any(id(arg) in reads for arg in e.args):
            reads.add(id(e))
    return lambda e: kernel.free(e) | blocks if id(e) in reads else kernel.free(e)


def _scratch(node: Node) -> set[int]:
    """The buffers of a region that hold one block of the batch for each thread."""
    return {i for i, v in enumerate((*node.inputs, *node.outputs)) if v.layout.copies}


def _present(kernel: Kernel, reduction: Expr) -> float:
    """The share of a reduction's terms that are not zero by construction."""
    body = reduction.args[0]
    if reduction.attributes["combine"] != "sum":
        return 1.0
    share = 1.0
    known = known_factor(body)
    if known is not None:
        matrix = np.asarray(known[0].attributes["known"])
        share *= np.count_nonzero(matrix) / max(1, matrix.size)
    for bound, extent in _bounds(body):
        share *= _share_within(kernel, bound, extent)
    return share


def _bounds(expr: Expr) -> Iterator[tuple[Index, int]]:
    """Bounds outside of which a product is zero."""
    if expr.op == "within" and expr.args[1].attributes.get("value") == 0:
        yield from expr.attributes["bounds"]
        yield from _bounds(expr.args[0])
    elif expr.op == "mul":
        for arg in expr.args:
            yield from _bounds(arg)


def _share_within(kernel: Kernel, index: Index, extent: int) -> float:
    """How often an index lies in [0, extent) while its loops run."""
    values = np.array([index.constant])
    for name, coefficient in index.terms:
        steps = coefficient * np.arange(kernel.loops[name].extent)
        values = np.add.outer(values, steps).ravel()
    return float(np.mean((0 <= values) & (values < extent)))


def kernel_bytes(kernel: Kernel, node: Node) -> int:
    """Bytes that a launch must move: each element of an operand it reads, each result, once."""
    values: list[Value] = [*node.inputs, *node.outputs]
    touched: dict[int, set[Access]] = {}
    for e in kernel.expressions():
        if e.op == "load":
            touched.setdefault(e.attributes["access"].buffer, set()).add(e.attributes["access"])
    for store in kernel.stores:
        touched.setdefault(store.access.buffer, set()).add(store.access)
    total, scratch = 0, _scratch(node)
    for buffer, accesses in touched.items():
        value = values[buffer]
        blocks = kernel.loops[kernel.outer[0]].extent if buffer in scratch else 1
        elements = sum(points(kernel, (n for n, s in a.strides if s)) for a in accesses)
        total += blocks * min(elements * value.type.itemsize, stored_bytes(value))
    return total


def stored_bytes(value: Value) -> int:
    """Bytes of a value in its layout, padded lanes included."""
    return math.prod(value.layout.physical_shape(value.sizes)) * value.type.itemsize


def contraction_flops(graph: Graph) -> int:
    """Operations of all convolutions and matrix products of a bound graph, counted as direct ones.

    What implementations of one network have in common: the figure that GFLOP/s of benchmarks
    refer to, whatever algorithm (Winograd, FFT) a library chooses.
    """
    total = 0
    for node in graph:
        body = node.attrs.get("body")
        if isinstance(body, Graph):
            total += contraction_flops(body)
        elif node.op not in SOURCES:
            total += 2 * _multiply_adds(node)
    return total


def _multiply_adds(node: Node) -> int:
    if node.op == "matmul":
        return node.types[0].size * int(node.inputs[0].shape[-1])
    if node.op == "conv2d":
        return node.types[0].size * math.prod(map(int, node.inputs[1].shape[1:]))
    if node.op == "conv2d_input_grad":
        return node.inputs[0].type.size * math.prod(map(int, node.inputs[1].shape[1:]))
    if node.op == "conv2d_weight_grad":
        return node.inputs[1].type.size * math.prod(map(int, node.types[0].shape[1:]))
    return 0


def predicted_seconds(node: Node, lanes: int, threads: int) -> float:
    """Time of a region from its operations and its bytes, whichever takes longer (the roofline
    model: Williams, Waterman & Patterson 2009), on cores (`graphc.codegen.core`) that share it
    evenly and read from the cache that they share.

    Good for comparing kernels, and for shares of a step; the machine's own figures are in
    `graphc.bench.machine`."""
    key = (structure(node), lanes, threads)
    seconds = _seconds.get(key)
    if seconds is None:
        kernel = lower_node(node)
        arithmetic = kernel_flops(kernel, node) / (2 * core.MULTIPLY_ADDS_PER_CYCLE * lanes)
        memory = kernel_bytes(kernel, node) / core.L3_BYTES_PER_CYCLE
        seconds = max(arithmetic, memory) / (core.CLOCK * threads)
        remember(_seconds, key, seconds)
    return seconds
