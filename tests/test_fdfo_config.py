import pytest
import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from trl_fdfo import FDFOConfig


def paper(**options):
    return FDFOConfig(output_dir="unused", report_to=[], use_cpu=True, **options)


def test_defaults_are_the_setting_of_the_paper():
    config = paper()
    assert (config.prompts_per_rollout, config.num_generations, config.optimizer_steps_per_rollout) == (432, 2, 4)
    assert (config.num_inference_steps, config.guidance_scale, config.height, config.width) == (40, 1.0, 512, 512)
    assert (config.churn, config.churn_schedule, config.epsilon, config.beta) == (0.0025, "constant", 0.03, 0.0)
    assert (config.learning_rate, config.weight_decay, config.lr_scheduler_type) == (3e-5, 1e-4, "constant")
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon, config.max_grad_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (config.lora_r, config.lora_alpha, config.use_peft) == (32, 64, True)


def test_derived_numbers():
    config = paper(timestep_fraction=0.25, num_iterations=3, num_rollouts=7, per_device_prompt_batch_size=4)
    assert config.num_trained_levels == 10
    assert config.num_rollout_batches == 108
    assert config.gradient_accumulation_steps == 108 * 10 // 4
    assert config.steps_per_rollout == 12
    assert config.num_train_epochs == 7
    assert config.logging_steps == 12 and config.save_steps == 120
    assert config.per_device_train_batch_size == 8


def test_every_option_is_documented_and_has_help():
    own = [f for f in FDFOConfig.__dataclass_fields__.values() if f.name in FDFOConfig.__annotations__]
    inherited = TrainingArguments.__dataclass_fields__
    assert len(own) > 25
    for option in own:
        assert option.metadata.get("help"), option.name
        assert option.name in inherited or f"        {option.name} (`" in FDFOConfig.__doc__, option.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, r"num_generations=1, but FDFO learns from the difference.*at least 2"),
        ({"churn": -0.1}, r"churn=-0.1 must not be negative"),
        ({"churn": 0.0}, r"churn=0 leaves the images of a prompt identical"),
        ({"churn_schedule": "linear"}, r"'linear' is not one of constant, interval, prior"),
        ({"churn_width": 0.0}, r"churn_width=0.0 must be > 0"),
        ({"timestep_fraction": 1.5}, r"timestep_fraction=1.5 must be in \(0, 1\]"),
        ({"epsilon": 0.0}, r"epsilon=0.0 must be > 0"),
        ({"beta": -1.0}, r"beta=-1.0 must not be negative"),
        ({"beta": 0.1, "use_peft": False}, r"beta=0.1 needs the base model.*use_peft=False"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 must be in \[0, 1\)"),
        ({"num_rollouts": 0}, r"num_rollouts=0 must be at least 1"),
        (
            {"prompts_per_rollout": 430, "per_device_prompt_batch_size": 4},
            r"prompts_per_rollout=430 cannot be split evenly over 1 process\(es\) x per_device_prompt_batch_size=4. "
            r"The nearest that can: 428 and 432",
        ),
        (
            {"prompts_per_rollout": 6, "num_inference_steps": 5, "optimizer_steps_per_rollout": 4},
            r"3 rollout batches per process x 5 trained noise levels = 15 micro-batches cannot be split into "
            r"optimizer_steps_per_rollout=4 equal steps. The nearest that can: optimizer_steps_per_rollout=3 or 5, or "
            r"prompts_per_rollout=8 or 16",
        ),
        ({"pipeline_columns": ["image"]}, r"pipeline_columns=\['image'\] needs per_device_prompt_batch_size=1, not 2"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps=2 cannot be set: .* is 2160 here"),
        ({"per_device_train_batch_size": 16}, r"per_device_train_batch_size=16 cannot be set: .* is 4 here"),
        ({"max_steps": 3}, r"max_steps=3 could end inside a rollout. Set num_rollouts: a rollout is 4 steps here"),
        ({"num_rollouts": "10"}, r"num_rollouts='10' is a str; it must be int"),
        ({"num_rollouts": 2.5}, r"num_rollouts=2.5 is a float; it must be int"),
        ({"num_iterations": True}, r"num_iterations=True is a bool; it must be int"),
        ({"churn": float("nan")}, r"churn=nan must be finite"),
        ({"churn": float("inf")}, r"churn=inf"),
        ({"learning_rate": "6e-4"}, r"learning_rate='6e-4' is a str; it must be float"),
        ({"height": "32"}, r"height='32' is a str; it must be int \| None"),
        ({"reward_weights": 2.0}, r"reward_weights=2.0 is a float; it must be list\[float\]"),
        ({"reward_weights": ["a"]}, r"reward_weights=\['a'\] is a list; it must be list\[float\]"),
        ({"reward_weights": [0.0]}, r"reward_weights=\[0.0\] leaves nothing to learn from"),
        ({"lora_target_modules": "to_q"}, r"lora_target_modules='to_q' is a str; it must be list\[str\]"),
        ({"lora_alpha": 0}, r"lora_alpha=0 must be at least 1"),
        ({"pipeline_kwargs": "{'a': 1"}, r"pipeline_kwargs=.* is not valid JSON"),
        ({"pipeline_kwargs": "[1]"}, r"pipeline_kwargs=\[1\] must be a dict"),
        ({"pipeline_kwargs": {"height": 64}}, r"pipeline_kwargs has height=64: set the option `height` instead"),
        ({"pipeline_kwargs": {"generator": 1}}, r"pipeline_kwargs has generator=1, which the trainer sets itself"),
        ({"pipeline_kwargs": {"num_images_per_prompt": 4}}, r"num_images_per_prompt=4, which the trainer sets"),
        ({"pipeline_kwargs": {"negative_prompt": ["a"]}}, r"negative_prompt=\['a'\]: one string for all prompts"),
        ({"save_steps": 0.003}, r"save_steps=2 falls inside a rollout of 4 optimizer steps"),
        ({"num_train_epochs": 5}, r"num_train_epochs=5 cannot be set: .* Set num_rollouts"),
        ({"save_steps": 6}, r"save_steps=6 falls inside a rollout of 4 optimizer steps.*4 and 8"),
        ({"neftune_noise_alpha": 5.0}, r"neftune_noise_alpha=5.0 does not work with FDFO"),
        ({"auto_find_batch_size": True}, r"auto_find_batch_size=True does not work with FDFO.*per_device_prompt"),
    ],
)
def test_bad_options_are_refused_with_the_cure(options, message):
    with pytest.raises(ValueError, match=message):
        paper(**options)


def test_what_the_batch_errors_name_does_work():
    for options in [
        {"prompts_per_rollout": 428, "per_device_prompt_batch_size": 4},
        {"prompts_per_rollout": 432, "per_device_prompt_batch_size": 4},
        *(
            {"prompts_per_rollout": prompts, "num_inference_steps": 5, "optimizer_steps_per_rollout": steps}
            for prompts, steps in [(6, 3), (6, 5), (8, 4), (16, 4)]
        ),
    ]:
        assert paper(**options).gradient_accumulation_steps >= 1


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="this machine has bfloat16")
def test_bf16_is_refused_where_the_machine_lacks_it_and_resolved_where_unset():
    with pytest.raises(ValueError, match=r"bf16=True, but this machine has no GPU with bfloat16. Leave bf16 unset"):
        FDFOConfig(output_dir="unused", report_to=[], bf16=True)
    assert paper().bf16 is False
    assert paper(bf16=True).bf16 is True


def test_pipeline_kwargs_from_the_command_line():
    assert paper(pipeline_kwargs='{"max_sequence_length": 128}').pipeline_kwargs == {"max_sequence_length": 128}


def test_save_steps_matter_only_where_they_are_used():
    assert paper(save_strategy="epoch", save_steps=3).save_steps == 3


def test_best_model_is_by_reward():
    config = paper(load_best_model_at_end=True, save_strategy="epoch", eval_strategy="epoch")
    assert config.metric_for_best_model == "eval_reward" and config.greater_is_better


def test_one_process_takes_one_gpu():
    assert paper().n_gpu == (0 if not torch.cuda.is_available() else 1)
