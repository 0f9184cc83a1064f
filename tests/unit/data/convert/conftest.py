from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phi3v.data.check import check_dataset
from phi3v.data.convert.writer import Conversion
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.schema import Sample


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, in which ``owner/name`` is found before the hub is asked; and the hub is out of reach."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def read_back(processor: Any) -> Callable[[Conversion], dict[str, list[Sample]]]:
    """Checks converted data as ``phi3v train`` does, every image decoded, and returns the samples by split."""

    def read(conversion: Conversion) -> dict[str, list[Sample]]:
        samples: dict[str, list[Sample]] = {}
        for split, path in conversion.files.items():
            dataset = ConversationDataset(path, conversion.image_dir)
            check_dataset(dataset, SampleEncoder(processor), progress=False, num_threads=1)
            samples[split] = [dataset[index] for index in range(len(dataset))]
        assert {split: len(of_split) for split, of_split in samples.items()} == conversion.samples
        assert len({sample.id for of_split in samples.values() for sample in of_split}) == sum(
            conversion.samples.values()
        )
        return samples

    return read
