"""Options of DiffusionNFT."""

from dataclasses import dataclass
from typing import ClassVar

from ..training.config import option, with_help
from ..training.forward_process_config import ForwardProcessConfig


@dataclass
@with_help
class DiffusionNFTConfig(ForwardProcessConfig):
    r"""
    Configuration of [`DiffusionNFTTrainer`] (DiffusionNFT, arXiv 2509.16117): the options of [`ForwardProcessConfig`]
    and the ones below. `epsilon` is none of them: the old policy, which follows slowly, is what keeps updates small.

    Parameters:
        nft_beta (`float`, defaults to `1.0`):
            Strength beta > 0 with which the implicit positive and negative policies mix the trained one with the old: the
            smaller, the farther a rollout moves the policy. The paper takes 1 or, to be sooner, 0.1.
        old_policy_decay (`float`, defaults to `0.5`):
            Largest share of itself that the policy which samples keeps after a rollout, in [0, 1). 0 samples with the
            trained weights.
        old_policy_decay_rate (`float`, defaults to `0.001`):
            How much that share, which starts at 0, grows with each rollout, >= 0.
    """

    idle_options: ClassVar[dict[str, str]] = {"epsilon": "has nothing to clip, as DiffusionNFT has no ratio"}
    smaller_updates: ClassVar[str] = "a lower learning_rate, or a larger nft_beta, old_policy_decay or beta"

    nft_beta: float = option(1.0)
    old_policy_decay: float = option(0.5)
    old_policy_decay_rate: float = option(0.001)

    def _check(self) -> None:
        super()._check()
        if not self.nft_beta > 0:
            raise ValueError(f"nft_beta={self.nft_beta} must be > 0: with 0 the loss does not depend on the weights.")
        if not 0 <= self.old_policy_decay < 1:
            raise ValueError(
                f"old_policy_decay={self.old_policy_decay} must be in [0, 1): with 1 the policy that samples never follows."
            )
        if not self.old_policy_decay_rate >= 0:
            raise ValueError(
                f"old_policy_decay_rate={self.old_policy_decay_rate} must be >= 0: the decay grows from 0 to "
                "old_policy_decay."
            )
