"""Matrix product, convolution, pooling, normalisation and losses against PyTorch.

Values, gradients and gradients of gradients. The operators' own samples are checked by
tests/test_ops.py; here are the combinations of attributes that users write.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

import graphc.ops as gc
from graphc import errors, nn
from graphc.interpreter import interpret
from graphc.ir import Graph, Value
from passes.autodiff import differentiate
from passes.set_mode import SetMode

torch = pytest.importorskip("torch")
functional = torch.nn.functional


def compare(
    build: Callable[..., Value],
    reference: Callable,
    arrays: Sequence[np.ndarray],
    second_order: bool = True,
    wrt: Sequence[int] | None = None,
) -> None:
    """Run `build` on graph values and `reference` on tensors; compare results and derivatives.

    The first derivative is that of sum(y * c) with random c, the second that of the sum of the
    squares of all first derivatives.
    """
    rng = np.random.default_rng(7)
    graph = Graph()
    values = [graph.input(f"x{i}", a.shape, dtype=a.dtype.name) for i, a in enumerate(arrays)]
    y = build(*values)
    chosen = [i for i, a in enumerate(arrays) if a.dtype.kind == "f"] if wrt is None else wrt
    tensors = [torch.tensor(a, requires_grad=i in chosen) for i, a in enumerate(arrays)]
    expected = reference(*tensors)
    assert y.shape == tuple(expected.shape)
    cotangent = np.asarray(rng.standard_normal(y.shape))
    loss = gc.sum(gc.mul(y, graph.constant(cotangent, dtype=y.dtype)))
    grads = differentiate(graph, loss, [values[i] for i in chosen])
    torch_loss = (expected * torch.tensor(cotangent)).sum()
    torch_grads = torch.autograd.grad(
        torch_loss, [tensors[i] for i in chosen], create_graph=second_order
    )
    wanted, expected_all = [y, *grads], [expected, *torch_grads]
    if second_order:
        energy = gc.sum(gc.square(grads[0]))
        torch_energy = (torch_grads[0] ** 2).sum()
        for g, t in zip(grads[1:], torch_grads[1:], strict=True):
            energy = gc.add(energy, gc.sum(gc.square(g)))
            torch_energy = torch_energy + (t**2).sum()
        wanted += differentiate(graph, energy, [values[i] for i in chosen])
        expected_all += torch.autograd.grad(
            torch_energy, [tensors[i] for i in chosen], allow_unused=True
        )
    inputs = {f"x{i}": a for i, a in enumerate(arrays)}
    results = interpret(graph, inputs, values=wanted).values
    for value, tensor in zip(wanted, expected_all, strict=True):
        array = np.zeros(value.shape) if tensor is None else tensor.detach().numpy()
        np.testing.assert_allclose(results[value], array, rtol=1e-7, atol=1e-8)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape))


# ---- matmul


@pytest.mark.parametrize(
    "a, b",
    [
        ((1, 1), (1, 1)),
        ((7, 17), (17, 3)),
        ((3,), (3,)),
        ((3,), (3, 5)),
        ((5, 3), (3,)),
        ((2, 7, 3), (3, 4)),
        ((2, 1, 7, 3), (4, 3, 5)),
        ((3,), (2, 3, 4)),
        ((2, 3, 4), (4,)),
        ((0, 3), (3, 2)),
        ((2, 0), (0, 3)),
    ],
)
def test_matmul(a, b):
    compare(gc.matmul, torch.matmul, (normal(*a), normal(*b, seed=1)))


@pytest.mark.parametrize(
    "a, b, message",
    [
        ((2, 3), (4, 5), r"3 columns.*4 rows"),
        ((), (3,), "scalar"),
        ((2, 3, 4), (3, 4, 5), "do not broadcast"),
    ],
)
def test_matmul_refuses(a, b, message):
    g = Graph()
    with pytest.raises(errors.ShapeError, match=message):
        gc.matmul(g.input("a", a), g.input("b", b))


# ---- conv2d


def torch_conv(x, w, bias, stride, padding, dilation, groups):
    if isinstance(padding, tuple) and isinstance(padding[0], tuple):
        x = functional.pad(x, (*padding[1], *padding[0]))
        padding = 0
    return functional.conv2d(x, w, bias, stride, padding, dilation, groups)


CONVOLUTIONS = [
    (stride, padding, dilation, groups)
    for stride, padding, dilation, groups in itertools.product(
        (1, 2, (3, 2)), (0, 1, (2, 1), ((0, 1), (2, 0)), "same"), (1, 2, (1, 3)), (1, 2)
    )
    if padding != "same" or stride == 1
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("stride, padding, dilation, groups", CONVOLUTIONS)
def test_conv2d(stride, padding, dilation, groups):
    x, w, b = normal(2, 4, 7, 9), normal(6, 4 // groups, 3, 2, seed=1), normal(6, seed=2)
    compare(
        lambda x, w, b: gc.conv2d(x, w, b, stride, padding, dilation, groups),
        lambda x, w, b: torch_conv(x, w, b, stride, padding, dilation, groups),
        (x, w, b),
    )


@pytest.mark.parametrize(
    "x, w, stride, padding, groups",
    [
        ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1),
        ((1, 3, 17, 17), (5, 3, 5, 5), 4, 2, 1),
        ((2, 6, 7, 5), (6, 1, 3, 3), 1, 1, 6),
        ((2, 3, 7, 5), (6, 1, 3, 3), 2, 1, 3),
        ((3, 4, 6, 6), (2, 4, 1, 1), 2, 0, 1),
        ((1, 2, 8, 8), (3, 2, 2, 2), 2, 0, 1),
        ((1, 2, 5, 5), (3, 2, 5, 5), 1, 0, 1),
        ((1, 2, 3, 3), (3, 2, 5, 5), 1, 2, 1),
        ((0, 2, 5, 5), (3, 2, 3, 3), 1, 1, 1),
    ],
)
def test_conv2d_sizes(x, w, stride, padding, groups):
    compare(
        lambda x, w: gc.conv2d(x, w, stride=stride, padding=padding, groups=groups),
        lambda x, w: functional.conv2d(x, w, None, stride, padding, 1, groups),
        (normal(*x), normal(*w, seed=1)),
    )


@pytest.mark.parametrize(
    "size, stride, kernel, dilation", [(7, 2, 3, 1), (8, 3, 2, 2), (5, 4, 1, 1)]
)
def test_same_padding_gives_ceil_of_size_over_stride(size, stride, kernel, dilation):
    g = Graph()
    x, w = g.input("x", ("N", 1, size, size)), g.input("w", (1, 1, kernel, kernel))
    y = gc.conv2d(x, w, stride=stride, padding="same", dilation=dilation)
    assert y.shape == ("N", 1, -(-size // stride), -(-size // stride))


def test_same_padding_keeps_unknown_sizes():
    g = Graph()
    x, w = g.input("x", ("N", 3, "H", "W")), g.input("w", (4, 3, 3, 3))
    assert gc.conv2d(x, w, padding="same").shape == ("N", 4, "H", "W")
    with pytest.raises(errors.ShapeError, match="height 'H'"):
        gc.conv2d(x, w)
    with pytest.raises(errors.ShapeError, match="needs a known size"):
        gc.conv2d(x, w, padding="same", stride=2)


def test_conv2d_names_operands_in_errors():
    g = Graph()
    x, w = g.input("pool1", ("N", 6, 14, 14)), g.input("conv2.weight", (16, 8, 5, 5))
    with pytest.raises(errors.ShapeError) as caught:
        gc.conv2d(x, w, name="conv2")
    message = str(caught.value)
    assert message.startswith("conv2 (conv2d, test_conv_ops.py:")
    assert "input f32[N,6,14,14] has 6 channels, weight f32[16,8,5,5] expects 8" in message
    assert "'pool1'" in message and "'conv2.weight'" in message and "\n" not in message


@pytest.mark.parametrize(
    "x, w, arguments, error, message",
    [
        ((1, 6, 4, 4), (4, 6, 5, 5), {}, errors.ShapeError, "does not fit"),
        ((1, 6, 4, 4), (4, 2, 3, 3), {"groups": 4}, errors.ShapeError, "groups=4 must divide"),
        ((1, 6, 4, 4), (4, 2, 3, 3), {"groups": 2}, errors.ShapeError, "expects 4"),
        ((6, 4, 4), (4, 6, 3, 3), {}, errors.ShapeError, "4 dimensions"),
        ((1, 6, 4, 4), (4, 6, 3), {}, errors.ShapeError, "4 dimensions"),
        ((1, 6, 4, 4), (4, 6, 3, 3), {"stride": 0}, errors.ShapeError, "stride=0"),
        ((1, 6, 4, 4), (4, 6, 3, 3), {"padding": -1}, errors.ShapeError, "padding"),
        ((1, 6, 4, 4), (4, 6, 3, 3), {"padding": "full"}, errors.ShapeError, "padding='full'"),
        ((1, 6, 4, 4), (4, 6, 3, 3), {"padding": (1, 2, 3)}, errors.ShapeError, "padding"),
        ((1, 6, 4, 4), (4, 6, 3, 3), {"dilation": (1, 2, 3)}, errors.ShapeError, "dilation"),
    ],
)
def test_conv2d_refuses(x, w, arguments, error, message):
    g = Graph()
    with pytest.raises(error, match=message):
        gc.conv2d(g.input("x", x), g.input("w", w), **arguments)


def test_conv2d_refuses_bias_of_another_shape_and_mixed_dtypes():
    g = Graph()
    x, w = g.input("x", (1, 2, 4, 4)), g.input("w", (3, 2, 3, 3))
    with pytest.raises(errors.ShapeError, match=r"bias 'b' f32\[2\] must have shape \[3\]"):
        gc.conv2d(x, w, g.input("b", (2,)))
    with pytest.raises(errors.DTypeError, match="float32 and float64"):
        gc.conv2d(x, g.input("v", (3, 2, 3, 3), dtype="float64"))


# ---- pooling


def repeated(*shape: int) -> np.ndarray:
    """Data with many equal elements: which of them wins must agree with PyTorch."""
    return np.random.default_rng(shape).integers(-2, 3, shape).astype("float64")


POOLS = [
    (kernel, stride, padding, dilation)
    for kernel, stride, padding, dilation in itertools.product(
        (1, 2, 3, (3, 2)), (None, 1, 2, (2, 3)), (0, 1), (1, 2)
    )
    if padding == 0 or kernel != 1
]


@pytest.mark.parametrize("kernel, stride, padding, dilation", POOLS)
@pytest.mark.parametrize("data", [normal, repeated])
def test_max_pool2d(data, kernel, stride, padding, dilation):
    compare(
        lambda x: gc.max_pool2d(x, kernel, stride, padding, dilation),
        lambda x: functional.max_pool2d(x, kernel, stride, padding, dilation),
        (data(2, 3, 7, 8),),
    )


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("kernel, stride, padding", [(k, s, p) for k, s, p, d in POOLS if d == 1])
def test_avg_pool2d(kernel, stride, padding, count_include_pad):
    compare(
        lambda x: gc.avg_pool2d(x, kernel, stride, padding, count_include_pad),
        lambda x: functional.avg_pool2d(x, kernel, stride, padding, False, count_include_pad),
        (normal(2, 3, 7, 8),),
    )


def test_global_avg_pool2d():
    compare(
        gc.global_avg_pool2d,
        lambda x: functional.adaptive_avg_pool2d(x, 1),
        (normal(2, 3, 7, 5),),
        second_order=False,
    )


def test_max_pool2d_lets_nan_win():
    g = Graph()
    x = g.input("x", (1, 1, 2, 4))
    array = np.array([[[[1, np.nan, 5, 3], [9, 2, 4, 1]]]], "float32")
    y = gc.max_pool2d(x, 2)
    np.testing.assert_array_equal(
        interpret(g, {"x": array}, values=[y]).values[y], [[[[np.nan, 5]]]]
    )


def test_pools_refuse():
    g = Graph()
    with pytest.raises(errors.ShapeError, match="half of the window"):
        gc.max_pool2d(g.input("a", (1, 1, 4, 4)), 2, padding=2)
    with pytest.raises(errors.ShapeError, match="does not fit"):
        gc.avg_pool2d(g.input("b", (1, 1, 2, 2)), 3)
    with pytest.raises(errors.DTypeError, match="float"):
        gc.max_pool2d(g.input("c", (1, 1, 2, 2), dtype="int32"), 2)
    with pytest.raises(errors.ShapeError, match=r"\[N,C,H,W\]"):
        gc.global_avg_pool2d(g.input("d", (2, 2)))


# ---- batch normalisation


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (2, 3, 5, 7), (3, 1, 2, 1), (17, 2, 1, 1)])
def test_batch_norm(shape, training):
    c = shape[1]
    running = normal(c, seed=3), normal(c, seed=4) ** 2 + 0.1
    compare(
        lambda x, w, b, m, v: gc.batch_norm(x, w, b, m, v, training=training)[0],
        lambda x, w, b, m, v: functional.batch_norm(x, m.clone(), v.clone(), w, b, training),
        (3 * normal(*shape) + 2, normal(c, seed=1), normal(c, seed=2), *running),
        wrt=(0, 1, 2),
    )


def test_batch_norm_moves_running_statistics_as_pytorch():
    g = Graph()
    x = g.input("x", (4, 3, 5, 5))
    y = nn.batch_norm2d(x, name="bn", momentum=0.3, eps=1e-3)
    g.output(y=y)
    g = SetMode(training=True).run(g)
    module = torch.nn.BatchNorm2d(3, momentum=0.3, eps=1e-3)
    state = {
        k: v.numpy().copy() for k, v in module.state_dict().items() if k != "num_batches_tracked"
    }
    state = {f"bn.{k}": v for k, v in state.items()}
    for step in range(3):
        batch = normal(4, 3, 5, 5, seed=step).astype("float32") * 2 + 1
        expected = module(torch.tensor(batch)).detach().numpy()
        results = interpret(g, {"x": batch}, state)
        np.testing.assert_allclose(results.outputs["y"], expected, rtol=1e-5, atol=1e-6)
        state.update(results.updates)
    for key in ("running_mean", "running_var"):
        np.testing.assert_allclose(
            state[f"bn.{key}"], module.state_dict()[key].numpy(), rtol=1e-5, atol=1e-6
        )


def test_batch_norm_refuses():
    g = Graph()
    x, c = g.input("x", (1, 3)), g.input("c", (3,))
    with pytest.raises(errors.ShapeError, match="two or more"):
        gc.batch_norm(x, c, c, c, c, training=True)
    with pytest.raises(errors.ShapeError, match=r"bias f32\[4\] must have shape \[3\]"):
        gc.batch_norm(x, c, g.input("d", (4,)), c, c)


# ---- softmax


@pytest.mark.parametrize("shape, axis", [((3, 5), -1), ((3, 5), 0), ((2, 7, 17), 1), ((1, 1), 1)])
def test_softmax(shape, axis):
    x = 3 * normal(*shape)
    compare(lambda x: gc.softmax(x, axis), lambda x: torch.softmax(x, axis), (x,))
    compare(lambda x: gc.log_softmax(x, axis), lambda x: torch.log_softmax(x, axis), (x,))


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("axis", [0, -1, (0, 2), (0, 1, 2)])
def test_logsumexp(axis, keepdims):
    compare(
        lambda x: gc.logsumexp(x, axis, keepdims),
        lambda x: torch.logsumexp(x, axis, keepdims),
        (3 * normal(2, 7, 3),),
    )


def test_softmax_of_huge_and_infinite_operands():
    g = Graph()
    x = g.input("x", (2, 3))
    array = np.array([[1e4, -1e4, 1e4], [-np.inf, 0, -np.inf]], "float32")
    values = [gc.softmax(x), gc.log_softmax(x), gc.logsumexp(x, 1)]
    results = interpret(g, {"x": array}, values=values).values
    tensor = torch.tensor(array)
    expected = [torch.softmax(tensor, 1), torch.log_softmax(tensor, 1), torch.logsumexp(tensor, 1)]
    for value, reference in zip(values, expected, strict=True):
        np.testing.assert_allclose(results[value], reference.numpy(), rtol=1e-6)


def test_logsumexp_of_nothing_but_minus_infinity():
    g = Graph()
    x = g.input("x", (2,))
    y = gc.logsumexp(x)
    assert interpret(g, {"x": np.full(2, -np.inf, "f")}, values=[y]).values[y] == -np.inf


# ---- losses


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(7,), (3, 17), (2, 3, 4)])
def test_losses_per_element(shape, reduction):
    x, t = normal(*shape), np.random.default_rng(1).uniform(0, 1, shape)
    p = np.random.default_rng(2).uniform(0.05, 0.95, shape)
    for ours, theirs, first in (
        (gc.mse_loss, functional.mse_loss, x),
        (gc.binary_cross_entropy, functional.binary_cross_entropy, p),
        (gc.binary_cross_entropy_with_logits, functional.binary_cross_entropy_with_logits, x),
    ):
        compare(
            lambda a, b, f=ours: f(a, b, reduction=reduction),
            lambda a, b, f=theirs: f(a, b, reduction=reduction),
            (first, t),
        )


def test_losses_at_extremes():
    p, t = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    compare(
        gc.binary_cross_entropy,
        functional.binary_cross_entropy,
        (p, t),
        second_order=False,
        wrt=(0,),
    )
    compare(
        gc.binary_cross_entropy_with_logits,
        functional.binary_cross_entropy_with_logits,
        (np.array([-1e3, 1e3, -1e3, 1e3]), t),
        second_order=False,
    )


CLASSES = [
    ((3, 5), (3,)),
    ((17, 10), (17,)),
    ((2, 3, 7), (2, 7)),
    ((2, 4, 3, 2), (2, 3, 2)),
    ((4,), ()),
]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("logits, labels", CLASSES)
def test_softmax_cross_entropy(logits, labels, reduction, smoothing):
    x = 3 * normal(*logits)
    axis = min(1, len(logits) - 1)
    y = np.asarray(np.random.default_rng(3).integers(0, logits[axis], labels, dtype="int32"))
    t = np.random.default_rng(4).uniform(0.1, 1, logits)
    t /= t.sum(axis=axis, keepdims=True)

    def ours(x, y):
        return gc.softmax_cross_entropy(x, y, smoothing, reduction)

    def theirs(x, y):
        y = y if y.is_floating_point() else y.long()
        return functional.cross_entropy(x, y, reduction=reduction, label_smoothing=smoothing)

    compare(ours, theirs, (x, y))
    compare(ours, theirs, (x, t))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("logits, labels", CLASSES)
def test_nll_loss(logits, labels, reduction):
    axis = min(1, len(logits) - 1)
    y = np.asarray(np.random.default_rng(3).integers(0, logits[axis], labels, dtype="int32"))
    compare(
        lambda x, y: gc.nll_loss(gc.log_softmax(x, axis), y, reduction),
        lambda x, y: functional.nll_loss(torch.log_softmax(x, axis), y.long(), reduction=reduction),
        (normal(*logits), y),
    )


def test_labels_outside_the_classes_contribute_nothing():
    g = Graph()
    x, y = g.input("x", (3, 4)), g.input("y", (3,), dtype="int32")
    losses = gc.softmax_cross_entropy(x, y, label_smoothing=0.1, reduction="none")
    (grad,) = differentiate(g, gc.sum(losses), [x])
    arrays = {"x": normal(3, 4).astype("float32"), "y": np.array([-1, 2, 4], "int32")}
    results = interpret(g, arrays, values=[losses, grad]).values
    assert results[losses][0] == results[losses][2] == 0 < results[losses][1]
    assert not results[grad][[0, 2]].any() and results[grad][1].any()


def test_cross_entropy_of_masked_classes_is_finite():
    g = Graph()
    x, y = g.input("x", (1, 3)), g.input("y", (1,), dtype="int32")
    loss = gc.softmax_cross_entropy(x, y)
    (grad,) = differentiate(g, loss, [x])
    arrays = {"x": np.array([[0, -np.inf, 1]], "float32"), "y": np.array([0], "int32")}
    results = interpret(g, arrays, values=[loss, grad]).values
    assert np.isfinite(results[loss]) and np.isfinite(results[grad]).all()


def test_losses_refuse():
    g = Graph()
    x, y = g.input("x", ("N", 5)), g.input("y", ("N",), dtype="int32")
    with pytest.raises(errors.ShapeError, match=r"must be i32\[N\]"):
        gc.softmax_cross_entropy(x, g.input("z", ("N", 1), dtype="int32"))
    with pytest.raises(errors.DTypeError, match="must be class numbers"):
        gc.softmax_cross_entropy(x, g.input("w", ("N",)))
    with pytest.raises(errors.DeclarationError, match="reduction='avg'"):
        gc.nll_loss(x, y, reduction="avg")
    with pytest.raises(errors.DeclarationError, match="label_smoothing"):
        gc.softmax_cross_entropy(x, y, label_smoothing=2)
    with pytest.raises(errors.ShapeError, match="one shape"):
        gc.mse_loss(x, g.input("t", ("N", 1)))


def test_labels_and_targets_may_be_arrays():
    g = Graph()
    x = g.input("x", (2, 3))
    losses = [
        gc.softmax_cross_entropy(x, np.array([0, 2])),
        gc.softmax_cross_entropy(x, np.eye(3)[:2]),
        gc.mse_loss(x, np.ones((2, 3))),
    ]
    array = normal(2, 3).astype("float32")
    results = interpret(g, {"x": array}, values=losses).values
    t = torch.tensor(array)
    expected = [
        functional.cross_entropy(t, torch.tensor([0, 2])),
        functional.cross_entropy(t, torch.eye(3)[:2]),
        functional.mse_loss(t, torch.ones(2, 3)),
    ]
    for value, reference in zip(losses, expected, strict=True):
        np.testing.assert_allclose(results[value], reference.numpy(), rtol=1e-6)


def test_argument_errors_name_the_call_and_its_input():
    g = Graph()
    x = g.input("x", (1, 2, 4, 4))
    with pytest.raises(
        errors.ShapeError, match=r"c \(conv2d\) of input 'x' f32\[1,2,4,4\]: stride"
    ):
        nn.conv2d(x, 3, 3, stride=0, name="c")
    with pytest.raises(errors.ShapeError, match="max_pool2d of input 'x'.*kernel_size"):
        gc.max_pool2d(x, (1, 2, 3))
