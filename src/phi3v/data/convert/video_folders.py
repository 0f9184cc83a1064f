"""Any folder of clips sorted by class, with or without splits."""

import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath

from ...errors import ConfigError, DataError
from .clips import QUESTION, Clip, find_clips, write_clips
from .image_folders import SPLIT_NAMES
from .source_images import data_set_name
from .video import import_av
from .writer import Conversion, OnBadSample

_LAYOUTS = f"CLASS/CLIP or SPLIT/CLASS/CLIP with the splits {', '.join(SPLIT_NAMES)}"


def convert_video_folders(
    source: str,
    output_dir: Path,
    *,
    num_frames: int = 8,
    question: str = QUESTION,
    val_share: float = 0.0,
    group_pattern: str | None = None,
    num_workers: int | None = None,
    limit: int | None = None,
    on_bad_sample: OnBadSample = "skip",
    progress: bool = True,
) -> Conversion:
    r"""Write frames of clips that are sorted into class folders, and a question about each: which of the classes is it?

    A sample's id is the clip's path without its ending, and its frames lie under that path.

    Args:
        source: folder of class folders with clips in them, CLASS/CLIP, or of splits that hold such folders,
            train/CLASS/CLIP.
        output_dir: folder for FOLDER_SPLIT.jsonl, named after the source, and images.
        num_frames: frames of every clip, evenly spaced.
        question: the text to ask; {classes} in it stands for the names of all classes.
        val_share: share of the train clips, 0 to below 1, that go to val instead, where the source has no val. The same
            clips give the same choice.
        group_pattern: regular expression, looked for in each clip's file name, whose first group names what must not
            be split between train and val: "_g(\d+)_" for UCF-101's groups. Default: every clip by itself.
        num_workers: processes that decode. Default: one a core, at most 16, fewer for few clips.
        limit: most clips of each split, spread evenly over it. Default: all.
        on_bad_sample: what an unreadable clip does: it is left out and listed in unreadable.txt, or it ends the
            conversion.
        progress: show a progress bar.

    Raises:
        ConfigError: PyAV is missing, a number out of range, a pattern that cannot be used.
        DataError: the source is missing, holds no clips or is laid out differently, or no clip can be read.
        CapacityError: the disk is full.
    """
    import_av()
    if not 0 <= val_share < 1:
        raise ConfigError(f"val_share is {val_share:g}; give a share from 0 to below 1")
    if group_pattern is not None and val_share == 0:
        raise ConfigError("group_pattern is for a split by val_share, and val_share is 0; give both or none")
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. Give one that is laid out as {_LAYOUTS}.")
    paths, others = find_clips(folder)
    splits = _splits(folder, paths)
    if val_share > 0:
        if "val" in splits.values():
            raise ConfigError(f"val_share is {val_share:g}, and {folder} has validation clips already; leave it out")
        train = [path for path in paths if splits[path] == "train"]
        splits |= dict.fromkeys(_choose_val(train, val_share, group_pattern), "val")

    def clip(path: PurePosixPath) -> Clip:
        stem = str(path.with_suffix(""))
        return Clip(stem, splits[path], label=path.parts[-2], name=stem, path=folder / path, where=str(folder / path))

    return write_clips(
        [clip(path) for path in paths],
        [str(folder / path) for path in others],
        output_dir,
        name=data_set_name(folder.resolve().name, "train", "videos"),
        num_frames=num_frames,
        question=question,
        limit=limit,
        num_workers=num_workers,
        on_bad_sample=on_bad_sample,
        progress=progress,
    )


def _splits(folder: Path, paths: Sequence[PurePosixPath]) -> dict[PurePosixPath, str]:
    """Returns every clip's split; all are train where there are no folders of splits.

    Raises:
        DataError: neither of the two layouts.
    """
    has_splits = all(path.parts[0].lower() in SPLIT_NAMES for path in paths)
    depth = 3 if has_splits else 2
    for path in paths:
        if len(path.parts) < depth:
            raise DataError(f"{folder / path}: stands in no class folder. The layout is {_LAYOUTS}.")
        if len(path.parts) > depth:
            raise DataError(
                f"{folder / path}: is in a folder within a class folder, and which of the two is its class? Lay the "
                f"clips out as {_LAYOUTS}."
            )
    return {path: SPLIT_NAMES[path.parts[0].lower()] if has_splits else "train" for path in paths}


def _choose_val(paths: Sequence[PurePosixPath], share: float, pattern: str | None) -> set[PurePosixPath]:
    """Chooses the clips of the split val: by class, or by groups that are taken whole.

    Clips and groups are ordered by a hash of their names, so that a choice depends on nothing else. What rounding
    leaves over in one class is carried to the next.

    Raises:
        ConfigError: a pattern that is wrong or does not match, or a share that no clip or group comes near to.
    """
    strata: dict[str, dict[str, list[PurePosixPath]]] = {}
    for path in paths:
        # A group of one name in two classes is one group: the same person, the same film.
        stratum, group = (path.parts[-2], str(path)) if pattern is None else ("", _group(path, pattern))
        strata.setdefault(stratum, {}).setdefault(group, []).append(path)
    val: list[PurePosixPath] = []
    num_seen = 0
    for groups in strata.values():
        num_seen += sum(map(len, groups.values()))
        for group in sorted(groups, key=lambda name: sha256(name.encode()).digest())[:-1]:  # one is left for train
            if len(val) + len(groups[group]) / 2 <= share * num_seen:
                val += groups[group]
    if not val:
        whole = "clip" if pattern is None else "group"
        raise ConfigError(f"val_share is {share:g} of {len(paths)} clips, which is no whole {whole}; give a larger one")
    return set(val)


def _group(path: PurePosixPath, pattern: str) -> str:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"group_pattern {pattern!r} is no regular expression: {error}") from error
    if not expression.groups:
        raise ConfigError(f"group_pattern {pattern!r} has no group; put what names the group into parentheses")
    found = expression.search(path.name)
    if found is None or found[1] is None:
        raise ConfigError(f"group_pattern {pattern!r} finds nothing in {path}; change it or leave it out")
    return found[1]
