"""The trainer: wires the four steps of FDFO (arXiv 2603.12893) into `transformers.Trainer`. The maths is elsewhere."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging

from .algorithm import constant_churn, finite_difference, interval_churn, prior_churn, surrogate_loss
from .callbacks import FDFOProgressCallback, WeightAveraging
from .fdfo_config import FDFOConfig
from .lora import add_adapter, default_lora_config, save_diffusers_lora
from .pipeline_checks import check_call_kwargs
from .pipeline_flow import PipelineFlow, check_replay, load_pipeline, repeat_each
from .prompt_dataset import check_prompts, load_prompts, rollout_rows
from .rewards.reward_functions import RewardFunction, RewardFunctions
from .rollout_buffer import MicroBatch, RolloutBuffer, ScoredBatch, trained_levels
from .trainer_compat import adapt_to_trainer


logger = logging.get_logger(__name__)


class FDFOTrainer(Trainer):
    """
    Post-trains a diffusers flow-matching pipeline with Finite Difference Flow Optimization.

    ```python
    FDFOTrainer(FDFOConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Each epoch of the Trainer is one rollout: `_prepare_inputs` samples the images when the buffer is empty (steps 1 to
    3), `compute_loss` replays one noise level of one batch of them (step 4). All else is `transformers.Trainer`.

    Args:
        config ([`FDFOConfig`]): All options.
        pipeline (`DiffusionPipeline` or `str`): A flow-matching pipeline, or a Hub id or path of one.
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

    args: FDFOConfig

    def __init__(
        self,
        config: FDFOConfig,
        pipeline: DiffusionPipeline | str,
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
        self.reward_functions = RewardFunctions(reward_fn, config.reward_weights)
        self.eval_reward_functions = RewardFunctions(eval_reward_fn) if eval_reward_fn else self.reward_functions
        if train_dataset is None:
            train_dataset = load_prompts(config.dataset_name, config.dataset_prompt_column)
        pipeline_columns = config.pipeline_columns or []
        check_prompts(train_dataset, config.dataset_prompt_column, pipeline_columns)
        self.reward_functions.check_columns(train_dataset.column_names)
        if eval_dataset is not None:
            check_prompts(eval_dataset, config.dataset_prompt_column, pipeline_columns, "eval_dataset")
            self.eval_reward_functions.check_columns(eval_dataset.column_names, "eval_dataset")
            self._check_best_metric(config.metric_for_best_model)

        if isinstance(pipeline, str):
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
        if config.use_peft:
            model = add_adapter(pipeline, peft_config or default_lora_config(config, pipeline.transformer))
        elif peft_config is not None:
            raise ValueError("peft_config was given together with use_peft=False: leave one of them out.")
        else:
            model = pipeline.transformer.requires_grad_(True)

        super().__init__(
            model=model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        for name, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module) and name != "transformer":
                component.to(self.args.device)
        # The loss is a mean over the micro-batch: Trainer divides it by the number of accumulated ones.
        self.model_accepts_loss_kwargs = False

        self._progress = None
        if self.pop_callback(ProgressCallback) is not None:
            self._progress = FDFOProgressCallback()
            self.add_callback(self._progress)
        self._averaging = None
        if config.ema_decay is not None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self._averaging = WeightAveraging(trained, config.ema_decay)
            self.add_callback(self._averaging)

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
        start, rollout_before = time.perf_counter(), self._seconds["rollout"]
        loss = super().training_step(*args, **kwargs)
        self._seconds["train"] += time.perf_counter() - start - (self._seconds["rollout"] - rollout_before)
        return loss

    def _prepare_inputs(self, inputs: dict[str, int]) -> MicroBatch:
        rollout = self.state.global_step // self.args.steps_per_rollout
        if self._buffer is None or self._buffer.rollout != rollout:
            self._buffer = None  # frees the memory of the last one first
            start = time.perf_counter()
            self._buffer = self._roll_out(rollout)
            self._seconds["rollout"] += time.perf_counter() - start
        return self._buffer[inputs["index"]]

    # Steps 1 to 3 -----------------------------------------------------------------------------------------------------

    def _roll_out(self, rollout: int) -> RolloutBuffer:
        """Sample the images of this process, score them and take the finite differences."""
        args = self.args
        batch_size = args.per_device_prompt_batch_size
        rows = rollout_rows(len(self.train_dataset), args.prompts_per_rollout, rollout, args.seed)
        first_batch = args.process_index * args.num_rollout_batches
        batches, rewards, branch_rms = [], [], []
        bar = contextlib.nullcontext()
        if self._progress is not None:
            bar = self._progress.rollout_bar(rollout, args.num_rollout_batches * batch_size)
        with bar:
            for batch in range(first_batch, first_batch + args.num_rollout_batches):
                numbers = range(batch * batch_size, (batch + 1) * batch_size)
                scored, batch_rewards, rms = self._roll_out_batch(rollout, batch, numbers, [rows[n] for n in numbers])
                batches.append(scored)
                rewards.append(batch_rewards)
                branch_rms.append(rms)
                if self._progress is not None:
                    bar.update(batch_size)
        self._record_rewards(rollout, torch.cat(rewards))
        self._metrics["branch_rms"].append(torch.cat(branch_rms).mean())
        return RolloutBuffer(rollout, first_batch, batches, args.optimizer_steps_per_rollout)

    def _roll_out_batch(
        self, rollout: int, batch: int, numbers: Sequence[int], rows: list[int]
    ) -> tuple[ScoredBatch, Tensor, Tensor]:
        """
        One batch of P prompts, `numbers` being their places in the rollout over all processes.

        Returns:
            The batch, the rewards [P, G, number of rewards], and the rms distance of a branch from the mean of its
            prompt in latent units [P, G].
        """
        args = self.args
        branches = args.num_generations
        columns = self.train_dataset[rows]
        prompts = columns[args.dataset_prompt_column]
        levels = trained_levels(
            args.num_inference_steps,
            args.num_trained_levels,
            args.optimizer_steps_per_rollout,
            args.seed,
            rollout,
            batch,
        )

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

        # Step 2: rewards
        repeated = {name: repeat_each(values, branches) for name, values in columns.items()}
        rewards = self.reward_functions(
            sampled.images, repeated[args.dataset_prompt_column], self.state, repeated
        ).unflatten(0, (len(prompts), branches))

        # Step 3: finite difference
        endpoints = sampled.endpoints.float()
        total = self.reward_functions.total(rewards).to(endpoints.device)
        direction, reward_difference = finite_difference(endpoints, total)
        branch_rms = (endpoints - endpoints.mean(dim=1, keepdim=True)).square().flatten(2).mean(dim=-1).sqrt()
        scored = ScoredBatch(
            sampled=replace(sampled, images=None, endpoints=None),
            direction=direction.flatten(0, 1),
            # A prompt to which no reward applies teaches nothing.
            reward_difference=reward_difference.flatten().nan_to_num(nan=0.0),
            levels=levels,
        )
        return scored, rewards, branch_rms

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
        old_velocity = batch.sampled.velocities[level]
        self.flow.model = model
        velocity = self.flow.velocity(batch.sampled, level)
        if inputs.step == 0:
            autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            error = check_replay(velocity, old_velocity, self.pipeline, level, autocast)
            self._metrics["replay_error"].append(torch.tensor(error))
        loss, ratio = surrogate_loss(
            velocity.float(), old_velocity.float(), batch.direction, batch.reward_difference, args.epsilon
        )
        if args.beta:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                base_velocity = self.flow.velocity(batch.sampled, level)
            kl = (velocity.float() - base_velocity.float()).square().flatten(1).mean(dim=-1)
            loss = loss + args.beta * kl
            self._metrics["kl"].append(kl.detach().mean())
        ratio = ratio.detach()
        self._metrics["ratio"].append(ratio.mean())
        self._metrics["clip_ratio"].append(((ratio - 1).abs() > args.epsilon).float().mean())
        loss = loss.mean()
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
        if len(prompts) != len(seeds):
            raise ValueError(f"generate got {len(prompts)} prompts and {len(seeds)} seeds: give one seed for each.")
        images = self._generate_share(prompts, seeds, columns or {}, self._share(len(prompts)), **call_kwargs)
        return self.accelerator.gather(images).cpu()[: len(prompts)]

    def _check_best_metric(self, metric: str | None) -> None:
        known = ["reward", *(f"rewards/{name}/mean" for name in self.eval_reward_functions.names)]
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
        start = time.perf_counter()
        columns = dataset[:]
        prompts = columns[self.args.dataset_prompt_column]
        share = self._share(len(prompts))
        seeds = [derive_seed(self.args.seed, n, 3) for n in range(len(prompts))]
        images = self._generate_share(prompts, seeds, columns, share)
        columns = {name: [values[n] for n in share] for name, values in columns.items()}
        functions = self.eval_reward_functions
        rewards = functions(images, [prompts[n] for n in share], self.state, columns)
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
        return torch.cat(images)

    def _pipeline_columns(self, columns: dict[str, Sequence]) -> dict[str, Sequence]:
        return {name: columns[name] for name in self.args.pipeline_columns or ()}

    def _averaged_weights(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._averaging is None else self._averaging.applied()

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
        if idle.all():
            logger.warning(
                f"Rollout {rollout + 1}: the images of no prompt differ in reward, so there is nothing to learn from. Does "
                "the reward apply to these prompts and have a slope there? More churn makes the images differ more."
            )
        for name, values in zip(self.reward_functions.names, rewards.unbind(dim=-1)):
            self._metrics[f"rewards/{name}/mean"].append(values.nanmean())
            applicable = values[values.isfinite()]
            self._metrics[f"rewards/{name}/std"].append(
                applicable.std() if len(applicable) > 1 else total.new_zeros(())
            )

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
        if "ratio" in self._metrics:
            updates = len(self._metrics["ratio"]) / self.args.gradient_accumulation_steps
            metrics["step_time"] = self._seconds["train"] / updates
        if "reward" in self._metrics:
            rollouts = len(self._metrics["reward"])
            metrics["rollout_time"] = self._seconds["rollout"] / rollouts
            metrics["train_time"] = self._seconds["train"] / rollouts
            images = rollouts * self.args.prompts_per_rollout * self.args.num_generations
            metrics["images_per_second"] = images / (self._seconds["rollout"] + self._seconds["train"])
        self._metrics.clear()
        self._seconds.clear()
        return metrics

    # Saving -----------------------------------------------------------------------------------------------------------

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
                super().save_model(output_dir, _internal_call)
            elif self.args.should_save:
                self.pipeline.save_pretrained(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not self.args.use_peft:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Trainer pickles its arguments beside the weights, and a push uploads them: never with a token in clear text.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if isinstance(self.model, PeftModel) and self.args.should_save:
            # PEFT's file of a checkpoint is what a run goes on from; this one is what a pipeline is to use.
            with self._averaged_weights() if state_dict is None else contextlib.nullcontext():
                save_diffusers_lora(self.pipeline, self.model, output_dir or self.args.output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._averaging is not None and self.args.should_save:
            self._averaging.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        rollouts, inside = divmod(self.state.global_step, self.args.steps_per_rollout)
        if inside:
            raise ValueError(
                f"{checkpoint} is from step {self.state.global_step}, inside a rollout of {self.args.steps_per_rollout} "
                "steps, whose data is gone. Resume with the optimizer_steps_per_rollout and num_iterations of that run, "
                "or from a checkpoint at the end of a rollout."
            )
        if self._averaging is not None:
            self._averaging.load(checkpoint, updates=rollouts)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._averaging is not None:
            rollouts = self.state.best_global_step // self.args.steps_per_rollout
            self._averaging.load(self.state.best_model_checkpoint, updates=rollouts)


def derive_seed(*numbers: int) -> int:
    """A 64-bit seed that depends on all of the numbers, so that streams of random numbers do not overlap."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
