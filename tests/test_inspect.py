"""What executables tell about themselves: kernels, memory, explanations, dumps, profiles."""

from __future__ import annotations

import ast
import json
import logging
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import graphc as gc
from graphc import logs
from graphc.bench import machine
from graphc.bench.machine import Machine, cache_sizes, machine_limits
from graphc.codegen.kernel import Kernel, Loop
from graphc.errors import GraphcError, InputError
from graphc.inspect import dump, explain
from graphc.inspect.recomputed import recomputed
from graphc.inspect.work import contraction_flops, kernel_flops, points
from graphc.ir import SOURCES

BATCH = 16


def network() -> gc.Graph:
    """A convolution with its epilogue, a pool, a linear layer and a loss."""
    g = gc.Graph("small")
    image = g.input("image", ("N", 2, 8, 8))
    label = g.input("label", ("N",), dtype="int32")
    h = gc.max_pool2d(gc.relu(gc.nn.conv2d(image, 4, 3, padding=1, name="conv")), 2)
    logits = gc.nn.linear(gc.flatten(h), 5, name="fc")
    g.output(logits=logits, loss=gc.softmax_cross_entropy(logits, label))
    return g


def feeds(batch: int = BATCH) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch, 2, 8, 8)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, 5, batch).astype(np.int32)}


@pytest.fixture(scope="module")
def step():
    """A training step on two threads."""
    return gc.compile(
        network(),
        outputs=["loss"],
        dims={"N": BATCH},
        loss="loss",
        optimizer=gc.optim.SGD(0.1, momentum=0.9),
        threads=2,
    )


@pytest.fixture(scope="module")
def interpreted():
    return gc.compile(network(), outputs=["logits"], dims={"N": 2}, target="interpret")


def product(rows: int, inner: int, columns: int):
    g = gc.Graph("product")
    x, w = g.input("x", (rows, inner)), g.input("w", (inner, columns))
    g.output(y=gc.matmul(x, w))
    return gc.compile(g, outputs=["y"], threads=1)


# ---- kernels and their work


def test_one_entry_a_launch(step):
    infos = step.kernels()
    assert [i.name for i in infos] == [launch.node.name for launch in step.launches]
    assert all(i.file and i.loops is not None and i.bytes > 0 for i in infos)
    assert {"forward", "backward", "update"} == {i.phase for i in infos}
    conv = next(i for i in infos if i.kind == "conv2d")
    assert "conv" in conv.layers and any(n.endswith(": relu") for n in conv.nodes)
    assert all(name in dict(conv.loops) for name in (*conv.order, *dict(conv.tile)))
    assert conv.name in str(conv) and "register tile" in str(conv)


def test_every_operator_is_in_one_kernel(step):
    named = [n.split(": ")[0] for i in step.kernels() for n in i.nodes]
    bodies = [n for node in step.graph if node.op == "fused" for n in node.attrs["body"]]
    assert sorted(named) == sorted(n.name for n in bodies if n.op not in SOURCES)


@pytest.mark.parametrize("rows, inner, columns", [(8, 12, 16), (7, 17, 5), (1, 7, 1)])
def test_work_of_a_product_is_exact(rows, inner, columns):
    """Also where vectors and tiles do not divide the sizes."""
    (info,) = product(rows, inner, columns).kernels()
    assert info.flops == 2 * rows * inner * columns
    assert info.bytes == 4 * (rows * inner + inner * columns + rows * columns)


def test_operations_outside_the_image_do_not_count():
    g = gc.Graph("padded")
    x = g.input("x", (1, 1, 5, 5))
    w = g.input("w", (1, 1, 3, 3))
    g.output(y=gc.conv2d(x, w, padding=1))
    exe = gc.compile(
        g, outputs=["y"], threads=1, pipeline=gc.default_pipeline().without("explicit_padding")
    )
    conv = next(launch for launch in exe.launches if launch.node.attrs["kind"] == "conv2d")
    # Of 5 * 5 * 3 * 3 taps, those of the outer columns and rows fall on (3 * 5 - 2) ** 2 elements.
    assert kernel_flops(conv.kernel, conv.node) == 2 * (3 * 5 - 2) ** 2


@pytest.mark.parametrize("images", [1, 3])
def test_blocks_in_scratch_memory_count_each(images):
    """Values of a group lie at the same addresses for every image."""
    g = gc.Graph("group")
    h = g.input("x", ("N", 8, 12, 12))
    for name in ("one", "two", "three"):
        h = gc.relu(gc.nn.conv2d(h, 8, 3, padding=1, bias=False, name=name))
    g.output(y=h)
    exe = gc.compile(g, outputs=["y"], dims={"N": images}, threads=1, precision="strict")
    scratch = any(v.layout.copies for row in exe.launches for v in row.node.outputs)
    assert scratch == (images > 1)
    work = {i.name: i for i in exe.kernels() if i.kind == "conv2d"}
    assert len(work) == 3
    for info in work.values():
        least = 2 * images * 8 * 8 * 9 * 12 * 12
        assert least <= info.flops <= least + 2 * images * 8 * 12 * 12
        assert info.bytes >= 4 * images * 8 * (12 + 2) * 12


def test_the_last_block_counts_as_it_is():
    loops = {"b": Loop("b", 3), "l": Loop("l", 8, "b", 17), "i": Loop("i", 5)}
    kernel = Kernel("k", loops, ("b", "l"), (), ())
    assert points(kernel, ("b", "l")) == 17
    assert points(kernel, ("b", "l", "i")) == 85
    assert points(kernel, ("b",)) == 3 and points(kernel, ()) == 1


def test_work_of_a_graph_is_that_of_its_contractions():
    bound = network().bind({"N": 3})
    assert contraction_flops(bound) == 3 * 2 * (4 * 2 * 9 * 64 + 64 * 5)


# ---- memory


def test_memory_adds_up(step):
    report = step.memory()
    assert report.arena_bytes == step.plan.arena_bytes >= report.lower_bound > 0
    assert report.total_without_reuse >= report.arena_bytes
    parameters = sum(p.types[0].nbytes for p in step.graph.parameters.values())
    assert report.parameter_bytes >= parameters
    assert report.state_bytes == report.parameter_bytes  # one momentum for each
    outside = report.parameter_bytes + report.prepared_bytes + report.state_bytes
    outside += report.input_bytes + report.constant_bytes
    assert report.total_bytes == report.arena_bytes + outside
    text = str(report)
    assert "above the bound" in text and "parameters" in text and "live" in text


# ---- explain


def test_explain_names_choices_and_reasons(step):
    text = step.explain()
    layouts = step.graph.annotations["layouts"]
    assert f"chosen: {explain.mode_text(layouts[0])}" in text
    for (producer, consumer), reason in explain.kept_apart(step.graph).items():
        assert f"{producer} -> {consumer}: {reason}" in text
    for node in step.graph:
        if node.attrs.get("kind") == "convert_layout":
            assert f"{node.name}: {node.inputs[0].name}" in text
    assert "register tile" in text and "differentiate" in text and "Convolution algorithms" in text


def test_every_pair_of_neighbours_has_a_reason(step):
    """Whatever reads another kernel's memory, directly or through a reshape, says why."""
    pairs = explain.kept_apart(step.graph)
    for node in step.graph:
        for value in node.inputs if node.op == "fused" else ():
            while value.node.op == "reshape":
                value = value.node.inputs[0]
            if value.node.op == "fused":
                assert pairs[value.node.name, node.name]
    assert not any("not tried" in reason for reason in pairs.values())
    recorded = set(step.graph.annotations["not_fused"].values())
    assert len([r for r in pairs.values() if r in recorded]) >= 3


def test_explain_says_what_is_computed_again():
    """A batch norm's normalised values, which forward and backward kernels need, and no others."""
    g = gc.Graph("twice")
    x, label = g.input("x", ("N", 4, 8, 8)), g.input("label", ("N",), dtype="int32")
    h = gc.nn.conv2d(x, 8, 3, padding=1, bias=False, name="conv")
    h = gc.relu(gc.nn.batch_norm2d(h, name="bn"), name="relu")
    logits = gc.nn.linear(gc.flatten(gc.global_avg_pool2d(h)), 3, name="fc")
    g.output(loss=gc.softmax_cross_entropy(logits, label))
    exe = gc.compile(
        g, outputs=["loss"], dims={"N": 16}, loss="loss", optimizer=gc.optim.SGD(0.1), threads=1
    )
    again, kernels = recomputed(exe.graph), {info.name: info for info in exe.kernels()}
    assert again
    for name, where in again.items():
        assert len(set(where)) == len(where) > 1
        op = next(o for o in kernels[where[0]].nodes if o.startswith(f"{name}: ")).split(": ")[1]
        assert all(any(o.endswith(f": {op}") for o in kernels[k].nodes) for k in where)
        assert f"{name}: by {', '.join(where)}" in exe.explain()


def test_only_equal_values_are_computed_again():
    """Two kernels of one operator that read different values, or differ in an attribute."""
    g = gc.Graph("values")
    x, y = g.input("x", (16,)), g.input("y", (16,))
    shared = gc.exp(x, name="shared")
    kept = gc.sum(shared) + gc.sum(gc.exp(y, name="other"))
    g.output(kept=kept, low=gc.clip(x, 0, 1, name="low"), high=gc.clip(x, 0, 2, name="high"))
    pipeline = gc.default_pipeline().with_options("fuse", enabled=False)
    exe = gc.compile(g, outputs=["kept", "low", "high"], threads=1, pipeline=pipeline)
    assert recomputed(exe.graph) == {}


def test_algorithms_are_listed_with_predicted_times():
    g = gc.Graph("choice")
    x = g.input("x", ("N", 16, 12, 12))
    g.output(y=gc.nn.conv2d(x, 32, 3, padding=1, name="conv"))
    exe = gc.compile(g, outputs=["y"], dims={"N": 8}, threads=1)
    (name, (chosen, predicted)) = next(iter(explain.convolution_choices(exe).items()))
    assert name == "conv" and chosen in predicted and "direct" in predicted
    gflops = machine_limits(1).gflops
    costs = exe.graph.annotations["convolutions"]["conv"]
    assert predicted == {a: pytest.approx(2e-9 * c / gflops) for a, c in costs.items()}
    assert f"conv: {chosen}; predicted" in exe.explain()


def test_explain_lists_conversions():
    g = gc.Graph("convert")
    x = g.input("x", ("N", 3, 8, 8))
    g.output(y=gc.nn.conv2d(gc.relu(gc.nn.conv2d(x, 8, 3, name="a")), 8, 3, name="b"))
    exe = gc.compile(g, outputs=["y"], dims={"N": 16}, threads=1)
    converted = [n for n in exe.graph if n.attrs.get("kind") == "convert_layout"]
    assert converted, "the output is row-major, the convolutions are not"
    assert "output 'y' is handed out in rows" in exe.explain()


# ---- dump


def test_dump_holds_everything(step, tmp_path):
    folder = step.dump(tmp_path / "new" / "dump")
    texts = sorted((folder / "passes").glob("*.txt"))
    # As declared and with its sizes bound come first.
    assert len(texts) == len(step.records) + 2
    for suffix in ("dot", "svg"):
        assert len(texts) == len(list((folder / "passes").glob(f"*.{suffix}")))
    for picture in (folder / "passes").glob("*.svg"):
        ElementTree.fromstring(picture.read_text())
    assert [t.name for t in texts[:2]] == ["00_declared.txt", "01_bind.txt"]
    assert [t.stem[3:] for t in texts[2:]] == [r.name for r in step.records]
    assert texts[-1].read_text() == dump.graph_text(step.graph)
    files = "index.html passes.txt explain.txt memory.txt launches.txt".split()
    if step.last_profile is not None:
        files += ["profile.txt", "profile.json", "trace.json"]
    assert {p.name for p in folder.iterdir()} == {"passes", "kernels", *files}
    kernels = sorted((folder / "kernels").glob("*.py"))
    assert len(kernels) == len(step.kernels())
    for path in kernels:
        tree = ast.parse(path.read_text())
        assert any(isinstance(n, ast.FunctionDef) and n.name == "kernel" for n in tree.body)
    launches = (folder / "launches.txt").read_text()
    assert all(info.name in launches for info in step.kernels())


def test_dumped_kernels_run_by_themselves(step, tmp_path):
    folder = step.dump(tmp_path / "dump")
    conv = next(i for i, info in enumerate(step.kernels()) if info.kind == "conv2d")
    (path,) = (folder / "kernels").glob(f"{conv:02d}_*.py")
    result = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert path.stem in result.stdout and "GFLOP/s" in result.stdout


def test_dump_is_of_the_graph_that_was_compiled(tmp_path):
    g = network()
    exe = gc.compile(g, outputs=["logits"], dims={"N": 2}, target="interpret")
    g.output(more=gc.relu(g.outputs["logits"], name="added_later"))
    folder = exe.dump(tmp_path / "dump")
    assert not any("added_later" in p.read_text() for p in (folder / "passes").glob("*.txt"))


def test_dump_refuses_a_folder_with_something_in_it(interpreted, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(GraphcError, match="exists already"):
        interpreted.dump(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (interpreted.dump(empty) / "passes.txt").exists()


def test_a_failed_dump_leaves_nothing(step, tmp_path, monkeypatch):
    def fail(executable):
        raise OSError("no space")

    monkeypatch.setattr(dump, "memory", fail)
    with pytest.raises(OSError, match="no space"):
        step.dump(tmp_path / "dump")
    assert not list(tmp_path.iterdir())


# ---- profile


def test_profile_times_every_launch_and_leaves_the_state_alone(step):
    before = step.state(optimizer=True)
    profile = step.profile(**feeds(), runs=5)
    after = step.state(optimizer=True)
    assert all(np.array_equal(before[n], after[n]) for n in before)
    every = [i for i in step.kernels() if not i.prepared]
    assert [row.name for row in profile.launches] == [i.name for i in every]
    assert all(row.seconds >= 0 and 0 <= row.balance <= 1 for row in profile.launches)
    roofs = ("arithmetic", "L1", "L2", "L3", "memory")
    assert all(row.share >= 0 and row.roof in roofs for row in profile.launches)
    assert math.isclose(profile.seconds + profile.barriers, profile.timed)
    assert 0 <= profile.waiting < profile.seconds
    by_layer = [s for phases in profile.layers().values() for s in phases.values()]
    assert math.isclose(sum(by_layer), profile.seconds)
    assert {"conv", "fc"} <= set(profile.layers())
    assert step.last_profile is profile
    assert profile.flops == sum(i.flops for i in every) > 0
    assert 0 < profile.step and profile.seconds > 0 and profile.runs == 5
    assert math.isclose(sum(profile.phases().values()), profile.seconds)
    assert set(profile.phases()) == {"forward", "backward", "update"}
    kinds = profile.kinds()
    assert {kind: totals["launches"] for kind, totals in kinds.items()} == Counter(
        i.kind for i in every
    )
    seconds = [totals["seconds"] for totals in kinds.values()]
    assert seconds == sorted(seconds, reverse=True) and math.isclose(sum(seconds), profile.seconds)
    best = sum(row.share * row.seconds for row in profile.launches)
    assert math.isclose(sum(totals["best"] for totals in kinds.values()), best)
    text = str(profile)
    assert all(row.name[:20] in text for row in profile.launches) and "of the measured" in text


def test_profile_as_json_and_trace(step, tmp_path):
    profile = step.profile(feeds(), runs=3)
    document = json.loads(profile.to_json())
    assert len(document["launches"]) == len(profile.launches)
    assert document["machine"]["gflops"] > 0 and document["launches"][0]["gflops"] >= 0
    profile.chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    boxes = [e for e in events if e["ph"] == "X"]
    assert len(boxes) == 2 * len(profile.launches) and {e["tid"] for e in boxes} == {0, 1}
    for thread in (0, 1):
        ends = 0.0
        for box in (e for e in boxes if e["tid"] == thread):
            assert box["ts"] >= ends - 1e-3  # boxes of a thread follow each other
            ends = box["ts"] + box["dur"]


def test_profile_checks_its_inputs(step):
    with pytest.raises(InputError, match="'label'"):
        step.profile(image=feeds()["image"])
    with pytest.raises(GraphcError, match="runs=0"):
        step.profile(feeds(), runs=0)


def test_profile_needs_kernels():
    g = gc.Graph("empty")
    g.output(y=g.input("x", (3,)))
    exe = gc.compile(g, outputs=["y"], threads=1)
    with pytest.raises(GraphcError, match="no kernels"):
        exe.profile(x=np.zeros(3, np.float32))
    assert exe.kernels() == [] and exe.memory().arena_bytes == 0


# ---- interpreted executables


def test_interpreted_executables_say_what_they_lack(interpreted, tmp_path):
    assert interpreted.kernels() == []
    for method in (interpreted.memory, lambda: interpreted.profile(**feeds(2))):
        with pytest.raises(GraphcError, match="target='cpu'"):
            method()
    assert "NumPy reference" in interpreted.explain()
    folder = interpreted.dump(tmp_path / "dump")
    names = {p.name for p in folder.iterdir()}
    assert names == {"index.html", "passes", "passes.txt", "explain.txt"}


# ---- the machine's limits


def test_roofline():
    limits = Machine(
        "test", 4, 2, 8, 100.0, ((1000, 50.0), (10**6, 20.0), (10**8, 5.0), (10**9, 5.0))
    )
    assert limits.bandwidth(1000) == 50 and limits.bandwidth(1001) == 20
    assert limits.bandwidth(10**12) == 5
    assert limits.seconds(200e9, 1) == pytest.approx(2.0)
    assert limits.seconds(1, 10e9) == pytest.approx(2.0)
    assert limits.seconds(1, 10e9, together=500) == pytest.approx(0.2)
    assert limits.roof(200e9, 1) == "arithmetic" and limits.roof(1, 10e9) == "memory"
    assert limits.roof(1, 900) == "L1" and limits.roof(1, 10**7) == "L3"
    assert "100 GFLOP/s" in str(limits)


def test_limits_are_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_known", {})
    limits = machine_limits(1)
    assert limits.gflops > 1 and len(limits.read) == 4
    assert all(speed > 0.1 for _, speed in limits.read)
    monkeypatch.setattr(machine, "_known", {})  # as in the next process
    monkeypatch.setattr(machine, "measure_machine", None)
    assert machine_limits(1) == limits
    (file,) = (tmp_path / "cache").glob("*.note")
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(machine, "_known", {})
    monkeypatch.setattr(machine, "measure_machine", lambda threads: replace(limits, gflops=1.0))
    assert machine_limits(1).gflops == 1.0
    # A kernel was faster: the machine was busy then.
    monkeypatch.setattr(machine, "measure_machine", lambda threads: limits)
    assert machine_limits(1, again=True).gflops == limits.gflops
    assert machine_limits(1) == limits


def test_cache_sizes_grow():
    first, second, third = cache_sizes()
    assert 1 << 13 <= first < second < third


# ---- logging


def test_log_topics(capfd, caplog, monkeypatch):
    for topic in logs.TOPICS:
        monkeypatch.setattr(logging.getLogger(f"graphc.{topic}"), "handlers", [])
    try:
        logs.configure("passes, fusion,memory,nonsense")
        product(8, 12, 16)
        written = capfd.readouterr().err
        assert "graphc.passes: fuse: " in written and "nodes, " in written
        assert "graphc.memory: product: planned" in written
        assert "graphc.cache" not in written and "graphc.kernels" not in written
        assert "GRAPHC_LOG has nonsense" in caplog.text
    finally:
        for topic in logs.TOPICS:
            logging.getLogger(f"graphc.{topic}").setLevel(logging.NOTSET)


def test_the_environment_chooses_log_topics():
    code = (
        "import graphc as gc\ng = gc.Graph('g')\n"
        "g.output(y=gc.relu(g.input('x', (4,))))\ngc.compile(g, outputs=['y'], threads=1)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GRAPHC_LOG": "kernels,cache"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "graphc.cache: " in result.stderr and "graphc.kernels: relu" in result.stderr
    assert "graphc.passes" not in result.stderr
