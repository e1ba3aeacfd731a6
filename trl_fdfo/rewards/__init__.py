"""
Rewards: callables `(images, prompts, **columns) -> one float per image`.

A reward is called by keyword with the arguments that its signature names, or with all of them if it has `**kwargs`:

- `images`: floats in [0, 1], shape [N, 3, H, W]; videos [N, F, 3, H, W]. The images of a prompt are adjacent.
- `videos`: videos alone, laid out so.
- `audio`: floats of about -1 to 1, shape [N, C, L], C channels of L values.
- `frame_rate`: frames of the videos per second; `sampling_rate`: values of the audio per second, in hertz.
- `prompts`: N prompts.
- `trainer_state`: the trainer's [`~transformers.TrainerState`].
- `num_generations`: images per prompt; 1 in an evaluation.
- every column of the dataset, N values each.

A trainer refuses a reward that needs what its pipeline does not make, or takes nothing that it makes. An argument with a
default keeps that where there is none: `def reward(images, audio=None)`.

It returns N finite floats on any scale, or a tensor of shape [N]. None instead of a float says that the reward does not
apply to that image.

`async` rewards run in the background, concurrently, while the next images are sampled. A reward can have attributes:

- `image_type = "pil"`: `images` are N PIL images; videos are N lists of F PIL frames. Audio stays a tensor.
- `background = True`: an ordinary function runs in the background too, in a thread, one call at a time.
- `pairwise = True`: the reward compares the images of a prompt, so it has no score in an evaluation of single images.
- `differentiable`: `True` or `False`, whether `direction="reward_gradient"` takes the gradient of the reward or its finite
  difference. The default is `True` for an ordinary function of tensors. A reward of PIL images with `True` also takes tensors.
- `check_rows(**columns)`: a method that is called before a run with the whole columns that its signature names, and raises a
  ValueError for a row that the reward cannot score.
- `on_rollout_end()`: a method that is called when all images of a rollout or an evaluation are scored.
- `waiting()`: a method that returns for how many answers the reward waits, such as votes. The progress bar of a rollout
  shows the number, and the metric `rewards/<name>/waiting` keeps it.
- `no_effect = ("url",)`: names of settings that change nothing about its values. A run may be resumed with others.
"""

from .aesthetic_score import AestheticScore
from .by_name import load_reward
from .clap_score import CLAPScore
from .clip_score import CLIPHScore, CLIPScore
from .edit_judge import EditJudge, vlm_edit
from .geneval import GenEval
from .hpsv2 import HPSv2
from .hpsv3 import HPSv3
from .http_reward import HTTPReward
from .human_preference import HumanPreference, human
from .image_reward import ImageReward
from .jpeg_compressibility import JPEGCompressibility, JPEGIncompressibility
from .motion import Motion, TemporalSmoothness
from .object_count import ObjectCount
from .pairwise_judge import PairwiseJudge, unified_reward, vlm_judge
from .pickscore import PickScore
from .reward_functions import RewardFunctions
from .text_rendering import TextRendering
from .vlm_score import VLMScore
from .vlm_server import VLMServer


__all__ = [
    "AestheticScore",
    "CLAPScore",
    "CLIPHScore",
    "CLIPScore",
    "EditJudge",
    "GenEval",
    "HPSv2",
    "HPSv3",
    "HumanPreference",
    "HTTPReward",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Motion",
    "ObjectCount",
    "PairwiseJudge",
    "PickScore",
    "RewardFunctions",
    "TemporalSmoothness",
    "TextRendering",
    "VLMScore",
    "VLMServer",
    "human",
    "load_reward",
    "unified_reward",
    "vlm_edit",
    "vlm_judge",
]
