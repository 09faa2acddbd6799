"""What users call: state, inputs, outputs, threads, checks, and programs that share kernels."""

from __future__ import annotations

import gc as collector
import threading
from dataclasses import replace

import compile_checks
import networks
import numpy as np
import pytest

import graphc as gc
from graphc import errors
from graphc.codegen import lower, program
from graphc.expr import call
from graphc.ops import registry


def network() -> gc.Graph:
    """y = tanh(x w + b), and its mean square distance from `target`."""
    g = gc.Graph("network")
    x, target = g.input("x", ("N", 7)), g.input("target", ("N", 5))
    y = gc.tanh(gc.nn.linear(x, 5, name="fc"))
    g.output(y=y, loss=gc.mse_loss(y, target))
    return g


def data(n: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    return {
        "x": rng.standard_normal((n, 7)).astype(np.float32),
        "target": rng.standard_normal((n, 5)).astype(np.float32),
    }


def compiled(n: int = 3, **options):
    return gc.compile(network(), outputs=["y"], dims={"N": n}, **options)


def training(n: int = 3, optimizer=None, **options):
    return gc.compile(
        network(),
        outputs=["loss", "y"],
        loss="loss",
        optimizer=optimizer or gc.optim.Adam(0.1),
        dims={"N": n},
        **options,
    )


def expected(exe, x: np.ndarray) -> np.ndarray:
    state = exe.state()
    return np.tanh(x @ state["fc.weight"].T + state["fc.bias"])


# ---- inputs


GIVEN = {
    "list": lambda x: x.tolist(),
    "float64": lambda x: x.astype(np.float64),
    "integers": lambda x: (10 * x).astype(np.int64),
    "negative strides": lambda x: x[::-1, ::-1],
    "every other": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "Fortran order": np.asfortranarray,
    "big endian": lambda x: x.astype(">f4"),
    "subclass": lambda x: x.view(type("Array", (np.ndarray,), {})),
}


@pytest.mark.parametrize("n", [3, 1000])
@pytest.mark.parametrize("how", GIVEN)
def test_inputs_of_any_kind(how, n):
    exe = compiled(n)
    given = GIVEN[how](data(n)["x"])
    exe.poison()
    np.testing.assert_allclose(
        exe(x=given)["y"], expected(exe, np.asarray(given, np.float32)), rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("n", [3, 1000])
def test_read_only_and_unaligned_inputs(n):
    exe, x = compiled(n), data(n)["x"]
    x.flags.writeable = False
    first = exe(x=x)["y"]
    memory = np.zeros(x.nbytes + 1, np.uint8)[1:]
    odd = memory.view(np.float32).reshape(x.shape)
    odd[...] = x
    np.testing.assert_array_equal(exe(x=odd)["y"], first)


def test_scalar_and_size_one():
    g = gc.Graph("scalar")
    a, b = g.input("a", ()), g.input("b", (1, 1))
    w = g.parameter("w", (1, 1), np.full((1, 1), 3.0))
    g.output(y=gc.sum(gc.matmul(b, w)) * a, z=gc.relu(gc.matmul(w, b)))
    exe = gc.compile(g, outputs=["y", "z"])
    got = exe(a=2, b=[[5.0]])
    assert got["y"].shape == () and got["y"] == 30 and got["z"] == [[15]]


def test_everything_of_size_one():
    g = gc.Graph("ones")
    x, label = g.input("x", ("N", 1, 1, 1)), g.input("label", ("N",), "int32")
    h = gc.max_pool2d(gc.relu(gc.nn.conv2d(x, 1, 1, name="conv")), 1)
    logits = gc.nn.linear(gc.flatten(gc.nn.batch_norm2d(h, name="bn")), 1, name="fc")
    g.output(loss=gc.softmax_cross_entropy(logits, label), logits=logits)
    feeds = {"x": np.ones((1, 1, 1, 1), np.float32), "label": np.zeros(1, np.int32)}
    compile_checks.assert_same(
        g,
        feeds,
        steps=2,
        outputs=["loss", "logits"],
        loss="loss",
        optimizer=gc.optim.SGD(0.1),
        dims={"N": 1},
        mode="infer",
    )


def test_empty_batch():
    got = compiled(0)(x=np.zeros((0, 7), np.float32))
    assert got["y"].shape == (0, 5)


@pytest.mark.parametrize(("size", "value", "readers"), [(1, 0.0, 1), (7, -2.5, 1), (17, 0.0, 2)])
def test_small_inputs_are_received_padded(size, value, readers):
    """The padding is written once; only an input that nothing else reads takes that way."""
    g = gc.Graph("padded")
    x = g.input("x", (2, 3, size, size))
    padded = gc.pad(x, ((0, 0), (0, 0), (2, 1), (0, 3)), value=value)
    y = gc.nn.conv2d(padded, 5, 3, name="conv")
    g.output(y=y, **({"mean": gc.mean(x)} if readers > 1 else {}))
    exe = gc.compile(g, outputs=list(g.outputs), dims={})
    assert any("interior" in n.attrs for n in exe.graph) == (readers == 1)
    oracle = gc.compile(g, outputs=["y"], dims={}, target="interpret")
    rng = np.random.default_rng(size)
    for turn in range(3):
        if turn == 2:  # what depends on parameters runs again, and must leave the input alone
            state = {k: rng.standard_normal(v.shape) for k, v in exe.state().items()}
            exe.load_state(state)
            oracle.load_state(state)
        image = rng.standard_normal((2, 3, size, size)).astype(np.float32)
        got, wanted = exe(x=image)["y"], oracle(x=image)["y"]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_inputs_that_do_not_fit():
    exe, x = compiled(), data()["x"]
    for arrays, text in [
        ({}, "input 'x' f32[3,7] is missing: pass x=..."),
        ({"x": None}, "input 'x' f32[3,7] is missing: pass x=..."),
        ({"xx": x}, "there is no input 'xx'; the inputs are 'x'; did you mean 'x'?"),
        ({"x": x, "z": x}, "there is no input 'z'; the inputs are 'x'"),
        (
            {"x": x, "target": x},
            "input 'target' is not needed for the outputs that were compiled: leave it out",
        ),
        (
            {"x": x[:2]},
            "input 'x' expects f32[3,7], got shape [2, 7]: "
            "pass that shape, or compile with other dims",
        ),
        (
            {"x": x + 0j},
            "input 'x' expects f32[3,7], got complex64: convert it with .astype('float32')",
        ),
    ]:
        with pytest.raises(errors.InputError) as caught:
            exe.run(arrays)
        assert str(caught.value) == text
    np.testing.assert_allclose(exe(x=x)["y"], expected(exe, x), rtol=2e-5, atol=2e-6)


def test_integer_inputs_must_keep_their_values():
    g = gc.Graph("labels")
    g.output(y=gc.one_hot(g.input("label", (2,), "int32"), 3))
    exe = gc.compile(g, outputs=["y"])
    np.testing.assert_array_equal(exe(label=np.array([0, 2], np.uint8))["y"].argmax(1), [0, 2])
    for bad in ([0.0, 1.0], np.array([0, 2**40])):
        with pytest.raises(errors.InputError, match="label"):
            exe(label=bad)


def test_learning_rate_is_an_input_with_a_default():
    exe, same, still = (training(optimizer=gc.optim.SGD(0.1)) for _ in range(3))
    before = exe.state()
    exe(**data())
    same(**data(), learning_rate=0.1)
    still(**data(), learning_rate=0)
    for name, array in exe.state().items():
        np.testing.assert_array_equal(same.state()[name], array)
        np.testing.assert_array_equal(still.state()[name], before[name])
    still(**data(), learning_rate=None)
    np.testing.assert_array_equal(still.state()["fc.weight"], exe.state()["fc.weight"])


# ---- outputs


def test_outputs_never_alias():
    g = gc.Graph("aliases")
    x, w = g.input("x", (5000,)), g.parameter("w", (5000,), np.ones(5000))
    g.output(x=x, same=gc.reshape(x, (50, 100)), w=w, y=gc.relu(x), twice=x * 2.0)
    exe = gc.compile(g, outputs=["x", "same", "w", "y", "twice"])
    given = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    first = exe(x=given)
    kept = {name: array.copy() for name, array in first.items()}
    second = exe(x=-given)
    everything = [given, *first.values(), *second.values()]
    for i, a in enumerate(everything):
        assert not any(np.shares_memory(a, b) for b in everything[i + 1 :])
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
        array[...] = np.nan
    np.testing.assert_array_equal(exe(x=given)["w"], np.ones(5000))
    np.testing.assert_array_equal(exe(x=given)["same"].ravel(), given)


def test_outputs_written_into_given_arrays():
    exe, x = compiled(), data()["x"]
    out = np.full((3, 5), np.nan, np.float32)
    got = exe.run({"x": x}, out={"y": out})
    assert got["y"] is out
    np.testing.assert_array_equal(out, exe(x=x)["y"])
    frozen = np.zeros((3, 5), np.float32)
    frozen.flags.writeable = False
    for bad in (out.T.copy(), out.astype("f8"), np.zeros((3, 10), "f4")[:, ::2], frozen, [0.0]):
        with pytest.raises(errors.InputError, match=r"out\['y'\] must be a writable C-contiguous"):
            exe.run({"x": x}, out={"y": bad})
    with pytest.raises(errors.InputError, match="there is no output 'z'; the outputs are y"):
        exe.run({"x": x}, out={"z": out})


def test_gradients_of_inputs():
    exe = gc.compile(network(), outputs=[], loss="loss", gradients=["x", "fc.bias"], dims={"N": 3})
    arrays = data()
    got = exe(**arrays)
    assert list(got) == ["grad:x", "grad:fc.bias"]
    y = expected(exe, arrays["x"])
    g = 2 / y.size * (y - arrays["target"]) * (1 - y * y)
    np.testing.assert_allclose(got["grad:x"], g @ exe.state()["fc.weight"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["grad:fc.bias"], g.sum(0), rtol=1e-4, atol=1e-6)


# ---- state


def test_state_round_trip():
    exe = training()
    for _ in range(3):
        exe(**data())
    state = exe.state()
    assert set(state) == {"fc.weight", "fc.bias"}
    state["fc.bias"][...] += 1  # a copy: the executable does not see it
    assert not np.array_equal(exe.state()["fc.bias"], state["fc.bias"])
    infer = compiled()
    infer.load_state({k: v.astype(np.float64) for k, v in state.items()})
    for name, array in infer.state().items():
        np.testing.assert_array_equal(array, state[name])
    state["fc.weight"][...] = 0
    assert infer.state()["fc.weight"].any()


def test_state_in_blocked_layouts_has_torchs_layout():
    g = gc.Graph("blocked")
    x = gc.nn.conv2d(g.input("x", ("N", 3, 4, 4)), 17, 3, name="conv")
    y = gc.nn.linear(gc.flatten(gc.nn.batch_norm2d(x, name="norm")), 5, name="fc")
    g.output(loss=gc.mean(gc.square(y)))
    options = {"outputs": ["loss"], "loss": "loss", "optimizer": gc.optim.SGD(0.1, momentum=0.9)}
    blocked = gc.compile(g, dims={"N": 2}, pipeline=gc.default_pipeline("channels"), **options)
    plain = gc.compile(g, dims={"N": 2}, target="interpret", **options)
    rng = np.random.default_rng(0)
    fresh = {n: rng.standard_normal(a.shape).astype(a.dtype) for n, a in plain.state(True).items()}
    assert any(n.layouts[0].lane_axis == 0 for n in blocked.state_nodes.values())
    blocked.load_state(fresh)
    assert {n: a.shape for n, a in blocked.state(True).items()} == {
        n: a.shape for n, a in fresh.items()
    }
    for name, array in blocked.state(True).items():
        np.testing.assert_array_equal(array, fresh[name])


def test_optimizer_state_resumes_training():
    straight, first, second = training(), training(), training(seed=1)
    for _ in range(2):
        straight(**data())
        first(**data())
    second.load_state(first.state(optimizer=True))
    for _ in range(2):
        straight(**data())
        second(**data())
    for name, array in straight.state(optimizer=True).items():
        np.testing.assert_array_equal(second.state(optimizer=True)[name], array)
    assert straight.state(True)["optimizer.step"] == 4
    compiled().load_state(first.state(optimizer=True))  # moments are no error for inference


def test_state_that_does_not_fit_changes_nothing():
    exe = compiled()
    before = exe.state()
    good = {name: array + 1 for name, array in before.items()}
    for bad, text in [
        (
            {**good, "fc2.bias": good["fc.bias"]},
            "the network has no 'fc2.bias' (strict=False skips)",
        ),
        ({"fc.weight": good["fc.weight"]}, "missing 'fc.bias' (strict=False keeps them)"),
        ({**good, "fc.bias": np.zeros(4)}, "'fc.bias' is f32[5], got shape [4]"),
        (
            {**good, "fc.bias": np.array(list("abcde"))},
            "'fc.bias' is f32[5], got <U1: pass numbers",
        ),
    ]:
        with pytest.raises(errors.StateError) as caught:
            exe.load_state(bad)
        assert str(caught.value) == f"load_state: {text}"
        for name, array in exe.state().items():
            np.testing.assert_array_equal(array, before[name])
    exe.load_state({"fc.bias": good["fc.bias"], "other": good["fc.bias"]}, strict=False)
    np.testing.assert_array_equal(exe.state()["fc.bias"], good["fc.bias"])
    np.testing.assert_array_equal(exe.state()["fc.weight"], before["fc.weight"])


# ---- threads, sharing


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_same_bits_on_every_run(threads):
    g = gc.zoo.lenet5()
    options = {"loss": "loss", "optimizer": gc.optim.SGD(0.1), "dims": {"N": 8}}
    runs = []
    feeds = networks.feeds(g, 8)
    for _ in range(2):
        exe = gc.compile(g, outputs=["loss"], threads=threads, **options)
        exe.poison()
        losses = [exe(**feeds)["loss"].tobytes() for _ in range(3)]
        runs.append((losses, {k: v.tobytes() for k, v in exe.state().items()}))
    assert runs[0] == runs[1]


def test_many_python_threads_call_one_executable():
    exe = compiled(threads=2)
    arrays = [np.full((3, 7), i / 10, np.float32) for i in range(4)]
    results = [exe(x=a)["y"] for a in arrays]
    wrong = []

    def caller(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(exe(x=arrays[i])["y"], results[i]):
                wrong.append(i)

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong


def test_compile_from_many_python_threads():
    found: list = [None] * 4

    def compiler(i: int) -> None:
        exe = compiled(3 + i % 2, seed=i)
        x = data(3 + i % 2)["x"]
        found[i] = np.abs(exe(x=x)["y"] - expected(exe, x)).max()

    compilers = [threading.Thread(target=compiler, args=(i,)) for i in range(4)]
    for thread in compilers:
        thread.start()
    for thread in compilers:
        thread.join()
    assert all(error is not None and error < 1e-5 for error in found)


def test_regions_of_one_structure_are_lowered_once(monkeypatch):
    g = gc.Graph("deep")
    h = g.input("x", (3, 5))
    for i in range(6):
        h = gc.relu(gc.nn.linear(h, 5, name=f"fc{i}"))
    g.output(y=h)
    lowered = []

    def lower_region(name, *region):
        lowered.append(name)
        return lower.lower_region(name, *region)

    monkeypatch.setattr(program, "lower_region", lower_region)
    monkeypatch.setattr(program, "_lowered", {})
    exe = gc.compile(g, outputs=["y"])
    assert collector.isenabled()
    products = [launch for launch in exe.launches if launch.node.attrs["kind"] == "matmul"]
    assert len(products) == 6 and len({launch.call.source for launch in products}) == 1
    assert len(lowered) == 1
    reference = gc.compile(g, outputs=["y"], target="interpret")
    x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    np.testing.assert_allclose(exe(x=x)["y"], reference(x=x)["y"], rtol=1e-5, atol=1e-6)


def test_second_executable_shares_kernels_but_no_memory():
    first, second = compiled(seed=0), compiled(seed=1)
    assert set(first.kernel_paths.values()) == set(second.kernel_paths.values())
    assert not second.compiled_kernels
    x = data()["x"]
    a, b = first(x=x)["y"], second(x=x)["y"]
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(first(x=x)["y"], a)


# ---- check=True


def test_check_names_the_wrong_kernel(monkeypatch):
    right = registry.get("tanh")
    wrong = replace(right, lower=lambda k, node, out, index: call("sin", k.read(0, index)))
    exe = compiled(check=True)
    exe(x=data()["x"])
    monkeypatch.setitem(registry._REGISTRY, "tanh", wrong)
    exe = compiled(check=True)
    with pytest.raises(errors.CheckError) as caught:
        exe(x=data()["x"])
    text = str(caught.value)
    assert (
        text.startswith("fc (fused, test_executable.py:") and "differs from the interpreter" in text
    )
    assert "kernel source: " in text and "\n" not in text


def test_check_passes_on_a_training_step():
    g = gc.zoo.mlp((17,), (1, 3, 5))
    exe = gc.compile(
        g,
        outputs=["loss"],
        loss="loss",
        optimizer=gc.optim.Adam(0.01),
        dims={"N": 2},
        check=True,
    )
    first = float(exe(**networks.feeds(g, 2))["loss"])
    losses = [float(exe(**networks.feeds(g, 2))["loss"]) for _ in range(3)]
    assert losses[-1] < first
