"""Optional packages: does one import here, and what to do about it."""

from dpo_dist.errors import ConfigError


def import_fault(package: str, extra: str, error: Exception) -> tuple[str, str]:
    """(what is wrong, what to do) when importing an optional package failed with `error`.

    Ask by importing, never by a version or `find_spec`: a package that is installed may have been
    built for another torch or CUDA.
    """
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return "is not installed", f"pip install 'dpo-dist[{extra}]'"
    again = f"pip install --force-reinstall --no-deps {package}"
    return f"does not import: {in_one_line(error)}", again


def in_one_line(error: Exception) -> str:
    """What an error of another library says, short enough for an error of ours."""
    return " ".join(str(error).split())[:300] or repr(error)


def require_bitsandbytes(key: str) -> None:
    """Raises ConfigError, naming the key that needs it, unless bitsandbytes imports."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        fault, remedy = import_fault("bitsandbytes", "qlora", error)
        raise ConfigError(
            f"{key}, and bitsandbytes {fault}",
            "bitsandbytes",
            f"Install it with `{remedy}`, or choose another value.",
        ) from None
