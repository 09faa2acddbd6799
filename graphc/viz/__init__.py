"""Pictures of graphs and of training runs."""

from graphc.viz.curves import learning_curve
from graphc.viz.draw import Drawing, draw

__all__ = ["Drawing", "draw", "learning_curve"]
