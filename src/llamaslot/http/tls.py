"""HTTPS. A certificate renewed on disk is used from the next connection on."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable

from llamaslot.config.tls import TlsConfig, load_certificate
from llamaslot.errors import ConfigError
from llamaslot.file_id import Watch

log = logging.getLogger(__name__)


class Certificate:
    """The certificate on disk, checked at most once a second, when a client connects.

    If it cannot be loaded (only one file of a renewal is there yet), the old one stays in use, and the log says so
    once for each change of the files.
    """

    def __init__(self, settings: TlsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if the files, right a moment ago, are not valid any more."""
        self._settings = settings
        self._watch = Watch(settings.cert, settings.key, clock=clock)
        try:
            self._latest = load_certificate(settings)
            #: The context to listen with. It has the first certificate; each connection gets the latest.
            self.context = load_certificate(settings)
        except ValueError as error:
            raise ConfigError("listen.tls", [str(error)]) from error
        self.context.sni_callback = self._connected  # also called for a connection that names no host

    def _connected(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        if self._watch.has_changed():
            self._renew()
        connection.context = self._latest

    def _renew(self) -> None:
        try:
            self._latest = load_certificate(self._settings)
        except ValueError as error:
            log.error("listen.tls: %s; the certificate read before stays in use", error)
        else:
            log.info("listen.tls: %s has changed and is in use", self._settings.cert)
