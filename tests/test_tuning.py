"""`compile(..., tune=True)`: what is measured is chosen, remembered, and computes the same."""

from __future__ import annotations

import numpy as np
import pytest

import graphc as gc
from graphc import errors, tuning
from graphc.runtime.cache import KernelCache


def network(channels: int = 16) -> gc.Graph:
    g = gc.Graph("network")
    h = gc.relu(gc.nn.conv2d(g.input("x", ("N", channels, 9, 9)), channels, 3, name="conv"))
    y = gc.nn.linear(gc.flatten(h), 37, name="fc")
    g.output(y=y, loss=gc.mean(gc.square(y)))
    return g


def compiled(images: int = 3, channels: int = 16, **options):
    options = {"outputs": ["y"], "dims": {"N": images}, "threads": 2, **options}
    return gc.compile(network(channels), **options)


def strict(**options):
    """Direct convolutions: only register tiles are left to choose."""
    return compiled(precision="strict", **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own for the test, and few candidates."""
    monkeypatch.setattr(tuning, "TILES", 2)
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def last_is_fastest(monkeypatch):
    """Measurements by which the candidate that is predicted to be slowest is the fastest."""
    monkeypatch.setattr(tuning, "_in_turns", lambda runs: [1.0 / (1 + i) for i in range(len(runs))])


def tiles(exe) -> dict[str, tuple]:
    return {info.name: info.tile for info in exe.kernels()}


def algorithms(exe) -> list[str]:
    return [note for record in exe.records for note in record.notes if "F(" in note]


def test_second_compilation_measures_nothing_and_is_the_same(folder, monkeypatch):
    first = strict(tune=True)
    assert set(first.tuning.measured) == {"conv tile", "fc tile"} and not first.tuning.recalled
    assert len(list(folder.glob("*.note"))) == 2
    monkeypatch.setattr(tuning, "_in_turns", None)  # whoever measures fails
    second = strict(tune=True)
    assert not second.tuning.measured and set(second.tuning.recalled) == {"conv tile", "fc tile"}
    assert second.kernel_paths == first.kernel_paths
    assert strict().tuning is None


@pytest.mark.parametrize("images", [3, 16])
def test_the_fastest_is_chosen_and_computes_the_same(folder, last_is_fastest, rng, images):
    """Algorithms with channels or with the batch in lanes, and tiles."""
    plain, tuned = compiled(images), compiled(images, tune=True)
    predicted, chosen = tuned.tuning.changed["conv algorithm"]
    assert f"conv algorithm: {chosen} instead of {predicted}" in tuned.explain()
    assert f"conv: {chosen}; predicted" in tuned.explain()
    assert "fc tile" in tuned.tuning.changed
    assert algorithms(tuned) == ([] if chosen == "direct" else [f"conv: {chosen}"])
    assert algorithms(plain) == ([] if predicted == "direct" else [f"conv: {predicted}"])
    x = rng.standard_normal((images, 16, 9, 9)).astype(np.float32)
    expected = compiled(images, target="interpret")(x=x)["y"]
    for exe in (plain, tuned):
        np.testing.assert_allclose(exe(x=x)["y"], expected, rtol=1e-4, atol=1e-5)
    again = compiled(images, tune=True)
    assert not again.tuning.measured and algorithms(again) == algorithms(tuned)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "channels"), [(3, 16), (16, 5)])
def test_training_measures_gradients_too(folder, images, channels):
    """Patches are chosen for each gradient by itself; before them, with the batch in lanes, rows
    for a layer and its gradients together."""
    exe = compiled(images, channels, loss="loss", gradients=["x", "conv.weight"], tune=True)
    measured = [name for name in exe.tuning.measured if name.endswith("algorithm")]
    by_rows = any(note.startswith("conv: ") and "rows" in note for note in algorithms(exe))
    assert measured.count("conv algorithm") == (1 if images == 3 or by_rows else 2)
    assert any("grad" in name for name in measured) == (not by_rows)
    x = np.random.default_rng(0).standard_normal((images, channels, 9, 9)).astype(np.float32)
    assert np.isfinite(exe(x=x)["y"]).all()
    exe.replay(lambda record, graph: None)  # as `dump` does: nothing is measured again
    assert measured == [name for name in exe.tuning.measured if name.endswith("algorithm")]


def test_tiles_are_those_that_are_reported(folder, last_is_fastest):
    plain, tuned = strict(), strict(tune=True)
    assert tuned.tuning.changed.keys() == {"conv tile", "fc tile"}
    for name, (predicted, chosen) in tuned.tuning.changed.items():
        kernel = name.removesuffix(" tile")
        for exe, text in ((plain, predicted), (tuned, chosen)):
            assert text == " x ".join(f"{count} {loop}" for loop, count in tiles(exe)[kernel])


def test_damaged_notes_are_measured_again(folder, last_is_fastest):
    first = strict(tune=True)
    for path in folder.glob("*.note"):
        path.write_bytes(path.read_bytes()[:-3])
    again = strict(tune=True)
    assert again.tuning.measured == first.tuning.measured and tiles(again) == tiles(first)


def test_a_note_of_no_candidate_is_measured_again(folder, last_is_fastest, monkeypatch):
    put = KernelCache.put_note
    monkeypatch.setattr(
        KernelCache, "put_note", lambda self, key, _: put(self, key, {"choice": "F(99,1) rows"})
    )
    assert strict(tune=True).tuning.measured
    assert strict(tune=True).tuning.measured


def test_what_there_is_no_time_for_stays_as_predicted(folder, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS", -1.0)
    exe = strict(tune=True)
    assert set(exe.tuning.skipped) == {"conv tile", "fc tile"} and not exe.tuning.measured
    assert tiles(exe) == tiles(strict()) and not list(folder.glob("*.note"))


def test_the_prediction_stays_unless_another_is_clearly_faster():
    assert tuning._fastest([1.0, 0.99, 2.0]) == 0
    assert tuning._fastest([1.0, 0.5, 0.4]) == 2


def test_the_interpreter_has_nothing_to_tune():
    with pytest.raises(errors.CompileError, match="tune=True"):
        compiled(target="interpret", tune=True)
