"""
Prompt sets by name: `dataset_name="drawbench"`, `eval_dataset_name="geneval"`, `--prompts hpdv2`.

A set is a row of `PROMPT_SETS`. Most are published on the Hub. GenEval's prompts are made here, from the templates, classes,
colours and relations of the paper (arXiv 2310.11513, sections 3.1 and A).
"""

import difflib
import json
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, load_dataset


@dataclass(frozen=True)
class PromptSet:
    """
    Args:
        about (`str`): What the set is.
        prompts (`str`): Number of its prompts.
        licence (`str`): Licence that its publisher states.
        source (`str`): Where it comes from: arXiv number of its paper.
        hub_id (`str`, *optional*): The dataset on the Hub. None: `make` makes the rows.
        split (`str`): Its split.
        column (`str`): Column of its prompts.
        kept (`tuple[str, ...]`): Further columns that say something of a prompt.
        files (`tuple[str, ...]`): Its files in the repository, in their order. Empty: those that `datasets` finds.
        once (`bool`): Its rows are no prompts but comparisons of images: each prompt is taken once.
        make (`Callable`, *optional*): Makes the rows.
    """

    about: str
    prompts: str
    licence: str
    source: str
    hub_id: str | None = None
    split: str = "train"
    column: str = "prompt"
    kept: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    once: bool = False
    make: Callable[[], list[dict[str, Any]]] | None = None


# GenEval --------------------------------------------------------------------------------------------------------------

# The 80 classes of COCO under GenEval's names, which tell a computer's mouse and keyboard and a TV's remote from others.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The mirror image of a relation says the same of the two objects in the other order.
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
# A person has no colour.
_COLORED = CLASSES[1:]
# Singular and plural of classes that the rules of `plural` get wrong.
_NOUNS = {
    "person": ("person", "people"),
    "sheep": ("sheep", "sheep"),
    "knife": ("knife", "knives"),
    "computer mouse": ("computer mouse", "computer mice"),
    "skis": ("pair of skis", "pairs of skis"),
    "scissors": ("pair of scissors", "pairs of scissors"),
    "broccoli": ("head of broccoli", "heads of broccoli"),
}

# Prompts per task: as many as in the paper's evaluation, 553.
EVALUATED = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
# In the proportions of arXiv 2505.05470, section 5.1: position 7, counting 5, color_attr 3, colors 1, two_object 1.
TRAINED = {"position": 4480, "counting": 3200, "color_attr": 1920, "colors": 640, "two_object": 640}
# Meanings that a task has: unordered pairs of classes, and so on.
_MEANINGS = {
    "single_object": 80,
    "two_object": 80 * 79 // 2,
    "counting": 80 * 3,
    "colors": 79 * 10,
    "position": 80 * 79 * 2,
    "color_attr": 79 * 78 // 2 * 10 * 9,
}


def plural(name: str) -> str:
    """Plural of a class: `"bus"` becomes `"buses"`."""
    return _NOUNS[name][1] if name in _NOUNS else name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def with_article(name: str, color: str | None = None) -> str:
    """A class, with a colour if one is given, and its article: `"an orange bus"`."""
    words = f"{color} " * (color is not None) + _NOUNS.get(name, (name,))[0]
    return ("an " if words[0] in "aeiou" else "a ") + words


def geneval_prompts(counts: Mapping[str, int], seed: int, held_out: Collection[str] = ()) -> list[dict[str, Any]]:
    """
    Prompts in the templates of GenEval, in the order of the tasks.

    Two prompts that mean the same, such as "a cat left of a dog" and "a dog right of a cat", are one. A task with fewer
    meanings than asked for has each of them equally often, or once more often.

    Args:
        counts (`Mapping[str, int]`): Number of prompts of each task: `single_object`, `two_object`, `counting`, `colors`,
            `position`, `color_attr`.
        seed (`int`): The same seed gives the same prompts.
        held_out (`Collection[str]`): Prompts whose meanings are left out, in the columns `include` of their rows.

    Returns:
        `list[dict]`: Rows with `prompt`; `tag`, the task; and in JSON `include` and `exclude`: lists of
        `{"class", "count", "color"?, "position"?: [relation, index in include]}` that must, and must not, be in the image.
    """
    taken = {_meaning(json.loads(include)) for include in held_out}
    rows = []
    for task, count in counts.items():
        rng = random.Random(f"{seed} {task}")
        drawn: dict[Any, dict[str, Any]] = {}
        left = _MEANINGS[task] - sum(meaning[0] == task for meaning in taken)
        while len(drawn) < min(count, left):
            row = _draw(task, rng)
            meaning = _meaning(json.loads(row["include"]))
            if meaning not in taken:
                drawn.setdefault(meaning, row)
        distinct = list(drawn.values())
        rows += [distinct[number % len(distinct)] for number in range(count)]
    return rows


def _draw(task: str, rng: random.Random) -> dict[str, Any]:
    """One row of a task, at random."""
    exclude = []
    if task == "single_object":
        name = rng.choice(CLASSES)
        text, include = with_article(name), [{"class": name, "count": 1}]
    elif task == "two_object":
        names = rng.sample(CLASSES, 2)
        text, include = " and ".join(map(with_article, names)), [{"class": name, "count": 1} for name in names]
    elif task == "counting":
        name, number = rng.choice(CLASSES), rng.choice(list(NUMBERS))
        text, include = f"{NUMBERS[number]} {plural(name)}", [{"class": name, "count": number}]
        exclude = [{"class": name, "count": number + 1}]
    elif task == "colors":
        name, color = rng.choice(_COLORED), rng.choice(COLORS)
        text, include = with_article(name, color), [{"class": name, "count": 1, "color": color}]
    elif task == "position":
        (name, other), relation = rng.sample(CLASSES, 2), rng.choice(list(RELATIONS))
        text = f"{with_article(name)} {relation} {with_article(other)}"
        include = [{"class": other, "count": 1}, {"class": name, "count": 1, "position": [relation, 0]}]
    else:
        objects = list(zip(rng.sample(_COLORED, 2), rng.sample(COLORS, 2)))
        text = " and ".join(with_article(*each) for each in objects)
        include = [{"class": name, "count": 1, "color": color} for name, color in objects]
    return {
        "prompt": f"a photo of {text}",
        "tag": task,
        "include": json.dumps(include),
        "exclude": json.dumps(exclude),
    }


def _meaning(include: list[dict[str, Any]]) -> tuple:
    """The task of a row and what its image must have, in one of the orders in which it can be said."""
    first, last = include[0], include[-1]
    if "position" in last:
        relation, (name, other) = last["position"][0], (last["class"], first["class"])
        if relation in ("right of", "below"):
            relation, (name, other) = RELATIONS[relation], (other, name)
        return "position", relation, name, other
    if len(include) == 2:
        task = "color_attr" if "color" in first else "two_object"
    else:
        task = "counting" if first["count"] > 1 else "colors" if "color" in first else "single_object"
    return task, *sorted((each["class"], each["count"], each.get("color", "")) for each in include)


def _geneval() -> list[dict[str, Any]]:
    return geneval_prompts(EVALUATED, seed=0)


def _geneval_train() -> list[dict[str, Any]]:
    return geneval_prompts(TRAINED, seed=1, held_out=[row["include"] for row in _geneval()])


# The sets -------------------------------------------------------------------------------------------------------------

_STYLES = ("anime", "concept-art", "paintings", "photo")

PROMPT_SETS = {
    "drawbench": PromptSet(
        about="DrawBench, in 11 categories",
        prompts="200",
        licence="none stated",
        source="2205.11487",
        hub_id="sayakpaul/drawbench",
        column="Prompts",
        kept=("Category",),
    ),
    "parti_prompts": PromptSet(
        about="PartiPrompts (P2), by category and challenge",
        prompts="1,632",
        licence="Apache-2.0",
        source="2206.10789",
        hub_id="nateraw/parti-prompts",
        column="Prompt",
        kept=("Category", "Challenge"),
    ),
    "hpdv2": PromptSet(
        about="HPDv2's benchmark: 800 of each of four styles",
        prompts="3,200",
        licence="Apache-2.0",
        source="2306.09341",
        # `ymhao/HPDv2` has the same files beside a loading script, which `datasets` refuses.
        hub_id="zhwang/HPDv2",
        column="text",  # of a JSON list of strings, as `datasets` reads it
        files=tuple(f"benchmark/{style}.json" for style in _STYLES),
    ),
    "pickapic": PromptSet(
        about="Pick-a-Pic v1, what PickScore was trained on; unfiltered",
        prompts="those of 584k comparisons",
        licence="MIT",
        source="2305.01569",
        hub_id="yuvalkirstain/pickapic_v1_no_images",
        column="caption",
        once=True,
    ),
    "pickapic_sfw": PromptSet(
        about="the same without what is not safe for work",
        prompts="those of 336k comparisons",
        licence="MIT",
        source="2305.01569",
        hub_id="CarperAI/pickapic_v1_no_images_training_sfw",
        column="caption",
        once=True,
    ),
    "pickapic_test": PromptSet(
        about="Pick-a-Pic v1, the split test_unique",
        prompts="500",
        licence="MIT",
        source="2305.01569",
        hub_id="yuvalkirstain/pickapic_v1_no_images",
        split="test_unique",
        column="caption",
    ),
    "geneval": PromptSet(
        about="GenEval's six tasks, made here: not the paper's draw",
        prompts=f"{sum(EVALUATED.values())}",
        licence="Apache-2.0",
        source="2310.11513",
        make=_geneval,
    ),
    "geneval_train": PromptSet(
        about="GenEval to train on, without what `geneval` asks",
        prompts=f"{sum(TRAINED.values()):,}",
        licence="Apache-2.0",
        source="2310.11513",
        make=_geneval_train,
    ),
}


def load_prompt_set(name: str, prompt_column: str = "prompt", option: str = "dataset_name") -> Dataset:
    """
    The rows of a set.

    Args:
        name (`str`): A name in `PROMPT_SETS`.
        prompt_column (`str`): Name that the column of the prompts gets.
        option (`str`): Name of the option in errors.

    Raises:
        ValueError: The Hub does not give it, or it is not there as it was published.
    """
    chosen = PROMPT_SETS[name]
    if chosen.make is not None:
        return Dataset.from_list(chosen.make()).rename_columns({"prompt": prompt_column})
    try:
        dataset = load_dataset(chosen.hub_id, data_files=list(chosen.files) or None, split=chosen.split)
    except Exception as error:  # of datasets or the Hub
        raise ValueError(
            f"{option}='{name}' is {chosen.hub_id} on the Hub, which cannot be loaded ({type(error).__name__}: {error}). "
            f"Without a network, put a copy of that repository into the folder ./{chosen.hub_id}."
        ) from error
    missing = [column for column in (chosen.column, *chosen.kept) if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{option}='{name}' is {chosen.hub_id}, which has no column '{missing[0]}' but {', '.join(dataset.column_names)}: "
            "it is not as it was published."
        )
    if chosen.once:
        return Dataset.from_dict({prompt_column: dataset.unique(chosen.column)})
    return dataset.select_columns([chosen.column, *chosen.kept]).rename_columns({chosen.column: prompt_column})


def nearest_prompt_set(name: str) -> str | None:
    """The set that somebody may have meant by another name."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    return next(iter(difflib.get_close_matches(plain, PROMPT_SETS, n=1, cutoff=0.8)), None)


def prompt_set_table() -> str:
    """A table of `PROMPT_SETS`, for `--help`."""
    width = max(map(len, PROMPT_SETS))
    rows = [f"  {name:{width}}  {each.about} ({each.prompts})" for name, each in PROMPT_SETS.items()]
    return "\n".join(["prompt sets, with the number of prompts:", *rows])
