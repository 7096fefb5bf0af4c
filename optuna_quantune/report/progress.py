"""Progress bars for long work: one for each stage, and one for the trials."""

from __future__ import annotations

from types import TracebackType
from typing import Final
from typing import Self

import rich.progress
from rich.console import Console


# The stage that the others are parts of.
_OUTER: Final = "trials"
# The stage that takes long before the first trial of a large space.
_LONG: Final = "predictions"


class ProgressBars:
    """Shows the stages of `tune` on a terminal, one at a time; where there is none, a line of one.

    Use it as a context manager and pass it as the `progress` callback.

    Args:
        console: Where the bars are drawn, normally stderr.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<12}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._is_told = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Moves the bar of a stage; a finished stage starts anew with the next call.

        A stage that ended early, as evaluations do, makes room for the next one.
        """
        if not self.console.is_terminal:
            if stage == _LONG and not self._is_told:
                self.console.print("Predicting the noise of configurations.")
                self._is_told = True
            return
        if stage not in self._tasks:
            for other in self._tasks.keys() - {_OUTER} if stage != _OUTER else ():
                self._bars.remove_task(self._tasks.pop(other))
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(stage))

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are shown."""
        return tuple(self._tasks)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._bars.stop()
