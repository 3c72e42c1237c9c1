"""TLS on every port of a process, and towards the others of its cluster.

The public API and the operator port show `--tls_cert` and ask for none. Between processes both
sides show theirs, and each must come from `--tls_ca`: whoever has a certificate of that authority
is a member, whatever its address. Names in certificates are not compared with addresses, which
change; so the authority must be the cluster's own.

A certificate that was renewed is read on SIGHUP: connections that live keep theirs.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from xllm.config import SecurityConfig
from xllm.errors import ConfigError

HANDSHAKE_S = 5.0
"""For the other side; until then, only the kernel and OpenSSL have anything of it."""


class Tls:
    """The contexts of one process; each method's answer is for one listener or connection."""

    def __init__(self, cert: str, key: str, ca: str | None) -> None:
        """Raises: ConfigError for files that cannot be used."""
        self._cert = cert
        self._key = key
        self._ca = ca
        self.reload()

    @classmethod
    def of(cls, config: SecurityConfig) -> Tls | None:
        """None: no TLS. Raises: ConfigError."""
        if config.tls_cert is None or config.tls_key is None:
            return None
        return cls(config.tls_cert, config.tls_key, config.tls_ca)

    def reload(self) -> None:
        """Raises: ConfigError; then everything is as before."""
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.minimum_version = ssl.TLSVersion.TLSv1_3
        self._load(client)
        if self._ca is not None:
            self._trust(client, self._ca)
        public, member = self._server_context(), self._member_context()
        self._public, self._member, self._client = public, member, client

    def for_clients(self) -> ssl.SSLContext:
        """Of a listener for the public or for operators."""
        context = self._server_context()
        context.sni_callback = lambda connection, *_: _continue_as(connection, self._public)
        return context

    def for_members(self) -> ssl.SSLContext:
        """Of a listener for other processes of the cluster, who show a certificate too."""
        assert self._ca is not None, "flags are checked"
        context = self._member_context()
        context.sni_callback = lambda connection, *_: _continue_as(connection, self._member)
        return context

    def to_member(self) -> ssl.SSLContext:
        """For one connection to another process of the cluster."""
        return self._client

    def _member_context(self) -> ssl.SSLContext:
        context = self._server_context()
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if self._ca is not None:
            self._trust(context, self._ca)
        return context

    def _server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        for flag, path in (("tls_cert", self._cert), ("tls_key", self._key)):
            _check_readable(flag, path)
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except (ssl.SSLError, ValueError, OSError) as error:
            raise ConfigError(
                f"--tls_cert={self._cert} --tls_key={self._key}: {error}; expected PEM files, the"
                " key of that certificate without a password"
            ) from error

    def _trust(self, context: ssl.SSLContext, ca: str) -> None:
        _check_readable("tls_ca", ca)
        try:
            context.load_verify_locations(ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"--tls_ca={ca}: {error}; expected a PEM file") from error


def _continue_as(connection: ssl.SSLObject, newest: ssl.SSLContext) -> None:
    """Called in each handshake of a listener, whose own context cannot be replaced: certificate and
    authority come from `newest`, everything else is as it was."""
    connection.context = newest


def _check_readable(flag: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"--{flag}={path}: {error.strerror}") from error


def _no_password() -> str:
    raise ValueError("the key has a password")
