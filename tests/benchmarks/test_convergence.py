"""Checks that each setting of benchmarks/convergence.py makes a trainer, and that its report has the numbers of the runs."""

import json
import math
from dataclasses import asdict, replace

import pytest

from benchmarks import convergence
from benchmarks.convergence import Run
from benchmarks.runs import load


# A run of each algorithm in the first cell that it is tuned in.
FIRST = {
    name: Run(name, *cell, *settings[0], 1)
    for name, algorithm in convergence.ALGORITHMS.items()
    for cell, settings in list(algorithm.grids.items())[:1]
}
FDFO = FIRST["FDFO"]


FIRST_LEVEL = {"FDFO, fast", "first level alone", "2 of 2 images", "2 of 6 images", "a constant learning rate"}
FIRST_LEVEL |= {f"rollouts of {steps} steps" for steps in (10, 4, 3)}
FIRST_LEVEL.add(convergence.LONGER)
CELLS = {
    *(("FDFO", 5, 0.4), *convergence.RACE, *convergence.RACE_20, *convergence.COARSE_20),
    *((name, *cell) for name in convergence.PAIR for cell in convergence.CELLS),
}


@pytest.mark.parametrize(
    "run",
    [
        *(replace(FIRST[name], steps=steps, fraction=fraction) for name, steps, fraction in sorted(CELLS)),
        *(replace(FIRST[of], ablation=name) for of, names in convergence.ABLATIONS.items() for name in names),
    ],
    ids=lambda run: run.ablation or run.cell,
)
def test_every_setting_makes_a_trainer_of_equal_size(run):
    trainer = convergence.make_trainer(run, rollouts=1)
    args = trainer.args
    assert args.prompts_per_rollout * args.num_candidates == convergence.IMAGES
    assert (
        args.per_device_prompt_batch_size * args.num_candidates == convergence.IMAGES // 6
        and args.steps_per_rollout == 6
    )
    levels = trainer.trained_levels(0, 0)
    assert len(levels) == args.num_trained_levels
    assert (set(levels) == {0}) == ((run.ablation or run.algorithm) in FIRST_LEVEL)


def made(run: Run, reward: list[float], end: float | None = None) -> dict:
    rollouts = [3 * n for n in range(len(reward))]
    result = {"run": asdict(run), "rollouts": rollouts, "reward": reward, "strict": reward, "diversity": reward}
    if end is None:
        return {**result, "failed": "WatchdogError: too bold"}
    return {**result, "end": {"reward": end, "strict_accuracy": end, "diversity/pixels": end}}


def test_when_a_reward_is_reached():
    result = made(FDFO, [0.5, 0.5, 0.7, 0.6, 0.8], 0.8)
    assert convergence.reached(result, 0.6) == pytest.approx(4.5)
    assert convergence.reached(result, 0.75) == pytest.approx(3 * 3.75)
    assert convergence.reached(result, 0.9) == math.inf
    assert convergence.final(result) == pytest.approx(0.7) and convergence.over_run(result) == pytest.approx(0.62)


def test_all_runs_are_scored_on_the_same_images():
    """Before training the reward depends on the steps of the scored images alone; coarse rollouts do not change them."""
    results = [(Run(**result["run"]), result["reward"][0]) for result in load(convergence.RUNS)]
    before = {(max(run.steps, run.use_steps), round(reward, 3)) for run, reward in results}
    assert len(before) == len({steps for steps, _ in before})


def test_report_of_made_up_runs(tmp_path, monkeypatch):
    seconds = {"FDFO, 10 steps, a quarter": 2.0, "Flow-GRPO, 10 steps, a quarter": 1.0, "Flow-GRPO, 10 steps, all": 3.0}
    seconds |= {"AWM, 10 steps, a quarter": 4.0, "FDFO, 5 steps, two fifths": 2.0, "FDFO, 20 steps, a quarter": 5.0}
    (tmp_path / "costs.json").write_text(json.dumps({"machine": "a machine", "seconds_per_rollout": seconds}))
    monkeypatch.setattr(convergence, "COSTS", tmp_path / "costs.json")
    grid = [made(replace(run), [0.5] * 3, 0.5) for run in convergence.grid()]
    best = {"FDFO": Run("FDFO", 10, 0.25, 3e-4, 0.8, 100), "Flow-GRPO": Run("Flow-GRPO", 10, 0.25, 1.2e-3, 1e-3, 100)}
    best["AWM"] = Run("AWM", 10, 0.25, 6e-4, 0.04, 100)
    bold = Run("Flow-GRPO", 10, 1.0, 2.4e-3, 4e-3, 100)
    results = [result for result in grid if Run(**result["run"]) not in {*best.values(), bold}]
    results += [made(run, [0.5, 0.6, 0.7], 0.7) for run in [*best.values(), bold]]
    results.append(made(replace(best["FDFO"], seed=1, ablation="G = 3"), [0.5, 0.5]))
    for seed in convergence.SEEDS:
        results.append(made(replace(best["FDFO"], seed=seed), [0.5, 0.6 + seed / 500, 0.9, 0.9], 0.9))
        results.append(made(replace(best["Flow-GRPO"], seed=seed), [0.5, 0.5, 0.6, 0.6], 0.6))
        results.append(made(replace(bold, seed=seed), [0.5, 0.6, 0.8, 0.8], 0.8))
        results.append(made(replace(best["AWM"], seed=seed), [0.5, 0.6, 0.7, 0.74], 0.7))
    results.append(made(replace(best["FDFO"], steps=5, fraction=0.4, seed=1), [0.5, 0.8, 0.8, 0.9], 0.9))
    results.append(made(replace(best["FDFO"], steps=20, seed=1), [0.5, 0.7, 0.8, 0.9], 0.9))
    judged = replace(best["FDFO"], use_steps=20, seed=1)
    results.append(made(judged, [0.5, 0.6, 0.7, 0.88], 0.9))
    for name, run in best.items():
        assert convergence.best(results, name, 10, 0.25) == run
        assert convergence.best(results, name, 20, 0.25) == replace(run, steps=20)
        assert convergence.best(results, name, 5, 0.4) == replace(run, steps=5, fraction=0.4)
    # Each fraction is tuned by itself.
    assert convergence.best(results, "Flow-GRPO", 20, 1.0) == replace(bold, steps=20)
    text = convergence.report(results)
    assert "| before | 0.500 | 0.500 | 0.500 |  |  |" in text
    assert "| FDFO, 10 steps, a quarter | 0.900 (0.900 to 0.900) |" in text and "Flow-GRPO, 20 steps" not in text
    # Flow-GRPO ends at 0.6 after 30 rollouts of 1 s; FDFO with seed 3 reaches that after 3 x 0.1 / 0.106 rollouts of 2 s.
    soonest = 3 * 0.1 / 0.11
    line, *_, across = (line for line in text.splitlines() if line.startswith("| times as soon"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    median = 30 / (2 * 3 * 0.1 / 0.106)
    assert cells[-1] == f"**{median:.1f}** ({30 / (2 * 3 * 0.1 / 0.102):.1f} to {30 / (2 * soonest):.1f})"
    # Flow-GRPO never reaches 0.65, so the ratio is a lower bound.
    assert cells[1] == f"> {30 / (2 * (3 + 3 * 0.044 / 0.294)):.1f}"
    # Flow-GRPO on all ends at 0.8 after 30 rollouts of 3 s; FDFO on a quarter with seed 3 reaches that after
    # 3 + 3 x 0.194 / 0.294 rollouts.
    assert f"**{30 * 3 / (2 * (3 + 3 * 0.194 / 0.294)):.1f}**" in across
    # Rollouts of 4 s and of 2 s. FDFO ends at 0.9, which its own runs reach after 6 rollouts of 2 s.
    awm = "| 0.635 (0.635 to 0.635) | 4.5 (18 s) | 6 (24 s) | never | never | never | 30 (120 s) | 5 |"
    coarse = "| 0.750 | 1.5 (3 s) | 2 (4 s) | 2.5 (5 s) | 3 (6 s) | 9 (18 s), 0.67 times as soon | 30 (60 s) | 1 |"
    # Of 20 steps there is one run, which ends at 0.85.
    twenty = (
        "| 0.725 | 2.25 (11 s) | 3 (15 s) | 4.5 (22 s) | 6 (30 s) | 7.5 (38 s), 1.00 times as soon | 30 (150 s) | 1 |"
    )
    assert f"| FDFO, 20 steps, a quarter {twenty}" in text
    # Its rollouts of 10 steps take 2 s.
    judged = (
        "| 0.670 | 4.5 (9 s) | 6 (12 s) | 6.83 (14 s) | 7.67 (15 s) | 8.5 (17 s), 2.21 times as soon | 30 (60 s) | 1 |"
    )
    assert f"| FDFO, 10 steps, a quarter, images of 20 steps {judged}" in text
    assert f"| AWM, 10 steps, a quarter {awm}" in text and f"| FDFO, 5 steps, two fifths {coarse}" in text
    assert (
        "| AWM, 10 steps, a quarter | epsilon 0.000625 | epsilon 0.0025 | epsilon 0.01 | epsilon 0.04 | epsilon 0.16 |"
        in text
    )
    assert "| G = 3 |" in text and "1, 1 of them ended by a watchdog" in text
    assert "| learning rate 0.0003 | 0.500, 0.500 | 0.500, 0.500 | 0.500, 0.500 | **0.650, 0.600** |" in text
    convergence.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
