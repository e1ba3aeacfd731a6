"""A Trainer that shares its result: the model card, and pushes to the Hub of which no failure loses anything."""

import shlex
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress, hf_api

from .comparison import Comparison
from .model_card import write_model_card
from .resumable_trainer import ResumableTrainer


logger = logging.get_logger(__name__)

# Of the output directory everything is pushed but checkpoints, which `hub_strategy` asks for, and what is being written.
_NOT_PUSHED = (f"{PREFIX_CHECKPOINT_DIR}-*", "_*")
_HUB_ERRORS = (HTTPError, ConnectionError, LocalTokenNotFoundError)


class PushError(RuntimeError):
    """The result is on the disk, and not on the Hub."""


class HubTrainer(ResumableTrainer):
    """
    The part of [`FDFOTrainer`] that shares. The options are those of Trainer: `push_to_hub`, `hub_model_id`, `hub_strategy`,
    `hub_private_repo`, `hub_revision`, `hub_token`, `hub_always_push`.

    Attributes:
        comparison ([`Comparison`], *optional*): Images and rewards before and after training, for the model card.
    """

    comparison: Comparison | None = None
    push_in_progress: PushInProgress | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Called when a trainer with `push_to_hub` is built.

        Raises:
            ValueError: The Hub does not let this user write. (Where it cannot be reached, each push tries again.)
        """
        try:
            self._create_repo(token, private)
        except _HUB_ERRORS as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (400, 401, 403, 404) or isinstance(error, LocalTokenNotFoundError):
                raise ValueError(
                    f"push_to_hub=True, but the Hub refuses: {error} Log in with `hf auth login` and a token that may "
                    "write, and set hub_model_id to a repo of yours; or leave push_to_hub out."
                ) from error
            logger.warning(f"The Hub cannot be reached now; each push will try again. {self._how_to_push(error)}")

    def _create_repo(self, token: str | None = None, private: bool | None = None) -> None:
        super().init_hf_repo(token, private)
        if self.hub_model_id is not None and self.args.hub_revision is not None:
            token = token if token is not None else self.args.hub_token
            hf_api().create_branch(self.hub_model_id, branch=self.args.hub_revision, token=token, exist_ok=True)

    def train(self, *args, **kwargs):
        if self.comparison is not None:
            self.comparison.forget_after()
        return super().train(*args, **kwargs)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        base_model: str | None = None,
    ) -> None:
        """
        Write README.md and its pictures into `output_dir`; see [`~trl_fdfo.model_card.write_model_card`].
        """
        if self.is_world_process_zero():
            write_model_card(self, self.args.output_dir, model_name, dataset_name, tags, license, base_model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the result and its model card: an adapter in the formats of PEFT and of diffusers, or, without an adapter,
        the whole pipeline, with the averaged weights where there are some. With the option `push_to_hub`, push it too;
        where that fails, a warning says how to push it later.
        """
        if _internal_call:  # a checkpoint
            super().save_model(output_dir, _internal_call)
            return
        self._finish_current_push()  # which reads the files
        output_dir = output_dir or self.args.output_dir
        super().save_model(output_dir)
        if self.is_world_process_zero():
            write_model_card(self, output_dir)
        if self.args.push_to_hub:
            if Path(output_dir) != Path(self.args.output_dir):
                super().save_model(self.args.output_dir)
            try:
                self._push_result("Model save", revision=self.args.hub_revision)
            except PushError as error:
                logger.warning(str(error))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Save the result, as `save_model` does, and push all of `output_dir` but its checkpoints. What the model card shows
        and nobody has sampled, by `trainer.comparison`, is sampled first. To be called by all processes.

        Args:
            commit_message (`str`): Message of the commit.
            blocking (`bool`): Whether to wait until it is pushed.
            token (`str`, *optional*): Default: `hub_token`, or that of `hf auth login`.
            revision (`str`, *optional*): Branch; default: `hub_revision`, or main.
            private (`bool`, *optional*): Whether a repo that is created is private; default: `hub_private_repo`.
            **kwargs: Arguments of `create_model_card`.

        Returns:
            `CommitInfo`: The commit; without `blocking` a future of it; None but on the main process.

        Raises:
            PushError: It could not be pushed. Everything is on the disk, and the message says how to push it later.
        """
        self._finish_current_push()
        super().save_model(self.args.output_dir)
        return self._push_result(commit_message, blocking, token, revision, private, **kwargs)

    def _push_result(
        self,
        commit_message: str | None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Push what has been saved in `output_dir`, with a model card that shows images."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.comparison is None:
            self.comparison = Comparison(self)
        self.comparison.complete()
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        try:
            if self.hub_model_id is None:
                self._create_repo(token, private)
                self.create_model_card(**kwargs)  # now that it knows its place
            return hf_api().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=self.args.output_dir,
                commit_message=commit_message,
                token=token if token is not None else self.args.hub_token,
                run_as_future=not blocking,
                ignore_patterns=list(_NOT_PUSHED),  # to which it adds its own
                revision=revision or self.args.hub_revision,
            )
        except _HUB_ERRORS as error:
            raise PushError(self._how_to_push(error)) from error

    def _on_checkpoint(self, checkpoint: Path) -> None:
        pushes = self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END
        if pushes and self.args.hub_always_push:
            self._finish_current_push()
        if pushes and self._any(self._is_pushing()):
            # It may be reading an older checkpoint, which would be deleted, and the files of the result.
            logger.info(f"Not pushed at step {self.state.global_step}: the push before it is not done.")
            return
        super()._on_checkpoint(checkpoint)
        if not pushes:
            return
        super().save_model(self.args.output_dir)
        if not self.is_world_process_zero():
            return
        self.create_model_card()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.push_in_progress = PushInProgress(
            [hf_api().run_as_future(self._push_in_background, checkpoint, self._now())]
        )

    def _now(self) -> str:
        if self.args.save_strategy == SaveStrategy.STEPS:
            return f"Training in progress, step {self.state.global_step}"
        return f"Training in progress, epoch {int(self.state.epoch)}"

    def _push_in_background(self, checkpoint: Path, message: str) -> None:
        """In a thread of its own: whatever happens here, the training goes on."""
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        try:
            if self.hub_model_id is None:
                self._create_repo()
            # What TensorBoard is writing follows at the end.
            ignored = [*_NOT_PUSHED, "*tfevents*"]
            folder = self.args.output_dir
            hf_api().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=message,
                ignore_patterns=ignored,
                **options,
            )
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
                hf_api().upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint,
                    path_in_repo="last-checkpoint" if is_last else checkpoint.name,
                    commit_message=f"{message}, checkpoint",
                    **options,
                )
        except Exception as error:
            logger.warning(f"Training goes on, but a push failed. {self._how_to_push(error)}")

    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def _finish_current_push(self) -> None:
        """Wait for the push in the background. A signal ends the waiting, and Ctrl-C outside of `train`."""
        start = time.monotonic()
        told = False
        while self._is_pushing() and self._interruption.signal is None:
            time.sleep(0.01)
            if not told and time.monotonic() - start > 1:
                logger.warning(
                    f"Waiting for the push to the Hub to end; everything is in {self.args.output_dir} already."
                )
                told = True

    def _how_to_push(self, error: Exception) -> str:
        args = self.args
        repo_id = self.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        command = ["hf", "upload", repo_id, str(args.output_dir), "."]
        command += [f"--exclude={pattern}" for pattern in _NOT_PUSHED]
        command += ["--private"] if args.hub_private_repo else []
        command += [f"--revision={args.hub_revision}"] if args.hub_revision is not None else []
        return (
            f"{type(error).__name__}: {' '.join(str(error).split())} Everything is in {args.output_dir}. To push it later: `trainer.push_to_hub()`, "
            f"or {shlex.join(command)}"
        )
