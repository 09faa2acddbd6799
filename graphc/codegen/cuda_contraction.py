"""Render contractions as tiled CUDA kernels: matrix products, convolutions and their gradients.

Blocks of threads compute tiles of the implicit matrix product of `graphc.codegen.contraction`.
Operands go through shared memory in tiles of `depth` terms of the sum, in two stages: while one
tile is multiplied, the next is being copied. Each thread holds a part of the
sums in registers (Volkov & Demmel 2008, "Benchmarking GPUs to tune dense linear algebra"). In the
end the sums pass through shared memory once more, so that neighbouring threads finish neighbouring
elements; there the epilogue is computed. Where tiles are too few to occupy a device, the sum is
split between blocks: partial sums go to the workspace, and a second kernel adds them in order.

Sizes and strides of the operands are written into the source: what is known costs no registers, and
division by it is a multiplication. The number of steps is an argument.
"""

from __future__ import annotations

from dataclasses import replace

from graphc.codegen import cuda_generic
from graphc.codegen.contraction import Contraction, find_contraction
from graphc.codegen.cuda import CudaLaunch, Rendering
from graphc.codegen.cuda_generic import CudaEmitter, Plan
from graphc.codegen.cuda_indices import Flat, Run, total
from graphc.codegen.cuda_operands import Operand
from graphc.codegen.cuda_tiles import Tile, choose_tile
from graphc.codegen.emit import Scope, Var
from graphc.codegen.kernel import Access, Buffer, Kernel, Loop, Store
from graphc.expr import Expr

# Partial sums come after the kernel's own buffers.
WORKSPACE = "workspace"
_LONG_LOOP = 512  # multiply-adds, beside which what stands around them is little


def render(kernel: Kernel, precision: str) -> Rendering | None:
    """The tiled kernels of a contraction; None for other kernels and where tiles would not pay."""
    contraction = find_contraction(kernel)
    if contraction is None or not _plain(contraction):
        return None
    c = contraction
    splittable = not any(loop.ragged for loop in c.kernel.loops.values())
    rows, columns, inner, batch = map(c.extent, (c.rows, c.columns, c.inner, c.batch))
    choice = choose_tile(rows, columns, inner, batch, precision, splittable)
    return None if choice is None else render_tiled(c, *choice)


def _plain(c: Contraction) -> bool:
    """Whether there are terms, and both factors are elements in memory, not expressions of them."""
    if not c.kernel.trips(c.kernel.loops):
        return False
    return all(f.expr.op == "load" and f.expr.dtype == "float32" for f in (c.left, c.right))


def render_tiled(c: Contraction, tile: Tile, splits: int) -> Rendering:
    """A contraction in the given tiles, its sum in `splits` parts."""
    emitter = _TiledEmitter(c, tile, splits)
    source = emitter.render()
    launch = CudaLaunch(
        source,
        emitter.used,
        tuple(value for _, value in emitter.numbers.values()),
        (emitter.tiles * emitter.batch.extent * splits, 1, 1),
        (tile.threads, 1, 1),
        resident=tile.resident,
    )
    if splits == 1:
        return Rendering((launch,))
    sums = emitter.rows.extent * emitter.columns.extent * emitter.batch.extent
    finish = cuda_generic.render(_added(c, splits), "float32")
    return Rendering((launch, *finish.launches), 4 * sums * splits)


def _added(c: Contraction, splits: int) -> Kernel:
    """The kernel that adds `splits` partial sums of each element, and computes the epilogue."""
    loops = [n for group in (c.batch, c.rows, c.columns) for n in group]
    strides: dict[str, int] = {}
    below = 1
    for name in reversed(loops):
        strides[name] = below
        below *= c.kernel.loops[name].extent
    strides["split"] = below
    access = Access(len(c.kernel.buffers), 0, tuple(strides.items()))
    partial = Expr("load", (), "float32", {"access": access})
    added = Expr("reduce", (partial,), "float32", {"combine": "sum", "loops": ("split",)})
    done: dict[int, Expr] = {id(c.reduction): added}

    def rewrite(expr: Expr) -> Expr:
        if id(expr) not in done:
            args = tuple(rewrite(arg) for arg in expr.args)
            done[id(expr)] = Expr(expr.op, args, expr.dtype, expr.attributes)
        return done[id(expr)]

    kernel = c.kernel
    return replace(
        kernel,
        loops={
            **{n: loop for n, loop in kernel.loops.items() if n in kernel.outer},
            "split": Loop("split", splits),
        },
        buffers=(*kernel.buffers, Buffer(WORKSPACE, "float32", False)),
        stores=tuple(Store(s.access, rewrite(s.expr), ()) for s in kernel.stores),
        _free={},
    )


class _TiledEmitter(CudaEmitter):
    """Writes the function of one tiled kernel; the epilogue is written as any kernel's."""

    def __init__(self, c: Contraction, tile: Tile, splits: int):
        super().__init__(c.kernel, Plan(1))
        self.c, self.tiled, self.splits = c, tile, splits
        self.rows, self.columns = Flat(c.kernel, c.rows), Flat(c.kernel, c.columns)
        self.batch = Flat(c.kernel, c.batch)
        self.steps = -(-c.extent(c.inner) // (tile.depth * splits))
        terms = self.steps * splits * tile.depth
        common = terms, tile.depth, tile.threads, tile.padding
        left, right = tile.stores
        self.left = Operand("left", c.left, c, self.rows, tile.rows, 0, *common, left)
        after = self.left.size
        self.right = Operand("right", c.right, c, self.columns, tile.columns, after, *common, right)
        self.stage = self.left.size + self.right.size
        self.by_line = self.left.by_line, self.right.by_line
        self.lines: list[str] = []

    @property
    def tiles(self) -> int:
        across = -(-self.columns.extent // self.tiled.columns)
        return -(-self.rows.extent // self.tiled.rows) * across

    @property
    def used(self) -> tuple[int, ...]:
        """Numbers of the buffers that the function takes."""
        return tuple(sorted(self.pointers))

    def render(self) -> str:
        for operand in (self.left, self.right):
            self.pointer(operand.access)
        self._begin()
        self._multiply_all()
        self._add(1, "cuda.syncthreads()")
        self._add(1, "block = place[0]", *self._share())
        for group in range(self.tiled.row_groups):
            self._finish(group)
        return self._module()

    def _module(self) -> str:
        names = [*(b.name for b in self.kernel.buffers), WORKSPACE]
        parameters = [names[number] for number in self.used]
        parameters += [name for name, _ in self.numbers.values()]
        operands = self.left, self.right
        words = [line for operand in operands for line in operand.words()]
        words += [f"{name} = {call}" for call, name in self.factories.items()]
        return "\n".join(
            [
                "from graphc.codegen import cuda_tile_words as w",
                "from graphc.codegen import cuda_vocabulary as v",
                "from graphc.codegen.numba_cuda import cuda, types",
                "",
                "U, I, float32 = types.uint32, types.int32, types.float32",
                f"multiply = w.{self.tiled.word(self.by_line)}",
                "copied, put4, write = w.copied, w.put4, w.write",
                *words,
                "",
                "",
                f"def kernel({', '.join(parameters)}):",
                *self.lines,
                "",
            ]
        )

    def _add(self, depth: int, *lines: str) -> None:
        self.lines += ["    " * depth + line for line in lines]

    def _begin(self) -> None:
        """Memory, the block's tile, and what is known before the first term."""
        tile = self.tiled
        drained = tile.rows // tile.row_groups * self._drain_pitch
        self._add(
            1,
            f"tile = cuda.shared.array({max(2 * self.stage, drained)}, float32, alignment=16)",
            f"sums = cuda.local.array({tile.part}, float32)",
            "t = U(cuda.threadIdx.x)",
            "block = U(cuda.blockIdx.x)",
            # Needed again at the end only: until then the registers are for the sums.
            "place = cuda.shared.array(1, U)",
            "if t == U(0):",
            "    place[0] = block",
            *self._share(),
            f"term = {f'U(split * U({self.steps * tile.depth}))' if self.splits > 1 else 'U(0)'}",
        )
        parts = tile.operands(self.by_line)
        more = self.number(("more",), "more", (self.steps - 1) * tile.depth)
        self._add(1, f"last = U(term + U({more}))", *self.left.setup(), *self.right.setup())
        if self.left.prepared or self.right.prepared:
            self._add(1, "cuda.syncthreads()")
        self._add(
            1,
            f"row_part = {parts[0]}",
            f"column_part = {parts[1]}",
            f"for i in range({tile.part}):",
            "    sums[i] = float32(0)",
        )

    def _share(self) -> list[str]:
        """Statements that say which sums `block` computes."""
        lines = [
            f"right_first = {self._first_line(self.right)}",
            f"left_first = {self._first_line(self.left)}",
            f"item = U(block // U({self.tiles}))",
        ]
        if self.splits > 1:
            lines += [f"split = U(item % U({self.splits}))", f"item = U(item // U({self.splits}))"]
        return lines

    def _own_line(self, operand: Operand) -> str:
        """The first line of an operand whose sums the block stores."""
        tiles = -(-operand.lines.extent // operand.extent)
        if tiles == 1:
            return "U(0)"
        below = 1 if operand is self.right else -(-self.columns.extent // self.tiled.columns)
        return f"U(block // U({below}) % U({tiles}) * U({operand.extent}))"

    def _first_line(self, operand: Operand) -> str:
        """The first line of an operand whose sums the block computes."""
        own = self._own_line(operand)
        last = operand.lines.extent - operand.extent
        return f"min({own}, U({last}))" if operand.overlaps else own

    def _stored(self, operand: Operand, line: str) -> str:
        """Whether the block stores the sums of a line, which no other block does."""
        if operand.overlaps:
            return f"{line} >= {self._own_line(operand)}"
        return f"{line} < U({operand.lines.extent})"

    def _multiply_all(self) -> None:
        """The loop over the terms: the next tile is copied while one is multiplied.

        A short loop is written out for two tiles: their places in memory are then constants."""
        (left, copy_left), (right, copy_right) = self.left.copy(), self.right.copy()
        # Copies follow one another: each time ptxas goes from reading shared memory to copying, it
        # adds instructions.
        copy = [*left, *right, copy_left, copy_right]
        multiply = (
            "multiply(sums, tile, U(other + row_part), "
            f"U(other + column_part + U({self.right.base})))"
        )
        swaps = [("stage", f"U(U({self.stage}) - stage)")]
        if self.tiled.part * self.tiled.depth <= _LONG_LOOP:
            swaps = [("U(0)", f"U({self.stage})"), (f"U({self.stage})", "U(0)")]
        self._add(1, "stage = U(0)", *copy, "while term < last:")
        for k, (other, stage) in enumerate(swaps):
            if k:
                self._add(2, "if term >= last:", "    break")
            self._add(
                2,
                "copied()",
                "cuda.syncthreads()",
                f"term = U(term + U({self.tiled.depth}))",
                f"other = {other}",
                f"stage = {stage}",
                *copy,
                multiply,
            )
        self._add(1, "copied()", "cuda.syncthreads()", "other = stage", multiply)

    def _finish(self, group: int) -> None:
        """Store the elements of one group of rows of every thread, by way of shared memory."""
        tile, pitch = self.tiled, self._drain_pitch
        row, column = tile.corner
        if group:
            self._add(1, "cuda.syncthreads()")
        self._add(1, f"corner = U({row} * U({pitch}) + {column})")
        for i in range(4):
            for j in range(tile.column_groups):
                first = (group * 4 + i) * tile.part_columns + 4 * j
                quad = ", ".join(f"sums[{first + k}]" for k in range(4))
                distance = i * pitch + j * tile.column_step
                place = f"corner + U({distance})" if distance else "corner"
                self._add(1, f"put4(tile, {place}, ({quad}))")
        strip, lines = tile.strip, tile.rows // tile.row_groups
        step = tile.threads // tile.columns
        self._add(
            1,
            "cuda.syncthreads()",
            f"column = U(right_first + t % U({tile.columns}))",
            f"line = U(t // U({tile.columns}))",
            f"lines = U({lines} if {self._stored(self.right, 'column')} else 0)",
            "while line < lines:",
        )
        own = "line"
        if strip < lines:
            own = f"line // U({strip}) * U({strip * tile.row_groups}) + line % U({strip})"
        self._add(
            2,
            f"row = {total(['+ left_first', f'+ {own}'], group * strip)}",
            f"element = tile[U(line * U({pitch}) + t % U({tile.columns}))]",
            f"line = U(line + U({step}))",
            f"if {self._stored(self.left, 'row')}:",
        )
        if self.splits > 1:
            self._store_partial()
        else:
            self._store_results()

    @property
    def _drain_pitch(self) -> int:
        return self.tiled.columns + 4

    def _store_partial(self) -> None:
        rows, columns = self.rows.extent, self.columns.extent
        self.pointers[len(self.kernel.buffers)] = WORKSPACE
        line = f"split * U({self.batch.extent}) + item" if self.batch.extent > 1 else "split"
        place = f"U(((({line}) * U({rows}) + row) * U({columns})) + column)"
        self._add(3, f"write({WORKSPACE}, {place}, element)")

    def _store_results(self) -> None:
        """The epilogue for element (item, row, column)."""
        scope = Scope(None, frozenset(self.kernel.outer), 3)
        scope.values[id(self.c.reduction), "", False] = Var("element", ())
        for flat, index in ((self.batch, "item"), (self.rows, "row"), (self.columns, "column")):
            for place, loop in enumerate(flat.loops):
                scope.add(f"{loop} = I({flat.digit(index, Run(place, place + 1, 1))})")
        for loop in self.kernel.outer:
            if self.kernel.loops[loop].extent == 1:
                scope.add(f"{loop} = I(0)")
        ragged = [loop for loop in self.kernel.loops.values() if loop.ragged]
        if ragged:
            inside = " and ".join(f"{l.block} * {l.extent} + {l.name} < {l.total}" for l in ragged)
            scope.add(f"if {inside}:")
            scope.depth += 1
        values = [self.emit(s.expr, scope) for s in self.kernel.stores]
        for store, value in zip(self.kernel.stores, values, strict=True):
            self.store(store.access, value, scope)
        self.lines += scope.lines
