"""Applies options to a pipeline: quantization, slicing and tiling of the VAE, attention backend, compilation."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_repeated_blocks
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .trained import TRAINED, trained_module


# Compiled versions that the blocks of one class share, per run: some transformers have three kinds of blocks, each times
# sampling, training and the base model of `beta`. Beyond PyTorch's own limit of 8 it would go on without compiling.
COMPILED_VERSIONS = 32

# Pixels of two images of 512 x 512. A VAE of 84 million weights takes 0.75 GiB for each of them, in float32, as the
# plan of a run counts it.
SLICED_PIXELS = 2 * 512 * 512


def quantization_config(
    quantization: str, dtype: torch.dtype, transformers: Sequence[str] = (TRAINED,)
) -> PipelineQuantizationConfig:
    """
    Make the `quantization_config` with which `DiffusionPipeline.from_pretrained` loads the transformer quantised.

    Args:
        quantization (`str`): `"nf4"` or `"int8"`.
        dtype (`torch.dtype`): The dtype of the matrix products.
        transformers (`Sequence[str]`): Names of the transformers in the pipeline.

    Raises:
        ImportError: The quantising package is not installed.
        ValueError: `"nf4"` without an accelerator: bitsandbytes quantises for diffusers only there.
    """
    if quantization == "nf4" and not torch.accelerator.is_available():
        raise ValueError(
            "quantization='nf4' needs a GPU, on which diffusers and bitsandbytes quantise. On a CPU set quantization='int8'."
        )
    with _needing_the_extra(quantization):
        if quantization == "nf4":
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        else:
            from torchao.quantization import Int8WeightOnlyConfig

            config = TorchAoConfig(Int8WeightOnlyConfig())
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(transformers, config))


def quantize_to_int8(model: torch.nn.Module) -> None:
    """
    Quantise the linear layers of a model, but for adapters, in place, as `quantization_config` has them loaded.

    Raises:
        ImportError: torchao is not installed.
    """
    with _needing_the_extra("int8"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    is_base = lambda module, name: isinstance(module, torch.nn.Linear) and "lora_" not in name
    quantize_(model, Int8WeightOnlyConfig(), is_base)


@contextlib.contextmanager
def _needing_the_extra(quantization: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"quantization='{quantization}' needs a package that is not installed ({error}): "
            "pip install 'trl_fdfo[quantization]'."
        ) from error


def is_quantized(model: torch.nn.Module) -> bool:
    """Tell if some weights are quantised, by whichever library: integers, or tensors that wrap integers."""
    return any(
        not parameter.is_floating_point() or is_traceable_wrapper_subclass(parameter)
        for parameter in model.parameters()
    )


def keep_out_of_ddp(model: torch.nn.Module) -> None:
    """
    Make DDP ignore torchao's weights. At the start DDP sends all weights from the first process to the others, and it
    cannot send these; each process has loaded the same ones anyway.
    """
    names = [name for name, weight in model.named_parameters() if is_traceable_wrapper_subclass(weight)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def set_vae_options(pipeline: DiffusionPipeline, slicing: bool | None, tiling: bool, pixels: int) -> None:
    """
    Turn on slicing and tiling of the VAE.

    Args:
        pipeline (`DiffusionPipeline`): The pipeline, changed in place.
        slicing (`bool`, *optional*): Decode one image at a time. None: if more than [`SLICED_PIXELS`] would be decoded at a
            time, and the VAE can.
        tiling (`bool`): Decode large images in tiles.
        pixels (`int`): Most pixels that are decoded at a time, over all images of a batch.

    Raises:
        ValueError: The VAE has no such option.
    """
    vae = getattr(pipeline, "vae", None)
    if slicing is None:
        slicing = pixels > SLICED_PIXELS and hasattr(vae, "use_slicing")
    for option, method, wanted in (
        ("vae_slicing", "enable_slicing", slicing),
        ("vae_tiling", "enable_tiling", tiling),
    ):
        if not wanted:
            continue
        try:
            getattr(vae, method)()
        except (AttributeError, NotImplementedError):
            raise ValueError(
                f"{option}=True, but the VAE of {type(pipeline).__name__}, a {type(vae).__name__}, has no "
                f"`{method}`: leave it out, and lower `per_device_prompt_batch_size` if memory is short."
            ) from None


# Kernels that PyTorch's attention chooses from.
_KERNELS = ("flash", "mem_efficient", "math", "cudnn")
_KERNELS_TAG = " attention="


def set_attention_backend(pipeline: DiffusionPipeline, backend: str | None) -> None:
    """
    Call `transformer.set_attention_backend`, or let PyTorch choose cuDNN's kernel, where attention does not use
    diffusers' backends. For `None`, PyTorch chooses among its other kernels. What was compiled with other kernels is not
    taken from PyTorch's cache.

    Raises:
        ValueError: The transformer's attention does not use diffusers' backends, or this one is not installed.
    """
    # PyTorch's default on Hopper cards, whose backward pass can return NaN: https://github.com/pytorch/pytorch/issues/196678.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if backend is not None:
        _use_attention_backend(pipeline, backend)
    # PyTorch chooses as it compiles, and keeps what it has compiled on disk without that choice, for other runs with other
    # choices: https://github.com/pytorch/pytorch/issues/185449.
    config = torch.compiler.config
    allowed = [name for name in _KERNELS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    config.cache_key_tag = f"{config.cache_key_tag.partition(_KERNELS_TAG)[0]}{_KERNELS_TAG}{','.join(allowed)}"


def _use_attention_backend(pipeline: DiffusionPipeline, backend: str) -> None:
    transformer = trained_module(pipeline)
    processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        if backend == "_native_cudnn":
            # PyTorch prefers this kernel where it can run.
            torch.backends.cuda.enable_cudnn_sdp(True)
            return
        names = ", ".join(sorted({type(processor).__name__ for processor in processors})) or "none at all"
        raise ValueError(
            f"attention_backend='{backend}' would do nothing: the attention processors of {type(transformer).__name__} "
            f"({names}) call PyTorch's attention themselves, not through diffusers' choice of backends. Leave it out, or take "
            "'_native_cudnn'."
        )
    try:
        transformer.set_attention_backend(backend)
    except RuntimeError as error:
        raise ValueError(f"attention_backend='{backend}' cannot be used here: {error}") from error


def compile_blocks(accelerator: Accelerator, transformer: torch.nn.Module) -> bool:
    """
    Compile the repeated blocks of a transformer, in place, instead of the whole of it, as Accelerate would. The blocks
    take nearly all of its time, and compile in a fraction of the time. The names of its weights do not change.

    Call this before the transformer is wrapped.

    Returns:
        `bool`: Whether compilation is asked for.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return False
    # Each batch size has graphs of its own: kernels for any size would be slower for all, and round otherwise.
    options = {"dynamic": False, **plugin.to_kwargs()}
    plugin.backend = DynamoBackend.NO
    for block in list(repeated_blocks(transformer)) or [transformer]:
        block.compile(recompile_limit=COMPILED_VERSIONS, **options)
    return True


def repeated_blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """
    The blocks to compile: the members of each list of modules of one class. A list inside a member, such as experts, is a
    part of it.
    """
    if is_repeated_blocks(module):
        yield from module
    else:
        for child in module.children():
            yield from repeated_blocks(child)
