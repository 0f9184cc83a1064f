"""How much the fuzz tests try: a fixed sequence of few examples, or with PHI3V_FUZZ_EXAMPLES=5000 a long random one."""

import os

from hypothesis import HealthCheck, settings

_WANTED = os.environ.get("PHI3V_FUZZ_EXAMPLES")

settings.register_profile(
    "phi3v-fuzz",
    deadline=None,
    derandomize=_WANTED is None,
    max_examples=int(_WANTED or 60),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
FUZZ = settings.get_profile("phi3v-fuzz")
"""Decorates every fuzz test."""
