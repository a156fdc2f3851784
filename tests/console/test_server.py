"""Who is let in. What the console does with a robot: tests/ros/test_console.py."""

import asyncio

import pytest
from aiohttp.test_utils import TestClient, TestServer

pytest.importorskip("rclpy")

from rlrc_ros.console.server import COOKIE, ConsoleServer, Pages, is_loopback

TOKEN = "t0k3n-t0k3n-t0k3n"


def ask(*requests, token=""):
    """Answers to (method, path, headers) of one client with a cookie jar: status and text."""

    async def run():
        # The page itself needs neither trial nor robot.
        app = ConsoleServer(None, None, None, Pages(), token).application()
        async with TestClient(TestServer(app, host="127.0.0.1")) as client:
            answers = []
            for method, path, headers in requests:
                async with client.request(
                    method, path, headers=headers, allow_redirects=False, data="{}"
                ) as answer:
                    answers.append((answer.status, await answer.text(), dict(answer.headers)))
            return answers

    return asyncio.run(run())


def test_the_page_comes_with_headers_that_keep_others_out():
    ((status, text, headers),) = ask(("GET", "/", {}))
    assert status == 200 and "EMERGENCY STOP" in text
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe-inline" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("host", ["console.example:8765", "127.0.0.1.example", "10.0.0.7:8765"])
def test_a_domain_pointed_at_this_machine_is_not_served(host):
    ((status, text, _),) = ask(("GET", "/", {"Host": host}))
    assert status == 403 and "EMERGENCY" not in text


@pytest.mark.parametrize(
    "headers",
    [{}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"}],
)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/start"), ("POST", "/api/label"), ("GET", "/api/live")]
)
def test_only_the_consoles_own_page_may_change_anything_or_listen(method, path, headers):
    ((status, text, _),) = ask((method, path, headers))
    assert status == 403 and "did not come from the console's page" in text


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py", "/%2e%2e/server.py", "/console.js/../../server.py", "/static/console.js",
        "/api/reference/..%2f..%2fplan.yaml", "/api/reference/-1", "/api/reference/1/../../x",
        "/index.html/",
    ],
)  # fmt: skip
def test_no_other_file_can_be_had(path):
    ((status, text, _),) = ask(("GET", path, {}))
    assert status == 404 and "import" not in text


def test_without_the_token_nothing_is_shown():
    wrong = {"Cookie": f"{COOKIE}={TOKEN}x"}
    answers = ask(
        ("GET", "/", {}), ("GET", "/?token=wrong", {}), ("GET", "/console.js", {}),
        ("GET", f"/console.js?token={TOKEN}", {}), ("GET", "/", wrong), ("GET", "/?token=ä", {}),
        token=TOKEN,
    )  # fmt: skip
    assert [status for status, _, _ in answers] == [403] * 6
    assert not any(TOKEN in text for _, text, _ in answers)


def test_the_token_in_the_address_becomes_a_cookie_that_no_other_site_can_use():
    answers = ask(("GET", f"/?token={TOKEN}", {}), token=TOKEN)
    status, _, headers = answers[0]
    assert (status, headers["Location"]) == (303, "/")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    good = {"Cookie": f"{COOKIE}={TOKEN}", "Host": "robot.local:8765"}
    foreign = {**good, "Origin": "http://evil.example"}
    opened, refused = ask(("GET", "/", good), ("POST", "/api/stop", foreign), token=TOKEN)
    assert opened[0] == 200 and refused[0] == 403


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.8.8", True),
        ("0.0.0.0", False), ("192.168.1.5", False), ("localhost.example", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_this_machines_own(host, own):
    assert is_loopback(host) is own
