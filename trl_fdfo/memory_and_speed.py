"""What the options `quantization`, `vae_slicing`, `vae_tiling`, `attention_backend` and `torch_compile` do to a pipeline."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_repeated_blocks
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


# Blocks of one class share what was compiled for the first of them, up to this many versions per run: some classes of
# blocks (SD 3.5 has three kinds) x sampling, training and the base model of `beta`. PyTorch's limit of 8, beyond which it
# goes on without compiling, is too low for that.
_COMPILED_VERSIONS = 32


def quantization_config(quantization: str, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """
    What `DiffusionPipeline.from_pretrained` takes as `quantization_config` to load the transformer quantised.

    Args:
        quantization (`str`): `"nf4"` or `"int8"`.
        dtype (`torch.dtype`): What the matrix products are computed in.

    Raises:
        ImportError: The package that quantises is not installed.
        ValueError: bitsandbytes quantises for diffusers on an accelerator alone, and there is none.
    """
    if quantization == "nf4" and not torch.accelerator.is_available():
        raise ValueError(
            "quantization='nf4' needs a GPU, on which diffusers and bitsandbytes quantise. On a CPU set quantization='int8'."
        )
    try:
        if quantization == "nf4":
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        else:
            from torchao.quantization import Int8WeightOnlyConfig

            config = TorchAoConfig(Int8WeightOnlyConfig())
    except ImportError as error:
        raise ImportError(
            f"quantization='{quantization}' needs a package that is not installed ({error}): "
            "pip install 'trl_fdfo[quantization]'."
        ) from error
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether some weights are quantised, by whichever library: integers, or tensors that stand for other ones."""
    return any(
        not parameter.is_floating_point() or is_traceable_wrapper_subclass(parameter)
        for parameter in model.parameters()
    )


def some_values(parameter: torch.Tensor) -> list:
    """A few values of a weight, quantised or not: enough to tell two models apart."""
    if is_traceable_wrapper_subclass(parameter):  # torchao's, which cannot be indexed as others can
        return [some_values(getattr(parameter, name)) for name in parameter.__tensor_flatten__()[0]]
    return parameter.flatten()[:16].tolist()


def keep_out_of_ddp(model: torch.nn.Module) -> None:
    """
    Have DDP leave torchao's weights alone: at the start it sends all weights from the first process to the others, and
    cannot send these. Each process has loaded the same.
    """
    names = [name for name, weight in model.named_parameters() if is_traceable_wrapper_subclass(weight)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def set_vae_options(pipeline: DiffusionPipeline, slicing: bool, tiling: bool) -> None:
    """
    Raises:
        ValueError: The VAE cannot do it.
    """
    for option, method, wanted in (
        ("vae_slicing", "enable_slicing", slicing),
        ("vae_tiling", "enable_tiling", tiling),
    ):
        if not wanted:
            continue
        try:
            getattr(pipeline.vae, method)()
        except (AttributeError, NotImplementedError):
            raise ValueError(
                f"{option}=True, but the VAE of {type(pipeline).__name__}, a {type(pipeline.vae).__name__}, has no "
                f"`{method}`: leave it out, and lower `per_device_prompt_batch_size` where memory is short."
            ) from None


def set_attention_backend(pipeline: DiffusionPipeline, backend: str) -> None:
    """
    `transformer.set_attention_backend`, where that does something.

    Raises:
        ValueError: The transformer's attention does not ask diffusers for a backend, or this one is not installed.
    """
    transformer = pipeline.transformer
    processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        names = ", ".join(sorted({type(processor).__name__ for processor in processors})) or "none at all"
        raise ValueError(
            f"attention_backend='{backend}' would do nothing: the attention processors of {type(transformer).__name__} "
            f"({names}) call PyTorch's attention themselves, not through diffusers' choice of backends. Leave it out."
        )
    try:
        transformer.set_attention_backend(backend)
    except RuntimeError as error:
        raise ValueError(f"attention_backend='{backend}' cannot be used here: {error}") from error


def compile_blocks(accelerator: Accelerator, transformer: torch.nn.Module) -> None:
    """
    `torch_compile`, in place, of the repeated blocks alone: what makes up nearly all of a transformer's time, in a
    fraction of the time that compiling it whole takes. Its modules and the names of its weights stay what they are.

    To be called before the transformer is wrapped; Accelerate, which would compile all of it, is told not to.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return
    options = plugin.to_kwargs()
    plugin.backend = DynamoBackend.NO
    for block in list(_repeated_blocks(transformer)) or [transformer]:
        block.compile(recompile_limit=_COMPILED_VERSIONS, **options)


def _repeated_blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The members of all lists of modules of one class; of lists within such members, as of experts, only the members."""
    if is_repeated_blocks(module):
        yield from module
    else:
        for child in module.children():
            yield from _repeated_blocks(child)
