"""The least that a durable add can be: one thread that decodes, inserts under a unique key, commits, then answers.

    python bench/reference.py DATABASE

At most 64 requests share a commit (WAL, synchronous=FULL). Prints its port, serves until stdin ends. No checks, no full
text, no index log, no history: the service is compared with this, not with nothing.
"""

from __future__ import annotations

import sqlite3
import sys
import time

import msgpack
import zmq

GROUP = 64
INSERT = "INSERT INTO memories (key, content, record, created_at) VALUES (?, ?, ?, ?)"


def open_database(path: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(
        "CREATE TABLE memories (row_id INTEGER PRIMARY KEY, key TEXT UNIQUE, content TEXT, record BLOB,"
        " created_at REAL) STRICT"
    )
    return db


def commit(db: sqlite3.Connection, socket: zmq.Socket[bytes], group: list[list[bytes]]) -> None:
    requests = [msgpack.unpackb(frames[2]) for frames in group]
    db.execute("BEGIN IMMEDIATE")
    for request in requests:
        data = request["data"]
        db.execute(INSERT, (request["request_id"], data.get("content"), msgpack.packb(data), time.time()))
    db.execute("COMMIT")
    for frames, request in zip(group, requests, strict=True):
        reply = {"status": "success", "request_id": request["request_id"]}
        socket.send_multipart([frames[0], b"", msgpack.packb(reply)], zmq.NOBLOCK)


def serve(path: str) -> None:
    db = open_database(path)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        while sys.stdin.fileno() not in dict(poller.poll()):
            group: list[list[bytes]] = []
            while len(group) < GROUP and socket.poll(0):
                group.append(socket.recv_multipart())
            if group:
                commit(db, socket, group)
    db.close()


if __name__ == "__main__":
    serve(sys.argv[1])
