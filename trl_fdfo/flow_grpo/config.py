"""Options of Flow-GRPO."""

from dataclasses import dataclass

from transformers.utils import logging

from ..training.config import RolloutConfig, option, with_help


logger = logging.get_logger(__name__)

# A log-likelihood that is a mean over a latent does not change by as much in a rollout.
MAX_EPSILON = 0.05


@dataclass
@with_help
class FlowGRPOConfig(RolloutConfig):
    r"""
    Configuration of [`FlowGRPOTrainer`] (Flow-GRPO, arXiv 2505.05470): the options of [`RolloutConfig`] and the ones below,
    some of which only have another default.

    Parameters:
        noise_level (`float`, defaults to `0.7`):
            Scale a > 0 of the SDE's diffusion, sigma_t = a sqrt(t / (1 - t)).
        num_noisy_steps (`int`, *optional*):
            The fast variant: only this many steps in a row, drawn anew for each rollout batch, have noise and are
            trained. The other steps follow the ODE. `None`: noise in all steps but the last.
        num_generations (`int`, defaults to `24`):
            Images G per prompt, from different noise, whose rewards are normalised together.
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

    noise_level: float = option(0.7)
    num_noisy_steps: int | None = option(None)

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

    def _num_trainable_levels(self) -> int:
        return self.num_inference_steps - 1 if self.num_noisy_steps is None else self.num_noisy_steps
