"""`graphc doctor` and `graphc cache`: what this installation is made of, and what is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator

from graphc import __version__
from graphc.errors import GraphcError

REQUIRED = ("numba", "llvmlite", "numpy", "networkx", "safetensors", "typer", "rich")
OPTIONAL = ("matplotlib", "pillow", "mlxtend", "scikit-learn", "torch", "onnxruntime")
Fact = tuple[str, str]


def report() -> int:
    """Print the report; 1 if something that graphc needs is missing or refused, else 0."""
    problems: list[str] = []
    sections: dict[str, Callable[[list[str]], Iterator[Fact]]] = {
        "versions": _versions,
        "cpu": _cpu,
        "kernel cache": _cache,
        "cuda": _cuda,
    }
    for title, facts in sections.items():
        print(title)
        for name, fact in facts(problems):
            print(f"  {name:<14}{fact}")
    for problem in problems:
        print(f"problem: {problem}")
    print("problems: " + (str(len(problems)) if problems else "none"))
    return 1 if problems else 0


def _versions(problems: list[str]) -> Iterator[Fact]:
    yield "graphc", __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", platform.platform()
    for name in REQUIRED:
        version = _version(name)
        if version is None:
            problems.append(f"{name} is missing: pip install {name}")
        yield name, version or "missing"
    absent = []
    for name in OPTIONAL:
        if version := _version(name):
            yield name, version
        else:
            absent.append(name)
    if absent:
        yield "not installed", f"{', '.join(absent)} (optional)"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu(problems: list[str]) -> Iterator[Fact]:
    try:
        import llvmlite.binding as llvm
    except Exception as error:  # a broken native library can raise anything
        problems.append(f"llvmlite cannot be imported: {type(error).__name__}: {error}")
        return
    known = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "avx512bf16", "neon")
    yield "name", llvm.get_host_cpu_name()
    try:
        features = dict(llvm.get_host_cpu_features())
        yield "features", " ".join(f for f in known if features.get(f)) or "none of note"
    except RuntimeError:
        yield "features", "not known for this platform"
    from graphc.codegen import target
    from graphc.runtime.team import available_cores

    lanes = target.host_lanes()
    yield "simd", f"{lanes} float32 lanes ({32 * lanes} bits)"
    cores = available_cores()
    yield "threads", f"{cores} (of {os.cpu_count()} in the machine)"


def _cache(problems: list[str]) -> Iterator[Fact]:
    try:
        yield from cache_facts()
        yield "safe", "yes: only you can write to it"
    except GraphcError as error:
        problems.append(str(error))
        yield "safe", "no"


def cache_facts() -> Iterator[Fact]:
    """Folder, size and limit of the kernel cache. Raises CacheError if it is not safe to use."""
    from graphc.runtime.cache import KernelCache

    cache = KernelCache()
    if cache.folder is None:
        yield "folder", "none: kernels are compiled anew in each process"
        return
    kernels = sum(1 for _ in cache.folder.glob("*.obj"))
    yield "folder", str(cache.folder)
    yield "kernels", f"{kernels} in {cache.size() / 2**20:.1f} MiB"
    yield "limit", f"{cache.max_bytes / 2**20:.0f} MiB (GRAPHC_CACHE_MAX_MB)"


def clear_cache() -> str:
    """Remove every kernel and say so. Raises CacheError if the folder is not safe to use."""
    from graphc.runtime.cache import KernelCache

    cache = KernelCache()
    if cache.folder is None:
        return "there is no cache folder"
    size = cache.size()
    cache.clear()
    return f"removed {size / 2**20:.1f} MiB from {cache.folder}"


def _cuda(problems: list[str]) -> Iterator[Fact]:
    """None of it is needed for the CPU: nothing here is a problem."""
    from graphc.codegen.cuda_build import EXTRA, require_numba_cuda

    try:
        require_numba_cuda()
    except GraphcError:
        yield "numba-cuda", f"missing: {EXTRA}"
        return
    for name in ("numba-cuda", "cuda-bindings", "nvidia-nvvm"):
        yield name, _version(name) or f"missing: {EXTRA}"
    yield "emulation", "target='cuda-emulated' works without a GPU"
    reports = [name for name in ("nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm") if not _version(name)]
    yield "reports", f"none: {', '.join(reports)} missing" if reports else "ptxas and nvdisasm"
    try:
        from graphc.runtime.cuda_driver import GpuDevice

        yield from GpuDevice().facts()
    except Exception as error:  # drivers fail in many ways
        yield "device", f"none: {error}"
