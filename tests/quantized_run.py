"""
What distributed_run.py does, of a pipeline that is loaded by its name in 8 bits:

    torchrun --nproc_per_node 2 tests/quantized_run.py FILE PIPELINE
"""

import sys

import distributed_run
import torch


if __name__ == "__main__":
    trainer, result = distributed_run.run(sys.argv[1] + ".out", make_pipeline=lambda: sys.argv[2], quantization="int8")
    if trainer.is_world_process_zero():
        torch.save(result, sys.argv[1])
    del trainer
    distributed_run.finish()
