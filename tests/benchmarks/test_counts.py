"""The world of benchmarks/counts/: its captions, reward and pipeline; and that the comparison's report has its runs."""

from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.counts import comparison, world
from benchmarks.runs import load


def test_captions_are_unique_and_each_word_is_a_token():
    assert len(set(world.captions())) == 60
    pipeline = world.load_pipeline()
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        for caption in world.captions():
            assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2
            assert tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True).strip() == caption


def test_only_the_right_count_and_colour_are_rewarded():
    captions = world.captions()
    images = world.render(captions * 2, torch.Generator().manual_seed(0))
    assert world.reward(images, captions * 2).tolist() == [1.0] * 120
    # 12 captions have one count, and 2 of them one colour.
    assert not world.reward(images, (captions[12:] + captions[:12]) * 2).any()
    assert not world.reward(
        images, [c for n in range(0, 60, 12) for c in captions[n + 2 : n + 12] + captions[n : n + 2]] * 2
    ).any()
    assert world.reward(images.new_full((1, 3, 32, 32), 0.5), ["one red circle"]).tolist() == [0.0]
    with pytest.raises(ValueError, match="'six red circles' is not a caption"):
        world.reward(images[:1], ["six red circles"])


def painted(*blobs: tuple[slice, slice, str]) -> torch.Tensor:
    image = torch.tensor(world.BACKGROUND).reshape(3, 1, 1).repeat(1, 32, 32)
    for rows, columns, color in blobs:
        image[:, rows, columns] = torch.tensor(world.shapes.COLORS[color]).reshape(3, 1, 1)
    return image[None]


def test_what_counts_as_a_blob():
    first, second = slice(4, 10), slice(20, 26)
    two = painted((first, first, "red"), (second, first, "red"))
    assert world.exact(two, ["two red crosses"]) and not world.exact(two, ["one red circle"])
    speck = painted((first, first, "red"), (slice(20, 22), slice(20, 22), "red"))
    assert world.exact(speck, ["one red circle"])
    other = painted((first, first, "red"), (second, first, "blue"))
    assert not world.exact(other, ["two red crosses"]) and not world.exact(other, ["one red circle"])
    joined = painted((first, first, "red"), (second, first, "red"), (slice(4, 26), slice(6, 8), "red"))
    assert world.exact(joined, ["one red circle"])


def test_components_are_connected_along_edges():
    ring = torch.ones(5, 5, dtype=torch.bool)
    ring[1:4, 1:4] = False
    ring[2, 2] = True
    diagonal = torch.eye(5, dtype=torch.bool)
    numbers = world.label(torch.stack([ring, diagonal]))
    assert len(numbers[0].unique()) == 3 and len(numbers[1].unique()) == 6
    assert ((numbers > 0) == torch.stack([ring, diagonal])).all()


def test_the_pipeline_paints_and_its_vae_keeps_the_count():
    pipeline = world.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    prompts = world.captions()[::6]
    images = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (10, 3, 32, 32) and images.isfinite().all() and images.std() > 0.05
    drawn = world.render(prompts, torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(drawn).latent_dist.mode()).sample
    assert world.reward((decoded / 2 + 0.5).clamp(0, 1), prompts).mean() > 0.8


def test_metrics_by_count():
    prompts = ["one red circle"] * 2 + ["two red circles"] * 2
    images = torch.cat([world.render(prompts[:2], torch.Generator().manual_seed(0))] * 2)
    metrics = world.metrics(images, prompts)
    assert (metrics["exact"], metrics["exact/one"], metrics["exact/two"]) == (0.5, 1.0, 0.0)
    rms = (images[0] - images[1]).square().mean().sqrt().item()
    assert metrics["diversity"] == pytest.approx(rms, rel=1e-4)


@pytest.mark.parametrize("name", comparison.SETTINGS)
def test_every_setting_makes_a_trainer_of_equal_size(name):
    args = comparison.make_trainer(comparison.Run(name, 6e-4, 1), rollouts=1).args
    assert args.prompts_per_rollout * args.num_candidates == comparison.IMAGES
    assert args.steps_per_rollout == 6 and args.learning_rate == 6e-4 and args.num_inference_steps == comparison.STEPS


def test_all_runs_are_scored_on_the_same_images():
    assert len({round(result["reward"][0], 3) for result in load(comparison.RUNS)}) == 1  # before training


def made(run: comparison.Run, reward: list[float], **more) -> dict:
    rollouts = [15 * n for n in range(len(reward))]
    return {"run": asdict(run), "rollouts": rollouts, "reward": reward, "diversity": [0.1], "ties": [0.5], **more}


def test_the_report_has_the_best_learning_rate_and_its_seeds():
    fdfo = [comparison.Run("FDFO", rate, comparison.TUNING_SEED) for rate in comparison.SETTINGS["FDFO"].learning_rates]
    awm = comparison.Run("AWM", 3e-4, comparison.TUNING_SEED)
    results = [made(run, [0.2, end, end]) for run, end in zip(fdfo, (0.3, 0.5, 0.4))]
    results += [made(replace(fdfo[1], seed=seed), [0.2, 0.3 + seed / 100, 0.4]) for seed in comparison.SEEDS]
    results += [made(replace(fdfo[0], seed=1), [0.2, 0.9, 0.9])]  # another learning rate
    ended = {"failed": "WatchdogError: it came apart", "diversity": [], "ties": []}
    results += [made(awm, [0.2, 0.4]), made(replace(awm, seed=1), [0.2], **ended)]
    assert comparison.best(results) == {"FDFO": fdfo[1], "AWM": awm}
    costs = {"machine": "a machine", "seconds_per_rollout": {"FDFO": 2.0, "AWM": 1.0}}
    lines = comparison.report(results, costs).splitlines()
    # The seed in the middle is at 0.25 after 15 x 0.05 / 0.12 rollouts of 2 s.
    row = (
        "| FDFO | 0.0006 | 0.400 (0.400 to 0.400) | 0.100 (0.100 to 0.100) | 0.50 | 2.00 | 6.25 (12 s) | 12.5 (25 s) |"
    )
    assert any(line.startswith(row) for line in lines)
    assert (
        "| AWM | 0.0003 |  |  |  | 1.00 | never | never | never | 90 (90 s) | 1, 1 of them ended by a watchdog |"
        in lines
    )
    assert "| FDFO |  | 0.300, 0.300 | **0.500, 0.500** | 0.400, 0.400 |  |" in lines
