"""A declared graph as an ONNX model, for Netron and for the libraries that read one.

Operators follow the specification of operator set 20 (https://onnx.ai/onnx/operators). Needs the
package `onnx`, the extra of that name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from graphc import errors
from graphc.init import materialise
from graphc.interop.steps import Step, axis_of, steps
from graphc.ir import SOURCES, Graph, Node, Value
from graphc.ops import registry
from graphc.serialize import write_atomically

OPSET = 20
IR_VERSION = 10  # what onnxruntime and OpenVINO read; newer onnx packages write newer ones


class HasState(Protocol):
    """An executable, as far as exporting its weights is concerned."""

    def state(self) -> dict[str, np.ndarray]: ...


def export_onnx(
    graph: Graph,
    path: str | os.PathLike[str],
    weights: Mapping[str, np.ndarray] | HasState | None = None,
    *,
    outputs: Sequence[str] | None = None,
    dims: Mapping[str, int] | None = None,
) -> None:
    """Write the forward graph, as it is in inference, as an ONNX file.

    graph    as declared (an executable's graph is fused, and has a backward pass)
    weights  arrays by name, or the executable that has them; None: initial ones, from seed 0
    outputs  names of outputs or values; default: every output that is not a scalar, such as a loss
    dims     sizes of the symbolic dimensions; None: they are named dimensions of the file too

    Raises MissingExtraError without `onnx`, GraphcError naming operators that have no translation.
    """
    if weights is None:
        nodes = {**graph.parameters, **graph.states}
        weights = {name: materialise(node, 0) for name, node in nodes.items()}
    elif not isinstance(weights, Mapping):
        weights = weights.state()
    names = outputs or [name for name, v in graph.outputs.items() if v.rank] or [*graph.outputs]
    bound = graph.copy() if dims is None else graph.bind(dims)
    bound.outputs = {name: bound.value(name) for name in names}
    forward = _inference(bound)
    write_atomically(path, onnx_model(forward, weights))


def _inference(graph: Graph) -> Graph:
    """What the outputs need, with batch norm and dropout as they are in inference."""

    def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
        if node.op == "dropout":
            return inputs[:1]
        if node.attrs.get("training", False) is False:
            return None
        return new.add(node.op, inputs, {**node.attrs, "training": False}, name=node.name).outputs

    graph.updates = {}
    plain = graph.rebuild(visit)
    return plain.subgraph(list(plain.outputs.values()))


def onnx_model(graph: Graph, weights: Mapping[str, np.ndarray]) -> bytes:
    """The model of an inference graph, serialised; `weights`: parameters and states by name.

    Raises MissingExtraError, GraphcError naming every operator that has no translation."""
    try:
        from onnx import checker, helper
    except ImportError:
        raise errors.MissingExtraError(
            'ONNX files need the package onnx: pip install "graphc-nn[onnx]"'
        ) from None
    simple = _decomposed(graph)
    writer = _Writer(simple)
    for step in steps(simple):
        writer.write(step)
    results = []
    for name, value in simple.outputs.items():
        if writer.names[value] != name:  # an operand as it is, or a second name
            writer.step = None
            writer.node("Identity", [writer.names[value]], output=name)
        results.append(_described(value, name))
    used = {name for node in writer.nodes for name in node.input}
    arrays = {**weights, **{n.name: n.attrs["value"] for n in simple if n.op == "constant"}}
    for name, array in arrays.items():
        if name in used:
            writer.store(array, name)
    body = helper.make_graph(
        writer.nodes,
        simple.name,
        [_described(node[0], name) for name, node in simple.inputs.items()],
        results,
        writer.stored,
    )
    model = helper.make_model(
        body,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="graphc",
    )
    checker.check_model(model)
    return model.SerializeToString()


def _described(value: Value, name: str) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, _element(value.dtype), list(value.shape))


def _element(dtype: str) -> int:
    from onnx import helper

    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _decomposed(graph: Graph) -> Graph:
    """The graph with every operator written in those that have a translation.

    Raises GraphcError listing all that have none."""
    missing = [n for n in graph if n.op not in SOURCES and n.op not in _WORDS]
    if not missing:
        return graph
    lacking = [n for n in missing if registry.get(n.op).decompose is None]
    if lacking:
        raise errors.GraphcError(
            f"ONNX has no translation of {'; '.join(n.describe() for n in lacking)}: add one to "
            "graphc.interop.onnx, or name outputs that do not need it"
        )
    names = {node.name for node in missing}

    def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
        rule = registry.get(node.op).decompose if node.name in names else None
        if rule is None:
            return None
        with new.origin(node.origin):
            return tuple(rule(node, inputs))

    return _decomposed(graph.rebuild(visit))


class _Writer:
    """Nodes and stored arrays of a model under construction; `names` of all values."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Any] = []
        self.stored: list[Any] = []
        self.step: Step | None = None
        self.names = {value: value.name for node in graph for value in node.outputs}
        for name, value in graph.outputs.items():
            # The output's own name, if the value has no other that callers know.
            if value.node.op not in SOURCES and name not in graph:
                self.names[value] = name

    def write(self, step: Step) -> None:
        """The nodes of one step."""
        self.step = step
        operands = [self.names[value] for value in step.inputs if value is not None]
        _WORDS[step.op](self, step, operands)

    def node(
        self,
        op: str,
        operands: Sequence[Any],
        *,
        output: str = "",
        inner: str = "",
        **attributes: Any,
    ) -> str:
        """One node; its output's name. Operands are names, or arrays and numbers to be stored.

        It gives the step's result, with `inner` a value on the way there, or without a step the
        value `output`."""
        from onnx import helper

        step, name = self.step, f"output {output}"
        if step is not None:
            # Names of nodes have dots in them: what has a slash is none of theirs.
            name = f"{step.node.name}/{inner}" if inner else step.node.name
            output = name if inner else self.names[step.output]
        names = [
            operand if isinstance(operand, str) else self.store(operand, f"{name}/{number}")
            for number, operand in enumerate(operands)
        ]
        made = helper.make_node(op, names, [output], name, **attributes)
        if step is not None:
            made.doc_string = f"{step.node.origin.layer} {step.node.origin}".strip()
        self.nodes.append(made)
        return output

    def store(self, value: Any, name: str) -> str:
        """Keep an array in the model; lists of integers are int64, as shapes and axes must be."""
        from onnx import numpy_helper

        kind = np.int64 if isinstance(value, (list, tuple)) else None
        array = np.array(value, kind, order="C")  # a number stays without axes
        self.stored.append(numpy_helper.from_array(array, name))
        return name


# A word writes one step, given the names of its operands.
_Word = Callable[[_Writer, Step, list[str]], object]


def _plain(op: str) -> _Word:
    return lambda w, step, x: w.node(op, x)


def _scalar(step: Step, value: float) -> np.ndarray:
    """A number of the step's element type, without axes."""
    return np.array(value, step.node.inputs[0].dtype)


def _linear(w: _Writer, step: Step, x: list[str]) -> object:
    if step.node.types[0].rank == 2:
        return w.node("Gemm", x, transB=1)
    weight = w.node("Transpose", [x[1]], inner="weight", perm=[1, 0])
    if len(x) == 2:
        return w.node("MatMul", [x[0], weight])
    return w.node("Add", [w.node("MatMul", [x[0], weight], inner="product"), x[2]])


def _geometry(step: Step, kernel: Sequence[Any]) -> dict[str, Any]:
    a = step.node.attrs
    (top, bottom), (left, right) = a["padding"]
    return {
        "kernel_shape": list(kernel),
        "strides": list(a["stride"]),
        "pads": [top, left, bottom, right],
        "dilations": list(a.get("dilation", (1, 1))),
    }


def _conv(w: _Writer, step: Step, x: list[str]) -> object:
    shape = step.node.inputs[1].shape[2:]
    return w.node("Conv", x, **_geometry(step, shape), group=step.node.attrs["groups"])


def _max_pool(w: _Writer, step: Step, x: list[str]) -> object:
    return w.node("MaxPool", x, **_geometry(step, step.node.attrs["kernel"]))


def _avg_pool(w: _Writer, step: Step, x: list[str]) -> object:
    geometry = _geometry(step, step.node.attrs["kernel"])
    return w.node("AveragePool", x, **geometry, count_include_pad=1)


def _batch_norm(w: _Writer, step: Step, x: list[str]) -> object:
    if step.node.attrs["training"]:
        raise errors.GraphcError(
            f"{step.node.describe()}: ONNX: batch norm with training=True; export it for inference"
        )
    return w.node("BatchNormalization", x, epsilon=step.node.attrs["eps"])


def _reduce(op: str) -> _Word:
    def write(w: _Writer, step: Step, x: list[str]) -> object:
        a, operand = step.node.attrs, step.node.inputs[0]
        axes = tuple(a["axis"])
        if op == "ReduceMean" and a["keepdims"] and operand.rank == 4 and axes == (2, 3):
            return w.node("GlobalAveragePool", x)
        if not axes:
            return w.node("Identity", x)
        return w.node(op, [*x, list(axes)], keepdims=int(a["keepdims"]))

    return write


def _argmax(w: _Writer, step: Step, x: list[str]) -> object:
    a, operand = step.node.attrs, step.node.inputs[0]
    axes = tuple(a["axis"])
    if len(axes) > 1 and axes != tuple(range(operand.rank)):
        raise errors.GraphcError(
            f"{step.node.describe()}: ONNX: argmax over one axis or all, not over {axes}"
        )
    if len(axes) != 1:
        flat = w.node("Reshape", [x[0], [-1]], inner="flat")
        found = w.node("ArgMax", [flat], inner="found", axis=0, keepdims=0)
        shape = w.node("Reshape", [found, list(step.node.types[0].shape)], inner="shaped")
    else:
        shape = w.node("ArgMax", x, inner="found", axis=axes[0], keepdims=int(a["keepdims"]))
    return w.node("Cast", [shape], to=_element(step.node.types[0].dtype))


def _reshape(w: _Writer, step: Step, x: list[str]) -> object:
    shape = step.node.types[0].shape
    symbolic = [d for d in shape if isinstance(d, str)]
    if len(symbolic) > 1:
        raise errors.GraphcError(
            f"{step.node.describe()}: ONNX: {step.node.types[0]} has several symbolic dimensions; "
            f"pass dims={{{symbolic[0]!r}: ...}}"
        )
    return w.node("Reshape", [*x, [-1 if isinstance(d, str) else d for d in shape]])


def _expand(w: _Writer, step: Step, x: list[str]) -> object:
    # ONNX broadcasts both ways: a dimension that the operand has already may be 1.
    shape = [1 if isinstance(d, str) else d for d in step.node.types[0].shape]
    return w.node("Expand", [*x, shape])


def _slice(w: _Writer, step: Step, x: list[str]) -> object:
    a, sizes = step.node.attrs, step.node.inputs[0].shape
    end = np.iinfo(np.int64).max
    # A symbolic dimension is taken whole: its stop is its own name.
    stops = [end if isinstance(s, str) else s for s in a["stops"]]
    starts = [0 if isinstance(s, str) else s for s in a["starts"]]
    return w.node("Slice", [*x, starts, stops, list(range(len(sizes))), list(a["steps"])])


def _pad(w: _Writer, step: Step, x: list[str]) -> object:
    pairs = step.node.attrs["padding"]
    amounts = [*(before for before, _ in pairs), *(after for _, after in pairs)]
    return w.node("Pad", [*x, amounts, _scalar(step, step.node.attrs["value"])])


def _one_hot(w: _Writer, step: Step, x: list[str]) -> object:
    # Comparing leaves labels out of range without a class; ONNX's OneHot counts from the end.
    a = step.node.attrs
    label = w.node("Unsqueeze", [x[0], [a["axis"]]], inner="column")
    shape = [1] * step.node.types[0].rank
    shape[a["axis"]] = a["classes"]
    classes = np.arange(a["classes"], dtype=step.node.inputs[0].dtype).reshape(shape)
    return w.node("Cast", [w.node("Equal", [label, classes], inner="hit")], to=_element(a["dtype"]))


def _softplus(w: _Writer, step: Step, x: list[str]) -> object:
    beta, threshold = step.node.attrs["beta"], step.node.attrs["threshold"]
    scaled = w.node("Mul", [x[0], _scalar(step, beta)], inner="scaled")
    soft = w.node("Softplus", [scaled], inner="soft")
    soft = w.node("Div", [soft, _scalar(step, beta)], inner="unscaled")
    large = w.node("Greater", [scaled, _scalar(step, threshold)], inner="large")
    return w.node("Where", [large, x[0], soft])


def _clip(w: _Writer, step: Step, x: list[str]) -> object:
    bounds = [step.node.attrs["min"], step.node.attrs["max"]]
    return w.node("Clip", [*x, *("" if b is None else _scalar(step, b) for b in bounds)])


def _entropy_of_logits(w: _Writer, step: Step, x: list[str]) -> object:
    """max(x, 0) - x t + log(1 + exp(-|x|)), as graphc computes it."""
    product = w.node("Mul", x, inner="product")
    positive = w.node("Sub", [w.node("Relu", [x[0]], inner="positive"), product], inner="linear")
    size = w.node("Neg", [w.node("Abs", [x[0]], inner="size")], inner="minus")
    return w.node("Add", [positive, w.node("Softplus", [size], inner="soft")])


def _with_axes(word: _Word) -> _Word:
    """A word for operands with axes; a number without any is left as it is."""
    return lambda w, step, x: (
        word(w, step, x) if step.node.inputs[0].rank else w.node("Identity", x)
    )


_WORDS: dict[str, _Word] = {
    "add": _plain("Add"),
    "sub": _plain("Sub"),
    "mul": _plain("Mul"),
    "div": _plain("Div"),
    "pow": _plain("Pow"),
    "maximum": _plain("Max"),
    "minimum": _plain("Min"),
    "neg": _plain("Neg"),
    "abs": _plain("Abs"),
    "sign": _plain("Sign"),
    "square": lambda w, step, x: w.node("Mul", [x[0], x[0]]),
    "reciprocal": _plain("Reciprocal"),
    "sqrt": _plain("Sqrt"),
    "rsqrt": lambda w, step, x: w.node("Reciprocal", [w.node("Sqrt", x, inner="root")]),
    "exp": _plain("Exp"),
    "expm1": lambda w, step, x: w.node("Sub", [w.node("Exp", x, inner="exp"), _scalar(step, 1)]),
    "log": _plain("Log"),
    "log1p": lambda w, step, x: w.node("Log", [w.node("Add", [*x, _scalar(step, 1)], inner="sum")]),
    "sin": _plain("Sin"),
    "cos": _plain("Cos"),
    "erf": _plain("Erf"),
    "floor": _plain("Floor"),
    "ceil": _plain("Ceil"),
    "lt": _plain("Less"),
    "le": _plain("LessOrEqual"),
    "gt": _plain("Greater"),
    "ge": _plain("GreaterOrEqual"),
    "eq": _plain("Equal"),
    "ne": lambda w, step, x: w.node("Not", [w.node("Equal", x, inner="equal")]),
    "logical_and": _plain("And"),
    "logical_or": _plain("Or"),
    "logical_not": _plain("Not"),
    "where": _plain("Where"),
    "cast": lambda w, step, x: w.node("Cast", x, to=_element(step.node.attrs["dtype"])),
    "one_hot": _one_hot,
    "sum": _reduce("ReduceSum"),
    "mean": _reduce("ReduceMean"),
    "max": _reduce("ReduceMax"),
    "min": _reduce("ReduceMin"),
    "prod": _reduce("ReduceProd"),
    "argmax": _argmax,
    "relu": _plain("Relu"),
    "leaky_relu": lambda w, step, x: w.node(
        "LeakyRelu", x, alpha=float(step.node.attrs["negative_slope"])
    ),
    "elu": lambda w, step, x: w.node("Elu", x, alpha=float(step.node.attrs["alpha"])),
    "selu": _plain("Selu"),
    "sigmoid": _plain("Sigmoid"),
    "tanh": _plain("Tanh"),
    "silu": lambda w, step, x: w.node("Mul", [x[0], w.node("Sigmoid", x, inner="gate")]),
    "softplus": _softplus,
    "clip": _clip,
    "gelu": lambda w, step, x: w.node("Gelu", x, approximate=step.node.attrs["approximate"]),
    "matmul": _plain("MatMul"),
    "linear": _linear,
    "conv2d": _conv,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "batch_norm": _batch_norm,
    "softmax": lambda w, step, x: w.node("Softmax", x, axis=axis_of(step)),
    "log_softmax": lambda w, step, x: w.node("LogSoftmax", x, axis=axis_of(step)),
    "logsumexp": _reduce("ReduceLogSumExp"),
    "squared_error": lambda w, step, x: w.node("Mul", [w.node("Sub", x, inner="difference")] * 2),
    "binary_cross_entropy_with_logits": _entropy_of_logits,
    "reshape": _reshape,
    "transpose": _with_axes(
        lambda w, step, x: w.node("Transpose", x, perm=list(step.node.attrs["axes"]))
    ),
    "expand": _expand,
    "stop_gradient": _plain("Identity"),
    "slice": _with_axes(_slice),
    "pad": _with_axes(_pad),
    "concat": lambda w, step, x: w.node("Concat", x, axis=step.node.attrs["axis"]),
}
