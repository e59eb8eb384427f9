"""What the cosine scoring pass costs beside a plain forward pass over the same text, in turns in one process.

    python scripts/measure_scoring.py --model MODEL --data TEXT [--samples 2] [--length 512] [--rounds 5]

Prints JSON: seconds of a full forward pass, of one through the layers alone (no logits; the scoring pass leaves the
head out too) and of the scoring pass, medians over rounds; quartiles of the ratios of the last to the other two; and
the largest difference of a layer's score from its definition, computed in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from apt_trainer.depth.inputs import DataRequest, prepare
from apt_trainer.measure import evaluating
from apt_trainer.settings import ModelSettings
from apt_trainer.sublayers.cosine import cosine_scores, run_without_predictions
from apt_trainer.sublayers.units import Unit, Units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    at = prepare(ModelSettings(args.model, dtype=args.dtype), DataRequest(args.data, args.samples, args.length))
    at.load(None)
    assert at.calibration is not None
    model, units, batches = at.model, at.units, at.calibration.batches

    def plain() -> None:
        with evaluating(model):
            for batch in batches:
                model(**{name: value.to(model.device) for name, value in batch.items() if name != "labels"})

    def layers() -> None:
        with evaluating(model):
            for batch in batches:
                run_without_predictions(model, units, {name: v.to(model.device) for name, v in batch.items()})

    calls = {"forward": plain, "layers_only": layers, "scoring": lambda: cosine_scores(model, units, batches)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    times = {name: values[1:] for name, values in times.items()}  # the first round warms up
    found: dict[str, Any] = {"tokens": args.samples * args.length, "threads": torch.get_num_threads()}
    found["seconds"] = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for other in ("forward", "layers_only"):
        ratios = [a / b for a, b in zip(times["scoring"], times[other], strict=True)]
        found[f"scoring_over_{other}_quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)]
    scores = cosine_scores(model, units, batches).scores
    defined = _by_definition(model, units, batches)
    found["largest_difference_from_definition"] = max(abs(scores[unit] - defined[unit]) for unit in defined)
    print(json.dumps(found, indent=2))


def _by_definition(model: Any, units: Units, batches: Any) -> dict[Unit, float]:
    """1 − mean cosine of the input and output of each layer, in float64, all of them held."""
    blocks = [unit for unit in units.members if unit.kind == "block"]
    cosines: dict[Unit, list[torch.Tensor]] = {unit: [] for unit in blocks}
    inputs: dict[Unit, torch.Tensor] = {}

    def enter(unit: Unit) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            inputs[unit] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leave(unit: Unit) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            pair = (inputs.pop(unit).double(), after.double())
            cosines[unit].append(torch.nn.functional.cosine_similarity(*pair, dim=-1).flatten())

        return hook

    handles = []
    for unit in blocks:
        module = model.get_submodule(units.members[unit][0].block)
        handles += [
            module.register_forward_pre_hook(enter(unit), with_kwargs=True),
            module.register_forward_hook(leave(unit)),
        ]
    with evaluating(model):
        for batch in batches:
            run_without_predictions(model, units, batch)
    for handle in handles:
        handle.remove()
    return {unit: 1.0 - float(torch.cat(values).mean()) for unit, values in cosines.items()}


if __name__ == "__main__":
    main()
