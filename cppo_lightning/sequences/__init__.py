"""How a minibatch goes through the model: responses behind the prompt that they share, sequences of like length together."""

from cppo_lightning.sequences.cutting import MicroBatch, micro_batches
from cppo_lightning.sequences.reading import Sequences
from cppo_lightning.sequences.work import Work

__all__ = ["MicroBatch", "Sequences", "Work", "micro_batches"]
