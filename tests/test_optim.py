"""Optimizers and schedules against torch.optim, step by step through the interpreter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graphc import errors, init, nn, optim
from graphc.interpreter import interpret
from graphc.ir import Graph
from graphc.ops import mse_loss, relu
from passes.autodiff import differentiate


def training_graph(optimizer, dtype: str = "float64") -> Graph:
    g = Graph("regression")
    x, y = g.input("x", (7, 5), dtype=dtype), g.input("y", (7, 3), dtype=dtype)
    h = nn.linear(relu(nn.linear(x, 17, name="0")), 3, name="2")
    g.output(loss=mse_loss(h, y))
    names = list(g.parameters)
    grads = differentiate(g, g.value("loss"), [g.node(n)[0] for n in names])
    optimizer.apply(g, dict(zip(names, grads, strict=True)))
    return g


def initial_state(g: Graph) -> dict[str, np.ndarray]:
    return {n: init.materialise(node, 0) for n, node in {**g.parameters, **g.states}.items()}


def batch(step: int):
    rng = np.random.default_rng(step)
    return {"x": rng.standard_normal((7, 5)), "y": rng.standard_normal((7, 3))}


CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "betas": (0.0, 0.9)}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.05, "betas": (0.7, 0.99), "eps": 1e-6, "weight_decay": 0.5}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.0}),
]


@pytest.mark.parametrize("kind, options", CASES)
def test_ten_steps_follow_pytorch(kind, options):
    torch = pytest.importorskip("torch")
    ours = getattr(optim, kind)(**options)
    g = training_graph(ours)
    state = initial_state(g)
    model = torch.nn.Sequential(torch.nn.Linear(5, 17), torch.nn.ReLU(), torch.nn.Linear(17, 3))
    model = model.double()
    model.load_state_dict({k: torch.tensor(state[k]) for k in g.parameters})
    theirs = getattr(torch.optim, kind)(model.parameters(), **options)
    assert ours.lr == theirs.defaults["lr"]
    schedule = optim.StepLR(ours.lr, step_size=5)
    for step in range(10):
        data = batch(step)
        for group in theirs.param_groups:
            group["lr"] = schedule(step)
        theirs.zero_grad()
        x, y = (torch.tensor(data[k]) for k in ("x", "y"))
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        theirs.step()
        rate = {} if step == 0 else {"learning_rate": np.float32(schedule(step))}
        results = interpret(g, {**data, **rate}, state)
        assert results.outputs["loss"] == pytest.approx(loss.item(), rel=1e-5)
        state.update(results.updates)
        # The step itself is float32 arithmetic on scalars: seven digits.
        for name, tensor in model.state_dict().items():
            np.testing.assert_allclose(state[name], tensor.numpy(), rtol=1e-5, atol=1e-7)


def test_first_adam_step_is_exact_in_float32():
    """1 - 0.999^1 taken as a difference of float32 numbers is wrong in the fifth digit."""
    torch = pytest.importorskip("torch")
    g = training_graph(optim.Adam(), "float32")
    state = initial_state(g)
    data = {k: v.astype("float32") for k, v in batch(0).items()}
    model = torch.nn.Sequential(torch.nn.Linear(5, 17), torch.nn.ReLU(), torch.nn.Linear(17, 3))
    model.load_state_dict({k: torch.tensor(state[k]) for k in g.parameters})
    theirs = torch.optim.Adam(model.parameters())
    torch.nn.functional.mse_loss(
        *(f(torch.tensor(data[k])) for f, k in ((model, "x"), (lambda v: v, "y")))
    ).backward()
    theirs.step()
    updates = interpret(g, data, state).updates
    for name, tensor in model.state_dict().items():
        step = updates[name] - state[name]
        np.testing.assert_allclose(step, tensor.numpy() - state[name], rtol=2e-3, atol=1e-7)


def test_states_have_the_parameters_type_and_are_not_weights():
    g = training_graph(optim.Adam())
    assert list(g.states) == [
        "optimizer.step",
        *(
            f"optimizer.{p}.{moment}"
            for p in ("0.weight", "0.bias", "2.weight", "2.bias")
            for moment in ("first_moment", "second_moment")
        ),
    ]
    for name, node in g.states.items():
        assert node.attrs["persistent"] is False and name in g.updates
    assert g.node("optimizer.0.weight.first_moment").types == g.node("0.weight").types
    assert all(p in g.updates for p in g.parameters)
    assert g.node("learning_rate").attrs["default"] == 1e-3
    assert g.node("optimizer.0.weight.first_moment").origin.layer == "0"
    assert not training_graph(optim.SGD()).states


def test_only_given_parameters_move():
    g = Graph()
    x = g.input("x", (2, 3))
    loss = mse_loss(nn.linear(x, 1, name="fc"), np.zeros((2, 1)))
    (grad,) = differentiate(g, loss, [g.node("fc.bias")[0]])
    optim.SGD(0.1, momentum=0.5).apply(g, {"fc.bias": grad})
    assert list(g.updates) == ["optimizer.fc.bias.momentum", "fc.bias"]


def test_optimizers_refuse():
    with pytest.raises(errors.DeclarationError, match=r"SGD: lr=-1"):
        optim.SGD(-1)
    with pytest.raises(errors.DeclarationError, match="nesterov"):
        optim.SGD(0.1, nesterov=True)
    with pytest.raises(errors.DeclarationError, match="Adam: betas"):
        optim.Adam(betas=(0.9, 1.0))
    with pytest.raises(errors.DeclarationError, match="AdamW: eps"):
        optim.AdamW(eps=math.nan)
    g = Graph()
    x = g.input("x", (3,))
    w = g.parameter("w", (3,))
    with pytest.raises(errors.DeclarationError, match="only parameters"):
        optim.SGD(0.1).apply(g, {"x": x})
    g = x.graph
    with pytest.raises(errors.ShapeError, match="must be"):
        optim.Adam(0.1).apply(g, {"w": g.input("g", (2,))})
    with pytest.raises(errors.NameLookupError, match="'v'"):
        optim.Adam(0.1).apply(g, {"v": w})


# ---- schedules


def torch_rates(make, lr: float, steps: int) -> list[float]:
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    "schedule, make",
    [
        (optim.StepLR(0.5, 3, 0.2), lambda s, o: s.StepLR(o, 3, 0.2)),
        (optim.ExponentialLR(0.5, 0.9), lambda s, o: s.ExponentialLR(o, 0.9)),
        (optim.CosineLR(0.5, 20, 0.01), lambda s, o: s.CosineAnnealingLR(o, 20, 0.01)),
    ],
)
def test_schedules_follow_pytorch(schedule, make):
    rates = torch_rates(make, schedule.lr, 20)
    assert [schedule(step) for step in range(20)] == pytest.approx(rates, rel=1e-12)


def test_warmup_cosine():
    schedule = optim.WarmupCosine(1.0, warmup_steps=4, total_steps=14, minimum=0.1)
    rates = [schedule(step) for step in range(16)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5:14] == sorted(rates[5:14], reverse=True)
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == pytest.approx(0.1) and rates[15] == pytest.approx(0.1)


def test_schedules_refuse():
    for make in (
        lambda: optim.StepLR(0.1, 0),
        lambda: optim.CosineLR(0.1, 0),
        lambda: optim.WarmupCosine(0.1, 0, 5),
        lambda: optim.WarmupCosine(0.1, 5, 5),
    ):
        with pytest.raises(errors.DeclarationError):
            make()
