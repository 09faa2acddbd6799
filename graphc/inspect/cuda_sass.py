"""Instructions of a CUDA kernel, as `nvdisasm` lists them: its loops, and what the hot one does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_WARP = 32


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: the name with its modifiers ("LDG.E.128") and the rest."""

    name: str
    operands: str

    @property
    def kind(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]


_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
)
_TARGET = re.compile(r"(\.L_\w+)")


def parse_instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of `nvdisasm -c` in order, and the number of the one that follows each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(found[1], found[2]))
    return instructions, labels


def innermost_loops(
    instructions: Sequence[Instruction], labels: dict[str, int]
) -> list[tuple[int, int]]:
    """(first, last) instruction of every loop, a branch backwards, with no loop in it."""
    spans = []
    for number, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if instruction.kind == "BRA" else None
        if target and labels.get(target[1], number) < number:
            spans.append((labels[target[1]], number))
    return [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]


_TENSOR_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}


def _operations(instruction: Instruction) -> float:
    """Floating-point operations of one thread."""
    if instruction.kind in ("FFMA", "DFMA"):
        return 2.0
    if instruction.kind in ("FADD", "FMUL", "DADD", "DMUL", "MUFU"):
        return 1.0
    if instruction.kind == "HMMA":
        shape = instruction.name.split(".")[1]
        return 2.0 * _TENSOR_SHAPES[shape] / _WARP
    return 0.0


def _global_bytes(instruction: Instruction) -> int:
    """Bytes of global memory that one thread reads or writes."""
    if instruction.kind not in ("LDG", "STG", "LDGSTS"):
        return 0
    for part in instruction.name.split(".")[1:]:
        if part in ("128", "64"):
            return int(part) // 8
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
    return 4


@dataclass(frozen=True)
class Loop:
    """The loop in which a kernel does most of its arithmetic.

    instructions  of one iteration
    mix           (kind, how many), most frequent first: FFMA a multiply-add, HMMA one on tensor
                  cores, LDS a read of shared memory, LDGSTS a copy to it, LDG one of global memory
    intensity     floating-point operations for each byte of global memory; None: it touches none
    """

    instructions: int
    mix: tuple[tuple[str, int], ...]
    intensity: float | None

    def share(self, kind: str) -> float:
        """Of one kind of instruction, 0..1."""
        return dict(self.mix).get(kind, 0) / self.instructions


def hot_loop(instructions: Sequence[Instruction], labels: dict[str, int]) -> Loop | None:
    """The innermost loop with the most arithmetic, None where there is no loop."""
    bodies = [instructions[a : b + 1] for a, b in innermost_loops(instructions, labels)]
    if not bodies:
        return None
    body = max(bodies, key=lambda b: (sum(map(_operations, b)), len(b)))
    nbytes = sum(map(_global_bytes, body))
    mix = Counter(i.kind for i in body).most_common()
    intensity = sum(map(_operations, body)) / nbytes if nbytes else None
    return Loop(len(body), tuple(mix), intensity)
