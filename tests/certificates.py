"""Certificates for tests: an authority of a cluster, one of somebody else, and files of both."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import trustme

from xllm.config import SecurityConfig
from xllm.security.tls import Tls


def authority(name: str = "ours") -> trustme.CA:
    """One of each name for all tests."""
    return _authority(name)


@cache
def _authority(name: str) -> trustme.CA:
    return trustme.CA(organization_name=name, key_type=trustme.KeyType.ECDSA)


def certificate(name: str = "ours") -> trustme.LeafCert:
    """For loopback."""
    return _certificate(name)


@cache
def _certificate(name: str) -> trustme.LeafCert:
    return authority(name).issue_cert("127.0.0.1", "localhost", key_type=trustme.KeyType.ECDSA)


def write_certificates(folder: Path, name: str = "ours") -> SecurityConfig:
    """The files of one process; `folder` is made."""
    folder.mkdir(parents=True, exist_ok=True)
    cert, key, ca = folder / "cert.pem", folder / "key.pem", folder / "ca.pem"
    leaf = certificate(name)
    cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    authority(name).cert_pem.write_to_path(str(ca))
    return SecurityConfig(tls_cert=str(cert), tls_key=str(key), tls_ca=str(ca))


def make_tls(folder: Path, name: str = "ours") -> Tls:
    tls = Tls.of(write_certificates(folder, name))
    assert tls is not None
    return tls
