"""The training loop, on a small network whose step is written in NumPy: no compiler needed."""

import csv

import numpy as np
import pytest

from graphc import train as training
from graphc.data import Dataset
from graphc.errors import DataError, GraphcError
from graphc.ir import Graph
from graphc.serialize import load, load_metadata, save


class Softmax:
    """Logistic regression with momentum: the interface of an executable."""

    def __init__(self, features=5, classes=3, batch=8, lr=0.1, momentum=0.9):
        self.w = np.zeros((features, classes))
        self.v = np.zeros_like(self.w)
        self.batch, self.lr, self.momentum = batch, lr, momentum
        self.inputs = {"image": Graph().input("image", (batch, features)).node}
        self.calls = []

    def __call__(self, image, label=None, learning_rate=None):
        assert len(image) == self.batch
        logits = image @ self.w
        if label is None:
            return {"logits": logits}
        self.calls.append(learning_rate)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        rows = np.arange(len(label))
        loss = -np.log(p[rows, label]).mean()
        p[rows, label] -= 1
        self.v = self.momentum * self.v + image.T @ p / len(label)
        self.w = self.w - (self.lr if learning_rate is None else learning_rate) * self.v
        return {"loss": np.asarray(loss), "logits": logits}

    def state(self, *, optimizer=False):
        return {"w": self.w.copy(), **({"optimizer.v": self.v.copy()} if optimizer else {})}

    def load_state(self, state):
        self.w = np.array(state["w"])
        if "optimizer.v" in state:
            self.v = np.array(state["optimizer.v"])


@pytest.fixture
def dataset():
    random = np.random.default_rng(0)
    centres = random.standard_normal((3, 5)) * 2

    def part(count):
        labels = random.integers(0, 3, count).astype(np.int32)
        images = centres[labels] + random.standard_normal((count, 5))
        return images.astype(np.float32), labels

    return Dataset("blobs", *part(100), *part(43), ("a", "b", "c"), (0.0,) * 5, (1.0,) * 5)


def fit(executable, dataset, **options):
    return training.fit(executable, Softmax(batch=16), dataset, **{"epochs": 4, **options})


def test_learns_and_records(dataset, tmp_path):
    history = fit(Softmax(), dataset, schedule=lambda step: 0.1 / (1 + step))
    assert [e.epoch for e in history.epochs] == [1, 2, 3, 4]
    assert [e.step for e in history.epochs] == [12, 24, 36, 48] and len(history.losses) == 48
    assert history.final.test_accuracy > 0.85
    assert history.final.loss < history.losses[0] and history.final.accuracy > 0.8
    assert history.final.loss == pytest.approx(np.mean(history.losses[-12:]))
    assert history.final.learning_rate == pytest.approx(0.1 / 48)
    history.save_csv(tmp_path / "history.csv")
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert len(rows) == 4 and float(rows[3]["test_accuracy"]) == history.final.test_accuracy


def test_schedule_reaches_the_executable(dataset):
    executable = Softmax()
    fit(executable, dataset, epochs=1, schedule=lambda step: 0.5**step)
    assert executable.calls == [0.5**i for i in range(12)]
    assert executable.calls[0].dtype == np.float32
    executable = Softmax()
    history = fit(executable, dataset, epochs=1)
    assert executable.calls == [None] * 12 and history.final.learning_rate is None


def test_same_seed_same_run(dataset):
    a, b, c = (fit(Softmax(), dataset, seed=s).losses for s in (1, 1, 2))
    assert a == b and a != c


def test_evaluation_counts_the_last_partial_batch_once(dataset):
    model = Softmax(batch=16)
    model.w = np.random.default_rng(1).standard_normal(model.w.shape)
    logits = dataset.test_images @ model.w
    assert len(logits) % 16
    predicted = training.predict(model, dataset.test_images)
    np.testing.assert_allclose(predicted, logits, rtol=1e-6)
    accuracy = training.evaluate(model, dataset.test_images, dataset.test_labels)
    assert accuracy == (logits.argmax(1) == dataset.test_labels).mean()
    with pytest.raises(DataError, match="no examples"):
        training.predict(model, dataset.test_images[:0])


@pytest.mark.parametrize("steps", [5, 12, 13, 24, 47])
def test_interrupted_run_goes_on_exactly(dataset, tmp_path, steps):
    whole = Softmax()
    reference = fit(whole, dataset, seed=3)

    class Interrupt(training.Callback):
        ended = False

        def on_step(self, progress):
            if progress.step == steps:
                raise KeyboardInterrupt

        def on_end(self, progress):
            Interrupt.ended = True

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(Softmax(), dataset, seed=3, checkpoint=path, callbacks=[Interrupt()])
    assert Interrupt.ended and load_metadata(path)["kind"] == "graphc checkpoint"
    assert set(load(path)) == {"w", "optimizer.v", "history.losses"}

    second = Softmax()
    history = fit(second, dataset, seed=3, checkpoint=path, resume=True)
    np.testing.assert_array_equal(second.w, whole.w)
    assert history.losses == reference.losses
    for a, b in zip(history.epochs, reference.epochs, strict=True):
        assert (a.epoch, a.step, a.test_accuracy) == (b.epoch, b.step, b.test_accuracy)
        assert a.loss == pytest.approx(b.loss) and a.accuracy == pytest.approx(b.accuracy)


def test_resume_of_a_finished_run_trains_no_further(dataset, tmp_path):
    path = tmp_path / "checkpoint"
    fit(Softmax(), dataset, checkpoint=path)
    executable = Softmax()
    history = fit(executable, dataset, checkpoint=path, resume=True)
    assert executable.calls == [] and len(history.epochs) == 4
    longer = fit(executable, dataset, checkpoint=path, resume=True, epochs=6)
    assert len(executable.calls) == 24 and longer.final.epoch == 6


def test_checkpoints_of_another_run_are_refused(dataset, tmp_path):
    path = tmp_path / "checkpoint"
    fit(Softmax(), dataset, checkpoint=path)
    with pytest.raises(DataError, match="its seed is 0, this run's 1"):
        fit(Softmax(), dataset, checkpoint=path, resume=True, seed=1)

    class Other(Softmax):
        def state(self, *, optimizer=False):
            return {"other": self.w}

    with pytest.raises(DataError, match="another network or optimizer"):
        fit(Other(), dataset, checkpoint=path, resume=True)
    save(path, {"w": np.zeros(3)})
    with pytest.raises(DataError, match="not a checkpoint"):
        fit(Softmax(), dataset, checkpoint=path, resume=True)


def test_resume_without_a_checkpoint_starts_afresh(dataset, tmp_path):
    history = fit(Softmax(), dataset, checkpoint=tmp_path / "none", resume=True, epochs=1)
    assert len(history.epochs) == 1 and (tmp_path / "none").exists()


def test_diverged_loss_is_an_error_and_keeps_the_checkpoint(dataset, tmp_path):
    class Diverges(Softmax):
        def __call__(self, image, label=None, learning_rate=None):
            result = super().__call__(image, label, learning_rate)
            if label is not None and len(self.calls) == 15:
                result["loss"] = np.asarray(np.inf)
            return result

    path = tmp_path / "checkpoint"
    with pytest.raises(GraphcError, match=r"inf at step 15 .*lower learning rate"):
        fit(Diverges(), dataset, checkpoint=path, schedule=lambda step: 0.1)
    assert len(load(path)["history.losses"]) == 12


def test_callbacks_can_stop_a_run(dataset):
    class Stop(training.Callback):
        events = []

        def on_start(self, progress):
            self.events.append("start")

        def on_step(self, progress):
            assert 0 < progress.batch <= progress.batches == 12
            if progress.step == 14:
                progress.stop = True

        def on_epoch(self, progress):
            self.events.append(progress.history.final.step)

        def on_end(self, progress):
            self.events.append("end")

    history = fit(Softmax(), dataset, callbacks=[Stop()])
    assert Stop.events == ["start", 12, 14, "end"] and len(history.losses) == 14


def test_a_stopped_run_goes_on(dataset, tmp_path):
    class Stop(training.Callback):
        def on_step(self, progress):
            progress.stop = progress.step == 14

    path = tmp_path / "checkpoint"
    fit(Softmax(), dataset, callbacks=[Stop()], checkpoint=path)
    history = fit(Softmax(), dataset, checkpoint=path, resume=True)
    assert history.losses == fit(Softmax(), dataset).losses
    assert [e.step for e in history.epochs] == [12, 24, 36, 48]


def test_without_evaluation(dataset):
    history = training.fit(Softmax(), None, dataset, epochs=1, accuracy=None)
    final = history.final
    assert (final.test_loss, final.test_accuracy, final.accuracy) == (None, None, None)


def test_scores():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1000.0]])
    labels = np.array([0, 1])
    assert training.class_accuracy(logits, labels).tolist() == [1, 0]
    expected = [np.log(np.exp([0, -1, -2]).sum()), 997]
    np.testing.assert_allclose(training.cross_entropy(logits, labels), expected)
    z, y = np.array([[3.0], [-2.0], [-800.0]]), np.array([1, 1, 0])
    assert training.binary_accuracy(z, y).tolist() == [1, 0, 1]
    expected = [np.log1p(np.exp(-3)), np.log1p(np.exp(2)), 0]
    np.testing.assert_allclose(training.binary_cross_entropy(z, y), expected)
    np.testing.assert_allclose(
        training.squared_error(np.array([[1.0], [2.0]]), np.array([0.0, 4.0])), [1, 4]
    )
