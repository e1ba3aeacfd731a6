"""Rollouts of a pipeline and updates on them in `transformers.Trainer`, for any algorithm."""

import contextlib
import functools
import inspect
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import recursively_apply
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..evaluation.alarms import Alarms
from ..evaluation.before_after import BeforeAfter
from ..evaluation.diversity import load_working_diversity
from ..evaluation.evaluator import Evaluator, summarize
from ..media import Media, Outputs
from ..metric_names import ALARM, EVAL_PREFIX
from ..pipeline.adapter_files import save_call_options, save_diffusers_lora
from ..pipeline.flow import PipelineFlow
from ..pipeline.lora import check_stored_weights
from ..pipeline.options import compile_blocks, keep_out_of_ddp
from ..pipeline.patch import shadowed
from ..pipeline.records import Rehearsal
from ..pipeline.replay_check import check_replay_error, default_tolerance, replay_error, tolerance_above
from ..pipeline.trained import restored_on_error, trained_module, trained_modules
from ..planning.memory import Engine
from ..planning.plan import RunPlan
from ..planning.without_weights import plan_without_weights
from ..reporting.logs import MetricsFile, PictureLogger
from ..reporting.progress import FirstRolloutReport
from ..rewards.reward_functions import RewardFunction, RewardFunctions
from ..saving.checkpoint_files import check_optimizer_state, result_files, written_whole
from ..saving.checkpointer import Checkpointer, TimedCheckpoints, TrainingTime, set_options
from ..saving.fingerprint import fingerprint
from ..saving.hub import HubPusher
from ..saving.model_card import check_template
from ..saving.sharded_weights import is_sharded, save_whole_pipeline
from ..saving.signals import Signals
from ..saving.weight_averaging import WeightAveraging
from ..seeds import EVALUATION, derive_seed
from . import checked, publishing
from .accelerate_state import accelerate_state, put_back
from .algorithm import Algorithm
from .buffer import MicroBatch, RolloutBuffer, ScoredBatch
from .config import RolloutConfig
from .engines import (
    adapt_to_trainer,
    called_in_mixed_precision,
    check_attention_backend,
    check_calls_of_levels,
    leave_out_autocast,
    prepare_for_engine,
)
from .metrics import RolloutMetrics
from .migration import arguments_of, unknown_arguments
from .prompts import check_prompts, hold_out, load_prompts, plain
from .rollout_alarms import RolloutAlarms
from .rollouts import sample_rollout
from .setup import (
    check_callbacks,
    check_eval_dataset,
    check_evaluation,
    check_generate,
    check_optimizer,
    check_outputs,
    find_trainable_levels,
    informative_prompts,
    load_datasets,
    make_trainable,
    open_pipeline,
    place_components,
    prepare_pipeline,
    progress_callback,
    refuse_later_noise,
    rehearse,
    tells_rows_apart,
    try_replay,
    warn_of_lengths,
)
from .watchdogs import Watchdogs


logger = logging.get_logger(__name__)


class _LeftOut(Exception):
    """Ends the training step of a micro-batch whose loss is 0."""


class RolloutTrainer(Algorithm, Trainer):
    """
    Online reinforcement learning of a diffusers flow-matching pipeline. A subclass implements an
    [`~trl_fdfo.training.algorithm.Algorithm`].

    Each epoch of the Trainer is one rollout: `_prepare_inputs` samples the images when the buffer is empty,
    `compute_loss` replays one noise level of one batch of them. Everything else is `transformers.Trainer`.

    Args:
        config ([`RolloutConfig`]): All options, of the class that the algorithm has.
        pipeline (`DiffusionPipeline`, `str` or `Path`): A flow-matching pipeline, or a Hub id or path of one.
        reward_fn (`Callable` or `list[Callable]`): Rewards, described in [`trl_fdfo.rewards`]:
            `(images, prompts, **columns) -> one float per image`.
        train_dataset (`datasets.Dataset`, *optional*): Prompts in the column `config.dataset_prompt_column`; all
            columns go to the rewards. Default: the dataset `config.dataset_name`, otherwise the packaged prompts.
        eval_dataset (`datasets.Dataset`, *optional*): Prompts for `evaluate`; or set `config.eval_dataset_name` or
            `config.num_eval_prompts`.
        eval_reward_fn (`Callable` or `list[Callable]`, *optional*): Control rewards: `evaluate` reports them beside the
            rewards of `reward_fn`, and nothing is trained on them.
        callbacks (`list[TrainerCallback]`, *optional*): As in Trainer.
        optimizers (`tuple`): As in Trainer.
        peft_config (`PeftConfig`, *optional*): Adapter in the place of the default LoRA.

    Attributes:
        evaluator ([`~trl_fdfo.evaluation.evaluator.Evaluator`]): Samples and scores without training.
        checkpointer ([`~trl_fdfo.saving.checkpointer.Checkpointer`]): What the run resumes from and writes.
        hub ([`~trl_fdfo.saving.hub.HubPusher`]): Pushes.
        signals ([`~trl_fdfo.saving.signals.Signals`]): SIGTERM and SIGINT.
        averaging ([`~trl_fdfo.saving.weight_averaging.WeightAveraging`], *optional*): Average of the trained weights.
        informative_prompts ([`~trl_fdfo.training.prompt_sampling.InformativePrompts`], *optional*): Draws the prompts under
            `prompt_sampling="informative"`.
        metrics ([`~trl_fdfo.training.metrics.RolloutMetrics`]): Metrics since the last log.
        replay_tolerance (`float`): Largest replay error that does not end the run.
        comparison ([`~trl_fdfo.evaluation.before_after.BeforeAfter`], *optional*): Images and rewards before and after
            training, for the model card.
        best_rollout (`tuple[int, str]`, *optional*): The rollout, from 1 on, after which the run had the weights that
            `load_best_model_at_end` has loaded, and the metric that chose them. None: the weights are the last ones.

    Raises:
        ValueError: Something would fail, or would train something else than was asked for: before the first rollout.
    """

    args: RolloutConfig
    _comparison: BeforeAfter | None = None
    best_rollout: tuple[int, str] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # The signature of a class is that of `__new__`, if it has one.
        cls.__signature__ = inspect.signature(functools.partial(cls.__init__, None))

    def __new__(cls, *args: Any, **arguments: Any) -> "RolloutTrainer":
        checked.check_class(cls)
        error = unknown_arguments(
            cls.__name__, arguments, arguments_of(cls), {field.name for field in fields(cls.config_class)}
        )
        if error:
            raise TypeError(error)
        return super().__new__(cls)

    def __init__(
        self,
        config: RolloutConfig,
        pipeline: DiffusionPipeline | str | os.PathLike,
        reward_fn: RewardFunction | list[RewardFunction],
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        eval_reward_fn: RewardFunction | list[RewardFunction] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"config is of {type(config).__name__}, and {type(self).__name__} takes a `{self.config_class.__name__}`."
            )
        if config.model_card_template is not None:
            check_template(config.model_card_template)
        check_callbacks(callbacks)
        self.reward_functions = RewardFunctions(reward_fn, config.reward_weights)
        self.compared_rewards = self.rewards_to_compare(config, self.reward_functions)
        self.control_functions = None
        if eval_reward_fn is not None:
            self.control_functions = RewardFunctions(eval_reward_fn, argument="eval_reward_fn")
        train_dataset, eval_dataset = load_datasets(config, train_dataset, eval_dataset, self.reward_functions)
        check_evaluation(config, train_dataset, eval_dataset, self.reward_functions, self.control_functions)
        self.informative_prompts = informative_prompts(config, train_dataset)

        self.pipeline = pipeline = open_pipeline(pipeline, config)
        self.flow = PipelineFlow(
            pipeline,
            num_generations=config.num_candidates,
            scheduler_class=self.scheduler_for(config),
            shared_prefix=self.shares_prefix(config),
            **config.call_kwargs(),
        )
        with restored_on_error(pipeline):  # a corrected second try finds it as this one did
            prepare_pipeline(pipeline, config)
            adapt_to_trainer(trained_module(pipeline))
            set_seed(config.seed)  # as Trainer does, but the adapter's first weights are drawn before that
            model = make_trainable(pipeline, config, peft_config)
            check_optimizer(optimizers[0], model)

            self.signals = Signals(saves=config.save_on_signal)
            self.hub = HubPusher(config)
            super().__init__(
                model=model,
                args=config,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=callbacks,
                optimizers=optimizers,
            )
            # The loss is a mean over the micro-batch: Trainer divides it by the number of accumulated ones.
            self.model_accepts_loss_kwargs = False
            self._accelerate_state = accelerate_state()
            prepare_for_engine(self.accelerator, pipeline)
            leave_out_autocast(self.accelerator, self.model)
            check_attention_backend(self.accelerator, config.attention_backend)
            keep_out_of_ddp(self.model)
            # Offloaded parts move to the device when called and leave when the rollout ends.
            self._offload_hooks = place_components(self.flow, config, self.args.device)
            self._add_collaborators()
            self._plan: RunPlan | None = None
            self._buffer: RolloutBuffer | None = None
            self._replay_errors: list[tuple[Tensor, int]] = []  # of the next optimizer step
            self._rehearsal: Rehearsal | None
            self.flow.model = called_in_mixed_precision(self.accelerator, self.model)
            with self.flow.encoders.alone() if self.flow.encoders is not None else contextlib.nullcontext():
                self._rehearsal = rehearse(self.flow, self.args, self.train_dataset, self.eval_dataset)
                self.replay_tolerance = self._try_replay()
            self.offload_components()
            self.sigmas = self._rehearsal.sigmas
            self.trainable_levels = find_trainable_levels(self._rehearsal, pipeline, self.args)
            noise_scale = self._rehearsal.noise_scale
            if noise_scale != 1 and (self.noises_endpoints or checked.noise_amounts(self, 0, [0])[..., 1:].any()):
                refuse_later_noise(pipeline, noise_scale)
            self.outputs = Outputs.of(pipeline, self.flow.call_kwargs, self._rehearsal.images)
            check_calls_of_levels(self._rehearsal, self.trainable_levels, self.accelerator, pipeline)
            self.pictures.outputs = self.outputs
            evaluated = Outputs.of(pipeline, self.eval_call_kwargs(), self._rehearsal.images)
            check_outputs(self.args, self.outputs, evaluated, self.reward_functions, self.control_functions)
            checked.check_methods(self)
            self.checkpointer = Checkpointer(
                self.args.output_dir,
                self._fingerprint(),
                allow_changes=config.resume_with_changed_options,
                save_total_limit=config.save_total_limit,
                is_default=config.is_default,
            )
            if config.save_minutes is not None:
                self.add_callback(TimedCheckpoints(config.save_minutes, self.checkpointer, self.any_process))
            config.hold()

    # Setup ------------------------------------------------------------------------------------------------------------

    def _try_replay(self, decodes: bool = False) -> float:
        """Replay a batch in the kernels that the run will use, and return the replay error that the run allows."""
        arguments = (self.flow, self.args, self.train_dataset)
        floor, all_take_part = try_replay(*arguments, decodes)
        if not all_take_part and self.accelerator.ddp_handler is not None:
            # DDP waits for the gradients of all weights, unless it searches for those that take no part.
            self.accelerator.ddp_handler.find_unused_parameters = True
        # Compile after what is called in other batch sizes, each of which would have graphs of its own.
        if compile_blocks(self.accelerator, trained_module(self.pipeline)):
            if not self.accelerator.state.dynamo_plugin.dynamic:
                warn_of_lengths(self.flow, self.args, self.train_dataset)
            floor = max(floor, try_replay(*arguments)[0])
        if self.args.replay_tolerance is not None:
            return self.args.replay_tolerance
        return tolerance_above(floor, default_tolerance(self.pipeline, self.args.mixed_precision_dtype))

    def _add_average(self, average: WeightAveraging) -> WeightAveraging:
        """Keep an average of the trained weights, which checkpoints have too."""
        self._averages.append(average)
        self.add_callback(average)
        return average

    def _add_collaborators(self) -> None:
        args = self.args
        self._averages: list[WeightAveraging] = []
        self._watchdogs = Watchdogs(args)
        self.metrics = RolloutMetrics(
            self.accelerator,
            self.reward_functions,
            self._watchdogs,
            args.prompts_per_rollout * args.num_candidates,
            args.gradient_accumulation_steps,
            args.steps_per_rollout,
        )
        self.evaluator = Evaluator(
            self._sample,
            self.reward_functions,
            self.control_functions,
            prompt_column=args.dataset_prompt_column,
            sampled_columns=args.pipeline_columns or (),
            batch_size=1 if args.pipeline_columns else args.per_device_eval_batch_size,
            device=args.device,
            disable_tqdm=args.disable_tqdm,
            encode_ahead=self._encode_ahead if self.flow.encoders is not None else None,
        )
        if args.eval_strategy != "no" or args.eval_on_start:
            self._load_diversity()
        self.progress = None
        if self.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:
            self.progress = progress_callback()
            self.add_callback(self.progress)
        self.averaging = None
        if args.ema_decay is not None:
            self.averaging = self._add_average(WeightAveraging(self.model, args.ema_decay))
        self._alarms = Alarms(
            control_drop=args.alarm_control_drop,
            diversity_drop=args.alarm_diversity_drop,
            stop=args.stop_on_alarm,
            controls=self.control_functions.names if self.control_functions is not None else (),
            has_diversity=args.eval_diversity is not None,
            evaluates_at_start=args.eval_on_start,
            steps_per_rollout=args.steps_per_rollout,
            smaller_updates=args.smaller_updates,
        )
        sheets_every = 0 if args.logging_strategy == "no" else args.logging_images_steps
        self.pictures = PictureLogger(self.callback_handler, args.output_dir, sheets_every, args.num_prompts_to_log)
        for callback in (
            self._alarms,
            self.pictures,
            MetricsFile(),
            TrainingTime(),
            RolloutAlarms(),
            FirstRolloutReport(self.metrics.seconds_of_run),
        ):
            self.add_callback(callback)

    def _fingerprint(self) -> dict[str, Any]:
        args = self.args
        return fingerprint(
            {"algorithm": self.algorithm, **args.result_options()},
            self.pipeline,
            self.train_dataset,
            self.reward_functions.describe(),
            adapter=self.model.peft_config["default"] if args.use_peft else None,
            continues_adapter=args.adapter is not None,
        )

    @classmethod
    def plan(
        cls, config: RolloutConfig, name_or_path: str | os.PathLike, rewards: Sequence[str], prompts: Dataset
    ) -> RunPlan:
        """
        The plan of a run that is not started, without weights.

        Args:
            config ([`RolloutConfig`]): Options, of the class `planned(config_class)`.
            name_or_path (`str` or `Path`): Hub id or folder of the pipeline.
            rewards (`Sequence[str]`): Names of the rewards.
            prompts (`datasets.Dataset`): Prompts to train on.
        """
        checked.check_class(cls)
        check_prompts(prompts, config.dataset_prompt_column, config.pipeline_columns or ())
        evaluated = config.num_eval_prompts or 0
        if evaluated:
            prompts, _ = hold_out(prompts, config.dataset_prompt_column, evaluated)
        informative_prompts(config, prompts)  # for its warning
        if config.eval_dataset_name is not None:
            evaluated = len(load_prompts(config.eval_dataset_name, config.dataset_prompt_column, "eval_dataset_name"))
        return plan_without_weights(
            config,
            name_or_path,
            rewards,
            prompts,
            cls.scheduler_for(config),
            cls.algorithm,
            cls.latents_per_target,
            cls.shares_prefix(config),
            evaluated,
            cls.noises_endpoints,
            cls.has_old_policy,
        )

    def run_plan(self) -> RunPlan:
        """What the run will do and what it takes, as text by `str`."""
        if self._plan is None:  # before an engine takes the model apart
            rewards = dict(zip(self.reward_functions.names, self.reward_functions.functions))
            if self.control_functions is not None:
                controls = zip(self.control_functions.names, self.control_functions.functions)
                rewards |= {f"{name} (control)": function for name, function in controls}
            self._plan = RunPlan(
                self.args,
                self.flow,
                self.model,
                self._rehearsal,
                rewards,
                Engine.of(self.accelerator),
                len(self.eval_dataset) if self.eval_dataset is not None else 0,
                algorithm=self.algorithm,
                latents_per_target=self.latents_per_target,
                noises_endpoints=self.noises_endpoints,
                has_old_policy=self.has_old_policy,
            )
            self._rehearsal = None  # frees its memory
        return self._plan

    # Trainer's loop ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As in Trainer, and:

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint, or `True` for the newest good one in
                `output_dir`. If that has none yet, the run starts from the beginning. `None` takes the option
                `resume_from_checkpoint`, which Trainer itself leaves to scripts; `False` resumes from none.

        Raises:
            ValueError: Gradients are off; or there is no such checkpoint, it (or each of them) is damaged, or another run
                wrote it.
            KeyboardInterrupt: SIGINT ended the run.
            SystemExit: SIGTERM ended it.
        """
        if not torch.is_grad_enabled():
            raise ValueError(
                "train was called where gradients are off (`torch.no_grad()`, `torch.inference_mode()` or "
                "`torch.set_grad_enabled(False)`), so that nothing could be learned: call it outside."
            )
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self._on_run_begin()
        self._buffer = None
        self._replay_errors.clear()
        self._watchdogs.forget()
        self.metrics.forget()
        if self.informative_prompts is not None:
            self.informative_prompts.start()
        plan = self.run_plan()  # by each process: it frees the rehearsal
        if self.is_world_process_zero():
            print(plan)
        self.best_rollout = None
        if self.comparison is not None:
            self.comparison.forget_after()
        checkpoint = self.checkpointer.find(resume_from_checkpoint, self.is_world_process_zero())
        if checkpoint is not None and self.is_world_process_zero():
            print(f"Going on from {checkpoint}.")
        if self.args.should_save:
            self.checkpointer.begin(checkpoint)
            if checkpoint is None:
                publishing.set_logs_aside(self)
                self.pictures.written.clear()  # those of this run are an earlier one's for the next
        # An alarm sets it, if it needs a first evaluation, in the config that is the user's too.
        with self.signals, shadowed(self.args, eval_on_start=self.args.eval_on_start):
            return super().train(checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Counts the micro-batches of a rollout; `_prepare_inputs` knows what they are."""
        micro_batches = self.args.steps_per_rollout * self.args.gradient_accumulation_steps
        return DataLoader(range(micro_batches), batch_size=1, collate_fn=lambda indices: {"index": indices[0]})

    def _prepare_inputs(self, inputs: dict[str, int]) -> MicroBatch:
        rollout = self.state.global_step // self.args.steps_per_rollout
        if self._buffer is None or self._buffer.rollout != rollout:
            self._buffer = None  # frees the memory of the last one first
            if self.args.logging_strategy == "no":
                self.metrics.values.clear()  # otherwise `log` does
            with self.metrics.timed("rollout"):
                self._buffer = self._roll_out(rollout)
        micro_batch = self._buffer[inputs["index"]]
        if micro_batch.is_left_out:
            raise _LeftOut
        return micro_batch

    def training_step(self, *args, **kwargs) -> Tensor:
        rollout_before = self.metrics.seconds["rollout"]
        with self.metrics.timed("train"):
            try:
                loss = super().training_step(*args, **kwargs)
            except _LeftOut:
                self.metrics.add_left_out()
                loss = torch.zeros((), device=self.args.device)
            self.end_if_interrupted()
        self.metrics.seconds["train"] -= self.metrics.seconds["rollout"] - rollout_before
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        args = self.args
        self.flow.model = model
        batch, level = self.with_tuple(inputs), inputs.level
        velocity = self.flow.velocity(batch.sampled, level)
        batch = batch.on_device(velocity.device, level)
        old_velocity = batch.sampled.velocities[level]
        if inputs.step == 0 and not self.noises_endpoints:
            self.compare_replay(velocity, old_velocity, level)
        loss, ratio = checked.loss(self, velocity.float(), old_velocity.float(), batch, level)
        if args.beta:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                base_velocity = self.flow.velocity(batch.sampled, level)
            distance = checked.base_distance(self, velocity.float(), base_velocity.float(), batch, level)
            loss = loss + args.beta * distance
            self.metrics.add(**{self.base_distance_name: distance.detach().mean()})
        starts_at_one = inputs.step == 0 and self.samples_with_trained_weights(self._buffer.rollout)
        self.metrics.add_update(ratio, args.epsilon, starts_at_one)
        loss = loss.mean()
        self._watchdogs.watch_loss(loss, velocity, level)
        if self.accelerator.sync_gradients:
            self._check_before_optimizer_step()
        return (loss, velocity) if return_outputs else loss

    def with_tuple(self, inputs: MicroBatch) -> ScoredBatch:
        """The batch of a micro-batch with the tuple (x_t, v_old) of its level: here the one that was recorded."""
        return inputs.batch

    def compare_replay(self, velocity: Tensor, recorded: Tensor, level: int) -> None:
        """Note how far a replayed velocity is from the recorded one; the next optimizer step is refused if it is too far."""
        error = replay_error(velocity, recorded)
        self._replay_errors.append((error, level))
        self.metrics.add(replay_error=error)

    def _check_before_optimizer_step(self) -> None:
        """The host waits here for the device, once for all micro-batches of the step."""
        if self._replay_errors:
            levels = [level for _, level in self._replay_errors]
            errors = torch.stack([error for error, _ in self._replay_errors]).nan_to_num(nan=math.inf).tolist()
            self._replay_errors.clear()
            check_replay_error(*max(zip(errors, levels)), self.pipeline, self.replay_tolerance)
        self._watchdogs.check_losses()

    def _get_grad_norm(self, *args, **kwargs) -> float:
        # Trainer asks for it before the optimizer step.
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.accelerator.scaler is None:
            self._watchdogs.check_gradient(float(norm), self.state.global_step)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Not with the logs of an evaluation, which may fall between two logs of the training.
        if "loss" in logs and self.metrics.values:
            logs.update(self.metrics.drain())
        if logs.pop("train_samples_per_second", None) is not None:  # of the end: Trainer's samples are micro-batches
            rollouts = (self.state.global_step - self._initial_global_step) / self.args.steps_per_rollout
            images = rollouts * self.args.prompts_per_rollout * self.args.num_candidates
            logs["train_images_per_second"] = round(images / logs["train_runtime"], 3)
        super().log(logs, start_time)

    # Rollouts ---------------------------------------------------------------------------------------------------------

    def _roll_out(self, rollout: int) -> RolloutBuffer:
        """Sample the images of this process, score them, and derive from the rewards what is to be learned."""
        return sample_rollout(self, rollout)

    def sampling_weights(self) -> contextlib.AbstractContextManager:
        """The model with the weights that sample the rollouts: the trained ones, as they are."""
        return contextlib.nullcontext()

    def samples_with_trained_weights(self, rollout: int) -> bool:
        """True if a rollout is sampled with the weights that are trained, so that the ratio is 1 before the first step on it."""
        return True

    def _on_run_begin(self) -> None:
        put_back(self._accelerate_state)
        for functions in filter(None, (self.reward_functions, self.control_functions)):
            functions.on_run_begin()

    def offload_components(self) -> None:
        for hook in self._offload_hooks:
            hook.offload()

    # Evaluation -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        columns: dict[str, Sequence] | None = None,
        **call_kwargs: Any,
    ) -> Tensor | Media:
        """
        One image per prompt and seed by the pipeline's own sampler, with the averaged weights if there are some.

        The processes share the work, and all of them must call it; each gets all images.

        Args:
            prompts (`Sequence[str]`): N prompts.
            seeds (`Sequence[int]`): N seeds of the initial noise.
            columns (`dict[str, Sequence]`, *optional*): Columns of the dataset, N values each; those that
                `pipeline_columns` names are passed to the pipeline.
            **call_kwargs: Arguments of the pipeline's call in the place of the configured ones, those of
                `eval_pipeline_kwargs` too.

        Returns:
            `Tensor`: Images on the CPU, floats in [0, 1], shape [N, 3, H, W]; videos [N, F, 3, H, W]; audio [N, C, L] of about
                -1 to 1. A [`~trl_fdfo.media.Media`] with `images` and `audio` if the pipeline makes both.

        Raises:
            ValueError: The numbers of prompts, seeds and values differ, a seed is none, or the pipeline's call cannot have
                such arguments.
        """
        put_back(self._accelerate_state)
        columns = {} if columns is None else columns
        check_generate(self.flow, self.args.pipeline_columns or (), prompts, seeds, columns, call_kwargs)
        with self.averaged_weights():
            images = self.evaluator.generate(prompts, seeds, columns, **call_kwargs)
        self.offload_components()
        return images

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Score `images_per_eval_prompt` images of each prompt, from the same seeds each time, by rewards, control rewards
        and the measure of diversity.

        Returns:
            `dict[str, float]`: Means over the prompts, as docs/evaluation.md lists them: `eval_reward`,
            `eval_rewards/<name>/mean`, `std` over the prompts and `se`, the standard error of the mean; with
            `eval_reward_fn` the same of `eval_control`; with `eval_diversity` that and `eval_diversity_se`; `eval_alarm`, 0
            or 1, if an alarm is on and the prompts are the trainer's own; `eval_runtime` in seconds.
        """
        is_own = eval_dataset is None
        dataset = self.eval_dataset if is_own else plain(eval_dataset, self.args.pipeline_columns or ())
        if dataset is None:
            raise ValueError(
                "evaluate needs prompts: give the trainer an `eval_dataset`, or set `eval_dataset_name` or `num_eval_prompts`."
            )
        rewards, controls = self.reward_functions, self.control_functions
        check_eval_dataset(self.args, dataset, rewards, controls)
        start = time.perf_counter()
        self._on_run_begin()
        self._load_diversity()
        shown: list[Tensor | Media] = []

        def show(number: int, images: Tensor | Media) -> None:
            if len(shown) < self.args.num_prompts_to_log:
                shown.append(recursively_apply(lambda made: made[0].cpu(), images))

        with self.averaged_weights():
            evaluation = self.evaluator.evaluate(
                dataset,
                lambda number, image: derive_seed(self.args.seed, number, image, EVALUATION),
                self.args.images_per_eval_prompt,
                self.state,
                on_images=show,
            )
        self.offload_components()
        first_images = [(rewards, evaluation.rewards[:, 0])]
        if controls is not None:
            first_images.append((controls, evaluation.controls[:, 0]))
        self.pictures.log_evaluation(
            self.state, shown, dataset[self.args.dataset_prompt_column], first_images, metric_key_prefix
        )
        metrics = summarize(evaluation, rewards, controls)
        if is_own and self._alarms.watched:
            named = {EVAL_PREFIX + name: value for name, value in metrics.items()}
            metrics[ALARM] = float(self._alarms.check(named, self.state))
        metrics["runtime"] = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> None:
        """
        Trainer's, which predicts labels.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no predict: there are no labels. `generate` samples images, and `evaluate` scores them."
        )

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> None:
        """
        Trainer's, which makes models anew.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no hyperparameter_search, as it trains the pipeline that it was given: build a trainer "
            "for each trial, with `dataclasses.replace(config, ...)` and a pipeline of its own."
        )

    def compare(self, **options: Any) -> BeforeAfter:
        """
        Samples before and after training, for the model card: `trainer.comparison = trainer.compare(num_prompts=50)`.
        The prompts are the first of `eval_dataset` if there is one, otherwise of the training prompts.

        Args:
            **options: `num_prompts`, `images_per_prompt`, `metrics` and `diversity` of
                [`~trl_fdfo.evaluation.before_after.BeforeAfter`].
        """
        untrained = None
        if self.args.use_peft:
            # Another adapter may have been there before this training.
            name = "before" if self.args.adapter is None else "base model"
            untrained = name, self.model.disable_adapter
        column = self.args.dataset_prompt_column
        knows_rows_by_prompt = self.eval_dataset is None or tells_rows_apart(self.train_dataset, self.args)
        return BeforeAfter(
            self.evaluator,
            self.generate,
            lambda: self.state,
            self.train_dataset if self.eval_dataset is None else self.eval_dataset,
            column,
            self.train_dataset[column] if knows_rows_by_prompt else (),
            untrained,
            **options,
        )

    @property
    def comparison(self) -> BeforeAfter | None:
        return self._comparison

    @comparison.setter
    def comparison(self, comparison: BeforeAfter | None) -> None:
        if comparison is not None and not isinstance(comparison, BeforeAfter):
            raise ValueError(
                f"comparison is a {type(comparison).__name__}: set `trainer.comparison = trainer.compare(...)`, or None."
            )
        if comparison is not None and comparison.evaluator is not self.evaluator:
            raise ValueError(
                "comparison samples the model of another trainer, which the model card of this one would show: set "
                "`trainer.comparison = trainer.compare(...)` of the same trainer."
            )
        self._comparison = comparison

    def averaged_weights(self) -> contextlib.AbstractContextManager:
        """The model with the averaged weights, if there are some."""
        return contextlib.nullcontext() if self.averaging is None else self.averaging.applied()

    def _encode_ahead(self, prompts: Sequence[str], columns: dict[str, Sequence], **call_kwargs: Any) -> list | None:
        with self.compute_loss_context_manager():
            return self.flow.encode_ahead(prompts, columns=columns, **self._evaluated_with(call_kwargs))

    def _sample(
        self, prompts: Sequence[str], seeds: Sequence[int], columns: dict[str, Sequence], **call_kwargs: Any
    ) -> Tensor:
        """Images of this process alone, on its device, in one call of the pipeline."""
        self.flow.model = called_in_mixed_precision(self.accelerator, self.model_wrapped)
        with self.compute_loss_context_manager():
            return self.flow.generate(prompts, seeds, columns, **self._evaluated_with(call_kwargs))

    def _evaluated_with(self, call_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call that is no rollout's, in the place of the rollouts' arguments."""
        return {**(self.args.eval_pipeline_kwargs or {}), **call_kwargs}

    def eval_call_kwargs(self) -> dict[str, Any]:
        """Arguments of the pipeline's call where the result is used: in evaluations, and by whoever loads it."""
        return self.flow.arguments_with(self.args.eval_pipeline_kwargs or {})

    def _load_diversity(self) -> None:
        args = self.args
        if args.eval_diversity is not None and self.evaluator.diversity is None:
            call_kwargs = self.eval_call_kwargs()
            size = (call_kwargs.get("height") or 512, call_kwargs.get("width") or 512)
            self.evaluator.diversity = load_working_diversity(args.eval_diversity, size, args.device)

    # Signals ----------------------------------------------------------------------------------------------------------

    def end_if_interrupted(self) -> None:
        """Between two batches: end the run, unless it is to be saved first."""
        if self.signals.received is not None and not self.args.save_on_signal:
            raise self.signals.exception(self._how_to_resume())

    def is_told_to_end(self) -> bool:
        """
        True if this process has got a signal. If the run is to be saved and all processes take part in a forward pass, True
        if any of them has, so that all sample as many batches.
        """
        told = self.signals.received is not None
        return self.any_process(told) if self.args.save_on_signal and is_sharded(self.model) else told

    def save_if_interrupted(self) -> None:
        """Between two rollouts, called by all processes: save and end the run, if one of them was told to end."""
        if not self.args.save_on_signal or not self.any_process(self.signals.received is not None):
            return
        if self.args.save_only_model or self.checkpointer.existing(self.state.global_step) is None:
            self.checkpointer.interim.add(self.state.global_step)
            self._save_checkpoint(self.model, trial=None)
        if self.signals.received is None:
            raise SystemExit(1)  # for another process, which says why
        raise self.signals.exception(self._how_to_resume())

    def any_process(self, value: bool) -> bool:
        return self.sum_over_processes([value])[0] > 0

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        values = torch.tensor(values, dtype=torch.float32, device=self.args.device)
        return self.accelerator.reduce(values, reduction="sum").tolist()

    def _how_to_resume(self) -> str:
        ended = f"{self.signals.received.name} ended the run after step {self.state.global_step}."
        return f"{ended} {self.checkpointer.how_to_resume()}"

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpointer.folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        step = self.state.global_step
        if step % self.args.steps_per_rollout:
            logger.warning(f"Not saved at step {step}: it is inside a rollout.")
            return
        wait = self.accelerator.wait_for_everyone
        best = self.state.best_model_checkpoint
        # An interim checkpoint is there to resume from, which weights alone do not allow.
        only_model = self.args.save_only_model and step not in self.checkpointer.interim
        staged = self.checkpointer.staged(step, self.args.should_save, wait)
        with shadowed(self.args, save_only_model=only_model), staged as folder:
            super()._save_checkpoint(model, trial)
            wait()
            if self.args.should_save:
                with self._unnamed_best():
                    self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.state.best_model_checkpoint = self.checkpointer.existing(self.state.best_global_step) or best
        publishing.publish_checkpoint(self, self.checkpointer.path(step))

    def _unnamed_best(self) -> contextlib.AbstractContextManager:
        """The state without the path of the best checkpoint, which may name a user and move; it follows from the best step."""
        return shadowed(self.state, best_model_checkpoint=None)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """
        Trainer's, at the ends of rollouts, where a run can be saved: if the best model is to be loaded at the end, it is
        saved when it is evaluated. True if there is something to save.
        """
        args, step = self.args, self.state.global_step
        is_best = step % args.steps_per_rollout == 0 and super()._determine_best_metric(metrics, trial)
        keeps_each = args.save_strategy == SaveStrategy.BEST
        if is_best and args.load_best_model_at_end and not keeps_each and not self.control.should_save:
            self.checkpointer.interim.add(step)
            self.control.should_save = True
        # save_strategy="best" puts this in the place of `should_save`, which an alarm may have set.
        return is_best or self.control.should_save

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        with shadowed(self.args, lr_scheduler_kwargs=self.args.schedule_kwargs()):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        # Noted here, as DeepSpeed puts the checkpoint's in their place before `_load_optimizer_and_scheduler`.
        groups = (optimizer or self.optimizer).param_groups
        self._own_groups = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_optimizer_state(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.args.resume_with_changed_options:
            set_options(self.optimizer, self.lr_scheduler, self._own_groups)
        self.checkpointer.set_best(self.state, self.args, checkpoint)
        for average in self._averages:
            average.load(checkpoint)
        if self.informative_prompts is not None:
            rollouts = self.state.global_step // self.args.steps_per_rollout
            self.informative_prompts.load(checkpoint, position=rollouts * self.args.prompts_per_rollout)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        check_stored_weights(self.model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.averaging is not None:
            self.averaging.load(self.state.best_model_checkpoint)
        metric = EVAL_PREFIX + self.args.metric_for_best_model.removeprefix(EVAL_PREFIX)
        self.best_rollout = self.state.best_global_step // self.args.steps_per_rollout, metric

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            for average in self._averages:
                average.save(output_dir)
            if self.informative_prompts is not None:
                self.informative_prompts.save(output_dir)

    # The result -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the result and its model card: an adapter in the formats of PEFT and of diffusers, or, without an adapter,
        the whole pipeline, with the averaged weights if there are some. With the option `push_to_hub`, push it too; if
        that fails, a warning says how to push it later.

        A checkpoint (`_internal_call`) keeps the trained weights, from which a run resumes.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        else:
            publishing.save(self, output_dir or self.args.output_dir)

    def save_result(self, output_dir: str) -> None:
        """`save_model` without a model card and without a push. If it cannot be written, `output_dir` is left as it was."""
        put_back(self._accelerate_state)
        should_save = self.args.should_save
        owned = result_files(trained_modules(self.pipeline))
        staged = written_whole(output_dir, should_save, self.accelerator.wait_for_everyone, owned)
        with staged as folder, self.averaged_weights():
            if self.args.use_peft:
                super().save_model(str(folder), _internal_call=True)  # for which Trainer does not push
            else:
                save_whole_pipeline(self.pipeline, folder, should_save)
                if should_save:
                    save_call_options(self.eval_call_kwargs(), folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        # Trainer pickles its arguments, and a push uploads them.
        with shadowed(self, args=self.args.redacted()):
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if isinstance(self.model, PeftModel):
            # A run resumes from PEFT's file of a checkpoint; a pipeline uses diffusers' file, with the average.
            if self.averaging is not None:
                state_dict = self.averaging.state_dict()
            save_diffusers_lora(self.pipeline, self.model, output_dir, state_dict)
            save_call_options(self.eval_call_kwargs(), output_dir)

    def save_state(self) -> None:
        """As in Trainer: `state` as `trainer_state.json` in `output_dir`, here without the path of the best checkpoint."""
        with self._unnamed_best():
            super().save_state()

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """
        Write README.md and its pictures into `output_dir`; arguments are those of
        [`~trl_fdfo.training.publishing.write_card`].
        """
        publishing.write_card(self, self.args.output_dir, *args, **options)

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, **options: Any
    ) -> CommitInfo | Future | None:
        """
        Save the result, as `save_model` does, and push all of `output_dir` but its checkpoints. The samples of the model
        card that nobody has made, by `trainer.comparison`, are made first. All processes must call it.

        Args:
            commit_message (`str`): Message of the commit.
            blocking (`bool`): Wait until it is pushed.
            **options: `token`, `revision` (branch) and `private`, which default to the options `hub_token`, `hub_revision`
                and `hub_private_repo`; and arguments of `create_model_card`.

        Returns:
            `CommitInfo`: The commit; without `blocking` a future of it; None on all but the main process.

        Raises:
            PushError: It could not be pushed. Everything is on the disk, and the message says how to push it later.
        """
        self.finish_current_push()
        self.save_result(self.args.output_dir)
        return publishing.push(self, commit_message, blocking, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer calls this before the checkpoint has its name; `_save_checkpoint` publishes it when it has."""

    def finish_current_push(self) -> None:
        """Wait for the push in the background. A signal ends the waiting."""
        self.hub.wait(lambda: self.signals.received is not None)

    def _finish_current_push(self) -> None:
        self.finish_current_push()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repo. Trainer calls it when it is built with `push_to_hub`.

        Raises:
            ValueError: The Hub does not let this user write. (If it cannot be reached, each push tries again.)
        """
        if self.is_world_process_zero():
            self.hub.create_repo_or_warn(token, private)

    @property
    def hub_model_id(self) -> str | None:
        return self.hub.repo_id

    @hub_model_id.setter
    def hub_model_id(self, repo_id: str | None) -> None:
        self.hub.repo_id = repo_id
