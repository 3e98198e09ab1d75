"""A network between a client and a server that can be cut: a TCP relay on this machine."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

CONNECTS_S = 1.0  # within which the server takes a connection


class Line:
    """Relays `url` to the server on `port`. While it is cut every connection ends at once."""

    def __init__(self, port: int) -> None:
        self._port, self._open = port, True
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """How many connections that were open it has ended."""
        with self._lock:
            self._open = False
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            return len(self._sockets) // 2

    def mend(self) -> None:
        self._open = True

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for a connection
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._port), CONNECTS_S)
                except OSError:  # it is not there, or takes nobody
                    client.close()
                    continue
                server.settimeout(None)
                with self._lock:
                    if not self._open:
                        client.close()
                        server.close()
                        continue
                    self._sockets |= {client, server}
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._relay, args=(one, other), daemon=True).start()

    def _relay(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        with self._lock:
            for each in (one, other):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._sockets.discard(one)
        one.close()
