"""Pruning further: a model that was pruned before is a starting point like any other."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from integration.factories import (
    SHORT,
    Rows,
    SaveAt,
    counted_block_parameters,
    events_of,
    losses_of,
    make_trainer,
    weights_of,
)
from integration.test_processes import two_processes
from integration.test_zero import deepspeed_config
from safetensors.torch import load_file, save_file
from texts import save_dense, tiny_llama, word_tokenizer, words
from tiny import (
    FAMILY_NAMES,
    LANGUAGE_MODELS,
    gap,
    logits,
    parts,
    random_plan,
    tiny_batch,
    tiny_model,
)
from transformers import PreTrainedModel

from apt_trainer import AdaptivePruner, APTTrainer, UserError, cli, load_pruned, paint
from apt_trainer.measure import count_parameters
from apt_trainer.models import HIDDEN, Space, family_of
from apt_trainer.plan.cost import parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.settings import MethodSettings
from apt_trainer.settings.execution_plan import full
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.store.starting_point import starting_point
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.masks import MaskStore

MODELS = {name: "ForSequenceClassification" for name in FAMILY_NAMES} | LANGUAGE_MODELS


def gone(spaces: list[Space]) -> list[str]:
    """An attention and a feed-forward that may vanish."""
    free = [space for space in spaces if not space.minimum and space.name != HIDDEN]
    attention = next(space.name for space in free if space.kind == "heads" and space.layer == 1)
    return [attention, next(space.name for space in free if space.kind == "neurons" and space.layer == 0)]


def pruned(model: PreTrainedModel, seed: int = 1) -> tuple[PreTrainedModel, PruningPlan]:
    """``model``, cut in place: unequal heads and neurons, hidden dimensions, two sublayers gone; and its plan."""
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed, ("heads", "neurons"), vanish=gone(spaces))
    plan = plan.narrowed({HIDDEN: torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 15])})
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    return model, plan


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_cut_on_a_model_that_was_cut_before(name: str, tmp_path) -> None:
    dense = tiny_model(name, MODELS[name])
    _, dense_spaces, whole = parts(dense)
    both = copy.deepcopy(dense)
    model, first = pruned(dense)
    model.save_pretrained(tmp_path / "first")
    model = load_pruned(tmp_path / "first").eval()
    family, start = family_of(model.config), starting_point(model)
    assert start.spaces == dense_spaces and start.plan == first and start.is_pruned
    assert parameter_cost(start.dense, family, start.spaces, blocks_only=False).total(
        first.counts
    ) == count_parameters(model)
    second = random_plan(start.spaces, first, 5, vanish=gone_later(start.spaces, first))
    batch, before = tiny_batch(model), None
    store = MaskStore(model, start.spaces, family.sublayers(model))
    before = logits(model, batch)
    store.open(first.counts)
    store.move(first.survivors(second), 1.0)
    masked = logits(model, batch)
    store.close()
    apply_plan(model, family, start.spaces, first, second)
    as_pruned(model, family, second)
    after = logits(model, batch)
    assert gap(masked, after) < 1e-5 * max(1.0, float(after.abs().max())) and gap(before, after) > 1e-3
    apply_plan(both, family, dense_spaces, whole, second)
    assert torch.equal(logits(both, batch), after)
    model.save_pretrained(tmp_path / "second")
    again = load_pruned(tmp_path / "second").eval()
    assert gap(logits(again, batch), after) < 1e-6
    assert starting_point(again).plan == second


def gone_later(spaces: list[Space], plan: PruningPlan) -> list[str]:
    left = [s for s in spaces if plan.kept[s.name] and not s.minimum and s.name != HIDDEN]
    return [left[-1].name]


# ---------------------------------------------------------------------- training further

TRAINED = ("bert", "distilbert", "modernbert", "gpt2", "phi3", "opt", "gpt_neox", "t5")
FURTHER: dict[str, Any] = {**SHORT, "round_to": 1, "prune_targets": ["heads", "neurons", "hidden", "sublayers"]}


def task_of(name: str) -> str:
    task = MODELS[name]
    return {"ForCausalLM": "text", "ForConditionalGeneration": "target", "ForMaskedLM": "tokens"}.get(
        task, "classification"
    )


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a saved pruned model by its name."""
    made: dict[str, Path] = {}

    def start(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            pruned(tiny_model(name, MODELS[name], dropout=0.1))[0].save_pretrained(made[name])
        return made[name]

    return start


def further(folder: Path, start: Path, name: str, options: dict[str, Any] | None = None, **changes: Any) -> APTTrainer:
    model = load_pruned(start)
    if "target_sparsity" not in changes:
        lost = AdaptivePruner(load_pruned(start), MethodSettings(target_sparsity=None)).sparsity()
        changes["target_sparsity"] = lost + 0.4 * (1 - lost)
    return make_trainer(folder, model, Rows(60, task_of(name)), options, **{**FURTHER, **changes})


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_goes_on_from_a_pruned_model(name: str, starts: Callable[[str], Path], tmp_path: Path) -> None:
    trainer = further(tmp_path, starts(name), name)
    start = trainer.pruner.origin.plan
    assert trainer.pruner.block_cost.total(start.counts) == counted_block_parameters(trainer)
    trainer.train()
    plan, target = trainer.pruner.plan, trainer.args.target_sparsity
    assert all(set(plan.kept[space]) <= set(units) for space, units in start.kept.items())
    assert trainer.pruner.sparsity() >= target > trainer.pruner.budget.removed_of_start(plan) > 0
    assert trainer.pruner.block_cost.total(plan.counts) == counted_block_parameters(trainer)
    dense = counted_block_parameters_of(tiny_model(name, MODELS[name]))
    assert trainer.pruner.sparsity() == pytest.approx(1 - counted_block_parameters(trainer) / dense)
    first, second = events_of(tmp_path, "prune")
    assert trainer.pruner.dense_plan.by_kind(trainer.pruner.spaces) == first["dense"]
    assert first["sparsity"] < second["sparsity"]
    trainer.save_model(str(tmp_path / "model"))
    batch = tiny_batch(trainer.model)
    again = load_pruned(tmp_path / "model").eval()
    assert torch.equal(logits(again, batch), logits(trainer.model.eval(), batch))
    written = json.loads((tmp_path / "model" / "pruning_plan.json").read_text())
    assert PruningPlan.from_json(written) == plan == starting_point(again).plan
    for space, positions in written["kept_of_start"].items():
        assert tuple(start.kept[space][position] for position in positions) == plan.kept[space]


def counted_block_parameters_of(model: PreTrainedModel) -> int:
    blocks = tuple(path + "." for path in family_of(model.config).block_modules(model))
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(blocks))


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_a_resumed_run_from_a_pruned_model_is_bit_equal(starts: Callable[[str], Path], tmp_path: Path) -> None:
    """With snapshots as teacher, at a checkpoint after the first event and one before it."""
    saving = {"callbacks": [SaveAt((4, 6))]}
    straight = further(tmp_path / "straight", starts("bert"), "bert", saving)
    straight.train()
    for step in (4, 6):
        resumed = further(tmp_path / f"from_{step}", starts("bert"), "bert")
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert resumed.pruner.plan == straight.pruner.plan
        expected, got = bits(straight.model), bits(resumed.model)
        assert expected.keys() == got.keys()
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_run_is_not_resumed_with_another_start(starts: Callable[[str], Path], tmp_path: Path) -> None:
    begun = further(tmp_path / "one", starts("bert"), "bert", {"callbacks": [SaveAt((4,))]})
    begun.train()
    for other in (tiny_model("bert"), pruned(tiny_model("bert"), seed=3)[0]):
        trainer = make_trainer(tmp_path / "two", other, Rows(60), **{**FURTHER, "target_sparsity": 0.9})
        with pytest.raises(UserError, match="began with one of other units"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))


TEACHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "dense": lambda: tiny_model("bert"),
    "of other depth": lambda: tiny_model("bert", layers=2),
    "pruned": lambda: pruned(tiny_model("bert"), seed=4)[0],
}


@pytest.mark.parametrize("which", TEACHERS)
def test_a_teacher_of_a_pruned_student(starts: Callable[[str], Path], tmp_path: Path, which: str) -> None:
    teacher = {"distillation": "model", "teacher_name_or_path": "given"}
    options = {"teacher": TEACHERS[which]()}
    trainer = further(tmp_path, starts("bert"), "bert", options, **teacher)
    trainer.train()
    taught = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert len(taught) >= 6 and all(value > 0 for value in taught)


@pytest.mark.parametrize("tune", ["adapters", "full"])
def test_a_pruned_model_is_only_tuned(starts: Callable[[str], Path], tmp_path: Path, tune: str) -> None:
    before = load_pruned(starts("bert"))
    nothing = {"target_sparsity": None, "distillation": "none", "tune": tune}
    trainer = further(tmp_path, starts("bert"), "bert", **nothing)
    trainer.train()
    pruner = trainer.pruner
    assert pruner.plan == pruner.origin.plan and pruner.budget.removed_of_start(pruner.plan) == 0
    small = {name: value.shape for name, value in before.state_dict().items()}
    assert {name: value.shape for name, value in trainer.model.state_dict().items()} == small
    changed = [
        name for name, value in before.state_dict().items() if not torch.equal(value, trainer.model.state_dict()[name])
    ]
    assert any("query" in name for name in changed)
    trainer.save_model(str(tmp_path / "model"))
    assert starting_point(load_pruned(tmp_path / "model")).plan == trainer.pruner.plan
    of_start = json.loads((tmp_path / "model" / "pruning_plan.json").read_text())["kept_of_start"]
    assert all(of_start[name] == list(range(number)) for name, number in trainer.pruner.plan.counts.items())


@pytest.mark.parametrize(
    "rule",
    [
        {"pruning_time": "before", "pruning_start": None, "distillation": "none", "calibration_samples": 16},
        {"prune_targets": ["sublayers"], "importance": "nri", "calibration_samples": 16, "mask_window": 0},
        {"prune_targets": ["sublayers"], "importance": "cosine"},
        {"importance": "taylor", "sparsity_metric": "flops"},
        {"importance": "magnitude", "sparsity_metric": "memory", "target_sparsity": 0.68},
    ],
    ids=lambda rule: "-".join(str(value) for value in rule.values()),
)
def test_rules_and_budgets_on_a_pruned_model(
    starts: Callable[[str], Path], tmp_path: Path, rule: dict[str, Any]
) -> None:
    trainer = further(tmp_path, starts("bert"), "bert", **rule)
    gone_before = {name for name, number in trainer.pruner.plan.counts.items() if not number}
    trainer.train()
    assert gone_before and gone_before <= {name for name, number in trainer.pruner.plan.counts.items() if not number}
    assert trainer.pruner.sparsity() >= trainer.args.target_sparsity
    trainer.save_model(str(tmp_path / "model"))


def test_two_runs_reach_what_one_would(tmp_path: Path) -> None:
    """Half of the way and then all of it: the target counts from the dense original in both."""
    first = make_trainer(tmp_path / "a", None, Rows(60), **{**FURTHER, "target_sparsity": 0.3})
    first.train()
    assert 0.3 <= first.pruner.sparsity() < 0.45
    second = make_trainer(tmp_path / "b", first.model, Rows(60), **{**FURTHER, "target_sparsity": 0.6})
    second.train()
    assert 0.6 <= second.pruner.sparsity() < 0.75
    dense = counted_block_parameters_of(tiny_model("bert"))
    assert counted_block_parameters(second) <= 0.4 * dense
    with pytest.raises(
        UserError, match=r"target_sparsity=0.6 is a fraction of the dense original, of which .* lost 0\.6"
    ):
        make_trainer(tmp_path / "c", second.model, Rows(60), **{**FURTHER, "target_sparsity": 0.6})


READER = """
import sys
import torch
from safetensors.torch import load_file, save_file
import apt_trainer
from transformers import AutoModelForSequenceClassification

with torch.no_grad():
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
    logits = model(**load_file(sys.argv[2])).logits
save_file({"logits": logits}, sys.argv[3])
"""


def test_what_was_pruned_twice_loads_in_a_new_process(starts: Callable[[str], Path], tmp_path: Path) -> None:
    trainer = further(tmp_path / "run", starts("bert"), "bert")
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "small")
    batch = {name: value for name, value in tiny_batch(trainer.model).items() if name != "labels"}
    save_file(batch, tmp_path / "batch.safetensors")
    paths = [str(tmp_path / name) for name in ("small", "batch.safetensors", "logits.safetensors")]
    subprocess.run([warm.python(), "-c", READER, *paths], check=True)
    expected = logits(trainer.model.eval(), batch)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


def test_a_norm_that_was_kept_decides_what_others_leave(tmp_path: Path) -> None:
    model = tiny_model("bert")
    family, spaces, dense = parts(model)
    family.set_post_norm_policy(model.config, "keep_norm")
    plan = random_plan(spaces, dense, 1, vanish=gone(spaces))
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match="Set post_norm_policy: keep_norm"):
        make_trainer(
            tmp_path / "other", load_pruned(tmp_path / "start"), Rows(60), **{**FURTHER, "target_sparsity": 0.8}
        )
    trainer = further(tmp_path / "run", tmp_path / "start", "bert", post_norm_policy="keep_norm", target_sparsity=0.8)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    again, batch = load_pruned(tmp_path / "model").eval(), tiny_batch(trainer.model)
    assert torch.equal(logits(again, batch), logits(trainer.model.eval(), batch))


def test_a_painted_model_is_no_start(tmp_path: Path) -> None:
    model = paint(pruned(tiny_model("llama", "ForCausalLM"))[0], full(3))
    with pytest.raises(UserError, match="runs its layers by an execution plan and cannot be pruned"):
        make_trainer(tmp_path, model, Rows(60, "text"), **FURTHER)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("3", "has 0 units of layers.1.heads left, but .* 2"),
        ("x", "does not tell which units of layers.1.heads are left"),
    ],
)
def test_a_start_that_says_what_it_has_not(
    starts: Callable[[str], Path], tmp_path: Path, bits: str, expected: str
) -> None:
    shutil.copytree(starts("bert"), tmp_path / "start")
    file = tmp_path / "start" / "config.json"
    config = json.loads(file.read_text())
    config["apt_kept"]["layers.1.heads"] = bits
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=expected):
        starting_point(load_pruned(tmp_path / "start"))


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_start_of_version_0_1_0(
    starts: Callable[[str], Path], tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its config does not say which units are left; the plan beside it may."""
    expected = starting_point(load_pruned(starts(name))).plan
    shutil.copytree(starts(name), tmp_path / "start")
    file = tmp_path / "start" / "config.json"
    config = json.loads(file.read_text())
    del config["apt_kept"]
    file.write_text(json.dumps(config))
    plan = starting_point(load_pruned(tmp_path / "start")).plan
    assert "count those it has from 0" in caplog.text and plan.counts == expected.counts
    if name == "t5":  # whose attentions share a table of the dense heads
        assert all(plan.kept[space] == units for space, units in expected.kept.items() if "heads" in space)
    (tmp_path / "start" / "pruning_plan.json").write_text(json.dumps(expected.to_json()))
    assert starting_point(load_pruned(tmp_path / "start")).plan == expected


# ---------------------------------------------------------------------- from the command line

RECIPE: dict[str, Any] = {
    **SHORT,
    "task": "language_modeling",
    "max_length": 8,
    "target_sparsity": 0.6,
    "round_to": 1,
    "min_hidden": 8,
    "lora_r": 2,
    "heldout_fraction": 0.1,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "measure_latency": False,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a text in ``text.txt`` and in ``small`` a model without an attention, a feed-forward and a head."""
    folder = save_dense(tmp_path_factory.mktemp("dropped"), words(300), num_hidden_layers=3)
    units = [("attention", 1), ("mlp", 0), ("head", 0)]
    entries = [{"kind": kind, "layer": layer, "stack": "decoder"} for kind, layer in units]
    entries[2]["head"] = 1
    (folder / "list.json").write_text(json.dumps({"format_version": 1, "units": entries}))
    assert depth("drop", folder / "model", folder, folder / "small", "--drop_list", str(folder / "list.json")) == 0
    return folder


def depth(verb: str, model: Path, folder: Path, output: Path, *more: str) -> int:
    data = ["--data", str(folder / "text.txt"), "--length", "8", "--samples", "8", "--device", "cpu"]
    return cli.main([verb, "--model", str(model), *data, "--output", str(output), *more])


def recipe(folder: Path, model: Path, output: Path, **changes: Any) -> list[str]:
    text = str(folder / "text.txt")
    files = {"model_name_or_path": str(model), "output_dir": str(output), "train_file": text, "validation_file": text}
    output.parent.mkdir(parents=True, exist_ok=True)
    (output.parent / "recipe.yaml").write_text(json.dumps({**RECIPE, **files, **changes}))
    return ["--config", str(output.parent / "recipe.yaml")]


def test_a_dropped_model_is_planned_trained_measured_and_trained_again(
    dropped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = load_pruned(dropped / "small")
    lost = AdaptivePruner(start, MethodSettings(target_sparsity=None)).sparsity()
    out = tmp_path / "one" / "out"
    given = recipe(dropped, dropped / "small", out)
    assert cli.main(["plan", *given]) == 0
    text = capsys.readouterr().out
    assert f"{lost:.1%} of params removed before" in text
    assert "3 (0 to 2) of 3 × 2" in text and "128 (0 to 64) of 3 × 64" in text
    table = re.sub(" +", " ", text)
    assert "| params removed | of this model |" in table and f"| {lost:.1%} | 0 % |" in table
    assert f"| 60.0% | {1 - 0.4 / (1 - lost):.1%} |" in table
    assert cli.main(["train", *given]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["sparsity"] >= 0.6
    assert metrics["total_params_dense"] == count_parameters(tiny_llama(num_hidden_layers=3))
    assert metrics["total_params_start"] == count_parameters(load_pruned(dropped / "small"))
    assert metrics["block_params"] < metrics["block_params_start"] < metrics["block_params_dense"]
    assert metrics["sparsity_of_start"] == pytest.approx(1 - metrics["block_params"] / metrics["block_params_start"])
    assert cli.main(["evaluate", str(out), *given]) == 0
    capsys.readouterr()
    for verb in ("plan", "train"):
        assert cli.main([verb, *recipe(dropped, out, tmp_path / "two" / "out")]) == 2
        assert "target_sparsity=0.6 is a fraction of the dense original" in capsys.readouterr().err
        dense = recipe(dropped, out, tmp_path / "three" / "out", dense_baseline=True)
        assert cli.main([verb, *dense]) == 2
        assert "dense_baseline: false" in capsys.readouterr().err
    tuned = recipe(dropped, out, tmp_path / "two" / "out", target_sparsity=None, distillation="none")
    assert cli.main(["plan", *tuned]) == 0 and cli.main(["train", *tuned]) == 0
    again = json.loads((tmp_path / "two" / "out" / "metrics.json").read_text())
    assert again["sparsity"] == metrics["sparsity"] and again["sparsity_of_start"] == 0


@pytest.mark.parametrize(
    ("name", "head", "task"),
    [
        ("bert", "ForMaskedLM", "token_classification"),
        ("gpt2", "ForCausalLM", "classification"),
        ("t5", "ForConditionalGeneration", "token_classification"),
    ],
)
def test_a_pruned_model_starts_a_task_with_another_head(
    name: str, head: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a dense checkpoint does: the body is that of the start, the head is made anew."""
    tokenizer = word_tokenizer()
    model = tiny_model(name, head, vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=0)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=5, vanish=["layers.1.heads", "encoder.1.heads"])
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    one = task == "classification"
    rows = [{"text": [f"w{i % 7}", "w9"], "label": ["A", "B"]} for i in range(24)]
    if one:
        rows = [{"text": f"w{i % 7} w9", "label": "AB"[i % 2]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model_name_or_path", tmp_path / "start", "--train_file", tmp_path / "rows.jsonl", "--task", task]
    given += ["--output_dir", tmp_path / "out", "--target_sparsity", "null", "--distillation", "none", "--use_cpu"]
    given += ["--max_steps", "2", "--report_to", "none", "--measure_latency", "false", "--max_length", "8"]
    given += ["--tune", "adapters", "--lora_r", "2", "--learning_rate", "1e-9"]
    words_given = [str(word) for word in given]
    assert cli.main(["plan", *words_given]) == 0
    assert "of params removed before" in capsys.readouterr().out
    assert cli.main(["train", *words_given]) == 0
    small = load_pruned(tmp_path / "out")
    assert type(small).__name__.endswith("ForSequenceClassification" if one else "ForTokenClassification")
    ours, theirs = (m.base_model.state_dict() for m in (small, load_pruned(tmp_path / "start")))
    shared = [path for path in ours if path in theirs]
    assert len(shared) > 10 and all(gap(ours[path], theirs[path]) < 1e-6 for path in shared)
    assert cli.main(["evaluate", str(tmp_path / "out")]) == 0


def test_studies_of_a_dropped_model(dropped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = dropped / "small"
    assert depth("analyze", small, dropped, tmp_path / "scores") == 0
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    names = [unit["name"] for unit in scores["units"]]
    assert "attention 1" not in names and "mlp 0" not in names
    assert {"attention 0", "attention 2", "mlp 1", "mlp 2", "block 0", "block 1", "block 2"} == set(names)
    test = ["--test", str(dropped / "text.txt"), "--counts", "1", "--kinds", "attention", "heads", "block"]
    assert depth("curve", small, dropped, tmp_path / "curve", *test) == 0
    assert depth("paint", small, dropped, tmp_path / "paint", "--starts", "0") == 0
    capsys.readouterr()
    assert depth("drop", small, dropped, tmp_path / "less", "--kind", "joint", "--count", "2") == 0
    assert "of dense" in capsys.readouterr().out
    report = json.loads((tmp_path / "less" / "drop_report.json").read_text())
    model = load_pruned(tmp_path / "less")
    dense, start = (counted_block_parameters_of(m) for m in (tiny_llama(num_hidden_layers=3), load_pruned(small)))
    left = counted_block_parameters_of(model)
    assert report["of_dense"] == {"depth_share": 4 / 6, "block_parameter_share": pytest.approx(1 - left / dense)}
    assert report["block_parameter_share"] == pytest.approx(1 - left / start)
    page = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "less"), "--output", str(page)]) == 0 and "less" in page.read_text()
    metrics = json.loads((tmp_path / "less" / "metrics.json").read_text())
    assert metrics["sparsity"] == pytest.approx(1 - left / dense)
    plan = starting_point(model).plan
    assert [len(plan.kept[f"layers.{layer}.heads"]) for layer in (0, 1)][1] == 0
    assert plan.kept["layers.0.heads"] in ((0,), ())
    assert depth("drop", small, dropped, tmp_path / "twice", "--drop_list", str(dropped / "list.json")) == 2
    assert "attention 1 does not exist: the model has" in capsys.readouterr().err


# ---------------------------------------------------------------------- in several processes

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero3": {"deepspeed": deepspeed_config(3)},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
}
WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from edges import test_pruned_further as module
from integration.factories import losses_of, weights_of

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for name in (folder / "engines").read_text().split():
    settings = module.ENGINES[name]
    trainer = module.in_halves(folder / name, folder / "start", 4, ddp_backend="gloo", **settings)
    trainer.train()
    save_file(weights_of(trainer.model), folder / f"{{name}}.{{rank}}.safetensors")
    result = {{"plan": trainer.pruner.plan.to_json(), "losses": losses_of(trainer), "world": trainer.args.world_size}}
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
torch.distributed.barrier()
os._exit(0)
"""


def in_halves(folder: Path, start: Path, rows: int, **changes: Any) -> APTTrainer:
    """A run from ``start`` in batches of ``rows`` on each process, of rows that all weigh the same."""
    options = {"heldout_dataset": Rows(16, padded=False)}
    changes = {**FURTHER, "target_sparsity": 0.8, "per_device_train_batch_size": rows, **changes}
    return make_trainer(folder, load_pruned(start), Rows(96, padded=False), options, **changes)


@pytest.mark.distributed
@pytest.mark.parametrize("engines", [("ddp", "zero3"), ("fsdp2",)], ids="-".join)
def test_two_processes_equal_one_from_a_pruned_model(tmp_path: Path, engines: tuple[str, ...]) -> None:
    pruned(tiny_model("bert"))[0].save_pretrained(tmp_path / "start")
    alone = in_halves(tmp_path / "alone", tmp_path / "start", 8)
    alone.train()
    assert alone.pruner.sparsity() >= 0.8
    (tmp_path / "engines").write_text(" ".join(engines))
    two_processes(tmp_path, WORKER, *(f"{name}.{rank}.json" for name in engines for rank in (0, 1)))
    for name in engines:
        found = [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
        weights = load_file(tmp_path / f"{name}.0.safetensors")
        assert found[0] == found[1] and found[0]["world"] == 2
        assert found[0]["plan"] == alone.pruner.plan.to_json()
        for step, values in losses_of(alone).items():
            assert found[0]["losses"][str(step)][0] == pytest.approx(values[0], rel=1e-4)
        assert weights.keys() == weights_of(alone.model).keys()
        for key, weight in weights.items():
            assert key.endswith("key.bias") or torch.allclose(weight, alone.model.get_parameter(key), atol=1e-4), key
