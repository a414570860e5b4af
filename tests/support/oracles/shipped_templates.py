"""Chat templates to try things on."""

from importlib.resources import files

from dpo_dist.data.tokens.templates import BUILTIN_TEMPLATES


def templates() -> dict[str, str]:
    """Every template that TRL ships, and ours."""
    shipped = {
        path.name.removesuffix(".jinja"): path.read_text()
        for path in files("trl").joinpath("chat_templates").iterdir()
        if path.name.endswith(".jinja")
    }
    assert len(shipped) > 15
    return shipped | {name: builtin.text for name, builtin in BUILTIN_TEMPLATES.items()}
