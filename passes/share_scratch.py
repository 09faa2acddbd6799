"""Give values that live inside a group one block of memory a thread."""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphc.ir import Graph, Node, Value, is_view, label_body
from passes.base import Pass, note
from passes.liveness import storage_bytes, strip_runs


@dataclass(frozen=True)
class ShareScratch(Pass):
    """Values that only their own group reads are kept for the block at hand alone.

    Requires: groups (`Parallelize`), memory not planned yet. Ensures: the same graph; such values
    have a layout with `copies=threads`: one block for each thread, overwritten by the next block;
    one strip, where all is done to it before the next.
    They never leave the cache, and the arena holds a few blocks instead of the whole batch.
    """

    threads: int

    def run(self, graph: Graph) -> Graph:
        new = graph.copy()
        group_of = {
            name: number
            for number, (_, names) in enumerate(new.annotations.get("groups", ()))
            for name in names
        }
        run_of = {name: run[0] for run in strip_runs(new) for name in run}
        kept = set(new.results)
        before = after = 0
        for number, (shares, names) in enumerate(new.annotations.get("groups", ())):
            for name in names:
                node = new.node(name)
                for value in node.outputs:
                    blocks = value.layout.physical_shape(value.sizes)[0]
                    family = _views(new, value)
                    users = [user for v in family for user, _ in new.users(v) if not is_view(user)]
                    inside = all(group_of.get(user.name) == number for user in users)
                    together = all(run_of.get(user.name) == run_of.get(name) for user in users)
                    if name in run_of and "strips" in node.attrs and together:
                        blocks //= node.attrs["strips"]
                    if shares != blocks or not inside or kept & set(family):
                        continue
                    before += storage_bytes(value)
                    for member in family:
                        _set_layout(member.node, member.index, self.threads)
                    after += storage_bytes(value)
        for node in new:
            if node.op == "fused":
                label_body(node)
        note(new, f"{before} bytes of values inside groups -> {after}")
        return new


def _views(graph: Graph, value: Value) -> list[Value]:
    """A value and everything that is its memory under another shape."""
    found = [value]
    for v in found:
        found += [user[0] for user, _ in graph.users(v) if is_view(user)]
    return found


def _set_layout(node: Node, index: int, threads: int) -> None:
    layouts = list(node.layouts)
    layouts[index] = replace(layouts[index], copies=threads)
    node.layouts = tuple(layouts)
