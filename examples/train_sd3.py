"""
Post-train Stable Diffusion 3 (or any diffusers flow-matching pipeline) with FDFO:

    accelerate launch examples/train_sd3.py --config examples/recipes/shapes.yaml          # a laptop, minutes
    accelerate launch examples/train_sd3.py --config examples/recipes/combined.yaml        # the paper's setting
    accelerate launch examples/train_sd3.py --config examples/recipes/combined_guidance_2.yaml   # and with guidance
    accelerate launch examples/train_sd3.py --config examples/recipes/pickscore.yaml \
        --reward pickscore --reward my_module:my_reward --reward_weights 1.0 2.0           # with a reward of your own

    python examples/train_sd3.py --config examples/recipes/combined.yaml --plan --gpu h100  # what it would take: no weights

With `--algorithm flow_grpo` it is Flow-GRPO that trains, the baseline, with the options of `FlowGRPOConfig`; `diffusion_nft` and
`awm` are DiffusionNFT and Advantage Weighted Matching.

Every option of the recipe can be overridden on the command line; `--help` lists them and the rewards. To watch prompts and
rewards that it is not trained on: `--num_eval_prompts 64 --eval_strategy steps --eval_reward clip --eval_diversity clip`.

Writes into `output_dir` the adapter, its model card README.md with before_after.png, reward_curve.png and evaluation.png,
metrics.json, and the Trainer's logs and checkpoints.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from trl_fdfo import shapes
from trl_fdfo.cli.algorithms import ALGORITHMS
from trl_fdfo.cli.arguments import Parser, RepeatableFlag, parse
from trl_fdfo.planning.without_weights import planned
from trl_fdfo.reporting.logs import finite
from trl_fdfo.rewards.by_name import REWARDS, check_by_name, load_object, load_reward
from trl_fdfo.training.prompts import load_prompts


@dataclass
class ScriptArguments:
    algorithm: str = field(default="fdfo", metadata={"help": "What trains.", "choices": list(ALGORITHMS)})
    model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium",
        metadata={"help": "Hub id or path of the pipeline, or `shapes` for the packaged tiny one."},
    )
    reward: list[str] = field(
        default_factory=lambda: ["pickscore"],
        metadata={"help": "A reward, listed below, or module:callable. Repeat for several.", "action": RepeatableFlag},
    )
    eval_reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "A control reward: evaluated beside those trained on, never trained on. Named like a reward. Repeat "
            "for several.",
            "action": RepeatableFlag,
        },
    )
    plan: bool = field(
        default=False,
        metadata={
            "help": "Print what the run would do and the memory of its GPUs, without loading weights, and exit. With --gpu also its hours."
        },
    )
    metrics: str | None = field(
        default=None,
        metadata={"help": "A module:callable `(images, prompts) -> dict of floats` to report before and after."},
    )
    num_report_prompts: int = field(default=8, metadata={"help": "Prompts to report on, the first of the dataset."})
    images_per_report_prompt: int = field(default=4, metadata={"help": "Seeds per prompt to report on."})
    report_guidance_scale: float | None = field(
        default=None, metadata={"help": "Report the untrained pipeline with this guidance too, the free alternative."}
    )


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    # The algorithm decides which options there are.
    script, *_ = Parser(ScriptArguments, partial=True, add_help=False).parse_args_and_config(
        args, return_remaining_strings=True
    )
    trainer_class = ALGORITHMS[script.algorithm]
    config_class = planned(trainer_class.config_class) if script.plan else trainer_class.config_class
    script, config = parse((ScriptArguments, config_class), args)
    for name in ("num_report_prompts", "images_per_report_prompt"):
        if getattr(script, name) < 1:
            raise ValueError(f"{name}={getattr(script, name)} must be at least 1.")
    packaged = script.model == "shapes"
    rewards, controls = ([given] if isinstance(given, str) else given for given in (script.reward, script.eval_reward))
    if script.plan:
        for name in [*rewards, *(controls or ())]:
            check_by_name(name, REWARDS, "reward")
        prompts = load_prompts(config.dataset_name, config.dataset_prompt_column)
        model = shapes.PIPELINE_FOLDER if packaged else script.model
        print(trainer_class.plan(config, model, rewards, prompts))
        return
    metrics = load_object(script.metrics, "metrics") if script.metrics is not None else None
    captions = Dataset.from_dict({"prompt": shapes.captions()}) if packaged and config.dataset_name is None else None
    trainer = trainer_class(
        config,
        shapes.load_pipeline() if packaged else script.model,
        [load_reward(spec) for spec in rewards],
        train_dataset=captions,
        eval_reward_fn=[load_reward(spec) for spec in controls] if controls else None,
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
        output_dir, report = Path(config.output_dir), comparison.results
        figures = {name: finite(values) for name, values in report.items()}
        (output_dir / "metrics.json").write_text(json.dumps({"train_seconds": seconds, **figures}, indent=2) + "\n")
        width = max(map(len, report["after"]))
        print(" " * width, *(f"{name:>22}" for name in report))
        for metric in report["after"]:
            print(f"{metric:{width}}", *(f"{report[name][metric]:22.3f}" for name in report))
        print(f"Trained in {seconds:.0f} s. The adapter, the pictures and metrics.json are in {output_dir}/")
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
