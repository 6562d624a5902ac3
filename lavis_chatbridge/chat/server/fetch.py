"""Fetches a URL for a stranger: from public addresses only, so that nobody sees through the server what lies behind it.

The name is resolved once, every address that it has is checked, and the connection goes to a checked address, so a
name cannot lead elsewhere between the check and the use. Redirects are checked like the first URL.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from contextlib import suppress
from typing import Protocol

from lavis_chatbridge import __version__

_MOST_REDIRECTS = 3
_BLOCK = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Sink(Protocol):
    """Where bytes go."""

    def write(self, block: bytes, /) -> object:
        """Take some."""


class FetchError(Exception):
    """A URL that is not fetched; the message names no address."""


class TooLargeError(FetchError):
    """There are more bytes than allowed."""


class TooSlowError(FetchError):
    """It took too long."""


def fetch(url: str, file: Sink, limit: int, deadline: float) -> None:
    """Write what a URL holds to a file.

    Args:
        url: ``http`` or ``https``.
        file: Where it goes.
        limit: The most bytes.
        deadline: The moment (``time.monotonic``) at which to give up.

    Raises:
        FetchError: If the URL leads to an address that is not public, or cannot be fetched.
    """
    for _ in range(_MOST_REDIRECTS + 1):
        try:
            target = _fetch_one(url, file, limit, deadline)
        except (TimeoutError, ssl.SSLWantReadError):
            raise TooSlowError("fetching the URL took too long") from None
        except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
            if time.monotonic() >= deadline:  # the connection was closed under the reader
                raise TooSlowError("fetching the URL took too long") from None
            raise FetchError(f"the URL could not be fetched ({type(error).__name__})") from error
        if target is None:
            return
        url = urllib.parse.urljoin(url, target)
    raise FetchError(f"the URL leads to more than {_MOST_REDIRECTS} others")


def public_addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, if all of them are public.

    Raises:
        FetchError: If one is not, or there is none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError("the URL's host has no address") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise FetchError("the URL's host is not a public one")
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it is wrapped in another."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _fetch_one(url: str, file: Sink, limit: int, deadline: float) -> str | None:
    """Fetch a URL; returns where it leads if that is elsewhere."""
    try:
        parsed = urllib.parse.urlsplit(url)
        host, port = parsed.hostname, parsed.port
    except ValueError:
        raise FetchError("this is no URL") from None
    if parsed.scheme not in ("http", "https") or not host:
        raise FetchError("only http and https URLs are fetched")
    if parsed.username or parsed.password:
        raise FetchError("a URL with a user's name is not fetched")
    secure = parsed.scheme == "https"
    port = port or (443 if secure else 80)
    connection = _Connection(host, port, public_addresses(host, port), secure, deadline)
    watch = threading.Timer(max(0.0, deadline - time.monotonic()), connection.abort)
    watch.daemon = True
    watch.start()
    try:
        path = urllib.parse.quote(parsed.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = f"?{urllib.parse.quote(parsed.query, safe='/%:@!$&()*+,;=~-._?')}" if parsed.query else ""
        headers = {"User-Agent": f"lavis-chatbridge/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
        connection.request("GET", path + query, headers=headers)
        answer = connection.getresponse()
        if answer.status in _REDIRECTS and (target := answer.getheader("Location")):
            return target
        if answer.status != 200:
            raise FetchError(f"the URL's server answered with status {answer.status}")
        length = answer.getheader("Content-Length", "")
        if length.isdecimal() and int(length) > limit:
            raise TooLargeError
        count = 0
        while block := answer.read1(_BLOCK):
            count += len(block)
            if count > limit:
                raise TooLargeError
            _check_time(deadline)  # the watch may have run out before there was a line to close
            file.write(block)
        _check_time(deadline)
        return None
    finally:
        watch.cancel()
        connection.close()


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TooSlowError("fetching the URL took too long")


class _Connection(http.client.HTTPConnection):
    """A connection to one of the checked addresses of a host."""

    def __init__(self, host: str, port: int, addresses: list[str], secure: bool, deadline: float) -> None:
        super().__init__(host, port)
        self._addresses, self._secure, self._deadline = addresses, secure, deadline

    def connect(self) -> None:
        """Connect to the first address that answers."""
        fault: OSError | None = None
        for address in self._addresses:
            try:
                self.sock = socket.create_connection((address, self.port), timeout=self._left())
                break
            except OSError as error:
                fault = error
        else:
            raise fault or OSError("no address")
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def abort(self) -> None:
        """Close the line at the deadline: a server that sends a byte now and then outlasts any socket's time-out."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left
