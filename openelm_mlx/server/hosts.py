"""Hosts and origins: by which names this server may be called, and which web pages may call it."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import final
from urllib.parse import urlsplit

from ..errors import SettingError
from .settings import ServerSettings


@final
class Hosts:
    """Which names in the Host header are this server's.

    A page elsewhere can make a browser ask this machine, by a name of its own that leads here (DNS rebinding): then the
    header has that name. An address that is written out cannot be such a name, so that one is allowed where the server
    listens to others than this machine.
    """

    def __init__(self, settings: ServerSettings, own_name: str | None = None) -> None:
        self._names = {each.lower().strip("[]").rstrip(".") for each in settings.allow_hosts}
        self._any_address = not is_loopback(settings.host)
        if self._any_address:
            own_name = (socket.gethostname() if own_name is None else own_name).lower()
            self._names |= {own_name, f"{own_name.partition('.')[0]}.local"}

    def allows(self, header: str) -> bool:
        """Whether a Host header is allowed, whatever port it has."""
        name = host_name(header)
        if name is None:
            return False
        return name in self._names or (self._any_address and _is_address(name)) or is_loopback(name)


_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d{1,5})?")


def host_name(header: str) -> str | None:
    """The name or address of a Host header, in small letters, without port and brackets; None for what is no such header."""
    found = _HOST.fullmatch(header)
    if found is None:
        return None
    return (found[1] or found[2]).lower().rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_own(origin: str, host: str) -> bool:
    """Whether an Origin is the page of this server, as the browser reached it: http://HOST:PORT."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    port = {"http": ":80", "https": ":443"}.get(parts.scheme)
    if port is None or parts.path or parts.query or parts.fragment:
        return False
    return parts.netloc.lower() in (host.lower(), host.lower().removesuffix(port))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def checked_origins(origins: Iterable[str], has_key: bool) -> tuple[str, ...]:
    """Origins that web pages may come from. Raises SettingError."""
    found = []
    for each in origins:
        if each == "*" and not has_key:
            raise SettingError(
                "--allow-origin * lets every web page use this server: give it a key first (--api-key-file)."
            )
        parts = urlsplit(each) if each != "*" else None
        if parts is not None and (not parts.scheme or not parts.netloc or parts.path not in ("", "/")):
            raise SettingError(
                f"--allow-origin {each} is not an origin: write it as http://localhost:3000, without a path."
            )
        found.append(each.rstrip("/").lower())
    return tuple(dict.fromkeys(found))


def checked_hosts(hosts: Iterable[str]) -> tuple[str, ...]:
    """Names for the Host header. Raises SettingError."""
    found = []
    for each in hosts:
        name = host_name(each)
        if name is None:
            raise SettingError(
                f"--allow-host {each} is not a name: write it as mac.example.com, without http:// and path."
            )
        found.append(name)
    return tuple(found)
