"""ResNet-20 (He et al. 2016, section 4.2) on CIFAR-10: crops and mirror images, SGD with momentum.

    python examples/resnet.py --data FOLDER
    python examples/resnet.py --data FOLDER --compare-torch 200

FOLDER holds CIFAR-10's binary version (data_batch_1.bin to data_batch_5.bin, test_batch.bin), or
its subfolder cifar-10-batches-bin does. --resume goes on from the checkpoint of a run that was
stopped. --compare-torch trains beside PyTorch, from the same weights on the same batches, and draws
both loss curves.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import graphc as gc

NETWORKS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
MOMENTUM = 0.9
EVALUATION_BATCH = 100


def main() -> None:
    options = parse()
    data = gc.data.load_cifar10(options.data)
    graph = getattr(gc.zoo, options.network)(classes=len(data.classes))
    print(data)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compare_torch:
        compare(options, graph, data)
    else:
        train(options, graph, data)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with CIFAR-10's binary files")
    add("--network", choices=NETWORKS, default="resnet20")
    add("--epochs", type=int, default=20)
    add("--batch", type=int, default=128)
    add("--rate", type=float, default=0.1, help="first learning rate (default: 0.1)")
    add("--schedule", choices=("cosine", "step"), default="cosine")
    add("--weight-decay", type=float, default=1e-4)
    add("--threads", type=int, help="default: every core")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--out", type=Path, default=Path("out/resnet"), help="folder for what is written")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--compare-torch", type=int, metavar="N", help="N steps beside PyTorch instead")
    return parser.parse_args()


def compiled_step(options: argparse.Namespace, graph: gc.Graph, outputs: list[str]):
    """One training step, forward, backward and update, as one program."""
    began = time.perf_counter()
    step = gc.compile(
        graph,
        outputs=outputs,
        dims={"N": options.batch},
        loss="loss",
        optimizer=gc.optim.SGD(options.rate, MOMENTUM, options.weight_decay),
        threads=options.threads,
        seed=options.seed,
    )
    seconds = time.perf_counter() - began
    print(f"compiled {graph.name} for batches of {options.batch} in {seconds:.1f} s")
    return step


def schedule(options: argparse.Namespace, steps: int) -> gc.optim.Schedule:
    """Half a cosine, or the paper's: a tenth of the rate after 1/2 and again after 3/4 of the
    steps."""
    if options.schedule == "cosine":
        return gc.optim.CosineLR(options.rate, steps)
    return lambda step: options.rate * 0.1 ** ((step >= steps // 2) + (step >= 3 * steps // 4))


# ---- training


class Progress(gc.train.Callback):
    """A line that counts on the terminal, and one that stays for each epoch."""

    def __init__(self) -> None:
        self.began = self.shown = time.perf_counter()

    def on_step(self, progress: gc.train.Progress) -> None:
        now = time.perf_counter()
        if sys.stderr.isatty() and now - self.shown > 0.2:
            self.shown = now
            place = f"epoch {progress.epoch}/{progress.epochs}, {progress.batch}/{progress.batches}"
            sys.stderr.write(f"\r\033[K{place}, loss {progress.loss:.4f}")
            sys.stderr.flush()

    def on_epoch(self, progress: gc.train.Progress) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\033[K")
        last = progress.history.final
        per_step = 1e3 * last.seconds / progress.batches
        print(
            f"epoch {last.epoch}/{progress.epochs}  rate {last.learning_rate:.4f}  "
            f"loss {last.loss:.4f}  accuracy {last.accuracy:.2%}  test loss {last.test_loss:.4f}  "
            f"test accuracy {last.test_accuracy:.2%}  {per_step:.1f} ms a step",
            flush=True,
        )


def train(options: argparse.Namespace, graph: gc.Graph, data: gc.data.Dataset) -> None:
    """Train, print the test accuracy, write weights, history and learning curve."""
    step = compiled_step(options, graph, ["loss", "logits"])
    infer = gc.compile(
        graph, outputs=["logits"], dims={"N": EVALUATION_BATCH}, threads=options.threads
    )
    checkpoint = options.out / "checkpoint.safetensors"
    began = time.perf_counter()
    history = gc.train.fit(
        step,
        infer,
        data,
        epochs=options.epochs,
        schedule=schedule(options, options.epochs * (len(data.train_images) // options.batch)),
        seed=options.seed,
        augment=gc.data.crop_and_flip(4),
        callbacks=[Progress()],
        checkpoint=checkpoint,
        resume=options.resume,
    )
    minutes = (time.perf_counter() - began) / 60
    print(f"test accuracy {history.final.test_accuracy:.2%} after {minutes:.1f} minutes")
    weights = options.out / f"{graph.name}.safetensors"
    gc.save(weights, step)
    history.save_csv(options.out / "history.csv")
    title = f"{graph.name}: test accuracy {history.final.test_accuracy:.2%}"
    written = [weights, options.out / "history.csv", checkpoint]
    try:
        written.append(gc.viz.learning_curve(history, options.out / "learning_curve.png", title))
    except gc.errors.MissingExtraError as error:
        print(f"note: {error}")
    print("written:", *written)


# ---- beside PyTorch


def compare(options: argparse.Namespace, graph: gc.Graph, data: gc.data.Dataset) -> None:
    """N steps in both libraries; print and draw both losses."""
    try:
        import torch
    except ImportError:
        sys.exit("--compare-torch needs PyTorch: pip install torch")
    if options.threads:
        torch.set_num_threads(options.threads)
    step, rates = compiled_step(options, graph, ["loss"]), schedule(options, options.compare_torch)
    state = {name: torch.from_numpy(array) for name, array in step.state().items()}
    trained = [tensor.requires_grad_() for name, tensor in state.items() if "running" not in name]
    optimizer = torch.optim.SGD(trained, options.rate, MOMENTUM, weight_decay=options.weight_decay)

    losses, seconds = np.zeros((2, options.compare_torch)), np.zeros((2, options.compare_torch))
    print("  step    graphc   PyTorch")
    for number, (image, label) in enumerate(batches(options, data)):
        began = time.perf_counter()
        losses[0, number] = step(image=image, label=label, learning_rate=rates(number))["loss"]
        seconds[0, number] = time.perf_counter() - began

        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rates(number)
        optimizer.zero_grad()
        loss = torch_loss(state, torch.from_numpy(image), torch.from_numpy(label).long())
        loss.backward()
        optimizer.step()
        losses[1, number] = loss.item()
        seconds[1, number] = time.perf_counter() - began
        if number % 10 == 0 or number == options.compare_torch - 1:
            print(f"{number:6d}  {losses[0, number]:8.4f}  {losses[1, number]:8.4f}", flush=True)

    ours, theirs = 1e3 * np.median(seconds, axis=1)
    print(f"median step: graphc {ours:.1f} ms, PyTorch {theirs:.1f} ms ({theirs / ours:.2f} times)")
    distance = np.abs(losses[0] - losses[1]).mean() / losses[1].mean()
    print(f"the losses differ by {distance:.2%} on average")
    draw(losses, graph.name, options.out / "compare_torch.png")


def batches(
    options: argparse.Namespace, data: gc.data.Dataset
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As many augmented batches as are compared, over several epochs if need be."""
    source = gc.data.Batches(
        data.train_images,
        data.train_labels,
        options.batch,
        seed=options.seed,
        augment=gc.data.crop_and_flip(4),
    )
    for number in range(options.compare_torch):
        epoch, batch = divmod(number, len(source))
        yield next(source.epoch(epoch, batch))


def torch_loss(state, image, label):
    """The network in PyTorch, from tensors by name; batch norm updates its statistics in them."""
    from torch.nn import functional as F

    def layer(x, conv, norm, stride=1):
        weight = state[f"{conv}.weight"]
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(state[f"{norm}.{n}"] for n in names), training=True)

    x = F.relu(layer(image, "conv1", "bn1"))
    for name in dict.fromkeys(n.rsplit(".conv", 1)[0] for n in state if ".conv" in n):
        projected = f"{name}.downsample.0.weight" in state
        stride = 2 if projected else 1
        y = F.relu(layer(x, f"{name}.conv1", f"{name}.bn1", stride))
        y = layer(y, f"{name}.conv2", f"{name}.bn2")
        if projected:
            x = layer(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        x = F.relu(x + y)
    logits = F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    return F.cross_entropy(logits, label)


def draw(losses: np.ndarray, network: str, path: Path) -> None:
    """Both curves, and their difference below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('note: the plot needs matplotlib: pip install "graphc-nn[plot]"')
        return
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(losses[1], color="#d62728", linewidth=2.5, alpha=0.6, label="PyTorch")
    above.plot(losses[0], color="#1f77b4", linewidth=1, label="graphc")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.semilogy(np.abs(losses[0] - losses[1]), color="black", linewidth=0.8)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
    figure.suptitle(f"{network}: same initial weights, same batches")
    figure.savefig(path, dpi=150)
    print("written:", path)


if __name__ == "__main__":
    main()
