"""The values of single settings: sizes, times, paths, addresses. Each fault says what is expected."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from llamaslot.sizes import number, parse_size


def anchored(path: Path, info: ValidationInfo) -> Path:
    """Return ``path`` as absolute path: ``~`` is expanded, and a relative path starts at the directory of the
    configuration file (``info.context``), else at the working directory. Raises ValueError for an empty path or an
    unknown home.
    """
    if str(path) == ".":
        raise ValueError("should be a path, and is empty")
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such home directory") from error
    directory: Path = (info.context or {}).get("directory") or Path.cwd()
    return directory / path


def address_of(url: str) -> tuple[str, int, str] | None:
    """Return host, port and path of a URL; None if it is no URL. Two results are equal only if both URLs surely lead to
    the same server.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    if not host or port is None:
        return None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.rstrip(".")
        return ("127.0.0.1" if name == "localhost" else name), port, parts.path.rstrip("/")
    # 0.0.0.0 and 127.0.0.2 too lead to this machine, where llama-server listens on one address or on every one.
    is_here = address.version == 4 and (address.is_loopback or address.is_unspecified)
    return ("127.0.0.1" if is_here else str(address)), port, parts.path.rstrip("/")


def server_url(url: str) -> str:
    """Return the URL without a slash at its end. Raises ValueError unless it is ``http[s]://host[:port][/prefix]``."""
    if "://" not in url:
        raise ValueError(f"should begin with http:// or https://; did you mean http://{url}?")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL that can be used ({error}); one is http://127.0.0.1:8080") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"should begin with http:// or https://, not {parts.scheme}://")
    if not parts.hostname or port == 0:
        raise ValueError(f"should name a host and a port, such as http://127.0.0.1:8080; not {url!r}")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "should be an address only, without user, query or fragment; a key goes into api_key"
        )
    path = parts.path.rstrip("/")
    if path.endswith("/v1"):
        raise ValueError("should be llama-server's root, without the /v1 at its end")
    return f"{parts.scheme}://{parts.netloc}{path}"


def read_key(path: Path) -> str:
    """Return the key in a file that has only this one line. Raises ValueError if the file cannot be read, is empty or
    has more lines.
    """
    try:
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ValueError(f"{path} cannot be read: {why}") from error
    if not key or "\n" in key:
        raise ValueError(
            f"{path} should hold the key alone, on one line; it {'has more' if key else 'is empty'}"
        )
    return key


def strong_key(key: str) -> None:
    """Raise ValueError if ``key`` is short enough to be found by trying: less than 16 characters, or with blanks."""
    if len(key) < 16 or not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            "should be at least 16 letters, digits and signs without blanks: openssl rand -hex 32"
        )


def origin(text: str) -> str:
    """Return an origin in lower case: ``*``, or as browsers send it, ``https://chat.example.org:8443``. Raises
    ValueError for another text.
    """
    if text != "*" and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@]+", text):
        raise ValueError(
            "should be '*' (any page), or an origin such as https://chat.example.org: scheme, host and port, "
            f"no slash at its end; not {text!r}"
        )
    return text.lower()


def key_file(path: Path) -> Path:
    read_key(path)
    return path


def chat_file(path: Path) -> Path:
    read_chat_file(path)
    return path


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]


Count = Annotated[int, BeforeValidator(number), Field(ge=0)]


Port = Annotated[int, BeforeValidator(number), Field(ge=1, le=65535)]


Seconds = Annotated[float, BeforeValidator(number), Field(ge=0, allow_inf_nan=False)]


FilePath = Annotated[Path, AfterValidator(anchored)]


class Section(BaseModel):
    """The base class of the sections of the configuration. Instances are frozen; an unknown key is a fault.

    pydantic builds the validators of all sections together with that of ``Config``, or at the first use: building each
    one at import takes 20 ms in all. Defaults are made by ``model_construct``, which needs no validator.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)


def read_chat_file(path: Path) -> dict[str, Any]:
    """Return the chat body in a JSON file: an object with ``messages``. Raises ValueError with the fault
    of the file.
    """
    try:
        body = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ValueError(
            f'{path} should hold a chat body: an object with "messages", and "tools" if there are any'
        )
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f'{path}: "messages" is missing or empty; its system message and its tools are what is kept'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{path}: messages[{i}] should be an object with "role" and "content"')
    return body
