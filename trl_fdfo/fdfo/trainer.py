"""The trainer of FDFO (arXiv 2603.12893): its four steps, wired to the pipeline."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from ..pipeline.records import RolloutBatch, repeat_each
from ..rewards.reward_functions import RewardFunctions
from ..saving.model_card import Paper
from ..seeds import CHURN, INITIAL_NOISE, derive_seed
from ..training.buffer import ScoredBatch, trained_levels
from ..training.surrogate import SurrogateLoss, in_float32
from ..training.trainer import RolloutTrainer
from ..training.watchdogs import WatchdogError
from .churn import constant_churn, interval_churn, prior_churn
from .config import MAX_CHURN, FDFOConfig
from .finite_difference import FiniteDifference, finite_difference, known_gradient, reward_gradient
from .loss import surrogate_loss
from .scheduler import ChurnScheduler


logger = logging.get_logger(__name__)


class FDFOTrainer(RolloutTrainer):
    """
    Post-trains a diffusers flow-matching pipeline with Finite Difference Flow Optimization.

    ```python
    FDFOTrainer(FDFOConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Arguments and errors: [`~trl_fdfo.training.trainer.RolloutTrainer`].
    """

    algorithm = "FDFO"
    paper = Paper(
        title="Finite Difference Flow Optimization for RL Post-Training of Text-to-Image Models",
        authors=(
            *("McAllister, David", "Aittala, Miika", "Karras, Tero", "Hellsten, Janne", "Kanazawa, Angjoo"),
            *("Aila, Timo", "Laine, Samuli"),
        ),
        arxiv_id="2603.12893",
        year=2026,
        key="mcallister2026fdfo",
    )
    config_class = FDFOConfig
    scheduler_class = ChurnScheduler
    hyperparameters = ("churn_schedule", "churn", "timestep_selection")
    latents_per_target = 1  # the direction

    # Step 1: paired rollouts ------------------------------------------------------------------------------------------

    @classmethod
    def shares_prefix(cls, config: FDFOConfig) -> bool:
        return config.shared_prefix

    def initial_seeds(self, rollout: int, numbers: Sequence[int]) -> list[int]:
        return [derive_seed(self.args.seed, rollout, n, INITIAL_NOISE) for n in numbers]

    def noise_amounts(self, rollout: int, numbers: Sequence[int]) -> Tensor:
        args, shape = self.args, self.args.churn_shape()
        if args.churn_schedule == "constant":
            return constant_churn(self.sigmas, args.churn)
        draws = [np.random.default_rng([args.seed, rollout, n, CHURN]).standard_normal(2) for n in numbers]
        first, second = torch.tensor(np.stack(draws), dtype=torch.float32).unbind(dim=1)
        if args.churn_schedule == "interval":
            location = shape["location"] + shape["location_std"] * first
            return interval_churn(self.sigmas, self._weights(second), location, shape["width"])
        return prior_churn(self.sigmas, self._weights(first))

    def _weights(self, draws: Tensor) -> Tensor:
        """Total churn of each prompt, log-normal over the prompts, from normal draws, shape [P]."""
        # Beyond its bound nothing is left of the image, and exp soon overflows.
        return (self.args.churn * (self.args.churn_shape()["spread"] * draws).exp()).clamp(max=MAX_CHURN)

    def shared_noise(self, rollout: int) -> float:
        gammas = torch.atleast_2d(self.noise_amounts(rollout, range(self.args.prompts_per_rollout)))
        return (-gammas.log1p().sum(dim=1)).exp().mean().item()

    # Step 3: finite difference ----------------------------------------------------------------------------------------

    @classmethod
    def rewards_to_compare(cls, config: FDFOConfig, rewards: RewardFunctions) -> list[str]:
        if config.direction == "finite_difference":
            return rewards.names
        differentiable = rewards.differentiable
        rewards.gradients_of = differentiable  # so that one without a gradient is refused by its first scores
        others = [name for name in rewards.names if name not in differentiable]
        if not differentiable:
            raise ValueError(
                f"direction='reward_gradient' needs a reward that has a gradient, and none of {', '.join(others)} has one: they "
                "take PIL images, compare pairs, work in the background or say so. Leave the option out: "
                "direction='finite_difference' needs no gradient."
            )
        if others:
            logger.warning(
                "direction='reward_gradient' takes the gradient of %s, and the finite difference of %s. The latter knows the "
                "gradient in one direction alone, so it pulls less at the same weight (docs/rewards.md).",
                *(", ".join(names) for names in (differentiable, others)),
            )
        return others

    def _try_replay(self) -> float:
        return super()._try_replay(decodes=self.args.direction == "reward_gradient")

    def ties_have_no_loss(self) -> bool:
        return self.args.direction == "finite_difference"

    def targets(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> FiniteDifference:
        endpoints = sampled.endpoints.float()
        direction, reward_difference = finite_difference(endpoints, rewards, self.args.whiten_direction)
        difference = FiniteDifference(direction, in_float32(reward_difference))
        if self.args.direction == "reward_gradient":
            gradient, known = self._reward_gradient(sampled, rows), known_gradient(difference)
            if self.compared_rewards:
                self.metrics.add(finite_difference_pull=known.norm() / gradient.norm().clamp(min=1e-30))
            difference = reward_gradient(endpoints, gradient + known)
        return FiniteDifference(*(each.flatten(0, 1) for each in difference))

    def _reward_gradient(self, sampled: RolloutBatch, rows: list[int]) -> Tensor:
        """dR/dx_0 through the decoder and the rewards that have a gradient, the shape of the endpoints, [P, G, ...]."""
        prompts, branches = sampled.endpoints.shape[:2]
        columns = {name: repeat_each(values, branches) for name, values in self.train_dataset[rows].items()}
        with torch.enable_grad():
            endpoints = sampled.endpoints.flatten(0, 1).detach().requires_grad_()
            made = self.flow.decode(sampled, endpoints)
            at_made = self.reward_functions.gradient(
                made, columns[self.args.dataset_prompt_column], self.state, columns, branches
            )
            pairs = [pair for pair in zip(tree_leaves(made), tree_leaves(at_made)) if pair[0].requires_grad]
            outputs, their_gradients = zip(*pairs)
            (gradient,) = torch.autograd.grad(outputs, endpoints, their_gradients)
        if not gradient.isfinite().all():
            raise WatchdogError(
                "The gradient of the reward has values that are not finite, such as those of a square root at 0: mend it "
                "there, or set direction='finite_difference', which needs no gradient."
            )
        return gradient.float().unflatten(0, (prompts, branches))

    # Step 4: update ---------------------------------------------------------------------------------------------------

    def trained_levels(self, rollout: int, batch: int) -> list[int]:
        args, steps = self.args, self.trainable_levels
        if args.timestep_selection == "first":
            steps = steps[: args.num_trained_levels]
        levels = trained_levels(
            len(steps), args.num_trained_levels, args.optimizer_steps_per_rollout, args.seed, rollout, batch
        )
        return [steps[level] for level in levels]

    def loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        return surrogate_loss(velocity, old_velocity, *batch.targets, self.args.epsilon)

    def base_distance(self, velocity: Tensor, base_velocity: Tensor, batch: ScoredBatch, level: int) -> Tensor:
        return (velocity - base_velocity).square().flatten(1).mean(dim=-1)
