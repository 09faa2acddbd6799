"""Random numbers from a counter, and dropout.

A number is a function of (seed, stream, step, position) alone: no generator state to keep, the same
result on every target, for every thread count and memory layout, and a backward pass can draw the
forward pass's mask again instead of storing it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index, call, position
from graphc.ir import Graph, Node, TensorType, Value
from graphc.ops.compare import cast, ge
from graphc.ops.elementwise import add, mul
from graphc.ops.pointwise import check_dtype, differentiable, draw
from graphc.ops.registry import Attrs, Lowering, OpDef, Sample, apply, register

__all__ = ["random_uniform", "dropout"]

# Threefry-2x32 with 20 rounds: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
# 1, 2, 3" (2011), section 3.3; the constants are those of table 2 and of Skein's key schedule.
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_ROUNDS = 20
_STEP_STATE = "dropout.step"


def random_uniform(
    counter: Value, *, shape: Iterable[int], seed: int, stream: int = 0, name: str | None = None
) -> Value:
    """float32 numbers uniform in [0, 1), multiples of 2**-24, of the given shape.

    `counter` is an int32 scalar: another one, another `seed` or another `stream` gives independent
    numbers."""
    return apply(
        "random_uniform", counter, name=name, shape=tuple(shape), seed=int(seed), stream=int(stream)
    )[0]


def dropout(
    x: Value, p: float = 0.5, training: bool | None = None, name: str | None = None
) -> Value:
    """In training each element is 0 with probability p, else divided by 1 - p; otherwise x.

    `training=None` is decided by the compile mode. The first dropout of a graph declares the state
    `dropout.step`, which counts the steps, so that each step draws other masks. The mask is that of
    `random_uniform` with compile's seed and this node's own stream."""
    if not 0 <= p <= 1:
        raise errors.DeclarationError(
            f"dropout of {x.name!r}: p={p!r} is not a probability in [0, 1]"
        )
    step = _step_counter(x.graph)
    streams = [n.attrs["stream"] for n in x.graph.nodes if n.op == "dropout"]
    attrs = {
        "p": float(p),
        "training": training,
        "seed": None,
        "stream": max(streams, default=-1) + 1,
    }
    return apply("dropout", x, step, name=name, **attrs)[0]


def _step_counter(graph: Graph) -> Value:
    if _STEP_STATE in graph:
        return graph.node(_STEP_STATE)[0]
    step = graph.state(_STEP_STATE, (), dtype="int32", persistent=False)
    graph.update(_STEP_STATE, add(step, 1))
    return step


# ---- Threefry


def _signed(word: int) -> int:
    """A 32-bit pattern as the int32 that the scalar language keeps it in."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def key_schedule(first: int, second: int) -> tuple[int, int, int]:
    """The key words and their parity, of which each fourth round takes two."""
    return first, second, first ^ second ^ _PARITY


@lru_cache(maxsize=1024)
def _key(seed: int, stream: int) -> tuple[int, int, int]:
    """The key of a stream: its number encrypted with the 64-bit seed, so that no two collide."""
    seed_key = key_schedule(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    low, high = (np.array([w & 0xFFFFFFFF], dtype=np.uint32) for w in (stream, stream >> 32))
    first, second = threefry(seed_key, low, high)
    return key_schedule(int(first[0]), int(second[0]))


def threefry(
    key: tuple[int, int, int], x0: np.ndarray, x1: np.ndarray, rounds: int = _ROUNDS
) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 of uint32 arrays under a key schedule."""
    keys = np.asarray(key, dtype=np.uint32)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(rounds):
        x0 = x0 + x1
        turn = _ROTATIONS[i % 8]
        x1 = ((x1 << np.uint32(turn)) | (x1 >> np.uint32(32 - turn))) ^ x0
        if i % 4 == 3:
            block = i // 4 + 1
            x0 = x0 + keys[block % 3]
            x1 = x1 + keys[(block + 1) % 3] + np.uint32(block)
    return x0, x1


def threefry_scalar(key: tuple[int, int, int], x0: Expr, x1: Expr) -> Expr:
    """The first word of `threefry`, in the scalar language: int32 that wrap around."""
    x0, x1 = call("add", x0, _signed(key[0])), call("add", x1, _signed(key[1]))
    for i in range(_ROUNDS):
        x0 = call("add", x0, x1)
        x1 = call("bit_xor", call("rotate_left", x1, _ROTATIONS[i % 8]), x0)
        if i % 4 == 3:
            block = i // 4 + 1
            x0 = call("add", x0, _signed(key[block % 3]))
            x1 = call("add", x1, _signed(key[(block + 1) % 3] + block))
    return x0


def uniform_reference(
    step: int | np.ndarray, shape: Sequence[int], seed: int, stream: int
) -> np.ndarray:
    """What `random_uniform` gives: the high 24 bits of each word, times 2**-24."""
    positions = np.arange(math.prod(shape), dtype=np.uint32)
    steps = np.full_like(positions, int(step) & 0xFFFFFFFF)
    words, _ = threefry(_key(seed, stream), positions, steps)
    return ((words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)).reshape(shape)


def _uniform_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    _check_counter(types[0])
    return [TensorType(attrs["shape"], "float32")]


def _check_counter(counter: TensorType) -> None:
    if counter != TensorType((), "int32"):
        raise errors.ShapeError(f"the counter is {counter}, not i32[]")


def _uniform_lower(k: Lowering, node: Node, output: int, index: tuple[Index, ...]) -> Expr:
    flat, stride = Index(), 1
    for i, size in zip(reversed(index), reversed(node[0].sizes), strict=True):
        flat, stride = flat + i * stride, stride * size
    key = _key(node.attrs["seed"], node.attrs["stream"])
    return call("uint32_to_unit", threefry_scalar(key, position(flat), k.read(0, ())))


def _uniform_samples() -> list[Sample]:
    return [
        Sample((np.array(step, dtype=np.int32),), {"shape": shape, "seed": seed, "stream": stream})
        for step, shape, seed, stream in [
            (0, (), 0, 0),
            (1, (7,), 0, 0),
            (-5, (2, 17), 3, 1),
            (2**31 - 1, (2, 3, 4), 2**40 + 12345, 7),
            (0, (0, 3), 1, 0),
        ]
    ]


register(
    OpDef(
        "random_uniform",
        infer=_uniform_infer,
        evaluate=lambda arrays, attrs: [uniform_reference(arrays[0], **attrs)],
        vjp=lambda node, cotangents: [None],
        lower=_uniform_lower,
        samples=_uniform_samples,
    )
)


# ---- dropout


def _dropout_scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _dropout_infer(types: list[TensorType], attrs: Attrs) -> list[TensorType]:
    check_dtype(types[:1], "float")
    _check_counter(types[1])
    return [types[0]]


def _dropout_evaluate(arrays: list[np.ndarray], attrs: Attrs) -> list[np.ndarray]:
    x, step = arrays
    if not attrs["training"]:
        return [x]
    uniform = uniform_reference(step, x.shape, attrs["seed"] or 0, attrs["stream"])
    keep = (uniform >= np.float32(attrs["p"])).astype(x.dtype)
    return [x * (keep * np.asarray(_dropout_scale(attrs["p"]), dtype=x.dtype))]


def _dropout_vjp(node: Node, cotangents: Sequence[Value | None]) -> list[Value | None]:
    # Linear in x with a mask that depends on the counter only: its transpose is itself.
    g = cotangents[0]
    if g is None or not differentiable(node.inputs[0]):
        return [None, None]
    return [apply("dropout", g, node.inputs[1], **node.attrs)[0], None]


def _dropout_decompose(node: Node, inputs: tuple[Value, ...]) -> list[Value]:
    x, step = inputs
    if not node.attrs["training"]:
        return [x]
    p, seed, stream = node.attrs["p"], node.attrs["seed"] or 0, node.attrs["stream"]
    uniform = random_uniform(step, shape=x.sizes, seed=seed, stream=stream)
    return [mul(x, mul(cast(ge(uniform, p), x.dtype), _dropout_scale(p)))]


def _dropout_samples() -> list[Sample]:
    return [
        Sample(
            (draw(shape), np.array(3, dtype=np.int32)),
            {"p": p, "training": training, "seed": seed, "stream": 2},
        )
        for shape, p, training, seed in [
            ((), 0.5, True, 1),
            ((7,), 0.1, True, None),
            ((2, 17), 0.5, True, 2**33),
            ((2, 17), 0.5, False, 1),
            ((2, 17), 0.5, None, None),
            ((17,), 1.0, True, 0),
            ((17,), 0.0, True, 0),
            ((0, 3), 0.5, True, 0),
        ]
    ]


register(
    OpDef(
        "dropout",
        infer=_dropout_infer,
        evaluate=_dropout_evaluate,
        vjp=_dropout_vjp,
        lower=None,
        decompose=_dropout_decompose,
        samples=_dropout_samples,
    )
)
