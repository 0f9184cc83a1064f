"""The words of a configuration for device and number format."""

import pytest
import torch

from phi3v.errors import ConfigError
from phi3v.model.placement import DTYPE_NAMES, resolve_device, resolve_precision


@pytest.fixture(params=["cpu", "old gpu", "gpu"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param != "cpu")
    emulating = ("gpu", "old gpu")
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: request.param in (emulating if including_emulation else ("gpu",)),
    )
    return request.param


def test_device(machine: str) -> None:
    assert resolve_device("auto") == ("cpu" if machine == "cpu" else "cuda")
    assert resolve_device("cpu") == "cpu"
    if machine == "cpu":
        with pytest.raises(ConfigError, match="cuda was asked for"):
            resolve_device("cuda")
    else:
        assert resolve_device("cuda") == "cuda"


def test_precision(machine: str) -> None:
    device = resolve_device("auto")
    assert resolve_precision("auto", device) == ("bf16" if machine == "gpu" else "fp32")
    assert resolve_precision("auto", "cpu") == "fp32"
    assert {resolve_precision(name, "cuda") for name in DTYPE_NAMES} == set(DTYPE_NAMES)
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        resolve_precision("fp16", "cpu")
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPE_NAMES.values())
