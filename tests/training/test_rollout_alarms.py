import math
from types import SimpleNamespace

import pytest
import torch
from conftest import logged, warnings_of_the_package
from forward_runs import make_forward  # noqa: F401
from tiny_pipelines import wan_video
from transformers import TrainerControl, TrainerState

import trl_fdfo
from trl_fdfo.cli.algorithms import ALGORITHMS
from trl_fdfo.media import Media
from trl_fdfo.training.rollout_alarms import (
    PROMPT_DISTANCE,
    SIGNS,
    VELOCITY,
    WINDOW,
    RolloutAlarms,
    Sign,
    image_traits,
    is_raised,
    raised_at,
    signs,
    traits,
)


# The metrics ----------------------------------------------------------------------------------------------------------


def of_color(*color, size=16):
    return torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, size, size)


def measured(images):
    """High frequency, saturation and contrast of an image."""
    return pytest.approx(image_traits(images)[0, :3].tolist(), abs=1e-6)


def test_flat_gray_has_none_of_it():
    assert measured(of_color(0.3, 0.3, 0.3)) == [0.0, 0.0, 0.0]


def test_pure_red_is_saturated_and_flat():
    assert measured(of_color(1.0, 0.0, 0.0)) == [0.0, 1.0, 0.0]


def test_a_checkerboard_is_all_high_frequency():
    rows = torch.arange(16)
    board = ((rows[:, None] + rows) % 2).float().expand(1, 3, -1, -1)
    assert measured(board) == [0.5, 0.0, 0.5]
    # Fields of two pixels are coarser than what is measured, and a last row or column without a partner is left out.
    coarse = board.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    assert measured(coarse) == [0.0, 0.0, 0.5]
    assert measured(board[..., :15, :]) == [0.5, 0.0, 0.5]


def batch(images, prompts, velocity_rms=1.0):
    """As `PipelineFlow.rollout` returns it, with 2 samples of each prompt."""
    return SimpleNamespace(
        images=images, endpoints=torch.zeros(prompts, 2, 4), velocity_rms=torch.full([2 * prompts], velocity_rms)
    )


def test_prompts_that_look_alike_have_no_distance():
    noise = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert signs(traits(batch(noise[:1].expand(8, -1, -1, -1), 4)))[PROMPT_DISTANCE] < 1e-6
    assert signs(traits(batch(noise, 4)))[PROMPT_DISTANCE] > 0.01
    # Two prompts are black, two are white: all are 0.5 from the mean.
    half = torch.cat([torch.zeros(4, 3, 16, 16), torch.ones(4, 3, 16, 16)])
    assert signs(traits(batch(half, 4)))[PROMPT_DISTANCE] == 0.5
    # Each prompt has a black image and a white one: their means are alike.
    assert signs(traits(batch(half.view(2, 4, 3, 16, 16).transpose(0, 1).flatten(0, 1), 4)))[PROMPT_DISTANCE] == 0


def test_a_video_is_the_mean_of_its_frames_and_sound_has_a_velocity_alone():
    images = torch.rand(8, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    expected = signs(traits(batch(images, 4, 0.7)))
    assert expected.keys() == {sign.metric for sign in SIGNS} and expected[VELOCITY].item() == pytest.approx(0.7)
    videos = images[:, None].expand(-1, 9, -1, -1, -1)
    sound = torch.zeros(8, 1, 100)
    for made in (videos, Media(videos, sound)):
        for name, value in signs(traits(batch(made, 4, 0.7))).items():
            assert value.item() == pytest.approx(expected[name].item(), abs=1e-6)
    assert signs(traits(batch(sound, 4, 0.7))).keys() == {VELOCITY}


def test_the_velocity_is_of_all_steps_and_samples(make_trainer):
    # The sampler's steps are all recorded, and its levels are trained one after the other.
    trainer = make_trainer(num_rollouts=1, timestep_fraction=1.0, per_device_sampling_batch_size=4)
    trainer.train()
    batches = {id(unit.batch): unit.batch for unit in (trainer._buffer[n] for n in range(8))}.values()
    assert len(batches) == 2
    rms = [torch.stack(list(each.sampled.velocities.values())).square().mean(dim=(0, 2, 3, 4)) for each in batches]
    assert torch.stack(rms).sqrt().mean() == pytest.approx(logged(trainer, VELOCITY)[0], rel=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS.values())
def test_each_algorithm_logs_all_signs_of_a_rollout(make_forward, name):  # noqa: F811
    trainer = make_forward(
        getattr(trl_fdfo, name), num_inference_steps=2, optimizer_steps_per_rollout=1, num_rollouts=1
    )
    trainer.train()
    for sign in SIGNS:
        assert logged(trainer, sign.metric)[0] > 0, sign.metric


def test_a_run_of_videos_logs_all_signs(make_trainer):
    brightness = lambda images: images.mean(dim=(1, 2, 3, 4))
    options = {"num_inference_steps": 2, "num_rollouts": 1, "prompts_per_rollout": 2, "optimizer_steps_per_rollout": 1}
    call = {name: value for name, value in wan_video.VIDEO.items() if name not in ("height", "width")}
    trainer = make_trainer(wan_video.small_text_to_video(), brightness, pipeline_kwargs=call, **options)
    trainer.train()
    for sign in SIGNS:
        assert logged(trainer, sign.metric)[0] > 0, sign.metric


# The alarms -----------------------------------------------------------------------------------------------------------

RISE, FALL = Sign("noise", 0.5, "it is noise"), Sign("spread", -0.5, "it is one image")
FIRST = [0.9, 1.0, 1.1, 1.0, 1.0]


@pytest.mark.parametrize(
    ("sign", "last", "expected"),
    [
        (RISE, [1.6] * 5, True),
        (RISE, [1.4] * 5, False),
        (RISE, [0.1] * 5, False),
        (FALL, [0.4] * 5, True),
        (FALL, [0.6] * 5, False),
        (FALL, [2.0] * 5, False),
        # The same mean, with an error of 0.35: as likely by chance.
        (RISE, [0.8, 2.4, 0.8, 2.4, 1.6], False),
        (RISE, [math.nan] * 5, False),
        (RISE, [1.6, 1.6, 1.6, 1.6, math.nan], False),
    ],
)
def test_a_move_counts_where_it_is_relevant_and_more_than_chance(sign, last, expected):
    assert is_raised(sign, FIRST, last) is expected


def test_nothing_is_compared_with_a_first_value_of_zero_and_itself():
    assert not is_raised(FALL, [0.0] * 5, [0.0] * 5)  # one prompt has no distance
    assert raised_at(RISE, [1.0] * 5 + [9.0] * 4) is None
    assert raised_at(RISE, [1.0] * 5 + [9.0] * 9) == 10
    assert raised_at(RISE, [1.0] * 100) is None


@pytest.fixture
def replay():
    """Give the alarms a run's logs one after the other, from the first that a checkpoint does not have."""

    def replay(logs, of_checkpoint=0):
        alarms, args = RolloutAlarms(), SimpleNamespace(steps_per_rollout=2, smaller_updates="a larger beta")
        state = TrainerState(log_history=logs[:of_checkpoint])
        alarms.on_train_begin(args, state, TrainerControl())
        for log in logs[of_checkpoint:]:
            state.log_history.append(log)
            state.global_step += 2
            alarms.on_log(args, state, TrainerControl(), logs=log)

    return replay


def history(rollouts, fall_at):
    """Logs of rollouts and, between them, of evaluations."""
    logs = []
    for rollout in range(rollouts):
        logs += [{PROMPT_DISTANCE: 0.4 if rollout < fall_at else 0.1, "reward": 1.0}, {"eval_reward": 1.0}]
    return logs


def test_an_alarm_has_values_meaning_and_advice_and_comes_once(replay, caplog):
    replay(history(20, fall_at=6))
    (message,) = warnings_of_the_package(caplog)
    assert f"prompt_distance fell from 0.4 (mean of the first {WINDOW} logs) to 0.16 (of the last {WINDOW})" in message
    assert (
        "images of all prompts become alike" in message and "earlier checkpoint with a larger beta, or add" in message
    )


def test_a_resumed_run_compares_with_the_first_logs_and_repeats_nothing(replay, caplog):
    logs = history(20, fall_at=6)
    replay(logs, of_checkpoint=14)
    (message,) = warnings_of_the_package(caplog)
    assert "fell from 0.4" in message
    caplog.clear()
    replay(logs, of_checkpoint=30)
    assert not warnings_of_the_package(caplog)


# In a run -------------------------------------------------------------------------------------------------------------


def flatness(images):
    """Highest for an image of one colour, whatever the prompt says."""
    return -images.flatten(2).std(dim=-1).mean(dim=1)


def raised(caplog) -> list[str]:
    return [message for message in warnings_of_the_package(caplog) if message.startswith("Alarm after rollout")]


# Each rollout moves the whole transformer as far as it can, not an adapter.
HACKED = {"num_inference_steps": 2, "churn": 0.5, "use_peft": False, "learning_rate": 1e-2, "epsilon": 1.0}
HACKED |= {"per_device_prompt_batch_size": 4}


def test_a_hacked_reward_raises_alarms_and_a_resumed_run_raises_the_same(make_trainer, tmp_path, caplog):
    options = {"reward_fn": flatness, "save_strategy": "steps", "save_steps": 12, **HACKED}
    whole = make_trainer(num_rollouts=10, **options)
    whole.train()
    alarms = raised(caplog)
    assert any("prompt_distance fell" in message for message in alarms)
    caplog.clear()
    resumed = make_trainer(num_rollouts=10, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-12"))
    assert raised(caplog) == alarms
    for sign in SIGNS:
        assert logged(resumed, sign.metric) == logged(whole, sign.metric)


def test_an_honest_run_raises_none(make_trainer, caplog):
    trainer = make_trainer(num_rollouts=10, num_inference_steps=2, churn=0.5, per_device_prompt_batch_size=4)
    trainer.train()
    assert len(logged(trainer, VELOCITY)) == 10 and not warnings_of_the_package(caplog)
