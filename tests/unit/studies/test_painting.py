"""Execution plans: what they mean, that models run them exactly, with a cache too, keep them, and sweeps over them."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from texts import local_task, save_dense, tiny_llama, word_tokenizer, words
from tiny import LABELS, LANGUAGE_MODELS, VOCABULARY, gap, logits, randomise, tiny_batch, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    OPTForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from apt_trainer import APTConfig, APTTrainer, Plan, cli, load_pruned, paint
from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.models.execution import PaintedLayers, painted, put_plan
from apt_trainer.models.slots import layer_list_path
from apt_trainer.report.painting import paint_markdown, plot_paint
from apt_trainer.scoring.sublayers.drop import drop
from apt_trainer.scoring.sublayers.loss import exp_loss, loss_sums
from apt_trainer.scoring.sublayers.units import Unit, find_units
from apt_trainer.scoring.sublayers.windows import from_text
from apt_trainer.settings.execution_plan import Execution, Loop, Parallel, full, plan_from_json, read_plan
from apt_trainer.store.saved_model import dense_copy
from apt_trainer.studies import named_plans as named
from apt_trainer.studies.plan_scores import Benchmark, benchmarks_of, measured, summarise

DECODERS = {name: task for name, task in LANGUAGE_MODELS.items() if task == "ForCausalLM"}
MODELS = DECODERS | {
    "modernbert": "ForMaskedLM",
    "bert": "ForMaskedLM",
    "distilbert": "ForSequenceClassification",
    "roberta": "ForTokenClassification",
}
_INNER = Parallel(((0,), (1,)))
NESTED = Plan(3, (0, Loop(2, (Parallel(((1,), (2, _INNER))),)), 2))
PLANS = [
    named.skip(3, 0),
    named.reverse(3, 0),
    named.middle_repeat(3, 0),
    named.parallel(3, 0),
    named.looped_parallel(3, 0, 2),
    named.switch(3, 0),
    named.skip_one(3, 0),
    NESTED,
]


def model_of(name: str, **extra: object) -> PreTrainedModel:
    return tiny_model(name, MODELS[name], **extra)


# ---------------------------------------------------------------------- plans as data


@pytest.mark.parametrize(("layers", "start", "head", "centre", "affected"), [
    (32, 13, 14, 16, 5),
    (32, 14, 15, 16, 3),
    (32, 15, 16, 16, 1),
    (32, 0, 1, 16, 31),
    (24, 9, 10, 12, 5),
    (24, 11, 12, 12, 1),
])  # fmt: skip
def test_plans_of_the_paper(layers: int, start: int, head: int, centre: int, affected: int) -> None:
    middle = list(range(start + 1, layers - start))
    before, after = list(range(head)), list(range(layers - start, layers))
    assert len(middle) == affected and named.middle(layers, start) == tuple(middle)
    assert list(named.skip(layers, start).order) == before + after
    assert list(named.reverse(layers, start).order) == before + middle[::-1] + after
    assert list(named.middle_repeat(layers, start).order) == before + [centre] * affected + after
    order = list(named.shuffled(layers, start, 7).order)
    assert sorted(order) == list(range(layers)) and order[:head] == before and order[layers - start :] == after
    assert named.shuffled(layers, start, 7) == named.shuffled(layers, start, 7)
    assert list(named.parallel(layers, start).order) == before + middle + after
    assert list(named.looped_parallel(layers, start, 3).order) == before + middle * 3 + after
    if affected == 1:
        assert named.parallel(layers, start).executions == full(layers).executions
        assert list(named.looped_parallel(layers, start, 3).order) == before + middle * 3 + after
    else:
        assert named.shuffled(layers, start, 7) != named.shuffled(layers, start, 8)
        joined = [execution for execution in named.parallel(layers, start).executions if execution.after]
        assert [e.after for e in joined] == [("add",)] * (affected - 1) + [("join",)]
    once = named.looped_parallel(layers, start, 1)
    assert once.executions == named.parallel(layers, start).executions


def test_probes_and_bounds() -> None:
    assert named.skip_one(4, 2).order == (0, 1, 3) and named.switch(4, 2).order == (0, 1, 3, 2)
    for start in (-1, 2, 9):
        with pytest.raises(UserError, match=f"start={start} leaves no middle: a model of 4 layers has starts 0 to 1"):
            named.skip(4, start)
    with pytest.raises(UserError, match="runs layer 4, the model has layers 0 to 3"):
        Plan(4, (0, 4)).check()
    with pytest.raises(UserError, match="1,000,000,000 layers; at most 4,096"):
        Plan(4, (Loop(10**9, (1,)),)).check()
    for stages in ((), (Parallel(()),), (0, Parallel(((1,), ())))):
        with pytest.raises(UserError, match="runs no layer"):
            Plan(4, stages).check()


def test_what_a_plan_executes_says_and_saves(tmp_path: Path) -> None:
    assert NESTED.executions == 1 * (Execution(0),) + 2 * (
        Execution(1, ("fork",), ("add",)),
        Execution(2, ("switch",)),
        Execution(0, ("fork",), ("add",)),
        Execution(1, ("switch",), ("join", "join")),
    ) + (Execution(2),)
    assert str(NESTED) == "0 (1|2 (0|1))×2 2"
    assert str(named.looped_parallel(12, 4, 3)) == "0-4 (5|6|7)×3 8-11"
    assert str(Plan(4, (Loop(2, (0, 1)), 3))) == "[0 1]×2 3"
    path = tmp_path / "plan.json"
    for content in (NESTED.to_json("llama"), {"name": "a line", "plan": NESTED.to_json("llama")}):
        path.write_text(json.dumps(content))
        assert read_plan(str(path), "llama", 3) == NESTED
    with pytest.raises(UserError, match="of type 'llama', this one is 'gpt2'"):
        read_plan(str(path), "gpt2", 3)
    with pytest.raises(UserError, match="with 3 layers, this one has 5"):
        read_plan(str(path), "llama", 5)


@pytest.mark.parametrize(("stages", "message"), [
    ([0, 1, 7], "runs layer 7"),
    ([0, -1], "runs layer -1"),
    ([], "runs no layer"),
    ([0, "1"], "is no stage"),
    ([True], "is no stage"),
    ([{"parallel": []}], "is no stage"),
    ([{"parallel": [1], "loop": 2}], "is no stage"),
    ([{"loop": 0, "stages": [1]}], "is no stage"),
    ([{"loop": 2}], "is no stage"),
    ([{"parallel": [1, []]}], "branch of the plan runs no layer"),
    (3, "not a plan"),
])  # fmt: skip
def test_bad_plans(stages: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_from_json({"format_version": 1, "stages": stages}, "llama", 3)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    bad = {"[1": "cannot be read", "[1]": "not a plan", '{"stages": [0]}': "format_version=None"}
    for content, message in bad.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_plan(str(path), "llama", 3)
        assert str(path) in str(caught.value)


def test_points_of_a_sweep() -> None:
    points = named.sweep_points(6, seeds=range(2), loops=(2, 3))
    names = [point.name for point in points]
    assert names[0] == "full" and len(set(names)) == len(names) == 1 + 3 * (4 + 2 + 2) + 6 + 5
    assert [p.affected for p in points if p.method == "skip"] == [1, 3, 5]
    assert "random, start 0, seed 1" in names and "looped parallel, start 2, times 3" in names
    assert {p.start for p in named.sweep_points(6, ["skip"], starts=[1])} == {None, 1}
    with pytest.raises(UserError, match="the model has 1"):
        named.sweep_points(1)


# ---------------------------------------------------------------------- models run them


def by_hand(model: PreTrainedModel, batch: dict[str, Any], plan: Plan) -> torch.Tensor:
    """Output of the base model under ``plan``: the layers called one by one, each as the dense model calls it."""
    family = family_of(model.config)
    layers = model.get_submodule(layer_list_path(model, family))
    calls: dict[int, Any] = {}
    first: list[torch.Tensor] = []
    handles = []
    for number, layer in enumerate(layers):

        def hook(module, args, kwargs, number=number):  # type: ignore[no-untyped-def]
            calls[number] = (args[1:], kwargs)
            first.append(args[0])

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    base_output(model, batch)
    for handle in handles:
        handle.remove()

    def run(stages, states):  # type: ignore[no-untyped-def]
        for stage in stages:
            if isinstance(stage, int):
                args, kwargs = calls[stage]
                states = layers[stage](states, *args, **kwargs)
            elif isinstance(stage, Loop):
                for _ in range(stage.times):
                    states = run(stage.stages, states)
            else:
                states = torch.stack([run(branch, states) for branch in stage.branches]).mean(0)
        return states

    with torch.no_grad():
        states = run(plan.stages, first[0])
        for norm in family.stacks[0].final_norms:
            states = model.get_submodule(family.prefix(model) + norm)(states)
    return states


@torch.no_grad()
def base_output(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    uncached = {"use_cache": False} if model.can_generate() else {}
    return model.base_model(**inputs, **uncached)[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_painted_model_equals_its_layers_called_by_hand(name: str) -> None:
    model = model_of(name)
    batch = tiny_batch(model)
    batch["attention_mask"][0] = 1  # a decoder's mask must not be left out for a batch without padding
    before, weights = logits(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.to_dict()
    real = batch["attention_mask"].bool()
    for plan in PLANS:
        expected = by_hand(model, batch, plan)
        with painted(model, plan):
            found = base_output(model, batch)
            assert list(model.state_dict()) == list(weights)
        assert gap(found[real], expected[real]) <= 2e-5 * float(expected[real].abs().max()), str(plan)
        assert gap(found[real], base_output(model, batch)[real]) > 0.01, str(plan)
    assert torch.equal(logits(model, batch), before) and model.config.to_dict() == config
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_plans_that_mean_the_full_model() -> None:
    model = model_of("llama", layers=4)
    batch = tiny_batch(model)
    expected = logits(model, batch)
    for plan in (full(4), named.parallel(4, 1), named.reverse(4, 1), Plan(4, (Loop(1, (0, 1)), Parallel(((2, 3),))))):
        with painted(model, plan):
            assert torch.equal(logits(model, batch), expected)
    with painted(model, Plan(4, (0, 1, Parallel(((2,), (2,), (2,))), 3))):  # the mean of equal outputs
        assert gap(logits(model, batch), expected) <= 1e-5


def test_half_precision_averages_in_single_precision() -> None:
    model = model_of("llama").to(torch.bfloat16)
    batch = tiny_batch(model)
    expected = logits(model, batch)
    with painted(model, Plan(3, (0, Parallel(((1,),) * 7), 2))):
        found = logits(model, batch)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@torch.no_grad()
def step_by_step(model: PreTrainedModel, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of ``ids`` from a prompt and then token by token through the cache."""
    out = model(ids[:, :prompt], use_cache=True)
    found = [out.logits]
    for position in range(prompt, ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", DECODERS)
def test_cached_equals_uncached_under_every_plan(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(4, VOCABULARY, (2, 12))  # longer than the sliding windows of 5
    for plan in PLANS:
        with painted(model, plan):
            with torch.no_grad():
                whole = model(ids, use_cache=False).logits
                cache = model(ids, use_cache=True).past_key_values
            assert len(cache.layers) == len(plan.executions)
            assert gap(step_by_step(model, ids, 4), whole) <= 1e-4 * float(whole.abs().max()), str(plan)
    with torch.no_grad():
        assert gap(step_by_step(model, ids, 4), model(ids, use_cache=False).logits) <= 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_under_a_plan(name: str, options: dict[str, Any]) -> None:
    model = model_of(name)
    ids = torch.randint(4, VOCABULARY, (2, 7))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for plan in (named.looped_parallel(3, 0, 2), named.skip_one(3, 0), NESTED):
        with painted(model, plan):
            beams = {key: value for key, value in options.items() if key == "num_beams"}
            expected = model.generate(ids, use_cache=False, **settings, **beams)
            assert torch.equal(model.generate(ids, **settings, **options), expected), str(plan)


def test_a_plan_leaves_after_an_error_and_refusals() -> None:
    model = model_of("qwen2")
    config = model.config.to_dict()
    with pytest.raises(ZeroDivisionError), painted(model, NESTED):
        assert model.config.layer_types == [config["layer_types"][i] for i in NESTED.order]
        raise ZeroDivisionError
    assert model.config.to_dict() == config and not any(isinstance(m, PaintedLayers) for m in model.modules())
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    with painted(model, NESTED), pytest.raises(UserError, match="by an execution plan already"):
        put_plan(model, NESTED)
    with pytest.raises(UserError, match="with 4 layers, this one has 3"):
        put_plan(model, full(4))
    two = tiny_model("t5", "ForConditionalGeneration")
    with pytest.raises(UserError, match="has an encoder and a decoder"):
        paint(two, full(3))
    random_depth = OPTForCausalLM(tiny_config("opt", layerdrop=0.5))
    with pytest.raises(UserError, match="layerdrop"):
        paint(random_depth, full(3))
    assert type(random_depth) is OPTForCausalLM
    unknown = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", n_layer=2, hidden_size=8, n_head=2))
    with pytest.raises(UserError, match="'bloom' has no ModelFamily"):
        paint(unknown, full(2))


# ---------------------------------------------------------------------- models keep them


@pytest.mark.parametrize("name", MODELS)
def test_kept_plans_reload_equal(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    batch = tiny_batch(model)
    with painted(model, NESTED):
        expected = logits(model, batch)
    dense = model.config.to_dict()
    assert paint(model, NESTED) is model and torch.equal(logits(model, batch), expected)
    model.save_pretrained(tmp_path)
    again = load_pruned(tmp_path).eval()
    assert gap(logits(again, batch), expected) <= 1e-6 and again.config.num_hidden_layers == len(NESTED.executions)
    assert gap(logits(copy.deepcopy(again), batch), expected) <= 1e-6
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["apt_format_version"] == 3 and written["model_type"] == f"apt_{name}"
    for key in ("num_hidden_layers", "n_layers", "n_layer", "layer_types"):
        assert written.get(key, dense.get(key)) == dense.get(key)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written
    shape = dense_copy(again)
    assert {k: v.shape for k, v in shape.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="by an execution plan already"):
        paint(again, NESTED)
    with pytest.raises(UserError):
        find_units(again)


def test_a_plan_of_another_depth_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    paint(model_of("llama"), NESTED).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match="with 3 layers, this one has 2"):
        load_pruned(tmp_path)


def test_a_pruned_model_may_be_painted_but_not_the_other_way_round(tmp_path: Path) -> None:
    model = model_of("llama")
    units = find_units(model)
    drop(model, units, [Unit("attention", 0), Unit("mlp", 2)])
    before = logits(model, tiny_batch(model))
    paint(model, NESTED)
    ids = torch.randint(4, VOCABULARY, (2, 10))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert gap(step_by_step(model, ids, 4), whole) <= 1e-4
    model.save_pretrained(tmp_path)
    batch = tiny_batch(model)
    assert torch.equal(logits(load_pruned(tmp_path).eval(), batch), logits(model, batch))
    assert gap(logits(model, batch), before) > 0.01
    with pytest.raises(UserError):
        APTTrainer(model, APTConfig(output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_kept_plan_is_fine_tuned(checkpointing: bool, tmp_path: Path) -> None:
    model = paint(model_of("llama"), Plan(3, (0, Parallel(((2,), (0,))), 2)))
    batch = tiny_batch(model)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=0.05,
        save_steps=1,
        report_to="none",
        gradient_checkpointing=checkpointing,
        use_cpu=True,
    )
    Trainer(model, args, train_dataset=rows).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {int(name.split(".")[2]) for name in moved if ".layers." in name} == {0, 2}  # 1 does not run
    assert gap(logits(load_pruned(tmp_path / "checkpoint-2").eval(), batch), logits(model.eval(), batch)) <= 1e-6
    first = load_pruned(tmp_path / "checkpoint-1")
    Trainer(first, args, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert gap(logits(first.eval(), batch), logits(model.eval(), batch)) <= 1e-5


def test_gradients_add_up_over_the_runs_of_a_layer() -> None:
    model = paint(model_of("gpt2"), named.middle_repeat(3, 0))
    batch = tiny_batch(model)
    model(**batch).loss.backward()
    weight = model.transformer.h[1].mlp.c_fc.weight
    analytic = float(weight.grad[3, 5])
    losses = []
    for shift in (1e-2, -1e-2):
        with torch.no_grad():
            weight[3, 5] += shift
            losses.append(float(model(**batch).loss))
            weight[3, 5] -= shift
    assert analytic == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.02, abs=1e-4)
    assert model.transformer.h[2].mlp.c_fc.weight.grad is None  # the middle is layer 1 twice; layer 2 does not run


def test_adapters_act_in_every_run() -> None:
    model = paint(model_of("llama"), NESTED)
    batch = tiny_batch(model)
    plain = logits(model, batch)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(model, adapters).eval()
    adapted = logits(tuned, batch)
    assert gap(adapted, plain) > 0.01
    merged = tuned.merge_and_unload()
    assert gap(logits(merged, batch), adapted) <= 1e-4


# ---------------------------------------------------------------------- scores


def test_scores_lie_between_guessing_and_the_full_model() -> None:
    tasks = {
        "choices": {"examples": 4, "metrics": {"acc": {"value": 0.5}, "acc_norm": {"value": 0.75}}, "chance": 0.25},
        "answers": {"examples": 4, "metrics": {"exact_match (strict)": {"value": 0.4}}},
        "group": {"examples": 0, "metrics": {"acc": {"value": 0.1}}},
        "words": {"examples": 4, "metrics": {"word_perplexity": {"value": 12.0}}},
        "dull": {"examples": 4, "metrics": {"acc": {"value": 0.25}}, "chance": 0.25},
    }
    whole = measured(2.0, tasks)
    assert {name: one["metric"] for name, one in whole["tasks"].items()} == {
        "choices": "acc_norm",
        "answers": "exact_match (strict)",
        "dull": "acc",
    }
    benchmarks, warnings = benchmarks_of(whole, guess=4.0)
    assert benchmarks == [
        Benchmark("text", "loss", -4.0, -2.0),
        Benchmark("choices", "acc_norm", 0.25, 0.75),
        Benchmark("answers", "exact_match (strict)", 0.0, 0.4),
    ]
    assert len(warnings) == 1 and "dull is left out" in warnings[0]
    assert benchmarks_of(whole, None)[0] == benchmarks[1:]

    def under(loss: float | None, choices: float, answers: float) -> dict[str, Any]:
        values = {"choices": choices, "answers": answers, "dull": 0.25}
        metrics = {"choices": "acc_norm", "answers": "exact_match (strict)", "dull": "acc"}
        return {"loss": loss, "tasks": {n: {"metric": metrics[n], "value": v} for n, v in values.items()}}

    points = [
        named.Point("full", full(6)),
        *[named.Point("random", named.shuffled(6, 1, seed), 1, seed=seed, affected=3) for seed in (0, 1)],
        named.Point("skip", named.skip(6, 1), 1, affected=3),
    ]
    rows = summarise(points, [whole, under(3.0, 0.5, 0.1), under(2.5, 0.65, 0.3), under(None, 0.2, 0.0)], benchmarks)
    assert [row["name"] for row in rows] == ["full", "random, start 1", "skip, start 1"]
    assert rows[0]["normalised"] == {"text": 1.0, "choices": 1.0, "answers": 1.0} and rows[0]["median"] == 1.0
    assert rows[1]["normalised"] == pytest.approx({"text": 0.625, "choices": 0.65, "answers": 0.5})
    assert rows[1]["median"] == pytest.approx(0.625) and rows[1]["medians"] == pytest.approx([0.5, 0.75])
    assert rows[1]["perplexity"] == pytest.approx(math.exp(2.75)) and rows[1]["seeds"] == 2
    assert rows[2]["normalised"]["text"] is None and rows[2]["median"] == pytest.approx(-0.1)
    assert rows[2]["loss"] is None and rows[2]["perplexity"] is None


def test_figures_are_those_there_are_numbers_for(tmp_path: Path) -> None:
    benchmarks = [Benchmark("a", "acc", 0.0, 0.8), Benchmark("b", "acc", 0.5, 0.9)]
    points = named.sweep_points(6, ["skip", "looped_parallel"], loops=(1, 2))
    task = {"metric": "acc"}
    measurements = [
        {"loss": None, "tasks": {"a": {**task, "value": 0.8 / n}, "b": {**task, "value": 0.9 - n / 100}}}
        for n in range(1, len(points) + 1)
    ]
    rows = summarise(points, measurements, benchmarks)
    described = [benchmark._asdict() for benchmark in benchmarks]
    found = {"model": "m", "layers": 6, "loss_name": None, "rows": rows, "benchmarks": described}
    assert plot_paint(found, tmp_path) == ["methods.png", "benchmarks.png", "loops.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["benchmarks.png", "loops.png", "methods.png"]
    lines = paint_markdown(found).splitlines()
    first = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert first[:5] == ["middle", "------", "1", "3", "5"]
    skipped = next(row for row in rows if row["name"] == "skip, start 1")
    assert f"{skipped['median']:.3f}" in next(line for line in lines if line.startswith("| 3 "))


# ---------------------------------------------------------------------- sweeps


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"), words(60), num_hidden_layers=4)


def command(saved: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(saved / "text.txt"), "--length", "8", "--device", "cpu", "--output", str(out)]
    return ["paint", "--model", str(saved / "model"), *data, *more]


def test_sweep_stops_goes_on_and_grows(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from apt_trainer.studies import paint as verb

    out, calls = tmp_path / "out", []

    def interrupted(*args):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss_sums(*args)

    monkeypatch.setattr(verb, "loss_sums", interrupted)
    sweep = command(saved, out, "--seeds", "2", "--loops", "2", "3")
    assert cli.main(sweep) == 130 and not (out / "summary.json").exists()
    assert len((out / "results.jsonl").read_text().splitlines()) == 1 + 4
    assert cli.main(sweep) == 2 and "--resume" in capsys.readouterr().err
    other = [word if word != "8" else "9" for word in sweep]
    assert cli.main([*other, "--resume"]) == 2 and "other" not in (out / "results.jsonl").read_text()
    assert "another model, data or tasks" in capsys.readouterr().err
    assert cli.main([*sweep, "--resume"]) == 0
    points = named.sweep_points(4, seeds=range(2), loops=(2, 3))
    distinct = {point.plan.executions for point in points}
    assert len(distinct) < len(points) and len(calls) == len(distinct) + 1  # each once; the fifth was broken off
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [plan_from_json(line["plan"], "llama", 4).executions for line in lines[1:]] == list(
        dict.fromkeys(point.plan.executions for point in points)
    )
    found = json.loads((out / "summary.json").read_text())
    assert cli.main([*sweep, "--resume"]) == 0 and len(calls) == len(distinct) + 1
    assert json.loads((out / "summary.json").read_text()) == found
    capsys.readouterr()
    assert cli.main([*command(saved, out, "--seeds", "20", "--loops", "2", "3"), "--resume"]) == 0
    more = {point.plan.executions for point in named.sweep_points(4, seeds=range(20), loops=(2, 3))}
    assert len(calls) == len(more) + 1 > len(distinct) + 1
    assert (out / "summary.md").read_text() in capsys.readouterr().out
    for name in ("methods", "probes", "loops", "similarity"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not (out / "benchmarks.png").exists()


def test_what_a_sweep_measures(saved: Path, tmp_path: Path, capsys) -> None:
    out, plan = tmp_path / "out", tmp_path / "mine.json"
    plan.write_text(json.dumps(Plan(4, (3, Loop(2, (1, 2)), 0)).to_json("llama")))
    words_ = ["--methods", "reverse", "random", "switch", "--seeds", "2", "--plans", str(plan)]
    assert cli.main(command(saved, out, *words_)) == 0
    found = json.loads((out / "summary.json").read_text())
    model = tiny_llama(num_hidden_layers=4)
    units = find_units(model)
    batches = from_text(words(60), word_tokenizer(), model, units, 64, 8).batches
    rows = {row["name"]: row for row in found["rows"]}

    def loss(plan: Plan) -> float:
        with painted(model, plan):
            return math.log(exp_loss(model, units, batches))

    assert rows["full"]["loss"] == pytest.approx(loss(full(4)), rel=1e-6)
    assert rows["reverse, start 0"]["loss"] == pytest.approx(loss(named.reverse(4, 0)), rel=1e-6)
    assert rows["switch, layer 2"]["loss"] == pytest.approx(loss(named.switch(4, 2)), rel=1e-6)
    assert rows["mine"]["loss"] == pytest.approx(loss(Plan(4, (3, 1, 2, 1, 2, 0))), rel=1e-6)
    drawn = [loss(named.shuffled(4, 0, seed)) for seed in (0, 1)]
    assert rows["random, start 0"]["loss"] == pytest.approx(sum(drawn) / 2, rel=1e-6)
    printed = capsys.readouterr()
    if rows["full"]["loss"] < math.log(model.config.vocab_size):
        assert rows["full"]["median"] == 1.0
    else:
        assert found["benchmarks"] == [] and "no better than guessing" in printed.err
    assert "[1 2]×2" in printed.out and found["layers"] == 4 and len(found["similarity"]) == 5


def test_sweep_on_tasks(saved: Path, tmp_path: Path, capsys) -> None:
    piqa = [
        {"goal": words(4, i), "sol1": words(2 + i % 3, 50 + i), "sol2": words(5 - i % 4, 99 + i), "label": i % 2}
        for i in range(12)
    ]
    blimp = [{"UID": "x", "sentence_good": words(5, 200 + i), "sentence_bad": words(6, 300 + i)} for i in range(8)]
    tasks = ",".join([local_task(tmp_path, "piqa", piqa), local_task(tmp_path, "blimp", blimp)])
    out = tmp_path / "out"
    words_ = ["paint", "--model", str(saved / "model"), "--device", "cpu", "--lm_eval", tasks, "--output", str(out)]
    assert cli.main([*words_, "--methods", "skip", "parallel"]) == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines[0]["lm_eval"]["limit"] is None and len(lines) == 1 + 4  # parallel with a middle of one is full
    for line in lines[1:]:
        assert line["loss"] is None and line["tasks"]["my_piqa"]["metric"] == "acc_norm"
        assert {task["chance"] for task in line["tasks"].values()} == {0.5}
    found = json.loads((out / "summary.json").read_text())
    for row, line in zip(found["rows"], (lines[1], lines[2], lines[1], lines[3], lines[4]), strict=True):
        assert row["values"] == {name: task["value"] for name, task in line["tasks"].items()}
    assert (out / "benchmarks.png").exists() == (len(found["benchmarks"]) > 1) and not (out / "probes.png").exists()
    assert "similarity" not in found and "perplexity" not in capsys.readouterr().out
    assert cli.main([*words_, "--limit", "3", "--resume"]) == 2 and "tasks" in capsys.readouterr().err


def test_sweep_on_an_encoder_with_labelled_rows(tmp_path: Path, capsys) -> None:
    config = tiny_config("bert", num_labels=LABELS)
    config.vocab_size = len(word_tokenizer())
    model = BertForSequenceClassification(config)
    randomise(model, seed=6)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": words(5, seed), "label": seed % LABELS} for seed in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words_ = ["paint", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main([*words_, "--data", str(tmp_path / "rows.jsonl"), "--methods", "skip", "reverse"]) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["loss_name"] == "exp(loss)" and [row["name"] for row in found["rows"][1:]] == [
        "skip, start 0",
        "reverse, start 0",
    ]
    losses = [row["loss"] for row in found["rows"]]
    assert len(set(losses)) == 3 and all(math.isfinite(loss) for loss in losses)
    capsys.readouterr()
    assert cli.main([*words_, "--data", words(40), "--output", str(tmp_path / "text")]) == 2
    assert "no loss on plain text" in capsys.readouterr().err and not (tmp_path / "text").exists()


def test_keep_saves_the_model_with_a_plan(saved: Path, tmp_path: Path, capsys) -> None:
    plan = named.looped_parallel(4, 0, 2)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json("llama")))
    out = tmp_path / "kept"
    assert cli.main(command(saved, out, "--keep", str(tmp_path / "plan.json"))) == 0
    printed = capsys.readouterr().out
    assert "0 (1|2|3)×2" in printed and "perplexity" in printed and "→" in printed
    model, batch = tiny_llama(num_hidden_layers=4), {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with painted(model, plan):
        expected = logits(model, batch)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval(), batch), expected)
    assert read_plan(str(out / "execution_plan.json"), "llama", 4) == plan
    assert cli.main(["paint", "--model", str(out), *command(saved, tmp_path / "again")[3:]]) == 2
    assert "Start from the model without one" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "message"), [
    (["--starts", "2"], "start=2 leaves no middle: a model of 4 layers has starts 0 to 1"),
    (["--length", "5000"], "positions of the model"),
    (["--length", "32", "--data", "only three words"], "fewer than one window"),
    (["--data", "missing.txt"], "there is no such file"),
    (["--plans", "{gpt2}"], "of type 'gpt2', this one is 'llama'"),
    (["--keep", "{deep}"], "with 9 layers, this one has 4"),
    (["--keep", "missing.json"], "cannot be read as a plan"),
])  # fmt: skip
def test_bad_input_is_told_before_weights_load(
    changes: list[str], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from apt_trainer.studies import inputs

    monkeypatch.setattr(inputs, "load_saved", lambda settings: pytest.fail("weights were loaded"))
    files = {"gpt2": full(4).to_json("gpt2"), "deep": full(9).to_json("llama")}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    words_ = [word.format(**{name: tmp_path / name for name in files}) for word in changes]
    out = tmp_path / "out"
    assert cli.main([*command(saved, out), *words_]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_models_and_requests_that_cannot_be_swept(saved: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["paint", "--model", str(saved / "model"), "--output", str(out)]) == 2
    assert "nothing to measure plans on" in capsys.readouterr().err
    for name, config in (("bloom", AutoConfig.for_model("bloom")), ("t5", tiny_config("t5"))):
        folder = tmp_path / name
        config.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        assert cli.main(["paint", "--model", str(folder), *command(saved, out)[3:]]) == 2
    printed = capsys.readouterr().err
    assert "'bloom' has no ModelFamily" in printed and "has an encoder and a decoder" in printed and not out.exists()


def test_losses_that_are_not_finite(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from apt_trainer.studies import paint as verb

    out = tmp_path / "out"
    monkeypatch.setattr(verb, "loss_sums", lambda *args: [(math.inf, 1)])
    monkeypatch.setattr(verb, "exp_loss", lambda *args: math.inf)
    assert cli.main(command(saved, out)) == 2
    assert "perplexity of the full model is not finite" in capsys.readouterr().err and not out.exists()
    (tmp_path / "plan.json").write_text(json.dumps(named.reverse(4, 0).to_json("llama")))
    assert cli.main(command(saved, out, "--keep", str(tmp_path / "plan.json"))) == 2
    assert "under this plan the perplexity is not finite" in capsys.readouterr().err and not out.exists()
    losses = iter([math.log(3.0), math.inf, math.log(9.0)])
    monkeypatch.setattr(verb, "loss_sums", lambda *args: [(next(losses), 1)])
    assert cli.main(command(saved, out, "--methods", "skip", "reverse", "--starts", "0")) == 0
    assert "not finite under 1 plans, such as skip, start 0" in capsys.readouterr().err
    found = json.loads((out / "summary.json").read_text())
    assert [row["perplexity"] for row in found["rows"]] == [pytest.approx(3.0), None, pytest.approx(9.0)]
    assert found["rows"][1]["median"] is None and found["rows"][0]["median"] == 1.0
