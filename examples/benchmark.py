"""Time compiled networks beside PyTorch, torch.compile, JAX, onnxruntime and OpenVINO.

    python examples/benchmark.py --models lenet5 --threads 2
    python examples/benchmark.py --quick --peers pytorch onnxruntime

Peers that are not installed are listed as absent (`pip install "graphc-nn[peers]"` brings them).
Prints a table; writes benchmark.json, .csv, .txt, .png and .svg to out/benchmark (`--out`). How it
measures, and how to read the figures: docs/benchmarks.md.
"""

import sys

from graphc.bench import main

if __name__ == "__main__":
    sys.exit(main())
