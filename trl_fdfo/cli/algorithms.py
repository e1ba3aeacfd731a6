"""The algorithms by name, for YAML files and command lines."""

from ..fdfo.trainer import FDFOTrainer
from ..flow_grpo.trainer import FlowGRPOTrainer


ALGORITHMS = {"fdfo": FDFOTrainer, "flow_grpo": FlowGRPOTrainer}
