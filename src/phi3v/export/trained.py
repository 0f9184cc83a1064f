"""What is exported: a run's result, a model folder or an adapter folder, and what its run says about it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..config import RopeMode
from ..errors import CheckpointError, ConfigError
from ..eval.origin import run_around, run_of, trained_rope_mode
from ..model.checkpoint import ADAPTER_CONFIG, base_of_adapter, is_adapter
from ..model.downloads import local_folder
from ..model.folder import read_object, taken_for_a_path
from ..runlog import RunDirectory

PUBLISHED_MODELS = {
    "Phi-3.5-vision-instruct": "microsoft/Phi-3.5-vision-instruct",
    "Phi-3-vision-128k-instruct": "microsoft/Phi-3-vision-128k-instruct",
}
"""Hub ids of the published models, by what their ``config.json`` calls itself."""

_BASE_IN_CARD = re.compile(r"---\n(?:(?!---).*\n)*?base_model: *['\"]?(?P<base>[\w./-]+)['\"]? *\n")
"""The base that a model card's head names. A card may come from anywhere: it is not worth a YAML reader."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model on disk.

    Attributes:
        folder: published layout, or a PEFT adapter.
        run: the run that it is the result of; None where that is not known.
        settings: of the run that wrote it as its result or as a checkpoint, as its ``config.yaml`` says; empty where
            that is not known.
        base: the unquantised base model under an adapter; None for a whole model.
        rope_mode: LongRoPE factors that it was trained with; ``auto`` where that is not known.
    """

    folder: Path
    run: RunDirectory | None
    settings: dict[str, Any]
    base: str | None
    rope_mode: RopeMode

    @property
    def is_rope_mode_known(self) -> bool:
        """Whether its run or the user said which LongRoPE factors it was trained with."""
        return self.rope_mode != "auto" or self.settings.get("rope_mode") is not None

    @property
    def weights_folder(self) -> str:
        """Where the weights of the whole model lie: the base's folder or hub id under an adapter."""
        return self.base or str(self.folder)

    @property
    def processor_folder(self) -> str:
        """Where the processor's files lie: beside the weights or adapter, or with the base of an adapter without."""
        has_own = self.base is None or (self.folder / "preprocessor_config.json").is_file()
        return str(self.folder) if has_own else self.weights_folder

    def samples_files(self, data: Sequence[Path], image_dir: Path | None) -> tuple[list[Path], Path | None]:
        """Returns the data files to compare on, and their image folder.

        Args:
            data: what the user names; empty: the run's evaluation data, or its training data where it has none.
            image_dir: of ``data``.

        Raises:
            ConfigError: nothing is named and no run is known.
        """
        if data:
            return list(data), image_dir
        files = self.settings.get("eval_data") or self.settings.get("train_data")
        if not files:
            raise ConfigError(
                f"{self.folder} does not lie in a run directory; name real samples to compare on with --data FILE.jsonl"
            )
        own = image_dir or self.settings.get("image_dir")
        return [Path(file) for file in files], Path(own) if own else None

    def published_base(self) -> str | None:
        """Returns the hub id of the model that training started from; None where its folder does not say."""
        start = self.base or self.settings.get("model")
        return published_name(start) if start else published_name(str(self.folder))


def find_trained(source: Path, *, base: str | None = None, rope_mode: RopeMode | None = None) -> Trained:
    """Finds out what ``source`` is.

    Args:
        source: a run directory, a model folder or an adapter, which may be a hub id.
        base: the base model, where it is not where the adapter says.
        rope_mode: what a model without a run was trained with; a run knows it.

    Raises:
        CheckpointError: none of the three, or a run that has no result yet.
        ConfigError: the run's ``config.yaml`` cannot be read, or ``base`` was given for a whole model.
    """
    source = Path(local_folder(source))
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no such folder; give a run directory, a model folder or an adapter folder"
            f"{taken_for_a_path(source)}"
        )
    is_model = any((source / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if not is_model and not RunDirectory(source).config_path.is_file():
        raise CheckpointError(
            f"{source}: holds no config.json, {ADAPTER_CONFIG} or run; give a run directory, a model folder or an "
            "adapter folder"
        )
    folder = source if is_model else RunDirectory(source).model_dir
    if not folder.is_dir():
        raise CheckpointError(
            f"{source}: this run has no result yet (no model/ in it); end it with the same `phi3v train` command"
        )
    writer = run_around(folder)
    settings = (writer.config() or {}) if writer else {}
    adapter = is_adapter(folder)
    if base is not None and not adapter:
        raise ConfigError(f"--base {base}: {folder} is a whole model and stands on no other; leave --base out")
    return Trained(
        folder=folder,
        run=run_of(folder),
        settings=settings,
        base=(base or base_of_adapter(folder)) if adapter else None,
        rope_mode=(trained_rope_mode(writer, settings) if writer else None) or rope_mode or "auto",
    )


def published_name(model: str) -> str | None:
    """Returns the hub id behind a model's name or folder; None where it is not known.

    A folder says it in the model card that an export writes, or as the published ``config.json`` does. A name that is
    no folder may be the relative path of one that has gone: it is a hub id if it is a published model's, or if this
    machine has downloaded it from the hub.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model if model in PUBLISHED_MODELS.values() or _is_downloaded(model) else None
    card = folder / "README.md"
    if card.is_file() and (named := _BASE_IN_CARD.match(card.read_text("utf-8", errors="replace"))):
        return named["base"]
    config_file = folder / "config.json"
    named = read_object(config_file).get("_name_or_path", "") if config_file.is_file() else ""
    return PUBLISHED_MODELS.get(str(named).rpartition("/")[2])


def _is_downloaded(repo_id: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(repo_id, "config.json"), str)
    except HFValidationError:
        return False
