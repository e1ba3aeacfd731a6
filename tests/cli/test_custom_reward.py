import runpy
from pathlib import Path

import pytest
import torch

from trl_fdfo import shapes


EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "custom_reward.py"))
PROMPTS = ["a red circle on a gray background", "a red circle on a white background"]


def test_target_color_is_the_share_of_the_column_s_color():
    images = torch.zeros(3, 3, 8, 8)
    images[0] = torch.tensor(shapes.COLORS["red"])[:, None, None]
    images[1, :, :2] = torch.tensor(shapes.COLORS["blue"])[:, None, None]
    rewards = EXAMPLE["target_color"](images, ["red", "blue", "yellow"])
    torch.testing.assert_close(rewards, torch.tensor([1.0, 0.25, 0.0]), atol=1e-3, rtol=0)


def test_background_applies_where_the_prompt_names_it():
    images = torch.full((2, 3, 8, 8), 0.6)
    images[:, :, 1:-1, 1:-1] = 0  # what is not an edge
    assert EXAMPLE["Background"]("gray", brightness=0.8)(images, PROMPTS) == [pytest.approx(-0.2), None]
    assert EXAMPLE["Background"]("white", brightness=1.0)(images, PROMPTS) == [None, pytest.approx(-0.4)]


@pytest.mark.slow
def test_example_runs_and_its_reward_rises(tmp_path, capsys):
    torch.manual_seed(0)  # the first weights of the adapter
    EXAMPLE["main"](str(tmp_path), num_rollouts=4)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("eval_")]
    rewards = {name: (float(before), float(after)) for name, before, _, after in lines}
    assert list(rewards) == ["eval_reward", "eval_rewards/target_color/mean", "eval_rewards/Background/mean"]
    # The colours come first; the background takes the whole run.
    before, after = rewards["eval_rewards/target_color/mean"]
    assert after > before + 0.005
    assert rewards["eval_reward"][1] > rewards["eval_reward"][0] + 0.005
    # 3 is the weight of the background, which one prompt in three has.
    for total, color, background in zip(*rewards.values()):
        assert total == pytest.approx(color + 3 * background / 3, abs=0.002)
    shapes.load_pipeline().load_lora_weights(str(tmp_path))
