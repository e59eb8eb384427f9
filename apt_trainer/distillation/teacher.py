"""The teacher: a frozen snapshot of the student that shares every frozen base weight with it.

APT runs the teacher through the student's own modules with another set of adapters. Here it is a module of its own,
because that leaves nothing to switch and nothing to restore: the snapshot owns copies of what trains (adapters, head)
and *is* the student in the rest, so it costs little more memory than the adapters. It has none of the student's hooks,
so no mask reaches it and no activation of it is recorded; its eval mode does not touch the student's dropout; freezing
it does not touch what trains in the student. When the student is cut, its parameters are replaced by smaller ones and
the teacher keeps the old ones, which then occupy memory until the next snapshot. Two rules follow. Adapters must not
be merged in either of the two while they share weights. And before a base weight begins to train (or is written to in
any way), :meth:`Teacher.own` must be called for it. Where the student's parameters are partitioned (ZeRO-3, FSDP2), so
are the copies, and what is shared is one partition; each module's parameters are whole for its own forward pass alone.
Not for deciding when a snapshot is due. Source: APT, Sec. 4.4.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput, find_labels

from apt_trainer.libraries.private_names import MODULE_HOOKS
from apt_trainer.models import family_of
from apt_trainer.tensors.fully_sharded import plain_modules
from apt_trainer.tensors.partitioned import (
    copy_of,
    gather_while_it_runs,
    is_partitioned,
    partition_all,
    strip_modules,
)


def snapshot(model: nn.Module) -> nn.Module:
    """Frozen copy of ``model`` in eval mode, without hooks, that shares its frozen parameters and integer buffers.

    Floating-point buffers are copied, since running statistics are written in place. ``model`` is left as it was;
    give the plain module, not a distributed or compiled wrapper round it. Adapters stay unmerged. Collective where
    parameters are partitioned.
    """
    memo: dict[int, Any] = {id(p): copy_of(p, False) if p.requires_grad else p for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers() if not b.is_floating_point()}
    # Kept out of the copy rather than cleared after it: a hook that is a bound method would drag its owner along.
    memo |= {id(hooks): OrderedDict() for module in model.modules() for hooks in _hooks_of(module)}
    with plain_modules(model):
        duplicate = copy.deepcopy(model, memo)
    for module in duplicate.modules():
        module._is_full_backward_hook = None
        # transformers installs its hidden-state hooks once and marks that it did so; the copy needs its own.
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    strip_modules(duplicate)
    gather_while_it_runs(duplicate)
    return freeze(duplicate)


def freeze(model: nn.Module) -> nn.Module:
    """``model`` itself, in eval mode, without gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            parameter.grad = None
    return model.eval()


def hidden_width(model: Any) -> int:
    """Hidden dimensions of a transformer: what its config says or, if it was pruned, the width of its embeddings."""
    if hasattr(model.config, "apt_structure"):
        return family_of(model.config).hidden_size(model)
    return int(getattr(model.config, "vision_config", model.config).hidden_size)


def _hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    return [getattr(module, name) for name in MODULE_HOOKS]


class Teacher:
    """The best snapshot of the student so far, or an external model.

    Deliberately no ``nn.Module``: as an attribute of a model it must not join its parameters, mode or device moves.

    Attributes:
        model: the frozen teacher; None until the first snapshot.
        best_loss: held-out loss of the student when it was taken, lower is better.
        hidden_index: [d_s] position in the teacher of each hidden dimension the student has now; None where the two
            do not correspond (an external teacher).
        num_hidden: d_t, the teacher's hidden dimensions.
    """

    def __init__(self, num_hidden: int) -> None:
        """``num_hidden``: the student's hidden dimensions at this time."""
        self.model: nn.Module | None = None
        self.best_loss = math.inf
        self.hidden_index: torch.Tensor | None = torch.arange(num_hidden)
        self.num_hidden = num_hidden
        self.is_external = False
        self._label_order: torch.Tensor | None = None

    @classmethod
    def external(
        cls, model: nn.Module, num_hidden: int | None = None, label_order: Sequence[int] | None = None
    ) -> Teacher:
        """Another model as teacher, frozen in place; ``num_hidden`` is by default its :func:`hidden_width`.
        ``label_order``: as :func:`match_teacher` gives it; logits are brought
        into the student's order."""
        if num_hidden is None:
            num_hidden = hidden_width(model)
        teacher = cls(num_hidden)
        teacher.model, teacher.hidden_index, teacher.is_external = freeze(model), None, True
        teacher._label_order = None if label_order is None else torch.tensor(label_order)
        return teacher

    def offer(self, student: nn.Module, heldout_loss: float) -> bool:
        """Take a snapshot of ``student`` if its loss is the least so far; whether one was taken.

        An external teacher takes none, and a loss that is not a number is never the least. In a distributed run every
        process must give the same loss.
        """
        if self.is_external or not heldout_loss < self.best_loss:
            return False
        assert self.hidden_index is not None
        self.model = None  # frees the old one before the new one is made
        self.model = snapshot(student)
        self.best_loss = float(heldout_loss)
        self.num_hidden = len(self.hidden_index)
        self.hidden_index = torch.arange(self.num_hidden)
        return True

    def follow(self, survivors_hidden: torch.Tensor) -> None:
        """The student kept only its hidden dimensions ``survivors_hidden`` [d_s']; also before the first snapshot."""
        if self.hidden_index is not None:
            self.hidden_index = self.hidden_index.index_select(0, survivors_hidden.to(self.hidden_index.device))

    @torch.no_grad()
    def own(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy those of ``parameters`` that are shared with the student, because they are about to train there."""
        if self.model is None:
            return
        wanted = {id(parameter): parameter for parameter in parameters}
        copies: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, shared in module._parameters.items():
                if shared is None or id(shared) not in wanted:
                    continue
                if id(shared) not in copies:
                    copies[id(shared)] = copy_of(shared, requires_grad=False)
                module._parameters[name] = copies[id(shared)]

    def parameter_ids(self) -> set[int]:
        """Of all that it uses; those that are the student's too must outlive what happens to the student."""
        return set() if self.model is None else {id(parameter) for parameter in self.model.parameters()}

    def join(self, student: Any, one_dtype: bool) -> None:
        """Once an engine holds ``student``: if it gave all parameters ``one_dtype``, do so with a snapshot that was
        read from a file, and partition any teacher if the student is; collective."""
        if self.model is None:
            return
        example = next(student.parameters())
        if one_dtype and not self.is_external:
            self.model.to(student.dtype)
        if is_partitioned(example):
            partition_all(self.model, example)
            gather_while_it_runs(self.model)

    # no_grad and not inference_mode: its outputs take part in a loss that is differentiated.
    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any], output_hidden_states: bool = False) -> ModelOutput:
        """Outputs of the teacher for a batch as the student gets it; labels are left out, except where
        a decoder makes its inputs of them."""
        assert self.model is not None, "there is no snapshot yet"
        assert not any(p.requires_grad for p in self.model.parameters()), "a shared weight trains: call own() before"
        labels = [] if self._makes_inputs_of_labels(inputs) else ["labels", *find_labels(type(self.model))]
        kept = {name: value for name, value in inputs.items() if name not in labels}
        output: ModelOutput = self.model(**kept, output_hidden_states=output_hidden_states, return_dict=True)
        if self._label_order is not None:
            logits = output["logits"]
            self._label_order = self._label_order.to(logits.device)  # copies once
            output["logits"] = logits.index_select(-1, self._label_order)
        return output

    def _makes_inputs_of_labels(self, inputs: Mapping[str, Any]) -> bool:
        config = getattr(self.model, "config", None)
        return getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors for a checkpoint; the weights of ``model`` are up to the caller."""
        return {"best_loss": self.best_loss, "hidden_index": self.hidden_index, "num_hidden": self.num_hidden}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best_loss, self.hidden_index = float(state["best_loss"]), state["hidden_index"]
        self.num_hidden = int(state["num_hidden"])
