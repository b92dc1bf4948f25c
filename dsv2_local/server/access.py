"""Who may ask: the names that the server answers to, the pages that may use it, and the keys.

A page in a browser can send requests to any address, also to this machine's own. Two things give it away: the `Origin`
that browsers add, and the `Host`, which is the attacker's name if that name was made to resolve to this machine (DNS
rebinding). Both are compared with exact lists.
"""

import hmac
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from dsv2_local.errors import InputError
from dsv2_local.values import shown

KEY_VARIABLE = "DSV2_API_KEY"
SHORTEST_KEY = 8
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::([0-9]{1,5}))?", re.ASCII)
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#@\s]+)", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A host as a URL names it: in lower case, an IPv6 address without brackets and in its shortest form.

    Attributes:
        name: a name or an address.
        port: None if it is the scheme's.
    """

    name: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Host | None":
        """A host with or without a port; None if it is neither a name nor an address."""
        found = _HOST.fullmatch(text)
        if not found or (port := int(found[2]) if found[2] else None) == 0 or (port or 1) > 65535:
            return None
        name = found[1].lower()
        if name.startswith("["):
            address = _address(name[1:-1])
            return None if address is None else cls(address, port)
        return cls(name, port)

    @property
    def loopback(self) -> bool:
        """Whether it is this machine under a name that nobody else can give it."""
        return self.name == "localhost" or (_address(self.name) is not None and ip_address(self.name).is_loopback)


def _address(text: str) -> str | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(address)


def bound_host(text: str) -> Host:
    """What `--host` names. Raises InputError if it is no name and no address."""
    host = Host.parse(f"[{text}]" if ":" in text and not text.startswith("[") else text)
    if host is None or host.port is not None:
        raise InputError(f"--host must be a name or an address, not {shown(text)}; the port has an option of its own")
    return host


@dataclass(frozen=True)
class Access:
    """What is asked of a request before it is answered.

    Attributes:
        names: hosts that the server answers to, beside loopback addresses, localhost, and the address that a connection
            came to.
        origins: pages of other servers that may use this one, as browsers write them.
        keys: SHA-256 of each key; if there is none, no key is asked for.
    """

    names: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    keys: tuple[bytes, ...] = ()

    @classmethod
    def of(
        cls, host: str, allowed_hosts: Iterable[str] = (), cors_origins: Iterable[str] = (), keys: Sequence[str] = ()
    ) -> "Access":
        """The rules that the options of `dsv2 serve` ask for.

        Args:
            host: the name or address that the server listens at.
            allowed_hosts: further names that it answers to.
            cors_origins: pages of other servers that may use it, for instance http://localhost:3000.
            keys: see `read_keys`.

        Raises:
            InputError: one of them is malformed, or other machines can reach the server and there is no key.
        """
        bound = bound_host(host)
        if not bound.loopback and not keys:
            raise InputError(
                f"other machines can reach --host {host}, so a key is needed: give --api-key-file FILE "
                f"or set {KEY_VARIABLE}"
            )
        names = {bound.name, *map(_allowed, allowed_hosts)}
        hashes = tuple(sha256(key.encode()).digest() for key in keys)
        return cls(frozenset(names), frozenset(map(_origin, cors_origins)), hashes)

    def answers_to(self, host: Host, local: str | None) -> bool:
        """Whether a request may name this host; `local` is the address that its connection came to.

        An address is never the work of a rebound name, and the one that the connection came to is the server's.
        """
        return host.loopback or host.name in self.names or (local is not None and host.name == _address(local))

    def knows(self, key: bytes) -> bool:
        """Whether this is one of the keys; takes the same time for each that is not."""
        digest = sha256(key).digest()
        return any([hmac.compare_digest(digest, each) for each in self.keys])  # noqa: C419 (all are compared)


def same_origin(origin: str, host: Host, scheme: str, vouched: bool) -> bool:
    """Whether a page is the server's own.

    Args:
        origin: of the page.
        host: that the request names.
        scheme: of the connection.
        vouched: whether the browser itself says so. The scheme may differ then: a proxy in front of this server may
            speak HTTPS.
    """
    found = _ORIGIN.fullmatch(origin)
    place = Host.parse(found[2]) if found else None
    if not found or place is None or found[1] not in _PORTS or (found[1] != scheme and not vouched):
        return False
    default = _PORTS[found[1]]
    return (place.name, place.port or default) == (host.name, host.port or default)


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The keys in a file, one a line, and that in $DSV2_API_KEY; lines that are empty or begin with # are none.

    Raises:
        InputError: the file cannot be read or has no key; a key is short, or is no visible ASCII.
    """
    keys = [environment[KEY_VARIABLE]] if environment.get(KEY_VARIABLE) else []
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
        except OSError as error:
            raise InputError(f"--api-key-file {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"--api-key-file {file} is not text in UTF-8") from None
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise InputError(f"--api-key-file {file} has no key; write one a line")
        keys += found
    for key in keys:
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"a key must be {SHORTEST_KEY} or more visible ASCII characters; one has {len(key)}")
    return keys


def _allowed(text: str) -> str:
    host = Host.parse(f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text)
    if host is None or host.port is not None:
        raise InputError(f"--allowed-host must be a name or an address without a port, not {shown(text)}")
    return host.name


def _origin(text: str) -> str:
    if not _ORIGIN.fullmatch(text.lower()):
        raise InputError(f"--cors-origin must be like http://localhost:3000, without a path, not {shown(text)}")
    return text.lower()
