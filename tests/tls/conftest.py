"""Certificates, contexts and kinds of TLS servers."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from support import unavailable

from aiojob.tls._handover import can_rebind
from tls.kit import KINDS, Kind, LoopErrors
from tls.native_engine import NativeEngine

NAMES = ["localhost", *(f"{name}.example" for name in ("a", "b", "c", "d"))]


@dataclass(frozen=True)
class Certificates:
    """An authority, its certificates by name, and those of another authority."""

    authority: trustme.CA
    by_name: dict[str, trustme.LeafCert]
    rsa: trustme.LeafCert
    client: trustme.LeafCert
    stranger: trustme.LeafCert
    authority_file: Path

    def server_context(self, name: str = "localhost") -> ssl.SSLContext:
        return server_context_with(self.by_name[name])

    def rsa_context(self) -> ssl.SSLContext:
        return server_context_with(self.rsa)

    def client_context(self, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context


def server_context_with(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    authority = trustme.CA()
    authority_file = tmp_path_factory.mktemp("certificates") / "authority.pem"
    authority.cert_pem.write_to_path(authority_file)
    return Certificates(
        authority=authority,
        by_name={name: authority.issue_cert(name) for name in NAMES},
        rsa=authority.issue_cert("localhost", key_type=trustme.KeyType.RSA),
        client=authority.issue_cert("client@localhost"),
        stranger=trustme.CA().issue_cert("stranger@localhost"),
        authority_file=authority_file,
    )


@pytest.fixture
def server_context(certificates: Certificates) -> ssl.SSLContext:
    return certificates.server_context()


@pytest.fixture
def engine_context(engine: NativeEngine, certificates: Certificates) -> ssl.SSLContext:
    """A server's context whose key belongs to the engine."""
    return certificates.rsa_context()


@pytest.fixture
def client_context(certificates: Certificates) -> ssl.SSLContext:
    return certificates.client_context()


VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, client_context: ssl.SSLContext) -> str:
    """A version of TLS, which the client context is limited to."""
    version: str = request.param
    client_context.minimum_version = client_context.maximum_version = VERSIONS[version]
    return version


@pytest.fixture
def client_contexts(certificates: Certificates) -> dict[str, ssl.SSLContext]:
    """For each version of TLS, a context of clients that speak it."""
    return {name: certificates.client_context(version) for name, version in VERSIONS.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """A kind of server, all of them unless a test names those that matter to it."""
    kind = KINDS[request.param]
    if not kind.rebind:
        monkeypatch.setattr("aiojob.tls._handover.can_rebind", lambda: False)
    elif not (kind.is_reference or can_rebind()):
        unavailable("needs a libssl that can be reached")
    return kind


@pytest.fixture
async def loop_errors() -> LoopErrors:
    """Collect what the loop's exception handler gets, for a test that expects something."""
    return LoopErrors()
