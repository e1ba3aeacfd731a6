"""The base class of rewards that detect objects, by Mask2Former (arXiv 2112.01527) with COCO's 80 classes."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import Mask2FormerConfig, Mask2FormerImageProcessorPil, Mask2FormerModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

from .learned_reward import LearnedReward, load_pretrained


# Names that prompts have, and the other name of the same class in published checkpoints, whose lists of COCO's classes differ.
OTHER_NAMES = {
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
    "hair drier": "hair dryer",
}


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image of H x W pixels."""

    score: float  # confidence, in [0, 1]: probability of the class times the mean of the mask's own probabilities
    mask: Tensor  # bool, shape [H, W], on the CPU
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two are outside


class Segmenter(Mask2FormerPreTrainedModel):
    """
    A [`~transformers.Mask2FormerForUniversalSegmentation`] without its training loss, which needs scipy. Its call returns
    logits of Q queries: of K classes and "no object", shape [N, Q, K + 1], and of the masks, [N, Q, height, width].
    """

    _keys_to_ignore_on_load_unexpected = [r"criterion\."]

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, output_hidden_states=True)
        last = outputs.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(last), outputs.masks_queries_logits[-1]


class DetectorReward(LearnedReward):
    """
    A reward that detects objects. Subclasses implement `score`, and find the objects by `detect`.

    Args:
        detector (`str`): Hub id or folder of a [`~transformers.Mask2FormerForUniversalSegmentation`] for instances. Its
            `id2label` names the classes.
        device, batch_size, offload, frames: As in [`LearnedReward`].

    Raises:
        OSError: The detector does not exist.
        ValueError: It is no Mask2Former.
    """

    # Mask2Former's own size for evaluations: the shorter side has 800 pixels, the longer one at most 1333.
    image_size: ClassVar[dict[str, int]] = {"shortest_edge": 800, "longest_edge": 1333}
    most_objects = 16  # of a class

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        *,
        device: str | torch.device | None = None,
        batch_size: int = 4,
        offload: bool = False,
        frames: str = "mean",
    ):
        # Not the published processor: it is set to 384 x 384, which misses small objects.
        self.image_processor = Mask2FormerImageProcessorPil(size=self.image_size, size_divisor=32)
        model, loaded = load_pretrained(Segmenter, detector, dtype=torch.float32, output_loading_info=True)
        if loaded["missing_keys"]:
            raise ValueError(
                f"detector='{detector}' is no Mask2Former: it lacks {len(loaded['missing_keys'])} weights, such as "
                f"{min(loaded['missing_keys'])}. Take one of facebook/mask2former-*-coco-instance."
            )
        labels = {label.lower(): number for number, label in model.config.id2label.items()}
        for name, other in OTHER_NAMES.items():
            if name not in labels and other in labels:
                labels[name] = labels[other]
        self.labels = labels
        super().__init__(model, device=device, batch_size=batch_size, offload=offload, frames=frames)

    def class_number(self, name: str) -> int:
        """Number of the class of a name; a ValueError, with the most similar names, if the detector has none."""
        number = self.labels.get(name.lower()) if isinstance(name, str) else None
        if number is None:
            near = difflib.get_close_matches(str(name).lower(), self.labels, n=3, cutoff=0.5)
            raise ValueError(
                f"the detector has no class {name!r} among its {len(set(self.labels.values()))}: "
                + (f"did you mean {', '.join(map(repr, near))}?" if near else f"they are {', '.join(self.labels)}.")
            )
        return number

    def detect(
        self, images: Sequence[Image.Image], thresholds: Sequence[float]
    ) -> list[dict[int, list[DetectedObject]]]:
        """
        Objects of each image with a higher confidence than its threshold: by the number of their class, at most
        `most_objects` of each, the most confident first.
        """
        inputs = self.image_processor(list(images), return_tensors="pt").to(self.model.device)
        class_logits, mask_logits = self.model(**inputs)
        padded = inputs["pixel_values"].shape[-2:]
        found = []
        for number, (image, threshold) in enumerate(zip(images, thresholds)):
            # The last class is "no object".
            probabilities = class_logits[number].softmax(dim=-1)[:, :-1]
            # The score of a mask is at most 1, so that no other query can pass the threshold.
            queries, labels = (probabilities > threshold).nonzero(as_tuple=True)
            logits = mask_logits[number, queries][None]
            logits = interpolate(logits, size=padded, mode="bilinear", align_corners=False) if len(queries) else logits
            height, width = _extent(inputs["pixel_mask"][number])
            objects: dict[int, list[DetectedObject]] = {}
            for query, label, logit in zip(queries, labels.tolist(), logits[0]):
                shown = (image.height, image.width)
                logit = interpolate(
                    logit[None, None, :height, :width], size=shown, mode="bilinear", align_corners=False
                )
                mask = logit[0, 0] > 0
                if not mask.any():
                    continue
                score = (probabilities[query, label] * logit[0, 0].sigmoid()[mask].mean()).item()
                if score > threshold:
                    rows, columns = (mask.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
                    box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
                    objects.setdefault(label, []).append(DetectedObject(score, mask.cpu(), box))
            for label, each in objects.items():
                objects[label] = sorted(each, key=lambda object: -object.score)[: self.most_objects]
            found.append(objects)
        return found


def _extent(pixel_mask: Tensor) -> tuple[int, int]:
    """Height and width of an image in a batch whose images are padded at the bottom and the right."""
    return int(pixel_mask[:, 0].sum()), int(pixel_mask[0].sum())
