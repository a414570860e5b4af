"""The data section of a run config, with the keys that a test sets."""

from dpo_dist.config.data_section import DataSection


def data_settings(**keys: object) -> DataSection:
    """A section with one source of training pairs."""
    return DataSection.model_validate({"train": [{"path": "rows.jsonl"}], **keys})
