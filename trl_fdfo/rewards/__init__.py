"""
Rewards: callables `(images, prompts, **columns) -> one float per image`.

A reward takes its arguments by keyword and gets those that its signature names (all of them with `**kwargs`):

- `images`: floats in [0, 1], shape [N, 3, H, W]; or N PIL images where the reward has `image_type = "pil"`.
- `prompts`: N prompts.
- `trainer_state`: the trainer's [`~transformers.TrainerState`].
- every column of the dataset, N values each.

It returns N finite floats on any scale, or a tensor of shape [N]. None in the place of a float says that the reward does
not apply to that image. It may be `async`.
"""

from .jpeg_compressibility import jpeg_compressibility
from .reward_functions import RewardFunctions, load_reward


__all__ = ["RewardFunctions", "jpeg_compressibility", "load_reward"]
