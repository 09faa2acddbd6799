"""LeNet-5 (LeCun et al. 1998) declared line by line, and trained on real handwritten digits.

python examples/lenet.py [folder with MNIST or Fashion-MNIST files]
"""

import sys

import graphc as gc

g = gc.Graph("lenet")
image = g.input("image", ("N", 1, 28, 28))
label = g.input("label", ("N",), dtype="int32")
h = gc.max_pool2d(gc.relu(gc.nn.conv2d(image, 6, 5, padding=2, name="conv1")), 2)
h = gc.max_pool2d(gc.relu(gc.nn.conv2d(h, 16, 5, name="conv2")), 2)
h = gc.relu(gc.nn.linear(gc.flatten(h), 120, name="fc1"))
h = gc.relu(gc.nn.linear(h, 84, name="fc2"))
logits = gc.nn.linear(h, 10, name="fc3")
g.output(logits=logits, loss=gc.softmax_cross_entropy(logits, label))


def main() -> None:
    data = gc.data.load(sys.argv[1]) if len(sys.argv) > 1 else gc.data.load_digits()
    print(data)

    # One training step, forward, backward and update, is one program; inference is another.
    epochs, batch = 10, 64
    schedule = gc.optim.CosineLR(3e-3, total_steps=epochs * (len(data.train_images) // batch))
    train = gc.compile(
        g, outputs=["loss"], dims={"N": batch}, loss="loss", optimizer=gc.optim.Adam()
    )
    infer = gc.compile(g, outputs=["logits"], dims={"N": 100})

    for epoch in range(epochs):
        batches = gc.data.Batches(data.train_images, data.train_labels, batch, seed=0)
        total = 0.0
        for step, (x, y) in enumerate(batches.epoch(epoch), start=epoch * len(batches)):
            total += float(train(image=x, label=y, learning_rate=schedule(step))["loss"])
        infer.load_state(train.state())
        accuracy = gc.train.evaluate(infer, data.test_images, data.test_labels)
        print(f"epoch {epoch + 1}: loss {total / len(batches):.4f}, test accuracy {accuracy:.2%}")

    gc.save("lenet.safetensors", train)
    print("wrote lenet.safetensors")


if __name__ == "__main__":
    main()
