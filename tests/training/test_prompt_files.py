"""One line of a file is one prompt, whatever its encoding, its line ends and its words."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from trl_fdfo.training.prompts import check_prompts, is_file_name, load_prompts, plain


ROWS = [{"prompt": "a café", "kind": 1}, {"prompt": "None", "kind": 2}]
TEXTS = {
    "txt": "a café\nNone\n",
    "csv": "prompt,kind\na café,1\nNone,2\n",
    "json": json.dumps(ROWS, ensure_ascii=False),
    "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
}


def write(folder, name, text, encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder / name)


@pytest.mark.parametrize("ending", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark_are_read(tmp_path, ending, encoding):
    dataset = load_prompts(write(tmp_path, f"p.{ending}", TEXTS[ending], encoding))
    assert dataset["prompt"][:] == ["a café", "None"]
    assert ending == "txt" or dataset["kind"][:] == [1, 2]


@pytest.mark.parametrize("mark", ["utf-16-be", "utf-16-le", "utf-32-be", "utf-32-le"])
def test_both_byte_orders_are_read(tmp_path, mark):
    assert load_prompts(write(tmp_path, "p.txt", "\ufeffa café", mark))["prompt"][:] == ["a café"]


@pytest.mark.parametrize("ending", TEXTS)
def test_other_encodings_are_refused_with_the_name_and_the_line(tmp_path, ending):
    path = write(tmp_path, f"p.{ending}", TEXTS[ending], "cp1252")
    with pytest.raises(
        ValueError, match=rf"p.{ending}' is not in UTF-8: byte \d+, in line \d, is 0xe9 .*Save it as UTF-8"
    ):
        load_prompts(path)
    path = write(tmp_path, f"p.{ending}", TEXTS[ending], "utf-16-le")
    with pytest.raises(ValueError, match=rf"p.{ending}' has zero bytes.* in UTF-16, without .*iconv -f UTF-16LE"):
        load_prompts(path, name="prompts")
    path = write(tmp_path, f"p.{ending}", "\ufeff" + TEXTS[ending], "utf-16-le")
    os.truncate(path, Path(path).stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"p.{ending}' is not in UTF-16: byte \d+.*truncated"):
        load_prompts(path)


def test_lines_end_where_files_end_them(tmp_path):
    inside = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
    prompts = [f"a{sign}cat" for sign in inside]
    for end in ("\n", "\r\n", "\r"):
        text = end.join([*prompts[:4], "", "  ", *prompts[4:], ""])
        assert load_prompts(write(tmp_path, "p.txt", text))["prompt"][:] == prompts, repr(end)
    joined = write(tmp_path, "p.txt", "\ufeffa\n\ufeffb\r\n  c  \n")  # files that were put behind each other
    assert load_prompts(joined)["prompt"][:] == ["a", "b", "c"]


def test_words_of_a_csv_file_are_words(tmp_path):
    text = "prompt,target,number\nNone,NA,1\nnull,n/a,nan\nnan,,2\na,b,\n"
    rows = load_prompts(write(tmp_path, "p.csv", text))[:]
    assert rows == {
        "prompt": ["None", "null", "nan", "a"],
        "target": ["NA", "n/a", None, "b"],
        "number": [1.0, None, 2.0, None],
    }
    assert load_prompts(write(tmp_path, "p.csv", "prompt\nNone\nNA\n"))["prompt"][:] == ["None", "NA"]
    assert load_prompts(write(tmp_path, "p.csv", 'prompt\n"a\u2028cat\nor two"\n'))["prompt"][:] == [
        "a\u2028cat\nor two"
    ]


def test_an_ending_may_be_in_capitals(tmp_path):
    assert load_prompts(write(tmp_path, "P.TXT", "a"))["prompt"][:] == ["a"] and is_file_name("nowhere.CSV")


# Formats of a dataset -------------------------------------------------------------------------------------------------


COLUMNS = {"prompt": ["a", "b"], "label": [1, 2], "other": [0.5, 1.5]}


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_rows_are_python_values_whatever_the_format(form):
    rows = plain(Dataset.from_dict(COLUMNS).with_format(form))[[1, 0]]
    assert rows == {"prompt": ["b", "a"], "label": [2, 1], "other": [1.5, 0.5]}
    assert all(type(value) in (str, int, float) for values in rows.values() for value in values)


def test_a_format_keeps_its_columns():
    dataset = Dataset.from_dict(COLUMNS)
    chosen = ["prompt", "label"]
    assert plain(dataset.with_format(columns=chosen)).column_names == chosen
    assert plain(dataset.with_format("numpy", columns=chosen))[0] == {"prompt": "a", "label": 1}
    everything = dataset.with_format("numpy", columns=["label"], output_all_columns=True)
    assert plain(everything)[:] == COLUMNS
    with pytest.raises(ValueError, match="train_dataset has no column 'prompt' but label. Rename"):
        check_prompts(plain(dataset.with_format(columns=["label"])), "prompt")
    assert plain(None) is None and plain(["a"]) == ["a"]


def test_a_transform_stays():
    dataset = Dataset.from_dict(COLUMNS).with_transform(
        lambda rows: {**rows, "prompt": [p * 2 for p in rows["prompt"]]}
    )
    assert plain(dataset)[[0]]["prompt"] == ["aa"]
