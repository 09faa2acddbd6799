"""target="cuda-emulated": every operator and whole networks against the interpreter and the CPU."""

from __future__ import annotations

import networks
import numpy as np
import op_checks
import pytest
from compile_checks import Samples, differences
from test_compiled_ops import representative

pytest.importorskip("numba.cuda.cudadrv", reason="numba-cuda is not installed")

import graphc as gc
from graphc import errors
from graphc.runtime.emulate import ORDERS

# Operators that between them need every kind of statement: the rest only compute other functions.
KINDS = (
    "add where cast exp pow floor_div sum argmax softmax logsumexp matmul conv2d max_pool2d "
    "avg_pool2d avg_pool2d_grad batch_norm softmax_cross_entropy dropout pad concat gather "
    "transpose reshape slice"
).split()


def agree(samples: Samples) -> None:
    """Outputs and gradients in every order of the threads, and nothing read before written."""
    options = samples.options()
    emulated = gc.compile(samples.graph, target="cuda-emulated", **options)
    reference = gc.compile(samples.graph, target="interpret", **options)
    feeds = {name: samples.feeds[name] for name in reference.inputs}
    expected = reference.run(feeds)
    for order in ORDERS:
        emulated.device.emulator.order = order
        emulated.poison()
        assert not differences(emulated.run(feeds), expected), order


def test_operators_of_every_kind():
    cases = [case for case in representative(most=1) if case.op in KINDS]
    assert len(cases) > 15
    agree(Samples(cases, "float32", gradients=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_operator(dtype):
    agree(Samples(representative(), dtype, gradients=True))


@pytest.mark.slow
def test_every_sample():
    agree(Samples(op_checks.cases(), "float32", gradients=True))


def test_every_way_to_share_points(rng):
    """One thread with 128-bit accesses and a tail, a warp, a block and a wide block for a point."""
    g = gc.Graph("ways")
    flat, bias = g.input("flat", (1003,)), g.input("bias", (12,))
    rows, wide = g.input("rows", (50, 12)), g.input("wide", (70, 301))
    image = g.input("image", (9, 5, 31, 29))
    long, table = g.input("long", (20001,)), g.input("table", (40, 99))
    picture = gc.sub(image, gc.mean(image, (0, 2, 3), keepdims=True))
    g.output(
        scaled=flat * 2.0,
        shifted=rows + bias,
        softmax=gc.softmax(wide, -1),
        centred=gc.sum(gc.square(picture), (0, 2, 3)),
        total=gc.sum(long),
        product=gc.max(gc.abs(long)),
        position=gc.argmax(wide, 1),
        sums=gc.sum(table, 1),
    )
    exe = gc.compile(g, outputs=list(g.outputs), target="cuda-emulated")
    feeds = {
        n: rng.standard_normal(node.types[0].shape).astype("f4") for n, node in exe.inputs.items()
    }
    blocks = {launch.block[0] for step in exe.steps for launch in step.rendering.launches}
    words = " ".join(launch.source for step in exe.steps for launch in step.rendering.launches)
    assert blocks == {256, 1024}
    for word in ("load_vector", "v.warp_fold", "v.block_fold", 'v.block_fold("argmax")'):
        assert word in words
    expected = gc.compile(g, outputs=list(g.outputs), target="interpret").run(feeds)
    for order in ORDERS:
        exe.device.emulator.order = order
        exe.poison()
        assert not differences(exe.run(feeds), expected), order


def train(graph, batch: int, steps: int, rate: float = 0.01, precision: str = "float32") -> None:
    """Losses of both targets on the same batches, and the state after the first step."""
    options = {
        "outputs": ["loss"],
        "dims": {"N": batch},
        "loss": "loss",
        "optimizer": gc.optim.SGD(rate, momentum=0.9),
        "precision": precision,
    }
    emulated = gc.compile(graph, target="cuda-emulated", **options)
    native = gc.compile(graph, **options)
    emulated.device.emulator.order = "shuffled"
    for step in range(steps):
        emulated.poison()
        feeds = networks.feeds(graph, batch, seed=step)
        got, expected = emulated.run(feeds)["loss"], native.run(feeds)["loss"]
        assert np.isclose(got, expected, rtol=1e-4), (step, got, expected)
        if step == 0:  # later steps multiply what rounding makes of the first
            for name, array in native.state().items():
                scale = np.abs(array).max() + 1e-6
                assert np.abs(emulated.state()[name] - array).max() < 1e-3 * scale, name


def test_lenet_trains_ten_steps_like_the_cpu():
    train(gc.zoo.lenet5(), 5, 10)


@pytest.mark.slow
def test_resnet20_trains_ten_steps_like_the_cpu():
    """The CPU rounds as a direct convolution does: training multiplies any other rounding by more
    than two a step, on random images."""
    train(gc.zoo.resnet20(), 4, 10, rate=0.001, precision="strict")


@pytest.mark.parametrize(
    "build",
    [
        networks.with_dropout,
        pytest.param(networks.small_resnet, marks=pytest.mark.slow),
        pytest.param(networks.transformer_block, marks=pytest.mark.slow),
        pytest.param(networks.convolutions, marks=pytest.mark.slow),
    ],
)
def test_small_networks_train_like_the_cpu(build):
    train(build(), 3, 3)


def test_kernels_are_readable(golden):
    """Softmax by warps: two shared reductions, and a loop of its own for the result."""
    g = gc.Graph("softmax")
    g.output(y=gc.softmax(g.input("x", (50, 100)), -1))
    exe = gc.compile(g, outputs=["y"], target="cuda-emulated")
    (info,) = exe.kernels()
    assert info.grids == ((7, 1, 1),) and info.blocks == ((256, 1, 1),)
    golden("cuda_softmax.py", exe.steps[0].rendering.launches[0].source)


def test_dump_and_explain(tmp_path):
    exe = gc.compile(linear_graph(), outputs=["y"], dims={"N": 4}, target="cuda-emulated")
    assert "linear on cuda-emulated (emulated on the CPU): 1 launches of 1 kernels" in exe.explain()
    exe.dump(tmp_path / "dump")
    assert "def kernel(" in (tmp_path / "dump/kernels/00_fc.py").read_text()
    assert "activations" in (tmp_path / "dump/memory.txt").read_text()
    with pytest.raises(errors.GraphcError, match="Nsight"):
        exe.profile(x=np.zeros((4, 6), "f4"))


def linear_graph():
    g = gc.Graph("linear")
    x = g.input("x", ("N", 6))
    g.output(y=gc.relu(gc.nn.linear(x, 3, name="fc")))
    return g


def test_inference_prepares_parameters_once_and_again_after_loading(rng):
    g = linear_graph()
    options = {"outputs": ["y"], "dims": {"N": 4}}
    exe = gc.compile(g, target="cuda-emulated", check=True, **options)
    reference = gc.compile(g, target="interpret", **options)
    x = rng.standard_normal((4, 6)).astype("f4")
    for _ in range(2):
        weights = {n: rng.standard_normal(a.shape).astype("f4") for n, a in exe.state().items()}
        exe.load_state(weights)
        reference.load_state(weights)
        out = {"y": np.empty((4, 3), "f4")}
        assert exe.run({"x": x}, out=out)["y"] is out["y"]
        assert not differences(out, reference.run({"x": x}))


def test_wrong_calls_are_refused():
    exe = gc.compile(linear_graph(), outputs=["y"], dims={"N": 4}, target="cuda-emulated")
    with pytest.raises(errors.InputError, match="expects f32"):
        exe(x=np.zeros((4, 5), "f4"))
    with pytest.raises(errors.InputError, match="missing"):
        exe()
    with pytest.raises(errors.InputError, match="there is no input 'X'"):
        exe(x=np.zeros((4, 6), "f4"), X=1)


def test_too_large_for_32_bit_indices():
    g = gc.Graph("large")
    g.output(y=gc.relu(g.input("x", (2**16, 2**15))))
    with pytest.raises(errors.CompileError, match="index with 32 bits"):
        gc.compile(g, outputs=["y"], target="cuda-emulated")
