"""The record of one emulated CUDA thread: int32 words shared by the kernel's native code, which
`emulate_ir.py` makes, and the scheduler, `_emulate_native.py`.

The records of a block lie side by side, in the order of the thread's number in the block, so that
a warp is 32 neighbouring ones.
"""

from typing import Final

STATUS: Final = 0  # READY, or why the thread stopped
OPERATION: Final = 1  # what it waits for: a barrier's kind, or a warp operation
MASK: Final = 2  # lanes that take part in the warp operation, a bit each
LANE: Final = 3
THREAD: Final = 4  # threadIdx, x y z
BLOCK: Final = 7  # blockIdx
THREADS: Final = 10  # blockDim
BLOCKS: Final = 13  # gridDim
HANDLE: Final = 16  # two words: the suspended coroutine
INPUT: Final = 20  # operands of an operation
INPUTS: Final = 16
OUTPUT: Final = 40  # and its results
OUTPUTS: Final = 8
WORDS: Final = 64
WARP: Final = 32

# STATUS
READY: Final = 0
FINISHED: Final = 1
AT_BARRIER: Final = 2
AT_WARP: Final = 3

# OPERATION at a barrier: what every thread gets to know about everybody's predicate
PLAIN: Final = 0
COUNT: Final = 1
ALL: Final = 2
ANY: Final = 3

# OPERATION of a warp
SYNC: Final = 1
SHUFFLE: Final = 2
VOTE: Final = 3
MATRIX: Final = 4  # ldmatrix.x4
MATRIX_TRANSPOSED: Final = 5
MMA_TF32: Final = 6  # m16n8k8
MMA_BF16: Final = 7  # m16n8k16
MMA_F16: Final = 8  # m16n8k16

# What a kernel's entry is asked: to start a thread, resume it, or free it; where its shared memory
# is, as a table of (address, bytes) ended by zeros; whether its threads ever wait for each other.
START: Final = 0
RESUME: Final = 1
DESTROY: Final = 2
SHARED: Final = 3
SUSPENDS: Final = 4

# What is asked of the scheduler: int64 words of a job
JOB_ENTRY: Final = 0  # address of the kernel's entry; see `emulate_ir.py`
JOB_PARAMETERS: Final = 1
JOB_RECORDS: Final = 2
JOB_ORDER: Final = 3  # address of int32 numbers of threads: who runs before whom
JOB_GRID: Final = 4  # x y z
JOB_BLOCK: Final = 7
JOB_STUCK: Final = 10  # out: whether threads of a block waited for ever
JOB_FAILED: Final = 11  # out: the block, x y z
JOB_BARRIER: Final = 14  # out: how many threads waited at a barrier, in a warp, and had finished
JOB_WARP: Final = 15
JOB_DONE: Final = 16
JOB_WORDS: Final = 17
