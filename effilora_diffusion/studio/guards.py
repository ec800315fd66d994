"""What a request must pass before the page sees it: the host it was sent to, where it comes from, and what it calls.

All are plain ASGI layers around Gradio's application, so that they see every method, uploads, streams and websockets.
"""

from __future__ import annotations

import ipaddress
import json
import math
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

import gradio as gr
import psutil
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import EffiLoRAError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

HOST_NAME = re.compile(r"(?:\*\.)?[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\]", re.IGNORECASE)
"""A host name as ``--allowed_host`` takes it: also an IP address (IPv6 in brackets), or ``*.example.com``."""

CALL = re.compile(r"/gradio_api/(queue/join|call/v2|call|run|api)(?:/([^/]*))?/?\Z")
"""Gradio's paths that run a handler: by the name at the end, or by the ``fn_index`` in the body."""

PAGE_NAME = "predict"
"""The name under which the page itself calls handlers that do not wait in the queue, with their ``fn_index``."""

MOST_BYTES = 8 * 2**20
"""Length of the longest call: files are uploaded before, and named in it."""

FREE_ATTEMPTS = 5
LONGEST_DELAY = 300.0
"""Seconds between two attempts to log in, after many that failed; it doubles from one second on."""

MOST_ADDRESSES = 4096
"""Addresses whose failed attempts are kept in mind."""


def allowed_hosts(given: Iterable[str], listen: bool) -> list[str]:
    """The names that the server is reached by: the loopback's, those ``given``, and with ``listen`` this machine's own.

    Raises :class:`EffiLoRAError` for a name that is none.
    """
    for name in given:
        if not HOST_NAME.fullmatch(name):
            raise EffiLoRAError(
                f"--allowed_host must be a name such as app.example.com, without https:// and port, not {name!r}"
            )
    return [*LOOPBACK_NAMES, *given, *(_own_names() if listen else [])]


def _own_names() -> list[str]:
    """This machine's host name and IP addresses, as they stand in a ``Host`` header."""
    found = [socket.gethostname(), socket.getfqdn()]
    for addresses in psutil.net_if_addrs().values():
        found += [entry.address for entry in addresses if entry.family == socket.AF_INET]
        found += [f"[{entry.address.partition('%')[0]}]" for entry in addresses if entry.family == socket.AF_INET6]
    return [name for name in found if HOST_NAME.fullmatch(name)]


def guarded(app: ASGIApp, page: gr.Blocks, hosts: list[str], given: Iterable[str]) -> ASGIApp:
    """``app`` behind all guards; ``hosts`` are the allowed ones, ``given`` those of them that a proxy may stand for."""
    inner = OwnOrigin(LoginDelay(PrivateHandlers(app, page)), given)
    return TrustedHostMiddleware(inner, allowed_hosts=hosts, www_redirect=False)


class OwnOrigin:
    """Refuse what another site's page asks a browser for: its ``Origin`` is not the host that the request was sent to.

    Behind a proxy that changes ``Host`` the origin is one of the ``given`` names.
    """

    def __init__(self, app: ASGIApp, given: Iterable[str] = ()):
        self.app = app
        self.given = [name.lower() for name in given]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 403."""
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            host = headers.get("host", "").lower()
            if not all(self._is_own(origin, host) for origin in headers.getlist("origin")):
                await PlainTextResponse("Foreign origin", status_code=403)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            found = urlsplit(origin.lower())
            name = found.hostname or ""
        except ValueError:
            return False
        listed = any(name == own or (own.startswith("*.") and name.endswith(own[1:])) for own in self.given)
        return bool(name) and (found.netloc == host or listed)


class LoginDelay:
    """Let an address that has failed to log in wait, ever longer; whoever comes earlier is answered with 429.

    Args:
        clock: seconds, from any start.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic):
        self.app, self.clock = app, clock
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # attempts, and when the next may come

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 429 if it is an attempt to log in that comes too early."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/login"):
            await self.app(scope, receive, send)
            return
        address, now = _network((scope.get("client") or ("",))[0]), self.clock()
        attempts, earliest = self._failed.get(address, (0, 0.0))
        if now < earliest:
            headers = {"Retry-After": str(math.ceil(earliest - now))}
            await PlainTextResponse("Too many attempts", 429, headers)(scope, receive, send)
            return
        if now > earliest + 2 * LONGEST_DELAY:
            attempts = 0
        # counted before it is known to fail: many attempts may come at once
        over = attempts + 1 - FREE_ATTEMPTS
        delay = 0.0 if over < 0 else min(LONGEST_DELAY, 2.0 ** min(over, 30))
        self._failed[address] = (attempts + 1, now + delay)
        self._failed.move_to_end(address)
        if len(self._failed) > MOST_ADDRESSES:
            self._failed.popitem(last=False)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self._failed.pop(address, None)
            await send(message)

        await self.app(scope, receive, watched)


def _network(address: str) -> str:
    """What one person has of addresses: one of IPv4, 2**64 of IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return address if found.version == 4 else str(ipaddress.ip_network(f"{found}/64", strict=False))


class PrivateHandlers:
    """Let programs call the named endpoints only; the page's own handlers answer the page, and no name.

    A browser states the ``Origin`` of every call (which :class:`OwnOrigin` has looked at), programs have none.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks):
        self.app = app
        public = {index: fn for index, fn in page.fns.items() if fn.api_visibility != "private"}
        self.names = {str(fn.api_name) for fn in public.values()}
        self.public, self.known = set(public), set(page.fns)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 404 if it calls what it may not."""
        call = CALL.search(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if call is None:
            await self.app(scope, receive, send)
            return
        kind, name = call.groups()
        refused: PlainTextResponse | None = None
        if kind.startswith("call"):
            refused = None if name in self.names else PlainTextResponse("No such endpoint", 404)
        else:
            body = await _whole_body(scope, receive)
            if body is None:
                return
            if len(body) > MOST_BYTES:
                refused = PlainTextResponse("Too long", 413)
            elif not self._may_call(body, name if kind != "queue/join" else None, "origin" in Headers(scope=scope)):
                refused = PlainTextResponse("No such endpoint", 404)
            receive = _again(body, receive)
        await (refused or self.app)(scope, receive, send)

    def _may_call(self, body: bytes, name: str | None, from_page: bool) -> bool:
        """Whether the handler that is meant may be called: by the ``fn_index`` in the body, else by the name."""
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            return True  # Gradio refuses it
        index = found.get("fn_index") if isinstance(found, dict) else None
        if name is not None and name != PAGE_NAME and name not in self.names:
            return False
        if index is None:
            return name is None or name != PAGE_NAME
        return type(index) is int and index in (self.known if from_page else self.public)


async def _whole_body(scope: Scope, receive: Receive) -> bytes | None:
    """The body of a request, at most one byte too long; ``None`` if its sender has gone."""
    body = bytearray()
    try:
        async for chunk in Request(scope, receive).stream():
            body += chunk
            if len(body) > MOST_BYTES:
                break
    except ClientDisconnect:
        return None
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body`` first."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def found() -> Message:
        return waiting.pop() if waiting else await receive()

    return found
