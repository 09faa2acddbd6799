"""Graphs in the formats of other libraries."""

from graphc.interop.onnx import export_onnx

__all__ = ["export_onnx"]
