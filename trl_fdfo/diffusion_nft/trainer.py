"""DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): what it learns from the endpoints of a rollout, and its old policy."""

import torch
from torch import Tensor

from ..pipeline.records import RolloutBatch
from ..saving.model_card import Paper
from ..training.buffer import ScoredBatch
from ..training.forward_process import ForwardProcessTrainer, target_velocity
from ..training.surrogate import SurrogateLoss, in_float32
from .config import DiffusionNFTConfig
from .loss import nft_loss, optimality


class DiffusionNFTTrainer(ForwardProcessTrainer):
    """
    Post-trains a diffusers flow-matching pipeline with DiffusionNFT.

    ```python
    DiffusionNFTTrainer(DiffusionNFTConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Arguments and errors: [`~trl_fdfo.training.trainer.RolloutTrainer`].
    """

    algorithm = "DiffusionNFT"
    paper = Paper(
        title="DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        authors=(
            *("Zheng, Kaiwen", "Chen, Huayu", "Ye, Haotian", "Wang, Haoxiang", "Zhang, Qinsheng", "Jiang, Kai"),
            *("Su, Hang", "Ermon, Stefano", "Zhu, Jun", "Liu, Ming-Yu"),
        ),
        arxiv_id="2509.16117",
        year=2025,
        key="zheng2025diffusionnft",
    )
    config_class = DiffusionNFTConfig
    hyperparameters = ("nft_beta", "old_policy_decay", "old_policy_decay_rate")

    def see_rewards(self, rewards: Tensor) -> None:
        rewards = self.accelerator.gather(rewards.to(self.args.device))
        known = rewards[rewards.isfinite()]
        self._spread = known.std(correction=0).item() if len(known) else 0.0

    def targets(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> tuple[Tensor]:
        return (in_float32(optimality(rewards, self._spread).flatten()),)

    def loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        with torch.no_grad():
            distance = (velocity - old_velocity).square().mean()
        self.metrics.add(old_policy_distance=distance)
        t, target = batch.sampled.sigmas[level], target_velocity(batch, level)
        return SurrogateLoss(nft_loss(velocity, old_velocity, target, t, *batch.targets, self.args.nft_beta), None)
