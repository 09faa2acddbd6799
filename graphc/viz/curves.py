"""The learning curve of a training run, by matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from graphc.viz.figures import figure_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from graphc.train import History


def learning_curve(history: History, path: str | os.PathLike[str], title: str = "") -> Path:
    """Save the figure of `curves` as .png, .svg or .pdf by suffix.

    Raises MissingExtraError without matplotlib."""
    path = Path(path)
    curves(history, title).savefig(path, dpi=150)
    return path


def curves(history: History, title: str = "") -> Figure:
    """Loss and, where it was measured, accuracy over epochs, as a matplotlib figure.

    Each step's loss is a faint line behind the means of the epochs.
    Raises MissingExtraError without matplotlib.
    """
    figure_of = figure_class("learning curves")
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    records = history.epochs
    epochs = [record.epoch for record in records]
    accuracies = {
        "training": [record.accuracy for record in records],
        "test": [record.test_accuracy for record in records],
    }
    has_accuracy = any(a is not None for curve in accuracies.values() for a in curve)
    figure = figure_of(figsize=(9.0 if has_accuracy else 5.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if has_accuracy else 1, squeeze=False)[0]

    loss = axes[0]
    if history.losses and records:
        per_epoch = max(records[-1].step // max(records[-1].epoch, 1), 1)
        # Epoch 1 ends at x = 1: its steps lie before that.
        x = [(i + 1) / per_epoch for i in range(len(history.losses))]
        loss.plot(x, history.losses, color="#1f77b4", alpha=0.25, linewidth=0.7, label="each step")
    loss.plot(epochs, [r.loss for r in records], color="#1f77b4", marker=".", label="training")
    if any(r.test_loss is not None for r in records):
        test = [float("nan") if r.test_loss is None else r.test_loss for r in records]
        loss.plot(epochs, test, color="#d62728", marker=".", label="test")
    loss.set_ylabel("loss")
    if records and min(history.losses or [1.0]) > 0:
        loss.set_yscale("log")
    if has_accuracy:
        for (name, curve), colour in zip(accuracies.items(), ("#1f77b4", "#d62728"), strict=True):
            values = [float("nan") if a is None else a for a in curve]
            axes[1].plot(epochs, values, color=colour, marker=".", label=name)
        axes[1].set_ylabel("accuracy")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for panel in axes:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
    if title:
        figure.suptitle(title)
    return figure
