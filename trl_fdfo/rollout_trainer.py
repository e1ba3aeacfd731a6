"""Rollouts of a pipeline and updates on them, wired into `transformers.Trainer`: what the algorithms have in common."""

import contextlib
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from accelerate import cpu_offload_with_hook
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, set_seed
from transformers.utils import logging

from .algorithm import SurrogateLoss
from .callbacks import FDFOProgressCallback, FirstRolloutReport, WeightAveraging, peak_memory
from .evaluation import EvaluatingTrainer
from .fdfo_config import FDFOConfig
from .lora import add_adapter, continue_adapter, default_lora_config
from .memory_and_speed import (
    compile_blocks,
    is_quantized,
    keep_out_of_ddp,
    quantization_config,
    set_attention_backend,
    set_vae_options,
)
from .model_card import check_template
from .pipeline_checks import check_call_kwargs
from .pipeline_flow import PipelineFlow, RolloutBatch, check_replay, host_copy, load_pipeline, repeat_each
from .prompt_dataset import check_prompts, hold_out, load_prompts, rollout_rows
from .prompt_embeddings import PromptEmbeddings, text_encoders
from .rewards.reward_functions import PendingRewards, RewardFunction, RewardFunctions
from .rollout_buffer import MicroBatch, RolloutBuffer, ScoredBatch
from .run_description import describe_run
from .run_logging import MetricsFile, PictureLogger
from .run_plan import Engine, RunPlan
from .schedulers import RolloutScheduler
from .seeds import SAMPLER_NOISE, derive_seed
from .trainer_compat import adapt_to_trainer, prepare_for_engine
from .watchdogs import WatchdogError, Watchdogs


logger = logging.get_logger(__name__)


class RolloutTrainer(EvaluatingTrainer):
    """
    Online reinforcement learning of a diffusers flow-matching pipeline. A subclass is an algorithm: it says what the
    noise of a rollout is, what is learnt from its rewards, and the loss.

    Each epoch of the Trainer is one rollout: `_prepare_inputs` samples the images when the buffer is empty,
    `compute_loss` replays one noise level of one batch of them. All else is `transformers.Trainer`.

    Args:
        config ([`FDFOConfig`]): All options, of the class that the algorithm has.
        pipeline (`DiffusionPipeline`, `str` or `Path`): A flow-matching pipeline, or a Hub id or path of one.
        reward_fn (`Callable` or `list[Callable]`): Rewards, described in [`trl_fdfo.rewards`]:
            `(images, prompts, **columns) -> one float per image`.
        train_dataset (`datasets.Dataset`, *optional*): Prompts in the column `config.dataset_prompt_column`; all
            columns go to the rewards. Default: what `config.dataset_name` names, else the packaged prompts.
        eval_dataset (`datasets.Dataset`, *optional*): Prompts for `evaluate`; or set `config.num_eval_prompts`.
        eval_reward_fn (`Callable` or `list[Callable]`, *optional*): Control rewards: `evaluate` reports them beside those
            of `reward_fn`, and nothing is trained on them.
        callbacks (`list[TrainerCallback]`, *optional*): As in Trainer.
        optimizers (`tuple`): As in Trainer.
        peft_config (`PeftConfig`, *optional*): Adapter in the place of the default LoRA.

    Raises:
        ValueError: Something that would fail, or train something else than was asked for: before the first rollout.
    """

    config_class: type[FDFOConfig]
    sampler: type[RolloutScheduler]

    def __init__(
        self,
        config: FDFOConfig,
        pipeline: DiffusionPipeline | str | os.PathLike,
        reward_fn: RewardFunction | list[RewardFunction],
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        eval_reward_fn: RewardFunction | list[RewardFunction] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if not isinstance(config, self.config_class) or config.algorithm != self.config_class.algorithm:
            raise ValueError(
                f"config is of {type(config).__name__}, and {type(self).__name__} takes a `{self.config_class.__name__}`."
            )
        if config.model_card_template is not None:
            check_template(config.model_card_template)
        self.reward_functions = RewardFunctions(reward_fn, config.reward_weights)
        if eval_reward_fn is not None:
            self.control_functions = RewardFunctions(eval_reward_fn, argument="eval_reward_fn")
        if train_dataset is not None and config.dataset_name is not None:
            raise ValueError(
                f"dataset_name='{config.dataset_name}' was given together with a train_dataset: leave one of them out."
            )
        if train_dataset is None:
            train_dataset = load_prompts(config.dataset_name, config.dataset_prompt_column)
        pipeline_columns = config.pipeline_columns or []
        check_prompts(train_dataset, config.dataset_prompt_column, pipeline_columns)
        self.reward_functions.check_columns(train_dataset.column_names)
        if config.num_eval_prompts is not None:
            if eval_dataset is not None:
                raise ValueError(
                    f"num_eval_prompts={config.num_eval_prompts} was given together with an eval_dataset: leave one of them "
                    "out."
                )
            train_dataset, eval_dataset = hold_out(train_dataset, config.dataset_prompt_column, config.num_eval_prompts)
        self._check_evaluation(config, eval_dataset)

        if isinstance(pipeline, (str, os.PathLike)):
            options = {"dtype": torch.bfloat16 if config.bf16 else torch.float32}
            if config.quantization:
                options["quantization_config"] = quantization_config(config.quantization, options["dtype"])
            pipeline = load_pipeline(pipeline, **options)
        elif config.quantization:
            raise ValueError(
                f"quantization='{config.quantization}' is how a pipeline is loaded, and this {type(pipeline).__name__} already "
                "is: give its name or path, or load it with `quantization_config=...` and leave the option out."
            )
        self.pipeline = pipeline
        self.flow = PipelineFlow(
            pipeline,
            num_generations=config.num_generations,
            sampler=self.sampler,
            share_prefix=config.shared_prefix,
            **config.call_kwargs(),
        )
        set_vae_options(pipeline, config.vae_slicing, config.vae_tiling)
        if config.attention_backend is not None:
            set_attention_backend(pipeline, config.attention_backend)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        adapt_to_trainer(pipeline.transformer)
        set_seed(config.seed)  # as Trainer does, but the adapter's first weights are drawn before that
        if config.adapter is not None:
            model = continue_adapter(pipeline, config, peft_config)
        elif config.use_peft:
            model = add_adapter(pipeline, peft_config or default_lora_config(config, pipeline.transformer))
        elif peft_config is not None:
            raise ValueError("peft_config was given together with use_peft=False: leave one of them out.")
        elif is_quantized(pipeline.transformer):
            raise ValueError(
                f"use_peft=False would train the quantised weights of this {type(pipeline).__name__}, which cannot move in "
                "small steps. Set use_peft=True, or load it without quantization."
            )
        else:
            model = pipeline.transformer.requires_grad_(True)

        if optimizers[0] is not None:
            trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
            if not any(id(p) in trained for group in optimizers[0].param_groups for p in group["params"]):
                raise ValueError(
                    "The optimizer that was given has none of the trained weights: the adapter is made here. Set `optim` "
                    "instead, or `trainer.optimizer` before `train`."
                )
        super().__init__(
            model=model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        prepare_for_engine(self.accelerator, pipeline)
        keep_out_of_ddp(self.model)
        # Text encoders, VAE and the like: on the device, or there when they are called and until a rollout is sampled.
        self._offloaded = []
        for name, component in pipeline.components.items():
            if not isinstance(component, torch.nn.Module) or name == "transformer":
                continue
            if config.offload_components or (config.cache_prompt_embeds and name in text_encoders(pipeline)):
                self._offloaded.append(cpu_offload_with_hook(component, self.args.device)[1])
            else:
                component.to(self.args.device)
        # The loss is a mean over the micro-batch: Trainer divides it by the number of accumulated ones.
        self.model_accepts_loss_kwargs = False

        self._progress = None
        if self.pop_callback(ProgressCallback) is not None:
            self._progress = FDFOProgressCallback()
            self.add_callback(self._progress)
        if config.ema_decay is not None:
            self._averaging = WeightAveraging(self.model, config.ema_decay)
            self.add_callback(self._averaging)
        self._add_alarms()
        self._pictures = PictureLogger(config, self.callback_handler)
        self.add_callback(self._pictures)
        self.add_callback(MetricsFile())

        self._plan: RunPlan | None = None
        self._watchdogs = Watchdogs(config.epsilon)
        self._buffer: RolloutBuffer | None = None
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)  # since the last log
        self._seconds_of_run: dict[str, float] = defaultdict(float)
        self.add_callback(FirstRolloutReport(self._seconds_of_run))
        check_call_kwargs(pipeline, pipeline_columns)
        row = train_dataset[0]
        columns = {name: [row[name]] for name in pipeline_columns}
        prompts = [row[config.dataset_prompt_column]] * config.per_device_prompt_batch_size
        self._rehearsal = self.flow.rehearse(prompts, columns, config.num_generations)
        self._sigmas = self._rehearsal.sigmas
        if len(self._sigmas) != config.num_inference_steps + 1:
            raise ValueError(
                f"{type(pipeline).__name__} takes {len(self._sigmas) - 1} steps, not num_inference_steps="
                f"{config.num_inference_steps}: it or `pipeline_kwargs` sets a schedule of its own. Set the option to that."
            )
        larger_batches = config.per_device_sampling_batch_size > config.per_device_prompt_batch_size
        if larger_batches or config.shared_prefix or config.cache_prompt_embeds:
            self.flow.axes(columns)
        if config.cache_prompt_embeds:
            self._cache_prompt_embeds()
        self._offload_components()
        # Not before the rehearsals, some of which are of a size that does not come again.
        compile_blocks(self.accelerator, pipeline.transformer)
        self.run = describe_run(config, pipeline, self.reward_functions, train_dataset, self.model)

    def _cache_prompt_embeds(self) -> None:
        column = self.args.dataset_prompt_column
        prompts = [
            prompt for dataset in (self.train_dataset, self.eval_dataset) if dataset for prompt in dataset[column]
        ]
        disable = self.args.disable_tqdm or not self.is_world_process_zero()
        embeddings = PromptEmbeddings(self.flow, prompts, lambda files: tqdm(files, "encoding", disable=disable))
        if not embeddings.same_shapes and self.args.per_device_sampling_batch_size > 1:
            raise ValueError(
                f"{type(self.pipeline).__name__} encodes prompts to different lengths, and cache_prompt_embeds=True cannot "
                "put them into one batch. Set per_device_prompt_batch_size=1 and per_device_sampling_batch_size=1, or "
                "cache_prompt_embeds=False."
            )
        self.flow.prompt_embeddings = embeddings

    # The algorithm ----------------------------------------------------------------------------------------------------

    def _noise(self, rollout: int, numbers: Sequence[int]) -> Tensor:
        """
        How much noise the sampler adds at each level, shape [T + 1], or at each level for each prompt, shape [P, T + 1].

        Args:
            rollout (`int`): Number of the rollout, from 0.
            numbers (`Sequence[int]`): Places of the P prompts in the rollout over all processes: all that is drawn at
                random follows from these and the seed.
        """
        raise NotImplementedError

    def _seeds(self, rollout: int, numbers: Sequence[int]) -> list[int]:
        """Seeds of the initial noise: one per prompt, which its branches share, or one per branch."""
        raise NotImplementedError

    def _trained_levels(self, rollout: int, batch: int) -> list[int]:
        """The K noise levels that a rollout batch, by its global number, is trained on, in the order of training."""
        raise NotImplementedError

    def _signal(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
        """
        What the loss needs of a batch's total rewards [P, G], NaN where none applies: tensors with N samples in front.
        `rows` are those of its P prompts in the training dataset.
        """
        raise NotImplementedError

    def _loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        """Loss and ratio of each sample, shape [N], from its velocity now and in the rollout, in float32."""
        raise NotImplementedError

    def _distance(self, velocity: Tensor, base_velocity: Tensor, batch: ScoredBatch, level: int) -> Tensor:
        """What `beta` weighs: how far each sample's velocity is from the base model's, shape [N]."""
        raise NotImplementedError

    def _shared_noise(self, rollout: int) -> float | None:
        """Mean share of the noise that the branches of a prompt have in common; None where they are independent."""
        raise NotImplementedError

    # Trainer's loop ---------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        self._buffer = None
        self._seconds_of_run.clear()
        if self.is_world_process_zero():
            print(self.run_plan())
        return super().train(*args, **kwargs)

    def run_plan(self) -> RunPlan:
        """What the run will do and what it takes, as text by `str`."""
        if self._plan is None:  # before an engine takes the model apart
            rewards = dict(zip(self.reward_functions.names, self.reward_functions.functions))
            if self.control_functions is not None:
                controls = zip(self.control_functions.names, self.control_functions.functions)
                rewards |= {f"{name} (control)": function for name, function in controls}
            engine = Engine.of(self.accelerator)
            prompts = len(self.eval_dataset) if self.eval_dataset is not None else 0
            self._plan = RunPlan(self.args, self.flow, self.model, self._rehearsal, rewards, engine, prompts)
            self._rehearsal = None  # frees its memory
        return self._plan

    def get_train_dataloader(self) -> DataLoader:
        """Counts the micro-batches of a rollout; `_prepare_inputs` knows what they are."""
        micro_batches = self.args.steps_per_rollout * self.args.gradient_accumulation_steps
        return DataLoader(range(micro_batches), batch_size=1, collate_fn=lambda indices: {"index": indices[0]})

    def training_step(self, *args, **kwargs) -> Tensor:
        rollout_before = self._seconds["rollout"]
        with self._timed("train"):
            loss = super().training_step(*args, **kwargs)
        self._seconds["train"] -= self._seconds["rollout"] - rollout_before
        return loss

    def _prepare_inputs(self, inputs: dict[str, int]) -> MicroBatch:
        rollout = self.state.global_step // self.args.steps_per_rollout
        if self._buffer is None or self._buffer.rollout != rollout:
            self._buffer = None  # frees the memory of the last one first
            if self.args.logging_strategy == "no":
                self._metrics.clear()  # which `log` does else
            with self._timed("rollout"):
                self._buffer = self._roll_out(rollout)
        return self._buffer[inputs["index"]]

    def _get_grad_norm(self, *args, **kwargs) -> float:
        # Where Trainer asks for it the optimizer step is still to come.
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.accelerator.scaler is None:
            self._watchdogs.check_gradient(float(norm), self.state.global_step)
        return norm

    # Rollouts ---------------------------------------------------------------------------------------------------------

    def _roll_out(self, rollout: int) -> RolloutBuffer:
        """Sample the images of this process, score them and take from the rewards what is to be learnt."""
        args = self.args
        batch_size = args.per_device_prompt_batch_size
        rows = rollout_rows(len(self.train_dataset), args.prompts_per_rollout, rollout, args.seed)
        first_batch = args.process_index * args.num_rollout_batches
        sampled, rewards = [], []
        bar = contextlib.nullcontext()
        if self._progress is not None:
            bar = self._progress.rollout_bar(rollout, args.num_rollout_batches * batch_size)
        at_a_time = args.per_device_sampling_batch_size // batch_size
        batches = range(first_batch, first_batch + args.num_rollout_batches)
        with bar:
            for start in range(0, len(batches), at_a_time):
                if self._is_told_to_end():
                    break  # `_save_if_interrupted` ends the run
                for pending in rewards:
                    pending.raise_errors()
                group = batches[start : start + at_a_time]
                numbers = range(group[0] * batch_size, (group[-1] + 1) * batch_size)
                parts, pending = self._roll_out_batches(rollout, group, numbers, [rows[n] for n in numbers])
                sampled += parts
                rewards.append(pending)
                if self._progress is not None:
                    bar.update(len(numbers))
        with self._timed("reward"):
            while self._interruption.signal is None and not all(pending.done() for pending in rewards):
                time.sleep(0.005)
        self._end_if_interrupted()
        self._save_if_interrupted()
        with self._timed("reward"):
            rewards = torch.cat([pending.result() for pending in rewards]).unflatten(0, (-1, args.num_generations))
            self.reward_functions.on_rollout_end()
        self._offload_components()
        self._pictures.log_rollout(self.state, rewards, self.reward_functions)
        self._record_rewards(rollout, rewards)
        self._record_branches(torch.cat([batch.endpoints for _, batch in sampled]), self._shared_noise(rollout))
        own_rows = rows[first_batch * batch_size : (first_batch + args.num_rollout_batches) * batch_size]
        batches = [
            self._score_batch(levels, batch, values, own_rows[n * batch_size : (n + 1) * batch_size])
            for n, ((levels, batch), values) in enumerate(zip(sampled, rewards.split(batch_size)))
        ]
        return RolloutBuffer(rollout, first_batch, batches, args.optimizer_steps_per_rollout)

    def _roll_out_batches(
        self, rollout: int, batches: Sequence[int], numbers: Sequence[int], rows: list[int]
    ) -> tuple[list[tuple[list[int], RolloutBatch]], PendingRewards]:
        """
        Some batches at once, each with the levels that it is trained on; `numbers` are the places of their prompts in the
        rollout over all processes.
        """
        args = self.args
        branches = args.num_generations
        levels = [self._trained_levels(rollout, batch) for batch in batches]
        columns = self.train_dataset[rows]
        prompts = columns[args.dataset_prompt_column]

        self.flow.model = self.model_wrapped
        with self.compute_loss_context_manager():
            sampled = self.flow.rollout(
                prompts,
                noise=self._noise(rollout, numbers),
                seeds=self._seeds(rollout, numbers),
                noise_seeds=[
                    derive_seed(args.seed, rollout, n * branches + a, SAMPLER_NOISE)
                    for n in numbers
                    for a in range(branches)
                ],
                levels={level for one in levels for level in one},
                columns=self._pipeline_columns(columns),
            )

        if not sampled.endpoints.isfinite().all():
            raise WatchdogError(
                f"{type(self.pipeline).__name__} has sampled latents that are not finite, in {sampled.endpoints.dtype}. Does "
                "it sample well by itself, in this dtype and at this size? If so, lower the sampler's noise (`churn`, or "
                "`noise_level`) or the learning rate."
            )

        repeated = {name: repeat_each(values, branches) for name, values in columns.items()}
        with self._timed("reward"):
            pending = self.reward_functions.submit(
                sampled.images, repeated[args.dataset_prompt_column], self.state, repeated, branches
            )
        self._pictures.keep(self.state, sampled.images, prompts)
        parts = self.flow.split(replace(sampled, images=None), levels)
        if args.offload_trajectories:
            parts = [part.on_host() for part in parts]
        return list(zip(levels, parts)), pending

    def _score_batch(self, levels: list[int], sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> ScoredBatch:
        """A batch with what is to be learnt from its rewards, shape [P, G, number of rewards]."""
        total = self.reward_functions.total(rewards).to(sampled.endpoints.device)
        signal = self._signal(sampled, total, rows)
        return ScoredBatch(
            sampled=replace(sampled, endpoints=None),
            signal=host_copy(signal) if self.args.offload_trajectories else signal,
            levels=levels,
        )

    def _offload_components(self) -> None:
        for hook in self._offloaded:
            hook.offload()

    # Updates ----------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        args = self.args
        batch, level = inputs.batch, inputs.level
        self.flow.model = model
        velocity = self.flow.velocity(batch.sampled, level)
        batch = batch.on_device(velocity.device, level)
        old_velocity = batch.sampled.velocities[level]
        if inputs.step == 0:
            autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            error = check_replay(velocity, old_velocity, self.pipeline, level, autocast)
            self._metrics["replay_error"].append(torch.tensor(error))
        loss, ratio = self._loss(velocity.float(), old_velocity.float(), batch, level)
        if args.beta:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                base_velocity = self.flow.velocity(batch.sampled, level)
            kl = self._distance(velocity.float(), base_velocity.float(), batch, level)
            loss = loss + args.beta * kl
            self._metrics["kl"].append(kl.detach().mean())
        ratio_error = (ratio.detach() - 1).abs()
        self._metrics["ratio"].append(ratio.detach().mean())
        self._metrics["ratio_error"].append(ratio_error.mean())
        self._metrics["clip_ratio"].append((ratio_error > args.epsilon).float().mean())
        if inputs.step == 0:
            self._metrics["first_ratio_error"].append(ratio_error.max())
        loss = loss.mean()
        self._watchdogs.check_loss(loss, velocity, level)
        return (loss, velocity) if return_outputs else loss

    # Logging ----------------------------------------------------------------------------------------------------------

    def _record_rewards(self, rollout: int, rewards: Tensor) -> None:
        """Metrics of a rollout over all processes, under GRPO's names, from this process's rewards [P, G, R]."""
        rewards = self.accelerator.gather(rewards.to(self.args.device))
        total = self.reward_functions.total(rewards)
        std = total.std(dim=1)
        self._metrics["reward"].append(total.nanmean())
        self._metrics["reward_std"].append(std.nanmean())
        # NaN, where no reward applies, teaches as little as a tie.
        idle = ~(std > 0)
        self._metrics["frac_reward_zero_std"].append(idle.float().mean())
        self._watchdogs.check_rewards(rollout, differs=not idle.all())
        for name, values in zip(self.reward_functions.names, rewards.unbind(dim=-1)):
            if values.isnan().all():
                logger.warning(f"Rollout {rollout + 1}: the reward '{name}' applied to none of its images.")
            self._metrics[f"rewards/{name}/mean"].append(values.nanmean())
            self._metrics[f"rewards/{name}/std"].append(values.std(dim=1).nanmean())

    def _record_branches(self, endpoints: Tensor, shared_noise: float | None) -> None:
        """How far the branches of a prompt are apart, from this process's endpoints [P, G, ...]; see `check_branches`."""
        branches = endpoints.shape[1]
        deviation = (endpoints.float() - endpoints.float().mean(dim=1, keepdim=True)).square()
        branch_rms = deviation.flatten(2).mean(dim=-1).sqrt().mean()
        # Independent values deviate from the mean of G of them by sqrt((G - 1) / G) times their standard deviation.
        unrelated = endpoints.float().std() * math.sqrt((branches - 1) / branches)
        values = self.accelerator.reduce(torch.stack([branch_rms, branch_rms / unrelated]), reduction="mean")
        self._metrics["branch_rms"].append(values[0])
        self._metrics["branch_distance"].append(values[1])
        self._watchdogs.check_branches(values[1].item(), shared_noise, endpoints.dtype)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Not with the logs of an evaluation, which may fall between two logs of the training.
        if "loss" in logs and self._metrics:
            logs.update(self._drain_metrics())
        super().log(logs, start_time)

    def _drain_metrics(self) -> dict[str, float]:
        """Means since the last log, over all processes, and where the time went."""
        names = sorted(self._metrics)
        means = torch.stack(
            [torch.stack([value.to(self.args.device) for value in self._metrics[n]]).mean() for n in names]
        )
        metrics = dict(zip(names, self.accelerator.reduce(means, reduction="mean").tolist()))
        if "first_ratio_error" in metrics:
            self._watchdogs.check_first_ratio(metrics["first_ratio_error"])
        if "ratio" in self._metrics:
            self._watchdogs.check_ratio(metrics["ratio_error"])
            updates = len(self._metrics["ratio"]) / self.args.gradient_accumulation_steps
            metrics["step_time"] = self._seconds["train"] / updates
        if "reward" in self._metrics:
            rollouts = len(self._metrics["reward"])
            metrics["rollout_time"] = self._seconds["rollout"] / rollouts
            metrics["reward_time"] = self._seconds["reward"] / rollouts
            metrics["train_time"] = self._seconds["train"] / rollouts
            images = rollouts * self.args.prompts_per_rollout * self.args.num_generations
            metrics["images_per_second"] = images / (self._seconds["rollout"] + self._seconds["train"])
            if self.args.device.type == "cuda":
                metrics["peak_memory"] = self._peak_memory_of_rollout()
        self._metrics.clear()
        self._seconds.clear()
        return metrics

    def _peak_memory_of_rollout(self) -> float:
        """GiB on the GPU that had most, since the last log of a rollout."""
        peak = torch.tensor(peak_memory(self.args.device)[0] / 2**30, device=self.args.device)
        torch.cuda.reset_peak_memory_stats(self.args.device)
        return self.accelerator.gather(peak).max().item()

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        for seconds in (self._seconds, self._seconds_of_run):
            seconds[name] += time.perf_counter() - start
