"""The planner as it is defined: every bin is looked at for every unit. ``packing`` must plan exactly the same."""

from collections.abc import Iterable, Sequence

from phi3v.data.packing import MOST_UNBALANCE, Budget, Load, MicroBatch, Packing, SampleCosts, load_of


def plan_window(costs: SampleCosts, window: Sequence[int], packing: Packing) -> list[list[MicroBatch]]:
    """Cuts a window into micro-batches.

    As few as the budget allows, but equally many for every rank; each about as costly as the others, and so is what
    every rank has to do. A rank that is left without samples gets a filler.

    Args:
        costs: of the whole data set.
        window: positions in the data set; one may come twice.
        packing: budgets and ranks.

    Returns:
        For every rank its micro-batches, the costliest first.
    """
    groups = _split_for_ranks(costs, _groups(costs, window, packing), packing.num_ranks)
    units = sorted(((load_of(costs, group), group) for group in groups), key=lambda unit: -unit[0].cost)
    bins = _pack(units, packing)
    bins.sort(key=lambda batch: -batch.load.cost)
    num_rounds = -(-len(bins) // packing.num_ranks)
    ranks: list[list[MicroBatch]] = [[] for _ in range(packing.num_ranks)]
    for batch in bins:
        open_ranks = [rank for rank in ranks if len(rank) < num_rounds]
        min(open_ranks, key=lambda rank: sum(one.load.cost for one in rank)).append(batch)
    cheapest = min(window, key=lambda index: load_of(costs, (index,)).cost)
    filler = MicroBatch(((cheapest,),), load_of(costs, (cheapest,)), counts=False)
    return [rank + [filler] * (num_rounds - len(rank)) for rank in ranks]


def _groups(costs: SampleCosts, window: Sequence[int], packing: Packing) -> list[tuple[int, ...]]:
    """Puts samples with one stem together, as many as limits and budget allow, in the window's order."""
    groups: list[list[int]] = []
    open_group: dict[tuple[int, bool], list[int]] = {}
    for index in window:
        key = (int(costs.stem_keys[index]), bool(costs.tokens[index] > packing.short_positions))
        group = open_group.get(key) if costs.stem_tokens[index] > 0 else None
        if (
            group is not None
            and len(group) < packing.shared_questions
            and load_of(costs, [*group, index]).fits(packing.budget)
        ):
            group.append(index)
            continue
        open_group[key] = [index]
        groups.append(open_group[key])
    return [tuple(group) for group in groups]


def _split_for_ranks(costs: SampleCosts, groups: list[tuple[int, ...]], num_ranks: int) -> list[tuple[int, ...]]:
    """Halves the costliest groups while there are fewer groups than ranks: an idle rank would save nothing."""
    groups = list(groups)
    while len(groups) < num_ranks:
        largest = max(
            range(len(groups)), key=lambda number: (len(groups[number]) > 1, load_of(costs, groups[number]).cost)
        )
        group = groups[largest]
        if len(group) == 1:
            break
        groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups


Unit = tuple[Load, tuple[int, ...]]


def _pack(units: Iterable[Unit], packing: Packing) -> list[MicroBatch]:
    """Puts units, costliest first, into as few micro-batches as first fit finds; then balances them, if they fit."""
    units = list(units)
    first_fit: list[list[Unit]] = []
    loads: list[Load] = []
    for unit in units:
        place = next((number for number, load in enumerate(loads) if (load + unit[0]).fits(packing.budget)), None)
        if place is None:
            first_fit.append([unit])
            loads.append(unit[0])
        else:
            first_fit[place].append(unit)
            loads[place] += unit[0]
    number = min(len(units), -(-len(first_fit) // packing.num_ranks) * packing.num_ranks)
    bins = _balance(units, number, packing.budget) or first_fit
    return [_micro_batch(units_of_bin) for units_of_bin in _alike_together(units, bins, packing.budget)]


def _balance(units: Sequence[Unit], number: int, budget: Budget) -> list[list[Unit]] | None:
    """Puts each unit, costliest first, into the cheapest of ``number`` bins that takes it; None: one fits nowhere."""
    bins: list[list[Unit]] = [[] for _ in range(number)]
    loads = [Load()] * number
    for unit in units:
        fitting = [place for place in range(number) if not bins[place] or (loads[place] + unit[0]).fits(budget)]
        if not fitting:
            return None
        place = min(fitting, key=lambda place: loads[place].cost)
        bins[place].append(unit)
        loads[place] += unit[0]
    return bins


def _alike_together(units: Sequence[Unit], bins: list[list[Unit]], budget: Budget) -> list[list[Unit]]:
    """Deals units that cost nearly the same anew, neighbours in cost to one bin, as many to each as it has.

    Then the pieces of a row are of nearly one length, which attention can make use of. Bins whose balance would suffer,
    or that would exceed the budget, stay as they are.
    """
    rest = iter(units)
    sorted_bins = [[next(rest) for _ in one] for one in bins]
    before, after = ([_load(one) for one in some] for some in (bins, sorted_bins))
    is_balanced = max(load.cost for load in after) <= MOST_UNBALANCE * max(load.cost for load in before)
    return sorted_bins if is_balanced and all(load.fits(budget) for load in after) else bins


def _load(units: Sequence[Unit]) -> Load:
    load = Load()
    for own, _ in units:
        load += own
    return load


def _micro_batch(units: Sequence[Unit]) -> MicroBatch:
    return MicroBatch(tuple(group for _, group in units), _load(units))
