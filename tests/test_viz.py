"""Pictures: the layout's geometry, what is drawn, and every format read back by its own reader."""

import random
import xml.etree.ElementTree as ElementTree

import networkx
import numpy as np
import pytest

import graphc as gc
from graphc.errors import GraphcError
from graphc.train import Epoch, History
from graphc.viz.draw import scene as draw_scene
from graphc.viz.layout import layered, levels
from graphc.viz.scene import Rectangle, Text, text_width

SVG = "{http://www.w3.org/2000/svg}"


def small(name="small"):
    g = gc.Graph(name)
    x = g.input("x", ("N", 8))
    w = g.parameter("layer.weight", (8, 4))
    h = gc.matmul(x, w, name="product")
    g.output(y=gc.relu(h, name="activation"), total=gc.sum(h * h))
    return g


def fused():
    """What the fusing pass leaves: one node whose attribute is a graph."""
    body = gc.Graph("body")
    a = body.input("operand0", (8,))
    body.output(result0=gc.exp(gc.relu(a, name="inner"), name="last"))
    g = gc.Graph("holder")
    node = gc.relu(g.input("x", (8,)), name="region").node
    node.op, node.attrs = "fused", {"body": body}
    g.output(y=node[0])
    return g


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


# ---- layout


def random_graph(seed, count=60):
    chance = random.Random(seed)
    names = list(range(count))
    edges = [(a, b) for b in names for a in names[:b] if chance.random() < 3 / count]
    sizes = {n: (chance.uniform(20, 200), chance.uniform(10, 80)) for n in names}
    return sizes, edges


@pytest.mark.parametrize("seed", range(8))
def test_boxes_do_not_overlap_and_edges_point_down(seed):
    sizes, edges = random_graph(seed)
    layout = layered(sizes, edges, levels(list(sizes), edges))
    boxes = {k: (*layout.corners[k], *sizes[k]) for k in sizes}
    for a, (xa, ya, wa, ha) in boxes.items():
        assert xa >= -1e-6 and xa + wa <= layout.width + 1e-6
        assert ya >= 0 and ya + ha <= layout.height + 1e-6
        for b, (xb, yb, wb, hb) in boxes.items():
            apart = xa + wa <= xb or xb + wb <= xa or ya + ha <= yb or yb + hb <= ya
            assert a == b or apart, (a, b)
    for (a, b), points in layout.routes.items():
        heights = [y for _, y in points]
        assert heights == sorted(heights)
        assert points[0][1] == pytest.approx(boxes[a][1] + boxes[a][3])
        assert points[-1][1] == pytest.approx(boxes[b][1])


def test_edges_go_round_boxes():
    sizes = dict.fromkeys("abcd", (100.0, 30.0))
    edges = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")]
    layout = layered(sizes, edges, levels("abcd", edges))
    for box in "bc":
        x, y = layout.corners[box]
        inside = [px for px, py in layout.routes["a", "d"] if y <= py <= y + 30]
        assert inside and all(px < x or px > x + 100 for px in inside)


def test_a_chain_is_straight_and_a_pair_of_crossed_edges_is_uncrossed():
    chain = [(i, i + 1) for i in range(9)]
    layout = layered({i: (10.0 + i, 5.0) for i in range(10)}, chain, levels(range(10), chain))
    centres = [layout.corners[i][0] + (10 + i) / 2 for i in range(10)]
    assert max(centres) - min(centres) < 1e-6
    crossed = [("a", "d"), ("b", "c")]
    layout = layered(dict.fromkeys("abcd", (10.0, 5.0)), crossed, levels("abcd", crossed))
    at = {n: x for n, (x, _) in layout.corners.items()}
    assert (at["a"] < at["b"]) == (at["d"] < at["c"])


def test_sources_stand_above_what_uses_them():
    edges = [("a", "b"), ("b", "c"), ("w", "t"), ("t", "c")]
    assert levels(["a", "b", "w", "t", "c"], edges) == {"a": 0, "b": 1, "c": 2, "t": 1, "w": 0}


# ---- the picture


def test_svg_shows_names_shapes_and_parameters():
    svg = gc.viz.draw(small()).svg()
    shown = texts(svg)
    for expected in ("product", "matmul", "f32[N,4]", "weight  f32[8,4]", "x", "activation"):
        assert any(expected in text for text in shown if text), expected
    pills = [t for t in shown if t in ("y", "total")]
    assert sorted(pills) == ["total", "y"]
    assert gc.viz.draw(small())._repr_svg_() == svg


def test_text_fits_its_box():
    scene = draw_scene(small())
    boxes = [s for s in scene.shapes if isinstance(s, Rectangle)]
    for text in (s for s in scene.shapes if isinstance(s, Text) and s.y > 60):
        width = text_width(text.text, text.size, text.bold)
        holders = [
            b
            for b in boxes
            if b.x <= text.x and text.x + width <= b.x + b.width and b.y < text.y < b.y + b.height
        ]
        assert holders, text


def test_names_are_escaped():
    g = gc.Graph('a <b> & "c"')
    g.output(y=gc.relu(g.input("x<1>&", (3,)), name='r"1"\\'))
    drawing = gc.viz.draw(g)
    assert "x<1>&" in texts(drawing.svg())
    assert '"r\\"1\\"\\\\"' in drawing.dot()
    assert "x<1>&" in networkx.parse_graphml(drawing.graphml(), force_multigraph=True)


def test_fused_nodes_list_their_operators():
    drawing = gc.viz.draw(fused())
    shown = texts(drawing.svg())
    assert "region" in shown and any("inner · relu" in t for t in shown)
    assert any("last · exp" in t for t in shown) and not any("operand0" in t for t in shown)
    assert 'subgraph "cluster region"' in drawing.dot()
    assert '"region/inner" -> "region/last"' in drawing.dot()


def test_far_values_are_named_instead_of_drawn():
    g = gc.Graph("far")
    x = g.input("x", (4,))
    first = gc.exp(x, name="first")
    h = first
    for i in range(12):
        h = gc.relu(h, name=f"step{i}")
    g.output(y=gc.add(h, first, name="last"))
    assert "↑ first  f32[4]" in texts(gc.viz.draw(g).svg())


def test_compiled_training_step():
    g = gc.zoo.mlp(hidden=(5,), input_shape=(6,), classes=3)
    optimizer = gc.optim.SGD(0.1, momentum=0.9)
    step = gc.compile(
        g, outputs=["loss"], dims={"N": 4}, loss="loss", optimizer=optimizer, target="interpret"
    )
    shown = texts(gc.viz.draw(step).svg())
    assert {"forward", "backward", "update"} <= set(shown)
    assert any(t and t.startswith("→ fc1.weight") for t in shown)
    assert any(t and t.startswith("learning_rate") for t in shown)


def test_formats_read_back(tmp_path):
    g = small()
    drawing = gc.viz.draw(g)
    for suffix in (".svg", ".dot", ".graphml"):
        path = drawing.save(tmp_path / f"graph{suffix}")
        assert path.stat().st_size > 500
    read = networkx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True)
    assert list(read) == [node.name for node in g]
    assert read.nodes["product"]["op"] == "matmul"
    assert read.nodes["product"]["types"] == "f32[N,4]"
    slots = [data["slot"] for _, _, data in read.in_edges("mul", data=True)]
    assert sorted(slots) == [0, 1]
    dot = (tmp_path / "graph.dot").read_text()
    assert dot.count("{") == dot.count("}") and '"x" -> "product";' in dot
    with pytest.raises(GraphcError, match=r"\.svg, \.png, \.dot or \.graphml"):
        drawing.save(tmp_path / "graph.jpeg")
    with pytest.raises(TypeError, match="neither a graph nor an executable"):
        gc.viz.draw(3)


def test_png(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    for name, g in (("small", small()), ("fused", fused()), ("empty", gc.Graph("empty"))):
        path = gc.viz.draw(g).save(tmp_path / f"{name}.png")
        pixels = image.imread(path)
        assert pixels.shape[0] > 50 and pixels.shape[1] > 50
        assert (pixels[..., :3] < 0.9).any()


def test_png_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(gc.errors.MissingExtraError, match=r"graphc-nn\[plot\]"):
        gc.viz.draw(small()).save(tmp_path / "g.png")
    with pytest.raises(gc.errors.MissingExtraError, match=r"graphc-nn\[plot\]"):
        gc.viz.learning_curve(History(), tmp_path / "c.png")


def test_pictures_are_reproducible():
    assert gc.viz.draw(small()).svg() == gc.viz.draw(small()).svg()


@pytest.mark.parametrize("measured", [True, False])
def test_learning_curve(tmp_path, measured):
    image = pytest.importorskip("matplotlib.image")
    history = History()
    for epoch in range(1, 4):
        score = 1 - 0.5**epoch if measured else None
        history.epochs.append(Epoch(epoch, epoch * 5, 1 / epoch, score, score, score, 0.1, 1.0))
        history.losses += np.linspace(1 / epoch, 1 / (epoch + 1), 5).tolist()
    path = gc.viz.learning_curve(history, tmp_path / "curve.png", "title")
    assert image.imread(path).shape[1] > 600
    gc.viz.learning_curve(History(), tmp_path / "empty.svg")
    assert (tmp_path / "empty.svg").exists()
