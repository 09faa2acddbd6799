"""`compile(..., tune=True)`: what is measured is chosen, remembered, and computes the same."""

from __future__ import annotations

import numpy as np
import pytest

import graphc as gc
from graphc import errors, tuning


def network() -> gc.Graph:
    g = gc.Graph("network")
    h = gc.relu(gc.nn.conv2d(g.input("x", (3, 8, 9, 9)), 16, 3, name="conv"))
    g.output(y=gc.nn.linear(gc.flatten(h), 37, name="fc"))
    return g


def compiled(**options):
    return gc.compile(network(), outputs=["y"], dims={}, precision="strict", threads=2, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own for the test, and few candidates."""
    monkeypatch.setattr(tuning, "CANDIDATES", 2)
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def last_is_fastest(monkeypatch):
    """Measurements by which the candidate that is predicted to be slowest is the fastest."""
    monkeypatch.setattr(
        tuning, "_measure", lambda rows, team: [1.0 / (1 + i) for i in range(len(rows))]
    )


def tiles(exe) -> dict[str, tuple]:
    return {info.name: info.tile for info in exe.kernels()}


def test_second_compilation_measures_nothing_and_is_the_same(folder, monkeypatch):
    first = compiled(tune=True)
    assert set(first.tuning.measured) == {"conv", "fc"} and not first.tuning.recalled
    assert len(list(folder.glob("*.note"))) == 2
    monkeypatch.setattr(tuning, "_measure", None)  # whoever measures fails
    second = compiled(tune=True)
    assert not second.tuning.measured and set(second.tuning.recalled) == {"conv", "fc"}
    assert second.kernel_paths == first.kernel_paths
    assert compiled().tuning is None


def test_the_fastest_is_chosen_and_computes_the_same(folder, last_is_fastest, rng):
    plain, tuned = compiled(), compiled(tune=True)
    assert tuned.tuning.changed.keys() == {"conv", "fc"}
    for name, (predicted, chosen) in tuned.tuning.changed.items():
        assert tiles(plain)[name] == predicted != chosen == tiles(tuned)[name]
        assert name in str(tuned.tuning)
    x = rng.standard_normal((3, 8, 9, 9)).astype(np.float32)
    expected = gc.compile(network(), outputs=["y"], dims={}, target="interpret")(x=x)["y"]
    for exe in (plain, tuned):
        np.testing.assert_allclose(exe(x=x)["y"], expected, rtol=1e-4, atol=1e-5)


def test_damaged_notes_are_measured_again(folder, last_is_fastest):
    first = compiled(tune=True)
    for path in folder.glob("*.note"):
        path.write_bytes(path.read_bytes()[:-3])
    again = compiled(tune=True)
    assert again.tuning.measured == first.tuning.measured and tiles(again) == tiles(first)


def test_a_note_of_no_candidate_is_measured_again(folder, last_is_fastest, monkeypatch):
    put = tuning.KernelCache.put_note
    monkeypatch.setattr(
        tuning.KernelCache, "put_note", lambda self, key, _: put(self, key, {"tile": [["i9", 99]]})
    )
    assert compiled(tune=True).tuning.measured
    assert compiled(tune=True).tuning.measured


def test_what_there_is_no_time_for_stays_as_predicted(folder, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", -1.0)
    exe = compiled(tune=True)
    assert set(exe.tuning.skipped) == {"conv", "fc"} and not exe.tuning.measured
    assert tiles(exe) == tiles(compiled()) and not list(folder.glob("*.note"))


def test_the_prediction_stays_unless_another_is_clearly_faster():
    assert tuning._fastest([1.0, 0.99, 2.0]) == 0
    assert tuning._fastest([1.0, 0.5, 0.4]) == 2


def test_the_interpreter_has_nothing_to_tune():
    with pytest.raises(errors.CompileError, match="tune=True"):
        gc.compile(network(), outputs=["y"], dims={}, target="interpret", tune=True)
