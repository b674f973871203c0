"""HTTP/1.1 as uvicorn speaks it, with a bound for what comes before a body: its parser has none, and nobody
has shown a key by then."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MOST_HEADERS = 32 << 10
"""Bytes of a request's line and headers, to which one read of the socket may be added."""


class BoundedHeaders(HttpToolsProtocol):
    """Answers 431 and hangs up on who sends more than MOST_HEADERS without an end."""

    _heading = False
    _came = 0

    def data_received(self, data: bytes) -> None:
        began = self._heading
        super().data_received(data)
        if not (began and self._heading) or self.transport.is_closing():
            return
        self._came += len(data)
        if self._came > MOST_HEADERS:
            self.transport.write(STATUS_LINE[431] + b"content-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        self._heading, self._came = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._heading = False
        super().on_headers_complete()
