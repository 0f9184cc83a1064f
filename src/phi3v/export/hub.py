"""Uploading an exported folder to the Hugging Face hub."""

import glob
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of its HTTP library, which is not the same in all versions
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..credentials import HIDDEN, without_secrets
from ..errors import ConfigError, Phi3VError

LOG_IN = "log in with `hf auth login` (a token that may write), or set HF_TOKEN"

UPLOAD_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
"""What an upload raises: beside HTTP's errors those of large files' storage, for which the libraries have no class."""

OTHER_MODELS_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.bin",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "processor_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
)
"""Files that loaders look for by themselves: one that an earlier upload left would be loaded instead of the new ones,
or would put an adapter on them."""


class HubRepository:
    """A model repository that a folder will be uploaded to.

    Args:
        repo_id: ``name`` or ``owner/name``.
        is_private: create it as a private one; an existing repository stays as it is.

    Raises:
        ConfigError: the name is none, or there is no token, or the hub refuses it. The token is never shown.
    """

    def __init__(self, repo_id: str, *, is_private: bool) -> None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ConfigError(f"--push_to_hub {repo_id}: {error}") from error
        if get_token() is None:
            raise ConfigError(f"--push_to_hub {repo_id}: no token for the hub was found; {LOG_IN}")
        self.repo_id = repo_id
        self._is_private = is_private
        self._api = HfApi(library_name="phi3v")
        try:
            self._api.whoami()
        except (HTTPError, OSError) as error:
            raise ConfigError(f"--push_to_hub {repo_id}: {_told(error)}") from error

    def upload(self, folder: Path, say: Callable[[str], None]) -> str:
        """Creates the repository where it is not there, and uploads every file of ``folder`` in one commit.

        Weights, adapters, vocabularies, chat templates and pointers to code of another model, which lie in an existing
        repository, are deleted in the same commit; its history keeps them. Other files stay.

        Args:
            folder: what to upload.
            say: is told what is deleted.

        Returns:
            The repository's address.

        Raises:
            Phi3VError: the hub refused it or could not be reached; the folder stays.
        """
        try:
            created = self._api.create_repo(self.repo_id, private=self._is_private, exist_ok=True)
            others = self._files_of_another_model(created.repo_id, folder)
            if others:
                say(f"Deleting in the same commit what belongs to another model there: {', '.join(others)}")
            self._api.upload_folder(
                repo_id=created.repo_id,
                folder_path=folder,
                commit_message="Upload a model exported by phi3v",
                delete_patterns=[glob.escape(name) for name in others] or None,
            )
        except UPLOAD_ERRORS as error:
            raise Phi3VError(
                f"{folder} is complete and checked, but was not uploaded to {self.repo_id}: {_told(error)}. "
                f"Once that is mended: hf upload {self.repo_id} {folder} ."
            ) from error
        return str(created)

    def _files_of_another_model(self, repo_id: str, folder: Path) -> list[str]:
        """Lists the files at the repository's top that loaders would mix up with those of ``folder``."""
        try:
            names = self._api.list_repo_files(repo_id)
        except (EntryNotFoundError, RevisionNotFoundError):
            return []  # there is no commit in it yet
        return sorted(
            name
            for name in names
            if "/" not in name
            and any(fnmatch(name, pattern) for pattern in OTHER_MODELS_FILES)
            and not (folder / name).exists()
        )


def _told(error: Exception) -> str:
    """Says what went wrong without repeating the request, whose headers hold the token."""
    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, HTTPError | OSError):
        return f"{_shown(error)}: {_told(cause)}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the hub does not know this token (401); {LOG_IN}"
    if status == 403:
        return f"this token may not write there (403); {LOG_IN}"
    if status is not None:
        assert isinstance(error, HfHubHTTPError)
        return f"the hub answered {status}: {error.server_message or 'no reason given'}"
    if not isinstance(error, HTTPError | OSError):
        return f"{type(error).__name__}: {_shown(error)}"
    return f"the hub cannot be reached ({type(error).__name__})"


def _shown(error: Exception) -> str:
    """Returns an error's message in one line, without the token and without what signs a storage's addresses."""
    text = " ".join(str(error).split()).rstrip(".")
    token = get_token()
    return without_secrets(text.replace(token, HIDDEN) if token else text)
