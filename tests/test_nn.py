"""Layers, initialisers and the small networks: names, shapes, distributions, reproducibility."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import numpy as np
import pytest

from graphc import errors, init, nn, zoo
from graphc.interpreter import interpret
from graphc.ir import Graph


def parameter(shape, initialiser, name="w", dtype="float32"):
    return Graph().parameter(name, shape, initialiser, dtype=dtype).node


# ---- initialisers


@pytest.mark.parametrize(
    "initialiser, shape, bound",
    [
        (init.Uniform(-0.5, 0.5), (400, 100), 0.5),
        (init.KaimingUniform(a=math.sqrt(5)), (400, 100), 1 / math.sqrt(100)),
        (init.KaimingUniform(), (64, 32, 5, 5), math.sqrt(6 / (32 * 25))),
        (init.KaimingUniform(mode="fan_out"), (64, 32, 5, 5), math.sqrt(6 / (64 * 25))),
        (init.XavierUniform(gain=2.0), (300, 200), 2 * math.sqrt(6 / 500)),
    ],
)
def test_uniform_initialisers_fill_their_interval(initialiser, shape, bound):
    data = init.materialise(parameter(shape, initialiser), seed=1)
    assert data.shape == shape and data.dtype == np.float32
    assert 0.99 * bound < np.abs(data).max() <= bound * (1 + 1e-6)
    assert data.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(data.mean()) < 0.02 * bound


@pytest.mark.parametrize(
    "initialiser, shape, mean, std",
    [
        (init.Normal(1.0, 0.5), (400, 100), 1.0, 0.5),
        (init.KaimingNormal(), (400, 100), 0.0, math.sqrt(2 / 100)),
        (init.KaimingNormal(a=1.0, mode="fan_out"), (64, 32, 5, 5), 0.0, math.sqrt(1 / (64 * 25))),
        (init.XavierNormal(), (300, 200), 0.0, math.sqrt(2 / 500)),
    ],
)
def test_normal_initialisers_have_their_moments(initialiser, shape, mean, std):
    data = init.materialise(parameter(shape, initialiser), seed=2)
    assert data.mean() == pytest.approx(mean, abs=0.02 * std)
    assert data.std() == pytest.approx(std, rel=0.02)
    # Kurtosis tells a normal distribution (3) from a uniform one (1.8).
    assert (((data - mean) / std) ** 4).mean() == pytest.approx(3, rel=0.1)


def test_functions_make_the_same_initialisers():
    assert init.kaiming_uniform(0.2, "fan_out") == init.KaimingUniform(0.2, "fan_out")
    assert init.kaiming_normal() == init.KaimingNormal()
    assert init.xavier_uniform(2.0) == init.XavierUniform(2.0)
    assert init.xavier_normal() == init.XavierNormal()
    assert init.uniform(-1, 1) == init.Uniform(-1, 1)
    assert init.normal(0, 2) == init.Normal(0, 2)
    assert init.constant(3) == init.Constant(3)
    assert init.zeros() == init.Zeros() and init.ones() == init.Ones()


def test_constants_arrays_numbers_and_none():
    make = init.materialise
    assert (make(parameter((2, 3), init.Constant(0.5)), 0) == 0.5).all()
    assert (make(parameter((2, 3), init.Ones()), 0) == 1).all()
    assert not make(parameter((2, 3), init.Zeros()), 0).any()
    assert not make(parameter((2, 3), None), 0).any()
    assert make(parameter((), 7, dtype="int32"), 0) == 7
    given = np.arange(6.0).reshape(2, 3)
    data = make(parameter((2, 3), given), 0)
    assert data.dtype == np.float32 and (data == given).all()
    data[:] = 0
    assert given[1, 2] == 5  # a copy
    assert make(parameter((0, 3), init.KaimingUniform()), 0).shape == (0, 3)
    assert make(parameter((3, 0), init.KaimingNormal()), 0).shape == (3, 0)
    assert make(parameter((), init.Normal()), 0).shape == ()


def test_initialisers_refuse():
    with pytest.raises(errors.ShapeError, match=r"w \(parameter.*shape \[3\].*f32\[2\]"):
        init.materialise(parameter((2,), np.zeros(3)), 0)
    with pytest.raises(errors.DeclarationError, match="neither an initialiser"):
        init.materialise(parameter((2,), "ones"), 0)
    with pytest.raises(errors.ShapeError, match="has no fan"):
        init.materialise(parameter((2,), init.XavierUniform()), 0)
    with pytest.raises(errors.DeclarationError, match="fan_in"):
        init.materialise(parameter((2, 2), init.KaimingUniform(mode="fan")), 0)


def test_values_depend_on_seed_and_name_alone():
    w = init.materialise(parameter((3, 4), init.Normal(), "w"), 0)
    g = Graph("other")
    g.parameter("before", (5,), init.Normal())
    again = g.parameter("w", (3, 4), init.Normal()).node
    assert (init.materialise(again, 0) == w).all()
    assert (init.materialise(again, 1) != w).all()
    assert (init.materialise(parameter((3, 4), init.Normal(), "v"), 0) != w).all()


def test_values_drawn_ahead_are_the_same():
    here = []

    class Own:
        """A user's initialiser, which no other thread calls."""

        def sample(self, rng, shape):
            here.append(threading.get_ident())
            return rng.normal(size=shape)

    starts = {"large": init.Normal(), "small": init.Ones(), "own": Own(), "array": np.ones((2, 3))}
    shapes = {"large": (300, 100), "small": (2,), "own": (300, 100), "array": (2, 3)}
    nodes = [parameter(shapes[name], start, name) for name, start in starts.items()]
    first = init.InitialValues(3)
    first.draw(nodes, 2)
    for node in nodes:
        assert (first.take(node) == init.materialise(node, 3)).all()
    assert set(here) == {threading.get_ident()}
    wrong = parameter((300, 100), init.KaimingUniform(mode="fan"))
    first.draw([wrong], 2)
    with pytest.raises(errors.DeclarationError, match="fan_in"):
        first.take(wrong)


def test_values_are_the_same_in_every_process():
    code = (
        "from graphc import zoo, init; g = zoo.mlp(hidden=(3,));"
        "print(init.materialise(g.node('fc1.weight'), 5).tobytes()[:64].hex())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    here = init.materialise(zoo.mlp(hidden=(3,)).node("fc1.weight"), 5).tobytes()[:64].hex()
    assert outputs == {here + "\n"}


# ---- layers


def test_layers_have_pytorchs_names_and_layouts():
    g = Graph()
    x = g.input("x", ("N", 6, 8, 8))
    y = nn.conv2d(x, 4, (3, 5), stride=2, padding=1, groups=2, name="block.conv")
    z = nn.batch_norm2d(y, name="block.bn")
    w = nn.linear(z, 3, bias=False, name="head")
    assert y.shape == ("N", 4, 4, 3) and z.shape == y.shape and w.shape == ("N", 4, 4, 3)
    assert {n: node.types[0].shape for n, node in g.parameters.items()} == {
        "block.conv.weight": (4, 3, 3, 5),
        "block.conv.bias": (4,),
        "block.bn.weight": (4,),
        "block.bn.bias": (4,),
        "head.weight": (3, 3),
    }
    assert list(g.states) == list(g.updates) == ["block.bn.running_mean", "block.bn.running_var"]
    assert g.node("block.conv").op == "conv2d"
    assert g.node("block.bn").op == "batch_norm"
    assert g.node("head").op == "matmul"
    for node in g.nodes:
        if node.op != "input":
            assert node.origin.layer in ("block.conv", "block.bn", "head")
            assert node.origin.file == __file__


def test_layers_without_a_name_take_the_first_free_one():
    g = Graph()
    x = g.input("x", ("N", 3))
    y = nn.linear(nn.linear(x, 3), 3)
    nn.dropout(nn.dropout(y))
    assert [n for n in g.parameters if "weight" in n] == ["linear1.weight", "linear2.weight"]
    assert "dropout1" in g and "dropout2" in g


def test_layers_follow_the_inputs_dtype():
    g = Graph()
    x = g.input("x", ("N", 3, 4, 4), dtype="float64")
    y = nn.linear(nn.batch_norm2d(nn.conv2d(x, 2, 3)), 5)
    assert y.dtype == "float64"


def test_default_initial_values_are_pytorchs():
    g = Graph()
    nn.conv2d(g.input("x", ("N", 64, 8, 8)), 256, 3, name="conv")
    nn.linear(g.input("y", ("N", 1000)), 300, name="fc")
    nn.batch_norm2d(g.input("z", ("N", 2, 8, 8)), name="bn")
    first = {n: init.materialise(node, 3) for n, node in {**g.parameters, **g.states}.items()}
    for name, fan_in in (("conv", 64 * 9), ("fc", 1000)):
        bound = 1 / math.sqrt(fan_in)
        for kind in ("weight", "bias"):
            data = first[f"{name}.{kind}"]
            assert np.abs(data).max() <= bound * (1 + 1e-6)
            assert data.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert (first["bn.weight"] == 1).all() and (first["bn.running_var"] == 1).all()
    assert not first["bn.bias"].any() and not first["bn.running_mean"].any()


@pytest.mark.parametrize(
    "declare, message",
    [
        (lambda g: nn.linear(g.input("x", ("N", "D")), 3, name="fc"), r"fc \(linear\).*'D'"),
        (lambda g: nn.linear(g.input("x", ()), 3, name="fc"), r"fc \(linear\).*last axis"),
        (lambda g: nn.conv2d(g.input("x", (2, 3)), 3, 3), r"conv2d1 \(conv2d\).*'x' f32\[2,3\]"),
        (
            lambda g: nn.conv2d(g.input("x", (1, 3, 4, 4)), 4, 3, groups=2, name="c"),
            "groups=2 must divide the 3 channels",
        ),
        (lambda g: nn.conv2d(g.input("x", (1, 3, 4, 4)), 4, 5, name="c"), r"c \(conv2d.*fit"),
        (lambda g: nn.batch_norm2d(g.input("x", (1, 3)), name="bn"), r"bn \(batch_norm2d\)"),
    ],
)
def test_layers_refuse(declare, message):
    with pytest.raises(errors.ShapeError, match=message) as caught:
        declare(Graph())
    assert "\n" not in str(caught.value)


def test_a_layer_name_is_used_once():
    g = Graph()
    x = g.input("x", ("N", 3))
    nn.linear(x, 3, name="fc")
    with pytest.raises(errors.DeclarationError, match="fc.weight"):
        nn.linear(x, 3, name="fc")


# ---- networks


def torch_lenet(torch):
    class LeNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Conv2d(1, 6, 5, padding=2)
            self.conv2 = torch.nn.Conv2d(6, 16, 5)
            self.fc1 = torch.nn.Linear(400, 120)
            self.fc2 = torch.nn.Linear(120, 84)
            self.fc3 = torch.nn.Linear(84, 10)

        def forward(self, x):
            f = torch.nn.functional
            x = f.max_pool2d(f.relu(self.conv1(x)), 2)
            x = f.max_pool2d(f.relu(self.conv2(x)), 2)
            x = f.relu(self.fc1(x.flatten(1)))
            return self.fc3(f.relu(self.fc2(x)))

    torch.manual_seed(0)
    return LeNet()


@pytest.mark.parametrize("n", [1, 7])
def test_lenet_takes_pytorchs_state_dict(n):
    torch = pytest.importorskip("torch")
    from passes.autodiff import differentiate

    model = torch_lenet(torch)
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    g = zoo.lenet5()
    assert {k: node.types[0].shape for k, node in g.parameters.items()} == {
        k: v.shape for k, v in state.items()
    }
    g = g.bind({"N": n})
    rng = np.random.default_rng(n)
    image = rng.uniform(0, 1, (n, 1, 28, 28)).astype("float32")
    label = rng.integers(0, 10, n, dtype="int32")
    wrt = list(g.parameters)
    grads = differentiate(g, g.value("loss"), [g.node(p)[0] for p in wrt])
    values = [g.value("logits"), g.value("loss"), *grads]
    results = interpret(g, {"image": image, "label": label}, state, values=values).values
    logits = model(torch.tensor(image))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(label).long())
    loss.backward()
    expected = [logits, loss, *(dict(model.named_parameters())[p].grad for p in wrt)]
    for value, tensor in zip(values, expected, strict=True):
        np.testing.assert_allclose(
            results[value], tensor.detach().numpy(), rtol=1e-4, atol=1e-6, err_msg=value.name
        )


def test_networks_have_the_common_interface():
    for g, layers in (
        (zoo.lenet5(classes=7), 5),
        (zoo.mlp(classes=7), 3),
        (zoo.mlp((), (4,), 7), 1),
    ):
        assert list(g.inputs) == ["image", "label"] and list(g.outputs) == ["logits", "loss"]
        assert g.value("logits").shape == ("N", 7) and g.value("loss").shape == ()
        assert len(g.parameters) == 2 * layers
        assert g.bind({"N": 3}).value("logits").shape == (3, 7)


def test_two_builds_of_a_network_are_equal():
    assert zoo.lenet5() == zoo.lenet5() and zoo.lenet5().fingerprint() == zoo.lenet5().fingerprint()
    assert zoo.mlp() != zoo.mlp(hidden=(128, 65))
