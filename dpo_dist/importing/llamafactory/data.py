"""LlamaFactory's data sets: names that dataset_info.json explains."""

import json
from pathlib import Path
from typing import Any, cast

from dpo_dist.errors import ConfigError
from dpo_dist.importing.settings import Run, names_in

Info = dict[str, Any]
INFO_NAME = "dataset_info.json"
OUR_TEMPLATES = ("chatml", "llama3", "mistral", "zephyr")
COLUMNS = (
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos",
    "audios", "chosen", "rejected", "kto_tag",
)  # fmt: skip
TAGS = {
    "role_tag": ("from", "role"), "content_tag": ("value", "content"),
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"), "function_tag": ("function_call", "tool_call"),
    "system_tag": ("system",),
}  # fmt: skip


def convert_data(run: Run) -> None:
    """data.train, data.eval or what is held out, the length and the template."""
    settings = run.settings
    if not settings.given("dataset"):
        raise ConfigError(
            "dataset is missing", "the names of the rows that LlamaFactory read",
            "Put dataset=NAME behind the file.",
        )  # fmt: skip
    folder, infos = _read_infos(run)
    for key, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if settings.given(key):
            names = names_in(settings.get(key))
            sources = [
                _source(run, name, folder, infos, f"{ours}[{number}]")
                for number, name in enumerate(names)
            ]
            run.put(ours, sources, f"{key}, {INFO_NAME}")
    held_out = float(settings.get("val_size"))
    if 0 < held_out < 1:
        run.put("data.eval_fraction", held_out, "val_size, held out by prompt, not by row")
    elif held_out:
        run.differs.append(
            f"val_size: {held_out:g}; set data.eval_fraction to {held_out:g} / the rows"
        )
    note = "the ends of answers are cut; LlamaFactory cuts prompts too"
    run.put("data.max_length", settings.get("cutoff_len"), settings.why("cutoff_len", note))
    _template(run)


def _read_infos(run: Run) -> tuple[Path, dict[str, Info] | None]:
    """The folder of the rows and what explains their names; None where it is not here."""
    given = str(run.settings.get("dataset_dir"))
    if given == "ONLINE":
        return Path(), {}
    beside = run.settings.path.parent
    places = [Path(given), beside / given, beside]
    for folder in places:
        path = folder / INFO_NAME
        if not path.is_file():
            continue
        try:
            infos: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}", "JSON", "Correct it.") from None
        if not isinstance(infos, dict):
            raise ConfigError(f"{path} holds no names", "{name: {...}}", "Correct it.")
        return folder, cast("dict[str, Info]", infos)
    run.differs.append(
        f"dataset: {INFO_NAME} is not in {', '.join(dict.fromkeys(map(str, places)))}; put it "
        "there, or write files or hub ids into data.train[].path"
    )
    return Path(given), None


def _source(
    run: Run, name: str, folder: Path, infos: dict[str, Info] | None, target: str
) -> dict[str, Any]:
    settings = run.settings
    source: dict[str, Any] = {"path": name}
    if infos:
        if name not in infos:
            raise ConfigError(
                f"dataset: {name} is not in {folder / INFO_NAME}",
                f"one of {', '.join(infos)}",
                "Correct the name, or add it there.",
            )
        source = _described(run, name, infos[name], folder, target)
    limits = [source.pop("limit", None), settings.get("max_samples")]
    given = [int(limit) for limit in limits if limit]
    if given:
        source["limit"] = min(given)
    return source | ({"streaming": True} if settings.get("streaming") else {})


def _described(run: Run, name: str, info: Info, folder: Path, target: str) -> dict[str, Any]:
    """A source of what dataset_info.json says of a name."""
    where = f"{INFO_NAME}: {name}"
    source: dict[str, Any] = {}
    if info.get("hf_hub_url"):
        source["path"] = info["hf_hub_url"]
    elif info.get("file_name"):
        source["path"] = str(folder / str(info["file_name"]))
    else:
        elsewhere = next((k for k in info if k.endswith("_url") or k == "cloud_file_name"), "none")
        run.differs.append(
            f"{where}.{elsewhere}: {info.get(elsewhere)}; copy it, and name the copy in "
            f"{target}.path"
        )
        source["path"] = str(info.get(elsewhere, name))
    if not info.get("ranking"):
        run.differs.append(
            f"{where}.ranking: false; its rows have to be pairs, of chosen and rejected"
        )
    for ours, theirs in (("config", "subset"), ("split", "split"), ("revision", "revision"),
                         ("limit", "num_samples")):  # fmt: skip
        if info.get(theirs):
            source[ours] = info[theirs]
    if info.get("folder"):
        run.differs.append(f"{where}.folder: {info['folder']}; name its files in {target}.path")
    for tag, value in cast("Info", info.get("tags") or {}).items():
        if value not in TAGS.get(tag, ()):
            run.differs.append(
                f"{where}.tags.{tag}: {value}; messages have role and content, or from and value: "
                "rename them in the rows"
            )
    columns = _columns(run, info, where)
    return source | ({"columns": columns} if columns else {})


def _columns(run: Run, info: Info, where: str) -> dict[str, str]:
    given = cast("dict[str, str]", info.get("columns") or {})
    unknown = [name for name in given if name not in COLUMNS]
    if unknown:
        raise ConfigError(
            f"{where}.columns: {', '.join(unknown)}", f"of {', '.join(COLUMNS)}", "Correct it."
        )
    named = {ours: given.get(ours) for ours in ("chosen", "rejected", "system", "tools")}
    if info.get("formatting", "alpaca") == "sharegpt":
        prompt = given.get("messages", "conversations")  # found by itself under its usual names
        named["prompt"] = None if prompt in ("conversations", "messages") else prompt
    else:
        prompt, query = given.get("prompt", "instruction"), given.get("query")
        if prompt != "instruction":  # a question, which becomes the user's turn as well
            named["question"] = prompt
            if query:
                run.differs.append(
                    f"{where}.columns.query: {query}; join it to {prompt} in the rows"
                )
        elif query not in (None, "", "input"):
            run.differs.append(f"{where}.columns.query: {query}; call it input in the rows")
    return {ours: theirs for ours, theirs in named.items() if theirs and theirs != ours}


def _template(run: Run) -> None:
    settings = run.settings
    template, thinking = settings.get("template"), settings.get("enable_thinking")
    if template in OUR_TEMPLATES:
        run.put("data.chat_template", template, "template")
    elif template is not None:
        run.differs.append(
            f"template: {template}; the tokenizer's own chat template is taken, which is the same "
            "for most instruct models: else name a Jinja file in data.chat_template"
        )
    if thinking is None and str(template).endswith("_nothink"):
        thinking = False
    if thinking is not None:
        why = "enable_thinking" if settings.given("enable_thinking") else "template"
        run.put("data.chat_template_kwargs", {"enable_thinking": bool(thinking)}, why)
