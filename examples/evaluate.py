"""
A table of rewards and diversity: a base model and adapters on it. The same as `trl-fdfo evaluate`, in a file that
`accelerate launch` takes, for several GPUs:

    accelerate launch examples/evaluate.py --model stabilityai/stable-diffusion-3.5-medium --adapter out \
        --adapter user/other-adapter --prompts held_out.txt --reward pickscore --reward hpsv2 --reward clip --reward vlm
"""

import sys

from trl_fdfo.cli.main import main


if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
