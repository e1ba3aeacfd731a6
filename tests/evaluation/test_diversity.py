"""Distances of images of a prompt, by features with known answers and by a tiny CLIP."""

import sys
import types

import numpy as np
import pytest
import torch
from tiny_clip import save_clip
from torch import nn

from trl_fdfo.evaluation.diversity import (
    CLIPFeatures,
    Diversity,
    cosine_distance,
    load_diversity,
    mean_pairwise_distance,
    rms_distance,
)
from trl_fdfo.media import to_pil
from trl_fdfo.rewards.clip import CLIPReward


@pytest.fixture
def clip_folder(tmp_path):
    save_clip(tmp_path / "clip")
    return str(tmp_path / "clip")


def images_of(prompts: int, images: int, *shape: int) -> torch.Tensor:
    return torch.rand(prompts, images, *(shape or (3, 40, 40)), generator=torch.Generator().manual_seed(0))


def colours(images):
    """One feature for each channel."""
    return images.mean(dim=(2, 3))


def test_cosine_distance():
    x, y = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])
    pairs = [(x, y), (x, 7 * x), (x, -y), (x, -x), (x, x + x.norm() * y / y.norm())]
    a, b = (torch.stack(vectors) for vectors in zip(*pairs))
    assert cosine_distance(a, b).tolist() == pytest.approx([1, 0, 1, 2, 1 - 0.5**0.5])
    # 1 - cos itself would lose these in rounding.
    nearly = torch.tensor([1.0, 1e-4, 0.0])
    assert cosine_distance(x, nearly).item() == pytest.approx(5e-9, rel=1e-3)
    vector = images_of(1, 1)[0, 0].flatten()
    assert cosine_distance(vector, vector).item() == 0


def test_mean_over_the_pairs_of_each_prompt():
    identical = torch.eye(3)[[0, 0, 0]]
    orthogonal = torch.eye(3)
    two_of_three_pairs = torch.eye(3)[[0, 1, 0]]
    features = torch.stack([identical, orthogonal, two_of_three_pairs])
    assert mean_pairwise_distance(features).tolist() == pytest.approx([0, 1, 2 / 3])
    assert mean_pairwise_distance(features, rms_distance).tolist() == pytest.approx([0, (2 / 3) ** 0.5, (2 / 3) ** 1.5])


def test_pixels():
    diversity = load_diversity("pixels")
    assert diversity.__name__ == "pixel_distance"
    images = torch.zeros(2, 3, 3, 4, 4)
    assert diversity(images).tolist() == [0, 0]
    images[0, 0] = 1.0  # two of the three pairs of the first prompt differ by 1, of the second none does
    assert diversity(images).tolist() == pytest.approx([2 / 3, 0])
    images = images_of(2, 3)
    x = images.numpy()
    pairs = [np.sqrt(((x[1, a] - x[1, b]) ** 2).mean()) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert diversity(images)[1].item() == pytest.approx(np.mean(pairs), rel=1e-5)
    assert diversity(images.half()).dtype == torch.float32


@pytest.mark.parametrize("name", ["pixels", "clip"])
def test_order_does_not_matter_and_prompts_do_not_mix(name, clip_folder):
    diversity = load_diversity(f"clip(model={clip_folder!r})" if name == "clip" else name)
    images = images_of(3, 4)
    values = diversity(images)
    assert values.shape == (3,) and (values > 0).all()
    assert torch.allclose(diversity(images[:, [2, 0, 3, 1]]), values, rtol=1e-5)
    assert torch.allclose(diversity(images[[2, 0, 1]]), values[[2, 0, 1]], rtol=1e-5)
    assert torch.allclose(diversity(images[1:2]), values[1:2], rtol=1e-5)


def test_clip(clip_folder):
    diversity = load_diversity(f"clip(model={clip_folder!r}, batch_size=4)")
    assert diversity.__name__ == "clip_distance"
    assert "_clip" not in vars(diversity.features), "weights are loaded when images come"
    images = images_of(2, 3, 3, 48, 32)
    embeddings = CLIPReward(clip_folder).embed_images(to_pil(images.flatten(0, 1))).unflatten(0, (2, 3))
    cosines = embeddings @ embeddings.mT
    expected = [1 - (c[0, 1] + c[0, 2] + c[1, 2]).item() / 3 for c in cosines]
    assert diversity(images).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    same = images[:, :1].expand(-1, 3, -1, -1, -1)
    assert diversity(same).abs().max() < 1e-6
    offloaded = Diversity(CLIPFeatures(clip_folder, offload=True))
    assert torch.allclose(offloaded(images), diversity(images), rtol=1e-4)


def test_features_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "def mean_colour(images):\n    return images.mean(dim=(2, 3))\n\n\n"
        "class Scaled:\n    def __init__(self, scale=1.0):\n        self.scale = scale\n\n"
        "    def __call__(self, images):\n        return self.scale * images.mean(dim=(2, 3))\n\n"
        "    @staticmethod\n    def distance(a, b):\n        return (a - b).abs().sum(dim=-1)\n"
    )
    monkeypatch.chdir(tmp_path)
    images = torch.zeros(1, 2, 3, 4, 4)
    images[0, 0, 0], images[0, 1, 1] = 1, 0.5  # red and green
    by_colour, scaled = load_diversity("my_features:mean_colour"), load_diversity("my_features:Scaled(scale=2.0)")
    assert by_colour.__name__ == "mean_colour_distance" and by_colour(images).tolist() == [1]
    assert scaled.__name__ == "Scaled_distance" and scaled(images).tolist() == [3]


def test_videos_are_compared_frame_by_frame():
    videos = torch.zeros(1, 2, 4, 3, 8, 8)
    videos[0, 0, :, 0] = 1  # red all the time
    videos[0, 1, :3, 0], videos[0, 1, 3:, 1] = 1, 1  # green at the end
    assert Diversity(colours)(videos).tolist() == [0.25]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 3, 8, 8), r"got 1 image\(s\) of each prompt.*sample at least 2"),
        ((2, 3, 8, 8), r"images of shape \[2, 3, 8, 8\]"),
        ((2, 2, 4, 8, 8), r"images of shape \[2, 2, 4, 8, 8\]"),
    ],
)
def test_images_that_have_no_diversity(shape, message):
    with pytest.raises(ValueError, match=message):
        load_diversity("pixels")(torch.zeros(shape))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda images: images, r"gave \[4, 3, 8, 8\] for 4 images: they must be a tensor of shape \[4, D\]"),
        (lambda images: colours(images)[:3], r"gave \[3, 3\] for 4 images"),
        (lambda images: colours(images).tolist(), r"gave list for 4 images"),
        (lambda images: colours(images) / 0, r"not finite"),
    ],
)
def test_features_that_are_none(features, message):
    with pytest.raises(ValueError, match=message):
        Diversity(features)(images_of(2, 2, 3, 8, 8))


def test_names_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"diversity 'clips' is neither one of clip, dreamsim, pixels, nor"):
        load_diversity("clips")
    with pytest.raises(ValueError, match=r"diversity 'clip\(size=3\)': got an unexpected keyword argument 'size'"):
        load_diversity("clip(size=3)")
    with pytest.raises(OSError, match=r"Cannot load a CLIPConfig from './nowhere'"):
        load_diversity("clip(model='./nowhere')")
    with pytest.raises(ValueError, match=r"must be a callable from images"):
        Diversity(3)
    with pytest.raises(ImportError, match=r"pip install \"trl_fdfo\[dreamsim\]\""):
        load_diversity("dreamsim")


def test_dreamsim_is_called_as_the_package_says(tmp_path, monkeypatch):
    """Its weights cannot be had here: a module of the same signatures takes its place."""
    calls = []

    class Model(nn.Module):
        def embed(self, images):
            assert images.shape[1:] == (3, 224, 224) and len(images) <= 3
            return images.mean(dim=(2, 3))

    def dreamsim(pretrained=True, device="cuda", cache_dir="./models", dreamsim_type="ensemble"):
        calls.append((pretrained, device, cache_dir, dreamsim_type))
        return Model(), lambda picture: torch.tensor(np.array(picture.resize((224, 224)))).permute(2, 0, 1)[None] / 255

    module = types.ModuleType("dreamsim")
    module.dreamsim = dreamsim
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "dreamsim", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    diversity = load_diversity("dreamsim(kind='dino_vitb16', batch_size=3, device='cpu')")
    assert diversity.__name__ == "dreamsim_distance" and not calls
    images = torch.zeros(2, 2, 3, 16, 16)
    images[0, 0, 0], images[0, 1, 1], images[1, :, 2] = 1, 1, 1
    assert diversity(images).tolist() == pytest.approx([1, 0])
    diversity(images)
    squared = load_diversity("dreamsim(kind='dino_vitb16', distance='squared', batch_size=3, device='cpu')")
    assert squared.__name__ == "dreamsim_squared_distance" and squared(images).tolist() == pytest.approx([2, 0])
    with pytest.raises(ValueError, match="distance='rms' of DreamSimFeatures is not one of cosine, squared"):
        load_diversity("dreamsim(distance='rms')")
    calls.pop()
    assert calls == [(True, "cpu", str(tmp_path / "hub" / "dreamsim" / "dino_vitb16"), "dino_vitb16")]


def test_a_comparison_reports_it(make_trainer, clip_folder):
    trainer = make_trainer()
    for diversity, name in (("pixels", "pixel_distance"), (f"clip(model={clip_folder!r})", "clip_distance")):
        comparison = trainer.compare(num_prompts=2, diversity=diversity)
        comparison.sample("before")
        own = load_diversity(diversity)(comparison.images["before"]).mean().item()
        assert comparison.results["before"].keys() == {"reward", name}
        assert comparison.results["before"][name] == pytest.approx(own, rel=1e-4)
