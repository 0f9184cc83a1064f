"""Prompts of every kind."""

from functools import partial

import pytest

from phi3v.eval.prompts import Prompt
from phi3v.model.processing_phi3_v import Phi3VProcessor
from prompting import Ask, make_prompt, prompts_of_every_kind


@pytest.fixture(scope="session")
def ask(processor: Phi3VProcessor) -> Ask:
    """Makes a prompt; see ``make_prompt``."""
    return partial(make_prompt, processor)


@pytest.fixture(scope="session")
def prompts(processor: Phi3VProcessor) -> list[Prompt]:
    """See ``prompts_of_every_kind``."""
    return prompts_of_every_kind(processor)
