"""What a run knows of its samples before step 1: findings that fit the model, and what sharing saves in its steps."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import phi3v.train.data as train_data
from packs import document_costs
from phi3v.config import TrainConfig
from phi3v.data.packing import Budget, Packing, saving_of, stem_groups
from phi3v.errors import DataError
from phi3v.model.checkpoint import load_processor
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.train.batches import Windows
from phi3v.train.data import CheckedData, check_data, choose_sharing, planned_saving
from phi3v.train.order import StemsTogether
from training import make_config, write_shared_data

SHORT = 4096


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shared_data(tmp_path_factory.mktemp("shared") / "data")


@pytest.fixture
def config(tiny_dir: Path, data: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda **changes: make_config(
        tiny_dir, data, tmp_path / "run", **{"shared_questions": None, "micro_batch_size": None, **changes}
    )


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., CheckedData]:
    """Checks a run's data, as the only process or one of several, with its findings beside the test's files."""

    def run(
        config: TrainConfig, processor: Any = None, num_ranks: int = 1, kept_sharing: int | None = None
    ) -> CheckedData:
        processor = processor or load_processor(config.model, num_crops=config.num_crops)
        args: Any = SimpleNamespace(process_index=0, world_size=1)
        return check_data(config, processor, tmp_path / "record" / "data-check.json", args, kept_sharing)

    return run


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 8])
@pytest.mark.parametrize("batch_size", [4, 32])
def test_the_saving_told_is_that_of_the_steps(
    config: Callable[..., TrainConfig], batch_size: int, micro_batch_size: int | None, num_ranks: int
) -> None:
    costs = document_costs(400)
    groups = stem_groups(costs, SHORT)
    one = config(batch_size=batch_size, micro_batch_size=micro_batch_size)
    saving = planned_saving(one, costs, groups, 8, SHORT, num_ranks)
    packing = Packing(Budget(samples=micro_batch_size), 8, SHORT, num_ranks)
    windows = Windows(StemsTogether(groups, most=8, seed=one.seed), costs, batch_size=batch_size, packing=packing)
    plans = [windows.plan(step) for step in range(len(windows))]
    assert saving.is_exact
    assert (saving.tokens, saving.shared_tokens) == (
        sum(plan.tokens for plan in plans), sum(plan.computed_tokens for plan in plans)
    )  # fmt: skip
    assert saving.crops == costs.crops.sum() and saving.shared_crops <= saving.crops
    assert micro_batch_size != 1 or saving.token_share == 0
    assert saving.token_share <= saving_of(costs, groups, 8).token_share


def test_a_long_epoch_is_judged_by_its_first_steps(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = document_costs(4000)
    groups = stem_groups(costs, SHORT)
    exact = planned_saving(config(batch_size=16), costs, groups, 8, SHORT, 1)
    monkeypatch.setattr(train_data, "PLANNED_SAMPLES", 500)
    about = planned_saving(config(batch_size=16), costs, groups, 8, SHORT, 1)
    assert (exact.is_exact, about.is_exact) == (True, False)
    assert (about.tokens, about.crops) == (exact.tokens, exact.crops)
    assert about.shared_tokens != exact.shared_tokens
    assert about.token_share == pytest.approx(exact.token_share, abs=0.03)
    assert about.shared_crops / about.crops == pytest.approx(exact.shared_crops / exact.crops, abs=0.03)


def test_questions_are_kept_together_only_where_that_saves_something(
    config: Callable[..., TrainConfig], check: Callable[..., CheckedData], caplog: pytest.LogCaptureFixture
) -> None:
    apart = config(batch_size=13, micro_batch_size=1)
    with caplog.at_level("INFO"):
        sharing = choose_sharing(apart, check(apart), SHORT)
    assert (sharing.shared_questions, sharing.saving.token_share) == (1, 0)
    assert "Samples share nothing: too few that begin with the same images are computed at once" in caplog.text
    together = config(batch_size=12, micro_batch_size=4)
    found = check(together)
    assert choose_sharing(together, found, SHORT).shared_questions == 8
    told = found.summaries["train"]["sharing"]
    assert told["computed_tokens"] < 0.9 * told["tokens"] and told["computed_crops"] < told["crops"]


def test_a_resume_with_other_budgets_finds_its_order_again(
    config: Callable[..., TrainConfig], check: Callable[..., CheckedData]
) -> None:
    """``micro_batch_size`` may change in the middle of an epoch; which samples come side by side may not."""
    for first, then in ((1, None), (None, 1)):
        batch_size = 13 if first else 12
        chosen = check(config(batch_size=batch_size, micro_batch_size=first)).shared_questions
        assert chosen == (1 if first else 8)
        resumed = config(batch_size=batch_size, micro_batch_size=then)
        assert check(resumed, kept_sharing=chosen).shared_questions == chosen
        assert check(resumed).shared_questions != chosen


def test_findings_are_those_of_the_model_at_hand(
    config: Callable[..., TrainConfig], check: Callable[..., CheckedData], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = load_processor(config().model)
    first = check(config(), processor)
    looked = []
    real = train_data.check_dataset
    monkeypatch.setattr(train_data, "check_dataset", lambda *args, **kw: looked.append(1) or real(*args, **kw))
    assert np.array_equal(check(config(), copy.deepcopy(processor)).costs.tokens, first.costs.tokens)
    assert not looked

    other = copy.deepcopy(processor)
    other.image_processor = Phi3VImageProcessor(num_crops=processor.num_crops, crop_px=112, num_img_tokens=16)
    assert check(config(), other).costs.tokens.max() > first.costs.tokens.max()
    words = copy.deepcopy(processor)
    words.tokenizer.add_tokens(["why why why"])
    assert check(config(), words).costs.tokens.sum() < first.costs.tokens.sum()
    check(config(), processor)
    monkeypatch.setattr(train_data, "__version__", "another")
    check(config(), processor)
    assert len(looked) == 4


def test_samples_beyond_the_models_positions_stop_the_run(
    config: Callable[..., TrainConfig], check: Callable[..., CheckedData], tiny_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_dir.iterdir():
        (folder / file.name).symlink_to(file)
    settings = json.loads((tiny_dir / "config.json").read_text())
    (folder / "config.json").unlink()
    longest = int(check(config()).costs.tokens.max())
    settings |= {"max_position_embeddings": longest - 1, "original_max_position_embeddings": 8, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=rf"exceed the {longest - 1} positions that the model knows"):
        check(replace(config(), model=str(folder)))
    dropping = config(max_length=longest, on_overlong="drop")
    assert check(replace(dropping, model=str(folder))).costs.tokens.max() < longest
