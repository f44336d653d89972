"""Certificates that only a test trusts, made by the ``openssl`` program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Made:
    cert: Path
    key: Path

    @classmethod
    def anew(cls, directory: Path, name: str) -> Made:
        """A new certificate for 127.0.0.1 and localhost, with ``name`` as its subject."""
        directory.mkdir(parents=True, exist_ok=True)
        made = cls(directory / "cert.pem", directory / "key.pem")
        command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
        names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
        words = [*command.split(), "-addext", names, "-keyout", str(made.key), "-out", str(made.cert)]
        subprocess.run(words, check=True, capture_output=True)
        return made

    def move_to(self, there: Made) -> None:
        """Replace the files of ``there`` by these, one after the other, as a renewal does."""
        self.cert.replace(there.cert)
        self.key.replace(there.key)
