"""What the docs show as output is printed today; `make docs` refreshes what is not."""

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.docs.doc_blocks import Block, NotFoundError, blocks_of, difference, refreshed
from support.docs.docs_run import DocsRun, docs_run
from support.ranks import ROOT

UPDATE = os.environ.get("UPDATE_DOCS") == "1"
PAGES = [
    ROOT / "docs" / f"{name}.md"
    for name in (
        "commands", "planning", "data", "evaluating", "sweep", "migrating", "reference-store",
        "export", "publishing", "python", "debugging",
    )
]  # fmt: skip
# Blocks that no command prints here: page, words of the block, and why not.
NOT_RUN = (
    ("commands.md", "A ticket to the bakery", "answers of the quickstart: ten minutes"),
    ("planning.md", "norms x", "a formula"),
    ("planning.md", "MFU =", "a formula"),
    ("data.md", "report.html", "a folder, explained"),
    ("data.md", "computed by prompts", "part of the plan of pairs that are not here"),
    ("sweep.md", "RUN_DIR/reference/", "a folder, explained"),
    ("reference-store.md", "contract.json", "a folder, explained"),
    ("reference-store.md", "# score what is missing", "commands"),
    ("reference-store.md", "runs/beta-0.1", "commands"),
    ("debugging.md", "tail -n 3 RUN/metrics.jsonl", "commands"),
    ("debugging.md", "what would help", "the plan of a model that is not here"),
    ("debugging.md", "train.profile_steps=[2,3]", "a command for GPUs"),
    ("debugging.md", "rank 1 on node7 in step", "a rank has to be stopped"),
    ("debugging.md", "rank0001.log", "a hang has to be sent a signal"),
    ("debugging.md", "tail -n 1 RUN", "a command"),
    ("debugging.md", "rank0000.trace.json", "a trace takes half a minute"),
    ("debugging.md", "step-0 gate: pair 12", "needs another model as the reference"),
    ("debugging.md", "--status", "a command"),
    ("debugging.md", "--preview 1", "a command"),
    ("debugging.md", "doctor run.yaml", "a command"),
)  # fmt: skip
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
MARKED = [block for block in BLOCKS if block.marks]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DocsRun]:
    """A run on which the commands are given in the order of the pages, each once."""
    with docs_run(tmp_path_factory.mktemp("docs")) as run:
        for block in MARKED:
            for _, command in block.marks:
                run.output(command)
        yield run


@pytest.mark.slow  # half a minute
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", MARKED, ids=str)
def test_a_block_is_what_its_commands_print(block: Block, run: DocsRun) -> None:
    output = printed(block, run)
    missing = difference(block, output)
    if missing is not None and UPDATE:
        replace(block, refreshed(block, output))
        return
    assert missing is None, (
        f"{block} shows\n{missing}\n\nwhich is not in\n{output}\nrun `make docs`, and read the diff"
    )


def test_every_block_is_compared_or_listed() -> None:
    unmarked = [block for block in BLOCKS if not block.marks]
    for page, words, _ in NOT_RUN:
        found = [b for b in unmarked if b.page.name == page and words in "\n".join(b.lines)]
        assert len(found) == 1, f"{page}: {len(found)} unmarked blocks with {words!r}"
        unmarked.remove(found[0])
    assert list(map(str, unmarked)) == []


PRINTED = """\
train: 40 pairs, in 0.6 s
step 1/2 train: loss 0.6931, margin 0.000, 45.3 pairs/s
step 2/2 train: loss 0.4512, margin 0.731, 51.0 pairs/s
the layout is packed since it agrees with plain forwards
checkpoint: out/checkpoints/step-000002
"""


@pytest.mark.parametrize(
    ("shown", "missing"),
    [
        (PRINTED, None),
        ("train: 40 pairs, in 9.0 s\n...", None),
        ("...\nstep 2/2 train: loss 0.4513, margin 0.735, 1.0 pairs/s\n...", None),
        ("...\nthe layout is packed since it\nagrees with plain forwards\n...\nout/", "out/"),
        ("train: 41 pairs, in 0.6 s\n...", "train: 41 pairs, in 0.6 s"),
        ("train: 40 pairs, in 0.6 s", "train: 40 pairs, in 0.6 s"),
        ("step 1/2 train:\n...", "step 1/2 train:"),
        ("...\nmargin 0.841,\n...", "margin 0.841,"),
        ("...\nstep 2/2\n...\nstep 1/2\n...", "step 1/2"),
        ("...\nthe layout is padded\n...", "the layout is padded"),
        ("...\nout/checkpoints/step-000002", None),
        ("...\nplain forwards", "plain forwards"),
    ],
)
def test_what_differs_is_told(shown: str, missing: str | None) -> None:
    assert difference(block_of(shown), PRINTED) == missing


def test_a_block_is_refreshed_with_its_gaps() -> None:
    stale = block_of(
        "train: 9 pairs, in 1 s\n...\nstep 2/2 train: loss 9.0, margin 1\n  ...\ncheckpoint: o"
    )
    first, _, second, _, last = PRINTED.splitlines()
    assert refreshed(stale, PRINTED) == [first, "...", second, "  ...", last]
    long = "error: " + "word " * 40
    assert refreshed(block_of("error: words"), long) == textwrap.wrap(long, 120)
    with pytest.raises(NotFoundError, match="nothing like 'saved: 3 MiB' is printed any more"):
        refreshed(block_of("...\nsaved: 3 MiB\n..."), PRINTED)


def test_blocks_are_found_with_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text:\n\n<!-- output of: a -->\n<!-- last line of: b -->\n\n    one\n\n      two\n\n"
        "    three lines above\n\n```bash\nc\n```\n\n```\nfenced\n```\n"
    )
    found = [(block.marks, block.lines, str(block)) for block in blocks_of(page)]
    lines = ("one", "", "  two", "", "three lines above")
    assert found == [
        ((("output", "a"), ("last line", "b")), lines, "page.md:6"),
        ((), ("fenced",), "page.md:17"),
    ]
    page.write_text("<!-- output of: a -->\ntext\n\n    one\n")
    with pytest.raises(AssertionError, match="page.md:2 stands between a mark and its block"):
        blocks_of(page)


def block_of(shown: str) -> Block:
    return Block(Path("page.md"), 0, (), tuple(shown.splitlines()), "")


def printed(block: Block, run: DocsRun) -> str:
    lines: list[str] = []
    for kind, command in block.marks:
        own = run.output(command).splitlines()
        lines += own[-1:] if kind == "last line" else own
    return "\n".join(lines)


def replace(block: Block, lines: list[str]) -> None:
    """Writes the lines into the page in the place of the block's."""
    page = block.page.read_text()
    old, new = (
        "".join(f"{block.indent}{line}".rstrip() + "\n" for line in each)
        for each in (block.lines, lines)
    )
    assert page.count(old) == 1, f"{block} occurs {page.count(old)} times"
    block.page.write_text(page.replace(old, new))
