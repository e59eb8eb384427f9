"""Runs a folder of transformers by transformers alone, with the code that the folder carries.

As a script it answers a request in a process of its own, as ``onnx_session`` does, which cannot import apt_trainer.
Nothing of apt_trainer is imported here.

    python -I hf_session.py FOLDER REQUEST.safetensors ANSWER.safetensors
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


def load(folder: Path) -> Any:
    """The model of the class that the config names: one of transformers, or one of the folder's own code."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config["architectures"][0]
    own = [auto for auto, place in (config.get("auto_map") or {}).items() if place.endswith(f".{name}")]
    auto = getattr(transformers, own[0] if own else name)
    model, info = auto.from_pretrained(folder, trust_remote_code=True, dtype="float32", output_loading_info=True)
    wrong = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise ValueError(f"weights do not fit: {', '.join(wrong[:3])}")
    return model.eval()


def main(folder: str, request: str, answer: str) -> None:
    """As that of ``onnx_session``."""
    import torch
    from safetensors.torch import load_file, save_file

    asked, model = load_file(request), load(Path(folder))
    batches: dict[str, dict[str, Any]] = {}
    for name, value in asked.items():
        number, dot, rest = name.partition(".")
        if dot:
            batches.setdefault(number, {})[rest] = value
    found: dict[str, Any] = {}
    generates = model.can_generate() and not model.config.is_encoder_decoder
    with torch.no_grad():
        for number, batch in batches.items():
            if generates:
                batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            output = model(**batch, return_dict=True)
            found |= {f"{number}.{name}": output[name].contiguous() for name in OUTPUTS if name in output}
        if generates:
            prompt, new_tokens = asked["prompt"], int(asked["new_tokens"][0])
            options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
            tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            found["generated"] = tokens[0, prompt.shape[1] :].clone()
    save_file(found, answer)


if __name__ == "__main__":
    sys.modules["apt_trainer"] = None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as code:
        os.environ["HF_MODULES_CACHE"] = code  # before transformers is imported
        main(*sys.argv[1:])
