"""Which certificate authorities are believed: one rule and one `SSLContext` for everything that speaks TLS."""

from __future__ import annotations

import os
import ssl
from typing import Mapping, NamedTuple


class UnusableRoots(OSError):
    """The authorities cannot be read; `origin` says whose setting that is."""

    def __init__(self, origin: str, text: str) -> None:
        super().__init__(text)
        self.origin = origin


class Roots(NamedTuple):
    """Where the authorities come from: a file, a directory, or both empty for the system's own store."""

    origin: str
    file: str = ""
    directory: str = ""


class Trust:
    """Builds the client's `SSLContext` (38 ms) and keeps it until the files behind it change.

    Order (design 4): *ca_file*, else SSL_CERT_FILE and SSL_CERT_DIR, else REQUESTS_CA_BUNDLE, else the system's store,
    else certifi. `context` reads files: the resolver thread calls it, one call at a time.
    """

    def __init__(self, ca_file: str = "", environ: Mapping[str, str] | None = None) -> None:
        self._ca_file = ca_file
        self._environ = os.environ if environ is None else environ
        self._stamp: object = None
        self._context: ssl.SSLContext | None = None

    def roots(self) -> Roots:
        """The source that counts just now."""
        environ = self._environ
        if self._ca_file:
            return _either("ca_file", self._ca_file)
        if environ.get("SSL_CERT_FILE") or environ.get("SSL_CERT_DIR"):
            names = "/".join(name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if environ.get(name))
            return Roots(names, environ.get("SSL_CERT_FILE", ""), environ.get("SSL_CERT_DIR", ""))
        if environ.get("REQUESTS_CA_BUNDLE"):
            return _either("REQUESTS_CA_BUNDLE", environ["REQUESTS_CA_BUNDLE"])
        if _system_has_roots():
            return Roots("the system's store")
        import certifi  # an image without ca-certificates; requests brings certifi along

        return Roots("certifi", certifi.where())

    def context(self) -> ssl.SSLContext:
        """The context for client connections; UnusableRoots when the files behind it cannot be used."""
        roots = self.roots()
        try:
            stamp = (roots, _stamp(roots.file), _stamp(roots.directory))
            if self._context is None or stamp != self._stamp:
                self._context, self._stamp = _build(roots), stamp
        except OSError as error:
            raise UnusableRoots(roots.origin, str(error)) from error
        return self._context


def _either(origin: str, path: str) -> Roots:
    return Roots(origin, "", path) if os.path.isdir(path) else Roots(origin, path)


def _system_has_roots() -> bool:
    paths = ssl.get_default_verify_paths()
    if paths.cafile and os.path.getsize(paths.cafile):
        return True
    try:
        return bool(paths.capath and os.listdir(paths.capath))
    except OSError:
        return False


def _stamp(path: str) -> tuple[int, ...]:
    """What changes when a file is written anew or replaced."""
    if not path:
        return ()
    status = os.stat(path)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _build(roots: Roots) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not roots.file and not roots.directory:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(roots.file or None, roots.directory or None)
    except ssl.SSLError as error:
        # OpenSSL's own text names neither the file nor the mistake.
        raise OSError(f"{roots.file or roots.directory} holds no readable certificate in PEM form") from error
    return context
