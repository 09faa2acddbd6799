"""The rows of an executable's launch table: what each kernel computes and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from graphc import errors
from graphc.codegen.kernel import Kernel
from graphc.codegen.program import Launch
from graphc.inspect.text import size_text
from graphc.inspect.work import kernel_bytes, kernel_flops
from graphc.ir import Node, strips
from graphc.viz.formats import fused_operators

if TYPE_CHECKING:
    from graphc.runtime.executable import Executable


@dataclass(frozen=True)
class RegionInfo:
    """What a compiled region computes and for whom, whichever the target.

    name      of the region's node in the compiled graph
    kind      the operator that gives the kernel its structure (conv2d, matmul, sum, ...)
    phase     "forward", "backward" or "update"
    nodes     operators that the kernel computes, as "name: op"
    layer     the user's layer that gives the kernel its structure
    layers    all the user's layers it computes for, that one first
    prepared  whether it depends on parameters alone and runs only when they are loaded
    flops, bytes  work of one run
    """

    name: str
    kind: str
    phase: str
    nodes: tuple[str, ...]
    layer: str
    layers: tuple[str, ...]
    prepared: bool
    flops: int
    bytes: int

    def heading(self) -> str:
        return f"{self.name} ({self.kind}, {self.phase}): {', '.join(self.nodes)}"

    def when(self) -> str:
        return "; runs when parameters are loaded" if self.prepared else ""

    def work(self) -> str:
        return f"{self.flops:,} operations, {size_text(self.bytes)}"


def region_fields(node: Node, kernel: Kernel) -> dict[str, Any]:
    """The fields of `RegionInfo`, by name."""
    return {
        "name": node.name,
        "kind": str(node.attrs.get("kind", node.op)),
        "phase": node.origin.phase or "forward",
        "nodes": tuple(f"{n.name}: {n.op}" for n in fused_operators(node)),
        "layer": node.origin.layer,
        "layers": _layers(node),
        "prepared": "prepared" in node.attrs,
        "flops": kernel_flops(kernel, node),
        "bytes": kernel_bytes(kernel, node),
    }


def _layers(node: Node) -> tuple[str, ...]:
    """The user's layers that a region computes for, the one that gives it its structure first."""
    converted = node.attrs.get("kind") == "convert_layout"  # its body has no origin of the user's
    nodes = [node] if converted else [node, *fused_operators(node)]
    return tuple(dict.fromkeys(n.origin.layer for n in nodes if n.origin.layer))


@dataclass(frozen=True)
class KernelInfo(RegionInfo):
    """One row of the launch table: a kernel and what it is launched for.

    file      readable source; equal kernels share one file
    loops     (loop, extent) of the loop nest, reductions included
    lane      the loop in SIMD lanes, None for scalar code
    tile      (loop, count): unrolled into registers
    order     outer loops as nested, outermost first
    parallel  how many of `order` are shared between the threads; 0: one thread runs it alone
    blocks    of the batch or strips of its images, where it runs through one after the other with
              its neighbours; 0: by itself
    """

    file: str
    loops: tuple[tuple[str, int], ...]
    lane: str | None
    tile: tuple[tuple[str, int], ...]
    order: tuple[str, ...]
    parallel: int
    blocks: int

    def __str__(self) -> str:
        extents = dict(self.loops)
        loops = " ".join(f"{n}:{e}" for n, e in self.loops) or "none"
        tile = " x ".join(f"{c} {n}" for n, c in self.tile) or "none"
        shared = " ".join(self.order[: self.parallel]) or "none (one thread)"
        if self.blocks:
            shared = f"{self.blocks} blocks, each with the kernels around it"
        lane = f"{self.lane} ({extents[self.lane]})" if self.lane else "none (scalar)"
        return (
            f"{self.heading()}\n"
            f"  loops {loops}\n"
            f"  lanes {lane}; register tile {tile}; order {' '.join(self.order) or '-'}; "
            f"shared by threads {shared}{self.when()}\n"
            f"  {self.work()}; {self.file}"
        )


def launched(executable: Executable) -> list[Launch]:
    """The launches that are rows of the table: those that compute something."""
    launches: list[Launch] = getattr(executable, "launches", [])
    return [launch for launch in launches if any(v.type.size for v in launch.node.outputs)]


_known: WeakKeyDictionary[Executable, list[KernelInfo]] = WeakKeyDictionary()


def kernels(executable: Executable) -> list[KernelInfo]:
    """One entry a launch, in order; empty for an interpreted executable."""
    if executable not in _known:
        _known[executable] = _kernels(executable)
    return list(_known[executable])


def _kernels(executable: Executable) -> list[KernelInfo]:
    paths: dict[str, str] = getattr(executable, "kernel_paths", {})
    found = []
    for launch in launched(executable):
        node, schedule = launch.node, launch.schedule
        found.append(
            KernelInfo(
                **region_fields(node, launch.kernel),
                file=paths.get(node.name, ""),
                loops=tuple((loop.name, loop.extent) for loop in launch.kernel.loops.values()),
                lane=schedule.lane,
                tile=tuple(schedule.tile),
                order=tuple(schedule.order),
                parallel=schedule.parallel,
                blocks=_blocks(launch),
            )
        )
    return found


def _blocks(launch: Launch) -> int:
    """Of a launch in a group: how often it runs."""
    if not launch.blocks or strips(launch.node) == 1:
        return launch.blocks
    return launch.kernel.trips(launch.schedule.order[: launch.schedule.parallel])


def no_kernels(executable: Executable, method: str, what: str = "kernels") -> errors.GraphcError:
    """The error of a method that needs what only compiled executables have."""
    return errors.GraphcError(
        f"{method}: target={executable.target!r} runs NumPy references and has no {what}: "
        "compile with target='cpu'"
    )
