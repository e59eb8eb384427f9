"""A pruned model beside what else one could do with the same rows, steps, seeds and machine: two tables in Markdown.

    OMP_NUM_THREADS=1 python scripts/compare.py --protocol encoder
    APT_TASK_DATA=../shared/data python scripts/compare.py --protocol decoder [--contenders lora drop_nri ours_30]
    python scripts/compare.py --protocol encoder --rows 1000 --steps 200 --seeds 1 --output_dir out/quick

The contenders are the variants of ``recipes/ablations/compare_PROTOCOL.yaml``; ``--base`` starts them from another
recipe, and further ``--key value`` hold for all of them. Each runs once per seed in a process of its own, and goes on
where it was stopped. Those called ``torch_pruning`` and ``wanda`` start from a model that is cut here first, by scores
of Torch-Pruning (a package of its own; without it that row is left out) or of Wanda; what that takes is not counted.

The first table has means over seeds. Time to 97 % is the share of training until the finished shape comes within 97 %
of what the baseline ends with on the validation rows, times processor seconds. Latencies are of the models of the
first seed, all in turns. The second table sets ``ours`` beside the line through the sizes of each other contender and
the baseline: the difference of the metric where that line has the same number of parameters, or the same latency.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.measure import compare_generation, compare_latency
from apt_trainer.models import family_of
from apt_trainer.pruning.budget import Budget
from apt_trainer.report.comparison import compare, read_results, to_markdown
from apt_trainer.report.tables import markdown_table
from apt_trainer.settings.recipe import Recipe, load_recipe, read_file
from apt_trainer.settings.shipped import find_file
from apt_trainer.store.events import RECIPE_FILE, read_json_object, write_json
from apt_trainer.store.pretrained import load_inputs, load_model, load_saved
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.store.saving import save_pruned
from apt_trainer.store.starting_point import starting_point
from apt_trainer.studies.ablation.runner import run_study
from apt_trainer.studies.ablation.study import Run, Study, read_study
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.training.time_to_accuracy import first_reaching

Scores = dict[str, torch.Tensor]
Record = dict[str, Any]
OURS, SHARE = "ours", 0.97
MADE_OF = "made_of.json"
LABELS = {
    "share": "share of baseline",
    "tasks": "mean of tasks",
    "tasks_share": "share of baseline, tasks",
    "removed": "removed",
    "total_params": "parameters",
    "disk_bytes": "size on disk",
    "train_cpu_seconds": "training, CPU",
    "mark_seconds": f"to {SHARE:.0%}, CPU",
    "peak_memory_bytes": "peak memory",
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=("encoder", "decoder"), required=True)
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="and the baseline (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--rows", type=int, help="training rows")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--base", metavar="FILE", help="recipe that all start from")
    parser.add_argument("--output_dir", metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    args, changes = parser.parse_known_args(words)
    changes += [] if args.rows is None else ["--max_train_samples", str(args.rows)]
    changes += [] if args.steps is None else ["--max_steps", str(args.steps)]
    try:
        study, base = read_protocol(args, changes)
        variants = {run.variant: run for run in study.runs}
        for name in args.contenders or ():
            if name not in variants:
                raise unknown_choice("contender", name, variants)
        asked = [name for name in variants if name in {study.baseline, *(args.contenders or variants)}]
        asked = [name for name in asked if name not in PREPARED or prepare(name, variants[name], base, changes)]
        failures = run_study(study, args.jobs, lambda line: print(line, file=sys.stderr, flush=True), asked)
        for name, log in failures.items():
            print(f"\nfailed: {name}\n{log}", file=sys.stderr)
        records = [record for record in read_results([str(study.output_dir)]) if record["variant"] in asked]
        print(tables(records, str(study.baseline), study.output_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failures else 0


def read_protocol(args: argparse.Namespace, changes: Sequence[str]) -> tuple[Study, str]:
    """The study with what ``args`` change, which is written beside its results, and the recipe it starts from."""
    file = find_file(f"ablations/compare_{args.protocol}")
    content = read_file(str(file))
    base = find_file(args.base) if args.base else file.parent / content["base"]
    output = args.output_dir or content["output_dir"]
    rate = read_file(str(base)).get("dense_learning_rate")
    for changed in content["variants"].values():
        if "model_name_or_path" in changed:
            changed["model_name_or_path"] = changed["model_name_or_path"].replace(content["output_dir"], output)
        if changed.get("tune") == "full" and rate is not None:
            changed["learning_rate"] = rate
    written = Path(output) / "study.yaml"
    write_json(written, content | {"base": str(base.resolve()), "output_dir": output})
    return read_study(str(written), seeds=args.seeds, overrides=changes), str(base)


# ---------------------------------------------------------------------------- contenders that are cut here


def prepare(name: str, run: Run, base: str, changes: Sequence[str]) -> bool:
    """Cut the dense model of ``base`` into the one that ``run`` starts from; False and a sentence where it cannot."""
    score, package, settings = PREPARED[name]
    folder = Path(run.given["model_name_or_path"])
    try:
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"it needs pip install {package.replace('_', '-')}.")
        made_of = {"base": read_file(base), "changes": list(changes)}
        made = folder / MADE_OF
        if not made.is_file() or read_json_object(made) != made_of:
            cut(load_recipe(base, [*changes, *settings, f"--output_dir={folder}"]), score, folder)
            write_json(made, made_of)
    except UserError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return False
    return True


def cut(recipe: Recipe, score: Callable[..., Scores], folder: Path) -> None:
    """Cut the model of ``recipe`` to its ``target_sparsity`` by ``score``, and save it to ``folder``."""
    args = recipe.training
    torch.manual_seed(args.seed)
    tokenizer, _, data = load_inputs(recipe.model, recipe)
    if data.embedding_loss is not None:
        raise UserError("it scores by a loss of the model, and an embedding has none.")
    model = load_model(recipe.model, data).eval()
    start, family = starting_point(model), family_of(model.config)
    rows = data.train.select(range(min(args.calibration_samples, len(data.train))))
    budget = Budget(model, family, start, args)
    budget.check()
    scores = score(model, budget.scored, [data.collator(list(each)) for each in _batches(rows)])
    plan = budget.choose(scores, start.plan, args.target_sparsity, densities=True)
    model.zero_grad()
    apply_plan(model, family, start.spaces, start.plan, plan)
    as_pruned(model, family, plan)
    save_pruned(model, folder, plan, tokenizer)


def _batches(rows: Any, size: int = 8) -> list[list[Any]]:
    return [[rows[i] for i in range(first, min(first + size, len(rows)))] for first in range(0, len(rows), size)]


def wanda_scores(model: Any, spaces: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> Scores:
    """Of each unit, the root of the summed squares of Wanda's |weight| · ‖input‖ over the weights that read it
    (Sun et al. 2023, arXiv 2306.11695)."""
    squares: Scores = {}
    mask = torch.ones(0)

    def look(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor]) -> None:
            found = inputs[0][mask.bool()].float().square().sum(0)
            squares[name] = squares.get(name, torch.zeros(())) + found

        return hook

    gates = {space.name: model.get_submodule(space.gate) for space in spaces}
    hooks = [gate.register_forward_pre_hook(look(name)) for name, gate in gates.items()]
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"]
            model(**batch)
    for each in hooks:
        each.remove()
    for name, gate in gates.items():
        squares[name] *= gate.weight.detach().float().square().sum(0)
    return {space.name: squares[space.name].view(space.size, -1).sum(1).sqrt() for space in spaces}


def torch_pruning_scores(model: Any, spaces: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> Scores:
    """``GroupTaylorImportance`` of the channels of each unit, on gradients of all batches; their mean."""
    import torch_pruning

    for batch in batches:
        model(**batch).loss.backward()
    example = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example, output_transform=lambda out: out[0])
    importance, scores = torch_pruning.importance.GroupTaylorImportance(), {}
    for space in spaces:
        path = next(part.module for part in space.slices if part.side == "out" and part.module not in space.norms)
        root = model.get_submodule(path)
        channels = list(range(root.out_features))
        group = graph.get_pruning_group(root, torch_pruning.prune_linear_out_channels, channels)
        scores[space.name] = importance(group).view(space.size, -1).mean(1)
    return scores


PREPARED: dict[str, tuple[Callable[..., Scores], str | None, list[str]]] = {
    # one cut without a floor may take every head
    "torch_pruning": (torch_pruning_scores, "torch_pruning", ["--min_heads", "2", "--min_neurons", "64"]),
    "wanda": (wanda_scores, None, ["--shape", "uniform"]),  # which compares within a layer
}
"""Contender → (scores, package that they need, settings of the cut)."""


# ---------------------------------------------------------------------------- tables


def tables(records: Sequence[Record], baseline: str, folder: Path) -> str:
    """Both tables of the finished runs ``records``."""
    times = latencies(records, folder / "latency.json")
    axes = {"total_params": "parameters"}
    for of_one in times.values():
        axes |= {f"latency.{label}.ms": label for label in of_one}
    base = {record["seed"]: record["metrics"] for record in records if record["variant"] == baseline}
    found = [_derived(record, base.get(record["seed"]), times.get(record["variant"], {})) for record in records]
    keys = ["score.value", *(key for key in LABELS if any(key in record["metrics"] for record in found))]
    keys += list(axes)[1:]
    comparison = compare([record | {"shown": keys, "baseline": baseline} for record in found])
    for cells in comparison.cells.values():
        for key in {"share", "tasks_share", "removed"} & cells.keys():
            cells[key] = cells[key]._replace(change=None)
    labels = LABELS | axes | {"score.value": records[0]["metrics"]["metric_name"]}
    comparison = replace(comparison, labels={key: labels[key] for key in comparison.labels})
    parts = [to_markdown(comparison)]
    for score in [key for key in ("score.value", "tasks") if key in comparison.labels]:
        rows = at_equal(comparison.cells, score, list(axes), baseline)
        if rows:
            columns = [("name", f"{labels[score]}, difference at equal", None)]
            parts.append(markdown_table(rows, [*columns, *((key, axes[key], "{:+.4f}".format) for key in axes)]))
    return "\n\n".join(parts)


def _derived(record: Record, base: Mapping[str, Any] | None, times: Mapping[str, float]) -> Record:
    """``record`` with metrics relative to the run ``base`` of the same seed, None where there is none."""
    given = record["metrics"]
    metrics = {key: given[key] for key in LABELS if key in given}
    metrics["score"] = {"value": given["task_metric"]}
    metrics["score"] |= {end: given[f"task_metric_{end}"] for end in ("low", "high") if f"task_metric_{end}" in given}
    metrics["latency"] = {label: {"ms": ms} for label, ms in times.items()}
    tasks = _tasks(given)
    metrics |= {} if tasks is None else {"tasks": tasks}
    if base is None:
        return record | {"metrics": metrics}
    greater = given["greater_is_better"]
    share = given["task_metric"] / base["task_metric"]
    metrics |= {
        "share": share if greater else 1 / share,
        "removed": 1 - given["block_params"] / base["block_params_dense"],
    }
    if tasks is not None:
        metrics["tasks_share"] = tasks / _tasks(base)
    if base.get("evaluations") and given.get("evaluations"):
        mark = base["evaluations"][-1][2] * (SHARE if greater else 1 / SHARE)
        reached = first_reaching(given["evaluations"], mark, greater)
        if reached is not None:
            metrics["mark_seconds"] = given["train_cpu_seconds"] * reached[1] / given["evaluations"][-1][1]
    return record | {"metrics": metrics}


def _tasks(metrics: Mapping[str, Any]) -> float | None:
    """Mean of the tasks of lm_eval, None where they were not run."""
    found = [part["metrics"]["acc"]["value"] for part in metrics.get("lm_eval", {}).values()]
    return mean(found) if found else None


def latencies(records: Sequence[Record], file: Path) -> dict[str, dict[str, float]]:
    """Contender → label → milliseconds, of the first model of each, in turns; kept in ``file``."""
    first = {record["variant"]: record for record in reversed(records)}
    timed = sorted(f"{name}: {record['recipe_digest']}, seed {record['seed']}" for name, record in first.items())
    kept = read_json_object(file) if file.is_file() else {}
    if kept.get("timed") == timed:
        return dict(kept["ms"])
    folders = {name: file.parent / name / f"seed-{record['seed']}" for name, record in first.items()}
    recipe = load_recipe(str(folders[next(iter(folders))] / RECIPE_FILE))
    args = recipe.training
    models = {name: load_saved(recipe.model.of(str(folder))).to(args.device) for name, folder in folders.items()}
    sizes = args.latency_batch_sizes, args.latency_length
    ms: dict[str, dict[str, float]] = {name: {} for name in models}
    if next(iter(models.values())).can_generate():
        for name, of_one in compare_generation(models, *sizes, args.latency_new_tokens).items():
            for batch, speed in of_one.items():
                ms[name][f"prefill, batch {batch}"] = speed.prefill.median_ms
                ms[name][f"decoding, batch {batch}"] = speed.decode.median_ms
    else:
        for name, timing in compare_latency(models, *sizes).items():
            ms[name] = {f"latency, batch {batch}": latency.median_ms for batch, latency in timing.items()}
    write_json(file, {"timed": timed, "ms": ms})
    return ms


def at_equal(
    cells: Mapping[str, Mapping[str, Any]], score: str, axes: Sequence[str], baseline: str
) -> list[dict[str, Any]]:
    """One row for each size of ours and each other contender: ``score`` of ours less that of the other where it has
    the same value of an axis, on straight lines between its sizes and the baseline; nothing beyond its ends."""
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for name, of_one in cells.items():
        curves.setdefault(re.sub(r"_\d+$", "", name), []).append(of_one)
    ours = {name: of_one for name, of_one in cells.items() if re.sub(r"_\d+$", "", name) == OURS}
    rows = []
    for name, own in ours.items():
        for other, sizes in curves.items():
            if other in (OURS, baseline) or baseline not in cells:
                continue
            row: dict[str, Any] = {"name": f"{name} – {other}"}
            for axis in axes:
                points = sorted(
                    (each[axis].mean, each[score].mean)
                    for each in [*sizes, cells[baseline]]
                    if each[axis].mean is not None and each[score].mean is not None
                )
                at = own[axis].mean
                if points and at is not None and points[0][0] <= at <= points[-1][0] and points[0][0] < points[-1][0]:
                    row[axis] = own[score].mean - float(np.interp(at, *zip(*points, strict=True)))
            if len(row) > 1:
                rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
