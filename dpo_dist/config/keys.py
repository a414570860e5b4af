"""Every key of a run config as a reader sees it: type, default and meaning."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from dpo_dist.config.run_config import RunConfig, section_types
from dpo_dist.config.section import Section


def explain_keys(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Yields (dotted key, type, default, description) for every key, in file order."""
    for name, info in section.model_fields.items():
        child = next(section_types(info.annotation), None)
        optional = info.default is None
        if child is not None:
            if info.description:
                yield f"{prefix}{name}", "section", "null" if optional else "", info.description
            origin = get_origin(info.annotation)
            marker = "[]" if origin is list else ".NAME" if origin is dict else ""
            yield from explain_keys(child, f"{prefix}{name}{marker}.")
            continue
        default = "required" if info.is_required() else yaml.safe_dump(info.default)
        default = default.removesuffix("\n...\n").strip()
        yield f"{prefix}{name}", type_name(info.annotation), default, info.description or ""


def override_names() -> Iterator[str]:
    """`section.key=` for every key, as typed after run.yaml; for a list, of its first entry."""
    for key, kind, *_ in explain_keys():
        if kind != "section" and ".NAME." not in key:
            yield f"{key.replace('[]', '.0')}="


def type_name(annotation: Any) -> str:
    """A key's type in words: `drop | raise | keep`, `int`, `list of text`."""
    if annotation is type(None):
        return "null"
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (list, dict):
        return f"{origin.__name__} of {' to '.join(map(type_name, arguments))}"
    if arguments:
        lists_of_others = [list[argument] for argument in arguments]
        return " | ".join(
            "list of these" if argument in lists_of_others else type_name(argument)
            for argument in arguments
        )
    name = str(annotation.__name__)
    return {"Path": "path", "str": "text"}.get(name, name)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, which `load_config` reads back to an equal config."""
    values = config.model_dump(mode="json")
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
