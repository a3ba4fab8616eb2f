"""What the caller says about one save, beside the state; refused at once if no record could hold it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncckpt.options import OnExists


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """`step`: optimizer steps completed. `metrics`: numbers by name, read now: one-element tensors may change later.

    `ValueError` or `TypeError` for anything else.
    """

    step: int
    metrics: Mapping[str, Any]
    epoch: int | None
    tags: Sequence[str]
    pinned: bool
    on_exists: OnExists
    config: Any

    def __post_init__(self) -> None:
        if type(self.step) is not int or not 0 <= self.step < 10**10:
            raise ValueError(
                f"step is the number of optimizer steps completed, an int from 0 and below 10**10, not {self.step!r}"
            )
        if self.epoch is not None and (type(self.epoch) is not int or not 0 <= self.epoch <= 2**53):
            raise ValueError(f"epoch is an int from 0, not {self.epoch!r}; a fraction of an epoch is a metric")
        if isinstance(self.tags, str) or not all(type(tag) is str for tag in self.tags):
            raise TypeError(f"tags is a sequence of strings, not {self.tags!r}")
        if not isinstance(self.pinned, bool):
            raise TypeError(f"pin is True or False, not {self.pinned!r}")
        if not isinstance(self.metrics, Mapping) or not all(type(name) is str for name in self.metrics):
            raise TypeError(f"metrics is a dict of names to numbers, not {self.metrics!r}")
        object.__setattr__(self, "metrics", {name: _number(name, value) for name, value in self.metrics.items()})
        object.__setattr__(self, "tags", tuple(self.tags))


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the metric {name!r} is a number, not {value!r}") from error
