"""
Trains small runs at a fixed seed (float32, one thread) and prints a checksum of each one's weights, metrics and images:

    python benchmarks/drift.py                     # the checksums of this tree
    python benchmarks/drift.py --against HEAD~3    # the same runs by that revision's package, side by side

A refactoring changes none of them. They hold for one machine and one set of libraries: processors and versions differ
in the last bits. Exits with 1 if a run differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the bits depend on the number of threads
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a cat", "two dogs", "the sea", "red", "a box", "old man"]
CLOCK = ("_time", "_runtime", "_per_second", "peak_memory", "total_flos")
# Names of FDFO's metrics in earlier revisions, and their names now.
RENAMED = {"kl": "base_distance"}


def redness(images, prompts):
    return (images[:, 0] - images[:, 1:].mean(dim=1)).mean(dim=(1, 2))


def film_redness(images, prompts):
    return (images[:, :, 0] - images[:, :, 1:].mean(dim=2)).mean(dim=(1, 2, 3))


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def config_of(output_dir: str, flow_grpo: bool = False, **options: Any):
    from trl_fdfo import FDFOConfig, FlowGRPOConfig

    shape = {
        name: options.pop(name) for name in list(options) if name.startswith("churn_") and name != "churn_schedule"
    }
    if "churn_kwargs" in FDFOConfig.__dataclass_fields__:
        shape = {"churn_kwargs": {name.removeprefix("churn_"): value for name, value in shape.items()}} if shape else {}
    defaults = {
        "output_dir": output_dir,
        "num_rollouts": 2,
        "prompts_per_rollout": 4,
        "per_device_prompt_batch_size": 2,
        "num_inference_steps": 4,
        "height": 16,
        "width": 16,
        "pipeline_kwargs": {"max_sequence_length": 8},
        "optimizer_steps_per_rollout": 2,
        "learning_rate": 1e-3,
        "lora_r": 4,
        "save_strategy": "no",
        "logging_images_steps": 0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        **({} if flow_grpo else {"churn": 0.2}),
    }
    return (FlowGRPOConfig if flow_grpo else FDFOConfig)(**{**defaults, **shape, **options})


def trainer_of(config, pipeline=None, reward=redness, columns: dict | None = None, **arguments: Any):
    import tiny_pipelines
    from datasets import Dataset

    from trl_fdfo import FDFOConfig, FDFOTrainer, FlowGRPOTrainer

    trainer = FDFOTrainer if type(config) is FDFOConfig else FlowGRPOTrainer
    dataset = Dataset.from_dict({"prompt": PROMPTS, **(columns or {})})
    return trainer(config, pipeline or tiny_pipelines.sd3(), reward, dataset, **arguments)


def checksums(trainer, images) -> dict[str, str]:
    """Checksums of the trained weights, of all logged metrics but times, and of images."""
    weights, metrics = hashlib.sha256(), []
    for name, parameter in sorted(trainer.model.named_parameters()):
        if parameter.requires_grad:
            weights.update(name.encode() + parameter.detach().numpy().tobytes())
    for log in trainer.state.log_history:
        line = {RENAMED.get(name, name): value for name, value in log.items() if not name.endswith(CLOCK)}
        metrics.append(sorted(line.items()))
    return {
        "weights": weights.hexdigest()[:16],
        "metrics": hashlib.sha256(json.dumps(metrics).encode()).hexdigest()[:16],
        "images": hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16],
    }


def plain(folder: str, reward: Callable = redness, pipeline=None, columns=None, flow_grpo=False, **options: Any):
    arguments = {name: options.pop(name) for name in ("eval_dataset", "eval_reward_fn") if name in options}
    config = config_of(folder, flow_grpo, **options)
    trainer = trainer_of(config, pipeline, reward, columns, **arguments)
    trainer.train()
    shown = {name: values[:2] for name, values in (columns or {}).items()}
    return checksums(trainer, trainer.generate(PROMPTS[:2], range(2), shown))


def evaluated(folder: str, flow_grpo: bool = False, **options: Any):
    from datasets import Dataset

    prompts = Dataset.from_dict({"prompt": PROMPTS[:3]})
    options = {"eval_strategy": "epoch", "eval_diversity": "pixels", "images_per_eval_prompt": 2, **options}
    return plain(folder, flow_grpo=flow_grpo, eval_dataset=prompts, eval_reward_fn=brightness, **options)


def killed_and_resumed(folder: str):
    """A run that is killed in its third rollout and goes on from the checkpoint of the second."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os._exit(9)

    options = {"num_rollouts": 4, "save_strategy": "epoch", "ema_decay": 0.5, "lr_scheduler_type": "cosine"}
    child = os.fork()
    if child == 0:
        trainer_of(config_of(folder, **options), callbacks=[Kill()]).train()
        os._exit(1)  # it was to be killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    trainer = trainer_of(config_of(folder, **options))
    trainer.train(resume_from_checkpoint=True)
    return checksums(trainer, trainer.generate(PROMPTS[:2], range(2)))


def video(folder: str):
    from tiny_pipelines import wan

    options = {"pipeline_kwargs": {"num_frames": 5, "max_sequence_length": 8}}
    return plain(folder, film_redness, wan.build(), **options)


def edit(folder: str):
    from PIL import Image
    from tiny_pipelines import flux_kontext

    pictures = [Image.new("RGB", (16, 16), (40 * n, 255 - 40 * n, 128)) for n in range(len(PROMPTS))]
    options = {"pipeline_columns": ["image"], "per_device_prompt_batch_size": 1}
    options["pipeline_kwargs"] = {"max_sequence_length": 8, "max_area": 256, "_auto_resize": False}
    return plain(folder, redness, flux_kontext.build(), {"image": pictures}, **options)


RUNS: dict[str, Callable[[str], dict[str, str]]] = {
    "constant churn": plain,
    "interval churn": lambda f: plain(f, churn_schedule="interval", churn=0.5, churn_width=0.7, churn_location=0.3),
    "prior churn": lambda f: plain(f, churn_schedule="prior", churn_spread=0.5),
    "three images, two passes, half of the levels": lambda f: plain(
        f, num_generations=3, num_iterations=2, timestep_fraction=0.5
    ),
    "guidance": lambda f: plain(f, guidance_scale=3.0),
    "reward gradient": lambda f: plain(f, direction="reward_gradient"),
    "beta and averaged weights, evaluated": lambda f: evaluated(f, beta=0.1, ema_decay=0.5),
    "whole transformer": lambda f: plain(f, use_peft=False, learning_rate=1e-4),
    "larger sampling batches, shared prefix": lambda f: plain(
        f, churn_schedule="interval", churn=0.5, shared_prefix=True, per_device_sampling_batch_size=4
    ),
    "Flow-GRPO": lambda f: plain(
        f, flow_grpo=True, num_generations=4, prompts_per_rollout=2, per_device_prompt_batch_size=1, epsilon=1e-3
    ),
    "Flow-GRPO, a window, beta, evaluated": lambda f: evaluated(
        f, True, num_generations=3, prompts_per_rollout=2, num_noisy_steps=2, beta=0.1, epsilon=1e-3
    ),
    "killed and resumed": killed_and_resumed,
    "video": video,
    "edited images": edit,
}


def train_all(names: list[str]) -> dict[str, dict[str, str]]:
    import torch

    torch.set_num_threads(1)
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
            shown, sys.stdout = sys.stdout, silence  # the plan of each run
            try:
                results[name] = RUNS[name](folder)
            finally:
                sys.stdout = shown
    return results


def train_by(tree: Path, names: list[str], python: str = sys.executable) -> dict[str, dict[str, str]]:
    """The runs, in a process of their own that `python` starts, by the package in another tree."""
    paths = [tree, tree / "tests" / "helpers", tree / "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [python, __file__, "--json", "--runs", *names]
    output = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REVISION", help="A revision to compare with.")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="RUN")
    parser.add_argument("--json", action="store_true", help="One line of JSON.")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(train_all(arguments.runs)))
        return 0
    results = train_by(ROOT, arguments.runs)
    others = results
    if arguments.against is not None:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder, "tree")
            subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", tree, arguments.against], check=True)
            try:
                others = train_by(tree, arguments.runs)
            finally:
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    differ = 0
    for name, checksum in results.items():
        differ += checksum != others[name]
        print(f"{name:46}", *checksum.values(), "" if checksum == others[name] else f"WAS {others[name]}")
    if arguments.against is not None:
        print(f"{differ} of {len(results)} runs differ from {arguments.against}." if differ else "No bit differs.")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
