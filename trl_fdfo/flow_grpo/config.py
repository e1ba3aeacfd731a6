"""Options of Flow-GRPO."""

from dataclasses import dataclass
from typing import ClassVar

from transformers.utils import logging

from ..training.config import RolloutConfig, option, with_help


logger = logging.get_logger(__name__)

# A log-likelihood that is a mean over a latent does not change by as much in a rollout.
MAX_EPSILON = 0.05

SDE_TYPES = ("sde", "cps")
ADVANTAGE_STDS = ("group", "batch")


@dataclass
@with_help
class FlowGRPOConfig(RolloutConfig):
    r"""
    Configuration of [`FlowGRPOTrainer`] (Flow-GRPO, arXiv 2505.05470): the options of [`RolloutConfig`] and the ones below,
    some of which only have another default.

    Parameters:
        sde_type (`str`, defaults to `"sde"`):
            How a step adds its noise: `"sde"`, Flow-GRPO's SDE, or `"cps"`, Coefficients-Preserving Sampling (arXiv
            2509.05952), whose images keep no noise.
        noise_level (`float`, defaults to `0.7`):
            Scale a > 0 of the noise. `"sde"`: of its diffusion, sigma_t = a sqrt(t / (1 - t)). `"cps"`: in (0, 1], a step
            to level s adds the noise s sin(a pi / 2); its authors take 0.8.
        num_noisy_steps (`int`, *optional*):
            The fast variant: only this many steps in a row, drawn anew for each rollout batch, have noise and are
            trained. The other steps follow the ODE. `None`: noise in all steps but the last.
        window_interval (`int`, *optional*):
            The steps of `num_noisy_steps` are a sliding window (MixGRPO, arXiv 2507.21802): it begins at the first step, moves
            on by one after each `window_interval` rollouts, and starts over when it has been at the end. `None` draws it.
        same_latent (`bool`, defaults to `False`):
            The images of a prompt start from the same noise, so that only the noise of the trained steps makes them differ.
        advantage_std (`str`, defaults to `"group"`):
            Standard deviation that a reward's difference from the mean of its prompt is divided by: `"group"`, of the
            rewards of its prompt, or `"batch"`, of all rewards of the rollout over all processes.
        num_generations (`int`, defaults to `24`):
            Images G per prompt, whose rewards are normalised together.
        epsilon (`float`, defaults to `1e-4`):
            Half the width of the clip of the ratio, whose logarithm is a mean over the latent elements.
        beta (`float`, defaults to `0.0`):
            Weight of the KL divergence from the base model's step, a mean over the latent elements.
        timestep_fraction (`float`, defaults to `1.0`):
            Fraction of the noisy steps that are trained.
        num_inference_steps (`int`, defaults to `10`):
            Steps T of the sampler.
        prompts_per_rollout (`int`, defaults to `48`):
            Prompts of each rollout, over all processes.
        per_device_prompt_batch_size (`int`, defaults to `1`):
            Prompts that each process samples, and trains on, at a time.
        learning_rate (`float`, defaults to `3e-4`):
            Initial learning rate of AdamW.
    """

    noise_option: ClassVar[str | None] = "noise_level"

    sde_type: str = option("sde", choices=SDE_TYPES)
    noise_level: float = option(0.7)
    num_noisy_steps: int | None = option(None)
    window_interval: int | None = option(None)
    same_latent: bool = option(False)
    advantage_std: str = option("group", choices=ADVANTAGE_STDS)

    # Defaults of RolloutConfig that differ here
    num_inference_steps: int = option(10)
    num_generations: int = option(24)
    prompts_per_rollout: int = option(48)
    per_device_prompt_batch_size: int = option(1)
    epsilon: float = option(1e-4)
    learning_rate: float = option(3e-4)

    def _check(self) -> None:
        super()._check()
        if self.epsilon > MAX_EPSILON:
            logger.warning(
                f"epsilon={self.epsilon} clips nothing: the logarithm of Flow-GRPO's ratio is a mean over the latent elements, "
                "for which 1e-5 to 1e-3 are common."
            )
        for name, choices in (("sde_type", SDE_TYPES), ("advantage_std", ADVANTAGE_STDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}='{getattr(self, name)}' is not one of {', '.join(choices)}.")
        if self.sde_type == "cps" and self.noise_level > 1:
            raise ValueError(
                f"noise_level={self.noise_level} must be in (0, 1] with sde_type='cps': at 1 a step replaces all noise that "
                "there is. Its authors take 0.8."
            )
        if not self.noise_level > 0:
            raise ValueError(
                f"noise_level={self.noise_level} must be > 0: without noise a step has no likelihood to learn from."
            )
        if self.num_inference_steps < 2:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps}: the last step has no noise and is not trained. Set at "
                "least 2."
            )
        if self.num_noisy_steps is not None and not 1 <= self.num_noisy_steps < self.num_inference_steps:
            raise ValueError(
                f"num_noisy_steps={self.num_noisy_steps} must be in [1, {self.num_inference_steps - 1}]: the last of the "
                f"num_inference_steps={self.num_inference_steps} has no noise."
            )
        self._check_window_interval()

    def _check_window_interval(self) -> None:
        if self.window_interval is None:
            return
        if self.window_interval < 1:
            raise ValueError(f"window_interval={self.window_interval} must be at least 1, a number of rollouts.")
        if self.num_noisy_steps is None:
            raise ValueError(
                f"window_interval={self.window_interval} moves a window of noisy steps, and num_noisy_steps=None has noise in "
                "all of them: set num_noisy_steps, such as 4 of 25."
            )
        if self.num_noisy_steps == self.num_inference_steps - 1:
            raise ValueError(
                f"window_interval={self.window_interval} cannot move a window of num_noisy_steps={self.num_noisy_steps}, which "
                "are all that can have noise: lower num_noisy_steps, or leave window_interval out."
            )

    def _num_trainable_levels(self) -> int:
        return self.num_inference_steps - 1 if self.num_noisy_steps is None else self.num_noisy_steps
