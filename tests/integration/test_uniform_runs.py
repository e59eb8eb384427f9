"""Equal layers end as stock checkpoints, read by plain transformers; runs of them resume, distil and meet budgets."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from texts import TOKENS, word_tokenizer, words
from tiny import ALL_TASKS, LANGUAGE_MODELS, parts, tiny_batch, tiny_config, tiny_model
from transformers import PreTrainedModel

from apt_trainer import APTConfig, APTTrainer, UserError, load_pruned
from apt_trainer.cli.train import result_text
from apt_trainer.measure import count_parameters
from apt_trainer.models import HIDDEN, Space
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.runs import dry_run
from apt_trainer.runs.run import train
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.pretrained import load_dense_shape, load_saved, load_shape
from apt_trainer.store.saved_model import as_pruned, dense_copy
from apt_trainer.store.starting_point import starting_point
from apt_trainer.studies.drop import DropRequest, drop_units
from apt_trainer.surgery.cutting import apply_plan
from integration.factories import DEFAULTS, SHORT, Rows, make_trainer, weights_of

FAMILIES = {name: "ForSequenceClassification" for name in ("bert", "roberta", "xlm-roberta", "distilbert")}
FAMILIES |= LANGUAGE_MODELS
OF_HEADS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3", "gemma2", "gemma3_text")
OF_HIDDEN = tuple(name for name in OF_HEADS if not name.startswith("gemma"))
LAYERS = 4

STOCK = """
import json, pathlib, sys
sys.modules["apt_trainer"] = None  # an import of it fails
import torch, transformers
for name, auto in json.loads(sys.argv[2]).items():
    folder = pathlib.Path(sys.argv[1], name)
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    problems = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
    assert not problems, (name, problems)
    given = torch.load(folder / "given.pt", weights_only=True)
    result = {"logits": model.eval()(**given).logits.detach()}
    if model.can_generate():
        start = {key: given[key] for key in ("input_ids", "attention_mask")}
        result["tokens"] = model.generate(**start, max_new_tokens=5, do_sample=False)
    torch.save(result, folder / "result.pt")
"""


def uniform_plan(
    spaces: list[Space], dense: PruningPlan, kinds: tuple[str, ...], gone: tuple[str, ...]
) -> PruningPlan:
    """Other units in each space, as many in all of a kind; nothing in the layers ``gone``."""
    generator = torch.Generator().manual_seed(4)
    number = {"heads": 2, "neurons": 12, "hidden": 12}
    kept = dict(dense.kept)
    for space in spaces:
        if space.name.startswith(tuple(f"{layer}." for layer in gone)):
            kept[space.name] = ()
        elif space.kind in kinds:
            units = torch.randperm(space.size, generator=generator)[: number[space.kind]]
            kept[space.name] = tuple(sorted(units.tolist()))
    return PruningPlan(kept)


def cut(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """``model`` cut to ``plan``, with no-ops where layers were."""
    family, spaces, dense = parts(model)
    apply_plan(model, family, spaces, dense, plan)
    return model


def finished(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    family, _, _ = parts(model)
    as_pruned(cut(model, plan), family, plan)
    return model


def given_to(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    batch = tiny_batch(model)
    given = {name: value for name, value in batch.items() if "label" not in name}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = batch["labels"].clamp(min=0)
    return given


def dense_model(name: str) -> PreTrainedModel:
    """Of four layers, of two kinds where a family has them."""
    extra: dict[str, Any] = {}
    if name in ("gemma2", "gemma3_text"):
        extra["layer_types"] = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    if name == "smollm3":
        extra["no_rope_layers"] = [1, 0, 0, 1]
    return tiny_model(name, FAMILIES[name], layers=LAYERS, **extra)


def case(name: str) -> tuple[PreTrainedModel, PruningPlan]:
    """A dense model of a family, and equal layers of it: all kinds that its config can say, one layer less."""
    model = dense_model(name)
    _, spaces, dense = parts(model)
    kinds = ("neurons", *(["heads"] if name in OF_HEADS else []), *(["hidden"] if name in OF_HIDDEN else []))
    gone = ("encoder.2", "decoder.1") if model.config.is_encoder_decoder else ("layers.1",)
    return model, uniform_plan(spaces, dense, kinds, gone)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all families, saved as stock checkpoints, with what one process without apt_trainer made of them."""
    root = tmp_path_factory.mktemp("stock")
    for name in FAMILIES:
        model, plan = case(name)
        finished(model, plan).save_pretrained(root / name)
        torch.save(given_to(model), root / name / "given.pt")
    classes = json.dumps({name: ALL_TASKS[task].__name__ for name, task in FAMILIES.items()})
    done = subprocess.run(
        [warm.python(warm.LIBRARIES), "-c", STOCK, str(root), classes], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_transformers_reads_equal_layers_with_equal_logits(answers: Path, name: str) -> None:
    model, plan = case(name)
    expected, given = cut(model, plan).eval(), given_to(model)
    result = torch.load(answers / name / "result.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], expected(**given).logits, rtol=1e-5, atol=1e-5)
        if expected.can_generate():
            start = {key: given[key] for key in ("input_ids", "attention_mask")}
            tokens = expected.generate(**start, max_new_tokens=5, do_sample=False)
            assert torch.equal(result["tokens"], tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_is_a_smaller_stock_one(answers: Path, name: str) -> None:
    said = json.loads((answers / name / "config.json").read_text())
    model, _ = case(name)
    assert said["model_type"] == model.config.model_type
    assert "apt_structure" not in said and not said["architectures"][0].startswith("Apt")
    if name in OF_HEADS:
        assert (said["num_attention_heads"], said["num_key_value_heads"], said["head_dim"]) == (4, 2, 6)
        assert (said["intermediate_size"], said["num_hidden_layers"]) == (12, LAYERS - 1)
        assert said["hidden_size"] == (12 if name in OF_HIDDEN else 16)
    if name == "smollm3":
        assert said["no_rope_layers"] == [1, 0, 1]
    if name.startswith("gemma"):
        assert said["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    again = load_pruned(answers / name)
    assert count_parameters(dense_copy(again, "meta")) == count_parameters(case(name)[0])


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_the_finished_model_itself_is_the_stock_one(name: str) -> None:
    model, plan = case(name)
    given = given_to(model)
    weights = {id(p) for p in cut(model, plan).parameters()}
    with torch.no_grad():
        expected = model.eval()(**given).logits
    stock = type(model)
    as_pruned(model, parts(case(name)[0])[0], plan)
    assert type(model) is stock and {id(p) for p in model.parameters()} == weights
    assert not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, expected, rtol=1e-5, atol=1e-5)
    slots = [m.layer_idx for m in model.modules() if type(getattr(m, "layer_idx", None)) is int]
    assert sorted(set(slots)) == list(range(len(set(slots))))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"layers.0.neurons": 8}),
        ("llama", {"layers.0.heads": 3}),
        ("llama", {"layers.0.heads": 0}),
        ("bert", {"layers.0.heads": 3}),
        ("bert", dict.fromkeys((f"layers.{i}.heads" for i in range(LAYERS)), 2)),
        ("bert", {HIDDEN: 12}),
        ("gpt2", {HIDDEN: 12}),
        ("gemma2", {HIDDEN: 12}),
        ("t5", {HIDDEN: 12}),
        ("t5", {f"{place}.heads": 2 for place in ("encoder.0", "encoder.1", "encoder.2", "encoder.3")}),
        ("modernbert", {"layers.0.heads": 0, "layers.0.neurons": 0}),
    ],
)
def test_what_no_stock_config_can_say_keeps_its_own_format(name: str, change: dict[str, int], tmp_path: Path) -> None:
    model = dense_model(name)
    _, _, dense = parts(model)
    kept = {space: units[: change.get(space, len(units))] for space, units in dense.kept.items()}
    given = given_to(model)
    finished(model, PruningPlan(kept)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"apt_{name}"
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path).eval()(**given).logits, model.eval()(**given).logits)


def test_a_kept_norm_is_no_whole_layer() -> None:
    model = tiny_model("bert", layers=LAYERS, apt_post_norm_policy="keep_norm")
    _, spaces, dense = parts(model)
    finished(model, uniform_plan(spaces, dense, (), ("layers.1",)))
    assert hasattr(model.config, "apt_structure")


# ---------------------------------------------------------------------- whole runs

UNIFORM: dict[str, Any] = SHORT | {"shape": "uniform", "target_sparsity": 0.5, "round_to": 4, "min_hidden": 8}


def _run(folder: Path, name: str, **changes: Any) -> APTTrainer:
    rows = Rows(task={"t5": "target", "bert": "classification"}.get(name, "text"))
    return make_trainer(folder, dense_model(name), rows, **{**UNIFORM, **changes})


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "all_kinds": ("llama", {}),
    "whole_layers": ("llama", {"prune_targets": ["heads", "neurons", "sublayers"], "target_sparsity": 0.6}),
    "layers_only": ("qwen2", {"prune_targets": ["sublayers"], "importance": "cosine"}),
    "nri": ("llama", {"prune_targets": ["sublayers"], "importance": "nri", "mask_window": 0}),
    "neurons_of_bert": ("bert", {"prune_targets": ["neurons"], "target_sparsity": 0.3}),
    "two_stacks": ("t5", {"prune_targets": ["neurons", "sublayers"]}),
    "flops": ("gemma2", {"sparsity_metric": "flops", "prune_targets": ["heads", "neurons"]}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_ends_as_a_stock_checkpoint_within_its_budget(run: str, tmp_path: Path) -> None:
    name, changes = RUNS[run]
    trainer = _run(tmp_path, name, **changes)
    stock = type(trainer.model)
    trainer.train()
    plan, pruner = trainer.pruner.plan, trainer.pruner
    assert pruner.sparsity() >= pruner.settings.target_sparsity
    for kind in ("heads", "neurons"):
        left = {plan.counts[s.name] for s in pruner.spaces if s.kind == kind} - {0}
        assert len(left) == 1, (kind, left)
    trainer.save_model()
    assert type(trainer.model) is stock
    again = stock.from_pretrained(tmp_path).eval()
    given = given_to(again)
    with torch.no_grad():
        assert torch.equal(again(**given).logits, trainer.model.eval()(**given).logits)
    assert PruningPlan.from_json(json.loads((tmp_path / "pruning_plan.json").read_text())) == plan


@pytest.mark.parametrize("run", ["all_kinds", "whole_layers"])
@pytest.mark.parametrize("step", [4, 6])
def test_straight_and_resumed_are_equal(run: str, step: int, tmp_path: Path) -> None:
    name, changes = RUNS[run]
    changes = changes | {"save_strategy": "steps", "save_steps": 2}
    whole, resumed = (_run(tmp_path / which, name, **changes) for which in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert resumed.pruner.plan == whole.pruner.plan
    expected, got = weights_of(whole.model), weights_of(resumed.model)
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def test_the_result_trains_on_as_any_stock_model(tmp_path: Path) -> None:
    """As a dense model of its own: it is cut once more, and becomes a smaller stock checkpoint still."""
    first = _run(tmp_path / "first", "llama")
    first.train()
    first.save_model()
    model = type(first.model).from_pretrained(tmp_path / "first")
    before = count_parameters(model)
    second = make_trainer(tmp_path / "second", model, Rows(task="text"), **UNIFORM)
    second.train()
    second.save_model()
    again = type(model).from_pretrained(tmp_path / "second")
    assert count_parameters(again) < before
    assert again.config.num_hidden_layers == LAYERS


def test_what_a_config_cannot_say_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bert cannot say fewer heads or hidden dimensions.*\[neurons, sublayers\]"):
        _run(tmp_path, "bert")
    with pytest.raises(
        UserError, match=r"target_sparsity=0.99 takes more than .* the largest that does not is 0\.\d+"
    ):
        _run(tmp_path, "llama", target_sparsity=0.99)


def test_a_pruned_start_that_no_stock_config_describes_is_refused(tmp_path: Path) -> None:
    model = dense_model("llama")
    _, _, dense = parts(model)
    uneven = PruningPlan({**dense.kept, "layers.0.neurons": dense.kept["layers.0.neurons"][:8]})
    finished(model, uneven).save_pretrained(tmp_path / "first")
    word_tokenizer().save_pretrained(tmp_path / "first")
    refused = "shape: uniform starts from a stock model, but this one was pruned"
    with pytest.raises(UserError, match=refused):
        make_trainer(tmp_path / "second", load_pruned(tmp_path / "first"), Rows(task="text"), **UNIFORM)
    request = DropRequest(kind="block", count=1, method="random", shape="uniform")
    with pytest.raises(UserError, match=refused):
        drop_units(ModelSettings(str(tmp_path / "first")), request, str(tmp_path / "smaller"), device="cpu")


def test_a_stock_result_is_a_dense_model_of_its_own_for_a_free_cut(tmp_path: Path) -> None:
    model, plan = case("llama")
    finished(model, plan).save_pretrained(tmp_path / "stock")
    stock = ModelSettings(str(tmp_path / "stock"))
    first, second = load_saved(stock), load_pruned(tmp_path / "stock")
    own, sizes = count_parameters(first), {p.shape for p in first.parameters()}
    assert {p.shape for p in load_shape(stock).parameters()} == sizes == {p.shape for p in second.parameters()}
    assert count_parameters(load_dense_shape(stock)) == count_parameters(case("llama")[0]) > own
    _, _, dense = parts(first)
    finished(first, PruningPlan({**dense.kept, "layers.0.neurons": (1, 2, 5)})).save_pretrained(tmp_path / "free")
    again = load_pruned(tmp_path / "free").eval()
    assert count_parameters(dense_copy(again, "meta")) == own > count_parameters(again)
    given = given_to(again)
    with torch.no_grad():
        assert torch.equal(again(**given).logits, first.eval()(**given).logits)
    start = starting_point(again)
    assert len(start.plan.kept["layers.0.neurons"]) == 3 and start.is_pruned


def test_unprunable_runs_ask_nothing_of_a_shape(tmp_path: Path) -> None:
    trainer = _run(tmp_path, "bert", target_sparsity=None)
    assert trainer.pruner.budget.shape is None


# ---------------------------------------------------------------------- recipes


def _recipe(folder: Path, family: str, **changes: Any) -> Recipe:
    settings = tiny_config(family, LAYERS)
    settings.vocab_size = len(TOKENS)
    ALL_TASKS[FAMILIES[family]].from_config(settings).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("\n".join(words(7, i) for i in range(100)))
    training = APTConfig(str(folder / "out"), **{**DEFAULTS, **UNIFORM, "measure_latency": False, **changes})
    data = DataSettings(task="language_modeling", train_file=str(text), validation_file=str(text), max_length=8)
    return Recipe(ModelSettings(str(folder / "model")), data, training, path=None, given={})


def test_the_dry_run_says_what_equal_layers_keep(tmp_path: Path) -> None:
    text = dry_run.plan(_recipe(tmp_path, "llama"))
    found = re.search(
        r"stock checkpoint of 4 of 4 layers; about (\d) of 4 heads and (\d+) of 20 neurons in each", text
    )
    assert found is not None, text
    heads, neurons = map(int, found.groups())
    kept = re.search(r"kept in all about (\d+) heads \(free: \d+\), (\d+) neurons \(free: \d+\)", text)
    assert kept is not None and (int(kept[1]), int(kept[2])) == (4 * heads, 4 * neurons)
    assert "shape" not in dry_run.plan(_recipe(tmp_path, "llama", shape="free"))


def test_dry_run_and_run_refuse_what_a_config_cannot_say_before_anything_loads(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "gpt2")
    (tmp_path / "model" / "model.safetensors").unlink()
    for start in (dry_run.plan, train):
        with pytest.raises(UserError, match="config of gpt2 cannot say fewer heads or hidden dimensions"):
            start(recipe)


def test_a_recipe_measures_the_dense_model_beside_its_stock_result(tmp_path: Path) -> None:
    metrics = train(_recipe(tmp_path, "llama"))
    assert metrics["sparsity"] >= 0.5
    assert metrics["total_params"] < metrics["total_params_dense"]
    assert metrics["disk_bytes_dense"] > metrics["disk_bytes"] * 1.1
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| parameters | {metrics['total_params_dense']:,} | {metrics['total_params']:,} |" in card
    assert "Pruned model" in card and "from transformers import LlamaForCausalLM" in card
    assert "from transformers import LlamaForCausalLM" in result_text(metrics, str(tmp_path / "out"))


@pytest.mark.parametrize("sparsity", [None, 0.3])
def test_metrics_of_a_stock_start_are_those_of_one_dense_model(sparsity: float | None, tmp_path: Path) -> None:
    """Which is the start, whatever it was cut from."""
    recipe = _recipe(tmp_path, "llama", shape="free", target_sparsity=sparsity)
    model, plan = case("llama")
    finished(model, plan)
    model.resize_token_embeddings(len(TOKENS))
    model.save_pretrained(tmp_path / "model")
    metrics = train(recipe)
    assert metrics["total_params_dense"] == count_parameters(model)
    embeddings_head_and_norm = 2 * len(TOKENS) * 12 + 12
    assert metrics["block_params_dense"] == count_parameters(model) - embeddings_head_and_norm
    assert (metrics["total_params"] < metrics["total_params_dense"]) == (sparsity is not None)


# ---------------------------------------------------------------------- drops


def _drop(folder: Path, family: str, **request: Any) -> Any:
    _recipe(folder, family)
    model = ModelSettings(str(folder / "model"))
    return drop_units(model, DropRequest(**{"method": "random", **request}), str(folder / "smaller"), device="cpu")


def test_a_drop_of_layers_is_a_stock_checkpoint(tmp_path: Path) -> None:
    _drop(tmp_path, "qwen2", kind="block", count=2, shape="uniform")
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["num_hidden_layers"] == len(config["layer_types"]) == LAYERS - 2
    with pytest.raises(UserError, match="config of gpt2 cannot say fewer heads"):
        _drop(tmp_path / "gpt2", "gpt2", kind="heads", count=4, shape="uniform")


def test_a_uniform_drop_of_heads_takes_as_many_from_each_attention(tmp_path: Path) -> None:
    report = _drop(tmp_path, "llama", kind="heads", count=2 * LAYERS - 1, shape="uniform")
    lost = [int(name.split()[1].split(".")[0]) for name in report["dropped"]]
    assert sorted(lost) == sorted(2 * list(range(LAYERS)))
    config = json.loads((tmp_path / "smaller" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["head_dim"]) == (2, 4, 6)
    again = load_saved(ModelSettings(str(tmp_path / "smaller")))
    assert type(again).__name__ == "LlamaForCausalLM"
    once_more = drop_units(
        ModelSettings(str(tmp_path / "smaller")),
        DropRequest(kind="block", count=1, method="random"),
        str(tmp_path / "smallest"),
        device="cpu",
    )
    assert once_more["parameters"] == count_parameters(again)


def test_drops_that_are_no_stock_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"whole layers \(kind block or consecutive\).*not kind mlp"):
        _drop(tmp_path / "mlp", "llama", kind="mlp", count=1, shape="uniform")
    with pytest.raises(UserError, match="no stock config of llama describes the model.*Nothing was written"):
        _drop(tmp_path / "three", "llama", kind="heads", count=LAYERS, shape="uniform")  # 16 / 6 heads
    assert not (tmp_path / "three" / "smaller" / "config.json").exists()
