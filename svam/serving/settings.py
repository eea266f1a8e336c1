"""What a server is told, without the policy: a mistake here is found before the weights are read."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from dataclasses import dataclass, field

from svam.serving.protocol import ServingError


@dataclass(frozen=True)
class Settings:
    """Where the server listens and what it allows; the command's options of the same names describe each.

    port 0: any free one. max_message: bytes. gather, ping: seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    max_clients: int = 16
    queue: int = 16
    max_message: int = 8 * 2**20
    gather: float = 0.005
    ping: float = 20.0

    def check(self) -> None:
        """Raise `ServingError` if others than this computer could ask without a key."""
        if self.key is None and not _is_loopback(self.host):
            raise ServingError(
                f"--host {self.host} can be reached from elsewhere, but there is no key: name an environment variable that "
                "holds one with --key-env, or listen on 127.0.0.1 and use a tunnel (ssh -L)"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
