"""A small model that has learnt chains of operations from traces with mistakes in them, ready to be trained on its end results.

    python -m cppo_lightning.chain_model --config configs/chain/pretrain_16.yaml

It becomes an ordinary Hugging Face folder (float32 weights and a tokenizer of 32 characters, no chat template).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional

from cppo_lightning.engines import Sampling, TransformersEngine
from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts import ChainPrompts
from cppo_lightning.prompts.chain_prompts import running_values
from cppo_lightning.small_models import is_complete, written_at_once
from cppo_lightning.verifiers import ChainVerifier, Outcome

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# The letters are never used: they make the vocabulary larger than the 20 tokens that a Top-K divergence reads.
_CHARACTERS = "0123456789+-*=,abcdefghijklm"
_PAD, _BOS, _EOS, _UNK = _SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_IGNORED = -100  # cross_entropy's label of what is not learnt


@dataclass(frozen=True)
class Pretraining:
    """Next-token prediction of chains' running values, in which some are a random digit that the chain then follows.

    The weights are a function of the settings, on one kind of CPU.

    Args:
        folder: where the model is written.
        operations: in each chain.
        slip: share of the values in the steps after ``clean_steps`` that are drawn from all ten digits instead of computed.
        steps: optimizer steps.
        batch: chains in a step, each seen once.
        learning_rate: highest of a cycle that rises over the first tenth of the steps and falls over the rest.
        clean_steps: the first steps, which see no slips; None: half of all.  Arithmetic is learnt several times as fast from
            values that are right.
        short: operations that are left of the chains in the clean steps; None: all.  Their answers are at the positions that
            they have behind a whole chain, so that an operation's distance is learnt among few tokens.
        seed: of the weights, the chains and the slips.
        threads: of torch while it trains; another number sums in another order.

    Raises:
        ConfigError: a value outside its range.
    """

    folder: str
    operations: int
    slip: float
    steps: int
    batch: int = 8
    learning_rate: float = 2e-3
    clean_steps: int | None = None
    short: int | None = None
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("operations", "steps", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Pretraining.{name} must be at least 1, got {getattr(self, name)}")
        if self.short is not None and not 1 <= self.short <= self.operations:
            raise ConfigError(f"Pretraining.short must be from 1 to operations = {self.operations}, got {self.short}")
        if self.clean_steps is not None and not 0 <= self.clean_steps <= self.steps:
            raise ConfigError(f"Pretraining.clean_steps must be from 0 to steps = {self.steps}, got {self.clean_steps}")
        if not 0 <= self.slip < 1:
            raise ConfigError(f"Pretraining.slip must be in [0, 1), got {self.slip}")
        if self.learning_rate <= 0:
            raise ConfigError(f"Pretraining.learning_rate must be above 0, got {self.learning_rate}")

    def traces(self) -> Iterator[tuple[str, str]]:
        """``steps * batch`` chains of those that are not held out, each with its values, slips included."""
        generator = random.Random(self.seed)

        def slip(value: int) -> int:
            return generator.randrange(10) if generator.random() < self.slip else value

        chains = ChainPrompts(self.operations, self.steps * self.batch, self.seed).chains()
        clean = self.steps // 2 if self.clean_steps is None else self.clean_steps
        for number, chain in enumerate(chains):
            if number >= clean * self.batch:
                yield chain, running_values(chain, slip)
            else:
                begun = _beginning(chain, self.short or self.operations)
                yield begun, running_values(begun)

    def run(self, progress_bar: bool = False) -> Path:
        """Train and write the model; one that is there already is left alone.

        Raises:
            ConfigError: ``folder`` holds something else.
        """
        folder = Path(self.folder)
        if is_complete(folder):
            return folder
        with written_at_once(folder) as new, torch.random.fork_rng(devices=[]), _threads(self.threads):
            torch.manual_seed(self.seed)
            tokenizer = chain_tokenizer()
            module = _NextToken(chain_model(tokenizer, self.operations), self)
            trainer = Trainer(
                accelerator="cpu",
                max_steps=self.steps,
                gradient_clip_val=1.0,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=progress_bar,
            )
            trainer.fit(module, _Batches(self, tokenizer))
            module.model.save_pretrained(new)
            tokenizer.save_pretrained(new)
        return folder


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of a chain and its answer, four special ones, and letters: 32."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=_UNK))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_UNK,
        clean_up_tokenization_spaces=False,
    )


def chain_model(tokenizer: PreTrainedTokenizerFast, operations: int) -> LlamaForCausalLM:
    """A random Llama of 3 layers, 128 wide, for chains of up to ``operations`` operations and their answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=4 * operations + 4,
        # a value finds its operation by their distance, which angles that turn slowly do not tell from its neighbours
        rope_parameters={"rope_type": "default", "rope_theta": 40.0},
        initializer_range=128**-0.5,  # at the usual 0.02 a model this narrow takes three times as many steps
        tie_word_embeddings=False,
        bos_token_id=ids[_BOS],
        eos_token_id=ids[_EOS],
        pad_token_id=ids[_PAD],
    )
    return LlamaForCausalLM(config).float()


def accuracy(folder: Path, operations: int, problems: int = 512, seed: int = 0) -> float:
    """Share of held-out chains that a model solves with one sample each at temperature 1."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    asked = ChainPrompts(operations, problems, seed, split="heldout").load()
    engine = TransformersEngine(device="cpu", max_sequences=256)
    engine.start(str(folder))
    prompts = [tokenizer(problem.messages[0]["content"])["input_ids"] for problem in asked]
    completions = engine.generate(prompts, 1, Sampling(max_tokens=2 * operations), seed=seed)
    texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
    verdicts = [ChainVerifier()(problem, text) for problem, text in zip(asked, texts, strict=True)]
    return sum(verdict.outcome is Outcome.CORRECT for verdict in verdicts) / len(verdicts)


def _beginning(chain: str, operations: int) -> str:
    """The chain with no more than its first ``operations`` operations, as it is asked."""
    formula, _, answer = chain.partition("=")
    return f"{formula[: 1 + 2 * operations]}={answer}"


class _Batches:
    """Token ids, labels and positions of each step; the answer and what ends it are learnt.

    All are ``[batch, 4 * k + 4]`` for chains of k operations; positions from ``=`` on are those of ``operations`` of them.
    """

    def __init__(self, settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> None:
        self.settings = settings
        self.ids: dict[str, int] = tokenizer.get_vocab()

    def __len__(self) -> int:
        return self.settings.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        traces = self.settings.traces()
        for _ in range(len(self)):
            rows = [next(traces) for _ in range(self.settings.batch)]
            ids = torch.tensor([[*map(self.ids.__getitem__, chain + values), self.ids[_EOS]] for chain, values in rows])
            labels = ids.clone()
            asked, _ = rows[0]
            labels[:, : len(asked)] = _IGNORED
            positions = torch.arange(ids.shape[1])
            answer = asked.index("=")
            positions[answer:] += 2 * self.settings.operations + 1 - answer
            yield ids, labels, positions.expand_as(ids)


def _loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy, nats per token, of :class:`_Batches`' tokens."""
    # without a mask transformers takes a gap in the positions for the end of one sequence and the start of another
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)


class _NextToken(LightningModule):
    def __init__(self, model: LlamaForCausalLM, settings: Pretraining) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = _loss(self.model, *batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        rate, steps = self.settings.learning_rate, self.settings.steps
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> int:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m cppo_lightning.chain_model", description=Pretraining.__doc__)
    parser.add_argument("--config", action="config", help="YAML with the settings")
    parser.add_class_arguments(Pretraining)
    given = parser.parse_args(arguments).as_dict()
    del given["config"]
    try:
        settings = Pretraining(**given)
        folder = settings.run(progress_bar=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    solved = accuracy(folder, settings.operations)
    print(f"{folder}: solves {solved:.3f} of 512 held-out chains of {settings.operations} operations at temperature 1")
    return 0


if __name__ == "__main__":
    sys.exit(main())
