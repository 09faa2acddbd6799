"""The results of a benchmark: a table on the terminal, JSON, CSV and a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphc.bench.peers import PEERS
from graphc.bench.rounds import OURS, Row
from graphc.serialize import write_atomically

COLUMNS = (
    "peer",
    "ms",
    "middle half",
    "best",
    "ratio",
    "GFLOP/s",
    "of peak",
    "cold s",
    "warm s",
    "MB",
    "step MB",
)
_WIDE = 150
_SPARED = (
    "middle half",
    "best",
    "GFLOP/s",
    "warm s",
)  # columns that a narrow terminal does without
_COLOURS = {
    "graphc": "#d95f02",
    "pytorch": "#e7298a",
    "torch.compile": "#a6761d",
    "jax": "#1b9e77",
    "onnxruntime": "#7570b3",
    "openvino": "#66a61e",
}


@dataclass
class Report:
    """All rows of a run, with where and with what they were measured.

    machines: limits by threads (see `graphc.bench.machine`). versions: of every peer measured.
    absent: why a peer was not, by name. options: how the run was started.
    """

    rows: list[Row]
    machines: dict[int, dict[str, Any]]
    versions: dict[str, str]
    absent: dict[str, str]
    options: dict[str, Any]
    date: str = dataclasses.field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))

    def groups(self) -> list[tuple[str, list[Row]]]:
        """Rows by piece of work, in order: (title, rows)."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            title = f"{row.model}, batch {row.batch}, {row.mode}, {row.threads} thread"
            found.setdefault(title + ("s" if row.threads > 1 else ""), []).append(row)
        return list(found.items())

    # ---- text

    def heading(self) -> list[str]:
        """Machine, date and versions, one line each."""
        lines = []
        for threads, m in sorted(self.machines.items()):
            memory = m["read"][-1][1]
            lines.append(
                f"{m['name']}, {m['cores']} cores, {m['lanes']} float32 lanes; {threads} thread"
                f"{'s' if threads > 1 else ''}: {m['gflops']:.0f} GFLOP/s, memory {memory:.0f} GB/s"
            )
        versions = ", ".join(f"{PEERS[n].title} {v}" for n, v in self.versions.items())
        lines.append(
            f"{self.date}, Python {platform.python_version()}, {platform.system()}: {versions}"
        )
        lines += [f"absent: {PEERS[n].title} ({why})" for n, why in self.absent.items()]
        return lines

    def text(self) -> str:
        """The whole report as plain text."""
        from graphc.inspect.text import table

        parts = ["\n".join(self.heading())]
        for title, rows in self.groups():
            parts.append("\n".join([title, *table(COLUMNS, [cells(r) for r in rows], left=1)]))
        return "\n\n".join(parts) + "\n\n" + LEGEND

    def show(self) -> None:
        """Print the report: with rich where it is installed, else as plain text."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(self.text())
            return
        console = Console()
        if not console.is_terminal:  # a file or a pipe has no width: write whole lines
            console = Console(width=_WIDE)
        kept = [n for n, c in enumerate(COLUMNS) if console.width >= _WIDE or c not in _SPARED]
        for line in self.heading():
            console.print(line, style="dim", highlight=False)
        for title, rows in self.groups():
            shown = Table(title=title, title_justify="left", title_style="bold")
            for number in kept:
                shown.add_column(
                    COLUMNS[number], justify="right" if number else "left", no_wrap=number > 0
                )
            for row in rows:
                texts = cells(row)
                style = "bold" if row.peer == OURS else None
                shown.add_row(*(texts[n] for n in kept), style=style)
            console.print(shown)
        console.print(LEGEND, style="dim", highlight=False)

    # ---- files

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    def csv(self) -> str:
        """One line a row; the single rounds are only in the JSON."""
        names = [f.name for f in dataclasses.fields(Row) if f.name != "rounds"]
        text = io.StringIO()
        writer = csv.DictWriter(text, ["date", "machine", "version", *names], extrasaction="ignore")
        writer.writeheader()
        machine = next((m["name"] for m in self.machines.values()), "")
        for row in self.rows:
            version = self.versions.get(row.peer, "")
            fields = dataclasses.asdict(row)
            writer.writerow({"date": self.date, "machine": machine, "version": version, **fields})
        return text.getvalue()

    def save(self, folder: str | Path) -> list[Path]:
        """Write benchmark.json, .csv, .txt and, where matplotlib is installed, .png and .svg."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for suffix, text in (("json", self.json()), ("csv", self.csv()), ("txt", self.text())):
            path = folder / f"benchmark.{suffix}"
            write_atomically(path, text.encode())
            written.append(path)
        return written + self.plot(folder)

    def plot(self, folder: Path) -> list[Path]:
        """Bars of times, a panel for each piece of work; [] without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return []
        groups = [(t, [r for r in rows if r.median]) for t, rows in self.groups()]
        groups = [(title, rows) for title, rows in groups if rows]
        if not groups:
            return []
        columns = min(3, len(groups))
        lines = -(-len(groups) // columns)
        most = max(len(rows) for _, rows in groups)
        figure = Figure(
            figsize=(4.6 * columns, lines * (0.9 + 0.34 * most) + 0.5), layout="constrained"
        )
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel in panels[len(groups) :]:
            panel.set_axis_off()
        for panel, (title, rows) in zip(panels, groups):
            _bars(panel, title, rows)
        machine = next((m["name"] for m in self.machines.values()), platform.machine())
        figure.suptitle(f"Time of a call in ms, shorter is better ({machine}, {self.date[:10]})")
        paths = [folder / "benchmark.png", folder / "benchmark.svg"]
        for path in paths:
            figure.savefig(path, dpi=150)
        return paths


LEGEND = (
    "ms: median of the rounds' medians; middle half: where half of the rounds lie; best: fastest "
    "call; ratio: time over graphc's in the same round (above 1: graphc is faster), with its "
    "middle half; GFLOP/s: the network's convolutions and products counted as direct ones, also as "
    "a share of the measured peak; cold, warm: seconds to compile (empty and filled cache) and run "
    "once; MB: peak memory, and how much of it came after importing the library; step MB: the peak "
    "of steps alone, over the library and the parameters"
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, by COLUMNS."""
    name = PEERS[row.peer].title + (f" ({row.variant})" if row.variant else "")
    if not row.median:
        return (f"{name}: {row.note}", *("-" for _ in COLUMNS[1:]))
    if row.note:
        name += f" [{row.note}]"
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    if row.ratio_low is not None and row.peer != OURS:
        ratio += f" ({row.ratio_low:.2f}-{row.ratio_high:.2f})"
    return (
        name,
        _ms(row.median),
        f"{_ms(row.low)}-{_ms(row.high)}",
        _ms(row.best),
        ratio,
        f"{row.gflops:.3g}",
        "-" if row.share is None else f"{100 * row.share:.0f}%",
        "-" if row.cold is None else f"{row.cold:.2f}",
        "-" if row.warm is None else f"{row.warm:.2f}",
        f"{row.peak / 1e6:.0f} (+{(row.peak - row.imported) / 1e6:.0f})",
        f"{row.step / 1e6:.0f}",
    )


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.4f}" if milliseconds < 1 else f"{milliseconds:.4g}"


def _bars(panel: Any, title: str, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda r: r.median, reverse=True)
    times = [1e3 * r.median for r in ordered]
    spread = [
        [1e3 * (r.median - r.low) for r in ordered],
        [1e3 * (r.high - r.median) for r in ordered],
    ]
    labels = [PEERS[r.peer].title for r in ordered]
    colours = [_COLOURS.get(r.peer, "#777777") for r in ordered]
    panel.barh(labels, times, xerr=spread, color=colours, ecolor="#444444", height=0.7)
    panel.set_title(title, fontsize=9, loc="left")
    panel.tick_params(labelsize=8)
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)
    panel.margins(x=0.25)
    for y, (row, ms) in enumerate(zip(ordered, times, strict=True)):
        text = f" {ms:.3g}" + (f"  {row.ratio:.1f}x" if row.ratio and row.peer != OURS else "")
        panel.annotate(text, (1e3 * row.high, y), va="center", fontsize=8)
