"""A graph in the formats of other programs: Graphviz source and GraphML."""

from __future__ import annotations

from collections.abc import Iterator

import networkx

from graphc.ir import SOURCES, Graph, Node, Value
from graphc.viz.phases import COLOURS, colours_of, phase_of


def to_graphml(graph: Graph) -> str:
    """GraphML with op, types, phase and layer of each node, slot and output of each edge."""
    return "\n".join(networkx.generate_graphml(plain(graph))) + "\n"


def fused_operators(node: Node) -> list[Node]:
    """The operators in a fused node, in order; none for other nodes."""
    body = node.attrs.get("body")
    return [n for n in body if n.op not in SOURCES] if isinstance(body, Graph) else []


def plain(graph: Graph) -> networkx.MultiDiGraph:
    """A copy of `graph.nx` with text and numbers as attributes, for networkx's writers."""
    result = networkx.MultiDiGraph(name=str(graph.name))
    for node in graph:
        result.add_node(
            node.name,
            op=node.op,
            types=", ".join(map(str, node.types)),
            phase=phase_of(node),
            layer=node.origin.layer,
            source=str(node.origin),
            body=", ".join(n.op for n in fused_operators(node)),
        )
    for source, target, data in graph.nx.edges(data=True):
        result.add_edge(source, target, slot=data["slot"], output=data["output"])
    return result


def to_dot(graph: Graph) -> str:
    """Graphviz source of a graph."""
    lines = [
        f"digraph {_quote(graph.name)} {{",
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=11];',
        '  edge [color="#7b93ad"];',
    ]
    for node in graph:
        fill, stroke = colours_of(node)
        label = f"{node.name}\n{node.op}\n{', '.join(map(str, node.types))}"
        extra = ", shape=ellipse, fontsize=8" if node.op in SOURCES and node.op != "input" else ""
        colours = f'fillcolor="{fill}", color="{stroke}"'
        statement = f"{_quote(node.name)} [label={_quote(label)}, {colours}{extra}];"
        inner = fused_operators(node)
        if not inner:
            lines.append(f"  {statement}")
            continue
        lines += [f"  subgraph {_quote('cluster ' + node.name)} {{", f"    {statement}"]
        for step in inner:
            label = f"{step.op}\n{', '.join(map(str, step.types))}"
            lines.append(
                f"    {_quote(node.name + '/' + step.name)} [label={_quote(label)}, fontsize=9];"
            )
        names = {n.name for n in inner}
        for step in inner:
            for value in step.inputs:
                if value.node.name in names:
                    ends = f"{node.name}/{value.node.name}", f"{node.name}/{step.name}"
                    lines.append(f"    {_quote(ends[0])} -> {_quote(ends[1])};")
        lines.append("  }")
    for node in graph:
        for value in node.inputs:
            lines.append(f"  {_quote(value.node.name)} -> {_quote(node.name)};")
    lines += _dot_outputs(graph.outputs)
    return "\n".join([*lines, "}\n"])


def _dot_outputs(outputs: dict[str, Value]) -> Iterator[str]:
    fill, _ = COLOURS["output"]
    for name, value in outputs.items():
        key = _quote(f"output {name}")
        label = _quote(f"{name}\n{value.type}")
        yield f'  {key} [label={label}, fillcolor="{fill}", fontcolor=white];'
        yield f"  {_quote(value.node.name)} -> {key};"


def _quote(text: object) -> str:
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
