"""The result of a run with its model card, on the disk and on the Hub."""

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..evaluation.before_after import RESULTS_FILE
from ..pipeline.adapter_files import has_diffusers_format
from ..pipeline.loading import folder_name
from ..reporting.logs import METRICS_FILE, PICTURES_FOLDER
from ..saving.checkpoint_files import set_aside
from ..saving.checkpointer import TrainingTime
from ..saving.hub import PushError
from ..saving.model_card import (
    CardRecord,
    PipelineRecord,
    SampleRecord,
    TrainingRecord,
    loading_lines,
    write_model_card,
)
from .prompt_sets import PROMPT_SETS
from .prompts import is_file_name


logger = logging.get_logger(__name__)

# On every model card, behind the algorithm's own, unless the algorithm has no use for one.
_HYPERPARAMETERS = (
    *("timestep_fraction", "optimizer_steps_per_rollout", "num_iterations", "epsilon", "beta", "learning_rate"),
    *("lr_scheduler_type", "weight_decay", "max_grad_norm", "ema_decay", "seed"),
)
# What a user looks at after a run, in this order.
_TO_LOOK_AT = (
    *("README.md", "before_after.png", "reward_curve.png", "evaluation.png"),
    *(PICTURES_FOLDER, RESULTS_FILE, METRICS_FILE),
)
# Patterns of what a run that begins does not take over.
_LOGS = (METRICS_FILE, RESULTS_FILE, f"{PICTURES_FOLDER}/*_{6 * '[0-9]'}*.*")


def save(trainer: Trainer, output_dir: str) -> None:
    """Write the result and its card, say where they are, and push both with `push_to_hub`; a push that fails only warns."""
    args = trainer.args
    trainer.finish_current_push()  # which reads the files
    trainer.save_result(output_dir)
    write_card(trainer, output_dir)
    if trainer.is_world_process_zero():
        print(where_it_is(trainer, output_dir))
    if args.push_to_hub:
        if Path(output_dir) != Path(args.output_dir):
            trainer.save_result(args.output_dir)
        try:
            push(trainer, "Model save", revision=args.hub_revision)
        except PushError as error:
            logger.warning(str(error))


def push(
    trainer: Trainer,
    commit_message: str | None,
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card_options: Any,
) -> CommitInfo | Future | None:
    """
    Push the files in `output_dir`, with a card that shows images. All processes must call it.

    Raises:
        PushError: It could not be pushed.
    """
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    if trainer.comparison is None:
        trainer.comparison = trainer.compare()
    trainer.comparison.complete()
    if revision is not None:
        card_options["revision"] = revision
    trainer.create_model_card(**card_options)
    if not trainer.is_world_process_zero():
        return None
    place = trainer.hub.repo_id
    trainer.hub.create_repo(token, private, revision)
    if trainer.hub.repo_id != place:
        trainer.create_model_card(**card_options)
    return trainer.hub.push(commit_message, blocking, token, revision)


def publish_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Once all of a checkpoint is on the disk, on all processes: delete old ones, and push."""
    args, hub = trainer.args, trainer.hub
    if hub.pushes_checkpoints and args.hub_always_push:
        trainer.finish_current_push()
    if hub.pushes_checkpoints and trainer.any_process(hub.is_pushing()):
        # It may be reading an older checkpoint, which would be deleted, and the files of the result.
        logger.info(f"Not pushed at step {trainer.state.global_step}: the push before it is not done.")
        return
    if args.should_save:
        trainer.checkpointer.rotate(trainer.state.global_step, trainer.state.best_model_checkpoint)
    if not hub.pushes_checkpoints:
        return
    trainer.save_result(args.output_dir)
    try:
        trainer.create_model_card()
    except Exception as error:
        logger.warning(f"Training goes on, and this push has no new model card ({type(error).__name__}: {error}).")
    if trainer.is_world_process_zero():
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        place = f"step {trainer.state.global_step}" if by_steps else f"epoch {int(trainer.state.epoch)}"
        hub.push_in_background(checkpoint, f"Training in progress, {place}")


def write_card(
    trainer: Trainer,
    folder: str | Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Sequence[str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
) -> None:
    """
    Write README.md and its pictures into a folder. Only the main process does.

    Args:
        trainer ([`RolloutTrainer`]): The training so far.
        folder (`str` or `Path`): Folder of the result.
        model_name (`str`, *optional*): Title of the card; default: the name of the repo, or of the output directory.
        dataset_name (`str`, *optional*): Hub id of the prompts; default: the option `dataset_name`.
        tags (`str` or `list[str]`, *optional*): Tags beside those that every card has.
        license (`str`, *optional*): Default: the licence on the base model's card.
        base_model (`str`, *optional*): Hub id of the base model; default: where the pipeline came from.
        revision (`str`, *optional*): Branch of the repo that the card is for; default: the option `hub_revision`.
    """
    if not trainer.is_world_process_zero():
        return
    repo = trainer.hub.repo_id or trainer.args.hub_model_id
    revision = (revision or trainer.args.hub_revision) if repo else None  # a folder has no branches
    place = repo or folder_name(folder)
    record = _record(trainer, place, model_name, dataset_name, tags, license, base_model, revision)
    try:
        write_model_card(record, folder)
    except jinja2.TemplateError as error:
        # It made a card of a small run, before this one, whose result is to be saved all the same.
        logger.warning(
            f"model_card_template='{record.template}' makes no card of this run ({type(error).__name__}: {error}): it has the "
            "packaged one."
        )
        write_model_card(replace(record, template=None), folder)


def set_logs_aside(trainer: Trainer) -> None:
    """
    Move the logs and sheets of an earlier run in `output_dir` into `_abandoned/`, but not the sheets that this trainer has made. The
    earlier result, with README.md and its pictures, stays until this run has one.
    """
    folder = Path(trainer.args.output_dir)
    if (folder / METRICS_FILE).is_file():
        logs = {path for pattern in _LOGS for path in folder.glob(pattern)}
        set_aside(folder, logs - trainer.pictures.written, "logs")


def where_it_is(trainer: Trainer, folder: str | Path) -> str:
    """
    What the end of a run says of a saved result: its folder, the rollout of its weights if that is not the last one, the code
    that loads it, and the files to look at.
    """
    folder = Path(folder)
    record = _record(trainer, str(folder))
    code = "; ".join(loading_lines(record, str(folder)))
    best = ""
    if record.training.best is not None:
        rollout, metric = record.training.best
        best = f"  weights  after rollout {rollout} of {record.training.rollouts}, the best by {metric}\n"
    found = [name for name in _TO_LOOK_AT if (folder / name).exists()]
    return f"The result is in {folder}{os.sep}\n{best}  load     {code}\n  look at  {', '.join(found)}"


def _record(
    trainer: Trainer,
    place: str,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Sequence[str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
) -> CardRecord:
    """What the card says of a result that is loaded from `place`; the other arguments are those of `write_card`."""
    args = trainer.args
    hub_id, listed = args.dataset_name, None
    if hub_id in PROMPT_SETS:
        hub_id = PROMPT_SETS[hub_id].hub_id
        listed = args.dataset_name if hub_id is None else None
    elif hub_id is not None and is_file_name(hub_id):
        hub_id, listed = None, Path(hub_id).name
    adapter, kind = None, "LoRA"
    if args.use_peft:
        kind = type(trainer.model.peft_config["default"]).__name__.removesuffix("Config").replace("Lora", "LoRA")
        adapter = "diffusers" if has_diffusers_format(trainer.pipeline, trainer.model) else "peft"
    return CardRecord(
        algorithm=trainer.algorithm,
        paper=trainer.paper,
        repo_id=place,
        adapter=adapter,
        pipeline=PipelineRecord.of(
            trainer.pipeline,
            trainer.eval_call_kwargs(),
            args.pipeline_columns or (),
            trainer.outputs,
            trainer.flow.call_kwargs,
        ),
        training=_training_record(trainer, listed),
        samples=_sample_record(trainer),
        template=args.model_card_template,
        model_name=model_name,
        dataset_name=dataset_name or hub_id,
        tags=tags or (),
        license=license,
        base_model=base_model,
        revision=revision,
        adapter_kind=kind,
    )


def _training_record(trainer: Trainer, prompt_file: str | None) -> TrainingRecord:
    args, rewards = trainer.args, trainer.reward_functions
    rollouts = round(trainer.state.global_step / args.steps_per_rollout)
    return TrainingRecord(
        rewards=list(zip(rewards.names, rewards.weights.tolist())),
        hyperparameters=_hyperparameters(trainer),
        num_prompts=len(trainer.train_dataset),
        first_prompt=trainer.train_dataset[args.dataset_prompt_column][0],
        rollouts=rollouts,
        images=rollouts * args.prompts_per_rollout * args.num_candidates,
        log_history=trainer.state.log_history,
        prompt_file=prompt_file,
        best=trainer.best_rollout,
        seconds=TrainingTime.seconds(trainer.state),
        begun_from=folder_name(args.adapter) if args.adapter and os.path.exists(args.adapter) else args.adapter,
    )


def _sample_record(trainer: Trainer) -> SampleRecord | None:
    comparison = trainer.comparison
    if comparison is None:
        return None
    return SampleRecord(
        prompts=comparison.prompts,
        images=comparison.images,
        results=comparison.results,
        held_out=comparison.held_out,
        diversity=comparison.diversity.__name__,
        is_few=comparison.is_few,
    )


def _hyperparameters(trainer: Trainer) -> dict[str, Any]:
    args = trainer.args
    names = ("prompts_per_rollout", "num_generations", *trainer.hyperparameters, *_HYPERPARAMETERS)
    found = {name: getattr(args, name) for name in names if name not in args.idle_options}
    if args.num_candidates > args.num_generations:
        found["num_candidates"] = args.num_candidates
    if args.scale_rewards != "none":
        found["scale_rewards"] = args.scale_rewards
    if args.prompt_sampling != "uniform":
        found["prompt_sampling"] = args.prompt_sampling
    if args.use_peft:
        adapter = trainer.model.peft_config["default"]
        # An adapter that is no LoRA may have neither.
        found |= {"lora_r": getattr(adapter, "r", None), "lora_alpha": getattr(adapter, "lora_alpha", None)}
    found["mixed_precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    found["num_processes"] = args.world_size
    return found
