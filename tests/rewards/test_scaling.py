import math

import pytest
import torch

from trl_fdfo.rewards.scaling import scaled
from trl_fdfo.training.surrogate import tied


# Two prompts of two images; two rewards of other units.
REWARDS = torch.tensor([[[1.0, 100.0], [3.0, 100.0]], [[5.0, 300.0], [5.0, 700.0]]], dtype=torch.float64)


def test_none_changes_no_bit():
    assert scaled(REWARDS, "none") is REWARDS


def test_group_gives_deviations_in_units_of_the_prompt_and_nothing_for_a_tie():
    half = math.sqrt(0.5)  # (3 - 1) / 2 over the deviation sqrt(2)
    expected = [[[-half, 0], [half, 0]], [[0, -half], [0, half]]]
    torch.testing.assert_close(scaled(REWARDS, "group"), torch.tensor(expected, dtype=torch.float64))


def test_batch_divides_by_the_deviation_over_all_images():
    # Of 1, 3, 5, 5 and of 100, 100, 300, 700, with n - 1.
    deviations = torch.tensor([math.sqrt(11 / 3), math.sqrt(80_000)], dtype=torch.float64)
    torch.testing.assert_close(scaled(REWARDS, "batch"), REWARDS / deviations)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_units_do_not_matter_any_more(scale):
    units = torch.tensor([1e-7, 1e7], dtype=torch.float64)
    torch.testing.assert_close(scaled(units * REWARDS, scale), scaled(REWARDS, scale))


def test_rounding_of_a_tie_is_no_difference():
    tie = torch.full((1, 3, 1), 0.1, dtype=torch.float64)
    assert tie.mean(dim=1).item() != 0.1, "this mean does not round, and the test shows nothing"
    assert scaled(tie, "group").tolist() == [[[0.0]] * 3]
    assert scaled(tie, "batch").equal(tie)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_reward_counts_where_it_applies_to_all_images_of_a_prompt(scale):
    rewards = REWARDS.clone()
    rewards[0, 0, 0] = math.nan
    found = scaled(rewards, scale)
    assert found[0, :, 0].isnan().all() and found[0, :, 1].isfinite().all() and found[1].isfinite().all()
    # The image that it does apply to has no part in the deviation: the others all have 5.
    assert found[1, :, 0].tolist() == ([0, 0] if scale == "group" else [5, 5])


def test_two_rewards_that_disagree_on_a_pair_cancel_to_a_tie():
    first = torch.rand(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = scaled(torch.stack([first, 7 - 3.3 * first], dim=-1), "group").sum(dim=-1)
    assert tied(total).all()
