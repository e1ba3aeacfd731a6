import pytest

from trl_fdfo.metric_names import deviation, part, parts, standard_error


def test_a_part_is_found_by_its_name():
    names = ["clip", "a/b", "judge_2"]
    metrics = [part(kind, name, s) for kind in ("eval_control", "control") for name in names for s in ("mean", "std")]
    assert metrics[:2] == ["eval_controls/clip/mean", "eval_controls/clip/std"]
    assert parts(["control", *metrics, "loss"], "control") == {name: f"controls/{name}/mean" for name in names}
    assert list(parts(metrics, "eval_control", "std")) == names
    assert parts(metrics, "reward") == {}


@pytest.mark.parametrize(
    ("metric", "error", "std"),
    [
        ("eval_controls/clip/mean", "eval_controls/clip/se", "eval_controls/clip/std"),
        ("diversity", "diversity_se", "diversity_std"),
        ("reward", "reward_se", "reward_std"),
    ],
)
def test_siblings(metric, error, std):
    assert (standard_error(metric), deviation(metric)) == (error, std)
