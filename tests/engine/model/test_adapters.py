"""Adapters: what does not fit the model is said before anything is trained."""

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
