"""Other versions of transformers, torch, PEFT, accelerate and DeepSpeed: what follows them, and what is refused.

The whole suite runs with the versions of ``constraints.txt``; ``scripts/test_versions.sh`` runs a part of it with the
oldest, and with the newest.
"""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import peft
import pytest
import torch
import transformers
import warm
from integration.factories import make_trainer
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import FAMILY_NAMES, LANGUAGE_MODELS, parts, tiny_model
from torch import nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

import apt_trainer
from apt_trainer import APTTrainer, cli, load_pruned
from apt_trainer.errors import UserError
from apt_trainer.libraries import private_names, versions
from apt_trainer.libraries.private_names import NAMES, check_names, missing
from apt_trainer.models.modeling_apt import STUBS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(apt_trainer.__file__).parent


@pytest.fixture(autouse=True)
def looked_up_anew() -> Iterator[None]:
    missing.cache_clear()
    versions._warn_once.cache_clear()
    yield
    missing.cache_clear()


# ---------------------------------------------------------------------- stubs follow what they replace


class Old(nn.Module):
    layer_idx = 1

    def forward(self, hidden_states: Any, mask: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any: ...


class New(nn.Module):
    layer_idx = 1

    def forward(self, hidden_states: Any, cache: Any = None, mask: Any = None, **kwargs: Any) -> Any: ...


class ToCome(nn.Module):
    layer_idx = 1

    def forward(self, x: Any, *, kv: Any = None) -> Any: ...


@pytest.mark.parametrize(
    ("replaced", "args", "kwargs"),
    [
        (Old, ("hidden",), {"past_key_values": "cache"}),
        (Old, ("hidden", None, "cache"), {}),
        (New, (), {"hidden_states": "hidden", "cache": "cache", "use_cache": True}),
        (New, ("hidden", "cache"), {}),
        (ToCome, (), {"x": "hidden", "kv": "cache"}),
    ],
)
@pytest.mark.parametrize("pair", [False, True])
def test_a_removed_attention_finds_its_cache_under_any_name(
    replaced: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], pair: bool
) -> None:
    cache: Cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if pair else DynamicCache()
    hidden = torch.randn(2, 5, 4)
    values = {"hidden": hidden, "cache": cache}
    stub = STUBS["zero_attention"](replaced())
    given = [values.get(value, value) for value in args]  # type: ignore[call-overload]
    output, weights = stub(*given, **{name: values.get(value, value) for name, value in kwargs.items()})
    assert torch.equal(output, torch.zeros_like(hidden)) and weights is None
    assert cache.get_seq_length(1) == 5 and cache.get_seq_length(0) == 0


def test_a_removed_attention_hands_on_a_bias_however_it_is_given() -> None:
    class Biased(nn.Module):
        def forward(
            self, hidden_states: Any, mask: Any = None, position_bias: Any = None, cache: Any = None
        ) -> Any: ...

    hidden, bias = torch.randn(1, 2, 3), torch.randn(1, 1, 2, 2)
    stub = STUBS["pass_biased_attention"](Biased())
    for found in (stub(hidden, None, bias), stub(hidden_states=hidden, position_bias=bias, cache=DynamicCache())):
        assert found[0] is hidden and found[1] is bias and found[2] is None
    assert stub(hidden)[1] is None


@pytest.mark.parametrize("name", [*FAMILY_NAMES, *LANGUAGE_MODELS])
def test_every_stub_takes_what_the_module_it_replaces_takes(name: str) -> None:
    """By position and by the names of the installed version."""
    model = tiny_model(name, LANGUAGE_MODELS.get(name, "ForSequenceClassification"))
    family, _, _ = parts(model)
    for sublayer in family.sublayers(model):
        for described in sublayer.stubs:
            module = model.get_submodule(described.module)
            stub = STUBS[described.kind](module)
            number = 1 if described.kind == "pass_second" else 0
            hidden, other = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
            args = (other, hidden) if number else (hidden,)
            expected, by_name = stub(*args), stub(**dict(zip(stub.names, args, strict=False)))
            assert _same(expected, by_name) and stub.names


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(_same(one, other) for one, other in zip(a, b, strict=True))
    return a is b if a is None else bool(torch.equal(a, b))


# ---------------------------------------------------------------------- names that are relied on


@pytest.mark.parametrize("use", NAMES)
def test_the_installed_versions_have_every_name(use: private_names.Use) -> None:
    assert missing(use) == ()


def test_an_override_that_would_not_be_called_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(transformers.Trainer, "_run_epoch")
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"transformers {transformers.__version__} cannot be used")
    assert "Trainer._run_epoch" in message and "tested with transformers 5." in message


def test_a_parameter_that_was_renamed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(self: Any, model: Any, batch: Any, num_items_in_batch: Any = None) -> Any: ...

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    with pytest.raises(UserError, match="Trainer.training_step with inputs is gone, which is needed to"):
        make_trainer(tmp_path)


def test_an_attribute_that_is_no_longer_kept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mentioned = private_names._mentioned

    def without_models(code: CodeType) -> set[str]:
        return mentioned(code) - {"_models"}

    monkeypatch.setattr(private_names, "_mentioned", without_models)
    with pytest.raises(
        UserError, match="accelerate .* cannot be used: accelerate.accelerator.Accelerator with _models"
    ):
        make_trainer(tmp_path)


def test_what_an_engine_relies_on_is_looked_for_with_that_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    monkeypatch.delattr(DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state")
    mentioned = private_names._mentioned
    monkeypatch.setattr(
        private_names, "_mentioned", lambda code: mentioned(code) - {"_lazy_init_hp_params_optimizer_state"}
    )
    check_names("loading", "training", "zero")
    with pytest.raises(UserError, match="DeepSpeedZeroOptimizer with .*_lazy_init_hp_params_optimizer_state"):
        check_names("zero12")


def test_looking_for_names_imports_nothing_new() -> None:
    code = (
        "import sys, apt_trainer; from apt_trainer.training.trainer import APTTrainer; before = set(sys.modules); "
        "from apt_trainer.libraries.private_names import missing; "
        "missing('loading'), missing('method'), missing('training'); "
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('apt_trainer')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_the_table_holds_every_private_name_that_is_used() -> None:
    listed = {part for names in NAMES.values() for name in names for part in (*name.owner.split("."), *name.names)}
    own: set[str] = {"_asdict", "_replace", "_fields"}
    used: dict[str, str] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            elif isinstance(node, ast.Assign):
                own |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    own.add(node.attr)
                else:
                    used[node.attr] = file.name
            elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("apt_trainer"):
                named = [*node.module.split("."), *(alias.name for alias in node.names)]
                used |= {name: file.name for name in named if _is_private(name)}
    assert len(used) > 20
    assert {name: file for name, file in used.items() if name not in listed | own} == {}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_the_table_holds_every_method_of_the_trainer_that_is_overridden() -> None:
    listed = {part for name in NAMES["training"] for part in (name.owner.rpartition(".")[2], *name.names)}
    ours = [cls for cls in APTTrainer.__mro__ if cls.__module__.startswith("apt_trainer")]
    overridden = {name for cls in ours for name in vars(cls) if hasattr(transformers.Trainer, name)}
    assert len(overridden) > 15
    assert {name for name in overridden if not name.startswith("__")} - listed == set()


# ---------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("package", "version"), [("transformers", "5.22.2"), ("transformers", "6.0.0"), ("torch", "2.8.0+cu128")]
)
def test_a_version_outside_the_range_is_one_sentence(
    package: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.modules[package], "__version__", version)
    sentence = re.escape(f"{package} {version} cannot be used: apt_trainer is tested with torch 2.")
    with pytest.raises(UserError, match=sentence):
        make_trainer(tmp_path)
    with pytest.raises(UserError, match=sentence):
        load_pruned(tmp_path)
    with pytest.raises(UserError, match=sentence):
        apt_trainer.load_pruned  # noqa: B018
    assert apt_trainer.UserError is UserError
    assert cli.main(["plan", "--output_dir", str(tmp_path)]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert cli.main(["env"]) == 0
    assert re.search(rf"^versions +{sentence}", capsys.readouterr().out, re.MULTILINE)


def test_versions_that_are_newer_than_the_newest_tested_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    monkeypatch.setattr(peft, "__version__", versions.TESTED["peft"].newest + ".99")  # a fix of what is tested
    with caplog.at_level(logging.WARNING, logger="apt_trainer.libraries.versions"):
        make_trainer(tmp_path)
        make_trainer(tmp_path)
    assert (
        len([r for r in caplog.records if r.name == "apt_trainer.libraries.versions" and "transformers" in r.message])
        == 1
    )
    assert "transformers 5.99.0 is newer than 5." in caplog.text and "peft" not in caplog.text


def test_env_prints_the_build_of_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for build in ("2.14.1+cu130", "2.13.0+cpu", "2.14.0a0+git1234"):
        monkeypatch.setattr(torch, "__version__", build)
        assert cli.main(["env"]) == 0
        rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert rows["torch"] == build


def test_a_process_with_an_old_version_is_told_at_the_first_name_it_uses() -> None:
    code = (
        "import transformers; transformers.__version__ = '4.57.6'; import apt_trainer; "
        "from transformers import AutoConfig; from apt_trainer import APTTrainer"
    )
    done = subprocess.run(
        [warm.python(warm.LIBRARIES), "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert "UserError: transformers 4.57.6 cannot be used" in done.stderr.splitlines()[-1]


def test_the_ranges_say_the_same_everywhere() -> None:
    """``pyproject.toml``, the versions that are pinned for the tests, and the table."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = {r.name: r for r in map(Requirement, project["dependencies"] + extras["deepspeed"] + extras["embedding"])}
    usual, newest, oldest = (_pins(f"constraints{end}.txt") for end in ("", "-newest", "-oldest"))
    for package, tested in (versions.TESTED | versions.DEEPSPEED | versions.SENTENCE_TRANSFORMERS).items():
        bounds = {one.operator: one.version for one in asked[package].specifier}
        assert bounds[">="] == tested.oldest and bounds.get("<", tested.refused) == tested.refused
        for pinned, end in ((usual | newest, tested.newest), (usual | oldest, tested.oldest)):
            length = len(Version(end).release)
            assert Version(pinned[package]).release[:length] == Version(end).release, package
        assert Version(tested.oldest) <= Version(usual[package]) < Version(tested.refused)
        assert Version(usual[package]) <= Version((usual | newest)[package])


def _pins(file: str) -> dict[str, str]:
    lines = (ROOT / "scripts" / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
