"""What the towers take: pixels and token ids."""

from clipfast.inputs.hf_tokenizer import HFTokenizer, get_tokenizer, in_folder
from clipfast.inputs.image import MEAN, STD, Preprocess, read_image
from clipfast.inputs.tokenizer import SimpleTokenizer, tokenize

__all__ = [
    "MEAN",
    "STD",
    "HFTokenizer",
    "Preprocess",
    "SimpleTokenizer",
    "get_tokenizer",
    "in_folder",
    "read_image",
    "tokenize",
]
