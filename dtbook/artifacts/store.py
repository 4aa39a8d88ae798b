"""`data/` and its manifest: whole files or none, what made each, and its sha256 checked before it is used.

An artifact is a file, or a folder that is used as one thing (a model: weights and their JSON). `atomic_write`
serves every room, so this module imports none of those that compute.
"""

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import pooch
import psutil
from filelock import FileLock

from dtbook.artifacts.kernels import kernels
from dtbook.artifacts.provenance import PACKAGE, Code, code_behind, digest

CHECKOUT = PACKAGE.parent
DATA_URL = "DTBOOK_DATA_URL"


class ArtifactError(ValueError):
    """An artifact that is missing, altered or cannot be had; the message is one sentence naming the file."""


@contextmanager
def atomic_write(path: Path | str, keep: bool = False) -> Iterator[Path]:
    """Yield a path to write a file or a folder to; on leaving without an error it takes the place of `path`.

    The draft has the name of `path` and lies in a hidden folder beside it. It is flushed to the disk, then
    renamed: whoever reads `path` sees the old artifact or the new one, whole. What a killed process left is
    never read, and the next write to `path` removes it. Of a symbolic link the target is written. Files have the
    rights that the umask leaves.

    With `keep`, a folder that is there stays, and so does what the draft lacks: the draft lies inside, and its files
    are moved one after the other. What a kill in between left, `recover` ends. Raises OSError naming `path` where it
    cannot write, or where a folder is to replace a file, or a file a folder.
    """
    with _draft(Path(path), keep) as draft:
        yield draft
        target = Path(path).resolve()
        if draft.exists() and target.exists() and draft.is_dir() != target.is_dir():
            kind = "folder" if target.is_dir() else "file"
            raise OSError(errno.EEXIST, f"cannot write {path} (there is a {kind} of that name)")
        _publish(draft, target, keep)


@contextmanager
def _draft(path: Path, keep: bool = False) -> Iterator[Path]:
    try:
        target = path.resolve()
        beside = target if keep and target.is_dir() else target.parent
        beside.mkdir(parents=True, exist_ok=True)
        recover(target)
        room = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=f".{os.getpid()}.tmp", dir=beside)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to one another
        why = getattr(error, "strerror", error)
        raise OSError(getattr(error, "errno", errno.ELOOP), f"cannot write {path} ({why})") from error
    try:
        yield Path(room, target.name)
    except Exception as error:
        if _means_full(error):
            raise OSError(errno.ENOSPC, f"cannot write {path} (no space left on the disk)") from error
        raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _means_full(error: Exception) -> bool:
    """Return whether the disk, the quota or the largest file allowed was reached; safetensors says so in words."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def _publish(draft: Path, path: Path, keep: bool = False) -> None:
    if not draft.exists():
        raise ArtifactError(f"nothing was written for {path}: write it to the path that was handed out")
    rights = _rights(draft.parent)
    for file in _files(draft):
        file.chmod(file.stat().st_mode | rights)
        _flush(file)
    path = path.resolve()
    if path.is_dir() and keep:
        return _move_files(draft.rename(_aside(draft.parent, path, "ready")), path)
    if path.is_dir():
        # a folder cannot be replaced in one step: after a kill in between, `recover` puts it back
        path.rename(_aside(draft.parent, path, "replaced"))
    draft.replace(path)
    _flush(path.parent)


def _rights(room: Path) -> int:
    """Return the mode of a new file, which the umask decides; safetensors writes files that only their owner reads."""
    (new := room / ".new").touch()
    mode = new.stat().st_mode
    new.unlink()
    return mode


def _move_files(ready: Path, folder: Path) -> None:
    for file in _files(ready):
        place = folder / file.relative_to(ready)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    _flush(folder)


def recover(path: Path) -> None:
    """Remove the drafts of `path` whose writers are gone; bring back, or finish, a folder that was being replaced."""
    path = path.resolve()
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]+\.(\d+)\.tmp")
    for room in [*path.parent.glob(".*.tmp"), *path.glob(".*.tmp")]:
        match = pattern.fullmatch(room.name)
        if match and _is_abandoned(room, int(match[1])):
            if not path.exists():
                with suppress(FileNotFoundError):
                    _aside(room, path, "replaced").rename(path)
            if (ready := _aside(room, path, "ready")).exists():
                _move_files(ready, path)
            shutil.rmtree(room, ignore_errors=True)


def _aside(room: Path, path: Path, why: str) -> Path:
    return room / f"{path.name}.{why}"


def _is_abandoned(room: Path, pid: int) -> bool:
    """Return whether process `pid` has ended, or its number now belongs to one that started later."""
    clock_slack = 2.0  # seconds: start times are counted from a boot time known to the second
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # ended, and nobody has asked how
            return True
        return process.create_time() > room.stat().st_mtime + clock_slack
    except psutil.NoSuchProcess:
        return True
    except FileNotFoundError:
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def describe(path: Path) -> dict[str, Any]:
    """Return `sha256` and `bytes` of a file; of a folder also `files`, the sha256 of each file in it."""
    files = {file.relative_to(path).as_posix(): _sha256(file) for file in _files(path)}
    size = sum(file.stat().st_size for file in _files(path))
    if path.is_dir():
        return {"sha256": digest(files), "bytes": size, "files": files}
    return {"sha256": files["."], "bytes": size}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ArtifactStore:
    """A folder of artifacts with its `manifest.json`: name → what made it, its sha256 and its size in bytes.

    Without a `root` it is the book's own `data/`; where the package was installed without the repository
    around it, a cache folder with the manifest that came with the package. Given a `url` (a folder, a file://
    or an https:// address) the store fetches what it lacks, and takes no file without the manifest's hash.
    The url of the installed package is the environment variable DTBOOK_DATA_URL, else that of `data/` at the
    commit, or in the folder, that was installed.
    """

    def __init__(
        self, root: Path | str | None = None, url: str | None = None, manifest: Path | None = None
    ) -> None:
        """Look at nothing: a store is checked when it is used."""
        if root is None and not (CHECKOUT / "pyproject.toml").is_file():
            root, manifest = pooch.os_cache("dtbook"), PACKAGE / "data" / "manifest.json"
            url = url or os.environ.get(DATA_URL) or _installed_from()
        self.root = Path(root or CHECKOUT / "data")
        self.manifest = manifest or self.root / "manifest.json"
        self.url = url
        self._checked: set[str] = set()

    def entries(self) -> dict[str, Any]:
        """Return the manifest, name → entry, empty where there is none; raise ArtifactError if damaged."""
        try:
            entries = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ArtifactError(f"{self.manifest} is damaged: it is not JSON ({error})") from error
        if not isinstance(entries, dict):
            raise ArtifactError(
                f"{self.manifest} is damaged: it must map the names of artifacts to what made them"
            )
        for name, entry in entries.items():
            _check_entry(self.manifest, name, entry)
        return entries

    def path(self, name: str) -> Path:
        """Return the path of artifact `name`, its sha256 checked once; raise ArtifactError if that fails."""
        path = self.root / name
        if name in self._checked:
            return path
        entries = self.entries()
        if name not in entries:
            raise ArtifactError(
                f"{self.manifest} names no artifact {name!r}: it has {', '.join(entries) or 'none'}"
            )
        if self.url:
            self._fetch(name, entries[name])
        else:
            recover(path)
            if problem := self._problem(name, entries[name]):
                raise ArtifactError(f"{problem}; {self._remedy()}")
        self._checked.add(name)
        return path

    @contextmanager
    def write(
        self,
        name: str,
        *,
        stage: str,
        code: Sequence[Code],
        parameters: object = None,
        seeds: Sequence[int] = (),
        seconds: float | None = None,
    ) -> Iterator[Path]:
        """Yield a path to write artifact `name` to; then put it in its place and into the manifest.

        `stage` names the step of the pipeline, `code` the functions of dtbook that do it; `parameters` is a
        mapping or a dataclass of plain values; `seconds` is the processor time that the step took, for all its
        artifacts together. Two processes may write to one folder at once without loss.
        """
        if not _is_inside(name):
            raise ArtifactError(
                f"name must be a relative path inside {self.root}, like 'models/reference', not {name!r}"
            )
        if self.manifest.parent != self.root:
            raise ArtifactError(
                f"{self.root} is a cache: write {name!r} to an ArtifactStore in a folder of your own"
            )
        made_by = _made_by(stage, code, parameters, seeds)
        took = {} if seconds is None else {"seconds": round(seconds, 1)}
        with _draft(self.root / name) as draft:
            yield draft
            with FileLock(self.root / ".manifest.lock"):
                _publish(draft, self.root / name)
                self._record(name, made_by | took | describe(self.root / name))

    def take(self, name: str, other: "ArtifactStore") -> None:
        """Copy artifact `name` from another store, with what its manifest says of it."""
        source, entry = other.path(name), other.entries()[name]
        with _draft(self.root / name) as draft:
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, draft)
            with FileLock(self.root / ".manifest.lock"):
                _publish(draft, self.root / name)
                self._record(name, entry)

    def is_current(
        self,
        name: str,
        *,
        stage: str,
        code: Sequence[Code],
        parameters: object = None,
        seeds: Sequence[int] = (),
    ) -> bool:
        """Return whether artifact `name` is whole and `write` with these arguments would record it so."""
        entry = self.entries().get(name)
        if entry is None:
            return False
        recover(self.root / name)
        made_by = _made_by(stage, code, parameters, seeds)
        alike = made_by.items() <= entry.items() and made_by.get("kernels") == entry.get("kernels")
        return alike and self._problem(name, entry) is None

    def verify(self) -> list[str]:
        """Return a sentence for each thing that is not as the manifest says; empty if all is well."""
        try:
            entries = self.entries()
        except ArtifactError as error:
            return [str(error)]
        problems = [self._problem(name, entry) for name, entry in entries.items()]
        return [problem for problem in problems if problem] + self._unlisted(entries)

    def _problem(self, name: str, entry: Mapping[str, Any]) -> str | None:
        path = self.root / name
        if not path.exists():
            return f"{path} is missing, though {self.manifest} names it"
        actual = describe(path)
        for key in ("sha256", "bytes"):
            if actual[key] != entry[key]:
                return f"{path} is not what {self.manifest} says: {key} is {actual[key]}, not {entry[key]}"
        return None

    def _remedy(self) -> str:
        if self.root == CHECKOUT / "data":
            return "`git checkout data` brings the shipped artifacts back"
        return f"the environment variable {DATA_URL} may name a folder or an address that has it"

    def _unlisted(self, entries: Mapping[str, Any]) -> list[str]:
        """Name the files, hidden ones aside, that no entry accounts for."""
        listed = [self.manifest, *(self.root / name for name in entries)]
        files = [path for path in _files(self.root) if not _is_hidden(path.relative_to(self.root))]
        strays = [path for path in files if not any(path.is_relative_to(known) for known in listed)]
        return [f"{path} is not in {self.manifest}" for path in strays]

    def _record(self, name: str, entry: Mapping[str, Any]) -> None:
        entries = self.entries() | {name: entry}
        with atomic_write(self.manifest) as draft:
            draft.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        self._checked.discard(name)

    def _fetch(self, name: str, entry: Mapping[str, Any]) -> None:
        for part, sha256 in entry.get("files", {"": entry["sha256"]}).items():
            target, source = self.root / name / part, f"{self.url}/{name}/{part}".rstrip("/")
            is_file = urlparse(source).scheme in ("", "file")
            downloader: Any = _copy if is_file else None  # pooch copies no files
            try:
                pooch.retrieve(source, f"sha256:{sha256}", target.name, target.parent, downloader=downloader)
            except (OSError, ValueError) as error:
                raise ArtifactError(
                    f"{name} cannot be fetched from {source} ({error}); {self._remedy()}"
                ) from error


def _copy(source: str, target: Any, pooch: object) -> None:
    shutil.copyfile(url2pathname(urlparse(source).path), target)


def _installed_from() -> str | None:
    """Return the address of `data/` in the commit or the folder that pip installed the package from."""
    record = importlib.metadata.distribution("dtbook").read_text("direct_url.json")
    origin = json.loads(record or "{}")
    if "dir_info" in origin:  # a checkout on this machine
        return f"{origin['url']}/data"
    if "vcs_info" not in origin:
        return None
    return f"{origin['url'].removesuffix('.git')}/raw/{origin['vcs_info']['commit_id']}/data"


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check_entry(manifest: Path, name: str, entry: object) -> None:
    """Raise ArtifactError unless the entry is one that `write` could have made."""
    if not _is_inside(name):
        raise ArtifactError(f"{manifest} is damaged: {name!r} is not a path inside {manifest.parent}")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
        raise ArtifactError(f"{manifest} is damaged: {name!r} has no size in bytes")
    if not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))):
        raise ArtifactError(f"{manifest} is damaged: {name!r} has no sha256")
    files = entry.get("files", {})
    if "files" in entry and not (isinstance(files, dict) and digest(files) == entry["sha256"]):
        raise ArtifactError(f"{manifest} is damaged: the files of {name!r} do not add up to its sha256")
    if not all(map(_is_inside, files)):
        raise ArtifactError(f"{manifest} is damaged: a file of {name!r} is not inside it")


def _made_by(stage: str, code: Sequence[Code], parameters: object, seeds: Sequence[int]) -> dict[str, Any]:
    made_by = {"stage": stage, "parameters": _plain(parameters), "seeds": [int(seed) for seed in seeds]}
    return made_by | code_behind(code) | kernels()


def _plain(parameters: object) -> dict[str, Any]:
    if dataclasses.is_dataclass(parameters) and not isinstance(parameters, type):
        parameters = dataclasses.asdict(parameters)
    try:
        return dict(json.loads(json.dumps(parameters or {}, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"parameters must hold plain JSON values, not {parameters!r} ({error})") from error
