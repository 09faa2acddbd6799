"""The training loop: epochs of compiled steps, evaluation, checkpoints, and a history of it all."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from graphc.data import Augment, Batches, Dataset
from graphc.errors import DataError, GraphcError
from graphc.ir import Node
from graphc.serialize import load, load_metadata, save, write_atomically

# (network outputs [N, ...], labels [N, ...]) -> one number for each example, [N].
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
Schedule = Callable[[int], float]

_KIND = "graphc checkpoint"


class Executable(Protocol):
    """What training needs of a compiled graph."""

    inputs: dict[str, Node]

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray]: ...

    def state(self, *, optimizer: bool = False) -> dict[str, np.ndarray]: ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None: ...


@dataclass
class Epoch:
    """One epoch's figures; `epoch` counts from 1, `step` is the number of steps made so far."""

    epoch: int
    step: int
    loss: float
    accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    learning_rate: float | None
    seconds: float


@dataclass
class History:
    """The figures of a run: every epoch's, and the loss of every step."""

    epochs: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def final(self) -> Epoch:
        """The last epoch's figures."""
        return self.epochs[-1]

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row an epoch; what was not measured stays empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(f.name for f in dataclasses.fields(Epoch))
        writer.writerows(dataclasses.astuple(epoch) for epoch in self.epochs)
        write_atomically(path, text.getvalue().encode())


@dataclass
class Progress:
    """Where a run stands. Callbacks may set `stop` to end it after the current step."""

    epochs: int
    batches: int
    history: History
    epoch: int = 0  # counts from 1
    batch: int = 0  # done in this epoch
    step: int = 0  # done in all
    loss_sum: float = 0.0  # over this epoch's batches
    accuracy_sum: float | None = None  # the same; None: not measured
    learning_rate: float | None = None
    stop: bool = False

    @property
    def loss(self) -> float:
        """Mean training loss of this epoch so far."""
        return self.loss_sum / self.batch if self.batch else math.nan

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy on this epoch's training batches so far."""
        if self.accuracy_sum is None or not self.batch:
            return None
        return self.accuracy_sum / self.batch


class Callback:
    """Override what you need; each method is handed the state of the run."""

    def on_start(self, progress: Progress) -> None:
        """Before the first step."""

    def on_step(self, progress: Progress) -> None:
        """After each step."""

    def on_epoch(self, progress: Progress) -> None:
        """After each epoch and its evaluation; `progress.history.final` has the figures."""

    def on_end(self, progress: Progress) -> None:
        """When the run ends, by an error too."""


# ---- scores


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the largest of the logits [N, K] is at the label [N], else 0."""
    return (logits.argmax(1) == labels).astype(np.float64)


def binary_accuracy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the sign of the logit says the label 0 or 1; both hold N elements."""
    return ((logits.reshape(-1) > 0) == (labels.reshape(-1) > 0.5)).astype(np.float64)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[label], for logits [N, K] and labels [N]."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]


def binary_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log(1 + exp(-z)) for label 1 and log(1 + exp(z)) for label 0; both hold N elements."""
    z = logits.reshape(-1).astype(np.float64)
    return np.logaddexp(0.0, z) - z * labels.reshape(-1)


def squared_error(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean over each example's elements of the squared difference."""
    difference = outputs.astype(np.float64) - targets.reshape(outputs.shape)
    return (difference**2).reshape(len(outputs), -1).mean(1)


# ---- inference


def batch_size_of(executable: Executable) -> int:
    """The number of examples that an executable takes in one call."""
    return int(executable.inputs["image"].types[0].shape[0])


def predict(executable: Executable, images: np.ndarray, output: str = "logits") -> np.ndarray:
    """The named output for every example [N, ...].

    An executable has a fixed batch size: the last batch is filled up with zeros, whose results are
    dropped. So no example's output may depend on the others in its batch, as is the case in
    inference mode.
    """
    results, batch_size = [], batch_size_of(executable)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        if missing:
            batch = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
        results.append(executable(image=batch)[output][: batch_size - missing])
    if not results:
        raise DataError("predict: no examples")
    return np.concatenate(results)


def evaluate(
    executable: Executable,
    images: np.ndarray,
    labels: np.ndarray,
    score: Score = class_accuracy,
    output: str = "logits",
) -> float:
    """The mean score over all examples, the last partial batch included."""
    return float(score(predict(executable, images, output), labels).mean())


# ---- training


def fit(
    train: Executable,
    infer: Executable | None,
    dataset: Dataset,
    *,
    epochs: int,
    schedule: Schedule | None = None,
    seed: int = 0,
    accuracy: Score | None = class_accuracy,
    test_loss: Score | None = cross_entropy,
    augment: Augment | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> History:
    """Train on the data set's training part and evaluate on its test part after each epoch.

    train       compiled with a loss and an optimizer: inputs `image` and `label`, output `loss`;
                with an output `logits`, training accuracy is measured
    infer       compiled for inference, output `logits`; takes the weights over after each epoch.
                None: no evaluation
    schedule    learning rate by step, from 0; None: the optimizer's own
    seed        of the order of examples; the same seed gives the same run
    accuracy, test_loss   scores (one number an example); None: not measured
    checkpoint  file that gets weights, optimizer state and history after each epoch, and when the
                run is interrupted (KeyboardInterrupt is raised again)
    resume      go on from that file, at the very step it was written at, if it exists

    Raises GraphcError when the loss is not finite, DataError for a checkpoint of another run.
    """
    batch_size = batch_size_of(train)
    batches = Batches(
        dataset.train_images, dataset.train_labels, batch_size, seed=seed, augment=augment
    )
    progress = Progress(epochs, len(batches), History())
    identity = {"data": repr(dataset), "batch_size": batch_size, "seed": seed}
    if resume and checkpoint is not None and os.path.exists(checkpoint):
        _resume(train, progress, checkpoint, identity)
    callbacks = list(callbacks)

    def tell(event: str) -> None:
        for callback in callbacks:
            getattr(callback, event)(progress)

    def write_checkpoint() -> None:
        if checkpoint is not None:
            _save_checkpoint(train, progress, checkpoint, identity)

    try:
        tell("on_start")
        # An epoch interrupted after its last step still lacks its evaluation: start is its end.
        first = len(progress.history.epochs)
        start = progress.step - first * len(batches)
        for number in range(first, epochs):
            if progress.stop:
                break
            progress.epoch, progress.batch = number + 1, start
            if start == 0:
                progress.loss_sum, progress.accuracy_sum = 0.0, None
            began = time.perf_counter()
            for images, labels in batches.epoch(number, start):
                _step(train, images, labels, schedule, accuracy, progress)
                tell("on_step")
                if progress.stop:
                    break
            start = 0
            seconds = time.perf_counter() - began
            figures = _evaluate_epoch(train, infer, dataset, accuracy, test_loss)
            progress.history.epochs.append(
                Epoch(
                    progress.epoch,
                    progress.step,
                    progress.loss,
                    progress.accuracy,
                    *figures,
                    progress.learning_rate,
                    seconds,
                )
            )
            write_checkpoint()
            tell("on_epoch")
    except KeyboardInterrupt:
        write_checkpoint()
        raise
    finally:
        tell("on_end")
    return progress.history


def _step(
    train: Executable,
    images: np.ndarray,
    labels: np.ndarray,
    schedule: Schedule | None,
    accuracy: Score | None,
    progress: Progress,
) -> None:
    inputs: dict[str, Any] = {"image": images, "label": labels}
    if schedule is not None:
        progress.learning_rate = float(schedule(progress.step))
        inputs["learning_rate"] = np.float32(progress.learning_rate)
    results = train(**inputs)
    loss = float(results["loss"])
    # The weights have changed: count the step before anything can interrupt.
    progress.step += 1
    progress.batch += 1
    if not math.isfinite(loss):
        rate = progress.learning_rate
        at = f" (learning rate {rate:.3g})" if rate is not None else ""
        raise GraphcError(
            f"the loss became {loss} at step {progress.step}{at}: use a lower learning rate"
        )
    progress.history.losses.append(loss)
    progress.loss_sum += loss
    if accuracy is not None and "logits" in results:
        correct = float(accuracy(results["logits"], labels).mean())
        progress.accuracy_sum = (progress.accuracy_sum or 0.0) + correct


def _evaluate_epoch(
    train: Executable,
    infer: Executable | None,
    dataset: Dataset,
    accuracy: Score | None,
    test_loss: Score | None,
) -> tuple[float | None, float | None]:
    """Test loss and test accuracy."""
    if infer is None or not len(dataset.test_images):
        return None, None
    infer.load_state(train.state())
    logits = predict(infer, dataset.test_images)
    labels = dataset.test_labels
    loss, correct = (
        None if score is None else float(score(logits, labels).mean())
        for score in (test_loss, accuracy)
    )
    return loss, correct


# ---- checkpoints


def _save_checkpoint(
    train: Executable,
    progress: Progress,
    path: str | os.PathLike[str],
    identity: dict[str, Any],
) -> None:
    arrays = dict(train.state(optimizer=True))
    arrays["history.losses"] = np.asarray(progress.history.losses, np.float64)
    record = {
        "step": progress.step,
        "sums": [progress.loss_sum, progress.accuracy_sum],
        "run": identity,
        "epochs": [dataclasses.asdict(epoch) for epoch in progress.history.epochs],
    }
    save(path, arrays, {"kind": _KIND, "record": json.dumps(record)})


def _resume(
    train: Executable,
    progress: Progress,
    path: str | os.PathLike[str],
    identity: dict[str, Any],
) -> None:
    metadata = load_metadata(path)
    if metadata.get("kind") != _KIND:
        raise DataError(f"{Path(path)}: not a checkpoint of graphc; remove it, or do not resume")
    record = json.loads(metadata["record"])
    for key, value in identity.items():
        if record["run"][key] != value:
            raise DataError(
                f"{Path(path)}: checkpoint of another run: its {key} is {record['run'][key]!r}, "
                f"this run's {value!r}"
            )
    arrays = load(path)
    losses = arrays.pop("history.losses").tolist()
    if arrays.keys() != train.state(optimizer=True).keys():
        raise DataError(f"{Path(path)}: checkpoint of another network or optimizer")
    progress.history.losses = losses
    # An epoch that a callback cut short goes on.
    epochs = [Epoch(**epoch) for epoch in record["epochs"]]
    progress.history.epochs = [e for e in epochs if e.step == e.epoch * progress.batches]
    progress.step = record["step"]
    progress.loss_sum, progress.accuracy_sum = record["sums"]
    with contextlib.suppress(IndexError):
        progress.learning_rate = progress.history.final.learning_rate
    train.load_state(arrays)
