"""Programs on disk: what a call of `compile` finds out, for the next one that asks the same.

A program is the planned graph, its launches with their schedules and sources, and the records of
the passes: all of an executable but memory and machine code, which has files of its own. Its key
covers everything that it is made from: the declared graph, the options, the machine, and the text
of graphc itself. Two things are left out, as no pass looks at them: where in the user's files the
graph stands, and what its parameters start from. A program that is loaded takes both from the
graph that was declared.

The file is a pickle, which could run code. So could the object code beside it: the cache reads
neither from a place where anyone but the user could have written it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from graphc import optim
from graphc.codegen.program import Launch
from graphc.collector import collector_paused
from graphc.ir import Graph, Origin, TensorType
from graphc.ops import OPERATORS
from graphc.ops.registry import all_ops
from graphc.runtime.cache import default_cache
from graphc.text import freeze

log = logging.getLogger("graphc.cache")

# Who asks for these wants passes to run.
_TOLD: Final = ("graphc", "graphc.passes", "graphc.fusion", "graphc.memory")
_ROOT: Final = Path(__file__).parents[2]
_PROTOCOL: Final = 5
_PLAIN: Final = (bool, int, float, str, type(None), TensorType, np.ndarray)


class Program(NamedTuple):
    """All of an executable that can be written down."""

    graph: Graph
    launches: list[Launch]
    records: tuple[Any, ...]


class ProgramFile:
    """Where the program is kept that `options` make of a graph, compiled from the line `here`.

    `key` is None where it is not kept: the cache is off, a level of graphc's loggers asks for what
    passes tell, or GRAPHC_VERIFY to verify them, or the program depends on code that is not
    graphc's (operators, optimizers)."""

    def __init__(self, declared: Graph, here: Origin, options: Mapping[str, Any]):
        self._declared = declared
        origins = [*(node.origin for node in declared), here]
        # Source lines by number: the key has the numbers, and so does the file.
        self._lines = list(dict.fromkeys((o.file, o.line) for o in origins))
        self._number = {line: i for i, line in enumerate(self._lines)}
        self.key = self._key(here, options)

    def load(self) -> Program | None:
        """The program; None if it is not there or cannot be read."""
        data = default_cache().get_program(self.key) if self.key else None
        if data is None:
            return None
        try:
            with collector_paused():
                program = self._read(io.BytesIO(data))
        except Exception as error:  # whatever pickle does with what only looks whole
            log.warning("a stored program cannot be read (%s); it is made again", error)
            return None
        log.info("graph %s: program found on disk", self._declared.name)
        return program

    def store(self, program: Program) -> None:
        """Keep a program for `load`, in this process or another."""
        if self.key:
            with collector_paused():
                data = self._written(program)
            default_cache().put_program(self.key, data)

    def _key(self, here: Origin, options: Mapping[str, Any]) -> str | None:
        declared, known = self._declared, all_ops()
        optimizer = options.get("optimizer")
        if (
            default_cache().folder is None
            or any(0 < logging.getLogger(name).level <= logging.INFO for name in _TOLD)
            or os.environ.get("GRAPHC_VERIFY") == "1"
            or (optimizer is not None and type(optimizer).__module__ != optim.__name__)
            or any(known.get(name) is not op for name, op in OPERATORS.items())
            or declared.annotations
        ):
            return None
        rows = []
        for node in declared:
            attrs = {k: v for k, v in node.attrs.items() if k != "init"}
            if (node.op in known and node.op not in OPERATORS) or not _plain(attrs):
                return None
            operands = [v.name for v in node.inputs]
            place = node.origin.layer, self._number[node.origin.file, node.origin.line]
            rows.append((node.name, node.op, operands, freeze(attrs), node.types, place))
        outputs = [(name, value.name) for name, value in declared.outputs.items()]
        updates = [(name, value.name) for name, value in declared.updates.items()]
        place = here.layer, self._number[here.file, here.line]
        facts = (declared.name, rows, outputs, updates, place, sorted(options.items()))
        return default_cache().key(f"{_graphc_digest()} {facts!r}", "program")

    def _written(self, program: Program) -> bytes:
        body = io.BytesIO()
        pickler = _Pickler(body, self._arrays(), self._starts())
        pickler.dump(program)
        lines = [(o.file, o.line) for o in pickler.origins]
        table = [
            (o.layer, o.phase, self._number.get(line, line))
            for o, line in zip(pickler.origins, lines, strict=True)
        ]
        return pickle.dumps(table, _PROTOCOL) + body.getvalue()

    def _read(self, file: io.BytesIO) -> Program:
        table = pickle.load(file)
        origins = []
        for layer, phase, line in table:
            name, number = self._lines[line] if isinstance(line, int) else line
            origins.append(Origin(layer, name, number, phase))
        program: Program = _Unpickler(file, origins, self._arrays()).load()
        for name, node in {**program.graph.parameters, **program.graph.states}.items():
            if name in self._declared:
                node.attrs["init"] = self._declared.node(name).attrs["init"]
        return program

    def _arrays(self) -> list[np.ndarray]:
        """Arrays of the declared graph: a program refers to them."""
        values = [v for n in self._declared for k, v in n.attrs.items() if k != "init"]
        return [v for v in values if isinstance(v, np.ndarray)]

    def _starts(self) -> list[Any]:
        """What parameters and states start from, if it is no plain value."""
        values = [node.attrs.get("init") for node in self._declared]
        return [v for v in values if v is not None and not isinstance(v, (bool, int, float, str))]


class _Pickler(pickle.Pickler):
    """Writes a program; origins as numbers, arrays of the declared graph as theirs, and nothing for
    what its parameters start from."""

    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray], starts: list[Any]):
        super().__init__(file, _PROTOCOL)
        self.origins: dict[Origin, int] = {}
        self._known = {id(start): ("start", 0) for start in starts}
        self._known |= {id(array): ("array", i) for i, array in enumerate(arrays)}

    # Asked of what is no plain number, text or collection, and once of each: `persistent_id` would
    # be asked of everything.
    def reducer_override(self, item: Any) -> Any:
        if type(item) is Origin:
            return _kept_apart, ("origin", self.origins.setdefault(item, len(self.origins)))
        known = self._known.get(id(item))
        return NotImplemented if known is None else (_kept_apart, known)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, origins: list[Origin], arrays: list[np.ndarray]):
        super().__init__(file)
        self._found: dict[str, list[Any]] = {"origin": origins, "array": arrays, "start": [None]}

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return self._kept_apart if found is _kept_apart else found

    def _kept_apart(self, kind: str, number: int) -> Any:
        return self._found[kind][number]


def _kept_apart(kind: str, number: int) -> Any:
    """What stands for an item in a program's file; an unpickler has the item."""
    raise TypeError(f"the file of a program has no {kind} {number}")


def _plain(value: Any) -> bool:
    """Whether `freeze` tells a value from every other."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return type(value) in _PLAIN


@functools.cache
def _graphc_digest() -> str:
    """Of the text of graphc and its passes: they decide what a program is."""
    return _digest_of(p for name in ("graphc", "passes") for p in (_ROOT / name).rglob("*.py"))


def _digest_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()
