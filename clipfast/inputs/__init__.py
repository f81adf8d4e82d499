"""What the towers take: pixels and token ids."""

from clipfast.inputs.image import MEAN, STD, Preprocess, read_image
from clipfast.inputs.tokenizer import SimpleTokenizer, tokenize

__all__ = ["MEAN", "STD", "Preprocess", "SimpleTokenizer", "read_image", "tokenize"]
