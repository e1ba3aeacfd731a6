"""Prompts, a reward, a trainer and one thread for runs of a second, shared by tests, helper programs and benchmarks."""

import gc
import os


# Set before torch is imported: more threads make these tiny runs slower, and change the last bits of their results.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from trl_fdfo import FDFOTrainer


torch.set_num_threads(1)
# Accelerate collects garbage at each start of a run, for longer than these runs take. Make it skip all imported objects.
gc.collect()
gc.freeze()

PROMPTS = ["a cat", "two dogs", "the sea", "red", "a box", "old man"]


class UnplannedTrainer(FDFOTrainer):
    """Trains without a plan: to count the operations of a new model or batch takes longer than a tiny run."""

    def run_plan(self):
        return ""


def redness(images, prompts):
    return (images[:, 0] - images[:, 1:].mean(dim=1)).mean(dim=(1, 2))
