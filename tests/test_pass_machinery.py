"""The machinery of passes: verification, pipelines as data, records, names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from random_graphs import one

from graphc import errors, ops, optim, zoo
from graphc.compiler import algorithms, default_pipeline, memory_pipeline, transform
from graphc.ir import Graph, Origin
from passes.base import InvalidGraphError, Pass, Pipeline, note, verify_graph
from passes.canonicalize import Canonicalize
from passes.decompose import Decompose
from passes.pipeline import BACKWARD, FORWARD


class Broken(Pass):
    """Returns a graph with a defect of the given kind."""

    def __init__(self, defect):
        self.defect = defect

    def run(self, graph):
        new = graph.copy()
        node = new.node("tanh")
        if self.defect == "type":
            node.types = (new.node("sum").types[0],)
        elif self.defect == "edge":
            new.nx.remove_edge("x", "tanh")
        elif self.defect == "order":
            node.inputs = new.node("sum").outputs
        elif self.defect == "origin":
            node.origin = Origin("elsewhere")
        elif self.defect == "foreign":
            node.inputs = graph.node("x").outputs
        elif self.defect == "layouts":
            node.layouts = ()
        elif self.defect == "output":
            new.outputs["y"] = graph.node("sum")[0]
        elif self.defect == "update":
            new.updates["x"] = new.node("x")[0]
        return new


@pytest.mark.parametrize(
    "defect, message",
    [
        ("type", r"tanh \(tanh, test_pass_machinery.py:\d+\): its type rule gives"),
        ("edge", "its edges .* differ"),
        ("order", "used before it is defined"),
        ("origin", "has the origin"),
        ("foreign", "belongs to another graph"),
        ("layouts", "0 layouts for 1 outputs"),
        ("output", "output 'y': 'sum' is not in the graph"),
        ("update", "no such parameter or state"),
    ],
)
def test_a_pass_that_breaks_the_graph_is_named(defect, message):
    graph = one(lambda x: ops.sum(ops.tanh(x)))
    with pytest.raises(InvalidGraphError, match=f"^after pass broken: .*{message}"):
        Pipeline((Broken(defect),)).run(graph, verify=True)
    Pipeline((Broken("none"),)).run(graph, verify=True)


def test_verification_is_asked_for_by_the_environment(monkeypatch):
    graph = one(lambda x: ops.sum(ops.tanh(x)))
    monkeypatch.setenv("GRAPHC_VERIFY", "1")
    with pytest.raises(InvalidGraphError):
        Pipeline((Broken("edge"),)).run(graph)
    monkeypatch.delenv("GRAPHC_VERIFY")
    Pipeline((Broken("edge"),)).run(graph)


class Count(Pass):
    """Notes the number of nodes."""

    def run(self, graph):
        new = graph.copy()
        note(new, f"{len(new)} nodes")
        return new


def test_pipelines_are_data_and_record_what_they_do():
    pipeline = FORWARD.with_inserted(Count(), after="canonicalize")
    assert pipeline.names == ("canonicalize", "count", "eliminate_common", "eliminate_dead")
    pipeline = pipeline.replaced("count", Decompose()).with_inserted(Count())
    pipeline = pipeline.with_inserted(Count(), before="decompose")
    assert pipeline.names[1:3] == ("count", "decompose") and pipeline.names[-1] == "count"
    (step,) = (
        p for p in pipeline.with_options("canonicalize", sweeps=2) if isinstance(p, Canonicalize)
    )
    assert step.sweeps == 2
    with pytest.raises(errors.NameLookupError, match="no pass 'fuse'.*canonicalize"):
        pipeline.without("fuse")
    seen = []
    graph = one(lambda x: ops.add(ops.mean(x), 0.0))
    after, records = pipeline.run(
        graph, observer=lambda record, g: seen.append((record.name, len(g)))
    )
    assert tuple(r.name for r in records) == pipeline.names
    assert [name for name, _ in seen] == list(pipeline.names)
    assert records[0].notes == ("neutral_operand x1",)
    assert records[1].notes == (f"{records[1].nodes_after} nodes",)
    assert records[0].nodes_before == len(graph) and records[-1].nodes_after == len(after)
    assert "canonicalize: 4 -> 2 nodes" in str(records[0])
    assert "notes" not in after.annotations


def test_passes_survive_names_that_collide_with_new_nodes():
    """Parameters keep their names even where a pass makes a node that would take one."""
    graph = Graph("names")
    x = graph.input("x", (4, 3))
    h = ops.mean(x, 0)
    y = ops.mul(h, graph.parameter("sum", (3,)))
    y = ops.add(y, graph.parameter("constant", (3,)))
    graph.output(y=ops.mul(y, 3.0))
    after, _ = BACKWARD.run(graph, verify=True)
    assert set(after.parameters) == {"sum", "constant"}
    verify_graph(after)


def test_superseded_graphs_are_taken_apart():
    """Their nodes refer to one another: left alone they would be the collector's work."""
    made: list[Graph] = []

    @dataclass(frozen=True)
    class Copied(Pass):
        def run(self, graph: Graph) -> Graph:
            made.append(graph.copy())
            return made[-1]

    given = zoo.lenet5()
    size, steps = len(given), Pipeline((Copied(), Copied()))
    steps.run(given)
    assert [len(g) for g in (given, *made)] == [size, 0, size]
    made.clear()
    steps.run(given, observer=lambda record, graph: None)
    assert [len(g) for g in (given, *made)] == [size, size, size]
    made.clear()
    steps.run(given, consume=True)
    assert [len(g) for g in (given, *made)] == [0, 0, size]


@pytest.mark.parametrize("training", [True, False])
def test_passes_make_the_same_graph_of_nodes_that_they_may_take(training):
    """An observer may keep every graph, so that none is released."""

    def planned(observer):
        options = {"loss": "loss", "optimizer": optim.SGD(0.1)} if training else {}
        before = algorithms("cpu", "float32", training)
        dims = {"N": 2}
        joint, _ = transform(
            zoo.resnet20(), ["loss"], dims, algorithms=before, observer=observer, **options
        )
        shape = default_pipeline() + memory_pipeline(2)
        return shape.run(joint, observer=observer, consume=True)[0]

    kept, taken = planned(lambda record, graph: None), planned(None)
    assert taken == kept and [n.name for n in taken] == [n.name for n in kept]
    assert [n.origin for n in taken] == [n.origin for n in kept]
    assert taken.annotations["memory"] == kept.annotations["memory"]
    verify_graph(taken)


def test_a_released_graph_hands_its_nodes_on():
    graph = one(lambda x: ops.sum(ops.tanh(x)))
    nodes = graph.nodes
    copy = graph.copy()
    assert all(a is not b for a, b in zip(copy, nodes, strict=True))
    graph.released = True
    taken = graph.rebuild()
    assert all(a is b and b.graph is taken for a, b in zip(taken, nodes, strict=True))
    graph.dissolve()
    assert taken == copy
    verify_graph(taken)
