import pytest

from trl_fdfo.training.buffer import RolloutBuffer, ScoredBatch, trained_levels


def batch(levels):
    return ScoredBatch(sampled=None, targets=(), levels=levels, number=0)


@pytest.mark.parametrize(
    ("num_levels", "trained", "steps"), [(40, 40, 4), (40, 10, 4), (10, 4, 8), (8, 3, 9), (5, 1, 1)]
)
def test_levels_are_distinct_and_spread_over_the_schedule(num_levels, trained, steps):
    for number in range(20):
        levels = trained_levels(num_levels, trained, steps, seed=0, rollout=3, batch=number)
        assert len(set(levels)) == trained
        # One in each of K strata.
        for i, level in enumerate(sorted(levels)):
            assert i * num_levels // trained <= level < (i + 1) * num_levels // trained


def test_each_run_of_neighbouring_levels_is_shuffled_within_itself():
    seen = set()
    for number in range(20):
        levels = trained_levels(8, 8, 4, seed=0, rollout=0, batch=number)
        assert sorted(levels[:4]) == [0, 1, 2, 3] and sorted(levels[4:]) == [4, 5, 6, 7]
        seen.add(tuple(levels))
    assert len(seen) > 10


def test_levels_depend_on_seed_rollout_and_batch():
    draws = {tuple(trained_levels(40, 10, 4, *numbers)) for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(draws) == 4
    assert trained_levels(40, 10, 4, 5, 6, 7) == trained_levels(40, 10, 4, 5, 6, 7)


def test_every_unit_is_dealt_once_and_every_step_sees_every_batch():
    batches = [batch(trained_levels(8, 8, 4, 0, 0, j)) for j in range(3)]
    buffer = RolloutBuffer(0, 0, batches, optimizer_steps=4)
    assert buffer.micro_batches_per_step == 6
    dealt = [buffer[i] for i in range(24)]
    assert [micro.step for micro in dealt] == [i // 6 for i in range(24)]
    assert len({(id(micro.batch), micro.level) for micro in dealt}) == 24
    for step in range(4):
        micros = [micro for micro in dealt if micro.step == step]
        assert {id(micro.batch) for micro in micros} == {id(b) for b in batches}
        # An even spread: of each batch, one of the noisier and one of the cleaner half of the levels.
        for b in batches:
            assert sorted(micro.level // 4 for micro in micros if micro.batch is b) == [0, 1]


def test_second_pass_repeats_the_first():
    buffer = RolloutBuffer(0, 0, [batch([0, 1, 2, 3])], optimizer_steps=2)
    for i in range(4):
        assert (buffer[i].level, buffer[i].step + 2) == (buffer[i + 4].level, buffer[i + 4].step)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_steps_do_not_depend_on_the_number_of_processes(processes):
    # Three levels and six steps: no process sees every step with every batch, all of them together do the same.
    batches = [batch(trained_levels(8, 3, 6, 0, 0, j)) for j in range(8)]
    share = len(batches) // processes
    steps = [set() for _ in range(6)]
    for process in range(processes):
        own = batches[process * share : (process + 1) * share]
        buffer = RolloutBuffer(0, process * share, own, optimizer_steps=6)
        for i in range(6 * buffer.micro_batches_per_step):
            steps[buffer[i].step].add((batches.index(buffer[i].batch), buffer[i].level))
    whole = RolloutBuffer(0, 0, batches, optimizer_steps=6)
    for step in range(6):
        assert steps[step] == {(batches.index(b), level) for b, level in whole.steps[step]}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_idle_batches_are_left_out_alike_on_all_processes(processes):
    levels, steps = 3, 6
    idle = [True, False, True, True, False, True, True, True]
    batches = [batch(trained_levels(8, levels, steps, 0, 0, j)) for j in range(8)]
    share = len(batches) // processes
    computed, left_out = [set() for _ in range(steps)], []
    for process in range(processes):
        own = batches[process * share : (process + 1) * share]
        buffer = RolloutBuffer(0, process * share, own, steps, idle)
        micros = [buffer[i] for i in range(steps * buffer.micro_batches_per_step)]
        # In each step first what is left out.
        of_steps = [[micro.is_left_out for micro in micros if micro.step == step] for step in range(steps)]
        assert all(flags == sorted(flags, reverse=True) and not flags[-1] for flags in of_steps)
        left_out.append([sum(flags) for flags in of_steps])
        assert buffer.fraction_left_out == pytest.approx(sum(left_out[-1]) / len(micros))
        for micro in micros:
            if not micro.is_left_out:
                computed[micro.step].add((batches.index(micro.batch), micro.level))
    assert all(counts == left_out[0] for counts in left_out)
    whole = RolloutBuffer(0, 0, batches, steps)
    for step in range(steps):
        informative = {(batches.index(b), level) for b, level in whole.steps[step] if not idle[batches.index(b)]}
        assert informative <= computed[step] <= {(batches.index(b), level) for b, level in whole.steps[step]}
        if processes == 1:
            assert len(computed[step]) == max(1, len(informative))


def test_a_step_of_idle_batches_alone_computes_one():
    batches = [batch([0, 1, 2, 3]) for _ in range(2)]
    buffer = RolloutBuffer(0, 0, batches, 2, [True, True])
    assert [buffer[i].is_left_out for i in range(8)] == 2 * [True, True, True, False]
    assert [buffer[i + 8].is_left_out for i in range(8)] == 2 * [True, True, True, False]
    assert RolloutBuffer(0, 0, batches, 2, [False, True]).fraction_left_out == 0.5
    assert RolloutBuffer(0, 0, batches, 2).fraction_left_out == 0
