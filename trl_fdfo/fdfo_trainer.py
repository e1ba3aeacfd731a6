"""The trainer: wires the four steps of FDFO (arXiv 2603.12893) into `transformers.Trainer`. The maths is elsewhere."""

import contextlib
import math
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload_with_hook
from datasets import Dataset, Value
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, set_seed
from transformers.utils import logging

from .algorithm import constant_churn, finite_difference, interval_churn, prior_churn, surrogate_loss
from .callbacks import FDFOProgressCallback, WeightAveraging
from .fdfo_config import FDFOConfig
from .hub_trainer import HubTrainer
from .lora import add_adapter, continue_adapter, default_lora_config
from .model_card import check_template
from .pipeline_checks import check_call_kwargs
from .pipeline_flow import PipelineFlow, RolloutBatch, check_replay, host_copy, load_pipeline, repeat_each
from .prompt_dataset import check_prompts, load_prompts, rollout_rows
from .rewards.reward_functions import PendingRewards, RewardFunction, RewardFunctions
from .rollout_buffer import MicroBatch, RolloutBuffer, ScoredBatch, trained_levels
from .trainer_compat import adapt_to_trainer, prepare_for_engine
from .watchdogs import WatchdogError, Watchdogs


logger = logging.get_logger(__name__)


class FDFOTrainer(HubTrainer):
    """
    Post-trains a diffusers flow-matching pipeline with Finite Difference Flow Optimization.

    ```python
    FDFOTrainer(FDFOConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Each epoch of the Trainer is one rollout: `_prepare_inputs` samples the images when the buffer is empty (steps 1 to
    3), `compute_loss` replays one noise level of one batch of them (step 4). All else is `transformers.Trainer`.

    Args:
        config ([`FDFOConfig`]): All options.
        pipeline (`DiffusionPipeline`, `str` or `Path`): A flow-matching pipeline, or a Hub id or path of one.
        reward_fn (`Callable` or `list[Callable]`): Rewards, described in [`trl_fdfo.rewards`]:
            `(images, prompts, **columns) -> one float per image`.
        train_dataset (`datasets.Dataset`, *optional*): Prompts in the column `config.dataset_prompt_column`; all
            columns go to the rewards. Default: what `config.dataset_name` names, else the packaged prompts.
        eval_dataset (`datasets.Dataset`, *optional*): Prompts for `evaluate`.
        eval_reward_fn (`Callable` or `list[Callable]`, *optional*): Rewards for `evaluate`, summed without weights;
            default: `reward_fn` with its weights.
        callbacks (`list[TrainerCallback]`, *optional*): As in Trainer.
        optimizers (`tuple`): As in Trainer.
        peft_config (`PeftConfig`, *optional*): Adapter in the place of the default LoRA.

    Raises:
        ValueError: Something that would fail, or train something else than was asked for: before the first rollout.
    """

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
        if not isinstance(config, FDFOConfig):
            raise ValueError(f"config is a {type(config).__name__}, not a `FDFOConfig`.")
        if config.model_card_template is not None:
            check_template(config.model_card_template)
        self.reward_functions = RewardFunctions(reward_fn, config.reward_weights)
        self.eval_reward_functions = self.reward_functions
        if eval_reward_fn is not None:
            self.eval_reward_functions = RewardFunctions(eval_reward_fn, argument="eval_reward_fn")
        if train_dataset is not None and config.dataset_name is not None:
            raise ValueError(
                f"dataset_name='{config.dataset_name}' was given together with a train_dataset: leave one of them out."
            )
        if train_dataset is None:
            train_dataset = load_prompts(config.dataset_name, config.dataset_prompt_column)
        pipeline_columns = config.pipeline_columns or []
        check_prompts(train_dataset, config.dataset_prompt_column, pipeline_columns)
        self.reward_functions.check_columns(train_dataset.column_names)
        if eval_dataset is not None:
            check_prompts(eval_dataset, config.dataset_prompt_column, pipeline_columns, "eval_dataset")
            self.eval_reward_functions.check_columns(eval_dataset.column_names, "eval_dataset")
            self._check_best_metric(config.metric_for_best_model)

        elif config.eval_strategy != "no" or config.eval_on_start:
            raise ValueError("eval_strategy or eval_on_start is set, and there is no eval_dataset: give one.")

        if isinstance(pipeline, (str, os.PathLike)):
            pipeline = load_pipeline(pipeline, dtype=torch.bfloat16 if config.bf16 else torch.float32)
        self.pipeline = pipeline
        options = {"guidance_scale": config.guidance_scale, "height": config.height, "width": config.width}
        self.flow = PipelineFlow(
            pipeline,
            num_generations=config.num_generations,
            num_inference_steps=config.num_inference_steps,
            **{name: value for name, value in options.items() if value is not None},
            **(config.pipeline_kwargs or {}),
        )
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
        # Text encoders, VAE and the like: on the device, or there when they are called and until a rollout is sampled.
        others = [
            component
            for name, component in pipeline.components.items()
            if isinstance(component, torch.nn.Module) and name != "transformer"
        ]
        self._offloaded = []
        for component in others:
            if config.offload_components:
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

        self._watchdogs = Watchdogs(config.epsilon)
        self._buffer: RolloutBuffer | None = None
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        row = train_dataset[0]
        check_call_kwargs(pipeline, pipeline_columns)
        self._sigmas = self.flow.noise_levels(
            row[config.dataset_prompt_column], {name: row[name] for name in pipeline_columns}
        )
        if len(self._sigmas) != config.num_inference_steps + 1:
            raise ValueError(
                f"{type(pipeline).__name__} takes {len(self._sigmas) - 1} steps, not num_inference_steps="
                f"{config.num_inference_steps}: it or `pipeline_kwargs` sets a schedule of its own. Set the option to that."
            )
        self.run = describe_run(config, pipeline, self.reward_functions, train_dataset, self.model)

    # Trainer's loop ---------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        self._buffer = None
        if self.is_world_process_zero():
            print(self.run_plan())
        return super().train(*args, **kwargs)

    def run_plan(self) -> str:
        """What the run will do, in a few lines."""
        args = self.args
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        images = args.prompts_per_rollout * args.num_generations
        tuples = images * args.num_trained_levels * args.num_iterations
        return "\n".join(
            [
                f"FDFO on {type(self.pipeline).__name__}, {args.world_size} process(es), {args.device.type}",
                f"  trainable parameters  {trainable:,} of {total:,} ({100 * trainable / total:.2f}%)",
                f"  rollouts              {args.num_rollouts}, of {args.prompts_per_rollout} prompts x "
                f"{args.num_generations} images x {args.num_inference_steps} steps = "
                f"{images * args.num_inference_steps:,} transformer samples",
                f"  updates per rollout   {args.steps_per_rollout} optimizer steps on {tuples:,} samples "
                f"({args.num_trained_levels} of {args.num_inference_steps} noise levels)",
                f"  micro-batches         {args.gradient_accumulation_steps} per optimizer step and process, of "
                f"{args.per_device_train_batch_size} samples",
            ]
        )

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

    # Steps 1 to 3 -----------------------------------------------------------------------------------------------------

    def _roll_out(self, rollout: int) -> RolloutBuffer:
        """Sample the images of this process, score them and take the finite differences."""
        args = self.args
        batch_size = args.per_device_prompt_batch_size
        rows = rollout_rows(len(self.train_dataset), args.prompts_per_rollout, rollout, args.seed)
        first_batch = args.process_index * args.num_rollout_batches
        sampled, rewards = [], []
        bar = contextlib.nullcontext()
        if self._progress is not None:
            bar = self._progress.rollout_bar(rollout, args.num_rollout_batches * batch_size)
        with bar:
            for batch in range(first_batch, first_batch + args.num_rollout_batches):
                if self._is_told_to_end():
                    break  # `_save_if_interrupted` ends the run
                for pending in rewards:
                    pending.raise_errors()
                levels = trained_levels(
                    args.num_inference_steps,
                    args.num_trained_levels,
                    args.optimizer_steps_per_rollout,
                    args.seed,
                    rollout,
                    batch,
                )
                numbers = range(batch * batch_size, (batch + 1) * batch_size)
                one, pending = self._roll_out_batch(rollout, levels, numbers, [rows[n] for n in numbers])
                sampled.append((levels, one))
                rewards.append(pending)
                if self._progress is not None:
                    bar.update(batch_size)
        with self._timed("reward"):
            while self._interruption.signal is None and not all(pending.done() for pending in rewards):
                time.sleep(0.005)
        self._end_if_interrupted()
        self._save_if_interrupted()
        with self._timed("reward"):
            rewards = [pending.result().unflatten(0, (batch_size, args.num_generations)) for pending in rewards]
            self.reward_functions.on_rollout_end()
        self._offload_components()
        self._record_rewards(rollout, torch.cat(rewards))
        gammas = torch.atleast_2d(self._churn(rollout, range(len(rows))))
        shared_noise = (-gammas.log1p().sum(dim=1)).exp().mean().item()
        self._record_branches(torch.cat([batch.endpoints for _, batch in sampled]), shared_noise)
        batches = [self._score_batch(*batch, rewards=values) for batch, values in zip(sampled, rewards)]
        return RolloutBuffer(rollout, first_batch, batches, args.optimizer_steps_per_rollout)

    def _roll_out_batch(
        self, rollout: int, levels: list[int], numbers: Sequence[int], rows: list[int]
    ) -> tuple[RolloutBatch, PendingRewards]:
        """Steps 1 and 2 for a batch of P prompts, `numbers` being their places in the rollout over all processes."""
        args = self.args
        branches = args.num_generations
        columns = self.train_dataset[rows]
        prompts = columns[args.dataset_prompt_column]

        # Step 1: paired rollouts
        self.flow.model = self.model_wrapped
        with self.compute_loss_context_manager():
            sampled = self.flow.rollout(
                prompts,
                gammas=self._churn(rollout, numbers),
                seeds=[derive_seed(args.seed, rollout, n, 0) for n in numbers],
                noise_seeds=[
                    derive_seed(args.seed, rollout, n * branches + a, 1) for n in numbers for a in range(branches)
                ],
                levels=levels,
                columns=self._pipeline_columns(columns),
            )

        if not sampled.endpoints.isfinite().all():
            raise WatchdogError(
                f"{type(self.pipeline).__name__} has sampled latents that are not finite, in {sampled.endpoints.dtype}. Does "
                "it sample well by itself, in this dtype and at this size? If so, lower `churn` or the learning rate."
            )

        # Step 2: rewards
        repeated = {name: repeat_each(values, branches) for name, values in columns.items()}
        with self._timed("reward"):
            pending = self.reward_functions.submit(
                sampled.images, repeated[args.dataset_prompt_column], self.state, repeated, branches
            )
        sampled = replace(sampled, images=None)
        return sampled.on_host() if args.offload_trajectories else sampled, pending

    def _score_batch(self, levels: list[int], sampled: RolloutBatch, rewards: Tensor) -> ScoredBatch:
        """Step 3, the finite difference, from the rewards [P, G, number of rewards] of a batch."""
        endpoints = sampled.endpoints.float()
        direction, reward_difference = finite_difference(
            endpoints, self.reward_functions.total(rewards).to(endpoints.device)
        )
        direction = direction.flatten(0, 1)
        return ScoredBatch(
            sampled=replace(sampled, endpoints=None),
            direction=host_copy(direction) if self.args.offload_trajectories else direction,
            # A prompt to which no reward applies teaches nothing.
            reward_difference=reward_difference.flatten().nan_to_num(nan=0.0),
            levels=levels,
        )

    def _offload_components(self) -> None:
        for hook in self._offloaded:
            hook.offload()

    def _churn(self, rollout: int, numbers: Sequence[int]) -> Tensor:
        """Churn of each level, shape [T + 1], or of each level for each prompt, shape [P, T + 1]."""
        args = self.args
        if args.churn_schedule == "constant":
            return constant_churn(self._sigmas, args.churn)
        draws = torch.tensor(
            [np.random.default_rng([args.seed, rollout, n, 2]).standard_normal() for n in numbers], dtype=torch.float32
        )
        if args.churn_schedule == "interval":
            location = args.churn_location + args.churn_location_std * draws
            return interval_churn(self._sigmas, args.churn, location, args.churn_width)
        return prior_churn(self._sigmas, args.churn * (args.churn_spread * draws).exp())

    # Step 4 -----------------------------------------------------------------------------------------------------------

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
        # No copies where they are on the device.
        old_velocity = batch.sampled.velocities[level].to(velocity.device, non_blocking=True)
        direction = batch.direction.to(velocity.device, non_blocking=True)
        reward_difference = batch.reward_difference.to(velocity.device)
        if inputs.step == 0:
            autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            error = check_replay(velocity, old_velocity, self.pipeline, level, autocast)
            self._metrics["replay_error"].append(torch.tensor(error))
        loss, ratio = surrogate_loss(velocity.float(), old_velocity.float(), direction, reward_difference, args.epsilon)
        if args.beta:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                base_velocity = self.flow.velocity(batch.sampled, level)
            kl = (velocity.float() - base_velocity.float()).square().flatten(1).mean(dim=-1)
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

    # Evaluation -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        columns: dict[str, Sequence] | None = None,
        **call_kwargs: Any,
    ) -> Tensor:
        """
        One image per prompt and seed by the pipeline's own sampler, with the averaged weights where there are some.

        The work is shared by the processes, all of which must call it; each gets all images.

        Args:
            prompts (`Sequence[str]`): N prompts.
            seeds (`Sequence[int]`): N seeds of the initial noise.
            columns (`dict[str, Sequence]`, *optional*): Columns of the dataset, N values each; those that
                `pipeline_columns` names are passed to the pipeline.
            **call_kwargs: Arguments of the pipeline's call in the place of the configured ones.

        Returns:
            `Tensor`: Images on the CPU, floats in [0, 1], shape [N, 3, H, W].
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts) or len(prompts) == 0:
            raise ValueError(f"generate got prompts={prompts!r}: give a list of at least one prompt, as text.")
        if len(prompts) != len(seeds):
            raise ValueError(f"generate got {len(prompts)} prompts and {len(seeds)} seeds: give one seed for each.")
        images = self._generate_share(prompts, seeds, columns or {}, self._share(len(prompts)), **call_kwargs)
        return self.accelerator.gather(images).cpu()[: len(prompts)]

    def _check_best_metric(self, metric: str | None) -> None:
        rewards = self.eval_reward_functions
        scores = [name for name, f in zip(rewards.names, rewards.functions) if not getattr(f, "pairwise", False)]
        if metric is not None and not scores:
            raise ValueError(
                f"metric_for_best_model='{metric}' needs a score, and in an evaluation, of one image per prompt, "
                f"{', '.join(rewards.names)} has nothing to compare. Give an eval_reward_fn."
            )
        known = ["reward", *(f"rewards/{name}/mean" for name in scores)]
        if metric is not None and metric.removeprefix("eval_") not in known:
            raise ValueError(f"metric_for_best_model='{metric}' is none of what `evaluate` gives: {', '.join(known)}.")

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Rewards of one image per prompt of `eval_dataset`, from fixed seeds.

        Returns:
            `dict[str, float]`: `eval_reward`, the weighted sum, and `eval_rewards/<name>/mean`.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("evaluate needs prompts: give the trainer an `eval_dataset`.")
        check_prompts(dataset, self.args.dataset_prompt_column, self.args.pipeline_columns or (), "eval_dataset")
        self.eval_reward_functions.check_columns(dataset.column_names, "eval_dataset")
        start = time.perf_counter()
        columns = dataset[:]
        prompts = columns[self.args.dataset_prompt_column]
        share = self._share(len(prompts))
        seeds = [derive_seed(self.args.seed, n, 3) for n in range(len(prompts))]
        images = self._generate_share(prompts, seeds, columns, share)
        columns = {name: [values[n] for n in share] for name, values in columns.items()}
        functions = self.eval_reward_functions
        rewards = functions(images, [prompts[n] for n in share], self.state, columns)
        functions.on_rollout_end()
        rewards = self.accelerator.gather(rewards.to(self.args.device))[: len(prompts)]
        metrics = {f"{metric_key_prefix}_reward": functions.total(rewards[:, None]).nanmean().item()}
        for name, mean in zip(functions.names, rewards.nanmean(dim=0).tolist()):
            metrics[f"{metric_key_prefix}_rewards/{name}/mean"] = mean
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _share(self, total: int) -> list[int]:
        """This process's numbers out of [0, total): consecutive, as many for each process, wrapped around at the end."""
        per_process = -(-total // self.args.world_size)
        first = self.args.process_index * per_process
        return [number % total for number in range(first, first + per_process)]

    def _generate_share(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        columns: dict[str, Sequence],
        share: list[int],
        **call_kwargs: Any,
    ) -> Tensor:
        self.flow.model = self.model_wrapped
        columns = self._pipeline_columns(columns)
        batch_size = 1 if columns else self.args.per_device_train_batch_size
        images = []
        with self._averaged_weights(), self.compute_loss_context_manager():
            disable = self.args.disable_tqdm or not self.is_world_process_zero()
            for start in tqdm(range(0, len(share), batch_size), "sampling", leave=False, disable=disable):
                prompt, seed, *values = (
                    [value[n] for n in share[start : start + batch_size]]
                    for value in (prompts, seeds, *columns.values())
                )
                images.append(self.flow.generate(prompt, seed, dict(zip(columns, values)), **call_kwargs))
        self._offload_components()
        return torch.cat(images)

    def _pipeline_columns(self, columns: dict[str, Sequence]) -> dict[str, Sequence]:
        return {name: columns[name] for name in self.args.pipeline_columns or ()}

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

    def _record_branches(self, endpoints: Tensor, shared_noise: float) -> None:
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
        self._metrics.clear()
        self._seconds.clear()
        return metrics

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start


def describe_run(
    config: FDFOConfig, pipeline: DiffusionPipeline, rewards: RewardFunctions, prompts: Dataset, model: torch.nn.Module
) -> dict[str, Any]:
    """What the result of a run depends on, as JSON values; the larger parts as checksums."""
    transformer = pipeline.transformer
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    trained = [p for p in transformer.parameters() if p.requires_grad]
    adapter = model.peft_config["default"] if config.use_peft else None
    defaults = {} if adapter is None else type(adapter)().to_dict()
    scalars = [name for name, feature in prompts.features.items() if isinstance(feature, Value)]
    return {
        **config.result_options(),
        **{
            f"adapter.{name}": sorted(value) if isinstance(value, set) else value
            for name, value in (adapter.to_dict() if adapter is not None else {}).items()
            if (value != defaults.get(name) or name in ("r", "lora_alpha"))
            and name not in ("base_model_name_or_path", "peft_version")
        },
        "pipeline": type(pipeline).__name__,
        "components": sorted(name for name, component in pipeline.components.items() if component is not None),
        "transformer (checksum of its config)": _config_checksum(transformer.config),
        "transformer (checksum of its frozen weights)": _weights_checksum(frozen),
        "adapter (checksum of the weights to go on from)": _weights_checksum(trained) if config.adapter else None,
        "scheduler (checksum of its config)": _config_checksum(pipeline.scheduler.config),
        "dataset (checksum of its text and numbers)": _checksum([prompts[name] for name in scalars]),
        "rewards": rewards.describe(),
    }


def _config_checksum(config: dict[str, Any]) -> str:
    # Those with an underscore say where it came from, not what it is.
    return _checksum(sorted((name, value) for name, value in config.items() if not name.startswith("_")))


def _weights_checksum(parameters: list[torch.nn.Parameter]) -> str:
    # Some of each: enough to tell two models of one architecture apart.
    return _checksum([parameter.flatten()[:16].tolist() for parameter in parameters])


def _checksum(value: Any) -> str:
    return f"{zlib.crc32(repr(value).encode()):08x}"


def derive_seed(*numbers: int) -> int:
    """A 64-bit seed that depends on all of the numbers, so that streams of random numbers do not overlap."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
