"""The run that a model folder is the result of, and what it says about asking the model. No torch."""

import logging
import re
from pathlib import Path
from typing import Any, get_args

from ..config import RopeMode
from ..errors import ConfigError
from ..runlog import RunDirectory

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-\d+")


def run_of(folder: Path) -> RunDirectory | None:
    """Returns the run whose result a model folder is; None where that is not known.

    A folder belongs to the run around it under its own name, ``RUN/model``, only: copies of it do not, and checkpoints
    are no result (see ``run_around``).
    """
    for place in (folder.absolute(), folder.resolve()):  # RUN/model may be a link, and a link may lead to RUN/model
        run = RunDirectory(place.parent)
        if folder.resolve() == run.model_dir.resolve() and run.config_path.is_file():
            return run
    return None


def run_around(folder: Path) -> RunDirectory | None:
    """Returns the run that wrote a model folder, ``RUN/model`` or ``RUN/checkpoints/checkpoint-N``; None if not known.

    Its configuration says how the model was trained; of its scores those at the end are the result's alone.
    """
    for place in (folder.absolute(), folder.resolve()):
        run = RunDirectory(place.parent.parent)
        is_checkpoint = place.parent == run.checkpoints_dir and _CHECKPOINT.fullmatch(place.name) is not None
        if is_checkpoint and run.config_path.is_file():
            return run
    return run_of(folder)


def trained_rope_mode(run: RunDirectory, settings: dict[str, Any]) -> RopeMode | None:
    """Returns the LongRoPE factors that a run trained with; None where its configuration does not say.

    Args:
        run: whose configuration.
        settings: what its ``config.yaml`` holds.

    Raises:
        ConfigError: the configuration names a mode that there is not.
    """
    mode = settings.get("rope_mode")
    if mode is not None and mode not in get_args(RopeMode):
        raise ConfigError(
            f"{run.config_path}: rope_mode is {str(mode)[:80]!r}, must be one of {', '.join(get_args(RopeMode))}"
        )
    return mode


def rope_mode_to_ask(model: str, asked: RopeMode) -> RopeMode:
    """Returns the LongRoPE factors that a model answers with.

    No file of a model folder says which factors it was trained with, but its run does. A model that learned with fixed
    factors and answered with others would score lower without any sign of why.

    Args:
        model: folder or hub id.
        asked: ``auto``: those of the run whose result or checkpoint the folder is, else by each sequence's own length;
            ``short`` and ``long`` count as they are.

    Raises:
        ConfigError: the run's ``config.yaml`` cannot be read.
    """
    run = run_around(Path(model)) if asked == "auto" else None
    if run is None:
        return asked
    mode = trained_rope_mode(run, run.config() or {}) or asked
    if mode != asked:
        logger.warning(
            "%s answers with rope_mode %s, as %s says that it was trained; --rope_mode short or long says otherwise.",
            model, mode, run.config_path,
        )  # fmt: skip
    return mode
