"""The command line: answers at once, hands each verb what was typed, and reports mistakes in one line."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import phi3v
from phi3v.cli import main
from phi3v.config import EvalConfig, TrainConfig
from phi3v.errors import CapacityError, CheckpointError, ConfigError, DataError

VERBS = ("train", "eval", "generate", "merge", "export", "report", "demo")
SCRIPT = Path(sys.executable).with_name("phi3v")
RECIPES = Path(__file__).parents[2] / "recipes"
HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "PIL")


@pytest.fixture
def replace_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a module of the given functions where a verb imports from."""

    def replace(name: str, **functions: object) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return replace


def recorder(result: object = None) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], Any]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **options: Any) -> object:
        calls.append((args, options))
        return result

    return calls, record


EVERY_HELP_PAGE = f"""
import sys
sys.argv[0] = "phi3v"
from phi3v.cli import main
for arguments in (["--version"], ["train"], *([verb, "--help"] for verb in {VERBS})):
    try:
        main(arguments)
    except SystemExit:
        pass
"""


@pytest.mark.parametrize(
    "command",
    [
        [str(SCRIPT), "--help"],
        [sys.executable, "-m", "phi3v", "--help"],
        [sys.executable, "-c", EVERY_HELP_PAGE],
        [sys.executable, str(RECIPES / "finetune_hf_trainer_docvqa.py"), "--help"],
        [sys.executable, str(RECIPES / "convert_ucf101.py"), "--help"],
    ],
    ids=["phi3v", "python -m phi3v", "every verb", "recipe", "conversion"],
)
def test_help_answers_at_once_and_imports_nothing_heavy(command: list[str]) -> None:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    seconds = time.perf_counter() - started
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "phi3v.arguments" in imported and "usage" in done.stdout
    assert imported.isdisjoint(HEAVY if "convert" not in command[1] else HEAVY[:4])
    assert seconds < 2  # 0.1 on an idle machine; importing torch takes longer


@pytest.mark.parametrize(
    ("program", "command", "is_own"),
    [
        ("/usr/bin/phi3v", "phi3v train", True),
        ("/somewhere/phi3v/__main__.py", "python -m phi3v", True),
        ("-m", "python -m phi3v", True),
        ("-m", "python -u -m phi3v train", True),  # as torchrun starts it
        (str(RECIPES / "finetune_hf_trainer_nlvr2.py"), "python x.py", True),
        ("/mine/recipes/finetune_hf_trainer_nlvr2.py", "python x.py", False),
        (str(RECIPES / "-c"), "python -c pass", False),
        ("train.py", "python train.py -m phi3v", False),
        ("", "python", False),
    ],
)
def test_only_our_own_programs_leave_the_registration_for_later(
    monkeypatch: pytest.MonkeyPatch, program: str, command: str, is_own: bool
) -> None:
    """``import phi3v`` in anyone else's program makes the Auto classes know the model."""
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", command.split())
    assert phi3v._is_own_program() == is_own


def test_module_and_script_are_the_same_command() -> None:
    for arguments, code in ((["--version"], 0), (["train"], 2)):
        script = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
        module = subprocess.run([sys.executable, "-m", "phi3v", *arguments], capture_output=True, text=True)
        assert (script.returncode, script.stdout, script.stderr) == (module.returncode, module.stdout, module.stderr)
        assert script.returncode == code


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_help_names_every_field(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "recipe.yaml", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name in vars({"train": TrainConfig, "eval": EvalConfig}[verb])["__dataclass_fields__"]:
        assert f"--{name}" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["--verb"],
        ["train"],
        ["train", "missing.yaml"],
        ["train", "--learning-rat", "1"],
        ["eval", "--model", "m", "--data", "d", "--output_dir", "o", "--metric", "bleu"],
        ["eval", "--model", "m", "recipe.yaml"],
        ["generate", "--model", "m"],
        ["generate", "--model", "m", "--prompt", "p", "--num_crops", "0"],
        ["generate", "--model", "m", "--prompt", "p", "--max_new", "1"],
        ["merge", "adapter"],
        ["merge", "adapter", "out", "--dtype", "int8"],
        ["export", "run"],
        ["export", "run", "out", "--rope_mode", "longer"],
        ["export", "run", "out", "--private"],
        ["report"],
        ["demo", "somewhere"],
    ],
)
def test_a_usage_mistake_gives_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("batch_size is 3"), 2, "error: batch_size is 3\n"),
        (DataError("train.jsonl:3: no"), 1, "error: train.jsonl:3: no\n"),
        (CheckpointError("no model"), 1, "error: no model\n"),
        (CapacityError("too long"), 1, "error: too long\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_of_a_run_become_a_line_and_an_exit_code(
    error: BaseException, code: int, message: str, replace_module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    replace_module("phi3v.report", write_report=fail)
    assert main(["report", "run"]) == code
    assert capsys.readouterr().err == message


def test_an_unforeseen_error_keeps_its_traceback(replace_module: Any) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    replace_module("phi3v.report", write_report=fail)
    with pytest.raises(ZeroDivisionError):
        main(["report", "run"])


def test_train_reads_file_and_options(tmp_path: Path, replace_module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls, run_training = recorder(Path("runs/a"))
    replace_module("phi3v.train.run", run_training=run_training)
    (tmp_path / "recipe.yaml").write_text("model: m\noutput_dir: runs/a\ntrain_data: t.jsonl\nlearning_rate: 1e-4\n")
    assert main(["train", str(tmp_path / "recipe.yaml"), "--batch-size", "8", "--checkpointing=off"]) == 0
    assert main(["train", "--model=m", "--output_dir=runs/a", "--train_data=t.jsonl"]) == 0
    needed = {"model": "m", "output_dir": Path("runs/a"), "train_data": [Path("t.jsonl")]}
    assert calls == [
        ((TrainConfig(**needed, learning_rate=1e-4, batch_size=8, checkpointing="off"),), {}),
        ((TrainConfig(**needed),), {}),
    ]
    assert capsys.readouterr().out == "run directory: runs/a\n" * 2


def test_eval_prints_its_score_on_one_line(replace_module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    score = SimpleNamespace(metric="anls", score=0.83654, low=0.8, high=0.87, confidence=0.95, n=500)
    calls, run_evaluation = recorder(SimpleNamespace(score=score, seconds=12.34))
    replace_module("phi3v.eval.run", run_evaluation=run_evaluation)
    assert main(["eval", "--model", "m", "--data", "a", "b", "--output-dir", "out", "--metric", "anls"]) == 0
    expected = EvalConfig(model="m", data=[Path("a"), Path("b")], output_dir=Path("out"), metric="anls")
    assert calls == [((expected,), {})]
    assert capsys.readouterr().out == (
        "anls 0.8365 (95% interval 0.8000 to 0.8700, 500 questions, 12.3 s); results in out\n"
    )


def test_generate_shows_the_images_in_order(
    tmp_path: Path, replace_module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, width in (("a.png", 3), ("b.png", 5)):
        Image.new("RGB", (width, 2)).save(tmp_path / name)
    loads, load_model = recorder("the model")
    processors, load_processor = recorder("the processor")
    calls, generate_once = recorder("a cat")
    replace_module("phi3v.model.checkpoint", load_model=load_model, load_processor=load_processor)
    replace_module("phi3v.eval.generate", generate_once=generate_once)
    images = [f"--image={tmp_path / 'b.png'}", "--image", str(tmp_path / "a.png")]
    options = ["--num-crops", "16", "--precision=fp32", "--device=cpu", "--rope_mode", "long"]
    assert main(["generate", "--model", "m", *images, "--prompt", "What - is = it?", *options]) == 0
    assert loads == [(("m",), {"dtype": "float32", "rope_mode": "long", "device": "cpu"})]
    assert processors == [(("m",), {"num_crops": 16})]
    (model, processor, prompt, shown), rest = calls[0]
    assert (model, processor, prompt) == ("the model", "the processor", "What - is = it?")
    assert [image.width for image in shown] == [5, 3]
    assert rest == {"system": None, "max_new_tokens": 64, "num_crops": 16}
    assert capsys.readouterr().out == "a cat\n"


def test_generate_names_an_image_that_it_cannot_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.png"
    for content in (None, b"not an image"):
        if content is not None:
            path.write_bytes(content)
        assert main(["generate", "--model", "m", "--prompt", "p", "--image", str(path)]) == 1
        assert capsys.readouterr().err.startswith(f"error: --image {path}: ")


def test_merge_hands_over_what_to_compare(replace_module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls, merge_and_verify = recorder("as close as it gets")
    replace_module("phi3v.export.merge", merge_and_verify=merge_and_verify)
    assert main(["merge", "adapter", "out"]) == 0
    options = ["--base", "b", "--data", "v.jsonl", "--data=w.jsonl", "--image-dir", "i", "--samples", "2"]
    assert main(["merge", *options, "--dtype=float16", "adapter", "out"]) == 0
    where = (Path("adapter"), Path("out"))
    defaults = {"base": None, "data": [], "image_dir": None, "num_samples": 4, "dtype": "auto"}
    given = {"base": "b", "data": [Path("v.jsonl"), Path("w.jsonl")], "image_dir": Path("i"), "num_samples": 2}
    assert calls == [(where, defaults), (where, given | {"dtype": "float16"})]
    assert capsys.readouterr().out == "merged into out: as close as it gets\n" * 2


def test_export_hands_over_what_to_write_and_where(replace_module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    calls, export_model = recorder()
    replace_module("phi3v.export.run", export_model=export_model)
    assert main(["export", "run", "out"]) == 0
    options = ["--base", "b", "--data=v.jsonl", "--image-dir", "i", "--samples", "2", "--dtype", "bfloat16"]
    options += ["--num-crops", "16", "--rope-mode=short", "--auto-map", "--push-to-hub", "me/it", "--private"]
    assert main(["export", *options, "run", "out"]) == 0
    defaults = {"base": None, "data": [], "image_dir": None, "num_samples": 4, "dtype": "auto"}
    defaults |= {"num_crops": None, "rope_mode": None, "use_auto_map": False, "push_to_hub": None, "is_private": False}
    given = {"base": "b", "data": [Path("v.jsonl")], "image_dir": Path("i"), "num_samples": 2, "dtype": "bfloat16"}
    given |= {"num_crops": 16, "rope_mode": "short", "use_auto_map": True, "push_to_hub": "me/it", "is_private": True}
    assert all(callable(options.pop("say")) for _, options in calls)
    assert calls == [((Path("run"), Path("out")), defaults), ((Path("run"), Path("out")), given)]
    assert capsys.readouterr().out == "out\n" * 2


def test_report_and_demo_take_their_folder(replace_module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reports, write_report = recorder(Path("run/report.html"))
    demos, run_demo = recorder()
    replace_module("phi3v.report", write_report=write_report)
    replace_module("phi3v.demo", run_demo=run_demo)
    assert [main(["report", "run"]), main(["demo"]), main(["demo", "--output-dir", "d"])] == [0, 0, 0]
    assert reports == [((Path("run"),), {})]
    assert demos == [((Path("demo-run"),), {}), ((Path("d"),), {})]
    assert capsys.readouterr().out == "run/report.html\n"
