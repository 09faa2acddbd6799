"""The launches of a CUDA executable: what each computes, on how many threads, with what memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphc.codegen.cuda import Dimensions
from graphc.inspect.cuda_report import CAPABILITIES, StaticReport, report_step
from graphc.inspect.kernels import layers
from graphc.inspect.text import size_text
from graphc.inspect.work import kernel_bytes, kernel_flops
from graphc.viz.formats import fused_operators

if TYPE_CHECKING:
    from graphc.codegen.cuda_program import CudaStep
    from graphc.runtime.cuda import CudaExecutable


@dataclass(frozen=True)
class CudaKernelInfo:
    """One kernel of a step and its launches; most have one, split sums have two.

    name      of the region's node in the compiled graph
    kind      the operator that gives the kernel its structure (conv2d, matmul, sum, ...)
    phase     "forward", "backward" or "update"
    nodes     operators that the kernel computes, as "name: op"
    layer     the user's layer that gives the kernel its structure
    layers    all the user's layers it computes for, that one first
    files     readable source of each launch; equal kernels share one file
    grids     blocks of each launch's grid
    blocks    threads of each launch's blocks
    shared    dynamic shared memory of each launch, bytes
    workspace bytes of the arena that the launches share
    prepared  whether it depends on parameters alone and runs only when they are loaded
    flops, bytes  work of all launches together
    step      what computes it
    """

    name: str
    kind: str
    phase: str
    nodes: tuple[str, ...]
    layer: str
    layers: tuple[str, ...]
    files: tuple[str, ...]
    grids: tuple[Dimensions, ...]
    blocks: tuple[Dimensions, ...]
    shared: tuple[int, ...]
    workspace: int
    prepared: bool
    flops: int
    bytes: int
    step: CudaStep = field(repr=False)

    def reports(
        self, capabilities: Sequence[str] = CAPABILITIES
    ) -> dict[str, tuple[StaticReport, ...]]:
        """What NVIDIA's assembler says of each launch, by compute capability; no GPU is needed.

        Compiles what is not in the kernel cache, a few seconds a kernel. Raises MissingExtraError
        where the tools are not installed, CompileError."""
        return {capability: report_step(self.step, capability) for capability in capabilities}

    def __str__(self) -> str:
        when = "; runs when parameters are loaded" if self.prepared else ""
        extra = f"; workspace {size_text(self.workspace)}" if self.workspace else ""
        lines = [f"{self.name} ({self.kind}, {self.phase}): {', '.join(self.nodes)}"]
        for file, grid, block, shared in zip(self.files, self.grids, self.blocks, self.shared):
            dynamic = f", {size_text(shared)} of dynamic shared memory" if shared else ""
            lines.append(f"  {_text(grid)} blocks of {_text(block)} threads{dynamic}; {file}")
        lines.append(f"  {self.flops:,} operations, {size_text(self.bytes)}{extra}{when}")
        return "\n".join(lines)


def _text(sizes: Dimensions) -> str:
    return " x ".join(str(n) for n in sizes if n > 1) or "1"


def kernels(executable: CudaExecutable) -> list[CudaKernelInfo]:
    """One entry for each kernel of a step, in order."""
    found = []
    for step in executable.steps:
        node, launches = step.node, step.rendering.launches
        found.append(
            CudaKernelInfo(
                node.name,
                str(node.attrs.get("kind", node.op)),
                node.origin.phase or "forward",
                tuple(f"{n.name}: {n.op}" for n in fused_operators(node)),
                node.origin.layer,
                layers(node),
                executable.kernel_files[node.name],
                tuple(launch.grid for launch in launches),
                tuple(launch.block for launch in launches),
                tuple(launch.shared for launch in launches),
                step.rendering.workspace,
                "prepared" in node.attrs,
                kernel_flops(step.kernel),
                kernel_bytes(step.kernel, node),
                step,
            )
        )
    return found


def headline(executable: CudaExecutable) -> str:
    """What runs where, in a line."""
    launches = sum(len(step.rendering.launches) for step in executable.steps)
    files = {file for files in executable.kernel_files.values() for file in files}
    return (
        f"{executable.graph.name} on {executable.target} ({executable.device.name}): {launches} "
        f"launches of {len(files)} kernels"
    )


def sources(executable: CudaExecutable) -> Iterator[tuple[str, str]]:
    """(name, source) of every launch in order."""
    for step in executable.steps:
        for launch in step.rendering.launches:
            text = "".join(f"# {line}\n" for line in str(step.node.attrs["body"]).splitlines())
            yield step.node.name, f"{text}\n{launch.source}"
