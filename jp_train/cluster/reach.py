"""Who reaches whom: the address that a rank of this host would use, a listener there, and connections to the listeners
of the others.

gloo and NCCL choose the interface by rules that are a classic cause of ranks that never meet (a host name that resolves
to the loopback address; a docker bridge taken for the fabric), so the address is found by those very rules, and every
host connects to every other one at it. IPv4, standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jp_train.cluster.facts import port_holder

SIOCGIFADDR = 0x8915
CONNECTS_AT_ONCE = 8
"""Connections that one host opens at a time: with 32 hosts each has 31 others, and no accept queue may overflow."""
GREETING = 16
"""Bytes that a listener sends: they prove that the intended host answers."""


def interfaces() -> dict[str, str]:
    """{interface: its IPv4 address} of those that have one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(query, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def fabric_address(present: Mapping[str, str], environ: Mapping[str, str], *, gpu: bool) -> dict[str, str]:
    """`interface` and `address` that the ranks' collectives use on this host, by the rules of NCCL (`gpu`) or gloo;
    else `error`, and why."""
    variable = "NCCL_SOCKET_IFNAME" if gpu else "GLOO_SOCKET_IFNAME"
    named = environ.get(variable, "")
    listed = ", ".join(f"{name} ({address})" for name, address in present.items()) or "none"
    if named:
        chosen = (
            _named_for_nccl(named, list(present)) if gpu else [name for name in named.split(",") if name in present]
        )
        if not chosen:
            return {
                "error": f"{variable}={named} fits no interface with an IPv4 address; there are {listed}",
                "variable": variable,
            }
        return {"interface": chosen[0], "address": present[chosen[0]], "chosen_by": f"{variable}={named}"}
    if gpu:
        candidates = [name for name in present if not name.startswith(("lo", "docker"))]
        if not candidates:
            return {"error": f"no interface that NCCL would take; there are {listed}", "variable": variable}
        first = min(candidates, key=lambda name: not name.startswith("ib"))  # NCCL prefers InfiniBand's
        return {"interface": first, "address": present[first], "chosen_by": "NCCL's default"}
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        return {
            "error": f"the host's own name {name!r} does not resolve ({error}), and gloo would then take the loopback "
            "address",
            "variable": variable,
        }
    interface = next((known for known, its in present.items() if its == address), "")
    return {
        "interface": interface,
        "address": str(address),
        "chosen_by": f"the host's own name {name!r} resolves to it",
    }


def _named_for_nccl(named: str, names: Sequence[str]) -> list[str]:
    """Interfaces that NCCL_SOCKET_IFNAME allows: prefixes, `=` in front for whole names, `^` for all but these."""
    without = named.startswith("^")
    exact = named.lstrip("^").startswith("=")
    patterns = named.lstrip("^=").split(",")
    fits = {name for name in names for pattern in patterns if (name == pattern if exact else name.startswith(pattern))}
    return [name for name in names if (name not in fits if without else name in fits)]


class Listeners:
    """Sockets of this host that send a greeting to every connection: one at the fabric address, on the first host one
    at the master port too."""

    def __init__(self) -> None:
        self.greeting = secrets.token_hex(GREETING // 2)
        self._sockets: list[socket.socket] = []

    def open(self, address: str, port: int) -> int:
        """Listen; port 0 takes a free one. Returns the port. Raises OSError."""
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, port))
            made.listen(128)
        except OSError:
            made.close()
            raise
        self._sockets.append(made)
        threading.Thread(target=self._greet, args=(made,), daemon=True).start()
        return int(made.getsockname()[1])

    def close(self) -> None:
        """Stop listening."""
        for made in self._sockets:
            with contextlib.suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
            made.close()
        self._sockets.clear()

    def _greet(self, made: socket.socket) -> None:
        while True:
            try:
                caller, _ = made.accept()
                with caller:
                    caller.sendall(self.greeting.encode())
            except ConnectionError:
                continue
            except OSError:
                return


def listen(listeners: Listeners, *, gpu: bool, master_port: int | None) -> dict[str, Any]:
    """Open this host's listeners. `fabric` with the address and `port`; `master`: {"error", "holder"} when the port
    cannot be had (None elsewhere)."""
    opened: dict[str, Any] = {"greeting": listeners.greeting, "master": None}
    fabric: dict[str, Any] = dict(fabric_address(interfaces(), os.environ, gpu=gpu))
    if "error" not in fabric:
        try:
            fabric["port"] = listeners.open(fabric["address"], 0)
        except OSError as error:
            fabric["error"] = (
                f"{fabric['address']} ({fabric['chosen_by']}) is no address of this host: {error.strerror}"
            )
    opened["fabric"] = fabric
    if master_port is not None:
        try:
            listeners.open("", master_port)
            opened["master"] = {}
        except OSError as error:
            opened["master"] = {"error": error.strerror, "holder": port_holder(master_port)}
    return opened


def reach(targets: Mapping[str, Sequence[Any]], *, timeout_s: float) -> dict[str, str]:
    """Connect to every (address, port, greeting), a few at a time. {target: why it was not reached}; nothing for
    those that were."""
    if not targets:
        return {}
    with ThreadPoolExecutor(CONNECTS_AT_ONCE) as pool:
        tried = {name: pool.submit(_connect, target, timeout_s) for name, target in targets.items()}
        return {name: failed for name, result in tried.items() if (failed := result.result())}


def _connect(target: Sequence[Any], timeout_s: float) -> str:
    """Why the listener at (address, port, greeting) was not reached; empty when it was."""
    address, port, greeting = target
    deadline = time.monotonic() + timeout_s
    try:
        with socket.create_connection((address, port), timeout_s) as made:
            received = b""
            while len(received) < GREETING and (left := deadline - time.monotonic()) > 0:
                made.settimeout(left)
                part = made.recv(GREETING - len(received))
                if not part:
                    break
                received += part
    except TimeoutError:
        return f"no answer from {address}:{port} within {timeout_s:g} s"
    except OSError as error:
        return f"{address}:{port}: {error.strerror or error}"
    text = received.decode(errors="replace")
    if text == greeting:
        return ""
    shown = re.sub(r"[^\x20-\x7e]", "?", text)
    return (
        f"{address}:{port} is answered by something else ({shown!r}): the address is in use twice, or a proxy stands "
        "between"
    )
