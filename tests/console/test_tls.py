"""The console behind a certificate of its own: who is told what, and what a client sees."""

import asyncio
import shutil
import ssl
import subprocess

import pytest
from aiohttp import ClientConnectorCertificateError, ClientSession, CookieJar
from aiohttp.test_utils import TestServer

pytest.importorskip("rclpy")

from rlrc_ros.cli.main import main
from rlrc_ros.console.server import COOKIE, ConsoleServer, Pages
from rlrc_ros.console.tls import server_context
from rlrc_ros.errors import UserError

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(not OPENSSL, reason="no openssl here to make certificates with")
TOKEN = "t0k3n-t0k3n-t0k3n"


@pytest.fixture(scope="module")
def pems(tmp_path_factory):
    """Two certificates with their keys, made as docs/console.md says, and an encrypted key."""
    place = tmp_path_factory.mktemp("pems")
    for name in ("one", "two"):
        subprocess.run(
            [
                *(OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
                *("-nodes", "-days", "30", "-subj", "/CN=console"),
                *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
                *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
            ],
            cwd=place, check=True, capture_output=True,
        )  # fmt: skip
    encrypt = (OPENSSL, "pkey", "-in", "one.key", "-aes256", "-passout", "pass:secret")
    subprocess.run([*encrypt, "-out", "encrypted.key"], cwd=place, check=True, capture_output=True)
    (place / "text.pem").write_text("hello\n")
    (place / "bytes.pem").write_bytes(b"\xff\x00")
    return place


def test_the_page_is_had_over_tls_by_who_trusts_the_certificate(pems):
    async def run():
        app = ConsoleServer(None, None, None, Pages(), TOKEN).application()
        server = TestServer(app, scheme="https")
        await server.start_server(ssl=server_context(pems / "one.pem", pems / "one.key"))
        trusting = ssl.create_default_context(cafile=str(pems / "one.pem"))
        try:
            async with ClientSession(cookie_jar=CookieJar(unsafe=True)) as client:
                url = f"https://127.0.0.1:{server.port}/"
                async with client.get(f"{url}?token={TOKEN}", ssl=trusting) as answer:
                    page = answer.status, await answer.text(), answer.history[0].headers
                headers = {"Origin": url.replace("https", "http").rstrip("/")}
                async with client.post(f"{url}api/stop", ssl=trusting, headers=headers) as other:
                    foreign = other.status
                with pytest.raises(ClientConnectorCertificateError):
                    await client.get(url)
                old = ssl.create_default_context(cafile=str(pems / "one.pem"))
                old.maximum_version = ssl.TLSVersion.TLSv1_1
                with pytest.raises(OSError):
                    await client.get(url, ssl=old)
        finally:
            await server.close()
        return page, foreign

    (status, text, redirect), foreign = asyncio.run(run())
    assert status == 200 and "EMERGENCY STOP" in text
    cookie = redirect["Set-Cookie"]
    assert cookie.startswith(f"{COOKIE}=") and "Secure" in cookie and "HttpOnly" in cookie
    assert foreign == 403, "a page of the same host without TLS is another origin"


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("one.pem", "two.key", "two.key is not the key of the certificate"),
        ("missing.pem", "one.key", "missing.pem: No such file"),
        ("one.pem", "missing.key", "missing.key: No such file"),
        ("text.pem", "one.key", "text.pem: no certificate in PEM format"),
        ("one.key", "one.key", "one.key: no certificate in PEM format"),
        ("bytes.pem", "one.key", "bytes.pem: not in PEM format"),
        ("one.pem", "text.pem", "text.pem: no private key in PEM format"),
        ("one.pem", "one.pem", "one.pem: no private key in PEM format"),
        ("one.pem", "encrypted.key", "encrypted.key: the key is encrypted"),
        (".", "one.key", "Is a directory"),
    ],
)
def test_files_that_do_not_serve_are_one_line(pems, certificate, key, says):
    with pytest.raises(UserError, match=says) as refused:
        server_context(pems / certificate, pems / key)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "whoever can listen on the network sees the token"),
        (["--tls-certificate", "one.pem"], "belong together"),
        (["--tls-key", "one.key"], "belong together"),
        (["--tls-certificate", "one.pem", "--tls-key", "two.key"], "is not the key of"),
        (["--tls-certificate", "one.pem", "--tls-key", "one.key", "--plain-http"], "leave it out"),
    ],
)
def test_the_console_is_not_opened_further_without_tls(
    pems, tmp_path, monkeypatch, capsys, words, says
):
    monkeypatch.chdir(pems)
    status = main(["trial", "console", str(tmp_path / "trial"), "--host", "0.0.0.0", *words])
    told = capsys.readouterr().err
    assert status == 2 and says in told and told.count("\n") == 1
    assert not (tmp_path / "trial").exists()
