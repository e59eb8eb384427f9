"""Uploading a finished model: what can be told before a run, and the upload itself.

The hub gets what a save writes, and nothing of the run. Not for the model card (``store.model_card``).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from apt_trainer.errors import Retold, UserError, reason
from apt_trainer.store.events import DIFFERENCES_FILE, PREDICTIONS_FILE

OF_A_RUN = (
    "checkpoint-*",
    "*.jsonl",
    "runs/*",
    "dense/*",
    "vocabulary/*",
    PREDICTIONS_FILE,
    DIFFERENCES_FILE,
    "*.html",
)
"""Patterns of what lies in the folder of a run beside the model, some of it with rows of the data, and stays there."""
STRATEGY = "end"
"""What can be uploaded: the finished model. A checkpoint of a run is none."""


def check_upload(args: Any) -> None:
    """Raise :class:`UserError` for an upload that cannot come about, as far as this machine alone can tell."""
    if not args.push_to_hub:
        return
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if strategy != STRATEGY:
        raise UserError(
            f"hub_strategy={strategy!r} uploads checkpoints, which hold the state of a run and no model that loads. "
            "Set hub_strategy: end, which uploads the finished model once."
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub: true, but HF_HUB_OFFLINE is set. Unset it, or set push_to_hub: false.")
    if args.hub_token is None and get_token() is None:
        raise UserError(
            "push_to_hub: true, but this machine is not logged in to the hub. Run hf auth login, set HF_TOKEN, or set "
            "push_to_hub: false."
        )
    try:
        validate_repo_id(repository_name(args))
    except HFValidationError as error:
        raise UserError(f"The model cannot be uploaded. {error} Set hub_model_id, for example OWNER/NAME.") from error


def repository_name(args: Any) -> str:
    """The repository on the hub; by default it is called like the output folder."""
    return str(args.hub_model_id or Path(str(args.output_dir)).absolute().name)


def make_repository(args: Any, token: str | None = None, private: bool | None = None) -> str:
    """Make the repository where there is none; returns its full name.

    Raises:
        UserError: the hub cannot be reached, or says no.
    """
    name = repository_name(args)

    def retell(error: Exception) -> Exception:
        return UserError(
            f"The repository {name!r} on the hub ({constants.ENDPOINT}) cannot be written to: {reason(error)}. "
            "Look at the network, the login (hf auth whoami) and hub_model_id, or set push_to_hub: false."
        )

    with Retold(retell):
        private = args.hub_private_repo if private is None else private
        made = HfApi().create_repo(name, token=token or args.hub_token, private=private, exist_ok=True)
        # where there is one already, that says nothing about what this login may do with it
        HfApi().auth_check(made.repo_id, token=token or args.hub_token, write=True)
    return made.repo_id


def upload(repository: str, write: Callable[[Path], None], beside: Path, blocking: bool = True, **options: Any) -> Any:
    """Upload what ``write`` puts into a folder, made in ``beside`` and removed when it is uploaded.

    Args:
        repository: full name.
        write: writes a finished model to a folder.
        beside: on a file system with room for the model.
        blocking: False: returns at once what will be known.
        options: of ``HfApi.upload_folder``.
    """
    folder = tempfile.mkdtemp(prefix=".uploading-", dir=beside)
    waits = False
    try:
        write(Path(folder))
        api: Any = HfApi()
        done = api.upload_folder(repo_id=repository, folder_path=folder, run_as_future=not blocking, **options)
        waits = not blocking
    finally:
        if not waits:
            shutil.rmtree(folder, ignore_errors=True)
    if waits:
        done.add_done_callback(lambda _: shutil.rmtree(folder, ignore_errors=True))
    return done


def put_beside(made: Path, folder: Path) -> None:
    """Put what is in the folder ``made`` into ``folder`` under its name, without taking its room again where the file
    system can."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # not on this file system
            shutil.copy2(source, target)

    shutil.copytree(made, folder / made.name, copy_function=link)
