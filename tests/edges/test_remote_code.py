"""A saved folder carries the code that loads it where apt_trainer is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.factories import SHORT, Rows, make_trainer
from safetensors.torch import save_file
from texts import word_tokenizer
from tiny import ALL_TASKS, FAMILY_NAMES, LANGUAGE_MODELS, VOCABULARY, parts, random_plan, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from apt_trainer import Plan, UserError, load_pruned, paint
from apt_trainer.models import modeling_apt
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

EVERY = dict.fromkeys(FAMILY_NAMES, "ForSequenceClassification") | LANGUAGE_MODELS
GONE = ("layers.0.heads", "layers.1.neurons", "encoder.1.heads", "decoder.0.cross_heads", "decoder.1.neurons")
SHAPES = ((4, 7), (1, 5), (2, 11))


def cut(name: str, task: str) -> PreTrainedModel:
    """A model without its first attention, a feed-forward, and some heads, neurons and hidden dimensions."""
    model = tiny_model(name, task)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=5, vanish=GONE)
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    return model.eval()


def batch(size: int, length: int, padding: str) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on one side."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, VOCABULARY, (size, length), generator=generator)
    mask = torch.arange(length) >= torch.arange(size)[:, None] % 4
    mask = mask if padding == "left" else mask.flip(1)
    return {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}


def answers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the model is asked and says: logits for several shapes, and the tokens that it generates."""
    found = {}
    for size, length in SHAPES:
        asked = batch(size, length, "right")
        if model.config.is_encoder_decoder:
            asked["decoder_input_ids"] = asked["input_ids"][:, :4].clone()
        with torch.no_grad():
            found |= {f"{size}x{length}.{name}": value for name, value in asked.items()}
            found[f"{size}x{length}.logits"] = model(**asked).logits
    if model.can_generate():
        asked = batch(3, 6, "left")
        found |= {f"generate.{name}": value for name, value in asked.items()}
        found["tokens"] = model.generate(**asked, max_new_tokens=6, do_sample=False)
    return found


CHECK = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "apt_trainer":
            raise ImportError("apt_trainer is not installed here")
sys.meta_path.insert(0, Blocker())
import torch, transformers
from safetensors.torch import load_file
torch.set_num_threads(1)
for name, auto in json.load(open("cases.json")).items():
    load = getattr(transformers, auto).from_pretrained
    model, info = load(name, trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    known, asked = load_file(name + ".safetensors"), {}
    for key, value in known.items():
        kind, _, what = key.partition(".")
        asked.setdefault(kind, {})[what] = value
    model.eval()
    for shape, values in asked.items():
        if shape not in ("generate", "tokens"):
            expected = values.pop("logits")
            with torch.no_grad():
                difference = (model(**values).logits - expected).abs().max().item()
            assert difference <= 1e-6, (name, shape, difference)
    if "tokens" in known:
        for use_cache in (True, False):
            options = dict(max_new_tokens=6, do_sample=False, use_cache=use_cache)
            assert torch.equal(model.generate(**asked["generate"], **options), known["tokens"]), (name, use_cache)
    again = load(name, trust_remote_code=True)
    again.save_pretrained("again")
    kept = {key: value for key, value in json.load(open("again/config.json")).items() if key != "dtype"}
    assert kept == {key: value for key, value in json.load(open(name + "/config.json")).items() if key != "dtype"}
    assert open("again/modeling_apt.py").read() == open(name + "/modeling_apt.py").read()
    base = transformers.AutoModel.from_pretrained(name, trust_remote_code=True)
    assert sum(p.numel() for p in base.parameters()) <= sum(p.numel() for p in model.parameters()) + 300
    print(name, "is equal")
from transformers import AutoTokenizer, pipeline
made = pipeline("text-generation", model="llama", trust_remote_code=True, device="cpu")
print(made("w1 w2 w3", max_new_tokens=3, do_sample=False))
from peft import LoraConfig, get_peft_model
wrapped = get_peft_model(made.model, LoraConfig())
assert wrapped.peft_config["default"].target_modules == {"q_proj", "v_proj"}
from lm_eval.models.huggingface import HFLM
scores = HFLM(pretrained="llama", trust_remote_code=True, device="cpu", batch_size=1, max_length=16)
print(scores.loglikelihood_rolling([type("Request", (), {"args": ("w1 w2 w3 w4",)})()], disable_tqdm=True))
try:
    transformers.AutoModelForCausalLM.from_pretrained("llama")
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise SystemExit("loaded code that was not trusted")
assert not [name for name in sys.modules if name.startswith("apt_trainer")]
"""


def test_every_family_loads_where_the_package_is_not_installed(tmp_path: Path) -> None:
    cases = {}
    for name, task in EVERY.items():
        model = cut(name, task)
        if name == "llama":
            model.resize_token_embeddings(len(word_tokenizer()))
            word_tokenizer().save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        source = Path(modeling_apt.__file__).read_text(encoding="utf-8")
        assert (tmp_path / name / "modeling_apt.py").read_text(encoding="utf-8") == source
        save_file({key: value.clone() for key, value in answers(model).items()}, tmp_path / f"{name}.safetensors")
        cases[name] = ALL_TASKS[task].__name__
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHECK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "code"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is equal") == len(EVERY)


def test_the_code_imports_torch_and_transformers_only() -> None:
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    assert set(get_imports(modeling_apt.__file__)) - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert get_relative_imports(modeling_apt.__file__) == []


def test_code_in_a_folder_is_not_run_where_the_package_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it says, trusted or not, and no one is asked."""
    cut("llama", "ForCausalLM").save_pretrained(tmp_path)
    (tmp_path / "modeling_apt.py").write_text("raise SystemExit('this was run')\n")
    monkeypatch.setattr("builtins.input", lambda *said: pytest.fail("asked for trust"))
    for trust in (None, True, False):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(model).__module__ == modeling_apt.__name__
    with pytest.raises(UserError, match="not the file that was saved with the model"):
        load_pruned(tmp_path, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    assert "this was run" not in (tmp_path / "again" / "modeling_apt.py").read_text()


def test_the_code_is_left_out_when_asked(tmp_path: Path) -> None:
    model = cut("bert", "ForSequenceClassification")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_apt.py").is_file()
    for saved in (model, None):  # the second time after loading, without saying it again
        if saved is None:
            load_pruned(tmp_path).save_pretrained(tmp_path)
        else:
            saved.save_pretrained(tmp_path, remote_code=False)
        assert not (tmp_path / "modeling_apt.py").exists()
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    load_pruned(tmp_path).save_pretrained(tmp_path, remote_code=True)
    assert (tmp_path / "modeling_apt.py").is_file()


@pytest.mark.parametrize("remote_code", [True, False])
def test_a_run_saves_the_code_as_it_is_told(remote_code: bool, tmp_path: Path) -> None:
    model = tiny_model("bert")
    trainer = make_trainer(tmp_path / "run", model, Rows(40), **{**SHORT, "remote_code": remote_code})
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    assert (tmp_path / "small" / "modeling_apt.py").is_file() == remote_code
    load_pruned(tmp_path / "small")


def test_a_stock_model_and_one_with_an_execution_plan_carry_no_code(tmp_path: Path) -> None:
    model = tiny_model("llama", "ForCausalLM")
    model.save_pretrained(tmp_path / "stock")
    paint(model, Plan(3, (0, 2, 1, 1))).save_pretrained(tmp_path / "painted")
    assert [path for path in tmp_path.rglob("modeling_apt.py")] == []
    small = cut("llama", "ForCausalLM")
    small.save_pretrained(tmp_path / "painted")
    paint(small, Plan(3, (0, 1))).save_pretrained(tmp_path / "painted")
    assert not (tmp_path / "painted" / "modeling_apt.py").exists()


def test_the_carried_code_refuses_what_the_package_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    cut("llama", "ForCausalLM").save_pretrained(tmp_path / "small")
    carried: Any = get_class_from_dynamic_module("modeling_apt.AptLlamaForCausalLM", str(tmp_path / "small"))
    config = carried.config_class.from_pretrained(tmp_path / "small")
    assert carried(config).num_parameters() == load_pruned(tmp_path / "small").num_parameters()
    name = next(iter(config.apt_structure["parameters"]))
    for wrong in ([10**12, None], [0, None], [-1, None], ["4", None], [2.0, None], None):
        config.apt_structure["parameters"][name] = wrong
        with pytest.raises(ValueError, match=r"The checkpoint gives .*shape"):
            carried(config)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/outside.safetensors", "inner/outside.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(place: str, tmp_path: Path) -> None:
    model = cut("bert", "ForSequenceClassification")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = place
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside"):
        load_pruned(tmp_path)
