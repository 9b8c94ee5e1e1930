"""Compiles C++ sources into a shared library at first use, and keeps it for later processes.

Its name in the cache, ``$DIST_EMA_CACHE`` or ``~/.cache/dist_ema``, depends on the sources, the compiler and the
processor. If several processes start together, one compiles under a lock, and the others wait for its file, which is
renamed into place when it is complete. If the directory cannot be written, or not be locked in time, each process
compiles for itself in a temporary directory.

A loaded library runs with the rights of this user. So a library is used from the cache only if no other user could have
put it there: the folder and the file belong to this user or to root, and only the owner may write them. Otherwise each
process compiles for itself, and logs that.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

#: Seconds that a compiler may take. It needs one or two.
COMPILER_TIMEOUT = 120.0
#: Seconds that a process waits for another one to compile, before it does so itself.
PATIENCE = 60.0
_LOCK = "lock"
_OPTIONS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
# No -ffast-math, which drops the tests for NaN; no contraction, so that only what is written as fused is.
_OPTIONS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


class BuildError(Exception):
    """Raised if the kernel cannot be built or computes wrong results; the message says why."""


def build(sources: Sequence[Path]) -> tuple[Path, ctypes.CDLL]:
    """Loads the library from the cache, or compiles it and puts it there. Returns its path and the library.

    Raises:
        BuildError: there is no compiler, it fails, or it takes too long.
        OSError: a file cannot be written, or the library cannot be loaded.
    """
    compiler = _compiler()
    command = [*compiler, *_OPTIONS, *_machine_options()]
    texts = [source.read_text() for source in sources]
    facts = [*texts, *command, _run([*compiler, "--version"]), _processor()]
    name = f"native-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.so"
    with suppress(OSError, RuntimeError):  # not there, damaged, or nobody knows where home is
        return _kept(_cache() / name)
    with _turn():
        try:
            return _kept(_cache() / name)  # compiled meanwhile
        except UntrustedError as error:
            logger.warning("Compiling the kernels for this process alone: %s", error)
        except (OSError, RuntimeError):
            pass
        logger.info("Compiling the kernels for the CPU with %s, which takes seconds", shlex.join(compiler))
        # Private: in a shared directory somebody else could lay a library of that name. A loaded one can be deleted.
        with tempfile.TemporaryDirectory(prefix="dist_ema_") as folder:
            built = Path(folder) / name
            _run([*command, *map(str, sources), "-o", str(built)])
            try:
                return _kept(_keep(built))
            except (OSError, RuntimeError) as error:
                logger.info("The compiled kernels are not kept for the next process: %s", error)
                return built, ctypes.CDLL(str(built))


class UntrustedError(OSError):
    """Raised if another user may write the folder or the file; the message says which, and what to do."""


def _cache() -> Path:
    named = os.environ.get("DIST_EMA_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "dist_ema"


def _made_cache() -> Path:
    """Returns the folder of the cache, which is made for this user alone if it is missing. Raises UntrustedError,
    OSError.
    """
    folder = _cache()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder, folder.stat())
    return folder


def _check_private(path: Path, found: os.stat_result) -> None:
    """Raises UntrustedError unless ``path`` belongs to this user or to root, and only the owner may write it."""
    if found.st_uid not in (os.geteuid(), 0):
        raise UntrustedError(
            f"{path} belongs to another user ({found.st_uid}): set DIST_EMA_CACHE to a folder of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UntrustedError(f"other users may write {path}: run chmod go-w on it, or set DIST_EMA_CACHE")


@contextmanager
def _turn() -> Iterator[None]:
    """Holds the lock of the cache, if it can be had in time. If a process dies, the system releases its lock."""
    try:
        lock = _Lock(_made_cache() / _LOCK)
    except (OSError, RuntimeError):  # nothing can be kept there, so nobody has to wait for anybody
        yield
        return
    try:
        lock.wait()
        yield
    finally:
        lock.release()


class _Lock:
    """Locks a file. A thread waits for the lock, because on NFS without a lock manager even a non-blocking request
    hangs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
        )  # NFS locks only what may be written
        self._answered = threading.Event()
        self._ending = threading.Lock()
        self._waiting = True
        self._wanted = True
        threading.Thread(target=self._take, name="dist_ema lock", daemon=True).start()

    def _take(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.utime(self._descriptor)  # tells others how long it has been held
        except OSError as error:  # the file system has no locks
            logger.info("Processes may compile the same kernels side by side: no lock on %s: %s", self._path, error)
        with self._ending:
            self._waiting = False
            if not self._wanted:
                self._close()
        self._answered.set()

    def wait(self) -> None:
        """Returns when it has the lock, if the file system has no locks, or after the longest allowed wait."""
        if self._answered.wait(0.1):
            return
        logger.info("Waiting for another process that compiles the kernels for the CPU")
        if not self._answered.wait(PATIENCE):
            logger.warning(
                "Compiling the kernels without the lock %s: another process has held it for %.0f s. If that process "
                "hangs, end it",
                self._path,
                time.time() - self._path.stat().st_mtime,
            )

    def release(self) -> None:
        """Releases the lock, or lets the thread release it once it has it."""
        with self._ending:
            self._wanted = False
            if not self._waiting:
                self._close()

    def _close(self) -> None:
        with suppress(OSError):  # a child forked meanwhile has the file open too, and would keep the lock
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def _keep(built: Path) -> Path:
    """Copies the library into the cache so that no process sees a part of it. Returns its path there. Raises
    OSError.
    """
    folder = _made_cache()
    temporary = folder / f".{uuid.uuid4().hex}.so"
    code = built.read_bytes()
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(code + hashlib.sha256(code).digest())  # the loader does not mind what follows
        temporary.replace(folder / built.name)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / built.name


def _kept(path: Path) -> tuple[Path, ctypes.CDLL]:
    """Loads a library that ``_keep`` wrote.

    Raises:
        UntrustedError: another user may have written it.
        OSError: it is missing or damaged. Loading a damaged library could end the process.
    """
    # The folder first: the loader opens the file again by its name, which nobody else may then give to another file.
    _check_private(path.parent, path.parent.stat())
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        _check_private(path, os.fstat(file.fileno()))
        content = file.read()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise OSError(f"{path} is damaged")
    return path, ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """Returns ``$CXX``, which may have arguments, or the first compiler that is found."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]):
        return named
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler ($CXX, c++, g++, clang++) was found")


def _machine_options() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    options = ["-mprefer-vector-width=512"]  # compilers choose 256 by themselves, which is slower here
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        options.append("-DDIST_EMA_NO_FMA")  # torch then multiplies and adds in two roundings
    return options


def _processor() -> str:
    """Returns what ``-march=native`` depends on, because machines of different kinds may share a home directory."""
    facts = [platform.system(), platform.machine(), *platform.libc_ver()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    keys = ("model", "flags", "features", "cpu family", "cpu implementer", "cpu part")
    return "\n".join([*facts, *(line for line in lines if line.lower().startswith(keys))])


def _run(command: Sequence[str]) -> str:
    """Runs a compiler and returns the end of its output. Raises BuildError if it fails or takes too long."""
    # Into a file and in a session of its own: a compiler's children would otherwise survive a timeout, and hold a pipe.
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise BuildError(f"{command[0]}: {error}") from error
        try:
            code = process.wait(COMPILER_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{shlex.join(command)} took more than {COMPILER_TIMEOUT:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        log = output.read().decode(errors="replace").strip()[-2000:]
    if code:
        raise BuildError(f"{shlex.join(command)} failed with {code}: {log}")
    return log
