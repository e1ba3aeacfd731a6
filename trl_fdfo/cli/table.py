"""
The evaluation of a base model and adapters: the table and the pictures of `trl-fdfo evaluate`.

The images of a prompt are not independent: they are averaged before the mean and its standard error over prompts are taken.
All models have the same prompts and seeds: the difference from the base model is taken prompt by prompt, and its standard
error is smaller than the errors of the two means would give.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import TrainerState

from .. import shapes
from ..evaluation.diversity import FEATURES, Diversity, load_diversity
from ..evaluation.estimates import Estimate, markdown_table
from ..evaluation.evaluator import Evaluator
from ..media import Media, unbind
from ..reporting.sheets import Panel, Section, picture, sheet
from ..rewards.by_name import check_by_name, load_reward
from ..rewards.reward_functions import RewardFunctions
from ..training.prompts import PACKAGED_PROMPTS
from .arguments import EVALUATION_FILE, EvaluationArguments
from .models import BASE, call_options, each_model, find_adapters, made_by_first_row, open_flow, read_prompts


PACKAGES = ("trl_fdfo", "torch", "diffusers", "transformers", "peft", "accelerate")


def evaluate(arguments: EvaluationArguments) -> None:
    packaged = shapes.captions() if arguments.model == "shapes" else [str(PACKAGED_PROMPTS)]
    columns = arguments.pipeline_columns
    dataset = read_prompts(arguments.prompts or packaged, columns)
    adapters = find_adapters(arguments.adapter)
    options = call_options(arguments, adapters)
    # Without being told so, Accelerate runs each of several processes on CPUs as if it were the only one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    if arguments.diversity is None:
        arguments = replace(arguments, diversity="pixels" if arguments.model == "shapes" else "clip")
    check_by_name(arguments.diversity, FEATURES, "diversity")
    rewards = RewardFunctions([load_reward(spec) for spec in arguments.reward], argument="reward")
    rewards.check_columns(dataset.column_names, "prompts", columns)
    rewards.check_rows(dataset, "prompts")
    if arguments.by is not None and arguments.by not in dataset.column_names:
        raise ValueError(
            f"by='{arguments.by}' is no column of the prompts: they have {', '.join(dataset.column_names)}."
        )
    for name in rewards.names:
        if name not in rewards.scores:
            raise ValueError(
                f"reward '{name}' compares the images of a prompt with each other, and says nothing of a model: leave it out."
            )
    flow = open_flow(arguments.model, options, adapters, state.device)
    outputs = made_by_first_row(flow, dataset, columns)
    rewards.expect(outputs)
    evaluator = Evaluator(
        flow.generate,
        rewards,
        diversity=_load_diversity(arguments.diversity) if "images" in outputs.kinds else None,
        sampled_columns=columns,
        batch_size=1 if columns else arguments.batch_size,
        device=state.device,
    )
    settings = {
        **{name: value for name, value in asdict(arguments).items() if value is not None},
        "prompts": list(dataset["prompt"]),
        "reward": [spec.partition("(")[0] for spec in arguments.reward],  # an option can be a password
        "reward_settings": rewards.describe(),
        "call_options": options,
        "dtype": str(flow.model.dtype),
        "versions": {package: version(package) for package in PACKAGES},
    }

    values, rows = {}, {}
    for name in each_model(flow.pipeline, adapters):
        values[name], rows[name] = evaluate_model(name, evaluator, dataset, arguments)
        if state.is_main_process:  # anew after each model: what is there is there
            table = write(output, values, rows, settings)
    if state.is_main_process:
        print(
            f"\n{table}\n\nMean ± standard error over {len(dataset)} prompts, {arguments.images_per_prompt} images each."
        )
        print(f"Sampled with {options}. In {output}/: results.json and grid.png.")
    state.destroy_process_group()


def _load_diversity(spec: str) -> Diversity:
    try:
        return load_diversity(spec)
    except OSError as error:
        raise OSError(f"diversity='{spec}': {error} For a distance that needs no model: --diversity pixels.") from error


def evaluate_model(
    name: str, evaluator: Evaluator, dataset: Dataset, arguments: EvaluationArguments
) -> tuple[dict[str, list[float]], list[list[Panel]]]:
    """One value per prompt of each metric, nan where it does not apply; and a row of images of each of the first prompts."""
    count, rewards = arguments.images_per_prompt, evaluator.rewards
    shown: list[tuple[int, list[Any]]] = []

    def keep(number: int, images: Tensor | Media) -> None:
        if number < arguments.grid_prompts and number not in dict(shown):
            shown.append((number, [picture(image) for image in unbind(images)]))

    first_seed: Callable[[int], int] = lambda number: arguments.first_seed + number * count
    evaluation = evaluator.evaluate(
        dataset,
        lambda number, image: first_seed(number) + image,
        count,
        TrainerState(),
        prompts_at_a_time=1,  # so that the contents of a batch, and its rounding, do not depend on the processes
        on_images=keep,
        title=name,
    )
    panels = []
    for number, pictures in sorted(dict(gather_object(shown)).items()):
        scores = [
            ", ".join(f"{r} {x:.3g}" for r, x in zip(rewards.names, image) if x == x)
            for image in evaluation.rewards[number].tolist()
        ]
        seeds = range(first_seed(number), first_seed(number) + count)
        panels.append([Panel(p, f"{name}, seed {seed}\n{text}") for p, seed, text in zip(pictures, seeds, scores)])
    means = evaluation.rewards.double().nanmean(dim=1)  # [P, R]
    values = dict(zip(rewards.names, means.T.tolist()))
    if arguments.by is not None:
        groups = list(map(str, dataset[arguments.by]))
        for reward in rewards.names:
            for group in dict.fromkeys(groups):
                values[f"{reward}, {group}"] = [x if g == group else math.nan for x, g in zip(values[reward], groups)]
    if evaluation.diversity is not None:  # audio has none
        values[evaluator.diversity.__name__] = evaluation.diversity.tolist()
    return values, panels


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
    unfinished = output / f".{EVALUATION_FILE}.unfinished"
    unfinished.write_text(json.dumps(results, indent=2, default=vars) + "\n")
    os.replace(unfinished, output / EVALUATION_FILE)
    sections = [Section(prompt, list(of_prompt)) for prompt, *of_prompt in zip(settings["prompts"], *rows.values())]
    sheet(sections).save(output / "grid.png")
    return markdown_table(estimates, differences)
