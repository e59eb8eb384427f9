"""What the cosine pass of ``analyze`` costs beside a plain forward pass over the same text, in turns in one process.

    python scripts/measure_scoring.py --model MODEL --data TEXT [--samples 2] [--length 512] [--rounds 5]

Prints JSON: seconds of a full forward pass, of one through the layers alone (no logits; the scoring pass leaves the
head out too) and of the scoring pass, similarity of the layers included, medians over rounds; quartiles of the ratios
of the last to the other two; how far resident memory peaks above where the pass began, by number of samples; and per
kind of unit the largest difference of a score from its definition, computed in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from apt_trainer.measure import evaluating
from apt_trainer.measure.memory import current_memory_bytes, peak_memory_bytes, reset_peak, return_freed_memory
from apt_trainer.scoring.sublayers.cosine import CosineScores, cosine_scores, run_without_predictions
from apt_trainer.scoring.sublayers.units import Unit, Units
from apt_trainer.settings import ModelSettings
from apt_trainer.studies.inputs import DataRequest, prepare
from apt_trainer.training.reshape import release_memory

MEMORY_SAMPLES = (2, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    windows = max(args.samples, *MEMORY_SAMPLES)
    at = prepare(ModelSettings(args.model, dtype=args.dtype), DataRequest(args.data, windows, args.length))
    at.load(None)
    assert at.calibration is not None
    model, units, every = at.model, at.units, at.calibration.batches
    batches = every[: args.samples]

    def plain() -> None:
        with evaluating(model):
            for batch in batches:
                model(**{name: value.to(model.device) for name, value in batch.items() if name != "labels"})

    def layers() -> None:
        with evaluating(model):
            for batch in batches:
                run_without_predictions(model, units, {name: v.to(model.device) for name, v in batch.items()})

    def scoring(batches: Any = batches) -> CosineScores:
        return cosine_scores(model, units, batches, similarity=True)  # as analyze calls it

    calls: dict[str, Callable[[], Any]] = {"forward": plain, "layers_only": layers, "scoring": scoring}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    times = {name: values[1:] for name, values in times.items()}  # the first round warms up
    found: dict[str, Any] = {"tokens": len(batches) * args.length, "threads": torch.get_num_threads()}
    found["seconds"] = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for other in ("forward", "layers_only"):
        ratios = [a / b for a, b in zip(times["scoring"], times[other], strict=True)]
        found[f"scoring_over_{other}_quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
    return_freed_memory()  # not before, since it slows every allocation
    found["peak_memory_growth_bytes"] = {
        number: _peak_growth(model.device, partial(scoring, every[:number]))
        for number in MEMORY_SAMPLES
        if number <= len(every)
    }
    scores, defined = scoring().scores, _by_definition(model, units, batches)
    assert scores.keys() == defined.keys()
    differences: dict[str, float] = {}
    for unit, value in defined.items():
        differences[unit.kind] = max(differences.get(unit.kind, 0.0), abs(scores[unit] - value))
    found["largest_difference_from_definition"] = differences
    print(json.dumps(found, indent=2))


def _peak_growth(device: Any, call: Callable[[], Any]) -> int | None:
    """Peak memory during ``call`` above that in use before; None where the peak cannot be reset."""
    release_memory()
    if not reset_peak(device):
        return None
    before = current_memory_bytes(device)
    call()
    return peak_memory_bytes(device) - before


def _by_definition(model: Any, units: Units, batches: Any) -> dict[Unit, float]:
    """1 − mean cosine of the residual stream before and after each unit, in float64."""
    definition = _Definition(model, units)
    with evaluating(model):
        for batch in batches:
            run_without_predictions(model, units, {name: v.to(model.device) for name, v in batch.items()})
    definition.detach()
    return {unit: 1.0 - float(torch.cat(values).mean()) for unit, values in definition.cosines.items()}


class _Definition:
    """Input of each block and what its sublayers put out, held until the block ends, then compared in float64.

    ``cosines``: of every token, by unit.
    """

    def __init__(self, model: Any, units: Units) -> None:
        self._units = units
        self.cosines: dict[Unit, list[torch.Tensor]] = {unit: [] for unit in units.members}
        self._inputs: dict[Unit, torch.Tensor] = {}
        self._outputs: dict[Unit, torch.Tensor] = {}
        self._handles: list[Any] = []
        for unit, parts in units.members.items():
            if unit.kind == "block":
                block = model.get_submodule(parts[0].block)
                self._handles.append(block.register_forward_pre_hook(partial(self._enter, unit), with_kwargs=True))
                self._handles.append(block.register_forward_hook(partial(self._leave, unit)))
            else:
                output = model.get_submodule(parts[0].output)
                self._handles.append(output.register_forward_hook(partial(self._keep, unit)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, block: Unit, module: Any, args: Any, kwargs: Any) -> None:
        self._inputs[block] = (args[0] if args else kwargs["hidden_states"]).double()

    def _keep(self, unit: Unit, module: Any, args: Any, output: torch.Tensor) -> None:
        self._outputs[unit] = output.double()

    def _leave(self, block: Unit, module: Any, args: Any, output: Any) -> None:
        start = stream = self._inputs.pop(block)
        for unit in self._units.parts([block]):
            before, added = start if self._units.parallel else stream, self._outputs.pop(unit).reshape(start.shape)
            stream = added if self._units.family.post_norm else before + added
            self._compare(unit, before, stream)
        self._compare(block, start, (output[0] if isinstance(output, tuple) else output).double())

    def _compare(self, unit: Unit, before: torch.Tensor, after: torch.Tensor) -> None:
        self.cosines[unit].append(torch.nn.functional.cosine_similarity(before, after, dim=-1).flatten())


if __name__ == "__main__":
    main()
