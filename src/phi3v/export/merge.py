"""Merging an adapter into its base, called done only after the merged folder answers as the adapter does."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError
from ..model.checkpoint import is_adapter, load_processor
from ..model.downloads import local_folder
from ..model.folder import taken_for_a_path
from .comparison import Comparison
from .placing import placed_when_complete, require_free
from .readings import choose_samples, read_folder
from .trained import find_trained
from .writing import write_and_compare


def merge_and_verify(
    adapter: Path,
    output_dir: Path,
    *,
    base: str | None = None,
    data: Sequence[Path] = (),
    image_dir: Path | None = None,
    num_samples: int = 4,
    dtype: str = "auto",
) -> Comparison:
    """Merges, saves, reloads and compares; the folder appears once it has passed, or not at all.

    The base is the unquantised one, also for an adapter that was trained on it in 4 bit. The sum is formed in float32
    and rounded once to ``dtype``.

    Args:
        adapter: a PEFT adapter, such as ``RUN/model``, or its hub id.
        output_dir: must not exist, or be empty.
        base: the base model, where it is not where the adapter says.
        data: JSONL files to take the samples from; default: the data of the run that the adapter lies in.
        image_dir: their image folder.
        num_samples: how many, spread over the data.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the base's own.

    Raises:
        CheckpointError: not an adapter, or the merged folder does not match it.
        ConfigError: no data to compare on, or ``output_dir`` is in use or cannot be written.
        CapacityError: too little disk space.
    """
    require_free(output_dir)
    folder = Path(local_folder(adapter))
    if not is_adapter(folder):
        raise CheckpointError(
            f"{adapter}: holds no adapter_config.json; merge takes an adapter folder such as RUN/model"
            f"{'' if folder.is_dir() else taken_for_a_path(adapter)}"
        )
    trained = find_trained(folder, base=base)
    files, image_dir = trained.samples_files(data, image_dir)
    processor = load_processor(trained.processor_folder)
    samples = choose_samples(processor, files, image_dir, num_samples)
    with placed_when_complete(output_dir) as written:
        return write_and_compare(
            trained, processor, written, samples=samples, dtype=dtype, read=read_folder, say=lambda text: None
        )
