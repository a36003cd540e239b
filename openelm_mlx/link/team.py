"""The machines that a model is spread over, as the first of them knows them: meeting, what each has, and who gets what."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, final

from ..checks import is_whole
from ..errors import SettingError, WorkerError
from ..hub.names import Progress
from ..memory.machine import Machine
from ..specs import ModelSpec
from .addresses import SECONDS_OF_OTHERS, WORTH_CHANGING, Address, dial, is_loopback, latency_of
from .chain import Chain
from .framing import Connection, LostConnectionError, Message
from .handshake import NO_SECRET, meet_worker
from .peer import Peer, error_of

# Seconds of silence after which a worker is given up. It says every second that it is still at work.
DEADLINE = 10.0
_NUMBERS = ("memory_bytes", "working_set_bytes", "used_bytes")


@dataclass
class Member:
    """A worker: where it is, what it says of itself, and what it is asked for whenever it is connected.

    memory_limit: what it may use, in bytes; None: what its machine has. other_addresses: of its networks and cables, as it
    knows them itself.
    """

    address: Address
    peer: Peer
    machine: Machine
    memory_limit: int | None = None
    instance: str = ""
    other_addresses: Sequence[str] = ()
    wanted: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)


@final
class Team:
    """See the module. secret: None on this machine alone. deadline: seconds, of every answer.

    Raises SettingError where a secret is needed, WorkerError where a worker is not there or refuses.
    """

    def __init__(self, addresses: Sequence[Address], secret: bytes | None, deadline: float = DEADLINE) -> None:
        far = next((each for each in addresses if not is_loopback(each.host)), None)
        if secret is None and far is not None:
            raise SettingError(
                f"{far} is another machine, and nothing is sent there without a shared secret: give both sides the same "
                "file, secret_file=FILE."
            )
        self._secret = NO_SECRET if secret is None else secret
        self.deadline = deadline
        self.members: list[Member] = []
        self.chain: Chain | None = None
        self.progress: list[Progress | None] = []
        self._has_read = False
        try:
            for address in addresses:
                peer = Peer(f"the worker {address}", str(address))
                member = Member(address, peer, Machine("", "", 0, 0))
                self.members.append(member)
                self._meet(member)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the workers go."""
        if self.chain is not None:
            self.chain.close()
        for each in self.members:
            if each.peer.connection is not None:
                with suppress(LostConnectionError):
                    each.peer.connection.send({"op": "leave"})
            each.peer.forget(WorkerError("The workers were given up."))

    def form(self, specs: Sequence[ModelSpec], wanted: Sequence[dict[str, Any]]) -> Chain:
        """The chain of all workers, each with what it is `wanted` to have. Raises the error of one that cannot."""
        for member, each in zip(self.members, wanted, strict=True):
            member.wanted = each
        self.chain = Chain([each.peer for each in self.members], specs, self._connect)
        self.chain.start()
        return self.chain

    def has_read(self) -> None:
        """From now on a worker that comes back reads its layers at once."""
        self._has_read = True

    # --- connections --------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        for each in self.members:
            if each.peer.connection is None:
                self._meet(each)
        for each in self.members:
            answer = self._asked(each, {"op": "prepare", **each.wanted})
            each.plan = answer.header["plan"]
        if self._has_read:
            for each in self.members:
                each.peer.open.send({"op": "read"})
            for number, each in enumerate(self.members):
                self._answer(each)
                for messages in () if self.chain is None else self.chain.given.values():
                    self._asked(each, *messages[number])

    def _meet(self, member: Member) -> None:
        peer, address = member.peer, member.address
        peer.connection = self._opened(peer.name, dial(address, self.deadline))
        self._learn(member)
        self._choose_address(member)

    def _opened(self, name: str, sock: Any) -> Connection:
        connection = Connection(sock, name, self.deadline)
        try:
            meet_worker(connection, self._secret)
        except BaseException:
            connection.close()
            raise
        return connection

    def _learn(self, member: Member) -> None:
        """What a worker says of itself."""
        facts = self._asked(member, {"op": "facts", "deadline": self.deadline}).header
        self._check_different(member, facts.get("instance"))
        member.machine, member.instance = machine_of(facts), str(facts.get("instance"))
        limit = facts.get("memory_limit")
        member.memory_limit = limit if is_whole(limit) else None
        addresses = facts.get("addresses")
        member.other_addresses = addresses if isinstance(addresses, list) else []

    def _choose_address(self, member: Member) -> None:
        """Go over to another of the worker's addresses where that is nearer: a cable beside a Wi-Fi."""
        if is_loopback(member.address.host):
            return
        here = member.peer.open.address
        timed = []
        for host in [here, *(each for each in member.other_addresses if each != here)]:
            with suppress(OSError):
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                timed.append((latency_of(family, (host, member.address.port), SECONDS_OF_OTHERS), host))
        now = next((seconds for seconds, host in timed if host == here), None)
        nearest, host = min(timed, default=(0.0, here))
        if now is None or host == here or nearest > WORTH_CHANGING * now:
            return
        instance, peer = member.instance, member.peer
        for address in (Address(host, member.address.port), member.address):
            with suppress(LostConnectionError):
                peer.open.send({"op": "leave"})
            peer.open.close()
            try:
                peer.connection = self._opened(peer.name, dial(address, self.deadline))
                self._learn(member)
            except WorkerError:
                if address == member.address:
                    raise
                continue
            if member.instance == instance:
                return
        raise WorkerError(f"{peer.name} has become another one: try again.")

    def _asked(self, member: Member, header: dict[str, Any], body: bytes = b"") -> Message:
        member.peer.open.send(header, body)
        return self._answer(member)

    def _answer(self, member: Member) -> Message:
        while True:
            message = member.peer.open.receive()
            if message.op == "error":
                self._check_different(member, message.header.get("instance"))  # it is busy, with this machine itself
                raise error_of(message.header, member.peer.name)
            if message.op not in ("alive", "progress"):
                return message

    def _check_different(self, member: Member, instance: Any) -> None:
        """Raise SettingError where the worker of this instance is another member already."""
        same = next((each for each in self.members if each is not member and each.instance == instance), None)
        if same is not None:
            raise SettingError(
                f"workers names the same worker twice, as {same.address} and as {member.address}: give each machine once."
            )


def facts_of(machine: Machine) -> dict[str, Any]:
    """What a worker says of its machine."""
    return {
        "machine": machine.name, "backend": machine.backend, "chip": machine.chip, "bandwidth": machine.bandwidth,
        "flops": machine.flops, "ssd": machine.ssd, **{name: getattr(machine, name) for name in _NUMBERS},
    }  # fmt: skip


def machine_of(facts: dict[str, Any]) -> Machine:
    """The machine that a worker describes. Raises WorkerError for what is no description."""
    try:
        ssd = facts["ssd"]
        return Machine(
            str(facts["machine"]), str(facts["backend"]), int(facts["memory_bytes"]),
            int(facts["working_set_bytes"]), int(facts["used_bytes"]),
            bandwidth=_number(facts["bandwidth"]), flops=_number(facts["flops"]),
            ssd=None if ssd is None else (float(ssd[0]), float(ssd[1])), chip=str(facts["chip"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError):
        raise WorkerError(
            "A worker does not say what machine it is: install the same version on both machines."
        ) from None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
