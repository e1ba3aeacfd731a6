"""Some pipelines of diffusers call `ftfy.fix_text` whether ftfy is installed or not; the tests' prompts need no fixing."""

import sys
from types import SimpleNamespace

from diffusers.utils import is_ftfy_available


def allow_without_ftfy(*pipeline_classes: type) -> None:
    for pipeline_class in pipeline_classes:
        if not is_ftfy_available():
            sys.modules[pipeline_class.__module__].ftfy = SimpleNamespace(fix_text=str)
