#!/usr/bin/env python3
"""A conversation in two sessions, in which the second knows what the first said.

    python examples/two_sessions.py [--sessions ENDPOINT] [--context ENDPOINT] [--keep]

The session memory keeps the turns, the context manager chooses what a prompt needs of them: what a program with a
language model does, without the model. Everything is in the namespace `two_sessions`, and deleted at the end unless
--keep is given. Needs nothing of this project but its running agents (make start-pc2), and, where these want keys, the
file of one: that of MEMORY_KEY_FILE, else data/keys/operator.key where make keys made it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import zmq

NAMESPACE = "two_sessions"
# Of the host that this file is on, where `make keys` was run there.
OPERATOR_KEY = Path(__file__).resolve().parent.parent / "data" / "keys" / "operator.key"
TIMEOUT_MS = 15_000
TOKENS = 50

FIRST = [
    ("user", "Hi! On Friday I cook dinner for my sister Ana."),
    ("user", "Please remember that she is allergic to peanuts. She loves Thai food, though."),
    ("assistant", "Noted: Thai, and no peanuts."),
    ("user", "By the way, the weather is awful here today."),
]
QUESTION = "Which food should I avoid when Ana comes?"


class Agent:
    """One agent, over a REQ socket. Raises SystemExit when it does not answer or refuses."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.endpoint = endpoint
        self.is_silent = False
        self.socket = context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.LINGER, 0)
        show_key(self.socket)
        self.socket.connect(endpoint)

    def ask(self, action: str, **data: Any) -> dict[str, Any]:
        # Under one agent_id, what was told to one agent is found at once through the other.
        around = {"namespace": NAMESPACE, "agent_id": NAMESPACE, "request_id": secrets.token_hex(16)}
        self.socket.send_json({"v": 1, "action": action, "data": data, **around})
        if not self.socket.poll(TIMEOUT_MS):
            self.is_silent = True
            hint = "is it running (make status)? Does it want a key (MEMORY_KEY_FILE)?"
            sys.exit(f"{self.endpoint} does not answer; {hint}")
        reply: Any = self.socket.recv_json()
        if reply["status"] != "success":
            sys.exit(f"{action}: {reply['message']} ({reply['error_code']})")
        return dict(reply)


def key_file(default: Path = OPERATOR_KEY) -> str:
    """The file of the key to show; empty: none."""
    return os.environ.get("MEMORY_KEY_FILE", str(default) if default.exists() else "")


def show_key(socket: zmq.Socket[bytes]) -> None:
    """Show the key, where there is one: four lines of `field: value`."""
    path = key_file()
    if path:
        lines = [line for line in Path(path).read_text().splitlines() if not line.startswith("#")]
        key = dict(line.split(": ", 1) for line in lines)
        socket.curve_serverkey = key["server"].encode()
        socket.curve_publickey = key["public"].encode()
        socket.curve_secretkey = key["secret"].encode()


def say(sessions: Agent, session_id: str, role: str, content: str) -> None:
    print(f"  {role}: {content}")
    sessions.ask("add_interaction", session_id=session_id, role=role, content=content)


def remembered(context: Agent, user_id: str) -> dict[str, Any]:
    """What the context manager chooses, once nothing is `pending`: no turn is without its vector any more, as it is
    for a moment after it was said."""
    deadline_s = time.monotonic() + TIMEOUT_MS / 1000.0
    while True:
        found = context.ask("get_context_text", query=QUESTION, user_id=user_id, token_budget=TOKENS)
        if not found["pending"] or time.monotonic() > deadline_s:
            return found
        time.sleep(0.2)


def talk(sessions: Agent, context: Agent, user_id: str) -> None:
    print("first session")
    first = sessions.ask("create_session", user_id=user_id)["session_id"]
    for role, content in FIRST:
        say(sessions, first, role, content)
    sessions.ask("end_session", session_id=first)

    print("second session")
    second = sessions.ask("create_session", user_id=user_id)["session_id"]
    print(f"  user: {QUESTION}")
    found = remembered(context, user_id)
    print(f"what a prompt of at most {TOKENS} tokens gets of the first")
    print("\n".join(f"  {line}" for line in found["text"].strip().splitlines()))
    sessions.ask("add_interaction", session_id=second, role="user", content=QUESTION)


def forget(sessions: Agent, user_id: str) -> None:
    for session in sessions.ask("list_sessions", user_id=user_id)["results"]:
        sessions.ask("delete_session", session_id=session["session_id"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A conversation in two sessions.")
    parser.add_argument("--sessions", default="tcp://127.0.0.1:5574", metavar="ENDPOINT", help="the session memory")
    parser.add_argument("--context", default="tcp://127.0.0.1:7111", metavar="ENDPOINT", help="the context manager")
    parser.add_argument("--keep", action="store_true", help="leave the sessions in the store")
    options = parser.parse_args(arguments)
    with zmq.Context() as zmq_context:
        sessions, context = Agent(zmq_context, options.sessions), Agent(zmq_context, options.context)
        user_id = f"ben-{secrets.token_hex(4)}"
        try:
            talk(sessions, context, user_id)
        finally:
            if not options.keep and not sessions.is_silent:
                forget(sessions, user_id)
            sessions.socket.close()
            context.socket.close()


if __name__ == "__main__":
    main()
