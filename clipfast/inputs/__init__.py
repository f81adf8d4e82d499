"""What the towers take: pixels and token ids."""

from clipfast.inputs.hf_tokenizer import HFTokenizer, get_tokenizer
from clipfast.inputs.image import MEAN, STD, Preprocess, read_image
from clipfast.inputs.tokenizer import SimpleTokenizer, tokenize

__all__ = ["MEAN", "STD", "HFTokenizer", "Preprocess", "SimpleTokenizer", "get_tokenizer", "read_image", "tokenize"]
