"""Byte offsets shared by the native driver and the Python that sets it up.

A team's control block is one aligned array of int64. Words that different threads write lie on
different 128-byte lines (two cache lines: x86 prefetches them in pairs), else every arrival at a
barrier would take the line away from the threads that poll its neighbour.
"""

from typing import Final

# A row of the launch table: [function address, arguments address, flags, blocks, step, strips,
# claims], int64 each. The arguments of thread t lie t * step bytes further.
ROW_FUNCTION: Final = 0
ROW_ARGUMENTS: Final = 8
ROW_FLAGS: Final = 16
ROW_BLOCKS: Final = 24
ROW_STEP: Final = 32
ROW_STRIPS: Final = 40
ROW_CLAIMS: Final = 48
ROW_BYTES: Final = 56

BARRIER: Final = 1  # all threads finish this row before any of them starts the next
ALONE: Final = 2  # thread 0 runs the row by itself, as kernel(arguments, 0, 1)
# The first row of a group says in its flags, shifted by GROUP_SHIFT, how many rows the group has:
# each thread runs all of them on one block of its share of ROW_BLOCKS, as kernel(arguments, block,
# blocks), then on the next. With ROW_CLAIMS, the address of a word for each thread, CLAIM_BYTES
# apart, that counts the blocks of its share that are taken, a thread that is done goes on with
# those that others have left. The last row's BARRIER ends the group. A row within a group at which
# ROW_STRIPS is not 0 begins a run of its low STRIPS_SHIFT bits many rows, which go through a block
# strip by strip, of as many as the bits above say.
GROUP_SHIFT: Final = 8
STRIPS_SHIFT: Final = 8
CLAIM_BYTES: Final = 128

# A request: what one call of the driver is asked to do. Thread 0's also describes the program that
# the team runs. The last two words take the result and exception pointers that Numba's calling
# convention wants.
REQUEST_CONTROL: Final = 0
REQUEST_THREAD: Final = 8
REQUEST_TABLE: Final = 16
REQUEST_ROWS: Final = 24
REQUEST_TIMING: Final = 32  # address of int64[threads, rows, 2] for begin and end ticks, or 0
REQUEST_FAILED: Final = 40  # out: 1 + index of a row whose kernel returned an error status, or 0
REQUEST_LIMIT: Final = 48  # ticks; a longer run of thread 0 returns a status that is not 0; 0: none
REQUEST_RESULT: Final = 56
REQUEST_EXCEPTION: Final = 64
REQUEST_BYTES: Final = 72

# The control block. First what is written while a program runs.
BARRIER_COUNT: Final = 0  # threads that have arrived at the barrier
BARRIER_TURN: Final = 128  # number of barriers passed
GENERATION: Final = 256  # number of programs posted to the workers
PROGRAM: Final = 264  # address of thread 0's request; written before GENERATION, read after it
STOP: Final = 272  # with the next GENERATION, workers leave their loop
DONE: Final = 384  # workers that have finished the posted program
SLEEPERS: Final = 512  # workers that are about to block, or block, on the condition variable
LEFT: Final = 520  # workers that have left their loop for good
PATIENCE: Final = 640  # ticks that a thread polls for another before it blocks; then the maximum
IDLE_PATIENCE: Final = 656  # ticks that a worker polls for a program; then the maximum

# Constant once the team exists.
THREADS: Final = 768
LOCK: Final = 776  # addresses of functions of the operating system
UNLOCK: Final = 784
WAIT: Final = 792
WAKE_ALL: Final = 800
MUTEX: Final = 896  # storage of the operating system's mutex and condition variable
CONDITION: Final = 1024
CONTROL_BYTES: Final = 1152
