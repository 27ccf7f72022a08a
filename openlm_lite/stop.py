"""Requests to stop: SIGTERM, SIGUSR1 and Ctrl-C are remembered, and the loop asks for them.

    signal ──C──> byte in a pipe ─────────> insisted()   any thread, even if the main one is stuck
           └─main thread──> requested = True             the loop: agree, save, exit 75
                         └─ a second Ctrl-C ───────────> KeyboardInterrupt: end at once, unsaved
                                                         (while importing: os._exit)

Nothing slow is imported here: `openlm train` makes its StopRequest before it imports torch, so that
a signal in those seconds is remembered too. Slurm's may come a minute before it was ordered.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType

INTERRUPTED = 130
"""exit code after a second Ctrl-C, as the shell has it: 128 + SIGINT"""

_ONE_PRESS = 0.5  # s; launchers deliver one Ctrl-C twice (terminal and agent, Slurm and agent)
_ONE_PRESS_IN_PIPE = 3.0  # s; when the bytes are read says less of when they were written

_DEFAULT = signal.SIG_DFL


class StopRequest:
    """Remembers that somebody asked this process to stop; takes the signals over when made.

    Handlers belong to a process and are set in its main thread: made in another thread it leaves
    the signals alone (`listens` is False), and only `ask()` makes a request. Signals that the
    launcher had ignored (`trap '' USR1`) or blocked are listened to all the same.

    A request stays; asking again changes nothing, whichever the signals. Only a second Ctrl-C, half
    a second after the first or later, ends the process: KeyboardInterrupt in the main thread, and
    the watchdog's end where that does not get through. What is saved by then stays whole. An error
    that it became on its way (C code can answer with one of its own) leaves the `with` block as
    KeyboardInterrupt.

    With `importing`, for a command that has nothing to save yet, the process ends right there,
    until `importing` is made False: an extension module under import can swallow a
    KeyboardInterrupt, and half a module is left that fails later and elsewhere.

    Released, the signals are whose they were; with `until_exit`, for a command that has come to its
    end, they are ignored. The interpreter's own end takes a second with torch, Slurm and torchrun
    ask twice, and a run that is done may be asked just then: none of that changes the exit code.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, *, until_exit: bool = False, importing: bool = False) -> None:
        self.requested = False
        self.until_exit = until_exit
        self.importing = importing
        self.parent = os.getppid()  # who started us: a launcher that dies later is missed by this
        self.listens = threading.current_thread() is threading.main_thread()
        self._insisted = False
        self._pressed_at: float | None = None  # Ctrl-C, by the handler's clock
        self._read_at: float | None = None  # Ctrl-C, by the pipe's reader
        self._speaks = os.environ.get("RANK", "0") == "0"
        if self.listens:
            self._listen()

    def _listen(self) -> None:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        os.set_blocking(self._write_end, False)
        # blocked meanwhile: listened to all at once
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        self._fd_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on_signal) for number in self.SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def ask(self) -> None:
        """Make the request, from any thread."""
        self.requested = True

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._pressed_at is not None and now - self._pressed_at >= _ONE_PRESS:
                self._insisted = True
                if self.listens:  # else the end has come anyway
                    self._say("ending at once; what is saved stays whole")
                    if self.importing:
                        os._exit(INTERRUPTED)
                    raise KeyboardInterrupt
            if self._pressed_at is None:
                self._pressed_at = now
                self._say("stopping after this step; Ctrl-C again ends at once, unsaved")
        elif first:
            self._say(f"{signal.Signals(number).name}: stopping after this step")

    def _say(self, text: str) -> None:
        if self._speaks:
            with suppress(OSError):  # a closed terminal is no reason to fail
                # not through the logger: a signal may come while it holds its lock
                os.write(2, f"\nopenlm: {text}\n".encode())

    def insisted(self) -> bool:
        """Whether Ctrl-C came twice; told without the main thread, for one thread that asks often.

        A main thread that is stuck in C code runs no handler. The interpreter's own handler still
        writes each signal's number into the pipe, which is read here.
        """
        numbers = b""
        with suppress(OSError, AttributeError):  # nothing there; released; never listened
            numbers = os.read(self._read_end, 4096)
        if signal.SIGINT in numbers:
            now = time.monotonic()
            if self._read_at is None:
                self._read_at = now
            elif now - self._read_at >= _ONE_PRESS_IN_PIPE:
                self._insisted = True
        return self._insisted

    def release(self) -> None:
        """Give the signals back to whom they belonged, or to nobody; a second call does nothing."""
        if not self.listens:
            return
        self.listens = False
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)  # what has come by now is heard
        for number, handler in self._before.items():
            # a handler would not last: the interpreter drops all of them before its end
            signal.signal(number, signal.SIG_IGN if self.until_exit else handler or _DEFAULT)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        signal.set_wakeup_fd(self._fd_before)
        read_end, self._read_end = self._read_end, -1
        os.close(read_end)
        os.close(self._write_end)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        self.release()
        if self._insisted and isinstance(error, Exception):
            raise KeyboardInterrupt from error
