"""What systemd and a service tell each other: readiness, watchdog, and the sockets on which systemd listens for the
service.

The protocols are sd_notify(3), datagrams to a socket, and sd_listen_fds(3), file descriptors from number 3 on. Without
systemd nothing is sent or taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time

_FIRST = 3  # SD_LISTEN_FDS_START


class ServiceManager:
    """The service manager that started this process, if any. Its environment variables are removed, so that no child
    process speaks to it in the name of this one.
    """

    def __init__(self) -> None:
        taken = {name: os.environ.pop(name, "") for name in _VARIABLES}
        own = str(os.getpid())
        self._address = taken["NOTIFY_SOCKET"]
        self._n_sockets = int(taken["LISTEN_FDS"] or 0) if taken["LISTEN_PID"] == own else 0
        is_watched = taken["WATCHDOG_PID"] in ("", own) and taken["WATCHDOG_USEC"].isdigit()
        self._beat_s = int(taken["WATCHDOG_USEC"]) / 2e6 if is_watched else None
        self._beat: asyncio.TimerHandle | None = None

    def sockets(self) -> list[socket.socket]:
        """Return the sockets on which the service manager listens for this service (a unit ``.socket``). Must be called
        only once.
        """
        found = []
        for fd in range(_FIRST, _FIRST + self._n_sockets):
            os.set_inheritable(fd, False)
            found.append(socket.socket(fileno=fd))
        return found

    def ready(self, status: str = "") -> None:
        """Tell the service manager that llamaslot serves requests, at the start or after a reload. The first call
        begins the watchdog's beats.
        """
        self._tell("READY=1", *([f"STATUS={status}"] if status else []))
        if self._beat is None:
            self._go_on()

    def reloading(self) -> None:
        """Tell the service manager that a reload has begun; ``ready`` must follow. ``Type=notify-reload`` requires the
        time in this message.
        """
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """Tell the service manager that llamaslot stops: running answers end, and slots are saved. The beats go on
        until the event loop ends.
        """
        self._tell("STOPPING=1")

    def close(self) -> None:
        if self._beat is not None:
            self._beat.cancel()

    def _go_on(self) -> None:
        """Send a beat after each half of WatchdogSec. It shows that the event loop runs."""
        if self._beat_s is not None:
            self._tell("WATCHDOG=1")
            self._beat = asyncio.get_running_loop().call_later(self._beat_s, self._go_on)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode(), address)


_VARIABLES = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")
