"""
A page of images: a base model and adapters on it, side by side. The same as `trl-fdfo generate`:

    python examples/generate.py --model shapes --adapter outputs/shapes \
        --prompts "a red circle on a white background" "a cyan cross on a gray background"
"""

import sys

from trl_fdfo.cli.main import main


if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
