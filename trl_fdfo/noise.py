"""
Keeps down what libraries say: what nobody can act on is silenced, and what they would repeat in each batch is said once.
Each message is known by its words, in the logger that says it, as there is no switch for it. Whatever else they say is heard.
"""

import contextlib
import logging
from collections.abc import Iterator


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
    # `load_lora_weights` looks for an adapter of each text encoder. That the transformer has none is said elsewhere, and heard.
    "diffusers.loaders.lora_base": ("No LoRA keys associated to",),
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


@contextlib.contextmanager
def unheard(pipeline_class: type) -> Iterator[None]:
    """While a pipeline is called with prompts that are not the user's, neither it nor a tokenizer says that they are too long."""
    names = {each.__module__ for each in pipeline_class.__mro__} | {"transformers.tokenization_utils_base"}
    loggers = [logging.getLogger(name) for name in names]
    were_disabled = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, was_disabled in zip(loggers, were_disabled):
            logger.disabled = was_disabled


class _CutOnce(logging.Filter):
    """Lets a pipeline say once per reason that prompts are too long, which it says in each batch with all the texts."""

    def __init__(self):
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        reason, _, cut = record.getMessage().partition(": ")
        if "truncated because" not in reason:
            return True
        is_new = reason not in self._said
        self._said.add(reason)
        record.msg, record.args = f"{reason}: {cut[:200]} ... (said once; it holds for each prompt that is as long)", ()
        return is_new


def say_once_what_is_cut(pipeline_class: type) -> None:
    """Of the prompts that pipelines of a class cut because they are too long."""
    for name in {each.__module__ for each in pipeline_class.__mro__}:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _CutOnce) for each in logger.filters):
            logger.addFilter(_CutOnce())
