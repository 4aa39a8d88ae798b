"""The post's weights, a file that is not ours to ship: where a copy lies, how it is fetched, who was given it.

Nothing here reads tensors: the notebook runner asks too, and does without torch.
"""

import io
import os
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import pooch

from dtbook.artifacts.store import describe

POST_MODEL_SHA256 = "8eb812e46b2f2f52b0a4761b798598e3693dfae741c794b9600e1bbc8425fdc4"
POST_MODEL_URL = (
    "https://raw.githubusercontent.com/jbloomAus/DecisionTransformerInterpretability/"
    "fec198323d6810f5f439c10f48b15c44bbfa4dec/models/MiniGrid-Dynamic-Obstacles-8x8-v0/"
    "demo_model_overnight_training.pt"
)
COPY = "DTBOOK_POST_MODEL"
"""The environment variable that names a copy of the post's checkpoint."""
MIRROR = "DTBOOK_POST_URL"
"""The one that says where to fetch it instead of `POST_MODEL_URL`; its sha256 must be the same."""
REFUSED = "DTBOOK_POST_REFUSED"
"""The one that holds why it cannot be had, once an attempt has failed: the processes that this one starts read it."""
NOTE = "DTBOOK_POST_NOTE"
"""The one that names the file in which a kernel leaves what it read for the runner: the sha256, or `NONE`."""
NONE = "none"
SECONDS = 10
"""That a download may take in all."""


class NoPostWeights(OSError):
    """The post's weights cannot be had here; the message is a sentence that says why and what to do."""


def named_copy() -> Path | None:
    """Return the copy that DTBOOK_POST_MODEL names, counted from the caller's folder; None where it is not set.

    Raises FileNotFoundError where it names no file.
    """
    if not (named := os.environ.get(COPY)):
        return None
    path = Path(named).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(
            f"{COPY} is {named!r}, but there is no file {path}: name a copy, or unset it."
        )
    return path


def find_post_checkpoint() -> Path | None:
    """Return the copy that is named, or that was fetched before; None where only a download could bring it.

    Raises as `named_copy`.
    """
    if path := named_copy():
        return path
    path = _cached()
    return path if path.is_file() and describe(path)["sha256"] == POST_MODEL_SHA256 else None


def fetch_post_checkpoint() -> Path:
    """Return the post's checkpoint: the copy that is named, or what was fetched before, or a download.

    There is one attempt, of at most `SECONDS` in all: this process and those that it starts remember how it failed.
    Raises NoPostWeights where it cannot be had, FileNotFoundError where DTBOOK_POST_MODEL names no file.
    """
    if path := find_post_checkpoint():
        return path
    if REFUSED not in os.environ:
        try:
            return _retrieve()
        except Exception as error:  # pooch lets through whatever its downloader raises
            os.environ[REFUSED] = _why(error)
    raise NoPostWeights(os.environ[REFUSED])


def _retrieve() -> Path:
    path, sha256 = _cached(), f"sha256:{POST_MODEL_SHA256}"
    return Path(pooch.retrieve(_url(), sha256, path.name, path.parent, downloader=_download))  # type: ignore[arg-type]


def _why(error: Exception) -> str:
    """Return why in one sentence: of another sha256 pooch says several."""
    what = str(error).split(". ")[0] if isinstance(error, ValueError) else type(error).__name__
    return f"The post's checkpoint could not be fetched from {_url()} ({what}); {COPY} may name a copy of it."


def weights_at_hand() -> str:
    """Return the sha256 of the checkpoint that a notebook would be given, fetched if need be, or `NONE`."""
    try:
        return str(describe(fetch_post_checkpoint())["sha256"])
    except NoPostWeights:
        return NONE


def note(read: str, why: str = "") -> None:
    """Leave a note of what was read, or why nothing, where whoever started this process asked for one."""
    if path := os.environ.get(NOTE):
        Path(path).write_text(f"{read} {why}", encoding="utf-8")


def noted(path: Path) -> str | None:
    """Return what `note` says was read, None where there is none; a failure is remembered here too."""
    if not path.exists():
        return None
    read, _, why = path.read_text(encoding="utf-8").partition(" ")
    if why:
        os.environ.setdefault(REFUSED, why)
    return read


def _url() -> str:
    return os.environ.get(MIRROR) or POST_MODEL_URL


def _cached() -> Path:
    return Path(pooch.os_cache("dtbook"), pooch.utils.unique_file_name(_url()))


def _download(url: str, file: Any, _: object) -> None:
    """Download as pooch does, but in `SECONDS`: its timeout bounds each address and each read, and no name server."""
    answer: Future[bytes] = Future()

    def read() -> None:
        received = io.BytesIO()
        try:
            pooch.HTTPDownloader(timeout=SECONDS)(url, received, None)
            answer.set_result(received.getvalue())
        except Exception as error:
            answer.set_exception(error)

    Thread(target=read, daemon=True).start()  # left behind where it takes longer
    Path(file).write_bytes(answer.result(timeout=SECONDS))
