"""The networks themselves: functions that return a Graph with inputs `image`, `label` and outputs
`logits`, `loss`."""

from graphc.zoo.lenet import lenet5
from graphc.zoo.mlp import mlp

__all__ = ["lenet5", "mlp"]
