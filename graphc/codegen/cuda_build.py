"""How CUDA kernels are compiled: what is asked for, as the signature of a job, and the answer.

A job of `graphc.runtime.build` carries a signature as text. For a CUDA kernel it begins with
PREFIX and says everything but the source that the result depends on, so that the kernel cache, its
folder and the compiling processes serve both targets.
"""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from graphc import errors
from graphc.codegen.cuda import CudaLaunch

PREFIX: Final = "cuda "
EXTRA: Final = 'pip install "graphc-nn[cuda]"'
_DISTRIBUTIONS = ("numba-cuda", "nvidia-nvvm")
# What the words of the sources are made of, beside what is the CPU's too.
_WORDS = ("cuda_build", "cuda_indices", "cuda_tile_words", "cuda_vocabulary", "numba_cuda")
Capability = tuple[int, int]


def require_numba_cuda() -> None:
    """Raises MissingExtraError if kernels cannot be compiled for CUDA here."""
    try:
        from numba import cuda  # noqa: F401
    except ImportError as error:
        raise errors.MissingExtraError(f"the CUDA targets need numba-cuda: {EXTRA}") from error


@dataclass(frozen=True)
class CudaSignature:
    """What a kernel is compiled for.

    output        "ptx", or "emulated" for code that runs on this CPU
    capabilities  compute capabilities, (major, minor) each; code for each, with NUL between them
    buffers       element type of each pointer parameter
    numbers       how many int32 parameters follow
    threads       of a block, at most
    resident      blocks that a multiprocessor should hold at once
    shared        bytes of dynamic shared memory
    """

    output: str
    capabilities: tuple[Capability, ...]
    buffers: tuple[str, ...]
    numbers: int
    threads: int
    resident: int = 1
    shared: int = 0

    @staticmethod
    def of(
        launch: CudaLaunch, buffers: tuple[str, ...], output: str, *capabilities: Capability
    ) -> CudaSignature:
        """The signature of a launch whose pointers have the element types `buffers`."""
        return CudaSignature(
            output,
            capabilities,
            buffers,
            len(launch.numbers),
            launch.threads,
            launch.resident,
            launch.shared,
        )

    def text(self) -> str:
        return PREFIX + json.dumps({**asdict(self), "versions": _versions(self.output)})

    @staticmethod
    def parse(text: str) -> CudaSignature:
        fields = json.loads(text.removeprefix(PREFIX))
        del fields["versions"]
        fields["capabilities"] = tuple(map(tuple, fields["capabilities"]))
        fields["buffers"] = tuple(fields["buffers"])
        return CudaSignature(**fields)


@functools.cache
def _versions(output: str) -> str:
    """Digest of the compilers and of the words that sources are written in."""
    digest = hashlib.sha256()
    for name in _DISTRIBUTIONS:
        try:
            digest.update(f"{name} {metadata.version(name)}\0".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{name}\0".encode())
    codegen, runtime = Path(__file__).parent, Path(__file__).parents[1] / "runtime"
    paths = [codegen / f"{name}.py" for name in _WORDS]
    if output == "emulated":
        paths += [runtime / "emulate_ir.py", runtime / "emulate_record.py"]
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_function(function, signature: str) -> tuple[str, bytes]:
    """(symbol, PTX texts or object code) of a kernel function for the text of a CudaSignature."""
    from graphc.codegen import numba_cuda

    wanted = CudaSignature.parse(signature)
    typed = numba_cuda.signature(wanted.buffers, wanted.numbers)
    if wanted.output == "ptx":
        symbol, texts = numba_cuda.compile_ptx(
            function, typed, wanted.capabilities, wanted.threads, wanted.resident
        )
        return symbol, "\0".join(texts).encode()
    from graphc.runtime import emulate_ir

    lowered = numba_cuda.lower(function, typed, wanted.capabilities[0])
    name = f"emulated_{secrets.token_hex(16)}"  # objects of several processes meet in one linker
    module = emulate_ir.native_module(lowered.symbol, lowered.modules, name, wanted.shared)
    return name, emulate_ir.compile_module(module)
