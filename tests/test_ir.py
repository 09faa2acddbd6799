"""The graph: declaring, reading, rebuilding, binding, printing, comparing, and its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import networkx
import numpy as np
import pytest

from graphc import errors, ops
from graphc.interpreter import interpret
from graphc.ir import Graph, Layout, Origin, TensorType
from passes.base import verify_graph

HERE = Path(__file__).name


def small() -> Graph:
    graph = Graph("small")
    x = graph.input("x", ("N", 3))
    w = graph.parameter("w", (3,))
    graph.state("steps", (), dtype="int32")
    y = ops.tanh(ops.mul(x, w), name="y")
    graph.output(y=y, total=ops.sum(y))
    graph.update("w", ops.mul(w, 0.5))
    return graph


def test_types():
    t = TensorType((2, 3), "float64")
    assert (t.rank, t.size, t.nbytes, t.itemsize, t.is_float) == (2, 6, 48, 8, True)
    assert str(t) == "f64[2,3]" and str(TensorType(())) == "f32[]"
    assert TensorType((), "bool").nbytes == 1 and TensorType((4, 0)).size == 0
    with pytest.raises(errors.UnboundDimensionError, match=r"f32\[N,3\].*dims=\{'N': ...\}"):
        _ = TensorType(("N", 3)).size


def test_layouts():
    lanes = Layout(1, 8)
    assert lanes.physical_shape((2, 17, 5)) == (2, 3, 5, 8)
    assert lanes.strides((2, 17, 5)) == (120, 40, 8)
    assert Layout().physical_shape((2, 17)) == (2, 17)
    assert Layout().strides((2, 17, 5)) == (85, 5, 1)
    assert "1" in str(lanes) and "8" in str(lanes) and str(Layout()) == "rows"


def test_reading():
    graph = small()
    assert list(graph.inputs) == ["x"] and list(graph.parameters) == ["w"]
    assert list(graph.states) == ["steps"]
    assert "y" in graph and "z" not in graph and len(graph) == len(graph.nodes)
    assert graph.value("y") == graph.node("y")[0] == graph.outputs["y"]
    assert graph.value("total") == graph.outputs["total"]
    assert graph.value("y:0") == graph.node("y")[0]
    w = graph.value("w")
    assert [(node.op, slot) for node, slot in graph.users(w)] == [("mul", 1), ("mul", 0)]
    assert graph.results == [*graph.outputs.values(), *graph.updates.values()]
    assert isinstance(graph.nx, networkx.MultiDiGraph)
    assert networkx.is_directed_acyclic_graph(graph.nx)


def test_operand_order_and_repeated_operands_are_on_the_edges():
    graph = Graph("edges")
    x = graph.input("x", (2,))
    square = ops.mul(x, x)
    assert sorted(d["slot"] for _, _, d in graph.nx.in_edges(square.node.name, data=True)) == [0, 1]
    assert [slot for _, slot in graph.users(x)] == [0, 1]


def test_networkx_graph_follows_the_nodes():
    graph = Graph("grows")
    x = graph.input("x", (2,))
    assert list(graph.nx) == ["x"]
    y = ops.neg(x)
    z = ops.neg(y)
    assert list(graph.nx.edges()) == [("x", "neg"), ("neg", "neg_1")]
    graph.remove(z.node)
    assert list(graph.nx) == ["x", "neg"] and not graph.users(y)
    assert [node.name for node in graph] == list(graph.nx) and "neg_1" not in graph


def test_copies_keep_layouts_and_recompute_types_that_change():
    graph = Graph("source")
    y = ops.neg(graph.input("x", (2, 3)))
    y.node.layouts = (Layout(1, 8),)
    same, other = Graph("same"), Graph("other")
    copy = same.copy_node(y.node, (same.input("x", (2, 3)),))
    assert copy.types == y.node.types and copy.layouts == y.node.layouts
    assert copy.attrs is not y.node.attrs and copy.origin == y.node.origin
    assert other.copy_node(y.node, (other.input("x", (5,)),)).types[0].shape == (5,)
    with pytest.raises(errors.DeclarationError, match="belongs to graph 'source'"):
        same.copy_node(y.node, y.node.inputs)


def test_names_are_unique_and_sources_keep_theirs():
    graph = Graph("names")
    x = graph.input("x", (2,))
    names = [ops.exp(x).node.name for _ in range(3)] + [ops.exp(x, name="exp").node.name]
    assert len(set(names)) == 4 and names[0] == "exp"
    with pytest.raises(errors.DeclarationError, match="already has a node called 'x'"):
        graph.parameter("x", (2,))


def test_origins_name_the_users_layer_and_line():
    graph = Graph("origins")
    x = graph.input("x", (2,))
    with graph.layer("head"):
        y = ops.tanh(x)
    assert y.node.origin.layer == "head" and y.node.origin.file == __file__
    assert y.node.describe().startswith(f"tanh (tanh, {HERE}:")
    z = ops.exp(x)
    assert z.node.origin.layer == "exp"
    with graph.origin(Origin("elsewhere", "net.py", 3)):
        assert ops.sin(x).node.describe() == "sin (sin, net.py:3)"


def test_rebuild_keeps_names_origins_layouts_and_results():
    graph = small()
    graph.node("y").layouts = (Layout(1, 8),)
    copy = graph.copy()
    assert str(copy) == str(graph) and copy == graph and copy is not graph
    assert copy.node("y").layouts == (Layout(1, 8),)
    assert [n.origin for n in copy] == [n.origin for n in graph]
    assert all(v.graph is copy for v in copy.results)

    def replace_tanh(new, node, inputs):
        return (ops.sigmoid(inputs[0]),) if node.op == "tanh" else None

    changed = graph.rebuild(replace_tanh, name="changed")
    verify_graph(changed)
    assert changed.outputs["y"].node.op == "sigmoid" and changed.name == "changed"
    assert changed.outputs["y"].node.origin == graph.node("y").origin


def test_rebuild_reserves_the_names_of_sources_to_come():
    graph = Graph("reserved")
    x = graph.input("x", (2,))
    y = ops.add(ops.exp(x), 1.0)
    graph.output(y=ops.mul(y, graph.parameter("neg", (2,))))
    again = graph.rebuild(
        lambda new, node, inputs: (
            (ops.neg(ops.neg(new.copy_node(node, inputs)[0])),) if node.op == "exp" else None
        )
    )
    assert list(again.parameters) == ["neg"]
    verify_graph(again)
    # Constants are not addressed by name: theirs may change.
    more = again.rebuild(
        lambda new, node, inputs: (
            (ops.add(new.copy_node(node, inputs)[0], 0.0),) if node.op == "exp" else None
        )
    )
    verify_graph(more)


def test_subgraph_keeps_what_is_needed_in_order():
    graph = small()
    part = graph.subgraph([graph.value("y")])
    assert [n.op for n in part] == ["input", "parameter", "mul", "tanh"]
    assert list(part.outputs) == ["y"] and part.updates == {}
    verify_graph(part)


def test_bind_replaces_symbolic_dimensions_everywhere():
    graph = Graph("bind")
    x = graph.input("x", ("N", "C"))
    graph.output(y=ops.expand(ops.sum(x, 1, True), ("N", 7)), z=ops.reshape(x, ("N", 1, "C")))
    bound = graph.bind({"N": 4, "C": 3})
    assert bound.outputs["y"].shape == (4, 7) and bound.outputs["z"].shape == (4, 1, 3)
    verify_graph(bound)
    with pytest.raises(errors.UnboundDimensionError, match=r"x \(input, .*'C'.*dims=\{'C': size\}"):
        graph.bind({"N": 4})
    with pytest.raises(errors.UnboundDimensionError, match="dims\\['N'\\] = -1"):
        graph.bind({"N": -1, "C": 3})


def test_text_is_one_line_a_node():
    text = str(small()).splitlines()
    assert text[0] == "graph small {" and text[-1] == "}"
    assert text[1].startswith("  %x: f32[N,3] = input()")
    assert any(line.startswith("  %y: f32[N,3] = tanh(%mul)") for line in text)
    assert "  output total = %sum" in text and "  update w = %mul_1" in text


def test_equality_is_structure_and_fingerprints_hold_in_every_process():
    a, b = small(), small()
    assert a == b and hash(a) == hash(b) and a.fingerprint() == b.fingerprint()
    b.output(more=ops.exp(b.value("y")))
    assert a != b and a.fingerprint() != b.fingerprint()
    renamed = Graph("other")
    x = renamed.input("x", ("N", 3))
    w = renamed.parameter("w", (3,))
    renamed.state("steps", (), dtype="int32")
    y = ops.tanh(ops.mul(x, w, name="product"), name="activation")
    renamed.output(y=y, total=ops.sum(y))
    renamed.update("w", ops.mul(w, 0.5))
    assert renamed == a
    program = "from test_ir import small; print(small().fingerprint())"
    prints = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            env={
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": ":".join(
                    [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
                ),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert prints == {a.fingerprint()}


def test_constants_are_copied_typed_and_read_only():
    graph = Graph("constants")
    data = np.arange(6.0).reshape(2, 3)
    value = graph.constant(data)
    data[:] = 0
    assert value.dtype == "float32" and value.shape == (2, 3)
    assert value.node.attrs["value"][1, 2] == 5
    with pytest.raises(ValueError):
        value.node.attrs["value"][0, 0] = 1
    assert graph.constant([1, 2]).dtype == "int32" and graph.constant(True).dtype == "bool"
    assert graph.constant(2).shape == ()


def test_operators_on_values_build_nodes():
    graph = Graph("operators")
    x, y = graph.input("x", (2, 3)), graph.input("y", (2, 3))
    graph.output(z=(2.0 - x) * y / 4 + (-x) ** 2, part=x[0, 1:], cut=x[:, ::2])
    a, b = np.arange(6.0).reshape(2, 3), np.ones((2, 3))
    out = interpret(graph, {"x": a, "y": b}, dtype="float64").outputs
    np.testing.assert_allclose(out["z"], (2 - a) * b / 4 + a**2)
    np.testing.assert_array_equal(out["part"], a[0, 1:])
    np.testing.assert_array_equal(out["cut"], a[:, ::2])


ERRORS = {
    "another graph": (
        lambda g, x: ops.add(x, Graph("other").input("y", (2,))),
        errors.DeclarationError,
        "'y' belongs to graph 'other', not to 'errors'",
    ),
    "shapes": (
        lambda g, x: ops.add(x, g.input("y", (5,))),
        errors.ShapeError,
        rf"add \(add, {HERE}:\d+\): .*'x' f32\[2\], 'y' f32\[5\]",
    ),
    "dtypes": (
        lambda g, x: ops.add(x, g.input("y", (2,), dtype="int32")),
        errors.DTypeError,
        rf"add \(add, {HERE}:\d+\): .*gc.cast",
    ),
    "dtype name": (
        lambda g, x: g.input("y", (2,), dtype="float16"),
        errors.DTypeError,
        "dtype 'float16' is not supported; use one of",
    ),
    "dimension": (
        lambda g, x: g.input("y", (2.5,)),
        errors.ShapeError,
        "y: dimension 2.5 is neither a size >= 0 nor a name",
    ),
    "truth": (lambda g, x: 1 if x else 2, errors.DeclarationError, "no truth value.*gc.where"),
    "iteration": (lambda g, x: list(x), errors.DeclarationError, "cannot be iterated"),
    "array": (lambda g, x: np.asarray(x), errors.DeclarationError, "holds no data"),
    "update of an input": (
        lambda g, x: g.update("x", x),
        errors.DeclarationError,
        "only parameters and states can be updated",
    ),
    "update type": (
        lambda g, x: (g.parameter("w", (3,)), g.update("w", x)),
        errors.ShapeError,
        r"f32\[3\] cannot be updated with 'x' f32\[2\]",
    ),
    "name": (
        lambda g, x: (g.parameter("weight", (3,)), g.node("wieght")),
        errors.NameLookupError,
        "no node 'wieght'; did you mean 'weight'",
    ),
    "operand": (
        lambda g, x: g.add("exp", ("x",)),
        errors.DeclarationError,
        "operand 0 is str, not a value of the graph",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_node_and_the_fix_in_one_line(case):
    function, kind, message = ERRORS[case]
    graph = Graph("errors")
    x = graph.input("x", (2,))
    with pytest.raises(kind, match=message) as caught:
        function(graph, x)
    assert "\n" not in str(caught.value)
