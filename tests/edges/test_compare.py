"""The comparison with what else one could do: it runs, goes on where it was, and its tables are those of its runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import warm
from test_ablation import REPOSITORY, make_base
from texts import word_tokenizer
from tiny import tiny_model
from transformers import BertConfig, BertModel

from apt_trainer import load_pruned
from apt_trainer.measure import count_parameters
from apt_trainer.settings.recipe import load_recipe


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", REPOSITORY / "scripts" / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cells(table: str) -> dict[str, dict[str, str]]:
    """First column → header → text, of a table in Markdown."""
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def test_contenders_run_once_and_stand_in_two_tables(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", warm.python())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as where no torch-pruning is
    recipe = json.loads(make_base(tmp_path).read_text())
    config = BertConfig.from_pretrained(tmp_path / "model", num_hidden_layers=4)
    BertModel(config).save_pretrained(tmp_path / "model")
    del recipe["measure_latency"]
    recipe |= {"latency_length": 8, "latency_batch_sizes": [1, 2], "prune_targets": ["heads", "neurons"]}
    recipe |= {"save_strategy": "no", "distillation": "none", "round_to": 4}
    (tmp_path / "base.yaml").write_text(json.dumps(recipe))
    command = ["--protocol", "encoder", "--base", str(tmp_path / "base.yaml"), "--output_dir", str(tmp_path / "out")]
    command += ["--seeds", "1", "--steps", "4", "--rows", "16", "--jobs", "2", "--eval_steps", "0.5"]
    command += ["--contenders", "first_2", "ours_40", "torch_pruning"]
    assert script.main(command) == 0
    printed = capsys.readouterr()
    assert "torch_pruning is left out: it needs pip install torch-pruning." in printed.err
    found = {
        name: json.loads((tmp_path / "out" / name / "seed-1" / "metrics.json").read_text())
        for name in ("full", "first_2", "ours_40")
    }
    assert script.main(command) == 0
    again = capsys.readouterr()
    assert again.out == printed.out and "3 of them finished earlier" in again.err

    first, _, second = printed.out.strip().split("\n\n")
    rows = _cells(first)
    assert list(rows) == ["full", "first_2", "ours_40"]
    for name, metrics in found.items():
        assert metrics["train_steps"] == 4
        assert rows[name]["accuracy"].startswith(f"{metrics['task_metric']:.4f} (")
        share = metrics["task_metric"] / found["full"]["task_metric"]
        assert rows[name]["share of baseline"] == f"{share:.4f}"
        assert rows[name]["removed"] == f"{1 - metrics['block_params'] / found['full']['block_params']:.4f}"
        assert rows[name]["latency, batch 2"].split()[1] == "ms"
    assert rows["first_2"]["removed"] == "0.5000", "two of four layers"
    [(name, row)] = _cells(second).items()
    assert name == "ours_40 – first"
    sizes = [found[each]["total_params"] for each in ("first_2", "ours_40", "full")]
    low, own, high = (found[each]["task_metric"] for each in ("first_2", "ours_40", "full"))
    between = low + (high - low) * (sizes[1] - sizes[0]) / (sizes[2] - sizes[0])
    assert row["parameters"] == f"{own - between:+.4f}"


def test_wanda_cuts_each_layer_alike(script: ModuleType, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama", "ForCausalLM", vocab_size=40), word_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": f"w{i % 30}", "completion": f"w{(i + 1) % 30} w{i % 7}"}) for i in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    recipe = load_recipe(
        None,
        [
            "--task=instruction_tuning",
            f"--model_name_or_path={tmp_path / 'model'}",
            f"--train_file={tmp_path / 'train.jsonl'}",
            f"--output_dir={tmp_path / 'small'}",
            *(
                "--target_sparsity=0.2",
                "--round_to=1",
                "--prune_targets",
                "neurons",
                "--shape=uniform",
                "--use_cpu=true",
            ),
            *("--pruning_time=before", "--max_length=16", "--report_to=none"),
        ],
    )
    script.cut(recipe, script.wanda_scores, tmp_path / "small")
    small = load_pruned(tmp_path / "small")
    widths = {layer.mlp.up_proj.out_features for layer in small.model.layers}
    assert len(widths) == 1 and widths.pop() < model.config.intermediate_size
    assert count_parameters(small) < count_parameters(model)


def test_scores_of_wanda_are_those_of_its_weights(script: ModuleType) -> None:
    model = tiny_model("llama", "ForCausalLM").eval()
    ids = torch.arange(4, 16).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    space = SimpleNamespace(name="n", gate="model.layers.1.mlp.down_proj", size=model.config.intermediate_size)
    seen: list[torch.Tensor] = []
    gate = model.get_submodule(space.gate)
    gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    found = script.wanda_scores(model, [space], [{"input_ids": ids, "attention_mask": mask}])["n"]
    inputs = torch.cat([seen[0][0], seen[0][1, :4]])  # without padding
    expected = (gate.weight.abs() * inputs.norm(dim=0)[None]).norm(dim=0)
    assert torch.allclose(found, expected, rtol=1e-4)
