"""
Seconds of counted operations on a card. An estimate, by one formula: a call takes

    max(FLOPs / (UTILISATION x peak) + traffic / (THROUGHPUT x bandwidth), operations x LAUNCH)

seconds. Matrix products, convolutions and attention (FLOPs) run at a fraction of the card's peak; all other operations
move bytes (traffic) at a fraction of its bandwidth; and the host, which launches operations ahead of the card, may be the
slower one. [`Cost`] has the three counts. The constants are fitted to calls of a transformer of 2.2 billion weights on an H100
and an H200 (docs/memory_plan.md has them beside the formula).
"""

from dataclasses import dataclass

import torch

from .cost import Cost


# Both multiplied large matrices at 0.76 of their peak; the products and the attention of a transformer are smaller.
UTILISATION = 0.5
# Share of the bandwidth. Eager norms and modulations broadcast and reduce, and their kernels use less than half of it.
THROUGHPUT = 0.45
# Seconds of the host per operation: of a virtual machine with 16 cores, Python and LoRA layers included. Of two such machines
# one took 20 to 23 us, and the other 30 to 40.
LAUNCH = 23e-6
# Shares of the seconds that remain where `torch_compile` fuses operations. Inductor's kernels move 0.35 of a joint
# transformer's traffic in sampling and 0.43 in training by PyTorch's count (benchmarks/results/traffic.txt), and faster.
COMPILED_TRAFFIC, COMPILED_OPERATIONS = 0.3, 0.6
# A pass with gradients takes this / peak seconds less for each FLOP of attention, if cuDNN's kernel computes it and not flash's. The
# number is fitted to two runs on an H100, on which flash's kernel ran at 0.18 of the peak and cuDNN's at 0.24.
CUDNN_SAVING = 1.37


@dataclass(frozen=True)
class Card:
    """
    A GPU by its data sheet.

    Attributes:
        memory (`int`): GB.
        peak (`float`): FLOP/s of its tensor cores in bfloat16 or float16, dense, with sums in float32. TF32 has half.
        float32 (`float`): FLOP/s in float32, outside the tensor cores.
        bandwidth (`float`): Bytes/s of its memory.
    """

    memory: int
    peak: float
    float32: float
    bandwidth: float

    def seconds(
        self, cost: Cost, dtype: torch.dtype, tf32: bool = False, compiled: bool = False, cudnn: bool = False
    ) -> float:
        """
        Estimated seconds of calls.

        Args:
            cost ([`Cost`]): What the calls cost.
            dtype (`torch.dtype`): Dtype of their matrix products and convolutions.
            tf32 (`bool`): Those in float32 run in TF32, as PyTorch runs convolutions.
            compiled (`bool`): The calls are compiled.
            cudnn (`bool`): They are passes with gradients, whose attention is cuDNN's kernel.
        """
        return max(self.busy_seconds(cost, dtype, tf32, compiled, cudnn), host_seconds(cost, compiled))

    def busy_seconds(
        self, cost: Cost, dtype: torch.dtype, tf32: bool = False, compiled: bool = False, cudnn: bool = False
    ) -> float:
        """Estimated seconds of the card alone, for the arguments of [`Card.seconds`]."""
        peak = self.peak if dtype != torch.float32 else self.peak / 2 if tf32 else self.float32
        traffic = COMPILED_TRAFFIC * cost.traffic if compiled else cost.traffic
        saved = CUDNN_SAVING * cost.attention / peak if cudnn else 0.0
        return cost.flops / (UTILISATION * peak) + traffic / (THROUGHPUT * self.bandwidth) - saved


def host_seconds(cost: Cost, compiled: bool = False) -> float:
    """Estimated seconds that the host takes to launch calls."""
    return LAUNCH * cost.operations * (COMPILED_OPERATIONS if compiled else 1)


# NVIDIA's data sheets of the A100 80GB, H100, H200 (all SXM), L40S and DGX B200 (an eighth of it), and its white papers
# "Ada GPU Architecture" and "RTX Blackwell GPU Architecture". Where they print figures with sparsity, half of these.
CARDS = {
    # name           memory     peak  float32  bandwidth
    "rtx4090": Card(24, 165.2e12, 82.6e12, 1008e9),
    "rtx5090": Card(32, 209.5e12, 104.8e12, 1792e9),
    "l40s": Card(48, 362e12, 91.6e12, 864e9),
    "a100": Card(80, 312e12, 19.5e12, 2039e9),
    "h100": Card(80, 989e12, 67e12, 3350e9),
    "h200": Card(141, 989e12, 67e12, 4800e9),
    "b200": Card(180, 2250e12, 75e12, 8000e9),
}
