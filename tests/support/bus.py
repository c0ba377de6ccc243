"""What hears the error bus in tests: a plain SUB socket that notes when each message came, and the rule for gaps."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from memory_system.events import ERROR_TOPIC, HEALTH_TOPIC, HEARTBEAT_TOPIC, decode_message
from memory_system.keys import KeyFile, apply_client

TOPICS = (ERROR_TOPIC, HEALTH_TOPIC, HEARTBEAT_TOPIC)

Row = dict[str, Any]
Fetch = Callable[[int], list[Row]]


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the bus; `at_s` is when it was received, on the monotonic clock."""

    topic: str
    fields: dict[str, Any]
    at_s: float
    frames: int

    def is_about(self, topic: str, wanted: dict[str, Any]) -> bool:
        return self.topic == topic and all(self.fields.get(name) == value for name, value in wanted.items())


class Subscriber:
    """A thread with a SUB socket, subscribed to prefixes as the agents of the mesh do it.

    `began_s` is when it asked to be connected. `pause` and `resume` make it a subscriber that does not read.
    """

    def __init__(
        self, address: str, prefixes: Sequence[str] = TOPICS, key: KeyFile | None = None, **options: int
    ) -> None:
        self._address, self._prefixes, self._options, self._key = address, prefixes, options, key
        self._messages: list[Message] = []
        self._arrived = threading.Condition()
        self._ending, self._reading = threading.Event(), threading.Event()
        self._reading.set()
        self._thread = threading.Thread(target=self._run, name="subscriber", daemon=True)
        self.began_s = time.monotonic()
        self._thread.start()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pause(self) -> None:
        self._reading.clear()

    def resume(self) -> None:
        self._reading.set()

    def close(self) -> None:
        self._ending.set()
        self._reading.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def messages(self, topic: str | None = None, **wanted: Any) -> list[Message]:
        """What came so far, in order; of one topic with these fields when named."""
        with self._arrived:
            found = list(self._messages)
        return found if topic is None else [message for message in found if message.is_about(topic, wanted)]

    def wait(
        self,
        topic: str,
        timeout_s: float,
        *,
        after_s: float = 0.0,
        where: Callable[[Row], bool] | None = None,
        **wanted: Any,
    ) -> Message:
        """The first message of this topic with these fields that came after `after_s`; fails at the deadline."""
        deadline_s = time.monotonic() + timeout_s
        looked = 0
        with self._arrived:
            while True:
                for message in self._messages[looked:]:
                    late_enough = message.at_s >= after_s and message.is_about(topic, wanted)
                    if late_enough and (where is None or where(message.fields)):
                        return message
                looked = len(self._messages)
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"no {topic} {wanted} within {timeout_s:g} s; came: {self._summary()}"
                self._arrived.wait(left_s)

    def _summary(self) -> str:
        kinds = Counter(
            (each.topic, *map(each.fields.get, ("component", "state", "error_type"))) for each in self._messages
        )
        return ", ".join(f"{number} x {kind}" for kind, number in kinds.most_common(20)) or "nothing"

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as sock:
            sock.linger = 0
            for name, value in {"RCVHWM": 0, **self._options}.items():
                sock.setsockopt(getattr(zmq, name), value)
            for prefix in self._prefixes:
                sock.subscribe(prefix)
            apply_client(sock, self._key)
            sock.connect(self._address)
            while not self._ending.is_set():
                self._reading.wait()
                if sock.poll(50):
                    self._take(sock)

    def _take(self, sock: zmq.Socket[bytes]) -> None:
        frames = sock.recv_multipart()
        at_s = time.monotonic()
        topic, fields = decode_message(frames[0])
        with self._arrived:
            self._messages.append(Message(topic, fields, at_s, len(frames)))
            self._arrived.notify_all()


def close_gaps(messages: Iterable[Message], fetch: Fetch, last_seq: int) -> list[Row]:
    """The errors after row `last_seq`, each once, by what a subscriber received and fetched where something is missing.

    `fetch(since_seq)` returns the rows of the history after that one. A message says which was broadcast before it
    (prev_seq), and the manager's heartbeat which was the last (last_error_seq); what was not received is fetched from
    the row up to which all were told of (told_seq).
    """
    found: dict[int, Row] = {}
    told_seq = last_seq
    for message in messages:
        fields = message.fields
        if message.topic == ERROR_TOPIC:
            before, last = fields["prev_seq"], fields["seq"]
        elif message.topic == HEARTBEAT_TOPIC and "last_error_seq" in fields:
            before = last = fields["last_error_seq"]
        else:
            continue
        if before > last_seq:
            found.update((row["seq"], row) for row in fetch(told_seq) if row["seq"] <= before)
            told_seq = max(told_seq, before)
        if message.topic == ERROR_TOPIC:
            told_seq = max(told_seq, fields["told_seq"])
            if "repeats" not in fields and last > last_seq:
                found[last] = fields
        last_seq = max(last_seq, last)
    return [found[seq] for seq in sorted(found)]


def check_each_once(rows: Iterable[Row], expected: Iterable[int]) -> None:
    """Every number in `expected` is in the details of exactly one row; fails with what is lost or doubled."""
    numbers = Counter(row["details"]["number"] for row in rows if "number" in row["details"])
    wanted = set(expected)
    lost, doubled = wanted - numbers.keys(), [number for number, times in numbers.items() if times > 1]
    assert not lost, f"lost {len(lost)} of {len(wanted)}"
    assert not doubled, f"{len(doubled)} of {len(wanted)} came more than once"
    assert numbers.keys() == wanted, "some came that nobody reported"
