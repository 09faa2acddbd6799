"""The order of the passes, as data.

`gc.compile` binds dimensions, resolves the mode, and runs FORWARD on the declared graph; then it
differentiates and lets the optimizer add its updates, and runs BACKWARD on the joint graph.
"""

from __future__ import annotations

from passes.base import Pipeline
from passes.canonicalize import Canonicalize
from passes.decompose import Decompose
from passes.eliminate_common import EliminateCommon
from passes.eliminate_dead import EliminateDead

FORWARD = Pipeline(
    (
        Canonicalize(),
        EliminateCommon(),
        EliminateDead(),
    )
)
BACKWARD = Pipeline(
    (
        Decompose(),
        Canonicalize(drop_stop_gradient=True),
        EliminateCommon(),
        EliminateDead(),
    )
)
