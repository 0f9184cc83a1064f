import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import phi3v.train.data as train_data
import phi3v.train.evaluation as evaluation
import phi3v.train.room as room
import phi3v.train.run as run
from phi3v.data.packing import MicroBatch
from phi3v.errors import CheckpointError, ConfigError, DataError, Phi3VError
from phi3v.eval.metrics import Score
from phi3v.eval.run import EvalResult
from phi3v.model.checkpoint import load_model, load_processor, save_model
from phi3v.runlog import RunDirectory
from phi3v.train.assembly import warmup_steps
from phi3v.train.batches import TrainingSamples
from phi3v.train.order import Shuffled
from phi3v.train.run import run_training
from phi3v.train.start import best_whole
from training import final_weights, logged, make_config, write_shared_data, write_training_data

MakeConfig = Callable[..., Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_data(tmp_path_factory.mktemp("run") / "data")


@pytest.fixture
def config(tiny_dir: Path, data: Path, tmp_path: Path) -> MakeConfig:
    """Makes configurations of three steps."""
    return lambda output_dir=tmp_path / "run", **changes: make_config(
        tiny_dir, data, output_dir, **{"num_train_epochs": 1, **changes}
    )


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Replaces generation: the scores come from a list, one a call."""

    def script(scores: list[float]) -> None:
        remaining = iter(scores)

        def evaluate_model(model: Any, *args: Any, **kwargs: Any) -> EvalResult:
            assert not model.training and not torch.is_grad_enabled()
            torch.rand(3)
            score = next(remaining)
            return EvalResult(Score("accuracy", score, score, score, 0.95, 3), [{"id": "a", "score": score}], 0.1)

        monkeypatch.setattr(evaluation, "evaluate_model", evaluate_model)

    return script


def test_a_run_leaves_what_its_directory_promises(config: MakeConfig, data: Path) -> None:
    settings = config(eval_data=[data / "eval.jsonl"], eval_max_new_tokens=2, report_to=["tensorboard"])
    path = RunDirectory(run_training(settings))
    assert [line["step"] for line in path.steps()] == [1, 2, 3]
    assert path.steps()[-1]["epoch"] == 1.0
    measured = {"loss", "learning_rate", "grad_norm", "samples_per_s", "tokens_per_s", "sharing", "memory_bytes"}
    assert measured < path.steps()[0].keys()
    assert [(line["step"], line["when"]) for line in path.evals()] == [(0, "before"), (3, "after")]
    assert path.prediction_steps() == [0, 3] and len(path.predictions(3)) == 3
    before, after, summary, audit = path.evaluation("before"), path.evaluation("after"), path.data(), path.audit()
    assert before is not None and after is not None and before["step"] == 0 and after["n"] == 3
    assert summary is not None and summary["train"]["samples"] == 11 and summary["eval"]["samples"] == 3
    assert audit is not None and audit["parts"][0]["part"] == "vision"
    assert path.environment() is not None and path.report_path.exists()
    assert list(path.tensorboard_dir.iterdir())
    model = load_model(path.model_dir)
    trained = final_weights(path.path)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert load_processor(path.model_dir).num_crops == 4


def test_a_run_trains_on_the_windows_that_the_order_names(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every epoch; the message about a loss that is not finite relies on it."""
    drawn: list[list[int]] = []
    get = TrainingSamples.__getitem__

    def record(self: TrainingSamples, batch: MicroBatch) -> Any:
        drawn.append([index for group in batch.groups for index in group])
        return get(self, batch)

    monkeypatch.setattr(TrainingSamples, "__getitem__", record)
    run_training(config(num_train_epochs=2, save_steps=None, micro_batch_size=None))
    of_the_audit, *trained = drawn
    assert of_the_audit == [1], "the first sample with an image"
    orders = [Shuffled(11, seed=0).of(epoch).tolist() for epoch in range(2)]
    windows = [order[start : start + 4] for order in orders for start in (0, 4, 8)]
    assert [sorted(window) for window in trained] == [sorted(window) for window in windows]


def test_sharing_is_chosen_where_it_saves_a_tenth(
    config: MakeConfig, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And can be seen: in the log, in data.json and in every line of steps.jsonl."""
    shared_data = write_shared_data(tmp_path / "shared-data")
    changes = {"shared_questions": None, "micro_batch_size": None, "save_steps": None, "batch_size": 13}
    with caplog.at_level(logging.INFO):
        shared = RunDirectory(run_training(config(train_data=[shared_data / "train.jsonl"], **changes)))
    found = (shared.data() or {})["train"]["sharing"]
    assert found["shared_questions"] == 8
    assert found["computed_tokens"] < 0.9 * found["tokens"] and found["computed_crops"] < found["crops"]
    assert f"computes {found['computed_tokens']} of {found['tokens']} decoder positions" in caplog.text
    (line,) = shared.steps()
    assert line["sharing"] == pytest.approx(found["tokens"] / found["computed_tokens"])

    apart = RunDirectory(run_training(config(tmp_path / "apart", **changes)))
    found = (apart.data() or {})["train"]["sharing"]
    assert found["shared_questions"] == 1 and found["computed_tokens"] == found["tokens"]
    assert {line["sharing"] for line in apart.steps()} == {1.0}
    assert "share nothing" in caplog.text


def test_costs_that_are_not_those_of_the_findings_are_taken_anew(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_training(config(max_steps=1)) / "checkpoints"
    costs = (path / "data-costs.npz").read_bytes()
    (path / "data-costs.npz").write_bytes(b"of another run")
    run_training(config(max_steps=1))
    assert (path / "data-costs.npz").read_bytes() == costs


def test_a_finished_run_is_left_alone(
    config: MakeConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_training(config())
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file() and file.name != ".lock"}
    monkeypatch.setattr(run, "build_model", lambda *args: pytest.fail("the model was loaded"))
    monkeypatch.setattr(train_data, "check_dataset", lambda *args, **kwargs: pytest.fail("the data was read"))
    with caplog.at_level(logging.INFO):
        assert run_training(config(logging_steps=5)) == path
    assert "is finished" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in files} == files
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.001 there, 0\.1 now"):
        run_training(config(learning_rate=0.1))
    with pytest.raises(CheckpointError, match="already holds a run"):
        run_training(config(resume="never"))


def test_a_run_with_other_settings_is_not_continued(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "save_result", stop)
    with pytest.raises(KeyboardInterrupt):
        run_training(config())
    with pytest.raises(CheckpointError, match=r"checkpoint-3 belongs to a run .*\n- batch_size: 4 there, 2 now"):
        run_training(config(batch_size=2))
    checkpoints = config().output_dir / "checkpoints"
    assert sorted(folder.name for folder in checkpoints.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_the_best_checkpoint_is_the_result(
    config: MakeConfig, data: Path, scripted: Callable[[list[float]], None]
) -> None:
    scripted([0.1, 0.9, 0.9])
    settings = config(eval_data=[data / "eval.jsonl"], eval_steps=1, eval_before=False, keep_checkpoints=1)
    path = RunDirectory(run_training(settings))
    assert path.best() == {"step": 2, "score": 0.9, "metric": "accuracy"}, "the earliest of equals"
    kept = sorted(folder.name for folder in path.checkpoints_dir.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]
    best = load_file(path.checkpoints_dir / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in final_weights(path.path).items())
    after = path.evaluation("after")
    assert after is not None and (after["step"], after["score"]) == (2, 0.9), "taken over, not generated again"


def test_a_best_checkpoint_that_is_damaged_is_not_the_result(
    config: MakeConfig,
    data: Path,
    scripted: Callable[[list[float]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = config(eval_data=[data / "eval.jsonl"], eval_steps=1, eval_before=False, keep_checkpoints=9)
    path = RunDirectory(settings.output_dir)

    def damage_and_choose(*args: Any, **options: Any) -> Any:
        weights = path.checkpoints_dir / "checkpoint-1" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-4000:-3000] = bytes(1000)
        weights.write_bytes(content)
        return best_whole(*args, **options)

    monkeypatch.setattr(run, "best_whole", damage_and_choose)
    scripted([0.9, 0.6, 0.3])
    with caplog.at_level(logging.WARNING):
        run_training(settings)
    assert "not there or damaged: of step 1 (0.9000); the best that counts is step 2's, 0.6000" in caplog.text
    assert path.best() == {"step": 2, "score": 0.6, "metric": "accuracy"}
    weights = load_file(path.checkpoints_dir / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name].to(tensor.dtype)) for name, tensor in final_weights(path.path).items())


def test_the_last_step_is_the_result_without_keep_best(
    config: MakeConfig, data: Path, scripted: Callable[[list[float]], None]
) -> None:
    scripted([0.9, 0.2, 0.1])
    settings = config(
        eval_data=[data / "eval.jsonl"], eval_steps=1, eval_before=False, keep_best=False, save_steps=None
    )
    path = RunDirectory(run_training(settings))
    after = path.evaluation("after")
    assert after is not None and after["step"] == 3
    assert path.best() is None and not list(path.checkpoints_dir.glob("checkpoint-*"))


def test_early_stopping_and_no_training_beyond_it(
    config: MakeConfig, data: Path, scripted: Callable[[list[float]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(
        eval_data=[data / "eval.jsonl"], eval_steps=1, eval_before=False, early_stopping_patience=2, save_steps=1,
        num_train_epochs=3,
    )  # fmt: skip
    save_result = run.save_result

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "save_result", stop)
    scripted([0.5, 0.2, 0.4, 0.9])
    with pytest.raises(KeyboardInterrupt):
        run_training(settings)
    monkeypatch.setattr(run, "save_result", save_result)
    path = RunDirectory(run_training(settings))
    assert [line["step"] for line in path.steps()] == [1, 2, 3]
    after = path.evaluation("after")
    assert after is not None and after["step"] == 1


def test_scores_leave_no_trace_in_training(
    config: MakeConfig, data: Path, tmp_path: Path, scripted: Callable[[list[float]], None]
) -> None:
    lora = {"method": "lora", "lora_rank": 2, "lora_dropout": 0.3}
    plain = run_training(config(**lora))
    scripted([0.3, 0.2, 0.1, 0.4])
    scored = run_training(config(tmp_path / "scored", **lora, eval_data=[data / "eval.jsonl"], eval_steps=1))
    assert [line for line in logged(scored) if "loss" in line] == logged(plain)
    assert all(torch.equal(tensor, final_weights(scored)[name]) for name, tensor in final_weights(plain).items())


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(config: MakeConfig) -> None:
    settings = config(learning_rate=1e30, warmup_steps=0, max_grad_norm=0, save_steps=1)
    with pytest.raises(Phi3VError) as caught:
        run_training(settings)
    message = str(caught.value)
    assert message.startswith("step 2: the loss is") and "Learning rate: 6.66667e+29" in message
    assert "sample-" in message and "checkpoints/checkpoint-1" in message
    assert [line["step"] for line in RunDirectory(settings.output_dir).steps()] == [1]
    assert not (settings.output_dir / "model").exists()


def test_a_short_run_reaches_its_learning_rate(config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    short = config(warmup_steps=None, learning_rate=1e-3)
    assert [warmup_steps(short, steps) for steps in (3, 120, 10_000)] == [0, 12, 50]
    path = RunDirectory(run_training(short))
    assert path.steps()[0]["learning_rate"] == 1e-3
    with caplog.at_level(logging.WARNING):
        assert warmup_steps(config(warmup_steps=50, learning_rate=1e-3), 3) == 50
    assert "warmup_steps is 50, and the run has 3 steps: the learning rate rises to 4e-05" in caplog.text


def test_an_output_dir_that_cannot_be_made_is_named(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir .*file/run cannot be written to: Not a directory"):
        run_training(config(tmp_path / "file" / "run"))


def test_frozen_vision(config: MakeConfig, tiny_dir: Path) -> None:
    path = run_training(config(method="frozen_vision"))
    before, after = load_file(tiny_dir / "model.safetensors"), final_weights(path)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if "vision_embed_tokens" not in name}


def test_bf16_trains_float32_weights(config: MakeConfig) -> None:
    path = run_training(config(precision="bf16", max_steps=2))
    assert {tensor.dtype for tensor in final_weights(path).values()} == {torch.float32}
    plain = run_training(config(path.parent / "plain", max_steps=2))
    losses = [RunDirectory(one).steps()[0]["loss"] for one in (path, plain)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_bad_data_is_told_before_the_model_is_loaded(
    config: MakeConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "build_model", lambda *args: pytest.fail("the model was loaded"))
    broken = tmp_path / "broken.jsonl"
    line = {"id": "x", "conversations": [{"images": ["none.png"], "user": "a", "assistant": "b"}]}
    broken.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"broken.jsonl:1.*none.png"):
        run_training(config(train_data=[broken]))


def test_left_out_samples_stay_out_when_the_run_goes_on(
    config: MakeConfig, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = tmp_path / "mixed.jsonl"
    lines = (data / "train.jsonl").read_text().splitlines()
    mixed.write_text("\n".join([lines[0], "{broken", *lines[1:5]]) + "\n")
    settings = config(train_data=[mixed], image_dir=data / "images", on_bad_sample="skip", save_steps=1)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "save_result", stop)
    with pytest.raises(KeyboardInterrupt):
        run_training(settings)
    monkeypatch.undo()
    monkeypatch.setattr(train_data, "check_dataset", lambda *args, **kwargs: pytest.fail("the data was read again"))
    path = RunDirectory(run_training(settings))
    summary = path.data()
    assert (
        summary is not None and summary["train"]["samples"] == 5 and summary["train"]["skipped"] == {"broken JSON": 1}
    )


def test_a_reporter_that_is_not_installed_is_told_at_once(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb, which is not installed"):
        run_training(config(report_to=["wandb"]))


def test_training_starts_from_whole_models(config: MakeConfig, tmp_path: Path) -> None:
    adapter = run_training(config(method="lora", lora_rank=2, max_steps=1)) / "model"
    with pytest.raises(ConfigError, match="an adapter"):
        run_training(replace(config(tmp_path / "next"), model=str(adapter)))


def test_a_second_process_in_the_same_directory_is_refused(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import train_in_child

    settings = config()
    codes: Iterator[int] = iter([])

    def start_another(*args: Any, **kwargs: Any) -> None:
        nonlocal codes
        codes = iter([train_in_child(settings)])
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "check_data", start_another)
    with pytest.raises(KeyboardInterrupt):
        run_training(settings)
    assert next(codes) == 1


def test_the_result_has_the_number_format_of_its_base_and_is_scored_so(
    config: MakeConfig, data: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints stay float32; the result is their rounding, and a run cut off before its score takes it later."""
    base = tmp_path / "base"
    save_model(load_model(tiny_dir, dtype="bfloat16"), load_processor(tiny_dir), base)
    settings = replace(config(), model=str(base), eval_data=[data / "eval.jsonl"], eval_max_new_tokens=1, save_steps=3)
    scored: list[torch.dtype] = []

    def score(self: evaluation.Scorer, model: Any, step: int, when: str, **options: bool) -> float:
        scored.append(model.dtype)
        if when == "after" and len(scored) == 2:
            raise OSError("cut off")
        return 0.0

    monkeypatch.setattr(evaluation.Scorer, "score", score)
    with pytest.raises(OSError, match="cut off"):
        run_training(settings)
    run_training(settings)
    assert scored == [torch.float32, torch.bfloat16, torch.bfloat16]

    result = final_weights(settings.output_dir)
    kept = load_file(settings.output_dir / "checkpoints" / "checkpoint-3" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert result.keys() == kept.keys()
    assert all(torch.equal(result[name], tensor.to(torch.bfloat16)) for name, tensor in kept.items())
    assert json.loads((settings.output_dir / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_data_without_classes_are_refused_before_the_model_is_loaded(tmp_path: Path, tiny_dir: Path) -> None:
    data = write_training_data(tmp_path / "data")
    config = make_config(tiny_dir, data, tmp_path / "run", sampling="class_balanced")
    with pytest.raises(ConfigError, match="no closed set of classes"):
        run_training(config)
    assert not (tmp_path / "run" / "config.yaml").exists()
