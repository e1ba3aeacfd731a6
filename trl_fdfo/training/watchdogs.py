"""
Watchdogs end a run that has gone wrong, or warn of one that is about to: each by a metric and a threshold, with the option
to turn. docs/long_runs.md has the table.

`branch_distance` is the rms distance of an image from the mean of its prompt, in latents, relative to the distance if each
of its values were drawn anew from those of all images: 0 if the images of a prompt are one.
"""

import math
import statistics
from collections import deque

import torch
from torch import Tensor
from transformers.utils import logging

from .config import RolloutConfig


logger = logging.get_logger(__name__)

GRADIENT_WINDOW, GRADIENT_FACTOR = 100, 50
MIN_GRADIENTS = 20  # with fewer, the median means nothing
MIN_ROUNDINGS = 16
# Not 0: a processor may compute the last bits of equal rows of a batch differently.
NO_ROUNDINGS = 0.01
MIN_SHARED_NOISE = 0.1
MAX_RATIO_ERROR = 3  # times epsilon; mean over the samples since the last log
MAX_FIRST_RATIO_ERROR = 0.5  # times epsilon
MAX_IDLE_ROLLOUTS = 10
# The gradient grows with the difference of the rewards, and its square must fit into float32 (3e38), with a margin.
MAX_REWARD_DIFFERENCE = 1e15


class WatchdogError(RuntimeError):
    """The run has gone wrong: training on would waste what it has learnt."""


class Watchdogs:
    """
    Args:
        config ([`RolloutConfig`]): Has the trust region, and what a warning advises.
    """

    def __init__(self, config: RolloutConfig):
        self.epsilon = config.epsilon
        backend = config.attention_backend or ""
        self._kernel = (
            f" Or leave out attention_backend='{backend}', which can return NaN." if "cudnn" in backend else ""
        )
        self._smaller_updates = config.smaller_updates
        self._noise_option = config.noise_option
        self._gradients: deque[float] = deque(maxlen=GRADIENT_WINDOW)
        self._idle_rollouts = 0
        self._losses: list[tuple[Tensor, int]] = []  # of the next optimizer step

    def watch_loss(self, loss: Tensor, velocity: Tensor, level: int) -> None:
        """Keep the loss of a micro-batch for `check_losses`, without waiting for the device."""
        self._losses.append((torch.stack([loss.detach().float(), velocity.detach().isfinite().all().float()]), level))

    def forget(self) -> None:
        """Before a run: the one before may have ended inside an optimizer step, or by one of these."""
        self._losses.clear()
        self._gradients.clear()
        self._idle_rollouts = 0

    def check_losses(self) -> None:
        """
        Before an optimizer step.

        Raises:
            WatchdogError: The loss of one of its micro-batches is not finite.
        """
        values = torch.stack([value for value, _ in self._losses]).tolist()
        levels = [level for _, level in self._losses]
        self._losses.clear()
        for (loss, velocity_is_finite), level in zip(values, levels):
            if math.isfinite(loss):
                continue
            culprit = "The loss overflowed" if velocity_is_finite else "The velocity has values that are not finite"
            raise WatchdogError(
                f"The loss is {loss} at noise level {level}, before the optimizer step: the weights are those of the step "
                f"before. {culprit}. Resume from the last checkpoint with {self._smaller_updates}, and "
                "resume_with_changed_options=True; with fp16, use bf16."
            )

    def check_gradient(self, norm: float, step: int) -> None:
        """
        Raises:
            WatchdogError: The norm of the gradient is not finite.
        """
        if not math.isfinite(norm):
            raise WatchdogError(
                f"The gradient norm is {norm} before optimizer step {step + 1}: the weights are those of the step before. "
                f"Is the reward's scale sane? Resume from the last checkpoint with a lower learning_rate and "
                f"resume_with_changed_options=True; with fp16, use bf16.{self._kernel}"
            )
        if len(self._gradients) >= MIN_GRADIENTS:
            usual = statistics.median(self._gradients)
            if norm > GRADIENT_FACTOR * usual:
                logger.warning(
                    f"The gradient norm of step {step + 1} is {norm:.3g}, and {usual:.3g} was usual: the run is becoming "
                    f"unstable. What steadies it is {self._smaller_updates}."
                )
        self._gradients.append(norm)

    def check_first_ratio(self, error: float) -> None:
        """`error`: largest |ratio - 1| over the samples of a rollout before its first optimizer step."""
        if error > MAX_FIRST_RATIO_ERROR * self.epsilon:
            logger.warning(
                f"The ratio is off from 1 by {error:.3g} before the first step, more than half of epsilon={self.epsilon}: "
                f"rounding eats the trust region, and float32 rounds less.{self._more_noise()}"
            )

    def check_ratio(self, error: float) -> None:
        """`error`: mean |ratio - 1| since the last log."""
        if error > MAX_RATIO_ERROR * self.epsilon:
            logger.warning(
                f"The ratio is off from 1 by {error:.3g} on average, {error / self.epsilon:.1f} times epsilon: the updates "
                "leave the trust region. Resume from the last checkpoint with a lower learning_rate and "
                "resume_with_changed_options=True, or start a new run with a lower num_iterations or "
                "optimizer_steps_per_rollout."
            )

    def check_branches(self, distance: float, shared_noise: float | None, dtype: torch.dtype) -> None:
        """
        Args:
            distance (`float`): `branch_distance` of a rollout over all processes.
            shared_noise (`float`, *optional*): Share of their noise that branches have in common, prod 1 / (1 + gamma_i);
                None if they are independent.
            dtype (`torch.dtype`): Type of the latents.

        Raises:
            WatchdogError: All images of each prompt are the same.
        """
        rounding = torch.finfo(dtype).eps
        if distance < NO_ROUNDINGS * rounding:
            raise WatchdogError(
                f"The images of each prompt are the same (they differ by {distance:.2g} of the spread of all images, less than "
                f"the rounding of {dtype}): there is no difference to learn from.{self._more_noise()}"
            )
        if distance < MIN_ROUNDINGS * rounding:
            logger.warning(
                f"The images of a prompt differ by {distance:.2g} of the spread of all images, near the rounding of "
                f"{dtype}: their difference is noise.{self._more_noise()}"
            )
        if shared_noise is not None and shared_noise < MIN_SHARED_NOISE:
            logger.warning(
                f"The churn leaves {shared_noise:.2g} of the noise that the images of a prompt have in common: they are as "
                "different as any two of that prompt, and their difference is no direction any more. Lower `churn`."
            )

    def check_reward_differences(self, differences: dict[str, float]) -> None:
        """
        Args:
            differences (`dict[str, float]`): By the name of each reward, the largest difference between the images of a
                prompt, times the weight of the reward.

        Raises:
            WatchdogError: One is too large for the updates to be computed with.
        """
        for name, difference in differences.items():
            if difference > MAX_REWARD_DIFFERENCE:
                raise WatchdogError(
                    f"The reward '{name}' differs by {difference:.3g}, times its weight, between images of a prompt: beyond "
                    f"{MAX_REWARD_DIFFERENCE:.0e} the gradient overflows. Divide the reward by a constant, which changes "
                    "nothing but its scale, or lower its weight in reward_weights."
                )

    def check_rewards(self, rollout: int, differs: bool) -> None:
        """
        Args:
            rollout (`int`): Number of the rollout, from 0.
            differs (`bool`): The images of at least one prompt differ in reward.

        Raises:
            WatchdogError: They have not for too many rollouts in a row.
        """
        self._idle_rollouts = 0 if differs else self._idle_rollouts + 1
        if differs:
            return
        message = (
            f"Rollout {rollout + 1}: the images of no prompt differ in reward, so there is nothing to learn from. Does "
            f"the reward apply to these prompts and have a slope there?{self._more_noise()}"
        )
        if self._idle_rollouts >= MAX_IDLE_ROLLOUTS:
            raise WatchdogError(f"{message} That was the {self._idle_rollouts}th such rollout in a row.")
        logger.warning(message)

    def _more_noise(self) -> str:
        if self._noise_option is None:  # they differ as far as initial noise makes them
            return ""
        return f" A larger {self._noise_option} makes the images of a prompt differ more."
