"""Command lines and YAML files: wrong names and types are named in one line, and nothing is taken for something else."""

import pytest

from trl_fdfo import FDFOConfig, FlowGRPOConfig
from trl_fdfo.cli import recipes, train
from trl_fdfo.cli.arguments import InferenceArguments, Parser, RunArguments, parse
from trl_fdfo.planning.without_weights import planned


GIVEN = ["--output_dir", "out", "--use_cpu", "true", "--report_to", "none"]


@pytest.fixture
def recipe(tmp_path):
    """Writes a YAML file, and returns the arguments that name it."""

    def write(text: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text)
        return ["--config", str(tmp_path / "recipe.yaml")]

    return write


def parse_run(*args):
    return parse((RunArguments, FDFOConfig), [*GIVEN, *args])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rewards", "clip"], "with FDFOConfig has no option rewards. `rewards` is `reward` here"),
        (["--lora_rank", "8"], "has no option lora_rank. `lora_rank` is `lora_r` here"),
        (["--num_rollout", "3"], "has no option num_rollout. Did you mean `num_rollouts`"),
        (["--num-rollout=3"], "has no option num_rollout. Did you mean `num_rollouts`"),
        (["--churn-width", "0.3"], r"`churn_width` is `churn_kwargs=\{\"width\": ...\}` here"),
        (["--reward_funcs", "clip"], "`reward_funcs` is `reward` here"),
        (["--model_name_or_path", "a"], "`model_name_or_path` is `model` here"),
        (["--config.sample.num_steps=40"], "`config.sample.num_steps` is `num_inference_steps` here"),
        (["--use_vllm"], "There is no `use_vllm`: the pipeline itself samples the images"),
    ],
)
def test_an_unknown_option_is_refused_with_what_was_meant(args, message):
    with pytest.raises(ValueError, match=message):
        parse_run(*args)
    # Also by the script itself, whose first look at the command line is for the algorithm alone.
    with pytest.raises(ValueError, match=message):
        train.main([*GIVEN, *args])


def test_a_wrong_name_is_told_before_what_is_missing(capsys):
    with pytest.raises(ValueError, match="has no option models. Did you mean `model`"):
        parse(InferenceArguments, ["--models", "shapes", "--prompts", "a cat"])
    with pytest.raises(SystemExit):
        parse(InferenceArguments, ["--prompts", "a cat"])
    assert "the following arguments are required: --model" in capsys.readouterr().err


def test_an_option_of_another_algorithm_is_refused():
    with pytest.raises(ValueError, match="with FlowGRPOConfig has no option churn"):
        train.main([*GIVEN, "--algorithm", "flow_grpo", "--churn", "0.3"])
    with pytest.raises(ValueError, match="with FDFOConfig has no option foo"):
        parse(planned(FDFOConfig), [*GIVEN, "--foo", "1"])
    (config,) = parse(FlowGRPOConfig, [*GIVEN, "--noise_level", "0.5"])
    assert config.noise_level == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_rolouts: 3", "has no option num_rolouts=3. Did you mean `num_rollouts`"),
        ("num-rolouts: 3", "has no option num_rolouts=3. Did you mean `num_rollouts`"),
        ("train_learning_rate: 1.0e-4", "`train_learning_rate` is `learning_rate` here"),
        ("sample: {num_steps: 10}", "no option sample.num_steps=10. `sample.num_steps` is `num_inference_steps` here"),
        ("learning-rate: 0.1\nlearning_rate: 0.2", "has learning-rate twice, with `-` and with `_`"),
    ],
)
def test_a_yaml_file_is_read_as_strictly(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        parse_run(*recipe(text))


def test_a_yaml_file_may_write_names_as_the_command_line(recipe):
    text = "learning-rate: 0.1\nnum-report-prompts: 3\nchurn_schedule: interval\nchurn-kwargs: {width: 0.3}\n"
    flag, path = recipe(text)
    for args in ([flag, path], [f"{flag}={path}"]):
        script, config = parse_run(*args, "--churn-kwargs", '{"width": 0.4}')
        assert (config.learning_rate, script.num_report_prompts, config.churn_shape()["width"]) == (0.1, 3, 0.4)
    assert parse_run(flag, path)[1].churn_shape()["width"] == 0.3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num_rollouts", "ten"], "argument --num_rollouts/--num-rollouts: invalid int value: 'ten'"),
        (
            ["--num_report_prompts", "ten"],
            "argument --num_report_prompts/--num-report-prompts: invalid int value: 'ten'",
        ),
        (["--churn_schedule", "linear"], "invalid choice: 'linear' (choose from 'constant', 'interval', 'prior')"),
        (["--algorithm", "ppo"], "invalid choice: 'ppo'"),
        (["--learning_rate"], "expected one argument"),
        (["--beta", "0.1", "0.2"], "unrecognized arguments: 0.2"),
        (["--config", "shapes", "--config=shapes_fast"], "argument --config: one recipe, and it is given 2 times"),
    ],
)
def test_a_wrong_type_prints_the_error_alone(capsys, args, message):
    with pytest.raises(SystemExit) as ended:
        train.main([*GIVEN, *args])
    error = capsys.readouterr().err.strip()
    assert message in error and error.endswith("(--help lists the options)") and "\n" not in error
    assert ended.value.code == 2


def test_a_partial_parser_passes_over_the_rest(recipe):
    args = [*GIVEN, *recipe("num_rollouts: 3\nalgorithm: flow_grpo\n"), "--noise_level", "0.5"]
    script, rest = Parser(RunArguments, partial=True).parse_args_and_config(args, return_remaining_strings=True)
    assert script.algorithm == "flow_grpo"
    assert rest == ["--num_rollouts", "3", *GIVEN, "--noise_level", "0.5"]


@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "evaluate_paper"])
def test_every_recipe_parses(name):
    config_class = FlowGRPOConfig if "flow_grpo" in name else FDFOConfig
    script, config = parse((RunArguments, config_class), ["--config", name, *GIVEN[2:], "--bf16", "false"])
    if "gb" in name:  # made cheaper for a card, but for the paper's eight
        few_steps = name == "flux_schnell_80gb"  # and no guidance, as the model is used
        assert (config.churn, config.churn_schedule) == ((0.1, "prior") if few_steps else (0.0025, "constant"))
        assert (config.num_inference_steps, config.timestep_fraction == 1.0) == (
            {"sd35_8x80gb": (40, True), "sd35_80gb": (10, True), "flux_schnell_80gb": (4, True)}.get(name, (10, False))
        )
        guidance = {"flux": 0.0 if few_steps else 3.5, "qwen": None}
        assert config.guidance_scale == guidance.get(name.split("_")[0], 1.0)
    elif script.model != "shapes":  # the paper's setting
        assert config.pipeline_kwargs == {"max_sequence_length": 128}
        assert (config.churn, config.churn_schedule, config.num_inference_steps) == (0.0025, "constant", 40)
        assert (
            config.dataset_name == "yuvalkirstain/pickapic_v1_no_images" and config.dataset_prompt_column == "caption"
        )
        guidance = {"combined_guidance_2": 2.0, "combined_guidance_4.5": 4.5}
        assert config.guidance_scale == guidance.get(name, 1.0)
    elif config_class is FDFOConfig:
        assert (config.churn_schedule, config.churn, config.churn_shape()) == ("prior", 0.26, {"spread": 0.0})
