"""The run of one process that those of several, and of other engines, are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt_trainer import APTTrainer
from integration.factories import GLOBAL_BATCH, SAVED, trained


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, APTTrainer]:
    """(its folder with the checkpoints ``SAVED``, its trainer), not to be changed."""
    folder = tmp_path_factory.mktemp("single")
    trainer = trained(folder, SAVED, per_device_train_batch_size=GLOBAL_BATCH)
    assert trainer.pruner.sparsity() >= 0.5
    return folder, trainer
