"""The figures that matplotlib draws: memory map, roofline, learning curves."""

import numpy as np
import pytest

import graphc as gc
from graphc.errors import GraphcError, MissingExtraError
from graphc.train import Epoch, History

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def step():
    g = gc.Graph("small")
    x, label = g.input("x", ("N", 12)), g.input("label", ("N",), dtype="int32")
    h = gc.relu(gc.nn.linear(x, 16, name="fc1"))
    g.output(loss=gc.softmax_cross_entropy(gc.nn.linear(h, 4, name="fc2"), label))
    return gc.compile(
        g, outputs=["loss"], dims={"N": 16}, loss="loss", optimizer=gc.optim.SGD(0.1), threads=1
    )


def profile(step):
    x = np.random.default_rng(0).standard_normal((16, 12)).astype("float32")
    return step.profile(x=x, label=np.zeros(16, "int32"), runs=3)


def test_memory_map_shows_every_value_at_its_place(step, tmp_path):
    figure = gc.viz.memory(step)
    top, below = figure.axes
    drawn = sorted(
        (round(bar.get_x()), round(1e6 * bar.get_y()), round(1e6 * bar.get_height()))
        for bars in top.containers
        for bar in bars
    )
    report = step.memory()
    assert drawn == sorted((p.first, p.offset, p.bytes) for p in report.plan.lifetimes)
    heights = {round(1e6 * line.get_ydata()[0]) for line in top.get_lines()}
    assert heights == {report.arena_bytes, report.lower_bound}
    figure.savefig(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 5000


def test_roofline_has_a_point_for_each_kernel(step, tmp_path):
    measured = profile(step)
    for source in (step, measured):
        (axes,) = gc.viz.roofline(source).axes
        points = sorted(
            tuple(point) for group in axes.collections for point in group.get_offsets().tolist()
        )
        rows = [row for row in measured.launches if row.flops and row.seconds]
        expected = sorted((row.intensity, row.gflops) for row in rows)
        np.testing.assert_allclose(points, expected)
    assert "of the measured peak" in axes.get_title()
    gc.viz.roofline(step).savefig(tmp_path / "roofline.svg")


def test_roofline_of_what_was_not_measured():
    g = gc.Graph("never")
    g.output(y=gc.relu(g.input("x", (4,))))
    with pytest.raises(GraphcError, match=r"exe\.profile"):
        gc.viz.roofline(gc.compile(g, outputs=["y"], threads=1))


def test_curves_are_a_figure():
    history = History()
    history.epochs = [Epoch(n, 4 * n, 1 / n, None, None, None, 0.1, 1.0) for n in (1, 2, 3)]
    history.losses = [1.0] * 12
    (axes,) = gc.viz.curves(history, "run").axes
    shown = [line for line in axes.get_lines() if line.get_label() == "training"]
    assert shown[0].get_ydata().tolist() == [1, 1 / 2, 1 / 3]


def test_without_matplotlib_the_extra_is_named(step, monkeypatch):
    import sys

    profile(step)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (gc.viz.memory, gc.viz.roofline):
        with pytest.raises(MissingExtraError, match=r"graphc-nn\[plot\]"):
            draw(step)
