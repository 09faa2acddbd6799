"""graphc: a deep-learning compiler in readable Python. Declare a network, compile it, run it."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

from graphc import errors, logs, nn, ops, optim
from graphc.ir import Graph, Layout, TensorType, Value
from graphc.ops import *  # noqa: F403  # ops.__all__ says what
from graphc.serialize import load, save

if _TYPE_CHECKING:
    from graphc import data, train, viz, zoo
    from graphc.compiler import compile, default_pipeline
    from graphc.interop.onnx import export_onnx
    from graphc.interpreter import interpret

# Imported when first used: compiling pulls in the runtime, pictures and data their own libraries.
_LAZY = {
    "compile": "graphc.compiler",
    "default_pipeline": "graphc.compiler",
    "export_onnx": "graphc.interop.onnx",
    "interpret": "graphc.interpreter",
}
_LAZY_MODULES = ("data", "train", "viz", "zoo")

__version__ = "0.1.0"
__all__ = [
    "Graph",
    "Layout",
    "TensorType",
    "Value",
    "compile",
    "data",
    "default_pipeline",
    "errors",
    "export_onnx",
    "interpret",
    "load",
    "nn",
    "optim",
    "save",
    "train",
    "viz",
    "zoo",
    *ops.__all__,
]


logs.configure()


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(_importlib.import_module(_LAZY[name]), name)
    elif name in _LAZY_MODULES:
        value = _importlib.import_module(f"graphc.{name}")
    else:
        raise AttributeError(f"module 'graphc' has no attribute {name!r}")
    globals()[name] = value
    return value
