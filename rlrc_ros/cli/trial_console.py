"""`rlrc trial console`: a trial run from a web page beside the arm."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import secrets
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrc_ros.cli.output import emit
from rlrc_ros.errors import UserError

if TYPE_CHECKING:
    import ssl

    from rlrc_ros.profile import RobotProfile
    from rlrc_ros.trials.session import TrialSession

HELP = "run a trial from a web page: start, stop and label with large buttons and single keys"
PORT = 8765


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the trial's directory")
    parser.add_argument(
        "--plan", type=Path, help="a locked plan, to begin the trial with; without it, resume"
    )
    parser.add_argument(
        "--attach",
        action="store_true",
        help="the nodes run already (ros2 launch rlrc trial.launch.py); without it, they are "
        "started here, which is for the simulated arm",
    )
    parser.add_argument("--operator", default=getpass.getuser(), help="who labels (default: you)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: this machine only); any other takes TLS, and a token "
        "is asked for",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"0: any free one (default {PORT})")
    parser.add_argument(
        "--tls-certificate", type=Path, metavar="PEM", help="serve HTTPS with this certificate"
    )
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    parser.add_argument(
        "--plain-http",
        action="store_true",
        help="on another address than this machine's, do without TLS: whoever can listen on the "
        "network sees the token, and can move the arm with it",
    )


def main(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted."""
    from rlrc_ros.cli.trial import open_session
    from rlrc_ros.console.server import is_loopback
    from rlrc_ros.profile import load_profile

    tls = _tls(arguments, is_loopback(arguments.host))
    token = "" if is_loopback(arguments.host) else secrets.token_urlsafe(24)
    listening = _listen(arguments.host, arguments.port)
    with contextlib.ExitStack() as stack:
        stack.enter_context(listening)
        session = stack.enter_context(open_session(arguments))
        profile = load_profile(session.plan.robot)
        alive = _nodes(stack, session, profile, arguments.attach)
        _serve(session, profile, alive, listening, arguments, token, tls)
    return 0


def _tls(arguments: argparse.Namespace, loopback: bool) -> ssl.SSLContext | None:
    """The certificate and key that were given; None where there may be none.

    Raises:
        UserError: they are of no use, or are missing where others can listen.
    """
    from rlrc_ros.console.tls import server_context

    certificate, key = arguments.tls_certificate, arguments.tls_key
    if certificate and key:
        if arguments.plain_http:
            raise UserError("--plain-http: leave it out, there is a certificate")
        return server_context(certificate, key)
    if certificate or key:
        raise UserError("--tls-certificate and --tls-key belong together: give both")
    if not loopback and not arguments.plain_http:
        raise UserError(
            f"--host {arguments.host}: without TLS whoever can listen on the network sees the "
            "token, and can move the arm with it; give --tls-certificate and --tls-key "
            "(docs/console.md says how to make them), or --plain-http if nobody else is on it"
        )
    return None


def _nodes(
    stack: contextlib.ExitStack, session: TrialSession, profile: RobotProfile, attach: bool
) -> Callable[[], None]:
    """Start the nodes if need be; returns what raises UserError when one has died."""
    from rlrc_ros.trials.runner import trial_nodes
    from rlrc_ros.trials.session import LOGS
    from rlrc_ros.trials.simulated import running_nodes

    if attach:
        return lambda: None
    if not profile.simulated:
        raise UserError(
            f"start the nodes of {profile.name} with `ros2 launch rlrc trial.launch.py "
            f"dir:={session.directory}` and give --attach"
        )
    specs = trial_nodes(session, profile)
    return stack.enter_context(running_nodes(specs, session.directory / LOGS))


def _serve(
    session: TrialSession,
    profile: RobotProfile,
    alive: Callable[[], None],
    listening: socket.socket,
    arguments: argparse.Namespace,
    token: str,
    tls: ssl.SSLContext | None,
) -> None:
    import asyncio

    from aiohttp import web

    from rlrc_ros.console.monitor import RobotMonitor
    from rlrc_ros.console.server import ConsoleServer, Pages
    from rlrc_ros.console.trials import TrialRunner

    pages = Pages()
    with contextlib.ExitStack() as stack:
        monitor = RobotMonitor(profile, pages.changed)
        stack.callback(monitor.close)
        runner = TrialRunner(session, alive, pages.changed, simulated=profile.simulated)
        stack.callback(runner.close)

        async def stop_the_arm_first(_: Any) -> None:
            await asyncio.to_thread(runner.close)

        server = ConsoleServer(session, runner, monitor, pages, token, arguments.operator)
        app = server.application()
        app.on_shutdown.insert(0, stop_the_arm_first)
        address = _address(listening, token, "https" if tls else "http")
        emit(arguments, {"url": address}, f"{address}\nCtrl-C stops the arm and ends the console")
        sys.stdout.flush()  # it goes on for hours, and may print into a file
        if token and not tls:
            print(f"warning: {address} is not encrypted (--plain-http)", file=sys.stderr)
        web.run_app(
            app,
            sock=listening,
            ssl_context=tls,
            print=None,
            access_log=None,
            shutdown_timeout=2.0,
        )


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host} port {port}: {reason}") from None


def _address(listening: socket.socket, token: str, scheme: str) -> str:
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - all of them: any name of this machine will do
        host = socket.gethostname()
    query = f"?token={token}" if token else ""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{query}"
