"""Prompts and a reward for runs of a second, and one thread: what tests, helper programs and benchmarks share."""

import gc
import os


# Before torch is imported: more threads make these tiny runs slower, and their bits depend on the number.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch


torch.set_num_threads(1)
# Accelerate collects garbage at each start of a run. The imports have left none.
gc.collect()
gc.freeze()

PROMPTS = ["a cat", "two dogs", "the sea", "red", "a box", "old man"]


def redness(images, prompts):
    return (images[:, 0] - images[:, 1:].mean(dim=1)).mean(dim=(1, 2))
