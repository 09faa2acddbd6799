"""Convolutions whose sums over channels are cut into parts (`graphc.codegen.parts`)."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

import graphc as gc
from graphc.codegen import simd
from graphc.ir import Layout
from graphc.runtime.layout import read_layout, write_layout
from passes.cache_sets import spread

# (images, channels, height and width, output channels, kernel, stride, bias)
CASES = {
    "many channels": (1, 1024, 14, 64, 1, 1, False),
    "ragged channels": (1, 1032, 14, 36, 1, 1, True),
    "pixels left over": (1, 2048, 7, 256, 1, 1, True),
    "several images": (4, 768, 14, 40, 1, 1, True),
    "taps": (2, 256, 14, 64, 3, 2, False),
}


def convolution(channels, size, out_channels, kernel, stride, bias):
    g = gc.Graph("parts")
    x = g.input("x", ("N", channels, size, size))
    h = gc.nn.conv2d(
        x, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias, name="conv"
    )
    g.output(y=gc.relu(h))
    return g


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("case", CASES)
def test_parts_add_up(case, threads):
    images, channels, size, *rest = CASES[case]
    g = convolution(channels, size, *rest)
    exe = gc.compile(
        g,
        outputs=["y"],
        dims={"N": images},
        threads=threads,
        precision="strict",
        pipeline=gc.default_pipeline("channels"),
    )
    schedules = [launch.schedule for launch in exe.launches]
    parts = {n for s in schedules for n in (*s.around, *s.order) if n[0] == "r"}
    assert parts, "no sum was cut"
    if case == "pixels left over":
        assert not all(s.whole for s in schedules)
    agrees(exe, g, (images, channels, size, size), 1e-5)


def agrees(exe, graph, shape, tolerance):
    known = gc.compile(graph, outputs=["y"], dims={"N": shape[0]}, target="interpret")
    exe.load_state(known.state())
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    expected = known(x=x)["y"]
    for _ in range(2):  # the second time the result's memory holds the first one's sums
        assert np.abs(exe(x=x)["y"] - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("threads", (1, 2))
def test_large_weights_are_read_ahead(threads):
    """The products of Winograd's points, whose weights are panels far apart."""
    g = convolution(128, 14, 136, 3, 1, True)
    exe = gc.compile(g, outputs=["y"], dims={"N": 1}, threads=threads)
    ahead = [launch.schedule.ahead for launch in exe.launches if launch.schedule.ahead]
    assert ahead and any("prefetch(" in launch.call.source for launch in exe.launches)
    agrees(exe, g, (1, 128, 14, 14), 1e-4)


class Recorder:
    """A vocabulary whose operations compute nothing, but note the lines they touch."""

    def __init__(self, numbers):
        self.numbers, self.loaded, self.fetched = numbers, set(), set()
        self.late, self.minimum = Counter(), min

    def arguments(self, count):
        return lambda args: self.numbers

    def pointer(self, dtype):
        return lambda buffer: buffer

    def load_tile(self, counts, kind, fixed):
        def load(buffer, at, strides):
            for digits in itertools.product(*map(range, counts)):
                place = at + sum(d * s for d, s in zip(digits, strides, strict=True))
                line = buffer, place // 16
                if line not in self.loaded and line not in self.fetched:
                    self.late[buffer] += 1
                self.loaded.add(line)

        return load

    def prefetch(self, buffer, at):
        self.fetched.add((buffer, at // 16))

    def __getattr__(self, name):
        return lambda *a, **k: lambda *a: None


def test_all_but_the_first_piece_is_fetched_before_it_is_read(monkeypatch):
    """Products of Winograd's points, and their sums over images and pixels."""
    g = convolution(256, 12, 264, 3, 1, False)
    g.output(total=gc.sum(g.outputs["y"]))
    names = {"loss": "total", "gradients": ["conv.weight"]}
    exe = gc.compile(g, outputs=["total"], dims={"N": 4}, threads=2, **names)
    for kind in ("matmul", "patch_weight_grad"):
        launch = next(e for e in exe.launches if e.node.attrs["kind"] == kind)
        seen = Recorder((*range(launch.call.buffers), *launch.call.numbers))
        monkeypatch.setattr(simd, "vocabulary", lambda lanes, seen=seen: seen)
        space = {}
        exec(launch.call.source, space)
        space["kernel"](None, 0, 12)  # three points of 36
        assert len(launch.schedule.ahead) == 2
        for ahead in launch.schedule.ahead:
            lines = sum(buffer == ahead.buffer for buffer, _ in seen.loaded)
            assert 0 < seen.late[ahead.buffer] <= 0.34 * lines


def test_points_of_a_patch_lie_in_many_sets():
    """Places a multiple of 4096 bytes apart share one set of 8 lines."""
    sizes = {(1, 36, 256, 16): 2, (1, 36, 64, 196): 2, (64, 36, 512, 1): 0, (3, 16, 40, 9): 2}
    for shape, axis in sizes.items():
        plain = Layout(axis, 8)
        layout = spread(plain, shape, along=1)
        step = 4 * layout.strides(shape)[1]
        sets = [i * step // 64 % 64 for i in range(shape[1])]
        assert max(map(sets.count, sets)) <= 5
        assert step < 1.2 * 4 * plain.strides(shape)[1]
        memory = np.empty(layout.physical_shape(shape), np.float32)
        array = np.random.default_rng(0).standard_normal(shape, np.float32)
        write_layout(memory, array, layout)
        np.testing.assert_array_equal(read_layout(memory, shape, layout), array)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("channels", (64, 520))
def test_pixels_in_blocks(channels, threads):
    """Images that do not fit the second cache are read once, not once for a few channels."""
    g = convolution(channels, 56, 128, 1, 1, True)
    exe = gc.compile(g, outputs=["y"], dims={"N": 2}, threads=threads, precision="strict")
    (launch,) = [one for one in exe.launches if one.node.name == "conv"]
    assert launch.schedule.order[-1].endswith("l")
    agrees(exe, g, (2, channels, 56, 56), 1e-5)


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("columns", (1003, 1024))
def test_wide_products(columns, threads):
    """Their innermost loop runs over vectors, the last of which may be short."""
    g = gc.Graph("wide")
    a, b = g.input("a", (64, 2048)), g.input("b", (2048, columns))
    g.output(y=gc.relu(a @ b))
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(n, np.float32) for n in ((64, 2048), (2048, columns)))
    got = gc.compile(g, outputs=["y"], threads=threads)(a=left, b=right)["y"]
    expected = np.maximum(left.astype(np.float64) @ right, 0)
    assert np.abs(got - expected).max() < 1e-5 * expected.max()
