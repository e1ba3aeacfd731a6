"""Embeddings of prompts, computed once and kept on disk, so that the text encoders need not be on the GPU."""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import recursively_apply
from datasets import Dataset, concatenate_datasets
from diffusers import DiffusionPipeline

from .checksums import by_content, checksum, config_checksum, weights_checksum
from .flow import AFTER_ENCODING, PipelineFlow
from .trained import frozen_modules


# Prompts per file. A run that is killed while it encodes continues at the unfinished file.
PROMPTS_PER_FILE = 256


class PromptEmbeddings(Mapping):
    """
    Return value of `flow.encode` for each of some prompts, read from disk on access.

    The embeddings are kept in the cache of `datasets`, under a key of the pipeline, its text encoders and its call's
    arguments. Processes that share that folder share the work.

    Prompts are encoded one by one: in a batch some encoders round otherwise, and an embedding would depend on the prompts
    beside it. (CLIP's pooled embeddings do, by 6e-7 of their size in float32 on a CPU.)

    Args:
        flow ([`PipelineFlow`]): Encodes the prompts that the cache lacks.
        prompts (`Iterable[str]`): All prompts to hold. Files hold neighbours: the same prompts in front are found again.
        progress (`Callable`): `(files, title) -> files` with a progress bar.

    Raises:
        ValueError: The disk has not enough room.
    """

    def __init__(
        self,
        flow: PipelineFlow,
        prompts: Iterable[str],
        progress: Callable[[Iterable, str], Iterable] = lambda files, title: files,
    ):
        prompts = list(dict.fromkeys(prompts))
        key = encoding_key(flow)
        files = [prompts[start : start + PROMPTS_PER_FILE] for start in range(0, len(prompts), PROMPTS_PER_FILE)]
        state = PartialState()
        title = _check_disk(flow, [prompt for file in files if not _path(file, key).exists() for prompt in file])
        for file in progress(files[state.process_index :: state.num_processes], title):
            _load_or_encode(flow, file, key)
        state.wait_for_everyone()
        self._data = concatenate_datasets([_load_or_encode(flow, file, key) for file in files])
        self._places = {prompt: place for place, prompt in enumerate(self._data["prompt"])}
        #: True if the embeddings of all prompts have the same shapes, so that they can be put into one batch.
        self.same_shapes = len(set(self._data["shapes"])) <= 1

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(Path(file["filename"]).stat().st_size for file in self._data.cache_files)

    def __getitem__(self, prompt: str) -> list:
        return torch.load(io.BytesIO(self._data[self._places[prompt]]["embeddings"]), weights_only=True)

    def __contains__(self, prompt: object) -> bool:
        return prompt in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components that encode prompts, by name."""
    return {name: part for name, part in frozen_modules(pipeline).items() if name.startswith("text_encoder")}


def called_first(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """
    The components that a rollout calls before its first step and a replay does not call, by name: text encoders, and
    language models that write something of the prompt first.
    """
    parts = frozen_modules(pipeline)
    return text_encoders(pipeline) | {name: part for name, part in parts.items() if hasattr(part, "generate")}


def encoding_key(flow: PipelineFlow) -> str:
    """Key of all that an embedding depends on, but for the prompt."""
    pipeline = flow.pipeline
    encoders = {
        name: (part.dtype, config_checksum(part.config.to_dict()), weights_checksum(part.parameters()))
        for name, part in text_encoders(pipeline).items()
    }
    tokenizers = {
        name: (len(part), part.model_max_length, getattr(part, "chat_template", None))
        for name, part in pipeline.components.items()
        if name.startswith("tokenizer") and part is not None
    }
    arguments = {name: value for name, value in flow.call_kwargs.items() if name not in AFTER_ENCODING}
    # Names that begin with an underscore say where a pipeline comes from.
    config = {name: value for name, value in pipeline.config.items() if not name.startswith("_")}
    # Their code puts a prompt into a template, and splits it into tokens.
    versions = [diffusers.__version__, transformers.__version__]
    key = [type(pipeline).__name__, by_content(sorted(arguments.items())), encoders, tokenizers]
    return checksum([*key, by_content(sorted(config.items())), versions])


def _path(prompts: list[str], key: str) -> Path:
    """The file of these prompts; its stem is their fingerprint."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "trl_fdfo_prompt_embeddings")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{checksum([key, prompts])}.arrow"


def _check_disk(flow: PipelineFlow, missing: list[str]) -> str:
    """
    Title of the work on the prompts that the cache lacks, with the bytes that they will take, estimated from the longest.

    Raises:
        ValueError: The disk has less.
    """
    if not missing:
        return "reading embeddings"
    needed = len(missing) * len(_encode(flow, max(missing, key=len))["embeddings"])
    free = shutil.disk_usage(datasets.config.HF_DATASETS_CACHE).free
    if needed > free:
        raise ValueError(
            f"cache_prompt_embeds=True would write {needed / 2**30:.2f} GiB of embeddings of {len(missing)} prompts into the "
            f"cache of `datasets`, whose disk has {free / 2**30:.2f} GiB left. Set the environment variable "
            "HF_DATASETS_CACHE to a folder on a larger disk, or cache_prompt_embeds=False with offload_components=True."
        )
    return f"encoding {len(missing)} prompts, {needed / 2**30:.2f} GiB on disk"


def _encode(flow: PipelineFlow, prompt: str) -> dict[str, bytes | str]:
    embeddings = recursively_apply(lambda tensor: tensor.cpu(), flow.encode([prompt]))
    shapes = recursively_apply(lambda tensor: tuple(tensor.shape), embeddings)
    buffer = io.BytesIO()
    # In PyTorch's format: Arrow has no bfloat16, and pipelines return tuples, lists and None.
    torch.save(embeddings, buffer)
    return {"embeddings": buffer.getvalue(), "shapes": repr(shapes)}


def _load_or_encode(flow: PipelineFlow, prompts: list[str], key: str) -> Dataset:
    path = _path(prompts, key)
    # `map` writes under a temporary name first, so an existing file is complete.
    return Dataset.from_dict({"prompt": prompts}).map(
        lambda row: _encode(flow, row["prompt"]),
        cache_file_name=str(path),
        new_fingerprint=path.stem,
        writer_batch_size=16,
    )
