"""Rows of a hub data set: loaded to the disk, or read once, in order, and not kept."""

# pyright: basic
# (datasets has no types)

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.data.rows.row import Row, without_padding
from dpo_dist.data.rows.table_rows import TableRows
from dpo_dist.errors import DataError
from dpo_dist.run.manifest import digest_of, digest_of_file
from dpo_dist.watch.heartbeat import during
from dpo_dist.wording import first_line

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class StreamRows:
    """The first `limit` rows of a data set; every iteration opens it anew."""

    name: str
    config: str | None
    split: str
    revision: str | None
    limit: int | None
    key: str  # of the source in the config

    @property
    def label(self) -> str:
        """The name in origins."""
        return f"{self.name}[{self.split}]"

    def origin(self, position: int) -> str:
        """`name[split]:row`, rows counted from 1."""
        return f"{self.label}:{position + 1}"

    def __iter__(self) -> Iterator[Row]:
        import datasets

        try:
            opened = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise hub_error(self.name, self.key, error) from None
        # an image stays bytes: rows with media are refused, or its column is not read
        rows = itertools.islice(iter(opened.decode(False)), self.limit)
        for position in itertools.count():
            try:
                fields: Any = next(rows, None)
            except Exception as error:
                raise DataError(
                    f"{self.origin(position)}: the stream broke off ({first_line(error)})",
                    "rows to the end, or to the limit",
                    "Run `dpo-dist prepare` again, or set a limit below this row.",
                ) from None
            if fields is None:
                return
            fields = {name: without_padding(value) for name, value in fields.items()}
            yield Row(fields, self.origin(position))


def open_hub(
    name: str, config: str | None, split: str, revision: str | None, key: str
) -> TableRows:
    """Loads a hub data set, or a folder of data files, through `datasets`; `key` names it."""
    import datasets

    try:
        with during("network"):
            loaded = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise hub_error(name, key, error) from None
    return TableRows(loaded, f"{name}[{split}]")


def hub_error(name: str, key: str, error: Exception) -> DataError:
    """What to tell when `datasets` does not load a data set; `key` names it in the config."""
    return DataError(
        f"{key}.path {name!r} is no file here, and `datasets` loads no such data set "
        f"({first_line(error)})",
        "a file, a folder, or the id, config and split of a hub data set",
        f"Correct {key}, download the data where there is a network, or set HF_TOKEN.",
    )


def digest_of_stream(stream: StreamRows) -> str:
    """Identity of a data set's content: the hub's commit, or the bytes of a folder's files.

    With a whole commit hash as the revision nothing is asked of the hub.
    """
    import datasets

    asked = [stream.name, stream.config, stream.split]
    if _COMMIT.fullmatch(stream.revision or "") and not Path(stream.name).is_dir():
        return digest_of([*asked, stream.revision])
    try:
        builder = datasets.load_dataset_builder(
            stream.name, stream.config, revision=stream.revision
        )
        found = builder.config.data_files[stream.split] if builder.config.data_files else []
    except Exception as error:
        raise hub_error(stream.name, stream.key, error) from None
    if Path(stream.name).is_dir():
        return digest_of([digest_of_file(Path(file)) for file in found])
    # the names hold the commit, as in hf://datasets/org/name@0123abcd/train.parquet
    return digest_of([*asked, list(found) or builder.hash])
