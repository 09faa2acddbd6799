"""From generated Python source to object code.

Numba is imported inside the functions: a process that only loads cached kernels never pays for it.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import types

KERNEL_SIGNATURE = "void(CPointer(int64), int64, int64)"  # arguments, thread, threads


def load_source(source: str, name: str, filename: str | None = None):
    """Execute generated source as a module and return its function `name`.

    The module is registered in `sys.modules` before its body runs, and its lines with `linecache`,
    so that Numba, tracebacks and debuggers find both.  `filename` is shown in errors; it need not
    exist.
    """
    module_name = f"graphc_generated.{name}"
    filename = filename or f"<graphc {name}>"
    module = types.ModuleType(module_name)
    module.__file__ = filename
    sys.modules[module_name] = module
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), module.__dict__)
    return getattr(module, name)


@contextlib.contextmanager
def _plain_loops():
    """Compile without LLVM's loop unroller and vectoriser, for the length of the block.

    Kernels say themselves what is unrolled (a tile) and vectorised.  LLVM would unroll a register
    tile's loop once more and interleave the copies, which spills the accumulators: half the
    speed.  Numba has no option for it, so the pass builder of its code generator is replaced, under
    Numba's compiler lock.
    """
    import llvmlite.binding as llvm
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    codegen = cpu_target.target_context.codegen()

    def pass_builder(opt=3, **_):
        options = llvm.create_pipeline_tuning_options(speed_level=int(opt))
        options.loop_unrolling = False
        options.loop_vectorization = False
        options.loop_interleaving = False
        options.slp_vectorization = False
        return llvm.create_pass_builder(codegen._tm, options)

    with global_compiler_lock:
        codegen._pass_builder = pass_builder
        try:
            yield
        finally:
            del codegen._pass_builder


def compile_function(py_function, signature: str = KERNEL_SIGNATURE) -> tuple[str, bytes, str]:
    """Compile with Numba; return (symbol name, object code, assembly text).

    The native function is `int32 f(ret**, excinfo**, arguments...)`, Numba's own convention: a
    status of 0 means success.  It needs nothing from Numba at run time.
    """
    from numba import njit

    with _plain_loops():
        dispatcher = njit(  # type: ignore[call-overload]  # the stubs lack the wrapper options
            signature,
            error_model="numpy",
            nogil=True,
            no_cpython_wrapper=True,
            no_cfunc_wrapper=True,
            boundscheck=False,
        )(py_function)
    (compiled,) = dispatcher.overloads.values()
    library = compiled.library
    return compiled.fndesc.llvm_func_name, library._get_compiled_object(), library.get_asm_str()
