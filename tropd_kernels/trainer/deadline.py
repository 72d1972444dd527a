"""HTTP connections with a deadline for each whole attempt.

urllib3's timeout bounds connecting, sending, and each wait for further bytes. A server that sends a
byte now and then, as a proxy does to keep a connection open, would never time out. Here a timer
closes the connection at the deadline, in headers or body, and urllib3 reports its own timeout.
"""

import contextlib
import socket
import threading
from typing import Any

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection


class _InTime:
    """A connection that reads a whole answer within `self.timeout`, or raises TimeoutError."""

    timeout: float
    sock: socket.socket

    def getresponse(self) -> Any:
        over, sock = threading.Event(), self.sock

        def end() -> None:
            over.set()
            with contextlib.suppress(OSError):  # closed already
                # Not the method, which TLS overrides: it would end the session under the reader.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, end)
        timer.daemon = True
        timer.start()
        try:
            answer = super().getresponse()  # type: ignore[misc]
        except Exception as error:
            if over.is_set():
                raise TimeoutError("the answer was not whole in time") from error
            raise
        finally:
            timer.cancel()
        if over.is_set():  # a body without a length seems whole wherever it ends
            raise TimeoutError("the answer was not whole in time")
        return answer


class _Connection(_InTime, HTTPConnection):  # type: ignore[misc]
    pass


class _SecureConnection(_InTime, HTTPSConnection):  # type: ignore[misc]
    pass


class HTTPPool(HTTPConnectionPool):
    ConnectionCls = _Connection


class HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class TimedPoolManager(PoolManager):
    """urllib3's pool manager, whose `timeout` bounds whole attempts by its `total`."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.pool_classes_by_scheme = {"http": HTTPPool, "https": HTTPSPool}
