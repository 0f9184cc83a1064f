"""``phi3v export``: from a trained model to a folder for others, complete and checked under its name, or not there."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from ..config import RopeMode
from ..errors import CheckpointError, ConfigError
from ..model.checkpoint import load_processor
from ..model.configuration_phi3_v import Phi3VConfig
from ..model.processing_phi3_v import Phi3VProcessor
from ..runlog import environment, write_atomically, write_json
from .card import Exported, model_card
from .comparison import ARITHMETIC, MOST_NEAR_TIE, MOST_OF_THE_EFFECT, MOST_ROUNDING, ROUNDINGS, Comparison
from .hub import HubRepository
from .layout import point_to_published_code, settle_rope_factors, settle_stop_tokens
from .merge import require_empty
from .readings import GREEDY_TOKENS, MOST_POSITIONS, Samples, choose_samples, encode_samples, read_in_fresh_process
from .trained import Trained, find_trained
from .writing import Say, write_and_compare

CHECK_FILE = "export_check.json"


def export_model(
    source: Path,
    output_dir: Path,
    *,
    base: str | None = None,
    data: Sequence[Path] = (),
    image_dir: Path | None = None,
    num_samples: int = 4,
    dtype: str = "auto",
    num_crops: int | None = None,
    rope_mode: RopeMode | None = None,
    use_auto_map: bool = False,
    push_to_hub: str | None = None,
    is_private: bool = False,
    say: Say = lambda text: None,
) -> Comparison:
    """Writes a trained model for others, checks it in a fresh process, and uploads it where that is asked.

    Args:
        source: a run directory, a model folder or an adapter folder.
        output_dir: must not exist, or be empty.
        base: the base model, where it is not where an adapter says.
        data: JSONL files to take the samples from; default: the run's evaluation data, else its training data.
        image_dir: their image folder.
        num_samples: how many samples are compared, spread over the data.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: as the weights are saved (an adapter's base's).
        num_crops: most tiles of an image, as the folder will say; default: as trained.
        rope_mode: LongRoPE factors that the folder will lead every loader to; default: as trained. For a model whose
            run is not known this also says how it was trained.
        use_auto_map: point to the original's code.
        push_to_hub: repository to upload to, once the check has passed.
        is_private: create it as a private one.
        say: shows progress.

    Raises:
        CheckpointError: nothing to export there, a damaged folder, or one that does not match the trained model: it is
            removed.
        ConfigError: no data to compare on, ``output_dir`` is in use, or the hub cannot be written to.
        DataError: no sample can be used.
        CapacityError: too little disk space.
        Phi3VError: the upload failed; the folder stays.
    """
    disable_progress_bar()
    require_empty(output_dir)
    trained = find_trained(source, base=base, rope_mode=rope_mode)
    exported_mode = rope_mode or trained.rope_mode
    repository = HubRepository(push_to_hub, is_private=is_private) if push_to_hub else None
    files, image_dir = trained.samples_files(data, image_dir)
    processor = load_processor(trained.folder, num_crops=num_crops)
    samples = choose_samples(processor, files, image_dir, num_samples)

    def settle(model: Any) -> None:
        settle_stop_tokens(model, processor)
        settle_rope_factors(model, exported_mode)

    temporary = output_dir.resolve().with_name(f".{output_dir.resolve().name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        comparison = write_and_compare(
            trained,
            processor,
            temporary,
            samples=samples,
            dtype=dtype,
            settle=settle,
            prepare=point_to_published_code if use_auto_map else lambda folder: None,
            read=read_in_fresh_process,
            say=say,
        )
        if problems := comparison.problems():
            raise CheckpointError(_refusal(output_dir, trained, exported_mode, problems, comparison))
        exported = Exported(
            name=push_to_hub or output_dir.resolve().name,
            rope_mode=exported_mode,
            short_positions=Phi3VConfig.from_pretrained(temporary).original_max_position_embeddings,
            num_crops=processor.num_crops,
            use_auto_map=use_auto_map,
            comparison=comparison,
        )
        write_atomically(temporary / "README.md", model_card(trained, exported).encode())
        say("Hashing the files ...")
        write_json(temporary / CHECK_FILE, _check_record(temporary, trained, exported, samples, processor))
        _put_in_place(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"{output_dir} is complete: {comparison}")
    if repository is not None:
        say(f"Uploading to {repository.repo_id} ...")
        say(f"Uploaded: {repository.upload(output_dir)}")
    return comparison


def _refusal(
    output_dir: Path, trained: Trained, exported_mode: RopeMode, problems: Sequence[str], comparison: Comparison
) -> str:
    text = f"{output_dir} was not written: the exported model does not answer as {trained.folder} does: "
    text += " ".join(problems)
    if exported_mode != trained.rope_mode:
        text += (
            f" It was trained with rope_mode {trained.rope_mode} and was to be exported with {exported_mode}, which "
            "gives other answers on these samples: leave --rope_mode out, or train with it."
        )
    return f"{text} ({comparison})"


def _check_record(
    folder: Path, trained: Trained, exported: Exported, samples: Samples, processor: Phi3VProcessor
) -> dict[str, Any]:
    """Returns the content of ``export_check.json``: what was compared, how close it came, and the files' hashes."""
    record = asdict(exported.comparison)
    found = environment()
    return {
        "verdict": "passed",
        "checked_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "reloaded": "in a fresh process, computing in float32",
        "samples": {
            "files": [file.name for file in samples.files],
            "ids": [one.id for one in encode_samples(processor, samples)],
            "skipped": len(samples.skipped),
        },
        "comparison": record,
        "limits": {
            "arithmetic": ARITHMETIC,
            "roundings": ROUNDINGS,
            "most_rounding": MOST_ROUNDING,
            "most_near_tie": MOST_NEAR_TIE,
            "most_of_the_effect": MOST_OF_THE_EFFECT,
            "positions_a_sample": MOST_POSITIONS,
            "greedy_tokens": GREEDY_TOKENS,
        },
        "num_crops": exported.num_crops,
        "rope_mode": {"trained": trained.rope_mode, "exported": exported.rope_mode},
        "stop_token_ids": processor.stop_token_ids,
        "versions": {"phi3v": found["phi3v"], "python": found["python"], **found["packages"]},
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())
        },
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _put_in_place(temporary: Path, output_dir: Path) -> None:
    """Gives the complete folder its name.

    Raises:
        ConfigError: something was put there meanwhile.
    """
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    with suppress(FileNotFoundError):
        output_dir.rmdir()  # empty, or it would have been refused
    try:
        temporary.rename(output_dir)
    except OSError as error:
        raise ConfigError(f"{output_dir}: cannot be put in place ({error}); give another output folder") from error
