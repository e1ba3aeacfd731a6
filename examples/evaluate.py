"""
A table of rewards and diversity: a base model and adapters on it, on the same prompts from the same seeds.

    python examples/evaluate.py --model shapes --adapter outputs/shapes \
        --reward trl_fdfo.shapes:reward --reward trl_fdfo.shapes:strict --diversity pixels
    accelerate launch examples/evaluate.py --model stabilityai/stable-diffusion-3.5-medium --adapter out \
        --adapter user/other-adapter --prompts held_out.txt --reward pickscore --reward hpsv2 --reward clip --reward vlm

Writes into `output` results.json, with the values of every prompt, all settings and versions, and grid.png, with the images
of the first prompts. Processes share the prompts, and give the same results as one.

A value is averaged over the images of a prompt, which are not independent, before its mean and standard error over prompts are
taken. All models have the same prompts and seeds: the difference to the base model is taken prompt by prompt, and its
standard error is smaller than those of the two means would give.
"""

import json
import math
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerState
from trl import TrlParser

from trl_fdfo import __version__, shapes
from trl_fdfo.evaluation.before_after import FIRST_SEED
from trl_fdfo.evaluation.diversity import Diversity, load_diversity
from trl_fdfo.evaluation.estimates import Estimate, markdown_table
from trl_fdfo.cli.models import (
    BASE,
    InferenceArguments,
    call_options,
    each_model,
    find_adapters,
    open_pipeline,
    read_prompts,
    sample,
)
from trl_fdfo.reporting.sheets import Panel, Section, picture, sheet
from trl_fdfo.training.prompts import PACKAGED_PROMPTS
from trl_fdfo.rewards.by_name import RepeatableFlag, load_reward, reward_table
from trl_fdfo.rewards.reward_functions import RewardFunctions


PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the table of rewards line by line."""


@dataclass
class Arguments(InferenceArguments):
    prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts, or one txt, json, jsonl, csv or parquet file of them, whose other columns go to the rewards. "
            "Default: the packaged list, which training takes by default too; the captions of `shapes`."
        },
    )
    reward: list[str] = field(
        default_factory=lambda: ["pickscore", "hpsv2", "clip"],
        metadata={"help": "A reward, listed below, or module:callable. Repeat for several.", "action": RepeatableFlag},
    )
    diversity: str = field(
        default="clip",
        metadata={"help": "Features whose distance is diversity: clip, dreamsim, pixels, or module:callable."},
    )
    images_per_prompt: int = field(default=4, metadata={"help": "Images per prompt and model, at least 2."})
    first_seed: int = field(default=FIRST_SEED, metadata={"help": "Seed of the first image; the others follow it."})
    batch_size: int = field(default=4, metadata={"help": "Images of a prompt per call of the pipeline."})
    grid_prompts: int = field(default=8, metadata={"help": "Prompts in grid.png."})
    output: str = field(default="evaluation", metadata={"help": "Folder to write."})


def main(args: list[str] | None = None) -> None:
    parser = TrlParser(Arguments, epilog=reward_table(), formatter_class=HelpFormatter)
    (arguments,) = parser.parse_args_and_config(args)
    for name, least in (("images_per_prompt", 2), ("first_seed", 0), ("batch_size", 1), ("grid_prompts", 1)):
        if getattr(arguments, name) < least:
            why = ": diversity is a distance between images of a prompt" if name == "images_per_prompt" else ""
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least {least}{why}.")
    packaged = shapes.captions() if arguments.model == "shapes" else [str(PACKAGED_PROMPTS)]
    dataset = read_prompts(arguments.prompts or packaged)
    adapters = find_adapters(arguments.adapter)
    options = call_options(arguments, adapters)
    # Without being told so, Accelerate runs each of several processes on CPUs as if it were the only one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    diversity = load_diversity(arguments.diversity)
    rewards = RewardFunctions([load_reward(spec) for spec in arguments.reward], argument="reward")
    rewards.check_columns(dataset.column_names, "prompts")
    for name, function in zip(rewards.names, rewards.functions):
        if getattr(function, "pairwise", False):
            raise ValueError(
                f"reward '{name}' compares the images of a prompt with each other, and says nothing of a model: leave it out."
            )
    pipeline = open_pipeline(arguments.model, options, adapters, state.device)
    settings = {
        **{name: value for name, value in asdict(arguments).items() if value is not None},
        "prompts": list(dataset["prompt"]),
        "reward": [spec.partition("(")[0] for spec in arguments.reward],  # an option can be a password
        "reward_settings": rewards.describe(),
        "call_options": options,
        "dtype": str(pipeline.transformer.dtype),
        "versions": {"trl_fdfo": __version__, **{package: version(package) for package in PACKAGES}},
    }

    values, rows = {}, {}
    for name in each_model(pipeline, adapters):
        sampler = lambda prompt, seeds: sample(pipeline, prompt, seeds, options, arguments.batch_size)
        values[name], rows[name] = evaluate(name, sampler, dataset, rewards, diversity, arguments)
        if state.is_main_process:  # anew after each model: what is there is there
            table = write(output, values, rows, settings)
    if state.is_main_process:
        print(
            f"\n{table}\n\nMean ± standard error over {len(dataset)} prompts, {arguments.images_per_prompt} images each."
        )
        print(f"Sampled with {options}. In {output}/: results.json and grid.png.")
    state.destroy_process_group()


def evaluate(
    name: str,
    sampler: Callable[[str, Sequence[int]], Tensor],
    dataset: Dataset,
    rewards: RewardFunctions,
    diversity: Diversity,
    arguments: Arguments,
) -> tuple[dict[str, list[float]], list[list[Panel]]]:
    """Of each metric one value per prompt, nan where it does not apply; and of the first prompts a row of images."""
    state, count = PartialState(), arguments.images_per_prompt
    pending = []
    # A prompt at a time, for the rewards too: what is in a batch, and so its rounding, does not depend on the processes.
    share = range(state.process_index, len(dataset), state.num_processes)
    for n in tqdm(share, name, disable=not state.is_main_process):
        columns = {column: [value] * count for column, value in dataset[n].items()}
        seeds = range(arguments.first_seed + n * count, arguments.first_seed + (n + 1) * count)
        images = sampler(dataset[n]["prompt"], seeds)
        scores = rewards.submit(images, columns["prompt"], TrainerState(), columns, count)
        pictures = [picture(image) for image in images] if n < arguments.grid_prompts else []
        pending.append((n, seeds, scores, diversity(images[None]).item(), pictures))
        for _, _, earlier, *_ in pending:
            earlier.raise_errors()
    done = []
    for n, seeds, scores, distance, pictures in pending:
        scores = scores.result()  # [S, R]
        labels = [
            ", ".join(f"{r} {x:.3g}" for r, x in zip(rewards.names, image) if x == x) for image in scores.tolist()
        ]
        row = [Panel(p, f"{name}, seed {seed}\n{label}") for p, seed, label in zip(pictures, seeds, labels)]
        done.append((n, [*scores.double().nanmean(dim=0).tolist(), distance], row))
    rewards.on_rollout_end()
    done = sorted(gather_object(done), key=lambda prompt: prompt[0])
    columns = zip(*(of_prompt for _, of_prompt, _ in done))
    names = [*rewards.names, diversity.__name__]
    return {metric: list(column) for metric, column in zip(names, columns)}, [row for _, _, row in done if row]


def write(
    output: Path, values: dict[str, dict[str, list[float]]], rows: dict[str, list[list[Panel]]], settings: dict
) -> str:
    """The files of what has been evaluated so far; returns the table."""
    of_each = lambda values: {name: {m: Estimate.of(v) for m, v in model.items()} for name, model in values.items()}
    paired = {
        name: {m: np.subtract(v, values[BASE][m]) for m, v in model.items()}
        for name, model in values.items()
        if name != BASE
    }
    estimates, differences = of_each(values), of_each(paired)
    results = {
        **{"estimates": estimates, "differences": differences, "settings": settings},
        "per_prompt": {
            name: {m: [x if math.isfinite(x) else None for x in v] for m, v in model.items()}
            for name, model in values.items()
        },
    }
    (output / "results.json").write_text(json.dumps(results, indent=2, default=vars) + "\n")
    sections = [Section(prompt, list(of_prompt)) for prompt, *of_prompt in zip(settings["prompts"], *rows.values())]
    sheet(sections).save(output / "grid.png")
    return markdown_table(estimates, differences)


if __name__ == "__main__":
    main()
