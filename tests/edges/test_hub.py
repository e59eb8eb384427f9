"""``push_to_hub`` uploads the finished model and its card, once; what stands against it is told before training.

The hub is a stub of its HTTP endpoint on this machine, which keeps the files it is sent.
"""

from __future__ import annotations

import base64
import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import filter_repo_objects
from integration.factories import make_trainer
from texts import tiny_llama, word_tokenizer
from tiny import logits, tiny_batch, tiny_model
from transformers import AutoTokenizer

from apt_trainer import APTTrainer, UserError, load_pruned
from apt_trainer.errors import RunError
from apt_trainer.runs.dry_run import plan
from apt_trainer.runs.run import evaluate, train
from apt_trainer.settings.recipe import Recipe, load_recipe

FEW: dict[str, Any] = {"max_steps": 3, "num_pruning_events": 1, "pruning_start": 0, "pruning_end": 2, "mask_window": 1}
FEW |= {"distillation": "none"}


class Hub(BaseHTTPRequestHandler):
    """Knows one user, whose repository others can read; answers what ``create_repo`` and ``upload_folder`` ask."""

    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        refused = self.path.endswith("/auth-check/write") and self.headers.get("Authorization") != "Bearer hf_good"
        self._answer(
            {"name": "me", "type": "user", "sha": "0" * 40, "id": "me/small", "siblings": []}, 403 if refused else 200
        )

    def do_HEAD(self) -> None:
        self._answer({}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        url = f"http://127.0.0.1:{self.server.server_port}/me/small"
        if self.headers.get("Authorization") != "Bearer hf_good" or self.server.broken in self.path:
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.server.repository = json.loads(body)
            self._answer({"url": url, "name": "me/small", "id": "1"})
        elif self.path.endswith("/api/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in named]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{url}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer({"error": self.path}, 404)

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.repository, server.broken = {}, [], None, "/nothing/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield server
    server.shutdown()
    server.server_close()


def few(folder: Path, **changes: Any) -> APTTrainer:
    options = {"processing_class": word_tokenizer()}
    return make_trainer(folder, tiny_model("bert", layers=2), None, options, **{**FEW, **changes})


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Of a small run on texts, into ``out`` in ``folder``."""
    tiny_llama().save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": i % 2} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"model_name_or_path": folder / "dense", "train_file": folder / "rows.jsonl", "use_cpu": "true"}
    words |= {"output_dir": folder / "out", "max_length": 8, "report_to": "none", "measure_latency": "false"}
    words |= {"round_to": 4, "min_hidden": 8, "lora_r": 2, **FEW, **changes}
    return load_recipe(None, [word for key, value in words.items() for word in (f"--{key}", str(value))])


def commits(hub: Any) -> int:
    return sum("/commit/" in path for path, _ in hub.asked)


def received(hub: Any, folder: Path) -> Path:
    """A folder with what the hub was sent."""
    for name, content in sorted(hub.files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_run_with_push_to_hub_uploads_its_model_once(tmp_path: Path, hub: Any) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    asked = {"push_to_hub": True, "hub_model_id": "me/small", "hub_private_repo": True}
    trainer = few(tmp_path / "out", **saving, **asked)
    assert hub.repository["name"] == "small" and hub.repository["visibility"] == "private" and not hub.files
    trainer.train()
    assert commits(hub) == 1
    of_run = [name for name in hub.files if name.startswith((".", "checkpoint", "apt_")) or name.endswith("jsonl")]
    assert of_run == []
    got = received(hub, tmp_path / "got")
    batch = tiny_batch(trainer.model)
    assert torch.equal(logits(load_pruned(got).eval(), batch), logits(trainer.model.eval(), batch))
    assert torch.equal(logits(load_pruned(tmp_path / "out").eval(), batch), logits(trainer.model, batch))
    assert AutoTokenizer.from_pretrained(got)("w1 w2").input_ids == word_tokenizer()("w1 w2").input_ids
    card = ModelCard.load(got / "README.md")
    assert card.data.library_name == "transformers" and "pruned" in card.data.tags
    assert f"{sum(p.numel() for p in trainer.model.parameters()):,}" in card.content
    assert "load_pruned" in card.content
    assert not list((tmp_path / "out").glob(".*"))


def test_push_to_hub_by_hand_uploads_the_model_with_what_its_card_is_told(tmp_path: Path, hub: Any) -> None:
    trainer = few(tmp_path / "out")
    with pytest.raises(UserError, match=r"call it after train\(\)"):
        trainer.push_to_hub()
    trainer.train()
    told = {"language": "en", "license": "mit", "tags": "mine", "finetuned_from": "them/base", "dataset": "News"}
    trainer.push_to_hub(**told, tasks="text-classification", blocking=False, token="hf_good").result()
    assert hub.repository["name"] == "out" and commits(hub) == 1
    got = received(hub, tmp_path / "got")
    batch = tiny_batch(trainer.model)
    assert torch.equal(logits(load_pruned(got).eval(), batch), logits(trainer.model.eval(), batch))
    card = ModelCard.load(got / "README.md")
    assert (card.data.language, card.data.license, card.data.base_model) == ("en", "mit", "them/base")
    assert card.data.pipeline_tag == "text-classification" and "mine" in card.data.tags and "News" in card.content


def test_a_run_of_a_recipe_uploads_its_model_and_no_token_stays(tmp_path: Path, hub: Any) -> None:
    metrics = train(recipe(tmp_path, push_to_hub="true", hub_model_id="me/small", hub_token="hf_good"))
    assert commits(hub) == 1 and metrics["sparsity"] >= 0.5
    assert f"{metrics['task_metric']:.4f}" in hub.files["README.md"].decode()
    got, out = load_pruned(received(hub, tmp_path / "got")).eval(), load_pruned(tmp_path / "out").eval()
    batch = {"input_ids": torch.tensor([[5, 9, 7]])}
    assert torch.equal(logits(got, batch), logits(out, batch))
    written = [*(tmp_path / "out").glob("*.json"), tmp_path / "out" / "README.md"]
    assert "hf_good" not in "".join(file.read_text() for file in written)
    asked = len(hub.asked)
    scores = evaluate(str(tmp_path / "out"))
    assert scores[f"{metrics['evaluated_on']}_accuracy"] == metrics["task_metric"]
    assert len(hub.asked) == asked


def test_exports_are_uploaded_with_the_model_also_where_one_of_them_fails(tmp_path: Path, hub: Any) -> None:
    (tmp_path / "out" / "export").mkdir(parents=True)
    (tmp_path / "out" / "export" / "onnx").write_text("in the way")
    asked = recipe(tmp_path, push_to_hub="true", hub_model_id="me/small", export="[onnx, onnx_int8]")
    again = r"writing it as onnx failed .*not empty.*apt-trainer export .*out --format onnx --output DIR tries again"
    with pytest.raises(RunError, match=again):
        train(asked)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["exports"]) == ["onnx_int8"] and commits(hub) == 1
    file = Path("export") / "onnx_int8" / metrics["exports"]["onnx_int8"]["file"]
    got = received(hub, tmp_path / "got")
    assert (got / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    load_pruned(got)


def test_a_failing_export_and_a_failing_upload_are_both_told(tmp_path: Path, hub: Any) -> None:
    (tmp_path / "out" / "export").mkdir(parents=True)
    (tmp_path / "out" / "export" / "onnx").write_text("in the way")
    asked = recipe(tmp_path, push_to_hub="true", hub_model_id="me/small", export="[onnx]")
    hub.broken = "/preupload/"
    with pytest.raises(RunError, match=r"writing it as onnx failed .* uploading it to me/small failed"):
        train(asked)
    load_pruned(tmp_path / "out")


def test_an_upload_that_fails_leaves_the_model_here(tmp_path: Path, hub: Any) -> None:
    trainer = few(tmp_path, push_to_hub=True, hub_model_id="me/small")
    hub.broken = "/preupload/"
    with pytest.raises(RunError, match=r"saved in .*, but uploading it to me/small failed") as failed:
        trainer.train()
    load_pruned(tmp_path)
    left_out = shlex.split(str(failed.value).split("--exclude")[1])
    of_run = ["predictions.json", "differences.json", "events.jsonl", "dense/model.safetensors", "checkpoint-8/a/b"]
    told = filter_repo_objects([*of_run, "config.json", "exports/gguf/model.gguf"], ignore_patterns=left_out)
    assert list(told) == ["config.json", "exports/gguf/model.gguf"]
    hub.broken = "/nothing/"
    trainer.push_to_hub()
    assert commits(hub) == 1


def test_a_hub_that_says_no_is_told_before_training(tmp_path: Path, hub: Any) -> None:
    with pytest.raises(UserError, match="'me/small' on the hub .* cannot be written to"):
        few(tmp_path, push_to_hub=True, hub_model_id="me/small", hub_token="hf_bad")


REFUSED = [
    ({"hub_strategy": "every_save"}, "Set hub_strategy: end"),
    ({"hub_strategy": "checkpoint"}, "Set hub_strategy: end"),
    ({"hub_model_id": "a/b/c"}, "Set hub_model_id"),
    ({"offline": True}, "HF_HUB_OFFLINE is set"),
    ({"token": False}, "not logged in"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_an_upload_that_cannot_come_about_is_refused_by_trainer_and_plan(
    tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    changes = dict(changes)
    if changes.pop("offline", False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if not changes.pop("token", True):
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(UserError, match=message):
        few(tmp_path / "out", push_to_hub=True, **changes)
    with pytest.raises(UserError, match=message):
        plan(recipe(tmp_path, push_to_hub="true", **changes))
    assert not hub.asked and not (tmp_path / "out").exists()
