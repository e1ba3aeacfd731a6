"""Prompt sets by name. Published ones are read from folders here that are laid out as the repositories of the Hub are."""

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny_pipelines
from datasets import Dataset, load_dataset
from tiny_runs import UnplannedTrainer, redness

from trl_fdfo import FDFOConfig, FDFOTrainer
from trl_fdfo.cli.models import read_prompts
from trl_fdfo.planning.without_weights import planned
from trl_fdfo.training.prompt_sets import (
    _COLORED,
    CLASSES,
    COLORS,
    EVALUATED,
    PROMPT_SETS,
    RELATIONS,
    TRAINED,
    geneval_prompts,
    plural,
    prompt_set_table,
    with_article,
)
from trl_fdfo.training.prompts import check_prompts, load_prompts


# Published sets -------------------------------------------------------------------------------------------------------

COMPARISONS = {"caption": ["a cat", "a dog", "a cat"], "label_0": [1.0, 0.0, 0.5], "image_0_url": ["u", "v", "w"]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`load_dataset` reads a folder of the working directory that has the name of a repository."""
    monkeypatch.chdir(tmp_path)

    def publish(repository, name, content):
        path = tmp_path / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Dataset):
            content.to_parquet(path)
        else:
            path.write_text(content)

    return publish


def publish_all(hub):
    hub("sayakpaul/drawbench", "drawbench.csv", 'Prompts,Category\nA red car.,Colors\n"One cat, two dogs.",Counting\n')
    rows = (
        "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology-inspired concepts\na bee\tAnimals\tBasic\t\n"
    )
    hub("nateraw/parti-prompts", "PartiPrompts.tsv", rows)
    hub("nateraw/parti-prompts", "README.md", "---\nlicense: apache-2.0\n---\n# PartiPrompts")
    for style in ("photo", "anime", "paintings", "concept-art"):
        hub("zhwang/HPDv2", f"benchmark/{style}.json", json.dumps([f"{style}, first", f"{style}, last"]))
    hub("zhwang/HPDv2", "benchmark/drawbench.json", json.dumps(["not of the benchmark"]))
    for split in ("train", "validation", "test_unique"):
        rows = Dataset.from_dict({**COMPARISONS, "caption": [f"{text}, {split}" for text in COMPARISONS["caption"]]})
        hub("yuvalkirstain/pickapic_v1_no_images", f"data/{split}-00000-of-00001-b138.parquet", rows)
    hub(
        "CarperAI/pickapic_v1_no_images_training_sfw",
        "pickapic_training_sfw.parquet",
        Dataset.from_dict(COMPARISONS),
    )


def test_published_sets_are_read_as_they_are_published(hub):
    publish_all(hub)
    drawbench = load_prompts("drawbench")
    assert drawbench[:] == {"prompt": ["A red car.", "One cat, two dogs."], "Category": ["Colors", "Counting"]}
    parti = load_prompts("parti_prompts", "caption")
    assert parti[1] == {"caption": "a bee", "Category": "Animals", "Challenge": "Basic"}
    styles = ("anime", "concept-art", "paintings", "photo")
    assert load_prompts("hpdv2")[:] == {
        "prompt": [f"{style}, {place}" for style in styles for place in ("first", "last")]
    }
    # Several comparisons of the images of a prompt are one prompt.
    assert load_prompts("pickapic")[:] == {"prompt": ["a cat, train", "a dog, train"]}
    assert load_prompts("pickapic_sfw")[:] == {"prompt": ["a cat", "a dog"]}
    assert load_prompts("pickapic_test")["prompt"][:] == [
        "a cat, test_unique",
        "a dog, test_unique",
        "a cat, test_unique",
    ]
    for name in PROMPT_SETS:
        check_prompts(load_prompts(name), "prompt")


def test_a_script_takes_a_set_by_name(hub):
    publish_all(hub)
    assert read_prompts(["drawbench"])["Category"][:] == ["Colors", "Counting"]
    assert read_prompts(["geneval"]).column_names == ["prompt", "tag", "include", "exclude"]
    assert read_prompts(["drawbench", "geneval"])["prompt"][:] == [
        "drawbench",
        "geneval",
    ]  # several prompts are prompts
    for name in PROMPT_SETS:
        assert name in prompt_set_table()


def test_a_set_that_is_not_there_is_refused_with_what_to_do(hub, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"eval_dataset_name='hpdv2' is zhwang/HPDv2 on the Hub.* \./zhwang/HPDv2"):
        load_prompts("hpdv2", name="eval_dataset_name")
    hub("sayakpaul/drawbench", "drawbench.csv", "Text,Category\na,b\n")
    with pytest.raises(ValueError, match="has no column 'Prompts' but Text, Category: it is not as it was published"):
        load_prompts("drawbench")


def test_a_file_or_folder_of_that_name_is_not_taken_for_the_set(hub, tmp_path):
    hub("geneval", "mine.csv", "prompt\na cat\n")
    with pytest.raises(
        ValueError, match=r"'geneval' is a prompt set, and also a file or folder here: './geneval' is that"
    ):
        load_prompts("geneval")
    assert load_prompts("./geneval")["prompt"][:] == ["a cat"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("drawbnech", "drawbench"), ("DrawBench", "drawbench"), ("partiprompts", "parti_prompts"), ("HPDv2", "hpdv2")],
)
def test_a_mistyped_name_is_told_the_nearest(hub, monkeypatch, typed, meant):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        load_prompts(typed)
    with pytest.raises(ValueError, match=f"prompts='{typed}': did you mean the prompt set '{meant}'.* a .txt file"):
        read_prompts([typed])
    with pytest.raises(ValueError, match="'nobody/nothing' is no .* The prompt sets by name: drawbench, parti_prompts"):
        load_prompts("nobody/nothing")
    assert read_prompts(["a cat"])["prompt"][:] == ["a cat"] and read_prompts(["workbench"])["prompt"][:] == [
        "workbench"
    ]


def test_the_docs_list_every_set():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for name, each in PROMPT_SETS.items():
        assert each.prompts in rows[name] and each.licence in rows[name], name
        assert each.source in rows[name] or "the same" in rows[name], name
        assert name == "pickapic_test" or (each.hub_id or "made here") in rows[name], name


# GenEval --------------------------------------------------------------------------------------------------------------


def test_classes_are_those_of_coco():
    assert len(CLASSES) == len(set(CLASSES)) == 80 and len(COLORS) == 10


@pytest.mark.parametrize(
    ("name", "color", "text", "several"),
    [
        ("dog", None, "a dog", "dogs"),
        ("apple", None, "an apple", "apples"),
        ("umbrella", "blue", "a blue umbrella", "umbrellas"),
        ("bus", "orange", "an orange bus", "buses"),
        ("toothbrush", None, "a toothbrush", "toothbrushes"),
        ("sandwich", None, "a sandwich", "sandwiches"),
        ("wine glass", None, "a wine glass", "wine glasses"),
        ("knife", None, "a knife", "knives"),
        ("person", None, "a person", "people"),
        ("sheep", None, "a sheep", "sheep"),
        ("computer mouse", None, "a computer mouse", "computer mice"),
        ("scissors", "red", "a red pair of scissors", "pairs of scissors"),
    ],
)
def test_grammar(name, color, text, several):
    assert with_article(name, color) == text and plural(name) == several


def test_geneval_has_as_many_prompts_of_each_task_as_the_paper():
    rows = load_prompts("geneval")
    assert Counter(rows["tag"]) == EVALUATED and len(rows) == 553
    assert len(set(rows["prompt"])) == 553
    singles = [json.loads(row["include"])[0]["class"] for row in rows if row["tag"] == "single_object"]
    assert sorted(singles) == sorted(CLASSES)
    # Equal columns and types in all rows: one schema, also of a file that is written and read again.
    assert {str(feature) for feature in rows.features.values()} == {"Value('string')"}


def test_a_prompt_says_what_its_columns_say():
    for row in load_prompts("geneval"):
        include, exclude, text = json.loads(row["include"]), json.loads(row["exclude"]), row["prompt"]
        names, colors = [each["class"] for each in include], [each.get("color") for each in include]
        assert set(names) <= set(CLASSES) and len(set(names)) == len(names)
        if row["tag"] == "counting":
            number = include[0]["count"]
            assert text == f"a photo of {['two', 'three', 'four'][number - 2]} {plural(names[0])}"
            assert exclude == [{"class": names[0], "count": number + 1}]
            continue
        assert exclude == [] and {each["count"] for each in include} == {1}
        if row["tag"] == "position":
            relation, index = include[1]["position"]
            assert relation in RELATIONS and index == 0 and "position" not in include[0]
            assert text == f"a photo of {with_article(names[1])} {relation} {with_article(names[0])}"
            continue
        assert text == "a photo of " + " and ".join(map(with_article, names, colors))
        if row["tag"] in ("colors", "color_attr"):
            assert set(colors) <= set(COLORS) and len(set(colors)) == len(colors) and "person" not in names
        else:
            assert set(colors) == {None}


def test_the_same_seed_gives_the_same_prompts():
    some = {"position": 20, "color_attr": 20}
    assert geneval_prompts(some, seed=3) == geneval_prompts(some, seed=3) != geneval_prompts(some, seed=4)
    assert load_prompts("geneval")["prompt"][80] == "a photo of a hot dog and a pair of scissors"


def test_training_prompts_mean_nothing_that_is_evaluated():
    rows = load_prompts("geneval_train")
    assert Counter(rows["tag"]) == TRAINED
    assert [count / 640 for count in TRAINED.values()] == [7, 5, 3, 1, 1]

    def said(row):  # what the image must have, whichever object is named first
        mirrored = []
        for each in json.loads(row["include"]):
            each.pop("position", None)
            mirrored.append(tuple(sorted(each.items())))
        words = [word for word in RELATIONS if f" {word} " in row["prompt"]]
        axis = {"left of": "x", "right of": "x", "above": "y", "below": "y"}
        first = (
            mirrored if words and words[0] in ("left of", "above") else mirrored[::-1] if words else sorted(mirrored)
        )
        return row["tag"], tuple(first), axis[words[0]] if words else None

    evaluated = {said(row) for row in load_prompts("geneval")}
    trained = Counter(said(row) for row in rows)
    assert len(evaluated) == 553 and not evaluated & trained.keys()
    # There are 240 prompts that count. Those not evaluated, 160, are there equally often; the others are there once.
    assert {task: {n for key, n in trained.items() if key[0] == task} for task in TRAINED} == {
        "position": {1},
        "counting": {20},
        "color_attr": {1},
        "colors": {1},
        "two_object": {1},
    }


def test_a_task_ends_when_all_that_it_can_mean_is_said():
    for task, number in {"single_object": 80, "two_object": 3160, "counting": 240, "colors": 790}.items():
        rows = geneval_prompts({task: 2 * number}, seed=0)
        assert set(Counter(row["prompt"] for row in rows).values()) == {2} and len(rows) == 2 * number
    assert len(_COLORED) == 79


def test_the_published_list_is_read_from_its_file(tmp_path):
    include = [{"class": "bench", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    rows = [
        {"tag": "single_object", "include": include[:1], "prompt": "a photo of a bench"},
        {"tag": "position", "include": include, "prompt": "a photo of a dog left of a bench"},
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_prompts(str(tmp_path / "evaluation_metadata.jsonl"))["include"][:] == [include[:1], include]
    # What is made here is one schema, in a file too.
    load_prompts("geneval").to_json(tmp_path / "made.jsonl")
    read = load_dataset("json", data_files=str(tmp_path / "made.jsonl"), split="train")
    assert read[0] == load_prompts("geneval")[0]


# A run ----------------------------------------------------------------------------------------------------------------


def test_a_run_trains_and_evaluates_on_sets_by_name(hub, make_config):
    publish_all(hub)
    seen = {}

    def reward(images, prompts, include=None):
        seen.update(zip(prompts, include or [None] * len(prompts)))
        return redness(images, prompts)

    config = make_config(
        num_rollouts=1, dataset_name="geneval_train", eval_dataset_name="drawbench", eval_strategy="epoch"
    )
    trainer = UnplannedTrainer(config, tiny_pipelines.sd3(), reward)
    trainer.train()
    evaluated = {"A red car.", "One cat, two dogs."}
    asked = dict(zip(trainer.train_dataset["prompt"], trainer.train_dataset["include"]))
    assert evaluated < seen.keys() and len(seen) == 2 + 4
    assert all(seen[prompt] == asked.get(prompt) for prompt in seen)
    trainer.create_model_card()
    card = Path(config.output_dir, "README.md").read_text()
    assert "`geneval_train`" in card and "huggingface.co/datasets" not in card
    UnplannedTrainer(make_config(dataset_name="drawbench"), tiny_pipelines.sd3(), redness).create_model_card()
    assert "https://huggingface.co/datasets/sayakpaul/drawbench" in Path(config.output_dir, "README.md").read_text()


def test_a_plan_counts_the_prompts_of_the_set(make_config, tmp_path):
    tiny_pipelines.sd3().save_pretrained(tmp_path / "pipeline")
    given = make_config()
    names = ("output_dir", "height", "width", "num_inference_steps", "pipeline_kwargs", "report_to", "use_cpu")
    config = planned(FDFOConfig)(**{name: getattr(given, name) for name in names}, eval_dataset_name="geneval")
    plan = FDFOTrainer.plan(config, tmp_path / "pipeline", [], Dataset.from_dict({"prompt": ["a cat"]}))
    assert plan.eval_prompts == 553
