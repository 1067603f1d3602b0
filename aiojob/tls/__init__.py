"""TLS servers whose handshakes run as jobs: callbacks may wait, and work goes to other threads.

======================  ==================================================================
``_libssl``             checked access to the libssl that Python's `ssl` uses
``_steps``              how a handshake's steps are run: on the loop's thread, in workers
``_native``             and by OpenSSL's own asynchronous jobs
``_callbacks``          `sni_callback`, `psk_server_callback`
``_handshake``          a handshake as synchronous code: bytes in, steps, bytes out
``_standins``           objects that pass for an SSLContext and an SSLObject
``_handover``           to the event loop's own TLS transport
``_acceptor``           a connection, until its application has it
``_server``             `create_server`, `start_server`
``aiohttp``             `aiojob.tls.aiohttp.TLSSite`; not imported unless asked for
======================  ==================================================================
"""

from ._callbacks import psk_server_callback, sni_callback
from ._native import is_native_capable
from ._server import HandshakeMode, Server, create_server, start_server

__all__ = [
    "HandshakeMode",
    "Server",
    "create_server",
    "is_native_capable",
    "psk_server_callback",
    "sni_callback",
    "start_server",
]
