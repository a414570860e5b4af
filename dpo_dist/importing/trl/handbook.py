"""The data of an alignment-handbook YAML: `dataset_mixture`, or `dataset_mixer` of earlier ones."""

from typing import Any, cast

from dpo_dist.errors import ConfigError
from dpo_dist.importing.settings import Run

ENTRY = ("id", "config", "split", "columns", "weight")  # columns are those that are kept


def convert_handbook(run: Run, evaluated: bool) -> None:
    """data.train and data.eval, or what is held out."""
    if run.settings.given("dataset_mixture"):
        _mixture(run, run.settings.get("dataset_mixture"), evaluated)
    else:
        _mixer(run, run.settings.get("dataset_mixer"), evaluated)


def _mixture(run: Run, mixture: Any, evaluated: bool) -> None:
    """{"datasets": [{"id", "config", "split", "columns", "weight"}], "test_split_size", "seed"}."""
    fields = cast("dict[str, Any]", mixture) if isinstance(mixture, dict) else {}
    entries: Any = fields.get("datasets")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"dataset_mixture: {mixture!r}",
            f"datasets, a list of {', '.join(ENTRY)}",
            "Correct the YAML.",
        )
    sources: list[dict[str, Any]] = []
    for number, entry in enumerate(cast("list[Any]", entries)):
        named = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        unknown = [key for key in named if key not in ENTRY]
        if unknown or "id" not in named:
            found = f"dataset_mixture.datasets.{number}: {', '.join(unknown) or 'no id'}"
            raise ConfigError(found, f"an id, and of {', '.join(ENTRY)}", "Correct the YAML.")
        sources.append(_source(named["id"], named.get("split"), named.get("weight")))
        if named.get("config"):
            sources[-1]["config"] = named["config"]
    run.put("data.train", sources, "dataset_mixture; weight is the share of a data set's rows")
    held_out = fields.get("test_split_size")
    if held_out is None or not evaluated:
        return
    if held_out < 1:
        why = "test_split_size of dataset_mixture, held out by prompt, not by row"
        run.put("data.eval_fraction", held_out, why)
        if fields.get("seed") is not None:
            run.put("data.eval_seed", fields["seed"], "seed of dataset_mixture")
    else:
        run.differs.append(
            f"dataset_mixture.test_split_size: {held_out}; set data.eval_fraction to {held_out} / "
            "the rows of the mixture"
        )


def _mixer(run: Run, mixer: Any, evaluated: bool) -> None:
    """{id: share of its rows}, with the names of all splits in dataset_splits."""
    splits = run.settings.get("dataset_splits") or ["train", "test"]
    if not isinstance(mixer, dict) or not mixer:
        raise ConfigError(f"dataset_mixer: {mixer!r}", "{data set: share}", "Correct the YAML.")
    names = cast("dict[str, Any]", mixer)
    trained = [split for split in splits if "train" in split]
    why = "dataset_mixer, dataset_splits"
    run.put("data.train", [_source(n, s, w) for n, w in names.items() for s in trained], why)
    tested = [_source(n, s, None) for n in names for s in splits if "test" in s]
    if evaluated and tested:
        run.put("data.eval", tested, why)


def _source(name: str, split: str | None, weight: float | None) -> dict[str, Any]:
    source: dict[str, Any] = {"path": name, "split": split or "train"}
    return source if weight is None or weight == 1 else source | {"weight": float(weight)}
