"""Runs an exported ONNX model by onnxruntime alone, or an OpenVINO model by OpenVINO alone.

As a script it answers a request in a process of its own, which cannot import apt_trainer: so an export is checked
where it will be served. Nothing of apt_trainer is imported here.

    python -I onnx_session.py MODEL REQUEST.safetensors ANSWER.safetensors      (MODEL: .onnx or .xml)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PAST, PRESENT = "past_key_values.", "present."
STATES = f"{PRESENT}encoder_hidden_states"
ENCODER, DECODER = "encoder_model", "decoder_model_merged"
"""How the files of a model with two stacks begin."""


class OnnxModel:
    """An ONNX file as a function of numpy arrays.

    Args:
        file: the ``.onnx`` file.
        threads: of one operation; 0 leaves it to onnxruntime.
    """

    def __init__(self, file: str | Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._describe(
            {value.name: value for value in self.session.get_inputs()},
            [value.name for value in self.session.get_outputs()],
        )

    def _describe(self, inputs: dict[str, Any], outputs: list[str]) -> None:
        """``inputs``: by name what has their ``shape``, in which a number of heads is a number."""
        self.inputs, self.outputs = inputs, outputs
        self.has_cache = any(name.startswith(PAST) for name in inputs)
        self.largest_batch: int | None = None

    def _run(self, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.session.run(None, given)  # type: ignore[no-any-return]

    def __call__(self, batch: Mapping[str, Any], past: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Every output by name, for ``input_ids`` [batch, length] and what goes with them, or for ``pixel_values``.

        ``past``: the ``present.*`` of the call before; without, a cache begins empty. ``attention_mask`` covers the
        past too: [batch, past + length].
        """
        given = {name: np.asarray(batch[name], dtype=_type(name)) for name in self.inputs if name in batch}
        if "position_ids" in self.inputs and "position_ids" not in given:
            places = np.maximum(given["attention_mask"].cumsum(1) - 1, 0)
            given["position_ids"] = places[:, -given["input_ids"].shape[1] :]
        if "token_type_ids" in self.inputs and "token_type_ids" not in given:
            given["token_type_ids"] = np.zeros_like(given["input_ids"])
        rows = len(next(iter(given.values())))
        for name, value in self.inputs.items():
            if name.startswith(PAST):
                empty = (rows, value.shape[1], 0, value.shape[3])
                given[name] = np.zeros(empty, np.float32) if past is None else past[name.replace(PAST, PRESENT)]
        return dict(zip(self.outputs, self._run(given), strict=True))

    def generate(self, prompt: np.ndarray, new_tokens: int) -> list[int]:
        """The ``new_tokens`` most likely tokens after ``prompt`` [1, length], one at a time with the cache."""
        return [int(token) for (token,) in islice(self._tokens(prompt), new_tokens)]

    def seconds(self, batch: Mapping[str, Any], new_tokens: int) -> tuple[float, ...]:
        """Of one forward pass; with a cache of reading ``input_ids`` and of each of ``new_tokens`` after the first."""
        start = time.perf_counter()
        if not self.has_cache:
            self(batch)
            return (time.perf_counter() - start,)
        tokens = self._tokens(np.asarray(batch["input_ids"]))
        next(tokens)
        read = time.perf_counter()
        for _ in islice(tokens, new_tokens):
            pass
        return read - start, (time.perf_counter() - read) / new_tokens

    def _tokens(self, prompt: np.ndarray) -> Iterator[np.ndarray]:
        """Without end the most likely next tokens [batch] of ``prompt`` [batch, length], which has no padding."""
        ids, past, seen = prompt, None, 0
        while True:
            seen += ids.shape[1]
            answer = self({"input_ids": ids, "attention_mask": np.ones((len(ids), seen), np.int64)}, past)
            past = {name: value for name, value in answer.items() if name.startswith(PRESENT)}
            ids = answer["logits"][:, -1:].argmax(-1)
            yield ids[:, 0]


def _type(name: str) -> type[np.generic]:
    return np.float32 if name == "pixel_values" else np.int64


class TwoStackModel(OnnxModel):
    """As :class:`OnnxModel`, of a decoder beside whose file that of its encoder lies.

    ``start``: the token that a text begins with.
    """

    def __init__(self, file: str | Path, threads: int = 0, start: int = 0) -> None:
        super().__init__(file, threads)
        path = Path(file)
        self.start, self.encoder = start, OnnxModel(path.with_name(path.name.replace(DECODER, ENCODER)), threads)

    def __call__(self, batch: Mapping[str, Any], past: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """As above, with ``decoder_input_ids`` [batch, new] too; ``past`` also holds what the encoder made."""
        if past is None:
            empty = np.zeros((len(batch["input_ids"]), 1, 0, 1), np.float32)
            past = {name.replace(PAST, PRESENT): empty for name in self.inputs if name.startswith(PAST)}
            past[STATES] = self.encoder(batch)["last_hidden_state"]
        given = {name: past[name.replace(PAST, PRESENT)] for name in self.inputs if name.startswith(PAST)}
        given |= {
            "input_ids": np.asarray(batch["decoder_input_ids"], np.int64),
            "encoder_attention_mask": np.asarray(batch["attention_mask"], np.int64),
            "encoder_hidden_states": past[STATES],
            "use_cache_branch": np.ones(1, bool),
        }
        return dict(zip(self.outputs, self._run(given), strict=True)) | {STATES: past[STATES]}

    def _tokens(self, prompt: np.ndarray) -> Iterator[np.ndarray]:
        batch = {"input_ids": prompt, "attention_mask": np.ones_like(prompt)}
        ids, past = np.full((len(prompt), 1), self.start), None
        while True:
            past = self({**batch, "decoder_input_ids": ids}, past)
            ids = past["logits"][:, -1:].argmax(-1)
            yield ids[:, 0]


class OpenVinoModel(OnnxModel):
    """As :class:`OnnxModel`, of an ``.xml`` file whose weights lie beside it.

    Args:
        file: the ``.xml`` file.
        threads: of one inference; 0 leaves it to OpenVINO.
    """

    def __init__(self, file: str | Path, threads: int = 0) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}  # else bfloat16 where it is fast
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        self.compiled = openvino.compile_model(str(file), "CPU", settings)
        inputs = {}
        for port in self.compiled.inputs:
            shape = [side.get_length() if side.is_static else None for side in port.partial_shape]
            inputs[port.get_any_name()] = SimpleNamespace(shape=shape)
        self._describe(inputs, [port.get_any_name() for port in self.compiled.outputs])

    def _run(self, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.compiled(given).values())


def runner_of(file: str | Path) -> type[OnnxModel]:
    """What runs ``file``."""
    path = Path(file)
    if path.suffix == ".xml":
        return OpenVinoModel
    return TwoStackModel if path.name.startswith(DECODER) else OnnxModel


def main(model: str, request: str, answer: str) -> None:
    """Answer each batch of ``request`` (tensors named ``NUMBER.INPUT``) by ``NUMBER.OUTPUT``; ``prompt`` and
    ``new_tokens``, with two stacks also ``start``, by ``generated``."""
    from safetensors.numpy import load_file, save_file

    asked = load_file(request)
    run = runner_of(model)(model)
    if isinstance(run, TwoStackModel):
        run.start = int(asked["start"][0, 0])
    batches: dict[str, dict[str, np.ndarray]] = {}
    for name, value in asked.items():
        number, dot, rest = name.partition(".")
        if dot:
            batches.setdefault(number, {})[rest] = value
    found: dict[str, np.ndarray] = {}
    for number, batch in batches.items():
        for name, value in run(batch).items():
            if not name.startswith(PRESENT):
                found[f"{number}.{name}"] = np.ascontiguousarray(value)
    if "prompt" in asked and run.has_cache:
        found["generated"] = np.array(run.generate(asked["prompt"], int(asked["new_tokens"][0])), np.int64)
    save_file(found, answer)


if __name__ == "__main__":
    sys.modules["apt_trainer"] = None  # type: ignore[assignment]
    main(*sys.argv[1:])
