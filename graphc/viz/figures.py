"""The memory map and the roofline of an executable, by matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from graphc.errors import GraphcError, MissingExtraError
from graphc.viz.phases import COLOURS, PHASES, phase_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from graphc.inspect.profile import Profile
    from graphc.runtime.executable import Executable


def figure_class(what: str) -> type[Figure]:
    """matplotlib's Figure, without pyplot's global state. Raises MissingExtraError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(f'{what} need matplotlib: pip install "graphc-nn[plot]"') from None
    return Figure


def memory(executable: Executable) -> Figure:
    """Where every activation lies in the arena, and from which to which step it lives.

    Below, the bytes alive at each step; lines mark the arena's size and the bound that no plan for
    this order can be below. Raises GraphcError for an interpreted executable, MissingExtraError.
    """
    report = executable.memory()
    figure = figure_class("memory maps")(figsize=(10, 6), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    graph, megabytes = executable.graph, 1e-6
    live = [0] * (len(graph) + 1)
    boxes: dict[str, list[Any]] = {phase: [] for phase in PHASES}
    for place in report.plan.lifetimes:
        boxes[phase_of(graph.value(place.name).node)].append(place)
        for step in range(place.first, place.last + 1):
            live[step] += place.bytes
    for phase, places in boxes.items():
        fill, edge = COLOURS[phase]
        top.bar(
            [p.first for p in places],
            [p.bytes * megabytes for p in places],
            [p.last + 1 - p.first for p in places],
            [p.offset * megabytes for p in places],
            align="edge",
            color=fill,
            edgecolor=edge,
            linewidth=0.5,
            label=phase if places else "",
        )
    top.axhline(report.arena_bytes * megabytes, color="#1b2733", linewidth=1.2, label="arena")
    bound = report.lower_bound * megabytes
    top.axhline(bound, color="#c0392b", linestyle="--", label="lower bound")
    first = min((p.first for p in report.plan.lifetimes), default=0)
    top.set_xlim(first, len(graph))
    top.set_ylim(0, max(report.arena_bytes * megabytes * 1.08, 1e-9))
    top.set_ylabel("offset in the arena, MB")
    top.set_title(
        f"{executable.graph.name}: {report.arena_bytes * megabytes:.2f} MB of activations, bound "
        f"{report.lower_bound * megabytes:.2f} MB, without reuse "
        f"{report.total_without_reuse * megabytes:.2f} MB"
    )
    top.legend(frameon=False, ncols=5, fontsize="small", loc="upper right")
    below.fill_between(
        range(len(live)), [n * megabytes for n in live], step="post", color="#c5ced7"
    )
    below.set_ylabel("live, MB")
    below.set_xlabel("step (nodes in order of execution)")
    return figure


def roofline(measured: Executable | Profile) -> Figure:
    """Each kernel's speed against its operations a byte, under the machine's measured roofs.

    measured: a profile, or an executable that was profiled. The area of a point is its share of the
    time. (Williams, Waterman & Patterson 2009, "Roofline".)
    Raises GraphcError for an executable that was not, MissingExtraError.
    """
    profile: Any = measured if hasattr(measured, "stamps") else measured.last_profile
    if profile is None:
        raise GraphcError("roofline: nothing was measured yet: call exe.profile(...) first")
    figure = figure_class("rooflines")(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    machine = profile.machine
    points = [row for row in profile.launches if row.flops and row.seconds]
    low = min([0.1, *(row.intensity for row in points)])
    high = max([100.0, *(row.intensity for row in points)]) * 1.2
    ridge = high
    for level, (_, speed) in zip(machine.level_names, machine.read, strict=True):
        corner = machine.gflops / speed
        ridge = min(ridge, corner)
        axes.plot([low, corner], [low * speed, machine.gflops], color="#8a97a3", linewidth=1.2)
        axes.annotate(
            f"{level} {speed:.0f} GB/s",
            (low, low * speed),
            (4, 5),
            textcoords="offset points",
            fontsize="small",
            color="#5a6772",
        )
    axes.plot([ridge, high], [machine.gflops] * 2, color="#1b2733", linewidth=1.4)
    axes.annotate(
        f"measured peak {machine.gflops:.0f} GFLOP/s, {profile.threads} threads",
        (high, machine.gflops),
        (-4, 6),
        textcoords="offset points",
        ha="right",
        fontsize="small",
    )
    whole = profile.seconds or 1.0
    for phase in PHASES:
        rows = [row for row in points if row.phase == phase]
        if rows:
            axes.scatter(
                [row.intensity for row in rows],
                [row.gflops for row in rows],
                [20 + 1200 * row.seconds / whole for row in rows],
                color=COLOURS[phase][1],
                alpha=0.5,
                edgecolors=COLOURS[phase][1],
                label=phase,
            )
    for row in sorted(points, key=lambda row: -row.seconds)[:5]:
        axes.annotate(
            row.name,
            (row.intensity, row.gflops),
            (8, 3),
            textcoords="offset points",
            fontsize="x-small",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    slowest = min([machine.gflops / 100, *(row.gflops for row in points)])
    axes.set_ylim(max(slowest, machine.gflops * 1e-4) * 0.7, machine.gflops * 2)
    axes.set_xlim(low, high)
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("GFLOP/s")
    share = profile.flops / (profile.step or math.inf) * 1e-9 / machine.gflops
    axes.set_title(f"{profile.graph}: {100 * share:.0f}% of the measured peak over a step")
    axes.grid(alpha=0.25)
    if points:
        axes.legend(frameon=False, fontsize="small", loc="lower right")
    return figure
