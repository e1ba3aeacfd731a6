"""
All bad input that a user can give, in one table. A row is a mistake and words of its error: the value received, what it
breaks, what to do instead. Every mistake is refused before anything is sampled: at most one step of one batch has been
rehearsed and replayed. Faults that only a run can show, such as the values of a reward, are tested where they are checked.

The table follows a user, in this order:

    starting a run, choosing a pipeline, the arguments of its call, prompts, rewards,
    setting up rollouts, updates, the weights to train, the evaluation,
    saving memory and time, logging, saving and resuming,
    calling evaluate or generate, comparing before and after, typing a command line, writing a recipe
"""

import contextlib
import inspect
import shutil
from pathlib import Path

import datasets
import pytest
import tiny_pipelines
import torch
from datasets import Dataset
from diffusers import (
    AsymmetricAutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from tiny_pipelines import ltx
from tiny_runs import PROMPTS, redness
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CLIPTextModel, EarlyStoppingCallback, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from trl_fdfo import FDFOConfig, FDFOTrainer
from trl_fdfo.cli import train as command
from trl_fdfo.rewards import JPEGCompressibility, PairwiseJudge


class User:
    """
    A user whose input is right in everything that a row does not give.

    Args:
        made (`Path`): A folder with a saved `pipeline`, the output `run` of one rollout, and `weights`, the output of
            the same rollout with `save_only_model`.
    """

    def __init__(self, made: Path):
        self.made = made

    def config(self, **options):
        """The paper's setting, so that messages have the paper's numbers."""
        return FDFOConfig(**{"output_dir": "unused", "report_to": [], "use_cpu": True, **options})

    def trainer(self, config=None, pipeline=None, reward_fn=redness, train_dataset=PROMPTS, **given):
        """`given` has arguments of the trainer by name; everything else in it is an option of the config."""
        arguments = {name: given.pop(name) for name in inspect.signature(FDFOTrainer).parameters if name in given}
        if train_dataset is PROMPTS:
            train_dataset = Dataset.from_dict({"prompt": PROMPTS})
        return FDFOTrainer(
            config if config is not None else self.config(**{**TINY, **given}),
            pipeline() if inspect.isfunction(pipeline) else tiny_pipelines.sd3() if pipeline is None else pipeline,
            reward_fn,
            train_dataset,
            **arguments,
        )

    def train(self, **given):
        self.trainer(**given).train()

    def resume(self, checkpoint, run="run", **given):
        shutil.copytree(self.made / run, run)
        self.trainer(**{**RUN, "output_dir": run, **given}).train(resume_from_checkpoint=checkpoint)

    def script(self, *flags, recipe=None, **options):
        """Run the script with flags and with `recipe` as its YAML file. None takes an option away."""
        options = {**TINY, **SCRIPT_OPTIONS, "model": self.made / "pipeline", **options}
        arguments = [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]
        if recipe is not None:
            Path("recipe.yaml").write_text(recipe)
            arguments = ["--config", "recipe.yaml", *arguments]
        command.main([*arguments, *flags])


TINY = {
    "output_dir": "out",
    "num_rollouts": 1,
    "prompts_per_rollout": 2,
    "per_device_prompt_batch_size": 1,
    "num_inference_steps": 2,
    "optimizer_steps_per_rollout": 1,
    "height": 16,
    "width": 16,
    "churn": 0.2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
}
RUN = {"save_strategy": "epoch", "use_peft": False, "optim": "sgd"}
SCRIPT_OPTIONS = {
    "reward": "mine:reward",
    "dataset_name": "prompts.csv",
    "use_cpu": "true",
    "report_to": "none",
    "num_report_prompts": 1,
    "images_per_report_prompt": 1,
}
FILES = {
    "prompts.csv": "prompt,label\na cat,1\ntwo dogs,3\n",
    "numbers.csv": "prompt\n1\n2\n",
    "none.csv": "prompt,label\n,1\nb,2\n",
    "other.csv": "text;label\na;1\n",
    "header.csv": "prompt\n",
    "empty.txt": "\n \n",
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a"}\n{"pro',
    "broken.parquet": "x",
    "prompts.xlsx": "x",
    "mine.py": ("number = 5\n\ndef reward(images):\n    return images.mean(dim=(1, 2, 3))\n"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tiny_pipelines.sd3().save_pretrained(folder / "pipeline")
    User(folder).train(**RUN, output_dir=str(folder / "run"))
    User(folder).train(**RUN, output_dir=str(folder / "weights"), save_only_model=True)
    return folder


@pytest.fixture
def user(tmp_path, made, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return User(made)


@contextlib.contextmanager
def transformer_calls():
    """Count the calls of every transformer of a pipeline. The plan's calls do not count: its tensors have no data."""
    calls = []
    names = ("SD3Transformer2DModel", "UNet2DConditionModel")

    def record(module, args):
        if type(module).__name__ in names and not isinstance(next(module.parameters()), FakeTensor):
            calls.append(module)

    hook = register_module_forward_pre_hook(record)
    try:
        yield calls
    finally:
        hook.remove()


def prompts(*values, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": list(values or PROMPTS), **columns})


# Input ----------------------------------------------------------------------------------------------------------------


def config(**options):
    return lambda user: user.config(**options)


def trainer(**given):
    return lambda user: user.trainer(**given)


def train(**given):
    return lambda user: user.train(**given)


def evaluate(*args, **given):
    return lambda user: user.trainer(**given).evaluate(*args)


def generate(*args, given=None, **call):
    return lambda user: user.trainer(**(given or {})).generate(*args, **call)


def compare(**options):
    return lambda user: user.trainer().compare(**options)


def assign(name, value):
    return lambda user: setattr(user.trainer(), name, value)


def resume(checkpoint, **given):
    return lambda user: user.resume(checkpoint, **given)


def script(*flags, **options):
    return lambda user: user.script(*flags, **options)


def sd3(change=lambda pipeline: None, **components):
    """A tiny SD3 with some components replaced; `change` edits it in place."""

    def make():
        pipeline = tiny_pipelines.sd3()
        pipeline = type(pipeline)(**{**pipeline.components, **components})
        change(pipeline)
        return pipeline

    return make


def unet():
    tokenizer = tiny_pipelines.clip_tokenizer()
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    return StableDiffusionPipeline(
        vae=tiny_pipelines.vae(),
        text_encoder=tiny_pipelines.clip_encoder(tokenizer, CLIPTextModel),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(block_out_channels=[8], cross_attention_dim=16, norm_num_groups=4, **blocks),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def needs_label(images, label):
    return [0.0] * len(images)


def positional(images, prompts, /):
    return [0.0] * len(images)


def judge(first, second, prompts):
    return [0.0] * len(prompts)


def lora(**options):
    return LoraConfig(**{"r": 4, "target_modules": ["to_q"], **options})


SIZED = {"pipeline_columns": ["height"], "height": None, "train_dataset": prompts("a", height=[16])}
EVALUATION = {"eval_dataset": prompts(), "eval_strategy": "epoch", "save_strategy": "epoch"}
FOREIGN = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])


def bad(bad_input, *words, error=ValueError):
    """
    A row of the table.

    Args:
        bad_input (`Callable`): The mistake of a `user`.
        *words (`str`): Substrings of the message: the value received, what it breaks, what to do instead.
        error (`type`): The class of the exception.
    """
    return pytest.param(bad_input, words, error, id=words[0].replace(" ", "_"))


TABLE = [
    # Starting a run: config, output directory, seed, precision --------------------------------------------------------
    bad(
        lambda user: FDFOTrainer(TrainingArguments("out", use_cpu=True), tiny_pipelines.sd3(), redness),
        "config is of TrainingArguments",
        "FDFOTrainer takes a `FDFOConfig`",
    ),
    bad(trainer(config={"num_rollouts": 3}), "config is of dict", "FDFOTrainer takes a `FDFOConfig`"),
    bad(
        config(prompts_per_rolout=4),
        "no option prompts_per_rolout=4",
        "Did you mean `prompts_per_rollout`",
        error=TypeError,
    ),
    bad(config(output_dir="prompts.csv"), "output_dir='prompts.csv' is a file", "take another name"),
    bad(config(output_dir=""), "output_dir='' is no folder", "between the files of the working directory", "name one"),
    bad(config(seed="3"), "seed='3' is a str", "must be int"),
    bad(trainer(seed=-1), "seed=-1", "must be"),
    bad(
        lambda user: setattr(user.config(), "num_rollout", 7),
        "FDFOConfig has no option num_rollout=7",
        "Did you mean `num_rollouts`",
        error=AttributeError,
    ),
    bad(trainer(callbacks=[3]), "callbacks has 3, which is no `TrainerCallback`", "subclass it"),
    bad(trainer(callbacks=[int]), "callbacks has <class 'int'>, which is no `TrainerCallback`"),
    bad(trainer(callbacks=EarlyStoppingCallback()), "callbacks is a EarlyStoppingCallback, not a list"),
    bad(trainer(seed=2**32), "seed=4294967296", "must be"),
    bad(config(bf16="yes"), "bf16='yes' is a str", "must be bool | None"),
    bad(config(fp16=True, bf16=True), "At most one of fp16 and bf16", "can be True"),
    # Choosing a pipeline ----------------------------------------------------------------------------------------------
    bad(trainer(pipeline=int), "not int itself", "must be a `DiffusionPipeline`, or the Hub id or path of one"),
    bad(trainer(pipeline=5), "not a int", "must be a `DiffusionPipeline`, or the Hub id or path of one"),
    bad(
        trainer(pipeline=lambda: None), "not a NoneType", "must be a `DiffusionPipeline`, or the Hub id or path of one"
    ),
    bad(
        trainer(pipeline=lambda: tiny_pipelines.sd3().transformer),
        "not a SD3Transformer2DModel",
        "must be a `DiffusionPipeline`, or the Hub id or path of one",
    ),
    bad(
        trainer(pipeline="nowhere"),
        "pipeline='nowhere' cannot be loaded: ",
        "a folder that diffusers' `save_pretrained` wrote",
        error=OSError,
    ),
    bad(trainer(pipeline="folder"), "folder", "no file named model_index.json", error=OSError),
    bad(trainer(pipeline=lambda: Path("folder")), "no file named model_index.json", error=OSError),
    bad(trainer(pipeline=unet), "StableDiffusionPipeline cannot be trained", "not a flow-matching", "Take a pipeline"),
    bad(
        trainer(pipeline=sd3(transformer=None)),
        "StableDiffusion3Pipeline has no `transformer`",
        "whose velocity would be trained",
    ),
    bad(
        trainer(pipeline=sd3(scheduler=DDIMScheduler())),
        "StableDiffusion3Pipeline cannot be trained: DDIMScheduler",
        "is not a flow-matching scheduler",
        "Take a pipeline whose scheduler is",
    ),
    bad(
        trainer(pipeline=sd3(scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))),
        "`stochastic_sampling=True`",
        "changes the sampler that a rollout replaces",
        "register_to_config(stochastic_sampling=False)",
    ),
    bad(trainer(pipeline=sd3(scheduler=None)), "has no scheduler", "load it whole"),
    bad(trainer(pipeline=sd3(vae=None)), "has no vae", "load it whole"),
    bad(trainer(pipeline=sd3(text_encoder=None)), "cannot be called with", "NoneType"),
    # Choosing the arguments of the pipeline's call --------------------------------------------------------------------
    bad(config(height="32"), "height='32' is a str", "must be int | None"),
    bad(trainer(height=30), "height=30", "is not a multiple of 4", "28 and 32"),
    bad(trainer(width=-16), "width=-16", "is not a multiple of 4", "4 and 8"),
    bad(trainer(height=512, width=512), "cannot be called with", "'height': 512", "Height (128) cannot be greater"),
    bad(
        trainer(height=512, width=512, per_device_prompt_batch_size=2),
        "cannot be called with",
        "Height (128) cannot be greater",
    ),
    bad(config(pipeline_kwargs="{'a': 1"), "pipeline_kwargs=\"{'a': 1\"", "is not valid JSON"),
    bad(config(pipeline_kwargs="[1]"), "pipeline_kwargs=[1]", "must be a dict of arguments of the call"),
    bad(config(pipeline_kwargs=[1]), "pipeline_kwargs=[1] is a list", "must be dict"),
    bad(config(pipeline_kwargs={1: 2}), "pipeline_kwargs has 1 as a name", "are strings"),
    bad(config(pipeline_kwargs={"height": 64}), "height=64", "set the option `height` instead"),
    bad(config(pipeline_kwargs={"guidance_scale": 2}), "guidance_scale=2", "set the option `guidance_scale` instead"),
    bad(config(pipeline_kwargs={"generator": 1}), "generator=1", "which the trainer sets itself"),
    bad(config(pipeline_kwargs={"latents": None}), "latents=None", "which the trainer sets itself"),
    bad(config(pipeline_kwargs={"num_images_per_prompt": 4}), "num_images_per_prompt=4", "which the trainer sets"),
    bad(config(pipeline_kwargs={"negative_prompt": ["a"]}), "negative_prompt=['a']", "one string for all prompts"),
    bad(trainer(pipeline_kwargs={"steps": 3}), "StableDiffusion3Pipeline does not take steps", "It takes: prompt, "),
    bad(trainer(pipeline_kwargs={"max_sequence_length": 1000}), "max_sequence_length", "greater than 512 but is 1000"),
    bad(
        trainer(pipeline_kwargs={"sigmas": [1.0, 0.8, 0.5]}),
        "takes 3 steps, not num_inference_steps=2",
        "sets a schedule of its own",
        "Set the option to that",
    ),
    bad(trainer(pipeline_kwargs={"clip_skip": 10}), "clip_skip", "10"),
    bad(config(eval_pipeline_kwargs="{'a': 1"), "eval_pipeline_kwargs=\"{'a': 1\"", "is not valid JSON"),
    bad(config(eval_pipeline_kwargs={"num_inference_steps": 0}), "eval_pipeline_kwargs has num_inference_steps=0"),
    bad(config(eval_pipeline_kwargs={"generator": 1}), "eval_pipeline_kwargs has generator=1", "trainer sets itself"),
    bad(
        config(eval_pipeline_kwargs={"width": 8}, pipeline_columns=["width"], per_device_prompt_batch_size=1),
        "eval_pipeline_kwargs has width=8, and pipeline_columns takes `width` from each row: leave one of them out",
    ),
    bad(
        trainer(eval_pipeline_kwargs={"steps": 3}),
        "eval_pipeline_kwargs={'steps': 3}, the arguments of an evaluation: StableDiffusion3Pipeline does not take steps",
    ),
    bad(
        trainer(pipeline_kwargs={"sigmas": [1.0, 0.5]}, eval_pipeline_kwargs={"num_inference_steps": 5}),
        "eval_pipeline_kwargs={'num_inference_steps': 5}, the arguments of an evaluation: num_inference_steps=5 would change "
        "nothing: `sigmas`, which has 2 values, sets the steps",
        "Give sigmas=None beside it",
    ),
    bad(
        trainer(
            pipeline=ltx.build,
            height=32,
            width=32,
            pipeline_kwargs={"num_frames": 9, "max_sequence_length": 16},
            eval_pipeline_kwargs={"frame_rate": 50},
        ),
        "eval_pipeline_kwargs={'frame_rate': 50} makes videos of 50 frames per second",
        "rewards are told the 25 of the rollouts",
    ),
    bad(trainer(eval_pipeline_kwargs={"height": 17}), "eval_pipeline_kwargs={'height': 17}", "17"),
    bad(trainer(eval_pipeline_kwargs={"guidance_scale": "4"}), "eval_pipeline_kwargs={'guidance_scale': '4'}", "'str'"),
    # A callback returns the tensors that it was given.
    bad(trainer(pipeline_kwargs={"callback_on_step_end": "x"}), "callback_on_step_end", "'str' object is not callable"),
    bad(trainer(pipeline_kwargs={"callback_on_step_end": print}), "callback_on_step_end", "has no attribute 'pop'"),
    # Choosing prompts -------------------------------------------------------------------------------------------------
    bad(trainer(train_dataset=["a"]), "train_dataset is a list", "not a `datasets.Dataset`", "`Dataset.from_dict({"),
    bad(trainer(train_dataset="prompts.csv"), "train_dataset is a str", "not a `datasets.Dataset`"),
    bad(trainer(train_dataset=datasets.DatasetDict(test=prompts())), "train_dataset is a DatasetDict", "['test']"),
    bad(
        trainer(train_dataset=prompts().to_iterable_dataset()),
        "train_dataset is a IterableDataset",
        "not a `datasets.Dataset`",
    ),
    bad(
        trainer(train_dataset=prompts().select([])), "train_dataset is empty", "there is no prompt to sample images of"
    ),
    bad(trainer(dataset_prompt_column="caption"), "no column 'caption' but prompt", "set `dataset_prompt_column`"),
    bad(trainer(train_dataset=prompts("a", None)), "None as the prompt of row 1", "prompts must be non-empty text"),
    bad(trainer(train_dataset=prompts("a", " ")), "' ' as the prompt of row 1", "prompts must be non-empty text"),
    bad(trainer(train_dataset=prompts(1, 2)), "1 as the prompt of row 0", "prompts must be non-empty text"),
    bad(trainer(train_dataset=prompts(["a"], ["b"])), "['a'] as the prompt of row 0", "prompts must be non-empty text"),
    bad(
        trainer(train_dataset=prompts("a", images=[1])),
        "train_dataset has a column 'images'",
        "a name that rewards get something else by",
        "rename it",
    ),
    bad(trainer(dataset_name="prompts.csv"), "dataset_name='prompts.csv' was given together with a train_dataset"),
    *(
        bad(trainer(train_dataset=None, dataset_name=name), *words)
        for name, *words in [
            ("empty.txt", "train_dataset is empty", "no prompt to sample"),
            ("numbers.csv", "1 as the prompt of row 0", "prompts must be non-empty text"),
            ("none.csv", "None as the prompt of row 0", "prompts must be non-empty text"),
            ("other.csv", "no column 'prompt' but text;label", "`dataset_prompt_column`"),
            ("empty.jsonl", "dataset_name='empty.jsonl' cannot be read as jsonl"),
            ("header.csv", "dataset_name='header.csv' cannot be read as csv"),
            ("broken.jsonl", "dataset_name='broken.jsonl' cannot be read as jsonl"),
            ("broken.parquet", "dataset_name='broken.parquet' cannot be read as parquet"),
            ("prompts.xlsx", "dataset_name='prompts.xlsx' is a file of another kind", ".csv", "save it as one of them"),
        ]
    ),
    bad(
        trainer(train_dataset=None, dataset_name="nowhere.csv"),
        "dataset_name='nowhere.csv'",
        "there is no such file",
        error=FileNotFoundError,
    ),
    *(
        bad(
            trainer(train_dataset=None, dataset_name=name),
            f"dataset_name='{name}' is no .txt, .json, .jsonl, .csv, .parquet file",
            "cannot be loaded as a folder with a dataset, or the Hub id of one",
        )
        for name in ("folder", ".", "", "prompts.xml")
    ),
    # The columns that go to the pipeline:
    bad(config(pipeline_columns="image"), "pipeline_columns='image' is a str", "must be list[str]"),
    bad(config(pipeline_columns=["guidance_scale"]), "pipeline_columns has 'guidance_scale'", "one value for all"),
    bad(config(pipeline_columns=["latents"]), "pipeline_columns has 'latents'", "which the trainer sets itself"),
    bad(
        config(pipeline_columns=["image"]),
        "pipeline_columns=['image'] needs per_device_prompt_batch_size=1, not 2",
        "prompts would be trained with the images of others",
    ),
    bad(
        trainer(pipeline_columns=["image"]),
        "train_dataset has no column 'image'",
        "which `pipeline_columns` passes to the pipeline",
    ),
    bad(
        trainer(pipeline_columns=["image"], train_dataset=prompts("a", image=["b"])),
        "StableDiffusion3Pipeline does not take image in its call",
        "It takes: prompt, ",
    ),
    # Choosing rewards -------------------------------------------------------------------------------------------------
    bad(trainer(reward_fn=[]), "reward_fn is empty", "give at least one reward function"),
    bad(trainer(reward_fn=None), "reward_fn=None is a NoneType", "not a callable `(images, prompts, **columns)"),
    bad(trainer(reward_fn=[redness, 1.0]), "reward_fn=1.0 is a float", "not a callable `(images, prompts, **columns)"),
    bad(trainer(reward_fn=JPEGCompressibility), "has the class JPEGCompressibility", "construct it"),
    bad(trainer(reward_fn="pickscore"), "reward_fn='pickscore' is a str", "not a callable", "load_reward('pickscore')"),
    bad(trainer(reward_fn=["pickscore"]), "reward_fn='pickscore'", "load_reward('pickscore')"),
    bad(trainer(reward_fn=max), "Reward 'max' does not say which arguments it takes", "Wrap it: `def max("),
    bad(trainer(reward_fn=positional), "'positional' takes 'images' by position only", "called by keyword", "Wrap it"),
    bad(
        trainer(reward_fn=lambda imgs, prompts: 0),
        "'<lambda>' needs the argument 'imgs'",
        "train_dataset has no such column",
        "images, prompts, trainer_state, num_generations, videos, audio, frame_rate, sampling_rate, prompt",
    ),
    # Their weights:
    bad(config(reward_weights=2.0), "reward_weights=2.0 is a float", "must be list[float]"),
    bad(config(reward_weights=["a"]), "reward_weights=['a'] is a list", "must be list[float]"),
    bad(config(reward_weights=[float("nan")]), "reward_weights=[nan] must be finite"),
    bad(config(reward_weights=[0.0]), "reward_weights=[0.0]", "leaves nothing to learn from"),
    bad(trainer(reward_weights=[1.0, 2.0]), "reward_weights has 2 values for 1 reward function(s)", "give one each"),
    # A judge:
    bad(lambda user: PairwiseJudge("vlm"), "'vlm' is not a callable", error=TypeError),
    # Setting up rollouts ----------------------------------------------------------------------------------------------
    bad(config(num_rollouts="10"), "num_rollouts='10' is a str", "must be int"),
    bad(config(num_rollouts=2.5), "num_rollouts=2.5 is a float", "must be int"),
    bad(config(num_rollouts=None), "num_rollouts=None is a NoneType", "must be int"),
    bad(config(num_rollouts=0), "num_rollouts=0", "must be at least 1"),
    bad(config(prompts_per_rollout=0), "prompts_per_rollout=0", "must be at least 1"),
    bad(config(per_device_prompt_batch_size=-1), "per_device_prompt_batch_size=-1", "must be at least 1"),
    bad(
        config(prompts_per_rollout=430, per_device_prompt_batch_size=4),
        "prompts_per_rollout=430 cannot be split evenly over 1 process(es) x per_device_prompt_batch_size=4",
        "The nearest that can: 428 and 432",
    ),
    bad(config(num_inference_steps=0), "num_inference_steps=0", "must be at least 1"),
    bad(
        config(num_generations=1),
        "num_generations=1",
        "the model learns from the difference between the images",
        "at least 2",
    ),
    # The churn:
    bad(config(churn=float("nan")), "churn=nan", "must be"),
    bad(config(churn=float("inf")), "churn=inf", "finite"),
    bad(config(churn=-0.1), "churn=-0.1 must be in [0, 10]"),
    bad(config(churn=100.0), "churn=100.0 must be in [0, 10]"),
    bad(config(churn=0.0), "churn=0", "leaves the images of a prompt identical", "setting is 0.0025"),
    bad(config(churn_schedule="linear"), "churn_schedule='linear'", "is not one of constant, interval, prior"),
    bad(config(churn_schedule="interval", churn_kwargs={"width": 0.0}), "churn_kwargs has width=0.0", "must be > 0"),
    bad(config(churn_schedule="prior", churn_kwargs={"spread": -1.0}), "spread=-1.0", "must not be negative"),
    bad(config(churn_schedule="interval", churn_kwargs={"location_std": -1.0}), "location_std=-1.0", "not be negative"),
    bad(
        trainer(num_inference_steps=1, churn_schedule="interval"), "churn_schedule='interval'", "num_inference_steps=1"
    ),
    bad(
        config(shared_prefix=True),
        "shared_prefix=True has nothing to share under churn_schedule='constant'",
        "or churn_schedule='interval'",
    ),
    # Setting up updates -----------------------------------------------------------------------------------------------
    bad(config(optimizer_steps_per_rollout=0), "optimizer_steps_per_rollout=0", "must be at least 1"),
    bad(
        config(prompts_per_rollout=6, num_inference_steps=5, optimizer_steps_per_rollout=4),
        "3 rollout batches per process x 5 trained noise levels = 15 micro-batches",
        "cannot be split into optimizer_steps_per_rollout=4 equal steps",
        "optimizer_steps_per_rollout=3 or 5, or prompts_per_rollout=8 or 16",
    ),
    bad(config(num_iterations=True), "num_iterations=True is a bool", "must be int"),
    bad(config(num_iterations=0), "num_iterations=0", "must be at least 1"),
    bad(config(timestep_fraction=0.0), "timestep_fraction=0.0", "must be in (0, 1]", "1 trains on all levels"),
    bad(config(timestep_fraction=1.5), "timestep_fraction=1.5", "must be in (0, 1]", "1 trains on all levels"),
    bad(config(timestep_selection="last"), "timestep_selection='last' is not one of stratified, first."),
    # The loss:
    bad(config(epsilon=0.0), "epsilon=0.0", "how far a rollout may move the ratio", "must be > 0"),
    bad(config(beta=-1.0), "beta=-1.0", "must not be negative"),
    bad(config(beta=0.1, use_peft=False), "beta=0.1", "use_peft=False has no adapter", "Set beta=0 or use_peft=True"),
    bad(config(ema_decay=1.0), "ema_decay=1.0", "must be in [0, 1)", "or None for no averaging"),
    # The optimizer:
    bad(config(optim="adam_w"), "adam_w is not a valid OptimizerNames", "please select one of"),
    bad(trainer(optimizers=(FOREIGN, None)), "has none of the trained weights"),
    bad(config(learning_rate="6e-4"), "learning_rate='6e-4' is a str", "must be float"),
    bad(config(learning_rate=0.0), "learning_rate=0.0", "must be"),
    bad(config(learning_rate=-1.0), "learning_rate=-1.0", "must be"),
    bad(config(weight_decay=-1.0), "weight_decay=-1.0", "must"),
    bad(config(adam_beta1="0.9"), "adam_beta1='0.9' is a str", "must be float"),
    bad(config(adam_beta1=1.5), "adam_beta1=1.5", "must be"),
    bad(config(adam_epsilon="1e-8"), "adam_epsilon='1e-8' is a str", "must be float"),
    bad(config(adam_epsilon=-1.0), "adam_epsilon=-1.0", "must"),
    bad(config(max_grad_norm="1.0"), "max_grad_norm='1.0' is a str", "must be float"),
    bad(config(max_grad_norm=None), "max_grad_norm=None", "must be float"),
    bad(config(max_grad_norm=-1.0), "max_grad_norm=-1.0", "must"),
    bad(config(max_grad_norm=float("nan")), "max_grad_norm=nan", "must be"),
    # The learning rate schedule:
    bad(config(lr_scheduler_type="exponential"), "exponential is not a valid SchedulerType", "please select one of"),
    bad(config(warmup_steps="3"), "warmup_steps='3' is a str", "must be"),
    bad(config(warmup_steps=-1), "warmup_steps"),
    bad(config(lr_scheduler_type="cosine", lr_scheduler_kwargs="{a"), "lr_scheduler_kwargs", "{a", "JSON"),
    bad(
        trainer(lr_scheduler_type="cosine_with_min_lr"),
        "lr_scheduler_type",
        "cosine_with_min_lr",
        "lr_scheduler_kwargs",
    ),
    bad(trainer(lr_scheduler_type="linear", lr_scheduler_kwargs={"min_lr": 1e-5}), "lr_scheduler_kwargs", "min_lr"),
    bad(trainer(lr_scheduler_type="warmup_stable_decay"), "lr_scheduler_type", "num_decay_steps"),
    bad(
        trainer(lr_scheduler_type="polynomial", learning_rate=1e-8),
        "lr_end (1e-07) must be smaller than initial lr (1e-08)",
    ),
    bad(config(lr_scheduler_type="reduce_lr_on_plateau"), "reduce_lr_on_plateau", "requires an eval strategy"),
    # Options of `TrainingArguments` that follow from others, or do not work here:
    bad(
        config(gradient_accumulation_steps=2),
        "gradient_accumulation_steps=2",
        "is 2160 here",
        "Set prompts_per_rollout",
    ),
    bad(config(per_device_train_batch_size=16), "per_device_train_batch_size=16", "is 4 here", "or num_generations."),
    bad(config(num_train_epochs=5), "num_train_epochs=5", "cannot be set", "Set num_rollouts"),
    bad(
        config(max_steps=3), "max_steps=3", "could end inside a rollout", "Set num_rollouts: a rollout is 4 steps here"
    ),
    bad(
        config(train_sampling_strategy="sequential"),
        "train_sampling_strategy=sequential does not work here",
        "from all",
    ),
    bad(config(bf16_full_eval=True), "bf16_full_eval=True does not work here", "set `bf16`"),
    bad(config(auto_find_batch_size=True), "auto_find_batch_size=True", "does not work here", "lower `per_device"),
    bad(config(neftune_noise_alpha=0.0), "neftune_noise_alpha=0.0 does not work here"),
    bad(config(neftune_noise_alpha=5.0), "neftune_noise_alpha=5.0", "does not work here", "the replay must repeat"),
    bad(config(use_liger_kernel=True), "use_liger_kernel=True", "does not work here", "it patches language models"),
    bad(config(label_smoothing_factor=0.1), "label_smoothing_factor=0.1", "does not work", "there are no labels"),
    # Choosing what is trained -----------------------------------------------------------------------------------------
    bad(config(use_peft="false"), "use_peft='false' is a str", "must be bool"),
    bad(config(lora_r=0), "lora_r=0", "must be at least 1"),
    bad(config(lora_alpha=0), "lora_alpha=0", "must be at least 1"),
    bad(config(lora_target_modules="to_q"), "lora_target_modules='to_q' is a str", "must be list[str]"),
    bad(config(lora_target_modules=[]), "lora_target_modules=[] names no layer", "leave it out for the attention"),
    bad(
        trainer(lora_target_modules=["to_q", "to_x"]),
        "['to_x'] match no layer of SD3Transformer2DModel",
        "Its linear layers are",
        "Leave `lora_target_modules` unset",
    ),
    bad(trainer(lora_target_modules=["norm_q"]), "Target module RMSNorm() is not supported", "only the following"),
    # A `peft_config`:
    bad(
        trainer(peft_config=lora(), use_peft=False),
        "peft_config was given together with use_peft=False",
        "leave one of them out",
    ),
    bad(trainer(peft_config={"r": 4}), "peft_config is a dict", "`LoraConfig`"),
    bad(trainer(peft_config=lora(lora_dropout=0.1)), "lora_dropout=0.1", "would make every replayed", "Set it to 0"),
    bad(
        trainer(peft_config=lora(target_modules="to_xyz")),
        "Target modules to_xyz not found in the base model",
        "Please check the target modules",
    ),
    bad(trainer(peft_config=lora(task_type="CAUSAL_LM")), "task_type", "CAUSAL_LM"),
    bad(trainer(peft_config=lora(init_lora_weights="pissa"), beta=0.1), "init_lora_weights='pissa'", "beta"),
    bad(trainer(peft_config=LoraConfig(inference_mode=True)), "inference_mode=True", "set it to False"),
    bad(trainer(peft_config=LoraConfig(modules_to_save=["proj_out"])), "modules_to_save=['proj_out']", "Leave it out"),
    bad(trainer(peft_config=LoraConfig(bias="all")), "bias='all'", "Leave it out"),
    # A pipeline that has an adapter:
    bad(
        trainer(pipeline=sd3(lambda pipeline: pipeline.transformer.add_adapter(lora()))),
        "already has an adapter",
        "Load the pipeline anew",
    ),
    bad(
        lambda user: user.trainer(pipeline=user.trainer().pipeline),
        "already has an adapter, from an earlier trainer",
        "Load the pipeline anew",
    ),
    # Setting up the evaluation ----------------------------------------------------------------------------------------
    bad(config(eval_strategy="rollout"), "rollout is not a valid IntervalStrategy", "please select one of"),
    bad(config(eval_strategy="steps", eval_steps=-1), "eval_steps=-1 must be in"),
    bad(trainer(eval_strategy="epoch"), "eval_strategy or eval_on_start is set", "there is no eval_dataset: give one"),
    bad(trainer(eval_on_start=True), "eval_strategy or eval_on_start is set", "give one"),
    # The prompts:
    bad(trainer(eval_dataset=["a"]), "eval_dataset is a list", "not a `datasets.Dataset`", "`Dataset.from_dict({"),
    bad(trainer(eval_dataset={"a": prompts()}), "eval_dataset is a dict", "not a `datasets.Dataset`"),
    bad(trainer(eval_dataset=prompts().select([])), "eval_dataset is empty", "no prompt to sample images of"),
    bad(
        trainer(eval_dataset=Dataset.from_dict({"text": ["a"]})),
        "eval_dataset has no column 'prompt' but text",
        "set `dataset_prompt_column`",
    ),
    bad(trainer(eval_dataset=prompts("a", prompts=["b"])), "eval_dataset has a column 'prompts'", "rename it"),
    bad(
        trainer(num_eval_prompts=2, eval_dataset=prompts()),
        "num_eval_prompts=2 was given together with an eval_dataset",
        "leave one of them out",
    ),
    bad(
        trainer(num_eval_prompts=2, eval_dataset_name="geneval"),
        "num_eval_prompts=2 was given together with an eval_dataset_name",
        "leave one of them out",
    ),
    bad(
        trainer(eval_dataset_name="geneval", eval_dataset=prompts()),
        "eval_dataset_name='geneval' was given together with an eval_dataset",
        "leave one of them out",
    ),
    bad(
        trainer(eval_dataset_name="nowhere.txt"),
        "eval_dataset_name='nowhere.txt': there is no such file",
        error=FileNotFoundError,
    ),
    *(
        bad(
            trainer(num_eval_prompts=number),
            f"num_eval_prompts={number} leaves none of the {len(PROMPTS)} prompts",
            "hold out fewer, or give an eval_dataset",
        )
        for number in (len(PROMPTS), 100)
    ),
    bad(config(num_eval_prompts=0), "num_eval_prompts=0 must be at least 1", "or None"),
    bad(config(images_per_eval_prompt=0), "images_per_eval_prompt=0 must be at least 1", "or None"),
    # Control rewards, diversity and alarms:
    bad(
        trainer(eval_reward_fn=needs_label, eval_dataset=prompts()),
        "'needs_label' needs the argument 'label'",
        "eval_dataset has no such column",
        "A reward can have",
    ),
    bad(trainer(eval_reward_fn="pickscore"), "eval_reward_fn='pickscore' is a str", "not a callable"),
    bad(trainer(eval_reward_fn=[], eval_dataset=prompts()), "eval_reward_fn is empty"),
    bad(
        config(images_per_eval_prompt=1, eval_diversity="clip"),
        "images_per_eval_prompt=1 has no diversity for eval_diversity='clip' to measure",
        "set at least 2",
    ),
    bad(
        trainer(eval_diversity="variety", **EVALUATION),
        "eval_diversity='variety' does not work here",
        "clip, dreamsim, pixels",
        "leaving the option out measures none",
    ),
    bad(
        trainer(eval_diversity="mine:missing", **EVALUATION),
        "eval_diversity='mine:missing' does not work here",
        "has no 'missing'",
    ),
    bad(config(alarm_control_drop=0.0), "alarm_control_drop=0.0 must be > 0", "or None for no such alarm"),
    bad(config(alarm_diversity_drop=-0.1), "alarm_diversity_drop=-0.1 must be > 0", "or None for no such alarm"),
    bad(config(alarm_diversity_drop=1.0), "alarm_diversity_drop=1.0 would never raise an alarm", "below 1"),
    bad(config(stop_on_alarm="yes"), "stop_on_alarm='yes' is a str", "must be bool"),
    bad(
        trainer(stop_on_alarm=True, **EVALUATION),
        "stop_on_alarm=True, and no alarm would be raised",
        "it takes an eval_strategy, and an eval_reward_fn or eval_diversity",
    ),
    # The best model:
    bad(trainer(save_strategy="best"), "metric_for_best_model", "must be provided when using 'best' save_strategy"),
    bad(
        config(load_best_model_at_end=True, save_strategy="epoch"),
        "load_best_model_at_end requires the save and eval strategy to match",
        "Evaluation strategy: ",
        "Save strategy: ",
    ),
    bad(
        trainer(eval_dataset=prompts(), metric_for_best_model="eval_rewad"),
        "metric_for_best_model='eval_rewad'",
        "is none of what `evaluate` gives",
        "eval_reward, eval_rewards/redness/mean",
    ),
    bad(
        trainer(metric_for_best_model="eval_control", **EVALUATION),
        "metric_for_best_model='eval_control' is none of what `evaluate` gives here: eval_reward, eval_rewards/redness/mean",
    ),
    bad(
        train(callbacks=[EarlyStoppingCallback()]),
        "EarlyStoppingCallback",
        "metric_for_best_model",
        error=AssertionError,
    ),
    # Saving memory and time -------------------------------------------------------------------------------------------
    bad(
        config(per_device_sampling_batch_size=3),
        "per_device_sampling_batch_size=3 is not a multiple of per_device_prompt_batch_size=2",
        "2 and 4",
    ),
    bad(config(per_device_sampling_batch_size=0), "per_device_sampling_batch_size=0 is not a multiple", "2 and 4"),
    bad(
        config(pipeline_columns=["image"], per_device_prompt_batch_size=1, per_device_sampling_batch_size=2),
        "pipeline_columns=['image'] needs per_device_sampling_batch_size=1, not 2",
    ),
    bad(
        config(pipeline_columns=["image"], per_device_prompt_batch_size=1, cache_prompt_embeds=True),
        "cache_prompt_embeds=True knows a prompt by its text alone",
        "pipeline_columns=['image']",
        "Set it to False",
    ),
    bad(config(quantization="fp4"), "quantization='fp4'", "is not one of nf4, int8"),
    bad(config(quantization=8), "quantization=8 is a int", "must be str | None"),
    bad(config(quantization="int8", use_peft=False), "quantization='int8' needs use_peft=True", "only adapters beside"),
    bad(
        trainer(quantization="int8"),
        "quantization='int8' is how a pipeline is loaded",
        "this StableDiffusion3Pipeline already is",
        "load it with `quantization_config=...`",
    ),
    bad(config(vae_tiling="yes"), "vae_tiling='yes' is a str", "must be bool"),
    bad(
        trainer(vae_tiling=True, pipeline=sd3(vae=AsymmetricAutoencoderKL())),
        "vae_tiling=True",
        "AsymmetricAutoencoderKL",
        "has no `enable_tiling`",
    ),
    bad(
        trainer(vae_slicing=True, pipeline=sd3(vae=AsymmetricAutoencoderKL())),
        "vae_slicing=True",
        "AsymmetricAutoencoderKL",
        "has no `enable_slicing`",
    ),
    bad(config(gradient_checkpointing="no"), "gradient_checkpointing='no'", "must be bool"),
    bad(
        config(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        "gradient_checkpointing_kwargs={'use_reentrant': True}",
        "loses the gradients of adapters",
        "Leave them out",
    ),
    bad(config(gradient_checkpointing_kwargs='{"every_n_layers": 2}'), "{'every_n_layers': 2}", "without options"),
    bad(config(attention_backend="flash_5"), "attention_backend='flash_5'", "Those are: ", "_native_math", "flash_hub"),
    bad(config(attention_backend="sage"), "attention_backend='sage' has no gradients", "Those are: ", "native"),
    bad(
        trainer(attention_backend="native"),
        "attention_backend='native' would do nothing",
        "JointAttnProcessor2_0",
        "Leave it out",
    ),
    bad(
        trainer(attention_backend="_native_xla", pipeline=tiny_pipelines.flux),
        "attention_backend='_native_xla' cannot be used here",
        "torch_xla",
    ),
    # Logging ----------------------------------------------------------------------------------------------------------
    bad(config(logging_steps=0), "logging_steps=0 must be in"),
    bad(trainer(report_to=["paper"]), "paper is not supported", "only azure_ml"),
    # Saving and resuming ----------------------------------------------------------------------------------------------
    bad(config(save_strategy="rollout"), "rollout is not a valid SaveStrategy", "please select one of"),
    bad(config(save_steps=-1), "save_steps=-1 must be in"),
    bad(config(save_steps=6), "save_steps=6", "falls inside a rollout of 4 optimizer steps", "4 and 8"),
    bad(config(save_steps=0.003), "save_steps=2", "falls inside a rollout of 4 optimizer steps", "4 and 8"),
    bad(
        config(eval_steps=6, eval_strategy="steps", save_strategy="best", metric_for_best_model="reward"),
        "eval_steps=6",
        "falls inside a rollout of 4 optimizer steps",
        "4 and 8",
    ),
    bad(config(save_total_limit="2"), "save_total_limit='2' is a str", "must be int"),
    bad(config(enable_jit_checkpoint=True), "enable_jit_checkpoint=True", "saves inside a rollout", "`save_on_signal`"),
    bad(resume("nowhere"), "Cannot resume from nowhere", "there is no such folder"),
    bad(resume("prompts.csv"), "Cannot resume from prompts.csv", "there is no such folder"),
    bad(resume("folder"), "Cannot resume from folder", "it has no manifest.json, so it was never completed"),
    bad(resume("yes"), "Cannot resume from yes", "there is no such folder"),
    bad(resume(5), "resume_from_checkpoint=5 must be True, or the path of a checkpoint"),
    bad(resume("run", num_rollouts=2), "Cannot resume from run", "checkpoint-1"),
    bad(
        resume(True, num_rollouts=2, learning_rate=1e-4),
        "is from another run: learning_rate: 0.001 -> 0.0001. Set them back, or set resume_with_changed_options=True",
    ),
    bad(resume(True, num_rollouts=2, use_peft=True, resume_with_changed_options=True), "use_peft: False -> True"),
    bad(
        resume(True, num_rollouts=2, optim="adafactor", resume_with_changed_options=True), "optim: 'sgd' -> 'adafactor'"
    ),
    bad(
        resume(True, num_rollouts=2, optimizer_steps_per_rollout=2, resume_with_changed_options=True),
        "is from a run of other rollouts: optimizer_steps_per_rollout: 1 -> 2",
        "set them back, or load its weights as the start of a new run",
    ),
    bad(
        resume(True, num_rollouts=2, num_iterations=2, resume_with_changed_options=True),
        "is from a run of other rollouts: num_iterations: 1 -> 2",
    ),
    bad(
        resume(True, run="weights", num_rollouts=2),
        "There is no checkpoint to resume from",
        "it was saved with save_only_model=True, and a run cannot go on from its weights alone",
    ),
    # Calling evaluate or generate -------------------------------------------------------------------------------------
    bad(
        evaluate(),
        "evaluate needs prompts: give the trainer an `eval_dataset`, or set `eval_dataset_name` or `num_eval_prompts`",
    ),
    bad(evaluate(["a"]), "eval_dataset is a list", "not a `datasets.Dataset`", "`Dataset.from_dict({"),
    bad(evaluate(prompts("a", None)), "None as the prompt of row 1", "prompts must be non-empty text"),
    bad(evaluate(Dataset.from_dict({"text": ["a"]})), "no column 'prompt' but text", "set `dataset_prompt_column`"),
    bad(
        evaluate(prompts("a"), reward_fn=needs_label, train_dataset=prompts("a", label=[1])),
        "'needs_label' needs the argument 'label'",
        "eval_dataset has no such column",
    ),
    bad(evaluate(prompts("a", images=[1])), "eval_dataset has a column 'images'", "rename it"),
    bad(generate(["a", "b"], [1]), "generate got 2 prompts and 1 seeds", "give one seed for each"),
    bad(generate([], []), "generate got prompts=[]", "at least one prompt"),
    bad(generate("ab", [1, 2]), "generate got prompts='ab'", "a list of at least one prompt"),
    bad(generate([None], [1]), "generate got prompts=[None]", "at least one prompt, as text"),
    bad(generate(3, [1]), "generate got prompts=3", "a list of at least one prompt"),
    bad(generate(["a"], None), "generate got seeds=None", "a list of ints, one for each prompt"),
    bad(generate(["a"], [1.5]), "generate got seeds=[1.5]", "a list of ints, one for each prompt"),
    bad(
        generate(["a"], [1], given={"pipeline_kwargs": {"sigmas": [1.0, 0.5]}}, num_inference_steps=5),
        "num_inference_steps=5 would change nothing: `sigmas`, which has 2 values, sets the steps",
    ),
    bad(generate(["a"], [-1]), "generate got seeds=[-1]", "a seed is in [0, 2^64)"),
    bad(generate(["a"], [1], ["x"]), "generate got columns=['x']", "a dict of a list for each column"),
    bad(generate(["a", "b"], [1, 2], {"x": [1]}), "generate got 1 values of the column 'x' for 2 prompts"),
    bad(
        generate(["a"], [1], given=SIZED),
        "generate got columns for nothing, and `pipeline_columns` passes 'height' to the pipeline",
        "give columns={'height': [...]}",
    ),
    bad(generate(["a"], [1], height=30), "height=30", "is not a multiple of 4", "28 and 32"),
    bad(generate(["a"], [1], steps=3), "StableDiffusion3Pipeline does not take steps", "It takes: prompt, "),
    bad(generate(["a"], [1], prompt="b"), "generate got prompt='b', which the trainer sets itself"),
    bad(generate(["a"], [1], output_type="pil"), "generate got output_type='pil', which the trainer sets itself"),
    bad(generate(["a"], [1], num_inference_steps=0), "generate got num_inference_steps=0", "at least 1"),
    bad(generate(["a"], [1], num_inference_steps="3"), "generate got num_inference_steps='3'", "must be an int"),
    bad(
        lambda user: user.trainer().predict(prompts()),
        "FDFOTrainer has no predict",
        "`generate` samples images, and `evaluate` scores them",
        error=NotImplementedError,
    ),
    bad(
        lambda user: user.trainer().hyperparameter_search(),
        "FDFOTrainer has no hyperparameter_search",
        "build a trainer for each trial",
        error=NotImplementedError,
    ),
    # Comparing before and after ---------------------------------------------------------------------------------------
    bad(compare(num_prompts="2"), "num_prompts='2' must be an int, at least 1"),
    bad(compare(num_prompts=0), "num_prompts=0 must be an int, at least 1"),
    bad(compare(images_per_prompt=0), "images_per_prompt=0 must be an int, at least 1"),
    bad(compare(images_per_prompt=True), "images_per_prompt=True must be an int, at least 1"),
    bad(compare(metrics=3), "metrics=3 is not a callable `(images, prompts) -> dict of floats`"),
    bad(compare(diversity=3), "diversity=3 is neither a name, such as 'pixels', nor a callable"),
    bad(assign("comparison", 3), "comparison is a int", "`trainer.comparison = trainer.compare(...)`, or None"),
    # Typing a command line --------------------------------------------------------------------------------------------
    bad(script("--foo", "1"), "FDFOConfig has no option foo"),
    bad(script(num_rollouts="ten"), "--num_rollouts", "invalid int value: 'ten'", error=SystemExit),
    bad(script(use_cpu="maybe"), "got maybe", "expected one of yes/no", error=SystemExit),
    bad(script(churn_schedule="linear"), "'linear'", "choose from", error=SystemExit),
    bad(script(learning_rate="nan"), "learning_rate=nan", "must be"),
    bad(script(pipeline_kwargs="{a"), "pipeline_kwargs='{a'", "is not valid JSON"),
    bad(script(reward="pickscor"), "reward 'pickscor'", "neither one of pickscore, ", "module:callable, such as"),
    bad(script(reward="nobody:reward"), "reward 'nobody:reward'", "there is no module 'nobody' on the Python path"),
    bad(script(reward="mine:other"), "reward 'mine:other'", "module 'mine' has no 'other'"),
    bad(script(reward="mine:number"), "reward_fn=5 is a int", "not a callable `(images, prompts, **columns)"),
    bad(script(reward="vlm_server"), "reward 'vlm_server'", "missing a required argument: 'url'", "It takes ("),
    bad(script("--reward_weights", "1", "2"), "reward_weights has 2 values for 1 reward function(s)", "give one each"),
    bad(script(metrics="mine:other"), "metrics 'mine:other'", "module 'mine' has no 'other'"),
    bad(script(metrics="mine"), "metrics 'mine'", "not of the form module:callable", "such as my_module:my_metrics"),
    bad(script("--plan", reward="pickscor"), "reward 'pickscor' is neither one of pickscore, "),
    bad(script("--plan", reward="pickscore(a=1)"), "reward 'pickscore(a=1)'", "unexpected keyword argument 'a'"),
    bad(script("--plan", "--eval_reward", "pickscor"), "reward 'pickscor' is", "module:callable"),
    bad(script("--config"), "argument --config: expected a recipe or a YAML file", error=SystemExit),
    bad(script(num_report_prompts=0), "num_report_prompts=0", "at least 1"),
    # Writing a recipe -------------------------------------------------------------------------------------------------
    bad(script("--config", "none.yaml"), "--config none.yaml: there is no such file", error=FileNotFoundError),
    bad(script("--config", "folder"), "--config folder: there is no such file", error=FileNotFoundError),
    bad(script(recipe="a: [1\nb: 2: 3\n"), "--config recipe.yaml is not valid YAML", "line 2, column 2"),
    bad(script(recipe="- a\n"), "recipe.yaml has a list", "a recipe has lines `option: value`"),
    bad(script(recipe="num_rolouts: 3\n"), "no option num_rolouts=3", "Did you mean `num_rollouts`"),
    bad(script(recipe="num_rollouts: 2.5\n", num_rollouts=None), "num_rollouts=2.5 is a float", "must be int"),
    bad(script(recipe="num_rollouts: ten\n", num_rollouts=None), "value: 'ten'", "--num_rollouts", error=SystemExit),
    bad(
        script(recipe="churn_schedule: linear\n"), "churn_schedule='linear'", "is not one of constant, interval, prior"
    ),
    bad(script(recipe="lora_target_modules: to_q\n"), "lora_target_modules='to_q' is a str", "must be list[str]"),
    bad(script(recipe="reward_weights: 1.0\n"), "reward_weights=1.0 is a float", "must be list[float]"),
    bad(script(recipe="pipeline_kwargs: [1]\n"), "pipeline_kwargs=[1] is a list", "must be dict"),
    bad(script(recipe="model: 5\n", model=None), "not a int", "must be a `DiffusionPipeline`, or the Hub id or path"),
    bad(
        script(recipe="save_strategy: no\n", save_strategy=None),
        "save_strategy=False is a bool",
        "must be one of no, steps, epoch, best",
        "unquoted no",
        "quote it",
    ),
    bad(script(recipe="eval_diversity: no\n"), "eval_diversity=False is a bool", "must be str", "quote it"),
    bad(
        script(recipe="reward: [5]\n", reward=None), "reward 5 is a int", "not a string with a name or module:callable"
    ),
]


@pytest.mark.parametrize(("bad_input", "words", "error"), TABLE)
def test_bad_input_is_refused_before_anything_is_sampled(user, bad_input, words, error, capsys):
    with transformer_calls() as calls, pytest.raises(error) as raised:
        bad_input(user)
    # The parser of the command line prints its error and exits.
    message = f"{raised.value}\n{capsys.readouterr().err if error is SystemExit else ''}"
    assert [word for word in words if word not in message] == [], message
    assert len(calls) <= 5


def test_right_input_is_sampled(user):
    """The user of the table is right without a row, and the calls that the table counts are counted."""
    with transformer_calls() as calls:
        user.trainer().generate(["a", "b"], [1, 2])
        assert len(calls) == 7  # five of them are the rehearsal and the trial of a rollout, at construction
        user.train()
        user.resume(True, num_rollouts=2)
        user.script()
    assert len(calls) > 20 and Path("out/results.json").is_file()


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="this machine has bfloat16")
def test_bf16_is_refused_if_the_machine_lacks_it(user):
    with pytest.raises(ValueError, match=r"bf16=True, but this machine has no GPU with bfloat16. Leave bf16 unset"):
        user.config(bf16=True, use_cpu=False)
