"""
A rollout of one process: the images of its prompts are sampled and scored, and the targets of the updates derived.

Dimensions: P prompts of a batch, G branches, N = P x G samples.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm
from transformers import Trainer

from ..evaluation.evaluator import needed_columns, noted, read_rows
from ..pipeline.records import RolloutBatch, host_copy, repeat_each
from ..reporting.progress import show_waiting
from ..rewards.reward_functions import PendingRewards
from ..seeds import SAMPLER_NOISE, derive_seed
from . import checked
from .buffer import RolloutBuffer, ScoredBatch
from .prompts import rollout_rows
from .watchdogs import WatchdogError


@dataclass(frozen=True)
class SampledBatch:
    """A rollout batch, the levels that it is trained on, and the rows of its prompts in the dataset."""

    sampled: RolloutBatch
    levels: list[int]
    rows: list[int]


def sample_rollout(trainer: Trainer, rollout: int) -> RolloutBuffer:
    """
    Args:
        trainer ([`RolloutTrainer`]): Gives the pipeline, the prompts, the rewards and the algorithm.
        rollout (`int`): Number of the rollout, from 0.
    """
    args, metrics = trainer.args, trainer.metrics
    first_batch = args.process_index * args.num_rollout_batches
    numbers = range(first_batch, first_batch + args.num_rollout_batches)
    images = len(numbers) * args.per_device_prompt_batch_size * args.num_generations
    with rollout_bar(trainer, rollout, images) as bar:
        with trainer.sampling_weights():
            batches, pending = _sample_all(trainer, rollout, numbers, bar)
        with metrics.timed("reward"):
            metrics.add_waiting(wait_for_rewards(trainer, pending, bar))
    trainer.end_if_interrupted()
    trainer.save_if_interrupted()
    with metrics.timed("reward"):
        rewards = torch.cat([each.result() for each in pending]).unflatten(0, (-1, args.num_generations))
        trainer.reward_functions.on_rollout_end()
    trainer.offload_components()
    trainer.pictures.log_rollout(trainer.state, rewards, trainer.reward_functions)
    metrics.add_rewards(rollout, rewards)
    metrics.add_signs()
    metrics.add_branches([batch.sampled.endpoints for batch in batches], trainer.shared_noise(rollout))
    trainer.see_rewards(trainer.reward_functions.total(rewards))
    scored = []
    for number, batch, values in zip(numbers, batches, rewards.split(args.per_device_prompt_batch_size)):
        sampled = batch.sampled
        total = trainer.reward_functions.total(values).to(sampled.endpoints.device)
        targets = checked.targets(trainer, sampled, total, batch.rows)
        targets = host_copy(targets) if args.offload_trajectories else targets
        if not trainer.noises_endpoints:
            sampled = replace(sampled, endpoints=None, is_kept=None)
        elif args.offload_trajectories:
            sampled = replace(sampled, endpoints=host_copy(sampled.endpoints))
        scored.append(ScoredBatch(sampled, targets, batch.levels, number))
    return RolloutBuffer(rollout, first_batch, scored, args.optimizer_steps_per_rollout)


def rollout_bar(trainer: Trainer, rollout: int, images: int) -> tqdm:
    """The bar of a rollout, which shows nothing if progress is not shown."""
    return tqdm(disable=True) if trainer.progress is None else trainer.progress.rollout_bar(rollout, images)


def _sample_all(
    trainer: Trainer, rollout: int, numbers: Sequence[int], bar: tqdm
) -> tuple[list[SampledBatch], list[PendingRewards]]:
    """The batches of these global numbers, as far as a signal lets them be sampled, and their rewards."""
    args = trainer.args
    size = args.per_device_prompt_batch_size
    rows = rollout_rows(len(trainer.train_dataset), args.prompts_per_rollout, rollout, args.seed)
    at_a_time = args.per_device_sampling_batch_size // size
    groups = [numbers[start : start + at_a_time] for start in range(0, len(numbers), at_a_time)]
    batches, pending = [], []
    encoded = [_encode_ahead(trainer, group, rows) for group in groups]
    for group, embeddings in zip(groups, encoded):
        if trainer.is_told_to_end():
            break  # `save_if_interrupted` ends the run
        for each in pending:
            each.raise_errors()
        sampled, rewards = _sample_some(trainer, rollout, group, rows, embeddings)
        batches += sampled
        pending.append(rewards)
        show_waiting(bar, trainer.reward_functions.waiting())
        bar.update(len(sampled) * size * args.num_generations)
    return batches, pending


def wait_for_rewards(trainer: Trainer, pending: Sequence[PendingRewards], bar: tqdm) -> dict[str, float]:
    """
    Wait for the rewards, or for a signal. The processes ask each other again and again: one that waited for another's slow
    reward in a single collective would run into the engine's timeout (`ddp_timeout`).

    Returns:
        `dict[str, float]`: The most answers, over all processes, that each reward which tells them has waited for.
    """
    several = trainer.args.world_size > 1
    most: dict[str, float] = {}
    while True:
        trainer.end_if_interrupted()  # at once: the other processes may be sampling for minutes yet
        waiting, told = not all(each.done() for each in pending), trainer.signals.received is not None
        if several:
            waiting, told = (bool(trainer.any_process(value)) for value in (waiting, told))
        answers = trainer.reward_functions.waiting()
        if several and answers:
            answers = dict(zip(answers, trainer.sum_over_processes(list(answers.values()))))
        most = {name: max(number, most.get(name, 0)) for name, number in answers.items()}
        if told or not waiting:
            return most
        show_waiting(bar, answers)
        time.sleep(0.1 if several else 0.005)


def _places(trainer: Trainer, batches: Sequence[int]) -> range:
    """Places of the prompts of some neighbouring batches in the rollout."""
    size = trainer.args.per_device_prompt_batch_size
    return range(batches[0] * size, (batches[-1] + 1) * size)


def _encode_ahead(trainer: Trainer, batches: Sequence[int], rows: list[int]) -> list | None:
    """
    The embeddings of some batches that are sampled together, so that the text encoders can leave before any batch is
    sampled. None if they stay on the device, or have nothing to encode.
    """
    args, flow = trainer.args, trainer.flow
    if flow.encoders is None or trainer.signals.received is not None:
        return None
    sampled_columns = args.pipeline_columns or ()
    own_rows = [rows[n] for n in _places(trainer, batches)]
    columns = read_rows(
        trainer.train_dataset, own_rows, [args.dataset_prompt_column, *sampled_columns], "train_dataset"
    )
    prompts = columns.pop(args.dataset_prompt_column)
    with trainer.compute_loss_context_manager(), noted(f"Raised by the rows {own_rows} of the train_dataset."):
        return flow.encode_ahead(prompts, args.num_generations, columns)


def _sample_some(
    trainer: Trainer, rollout: int, batches: Sequence[int], rows: list[int], encoded: list | None
) -> tuple[list[SampledBatch], PendingRewards]:
    """Some batches in one call of the pipeline; `rows` are the rows of all prompts of the rollout."""
    args, flow = trainer.args, trainer.flow
    branches, size = args.num_generations, args.per_device_prompt_batch_size
    numbers = _places(trainer, batches)
    levels = [checked.trained_levels(trainer, rollout, batch) for batch in batches]
    # Where nothing is learned from the steps, one of each batch checks the replay.
    recorded = [one[:1] for one in levels] if trainer.noises_endpoints else levels
    sampled_columns = args.pipeline_columns or ()
    needed = needed_columns(
        trainer.train_dataset, [trainer.reward_functions], [args.dataset_prompt_column, *sampled_columns]
    )
    own_rows = [rows[n] for n in numbers]
    columns = read_rows(trainer.train_dataset, own_rows, needed, "train_dataset")
    prompts = columns[args.dataset_prompt_column]
    noise_seeds = [
        derive_seed(args.seed, rollout, n * branches + a, SAMPLER_NOISE) for n in numbers for a in range(branches)
    ]

    flow.model = trainer.model_wrapped
    with trainer.compute_loss_context_manager(), noted(f"Raised by the rows {own_rows} of the train_dataset."):
        sampled = flow.rollout(
            prompts,
            checked.noise_amounts(trainer, rollout, numbers),
            checked.initial_seeds(trainer, rollout, numbers),
            noise_seeds,
            levels={level for one in recorded for level in one},
            columns={name: columns[name] for name in sampled_columns},
            encoded=encoded,
        )
    if not sampled.endpoints.isfinite().all():
        raise WatchdogError(
            f"{type(trainer.pipeline).__name__} has sampled latents that are not finite, in {sampled.endpoints.dtype}. Does "
            "it sample well by itself, in this dtype and at this size? If so, lower the sampler's noise (`churn`, or "
            "`noise_level`) or the learning rate."
        )

    repeated = {name: repeat_each(values, branches) for name, values in columns.items()}
    with trainer.metrics.timed("reward"):
        pending = trainer.reward_functions.submit(
            sampled.images, repeated[args.dataset_prompt_column], trainer.state, repeated, branches
        )
    trainer.pictures.keep(trainer.state, sampled.images, prompts)
    trainer.metrics.see(sampled)
    parts = flow.split(replace(sampled, images=None), recorded)
    if trainer.noises_endpoints:
        parts = [_checked_and_forgotten(trainer, part) for part in parts]
    if args.offload_trajectories:
        parts = [part.on_host() for part in parts]
    batch_rows = [rows[batch * size : (batch + 1) * size] for batch in batches]
    return [SampledBatch(*batch) for batch in zip(parts, levels, batch_rows)], pending


def _checked_and_forgotten(trainer: Trainer, batch: RolloutBatch) -> RolloutBatch:
    """The batch without its recorded tuples, after the replay of each is compared with it."""
    for level, recorded in batch.velocities.items():
        with torch.no_grad(), trainer.compute_loss_context_manager():
            trainer.compare_replay(trainer.flow.velocity(batch, level), recorded, level)
    return replace(batch, x_t={}, velocities={})
