"""The trainer of FDFO (arXiv 2603.12893): its four steps, wired to the pipeline. The maths is in `algorithm`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .algorithm import (
    FiniteDifference,
    SurrogateLoss,
    constant_churn,
    finite_difference,
    interval_churn,
    prior_churn,
    reward_gradient,
    surrogate_loss,
)
from .fdfo_config import FDFOConfig
from .pipeline_flow import RolloutBatch, repeat_each
from .rollout_buffer import ScoredBatch, trained_levels
from .rollout_trainer import RolloutTrainer
from .schedulers import ChurnScheduler
from .seeds import CHURN, INITIAL_NOISE, derive_seed
from .watchdogs import WatchdogError


class FDFOTrainer(RolloutTrainer):
    """
    Post-trains a diffusers flow-matching pipeline with Finite Difference Flow Optimization.

    ```python
    FDFOTrainer(FDFOConfig(output_dir="out"), "hub-id-or-path-of-a-pipeline", reward_fn).train()
    ```

    Arguments and what is raised: [`~trl_fdfo.rollout_trainer.RolloutTrainer`].
    """

    config_class = FDFOConfig
    sampler = ChurnScheduler

    # Step 1: paired rollouts ------------------------------------------------------------------------------------------

    def _seeds(self, rollout: int, numbers: Sequence[int]) -> list[int]:
        return [derive_seed(self.args.seed, rollout, n, INITIAL_NOISE) for n in numbers]

    def _noise(self, rollout: int, numbers: Sequence[int]) -> Tensor:
        args = self.args
        if args.churn_schedule == "constant":
            return constant_churn(self._sigmas, args.churn)
        draws = [np.random.default_rng([args.seed, rollout, n, CHURN]).standard_normal() for n in numbers]
        draws = torch.tensor(draws, dtype=torch.float32)
        if args.churn_schedule == "interval":
            location = args.churn_location + args.churn_location_std * draws
            return interval_churn(self._sigmas, args.churn, location, args.churn_width)
        return prior_churn(self._sigmas, args.churn * (args.churn_spread * draws).exp())

    def _shared_noise(self, rollout: int) -> float:
        gammas = torch.atleast_2d(self._noise(rollout, range(self.args.prompts_per_rollout)))
        return (-gammas.log1p().sum(dim=1)).exp().mean().item()

    # Step 3: finite difference ----------------------------------------------------------------------------------------

    def _signal(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> FiniteDifference:
        endpoints = sampled.endpoints.float()
        if self.args.direction == "reward_gradient":
            direction, reward_difference = reward_gradient(endpoints, self._reward_gradient(sampled, rows))
        else:
            direction, reward_difference = finite_difference(endpoints, rewards, self.args.whiten_direction)
        # A prompt to which no reward applies teaches nothing.
        return FiniteDifference(direction.flatten(0, 1), reward_difference.flatten().nan_to_num(nan=0.0))

    def _reward_gradient(self, sampled: RolloutBatch, rows: list[int]) -> Tensor:
        """dR/dx_0 through the decoder and the rewards, the shape of the endpoints, [P, G, ...]."""
        prompts, branches = sampled.endpoints.shape[:2]
        columns = {name: repeat_each(values, branches) for name, values in self.train_dataset[rows].items()}
        with torch.enable_grad():
            endpoints = sampled.endpoints.flatten(0, 1).detach().requires_grad_()
            images = self.flow.decode(sampled, endpoints)
            total = self.reward_functions.with_gradients(
                images, columns[self.args.dataset_prompt_column], self.state, columns, branches
            )
            (gradient,) = torch.autograd.grad(total.sum(), endpoints)
        if not gradient.isfinite().all():
            raise WatchdogError(
                "The gradient of the reward has values that are not finite, such as those of a square root at 0: mend it "
                "there, or set direction='finite_difference', which needs no gradient."
            )
        return gradient.float().unflatten(0, (prompts, branches))

    # Step 4: update ---------------------------------------------------------------------------------------------------

    def _trained_levels(self, rollout: int, batch: int) -> list[int]:
        args = self.args
        return trained_levels(
            args.num_inference_steps,
            args.num_trained_levels,
            args.optimizer_steps_per_rollout,
            args.seed,
            rollout,
            batch,
        )

    def _loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        return surrogate_loss(velocity, old_velocity, *batch.signal, self.args.epsilon)

    def _distance(self, velocity: Tensor, base_velocity: Tensor, batch: ScoredBatch, level: int) -> Tensor:
        return (velocity - base_velocity).square().flatten(1).mean(dim=-1)
