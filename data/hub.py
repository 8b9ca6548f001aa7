"""Lists and downloads the files of a corpus: data sets on the Hugging Face hub, and archives of GitHub repositories."""

import dataclasses
import errno
import fnmatch
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from data.corpora import SPLITS, Corpus, Subset
from data.files import File, some
from data.progress import note
from data.shards import DataError, file_sha256

WAIT_AND_RETRY = (408, 429)  # HTTP statuses besides 5xx


def hub_files(corpus: Corpus, subset: Subset, revision: str) -> tuple[str, list[File]]:
    """The commit of a revision of a corpus on the hub, and its files in the order of splits and paths.

    Offline (HF_HUB_OFFLINE=1) they come from the hub library's cache.
    """
    import huggingface_hub

    patterns = [(split, subset.files[split]) for split in SPLITS if split in subset.files]
    try:
        listed = _cached if huggingface_hub.is_offline_mode() else _listed
        commit, found = listed(corpus.repo, revision, [pattern for _, pattern in patterns])
    except Exception as error:  # the library raises its own, httpx's and OSError
        raise _cannot_fetch(f"the list of files of {corpus.repo}", error) from None
    files = [
        dataclasses.replace(file, split=split)
        for split, pattern in patterns
        for file in sorted(found, key=lambda file: file.name)
        if fnmatch.fnmatchcase(file.name, pattern)
    ]
    for split, pattern in patterns:
        if not any(file.split == split for file in files):
            raise DataError(f"{corpus.repo} at {commit} has no file {pattern}")
    if "val" not in subset.files:  # then train is what the hash rule divides
        files = [dataclasses.replace(file, split=None) for file in files]
    return commit, files


def _listed(repo: str, revision: str, patterns: list[str]) -> tuple[str, list[File]]:
    import huggingface_hub

    api, commit = huggingface_hub.HfApi(), revision
    if not re.fullmatch("[0-9a-f]{40}", commit):
        commit = api.dataset_info(repo, revision=commit).sha
    folders = sorted({pattern.rsplit("/", 1)[0] for pattern in patterns})
    return commit, [
        File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for folder in folders
        for entry in api.list_repo_tree(repo, folder, revision=commit, repo_type="dataset")
        if hasattr(entry, "size")
    ]


def _cached(repo: str, revision: str, patterns: list[str]) -> tuple[str, list[File]]:
    import huggingface_hub

    folder = Path(
        huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, local_files_only=True, allow_patterns=patterns
        )
    )
    # In that cache a file is a link to a blob, and the blob's name is its sha256.
    found = [
        File(path.relative_to(folder).as_posix(), path.stat().st_size, path.resolve().name, path=str(path))
        for path in folder.rglob("*.parquet")
        if any(fnmatch.fnmatchcase(path.relative_to(folder).as_posix(), pattern) for pattern in patterns)
    ]
    counted = {}  # the cache does not know what it lacks, but many names tell how many there are
    for file in found:
        if numbers := re.match(r"(.*)-(\d{5})-of-(\d{5})", file.name):
            counted.setdefault((numbers[1], numbers[3]), set()).add(int(numbers[2]))
    for (name, total), there in sorted(counted.items()):
        if missing := [f"{name}-{i:05d}-of-{total}" for i in range(int(total)) if i not in there]:
            raise DataError(
                f"the hub library's cache has only a part of {repo}: {some(missing)} is not there; without "
                f"HF_HUB_OFFLINE the same command downloads it"
            )
    note(
        f"offline: {len(found):,} files of {repo}, {sum(f.bytes for f in found) / 1e6:,.0f} MB, are in the hub "
        "library's cache, and are taken for all of it"
    )
    return folder.name, found


def download(corpus: Corpus, commit: str, file: File, folder: Path) -> File:
    """Download a file of the corpus into `folder`. Returns the File with its path.

    A file that is there already is taken as it is; one of the hub library's cache must have its sha256. The hub's
    library retries a download that breaks off.
    """
    if file.path:
        blob = Path(file.path).resolve()
        if blob.name == file.identity and len(blob.name) == 64 and file_sha256(blob) != blob.name:
            raise DataError(f"{blob}, which is {file.name} in the hub library's cache, is damaged; delete it")
        return file
    try:
        if corpus.archive:
            path = folder / file.name
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                fetch(corpus.archive, path)
        else:
            import huggingface_hub

            huggingface_hub.utils.disable_progress_bars()  # there is one already
            path = huggingface_hub.hf_hub_download(
                corpus.repo, file.name, repo_type="dataset", revision=commit, local_dir=folder
            )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # the disk's, not the network's
            raise
        raise _cannot_fetch(file.name, error) from None
    path = Path(path)
    # Every large file on the hub is listed with its sha256, 64 digits. The hub's library does not check it.
    if len(file.identity) == 64 and file_sha256(path) != file.identity:
        path.unlink()
        raise DataError(
            f"{file.name} was not downloaded whole: its sha256 is not the one that {corpus.repo} lists; the same "
            f"command downloads it again"
        )
    return dataclasses.replace(file, path=str(path), bytes=path.stat().st_size)


def fetch(url: str, path: Path, attempts: int = 5) -> None:
    """Download a file, atomically, through the environment's proxies. Waits and retries where that may help."""
    for attempt in range(attempts):
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(f"{path}.tmp", "wb") as f:
                shutil.copyfileobj(response, f)
                if getattr(response, "length", 0):  # what is still to come; reading in blocks does not notice
                    raise ConnectionError(f"{url} broke off")
            os.replace(f"{path}.tmp", path)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            status = getattr(error, "code", 500)
            if (status < 500 and status not in WAIT_AND_RETRY) or attempt == attempts - 1:
                raise
            time.sleep(2**attempt)


def _cannot_fetch(what: str, error: Exception) -> DataError:
    line = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{what} cannot be fetched ({line[:300]}); when the network allows it, the same command continues. Files "
        f"got in another way are read with --source"
    )
