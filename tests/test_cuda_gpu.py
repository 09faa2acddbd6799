"""On a GPU: the kernels that `test_cuda.py` emulates, as they are. Skipped where there is none."""

from __future__ import annotations

import networks
import numpy as np
import pytest
from compile_checks import Samples, differences
from test_compiled_ops import representative

import graphc as gc
from graphc import errors

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def device():
    pytest.importorskip("numba.cuda.cudadrv", reason="numba-cuda is not installed")
    from graphc.runtime.cuda_driver import GpuDevice

    try:
        return GpuDevice()
    except errors.GraphcError as error:
        pytest.skip(str(error))


def test_every_operator():
    samples = Samples(representative(), "float32", gradients=True)
    options = samples.options()
    exe = gc.compile(samples.graph, target="cuda", **options)
    reference = gc.compile(samples.graph, target="interpret", **options)
    feeds = {name: samples.feeds[name] for name in reference.inputs}
    exe.poison()
    assert not differences(exe.run(feeds), reference.run(feeds))


@pytest.mark.parametrize("build", [gc.zoo.lenet5, gc.zoo.resnet20, networks.transformer_block])
def test_networks_train_like_the_cpu(build):
    graph = build()
    options = {
        "outputs": ["loss"],
        "dims": {"N": 8},
        "loss": "loss",
        "optimizer": gc.optim.SGD(0.01, momentum=0.9),
    }
    exe, native = gc.compile(graph, target="cuda", **options), gc.compile(graph, **options)
    for step in range(10):
        feeds = networks.feeds(graph, 8, seed=step)
        assert np.isclose(exe.run(feeds)["loss"], native.run(feeds)["loss"], rtol=1e-4)


def test_results_are_the_same_bits_every_time():
    graph = networks.small_resnet()
    options = {
        "outputs": ["loss"],
        "dims": {"N": 5},
        "loss": "loss",
        "optimizer": gc.optim.SGD(0.1),
    }
    feeds = networks.feeds(graph, 5)
    runs = []
    for _ in range(2):
        exe = gc.compile(graph, target="cuda", **options)
        for _ in range(5):
            loss = exe.run(feeds)["loss"]
        runs.append((loss, exe.state()))
    assert runs[0][0] == runs[1][0]
    assert all(np.array_equal(a, runs[1][1][name]) for name, a in runs[0][1].items())


def test_arrays_stay_on_the_device(rng):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    g = gc.Graph("scaled")
    g.output(y=g.input("x", (3, 5)) * 2.0)
    exe = gc.compile(g, outputs=["y"], target="cuda")
    x = torch.randn(3, 5, device="cuda")
    exe(x=x)
    assert torch.equal(torch.from_dlpack(exe.device_array("y")), 2 * x)
