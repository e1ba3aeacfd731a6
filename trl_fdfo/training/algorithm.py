"""The interface of an algorithm. docs/algorithms.md shows how to write one."""

from collections.abc import Sequence

from torch import Tensor

from ..pipeline.records import RolloutBatch
from ..pipeline.schedulers import RolloutScheduler
from ..rewards.reward_functions import RewardFunctions
from ..saving.model_card import Paper
from .buffer import ScoredBatch
from .config import RolloutConfig
from .surrogate import SurrogateLoss


class Algorithm:
    """
    How much noise a rollout has, what is learned from its rewards, and the loss.

    Dimensions: P prompts, G branches (images per prompt), N = P x G samples, T steps, K trained levels.

    Attributes:
        algorithm (`str`): Name of the algorithm.
        paper ([`~trl_fdfo.saving.model_card.Paper`]): Its paper.
        config_class (`type[RolloutConfig]`): Its options.
        scheduler_class (`type[RolloutScheduler]`): Its sampler.
        hyperparameters (`tuple[str, ...]`): Its own options on a model card.
        latents_per_target (`int`): Float32 tensors of the latents' shape that `targets` keeps of each sample.
        noises_endpoints (`bool`): It learns from endpoints that are noised afresh ([`ForwardProcessTrainer`]): a rollout keeps
            these alone, and no tuples of its steps.
        has_old_policy (`bool`): The policy that samples has weights of its own ([`ForwardProcessTrainer`]).
        base_distance_name (`str`): Metric of the distance that `beta` weighs.
        args ([`RolloutConfig`]): Options of the run.
        sigmas (`Tensor`): Noise levels t_0 > ... > t_T = 0 of the sampler, shape [T + 1], on the CPU.
        trainable_levels (`list[int]`): The levels in [0, T) whose velocity has gradients: all, unless the transformer of
            some is not trained.
    """

    algorithm: str
    paper: Paper
    config_class: type[RolloutConfig]
    scheduler_class: type[RolloutScheduler]
    hyperparameters: tuple[str, ...] = ()
    latents_per_target = 0
    noises_endpoints = False
    has_old_policy = False
    base_distance_name = "base_distance"
    args: RolloutConfig
    sigmas: Tensor
    trainable_levels: list[int]

    @classmethod
    def scheduler_for(cls, config: RolloutConfig) -> type[RolloutScheduler]:
        """The sampler of a run with these options."""
        return cls.scheduler_class

    @classmethod
    def shares_prefix(cls, config: RolloutConfig) -> bool:
        """True if the branches of a prompt are sampled as one for as long as their noise leaves them identical."""
        return False

    @classmethod
    def rewards_to_compare(cls, config: RolloutConfig, rewards: RewardFunctions) -> list[str]:
        """
        Names of the rewards whose values on the images of a prompt are compared: `targets` gets the total of these.

        Raises:
            ValueError: The options ask of a reward what it does not have.
        """
        return rewards.names

    def noise_amounts(self, rollout: int, numbers: Sequence[int]) -> Tensor:
        """
        How much noise the sampler adds at each level, shape [T + 1], or at each level for each prompt, shape [P, T + 1].

        Args:
            rollout (`int`): Number of the rollout, from 0.
            numbers (`Sequence[int]`): Places of the P prompts in the rollout over all processes: all random draws follow
                from these and the seed.
        """
        raise NotImplementedError

    def initial_seeds(self, rollout: int, numbers: Sequence[int]) -> list[int]:
        """Seeds of the initial noise: one per prompt, which its branches share, or one per branch."""
        raise NotImplementedError

    def trained_levels(self, rollout: int, batch: int) -> list[int]:
        """The K noise levels that a rollout batch, by its global number, is trained on, in the order of training."""
        raise NotImplementedError

    def see_rewards(self, rewards: Tensor) -> None:
        """
        Told of all rewards of a rollout, before the targets of its batches are asked for.

        Args:
            rewards (`Tensor`): Total rewards of this process, shape [P, G], NaN where none applies.
        """

    def ties_have_no_loss(self) -> bool:
        """
        True if the loss of a prompt is exactly 0 where all its images have one reward: no update need be computed for it.
        """
        return False

    def targets(self, sampled: RolloutBatch, rewards: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
        """
        What the loss learns from a batch, tensors with N samples in front.

        Args:
            sampled ([`RolloutBatch`]): The batch, with its endpoints [P, G, ...].
            rewards (`Tensor`): Total of the rewards in `rewards_to_compare`, shape [P, G], NaN where none applies.
            rows (`list[int]`): Rows of the P prompts in the training dataset.
        """
        raise NotImplementedError

    def loss(self, velocity: Tensor, old_velocity: Tensor, batch: ScoredBatch, level: int) -> SurrogateLoss:
        """
        Loss and ratio of each sample, shape [N], from its velocity now and in the rollout, in float32. The ratio is None in
        an algorithm that has none.
        """
        raise NotImplementedError

    def base_distance(self, velocity: Tensor, base_velocity: Tensor, batch: ScoredBatch, level: int) -> Tensor:
        """The distance that `beta` weighs: of each sample's velocity from the base model's, shape [N]."""
        raise NotImplementedError

    def shared_noise(self, rollout: int) -> float | None:
        """Mean share of their noise that the branches of a prompt have in common; None if they are independent."""
        return None
