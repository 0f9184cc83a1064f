"""The report: needs nothing but itself, escapes everything, and says in words what a run did not leave."""

import base64
import io
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.errors import DataError
from phi3v.eval.classes import ClosedQuestion, closed_report
from phi3v.report import charts, write_report
from phi3v.report.classes import MOST_CLASSES
from phi3v.report.examples import MOST_SAMPLES
from phi3v.runlog import RunDirectory, environment

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></svg></pre><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "\u202e\ud800\x00\x1b",
]


class Page(HTMLParser):
    """What a browser would take from the page: tags with attributes, and text by enclosing tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"].partition(",")[2] for attributes in self.all("img")]
        return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]


def assert_self_contained(page: Page) -> None:
    """No script, no handler, and no address but data and anchors of the page itself."""
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "video", "audio", "source"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "action", "poster", "data", "background"):
                assert value.startswith(("data:", "#")), (tag, name, value)
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert not re.search(r"url\(|@import|//", style)
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", page.source)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def prediction(index: int, score: float, **more: Any) -> dict[str, Any]:
    return {
        "id": f"sample-{index}",
        "turn": 0,
        "question": f"Question {index}?",
        "images": [],
        "answers": [f"gold-{index}"],
        "prediction": f"said-{index}",
        "score": score,
        **more,
    }


def evaluation(step: int, when: str, score: float) -> dict[str, Any]:
    interval = {"low": score - 0.05, "high": score + 0.05, "confidence": 0.95}
    return {"step": step, "when": when, "metric": "anls", "score": score, **interval, "n": 1234, "seconds": 75.0}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (1200, 800), "red").save(folder / "page.jpg", comment=b"secret comment", exif=b"Exif\0\0secret")
    Image.new("L", (8, 8), 128).save(folder / "digit.png")
    return folder


@pytest.fixture
def run(tmp_path: Path, images: Path) -> RunDirectory:
    """A finished run with everything a run leaves."""
    run = RunDirectory(tmp_path / "my run")
    run.create(
        f"model: microsoft/Phi-3.5-vision-instruct\nmethod: lora\nlearning_rate: 0.0002\nimage_dir: {images}\n",
        environment([{"name": "NVIDIA H200", "memory_bytes": 2**37}]),
    )
    run.write_data(
        {
            "train": {
                "samples": 90,
                "skipped": {"missing image": 7},
                "dropped": 2,
                "cut": 1,
                "problems": ["a.jsonl:3: no"],
            }
        }
    )
    run.write_audit(
        {
            "parameters": 4_000_000_000,
            "trainable": 30_000_000,
            "parts": [
                {
                    "part": "decoder",
                    "parameters": 3_600_000_000,
                    "trainable": 30_000_000,
                    "linear_layers": 128,
                    "lora_layers": 128,
                    "gradient_norm": 0.25,
                },
                {"part": "head", "parameters": 5, "trainable": 5, "gradient_norm": 0.0},
            ],
        }
    )
    for step in range(1, 61):
        run.append_step(
            {
                "step": step,
                "epoch": step / 30,
                "loss": 2 / step if step != 7 else float("nan"),
                "learning_rate": 2e-4 * (1 - step / 60),
                "grad_norm": 1.5,
                "samples_per_s": 12.0,
                "tokens_per_s": 30_000.0,
                "memory_bytes": 60 * 2**30,
                "elapsed_s": 60.0 * step,
            }
        )
    for step, when, score in ((0, "before", 0.211), (30, "during", 0.6), (60, "after", 0.836)):
        run.append_eval(evaluation(step, when, score))
    # One question of each kind: became right, became wrong, still wrong, stayed right.
    befores, afters = (0.0, 1.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.75)
    names = [["page.jpg"], ["digit.png"], [str(images / "page.jpg"), "digit.png"], []]
    run.write_predictions(0, [prediction(k, befores[k], images=names[k], prediction=f"early-{k}") for k in range(4)])
    run.write_predictions(60, [prediction(k, afters[k], images=names[k], prediction=f"late-{k}") for k in range(4)])
    for name in ("checkpoint-30", "checkpoint-60"):
        (run.checkpoints_dir / name).mkdir(parents=True)
    (run.checkpoints_dir / "checkpoint-60" / "manifest.json").write_text("{}")
    run.write_best({"step": 60, "score": 0.8})
    run.model_dir.mkdir()
    (run.model_dir / "adapter_config.json").write_text("{}")
    return run


def test_a_finished_run_is_told_whole(run: RunDirectory) -> None:
    path = write_report(run.path)
    assert path == run.path / "report.html"
    page = Page(path)
    assert_self_contained(page)
    text = page.text
    assert page.all("html") == [{"lang": "en"}]
    assert "LoRA fine-tuning of microsoft/Phi-3.5-vision-instruct" in text
    # Scores with their intervals, and the difference.
    assert "Before training 21.1 % ANLS, 1,234 questions between 16.1 and 26.1" in text
    assert "After training 83.6 % ANLS, 1,234 questions between 78.6 and 88.6" in text
    assert "Difference +62.5 percentage points" in text
    assert "95 % bootstrap interval" in text
    assert "has not finished" not in text
    # What must not be overlooked.
    assert "1 of 60 logged steps have a loss that is not finite" in text
    assert "No gradient reached these trainable parts: head." in text
    assert "in train: 7 skipped (missing image), 2 dropped, 1 cut." in text
    # The run in numbers, and all curves.
    for words in ("30\u00a0M, 0.75 % of the model's 4\u00a0B", "60 (epoch 2)", "1 h 0 min", "60\u00a0GiB", "30,000"):
        assert " ".join(words.split()) in text, words
    for title in (
        "Loss nats per answer token",
        "Evaluation: ANLS %",
        "Learning rate \N{MULTIPLICATION SIGN}10⁻⁴",
        "Gradient norm L2",
        "Throughput samples/s",
        "Memory GiB",
        "optimizer step",
    ):
        assert title in text, title
    # The audit, the configuration, the machine, the checkpoints.
    assert "decoder 3.6 B 0.833 % 128/128 0.25" in text
    assert "learning_rate: 0.0002" in text
    assert "NVIDIA H200" in text
    assert "checkpoint-30 incomplete" in text
    assert "checkpoint-60 (best score) complete" in text
    assert "a.jsonl:3: no" in text


@pytest.mark.parametrize("method", ["full", "frozen_vision", "lora", "qlora"])
def test_every_method_is_told_in_words(method: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create(f"model: x\nmethod: {method}\n", {})
    assert re.search("fine-tuning( with frozen vision)? of x", Page(write_report(run.path)).text)


def test_recorded_sizes_and_times_are_told_in_units(run: RunDirectory) -> None:
    run.write_data({"train": {"samples": 90, "images_bytes": 3 * 2**20, "check_s": 75}})
    text = Page(write_report(run.path)).text.replace("\u00a0", " ")
    assert "images 3 MiB" in text
    assert "check 1 min 15 s" in text
    assert "_bytes" not in text and "3,145,728" not in text


def test_a_question_shows_both_of_its_answers_in_its_group(run: RunDirectory) -> None:
    text = Page(write_report(run.path)).text
    assert "Became right 1 question Question 0? Expected gold-0 Before ✗ Wrong: early-0 After ✓ Right: late-0" in text
    assert "Became wrong 1 question Question 1? Expected gold-1 Before ✓ Right: early-1 After ✗ Wrong: late-1" in text
    assert "Still wrong 1 question Question 2? Expected gold-2 Before ✗ Wrong: early-2 After ✗ Wrong: late-2" in text
    assert "After ✓ Right: late-3 scored 0.75" in text


def test_images_are_embedded_small_and_clean(run: RunDirectory) -> None:
    page = Page(write_report(run.path))
    shown = page.all("img")
    assert [image["alt"] for image in shown] == ["page.jpg", "digit.png", "page.jpg", "digit.png"]
    assert [image.size for image in page.images()] == [(320, 213), (8, 8), (160, 107), (8, 8)]
    # Eight pixels are shown on twenty times as many, each a sharp square.
    assert (shown[1]["class"], shown[1]["width"], shown[1]["height"]) == ("pixelated", "160", "160")
    assert re.search(r"\.pixelated \{ image-rendering: pixelated; \}", page.source)
    assert "class" not in shown[0]
    assert not any(image.info.get("exif") or image.info.get("comment") for image in page.images())


def test_answers_that_all_score_alike_have_no_interval(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    for step, when in ((0, "before"), (9, "after")):
        run.append_eval({**evaluation(step, when, 1.0), "low": 1.0, "high": 1.0})
    text = Page(write_report(run.path)).text
    assert text.count("100.0 % ANLS, 1,234 questions all alike, so no interval") == 2
    assert "Difference 0.0 percentage points" in text
    assert "bootstrap" not in text


def closed_evaluation(labels: tuple[str, ...], num_questions: int, **more: Any) -> dict[str, Any]:
    """An evaluation with a report by class, made as evaluation makes it: every third answer is another label."""
    questions = [
        ClosedQuestion(
            labels,
            expected=labels[k % len(labels)],
            predicted=None if k == 0 else labels[(k + (k % 3 == 0)) % len(labels)],
            probabilities=(0.75, *[0.25 / (len(labels) - 1)] * (len(labels) - 1)),
        )
        for k in range(num_questions)
    ]
    report = closed_report(questions, seed=0)
    assert report is not None
    return {**evaluation(60, "after", 0.8), "classes": report.to_dict(), **more}


def test_scores_by_class_are_told_with_their_confusion(run: RunDirectory) -> None:
    run.append_eval(closed_evaluation(("Yes", "No"), 12))
    page = Page(write_report(run.path))
    assert_self_contained(page)
    text = page.text
    assert {"href": "#classes"} in page.all("a")
    assert "2 labels, 12 questions, 1 answered outside the labels" in text
    # Right: 2 of 6 Yes are another's, one is none; 2 of 6 No are Yes. Precision 4/6 and 4/5.
    assert re.search(r"Yes 6 6 66\.7 % \d+\.\d to \d+\.\d 66\.7 %", text)
    assert re.search(r"No 6 5 80\.0 %", text)
    assert "right Yes No other Yes 4 1 1 No 2 4 0" in text
    assert "AUROC of “Yes” 50.0 % 50.0 to 50.0" in text
    assert re.search(r"expected calibration error 25\.0 % \d", text)
    assert "mean probability of the likeliest label 75.0 %" in text


def test_many_labels_are_listed_by_their_questions_without_a_matrix(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    labels = tuple(f"label-{k}" for k in range(MOST_CLASSES + 3))
    line = closed_evaluation(labels, 2 * len(labels) - 3)
    group = line["classes"]["groups"][0]
    group["classes"] = group["classes"][::-1]
    run.append_eval(line)
    text = Page(write_report(run.path)).text
    assert "Scores by label; 3 with fewer questions are not listed" in text
    assert "label-39 2" in text and "label-40" not in text
    assert "AUROC" not in text and "Confusion:" not in text


def test_a_matrix_that_does_not_fit_its_labels_is_not_drawn(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    line = closed_evaluation(("Yes", "No"), 12)
    line["classes"]["groups"][0]["confusion"][1].append(7)
    run.append_eval(line)
    text = Page(write_report(run.path)).text
    assert "Scores by label" in text and "Confusion:" not in text


def test_open_questions_have_no_scores_by_class(run: RunDirectory) -> None:
    page = Page(write_report(run.path))
    assert {"href": "#classes"} not in page.all("a") and "Confusion" not in page.text


def test_the_same_run_gives_the_same_page(run: RunDirectory) -> None:
    first = write_report(run.path).read_bytes()
    assert write_report(run.path).read_bytes() == first


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_run_can_neither_run_nor_load_anything(tmp_path: Path, text: str) -> None:
    folder_name = "run " + re.sub(r"[/\x00\ud800]", "", text)
    run = RunDirectory(tmp_path / folder_name)
    harmless = text.replace("\ud800", "").replace("\x00", "").replace("\x1b", "")
    run.create(f"method: {harmless!r}\n{'model'}: {harmless!r}\n# {harmless}\n", {"cpu": text, text: {text: text}})
    run.write_data({text: {"samples": 1, "skipped": {text: 3}, text: text, "problems": [text]}})
    run.write_audit({"parts": [{"part": text, "parameters": 1, "trainable": 1, "gradient_norm": 0.0}], text: text})
    run.append_step({"step": 1, "loss": 1.0})
    run.append_spike(
        {"step": 1, "loss": text, "loss_limit": text, "learning_rate": text, "worst_samples": [text, text]}
    )
    run.append_eval({"step": 0, "when": "before", "metric": text, "score": 0.5, "n": text})
    row = {"label": text, "support": text, "precision": {"value": text}}
    group = {"labels": [text, text], "n": text, "auroc": {"value": 0.5}, "classes": [row], "confusion": [[1, 2, 3]] * 2}
    run.append_eval({"step": 1, "when": "after", "metric": text, "score": 0.6, "classes": {"groups": [group]}})
    row = prediction(0, 0.0, id=text, turn=text, question=text, answers=[text, text], prediction=text)
    run.write_predictions(0, [{**row, "images": [text, f"{text}.png", f"/{text}"], "image_dir": text}])
    run.write_predictions(1, [{**row, "images": [text], "score": 1.0}])
    (run.checkpoints_dir / f"checkpoint-{re.sub(r'[/]', '', harmless)}").mkdir(parents=True)

    page = Page(write_report(run.path))
    assert_self_contained(page)
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes or "onmouseover" in attributes]
    assert page.all("img") == []
    visible = " ".join(harmless.split())
    assert page.text.count(visible) >= 8
    assert page.text.endswith("This page loads nothing and runs no script.")


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "x onerror=alert(1) ", "\"' onerror='alert(1)", "{{ 7 }}"]
)
def test_an_images_name_stays_text(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    run = RunDirectory(tmp_path).create(f"image_dir: {tmp_path}\n", {})
    run.write_predictions(0, [prediction(0, 1.0, images=[f"{name}.png"])])
    page = Page(write_report(run.path))
    assert_self_contained(page)
    assert [image["alt"] for image in page.all("img")] == [f"{name}.png"]


@pytest.mark.parametrize(
    "name", ["http://example.org/x.png", "file:///etc/passwd", "//host/share/x.png", "\\\\host\\share\\x.png"]
)
def test_images_from_elsewhere_are_never_followed(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    run.write_predictions(0, [prediction(0, 1.0, images=[name])])
    page = Page(write_report(run.path))
    assert_self_contained(page)
    assert "not shown, its path is not one of this machine" in page.text


def test_a_relative_path_does_not_leave_the_image_folder(tmp_path: Path, images: Path) -> None:
    run = RunDirectory(tmp_path / "run").create(f"image_dir: {images / 'inner'}\n", {})
    (images / "inner" / "a").mkdir(parents=True)
    (images / "inner" / "link.jpg").symlink_to(images / "page.jpg")
    names = ["../page.jpg", "a/../../page.jpg", str(images / "page.jpg"), "link.jpg"]
    # A prediction cannot name another folder either.
    run.write_predictions(0, [{**prediction(0, 1.0, images=names), "image_dir": str(images)}])
    page = Page(write_report(run.path))
    assert page.all("img") == []
    assert page.text.count("not shown, the file is outside the run's image folders") == len(names)
    # The folders that the run recorded count too, wherever the report is made.
    run.write_data({"eval": {"samples": 1, "image_dirs": [str(images)]}})
    assert len(Page(write_report(run.path)).all("img")) == len(names)


def test_images_are_found_beside_the_data_when_no_folder_is_set(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "images" / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "b.png")
    run = RunDirectory(tmp_path / "run").create(f"eval_data: [{tmp_path / 'data' / 'eval.jsonl'}]\n", {})
    run.write_predictions(0, [prediction(0, 1.0, images=["a.png", "b.png"])])
    assert len(Page(write_report(run.path)).all("img")) == 2


def test_images_that_cannot_be_shown_are_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    # 20,000 x 20,000 px in a few kilobytes.
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    names = ["broken.png", "text.png", "program.eps", "bomb.png", "gone.png", ".", "/dev/zero"]
    run = RunDirectory(tmp_path / "run").create(f"image_dir: {tmp_path}\n", {})
    run.write_predictions(0, [prediction(0, 1.0, images=names)])
    page = Page(write_report(run.path))
    assert page.all("img") == []
    assert page.text.count("not shown, ") == len(names)
    assert "7 of the images below could not be shown" in page.text


def test_the_selection_is_capped_mixed_and_spread(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    run.write_predictions(5, [prediction(k, float(k % 10 == 0)) for k in range(1000)])
    page = Page(write_report(run.path))
    right, wrong = page.text.split("Wrong 900 questions")[1].split("Right 100 questions")[::-1]
    shown = [[int(number) for number in re.findall(r"Question (\d+)\?", part)] for part in (right, wrong)]
    assert [len(numbers) for numbers in shown] == [MOST_SAMPLES // 2] * 2
    assert all(number % 10 == 0 for number in shown[0])
    assert all(number % 10 for number in shown[1])
    for numbers in shown:
        edges = [0, *numbers, 999]
        assert max(after - before for before, after in itertools.pairwise(edges)) <= 100


def test_the_cap_holds_whatever_the_groups_sizes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    run.write_predictions(0, [prediction(k, float(k <= 100)) for k in range(201)])
    run.write_predictions(9, [prediction(k, float(1 <= k <= 100)) for k in range(201)])
    text = Page(write_report(run.path)).text
    assert "Became wrong 1 question Question" in text
    assert len(re.findall(r"Question \d+\?", text)) == MOST_SAMPLES


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    run.write_predictions(0, [prediction(0, 1.0, question="q" * 1500)])
    text = Page(write_report(run.path)).text
    assert "q" * 500 + "\u2026 (1,000 more characters)" in text
    assert "q" * 501 not in text


def test_many_images_are_capped_and_counted(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path).create(f"image_dir: {tmp_path}\n", {})
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    run.write_predictions(0, [prediction(0, 1.0, images=["a.png"] * 20)])
    page = Page(write_report(run.path))
    assert len(page.all("img")) == 8
    assert "and 12 more images" in page.text


def test_the_result_of_a_run_may_be_an_earlier_step_than_its_last(run: RunDirectory) -> None:
    run.append_eval(evaluation(60, "during", 0.5))
    run.append_eval(evaluation(30, "after", 0.9))
    run.write_predictions(30, [prediction(0, 1.0, prediction="best-0")])
    text = Page(write_report(run.path)).text
    assert "The result is the model of step 30; training went on to 60." in text
    assert "The model's answers at step 30, beside those from before training." in text
    assert "After ✓ Right: best-0" in text


def test_a_run_killed_at_once_is_told_in_plain_sentences(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run").create("model: x\n", {})
    page = Page(write_report(run.path))
    assert_self_contained(page)
    for sentence in (
        "This run holds no evaluation, so there is no score to show.",
        "This run has not finished",
        "This run has logged no steps, so there are no curves.",
        "This run has saved no predictions.",
        "This run holds no audit of what was trainable.",
        "This run holds no data summary.",
        "This run holds no record of its environment.",
        "No checkpoints are left in this run's folder.",
    ):
        assert sentence in page.text, sentence


def test_a_run_killed_midway_shows_how_far_it_got(run: RunDirectory) -> None:
    run.truncate_after(40)
    (run.model_dir / "adapter_config.json").unlink()
    with run.steps_path.open("ab") as file:
        file.write(b'{"step": 41, "lo')
    text = Page(write_report(run.path)).text
    assert "its log ends at step 40" in text
    assert "At step 30, the last score so far 60.0 %" in text
    assert "The model's answers at step 0." in text
    assert "Wrong 2 questions" in text
    assert "Before ✗ Wrong: early-0" in text


@pytest.mark.parametrize("left", range(7))
def test_any_piece_may_be_missing_or_broken(run: RunDirectory, left: int) -> None:
    pieces = [
        run.config_path,
        run.environment_path,
        run.data_path,
        run.audit_path,
        run.steps_path,
        run.evals_path,
        run.predictions_path(60),
    ]
    name = pieces[left].name
    pieces[left].write_bytes(b'\x00\xff{"broken"\n{"step": 3}\n')
    page = Page(write_report(run.path))
    assert_self_contained(page)
    assert "could not be read and is left out" in page.text
    assert name in page.text
    pieces[left].unlink()
    page = Page(write_report(run.path))
    assert_self_contained(page)
    assert "could not be read" not in page.text


@pytest.mark.parametrize(
    "odd", [None, True, "text", [], {}, [[1]], {"a": {}}, -1, 1e300, 1e-300, 10**30, 10**400, float("inf"), [None], ""]
)
def test_odd_values_never_stop_the_report(tmp_path: Path, odd: Any) -> None:
    run = RunDirectory(tmp_path / "run").create("model: x\n", {"cpu": odd, "packages": odd, "gpus": odd})
    keys = ["epoch", "loss", "learning_rate", "grad_norm", "samples_per_s", "tokens_per_s", "memory_bytes", "elapsed_s"]
    for step in (1, 2):
        run.append_step({"step": step, **dict.fromkeys(keys, odd)})
    eval_keys = ["metric", "score", "low", "high", "confidence", "n", "seconds"]
    run.append_eval({"step": 0, "when": "before", **dict.fromkeys(eval_keys, odd)})
    run.append_eval({"step": 2, "when": "after", **dict.fromkeys(eval_keys, odd), "classes": odd})
    row_keys = ["id", "turn", "question", "images", "answers", "prediction", "score", "image_dir"]
    for step in (0, 2):
        run.write_predictions(step, [dict.fromkeys(row_keys, odd), {}])
    part = dict.fromkeys(["part", "parameters", "trainable", "linear_layers", "lora_layers", "gradient_norm"], odd)
    run.write_audit({"parts": [part, odd], "parameters": odd, "trainable": odd})
    run.write_data({"train": {"samples": odd, "skipped": odd, "dropped": odd, "problems": odd}, "eval": odd})
    run.write_best({"step": odd})
    with run.steps_path.open("ab") as file:
        file.write(b'{"loss": 1}\n{"step": "x"}\n{"step": -5}\n{"step": 1e999, "loss": 1}\n')
        file.write(b'{"step": 3, "loss": NaN, "grad_norm": Infinity, "elapsed_s": NaN}\n')
    run.config_path.write_text(f"method: {odd!r}\nimage_dir: {odd!r}\neval_data: {odd!r}\nmodel: x\n")
    assert_self_contained(Page(write_report(run.path)))


@pytest.mark.parametrize("odd", [None, True, "text", [], {}, [[1]], [{"a": {}}], -1, 10**400, float("inf"), [None]])
def test_odd_scores_by_class_never_stop_the_report(tmp_path: Path, odd: Any) -> None:
    run = RunDirectory(tmp_path / "run").create("model: x\n", {})
    row = dict.fromkeys(["label", "support", "predicted", "precision", "recall", "f1"], odd)
    keys = ["n", "other", "macro_f1", "balanced_accuracy", "auroc", "confusion"]
    for labels, confusion in ((odd, odd), (["a", "b"], [[odd] * 3, [1, 2, 3]]), (["a"], [odd]), ([odd], [[1, 2]])):
        group = {**dict.fromkeys(keys, odd), "labels": labels, "classes": [row, odd], "confusion": confusion}
        calibration = dict.fromkeys(["error", "brier", "accuracy", "confidence"], odd)
        for classes in (
            {"groups": odd, "label_sets": odd, "calibration": odd},
            {"groups": [group, odd], "label_sets": odd, "calibration": calibration},
        ):
            run.append_eval({**evaluation(1, "after", 0.5), "classes": classes})
            assert_self_contained(Page(write_report(run.path)))


@pytest.mark.parametrize("loss", ["null", "NaN", "Infinity", "1e300"])
def test_a_loss_that_is_not_finite_is_a_gap_and_is_counted(tmp_path: Path, loss: str) -> None:
    run = RunDirectory(tmp_path).create("model: x\n", {})
    lines = [f'{{"step": {step}, "loss": {loss if step == 2 else step}}}\n' for step in (1, 2, 3)]
    run.steps_path.write_text("".join(lines))
    page = Page(write_report(run.path))
    assert "1 of 3 logged steps have a loss that is not finite" in page.text
    assert "Loss: from 1 at step 1 to 3 at step 3; lowest 1, highest 3" in page.text


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def numbers_in(path: str) -> list[tuple[float, float]]:
    pairs = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)
    return [(float(x), float(y)) for x, y in pairs]


def test_a_curve_stands_where_its_axes_say() -> None:
    chart = charts.curve("Loss", "nats", [0, 50, 100], [2.0, 1.0, 0.0], from_zero=True)
    assert chart is not None
    assert [tick.label for tick in chart.y_ticks] == ["0.0", "0.5", "1.0", "1.5", "2.0"]
    assert [tick.label for tick in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    x_at = {tick.label: tick.position for tick in chart.x_ticks}
    y_at = {tick.label: tick.position for tick in chart.y_ticks}
    middle = (x_at["40"] + x_at["60"]) / 2
    assert numbers_in(chart.line) == [(x_at["0"], y_at["2.0"]), (middle, y_at["1.0"]), (x_at["100"], y_at["0.0"])]
    assert chart.description == "Loss: from 2 at step 0 to 0 at step 100; lowest 0, highest 2 nats."


def test_gaps_break_a_curve_and_a_lone_point_stays_visible() -> None:
    chart = charts.curve("Loss", "", [1, 2, 3, 4, 5], [1.0, 2.0, None, 3.0, None], from_zero=True)
    assert chart is not None
    assert re.sub(r"[\d. ]+", "", chart.line.replace("h0", "h")) == "MLMh"


@pytest.mark.parametrize(
    "values", [[None, None], [0.0, 0.0], [5.0, 5.0], [1.0, 1.0 + 1e-16], [-2.0, 3.0], [1e-29, 1e29], [None, 3.0]]
)
@pytest.mark.parametrize("from_zero", [True, False])
def test_every_value_lies_within_the_plot(values: list[float | None], from_zero: bool) -> None:
    chart = charts.curve("x", "", [1, 2], values, from_zero=from_zero, may_use_log=True)
    assert (chart is None) == (values == [None, None])
    if chart is not None:
        for x, y in numbers_in(chart.line):
            assert charts.LEFT <= x <= charts.RIGHT
            assert charts.TOP <= y <= charts.BOTTOM
        labels = [tick.label for tick in chart.y_ticks]
        assert len(set(labels)) == len(labels) >= 2


def test_a_long_run_is_drawn_with_few_points_and_no_spike_lost() -> None:
    values: list[float | None] = [1.0] * 50_000
    values[31_234] = 50.0
    chart = charts.curve("Loss", "", list(range(50_000)), values, from_zero=True, smooth=True)
    assert chart is not None
    assert len(chart.line) + len(chart.raw) < 20_000
    top = min(float(y) for y in re.findall(r"V([\d.]+)", chart.raw))
    assert top == next(tick.position for tick in chart.y_ticks if tick.label == "50")


def test_scores_keep_to_their_range() -> None:
    intervals = [charts.Interval(1.0, 0.0, 4.0), charts.Interval(99.5, 97.0, 100.0)]
    chart = charts.scores("Score", [0, 10], intervals)
    assert chart is not None
    assert [tick.label for tick in chart.y_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert [marker.label for marker in chart.markers] == ["step 0: 1.0", "step 10: 99.5"]


def test_scores_that_hardly_differ_are_drawn_flat() -> None:
    chart = charts.scores("Score", [0, 9], [charts.Interval(83.0), charts.Interval(83.1)])
    assert chart is not None
    first, last = chart.markers
    assert abs(first.y - last.y) < 0.05 * (charts.BOTTOM - charts.TOP)


def test_a_full_score_throughout_stays_below_the_ceiling() -> None:
    chart = charts.scores("Score", [0, 10], [charts.Interval(100.0)] * 2)
    assert chart is not None
    assert [tick.label for tick in chart.y_ticks] == ["95", "96", "97", "98", "99", "100"]
