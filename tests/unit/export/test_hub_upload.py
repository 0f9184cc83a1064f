"""Uploading, against a server on this machine that speaks as much of the hub's protocol as an upload needs."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from phi3v.errors import ConfigError, Phi3VError
from phi3v.export.hub import HubRepository

TOKEN = "hf_knownToThisServerOnly"


class Hub(ThreadingHTTPServer):
    """Holds repositories in memory: files by repository, and which of them are private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits = 0
        self.refuses_commits = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if "/tree/" in self.path:
            repo_id = self.path.removeprefix("/api/models/").partition("/tree/")[0]
            held = self.server.files[repo_id].items()
            files = [{"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in held]
            return self.answer(200, files)
        known = self.path == "/api/whoami-v2"
        return self.answer(200 if known else 404, {"name": "me", "type": "user", "orgs": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.files.setdefault(repo_id, {})
            # The library's versions say it in different words.
            is_private = asked.get("private") is True or asked.get("visibility") == "private"
            self.server.private.setdefault(repo_id, is_private)
            return self.answer(200, {"url": f"{self.server.address}/{repo_id}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
            return self.answer(200, {"files": modes})
        if "/commit/" in self.path:
            if self.server.refuses_commits:
                return self.answer(403, {"error": "Forbidden"})
            repo_id = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[repo_id][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del self.server.files[repo_id][line["value"]["path"]]
            self.server.commits += 1
            where = f"{self.server.address}/{repo_id}/commit/abc"
            return self.answer(200, {"commitUrl": where, "commitOid": "abc", "success": True})
        return self.answer(404, {"error": self.path})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (tmp_path / "model" / "weights.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "model"


def test_every_file_arrives(hub: Hub, folder: Path) -> None:
    address = HubRepository("me/mine", is_private=True).upload(folder, print)
    assert address == f"{hub.address}/me/mine"
    assert hub.files == {"me/mine": {file.name: file.read_bytes() for file in folder.iterdir()}}
    assert hub.private == {"me/mine": True} and hub.commits == 1
    (folder / "README.md").write_text("# Better\n")
    # It is there: the files are replaced, it stays private.
    HubRepository("me/mine", is_private=False).upload(folder, print)
    assert hub.files["me/mine"]["README.md"] == b"# Better\n" and hub.private == {"me/mine": True}


def test_what_loaders_would_mix_up_with_it_goes_away_in_the_same_commit(hub: Hub, folder: Path) -> None:
    kept = {"LICENSE", "card-picture.png", "checkpoints/model.safetensors", ".gitattributes", "[x].gguf"}
    stale = {"adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors",
             "model.safetensors.index.json", "pytorch_model.bin", "processor_config.json", "added_tokens.json",
             "chat_template.jinja", "chat_template.json", "tokenizer.model"}  # fmt: skip
    hub.files["me/mine"] = dict.fromkeys([*kept, *stale, "weights.safetensors"], b"old")
    told: list[str] = []
    HubRepository("me/mine", is_private=False).upload(folder, told.append)
    assert hub.files["me/mine"].keys() == kept | {"README.md", "weights.safetensors"}
    assert hub.files["me/mine"]["weights.safetensors"] == bytes(range(256)) and hub.commits == 1
    assert len(told) == 1 and all(name in told[0] for name in stale) and "LICENSE" not in told[0]


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError(f"Error while uploading 'model.safetensors' to the Hub. Bearer {TOKEN}"),  # large files
        ValueError("LFS batch API returned errors: https://s3.example.org/x?X-Amz-Signature=0a1b2c3d4e5f"),
        RuntimeError("Data processing error: CAS service error"),  # hf_xet's
    ],
)
def test_a_failed_upload_of_large_files_keeps_the_folder_and_says_so(
    failure: Exception, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure from OSError("connection reset")

    repository = HubRepository("me/mine", is_private=False)
    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(Phi3VError, match=r"complete and checked, but was not uploaded.*hf upload me/mine") as told:
        repository.upload(folder, print)
    assert str(failure)[:20] in str(told.value)
    assert TOKEN not in str(told.value) and "0a1b2c3d4e5f" not in str(told.value)


@pytest.mark.parametrize("token", ["hf_mistyped", None])
def test_without_a_token_that_counts_the_login_is_named(
    token: str | None, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match="hf auth login") as told:
        HubRepository("me/mine", is_private=False)
    assert "hf_" not in str(told.value)
    assert hub.files == {}


def test_a_refused_upload_keeps_the_folder_and_says_so(hub: Hub, folder: Path) -> None:
    repository = HubRepository("me/mine", is_private=False)
    hub.refuses_commits = True
    with pytest.raises(Phi3VError, match=r"complete and checked, but was not uploaded.*403.*hf upload me/mine") as told:
        repository.upload(folder, print)
    assert TOKEN not in str(told.value)


def test_an_unreachable_hub_and_a_name_that_is_none(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--push_to_hub a/b/c"):
        HubRepository("a/b/c", is_private=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="cannot be reached"):
        HubRepository("me/mine", is_private=False)
