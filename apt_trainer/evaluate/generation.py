"""Texts that a model writes: greedy continuations of prompts, and answers in a conversation, word by word.

Not for how prompts become tokens (``tasks``), nor for speed (``measure.generation``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from apt_trainer.errors import UserError
from apt_trainer.models.labels import HEADS, has_head
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.packages import check_packages
from apt_trainer.store.pretrained import choose_device, load_saved, load_tokenizer, max_positions, read_config
from apt_trainer.tasks.architecture import DECODER, architecture_of
from apt_trainer.tasks.chat import own_template

_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


class Generator:
    """``model`` on its device, with its ``tokenizer``; writes at most ``max_new_tokens`` tokens.

    ``temperature``: 0 takes the likeliest token each time; more draws tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float = 0.0) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        settings = copy.deepcopy(model.generation_config)
        if temperature == 0:
            for name in _OF_SAMPLING:
                setattr(settings, name, None)
        else:
            settings.temperature = temperature
        settings.do_sample = temperature > 0
        settings.max_length = None
        settings.pad_token_id = self._padding
        self._settings = settings

    def no_room(self, ids: Sequence[int]) -> str | None:
        """Why nothing can follow the prompt ``ids``, or None."""
        limit = self._limit
        if limit is None or len(ids) < limit:
            return None
        return f"A text of {len(ids):,} tokens leaves no room within the {limit:,} positions of the model. Shorten it."

    def write(self, prompts: Sequence[Sequence[int]], streamer: Any = None) -> list[str]:
        """What follows each of ``prompts``, token ids, whatever the others are; raises :class:`UserError` for one that
        leaves no room within the positions of the model."""
        refused = next(filter(None, map(self.no_room, prompts)), None)
        if refused is not None:
            raise UserError(refused)
        room = [self.max_new_tokens if self._limit is None else self._limit - len(ids) for ids in prompts]
        # one that leaves less room than is asked for is written alone, so that it does not shorten the others
        together = [row for row, left in enumerate(room) if left >= self.max_new_tokens]
        groups = [together] if together else []
        groups += [[row] for row, left in enumerate(room) if left < self.max_new_tokens]
        texts = [""] * len(prompts)
        for group in groups:
            new = min(self.max_new_tokens, room[group[0]])
            for row, text in zip(group, self._written([prompts[row] for row in group], new, streamer), strict=True):
                texts[row] = text
        return texts

    @property
    def _limit(self) -> int | None:
        """Tokens of a prompt and what follows, together; None: apart, or without a limit."""
        config = self.model.config
        return None if config.is_encoder_decoder else max_positions(config)

    def _written(self, prompts: Sequence[Sequence[int]], new: int, streamer: Any) -> list[str]:
        two_stacks = self.model.config.is_encoder_decoder
        longest = max(len(ids) for ids in prompts)
        device = self.model.device
        padding = 0 if self._padding is None else self._padding

        def padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
            """[prompts, longest]; behind the prompt only where an encoder reads it: what follows is to stand there"""
            fill = [[filler] * (longest - len(row)) for row in rows]
            pairs = zip(rows, fill, strict=True)
            cells = [[*row, *empty] if two_stacks else [*empty, *row] for row, empty in pairs]
            return torch.tensor(cells, device=device)

        with torch.inference_mode():
            written = self.model.generate(
                input_ids=padded(prompts, padding),
                attention_mask=padded([[1] * len(ids) for ids in prompts], 0),
                generation_config=self._settings,
                max_new_tokens=new,
                streamer=streamer,
            )
        return [
            self.tokenizer.decode(row, skip_special_tokens=True).strip()
            for row in (written if two_stacks else written[:, longest:])
        ]


def load_generator(settings: ModelSettings, max_new_tokens: int, temperature: float, device: str | None) -> Generator:
    """A saved language model to talk to; raises :class:`UserError` where it writes no texts, or its tokenizer has no
    chat template, before the weights load."""
    check_packages(vars(settings))
    config, path = read_config(settings), settings.model_name_or_path
    if architecture_of(config) != DECODER or any(has_head(config, head) for head in HEADS):
        name = getattr(config, "apt_base_architecture", None) or (config.architectures or ["model"])[0]
        raise UserError(
            f"{path} is a {name}, which does not converse. See what it says of a text: apt-trainer predict {path} "
            "--text TEXT"
        )
    tokenizer = load_tokenizer(settings)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{path} has no chat template, so it was not trained to converse. Let it go on from a text: apt-trainer "
            f"predict {path} --text TEXT"
        )
    model = load_saved(settings).to(choose_device(device)).eval()
    return Generator(model, tokenizer, max_new_tokens, temperature)


class Conversation:
    """A conversation with a model: each turn is answered with all that was said before in view.

    Raises :class:`UserError` where the tokenizer of the model has no chat template.
    """

    def __init__(self, generator: Generator, system: str | None = None) -> None:
        self.generator = generator
        self.template = own_template(generator.tokenizer)
        self.messages: list[Mapping[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str) -> str:
        """What the model answers to ``text``; printed while it is written."""
        messages = [*self.messages, {"role": "user", "content": text}]
        streamer = TextStreamer(self.generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompt = self.template.open_turn([dict(message) for message in messages])
        (answer,) = self.generator.write([prompt], streamer)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer
