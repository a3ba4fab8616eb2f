"""What a host may refuse a process: a system call, by a real seccomp filter as containers have one; and /proc.

Each holds for the calling thread and whatever it starts afterwards, and cannot be taken back.
"""

import ctypes
import os
import platform
import struct

_NUMBERS = {  # linux/arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h
    "x86_64": {"memfd_create": 319, "pidfd_open": 434, "setpriority": 141, "socketpair": 53, "sched_getaffinity": 204},
    "aarch64": {
        "memfd_create": 279,
        "pidfd_open": 434,
        "setpriority": 140,
        "socketpair": 199,
        "sched_getaffinity": 123,
    },
}
KNOWN = _NUMBERS.get(platform.machine(), {})
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x00020000, 0x4000, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(call: str, code: int) -> None:
    """From now on the kernel answers this system call with this errno."""
    steps = [
        (_LOAD_WORD, 0, 0, 0),  # the call's number
        (_JUMP_IF_EQUAL, 0, 1, KNOWN[call]),
        (_RETURN, 0, 0, _ERRNO | code),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = _Program(len(steps), b"".join(struct.pack("=HBBI", *step) for step in steps))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program)))


def hide_proc() -> None:
    """From now on /proc is an empty folder, here alone. `PermissionError` for those who may not mount."""
    _check(_libc.unshare(_CLONE_NEWNS))
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    _check(_libc.mount(b"none", b"/proc", b"tmpfs", 0, None))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
