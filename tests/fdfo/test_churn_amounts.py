"""The churn of each prompt: drawn over the prompts as the options say."""

import pytest
import torch


def logarithms(trainer, prompts: int = 4000) -> torch.Tensor:
    """log(1 + gamma) of each level for each prompt of a fine schedule, shape [P, T + 1]."""
    t = torch.linspace(1, 0, 201)
    trainer.sigmas = 3 * t / (1 + 2 * t)
    return trainer.noise_amounts(0, range(prompts)).log1p()


def locations(trainer, logarithms: torch.Tensor) -> torch.Tensor:
    """Centre of the churn of each prompt in logit(t)."""
    inside = logarithms[:, 1:-1]
    return (inside * trainer.sigmas[1:-1].logit()).sum(dim=1) / inside.sum(dim=1)


def test_interval_puts_the_published_bumps(make_trainer):
    trainer = make_trainer(churn_schedule="interval", churn=None)
    logs = logarithms(trainer)
    torch.testing.assert_close(logs.sum(dim=1), torch.ones(4000), rtol=1e-4, atol=0)
    centre = locations(trainer, logs)
    assert centre.median().item() == pytest.approx(1.0, abs=0.1)
    low, high = centre.quantile(torch.tensor([0.25, 0.75])).tolist()
    assert (high - low) / 1.349 == pytest.approx(1.5, abs=0.1)
    width = (logs * (trainer.sigmas.logit().nan_to_num(posinf=0, neginf=0) - centre[:, None]).square()).sum(dim=1)
    assert width.sqrt().median().item() == pytest.approx(0.25, abs=0.02)


def test_interval_with_a_spread_of_its_weight(make_trainer):
    plain = make_trainer(churn_schedule="interval", churn=0.2)
    spread = make_trainer(churn_schedule="interval", churn=0.2, churn_kwargs={"spread": 0.5})
    before, after = logarithms(plain), logarithms(spread)
    weights = (after.sum(dim=1) / 0.2).log()
    assert weights.mean().item() == pytest.approx(0, abs=0.03)
    assert weights.std().item() == pytest.approx(0.5, abs=0.02)
    # The same bumps, whose weight does not go with their location.
    torch.testing.assert_close(locations(spread, after), locations(plain, before), rtol=1e-3, atol=1e-3)
    correlation = torch.stack([locations(spread, after), weights]).corrcoef()[0, 1]
    assert abs(correlation.item()) < 0.06


def test_prior_has_the_published_spread(make_trainer):
    logs = logarithms(make_trainer(churn_schedule="prior", churn=None))
    assert not logs[:, 1:].any()
    weights = logs[:, 0].log()
    assert weights.mean().exp().item() == pytest.approx(0.1, rel=0.05)
    assert weights.std().item() == pytest.approx(1.0, abs=0.04)


def test_a_wide_spread_of_much_churn_stays_finite(make_trainer):
    trainer = make_trainer(churn_schedule="prior", churn=10.0, churn_kwargs={"spread": 100.0})
    gammas = trainer.noise_amounts(0, range(100))
    assert gammas.isfinite().all() and gammas.log1p().max().item() == pytest.approx(10.0)


@pytest.mark.parametrize("schedule", ["interval", "prior"])
def test_a_run_with_the_published_churn_trains(make_trainer, schedule):
    trainer = make_trainer(churn_schedule=schedule, churn=None)
    trainer.train()
    assert all(log["replay_error"] == 0 for log in trainer.state.log_history if "replay_error" in log)


@pytest.mark.parametrize(("steps", "saved"), [(40, 0.02), (10, 0.05)])
def test_a_shared_prefix_saves_as_little_as_its_docs_say(make_trainer, steps, saved):
    trainer = make_trainer(churn_schedule="interval", churn=None)
    t = torch.linspace(1, 0, steps + 1)
    trainer.sigmas = 3 * t / (1 + 2 * t)
    churned = (trainer.noise_amounts(0, range(4000)) > 0).unflatten(0, (-1, 2)).any(dim=1)  # batches of two prompts
    shared_steps = churned.float().argmax(dim=1).float().mean().item()
    # Two branches are sampled as one.
    assert shared_steps / steps / 2 == pytest.approx(saved, abs=0.006)
