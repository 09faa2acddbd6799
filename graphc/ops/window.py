"""Sliding windows over two spatial axes: what convolutions and pools have in common.

A window of `kernel` taps, `dilation` apart, moves by `stride` over an axis with `padding` before
and after it. Output position o and tap k meet input position `o*stride - before + k*dilation`.
Everything here is per axis, so that the height and the width may differ in every respect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphc import errors
from graphc.expr import Expr, Index
from graphc.ir import Dimension, TensorType, Value
from graphc.ops.registry import Attrs, Lowering, here

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Bound = tuple[Index, int]
Indices = tuple[Index, ...]
Bounds = tuple[Bound, ...]


# ---- arguments as users write them


@contextlib.contextmanager
def naming(op: str, name: str | None, x: Value) -> Iterator[None]:
    """Errors raised inside say which call they are about: a node's arguments precede the node."""
    try:
        yield
    except errors.DeclarationError as error:
        call = f"{name} ({op})" if name else op
        raise type(error)(f"{here()}{call} of input {x.name!r} {x.type}: {error}") from None


def pair(value: Any, what: str, least: int = 1) -> Pair:
    """`3` or `(3, 3)` as two ints >= `least`. Raises ShapeError."""
    items = (value, value) if isinstance(value, (int, np.integer)) else value
    try:
        a, b = (int(v) for v in items)
    except (TypeError, ValueError):
        raise errors.ShapeError(f"{what}={value!r} must be an int or a pair of ints") from None
    if a < least or b < least:
        raise errors.ShapeError(f"{what}={value!r} must be at least {least}")
    return a, b


def padding_pairs(
    padding: Any, sizes: Sequence[Dimension], kernel: Pair, stride: Pair, dilation: Pair
) -> Padding:
    """Padding as ((top, bottom), (left, right)) from an int, a pair, two pairs, "same" or "valid".

    "same" makes the output ceil(size / stride) long and puts an odd element at the end, as ONNX's
    SAME_UPPER and, for stride 1, PyTorch do. Raises ShapeError.
    """
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        axes = [_same(*axis) for axis in zip(sizes, kernel, stride, dilation, strict=True)]
        return axes[0], axes[1]
    if isinstance(padding, str):
        raise errors.ShapeError(f'padding={padding!r} must be a number, "same" or "valid"')
    if isinstance(padding, (int, np.integer)):
        padding = (padding, padding)
    if len(padding) != 2:
        raise errors.ShapeError(
            f"padding={padding!r} must be an int, (height, width) or ((top, bottom), (left, right))"
        )
    first, second = (pair(p, "padding", least=0) for p in padding)
    return first, second


def _same(size: Dimension, kernel: int, stride: int, dilation: int) -> Pair:
    span = dilation * (kernel - 1)
    if stride == 1:
        total = span
    elif isinstance(size, str):
        raise errors.ShapeError(
            f'padding="same" with stride {stride} needs a known size, not {size!r}: give the '
            "padding in numbers"
        )
    else:
        total = max((-(-size // stride) - 1) * stride + span + 1 - size, 0)
    return total // 2, total - total // 2


# ---- shapes


def output_extent(
    size: Dimension, axis: str, kernel: int, stride: int, pad: Pair, dilation: int
) -> Dimension:
    """Number of window positions along an axis. Raises ShapeError where not even one fits."""
    span = dilation * (kernel - 1) + 1
    if isinstance(size, str):
        if stride == 1 and sum(pad) == span - 1:
            return size
        raise errors.ShapeError(
            f"the {axis} {size!r} of the input is unknown and this window changes it: "
            f"declare the {axis} as a number (only the batch may be a name)"
        )
    if size + sum(pad) < span:
        reach = f" (dilation {dilation}: it spans {span})" if dilation > 1 else ""
        raise errors.ShapeError(
            f"a window of {axis} {kernel}{reach} does not fit the input's {axis} {size} with "
            "padding "
            f"{pad[0]}+{pad[1]}: use a smaller kernel or more padding"
        )
    return (size + sum(pad) - span) // stride + 1


def output_extents(
    sizes: Sequence[Dimension], kernel: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> tuple[Dimension, Dimension]:
    """`output_extent` of the height and of the width."""
    height, width = (
        output_extent(
            sizes[i], ("height", "width")[i], kernel[i], stride[i], padding[i], dilation[i]
        )
        for i in (0, 1)
    )
    return height, width


def image_type(t: TensorType, what: str = "input") -> TensorType:
    """`t`, checked to be a floating-point [N,C,H,W]. Raises ShapeError or DTypeError."""
    if t.rank != 4:
        raise errors.ShapeError(f"{what} {t} must have 4 dimensions [N,C,H,W]; reshape it")
    if not t.is_float:
        raise errors.DTypeError(
            f"{what} {t} must be float32 or float64; convert it with gc.cast(x, 'float32')"
        )
    return t


# ---- NumPy


def pad_images(x: np.ndarray, padding: Padding, value: float = 0.0) -> np.ndarray:
    if not any(map(any, padding)):
        return np.ascontiguousarray(x)
    return np.pad(x, ((0, 0), (0, 0), *padding), constant_values=value)


def windows(x: np.ndarray, kernel: Pair, stride: Pair, dilation: Pair) -> np.ndarray:
    """A read-only view [N,C,KH,KW,OH,OW] of all windows of a padded x[N,C,H,W]."""
    n, c, height, width = x.shape
    out = output_extents((height, width), kernel, stride, ((0, 0), (0, 0)), dilation)
    sn, sc, sh, sw = x.strides
    strides = (sn, sc, sh * dilation[0], sw * dilation[1], sh * stride[0], sw * stride[1])
    shape = (n, c, *kernel, *(int(d) for d in out))
    return np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False)


def add_windows(
    taps: np.ndarray, input_shape: Sequence[int], stride: Pair, padding: Padding, dilation: Pair
) -> np.ndarray:
    """The transpose of `pad_images` and `windows`: sum taps[N,C,KH,KW,OH,OW] where they came
    from."""
    n, c, kernel_height, kernel_width, out_height, out_width = taps.shape
    height, width = input_shape[2:]
    (top, bottom), (left, right) = padding
    total = np.zeros((n, c, height + top + bottom, width + left + right), taps.dtype)
    for i in range(kernel_height):
        for j in range(kernel_width):
            y, x = i * dilation[0], j * dilation[1]
            rows = slice(y, y + (out_height - 1) * stride[0] + 1, stride[0])
            columns = slice(x, x + (out_width - 1) * stride[1] + 1, stride[1])
            total[:, :, rows, columns] += taps[:, :, i, j]
    return np.ascontiguousarray(total[:, :, top : top + height, left : left + width])


# ---- lowering


@dataclass(frozen=True)
class WindowAxis:
    """One spatial axis of a window op with every size known."""

    size: int
    output: int
    kernel: int
    stride: int
    before: int
    after: int
    dilation: int

    def input_position(self, o: Index, k: Index) -> tuple[Index, list[Bound]]:
        """The input position under tap k of window o, and the bounds it must meet."""
        position = o * self.stride - self.before + k * self.dilation
        return position, [(position, self.size)] if self.before or self.after else []

    def reach(self) -> Pair:
        """First and last window that can meet input position `stride * q + phase`, relative to q.

        Tap k of window q + t lies there if `k * dilation = phase + before - stride * t`."""
        span = self.dilation * (self.kernel - 1)
        first = -((span - self.before) // self.stride)
        return first, (self.stride - 1 + self.before) // self.stride

    def windows_over(
        self, k: Lowering, i: Index
    ) -> tuple[tuple[int, ...], Callable[..., tuple[Index, Index, list[Bound]]]]:
        """All (window o, tap k) pairs that meet input position i.

        Returns the extents of the loops to run and a function of the loop indices that gives o, k
        and the bounds under which the pair exists. With stride 1 the loop runs over taps and o
        follows. With a larger stride, positions of one phase (equal modulo the stride) meet the
        same taps, so that every phase is a dense convolution with a part of the kernel: the loop
        runs over the few windows in `reach` and the tap follows from the phase alone. With a
        dilation as well it runs over both, keeping the pairs that meet.
        """
        if self.stride == 1:
            at = i + self.before
            span = self.dilation * (self.kernel - 1)
            inner = self.before >= span and self.after >= span  # every window in reach exists

            def taps(tap: Index) -> tuple[Index, Index, list[Bound]]:
                o = at - tap * self.dilation
                return o, tap, [] if inner else [(o, self.output)]

            return (self.kernel,), taps
        q, phase = k.divmod(i, self.stride)
        first, last = self.reach()
        extent = last - first + 1

        def meeting(t: Index) -> tuple[Index, Index]:
            """Window t of those in reach, and the position under it: its tap times the dilation."""
            return q + first + t, phase + (self.before - first * self.stride) - t * self.stride

        if extent == 1 and self.dilation == 1 and self.kernel == self.stride:
            o, tap = meeting(Index())  # windows side by side
            return (), lambda: (o, tap, [(o, self.output)])
        if self.dilation == 1:

            def windows(t: Index) -> tuple[Index, Index, list[Bound]]:
                o, tap = meeting(t)
                return o, tap, [(o, self.output), (tap, self.kernel)]

            return (extent,), windows

        def pairs(t: Index, tap: Index) -> tuple[Index, Index, list[Bound]]:
            o, position = meeting(t)
            return o, tap, [(o, self.output), (position - tap * self.dilation, 1)]

        return (extent, self.kernel), pairs


def window_axes(
    sizes: Sequence[Dimension],
    outputs: Sequence[Dimension],
    kernel: Sequence[Dimension],
    attrs: Attrs,
) -> tuple[WindowAxis, WindowAxis]:
    """The height's and the width's WindowAxis of an op with stride, padding and dilation."""

    def axis(i: int) -> WindowAxis:
        before, after = attrs["padding"][i]
        size, output, taps = int(sizes[i]), int(outputs[i]), int(kernel[i])
        dilation = attrs.get("dilation", (1, 1))[i]
        return WindowAxis(size, output, taps, attrs["stride"][i], before, after, dilation)

    return axis(0), axis(1)


def sum_over_windows(
    k: Lowering,
    axes: tuple[WindowAxis, WindowAxis],
    index: tuple[Index, Index],
    extra: tuple[int, ...],
    body: Callable[..., Expr],
) -> Expr:
    """Sum `body(extra loops, (oh, ow), (kh, kw), bounds)` over all windows that meet an input
    position."""
    rows, row = axes[0].windows_over(k, index[0])
    columns, column = axes[1].windows_over(k, index[1])
    # The few windows, which may not all exist, are counted outside of the long `extra` loops.
    first, second = len(rows), len(rows) + len(columns)

    def term(*loops: Index) -> Expr:
        oh, kh, above = row(*loops[:first])
        ow, kw, beside = column(*loops[first:second])
        return body(loops[second:], (oh, ow), (kh, kw), tuple(above + beside))

    extents = (*rows, *columns, *extra)
    return k.reduce("sum", extents, term) if extents else term()
