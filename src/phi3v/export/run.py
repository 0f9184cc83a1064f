"""``phi3v export``: from a trained model to a folder for others, complete and checked under its name, or not there."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from ..config import RopeMode
from ..files import write_atomically, write_json
from ..model.checkpoint import load_processor
from ..model.configuration_phi3_v import Phi3VConfig
from ..model.processing_phi3_v import Phi3VProcessor
from ..runlog import environment
from .card import Exported, model_card
from .comparison import ARITHMETIC, MOST_NEAR_TIE, MOST_OF_THE_EFFECT, MOST_ROUNDING, ROUNDINGS, Comparison
from .hub import HubRepository
from .layout import point_to_published_code
from .placing import explained_writing, placed_when_complete, require_free
from .readings import GREEDY_TOKENS, MOST_POSITIONS, Samples, choose_samples, encode_samples, read_in_fresh_process
from .trained import find_trained
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
        source: a run directory, a model folder or an adapter, which may be a hub id.
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
        ConfigError: no data to compare on, ``output_dir`` is in use or cannot be written, or the hub cannot.
        DataError: no sample can be used.
        CapacityError: too little disk space.
        Phi3VError: the upload failed; the folder stays.
    """
    disable_progress_bar()
    require_free(output_dir)
    trained = find_trained(source, base=base, rope_mode=rope_mode)
    repository = HubRepository(push_to_hub, is_private=is_private) if push_to_hub else None
    files, image_dir = trained.samples_files(data, image_dir)
    processor = load_processor(trained.processor_folder, num_crops=num_crops)
    samples = choose_samples(processor, files, image_dir, num_samples)

    with placed_when_complete(output_dir) as folder:
        comparison = write_and_compare(
            trained,
            processor,
            folder,
            samples=samples,
            dtype=dtype,
            rope_mode=rope_mode,
            prepare=point_to_published_code if use_auto_map else lambda folder: None,
            read=read_in_fresh_process,
            say=say,
        )
        exported = Exported(
            name=push_to_hub or output_dir.resolve().name,
            short_positions=Phi3VConfig.from_pretrained(folder).original_max_position_embeddings,
            num_crops=processor.num_crops,
            use_auto_map=use_auto_map,
            comparison=comparison,
        )
        card = model_card(trained, exported).encode()
        with explained_writing(folder):
            write_atomically(folder / "README.md", card)
        say("Hashing the files ...")
        record = _check_record(folder, exported, samples, processor)
        with explained_writing(folder):
            write_json(folder / CHECK_FILE, record)
    say(f"{output_dir} is complete: {comparison}")
    if repository is not None:
        say(f"Uploading to {repository.repo_id} ...")
        say(f"Uploaded: {repository.upload(output_dir, say)}")
    return comparison


def _check_record(folder: Path, exported: Exported, samples: Samples, processor: Phi3VProcessor) -> dict[str, Any]:
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
        "stop_token_ids": processor.stop_token_ids,
        "versions": {"phi3v": found["phi3v"], "python": found["python"], **found["packages"]},
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())
        },
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
