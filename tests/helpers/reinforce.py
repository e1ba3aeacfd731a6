"""
A whole algorithm: REINFORCE on FDFO's sampler. Each image pulls the velocity toward its own noise and endpoint, weighed
by its reward less the mean reward of its prompt:

    L = A mean((v - (x_t - x_0) / t)^2),    A = R - mean R

docs/algorithms.md explains it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trl_fdfo.fdfo.churn import constant_churn
from trl_fdfo.fdfo.scheduler import ChurnScheduler
from trl_fdfo.saving.model_card import Paper
from trl_fdfo.seeds import INITIAL_NOISE, derive_seed
from trl_fdfo.training.buffer import trained_levels
from trl_fdfo.training.config import RolloutConfig, option
from trl_fdfo.training.surrogate import SurrogateLoss, in_float32
from trl_fdfo.training.trainer import RolloutTrainer


@dataclass
class ReinforceConfig(RolloutConfig):
    churn: float = option(0.2)  # fresh noise that drives the images of a prompt apart


class Targets(NamedTuple):
    endpoint: Tensor  # [N, ...]
    advantage: Tensor  # [N]


class ReinforceTrainer(RolloutTrainer):
    algorithm = "REINFORCE"
    paper = Paper(
        "Simple Statistical Gradient-Following Algorithms", ["Williams, Ronald J."], "0000.00000", 1992, "w92"
    )
    config_class = ReinforceConfig
    scheduler_class = ChurnScheduler
    hyperparameters = ("churn",)
    latents_per_target = 1  # the endpoint

    def initial_seeds(self, rollout, numbers):
        return [derive_seed(self.args.seed, rollout, n, INITIAL_NOISE) for n in numbers]

    def noise_amounts(self, rollout, numbers):
        return constant_churn(self.sigmas, self.args.churn)

    def trained_levels(self, rollout, batch):
        args = self.args
        steps = (args.num_inference_steps, args.num_trained_levels, args.optimizer_steps_per_rollout)
        return trained_levels(*steps, args.seed, rollout, batch)

    def targets(self, sampled, rewards, rows):
        advantage = rewards - rewards.mean(dim=1, keepdim=True)
        return Targets(sampled.endpoints.float().flatten(0, 1), in_float32(advantage.flatten().nan_to_num(nan=0.0)))

    def loss(self, velocity, old_velocity, batch, level):
        x_t, (endpoint, advantage) = batch.sampled.x_t[level].float(), batch.targets
        error = (velocity - (x_t - endpoint) / self.sigmas[level]).square().flatten(1).mean(dim=-1)
        return SurrogateLoss(advantage * error, torch.ones_like(advantage))
