"""What a parameter may be: checked and cast in one place, and refused in one sentence that says what is allowed.

A number of NumPy's is taken as Python's, and 1e3 as the integer that it is; True is no number, and no text is one.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache, wraps
from numbers import Real
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar, get_type_hints

import numpy as np
from pydantic import AfterValidator, AllowInfNan, BeforeValidator, Field, Strict, TypeAdapter, ValidationError

P = ParamSpec("P")
R = TypeVar("R")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _integer(value: Any) -> Any:
    """Return a number without a fraction as an int (of inf and nan, % makes nan), anything else as it is."""
    return int(value) if _is_number(value) and value % 1 == 0 else value


def _plain(value: Any) -> Any:
    """Return what NumPy or PyTorch holds as Python does, anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _real(value: Any) -> Any:
    with suppress(OverflowError):
        return float(value) if _is_number(value) else value
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it is not finite")
    return value


def _flag(value: Any) -> Any:
    return bool(value) if isinstance(value, np.bool_) else value


AS_INTEGER, AS_NUMBER = BeforeValidator(_integer), BeforeValidator(_real)
"""The last word of a kind of one's own, after its bounds."""
FINITE = AllowInfNan(False)
Flag = Annotated[bool, Strict(), BeforeValidator(_flag)]
Text = Annotated[str, Strict()]
Integer = Annotated[int, Strict(), AS_INTEGER]
Whole = Annotated[int, Strict(), Field(ge=0), AS_INTEGER]
"""An integer from 0 on, as seeds are."""
Integers = Annotated[Sequence[Integer], Field()]
Count = Annotated[int, Strict(), Field(ge=1), AS_INTEGER]
Number = Annotated[float, Strict(), FINITE, AS_NUMBER]
NotNegative = Annotated[float, Strict(), FINITE, Field(ge=0), AS_NUMBER]
Positive = Annotated[float, Strict(), FINITE, Field(gt=0), AS_NUMBER]
Share = Annotated[float, Strict(), FINITE, Field(ge=0, le=1), AS_NUMBER]
AnyPlain = Annotated[Any, AfterValidator(_finite)]
"""Anything, but no number that is not finite."""

_ADAPTERS = cache(TypeAdapter)
_NOUNS = {"integer": "an integer", "number": "a finite number", "boolean": "True or False"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    """Raise ValueError, in one sentence: what a parameter is, and what it must be."""
    shown = " ".join(repr(_plain(value)).split())
    shown = shown if len(shown) < 100 else f"{shown[:99]}…"
    raise ValueError(f"{name} is {shown}; it must be {allowed}.")


def require(condition: Any, name: str, value: Any, allowed: str) -> None:
    """Raise ValueError, as `refuse`, unless the condition holds."""
    if not condition:
        refuse(name, value, allowed)


def check(name: str, value: Any, kind: Any) -> Any:
    """Return a value cast to a kind such as `Count`; raise ValueError naming it where it is none."""
    with suppress(ValidationError):  # whose words are many lines
        return _ADAPTERS(kind).validate_python(_plain(value))
    refuse(name, value, _allowed(_ADAPTERS(kind).json_schema()))


def cast(name: str, values: Any, dtype: Any) -> np.ndarray:
    """Return numbers as an array of a dtype; raise ValueError where one would be cut off or is not finite."""
    array, wanted = np.asarray(values), np.dtype(dtype)
    if array.dtype.kind not in "biuf":
        refuse(name, values, f"numbers that {wanted} holds")
    with np.errstate(invalid="ignore", over="ignore"):
        result = array.astype(wanted, copy=False)
    if array.dtype == wanted and wanted.kind != "f":
        return result
    kept = np.isfinite(result) if wanted.kind == "f" else result == array
    if not kept.all():
        refuse(name, array[~kept][0].item(), f"a number that {wanted} holds, in every row")
    return result


def check_finite(name: str, weights: Mapping[str, Any]) -> None:
    """Raise ValueError naming the model and the first weight that holds a number which is not finite."""
    if wrong := not_finite(weights):
        raise ValueError(f"{name} has numbers in {wrong} that are not finite; every weight must be finite.")


def not_finite(weights: Mapping[str, Any]) -> str:
    """Return the name of the first tensor that holds a number which is not finite; an empty text if none does."""
    return next((name for name, weight in weights.items() if not weight.isfinite().all()), "")


def _allowed(schema: Mapping[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "enum" in schema:
        return f"one of {', '.join(sorted(map(repr, schema['enum'])))}"
    if "items" in schema:
        return f"a list{' that is not empty' if 'minItems' in schema else ''}, each item {_allowed(schema['items'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    noun = _NOUNS.get(schema.get("type", ""), f"a {schema.get('title', 'mapping')}")
    if low is not None and high is not None:
        return f"{noun} from {low} to {high}"
    return noun + " and".join(f" {sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema)


class Checked:
    """A frozen dataclass whose fields are checked and cast when it is made; ValueError names the one that is off."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, kind in _kinds(cls).items():
            object.__setattr__(self, name, check(f"{cls.__name__}.{name}", getattr(self, name), kind))


@cache
def _kinds(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check and cast those arguments whose annotations are of this module's kinds, before the function runs."""

    @wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        signature, kinds = _signature(function)
        bound = signature.bind(*args, **kwargs)
        for name in kinds.keys() & bound.arguments.keys():
            bound.arguments[name] = check(name, bound.arguments[name], kinds[name])
        return function(*bound.args, **bound.kwargs)

    return checking


@cache
def _signature(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    """Return a function's signature and the kinds in it; not before it is called, as names it uses may come later."""
    signature = inspect.signature(function, eval_str=True)
    named = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return signature, {name: kind for name, kind in named.items() if hasattr(kind, "__metadata__")}
