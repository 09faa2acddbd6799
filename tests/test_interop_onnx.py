"""ONNX: every operator with a translation gives what the interpreter gives; networks too."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import graphc as gc
from graphc.errors import GraphcError, MissingExtraError
from graphc.init import materialise
from graphc.ops import registry

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from graphc.interop.onnx import _WORDS, onnx_model  # noqa: E402  # after the skip

LAYERS = {"linear"}  # made of several operators


def run(model: bytes, feeds):
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def as_graph(op, sample):
    """An operator applied to inputs, and the arrays for them."""
    g, values, feeds = gc.Graph(op), [], {}
    for number, array in enumerate(sample.inputs):
        array = array.astype("float32") if array.dtype.kind == "f" else array
        feeds[f"x{number}"] = np.array(array)
        values.append(g.input(f"x{number}", array.shape, array.dtype.name))
    attrs = {**sample.attrs, **({"training": False} if "training" in sample.attrs else {})}
    g.output(result=g.add(op, values, attrs)[0])
    return g, feeds


def registry_sample(op):
    """The attributes of an operator's first sample."""
    return registry.get(op).samples()[0].attrs


def cases():
    for op in sorted({*_WORDS, "var", "nll_loss", "softmax_cross_entropy"} - LAYERS):
        for number, sample in enumerate(registry.get(op).samples()):
            if 0 in [d for array in sample.inputs for d in array.shape]:
                continue  # runtimes differ on empty arrays
            if op == "argmax" and 1 < len(sample.attrs["axis"]) < sample.inputs[0].ndim:
                continue  # see test_argmax_over_some_axes
            yield pytest.param(op, sample, id=f"{op}-{number}")


@pytest.mark.parametrize("op, sample", list(cases()))
def test_operator(op, sample):
    g, feeds = as_graph(op, sample)
    found = run(onnx_model(g, {}), feeds)["result"]
    expected = gc.interpret(g, feeds).outputs["result"]
    assert found.shape == expected.shape and found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lenet5", "mlp", "resnet20"])
def test_network_computes_the_same(name, tmp_path):
    """With the batch left open, the weights of a trained executable, and the outputs' names."""
    g = getattr(gc.zoo, name)()
    infer = gc.compile(g, outputs=["logits"], dims={"N": 3}, target="interpret", seed=7)
    gc.export_onnx(g, tmp_path / "net.onnx", infer)
    shape = (3, *g.inputs["image"].types[0].shape[1:])
    image = np.random.default_rng(0).standard_normal(shape).astype("float32")
    found = run((tmp_path / "net.onnx").read_bytes(), {"image": image})
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"], infer(image=image)["logits"], rtol=1e-3, atol=1e-4)


def test_files_say_where_nodes_come_from(tmp_path):
    g = gc.zoo.lenet5()
    gc.export_onnx(g, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    assert conv.doc_string.startswith("conv1 ") and ".py:" in conv.doc_string
    (image,) = model.graph.input
    assert image.type.tensor_type.shape.dim[0].dim_param == "N"
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    expected = materialise(g.parameters["conv1.weight"], 0)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored["conv1.weight"]), expected)
    gc.export_onnx(g, tmp_path / "bound.onnx", outputs=["logits", "loss"], dims={"N": 2})
    bound = onnx.load(tmp_path / "bound.onnx")
    assert [o.name for o in bound.graph.output] == ["logits", "loss"]
    assert {i.name for i in bound.graph.input} == {"image", "label"}


def test_an_output_that_is_an_input():
    g = gc.Graph("same")
    x = g.input("x", (2,))
    y = gc.relu(x, name="y")
    g.output(first=y, second=y, given=x)
    array = np.array([-1, 2], "float32")
    found = run(onnx_model(g, {}), {"x": array})
    assert found["given"].tolist() == [-1, 2]
    assert found["first"].tolist() == found["second"].tolist() == [0, 2]


def test_argmax_over_some_axes_is_refused():
    g = gc.Graph("some")
    g.output(y=gc.argmax(g.input("x", (2, 3, 4)), axis=(0, 2), name="pick"))
    with pytest.raises(GraphcError, match=r"pick .*one axis or all"):
        onnx_model(g, {})


def test_what_cannot_be_written_is_named():
    g = gc.Graph("pool")
    x = g.input("x", (1, 1, 4, 4))
    g.output(y=g.add("max_pool2d_argmax", [x], registry_sample("max_pool2d_argmax"), "where")[0])
    with pytest.raises(GraphcError, match=r"where \(max_pool2d_argmax, test_interop_onnx.py:"):
        onnx_model(g, {})


def test_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"graphc-nn\[onnx\]"):
        gc.export_onnx(gc.zoo.mlp(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
