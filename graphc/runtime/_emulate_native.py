"""The scheduler of emulated CUDA blocks: runs threads, lets them meet, performs warp operations.

Compiled once and kept in the kernel cache; `graphc.runtime.emulate` reads this file as text. What a
thread waits for is in its record (`emulate_record.py`).
"""

# Numba's stubs know neither intrinsics nor all options.
# mypy: disable-error-code="call-arg, call-overload, var-annotated"
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from graphc.runtime._driver_native import load, store
from graphc.runtime.emulate_record import (
    ALL,
    ANY,
    AT_BARRIER,
    AT_WARP,
    BLOCK,
    BLOCKS,
    COUNT,
    DESTROY,
    FINISHED,
    INPUT,
    JOB_BARRIER,
    JOB_BLOCK,
    JOB_DONE,
    JOB_ENTRY,
    JOB_FAILED,
    JOB_GRID,
    JOB_ORDER,
    JOB_PARAMETERS,
    JOB_RECORDS,
    JOB_STUCK,
    JOB_WARP,
    LANE,
    MASK,
    MATRIX,
    MATRIX_TRANSPOSED,
    MMA_BF16,
    MMA_F16,
    MMA_TF32,
    OPERATION,
    OUTPUT,
    PLAIN,
    READY,
    RESUME,
    SHARED,
    SHUFFLE,
    START,
    STATUS,
    SUSPENDS,
    THREAD,
    THREADS,
    VOTE,
    WARP,
    WORDS,
)

native = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()


@intrinsic
def call_entry(typing_context, entry, what, record, parameters):
    """Calls a kernel's entry (see `emulate_ir.py`) with a request of `emulate_record.py`."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(_POINTER, [_I32, _POINTER, _POINTER]).as_pointer()
        function = builder.inttoptr(args[0], kind)
        pointers = [builder.inttoptr(a, _POINTER) for a in args[2:]]
        found = builder.call(function, [builder.trunc(args[1], _I32), *pointers])
        return builder.ptrtoint(found, _I64)

    return types.int64(*[types.int64] * 4), emit


@intrinsic
def word(typing_context, address, index):
    """The int32 word of a record."""

    def emit(context, builder, signature, args):
        base = builder.inttoptr(args[0], _I32.as_pointer())
        return builder.sext(builder.load(builder.gep(base, [args[1]])), _I64)

    return types.int64(types.int64, types.int64), emit


@intrinsic
def set_word(typing_context, address, index, value):
    def emit(context, builder, signature, args):
        base = builder.inttoptr(args[0], _I32.as_pointer())
        builder.store(builder.trunc(args[2], _I32), builder.gep(base, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


def _number(kind, bits):
    """The float whose pattern is the low bits of an int64, as float32."""

    def define(typing_context, pattern):
        def emit(context, builder, signature, args):
            low = builder.trunc(args[0], ir.IntType(bits))
            value = builder.bitcast(low, kind)
            return value if kind == _FLOAT else builder.fpext(value, _FLOAT)

        return types.float32(types.int64), emit

    return intrinsic(define)


as_float32 = _number(_FLOAT, 32)
as_float16 = _number(_HALF, 16)


@intrinsic
def pattern_of(typing_context, value):
    """The bits of a float32."""

    def emit(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], _I32), _I64)

    return types.int64(types.float32), emit


RECORD = 4 * WORDS  # bytes


# ---- operations of a warp; `first` is the record of its lane 0


@native
def lane_input(first, lane, index):
    return word(first + lane * RECORD, INPUT + index)


@native
def shuffle(first, lane):
    """shfl.sync (PTX ISA 9.7.9.6): mode 0 idx, 1 up, 2 down, 3 bfly; c holds clamp and segments."""
    record = first + lane * RECORD
    mode, b, c = word(record, INPUT), word(record, INPUT + 2) & 31, word(record, INPUT + 3)
    clamp, segment = c & 31, (c >> 8) & 31
    highest = (lane & segment) | (clamp & ~segment)
    source = (lane & segment) | (b & ~segment)
    inside = source <= highest
    if mode == 1:
        source = lane - b
        inside = source >= highest
    elif mode == 2:
        source = lane + b
        inside = source <= highest
    elif mode == 3:
        source = lane ^ b
        inside = source <= highest
    if not inside:
        source = lane
    set_word(record, OUTPUT, lane_input(first, source, 1))
    set_word(record, OUTPUT + 1, 1 if inside else 0)


@native
def vote(first, lanes, lane):
    """vote.sync: mode 0 all, 1 any, 2 all equal, 3 ballot."""
    record = first + lane * RECORD
    mode, mask = word(record, INPUT), word(record, MASK)
    ballot, everyone = 0, 0
    for other in range(lanes):
        if mask >> other & 1:
            everyone |= 1 << other
            if lane_input(first, other, 1) != 0:
                ballot |= 1 << other
    holds = 0
    if mode == 0:
        holds = 1 if ballot == everyone else 0
    elif mode == 1:
        holds = 1 if ballot != 0 else 0
    elif mode == 2:
        holds = 1 if ballot == 0 or ballot == everyone else 0
    set_word(record, OUTPUT, ballot)
    set_word(record, OUTPUT + 1, holds)


@native
def matrix(first, lane, transposed):
    """ldmatrix.x4 (PTX ISA 9.7.14.5.15): lane 8 m + r has the address of row r of matrix m."""
    record = first + lane * RECORD
    for m in range(4):
        found = 0
        for half in range(2):
            row = 2 * (lane & 3) + half if transposed else lane >> 2
            column = lane >> 2 if transposed else 2 * (lane & 3) + half
            source = first + (8 * m + row) * RECORD + 4 * INPUT
            address = load(source, 0) + 2 * column
            value = word(address & ~3, 0) >> (8 * (address & 2))
            found |= (value & 0xFFFF) << (16 * half)
        set_word(record, OUTPUT + m, found)


@native
def narrow(pattern, operation):
    """A factor of 16 bits."""
    if operation == MMA_BF16:
        return as_float32((pattern & 0xFFFF) << 16)
    return as_float16(pattern & 0xFFFF)


@native
def mma(first, lane, operation):
    """mma.sync m16n8k8 tf32 and m16n8k16 bf16, f16 (PTX ISA 9.7.14.5): d = a b + c, in float32.

    Lane 4 g + t holds rows g and g + 8 of a and d. The products are exact; their sum is rounded
    once, where hardware may round more often."""
    record = first + lane * RECORD
    depth = 8 if operation == MMA_TF32 else 16
    for element in range(4):
        row = (lane >> 2) + (8 if element >= 2 else 0)
        column = 2 * (lane & 3) + (element & 1)
        total = 0.0
        for k in range(depth):
            if operation == MMA_TF32:
                a = as_float32(
                    lane_input(first, 4 * (row & 7) + (k & 3), (row >> 3) + 2 * (k >> 2)) & ~0x1FFF
                )
                b = as_float32(lane_input(first, 4 * column + (k & 3), 4 + (k >> 2)) & ~0x1FFF)
            else:
                shift = 16 * (k & 1)
                at = (k & 7) >> 1
                a_word = lane_input(first, 4 * (row & 7) + at, (row >> 3) + 2 * (k >> 3))
                b_word = lane_input(first, 4 * column + at, 4 + (k >> 3))
                a, b = narrow(a_word >> shift, operation), narrow(b_word >> shift, operation)
            total += float(a) * float(b)
        c = as_float32(word(record, INPUT + 6 + element))
        set_word(record, OUTPUT + element, pattern_of(types.float32(float(c) + total)))


@native
def perform(first, lanes, lane):
    """The operation that `lane` and all lanes of its mask have come to, for this lane."""
    operation = word(first + lane * RECORD, OPERATION)
    if operation == SHUFFLE:
        shuffle(first, lane)
    elif operation == VOTE:
        vote(first, lanes, lane)
    elif operation == MATRIX or operation == MATRIX_TRANSPOSED:
        matrix(first, lane, operation == MATRIX_TRANSPOSED)
    elif operation == MMA_TF32 or operation == MMA_BF16 or operation == MMA_F16:
        mma(first, lane, operation)


@native
def release_warp(first, lanes):
    """Lets lanes go on whose whole mask waits at the same operation; how many."""
    released = 0
    for lane in range(lanes):
        record = first + lane * RECORD
        if word(record, STATUS) != AT_WARP:
            continue
        mask, operation = word(record, MASK), word(record, OPERATION)
        together = mask >> lane & 1 != 0
        for other in range(lanes):
            if mask >> other & 1:
                partner = first + other * RECORD
                if (
                    word(partner, STATUS) != AT_WARP
                    or word(partner, MASK) != mask
                    or word(partner, OPERATION) != operation
                ):
                    together = False
        if together:
            for other in range(lanes):
                if mask >> other & 1:
                    perform(first, lanes, other)
            for other in range(lanes):
                if mask >> other & 1:
                    set_word(first + other * RECORD, STATUS, READY)
                    released += 1
    return released


@native
def release_barrier(records, count):
    """Lets all threads go on, with what a barrier tells them of everybody's predicate."""
    votes = 0
    for thread in range(count):
        if word(records + thread * RECORD, INPUT) != 0:
            votes += 1
    for thread in range(count):
        record = records + thread * RECORD
        kind = word(record, OPERATION)
        if kind == COUNT:
            set_word(record, OUTPUT, votes)
        elif kind == ALL:
            set_word(record, OUTPUT, 1 if votes == count else 0)
        elif kind == ANY:
            set_word(record, OUTPUT, 1 if votes != 0 else 0)
        set_word(record, STATUS, READY)


# ---- blocks


@native
def number_of(records, count, status):
    found = 0
    for thread in range(count):
        if word(records + thread * RECORD, STATUS) == status:
            found += 1
    return found


@native
def run_suspending(job, count):
    """Runs a block whose threads may wait for each other; false if they wait for ever."""
    entry, records = load(job, 8 * JOB_ENTRY), load(job, 8 * JOB_RECORDS)
    order, parameters = load(job, 8 * JOB_ORDER), load(job, 8 * JOB_PARAMETERS)
    what = START
    while True:
        for place in range(count):
            record = records + word(order, place) * RECORD
            if word(record, STATUS) == READY:
                call_entry(entry, what, record, parameters)
        what = RESUME
        released = 0
        for first in range(0, count, WARP):
            released += release_warp(records + first * RECORD, min(WARP, count - first))
        if released == 0:
            if number_of(records, count, AT_BARRIER) == count:
                release_barrier(records, count)
            else:
                break
    done = number_of(records, count, FINISHED)
    if done != count:
        store(job, 8 * JOB_STUCK, 1)
        store(job, 8 * JOB_BARRIER, number_of(records, count, AT_BARRIER))
        store(job, 8 * JOB_WARP, number_of(records, count, AT_WARP))
        store(job, 8 * JOB_DONE, done)
    for thread in range(count):
        call_entry(entry, DESTROY, records + thread * RECORD, parameters)
    return done == count


@native
def poison(entry, records):
    """Fills the block's shared memory with 0xFF: NaN in every float format, -1 in integers."""
    table = call_entry(entry, SHARED, records, 0)
    while load(table, 0) != 0:
        address, size = load(table, 0), load(table, 8)
        for at in range(size >> 2):
            set_word(address, at, -1)
        table += 16


def run_grid(job):
    """Runs all blocks of a launch, one after the other. `job`: see `emulate_record.py`."""
    entry, records = load(job, 8 * JOB_ENTRY), load(job, 8 * JOB_RECORDS)
    order, parameters = load(job, 8 * JOB_ORDER), load(job, 8 * JOB_PARAMETERS)
    suspends = call_entry(entry, SUSPENDS, records, 0)
    width, height = load(job, 8 * JOB_BLOCK), load(job, 8 * JOB_BLOCK + 8)
    count = width * height * load(job, 8 * JOB_BLOCK + 16)
    for thread in range(count):
        record = records + thread * RECORD
        set_word(record, LANE, thread & (WARP - 1))
        set_word(record, THREAD, thread % width)
        set_word(record, THREAD + 1, thread // width % height)
        set_word(record, THREAD + 2, thread // (width * height))
        for axis in range(3):
            set_word(record, THREADS + axis, load(job, 8 * (JOB_BLOCK + axis)))
            set_word(record, BLOCKS + axis, load(job, 8 * (JOB_GRID + axis)))
    for z in range(load(job, 8 * JOB_GRID + 16)):
        for y in range(load(job, 8 * JOB_GRID + 8)):
            for x in range(load(job, 8 * JOB_GRID)):
                poison(entry, records)
                for thread in range(count):
                    record = records + thread * RECORD
                    set_word(record, STATUS, READY)
                    set_word(record, OPERATION, PLAIN)
                    set_word(record, BLOCK, x)
                    set_word(record, BLOCK + 1, y)
                    set_word(record, BLOCK + 2, z)
                if suspends == 0:
                    for place in range(count):
                        record = records + word(order, place) * RECORD
                        call_entry(entry, START, record, parameters)
                elif not run_suspending(job, count):
                    store(job, 8 * JOB_FAILED, x)
                    store(job, 8 * JOB_FAILED + 8, y)
                    store(job, 8 * JOB_FAILED + 16, z)
                    return
