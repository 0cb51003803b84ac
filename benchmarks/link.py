"""A rate-limited link between two local ranks, where this machine allows one.

The best kind is ``veth``: two network namespaces joined by a virtual cable with a token
bucket at both ends, a full-duplex link as between two machines. Where there is no veth
driver, ``lo`` limits the loopback of one namespace, so that both directions share the rate. Without
root it is the machine's own, unlimited ``loopback``. Nothing outside the namespaces is touched, and
they are gone when their last process is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

NO_LIMIT = "a rate needs root, unshare, ip and tc; without them try --rates 0"
# A burst of 1 MB is what the kernel needs to keep 1 Gbit/s with a 100 Hz timer, with room.
_BUCKET = "burst 1mb latency 2s"


@dataclass(frozen=True)
class Link:
    """Where the two ranks run.

    Attributes:
        kind: ``"veth"``, ``"lo"`` or ``"loopback"``.
        rate: Gbit/s; 0 is unlimited.
        prefixes: what to put before the command of each rank.
        interfaces: the network interface of each rank, for ``GLOO_SOCKET_IFNAME``.
    """

    kind: str
    rate: float
    prefixes: tuple[list[str], list[str]]
    interfaces: tuple[str, str]

    def __str__(self) -> str:
        rate = f"{self.rate:g} Gbit/s" if self.rate else "unlimited"
        how = {
            "veth": "each way, between two network namespaces",
            "lo": "for both ways together, in one network namespace",
            "loopback": "this machine's loopback",
        }
        return f"{rate}, {how[self.kind]}"

    def limited(self, rate: float) -> Link:
        """The same link, from now on with another rate.

        Raises:
            RuntimeError: no rate can be set.
        """
        if self.kind == "loopback" and rate:
            raise RuntimeError(NO_LIMIT)
        if self.kind != "loopback":
            for prefix, interface in zip(self.prefixes, self.interfaces, strict=True):
                _sh(prefix, f"tc qdisc del dev {interface} root")
                if rate and not _sh(prefix, f"true{_limit(interface, rate)}"):
                    raise RuntimeError(f"{interface} takes no limit of {rate:g} Gbit/s")
        return replace(self, rate=rate)


@contextmanager
def link(rate: float) -> Iterator[Link]:
    """A link of `rate` Gbit/s (0: unlimited), gone at the end of the ``with``.

    Raises:
        RuntimeError: a limit is asked for where none can be set.
    """
    holders: list[subprocess.Popen[str]] = []
    try:
        yield _veth(rate, holders) or _lo(rate, holders) or _loopback(rate)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _veth(rate: float, holders: list[subprocess.Popen[str]]) -> Link | None:
    first, second = _namespace(holders), _namespace(holders)
    if first is None or second is None:
        return None
    a, b = _enter(first), _enter(second)
    made = _sh(a, f"ip link add gopt0 type veth peer name gopt1 netns {second.pid}")
    for prefix, name, address in ((a, "gopt0", "10.77.0.1"), (b, "gopt1", "10.77.0.2")):
        made = made and _sh(
            prefix,
            f"ip link set lo up && ip addr add {address}/30 dev {name} && "
            f"ip link set {name} mtu 65535 up{_limit(name, rate)}",
        )
    return Link("veth", rate, (a, b), ("gopt0", "gopt1")) if made else None


def _lo(rate: float, holders: list[subprocess.Popen[str]]) -> Link | None:
    holder = _namespace(holders)
    if holder is None or not _sh(_enter(holder), "ip link set lo up" + _limit("lo", rate)):
        return None
    return Link("lo", rate, (_enter(holder), _enter(holder)), ("lo", "lo"))


def _loopback(rate: float) -> Link:
    if rate:
        raise RuntimeError(NO_LIMIT)
    return Link("loopback", 0.0, ([], []), ("lo", "lo"))


def _limit(interface: str, rate: float) -> str:
    return f" && tc qdisc add dev {interface} root tbf rate {rate}gbit {_BUCKET}" if rate else ""


def _namespace(holders: list[subprocess.Popen[str]]) -> subprocess.Popen[str] | None:
    """A process that holds a new network namespace until it is killed or we are gone."""
    if os.geteuid() or not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        return None
    holder = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    holders.append(holder)
    assert holder.stdout is not None
    return holder if holder.stdout.readline() == "ready\n" else None


def _enter(holder: subprocess.Popen[str]) -> list[str]:
    return ["nsenter", "-t", str(holder.pid), "-n"]


def _sh(prefix: list[str], script: str) -> bool:
    done = subprocess.run([*prefix, "sh", "-c", script], capture_output=True, check=False)
    return done.returncode == 0
