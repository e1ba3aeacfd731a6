import json

import pytest
from datasets import Dataset

from trl_fdfo.training.prompts import check_prompts, load_prompts, names_prompts, rollout_rows


def test_packaged_prompts():
    dataset = load_prompts()
    check_prompts(dataset, "prompt")
    assert len(dataset) >= 500
    assert len(set(dataset["prompt"])) == len(dataset)


def test_local_files(tmp_path):
    rows = [{"prompt": "a cat", "kind": 1}, {"prompt": "two dogs", "kind": 2}]
    (tmp_path / "p.txt").write_text("a cat\n\ntwo dogs\n", encoding="utf-8")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_csv(tmp_path / "p.csv")
    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    for ending in ("txt", "json", "jsonl", "csv", "parquet"):
        dataset = load_prompts(str(tmp_path / f"p.{ending}"))
        assert dataset["prompt"][:] == ["a cat", "two dogs"], ending
        assert ending == "txt" or dataset["kind"][:] == [1, 2], ending
    assert load_prompts(str(tmp_path / "p.txt"), "caption").column_names == ["caption"]


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="dataset_name='nowhere.json': there is no such file"):
        load_prompts("nowhere.json")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": []}, "train_dataset is empty"),
        ({}, "no column 'prompt' but no column at all"),
        ({"text": ["a"], "label": [1]}, "no column 'prompt' but text, label. Rename .* `dataset_prompt_column`"),
        ({"prompt": ["a", "  "]}, "has '  ' as the prompt of row 1"),
        ({"prompt": ["a", None]}, "has None as the prompt of row 1"),
        ({"prompt": [1, 2]}, "has 1 as the prompt of row 0"),
    ],
)
def test_bad_datasets_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(Dataset.from_dict(columns), "prompt")


def test_what_is_no_dataset_is_refused():
    with pytest.raises(ValueError, match=r"train_dataset is a list, not a `datasets.Dataset`. From a list of prompts"):
        check_prompts(["a", "b"], "prompt")
    with pytest.raises(ValueError, match="no column 'image', which `pipeline_columns` passes"):
        check_prompts(Dataset.from_dict({"prompt": ["a"]}), "prompt", ["image"])


def test_rollouts_are_sections_of_passes_over_the_dataset():
    rows = [row for rollout in range(5) for row in rollout_rows(10, 4, rollout, seed=0)]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows[:10] != rows[10:20]


def test_rollout_larger_than_the_dataset():
    rows = rollout_rows(3, 8, 1, seed=0)
    assert len(rows) == 8
    # It starts at place 8 of the stream, the last of the third pass: then two whole passes and one more.
    assert sorted(rows[1:4]) == sorted(rows[4:7]) == [0, 1, 2]


def test_order_depends_on_the_seed():
    assert rollout_rows(100, 10, 0, seed=0) != rollout_rows(100, 10, 0, seed=1)


def test_a_long_prompt_is_no_file():
    assert not names_prompts("a red circle " * 400) and not names_prompts("a\0b")
