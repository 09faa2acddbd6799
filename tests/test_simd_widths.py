"""Kernels for other SIMD widths than this machine's best: same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPT = """
import compile_checks, networks
import graphc as gc
from graphc.codegen.simd_host import host_lanes

assert host_lanes() == {lanes}, host_lanes()
lenet = gc.zoo.lenet5()
options = dict(outputs=["loss"], loss="loss", optimizer=gc.optim.SGD(0.05))
compile_checks.assert_same(
    lenet, networks.feeds(lenet, 16), steps=2, tolerance=1e-4, dims={{"N": 16}}, **options
)
convolutions = networks.convolutions()
compile_checks.assert_same(
    convolutions, networks.feeds(convolutions, 3), tolerance=1e-4, dims={{"N": 3}}, **options
)
resnet = networks.small_resnet(5, 8)
compile_checks.assert_same(
    resnet, networks.feeds(resnet, 2), outputs=["logits", "loss"], dims={{"N": 2}}, mode="train"
)
"""


@pytest.mark.parametrize(
    "lanes", [4, pytest.param(8, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)]
)
def test_width(lanes):
    search = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "GRAPHC_SIMD_LANES": str(lanes), "PYTHONPATH": search}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(lanes=lanes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
