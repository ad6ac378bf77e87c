"""A certificate for the endpoint, made at run time by a certificate authority made for it."""

import ssl
from pathlib import Path

CHAIN, CA = "chain.pem", "ca.pem"


def make_certificate(folder: Path) -> None:
    """Write the endpoint's certificate with its key, and its authority's certificate.

    Args:
        folder: Gets the files `CHAIN` (for the server) and `CA` (for clients to trust).
    """
    import trustme  # an extra, needed for TLS only

    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / CHAIN))
    authority.cert_pem.write_to_path(str(folder / CA))


def server_context(folder: Path) -> ssl.SSLContext:
    """The server side of TLS with the certificate in `folder`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / CHAIN)
    return context
