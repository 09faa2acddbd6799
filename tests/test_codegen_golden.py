"""Printed IR and generated kernels, kept as files to review: `pytest --update-golden`."""

from __future__ import annotations

import re

import pytest

import graphc as gc
from graphc.codegen import target
from graphc.ir import Graph
from passes.explicit_padding import ExplicitPadding
from passes.fuse import Fuse
from passes.pipeline import FORWARD

LANES = 8


def printed(graph: Graph) -> str:
    """The graph without line numbers, which change with every edit of the file that declares it."""
    return re.sub(r"(\.py):\d+", r"\1", str(graph)) + "\n"


def fused(graph: Graph) -> Graph:
    from passes.base import Pipeline
    from passes.decompose import Decompose

    pipeline = FORWARD + Pipeline((Decompose(), ExplicitPadding(), Fuse()))
    return pipeline.run(graph)[0]


def sources(graph: Graph) -> str:
    """The kernels of a graph in order, for one width and one thread."""
    shaped = fused(graph)
    launches = target.plan_launches(shaped, LANES, 1)
    kernels = [f"# {launch.node.describe()}\n{launch.call.source}" for launch in launches]
    return re.sub(r"(\.py):\d+", r"\1", "\n".join(kernels))


def test_declared_lenet(golden):
    golden("lenet_declared.txt", printed(gc.zoo.lenet5()))


def test_fused_lenet(golden):
    graph = gc.zoo.lenet5().bind({"N": 8})
    del graph.outputs["loss"]
    text = fused(graph)
    regions = [
        f"\n{node.name}:\n{printed(node.attrs['body'])}" for node in text if node.op == "fused"
    ]
    golden("lenet_fused.txt", printed(text) + "".join(regions))


def convolution() -> Graph:
    g = Graph("convolution")
    x, w = g.input("x", (2, 3, 8, 8)), g.parameter("w", (4, 3, 3, 3))
    b = g.parameter("b", (4, 1, 1))
    g.output(y=gc.max_pool2d(gc.relu(gc.conv2d(x, w, name="conv") + b), 2))
    return g


def softmax() -> Graph:
    g = Graph("softmax")
    g.output(y=gc.softmax(g.input("x", (5, 17)), -1))
    return g


def affine() -> Graph:
    g = Graph("affine")
    x, w = g.input("x", (4, 7)), g.parameter("w", (7, 16))
    g.output(y=gc.gelu(gc.matmul(x, w, name="product")))
    return g


@pytest.mark.parametrize("make", [convolution, softmax, affine], ids=lambda f: f.__name__)
def test_kernels(golden, make):
    golden(f"kernel_{make.__name__}.py.txt", sources(make()))


@pytest.mark.parametrize("make", [convolution, softmax, affine], ids=lambda f: f.__name__)
def test_kernels_are_the_same_on_every_build(make):
    assert sources(make()) == sources(make())
