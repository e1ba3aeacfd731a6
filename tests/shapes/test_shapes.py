import pytest
import torch

from trl_fdfo import shapes


CAPTIONS = shapes.captions()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def truth():
    """Rendered ground truth, four images of every caption: prompts, images [216, 3, 32, 32]."""
    prompts = CAPTIONS * 4
    return prompts, shapes.render(prompts, generator())


def replace_word(prompts, names):
    """Each caption with its word among `names` replaced by the next one."""
    names = list(names)
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    return [" ".join(following.get(word, word) for word in prompt.split()) for prompt in prompts]


def test_captions_are_all_combinations():
    assert len(CAPTIONS) == len(set(CAPTIONS)) == 54
    assert CAPTIONS[0] == "a red circle on a white background"


def test_unknown_caption_is_refused():
    with pytest.raises(ValueError, match="'a red dog on a white background' is not a caption"):
        shapes.reward(torch.zeros(1, 3, 32, 32), ["a red dog on a white background"])


def test_rendering_is_reproducible_and_varied():
    images = shapes.render(CAPTIONS, generator(1))
    assert images.shape == (54, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, shapes.render(CAPTIONS, generator(1)))
    assert not torch.equal(images, shapes.render(CAPTIONS, generator(2)))


@pytest.mark.parametrize("size", shapes.SIZE_RANGE)
def test_shapes_of_one_size_have_that_size(size):
    masks = shapes.coverage(torch.tensor([16.0, 16.0]), torch.tensor(size))
    centers, sizes = shapes.moments(masks)
    torch.testing.assert_close(sizes, torch.full((3,), size), atol=0.1, rtol=0)
    torch.testing.assert_close(centers, torch.full((3, 2), 16.0), atol=0.1, rtol=0)


def test_ground_truth_is_right(truth):
    prompts, images = truth
    rewards = shapes.reward(images, prompts)
    assert rewards.shape == (216,) and rewards.min() > 0.85 and rewards.max() <= 1
    assert shapes.strict(images, prompts).all()


@pytest.mark.parametrize("names", [shapes.COLORS, shapes.SHAPES, shapes.BACKGROUNDS])
def test_wrong_attribute_lowers_reward_and_fails_strict(truth, names):
    prompts, images = truth
    wrong = replace_word(prompts, names)
    assert (shapes.reward(images, wrong) < shapes.reward(images, prompts) - 0.03).all()
    assert not shapes.strict(images, wrong).any()


def test_reward_rises_towards_the_right_color():
    """A path from green to red: the reward rises at every step, also while green is still the nearest colour."""
    prompt = "a green triangle on a white background"
    image = shapes.render([prompt], generator())
    center, size = shapes.moments(shapes.find_mask(image))
    mask = shapes.coverage(center, size)[:, 2, None]
    red, green = (torch.tensor(shapes.COLORS[name])[:, None, None] for name in ("red", "green"))
    images = torch.cat([mask * torch.lerp(green, red, step / 10) + (1 - mask) for step in range(11)])
    rewards = shapes.reward(images, ["a red triangle on a white background"] * 11)
    assert (rewards.diff() > 0.005).all()


def test_reward_rises_towards_the_right_shape():
    """A cross that fills up to a circle, whatever its colour."""
    circle, cross, _ = shapes.coverage(torch.tensor([16.0, 16.0]), torch.tensor(14.0))
    blue = torch.tensor(shapes.COLORS["blue"])[:, None, None]
    masks = [torch.lerp(cross, circle, step / 10) for step in (0, 3, 5, 7, 10)]
    rewards = shapes.reward(
        torch.stack([mask * blue + (1 - mask) for mask in masks]), ["a red circle on a white background"] * 5
    )
    assert rewards[-1] > rewards[0] + 0.1
    assert (rewards.diff() > -0.01).all()


def test_reward_ignores_the_order_of_the_batch(truth):
    prompts, images = truth
    order = torch.randperm(len(prompts), generator=generator())
    shuffled = shapes.reward(images[order], [prompts[i] for i in order])
    torch.testing.assert_close(shuffled, shapes.reward(images, prompts)[order])


def test_empty_and_noisy_images_fail():
    images = torch.cat([torch.rand(54, 3, 32, 32, generator=generator()), torch.full((54, 3, 32, 32), 0.5)])
    assert (shapes.reward(images, CAPTIONS * 2) < 0.5).all()
    assert not shapes.strict(images, CAPTIONS * 2).any()


def test_metrics_of_ground_truth(truth):
    prompts, images = truth
    metrics = shapes.metrics(images, prompts)
    accuracies = [value for name, value in metrics.items() if name.startswith("strict_accuracy")]
    assert len(accuracies) == 1 + 6 + 3 + 3 and set(accuracies) == {1.0}
    # Sizes are uniform, so their deviation is known.
    low, high = shapes.SIZE_RANGE
    assert metrics["diversity/size"] == pytest.approx((high - low) / 12**0.5, abs=0.2)
    order = torch.randperm(len(prompts), generator=generator())
    assert shapes.metrics(images[order], [prompts[i] for i in order]) == pytest.approx(metrics, abs=1e-5)


def test_identical_images_have_no_diversity(truth):
    prompts, images = truth
    metrics = shapes.metrics(images[:54].repeat(3, 1, 1, 1), prompts[:54] * 3)
    for name in ("position", "size", "mask", "pixels"):
        assert metrics[f"diversity/{name}"] == pytest.approx(0, abs=1e-4)


def test_garbage_does_not_count_as_diversity(truth):
    prompts, images = truth
    garbage = torch.rand(54, 3, 32, 32, generator=generator())
    clean, mixed = shapes.metrics(images, prompts), shapes.metrics(torch.cat([images, garbage]), prompts + CAPTIONS)
    assert mixed["strict_accuracy"] == pytest.approx(0.8)
    for name in ("position", "size", "mask", "pixels"):
        assert mixed[f"diversity/{name}"] == pytest.approx(clean[f"diversity/{name}"], abs=1e-5)


def test_packaged_pipeline_leaves_room_to_improve():
    pipeline = shapes.load_pipeline(local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.dtype == torch.float32
    prompts = CAPTIONS * 8
    images = pipeline(
        prompts,
        num_inference_steps=8,
        guidance_scale=1.0,
        max_sequence_length=0,
        generator=generator(),
        output_type="pt",
    ).images
    assert images.shape == (432, 3, 32, 32)
    assert 0.15 < shapes.metrics(images, prompts)["strict_accuracy"] < 0.36
