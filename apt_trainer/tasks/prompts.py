"""Which columns make up a prompt and a completion, and the text they make. Not for tokens.

Three forms: conversations; a template with columns in braces; or prompt, input and completion one after the other.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import PART_NAMES, check_column, is_text, require_column

MESSAGES = ("messages", "conversations")


@dataclass(frozen=True)
class Template:
    """Text around columns: ``literals[i]`` stands before ``columns[i]``, the last one at the end."""

    literals: tuple[str, ...]
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, setting: str) -> Template:
        """Raises :class:`UserError` for braces that name no column."""
        literals, columns = [], []
        rest = ""
        try:
            for literal, column, form, conversion in string.Formatter().parse(text):
                rest += literal
                if column is None:
                    continue
                if not column or form or conversion:
                    raise ValueError("braces hold the name of a column and nothing else")
                literals.append(rest)
                columns.append(column)
                rest = ""
        except ValueError as error:
            raise UserError(
                f"{setting}={text!r} cannot be read: {error}. Write columns as {{column}}, braces as {{{{ and }}}}."
            ) from error
        return cls((*literals, rest), tuple(columns))

    def render(self, row: Mapping[str, str], completion: str) -> tuple[str, str]:
        """(prompt, completion): what stands before the column ``completion``, and that column and all after it."""
        parts = [literal + row[column] for literal, column in zip(self.literals, self.columns, strict=False)]
        number = self.columns.index(completion)
        return (
            "".join([*parts[:number], self.literals[number]]),
            "".join([row[completion], *parts[number + 1 :], self.literals[-1]]),
        )


@dataclass(frozen=True)
class PromptColumns:
    """Columns of one form: ``messages`` alone, or ``completion`` and either ``template`` or ``prompt``."""

    messages: str | None = None
    prompt: str | None = None
    input: str | None = None
    completion: str = ""
    template: Template | None = None
    template_without_input: Template | None = None

    @property
    def names(self) -> list[str]:
        if self.messages is not None:
            return [self.messages]
        of_template = () if self.template is None else self.template.columns
        return list(dict.fromkeys(c for c in (self.prompt, self.input, *of_template, self.completion) if c))

    def texts(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """(prompt, completion) of a row; joined they are the whole text."""
        cells = {name: row[name] or "" for name in self.names}
        has_input = self.input is not None and cells[self.input].strip() != ""
        if self.template is not None:
            bare = self.template_without_input is not None and not has_input
            template = self.template_without_input if bare else self.template
            assert template is not None
            return template.render(cells, self.completion)
        assert self.prompt is not None
        prompt = cells[self.prompt]
        if has_input:
            prompt = _joined(prompt, cells[str(self.input)])
        joint = _joined(prompt, cells[self.completion])
        return joint[: len(joint) - len(cells[self.completion])], cells[self.completion]


def _joined(first: str, second: str) -> str:
    parted = first[-1:].isspace() or second[:1].isspace()
    return first + ("" if parted else "\n") + second


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> PromptColumns:
    """Choose the form by the settings, then by the columns; check the columns of every part."""
    train = parts["train"]
    of_prompts = [
        name for name in ("prompt_column", "input_column", "completion_column", "template") if getattr(data, name)
    ]
    messages = data.messages_column
    if messages is None and not of_prompts:
        messages = next((name for name in MESSAGES if name in train.column_names), None)
    if messages is not None:
        return _of_messages(parts, messages, of_prompts)
    columns = columns_of_prompts(data)
    for part, rows in parts.items():
        for name in columns.names:
            setting = _setting_of(name, columns)
            if name == columns.input:
                require_column(rows, name, setting, part)
            else:
                check_column(rows, name, setting, part, is_text, "text")
    return columns


def _of_messages(parts: dict[str, Dataset], messages: str, of_prompts: list[str]) -> PromptColumns:
    if of_prompts:
        raise UserError(
            f"messages_column={messages!r} and {of_prompts[0]} were given. A row is either a conversation, or a "
            "prompt and a completion: remove one of them."
        )
    for part, rows in parts.items():
        kind = "a list of messages, each with role and content"
        check_column(rows, messages, "messages_column", part, is_conversation, kind)
    return PromptColumns(messages=messages)


def is_conversation(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return isinstance(inner, dict) and ({"role", "content"} <= set(inner) or {"from", "value"} <= set(inner))


def columns_of_prompts(data: DataSettings) -> PromptColumns:
    """Those that the settings name, or the usual ones; raises :class:`UserError` for settings that do not fit."""
    if data.template is None:
        if data.template_without_input is not None:
            raise UserError("template_without_input is set, but template is not. Set both, or none of them.")
        return PromptColumns(
            prompt=data.prompt_column or "prompt",
            input=data.input_column,
            completion=data.completion_column or "completion",
        )
    template = Template.parse(data.template, "template")
    if not template.columns:
        raise UserError(
            f"template={data.template!r} names no column. Write columns in braces, as in 'Q: {{q}} A: {{a}}'."
        )
    completion = data.completion_column or template.columns[-1]
    bare = data.template_without_input
    if bare is not None and data.input_column is None:
        raise UserError("template_without_input is set, but input_column is not: say which column may be empty.")
    without = None if bare is None else Template.parse(bare, "template_without_input")
    columns = PromptColumns(
        input=data.input_column, completion=completion, template=template, template_without_input=without
    )
    for setting, parsed in (("template", template), ("template_without_input", without)):
        if parsed is not None and completion not in parsed.columns:
            raise UserError(
                f"{setting} does not name the completion column {completion!r}. It names: {', '.join(parsed.columns)}."
            )
        stray = [] if parsed is None else [name for name in parsed.columns if name not in columns.names]
        if stray:
            raise UserError(f"{setting} names the column {stray[0]!r}, which template does not.")
    if data.prompt_column is not None and data.prompt_column not in template.columns:
        raise UserError(f"prompt_column={data.prompt_column!r} is not used by the template. Remove one of them.")
    return columns


def _setting_of(name: str, columns: PromptColumns) -> str:
    if columns.template is not None and name in columns.template.columns:
        return "template"
    named = {columns.prompt: "prompt_column", columns.input: "input_column", columns.completion: "completion_column"}
    return named[name]


def describe(part: str, row: int) -> str:
    return f"Row {row} (counted from 0, of those used) of the {PART_NAMES[part]} data"
