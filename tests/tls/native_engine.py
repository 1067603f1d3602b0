"""The tests' engine that pauses natively, loaded into the libcrypto that Python uses."""

from __future__ import annotations

import _ssl
import ctypes
import subprocess
import time
from ctypes import POINTER, Structure, byref, c_int, c_uint, c_void_p
from pathlib import Path
from typing import Final

from support import unavailable

from tls.kit import PATIENCE, until

SOURCE: Final = Path(__file__).with_name("async_engine.c")


class Counts(Structure):
    """What the engine has counted, since it was installed."""

    pauses: int
    in_flight: int
    most_in_flight: int
    finished: int
    orphans: int
    in_place: int

    _fields_ = [
        (name, c_int)
        for name in ("pauses", "in_flight", "most_in_flight", "finished", "orphans", "in_place")
    ]


def build(directory: Path) -> Path:
    """Compile the engine, or skip the test; return its library."""
    path = directory / "async_engine.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(path), str(SOURCE), "-lcrypto", "-lpthread"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        unavailable("needs a C compiler: cc was not found")
    except subprocess.CalledProcessError as error:
        unavailable(f"the engine could not be compiled (OpenSSL's headers?): {error.stderr}")
    return path


def load(path: Path) -> ctypes.CDLL:
    """Load the engine, or skip the test."""
    library = ctypes.CDLL(str(path))
    if _libcrypto_of(library) != _libcrypto_of(ctypes.CDLL(_ssl.__file__)):
        unavailable("cc links to another libcrypto than Python uses")
    library.engine_set.argtypes = (c_int, c_int, c_int, c_uint)
    library.engine_counts.argtypes = (POINTER(Counts), c_int)
    return library


def _libcrypto_of(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library.OpenSSL_version_num, c_void_p).value


class NativeEngine:
    """Controls the engine; keys that are loaded while it is installed use it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._held = False
        self._uses_fds = True
        self._times = 1
        self._seconds = 0.0

    def install(self) -> None:
        assert self._library.engine_install() == 1
        self._apply()
        self._library.engine_counts(byref(Counts()), True)

    def uninstall(self) -> None:
        self.finish()
        self._library.engine_uninstall()

    def hold(self) -> None:
        """Begin no operation until `release` is called."""
        self._held = True
        self._apply()

    def release(self) -> None:
        self._held = False
        self._apply()

    def finish(self) -> None:
        """Release the engine and block until nothing is under way."""
        self.release()
        deadline = time.monotonic() + PATIENCE
        while self.counts.in_flight:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def take(self, seconds: float) -> None:
        """Have each operation take so much longer."""
        self._seconds = seconds
        self._apply()

    def repeat(self, times: int) -> None:
        """Have each operation be done so many times, each time with an fd of its own."""
        self._times = times
        self._apply()

    def use_fds(self, use: bool) -> None:
        """Have the engine provide fds, or be polled."""
        self._uses_fds = use
        self._apply()

    def _apply(self) -> None:
        microseconds = int(self._seconds * 1e6)
        self._library.engine_set(self._held, self._uses_fds, self._times, microseconds)

    @property
    def counts(self) -> Counts:
        counts = Counts()
        self._library.engine_counts(byref(counts), False)
        return counts

    async def reached(self, count: int) -> None:
        """Wait until so many operations are under way."""
        await until(lambda: self.counts.in_flight >= count)
