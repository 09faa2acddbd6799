"""Words of generated CUDA kernels that work on tiles: 128-bit access and register tiles.

Ordinary LLVM instructions alone: they run on the CPU as they are. Each word is one intrinsic where
Python statements would do the same, because a statement costs Numba's front end a hundred times
what an instruction costs it.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.core import cgutils

from graphc.codegen.cuda_indices import line_place
from graphc.codegen.numba_cuda import intrinsic, types
from graphc.codegen.simd_operands import pointee

_FLOAT = ir.FloatType()
_FLOAT4 = ir.VectorType(_FLOAT, 4)
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_GLOBAL, _SHARED = 1, 3  # LLVM's address spaces
_QUAD = types.UniTuple(types.float32, 4)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


def _wide(builder, index):
    return builder.zext(index, _I64) if index.type.width < 64 else index


def _shared_element(context, builder, array_type, array, index):
    """Address of element `index` of a shared array, in shared memory's address space."""
    data = context.make_array(array_type)(context, builder, array).data
    place = builder.gep(data, [_wide(builder, index)])
    kind = ir.PointerType(place.type.pointee, addrspace=_SHARED)
    return builder.addrspacecast(place, kind)


def _load4(builder, place):
    place = builder.bitcast(place, ir.PointerType(_FLOAT4, addrspace=place.type.addrspace))
    vector = builder.load(place, align=16)
    return [builder.extract_element(vector, _number(i)) for i in range(4)]


def _assembly(builder, result, text: str, constraint: str, operands):
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(ir.InlineAsm(kind, text, constraint, side_effect=False), operands)


@intrinsic
def write(typing_context, pointer, index, value):
    """Store a float32 to element `index`, unsigned, of a pointer."""
    pointee(pointer, "write")

    def emit(context, builder, signature, values):
        builder.store(values[2], builder.gep(values[0], [_wide(builder, values[1])]))
        return context.get_dummy_value()

    return types.void(pointer, index, types.float32), emit


# ---- asynchronous copies from global to shared memory (PTX ISA, cp.async; compute capability 8.0)


@cache
def copy_lines(width: int, slots: tuple[int, ...], starts: tuple[int, ...], conditional: bool):
    """f(tile, slot, pointer, start, line, inside): begin a copy of `width` elements (1 or 4) for
    each of `slots`, to element `slot` + its number there of a shared array, from element `start` +
    `line` + its number in `starts`. `line` is a number, or a tuple of them, each for as many
    neighbouring copies.

    `inside`, an operand of conditional copies alone, is a bool for all or a tuple of one for each:
    where it is false, zeros are written and nothing is read. With a width of 4, all numbers are
    multiples of 4."""
    nbytes = 4 * width
    # Only copies of 16 bytes may pass by the first cache.
    cached = "cg" if nbytes == 16 else "ca"

    def begin(builder, to, slot, place, offset, ignored):
        text = f"[$0+{4 * slot}], [$1+{4 * offset}], {nbytes}"
        text = f"cp.async.{cached}.shared.global {text}"
        if ignored is None:
            operands, constraint, text = [to, place], "r,l", f"{text};"
        else:  # as a predicate: for a size of 0, ptxas would compute addresses anew
            operands, constraint = [to, place, builder.zext(ignored, _I32)], "r,l,r"
            text = f"{{ .reg .pred none; setp.ne.u32 none, $2, 0; {text}, none; }}"
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        assembly = ir.InlineAsm(kind, text, f"{constraint},~{{memory}}", side_effect=True)
        builder.call(assembly, operands)

    def emit(context, builder, signature, values):
        tile, slot, pointer, start, line = values[:5]
        to = _shared_element(context, builder, signature.args[0], tile, slot)
        to = builder.ptrtoint(to, _I32)

        def address(own):
            place = builder.gep(pointer, [_wide(builder, builder.add(start, own))])
            kind = ir.PointerType(_FLOAT, addrspace=_GLOBAL)
            return builder.ptrtoint(builder.addrspacecast(place, kind), _I64)

        def parts(value):
            together = isinstance(value.type, (ir.IntType, ir.PointerType))
            return [value] if together else cgutils.unpack_tuple(builder, value)

        def for_each_copy(values):
            return [value for value in values for _ in range(len(slots) // len(values))]

        ignored = [builder.not_(flag) for flag in parts(values[5])] if conditional else [None]
        places = for_each_copy([address(own) for own in parts(line)])
        for items in zip(slots, places, starts, for_each_copy(ignored), strict=True):
            begin(builder, to, *items)
        return context.get_dummy_value()

    def always(typing_context, tile, slot, pointer, start, line):
        pointee(pointer, "copy_lines")
        return types.void(tile, slot, pointer, start, line), emit

    def sometimes(typing_context, tile, slot, pointer, start, line, inside):
        pointee(pointer, "copy_lines")
        return types.void(tile, slot, pointer, start, line, inside), emit

    return intrinsic(sometimes if conditional else always)


@cache
def read_numbers(count: int):
    """f(array, index): elements index .. index + count - 1 of a shared array of uint32, as a tuple.

    The index is a multiple of the count or of 4, the count a power of two."""
    width = min(count, 4)

    def typing(typing_context, array, index):
        def emit(context, builder, signature, values):
            place = _shared_element(context, builder, signature.args[0], *values)
            kind = ir.PointerType(ir.VectorType(_I32, width), addrspace=_SHARED)
            place = builder.bitcast(place, kind)
            numbers = []
            for k in range(count // width):
                vector = builder.load(builder.gep(place, [_number(k)]), align=4 * width)
                numbers += [builder.extract_element(vector, _number(i)) for i in range(width)]
            return context.make_tuple(builder, signature.return_type, numbers)

        return types.UniTuple(types.uint32, count)(array, index), emit

    return intrinsic(typing)


@intrinsic
def copied(typing_context):
    """Wait for all copies that this thread has begun."""

    def emit(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [])
        text = "cp.async.wait_all;"
        builder.call(ir.InlineAsm(kind, text, "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), emit


# ---- tiles in shared memory


@intrinsic
def put4(typing_context, array, index, quad):
    """Store to elements index .. index + 3 of a shared array; the index is a multiple of four."""

    def emit(context, builder, signature, values):
        place = _shared_element(context, builder, signature.args[0], *values[:2])
        vector = ir.Constant(_FLOAT4, ir.Undefined)
        for i, part in enumerate(cgutils.unpack_tuple(builder, values[2])):
            vector = builder.insert_element(vector, part, _number(i))
        kind = ir.PointerType(_FLOAT4, addrspace=_SHARED)
        builder.store(vector, builder.bitcast(place, kind), align=16)
        return context.get_dummy_value()

    return types.void(array, index, _QUAD), emit


@cache
def multiply_tiles(
    rows: int, columns: int, depth: int, part: tuple[int, int], by_line: tuple[bool, bool]
):
    """f(sums, tile, left, right): sums[i, j] += left[k, i] * right[k, j] for all k below `depth`.

    `tile` is a shared array that holds a tile of `rows` and one of `columns` elements for each of
    `depth` terms, a term every rows + 4 and columns + 4 elements, or `by_line` as
    `cuda_indices.line_place` says. The thread's `part` of them, (rows, columns), begins at `left`
    and `right`: groups of four neighbours. `sums` is a local array of all its sums."""

    def typing(typing_context, sums, tile, left, right):
        def fragment(builder, place, extent, count, lines, k):
            """The thread's elements of one operand for terms k .. k + 3, a list for each term."""

            def quad(distance):
                return _load4(builder, builder.gep(place, [_number(distance)]))

            firsts = [group * extent * 4 // count for group in range(count // 4)]
            if lines:
                own = [
                    line_place(first, depth) + line_place(i, depth) + k
                    for first in firsts
                    for i in range(4)
                ]
                return list(zip(*map(quad, own), strict=True))
            terms = [term * (extent + 4) for term in range(k, k + 4)]
            return [[x for first in firsts for x in quad(term + first)] for term in terms]

        def emit(context, builder, signature, values):
            sums_type, tile_type = signature.args[:2]
            held = context.make_array(sums_type)(context, builder, values[0]).data
            places = [
                _shared_element(context, builder, tile_type, values[1], first)
                for first in values[2:]
            ]
            for k in range(0, depth, 4):
                a, b = (
                    fragment(builder, *operand, k)
                    for operand in zip(places, (rows, columns), part, by_line, strict=True)
                )
                for xs, ys in zip(a, b, strict=True):
                    for i, x in enumerate(xs):
                        for j, y in enumerate(ys):
                            place = builder.gep(held, [_number(i * part[1] + j)])
                            builder.store(builder.fma(x, y, builder.load(place)), place)
            return context.get_dummy_value()

        return types.void(sums, tile, left, right), emit

    return intrinsic(typing)


# ---- tensor cores (PTX ISA, "mma.sync"; compute capability 8.0)

# The instruction, and of how many terms of the sum it adds the products.
_MMA = {
    "tf32": ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 8),
    "bfloat16": ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 16),
}
_TERMS = 8  # that are read from shared memory at once


def _rounded(builder, precision: str, values):
    """float32 values as the 32-bit operands of an instruction: one each, or pairs of bfloat16 of
    which the first is the lower half."""
    if precision == "tf32":
        text, constraint = "cvt.rna.tf32.f32 $0, $1;", "=r,f"
        return [_assembly(builder, _I32, text, constraint, [value]) for value in values]
    pairs = zip(values[::2], values[1::2], strict=True)
    text, constraint = "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"
    return [_assembly(builder, _I32, text, constraint, [high, low]) for low, high in pairs]


def _multiply_matrices(builder, instruction: str, a, b, c):
    """c + a b of one warp: this lane's four operands of a, two of b, four elements of c."""
    text = f"{instruction} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
    result = ir.LiteralStructType([_FLOAT] * 4)
    constraint = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    found = _assembly(builder, result, text, constraint, [*a, *b, *c])
    return [builder.extract_value(found, k) for k in range(4)]


def _matrices(builder, address):
    """Of each of four matrices, term q of line g for lane 4 g + q: ldmatrix moves 32 bits whatever
    they are. `address`: of this lane's line."""
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];"
    kind = ir.FunctionType(ir.LiteralStructType([_I32] * 4), [_I32])
    assembly = ir.InlineAsm(kind, text, "=r,=r,=r,=r,r,~{memory}", side_effect=True)
    found = builder.call(assembly, [address])
    parts = [builder.extract_value(found, k) for k in range(4)]
    return [builder.bitcast(part, _FLOAT) for part in parts]


@cache
def multiply_on_tensor_cores(
    rows: int, columns: int, depth: int, precision: str, by_line: tuple[bool, bool]
):
    """As `multiply_tiles` with a part of 8, for a warp: factors are rounded to `precision`,
    products are summed in float32. Terms lie rows + 8 and columns + 8 apart in tiles that are
    stored term by term; `by_line`: whether the left, the right is not (`cuda_indices.line_place`).

    Lane 4 g + q gets the terms q, q + 4, ... of rows 4 g .. 4 g + 3 of both halves of the warp's
    64 rows and of columns 4 g .. 4 g + 3 of its 32. In every instruction, the lane's sums are in
    two of those rows, and in columns 2 q and 2 q + 1 of the matrix: for the n-th matrix of a row
    of four, columns 8 q + n and 8 q + 4 + n."""
    instruction, terms = _MMA[precision]

    def typing(typing_context, sums, tile, left, right):
        def emit(context, builder, signature, values):
            sums_type, tile_type = signature.args[:2]
            sums, tile, left, right = values
            held = context.make_array(sums_type)(context, builder, sums).data
            a_place = _shared_element(context, builder, tile_type, tile, left)
            b_place = _shared_element(context, builder, tile_type, tile, right)

            def operands(place, pitch, line, first):
                """This lane's operands of lines line .. line + 3, stored term by term."""
                found: list[list] = [[], [], [], []]
                for k in range(first, first + terms, _TERMS):
                    places = [_number(term * pitch + line) for term in (k, k + 4)]
                    quads = [_load4(builder, builder.gep(place, [p])) for p in places]
                    for own, *pair in zip(found, *quads, strict=True):
                        own += _rounded(builder, precision, pair)
                return found

            def operands_by_line(place, line, first, order):
                """The same of lines line and line + 1, stored line by line. `order`: which of the
                matrices that are read are the first line's, and the second's."""
                start = builder.ptrtoint(place, _I32)
                found: list[list] = [[], []]
                for k in range(first, first + terms, _TERMS):
                    distance = _number(4 * (line_place(line, depth) + k))
                    read = _matrices(builder, builder.add(start, distance))
                    for own, places in zip(found, order, strict=True):
                        own += _rounded(builder, precision, [read[place] for place in places])
                return found

            for first in range(0, depth, terms):
                if by_line[1]:
                    pairs = [operands_by_line(b_place, n, first, ((0, 1), (2, 3))) for n in (0, 2)]
                    b = [line for pair in pairs for line in pair]
                else:
                    b = operands(b_place, columns + 8, 0, first)
                for half in range(2):
                    if not by_line[0]:
                        a = operands(a_place, rows + 8, 32 * half, first)
                    for row in (0, 2):
                        if by_line[0]:
                            line = 32 * half + row
                            upper, lower = operands_by_line(a_place, line, first, ((0, 2), (1, 3)))
                        else:
                            upper, lower = a[row : row + 2]
                        factors = [upper[0], lower[0], upper[1], lower[1]]
                        for n in range(4):
                            at = [
                                builder.gep(held, [_number(8 * (4 * half + i) + 4 * j + n)])
                                for i in (row, row + 1)
                                for j in range(2)
                            ]
                            c = [builder.load(place) for place in at]
                            d = _multiply_matrices(builder, instruction, factors, b[n], c)
                            for place, value in zip(at, d, strict=True):
                                builder.store(value, place)
            return context.get_dummy_value()

        return types.void(sums, tile, left, right), emit

    return intrinsic(typing)
