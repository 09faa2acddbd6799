"""Whole networks: every layout and batch against the interpreter, training against PyTorch."""

from __future__ import annotations

import compile_checks
import networks
import numpy as np
import pytest

import graphc as gc

BATCHES = (1, 2, 7, 8, 16, 31, 64)
SGD = gc.optim.SGD(0.05, momentum=0.9)
slow = pytest.mark.slow


def few(quick: tuple[int, ...]) -> list:
    """All batches; those that need kernels of their own and no new ideas are slow."""
    return [b if b in quick else pytest.param(b, marks=slow) for b in BATCHES]


def infer(graph: gc.Graph, batch: int, layout: str | None = None):
    arrays = networks.feeds(graph, batch)
    known = {k: v for k, v in arrays.items() if k not in ("label", "target")}
    outputs = [name for name in graph.outputs if name != "loss"]
    pipeline = gc.default_pipeline(layout)
    return compile_checks.assert_same(
        graph, known, outputs=outputs, dims={"N": batch}, pipeline=pipeline
    )


def train(graph: gc.Graph, batch: int, layout: str | None = None, optimizer=SGD, steps: int = 5):
    arrays = networks.feeds(graph, batch)
    return compile_checks.assert_same(
        graph,
        arrays,
        steps=steps,
        tolerance=2e-4,
        outputs=list(graph.outputs),
        loss="loss",
        optimizer=optimizer,
        gradients=[next(iter(arrays))],
        dims={"N": batch},
        pipeline=gc.default_pipeline(layout),
    )


@pytest.mark.parametrize("batch", few((1, 16)))
def test_lenet_inference(batch):
    infer(gc.zoo.lenet5(), batch)


@pytest.mark.parametrize("batch", few((16,)))
def test_lenet_training(batch):
    train(gc.zoo.lenet5(), batch)


@pytest.mark.parametrize("batch", few((1, 7)))
def test_mlp(batch):
    graph = gc.zoo.mlp((33, 17), (1, 5, 7))
    infer(graph, batch)
    train(graph, batch)


@pytest.mark.parametrize(
    ("batch", "layout"),
    [
        (2, "channels"),
        pytest.param(16, "batch", marks=slow),
        pytest.param(7, "rows", marks=slow),
        pytest.param(31, None, marks=slow),
    ],
)
def test_small_resnet(batch, layout):
    graph = networks.small_resnet(size=8)
    train(graph, batch, layout)


@pytest.mark.parametrize(
    ("batch", "layout"),
    [(16, "batch"), pytest.param(3, "channels", marks=slow), pytest.param(1, "rows", marks=slow)],
)
def test_kinds_of_convolution(batch, layout):
    train(networks.convolutions(), batch, layout)


def test_one_kernel_updates_every_parameter():
    """Whatever its shape and layout; 17 channels and 10 outputs leave lanes of padding."""
    g = gc.Graph("shapes")
    x = g.input("image", ("N", 3, 6, 6))
    h = gc.relu(gc.nn.conv2d(x, 17, 3, padding=1, name="first"))
    h = gc.relu(gc.nn.conv2d(h, 16, 3, name="second"))
    y = gc.nn.linear(gc.flatten(h), 10, name="last")
    g.output(loss=gc.softmax_cross_entropy(y, g.input("label", ("N",), dtype="int32")))
    exe, _ = train(g, 3, "channels")
    updates = [e for e in exe.launches if e.node.origin.phase == "update"]
    # Vectors that end with their parameter, and those that do not.
    assert len(updates) == 6 and len({e.call.source for e in updates}) == 2


@pytest.mark.parametrize("batch", [2, pytest.param(17, marks=slow)])
def test_transformer_block(batch):
    # Not Adam: the key's bias has a gradient of 0, whose rounding errors it would scale to 1.
    train(networks.transformer_block(), batch)


@slow
@pytest.mark.parametrize("name", ["small_resnet", "convolutions", "transformer_block"])
def test_training_without_fusion(name):
    graph = getattr(networks, name)()
    compile_checks.assert_same(
        graph,
        networks.feeds(graph, 8),
        steps=3,
        tolerance=2e-4,
        outputs=["loss"],
        loss="loss",
        optimizer=SGD,
        dims={"N": 8},
        pipeline=gc.default_pipeline().with_options("fuse", enabled=False),
    )


def test_dropout_is_reproducible():
    graph = networks.with_dropout()
    arrays = networks.feeds(graph, 8)

    def losses(seed: int, threads: int) -> list[float]:
        options = {"loss": "loss", "optimizer": SGD, "dims": {"N": 8}, "seed": seed}
        exe = gc.compile(graph, outputs=["loss"], threads=threads, **options)
        exe.load_state(weights)
        return [float(exe(**arrays)["loss"]) for _ in range(4)]

    weights = train(graph, 8, steps=3)[0].state()  # equal to the interpreter's, mask by mask
    first = losses(0, 1)
    assert losses(0, 1) == first
    np.testing.assert_allclose(losses(0, 2), first, rtol=1e-5)
    assert losses(1, 1) != first
    # Another mask each step: with learning rate 0 the loss changes all the same.
    exe = gc.compile(graph, outputs=["loss"], loss="loss", optimizer=SGD, dims={"N": 8})
    assert exe(**arrays, learning_rate=0)["loss"] != exe(**arrays, learning_rate=0)["loss"]


def torch_lenet(torch):
    nn = torch.nn
    layers = {
        "conv1": nn.Conv2d(1, 6, 5, padding=2),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(6, 16, 5),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(400, 120),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(120, 84),
        "relu4": nn.ReLU(),
        "fc3": nn.Linear(84, 10),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_twenty_steps_of_lenet_equal_pytorchs(torch, optimizer):
    """From the same weights on the same batches, float32 against float64: losses and weights."""
    batch, steps = 16, 20
    model = torch_lenet(torch)
    if optimizer == "momentum":
        ours, theirs = gc.optim.SGD(0.02, momentum=0.9), torch.optim.SGD
        options = {"lr": 0.02, "momentum": 0.9}
    else:
        ours, theirs, options = gc.optim.Adam(1e-3), torch.optim.Adam, {"lr": 1e-3}
    graph = gc.zoo.lenet5()
    exe = gc.compile(graph, outputs=["loss"], loss="loss", optimizer=ours, dims={"N": batch})
    model.load_state_dict({k: torch.tensor(v) for k, v in exe.state().items()})
    model.double()
    update = theirs(model.parameters(), **options)
    for step in range(steps):
        arrays = networks.feeds(graph, batch, seed=step % 4)
        update.zero_grad()
        image = torch.tensor(arrays["image"], dtype=torch.float64)
        loss = torch.nn.functional.cross_entropy(
            model(image), torch.tensor(arrays["label"], dtype=torch.int64)
        )
        loss.backward()
        update.step()
        np.testing.assert_allclose(exe(**arrays)["loss"], loss.item(), rtol=1e-4)
    for name, value in model.state_dict().items():
        difference = np.linalg.norm(exe.state()[name] - value.numpy())
        assert difference < 1e-4 * np.linalg.norm(value.numpy()), name
