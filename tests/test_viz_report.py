"""The report of a dump: every figure is the executable's own, and it works in a real browser."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from browser import headless, open_report

import graphc as gc
from graphc.inspect.explain import kept_apart
from graphc.inspect.recomputed import recomputed
from graphc.inspect.trace import boxes
from graphc.inspect.work import stored_bytes
from graphc.ir import SOURCES
from graphc.viz.outline import Cells, is_inlined, outline
from graphc.viz.report import page
from graphc.viz.report.data import runs

# `GRAPHC_PICTURES=docs/images pytest tests/test_viz_report.py` renews the documentation's pictures.
PICTURES = os.environ.get("GRAPHC_PICTURES")


def training_step(name="lenet5", batch=16, **options):
    return gc.compile(
        getattr(gc.zoo, name)(**options),
        outputs=["loss"],
        dims={"N": batch},
        loss="loss",
        optimizer=gc.optim.SGD(0.1, momentum=0.9),
        threads=2,
    )


def feeds(exe):
    rng = np.random.default_rng(0)
    found = {}
    for name, node in exe.inputs.items():
        kind = node.types[0]
        if kind.is_float and kind.rank:
            found[name] = rng.standard_normal(kind.sizes).astype(kind.dtype)
        elif kind.rank:
            found[name] = rng.integers(0, 10, kind.sizes).astype(kind.dtype)
    return found


@pytest.fixture(scope="module")
def lenet():
    exe = training_step()
    exe.profile(feeds(exe), runs=5)
    return exe


@pytest.fixture(scope="module")
def dumped(lenet, tmp_path_factory):
    return lenet.dump(tmp_path_factory.mktemp("report") / "lenet")


@pytest.fixture(scope="module")
def data(dumped):
    return embedded((dumped / "index.html").read_text(encoding="utf-8"))


def embedded(html: str) -> dict:
    (document,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', html, re.S
    )
    return json.loads(document)


def expand(numbers):
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [first + i for first, count in pairs for i in range(count)]


def graph_in(data, number):
    """Nodes of a pass by name, each as a dict."""
    text, found = data["text"], {}
    passed = data["passes"][number]
    ids = expand(passed["inlined"])
    for cell in expand(passed["cells"]):
        layer, phase, rows = data["cells"][cell]
        for node in (node for row in rows for node in row):
            assert data["nodes"][node][2:4] == [layer, phase]
            ids.append(node)
    for node in ids:
        name, op, layer, phase, types, layouts, origin, _, size, body, operands = data["nodes"][
            node
        ]
        assert text[name] not in found
        found[text[name]] = {
            "op": text[op],
            "layer": text[layer],
            "phase": data["phases"][phase],
            "types": text[types],
            "layouts": text[layouts],
            "origin": text[origin],
            "bytes": size,
            "operands": [text[o] for o in operands],
            "body": [] if body < 0 else [text[row[0]] for row in data["bodies"][body]],
        }
    return found


# ---- the data


def test_every_pass_is_in_the_page_as_it_was(lenet, data):
    seen = []
    # Copies, as differentiation goes on with the graph that it gets.
    lenet.replay(lambda record, graph: seen.append((record, graph.copy())))
    assert [p["name"] for p in data["passes"]] == [record.name for record, _ in seen]
    for number, (record, graph) in enumerate(seen):
        shown = data["passes"][number]
        assert (shown["before"], shown["after"]) == (record.nodes_before, record.nodes_after)
        assert shown["notes"] == list(record.notes)
        nodes = graph_in(data, number)
        assert set(nodes) == {node.name for node in graph}
        for node in graph:
            row = nodes[node.name]
            assert row["op"] == node.op and row["layer"] == node.origin.layer
            assert row["types"] == ", ".join(map(str, node.types))
            assert row["layouts"] == ", ".join(map(str, node.layouts))
            assert row["operands"] == [v.name for v in node.inputs]
            assert row["phase"] == (node.origin.phase or "forward")
            assert row["origin"] == str(node.origin)
            if number:  # sizes are bound
                assert row["bytes"] == sum(stored_bytes(v) for v in node.outputs)
            else:
                assert (row["bytes"] is None) == ("N" in str(node.types))
        text = data["text"]
        assert {text[k]: text[v] for k, v in shown["outputs"]} == {
            k: v.name for k, v in graph.outputs.items()
        }


def test_kernels_are_the_launch_table(lenet, data):
    kernels = lenet.kernels()
    assert len(data["launches"]) == len(kernels)
    for shown, info, launch in zip(data["launches"], kernels, lenet.launches, strict=True):
        expected = json.loads(json.dumps(dataclasses.asdict(info)))
        del expected["file"]
        assert {key: shown[key] for key in expected} == expected
        assert data["sources"][shown["source"]] == launch.call.source
        assert shown["numbers"] == list(launch.call.numbers)
        values = [*launch.node.inputs, *launch.node.outputs]
        assert [a[0] for a in shown["arguments"]] == [v.name for v in values]
        assert [a[3] for a in shown["arguments"]] == [stored_bytes(v) for v in values]


def test_memory_is_the_plan(lenet, data):
    report, shown = lenet.memory(), data["memory"]
    for field in ("arena_bytes", "lower_bound", "total_without_reuse", "total_bytes"):
        assert shown[field] == getattr(report, field)
    assert shown["state_bytes"] == report.state_bytes > 0
    text, plan = data["text"], lenet.plan
    rows = [
        (text[n], b, f, la, o, tuple(text[s] for s in sh))
        for n, b, f, la, o, sh in shown["lifetimes"]
    ]
    assert rows == [(p.name, p.bytes, p.first, p.last, p.offset, p.shares) for p in plan.lifetimes]
    assert [text[s] for s in shown["steps"]] == [node.name for node in lenet.graph]


def test_times_are_the_profile(lenet, data):
    profile, shown = lenet.last_profile, data["profile"]
    for field in ("step", "timed", "call", "kernel", "waiting", "barrier"):
        own = {"kernel": "seconds", "barrier": "barriers"}.get(field, field)
        assert shown[f"{field}_seconds"] == getattr(profile, own)
    assert shown["phases"] == profile.phases() and shown["layers"] == profile.layers()
    assert shown["machine"]["gflops"] == profile.machine.gflops
    assert list(shown["levels"]) == ["L1", "L2", "L3", "memory"]
    for row, launch in zip(shown["launches"], profile.launches, strict=True):
        assert {k: row[k] for k in row} == {k: getattr(launch, k) for k in row}
    drawn = [
        (t, n, pytest.approx(1e6 * b, abs=1e-3), pytest.approx(1e6 * e, abs=1e-3))
        for t, n, b, e in boxes(profile)
    ]
    assert [tuple(box) for box in shown["boxes"]] == drawn


def test_reasons_are_the_explanation(lenet, data):
    text = data["text"]
    apart = {(text[a], text[b]): text[reason] for a, b, reason in data["apart"]}
    assert apart == kept_apart(lenet.graph)
    assert {k: tuple(v) for k, v in data["recomputed"].items()} == recomputed(lenet.graph)
    costs = lenet.graph.annotations["convolutions"]
    assert set(data["algorithms"]) == set(costs)
    explained = lenet.explain()
    assert all(line in explained for lines in data["explain"].values() for line in lines)


def test_the_page_needs_no_network(dumped):
    html = (dumped / "index.html").read_text(encoding="utf-8")
    start = html.index('id="data">')
    programs = html[:start] + html[html.index("</script>", start) :]
    assert "default-src 'none'" in programs
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|import\(|\bsrc=", programs)


def test_names_cannot_end_the_data():
    data = {"name": "</script><script>alert(1)</script>", "passes": []}
    assert embedded(page(data)) == data


def test_runs():
    assert runs([3, 4, 5, 9, 1, 2]) == [3, 3, 9, 1, 1, 2] and runs([]) == []
    assert expand(runs([7, 8, 2])) == [7, 8, 2]


# ---- the outline


def test_outline_follows_the_data_and_finds_repeated_blocks():
    tree = outline([gc.zoo.resnet50(image_size=32)])
    top = [[group.path for group in row] for row in tree.rows]
    assert [name for row in top for name in row if name.startswith("layer")] == [
        f"layer{i}" for i in (1, 2, 3, 4)
    ]
    assert top.index(["layer1"]) < top.index(["layer2"]) < top.index(["layer4"])
    layer3 = next(g for row in tree.rows for g in row if g.path == "layer3")
    blocks = [[(g.name, g.repeats) for g in row] for row in layer3.rows]
    assert blocks == [[("0", 0)], [("1–5", 5)]]
    first = layer3.rows[0][0]
    beside = next(row for row in first.rows if any(g.name == "downsample" for g in row))
    assert len(beside) == 2, "the shortcut stands beside the last of what it skips"


def test_cells_hold_every_node_below_what_it_reads(lenet):
    cells = Cells()(lenet.graph)
    row_of = {
        node.name: (place, number)
        for place, rows in cells.items()
        for number, row in enumerate(rows)
        for node in row
    }
    assert set(row_of) == {node.name for node in lenet.graph if not is_inlined(node)}
    for node in lenet.graph:
        for value in node.inputs if node.name in row_of else ():
            place, number = row_of.get(value.node.name, (None, -1))
            assert place != row_of[node.name][0] or number < row_of[node.name][1]


# ---- in a browser


@pytest.fixture(scope="module")
def window(dumped):
    with headless() as window:
        window.ready = open_report(window, dumped)
        yield window


def click(window, x, y):
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(window)
    actions.pointer_action.move_to_location(int(x), int(y)).click()
    actions.perform()


def errors(window):
    return [entry for entry in window.get_log("browser") if entry["level"] == "SEVERE"]


def picture(window, name):
    """Keep a screenshot for the documentation, if asked to: in few colours, which is small."""
    if PICTURES:
        from PIL import Image

        image = Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB")
        image.quantize(96, dither=Image.Dither.NONE).save(
            Path(PICTURES) / f"{name}.png", optimize=True
        )


def tab(window, name):
    window.find_element("css selector", f"[data-tab={name}]").click()
    return window.execute_script("return report.tab")


def test_search_finds_a_node_and_a_click_opens_it(window, lenet):
    from selenium.webdriver.common.keys import Keys

    picture(window, "report-graph")
    field = window.find_element("id", "search")
    field.send_keys("conv2")
    hits = window.find_elements("css selector", "#found li")
    assert any(hit.text.startswith("conv2") for hit in hits)
    field.send_keys(Keys.ENTER)
    assert window.execute_script("return report.selected").startswith("conv2")
    # Another node by a click of the mouse on its box.
    window.execute_script("report.goTo('fc1'); report.canvas.paint()")
    place = window.execute_script("return report.place('fc1')")
    click(window, place["x"], place["y"])
    assert window.execute_script("return report.selected") == "fc1"
    shown = window.find_element("id", "details").text
    info = next(i for i in lenet.kernels() if i.name == "fc1")
    node = lenet.graph.node("fc1")
    assert str(node.types[0]) in shown and str(node.origin) in shown
    assert f"{sum(stored_bytes(v) for v in node.outputs):,}" in shown
    assert all(layer in shown for layer in info.layers)
    summary = window.find_element("css selector", ".kernel-source summary")
    summary.click()
    source = window.find_element("css selector", "pre.source")
    assert "def kernel(" in source.text
    assert source.find_elements("css selector", "span.word")
    picture(window, "report-node")
    assert not errors(window)


def test_passes_can_be_walked_through(window, lenet):
    tab(window, "Graph")
    rows = window.find_elements("css selector", "#passes [data-pass]")
    assert len(rows) == len(lenet.records) + 2
    count = "return report.graph.arrangement.boxes.length"
    names = [row.text.split()[1] for row in rows]
    differentiate = names.index("differentiate")
    for number in (0, differentiate, len(rows) - 1):
        window.find_element("css selector", f"[data-pass='{number}']").click()
        window.execute_script("report.graph.foldAll(true)")
        drawn = window.execute_script("return report.graph.graph.drawn.size")
        assert window.execute_script(count) == drawn
        window.execute_script("report.graph.foldAll(false)")
        assert window.execute_script(count) < drawn
    window.execute_script("report.graph.foldAll(true); report.canvas.fit()")
    changes = window.execute_script(f"return report.model.changes({differentiate})")
    assert changes["added"] and not changes["removed"], "differentiation only adds"
    assert not errors(window)


def test_boxes_do_not_overlap(window):
    boxes = window.execute_script(
        "report.graph.foldAll(true); return report.graph.arrangement.boxes.map("
        "b => [b.x, b.y, b.x + b.w, b.y + b.h])"
    )
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        for x2, y2, x3, y3 in boxes[:i]:
            assert x1 <= x2 or x3 <= x0 or y1 <= y2 or y3 <= y0


@pytest.mark.parametrize("name", ["Memory", "Timeline", "Roofline", "Kernels", "Why"])
def test_every_tab_opens(window, lenet, name):
    assert tab(window, name) == name
    window.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    if name in ("Memory", "Timeline", "Roofline"):
        picture(window, f"report-{name.lower()}")
    if name == "Kernels":
        rows = window.find_elements("css selector", "#document tbody tr[data-node]")
        assert len(rows) >= len(lenet.launches)
        rows[-1].click()
        assert window.execute_script("return report.selected") == lenet.launches[-1].node.name
    elif name == "Why":
        assert "Neighbours kept apart" in window.find_element("id", "document").text
    else:
        # Something is painted, and what is under the pointer is what a click chooses.
        colours = window.execute_script(
            "const c = report.canvas, d = c.ctx.getImageData(0, 0, c.element.width, "
            "c.element.height).data, seen = new Set(); for (let i = 0; i < d.length; i += 4)"
            "seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); return seen.size"
        )
        assert colours > 8
    assert not errors(window)


def test_a_click_on_the_memory_map_chooses_the_value(window, lenet):
    tab(window, "Memory")
    largest = max(lenet.plan.lifetimes, key=lambda p: p.bytes * (p.last - p.first + 1))
    x, y = window.execute_script(
        "const v = report.views.Memory.values.find(v => v.name === arguments[0]),"
        "c = report.canvas.camera, r = report.canvas.element.getBoundingClientRect();"
        "return [r.left + c.x + c.kx * (v.first + v.last + 1) / 2,"
        "r.top + c.y - c.ky * (v.offset + v.bytes / 2)]",
        largest.name,
    )
    click(window, x, y)
    assert window.execute_script("return report.views.Memory.chosen.name") == largest.name


def test_interpreted_executables_have_a_report(window, tmp_path):
    exe = gc.compile(gc.zoo.mlp(), outputs=["logits"], dims={"N": 2}, target="interpret")
    first = window.current_window_handle
    window.switch_to.new_window("tab")
    open_report(window, exe.dump(tmp_path / "dump"))
    tabs = window.find_elements("css selector", "#tabs button")
    assert [t.text for t in tabs] == ["Graph", "Why"]
    assert not errors(window)
    window.close()
    window.switch_to.window(first)


@pytest.mark.slow
@pytest.mark.parametrize("name, batch", [("lenet5", 64), ("resnet18", 8), ("resnet50", 8)])
def test_large_networks(name, batch, tmp_path):
    """The page stays small and opens fast; the times are printed (`-s`), machines differ."""
    import time

    exe = training_step(name, batch)
    exe.profile(feeds(exe), runs=1)
    start = time.perf_counter()
    folder = exe.dump(tmp_path / "dump")
    seconds = time.perf_counter() - start
    size = (folder / "index.html").stat().st_size
    with headless() as window:
        ready = open_report(window, folder)
        assert not errors(window)
    operators = sum(n.op not in SOURCES for n in exe.graph)
    print(
        f"{name}: {operators} kernels, dump {seconds:.1f} s, page {size / 1e6:.2f} MB, "
        f"interactive after {ready:.0f} ms"
    )
    assert size < 5e6
    assert ready < 20_000
