"""What stands in the data more than once: samples, ids, images and pictures that look alike; across splits first."""

from itertools import combinations

import numpy as np

from .diagnosis import Finding
from .findings import NUM_EXAMPLES, place_names
from .hashing import digests_of_lists
from .ledger import Ledger
from .lengths import Costs
from .twins import near_groups


class Repeats:
    """Searches a ledger for repeats.

    Args:
        ledger: the data.
        costs: tell which samples are usable; only those count.
        names: of the splits.
        has_hashed: whether images were hashed; otherwise an image is known by its path alone.
    """

    def __init__(self, ledger: Ledger, costs: Costs, names: list[str], has_hashed: bool) -> None:
        self._ledger = ledger
        self._names = names
        self._is_usable = costs.is_usable
        self._has_hashed = has_hashed
        prompts = ledger.prompts(has_hashed)
        answers = digests_of_lists(ledger.answers, ledger.rows["num_turns"])
        self._whole = _numbered(digests_of_lists(np.stack([prompts, answers], axis=1).reshape(-1), _twos(len(answers))))
        self._prompts = _numbered(prompts)
        self._copies, self._alike = _groups(ledger, has_hashed)
        self._places = ledger.sample_of_place

    def across(self) -> tuple[Finding, ...]:
        """Finds what each pair of splits shares."""
        findings: list[Finding] = []
        for one, other in combinations(range(len(self._names)), 2):
            pair = f"{self._names[one]} and {self._names[other]}"
            findings += self._shared_images(one, other, pair)
            rows = self._rows(other)[np.isin(self._whole[self._rows(other)], self._whole[self._rows(one)])]
            if len(rows):
                findings.append(
                    Finding(
                        f"samples of {self._names[other]} stand in {self._names[one]} too",
                        len(rows),
                        tuple(self._with_first(row, self._whole, self._rows(one)) for row in rows[:NUM_EXAMPLES]),
                        "Same question, images and answer: a score on them measures memory.",
                    )
                )
            rows = self._conflicts(self._rows(one), self._rows(other))
            if len(rows):
                findings.append(
                    Finding(
                        f"questions of both {pair}, same images, other answers",
                        len(rows),
                        tuple(self._with_first(row, self._prompts, self._rows(one)) for row in rows[:NUM_EXAMPLES]),
                        "One of the answers is wrong, or the question has several right ones.",
                    )
                )
        return tuple(findings)

    def within(self, split: int) -> tuple[Finding, ...]:
        """Finds what one split repeats."""
        rows = self._rows(split)
        findings = [
            self._repeated(
                "ids that an earlier sample has", rows, self._ledger.rows["id"], "Predictions are named by id."
            ),
            self._repeated(
                "samples that repeat an earlier one", rows, self._whole, "Same question, images and answer."
            ),
        ]
        _, first = np.unique(self._whole[rows], return_index=True)
        once = rows[np.sort(first)]
        conflicting = self._repeated(
            "samples that answer an earlier question otherwise",
            once,
            self._prompts,
            "Same question and images: one of the answers is wrong, or there are several right ones.",
        )
        findings.append(conflicting)
        if self._has_hashed:
            images = self._ledger.images_of(split)
            images = images[self._ledger.images["reason"][images] == 0]
            findings.append(self._copied_images(images, split))
            findings.append(self._alike_images(images, split))
        return tuple(finding for finding in findings if finding is not None)

    def _rows(self, split: int) -> np.ndarray:
        own = self._ledger.samples_of(split)
        return own.start + np.flatnonzero(self._is_usable[own])

    def _shared_images(self, one: int, other: int, pair: str) -> list[Finding]:
        """Counts images of ``other`` that ``one`` shows too: the same bytes or path, then those that look alike."""
        first, second = self._ledger.images_of(one), self._ledger.images_of(other)
        first, second = (images[self._ledger.images["reason"][images] == 0] for images in (first, second))
        is_copy = np.isin(self._copies[second], self._copies[first])
        is_alike = np.isin(self._alike[second], self._alike[first]) & ~is_copy
        findings = []
        for title, groups, chosen in (
            ("the same", self._copies, second[is_copy]),
            ("nearly the same", self._alike, second[is_alike]),
        ):
            if len(chosen):
                shown = np.isin(self._ledger.image_of, chosen)
                samples = np.intersect1d(self._places[shown], self._rows(other))
                findings.append(
                    Finding(
                        f"images of {self._names[other]} are {title} in {self._names[one]}; "
                        f"{len(samples):,} of its samples show them",
                        len(chosen),
                        tuple(
                            self._image_pair(int(image), groups, first, one, other) for image in chosen[:NUM_EXAMPLES]
                        ),
                        "Leakage: a score on them measures memory. Split by scene, page or recording, not by image.",
                    )
                )
        return findings

    def _conflicts(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Returns those of ``others`` whose question ``rows`` asks too, where no sample of them answers alike."""
        asked = np.isin(self._prompts[others], self._prompts[rows])
        return others[asked & ~np.isin(self._whole[others], self._whole[rows])]

    def _repeated(self, title: str, rows: np.ndarray, names: np.ndarray, advice: str) -> Finding | None:
        """Counts those of ``rows`` whose name an earlier one of them has."""
        _, first = np.unique(names[rows], return_index=True)
        is_repeat = np.ones(len(rows), dtype=bool)
        is_repeat[first] = False
        repeats = rows[is_repeat]
        if not len(repeats):
            return None
        return Finding(
            title, len(repeats), tuple(self._with_first(row, names, rows) for row in repeats[:NUM_EXAMPLES]), advice
        )

    def _copied_images(self, images: np.ndarray, split: int) -> Finding | None:
        _, first = np.unique(self._copies[images], return_index=True)
        is_copy = np.ones(len(images), dtype=bool)
        is_copy[first] = False
        copies = images[is_copy]
        if not len(copies):
            return None
        pairs = tuple(
            self._image_pair(int(image), self._copies, images, split, split) for image in copies[:NUM_EXAMPLES]
        )
        return Finding("image files that are copies of another", len(copies), pairs, "The same bytes, other names.")

    def _alike_images(self, images: np.ndarray, split: int) -> Finding | None:
        """Counts groups of images that look alike and stand in different samples: frames of one film do not count."""
        _, first = np.unique(self._copies[images], return_index=True)
        images = images[np.sort(first)]
        groups, which, sizes = np.unique(self._alike[images], return_inverse=True, return_counts=True)
        owners = self._places[self._ledger.images["first"][images]]
        lowest = np.full(len(groups), len(self._is_usable))
        highest = np.zeros(len(groups), dtype=np.int64)
        np.minimum.at(lowest, which, owners)
        np.maximum.at(highest, which, owners)
        is_group = (sizes > 1) & (lowest < highest)
        if not is_group.any():
            return None
        examples = []
        for group in np.flatnonzero(is_group)[:NUM_EXAMPLES]:
            members = images[which == group]
            own = self._ledger.samples_of(split)
            shown = " ~ ".join(self._ledger.image_name(int(image), own) for image in members[:3])
            examples.append(shown + (f" and {len(members) - 3:,} more" if len(members) > 3 else ""))
        return Finding(
            f"groups of images that look alike, {int(sizes[is_group].sum()):,} images, the largest group "
            f"{int(sizes[is_group].max()):,}",
            int(is_group.sum()),
            tuple(examples),
            "Pictures of one scene, or one page scanned twice. Keep each group in one split.",
        )

    def _image_pair(self, image: int, groups: np.ndarray, among: np.ndarray, one: int, other: int) -> str:
        """Names an image and the first of ``among``, images of split ``one``, that belongs to its group."""
        twin = int(among[np.argmax(groups[among] == groups[image])])
        names = (
            self._ledger.image_name(image, self._ledger.samples_of(other)),
            self._ledger.image_name(twin, self._ledger.samples_of(one)),
        )
        return " = ".join(names) if groups is self._copies else " ~ ".join(names)

    def _with_first(self, row: int, names: np.ndarray, among: np.ndarray) -> str:
        first = among[np.argmax(names[among] == names[row])]
        return " and ".join(place_names(self._ledger, [row, int(first)]))


def _groups(ledger: Ledger, has_hashed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers each image file's group of exact copies, and its group of copies and near duplicates: (I,) int64 each."""
    numbers = np.arange(len(ledger.images))
    if not has_hashed:
        return numbers, numbers
    is_read = ledger.images["reason"] == 0
    copies = numbers.copy()
    _, first, which = np.unique(ledger.images["content"][is_read], return_index=True, return_inverse=True)
    copies[is_read] = numbers[is_read][first][which]
    alike = copies.copy()
    # Of a blank image only noise would be compared, and all blank pages of a set would form one group.
    compared = np.flatnonzero((copies == numbers) & is_read & ~ledger.images["is_flat"])
    alike[compared] = compared[near_groups(ledger.images["phash"][compared], ledger.images["dhash"][compared])]
    return copies, alike[copies]


def _numbered(digests: np.ndarray) -> np.ndarray:
    """Returns (n,) int64, the place where each digest stands first."""
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    return first[which]


def _twos(count: int) -> np.ndarray:
    return np.full(count, 2)
