"""Reinforce Adjoint Matching (Bergmeister et al. 2026, arXiv 2605.10759): what it learns from the endpoints of a rollout."""

import contextlib

import torch
from torch import Tensor
from transformers.utils import logging

from ..pipeline.records import RolloutBatch
from ..saving.model_card import Paper
from ..training.buffer import ScoredBatch
from ..training.forward_process import ForwardProcessTrainer, target_velocity
from ..training.surrogate import SurrogateLoss, centered, in_float32
from .config import RAMConfig
from .loss import ram_loss


logger = logging.get_logger(__name__)

# On the packaged pipeline 5 learns most, and 20 less than no training at high learning rates.
_LARGEST_SPREAD = 15.0


class RAMTrainer(ForwardProcessTrainer):
    """
    Post-trains a diffusers flow-matching pipeline with Reinforce Adjoint Matching.

    ```python
    RAMTrainer(RAMConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Arguments and errors: [`~trl_fdfo.training.trainer.RolloutTrainer`].
    """

    algorithm = "RAM"
    paper = Paper(
        title="Reinforce Adjoint Matching: Scaling RL Post-Training of Diffusion and Flow-Matching Models",
        authors=(
            *("Bergmeister, Andreas", "Jegelka, Stefanie", "Nüsken, Nikolas", "Domingo-Enrich, Carles"),
            "Pidstrigach, Jakiw",
        ),
        arxiv_id="2605.10759",
        year=2026,
        key="bergmeister2026reinforce",
    )
    config_class = RAMConfig
    hyperparameters = ("reward_multiplier",)
    has_old_policy = False

    def compared_weights(self) -> contextlib.AbstractContextManager:
        return self.accelerator.unwrap_model(self.flow.model).disable_adapter()

    def see_rewards(self, rewards: Tensor) -> None:
        if self.state.global_step:  # the first rollout shows the scale
            return
        deviations = self.accelerator.gather(rewards.std(dim=1).to(self.args.device))
        # R / lambda: at the optimum, images that are this far apart are exp(that) times as likely as one another.
        spread = self.args.reward_multiplier * deviations.nanmean().item()
        if spread > _LARGEST_SPREAD and self.is_world_process_zero():
            logger.warning(
                f"reward_multiplier={self.args.reward_multiplier:g} times the standard deviation of the rewards of a prompt is "
                f"{spread:.3g}: beside such rewards the base model, which holds updates back, counts for nothing. 5 is a good "
                f"start, here reward_multiplier={5 / spread * self.args.reward_multiplier:.2g}."
            )

    def targets(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> tuple[Tensor]:
        others = rewards.shape[1] - 1
        # G / (G - 1) times the distance from the mean of all is that from the mean of the others.
        multiplier = self.args.reward_multiplier * (others + 1) / others
        return (in_float32(multiplier * centered(rewards).flatten()),)

    def loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        base_velocity = old_velocity
        with torch.no_grad():
            distance = self.base_distance(velocity, base_velocity, batch, level)
        self.metrics.add(base_distance=distance.mean())
        return SurrogateLoss(ram_loss(velocity, base_velocity, target_velocity(batch, level), *batch.targets), None)
