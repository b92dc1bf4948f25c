"""`dsv2 serve`: the server as a process."""

import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dsv2_local.commands.console import notice
from dsv2_local.errors import InputError
from dsv2_local.llm import LLM
from dsv2_local.server.access import Access, read_keys
from dsv2_local.server.app import create_app
from dsv2_local.server.connections import uvicorn_config
from dsv2_local.server.draining import DrainingServer
from dsv2_local.server.service import Service


@dataclass(frozen=True)
class ServeOptions:
    """What the server is asked.

    Attributes:
        host, port: where to listen; port 0 is a free one.
        idle_unload: seconds without a request after which the model is unloaded; None: never.
        drain_timeout: seconds that answers have to end after SIGTERM.
        api_key_file: file with the keys, one a line; None: only $DSV2_API_KEY counts.
        allowed_hosts: further names of the server.
        cors_origins: pages of other servers that may use it.
    """

    host: str
    port: int
    idle_unload: float | None
    drain_timeout: float
    api_key_file: Path | None = None
    allowed_hosts: Sequence[str] = ()
    cors_origins: Sequence[str] = ()


def run(options: ServeOptions, name: str, load: Callable[[], LLM]) -> None:
    """Serve until a signal ends it.

    Args:
        options: what the server is asked.
        name: the model's name until it is loaded.
        load: loads it; called in a thread, while the server listens already.

    Raises:
        InputError: the address cannot be bound, or other machines can reach it and there is no key.
        Dsv2Error: the model cannot be loaded.
    """
    keys = read_keys(options.api_key_file)
    if options.api_key_file and options.api_key_file.stat().st_mode & stat.S_IROTH:
        notice(f"other users can read the keys in {options.api_key_file}; run: chmod 600 {options.api_key_file}")
    access = Access.of(options.host, options.allowed_hosts, options.cors_origins, keys)
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    service = Service(load, name, options.idle_unload, failed)
    _log_to_stderr()
    config = uvicorn_config(create_app(service, access))
    server = DrainingServer(config, service, options.drain_timeout, _abandon)
    with listening(options.host, options.port) as listener, _signals_to(server):
        notice(f"serving {name} on {address(listener)} (Ctrl-C ends)")
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address is unknown, not this machine's, or in use.
    """
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(found)
            listener.listen(128)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        what = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"cannot listen on {host} port {port}: {what}; choose another --host or --port") from None
    return listener


def address(listener: socket.socket) -> str:
    """Where a browser finds the server that listens here."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()  # stderr
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("uvicorn", "dsv2_local.server"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if name == "uvicorn" else logging.INFO)


def _abandon() -> NoReturn:
    """End the process while a thread loads a model, which may take minutes and cannot be interrupted."""
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def _signals_to(server: DrainingServer) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end a server, from now on; SIGHUP not if it is ignored, as `nohup` has it."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, server.handle_exit) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
