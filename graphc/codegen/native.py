"""From generated Python source to object code: Numba, cut down to what kernels need.

Numba's own pipeline spends four fifths of a kernel's compile time on what kernels do not contain:
closures, array expressions, exceptions, variables of several types, reference counts, wrappers for
Python. Kernels are assignments and counted loops whose variables have one type each, so

- types are inferred in one walk in program order (`_TypingInOrder`) instead of a search for a
  fixpoint; whatever does not fit (the driver calls jitted functions) gets Numba's own inference;
- a variable that is assigned once is its value, without a slot in memory (`_KernelLowering`);
- LLVM optimises once and writes the object file, which is not linked into this process.

The hooks are those that Numba documents for custom pipelines and its base classes.
"""

# Numba's stubs know neither its flags nor its types' attributes.
# mypy: disable-error-code="assignment, attr-defined, misc"

from __future__ import annotations

import linecache
import sys
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm
from numba.core import ir, lowering, types
from numba.core.analysis import compute_cfg_from_blocks
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import Compiler, CompilerBase, Flags, compile_extra
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import FunctionPass, PassManager, register_pass
from numba.core.errors import NumbaError
from numba.core.registry import cpu_target
from numba.core.sigutils import normalize_signature
from numba.core.typed_passes import (
    BaseNativeLowering,
    NoPythonBackend,
)
from numba.core.untyped_passes import FixupArgs, IRProcessing, TranslateByteCode

KERNEL_SIGNATURE = "void(CPointer(int64), int64, int64)"  # arguments, thread, threads


def load_source(source: str, name: str, filename: str | None = None):
    """Execute generated source as a module and return its function `name`.

    The module is registered in `sys.modules` before its body runs, and its lines with `linecache`,
    so that Numba, tracebacks and debuggers find both.  `filename` is shown in errors; it need not
    exist.
    """
    module_name = f"graphc_generated.{name}"
    filename = filename or f"<graphc {name}>"
    module = ModuleType(module_name)
    module.__file__ = filename
    sys.modules[module_name] = module
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), module.__dict__)
    return getattr(module, name)


class Compiled:
    """One compiled function: its symbol, its object code, and on demand its assembly."""

    def __init__(self, symbol: str, library: ObjectLibrary):
        self.symbol = symbol
        self._library = library
        self.object_bytes: bytes = library.emit()

    def assembly(self) -> str:
        return self._library.assembly()


def compile_function(function: Any, signature: str = KERNEL_SIGNATURE) -> Compiled:
    """Compile a Python function. Raises NumbaError.

    The native function is `int32 f(ret**, excinfo**, arguments...)`, Numba's own convention: a
    status of 0 means success.  It needs nothing from Numba at run time.
    """
    arguments, result = normalize_signature(signature)
    flags = Flags()
    flags.error_model = "numpy"
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.no_compile = True
    codegen = cpu_target.target_context.codegen()
    with global_compiler_lock:
        for pipeline in (KernelCompiler, Compiler):
            flags.nrt = pipeline is Compiler  # kernels count no references
            library = ObjectLibrary(codegen, function.__qualname__)
            try:
                compiled = compile_extra(
                    cpu_target.typing_context,
                    cpu_target.target_context,
                    function,
                    arguments,
                    result,
                    flags,
                    {},
                    library=library,
                    pipeline_class=pipeline,
                )
            except NumbaError:
                if pipeline is Compiler:
                    raise
            else:
                break
        return Compiled(compiled.fndesc.llvm_func_name, library)


class KernelCompiler(CompilerBase):
    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("kernel")
        passes.add_pass(TranslateByteCode, "bytecode")
        passes.add_pass(FixupArgs, "arguments")
        passes.add_pass(IRProcessing, "definitions")
        passes.add_pass(_TypingInOrder, "types")
        passes.add_pass(_NativeLowering, "LLVM")
        passes.add_pass(NoPythonBackend, "result")
        passes.finalize()
        return [passes]


# ---- types


class _Unordered(NumbaError):
    """The function has something that typing in program order does not know."""


# Signatures by callee and argument types: the words of the vocabulary recur in every kernel.
_signatures: dict[tuple, Any] = {}


@register_pass(mutates_CFG=False, analysis_only=False)
class _TypingInOrder(FunctionPass):
    _name = "typing_in_order"

    def __init__(self):
        FunctionPass.__init__(self)

    def run_pass(self, state) -> bool:
        typing = _Typing(state)
        typing.run()
        state.typemap, state.calltypes = typing.types, typing.calls
        state.return_type = typing.types.pop("return")
        state.metadata["direct"] = typing.assigned_once()
        return True


class _Typing:
    """One walk over the statements: every variable has the type of its first assignment."""

    def __init__(self, state):
        self.context = state.typingctx
        self.ir = state.func_ir
        self.types = {f"arg.{n}": t for n, t in zip(self.ir.arg_names, state.args, strict=True)}
        self.calls: dict[Any, Any] = {}
        self.block = 0
        self.written: dict[str, list[int]] = {}  # blocks that assign a variable
        self.read: dict[str, set[int]] = {}  # blocks that read it

    def run(self) -> None:
        for label, block in sorted(self.ir.blocks.items()):
            self.block = label
            for statement in block.body:
                if isinstance(statement, ir.Assign):
                    self.assign(statement)
                elif isinstance(statement, ir.Branch):
                    self.type(statement.cond)
                elif isinstance(statement, ir.Return):
                    if self.types.setdefault("return", kind := self.type(statement.value)) != kind:
                        raise _Unordered("not a kernel")
                elif not isinstance(statement, (ir.Jump, ir.PopBlock)):
                    raise _Unordered("not a kernel")

    def assigned_once(self) -> set[str]:
        """Variables whose one assignment comes before every use."""
        dominators = compute_cfg_from_blocks(self.ir.blocks).dominators()
        return {
            name
            for name, written in self.written.items()
            if len(written) == 1
            and all(written[0] in dominators[block] for block in self.read.get(name, ()))
        }

    def type(self, variable: ir.Var) -> types.Type:
        self.read.setdefault(variable.name, set()).add(self.block)
        found = self.types.get(variable.name)
        if found is None:
            raise _Unordered("not a kernel")
        return found

    def assign(self, statement: ir.Assign) -> None:
        name = statement.target.name
        kind = self.value(statement.value)
        if self.types.setdefault(name, kind) != kind:
            raise _Unordered("not a kernel")
        self.written.setdefault(name, []).append(self.block)

    def value(self, value) -> types.Type:
        if isinstance(value, ir.Var):
            return self.type(value)
        if isinstance(value, ir.Arg):
            return self.types[f"arg.{value.name}"]
        if isinstance(value, (ir.Const, ir.Global, ir.FreeVar)):
            return types.unliteral(self.context.resolve_value_type(value.value))
        if isinstance(value, ir.Expr):
            return self.expression(value)
        raise _Unordered("not a kernel")

    def expression(self, expr: ir.Expr) -> types.Type:
        op = expr.op
        if op == "call" and not expr.kws and not expr.vararg:
            return self.call(expr, self.type(expr.func), expr.args)
        if op in ("binop", "inplace_binop"):
            function = self.context.resolve_value_type(
                expr.fn if op == "binop" else expr.immutable_fn
            )
            return self.call(expr, function, (expr.lhs, expr.rhs))
        if op == "unary":
            return self.call(expr, self.context.resolve_value_type(expr.fn), (expr.value,))
        if op in ("getiter", "iternext"):
            return self.call(expr, op, (expr.value,))
        if op == "pair_first":
            return self.type(expr.value).first_type
        if op == "pair_second":
            return self.type(expr.value).second_type
        if op == "build_tuple":
            return types.BaseTuple.from_types([self.type(item) for item in expr.items])
        if op == "cast":
            return self.type(expr.value)
        if op in ("exhaust_iter", "static_getitem"):
            kind = self.type(expr.value)
            if isinstance(kind, types.BaseTuple):
                return kind if op == "exhaust_iter" else kind[expr.index]
        raise _Unordered("not a kernel")

    def call(self, expr: ir.Expr, function, operands) -> types.Type:
        key = (function, *map(self.type, operands))
        signature = _signatures.get(key)
        if signature is None:
            signature = self.context.resolve_function_type(function, key[1:], {})
            if signature is None:
                raise _Unordered("not a kernel")
            _signatures[key] = signature
        self.calls[expr] = signature
        return signature.return_type


# ---- LLVM


class _KernelLowering(lowering.Lower):
    def _find_singly_assigned_variable(self) -> None:
        self._singly_assigned_vars = self.metadata["direct"]
        self._blk_local_varmap: dict[str, Any] = {}

    def lower_binop(self, resty, expr, op):
        """Numba first tries forms for operands that are known; kernels have none of those."""
        signature = self.fndesc.calltypes[expr]
        function = self.context.typing_context.resolve_value_type(op)
        operands = [
            self.context.cast(self.builder, self.loadvar(v.name), self.typeof(v.name), kind)
            for v, kind in zip((expr.lhs, expr.rhs), signature.args, strict=True)
        ]
        result = self.context.get_function(function, signature)(self.builder, operands)
        return self.context.cast(self.builder, result, signature.return_type, resty)


@register_pass(mutates_CFG=True, analysis_only=False)
class _NativeLowering(BaseNativeLowering):
    _name = "kernel_lowering"

    @property
    def lowering_class(self):
        return _KernelLowering


class ObjectLibrary(CPUCodeLibrary):
    """LLVM code that becomes an object file.

    Without LLVM's loop unroller and vectoriser: kernels say themselves what is unrolled (a tile)
    and vectorised. LLVM would unroll a register tile's loop once more and interleave the copies,
    which spills the accumulators: half the speed.
    """

    def _optimize_functions(self, ll_module) -> None:
        """Once, when the module is whole."""
        ll_module.data_layout = self._codegen._data_layout

    def emit(self) -> bytes:
        module = self._final_module
        for library in self._linking_libraries:
            module.link_in(library._get_module_for_linking(), preserve=True)
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_unrolling = False
        options.loop_vectorization = False
        options.loop_interleaving = False
        options.slp_vectorization = False
        builder = llvm.create_pass_builder(self._codegen._tm, options)
        functions = [f for f in module.functions if not f.is_declaration]
        if len(functions) == 1:
            # What LLVM does between functions, and for vectors afterwards, is two thirds of its
            # time and finds nothing in a kernel.
            builder.getFunctionPassManager().run(functions[0], builder)
            passes = llvm.create_new_module_pass_manager()
            passes.add_post_order_function_attributes_pass()
            passes.add_global_dead_code_eliminate_pass()
        else:
            passes = builder.getModulePassManager()
        passes.run(module, builder)
        module.verify()
        return self._codegen._tm.emit_object(module)

    def assembly(self) -> str:
        return self._codegen._tm.emit_assembly(self._final_module)
