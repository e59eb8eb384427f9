"""Conversations as token ids, and which of them the assistant says. Not for prompts without a chat template.

The template that trains is TRL's where it knows the tokenizer's own, else the tokenizer's. Where a template does not
mark what the assistant says, that is told by rendering the conversation up to and including each of its turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from apt_trainer.errors import UserError

Message = dict[str, Any]
ASSISTANT = "assistant"
_ROLES = {"human": "user", "gpt": ASSISTANT}  # names in the ShareGPT format


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations; ``marked``: the template says itself which tokens are the assistant's."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    marked: bool

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """(token ids, 1 for each token of the assistant and 0 for others).

        Raises:
            UserError: where the template refuses the conversation, or hides where its turns are.
        """
        with _refusing(messages):
            if self.marked:
                rendered = self._render(messages, return_assistant_tokens_mask=True)
                return rendered["input_ids"], rendered["assistant_masks"]
            ids = self._render(messages)["input_ids"]
            return ids, self._told_by_prefixes(messages, ids)

    def open_turn(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of ``messages`` up to where the assistant begins to answer."""
        with _refusing(messages):
            return self._render(messages, add_generation_prompt=True)["input_ids"]  # type: ignore[no-any-return]

    def _told_by_prefixes(self, messages: Sequence[Message], ids: list[int]) -> list[int]:
        from trl.data_utils import common_prefix_length

        mask = [0] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:turn], add_generation_prompt=True)["input_ids"]
            through = self._render(messages[: turn + 1])["input_ids"]
            if common_prefix_length(through, ids) < len(through):
                raise UserError(
                    "The chat template of the tokenizer renders a turn differently once others follow, so that the "
                    "assistant's tokens cannot be told. Set completion_only_loss: false, or give the tokenizer a "
                    "template with {% generation %} around what the assistant says."
                )
            start, end = common_prefix_length(before, ids), len(through)
            eos = self.tokenizer.eos_token_id
            if eos in ids[start:end]:  # what a template puts behind the end of a turn is not for the model to say
                end = end - ids[start:end][::-1].index(eos)
            mask[start:end] = [1] * (end - start)
        return mask

    def _render(self, messages: Sequence[Message], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=True, return_dict=True, **options
        )


@contextmanager
def _refusing(messages: Sequence[Message]) -> Iterator[None]:
    """Context in which a template that refuses ``messages`` is told of."""
    try:
        yield
    except TemplateError as error:
        raise UserError(
            f"The chat template of the tokenizer refuses a conversation: {error}. It begins with "
            f"{str(messages[0])!r:.80}. Correct or remove such rows."
        ) from error


def chat_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template to train with; raises :class:`UserError` where the tokenizer has none."""
    own = own_template(tokenizer)
    from trl.chat_template_utils import get_training_chat_template

    try:
        return ChatTemplate(tokenizer, get_training_chat_template(tokenizer), marked=tokenizer.is_fast)
    except (ValueError, TemplateError):  # a template that TRL does not know
        return own


def own_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template of ``tokenizer`` as it is; raises :class:`UserError` where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "The tokenizer has no chat template, which messages and use_chat_template need. Use an instruction-tuned "
            "model's tokenizer (tokenizer_name_or_path), or prompt and completion columns without a chat template."
        )
    return ChatTemplate(tokenizer, None, marked=False)


def clean_messages(messages: Iterable[Message]) -> list[Message]:
    """Messages with "role" and "content", also from {"from", "value"}; keys that are null are left out."""
    from trl.data_utils import maybe_convert_to_chatml

    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    converted = maybe_convert_to_chatml({"messages": kept})["messages"]
    return [message | {"role": _ROLES.get(message.get("role"), message.get("role"))} for message in converted]


def unanswered(messages: Sequence[Message]) -> list[Message]:
    """``messages`` without the turns of the assistant at their end."""
    kept = list(messages)
    while kept and kept[-1].get("role") == ASSISTANT:
        kept.pop()
    return kept


def check_conversation(messages: Sequence[Message], where: str) -> None:
    """Raise :class:`UserError` unless every message has a role and a content, and the assistant answers somebody."""
    for message in messages:
        if not message.get("role") or ("content" not in message and "tool_calls" not in message):
            raise UserError(f"{where} has the message {str(message)!r:.80}. Each needs a role and a content.")
    roles = [message["role"] for message in messages]
    if ASSISTANT not in roles:
        raise UserError(f"{where} has no turn of the assistant, so there is nothing to learn. Remove such rows.")
    if roles[0] == ASSISTANT:
        raise UserError(f"{where} starts with the assistant. A conversation starts with the user or a system message.")
    if not all(str(message.get("content", "x")).strip() for message in messages if message["role"] == ASSISTANT):
        raise UserError(f"{where} has a turn of the assistant without text. Fill or remove it.")
