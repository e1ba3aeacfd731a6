"""
What a slow remote reward costs: wall time of a rollout with a reward that takes 0.5 s per batch, over that of one with an
instant reward. The `async` reward is awaited while the next batch is sampled; the blocking one is what that saves.

    python benchmarks/remote_reward.py

Runs the packaged pipeline, in rollouts of 20 batches, the three in turn; prints the median ratios.
"""

import argparse
import asyncio
import statistics
import tempfile
import time

from datasets import Dataset

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
            height=32,
            width=32,
            pipeline_kwargs={"max_sequence_length": 0},
            churn=0.05,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        prompts = Dataset.from_dict({"prompt": shapes.captions()})
        trainers[name] = FDFOTrainer(config, shapes.load_pipeline(), reward, prompts)
    seconds = {name: [] for name in trainers}
    for rollout in range(rounds + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer._roll_out(rollout)
            if rollout:  # the first warms up
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
