"""Kernels on disk: `<key>.py`, the generated source, and `<key>.obj`, its object code;
`<key>.program`, what a whole call of `compile` found out (`graphc.runtime.programs`); and
`<key>.note`, what was measured on this machine: by `tune=True`, and its limits.

A program whose kernels are all here starts without Numba. The key covers all that shapes the
object code, so an entry never goes stale; files are replaced atomically and carry a digest, so any
number of processes may fill one folder, and die while they do.

The folder holds native code that graphc executes. It is created for its owner alone, and refused
where someone else could have written it.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import stat
import struct
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

from graphc.errors import CacheError

log = logging.getLogger("graphc.cache")

# Raised when the calling convention of kernels or the driver changes.
KERNEL_ABI: Final = 1
KERNEL_SIGNATURE: Final = "void(CPointer(int64), int64, int64)"

_MAGIC: Final = b"graphcO1"
_HEADER: Final = struct.Struct("<8sIIQ32s")  # magic, ABI, symbol bytes, object bytes, digest
# Settings that change what Numba or graphc generate for one and the same source.
_ENVIRONMENT: Final = (
    "GRAPHC_LANES",
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_OPT",
    "NUMBA_LOOP_VECTORIZE",
    "NUMBA_SLP_VECTORIZE",
    "NUMBA_ENABLE_AVX",
    "NUMBA_DEBUGINFO",
)
_STALE_SECONDS: Final = 3600.0  # age at which a temporary file must be a killed process's
_warned: set[str] = set()


class Entry(NamedTuple):
    """A compiled kernel: the name of its function, and the object code that defines it."""

    symbol: str
    object_bytes: bytes


def default_folder() -> Path:
    """GRAPHC_CACHE_DIR, or the platform's place for caches."""
    if chosen := os.environ.get("GRAPHC_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser(r"~\AppData\Local")
        return Path(base, "graphc", "cache")
    if sys.platform == "darwin":
        return Path(os.path.expanduser("~/Library/Caches"), "graphc")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "graphc")


def default_cache() -> "KernelCache":
    """The process's cache; a new one once the environment names another folder or limit."""
    names = ("GRAPHC_CACHE", "GRAPHC_CACHE_DIR", "GRAPHC_CACHE_MAX_MB", "XDG_CACHE_HOME", "HOME")
    return _cache_for(tuple(os.environ.get(name) for name in names), os.getpid())


@functools.lru_cache(maxsize=8)
def _cache_for(environment: tuple[str | None, ...], process: int) -> "KernelCache":
    return KernelCache()


def platform_digest() -> str:
    """Digest of everything but the source that object code depends on."""
    return _platform_digest(tuple(os.environ.get(name, "") for name in _ENVIRONMENT))


@functools.lru_cache(maxsize=8)
def _platform_digest(environment: tuple[str, ...]) -> str:
    import llvmlite.binding as llvm

    digest = hashlib.sha256()
    facts = (
        str(KERNEL_ABI),
        metadata.version("numba"),
        metadata.version("llvmlite"),
        f"{sys.version_info.major}.{sys.version_info.minor} {platform.python_implementation()}",
        llvm.get_default_triple(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        *environment,
    )
    for fact in facts:
        digest.update(fact.encode() + b"\0")
    # The words that generated sources are written in are part of their meaning.
    folder = Path(__file__).parents[1] / "codegen"
    for path in sorted([*folder.glob("simd*.py"), folder / "native.py"]):
        with contextlib.suppress(FileNotFoundError):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class KernelCache:
    """A folder of kernels and of notes on them. Without a usable folder every `get` misses and
    `put` does nothing.

    Safe for concurrent use by threads and processes. `GRAPHC_CACHE=0` disables it,
    `GRAPHC_CACHE_MAX_MB` (512) bounds it: the least recently used kernels go first.
    Raises CacheError if the folder belongs to someone else or others may write to it.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder: Path | None = None
        self._unpruned: int | None = None  # bytes written since the last prune; None: never pruned
        if folder is None and os.environ.get("GRAPHC_CACHE", "").strip().lower() in _OFF:
            return
        path = Path(folder) if folder is not None else default_folder()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = os.stat(path)  # of the target, should the path be a symbolic link
        except (OSError, RuntimeError) as error:
            self._warn(path, error)
            return
        if not stat.S_ISDIR(facts.st_mode):
            self._warn(path, NotADirectoryError("not a folder"))
            return
        _check_owner(path, facts)
        self.folder = path

    @property
    def max_bytes(self) -> int:
        """The bound in bytes, from GRAPHC_CACHE_MAX_MB."""
        text = os.environ.get("GRAPHC_CACHE_MAX_MB", "") or "512"
        try:
            return int(float(text) * (1 << 20))
        except ValueError:
            raise CacheError(f"GRAPHC_CACHE_MAX_MB={text!r} is not a number of megabytes") from None

    def key(self, source: str, signature: str = KERNEL_SIGNATURE, name: str = "") -> str:
        """Content hash (64 hex digits) of the function `name` of a source on this machine."""
        text = f"{platform_digest()}\0{name}\0{signature}\0{source}"
        return hashlib.sha256(text.encode()).hexdigest()

    def source_path(self, key: str) -> str:
        """Where the readable source of `key` is (or, without a folder, would be called)."""
        return str(self.folder / f"{key}.py") if self.folder else f"<graphc kernel {key[:16]}>"

    def get(self, key: str) -> Entry | None:
        """The entry, or None if it is absent or damaged. Marks it as recently used."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.obj"
        data = _read(path)
        if data is None:
            return None
        entry = _decode(key, data)
        if entry is None:
            log.warning("%s is damaged; the kernel is compiled again", path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return entry

    def put(self, key: str, source: str, symbol: str, object_bytes: bytes) -> None:
        """Stores an entry; other processes see it whole or not at all."""
        if self.folder is None:
            return
        data = _encode(key, symbol, object_bytes)
        try:
            self._replace(f"{key}.py", source.encode())
            self._replace(f"{key}.obj", data)
        except OSError as error:
            self._warn(self.folder, error)
            return
        self._written(len(data) + len(source))

    def _written(self, size: int) -> None:
        self._unpruned = None if self._unpruned is None else self._unpruned + size
        if self._unpruned is None or self._unpruned > self.max_bytes // 16:
            self.prune()

    def put_source(self, key: str, source: str) -> None:
        """Stores a source without object code: one that could not be compiled, to be read."""
        if self.folder is not None:
            try:
                self._replace(f"{key}.py", source.encode())
            except OSError as error:
                self._warn(self.folder, error)

    def get_note(self, key: str) -> Any:
        """The document of a note, or None if it is absent or damaged."""
        text = self._get_checked(key, "note")
        return None if text is None else json.loads(text)

    def put_note(self, key: str, document: Any) -> None:
        """Stores a small JSON document, whole or not at all."""
        self._put_checked(key, "note", json.dumps(document).encode())

    def get_program(self, key: str) -> bytes | None:
        """What `put_program` has stored, or None if it is absent or damaged."""
        return self._get_checked(key, "program")

    def put_program(self, key: str, data: bytes) -> None:
        """Stores a compiled program, whole or not at all."""
        self._put_checked(key, "program", data)

    def _get_checked(self, key: str, suffix: str) -> bytes | None:
        path = self.folder / f"{key}.{suffix}" if self.folder else None
        stored = _read(path) if path else None
        if path is None or stored is None:
            return None
        digest, _, data = stored.partition(b"\n")
        if digest != _digest(key, b"", data).hex().encode():
            log.warning("%s is damaged; it is made again", path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def _put_checked(self, key: str, suffix: str, data: bytes) -> None:
        if self.folder is None:
            return
        digest = _digest(key, b"", data).hex().encode()
        try:
            self._replace(f"{key}.{suffix}", digest + b"\n" + data)
        except OSError as error:
            self._warn(self.folder, error)
            return
        self._written(len(data))

    def size(self) -> int:
        """Bytes on disk."""
        return sum(size for _, size, _ in self._files())

    def clear(self) -> None:
        """Removes every kernel. Programs that run keep what they have loaded."""
        for path, _, _ in self._files():
            _remove(path)

    def prune(self) -> None:
        """Removes the least recently used kernels until the folder is within its bound.

        A reader that has a file open keeps it; one that comes later compiles again. Leftovers of
        killed processes go too.
        """
        self._unpruned = 0
        kernels: dict[str, list[tuple[Path, int, float]]] = {}
        for path, size, used in self._files():
            if path.suffix == ".tmp":
                if time.time() - used > _STALE_SECONDS:
                    _remove(path)
            else:
                kernels.setdefault(path.stem, []).append((path, size, used))
        total = sum(size for files in kernels.values() for _, size, _ in files)
        if total <= self.max_bytes:
            return
        # Below the bound by a margin, so that a full cache is not pruned at every kernel.
        goal = self.max_bytes * 7 // 8
        for files in sorted(kernels.values(), key=lambda files: max(used for _, _, used in files)):
            if total <= goal:
                break
            for path, size, _ in files:
                _remove(path)
                total -= size

    def _files(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, last use) of what graphc keeps in the folder, and of temporary files."""
        found: list[tuple[Path, int, float]] = []
        if self.folder is None:
            return found
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if not _is_ours(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    facts = entry.stat(follow_symlinks=False)
                    found.append((Path(entry.path), facts.st_size, facts.st_mtime))
        return found

    def _replace(self, name: str, data: bytes) -> None:
        assert self.folder is not None
        handle, temporary = tempfile.mkstemp(suffix=".tmp", prefix="write-", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, self.folder / name)
        except PermissionError:
            _remove(Path(temporary))
            # Windows refuses to replace a file that another process is reading: it is the same.
            if sys.platform != "win32" or not (self.folder / name).exists():
                raise
        except BaseException:
            _remove(Path(temporary))
            raise

    def _warn(self, path: Path, error: Exception) -> None:
        if str(path) not in _warned:
            _warned.add(str(path))
            log.warning(
                "kernels are not kept on disk, so each process compiles its own: %s: %s "
                "(set GRAPHC_CACHE_DIR to a folder you can write to, or GRAPHC_CACHE=0)",
                path,
                getattr(error, "strerror", None) or error,
            )


_OFF: Final = ("0", "off", "no", "false")


def _is_ours(name: str) -> bool:
    stem, _, suffix = name.rpartition(".")
    if suffix == "tmp":
        return stem.startswith("write-")
    return (
        suffix in ("py", "obj", "note", "program")
        and len(stem) == 64
        and all(c in "0123456789abcdef" for c in stem)
    )


def _check_owner(path: Path, facts: os.stat_result) -> None:
    """Refuses a file or folder whose content someone else may have chosen."""
    if os.name != "posix":
        return
    if facts.st_uid != os.getuid():
        raise CacheError(
            f"kernel cache {path} belongs to user id {facts.st_uid}, not to {os.getuid()}, and its "
            "code would be executed: set GRAPHC_CACHE_DIR to a folder of your own"
        )
    if facts.st_mode & 0o022:
        mode = stat.S_IMODE(facts.st_mode)
        target = os.path.realpath(path)
        mend = "700" if stat.S_ISDIR(facts.st_mode) else "600"
        raise CacheError(
            f"kernel cache {path} can be written by others (mode {mode:o}), and its code would be "
            f"executed: chmod {mend} {target}, or set GRAPHC_CACHE_DIR to another folder"
        )


def _read(path: Path) -> bytes | None:
    """The bytes of a regular file that only its owner, this user, could have written."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NONBLOCK", 0)  # a named pipe must not hold us up
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s); the kernel is compiled again", path, error.strerror)
        return None
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            return b""
        _check_owner(path, facts)
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    # Gone already, or (Windows) still open in another process: the next prune sees to it.
    with contextlib.suppress(OSError):
        os.unlink(path)


def _digest(key: str, symbol: bytes, object_bytes: bytes) -> bytes:
    # With the key, so that a file under another name is not taken for that kernel.
    digest = hashlib.sha256(f"{key}\0{len(symbol)}\0".encode())
    digest.update(symbol)
    digest.update(object_bytes)
    return digest.digest()


def _encode(key: str, symbol: str, object_bytes: bytes) -> bytes:
    name = symbol.encode()
    digest = _digest(key, name, object_bytes)
    header = _HEADER.pack(_MAGIC, KERNEL_ABI, len(name), len(object_bytes), digest)
    return header + name + object_bytes


def _decode(key: str, data: bytes) -> Entry | None:
    if len(data) < _HEADER.size:
        return None
    magic, abi, symbol_bytes, object_length, digest = _HEADER.unpack_from(data)
    if magic != _MAGIC or abi != KERNEL_ABI:
        return None
    if len(data) != _HEADER.size + symbol_bytes + object_length:
        return None
    symbol = data[_HEADER.size : _HEADER.size + symbol_bytes]
    object_bytes = data[_HEADER.size + symbol_bytes :]
    if _digest(key, symbol, object_bytes) != digest:
        return None
    return Entry(symbol.decode(), object_bytes)
