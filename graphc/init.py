"""Initialisers of parameters and states.

An initialiser is a small frozen object kept in the graph as the attribute `init` of a parameter;
its numbers are drawn when an executable is made, from (seed, parameter name) alone. So the same
seed gives the same weights in every process and whatever other parameters a network has.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from graphc import errors
from graphc.ir import Node

# Elements of a parameter that is worth a thread.
_LARGE = 1 << 14


@runtime_checkable
class Initialiser(Protocol):
    """Draws an array of a shape."""

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray: ...


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, self.value)


@dataclass(frozen=True)
class Zeros:
    """Every element is 0."""

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)


@dataclass(frozen=True)
class Ones:
    """Every element is 1."""

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape)


@dataclass(frozen=True)
class Uniform:
    """Uniform in [low, high)."""

    low: float = 0.0
    high: float = 1.0

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.uniform(self.low, self.high, shape)


@dataclass(frozen=True)
class Normal:
    """Normal with the given mean and standard deviation."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(self.mean, self.std, shape)


@dataclass(frozen=True)
class KaimingUniform:
    """Uniform with variance gain^2 / fan, for layers followed by a rectifier (He et al. 2015,
    section 2.2).

    `a`: negative slope of the rectifier, gain^2 = 2 / (1 + a^2). `mode`: "fan_in" keeps the
    variance of activations, "fan_out" that of gradients. PyTorch's layers use a = sqrt(5): bound 1
    / sqrt(fan_in).
    """

    a: float = 0.0
    mode: str = "fan_in"

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        bound = math.sqrt(3) * _kaiming_std(shape, self.a, self.mode)
        return rng.uniform(-bound, bound, shape)


@dataclass(frozen=True)
class KaimingNormal:
    """Normal with variance gain^2 / fan; see KaimingUniform."""

    a: float = 0.0
    mode: str = "fan_in"

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(0.0, _kaiming_std(shape, self.a, self.mode), shape)


@dataclass(frozen=True)
class XavierUniform:
    """Uniform with variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010, equation 16)."""

    gain: float = 1.0

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        bound = math.sqrt(3) * _xavier_std(shape, self.gain)
        return rng.uniform(-bound, bound, shape)


@dataclass(frozen=True)
class XavierNormal:
    """Normal with variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio 2010, equation 12)."""

    gain: float = 1.0

    def sample(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(0.0, _xavier_std(shape, self.gain), shape)


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight [out, in, *kernel]: inputs per output element and the
    reverse."""
    if len(shape) < 2:
        raise errors.ShapeError(
            f"a weight of shape {list(shape)} has no fan: it needs two axes [out, in, ...] or more"
        )
    taps = math.prod(shape[2:])
    return shape[1] * taps, shape[0] * taps


def _kaiming_std(shape: tuple[int, ...], a: float, mode: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise errors.DeclarationError(f'mode={mode!r} must be "fan_in" or "fan_out"')
    fan = fans(shape)[mode == "fan_out"]
    return math.sqrt(2 / (1 + a * a) / fan) if fan else 0.0


def _xavier_std(shape: tuple[int, ...], gain: float) -> float:
    total = sum(fans(shape))
    return gain * math.sqrt(2 / total) if total else 0.0


def kaiming_uniform(a: float = 0.0, mode: str = "fan_in") -> KaimingUniform:
    return KaimingUniform(a, mode)


def kaiming_normal(a: float = 0.0, mode: str = "fan_in") -> KaimingNormal:
    return KaimingNormal(a, mode)


def xavier_uniform(gain: float = 1.0) -> XavierUniform:
    return XavierUniform(gain)


def xavier_normal(gain: float = 1.0) -> XavierNormal:
    return XavierNormal(gain)


def uniform(low: float = 0.0, high: float = 1.0) -> Uniform:
    return Uniform(low, high)


def normal(mean: float = 0.0, std: float = 1.0) -> Normal:
    return Normal(mean, std)


def constant(value: float) -> Constant:
    return Constant(value)


def zeros() -> Zeros:
    return Zeros()


def ones() -> Ones:
    return Ones()


def materialise(node: Node, seed: int) -> np.ndarray:
    """The first contents of a parameter or state node, in its shape and dtype.

    `init` may be an initialiser, an array or number, or None (zeros). Depends on the seed and the
    node's name only. Raises ShapeError where an array has another shape, DeclarationError for
    anything else.
    """
    kind, init = node.types[0], node.attrs.get("init")
    shape = tuple(int(d) for d in kind.shape)
    if init is None:
        return np.zeros(shape, kind.dtype)
    if isinstance(init, Initialiser):
        rng = np.random.default_rng([seed, zlib.crc32(node.name.encode())])
        try:
            return np.ascontiguousarray(init.sample(rng, shape), dtype=kind.dtype).reshape(shape)
        except errors.DeclarationError as error:
            raise type(error)(f"{node.describe()}: init={init}: {error}") from None
    try:
        array = np.asarray(init)
        array = np.full(shape, array) if array.ndim == 0 else array
        array = np.array(array, dtype=kind.dtype, order="C")
    except (TypeError, ValueError):
        raise errors.DeclarationError(
            f"{node.describe()}: init={init!r} is neither an initialiser of gc.nn.init, an array, "
            "a number nor None"
        ) from None
    if array.shape != shape:
        raise errors.ShapeError(
            f"{node.describe()}: init has shape {list(array.shape)}, the node is {kind}"
        )
    return array


class InitialValues:
    """The first contents of parameters and states, from one seed.

    Drawing millions of numbers takes as long as the passes, but no Python: graphc's own
    initialisers do it beside them. Each parameter has random numbers of its own."""

    def __init__(self, seed: int):
        self.seed = seed
        self._drawn: dict[str, Future[np.ndarray]] = {}

    def draw(self, nodes: Iterable[Node], threads: int) -> None:
        """Begin to draw the large ones, in `threads` of their own."""
        pool = ThreadPoolExecutor(threads)  # its threads end with it
        for node in nodes:
            own = type(node.attrs.get("init")).__module__ == __name__
            if own and node.types[0].size >= _LARGE:
                self._drawn[node.name] = pool.submit(materialise, node, self.seed)

    def take(self, node: Node) -> np.ndarray:
        """What `materialise` gives, drawn already or not."""
        drawn = self._drawn.pop(node.name, None)
        return drawn.result() if drawn else materialise(node, self.seed)
