"""Losses. Each operator gives one loss per element or per sample; the user function then reduces
them.

`reduction="mean"` averages over all of these losses, "sum" adds them, "none" returns them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index, call
from graphc.ir import Node, TensorType, Value
from graphc.ops.activation import sigmoid
from graphc.ops.compare import one_hot, where
from graphc.ops.elementwise import add, div, exp, log, log1p, maximum, mul, neg, sub
from graphc.ops.pointwise import operands
from graphc.ops.reduce import max as reduce_max
from graphc.ops.reduce import mean
from graphc.ops.reduce import sum as reduce_sum
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, lift, register
from graphc.ops.shape import reshape
from graphc.ops.softmax import log_softmax, softmax

__all__ = [
    "mse_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "softmax_cross_entropy",
    "nll_loss",
]


def mse_loss(
    prediction: Value, target: Any, reduction: str = "mean", name: str | None = None
) -> Value:
    """(prediction - target)^2, for two values of one shape. Raises ShapeError, DTypeError."""
    return _reduced("squared_error", operands(prediction, target), reduction, name)


def binary_cross_entropy(
    probability: Value, target: Any, reduction: str = "mean", name: str | None = None
) -> Value:
    """-(t log p + (1-t) log(1-p)) for p in [0, 1] and targets t of the same shape.

    As in PyTorch, logarithms are clamped at -100 and the gradient's denominator p(1-p) at 1e-12.
    From logits, `binary_cross_entropy_with_logits` is more accurate. Raises ShapeError, DTypeError.
    """
    return _reduced("binary_cross_entropy", operands(probability, target), reduction, name)


def binary_cross_entropy_with_logits(
    logits: Value, target: Any, reduction: str = "mean", name: str | None = None
) -> Value:
    """binary_cross_entropy(sigmoid(x), t) as max(x, 0) - x t + log(1 + exp(-|x|)), which never
    overflows.

    Raises ShapeError, DTypeError.
    """
    return _reduced("binary_cross_entropy_with_logits", operands(logits, target), reduction, name)


def softmax_cross_entropy(
    logits: Value,
    labels: Any,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    name: str | None = None,
) -> Value:
    """-sum over classes of target * log_softmax(logits), as PyTorch's cross_entropy.

    `logits`: [N,C], [N,C,d1,...], or [C], classes at axis 1 (of one axis: 0). `labels`: int32 or
    int64 class numbers of the logits' shape without the class axis, or float probabilities (one-hot
    included) of the logits' shape. `label_smoothing` e makes targets (1-e) * target + e/C (Szegedy
    et al. 2016, section 7). A label outside [0, C) contributes neither loss nor gradient, and still
    counts in the mean. Raises ShapeError, DTypeError.
    """
    if not 0 <= label_smoothing <= 1:
        raise errors.DeclarationError(
            f"label_smoothing={label_smoothing!r} must lie between 0 and 1"
        )
    pair = logits, _as_labels(labels, logits)
    smoothing = float(label_smoothing)
    return _reduced("softmax_cross_entropy", pair, reduction, name, label_smoothing=smoothing)


def nll_loss(
    log_probabilities: Value, labels: Any, reduction: str = "mean", name: str | None = None
) -> Value:
    """-log_probabilities[label]: the negative log-likelihood; with log_softmax before it, cross
    entropy.

    Shapes and labels as class numbers for `softmax_cross_entropy`; a label outside [0, C) gives 0.
    Raises ShapeError, DTypeError.
    """
    pair = log_probabilities, _as_labels(labels, log_probabilities)
    return _reduced("nll_loss", pair, reduction, name)


def _as_labels(labels: Any, logits: Value) -> Value:
    """Labels as a value: arrays of ints stay ints."""
    if not isinstance(labels, Value) and np.asarray(labels).dtype.kind in "iu":
        return logits.graph.constant(labels)
    return lift(labels, logits)


def _reduced(
    op: str, pair: tuple[Value, ...], reduction: str, name: str | None, **attrs: Any
) -> Value:
    reducers = {"mean": mean, "sum": reduce_sum, "none": None}
    if reduction not in reducers:
        raise errors.DeclarationError(
            f'{name or op}: reduction={reduction!r} must be "mean", "sum" or "none"'
        )
    losses = apply(op, *pair, name=name, **attrs)[0]
    reduce = reducers[reduction]
    return losses if reduce is None else reduce(losses, name=f"{losses.node.name}.{reduction}")


# ---- losses per element: prediction and target have one shape


def _infer_pair(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    a, b = types
    if not (a.is_float and b.dtype == a.dtype):
        raise errors.DTypeError(
            f"prediction {a} and target {b} must be of one float dtype; convert with gc.cast(x, "
            "'float32')"
        )
    if a.shape != b.shape:
        raise errors.ShapeError(
            f"prediction {a} and target {b} must have one shape (losses do not broadcast); "
            "reshape one of them"
        )
    return [a]


def _evaluate_squared(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    return [np.square(arrays[0] - arrays[1])]


def _vjp_squared(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    a, b = node.inputs
    g = cotangents[0]
    assert g is not None
    ga = mul(g, mul(sub(a, b), 2.0))
    return ga, neg(ga)


def _lower_squared(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    difference = k.read(0, index) - k.read(1, index)
    return difference * difference


def _evaluate_bce(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    p, t = arrays
    return [(t - 1) * np.maximum(np.log1p(-p), -100) - t * np.maximum(np.log(p), -100)]


def _vjp_bce(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (p, t), g = node.inputs, cotangents[0]
    assert g is not None
    spread = maximum(mul(sub(1.0, p), p), 1e-12)
    log_odds = sub(maximum(log1p(neg(p)), -100.0), maximum(log(p), -100.0))
    return mul(g, div(sub(p, t), spread)), mul(g, log_odds)


def _lower_bce(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    p, t = k.read(0, index), k.read(1, index)
    log_no, log_yes = (call("maximum", call(*f), -100.0) for f in (("log1p", -p), ("log", p)))
    return (t - 1.0) * log_no - t * log_yes


def _evaluate_bce_logits(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, t = arrays
    return [np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))]


def _vjp_bce_logits(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (x, t), g = node.inputs, cotangents[0]
    assert g is not None
    return mul(g, sub(sigmoid(x), t)), neg(mul(g, x))


def _lower_bce_logits(k: Lowering, node: Node, _: int, index: tuple[Index, ...]) -> Expr:
    x, t = k.read(0, index), k.read(1, index)
    return call("maximum", x, 0.0) - x * t + call("log1p", call("exp", -call("abs", x)))


# ---- losses per sample: classes at axis 1


def _class_axis(rank: int) -> int:
    return min(1, rank - 1)


def _infer_classes(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    logits, labels = types
    if not logits.is_float:
        raise errors.DTypeError(
            f"logits {logits} must be float32 or float64; convert with gc.cast(x, 'float32')"
        )
    if logits.rank == 0:
        raise errors.ShapeError(f"logits {logits} need an axis of classes, e.g. [N,C]")
    axis = _class_axis(logits.rank)
    classes, shape = logits.shape[axis], logits.shape[:axis] + logits.shape[axis + 1 :]
    if not isinstance(classes, int) or classes < 1:
        raise errors.ShapeError(
            f"logits {logits} must have a number of classes >= 1 at axis {axis}"
        )
    result = TensorType(shape, logits.dtype)
    if "label_smoothing" in attrs and labels == logits:
        return [result]
    if labels.dtype not in ("int32", "int64"):
        accepted = f" or probabilities {logits}" if "label_smoothing" in attrs else ""
        raise errors.DTypeError(
            f"labels {labels} must be class numbers {TensorType(shape, 'int32')}{accepted}"
        )
    if labels.shape != shape:
        raise errors.ShapeError(
            f"labels {labels} must be {TensorType(shape, labels.dtype)} for logits {logits}"
        )
    return [result]


def _one_hot(labels: np.ndarray, like: np.ndarray) -> np.ndarray:
    axis = _class_axis(like.ndim)
    classes = np.arange(like.shape[axis]).reshape(-1, *(1,) * (like.ndim - 1 - axis))
    return np.expand_dims(labels, axis) == classes


def _evaluate_cross_entropy(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    logits, labels = arrays
    axis, smoothing = _class_axis(logits.ndim), attrs["label_smoothing"]
    z = logits - logits.max(axis=axis, keepdims=True)
    losses = np.log(np.exp(z).sum(axis=axis, keepdims=True)) - z
    if labels.dtype.kind == "f":
        targets = labels * (1 - smoothing) + smoothing / logits.shape[axis]
        return [np.asarray((targets * losses).sum(axis=axis))]
    hit = _one_hot(labels, logits)
    chosen = np.where(hit, losses, 0).sum(axis=axis)
    if smoothing:
        known = hit.any(axis=axis)
        chosen = (1 - smoothing) * chosen + np.where(known, smoothing * losses.mean(axis=axis), 0)
    return [np.asarray(chosen, logits.dtype)]


def _decompose_cross_entropy(node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    logits, labels = operands
    axis, smoothing = _class_axis(logits.rank), node.attrs["label_smoothing"]
    classes = logits.sizes[axis]
    # The same parts in the same order as softmax, so that the gradient shares them.
    z = sub(logits, reduce_max(logits, axis=axis, keepdims=True))
    losses = sub(log(reduce_sum(exp(z), axis=axis, keepdims=True)), z)
    if labels.dtype == logits.dtype:
        return (reduce_sum(mul(_smooth(labels, smoothing, classes), losses), axis=axis),)
    # Chosen, not multiplied: a class masked out by a logit of -inf must not give 0 * inf.
    chosen = reduce_sum(where(one_hot(labels, classes, "bool", axis=axis), losses, 0.0), axis=axis)
    if not smoothing:
        return (chosen,)
    known = reduce_sum(one_hot(labels, classes, logits.dtype, axis=axis), axis=axis)
    uniform = mul(known, mul(reduce_sum(losses, axis=axis), smoothing / classes))
    return (add(mul(chosen, 1.0 - smoothing), uniform),)


def _smooth(targets: Value, smoothing: float, classes: int) -> Value:
    return add(mul(targets, 1.0 - smoothing), smoothing / classes) if smoothing else targets


def _vjp_cross_entropy(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    """softmax(logits) - targets, for targets that sum to 1 over the classes."""
    (logits, labels), g = node.inputs, cotangents[0]
    assert g is not None
    axis, smoothing = _class_axis(logits.rank), node.attrs["label_smoothing"]
    classes = logits.sizes[axis]
    g = reshape(g, (*logits.shape[:axis], 1, *logits.shape[axis + 1 :]))
    probabilities = softmax(logits, axis)
    if labels.dtype != logits.dtype:
        hit = one_hot(labels, classes, logits.dtype, axis=axis)
        known = reduce_sum(hit, axis=axis, keepdims=True)
        targets = (
            add(mul(hit, 1.0 - smoothing), mul(known, smoothing / classes)) if smoothing else hit
        )
        return mul(g, sub(mul(probabilities, known), targets)), None
    targets = _smooth(labels, smoothing, classes)
    total = reduce_sum(targets, axis=axis, keepdims=True)
    toward_targets = mul(g, mul(log_softmax(logits, axis), smoothing - 1.0))
    return mul(g, sub(mul(probabilities, total), targets)), toward_targets


def _evaluate_nll(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    values, labels = arrays
    chosen = np.where(_one_hot(labels, values), -values, values.dtype.type(0))
    return [np.asarray(chosen.sum(axis=_class_axis(values.ndim)))]


def _decompose_nll(node: Node, operands: tuple[Value, ...]) -> Sequence[Value]:
    values, labels = operands
    axis = _class_axis(values.rank)
    hit = one_hot(labels, values.sizes[axis], "bool", axis=axis)
    return (reduce_sum(where(hit, neg(values), 0.0), axis=axis),)


def _vjp_nll(node: Node, cotangents: Sequence[Value | None]) -> Sequence[Value | None]:
    (values, labels), g = node.inputs, cotangents[0]
    assert g is not None
    axis = _class_axis(values.rank)
    g = reshape(g, (*values.shape[:axis], 1, *values.shape[axis + 1 :]))
    return neg(mul(g, one_hot(labels, values.sizes[axis], values.dtype, axis=axis))), None


# ---- samples


def _samples_pair() -> list[Sample]:
    rng = np.random.default_rng(50)
    shapes = ((), (1,), (7,), (3, 17), (0, 2), (2, 3, 4))
    return [Sample((rng.standard_normal(s), rng.standard_normal(s)), {}) for s in shapes]


def _samples_probability() -> list[Sample]:
    rng = np.random.default_rng(51)
    shapes = ((), (1,), (7,), (3, 17), (0, 2))
    return [Sample((rng.uniform(0.1, 0.9, s), rng.uniform(0, 1, s)), {}) for s in shapes]


_CLASS_SHAPES = ((3, 5), (17, 10), (2, 3, 7), (1, 4, 2, 3), (4,), (2, 1), (0, 3))


def _labelled(low: int, excess: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Logits of every shape with labels in [low, classes + excess)."""
    rng = np.random.default_rng(52)
    for shape in _CLASS_SHAPES:
        axis = _class_axis(len(shape))
        labels = rng.integers(
            low, shape[axis] + excess, shape[:axis] + shape[axis + 1 :], dtype="int32"
        )
        yield 2 * rng.standard_normal(shape), np.asarray(labels), axis


def _samples_cross_entropy() -> list[Sample]:
    rng = np.random.default_rng(53)
    samples = []
    for logits, labels, axis in _labelled(0, 0):
        samples.append(Sample((logits, labels), {"label_smoothing": 0.0}))
        weights = rng.uniform(0.1, 1, logits.shape)
        probabilities = weights / weights.sum(axis=axis, keepdims=True)
        samples.append(Sample((logits, probabilities), {"label_smoothing": 0.0}))
        samples.append(Sample((logits, probabilities), {"label_smoothing": 0.1}))
    samples += [
        Sample((logits, labels), {"label_smoothing": 0.2}) for logits, labels, _ in _labelled(-1, 1)
    ]
    samples += [
        Sample((x, labels.astype("int64")), {"label_smoothing": 0.0})
        for x, labels, _ in _labelled(-1, 1)
    ]
    return samples


def _samples_nll() -> list[Sample]:
    return [Sample((logits, labels), {}) for logits, labels, _ in _labelled(-1, 1)]


register(
    OpDef(
        "squared_error",
        _infer_pair,
        _evaluate_squared,
        _vjp_squared,
        _lower_squared,
        _samples_pair,
        elementwise=True,
    )
)
register(
    OpDef(
        "binary_cross_entropy",
        _infer_pair,
        _evaluate_bce,
        _vjp_bce,
        _lower_bce,
        _samples_probability,
        elementwise=True,
    )
)
register(
    OpDef(
        "binary_cross_entropy_with_logits",
        _infer_pair,
        _evaluate_bce_logits,
        _vjp_bce_logits,
        _lower_bce_logits,
        _samples_pair,
        elementwise=True,
    )
)
register(
    OpDef(
        "softmax_cross_entropy",
        _infer_classes,
        _evaluate_cross_entropy,
        _vjp_cross_entropy,
        None,
        _samples_cross_entropy,
        _decompose_cross_entropy,
    )
)
register(
    OpDef("nll_loss", _infer_classes, _evaluate_nll, _vjp_nll, None, _samples_nll, _decompose_nll)
)
