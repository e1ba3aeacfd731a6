"""A training run of the command line, from its options to the files it leaves."""

import json
import time
from pathlib import Path

from datasets import Dataset

import trl_fdfo

from .. import shapes
from ..evaluation.before_after import BeforeAfter
from ..planning.without_weights import planned
from ..reporting.logs import finite
from ..rewards.by_name import REWARDS, check_by_name, load_object, load_reward
from ..training.config import RolloutConfig
from ..training.prompts import load_prompts
from ..training.trainer import RolloutTrainer
from .algorithms import ALGORITHMS
from .arguments import RunArguments


def config_class(script: RunArguments) -> type[RolloutConfig]:
    own = _trainer_class(script).config_class
    return planned(own) if script.plan else own


def plan(script: RunArguments, config: RolloutConfig) -> str:
    """The plan of a run, of which no weights are loaded."""
    for name in [*script.reward, *(script.eval_reward or ())]:
        check_by_name(name, REWARDS, "reward")
    prompts = load_prompts(config.dataset_name, config.dataset_prompt_column)
    model = shapes.PIPELINE_FOLDER if script.model == "shapes" else script.model
    return _trainer_class(script).plan(config, model, script.reward, prompts)


def train(script: RunArguments, config: RolloutConfig) -> None:
    """Train, with samples of before and after beside each other."""
    packaged = script.model == "shapes"
    metrics = load_object(script.metrics, "metrics") if script.metrics is not None else None
    captions = Dataset.from_dict({"prompt": shapes.captions()}) if packaged and config.dataset_name is None else None
    trainer = _trainer_class(script)(
        config,
        shapes.load_pipeline() if packaged else script.model,
        [load_reward(spec) for spec in script.reward],
        train_dataset=captions,
        eval_reward_fn=[load_reward(spec) for spec in script.eval_reward] if script.eval_reward else None,
    )

    comparison = trainer.compare(
        num_prompts=script.num_report_prompts, images_per_prompt=script.images_per_report_prompt, metrics=metrics
    )
    trainer.comparison = comparison  # for the model card
    comparison.sample("before")
    if script.report_guidance_scale is not None:
        name = f"before, guidance {script.report_guidance_scale}"
        comparison.sample(name, guidance_scale=script.report_guidance_scale)

    start = time.perf_counter()
    trainer.train()  # on from the checkpoint of the option `resume_from_checkpoint`, if it is set
    seconds = time.perf_counter() - start
    trainer.save_model()
    trainer.save_state()
    comparison.complete()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        report(script, trainer, comparison, seconds)
    if config.push_to_hub:
        trainer.push_to_hub()


def report(script: RunArguments, trainer: RolloutTrainer, comparison: BeforeAfter, seconds: float) -> None:
    """Write and print what the training changed, and say where the result is."""
    output_dir, results = Path(trainer.args.output_dir), comparison.results
    figures = {name: finite(values) for name, values in results.items()}
    (output_dir / "metrics.json").write_text(json.dumps({"train_seconds": seconds, **figures}, indent=2) + "\n")
    width = max(map(len, results["after"]))
    print(" " * width, *(f"{name:>22}" for name in results))
    for metric in results["after"]:
        print(f"{metric:{width}}", *(f"{results[name][metric]:22.3f}" for name in results))
    print(
        f"\nTrained in {seconds:.0f} s. {output_dir}/ has the adapter, metrics.json with these figures, and "
        "before_after.png and reward_curve.png to look at.\n"
        f'In Python: pipeline.load_lora_weights("{output_dir}"). More images: trl-fdfo generate --model {script.model} '
        f'--adapter {output_dir} --prompts "..."'
    )


def _trainer_class(script: RunArguments) -> type[RolloutTrainer]:
    return getattr(trl_fdfo, ALGORITHMS[script.algorithm])
