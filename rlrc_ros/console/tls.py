"""The console's certificate and key, from files."""

from __future__ import annotations

import ssl
from pathlib import Path

from rlrc_ros.errors import UserError


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """What a server needs to speak TLS 1.2 or newer.

    Args:
        certificate: PEM file, the server's own first, then those that signed it.
        key: PEM file, its private key, not encrypted.

    Raises:
        UserError: one of them cannot be read, or is none, or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _require_certificate(certificate, _read(certificate))
    _read(key)

    def refuse() -> str:
        raise UserError(f"{key}: the key is encrypted; `openssl pkey -in {key}` decrypts it")

    try:
        context.load_cert_chain(certificate, key, refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UserError(f"{key} is not the key of the certificate {certificate}") from None
        raise UserError(f"{key}: no private key in PEM format ({error.reason})") from None
    return context


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not in PEM format, which is text") from None


def _require_certificate(path: Path, text: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise UserError(f"{path}: no certificate in PEM format") from None
