"""
Tries a wheel as its users have it: installed into an environment of its own, used by the command alone, outside of the clone.

    python tests/helpers/try_wheel.py dist/trl_fdfo-*.whl

Ends with the first command that fails.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path


CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
# A minute each: fewer rollouts and images than those of the demo. Few images make a poor result.
SMALL = "--num_rollouts 2 --num_report_prompts 2 --images_per_report_prompt 2"
FEW = "--prompts 'a red circle' 'a blue cross' --images_per_prompt 2 --diversity pixels"
RED = "def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n"


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    # Nothing of the clone may be found.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        binaries = Path(folder, "venv", "bin")
        work = Path(folder, "work")
        work.mkdir()
        (work / "my_rewards.py").write_text(RED)

        def run(command: str, says: str = "") -> None:
            start = time.perf_counter()
            program, *arguments = shlex.split(command)
            result = subprocess.run(
                [binaries / program, *arguments], cwd=work, env=environment, text=True, capture_output=True
            )
            if result.returncode or says not in result.stdout + result.stderr:
                sys.exit(f"{command}: status {result.returncode}\n{result.stdout}{result.stderr}")
            print(f"{time.perf_counter() - start:6.1f} s  {command}", flush=True)

        venv.create(binaries.parent, with_pip=True)
        install = f"python -m pip install --quiet -c {shlex.quote(str(CONSTRAINTS))}"
        run(f"{install} torch")
        run(f"{install} {shlex.quote(f'{wheel}[examples,human]')}")
        run("trl-fdfo --help", says="recipes")
        run("trl-fdfo recipes", says="sd35_24gb")
        run(f"trl-fdfo demo {SMALL}", says="The result is in")
        run(f"trl-fdfo train --config shapes --reward my_rewards:red --output_dir red {SMALL}", says="The result is in")
        run("trl-fdfo plan --config shapes", says="memory per device")
        run("trl-fdfo generate --model shapes --adapter red --prompts 'a red circle' --seeds 1")
        run(f"trl-fdfo evaluate --model shapes --adapter red --reward my_rewards:red {FEW}", says="standard error")
        run("trl-fdfo merge --model shapes --adapter red --output merged")
        run("trl-fdfo vote --help", says="--port")
        run("trl-fdfo serve --help", says="--port")
        for file in ("red/pytorch_lora_weights.safetensors", "grid.png", "merged/model_index.json"):
            if not (work / file).is_file():
                sys.exit(f"{file} was not written: {sorted(str(each.relative_to(work)) for each in work.rglob('*'))}")
    print("The wheel works.")


if __name__ == "__main__":
    main()
