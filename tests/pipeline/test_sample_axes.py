import pytest
import torch

from trl_fdfo.pipeline.sample_axes import ITEMS, Together, concatenate, sample_axes, take


def batch(samples, blocks=1):
    """As a pipeline passes it: each value says which sample and block it is of."""
    values = torch.tensor([10.0 * block + n for block in range(blocks) for n in samples])
    return {
        "first axis": values[:, None].expand(-1, 3).clone(),
        "second axis": values[None, :, None].expand(2, -1, 3).clone(),
        "list": [torch.full((length + 1,), value) for length, value in enumerate(values.tolist())],
        "shapes": [[(1, 4, 4)] for _ in values],
        "positions": torch.arange(6).view(3, 2),
        "nested": ({"mask": values}, None, 3.5, "cat"),
    }


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[name], two[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return one == two


@pytest.mark.parametrize("blocks", [1, 2])
def test_axes_are_found_and_samples_taken(blocks):
    axes = sample_axes(batch([0], blocks), batch([0, 0], blocks))
    assert axes == {
        "first axis": 0,
        "second axis": 1,
        "list": ITEMS,
        "shapes": ITEMS,
        "positions": None,
        "nested": [{"mask": 0}, None, None, None],
    }
    whole = batch([5, 6, 7, 8], blocks)
    taken = take(whole, axes, [2, 0, 0], total=4)
    expected = batch([7, 5, 5], blocks)
    # A list keeps the items of the whole.
    expected["list"] = [whole["list"][4 * block + n] for block in range(blocks) for n in (2, 0, 0)]
    assert equal(taken, expected)


@pytest.mark.parametrize("blocks", [1, 2])
def test_samples_are_put_together_block_by_block(blocks):
    axes = sample_axes(batch([0], blocks), batch([0, 0], blocks))
    alone = [batch([n], blocks) for n in (5, 6, 7)]
    expected = batch([5, 6, 7], blocks)
    expected["list"] = [one["list"][block] for block in range(blocks) for one in alone]
    assert equal(concatenate(alone, axes), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_entries_of_a_sample_that_stand_together_are_taken_together(count):
    # Two images of each sample, one after the other.
    pairs = lambda samples: torch.tensor([[10.0 * image + n, 5.0] for n in samples for image in range(2)])
    axes = sample_axes(pairs(range(count)), pairs([n for n in range(count) for _ in range(2)]))
    assert axes == Together(0, 2)
    assert torch.equal(take(pairs(range(3)), axes, [2, 0, 0], 3), pairs([2, 0, 0]))
    assert torch.equal(concatenate([pairs([1]), pairs([0])], axes), pairs([1, 0]))


def test_what_is_not_there_in_this_batch_stays_away():
    assert take(None, 0, [1], total=2) is None
    assert concatenate([None, None], 0) is None


def test_offsets_stay_those_of_the_whole_batch():
    # A part of the batch is padded to the length of the whole batch's longest sample.
    axes = sample_axes(torch.tensor([0, 7, 12]), torch.tensor([0, 7, 12, 19, 24]))
    whole = torch.tensor([0, 9, 14, 16])
    assert axes is None and torch.equal(take(whole, axes, [1], total=3), whole)


def test_taken_samples_do_not_keep_the_batch_in_memory():
    whole = torch.zeros(100, 10)
    assert take(whole, 0, [3], total=100).untyped_storage().nbytes() == 40


@pytest.mark.parametrize(
    ("some", "twice"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 6)),  # two axes
        (torch.zeros(2, 3), torch.zeros(3, 3)),
        (2, 4),
        ([1], [1, 2, 3]),
        ({"a": 1}, {"b": 1}),
        (torch.zeros(1), None),
    ],
)
def test_what_cannot_be_told_is_refused(some, twice):
    with pytest.raises(ValueError, match="for twice as many samples"):
        sample_axes(some, twice)
