"""Votes as a data set, and data sets that are something else."""

import pytest
from datasets import Dataset
from PIL import Image as Pictures

from trl_fdfo.preference.exports import FEATURES, export_votes, import_votes, read_votes, voted_pairs
from trl_fdfo.preference.pairs import as_png, image_id, pair_key
from trl_fdfo.preference.store import Pair, Store


RED, BLUE = (as_png(Pictures.new("RGB", (4, 4), color)) for color in ("red", "blue"))


def row(**changes):
    images = {name: {"bytes": file, "path": None} for name, file in (("chosen", RED), ("rejected", BLUE))}
    return {"prompt": "a", **images, "preference": 0.5, "votes": 2, "run": "run", "rollout": 1} | changes


def saved(folder, *rows, features=FEATURES):
    Dataset.from_list(list(rows), features=features).save_to_disk(folder)
    return folder


def test_an_export_goes_round(tmp_path):
    rows = [row(), row(prompt="b", preference=1.0, votes=1), row(prompt="c", preference=0.0)]
    assert import_votes(saved(tmp_path / "votes", *rows), tmp_path / "votes.sqlite") == 5
    assert export_votes(tmp_path / "votes.sqlite", tmp_path / "again") == 3
    again = list(voted_pairs(read_votes(tmp_path / "again")))
    assert [(prompt, preference, votes) for prompt, _, _, preference, votes in again] == [
        ("a", 0.5, 2),
        ("b", 1.0, 1),
        ("c", 0.0, 2),
    ]
    assert again[0][1:3] == (RED, BLUE)


def test_an_import_adds_votes_to_the_run_of_a_trainer(tmp_path):
    store, ids = Store(tmp_path / "votes.sqlite"), (image_id(RED), image_id(BLUE))
    run = store.open_run("run", "me", 3)
    store.add(run, "me", 1, [Pair("a", *ids)], dict(zip(ids, (RED, BLUE))))
    verdicts = lambda: store.verdicts(run, "me", [pair_key("a", *ids)])  # refused to who has lost the run
    one = saved(tmp_path / "one", row(preference=1.0, votes=1))
    other = saved(tmp_path / "other", row(chosen=row()["rejected"], rejected=row()["chosen"], preference=1.0, votes=1))
    assert import_votes(one, store._path) == 1 and not verdicts(), "one vote of three"
    assert import_votes(other, store._path) == 1 and not verdicts(), "from another folder at once"
    assert import_votes(one, store._path) == 0, "the same votes again"
    assert import_votes(saved(tmp_path / "last", row(preference=0.0, votes=1)), store._path) == 1
    [counts] = verdicts().values()
    assert counts == {"a": 1, "b": 1, "tie": 1, "expired": False}
    store.close()


def test_a_trainer_takes_an_imported_run_at_once(tmp_path):
    import_votes(
        saved(tmp_path / "votes", row(votes=2), row(prompt="b", preference=1.0, votes=1)), tmp_path / "v.sqlite"
    )
    store = Store(tmp_path / "v.sqlite")
    [pair] = store.next_pairs("ann")
    assert pair["prompt"] == "b", "it lacks one of two votes"
    assert store.open_run("run", "me", 1) and not store.next_pairs("bob")
    store.close()


def test_columns_beyond_the_pair_may_be_missing(tmp_path):
    """A pair without a preference is a vote for `chosen`; a file may lie beside the data set."""
    (tmp_path / "red.png").write_bytes(RED)
    plain = row(chosen={"bytes": None, "path": str(tmp_path / "red.png")})
    plain = {name: plain[name] for name in ("prompt", "chosen", "rejected")}
    features = FEATURES.copy()
    for name in FEATURES.keys() - plain.keys():
        del features[name]
    folder = saved(tmp_path / "votes", plain, features=features)
    assert list(voted_pairs(read_votes(folder))) == [("a", RED, BLUE, 1.0, 1)]
    assert import_votes(folder, tmp_path / "votes.sqlite", "mine") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preference": 0.3}, "preference=0.3 of 'a' is not a mean of 2 votes"),
        ({"preference": -1.0}, "preference=-1.0 and votes=2: the mean for `chosen` is in"),
        ({"preference": float("nan")}, "preference=nan"),
        ({"votes": 0}, "votes=0"),
        ({"chosen": {"bytes": b"\xff\xd8 a JPEG file", "path": None}}, "chosen image of the prompt 'a' is no PNG file"),
        ({"rejected": None}, "rejected image of the prompt 'a' is no PNG file"),
    ],
)
def test_what_was_not_exported_is_refused_and_nothing_is_added(tmp_path, changes, words):
    folder = saved(tmp_path / "votes", row(prompt="good"), row(**changes))
    with pytest.raises(ValueError, match=words):
        import_votes(folder, tmp_path / "votes.sqlite")
    assert not (tmp_path / "votes.sqlite").exists()


def test_other_data_sets_are_refused(tmp_path):
    Dataset.from_list([{"prompt": "a", "chosen": RED}]).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="no column 'rejected': it is not of exported votes"):
        read_votes(tmp_path / "one")
    Dataset.from_list([{"prompt": "a", "chosen": 1, "rejected": 2}]).save_to_disk(tmp_path / "numbers")
    with pytest.raises(ValueError, match="column 'chosen' of .* does not hold images"):
        read_votes(tmp_path / "numbers")
