"""Schedules of the learning rate that follow a metric of the evaluations, all of which are better when they are higher."""

from dataclasses import replace

import pytest


RATES = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}, "eval_strategy": "epoch"}


@pytest.mark.parametrize(("controls", "falls"), [([1.0, 2.0, 3.0], False), ([3.0, 2.0, 1.0], True)])
def test_the_rate_falls_when_the_metric_does(make_trainer, controls, falls):
    scores = iter(controls)

    def control(images):
        if len(images) != 1:  # in the checks of the rewards
            return [0.0] * len(images)
        return [next(scores)]

    options = {
        "num_eval_prompts": 1,
        "num_rollouts": 3,
        "metric_for_best_model": "eval_control",
        "alarm_control_drop": None,
    }
    trainer = make_trainer(eval_reward_fn=control, **RATES, **options)
    trainer.train()
    assert trainer.lr_scheduler.mode == "max"
    rate = trainer.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(1e-5 if falls else 1e-3)


def test_what_they_follow_is_the_reward_if_nothing_else_is_said(make_config):
    for kind in ("reduce_lr_on_plateau", "greedy"):
        config = make_config(lr_scheduler_type=kind, eval_strategy="epoch", num_eval_prompts=1)
        assert (config.metric_for_best_model, config.schedule_kwargs()["mode"]) == ("eval_reward", "max")
    lower = replace(config, lr_scheduler_type="reduce_lr_on_plateau", greater_is_better=False)
    assert lower.schedule_kwargs() == {"mode": "min"}
    assert replace(lower, lr_scheduler_type="cosine").schedule_kwargs() == {}
    asked = make_config(**{**RATES, "lr_scheduler_kwargs": {"mode": "min"}}, num_eval_prompts=1)
    assert asked.schedule_kwargs() == {"mode": "min"}


def test_a_resumed_run_goes_on_with_the_rate_to_which_its_schedule_has_come(make_trainer, caplog):
    def control(images, trainer_state):
        return [-float(trainer_state.global_step)] * len(images)

    options = {**RATES, "num_eval_prompts": 1, "metric_for_best_model": "eval_control", "alarm_control_drop": None}
    options |= {"eval_reward_fn": control, "save_strategy": "epoch"}
    make_trainer(num_rollouts=3, **options).train()
    resumed = make_trainer(num_rollouts=3, max_grad_norm=0.5, resume_with_changed_options=True, **options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-4")
    rates = [log["learning_rate"] for log in resumed.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4])
    assert "The learning rate goes on with 0.0001, to which its schedule has come, and not with 0.001" in caplog.text
