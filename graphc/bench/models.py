"""What is measured: networks of the zoo; and one piece of work: network, batch, mode, threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphc import errors, zoo
from graphc.init import materialise
from graphc.ir import Graph, Node, Value
from graphc.optim import SGD

# One training step of every library: SGD with momentum, as in torch.optim.
LEARNING_RATE = 0.01
MOMENTUM = 0.9
INFER, TRAIN = "infer", "train"
MODES = (INFER, TRAIN)


@dataclass(frozen=True)
class Model:
    """A network to measure: how it is declared, and the batch sizes measured by default.

    The graph has inputs `image` [N,...] and `label` [N], outputs `logits` and `loss`.
    """

    build: Callable[[], Graph]
    infer: tuple[int, ...]
    train: tuple[int, ...]


# To measure another network of the zoo, add a line: `translate` writes it for the peers.
MODELS: dict[str, Model] = {
    "lenet5": Model(zoo.lenet5, infer=(1, 64), train=(64,)),
    "mlp": Model(zoo.mlp, infer=(1, 64), train=(64,)),
    "resnet20": Model(zoo.resnet20, infer=(1, 128), train=(128,)),
    "resnet18": Model(zoo.resnet18, infer=(1, 8), train=(8,)),
    "resnet50": Model(zoo.resnet50, infer=(1, 8), train=()),
}
DEFAULT_MODELS = ("lenet5",)  # what is measured in minutes


@dataclass(frozen=True)
class Work:
    """One configuration, the same for every peer: same weights, same arrays, same threads."""

    model: str
    batch: int
    mode: str
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.model}, batch {self.batch}, {self.mode}, {threads}"

    @property
    def declared(self) -> Graph:
        """The network as its user declares it."""
        return find_model(self.model).build()

    @property
    def output(self) -> str:
        return "loss" if self.mode == TRAIN else "logits"

    @property
    def dims(self) -> dict[str, int]:
        return {"N": self.batch}

    def graph(self) -> Graph:
        """The network at this batch size and in this mode, reduced to what the output needs."""
        bound = self.declared.bind(self.dims)

        def decide(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if node.attrs.get("training", self) is not None:
                return None
            attrs = {**node.attrs, "training": self.mode == TRAIN}
            return new.add(node.op, inputs, attrs, name=node.name).outputs

        graph = bound.subgraph([bound.outputs[self.output]]).rebuild(decide)
        graph.outputs = {self.output: graph.outputs[self.output]}
        return graph

    def inputs(self) -> dict[str, np.ndarray]:
        """The batch: images of standard normal numbers, labels below the number of classes."""
        declared = self.declared.bind(self.dims)
        classes = int(declared.outputs["logits"].shape[-1])
        rng = np.random.default_rng(0)
        arrays: dict[str, np.ndarray] = {}
        for name, node in declared.inputs.items():
            if self.mode == INFER and name == "label":
                continue
            shape, dtype = node.types[0].sizes, node.types[0].dtype
            if dtype.startswith("int"):
                arrays[name] = rng.integers(0, classes, shape).astype(dtype)
            else:
                arrays[name] = rng.standard_normal(shape).astype(dtype)
        return arrays

    def weights(self) -> dict[str, np.ndarray]:
        """Initial parameters and running statistics, those that graphc draws from seed 0."""
        graph = self.graph()
        return {n: materialise(node, 0) for n, node in {**graph.parameters, **graph.states}.items()}

    def weight_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(node.types[0].nbytes for node in self.graph().parameters.values())

    def flops(self) -> int:
        """Operations of the convolutions and products of one call, counted as direct ones."""
        from graphc.compiler import transform
        from graphc.inspect.work import contraction_flops

        joint, _ = transform(self.declared, [self.output], self.dims, **self.training())
        return contraction_flops(joint)

    def training(self) -> dict[str, Any]:
        """What `gc.compile` needs for a training step; nothing for inference."""
        if self.mode == INFER:
            return {}
        return {"loss": "loss", "optimizer": SGD(LEARNING_RATE, MOMENTUM)}


def find_model(name: str) -> Model:
    """The model of that name. Raises NameLookupError with those there are."""
    try:
        return MODELS[name]
    except KeyError:
        raise errors.NameLookupError(
            f"no model {name!r} to measure; there are {', '.join(MODELS)}"
        ) from None


def works(
    models: list[str],
    batches: list[int] | None,
    modes: list[str],
    threads: list[int],
) -> list[Work]:
    """Every combination asked for; `batches=None` takes each model's own."""
    found = []
    for name in models:
        model = find_model(name)
        own: Mapping[str, tuple[int, ...]] = {INFER: model.infer, TRAIN: model.train}
        for mode in modes:
            for batch in batches or own[mode]:
                found += [Work(name, batch, mode, count) for count in threads]
    return found
