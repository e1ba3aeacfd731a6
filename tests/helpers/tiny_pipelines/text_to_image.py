"""The two families whose pipelines other tests use too."""

from . import flux, sd3
from .family import Family


SMALL = {"height": 16, "width": 16, "max_sequence_length": 8}
SKIP_LAYERS = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6}
FAMILIES = {
    "Stable Diffusion 3": Family(
        lambda: sd3(with_t5=True),
        {
            "plain": {**SMALL, "guidance_scale": 1.0},
            "guided": {**SMALL, "guidance_scale": 4.0, "negative_prompt": "bad"},
            "skip-layer guidance": {**SMALL, "guidance_scale": 4.0, **SKIP_LAYERS},
        },
    ),
    "FLUX.1": Family(
        flux,
        {
            "embedded guidance": {**SMALL, "guidance_scale": 3.5},
            "guided": {**SMALL, "guidance_scale": 3.5, "true_cfg_scale": 3.0, "negative_prompt": "bad"},
        },
    ),
}
