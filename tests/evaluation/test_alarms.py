import math

import pytest
import torch
from conftest import warnings_of_the_package
from datasets import Dataset
from tiny_runs import UnplannedTrainer
from transformers import TrainerState

from trl_fdfo import FDFOConfig, shapes
from trl_fdfo.evaluation.alarms import Alarms


FIRST = {
    "eval_reward": 1.0,
    "eval_controls/judge/mean": 20.0,
    "eval_controls/judge/std": 2.0,
    "eval_controls/judge/se": 0.1,
    "eval_diversity": 0.5,
    "eval_diversity_se": 0.01,
    "step": 0,
}


def evaluation(**changes):
    """One that differs from the first in what is given: `judge` and `judge_se` are those of the control reward."""
    names = {"judge": "eval_controls/judge/mean", "judge_se": "eval_controls/judge/se"}
    return {**FIRST, "eval_reward": 2.0, **{names.get(name, f"eval_{name}"): value for name, value in changes.items()}}


@pytest.fixture
def check():
    """Whether an evaluation after 3 rollouts, with these options, raises an alarm."""

    def check(metrics, history=(FIRST,), alarm_control_drop=0.3, alarm_diversity_drop=0.3):
        alarms = Alarms(
            alarm_control_drop,
            alarm_diversity_drop,
            stop=False,
            controls=["judge"],
            has_diversity=True,
            evaluates_at_start=False,
            steps_per_rollout=2,
            smaller_updates="a larger beta",
        )
        return alarms.check(metrics, TrainerState(log_history=list(history), global_step=6))

    return check


# What counts as a fall ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "is_alarm"),
    [
        ({}, False),
        ({"judge": 25.0, "diversity": 0.9}, False),
        # 0.3 of the standard deviation 2 is 0.6; two standard errors, 2 sqrt(2) 0.1, are 0.28.
        ({"judge": 19.45}, False),
        ({"judge": 19.35}, True),
        # Two standard errors: 2 sqrt(0.1^2 + 0.5^2) = 1.02.
        ({"judge": 19.1, "judge_se": 0.5}, False),
        ({"judge": 18.9, "judge_se": 0.5}, True),
        # 0.3 of 0.5 is 0.15.
        ({"diversity": 0.36}, False),
        ({"diversity": 0.34}, True),
        ({"diversity": 0.34, "diversity_se": 0.1}, False),
        # A control that applies to no prompt.
        ({"judge": math.nan, "judge_se": math.nan}, False),
        ({"judge": 10.0, "judge_se": math.nan}, False),  # of one prompt
    ],
)
def test_a_fall_counts_where_it_is_relevant_and_more_than_noise(check, changes, is_alarm):
    assert check(evaluation(**changes)) is is_alarm


def test_rounding_is_no_fall_of_a_control_that_does_not_vary(check):
    first = {**FIRST, "eval_controls/judge/std": 0.0, "eval_controls/judge/se": 0.0}
    assert not check(evaluation(judge=19.99, judge_se=0.0), [first])
    assert check(evaluation(judge=19.9, judge_se=0.0), [first])


def test_thresholds_are_options(check):
    assert not check(evaluation(judge=19.0), alarm_control_drop=0.6)
    assert check(evaluation(judge=19.65), alarm_control_drop=0.15)
    assert not check(evaluation(judge=0.0), alarm_control_drop=None)
    assert check(evaluation(diversity=0.4), alarm_diversity_drop=0.1)
    assert not check(evaluation(diversity=0.0), alarm_diversity_drop=None)


def test_the_comparison_is_with_the_first_evaluation_also_from_a_file(check, tmp_path):
    # Slowly: each is near the one before.
    history = [FIRST, {"loss": 0.1}, evaluation(judge=19.8), evaluation(judge=19.5)]
    assert check(evaluation(judge=19.2), history)
    TrainerState(log_history=history).save_to_json(str(tmp_path / "state.json"))
    assert check(evaluation(judge=19.2), TrainerState.load_from_json(str(tmp_path / "state.json")).log_history)
    assert not check(evaluation(judge=19.3), history[2:])
    # Nothing to compare with.
    assert not check(evaluation(judge=0.0), [])


def test_the_message_has_values_meaning_and_advice(check, caplog):
    check(evaluation(judge=18.0, diversity=0.2))
    control, diversity = warnings_of_the_package(caplog)
    assert control.startswith(
        "Alarm after rollout 3: the control 'judge' fell from 20 to 18, by more than 0.6 (alarm_control_drop=0.3 standard "
        "deviations over the prompts), while the reward rose from 1 to 2: it is bought with what nobody trains on."
    )
    assert "earlier checkpoint with a larger beta, or train for fewer rollouts" in control
    assert control.endswith("stop_on_alarm=True would end it.")
    assert (
        "the diversity fell from 0.5 to 0.2, by more than 0.15 (alarm_diversity_drop=0.3 of what it was)" in diversity
    )
    caplog.clear()
    check(evaluation(judge=10.0, reward=0.5))
    (message,) = warnings_of_the_package(caplog)
    assert "and the reward did not rise (from 1 to 0.5): the model comes apart" in message
    caplog.clear()
    check(evaluation(judge=10.0, reward=math.nan))
    assert "gives no score to compare it with" in caplog.text


# In a run -------------------------------------------------------------------------------------------------------------


def falls_after_the_start(images, trainer_state):
    return [1.0 if trainer_state.global_step == 0 else 0.0] * len(images)


WATCHED = {
    "eval_dataset": Dataset.from_dict({"prompt": ["a cat", "two dogs", "the sea"]}),
    "eval_reward_fn": falls_after_the_start,
    "eval_strategy": "epoch",
}


def logged_with_steps(trainer, name):
    return [(log["step"], log[name]) for log in trainer.state.log_history if name in log]


def test_a_run_goes_on_without_stop_on_alarm(make_trainer, caplog):
    trainer = make_trainer(**WATCHED)
    caplog.clear()  # its prompts are trained on too
    trainer.train()
    assert trainer.args.eval_on_start is False  # as the user has it, who may build the next config from this one
    assert logged_with_steps(trainer, "eval_alarm") == [(0, 0.0), (2, 1.0), (4, 1.0)]
    assert len(warnings_of_the_package(caplog)) == 2


def test_the_drops_that_raise_an_alarm_are_those_of_the_options(make_trainer):
    def falls_by_four(images, prompts, trainer_state):
        return [len(prompt) - 4.0 * (trainer_state.global_step > 0) for prompt in prompts]  # 2.6 standard deviations

    watched = {**WATCHED, "eval_reward_fn": falls_by_four, "num_rollouts": 1}
    for drop, alarm in ((2.5, 1.0), (2.7, 0.0)):
        trainer = make_trainer(**watched, alarm_control_drop=drop, eval_diversity="pixels", alarm_diversity_drop=0.7)
        trainer.train()
        assert logged_with_steps(trainer, "eval_alarm") == [(0, 0.0), (2, alarm)]
    state = TrainerState(log_history=[FIRST])
    assert not trainer._alarms.check(evaluation(diversity=0.16), state)
    assert trainer._alarms.check(evaluation(diversity=0.14), state)


def test_the_run_ends_with_a_checkpoint_and_can_be_taken_up(make_trainer, tmp_path):
    trainer = make_trainer(num_rollouts=4, stop_on_alarm=True, save_strategy="steps", **WATCHED)
    trainer.train()
    assert trainer.state.global_step == 2
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert checkpoint.is_dir()
    resumed = make_trainer(num_rollouts=4, **WATCHED)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    # Compared with the model before the training, which is not evaluated again.
    assert logged_with_steps(resumed, "eval_alarm") == [(0, 0.0), (2, 1.0), (4, 1.0), (6, 1.0), (8, 1.0)]


def test_the_run_ends_with_a_checkpoint_also_where_only_the_best_are_saved(make_trainer, tmp_path):
    options = {"save_strategy": "best", "metric_for_best_model": "eval_control", **WATCHED}
    options["eval_reward_fn"] = lambda images, trainer_state: [float(trainer_state.global_step < 4)] * len(images)
    trainer = make_trainer(num_rollouts=4, stop_on_alarm=True, **options)
    trainer.train()
    assert logged_with_steps(trainer, "eval_alarm") == [(0, 0.0), (2, 0.0), (4, 1.0)]
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_no_checkpoint_where_none_is_wanted(make_trainer, tmp_path):
    trainer = make_trainer(num_rollouts=4, stop_on_alarm=True, **WATCHED)
    trainer.train()
    assert trainer.state.global_step == 2 and not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_run_that_is_evaluated_inside_a_rollout_ends_with_the_rollout(make_trainer, tmp_path):
    options = {**WATCHED, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    trainer = make_trainer(num_rollouts=4, stop_on_alarm=True, **options)
    trainer.train()
    assert trainer.state.global_step == 2 and (tmp_path / "out" / "checkpoint-2").is_dir()


def test_what_is_watched_first_when_a_run_goes_on_is_compared_with_then(make_trainer):
    plain = {**WATCHED, "eval_reward_fn": None}
    make_trainer(num_rollouts=1, save_strategy="epoch", **plain).train()
    resumed = make_trainer(num_rollouts=2, **WATCHED)
    resumed.train(resume_from_checkpoint=True)
    assert logged_with_steps(resumed, "eval_control") == [(2, 0.0), (4, 0.0)]
    assert [step for step, _ in logged_with_steps(resumed, "eval_reward")] == [2, 2, 4]


def test_the_progress_bar_shows_it(make_trainer, capsys):
    make_trainer(disable_tqdm=False, **WATCHED).train()
    shown = capsys.readouterr().err
    assert "eval_control=0, ALARM=see the log" in shown


def test_nothing_is_watched_without_controls_and_diversity(make_trainer):
    trainer = make_trainer(**{**WATCHED, "eval_reward_fn": None})
    trainer.train()
    assert not logged_with_steps(trainer, "eval_alarm") and [
        step for step, _ in logged_with_steps(trainer, "eval_reward")
    ] == [2, 4]


def test_stop_on_alarm_needs_something_to_watch(make_trainer):
    for options in (
        {**WATCHED, "eval_reward_fn": None},
        {**WATCHED, "alarm_control_drop": None},
        {**WATCHED, "eval_strategy": "no"},
    ):
        with pytest.raises(ValueError, match="stop_on_alarm=True, and no alarm would be raised: it takes"):
            make_trainer(stop_on_alarm=True, **options)


# A planted hack, and an honest run --------------------------------------------------------------------------------------


def flatness(images):
    """Highest for an image of one colour, whatever the prompt says."""
    return -images.flatten(2).std(dim=-1).mean(dim=1)


def shapes_run(folder, reward_fn, **options):
    """Rollouts of the packaged pipeline, evaluated after every fourth one, with the strict check as a control."""
    config = FDFOConfig(
        output_dir=str(folder),
        prompts_per_rollout=54,
        per_device_prompt_batch_size=27,
        num_inference_steps=4,
        timestep_fraction=0.5,
        height=32,
        width=32,
        pipeline_kwargs={"max_sequence_length": 0},
        churn_schedule="prior",
        churn=0.26,
        churn_kwargs={"spread": 0.0},
        epsilon=0.2,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=16,
        eval_diversity="pixels",
        stop_on_alarm=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_images_steps=0,
        **options,
    )
    torch.manual_seed(0)
    trainer = UnplannedTrainer(
        config,
        shapes.load_pipeline(),
        reward_fn,
        train_dataset=Dataset.from_dict({"prompt": shapes.captions()}),
        eval_dataset=Dataset.from_dict({"prompt": shapes.captions()[::2]}),
        eval_reward_fn=shapes.strict,
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_a_reward_that_is_gamed_ends_the_run_within_twelve_rollouts(tmp_path, caplog):
    trainer = shapes_run(
        tmp_path,
        flatness,
        save_strategy="steps",
        save_steps=16,
        num_rollouts=12,
        load_best_model_at_end=True,
        metric_for_best_model="eval_control",
    )
    alarms = logged_with_steps(trainer, "eval_alarm")
    assert trainer.state.global_step == alarms[-1][0] <= 48
    assert [alarm for _, alarm in alarms] == [0.0] * (len(alarms) - 1) + [1.0]
    assert any("while the reward rose from -0.1" in message for message in warnings_of_the_package(caplog))
    rewards = [value for _, value in logged_with_steps(trainer, "eval_reward")]
    assert rewards[-1] > rewards[0] + 0.04
    # What is kept is the checkpoint that the control liked best.
    controls = dict(logged_with_steps(trainer, "eval_control")[1:])
    best = max(controls, key=controls.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_control"] == pytest.approx(controls[best], abs=1e-6)


@pytest.mark.slow
def test_an_honest_run_raises_no_alarm(tmp_path):
    trainer = shapes_run(tmp_path, shapes.reward, num_rollouts=8, save_strategy="no")
    assert [alarm for _, alarm in logged_with_steps(trainer, "eval_alarm")] == [0.0] * 3
    for name in ("eval_reward", "eval_control"):
        values = [value for _, value in logged_with_steps(trainer, name)]
        assert values[-1] > values[0] + 0.05
