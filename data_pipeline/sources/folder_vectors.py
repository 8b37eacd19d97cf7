"""Class labels of whole images: from files, from cells of a table, or from the names of folders."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator, model_validator

from configs.errors import UserError
from configs.section import Section
from configs.tasks import TaskSpec
from data_pipeline.sample import AnyArray
from data_pipeline.sources.class_map import Key, check_once, check_ranges, numbers_of
from data_pipeline.sources.folder_labels import class_code

# A logit whose softmax is exactly 0 in float32 beside any that a network gives, and still a finite number.
_NEVER = -1e4


class VectorLabel(Section):
    """The class of an image, or a number for every class."""

    path: str | None = None
    """Pattern of files below the root that hold the vector."""
    key: str | None = None
    """Name of the array inside an npz or mat file."""
    value: str | None = None
    """Field (column, or part of a file's name) that holds the class."""
    values: tuple[str, ...] = ()
    """Fields that hold one number per class; `p_*` stands for all that fit it, in their order."""
    given: Literal["class", "probabilities", "logits"] | None = None
    """What the numbers of `path` or `values` are; default: what the task stores."""
    map: dict[Key, Key] | None = None
    """Id or name in `value` -> class of the task; without it the value is the class."""
    classes: tuple[Key, ...] = ()
    """Class of each number, where not all classes of the task have one."""

    @field_validator("values", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @model_validator(mode="after")
    def _check(self) -> "VectorLabel":
        if (self.path is not None) + (self.value is not None) + bool(self.values) != 1:
            raise ValueError("give one of `path`, `value` and `values`")
        check_ranges(list(self.map or ()))
        check_once(list(self.map or ()))
        if self.map is not None and self.value is None:
            raise ValueError("`map` is for the class in `value`")
        if self.given is not None and self.value is not None:
            raise ValueError("`value` is always the class: leave `given` out, or give `values`")
        if self.classes and (self.value is not None or self.given == "class"):
            raise ValueError("`classes` are those of several numbers, but here is one class: leave it out")
        if self.key is not None and self.path is None:
            raise ValueError("`key` names an array in the file at `path`: give a `path`, or leave it out")
        return self

    def check_task(self, spec: TaskSpec) -> None:
        """Check the classes.

        Raises:
            ValueError: the task has no such class.
        """
        for target in (*(self.map or {}).values(), *self.classes):
            class_code(spec, target)

    def fields(self, known: list[str]) -> list[str]:
        """Return the fields that hold the label, patterns resolved.

        Args:
            known: names of all fields, in order.
        """
        wanted = [self.value] if self.value is not None else self.values
        return [name for want in wanted for name in _fitting(want, known)]

    def from_fields(self, spec: TaskSpec, fields: Mapping[str, str]) -> NDArray[np.float32] | None:
        """Return the label that fields hold; None if all of them are empty.

        Raises:
            UserError: a class that is unknown, numbers that are none, or some of them missing.
        """
        names = self.fields(list(fields))
        texts = [fields[name].strip() for name in names]
        if not any(texts):
            return None
        if self.value is not None:
            return self._of_class(spec, self._class(spec, texts[0]))
        try:
            numbers = np.array(list(map(float, texts)))
        except ValueError:
            bad = next(index for index, text in enumerate(texts) if not _is_number(text))
            raise UserError(f"field '{names[bad]}' holds '{texts[bad]}', which is no number") from None
        return self.from_array(spec, numbers)

    def from_array(self, spec: TaskSpec, array: AnyArray) -> NDArray[np.float32]:
        """Return the label that an array holds, of any shape.

        Raises:
            UserError: another number of values, or values that cannot be what they are said to be.
        """
        if array.dtype.kind not in "biuf":
            raise UserError(f"the label holds {array.dtype} of shape {array.shape}, but must hold numbers")
        numbers = array.reshape(-1).astype(np.float64)
        if self.given == "class":
            if numbers.size != 1 or numbers[0] != np.rint(numbers[0]):
                raise UserError(f"the label holds {numbers.size} numbers, but must be the number of one class")
            return self._of_class(spec, _code(spec, int(numbers[0])))
        expected = len(self.classes) or spec.channels
        if numbers.size != expected:
            raise UserError(f"the label holds {numbers.size} numbers, but there are {expected} classes")
        if not np.isfinite(numbers).all():
            raise UserError("the label holds values that are not finite")
        given = self.given or ("logits" if spec.target == "class_logits" else "probabilities")
        if given == "probabilities" and not (numbers.min() >= 0.0 and numbers.sum() > 0.0):
            raise UserError("the label holds no probabilities: some are negative, or all are 0")
        return self._of_numbers(spec, numbers, given)

    def _class(self, spec: TaskSpec, text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else None
        if self.map is None:
            return _code(spec, text if number is None else number)
        for source, target in self.map.items():
            if str(source) == text or (number is not None and number in numbers_of([source])):
                return class_code(spec, target)
        raise UserError(f"field '{self.value}' holds '{text}', which `map` does not name: add it")

    def _of_class(self, spec: TaskSpec, code: int) -> NDArray[np.float32]:
        return self._of_numbers(spec, np.eye(spec.channels)[code], "probabilities", whole=True)

    def _of_numbers(
        self, spec: TaskSpec, numbers: NDArray[np.float64], given: str, whole: bool = False
    ) -> NDArray[np.float32]:
        """(C,) as the task stores it; classes without a number get the probability 0."""
        logits = spec.target == "class_logits"
        if given == "probabilities" and logits:
            with np.errstate(divide="ignore"):
                numbers = np.log(numbers).clip(min=_NEVER)
        elif given == "logits" and not logits:
            numbers = np.exp(numbers - numbers.max())
            numbers /= numbers.sum()
        if not self.classes or whole:
            return numbers.astype(np.float32)
        vector = np.full(spec.channels, _NEVER if logits else 0.0, np.float32)
        vector[[class_code(spec, target) for target in self.classes]] = numbers
        return vector


def _fitting(want: str, known: list[str]) -> list[str]:
    return [want] if want in known or "*" not in want else [name for name in known if fnmatchcase(name, want)]


def _code(spec: TaskSpec, target: Key) -> int:
    try:
        return class_code(spec, target)
    except ValueError as error:
        raise UserError(str(error)) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
