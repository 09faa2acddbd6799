"""Builds and runs kernels of the SIMD vocabulary for tests, without the runtime of graphc."""

import ctypes

import llvmlite.binding as llvm
import numpy as np

from graphc.codegen import native

LANES = (4, 8, 16)
_ENGINES = []  # code lives as long as its engine


class Kernel:
    """A compiled kernel, called with arrays (passed as addresses) and integers."""

    def __init__(self, source: str, name: str = "kernel"):
        compiled = native.compile_function(native.load_source(source, name))
        self.assembly = compiled.assembly()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(jit=True, codemodel="jitdefault")
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(compiled.object_bytes))
        engine.finalize_object()
        _ENGINES.append(engine)
        parameters = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
        prototype = ctypes.CFUNCTYPE(ctypes.c_int32, *parameters)
        self.function = prototype(engine.get_function_address(compiled.symbol))

    def __call__(self, *arguments):
        row = [one.ctypes.data if isinstance(one, np.ndarray) else one for one in arguments]
        row = np.array(row, np.int64)
        unused = ctypes.create_string_buffer(64)
        assert self.function(unused, unused, row.ctypes.data, 0, 1) == 0


def kernel_source(lanes: int, arguments: str, body: str, setup: str = "") -> str:
    """A kernel with named int64 arguments; `body` and `setup` are unindented."""
    names = arguments.split()
    lines = [
        "from graphc.codegen import simd",
        f"v = simd.vocabulary({lanes})",
        "f32, f64, i32, i64, b8 = map(v.pointer, 'float32 float64 int32 int64 bool'.split())",
        f"arguments = v.arguments({len(names)})",
        *setup.strip().splitlines(),
        "def kernel(args, thread, threads):",
        f"    {', '.join(names)}, = arguments(args)",
        *(f"    {line}" for line in body.strip().splitlines()),
    ]
    return "\n".join(lines) + "\n"


def build(lanes: int, arguments: str, body: str, setup: str = "") -> Kernel:
    return Kernel(kernel_source(lanes, arguments, body, setup))


POINTER = {"float32": "f32", "float64": "f64", "int32": "i32", "int64": "i64", "bool": "b8"}
