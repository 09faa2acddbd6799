"""The networks themselves: functions that return a Graph with inputs `image`, `label` and outputs
`logits`, `loss`."""

from graphc.zoo.lenet import lenet5
from graphc.zoo.mlp import mlp
from graphc.zoo.resnet import (
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
)

__all__ = [
    "lenet5",
    "mlp",
    "resnet110",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
]
