"""From a kernel's NVVM IR to a module that runs on the CPU, each thread as a coroutine.

The kernel is what Numba hands to libnvvm; its arithmetic stays as it is. Special registers,
barriers and warp operations become functions that read and write the thread's record
(`emulate_record.py`). Those that wait for other threads end in a suspension point: a kernel that
has any is made an LLVM coroutine (https://llvm.org/docs/Coroutines.html, switched-resume), so that
the scheduler in `_emulate_native.py` resumes threads one by one, in any order, with no stack of
their own and no code for a particular processor.

The module has one symbol, `ptr entry(i32 what, ptr record, ptr parameters)`, where `what` is one of
`emulate_record`'s requests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from graphc import errors
from graphc.runtime import emulate_record as r

_SUSPEND = "call void @emu.suspend()"


def native_module(kernel: str, modules: Sequence[str], symbol: str, shared: int = 0) -> str:
    """LLVM IR of the module that runs `kernel`, an entry of NVVM IR `modules`.

    `shared`: bytes of dynamic shared memory. Raises CompileError naming what is not known here."""
    import llvmlite.binding as llvm

    linked = _link([_without_device(text, shared) for text in modules])
    for item in (*linked.functions, *linked.global_variables):
        if not item.is_declaration:  # many modules are linked together: no name is theirs alone
            item.linkage = llvm.Linkage.internal
    for function in linked.functions:
        if not function.is_declaration and function.name != kernel:
            function.add_function_attribute("alwaysinline")
    _inline(linked)
    text = _replace_assembly(str(linked))
    parameters = [str(a.type) for a in linked.get_function(kernel).arguments]
    _refuse_unknown(text)
    text += _BUILTINS + _address_of_shared(text)
    text += f"@emu.dynamic = internal constant i32 {shared}\n"
    inlined = llvm.parse_assembly(_declared_once(text))
    _inline(inlined)
    text = str(inlined)
    suspends = _SUSPEND in text
    if suspends:
        text = _coroutine(text, kernel)
    text += _entry(text, kernel, symbol, parameters, suspends)
    return _declared_once(text)


# ---- what a device has and a CPU has not


def _without_device(text: str, shared: int) -> str:
    """Names and declarations that mean something to a GPU only."""
    text = re.sub(r"^target (triple|datalayout) = .*$", "", text, flags=re.M)
    text = re.sub(r'^@"?llvm\.used"? = .*$', "", text, flags=re.M)
    text = re.sub(r"^!nvvm\w*\.[\w.]+ = .*$", "", text, flags=re.M)
    text = text.replace("ptx_kernel ", "").replace("common global", "global")
    text = re.sub(r'@"llvm\.nvvm\.([\w.]+)"', r'@"emu.\1"', text)
    text = re.sub(r'@"__nv_(\w+)"', _mathematics, text)
    return re.sub(
        r"= external addrspace\(3\) global \[0 x (\w+)\]",
        rf"= addrspace(3) global [{max(1, shared)} x i8] undef",
        text,
    )


_LLVM_MATHEMATICS = "fabs rint copysign sqrt floor ceil trunc fma fmin fmax".split()


def _mathematics(found: re.Match[str]) -> str:
    """A function of libdevice as LLVM's or the C library's."""
    name = found[1]
    for plain in _LLVM_MATHEMATICS:
        if name in (plain, f"{plain}f"):
            return f'@"llvm.{plain}.{"f32" if name.endswith("f") else "f64"}"'
    return f'@"{name}"'


def _link(texts: Sequence[str]):
    import llvmlite.binding as llvm

    linked = llvm.parse_assembly(texts[0])
    for text in texts[1:]:
        linked.link_in(llvm.parse_assembly(text))
    return linked


def _inline(module) -> None:
    import llvmlite.binding as llvm

    passes = llvm.create_new_module_pass_manager()
    passes.add_always_inliner_pass()
    passes.add_register_to_memory_pass()  # no phi: blocks can be cut at a suspension
    builder = llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options(0))
    passes.run(module, builder)


def _machine():
    """The compiler of this machine, as Numba's CPU target sets it up."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=2,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


def compile_module(text: str) -> bytes:
    """Object code of LLVM IR for this machine."""
    import llvmlite.binding as llvm

    machine = _machine()
    parsed = llvm.parse_assembly(text)
    parsed.triple, parsed.data_layout = llvm.get_default_triple(), str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return machine.emit_object(parsed)


# ---- builtins: functions of the record that @emu.thread points at


def _register(name: str, word: int) -> str:
    return (
        f'define internal i32 @"emu.read.ptx.sreg.{name}"() alwaysinline {{\n'
        f"  %t = load ptr, ptr @emu.thread\n  %p = getelementptr i32, ptr %t, i32 {word}\n"
        f"  %x = load i32, ptr %p\n  ret i32 %x\n}}\n"
    )


def _waiting(
    name: str, status: int, operation: int, result: str, arguments: Sequence[str], mask: int | None
) -> str:
    """A function that leaves its arguments in the record, suspends, and reads its result there.

    `mask` is the position of the argument that says which lanes take part; None: all."""
    parameters = ", ".join(f"{kind} %a{k}" for k, kind in enumerate(arguments))
    lines = [
        f'define internal {result} @"{name}"({parameters}) alwaysinline {{',
        "  %t = load ptr, ptr @emu.thread",
    ]
    stored = [(r.STATUS, "i32", str(status)), (r.OPERATION, "i32", str(operation))]
    stored.append((r.MASK, "i32", "-1" if mask is None else f"%a{mask}"))
    word = r.INPUT
    for k, kind in enumerate(arguments):
        if k == mask:
            continue
        if kind == "i1":
            lines.append(f"  %w{k} = zext i1 %a{k} to i32")
            stored.append((word, "i32", f"%w{k}"))
        else:
            stored.append((word, kind, f"%a{k}"))
        word += 2 if kind in ("i64", "ptr", "double") else 1
    for k, (place, kind, text) in enumerate(stored):
        lines.append(f"  %p{k} = getelementptr i32, ptr %t, i32 {place}")
        lines.append(f"  store {kind} {text}, ptr %p{k}, align 4")
    lines.append(f"  {_SUSPEND}")
    if result == "void":
        return "\n".join([*lines, "  ret void", "}", ""])
    fields = [kind.strip() for kind in result.strip("{} ").split(",")]
    value = "poison"
    for k, kind in enumerate(fields):
        read = "i32" if kind == "i1" else kind
        lines.append(f"  %q{k} = getelementptr i32, ptr %t, i32 {r.OUTPUT + k}")
        lines.append(f"  %r{k} = load {read}, ptr %q{k}")
        part = f"%r{k}"
        if kind == "i1":
            lines.append(f"  %b{k} = icmp ne i32 %r{k}, 0")
            part = f"%b{k}"
        if not result.startswith("{"):
            value = part
        else:
            lines.append(f"  %v{k} = insertvalue {result} {value}, {kind} {part}, {k}")
            value = f"%v{k}"
    return "\n".join([*lines, f"  ret {result} {value}", "}", ""])


def _all_builtins() -> str:
    axes = {"tid": r.THREAD, "ctaid": r.BLOCK, "ntid": r.THREADS, "nctaid": r.BLOCKS}
    parts = ["@emu.thread = internal global ptr null\n", "declare void @emu.suspend()\n"]
    for name, word in axes.items():
        parts += [_register(f"{name}.{axis}", word + k) for k, axis in enumerate("xyz")]
    parts.append(_register("laneid", r.LANE))
    parts.append(
        'define internal i32 @"emu.read.ptx.sreg.warpsize"() alwaysinline {\n  ret i32 32\n}\n'
    )
    for name, kind in (("popc", r.COUNT), ("and", r.ALL), ("or", r.ANY)):
        parts.append(_waiting(f"emu.barrier0.{name}", r.AT_BARRIER, kind, "i32", ["i32"], None))
    parts.append(_waiting("emu.barrier0", r.AT_BARRIER, r.PLAIN, "void", [], None))
    parts.append(_waiting("emu.bar.warp.sync", r.AT_WARP, r.SYNC, "void", ["i32"], 0))
    parts.append(_waiting("emu.shfl.sync.i32", r.AT_WARP, r.SHUFFLE, "{ i32, i1 }", ["i32"] * 5, 0))
    parts.append(
        _waiting("emu.vote.sync", r.AT_WARP, r.VOTE, "{ i32, i1 }", ["i32", "i32", "i1"], 0)
    )
    for name in ("cta", "gl", "sys"):  # threads run one at a time: memory is always in order
        parts.append(
            f'define internal void @"emu.membar.{name}"() alwaysinline {{\n  ret void\n}}\n'
        )
    for bits, value in (("32", "float"), ("64", "double")):
        parts.append(
            f'define internal {value} @"emu.atomic.load.add.f{bits}.p0f{bits}"(ptr %p, {value} %x) '
            f"alwaysinline {{\n  %old = atomicrmw fadd ptr %p, {value} %x seq_cst\n"
            f"  ret {value} %old\n}}\n"
        )
    return "".join(parts)


_BUILTINS = _all_builtins()


def _declared_once(text: str) -> str:
    """Without declarations of what the text defines, and with no declaration twice."""
    defined = set(re.findall(r'^define [^@\n]*@"?([\w.$]+)"?\(', text, flags=re.M))
    seen: set[str] = set()
    lines = []
    for line in text.splitlines():
        if found := re.match(r'declare [^@\n]*@"?([\w.$]+)"?\(', line):
            if found[1] in defined or found[1] in seen:
                continue
            seen.add(found[1])
        lines.append(line)
    return "\n".join(lines) + "\n"


def _refuse_unknown(text: str) -> None:
    known = set(re.findall(r'@"?(emu\.[\w.]+)"?', _BUILTINS)) | {"emu.shared", "emu.dynamic"}
    called = set(re.findall(r'@"?(emu\.(?!asm)[\w.]+)"?', text))
    if missing := sorted(called - known):
        names = ", ".join(name.replace("emu.", "llvm.nvvm.", 1) for name in missing)
        raise errors.CompileError(f"target='cuda-emulated' does not know {names}")


# ---- inline assembly


# (pattern of the instruction, warp operation) of those that lanes do together
_WARP_ASSEMBLY = (
    (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32", r.MMA_TF32),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16", r.MMA_BF16),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16", r.MMA_F16),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared", r.MATRIX_TRANSPOSED),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared", r.MATRIX),
)


def _to_bfloat16(k: int) -> str:
    """Operand k, a float, as the bits %r{k} of a bfloat16: to nearest even, NaN stays NaN."""
    return (
        f"  %b{k} = bitcast float %a{k} to i32\n  %s{k} = lshr i32 %b{k}, 16\n"
        f"  %o{k} = and i32 %s{k}, 1\n  %e{k} = add i32 %o{k}, 32767\n"
        f"  %f{k} = add i32 %b{k}, %e{k}\n  %g{k} = lshr i32 %f{k}, 16\n"
        f"  %n{k} = fcmp uno float %a{k}, 0.0\n"
        f"  %r{k} = select i1 %n{k}, i32 32767, i32 %g{k}\n"
    )


# (pattern, body of the function) of those that a thread does by itself; %a0, %a1: the operands
_THREAD_ASSEMBLY = (
    # Round to nearest, ties away from zero, to 10 bits of mantissa; NaN stays NaN.
    (
        r"cvt\.rna\.tf32\.f32",
        "  %b = bitcast float %a0 to i32\n  %c = add i32 %b, 4096\n"
        "  %d = and i32 %c, -8192\n  %n = fcmp uno float %a0, %a0\n"
        "  %e = select i1 %n, i32 2147475456, i32 %d\n  ret i32 %e\n",
    ),
    # To nearest even; the first operand is the upper half.
    (
        r"cvt\.rn\.bf16x2\.f32",
        f"{_to_bfloat16(0)}{_to_bfloat16(1)}"
        "  %up = shl i32 %r0, 16\n  %d = or i32 %up, %r1\n  ret i32 %d\n",
    ),
    # Copies are done at once: a missing wait is not found, a missing barrier is.
    # A third operand says whether zeros are written and nothing is read.
    (
        r"cp\.async\.c[ag]\.shared\.global \[\$0(?:\+(?P<to>\d+))?\], "
        r"\[\$1(?:\+(?P<from>\d+))?\], (?P<bytes>16|8|4)(, none)?;",
        None,
    ),
    (r"mov\.u32 \$0, %dynamic_smem_size", "  %n = load i32, ptr @emu.dynamic\n  ret i32 %n\n"),
    (r"cp\.async\.(commit_group|wait_group|wait_all)", "  ret void\n"),
)
_CALL = re.compile(
    r'call (?P<result>[^@\n]*?) asm (?:sideeffect )?(?:alignstack )?"(?P<text>[^"]*)", '
    r'"[^"]*"\((?P<arguments>[^\n]*?)\)(?P<rest>[^\n()]*)$',
    re.M,
)


def _replace_assembly(text: str) -> str:
    """Calls of functions in place of inline PTX. Raises CompileError for an unknown instruction."""
    functions: dict[tuple[str, str, tuple[str, ...]], str] = {}

    def replace(found: re.Match[str]) -> str:
        arguments = _split(found["arguments"])
        kinds = tuple(argument.rsplit(" ", 1)[0] for argument in arguments)
        key = (found["text"], found["result"], kinds)
        name = functions.setdefault(key, f"emu.asm.{len(functions)}")
        return f'call {found["result"]} @"{name}"({", ".join(arguments)})'

    text = _CALL.sub(replace, text)
    definitions = [_assembly(name, *key) for key, name in functions.items()]
    return "\n".join([text, *definitions])


def _split(arguments: str) -> list[str]:
    """Operands of a call, split at commas outside parentheses."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(arguments):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append(arguments[start:at].strip())
            start = at + 1
    last = arguments[start:].strip()
    return [*parts, last] if last else parts


def _assembly(name: str, text: str, result: str, kinds: tuple[str, ...]) -> str:
    for pattern, operation in _WARP_ASSEMBLY:
        if re.search(pattern, text):
            return _wide(
                _waiting(name, r.AT_WARP, operation, result, kinds, None), operation, kinds
            )
    for pattern, body in _THREAD_ASSEMBLY:
        if found := re.search(pattern, text):
            parameters = ", ".join(f"{kind} %a{k}" for k, kind in enumerate(kinds))
            if body is None:
                offsets = int(found["to"] or 0), int(found["from"] or 0)
                body = _copy(kinds, offsets, int(found["bytes"]))
            head = f'define internal {result} @"{name}"({parameters}) alwaysinline {{\n'
            return f"{head}{body}}}\n"
    raise errors.CompileError(f"target='cuda-emulated' does not know the instruction {text!r}")


def _wide(function: str, operation: int, kinds: tuple[str, ...]) -> str:
    """A matrix load with its 32-bit shared address made a pointer before it is stored."""
    if operation not in (r.MATRIX, r.MATRIX_TRANSPOSED) or kinds[0] != "i32":
        return function
    function = function.replace("  %t = load", f"{_generic(0)}  %t = load", 1)
    return function.replace("store i32 %a0,", "store i64 %g0,")


def _generic(k: int) -> str:
    """Operand k, the low half of an address in shared memory, as the whole address %g{k}.

    Shared memory lies within 2 GiB of any part of itself."""
    return (
        f"  %s{k} = ptrtoint ptr @emu.shared to i64\n  %l{k} = trunc i64 %s{k} to i32\n"
        f"  %d{k} = sub i32 %a{k}, %l{k}\n  %e{k} = sext i32 %d{k} to i64\n"
        f"  %g{k} = add i64 %s{k}, %e{k}\n"
    )


def _copy(kinds: tuple[str, ...], offsets: tuple[int, int], count: int) -> str:
    """The body of an asynchronous copy from the second operand's address to the first's, each with
    an offset in bytes."""
    lines, places = "", []
    for k, kind in enumerate(kinds[:2]):
        if kind == "i32":
            lines += f"{_generic(k)}  %m{k} = inttoptr i64 %g{k} to ptr\n"
        elif kind == "i64":
            lines += f"  %m{k} = inttoptr i64 %a{k} to ptr\n"
        else:
            lines += f"  %m{k} = addrspacecast {kind} %a{k} to ptr\n"
        lines += f"  %n{k} = getelementptr i8, ptr %m{k}, i64 {offsets[k]}\n"
        places.append(f"%n{k}")
    word = f"i{8 * count}"
    if len(kinds) > 2:
        zeros = f"%zeros = alloca {word}"
        lines = f"  {zeros}\n  store {word} 0, ptr %zeros\n{lines}"
        lines += "  %none = icmp ne i32 %a2, 0\n"
        lines += f"  %from = select i1 %none, ptr %zeros, ptr {places[1]}\n"
        places[1] = "%from"
    return (
        f"{lines}  %x = load {word}, ptr {places[1]}, align 4\n"
        f"  store {word} %x, ptr {places[0]}, align 4\n  ret void\n"
    )


# ---- shared memory, coroutine, entry


def _shared_globals(text: str) -> list[tuple[str, str]]:
    """(name, type) of every variable in shared memory."""
    found = re.findall(
        r"^(@\S+) = [^\n]*?addrspace\(3\) global (\[.*?\]|\w+) (?:undef|poison|zeroinit)",
        text,
        flags=re.M,
    )
    return [(name, kind) for name, kind in found]


def _address_of_shared(text: str) -> str:
    """@emu.shared: an alias of the first variable in shared memory, or of nothing."""
    names = _shared_globals(text)
    if not names:
        return "@emu.shared = internal global i32 0\n"
    name, kind = names[0]
    return f"@emu.shared = internal alias {kind}, addrspacecast (ptr addrspace(3) {name} to ptr)\n"


_FRAME = """\
  %emu.id = call token @llvm.coro.id(i32 0, ptr null, ptr null, ptr null)
  %emu.size = call i64 @llvm.coro.size.i64()
  %emu.memory = call ptr @malloc(i64 %emu.size)
  %emu.handle = call ptr @llvm.coro.begin(token %emu.id, ptr %emu.memory)
"""
_END = f"""\
emu.final:
  %emu.record = load ptr, ptr @emu.thread
  %emu.status = getelementptr i32, ptr %emu.record, i32 {r.STATUS}
  store i32 {r.FINISHED}, ptr %emu.status
  %emu.last = call i8 @llvm.coro.suspend(token none, i1 true)
  switch i8 %emu.last, label %emu.suspended [i8 0, label %emu.never i8 1, label %emu.cleanup]
emu.never:
  unreachable
emu.cleanup:
  %emu.frame = call ptr @llvm.coro.free(token %emu.id, ptr %emu.handle)
  call void @free(ptr %emu.frame)
  br label %emu.suspended
emu.suspended:
  %emu.ended = call i1 @llvm.coro.end(ptr %emu.handle, i1 false, token none)
  ret ptr %emu.handle
}}
"""
_COROUTINE_DECLARATIONS = """
declare token @llvm.coro.id(i32, ptr, ptr, ptr)
declare i64 @llvm.coro.size.i64()
declare ptr @llvm.coro.begin(token, ptr)
declare i8 @llvm.coro.suspend(token, i1)
declare i1 @llvm.coro.end(ptr, i1, token)
declare ptr @llvm.coro.free(token, ptr)
declare void @llvm.coro.resume(ptr)
declare void @llvm.coro.destroy(ptr)
declare ptr @malloc(i64)
declare void @free(ptr)
"""


def _coroutine(text: str, kernel: str) -> str:
    """The kernel as a coroutine that returns its handle. It has no phi nodes."""
    head = re.search(rf'^define [^\n]*@"?{re.escape(kernel)}"?\([^\n]*$', text, flags=re.M)
    assert head is not None
    start, end = head.start(), text.index("\n}\n", head.start()) + 3
    lines = text[start:end].splitlines()
    parameters = re.search(r"(\(.*\))[^()]*\{$", lines[0])
    assert parameters is not None
    body = [f'define internal ptr @"{kernel}"{parameters[1]} presplitcoroutine {{']
    suspensions = 0
    for line in lines[1:-1]:
        if _SUSPEND in line:
            k = suspensions = suspensions + 1
            body += [
                f"  %emu.s{k} = call i8 @llvm.coro.suspend(token none, i1 false)",
                f"  switch i8 %emu.s{k}, label %emu.suspended "
                f"[i8 0, label %emu.resumed{k} i8 1, label %emu.cleanup]",
                f"emu.resumed{k}:",
            ]
        elif line.strip() == "ret void":
            body.append("  br label %emu.final")
        else:
            body.append(line)
            if len(body) == 2:  # the entry block's label
                assert line.split(";")[0].strip().endswith(":"), line
                body.append(_FRAME.rstrip())
    function = "\n".join([*body, _END])
    return text[:start] + function + text[end:] + _COROUTINE_DECLARATIONS


def _handle(name: str) -> str:
    return f"  %{name} = getelementptr i32, ptr %record, i32 {r.HANDLE}\n"


def _entry(text: str, kernel: str, symbol: str, parameters: list[str], suspends: bool) -> str:
    """The module's one symbol. SHARED returns a table of (address, bytes), ended by zeros."""
    table = [
        f"{{ ptr, i64 }} {{ ptr addrspacecast (ptr addrspace(3) {name} to ptr), i64 ptrtoint (ptr "
        f"getelementptr ({kind}, ptr null, i32 1) to i64) }}"
        for name, kind in _shared_globals(text)
    ]
    table.append("{ ptr, i64 } zeroinitializer")
    loads = ""
    for k, kind in enumerate(parameters):
        loads += f"  %q{k} = getelementptr i64, ptr %parameters, i32 {k}\n"
        loads += f"  %v{k} = load {kind}, ptr %q{k}\n"
    arguments = ", ".join(f"{kind} %v{k}" for k, kind in enumerate(parameters))
    if suspends:
        start = (
            f'{loads}  %h = call ptr @"{kernel}"({arguments})\n{_handle("at")}'
            f"  store ptr %h, ptr %at\n"
        )
        resume, destroy = (
            f"{_handle(f'{action}_at')}  %{action}_h = load ptr, ptr %{action}_at\n"
            f"  call void @llvm.coro.{action}(ptr %{action}_h)\n"
            for action in ("resume", "destroy")
        )
    else:
        start = (
            f'{loads}  call void @"{kernel}"({arguments})\n'
            f"  %status = getelementptr i32, ptr %record, i32 {r.STATUS}\n"
            f"  store i32 {r.FINISHED}, ptr %status\n"
        )
        resume = destroy = ""
    return (
        f"@emu.table = internal constant [{len(table)} x {{ ptr, i64 }}] [{', '.join(table)}]\n"
        f'define ptr @"{symbol}"(i32 %what, ptr %record, ptr %parameters) {{\n'
        f"  store ptr %record, ptr @emu.thread\n"
        f"  switch i32 %what, label %end [i32 {r.START}, label %start\n"
        f"    i32 {r.RESUME}, label %resume i32 {r.DESTROY}, label %destroy\n"
        f"    i32 {r.SHARED}, label %shared i32 {r.SUSPENDS}, label %suspends]\n"
        f"start:\n{start}  br label %end\nresume:\n{resume}  br label %end\n"
        f"destroy:\n{destroy}  br label %end\nshared:\n  ret ptr @emu.table\n"
        f"suspends:\n  ret ptr inttoptr (i64 {int(suspends)} to ptr)\n"
        f"end:\n  ret ptr null\n}}\n"
    )
