"""A profile as a trace in Chrome's format, which chrome://tracing and Perfetto show.

The format: "Trace Event Format", Google, 2016: complete events ("X") with times in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphc.inspect.profile import Profile


def boxes(profile: Profile) -> Iterator[tuple[int, int, float, float]]:
    """(thread, number of the launch, begin, end) of the run nearest the median, in seconds.

    Rows that run block by block all begin with their group: they follow each other here, each as
    long as all its blocks together."""
    for thread, rows in enumerate(profile.stamps.tolist()):
        ended, group = 0.0, -1.0
        for number, (begin, end) in enumerate(rows):
            shift = ended - begin if begin == group else 0.0
            group, ended = begin, end + shift
            yield thread, number, begin + shift, end + shift


def chrome_trace(profile: Profile) -> dict[str, Any]:
    """The trace as a document to be written as JSON: one row a thread, one box a launch."""
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": t, "args": {"name": f"thread {t}"}}
        for t in range(profile.threads)
    ]
    for thread, number, begin, end in boxes(profile):
        launch = profile.launches[number]
        events.append(
            {
                "name": launch.name,
                "cat": launch.phase,
                "ph": "X",
                "pid": 0,
                "tid": thread,
                "ts": 1e6 * begin,
                "dur": 1e6 * (end - begin),
                "args": {
                    "kind": launch.kind,
                    "layers": ", ".join(launch.layers),
                    "gflop": launch.flops * 1e-9,
                    "bytes": launch.bytes,
                    "file": launch.file,
                },
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ns"}
