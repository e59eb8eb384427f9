"""What becomes of the model after the last step: tried before the first, saved, uploaded, and kept whatever fails.

A base of ``APTTrainer``. See ``store.saving`` for how it is written, ``trainer`` for what happens in between.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from apt_trainer.distillation.session import SelfDistillation
from apt_trainer.errors import Retold, RunError, UserError, reason
from apt_trainer.pruning.given_model import IN_USE
from apt_trainer.store.hub import OF_A_RUN, make_repository, put_beside, upload
from apt_trainer.store.model_card import CARD_FILE, model_card
from apt_trainer.store.rescue import how_to_load
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.store.saving import save_pruned, write_model
from apt_trainer.training import norms, positions, reshape
from apt_trainer.training.checkpoints.best import BestWithinBudget
from apt_trainer.training.early_stopping import EarlyStopping
from apt_trainer.training.engines import Engine, engine_of
from apt_trainer.training.engines.agreement import failing_together, processes
from apt_trainer.training.inside import save_around
from apt_trainer.training.rehearsal import accept_generation_config, rehearse
from apt_trainer.training.step_losses import StepLosses

logger = logging.getLogger(__name__)


class FinishedModel(BestWithinBudget):
    """Saves and uploads the finished model, where the Trainer would do so with the state of the run."""

    model: Any
    model_wrapped: Any
    distillation: SelfDistillation
    step_losses: StepLosses
    early_stopping: EarlyStopping
    processing_class: Any
    hub_model_id: str | None
    _finished: bool
    place: str
    """Path of the transformer in ``model``; "" where that is ``model`` itself."""
    uploads_after_training = True
    """Whether :meth:`train` ends with :meth:`upload_if_asked`; else the caller does that when all is made."""
    _beside: Path | None = None
    _card: ModelCard | None = None

    @property
    def transformer(self) -> Any:
        """What is scored, cut and saved."""
        return self.model.get_submodule(self.place)

    # ------------------------------------------------------------------ before and after training

    def rehearse(self) -> None:
        """Before training: raise :class:`UserError`, on all processes, where the finished model could not be saved."""
        if self.place and self.args.keep_adapters:
            raise UserError(
                f"keep_adapters: true is for a transformer, but {type(self.model).__name__} holds one. Leave it out."
            )
        with failing_together():
            if self.args.should_save:
                rehearse(self.transformer, self._output, self.pruner, self._saved_tokenizer())

    def keeping_what_is_trained(self) -> Retold:
        """Context for the loop: where something else fails after the last step (a metric, a callback, a log), the
        model is finished and saved, and the :class:`RunError` says where."""
        return Retold(self._keep)

    def upload_if_asked(self, saved: bool = False, beside: Path | None = None) -> None:
        """After training: with ``push_to_hub``, save the model, unless it is ``saved`` in ``output_dir``, and upload
        it, once, with the folder ``beside`` where there is one; collective."""
        if not self.args.push_to_hub:
            return

        def retell(error: Exception) -> Exception:
            return RunError(
                f"The model is saved in {self._output}, but uploading it to {self.hub_model_id} failed "
                f"({reason(error)}). trainer.push_to_hub() tries again; so does, without Python: hf upload "
                f"{self.hub_model_id} {self._output} --exclude {' '.join(map(repr, OF_A_RUN))}"
            )

        self._beside = beside
        with failing_together():
            if not saved:
                self.save_model()
            with Retold(retell):
                self.push_to_hub()

    def _keep(self, error: Exception) -> Exception:
        """What to raise for ``error``, which came out of the loop."""
        done = self.state.global_step >= self.state.max_steps > 0 or self.early_stopping.is_met(self.state)
        whole = type(engine_of(self)) is Engine  # else it takes all processes to put the weights together
        if isinstance(error, (UserError, RunError)) or not done or not whole:
            return error
        logger.error("After the last step:", exc_info=error)
        self.is_in_train = False
        self.finish(choose_best=processes() == 1)
        self.save_model()
        return RunError(
            f"Training is done, but then something failed ({reason(error)}). The final model is saved in "
            f"{self._output}: {how_to_load(self.transformer, self._output)} loads it."
        )

    def finish(self, choose_best: bool = True) -> None:
        """Merge adapters and make ``model`` what ``save_pretrained`` writes and ``load_pruned`` reads.

        ``choose_best``: with ``load_best_model_at_end``, as always; it is collective.
        """
        self.check_finite()
        self.pruner.detach()
        self.pruner.masks.close()
        self.distillation.end(self.transformer)
        self.model = reshape.finalize(self)
        norms.plain(self.model)
        positions.make_exact(self.model)
        self.pruner.set_tune("full")
        if choose_best:
            self.load_best()
        self.model.requires_grad_(True)
        as_pruned(self.transformer, self.pruner.family, self.pruner.plan, self.args.remote_code)
        accept_generation_config(self.transformer)
        self.model_wrapped = self.model
        delattr(self.transformer, IN_USE)
        self._finished = True

    def check_finite(self) -> None:
        """Raise :class:`UserError` if any loss so far was not finite; waits for the device."""
        self.step_losses.check_finite(self.state.global_step)

    # ------------------------------------------------------------------ overrides of documented methods

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of the Trainer itself: a checkpoint in training form. After :meth:`train`: the merged, cut model that loads
        anywhere apt_trainer is imported. Raises :class:`UserError` when called in a run, and :class:`RunError`, which
        says where the weights are, when saving fails."""
        self.check_finite()
        if self.is_in_train:
            raise UserError("save_model is for after train(); in a run checkpoints are written by save_strategy.")
        if self.args.should_save:
            path = Path(output_dir or self._output)
            start = self.pruner.origin.plan
            if self.place:
                save_around(self.model, self.place, path, self.pruner.plan, self._saved_tokenizer(), start)
            else:
                kept = self.pruner.kept_adapters
                save_pruned(self.model, path, self.pruner.plan, self._saved_tokenizer(), start, kept)
                self.write_beside(path)

    def write_beside(self, folder: Path) -> None:
        """Write what belongs to the finished model beyond itself to ``folder``, which holds it; by default nothing."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the Trainer's; raises :class:`UserError` on all processes where the hub cannot be written to."""
        with failing_together():
            if self.is_world_process_zero():
                self.hub_model_id = make_repository(self.args, token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload what a save writes, after :meth:`train`; arguments and result as the Trainer's.

        Raises :class:`UserError` before that, and for a hub that cannot be written to.
        """
        if self.place:
            raise UserError(f"push_to_hub uploads a transformer, but {type(self.model).__name__} holds one. Save it.")
        if not self._finished:
            raise UserError("push_to_hub uploads the finished model; call it after train().")
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.hub_model_id = make_repository(self.args, token, private)
        card = self._card
        if card is None or kwargs:
            card = model_card(self.transformer, plan=self.pruner.plan, **kwargs)

        def write(folder: Path) -> None:
            start = self.pruner.origin.plan
            write_model(self.model, folder, self.pruner.plan, self._saved_tokenizer(), card, start)
            self.write_beside(folder)
            if self._beside is not None and self._beside.is_dir():
                put_beside(self._beside, folder)

        return upload(
            self.hub_model_id,
            write,
            self._output,
            blocking,
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the finished model to ``output_dir``; arguments as the Trainer's, or as TRL's, and
        ``results`` and ``recipe`` of :func:`~apt_trainer.store.model_card.model_card`. In a run, where TRL asks for
        one at each checkpoint, there is none to describe."""
        if self.is_world_process_zero() and not self.is_in_train:
            if "dataset_name" in kwargs:
                kwargs["dataset"] = kwargs.pop("dataset_name")
            self._card = model_card(self.transformer, *args, plan=self.pruner.plan, **kwargs)
            self._card.save(self._output / CARD_FILE)

    # ------------------------------------------------------------------ inside

    @property
    def _output(self) -> Path:
        return Path(str(self.args.output_dir))

    def _saved_tokenizer(self) -> Any:
        """What is saved beside the model, as the Trainer chooses it."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)
