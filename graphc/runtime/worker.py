"""A compiling process: this file, run with the cache's FOLDER, started by `graphc.runtime.build`.

Says `ready` once Numba is imported. Then reads jobs, one JSON line each, stores the object code in
the cache FOLDER and answers `stored` or `failed`; ends with its standard input. Errors are not
described: the parent compiles a failed kernel itself, and so meets the error where it can be read.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType


def main(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends us
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # so that nothing a library prints is taken for an answer
    from graphc.codegen import native, simd  # noqa: F401
    from graphc.errors import CompileError
    from graphc.runtime.build import Job, compile_job
    from graphc.runtime.cache import KernelCache

    cache = KernelCache(folder)
    answers.write(b"ready\n")
    for line in sys.stdin.buffer:
        job = Job(*json.loads(line))
        try:
            compile_job(job, cache)
        except CompileError:
            answers.write(b"failed\n")
        else:
            answers.write(b"stored\n")


if __name__ == "__main__":
    # A bare package: `import graphc` would load the whole compiler, which takes as long as Numba.
    package = ModuleType("graphc")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["graphc"] = package
    main(sys.argv[1])
