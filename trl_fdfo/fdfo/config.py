"""Options of FDFO, in the order of the paper's steps."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..training.config import RolloutConfig, derived, option, with_help
from ..training.config_checks import check_ranges, read_json_dict


# Each schedule of `churn.py`, with the published amount of churn, and the `churn_kwargs` that it takes with their published
# values.
PUBLISHED_CHURN = {"constant": 0.0025, "interval": 1.0, "prior": 0.1}
CHURN_SCHEDULES = {
    "constant": {},
    "interval": {"location": 1.0, "location_std": 1.5, "width": 0.25, "spread": 0.0},
    "prior": {"spread": 1.0},
}
# The largest log(1 + gamma): beyond it nothing is left of the image.
MAX_CHURN = 10
DIRECTIONS = ("finite_difference", "reward_gradient")
TIMESTEP_SELECTIONS = ("stratified", "first")


@dataclass
@with_help
class FDFOConfig(RolloutConfig):
    r"""
    Configuration of [`FDFOTrainer`] (arXiv 2603.12893): the options of [`RolloutConfig`] and the ones below. The defaults
    are the paper's setting, apart from the number of rollouts, the prompts and the length of the text,
    `pipeline_kwargs={"max_sequence_length": 128}`. The paper's fast setting has `num_inference_steps=10`.

    Parameters:
        > Step 1: paired rollouts

        churn (`float`, *optional*):
            How much fresh noise drives the branches of a prompt apart, > 0. Under `constant` it is the gamma of every
            level; under `interval` and `prior` the (median) total of log(1 + gamma). `None` takes the published value of
            the schedule: 0.0025 (`constant`), 1.0 (`interval`), 0.1 (`prior`).
        churn_schedule (`str`, defaults to `"constant"`):
            `"constant"`: the same churn at every level. `"interval"`: all of it around one random noise level per
            prompt. `"prior"`: all of it in the initial noise.
        churn_kwargs (`dict`, *optional*):
            Shape of the schedule. `interval` takes `location` (mean over the prompts of the bump's centre in logit(t),
            1.0 by default: t = 0.73), `location_std` (its standard deviation over the prompts, 1.5), `width` (standard
            deviation of the bump in logit(t), > 0, 0.25) and `spread` (standard deviation over the prompts of the
            logarithm of the churn, 0.0: the same for all). `prior` takes `spread` (1.0).
        shared_prefix (`bool`, defaults to `False`):
            Under `churn_schedule="interval"`, sample one branch of each prompt until the churn of a batch begins, as
            the branches are identical until then. The bump has no end but float32's, 14.4 widths from its centre: this
            saves 2 to 5% of a rollout's compute at the published width, and up to half of it with a narrow bump at little
            noise. Costs the last bits: a smaller batch is computed in another order than the replay's.

        > Steps 3 and 4: update

        direction (`str`, defaults to `"finite_difference"`):
            The direction of an update. The finite difference estimates the gradient of the reward at the image.
            `"reward_gradient"` takes the gradient itself, through the decoder, of the rewards that have one, and the finite
            difference of the others.
        whiten_direction (`bool`, defaults to `True`):
            Divide the difference of the images by its mean square. Without it, close images move the model less.
        timestep_selection (`str`, defaults to `"stratified"`):
            The K noise levels of `timestep_fraction`. `"stratified"`: drawn at random for each rollout batch, one from each of
            K equal parts of the schedule. `"first"`: the K noisiest, always.
        beta (`float`, defaults to `0.0`):
            Weight of mean((v - v_base)^2), the penalty on leaving the model without its adapter. Keeps diversity.
        epsilon (`float`, defaults to `0.03`):
            Half the width of the trust region: how far one rollout may move the ratio of pseudo likelihoods from 1, > 0.
    """

    _VALID_DICT_FIELDS = [*RolloutConfig._VALID_DICT_FIELDS, "churn_kwargs"]
    renamed_options = {
        f"churn_{name}": f'churn_kwargs={{"{name}": ...}}' for kwargs in CHURN_SCHEDULES.values() for name in kwargs
    }

    # Step 1: paired rollouts
    noise_option: ClassVar[str | None] = "churn"

    churn: float | None = option(None)
    churn_schedule: str = option("constant", choices=tuple(CHURN_SCHEDULES))
    churn_kwargs: dict | str | None = option(None)
    shared_prefix: bool = option(False, changes_result=False)

    # Steps 3 and 4: update
    direction: str = option("finite_difference", choices=DIRECTIONS)
    whiten_direction: bool = option(True)
    timestep_selection: str = option("stratified", choices=TIMESTEP_SELECTIONS)

    def _check(self) -> None:
        super()._check()
        if self.churn_schedule not in CHURN_SCHEDULES:
            raise ValueError(f"churn_schedule='{self.churn_schedule}' is not one of {', '.join(CHURN_SCHEDULES)}.")
        if self.churn == 0:
            raise ValueError(
                "churn=0 leaves the images of a prompt identical: there is no difference to learn from. Leave it out: the "
                f"published setting is {PUBLISHED_CHURN[self.churn_schedule]} for churn_schedule='{self.churn_schedule}'."
            )
        check_ranges(self, {"churn": (0, MAX_CHURN)})
        self._check_churn_kwargs()
        if self.churn_schedule == "interval" and self.num_inference_steps < 2:
            raise ValueError(
                "churn_schedule='interval' puts its churn between the first and the last noise level, and "
                f"num_inference_steps={self.num_inference_steps} has none there. Set at least 2, or another schedule."
            )
        if self.shared_prefix and self.churn_schedule != "interval":
            raise ValueError(
                f"shared_prefix=True has nothing to share under churn_schedule='{self.churn_schedule}', which drives the "
                "branches apart from the start. Set it to False, or churn_schedule='interval'."
            )
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction='{self.direction}' is not one of {', '.join(DIRECTIONS)}.")
        if self.timestep_selection not in TIMESTEP_SELECTIONS:
            raise ValueError(
                f"timestep_selection='{self.timestep_selection}' is not one of {', '.join(TIMESTEP_SELECTIONS)}."
            )
        if self.timestep_selection == "first" and self.num_trained_levels == self.num_inference_steps:
            raise ValueError(
                f"timestep_selection='first' selects nothing: timestep_fraction={self.timestep_fraction} trains all of the "
                f"num_inference_steps={self.num_inference_steps} levels. Lower timestep_fraction, such as to 1 / steps for the "
                "noisiest level alone, or leave timestep_selection out."
            )
        if self.direction == "reward_gradient" and not self.whiten_direction:
            raise ValueError(
                "whiten_direction=False is for the finite difference: with direction='reward_gradient' leave it out."
            )

        if self.direction == "reward_gradient" and self.scale_rewards != "none":
            raise ValueError(
                f"scale_rewards='{self.scale_rewards}' scales the differences of rewards, and direction='reward_gradient' takes "
                "their gradients instead: set scale_rewards='none', or direction='finite_difference'."
            )
        if self.direction == "reward_gradient" and self.prompt_sampling != "uniform":
            raise ValueError(
                f"prompt_sampling='{self.prompt_sampling}' draws prompts less often whose images tie in reward, and "
                "direction='reward_gradient' learns from these too: set prompt_sampling='uniform', or "
                "direction='finite_difference'."
            )

    def _fill_in_defaults(self) -> None:
        super()._fill_in_defaults()
        if self.churn is None:
            self.churn = derived(PUBLISHED_CHURN[self.churn_schedule])

    def _check_churn_kwargs(self) -> None:
        """Also reads them, if they are a JSON string."""
        defaults = CHURN_SCHEDULES[self.churn_schedule]
        self.churn_kwargs = read_json_dict("churn_kwargs", self.churn_kwargs, "the shape of the churn schedule")
        for name, value in (self.churn_kwargs or {}).items():
            if name not in defaults:
                takes = ", ".join(defaults) or "none"
                raise ValueError(
                    f"churn_kwargs has {name}={value!r}, and churn_schedule='{self.churn_schedule}' takes {takes}."
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise ValueError(f"churn_kwargs has {name}={value!r}: it must be a finite number.")
            if name in ("location_std", "spread") and value < 0:
                raise ValueError(f"churn_kwargs has {name}={value}: it must not be negative.")
            if name == "width" and value <= 0:
                raise ValueError(f"churn_kwargs has {name}={value}: it must be > 0.")

    def churn_shape(self) -> dict[str, float]:
        """The shape of the schedule: `churn_kwargs`, and the defaults of what it leaves out."""
        return CHURN_SCHEDULES[self.churn_schedule] | (self.churn_kwargs or {})

    def result_options(self) -> dict[str, Any]:
        options = super().result_options()
        # One name for each, under which the checkpoints of version 0.1 have them.
        del options["churn_kwargs"]
        return options | {f"churn_{name}": value for name, value in self.churn_shape().items()}
