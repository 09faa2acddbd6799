"""A declared graph as an ONNX model, for the libraries that read one. Needs `onnx`, not PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from graphc import errors
from graphc.bench.translate import Step, axis_of, steps
from graphc.ir import Graph, Value

OPSET = 20
IR_VERSION = 10  # what onnxruntime and OpenVINO read; newer onnx packages write newer ones


def onnx_model(graph: Graph, weights: Mapping[str, np.ndarray]) -> bytes:
    """The model of a bound inference graph, serialised.

    `weights`: parameters and states by name. Raises GraphcError naming an operator that has no
    translation."""
    from onnx import TensorProto, checker, helper, numpy_helper

    types = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    arrays = {**weights, **{n.name: n.attrs["value"] for n in graph if n.op == "constant"}}
    nodes: list[Any] = []
    extra: list[Any] = []

    def integers(name: str, values: Any) -> str:
        extra.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    for step in steps(graph):
        write = _WORDS.get(step.op)
        if write is None:
            raise errors.GraphcError(
                f"{step.node.describe()}: the benchmark cannot write {step.op!r} for ONNX: "
                "add it to graphc.bench.onnx_model"
            )
        op, operands, attributes = write(step, [_name(v) for v in step.inputs if v is not None])
        names = [
            item if isinstance(item, str) else integers(f"{step.node.name}.{number}", item)
            for number, item in enumerate(operands)
        ]
        nodes.append(
            helper.make_node(op, names, [_name(step.output)], step.node.name, **attributes)
        )
    used = {name for node in nodes for name in node.input}
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items() if n in used]

    def described(value: Value, name: str):
        return helper.make_tensor_value_info(name, types[value.dtype], list(value.shape))

    (output,) = graph.outputs.values()
    body = helper.make_graph(
        nodes,
        graph.name,
        [described(node[0], name) for name, node in graph.inputs.items()],
        [described(output, _name(output))],
        [*stored, *extra],
    )
    model = helper.make_model(
        body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    checker.check_model(model)
    return model.SerializeToString()


def _name(value: Value) -> str:
    return value.name


# A word gives (ONNX operator, operands: names or integer arrays, attributes).
_Word = Callable[[Step, list[str]], tuple[str, list[Any], dict[str, Any]]]


def _plain(op: str) -> _Word:
    return lambda step, x: (op, x, {})


def _linear(step: Step, x: list[str]) -> tuple[str, list[Any], dict[str, Any]]:
    if len(step.node.types[0].shape) != 2:
        raise errors.GraphcError(
            f"{step.node.describe()}: {step.node.types[0]}: ONNX's Gemm takes two dimensions"
        )
    return "Gemm", x, {"transB": 1}


def _geometry(step: Step, kernel: Any) -> dict[str, Any]:
    a = step.node.attrs
    (top, bottom), (left, right) = a["padding"]
    return {
        "kernel_shape": list(kernel),
        "strides": list(a["stride"]),
        "pads": [top, left, bottom, right],
        "dilations": list(a.get("dilation", (1, 1))),
    }


def _conv(step: Step, x: list[str]) -> tuple[str, list[Any], dict[str, Any]]:
    kernel = step.node.inputs[1].shape[2:]
    return "Conv", x, {**_geometry(step, kernel), "group": step.node.attrs["groups"]}


def _pool(op: str) -> _Word:
    return lambda step, x: (op, x, _geometry(step, step.node.attrs["kernel"]))


def _batch_norm(step: Step, x: list[str]) -> tuple[str, list[Any], dict[str, Any]]:
    return "BatchNormalization", x, {"epsilon": step.node.attrs["eps"]}


def _mean(step: Step, x: list[str]) -> tuple[str, list[Any], dict[str, Any]]:
    a = step.node.attrs
    if a["keepdims"] and step.node.inputs[0].rank == 4 and tuple(a["axis"]) == (2, 3):
        return "GlobalAveragePool", x, {}
    return "ReduceMean", [*x, list(a["axis"])], {"keepdims": int(a["keepdims"])}


_WORDS: dict[str, _Word] = {
    "add": _plain("Add"),
    "sub": _plain("Sub"),
    "mul": _plain("Mul"),
    "div": _plain("Div"),
    "neg": _plain("Neg"),
    "exp": _plain("Exp"),
    "log": _plain("Log"),
    "sqrt": _plain("Sqrt"),
    "tanh": _plain("Tanh"),
    "sigmoid": _plain("Sigmoid"),
    "maximum": _plain("Max"),
    "relu": _plain("Relu"),
    "matmul": _plain("MatMul"),
    "linear": _linear,
    "conv2d": _conv,
    "max_pool2d": _pool("MaxPool"),
    "avg_pool2d": _pool("AveragePool"),
    "batch_norm": _batch_norm,
    "mean": _mean,
    "gelu": lambda step, x: ("Gelu", x, {"approximate": step.node.attrs["approximate"]}),
    "softmax": lambda step, x: ("Softmax", x, {"axis": axis_of(step)}),
    "reshape": lambda step, x: ("Reshape", [*x, list(step.node.types[0].shape)], {}),
    "transpose": lambda step, x: ("Transpose", x, {"perm": list(step.node.attrs["axes"])}),
    "concat": lambda step, x: ("Concat", x, {"axis": step.node.attrs["axis"]}),
}
