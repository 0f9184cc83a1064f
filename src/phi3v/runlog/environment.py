"""The software and the machine that a run is made with."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES_ON_RECORD = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "deepspeed",
    "bitsandbytes",
    "flash-attn",
    "triton",
)
"""Packages whose versions can change a run's numbers or speed; those not installed are left out of the record."""


def environment(gpus: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Describes the software and the machine, importing none of the packages it names.

    Environment variables, the command line, host and user names stay out: they hold secrets.

    Args:
        gpus: what training found out about its accelerators, recorded as it is.
    """
    return {
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "phi3v": _version("phi3v"),
        "git": _git_state(Path(__file__)),
        "packages": {name: version for name in PACKAGES_ON_RECORD if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": [dict(gpu) for gpu in gpus],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(source_file: Path) -> dict[str, Any] | None:
    """The commit ``source_file`` is at; None for an installed copy, also for one inside somebody else's repository."""
    if _git(source_file, "ls-files", "--error-unmatch", source_file.name) is None:
        return None
    commit = _git(source_file, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "has_changes": bool(_git(source_file, "status", "--porcelain", "--", "."))}


def _git(source_file: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(source_file.parent), *arguments]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_bytes() -> int | None:
    """The machine's main memory, bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
