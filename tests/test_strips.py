"""Winograd patches strip by strip: images in pieces that stay in a core's own cache."""

from __future__ import annotations

import numpy as np
import pytest
from compile_checks import assert_same

import graphc as gc
from graphc import compiler
from graphc.runtime.arena import aligned_zeros
from graphc.runtime.driver import BARRIER, CLAIM_BYTES, GROUP_SHIFT, STRIPS_SHIFT, launch_table
from graphc.runtime.linker import KernelSource, load_kernels
from graphc.runtime.team import get_team
from passes import choose_convolutions

# Writes (row, thread, threads) of each call behind the others.
LOG = """
def log(a, thread, threads):
    at = a[0]
    a[0] = at + 3
    a[at] = {row}
    a[at + 1] = thread
    a[at + 2] = threads
"""

# The first block waits for all others, for a while.
WAIT = """
def wait(a, block, blocks):
    if block:
        a[1] += block
    for _ in range(0 if block else 1 << 33):
        if a[1] == blocks * (blocks - 1) // 2:
            a[0] += 1
            break
"""


@pytest.fixture
def tiny_strips(monkeypatch):
    """Every convolution that may be is cut into patches, and those into strips of a few."""
    monkeypatch.setattr(choose_convolutions, "_STRIP", 10_000)

    def choose(node, costs, mode):
        return next((a for a in costs if a.startswith(("F(4,", "F(3,5"))), "direct")

    monkeypatch.setattr(compiler, "predicted_best", choose)


def network(name: str) -> gc.Graph:
    g = gc.Graph(name)
    h = g.input("image", ("N", 3, 31, 29))
    h = gc.relu(gc.nn.conv2d(h, 8, 7, stride=2, padding=3, name="stem"))
    h = gc.relu(gc.nn.conv2d(h, 16, 3, padding=1, name="first")) + gc.nn.conv2d(
        h, 16, 1, name="skip"
    )
    g.output(y=gc.max_pool2d(gc.relu(gc.nn.conv2d(h, 16, 3, padding=1, name="second")), 2))
    return g


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_strips_compute_the_same(tiny_strips, images, threads):
    graph = network(f"by_strips_{images}")
    image = np.random.default_rng(2).standard_normal((images, 3, 31, 29)).astype(np.float32)
    options = {"outputs": ["y"], "dims": {"N": images}, "threads": threads}
    made, _ = assert_same(graph, {"image": image}, steps=2, **options)
    groups, runs = (made.graph.annotations[key] for key in ("groups", "strips"))
    cut = [n for n in made.graph if "strips" in n.attrs]
    assert len(cut) >= 4 and all(n.types[0].shape[0] > images for n in cut)
    if images == 1:  # strips are the blocks of groups, which begin where an image is cut
        assert not runs and [len(names) for _, names in groups] == [3] * (len(cut) // 2)
    else:
        assert sorted(length for _, length in runs.values()) == [3] * (len(cut) // 2)
        assert {count for count, _ in groups} == {images}
    # Of each, a thread keeps one strip.
    assert all(n.layouts[0].copies == threads for n in cut)


def test_groups_of_strips_wait_for_each_other(tiny_strips, monkeypatch):
    """Strips of the second convolution read several of the first one's, and are as many."""
    monkeypatch.setattr(choose_convolutions, "_STRIP", 7000)
    g = gc.Graph("strips_in_one_row")
    h = gc.nn.conv2d(g.input("image", ("N", 8, 18, 18)), 8, 3, name="first")
    g.output(y=gc.nn.conv2d(h, 8, 5, name="second"))
    image = np.random.default_rng(3).standard_normal((1, 8, 18, 18)).astype(np.float32)
    made, _ = assert_same(g, {"image": image}, steps=2, outputs=["y"], dims={"N": 1}, threads=2)
    (count, first), (same, second) = made.graph.annotations["groups"]
    nodes = [n.name for n in made.graph if n.op == "fused"]
    assert count == same and nodes.index(second[0]) == nodes.index(first[-1]) + 1


def test_the_driver_goes_strip_by_strip_within_a_block():
    sources = [KernelSource("log", LOG.format(row=row)) for row in range(4)]
    words = np.zeros(200, np.int64)
    words[0] = 1
    run = 3 << STRIPS_SHIFT | 2  # rows 1 and 2, on 3 strips of each block
    flags = [4 << GROUP_SHIFT, 0, 0, BARRIER]
    rows = [
        (address, words.ctypes.data, flag, 2, 0, run if row == 1 else 0)
        for row, (address, flag) in enumerate(
            zip(load_kernels(sources).addresses, flags, strict=True)
        )
    ]
    table = launch_table(rows)
    get_team(1).program(table.ctypes.data, len(rows)).run()
    calls = words[1 : words[0]].reshape(-1, 3).tolist()
    assert calls == [
        call
        for block in range(2)
        for call in (
            [0, block, 2],
            *([row, 3 * block + strip, 6] for strip in range(3) for row in (1, 2)),
            [3, block, 2],
        )
    ]


def test_blocks_that_a_thread_leaves_are_claimed_by_others():
    """Thread 0 cannot compute its other blocks while it waits for them in the first."""
    (address,) = load_kernels([KernelSource("wait", WAIT)]).addresses
    words, claims = np.zeros(16, np.int64), aligned_zeros(2 * CLAIM_BYTES)
    flags = BARRIER | 1 << GROUP_SHIFT
    table = launch_table([(address, words.ctypes.data, flags, 8, 0, 0, claims.ctypes.data)])
    program = get_team(2).program(table.ctypes.data, 1)
    for rounds in range(1, 20):
        words[1] = 0
        program.run()
        assert words[0] == rounds
