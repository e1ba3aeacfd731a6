"""
Measures what a slow remote reward costs: the wall time of a rollout with a reward that takes 0.5 s per batch, over the
time with an instant reward. The trainer awaits the `async` reward while it samples the next batch; the blocking reward
shows what that saves.

    python benchmarks/remote_reward.py

The three take turns on the packaged pipeline, in rollouts of 20 batches. Prints the median ratios.
"""

import argparse
import asyncio
import statistics
import tempfile
import time

from datasets import Dataset

from benchmarks.common import PACKAGED
from trl_fdfo import FDFOConfig, FDFOTrainer, shapes


SECONDS = 0.5  # per batch


async def remote(images, prompts):
    await asyncio.sleep(SECONDS)
    return shapes.reward(images, prompts)


def blocking(images, prompts):
    time.sleep(SECONDS)
    return shapes.reward(images, prompts)


def main(batches: int = 20, rounds: int = 5) -> None:
    rewards = {"instant": shapes.reward, "remote": remote, "blocking": blocking}
    trainers = {}
    for name, reward in rewards.items():
        config = FDFOConfig(
            output_dir=tempfile.mkdtemp(),
            prompts_per_rollout=36 * batches,
            per_device_prompt_batch_size=36,
            num_inference_steps=8,
            timestep_fraction=0.25,
            churn=0.05,
            **PACKAGED,
        )
        prompts = Dataset.from_dict({"prompt": shapes.captions()})
        trainers[name] = FDFOTrainer(config, shapes.load_pipeline(), reward, prompts)
    seconds = {name: [] for name in trainers}
    for rollout in range(rounds + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer._roll_out(rollout)
            if rollout:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    print(f"{batches} batches per rollout, {statistics.median(seconds['instant']):.1f} s with an instant reward")
    for name in ("remote", "blocking"):
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["instant"]))
        print(f"{name:10} {SECONDS} s per batch   {ratio:.2f}x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
