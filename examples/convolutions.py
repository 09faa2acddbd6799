"""Every convolution of a network, direct and by the algorithm that the compiler chose.

    python examples/convolutions.py [--model resnet18] [--batch 1] [--threads 1] [--rounds 7]

Compiles inference twice: with precision="strict", where all convolutions are direct, and as usual.
Both are profiled in turns; the time of a layer is that of all kernels that count for it, with its
transforms, its batch norm and what else is fused, and the least of the rounds is shown. GFLOP/s and
shares of the measured peak count the multiply-adds of a direct convolution for both.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

import graphc as gc


def multiply_adds(graph: gc.Graph, batch: int) -> dict[str, int]:
    """Of each convolution by its name: outputs times the weights that each of them reads."""
    return {
        node.name: batch
        * math.prod(node.outputs[0].type.shape[1:])
        * math.prod(node.inputs[1].type.shape[1:])
        for node in graph
        if node.op == "conv2d"
    }


def layer_seconds(executables: list[gc.Executable], feeds: dict, rounds: int) -> list[dict]:
    """The least seconds of each layer in `rounds` profiles of each executable, in turns."""
    found: list[dict[str, float]] = [{} for _ in executables]
    for _ in range(rounds):
        for executable, least in zip(executables, found, strict=True):
            for layer, phases in executable.profile(feeds, runs=10).layers().items():
                least[layer] = min(least.get(layer, math.inf), sum(phases.values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    graph = getattr(gc.zoo, options.model)()
    executables = [
        gc.compile(
            graph,
            outputs=["logits"],
            dims={"N": options.batch},
            threads=options.threads,
            precision=precision,
        )
        for precision in ("strict", "float32")
    ]
    shape = (options.batch, *graph.inputs["image"].types[0].shape[1:])
    feeds = {"image": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    direct, chosen = layer_seconds(executables, feeds, options.rounds)
    machine = executables[0].last_profile.machine
    print(machine)
    print(f"{'':24} {'direct ms':>9} {'GFLOP/s':>8} {'of peak':>8} {'chosen ms':>10} {'times':>6}")
    for layer, count in multiply_adds(graph, options.batch).items():
        rate = 2e-9 * count / direct[layer]
        print(
            f"{layer:24} {1e3 * direct[layer]:9.3f} {rate:8.1f} {rate / machine.gflops:8.0%}"
            f" {1e3 * chosen[layer]:10.3f} {direct[layer] / chosen[layer]:6.2f}"
        )


if __name__ == "__main__":
    main()
