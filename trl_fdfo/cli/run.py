"""A training run of the command line, from its options to the files it leaves."""

from datasets import Dataset
from transformers.utils import logging

import trl_fdfo

from .. import shapes
from ..evaluation.evaluator import DifferentSizesError
from ..pipeline.adapter_files import call_options
from ..planning.without_weights import planned
from ..rewards.by_name import REWARDS, check_by_name, load_object, load_reward
from ..saving.checkpointer import TrainingTime
from ..training.config import RolloutConfig
from ..training.prompts import load_prompts, plain
from ..training.publishing import where_it_is
from ..training.trainer import RolloutTrainer
from .algorithms import ALGORITHMS
from .arguments import PACKAGED_CALL, RunArguments


logger = logging.get_logger(__name__)


def config_class(script: RunArguments) -> type[RolloutConfig]:
    own = _trainer_class(script).config_class
    return planned(own) if script.plan else own


def plan(script: RunArguments, config: RolloutConfig) -> str:
    """The plan of a run, of which no weights are loaded."""
    for name in [*script.reward, *(script.eval_reward or ())]:
        check_by_name(name, REWARDS, "reward")
    _call_as_trained(script, config)
    prompts = _captions(script, config) or load_prompts(config.dataset_name, config.dataset_prompt_column)
    prompts = plain(prompts, config.pipeline_columns or ())
    model = shapes.PIPELINE_FOLDER if script.model == "shapes" else script.model
    return _trainer_class(script).plan(config, model, script.reward, prompts)


def train(script: RunArguments, config: RolloutConfig) -> None:
    """Train, with samples of before and after beside each other."""
    _call_as_trained(script, config)
    metrics = load_object(script.metrics, "metrics") if script.metrics is not None else None
    rewards = [load_reward(spec) for spec in script.reward]
    controls = [load_reward(spec) for spec in script.eval_reward] if script.eval_reward else None
    trainer = _trainer_class(script)(
        config,
        shapes.load_pipeline() if script.model == "shapes" else script.model,
        rewards,
        train_dataset=_captions(script, config),
        eval_reward_fn=controls,
    )

    comparison = trainer.compare(
        num_prompts=script.num_report_prompts, images_per_prompt=script.images_per_report_prompt, metrics=metrics
    )
    trainer.comparison = comparison  # for the model card
    try:
        comparison.sample("before")
        if script.report_guidance_scale is not None:
            name = f"before, guidance {script.report_guidance_scale}"
            comparison.sample(name, guidance_scale=script.report_guidance_scale)
    except DifferentSizesError as error:  # which train well
        logger.warning(f"There are no images of before the run: {error}")

    trainer.train()  # on from the checkpoint of the option `resume_from_checkpoint`, if it is set
    trainer.save_result(config.output_dir)  # first: what follows may fail
    trainer.save_state()
    comparison.complete()
    seconds = TrainingTime.seconds(trainer.state)
    if trainer.is_world_process_zero():
        comparison.write(
            config.output_dir,
            train_seconds=seconds,
            best_rollout=trainer.best_rollout,
            call_options=call_options(trainer.eval_call_kwargs()),
        )
        print(comparison.table())
        if seconds is not None:
            print(f"Trained in {seconds:.0f} s.")
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        print(where_it_is(trainer, config.output_dir))
    if config.push_to_hub:
        trainer.push_to_hub()


def _call_as_trained(script: RunArguments, config: RolloutConfig) -> None:
    """Complete the arguments of the packaged pipeline's call. The user's own `pipeline_kwargs` may be about others."""
    if script.model == "shapes":
        config.pipeline_kwargs = PACKAGED_CALL | (config.pipeline_kwargs or {})


def _captions(script: RunArguments, config: RolloutConfig) -> Dataset | None:
    """The prompts of the packaged pipeline, unless the config names others."""
    is_packaged = script.model == "shapes" and config.dataset_name is None
    return Dataset.from_dict({"prompt": shapes.captions()}) if is_packaged else None


def _trainer_class(script: RunArguments) -> type[RolloutTrainer]:
    return getattr(trl_fdfo, ALGORITHMS[script.algorithm])
