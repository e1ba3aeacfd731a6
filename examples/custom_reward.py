"""
Rewards of your own, on the packaged tiny pipeline: `python examples/custom_reward.py`, half a minute on a laptop.

A reward takes what its signature names: `images` (floats [N, 3, H, W] in [0, 1]), `prompts`, any column of the dataset.
It returns one float per image on any scale, since only differences between the images of a prompt matter, and should
have a slope also where the image is still wrong. On the command line:

    trl-fdfo train --config shapes \
        --reward "examples.custom_reward:Background(name='gray', brightness=0.8)"
"""

import torch
from datasets import Dataset

from trl_fdfo import FDFOConfig, FDFOTrainer, shapes


def target_color(images, target):
    """Share of the image, in [0, 1], that has the colour which the dataset's column `target` names."""
    colors = torch.tensor([shapes.COLORS[name] for name in target], device=images.device)  # [N, 3]
    distance = (images - colors[..., None, None]).norm(dim=1)  # [N, H, W]
    return (-(distance / 0.3).square()).exp().mean(dim=(1, 2))


class Background:
    """Minus the distance of the image's edges from a brightness, where the prompt names that background."""

    def __init__(self, name="gray", brightness=0.8):
        self.name, self.brightness = name, brightness

    def __call__(self, images, prompts):
        edges = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=-1)  # [N, 3, P]
        distance = (edges - self.brightness).abs().mean(dim=(1, 2)).tolist()
        # None: it does not apply, which leaves the prompt to the other rewards.
        return [-d if f"{self.name} background" in prompt else None for d, prompt in zip(distance, prompts)]


def main(output_dir="outputs/custom_reward", num_rollouts=20):
    prompts = shapes.captions()  # "a red circle on a gray background"
    dataset = Dataset.from_dict({"prompt": prompts, "target": [prompt.split()[1] for prompt in prompts]})
    config = FDFOConfig(
        output_dir=output_dir,
        num_rollouts=num_rollouts,
        prompts_per_rollout=54,
        per_device_prompt_batch_size=27,
        num_inference_steps=8,
        timestep_fraction=0.5,
        height=32,
        width=32,
        pipeline_kwargs={"max_sequence_length": 0},
        churn=0.15,
        reward_weights=[1.0, 3.0],
        epsilon=0.2,
        learning_rate=6e-4,
        save_strategy="no",
    )
    rewards = [target_color, Background(name="gray", brightness=0.8)]
    trainer = FDFOTrainer(config, shapes.load_pipeline(), rewards, train_dataset=dataset)
    before = trainer.evaluate(dataset)
    trainer.train()
    after = trainer.evaluate(dataset)
    trainer.save_model()
    for name in ("eval_reward", "eval_rewards/target_color/mean", "eval_rewards/Background/mean"):
        print(f"{name:32}{before[name]:7.3f} -> {after[name]:.3f}")


if __name__ == "__main__":
    main()
