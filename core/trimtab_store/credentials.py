"""Keys in files: read again when they rotate, never kept longer than the files stand."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from botocore.credentials import CredentialProvider, Credentials, ReadOnlyCredentials

from trimtab_api.contract import CREDENTIAL_KEYS, OPTIONAL_CREDENTIAL_KEYS
from trimtab_store.errors import CredentialsMissing

_Stamp = tuple[int, int, int]


class FileCredentials(Credentials):
    """Keys from a folder with one file per key, as a mounted Secret has them.

    Raises CredentialsMissing, at once and at every later request, when a file is missing or empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # As text: they are looked at before each request.
        self._files = [str(folder / name) for name in (*CREDENTIAL_KEYS, *OPTIONAL_CREDENTIAL_KEYS)]
        self._lock = threading.Lock()
        self._stamps: tuple[_Stamp | None, ...] = ()
        self._frozen = self._read()
        frozen = self._frozen
        super().__init__(frozen.access_key or "", frozen.secret_key or "", frozen.token, method="trimtab-files")

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """The keys as the files have them now; botocore asks before each signature."""
        with self._lock:
            if self._stamp() != self._stamps:
                self._frozen = self._read()
            return self._frozen

    def _read(self) -> ReadOnlyCredentials:
        # The kubelet swaps the whole Secret by one symlink, ..data. Resolving it once gives keys of one version;
        # when it is swapped between resolving and reading, the old folder is gone and the new one is read.
        for _ in range(3):
            # Stamped before it is read: keys that change in between are read again at the next request.
            self._stamps = self._stamp()
            current = self._current()
            try:
                access, secret = (_key(current, name) for name in CREDENTIAL_KEYS)
                (token,) = (_key(current, name) for name in OPTIONAL_CREDENTIAL_KEYS)
            except OSError as error:
                raise self._missing(f"the keys in {self._folder} cannot be read ({error.strerror})") from error
            if access and secret:
                return ReadOnlyCredentials(access, secret, token)
            if self._current() == current:
                break
        lacking = " and ".join(name for name in CREDENTIAL_KEYS if not _key(self._current(), name))
        raise self._missing(f"{lacking or 'a key'}: missing or empty in {self._folder}")

    def _current(self) -> Path:
        data = self._folder / "..data"
        return data.resolve() if data.is_symlink() else self._folder

    def _missing(self, problem: str) -> CredentialsMissing:
        remedy = f"put {' and '.join(CREDENTIAL_KEYS)} into the Secret named by storage.credentials"
        return CredentialsMissing(str(self._folder), problem, remedy)

    def _stamp(self) -> tuple[_Stamp | None, ...]:
        return tuple(_file_stamp(file) for file in self._files)


class FileCredentialProvider(CredentialProvider):
    """Puts FileCredentials in front of botocore's own chain."""

    METHOD = "trimtab-files"
    CANONICAL_NAME = "custom-trimtab-files"

    def __init__(self, credentials: FileCredentials) -> None:
        super().__init__()
        self._credentials = credentials

    def load(self) -> Credentials:
        """The credentials."""
        return self._credentials


def _key(folder: Path, name: str) -> str | None:
    try:
        return (folder / name).read_text().strip() or None
    except FileNotFoundError:
        return None


def _file_stamp(path: str) -> _Stamp | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path costs more than the look
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
