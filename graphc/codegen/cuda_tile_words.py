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
def copy_lines(
    width: int, slots: tuple[int, ...], starts: tuple[int, ...] | None, conditional: bool
):
    """f(tile, slot, pointer, start, line, inside): begin a copy of `width` elements (1 or 4) for
    each of `slots`, to element `slot` + its number there of a shared array, from element `start` +
    `line` + its number in `starts`. Without `starts`, `line` is a tuple, a number for each copy.

    `inside`, an operand of conditional copies alone, is a bool for all or a tuple of one for each:
    where it is false, zeros are written and nothing is read. With a width of 4, all numbers are
    multiples of 4."""
    nbytes = 4 * width
    # Only copies of 16 bytes may pass by the first cache.
    cached = "cg" if nbytes == 16 else "ca"

    def begin(builder, to, slot, place, offset, inside):
        operands = [to, place] if inside is None else [to, place, inside]
        text = f"[$0+{4 * slot}], [$1+{4 * offset}], {nbytes}{', $2' if inside else ''};"
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        constraint = f"r,l{',r' if inside else ''},~{{memory}}"
        text = f"cp.async.{cached}.shared.global {text}"
        builder.call(ir.InlineAsm(kind, text, constraint, side_effect=True), operands)

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
            return [value] * len(slots) if together else cgutils.unpack_tuple(builder, value)

        insides = [None] * len(slots)
        if conditional:
            read, none = _number(nbytes), _number(0)
            insides = [builder.select(flag, read, none) for flag in parts(values[5])]
        places = [address(line)] * len(slots) if starts else map(address, parts(line))
        for items in zip(slots, places, starts or [0] * len(slots), insides, strict=True):
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
def multiply_tiles(rows: int, columns: int, depth: int, part: int):
    """f(sums, tile, left, right): sums[i, j] += left[k, i] * right[k, j] for all k below `depth`.

    `tile` is a shared array that holds a tile of `rows` and one of `columns` elements for each of
    `depth` terms, a term every rows + 4 and columns + 4 elements. The thread's part of them begins
    at `left` and `right`: groups of four neighbours. `sums` is a local array of part * part."""
    groups = part // 4

    def typing(typing_context, sums, tile, left, right):
        def fragment(context, builder, tile_type, tile, first, extent, k):
            place = _shared_element(context, builder, tile_type, tile, first)
            steps = [k * (extent + 4) + group * (extent // groups) for group in range(groups)]
            return [x for s in steps for x in _load4(builder, builder.gep(place, [_number(s)]))]

        def emit(context, builder, signature, values):
            sums_type, tile_type = signature.args[:2]
            sums, tile, left, right = values
            held = context.make_array(sums_type)(context, builder, sums).data
            for k in range(depth):
                a = fragment(context, builder, tile_type, tile, left, rows, k)
                b = fragment(context, builder, tile_type, tile, right, columns, k)
                for i, x in enumerate(a):
                    for j, y in enumerate(b):
                        place = builder.gep(held, [_number(i * part + j)])
                        builder.store(builder.fma(x, y, builder.load(place)), place)
            return context.get_dummy_value()

        return types.void(sums, tile, left, right), emit

    return intrinsic(typing)


# ---- tensor cores (PTX ISA, "mma.sync"; compute capability 8.0)

# Of 8 terms, and of 16.
_MMA = {
    "tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
}
_TERMS = 16  # that are read from shared memory at once


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
    """Of one line and four matrices, terms q, q + 4, q + 8 and q + 12 for lane 4 g + q, g the line
    in the matrix: ldmatrix moves 32 bits whatever they are. `address`: of this lane's line."""
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
    instruction = _MMA[precision]

    def typing(typing_context, sums, tile, left, right):
        def emit(context, builder, signature, values):
            sums_type, tile_type = signature.args[:2]
            sums, tile, left, right = values
            held = context.make_array(sums_type)(context, builder, sums).data
            a_place = _shared_element(context, builder, tile_type, tile, left)
            b_place = _shared_element(context, builder, tile_type, tile, right)

            def operands(place, lines, pitch, half, first):
                """By line 0..3, this lane's operands of terms first .. first + 15."""
                found: list[list] = [[], [], [], []]
                if lines:
                    start = builder.ptrtoint(place, _I32)
                    for n, own in enumerate(found):
                        distance = _number(4 * (line_place(32 * half + n, depth) + first))
                        line = _matrices(builder, builder.add(start, distance))
                        own += _rounded(builder, precision, line)
                    return found
                for k in range(first, first + _TERMS, 8):
                    places = [_number(term * pitch + 32 * half) for term in (k, k + 4)]
                    quads = [_load4(builder, builder.gep(place, [p])) for p in places]
                    for own, *pair in zip(found, *quads, strict=True):
                        own += _rounded(builder, precision, pair)
                return found

            for first in range(0, depth, _TERMS):
                b = operands(b_place, by_line[1], columns + 8, 0, first)
                for half in range(2):
                    a = operands(a_place, by_line[0], rows + 8, half, first)
                    for k in range(0, len(b[0]), 2):
                        for row in (0, 2):
                            upper, lower = a[row][k : k + 2], a[row + 1][k : k + 2]
                            factors = [upper[0], lower[0], upper[1], lower[1]]
                            for n in range(4):
                                at = [
                                    builder.gep(held, [_number(8 * (4 * half + i) + 4 * j + n)])
                                    for i in (row, row + 1)
                                    for j in range(2)
                                ]
                                c = [builder.load(place) for place in at]
                                matrix = b[n][k : k + 2]
                                d = _multiply_matrices(builder, instruction, factors, matrix, c)
                                for place, value in zip(at, d, strict=True):
                                    builder.store(value, place)
            return context.get_dummy_value()

        return types.void(sums, tile, left, right), emit

    return intrinsic(typing)
