"""TRL's GRPOTrainer on the problems of ``vs_trl.py``, which runs this file with an interpreter that has TRL.

It imports nothing of this project.  Seconds of each rollout are printed as one line of JSON, and the model is saved.

Set so that it is as fast as these settings get on a CPU: a whole update in one pass, no gradient checkpointing, nothing logged,
and TRL's defaults for attention (sdpa), optimizer (fused AdamW), log-probabilities (in chunks) and the loss (token mean), which
are the faster ones.  A static cache generated no faster (16.3 s of CPU time a rollout, 15.5 s with the default).  The second
update needs the log-probabilities of the policy that sampled, for which TRL reads the rollout once more.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]


def is_right(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """1 if the last integer of a completion is the answer."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(re.findall(r"-?\d+", text)[-1:] == [right]) for text, right in zip(texts, answer, strict=True)]


class Clock(TrainerCallback):
    """Notes when each rollout's last update is done."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step % self.updates == 0:
            self.times.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=Path)
    settings = json.loads(parser.parse_args().settings.read_text())
    updates, samples, prompts = settings["updates"], settings["samples"], settings["prompts"]
    config = GRPOConfig(
        output_dir=settings["output"],
        use_cpu=True,
        bf16=False,
        learning_rate=settings["lr"],
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_steps=settings["rollouts"] * updates,
        per_device_train_batch_size=prompts * samples // updates,
        generation_batch_size=prompts * samples,
        num_generations=samples,
        max_completion_length=settings["max_tokens"],
        temperature=1.0,
        beta=0.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        seed=1,
    )
    clock = Clock(updates)
    data = Dataset.from_list([{"prompt": row["messages"], "answer": row["answer"]} for row in settings["problems"]])
    trainer = GRPOTrainer(settings["model"], reward_funcs=is_right, args=config, train_dataset=data, callbacks=[clock])
    trainer.train()
    trainer.save_model(settings["output"])
    print(json.dumps([after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]))


if __name__ == "__main__":
    main()
