"""The signals by which people and schedulers end a program, and where a job lets them do so.

SIGINT is Ctrl-C; SIGTERM is how a scheduler takes a machine back; SIGUSR1 is what SLURM can send some time before. A
job that a signal ends leaves with 128 + its number: 130, 143, 138 (on Linux). What a program or a shell ignores, as
`nohup` does, stays ignored. Outside the main thread Python allows no handlers, and nothing here has an effect.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
AS_ONE = 2.0
"""Seconds within which two SIGINTs are one in a launch of several processes: Ctrl-C reaches each of them from the
terminal, and torchrun passes it on."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the work; the message says how far it is, and how it goes on."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {name_of(number)}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that stands for the signal."""
        return 128 + self.number


def name_of(number: int) -> str:
    """SIGTERM, for instance."""
    return signal.Signals(number).name


_met: list[int] | None = None
"""Signals that have raised something within the block of `raised`; None outside."""


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 raise `Stopped`, so that files that are half written are removed.

    Only the first: what it interrupts may clean up in peace. SIGINT raises KeyboardInterrupt, as it does in Python.
    Libraries in other languages make errors of their own of these, or lose them: whatever ends the block after a signal
    has come, it ends as that signal does.
    """
    global _met
    met = list[int]()

    def handle(number: int, frame: FrameType | None) -> None:
        met.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if len(met) == 1:
            raise Stopped(number)

    _met, around = met, _met
    try:
        with _handled(dict.fromkeys(SIGNALS, handle)):
            yield
        if met:
            raise _ending(met[0])
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if met:
            raise _ending(met[0]) from error
        raise
    finally:
        _met = around


def _ending(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


class Requests:
    """What signals have asked for since the block of `deferred` began."""

    number: int = 0
    """The first signal; 0 while there is none."""

    def __init__(self, launched: bool) -> None:
        """`launched` says that this is one of several processes of a launch."""
        self._launched, self._since, self._interrupts = launched, 0.0, False

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block the first signal raises `Stopped`: what is done there can be done again."""
        self._interrupts = True
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        except Exception as error:
            if self.number:  # what a library in another language has made of `Stopped`
                raise Stopped(self.number) from error
            raise
        finally:
            self._interrupts = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second SIGINT raises KeyboardInterrupt: whoever repeats it does not want to wait."""
        now, first = time.monotonic(), not self.number
        if first:
            self.number, self._since = number, now
        if number == signal.SIGINT and not (first or (self._launched and now - self._since < AS_ONE)):
            _remember(number)
            os.write(2, b"\nimgtok: interrupted again: leaving at once; what was saved before is whole\n")
            raise KeyboardInterrupt
        if first and number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            # not by `print`, which may be at work just now
            os.write(2, b"\nimgtok: interrupted: keeping what is done, then leaving; Ctrl-C again leaves at once\n")
        if first and self._interrupts:
            _remember(number)
            raise Stopped(number)


def _remember(number: int) -> None:
    if _met is not None:
        _met.append(number)


@contextlib.contextmanager
def deferred() -> Iterator[Requests]:
    """Within the block signals are noted, and the job looks whether there was one where it can stop."""
    requests = Requests(launched=int(os.environ.get("WORLD_SIZE", "1")) > 1)
    requests.number = _met[0] if _met else 0  # one that was raised, and lost in a library
    with _handled(dict.fromkeys(SIGNALS, requests.note)):
        yield requests


@contextlib.contextmanager
def _handled(handlers: Mapping[signal.Signals, signal._HANDLER]) -> Iterator[None]:
    before: dict[signal.Signals, signal._HANDLER] = {}
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in handlers}
        before = {number: known[number] for number in handlers if known[number] not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------ processes that help


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within the block signals wait, and processes that are started there hold them back from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(_: int = 0) -> None:
    """In a process that was started while signals were `held_back`: they do nothing, unless its parent sends them.

    Ctrl-C and many schedulers reach every process of a group: a worker that died of that would end the run before it
    has saved anything. Its parent is who asked for it, and not the server that has forked it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # multiprocessing lifts it where it starts helpers of its own
    if hasattr(signal, "sigwaitinfo"):
        asked = multiprocessing.parent_process()
        parent = os.getppid() if asked is None or asked.pid is None else asked.pid
        threading.Thread(target=_obey, args=(parent,), daemon=True).start()
    else:  # macOS cannot say who sent a signal; without SIGTERM the parent could not end this process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _obey(parent: int) -> None:
    while True:
        if signal.sigwaitinfo(SIGNALS).si_pid == parent:
            os._exit(0)
