"""What the source must never do: load a pickle, run somebody's code, take YAML for objects, or let HTML through."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
TEMPLATES = sorted((ROOT / "src").rglob("*.html"))

PICKLE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pickle5"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


def name_of(node: ast.expr) -> str:
    """``a.b.c`` for an attribute of an attribute of a name."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield name_of(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """A keyword's constant, or a marker when it is computed, or None."""
    for one in call.keywords:
        if one.arg == name:
            return one.value.value if isinstance(one.value, ast.Constant) else ...
    return None


def violations(source: str) -> list[str]:
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"line {node.lineno}: imports {name}" for name in modules if name.split(".")[0] in PICKLE_MODULES]
    for name, call in calls(tree):
        last = name.rpartition(".")[2]
        if last == "load" and name.startswith("torch.") and keyword(call, "weights_only") is not True:
            found.append(f"line {call.lineno}: {name} without weights_only=True")
        if name.startswith(("np.", "numpy.")) and last == "load" and keyword(call, "allow_pickle") is not False:
            found.append(f"line {call.lineno}: {name} without allow_pickle=False")
        if name.startswith("yaml.") and last in ("load", "load_all", "full_load", "unsafe_load"):
            found.append(f"line {call.lineno}: {name}; use phi3v.settings")
        if keyword(call, "trust_remote_code") not in (None, False):
            found.append(f"line {call.lineno}: trust_remote_code is given")
        if keyword(call, "shell") not in (None, False) or name in ("os.system", "os.popen"):
            found.append(f"line {call.lineno}: runs a shell")
        if name in RUNS_TEXT:
            found.append(f"line {call.lineno}: {name}()")
        if last == "Environment" and "jinja2" in name and keyword(call, "autoescape") is not True:
            found.append(f"line {call.lineno}: a jinja environment without autoescape")
        if last in ("Markup", "mark_safe"):
            found.append(f"line {call.lineno}: {name} lets HTML through")
        if last in ("extract", "extractall") and keyword(call, "filter") != "data":
            found.append(f"line {call.lineno}: unpacks an archive without filter='data'")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_does_none_of_it(path: Path) -> None:
    assert violations(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "eval(text)",
        "jinja2.Environment(loader=x)",
        "jinja2.Environment(autoescape=False)",
        "markupsafe.Markup(text)",
        "tar.extractall(folder)",
    ],
)
def test_each_of_these_would_be_found(source: str) -> None:
    assert len(violations(source)) == 1


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_mark_nothing_safe_and_forbid_scripts(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not re.search(
        r"\|\s*(safe|tojson|forceescape)\b|autoescape\s+false|<script|\son\w+=|javascript:", text, re.I
    )
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # The policy holds from where it stands: nothing but the character set may come before it.
    text = text[text.index("<head>") :]
    assert text.index("Content-Security-Policy") < min(text.index(tag) for tag in ("<title", "<link", "<style"))


def test_there_are_templates_and_sources() -> None:
    assert len(TEMPLATES) >= 2 and len(SOURCES) > 100
