"""
Reads docstrings as Hugging Face writes them, for the API reference: an extension of Griffe, which reads Google's.

- `> Rollouts` among parameters begins a group of its own.
- Types lose their backticks, and what says again that there is a default.
- [`~transformers.TrainerState`] is shown as `TrainerState`.
- The default of an option is that of its field: `option(4)` is 4.
"""

import re

from griffe import Attribute, ExprCall, Extension, Object


class HuggingFaceDocstrings(Extension):
    def on_instance(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = as_google(obj.docstring.value)

    def on_attribute_instance(self, *, attr: Attribute, **kwargs) -> None:
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "option":
            attr.value = attr.value.arguments[0]


def as_google(text: str) -> str:
    text = re.sub(r"\[`~?([\w.]+\.)?(\w+)`\]", lambda match: f"`{match[2]}`", text)
    text = re.sub(
        r"^( *[\w*, ]+ \()(`[^)\n]+)(\):)", lambda match: match[1] + plain_type(match[2]) + match[3], text, flags=re.M
    )
    # A section of Google's begins after an empty line, and its parameters follow without one.
    text = re.sub(r"^Parameters:\n(?=\n*    > )", "", text, flags=re.M)
    return re.sub(r"^    > (.+)\n+", r"\nParameters: \1\n", text, flags=re.M)


def plain_type(text: str) -> str:
    return re.sub(r", (\*optional\*|defaults to .*)", "", text).replace("`", "")
