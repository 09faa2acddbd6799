"""The launches of a CUDA executable: what each computes, on how many threads, with what memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphc.codegen.cuda import Dimensions
from graphc.inspect.cuda_report import CAPABILITIES, StaticReport, report_steps
from graphc.inspect.kernels import RegionInfo, region_fields
from graphc.inspect.text import size_text

if TYPE_CHECKING:
    from graphc.codegen.cuda_program import CudaStep
    from graphc.runtime.cuda import CudaExecutable


@dataclass(frozen=True)
class CudaKernelInfo(RegionInfo):
    """One kernel of a step and its launches; most have one, split sums have two.

    files     readable source of each launch; equal kernels share one file
    grids     blocks of each launch's grid
    blocks    threads of each launch's blocks
    shared    dynamic shared memory of each launch, bytes
    workspace bytes of the arena that the launches share
    step      what computes it
    """

    files: tuple[str, ...]
    grids: tuple[Dimensions, ...]
    blocks: tuple[Dimensions, ...]
    shared: tuple[int, ...]
    workspace: int
    step: CudaStep = field(repr=False)

    def reports(
        self, capabilities: Sequence[str] = CAPABILITIES
    ) -> dict[str, tuple[StaticReport, ...]]:
        """What NVIDIA's assembler says of each launch, by compute capability; no GPU is needed.

        Compiles what is not in the kernel cache, a few seconds a kernel. Raises MissingExtraError
        where the tools are not installed, CompileError."""
        return report_steps([self.step], capabilities)[0]

    def __str__(self) -> str:
        extra = f"; workspace {size_text(self.workspace)}" if self.workspace else ""
        lines = [self.heading()]
        for file, grid, block, shared in zip(self.files, self.grids, self.blocks, self.shared):
            dynamic = f", {size_text(shared)} of dynamic shared memory" if shared else ""
            lines.append(f"  {_text(grid)} blocks of {_text(block)} threads{dynamic}; {file}")
        lines.append(f"  {self.work()}{extra}{self.when()}")
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
                **region_fields(node, step.kernel),
                files=executable.kernel_files[node.name],
                grids=tuple(launch.grid for launch in launches),
                blocks=tuple(launch.block for launch in launches),
                shared=tuple(launch.shared for launch in launches),
                workspace=step.rendering.workspace,
                step=step,
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
