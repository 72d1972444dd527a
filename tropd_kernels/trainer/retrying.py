"""Further attempts of a request that failed, each announced by a line in the log."""

from __future__ import annotations

import logging
from typing import Any

import urllib3
from urllib3.exceptions import MaxRetryError, NameResolutionError

#: urllib3 retries at once, then after twice this many seconds, doubled each time up to 120.
BACKOFF_SECONDS = 0.5
#: HTTP statuses after which the same request may pass.
REPEATED = (408, 429, 500, 502, 503, 504)

_log = logging.getLogger(__name__)


class AnnouncedRetry(urllib3.Retry):
    """urllib3's retries, which otherwise pass in silence, for minutes if a server is away."""

    @classmethod
    def times(cls, attempts: int) -> AnnouncedRetry:
        """So many further attempts."""
        return cls(
            attempts,
            backoff_factor=BACKOFF_SECONDS,
            status_forcelist=REPEATED,
            allowed_methods=None,  # POST as well: scoring changes nothing on the server
            raise_on_status=False,
            respect_retry_after_header=False,  # it may ask for hours, and for other statuses
        )

    def increment(  # type: ignore[override]
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> urllib3.Retry:
        following = super().increment(method, url, response, error, _pool, _stacktrace)
        status = getattr(response, "status", None)
        if error is not None or status in REPEATED:  # else it is a redirection
            _log.warning(
                "teacher server, %s %s: %s; the next attempt is in %g s, and %s more may follow",
                method, url, error or f"HTTP {status}", following.get_backoff_time(),
                following.total,
            )  # fmt: skip
        return following


class FirstContact(AnnouncedRetry):
    """Of the first request: a name that no resolver knows is taken for a typing error at once."""

    def increment(self, *arguments: Any, **more: Any) -> urllib3.Retry:  # type: ignore[override]
        if isinstance(more.get("error"), NameResolutionError):
            raise MaxRetryError(more["_pool"], None, more["error"])
        return super().increment(*arguments, **more)
