"""From kernel sources to callable addresses: cache, compiler and llvmlite's linker put together.

Trap: an address is only good while the engine that linked it lives. llvmlite frees the code when
the engine object is collected, and the next call crashes. `LinkedCode` owns the engine;
`load_kernels` keeps every one of them for the life of the process, since a table of addresses
cannot keep anything alive, and a whole network's code is a few hundred kilobytes.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from graphc.errors import GraphcError
from graphc.runtime.build import Job, Progress, compile_jobs, start_early
from graphc.runtime.cache import KERNEL_SIGNATURE, Entry, KernelCache, default_cache

log = logging.getLogger("graphc.cache")


@dataclass(frozen=True)
class KernelSource:
    """Generated Python text that defines the function `name`, to be compiled with `signature`."""

    name: str
    source: str
    signature: str = KERNEL_SIGNATURE


class LinkedCode:
    """Object code that llvmlite has linked into this process, and the engine that owns it."""

    def __init__(self, objects: Sequence[Entry]) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            jit=True, codemodel="jitdefault"
        )
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for entry in objects:
            engine.add_object_file(llvm.ObjectFileRef.from_data(entry.object_bytes))
        engine.finalize_object()
        self._engine = engine

    def address(self, symbol: str) -> int:
        """Address of a linked function; valid while this object lives."""
        found = self._engine.get_function_address(symbol)
        if not found:
            raise GraphcError(f"linked object code does not define {symbol}")
        return found

    def keep_forever(self) -> None:
        """Never frees the code: not even at interpreter exit, where threads may still run it."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))


def link(objects: Sequence[Entry]) -> LinkedCode:
    """Links object code with one engine, which costs about 0.03 ms an object (an engine each: 0.8).

    All symbols must differ: the engine would silently take one definition for another.
    """
    symbols = [entry.symbol for entry in objects]
    if len(set(symbols)) != len(symbols):
        raise GraphcError("two objects to be linked define the same symbol")
    return LinkedCode(objects)


@dataclass(frozen=True)
class LoadedKernels:
    """Kernels ready to be called, in the order of the sources they were asked for."""

    sources: tuple[KernelSource, ...]
    keys: tuple[str, ...]
    addresses: tuple[int, ...]
    paths: tuple[str, ...]  # the readable source of each
    compiled: tuple[str, ...]  # names of those that were in no cache

    def address(self, name: str) -> int:
        """Address of the first kernel called `name`."""
        for source, address in zip(self.sources, self.addresses, strict=True):
            if source.name == name:
                return address
        raise KeyError(name)


_addresses: dict[str, int] = {}  # by key: what this process has linked
_lock = threading.RLock()


@dataclass(frozen=True)
class FetchedKernels:
    """Compiled kernels that somebody else will link, in the order of their sources."""

    keys: tuple[str, ...]
    entries: tuple[Entry, ...]
    paths: tuple[str, ...]  # the readable source of each
    compiled: tuple[str, ...]  # names of those that were in no cache


def fetch_kernels(
    sources: Sequence[KernelSource],
    cache: KernelCache | None = None,
    progress: Progress | None = None,
) -> FetchedKernels:
    """The compiled form of every source, from the cache or the compiler. Raises CompileError."""
    cache = cache or default_cache()
    keys = tuple(_key(source, cache) for source in sources)
    by_key = dict(zip(keys, sources, strict=True))
    with _lock:
        entries, compiled = _entries(by_key, cache, progress)
    paths = tuple(cache.source_path(key) for key in keys)
    return FetchedKernels(keys, tuple(entries[key] for key in keys), paths, compiled)


def _entries(
    by_key: dict[str, KernelSource],
    cache: KernelCache,
    progress: Progress | None,
    workers: int | None = None,
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Entries by key, and names of those that no cache had."""
    entries = {key: entry for key in by_key if (entry := cache.get(key)) is not None}
    jobs = [
        Job(key, source.name, source.source, source.signature)
        for key, source in by_key.items()
        if key not in entries
    ]
    log.info(
        "%d kernels to load: %d on disk, %d to compile; folder %s",
        len(by_key),
        len(entries),
        len(jobs),
        cache.folder,
    )
    if jobs:
        entries |= compile_jobs(jobs, cache, progress, workers)
    return entries, tuple(job.name for job in jobs)


def load_kernels(
    sources: Sequence[KernelSource],
    cache: KernelCache | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> LoadedKernels:
    """Gives every source an address: from this process's memory, the cache, or the compiler.

    Equal sources share one kernel. The driver is compiled along if it is missing too, so that it
    does not wait for its turn later. `workers` is the number of compiling processes beside this
    one (default: by the number of cores and of kernels to compile). Raises CompileError with the
    kernel's name and file.
    """
    cache = cache or default_cache()
    keys = tuple(_key(source, cache) for source in sources)
    by_key = dict(zip(keys, sources, strict=True))
    if any(key not in _addresses for key in keys):
        from graphc.runtime.driver import driver_sources

        for source in driver_sources():
            by_key.setdefault(_key(source, cache), source)
    compiled: tuple[str, ...] = ()
    with _lock:
        missing = {key: source for key, source in by_key.items() if key not in _addresses}
        entries: dict[str, Entry] = {}
        if missing:
            entries, compiled = _entries(missing, cache, progress, workers)
        if entries:
            _link_into_process(entries)
        addresses = tuple(_addresses[key] for key in keys)
    paths = tuple(cache.source_path(key) for key in keys)
    return LoadedKernels(tuple(sources), keys, addresses, paths, compiled)


def start_compiling(cache: KernelCache | None = None) -> None:
    """Compile the driver in another process if no cache has it.

    A sign that the cache is empty: the process will soon be needed for kernels."""
    from graphc.runtime.driver import driver_sources

    cache = cache or default_cache()
    jobs = [
        Job(key, source.name, source.source, source.signature)
        for source in driver_sources()
        if (key := _key(source, cache)) not in _addresses and cache.get(key) is None
    ]
    if jobs:
        start_early(jobs, cache)


def _key(source: KernelSource, cache: KernelCache) -> str:
    return cache.key(source.source, source.signature, source.name)


def _link_into_process(entries: dict[str, Entry]) -> None:
    """Links entries and remembers their addresses; equal symbols go to different engines.

    Symbols carry a random number of the process that compiled them, so that is a rare case.
    """
    while entries:
        batch: dict[str, tuple[str, Entry]] = {}
        for key, entry in entries.items():
            batch.setdefault(entry.symbol, (key, entry))
        code = link([entry for _, entry in batch.values()])
        code.keep_forever()
        for symbol, (key, _) in batch.items():
            _addresses[key] = code.address(symbol)
            del entries[key]


def _forget_lock_after_fork() -> None:
    # Another thread may have held it at the fork; that thread does not exist in the child.
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock_after_fork)
