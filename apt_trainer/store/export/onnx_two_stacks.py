"""A model with an encoder and a decoder as two ONNX graphs, named as optimum and transformers.js look for them.

Their "merged" decoder is one graph for the first step and for later ones; ``use_cache_branch`` tells it which. Ours
sees that from the cache, which is empty at first: the keys and values of the encoder's states are made of those states
that the cache does not have yet, all of them at first and none later. Every layer has its four slots, so that they are
as many as the config says; where an attention is gone they are of width 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from apt_trainer.models import family_of
from apt_trainer.store.export.onnx_session import PAST

SLOTS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


class TwoStackDecoder(nn.Module):
    """(input_ids [batch, new], encoder_attention_mask [batch, length], encoder_hidden_states [batch, length, width],
    past) → (logits, present).

    ``past``: :data:`SLOTS` of each layer of the decoder, [batch, heads of that layer, past or length, head size].
    ``used``: for each of them, whether an attention writes to it.
    """

    outputs = ("logits",)

    def __init__(self, model: PreTrainedModel, used: Sequence[bool]) -> None:
        super().__init__()
        self.model, self.used = model, used

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        input_ids, encoder_mask, states, past = inputs
        places = range(len(past) // len(SLOTS))
        own = DynamicCache([(past[4 * i], past[4 * i + 1]) for i in places])
        crossed = DynamicCache([(past[4 * i + 2], past[4 * i + 3]) for i in places])
        cache = EncoderDecoderCache(own, crossed)
        cache.is_updated = dict.fromkeys(places, False)
        new, seen = input_ids.shape[1], past[0].shape[2]
        query = torch.arange(seen, seen + new, device=input_ids.device)[:, None]
        key = torch.arange(seen + new, device=input_ids.device)[None]
        least = torch.finfo(torch.float32).min
        fresh = states[:, past[2].shape[2] :]
        found = self.model(
            encoder_outputs=BaseModelOutput(fresh),
            attention_mask=torch.where(encoder_mask[:, None, None] > 0, 0.0, least),
            decoder_input_ids=input_ids,
            decoder_attention_mask=torch.where((key <= query)[None, None], 0.0, least),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        layers = [layer for i in places for layer in (own.layers[i], crossed.layers[i])]
        written = [value for layer in layers for value in (layer.keys, layer.values)]
        spare = 2 * [input_ids[:, None, :, None] * 0.0] + 2 * [fresh[:, None, :, :1] * 0.0]
        present = (
            written[i] if used else torch.cat([past[i], spare[i % len(SLOTS)]], 2) for i, used in enumerate(self.used)
        )
        return found.logits, *present


def decoder(model: PreTrainedModel) -> tuple[dict[str, Tensor], TwoStackDecoder]:
    """The decoder of ``model`` as a function, and an example of its inputs by name."""
    ids = torch.arange(4).reshape(2, 2) % max(2, model.config.vocab_size - 1) + 1
    mask = torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        states = model.get_encoder()(input_ids=mask, attention_mask=mask).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        encoded = BaseModelOutput(states)
        model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    example = {"input_ids": ids, "encoder_attention_mask": mask, "encoder_hidden_states": states}
    used = []
    for i in range(sum("decoder" in path.split(".") for path in family_of(model.config).layer_paths(model))):
        for slot in SLOTS:
            stack, part = slot.split(".")
            layers = (cache.self_attention_cache if stack == "decoder" else cache.cross_attention_cache).layers
            value = getattr(layers[i], f"{part}s") if i < len(layers) else None
            heads, size = (1, 1) if value is None else (value.shape[1], value.shape[3])
            example[f"{PAST}{i}.{slot}"] = torch.zeros(2, heads, 3 if stack == "decoder" else 4, size)
            used.append(value is not None)
    return example, TwoStackDecoder(model, used)


def open_to_consumers(file: Path) -> None:
    """Add ``use_cache_branch`` to the decoder in ``file``, and let an empty cache have any size: consumers make it by
    the config, which knows of one number of heads only, and transformers.js for no rows. onnxruntime leaves what is
    empty out where it joins; so the number of rows is that of the tokens."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0].startswith(PAST):
            sides = {attribute.name: attribute.i for attribute in node.attribute}
            if (sides.get("start", 0), sides.get("end")) == (0, 1):
                node.input[0] = "input_ids"
    for value in model.graph.input:
        if value.name.startswith(PAST):
            for place, name in ((0, "rows"), (1, "heads"), (3, "size")):
                value.type.tensor_type.shape.dim[place].dim_param = f"{name} of {value.name}"
    model.graph.input.append(onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1]))
    onnx.save(model, str(file))
