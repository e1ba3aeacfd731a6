import math

import pytest
import torch
from conftest import logged, trained_weights, warnings_of_the_package
from tiny_runs import redness
from transformers import TrainerCallback

import trl_fdfo
from trl_fdfo import FDFOConfig
from trl_fdfo.training.watchdogs import MAX_IDLE_ROLLOUTS, WatchdogError, Watchdogs


def test_loss_that_is_not_finite_ends_the_run_before_the_step(make_trainer):
    trainer = make_trainer()

    class Poison(torch.nn.Module):
        """From the second rollout's updates on the transformer gives NaN where it trains."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            bad = trainer.state.global_step == 3 and torch.is_grad_enabled()
            return self.layer(x) * (math.nan if bad else 1.0)

    transformer = trainer.pipeline.transformer
    transformer.proj_out = Poison(transformer.proj_out)
    before = {}

    class Keep(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            super().step(*args, **kwargs)
            before.update(trained_weights(trainer))

    trainer.optimizer = Keep([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(
        WatchdogError, match=r"The loss is nan at noise level \d.*velocity has values.*not finite.*Resume"
    ):
        trainer.train()
    assert trainer.state.global_step == 3
    for name, weight in trained_weights(trainer).items():
        assert weight.isfinite().all() and torch.equal(weight, before[name])


def test_a_run_after_an_interrupted_one_starts_afresh(make_trainer):
    bad = torch.ones(1)

    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if bad.isnan():
                raise KeyboardInterrupt

    trainer = make_trainer(callbacks=[Interrupt()])
    proj_out = trainer.pipeline.transformer.proj_out
    proj_out.register_forward_hook(lambda module, inputs, output: output * bad if output.requires_grad else output)
    bad.fill_(math.nan)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    bad.fill_(1.0)
    trainer.train()
    assert logged(trainer, "replay_error") == [0.0, 0.0]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_gradient_that_is_not_finite_ends_the_run_before_the_step(make_trainer, max_grad_norm):
    trainer = make_trainer(max_grad_norm=max_grad_norm)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * (math.inf if trainer.state.global_step == 1 else 1.0))
    with pytest.raises(WatchdogError, match=r"The gradient norm is (nan|inf) before optimizer step 2"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trained_weights(trainer).values())


def test_gradient_far_above_the_usual_is_reported(caplog):
    watchdogs = Watchdogs(FDFOConfig(output_dir="out", use_cpu=True, attention_backend="_native_cudnn"))
    with pytest.raises(
        WatchdogError, match=r"use bf16\. Or leave out attention_backend='_native_cudnn', which can return"
    ):
        watchdogs.check_gradient(float("nan"), 3)
    watchdogs = Watchdogs(FDFOConfig(output_dir="out", use_cpu=True))
    for step in range(30):
        watchdogs.check_gradient(1.0 + step / 100, step)
    watchdogs.check_gradient(40.0, 30)
    assert not warnings_of_the_package(caplog)
    watchdogs.check_gradient(900.0, 31)
    assert "gradient norm of step 32 is 900, and 1.15 was usual" in caplog.text


@pytest.mark.parametrize(
    ("algorithm", "smaller_updates", "more_noise"),
    [
        ("FDFO", "a smaller epsilon", " A larger churn makes"),
        ("FlowGRPO", "a smaller epsilon", " A larger noise_level makes"),
        ("AWM", "a smaller epsilon", ""),
        ("DiffusionNFT", "a larger nft_beta, old_policy_decay or beta", ""),
        ("RAM", "a lower reward_multiplier or learning_rate", ""),
    ],
)
def test_a_warning_advises_options_of_its_algorithm(caplog, algorithm, smaller_updates, more_noise):
    config = getattr(trl_fdfo, f"{algorithm}Config")(output_dir="out", use_cpu=True)
    watchdogs = Watchdogs(config)
    for step in range(30):
        watchdogs.check_gradient(1.0 if step < 29 else 900.0, step)
    watchdogs.check_rewards(0, differs=False)
    unstable, idle = caplog.messages
    assert smaller_updates in unstable and more_noise in idle and idle.endswith("differ more.") == bool(more_noise)
    assert not any(option in unstable + idle for option in config.idle_options)


def test_identical_branches_end_the_run(make_trainer):
    trainer = make_trainer(churn=1e-20)
    with pytest.raises(WatchdogError, match=r"are the same \(.*rounding of torch.float32.*larger churn"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(("churn", "message"), [(3e-13, "near the rounding of torch.float32"), (6.0, "Lower `churn`")])
def test_branches_too_near_or_too_far_are_reported(make_trainer, caplog, churn, message):
    trainer = make_trainer(churn=churn, churn_schedule="prior", num_rollouts=1)
    trainer.train()
    (distance,) = logged(trainer, "branch_distance")
    assert message in caplog.text and (churn > 1 or 0 < distance < 2e-6)


def test_unrelated_images_are_at_a_distance_of_one(make_trainer):
    trainer = make_trainer(num_rollouts=1)
    for branches in (2, 3):
        endpoints = torch.randn(300, branches, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        trainer.metrics.add_branches([endpoints], shared_noise=1.0)
        assert trainer.metrics.values["branch_distance"][-1].item() == pytest.approx(1.0, abs=0.01)


def test_rewards_that_never_differ_end_the_run(make_trainer, caplog):
    trainer = make_trainer(reward_fn=lambda images: [1.0] * len(images), num_rollouts=MAX_IDLE_ROLLOUTS + 5)
    with pytest.raises(
        WatchdogError, match=r"Rollout 10: the images of no prompt differ.*the 10th such rollout in a row"
    ):
        trainer.train()
    assert sum("Rollout" in record.message and "nothing to learn" in record.message for record in caplog.records) == 9
    with pytest.raises(
        WatchdogError, match="Rollout 10: .*the 10th such rollout"
    ):  # not the 11th: another run has begun
        trainer.train()


def test_one_good_rollout_is_enough(make_trainer):
    def sometimes(images, prompts, trainer_state):
        good = trainer_state.global_step // 2 % (MAX_IDLE_ROLLOUTS - 1) == 0
        return redness(images, prompts) if good else [0.0] * len(images)

    trainer = make_trainer(reward_fn=sometimes, num_rollouts=MAX_IDLE_ROLLOUTS + 2, prompts_per_rollout=2)
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std").count(1.0) == MAX_IDLE_ROLLOUTS


def test_ratio_outside_of_the_trust_region_is_reported(make_trainer, tmp_path, caplog):
    trainer = make_trainer(learning_rate=0.3, epsilon=0.001, num_iterations=2, max_grad_norm=0.0)
    trainer.train()
    assert max(logged(trainer, "ratio_error")) > 0.003 and "the updates leave the trust region" in caplog.text
    assert "or start a new run with a lower num_iterations" in caplog.text
    caplog.clear()
    steady = make_trainer(output_dir=str(tmp_path / "steady"))
    steady.train()
    assert logged(steady, "first_ratio_error") == [0.0, 0.0] and not warnings_of_the_package(caplog)


def test_ratio_that_is_not_one_before_the_first_step_is_reported(caplog):
    watchdogs = Watchdogs(FDFOConfig(output_dir="out", use_cpu=True, epsilon=0.1))
    watchdogs.check_first_ratio(0.04)
    assert not warnings_of_the_package(caplog)
    watchdogs.check_first_ratio(0.06)
    assert "The ratio is off from 1 by 0.06 before the first step" in caplog.text
