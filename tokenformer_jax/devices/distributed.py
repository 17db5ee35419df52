"""The processes of a pod: how one joins the others, and how all of them end when one does."""

import contextlib
import ctypes
import itertools
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

DEAD_AFTER = 20  # seconds without a sign of life of a process, after which JAX ends the others
OTHER_ENDED = os.EX_TEMPFAIL  # exit code of a process that ends because another did: all may be started again
_GRACE = 4  # seconds in which a process may end by itself before it does because of another
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}  # a silent machine is lost after 14 seconds
_DONE = "done"
_LONG_WAIT = 30 * 24 * 3600 * 1000  # ms; where a process dies, the others do not wait that long


class Peers:
    """The other processes of a pod. Where one dies or fails, all others say which and exit with `OTHER_ENDED`.

    All keep a connection to process 0, which the system closes when a process dies, however it does; process 0 passes
    on what it hears. JAX alone would need 20 seconds to notice, and then abort without a name. As a context, it tells
    the others how this process ends.
    """

    def __init__(self, count: int | None, index: int | None) -> None:
        """Joins the others.

        Args:
          count: how many there are, with this one, and
          index: which of them this is; None where JAX finds that out.

        Raises:
          RuntimeError, ValueError: they did not find each other.
        """
        jax.distributed.initialize(num_processes=count, process_id=index, heartbeat_timeout_seconds=DEAD_AFTER)
        state = distributed.global_state
        self.is_first = state.process_id == 0
        self.name = f"process {state.process_id} of {state.num_processes} (host {socket.gethostname()})"
        self.connections: list[socket.socket] = []
        self.lock, self.why = threading.Lock(), ""
        self.failed = False
        _delay_abort()
        client: Any = state.client
        if self.is_first:
            server = socket.create_server(("", 0), backlog=state.num_processes)
            self.secret = secrets.token_hex()  # so that whoever else finds the port is not taken for a process
            client.key_value_set("tokenformer/watch", f"{server.getsockname()[1]} {self.secret} {self.name}")
            _start(self._accept, server)
            return
        port, secret, name = client.blocking_key_value_get("tokenformer/watch", 60_000).split(" ", 2)
        host = str(state.coordinator_address).rsplit(":", 1)[0].strip("[]")
        try:
            connection = socket.create_connection((host, int(port)), timeout=20)
            connection.sendall(f"{secret} {self.name}\n".encode())
        except OSError as error:
            print(f"warning: no connection to {name} ({error}): a death ends all, but is not named", file=sys.stderr)
        else:
            self.connections.append(connection)
            _start(self._hear, name, _lines(connection))

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not error:
            return self._say(_DONE)
        if _may_come_of_others(error):
            time.sleep(DEAD_AFTER + 2 * _GRACE)  # where it does, this process ends here
        self.failed = True
        self._end(f"{self.name} failed ({_first_line(error)}): the others stop")
        # At exit JAX would wait for the others, as may threads that save. Process 0 leaves last: without it JAX aborts.
        _start(self._leave_after, _GRACE + (1 if self.is_first else -1), getattr(error, "exit_code", 1))

    def _accept(self, server: socket.socket) -> None:
        while True:
            _start(self._greet, server.accept()[0])

    def _greet(self, connection: socket.socket) -> None:
        lines = _lines(connection)
        try:
            secret, name = next(lines).rstrip().split(" ", 1)
        except (OSError, ValueError, StopIteration):
            return
        if secrets.compare_digest(secret, self.secret):
            with self.lock:
                self.connections.append(connection)
                why = self.why
            if why:  # it was said before this process came
                self._say(why)
            self._hear(name, lines)

    def _hear(self, name: str, lines: Iterator[str]) -> None:
        """Listens until a process is done, tells why all end, or dies."""
        why = f"{name} died or lost its network: the others stop; start all again, they go on from the last checkpoint"
        with contextlib.suppress(OSError, StopIteration):
            why = next(lines).rstrip()
        if why != _DONE and self._end(why):
            self._leave_after(_GRACE, OTHER_ENDED)

    def _say(self, line: str) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.sendall(f"{line}\n".encode())

    def _end(self, why: str) -> bool:
        """Tells the others why all end; False where it was said before."""
        with self.lock:
            if self.why:
                return False
            self.why = why
        self._say(why)
        return True

    def _leave_after(self, seconds: float, code: int) -> None:
        """Ends this process unless it has by then; the main thread may wait for the dead forever."""
        time.sleep(seconds)
        if code == OTHER_ENDED:
            if self.failed:  # and says so itself
                return
            print(f"error: {self.why}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Pod:
    """Processes that work together without using their devices; this one alone unless it is given a client.

    All call the same methods in the same order.
    """

    _calls = itertools.count()

    def __init__(self, client: Any = None, index: int = 0, count: int = 1) -> None:
        self.client, self.index, self.count = client, index, count

    def _name(self) -> str:
        return f"tokenformer/call {next(self._calls)}"

    def from_first(self, value: str) -> str:
        """Gives all the value of process 0, for which they wait."""
        if not self.client:
            return value
        name = self._name()
        if not self.index:
            self.client.key_value_set(name, value)
        return self.client.blocking_key_value_get(name, _LONG_WAIT)

    def wait_for_all(self) -> None:
        if self.client:
            self.client.wait_at_barrier(self._name(), _LONG_WAIT)

    def on_this_host(self) -> int:
        """How many of the processes run on this host."""
        if not self.client:
            return 1
        name, host = self._name(), socket.gethostname()
        self.client.key_value_set(f"{name}/{self.index}", host)
        hosts = [self.client.blocking_key_value_get(f"{name}/{i}", _LONG_WAIT) for i in range(self.count)]
        return hosts.count(host)


ALONE = Pod()


def this_pod() -> Pod:
    """The processes that this one has joined."""
    state: Any = distributed.global_state
    return Pod(state.client, state.process_id, state.num_processes) if state.client else ALONE


def _lines(connection: socket.socket) -> Iterator[str]:
    """What comes over a connection; OSError once its other end's machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if number := getattr(socket, option, None):
            connection.setsockopt(socket.IPPROTO_TCP, number, value)
    return connection.makefile()


def _start(function: Any, *args: Any) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def _first_line(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _may_come_of_others(error: BaseException | None) -> bool:
    """Whether the error, or what it came of, starts with a status of the runtime, such as "UNAVAILABLE: …"."""
    while error:
        if re.match(r"(?!INVALID_ARGUMENT|RESOURCE_EXHAUSTED)[A-Z]+(_[A-Z]+)*: ", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _delay_abort() -> None:
    """Leaves time to say which process died.

    JAX's client aborts as soon as process 0 is gone. It cannot be asked not to: with `jax_enable_recoverability` it
    does so all the same, and a `missed_heartbeat_callback` ends in std::bad_cast (jaxlib 0.10.2). No Python code can
    run before the abort, but a C function can be the signal's handler: `sleep`, which takes the signal's number, 6, for
    seconds. Elsewhere than on Linux the abort comes at once.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
