"""
Post-train Stable Diffusion 3 (or any diffusers flow-matching pipeline) with FDFO. The same as `trl-fdfo train`, in a file that
`accelerate launch` and `torchrun` take:

    accelerate launch examples/train_sd3.py --config shapes                        # a laptop, minutes
    accelerate launch examples/train_sd3.py --config combined                      # the paper's setting
    accelerate launch examples/train_sd3.py --config combined_guidance_2           # and with guidance
    accelerate launch examples/train_sd3.py --config pickscore \
        --reward pickscore --reward my_module:my_reward --reward_weights 1.0 2.0   # with a reward of your own

`--help` lists the options and the rewards. README.md has the same in Python: a config, a trainer and `train()`.
"""

import sys

from trl_fdfo.cli.main import main


if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
