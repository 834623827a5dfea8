"""The ranks watch each other: when one dies, fails, stands still or hangs, all end and name it.

Every rank says a few times a second where it is, over a socket of its own to rank 0, which
judges. Not over torch's store: the kernel closes a socket the moment its process dies, and whoever
asks a store whose host stands still stands still too. A thread does it, so that a collective that
never returns can be ended.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from asymlift.errors import Exit, Unavailable, UserError
from asymlift.runtime import dist, watch
from asymlift.runtime.failures import is_lost_connection, is_out_of_memory, out_of_memory
from asymlift.runtime.launch import Ranks

BEAT = 0.2  # seconds between two words of a rank
BUSY = 250  # words per second that rank 0 may have to hear, which takes half a percent of its time
ANSWER = 1.0  # seconds that a question or a hello may take
GRACE = 3.0  # for the main thread to fail by itself, as it does when all ranks agreed on it
LOST = 0.5  # likewise when a rank is gone: under gloo it fails at once, NCCL would abort soon
CLOSING = 60.0  # for a tracker to send what is left
LEAVING = 10.0  # for a main thread that is on its way out
MARGIN = 8  # that collectives wait longer than the watchdog, which knows more to say
MEETING = 30.0  # for all sockets to be connected
ENDED = "was killed, perhaps for its memory: it ended without a word"
GO_ON = "Run the same command again to go on from the last checkpoint"

Message: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Why the run ends."""

    rank: int
    said: str
    exit: int
    grace: float  # for the main threads to end by themselves


@dataclass
class Seen:
    """What a rank said last, and when that was heard."""

    host: str
    place: str
    line: str  # of code
    age: float  # seconds since it last went on to something else, when it said so
    patience: float
    heard: float

    def still(self, now: float) -> float:
        """For how long it has been doing the same."""
        return self.age + now - self.heard


class Line:
    """JSON, one document per line, to and from one other rank."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.lock, self.rest = connection, threading.Lock(), b""
        connection.settimeout(ANSWER)  # for reading; nothing waits to be written

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Message) -> None:
        """Say it, or not: a rank that does not listen is noticed elsewhere."""
        with self.lock, suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def read(self) -> list[Message] | None:
        """What has come; None if the other end is closed."""
        try:
            got = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            got = b""
        if not got:
            return None
        *lines, self.rest = (self.rest + got).split(b"\n")
        messages = []
        for line in lines:
            with suppress(ValueError):  # cut off by a full buffer, or not from us
                messages.append(json.loads(line))
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        self.connection.close()


@contextmanager
def watched(ranks: Ranks, limit: float) -> Iterator[None]:
    """Inside, no rank waits for another that is gone or hangs longer than `limit` seconds.

    A failure of this rank is told to the others; one that only follows from another rank's is
    replaced by that one's reason.
    """
    watch.begin()
    if ranks.world == 1:
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, "this process") from error
            raise
        return
    dog = Watchdog(ranks, limit, meet(ranks))
    dog.thread.start()
    try:
        yield
    except BaseException as error:
        reason = dog.reason(error)
        if reason is error:
            raise
        raise reason from error
    dog.farewell()


class Watchdog:
    """One rank's watch: rank 0 has a line to every other, the others have one to rank 0."""

    def __init__(self, ranks: Ranks, limit: float, lines: dict[int, Line]) -> None:
        self.ranks, self.limit, self.lines = ranks, limit, lines
        self.host, self.tick = socket.gethostname(), max(BEAT, ranks.world / BUSY)
        self.seen = {
            rank: Seen("?", "while starting", "", 0, watch.FIRST_TIME, time.monotonic())
            for rank in lines
        }
        self.name = f"rank {ranks.rank} ({self.host})"
        self.verdict: Verdict | None = None
        self.deciding, self.decided = threading.Lock(), threading.Event()
        self.taken = threading.Event()  # the main thread ends the process by itself
        self.over = False  # all went well here
        self.thread = threading.Thread(target=self.run, name="watchdog", daemon=True)

    # --- the thread ---------------------------------------------------------------------------

    def run(self) -> None:
        woke = time.monotonic()
        while self.lines and not self.decided.is_set() and not self.over:
            self.tell_all(self.words())
            self.listen()
            now = time.monotonic()
            if now - woke > self.limit / 2:
                self.forgive(now - woke, now)  # this process stood still, perhaps all did
            elif verdict := self.judged(now, self.limit):
                self.decide(verdict)
            woke = now
        if self.verdict is not None:
            self.aftermath(self.verdict)
        for line in self.lines.values():
            line.close()

    def words(self) -> Message:
        place = watch.last
        return {
            "host": self.host,
            "place": str(place),
            "line": watch.line_of_code(),
            "age": time.monotonic() - place.since,
            "patience": place.patience,
        }

    def listen(self) -> None:
        """Hear whatever comes until the next words of this rank are due."""
        until = time.monotonic() + self.tick
        with selectors.DefaultSelector() as selector:
            for rank, line in self.lines.items():
                selector.register(line, selectors.EVENT_READ, rank)
            while (left := until - time.monotonic()) > 0 and not self.decided.is_set():
                for key, _ in selector.select(left):
                    rank = key.data
                    messages = self.lines[rank].read()
                    for message in messages or []:
                        self.hear(rank, message)
                    if rank not in self.seen:  # it has said farewell
                        selector.unregister(key.fileobj)
                        self.lines.pop(rank).close()
                    elif messages is None:
                        selector.unregister(key.fileobj)
                        self.decide(self.lost(rank, ENDED, self.seen[rank]))

    def hear(self, rank: int, message: Message) -> None:
        if "said" in message:
            self.decide(Verdict(**message))
        elif "asks" in message:
            if verdict := self.judged(time.monotonic(), self.limit, patient=False):
                self.decide(verdict)
        elif "bye" in message:
            del self.seen[rank]
        else:
            self.seen[rank] = Seen(**message, heard=time.monotonic())

    def forgive(self, seconds: float, now: float) -> None:
        watch.forgive(seconds)
        for seen in self.seen.values():
            seen.heard = now

    # --- judging ------------------------------------------------------------------------------

    def judged(self, now: float, limit: float, *, patient: bool = True) -> Verdict | None:
        """The rank that nothing was heard of, or, by rank 0, that hangs."""
        for rank, seen in list(self.seen.items()):
            if now - seen.heard > limit:
                return self.about(rank, seen, now)
        if not self.ranks.first:
            return None
        everybody = {**self.seen, 0: Seen(**self.words(), heard=now)}
        hung = hanging(everybody, now, limit, patient=patient)
        return None if hung is None else self.about(hung, everybody[hung], now)

    def about(self, rank: int, seen: Seen, now: float) -> Verdict:
        """In words: it is silent, as a stopped process is, or it speaks but hangs."""
        silent = now - seen.heard
        if silent > seen.still(now) / 2:
            what = f"was not heard of for {silent:.0f} s, and was last"
        else:
            line = f" (at {seen.line})" if seen.line else ""
            what = f"has not moved for {seen.still(now):.0f} s{line},"
            longer = f"; if it only needs longer, raise finetune.timeout (now {self.limit:g})"
            return self.lost(rank, what, seen, longer)
        return self.lost(rank, what, seen)

    def lost(self, rank: int, what: str, seen: Seen, longer: str = "") -> Verdict:
        said = f"rank {rank} ({seen.host}) {what} {seen.place}.\n{GO_ON}{longer}"
        return Verdict(rank, said, int(Exit.RESUMABLE), LOST)

    def decide(self, verdict: Verdict) -> None:
        """The first verdict stands, and goes to everybody."""
        with self.deciding:
            if self.verdict is not None or self.over:
                return
            self.verdict = verdict
            self.tell_all(asdict(verdict))
            self.decided.set()

    def tell_all(self, message: Message) -> None:
        for line in list(self.lines.values()):
            line.send(message)

    def aftermath(self, verdict: Verdict) -> None:
        """End the process, unless its main thread does."""
        if self.taken.wait(verdict.grace) or (watch.last.ends and self.taken.wait(CLOSING)):
            time.sleep(LEAVING)
        else:
            os.write(2, f"error: {verdict.said}\n".encode())
        os._exit(verdict.exit)

    # --- the main thread ----------------------------------------------------------------------

    def reason(self, error: BaseException) -> BaseException:
        """What to end with: this rank's own error, told to the others, or what it follows from."""
        self.taken.set()
        if not isinstance(error, UserError):
            if is_out_of_memory(error):
                error = out_of_memory(error, self.name)
            elif is_lost_connection(error):
                error = self.after_a_loss(error)
            elif self.verdict is not None:
                error = dist.again((self.verdict.said, self.verdict.exit))
        self.decide(self.about_me(error))
        return error

    def about_me(self, error: BaseException) -> Verdict:
        if isinstance(error, UserError):
            said, code = str(error), error.exit
        elif isinstance(error, KeyboardInterrupt):
            said, code = "Ctrl-C", Exit.INTERRUPTED
        else:
            said, code = f"{type(error).__name__}: {error}", Exit.UNEXPECTED
        if not said.startswith(self.name):
            verb = "stopped" if code in (Exit.RESUMABLE, Exit.INTERRUPTED) else "failed"
            said = f"{self.name} {verb} {watch.last}: {said}"
        return Verdict(self.ranks.rank, said, int(code), GRACE)

    def after_a_loss(self, error: BaseException) -> UserError:
        """A collective failed: some rank is to blame, and the watch knows it, or soon will."""
        if not self.decided.wait(ANSWER):
            if verdict := self.judged(time.monotonic(), self.limit, patient=False):
                self.decide(verdict)
            self.tell_all({"asks": True})
            self.decided.wait(ANSWER)
        if self.verdict is not None:
            return dist.again((self.verdict.said, self.verdict.exit))
        first_line = str(error).splitlines()[0][:200]
        said = f"the ranks lost each other {watch.last} ({first_line}).\n{GO_ON}"
        return dist.again((said, Exit.RESUMABLE))

    def farewell(self) -> None:
        """All is done here: nobody has to worry when this process ends."""
        with self.deciding:
            self.over = True
        self.tell_all({"bye": True})


def hanging(
    everybody: Mapping[int, Seen], now: float, limit: float, *, patient: bool = True
) -> int | None:
    """The rank that has done the same for too long; of several the one that stopped first.

    The others went on until they had to wait for it.
    """
    still = {
        rank: seen.still(now)
        for rank, seen in everybody.items()
        if seen.still(now) > limit * (seen.patience if patient else 1)
    }
    return max(still, key=lambda rank: still[rank]) if still else None


# ---- meeting -----------------------------------------------------------------------------------


def meet(ranks: Ranks) -> dict[int, Line]:
    """Connect every rank with rank 0. Every rank has to call."""
    server = listening(ranks.world) if ranks.first else None
    port, secret = dist.first_does(
        ranks, lambda: (server.getsockname()[1] if server else 0, secrets.token_hex(16))
    )

    def connect() -> dict[int, Line]:
        if server is None:
            return {0: call(os.environ["MASTER_ADDR"], port, ranks.rank, secret)}
        with server:
            return accept(server, ranks.world, secret)

    return dist.all_do(ranks, connect)


def listening(world: int) -> socket.socket:
    """A port on every address of this machine; which one the others come by is not known."""
    with suppress(OSError):
        return socket.create_server(
            ("::", 0), family=socket.AF_INET6, backlog=world, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=world)


def call(host: str, port: int, rank: int, secret: str) -> Line:
    try:
        line = Line(socket.create_connection((host, port), MEETING))
    except OSError as error:
        raise Unavailable(
            f"rank {rank} ({socket.gethostname()}) cannot reach rank 0 at {host}:{port} ({error}); "
            "the machines of a run have to reach each other on every port"
        ) from None
    line.send({"rank": rank, "secret": secret})
    return line


def accept(server: socket.socket, world: int, secret: str) -> dict[int, Line]:
    """A line from every other rank; whoever else comes by is sent away."""
    lines: dict[int, Line] = {}
    until = time.monotonic() + MEETING
    while len(lines) < world - 1:
        server.settimeout(max(0.01, until - time.monotonic()))
        try:
            line = Line(server.accept()[0])
        except TimeoutError:
            absent = sorted(set(range(1, world)) - set(lines))
            raise Unavailable(
                f"rank {', '.join(map(str, absent))} did not reach rank 0 within {MEETING:.0f} s; "
                "the machines of a run have to reach each other on every port"
            ) from None
        hello = (line.read() or [{}])[0]
        if hello.get("secret") == secret:
            lines[hello["rank"]] = line
        else:
            line.close()
    return lines
