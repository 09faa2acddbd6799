"""Tiles of an implicit matrix product on a GPU, and which one to take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from graphc.codegen.cuda_indices import line_place, line_strides

# What the choice assumes of a device: an A100's multiprocessors, what each multiplies and copies to
# shared memory (bytes) in a cycle, and the bytes that memory moves in a cycle for all of them.
MULTIPROCESSORS = 108
_MULTIPLY_ADDS = 128
_COPIED = 100
_BYTES = 1000
_SHARED = 160 * 1024  # bytes of shared memory
_LAUNCH = 3000  # cycles from one kernel's end to the next one's work
_READ = 4  # instructions that could be issued while shared memory answers a warp's 128-bit read
# Sums of all threads, and threads, that hide the latency of arithmetic and of shared memory: one
# thread's sums do not wait for each other (Volkov 2010, "Better performance at lower occupancy").
_BUSY_SUMS, _BUSY = 8192, 256
_PART = 64  # terms, which a part of a sum has at least
_EVEN = 4  # blocks of a multiprocessor, from which on all have about as many


class Storage(Enum):
    """When an operand lies in shared memory line by line; else it lies term by term."""

    BY_TERM = "never"
    QUADS_BY_LINE = "where four terms are copied at once"
    BY_LINE = "where four lines cannot be copied at once"
    ONLY_BY_LINE = "always"


@dataclass(frozen=True)
class Tile:
    """What a block of threads computes: `rows` x `columns` sums, `depth` terms of each at a time.

    Every thread holds `part_rows` x `part_columns` of the sums in registers, in groups of four
    neighbouring rows and columns, which it reads from shared memory at once.
    """

    rows: int
    columns: int
    depth: int
    part_rows: int
    part_columns: int
    # Beside a term's elements in shared memory: neighbouring terms then begin in other banks.
    padding: ClassVar[int] = 4

    @property
    def part(self) -> int:
        """Sums of one thread."""
        return self.part_rows * self.part_columns

    @property
    def threads(self) -> int:
        return self.rows * self.columns // self.part

    @property
    def row_groups(self) -> int:
        """Groups of four along the rows of one thread."""
        return self.part_rows // 4

    @property
    def column_groups(self) -> int:
        """Groups of four along the columns of one thread."""
        return self.part_columns // 4

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor should hold: 512 threads of 128 registers, or 768 of 80
        where there are few sums, as far as shared memory goes."""
        shared = 2 * 4 * self.depth * (self.rows + self.columns + 2 * self.padding)
        return min((768 if self.part == 16 else 512) // self.threads, _SHARED // shared)

    @property
    def stores(self) -> tuple[Storage, Storage]:
        """Of left and right. Four terms of eight rows and of eight columns would leave no registers
        for their sums."""
        return (Storage.BY_TERM if self.part == 64 else Storage.QUADS_BY_LINE,) * 2

    @property
    def efficiency(self) -> float:
        """The share of multiply-adds among the instructions of the loop, roughly: beside them stand
        reads of shared memory, copies with their addresses, and the loop itself."""
        multiply_adds = self.part * self.depth
        reads = (self.row_groups + self.column_groups) * self.depth
        copies = (self.rows + self.columns) * self.depth // self.threads
        return multiply_adds / (multiply_adds + _READ * reads + 2 * copies + 25)

    # ---- the part of thread `t`, as source

    def word(self, by_line: tuple[bool, bool]) -> str:
        """The call that makes the word `multiply`; `by_line`: how left and right are stored."""
        part = self.part_rows, self.part_columns
        return f"multiply_tiles({self.rows}, {self.columns}, {self.depth}, {part}, {by_line})"

    def operands(self, by_line: tuple[bool, bool]) -> tuple[str, str]:
        """Where the thread's first elements of the left and of the right tile are."""
        across = self.columns // self.part_columns
        places = []
        for four, count, lines in zip(
            (f"t // U({across})", f"t % U({across})"),
            (self.threads // across, across),
            by_line,
            strict=True,
        ):
            if not lines:
                places.append(f"U({four} * U(4))")
                continue
            _, step, many = line_strides(self.depth)
            if count > 8:
                places.append(f"U({four} % U(8) * U({step}) + {four} // U(8) * U({many}))")
            else:
                places.append(f"U({four} * U({step}))")
        return places[0], places[1]

    @property
    def corner(self) -> tuple[str, str]:
        """Row and column of the first of the thread's sums; rows are those of one group of every
        thread, the groups `strip` rows apart."""
        row, column = self.operands((False, False))
        return row, column

    @property
    def strip(self) -> int:
        """Neighbouring rows that are the same group of some threads."""
        return self.rows // self.row_groups

    @property
    def column_step(self) -> int:
        """Columns from one group of the thread to the next."""
        return self.columns // self.column_groups


@dataclass(frozen=True)
class TensorTile(Tile):
    """A tile on tensor cores, with factors rounded to `precision` and sums in float32.

    A warp computes 64 x 32 sums in matrices of 16 x 8 (PTX ISA, "mma.sync"). Which rows and columns
    of a matrix are which of the warp's is free: lane 4 g + q takes rows 4 g .. 4 g + 3 of each half
    and columns 8 q .. 8 q + 7, so that its elements lie together in shared memory. An operand that
    is stored line by line is read by `ldmatrix`, of which lane 8 m + i names line 4 i of matrix m.
    """

    precision: str = "tf32"
    padding: ClassVar[int] = 8

    @property
    def stores(self) -> tuple[Storage, Storage]:
        """A bfloat16 instruction takes 16 terms: those of four rows, read at once as they lie term
        by term, would leave no registers for the sums. `ldmatrix` reads two rows."""
        bfloat16 = self.precision == "bfloat16"
        return Storage.ONLY_BY_LINE if bfloat16 else Storage.BY_LINE, Storage.BY_LINE

    @property
    def efficiency(self) -> float:
        """Multiply-adds for each that the other cores could do, roughly: what is left of 4 or 8
        beside conversions and copies."""
        return 3.0 if self.precision == "tf32" else 5.0

    def word(self, by_line: tuple[bool, bool]) -> str:
        sizes = f"{self.rows}, {self.columns}, {self.depth}"
        return f'multiply_on_tensor_cores({sizes}, "{self.precision}", {by_line})'

    def operands(self, by_line: tuple[bool, bool]) -> tuple[str, str]:
        one, four, _ = line_strides(self.depth)
        extents = (64, self.rows), (32, self.columns)
        # Of the four matrices, every second one is of the next line, or the last two are.
        orders = (one, 4), (4, one)
        places = []
        for first, (warp, extent), (second, last), lines in zip(
            self._warp, extents, orders, by_line, strict=True
        ):
            if lines:
                matrix = f"t // U(8) % U(2) * U({second}) + t % U(32) // U(16) * U({last})"
                lane = f"t % U(8) * U({four}) + {matrix}"
                warp = line_place(warp, self.depth)
            else:
                lane = f"t % U(32) // U(4) * U(4) + t % U(4) * U({extent + self.padding})"
            places.append(f"U({first} * U({warp}) + {lane})")
        return places[0], places[1]

    @property
    def _warp(self) -> tuple[str, str]:
        """Row and column of the thread's warp among those of the block."""
        across = self.columns // 32
        return f"t // U({32 * across})", f"t // U(32) % U({across})"

    @property
    def corner(self) -> tuple[str, str]:
        row, column = self._warp
        return (
            f"U({row} * U(32) + t % U(32) // U(4) * U(4))",
            f"U({column} * U(32) + t % U(4) * U(8))",
        )

    @property
    def strip(self) -> int:
        return 32

    @property
    def column_step(self) -> int:
        return 4


# With more depth, the work around the multiplications is for more of them.
TILES = tuple(
    Tile(*sizes)
    for sizes in (
        (128, 128, 16, 8, 8),
        (128, 64, 16, 8, 8),
        (64, 128, 16, 8, 8),
        (128, 128, 8, 8, 8),
        (128, 64, 8, 8, 8),
        (64, 128, 8, 8, 8),
        (64, 64, 32, 8, 4),
        (64, 32, 32, 8, 4),
        (32, 64, 32, 8, 4),
        (64, 64, 16, 8, 4),
        (64, 32, 16, 8, 4),
        (32, 64, 16, 8, 4),
        (64, 64, 16, 4, 4),
        (32, 128, 16, 4, 4),
        (128, 32, 16, 4, 4),
        (32, 32, 16, 4, 4),
        (64, 64, 8, 4, 4),
        (32, 128, 8, 4, 4),
        (128, 32, 8, 4, 4),
        (32, 32, 8, 4, 4),
        (16, 128, 8, 4, 4),
        (16, 64, 8, 4, 4),
        (64, 16, 8, 4, 4),
    )
)
TENSOR_TILES = tuple(
    TensorTile(rows, columns, 16, 8, 8, precision)
    for precision in ("tf32", "bfloat16")
    for rows, columns in ((128, 128), (128, 64), (64, 128), (64, 64))
)
# One thread for each sum reads two operands for every multiply-add.
_GENERIC_EFFICIENCY = 0.05


def choose_tile(
    rows: int,
    columns: int,
    inner: int,
    batch: int,
    precision: str = "float32",
    splittable: bool = True,
) -> tuple[Tile, int] | None:
    """A tile and in how many parts the sum is split; None where one thread a sum is as good.

    `precision`: "tf32" and "bfloat16" allow tiles on tensor cores."""
    work = rows * columns * inner * batch
    least = work / (MULTIPROCESSORS * _MULTIPLY_ADDS * _GENERIC_EFFICIENCY)
    best: tuple[Tile, int] | None = None
    tensor = [tile for tile in TENSOR_TILES if tile.precision == precision]
    for tile in (*tensor, *TILES):
        tiles = _tiles(tile, rows, columns, batch)
        for splits in sorted(_splits(tiles, inner, tile.depth)) if splittable else (1,):
            cycles = _cycles(tile, splits, rows, columns, inner, batch)
            if cycles < least:
                least, best = cycles, (tile, splits)
    return best


def _splits(tiles: int, inner: int, depth: int) -> set[int]:
    """Numbers of parts that give every multiprocessor one, two or four blocks, and 1; each part has
    a few tiles of terms. Of those close by, also the one that leaves no tile short of terms."""
    most = max(1, inner // max(_PART, 2 * depth))
    found = {1}
    for blocks in (1, 2, 4):
        parts = min(most, max(1, MULTIPROCESSORS * blocks // tiles))
        found.add(parts)
        near = range(parts, parts - parts // 8 - 1, -1)
        found |= {next((n for n in near if inner % (n * depth) == 0), parts)}
    return found


def _tiles(tile: Tile, rows: int, columns: int, batch: int) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns) * batch


def _cycles(tile: Tile, splits: int, rows: int, columns: int, inner: int, batch: int) -> float:
    """Cycles that a device takes, roughly: what its busiest multiprocessor multiplies and copies,
    less efficient where too few threads hide latencies; and partial sums written, read, added."""
    busiest: float = _tiles(tile, rows, columns, batch) * splits / MULTIPROCESSORS
    if busiest < _EVEN:
        busiest = math.ceil(busiest)
    threads = min(busiest, tile.resident) * tile.threads
    busy = max(_BUSY, _BUSY_SUMS // tile.part)
    speed = _MULTIPLY_ADDS * tile.efficiency * min(1.0, threads / busy) ** 0.5
    terms = -(-inner // splits // tile.depth) * tile.depth
    cycles = busiest * tile.rows * tile.columns * terms / speed
    cycles += busiest * 4 * (tile.rows + tile.columns) * terms / _COPIED
    if splits > 1:
        cycles += _LAUNCH + 2 * 4 * splits * rows * columns * batch / _BYTES
    return cycles
