"""Weights: read from every layout, written to every layout."""

from clipfast.weights.export import LAYOUTS, export
from clipfast.weights.load import (
    available_models,
    beyond_shapes,
    build_model,
    convert,
    convert_weights,
    from_tensors,
    load,
)  # fmt: skip
from clipfast.weights.tokenizer import get_tokenizer

__all__ = [
    "LAYOUTS", "available_models", "beyond_shapes", "build_model", "convert", "convert_weights", "export", "from_tensors",
    "get_tokenizer", "load",
]  # fmt: skip
