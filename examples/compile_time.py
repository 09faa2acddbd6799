"""How long a training step takes to compile: cold, the next model of its family, and again.

    python examples/compile_time.py [--models resnet18 resnet34] [--batch 8]

Every line is one call of `compile`, after imports and the declaration. The models are compiled one
after the other in one process that starts with an empty cache: the first is cold, the others find
the kernels that they share with it. Then each is compiled again, in a process of its own: first as
usual, which finds the finished program, then with the passes run once more, as for a program that
differs in some option.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time


def compile_steps(models: list[str], batch: int, passes: bool) -> None:
    """Prints one JSON line a model: seconds, seconds of passes, kernels compiled and launched."""
    import graphc as gc

    gc.compile  # noqa: B018  # imports the compiler
    for model in models:
        graph = getattr(gc.zoo, model)()
        begin = time.perf_counter()
        step = gc.compile(
            graph,
            outputs=["loss"],
            dims={"N": batch},
            loss="loss",
            optimizer=gc.optim.SGD(0.1, momentum=0.9),
            # A pipeline of the caller's own is run, whatever programs are on disk.
            pipeline=gc.default_pipeline() if passes else None,
        )
        seconds = time.perf_counter() - begin
        spent = sum(record.seconds for record in step.records)
        counts = [len(step.compiled_kernels), len(step.launches)]
        print(json.dumps([model, seconds, spent, *counts]), flush=True)


def in_new_process(models: list[str], batch: int, passes: bool, folder: str) -> list[list]:
    """What `compile_steps` prints there, with the cache in `folder`."""
    command = [sys.executable, __file__, "--here", "--batch", str(batch), "--models", *models]
    result = subprocess.run(
        [*command, *(["--passes"] if passes else [])],
        env={**os.environ, "GRAPHC_CACHE_DIR": folder},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet34"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--passes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        compile_steps(options.models, options.batch, options.passes)
        return

    def show(how: str, rows: list[list]) -> None:
        for number, (model, seconds, spent, compiled, launched) in enumerate(rows):
            what = "next in the process" if how == "cold" and number else how
            passes = "-" if how == "again" else f"{spent:.2f} s"
            text = f"{model:>10} {what:<20} {seconds:>7.2f} s {passes:>9} {compiled:>9}"
            print(f"{text} of {launched}", flush=True)

    print(f"{'model':>10} {'':<20} {'compile':>9} {'passes':>9} kernels compiled")
    with tempfile.TemporaryDirectory() as folder:
        show("cold", in_new_process(options.models, options.batch, False, folder))
        for model in options.models:
            for passes in (False, True):
                how = "again, passes run" if passes else "again"
                show(how, in_new_process([model], options.batch, passes, folder))


if __name__ == "__main__":
    main()
