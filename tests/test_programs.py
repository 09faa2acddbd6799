"""Programs on disk: what is loaded is what was compiled, and nothing else is ever loaded."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphc as gc
from graphc import compiler
from graphc.codegen.cpu import render
from graphc.codegen.program import lower_node
from graphc.codegen.schedule import rank_schedules
from graphc.inspect.dump import graph_text
from graphc.ir import Graph
from graphc.ops import registry
from graphc.runtime import programs
from graphc.runtime.cache import default_cache

ROOT = Path(__file__).resolve().parents[1]
TRAINING: dict[str, Any] = {
    "outputs": ["loss"],
    "dims": {"N": 6},
    "loss": "loss",
    "optimizer": gc.optim.SGD(0.1, momentum=0.9),
    "threads": 1,
}


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are kept: this run's other tests have passes verified, which they then have to be
    run for."""
    monkeypatch.delenv("GRAPHC_VERIFY", raising=False)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of each graph that passes are run for."""
    found: list[str] = []
    original = compiler.transform

    def counted(graph: Graph, *arguments: Any) -> Any:
        found.append(graph.name)
        return original(graph, *arguments)

    monkeypatch.setattr(compiler, "transform", counted)
    return found


def network(
    name: str, init: Any = None, scale: float = 2.0, layer: str = "head", slope: float = 0.25
) -> Graph:
    """A small network with what programs have: parameters, a constant, several kernels."""
    g = Graph(name)
    x = g.input("x", ("N", 5))
    label = g.input("label", ("N",), "int32")
    with g.layer(layer):
        y = x @ g.parameter("weight", (5, 4), init=init)
    y = gc.leaky_relu(y * g.constant(np.full((4,), scale)), slope)
    g.output(logits=y, loss=gc.softmax_cross_entropy(y, label))
    return g


def data(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((6, 5)).astype(np.float32),
        "label": rng.integers(0, 4, 6).astype(np.int32),
    }


def everything(executable: Any) -> list[Any]:
    """All that can be seen of an executable."""
    losses = [executable(**data(seed))["loss"].item() for seed in range(3)]
    state = {name: array.tolist() for name, array in executable.state(optimizer=True).items()}
    launches = [
        (la.node.name, la.schedule, la.call, la.blocks, la.kernel.loops)
        for la in executable.launches
    ]
    return [
        graph_text(executable.graph),
        [node.origin for node in executable.graph],
        executable.records,
        str(executable.memory()),
        executable.explain(),
        [str(info) for info in executable.kernels()],
        launches,
        losses,
        state,
    ]


def key(graph: Graph, **changes: Any) -> str | None:
    options = {**TRAINING, "seed": 0, **changes}
    return programs.ProgramFile(graph, graph.nodes[0].origin, options).key


def file_of(graph: Graph) -> Path:
    """The one program in the cache that is newest."""
    folder = default_cache().folder
    assert folder is not None
    return max(folder.glob("*.program"), key=lambda path: path.stat().st_mtime_ns)


# ---- what is loaded


def test_a_loaded_program_is_the_compiled_one(runs: list[str], tmp_path: Path) -> None:
    graph = network("same")
    compiled, loaded = (gc.compile(graph, **TRAINING) for _ in range(2))
    assert runs == ["same"]
    assert everything(loaded) == everything(compiled)
    assert loaded.profile(data(), runs=2).launches
    loaded.dump(tmp_path / "dump")  # runs the passes again
    last = sorted((tmp_path / "dump" / "passes").glob("*.txt"))[-1]
    assert last.read_text() == graph_text(compiled.graph)


def test_a_checked_program_and_an_inference_program_are_kept(runs: list[str]) -> None:
    for options in ({"check": True}, {"loss": None, "optimizer": None, "outputs": ["logits"]}):
        graph = network("options")
        first, second = (gc.compile(graph, **{**TRAINING, **options}) for _ in range(2))
        arrays = {name: array for name, array in data().items() if name in first.inputs}
        for name, array in first(**arrays).items():
            np.testing.assert_array_equal(second(**arrays)[name], array)
    assert runs == ["options"] * 2


def test_source_lines_are_those_of_the_declaration(runs: list[str]) -> None:
    """Moving a graph in its file keeps its program, but errors name the new line."""
    source = Path(__file__).read_text().split("def network(")[1].split("\ndef ")[0]

    def declared(lines: int, file: str) -> Graph:
        names = dict(globals())
        exec(compile("\n" * lines + "def network(" + source, file, "exec"), names)
        graph: Graph = names["network"]("moved")
        return graph

    old = gc.compile(declared(1, "old.py"), **TRAINING)
    new = gc.compile(declared(30, "new.py"), **TRAINING)
    assert runs == ["moved"]
    lines = {
        (a.name, b.origin.line - a.origin.line, b.origin.file)
        for a, b in zip(old.graph, new.graph, strict=True)
        if a.origin.file == "old.py"
    }
    assert lines
    assert {(line, file) for _, line, file in lines} == {(29, "new.py")}
    assert [n.origin.layer for n in old.graph] == [n.origin.layer for n in new.graph]


def test_parameters_start_from_what_was_declared(runs: list[str]) -> None:
    class Ramp:
        """An initialiser that is nobody's but this test's: it cannot be written down."""

        def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            return np.arange(20.0).reshape(shape)

    first = np.ones((5, 4), np.float32)
    for init, expected in (
        (first, first),
        (2 * first, 2 * first),
        (3.0, 3 * first),
        (Ramp(), None),
    ):
        step = gc.compile(network("start", init), **TRAINING)
        expected = np.arange(20).reshape(5, 4) if expected is None else expected
        np.testing.assert_array_equal(step.state()["weight"], expected)
    assert runs == ["start"]


def test_two_processes_keep_one_program(runs: list[str]) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from test_programs import *
print(gc.compile(network("shared"), **TRAINING)(**data())["loss"].item())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, "PYTHONHASHSEED": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    losses = [float(process.communicate(timeout=300)[0]) for process in processes]
    step = gc.compile(network("shared"), **TRAINING)
    assert runs == []
    assert losses == [step(**data())["loss"].item()] * 2


# ---- what is not loaded


def test_every_option_and_all_of_the_graph_count(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [
        network("key"),
        network("other"),
        network("key", scale=3.0),
        network("key", layer="tail"),
        network("key", slope=0.5),
    ]
    options: list[dict[str, Any]] = [
        {"outputs": ["logits"]},
        {"dims": {"N": 7}},
        {"gradients": ["weight"]},
        {"optimizer": gc.optim.SGD(0.1, momentum=0.8)},
        {"optimizer": None},
        {"cores": 2},
        {"limit": 1000},
        {"precision": "strict"},
        {"mode": "infer"},
        {"check": True},
        {"seed": 1},
    ]
    keys = [*map(key, graphs), *(key(graphs[0], **change) for change in options)]
    monkeypatch.setattr(programs, "_graphc_digest", lambda: "another version")
    keys.append(key(graphs[0]))
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key(network("key", init=1.0)) == key(network("key", init=np.ones((5, 4))))


def test_the_seed_counts_where_something_is_drawn(runs: list[str]) -> None:
    graph, dropout = network("once", gc.nn.init.normal()), network("seeds")
    dropout.output(y=gc.dropout(dropout.outputs["logits"], 0.5))
    options = {**TRAINING, "mode": "infer"}
    states = [gc.compile(graph, seed=seed, **options).state()["weight"] for seed in (0, 1)]
    for seed in (0, 1):
        gc.compile(dropout, seed=seed, **options)
    assert runs == ["once", "seeds", "seeds"]
    assert not np.array_equal(*states)


def test_version_is_the_text_of_graphc() -> None:
    """A file of graphc or of the passes that changes, comes or goes changes the digest."""
    texts = [path for name in ("graphc", "passes") for path in (ROOT / name).rglob("*.py")]
    assert ROOT / "passes" / "fuse.py" in texts
    digest = programs._digest_of(texts)
    assert digest == programs._digest_of(reversed(texts)) == programs._graphc_digest()
    assert digest != programs._digest_of(texts[1:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        lambda whole: whole + b"x",
    ],
    ids=["short", "half", "empty", "bit", "long"],
)
def test_a_damaged_file_is_made_again(
    damage: Callable[[bytes], bytes], runs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    graph = network("damaged")
    before = gc.compile(graph, **TRAINING)(**data())["loss"]
    path = file_of(graph)
    runs.clear()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, "graphc.cache"):
        assert gc.compile(graph, **TRAINING)(**data())["loss"] == before
    assert "damaged" in caplog.text
    gc.compile(graph, **TRAINING)
    assert runs == ["damaged"]


def test_a_file_that_pickle_refuses_is_made_again(
    runs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    graph = network("refused")
    gc.compile(graph, **TRAINING)
    name = file_of(graph).stem
    for content in (b"not a pickle", pickle.dumps([("", "", 99)]), pickle.dumps([]) + b"."):
        default_cache().put_program(name, content)
        with caplog.at_level(logging.WARNING, "graphc.cache"):
            gc.compile(graph, **TRAINING)
    assert caplog.text.count("made again") == 3
    assert runs == ["refused"] * 4


@pytest.mark.skipif(os.name != "posix", reason="POSIX ownership")
def test_a_file_that_others_can_write_is_refused() -> None:
    graph = network("foreign")
    gc.compile(graph, **TRAINING)
    path = file_of(graph)
    path.chmod(0o666)
    with pytest.raises(gc.errors.CacheError, match="written by others"):
        gc.compile(graph, **TRAINING)
    path.unlink()


def test_foreign_code_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(gc.optim.SGD):
        pass

    assert key(network("foreign"), optimizer=Own()) is None
    graph = network("foreign")
    graph.nodes[-1].attrs["note"] = object()
    assert key(graph) is None
    relu = registry.get("relu")
    monkeypatch.setitem(registry._REGISTRY, "own", relu)
    assert key(network("foreign")) is not None
    graph = network("foreign")
    graph.nodes[-1].op = "own"
    assert key(graph) is None
    monkeypatch.setitem(registry._REGISTRY, "relu", dataclasses.replace(relu))
    assert key(network("foreign")) is None


def test_who_wants_to_see_passes_sees_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert key(network("seen"))
    with caplog.at_level(logging.INFO, "graphc.fusion"):
        assert key(network("seen")) is None
    with caplog.at_level(logging.INFO):  # of the user's whole program
        assert key(network("seen"))
    monkeypatch.setenv("GRAPHC_VERIFY", "1")
    assert key(network("seen")) is None
    monkeypatch.delenv("GRAPHC_VERIFY")
    monkeypatch.setenv("GRAPHC_CACHE", "0")
    assert key(network("seen")) is None


def test_own_passes_run(runs: list[str]) -> None:
    for _ in range(2):
        gc.compile(network("own"), **TRAINING, pipeline=gc.default_pipeline())
    assert runs == ["own"] * 2


# ---- graphs and kernels as bytes


def test_graphs_of_any_depth_are_written_down() -> None:
    g = Graph("deep")
    value = g.input("x", (3,))
    for _ in range(3000):
        value = gc.relu(value)
    g.output(y=value)
    again = pickle.loads(pickle.dumps(g))
    assert str(again) == str(g) and again == g
    assert pickle.loads(pickle.dumps(value)).node.name == value.node.name


def test_a_kernel_that_was_written_down_gives_the_same_source() -> None:
    step = gc.compile(network("kernels"), **TRAINING)
    for launch in step.launches:
        kernel = pickle.loads(pickle.dumps(lower_node(launch.node)))
        (schedule,) = rank_schedules(kernel, 8, 2)
        expected = lower_node(launch.node).copy()
        (same,) = rank_schedules(expected, 8, 2)
        assert schedule == same
        assert render(kernel, schedule, 8) == render(expected, same, 8)


def test_a_deeper_network_of_the_family_needs_no_new_kernels(monkeypatch):
    """Counted from their sources, before any is compiled."""

    class Counted(Exception):
        pass

    wanted: list[set[str]] = []

    def load(sources, progress):
        wanted.append({source.source for source in sources})
        raise Counted

    monkeypatch.setattr("graphc.runtime.cpu.load_kernels", load)
    for network in (gc.zoo.resnet20, gc.zoo.resnet32):
        with pytest.raises(Counted):
            gc.compile(
                network(),
                outputs=["loss"],
                dims={"N": 16},
                loss="loss",
                optimizer=gc.optim.SGD(0.1, momentum=0.9),
                threads=2,
            )
    assert len(wanted[0]) > 50 and not wanted[1] - wanted[0]
