"""Language models whose Trainer asks for log-probabilities of labels instead of logits, as those of TRL do.

Such a Trainer replaces ``forward`` of the model by one that takes ``fused_lm_head=True`` and then makes no logits.
Where a teacher has to be compared, the pass is made with logits and what the Trainer reads is computed from them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

FUSED = "fused_lm_head"
"""The argument of a forward pass that asks for log-probabilities."""


def let_copies_own(model: nn.Module) -> None:
    """Where ``forward`` of ``model`` was replaced by one with :data:`FUSED`, replace it by one whose copies run
    themselves: that of the Trainer would run ``model`` for each of its copies, so that it taught itself."""
    given = model.__dict__.get("forward")
    function = getattr(given, "__func__", None)
    if FUSED not in (getattr(function, "__kwdefaults__", None) or {}):
        return

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop(FUSED, False):
            return function(self, *args, **{FUSED: True}, **kwargs)  # type: ignore[misc]
        return type(self).forward(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


def with_log_probs(outputs: Any, labels: torch.Tensor) -> Any:
    """``outputs`` of a pass with logits [B, S, V] and, beside them, what one with :data:`FUSED` has: for each of the
    S - 1 next tokens, and 0 where its label in ``labels`` [B, S] is ignored."""
    logits, targets = outputs["logits"][:, :-1].float(), labels[:, 1:]
    mask = targets != -100
    log_probs = logits.log_softmax(-1)
    of_labels = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        found = {
            "entropy": -(log_probs.exp() * log_probs).sum(-1),
            "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == targets,
        }
    outputs["log_probs"] = of_labels.masked_fill(~mask, 0)
    for name, value in found.items():
        outputs[name] = value.masked_fill(~mask, 0)
    outputs["label_mask"] = mask
    return outputs
