"""One training is one run of an experiment tracker, although what is evaluated after training is logged too.

The Trainer tells its callbacks that training has ended, and some of them (MLflow's, trackio's, DVCLive's …) close
their run then; the next thing that is logged opens another. Not for what is logged (``trainer``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, MLflowCallback


@contextmanager
def one_run(trainer: Any) -> Iterator[None]:
    """Trackers of ``trainer`` hear of the end of training at the end of the block, unless that fails."""
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    held = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
    for callback in held:
        callback.on_train_end = lambda *args, **kwargs: None
    failed = True
    try:
        yield
        failed = False
    except SystemExit:  # told to end
        failed = False
        raise
    finally:
        of_run = {"model": trainer.model, "processing_class": trainer.processing_class}
        for callback in held:
            del callback.on_train_end
            if not failed:
                callback.on_train_end(trainer.args, trainer.state, trainer.control, **of_run)


def mlflow_run(callbacks: Sequence[TrainerCallback]) -> str | None:
    """Id of the run of MLflow that training has logged to last; None without MLflow."""
    if not any(isinstance(callback, MLflowCallback) for callback in callbacks):
        return None
    import mlflow

    run = mlflow.last_active_run()
    return None if run is None else run.info.run_id


@contextmanager
def reopened(run: str | None) -> Iterator[None]:
    """What is logged in the block goes to ``run``, which :func:`mlflow_run` gave, unless another one is open."""
    if run is None:
        yield
        return
    import mlflow

    if mlflow.active_run() is not None:
        yield
        return
    with mlflow.start_run(run_id=run):
        yield
