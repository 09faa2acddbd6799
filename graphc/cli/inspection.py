"""`graphc dump`, `draw`, `profile`, `explain` and `export`: look inside a network.

The network is one of the zoo, or `file.py:name`: a graph, or a function that returns one.
"""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import graphc as gc
from graphc import zoo
from graphc.errors import GraphcError
from graphc.ir import Graph
from graphc.runtime.executable import Executable

_ALIASES = {"lenet": "lenet5"}


@dataclass(frozen=True)
class Chosen:
    """What to compile and how. `dims`: NAME=SIZE; the batch dimension takes `batch` otherwise."""

    network: str
    train: bool = False
    batch: int = 8
    dims: Sequence[str] | None = None
    outputs: Sequence[str] | None = None
    loss: str = "loss"
    threads: int | None = None
    target: str = "cpu"


def find_network(name: str) -> Graph:
    """A graph by its name in the zoo or as `file.py:name`. Raises GraphcError."""
    file, colon, attribute = name.rpartition(":")
    if not colon:
        known = [n for n in zoo.__all__ if n not in _ALIASES.values()]
        name = _ALIASES.get(name, name)
        if name not in zoo.__all__:
            raise GraphcError(
                f"no network {name!r}; choose from {', '.join(sorted([*known, *_ALIASES]))}, or "
                "write file.py:name for a graph, or a function that returns one"
            )
        return getattr(zoo, name)()
    if not Path(file).is_file():
        raise GraphcError(f"{name}: there is no file {file}")
    # Under another name than __main__: a script's own run is not wanted.
    scope = runpy.run_path(file, run_name="graphc_network")
    if attribute not in scope:
        graphs = [key for key, value in scope.items() if isinstance(value, Graph)]
        hint = f"; it has the graphs {', '.join(graphs)}" if graphs else ""
        raise GraphcError(f"{name}: {file} defines no {attribute!r}{hint}")
    found = scope[attribute]
    graph = found if isinstance(found, Graph) else found() if callable(found) else found
    if not isinstance(graph, Graph):
        raise GraphcError(f"{name}: is {type(graph).__name__}, not a graph or a function of one")
    return graph


def compiled(chosen: Chosen) -> Executable:
    """The executable of a network, for inference or with an optimizer."""
    graph = find_network(chosen.network)
    options: dict[str, Any] = {}
    if chosen.train:
        options = {"loss": chosen.loss, "optimizer": gc.optim.SGD(0.1, momentum=0.9)}
        outputs: Sequence[str] = chosen.outputs or (chosen.loss,)
    else:
        # What depends on labels is for training.
        outputs = chosen.outputs or [n for n, v in graph.outputs.items() if v.rank]
        outputs = outputs or list(graph.outputs)
    return gc.compile(
        graph,
        outputs=list(outputs),
        dims=sizes(graph, chosen.dims, chosen.batch),
        threads=chosen.threads,
        target=chosen.target,
        **options,
    )


def sizes(graph: Graph, given: Sequence[str] | None, batch: int) -> dict[str, int]:
    """Sizes of the symbolic dimensions: those given as NAME=SIZE, and the batch."""
    found = {}
    for text in given or ():
        name, equals, size = text.partition("=")
        if not equals or not size.isdigit():
            raise GraphcError(f"--dim {text}: write NAME=SIZE, such as --dim T=128")
        found[name] = int(size)
    leading = {
        node.types[0].shape[0]
        for node in graph.inputs.values()
        if node.types[0].rank and isinstance(node.types[0].shape[0], str)
    }
    return {**{d: batch for d in leading if isinstance(d, str)}, **found}


def random_inputs(executable: Executable) -> dict[str, np.ndarray]:
    """Standard normal numbers for inputs of floats; small class numbers for integers."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, node in executable.inputs.items():
        kind = node.types[0]
        if node.attrs.get("default") is not None:
            continue
        if kind.is_float:
            arrays[name] = random.standard_normal(kind.sizes).astype(kind.dtype)
        else:
            arrays[name] = random.integers(0, 2, kind.sizes).astype(kind.dtype)
    return arrays


def dump_network(chosen: Chosen, folder: Path, runs: int) -> Path:
    """Compile, profile for some runs (0: not at all) and dump. Returns the page's path."""
    executable = compiled(chosen)
    if runs and hasattr(executable, "launches"):
        executable.profile(random_inputs(executable), runs=runs)
    return executable.dump(folder) / "index.html"


def profile_network(chosen: Chosen, runs: int, json: Path | None, trace: Path | None) -> str:
    """The profile as a table; its JSON and its trace go to files, where asked for."""
    executable = compiled(chosen)
    profile = executable.profile(random_inputs(executable), runs=runs)
    if json is not None:
        json.write_text(profile.to_json() + "\n", encoding="utf-8")
    if trace is not None:
        profile.chrome_trace(trace)
    return str(profile)


def draw_network(chosen: Chosen, stage: str, path: Path) -> Path:
    """Write a picture of the network as declared, or as compiled; returns its path."""
    stages = ("declared", "inference", "training")
    if stage not in stages:
        raise GraphcError(f"no stage {stage!r}; choose from {', '.join(stages)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn: Any = find_network(chosen.network) if stage == "declared" else compiled(chosen)
    return gc.viz.draw(drawn).save(path)


def export_network(chosen: Chosen, path: Path, weights: Path | None) -> Path:
    """Write the forward graph by the suffix: .onnx, .graphml or .dot; returns its path."""
    graph = find_network(chosen.network)
    if path.suffix.lower() != ".onnx":
        if weights is not None:
            raise GraphcError(f"{path}: only .onnx files hold weights")
        return gc.viz.draw(graph).save(path)
    arrays = None if weights is None else gc.load(weights)
    dims = sizes(graph, chosen.dims, chosen.batch) if chosen.dims else None
    gc.export_onnx(graph, path, arrays, outputs=chosen.outputs, dims=dims)
    return path
