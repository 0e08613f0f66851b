"""An exported folder is the policy of its checkpoint: the same weights, the same greedy answers, wherever it is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cppo_lightning.cli import main
from cppo_lightning.engines.engine import Sampling
from cppo_lightning.engines.transformers_engine import TransformersEngine
from cppo_lightning.errors import ConfigError
from cppo_lightning.export import export
from cppo_lightning.lora import LoRA
from cppo_lightning.model_card import model_card
from cppo_lightning.policy import Policy
from cppo_lightning.policy_config import PolicyConfig
from cppo_lightning.strategies import sharded_checkpoint

PROMPTS = [[258, *b"What is 2 + 3?"], [*b"abc"], [*b"A"], [97] * 30]
TOKENS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """The log folder of a run of one rollout at another temperature than the model's."""
    folder = tmp_path_factory.mktemp("run")
    debug = Path(__file__).parents[1] / "configs" / "debug.yaml"
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": str(folder), "name": "x"}}
    changes: dict[str, Any] = {
        "trainer": {"max_epochs": 1, "enable_checkpointing": True, "logger": logger},
        "model": {"policy": {"path": str(tiny_model_path)}},
        "data": {"sampling": {"temperature": 0.7}},
    }
    (folder / "changes.yaml").write_text(yaml.safe_dump(changes))
    main(["fit", "--config", str(debug), "--config", str(folder / "changes.yaml")])
    return folder / "x" / "version_0"


def checkpoint(run: Path) -> Path:
    return next((run / "checkpoints").glob("*.ckpt"))


def trained(run: Path, model: Path) -> Policy:
    """The trainer's policy, with the checkpoint's weights put in by hand."""
    policy = Policy.load(PolicyConfig(str(model)))
    weights = torch.load(checkpoint(run), weights_only=True)["state_dict"]
    policy.load_state_dict({name.removeprefix("policy."): tensor for name, tensor in weights.items()})
    return policy


@pytest.fixture(scope="module")
def greedy(run: Path, tiny_model_path: Path) -> list[list[int]]:
    """What the trainer's engine answers with the checkpoint's weights."""
    engine = TransformersEngine()
    engine.start(str(tiny_model_path))
    engine.load_weights(trained(run, tiny_model_path).named_weights(), 0)
    answers = engine.generate(PROMPTS, 1, Sampling(max_tokens=TOKENS, temperature=0))
    return [completion.ids.tolist() for completion in answers]


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    main(["export", str(checkpoint(run)), str(folder)])
    return folder


def test_transformers_answers_as_the_trainer_does(exported: Path, greedy: list[list[int]]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(exported)
    assert model.generation_config.temperature == 0.7
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=TOKENS
        )
        assert ids[0, len(prompt) :].tolist() == expected


VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=256, enforce_eager=True, seed=0)
    defaults = llm.get_default_sampling_params()
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]))
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[3])]
    answers = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, sampling)]
    print("\\n" + json.dumps([defaults.temperature, defaults.top_p, defaults.top_k, answers]))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_answers_as_the_trainer_does(exported: Path, greedy: list[list[int]], tmp_path: Path) -> None:
    (tmp_path / "ask.py").write_text(VLLM)
    command = [sys.executable, str(tmp_path / "ask.py"), str(exported), str(TOKENS), json.dumps(PROMPTS)]
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    temperature, top_p, top_k, answers = json.loads(done.stdout.splitlines()[-1])
    assert (temperature, top_p, top_k) == (0.7, 1.0, 0)
    assert answers == greedy


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_folder_is_whole(run: Path, exported: Path, tiny_model_path: Path) -> None:
    expected = dict(trained(run, tiny_model_path).named_weights())
    found = weights(exported)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], tensor) for name, tensor in weights(tiny_model_path).items()), "nothing was learned"
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (exported, tiny_model_path))
    chat = [{"role": "user", "content": "2 + 3 = ?"}]
    assert ours.apply_chat_template(chat, add_generation_prompt=True) == theirs.apply_chat_template(
        chat, add_generation_prompt=True
    )
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.do_sample, generation.top_p, generation.top_k) == (True, 1.0, 0)
    assert ours.eos_token_id in generation.eos_token_id
    assert list(exported.parent.iterdir()) == [exported], "something is left of the writing"


def test_the_card_says_what_was_trained(exported: Path, tiny_model_path: Path) -> None:
    _, header, text = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    assert str(tiny_model_path) not in text
    assert f"`{tiny_model_path.name}`" in text
    assert "`CPPO`" in text
    assert "in 2 optimizer steps" in text
    assert "| rollout/accuracy | 0 | " in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["data"]["plan"]["prompts"] == 4
    assert settings["model"]["trust_region"]["init_args"]["divergence"]["init_args"] == {"k": 20}


def test_the_card_tells_no_folders_and_no_hosts(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    mixed = [{"class_path": "mine.Rows", "init_args": {"path": path}} for path in ("/home/ada/rows.jsonl", "~/more", "org/hub")]
    settings["data"]["prompts"] = {"class_path": "mine.Mixture", "init_args": {"sources": mixed, "operators": ["+", "/"]}}
    servers = {"urls": ["http://10.0.0.7:8000"], "weights_folder": "/shared/ada", "dtype": "bfloat16"}
    settings["data"]["engine"] = {"class_path": "mine.Servers", "init_args": servers}
    text = model_card("name", settings, "float32", 2, {}, {})
    told = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["data"]
    assert [source["init_args"]["path"] for source in told["prompts"]["init_args"]["sources"]] == [
        "rows.jsonl",
        "more",
        "org/hub",
    ]
    assert told["prompts"]["init_args"]["operators"] == ["+", "/"]
    assert told["engine"] == {"class_path": "mine.Servers", "init_args": {"dtype": "bfloat16"}}


def test_another_dtype(run: Path, exported: Path, tmp_path: Path) -> None:
    export(checkpoint(run), tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    found = weights(tmp_path / "half")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in weights(exported).items())


def test_the_trained_dtype_is_that_of_the_runs_precision(run: Path, exported: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["trainer"]["precision"] = "bf16-true"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    saved = torch.load(checkpoint(run), weights_only=True)
    saved["state_dict"] = {name: tensor.bfloat16() for name, tensor in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "half.ckpt")
    export(tmp_path / "half.ckpt", tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "The weights are in bfloat16." in (tmp_path / "half" / "README.md").read_text()
    found = weights(tmp_path / "half")
    for name, tensor in weights(exported).items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor.bfloat16())


def test_attention_that_needs_a_gpu_is_not_needed(run: Path, exported: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["policy"]["attn_implementation"] = "flash_attention_2"
    (tmp_path / "flash.yaml").write_text(yaml.safe_dump(settings))
    export(checkpoint(run), tmp_path / "out", tmp_path / "flash.yaml")
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(exported).items())
    config = (tmp_path / "out" / "config.json").read_text()
    assert config == (exported / "config.json").read_text()
    assert "attn_implementation" not in config, "whoever loads it chooses"


def test_a_folder_that_is_there_stays_unless_told(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(SystemExit) as end:
        main(["export", str(checkpoint(run)), str(folder)])
    assert end.value.code == 2
    assert "mine' is there already; give another name, or --overwrite" in capsys.readouterr().err
    assert (folder / "thesis.tex").exists()
    main(["export", str(checkpoint(run)), str(folder), "--overwrite"])
    assert not (folder / "thesis.tex").exists()
    assert {file.name for file in folder.iterdir()} == {file.name for file in exported.iterdir()}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failed_export_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").touch()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cppo_lightning.export.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        export(checkpoint(run), folder, overwrite=True)
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_does_not_belong_together_is_refused(run: Path, tmp_path: Path, smollm2_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml beside it"):
        export(tmp_path / "lost.ckpt", tmp_path / "out")
    (tmp_path / "broken.yaml").write_text("model: {policy: tiny}")
    with pytest.raises(ConfigError, match=r"should be the config\.yaml of a fit"):
        export(checkpoint(run), tmp_path / "out", tmp_path / "broken.yaml")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["policy"]["path"] = str(smollm2_path)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match="is of another model than the configuration's"):
        export(checkpoint(run), tmp_path / "out", tmp_path / "other.yaml")
    settings["model"]["policy"]["path"] = "/nowhere"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(
        ConfigError, match=r"other\.yaml': model\.policy: model\.policy\.path '/nowhere' does not exist; it should"
    ):
        export(checkpoint(run), tmp_path / "out", tmp_path / "other.yaml")
    assert not (tmp_path / "out").exists()


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("boom",)


@pytest.mark.parametrize("sharded", [False, True])
def test_no_code_in_a_checkpoint_is_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile" / "meta.pt" if sharded else tmp_path / "hostile.ckpt"
    hostile.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2", "global_step": Bomb()}, hostile)
    with pytest.raises(ConfigError, match="holds more than tensors and plain values"):
        export(hostile.parent if sharded else hostile, tmp_path / "out", run / "config.yaml")
    assert not (tmp_path / "boom").exists()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def moved(config: PolicyConfig) -> Policy:
    """A policy all of whose trained weights are others than the folder's."""
    policy, generator = Policy.load(config), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 50)
    return policy


def run_file(run: Path, place: Path, lora: dict[str, Any] | None = None) -> Path:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["policy"]["lora"] = lora
    place.write_text(yaml.safe_dump(settings))
    return place


def saved(policy: Policy) -> dict[str, Any]:
    state = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    return {"state_dict": state, "optimizer_states": [], "pytorch-lightning_version": "2.6", "global_step": 7}


@pytest.mark.parametrize("lora", [None, LoRA(rank=3, targets=["q_proj", "down_proj"])], ids=["all weights", "LoRA"])
def test_a_sharded_checkpoint(lora: LoRA | None, run: Path, tiny_model_path: Path, tmp_path: Path, group: None) -> None:
    policy = moved(PolicyConfig(str(tiny_model_path), lora=lora))
    expected = {name: tensor.clone() for name, tensor in policy.named_weights()}
    for layer in policy.model.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    sharded_checkpoint.save(saved(policy), tmp_path / "step=7.ckpt", policy)
    config = run_file(run, tmp_path / "config.yaml", None if lora is None else vars(lora))
    export(tmp_path / "step=7.ckpt", tmp_path / "out", config)
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys() == weights(tiny_model_path).keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    if lora is None:  # of a kill while another took its name
        (tmp_path / "step=7.ckpt").rename(tmp_path / ".step=7.ckpt.old")
        export(tmp_path / "step=7.ckpt", tmp_path / "again", config)
        assert all(torch.equal(tensor, found[name]) for name, tensor in weights(tmp_path / "again").items())


def test_adapters_are_merged(run: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    """Exported logits against those of the model with its adapters beside the weights: 1e-5, the order of float32 sums."""
    lora = LoRA(rank=3, targets=["q_proj", "down_proj"])
    policy = moved(PolicyConfig(str(tiny_model_path), lora=lora))
    torch.save(saved(policy), tmp_path / "lora.ckpt")
    export(tmp_path / "lora.ckpt", tmp_path / "out", run_file(run, tmp_path / "config.yaml", vars(lora)))
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected, plain = (
            model(input_ids=ids).logits for model in (policy.model, AutoModelForCausalLM.from_pretrained(tiny_model_path))
        )
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2
