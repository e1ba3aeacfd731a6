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
        old_policy_decay (`float`, defaults to `0.0`):
            Largest share of itself that the old policy, which samples, keeps after a rollout, in [0, 1). With 0 it is the
            trained one as the rollout begins.
        old_policy_decay_rate (`float`, defaults to `0.001`):
            How much that share, which starts at 0, grows with each rollout, >= 0.
    """

    num_inference_steps: int = option(10)
    num_generations: int = option(24)
    prompts_per_rollout: int = option(48)
    per_device_prompt_batch_size: int = option(1)
    learning_rate: float = option(3e-4)
    old_policy_decay: float = option(0.0)
    old_policy_decay_rate: float = option(0.001)

    def _check(self) -> None:
        super()._check()
        if not 0 <= self.old_policy_decay < 1:
            raise ValueError(
                f"old_policy_decay={self.old_policy_decay} must be in [0, 1): with 1 the policy that samples never follows."
            )
        if not self.old_policy_decay_rate >= 0:
            raise ValueError(
                f"old_policy_decay_rate={self.old_policy_decay_rate} must be >= 0: the decay grows from 0 to "
                "old_policy_decay."
            )
