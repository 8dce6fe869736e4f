"""Runs one program that a model wrote, in a process that has shut itself in; started as a file.

It knows nothing but the standard library. What shuts in: limits (CPU time, memory, size of a file, open
files), on Linux Landlock (of the files only the interpreter's can be read, and only the working folder
written) and seccomp (no sockets, no other processes, no reaching into them, no change of a file's rights or
times, which Landlock lets pass), and no capabilities where it is root.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
import signal
import struct
import sys
import types
from collections.abc import Iterable, Iterator

__all__ = ["main", "shut_in"]

_FILE_BYTES, _OPEN_FILES = 16 << 20, 64
_GRACE_S = 5

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446  # the same everywhere
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_SPECIAL = (1 << 6) | (1 << 9) | (1 << 10) | (1 << 11)  # devices, sockets, pipes
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
# How many rights over files each version of Landlock knows.
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_LANDLOCK_RIGHTS_NOW = 16

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as a filter is told them
# Numbers of system calls on the two, from the kernel's tables; `clone` may still make threads.
_CLONE, _CAPSET = {"x86_64": 56, "aarch64": 220}, {"x86_64": 126, "aarch64": 91}
_DENIED = """
    socket 41 198, connect 42 203, bind 49 200, socketpair 53 199, fork 57 -, vfork 58 -, execve 59 221,
    execveat 322 281, kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138,
    rt_tgsigqueueinfo 297 240, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271,
    pivot_root 155 41, chroot 161 51, mount 165 40, unshare 272 97, setns 308 268, add_key 248 217,
    request_key 249 218, keyctl 250 219, perf_event_open 298 241, open_by_handle_at 304 265, bpf 321 280,
    userfaultfd 323 282, pidfd_send_signal 424 424, io_uring_setup 425 425, pidfd_open 434 434,
    pidfd_getfd 438 438,
    shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semctl 66 191,
    semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180,
    mq_unlink 241 181, setpriority 141 140, ioprio_set 251 30, move_pages 279 239, migrate_pages 256 238,
    chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55,
    fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5,
    lsetxattr 189 6, fsetxattr 190 7, setxattrat 463 463, removexattr 197 14, lremovexattr 198 15,
    fremovexattr 199 16, removexattrat 466 466, inotify_init 253 -, inotify_init1 294 26,
    fanotify_init 300 262, syslog 103 116
"""
# Their first argument is a process; 0 is the caller, for which they are allowed.
_DENIED_TO_OTHERS = """
    prlimit64 302 261, sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118,
    sched_setattr 314 274
"""
_FCNTL = {"x86_64": 72, "aarch64": 25}
# fcntl's commands that have the kernel signal another process, by any signal.
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
# Its flags are hidden from a filter, and libraries do without it.
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_EPERM, _ENOSYS = 1, 38


def main() -> None:
    """Read the request, shut the process in, run the program and then its tests, and say that both ended.

    The first line of the result is what shuts the process in, as JSON; the second is the request's token.
    """
    request_fd, result_fd = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(request_fd, encoding="utf-8") as file:
        request = json.load(file)
    os.write(result_fd, json.dumps(_confine(request["timeout_s"], request["memory_mb"])).encode() + b"\n")
    sys.argv = ["program.py"]
    # What a program runs when it is started itself (a demonstration, a wait for input) is no part of what
    # tests ask for; tests may start themselves so.
    module = types.ModuleType("program" if request["tests"] else "__main__")
    sys.modules["program"] = sys.modules["__main__"] = module
    namespace = vars(module)
    try:
        exec(compile(request["program"], "program.py", "exec"), namespace)  # noqa: S102  # what it is for
    except SystemExit as error:
        if request["tests"] or error.code not in (None, 0):
            raise
    namespace["__name__"] = "__main__"
    exec(compile(request["tests"], "tests.py", "exec"), namespace)  # noqa: S102
    sys.stdout.flush()
    os.write(result_fd, request["token"].encode())


def _confine(timeout_s: float, memory_mb: int) -> list[str]:
    """Shut this process in; what could be put on, of `limits`, `files`, `processes and network`."""
    import resource

    signal.setitimer(signal.ITIMER_REAL, timeout_s + _GRACE_S)  # when nobody waits for it any more
    seconds = math.ceil(timeout_s)
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_AS: (memory_mb << 20, memory_mb << 20),
        resource.RLIMIT_FSIZE: (_FILE_BYTES, _FILE_BYTES),
        resource.RLIMIT_NOFILE: (_OPEN_FILES, _OPEN_FILES),
        resource.RLIMIT_CORE: (0, 0),
    }
    for limit, bounds in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS bounds no address space
            resource.setrlimit(limit, bounds)
    done = ["limits", *shut_in(writable=".")]
    if "processes and network" not in done:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # root is not bound by it
    if (number := _CAPSET.get(platform.machine())) is not None and sys.platform == "linux":
        header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), header, nothing)
    return done


def shut_in(readable: Iterable[str] = (), *, writable: str | None = None) -> list[str]:
    """Keep this process from files, others and the network; what could be put on, as in `_confine`.

    The interpreter's own files stay readable, and what lies in the given folders; nothing is put on where the
    system has no Landlock and no seccomp.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        return []
    system = ctypes.CDLL(None, use_errno=True)
    system.syscall.restype = ctypes.c_long
    nothing_more = [ctypes.c_ulong(0)] * 3
    system.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), *nothing_more)
    done = ["files"] if _allow_files(system, readable, writable) else []
    return [*done, "processes and network"] if _forbid_calls(system, machine) else done


def _allow_files(system: ctypes.CDLL, readable: Iterable[str], writable: str | None) -> bool:
    """Landlock: reading what the interpreter consists of and the given folders, anything in the writable."""
    version = system.syscall(
        ctypes.c_long(_SYS_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_VERSION)
    )
    if version < 1:
        return False
    rights = (1 << _LANDLOCK_RIGHTS.get(version, _LANDLOCK_RIGHTS_NOW)) - 1
    ruleset = struct.pack("=Q", rights)
    fd = system.syscall(
        ctypes.c_long(_SYS_LANDLOCK_CREATE), ruleset, ctypes.c_size_t(len(ruleset)), ctypes.c_uint32(0)
    )
    if fd < 0:
        return False
    reading = _READ_FILE | _READ_DIR | _EXECUTE
    places = [(path, reading) for path in (*_interpreter_paths(), *readable)]
    places += [("/dev/null", _READ_FILE | _WRITE_FILE), ("/dev/urandom", _READ_FILE)]
    if writable is not None:
        places.append((writable, rights & ~_MAKE_SPECIAL & ~_IOCTL & ~_EXECUTE))
    for path, wanted in places:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):  # noqa: PTH112  # pathlib is slow to import, and this runs a thousand times
            wanted &= _READ_FILE | _WRITE_FILE | _EXECUTE | _TRUNCATE
        rule = struct.pack("=Qi", wanted & rights, place)
        added = system.syscall(
            ctypes.c_long(_SYS_LANDLOCK_ADD),
            ctypes.c_int(fd),
            ctypes.c_int(_LANDLOCK_PATH_BENEATH),
            rule,
            ctypes.c_uint32(0),
        )
        os.close(place)
        if added < 0:
            return False
    shut = system.syscall(ctypes.c_long(_SYS_LANDLOCK_RESTRICT), ctypes.c_int(fd), ctypes.c_uint32(0))
    os.close(fd)
    return bool(shut == 0)


def _interpreter_paths() -> Iterator[str]:
    """Folders and files that the interpreter, its libraries and the installed packages lie in."""
    yield from ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
    yield from (path for path in (sys.prefix, sys.base_prefix, sys.exec_prefix) if path != "/")


def _forbid_calls(system: ctypes.CDLL, machine: str) -> bool:
    """Seccomp: sockets, processes, what reaches into others, and files' rights and times fail with EPERM."""
    # Opcodes of classic BPF: load a word of the call's data, compare, answer.
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    number, audit, first_argument, second_argument = 0, 4, 16, 24
    allow, deny, absent = 0x7FFF0000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS
    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, audit),
        (equal, 1, 0, _MACHINES[machine]),
        (answer, 0, 0, deny),  # calls by another machine's numbers, such as 32-bit ones
        (load, 0, 0, number),
        (at_least, 0, 1, 0x40000000),
        (answer, 0, 0, deny),  # x32
        (equal, 0, 1, _CLONE3),
        (answer, 0, 0, absent),
    ]
    for one in _numbers(_DENIED, machine):
        program += [(equal, 0, 1, one), (answer, 0, 0, deny)]
    for one in _numbers(_DENIED_TO_OTHERS, machine):
        program += [
            (equal, 0, 4, one),
            (load, 0, 0, first_argument),
            (equal, 1, 0, 0),
            (answer, 0, 0, deny),
            (answer, 0, 0, allow),
        ]
    program += [
        (equal, 0, 6, _FCNTL[machine]),
        (load, 0, 0, second_argument),
        (equal, 3, 0, _F_SETOWN),
        (equal, 2, 0, _F_SETSIG),
        (equal, 1, 0, _F_SETOWN_EX),
        (answer, 0, 0, allow),
        (answer, 0, 0, deny),
        (equal, 0, 3, _CLONE[machine]),
        (load, 0, 0, first_argument),
        (any_bit, 1, 0, _CLONE_THREAD),
        (answer, 0, 0, deny),
        (answer, 0, 0, allow),
    ]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    filter_ = struct.pack("@HP", len(program), ctypes.addressof(packed))
    return bool(system.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), filter_) == 0)


def _numbers(table: str, machine: str) -> list[int]:
    """The numbers on a machine of the calls that a table names; some machines lack some."""
    columns = [one.split() for one in table.split(",")]
    numbers = [column[1 + (machine == "aarch64")] for column in columns]
    return sorted(int(one) for one in numbers if one != "-")


if __name__ == "__main__":
    main()
