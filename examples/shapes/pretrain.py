"""
Rebuilds the packaged demo pipeline of `trl_fdfo.shapes` from nothing, in minutes on two CPU cores:

    python examples/shapes/pretrain.py --output trl_fdfo/shapes/pipeline

A real `StableDiffusion3Pipeline`, only tiny: an AutoencoderKL, two CLIP text encoders and an SD3 transformer, trained
on rendered shapes. Many captions carry a wrong colour word on purpose, so that RL post-training has something plain to
see to repair. About 11 minutes; with 8 steps, over four seeds of 8 images per caption:

    | guidance | strict accuracy | right shape, cleanly drawn, any colour  |
    |----------|-----------------|-----------------------------------------|
    | none     | 0.27 to 0.30    | 0.78 to 0.82                            |
    | 1.5      | 0.36 to 0.41    | 0.84 to 0.88                            |
    | 2.0      | 0.42 to 0.47    | 0.87 to 0.91                            |
"""

import argparse
import random
import time
from collections.abc import Callable
from types import ModuleType

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from trl_fdfo import shapes


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which each word of the captions is one token, and any other text is spelled out."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    words = [[*word[:-1], word[-1] + "</w>"] for word in sorted({w for c in captions for w in c.split()})]
    merges = []
    while any(len(word) > 1 for word in words):
        left, right = next(word for word in words if len(word) > 1)[:2]
        merges.append((left, right))
        tokens.append(left + right)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    # A caption stands between a start and an end token; every token more would cost time.
    longest = 2 + max(len(caption.split()) for caption in captions)
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=longest)


def build_pipeline(captions: list[str]) -> StableDiffusion3Pipeline:
    """The untrained pipeline: 32 x 32 images, 8 x 8 latents with 4 channels, 16 image tokens."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=shapes.IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    tokenizers = [build_tokenizer(captions), build_tokenizer(captions)]
    text_encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=48,
                intermediate_size=96,
                projection_dim=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        for tokenizer in tokenizers
    ]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=96,
        caption_projection_dim=96,
        pooled_projection_dim=96,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_vae(vae: AutoencoderKL, steps: int, world: ModuleType = shapes, batch_size: int = 16) -> None:
    """
    Reconstruction with a trace of KL, which only keeps the latents from drifting apart. The `world` has `captions()` and
    `render(prompts)`, as `trl_fdfo.shapes` does.
    """
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(1, steps + 1):
        images = world.render(random.choices(world.captions(), k=batch_size)) * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample()).sample - images).square().mean()
        loss = error + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            psnr = -10 * (error / 4).log10()  # images span [-1, 1] here
            print(f"vae step {step}/{steps}  psnr {psnr:.1f} dB  {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, size: int, world: ModuleType = shapes) -> tuple[torch.Tensor, list[str]]:
    """Latents [size, 4, 8, 8] with zero mean and unit variance, by the VAE's own scale and shift; and captions."""
    prompts = random.choices(world.captions(), k=size)
    latents = torch.cat(
        [vae.encode(world.render(prompts[i : i + 500]) * 2 - 1).latent_dist.mode() for i in range(0, size, 500)]
    )
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor, prompts


def with_wrong_color(prompt: str) -> str:
    """The caption with another colour word."""
    _, color, rest = prompt.split(" ", 2)
    return f"a {random.choice([other for other in shapes.COLORS if other != color])} {rest}"


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    latents: torch.Tensor,
    prompts: list[str],
    steps: int,
    wrong_words: float,
    world: ModuleType = shapes,
    with_wrong_word: Callable[[str], str] = with_wrong_color,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
) -> None:
    """
    Flow matching: x_t = (1 - sigma) x_0 + sigma eps, and the transformer predicts v = eps - x_0. Leaves the moving
    average of transformer and text encoders in the pipeline. A share `wrong_words` of the captions gets a wrong word.
    """
    models = torch.nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])
    average = AveragedModel(models, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(models.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    vocabulary = [*world.captions(), ""]  # the empty prompt serves guidance
    start, running = time.time(), 0.0
    for step in range(1, steps + 1):
        rows = random.choices(range(len(prompts)), k=batch_size)
        words = [with_wrong_word(prompts[r]) if random.random() < wrong_words else prompts[r] for r in rows]
        words = ["" if random.random() < 0.1 else word for word in words]
        embeds, _, pooled, _ = pipeline.encode_prompt(
            vocabulary, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
        chosen = torch.tensor([vocabulary.index(word) for word in words])

        x_0 = latents[rows]
        eps = torch.randn_like(x_0)
        sigma = torch.randn(batch_size).sigmoid()  # the middle levels, where shapes are decided, are the hard ones
        x_t = torch.lerp(x_0, eps, sigma[:, None, None, None])
        velocity = pipeline.transformer(
            x_t, timestep=1000 * sigma, encoder_hidden_states=embeds[chosen], pooled_projections=pooled[chosen]
        ).sample
        loss = (velocity - (eps - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(models)
        running += loss.item()
        if step % 500 == 0:
            print(f"flow step {step}/{steps}  loss {running / 500:.4f}  {time.time() - start:.0f} s", flush=True)
            running = 0.0
    models.load_state_dict(average.module.state_dict())


def evaluate(pipeline: StableDiffusion3Pipeline, guidance_scale: float, seed: int = 1000) -> dict[str, float]:
    """`shapes.metrics` of 8 images per caption."""
    prompts = shapes.captions() * 8
    images = pipeline(
        prompts,
        num_inference_steps=8,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images
    return shapes.metrics(images, prompts)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="trl_fdfo/shapes/pipeline", help="folder to save the pipeline to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--flow-steps", type=int, default=5500)
    parser.add_argument("--dataset-size", type=int, default=40000, help="rendered images the flow is trained on")
    parser.add_argument("--wrong-colors", type=float, default=0.5, help="share of captions with a wrong colour word")
    args = parser.parse_args(args)

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    pipeline = build_pipeline(shapes.captions())
    train_vae(pipeline.vae, args.vae_steps)
    latents, prompts = encode_dataset(pipeline.vae, args.dataset_size)
    train_flow(pipeline, latents, prompts, args.flow_steps, args.wrong_colors)

    pipeline.to(torch.float16).save_pretrained(args.output)
    pipeline.to(torch.float32)  # evaluated as it will be loaded: float16 weights, float32 arithmetic
    for guidance_scale in (1.0, 1.5):
        print(f"guidance {guidance_scale}:")
        for name, value in evaluate(pipeline, guidance_scale).items():
            print(f"  {name:28s} {value:.3f}")


if __name__ == "__main__":
    main()
