"""One multilayer perceptron, three heads, each on real data: two classes, ten classes, a number.

    python examples/mlp.py [binary | classes | regression]

Needs the data sets that packages ship: pip install "graphc-nn[data]"
"""

import sys

import graphc as gc


def perceptron(features: tuple[int, ...], hidden: tuple[int, ...], outputs: int):
    """A graph with input `image` [N, *features], and its last layer [N, outputs]."""
    g = gc.Graph("mlp")
    h = gc.flatten(g.input("image", ("N", *features)))
    for number, size in enumerate(hidden, start=1):
        h = gc.relu(gc.nn.linear(h, size, name=f"fc{number}"))
    return g, gc.nn.linear(h, outputs, name=f"fc{len(hidden) + 1}")


def fit(g, data, *, batch: int, epochs: int, rate: float, decay: float = 0.0, **scores):
    """Compile the graph's training step and its inference, and train."""
    optimizer = gc.optim.AdamW(rate, weight_decay=decay)
    train = gc.compile(
        g, outputs=["loss", "logits"], dims={"N": batch}, loss="loss", optimizer=optimizer
    )
    infer = gc.compile(g, outputs=["logits"], dims={"N": batch})
    steps = epochs * (len(data.train_images) // batch)
    schedule = gc.optim.CosineLR(rate, steps)
    return gc.train.fit(train, infer, data, epochs=epochs, schedule=schedule, **scores)


def binary() -> None:
    """Malignant or benign, from 30 measurements of cell nuclei: one logit, cross-entropy."""
    data = gc.data.load_breast_cancer()
    g, logits = perceptron(data.image_shape, (16,), 1)
    label = g.input("label", ("N",), dtype="int32")
    target = gc.unsqueeze(gc.cast(label, "float32"), 1)
    g.output(logits=logits, loss=gc.binary_cross_entropy_with_logits(logits, target))
    history = fit(
        g,
        data,
        batch=32,
        epochs=30,
        rate=1e-2,
        accuracy=gc.train.binary_accuracy,
        test_loss=gc.train.binary_cross_entropy,
    )
    print(f"breast cancer: test accuracy {history.final.test_accuracy:.1%}")


def classes() -> None:
    """Which of ten digits: ten logits, softmax cross-entropy."""
    data = gc.data.load_digits()
    g, logits = perceptron(data.image_shape, (128, 64), 10)
    label = g.input("label", ("N",), dtype="int32")
    g.output(logits=logits, loss=gc.softmax_cross_entropy(logits, label))
    history = fit(g, data, batch=64, epochs=10, rate=3e-3, decay=0.01)
    print(f"digits: test accuracy {history.final.test_accuracy:.1%}")


def regression() -> None:
    """Progression of diabetes in a year, from 10 measurements: one number, squared error."""
    data = gc.data.load_diabetes()
    g, prediction = perceptron(data.image_shape, (16,), 1)
    target = g.input("label", ("N", 1))
    g.output(logits=prediction, loss=gc.mse_loss(prediction, target))
    history = fit(
        g,
        data,
        batch=32,
        epochs=40,
        rate=3e-3,
        decay=0.1,
        accuracy=None,
        test_loss=gc.train.squared_error,
    )
    explained = 1 - history.final.test_loss / float(data.test_labels.var())
    print(f"diabetes: explains {explained:.0%} of the variance of the test patients")


HEADS = {"binary": binary, "classes": classes, "regression": regression}

if __name__ == "__main__":
    for name in sys.argv[1:] or HEADS:
        if name not in HEADS:
            sys.exit(f"no head {name!r}; choose from {', '.join(HEADS)}")
        HEADS[name]()
