"""A conversation with one model in the terminal, or with lines from a pipe."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from dpo_dist.config.run_config import RunConfig
from dpo_dist.data.rows.messages import Conversation, message
from dpo_dist.data.tokens.render import TemplateRefusal
from dpo_dist.data.tokens.tokenize import PairTokenizer
from dpo_dist.engine.distributed.devices import device_of
from dpo_dist.engine.forward.generation import Sampling, answer, context_length, stop_when
from dpo_dist.engine.model.model_choice import choose_model, load_chosen
from dpo_dist.errors import DataError
from dpo_dist.inputs.scored_pairs import load_chat_tokenizer
from dpo_dist.model_files.of_run import RunModels
from dpo_dist.run.logs import console
from dpo_dist.run.run_dir import RunDir
from dpo_dist.run.topology import SINGLE_PROCESS

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C ends an answer early"


def run(config: RunConfig, which: str) -> None:
    """Answers line by line from standard input, tokens on standard output as they come.

    `which` is a name or a path as `choose_model` takes it; sampling is the generate section's.
    """
    from transformers import TextStreamer

    base_dir, sampling = RunModels(config).base, Sampling.of(config.generate)
    choice = choose_model(which, RunDir(config.run.dir), base_dir)
    tokenizer = load_chat_tokenizer(config, choice.folder, choice.is_adapter, base_dir)
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {choice.name} has no chat template",
            "one, to chat with it",
            "Set data.chat_template to a built-in name or a Jinja file.",
        )
    model = load_chosen(choice, base_dir, config.model, device_of(SINGLE_PROCESS))
    prompts = PairTokenizer(tokenizer, config.data)
    console.print(f"{choice.name}: {HELP}", style="dim", highlight=False)
    torch.manual_seed(config.run.seed)
    said: Conversation = []
    for line in _lines():
        if line == "/reset":
            said = []
            console.print("forgotten", style="dim")
            continue
        if line.startswith("/"):
            console.print(f"no command {line.split()[0]}: {HELP}", style="dim", highlight=False)
            continue
        asked = [*said, message("user", line)]
        try:
            ids = prompts.prompt_ids(asked)
        except TemplateRefusal as refusal:
            console.print(f"the chat template refuses this: {refusal}", style="dim")
            continue
        room = (context_length(model) or sys.maxsize) - len(ids)
        if room <= 0:
            console.print(f"{len(ids)} tokens, the model has no room for more: /reset", style="dim")
            continue
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        fitting = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        with _interruptible() as interrupted:
            ends = stop_when(interrupted)
            (reply,) = answer(
                model, tokenizer, [ids], fitting, streamer=streamer, stopping_criteria=ends
            )
        said = [*asked, message("assistant", reply.text.strip())]


def _lines() -> Iterator[str]:
    """What the user says until /quit or the end of input; a prompt shows on a terminal only."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which does not end the program while the block runs."""
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        yield lambda: bool(interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
