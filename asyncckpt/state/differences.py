"""What a state and a checkpoint do not have in common, as a restore collects it and says it."""

from collections.abc import Iterable

from asyncckpt.errors import StateMismatchError
from asyncckpt.telling import LOG

_SHOWN = 20


def without(path: str) -> str:
    """How to restore all but what stands at this path of the state."""
    return f"put None in the place of {path!r}" if "/" in path else f"leave {path!r} out of the state"


class Differences:
    """`problems`: what cannot be restored; any of them raises. `strict` False skips what only one side has, and what has two shapes.

    `absent`: paths that only the state has, `surplus`: that only the checkpoint has, `reshaped`: those with two shapes, all of them skipped.
    """

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self.problems: list[str] = []
        self.absent: list[str] = []
        self.surplus: list[str] = []
        self.reshaped: list[str] = []
        self.found = 0
        """How much both sides have."""
        self.ways_out: list[str] = []
        """Sentences that are said once, behind the problems."""
        self.by_position: dict[str, str] = {}
        """Optimizers of which only the order of the parameters is known, by path, and why."""

    def missing(self, path: str, why: str = "missing in the checkpoint") -> None:
        """A name that only the state has."""
        if self.strict:
            self.problems.append(f"{path}: {why}")
        else:
            self.absent.append(path)

    def unexpected(self, path: str, why: str = "the state has no such name") -> None:
        """A name that only the checkpoint has."""
        if self.strict:
            self.problems.append(f"{path}: unexpected, {why}")
        else:
            self.surplus.append(path)

    def report(self, paths: Iterable[str]) -> None:
        """Raise if anything cannot be restored, or if nothing would be. `paths`: of the tensors that will be."""
        if self.problems:
            shown = "".join(f"\n  {problem}" for problem in self.problems[:_SHOWN])
            more = f"\n  and {len(self.problems) - _SHOWN} more" if len(self.problems) > _SHOWN else ""
            raise StateMismatchError(
                f"the state and the checkpoint differ in {len(self.problems)} place(s); nothing was loaded:{shown}{more}\n"
                + "\n".join(
                    [
                        *self.ways_out,
                        "Build the state as it was when it was saved; strict=False skips names that only one side has",
                    ]
                )
            )
        skipped = [f"{path} is missing in the checkpoint" for path in self.absent]
        skipped += [f"{path} is missing in the state" for path in self.surplus]
        skipped += [f"{path} has another shape" for path in self.reshaped]
        if skipped and not self.found:
            raise StateMismatchError(
                "the state and the checkpoint have nothing in common, so strict=False would load nothing:"
                + "".join(f"\n  {one}" for one in skipped[:_SHOWN])
            )
        self._tell_of_empty(paths)
        for path, why in self.by_position.items():
            LOG.warning(
                "%r is restored by the order of its parameters, because %s: layers of one shape that changed places since get each other's "
                "moments. Save and restore the optimizer itself, beside its model",
                *(path, why),
            )

    def _tell_of_empty(self, paths: Iterable[str]) -> None:
        """Of what gets nothing at all: strict=False skips names, and a prefix too many skips them all."""
        got = {path.partition("/")[0] for path in paths}
        lacking = {path.partition("/")[0] for path in [*self.absent, *self.reshaped]}
        if empty := sorted(lacking - got):
            LOG.warning(
                "strict=False: nothing is loaded into %s; Restored.missing, unexpected and reshaped name what was left alone",
                ", ".join(map(repr, empty[:_SHOWN])),
            )
