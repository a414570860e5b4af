"""Preference rows to tokenized pairs: one process in charge, many that tokenize.

1. Compare settings and digests with an artifact that is there: a current one is left alone.
2. Tokenize all rows into a scratch file, keeping only lengths and keys in memory.
3. Settle max_length, truncate, and let the gate decide row by row.
4. Write the kept pairs, the report and the manifest; all of it appears at once.
"""

import itertools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_dist.config.data_section import DataSection, SourceSection
from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.drop_reasons import KEPT
from dpo_dist.data.pairs import SPLITS, PairsDetails, Split, open_pairs
from dpo_dist.data.rows.stream_rows import StreamRows
from dpo_dist.data.screening.data_report import (
    bias_warnings,
    hints,
    print_report,
    split_report,
)
from dpo_dist.data.screening.drops import (
    apply_gate,
    check_left_out,
    choose_max_length,
    describe_split,
)
from dpo_dist.data.screening.preview import LEGEND, preview_rows
from dpo_dist.data.screening.tokenized_rows import PairColumns, collect, truncate
from dpo_dist.data.screening.tokenizer_pool import (
    Chunk,
    ChunkTokenizer,
    TokenizeJob,
    make_chunks,
    tokenize_chunks,
)
from dpo_dist.data.screening.write_pairs import write_pairs
from dpo_dist.data.sources.sources import Source, digest_of_source, open_sources
from dpo_dist.data.tokens.templates import resolve_template
from dpo_dist.data.tokens.tokenize import PairTokenizer
from dpo_dist.data.tokens.vocabulary import check_vocabulary
from dpo_dist.exporting.preflight import preflight
from dpo_dist.inputs.own_base import make_base
from dpo_dist.inputs.work import checked_work, computed_by_order
from dpo_dist.model_files.files import digest_of_tokenizer, position_limit
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.report.data_section import report_page
from dpo_dist.run.logs import console, progress_bar
from dpo_dist.run.manifest import (
    Manifest,
    atomic_dir,
    digest_of,
    is_current,
    read_manifest,
    write_atomic,
    write_json,
    write_manifest,
)
from dpo_dist.run.run_dir import PAIRS_PAGE_NAME, PAIRS_REPORT_NAME, RunDir
from dpo_dist.watch.heartbeat import during
from dpo_dist.wording import counted

_logger = logging.getLogger(__name__)
STAGE = "prepare"
MAX_AUTO_WORKERS = 16
# Left out of the settings while they have their default: pairs made before they came stay current.
LATER_KEYS = (
    "leave_out", "chat_template_kwargs", "on_lost_text", "allow_lost", "on_bad_row", "max_bad_rows",
)  # fmt: skip
FREE_KEYS = ("num_workers", "order")  # on which no pair depends
ROWS_FOR_WORKERS = 4000  # with fewer rows starting processes takes longer than the work


@during("prepare")
def run(config: RunConfig) -> Path:
    """Makes the pairs folder of a run unless it is current; returns it.

    Raises DataError for unusable rows or settings, ArtifactError when a folder made from other
    settings stands there, as `preflight` for the stages to come, and as `checked_work` when
    training could not begin on the pairs, which stay.
    """
    folder = RunDir(config.run.dir).pairs_dir
    models = RunModels(config)
    preflight(models)
    make_base(models)
    model_dir = models.base
    template = resolve_template(config.data.chat_template)
    settings, inputs = _identity(config, model_dir, template)
    if is_current(folder, STAGE, settings, inputs):
        splits = read_manifest(folder, PairsDetails).details["splits"]
        counts = ", ".join(f"{splits[split]['num_pairs']:,} {split}" for split in SPLITS)
        _logger.info("prepare: current, %s pairs in %s", counts, folder)
    else:
        with atomic_dir(folder) as partial:
            scratch = partial / "scratch"
            scratch.mkdir()
            details = _prepare(config, model_dir, template, partial, scratch)
            shutil.rmtree(scratch)
            write_manifest(partial, Manifest(STAGE, settings, inputs, details))
            for split in SPLITS:
                pairs = open_pairs(partial, split)
                check_vocabulary(pairs, model_dir, config.model.trust_remote_code)
        _logger.info("prepare: pairs in %s", folder)
    # the pairs stay when it refuses: what is wrong is a setting of training then
    computed = computed_by_order(config, checked_work(models))
    if min(computed.values()) < 1:
        each = ", ".join(f"{part:.3f} with data.order {order}" for order, part in computed.items())
        _logger.info("prepare: what pairs of a step share is computed once: %s of the tokens", each)
    return folder


def preview(config: RunConfig, num_pairs: int) -> None:
    """Prints the first pairs of the training sources: what is scored, read, and lost.

    Nothing is written. The pairs are shared out among the sources; `max_length: auto` needs all
    rows, so with it they are shown untruncated.
    """
    output = Console(highlight=False, soft_wrap=True)
    model_dir = RunModels(config).base
    template = resolve_template(config.data.chat_template)
    max_length = None if config.data.max_length == "auto" else int(config.data.max_length)
    output.print(LEGEND)
    with tempfile.TemporaryDirectory() as scratch:
        sources = open_sources(config.data.train, "train", Path(scratch))
        job = _job(config, model_dir, template, sources)
        chunks = ChunkTokenizer(job, job.load_tokenizer())
        for index, source in enumerate(sources):
            share = len(range(index, num_pairs, len(sources)))
            for chunk in itertools.islice(make_chunks([source]), min(share, 1)):
                first = replace(chunk.first(share), source=index)
                # a row of several answers may be several pairs
                for shown in itertools.islice(preview_rows(chunks, first, max_length), share):
                    output.print(shown)


def _identity(
    config: RunConfig, model_dir: Path, template: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and input digests that the pairs depend on; both name every difference."""
    settings = config.data.model_dump(mode="json", exclude={"train", "eval", *FREE_KEYS})
    for key in LATER_KEYS:
        if settings[key] == DataSection.model_fields[key].get_default(call_default_factory=True):
            del settings[key]
    settings["model_limit"] = position_limit(model_dir)
    inputs = {"tokenizer": digest_of_tokenizer(model_dir)}
    if template is not None:
        inputs["chat_template"] = digest_of(template)
    for split, sections in _sections(config).items():
        # by number, so that a difference is named by its key and not as two whole lists
        settings[split] = {str(index): section.identity() for index, section in enumerate(sections)}
        for index, section in enumerate(sections):
            key = f"data.{split}.{index}"
            inputs[key] = digest_of_source(section, key)
    return settings, inputs


def _sections(config: RunConfig) -> dict[str, list[SourceSection]]:
    return {"train": config.data.train, "eval": config.data.eval}


def _prepare(
    config: RunConfig, model_dir: Path, template: str | None, partial: Path, scratch: Path
) -> dict[str, Any]:
    """Writes splits and report below `partial`; returns the manifest's details."""
    sources = open_sources(config.data.train, "train", scratch)
    # what is held out of a training source is reported beside the held-out sources
    names = [source.name for source in sources] if config.data.eval_fraction else []
    sources += open_sources(config.data.eval, "eval", scratch, names)
    job = _job(config, model_dir, template, sources)
    tokenizer = job.load_tokenizer()
    tokenized = _tokenize(job, tokenizer, scratch, config.data.num_workers)
    held_out = describe_split(tokenized, config.data)

    max_length, reason = choose_max_length(
        tokenized["train"], config.data.max_length, position_limit(model_dir)
    )
    details: dict[str, Any] = {"max_length": max_length, "max_length_reason": reason, "splits": {}}
    report: dict[str, Any] = details | {"held_out": held_out, "splits": {}}
    trained_prompts = None
    for split in SPLITS:
        columns = tokenized.get(split)
        if columns is not None:
            cut = truncate(columns, _scratch_path(scratch, split), max_length)
            columns = apply_gate(columns, cut, config.data, split, max_length, trained_prompts)
            tokenized[split] = columns
            report["splits"][split] = split_report(columns)
            trained_prompts = columns.prompt_keys[columns.reasons == KEPT]
        digest = write_pairs(partial / split, columns, _scratch_path(scratch, split))
        num_pairs = report["splits"][split]["pairs"] if columns is not None else 0
        details["splits"][split] = {"num_pairs": num_pairs, "digest": digest}
    check_left_out(tokenized.values(), config.data)
    report["hints"] = hints(config.data, tokenizer, sources)
    report["warnings"] = [
        text for split, counts in report["splits"].items() for text in bias_warnings(split, counts)
    ]
    for text in report["warnings"]:
        _logger.warning("prepare: %s", text)
    write_json(partial / PAIRS_REPORT_NAME, report)
    write_atomic(partial / PAIRS_PAGE_NAME, report_page(report))
    print_report(report, console)
    return details


def _job(
    config: RunConfig, model_dir: Path, template: str | None, sources: Sequence[Source]
) -> TokenizeJob:
    return TokenizeJob(
        model_dir=model_dir,
        template=template,
        trust_remote_code=config.model.trust_remote_code,
        settings=config.data,
        sources=tuple(sources),
    )


def _tokenize(
    job: TokenizeJob, tokenizer: PairTokenizer, scratch: Path, workers: int | str
) -> dict[Split, PairColumns]:
    """Tokenizes all rows into the scratch files of their splits."""
    chunks: Iterable[Chunk] = make_chunks(job.sources)
    num_rows = num_chunks = None
    if not any(isinstance(source.rows, StreamRows) for source in job.sources):
        chunks = list(chunks)
        num_rows, num_chunks = sum(len(chunk.positions) for chunk in chunks), len(chunks)
    num_workers = _num_workers(workers, num_rows, num_chunks)
    started = time.monotonic()
    with progress_bar("rows") as bar:
        task = bar.add_task("prepare", total=num_rows)
        tokenized = collect(
            tokenize_chunks(job, tokenizer, chunks, num_workers),
            job.sources,
            {split: _scratch_path(scratch, split) for split in SPLITS},
            job.settings,
            lambda rows: bar.advance(task, rows),
        )
    seconds, total = time.monotonic() - started, sum(map(len, tokenized.values()))
    _logger.info(
        "prepare: %s rows tokenized in %.1f s, %s rows/s, %s",
        f"{total:,}",
        seconds,
        f"{total / seconds:,.0f}",
        counted(num_workers, "processes"),
    )
    return tokenized


def _scratch_path(scratch: Path, split: str) -> Path:
    return scratch / f"{split}.tokens.arrow"


def _num_workers(setting: int | str, num_rows: int | None, num_chunks: int | None) -> int:
    """Tokenizing processes; rows and chunks are unknown of a stream."""
    most = num_chunks or MAX_AUTO_WORKERS
    if setting != "auto":
        return min(int(setting), num_chunks or int(setting))
    if num_rows is not None and num_rows < ROWS_FOR_WORKERS:
        return 1
    return min(len(os.sched_getaffinity(0)), MAX_AUTO_WORKERS, most)
