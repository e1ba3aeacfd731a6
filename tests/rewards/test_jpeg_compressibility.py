import pytest
import torch
from PIL import Image
from transformers import TrainerState

from trl_fdfo.rewards import RewardFunctions
from trl_fdfo.rewards.jpeg_compressibility import JPEGCompressibility, JPEGIncompressibility


PLAIN = Image.new("RGB", (64, 64), "gray")
NOISE = Image.effect_noise((64, 64), 80).convert("RGB")


def test_rewards_are_the_size_of_the_file_in_kilobytes(tmp_path):
    sizes = {}
    for quality in (95, 40):
        for name, image in (("plain", PLAIN), ("noise", NOISE)):
            path = tmp_path / f"{name}{quality}.jpg"
            image.save(path, quality=quality)
            sizes[name, quality] = path.stat().st_size / 1000
    assert JPEGCompressibility()([PLAIN, NOISE]) == [-sizes["plain", 95], -sizes["noise", 95]]
    assert JPEGIncompressibility()([PLAIN, NOISE]) == [sizes["plain", 95], sizes["noise", 95]]
    assert JPEGIncompressibility(quality=40)([NOISE]) == [sizes["noise", 40]]
    assert sizes["plain", 95] < sizes["noise", 40] < sizes["noise", 95]


def test_a_video_is_the_mean_or_the_minimum_of_its_frames():
    plain, noise = JPEGIncompressibility()([PLAIN, NOISE])
    assert JPEGCompressibility()([[PLAIN, NOISE, NOISE], [PLAIN]]) == pytest.approx([-(plain + 2 * noise) / 3, -plain])
    assert JPEGCompressibility(frames="min")([[PLAIN, NOISE, NOISE], [PLAIN]]) == [-noise, -plain]
    assert JPEGIncompressibility(frames="min")([[NOISE, PLAIN], [NOISE]]) == [plain, noise]
    with pytest.raises(ValueError, match="frames=None of JPEGCompressibility: a video scores the 'mean'"):
        JPEGCompressibility(frames=None)


def test_through_the_images_of_the_trainer():
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)])
    rewards = RewardFunctions([JPEGCompressibility(), JPEGIncompressibility()])
    assert rewards.names == ["JPEGCompressibility", "JPEGIncompressibility"]
    scores = rewards(images, ["a", "b"], TrainerState(), {})
    assert (scores[:, 0] == -scores[:, 1]).all()
    assert scores[0, 0] > -1 > -5 > scores[1, 0]
    videos = rewards(torch.stack([images, images[[0, 0]]]), ["a", "b"], TrainerState(), {})
    torch.testing.assert_close(videos, torch.stack([scores.mean(dim=0), scores[0]]))


@pytest.mark.parametrize("reward", [JPEGCompressibility, JPEGIncompressibility])
@pytest.mark.parametrize("quality", [0, 101, 95.0, True, "95"])
def test_other_qualities_are_refused(reward, quality):
    message = f"quality={quality!r} of {reward.__name__} must be a whole number from 1 to 100"
    with pytest.raises(ValueError, match=message):
        reward(quality)
    assert reward(1).quality == 1 and reward(100).quality == 100
