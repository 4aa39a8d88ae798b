"""The notebook runner: checked parameters, cells run by papermill, a digest to tell which copy is current."""

import ast
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from pydantic import Field

from dtbook.artifacts.parameters import AnyPlain, Flag, Integer, Number, Text, check
from dtbook.artifacts.post_weights import COPY, NOTE, named_copy, noted, weights_at_hand
from dtbook.artifacts.provenance import code_behind, digest, imported_names
from dtbook.artifacts.store import ArtifactStore, atomic_write, describe

# Nobody watches a kernel of the runner, and times in progress bars would make every copy different.
KERNEL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


class NotebookError(ValueError):
    """A notebook that is not there, was given a wrong parameter, or failed; the message is one sentence."""


@dataclass(frozen=True)
class Parameter:
    """What a notebook's parameters cell declares in one line: `name = default  # unit and meaning`."""

    name: str
    default: Any
    meaning: str

    def accept(self, value: object) -> object:
        """Return `value`, or what a text says, if it has the default's type and the meaning's limits.

        Limits are words of the meaning: "at least 1", "at most 9", "above 0", "below 1", "from 0 to 1",
        "one of greedy, sampled" (to the end or a semicolon). Of a list they hold for each item; items are of the type
        of the default's, and a list whose default has some has one. A text whose meaning begins with "folder" or
        "file" is a path, which counts from the caller's folder: kernels run elsewhere. Where it begins with "subject"
        or "subjects", each text must be one that `Subject.find` finds. Raises ValueError.
        """
        if isinstance(value, str) and not isinstance(self.default, str):
            value = _literal(value)
        try:
            value = check(self.name, value, _kind_of(self.default))
        except ValueError:
            wanted = f"{type(self.default).__name__}, like {self.default!r}"
            raise ValueError(f"{self.name} must be of type {wanted}, not {value!r}") from None
        for item in value if isinstance(value, list) else [value]:
            self._check_limits(item)
        return [self._found(item) for item in value] if isinstance(value, list) else self._found(value)

    def _found(self, value: object) -> object:
        """Return a text that is a path or names a subject so that a kernel finds it, anything else as it is."""
        if _SUBJECT.match(self.meaning):
            from dtbook.model import Subject  # imports torch and TransformerLens

            return Subject.find(str(value)).name
        if value and isinstance(value, str) and _PATH.match(self.meaning):
            return str(Path(value).expanduser().absolute())
        return value

    def _check_limits(self, value: object) -> None:
        for words, *numbers in _LIMIT.findall(self.meaning):
            low, high = (float(text.replace("−", "-") or "nan") for text in numbers)
            if isinstance(value, int | float) and not _KEPT[words](value, low, high):
                limit = " to ".join(text for text in numbers if text)
                raise ValueError(f"{self.name} must be {words} {limit}, not {value!r}")
        if (choice := _CHOICE.search(self.meaning)) and str(value) not in choice[1].split(", "):
            raise ValueError(f"{self.name} must be one of {choice[1]}, not {value!r}")


_KINDS = {int: Integer, float: Number, bool: Flag, str: Text, type(None): AnyPlain}


def _kind_of(default: object) -> Any:
    """Return what a value must be to be like a default; a list that holds something says the same of its items."""
    if isinstance(default, list):
        inside = _kind_of(default[0] if default else None)
        return Annotated[list[inside], Field(min_length=min(len(default), 1))]  # type: ignore[valid-type]
    return _KINDS.get(type(default), type(default))


_KEPT: dict[str, Callable[[float, float, float], bool]] = {
    "at least": lambda value, low, _: value >= low,
    "at most": lambda value, high, _: value <= high,
    "above": lambda value, low, _: value > low,
    "below": lambda value, high, _: value < high,
    "from": lambda value, low, high: low <= value <= high,
}
_NUMBER = r"[-−]?\d[\d_]*(?:\.\d+)?(?:e-?\d+)?"
_LIMIT = re.compile(rf"\b(at least|at most|above|below|from(?= \S+ to)) ({_NUMBER})(?: to ({_NUMBER}))?")
_PATH = re.compile(r"(folder|file)\b")
_SUBJECT = re.compile(r"subjects?\b")
_CONFLICT = re.compile(r"^(<{7}|>{7})( |$)", re.MULTILINE)
_CHOICE = re.compile(r"\bone of ([^;]+?)\s*(?:;|$)")


def _literal(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Return a notebook whose code cells are Python; raise NotebookError for any other file."""
    errors: dict[str, Exception] = {}
    try:
        text = path.read_text(encoding="utf-8")
        notebook = nbformat.reads(text, as_version=4, capture_validation_error=errors)
    except (ValueError, AttributeError, TypeError, nbformat.ValidationError) as error:
        raise NotebookError(f"{path} is not a notebook: {_fault(path, error)}") from error
    if errors or not notebook.cells:
        raise NotebookError(f"{path} is not a notebook: {_first_line(*errors.values()) or 'it has no cells'}")
    for number, cell in enumerate(notebook.cells, start=1):
        if problem := _problem(cell):
            raise NotebookError(f"{path.stem}: cell {number}, `{_first_line(cell.source)}`, {problem}")
    return notebook


def _fault(path: Path, error: Exception) -> str:
    """Return why a file cannot be read as a notebook."""
    content = path.read_text(encoding="utf-8", errors="replace")
    if marker := _CONFLICT.search(content):
        return f"line {len(content[: marker.end()].splitlines())} is the marker of a merge conflict"
    if content.startswith("\ufeff"):
        return "it begins with a byte order mark: save it as UTF-8 without one"
    if isinstance(error, AttributeError | TypeError):
        return "its JSON holds no cells"
    return _first_line(error) if content.strip() else "it is empty"


def _first_line(*texts: object) -> str:
    return next(iter("".join(map(str, texts)).strip().splitlines()), "")


def _problem(cell: nbformat.NotebookNode) -> str:
    """Return what is wrong with a cell's source, as the rest of a sentence; nothing if it can be run, or be a text."""
    if _CONFLICT.search(cell.source):
        return "holds the markers of a merge conflict"
    try:
        ast.parse(_python(cell) if cell.cell_type == "code" else "")
    except (SyntaxError, ValueError) as error:
        return f"is not Python: {getattr(error, 'msg', error)}"
    return ""


def _python(cell: nbformat.NotebookNode) -> str:
    """Return a code cell's source with its magics as calls."""
    return TransformerManager().transform_cell(cell.source)


def find_notebooks(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks of `folder` in reading order: all, or those with one of these numbers or names.

    Raises NotebookError for a number or a name that none has, and for a number that two have.
    """
    found = sorted(folder.glob("[0-9]*_*.ipynb"))
    if not found:
        raise NotebookError(f"{folder} has no notebooks NN_topic.ipynb")
    chosen: set[Path] = set()
    for name in names:
        matches = [path for path in found if name in (path.stem, path.name) or _same_number(name, path)]
        if not matches:
            raise NotebookError(f"there is no notebook {name!r}: {', '.join(path.stem for path in found)}")
        if len(matches) > 1:
            both = " and ".join(path.stem for path in matches)
            raise NotebookError(f"notebook {name!r} is {both}: name one, or take the other away")
        chosen.update(matches)
    return [path for path in found if path in chosen or not names]


def _same_number(name: str, path: Path) -> bool:
    return name.zfill(2) == path.stem.partition("_")[0]


def declared_parameters(path: Path) -> dict[str, Parameter]:
    """Return the parameters that a notebook declares, in order.

    Raises NotebookError for a derived default, and for a notebook that names no Python kernel.
    """
    _check_kernel(path, read_notebook(path).metadata)
    parameters = {}
    for name, found in papermill.inspect_notebook(path).items():
        try:
            default = ast.literal_eval(found["default"])
        except (ValueError, SyntaxError) as error:
            sentence = f"{path.stem}: the default of {name} must be a plain value, not {found['default']}"
            raise NotebookError(sentence) from error
        parameters[name] = Parameter(name, default, found["help"].strip())
    return parameters


def _check_kernel(path: Path, metadata: Mapping[str, Any]) -> None:
    kernel = metadata.get("kernelspec", {})
    language = metadata.get("language_info", {}).get("name") or kernel.get("language")
    if not kernel.get("name") or language != "python":
        allowed = "name a Python kernel in its kernelspec"
        raise NotebookError(f"{path} must {allowed}, not {dict(kernel)}: save it in Jupyter with one")


def small_parameters(path: Path) -> dict[str, Any]:
    """Return the parameters under which a notebook is tested: what nbmake puts in their place, if anything."""
    tagged = [cell for cell in read_notebook(path).cells if "parameters" in cell.metadata.get("tags", [])]
    return {
        name: value
        for cell in tagged
        for name, value in cell.metadata.get("nbmake", {}).get("mock", {}).items()
    }


def check_parameters(path: Path, given: Mapping[str, object]) -> dict[str, object]:
    """Return `given`, values or their texts, in the notebook's types; raise NotebookError for a wrong one."""
    return accept_all(path.stem, declared_parameters(path), given)


def accept_all(
    whose: str, declared: Mapping[str, Parameter], given: Mapping[str, object]
) -> dict[str, object]:
    """Return `given`, values or their texts, in the declared types; raise NotebookError for a wrong one."""
    for name in given:
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise NotebookError(f"{whose} has no parameter {name!r}: it declares {known}")
    try:
        return {name: declared[name].accept(value) for name, value in given.items()}
    except ValueError as error:
        raise NotebookError(f"{whose}: {error}") from error


def notebook_digest(notebook: Mapping[str, Any]) -> str:
    """Return the sha256 of what a reader writes in a notebook: each cell's kind, source and metadata.

    Outputs, execution counts and cell ids do not count, so a notebook and its stripped copy have one digest.
    Works on an `nbformat` notebook and on the plain JSON of the file. An executed copy carries the digest of
    the source it was made from in `metadata["dtbook"]["digest"]`; the copy is stale when the two differ.
    """
    return digest(
        [[cell["cell_type"], "".join(cell["source"]), cell["metadata"]] for cell in notebook["cells"]]
    )


def inputs_digest(path: Path, parameters: Mapping[str, object], store: ArtifactStore) -> str:
    """Return the sha256 of all that a notebook's outputs follow from and that is known before it runs.

    Those are its cells, its parameters and what lies where they name a subject by its path, the code of dtbook and the
    libraries behind it, and the manifest. Whether it reads the post's weights shows when it runs: `run_notebook` puts
    them into the digest that a copy carries.
    """
    notebook = read_notebook(path)
    manifest = describe(store.manifest) if store.manifest.exists() else None
    code = code_behind(code_of(path))
    declared = declared_parameters(path) if parameters else {}
    subjects = [
        parameters[name] for name in declared if name in parameters and _SUBJECT.match(declared[name].meaning)
    ]
    return digest([notebook_digest(notebook), parameters, _contents(subjects), code, manifest])


def _contents(values: Sequence[object]) -> list[str]:
    """Return the sha256 of each file and folder that values name: there may be another one the next time."""
    each = [item for value in values for item in (value if isinstance(value, list) else [value])]
    paths = [Path(item) for item in each if isinstance(item, str) and Path(item).is_absolute()]
    return [describe(path)["sha256"] for path in paths if path.exists()]


def _with_weights(inputs: str, read: str | None) -> str:
    """Return the digest of a copy whose kernel asked for the post's weights and read these, or `NONE`."""
    return digest([inputs, read]) if read else inputs


def code_of(path: Path) -> list[str]:
    """Return the dotted names that a notebook imports."""
    return sorted(imported_names(python_of(path)))


def python_of(path: Path) -> str:
    """Return the code of a notebook, its magics as calls."""
    return "\n".join(_python(cell) for cell in read_notebook(path).cells if cell.cell_type == "code")


def is_current(target: Path, inputs: str) -> bool:
    """Return whether `target` is an executed copy that was made from `inputs`, and would be given the same weights.

    The post's weights are looked for only if the copy's kernel had asked for them.
    """
    if not target.exists():
        return False
    with suppress(NotebookError):
        made_from = read_notebook(target).metadata.get("dtbook", {})
        read = made_from.get("post_weights")
        if made_from.get("inputs") == _with_weights(inputs, read):
            return read is None or bool(read == weights_at_hand())
    return False


def run_notebook(
    path: Path, target: Path, parameters: Mapping[str, object], inputs: str, progress: str = ""
) -> None:
    """Execute a notebook in a fresh kernel, in its own folder, and write the executed copy to `target`.

    Two runs from the same inputs write the same bytes, so how long it took stands beside it, in
    `NN_topic.seconds`. The copy says which of the post's weights its kernel read. On failure there is no `target`;
    the notebook as far as it came is kept beside it as `NN_topic.failed.ipynb`, and NotebookError names notebook,
    cell and error.
    A bar with the label `progress` counts the cells; without a label there is none.
    """
    failed, seconds = target.with_suffix(".failed.ipynb"), target.with_suffix(".seconds")
    for former in (target, failed, seconds):
        former.unlink(missing_ok=True)
    start = time.perf_counter()
    source_digest = notebook_digest(read_notebook(path))
    with atomic_write(target) as draft, _asking(note := draft.with_suffix(".weights")):
        try:
            executed = papermill.execute_notebook(
                path,
                draft,
                dict(parameters),
                kernel_name="python3",
                cwd=path.parent,
                progress_bar={"desc": progress, "leave": False} if progress else False,
                kernel_manager_class=_KernelManager,
                coalesce_streams=True,
                record_timing=False,
                iopub_timeout=120,  # seconds for outputs to arrive: a busy machine, or one of ten megabytes
            )
        except (papermill.PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
            draft.replace(failed)
            where = _where(error, nbformat.read(failed, as_version=4))
            raise NotebookError(f"{path.stem} failed{where}; {failed} is the run so far") from error
        _forget_the_run(executed)
        read = noted(note)
        made_from: dict[str, Any] = {"digest": source_digest, "inputs": _with_weights(inputs, read)}
        made_from |= {"parameters": dict(parameters)} | ({"post_weights": read} if read else {})
        executed.metadata["dtbook"] = made_from
        nbformat.write(executed, draft)
    seconds.write_text(f"{time.perf_counter() - start:.1f}\n")


@contextmanager
def _asking(note: Path) -> Iterator[None]:
    """Have kernels note which weights they read, and find a copy that is named: they run in another folder."""
    if copy := named_copy():
        os.environ[COPY] = str(copy)
    os.environ[NOTE] = str(note)
    try:
        yield
    finally:
        del os.environ[NOTE]


def _where(error: Exception, run: nbformat.NotebookNode) -> str:
    if isinstance(error, papermill.PapermillExecutionError):
        cause = f"{error.ename}: {error.evalue}".splitlines()[0]
        return f" in cell [{error.exec_count}], `{error.source.splitlines()[0]}`: {cause}"
    code = [cell for cell in run.cells if cell.cell_type == "code" and cell.source]
    begun = [
        cell for cell in code if cell.metadata.get("papermill", {}).get("status", "pending") != "pending"
    ]
    cell = f" in cell [{len(begun)}], `{begun[-1].source.splitlines()[0]}`" if begun else ""
    return f"{cell}: {str(error).strip().splitlines()[0]}"


def _forget_the_run(executed: nbformat.NotebookNode) -> None:
    """Drop, in place, papermill's times, paths and random ids, and stderr: what is left follows from the inputs."""
    executed.metadata.pop("papermill", None)
    for cell in executed.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":  # progress bars count seconds, and the book leaves stderr out
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = "injected-parameters"
        elif not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)


class _ThisPython(KernelSpecManager):
    """Kernels of the Python that runs the book, whatever is registered under the user's name."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        environment = {name: os.environ.get(name, value) for name, value in KERNEL_ENVIRONMENT.items()}
        quiet = ["--IPKernelApp.log_level=40"]  # errors only: it warns of ports on the machine itself
        return KernelSpec(**get_kernel_dict(extra_arguments=quiet), env=environment)


class _KernelManager(AsyncKernelManager):
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return _ThisPython()
