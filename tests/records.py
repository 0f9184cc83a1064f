"""Lines of data files, as tests of reading and checking write them."""

from collections.abc import Sequence
from typing import Any

from phi3v.data.dataset import ConversationDataset


def record(
    name: str = "s", *, images: Sequence[str] = (), user: str = "What colour?", assistant: str = "Red", **keys: Any
) -> dict[str, Any]:
    """A line of one turn."""
    return {"id": name, "conversations": [{"user": user, "assistant": assistant, "images": list(images)}], **keys}


def ids_of(dataset: ConversationDataset) -> list[str]:
    """What is left in a data set."""
    return [dataset[index].id for index in range(len(dataset))]
