"""Under engines that split weights no process holds the whole model while it is loaded and taken apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from integration.test_processes import two_processes
from tiny import tiny_config
from transformers import AutoModelForCausalLM

WORKER = """
import gc, json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, TrainerCallback
from apt_trainer.measure import PeakMemory, reset_peak, return_freed_memory
from integration.factories import Rows, make_trainer
from integration.test_event_memory import ENGINES

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
return_freed_memory()


class AtFirst(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        peaks[engine] = memory.above_start()


peaks = {{}}
settings = {{"target_sparsity": None, "distillation": "none", "max_steps": 1, "per_device_train_batch_size": 4}}
settings["distillation_end"] = settings["pruning_start"] = settings["pruning_end"] = None
for engine in ENGINES:
    for name in ("small", "large"):  # the first has modules imported and buffers made
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # which the first engine leaves
        gc.collect()
        reset_peak()
        memory = PeakMemory()
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        rows, options = Rows(8, "text", padded=False), {{"callbacks": [AtFirst()]}}
        trainer = make_trainer(folder / engine / name, model, rows, options, **settings, **ENGINES[engine])
        trainer.train()
        del model, trainer
(folder / f"peaks.{{rank}}.json").write_text(json.dumps(peaks))
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.distributed
def test_a_process_holds_its_share_and_a_layer(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    model = AutoModelForCausalLM.from_config(tiny_config("llama", 8, head_dim=64, **sizes))
    model.save_pretrained(tmp_path / "large")
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "small")
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    two_processes(tmp_path, WORKER, "peaks.0.json", "peaks.1.json")
    for rank in range(2):
        for engine, peak in json.loads((tmp_path / f"peaks.{rank}.json").read_text()).items():
            assert 0.4 * whole < peak < whole / 2 + layer + 0.2 * whole, (engine, rank, peak / whole)
