"""Answers of one model to a file of prompts, written so that a killed pass goes on.

1. The questions are cut into batches by their place in the file.
2. A batch is answered turn by turn, with a seed of its own, and its lines are appended.
3. The file gets its name once every question has its line.

What a batch says does not depend on what was answered before it, so an interrupted pass ends with
the file of an unbroken one.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from dpo_dist.config.output_section import GenerateSection
from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.answers.answer_files import Format, answer_line, keep_whole_lines
from dpo_dist.data.answers.questions import Question, read_questions
from dpo_dist.data.tokens.render import TemplateRefusal
from dpo_dist.data.tokens.tokenize import PairTokenizer
from dpo_dist.engine.distributed.devices import device_of
from dpo_dist.engine.forward.generation import Answer, Sampling, answer, context_length
from dpo_dist.engine.model.model_choice import (
    ModelChoice,
    choose_model,
    digest_of_chosen,
    load_chosen,
)
from dpo_dist.errors import ArtifactError, DataError
from dpo_dist.inputs.scored_pairs import load_chat_tokenizer
from dpo_dist.model_files.files import digest_of_tokenizer
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.lock import alone_with
from dpo_dist.run.logs import progress_bar
from dpo_dist.run.manifest import (
    Manifest,
    differences,
    digest_of,
    digest_of_file,
    fsync_dir,
    read_manifest_file,
    write_json,
)
from dpo_dist.run.run_dir import RunDir, manifest_beside, partial_path
from dpo_dist.run.topology import SINGLE_PROCESS

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speaker:
    """A loaded model with what turns a conversation into its prompt."""

    model: Any
    prompts: PairTokenizer
    settings: GenerateSection
    seed: int

    def answer_batch(self, number: int, questions: list[Question]) -> list[list[Answer]]:
        """The answers to every turn of some questions, a list a question."""
        said: list[list[Answer]] = [[] for _ in questions]
        for turn in range(max(question.num_turns for question in questions)):
            asked = [place for place, q in enumerate(questions) if turn < q.num_turns]
            ids = [self._prompt_ids(questions[place], said[place]) for place in asked]
            torch.manual_seed(int(digest_of([self.seed, number, turn])[:15], 16))
            answers = answer(
                self.model,
                self.prompts.tokenizer,
                ids,
                Sampling.of(self.settings),
                batch_size=self.settings.batch_size,
            )
            for place, reply in zip(asked, answers, strict=True):
                said[place].append(reply)
        return said

    def _prompt_ids(self, question: Question, said: list[Answer]) -> list[int]:
        templated = self.prompts.tokenizer.chat_template
        plain = not templated and isinstance(question.prompt, str) and not question.follow_ups
        if not templated and not plain:
            raise DataError(
                f"{question.origin} is a conversation, and the tokenizer has no chat template",
                "a chat template",
                "Set data.chat_template to a built-in name or a Jinja file.",
            )
        prompt = (
            question.prompt
            if plain
            else question.conversation(tuple(reply.text.strip() for reply in said))
        )
        try:
            ids = self.prompts.prompt_ids(prompt)
        except TemplateRefusal as refusal:
            raise DataError(
                f"{question.origin}: the chat template refuses it ({refusal})",
                "a conversation that it takes",
                "Correct or remove the question.",
            ) from None
        limit, longest = context_length(self.model), self.settings.max_new_tokens
        if limit is not None and len(ids) + longest > limit:
            raise DataError(
                f"{question.origin}: {len(ids)} tokens of prompt in turn {len(said) + 1} + "
                f"generate.max_new_tokens {longest} = {len(ids) + longest}",
                f"at most the model's {limit} positions",
                "Lower generate.max_new_tokens, or remove the question.",
            )
        return ids


def run(config: RunConfig, prompts_path: Path, which: str, form: Format, out: Path | None) -> Path:
    """Answers every question of a file and writes the answer file; its path.

    `which` is a name or a path as `choose_model` takes it. A file that is current is left alone.
    Raises ArtifactError when one of other settings is there, or another process is writing it.
    """
    questions, settings = read_questions(prompts_path), config.generate
    base_dir = RunModels(config).base
    choice = choose_model(which, RunDir(config.run.dir), base_dir)
    out = out or RunDir(config.run.dir).answers_path(choice.name, form == "fastchat")
    if out.is_dir() or out.suffix != ".jsonl":
        raise ArtifactError(f"--out {out}", "a file that ends in .jsonl", "Correct its name.")
    manifest = _manifest(config, choice, base_dir, prompts_path, form, out)
    with _alone_with(out) as stream:
        if _is_current(out, manifest):
            _logger.info("%s is there, made from these prompts, this model and these settings", out)
            return out
        tokenizer = load_chat_tokenizer(config, choice.folder, choice.is_adapter, base_dir)
        model = load_chosen(choice, base_dir, config.model, device_of(SINGLE_PROCESS))
        prompts = PairTokenizer(tokenizer, config.data)
        write_json(manifest_beside(out), asdict(manifest))
        speaker = Speaker(model, prompts, settings, config.run.seed)
        _answer_all(speaker, questions, form, out, stream)
        os.replace(partial_path(out), out)
        fsync_dir(out.parent)
    return out


@contextlib.contextmanager
def _alone_with(out: Path) -> Iterator[TextIO]:
    """The file of answers so far to append to, for this process alone; removed if still empty."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(out)
    with partial.open("a") as stream, alone_with(stream, out) as alone:
        try:
            held = alone and partial.samefile(f"/dev/fd/{stream.fileno()}")
        except FileNotFoundError:  # it was just finished and renamed
            held = False
        if not held:
            raise ArtifactError(
                f"{partial} is being written by another generate",
                "one at a time",
                "Wait for it, or choose another --out.",
            )
        try:
            yield stream
        finally:
            if partial.exists() and not partial.stat().st_size:
                partial.unlink()


def _answer_all(
    speaker: Speaker, questions: list[Question], form: Format, out: Path, stream: TextIO
) -> None:
    """Appends the lines that are not there yet."""
    answered = {row["question_id"] for row in keep_whole_lines(partial_path(out))}
    if answered:
        _logger.info("going on: %d of %d questions are answered", len(answered), len(questions))
    size, num_answers, num_tokens, num_cut = speaker.settings.batch_size, 0, 0, 0
    with progress_bar("questions") as bar:
        task = bar.add_task(f"answers of {out.stem}", total=len(questions))
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            if any(question.question_id not in answered for question in batch):
                said = speaker.answer_batch(start // size, batch)
                for question, answers in zip(batch, said, strict=True):
                    if question.question_id not in answered:
                        texts = [reply.text.strip() for reply in answers]
                        line = answer_line(question, texts, out.stem, form)
                        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                    num_answers += len(answers)
                    num_tokens += sum(reply.num_tokens for reply in answers)
                    num_cut += sum(reply.cut for reply in answers)
                stream.flush()
                os.fsync(stream.fileno())
            bar.advance(task, len(batch))
    _logger.info(
        "%s: %d questions; this time %d answers of %d tokens, %d cut at generate.max_new_tokens %d",
        out, len(questions), num_answers, num_tokens, num_cut, speaker.settings.max_new_tokens,
    )  # fmt: skip


def _manifest(
    config: RunConfig, choice: ModelChoice, base_dir: Path, prompts_path: Path, form: Format,
    out: Path,
) -> Manifest:  # fmt: skip
    """What the answers depend on, and the file's format."""
    sampling = config.generate.model_dump(mode="json", exclude={"num_prompts"})
    settings = {
        "format": form, "model_id": out.stem, "seed": config.run.seed,
        "dtype": config.model.dtype, "chat_template": config.data.chat_template,
        "system_message": config.data.system_message,
    }  # fmt: skip
    inputs = {
        "prompts": digest_of_file(prompts_path),
        "model": digest_of_chosen(choice, base_dir, config.model),
        "tokenizer": digest_of_tokenizer(base_dir),
    }
    return Manifest(
        "generate", settings | {f"generate.{k}": v for k, v in sampling.items()}, inputs
    )


def _is_current(out: Path, manifest: Manifest) -> bool:
    """Whether the answers are all there; raises ArtifactError when others lie in their place."""
    beside, partial = manifest_beside(out), partial_path(out)
    begun = out.exists() or (partial.exists() and partial.stat().st_size > 0)
    if not beside.exists():
        if begun:
            raise ArtifactError(
                f"{out} is there without {beside.name}",
                "a name that is free",
                "Choose another --out, or move the file away.",
            )
        return False
    old = read_manifest_file(beside, beside)
    found = differences(old.settings, manifest.settings)
    found += differences(old.inputs, manifest.inputs, "input ")
    if found and begun:
        raise ArtifactError(
            f"{out} was begun with other settings ({'; '.join(found)})",
            "the settings of this run config and the same inputs",
            f"Choose another --out, or delete {out.name}* in {out.parent}.",
        )
    return not found and out.exists()
