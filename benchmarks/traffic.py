"""
Counts what a call of Stable Diffusion 3.5 Medium's transformer costs a GPU beside its matrix products, on 4 images of 512
pixels, in bfloat16 with the LoRA of a run with default options, and what that makes of the paper's setting on an H100:

    python benchmarks/traffic.py

Rows: under autocast, with PEFT's LoRA layers, as other trainers run it; in the transformer's own dtype, as a run here does;
and with `torch_compile`. Traffic is what all operations but matrix products, convolutions and attention read and write,
counted on fake tensors. Of compiled blocks it is what Inductor's fused kernels read and write, by PyTorch's own count for
the kernels of this CPU (a minute of compilation). Seconds are an estimate, by the formula of trl_fdfo/planning/time.py.
"""

import argparse
import contextlib
import logging
from dataclasses import replace

import torch
from diffusers.models.attention import JointTransformerBlock
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor import metrics
from torch._inductor.scheduler import ExternKernelSchedulerNode

from benchmarks.gpu_sd35 import MEDIUM, build_adapted_transformer, building, transformer_inputs
from trl_fdfo.pipeline.lora import default_lora_config
from trl_fdfo.pipeline.own_dtype import run_in_own_dtype
from trl_fdfo.planning.cost import Cost, Precision, sampling_cost, training_cost
from trl_fdfo.planning.time import CARDS


IMAGES = 4
# The paper's setting: images of a rollout, steps.
ROLLOUT, STEPS = 864, 40


def adapted(own_dtype: bool) -> tuple[PeftModel, list[tuple[tuple, dict]]]:
    """The transformer with its LoRA on the meta device, and the arguments of a call."""
    meta = torch.device("meta")
    model = build_adapted_transformer(MEDIUM, meta)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    if own_dtype:
        run_in_own_dtype(model)
    with building(meta):
        return model, [((), transformer_inputs(MEDIUM, IMAGES))]


class Block(nn.Module):
    """A joint block of the transformer, whose two outputs are one."""

    dtype = torch.bfloat16

    def __init__(self, dual: bool):
        super().__init__()
        width = MEDIUM.transformer["num_attention_heads"] * MEDIUM.transformer["attention_head_dim"]
        heads = MEDIUM.transformer["num_attention_heads"]
        self.block = JointTransformerBlock(width, heads, width // heads, qk_norm="rms_norm", use_dual_attention=dual)

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat([output.flatten() for output in self.block(*tensors)])


def fused_traffic(block: nn.Module, inputs: tuple[Tensor, ...], train: bool) -> int:
    """Bytes that the fused kernels of a compiled block read and write, with its backward pass if `train`."""
    metrics.reset()
    torch.compiler.reset()
    with torch.set_grad_enabled(train), inductor.patch(fx_graph_cache=False), counting_bytes():
        output = torch.compile(block, dynamic=False)(*inputs)
        if train:
            output.float().square().mean().backward()
    return sum(4 * count for node, count in metrics.nodes_num_elem if not isinstance(node, ExternKernelSchedulerNode))


@contextlib.contextmanager
def counting_bytes():
    """Inductor counts if the logger of its metrics would show them."""
    logger = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate


def compiled_share() -> tuple[float, float]:
    """
    Traffic of the compiled blocks relative to the same blocks as they are, in sampling and in training. Of a quarter of an
    image of 512 pixels, of which it is about the same share.
    """
    width = MEDIUM.transformer["num_attention_heads"] * MEDIUM.transformer["attention_head_dim"]
    duals = len(MEDIUM.transformer["dual_attention_layers"])
    blocks = {True: duals, False: MEDIUM.transformer["num_layers"] - duals}
    eager, fused = [0, 0], [0, 0]
    for dual, count in blocks.items():
        torch.manual_seed(0)
        block = Block(dual).to(torch.bfloat16).requires_grad_(False)
        model = get_peft_model(block, default_lora_config(32, 64, None, block))
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
        run_in_own_dtype(model)
        shapes = ((1, 256, width), (1, 51, width), (1, width))
        inputs = tuple(torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        for train, cost in enumerate((sampling_cost, training_cost)):
            eager[train] += count * cost(model, [(inputs, {})], Precision("cuda")).traffic
            fused[train] += count * fused_traffic(model, inputs, bool(train))
    return fused[0] / eager[0], fused[1] / eager[1]


def report(title: str, sampling: Cost, training: Cost) -> None:
    card, calls = CARDS["h100"], ROLLOUT // IMAGES * STEPS
    seconds = [calls * card.seconds(cost, torch.bfloat16) for cost in (sampling, training)]
    print(
        f"{title:38} {sampling.traffic / 1e9:7.0f} GB {sampling.operations:7,} {training.traffic / 1e9:7.0f} GB "
        f"{training.operations:7,} {seconds[0]:10.0f} s {seconds[1]:9.0f} s {sum(seconds):7.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without_compiler", action="store_true", help="leave out the rows that take a compiler")
    without_compiler = parser.parse_args().without_compiler
    autocast, own = Precision("cuda", torch.bfloat16), Precision("cuda")
    print(
        f"torch {torch.__version__}; per call of {IMAGES} images; seconds of {ROLLOUT} images x {STEPS} steps on an H100"
    )
    print(
        f"{'':38} {'sampling':>10} {'ops':>7} {'training':>10} {'ops':>7} {'sampling':>12} {'training':>11} {'sum':>9}"
    )
    for title, precision in (("autocast, PEFT's layers", autocast), ("own dtype", own)):
        model, calls = adapted(own_dtype=precision is own)
        costs = [sampling_cost(model, calls, precision), training_cost(model, calls, precision)]
        report(title, *costs)
        if precision is own:
            report("own dtype, gradient checkpointing", costs[0], training_cost(model, calls, precision, True))
    if not without_compiler:
        shares = compiled_share()
        # The count of the kernels that remain is not known: launches of a graph are taken for free.
        compiled = [replace(c, traffic=int(share * c.traffic), operations=0) for c, share in zip(costs, shares)]
        report(f"own dtype, compiled ({shares[0]:.2f}, {shares[1]:.2f})", *compiled)
    flops = [cost.flops / 1e12 for cost in costs]
    print(f"matrix products, convolutions, attention: {flops[0]:.1f} and {flops[1]:.1f} TFLOP per call")


if __name__ == "__main__":
    main()
