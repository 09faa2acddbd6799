"""From a fused graph to CUDA kernels: lower each region, render it, collect the launches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from graphc import errors
from graphc.codegen import cuda_contraction, cuda_generic, program
from graphc.codegen.cuda import CudaLaunch, Renderer, Rendering
from graphc.codegen.kernel import Kernel
from graphc.ir import Graph, Node

# The first that has an answer renders a kernel.
RENDERERS: tuple[Renderer, ...] = (cuda_contraction.render, cuda_generic.render)
# Indices are int32, and a grid further on they must not have wrapped around.
MOST_ELEMENTS = 2**31 - 2**26


@dataclass(frozen=True)
class CudaStep:
    """What one region of the graph needs of a step: its kernel and the launches that compute it."""

    node: Node
    kernel: Kernel
    rendering: Rendering

    @property
    def launches(self) -> list[tuple[CudaLaunch, tuple[str, ...]]]:
        """Every launch with the element types of its pointers."""
        types = [*(b.dtype for b in self.kernel.buffers), "float32"]  # the workspace is the last
        return [(l, tuple(types[b] for b in l.buffers)) for l in self.rendering.launches]


# By structure and precision, for the life of the process: passes ask, then the executable.
_rendered: dict[Hashable, tuple[Kernel, Rendering]] = {}


def render_node(node: Node, precision: str) -> tuple[Kernel, Rendering]:
    """The kernel of a fused region and its launches, by the first renderer that has an answer.

    Raises CannotLower."""
    key = (program.structure(node), precision)
    if key not in _rendered:
        kernel = program.lower_node(node)
        answers = (renderer(kernel.copy(), precision) for renderer in RENDERERS)
        _rendered[key] = kernel, next(answer for answer in answers if answer is not None)
    return _rendered[key]


def lower_graph(graph: Graph, precision: str) -> list[CudaStep]:
    """What computes every fused region, in order. Marks regions that may overwrite an operand and
    those that need workspace, for the memory plan.

    Raises CompileError listing every region that cannot be compiled."""
    program.lower_graph(graph)
    if large := [
        n.describe() for n in graph if any(v.type.size > MOST_ELEMENTS for v in n.outputs)
    ]:
        raise errors.CompileError(
            f"CUDA kernels index with 32 bits, {MOST_ELEMENTS} elements at most; use a smaller "
            "batch:\n  " + "\n  ".join(large)
        )
    steps = []
    for node in graph:
        if node.op == "fused":
            kernel, rendering = render_node(node, precision)
            node.attrs["workspace_bytes"] = rendering.workspace
            steps.append(CudaStep(node, kernel, rendering))
    return steps


def plan_steps(graph: Graph, precision: str) -> list[CudaStep]:
    """The steps of a graph whose order is final."""
    return [step for step in lower_graph(graph, precision) if step.node[0].type.size]
