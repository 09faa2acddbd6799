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
Network = Annotated[
    str,
    typer.Argument(
        help="One of the zoo (lenet, mlp, resnet18, ...), or file.py:name for a graph or a "
        "function that returns one.",
        metavar="NETWORK",
    ),
]
Train = Annotated[bool, typer.Option("--train", help="A training step instead of inference.")]
Batch = Annotated[int, typer.Option(min=1, help="Images in a step.")]
Dim = Annotated[
    list[str] | None,
    typer.Option(help="Size of a symbolic dimension.", metavar="NAME=SIZE", show_default=False),
]
Loss = Annotated[str, typer.Option(help="Name of the output to minimise.")]


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
    network: Network,
    out: Annotated[Path, typer.Option(help="File: .svg, .png, .dot or .graphml.")],
    stage: Annotated[
        str, typer.Option(help="declared, or as compiled for inference or training.")
    ] = "training",
    batch: Batch = 64,
    dim: Dim = None,
) -> None:
    """Draw the graph of a network."""
    from graphc.cli.inspection import Chosen, draw_network

    chosen = Chosen(network, stage == "training", batch, dim)
    typer.echo(f"wrote {draw_network(chosen, stage, out)}")


@app.command()
def dump(
    network: Network,
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    train: Train = False,
    batch: Batch = 8,
    dim: Dim = None,
    loss: Loss = "loss",
    runs: Annotated[int, typer.Option(min=0, help="Steps to profile; 0 for none.")] = 10,
    threads: Threads = None,
    target: Target = "cpu",
) -> None:
    """Write all there is to see: a page with the graph after each pass, kernels, memory, times."""
    from graphc.cli.inspection import Chosen, dump_network

    chosen = Chosen(network, train, batch, dim, loss=loss, threads=threads, target=target)
    typer.echo(f"open {dump_network(chosen, out, runs)}")


@app.command()
def profile(
    network: Network,
    train: Train = False,
    batch: Batch = 8,
    dim: Dim = None,
    loss: Loss = "loss",
    runs: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 50,
    json: Annotated[Path | None, typer.Option(help="File for all figures as JSON.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="File for a trace, to be opened in Perfetto.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Time every kernel of a step, beside what the machine can do."""
    from graphc.cli.inspection import Chosen, profile_network

    chosen = Chosen(network, train, batch, dim, loss=loss, threads=threads)
    typer.echo(profile_network(chosen, runs, json, trace))


@app.command()
def explain(
    network: Network,
    train: Train = False,
    batch: Batch = 8,
    dim: Dim = None,
    loss: Loss = "loss",
    threads: Threads = None,
) -> None:
    """Say why the program is as it is: algorithms, layouts, what was not fused and why."""
    from graphc.cli.inspection import Chosen, compiled

    chosen = Chosen(network, train, batch, dim, loss=loss, threads=threads)
    typer.echo(compiled(chosen).explain().rstrip())


@app.command()
def export(
    network: Network,
    out: Annotated[Path, typer.Option(help="File: .onnx, .graphml or .dot.")],
    weights: Annotated[
        Path | None, typer.Option(help="Weights that were saved; initial ones otherwise.")
    ] = None,
    output: Annotated[list[str] | None, typer.Option(help="Outputs to keep.")] = None,
    dim: Dim = None,
) -> None:
    """Write a network as it is in inference for other programs, such as Netron or Gephi."""
    from graphc.cli.inspection import Chosen, export_network

    chosen = Chosen(network, dims=dim, outputs=output)
    typer.echo(f"wrote {export_network(chosen, out, weights)}")


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
