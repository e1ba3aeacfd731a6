"""
Where the random numbers of a run come from: each from a seed that follows from the run's and from global numbers, and
never from what was drawn before. So a result depends neither on the number of processes nor on where a run was resumed.
"""

import operator

import numpy as np


# Last numbers of a seed: what is drawn with it. The orders of the prompts and of the noise levels have shorter seeds.
INITIAL_NOISE, SAMPLER_NOISE, CHURN, EVALUATION, NOISY_STEPS, FORWARD_NOISE = range(6)

# Seed of the first image that is shown or scored beside a run. The seeds of rollouts are hashes of 64 bits: these are used
# nowhere else.
FIRST_SEED = 1_000_000


def derive_seed(*numbers: int) -> int:
    """
    A 64-bit seed that depends on all of the numbers, so that streams of random numbers do not overlap. They are whole and
    not negative, of Python, numpy or torch.
    """
    numbers = [operator.index(number) for number in numbers]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
