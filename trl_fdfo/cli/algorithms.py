"""The algorithms by name, for YAML files and command lines."""

from ..awm.trainer import AWMTrainer
from ..diffusion_nft.trainer import DiffusionNFTTrainer
from ..fdfo.trainer import FDFOTrainer
from ..flow_grpo.trainer import FlowGRPOTrainer


ALGORITHMS = {
    "fdfo": FDFOTrainer,
    "flow_grpo": FlowGRPOTrainer,
    "diffusion_nft": DiffusionNFTTrainer,
    "awm": AWMTrainer,
}
