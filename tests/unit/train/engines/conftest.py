"""The model that engines share out."""

from copy import deepcopy

import pytest

from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.parts import is_never_used


@pytest.fixture
def model(tiny_model: Phi3VForCausalLM) -> Phi3VForCausalLM:
    copy = deepcopy(tiny_model).train()
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(not is_never_used(name, copy.config.vision_config.num_hidden_layers))
    return copy
