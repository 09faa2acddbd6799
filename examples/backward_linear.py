"""The backward pass costs time linear in the depth of the network: measured, printed, plotted.

    python examples/backward_linear.py [--deepest 512] [--width 64] [--steps] [--plot FILE]

Builds multilayer perceptrons of growing depth. For each: the nodes that the chain rule appends, the
time of the autodiff pass, and with --steps the time of one compiled training step (forward,
backward and update). A straight line through the origin, time = c * depth, is what O(L) means.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

import graphc as gc
from passes.autodiff import differentiate


def mlp(depth: int, width: int, batch: int) -> gc.Graph:
    """A chain of `depth` fully connected layers with relu, and a mean square loss."""
    graph = gc.Graph(f"mlp{depth}")
    h = graph.input("x", (batch, width))
    for i in range(depth):
        h = gc.relu(gc.nn.linear(h, width, name=f"fc{i}"))
    graph.output(loss=gc.mean(gc.square(h)))
    return graph


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def autodiff_cost(graph: gc.Graph, repeats: int) -> tuple[int, float]:
    """(nodes that autodiff appends, median seconds it takes)."""
    seconds = []
    nodes = 0
    for _ in range(repeats):
        copy = graph.copy()
        parameters = [node[0] for node in copy.parameters.values()]
        start = time.perf_counter()
        differentiate(copy, copy.outputs["loss"], parameters)
        seconds.append(time.perf_counter() - start)
        nodes = len(copy) - len(graph)
    return nodes, statistics.median(seconds)


def step_seconds(graph: gc.Graph, batch: int, width: int, repeats: int) -> float:
    """Median seconds of one compiled step of stochastic gradient descent."""
    step = gc.compile(graph, outputs=["loss"], loss="loss", optimizer=gc.optim.SGD(1e-3))
    x = np.random.default_rng(0).standard_normal((batch, width), np.float32)
    step(x=x)
    return median_seconds(lambda: step(x=x), repeats)


def exponent(depths: list[int], seconds: list[float]) -> float:
    """Slope of log(time) over log(depth) for the deeper half: 1 is linear, 2 is quadratic."""
    half = len(depths) // 2
    return float(np.polyfit(np.log(depths[half:]), np.log(seconds[half:]), 1)[0])


def plot(path: str, depths: list[int], curves: dict[str, list[float]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print('no plot: matplotlib is not installed (pip install "graphc-nn[plot]")')
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False)
    for panel, (name, seconds) in zip(axes[0], curves.items(), strict=True):
        milliseconds = 1e3 * np.array(seconds)
        layers = np.array(depths)
        # Least squares through the origin.
        slope = (milliseconds @ layers) / (layers @ layers)
        panel.plot(layers, milliseconds, "o-", label="measured")
        panel.plot(layers, slope * layers, "--", label=f"{slope:.3f} ms per layer")
        panel.set(title=name, xlabel="layers", ylabel="milliseconds", xlim=0, ylim=0)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepest", type=int, default=512, help="layers of the deepest network")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="also compile and time whole steps")
    parser.add_argument("--plot", default="backward_linear.png", metavar="FILE")
    options = parser.parse_args()

    depths = [d for d in (8, 16, 32, 64, 128, 256, 512, 1024, 2048) if d <= options.deepest]
    curves: dict[str, list[float]] = {"autodiff pass": []}
    if options.steps:
        curves["compiled training step"] = []
    header = f"{'layers':>7} {'backward nodes':>15} {'autodiff':>12} {'per layer':>12}"
    print(header + (f" {'step':>12} {'per layer':>12}" if options.steps else ""))
    for depth in depths:
        graph = mlp(depth, options.width, options.batch)
        nodes, seconds = autodiff_cost(graph, options.repeats)
        curves["autodiff pass"].append(seconds)
        row = f"{depth:>7} {nodes:>15} {1e3 * seconds:>9.2f} ms {1e6 * seconds / depth:>9.1f} us"
        if options.steps:
            seconds = step_seconds(graph, options.batch, options.width, 5 * options.repeats)
            curves["compiled training step"].append(seconds)
            row += f" {1e3 * seconds:>9.2f} ms {1e6 * seconds / depth:>9.1f} us"
        print(row, flush=True)
    if len(depths) >= 4:
        for name, seconds in curves.items():
            print(f"{name}: time ~ layers^{exponent(depths, seconds):.2f}")
    plot(options.plot, depths, curves)


if __name__ == "__main__":
    main()
