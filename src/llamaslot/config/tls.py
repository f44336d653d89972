"""``listen.tls``: the certificate for HTTPS and its key. They are loaded at the start, by ``--check``, and again when
their files have changed.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, model_validator

from llamaslot.config.values import FilePath, Section
from llamaslot.errors import ConfigError
from llamaslot.file_id import Watch

log = logging.getLogger(__name__)


def _readable(path: Path) -> Path:
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


class TlsConfig(Section):
    """The paths of two PEM files. ``cert``: the certificate, then those of its issuers (certbot's ``fullchain.pem``);
    ``key``: its private key, unencrypted.
    """

    cert: Annotated[FilePath, AfterValidator(_readable)]
    key: Annotated[FilePath, AfterValidator(_readable)]

    @model_validator(mode="after")
    def _belong_together(self) -> TlsConfig:
        load_certificate(self)
        return self


def load_certificate(settings: TlsConfig) -> ssl.SSLContext:
    """Return a TLS context with the certificate and its key. Raises ValueError, which names the file that is wrong."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    is_encrypted = False

    def password() -> str:
        nonlocal is_encrypted
        is_encrypted = True
        return ""

    try:
        context.load_cert_chain(settings.cert, settings.key, password)
    except OSError as error:
        raise ValueError(_wording(settings, error, is_encrypted)) from None
    return context


def _wording(settings: TlsConfig, error: OSError, is_encrypted: bool) -> str:
    if is_encrypted:
        return f"{settings.key} is encrypted, and llamaslot cannot ask for its password: openssl pkey -in … -out …"
    if not isinstance(error, ssl.SSLError):
        return f"{settings.cert} or {settings.key} cannot be read: {error.strerror}"
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{settings.key} is not the key of {settings.cert}"
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_verify_locations(settings.cert)
    except OSError:
        return f"{settings.cert} has no certificate in PEM ('-----BEGIN CERTIFICATE-----')"
    return f"{settings.key} has no private key in PEM ('-----BEGIN PRIVATE KEY-----')"


class Certificate:
    """The certificate on disk. When a client connects, at most once a second, its files are checked for a change, and
    loaded again.

    If changed files cannot be loaded (for example, only one file of a renewal is there yet), the old certificate stays
    in use, and one log line says so for each change of the files.
    """

    def __init__(self, settings: TlsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Load the files. Raises ConfigError if they have become invalid since the configuration was checked."""
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
            log.error(
                "listen.tls: the changed certificate cannot be used, the old one stays in use: %s", error
            )
        else:
            log.info("listen.tls: the changed certificate %s is in use", self._settings.cert)
