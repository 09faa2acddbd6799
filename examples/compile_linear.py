"""Compiling costs time linear in the depth of the network: measured, printed, plotted.

    python examples/compile_linear.py [--deepest 110] [--batch 8] [--plot FILE]

Compiles a training step of the CIFAR ResNets, 20 to 110 layers deep. For each: the time of every
pass, of all of them together, and of the whole call to `compile`, its kernels in the cache already
(they are shared: the deepest network has no other kernels than the shallowest). A straight line,
time = a + b * depth, is what linear means. "again" is the same call once its program is on disk.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter

import numpy as np

import graphc as gc

DEPTHS = (20, 32, 44, 56, 110)


def compile_step(depth: int, batch: int, kept: bool = False) -> tuple[Counter[str], float]:
    """(milliseconds of each pass by its name, seconds of the whole call). `kept`: a program that is
    on disk is taken from there; else passes run."""
    graph = getattr(gc.zoo, f"resnet{depth}")()
    begin = time.perf_counter()
    step = gc.compile(
        graph,
        outputs=["loss"],
        dims={"N": batch},
        loss="loss",
        optimizer=gc.optim.SGD(0.1, momentum=0.9),
        pipeline=None if kept else gc.default_pipeline(),
    )
    seconds = time.perf_counter() - begin
    passes: Counter[str] = Counter()
    for record in step.records:
        passes[record.name] += 1e3 * record.seconds
    return passes, seconds


def measure(depth: int, batch: int, repeats: int) -> tuple[dict[str, float], float, float]:
    """Medians of `repeats` compilations, after one that fills the cache, and of as many again."""
    compile_step(depth, batch, kept=True)
    runs = [compile_step(depth, batch) for _ in range(repeats)]
    again = [compile_step(depth, batch, kept=True)[1] for _ in range(repeats)]
    names = runs[0][0]
    passes = {n: statistics.median(found[n] for found, _ in runs) for n in names}
    return passes, statistics.median(s for _, s in runs), statistics.median(again)


def exponent(depths: list[int], values: list[float]) -> float:
    """Slope of log(time) over log(depth): 1 is linear, 2 is quadratic."""
    return float(np.polyfit(np.log(depths), np.log(values), 1)[0])


def plot(path: str, depths: list[int], passes: list[dict[str, float]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print('no plot: matplotlib is not installed (pip install "graphc-nn[plot]")')
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    slow = sorted(passes[-1], key=passes[-1].__getitem__, reverse=True)
    shown = slow[:7]
    layers = [[found[name] for found in passes] for name in shown]
    layers.append([sum(found[name] for name in slow[7:]) for found in passes])
    axes.stackplot(depths, layers, labels=[*shown, "other passes"])
    total = [sum(found.values()) for found in passes]
    b, a = np.polyfit(depths, total, 1)
    ends = np.array([depths[0], depths[-1]])
    axes.plot(ends, a + b * ends, "k--", label=f"{b:.2f} ms per layer")
    axes.plot(depths, total, "ko")
    axes.set(xlabel="layers", ylabel="milliseconds", ylim=0, title="passes, ResNet training step")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deepest", type=int, default=110, help="layers of the deepest network")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", default="compile_linear.png", metavar="FILE")
    options = parser.parse_args()

    depths = [depth for depth in DEPTHS if depth <= options.deepest] or list(DEPTHS[:1])
    found: list[dict[str, float]] = []
    head = f"{'layers':>7} {'passes':>10} {'per layer':>10} {'compile':>10} {'again':>9}"
    print(f"{head}   slowest passes, ms")
    for depth in depths:
        passes, seconds, again = measure(depth, options.batch, options.repeats)
        found.append(passes)
        total = sum(passes.values())
        slowest = sorted(passes, key=passes.__getitem__, reverse=True)[:4]
        text = ", ".join(f"{name} {passes[name]:.0f}" for name in slowest)
        row = f"{depth:>7} {total:>7.0f} ms {total / depth:>7.2f} ms {seconds:>8.2f} s"
        print(f"{row} {again:>7.2f} s   {text}", flush=True)
    if len(depths) > 1:
        print(f"passes: time ~ layers^{exponent(depths, [sum(f.values()) for f in found]):.2f}")
        for name, last in sorted(found[-1].items(), key=lambda item: -item[1]):
            if last > 1:
                print(f"  {name}: layers^{exponent(depths, [f[name] for f in found]):.2f}")
        plot(options.plot, depths, found)


if __name__ == "__main__":
    main()
