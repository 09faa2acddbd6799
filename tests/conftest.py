"""Shared by all tests: verified passes, reproducible Hypothesis, golden files, skips."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Every pass checks the graph it leaves. Set before graphc is imported.
os.environ.setdefault("GRAPHC_VERIFY", "1")

# Kernels of this run go to a folder of their own, so that every run proves the compiler anew.
# GRAPHC_CACHE_DIR keeps them, for working on the tests.
_CACHE = None if os.environ.get("GRAPHC_CACHE_DIR") else tempfile.mkdtemp(prefix="graphc-tests-")
if _CACHE:
    os.environ["GRAPHC_CACHE_DIR"] = _CACHE

# Where pytest's own processes fill the machine, each compiles alone: others would only take time to
# import Numba.
if 2 * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")) > (os.cpu_count() or 1):
    os.environ.setdefault("GRAPHC_COMPILE_WORKERS", "0")

settings.register_profile(
    "graphc",
    deadline=None,  # the first example may compile
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("graphc")

GOLDEN = Path(__file__).parent / "golden"


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE:
        shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with the same seed in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares text with tests/golden/name; `--update-golden` rewrites it."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: run pytest --update-golden and review it"
        assert text == path.read_text(), f"differs from {path}: run pytest --update-golden"

    return check


@pytest.fixture(scope="session")
def torch():
    """PyTorch, or a skip."""
    module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module
