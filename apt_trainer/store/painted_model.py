"""A model that keeps its execution plan: it trains, generates, saves and reloads as the plan runs it.

For fine-tuning with a plan in place. Layers that a plan leaves out stay in memory and in the file and get no
gradients; to be rid of them use ``apt-trainer drop --kind block``. See ``models.execution.painted`` for trying plans.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from apt_trainer.models.execution import check_plan
from apt_trainer.settings.execution_plan import Plan
from apt_trainer.store.saved_model import become_own, put_saved_plan


def paint(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Let ``model`` run its layers by ``plan`` from now on, in place; returns it.

    Weights and their names stay, so ``transformers.Trainer``, PEFT and generation work on. ``save_pretrained`` writes
    the plan too, and :func:`apt_trainer.load_pruned`, or an Auto class after ``import apt_trainer``, reads it back. A
    pruned model may be given a plan, but one with a plan cannot be pruned.

    Args:
        model: Stock or pruned model of one stack of layers, before PEFT wraps it.
        plan: For as many layers as the model has.

    Raises:
        UserError: a family without a table or with two stacks, a plan of another model, or a second plan.
    """
    check_plan(model, plan)
    base_type = getattr(model.config, "apt_base_model_type", model.config.model_type)
    saved = plan.to_json(base_type)
    if getattr(model.config, "apt_structure", None) is None:
        become_own(model, {"replaced": {}, "parameters": {}, "attributes": {}}, saved)
    else:
        model.config.describe(model.config.apt_base_architecture, model.config.apt_structure, saved)
    put_saved_plan(model, plan)
    return model
