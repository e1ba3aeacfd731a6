"""
A rollout of one process: the images of its prompts are sampled and scored, and the targets of the updates derived.

Dimensions: P prompts of a batch, N candidates of each that are sampled, G of them that are trained on.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer

from ..evaluation.evaluator import needed_columns, noted, read_rows
from ..pipeline.records import RolloutBatch, host_copy, repeat_each
from ..reporting.progress import show_waiting
from ..rewards.reward_functions import PendingRewards
from ..rewards.scaling import scaled
from ..seeds import SAMPLER_NOISE, derive_seed
from . import checked
from .buffer import RolloutBuffer, ScoredBatch
from .candidates import most_different
from .prompts import rollout_rows
from .surrogate import tied
from .watchdogs import WatchdogError


@dataclass(frozen=True)
class SampledBatch:
    """
    Attributes:
        sampled ([`RolloutBatch`]): A rollout batch.
        levels (`list[int]`): The levels that it is trained on.
        rows (`list[int]`): Rows of its prompts in the dataset.
        prompts (`list[str]`): Its P prompts.
        columns (`dict[str, Sequence]`): Their values of the columns that the pipeline gets.
        chosen (`Tensor`, *optional*): Places among the candidates of those that `sampled` still has, shape [P, G]. None if it
            has all.
    """

    sampled: RolloutBatch
    levels: list[int]
    rows: list[int]
    prompts: list[str]
    columns: dict[str, Sequence]
    chosen: Tensor | None = None

    def of_chosen(self, values: Tensor) -> Tensor:
        """Of values of all candidates, shape [P, N], those of the chosen ones, shape [P, G]."""
        return values if self.chosen is None else values.gather(1, self.chosen)


def sample_rollout(trainer: Trainer, rollout: int) -> RolloutBuffer:
    """
    Args:
        trainer ([`RolloutTrainer`]): Gives the pipeline, the prompts, the rewards and the algorithm.
        rollout (`int`): Number of the rollout, from 0.
    """
    args, metrics = trainer.args, trainer.metrics
    first_batch = args.process_index * args.num_rollout_batches
    numbers = range(first_batch, first_batch + args.num_rollout_batches)
    images = len(numbers) * args.per_device_prompt_batch_size * args.num_candidates
    rows = _drawn_rows(trainer, rollout)
    with rollout_bar(trainer, rollout, images) as bar:
        with trainer.sampling_weights():
            calls, pending = _sample_all(trainer, rollout, numbers, rows, bar)
        with metrics.timed("reward"):
            metrics.add_waiting(wait_for_rewards(trainer, pending, bar))
    trainer.end_if_interrupted()
    trainer.save_if_interrupted()
    _choose_of_scored(trainer, calls, pending)
    batches = [batch for call in calls for batch in call]
    with metrics.timed("reward"):
        rewards = torch.cat([each.result() for each in pending]).unflatten(0, (-1, args.num_candidates))
    trainer.pictures.log_rollout(trainer.state, rewards, trainer.reward_functions)
    # Of all processes: the scale of a reward is a global number.
    all_rewards = trainer.accelerator.gather(rewards.to(args.device)).cpu()
    all_scaled = scaled(all_rewards, args.scale_rewards)
    metrics.add_rewards(rollout, all_rewards, all_scaled)
    totals = trainer.reward_functions.total(all_scaled)
    ties = tied(totals)
    if trainer.informative_prompts is not None:
        trainer.informative_prompts.see(ties.tolist())
        share = float(trainer.informative_prompts.chances.mean())
        metrics.add(frac_prompts_drawn=torch.tensor(share, device=args.device))
    own = lambda of_all: of_all.tensor_split(args.world_size)[args.process_index].split(
        args.per_device_prompt_batch_size
    )
    own_totals = own(totals)
    if args.scale_rewards == "batch":
        batches = [_choose(trainer, batch, values) for batch, values in zip(batches, own_totals)]
    chosen = [batch.of_chosen(values) for batch, values in zip(batches, own_totals)]
    if args.num_candidates > args.num_generations:
        metrics.add_chosen(torch.cat(chosen))
    metrics.add_signs()
    metrics.add_branches([batch.sampled.endpoints for batch in batches], trainer.shared_noise(rollout))
    trainer.see_rewards(torch.cat(chosen))
    scored = []
    compared = own(trainer.reward_functions.total(all_scaled, trainer.compared_rewards))
    for number, batch, values in zip(numbers, batches, compared):
        sampled, values = batch.sampled, batch.of_chosen(values)
        targets = checked.targets(trainer, sampled, values.to(sampled.endpoints.device), batch.rows)
        targets = host_copy(targets) if args.offload_trajectories else targets
        if not trainer.noises_endpoints:
            sampled = replace(sampled, endpoints=None, is_kept=None)
        elif args.offload_trajectories:
            sampled = replace(sampled, endpoints=host_copy(sampled.endpoints))
        scored.append(ScoredBatch(sampled, targets, batch.levels, number))
    # Only now, because targets may take gradients through the decoder and the rewards.
    trainer.reward_functions.on_rollout_end()
    trainer.offload_components()
    idle = None
    if trainer.ties_have_no_loss() and not args.beta:  # whose distance a tie has too
        idle = ties.unflatten(0, (-1, args.per_device_prompt_batch_size)).all(dim=1).tolist()
    buffer = RolloutBuffer(rollout, first_batch, scored, args.optimizer_steps_per_rollout, idle)
    if idle is not None:
        metrics.add(frac_updates_left_out=torch.tensor(buffer.fraction_left_out, device=args.device))
    return buffer


def rollout_bar(trainer: Trainer, rollout: int, images: int) -> tqdm:
    """The bar of a rollout, which shows nothing if progress is not shown."""
    return tqdm(disable=True) if trainer.progress is None else trainer.progress.rollout_bar(rollout, images)


def _drawn_rows(trainer: Trainer, rollout: int) -> list[int]:
    """Rows of the prompts of a rollout, over all processes."""
    args = trainer.args
    if trainer.informative_prompts is not None:
        return trainer.informative_prompts.draw(args.prompts_per_rollout)
    return rollout_rows(len(trainer.train_dataset), args.prompts_per_rollout, rollout, args.seed)


def _sample_all(
    trainer: Trainer, rollout: int, numbers: Sequence[int], rows: list[int], bar: tqdm
) -> tuple[list[list[SampledBatch]], list[PendingRewards]]:
    """
    The batches of these global numbers by call, as far as a signal lets them be sampled, and their rewards; `rows` are the rows
    of all prompts of the rollout.
    """
    args = trainer.args
    size = args.per_device_prompt_batch_size
    at_a_time = args.prompts_per_call // size
    groups = [numbers[start : start + at_a_time] for start in range(0, len(numbers), at_a_time)]
    calls: list[list[SampledBatch]] = []
    pending: list[PendingRewards] = []
    encoded = [_encode_ahead(trainer, group, rows) for group in groups]
    for group, embeddings in zip(groups, encoded):
        if trainer.is_told_to_end():
            break  # `save_if_interrupted` ends the run
        for each in pending:
            each.raise_errors()
        sampled, rewards = _sample_some(trainer, rollout, group, rows, embeddings)
        calls.append(sampled)
        pending.append(rewards)
        _choose_of_scored(trainer, calls, pending)
        show_waiting(bar, trainer.reward_functions.waiting())
        bar.update(len(sampled) * size * args.num_candidates)
    return calls, pending


def _choose_of_scored(trainer: Trainer, calls: list[list[SampledBatch]], pending: Sequence[PendingRewards]) -> None:
    """Drop the candidates that are not trained on from the batches of each call whose rewards are known."""
    args = trainer.args
    if args.num_candidates == args.num_generations or args.scale_rewards == "batch":
        return  # "batch" takes the rewards of the whole rollout
    for number, (batches, rewards) in enumerate(zip(calls, pending)):
        if batches[0].chosen is None and rewards.done():
            values = rewards.result().unflatten(0, (len(batches), -1, args.num_candidates))
            totals = [trainer.reward_functions.total(scaled(each, args.scale_rewards)) for each in values]
            calls[number] = [_choose(trainer, *each) for each in zip(batches, totals)]


def _choose(trainer: Trainer, batch: SampledBatch, totals: Tensor) -> SampledBatch:
    """The batch with those of its candidates that are trained on, by their total rewards, shape [P, N]."""
    args = trainer.args
    if args.num_candidates == args.num_generations:
        return batch
    chosen = most_different(totals, args.num_generations)
    places = (args.num_candidates * torch.arange(len(chosen))[:, None] + chosen).flatten().tolist()
    sampled = trainer.flow.choose(batch.sampled, places, batch.prompts, batch.columns)
    return replace(batch, sampled=sampled.on_host() if args.offload_trajectories else sampled, chosen=chosen)


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
        return flow.encode_ahead(prompts, args.num_candidates, columns)


def _sample_some(
    trainer: Trainer, rollout: int, batches: Sequence[int], rows: list[int], encoded: list | None
) -> tuple[list[SampledBatch], PendingRewards]:
    """Some batches in one call of the pipeline; `rows` are the rows of all prompts of the rollout."""
    args, flow = trainer.args, trainer.flow
    branches, size = args.num_candidates, args.per_device_prompt_batch_size
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
    of_pipeline = {name: columns[name] for name in sampled_columns}
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
            columns=of_pipeline,
            encoded=encoded,
        )
    if not sampled.endpoints.isfinite().all():
        raise WatchdogError(
            f"{type(trainer.pipeline).__name__} has sampled latents that are not finite, in {sampled.endpoints.dtype}. Does "
            "it sample well by itself, in this dtype and at this size? If so, lower "
            f"{' or '.join(filter(None, (args.noise_option, 'learning_rate')))}."
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
    batch_prompts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    # With columns of its own, the pipeline is called with one prompt.
    batches = zip(parts, levels, batch_rows, batch_prompts)
    return [SampledBatch(*batch, of_pipeline) for batch in batches], pending


def _checked_and_forgotten(trainer: Trainer, batch: RolloutBatch) -> RolloutBatch:
    """The batch without its recorded tuples, after the replay of each is compared with it."""
    for level, recorded in batch.velocities.items():
        with torch.no_grad(), trainer.compute_loss_context_manager():
            trainer.compare_replay(trainer.flow.velocity(batch, level), recorded, level)
    return replace(batch, x_t={}, velocities={})
