"""``task: embedding``: a model without a head, trained and evaluated by the embeddings of several texts a row.

The folder that a run writes is one of sentence-transformers as well as of transformers. Not for models that are
sentence-transformers' own (``any_trainer``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer

from apt_trainer.models.pooling import mean_pooling
from apt_trainer.settings.config import APTConfig
from apt_trainer.store.events import write_json
from apt_trainer.tasks.embedding import EmbeddingLoss, as_texts, embeddings_of
from apt_trainer.training.evaluation_loop import EachRowOnce
from apt_trainer.training.trainer import PruningMixin


class EmbeddingTrainer(Seq2SeqTrainer):
    """Batches are those of :class:`~apt_trainer.tasks.embedding.TextsCollator`; predictions are embeddings [rows,
    texts, d]."""

    pooling = staticmethod(mean_pooling)

    def __init__(self, *args: Any, embedding_loss: EmbeddingLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embedding_loss = embedding_loss
        self.label_names = ["labels"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**as_texts(inputs))
        found = embeddings_of(outputs.last_hidden_state, inputs)
        loss = self.embedding_loss(list(found.unbind(1)), inputs["labels"])
        pooled = outputs.get("pooler_output")
        if pooled is not None:  # every parameter takes part in every step, which DDP relies on
            loss = loss + 0.0 * pooled.sum()
        return (loss, {"embeddings": found}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        return loss.detach(), outputs["embeddings"], inputs["labels"]


class APTEmbeddingTrainer(PruningMixin, EmbeddingTrainer):
    """An :class:`EmbeddingTrainer` with the method."""

    Config = APTConfig
    trainer_class = EmbeddingTrainer

    def write_beside(self, folder: Path) -> None:
        """What sentence-transformers reads."""
        write_layout(self.model, folder, self._saved_tokenizer())


class PlainEmbeddingTrainer(EachRowOnce, EmbeddingTrainer):
    """For evaluating a finished model."""


def write_layout(model: Any, folder: Path, tokenizer: Any) -> None:
    """Write to ``folder``, which holds ``model`` and its tokenizer, what makes it a ``SentenceTransformer`` that takes
    the mean of hidden states and normalises it."""
    from sentence_transformers.sentence_transformer import modules

    parts: list[tuple[Any, str]] = [
        (modules.Pooling(model.get_input_embeddings().weight.shape[1], "mean"), "1_Pooling"),
        (modules.Normalize(), "2_Normalize"),
    ]
    named = [(modules.Transformer, "")]
    for module, place in parts:
        (folder / place).mkdir(exist_ok=True)
        module.save(str(folder / place))
        named.append((type(module), place))
    order = [
        {"idx": number, "name": str(number), "path": place, "type": f"{kind.__module__}.{kind.__name__}"}
        for number, (kind, place) in enumerate(named)
    ]
    longest = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    settings = {"max_seq_length": min(tokenizer.model_max_length, longest), "do_lower_case": False}
    for name, content in (("modules.json", order), ("sentence_bert_config.json", settings)):
        write_json(folder / name, content)
