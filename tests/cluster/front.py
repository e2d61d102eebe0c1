"""The port of the API server: it can be closed and opened again on the same number, and ends with everything on it."""

from __future__ import annotations

import socket
import ssl
import threading
from typing import Callable

Serve = Callable[[socket.socket], None]


class Front:
    """Accepts connections on 127.0.0.1 and gives each a thread that calls *serve*.

    While `refuse`d the number stays ours: the socket is bound and does not listen, so that a connection is refused.
    One thread may call the methods.
    """

    def __init__(self, serve: Serve, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self._serve = serve
        self._tls = tls
        self._lock = threading.Lock()  # guards _open and _threads
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._socket = self._bound(port)
        self.port = int(self._socket.getsockname()[1])
        self._acceptor: threading.Thread | None = None
        self.listen()

    @staticmethod
    def _bound(port: int) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        return made

    def listen(self) -> None:
        """Take connections; nothing to do when it does already."""
        if self._acceptor is None:
            self._socket.listen(512)
            self._acceptor = threading.Thread(target=self._accept, name="cluster-accept", daemon=True)
            self._acceptor.start()

    def refuse(self) -> None:
        """Refuse new connections and cut those that are open."""
        if self._acceptor is not None:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
            self._acceptor.join()
            self._acceptor = None
            self._socket.close()
            self._socket = self._bound(self.port)
        self.cut()

    def cut(self) -> None:
        """Cut the connections that are open."""
        with self._lock:
            for one in self._open:
                _shut(one)

    @property
    def connections(self) -> int:
        with self._lock:
            return len(self._open)

    def close(self) -> None:
        """End everything, and wait for its threads."""
        self.refuse()
        self._socket.close()
        while True:
            with self._lock:
                if not self._threads:
                    return
                thread = next(iter(self._threads))
            thread.join(30)
            assert not thread.is_alive(), f"{thread.name} does not end"
            with self._lock:
                self._threads.discard(thread)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # shut down by `refuse`
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._one, args=(connection,), name="cluster-request", daemon=True)
            with self._lock:
                self._open.add(connection)
                self._threads.add(thread)
            thread.start()

    def _one(self, connection: socket.socket) -> None:
        line = connection
        try:
            if self._tls is not None:
                connection.settimeout(30)
                line = self._tls.wrap_socket(connection, server_side=True)
                line.settimeout(None)
                with self._lock:
                    self._open.discard(connection)  # detached by the wrapping
                    self._open.add(line)
            self._serve(line)
        except OSError:
            pass  # the other side went away, or we cut it
        finally:
            with self._lock:
                self._open.discard(line)
                self._open.discard(connection)
                self._threads.discard(threading.current_thread())
            line.close()
            connection.close()


def _shut(one: socket.socket) -> None:
    try:
        socket.socket.shutdown(one, socket.SHUT_RDWR)  # past TLS, whose own shutdown is not for another thread
    except OSError:
        pass
