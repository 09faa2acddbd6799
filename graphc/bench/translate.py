"""Write a declared graph in the words of other libraries, so that all of them run the same network.

PyTorch and JAX get straight-line Python source, one statement an operator, as a careful user would
write it (no module calls, layers with their fused function: `F.linear`, `F.conv2d` with bias,
`F.cross_entropy`). ONNX is in `graphc.interop.onnx`. One table a library says how each operator
is written; a network with an operator that is not there is refused by name.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from graphc import errors
from graphc.interop.steps import Step, axis_of, steps
from graphc.ir import Graph, Value


class Writer:
    """Writes steps as Python source.

    words: for each operator, (step, its operands as text) -> expression.
    """

    def __init__(self, library: str, head: str, words: dict[str, Callable[[Step, list[str]], str]]):
        self.library, self.head, self.words = library, head, words

    def source(self, graph: Graph) -> str:
        """The module that defines `forward(p, s, <inputs>)`, which returns the graph's only output.

        p: parameters and constants by name; s: states, which training updates in place."""
        names: dict[Value, str] = {}
        for node in graph:
            if node.op == "input":
                names[node[0]] = node.name
            elif node.op in ("parameter", "state"):
                names[node[0]] = f"{'p' if node.op == 'parameter' else 's'}[{node.name!r}]"
            elif node.op == "constant":
                value = node.attrs["value"]
                names[node[0]] = repr(value.item()) if value.size == 1 else f"p[{node.name!r}]"
        lines = [self.head, f"def forward(p, s, {', '.join(graph.inputs)}):"]
        for number, step in enumerate(steps(graph)):
            write = self.words.get(step.op)
            if write is None:
                raise errors.GraphcError(
                    f"{step.node.describe()}: the benchmark cannot write {step.op!r} for "
                    f"{self.library}: add it to graphc.bench.translate"
                )
            operands = ["None" if v is None else names[v] for v in step.inputs]
            names[step.output] = f"t{number}"
            lines.append(f"    t{number} = {write(step, operands)}  # {step.node.name}")
        (output,) = graph.outputs.values()
        lines.append(f"    return {names[output]}")
        return "\n".join(lines) + "\n"

    def function(self, graph: Graph) -> Callable:
        """`forward` of `source`, compiled; its lines are known to tracebacks and debuggers."""
        source = self.source(graph)
        filename = f"<{graph.name} for {self.library}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        scope: dict[str, Any] = {}
        exec(compile(source, filename, "exec"), scope)
        return scope["forward"]


def constants(graph: Graph) -> dict[str, np.ndarray]:
    """Constant arrays by name, which `forward` takes among its parameters."""
    return {n.name: n.attrs["value"] for n in graph if n.op == "constant" and n.types[0].size != 1}


# ---- shared words


def _binary(symbol: str) -> Callable[[Step, list[str]], str]:
    return lambda step, x: f"{x[0]} {symbol} {x[1]}"


def _call(function: str) -> Callable[[Step, list[str]], str]:
    return lambda step, x: f"{function}({', '.join(x)})"


def _attribute(step: Step, name: str) -> Any:
    return step.node.attrs[name]


def _reduction(form: str) -> Callable[[Step, list[str]], str]:
    """A reduction written as `form`, with its operand {x}, {axis} and {keepdims}."""

    def write(step: Step, x: list[str]) -> str:
        axis, keepdims = _attribute(step, "axis"), _attribute(step, "keepdims")
        return form.format(x=x[0], axis=tuple(axis), keepdims=keepdims)

    return write


def _common(module: str) -> dict[str, Callable[[Step, list[str]], str]]:
    """What PyTorch and JAX write alike, with functions of `module`."""
    return {
        "add": _binary("+"),
        "sub": _binary("-"),
        "mul": _binary("*"),
        "div": _binary("/"),
        "matmul": _binary("@"),
        "neg": lambda step, x: f"-{x[0]}",
        "square": lambda step, x: f"{x[0]} * {x[0]}",
        **{n: _call(f"{module}.{n}") for n in ("exp", "log", "sqrt", "tanh", "maximum")},
        "reshape": lambda step, x: f"{x[0]}.reshape({step.node.types[0].shape})",
    }


def _symmetric(step: Step) -> tuple[int, ...] | None:
    """Padding as (height, width) where both sides of an axis have the same."""
    pairs = _attribute(step, "padding")
    return tuple(a for a, _ in pairs) if all(a == b for a, b in pairs) else None


def _require_symmetric(step: Step, library: str) -> tuple[int, ...]:
    padding = _symmetric(step)
    if padding is None:
        raise errors.GraphcError(
            f"{step.node.describe()}: {library} pads both sides of a pooled image alike, not "
            f"{_attribute(step, 'padding')}"
        )
    return padding


# ---- PyTorch


def _torch_conv(step: Step, x: list[str]) -> str:
    padding, image = _symmetric(step), x[0]
    if padding is None:
        (top, bottom), (left, right) = _attribute(step, "padding")
        image, padding = f"F.pad({image}, ({left}, {right}, {top}, {bottom}))", (0, 0)
    a = step.node.attrs
    geometry = f"{a['stride']}, {padding}, {a['dilation']}, {a['groups']}"
    return f"F.conv2d({image}, {x[1]}, {x[2]}, {geometry})"


def _torch_max_pool(step: Step, x: list[str]) -> str:
    a, padding = step.node.attrs, _require_symmetric(step, "PyTorch")
    return f"F.max_pool2d({x[0]}, {a['kernel']}, {a['stride']}, {padding}, {a['dilation']})"


def _torch_avg_pool(step: Step, x: list[str]) -> str:
    a, padding = step.node.attrs, _require_symmetric(step, "PyTorch")
    return f"F.avg_pool2d({x[0]}, {a['kernel']}, {a['stride']}, {padding})"


def _torch_batch_norm(step: Step, x: list[str]) -> str:
    a = step.node.attrs
    training = _attribute(step, "training")
    return (
        f"F.batch_norm({x[0]}, {x[3]}, {x[4]}, {x[1]}, {x[2]}, {bool(training)}, "
        f"{a['momentum']}, {a['eps']})"
    )


TORCH = Writer(
    "PyTorch",
    "import torch\nimport torch.nn.functional as F\n\n",
    {
        **_common("torch"),
        "relu": _call("F.relu"),
        "sigmoid": _call("torch.sigmoid"),
        "silu": _call("F.silu"),
        "gelu": lambda step, x: f"F.gelu({x[0]}, approximate={_attribute(step, 'approximate')!r})",
        "linear": _call("F.linear"),
        "conv2d": _torch_conv,
        "max_pool2d": _torch_max_pool,
        "avg_pool2d": _torch_avg_pool,
        "batch_norm": _torch_batch_norm,
        "mean": _reduction("{x}.mean(dim={axis}, keepdim={keepdims})"),
        "sum": _reduction("{x}.sum(dim={axis}, keepdim={keepdims})"),
        "softmax": lambda step, x: f"F.softmax({x[0]}, dim={axis_of(step)})",
        "log_softmax": lambda step, x: f"F.log_softmax({x[0]}, dim={axis_of(step)})",
        "transpose": lambda step, x: f"{x[0]}.permute({_attribute(step, 'axes')})",
        "concat": lambda step, x: f"torch.cat(({', '.join(x)},), dim={_attribute(step, 'axis')})",
        "cross_entropy": lambda step, x: (
            f"F.cross_entropy({x[0]}, {x[1]}, "
            f"label_smoothing={_attribute(step, 'label_smoothing')})"
        ),
    },
)


# ---- JAX

_JAX_HEAD = """\
import jax
import jax.numpy as jnp
from jax import lax, nn


def batch_norm(x, weight, bias, mean, var, training, momentum, eps, s, names):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    if training:
        axes = tuple(a for a in range(x.ndim) if a != 1)
        n = x.size // x.shape[1]
        kept = {names[0]: mean, names[1]: var}
        mean, var = jnp.mean(x, axes), jnp.var(x, axes)
        s[names[0]] = kept[names[0]] + momentum * (mean - kept[names[0]])
        s[names[1]] = kept[names[1]] + momentum * (var * n / (n - 1) - kept[names[1]])
    scale = lax.rsqrt(var + eps) * weight
    return x * scale.reshape(shape) + (bias - mean * scale).reshape(shape)


def cross_entropy(logits, label, smoothing):
    log_p = nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, label[:, None], axis=1)[:, 0]
    return -jnp.mean((1 - smoothing) * picked + smoothing * jnp.mean(log_p, axis=1))


def conv2d(x, weight, bias, stride, padding, dilation, groups):
    y = lax.conv_general_dilated(
        x, weight, stride, padding, rhs_dilation=dilation, feature_group_count=groups,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return y if bias is None else y + bias[:, None, None]


def pool(x, start, combine, kernel, stride, padding, dilation=(1, 1)):
    return lax.reduce_window(
        x, start, combine, (1, 1, *kernel), (1, 1, *stride), ((0, 0), (0, 0), *padding),
        window_dilation=(1, 1, *dilation),
    )


"""


def _jax_batch_norm(step: Step, x: list[str]) -> str:
    a = step.node.attrs
    names = tuple(v.node.name for v in step.inputs[3:5] if v is not None)
    training = bool(a["training"])
    return f"batch_norm({', '.join(x)}, {training}, {a['momentum']}, {a['eps']}, s, {names})"


def _jax_conv(step: Step, x: list[str]) -> str:
    a = step.node.attrs
    return f"conv2d({', '.join(x)}, {a['stride']}, {a['padding']}, {a['dilation']}, {a['groups']})"


def _jax_max_pool(step: Step, x: list[str]) -> str:
    a = step.node.attrs
    geometry = f"{a['kernel']}, {a['stride']}, {a['padding']}, {a['dilation']}"
    return f"pool({x[0]}, -jnp.inf, lax.max, {geometry})"


def _jax_avg_pool(step: Step, x: list[str]) -> str:
    geometry = ", ".join(str(_attribute(step, n)) for n in ("kernel", "stride", "padding"))
    return f"pool({x[0]}, 0.0, lax.add, {geometry}) / {math.prod(_attribute(step, 'kernel'))}"


JAX = Writer(
    "JAX",
    _JAX_HEAD,
    {
        **_common("jnp"),
        "relu": _call("nn.relu"),
        "sigmoid": _call("nn.sigmoid"),
        "silu": _call("nn.silu"),
        "gelu": lambda step, x: f"nn.gelu({x[0]}, {_attribute(step, 'approximate') == 'tanh'})",
        "linear": lambda step, x: f"{x[0]} @ {x[1]}.T" + ("" if x[2] == "None" else f" + {x[2]}"),
        "conv2d": _jax_conv,
        "max_pool2d": _jax_max_pool,
        "avg_pool2d": _jax_avg_pool,
        "batch_norm": _jax_batch_norm,
        "mean": _reduction("jnp.mean({x}, axis={axis}, keepdims={keepdims})"),
        "sum": _reduction("jnp.sum({x}, axis={axis}, keepdims={keepdims})"),
        "softmax": lambda step, x: f"nn.softmax({x[0]}, {axis_of(step)})",
        "log_softmax": lambda step, x: f"nn.log_softmax({x[0]}, {axis_of(step)})",
        "transpose": lambda step, x: f"{x[0]}.transpose({_attribute(step, 'axes')})",
        "concat": lambda step, x: (
            f"jnp.concatenate(({', '.join(x)},), axis={_attribute(step, 'axis')})"
        ),
        "cross_entropy": lambda step, x: (
            f"cross_entropy({x[0]}, {x[1]}, {_attribute(step, 'label_smoothing')})"
        ),
    },
)
