"""What each trainer computes is its equation with the values of its options, none of which is the default."""

import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from forward_runs import OPTIONS
from tiny_runs import PROMPTS, redness

import trl_fdfo
from trl_fdfo.algorithm import (
    awm_loss,
    clipped_loss,
    cps_distribution,
    finite_difference,
    gaussian_kl,
    nft_loss,
    sde_distribution,
    surrogate_loss,
    without_variance,
)
from trl_fdfo.training.forward_process import target_velocity


LEVEL = 1


class Case:
    """A micro-batch of a trainer with a velocity that has moved, and the equations of its algorithm."""

    def __init__(self, trainer):
        self.trainer = trainer
        rewarded = {}
        targets = trainer.targets

        def keep(sampled, rewards, rows):
            rewarded[rows[0]] = sampled.endpoints.float(), rewards
            return targets(sampled, rewards, rows)

        trainer.targets = keep
        trainer._buffer = buffer = trainer._roll_out(0)
        inputs = next(buffer[n] for n in range(16) if buffer[n].level == LEVEL)
        self.batch = batch = trainer.with_tuple(inputs)
        self.rewarded = list(rewarded.values())[batch.number]
        sampled = batch.sampled
        self.old = sampled.velocities[LEVEL].float()
        self.moved = self.old + 0.05 * torch.randn(self.old.shape, generator=torch.Generator().manual_seed(0))
        self.x_t, self.t, self.s = sampled.x_t[LEVEL].float(), *sampled.sigmas[LEVEL : LEVEL + 2]
        self.x_s = sampled.x_s.get(LEVEL)

    def steps(self, distribution, noise_level):
        """The distributions of the step by the moved velocity and by the old one."""
        return (distribution(self.x_t, v, self.t, self.s, noise_level) for v in (self.moved, self.old))


def squared_distance(case):
    return (case.moved - case.old).square().flatten(1).mean(dim=1)


def fdfo(case):
    direction, difference = finite_difference(*case.rewarded, False)
    return surrogate_loss(case.moved, case.old, direction.flatten(0, 1), difference.float().flatten(), 0.07)


def flow_grpo(case):
    return clipped_loss(case.x_s, *case.steps(sde_distribution, 0.4), *case.batch.targets, 0.002)


def flow_grpo_cps(case):
    steps = map(without_variance, case.steps(cps_distribution, 0.4))
    return clipped_loss(case.x_s, *steps, *case.batch.targets, 0.002)


def diffusion_nft(case):
    return nft_loss(case.moved, case.old, target_velocity(case.batch, LEVEL), case.t, *case.batch.targets, 0.3), None


def awm(case):
    target = target_velocity(case.batch, LEVEL)
    return awm_loss(case.moved, case.old, target, case.t, *case.batch.targets, 0.002)


CASES = {
    "FDFO": ({"epsilon": 0.07, "whiten_direction": False, "churn": 0.2}, fdfo, squared_distance),
    "FlowGRPO": (
        {"epsilon": 0.002, "noise_level": 0.4},
        flow_grpo,
        lambda case: gaussian_kl(*case.steps(sde_distribution, 0.4)),
    ),
    "FlowGRPO, CPS": (
        {"epsilon": 0.002, "noise_level": 0.4, "sde_type": "cps"},
        flow_grpo_cps,
        lambda case: gaussian_kl(*map(without_variance, case.steps(cps_distribution, 0.4))),
    ),
    "DiffusionNFT": ({"nft_beta": 0.3}, diffusion_nft, squared_distance),
    "AWM": ({"epsilon": 0.002}, awm, squared_distance),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_distance_are_the_equations_with_the_options(name, tmp_path):
    options, equation, distance = CASES[name]
    trainer_class = getattr(trl_fdfo, name.split(",")[0] + "Trainer")
    config = trainer_class.config_class(**{**OPTIONS, "output_dir": str(tmp_path), **options})
    case = Case(trainer_class(config, tiny_pipelines.sd3(), redness, Dataset.from_dict({"prompt": PROMPTS})))
    loss, ratio = case.trainer.loss(case.moved, case.old, case.batch, LEVEL)
    expected_loss, expected_ratio = equation(case)
    # The losses are of 1e-3: the usual bound of 1e-5 would let a clip that does nothing pass.
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(ratio, expected_ratio)
    torch.testing.assert_close(case.trainer.base_distance(case.moved, case.old, case.batch, LEVEL), distance(case))
    if "noise_level" in options:
        assert case.trainer.noise_amounts(0, range(2)).unique().tolist() == pytest.approx([0, 0.4])
