"""Runs a GGUF file by llama.cpp alone (package xllamacpp).

As a script it answers a request in a process of its own, which cannot import apt_trainer. Nothing of apt_trainer is
imported here.

    python -I gguf_session.py MODEL.gguf REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class GgufModel:
    """A GGUF file as llama.cpp runs it on the CPU.

    Args:
        file: the ``.gguf`` file.
        length: tokens of prompt and answer together, at most.
        threads: that compute.
    """

    def __init__(self, file: str | Path, length: int = 256, threads: int = 1) -> None:
        import xllamacpp

        self.has_cache, self.largest_batch = True, 1
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_gpu_layers, settings.n_parallel = length, 0, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup, settings.cache_ram_mib = False, 0
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(settings)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> dict[str, Any]:
        """``tokens``: ids of the most likely continuation of ``prompt``; ``timings``: tokens per second of both."""
        answer = self._complete(prompt, new_tokens, likely=0)
        return {"tokens": answer["tokens"], "timings": answer["timings"]}

    def seconds(self, batch: Mapping[str, Any], new_tokens: int) -> tuple[float, ...]:
        """Of reading ``input_ids`` [1, length], and of each of ``new_tokens`` after the first one."""
        start = time.perf_counter()
        reading = self.generate(batch["input_ids"][0].tolist(), new_tokens + 1)["timings"]["prompt_ms"] / 1000
        return reading, (time.perf_counter() - start - reading) / new_tokens

    def most_likely(self, prompt: Sequence[int], number: int) -> list[tuple[int, float]]:
        """(id, log-probability) of the next token; none where it ends no character, which llama.cpp withholds."""
        steps = self._complete(prompt, 1, likely=number)["completion_probabilities"]
        return [(other["id"], other["logprob"]) for step in steps for other in step["top_logprobs"]]

    def tokens_of(self, text: str) -> list[int]:
        """Ids of ``text``, with the tokens that the file's tokenizer puts round it."""
        return self._ask("/tokenize", {"content": text, "add_special": True})["tokens"]  # type: ignore[no-any-return]

    def _complete(self, prompt: Sequence[int], new_tokens: int, likely: int) -> dict[str, Any]:
        greedy = {"temperature": 0, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
        asked = {"prompt": list(prompt), "n_predict": new_tokens, "n_probs": likely}
        return {"completion_probabilities": []} | self._ask("/completion", asked | greedy)

    def _ask(self, path: str, values: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(values).encode(), headers)
        with urllib.request.urlopen(request) as answer:  # of this process itself, on 127.0.0.1
            return json.loads(answer.read())  # type: ignore[no-any-return]


def main(model: str, request: str, answer: str) -> None:
    """``prompt`` (ids) → ``generated`` (ids) and ``likely`` (per new token what :meth:`GgufModel.most_likely` says);
    ``texts`` → ``tokens``."""
    asked, run = json.loads(Path(request).read_text()), GgufModel(model)
    prompt, number = asked["prompt"], asked["likely"]
    generated = run.generate(prompt, asked["new_tokens"])["tokens"]
    found = {
        "generated": generated,
        "likely": [run.most_likely(prompt + generated[:i], number) for i in range(len(generated))],
        "tokens": [run.tokens_of(text) for text in asked["texts"]],
    }
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.modules["apt_trainer"] = None  # type: ignore[assignment]
    main(*sys.argv[1:])
