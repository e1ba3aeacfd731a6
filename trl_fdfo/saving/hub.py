"""Pushes to the Hub, whose failures lose nothing: everything is on the disk first."""

import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api


logger = logging.get_logger(__name__)

# Everything in the output directory is pushed but checkpoints, which `hub_strategy` asks for, and unfinished files.
_NOT_PUSHED = (f"{PREFIX_CHECKPOINT_DIR}-*", "_*")
_HUB_ERRORS = (HTTPError, ConnectionError, LocalTokenNotFoundError)
_REFUSED = (400, 401, 403, 404)  # statuses that a later try does not mend


class PushError(RuntimeError):
    """The result is on the disk, and not on the Hub."""


class HubPusher:
    """
    Pushes a run's output directory.

    Args:
        args (`TrainingArguments`): `push_to_hub`, `output_dir` and the options whose names begin with `hub_`.

    Attributes:
        repo_id (`str`, *optional*): The repo, once it has been created.
    """

    def __init__(self, args: TrainingArguments):
        self._args = args
        self.repo_id: str | None = None
        self._in_progress: PushInProgress | None = None

    # The repo ---------------------------------------------------------------------------------------------------------

    def create_repo(self, token: str | None = None, private: bool | None = None, revision: str | None = None) -> None:
        """
        Create the repo, and its branch `revision`, which defaults to `hub_revision`, if they are not there yet.

        Raises:
            PushError: The Hub refuses or cannot be reached.
        """
        try:
            self._create_repo(token, private, revision)
        except _HUB_ERRORS as error:
            raise PushError(self._how_to_push(error, private, revision)) from error

    def create_repo_or_warn(self, token: str | None = None, private: bool | None = None) -> None:
        """
        The same at the start of a run. If the Hub cannot be reached, each push tries again.

        Raises:
            ValueError: The Hub does not let this user write.
        """
        try:
            self._create_repo(token, private)
        except _HUB_ERRORS as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in _REFUSED or isinstance(error, LocalTokenNotFoundError):
                raise ValueError(
                    f"push_to_hub=True, but the Hub refuses: {error} Log in with `hf auth login` and a token that may "
                    "write, and set hub_model_id to a repo of yours; or leave push_to_hub out."
                ) from error
            logger.warning(f"The Hub cannot be reached now; each push will try again. {self._how_to_push(error)}")

    def _create_repo(self, token: str | None = None, private: bool | None = None, revision: str | None = None) -> None:
        args = self._args
        token = token if token is not None else args.hub_token
        private = private if private is not None else args.hub_private_repo
        self.repo_id = hf_api().create_repo(self.repo_name, token=token, private=private, exist_ok=True).repo_id
        revision = revision or args.hub_revision
        # The Hub alone makes the refs of pull requests.
        if revision is not None and not revision.startswith("refs/"):
            hf_api().create_branch(self.repo_id, branch=revision, token=token, exist_ok=True)

    @property
    def repo_name(self) -> str:
        """The repo's id, or the name that it will get."""
        return self.repo_id or self._args.hub_model_id or Path(self._args.output_dir).absolute().name

    # Pushing ----------------------------------------------------------------------------------------------------------

    def push(
        self, commit_message: str | None, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | Future:
        """
        Push the output directory but its checkpoints, once `create_repo` has made the repo and the branch.

        Raises:
            PushError: It could not be pushed. The message says how to push it later.
        """
        try:
            return hf_api().upload_folder(
                repo_id=self.repo_id,
                folder_path=self._args.output_dir,
                commit_message=commit_message,
                token=token if token is not None else self._args.hub_token,
                run_as_future=not blocking,
                ignore_patterns=list(_NOT_PUSHED),  # to which it adds its own
                revision=revision or self._args.hub_revision,
            )
        except _HUB_ERRORS as error:
            raise PushError(self._how_to_push(error, revision=revision)) from error

    def push_in_background(self, checkpoint: Path, message: str) -> None:
        """Push the result so far, and the checkpoint if `hub_strategy` asks for it, while training goes on."""
        self._in_progress = PushInProgress([hf_api().run_as_future(self._push_checkpoint, checkpoint, message)])

    def _push_checkpoint(self, checkpoint: Path, message: str) -> None:
        """In a thread of its own: whatever happens here, the training goes on."""
        args = self._args
        options = {"token": args.hub_token, "revision": args.hub_revision}
        try:
            if self.repo_id is None:
                self._create_repo()
            hf_api().upload_folder(
                repo_id=self.repo_id,
                folder_path=args.output_dir,
                commit_message=message,
                # TensorBoard is still writing its files: they follow at the end.
                ignore_patterns=[*_NOT_PUSHED, "*tfevents*"],
                **options,
            )
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                is_last = args.hub_strategy == HubStrategy.CHECKPOINT
                hf_api().upload_folder(
                    repo_id=self.repo_id,
                    folder_path=checkpoint,
                    path_in_repo="last-checkpoint" if is_last else checkpoint.name,
                    commit_message=f"{message}, checkpoint",
                    **options,
                )
        except Exception as error:
            logger.warning(f"Training goes on, but a push failed. {self._how_to_push(error)}")

    @property
    def pushes_checkpoints(self) -> bool:
        return self._args.push_to_hub and self._args.hub_strategy != HubStrategy.END

    def is_pushing(self) -> bool:
        return self._in_progress is not None and not self._in_progress.is_done()

    def wait(self, is_told_to_end: Callable[[], bool]) -> None:
        """Wait for the push in the background, which reads the files. A signal ends the waiting."""
        start = time.monotonic()
        told = False
        while self.is_pushing() and not is_told_to_end():
            time.sleep(0.01)
            if not told and time.monotonic() - start > 1:
                logger.warning(
                    f"Waiting for the push to the Hub to end; everything is in {self._args.output_dir} already."
                )
                told = True

    def _how_to_push(self, error: Exception, private: bool | None = None, revision: str | None = None) -> str:
        """The error and the ways to push later, to the same place: `private` and `revision` are those of the failed call."""
        args = self._args
        given = {"revision": revision, "private": private}
        call = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        private = private if private is not None else args.hub_private_repo
        revision = revision or args.hub_revision
        command = ["hf", "upload", self.repo_name, str(args.output_dir), "."]
        command += [f"--exclude={pattern}" for pattern in _NOT_PUSHED]
        command += ["--private"] if private else []
        command += [f"--revision={revision}"] if revision is not None else []
        return (
            f"{type(error).__name__}: {' '.join(str(error).split())} Everything is in {args.output_dir}. To push it later: "
            f"`trainer.push_to_hub({call})`, or {shlex.join(command)}"
        )
