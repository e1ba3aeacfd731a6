"""
Trains a tiny SD3 for two rollouts and writes what passed between the processes meanwhile, for test_distributed.py:

    torchrun --nproc_per_node 2 tests/traffic_run.py FILE
"""

import sys
from math import prod

import distributed_run
import torch
from transformers import TrainerCallback


class Traffic(TrainerCallback):
    """Every collective of the backend, whoever calls it, as its name and how many numbers a process gives to it."""

    def __init__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.profile.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.profile.stop()

    def collectives(self) -> list[tuple[str, int]]:
        events = [event for event in self.profile.events() if event.name.startswith("gloo:")]
        return [(event.name, sum(prod(shape) for shape in event.input_shapes)) for event in events]


if __name__ == "__main__":
    traffic = Traffic()
    trainer = distributed_run.build(sys.argv[1] + ".out", save_strategy="no", eval_strategy="no")
    trainer.add_callback(traffic)
    trainer.train()
    if trainer.is_world_process_zero():
        tuples = [(batch.sampled, level) for step in trainer._buffer.steps for batch, level in step]
        result = {
            "collectives": traffic.collectives(),
            "recorded": sum(batch.x_t[level].numel() + batch.velocities[level].numel() for batch, level in tuples),
            "trained": sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
            "steps": trainer.state.global_step,
        }
        torch.save(result, sys.argv[1])
    del trainer
    distributed_run.finish()
