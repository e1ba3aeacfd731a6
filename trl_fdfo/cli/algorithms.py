"""The algorithms by name, for YAML files and command lines."""

# Names of trainers in `trl_fdfo`, the first for runs that name none. The config of `XTrainer` is `XConfig`.
ALGORITHMS = {
    "fdfo": "FDFOTrainer",
    "flow_grpo": "FlowGRPOTrainer",
    "diffusion_nft": "DiffusionNFTTrainer",
    "awm": "AWMTrainer",
    "ram": "RAMTrainer",
}
CONFIGS = {name: trainer.replace("Trainer", "Config") for name, trainer in ALGORITHMS.items()}
