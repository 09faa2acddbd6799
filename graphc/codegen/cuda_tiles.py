"""Tiles of an implicit matrix product on a GPU, and which one to take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# What the choice assumes of a device: an A100's multiprocessors, multiply-adds of each in a cycle,
# and the bytes that memory moves in a cycle for all of them.
MULTIPROCESSORS = 108
_MULTIPLY_ADDS = 128
_BYTES = 1000
_LAUNCH = 3000  # cycles from one kernel's end to the next one's work
# Threads that hide the latency of arithmetic and of shared memory.
_BUSY = 256
_MOST_SPLITS = 64


@dataclass(frozen=True)
class Tile:
    """What a block of threads computes: `rows` x `columns` sums, `depth` terms of each at a time.

    Every thread holds `part` x `part` of the sums in registers, in groups of four neighbouring rows
    and columns, which it reads from shared memory at once.
    """

    rows: int
    columns: int
    depth: int
    part: int

    @property
    def threads(self) -> int:
        return self.rows * self.columns // self.part**2

    @property
    def across(self) -> int:
        """Threads along the columns."""
        return self.columns // self.part

    @property
    def groups(self) -> int:
        """Groups of four along the rows, or the columns, of one thread."""
        return self.part // 4

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor should hold: 512 threads of 128 registers, or 1024 of 64."""
        return (512 if self.part == 8 else 1024) // self.threads

    @property
    def efficiency(self) -> float:
        """The share of multiply-adds among the instructions of the loop, roughly."""
        return 0.85 if self.part == 8 else 0.6


# Half a large tile is as good with twice its depth: the work around the multiplications is then
# for as many of them.
TILES = (
    Tile(128, 128, 8, 8),
    Tile(128, 64, 16, 8),
    Tile(64, 128, 16, 8),
    Tile(128, 64, 8, 8),
    Tile(64, 128, 8, 8),
    Tile(64, 64, 8, 8),
    Tile(64, 64, 8, 4),
    Tile(32, 128, 8, 4),
    Tile(128, 32, 8, 4),
    Tile(32, 32, 8, 4),
    Tile(16, 128, 8, 4),
    Tile(16, 64, 8, 4),
    Tile(64, 16, 8, 4),
)
# A thread keeps the indices of the lines it copies in registers, with checks several for each.
_SHALLOW = 8
# One thread for each sum reads two operands for every multiply-add.
_GENERIC_EFFICIENCY = 0.05


def choose_tile(
    rows: int, columns: int, inner: int, batch: int, splittable: bool, checked: bool
) -> tuple[Tile, int] | None:
    """A tile and in how many parts the sum is split; None where one thread a sum is as good.

    `checked`: whether bounds of operands are checked line by line."""
    work = rows * columns * inner * batch
    least = work / (MULTIPROCESSORS * _MULTIPLY_ADDS * _GENERIC_EFFICIENCY)
    best: tuple[Tile, int] | None = None
    for tile in TILES:
        if checked and tile.depth > _SHALLOW:
            continue
        for splits in _splits(inner, tile.depth) if splittable else (1,):
            cycles = _cycles(tile, splits, rows, columns, inner, batch)
            if cycles < least:
                least, best = cycles, (tile, splits)
    return best


def _splits(inner: int, depth: int) -> Iterator[int]:
    """Numbers of parts that each have a few tiles of terms."""
    splits = 1
    while splits == 1 or (splits <= _MOST_SPLITS and inner // splits >= 8 * depth):
        yield splits
        splits *= 2


def _cycles(tile: Tile, splits: int, rows: int, columns: int, inner: int, batch: int) -> float:
    """Cycles that a device takes, roughly: the work of the busiest multiprocessor, less efficient
    where too few threads hide latencies; and partial sums written, read and added."""
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns) * batch
    busiest = -(-tiles * splits // MULTIPROCESSORS)
    threads = min(busiest, tile.resident) * tile.threads
    speed = _MULTIPLY_ADDS * tile.efficiency * min(1.0, threads / _BUSY) ** 0.5
    terms = -(-inner // splits // tile.depth) * tile.depth
    cycles = busiest * tile.rows * tile.columns * terms / speed
    if splits > 1:
        cycles += _LAUNCH + 2 * 4 * splits * rows * columns * batch / _BYTES
    return cycles
