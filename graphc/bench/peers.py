"""The libraries that are measured: one class each, which builds the step of a piece of work.

Nothing is imported before `load`, which runs in the peer's own process. A step is a function
without arguments: NumPy arrays go in and a NumPy array comes out (inference), or a batch of NumPy
arrays goes in, forward, backward and update run, and the loss comes out (training).
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from graphc.bench.models import INFER, LEARNING_RATE, MODES, MOMENTUM, Work

Step = Callable[[], Any]
# (variant, make): ways to do the same work; the fastest counts.
Candidate = tuple[str, Callable[[], Step]]


class Peer(ABC):
    """A library to measure.

    name, title: for options and for people. distribution: the package whose version is recorded.
    modules: what must be installed. modes: what it can do. keeps: whether it keeps compiled code on
    disk, so that a second start is faster.
    """

    name: str
    title: str
    distribution: str
    modules: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    keeps = False

    def absent(self) -> str:
        """Why the peer cannot be measured here, or ""."""
        missing = [m for m in self.modules if importlib.util.find_spec(m) is None]
        return f"not installed: {', '.join(missing)}" if missing else ""

    def version(self) -> str:
        """The installed version, or "-"."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "-"

    def environment(self, folder: str) -> dict[str, str]:
        """Variables for its process, to be set before it starts. `folder`: for what it keeps."""
        return {}

    @abstractmethod
    def load(self, threads: int) -> None:
        """Import the library and set its threads."""

    @abstractmethod
    def candidates(self, work: Work) -> list[Candidate]:
        """Ways to do the work, the one a user would write first."""


class Graphc(Peer):
    """This compiler."""

    name, title, distribution, modules, keeps = "graphc", "graphc", "graphc-nn", ("numba",), True

    def version(self) -> str:
        import graphc

        return graphc.__version__

    def environment(self, folder: str) -> dict[str, str]:
        return {"GRAPHC_CACHE_DIR": folder}

    def load(self, threads: int) -> None:
        from graphc.compiler import compile as compile_graph

        self.compile = compile_graph

    def candidates(self, work: Work) -> list[Candidate]:
        declared, arrays = work.declared, work.inputs()

        def make() -> Step:
            executable = self.compile(
                declared,
                outputs=[work.output],
                dims=work.dims,
                threads=work.threads,
                **work.training(),
            )
            return lambda: executable(**arrays)[work.output]

        return [("", make)]


class PyTorch(Peer):
    """Eager PyTorch in its better memory format, with its better optimizer implementation."""

    name, title, distribution, modules = "pytorch", "PyTorch", "torch", ("torch",)

    def load(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)

    def candidates(self, work: Work) -> list[Candidate]:
        formats = ["contiguous"]
        if any(n.op == "conv2d" for n in work.graph()):
            formats.append("channels_last")
        if work.mode == INFER:
            return [(f, self._inference(work, f)) for f in formats]
        optimizers = {"": {}, ", fused SGD": {"fused": True}}
        return [
            (f"{f}{o}", self._training(work, f, options))
            for f in formats
            for o, options in optimizers.items()
        ]

    def wrap(self, forward: Callable) -> Callable:
        return forward

    def _tensors(self, work: Work, memory_format: str) -> tuple[Callable, dict, dict]:
        """forward, parameters and states."""
        import torch

        from graphc.bench.translate import TORCH, constants

        graph = work.graph()
        tensors = {}
        for name, array in {**work.weights(), **constants(graph)}.items():
            tensor = torch.from_numpy(np.array(array))
            if memory_format == "channels_last" and tensor.ndim == 4:
                tensor = tensor.to(memory_format=torch.channels_last)
            tensors[name] = tensor
        states = {name: tensors.pop(name) for name in graph.states}
        return self.wrap(TORCH.function(graph)), tensors, states

    def _image(self, array: np.ndarray, memory_format: str) -> Callable:
        """A function that makes the tensor of an image batch, as each call has to."""
        import torch

        if memory_format == "channels_last" and array.ndim == 4:
            return lambda: torch.from_numpy(array).contiguous(memory_format=torch.channels_last)
        return lambda: torch.from_numpy(array)

    def _inference(self, work: Work, memory_format: str) -> Callable[[], Step]:
        def make() -> Step:
            import torch

            forward, p, s = self._tensors(work, memory_format)
            image = self._image(work.inputs()["image"], memory_format)

            @torch.inference_mode()
            def step() -> np.ndarray:
                return forward(p, s, image()).numpy()

            return step

        return make

    def _training(self, work: Work, memory_format: str, options: dict) -> Callable[[], Step]:
        def make() -> Step:
            import torch

            forward, p, s = self._tensors(work, memory_format)
            arrays = work.inputs()
            image = self._image(arrays["image"], memory_format)
            labels = arrays["label"].astype(np.int64)  # what cross_entropy takes
            trained = [p[name].requires_grad_() for name in work.graph().parameters]
            optimizer = torch.optim.SGD(trained, LEARNING_RATE, MOMENTUM, **options)

            def step() -> float:
                optimizer.zero_grad()
                loss = forward(p, s, image(), torch.from_numpy(labels))
                loss.backward()
                optimizer.step()
                return loss.item()

            return step

        return make


class TorchCompile(PyTorch):
    """PyTorch with `torch.compile` (TorchInductor)."""

    name, title, keeps = "torch.compile", "torch.compile", True

    def environment(self, folder: str) -> dict[str, str]:
        return {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}

    def candidates(self, work: Work) -> list[Candidate]:
        # One: compiling takes long, and Inductor chooses layouts itself.
        if work.mode == INFER:
            return [("", self._inference(work, "contiguous"))]
        return [("", self._training(work, "contiguous", {"fused": True}))]

    def wrap(self, forward: Callable) -> Callable:
        import torch

        return torch.compile(forward, dynamic=False)


class Jax(Peer):
    """JAX, the whole step in one `jit`."""

    name, title, distribution, modules, keeps = "jax", "JAX jit", "jax", ("jax", "jaxlib"), True

    def environment(self, folder: str) -> dict[str, str]:
        return {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def load(self, threads: int) -> None:
        # Takes as many threads as the process has cores; `measure` gives it `threads`.
        import jax  # noqa: F401

    def candidates(self, work: Work) -> list[Candidate]:
        return [("", self._inference(work) if work.mode == INFER else self._training(work))]

    def _arrays(self, work: Work) -> tuple[Callable, dict, dict]:
        import jax.numpy as jnp

        from graphc.bench.translate import JAX, constants

        graph = work.graph()
        arrays = {n: jnp.asarray(a) for n, a in {**work.weights(), **constants(graph)}.items()}
        states = {name: arrays.pop(name) for name in graph.states}
        return JAX.function(graph), arrays, states

    def _inference(self, work: Work) -> Callable[[], Step]:
        def make() -> Step:
            import jax

            forward, p, s = self._arrays(work)
            image = work.inputs()["image"]
            compiled = jax.jit(lambda p, s, image: forward(p, dict(s), image))
            return lambda: np.asarray(compiled(p, s, image))

        return make

    def _training(self, work: Work) -> Callable[[], Step]:
        def make() -> Step:
            import jax
            import jax.numpy as jnp

            forward, arrays, states = self._arrays(work)
            names = list(work.graph().parameters)
            fixed = {n: a for n, a in arrays.items() if n not in names}
            inputs = work.inputs()

            def loss_of(p: dict, s: dict, image: Any, label: Any) -> tuple[Any, dict]:
                s = dict(s)  # forward replaces its entries
                return forward({**p, **fixed}, s, image, label), s

            def train(p: dict, v: dict, s: dict, image: Any, label: Any) -> tuple:
                (loss, s), g = jax.value_and_grad(loss_of, has_aux=True)(p, s, image, label)
                v = {n: MOMENTUM * v[n] + g[n] for n in p}
                return loss, {n: p[n] - LEARNING_RATE * v[n] for n in p}, v, s

            compiled = jax.jit(train, donate_argnums=(0, 1, 2))
            p = {n: arrays[n] for n in names}
            held = [p, {n: jnp.zeros_like(a) for n, a in p.items()}, states]

            def step() -> float:
                loss, *held[:] = compiled(*held, inputs["image"], inputs["label"])
                jax.block_until_ready(held)
                return float(loss)

            return step

        return make


class OnnxRuntime(Peer):
    """ONNX Runtime on its CPU provider."""

    name, title, distribution = "onnxruntime", "onnxruntime", "onnxruntime"
    modules, modes = ("onnxruntime", "onnx"), (INFER,)

    def load(self, threads: int) -> None:
        import onnxruntime

        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3

    def candidates(self, work: Work) -> list[Candidate]:
        from graphc.interop.onnx import onnx_model

        model, arrays = onnx_model(work.graph(), work.weights()), work.inputs()

        def make() -> Step:
            import onnxruntime

            session = onnxruntime.InferenceSession(
                model, self.options, providers=["CPUExecutionProvider"]
            )
            return lambda: session.run(None, arrays)[0]

        return [("", make)]


class OpenVino(Peer):
    """OpenVINO on its CPU plugin, in float32."""

    name, title, distribution = "openvino", "OpenVINO", "openvino"
    modules, modes = ("openvino", "onnx"), (INFER,)

    def load(self, threads: int) -> None:
        import openvino

        self.core = openvino.Core()
        self.settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }

    def candidates(self, work: Work) -> list[Candidate]:
        from graphc.interop.onnx import onnx_model

        model, image = onnx_model(work.graph(), work.weights()), work.inputs()["image"]

        def make() -> Step:
            compiled = self.core.compile_model(self.core.read_model(model), "CPU", self.settings)
            request = compiled.create_infer_request()

            def step() -> np.ndarray:
                request.infer({0: image}, share_inputs=True)
                return np.array(request.get_output_tensor(0).data)

            return step

        return [("", make)]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (Graphc(), PyTorch(), TorchCompile(), Jax(), OnnxRuntime(), OpenVino())
}
