"""The command `graphc`. Libraries that take time to import wait until a command needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from graphc.errors import GraphcError

app = typer.Typer(
    name="graphc",
    help="Compile and train neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="The folder of compiled kernels.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

Target = Annotated[
    str, typer.Option(help="cpu, or interpret: NumPy, slow, compiles nothing.", metavar="TARGET")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads to compute with.", show_default="all cores")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    """Compile and train neural networks."""
    # `main` takes --debug out of the arguments, wherever it stands; it is here for --help.


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="lenet, mlp or resnet20.", metavar="MODEL")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with MNIST, Fashion-MNIST or CIFAR-10 files.",
            show_default="5,000 MNIST digits, embedded",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 15,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 64,
    optimizer: Annotated[str, typer.Option(help="sgd, adam or adamw.")] = "adam",
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate.", show_default="0.003; 0.05 for sgd"),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="Of the learning rate: constant, step, cosine or warmup-cosine.")
    ] = "cosine",
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay.", show_default="0; 0.01 for adamw")
    ] = None,
    augment: Annotated[
        bool, typer.Option(help="Shift training images, and mirror them where that makes sense.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same run.")] = 0,
    threads: Threads = None,
    target: Target = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="out/MODEL")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the results' folder.")
    ] = False,
) -> None:
    """Train a network on images; writes weights, history, learning curve and a picture."""
    from graphc.cli.training import Options, run

    run(
        Options(
            model=model,
            data=data,
            epochs=epochs,
            batch=batch,
            optimizer=optimizer,
            lr=lr,
            schedule=schedule,
            weight_decay=weight_decay,
            augment=augment,
            seed=seed,
            threads=threads,
            target=target,
            out=out or Path("out", model),
            resume=resume,
        )
    )


@app.command()
def predict(
    weights: Annotated[Path, typer.Argument(help="Weights that `graphc train` saved.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="PNG or other pictures, .npy arrays, IDX files.", show_default=False),
    ] = None,
    digits: Annotated[
        int | None, typer.Option(min=1, help="Classify N held-out embedded digits instead.")
    ] = None,
    threads: Threads = None,
    target: Target = "cpu",
) -> None:
    """Classify images with trained weights."""
    from graphc.cli.prediction import run

    if bool(images) == bool(digits):
        raise typer.BadParameter("give either images or --digits N")
    run(weights, images or [], digits, threads, target)


@app.command()
def draw(
    model: Annotated[str, typer.Argument(help="lenet, mlp or resnet20.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="File: .svg, .png, .dot or .graphml.")],
    stage: Annotated[
        str, typer.Option(help="declared, or as compiled for inference or training.")
    ] = "training",
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 64,
) -> None:
    """Draw the graph of a network."""
    from graphc.cli.models import draw_model

    typer.echo(f"wrote {draw_model(model, stage, batch, out)}")


@app.command()
def doctor() -> None:
    """Show versions, CPU, threads, kernel cache and CUDA, and what is wrong with them."""
    from graphc.cli.doctor import report

    raise typer.Exit(report())


@cache_app.command("info")
def cache_info() -> None:
    """Show where compiled kernels are kept, and how many."""
    from graphc.cli.doctor import cache_facts

    for name, fact in cache_facts():
        typer.echo(f"{name:<10}{fact}")


@cache_app.command("clear")
def cache_clear() -> None:
    """Remove every compiled kernel; they are compiled again when needed."""
    from graphc.cli.doctor import clear_cache

    typer.echo(clear_cache())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Errors are one line on stderr; the exit status is returned.

    1: an error of data, files or computation; 2: wrong usage; 130: interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or bool(os.environ.get("GRAPHC_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    command = typer.main.get_command(app)
    try:
        status = command.main(arguments, prog_name="graphc", standalone_mode=False)
        sys.stdout.flush()
        if status == 130:  # Typer has caught an interruption
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe has left; keep Python from complaining while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _report(error)


def _report(error: Exception) -> int:
    if isinstance(error, typer.Abort):
        return _fail("interrupted", 130)
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # wrong usage
        message = error.format_message()
        if not message:
            return int(error.exit_code)  # the help was shown instead
        return _fail(f"{message.rstrip('.')} (graphc --help)", int(error.exit_code))
    if isinstance(error, GraphcError):
        return _fail(str(error), 1)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    kind = type(error).__name__
    return _fail(f"internal error: {kind}: {error}; --debug shows where", 1)


def _fail(message: str, status: int) -> int:
    line = " ".join(str(message).split())
    print(f"graphc: {line}", file=sys.stderr)
    return status
