"""Defaults of the algorithms of the forward process."""

from dataclasses import dataclass

from .config import RolloutConfig, option, with_help


@dataclass
@with_help
class ForwardProcessConfig(RolloutConfig):
    r"""
    Options of an algorithm that noises endpoints afresh: those of [`RolloutConfig`], of which these have another default.

    Parameters:
        > Forward process

        num_generations (`int`, defaults to `24`):
            Images G per prompt, from different noise, whose rewards are compared.
        num_inference_steps (`int`, defaults to `10`):
            Steps T of the sampler. Endpoints are noised to their levels.
        prompts_per_rollout (`int`, defaults to `48`):
            Prompts of each rollout, over all processes.
        per_device_prompt_batch_size (`int`, defaults to `1`):
            Prompts that each process samples, and trains on, at a time.
        learning_rate (`float`, defaults to `3e-4`):
            Initial learning rate of AdamW.
    """

    num_inference_steps: int = option(10)
    num_generations: int = option(24)
    prompts_per_rollout: int = option(48)
    per_device_prompt_batch_size: int = option(1)
    learning_rate: float = option(3e-4)
