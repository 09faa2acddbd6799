"""Weights on disk: round trips, damage, atomic replacement."""

import os
import pickle

import numpy as np
import pytest

from graphc.errors import DataError
from graphc.serialize import load, load_metadata, save


def arrays():
    random = np.random.default_rng(0)
    return {
        "conv1.weight": random.standard_normal((6, 1, 5, 5)).astype(np.float32),
        "scalar": np.float32(3.5).reshape(()),
        "empty": np.zeros((0, 7), np.float64),
        "steps": np.array([17], np.int64),
        "mask": np.array([True, False]),
    }


def test_round_trip(tmp_path):
    path = tmp_path / "weights.safetensors"
    save(path, arrays(), {"model": "lenet"})
    loaded = load(path)
    assert list(loaded) == sorted(loaded) or set(loaded) == set(arrays())
    for name, array in arrays().items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)
    assert load_metadata(path) == {"model": "lenet"}


def test_views_are_saved_as_they_read(tmp_path):
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    save(tmp_path / "w", {"transposed": base.T, "strided": base[::2, ::-1]})
    loaded = load(tmp_path / "w")
    np.testing.assert_array_equal(loaded["transposed"], base.T)
    np.testing.assert_array_equal(loaded["strided"], base[::2, ::-1])


def test_an_executable_saves_its_state(tmp_path):
    class Executable:
        def state(self):
            return {"w": np.ones(3, np.float32)}

    save(tmp_path / "w", Executable())
    assert load(tmp_path / "w")["w"].tolist() == [1, 1, 1]
    assert load_metadata(tmp_path / "w") == {}


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save(path, {"w": np.arange(64, dtype=np.float32)})
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"w\.safetensors") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="truncated: .* of "):
        load(path)


@pytest.mark.parametrize("data", [b"x" * 100, pickle.dumps({"w": [1.0] * 50}), b"\0" * 64])
def test_foreign_files_are_refused(tmp_path, data):
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    with pytest.raises(DataError, match="safetensors"):
        load(path)


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(TypeError, match="epochs"):
        save(tmp_path / "w", {}, {"epochs": 3})
    assert not (tmp_path / "w").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w"
    save(path, {"w": np.zeros(2, np.float32)})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, {"w": np.ones(2, np.float32)})
    assert load(path)["w"].tolist() == [0, 0]
    assert os.listdir(tmp_path) == ["w"]
