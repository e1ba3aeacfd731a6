"""Metrics of rollouts and updates between two logs, over all processes, and the time that they took."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.utils import logging

from ..metric_names import REWARD, deviation, part
from ..pipeline.records import RolloutBatch
from ..reporting.progress import peak_memory
from ..rewards.reward_functions import RewardFunctions
from .rollout_alarms import signs, traits
from .surrogate import tied
from .watchdogs import Watchdogs


logger = logging.get_logger(__name__)


class RolloutMetrics:
    """
    Collects values on the device; `drain` averages them.

    Args:
        accelerator (`Accelerator`): Gathers over the processes.
        rewards ([`RewardFunctions`]): Rewards of the rollouts.
        watchdogs ([`Watchdogs`]): Told of each metric that can end the run.
        images_per_rollout (`int`): Images of a rollout, over all processes.
        micro_batches_per_step (`int`): Micro-batches of an optimizer step, per process.
        steps_per_rollout (`int`): Optimizer steps on a rollout.

    Attributes:
        values (`dict[str, list[Tensor]]`): Values of each metric since the last log.
        seconds (`dict[str, float]`): Time since the last log in `"rollout"`, in `"reward"`, a part of it, and in `"train"`.
        seconds_of_run (`dict[str, float]`): The same since the start of `train`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        rewards: RewardFunctions,
        watchdogs: Watchdogs,
        images_per_rollout: int,
        micro_batches_per_step: int,
        steps_per_rollout: int,
    ):
        self._accelerator = accelerator
        self._rewards = rewards
        self._watchdogs = watchdogs
        self._images_per_rollout = images_per_rollout
        self._micro_batches_per_step = micro_batches_per_step
        self._steps_per_rollout = steps_per_rollout
        self._micro_batches = 0  # since the last log
        self._traits: list[Tensor] = []  # of the rollout that is being sampled
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)
        self.seconds_of_run: dict[str, float] = defaultdict(float)

    def forget(self) -> None:
        """Before a run: the one before may have ended between two logs."""
        for kept in (self.values, self.seconds, self.seconds_of_run):
            kept.clear()
        self._traits.clear()
        self._micro_batches = 0

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.values[name].append(value)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        for seconds in (self.seconds, self.seconds_of_run):
            seconds[name] += time.perf_counter() - start

    def add_rewards(self, rollout: int, rewards: Tensor, scaled: Tensor) -> None:
        """
        Metrics of a rollout under GRPO's names.

        Args:
            rollout (`int`): Number of the rollout, from 0.
            rewards (`Tensor`): Rewards of all processes as the functions returned them, shape [P, G, R].
            scaled (`Tensor`): The same as they are weighed and trained on.
        """
        total = self._rewards.total(rewards)
        # A reward counts for a prompt only if it applies to all its images, as in the total.
        rewards, scaled = (
            each.where(each.isfinite().all(dim=1, keepdim=True), torch.nan) for each in (rewards, scaled)
        )
        differences = (scaled.amax(dim=1) - scaled.amin(dim=1)).nan_to_num(nan=0.0, posinf=math.inf).amax(dim=0)
        differences = differences * self._rewards.weights.abs()
        self._watchdogs.check_reward_differences(dict(zip(self._rewards.names, differences.tolist())))
        idle = tied(self._rewards.total(scaled))
        self.add(
            **{REWARD: total.nanmean(), deviation(REWARD): total.std(dim=1).nanmean()},
            frac_reward_zero_std=idle.float().mean(),
        )
        self._watchdogs.check_rewards(rollout, differs=not idle.all())
        for name, values in zip(self._rewards.names, rewards.unbind(dim=-1)):
            if values.isnan().all():
                logger.warning(f"Rollout {rollout + 1}: the reward '{name}' applied to all images of no prompt.")
            mean = part(REWARD, name)
            self.add(**{mean: values.nanmean(), deviation(mean): values.std(dim=1).nanmean()})

    def add_chosen(self, rewards: Tensor) -> None:
        """The spread of the total rewards of the candidates that are trained on: of this process, shape [P, G]."""
        rewards = self._accelerator.gather(rewards.to(self._accelerator.device))
        self.add(reward_std_trained=rewards.std(dim=1).nanmean())

    def add_waiting(self, waiting: Mapping[str, float]) -> None:
        """The most answers, over all processes, that each reward that tells them waited for when all images were sampled."""
        device = self._accelerator.device
        self.add(
            **{part(REWARD, name, "waiting"): torch.tensor(float(n), device=device) for name, n in waiting.items()}
        )

    def see(self, sampled: RolloutBatch) -> None:
        """Keep what `add_signs` needs of some batches with images."""
        self._traits.append(traits(sampled))

    def add_signs(self) -> None:
        """The metrics of a rollout that [`RolloutAlarms`] watches, over all processes."""
        mine = torch.cat(self._traits).to(self._accelerator.device)
        self._traits.clear()
        self.add(**signs(self._accelerator.gather(mine)))

    def add_branches(self, endpoints: Sequence[Tensor], shared_noise: float | None) -> None:
        """
        How far the branches of a prompt are apart.

        Args:
            endpoints (`Sequence[Tensor]`): This process's final latents by batch, [P, G, ...], whose sizes may differ.
            shared_noise (`float`, *optional*): As in [`Watchdogs.check_branches`].
        """
        branches, dtype = endpoints[0].shape[1], endpoints[0].dtype
        endpoints = [batch.float() for batch in endpoints]
        deviations = [(batch - batch.mean(dim=1, keepdim=True)).square().flatten(2).mean(dim=-1) for batch in endpoints]
        branch_rms = torch.cat(deviations).sqrt().mean()
        # Independent values deviate from the mean of G of them by sqrt((G - 1) / G) times their standard deviation.
        unrelated = torch.cat([batch.flatten() for batch in endpoints]).std() * math.sqrt((branches - 1) / branches)
        values = self._accelerator.reduce(torch.stack([branch_rms, branch_rms / unrelated]), reduction="mean")
        self.add(branch_rms=values[0], branch_distance=values[1])
        self._watchdogs.check_branches(values[1].item(), shared_noise, dtype)

    def add_update(self, ratio: Tensor | None, epsilon: float, starts_at_one: bool) -> None:
        """
        A micro-batch, and how far the updates have moved the model.

        Args:
            ratio (`Tensor`, *optional*): Ratio of each sample of a micro-batch, [N]; None if the algorithm has none.
            epsilon (`float`): Half the width of the trust region.
            starts_at_one (`bool`): The ratio is 1 but for rounding: the weights are those that sampled.
        """
        self._micro_batches += 1
        if ratio is None:
            return
        ratio = ratio.detach()
        error = (ratio - 1).abs()
        self.add(ratio=ratio.mean(), ratio_error=error.mean(), clip_ratio=(error > epsilon).float().mean())
        if starts_at_one:
            self.add(first_ratio_error=error.max())

    def add_left_out(self) -> None:
        """A micro-batch that is not computed."""
        self._micro_batches += 1

    def drain(self) -> dict[str, float]:
        """Means since the last log, over all processes, and where the time went."""
        device = self._accelerator.device
        names = sorted(self.values)
        means = torch.stack(
            [torch.stack([value.to(device) for value in self.values[n]]).mean().double() for n in names]
        )
        metrics = dict(zip(names, self._accelerator.reduce(means, reduction="mean").tolist()))
        if "first_ratio_error" in metrics:
            self._watchdogs.check_first_ratio(metrics["first_ratio_error"])
        if "ratio" in metrics:
            self._watchdogs.check_ratio(metrics["ratio_error"])
        if self._micro_batches:
            metrics["step_time"] = self.seconds["train"] * self._micro_batches_per_step / self._micro_batches
        if REWARD in metrics:
            rollouts = len(self.values[REWARD])
            metrics |= {f"{name}_time": self.seconds[name] / rollouts for name in ("rollout", "reward")}
            # A log may fall inside a rollout: the mean of the steps that it has stands for all.
            metrics["train_time"] = metrics.get("step_time", 0.0) * self._steps_per_rollout
            seconds = metrics["rollout_time"] + metrics["train_time"]
            metrics["images_per_second"] = self._images_per_rollout / seconds
            if device.type == "cuda":
                metrics["peak_memory"] = self._peak_memory(device)
        self.values.clear()
        self.seconds.clear()
        self._micro_batches = 0
        return metrics

    def _peak_memory(self, device: torch.device) -> float:
        """GiB on the GPU that had most, since the last log of a rollout."""
        peak = torch.tensor(peak_memory(device)[0] / 2**30, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        return self._accelerator.gather(peak).max().item()
