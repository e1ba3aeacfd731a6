"""Logs of a run: sheets of pictures, as files and in Trainer's trackers, and metrics.jsonl."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import recursively_apply
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils import is_in_notebook, logging

from ..media import Media, Outputs, unbind
from ..rewards.reward_functions import RewardFunctions
from .clips import read_wav, save_clips
from .sheets import Panel, Section, picture, rows_of, sheet


logger = logging.get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
PICTURES_FOLDER = "pictures"


class PictureLogger(TrainerCallback):
    """
    Shows the images of rollouts and of evaluations with their rewards.

    Each sheet is a PNG file in `output_dir/pictures/`, and a picture in TensorBoard, wandb and trackio if the run
    reports to them, and in a notebook below the cell. Beside it stand the videos and sounds that it shows, which TensorBoard (sounds) and wandb (sounds, and
    videos as .mp4) play too. The main process shows its own images: no images pass between processes.

    Args:
        handler (`CallbackHandler`): The Trainer's callback handler, which holds the callbacks of its trackers.
        output_dir (`str`): Folder of the run.
        every (`int`): Optimizer steps from one sheet of a rollout to the next; the last rollout has one in any case. 0 turns
            all sheets off.
        num_prompts (`int`): Prompts on a sheet, at most.

    Attributes:
        outputs ([`Outputs`]): What the pipeline makes, with its rates.
        written (`set[Path]`): The files that it has written.
    """

    outputs = Outputs()

    def __init__(self, handler: CallbackHandler, output_dir: str, every: int | None, num_prompts: int):
        self._handler = handler
        self._folder = Path(output_dir, PICTURES_FOLDER)
        self._every = every
        self._num_prompts = num_prompts
        self.written: set[Path] = set()
        self._last_step: int | None = None  # where the last rollout begins
        self._kept: list[tuple[str, list[Image.Image]]] = []
        self._clips: dict[str, Path] = {}  # of the next sheet, by their tags

    def on_train_begin(self, args, state, control, **kwargs):
        self._kept, self._clips = [], {}
        self._last_step = state.max_steps - args.steps_per_rollout

    def keep(self, state: TrainerState, images: Tensor | Media, prompts: Sequence[str]) -> None:
        """
        Keep the first images of a rollout until their rewards are known, if its sheet is due. `images` are in [0, 1],
        shape [N, 3, H, W], videos [N, F, 3, H, W], or audio [N, C, L]: N / P consecutive ones for each of P prompts.
        """
        step = state.global_step
        if self._is_off(state) or (step % self._every and step != self._last_step):
            return
        missing = self._num_prompts - len(self._kept)
        of_prompts = unbind(recursively_apply(lambda made: made.unflatten(0, (len(prompts), -1)), images))
        for prompt, branches in list(zip(prompts, of_prompts))[:missing]:
            for branch, image in enumerate(unbind(branches)):
                self._keep_clips("train", step, f"{len(self._kept)}_{branch}", image)
            self._kept.append((prompt, [picture(image) for image in unbind(branches)]))

    def log_rollout(self, state: TrainerState, rewards: Tensor, functions: RewardFunctions) -> None:
        """Show the kept images with their rewards. `rewards` are this process's, shape [P, G, number of functions]."""
        if not self._kept:
            return
        sections = []
        for (prompt, pictures), labels in zip(self._kept, _labels(rewards, functions)):
            sections.append(Section(prompt, rows_of([Panel(*panel) for panel in zip(pictures, labels)], columns=8)))
        self._kept = []
        self._log("train", sections, state.global_step)

    def log_evaluation(
        self,
        state: TrainerState,
        images: Sequence[Tensor | Media],
        prompts: Sequence[str],
        rewards: Sequence[tuple[RewardFunctions, Tensor]],
        prefix: str = "eval",
    ) -> None:
        """
        Show one image of each of the first prompts of an evaluation with its rewards.

        Args:
            images (`Sequence[Tensor]`): This process's images, [3, H, W] each, videos, [F, 3, H, W], or audio, [C, L], one
                per prompt.
            rewards (`Sequence[tuple[RewardFunctions, Tensor]]`): Functions and the rewards that they returned, shape
                [N, number of functions]: the training rewards first, then the control rewards.
            prefix (`str`): Start of the file's name.
        """
        if self._is_off(state):
            return
        shown = slice(min(len(images), len(prompts), self._num_prompts))
        (functions, values), *controls = rewards
        labels = [label for [label] in _labels(values[shown, None], functions)]
        for functions, values in controls:
            labels = ["\n".join([label, *map(_label, functions.names, v)]) for label, v in zip(labels, values.tolist())]
        labels = [f"{label}\n{prompt}" for label, prompt in zip(labels, prompts[shown])]
        for number, image in enumerate(images[shown]):
            self._keep_clips(prefix, state.global_step, number, image)
        panels = [Panel(picture(image), label) for image, label in zip(images[shown], labels)]
        self._log(prefix, [Section("", rows_of(panels, columns=4))], state.global_step)

    def _is_off(self, state: TrainerState) -> bool:
        return not state.is_world_process_zero or not self._every

    def _keep_clips(self, name: str, step: int, place: int | str, sample: Tensor | Media) -> None:
        """Write the video and the sound of a sample at a place of the sheet."""
        stem = self._folder / f"{name}_{step:06}_{place}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            clips = save_clips(sample, stem, self.outputs)
            self.written.update(clips)
            self._clips |= {f"{name}/{place}{path.suffix}": path for path in clips}
        except OSError as error:
            logger.warning(f"{stem} could not be written: {error}.")

    def _log(self, name: str, sections: list[Section], step: int) -> None:
        image = sheet(sections)
        path = self._folder / f"{name}_{step:06}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            image.save(unfinished, format="PNG")
            os.replace(unfinished, path)
            self.written.add(path)
        except OSError as error:  # such as a full disk, which should not end a run
            logger.warning(f"{path} could not be written: {error}.")
        if is_in_notebook():
            from .notebook import show  # which imports IPython

            show(f"{name}, after {step} optimizer steps", image)
        tag = f"{name}/images"
        clips, self._clips = self._clips, {}
        for callback in self._handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
                for clip, path in clips.items():
                    if path.suffix == ".wav":
                        sound = read_wav(path).mean(dim=0)  # TensorBoard plays one channel
                        callback.tb_writer.add_audio(clip, sound, step, sample_rate=self.outputs.sampling_rate)
                callback.tb_writer.flush()
            elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
                played = {
                    clip: (callback._wandb.Audio if path.suffix == ".wav" else callback._wandb.Video)(str(path))
                    for clip, path in clips.items()
                    if path.suffix in (".wav", ".mp4")
                }
                callback._wandb.log({tag: callback._wandb.Image(image), **played, "train/global_step": step})
            elif isinstance(callback, TrackioCallback) and callback._initialized:
                callback._trackio.log({tag: callback._trackio.Image(image), "train/global_step": step})


class MetricsFile(TrainerCallback):
    """
    Writes Trainer's logs to `output_dir/metrics.jsonl`: a JSON object per line, with null for NaN.

    Each line is written at once, so a killed run leaves all of them. A resumed run first rewrites the lines up to its
    checkpoint, behind those of evaluations before `train`, so no step occurs twice.
    """

    def __init__(self):
        self._path: Path | None = None
        # Logs of this process before `train`, such as an evaluation of the base model.
        self._before: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._path = Path(args.output_dir, METRICS_FILE)
            self._write("w", self._before + state.log_history)
            self._before = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        line = state.log_history[-1]
        if self._path is None:
            self._before.append(line)
        else:
            self._write("a", [line])

    def _write(self, mode: str, lines: list[dict[str, Any]]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, mode) as file:
                file.writelines(json.dumps(finite(line), default=str) + "\n" for line in lines)
        except OSError as error:
            logger.warning(f"{self._path} could not be written: {error}.")


def _labels(rewards: Tensor, functions: RewardFunctions) -> list[list[str]]:
    """Return lines of text for rewards [P, G, R]: the total, and each reward if there are several."""
    names = ["total", *functions.names] if len(functions.names) > 1 else ["reward"]
    values = torch.cat([functions.total(rewards)[..., None], rewards], dim=-1).tolist()
    return [["\n".join(map(_label, names, branch)) for branch in prompt] for prompt in values]


def _label(name: str, value: float) -> str:
    return f"{name} {value:.4g}" if math.isfinite(value) else f"{name} does not apply"


def finite(line: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity, which JSON does not have, with None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
