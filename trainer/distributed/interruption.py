"""Ctrl-C, SIGTERM and SIGUSR2 become a clean stop: all ranks agree on a step boundary, save and leave.

A signal reaches the ranks at different moments, between different collectives. So a handler only takes a note; at the
end of every step the ranks take the maximum of their notes, and act on it together. Schedulers warn by SIGTERM or, as
submitit asks SLURM to, by SIGUSR2 before the time is over.
"""

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class Interrupted(Exception):
    """Training stopped at a step boundary because of a signal, after a checkpoint was saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        """Take the signal, and the number of finished steps."""
        super().__init__(f"interrupted by {signal.Signals(signal_number).name} after step {step}; saved")
        self.signal_number = signal_number

    @property
    def exit_status(self) -> int:
        """128 + signal, as a shell reports it: 130 for SIGINT, 143 for SIGTERM, 140 for SIGUSR2."""
        return 128 + self.signal_number


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGUSR2 while the context is open. A second SIGINT acts at once, without saving."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        self._noted = 0

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        # The first one counts: a launcher may send SIGTERM to ranks that are already stopping because of SIGINT.
        self._noted = self._noted or number

    def agreed(self, group: dist.ProcessGroup) -> int:
        """Return the signal that any rank has noted, 0 for none. A collective call; one number on the CPU."""
        noted = torch.tensor(self._noted)
        dist.all_reduce(noted, dist.ReduceOp.MAX, group=group)
        return int(noted)
