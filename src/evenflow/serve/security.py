"""Who may speak to the server: a page must come from the server itself, whatever its name is made to mean."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def split_host(host: str) -> tuple[str, int | None] | None:
    """Name and port of a Host header; None for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    fits = name and not (parts.path or parts.query or parts.fragment or parts.username is not None)
    return (name or "", port) if fits else None


def address(name: str) -> Any:
    """The IP address that a name is, or None."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(name: str) -> bool:
    """Whether a name means this machine."""
    found = address(name)
    return name == "localhost" if found is None else bool(found.is_loopback)


class Guard:
    """Refuses requests whose Host is not ours or whose Origin is another's, and adds the headers that bind pages.

    A site that points its own name at this machine (DNS rebinding) sends its own name as Host: only loopback names,
    addresses, and `names` are ours. A page of another origin sends that as Origin, for WebSockets too, which browsers
    do not hold back by themselves. Programs send no Origin. local: the server listens on this machine alone.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str] = frozenset(), local: bool = True) -> None:
        self.app, self.names, self.local = app, names, local

    def trouble(self, headers: Headers) -> str | None:
        """What is wrong with a request, or None."""
        host = split_host(headers.get("host", ""))
        if host is None or not self._ours(host[0]):
            return "the name of this server is not one that it answers to; open it by its address"
        origin = headers.get("origin")
        if origin is None:
            return None
        try:
            parts = urlsplit(origin)
            theirs = (parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme))
        except ValueError:
            theirs = ("", None)
        same = theirs[0] == host[0] or (is_loopback(theirs[0]) and is_loopback(host[0]))
        if not same or theirs[1] != (host[1] or (443 if origin.startswith("https:") else 80)):
            return "pages of another origin may not use this server"
        return None

    def _ours(self, name: str) -> bool:
        return is_loopback(name) or name in self.names or (not self.local and address(name) is not None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        trouble = self.trouble(Headers(scope=scope))
        if trouble is not None and scope["type"] == "websocket":
            await receive()
            return await send({"type": "websocket.close", "code": 1008, "reason": trouble})
        if trouble is not None:
            body = f"{trouble}\n".encode()
            head = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": head})
            return await send({"type": "http.response.body", "body": body})

        async def bound(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-cache")
            await send(message)

        await self.app(scope, receive, bound)
