"""Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050): what it learns from the endpoints of a rollout."""

from torch import Tensor

from ..pipeline.records import RolloutBatch
from ..saving.model_card import Paper
from ..training.buffer import ScoredBatch
from ..training.forward_process import ForwardProcessTrainer, target_velocity
from ..training.surrogate import SurrogateLoss, group_advantages, in_float32
from .config import AWMConfig
from .loss import awm_loss


class AWMTrainer(ForwardProcessTrainer):
    """
    Post-trains a diffusers flow-matching pipeline with Advantage Weighted Matching.

    ```python
    AWMTrainer(AWMConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Arguments and errors: [`~trl_fdfo.training.trainer.RolloutTrainer`].
    """

    algorithm = "AWM"
    paper = Paper(
        title="Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
        authors=("Xue, Shuchen", "Ge, Chongjian", "Zhang, Shilong", "Li, Yichen", "Ma, Zhi-Ming"),
        arxiv_id="2509.25050",
        year=2025,
        key="xue2025advantage",
    )
    config_class = AWMConfig
    hyperparameters = ("level_power", "error_power", "old_policy_beta", "old_policy_decay", "old_policy_decay_rate")

    def ties_have_no_loss(self) -> bool:
        return not self.args.old_policy_beta  # a tie has a distance from the old policy too

    def targets(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> tuple[Tensor]:
        return (in_float32(group_advantages(rewards).flatten()),)

    def loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        args, t, target = self.args, batch.sampled.sigmas[level], target_velocity(batch, level)
        powers = args.level_power, args.error_power
        result = awm_loss(velocity, old_velocity, target, t, *batch.targets, args.epsilon, *powers)
        if args.old_policy_beta:
            distance = self.base_distance(velocity, old_velocity, batch, level)
            self.metrics.add(old_policy_distance=distance.detach().mean())
            result = result._replace(loss=result.loss + args.old_policy_beta * distance)
        return result
