"""
Silences what libraries say about themselves when they are imported, and nobody can act on: each message by its words, in
the logger that says it. Whatever else they say is heard.
"""

import logging


_MESSAGES = {
    # diffusers asks transformers for image processors; without torchvision those of PIL are taken, which is what we want.
    "transformers.utils.import_utils": ("requires torchvision (not installed)",),
    # Kernels for float8 and mxfp8 on some GPUs; int8, the only one of torchao's types that is used here, needs none.
    "torchao": ("Failed to load ",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    # torchao registers its enums in a way that PyTorch no longer needs.
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    # A kernel for sampling from 4-bit weights on CPUs.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # accelerate imports DeepSpeed in each run if it is installed, also in a run without it.
    "DeepSpeed": ("Setting accelerator to CPU", "Setting ds_accelerator to"),
}


class _Unless(logging.Filter):
    def __init__(self, messages: tuple[str, ...]):
        super().__init__()
        self._messages = messages

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(message in text for message in self._messages)


def silence() -> None:
    """Before the libraries are imported: a filter works on a logger that nobody has used yet."""
    for name, messages in _MESSAGES.items():
        logging.getLogger(name).addFilter(_Unless(messages))
