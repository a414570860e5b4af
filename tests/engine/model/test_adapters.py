"""Adapters: what does not fit the model is said before anything is trained."""

from typing import Any

import pytest
from support.tiny_models import tiny_model

from dpo_dist.config.training_section import AdapterSection
from dpo_dist.engine.model.adapters import add_adapter
from dpo_dist.errors import ConfigError


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_a_module_that_is_not_there(key: str) -> None:
    adapter = AdapterSection.model_validate({key: ["q_proj", "w_pack"]})
    with pytest.raises(ConfigError) as caught:
        add_adapter(tiny_model("llama"), adapter, "base")
    assert str(caught.value) == (
        f"adapter.{key}: the model has no module w_pack; expected names of its modules, such as "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj. "
        f"Correct adapter.{key}."
    )


def adapted_by(target_modules: list[str] | str) -> set[str]:
    adapter = AdapterSection(target_modules=target_modules)
    policy: Any = add_adapter(tiny_model("llama"), adapter, "base")
    return set(policy.base_model.targeted_module_names)


def test_a_regular_expression_names_modules_as_in_peft() -> None:
    named = adapted_by(r".*layers\.0\.self_attn\.[qv]_proj")
    assert named == {f"model.layers.0.self_attn.{name}_proj" for name in "qv"}
    assert adapted_by(r".*\.(q|v)_proj") == adapted_by(["q_proj", "v_proj"]) > named


def test_a_regular_expression_that_fits_nothing() -> None:
    with pytest.raises(ConfigError) as caught:
        adapted_by("q_proj")
    names = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert str(caught.value) == (
        "adapter.target_modules: the regular expression q_proj fits no module's whole name; "
        f"expected one that does, such as .*\\.({names.replace(', ', '|')}). Correct it, or write "
        f"names as a list: adapter.target_modules=[{names}]."
    )


def test_what_peft_cannot_adapt() -> None:
    with pytest.raises(ConfigError) as caught:
        add_adapter(tiny_model("mamba"), AdapterSection(), "base")
    said = str(caught.value)
    assert said.startswith("peft cannot adapt this model (")
    assert said.endswith(
        "); expected modules and options that it takes. Name other adapter.target_modules, "
        "or leave "
        "out adapter.use_dora and adapter.dropout."
    )
