"""Floating-point operations of one forward pass, counted from shapes alone.

Not a speed: two models with equal counts may differ in latency. Counts what ``torch.utils.flop_counter`` knows, that
is matrix products, convolutions and attention; element-wise work, norms and look-ups count as 0. One multiply-add is
two operations.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

_COUNTED = ("eager", "sdpa")


def count_flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Count the operations of ``model(**inputs)`` in evaluation mode.

    No number is computed and no weight is copied: tensors are replaced by fake ones, which have a shape and no
    storage. The model itself is neither run nor changed, and its forward hooks are not called.

    Args:
        model: Module whose tensors may lie on any device, the meta device included.
        inputs: Keyword arguments of ``forward``. Only shapes and types matter, not the values.

    Returns:
        Floating-point operations for the whole batch.
    """
    # Fake tensors rather than meta ones: attention masks are inspected with ``.item()``, which raises on meta, while
    # model code that can be traced skips that for fake tensors. The plain attention kernel, because the fused one for
    # the CPU is counted as 0 (https://github.com/pytorch/pytorch/issues/195460).
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        shapes_only = _copy_without_storage(model)
        if isinstance(shapes_only, PreTrainedModel) and shapes_only.config._attn_implementation not in _COUNTED:
            shapes_only.set_attn_implementation("eager")  # kernels of flash and flex attention cannot be looked into
        if isinstance(shapes_only, PreTrainedModel) and type(shapes_only)._can_set_experts_implementation():
            shapes_only.set_experts_implementation("batched_mm")  # others look at how many tokens each expert gets
        fake_inputs = {name: _without_storage(value) for name, value in inputs.items()}
        with FlopCounterMode(display=False) as counter:
            shapes_only(**fake_inputs)
    return int(counter.get_total_flops())


def _copy_without_storage(model: nn.Module) -> nn.Module:
    """Deep copy in which every parameter and buffer is fake and no module has forward hooks."""
    replaced: dict[int, Any] = {}
    for parameter in model.parameters():
        replaced[id(parameter)] = nn.Parameter(_without_storage(parameter), requires_grad=False)
    for buffer in model.buffers():
        replaced[id(buffer)] = _without_storage(buffer)
    for module in model.modules():
        # Hooks may be bound to objects that must not be copied, such as an optimizer, or act on real tensors.
        replaced[id(module._forward_hooks)] = OrderedDict()
        replaced[id(module._forward_pre_hooks)] = OrderedDict()
    return copy.deepcopy(model, replaced).eval()


def _without_storage(tensor: Tensor) -> Tensor:
    shape = getattr(tensor, "ds_shape", tensor.shape)  # DeepSpeed ZeRO-3 leaves empty tensors behind
    device = "cpu" if tensor.is_meta else tensor.device
    return torch.empty(shape, dtype=tensor.dtype, device=device)
