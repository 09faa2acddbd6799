"""The benchmark: the same network for every library, turns of processes, reports."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

import graphc as gc
from graphc import bench
from graphc.bench import measure, rounds
from graphc.bench.models import MODELS, Work, works
from graphc.bench.peers import PEERS, Graphc
from graphc.bench.report import COLUMNS, Report, cells
from graphc.bench.rounds import Plan, Row, Worker
from graphc.bench.translate import JAX, TORCH, steps
from graphc.errors import GraphcError, NameLookupError

SHORT = Plan(rounds=2, burst=0.005)


def residual() -> gc.Graph:
    """Every operator the zoo's convolutional networks are made of, in one block."""
    g = gc.Graph("residual")
    image = g.input("image", ("N", 3, 9, 9))
    label = g.input("label", ("N",), dtype="int32")

    def unit(x, stride, name):
        y = gc.nn.conv2d(x, 4, 3, stride=stride, padding=1, bias=False, name=f"{name}.conv")
        return gc.nn.batch_norm2d(y, name=f"{name}.bn")

    h = gc.max_pool2d(gc.relu(unit(image, 1, "stem")), 3, stride=2, padding=1)
    h = gc.relu(gc.add(unit(gc.relu(unit(h, 2, "a")), 1, "b"), unit(h, 2, "short")))
    h = gc.avg_pool2d(h, 2, stride=1)
    h = gc.flatten(gc.global_avg_pool2d(h))
    h = gc.nn.linear(gc.gelu(gc.nn.linear(h, 6, bias=False, name="fc1")), 5, name="fc2")
    g.output(logits=h, loss=gc.softmax_cross_entropy(h, label))
    return g


@pytest.fixture
def own_model(monkeypatch):
    """`residual` among the models to measure."""
    monkeypatch.setitem(MODELS, "residual", bench.models.Model(residual, (2,), (2,)))
    return "residual"


def interpreted(work: Work) -> np.ndarray:
    """The work's output by the interpreter: the loss before the update, or logits."""
    exe = gc.compile(
        work.declared,
        outputs=[work.output],
        dims=work.dims,
        target="interpret",
        mode=work.mode,
    )
    return exe(**{n: a for n, a in work.inputs().items() if n in exe.inputs})[work.output]


# ---- work


def test_work_is_the_same_for_every_process():
    work = Work("lenet5", 4, "train", 1)
    again = Work("lenet5", 4, "train", 1)
    for first, second in ((work.inputs(), again.inputs()), (work.weights(), again.weights())):
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[n], second[n]) for n in first)
    exe = gc.compile(work.declared, outputs=["loss"], dims=work.dims, target="interpret")
    assert all(np.array_equal(a, work.weights()[n]) for n, a in exe.state().items())
    assert "label" not in Work("lenet5", 4, "infer", 1).inputs()


def test_operations_are_those_of_direct_convolutions():
    forward = 6 * 25 * 28 * 28 + 16 * 150 * 10 * 10 + 400 * 120 + 120 * 84 + 84 * 10
    assert Work("lenet5", 3, "infer", 1).flops() == 3 * 2 * forward
    # Backward needs as much for the weights and for the data, but for the image's gradient.
    training = 3 * forward - 6 * 25 * 28 * 28
    assert Work("lenet5", 16, "train", 1).flops() == 16 * 2 * training


def test_every_combination_is_measured():
    found = works(["lenet5"], None, ["infer", "train"], [1, 2])
    assert len(found) == len(set(found)) == 2 * (len(MODELS["lenet5"].infer) + 1)
    assert works(["lenet5"], [3], ["infer"], [1]) == [Work("lenet5", 3, "infer", 1)]
    with pytest.raises(NameLookupError, match="lenet5"):
        works(["lenet"], None, ["infer"], [1])


# ---- the network in the words of other libraries


def test_layers_are_recognised():
    found = [s.op for s in steps(Work("lenet5", 2, "train", 1).graph())]
    block = ["conv2d", "relu", "max_pool2d"]
    dense = ["linear", "relu", "linear", "relu", "linear"]
    assert found == [*block, *block, "reshape", *dense, "cross_entropy"]
    conv = steps(Work("lenet5", 2, "train", 1).graph())[0]
    assert [v.name for v in conv.inputs] == ["image", "conv1.weight", "conv1.bias"]


def test_a_shared_product_is_no_layer():
    g = gc.Graph("shared")
    x = g.input("image", (2, 3))
    w = g.parameter("w", (4, 3), np.ones((4, 3), np.float32))
    b = g.parameter("b", (4,), np.ones(4, np.float32))
    y = gc.matmul(x, gc.transpose(w))
    g.output(logits=gc.mul(gc.add(y, b), y))
    assert [s.op for s in steps(g)] == ["linear", "add", "mul"]
    assert steps(g)[0].inputs[2] is None


def test_unknown_operators_are_refused_by_name():
    g = gc.Graph("odd")
    g.output(logits=gc.erf(g.input("image", (2, 3)), name="strange"))
    for writer in (TORCH, JAX):
        with pytest.raises(GraphcError, match=f"strange .*'erf' for {writer.library}"):
            writer.source(g)


def test_source_is_readable():
    source = TORCH.source(Work("lenet5", 2, "infer", 1).graph())
    assert "t0 = F.conv2d(image, p['conv1.weight'], p['conv1.bias'], (1, 1), (2, 2)" in source
    assert source.count("\n    t") == 12 and "return t11" in source
    compile(JAX.source(Work("lenet5", 2, "train", 1).graph()), "jax", "exec")


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_pytorch_computes_the_same(torch, own_model, mode):
    work = Work(own_model, 2, mode, 1)
    expected = interpreted(work)
    for variant, make in PEERS["pytorch"].candidates(work):
        np.testing.assert_allclose(make()(), expected, rtol=1e-4, atol=1e-5, err_msg=variant)


def test_pytorch_trains_the_same(torch):
    """Three steps: gradients, momentum and running statistics agree."""
    work = Work("lenet5", 8, "train", 1)
    exe = gc.compile(
        work.declared, outputs=["loss"], dims=work.dims, target="interpret", **work.training()
    )
    step = PEERS["pytorch"].candidates(work)[0][1]()
    for _ in range(3):
        np.testing.assert_allclose(step(), exe(**work.inputs())["loss"], rtol=1e-5)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_jax_computes_the_same(own_model, mode):
    pytest.importorskip("jax")
    work = Work(own_model, 2, mode, 1)
    step = PEERS["jax"].candidates(work)[0][1]()
    np.testing.assert_allclose(step(), interpreted(work), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
def test_onnx_computes_the_same(own_model, peer):
    pytest.importorskip("onnx")
    pytest.importorskip(peer)
    work = Work(own_model, 2, "infer", 1)
    PEERS[peer].load(1)
    step = PEERS[peer].candidates(work)[0][1]()
    np.testing.assert_allclose(step(), interpreted(work), rtol=1e-4, atol=1e-5)


# ---- processes


def test_the_fastest_variant_is_chosen(monkeypatch):
    """Of several ways to do the work; its results are those reported."""

    def variant(seconds, result):
        def step():
            time.sleep(seconds)
            return result

        return lambda: step

    class Variants(Graphc):
        def load(self, threads):
            pass

        def candidates(self, work):
            return [("slow", variant(0.02, 1.0)), ("fast", variant(0.001, 2.0))]

    monkeypatch.setitem(PEERS, "graphc", Variants())
    worker = measure.Worker("graphc", "mlp", 1, "infer", 1)
    built = worker.do_build()
    assert (built["variant"], built["variants"]) == ("fast", 2)
    assert built["check"] == [[2.0]] * 3 and built["iteration"] < 0.01
    assert worker.do_build(variant="slow")["variants"] == 1
    assert worker.do_burst(calls=3)["median"] >= 0.02


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not forget a peak"
)
def test_memory_of_what_came_before_is_forgotten():
    large = np.ones(100_000_000, np.uint8)
    before = measure.peak_memory()
    del large
    measure.forget_peak()
    assert measure.peak_memory() < before - 90_000_000


class Broken(Graphc):
    """A peer whose process cannot build: its cache folder is open to everyone."""

    def environment(self, folder):
        os.chmod(folder, 0o777)
        return super().environment(folder)


def test_a_peer_that_fails_is_a_row_with_the_reason():
    (row,) = rounds.measure(Work("mlp", 4, "infer", 1), [Broken()], SHORT)
    assert "failed: CacheError" in row.note and row.median == 0
    assert "CacheError" in cells(row)[0]


def test_a_peer_that_fails_later_does_not_stop_the_others(monkeypatch):
    class Scripted:
        """Answers at once; JAX dies in its second burst."""

        def __init__(self, peer, work, folder):
            self.name, self.bursts = peer.name, 0

        def ask(self, seconds, do, **command):
            if do == "build":
                return {
                    "setup": 1.0,
                    "variant": "",
                    "variants": 1,
                    "check": [[1.0]],
                    "iteration": 0.1,
                }
            if do == "memory":
                return {"peak": 2, "imported": 1, "running": 2}
            self.bursts += 1
            if self.name == "jax" and self.bursts == 2:
                raise GraphcError("jax's process ended")
            return {"median": 1.0, "best": 0.5}

        def close(self):
            pass

    monkeypatch.setattr(rounds, "Worker", Scripted)
    peers = [PEERS["graphc"], PEERS["jax"], PEERS["onnxruntime"]]
    plan = Plan(rounds=3, burst=0.1, again=())
    ours, jax, ort = rounds.measure(Work("mlp", 4, "infer", 1), peers, plan)
    assert jax.note == "failed: jax's process ended" and jax.median == 0
    assert ours.median == ort.median == 1.0 and ort.ratio == 1.0 and ort.peak == 2


def test_a_process_that_ended_is_an_error(tmp_path):
    worker = Worker(PEERS["graphc"], Work("mlp", 4, "infer", 1), str(tmp_path))
    worker.close()
    with pytest.raises(GraphcError, match="graphc"):
        worker.ask(10.0, do="build")


def test_a_process_that_hangs_is_an_error(tmp_path):
    worker = Worker(PEERS["graphc"], Work("mlp", 4, "infer", 1), str(tmp_path))
    try:
        with pytest.raises(GraphcError, match="took longer"):
            worker.ask(0.01, do="build")
    finally:
        worker.close()


def test_libraries_are_not_held_back(tmp_path, monkeypatch):
    """What this environment sets for itself does not reach the peers; threads do."""
    started = {}

    def start(arguments, **options):
        started.update(options["env"])
        raise OSError("enough")

    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    monkeypatch.setenv("GRAPHC_VERIFY", "1")
    monkeypatch.setattr(rounds.subprocess, "Popen", start)
    with pytest.raises(OSError, match="enough"):
        Worker(PEERS["graphc"], Work("mlp", 4, "infer", 3), str(tmp_path))
    assert "OPENBLAS_CORETYPE" not in started and "GRAPHC_VERIFY" not in started
    assert started["OMP_NUM_THREADS"] == "3" and started["GRAPHC_CACHE_DIR"] == str(tmp_path)


def test_order_changes_and_everyone_has_a_turn():
    names = ["a", "b", "c"]
    orders = [rounds._order(names, number) for number in range(6)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names)


def test_results_are_compared():
    assert rounds.compare([[1.0, 2.0]], [[1.0, 2.0001]]) == ""
    assert "differ" in rounds.compare([[1.0, 2.0]], [[1.0, 2.1]])
    assert "differ" in rounds.compare([[float("nan")]], [[1.0]])
    assert "differ" in rounds.compare([[1.0]], [[1.0], [2.0]])


def test_ratios_are_taken_within_rounds():
    row = Row("m", 1, "infer", 1, "jax")
    # The machine is twice as slow in the second round: both are, so the ratio stays.
    rounds.summarise(row, [3.0, 6.0, 3.3], [1.0, 2.0, 1.1], flops=6 * 10**9, peak_gflops=4.0)
    assert row.ratio == pytest.approx(3.0) and row.median == 3.3
    assert row.ratio_low == pytest.approx(3.0) and row.ratio_high == pytest.approx(3.0)
    assert row.gflops == pytest.approx(6 / 3.3) and row.share == pytest.approx(6 / 3.3 / 4)


# ---- report


@pytest.fixture
def report() -> Report:
    ours = Row("lenet5", 1, "infer", 1, "graphc", median=1e-5, low=9e-6, high=2e-5, best=8e-6)
    ours.ratio, ours.gflops, ours.share, ours.cold, ours.warm = 1.0, 80.0, 0.8, 1.5, 0.1
    theirs = Row("lenet5", 1, "infer", 1, "onnxruntime", median=3e-5, low=2e-5, high=4e-5)
    theirs.ratio, theirs.ratio_low, theirs.ratio_high, theirs.rounds = 3.0, 2.5, 3.5, [3e-5]
    failed = Row("lenet5", 64, "train", 2, "jax", note="failed: GraphcError: no, thanks")
    machine = {
        "name": "CPU",
        "cores": 2,
        "lanes": 8,
        "threads": 1,
        "gflops": 100.0,
        "read": [[1000, 50.0]],
    }
    versions = {"graphc": "0.1", "onnxruntime": "1.32"}
    absent = {"openvino": "not installed: openvino"}
    return Report([ours, theirs, failed], {1: machine}, versions, absent, {"quick": True})


def test_report_as_text(report, capsys):
    report.show()
    for text in (capsys.readouterr().out, report.text()):
        assert "lenet5, batch 1, infer, 1 thread" in text and "3.00 (2.50-3.50)" in text
        assert "absent: OpenVINO (not installed: openvino)" in text and "no, thanks" in text
        assert "0.0100" in text and "80%" in text
    assert all(len(cells(row)) == len(COLUMNS) for row in report.rows)


def test_report_as_files(report, tmp_path):
    written = {p.name for p in report.save(tmp_path)}
    assert {"benchmark.json", "benchmark.csv", "benchmark.txt"} <= written
    document = json.loads((tmp_path / "benchmark.json").read_text())
    assert document["rows"][1]["rounds"] == [3e-5] and document["options"] == {"quick": True}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "benchmark.csv").read_text())))
    assert [r["peer"] for r in rows] == ["graphc", "onnxruntime", "jax"]
    assert float(rows[0]["median"]) == 1e-5 and rows[2]["note"].startswith("failed")
    assert all(r["machine"] == "CPU" and r["date"] == report.date for r in rows)


def test_report_as_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    names = [p.name for p in report.plot(tmp_path)]
    assert names == ["benchmark.png", "benchmark.svg"]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


# ---- command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "alexnet"], "no model 'alexnet'"),
        (["--peers", "tensorflow"], "no peer 'tensorflow'"),
        (["--threads", "4096"], "threads=4096"),
        (["--modes", "dream"], "'dream' is not one of"),
        (["--batches", "0"], "not a batch size"),
        (["--rounds", "0"], "rounds=0"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_command_end_to_end(tmp_path, capsys, monkeypatch):
    """graphc alone: builds cold, then warm, and its turns make a row."""
    kept = []

    class Watched(Graphc):
        def environment(self, folder):
            kept.append(len(list(Path(folder).glob("*.obj"))))
            return super().environment(folder)

    monkeypatch.setitem(PEERS, "graphc", Watched())
    arguments = "--models mlp --batches 4 --modes infer --threads 1 --rounds 2 --quick".split()
    assert bench.main([*arguments, "--peers", "graphc", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "mlp, batch 4, infer, 1 thread" in shown.out and "built in" in shown.err
    document = json.loads((tmp_path / "benchmark.json").read_text())
    peak = document["machines"]["1"]["gflops"]
    (fields,) = document["rows"]
    row = Row(**fields)
    assert row.peer == "graphc" and row.note == "" and len(row.rounds) == 2
    assert 0 < row.best <= row.median and row.low <= row.median <= row.high
    assert row.ratio == 1.0 and row.gflops > 0 and row.share == pytest.approx(row.gflops / peak)
    assert row.cold > 0 and row.warm is not None and row.warm > 0
    measured, cold, warm = kept
    assert measured == cold == 0 < warm
    assert row.peak >= row.imported > 10e6 and 0 < row.step < row.peak
