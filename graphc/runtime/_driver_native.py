"""The native driver: walks a launch table, alone or as one thread of a team.

Compiled once for all models and kept in the kernel cache, so this module is imported (with Numba)
only where the cache has no driver yet; `graphc.runtime.driver` reads it as text otherwise.

Memory is reached through plain integer addresses: there are no arrays, hence nothing from Numba's
run-time library in the object code. All atomics are sequentially consistent; on the hot path they
cost no more than weaker ones (x86: the same instructions), and the proofs in `team.py` need it.
"""

# Numba's stubs know neither intrinsics nor all options.
# mypy: disable-error-code="call-arg, call-overload, var-annotated"
import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from graphc.codegen.native import KernelCompiler
from graphc.runtime.control import (
    ALONE,
    BARRIER,
    BARRIER_COUNT,
    BARRIER_TURN,
    CLAIM_BYTES,
    CONDITION,
    DONE,
    GENERATION,
    GROUP_SHIFT,
    IDLE_PATIENCE,
    LEFT,
    LOCK,
    MUTEX,
    PATIENCE,
    PROGRAM,
    REQUEST_CONTROL,
    REQUEST_FAILED,
    REQUEST_LIMIT,
    REQUEST_ROWS,
    REQUEST_TABLE,
    REQUEST_THREAD,
    REQUEST_TIMING,
    ROW_ARGUMENTS,
    ROW_BLOCKS,
    ROW_BYTES,
    ROW_CLAIMS,
    ROW_FLAGS,
    ROW_FUNCTION,
    ROW_STEP,
    ROW_STRIPS,
    SLEEPERS,
    STOP,
    STRIPS_SHIFT,
    THREADS,
    UNLOCK,
    WAIT,
    WAKE_ALL,
)

# Helpers are called by native code only: without the wrappers for Python they compile faster.
native = njit(
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    pipeline_class=KernelCompiler,
)

_I8P = ir.IntType(8).as_pointer()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_MACHINE = llvmlite.binding.get_default_triple().split("-")[0]
_IS_X86 = _MACHINE in ("x86_64", "amd64", "i386", "i486", "i586", "i686")
_IS_ARM = _MACHINE in ("aarch64", "arm64", "arm64e")


def _word(builder, base, offset):
    return builder.inttoptr(builder.add(base, offset), _I64.as_pointer())


@intrinsic
def load(typing_context, base, offset):
    """The int64 at the address `base + offset`."""

    def emit(context, builder, signature, args):
        return builder.load(_word(builder, *args))

    return types.int64(types.int64, types.int64), emit


@intrinsic
def store(typing_context, base, offset, value):
    def emit(context, builder, signature, args):
        builder.store(args[2], _word(builder, *args[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def atomic_load(typing_context, base, offset):
    def emit(context, builder, signature, args):
        return builder.load_atomic(_word(builder, *args), "seq_cst", 8)

    return types.int64(types.int64, types.int64), emit


@intrinsic
def atomic_store(typing_context, base, offset, value):
    def emit(context, builder, signature, args):
        builder.store_atomic(args[2], _word(builder, *args[:2]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def atomic_add(typing_context, base, offset, value):
    """Adds to the word and returns what it was before."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", _word(builder, *args[:2]), args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def pause(typing_context):
    """Tells the core that this is a polling loop: saves power, lets a sibling thread run."""

    def emit(context, builder, signature, args):
        void = ir.FunctionType(ir.VoidType(), [])
        if _IS_X86:
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, void, name), [])
        elif _IS_ARM:  # isb waits about as long as x86's pause; yield is a no-op on most cores
            builder.asm(void, "isb", "~{memory}", [], side_effect=True)
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def ticks(typing_context):
    """A monotonic counter of constant rate, the same on all cores."""

    def emit(context, builder, signature, args):
        counter = ir.FunctionType(_I64, [])
        if _IS_ARM:  # the cycle counter is closed to user programs there
            return builder.asm(counter, "mrs $0, cntvct_el0", "=r", [], side_effect=True)
        name = "llvm.readcyclecounter"
        return builder.call(cgutils.get_or_insert_function(builder.module, counter, name), [])

    return types.int64(), emit


@intrinsic
def call_kernel(typing_context, row, arguments, thread, threads):
    """Calls the kernel of a row of the launch table; returns its status, 0 for success.

    Numba's native convention: int32 f(result**, exception**, arguments...).
    """

    def emit(context, builder, signature, args):
        row, arguments, thread, threads = args
        function = builder.load(_word(builder, row, _I64(ROW_FUNCTION)))
        kind = ir.FunctionType(_I32, [_I8P.as_pointer(), _I8P.as_pointer(), _I64, _I64, _I64])
        result = cgutils.alloca_once(builder, _I8P)
        exception = cgutils.alloca_once(builder, _I8P)
        status = builder.call(
            builder.inttoptr(function, kind.as_pointer()),
            [result, exception, arguments, thread, threads],
        )
        return builder.sext(status, _I64)

    return types.int64(types.int64, types.int64, types.int64, types.int64), emit


@intrinsic
def call_system(typing_context, control, function, first, second):
    """Calls a function of the operating system with addresses of two objects in the control block.

    All three are offsets in the control block. The third and fourth argument are what Windows
    wants to know for WAIT (no time limit, no flags). A function that takes fewer ignores the
    rest: in the C conventions of x86-64 and ARM64 they travel in the caller's registers.
    """

    def emit(context, builder, signature, args):
        control, function, first, second = args
        address = builder.load(_word(builder, control, function))
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 4).as_pointer()
        objects = [builder.add(control, first), builder.add(control, second)]
        builder.call(builder.inttoptr(address, kind), [*objects, _I64(-1), _I64(0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@native
def wait_while(control, offset, value, patience):
    """Returns when the word at `offset` no longer is `value`: polls a while, then blocks.

    How long it polls, in ticks, is the word at `patience`; the next word is its maximum. Where
    polling fails it soon is not tried for long: the thread waited for may need this core. Where it
    has become all but nothing it starts anew, else it would not be noticed when polling pays again.

    The blocking half is a monitor: the word is compared with the mutex held, and whoever changes
    it while SLEEPERS is not 0 wakes all with the mutex held. See `team.py` for why no wake-up is
    lost.
    """
    limit = load(control, patience)
    begin = ticks()
    while atomic_load(control, offset) == value:
        pause()
        if ticks() - begin > limit:
            most = load(control, patience + 8)
            store(control, patience, limit >> 1 if limit > most >> 16 else most)
            call_system(control, LOCK, MUTEX, 0)
            atomic_add(control, SLEEPERS, 1)
            while atomic_load(control, offset) == value:
                call_system(control, WAIT, CONDITION, MUTEX)
            atomic_add(control, SLEEPERS, -1)
            call_system(control, UNLOCK, MUTEX, 0)
            return
    most = load(control, patience + 8)
    if limit < most:
        store(control, patience, min(2 * limit + 1, most))


@native
def wake(control):
    """To be called after a change of a word that threads may be waiting for."""
    if atomic_load(control, SLEEPERS) != 0:
        call_system(control, LOCK, MUTEX, 0)
        call_system(control, WAKE_ALL, CONDITION, 0)
        call_system(control, UNLOCK, MUTEX, 0)


@native
def barrier(control, threads):
    turn = atomic_load(control, BARRIER_TURN)
    if atomic_add(control, BARRIER_COUNT, 1) == threads - 1:
        atomic_store(control, BARRIER_COUNT, 0)
        atomic_add(control, BARRIER_TURN, 1)
        wake(control)
    else:
        wait_while(control, BARRIER_TURN, turn, PATIENCE)


@native
def take(claims, owner, taken):
    """The number of the next block of a thread's share, of which `taken` are known to be taken."""
    return taken if claims == 0 else atomic_add(claims, owner * CLAIM_BYTES, 1)


@native
def forget_claims(program, threads):
    """Before a program runs: no block is taken yet."""
    row = load(program, REQUEST_TABLE)
    for _ in range(load(program, REQUEST_ROWS)):
        claims = load(row, ROW_CLAIMS)
        if claims != 0:
            for thread in range(threads):
                store(claims, thread * CLAIM_BYTES, 0)
        row += ROW_BYTES


@native
def drive_block(row, rows, block, blocks, thread, stamp):
    """Runs the rows of a group on one block; returns the status."""
    failed = 0
    index = 0
    while index < rows:
        run = load(row + index * ROW_BYTES, ROW_STRIPS)
        strips = max(run >> STRIPS_SHIFT, 1)
        length = max(run & ((1 << STRIPS_SHIFT) - 1), 1)
        for strip in range(block * strips, (block + 1) * strips):
            for number in range(index, index + length):
                begin = ticks() if stamp != 0 else 0
                this = row + number * ROW_BYTES
                arguments = load(this, ROW_ARGUMENTS) + thread * load(this, ROW_STEP)
                status = call_kernel(this, arguments, strip, blocks * strips)
                if stamp != 0:
                    end = stamp + number * 16
                    store(end, 8, load(end, 8) + ticks() - begin)
                if status != 0:
                    failed = status
        index += length
    return failed


@native
def drive_group(row, rows, thread, threads, stamp):
    """Runs the rows of a group on each block of this thread's share, and then on what is left of
    others', if blocks are claimed; returns the status.

    Where there is a place for stamps, the time of all blocks is added up after the group's begin.
    """
    blocks, claims = load(row, ROW_BLOCKS), load(row, ROW_CLAIMS)
    failed = 0
    if stamp != 0:
        begin = ticks()
        for index in range(rows):
            store(stamp, index * 16, begin)
            store(stamp, index * 16 + 8, begin)
    for turn in range(1 if claims == 0 else threads):
        owner = (thread + turn) % threads
        first, last = blocks * owner // threads, blocks * (owner + 1) // threads
        taken = take(claims, owner, 0)
        while first + taken < last:
            status = drive_block(row, rows, first + taken, blocks, thread, stamp)
            if status != 0:
                failed = status
            taken = take(claims, owner, taken + 1)
    return failed


@native
def drive(control, program, thread, threads):
    """Runs this thread's share of every row; stamps begin and end of each if there is a place.

    A kernel that fails does not stop the walk, as other threads count on this one at the barriers.
    """
    row = load(program, REQUEST_TABLE)
    rows = load(program, REQUEST_ROWS)
    timing = load(program, REQUEST_TIMING)
    stamp = timing + thread * rows * 16 if timing != 0 else 0
    index = 0
    while index < rows:
        flags = load(row, ROW_FLAGS)
        count = flags >> GROUP_SHIFT
        status = 0
        if count > 0:
            status = drive_group(row, count, thread, threads, stamp)
            row += (count - 1) * ROW_BYTES
            index += count - 1
            flags = load(row, ROW_FLAGS)
            if timing != 0:
                stamp += count * 16
        else:
            if timing != 0:
                store(stamp, 0, ticks())
            if flags & ALONE == 0:
                status = call_kernel(row, load(row, ROW_ARGUMENTS), thread, threads)
            elif thread == 0:
                status = call_kernel(row, load(row, ROW_ARGUMENTS), 0, 1)
            if timing != 0:
                store(stamp, 8, ticks())
                stamp += 16
        if status != 0:
            atomic_store(program, REQUEST_FAILED, index + 1)
        if flags & BARRIER and threads > 1:
            barrier(control, threads)
        row += ROW_BYTES
        index += 1


def participate(request):
    """Runs as the thread that `request` (see `control.py`) says.

    Thread 0 runs the request's program with the whole team and returns when every thread has
    finished; the status is not 0 if a kernel failed or the time limit has passed. If STOP is set,
    it only makes the workers leave, whether they poll or sleep.

    Other threads run their share of each program posted, until the team is stopped.
    """
    control = load(request, REQUEST_CONTROL)
    thread = load(request, REQUEST_THREAD)
    threads = load(control, THREADS)
    program = request
    seen = 0
    begin = ticks()
    if thread == 0:
        store(program, REQUEST_FAILED, 0)
        forget_claims(program, threads)
        if threads > 1:
            store(control, PROGRAM, program)
            atomic_add(control, GENERATION, 1)
            wake(control)
    while True:
        if thread != 0:
            wait_while(control, GENERATION, seen, IDLE_PATIENCE)
            seen = atomic_load(control, GENERATION)
            program = load(control, PROGRAM)
        if load(control, STOP) != 0:
            if thread != 0:
                atomic_add(control, LEFT, 1)  # the last use of the control block
            return
        drive(control, program, thread, threads)
        if thread == 0:
            break
        atomic_add(control, DONE, 1)
        wake(control)
    if threads > 1:
        done = atomic_load(control, DONE)
        while done != threads - 1:
            wait_while(control, DONE, done, PATIENCE)
            done = atomic_load(control, DONE)
        atomic_store(control, DONE, 0)
    limit = load(program, REQUEST_LIMIT)
    late = limit != 0 and ticks() - begin > limit
    if late or load(program, REQUEST_FAILED) != 0:
        raise RuntimeError


def clock(result):
    """Writes the tick counter to the address `result`."""
    store(result, 0, ticks())
