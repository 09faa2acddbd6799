"""Measure compiled networks beside other libraries: `examples/benchmark.py`, `graphc bench`.

`run(Options(...))` measures, `Report.show` prints and `Report.save` writes; `main` is the command
line. `docs/benchmarks.md` says how it is done and how to read it.
"""

from typing import Any

__all__ = ["Options", "main", "run"]


def __getattr__(name: str) -> Any:
    # When first used: the peers' processes import parts of this package and shall stay small.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from graphc.bench import command

    return getattr(command, name)
