"""The programs that a profile's `credential_process` names, with an end to what one may take."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.credentials import AssumeRoleProvider, ProcessProvider, ProfileProviderBuilder
from botocore.exceptions import CredentialRetrievalError
from botocore.session import Session

from asyncckpt.store.base import Progress

PROGRAM_S = 45.0
"""Longer than somebody needs to answer a prompt on a phone. botocore itself waits for ever, and a worker that gives no sign of life is replaced."""
_SLICE_S = 1.0
_REMEMBER_S = 10.0  # others that wait for the same answer need not wait as long again
_ANSWER_S = 30.0  # of an STS that is asked for a role


class Programs:
    """Starts them as botocore does. One that gives no answer for `patience_s` is ended, and named in the error."""

    def __init__(self, progress: Progress = lambda: None, *, patience_s: float = PROGRAM_S) -> None:
        self._progress = progress
        self._patience_s = patience_s
        self._hung: dict[str, float] = {}  # the program to when it was ended

    def watch(self, session: Session) -> Session:
        """Have the session start its programs here, those of the profiles that a role's profile names too."""
        session.set_default_client_config(
            Config(connect_timeout=10, read_timeout=_ANSWER_S, retries={"total_max_attempts": 1, "mode": "standard"})
        )
        for provider in session.get_component("credential_provider").providers:
            self._watch(provider)
            if isinstance(provider, AssumeRoleProvider):
                provider._profile_provider_builder = _Builder(session, self)  # type: ignore[attr-defined]
        return session

    def _watch(self, provider: object) -> None:
        if isinstance(provider, ProcessProvider):
            provider._popen = self._start  # type: ignore[attr-defined]

    def _start(self, command: Sequence[str], **options: Any) -> "_Program":
        if time.monotonic() - self._hung.get(command[0], -_REMEMBER_S) < _REMEMBER_S:
            raise self._error(command[0])
        return _Program(self, command, **options)

    def _gave_up(self, program: str) -> CredentialRetrievalError:
        self._hung[program] = time.monotonic()
        return self._error(program)

    def _error(self, program: str) -> CredentialRetrievalError:
        said = f"the credential_process {program!r} gave no answer for {self._patience_s:g} s, and was ended"
        return CredentialRetrievalError(provider=ProcessProvider.METHOD, error_msg=said)


class _Builder(ProfileProviderBuilder):
    def __init__(self, session: Session, programs: Programs) -> None:
        super().__init__(session)
        self._programs = programs

    def providers(self, *args: Any, **options: Any) -> Any:
        found = super().providers(*args, **options)
        for provider in found:
            self._programs._watch(provider)
        return found


class _Program(subprocess.Popen[bytes]):
    def __init__(self, programs: Programs, command: Sequence[str], **options: Any) -> None:
        self._programs = programs
        self._name = command[0]  # its arguments may be secret
        super().__init__(command, **options)

    def communicate(self, input: bytes | None = None, timeout: float | None = None) -> tuple[bytes, bytes]:  # noqa: A002, ARG002 - as in the standard library
        end_s = time.monotonic() + self._programs._patience_s
        while True:
            self._programs._progress()
            left_s = end_s - time.monotonic()
            try:
                return super().communicate(timeout=max(0.0, min(_SLICE_S, left_s)))
            except subprocess.TimeoutExpired:
                if left_s <= 0:
                    _end(self.pid)
                    self.__exit__(None, None, None)
                    raise self._programs._gave_up(self._name) from None


def _end(pid: int) -> None:
    """Kill a process, and first what it has started: a shell's last command outlives the shell."""
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            _end(int(child))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
