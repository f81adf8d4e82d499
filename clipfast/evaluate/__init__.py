"""What a CLIP is worth: zero-shot classification, retrieval, and features of whole data sets."""

from clipfast.evaluate.datasets import EvalSet
from clipfast.evaluate.embed import embed
from clipfast.evaluate.features import encode_images, encode_texts
from clipfast.evaluate.retrieval import retrieval, retrieval_source
from clipfast.evaluate.store import read_features
from clipfast.evaluate.suite import Suite, run_suite
from clipfast.evaluate.tasks import Bench
from clipfast.evaluate.zero_shot import (
    TEMPLATES,
    class_likelihoods,
    classify,
    zero_shot,
    zero_shot_source,
    zero_shot_weights,
)  # fmt: skip

__all__ = [
    "Bench", "EvalSet", "Suite", "TEMPLATES", "class_likelihoods", "classify", "embed", "encode_images", "encode_texts",
    "read_features", "retrieval", "retrieval_source", "run_suite", "zero_shot", "zero_shot_source", "zero_shot_weights",
]  # fmt: skip
