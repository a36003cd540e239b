"""Where a worker is: the addresses as they are typed, and the one of several by which it is reached soonest."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import SettingError, WorkerError
from ..files import read_text, reason_of, shown

DEFAULT_PORT = 7777
# How often each address is tried, and seconds that one may take beside those that are known to work.
TRIES, SECONDS_OF_OTHERS = 3, 0.5
# A cable is worth changing to from this share of the latency on.
WORTH_CHANGING = 0.8
MOST_WORKERS = 16
# Whichever is there tells this machine's own addresses.
_TOOLS = (("ip", "-o", "addr"), ("ifconfig", "-a"))


class Address(NamedTuple):
    """A host's name or number, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_workers(given: str | os.PathLike[str] | Sequence[str]) -> list[Address]:
    """Addresses from a list, from "mac2.local:7777,mac3.local", or from a file with one a line.

    Raises SettingError for an address that is not one, for the same one twice, and where there is none.
    """
    if isinstance(given, (str, os.PathLike)):
        text = os.fspath(given)
        place = Path(text).expanduser()
        if "," not in text and not re.search(r":\d+$", text) and place.is_file():
            lines = read_text(place, SettingError, 2**16).splitlines()
            texts = [line.partition("#")[0].strip() for line in lines]
        else:
            texts = [each.strip() for each in text.split(",")]
    elif isinstance(given, Iterable):
        texts = list(given)
    else:
        raise SettingError(f'workers is {shown(given)}: give a list of addresses, such as ["mac2.local:7777"].')
    found = [_parsed(each) for each in texts if each != ""]
    if not found:
        raise SettingError("workers has no address: give the other machine's, such as mac2.local:7777.")
    twice = next((each for i, each in enumerate(found) if each in found[:i]), None)
    if twice is not None:
        raise SettingError(f"workers names {twice} twice: give each machine once.")
    if len(found) > MOST_WORKERS:
        raise SettingError(f"workers has {len(found)} addresses: {MOST_WORKERS} at most.")
    return found


def _parsed(text: object) -> Address:
    match = (
        re.fullmatch(r"\[([0-9A-Fa-f:.%\w]+)\](?::(\d+))?|([^\s:/\[\]]+)(?::(\d+))?", text)
        if isinstance(text, str)
        else None
    )
    if match is None:
        raise SettingError(f"workers has {shown(text)}, which is no address: give host:port, such as mac2.local:7777.")
    host, port = match[1] or match[3], int(match[2] or match[4] or DEFAULT_PORT)
    if not 0 < port < 65536:
        raise SettingError(f"workers has {shown(text)}, and there is no port {port}: give one from 1 to 65535.")
    return Address(host, port)


def dial(address: Address, deadline: float) -> socket.socket:
    """A connection to the nearest of the numbers that a name stands for. Raises WorkerError when there is none."""
    try:
        known = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise WorkerError(
            f"There is no machine {address.host} ({reason_of(error)}): check --workers, and that it is awake."
        ) from None
    numbers = list(dict.fromkeys((family, place) for family, _, _, _, place in known))
    timed: list[tuple[float, int, Any]] = []
    limit, failure = time.monotonic() + deadline, None
    for family, place in numbers:
        left = limit - time.monotonic()
        try:
            timed.append(
                (latency_of(family, place, max(0.05, left) if not timed else SECONDS_OF_OTHERS), family, place)
            )
        except OSError as error:
            failure = error
    for _, kind, nearest in sorted(timed, key=lambda each: each[0]):
        try:
            return _connected(kind, nearest, max(0.05, limit - time.monotonic()))
        except OSError as error:
            failure = error
    reason = "no answer" if failure is None else reason_of(failure)
    raise WorkerError(
        f"No worker answers at {address} ({reason}): start it there with `openelm_mlx serve-layers --port {address.port} "
        "--secret-file FILE`, and check that a firewall lets it through."
    )


def latency_of(family: int, place: Any, seconds: float) -> float:
    """Seconds until a machine takes a connection: the least of a few tries."""
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        _connected(family, place, seconds).close()
        times.append(time.perf_counter() - began)
    return min(times)


def _connected(family: int, place: Any, seconds: float) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.settimeout(seconds)
        made.connect(place)
    except BaseException:
        made.close()
        raise
    return made


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def own_addresses(run: Callable[[Sequence[str]], str] | None = None) -> list[str]:
    """The IPv4 addresses of this machine's networks and cables, the loopback left out; none where nothing tells them."""
    run = _output if run is None else run
    for command in _TOOLS:
        found = re.findall(r"\binet (\d+\.\d+\.\d+\.\d+)", run(command))
        if found:
            return [each for each in dict.fromkeys(found) if not is_loopback(each)]
    return []


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
