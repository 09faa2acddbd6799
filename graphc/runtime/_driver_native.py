"""The native driver: walks a launch table, alone or as one thread of a team.

Compiled once for all models and kept in the kernel cache, so this module is imported (with Numba)
only where the cache has no driver yet; `graphc.runtime.driver` reads it as text otherwise.

Memory is reached through plain integer addresses: there are no arrays, hence nothing from Numba's
run-time library in the object code. All atomics are sequentially consistent; on the hot path they
cost no more than weaker ones (x86: the same instructions), and the proofs in `team.py` need it.
"""

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from graphc.runtime import control as c

# Helpers are called by native code only: without the wrappers for Python they compile faster.
native = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

_I8P = ir.IntType(8).as_pointer()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_MACHINE = llvmlite.binding.get_default_triple().split("-")[0]
_IS_X86 = _MACHINE in ("x86_64", "amd64", "i386", "i486", "i586", "i686")
_IS_ARM = _MACHINE in ("aarch64", "arm64", "arm64e")


def _pointer(builder, address):
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def load(typing_context, address):
    def emit(context, builder, signature, args):
        return builder.load(_pointer(builder, args[0]))

    return types.int64(types.int64), emit


@intrinsic
def store(typing_context, address, value):
    def emit(context, builder, signature, args):
        builder.store(args[1], _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def atomic_load(typing_context, address):
    def emit(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), emit


@intrinsic
def atomic_store(typing_context, address, value):
    def emit(context, builder, signature, args):
        builder.store_atomic(args[1], _pointer(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def atomic_add(typing_context, address, value):
    """Adds and returns the value before the addition."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


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
def call_kernel(typing_context, function, arguments, thread, threads):
    """Calls a compiled kernel by address; returns its status, 0 for success.

    Numba's native convention: int32 f(result**, exception**, arguments...).
    """

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(_I32, [_I8P.as_pointer(), _I8P.as_pointer(), _I64, _I64, _I64])
        function = builder.inttoptr(args[0], kind.as_pointer())
        result = cgutils.alloca_once(builder, _I8P)
        exception = cgutils.alloca_once(builder, _I8P)
        status = builder.call(function, [result, exception, args[1], args[2], args[3]])
        return builder.sext(status, _I64)

    return types.int64(*[types.int64] * 4), emit


@intrinsic
def call_system(typing_context, function, a, b, c_, d):
    """Calls a C function of up to four integer or pointer arguments by address.

    A function that takes fewer ignores the rest: in the C conventions of x86-64 and ARM64 the
    first four travel in registers that belong to the caller.
    """

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 4).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


@native
def wait_while(control, address, value):
    """Returns when the word at `address` no longer is `value`."""
    limit = load(control + c.SPIN_LIMIT)
    polls = 0
    while atomic_load(address) == value:
        if polls < limit:
            polls += 1
            pause()
        else:  # cores are shared: the thread waited for may need this one
            call_system(load(control + c.YIELD), 0, 0, 0, 0)


@native
def barrier(control, threads):
    turn = atomic_load(control + c.BARRIER_TURN)
    if atomic_add(control + c.BARRIER_COUNT, 1) == threads - 1:
        atomic_store(control + c.BARRIER_COUNT, 0)
        atomic_add(control + c.BARRIER_TURN, 1)
    else:
        wait_while(control, control + c.BARRIER_TURN, turn)


@native
def drive(control, program, thread, threads):
    """Runs this thread's share of every row; stamps begin and end of each if there is a place.

    A kernel that fails does not stop the walk, as other threads count on this one at the barriers.
    """
    row = load(program + c.REQUEST_TABLE)
    rows = load(program + c.REQUEST_ROWS)
    timing = load(program + c.REQUEST_TIMING)
    stamp = timing + thread * rows * 16
    for index in range(rows):
        function = load(row + c.ROW_FUNCTION)
        arguments = load(row + c.ROW_ARGUMENTS)
        flags = load(row + c.ROW_FLAGS)
        if timing != 0:
            store(stamp, ticks())
        status = 0
        if flags & c.ALONE == 0:
            status = call_kernel(function, arguments, thread, threads)
        elif thread == 0:
            status = call_kernel(function, arguments, 0, 1)
        if timing != 0:
            store(stamp + 8, ticks())
            stamp += 16
        if status != 0:
            atomic_store(program + c.REQUEST_FAILED, index + 1)
        if flags & c.BARRIER and threads > 1:
            barrier(control, threads)
        row += c.ROW_BYTES


@native
def wait_for_program(control, seen):
    """Returns when GENERATION no longer is `seen`: polls a while, then blocks.

    The blocking half is a monitor: the generation is compared with the mutex held, and whoever
    posts a program while SLEEPERS is not 0 wakes all with the mutex held. See `team.py` for why no
    wake-up is lost.
    """
    begin = ticks()
    idle = load(control + c.IDLE_TICKS)
    limit = load(control + c.SPIN_LIMIT)
    polls = 0
    while atomic_load(control + c.GENERATION) == seen:
        if polls < limit:
            polls += 1
            pause()
        else:
            call_system(load(control + c.YIELD), 0, 0, 0, 0)
        if ticks() - begin > idle:
            mutex = control + c.MUTEX
            call_system(load(control + c.LOCK), mutex, 0, 0, 0)
            atomic_add(control + c.SLEEPERS, 1)
            while atomic_load(control + c.GENERATION) == seen:
                # The third and fourth argument are Windows' (no time limit, no flags).
                call_system(load(control + c.WAIT), control + c.CONDITION, mutex, -1, 0)
            atomic_add(control + c.SLEEPERS, -1)
            call_system(load(control + c.UNLOCK), mutex, 0, 0, 0)


@native
def post(control, program):
    """Hands a program to the workers and wakes those that sleep."""
    store(control + c.PROGRAM, program)
    atomic_add(control + c.GENERATION, 1)
    if atomic_load(control + c.SLEEPERS) != 0:
        mutex = control + c.MUTEX
        call_system(load(control + c.LOCK), mutex, 0, 0, 0)
        call_system(load(control + c.WAKE_ALL), control + c.CONDITION, 0, 0, 0)
        call_system(load(control + c.UNLOCK), mutex, 0, 0, 0)


def participate(request):
    """Runs as the thread that `request` (see `control.py`) says.

    Thread 0 runs the request's program with the whole team and returns when every thread has
    finished. If STOP is set, it only makes the workers leave, whether they poll or sleep.

    Other threads run their share of each program posted, until the team is stopped.
    """
    control = load(request + c.REQUEST_CONTROL)
    thread = load(request + c.REQUEST_THREAD)
    threads = load(control + c.THREADS)
    program = request
    seen = 0
    if thread == 0:
        store(program + c.REQUEST_FAILED, 0)
        if threads > 1:
            post(control, program)
    while True:
        if thread != 0:
            wait_for_program(control, seen)
            seen = atomic_load(control + c.GENERATION)
            program = load(control + c.PROGRAM)
        if load(control + c.STOP) != 0:
            if thread != 0:
                atomic_add(control + c.LEFT, 1)  # the last use of the control block
            return
        drive(control, program, thread, threads)
        if thread == 0:
            break
        atomic_add(control + c.DONE, 1)
    if threads > 1:
        done = atomic_load(control + c.DONE)
        while done != threads - 1:
            wait_while(control, control + c.DONE, done)
            done = atomic_load(control + c.DONE)
        atomic_store(control + c.DONE, 0)
    if load(program + c.REQUEST_FAILED) != 0:
        raise RuntimeError


def clock(result):
    """Writes the tick counter to the address `result`."""
    store(result, ticks())
