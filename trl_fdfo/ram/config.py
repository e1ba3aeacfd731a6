"""Options of Reinforce Adjoint Matching."""

from dataclasses import dataclass

from ..training.config import RolloutConfig, option, with_help


@dataclass
@with_help
class RAMConfig(RolloutConfig):
    r"""
    Configuration of [`RAMTrainer`] (Reinforce Adjoint Matching, arXiv 2605.10759): the options of [`RolloutConfig`] and the one
    below, and some with another default. `epsilon` and `beta` are none of them: the base model in the loss is what holds
    updates back.

    Parameters:
        reward_multiplier (`float`, defaults to `10.0`):
            1 / lambda > 0, in 1 / units of the reward: how far a reward may move the model from the base model. At the optimum
            an image is exp(reward_multiplier x reward) times as likely as under the base model.
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

    reward_multiplier: float = option(10.0)

    # Defaults of RolloutConfig that differ here
    num_inference_steps: int = option(10)
    num_generations: int = option(24)
    prompts_per_rollout: int = option(48)
    per_device_prompt_batch_size: int = option(1)
    learning_rate: float = option(3e-4)

    def _check(self) -> None:
        super()._check()
        if not self.reward_multiplier > 0:
            raise ValueError(
                f"reward_multiplier={self.reward_multiplier} must be > 0: with 0 the reward moves nothing. To lower a reward, "
                "give it a negative weight in reward_weights."
            )
        if not self.use_peft:
            raise ValueError(
                "use_peft=False leaves no base model, which RAM compares with: that is the model with its adapter disabled. Set "
                "use_peft=True."
            )
        idle = {
            "epsilon": "has nothing to clip, as RAM has no ratio",
            "beta": "weighs the distance from the base model, which RAM's loss has anyway",
        }
        for name, why in idle.items():
            if getattr(self, name) != getattr(RolloutConfig, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} {why}: leave it out. What keeps its updates small is a lower reward_multiplier "
                    "or learning_rate."
                )
