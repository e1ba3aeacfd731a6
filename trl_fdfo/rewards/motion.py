"""
How a video moves, without a model: controls, because a reward of single frames says nothing of it. A model that is trained
by such a reward may let its videos freeze, which `Motion` shows, or flicker, which `TemporalSmoothness` shows.
"""

from torch import Tensor


class TemporalSmoothness:
    """
    Minus the jerkiness of a video, from -4 to 0, higher is smoother: a control, best for a frozen video.

    The score is minus the mean, over pixels and time, of (x[t-1] - 2 x[t] + x[t+1])^2, for frames x[t] in [0, 1]: 0 if every
    pixel changes at a steady pace, -4 if black and white alternate. It is no published metric; VBench (arXiv 2311.17982)
    measures smoothness by a network that interpolates frames. As a reward it has a gradient.
    """

    def __call__(self, videos: Tensor) -> Tensor:
        """
        Score N videos [N, F, 3, H, W]: shape [N].

        Raises:
            ValueError: The videos have fewer than three frames.
        """
        _check_frames(videos, 3, "TemporalSmoothness")
        return -videos.diff(n=2, dim=1).square().flatten(1).mean(dim=1)


class Motion:
    """
    The mean change of a pixel from a frame to the next, from 0, a frozen video, to 1: a control.

    The score is the mean, over pixels and time, of |x[t+1] - x[t]|, for frames x[t] in [0, 1]. VBench (arXiv 2311.17982) takes
    this number, of videos that should stand still, for their flicker. As a reward it has a gradient.
    """

    def __call__(self, videos: Tensor) -> Tensor:
        """
        Score N videos [N, F, 3, H, W]: shape [N].

        Raises:
            ValueError: The videos have a single frame.
        """
        _check_frames(videos, 2, "Motion")
        return videos.diff(dim=1).abs().flatten(1).mean(dim=1)


def _check_frames(videos: Tensor, least: int, name: str) -> None:
    if videos.ndim != 5 or videos.shape[1] < least:
        raise ValueError(
            f"{name} got videos of shape {list(videos.shape)}, and takes [N, F, 3, H, W] with at least {least} frames F: sample "
            "more (`num_frames` in `pipeline_kwargs`), or leave the reward out."
        )
