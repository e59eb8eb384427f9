"""Losses of a causal language model from its logits where labels are, a chunk of positions at a time.

A completion has labels at a part of its positions, and a vocabulary is wide: logits of the others, their copies in
float32 and their gradients are made for nothing. Here the head runs on the hidden states before a label only, in
chunks, and each chunk's gradient with regard to these is computed at once, so that [positions, vocabulary] never
exists as a whole. The losses are those that the model and
:func:`~apt_trainer.distillation.losses.prediction_loss` would give, of student and teacher alike.

What a model does with its logits after its head (a soft cap, a scale) is found by a trial, and a model that does
anything else keeps its own way. So do losses that read logits: a ``compute_loss`` of the user's, smoothed or weighed
labels. Not for partitioned heads (ZeRO-3, FSDP2), for compiled steps and for steps in which the head is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Seq2SeqTrainer, Trainer

from apt_trainer.distillation.losses import token_divergence
from apt_trainer.models.batch import IGNORED, has_label_per_token
from apt_trainer.tensors.partitioned import is_partitioned
from apt_trainer.training.evaluation_loop import EachRowOnce

ELEMENTS = 2**26
"""The most logits of a chunk: 256 MiB in float32."""

_STOCK = (Trainer.compute_loss, Seq2SeqTrainer.compute_loss, EachRowOnce.compute_loss)


class Logits(NamedTuple):
    """``head``: the module that makes logits [..., ``width``] of hidden states; ``after``: what is done with them."""

    head: nn.Module
    width: int
    after: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.after(self.head(hidden)).float()


def find_logits(model: Any) -> Logits | None:
    """How ``model`` makes its logits, None where that is not by a head at its end; one forward pass of two tokens.

    The head is made to give numbers of all sizes, and what the model makes of them is compared.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is None:
        return None
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0

    def after(logits: torch.Tensor) -> torch.Tensor:
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    known: dict[str, Any] = {}

    def give(module: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
        numbers = torch.linspace(-3, 3, result.numel(), device=result.device)
        known["given"] = numbers.sinh().mul(10).to(result.dtype).view_as(result)
        return known["given"]  # type: ignore[no-any-return]

    def loss(**kwargs: Any) -> torch.Tensor:
        known["logits"] = kwargs["logits"]
        return kwargs["logits"].sum()  # type: ignore[no-any-return]

    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    trains, handle = model.training, head.register_forward_hook(give)
    try:
        with torch.no_grad(), _loss_function(model, loss):
            model.eval()
            outputs = model(input_ids=tokens, labels=tokens, use_cache=False)
    finally:
        handle.remove()
        model.train(trains)
    logits = known.get("logits")
    if logits is None or "given" not in known or outputs["loss"] is None:
        return None
    expected = after(known["given"])
    fits = expected.shape == logits.shape and torch.allclose(expected.float(), logits.float(), rtol=1e-2, atol=1e-4)
    return Logits(head, expected.shape[-1], after) if fits else None


class LabelLogits:
    """Of one ``trainer``, an :class:`~apt_trainer.APTTrainer`: says for which micro-batches it can be done."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._found: dict[int, tuple[nn.Module, Logits | None]] = {}

    def positions(self, inputs: Mapping[str, Any], teaches: bool) -> LabelPositions | None:
        """The positions of a micro-batch, or None where logits are wanted for all."""
        trainer = self.trainer
        if not self._possible(inputs):
            return None
        student, teacher = trainer.transformer, trainer.distillation.teacher.model if teaches else None
        of_student, of_teacher = self._find(student), None if teacher is None else self._find(teacher)
        if of_student is None or (teacher is not None and of_teacher is None):
            return None
        return LabelPositions(inputs["labels"], of_student, of_teacher, trainer.args.distillation_temperature)

    def _possible(self, inputs: Mapping[str, Any]) -> bool:
        trainer, model = self.trainer, self.trainer.transformer
        own_loss = type(trainer).compute_loss not in _STOCK or trainer.trainer_class.compute_loss not in _STOCK
        reads_logits = trainer.label_smoother or trainer.compute_loss_func or trainer.class_weights
        return not (
            trainer.place
            or own_loss
            or reads_logits
            or _is_watched(model.get_output_embeddings())
            or trainer.compiled.asked
            or not trainer.pruner.family.head(model).next_token
            or not has_label_per_token(inputs)
            or "input_ids" not in inputs
            or "shift_labels" in inputs
            or is_partitioned(next(model.parameters()))
        )

    def _find(self, model: Any) -> Logits | None:
        known = self._found.get(id(model))
        if known is None or known[0] is not model:
            self._found = {key: value for key, value in self._found.items() if value[0] is self.trainer.transformer}
            known = self._found[id(model)] = model, find_logits(model)
        return known[1]


class LabelPositions:
    """The positions before a label in ``labels`` [B, S], found with one wait for the device. ``student`` and
    ``teacher``, where there is one, say how their logits are made.

    ``distance``: to the teacher, as :func:`prediction_loss`; there once the student has run.
    """

    distance: torch.Tensor | None = None

    def __init__(
        self, labels: torch.Tensor, student: Logits, teacher: Logits | None = None, temperature: float = 1.0
    ) -> None:
        self._shape, self._temperature = labels.shape, temperature
        self._student, self._teacher = student, teacher
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        self._places = (targets != IGNORED).nonzero().squeeze(1)
        self._number = len(self._places)
        if self._number == 0:
            self._places = self._places.new_zeros(1)  # so that there is something to differentiate
        self._targets = targets[self._places]
        self._hidden: torch.Tensor | None = None
        self._taught: torch.Tensor | None = None
        self._losing = False

    @contextmanager
    def of_teacher(self) -> Iterator[None]:
        """Within it, the teacher makes no logits: what goes into its head is kept."""
        assert self._teacher is not None
        handle = self._teacher.head.register_forward_pre_hook(self._keep_taught, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def of_student(self, model: Any) -> Iterator[None]:
        """Within it, ``model`` computes its loss, and :attr:`distance`, by chunks."""
        handle = self._student.head.register_forward_pre_hook(self._keep_hidden, prepend=True)
        try:
            with _loss_function(model, self._loss):
                yield
        finally:
            handle.remove()
            self._hidden = self._taught = None

    def _keep_taught(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._losing:
            return None
        self._taught = self._of_places(args[0])
        return (args[0][:1, :1],)

    def _keep_hidden(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._losing:
            return None
        self._hidden = self._of_places(args[0])
        return (args[0][:1, :1],)

    def _of_places(self, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.shape[:2] == self._shape, "hidden states that are not one per label"
        return hidden.flatten(0, 1).index_select(0, self._places)

    def _loss(self, num_items_in_batch: Any = None, **kwargs: Any) -> torch.Tensor:
        """In the place of the model's own ``loss_function``."""
        assert self._hidden is not None
        self._losing = True
        try:
            of_labels, distance = self._sums(self._hidden)
        finally:
            self._losing = False
        if self._teacher is not None:
            self.distance = distance / max(self._number, 1)
        if num_items_in_batch is None:
            return of_labels / self._number if self._number else of_labels * float("nan")  # as torch's mean of nothing
        return of_labels / num_items_in_batch

    def _sums(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = max(1, ELEMENTS // self._student.width)
        if len(hidden) <= size:
            return self._sums_of(hidden, slice(None))
        trained = [p for p in self._student.head.parameters() if p.requires_grad]
        return _InChunks.apply(hidden, self._sums_of, size, self._teacher is not None, *trained)  # type: ignore[no-any-return]

    def _sums_of(self, hidden: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over some positions of the loss of their labels, and of the distance to the teacher."""
        logits, targets = self._student(hidden), self._targets[chunk]
        of_labels = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        if self._teacher is None:
            return of_labels, of_labels.new_zeros(())
        assert self._taught is not None
        with torch.no_grad():
            taught = self._teacher(self._taught[chunk])
        words = min(logits.shape[-1], taught.shape[-1])  # the rest fills a vocabulary up
        apart = token_divergence(logits[:, :words], taught[:, :words], self._temperature)
        return of_labels, (apart * (targets != IGNORED)).sum()


class _InChunks(torch.autograd.Function):
    """``sums(hidden[chunk], chunk)`` added up over chunks of ``size``; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        sums: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
        size: int,
        two: bool,
        *trained: nn.Parameter,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        totals = hidden.new_zeros(2, dtype=torch.float32)
        leaves = (hidden, *trained)
        gradients = [[torch.zeros_like(leaf) for leaf in leaves] for _ in range(1 + two)]
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            with torch.enable_grad():
                part = hidden[chunk].detach().requires_grad_()
                parts = sums(part, chunk)
            totals += torch.stack([loss.detach() for loss in parts])
            for loss, found in zip(parts, gradients, strict=False):
                of_part, *of_trained = torch.autograd.grad(loss, (part, *trained), retain_graph=two)
                found[0][chunk] = of_part
                for total, gradient in zip(found[1:], of_trained, strict=True):
                    total += gradient
        ctx.gradients = gradients
        return totals[0].clone(), totals[1].clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        first, *rest = ctx.gradients
        total = [gradient.mul_(outer[0]) for gradient in first]
        for found in rest:
            total = [a.addcmul_(b, outer[1].to(b.dtype)) for a, b in zip(total, found, strict=True)]
        del ctx.gradients
        return total[0], None, None, None, *total[1:]


def _is_watched(head: nn.Module | None) -> bool:
    """Whether hooks on ``head`` see what it is given, gives or gets back."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return head is not None and any(getattr(module, name) for module in head.modules() for name in names)


@contextmanager
def _loss_function(model: Any, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within it, ``function`` computes the loss of ``model``."""

    def named(logits: Any, labels: Any, vocab_size: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)

    before = model.__dict__.get("_loss_function")
    model.loss_function = named
    try:
        yield
    finally:
        if before is None:
            del model._loss_function
        else:
            model._loss_function = before
