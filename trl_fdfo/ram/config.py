"""Options of Reinforce Adjoint Matching."""

from dataclasses import dataclass
from typing import ClassVar

from ..training.config import option, with_help
from ..training.forward_process_config import ForwardProcessConfig


@dataclass
@with_help
class RAMConfig(ForwardProcessConfig):
    r"""
    Configuration of [`RAMTrainer`] (Reinforce Adjoint Matching, arXiv 2605.10759): the options of
    [`ForwardProcessConfig`] and the one below. `epsilon` and `beta` are none of them: the base model in the loss is what holds
    updates back.

    Parameters:
        reward_multiplier (`float`, defaults to `50.0`):
            1 / lambda > 0, in 1 / units of the reward: how far a reward may move the model from the base model. At the optimum
            an image is exp(reward_multiplier x reward) times as likely as under the base model. 50 is the value in the example of
            the authors' code, for rewards in [0, 1].
    """

    idle_options: ClassVar[dict[str, str]] = {
        "epsilon": "has nothing to clip, as RAM has no ratio",
        "beta": "weighs the distance from the base model, which RAM's loss has anyway",
        "old_policy_decay": "averages an old policy, which RAM has not",
        "old_policy_decay_rate": "averages an old policy, which RAM has not",
    }
    smaller_updates: ClassVar[str] = "a lower reward_multiplier or learning_rate"

    reward_multiplier: float = option(50.0)

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
