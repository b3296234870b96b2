"""The base of all parts of a recipe."""

from __future__ import annotations

from typing import Any, LiteralString, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

TRUE_AS_NUMBER: LiteralString = "true_as_number"  # type of this error, which is of a section and names its field


class Section(BaseModel):
    """Frozen; unknown keys are errors; numbers are finite, and true is none."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            found = next((part for part in parts if isinstance(part, bool)), None)
            if found is None or name not in cls.model_fields:
                continue
            kinds = _kinds(cls.model_fields[name].annotation)
            if (int in kinds or float in kinds) and bool not in kinds and Any not in kinds:
                about: dict[str, Any] = {"field": name, "found": found}
                raise PydanticCustomError(TRUE_AS_NUMBER, "Expected a number, received {found}", about)
        return values


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation is made of."""
    return [annotation, *(kind for part in get_args(annotation) for kind in _kinds(part))]
