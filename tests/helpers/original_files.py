"""Tiny files in the layouts of models' authors, with random weights: names and shapes are those of the published files."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(rows, columns) / columns**0.5, f"{name}.bias": torch.randn(rows) / 10}


def sd3_file(transformer, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """A checkpoint of Stable Diffusion 3 with the sizes of a transformer, and with a tensor of the VAE."""
    config, width, tensors = transformer.config, transformer.inner_dim, {}
    for block in range(config.num_layers):
        last = block == config.num_layers - 1
        for stream in ("x_block", "context_block"):
            name = f"joint_blocks.{block}.{stream}"
            ends = last and stream == "context_block"
            dual = stream == "x_block" and block in config.dual_attention_layers
            tensors |= linear(f"{name}.adaLN_modulation.1", (2 if ends else 9 if dual else 6) * width, width)
            for attention in ("attn", "attn2") if dual else ("attn",):
                tensors |= linear(f"{name}.{attention}.qkv", 3 * width, width)
                if config.qk_norm:
                    for norm in ("ln_q", "ln_k"):
                        tensors[f"{name}.{attention}.{norm}.weight"] = torch.rand(config.attention_head_dim)
                if not ends:
                    tensors |= linear(f"{name}.{attention}.proj", width, width)
            if not ends:
                tensors |= linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
    patch = config.patch_size
    tensors["x_embedder.proj.weight"] = torch.randn(width, config.in_channels, patch, patch) / 8
    tensors["x_embedder.proj.bias"] = torch.randn(width)
    tensors["pos_embed"] = transformer.pos_embed.pos_embed.clone()
    tensors |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    tensors |= linear("y_embedder.mlp.0", width, config.pooled_projection_dim) | linear(
        "y_embedder.mlp.2", width, width
    )
    tensors |= linear("context_embedder", width, config.joint_attention_dim)
    tensors |= linear("final_layer.linear", patch**2 * config.out_channels, width)
    tensors |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    tensors = {f"model.diffusion_model.{name}": tensor.to(dtype) for name, tensor in tensors.items()}
    save_file({**tensors, "first_stage_model.conv.weight": torch.randn(4)}, path, metadata={"title": "tiny"})


# Names of Wan's files, and diffusers' for the same weights.
WAN_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1.": "self_attn.",
    "attn2.": "cross_attn.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "o.",
    "norm2.": "norm3.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
}


def wan_file(transformer, path: Path) -> None:
    """A checkpoint of Wan with the weights of a transformer."""
    tensors = {}
    for name, weight in transformer.state_dict().items():
        for diffusers, own in WAN_NAMES.items():
            name = name.replace(diffusers, own)
        table = "modulation" if name.startswith("blocks.") else "head.modulation"
        tensors[name.replace("scale_shift_table", table)] = weight.clone()
    save_file(tensors, path)
