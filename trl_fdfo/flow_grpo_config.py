"""Options of Flow-GRPO: those of FDFO that it shares, with its own defaults, and its own."""

from dataclasses import dataclass, field

from transformers.utils import logging

from .fdfo_config import FDFOConfig


logger = logging.get_logger(__name__)

# A log-likelihood that is a mean over a latent does not change by as much in a rollout.
MAX_EPSILON = 0.05


@dataclass
class FlowGRPOConfig(FDFOConfig):
    r"""
    Configuration of [`FlowGRPOTrainer`] (Flow-GRPO, arXiv 2505.05470): the options of [`FDFOConfig`], and those below, of
    which some have another meaning here. FDFO's churn and direction have none: they are set back, with a warning.

    Parameters:
        noise_level (`float`, defaults to `0.7`):
            Scale a > 0 of the SDE's diffusion, sigma_t = a sqrt(t / (1 - t)).
        num_noisy_steps (`int`, *optional*):
            The fast variant: noise in this many steps in a row, drawn anew for each rollout batch, which alone are trained on;
            the others follow the ODE. `None`: noise in all steps but the last.
        num_generations (`int`, defaults to `24`):
            Images G per prompt, from different noise, whose rewards are normalised together.
        epsilon (`float`, defaults to `1e-4`):
            Half the width of the clip of the ratio, whose logarithm is a mean over the latent elements.
        beta (`float`, defaults to `0.0`):
            Weight of the KL divergence from the base model's step, a mean over the latent elements.
        timestep_fraction (`float`, defaults to `1.0`):
            Fraction of the noisy steps that are trained on.
    """

    algorithm = "Flow-GRPO"
    # Of FDFO's sampler and direction.
    unused = (
        *("churn", "churn_schedule", "churn_location", "churn_location_std", "churn_width", "churn_spread"),
        *("shared_prefix", "direction", "whiten_direction"),
    )

    noise_level: float = field(default=0.7, metadata={"help": "Scale of the SDE's diffusion."})
    num_noisy_steps: int | None = field(
        default=None, metadata={"help": "Steps in a row that have noise and are trained on. Default: all but the last."}
    )

    num_inference_steps: int = field(default=10, metadata={"help": "Steps of the sampler."})
    num_generations: int = field(default=24, metadata={"help": "Images per prompt that are compared, at least 2."})
    prompts_per_rollout: int = field(default=48, metadata={"help": "Prompts per rollout, over all processes."})
    per_device_prompt_batch_size: int = field(
        default=1, metadata={"help": "Prompts sampled, and trained on, at a time by each process."}
    )
    epsilon: float = field(default=1e-4, metadata={"help": "Half the width of the clip of the ratio."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate of AdamW."})

    def _validate(self):
        set_back = []
        for name in self.unused:
            value, default = getattr(self, name), FDFOConfig.__dataclass_fields__[name].default
            if value != default:
                set_back.append(f"{name}={value!r}")
                setattr(self, name, default)
        if set_back:
            logger.warning(f"Flow-GRPO has no use for {', '.join(set_back)}: options of FDFO.")
        super()._validate()
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
                f"num_inference_steps={self.num_inference_steps}: the last step has no noise and is not trained on. Set at "
                "least 2."
            )
        if self.num_noisy_steps is not None and not 1 <= self.num_noisy_steps < self.num_inference_steps:
            raise ValueError(
                f"num_noisy_steps={self.num_noisy_steps} must be in [1, {self.num_inference_steps - 1}]: the last of the "
                f"num_inference_steps={self.num_inference_steps} has no noise."
            )

    def _num_trained_levels(self) -> int:
        noisy = self.num_inference_steps - 1 if self.num_noisy_steps is None else self.num_noisy_steps
        return max(1, round(self.timestep_fraction * noisy))
