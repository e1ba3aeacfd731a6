"""RL post-training of text-to-image models with Finite Difference Flow Optimization (FDFO, arXiv 2603.12893)."""

from typing import TYPE_CHECKING

from .noise import silence


__version__ = "0.2.0"

__all__ = [
    "AWMConfig",
    "AWMTrainer",
    "DiffusionNFTConfig",
    "DiffusionNFTTrainer",
    "FDFOConfig",
    "FDFOTrainer",
    "FlowGRPOConfig",
    "FlowGRPOTrainer",
    "RAMConfig",
    "RAMTrainer",
]

silence()

if TYPE_CHECKING:
    from .awm.config import AWMConfig
    from .awm.trainer import AWMTrainer
    from .diffusion_nft.config import DiffusionNFTConfig
    from .diffusion_nft.trainer import DiffusionNFTTrainer
    from .fdfo.config import FDFOConfig
    from .fdfo.trainer import FDFOTrainer
    from .flow_grpo.config import FlowGRPOConfig
    from .flow_grpo.trainer import FlowGRPOTrainer
    from .ram.config import RAMConfig
    from .ram.trainer import RAMTrainer

_MODULES = {
    "AWMConfig": "awm.config",
    "AWMTrainer": "awm.trainer",
    "DiffusionNFTConfig": "diffusion_nft.config",
    "DiffusionNFTTrainer": "diffusion_nft.trainer",
    "FDFOConfig": "fdfo.config",
    "FDFOTrainer": "fdfo.trainer",
    "FlowGRPOConfig": "flow_grpo.config",
    "FlowGRPOTrainer": "flow_grpo.trainer",
    "RAMConfig": "ram.config",
    "RAMTrainer": "ram.trainer",
}


def __getattr__(name: str):
    # Imported when first used: transformers and diffusers take seconds.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
