"""Everything about an executable as files in one folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphc import errors
from graphc.codegen.program import Launch
from graphc.collector import collector_paused
from graphc.inspect.explain import explain
from graphc.inspect.kernels import kernels, launched
from graphc.inspect.memory import memory
from graphc.inspect.rerun import runnable_source
from graphc.inspect.text import table
from graphc.ir import SOURCES, Graph, Value, root
from graphc.viz.draw import LARGE, scene
from graphc.viz.formats import to_dot
from graphc.viz.outline import Cells, Group, outline
from graphc.viz.report import page
from graphc.viz.report.data import ReportData

if TYPE_CHECKING:
    from graphc.runtime.executable import Executable


def dump(executable: Executable, folder: str | os.PathLike[str]) -> Path:
    """Write everything about an executable into a new folder, which appears whole or not at all.

    `index.html`: all of it as one page; `passes/NN_name.txt`, `.dot` and `.svg`: the graph as
    declared and after each pass; `passes.txt`: what they did; `explain.txt`; and of compiled
    executables `launches.txt`, `memory.txt` and `kernels/NN_name.py`, each of which runs by
    itself. If the executable was profiled: `profile.txt`, `profile.json` and `trace.json`.
    Raises GraphcError if the folder exists and holds something.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise errors.GraphcError(
            f"dump: {target} exists already: choose a folder that is new or empty"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with collector_paused():
            _write_dump(executable, unfinished)
        unfinished.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.rename(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def _write_dump(executable: Executable, folder: Path) -> None:
    passes = _Passes(executable, folder / "passes")
    if executable.replay is not None:
        executable.replay(passes.observe)
    (folder / "index.html").write_text(passes.page(), encoding="utf-8")
    _write(folder / "passes.txt", (f"{n:02d} {r}" for n, r in enumerate(passes.records)))
    _write(folder / "explain.txt", [explain(executable).rstrip()])
    if hasattr(executable, "steps"):
        _write_cuda(executable, folder)
    if not hasattr(executable, "launches"):
        return
    _write(folder / "memory.txt", [str(memory(executable))])
    _write(folder / "launches.txt", _launch_lines(executable))
    if executable.last_profile is not None:
        _write(folder / "profile.txt", [str(executable.last_profile)])
        _write(folder / "profile.json", [executable.last_profile.to_json()])
        executable.last_profile.chrome_trace(folder / "trace.json")
    (folder / "kernels").mkdir()
    for number, launch in enumerate(launched(executable)):
        path = folder / "kernels" / kernel_file(number, launch)
        path.write_text(runnable_source(launch), encoding="utf-8")


def _write_cuda(executable: Any, folder: Path) -> None:
    """Memory and kernels of a CUDA executable."""
    from graphc.inspect.cuda import sources

    _write(folder / "memory.txt", [str(memory(executable))])
    (folder / "kernels").mkdir()
    for number, (name, source) in enumerate(sources(executable)):
        path = folder / "kernels" / f"{number:02d}_{file_name(name)}.py"
        path.write_text(source, encoding="utf-8")


class _Passes:
    """Writes the graph after each pass, and collects the report on the way."""

    def __init__(self, executable: Executable, folder: Path) -> None:
        self.executable, self.folder = executable, folder
        self.records: list[Any] = []
        self._cells = Cells()
        self._data = ReportData(self._cells)
        self._tree: Group | None = None
        self._last = ("", folder)
        folder.mkdir()

    def observe(self, record: Any, graph: Graph) -> None:
        base = self.folder / f"{len(self.records):02d}_{file_name(record.name)}"
        text = graph_text(graph)
        same = text == self._last[0]  # a pass that changed nothing
        if same:
            for suffix in (".txt", ".dot", ".svg"):
                shutil.copyfile(self._last[1].with_suffix(suffix), base.with_suffix(suffix))
        else:
            self._write_graph(base, text, graph)
        self._last = text, base
        self._data.observe(record, graph, same)
        self.records.append(record)

    def _write_graph(self, base: Path, text: str, graph: Graph) -> None:
        tree = self._outline(graph)
        picture = scene(graph, tree, self._cells) if len(graph) > LARGE else scene(graph)
        base.with_suffix(".txt").write_text(text, encoding="utf-8")
        base.with_suffix(".dot").write_text(to_dot(graph), encoding="utf-8")
        base.with_suffix(".svg").write_text(picture.svg(), encoding="utf-8")

    def _outline(self, graph: Graph) -> Group:
        """One for all passes: what they leave alone stays where it is."""
        if self._tree is None:
            self._tree = outline([graph, self.executable.graph])
        return self._tree

    def page(self) -> str:
        return page(self._data.finish(self.executable, self._outline(self.executable.graph)))


def _write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def file_name(name: str) -> str:
    """A name as the name of a file on any system."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:60]


def kernel_file(number: int, launch: Launch) -> str:
    """The name of the dumped source of a launch."""
    return f"{number:02d}_{file_name(launch.node.name)}.py"


def graph_text(graph: Graph) -> str:
    """A graph as text, with the body of each fused node below the graph."""
    parts = [str(graph)]
    for node in graph:
        body = node.attrs.get("body")
        if isinstance(body, Graph):
            parts.append(f"{node.name}: {body}")
    return "\n\n".join(parts) + "\n"


def _launch_lines(executable: Executable) -> list[str]:
    """The launch table as text: kernel, who runs it, buffers with their places, numbers."""
    plan = executable.graph.annotations["memory"]
    rows: list[tuple[str, ...]] = []
    infos = kernels(executable)
    for number, (info, launch) in enumerate(zip(infos, launched(executable), strict=True)):
        buffers = [*launch.node.inputs, *launch.node.outputs]
        places = " ".join(place_text(v, plan) for v in buffers)
        alone = "thread 0" if info.parallel == 0 else "all"
        values = " ".join(map(str, launch.call.numbers))
        digest = Path(info.file).stem[:12]
        rows.append((f"{number:02d}", info.name, info.kind, digest, alone, places, values))
    head = ("row", "node", "kind", "digest", "threads", "buffers (name@offset)", "numbers")
    return table(head, rows, left=len(head))


def place_text(value: Value, plan: Any) -> str:
    """Where a value lies: `name@offset` in the arena, or what kind of memory of its own it has."""
    owner = root(value)
    offset = plan.offset(value)
    if offset is None:
        prepared = "prepared" if "prepared" in owner.node.attrs else "in-place"
        return f"{owner.name}@{owner.node.op if owner.node.op in SOURCES else prepared}"
    return f"{value.name}@{offset}"
