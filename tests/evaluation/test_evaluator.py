import json
import math

import pytest
import torch
from conftest import logged, trained_weights, warnings_of_the_package
from datasets import Dataset
from PIL import Image
from tiny_runs import PROMPTS, redness
from transformers import EarlyStoppingCallback, TrainerState

from trl_fdfo.cli import train
from trl_fdfo.evaluation.evaluator import Evaluation, Evaluator, summarize
from trl_fdfo.media import Media
from trl_fdfo.reporting.curves import evaluation_curves
from trl_fdfo.rewards import PairwiseJudge
from trl_fdfo.rewards.reward_functions import RewardFunctions
from trl_fdfo.seeds import EVALUATION, derive_seed
from trl_fdfo.training.prompts import hold_out


EVALUATED = Dataset.from_dict({"prompt": PROMPTS[:5], "bonus": [1.0, 2.0, 3.0, 4.0, 5.0]})


def bonus(images, bonus):
    return bonus


def greenness(images):
    return images[:, 1].mean(dim=(1, 2))


def figures(metrics):
    return {name: value for name, value in metrics.items() if name not in ("eval_runtime", "epoch")}


def test_videos_with_their_sound_are_sampled_scored_and_compared():
    def sample(prompts, seeds, columns):
        values = torch.tensor(seeds, dtype=torch.float32) / 16
        return Media(values[:, None, None, None, None].expand(-1, 3, 3, 4, 4), -values[:, None, None].expand(-1, 2, 9))

    def both(videos, audio, prompts):
        return videos.mean(dim=(1, 2, 3, 4)) + 10 * audio.mean(dim=(1, 2))

    seen = {}
    distance = lambda images: images.flatten(2).std(dim=1).mean(dim=1)
    evaluator = Evaluator(sample, RewardFunctions(both), diversity=distance, batch_size=2, disable_tqdm=True)
    generated = evaluator.generate(PROMPTS[:3], [1, 2, 3], {})
    assert isinstance(generated, Media) and generated.audio.shape == (3, 2, 9)
    assert generated.images[:, 0, 0, 0, 0].tolist() == [1 / 16, 2 / 16, 3 / 16]
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2]})
    seed_of = lambda number, image: 2 * number + image
    evaluation = evaluator.evaluate(dataset, seed_of, 2, TrainerState(), on_images=seen.__setitem__)
    expected = [[[0.0], [-9 / 16]], [[-18 / 16], [-27 / 16]]]
    assert evaluation.rewards.tolist() == expected and (evaluation.diversity > 0).all()
    assert seen[1].images.shape == (2, 3, 3, 4, 4) and seen[1].audio[:, 0, 0].tolist() == [-2 / 16, -3 / 16]
    both_prompts = Media(*(torch.stack(parts) for parts in zip(*(seen[number] for number in (0, 1)))))
    columns = {"prompt": [prompt for prompt in PROMPTS[:2] for _ in range(2)]}
    assert evaluator.score(both_prompts, columns, TrainerState()).rewards.tolist() == expected
    # Audio alone has no diversity.
    of_sound = Evaluator(lambda *arguments: sample(*arguments).audio, RewardFunctions(lambda audio: audio[:, 0, 0]))
    of_sound.diversity = distance
    assert of_sound.evaluate(dataset, seed_of, 2, TrainerState()).diversity is None


# What is reported -----------------------------------------------------------------------------------------------------


def test_figures_of_known_rewards():
    # Two prompts of two images; NaN where the second reward does not apply.
    nan = math.nan
    evaluation = Evaluation(
        rewards=torch.tensor([[[1.0, 10.0], [3.0, nan]], [[5.0, nan], [7.0, nan]]]),
        controls=torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]),
        diversity=torch.tensor([0.2, 0.6]),
    )
    rewards = RewardFunctions([bonus, redness], weights=[1.0, 0.5])
    metrics = summarize(evaluation, rewards, RewardFunctions(greenness))
    expected = {
        "reward": ((1 + 5 + 3) / 2 + 6) / 2,
        "rewards/bonus/mean": 4.0,
        # Of the means 2 and 6.
        "rewards/bonus/std": 8**0.5,
        "rewards/bonus/se": 2.0,
        # Of one prompt they are not known.
        "rewards/redness/mean": 10.0,
        "rewards/redness/std": nan,
        "rewards/redness/se": nan,
        "control": 4.0,
        "controls/greenness/mean": 4.0,
        "controls/greenness/std": 8**0.5,
        "controls/greenness/se": 2.0,
        "diversity": 0.4,
        "diversity_se": 0.2,
    }
    assert metrics == pytest.approx(expected, nan_ok=True) and list(metrics) == list(expected)


def test_rewards_and_controls_are_reported_side_by_side(make_trainer):
    trainer = make_trainer(eval_dataset=EVALUATED, eval_reward_fn=[greenness, bonus])
    metrics = figures(trainer.evaluate())
    assert metrics.keys() == {
        "eval_reward",
        *(f"eval_rewards/redness/{figure}" for figure in ("mean", "std", "se")),
        "eval_control",
        *(f"eval_controls/{name}/{figure}" for name in ("greenness", "bonus") for figure in ("mean", "std", "se")),
        "eval_alarm",
    }
    assert metrics["eval_reward"] == metrics["eval_rewards/redness/mean"]
    assert metrics["eval_controls/bonus/mean"] == 3.0
    assert metrics["eval_controls/bonus/std"] == pytest.approx(2.5**0.5)
    assert metrics["eval_controls/bonus/se"] == pytest.approx(0.5**0.5)
    assert metrics["eval_control"] == pytest.approx(3 + metrics["eval_controls/greenness/mean"])


def test_a_reward_is_a_control_too_under_a_name_of_its_own(make_trainer):
    metrics = make_trainer(eval_dataset=EVALUATED, eval_reward_fn=redness).evaluate()
    assert metrics["eval_controls/redness/mean"] == metrics["eval_rewards/redness/mean"] == metrics["eval_reward"]


def test_the_images_are_those_of_the_seeds(make_trainer):
    seen = []

    def keep(images, prompts):
        seen.extend(zip(prompts, images.cpu()))
        return [0.0] * len(images)

    trainer = make_trainer(
        eval_dataset=EVALUATED, eval_reward_fn=keep, images_per_eval_prompt=3, eval_diversity="pixels", seed=7
    )
    metrics = trainer.evaluate()
    prompts = [prompt for prompt in PROMPTS[:5] for _ in range(3)]
    assert [prompt for prompt, _ in seen] == prompts
    seeds = [derive_seed(7, n, image, EVALUATION) for n in range(5) for image in range(3)]
    expected = trainer.generate(prompts, seeds)
    images = torch.stack([image for _, image in seen])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert metrics["eval_reward"] == pytest.approx(redness(images, prompts).mean().item(), abs=1e-6)
    # The three pairs of three images of a prompt.
    a, b, c = images.unflatten(0, (5, 3)).unbind(dim=1)
    distances = [(x - y).square().flatten(1).mean(dim=1).sqrt() for x, y in ((a, b), (a, c), (b, c))]
    per_prompt = torch.stack(distances).mean(dim=0)
    assert metrics["eval_diversity"] == pytest.approx(per_prompt.mean().item(), abs=1e-6)
    assert metrics["eval_diversity_se"] == pytest.approx(per_prompt.std().item() / 5**0.5, abs=1e-6)


def test_seeds_are_used_nowhere_else():
    numbers = range(8)
    evaluation = {derive_seed(0, n, image, EVALUATION) for n in numbers for image in numbers}
    training = {derive_seed(0, rollout, n, stream) for rollout in numbers for n in numbers for stream in (0, 1)}
    assert len(evaluation) == 64 and not evaluation & training


@pytest.mark.parametrize("options", [{}, {"eval_diversity": "pixels"}, {"eval_diversity": "clip", "images": 5}])
def test_images_per_prompt(make_config, options):
    images = options.pop("images", None)
    config = make_config(images_per_eval_prompt=images, **options)
    # As cheap as it was, where nothing needs several images.
    assert config.images_per_eval_prompt == (images or (4 if options else 1))


def test_it_is_evaluated_as_often_as_it_is_saved(make_config):
    assert make_config().eval_steps == 20
    assert make_config(save_steps=4).eval_steps == 4
    assert make_config(save_steps=4, eval_steps=2).eval_steps == 2


def test_the_batch_does_not_change_the_figures(make_trainer):
    options = {
        "eval_dataset": EVALUATED,
        "eval_reward_fn": greenness,
        "eval_diversity": "pixels",
        "images_per_eval_prompt": 3,
    }
    one, two, three = (
        figures(make_trainer(per_device_prompt_batch_size=size, prompts_per_rollout=12, **options).evaluate())
        for size in (1, 2, 6)
    )
    assert one == pytest.approx(two, abs=1e-6) and one == pytest.approx(three, abs=1e-6)


def test_a_judge_has_nothing_to_compare(make_trainer):
    judge = PairwiseJudge(lambda first, second, prompts: [1.0] * len(prompts))
    options = {"reward_fn": judge, "eval_dataset": EVALUATED, "eval_strategy": "epoch", "images_per_eval_prompt": 2}
    assert math.isnan(make_trainer(**options).evaluate()["eval_reward"])
    with pytest.raises(
        ValueError, match="nothing to compare. Give an eval_reward_fn, and metric_for_best_model='eval_co"
    ):
        make_trainer(metric_for_best_model="eval_reward", **options)
    make_trainer(metric_for_best_model="eval_control", eval_reward_fn=greenness, **options)


# In a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_run_with_evaluations_ends_in_the_same_bits(make_trainer, ema_decay):
    plain = make_trainer(ema_decay=ema_decay)
    plain.train()
    evaluated = make_trainer(
        ema_decay=ema_decay,
        eval_dataset=EVALUATED,
        eval_reward_fn=[greenness, bonus],
        eval_diversity="pixels",
        eval_strategy="steps",
        eval_steps=1,
    )
    evaluated.train()
    assert len(logged(evaluated, "eval_diversity")) == 5
    assert not any("eval_reward" in log and "reward" in log for log in evaluated.state.log_history)
    expected = trained_weights(plain)
    for name, weight in trained_weights(evaluated).items():
        assert torch.equal(weight, expected[name]), name
    assert [log["loss"] for log in plain.state.log_history if "loss" in log] == logged(evaluated, "loss")


def test_the_same_weights_have_the_same_figures(make_trainer):
    trainer = make_trainer(eval_dataset=EVALUATED, eval_reward_fn=greenness, eval_diversity="pixels")
    assert figures(trainer.evaluate()) == figures(trainer.evaluate())


def test_evaluation_at_the_start_is_of_the_base_model(make_trainer):
    options = {"eval_dataset": EVALUATED, "eval_reward_fn": greenness}
    base = figures(make_trainer(**options).evaluate())
    trainer = make_trainer(eval_strategy="epoch", learning_rate=1e-2, **options)
    trainer.train()
    first, *_, last = (log for log in trainer.state.log_history if "eval_reward" in log)
    assert {name: first[name] for name in base} == base and first["step"] == 0
    assert last["eval_reward"] != base["eval_reward"]


def worse_and_worse(images, trainer_state):
    # Not in the first evaluation, which is of the model before training and no candidate.
    return [-float(trainer_state.global_step)] * len(images)


@pytest.mark.parametrize(
    "metric",
    [
        *("reward", "eval_reward", "eval_rewards/redness/mean", "eval_control", "eval_controls/worse_and_worse/mean"),
        "eval_diversity",
    ],
)
def test_every_figure_can_choose_the_best_checkpoint(make_trainer, metric):
    trainer = make_trainer(
        num_rollouts=3,
        learning_rate=1e-2,
        eval_dataset=EVALUATED,
        eval_reward_fn=worse_and_worse,
        eval_diversity="pixels",
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    trainer.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = {log["step"]: log[name] for log in trainer.state.log_history if name in log and log["step"]}
    best = max(values, key=values.get)
    assert len(values) == 3 and ("control" not in metric or best == 2)
    assert trainer.state.best_metric == values[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    if "control" not in metric:  # which does not look at the images
        assert trainer.evaluate()[name] == pytest.approx(values[best], abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("eval_control", {}),
        ("eval_diversity", {}),
        ("eval_rewards/greenness/mean", {"eval_reward_fn": greenness}),
        ("eval_controls/redness/mean", {"eval_reward_fn": greenness}),
    ],
)
def test_a_figure_that_no_evaluation_gives_is_refused(make_trainer, metric, options):
    with pytest.raises(
        ValueError, match=f"metric_for_best_model='{metric}' is none of what `evaluate` gives here: eval_reward, "
    ):
        make_trainer(eval_dataset=EVALUATED, eval_strategy="epoch", metric_for_best_model=metric, **options)


def test_early_stopping_by_a_control(make_trainer):
    trainer = make_trainer(
        num_rollouts=6,
        eval_dataset=EVALUATED,
        eval_reward_fn=worse_and_worse,
        alarm_control_drop=None,
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="eval_control",
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")


# Prompts that are held out --------------------------------------------------------------------------------------------


def test_held_out_prompts_are_evaluated_and_not_trained_on(make_trainer):
    seen = {"training": set(), "evaluation": set()}

    def remember(images, prompts, num_generations):
        seen["training" if num_generations == 2 else "evaluation"] |= set(prompts)
        return redness(images, prompts)

    trainer = make_trainer(reward_fn=remember, num_eval_prompts=2, num_rollouts=2, eval_strategy="epoch")
    trainer.train()
    assert len(seen["evaluation"]) == 2 and len(seen["training"]) == 4
    assert seen["evaluation"] | seen["training"] == set(PROMPTS)
    assert seen["evaluation"] == set(trainer.eval_dataset["prompt"])


def test_the_same_prompts_are_held_out_in_every_run(make_trainer):
    held_out = [make_trainer(num_eval_prompts=2, seed=seed).eval_dataset["prompt"] for seed in (0, 1)]
    assert held_out[0] == held_out[1]
    assert set(held_out[0]) < set(make_trainer(num_eval_prompts=4).eval_dataset["prompt"])


def test_a_prompt_that_is_there_twice_is_held_out_twice():
    prompts = [f"prompt {number % 10}" for number in range(40)]
    dataset = Dataset.from_dict({"prompt": prompts, "row": list(range(40))})
    trained, evaluated = hold_out(dataset, "prompt", 5)
    assert len(evaluated) == 5 and len(trained) == 40 - 4 * len(set(evaluated["prompt"]))
    assert not set(trained["prompt"]) & set(evaluated["prompt"])
    assert all(prompts[row] == prompt for row, prompt in zip(trained["row"], trained["prompt"]))


def test_other_held_out_prompts_are_another_run(make_trainer):
    make_trainer(num_eval_prompts=2, num_rollouts=1, save_strategy="epoch").train()
    with pytest.raises(ValueError, match=r"is from another run: .*num_eval_prompts: 2 -> 3"):
        make_trainer(num_eval_prompts=3).train(resume_from_checkpoint=True)
    resumed = make_trainer(num_eval_prompts=2, eval_diversity="pixels", eval_strategy="epoch")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


# Other steps, guidance and size than those of the rollouts --------------------------------------------------------------

OF_USE = {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 32, "width": 32}


def test_images_are_evaluated_as_they_are_used(make_trainer, tmp_path):
    seen = {}

    def keep(images, prompts, trainer_state):
        seen.setdefault(trainer_state.global_step, []).extend(images.cpu())
        return redness(images, prompts)

    options = {"eval_dataset": EVALUATED, "num_rollouts": 1}
    trainer = make_trainer(reward_fn=keep, eval_pipeline_kwargs=json.dumps(OF_USE), **options)
    trainer.train()
    assert {image.shape[-1] for image in seen[0]} == {16}, "rollouts are of the option's size"
    metrics = trainer.evaluate()
    by_hand = []
    for number, prompt in enumerate(PROMPTS[:5]):
        seed = derive_seed(trainer.args.seed, number, 0, EVALUATION)
        arguments = {**trainer.flow.call_kwargs, **OF_USE, "generator": torch.Generator().manual_seed(seed)}
        by_hand += trainer.pipeline(prompt, output_type="pt", **arguments).images
    torch.testing.assert_close(torch.stack(seen[2]), torch.stack(by_hand), rtol=0, atol=1e-5)
    assert metrics["eval_reward"] == pytest.approx(redness(torch.stack(by_hand), None).mean().item(), abs=1e-5)
    # Given arguments come before those of the option.
    assert trainer.generate(["a cat"], [0]).shape[-2:] == (32, 32)
    assert trainer.generate(["a cat"], [0], height=24, width=16).shape[-2:] == (24, 16)
    # Rollouts and updates are those of a run without the option.
    plain = make_trainer(**options)
    plain.train()
    weights = trained_weights(trainer)
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(plain).items())


def test_a_result_says_how_it_is_used(make_trainer, tmp_path):
    trainer = make_trainer(eval_pipeline_kwargs={**OF_USE, "guidance_scale": None})
    trainer.comparison = trainer.compare(num_prompts=1, images_per_prompt=1)
    trainer.comparison.complete()
    assert trainer.comparison.images["after"].shape[-2:] == (32, 32)
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    # None leaves an argument to the pipeline.
    assert saved == {"max_sequence_length": 8, "num_inference_steps": 6, "height": 32, "width": 32}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained with `num_inference_steps=4`, `guidance_scale=1.0`, `height=16`, `width=16`, `max_sequence" in card
    used = "above, with `num_inference_steps=6`, `height=32`, `width=32`: other settings may give less."
    assert f"`max_sequence_length=8`; its results and images are made, as {used}" in card
    snippet = card[card.index("```python") : card.index("## Results")]
    assert (
        "num_inference_steps=6" in snippet
        and "height=32" in snippet
        and "guidance" not in snippet.partition("\n```")[0]
    )


def test_a_run_that_goes_on_is_evaluated_as_before_or_otherwise(make_trainer, tmp_path):
    options = {
        "eval_dataset": EVALUATED,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "alarm_control_drop": None,
    }
    few, many = {"num_inference_steps": 2}, {"num_inference_steps": 6}
    whole = make_trainer(eval_pipeline_kwargs=many, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    make_trainer(num_rollouts=1, eval_pipeline_kwargs=many, **options).train()
    same = make_trainer(eval_pipeline_kwargs=many, **options)
    same.train(resume_from_checkpoint=True)
    assert logged(same, "eval_reward") == logged(whole, "eval_reward") and len(logged(same, "eval_reward")) == 2
    # It changes nothing about the weights, so a run may go on with other arguments.
    other = make_trainer(eval_pipeline_kwargs=few, **options)
    other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    first, second = logged(other, "eval_reward")
    assert first == logged(whole, "eval_reward")[0] and second != logged(whole, "eval_reward")[1]
    weights = trained_weights(whole)
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(other).items())


# Diversity ------------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_there_are_missed_before_the_run(make_trainer):
    message = (
        r"(?s)eval_diversity='clip' does not work here \(OSError: Cannot load .*get them first.*'pixels' needs neither"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(eval_dataset=EVALUATED, eval_strategy="epoch", eval_diversity="clip")
    # Nothing is loaded where nothing is evaluated.
    trainer = make_trainer(eval_dataset=EVALUATED, eval_diversity="clip")
    trainer.train()
    with pytest.raises(ValueError, match=message):
        trainer.evaluate()


# What is left to look at ------------------------------------------------------------------------------------------------


HISTORY = [
    {"epoch": 0, "eval_reward": 0.1, "eval_controls/a/mean": 1.0, "eval_controls/a/se": 0.1, "step": 0},
    {"epoch": 1.0, "reward": 0.2, "step": 2},
    {"epoch": 1.0, "eval_reward": 0.3, "eval_controls/a/mean": 0.5, "eval_controls/a/se": 0.1, "eval_alarm": 1.0},
]


@pytest.mark.parametrize("with_diversity", [False, True])
def test_curves(tmp_path, with_diversity):
    diversity = {"eval_diversity": 0.1, "eval_diversity_se": 0.01} if with_diversity else {}
    evaluation_curves([{**log, **diversity} for log in HISTORY], tmp_path / "curves.png")
    image = Image.open(tmp_path / "curves.png")
    assert image.width == 900 and image.height == round((0.6 + 1.7 * (2 + with_diversity)) * 150)
    # The line of the alarm.
    red = torch.tensor([0xD6, 0x27, 0x28])
    pixels = torch.tensor(list(image.convert("RGB").getdata()))
    assert ((pixels - red).abs().sum(dim=1) < 30).sum() > 100


def test_a_run_leaves_its_curves(make_trainer, tmp_path):
    trainer = make_trainer(eval_dataset=EVALUATED, eval_reward_fn=greenness, eval_strategy="epoch")
    trainer.train()
    trainer.create_model_card()
    assert Image.open(tmp_path / "out" / "evaluation.png").width == 900
    assert "](evaluation.png)" in (tmp_path / "out" / "README.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_control" in line] == [0, 2, 4]


def test_the_script(tmp_path, caplog):
    options = {
        "output_dir": tmp_path / "out",
        "num_rollouts": 1,
        "prompts_per_rollout": 12,
        "per_device_prompt_batch_size": 4,
        "eval_strategy": "epoch",
        "num_eval_prompts": 9,
        "eval_diversity": "pixels",
        "images_per_eval_prompt": 2,
        "eval_reward": "trl_fdfo.shapes:strict",
        "num_report_prompts": 2,
        "images_per_report_prompt": 2,
        "eval_pipeline_kwargs": '{"num_inference_steps": 5}',
        "save_strategy": "epoch",
        "load_best_model_at_end": "true",
        "metric_for_best_model": "control",
    }
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    train.main(["--config", "shapes", *arguments])
    assert (tmp_path / "out" / "evaluation.png").is_file()
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"reward", "controls/strict/mean"} <= report["after"].keys()
    assert report["best_rollout"] == [1, "eval_control"]
    assert report["call_options"]["num_inference_steps"] == 5 and report["call_options"]["height"] == 32
    assert not warnings_of_the_package(caplog)
