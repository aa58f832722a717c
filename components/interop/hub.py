"""SAEs on the Hugging Face Hub: `hf://owner/repository/folder`, or `hf://owner/repository@revision/folder`.

Which server, token and cache is meant is said to huggingface_hub: HF_ENDPOINT, HF_TOKEN, HF_HOME.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

PREFIX = "hf://"
_ADDRESS = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")


def fetched(address: str, choose: Callable[[list[str]], Sequence[str]]) -> Path:
    """A local folder with the files that `choose` takes out of the names in the folder; all of one commit."""
    from huggingface_hub import HfApi, hf_hub_download

    repository, revision, folder = _parts(address)
    with _reached(address):
        info = HfApi().model_info(repository, revision=revision)
        names = _directly_in(folder, [file.rfilename for file in info.siblings or ()])
    chosen = choose(names)
    with _reached(address):
        copies = [Path(hf_hub_download(repository, folder + name, revision=info.sha)) for name in chosen]
    return copies[0].parent


def uploaded(address: str, files: Mapping[str, bytes]) -> str:
    """Put the files there in one commit, and say at which address. A repository that is not there yet is made, and is private;
    a folder that holds files is refused."""
    from huggingface_hub import CommitOperationAdd, HfApi

    repository, revision, folder = _parts(address)
    api = HfApi()
    with _reached(address):
        api.create_repo(repository, private=True, exist_ok=True)
        present = _directly_in(
            folder, [file.rfilename for file in api.model_info(repository, revision=revision).siblings or ()]
        )
    if {*present} - {".gitattributes", "README.md"}:
        raise ValueError(f"'{address}' holds files already; a folder that is empty or not there yet is accepted")
    with _reached(address):
        operations = [CommitOperationAdd(folder + name, content) for name, content in files.items()]
        commit = api.create_commit(repository, operations, commit_message="Add a sparse autoencoder", revision=revision)
    return str(commit.commit_url)


def _parts(address: str) -> tuple[str, str | None, str]:
    """Repository, revision, and folder with a slash behind it."""
    match = _ADDRESS.fullmatch(address.rstrip("/"))
    if match is None:
        raise ValueError(f"'{address}' is no address on the Hub; accepted is hf://owner/repository/folder")
    return match[1], match[2], f"{match[3]}/" if match[3] else ""


def _directly_in(folder: str, names: Iterable[str]) -> list[str]:
    found = (name.removeprefix(folder) for name in names if name.startswith(folder))
    return [name for name in found if "/" not in name]


@contextmanager
def _reached(address: str) -> Iterator[None]:
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(f"'{address}' is not on the Hub, or not for this token ({type(error).__name__})") from error
    except Exception as error:  # every transport has its own exceptions, and all mean that the Hub did not do it
        reason = (str(error) or "no reason given").splitlines()[0]
        raise ValueError(f"'{address}': the Hugging Face Hub did not answer: {type(error).__name__}: {reason}") from error
