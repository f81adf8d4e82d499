"""Training: a config, the recipe of the paper, and runs that resume bit for bit on any number of ranks."""

from clipfast.train.config import TrainConfig, paper, sizes
from clipfast.train.loop import Batches, Trained, new_model, train

__all__ = ["Batches", "TrainConfig", "Trained", "new_model", "paper", "sizes", "train"]
