"""Uploading an exported folder to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of its HTTP library, which is not the same in all versions
)
from huggingface_hub.utils import validate_repo_id

from ..errors import ConfigError, Phi3VError

LOG_IN = "log in with `hf auth login` (a token that may write), or set HF_TOKEN"


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

    def upload(self, folder: Path) -> str:
        """Creates the repository where it is not there, and uploads every file of ``folder`` in one commit.

        Returns:
            The repository's address.

        Raises:
            Phi3VError: the hub refused it or could not be reached; the folder stays.
        """
        try:
            created = self._api.create_repo(self.repo_id, private=self._is_private, exist_ok=True)
            self._api.upload_folder(
                repo_id=created.repo_id, folder_path=folder, commit_message="Upload a model exported by phi3v"
            )
        except (HTTPError, OSError) as error:
            raise Phi3VError(
                f"{folder} is complete and checked, but was not uploaded to {self.repo_id}: {_told(error)}. "
                f"Once that is mended: hf upload {self.repo_id} {folder} ."
            ) from error
        return str(created)


def _told(error: Exception) -> str:
    """Says what went wrong without repeating the request, whose headers hold the token."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the hub does not know this token (401); {LOG_IN}"
    if status == 403:
        return f"this token may not write there (403); {LOG_IN}"
    if status is not None:
        assert isinstance(error, HfHubHTTPError)
        return f"the hub answered {status}: {error.server_message or 'no reason given'}"
    return f"the hub cannot be reached ({type(error).__name__})"
