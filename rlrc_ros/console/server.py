"""The console's web server: a page, a WebSocket that pushes, and requests that change something.

Who may ask: on loopback, whoever has an account on this machine; further out, whoever has the
token, which arrives in the URL once and lives in a cookie then. No other web page can ask through
the operator's browser: a request has to come from this origin, and on loopback to a local name (a
domain that someone points at 127.0.0.1 is none).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import itertools
import json
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from rlrc_ros.console.monitor import FREE, RobotMonitor
from rlrc_ros.console.trials import TrialRunner, view
from rlrc_ros.errors import UserError
from rlrc_ros.trials.session import TrialSession

STATIC = Path(__file__).with_name("static")
COOKIE = "rlrc_console"
HEARTBEAT = 1.0
"""s between messages at most: a page that hears nothing for three of them says so."""
PICTURE_PERIOD = 1 / 15
"""s between two pictures of a camera, for each page."""
_IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_LONGEST_REQUEST = 16_384
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own and no other's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class Pages:
    """The open pages, to be woken when something has changed; `changed` from any thread."""

    loop: asyncio.AbstractEventLoop | None = None
    wakes: set[asyncio.Event] = field(default_factory=set)
    version: int = 0
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def changed(self) -> None:
        """Something has."""
        self.version = next(self._versions)
        if self.loop is not None and not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed in between
                self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for wake in self.wakes:
            wake.set()


class ConsoleServer:
    """The handlers.

    Args:
        session: the trial.
        runner: runs its trials.
        monitor: cameras and guard.
        pages: shared with what calls `changed`.
        token: asked of everybody; empty: of nobody, on loopback only.
        operator: who labels where a page names nobody.
    """

    def __init__(
        self,
        session: TrialSession,
        runner: TrialRunner,
        monitor: RobotMonitor,
        pages: Pages,
        token: str = "",
        operator: str = "",
    ) -> None:
        self._session, self._runner, self._monitor = session, runner, monitor
        self._pages, self._token, self._operator = pages, token, operator

    def application(self) -> web.Application:
        """The web application."""
        app = web.Application(client_max_size=_LONGEST_REQUEST, middlewares=[self._guarded])
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/console.css", self._page),
                web.get("/console.js", self._page),
                web.get("/api/live", self._live),
                web.get("/api/reference/{step:[0-9]{1,9}}", self._reference),
                *(
                    web.post(f"/api/{name}", self._action(what))
                    for name, what in {
                        "start": self._start,
                        "stop": self._stop,
                        "finish": self._finish,
                        "label": self._label,
                        "correct": self._correct,
                        "exclude": self._exclude,
                        "emergency_stop": self._emergency_stop,
                        "release": self._release,
                    }.items()
                ),
            ]
        )
        app.on_startup.append(self._on_startup)
        app.on_shutdown.append(self._on_shutdown)
        return app

    async def _on_startup(self, _: web.Application) -> None:
        self._pages.loop = asyncio.get_running_loop()

    async def _on_shutdown(self, _: web.Application) -> None:
        self._pages.loop = None
        for wake in self._pages.wakes:
            wake.set()

    # Who may ask

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if (granted := self._let_in(request)) is not None:
                return granted
            response = await handler(request)
        except web.HTTPException as refusal:
            refusal.headers.update(_HEADERS)
            raise
        if not response.prepared:
            response.headers.update(_HEADERS)
        return response

    def _let_in(self, request: web.Request) -> web.Response | None:
        """A redirect that leaves a cookie where the URL has the token; raises HTTPForbidden."""
        origin = request.headers.get("Origin")
        changes = request.method not in ("GET", "HEAD") or request.path == "/api/live"
        if (changes or origin) and origin != f"{request.scheme}://{request.host}":
            raise web.HTTPForbidden(text="this request did not come from the console's page")
        if not self._token:
            if not is_loopback(_host_name(request.host)):
                raise web.HTTPForbidden(text=f"{request.host} is not a name of this machine's own")
            return None
        given = request.query.get("token")
        if given is not None and request.path == "/" and self._is_token(given):
            response = web.Response(status=303, headers={"Location": "/", **_HEADERS})
            response.set_cookie(
                COOKIE,
                self._token,
                httponly=True,
                samesite="Strict",
                secure=request.secure,
                path="/",
            )
            return response
        if not self._is_token(request.cookies.get(COOKIE, "")):
            raise web.HTTPForbidden(text="open the address that the console printed, token and all")
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode())

    # What is shown

    async def _page(self, request: web.Request) -> web.StreamResponse:
        name = request.path.lstrip("/") or "index.html"
        return web.FileResponse(STATIC / name)

    async def _reference(self, request: web.Request) -> web.StreamResponse:
        """The reference image of the current step, and no other file."""
        step = self._session.current()
        if step is None or step.index != int(request.match_info["step"]) or not step.start.image:
            raise web.HTTPNotFound(text="that is not the current step, or it has no image")
        directory = self._session.directory.resolve()
        path = (directory / step.start.image).resolve()
        kind = _IMAGES.get(path.suffix.lower())
        if not path.is_relative_to(directory) or kind is None or not path.is_file():
            raise web.HTTPNotFound(text="there is no such image")
        return web.Response(body=path.read_bytes(), content_type=kind)

    def _view(self) -> dict[str, Any]:
        told = view(self._session, self._runner)
        told |= {"guard": self._monitor.guard(), "cameras": self._monitor.cameras}
        return told | {"operator": self._operator}

    async def _live(self, request: web.Request) -> web.WebSocketResponse:
        """States as JSON, pictures as bytes: camera's number, its age in s (float32), JPEG."""
        socket = web.WebSocketResponse(heartbeat=10.0, max_msg_size=1024, compress=False)
        await socket.prepare(request)
        wake = asyncio.Event()
        self._pages.wakes.add(wake)
        pushing = asyncio.create_task(self._push(socket, wake))
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    break  # pages have nothing to say here
        finally:
            self._pages.wakes.discard(wake)
            pushing.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await pushing
        return socket

    async def _push(self, socket: web.WebSocketResponse, wake: asyncio.Event) -> None:
        version, told_at = -1, 0.0
        shown = dict.fromkeys(self._monitor.cameras, (-1, 0.0))
        while self._pages.loop is not None:
            now = time.monotonic()
            if version != self._pages.version or now - told_at >= HEARTBEAT:
                version, told_at = self._pages.version, now
                await socket.send_str(json.dumps(await asyncio.to_thread(self._view)))
            for place, camera in enumerate(self._monitor.cameras):
                number, at = shown[camera]
                if now - at < PICTURE_PERIOD:
                    continue
                try:
                    picture = await asyncio.to_thread(self._monitor.picture, camera, number)
                except UserError:
                    continue  # in an encoding that is no picture: the page shows that none comes
                if picture is not None:
                    shown[camera] = picture.number, now
                    head = struct.pack("<Bf", place, picture.age)
                    await socket.send_bytes(head + picture.jpeg)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(wake.wait(), PICTURE_PERIOD / 2)
            wake.clear()
        await socket.close()

    # What is asked for

    def _action(self, what: Callable[[dict[str, Any]], None]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                asked = await request.json()
                if not isinstance(asked, dict):
                    raise ValueError
            except ValueError:
                raise web.HTTPBadRequest(text="the request is no JSON object") from None
            try:
                await asyncio.to_thread(what, asked)
            except UserError as error:
                return web.json_response({"error": str(error)}, status=409)
            self._pages.changed()
            return web.json_response({})

        return handle

    def _start(self, asked: dict[str, Any]) -> None:
        guard = self._monitor.guard()
        if guard["state"] != FREE:
            raise UserError(f"the arm is not free: {guard['reason']}")
        self._runner.start(_number(asked, "trial"))

    def _stop(self, asked: dict[str, Any]) -> None:
        self._runner.stop(_number(asked, "trial"))

    def _finish(self, asked: dict[str, Any]) -> None:
        self._runner.finish(_number(asked, "trial"))

    def _label(self, asked: dict[str, Any]) -> None:
        self._session.label(_number(asked, "trial"), **_judgement(asked))

    def _correct(self, asked: dict[str, Any]) -> None:
        reason = _text(asked, "reason")
        self._session.correct(_number(asked, "trial"), reason=reason, **_judgement(asked))

    def _exclude(self, asked: dict[str, Any]) -> None:
        self._session.exclude(
            _number(asked, "trial"),
            _text(asked, "rule"),
            _text(asked, "notes"),
            _text(asked, "operator") or None,
        )

    def _emergency_stop(self, _: dict[str, Any]) -> None:
        self._monitor.emergency_stop()

    def _release(self, _: dict[str, Any]) -> None:
        self._monitor.release()


def _host_name(host: str) -> str:
    """Without the port, and an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _judgement(asked: dict[str, Any]) -> dict[str, Any]:
    score = asked.get("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
        raise UserError("score must be a number from 0 to 100")
    return {
        "outcome": _text(asked, "outcome"),
        "score": None if score is None else float(score),
        "notes": _text(asked, "notes"),
        "operator": _text(asked, "operator") or None,
        "request": _text(asked, "request"),
    }


def _number(asked: dict[str, Any], name: str) -> int:
    value = asked.get(name)
    if type(value) is not int:
        raise UserError(f"{name} must be a whole number")
    return value


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked.get(name, "")
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text")
    return value
