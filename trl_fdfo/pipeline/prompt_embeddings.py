"""Embeddings of prompts, computed once and kept on disk, so that the text encoders need not be on the GPU."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import recursively_apply
from datasets import Dataset, concatenate_datasets
from diffusers import DiffusionPipeline

from .checksums import checksum, config_checksum, weights_checksum
from .flow import PipelineFlow
from .trained import frozen_modules


# Prompts per file. A run that is killed while it encodes continues at the unfinished file.
PROMPTS_PER_FILE = 256


class PromptEmbeddings(Mapping):
    """
    Return value of `flow.encode` for each of some prompts, read from disk on access.

    The embeddings are kept in the cache of `datasets`, under a key of the pipeline, its text encoders and its call's
    arguments. Processes that share that folder share the work.

    Args:
        flow ([`PipelineFlow`]): Encodes the prompts that the cache lacks.
        prompts (`Iterable[str]`): All prompts to hold.
        progress (`Callable`): Wraps an iterable in a progress bar.
    """

    def __init__(self, flow: PipelineFlow, prompts: Iterable[str], progress: Callable[[Iterable], Iterable] = iter):
        # Each prompt once, in an order that does not depend on the dataset's.
        prompts = sorted(set(prompts))
        key = encoding_key(flow)
        files = [prompts[start : start + PROMPTS_PER_FILE] for start in range(0, len(prompts), PROMPTS_PER_FILE)]
        state = PartialState()
        for file in progress(files[state.process_index :: state.num_processes]):
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


def encoding_key(flow: PipelineFlow) -> str:
    """Key of all that an embedding depends on, but for the prompt."""
    pipeline = flow.pipeline
    encoders = {
        name: (part.dtype, config_checksum(part.config.to_dict()), weights_checksum(part.parameters()))
        for name, part in text_encoders(pipeline).items()
    }
    tokenizers = {
        name: (len(part), part.model_max_length)
        for name, part in pipeline.components.items()
        if name.startswith("tokenizer") and part is not None
    }
    return checksum([type(pipeline).__name__, sorted(flow.call_kwargs.items()), encoders, tokenizers])


def _load_or_encode(flow: PipelineFlow, prompts: list[str], key: str) -> Dataset:
    fingerprint = checksum([key, prompts])
    folder = Path(datasets.config.HF_DATASETS_CACHE, "trl_fdfo_prompt_embeddings")
    folder.mkdir(parents=True, exist_ok=True)

    def encode(row: dict[str, str]) -> dict[str, bytes | str]:
        embeddings = recursively_apply(lambda tensor: tensor.cpu(), flow.encode([row["prompt"]]))
        shapes = recursively_apply(lambda tensor: tuple(tensor.shape), embeddings)
        buffer = io.BytesIO()
        # In PyTorch's format: Arrow has no bfloat16, and pipelines return tuples, lists and None.
        torch.save(embeddings, buffer)
        return {"embeddings": buffer.getvalue(), "shapes": repr(shapes)}

    # `map` writes under a temporary name first, so an existing file is complete.
    return Dataset.from_dict({"prompt": prompts}).map(
        encode,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        writer_batch_size=16,
    )
