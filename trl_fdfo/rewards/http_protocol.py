"""
The protocol of a served reward, which a server in any language can speak.

`POST /score/{name}` has as its body one line of JSON, a newline, and the values of the tensors one after the other:

    {"tensors": [{"name": "images", "type": "uint8", "shape": [2, 3, 64, 64]}], "prompts": ["a cat", "a dog"]}

    name              shape                type
    "images"          [N, 3, H, W]         "uint8": bytes, each 255 times a value in [0, 1]
    "videos"          [N, F, 3, H, W]      "float32": little-endian, the values themselves
    "audio"           [N, C, L]

The line may also have `num_generations` (samples per prompt, which are adjacent; 1 if it is missing), `columns` (N values
of each by name; a picture is `{"$png": its PNG file in base64}`), `frame_rate`, `sampling_rate` and `trainer_state` (some of
`TRAINER_STATE`). The answer is `{"rewards": [...]}`: N numbers, or null where the reward does not apply. An error is
`{"error": "what went wrong"}` under a status of 400 or more.

`GET /rewards` says which rewards there are, what each needs and what else it takes; all but `name` and `needs` may be missing:

    {"rewards": [{"name": "PickScore", "needs": ["images", "prompts"], "takes": [], "takes_all": false,
                  "image_type": "pil", "pairwise": false, "settings": "batch_size=16"}]}

Raw values and no image files, because they are exact for any float and need no library to read. Bytes are as exact for a
reward of `image_type` "pil", which sees images of 8 bits in any case, and a fourth of the size.
"""

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .reward_functions import ARGUMENTS, RATES


SHAPES = {"images": "[N, 3, H, W]", "videos": "[N, F, 3, H, W]", "audio": "[N, C, L]"}
TYPES = {"uint8": np.dtype("u1"), "float32": np.dtype("<f4")}
HEAD = ("tensors", "prompts", "num_generations", "columns", *RATES, "trainer_state")
# Numbers of a TrainerState, for rewards that change over a run. Its history may be long, and its fields vary by version.
TRAINER_STATE = ("global_step", "max_steps", "epoch", "num_train_epochs")
PNG = "$png"


class BadRequest(ValueError):
    """A request that cannot be scored. `status` is the HTTP status of the answer: 400 if it cannot be read, otherwise 422."""

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


def encode(samples: Mapping[str, Tensor], head: Mapping[str, Any], as_bytes: bool) -> bytes:
    """
    The body of a request.

    Args:
        samples (`Mapping[str, Tensor]`): Tensors of N samples by the names in `SHAPES`.
        head (`Mapping[str, Any]`): What else the line says, but `tensors`.
        as_bytes (`bool`): Send images and videos as bytes, rounded as [`~trl_fdfo.media.to_pil`] rounds them.

    Raises:
        ValueError: A column holds something that JSON does not have.
    """
    tensors, values = [], []
    for name, tensor in samples.items():
        array = tensor.detach().float().cpu().numpy()
        type_name = "uint8" if as_bytes and name != "audio" else "float32"
        if type_name == "uint8":
            array = (array * 255).round()
        tensors.append({"name": name, "type": type_name, "shape": list(array.shape)})
        values.append(np.ascontiguousarray(array, TYPES[type_name]))
    columns = head.get("columns", {})
    try:
        line = json.dumps({"tensors": tensors, **head}, default=_picture)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The columns {', '.join(columns)} go to the server as JSON, and one holds something else ({error}): keep numbers, "
            "text, lists, dicts and PIL images in them, or let the reward's signature name the columns that it needs."
        ) from None
    return b"".join([line.encode(), b"\n", *values])


def _picture(value: Any) -> dict[str, str]:
    if not isinstance(value, Image.Image):
        raise TypeError(f"{value!r:.80}, a {type(value).__name__}")
    buffer = io.BytesIO()
    value.save(buffer, format="PNG")
    return {PNG: base64.b64encode(buffer.getvalue()).decode()}


@dataclass(frozen=True)
class ScoreRequest:
    """A request whose line has been read and checked; `samples` reads the tensors."""

    head: dict[str, Any]
    body: bytearray
    start: int  # of the tensors in the body

    @classmethod
    def read(cls, body: bytearray) -> "ScoreRequest":
        """
        Read a body.

        Raises:
            BadRequest: It is not as this module describes.
        """
        end = body.find(b"\n")
        try:
            head = json.loads(body[:end]) if end >= 0 else None
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict):
            begin = bytes(body[:40])
            raise BadRequest(
                f"The body begins with {begin!r}, and must begin with a line of JSON, an object, that ends in a newline; the "
                "values of the tensors follow.",
                400,
            )
        unknown = [name for name in head if name not in HEAD]
        if unknown:
            raise BadRequest(f"The line of JSON has '{unknown[0]}'; it may have {', '.join(HEAD)}.", 400)
        request = cls(head, body, end + 1)
        request._check_tensors()
        request._check_lists()
        return request

    @property
    def count(self) -> int:
        """N, the number of samples."""
        return self.head["tensors"][0]["shape"][0]

    @property
    def prompts(self) -> list[str] | None:
        return self.head.get("prompts")

    @property
    def columns(self) -> dict[str, list]:
        return self.head.get("columns") or {}

    @property
    def num_generations(self) -> int:
        return self.head.get("num_generations", 1)

    @property
    def rates(self) -> dict[str, float]:
        return {name: self.head[name] for name in RATES if self.head.get(name) is not None}

    @property
    def trainer_state(self) -> dict[str, float]:
        return self.head.get("trainer_state") or {}

    @property
    def given(self) -> set[str]:
        """Names of the arguments that a reward can have of this request."""
        samples = {tensor["name"] for tensor in self.head["tensors"]}
        always = {"trainer_state", "num_generations", *(["images"] if "videos" in samples else [])}
        return samples | always | self.columns.keys() | self.rates.keys() | ({"prompts"} if self.prompts else set())

    @property
    def kind(self) -> str:
        """Requests of one kind can be scored together."""
        shapes = {tensor["name"]: tensor["shape"][1:] for tensor in self.head["tensors"]}
        rest = [self.num_generations, self.rates, self.trainer_state, sorted(self.columns), self.prompts is None]
        return json.dumps([shapes, rest], sort_keys=True)

    def samples(self) -> dict[str, Tensor]:
        """
        The tensors by name, in float32.

        Raises:
            BadRequest: A value is not finite, or that of an image not in [0, 1].
        """
        samples, start = {}, self.start
        for tensor in self.head["tensors"]:
            name, shape, dtype = tensor["name"], tensor["shape"], TYPES[tensor["type"]]
            count = math.prod(shape)
            array = np.frombuffer(self.body, dtype, count, start).reshape(shape).astype(np.float32)
            start += count * dtype.itemsize
            if tensor["type"] == "uint8":
                array /= 255
            low, high = array.min(), array.max()
            # A pipeline's decoder may leave [0, 1] by a rounding.
            within = np.isfinite([low, high]).all() if name == "audio" else low >= -0.01 and high <= 1.01
            if not within:
                should = "finite" if name == "audio" else "in [0, 1]"
                raise BadRequest(f"The {name} hold values from {low:g} to {high:g}, and must be {should}.")
            samples[name] = torch.from_numpy(array)
        return samples

    def pictured_columns(self) -> dict[str, list]:
        """
        The columns, with PIL images.

        Raises:
            BadRequest: A picture is no PNG file.
        """
        return {name: _with_pictures(values, name) for name, values in self.columns.items()}

    def _check_tensors(self) -> None:
        tensors = self.head.get("tensors")
        form = '{"name": "images", "type": "uint8", "shape": [N, 3, H, W]}'
        if not isinstance(tensors, list) or not tensors:
            raise BadRequest(f"tensors={_shown(tensors)} must be a list of at least one {form}.", 400)
        size = 0
        for tensor in tensors:
            if not isinstance(tensor, dict) or tensor.keys() != {"name", "type", "shape"}:
                raise BadRequest(f"tensors has {_shown(tensor)}, which must be of the form {form}.", 400)
            name, shape = tensor["name"], tensor["shape"]
            if not isinstance(name, str) or name not in SHAPES:
                raise BadRequest(f"tensors has the name {_shown(name)}; it must be one of {', '.join(SHAPES)}.", 400)
            if not isinstance(tensor["type"], str) or tensor["type"] not in TYPES:
                raise BadRequest(
                    f"The {name} have type={_shown(tensor['type'])}; it must be one of {', '.join(TYPES)}.", 400
                )
            axes = SHAPES[name].split(",")
            positive = isinstance(shape, list) and all(type(length) is int and 0 < length < 2**48 for length in shape)
            if not positive or len(shape) != len(axes) or (name != "audio" and shape[-3] != 3):
                raise BadRequest(f"The {name} have shape={_shown(shape)}; it must be {SHAPES[name]}.")
            if tensor["type"] == "uint8" and name == "audio":
                raise BadRequest("The audio has type='uint8'; its values, of about -1 to 1, are sent as 'float32'.")
            if shape[0] != tensors[0]["shape"][0]:
                raise BadRequest(
                    f"There are {tensors[0]['shape'][0]} {tensors[0]['name']} and {shape[0]} {name}: send one of each."
                )
            size += math.prod(shape) * TYPES[tensor["type"]].itemsize
        names = [tensor["name"] for tensor in tensors]
        if len(set(names)) < len(names) or {"images", "videos"} <= set(names):
            raise BadRequest(f"tensors has {', '.join(names)}: send either images or videos, and audio, once each.")
        if size != len(self.body) - self.start:
            raise BadRequest(
                f"The tensors take {size} bytes by their shapes and types, and {len(self.body) - self.start} follow the line.",
                400,
            )

    def _check_lists(self) -> None:
        count, groups = self.count, self.num_generations
        if self.prompts is not None:
            self._check_list("prompts", self.prompts)
            for prompt in self.prompts:
                if not isinstance(prompt, str):
                    raise BadRequest(f"prompts has {_shown(prompt)}, which is no text.")
        if type(groups) is not int or groups < 1 or count % groups:
            raise BadRequest(
                f"num_generations={_shown(groups)} must divide the {count} samples: the samples of a prompt are adjacent, as many "
                "for each."
            )
        if not isinstance(self.columns, dict):
            raise BadRequest(f"columns={_shown(self.columns)} must be an object with a list for each column.")
        for name, values in self.columns.items():
            if name in ARGUMENTS:
                raise BadRequest(f"columns has '{name}', a name that rewards get something else by: rename it.")
            self._check_list(f"The column '{name}'", values)
        for name in RATES:
            rate = self.head.get(name)
            if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float))):
                raise BadRequest(f"{name}={_shown(rate)} must be a number.")
        state = self.trainer_state
        numbers = isinstance(state, dict) and all(type(value) in (int, float) for value in state.values())
        if not numbers or not state.keys() <= set(TRAINER_STATE):
            raise BadRequest(f"trainer_state={_shown(state)} may have the numbers {', '.join(TRAINER_STATE)}.")

    def _check_list(self, name: str, values: Any) -> None:
        if not isinstance(values, list):
            raise BadRequest(f"{name} must be a list of {self.count} values, one per sample, and is {_shown(values)}.")
        if len(values) != self.count:
            raise BadRequest(f"{name} has {len(values)} values for {self.count} samples: send one for each.")


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


def _with_pictures(value: Any, column: str) -> Any:
    if isinstance(value, list):
        return [_with_pictures(each, column) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {PNG}:
        return {name: _with_pictures(each, column) for name, each in value.items()}
    try:
        image = Image.open(io.BytesIO(base64.b64decode(value[PNG], validate=True)), formats=["PNG"])
        image.load()
        return image
    except (OSError, ValueError, TypeError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise BadRequest(f"The column '{column}' has a picture that is no PNG file in base64: {error}.") from None


def numbers_of(state: Any) -> dict[str, float]:
    """What a request says of a [`~transformers.TrainerState`]."""
    values = {name: getattr(state, name, None) for name in TRAINER_STATE}
    return {name: value for name, value in values.items() if value is not None}


def joined(values: Sequence[list]) -> list:
    """Lists of several requests as one."""
    return [each for part in values for each in part]
