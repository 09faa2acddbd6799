"""`graphc train`: data, network, optimizer, the run with its progress, and the files it leaves."""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import graphc as gc
from graphc import data, optim
from graphc import train as training
from graphc.cli.models import MODELS, build, choose
from graphc.errors import MissingExtraError
from graphc.serialize import save

SCHEDULES = ("constant", "step", "cosine", "warmup-cosine")
OPTIMIZERS = ("sgd", "adam", "adamw")
_EVALUATION_BATCH = 100


@dataclass(frozen=True)
class Options:
    """What `graphc train --help` lists."""

    model: str
    data: Path | None
    epochs: int
    batch: int
    optimizer: str
    lr: float | None
    schedule: str
    weight_decay: float | None
    augment: bool
    seed: int
    threads: int | None
    target: str
    out: Path
    resume: bool


def run(options: Options) -> None:
    """Train, evaluate and write the results. Raises GraphcError."""
    console = Console()
    choose("model", options.model, MODELS)
    rate = options.lr if options.lr is not None else (0.05 if options.optimizer == "sgd" else 3e-3)
    optimizer = make_optimizer(options.optimizer, rate, options.weight_decay)
    dataset = data.load_digits() if options.data is None else data.load(options.data)
    steps = options.epochs * (len(dataset.train_images) // options.batch)
    schedule = make_schedule(options.schedule, rate, max(steps, 1))
    graph = build(options.model, dataset.image_shape, len(dataset.classes))
    shape = "x".join(map(str, dataset.image_shape))
    counts = f"{len(dataset.train_images):,} training and {len(dataset.test_images):,} test images"
    console.print(f"{dataset.name}: {counts}, {shape}", highlight=False)

    train, infer = _compile(options, graph, optimizer, console)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.safetensors"
    try:
        history = training.fit(
            train,
            infer,
            dataset,
            epochs=options.epochs,
            schedule=schedule,
            seed=options.seed,
            augment=augmentation(dataset.name) if options.augment else None,
            callbacks=[_Display(console)],
            checkpoint=checkpoint,
            resume=options.resume,
        )
    except KeyboardInterrupt:
        print(f"\nstopped; --resume goes on from {checkpoint}", file=sys.stderr)
        raise
    _write_results(options, dataset, train, history, console)


def make_optimizer(
    name: str, rate: float, weight_decay: float | None
) -> optim.SGD | optim.Adam | optim.AdamW:
    """The optimizer by its command-line name; SGD has momentum 0.9. Raises GraphcError."""
    choose("optimizer", name, OPTIMIZERS)
    if name == "sgd":
        return optim.SGD(rate, momentum=0.9, weight_decay=weight_decay or 0.0)
    if name == "adam":
        return optim.Adam(rate, weight_decay=weight_decay or 0.0)
    return optim.AdamW(rate, weight_decay=0.01 if weight_decay is None else weight_decay)


def make_schedule(name: str, rate: float, steps: int) -> optim.Schedule:
    """The learning rate over a run of `steps` steps. Raises GraphcError."""
    choose("schedule", name, SCHEDULES)
    if name == "step":
        return optim.StepLR(rate, max(-(-steps // 3), 1), gamma=0.1)
    if name == "cosine":
        return optim.CosineLR(rate, steps)
    if name == "warmup-cosine" and steps > 1:
        return optim.WarmupCosine(rate, max(steps // 20, 1), steps)
    return lambda step: rate


def augmentation(name: str) -> data.Augment:
    """What changes an image of this data set without changing what it shows."""
    if name == "cifar-10":
        return data.crop_and_flip(4)
    return data.crop_and_flip(1, flip=name == "fashion-mnist", edge=True)


def _compile(options: Options, graph, optimizer, console: Console):
    compiled = functools.partial(
        gc.compile, graph, target=options.target, threads=options.threads, seed=options.seed
    )
    began = time.perf_counter()
    train = compiled(
        outputs=["loss", "logits"], dims={"N": options.batch}, loss="loss", optimizer=optimizer
    )
    infer = compiled(outputs=["logits"], dims={"N": _EVALUATION_BATCH})
    seconds = time.perf_counter() - began
    console.print(
        f"compiled {options.model} for training in batches of {options.batch} and for inference "
        f"in {seconds:.1f} s",
        highlight=False,
    )
    return train, infer


class _Display(training.Callback):
    """A bar over the steps of the run, and a line for each epoch that stays."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            # Without a terminal the lines per epoch say it all.
            disable=not console.is_terminal,
        )
        self.shown = 0.0

    def on_start(self, progress: training.Progress) -> None:
        if progress.step:
            self._print(f"resumed after {progress.step} steps")
        total = progress.epochs * progress.batches
        self.task = self.bar.add_task("", total=total, epoch="", figures="")
        self.bar.start()

    def on_step(self, progress: training.Progress) -> None:
        # A step may take less time than drawing the bar does.
        now = time.perf_counter()
        if now - self.shown < 0.1:
            return
        self.shown = now
        accuracy = "" if progress.accuracy is None else f"  accuracy {progress.accuracy:.2%}"
        self.bar.update(
            self.task,
            completed=progress.step,
            epoch=f"{progress.epoch}/{progress.epochs}",
            figures=f"loss {progress.loss:.4f}{accuracy}",
        )

    def on_epoch(self, progress: training.Progress) -> None:
        final = progress.history.final
        width = len(str(progress.epochs))
        self._print(
            f"epoch {final.epoch:>{width}}/{progress.epochs}  loss {final.loss:.4f}  "
            f"accuracy {final.accuracy or 0:.2%}  test loss {final.test_loss or 0:.4f}  "
            f"test accuracy {final.test_accuracy or 0:.2%}  {final.seconds:.1f} s"
        )

    def on_end(self, progress: training.Progress) -> None:
        self.bar.stop()

    def _print(self, line: str) -> None:
        self.bar.console.print(line, highlight=False, soft_wrap=True)


def _write_results(options: Options, dataset, train, history, console: Console) -> None:
    accuracy = history.final.test_accuracy
    description = {
        "model": options.model,
        "data": dataset.name,
        "image_shape": dataset.image_shape,
        "classes": dataset.classes,
        "mean": dataset.mean,
        "std": dataset.std,
        "test_accuracy": accuracy,
    }
    files = {name: options.out / file for name, file in _files(options.model).items()}
    save(files["weights"], train, {"graphc": json.dumps(description)})
    history.save_csv(files["history"])
    notes = _write_pictures(options, train, history, files)
    right = round(accuracy * len(dataset.test_images))
    console.print(
        f"\ntest accuracy {accuracy:.2%} ({right:,} of {len(dataset.test_images):,})", style="bold",
        highlight=False,
    )  # fmt: skip
    for name, path in files.items():
        if path.exists() and name not in notes:
            console.print(f"{name:<16}{path}", highlight=False, soft_wrap=True)
    for note in dict.fromkeys(notes.values()):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _files(model: str) -> dict[str, str]:
    return {
        "weights": f"{model}.safetensors",
        "history": "history.csv",
        "learning curve": "learning_curve.png",
        "graph": "graph.svg",
        "graph as png": "graph.png",
    }


def _write_pictures(options: Options, train, history, files: dict[str, Path]) -> dict[str, str]:
    """What could not be drawn, and why."""
    title = f"{options.model}: test accuracy {history.final.test_accuracy:.2%}"
    picture = gc.viz.draw(train)
    tasks = {
        "learning curve": lambda path: gc.viz.learning_curve(history, path, title),
        "graph": picture.save,
        "graph as png": picture.save,
    }
    notes = {}
    for name, write in tasks.items():
        try:
            write(files[name])
        except MissingExtraError as error:
            notes[name] = str(error)
    return notes
