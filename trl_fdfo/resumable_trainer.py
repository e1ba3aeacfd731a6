"""
A Trainer that continues exactly: what is saved, when, and what a run may go on from.

An epoch of this Trainer is a rollout and the optimizer steps on it. Checkpoints stand at the ends of rollouts, so they
hold no rollout data, and random numbers come from (seed, rollout, index): a run that goes on from a checkpoint is the run
that was never stopped, to the bit.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from transformers.utils import logging

from .callbacks import WeightAveraging
from .checkpoints import SAVING, changes, commit, fault, newest_good_checkpoint, removed_on_error, set_aside_after
from .fdfo_config import FDFOConfig
from .interruption import Interruption
from .lora import save_call_options, save_diffusers_lora
from .pipeline_flow import PipelineFlow
from .sharding import is_sharded, whole_model


logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """
    The part of [`FDFOTrainer`] that saves and goes on. A subclass sets the attributes before it calls `train`.

    Attributes:
        pipeline (`DiffusionPipeline`): What is trained.
        flow ([`PipelineFlow`]): How it is sampled.
        run (`dict`): What a run must share with the one that wrote a checkpoint, as JSON values.
    """

    args: FDFOConfig
    pipeline: DiffusionPipeline
    flow: PipelineFlow
    run: dict[str, Any]
    _averaging: WeightAveraging | None = None
    _interruption = Interruption()

    # Resuming ---------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As in Trainer, and:

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint, or `True` for the newest good one in
                `output_dir`; where that has none yet, the run starts from the beginning.

        Raises:
            ValueError: There is no such checkpoint, it (or each of them) is damaged, or this run is another than the one
                that wrote it.
            KeyboardInterrupt: SIGINT ended the run.
            SystemExit: SIGTERM did.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if self.args.should_save:
            # Not from the name, which a download from the Hub changes.
            step = 0
            if checkpoint is not None:
                step = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
            set_aside_after(self.args.output_dir, step)
        with Interruption() as self._interruption:
            return super().train(checkpoint, *args, **kwargs)

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        # From a command line it is a string.
        resume = {"true": True, "false": False}.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        if not resume:
            return None
        if not isinstance(resume, (bool, str, os.PathLike)):
            raise ValueError(f"resume_from_checkpoint={resume!r} must be True, or the path of a checkpoint.")
        # One process reads it all, for the checksums, and the others take or raise what it has found.
        found: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                found[0] = self._good_checkpoint(resume)
            except ValueError as error:
                found[1] = error
        checkpoint, error = broadcast_object_list(found)
        if error is not None:
            raise error
        return checkpoint

    def _good_checkpoint(self, resume: str | bool) -> str | None:
        if resume is True:
            checkpoint = newest_good_checkpoint(self.args.output_dir)
            if checkpoint is None:
                logger.warning(
                    f"There is no checkpoint in {self.args.output_dir} yet: the run starts from the beginning."
                )
                return None
        else:
            checkpoint = Path(resume)
            found = fault(checkpoint)
            if found is not None:
                raise ValueError(f"Cannot resume from {checkpoint}: {found}.")
        changed = changes(checkpoint, self.run)
        for_good = [change for change in changed if change.startswith(("use_peft:", "optim:", "adapter."))]
        if for_good:
            raise ValueError(
                f"{checkpoint} has the weights and optimizer of another run: {'; '.join(for_good)}. No run can go on from "
                "them with these options: set them back, or start anew."
            )
        if changed and not self.args.resume_with_changed_options:
            raise ValueError(
                f"{checkpoint} is from another run: {'; '.join(changed)}. Set them back, or set "
                "resume_with_changed_options=True to go on with what is new."
            )
        if changed:
            logger.warning(f"Going on from {checkpoint} with changes: {'; '.join(changed)}.")
        return str(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            if not Path(checkpoint, OPTIMIZER_NAME).is_file():
                raise ValueError(
                    f"{checkpoint} has no {OPTIMIZER_NAME}: it was saved with save_only_model=True, and a run cannot go on "
                    "from its weights alone, or by a run with DeepSpeed or FSDP, which only such a run reads. Load its "
                    "weights as the start of a new run."
                )
        made = [dict(group) for group in self.optimizer.param_groups] if self.optimizer is not None else []
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.args.resume_with_changed_options and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._apply_options(made)
        self.state.best_model_checkpoint = self._best_checkpoint(Path(checkpoint).parent)
        rollouts, inside = divmod(self.state.global_step, self.args.steps_per_rollout)
        if inside:
            raise ValueError(
                f"{checkpoint} is from step {self.state.global_step}, inside a rollout of {self.args.steps_per_rollout} "
                "steps, whose data is gone. Resume with the optimizer_steps_per_rollout and num_iterations of that run, "
                "or from a checkpoint at the end of a rollout."
            )
        if self._averaging is not None:
            self._averaging.load(checkpoint, updates=rollouts)

    def _apply_options(self, made: list[dict[str, Any]]) -> None:
        """The learning rate, betas and the like of this run in the place of those that came with the checkpoint."""
        for group, own in zip(self.optimizer.param_groups, made):
            group.update({name: value for name, value in own.items() if name != "params"})
        scheduler = self.lr_scheduler
        if hasattr(scheduler, "lr_lambdas"):
            scheduler.base_lrs = [own.get("initial_lr", own["lr"]) for own in made]
            for group, factor, rate in zip(self.optimizer.param_groups, scheduler.lr_lambdas, scheduler.base_lrs):
                group["lr"] = rate * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._averaging is not None:
            rollouts = self.state.best_global_step // self.args.steps_per_rollout
            self._averaging.load(self.state.best_model_checkpoint, updates=rollouts)

    # Stopping ---------------------------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._end_if_interrupted()
        return loss

    def _end_if_interrupted(self) -> None:
        """Between two batches: end the run, unless it is to be saved first."""
        if self._interruption.signal is not None and not self.args.save_on_signal:
            raise self._interruption.exception(self._how_to_resume())

    def _is_told_to_end(self) -> bool:
        """
        Whether this process has got a signal; where the run is to be saved and a forward pass is one of all processes,
        whether any of them has, so that all sample as many batches.
        """
        told = self._interruption.signal is not None
        return self._any(told) if self.args.save_on_signal and is_sharded(self.model) else told

    def _any(self, value: bool) -> bool:
        return self.accelerator.reduce(torch.tensor(float(value), device=self.args.device), reduction="sum") > 0

    def _save_if_interrupted(self) -> None:
        """Between two rollouts, called by all processes: save and end the run, if one of them was told to end."""
        if not self.args.save_on_signal or not self._any(self._interruption.signal is not None):
            return
        if not Path(self._checkpoint_folder()).is_dir():
            self._save_checkpoint(self.model, trial=None)
        if self._interruption.signal is None:
            raise SystemExit(1)  # for another process, which says why
        raise self._interruption.exception(self._how_to_resume())

    def _how_to_resume(self) -> str:
        ended = f"{self._interruption.signal.name} ended the run after step {self.state.global_step}. "
        checkpoints = sort_checkpoints(self.args.output_dir, PREFIX_CHECKPOINT_DIR)
        if not checkpoints:
            return f"{ended}There is no checkpoint in {self.args.output_dir} yet: it will start from the beginning."
        return f"{ended}To go on from {checkpoints[-1]}: train(resume_from_checkpoint=True), or --resume_from_checkpoint true."

    # Saving -----------------------------------------------------------------------------------------------------------

    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _best_checkpoint(self, output_dir: Path) -> str | None:
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        return str(best) if best.is_dir() else None

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        if self.state.global_step % self.args.steps_per_rollout:
            logger.warning(f"Not saved at step {self.state.global_step}: it is inside a rollout.")
            return
        final = self._checkpoint_folder()
        saving = final.parent / SAVING
        with removed_on_error(saving, is_writer=self.args.should_save):
            if self.args.should_save:
                shutil.rmtree(saving, ignore_errors=True)  # left by a run that was killed
            self.accelerator.wait_for_everyone()
            # Trainer asks `_get_output_dir` where its checkpoints are.
            self._get_output_dir = lambda trial: str(saving)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                del self._get_output_dir
            self.accelerator.wait_for_everyone()
            # Not into the file: the folder may be moved, and its path may name a user. It follows from the best step.
            self.state.best_model_checkpoint = None
            if self.args.should_save:
                self.state.save_to_json(str(saving / final.name / TRAINER_STATE_NAME))
                commit(saving / final.name, final, self.run)
                shutil.rmtree(saving)
        self.accelerator.wait_for_everyone()
        self.state.best_model_checkpoint = self._best_checkpoint(final.parent)
        self._on_checkpoint(final)

    def _on_checkpoint(self, checkpoint: Path) -> None:
        """What follows when all of a checkpoint is on the disk, on all processes."""
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(checkpoint.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called by Trainer before the checkpoint has its name; `_on_checkpoint` is when it has."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the adapter in the formats of PEFT and of diffusers, or, without an adapter, the whole pipeline.

        The weights are the averaged ones where there are some; a checkpoint (`_internal_call`) keeps the trained ones,
        from which a run goes on.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        with self._averaged_weights():
            if self.args.use_peft:
                super().save_model(output_dir, _internal_call=True)  # for which Trainer does not push
            else:
                with whole_model(self.model):
                    if self.args.should_save:
                        save_pipeline(self.pipeline, output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            # PEFT's file of a checkpoint is what a run goes on from; this one is what a pipeline is to use.
            if self._averaging is not None:
                state_dict = self._averaging.state_dict()
            save_diffusers_lora(self.pipeline, self.model, output_dir or self.args.output_dir, state_dict)
            save_call_options(self.flow.call_kwargs, output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._averaging is not None and self.args.should_save:
            self._averaging.save(output_dir)

    def _averaged_weights(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._averaging is None else self._averaging.applied()


def save_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """`pipeline.save_pretrained`, and nothing in its files of the folders of this machine that its parts came from."""
    pipeline.save_pretrained(folder)
    for file in Path(folder).glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
