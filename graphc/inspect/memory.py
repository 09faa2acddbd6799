"""What the memory of an executable consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphc.inspect.kernels import no_kernels
from graphc.inspect.text import size_text
from graphc.inspect.work import stored_bytes
from graphc.ir import SOURCES

if TYPE_CHECKING:
    from graphc.runtime.executable import Executable


@dataclass(frozen=True)
class MemoryReport:
    """Memory of an executable in bytes; `print(report)` shows it.

    arena_bytes: what the plan needs for all activations and workspaces. lower_bound: the largest
    set of values alive at once; no plan for this order needs less. total_without_reuse: if every
    value had its own memory. parameter_bytes, prepared_bytes (what is computed from parameters
    alone), state_bytes (running statistics, optimizer), input_bytes, constant_bytes: outside the
    arena, for as long as the executable lives.
    plan: the `MemoryPlan`, with every value's offset and lifetime (`plan.lifetimes`).
    recomputed: what a step computes again for the sake of memory and the time that is predicted to
    take (`passes.rematerialize.Recomputation`), in large training graphs or under `memory_limit`;
    None if nothing.
    """

    arena_bytes: int
    lower_bound: int
    total_without_reuse: int
    parameter_bytes: int
    prepared_bytes: int
    state_bytes: int
    input_bytes: int
    constant_bytes: int
    plan: Any
    recomputed: Any = None

    @property
    def total_bytes(self) -> int:
        """All memory that the executable holds."""
        learned = self.parameter_bytes + self.prepared_bytes + self.state_bytes
        return self.arena_bytes + learned + self.input_bytes + self.constant_bytes

    def __str__(self) -> str:
        saved = 1 - self.arena_bytes / self.total_without_reuse if self.total_without_reuse else 0.0
        over = self.arena_bytes / self.lower_bound - 1 if self.lower_bound else 0.0
        lines = [
            f"activations   {size_text(self.arena_bytes):>10}  {100 * over:.1f}% above the bound, "
            f"{size_text(self.lower_bound)}; without reuse {size_text(self.total_without_reuse)} "
            f"({100 * saved:.0f}% saved)",
            f"parameters    {size_text(self.parameter_bytes):>10}",
            f"prepared      {size_text(self.prepared_bytes):>10}  computed from parameters alone",
            f"states        {size_text(self.state_bytes):>10}  running statistics, optimizer",
            f"inputs        {size_text(self.input_bytes):>10}",
            f"constants     {size_text(self.constant_bytes):>10}",
            f"in all        {size_text(self.total_bytes):>10}",
        ]
        if self.recomputed is not None:
            lines.append(f"recomputed    {self.recomputed}")
        if self.plan is not None and self.plan.lifetimes:
            lines += ["largest activations (offset, size, live from..to step):"]
            lines += self.plan.report(rows=12).splitlines()[1:]
        return "\n".join(lines)


def memory(executable: Executable) -> MemoryReport:
    """What the executable's memory consists of. Raises GraphcError for an interpreted one."""
    plan = executable.graph.annotations.get("memory")
    if plan is None:
        raise no_kernels(executable, "memory", "memory plan")
    held = dict.fromkeys((*SOURCES, "prepared"), 0)
    for node in executable.graph:
        kind = "prepared" if "prepared" in node.attrs else node.op
        if kind in held:
            held[kind] += sum(stored_bytes(value) for value in node.outputs)
    return MemoryReport(
        plan.arena_bytes,
        plan.lower_bound,
        plan.total_without_reuse,
        held["parameter"],
        held["prepared"],
        held["state"],
        held["input"],
        held["constant"],
        plan,
        executable.graph.annotations.get("recomputed"),
    )
