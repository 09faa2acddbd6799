"""Which part of a training step a node belongs to, and the colour that says so."""

from __future__ import annotations

from graphc.ir import Node

PHASES = ("forward", "backward", "update")
# phase -> (fill, stroke)
COLOURS = {
    "forward": ("#e9f1fb", "#4a78b5"),
    "backward": ("#fdeee0", "#c77a33"),
    "update": ("#e8f5e9", "#4b9a57"),
    "input": ("#eceff1", "#607080"),
    "output": ("#37474f", "#37474f"),
}
# What leads into a node of that phase.
EDGES = {"forward": "#7b93ad", "backward": "#d3a06c", "update": "#86b98e"}


def phase_of(node: Node) -> str:
    """ "forward", "backward" (made by the chain rule) or "update" (made by the optimizer)."""
    return node.origin.phase or "forward"


def colours_of(node: Node) -> tuple[str, str]:
    """Fill and stroke of a node's box."""
    return COLOURS["input" if node.op == "input" else phase_of(node)]
