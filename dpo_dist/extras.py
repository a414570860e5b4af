"""Optional packages: is one there, and what to install."""

from importlib.util import find_spec

from dpo_dist.errors import ConfigError


def require_bitsandbytes(key: str) -> None:
    """Raises ConfigError, naming the key that needs it, unless bitsandbytes is installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{key}, and bitsandbytes is not installed",
            "bitsandbytes",
            "Install it with `pip install 'dpo-dist[qlora]'`, or choose another value.",
        )
