"""The model card: true, readable by the hub, and without anything of the machine it was written on."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from phi3v.config import TrainConfig
from phi3v.export.card import SETTINGS, Exported, model_card
from phi3v.export.comparison import Comparison, Greedy
from phi3v.export.trained import Trained, find_trained
from phi3v.runlog import RunDirectory

EXPORTED = Exported(
    name="me/mine",
    short_positions=4096,
    num_crops=3,
    use_auto_map=True,
    comparison=Comparison(
        dtype="bfloat16",
        trained_rope_mode="auto",
        written_rope_mode="auto",
        num_samples=4,
        num_logits=31,
        same_inputs=True,
        merge_difference=1e-6,
        reload_difference=0.0,
        relative_difference=0.0123,
        max_logit_difference=0.1,
        rounded_tensors=3,
        rounding_difference=0.01,
        rounding_max_logit=0.1,
        tolerance=0.05,
        adapter_effect=0.3,
        same_top_token=1.0,
        greedy=Greedy(samples=4, same=4, tokens=9, near_tie=0.2, near_ties=(), mismatches=()),
    ),
)


@pytest.fixture
def trained(lora_run: Path) -> Trained:
    return find_trained(lora_run)


def without_run(trained: Trained, base: str | None) -> Trained:
    return replace(trained, run=None, settings={}, base=base)


def test_the_hub_reads_its_head(trained: Trained) -> None:
    head = ModelCard(model_card(without_run(trained, "microsoft/Phi-3.5-vision-instruct"), EXPORTED)).data.to_dict()
    assert head == {
        "license": "mit",
        "base_model": "microsoft/Phi-3.5-vision-instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["phi3_v", "phi3v", "vision", "multimodal", "lora"],
    }


def test_no_licence_is_claimed_for_a_base_that_is_not_known(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    card = model_card(trained, EXPORTED)
    assert ModelCard(card).data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "add `license` and `base_model`" in card
    monkeypatch.setattr("phi3v.export.trained._is_downloaded", lambda repo_id: repo_id == "me/base")
    other = model_card(without_run(trained, "me/base"), EXPORTED)
    assert ModelCard(other).data.to_dict()["base_model"] == "me/base"
    assert "license" not in ModelCard(other).data.to_dict()


def test_scores_data_and_settings_are_the_runs(trained: Trained, lora_run: Path) -> None:
    card = model_card(trained, EXPORTED)
    run = RunDirectory(lora_run)
    for when in ("before", "after"):
        line: Any = run.evaluation(when)
        interval = f"{line['low']:.4f} to {line['high']:.4f}"
        assert f"| {when} training | {line['metric']} | {line['score']:.4f} | {interval} | 3 |" in card
    data: Any = run.data()
    longest, fingerprint = data["train"]["max_tokens"], data["train"]["fingerprint"][:16]
    assert f"| train | `train.jsonl` | 11 | 11 | 11 | {longest} | 0 | `{fingerprint}` |" in card
    assert "| `lora_rank` | 4 |" in card and "| `num_crops` | 3 |" in card and "| optimizer steps | 6 |" in card


def test_nothing_of_this_machine_stands_in_it(trained: Trained, lora_run: Path, tiny_dir: Path) -> None:
    card = model_card(trained, EXPORTED)
    for path in (lora_run, lora_run.parent, tiny_dir, tiny_dir.parent, Path.home()):
        assert f"{path}/" not in card and str(path) not in card.split()
    paths = {one.name for one in fields(TrainConfig) if "Path" in str(one.type)} | {"model", "train_data", "eval_data"}
    assert paths.isdisjoint(SETTINGS)


def test_every_setting_shown_is_one() -> None:
    assert set(SETTINGS) <= {one.name for one in fields(TrainConfig)}


def test_without_a_run_it_says_less_and_nothing_wrong(trained: Trained) -> None:
    card = model_card(without_run(trained, None), EXPORTED)
    for section in ("## Scores", "## Data", "## Settings"):
        assert section not in card
    for section in ("## Loading", "## Serving", "## Check", "## Licence"):
        assert section in card


@pytest.mark.parametrize(("longest", "told"), [(4096, "serve it with `--max-model-len 4096`"), (4097, "no setting of")])
def test_what_vllm_should_be_told_follows_from_the_longest_sample(
    longest: int, told: str, trained: Trained, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path).create("method: full\n", {})
    counts = {"samples": 1, "turns": 1, "images": 1, "skipped": {}, "dropped": 0, "fingerprint": "0" * 64}
    run.write_data({"train": {**counts, "max_tokens": longest}})
    card = model_card(replace(trained, run=run), EXPORTED)
    assert told in card


def test_how_it_was_trained_is_said_only_where_that_is_known(trained: Trained) -> None:
    assert "was trained with `rope_mode: auto`" in model_card(trained, EXPORTED)
    unknown = without_run(trained, None)
    assert "was trained with" not in model_card(unknown, EXPORTED)
    assert "was trained with `rope_mode: long`" in model_card(replace(unknown, rope_mode="long"), EXPORTED)


@pytest.mark.parametrize("mode", ["short", "long"])
def test_a_fixed_mode_needs_no_setting_of_the_server(mode: Any, trained: Trained) -> None:
    card = model_card(trained, replace(EXPORTED, comparison=replace(EXPORTED.comparison, written_rope_mode=mode)))
    assert f"the {mode} factors stand in both places" in card
    assert "serve it with" not in card


def test_pointers_to_the_originals_code_are_promised_only_where_they_are(trained: Trained) -> None:
    with_pointers, without = (model_card(trained, replace(EXPORTED, use_auto_map=use)) for use in (True, False))
    assert "`trust_remote_code=True`" in with_pointers and "--trust-remote-code" in with_pointers
    assert "trust_remote_code" not in without and "--trust-remote-code" not in without
