"""
Rewards: callables `(images, prompts, **columns) -> one float per image`.

A reward takes its arguments by keyword and gets those that its signature names (all of them with `**kwargs`):

- `images`: floats in [0, 1], shape [N, 3, H, W]; or N PIL images where the reward has `image_type = "pil"`. Videos:
  [N, F, 3, H, W], or N lists of PIL frames. The images of a prompt stand next to each other.
- `prompts`: N prompts.
- `trainer_state`: the trainer's [`~transformers.TrainerState`].
- `num_generations`: images per prompt; 1 in an evaluation.
- every column of the dataset, N values each.

It returns N finite floats on any scale, or a tensor of shape [N]. None in the place of a float says that the reward does
not apply to that image.

`async` rewards run in the background while the next images are sampled, all at the same time; so do ordinary ones with
`background = True`, one call of each at a time, in a thread. A reward with a method `on_rollout_end` has it called when
the images of a rollout or an evaluation are scored.
"""

from .aesthetic_score import AestheticScore
from .clip_score import CLIPScore
from .hpsv2 import HPSv2
from .image_reward import ImageReward
from .jpeg_compressibility import JPEGCompressibility, JPEGIncompressibility
from .load_reward import load_reward
from .pairwise_judge import PairwiseJudge, vlm_judge
from .pickscore import PickScore
from .reward_functions import RewardFunctions
from .text_rendering import TextRendering
from .vlm_score import VLMScore
from .vlm_server import VLMServer


__all__ = [
    "AestheticScore",
    "CLIPScore",
    "HPSv2",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "PairwiseJudge",
    "PickScore",
    "RewardFunctions",
    "TextRendering",
    "VLMScore",
    "VLMServer",
    "load_reward",
    "vlm_judge",
]
