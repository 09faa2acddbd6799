"""Static reports of CUDA kernels: what NVIDIA's assembler makes of them, without a GPU.

The table of all kernels of whole networks is slow; a few kernels stand for it by default.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest

pytest.importorskip("numba.cuda.cudadrv", reason='needs numba-cuda: pip install ".[cuda]"')

import graphc as gc
from graphc import errors, zoo
from graphc.codegen.cuda_program import CudaStep, plan_steps
from graphc.compiler import default_pipeline, transform
from graphc.inspect import cuda_report, cuda_sass
from graphc.inspect.cuda_report import CAPABILITIES, StaticReport, report, report_steps
from graphc.inspect.work import kernel_flops
from graphc.ir import Graph
from graphc.optim import SGD


def _installed() -> bool:
    try:
        return bool(cuda_report.tool("ptxas") and cuda_report.tool("nvdisasm"))
    except errors.MissingExtraError:
        return False


needs_tools = pytest.mark.skipif(not _installed(), reason="needs NVIDIA's ptxas and nvdisasm")


# ---- parsers

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel' for 'sm_80'
ptxas info    : Function properties for kernel
    16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 8704 bytes smem
"""

SASS = """\
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/              @!P0 LDGSTS.E [R5], desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5+0x10], desc[UR4][R2.64] ;
        /*0040*/                   LDS.128 R8, [R5] ;
        /*0050*/                   FFMA R0, R4, R8, R0 ;
        /*0060*/                   FFMA.FTZ R0, R4, R9, R0 ;
        /*0070*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


def test_resources_are_read():
    found = cuda_report.parse_resources(PTXAS)
    assert found == cuda_report.Resources(128, 16, 12, 24, 8704, 1)


def test_the_hot_loop_is_the_innermost_with_the_most_arithmetic():
    instructions, labels = cuda_sass.parse_instructions(SASS)
    assert [i.kind for i in instructions][:2] == ["IMAD", "LDG"]
    assert cuda_sass.innermost_loops(instructions, labels) == [(2, 8)]
    loop = cuda_sass.hot_loop(instructions, labels)
    assert loop is not None and loop.instructions == 7
    assert dict(loop.mix) == {"LDGSTS": 2, "LDS": 1, "FFMA": 2, "HMMA": 1, "BRA": 1}
    assert loop.share("FFMA") == pytest.approx(2 / 7)
    # Two multiply-adds, and 16 x 8 x 16 of a warp; 4 and 16 bytes.
    assert loop.intensity == pytest.approx((2 * 2 + 2 * 16 * 8 * 16 / 32) / 20)


def test_a_kernel_without_loops_has_no_hot_loop():
    assert cuda_sass.hot_loop(*cuda_sass.parse_instructions("/*0000*/ EXIT ;")) is None


@pytest.mark.parametrize(
    "capability, threads, registers, shared, blocks, limit",
    [
        ((8, 0), 256, 128, 33792, 2, "registers"),
        ((8, 0), 256, 32, 0, 8, "threads"),
        ((9, 0), 32, 16, 0, 32, "blocks"),
        ((12, 0), 128, 64, 48 * 1024, 2, "shared memory"),
        ((8, 6), 1024, 64, 0, 1, "threads"),
        # 33 registers are given out as 40: 256 a warp at a time.
        ((9, 0), 256, 33, 0, 6, "registers"),
    ],
)
def test_occupancy(capability, threads, registers, shared, blocks, limit):
    found = cuda_report.resident_blocks(capability, threads, registers, shared)
    assert found == (blocks, limit)


def test_an_unknown_capability_is_refused():
    with pytest.raises(errors.CompileError, match="7.0: limits are known for 8.0"):
        cuda_report.resident_blocks((7, 0), 256, 32, 0)


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(cuda_report, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_report.shutil, "which", lambda name: None)
    with pytest.raises(errors.MissingExtraError, match=r"ptxas: pip install .*\[cuda\]"):
        cuda_report.tool("ptxas")


@needs_tools
def test_complaints_of_the_assembler_are_passed_on():
    with pytest.raises(errors.CompileError, match="ptxas"):
        report("nonsense", "8.0", 256)


# ---- kernels

# Of the hot loop of products in float32.
MULTIPLY_ADDS = 0.85
# Operations of the smallest products that are held to it: below, no tile of their sums would occupy
# a device.
LARGE = {"matmul": 2 * 10**7, "convolution": 10**9}


def training_steps(graph: Graph, batch: int, precision: str) -> list[CudaStep]:
    """Every kernel of a training step."""
    joint, _ = transform(graph, ["loss"], {"N": batch}, "loss", (), SGD(lr=0.1, momentum=0.9))
    fused, _ = default_pipeline(target="cuda").run(joint)
    return plan_steps(fused, precision)


def is_large(step: CudaStep) -> bool:
    """Whether a kernel is a large matrix product, or a large convolution of 3 x 3 or more pixels or
    one of its gradients."""
    work = kernel_flops(step.kernel, step.node)
    for node in step.node.attrs["body"]:
        if node.op == "matmul":
            return work >= LARGE["matmul"]
        weight = node[0] if node.op == "conv2d_weight_grad" else None
        if node.op in ("conv2d", "conv2d_input_grad"):
            weight = node.inputs[1]
        if weight is not None:
            return math.prod(weight.sizes[2:]) >= 9 and work >= LARGE["convolution"]
    return False


def product(rows: int, columns: int, inner: int, precision: str = "float32") -> CudaStep:
    g = Graph("product")
    g.output(y=gc.matmul(g.input("a", (rows, inner)), g.input("b", (inner, columns))))
    fused, _ = default_pipeline(target="cuda").run(g)
    (step,) = plan_steps(fused, precision)
    return step


def check_resources(found: StaticReport) -> str:
    """What is wrong with a kernel's use of registers and memory, or ""."""
    own = found.resources
    if found.spills or own.stack:
        return f"{found.spills} bytes spilled, {own.stack} of stack"
    # 128 registers for each of 256 threads: as many of fewer, fewer of more.
    if own.registers * max(256, found.threads) > 128 * 256 and own.registers > 64:
        return f"{own.registers} registers of {found.threads} threads"
    return ""


@needs_tools
def test_a_large_product():
    (table,) = report_steps([product(2048, 2048, 512)])
    assert tuple(table) == CAPABILITIES
    for capability, (found,) in table.items():
        assert not check_resources(found)
        assert found.loop is not None and found.loop.share("FFMA") >= MULTIPLY_ADDS
        assert found.occupancy >= 0.25
        assert found.loop.intensity is not None and found.loop.intensity > 20
        assert "FFMA" in str(found) and capability in str(found)


@needs_tools
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_tensor_cores_are_used(precision):
    ((found,),) = report_steps([product(2048, 2048, 512, precision)], ["8.0"])[0].values()
    assert not check_resources(found)
    assert found.loop is not None and found.loop.share("HMMA") > 0
    assert found.loop.share("FFMA") == 0


@needs_tools
def test_kernels_of_an_executable_report():
    g = Graph("product")
    g.output(y=gc.relu(gc.matmul(g.input("a", (5, 7)), g.input("b", (7, 3)))))
    (info,) = gc.compile(g, outputs=["y"], target="cuda-emulated").kernels()
    reports = info.reports(["8.0", "9.0"])
    assert list(reports) == ["8.0", "9.0"]
    for capability, (found,) in reports.items():
        assert found.capability == capability and found.threads == info.blocks[0][0]


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize(
    "network, batch, precision",
    [
        ("lenet5", 64, "float32"),
        ("resnet18", 32, "float32"),
        ("resnet50", 32, "float32"),
        ("resnet18", 32, "tf32"),
        ("resnet50", 32, "tf32"),
        ("resnet18", 32, "bfloat16"),
        ("resnet50", 32, "bfloat16"),
    ],
)
def test_every_kernel_of_a_training_step(network, batch, precision):
    """`pytest -s` shows the row of the table in docs/cuda_kernels.md."""
    steps = training_steps(getattr(zoo, network)(), batch, precision)
    kind = "FFMA" if precision == "float32" else "HMMA"
    least = MULTIPLY_ADDS if precision == "float32" else 1e-9
    kernels: set[str] = set()
    wrong = {}
    registers: Counter[str] = Counter()
    shares: dict[str, float] = {}
    for step, table in zip(steps, report_steps(steps), strict=True):
        kernels.update(launch.source for launch, _ in step.launches)
        for capability, reports in table.items():
            name = f"{step.node.name} for {capability}"
            for number, found in enumerate(reports):
                registers[capability] = max(registers[capability], found.resources.registers)
                if text := check_resources(found):
                    wrong[f"{name}, launch {number}"] = text
            if is_large(step):
                loop = reports[0].loop
                assert loop is not None, name
                share = loop.share(kind)
                shares[capability] = min(share, shares.get(capability, 1.0))
                if share < least:
                    wrong[name] = f"{share:.1%} {kind}: {loop.mix}"
    print(f"{network} {precision}: {len(kernels)} kernels, registers {dict(registers)},", end=" ")
    print(f"least share of {kind}", {c: f"{share:.1%}" for c, share in shares.items()})
    assert not wrong
    assert shares or network == "lenet5"
