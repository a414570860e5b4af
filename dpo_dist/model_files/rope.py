"""Which rotary embeddings may depend on how long a sequence is, by what a config.json says."""

from collections.abc import Iterator, Mapping
from typing import Any

# kinds whose frequencies are set when a model is loaded
_STATIC = {"default", "linear", "yarn", "llama3", "proportional"}


def length_bound_kinds(text_config: Mapping[str, Any]) -> list[str]:
    """The kinds that it names and that are not known to be the same at every length."""
    named = [text_config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    kinds = {kind for each in named for kind in _kinds(each)}
    return sorted(str(kind) for kind in kinds - _STATIC if kind)


def _kinds(parameters: Mapping[str, Any]) -> Iterator[Any]:
    """Of the parameters, and of those that they hold for each type of layer."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for each in (parameters, *nested):
        yield each.get("rope_type", each.get("type"))
