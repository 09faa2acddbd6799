"""The benchmark as a command: its options, one run from start to report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphc import errors
from graphc.bench import rounds
from graphc.bench.models import DEFAULT_MODELS, MODELS, MODES, works
from graphc.bench.peers import PEERS
from graphc.bench.report import Report
from graphc.runtime.team import available_cores


@dataclass(frozen=True)
class Options:
    """What to measure.

    models: names, empty for the default ones. peers: names, empty for all. batches, threads: empty
    for each model's own batches, for one thread and one a core. modes: "infer", "train". rounds:
    turns of each peer, None for the default. quick: few short rounds, and a second start, for the
    warm compile time, of graphc only. out: folder for the files.
    """

    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    modes: tuple[str, ...] = MODES
    threads: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    rounds: int | None = None
    quick: bool = False
    out: str = "out/benchmark"


def run(options: Options, say: Callable[[str], None] = lambda text: None) -> Report:
    """Measure everything asked for. `say` hears what happens, a line at a time.

    Raises NameLookupError for unknown models or peers, GraphcError for options that make no sense.
    """
    chosen = _peers(options.peers)
    cores = available_cores()
    threads = list(options.threads or sorted({1, cores}))
    if too_many := [t for t in threads if not 1 <= t <= cores]:
        raise errors.GraphcError(f"threads={too_many[0]}: this process may use 1 to {cores} cores")
    if wrong := [m for m in options.modes if m not in MODES]:
        raise errors.GraphcError(f"modes: {wrong[0]!r} is not one of {', '.join(MODES)}")
    if bad := [b for b in options.batches if b < 1]:
        raise errors.GraphcError(f"batches: {bad[0]} is not a batch size: use 1 or more")
    work = works(
        list(options.models or DEFAULT_MODELS), list(options.batches), list(options.modes), threads
    )
    absent = {p.name: why for p in chosen if (why := p.absent())}
    present = [p for p in chosen if p.name not in absent]
    plan = rounds.QUICK if options.quick else rounds.Plan()
    if options.rounds is not None:
        if options.rounds < 1:
            raise errors.GraphcError(f"rounds={options.rounds}: use 1 or more")
        plan = dataclasses.replace(plan, rounds=options.rounds)
    machines = {}
    for count in threads:
        say(f"measuring the machine's limits with {count} thread{'s' if count > 1 else ''}")
        machines[count] = {**rounds.measure_peak(count), "cores": cores}
    rows = []
    for item in work:
        rows += rounds.measure(item, present, plan, machines[item.threads]["gflops"], say)
    versions = {p.name: p.version() for p in present}
    return Report(rows, machines, versions, absent, dataclasses.asdict(options))


def _peers(names: Sequence[str]) -> list:
    unknown = [n for n in names if n not in PEERS]
    if unknown:
        raise errors.NameLookupError(
            f"there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}"
        )
    return [p for n, p in PEERS.items() if not names or n in names or n == rounds.OURS]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description="Time networks compiled by graphc beside other libraries, in turns.",
    )
    models = f"of {', '.join(MODELS)}; default: {' '.join(DEFAULT_MODELS)}"
    peers = f"default: all installed of {', '.join(PEERS)}"
    parser.add_argument("--models", nargs="+", default=[], help=models)
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[], help="default: the models' own"
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="infer train")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[], help="default: 1 and all cores"
    )
    parser.add_argument("--peers", nargs="+", default=[], help=peers)
    parser.add_argument("--rounds", type=int, help=f"default: {rounds.Plan().rounds}")
    parser.add_argument("--quick", action="store_true", help="few, short rounds: rough figures")
    parser.add_argument("--out", default=Options.out, help="folder for JSON, CSV and pictures")
    given = parser.parse_args(arguments)
    fields: dict[str, Any] = {}
    for name, value in vars(given).items():
        fields[name] = tuple(value) if isinstance(value, list) else value
    options = Options(**fields)
    try:
        report = run(options, _say())
    except errors.GraphcError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    finally:
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
    report.show()
    written = report.save(Path(options.out))
    print("written: " + ", ".join(map(str, written)))
    return 0


def _say() -> Callable[[str], None]:
    """Progress on the terminal, one line that changes; elsewhere no rounds, only what was built."""
    terminal = sys.stderr.isatty()

    def say(text: str) -> None:
        if terminal:
            sys.stderr.write(f"\r\033[K{text[:150]}")
        elif ": round " not in text:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    return say
