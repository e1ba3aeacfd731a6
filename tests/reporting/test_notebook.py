from types import SimpleNamespace

import pytest
from transformers import TrainerState


pytest.importorskip("IPython")

from trl_fdfo.reporting.notebook import NotebookProgress  # noqa: E402
from trl_fdfo.reporting.progress import show_waiting  # noqa: E402


def test_the_table_has_a_row_per_rollout_with_its_evaluation(capsys):
    args, progress = SimpleNamespace(steps_per_rollout=2, num_rollouts=2), NotebookProgress()
    state = TrainerState(max_steps=4, global_step=0)
    progress.on_train_begin(args, state, None)
    log = lambda **logs: progress.on_log(args, state, None, logs=logs)
    log(eval_reward=0.1)
    with progress.rollout_bar(0, 8) as bar:
        bar.update(4)
        bar.set_postfix_str("waits for 4")
        assert bar._bar.value == 4 and "waits for 4" in bar._bar.label
        show_waiting(bar, {"human": 3})
        assert "human waits for 3" in bar._bar.label
        bar._bar.label = "as it is"
        show_waiting(bar, {"human": 3})  # many times a second
        assert bar._bar.label == "as it is"
    for step in (1, 2):
        state.global_step = step
        progress.on_step_end(args, state, None)
        log(loss=0.0)
    log(reward=0.51234, reward_std=0.1, branch_distance=0.3, loss=0.0)
    log(eval_reward=0.2, eval_alarm=0.0)
    assert progress.training_tracker.inner_table == [
        ["rollout", "reward", "reward_std", "branch_distance", "eval_reward", "eval_alarm"],
        [0, "", "", "", "0.1"],
        [1, "0.512", "0.1", "0.3", "0.2", "0"],
    ]
    assert "rollout 1/2" in progress.training_tracker.label
    progress.on_train_end(args, state, None)
    log(eval_reward=0.3)  # after the training, in a table of its own
    assert "HTML" in capsys.readouterr().out
