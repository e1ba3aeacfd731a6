"""Options of DiffusionNFT."""

from dataclasses import dataclass
from typing import ClassVar

from ..training.config import option, with_help
from ..training.forward_process_config import ForwardProcessConfig


@dataclass
@with_help
class DiffusionNFTConfig(ForwardProcessConfig):
    r"""
    Configuration of [`DiffusionNFTTrainer`] (DiffusionNFT, arXiv 2509.16117): the options of [`ForwardProcessConfig`], of
    which one has another default, and `nft_beta`. `epsilon` is none of them: the old policy, which follows slowly, is what
    keeps updates small.

    Parameters:
        nft_beta (`float`, defaults to `1.0`):
            Strength beta > 0 with which the implicit positive and negative policies mix the trained one with the old: the
            smaller, the farther a rollout moves the policy. The paper takes 1 or, to be sooner, 0.1.
        old_policy_decay (`float`, defaults to `0.5`):
            Largest share of itself that the old policy, which samples, keeps after a rollout, in [0, 1).
    """

    idle_options: ClassVar[dict[str, str]] = {"epsilon": "has nothing to clip, as DiffusionNFT has no ratio"}
    smaller_updates: ClassVar[str] = "a lower learning_rate, or a larger nft_beta, old_policy_decay or beta"

    nft_beta: float = option(1.0)
    old_policy_decay: float = option(0.5)

    def _check(self) -> None:
        super()._check()
        if not self.nft_beta > 0:
            raise ValueError(f"nft_beta={self.nft_beta} must be > 0: with 0 the loss does not depend on the weights.")
