"""Axolotl's data sets: an entry names rows, and its type says how they are read."""

from pathlib import Path
from typing import Any, cast

from dpo_dist.errors import ConfigError
from dpo_dist.importing.settings import Run, number_of

Entry = dict[str, Any]
# keys of an entry of datasets: what is read here, what is not, what has no effect on preferences
ENTRY = (
    "path", "name", "split", "revision", "data_files", "ds_type", "type", "field_messages",
    "field_chosen", "field_rejected", "field_system", "field_tools", "field_prompt",
    "message_property_mappings", "message_field_role", "message_field_content", "roles",
    "chat_template", "chat_template_jinja",
)  # fmt: skip
ENTRY_DIFFERS = {
    "shards": "limit takes a part of the rows",
    "shards_idx": "limit takes a part of the rows",
    "drop_system_message": "remove it from the rows",
    "field_thinking": "a thought is read from reasoning_content or thinking, or from the text",
    "template_thinking_key": "a thought is read from reasoning_content or thinking, or from the "
    "text",
    "split_thinking": "a thought is read from reasoning_content or thinking, or from the text",
    "message_field_training": "every turn of the assistant behind the prompt is scored",
    "message_field_training_detail": "every turn of the assistant behind the prompt is scored",
    "roles_to_train": "the assistant's turns are scored",
    "train_on_eos": "the end of an answer is scored",
    "train_on_eot": "the end of an answer is scored",
}
ENTRY_IGNORED = (
    "trust_remote_code", "preprocess_shards", "conversation", "input_format", "input_transform",
    "field", "field_human", "field_model", "logprobs_field", "temperature", "train_on_split",
)  # fmt: skip
# the rows of a type -> the file's columns for ours; {} where they are told by their own columns
ROWS: dict[str, dict[str, str]] = {
    "intel": {},
    "icr": {"question": "input"},
    "prompt_pairs": {"question": "prompt"},
    "ultra": {},
    "argilla": {"question": "instruction", "chosen": "chosen_response",
                "rejected": "rejected_response"},
    "argilla_chat": {},
}  # fmt: skip
OUR_TEMPLATES = ("chatml", "llama3")
MESSAGE_NAMES = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})
KNOWN_ROLES = {"user": {"user", "human"}, "assistant": {"assistant", "gpt"},
               "system": {"system"}, "tool": {"tool"}}  # fmt: skip


def convert_data(run: Run) -> None:
    """data.train, data.eval or what is held out, the length and the template."""
    settings = run.settings
    trained, templates = _sources(run, "datasets", "data.train")
    run.put("data.train", trained, "datasets")
    if settings.given("test_datasets"):
        tested, more = _sources(run, "test_datasets", "data.eval")
        templates |= more
        run.put("data.eval", tested, "test_datasets")
    held_out = number_of(settings, "val_set_size") or 0
    if 0 < held_out < 1:
        run.put("data.eval_fraction", held_out, "val_set_size, held out by prompt, not by row")
    elif held_out:
        run.differs.append(
            f"val_set_size: {held_out:g}; set data.eval_fraction to {held_out:g} / the rows"
        )
    longest = settings.get("sequence_len")
    note = "the ends of answers are cut; Axolotl drops such pairs"
    strategy = settings.get("excess_length_strategy")
    if strategy == "truncate":
        note = "the ends of answers are cut, prompts are not"
    elif strategy is not None:
        run.differs.append(f"excess_length_strategy: {strategy}; the ends of answers are cut")
    run.put("data.max_length", longest, settings.why("sequence_len", note))
    _template(run, templates)


def _sources(run: Run, key: str, ours: str) -> tuple[list[Entry], set[str]]:
    """Our sources, and the chat templates that their types name; "" is that of chat_template."""
    given = run.settings.get(key)
    if not isinstance(given, list) or not given:
        raise ConfigError(
            f"{key}: {given!r}", f"a list of mappings of {', '.join(ENTRY)}",
            "Correct the YAML.",
        )  # fmt: skip
    sources, templates = list[Entry](), set[str]()
    for number, entry in enumerate(cast("list[Any]", given)):
        where, target = f"{key}.{number}", f"{ours}[{number}]"
        fields = _checked(entry, where)
        for name, remedy in ENTRY_DIFFERS.items():
            if fields.get(name) not in (None, False):
                run.differs.append(f"{where}.{name}: {fields[name]}; {remedy}")
        columns, template = _type(run, fields, where, target)
        templates.add(template)
        source = _place(run, fields, where, target)
        if columns:
            source["columns"] = columns
        if run.settings.get("streaming"):
            source["streaming"] = True
        sources.append(source)
    return sources, templates


def _checked(entry: Any, where: str) -> Entry:
    fields = cast("Entry", entry) if isinstance(entry, dict) else {}
    known = {*ENTRY, *ENTRY_DIFFERS, *ENTRY_IGNORED}
    unknown = [name for name in fields if name not in known]
    if unknown or not (fields.get("path") or fields.get("data_files")):
        found = f"{where}: {', '.join(unknown) or 'no path'}"
        raise ConfigError(found, f"a path, and of {', '.join(ENTRY)}", "Correct the YAML.")
    return fields


def _place(run: Run, fields: Entry, where: str, target: str) -> Entry:
    """Where the rows lie."""
    files = fields.get("data_files")
    names = [files] if isinstance(files, str) else list(files or [])
    path = str(fields.get("path") or names[0])
    if names and path in ("json", "csv", "parquet", "arrow", "text", names[0]):
        path, names = names[0], names[1:]
    if names:
        run.differs.append(
            f"{where}.data_files: {', '.join(names)}; a source is a file, a folder or a hub id: "
            f"name the files in sources of their own, such as {target}.path"
        )
    if "://" in path:
        run.differs.append(f"{where}.path: {path}; copy it, and name the copy in {target}.path")
    source: Entry = {"path": path}
    if fields.get("name"):
        source["config"] = fields["name"]
    if fields.get("split"):
        source["split"] = fields["split"]
    if fields.get("revision"):
        source["revision"] = fields["revision"]
    return source


def _type(run: Run, fields: Entry, where: str, target: str) -> tuple[dict[str, str], str]:
    """The columns and the template of an entry's type."""
    kind = fields.get("type")
    if isinstance(kind, dict):
        return _user_defined(run, cast("Entry", kind), where), "none"
    if kind is None:
        return {}, "none"
    template, _, rows = str(kind).partition(".")
    rows = rows or "default"
    if template == "chat_template":
        return _chat(run, fields, where), str(fields.get("chat_template") or "")
    if template in OUR_TEMPLATES and rows in ROWS:
        return dict(ROWS[rows]), template
    if template in OUR_TEMPLATES and rows == "default":
        run.differs.append(
            f"{where}.type: {kind}; {target}.columns expects a question in prompt: if the rows "
            "call it input, question or instruction, or an answer chosen_response, write that there"
        )
        return {"question": "prompt"}, template
    if template == "user_defined":
        return _user_defined(run, fields, where), "none"
    if template == "passthrough":
        return {}, "none"
    run.differs.append(
        f"{where}.type: {kind}; rows are told by their columns: look at `dpo-dist prepare "
        f"--preview`, and map them with {target}.columns"
    )
    return {}, ""


def _chat(run: Run, fields: Entry, where: str) -> dict[str, str]:
    """chat_template.default and argilla_chat: dialogues under any name."""
    prompt = fields.get("field_messages")
    whole = "argilla_chat" in str(fields.get("type")) or prompt in ("chosen", "rejected")
    named = {"chosen": fields.get("field_chosen"), "rejected": fields.get("field_rejected"),
             "system": fields.get("field_system"), "tools": fields.get("field_tools")}  # fmt: skip
    if not whole:  # a dialogue in messages is found by itself
        named["prompt"] = None if prompt in (None, "messages", "conversations") else prompt
    legacy = {"role": fields.get("message_field_role"),
              "content": fields.get("message_field_content")}  # fmt: skip
    given = cast("dict[str, str]", fields.get("message_property_mappings") or {})
    names = MESSAGE_NAMES[0] | {key: value for key, value in legacy.items() if value} | given
    if {key: names[key] for key in ("role", "content")} not in MESSAGE_NAMES:
        run.differs.append(
            f"{where}.message_property_mappings: {names}; messages have role and content, or from "
            "and value: rename them in the rows"
        )
    for role, others in cast("dict[str, Any]", fields.get("roles") or {}).items():
        strange = {*([others] if isinstance(others, str) else others)}
        if strange - KNOWN_ROLES.get(role, {role}):
            run.differs.append(
                f"{where}.roles: {', '.join(sorted(strange))} for {role}; prepare names roles that "
                "it does not know: rename them in the rows"
            )
    return {ours: str(theirs) for ours, theirs in named.items() if theirs not in (None, ours)}


def _user_defined(run: Run, fields: Entry, where: str) -> dict[str, str]:
    """Texts that a format makes prompts and answers of."""
    names = {ours: str(fields.get(f"field_{ours}") or ours)
             for ours in ("prompt", "chosen", "rejected")}  # fmt: skip
    for ours, name in names.items():
        written = fields.get(f"{ours}_format")
        if written and written not in ("{" + ours + "}", "{" + name + "}"):
            run.differs.append(
                f"{where}.type.{ours}_format: {written!r}; write that text into the rows, or leave "
                "it to a chat template: columns {question: ...} makes dialogues of them"
            )
    return {ours: name for ours, name in names.items() if ours != name}


def _template(run: Run, templates: set[str]) -> None:
    """data.chat_template; "" stands for what the file's own chat_template says."""
    settings, own = run.settings, run.settings.get("chat_template")
    jinja = settings.get("chat_template_jinja")
    named = {str(own or "tokenizer_default") if name == "" else name for name in templates}
    if own and "chat_template" not in templates:  # for generation, and saved with the tokenizer
        named |= {str(own)} if named <= {"none"} else set()
    named -= {"none"}
    if jinja and named <= {"jinja", "tokenizer_default"}:
        if len(str(jinja)) < 200 and Path(str(jinja)).suffix in (".jinja", ".j2", ".txt"):
            run.put("data.chat_template", str(jinja), "chat_template_jinja")
        else:
            run.differs.append(
                "chat_template_jinja: its text; save it as a file and name that in "
                "data.chat_template"
            )
        return
    named -= {"tokenizer_default"}
    if len(named) > 1:
        run.differs.append(
            f"datasets.type: templates {', '.join(sorted(named))}; a run has one, "
            "data.chat_template"
        )
    elif named and (name := next(iter(named))) in OUR_TEMPLATES:
        run.put("data.chat_template", name, "chat_template, or the type of the data set")
    elif named:
        run.differs.append(
            f"chat_template: {next(iter(named))}; the tokenizer's own is taken, which is the same "
            "for most instruct models: else name a Jinja file in data.chat_template"
        )
