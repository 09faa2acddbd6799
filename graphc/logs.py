"""`GRAPHC_LOG=passes,fusion,memory,kernels,cache`: what the compiler does, on standard error.

Each topic is a logger of the standard library, `graphc.<topic>`; a program that sets up logging
itself needs no variable:

    passes    time and node counts of each pass (at DEBUG: the graph after it)
    fusion    why each pair of neighbours stayed apart
    memory    the memory plan: arena, lower bound, the largest values
    kernels   each kernel as it is compiled or found, with its loops and tile
    cache     the folder of compiled kernels

`all` stands for every topic.
"""

from __future__ import annotations

import logging
import os

TOPICS = ("passes", "fusion", "memory", "kernels", "cache")


def configure(setting: str | None = None) -> None:
    """Show the topics of `setting` (default: the environment's GRAPHC_LOG), separated by commas.

    Topics that do not exist are named in a warning."""
    text = os.environ.get("GRAPHC_LOG", "") if setting is None else setting
    wanted = {name.strip().lower() for name in text.split(",")} - {"", "0"}
    if not wanted:
        return
    everything = wanted & {"all", "1"}
    unknown = wanted - {*TOPICS, "all", "1"}
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for topic in TOPICS:
        if everything or topic in wanted:
            log = logging.getLogger(f"graphc.{topic}")
            log.setLevel(logging.INFO)
            if not log.handlers:
                log.addHandler(handler)
            log.propagate = False
    if unknown:
        logging.getLogger("graphc").warning(
            "GRAPHC_LOG has %s; the topics are %s, all",
            ", ".join(sorted(unknown)),
            ", ".join(TOPICS),
        )
