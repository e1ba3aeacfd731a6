"""Samples by the pipeline's own sampler, and what rewards, control rewards and a measure of diversity say of them."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .alarms import Alarms
from .diversity import load_diversity
from .estimates import Estimate
from .fdfo_config import FDFOConfig
from .hub_trainer import HubTrainer
from .pipeline_flow import repeat_each
from .prompt_dataset import check_prompts
from .rewards.reward_functions import RewardFunctions
from .run_logging import PictureLogger
from .seeds import EVALUATION, derive_seed


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """
    What an evaluation of P prompts with S images each has found, on each process.

    Attributes:
        rewards (`Tensor`): Of each training reward, shape [P, S, R], NaN where it does not apply.
        controls (`Tensor`, *optional*): Of each control reward, shape [P, S, C].
        diversity (`Tensor`, *optional*): Of the images of each prompt, shape [P].
    """

    rewards: Tensor
    controls: Tensor | None
    diversity: Tensor | None


class EvaluatingTrainer(HubTrainer):
    """
    The part of the trainer that samples without training. A subclass sets the attributes.

    Attributes:
        reward_functions ([`RewardFunctions`]): What is trained on.
        control_functions ([`RewardFunctions`], *optional*): Control rewards, which are evaluated and not trained on.
    """

    reward_functions: RewardFunctions
    control_functions: RewardFunctions | None = None
    _alarms: Alarms
    _pictures: PictureLogger
    _diversity: Callable[[Tensor], Tensor] | None = None

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
        columns = self._pipeline_columns(columns or {})
        images = []
        with self._averaged_weights():
            for numbers in self._batches(self._share(len(prompts)), self._eval_batch_size()):
                batch = {name: [values[n] for n in numbers] for name, values in columns.items()}
                images.append(
                    self._sample([prompts[n] for n in numbers], [seeds[n] for n in numbers], batch, **call_kwargs)
                )
        self._offload_components()
        return self.accelerator.gather(torch.cat(images)).cpu()[: len(prompts)]

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        What rewards, control rewards and the measure of diversity say of `images_per_eval_prompt` images of each prompt,
        from the same seeds each time.

        Returns:
            `dict[str, float]`: Means over the prompts: `eval_reward`, the weighted sum, and `eval_rewards/<name>/mean`, with
            `std` over the prompts and `se`, the standard error of the mean; with `eval_reward_fn` `eval_control`, the plain
            sum, and `eval_controls/<name>/mean`, `std` and `se`; with `eval_diversity` that and `eval_diversity_se`;
            `eval_alarm`, 0 or 1, where an alarm is on and the prompts are those of the trainer; `eval_runtime` in seconds.
        """
        own = eval_dataset is None
        dataset = self.eval_dataset if own else eval_dataset
        if dataset is None:
            raise ValueError("evaluate needs prompts: give the trainer an `eval_dataset`, or set `num_eval_prompts`.")
        self._check_eval_dataset(self.args, dataset)
        start = time.perf_counter()
        evaluated = self._evaluate_prompts(dataset, metric_key_prefix)
        metrics = summarize(evaluated, self.reward_functions, self.control_functions)
        if own and self._alarms.watched:
            metrics["alarm"] = float(self._alarms.check({f"eval_{k}": v for k, v in metrics.items()}, self.state))
        metrics["runtime"] = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checks -----------------------------------------------------------------------------------------------------------

    def _check_evaluation(self, config: FDFOConfig, eval_dataset: Dataset | None) -> None:
        """
        Raises:
            ValueError: The options ask for an evaluation that cannot be.
        """
        is_evaluated = config.eval_strategy != "no" or config.eval_on_start
        if is_evaluated and eval_dataset is None:
            raise ValueError(
                "eval_strategy or eval_on_start is set, and there is no eval_dataset: give one, or set num_eval_prompts."
            )
        if eval_dataset is not None:
            self._check_eval_dataset(config, eval_dataset)
            self._check_best_metric(config)
        if not is_evaluated:
            options = {
                "num_eval_prompts": config.num_eval_prompts,
                "eval_diversity": config.eval_diversity,
                "eval_reward_fn": self.control_functions and self.control_functions.names,
            }
            given = ", ".join(name for name, value in options.items() if value is not None)
            if given:
                logger.warning(f"{given}: nothing is evaluated during training without an eval_strategy.")
        has_control = bool(_scores(self.control_functions)) and config.alarm_control_drop is not None
        has_diversity = config.eval_diversity is not None and config.alarm_diversity_drop is not None
        if config.stop_on_alarm and (config.eval_strategy == "no" or not (has_control or has_diversity)):
            raise ValueError(
                "stop_on_alarm=True, and no alarm would be raised: it takes an eval_strategy, and an eval_reward_fn or "
                "eval_diversity, to watch while the reward rises."
            )

    def _add_alarms(self) -> None:
        controls = self.control_functions.names if self.control_functions is not None else ()
        self._alarms = Alarms(self.args, controls, self.args.eval_diversity is not None)
        self.add_callback(self._alarms)
        if self.args.eval_strategy != "no" or self.args.eval_on_start:
            self._load_diversity()

    def _check_eval_dataset(self, config: FDFOConfig, dataset: Dataset) -> None:
        """
        Raises:
            ValueError: It cannot be evaluated on.
        """
        check_prompts(dataset, config.dataset_prompt_column, config.pipeline_columns or (), "eval_dataset")
        for functions in (self.reward_functions, self.control_functions):
            if functions is not None:
                functions.check_columns(dataset.column_names, "eval_dataset")

    def _check_best_metric(self, config: FDFOConfig) -> None:
        """
        Raises:
            ValueError: `metric_for_best_model` is nothing that an evaluation gives.
        """
        metric = config.metric_for_best_model
        if metric is None:
            return
        known = []
        for kind, functions in (("reward", self.reward_functions), ("control", self.control_functions)):
            scores = _scores(functions)
            known += [kind, *(f"{kind}s/{name}/mean" for name in scores)] if scores else []
        if config.eval_diversity is not None:
            known.append("diversity")
        name = metric.removeprefix("eval_")
        if name == "reward" and name not in known:
            raise ValueError(
                f"metric_for_best_model='{metric}' needs a score, and in an evaluation, which looks at each image by itself, "
                f"{', '.join(self.reward_functions.names)} has nothing to compare. Give an eval_reward_fn, and "
                "metric_for_best_model='eval_control'."
            )
        if name not in known:
            raise ValueError(
                f"metric_for_best_model='{metric}' is none of what `evaluate` gives here: eval_{', eval_'.join(known)}."
            )

    def _load_diversity(self) -> None:
        """
        Raises:
            ValueError: It cannot be measured, such as without the weights that it needs.
        """
        args = self.args
        if args.eval_diversity is None or self._diversity is not None:
            return
        # Noise shows whether it works, before a run that would find out after its first rollouts.
        noise = torch.rand(1, 2, 3, args.height or 512, args.width or 512, generator=torch.Generator().manual_seed(0))
        try:
            diversity = load_diversity(args.eval_diversity)
            diversity(noise.to(args.device))
        except Exception as error:
            raise ValueError(
                f"eval_diversity='{args.eval_diversity}' does not work here ({type(error).__name__}: {error}). Where weights "
                "or a package are missing, get them first or name a folder, such as \"clip(model='folder')\"; "
                "eval_diversity='pixels' needs neither, and leaving the option out measures none."
            ) from error
        self._diversity = diversity

    # Sampling ---------------------------------------------------------------------------------------------------------

    def _evaluate_prompts(self, dataset: Dataset, picture_name: str) -> Evaluated:
        args = self.args
        self._load_diversity()
        images_per_prompt = args.images_per_eval_prompt
        kinds = [f for f in (self.reward_functions, self.control_functions) if f is not None]
        columns = dataset[:]
        share = self._share(len(dataset))
        pending, diversity, shown = [], [], []
        with self._averaged_weights():
            # All images of a prompt at once, for their diversity, and scored while the next ones are sampled.
            for numbers in self._batches(share, max(1, self._eval_batch_size() // images_per_prompt)):
                rows = {name: repeat_each([v[n] for n in numbers], images_per_prompt) for name, v in columns.items()}
                prompts = rows[args.dataset_prompt_column]
                seeds = [
                    derive_seed(args.seed, n, image, EVALUATION) for n in numbers for image in range(images_per_prompt)
                ]
                images = self._sample(prompts, seeds, self._pipeline_columns(rows))
                # Each image by itself: what else is in the batch says nothing.
                pending.append([functions.submit(images, prompts, self.state, rows) for functions in kinds])
                images = images.unflatten(0, (-1, images_per_prompt))
                if self._diversity is not None:
                    diversity.append(self._diversity(images).to(args.device, torch.float32))
                shown += images[:, 0].cpu() if len(shown) < args.num_prompts_to_log else []
        self._offload_components()
        values = [torch.cat([batch[i].result() for batch in pending]) for i in range(len(kinds))]
        for functions in kinds:
            functions.on_rollout_end()
        values = [value.unflatten(0, (-1, images_per_prompt)) for value in values]
        self._pictures.log_evaluation(
            self.state,
            shown,
            [columns[args.dataset_prompt_column][n] for n in share],
            [(functions, value[:, 0]) for functions, value in zip(kinds, values)],
            picture_name,
        )
        # In the order of the dataset, and averaged by each process alike: the same for any number of them.
        gather = lambda value: self.accelerator.gather(value.to(args.device)).cpu()[: len(dataset)]
        rewards, *controls = map(gather, values)
        return Evaluated(
            rewards=rewards,
            controls=controls[0] if controls else None,
            diversity=gather(torch.cat(diversity)) if diversity else None,
        )

    def _sample(self, prompts: list[str], seeds: list[int], columns: dict[str, Sequence], **call_kwargs: Any) -> Tensor:
        """Images of this process alone, [N, 3, H, W], on its device, in batches of what it trains on at a time."""
        self.flow.model = self.model_wrapped
        size = self._eval_batch_size()
        images = []
        with self.compute_loss_context_manager():
            for start in range(0, len(prompts), size):
                part = slice(start, start + size)
                batch = {name: values[part] for name, values in columns.items()}
                images.append(self.flow.generate(prompts[part], seeds[part], batch, **call_kwargs))
        return torch.cat(images)

    def _eval_batch_size(self) -> int:
        return 1 if self.args.pipeline_columns else self.args.per_device_train_batch_size

    def _batches(self, numbers: list[int], size: int) -> Iterator[list[int]]:
        disable = self.args.disable_tqdm or not self.is_world_process_zero()
        for start in tqdm(range(0, len(numbers), size), "sampling", leave=False, disable=disable):
            yield numbers[start : start + size]

    def _share(self, total: int) -> list[int]:
        """This process's numbers out of [0, total): consecutive, as many for each process, wrapped around at the end."""
        per_process = -(-total // self.args.world_size)
        first = self.args.process_index * per_process
        return [number % total for number in range(first, first + per_process)]

    def _pipeline_columns(self, columns: dict[str, Sequence]) -> dict[str, Sequence]:
        return {name: columns[name] for name in self.args.pipeline_columns or ()}


def summarize(
    evaluated: Evaluated, rewards: RewardFunctions, controls: RewardFunctions | None = None
) -> dict[str, float]:
    """
    The figures of an evaluation, those of `evaluate` without their prefix: the images of a prompt are averaged first, then
    the prompts, in double precision and in the order of the dataset.
    """
    metrics = {}
    for kind, functions, values in (("reward", rewards, evaluated.rewards), ("control", controls, evaluated.controls)):
        if functions is None:
            continue
        values = values.double()
        # Each image as a prompt of its own: a reward that does not apply to one of them applies to the others.
        total = functions.total(values.flatten(0, 1)[:, None]).reshape(values.shape[:2])
        metrics[kind], _, _ = _over_prompts(total.nanmean(dim=1))
        for name, value in zip(functions.names, values.unbind(dim=-1)):
            mean, std, error = _over_prompts(value.nanmean(dim=1))
            metrics |= {f"{kind}s/{name}/mean": mean, f"{kind}s/{name}/std": std, f"{kind}s/{name}/se": error}
    if evaluated.diversity is not None:
        metrics["diversity"], _, metrics["diversity_se"] = _over_prompts(evaluated.diversity)
    return metrics


def _over_prompts(values: Tensor) -> tuple[float, float, float]:
    """Mean, standard deviation and standard error of the mean of one value per prompt; NaN where there is no value."""
    estimate = Estimate.of(values.tolist())
    if estimate.mean is None:
        return math.nan, math.nan, math.nan
    # Of one prompt it is not known.
    error = math.nan if estimate.standard_error is None else estimate.standard_error
    return estimate.mean, error * math.sqrt(estimate.num_prompts), error


def _scores(functions: RewardFunctions | None) -> list[str]:
    """Names of those that say something of an image by itself."""
    if functions is None:
        return []
    return [name for name, f in zip(functions.names, functions.functions) if not getattr(f, "pairwise", False)]
