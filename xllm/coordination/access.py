"""How this process gets into etcd: certificates for TLS, and a user's token.

A token is asked for when the first call is made, and again when etcd no longer knows it: after
minutes without use, on a member that has restarted, or when rights were changed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc
from etcd3aio import _protobuf as pb

from xllm.config import EtcdConfig
from xllm.coordination.endpoints import Endpoint, channel_options
from xllm.errors import ConfigError
from xllm.security.files import read_private_line

PASSWORD_VARIABLE = "XLLM_ETCD_PASSWORD"

Metadata = tuple[tuple[str, str], ...]

_TOKEN_IS_OVER = ("invalid auth token", "auth store is old")


class EtcdAccess:
    """Of one client. Without anything: no TLS but for https, and no user."""

    def __init__(
        self,
        *,
        ca: bytes | None = None,
        cert: bytes | None = None,
        key: bytes | None = None,
        user: str | None = None,
        password: str = "",
    ) -> None:
        """Certificates are PEM; `cert` and `key` go together."""
        self._credentials = grpc.ssl_channel_credentials(ca, key, cert)
        self._forces_tls = ca is not None or cert is not None
        self._user = user
        self._password = password
        self._token: str | None = None

    @classmethod
    def of(cls, config: EtcdConfig) -> EtcdAccess:
        """Raises: ConfigError."""
        password = ""
        if config.etcd_password_file is not None:
            password = read_private_line(config.etcd_password_file, "etcd_password_file", 1)
        elif config.etcd_user is not None:
            password = os.environ.get(PASSWORD_VARIABLE, "")
            if not password:
                raise ConfigError(
                    f"--etcd_user={config.etcd_user}: give the password with"
                    f" --etcd_password_file, or as {PASSWORD_VARIABLE} in the environment"
                )
        return cls(
            ca=_read("etcd_ca", config.etcd_ca),
            cert=_read("etcd_cert", config.etcd_cert),
            key=_read("etcd_key", config.etcd_key),
            user=config.etcd_user,
            password=password,
        )

    def open_channel(self, endpoint: Endpoint, target: str) -> grpc.aio.Channel:
        """A channel to `target`, an address of the endpoint; it connects when it is used."""
        options = channel_options()
        if not (endpoint.tls or self._forces_tls):
            return grpc.aio.insecure_channel(target, options=options)
        options.append(("grpc.ssl_target_name_override", endpoint.host))
        return grpc.aio.secure_channel(target, self._credentials, options=options)

    async def metadata(self, channel: grpc.aio.Channel, timeout_s: float) -> Metadata:
        """What a call on `channel` has to carry. Raises: AioRpcError if etcd refuses the user."""
        if self._user is None:
            return ()
        if self._token is None:
            request = pb.AuthenticateRequest(name=self._user, password=self._password)
            response: Any = await pb.AuthStub(channel).Authenticate(request, timeout=timeout_s)
            self._token = str(response.token)
        return (("token", self._token),)

    def is_renewable(self, details: str) -> bool:
        """Whether a call that failed with these words is worth another with a new token."""
        if self._token is None or not any(words in details for words in _TOKEN_IS_OVER):
            return False
        self._token = None
        return True


def _read(flag: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"--{flag}={path}: {error.strerror}") from error
