"""From a problem to the token ids that the model continues."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from cppo_lightning.errors import ConfigError
from cppo_lightning.verifiers.base import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    autoescape=False, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
)
_OURS = {"add_generation_prompt", "continue_final_message", "conversation", "return_dict", "return_tensors", "tokenize"}


@dataclass(frozen=True)
class PromptTemplate:
    """How a problem is put to the model.

    Args:
        chat: use the tokenizer's chat template; False for Base models, which get the plain text and continue it.
        system: text of a system turn, in place of the problem's own if it has one.
        text: Jinja for the last user turn; ``{{ problem }}`` is that turn as the prompt source gave it.
        chat_template_kwargs: further variables of the tokenizer's chat template, for example ``enable_thinking: false``.

    Raises:
        ConfigError: ``text`` is not valid Jinja, does not use ``problem``, or uses anything else.
    """

    chat: bool = True
    system: str | None = None
    text: str = "{{ problem }}"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            names = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(self.text))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"template.text is not valid Jinja: {error.message} (line {error.lineno}) in {self.text!r}"
            ) from error
        if names != {"problem"}:
            raise ConfigError(
                f"template.text must use the variable 'problem' and no other, uses {sorted(names)}: {self.text!r}"
            )
        if taken := _OURS & set(self.chat_template_kwargs):
            raise ConfigError(f"template.chat_template_kwargs must not set {sorted(taken)}: they are fixed")

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The chat turns, with ``system`` and ``text`` applied.  Raises :class:`ConfigError` if the last is not the user's."""
        turns = [dict(message) for message in problem.messages]
        if not turns or turns[-1]["role"] != "user":
            raise ConfigError(f"problem {problem.id!r} ({problem.source}): the last message must have the role 'user'")
        try:
            turns[-1]["content"] = _compile(self.text).render(problem=turns[-1]["content"])
        except jinja2.TemplateError as error:
            raise ConfigError(f"template.text {self.text!r} cannot be applied to problem {problem.id!r}: {error}") from error
        if self.system is not None:
            turns = [{"role": "system", "content": self.system}, *(turn for turn in turns if turn["role"] != "system")]
        return turns

    def encode(self, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
        """Token ids of the prompt.

        Raises:
            ConfigError: ``chat`` with a tokenizer that has no chat template, or whose template refuses the messages.
        """
        turns = self.messages(problem)
        if self.chat:
            return self._encode_chat(tokenizer, turns, problem)
        ids: list[int] = list(tokenizer("\n\n".join(turn["content"] for turn in turns))["input_ids"])  # pyright: ignore[reportArgumentType]
        # Some tokenizers close every text, and a model does not continue a closed text.
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        return ids

    def _encode_chat(self, tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], problem: Problem) -> list[int]:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"template.chat is true, but the tokenizer of {tokenizer.name_or_path!r} has no chat template (a Base model?): "
                "set template.chat: false"
            )
        try:
            ids = tokenizer.apply_chat_template(
                turns, tokenize=True, add_generation_prompt=True, return_dict=False, **self.chat_template_kwargs
            )
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path!r} refuses problem {problem.id!r} with roles "
                f"{[turn['role'] for turn in turns]}: {error}"
            ) from error
        return list(ids)  # pyright: ignore[reportArgumentType, reportReturnType]


@lru_cache(maxsize=16)
def _compile(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)
