import pytest
import torch

from trl_fdfo.rewards import Motion, TemporalSmoothness


def video(*brightness: float) -> torch.Tensor:
    """Frames of one brightness each, [F, 3, 4, 4]."""
    return torch.tensor(brightness)[:, None, None, None].expand(-1, 3, 4, 4)


@pytest.mark.parametrize(
    ("frames", "smoothness", "motion"),
    [
        (video(0.3, 0.3, 0.3, 0.3), 0.0, 0.0),  # frozen
        (video(0.0, 0.25, 0.5, 0.75), 0.0, 0.25),  # a steady pace
        (video(0.0, 1.0, 0.0, 1.0), -4.0, 1.0),  # flicker
        (video(0.0, 0.0, 0.5, 0.5), -0.25, 0.5 / 3),  # a cut
    ],
)
def test_known_videos(frames, smoothness, motion):
    videos = torch.stack([frames, frames[:1].expand(4, -1, -1, -1)])
    assert TemporalSmoothness()(videos).tolist() == pytest.approx([smoothness, 0.0])
    assert Motion()(videos).tolist() == pytest.approx([motion, 0.0])


@pytest.mark.parametrize("reward", [TemporalSmoothness(), Motion()])
def test_gradient_and_what_is_no_video(reward):
    videos = torch.rand(2, 5, 3, 4, 4, requires_grad=True)
    reward(videos).sum().backward()
    assert videos.grad.isfinite().all() and videos.grad.any()
    with pytest.raises(
        ValueError, match=r"got videos of shape \[2, 1, 3, 4, 4\], and takes \[N, F, 3, H, W\] with at least"
    ):
        reward(videos[:, :1])
