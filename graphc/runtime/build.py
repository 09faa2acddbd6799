"""Compiles kernels that no cache has: in this process, and in others beside it.

Numba compiles under one lock, so only processes make it parallel. They are started as
`python graphc/runtime/worker.py`, not by `multiprocessing`, which would run the user's `__main__`
again: this works from a notebook, from standard input and from a script without a main guard.

All take from one queue, the long kernels first. A worker is given a kernel only after it has
imported Numba, and this process compiles meanwhile, so starting workers costs no waiting; and a
worker that dies costs one kernel's time, as this process compiles what comes back unfinished.
With an empty cache a first worker starts while passes still run (`start_early`).
"""

import contextlib
import ctypes
import itertools
import json
import logging
import os
import queue
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from graphc.errors import CompileError
from graphc.runtime.cache import Entry, KernelCache

log = logging.getLogger("graphc.cache")

# progress(done, total, seconds, name): `seconds` since compiling began, `name` just compiled.
Progress = Callable[[int, int, float, str], None]

PARALLEL_FROM: Final = 4  # kernels; fewer are compiled sooner than a worker has imported Numba
KERNELS_A_WORKER: Final = 3
MAX_WORKERS: Final = 8  # each takes about 150 MB
STALL_SECONDS: Final = 120.0
IDLE_SECONDS: Final = 60.0  # how long a worker waits for its first kernels
_numbered_process = 0


class Job(NamedTuple):
    """One kernel to compile."""

    key: str
    name: str
    source: str
    signature: str


def compile_job(job: Job, cache: KernelCache) -> Entry:
    """Compiles in this process and stores the result. Raises CompileError."""
    from graphc.codegen import cuda_build, native

    path = cache.source_path(job.key)
    try:
        _number_symbols_at_random()
        function = native.load_source(job.source, job.name, path)
        if job.signature.startswith(cuda_build.PREFIX):
            symbol, object_bytes = cuda_build.compile_function(function, job.signature)
        else:
            compiled = native.compile_function(function, job.signature)
            symbol, object_bytes = compiled.symbol, compiled.object_bytes
    except Exception as error:
        cache.put_source(job.key, job.source)
        raise CompileError(f"kernel {job.name} ({path}) cannot be compiled: {error}") from error
    if foreign := sorted(name for name in undefined_symbols(object_bytes) if not _in_process(name)):
        cache.put_source(job.key, job.source)
        raise CompileError(
            f"kernel {job.name} ({path}) calls {', '.join(foreign)}, which exists only inside Numba"
        )
    cache.put(job.key, job.source, symbol, object_bytes)
    return Entry(symbol, object_bytes)


def _number_symbols_at_random() -> None:
    """Numba numbers its symbols from 1 in each process, so that two processes give one name to
    different code; and object code of both meets in one linker later. Start at a random number.
    """
    global _numbered_process
    if _numbered_process != os.getpid():  # a child of a fork starts anew
        from numba.core.bytecode import FunctionIdentity

        _numbered_process = os.getpid()
        FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(5), "little"))


def compile_jobs(
    jobs: Sequence[Job],
    cache: KernelCache,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Entry]:
    """Compiles all jobs, by key. `progress` is called in this thread only."""
    crew = _early_crew(cache) if workers != 0 else None
    if workers is None:
        workers = max(_worker_count(len(jobs)), 1 if crew else 0)
    begin = time.perf_counter()
    entries: dict[str, Entry] = {}

    def record(job: Job, entry: Entry) -> None:
        entries[job.key] = entry
        if progress is not None:
            progress(len(entries), len(jobs), time.perf_counter() - begin, job.name)

    if workers == 0:
        for job in jobs:
            record(job, compile_job(job, cache))
        return entries
    with contextlib.ExitStack() as stack:
        shared = cache
        if cache.folder is None:
            folder = tempfile.mkdtemp(prefix="graphc-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            shared = KernelCache(folder)
        assert shared.folder is not None
        crew = crew or _Crew(shared.folder)
        stack.callback(crew.dismiss)
        crew.assign(jobs)
        crew.close()
        crew.hire(workers)
        _compile_parallel(jobs, cache, shared, crew, entries, record)
    return entries


_early: "_Crew | None" = None
_early_lock = threading.Lock()


def start_early(jobs: Sequence[Job], cache: KernelCache) -> None:
    """Begin to compile `jobs` in another process, which the next `compile_jobs` takes over.

    It imports Numba while this process still finds out what else is to be compiled."""
    global _early
    if cache.folder is None or _worker_count(PARALLEL_FROM) == 0:
        return
    with _early_lock:
        if _early is None:
            _early = _Crew(cache.folder)
            _early.assign(jobs)
            _early.hire(1)


def _early_crew(cache: KernelCache) -> "_Crew | None":
    """The process that `start_early` has started for this cache, for the one who asks first."""
    global _early
    with _early_lock:
        crew, _early = _early, None
    if crew is not None and crew.folder != cache.folder:
        crew.dismiss()
        return None
    return crew


def _forget_early() -> None:
    # After a fork: the processes and threads are the parent's.
    global _early, _early_lock
    _early, _early_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_early)


def _worker_count(jobs: int) -> int:
    if text := os.environ.get("GRAPHC_COMPILE_WORKERS"):
        return max(0, int(text))
    if jobs < PARALLEL_FROM or not sys.executable:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores - 1, jobs // KERNELS_A_WORKER, MAX_WORKERS)


def _compile_parallel(
    jobs: Sequence[Job],
    cache: KernelCache,
    shared: KernelCache,
    crew: "_Crew",
    entries: dict[str, Entry],
    record: Callable[[Job, Entry], None],
) -> None:
    wanted = {job.key for job in jobs}

    def take(job: Job, stored: bool) -> None:
        if job.key in wanted:
            entry = shared.get(job.key) if stored else None
            record(job, entry or compile_job(job, cache))

    while len(entries) < len(jobs):
        job = crew.take()
        if job is None:
            try:
                take(*crew.results.get(timeout=STALL_SECONDS))
            except queue.Empty:
                log.warning("a compiling process does not answer; it is ended")
                crew.kill()
            continue
        record(job, compile_job(job, cache))
        with contextlib.suppress(queue.Empty):
            while True:
                take(*crew.results.get_nowait())


class _Crew:
    """Compiling processes, and the queue that they and their employer take jobs from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # What becomes of jobs that went to a worker: (job, whether the worker has stored it).
        self.results: queue.SimpleQueue[tuple[Job, bool]] = queue.SimpleQueue()
        self._pending: deque[Job] = deque()
        self._taken: set[str] = set()
        self._closed = False
        self._changed = threading.Condition()
        self._workers: list[_Worker] = []

    def hire(self, workers: int) -> None:
        """Start processes until there are as many."""
        working = sum(worker.alive for worker in self._workers)
        self._workers += [_Worker(self) for _ in range(workers - working)]

    def assign(self, jobs: Sequence[Job]) -> None:
        """The jobs to do, instead of those that nobody has taken yet; the long ones first."""
        with self._changed:
            new = [job for job in jobs if job.key not in self._taken]
            self._pending = deque(sorted(new, key=lambda job: -len(job.source)))
            self._changed.notify_all()

    def close(self) -> None:
        """No more jobs will be assigned: workers need not wait for any."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, wait: float = 0.0) -> Job | None:
        """The next job; None if there is none, in an open crew after `wait` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed, wait)
            if not self._pending:
                return None
            self._taken.add(self._pending[0].key)
            return self._pending.popleft()

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()

    def dismiss(self) -> None:
        """End all processes. What they store, they store atomically."""
        self.close()
        self.kill()
        for worker in self._workers:
            worker.join()


class _Worker:
    """A compiling process and the thread that hands it one job after the other."""

    def __init__(self, crew: _Crew) -> None:
        self._crew = crew
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = _start_process(str(crew.folder))
        except OSError as error:
            log.warning("no compiling process can be started: %s", error)
            return
        self._thread = threading.Thread(
            target=self._feed, args=(self._process,), name="graphc-build", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._thread.is_alive()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def join(self) -> None:
        if self._process is not None:
            self._thread.join()
            with contextlib.suppress(OSError):
                self._process.communicate()

    def _feed(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            return
        while (job := self._crew.take(IDLE_SECONDS)) is not None:
            stored = alive = False
            try:
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                alive = bool(answer)
                stored = answer == b"stored\n"
            except (OSError, ValueError):
                pass
            self._crew.results.put((job, stored))
            if not alive:
                return
        process.kill()  # it has nothing to do


def _start_process(folder: str) -> "subprocess.Popen[bytes]":
    """The worker finds its modules where this process does, whatever the current folder holds."""
    root = str(Path(__file__).resolve().parents[2])
    search = [root, *(os.path.abspath(path) for path in sys.path if path)]
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("worker.py")), os.path.abspath(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("GRAPHC_LOG") else subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONSAFEPATH": "1"},
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )


def undefined_symbols(object_bytes: bytes) -> set[str]:
    """Names an ELF64 little-endian object needs from elsewhere; empty for other formats.

    The JIT links a missing function as address 0 without a word: better refused when compiled.
    """
    if object_bytes[:6] != b"\x7fELF\x02\x01":
        return set()
    sections_at = struct.unpack_from("<Q", object_bytes, 40)[0]
    count = struct.unpack_from("<H", object_bytes, 60)[0]
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", object_bytes, sections_at + 64 * index)
        for index in range(count)
    ]
    names: set[str] = set()
    for section in sections:
        if section[1] != 2:  # SHT_SYMTAB
            continue
        strings = sections[section[6]][4]
        for at in range(section[4] + 24, section[4] + section[5], 24):
            name, info, _, defined_in = struct.unpack_from("<IBBH", object_bytes, at)
            if defined_in == 0 and info >> 4 == 1:  # SHN_UNDEF, STB_GLOBAL
                end = object_bytes.index(b"\0", strings + name)
                names.add(object_bytes[strings + name : end].decode())
    return names


def _in_process(symbol: str) -> bool:
    """Whether the C library or the interpreter defines `symbol`, with or without Numba."""
    try:
        getattr(ctypes.CDLL(None), symbol)
    except (AttributeError, TypeError):
        return sys.platform == "win32"
    return True
