"""Pictures of graphs, of what executables are made of, and of training runs."""

from graphc.viz.curves import curves, learning_curve
from graphc.viz.draw import Drawing, draw
from graphc.viz.figures import memory, roofline

__all__ = ["Drawing", "curves", "draw", "learning_curve", "memory", "roofline"]
