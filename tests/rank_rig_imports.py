"""What the server of tests/rank_rig.py imports before it forks."""

import lightning.pytorch  # noqa: F401
import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import cppo_lightning.callbacks
import cppo_lightning.module  # noqa: F401

torch.set_num_threads(1)  # a thread pool would not survive the fork
