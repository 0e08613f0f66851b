"""Prompt templates: the exact tokens that the model sees."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cppo_lightning.errors import ConfigError
from cppo_lightning.prompts import PromptTemplate
from cppo_lightning.verifiers import Problem


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, and <s>, </s>."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<s>": 256, "</s>": 257}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=chat_template)


CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}{% if quick is defined %}quick={{ quick }}{% endif %}"
)
ASKED = Problem("p", ({"role": "system", "content": "Old."}, {"role": "user", "content": "What is {{ 1 + 1 }}?"}), "2", "here")


def test_chat_template_gives_exact_tokens() -> None:
    """The problem's own braces stay text; the system turn is replaced; the user turn is dressed."""
    tokenizer = byte_tokenizer(CHAT)
    template = PromptTemplate(system="New.", text="{{ problem }} Only\nthe number.\n", chat_template_kwargs={"quick": "yes"})
    ids = template.encode(tokenizer, ASKED)
    assert tokenizer.decode(ids) == (
        "<s>system\nNew.</s><s>user\nWhat is {{ 1 + 1 }}? Only\nthe number.\n</s><s>assistant\nquick=yes"
    )
    assert isinstance(ids, list)
    assert all(type(i) is int for i in ids)
    kept = tokenizer.decode(PromptTemplate().encode(tokenizer, ASKED))
    assert kept == "<s>system\nOld.</s><s>user\nWhat is {{ 1 + 1 }}?</s><s>assistant\n"


def test_plain_prompt_for_base_models() -> None:
    tokenizer = byte_tokenizer()
    plain = PromptTemplate(chat=False, text="Question: {{ problem }}\nAnswer:")
    assert tokenizer.decode(plain.encode(tokenizer, ASKED)) == "Old.\n\nQuestion: What is {{ 1 + 1 }}?\nAnswer:"


HOSTILE = "{% for i in range(9) %}x{% endfor %} {{ 7 * 7 }} {# gone #} {{ problem.__class__ }}"


@pytest.mark.parametrize("chat", [True, False])
def test_the_jinja_of_a_problem_is_never_rendered(chat: bool) -> None:
    """Nor that of a system text: both reach the model letter for letter."""
    problem = Problem("p", ({"role": "user", "content": HOSTILE},), "2")
    tokenizer = byte_tokenizer(CHAT if chat else None)
    template = PromptTemplate(chat=chat, system="Be {{ brief }}.", text="Q: {{ problem }}")
    assert template.messages(problem) == [
        {"role": "system", "content": "Be {{ brief }}."},
        {"role": "user", "content": f"Q: {HOSTILE}"},
    ]
    expected = f"<s>system\nBe {{{{ brief }}}}.</s><s>user\nQ: {HOSTILE}</s><s>assistant\n"
    assert tokenizer.decode(template.encode(tokenizer, problem)) == (
        expected if chat else f"Be {{{{ brief }}}}.\n\nQ: {HOSTILE}"
    )


def test_a_system_turn_comes_once_and_first() -> None:
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "1 + 1?"})
    few_shot = Problem("p", ({"role": "system", "content": "Old."}, *turns), "2")
    roles = ["system", "user", "assistant", "user"]
    for problem in (few_shot, Problem("p", turns, "2")):
        written = PromptTemplate(system="New.", text="{{ problem }} Now.").messages(problem)
        assert [turn["role"] for turn in written] == roles
        assert [turn["content"] for turn in written] == ["New.", "Hi", "Yes?", "1 + 1? Now."]
    assert few_shot.messages[-1]["content"] == "1 + 1?", "the problem itself is left alone"


def test_a_closing_token_is_taken_off_a_plain_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    ids = PromptTemplate(chat=False).encode(tokenizer, Problem("p", ({"role": "user", "content": "Hi"},), "2"))
    assert tokenizer.decode(ids) == "<s>Hi"


def test_chat_of_the_small_model(tiny_model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    problem = Problem("p", ({"role": "user", "content": "What is 1 + 1?"},), "2")
    ids = PromptTemplate().encode(tokenizer, problem)
    written = tokenizer.apply_chat_template(list(problem.messages), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids) == written
    assert "What is 1 + 1?" in written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "{{ problem"}, "not valid Jinja"),
        ({"text": "no variable"}, "must use the variable 'problem' and no other, uses \\[\\]"),
        ({"text": "{{ problem }} {{ answer }}"}, "uses \\['answer', 'problem'\\]"),
        ({"chat_template_kwargs": {"tokenize": False}}, "must not set \\['tokenize'\\]"),
    ],
)
def test_bad_templates(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(**settings)


def test_templates_that_do_not_fit_the_tokenizer_or_problem() -> None:
    with pytest.raises(ConfigError, match=r"has no chat template.*set template.chat: false"):
        PromptTemplate().encode(byte_tokenizer(), ASKED)
    strict = byte_tokenizer("{{ raise_exception('no system turn, please') }}")
    with pytest.raises(ConfigError, match=r"refuses problem 'p' with roles \['system', 'user'\]: no system turn, please"):
        PromptTemplate().encode(strict, ASKED)
    with pytest.raises(ConfigError, match="last message must have the role 'user'"):
        PromptTemplate().encode(byte_tokenizer(CHAT), Problem("p", ({"role": "assistant", "content": "x"},), "2"))


@pytest.mark.parametrize("attack", ["{{ problem.__class__.__mro__ }}", "{{ problem.__init__.__globals__ }}"])
def test_templates_are_sandboxed(attack: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be applied to problem 'p'.*unsafe"):
        PromptTemplate(text=attack).encode(byte_tokenizer(CHAT), ASKED)
