#!/usr/bin/env python3
"""SOLLOL: one address in front of several unequal Ollama nodes, as one fast, dependable Ollama.

    python sollol.py --hosts hosts.txt      then point any Ollama client at http://127.0.0.1:8000

Runs on the Python 3.11+ standard library; uvloop is used when it can be imported. One request flows down this page:

    Listener.accept, converse               a connection, one task                               Listener, Conversation
    ClientConnection.next_head              the bytes of a head                                  Client connection
    parse_request                           refuse what is malformed or ambiguous                Wire
    serve                                   its route, and the handler there                     Conversation
    Access.check                            may it be made?                                      Access
    read_request, read_spec                 model, priority, client, sizes, prefix, options      Reading a request
    serve_inference, Dispatcher.enter       a ticket: its place in the heap                      Inference, Waiting room
    Inference.run, acquire_lease            attempts until one succeeds                          Inference
    Dispatcher.dispatch                     which ticket goes next                               Dispatcher
    CompletionTime.assign                   to which node: where it is finished first            Policies, Prediction
    give_lease                              one slot on one node                                 Tickets and leases
    begin, Pool.request                     connect or reuse, send                               Inference, Upstream
    NodeConnection.response                 wait for the first byte                              Upstream
    relay_answer, Relay.data                bytes to the client as they come                     Relay
    Lease.heard                             the node lives: what is seen of it while it answers  Tickets and leases
    judge_end, Dispatcher.observe           the statistics in the last line                      Relay, Dispatcher
    learn_from                              slots and speeds of the node                         Learning, Estimates
    Dispatcher.release                      the slot is free, for the next ticket                Dispatcher

What follows is around that: going on with a broken stream, requests without a slot, changes on many nodes, probes,
statistics, files, upgrades, peers, the life of the server, the command line, what Grafana and Prometheus are given and,
last, the page of the dashboard.

Decisions are pure: they are told `now` (seconds of the running loop's clock), and touch no socket and no clock. They
are plain functions, so nothing can happen between a read and a write, and there is no lock in this file.
"""

from __future__ import annotations      # SOLLOL needs Python 3.11 or later

import sys

if (needed := (3, 11)) > sys.version_info[:2]:
    sys.stderr.write("SOLLOL needs Python %d.%d or later, and this is %d.%d\n" % (*needed, *sys.version_info[:2]))
    sys.exit(2)

import argparse
import asyncio
import base64
import binascii
import bisect
import collections
import contextlib
import datetime
import difflib
import email.utils
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import resource
import secrets
import select
import signal
import socket
import ssl
import stat
import struct
import subprocess
import tempfile
import termios
import threading
import time
import types
import urllib.parse
from collections.abc import (Awaitable, Callable, Container, Coroutine, Generator, Iterable, Iterator, Mapping,
                             MutableMapping, Sequence)
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar

__version__ = "0.1.0"

# -----------------------------------------------------------------------------
# Limits that rooms share: each of the others stands beside its use
# -----------------------------------------------------------------------------

KIB, MIB, GIB = 2**10, 2**20, 2**30

# Go, and so Ollama, accepts heads of 1 MiB; no client is known to send more than a few KiB.
MAX_HEAD_BYTES = 64 * KIB
DECODED_BYTES = 32 * KIB            # of a chunked body, in one step: 6 ms if each chunk holds one byte
READ_AHEAD_BYTES = 256 * KIB        # unread bytes held per connection before its socket is left to fill up
TAIL_BYTES = 2 * KIB                # the end of an answer; all statistics are in its last few hundred bytes
BODY_PAUSE_S = 60.0                 # silence in the middle of a request body
DEAD_S = 15.0                       # without an answer to /api/version: a node gets nothing new
FRESH_S = 0.25                      # a merged answer waits so long for nodes, then shows what was seen last
SENT_BYTES = 256 * KIB              # of a body, in one turn of the loop; over TLS 0.3 ms
MAX_ATTEMPTS = 3                    # nodes tried for one request
MAX_LINE_BYTES = 1 * MIB            # of progress
DEFAULT_PRIORITY = 5
LOOK_AGAIN_S = 1.0                  # after which held tickets are judged again although nothing has happened
OVERHEAD_S = 0.03                   # per request in the node, outside prefill and decode, before it is known
MOST_OVERHEAD_S = 0.4               # what is longer is a wait
SPEED_GAIN, OUTPUT_GAIN = 0.15, 0.03    # EWMA gains: of speeds, of output lengths
RETRY_SLOT_S = 30.0                 # pause after a disproved slot, doubled each time, at most 2**6 times
UNORDERED_S = 0.05                  # requests sent within this and a round trip may have overtaken each other
GROSS = 3.0                         # times off: such a sample and its estimate cannot both be right
ALIKE = 2.0                         # times: samples that far apart at most agree, and confirm an estimate
MANY_SAMPLES, LATELY_S = 8, 60.0    # this many samples, confirmed this recently, outweigh two gross outliers
FULL_PROMPT_TOKENS, LEAST_PROMPT_TOKENS = 64, 8     # below the first: weak evidence of speed; below the second: none
LEEWAY = 1.3                        # factor beyond a bound that still counts as noise, not as a sample
KEPT_SAMPLES = 3                    # a kept estimate counts as so many at most: new samples then weigh 0.25, 0.2, 0.17
SILENT_S = 5.0                      # a node is not in doubt before it has been silent for this long

# What is believed of a model before anything is measured: a mid-range card, where 1 GB of weights cost
# 4 ms a token to decode (RTX 3060, 8B Q4: 4.9 GB, 50 tok/s) and 0.14 ms a token to prefill.
PRIOR_DECODE_S_PER_GB, PRIOR_PREFILL_S_PER_GB = 0.004, 0.00014
PRIOR_MODEL_BYTES = 4.9e9
SWEEP_S = 0.5                       # one timer serves every time-out in this file; so they are this coarse
STEP_S, STEPS_KEPT = 10.0, 61       # the dashboard's lines: ten minutes
EVENT_S = 1.0                       # between two events to the dashboard


# -----------------------------------------------------------------------------
# Vocabulary: what is spoken of below?
# -----------------------------------------------------------------------------

LOG = logging.getLogger("sollol")
Body = bytes | bytearray            # the whole of one; a long one is not copied out of its buffer
Json = dict[str, Any]               # an object, as it was read or is to be written
HeadFields = dict[bytes, bytes]     # the last value, by the lower-case name
HeadLines = list[tuple[bytes, bytes, bytes]]    # (lower-case name, value, raw line)
Prefix = tuple[tuple[int, int], ...]        # (hash, chars) after each leading part of a prompt
RunnerOptions = tuple[tuple[str, float], ...]
Parsed = TypeVar("Parsed")
Line = TypeVar("Line", bytes, str)


# What is kept is a plain value: an exception would keep its traceback, the frames in it and so the request's body.

class Failure(NamedTuple):
    """Why a node gave no answer.

    `kind`: refused, died, garbage; model: its stream told an error; lost: it is dead; raced: another was faster.
    """

    kind: str
    text: str

    def error(self) -> Exception:
        return NodeFailure(*self)


class Answer(NamedTuple):
    """An error that the gateway answers itself, and whether the connection ends with it."""

    status: int
    text: str
    close: bool = False
    retry_after_s: float | None = None

    def error(self) -> Exception:
        return Refusal(self.status, self.text, close=self.close, retry_after_s=self.retry_after_s)


class Refusal(Exception):
    """A request that the gateway answers itself. Carries that answer, and whether the connection ends."""

    def __init__(self, status: int, text: str, *, close: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.close, self.retry_after_s = status, text, close, retry_after_s

    @property
    def value(self) -> Answer:
        return Answer(self.status, self.text, self.close, self.retry_after_s)


class ProtocolError(Refusal):
    """HTTP that is malformed or can be read in two ways. Always ends the connection: its framing is unknown."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(status, text, close=True)


class ClientGone(Exception):
    """The client closed its connection in the middle of a request."""


class NodeFailure(Exception):
    """A node did not give an answer."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.value = kind, Failure(kind, text)


class ConfigError(Exception):
    """A mistake in a file or on the command line, in one line that names the place."""


class Family(enum.Enum):
    """Whose shape an error answer has: it follows from the path."""

    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Where(enum.Enum):
    """Which nodes a request concerns: the words of the README's table of routes."""

    GATEWAY = "gateway"             # none: the gateway answers for itself
    MERGED = "merged"               # all: one answer from what was seen of them last
    QUEUED = "one, queued"          # one that has the model, when a slot is free
    ANY = "one"                     # one that has the model, at once; whatever Ollama has no path for, too
    EVERY = "every"                 # all that have the model
    PRIMARY = "primary"             # the one that owns account and blobs


@dataclass(slots=True)
class RequestHead:
    """A request line and its fields. `fields`: last value by lower-case name; `lines`: (name, raw line) to hand on."""

    method: str
    target: bytes                   # origin-form, as sent: signatures over the query stay valid
    path: str                       # decoded, without query: for choosing the route only
    version: int                    # the minor number: HTTP/1.0 or HTTP/1.1
    fields: HeadFields
    lines: HeadLines
    length: int | None              # of the body; None = chunked
    keep_alive: bool
    expects_continue: bool
    via: bytes = b""                # of the request to a node: those of the client and this gateway


@dataclass(slots=True)
class ResponseHead:
    """A status line and its fields; `length`: None = chunked, -1 = until the connection closes."""

    status: int
    reason: bytes
    version: int
    fields: HeadFields
    lines: HeadLines
    length: int | None
    keep_alive: bool


@dataclass(slots=True)
class RequestSpec:
    """What a request asks of the cluster, read from its head and body."""

    family: Family
    model: str | None               # canonical; None = the body could not be read
    priority: int = DEFAULT_PRIORITY
    client: str = ""                # the person who shares fairly with others; see Verdict.person
    share: float = 1.0              # of the cluster, relative to other persons
    stream: bool = False
    prompt_chars: int = 0           # of all that the model reads as text
    prompt_images: int = 0
    prompt_tokens: int = 0          # beside these
    has_tools: bool = False
    kind: int = 0                   # hash of what its answer's length depends on; 0 = nothing is known of that
    session: int = 0                # hash of what the requests of one conversation have in common; 0 = unknown
    max_output: int | None = None   # tokens, if the client bounds them
    options: RunnerOptions = ()     # those given: another value means unload and load again
    keep_alive_s: float | None = None   # how long the model stays loaded from now on; None = as before
    prefix: Prefix = ()
    embeds: bool = False            # no decode phase
    inputs: int = 1                 # texts to embed: each takes a slot of its own
    inference: bool = True          # takes a slot; False for show, pull and the like
    where: Where = Where.QUEUED
    batch: Json | None = None       # the fields of an embedding's body if its input is a list of texts
    source: str | None = None       # the model, canonical, that a new one is made from
    change: str = ""                # what is done to the model on every node: unload, pull, copy, delete; create
    repeatable: bool = True         # doing it twice does no harm
    deterministic: bool = False     # a stream that says the same on every node with the same version of the model
    silent: bool = False            # nothing may be seen of its answer before its end: it does not stream, or has tools
    needs_account: bool = False     # its node will search the web, as the account that it is signed in with


def bracketed(host: str) -> str:
    """Return a host as it stands in a URL (RFC 3986 3.2.2: IPv6 addresses in brackets)."""
    return f"[{host}]" if ":" in host else host


class NodeSettings(NamedTuple):
    """One line of hosts.txt, or one node of the many behind it."""

    name: str
    host: str
    port: int
    tls: bool = False
    prefix: str = ""                # put before every path
    host_header: str = ""
    token: str = ""                 # sent as Authorization: Bearer
    slots: int = 0                  # 0 = learn them
    primary: bool = False
    drain: bool = False             # no new work, unless an order says otherwise
    ca: str = ""                    # file with the only certificate or authority that is believed, over https
    insecure: bool = False          # whatever certificate it shows
    resolve: bool = False           # every address behind the host is a node
    address: str = ""               # of one of those: where to connect to instead of the host
    load: tuple[str, ...] = ()      # models that are to be in its memory, canonical, the most important first
    mac: str = ""                   # of its network card, which wakes it up: 12 hexadecimal digits
    wake: str = ""                  # HOST:PORT that gets the magic packet; "" = everybody in its network
    probe_s: float = 0.0            # between two looks at it; 0 = --probe-interval

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{bracketed(self.address or self.host)}:{self.port}{self.prefix}"


# -----------------------------------------------------------------------------
# Listener: who is connected?
# -----------------------------------------------------------------------------

LEAST_STRANGERS = 16                # connections of one address, without keys; a quarter of all if that is more
SPARED_S = 1.0                      # a connection that has been idle for less is not closed
SPARE_DESCRIPTORS = 64              # beside a client's and a node's connection per request: probes, files, refusals


def affordable_clients(asked: int, descriptors: int) -> int:
    """Return how many client connections there may be: each may need a node's connection, too."""
    if descriptors == resource.RLIM_INFINITY:
        return asked
    return max(1, min(asked, (descriptors - SPARE_DESCRIPTORS) // 2))


class Listener:
    """Own the listening socket and the connections of clients, and keep both within their limits."""

    def __init__(self, gateway: Gateway, tls: ssl.SSLContext | None) -> None:
        self.gateway, self.options, self.loop, self.tls = gateway, gateway.options, gateway.loop, tls
        self.servers: list[asyncio.Server] = []
        self.address: Server | None = None          # that it listens on
        self.clients: set[ClientConnection] = set()
        self.strangers: collections.Counter[str] = collections.Counter()    # address: connections that gave no key
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_clients = affordable_clients(self.options.max_connections, descriptors)
        self.max_strangers = max(LEAST_STRANGERS, self.max_clients // 4)
        self.exhausted_s = -math.inf        # when a lack of descriptors was logged last

    async def start(self) -> None:
        """Listen, on the sockets that were inherited if there are any. Raises OSError if the port cannot be had."""
        start = functools.partial(asyncio.start_server, self.accept, backlog=1024)
        if self.options.inherited.sockets:
            self.servers = [await start(sock=inherited) for inherited in self.options.inherited.sockets]
        else:
            self.servers = [await start(self.options.bind, self.options.port)]
        self.address = self.servers[0].sockets[0].getsockname()[:2]

    def descriptors(self) -> list[int]:
        """Return the descriptors of the listening sockets."""
        return [listening.fileno() for server in self.servers for listening in server.sockets]

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a new connection over from asyncio's streams: the ClientConnection gets every byte from here on."""
        transport: asyncio.Transport = writer.transport         # type: ignore[assignment]  # of a socket: it reads, too
        client = ClientConnection(self.loop, lambda client: converse(self.gateway, client))
        client.writer = writer      # since Python 3.11.5 a StreamWriter that is collected closes its transport
        client.transport = transport
        transport.set_protocol(client)
        peer = transport.get_extra_info("peername")         # None if it has gone already
        address = client.address = peer[0] if isinstance(peer, tuple) else "local"
        if len(self.clients) >= self.max_clients:
            self.close_idle_client()
        is_too_much = self.strangers[address] >= self.max_strangers and not (
            is_loopback(address) or self.gateway.access.is_trusted_proxy(address))
        if is_too_much or len(self.clients) >= self.max_clients:
            if not self.tls:        # else it would take a handshake to tell
                text = f"too many connections{f' from {address}' if is_too_much else ''}"
                refuse_unread(self.gateway, client, Refusal(503, text, close=True, retry_after_s=1.0))
            transport.close()
            return
        self.clients.add(client)
        self.strangers[address] += 1
        client.is_stranger = True
        if self.tls:
            client.transport = TlsTransport(transport, self.tls, client, self.forget)
            client.write_deadline_s = self.loop.time() + self.options.header_timeout        # of the handshake
            transport.set_protocol(client.transport)
        else:
            client.connection_made(transport)

    def close_idle_client(self) -> None:
        """Close the connection that has been idle for longest, to make room; none that has just come."""
        before_s = self.loop.time() - SPARED_S
        idle = [client for client in self.clients
                if client.idle_s < before_s and client.task and not client.asking and not client.buffer]
        if idle:
            client = min(idle, key=lambda client: client.idle_s)
            self.forget(client)
            client.transport.abort()

    def acquaint(self, client: ClientConnection) -> None:
        """Stop counting a connection for its address: it has given a key, or it ends."""
        if client.is_stranger:
            client.is_stranger = False
            self.strangers[client.address] -= 1
            if not self.strangers[client.address]:
                del self.strangers[client.address]

    def forget(self, client: ClientConnection) -> None:
        """Stop counting a connection."""
        self.acquaint(client)
        self.clients.discard(client)

    def report(self, loop: asyncio.AbstractEventLoop, context: Json) -> None:
        """Log what went wrong outside all tasks: an exception handler of the loop.

        The loop reports a lack of descriptors at every try to accept, and tries again. It is logged once a second.
        """
        error, now = context.get("exception"), self.loop.time()
        if not (isinstance(error, OSError) and error.errno in EXHAUSTED):
            LOG.error({"event": "error", "why": context["message"]}, exc_info=error)
        elif now - self.exhausted_s >= 1.0:
            self.exhausted_s = now
            LOG.error({"event": "error", "why": f"cannot accept: {error.strerror}"})

    def sweep(self, now: float) -> None:
        """Serve the time-outs of clients."""
        for client in list(self.clients):
            client.expire(now)

    def close(self) -> None:
        """Stop listening."""
        for server in self.servers:
            server.close()

    def drain(self) -> None:
        """Stop listening, and close the connections on which no request is under way."""
        self.close()
        for client in list(self.clients):
            if not client.asking and not client.buffer:
                client.end_idle()

    def abort(self) -> list[asyncio.Task[None]]:
        """Stop listening and cut every connection; return the tasks that served them."""
        self.close()
        tasks = [client.task for client in self.clients if client.task]
        for client in list(self.clients):
            client.transport.abort()
        return tasks


# -----------------------------------------------------------------------------
# Client connection: what comes from a client, what goes to it, and how long may it take?
#
# A ClientConnection collects what the client sends until somebody waits for it, or hands it to an Upload. A client that
# goes while it is being served cancels the task that serves it; a closed write side counts as gone, as in Ollama's own
# server. With TLS, a TlsTransport stands between the connection and its socket, and nothing else knows of it.
# -----------------------------------------------------------------------------

MAX_EMPTY_LINES = 4                 # before a request line; RFC 9112 2.2 asks for one
KEEP_ALIVE_S = 75.0                 # an idle client connection
BODY_BYTES_PER_S = 1 * KIB          # least average of a body, after --header-timeout; a modem sends four times as much
WRITE_PAUSE_S = 300.0               # in which a client must read the next line's bytes of a full buffer
LEAST_READ_BYTES = 60_000           # 200 bytes/s
WRITE_AHEAD_BYTES = 16 * KIB        # unsent, then the node is read no further. One read, of up to 256 KiB, may come on
                                    # top: 200 clients that hardly read a fast stream hold 52 MiB
LINGER_S = 2.0                      # reading on after an early answer, so that a reset does not destroy it


class Transport(Protocol):
    """What a client's connection uses of its socket: asyncio's own transport, or a TlsTransport."""

    def write(self, data: bytes) -> None: ...
    def write_eof(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_write_buffer_limits(self, high: int) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def get_extra_info(self, name: str, default: Any = None) -> Any: ...


def unread_bytes(transport: Transport) -> int:
    """Return how much of what was written the other side has not taken yet.

    The kernel's share counts: it holds megabytes, and asks for more only when a third of them has gone.
    """
    unsent = transport.get_write_buffer_size()
    with contextlib.suppress(OSError, ValueError):      # closed; or a system that does not tell
        packed = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        unsent += struct.unpack("i", packed)[0]
    return unsent


class LoopTurns:
    """Share the event loop: long work is done in steps of some milliseconds, one per turn of the loop, whoever asks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.lock = loop, asyncio.Lock()     # which lets the askers in as they came

    async def take(self) -> None:
        async with self.lock:
            await asyncio.sleep(0)

    async def run(self, steps: Steps[Parsed]) -> Parsed:
        """Do work that is written as a generator, each step in a turn of its own; return its result."""
        while True:
            await self.take()
            try:
                next(steps)
            except StopIteration as end:
                result: Parsed = end.value
                return result


class BodyMemory:
    """Share the memory for bodies that are read as a whole: bodies for which there is no room wait unread, in order.

    Short ones need not wait; one that is alone may be larger than all the memory. A chunked body asks again as it
    grows: if all the memory is held by bodies that wait for more of it, the largest one grows on.
    """

    def __init__(self, limit: int, turns: LoopTurns) -> None:
        self.limit, self.turns = limit, turns
        self.held_bytes = 0
        self.waiting: collections.deque[tuple[int, asyncio.Future[None], ClientConnection]] = collections.deque()

    def fits(self, size: int) -> bool:
        """Tell whether there is room for so many bytes more."""
        return not self.held_bytes or self.held_bytes + size <= self.limit

    def grant(self) -> None:
        """Give those that wait what there is room for, the first one first."""
        while self.waiting:
            one = self.waiting[0]
            if not (one[1].done() or self.fits(one[0])):
                if self.held_bytes > sum(client.held_bytes for _, _, client in self.waiting):
                    return          # a request that is served, or still read, will give its share back
                one = max(self.waiting, key=lambda one: one[2].held_bytes)
            self.waiting.remove(one)
            size, turn, client = one
            if not turn.done():
                self.held_bytes += size
                client.held_bytes += size
                turn.set_result(None)

    async def hold(self, client: ClientConnection, size: int) -> None:
        """Let a client hold so many bytes in all, once there is room. Raises Refusal if that takes too long."""
        if size <= max(SHORT_BODY_BYTES, client.held_bytes):
            return
        more = max(size - client.held_bytes, client.held_bytes)     # at least doubled: a chunked body asks often
        turn, was_serving = self.turns.loop.create_future(), client.serving
        self.waiting.append((more, turn, client))
        self.grant()
        if turn.done():
            return
        try:
            client.begin_serving()  # so that its end is noticed
            async with asyncio.timeout(BODY_PAUSE_S):
                await turn
        except TimeoutError:
            raise Refusal(503, "other requests with large bodies take all the memory there is for them", close=True,
                          retry_after_s=5.0) from None
        finally:
            client.serving = was_serving
            turn.cancel()           # if it was not granted
            self.grant()

    def give_back(self, client: ClientConnection) -> None:
        """Take back what a client holds."""
        if client.held_bytes:
            self.held_bytes -= client.held_bytes
            client.held_bytes = 0
            self.grant()


def body_due_s(due_s: float, size: int, now: float) -> float:
    """Return until when more of a body must come: what was due at `due_s`, after `size` more bytes of it.

    Every KiB buys a second, whole MiB no more than BODY_PAUSE_S: it is the average that counts, and the last minute.
    """
    return min(due_s + size / BODY_BYTES_PER_S, now + BODY_PAUSE_S)


NOT_TLS = (b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 38\r\n\r\n"
           b"This port speaks TLS: ask https://...\n")


class TlsTransport(asyncio.Protocol):
    """Speak TLS on a client's socket; to the ClientConnection this is the transport.

    asyncio's own would be simpler, but it cannot close the write side alone, so a reset could destroy an early answer;
    it gives the reader of a closed connection a fixed time, however much is left to read; it waits for idle clients to
    say good-bye, too; and it hides connections until their handshake is over, so they cannot be counted. Here
    back-pressure, buffer and end are the socket's own. With 200 streams a token costs 25.9 us on asyncio instead of
    31.2 and a stream 0.06 MiB instead of 0.3; on uvloop 25.0 us instead of 26.6; without TLS 24.2 and 20.6.
    `forget` is told of a client whose handshake never ended.
    """

    def __init__(self, socket: asyncio.Transport, context: ssl.SSLContext, client: ClientConnection,
                 forget: Callable[[ClientConnection], None]) -> None:
        self.socket, self.client, self.forget = socket, client, forget
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.shaken = False         # the handshake is over
        self.ended = False          # nothing more is sent, and what still comes is thrown away
        self.is_closing, self.get_extra_info = socket.is_closing, socket.get_extra_info
        self.pause_reading, self.resume_reading = socket.pause_reading, socket.resume_reading
        self.set_write_buffer_limits = socket.set_write_buffer_limits
        self.get_write_buffer_size = socket.get_write_buffer_size

    # As the socket's protocol: what comes in.

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        self.incoming.write(data)
        pieces: list[bytes] = []
        over = False
        try:
            if not self.shaken:
                self.tls.do_handshake()
                self.shaken = True
                self.client.connection_made(self)
            while piece := self.tls.read(READ_AHEAD_BYTES):
                pieces.append(piece)
            over = True             # in good order, by a close_notify
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.refuse(data, error)
            return
        self.send()
        if pieces:
            self.client.data_received(b"".join(pieces))
        if over:
            self.eof_received()

    def refuse(self, data: bytes, error: ssl.SSLError) -> None:
        """End a connection that breaks the protocol, or speaks another one."""
        LOG.debug({"event": "tls", "why": error.reason})
        self.ended = True
        if not self.shaken and data[:1].isalpha():      # no first byte of TLS is a letter, but each of HTTP
            self.socket.write(NOT_TLS)
        self.send()                 # an alert: RFC 8446 6.2 wants it before the end, so that the peer knows why
        self.socket.close()
        self.eof_received()         # what runs for the client ends now, and not when it has read the alert

    def eof_received(self) -> bool:
        if self.shaken and not self.client.eof:
            self.client.eof_received()
        return self.shaken

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self.client.connection_lost(exc)
        if not self.shaken:
            self.forget(self.client)

    def pause_writing(self) -> None:
        self.client.pause_writing()

    def resume_writing(self) -> None:
        self.client.resume_writing()

    # As the client's transport: what goes out.

    def send(self) -> None:
        """Send what the TLS machine has to say."""
        if self.outgoing.pending:
            self.socket.write(self.outgoing.read())

    def write(self, data: bytes) -> None:
        if data and not self.ended:
            self.tls.write(data)    # whole: there is no end to a MemoryBIO
            self.socket.write(self.outgoing.read())

    def end(self) -> None:
        """Say that no more will come (RFC 8446 6.1), as the peer cannot tell from a FIN that nothing was cut off."""
        if self.shaken and not self.ended:
            with contextlib.suppress(ssl.SSLError):     # it would wait for the peer's, or find unread bytes
                self.tls.unwrap()
            self.send()
        self.ended = True

    def write_eof(self) -> None:
        self.end()
        self.socket.write_eof()

    def close(self) -> None:
        self.end()
        self.socket.close()

    def abort(self) -> None:
        self.ended = True
        self.socket.abort()


@dataclass(slots=True, eq=False)
class ClientConnection(asyncio.Protocol):
    """One client's connection: bytes in, bytes out, and how long it may keep us waiting."""

    loop: asyncio.AbstractEventLoop
    converse: Callable[[ClientConnection], Coroutine[Any, Any, None]]
    transport: Transport = field(init=False)    # there once the connection is accepted
    task: asyncio.Task[None] | None = None
    writer: asyncio.StreamWriter | None = None
    address: str = ""
    buffer: bytearray = field(default_factory=bytearray)
    sink: Upload | None = None      # takes the bytes as they come
    source: NodeConnection | None = None    # not read while this socket's buffer is full
    waiter: asyncio.Future[None] | None = None
    deadline_s: float = math.inf    # until when more bytes must have come; see `expire`
    overdue: bool = False
    wanted_bytes: int = 0           # of a body that is read as a whole: so many may be in `buffer`
    held_bytes: int = 0             # of BodyMemory, for that body
    idle_s: float = 0.0             # since when no request is under way
    is_stranger: bool = False       # it has shown no key, and counts for its address
    write_deadline_s: float = math.inf      # until when the client must have read LEAST_READ_BYTES
    unread_bytes: int = 0           # when that was set
    asking: bool = False            # a request has begun and its answer has not ended
    serving: bool = False           # that request is complete: nothing but its end is expected of the client
    eof: bool = False
    gone: bool = False
    write_paused: bool = False
    read_paused: bool = False

    def connection_made(self, transport: Transport) -> None:    # type: ignore[override]  # any socket's is one
        self.transport, self.write_deadline_s, self.idle_s = transport, math.inf, self.loop.time()
        transport.set_write_buffer_limits(WRITE_AHEAD_BYTES)
        self.task = self.loop.create_task(self.converse(self))

    def data_received(self, data: bytes) -> None:
        if self.sink is not None:
            self.sink.data(data)
            return
        self.buffer += data
        size = len(self.buffer)
        if size > READ_AHEAD_BYTES and size > self.wanted_bytes:
            self.pause_reading()
        self.wake()

    def eof_received(self) -> bool:
        self.eof = True
        self.hang_up()
        return True                 # what was asked before can still be answered

    def connection_lost(self, exc: Exception | None) -> None:
        self.eof = self.gone = True
        self.hang_up()

    def hang_up(self) -> None:
        """End what the task does for a client that is not there any more."""
        if self.serving and self.task is not None:
            self.task.cancel()
        self.wake()

    def begin_serving(self) -> None:
        """Note that its request is complete. Raises ClientGone if the client has been seen to leave."""
        if self.eof:
            raise ClientGone
        self.serving = True

    def pause_writing(self) -> None:
        self.write_paused = True
        self.arm_write_deadline()
        if self.source is not None:
            self.source.pause_reading()

    def resume_writing(self) -> None:
        self.write_paused = False
        self.write_deadline_s = math.inf
        if self.source is not None:
            self.source.resume_reading()
        self.wake()

    def pause_reading(self) -> None:
        self.read_paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        self.read_paused = False
        self.transport.resume_reading()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def arm_write_deadline(self) -> None:
        """Note how much the client has to read now, and by when it must have read some of it."""
        self.write_deadline_s, self.unread_bytes = self.loop.time() + WRITE_PAUSE_S, unread_bytes(self.transport)

    def expire(self, now: float) -> None:
        """End the waits of this connection that are overdue. Called every SWEEP_S."""
        if now > self.write_deadline_s:
            if unread_bytes(self.transport) > self.unread_bytes - LEAST_READ_BYTES:
                self.transport.abort()
            else:
                self.arm_write_deadline()
        elif self.serving and self.read_paused and not self.eof and socket_has(self.transport, HAS_LEFT):
            self.eof_received()
        elif now > self.deadline_s:
            self.overdue, self.deadline_s = True, math.inf
            if self.sink is not None:
                self.sink.expire()
            self.wake()

    def end_idle(self) -> None:
        """Close a connection on which no request is under way, as `close` does: its client may be sending one."""
        if self.waiter is None:     # its task has not begun to read
            self.transport.close()
        self.overdue = True
        self.wake()

    def write(self, data: bytes) -> None:
        if not self.gone:
            self.transport.write(data)

    async def wait(self) -> None:
        """Wait for something to happen on this connection."""
        self.waiter = self.loop.create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None

    async def read_more(self, patience_s: float) -> None:
        """Wait for more bytes. Raises ClientGone at the end of them, Refusal(408) if they take too long."""
        size = len(self.buffer)
        self.deadline_s = self.loop.time() + patience_s
        self.overdue = False
        if self.read_paused:
            self.resume_reading()
        try:
            while len(self.buffer) == size:
                if self.eof:
                    raise ClientGone
                if self.overdue:
                    raise Refusal(408, "the request took too long to arrive", close=True)
                await self.wait()
        finally:
            self.deadline_s = math.inf

    async def drained(self) -> None:
        """Wait until the client has read most of what was written to it."""
        while self.write_paused and not self.gone:
            await self.wait()

    async def next_head(self, patience_s: float) -> RequestHead | None:
        """Return the head of the next request, or None if the client is done. Raises Refusal."""
        scanned, started_s, empty_lines = 0, 0.0, 0
        self.idle_s = self.loop.time()
        while True:
            while self.buffer.startswith(b"\r\n"):  # RFC 9112 2.2: ignore an empty line before the request line
                del self.buffer[:2]
                empty_lines += 1
                if empty_lines > MAX_EMPTY_LINES:
                    raise ProtocolError("empty lines instead of a request line")
            end = find_head(self.buffer, scanned) if self.buffer else None
            if end is not None:
                break
            scanned = len(self.buffer)
            try:
                if scanned:         # the whole head has one time limit, so that one byte a second does not help
                    started_s = started_s or self.loop.time()
                    await self.read_more(started_s + patience_s - self.loop.time())
                else:
                    await self.read_more(self.idle_s + KEEP_ALIVE_S - self.loop.time())
            except (ClientGone, Refusal):
                if not self.buffer:
                    return None
                raise
        return parse_request(bytes(self.take(end)))

    def take(self, size: int) -> Body:
        """Take the first `size` bytes out of the buffer and return them; read on if there is room again."""
        taken: Body
        if size > SHORT_BODY_BYTES:     # not copied, but what lies behind it is: 64 MiB take 25 ms
            taken, self.buffer = self.buffer, self.buffer[size:]
            del taken[size:]
        else:
            taken = bytes(self.buffer[:size])
            del self.buffer[:size]
        if self.read_paused and len(self.buffer) <= READ_AHEAD_BYTES:
            self.resume_reading()
        return taken

    def send_continue(self, head: RequestHead) -> None:
        """Ask for the body if the client waits to be asked (RFC 9110 10.1.1)."""
        if head.expects_continue and not self.buffer:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def read_more_body(self, due_s: float) -> float:
        """Wait for more of a body until `due_s`; return until when the next piece must come. Raises as `read_more`."""
        size = len(self.buffer)
        await self.read_more(due_s - self.loop.time())
        return body_due_s(due_s, len(self.buffer) - size, self.loop.time())

    async def read_body(self, head: RequestHead, limit: int, grace_s: float, memory: BodyMemory) -> Body:
        """Return the whole body of a request, for which `memory` has room.

        Raises Refusal(413) over `limit` bytes, Refusal(408) if it comes slower than BODY_BYTES_PER_S after `grace_s`,
        Refusal(503) if there is no memory for it, ClientGone if it is cut short.
        """
        if head.length == 0:
            return b""
        if head.length is not None:
            if head.length > limit:
                raise Refusal(413, f"the request body is over {limit} bytes", close=True)
            if head.length > SHORT_BODY_BYTES:
                await memory.hold(self, head.length)
            if len(self.buffer) >= head.length:     # a short one mostly comes with its head
                return self.take(head.length)
        self.send_continue(head)
        now = self.loop.time()
        due_s = body_due_s(now + grace_s, len(self.buffer), now)
        if head.length is None:
            return await self.read_chunks(limit, due_s, memory)
        self.wanted_bytes = head.length
        while len(self.buffer) < head.length:
            due_s = await self.read_more_body(due_s)
        self.wanted_bytes = 0
        return self.take(head.length)

    async def read_chunks(self, limit: int, due_s: float, memory: BodyMemory) -> bytes:
        """Return a whole chunked body. Raises as `read_body`."""
        parts: list[bytes] = []
        decoder, size = ChunkedBody(), 0
        while True:
            payload, used = decoder.feed(bytes(self.buffer[:decoder.at_most()]))
            self.take(used)
            parts.append(payload)
            size += len(payload)
            if size > limit:
                raise Refusal(413, f"the request body is over {limit} bytes", close=True)
            if decoder.done:
                return b"".join(parts)
            asked_s = self.loop.time()
            await memory.hold(self, size)
            due_s += self.loop.time() - asked_s     # it was not read meanwhile
            if self.buffer:
                await memory.turns.take()
            else:
                due_s = await self.read_more_body(due_s)

    async def close(self) -> None:
        """Close so that the client gets all that was written.

        Closing a socket with unread bytes makes the kernel send a reset, which can destroy the answer on its way. So
        the write side is closed first, and what still comes is thrown away, for LINGER_S at most.
        """
        self.serving = False
        if not self.gone and not self.eof:
            with contextlib.suppress(OSError, NotImplementedError, ClientGone, Refusal):
                self.transport.write_eof()
                deadline_s = self.loop.time() + LINGER_S
                self.sink = None
                while self.loop.time() < deadline_s:
                    self.buffer.clear()
                    await self.read_more(deadline_s - self.loop.time())
        self.transport.close()      # flushes what is left, as long as the client reads: see write_deadline_s
        while not self.gone and self.transport.get_write_buffer_size():
            if self.write_deadline_s == math.inf:
                self.arm_write_deadline()
            await self.wait()


# -----------------------------------------------------------------------------
# Wire: what does a client say?
#
# RFC 9112, read strictly. If a gateway and a node disagree about where a request ends, a client can smuggle a request
# past the gateway. So everything that can be read in two ways is refused and never passed on: bare CR or LF, folded
# fields, space before a colon, two lengths, a length beside a transfer coding, any coding but chunked.
# Bytes in, values out; nothing here knows a socket. The bytes for `feed` may be split anywhere.
# -----------------------------------------------------------------------------

MAX_TARGET_BYTES = 16 * KIB
MAX_FIELDS = 256                    # of a request's head; browsers send twenty. Each costs a microsecond before any key

# A control character in a line. A bare CR or LF is one, too (RFC 9112 2.2).
CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

# The same in the part of a head that has arrived, and folded lines (5.2). LF may still follow a CR at the end.
ILLEGAL_SO_FAR = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n|\n[\t ]")
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([^\x00-\x20\x7f]+) HTTP/1\.([01])")
ABSOLUTE = re.compile(rb"https?://([^/?#]+)(.*)", re.I | re.S)
HOST = re.compile(rb"[^\s/\\@?#,]*")

# A segment `.` or `..` of a path, in any spelling that some server between here and the model accepts: encoded once or
# more often, after a backslash, before `;` or `#` (Tomcat and nginx end a segment there). It would lead out of a node's
# `prefix=`: a server that resolves /ollama/../admin answers for /admin.
DOT, SLASH = rb"(?:\.|%(?:25)*2e)", rb"(?:[/\\]|%(?:25)*(?:2f|5c))"
DOT_SEGMENT = re.compile(SLASH + DOT + rb"{1,2}(?:" + SLASH + rb"|[;#]|%(?:25)*(?:3b|23|3f)|\Z)", re.I)

# An encoded control character: a proxy that decodes it before it hands the path on cuts the path or ends the line.
ENCODED_CONTROL = re.compile(rb"%(?:[01][0-9a-f]|7f)", re.I)

# TRACE would show the client what the gateway adds, a node's token for example; CONNECT is for proxies only.
REFUSED_METHODS = frozenset(("TRACE", "CONNECT"))
ALLOWED_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"

# RFC 9110 7.6.1: these fields are about one connection only, and are not handed on.
HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding",
                        b"upgrade", b"proxy-authenticate", b"proxy-authorization", b"http2-settings"))
ONLY_ONCE = frozenset((b"host", b"content-length", b"transfer-encoding"))
UNTIL_CLOSE = -1


def find_head(buffer: Body, scanned: int = 0) -> int | None:
    """Return the length of the head in `buffer` with its empty line, or None if it is not complete.

    The first `scanned` bytes were searched before. Raises ProtocolError at the first byte that no head can contain:
    bare LF line ends are refused at once, and not by a time-out in the wait for CRLF CRLF.
    """
    end = buffer.find(b"\r\n\r\n", max(0, scanned - 3))
    if 0 <= end <= MAX_HEAD_BYTES:
        return end + 4
    if len(buffer) > MAX_HEAD_BYTES:
        if b"\r\n" not in buffer[:MAX_TARGET_BYTES + 64]:       # room for the method and the version
            raise ProtocolError("request target too long", 414)
        raise ProtocolError("head too long", 431)
    if ILLEGAL_SO_FAR.search(buffer, max(0, scanned - 2)):
        raise ProtocolError("control character, bare CR, bare LF or folded line in the head")
    return None


class Table(dict[Line, Parsed]):
    """What a function returned for each short line or text. It is emptied when it is full, at some 300 KiB."""

    def __init__(self, function: Callable[[Line], Parsed]) -> None:
        super().__init__()
        self.function: Callable[[Line], Parsed] = function

    def __missing__(self, line: Line) -> Parsed:
        parsed = self.function(line)
        if len(line) <= 256:
            if len(self) >= 1024:
                self.clear()
            self[line] = parsed
        return parsed


def remembered(parse: Callable[[Line], Parsed]) -> Callable[[Line], Parsed]:
    """Let a parser of one line answer from a Table: clients and nodes send the same lines again and again."""
    return Table(parse).__getitem__     # a quarter of what a call of a Python function costs


@remembered
def parse_field(line: bytes) -> tuple[bytes, bytes, bytes]:
    """Return (lower-case name, value, the line). Raises ProtocolError, also for a folded line: it has no name."""
    name, colon, value = line.partition(b":")
    if not colon or not TOKEN.fullmatch(name):
        raise ProtocolError("malformed header field")
    if CONTROL.search(value):
        raise ProtocolError("control character, bare CR or bare LF in the head")
    return name.lower(), value.strip(b" \t"), line


def parse_fields(lines: list[bytes]) -> tuple[HeadFields, HeadLines]:
    """Return the fields, the values of a repeated one joined by commas, and the parsed lines. Raises ProtocolError."""
    parsed = list(map(parse_field, lines))
    fields = {name: value for name, value, _ in parsed}
    if len(fields) < len(parsed):
        fields = {}
        for name, value, _ in parsed:
            if name in fields and name in ONLY_ONCE:
                raise ProtocolError(f"more than one {name.decode()} field")
            fields[name] = fields[name] + b", " + value if name in fields else value
    return fields, parsed


def parse_length(fields: HeadFields, version: int) -> int | None:
    """Return the bytes of a body: None for chunked, 0 if no field tells. Raises ProtocolError for what is ambiguous."""
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if coding is not None:
        if length is not None:      # RFC 9112 6.3: "might indicate an attempt to perform request smuggling"
            raise ProtocolError("both Content-Length and Transfer-Encoding")
        if version == 0:            # 6.1: "MUST treat the message as if the framing is faulty"
            raise ProtocolError("Transfer-Encoding in HTTP/1.0")
        if coding.lower() != b"chunked":
            raise ProtocolError("unknown transfer coding")
        return None
    if length is None:
        return 0
    if not length.isdigit() or len(length) > 18:
        raise ProtocolError("malformed Content-Length")
    return int(length)


def wants_keep_alive(fields: HeadFields, version: int) -> bool:
    """Tell whether the connection stays open after this message (RFC 9112 9.3)."""
    listed = fields.get(b"connection", b"").lower()
    if not listed:
        return version == 1
    options = [option.strip() for option in listed.split(b",")]
    return b"close" not in options and (version == 1 or b"keep-alive" in options)


@remembered
def parse_request_line(line: bytes) -> tuple[str, bytes, str, int]:
    """Return (method, target in origin form, decoded path, minor version) of a request line. Raises ProtocolError."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise ProtocolError("malformed request line")
    method, target, version = match[1].decode(), match[2], int(match[3])
    if method in REFUSED_METHODS:
        raise ProtocolError(f"{method} is not allowed", 405)
    if len(target) > MAX_TARGET_BYTES:
        raise ProtocolError("request target too long", 414)
    if absolute := ABSOLUTE.fullmatch(target):      # RFC 9112 3.2.2: "a server MUST accept the absolute-form"
        target = absolute[2] if absolute[2][:1] == b"/" else b"/" + absolute[2]
    elif target[:1] != b"/" and (method, target) != ("OPTIONS", b"*"):
        raise ProtocolError("malformed request target")
    path = target.partition(b"?")[0]
    if DOT_SEGMENT.search(path) or ENCODED_CONTROL.search(path):
        raise ProtocolError("dot segment or control character in the path")
    return method, target, urllib.parse.unquote(path.decode("latin-1")), version


def parse_request(head: Body) -> RequestHead:
    """Parse the head of a request: bytes up to and with its empty line. Raises ProtocolError."""
    first, *lines = bytes(head[:-4]).split(b"\r\n")     # lines of a bytearray could not be looked up in a Table
    if len(lines) > MAX_FIELDS:
        raise ProtocolError(f"more than {MAX_FIELDS} header fields", 431)
    method, target, path, version = parse_request_line(first)
    fields, raw_lines = parse_fields(lines)
    host = fields.get(b"host")
    if host is None and version == 1 or host is not None and not HOST.fullmatch(host):
        raise ProtocolError("missing or malformed Host field")      # RFC 9112 3.2
    return RequestHead(method, target, path, version, fields, raw_lines, parse_length(fields, version),
                       wants_keep_alive(fields, version),
                       version == 1 and fields.get(b"expect", b"").lower() == b"100-continue")


# Via lists the gateways that a request came over (RFC 9110 7.6.3). The comment names this process. Without it, two
# gateways that list each other would pass one request to and fro until no socket is left (8,192 were seen).
MOST_HOPS = 8                       # over SOLLOLs; it also ends a loop in which a proxy removes the comments


def via_of(process: str) -> bytes:
    """Return what the gateway of a process adds to Via."""
    return b"1.1 sollol (%b)" % process.encode()


def via_after(via: bytes, own: bytes) -> bytes:
    """Return `via`, as a request came with it, with `own` added. Raises Refusal if the request goes in a circle."""
    if own in via:
        raise Refusal(508, "this request has been here before: a node of this gateway leads back to it", close=True)
    if via.count(b"1.1 sollol") >= MOST_HOPS:
        raise Refusal(508, f"this request has come over {MOST_HOPS} gateways", close=True)
    return b"%b, %b" % (via, own) if via else own


# -----------------------------------------------------------------------------
# Conversation: what happens on a connection, from its first byte to its last?
#
# One task per connection takes one request after the other: head -> route -> right to ask -> body -> handler -> next. A
# handler answers, or raises the answer. A client that closes its connection while it is being served cancels the task:
# whatever the task holds (a place in the queue, a lease, a connection to a node) is given back in the `finally` that
# stands around it.
# -----------------------------------------------------------------------------

Handler = Callable[["Exchange"], Coroutine[Any, Any, None]]       # raises Refusal or NodeRefused before a byte is out


@dataclass(slots=True, eq=False)
class Route:
    """Who answers a path, which nodes that concerns, and what the path carries.

    `kind`: generate, chat, embed, image, transcribe; show, pull, push, create, copy, delete: their body names models,
    see `named_models`; account: a body that is passed on; raw: a body of any size, or none; order: to a node, by an
    administrator.
    """

    handler: Handler
    where: Where
    kind: str = "raw"
    family: Family = Family.OLLAMA
    streams: bool = False           # when the body does not say
    guarded: bool = False           # changes models, an account or what a node does: see `Access.forbids_change`
    own: Callable[[Gateway], OwnAnswer] | None = None   # what `serve_own` answers
    shows: Callable[[Gateway, ModelSet], OwnAnswer] | None = None   # the same where models are named: those of a set
    look: Look | None = None        # and how it lets the nodes be looked at before that
    blind: bool = False             # it may name models where nobody here looks: nothing for a key with models=


SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))


async def converse(gateway: Gateway, client: ClientConnection) -> None:
    """Serve one client connection from its first byte to its last: one request after the other."""
    try:
        while True:
            client.serving = client.asking = False
            head = await client.next_head(gateway.header_timeout_s)
            if head is None:
                return
            client.asking = True
            exchange = begin_exchange(gateway, client, head)
            await handle(exchange)
            if client.write_paused:
                await client.drained()
            if client.buffer:       # it asks ahead: others come in between
                await gateway.turns.take()
            if not exchange.keep or gateway.is_ending or client.gone:
                return
    except Refusal as refusal:      # no head, or none that can be read
        refuse_unread(gateway, client, refusal)
    except (ClientGone, asyncio.CancelledError):
        pass
    except Exception:
        LOG.exception({"event": "error", "id": ""})
        client.transport.abort()
    finally:
        await client.close()
        gateway.listener.forget(client)


async def handle(exchange: Exchange) -> None:
    """Let one request be answered, whatever happens, and count it."""
    gateway, client, record = exchange.gateway, exchange.client, exchange.record
    try:
        await serve(exchange)
    except Refusal as refusal:
        answer_refusal(exchange, refusal)
    except NodeRefused as refused:
        await answer_whole(exchange, refused.value.head, [refused.value.body])
    except (ClientGone, asyncio.CancelledError):
        record.status, record.reason, record.outcome = 499, "the client left", "client_left"
        raise
    except Exception:
        LOG.exception({"event": "error", "id": record.id})
        if record.status:
            client.transport.abort()
            record.outcome, exchange.keep = "error", False
        else:
            answer_refusal(exchange, Refusal(500, "internal error", close=True))
    finally:
        gateway.telemetry.finish(record)
        gateway.memory.give_back(client)


async def serve(exchange: Exchange) -> None:
    """Answer one request. Raises Refusal or NodeRefused, the answer that it carries, before any byte of another one."""
    gateway, client, head, record = exchange.gateway, exchange.client, exchange.head, exchange.record
    head.via = via_after(head.fields.get(b"via", b""), gateway.via)
    route = exchange.route = find_route(head.method, head.path)
    verdict = exchange.verdict = gateway.access.check(head, route, client.address)
    record.cors, key = verdict.cors, verdict.key
    if key is not None:
        gateway.listener.acquaint(client)
        record.key = key.settings.name
    record.user = verdict.user or verdict.behind
    if verdict.refusal is not None:
        raise verdict.refusal.error()
    if verdict.page_status:
        answer_page(exchange, verdict.page_status)
        return
    if route.where in ANSWERED_HERE:
        await exchange.read_body()
        await route.handler(exchange)
        return
    if gateway.draining:
        raise Refusal(503, "the gateway is shutting down", close=True, retry_after_s=5.0)
    if key is not None:
        await count_request(exchange, key)
    try:
        await read_request(exchange)
        await (serve_change if exchange.spec.change == "unload" else route.handler)(exchange)
    finally:
        if key is not None:
            tokens = record.timings.prompt_tokens + record.timings.output_tokens
            key.give_back(tokens, gateway.loop.time(), wall_clock_s())


def find_route(method: str, path: str) -> Route:
    """Return the Route of a request; what Ollama has no path for goes to one node, for its own refusal."""
    route = ROUTES.get((method, path))
    if route is not None:
        return route
    for row_method, above, route in ROUTES_BELOW:
        if method == row_method and path.startswith(above) and path != above:
            return route
    is_new_inference = method == "POST" and path.startswith("/v1/")
    return ELSEWHERE[family_of(path), method not in SAFE_METHODS and not is_new_inference]


def answer_page(exchange: Exchange, status: int) -> None:
    """Answer a web page without a body, as Ollama does: 403 if it may not ask, 204 if it asks whether it may."""
    if status == 403:
        exchange.record.reason = "origin not allowed"
    exchange.keep = exchange.keep and exchange.head.length == 0
    answer_locally(exchange, OwnAnswer(status, lines=PREFLIGHT if status == 204 else ()))


async def count_request(exchange: Exchange, key: Key) -> None:
    """Count a request as one of its key's. Raises Refusal if that has none left, or no tokens for an answer."""
    now = exchange.gateway.loop.time()
    try:
        if exchange.route.where is Where.QUEUED:
            key.check_budget(now, wall_clock_s())
        key.take(now)
    except Refusal:
        if exchange.head.length is None or exchange.head.length > SHORT_BODY_BYTES:
            exchange.keep = False   # rather than read all that is refused
        else:
            await exchange.read_body()
        raise


async def read_request(exchange: Exchange) -> None:
    """Read the body of a request, unless its route leaves that unread, and what the request wants. Raises Refusal."""
    gateway, head, route, verdict = exchange.gateway, exchange.head, exchange.route, exchange.verdict
    body = exchange.body = b"" if route.kind == "raw" else await exchange.read_body()
    if route.family is Family.ANTHROPIC and gateway.options.stable_prefix and len(body) <= PARSED_BYTES:
        body = exchange.body = CHANGING_BLOCK.sub(STABLE_BLOCK, body, 1)
    exchange.client.begin_serving()
    reading = await gateway.work_on(body, reading_steps(head, route, body))
    if gateway.options.alias:
        await follow_alias(exchange, reading.fields)
    if gateway.options.num_ctx and route.where is Where.QUEUED and route.family is Family.OLLAMA:
        widening = widened(exchange.body, reading.fields, gateway.options.num_ctx)
        exchange.body = await gateway.work_on(body, widening)
    if verdict.tells_users:
        exchange.record.user = verdict.user or user_in(reading.fields) or verdict.behind
    spec = exchange.spec = read_spec(head, route, reading, verdict.person(exchange.record.user), verdict.priority)
    spec.priority = min(spec.priority, verdict.max_priority)
    if verdict.key is not None:
        spec.share = verdict.key.settings.share
    if spec.stream and head.path in USAGE_STREAMS and gateway.options.count_streams:
        exchange.usage = await gateway.work_on(body, asking_for_usage(exchange.body, reading.fields))
    if spec.change == "unload" and (refusal := gateway.access.forbids_change(head, verdict.key)) is not None:
        raise refusal.error()       # only the body tells of this change
    exchange.record.model, exchange.record.priority = spec.model or "", spec.priority
    if verdict.models is not EVERY_MODEL:
        await check_models(exchange)


async def check_models(exchange: Exchange) -> None:
    """Raise Refusal if the body of a request names a model that its key may not use, or cannot be read.

    It is the body as a node will get it.
    """
    models, route, body = exchange.verdict.models, exchange.route, exchange.body
    names = await exchange.gateway.work_on(body, named_models(exchange.head, route, body))
    if names is None:
        raise Refusal(403, f"the key {exchange.record.key} may not use every model, and this body cannot be read")
    for name in names:
        if canonical(name) not in models:
            raise Refusal(404, missing_text(route.kind, name))


async def follow_alias(exchange: Exchange, fields: Json) -> None:
    """Let a request whose model's name is an alias ask for the model that serves it: its body or path, and `fields`."""
    gateway, head, route, body = exchange.gateway, exchange.head, exchange.route, exchange.body
    is_path = route.kind == "raw" and head.path.startswith(MODEL_PATH)
    key = "name" if fields.get("name") and not fields.get("model") else "model"     # as old clients call it
    name = head.path.removeprefix(MODEL_PATH) if is_path else fields.get(key)
    if not name or not isinstance(name, str) or not (is_path or route.kind in ALIASED_KINDS):
        return
    is_there = gateway.dispatcher.cluster.is_there(canonical(name))
    model = alias_target(name, gateway.options.alias, is_there)
    if model is None:
        return
    if is_path:
        exchange.alias = Alias(json.dumps(name).encode(), model, "id")
        head.path = MODEL_PATH + model
        query = head.target.partition(b"?")[1:]
        head.target = urllib.parse.quote(head.path, safe="/:").encode() + b"".join(query)
    elif route.kind == "transcribe":
        exchange.body = await gateway.work_on(body, with_model_in_form(head, body, model))
        fields["model"] = model
    else:
        exchange.body, exchange.alias = await gateway.work_on(body, with_model(body, key, model))
        fields[key] = model if exchange.alias else name


RawLines = list[bytes] | tuple[()]      # of a head; in a Record, bytes is a field


@dataclass(slots=True)
class Record:
    """One line of the request log, filled in while the request is served."""

    id: str
    client: str
    method: str
    path: str
    started_s: float
    key: str = ""                   # the name of the client's key
    user: str = ""                  # who asks through that key or that address, if it may tell
    model: str = ""
    priority: int | str = ""
    node: str = ""
    attempts: int = 0
    status: int = 0
    queue_s: float = 0.0
    first_s: float | None = None
    bytes: int = 0
    timings: Timings = field(default_factory=lambda: NO_TIMINGS)
    held: Held = ()                 # the slots that it had
    shares: Sequence[Record] = ()   # of a batch, which nodes have answered apart
    reason: str = ""
    outcome: str = ""               # ok, cut, error, client_left, refused; until the end "" where the status tells it
    cors: RawLines = ()             # raw lines of the answer that let a web page read it


@dataclass(slots=True, eq=False)
class Exchange:
    """A request under way: who asks, what for, which services answer, and what becomes known on the way."""

    gateway: Gateway
    client: ClientConnection
    head: RequestHead
    record: Record
    keep: bool                      # the client's connection can take another request after the answer
    route: Route = field(init=False)
    spec: RequestSpec = field(init=False)
    body: Body = b""                # unless its route leaves it unread
    verdict: Verdict = field(init=False)
    version: str = ""               # digest of the model that must answer; "" = any
    alias: Alias | None = None      # what the client calls the model, if that is another name
    usage: Splice | None = None     # what asks a node for the counts of a stream, if the client does not
    transcript: Transcript | None = None    # of a stream that another node may go on with

    def as_sent_to(self, node: Node) -> tuple[bytes, Body | memoryview]:
        """Return the body for a node in two parts, the first b"" unless it asks for the counts of a stream."""
        if self.usage is None or not counts_streams(node.version):
            return b"", self.body
        return self.usage.cut(self.body)

    async def read_body(self) -> Body:
        """Return the whole body of the request. Raises as ClientConnection.read_body."""
        gateway = self.gateway
        return await self.client.read_body(self.head, gateway.max_body_bytes, gateway.header_timeout_s, gateway.memory)


def begin_exchange(gateway: Gateway, client: ClientConnection, head: RequestHead) -> Exchange:
    """Return the Exchange of a request whose head has come."""
    own = head.fields.get(b"x-request-id", b"")     # its id, if that is harmless in a header and a log line
    id = own.decode() if 0 < len(own) <= 128 and TOKEN.fullmatch(own) else f"{gateway.rng.getrandbits(64):016x}"
    record = Record(id, client.address, head.method, head.path, gateway.loop.time())
    return Exchange(gateway, client, head, record, head.keep_alive)


# -----------------------------------------------------------------------------
# Access: may this request be made?
#
# `Access.check` asks in this order, and the first "no" is the answer:
#
#   1. A web page asks: may pages of its Origin ask here (CORS)?
#   2. Is the Host a name of this machine, or one that DNS rebinding made lead here?
#   3. With --keys: does the request give a key? Without: is an order to a node given on this machine?
#   4. The request changes models, an account or nodes: may this key, and may this page?
#   5. Is the route one of those that the key's routes= allows, and the model in the path one of its models=?
#
# And who asks? The key's name and the user behind it, the user, or the address. Users and addresses that a request
# tells are believed of those that may tell them: keys with proxy=yes, and --trusted-proxies.
#
# 1 and 2 are Ollama's own rules. What a key may use up is counted later, when the request is served (`Key.take`), and
# the models that a body names are looked at when it has been read (`check_models`). For a key with models= the others
# are not there: it gets Ollama's own 404, and answers that list models leave them out.
# The table of keys holds no key, only its digest under a secret of this process, and is asked for the digest of what a
# request gives: the time that a look-up takes says nothing about any key.
# -----------------------------------------------------------------------------

MOST_FROM_AFAR = 8                  # for who asks from another machine without a key: else all would be critical
OPEN_PATHS = frozenset(("/", "/api/version", "/api/health"))    # no key is needed to GET them: monitors ask for them
DIGEST_SECRET = secrets.token_bytes(32)
CALENDAR_DAY = 0.0                  # a period that is no fixed number of seconds
MOST_DAY_S = 26 * 3600.0            # one is longer than 24 hours where the clocks are turned back


@dataclass(frozen=True, slots=True)
class ModelSet:
    """The models that somebody may use: canonical names, and patterns; see `parse_pattern`."""

    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ("*",)

    def __contains__(self, model: str) -> bool:
        return self is EVERY_MODEL or model in self.names or any(is_meant(model, pattern) for pattern in self.patterns)

    def rows(self, rows: Iterable[Json]) -> list[Json]:
        """Return those rows of /api/tags or /api/ps whose models are in it."""
        return [row for row in rows if row_name(row) in self]


EVERY_MODEL = ModelSet()


class KeySettings(NamedTuple):
    """One line of the keys file, without the key."""

    digest: bytes
    name: str
    priority: int = DEFAULT_PRIORITY    # of requests that ask for none
    max_priority: int = 10
    rate: tuple[int, float] = (0, 1.0)  # requests, in so many seconds; 0 = any number
    concurrency: int = 0            # requests at once; 0 = any number
    admin: bool = False             # may change models, accounts and nodes
    proxy: bool = False             # its requests tell who asks
    share: float = 1.0              # of the cluster, for each person behind it, relative to others
    models: ModelSet = EVERY_MODEL  # the others are not there for it
    routes: str = "all"             # that `admin` allows; inference: of these what changes nothing; read: what shows
    budget: tuple[int, float] = (0, 1.0)    # tokens of prompts and answers, in so many seconds; 0 = any number

    @property
    def may_change(self) -> bool:
        return self.admin and self.routes == "all"


def digest_of_key(key: bytes) -> bytes:
    """Return what is kept of a key."""
    return hashlib.blake2b(key, key=DIGEST_SECRET).digest()


def wall_clock_s() -> float:
    """Return the seconds since 1970, for what is about days. It may jump: what is timed goes by the loop's clock."""
    return time.time()


def day_end_s(wall_s: float, zone: datetime.tzinfo | None = None) -> float:
    """Return when the day of a time ends, both in seconds since 1970: at midnight in `zone`, or in this machine's."""
    day = datetime.datetime.fromtimestamp(wall_s, zone).date() + datetime.timedelta(1)
    return datetime.datetime.combine(day, datetime.time(), zone).timestamp()


class Budget:
    """The tokens that a key has used of its budget. `wall_s`: seconds since 1970.

    In a s, min or h what was used comes back steadily, all of a budget in one period. In a d all of it comes back at
    local midnight. A request is charged when its answer has ended, so what runs may use more than is left; in a bucket
    that is paid back, too, before anything is left again.
    """

    def __init__(self) -> None:
        self.used, self.settled_s, self.day_end_s = 0.0, 0.0, 0.0

    def settle(self, budget: tuple[int, float], now: float, wall_s: float) -> None:
        """Take what has come back since the last time off what was used."""
        count, period_s = budget
        if period_s != CALENDAR_DAY:
            self.used = max(0.0, self.used - (now - self.settled_s) * count / period_s)
        elif not 0 < self.day_end_s - wall_s <= MOST_DAY_S:     # the day is over, or the clock was set
            self.used = 0.0 if self.day_end_s else self.used    # else its period was another one until now
            self.day_end_s = day_end_s(wall_s)
        self.settled_s = now

    def wait_s(self, budget: tuple[int, float], now: float, wall_s: float) -> float:
        """Return in how many seconds a token is left; 0 if one is."""
        self.settle(budget, now, wall_s)
        count, period_s = budget
        lack = self.used + 1 - count
        if lack <= 0:
            return 0.0
        return self.day_end_s - wall_s if period_s == CALENDAR_DAY else lack * period_s / count


class Key:
    """What one key allows, and how much of that is used up.

    The rate is a token bucket: it fills steadily and holds the requests of one period, so that somebody who was quiet
    may ask in a burst.
    """

    def __init__(self, settings: KeySettings) -> None:
        self.settings = settings
        self.tokens, self.filled_s = float(settings.rate[0]), 0.0
        self.running, self.budget = 0, Budget()

    def configure(self, settings: KeySettings) -> None:
        """Take over a changed line; what is used up stays used up."""
        self.settings = settings
        self.tokens = min(self.tokens, settings.rate[0])

    def take(self, now: float) -> None:
        """Count a request as begun. Raises Refusal if the rate or the concurrency is used up."""
        name, most, (count, period_s) = self.settings.name, self.settings.concurrency, self.settings.rate
        if most and self.running >= most:
            raise Refusal(429, f"the key {name} has {most} requests running, its most", retry_after_s=1.0)
        if count:
            self.tokens = min(count, self.tokens + (now - self.filled_s) * count / period_s)
            self.filled_s = now
            if self.tokens < 1:
                raise Refusal(429, f"the key {name} has used up its {count} requests in {period_s:g} s",
                              retry_after_s=(1 - self.tokens) * period_s / count)
            self.tokens -= 1
        self.running += 1

    def check_budget(self, now: float, wall_s: float) -> None:
        """Raise Refusal if the budget of tokens is used up."""
        count, period_s = self.settings.budget
        wait_s = self.budget.wait_s(self.settings.budget, now, wall_s) if count else 0.0
        if wait_s:
            period = "a day" if period_s == CALENDAR_DAY else f"{period_s:g} s"
            raise Refusal(429, f"the key {self.settings.name} has used up its {count} tokens in {period}",
                          retry_after_s=wait_s)

    def give_back(self, tokens: int, now: float, wall_s: float) -> None:
        """Count a request as ended; its prompt and its answer had so many tokens."""
        self.running -= 1
        if self.settings.budget[0]:
            self.budget.settle(self.settings.budget, now, wall_s)
            self.budget.used += tokens

    def forbids(self, head: RequestHead, route: Route) -> Answer | None:
        """Return the refusal of what routes= and models= do not allow, as far as the head tells; None if they do.

        To show a model is to read, although Ollama has a POST for it.
        """
        settings, has_body = self.settings, head.length != 0
        if settings.routes == "read" and head.method not in SAFE_METHODS and route.kind != "show":
            return Answer(403, f"the key {settings.name} may only read: it has routes=read", has_body)
        if settings.models is EVERY_MODEL:
            return None
        if route.blind:
            text = f"the key {settings.name} may not use every model, and which ones this path is about is not known"
            return Answer(403, text, has_body)
        model = model_in(head.path)
        if model is None or model in settings.models:
            return None
        return Answer(404, missing_text("show", head.path.removeprefix(MODEL_PATH)), has_body)


def secrets_in(fields: HeadFields) -> Iterator[tuple[bytes, bytes]]:
    """Yield (field name, secret) for what a head gives as keys: X-API-Key, Bearer, or the password of Basic."""
    if b"x-api-key" in fields:
        yield b"x-api-key", fields[b"x-api-key"]
    scheme, _, secret = fields.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        yield b"authorization", secret.strip()
    elif scheme.lower() == b"basic":            # browsers send it when they are asked for the dashboard
        with contextlib.suppress(binascii.Error):
            yield b"authorization", base64.b64decode(secret.strip(), validate=True).partition(b":")[2]


# Ollama's own list: any port of this machine, and what is no web page.
LOCAL_ORIGINS = [f"{scheme}://{host}{port}" for host in ("localhost", "127.0.0.1", "0.0.0.0")
                 for scheme in ("http", "https") for port in ("", ":*")] + [
                     f"{scheme}://*" for scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file")]
PREFLIGHT = [b"Access-Control-Allow-Methods: GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS",
             b"Access-Control-Allow-Headers: Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,"
             b"X-Stainless-Arch,X-Stainless-Async,X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,"
             b"X-Stainless-Lang,X-Stainless-Os,X-Stainless-Package-Version,X-Stainless-Poll-Helper,"
             b"X-Stainless-Retry-Count,X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout,"
             b"X-Priority,X-Request-Id,X-Api-Key",
             b"Access-Control-Max-Age: 43200"]


def is_listed(origin: str, allowed: Iterable[str]) -> bool:
    """Tell whether an origin is one of `allowed`, each with one `*` at most, which stands for anything."""
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), origin, re.S) for pattern in allowed)


def is_own_origin(origin: bytes, host: bytes) -> bool:
    """Tell whether a page came from the Host that it asks: the dashboard does."""
    return origin in (b"http://" + host, b"https://" + host)


def origin_lines(origin: bytes, host: bytes, allowed: list[str]) -> list[bytes] | None:
    """Return the lines that let a web page read the answer; [] if it came from `host` itself, None if it may not ask.

    The nodes are not asked: they would compare the origin with a Host that no browser has seen.
    """
    if is_own_origin(origin, host):
        return []
    if "*" in allowed:
        return [b"Access-Control-Allow-Origin: *"]
    if is_listed(origin.decode("latin-1"), allowed):
        return [b"Access-Control-Allow-Origin: " + origin, b"Vary: Origin"]
    return None


def page_may_change(fields: HeadFields, allowed: Iterable[str]) -> bool:
    """Tell whether a request comes from no web page, from one of the gateway's own, or from one of an allowed origin.

    Programs send neither Origin nor Sec-Fetch-Site; browsers send both, and a page's scripts cannot change them.
    """
    origin = fields.get(b"origin", b"")
    if origin and is_listed(origin.decode("latin-1"), allowed):
        return True
    return ((not origin or is_own_origin(origin, fields.get(b"host", b"")))
            and fields.get(b"sec-fetch-site", b"none") in (b"same-origin", b"none"))


@remembered
def host_name(host: bytes) -> str:
    """Return the name or address in a Host field, in lower case, without port and brackets."""
    text = host.decode("latin-1").lower()
    name = text.rpartition(":")[0] if re.search(r":\d*$", text) else text
    return name.removeprefix("[").removesuffix("]")


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def literal(host: str) -> str | None:
    """Return an IP address in its usual spelling; None for a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def unmapped(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, of IPv4 also where it is written as one of IPv6; None for a name."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


@remembered
def is_loopback(address: str) -> bool:
    """Tell whether no other machine can reach an address."""
    parsed = unmapped(address)
    return address == "localhost" if parsed is None else parsed.is_loopback


def is_in_networks(address: str, networks: list[Network]) -> bool:
    """Tell whether an address is in one of some networks."""
    parsed = unmapped(address)
    return parsed is not None and any(parsed in network for network in networks)


def is_trusted_host(host: bytes, machine: str, allowed: list[str]) -> bool:
    """Tell whether a Host field cannot come from DNS rebinding.

    There, the name evil.example of a web page suddenly leads to 127.0.0.1: what answers there is of the same origin,
    and the page may read it. Its Host gives it away. Trusted, by Ollama's own rule, are: no name at all, `machine`,
    localhost, names that no public DNS has, addresses (nobody can lead them elsewhere), and hosts of `allowed` origins.
    """
    name = host_name(host)
    if name in ("", "localhost", machine.lower()) or name.endswith((".localhost", ".local", ".internal")):
        return True
    origins = [f"{scheme}://{host.decode('latin-1').lower()}" for scheme in ("http", "https")]
    return literal(name) is not None or any(is_listed(origin, allowed) for origin in origins)


# A proxy on this machine adds these fields: with one of them, a loopback address does not say who asks.
FORWARDING = frozenset((b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"))


def is_local(address: str, fields: HeadFields) -> bool:
    """Tell whether the client is on this machine and calls it by a loopback Host, which a rebound page cannot do."""
    host = host_name(fields.get(b"host", b""))
    return is_loopback(address) and is_loopback(host) and FORWARDING.isdisjoint(fields)


# Fields in which a web front end tells who asks; the first one that is there counts. Open WebUI: env.py. It sends all
# three: an e-mail address says more than a number, and only its administrators can change it, unlike a name.
USER_FIELDS = (b"x-openwebui-user-email", b"x-openwebui-user-id", b"x-openwebui-user-name", b"x-user-id")
SHOWN_NAME_CHARS = 64


@remembered
def user_name(raw: bytes) -> str:
    """Return the name of a person in a header field, which may be percent-encoded, fit to be shown."""
    return clean_name(urllib.parse.unquote(raw.decode(errors="replace")))


def clean_name(text: str) -> str:
    """Return a text without what is not printable, cut to SHOWN_NAME_CHARS."""
    return "".join(filter(str.isprintable, text[:4 * SHOWN_NAME_CHARS])).strip()[:SHOWN_NAME_CHARS]


def user_in(fields: Json) -> str:
    """Return who asks by the body: OpenAI's `user`, or Anthropic's metadata.user_id; "" if it does not tell.

    Claude Code puts JSON into that, with an account, a device and a session; older ones join them by underscores.
    """
    metadata = fields.get("metadata")
    user = fields.get("user") or (metadata.get("user_id") if isinstance(metadata, dict) else None)
    if not isinstance(user, str):
        return ""
    parts = (object_in(user) or {}) if user.startswith("{") else {}
    return clean_name(str(parts.get("account_uuid") or parts.get("device_id") or user.partition("_session_")[0]))


FORWARDED_FOR = re.compile(r'for="?\[?([^;,\s"\]]*)', re.I)
MOST_HOPS_TOLD = 32
PORT_OF_IPV4 = re.compile(r"(\d+\.\d+\.\d+\.\d+):\d+")


def told_addresses(fields: HeadFields) -> list[str]:
    """Return the addresses that proxies have told, the nearest one last (RFC 7239, X-Forwarded-For)."""
    forwarded = fields.get(b"forwarded")
    if forwarded is not None:
        addresses = FORWARDED_FOR.findall(forwarded.decode("latin-1"))
    else:
        addresses = fields.get(b"x-forwarded-for", b"").decode("latin-1").split(",")
    return [PORT_OF_IPV4.sub(r"\1", address.strip().strip("[]")) for address in addresses[-MOST_HOPS_TOLD:]]


@dataclass(slots=True)
class Verdict:
    """The answer to "may this request be made?". It may if `refusal` and `page_status` are empty."""

    address: str                    # of the client
    cors: RawLines = ()             # raw lines of any answer that let a web page read it
    key: Key | None = None          # that the request gives; None also if none is needed
    refusal: Answer | None = None
    page_status: int = 0            # of an answer without a body to a page: 403 it may not ask, 204 it may (preflight)
    priority: int = DEFAULT_PRIORITY    # if the request asks for none
    max_priority: int = 10
    tells_users: bool = False       # what the request tells of who asks is believed
    user: str = ""                  # whom its head names then
    behind: str = ""                # else the address behind the proxies

    @property
    def models(self) -> ModelSet:
        """Return the models that are there for whoever asks."""
        return self.key.settings.models if self.key else EVERY_MODEL

    def person(self, user: str) -> str:
        """Return who asks, for fair share: the key and the user behind it, the user, or the address."""
        if self.key is None:
            return user or self.address
        return f"{self.key.settings.name}/{user}" if user else self.key.settings.name


class Access:
    """Who may make which request, by the options and the keys file."""

    def __init__(self, options: argparse.Namespace, keys: Iterable[KeySettings]) -> None:
        self.readers = LOCAL_ORIGINS + options.origins      # origins of the pages that may ask
        self.changers = [origin for origin in self.readers if origin != "*"]    # and of those that may change models
        self.checks_host = is_loopback(options.bind)        # as in Ollama: we cannot know the names of other addresses
        self.is_trusted_host = remembered(functools.partial(
            is_trusted_host, machine=socket.gethostname(), allowed=options.origins))
        self.is_trusted_proxy = remembered(functools.partial(is_in_networks, networks=options.trusted_proxies))
        self.needs_key = bool(options.keys)
        self.keys: dict[bytes, Key] = {}        # by digest
        self.configure(keys)

    def configure(self, lines: Iterable[KeySettings]) -> None:
        """Take over the lines of a keys file. A key keeps what it has used up under the same name."""
        known = {key.settings.name: key for key in self.keys.values()}
        self.keys = {}
        for line in lines:
            key = self.keys[line.digest] = known.get(line.name) or Key(line)
            key.configure(line)

    def find_key(self, secret: bytes) -> Key | None:
        """Return the Key whose secret this is, or None."""
        digest = digest_of_key(secret)
        key = self.keys.get(digest)
        return key if key and hmac.compare_digest(digest, key.settings.digest) else None

    def consume_key(self, head: RequestHead) -> Key | None:
        """Return the Key that a request gives, or None. Remove the fields that gave it: no node must see them."""
        by_field = {name: key for name, secret in secrets_in(head.fields) if (key := self.find_key(secret)) is not None}
        if by_field:
            head.lines = [line for line in head.lines if line[0] not in by_field]
        return next(iter(by_field.values()), None)

    def check(self, head: RequestHead, route: Route, address: str) -> Verdict:
        """Return the Verdict on a request of a client at `address`. Takes the key out of the head: see `consume_key`.

        A refused request with a body ends its connection: the body would have to be read.
        """
        fields, has_body = head.fields, head.length != 0
        verdict, host, origin = Verdict(address), fields.get(b"host", b""), fields.get(b"origin")
        if origin:                  # question 1
            lines = origin_lines(origin, host, self.readers)
            if lines is None:
                verdict.page_status = 403
                return verdict
            verdict.cors = lines
            if lines and head.method == "OPTIONS":
                verdict.page_status = 204
                return verdict
        if self.checks_host and not self.is_trusted_host(host):     # 2
            text = "this Host is no name of this machine: --origins can allow it"
            verdict.refusal = Answer(403, text, close=has_body)
            return verdict
        if self.needs_key:          # 3
            key = verdict.key = self.consume_key(head)
            if key is not None:
                verdict.priority, verdict.max_priority = key.settings.priority, key.settings.max_priority
            elif head.method not in ("GET", "HEAD") or head.path not in OPEN_PATHS:
                verdict.refusal = Answer(401, "a key is needed: Authorization: Bearer KEY", has_body)
                return verdict
        elif not is_local(address, fields):
            if route.kind == "order":
                text = "only this machine, or with --keys a key with admin=yes, may order that"
                verdict.refusal = Answer(403, text, close=has_body)
                return verdict
            verdict.max_priority = MOST_FROM_AFAR
        if route.guarded:           # 4
            verdict.refusal = self.forbids_change(head, verdict.key, route.kind == "order", has_body)
        if verdict.key is not None and verdict.refusal is None:     # 5
            verdict.refusal = verdict.key.forbids(head, route)
        if verdict.key.settings.proxy if verdict.key else self.is_trusted_proxy(address):
            verdict.user = next((user_name(fields[name]) for name in USER_FIELDS if name in fields), "")
            verdict.tells_users, verdict.behind = True, self.address_behind(fields)
        return verdict

    def address_behind(self, fields: HeadFields) -> str:
        """Return the last address on a request's way that is no trusted proxy's; "" if none is told."""
        for address in reversed(told_addresses(fields)):
            if literal(address) is None:
                return ""           # nothing before it can be believed
            if not self.is_trusted_proxy(address):
                return address
        return ""

    def sees_all(self, head: RequestHead, verdict: Verdict) -> bool:
        """Tell whether somebody may see what all have used: an admin, or without --keys whoever is on this machine."""
        if self.needs_key:
            return verdict.key is not None and verdict.key.settings.admin
        return is_local(verdict.address, head.fields)

    def may_order(self, head: RequestHead, verdict: Verdict) -> bool:
        """Tell whether whoever looks at a page of the gateway's own may give orders to nodes there."""
        if self.forbids_change(head, verdict.key, is_order=True) is not None:
            return False
        return verdict.key is not None if self.needs_key else is_local(verdict.address, head.fields)

    def forbids_change(self, head: RequestHead, key: Key | None, is_order: bool = False,
                       close: bool = False) -> Answer | None:
        """Return the refusal to somebody who may not change models, an account or nodes; None to others.

        Pages of listed origins may change models, as in Ollama; `*` only lets read. Only the gateway's own pages may
        give an order to a node.
        """
        if key is not None and not key.settings.may_change:
            why = f"it has routes={key.settings.routes}" if key.settings.admin else "it has no admin=yes"
            return Answer(403, f"the key {key.settings.name} may not do that: {why}", close)
        if not page_may_change(head.fields, () if is_order else self.changers):
            return Answer(403, "a web page of this origin may not do that", close)
        return None


# -----------------------------------------------------------------------------
# Reading a request: what does it ask for?
#
# `reading_steps` reads a body into a Reading; `read_spec` makes a RequestSpec of that and the head. A body is read as
# Ollama's own server reads it: keys in any case are the same, the last duplicate wins, bytes after the first JSON value
# and the Content-Type do not matter. A body that cannot be read is no error here: a node answers it in its own words.
# A short body is read by json, a long one is skimmed.
# -----------------------------------------------------------------------------

PRIORITY_NAMES = {"critical": 10, "high": 8, "normal": 5, "low": 3, "batch": 1}
MAX_SPLIT_TEXTS = 4096              # of a list, whose vectors are held until all have come: 16 KiB each as JSON, 64 MiB

# json reads a body up to both bounds, in 10 ms at most. Chats with images and long prompts are below them.
PARSED_BYTES, PARSED_VALUES = 2 * MIB, 32_768
SHORT_BODY_BYTES = 32 * KIB         # read at once, in 5 ms at most; the readers of longer ones take turns
MAX_NAME_CHARS = 512                # kept of a model's name: a client can make up names of any length
SHOWN_CHARS = 200                   # of a name or path in the log and in statistics
PROMPT_KINDS = frozenset(("generate", "chat", "embed"))     # of routes: what the body asks is text for the model
CHANGES = frozenset(("pull", "copy", "delete", "create"))
NOT_REPEATABLE = CHANGES | {"push"}
SERVICE_TIERS = {"priority": 8, "flex": 3}
SEEDED_STREAMS = frozenset(("/api/generate", "/api/chat", "/v1/completions", "/v1/chat/completions"))
TEXT_STREAMS = SEEDED_STREAMS | {"/v1/messages", "/v1/responses"}   # Ollama reads no `seed` of the last two

# Options with their defaults: a request that gives one of these is the same as one without it.
USUAL_OPTIONS = {"main_gpu": 0, "use_mmap": False, "num_thread": 0, "shift": True}
RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict")
MAX_OUTPUT_TOKENS = 2**20           # no model answers with more; keeps what clients claim out of the arithmetic
OUTPUT_BOUNDS = {                   # the field that Ollama reads, by path; what it ignores makes no request cheaper
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
PREFIX_BLOCK_CHARS = 512            # a prompt without messages is compared in blocks of this size
PREFIX_FIRST, PREFIX_LAST = 4, 12   # parts remembered from the front (system prompt) and the back (the last turns)


def family_of(path: str) -> Family:
    """Return the family whose error shape fits a path."""
    if path.startswith("/v1/messages"):
        return Family.ANTHROPIC
    return Family.OPENAI if path.startswith("/v1/") else Family.OLLAMA


MAX_FORM_FIELDS = 1000              # of a multipart form; Ollama's have five
MAX_BOUNDARY_BYTES = 200            # RFC 2046 5.1.1 allows 70
FORM_SEARCH_BYTES = 4 * MIB         # of a form, searched in one step: 4 ms at the most
BOUNDARY = re.compile(rb'boundary=(?:"([^"]+)"|([^\s;,"]+))', re.I)
FIELD_NAME = re.compile(rb'^content-disposition:[^\r\n]*[;\s]name="?([^";\r\n]+)', re.I | re.M)


def find_in_steps(body: Body, mark: bytes, at: int) -> Steps[int]:
    """Return where `mark` is found from `at` on, or -1."""
    while at < len(body):
        place = body.find(mark, at, at + FORM_SEARCH_BYTES)
        if place >= 0:
            return place
        at += FORM_SEARCH_BYTES - len(mark)
        yield
    return -1


def form_span(content_type: bytes, body: Body, name: bytes) -> Steps[Span | None]:
    """Return where the value of a field of a multipart form (RFC 7578) is in a body, or None."""
    match = BOUNDARY.search(content_type)
    if not match or len(match[0]) > MAX_BOUNDARY_BYTES:
        return None
    delimiter = b"--" + (match[1] or match[2])
    at = yield from find_in_steps(body, delimiter, 0)
    for count in range(MAX_FORM_FIELDS):
        start, end = at + len(delimiter), (yield from find_in_steps(body, b"\r\n" + delimiter, at))
        value = body.find(b"\r\n\r\n", start, min(max(0, end), start + MAX_HEAD_BYTES))
        if at < 0 or value < 0:
            return None
        field_name = FIELD_NAME.search(body[start:min(value, start + KIB)])
        if field_name and field_name[1] == name:
            return Span(value + 4, max(value + 4, end))
        at = end + 2
        if count % 100 == 99:
            yield
    return None


def form_field(content_type: bytes, body: Body, name: bytes) -> Steps[str | None]:
    """Return the text of a field of a multipart form, cut short, or None."""
    span = yield from form_span(content_type, body, name)
    return body[span.start:min(span.end, span.start + 4 * MAX_NAME_CHARS)].decode(errors="replace") if span else None


def lower_keys(pairs: list[tuple[str, Any]]) -> Json:
    """Build a JSON object as Go does: keys in any case are the same key, and the last one wins."""
    return {key.lower(): value for key, value in pairs}


JSON_VALUE = json.JSONDecoder()
JSON_VALUE_IN_ANY_CASE = json.JSONDecoder(object_pairs_hook=lower_keys)     # four times as slow


def has_lower_keys(value: object) -> bool:
    """Tell whether the keys that are read below are in lower case: of an object, its options, messages and parts."""
    if type(value) is list:
        return all(map(has_lower_keys, value))
    return type(value) is not dict or all(map(str.islower, value)) and all(
        [has_lower_keys(value[key]) for key in ("options", "messages", "input", "content") if key in value])


def json_value(text: str) -> Any:
    """Return the JSON value that a text begins with, its keys in lower case. Raises ValueError, RecursionError."""
    value, _ = JSON_VALUE.raw_decode(text)
    if not has_lower_keys(value):
        value, _ = JSON_VALUE_IN_ANY_CASE.raw_decode(text)
    return value


def read_object(body: Body) -> Json:
    """Return the JSON object that `body` begins with, keys in lower case; {} if there is none."""
    try:
        value = json_value(body.decode(errors="replace").lstrip())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(slots=True)
class Prompt:
    """What routing needs of a prompt."""

    chars: int                      # of all that the model reads as text; estimated if the body is long
    prefix: Prefix
    texts: int = 1                  # in an embedding's input
    images: int = 0
    tokens: int = 0                 # beside the text: marks around messages, and `context` of /api/generate
    lead: int = 0                   # hash of its tools and its system prompt; 0 = it has none
    opening: int = 0                # hash of all up to its first message: what the turns of a conversation share


@dataclass(slots=True)
class Reading:
    """What was read of a body. Without a `prompt` of its own, the prompt is in the fields."""

    fields: Json
    prompt: Prompt | None = None


Steps = Generator[None, None, Parsed]


def at_once(steps: Steps[Parsed]) -> Parsed:
    """Run all steps of a piece of work; return its result."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: Parsed = end.value
        return result


# A body that is too long for json is skimmed: it is looked at as bytes, in blocks, by operations at the speed of C.
# They find where the values of the object are; only the short ones are read. Escapes are overwritten, so that each
# quote left begins or ends a string; what stands between strings is reduced to its brackets, written as square ones.
#
# Such work is a generator, `Steps`: a step takes some milliseconds at most, and between two of them the loop serves
# others (`LoopTurns.run`). Where little is to be done, `at_once` takes all steps.

SKIM_BYTES = 64 * KIB               # looked at in one step: 3 ms at the most
SHORT_VALUE_BYTES = 32 * KIB        # of a field that is read
MAX_SKIMMED_FIELDS = 20_000         # of one object; Ollama knows thirty
PROMPT_BLOCK_BYTES = 16 * KIB       # the prompt is compared in blocks of this size
BRACKETS_ONLY = bytes(range(256)).translate(None, b"[]{}")
AS_SQUARE = bytes.maketrans(b"{}", b"[]")
SPACE = rb"[ \t\r\n]{0,65536}+"     # more of it, or a longer key, is read as no JSON
MEMBER = re.compile(rb'[{,]%b"((?:[^"\\]|\\.){0,4096}+)"%b:%b' % (SPACE, SPACE, SPACE), re.S)
MEMBER_END = re.compile(SPACE + rb"(?=([,}]))")
OBJECT_START = re.compile(SPACE + rb"(?=\{)")
SCALAR = re.compile(rb"[-+.0-9A-Za-z]{1,400}")
NAME_FIELDS = ("model", "name", "source", "from")       # what a request calls its model
BLOB_FIELDS = ("files", "adapters", "draft_files")      # of create: what is made from blobs
LONG_FIELDS = ("system", "instructions", "prompt", "messages", "input")     # the prompt, as the model reads it
SKIMMED_FIELDS = frozenset((*NAME_FIELDS, *LONG_FIELDS, "stream", "options", "tools", "keep_alive", "priority",
                            "service_tier", "stream_options", *BLOB_FIELDS, "shift", "temperature", "seed", "logprobs",
                            "top_logprobs", "user", "metadata", "prompt_cache_key", *OUTPUT_BOUNDS.values()))


class Span(NamedTuple):
    """Where the bytes of a field's value are in a body; in a Reading, a value that is too long to be read."""

    start: int
    end: int


def unescaped(body: Body, start: int, end: int) -> Body:
    """Return a block of a body, the escapes of quotes and backslashes overwritten.

    No escape is open at `start`. The block has one byte more if `end` would cut an escape.
    """
    block = body[start:end]
    if (len(block) - len(block.rstrip(b"\\"))) % 2:
        block = body[start:end + 1]
    return block.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in block else block


def value_end(body: Body, at: int) -> Steps[int]:
    """Return where the value ends that begins at `at`. Raises ValueError if there is none, or no end of it."""
    opening = body[at:at + 1]
    if opening not in (b'"', b"[", b"{"):
        if scalar := SCALAR.match(body, at):
            return scalar.end()
        raise ValueError("no value")
    at, depth, in_string, size = at + 1, int(opening != b'"'), int(opening == b'"'), 64
    while at < len(body):
        block = unescaped(body, at, at + size)
        parts = block.split(b'"')   # every second one is outside of strings, from parts[in_string] on
        brackets = b"".join(parts[in_string::2]).translate(AS_SQUARE, BRACKETS_ONLY).replace(b"[]", b"")
        closing, least = brackets.count(b"]"), 0
        if closing >= depth:        # `[` is 91, `]` is 93
            least = min(itertools.accumulate(map((92).__sub__, brackets), initial=0))
        if depth + least > 0 or not depth and len(parts) == 1:      # it does not end in this block
            at, size = at + len(block), min(2 * size, SKIM_BYTES)
            depth, in_string = depth + len(brackets) - 2 * closing, (in_string + len(parts) - 1) % 2
        elif len(block) > 64:
            size = len(block) // 2
        else:
            return at + end_within(block, depth, in_string)
        if len(block) >= SKIM_BYTES // 4:
            yield
    raise ValueError("a value without an end")


def end_within(block: Body, depth: int, in_string: int) -> int:
    """Return where a value ends in a short block without escapes: outside of strings, at depth 0 of brackets."""
    for at, byte in enumerate(block):
        if byte == 34:              # a quote
            in_string = not in_string
        elif not in_string:
            depth += (byte in b"[{") - (byte in b"]}")
        if not depth and not in_string:
            return at + 1
    return len(block)


def fold_key(key: str) -> str:
    """Return a key in the one spelling of all that are the same key for Go, which takes `\u017f` for an s, too."""
    return key.lower().replace("\u017f", "s")


def members_in(body: Body, names: Container[str], at: int = 0) -> Steps[list[tuple[str, Span]]]:
    """Return [(name in lower case, where its value is), ...] of the object that begins at `at` of a body, in order.

    Only members with one of `names` are in it. Raises ValueError if there is no object, or one with more than
    MAX_SKIMMED_FIELDS members.
    """
    members: list[tuple[str, Span]] = []
    place = OBJECT_START.match(body, at)
    for count in range(MAX_SKIMMED_FIELDS):
        member = MEMBER.match(body, place.end()) if place else None
        if not member:
            raise ValueError("not an object")
        span = Span(member.end(), (yield from value_end(body, member.end())))
        name = fold_key(json.loads(f'"{member[1].decode(errors="replace")}"'))
        if name in names:
            members.append((name, span))
        place = MEMBER_END.match(body, span.end)
        if place and place[1] == b"}":
            return members
        if count % 100 == 99:
            yield
    raise ValueError("too many members")


def spans_in(body: Body, at: int = 0, names: frozenset[str] = SKIMMED_FIELDS) -> Steps[dict[str, Span]]:
    """Return where the values of the object are that begins at `at` of a body: of the fields `names`, by name.

    Names in any case are the same, and the last one wins. Raises ValueError as `members_in`.
    """
    return dict((yield from members_in(body, names, at)))


def spans_to_edit(body: Body) -> Steps[dict[str, Span]]:
    """Return the same; {} for a body that only json can read, as the skimmer is stricter: that is left as it is."""
    try:
        return (yield from spans_in(body))
    except ValueError:
        return {}


def read_value(body: Body, span: Span, name: str) -> Any:
    """Return a field's value if it is short, a model's name cut short, else its Span. Raises ValueError."""
    start, end = span
    if end - start <= SHORT_VALUE_BYTES:
        return json_value(body[start:end].decode(errors="replace"))
    if name in NAME_FIELDS and body[start:start + 1] == b'"':
        return body[start + 1:start + 1 + MAX_NAME_CHARS].decode(errors="replace")
    return span


def text_chars(raw: bytes) -> int:
    """Return about how many characters of text are in a block of JSON: none if it is an image, or numbers."""
    if len(raw) > KIB and raw.isascii() and not any(mark in raw for mark in (b" ", b"\\", b'"')):
        return 0
    return max(0, len(raw.decode(errors="ignore")) - 5 * raw.count(b"\\u"))


def skimmed_prompt(body: Body, spans: dict[str, Span]) -> Steps[Prompt]:
    """Return the Prompt of a long body: each block of it is taken for a message."""
    chars, texts, seed, images, in_image = 0, 1, 0, 0, False
    chain: list[tuple[int, int]] = []
    if "tools" in spans:
        start, end = spans["tools"]
        raw = bytes(body[start:min(end, start + MIB)])
        chars, seed = text_chars(raw), hash(raw)
    for name in LONG_FIELDS:
        start, end = spans.get(name, (0, 0))
        for at in range(start, end, PROMPT_BLOCK_BYTES):
            raw = bytes(body[at:min(at + PROMPT_BLOCK_BYTES, end)])
            size, seed = text_chars(raw), hash((seed, raw))
            images += not size and not in_image     # it begins here
            chars, in_image = chars + size, not size
            chain.append((seed, chars))
            if name == "input":
                texts += raw.count(b'","') + raw.count(b'", "')
            if len(chain) % 32 == 0:
                yield
    return Prompt(chars, prefix_of(chain), texts, images)


def skimmed(body: Body) -> Steps[Reading]:
    """Read a JSON body that is too long for json."""
    fields: Json = {}
    try:
        spans = yield from spans_in(body)
        for name, span in spans.items():
            fields[name] = read_value(body, span, name)
            yield
    except (ValueError, RecursionError):
        return Reading({})
    return Reading(fields, (yield from skimmed_prompt(body, spans)))


def is_long(body: Body) -> bool:
    """Tell whether json would take too long for a body: more than 10 ms."""
    return len(body) > PARSED_BYTES or (
        len(body) > SHORT_BODY_BYTES and sum(map(body.count, (b",", b"{", b"["))) > PARSED_VALUES)


def reading_steps(head: RequestHead, route: Route, body: Body) -> Steps[Reading]:
    """Read a body, whatever it holds. One that cannot be read, being compressed for example, has no fields."""
    if route.kind in ("raw", "account"):
        return Reading({})
    if route.kind == "transcribe":
        model = yield from form_field(head.fields.get(b"content-type", b""), body, b"model")
        return Reading({"model": model} if model else {})
    return (yield from skimmed(body)) if is_long(body) else Reading(read_object(body))


@remembered
def canonical(name: str) -> str:
    """Return the full lower-case name that a model name stands for: `llama3.2` -> `llama3.2:latest`."""
    name = name[:MAX_NAME_CHARS].strip().lower()
    name = name.partition("://")[2] or name
    base, _, source = name.rpartition(":")
    if source.strip() == "local":   # Ollama: internal/modelref
        name = base
    elif source.strip() == "cloud" and ":" in base.rpartition("/")[2]:
        name = base + "-cloud"
    name = name.removeprefix("registry.ollama.ai/").removeprefix("library/")
    if name and ":" not in name.rpartition("/")[2]:
        name += ":latest"
    return name


MODEL_PATH = "/v1/models/"          # and then the name of one


def model_in(path: str) -> str | None:
    """Return the canonical model that a path names, as /v1/models/llama3.2 does, or None."""
    before, _, name = path.partition(MODEL_PATH)
    return canonical(name) if name and not before else None


def parse_pattern(text: str) -> str:
    """Return a pattern for canonical names: one of them, or a text in which `*` stands for anything, also for nothing.

    At its end that is any tag, too.
    """
    pattern = canonical(text)
    return pattern.removesuffix(":latest") if text.rstrip().endswith("*") else pattern


def is_meant(model: str, pattern: str) -> bool:
    """Tell whether a pattern means the model of a canonical name. In linear time: a client may make up the name."""
    first, *others = pattern.split("*")
    if not others:
        return model == first
    last, at, end = others.pop(), len(first), len(model)
    if not (model.startswith(first) and model.endswith(last) and at + len(last) <= end):
        return False
    for part in others:
        at = model.find(part, at, end - len(last))
        if at < 0:
            return False
        at += len(part)
    return True


# What the model of a request is called in its body, by the kind of its route; in `modelfile` and `path` of create older
# servers looked, for more than a name.
NAMED_IN: dict[str, frozenset[str]] = {
    **dict.fromkeys(("generate", "chat", "embed", "image"), frozenset(("model",))),
    **dict.fromkeys(("show", "pull", "push", "delete"), frozenset(("model", "name"))),
    "create": frozenset(("model", "name", "from", "modelfile", "path")), "copy": frozenset(("source", "destination"))}
# A form whose parts all servers find in the same places, as HTTP libraries and browsers write it.
FORM_TYPE = re.compile(rb'multipart/form-data(?:; ?charset=[\w-]+)?; ?boundary=(?:"([^"\\]{1,70})"|([^\s;,"\\]{1,70}))'
                       rb'(?:; ?charset=[\w-]+)?', re.I)
PART_LINE = re.compile(rb'content-disposition: ?form-data; ?name=(?:"([^"\\]*)"|([^\s;"\\]+))'
                       rb'(?:; ?filename\*?=(?:"(?:[^"\\]|\\.)*"|[^\s;"\\]+)){0,2}', re.I)


def named_models(head: RequestHead, route: Route, body: Body) -> Steps[list[str] | None]:
    """Return every name by which some server could know the model of a request; None if the body cannot be read.

    Where a request goes may rest on how its body is read here, but not whether it may be made: a field that a later one
    overwrites counts, too. A body without a model, where Ollama wants one, names "".
    """
    is_form = route.kind == "transcribe" and b"multipart" in head.fields.get(b"content-type", b"").lower()
    if is_form:
        return (yield from names_in_form(head, body))
    fields = NAMED_IN.get("image" if route.kind == "transcribe" else route.kind)
    if fields is None:
        return []
    try:
        values = values_of(body, fields) if len(body) <= SHORT_BODY_BYTES else (yield from skimmed_values(body, fields))
    except (ValueError, RecursionError):
        return None
    names = [value for value in values if value is not None]    # Go leaves what a null stands for as it was
    is_read = all(isinstance(name, str) and len(name) <= MAX_NAME_CHARS for name in names)
    return (names or [""]) if is_read else None


MEMBERS = json.JSONDecoder(object_pairs_hook=list)      # an object is a list of (key, value)


def values_of(body: Body, names: frozenset[str]) -> list[Any]:
    """Return all values of fields of the object that a short body begins with. Raises ValueError, RecursionError."""
    text = body.decode(errors="replace").lstrip(" \t\r\n")
    members, _ = MEMBERS.raw_decode(text)
    if not text.startswith("{"):
        raise ValueError("not an object")
    return [value for key, value in members if fold_key(key) in names]


def skimmed_values(body: Body, names: frozenset[str]) -> Steps[list[Any]]:
    """Return the same of a long body; of a value that is too long for a name, its Span. Raises ValueError."""
    spans = [span for _, span in (yield from members_in(body, names))]
    return [span if span.end - span.start > 8 * MAX_NAME_CHARS else
            json.loads(body[span.start:span.end].decode(errors="replace")) for span in spans]


def names_in_form(head: RequestHead, body: Body) -> Steps[list[str] | None]:
    """Return the texts of all parts `model` of a form, and of the query, which Go reads first; None if it is unusual.

    That is what one server could divide in another way than the next one: a second boundary, bare LF, folded lines.
    """
    kind = FORM_TYPE.fullmatch(head.fields.get(b"content-type", b""))
    mark = b"--" + (kind[1] or kind[2]) if kind else b""
    if not kind or not body.startswith(mark):
        return None
    query = urllib.parse.parse_qsl(head.target.partition(b"?")[2].decode("latin-1"), keep_blank_values=True)
    names, start = [value for name, value in query if name == "model"], len(mark)
    for count in range(MAX_FORM_FIELDS):
        end = yield from find_in_steps(body, mark, start)
        if end < 0:                 # this is the last boundary
            return (names or [""]) if body[start:start + 2] == b"--" else None
        value = body.find(b"\r\n\r\n", start, min(end, start + 2 * KIB))
        name = part_name(body[start + 2:value]) if value >= 0 else None
        if name is None or body[start:start + 2] != b"\r\n" or body[end - 2:end] != b"\r\n":
            return None
        if name == b"model":
            names.append(body[value + 4:end - 2][:8 * MAX_NAME_CHARS].decode(errors="replace"))
        start = end + len(mark)
        if count % 100 == 99:
            yield
    return None


def part_name(lines: Body) -> bytes | None:
    """Return the name in the head of a part of a form, None if it is unusual."""
    fields = bytes(lines).split(b"\r\n")
    named = [line for line in fields if line.lower().startswith(b"content-disposition")]
    match = PART_LINE.fullmatch(named[0]) if len(named) == 1 else None
    is_plain = all(line[:1] not in (b" ", b"\t") and b"\r" not in line and b"\n" not in line for line in fields)
    return (match[1] or match[2] or b"") if match and is_plain and b"quoted-printable" not in lines.lower() else None


def missing_text(kind: str, name: str) -> str:
    """Return what Ollama says on a route of a kind where there is no model of this name (server/routes.go)."""
    name = name[:MAX_NAME_CHARS]
    if kind == "pull":
        return "pull model manifest: file does not exist"
    if kind in ("embed", "copy"):
        quoted = json.dumps(name, ensure_ascii=False)
        return f"model {quoted} not found" + (", try pulling it first" if kind == "embed" else "")
    if kind == "show":              # in its shortest form, with the tag
        name = re.sub("^(registry.ollama.ai/)?(library/)?", "", name.strip(), flags=re.I)
        name += "" if ":" in name.rpartition("/")[2] else ":latest"
    return f"model '{name}' not found"


class Alias(NamedTuple):
    """What a client calls a model that is asked for by another name."""

    asked: bytes                    # a JSON string, as the client wrote it
    model: str                      # that serves it
    key: str = "model"              # of the member of an answer that names the model


# Of routes: what runs or shows a model. Whoever changes one means the model of that very name.
ALIASED_KINDS = PROMPT_KINDS | {"image", "transcribe", "show"}


def alias_target(name: str, aliases: list[tuple[str, str]], is_there: bool) -> str | None:
    """Return the model that serves what a client calls `name`, None: the one of that name.

    `aliases`: [(pattern, model), ...]; an alias without `*` comes first, then the model that `is_there`, then the first
    pattern that fits. An alias is followed once: what it leads to is no alias.
    """
    asked = canonical(name)
    forms = asked, asked.removesuffix(":latest")
    exact = (model for pattern, model in aliases if pattern == asked)
    by_pattern = (model for pattern, model in aliases
                  if not is_there and any(is_meant(form, pattern) for form in forms))
    model = next(itertools.chain(exact, by_pattern), None)
    return None if model is None or canonical(model) == asked else model


def is_cloud(model: str) -> bool:
    """Tell whether a canonical name is run by ollama.com and not by a card of the node's own."""
    return model.endswith((":cloud", "-cloud"))


def parse_priority(text: str) -> int:
    """Return the priority 1..10 that a number or a name means. Raises ValueError."""
    text = text.strip().lower()
    if text in PRIORITY_NAMES:
        return PRIORITY_NAMES[text]
    if text.isascii() and text.isdigit() and len(text) <= 2 and 1 <= int(text) <= 10:
        return int(text)
    raise ValueError(f"must be 1 to 10 or one of {', '.join(PRIORITY_NAMES)}")


def priority_of(head: RequestHead, fields: Json, family: Family, default: int) -> int:
    """Return the priority of a request: header, body field, OpenAI's service tier, else the default. Raises Refusal."""
    header = head.fields.get(b"x-priority")
    if header is not None:
        try:
            return parse_priority(header.decode("latin-1"))
        except ValueError as error:
            raise Refusal(400, f"X-Priority {error}") from None
    value = fields.get("priority")
    if value is not None:
        if type(value) is not int or not 1 <= value <= 10:
            raise Refusal(400, "priority must be a whole number from 1 to 10")
        return value
    tier = fields.get("service_tier")
    return SERVICE_TIERS.get(tier, default) if isinstance(tier, str) and family is Family.OPENAI else default


# A message's parts that a model reads as text, and those that a client writes as JSON for it. What stands under other
# names is for the server (ids, roles, cache marks), an image, or encrypted.
TEXT_FIELDS = ("thinking", "reasoning", "reasoning_content", "summary", "content", "text", "output", "name",
               "tool_name", "refusal", "title")
JSON_FIELDS = ("arguments", "input")
IMAGE_TYPES = frozenset(("image", "image_url", "input_image"))
MESSAGE_TOKENS = 4                  # of a template's marks around a message
MOST_NESTED = 6                     # content in a tool's result in a message: three levels
# Claude Code's first block, which is another one in each conversation and, of some versions, in each request, and which
# no model needs: it would keep prompts that are otherwise equal from the node's prefix cache.
BILLING = "x-anthropic-billing-header:"
CHANGING_BLOCK = re.compile(rb'("text"\s*:\s*"%b)[^"\\]{0,400}"' % BILLING.encode())
STABLE_BLOCK = rb'\1 cc_version=0; cc_entrypoint=cli; cch=00000;"'


def add_texts(part: Any, texts: list[str], level: int = 0) -> int:
    """Add to `texts` what a model reads of a message or of a part of one, in order; return how many images there are.

    Shapes: Ollama's, OpenAI's for chats and responses, Anthropic's.
    """
    if isinstance(part, str):
        texts.append(part)
        return 0
    if level > MOST_NESTED:
        return 0
    if isinstance(part, list):
        return sum([add_texts(item, texts, level + 1) for item in part])
    if not isinstance(part, dict):
        return 0
    if part.get("type") in IMAGE_TYPES:
        return 1
    images = part.get("images")
    count = len(images) if isinstance(images, list) else 0
    for name in TEXT_FIELDS:
        if name in part:
            count += add_texts(part[name], texts, level + 1)
    for name in JSON_FIELDS:
        if name in part:
            value = part[name]
            texts.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    calls = part.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, dict):
            count += add_texts(call.get("function"), texts, level + 1)
    if "source" in part:            # a document of Anthropic's, as text
        source = part["source"]
        count += add_texts(source.get("data") if isinstance(source, dict) and source.get("type") == "text" else None,
                           texts, level + 1)
    return count


def text_of(part: Any) -> tuple[str, int]:
    """Return (what a model reads of a message or a part of one, images in it)."""
    if isinstance(part, dict) and len(part) == 2 and "role" in part and type(text := part.get("content")) is str:
        return text, 0
    texts: list[str] = []
    images = add_texts(part, texts)
    if texts and texts[0].startswith(BILLING):
        texts[0] = ""
    return "".join(texts), images


def prompt_parts(kind: str, fields: Json) -> tuple[list[tuple[str, int]], int]:
    """Return ([(text, images), ...] in the order in which the model reads them, how many of these are the lead).

    The lead is the tools and the system prompt, which may be the first message.
    """
    tools, system = fields.get("tools"), fields.get("system", fields.get("instructions"))
    lead = [(json.dumps(tools, ensure_ascii=False), 0)] if tools else []
    if system:
        lead.append(text_of(system))
    if kind == "generate":
        prompt, images = text_of({"content": fields.get("prompt"), "images": fields.get("images")})
        suffix = text_of(fields.get("suffix"))
        blocks = [(prompt[at:at + PREFIX_BLOCK_CHARS], 0) for at in range(0, len(prompt), PREFIX_BLOCK_CHARS)]
        return [*lead, *([("", images)] if images else []), *blocks, *([suffix] if suffix[0] else [])], len(lead)
    messages = fields.get("messages", fields.get("input"))
    if isinstance(messages, str):
        return [*lead, (messages, 0)], len(lead)
    said = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    begins_with_system = not system and said[:1] and said[0].get("role") in ("system", "developer")
    return lead + [text_of(message) for message in said], len(lead) + bool(begins_with_system)


def prefix_of(chain: list[tuple[int, int]]) -> Prefix:
    """Return the first and the last parts of ((hash, chars), ...) of a prompt: equal hashes mean an equal beginning."""
    return tuple(chain[:PREFIX_FIRST] + chain[PREFIX_FIRST:][-PREFIX_LAST:])


def read_prompt(kind: str, fields: Json) -> Prompt:
    """Return the Prompt of a body that was read as a whole."""
    if kind == "embed":
        texts = fields.get("input", fields.get("prompt"))
        text, _ = text_of(texts)
        return Prompt(len(text), ((hash(text), len(text)),), len(texts) if isinstance(texts, list) and texts else 1)
    chars = seed = images = 0
    chain: list[tuple[int, int]] = []
    parts, lead = prompt_parts(kind, fields)
    for text, pictures in parts:
        chars, images = chars + len(text), images + pictures
        seed = hash((seed, text, pictures))
        chain.append((seed, chars))
    context = fields.get("context")
    tokens = MESSAGE_TOKENS * len(chain) if kind == "chat" else len(context) if isinstance(context, list) else 0
    opening = chain[min(lead, len(chain) - 1)][0] if kind == "chat" and chain else 0
    return Prompt(chars, prefix_of(chain), 1, images, tokens, chain[lead - 1][0] if lead else 0, opening)


def kind_of(client: str, lead: int, fields: Json) -> int:
    """Return what is equal for requests whose answers are of like length: a program asks with one system prompt, for
    one format, with or without thinking. 0 if there is neither a system prompt nor a format.
    """
    shape = fields.get("format") or fields.get("response_format") or fields.get("text")
    if not (lead or shape):
        return 0
    return hash((client, lead, repr(shape), repr(fields.get("think", fields.get("thinking")))))


# What clients call a conversation: Open WebUI, Claude Code, opencode; Codex has prompt_cache_key in the body.
SESSION_FIELDS = (b"x-openwebui-chat-id", b"x-claude-code-session-id", b"x-session-id")


def session_of(head: RequestHead, fields: Json, opening: int) -> int:
    """Return what is equal for the requests of a conversation: what the client calls it, or else how it begins."""
    for name in SESSION_FIELDS:
        if name in head.fields:
            return hash(head.fields[name])
    key = fields.get("prompt_cache_key")
    return hash(key) if isinstance(key, str) else opening


def output_bound(path: str, fields: Json, options: Json) -> int | None:
    """Return how many tokens a node answers with at most; None if the request sets no bound."""
    bound = fields.get(OUTPUT_BOUNDS[path]) if path in OUTPUT_BOUNDS else options.get("num_predict")
    return min(bound, MAX_OUTPUT_TOKENS) if type(bound) is int and bound > 0 else None


def runner_options(fields: Json, options: Json) -> RunnerOptions:
    """Return the options that a model is loaded with: for another value Ollama unloads it and loads it again."""
    if not options and "shift" not in fields:
        return ()
    values = [*((name, options.get(name)) for name in RUNNER_OPTIONS), ("shift", fields.get("shift"))]
    return tuple((name, value) for name, value in values
                 if isinstance(value, (int, float)) and not (name == "num_gpu" and value < 0))


def window_for(model: str, windows: list[tuple[str, int]]) -> int:
    """Return the context in tokens that --num-ctx gives a model, 0 if none."""
    return next((num_ctx for pattern, num_ctx in windows if is_meant(model, pattern)), 0)


def widened(body: Body, fields: Json, windows: list[tuple[str, int]]) -> Steps[Body]:
    """Return a body that asks for the context that --num-ctx gives its model, if it asks for none itself.

    That field is added to the bytes and to `fields`; nothing else changes. Options that are no object are left for
    Ollama to refuse.
    """
    name, options = fields.get("model"), fields.get("options")
    own = {} if options is None else options
    num_ctx = window_for(canonical(name), windows) if isinstance(name, str) else 0
    if not num_ctx or not isinstance(own, dict) or "num_ctx" in own:
        return body
    spans = yield from spans_to_edit(body)
    if not spans:                   # else its model is among them
        return body
    fields["options"] = {**own, "num_ctx": num_ctx}
    if "options" not in spans:
        at = body.index(b"{") + 1
        return body[:at] + b'"options":{"num_ctx":%d},' % num_ctx + body[at:]
    start, end = spans["options"]
    if options is None:
        return body[:start] + b'{"num_ctx":%d}' % num_ctx + body[end:]
    return body[:start + 1] + b'"num_ctx":%d%b' % (num_ctx, b"," if own else b"") + body[start + 1:]


def with_model(body: Body, key: str, model: str) -> Steps[tuple[Body, Alias | None]]:
    """Return a body whose field `key` says `model`, and the Alias that undoes it; not another byte is changed.

    What the skimmer reads in another way than json, and names of any length, are left for a node to refuse.
    """
    spans = yield from spans_to_edit(body)
    start, end = spans.get(key, (0, 0))
    if not 0 < end - start <= 4 * MAX_NAME_CHARS:
        return body, None
    return body[:start] + json.dumps(model).encode() + body[end:], Alias(bytes(body[start:end]), model)


def with_model_in_form(head: RequestHead, body: Body, model: str) -> Steps[Body]:
    """Return a multipart form whose field `model` says `model`."""
    span = yield from form_span(head.fields.get(b"content-type", b""), body, b"model")
    return body[:span.start] + model.encode() + body[span.end:] if span else body


# What makes a stream of OpenAI's end with the counts of its tokens.
USAGE_STREAMS = frozenset(("/v1/completions", "/v1/chat/completions"))
ASK_USAGE = b'"stream_options":{"include_usage":true},'


class Splice(NamedTuple):
    """Bytes that stand in a body in place of those from `start` to `end`, when it goes to some nodes."""

    start: int
    end: int
    data: bytes

    def cut(self, body: Body) -> tuple[bytes, memoryview]:
        """Return a body with these bytes in it, in two parts; a long one is not copied."""
        return bytes(body[:self.start]) + self.data, memoryview(body)[self.end:]


def asking_for_usage(body: Body, fields: Json) -> Steps[Splice | None]:
    """Return what makes a body ask for the counts of its stream, None: it does, or says what a node is to refuse."""
    options = fields.get("stream_options")
    if "stream_options" not in fields:
        at = body.index(b"{") + 1
        return Splice(at, at, ASK_USAGE)
    if options is not None and not isinstance(options, dict) or len(body) > PARSED_BYTES:
        return None
    own = lower_keys(list((options or {}).items()))
    if own.get("include_usage") is not None and own["include_usage"] is not False:
        return None
    spans = yield from spans_to_edit(body)
    if not spans:
        return None
    return Splice(*spans["stream_options"], json.dumps({**own, "include_usage": True}).encode())


@remembered
def counts_streams(version: str) -> bool:
    """Tell whether a node of this version of Ollama counts the tokens of a stream when it is asked to: since 0.5.2."""
    return [int(part) for part in re.findall(r"\d{1,9}", version)] >= [0, 5, 2]


# A duration as Go writes it: "1h30m", "-1m"; "0" alone needs no unit.
DURATION = re.compile(r"([+-]?)((?:\d{1,15}(?:\.\d*)?(?:ns|us|µs|ms|s|m|h))+|0+)")
DURATION_PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_keep_alive(value: object) -> float | None:
    """Return seconds for a `keep_alive`, infinite for a negative one; None for what Ollama does not understand."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return math.inf if value < 0 else float(min(value, 1e9)) if value >= 0 else None    # JSON may hold a NaN
    match = DURATION.fullmatch(value) if isinstance(value, str) and len(value) < 64 else None
    if match is None:
        return None
    seconds = sum(float(number) * UNIT_S[unit] for number, unit in DURATION_PART.findall(match[2]))
    return math.inf if match[1] == "-" and seconds else seconds


def change_of(route: Route, fields: Json) -> str:
    """Return what a request does to its model on every node: pull, copy, delete, create, unload; "" for nothing.

    An empty prompt that is to be kept alive for no time unloads the model (Ollama: server/routes.go).
    """
    if route.kind in CHANGES:
        return route.kind
    prompt = "messages" if route.kind == "chat" else "prompt"
    unloads = (not fields.get(prompt) and route.kind in ("generate", "chat") and route.family is Family.OLLAMA
               and parse_keep_alive(fields.get("keep_alive")) == 0)
    return "unload" if unloads else ""


def source_of(route: Route, fields: Json) -> str | None:
    """Return the canonical name of the model that a request makes a new one from, if it does."""
    source = fields.get("source") if route.kind == "copy" else None
    if route.kind == "create" and not any(map(fields.get, BLOB_FIELDS)):
        source = fields.get("from")             # else it is made from blobs, and these are on the primary node
    return canonical(source) if isinstance(source, str) else None


def is_deterministic(path: str, fields: Json, sampling: Json) -> bool:
    """Tell whether the same request gives the same text again: temperature 0, or a seed (-1: a random one)."""
    temperature, seed = sampling.get("temperature"), sampling.get("seed") if path in SEEDED_STREAMS else None
    if fields.get("logprobs") or fields.get("top_logprobs"):
        return False                # numbers that belong to whole lines, and are never quite the same
    return type(temperature) in (int, float) and temperature == 0 or type(seed) is int and seed != -1


def searches_web(family: Family, tools: Any) -> bool:
    """Tell whether a node itself searches the web for a request, as it does for Anthropic's tools only (Ollama:
    anthropic/anthropic.go). What other clients call so is a function of their own."""
    return family is Family.ANTHROPIC and isinstance(tools, list) and any(
        isinstance(tool, dict) and str(tool.get("type")).startswith("web_search") for tool in tools)


def is_batch(texts: object) -> bool:
    """Tell whether an embedding's input is a list of texts, of a length that can be split."""
    return type(texts) is list and 1 < len(texts) <= MAX_SPLIT_TEXTS and all(type(text) is str for text in texts)


def read_spec(head: RequestHead, route: Route, reading: Reading, client: str,
              default_priority: int = DEFAULT_PRIORITY) -> RequestSpec:
    """Return what a request wants, from its head and a Reading of its body. Raises Refusal for an invalid priority."""
    if route.kind in ("raw", "account"):    # of their body nothing is read: only the path can name a model
        return RequestSpec(route.family, model_in(head.path), client=client, inference=False, where=route.where,
                           repeatable=head.method in ("GET", "HEAD"))
    fields, is_inference = reading.fields, route.where is Where.QUEUED
    is_ollama, embeds = route.family is Family.OLLAMA, route.kind == "embed"
    options = fields.get("options") if is_ollama else None      # /v1 has none: its fields stand alone
    options = options if isinstance(options, dict) else {}
    name = fields.get("model") or fields.get("name") or fields.get("source")
    stream = fields["stream"] if isinstance(fields.get("stream"), bool) else route.streams
    prompt = (reading.prompt or read_prompt(route.kind, fields)) if route.kind in PROMPT_KINDS else Prompt(0, ())
    change = change_of(route, fields)
    spec = RequestSpec(route.family, canonical(name) if isinstance(name, str) else None)
    spec.priority = priority_of(head, fields if is_inference else {}, route.family, default_priority)
    spec.client, spec.stream, spec.where = client, stream, route.where
    spec.prompt_chars, spec.prompt_images, spec.prompt_tokens = prompt.chars, prompt.images, prompt.tokens
    spec.prefix, spec.session = prompt.prefix, session_of(head, fields, prompt.opening)
    if fields.get("tools"):
        spec.has_tools, spec.needs_account = True, searches_web(route.family, fields["tools"])
    spec.kind = kind_of(client, prompt.lead, fields) if is_inference and not embeds else 0
    spec.max_output, spec.options = output_bound(head.path, fields, options), runner_options(fields, options)
    if is_ollama and "keep_alive" in fields:
        spec.keep_alive_s = parse_keep_alive(fields["keep_alive"])
    if embeds:
        spec.embeds, spec.inputs = True, prompt.texts
        spec.batch = fields if is_batch(fields.get("input")) else None
    spec.inference, spec.change = is_inference and not change, change
    spec.source = None if is_inference else source_of(route, fields)
    spec.repeatable = route.kind not in NOT_REPEATABLE
    spec.deterministic = (stream and head.path in TEXT_STREAMS
                          and is_deterministic(head.path, fields, options if is_ollama else fields))
    spec.silent = not stream or spec.has_tools
    return spec


# -----------------------------------------------------------------------------
# Cluster: which nodes are there, and which of them have a model?
#
# Rows are those of /api/tags and /api/ps, kept as the nodes gave them. Names of the same weights share one Runner.
# -----------------------------------------------------------------------------

# Batches of texts to embed. A share costs a node OVERHEAD_S, and others wait for its end.
SHARE_S = 1.0                       # work in a share: 3 % overhead
MIN_SHARE_TEXTS, MIN_SHARE_S = 8, 0.1


def row_name(row: Json) -> str:
    """Return the canonical name in a row of /api/tags or /api/ps."""
    return canonical(row["name"])


def instant_s(value: object) -> float:
    """Return seconds since 1970 for a time in a node's row (RFC 3339, in any zone), 0 for anything else."""
    try:
        return datetime.datetime.fromisoformat(value).timestamp() if isinstance(value, str) else 0.0
    except (ValueError, OverflowError):
        return 0.0


def row_bytes(row: Json, key: str) -> float:
    """Return a size in a row of /api/tags or /api/ps, 0 if it has none."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1e18 else 0.0


def embeds_only(row: Json) -> bool:
    """Tell whether a row of /api/tags is of a model that does not answer with text, as far as it tells."""
    capabilities = row.get("capabilities")
    return "completion" not in capabilities if isinstance(capabilities, list) else "embed" in row_name(row)


def cpu_share(row: Json) -> float:
    """Return the share 0..1 of a model in a row of /api/ps that is not on a card; 0 where the row does not tell."""
    size, vram = row_bytes(row, "size"), row.get("size_vram")
    if not size or not isinstance(vram, (int, float)) or vram < 0:
        return 0.0
    return 1.0 - min(1.0, row_bytes(row, "size_vram") / size)


def row_vram_bytes(row: Json) -> float:
    """Return what a model in a row of /api/ps takes on the card; all of it where the row does not tell."""
    return row_bytes(row, "size_vram") or row_bytes(row, "size")


def context_of(row: Json | None) -> int:
    """Return `context_length` of a row of /api/ps, or of `details` in a row of /api/tags; 0 if it is missing."""
    value = row.get("context_length") if isinstance(row, dict) else None
    return value if type(value) is int and 0 < value < 2**40 else 0


def is_remote(row: Json) -> bool:
    """Tell whether a model in a row of /api/tags is run by another server, whatever it is called here."""
    return bool(row.get("remote_model") or row.get("remote_host"))


def window_of(node: Node, model: str | None) -> int:
    """Return the tokens of context that a model is loaded with on a node, 0 if that is not known."""
    return next((context_of(row) for row in node.running if row_name(row) == model), 0)


def version_of(node: Node, model: str | None) -> float:
    """Return when the model that a node has was last changed, in seconds since 1970."""
    return instant_s(node.rows[model].get("modified_at")) if model in node.rows else 0.0


def digest_of(node: Node, model: str | None) -> str:
    """Return the digest of a model on a node; "" if the node has not the model, or did not tell."""
    return str(node.rows[model].get("digest") or "") if model in node.rows else ""


class Made(NamedTuple):
    """What a model is made from, as its Modelfile tells."""

    blob: str = ""                  # with its weights; "" = untold
    num_ctx: int = 0                # of a PARAMETER: each request asks for that; 0 = none


BLOB = re.compile(r"^FROM .*blobs[/\\](sha256-[0-9a-f]{64})\s*$", re.M)
OWN_CONTEXT = re.compile(r"^PARAMETER num_ctx (\d{1,9})\s*$", re.M)


def made_from(modelfile: object) -> Made:
    """Return what the text of a Modelfile tells."""
    text = modelfile if isinstance(modelfile, str) else ""
    blob, num_ctx = BLOB.search(text), OWN_CONTEXT.search(text)
    return Made(blob[1] if blob else "", int(num_ctx[1]) if num_ctx else 0)


def weights_of(node: Node, model: str) -> str:
    """Return what is equal for models of one node that are known to be made from the same weights."""
    digest = digest_of(node, model)
    return node.made.get((model, digest), Made()).blob or digest or model


def make_of(row: Json) -> tuple[str, ...]:
    """Return what rows of models from the same weights have in common, besides the size; () if the row lacks it."""
    details = row.get("details")
    if not isinstance(details, dict) or not details.get("parameter_size"):
        return ()
    return tuple(str(details.get(key)) for key in ("family", "parameter_size", "quantization_level", "format"))


def possible_twins(node: Node) -> list[str]:
    """Return the models that may have the weights of another one of their node, and were not asked for theirs yet."""
    alike: collections.defaultdict[tuple[str, ...], list[tuple[float, str]]] = collections.defaultdict(list)
    twins: dict[str, None] = {}
    for model, row in node.rows.items():
        if kind := make_of(row):
            alike[kind].append((row_bytes(row, "size"), model))
    for sized in alike.values():
        for (size, one), (larger, two) in itertools.pairwise(sorted(sized)):
            if larger - size <= MIB and digest_of(node, one) != digest_of(node, two):
                twins.update({one: None, two: None})
    return [model for model in twins if (model, digest_of(node, model)) not in node.made]


def share_runners(node: Node) -> None:
    """Give the models of a node that are made from the same weights one runner, and only those.

    A runner at work stays as it is until it is idle when its node's models are listed again.
    """
    sharing: dict[str, list[str]] = {}
    taken: set[Runner] = set()
    for model in node.rows:
        sharing.setdefault(weights_of(node, model), []).append(model)
    for models in sharing.values():
        free = dict.fromkeys(runner for model in models if (runner := node.runners[model]) not in taken)
        kept = max(free, key=lambda runner: (len(runner.leases), runner.speeds.samples, runner.used_s),
                   default=None)
        for model in models:
            known = node.runners[model]
            if kept is None:
                del node.runners[model]
                kept = node.runner_for(model)
                kept.disk_bytes = known.disk_bytes
            elif known in taken or not known.leases:
                if kept.ready_s is None and known not in taken:
                    kept.ready_s, kept.options, kept.context = known.ready_s, known.options, known.context
                node.runners[model] = kept
        assert kept is not None     # no list of `sharing` is empty
        taken.update([kept], free)
    for runner in each_runner(node):
        runner.models = [model for model, other in node.runners.items() if other is runner]
        runner.model = runner.model if runner.model in runner.models else runner.models[0]


def each_runner(node: Node) -> list[Runner]:
    """Return the runners of a node, each once however many names it has."""
    return list(dict.fromkeys(node.runners.values()))


DIFFERENCES = frozenset(("length", "feature", "route"))     # between nodes, and no fault of any
ALL_FAILED = 502, "every node that could answer has failed"


def emptiest(nodes: list[Node]) -> list[Node]:
    """Return nodes in the order in which they get a new model: by the GB on their disk; among equals the fastest."""
    def fullness(node: Node) -> tuple[int, float]:
        held_bytes = sum(row_bytes(row, "size") for row in node.rows.values())
        return round(held_bytes / 1e9), node.size_factor / node.speed

    return sorted(nodes, key=fullness)


def server_of(settings: NodeSettings) -> tuple[str, str]:
    """Return what tells one server from another: where it is reached, and which of a proxy's it is."""
    return settings.url, settings.host_header


def matched(lines: list[NodeSettings], nodes: list[Node]) -> dict[str, Node]:
    """Return {line's name: the node of the same server}; of two nodes of one server, first the one with that name."""
    matches, free = {}, {node: server_of(node.settings) for node in nodes}
    for names_count in (True, False):
        for line in lines:
            node = next((node for node, server in free.items() if server == server_of(line)
                         and (node.name == line.name or not names_count)), None)
            if node is not None and line.name not in matches:
                matches[line.name] = node
                del free[node]
    return matches


def can_wake(node: Node, now: float) -> bool:
    """Tell whether a node may be asleep, and would come up when it is called."""
    return bool(node.settings.mac) and not (node.up or node.draining or node.sleep.is_in_vain(now))


def is_at_hand(node: Node, now: float) -> bool:
    """Tell whether a node can be expected to serve, perhaps after it was woken."""
    return node.is_alive(now) or can_wake(node, now)


def untried(nodes: Iterable[Node], ticket: Ticket) -> list[Node]:
    """Return the nodes that can be reached, busy or failing perhaps, and that a ticket may use."""
    return [node for node in nodes if node.up and not node.draining and ticket.may_use(node)]


def share_sizes(count: int, rates: list[float]) -> list[int]:
    """Return how many of `count` texts are in each share, for nodes that embed `rates` texts a second.

    Each node's proportion is cut into shares of about SHARE_S, and these follow each other as they would be finished. A
    node too slow for a share worth its while gets none.
    """
    rates = sorted(rates, reverse=True)
    while len(rates) > 1 and rates[-1] * count < max(MIN_SHARE_TEXTS, rates[-1] * MIN_SHARE_S) * sum(rates):
        rates.pop()
    shares = []
    for rate in rates:
        texts = count * rate / sum(rates)
        pieces = max(1, min(round(texts / (rate * SHARE_S)), int(texts / MIN_SHARE_TEXTS)))
        shares += [((number + 1) / pieces, texts / pieces) for number in range(pieces)]
    shares.sort(key=lambda share: share[0])
    ends = [round(end) for end in itertools.accumulate(texts for _, texts in shares)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


class Cluster:
    """The nodes, and what is known of models wherever they are."""

    def __init__(self, patience_s: float = 240.0) -> None:
        self.patience_s = patience_s            # how long requests may wait for a node that has disappeared
        self.nodes: dict[str, Node] = {}        # by name, in the order of hosts.txt
        self.leaving: list[Node] = []           # dropped nodes that still work
        self.orders: dict[tuple[str, str], bool] = {}   # by server: drained? Only where its line says otherwise
        self.kept: list[Json] = []              # what was learned of nodes, also of those gone; the last seen last
        self.holders: dict[str | None, list[Runner]] = {}       # of each model, same order; kept by `reindex`
        self.remote: set[str] = set()           # models that another server runs
        self.estimates = Estimates()
        self.changes = Changes()

    # Which nodes?

    def configure(self, settings: list[NodeSettings], seq: int = 0) -> tuple[list[Node], list[Node]]:
        """Take over the settings of all nodes: a server that stays keeps its node, and all that is known of it.

        Other nodes are dropped; requests that run there end there. A server that comes back meanwhile still has them:
        its slots are taken. `seq`: that of the next ticket. Returns (added, dropped) nodes.
        """
        old = list(self.nodes.values())
        if settings and not any(line.primary for line in settings):
            settings = [settings[0]._replace(primary=True), *settings[1:]]
        known = matched(settings, [*old, *self.leaving])
        self.nodes = {}
        for line in settings:
            node = self.nodes[line.name] = known.get(line.name) or recall(self.kept, Node(line, self.changes))
            if self.orders.get(server_of(line)) is line.drain:  # the line says it now, and is to be obeyed from now on
                del self.orders[server_of(line)]
            node.drain(self.orders.get(server_of(line), line.drain), seq)
            node.configure(line)
        dropped = [node for node in old if self.nodes.get(node.name) is not node]
        self.keep(dropped)
        for node in dropped:
            node.draining = True
            if node.measuring is not None:
                node.measuring.give_way(node.measuring.sent_s)
        self.leaving = [node for node in (*self.leaving, *dropped) if self.nodes.get(node.name) is not node]
        self.reindex()
        return [node for node in self.nodes.values() if node not in old], dropped

    def drain(self, node: Node, draining: bool, seq: int) -> None:
        """Give a node no new work, or again some. What runs there goes on; what waits may go there if nowhere else.

        The order holds until `drain` in the node's line says the same. `seq`: that of the next ticket.
        """
        node.drain(draining, seq)
        self.orders.pop(server_of(node.settings), None)
        if draining is not node.settings.drain:
            self.orders[server_of(node.settings)] = draining
        self.changes.note_all()

    def take_tags(self, node: Node, rows: list[Json], asked_s: float = math.inf) -> None:
        """Take over a node's /api/tags."""
        if node.take_tags(rows, asked_s):
            self.reindex()

    def know_made(self, node: Node, made: dict[tuple[str, str], Made]) -> None:
        """Take over what models of a node are made from: {(model, digest): Made}."""
        node.know_made(made)
        self.reindex()

    def lacks(self, node: Node, runner: Runner, model: str | None) -> None:
        """Note that a node has not a model that its index names."""
        if model in node.rows:
            del node.rows[model]
        if not runner.on_disk:
            runner.assume_unloaded()
        self.reindex()

    def reindex(self) -> None:
        """Rebuild the table of who has which model. Cloud models run on no node's own card: they are not in it."""
        self.changes.note_all()
        self.holders, remote = {}, set()
        for node in self.nodes.values():
            for model, row in node.rows.items():
                if is_remote(row):
                    remote.add(model)
                elif not is_cloud(model):
                    self.holders.setdefault(model, []).append(node.runners[model])
        self.remote = remote - self.holders.keys()

    def is_in_cloud(self, model: str | None) -> bool:
        """Tell whether a model is run by ollama.com or another server, and not by a card of a node's own."""
        return model is not None and (is_cloud(model) or model in self.remote)

    def is_there(self, model: str) -> bool:
        """Tell whether a model can be asked for by its own canonical name; cloud models need not be listed."""
        return model in self.holders or self.is_in_cloud(model)

    def in_flight(self) -> int:
        """Return how many requests run, on dropped nodes, too."""
        return sum(len(node.leases) for node in (*self.nodes.values(), *self.leaving))

    # For a model.

    def nodes_for(self, model: str | None) -> list[Node]:
        """Return the nodes that have a model; all of them if none is known to."""
        return [runner.node for runner in self.holders.get(model, ())] or list(self.nodes.values())

    def count_with(self, model: str | None, digest: str) -> int:
        """Return how many nodes have a version of a model; `digest`: not ""."""
        return sum(digest_of(node, model) == digest for node in self.nodes.values())

    def servers(self, model: str | None, now: float) -> list[Runner]:
        """Return the runners that can serve a model now; if there are none, those that it waits for."""
        up = [runner for runner in self.holders.get(model, ()) if runner.node.up]
        return [runner for runner in up if runner.node.is_alive(now) and not runner.node.suspect
                and runner.breaker.state(now) != "open"] or up

    def is_hopeless(self, ticket: Ticket, now: float) -> bool:
        """Tell whether no node is left that could serve a ticket, now or when it has come back."""
        nodes = self.nodes_for(ticket.spec.model)
        return not untried(nodes, ticket) and not any(
            ticket.may_use(node) and self.is_awaited(node, now) for node in nodes)

    def is_awaited(self, node: Node, now: float) -> bool:
        """Tell whether a node that cannot be reached is waited for: it could be, less than `patience_s` ago, or it is
        asleep."""
        return not node.up and not node.draining and (
            not node.probed or now - node.lost_s < self.patience_s or can_wake(node, now))

    def is_asked_for(self, runner: Runner, now: float) -> bool:
        """Tell whether somebody has lately asked for a model, of whichever node."""
        return any(now - other.used_s < LATELY_S for model in runner.models for other in self.holders.get(model, ()))

    def is_unsure(self, node: Node, now: float) -> bool:
        """Tell whether a model is asked for of which no answer of a node has lately said how fast it is there."""
        return any(not runner.speeds.is_confirmed(now) and self.is_asked_for(runner, now)
                   for runner in loaded_runners(node))

    # For what takes no slot.

    def node_unqueued(self, spec: RequestSpec, tried: set[str], now: float) -> tuple[Node, str]:
        """Return (node, why it) for a request that only one suitable node need answer. Raises Refusal.

        Of several nodes with the model the one with its newest version answers, so that repeated questions agree.
        """
        up = [node for node in self.nodes.values() if node.up and not node.draining and node.name not in tried]
        if not up:
            if tried:
                raise Refusal(*ALL_FAILED)
            raise Refusal(503, "no node is up", retry_after_s=1.0)
        up = [node for node in up if node.breaker.allows(now)] or up
        holders = [node for node in up if spec.model in node.rows]
        if spec.where is Where.PRIMARY:
            node = self.primary_for(spec, holders, now)
            if node.name in tried:
                raise Refusal(*ALL_FAILED)
            return node, "primary node" if node.settings.primary else "has the model"
        if holders:
            newest = max(version_of(node, spec.model) for node in holders)
            holders = [node for node in holders if version_of(node, spec.model) == newest]
        node = min(holders or up, key=lambda node: (not node.settings.primary, len(node.leases) * (not holders)))
        return node, "has the model" if holders else "any node"

    def primary_for(self, spec: RequestSpec, holders: list[Node], now: float) -> Node:
        """Return the node that a request is pinned to: the primary if it or nobody has its model. Raises Refusal."""
        primary = next(node for node in self.nodes.values() if node.settings.primary)
        is_account = is_cloud(spec.model or "")     # what only an account can have is not listed before it is pulled
        if primary.is_alive(now) and (primary in holders or not holders or is_account):
            return primary
        if holders and not is_account:
            return holders[0]
        raise Refusal(503, f"{primary.name}, the primary node, is {state_in_words(primary, now)}", retry_after_s=1.0)

    def nodes_to_change(self, spec: RequestSpec, replicas: int, now: float) -> tuple[list[Node], list[Node]]:
        """Return (nodes on which a model is to be changed, in the order of hosts.txt; spares for those that cannot).

        All that are up and have it, even hung ones: a failure there must be reported. A copy, or another model from
        it, is made where the newest version is. A model that nobody has is pulled by `replicas` nodes; any other change
        of it is for one node to refuse. Raises Refusal.
        """
        up = [node for node in self.nodes.values() if node.up]
        if not up:
            raise Refusal(503, "no node is up", retry_after_s=1.0)
        model = spec.source if spec.change in ("copy", "create") else spec.model
        holders = [node for node in up if model in node.rows]
        if spec.change in ("copy", "create") and holders and spec.source and not self.is_in_cloud(model):
            newest = max(holders, key=lambda node: version_of(node, model))
            return [node for node in holders if digest_of(node, model) == digest_of(newest, model)], []
        if spec.change == "create" or spec.change == "pull" and is_cloud(model or ""):
            return [self.primary_for(spec, holders, now)], []
        if spec.change == "pull" and not holders:
            ranked = emptiest([node for node in up if not node.draining] or up)
            return [node for node in up if node in ranked[:replicas]], ranked[replicas:]
        return holders or [min(up, key=lambda node: not node.settings.primary)], []

    def split(self, spec: RequestSpec, now: float) -> tuple[list[int], str]:
        """Return (sizes, digest): the texts in each share of a batch, and the model's version that most nodes have."""
        versions: dict[str, list[Runner]] = {}
        for runner in self.holders.get(spec.model, ()):
            if runner.node.is_alive(now):
                versions.setdefault(digest_of(runner.node, spec.model), []).append(runner)
        versions.pop("", None)      # what does not tell its version is mixed with nothing
        chosen = max(versions.values(), key=len, default=[])
        if not chosen:
            return [], ""
        assert spec.batch is not None
        count = len(spec.batch["input"])
        tokens = max(1.0, self.estimates.demand(spec).prompt_tokens / count)
        sizes = share_sizes(count, [runner.node.speed / (tokens * runner.prefill_s() + runner.input_s())
                                    for runner in chosen])
        return sizes, digest_of(chosen[0].node, spec.model)

    # What is kept.

    def learned(self) -> Json:
        """Return all that is worth keeping, as plain values."""
        self.keep(self.nodes.values())
        lengths = [(model, learned_of_lengths(known)) for model, known in self.estimates.lengths.items()
                   if known.samples or known.prompts.samples]
        orders = [{"url": url, "host": host, "draining": draining} for (url, host), draining in self.orders.items()]
        return {"nodes": self.kept, "lengths": dict(lengths[-MOST_KEPT:]), "orders": orders[-MOST_KEPT:]}

    def keep(self, nodes: Iterable[Node]) -> None:
        """Keep what was learned of nodes, in place of what was kept of them before."""
        for node in nodes:
            learned = learned_of_node(node)
            if learned:
                server = learned["name"], learned["url"]
                self.kept = [entry for entry in self.kept if (entry["name"], entry["url"]) != server]
                self.kept.append(learned)
        del self.kept[:-MOST_KEPT]

    def remember(self, learned: Json) -> None:
        """Take over what an earlier run has learned, as `learned` returned it. Before `configure`."""
        self.kept = [entry for entry in map(read_node, learned["nodes"][-MOST_KEPT:]) if entry]
        for model, entry in itertools.islice(learned["lengths"].items(), MOST_KEPT):
            lengths = read_lengths(entry)
            if lengths.samples or lengths.prompts.samples:
                self.estimates.lengths[model] = lengths
        self.orders = read_orders(learned.get("orders"))


# -----------------------------------------------------------------------------
# Tickets and leases: where does a request stand?
# -----------------------------------------------------------------------------

class TicketState(enum.Enum):
    """Where a ticket stands. These changes are legal, and no other:

    WAITING -> LEASED (a policy gave it a node), REFUSED, LEFT
    LEASED  -> IDLE (its last lease has ended), LEFT
    IDLE    -> WAITING (its first or its next attempt), LEASED (without a slot), LEFT
    REFUSED -> LEFT
    """

    IDLE = enum.auto()              # neither in the waiting room nor on a node
    WAITING = enum.auto()
    LEASED = enum.auto()
    REFUSED = enum.auto()           # it will never run: `Ticket.refusal` says why
    LEFT = enum.auto()              # its client has got its answer, or has gone


IDLE, WAITING, LEASED, REFUSED, LEFT = TicketState      # Python 3.11 takes long to look a member up in its class


Held = tuple[tuple[str, float], ...]        # (node, seconds) for each slot that a request has had


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's place in the queue, kept over failed attempts. It has one lease at a time, or two that race."""

    id: str
    spec: RequestSpec
    arrived_s: float
    key_s: float
    seq: int
    since_s: float = 0.0            # when it began to wait, this time
    cost_s: float = 0.0             # how long it will keep the whole cluster busy
    demand: Demand | None = None    # what it is expected to cost; None for what does not queue
    pace: Pace | None = None        # of its conversation; None = it is known to belong to none
    state: TicketState = IDLE
    begun: bool = False             # its client has a part of the answer
    version: str | None = ""        # digest of its model that it is pinned to; "" = any, None = one that nobody has
    lease: Lease | None = None      # while it runs
    rival: Lease | None = None      # a second one that races the first
    race: Callable[[Lease], None] | None = None     # tells the I/O side to begin a race
    attempts: int = 0               # leases whose node has got the request
    held: Held = ()                 # the slots that it had
    tried: set[str] = field(default_factory=set)    # nodes that failed it
    gone: set[str] = field(default_factory=set)     # of `tried`: those whose connection failed, and which may come back
    blamed: list[Breaker] = field(default_factory=list)     # which counted its failures
    differed: bool = False          # a node with another window or version was tried in place of one that refused it
    held_until_s: float | None = None           # until when it may be held back for a better node
    peer: PeerGateway | None = None     # the other gateway where it waits: here it only keeps its place
    offered: tuple[Runner, float] | None = None     # where a slot was left to it last, and since when
    refusal: Answer | None = None   # why it will never run
    waiter: asyncio.Future[None] | None = None      # future that the I/O side awaits

    def may_use(self, node: Node) -> bool:
        """Tell whether a node has not failed it and has the version of the model that it is pinned to."""
        return node.name not in self.tried and self.version in ("", digest_of(node, self.spec.model))

    def take(self, lease: Lease) -> None:
        """Note a lease: its only one, or one that races the first."""
        self.state = LEASED
        if self.lease is None:
            self.lease = lease
        else:
            self.rival = lease

    def give_back(self, lease: Lease, now: float) -> None:
        """Note that a lease has ended; a rival goes on alone."""
        if lease.runner is not None:
            self.held += ((lease.node.name, now - lease.sent_s),)
        if self.lease is lease:
            self.lease = self.rival
        self.rival = None
        if self.lease is None and self.state is LEASED:
            self.state = IDLE

    def pin_version_of(self, node: Node) -> None:
        """Let a ticket whose stream has begun run only where its model is known to be the same as on `node`."""
        self.begun = True
        self.version = digest_of(node, self.spec.model) or None

    def exclude_alike(self, kind: str, failed: Node, others: Iterable[Node]) -> None:
        """Keep it from the nodes that would refuse it as `failed` did. After a 400 one more is tried at most.

        `kind`: length, feature or route; see failover_kind.
        """
        for other in others:
            if kind == "length":
                here, there = window_of(failed, self.spec.model), window_of(other, self.spec.model)
                alike = 0 < there <= here
            else:
                alike = other.version == failed.version
            if alike or self.differed:
                self.tried.add(other.name)
        self.differed = self.differed or kind != "route"

    def record_failure(self, breaker: Breaker, now: float) -> None:
        """Let a breaker count a failure, until it turns out to be the request's own."""
        if breaker.fail(now):
            self.blamed.append(breaker)

    def forgive(self) -> None:
        """Take its failures back from the breakers: all nodes have failed this request, so the fault is its own."""
        for breaker in self.blamed:
            breaker.forgive()
        self.blamed.clear()


Entry = tuple[float, int, Ticket]   # in a heap: (key_s, seq, ticket)


@dataclass(slots=True, eq=False)
class Lease:
    """The right to run one request on one node, from `give_lease` to `end`, which is called exactly once."""

    ticket: Ticket
    node: Node
    runner: Runner | None           # None: takes no slot
    sent_s: float
    reason: str = ""
    position: int = 0               # how many of its model ran there, itself included
    start_progress_s: float = 0.0   # the runner's progress when it was sent
    start_shared_s: float = 0.0
    start_crowd_s: float = 0.0
    ready_s: float = 0.0            # when its model is there
    loads: bool = False             # its model was not
    output_tokens: float = 0.0      # expected
    prompt_tokens: float = 0.0
    new_tokens: float = 0.0         # what the prefix cache does not hold
    cached_share: float = 0.0       # of its prompt, that a slot is believed to have had
    seen_share: float = 0.0         # of its prompt, that some earlier prompt began with
    stall_tokens: float = 0.0       # prompts of others, prefilled on its runner since it was sent
    crowd_tokens: float = 0.0       # those of them that may have run beside its own prefill
    predicted_end_s: float = 0.0
    quiet_s: float = 0.0            # silence that is no reason for doubt
    race_s: float = 0.0             # silence before its first byte that is no reason for a race
    first_s: float | None = None
    first_progress_s: float = 0.0   # the runner's progress then
    predecessor_left_progress_s: float | None = None    # and when the first one sent before it left, if earlier
    left_s: tuple[float, ...] = ()  # when those sent before it left, one after the other
    order_unknown: bool = False     # another was sent at the same time: nobody knows which the node took first
    has_list_input: bool = False    # it, or one sent before it that still ran, embeds a list: more slots than one
    overlapping: int = 1            # how many ran at its first byte, itself included, if the node keeps their order
    heard_s: float = 0.0
    lines: int = 0
    watched_s: float = 0.0          # up to when, and to which line, its progress has been judged
    watched_lines: int = 0
    watched_stall_tokens: float = 0.0
    trials: Sequence[Breaker] = ()  # half-open breakers that this lease is the trial of
    charged: bool = False           # its client was charged for what it has really cost
    released: bool = False
    measures: bool = False          # the gateway's own request: it takes no slot from others
    elsewhere: bool = False         # another process of the gateway runs it, or a peer: see "Upgrade" and "Peers"
    abandon: Callable[[Failure], object] | None = None      # tells the I/O side that another node does this
    lost_to: Failure | None = None  # set if a rival won before this lease had a connection to abort
    held_up: Callable[[], bool] | None = None   # tells whether the answer waits for its client to read

    @property
    def is_held_up(self) -> bool:
        """Tell whether the answer waits for its client to read."""
        return self.held_up is not None and self.held_up()

    @property
    def fresh(self) -> bool:
        """Tell whether no earlier prompt began like its own: the cache can hardly have held any of it."""
        return self.seen_share <= FRESH_SHARE

    @property
    def slot(self) -> Runner:
        """Return the runner of a lease that takes a slot."""
        assert self.runner is not None
        return self.runner

    def expect(self, prediction: Prediction, now: float) -> None:
        """Note when it should end, and for how long it need not show anything."""
        runner, demand = self.slot, self.ticket.demand
        assert demand is not None   # it has waited for a slot
        self.ready_s, self.loads = now + prediction.ready_s, prediction.loads
        self.prompt_tokens, self.output_tokens = demand.prompt_tokens, demand.output_tokens
        self.new_tokens = prediction.new_tokens
        work_s = prediction.prefill_s + prediction.decode_s
        self.predicted_end_s = now + prediction.start_s + work_s * prediction.slow
        self.race_s, self.quiet_s = overdue_s(prediction), quiet_s(runner, prediction)
        self.start_progress_s, self.start_shared_s = runner.progress_s, runner.shared_s
        self.start_crowd_s = runner.crowd_s

    def heard(self, lines: int, now: float) -> None:
        """Note bytes of the answer; `lines` streamed lines were among them."""
        self.heard_s = self.node.heard_s = now
        if self.node.suspect:
            self.node.trust(now)
        if self.first_s is None:
            self.first_byte(now)
        self.lines += lines

    def watch_from(self, now: float) -> None:
        """Judge its progress by what comes from now on."""
        self.watched_s, self.watched_lines, self.watched_stall_tokens = now, self.lines, self.stall_tokens

    def stops_long(self, now: float) -> bool:
        """Tell whether its prompt, if it is still evaluated, has stopped the others for longer than it should."""
        return now - self.sent_s > self.slot.may_stop_s(self.new_tokens)

    def first_byte(self, now: float) -> None:
        """Note the first byte: of a stream, the first token. Streams that overlap prove slots."""
        self.first_s = now
        if self.runner is None:
            return
        runner, node, spec = self.runner, self.node, self.ticket.spec
        node.end_load(self, now)
        node.advance(now)
        if self.position > runner.slots.count:
            stall(self)
        if self.stops_long(now):
            runner.watch_from(now)
        self.first_progress_s, self.overlapping = runner.progress_s, certainly_beside(self)
        if runner.ready_s is not None:
            runner.ready_s = min(runner.ready_s, now)
            options = options_there(node, spec)
            is_known = not (self.elsewhere or runner.context and dict(options).get("num_ctx"))
            if runner.options is None and is_known:
                runner.options = options    # else it may have been loaded so by default
        if spec.stream:
            runner.confirm_slots(sum(1 for other in runner.leases if other.first_s is not None
                                     and other.ticket.spec.stream and not other.is_held_up), now)

    def worked(self, now: float) -> None:
        """Note that the node has answered. Before `end`."""
        if self.trials:
            self.node.changes.note_all()
        self.node.worked(now)
        if self.runner is not None:
            self.runner.breaker.succeed()

    def is_in_the_way_of(self, runner: Runner | None) -> bool:
        """Tell whether the gateway's own request ends for somebody's: a measurement always, a load only for another
        model that must be loaded."""
        return not self.loads or runner is not None and runner is not self.runner and runner.ready_s is None

    def give_way(self, now: float) -> None:
        """End the gateway's own request: somebody's request goes to its node."""
        self.end(now)
        if self.abandon is not None:
            self.abandon(Failure("lost", "gives way"))

    def end(self, now: float) -> None:
        """End it, exactly once."""
        if self.released:
            raise AssertionError(f"lease of {self.ticket.id} on {self.node.name} ended twice")
        self.released = True
        self.ticket.give_back(self, now)
        self.node.end(self, now)


def give_lease(ticket: Ticket, node: Node, runner: Runner | None, now: float, reason: str,
               prediction: Prediction | None = None) -> Lease:
    """Give a ticket its lease, and note what the node will now be doing.

    `runner`: None takes no slot. `prediction`: None is made here.
    """
    lease = Lease(ticket, node, runner, now, reason)
    lease.heard_s = lease.watched_s = now
    if node.measuring is not None and node.measuring.is_in_the_way_of(runner):
        node.measuring.give_way(now)
    node.advance(now)
    if runner is not None:
        if prediction is None:
            assert ticket.demand is not None        # it has waited for a slot
            prediction = NodeSnapshot(node, now).offer(runner, now).predict(ticket.demand, now)
        lease.expect(prediction, now)
        runner.begin(lease, now)
    node.begin(lease, now)
    ticket.take(lease)
    return lease


def own_lease(runner: Runner, ticket: Ticket, now: float, reason: str) -> Lease:
    """Give the gateway's own request a lease on an idle node: it is seen, takes no slot, and gives way to others."""
    node = runner.node
    lease = Lease(ticket, node, runner, now, reason, heard_s=now, watched_s=now, measures=True)
    node.advance(now)
    node.heard_s, node.measuring = now, lease
    node.leases.append(lease)
    return lease


def lease_for_loading(runner: Runner, ticket: Ticket, now: float) -> Lease:
    """Return the lease of a request for a model in memory.

    Whoever asks for the model meanwhile waits for its load, as in Ollama itself.
    """
    node, spec, lease = runner.node, ticket.spec, own_lease(runner, ticket, now, "the gateway loads a model")
    if not is_loaded_for(runner, spec):
        lease.loads, lease.ready_s = True, now + runner.load_s()
        runner.assume_loaded(options_there(node, spec), lease.ready_s)
        node.loading.append(lease)
        node.changes.note_all()
    if spec.keep_alive_s is not None:
        runner.keep_alive_s = spec.keep_alive_s
    return lease


def end_loading(lease: Lease, load_s: float | None, now: float) -> None:
    """End the gateway's own load; `load_s`: seconds that it took, as the node told, or None if it has failed."""
    runner = lease.slot
    if load_s is not None and runner.ready_s is not None:
        runner.ready_s = min(runner.ready_s, now)
    if load_s is not None and load_s > 1.0:
        runner.learn_load(load_s)
    if load_s is None and lease.loads and not runner.leases:
        runner.assume_unloaded()
    lease.node.changes.note_all()
    if not lease.released:
        lease.end(now)


def lease_elsewhere(runner: Runner, ticket: Ticket, now: float, loaded_s: float | None = None,
                    measures: bool = False) -> Lease:
    """Return the lease of a request that another process of the gateway, or a peer, runs: here it only takes its slot,
    or none if it `measures`; its node is not measured meanwhile.

    `loaded_s`: when its model will be there, if it has it loaded; else None.
    """
    node = runner.node
    where = "in another process of this gateway" if ticket.peer is None else f"at {ticket.peer.name}"
    lease = Lease(ticket, node, runner, now, f"runs {where}", heard_s=now, watched_s=now, measures=measures,
                  elsewhere=True)
    if loaded_s is not None and runner.ready_s is None:
        lease.loads, lease.ready_s = True, loaded_s
    if node.measuring is not None and not measures:
        node.measuring.give_way(now)
    node.advance(now)
    lease.start_progress_s, lease.start_shared_s = runner.progress_s, runner.shared_s
    if not measures:
        runner.begin(lease, now)
    if lease.loads:
        runner.options = None       # nobody here knows them
    if not node.leases:
        node.heard_s = now
    node.leases.append(lease)
    return lease


# -----------------------------------------------------------------------------
# Nodes: what is known of each?
#
# A node's state is changed by its own methods and by those of its runners and leases. Whatever they change that could
# let a waiting ticket run, they note in `Changes`, which the policy reads at the next dispatch.
# -----------------------------------------------------------------------------

CHECK_PAUSE_S, LAST_CHECK_PAUSE_S = 5.0, 300.0  # between two measurements of a node, doubled until it answers somebody
OVERHEADS_KEPT = 16                 # samples of it; the lower quarter is what a request takes that need not wait
LEAST_COUNT_LIMIT = 3               # Ollama keeps at most three models loaded for each card, and three on a CPU


class MemoryEstimate:
    """What fits into a node's memory, as far as its evictions have shown."""

    def __init__(self) -> None:
        self.seen_bytes = 0.0       # most that was resident at once
        self.limit_bytes = math.inf         # an eviction was seen when this much was asked for
        self.loaded_seen = 0        # most models that were resident at once
        self.most_loaded = math.inf         # models: an eviction was seen that left so many (OLLAMA_MAX_LOADED_MODELS)

    def is_overfilled(self, held_bytes: float, wanted_bytes: float, count: int) -> bool:
        """Tell whether to load `wanted_bytes` would evict one of `count` other models that take `held_bytes`."""
        total = held_bytes + wanted_bytes
        return (held_bytes > 0 and total > self.seen_bytes and total >= self.limit_bytes or count >= self.most_loaded)

    def learn(self, before: dict[str, Json], after: dict[str, Json], loading_bytes: float) -> None:
        """Learn from two looks at /api/ps, {model: row}; a model that still loads is not listed, but has its room.

        What left while another came had to make room for it, so the two do not fit. What leaves alone has expired.
        Where three are left, and never were more, the node may have reached its count of models: that says nothing of
        its memory.
        """
        held_bytes, count = sum(map(row_vram_bytes, after.values())), len(after)
        self.seen_bytes, self.loaded_seen = max(self.seen_bytes, held_bytes), max(self.loaded_seen, count)
        if self.most_loaded < self.loaded_seen:
            self.most_loaded = math.inf
        gone = [row_vram_bytes(row) for model, row in before.items() if model not in after]
        if not gone or not any(model not in before for model in after):
            return
        if count >= max(LEAST_COUNT_LIMIT, self.loaded_seen):
            self.most_loaded = float(count)
        else:
            self.limit_bytes = min(self.limit_bytes, held_bytes + loading_bytes + max(gone))


class Breaker:
    """Keep work away from what fails: closed, then open for growing pauses, then half-open for one trial."""

    FIRST_PAUSE_S, LAST_PAUSE_S = 5.0, 60.0

    def __init__(self, threshold: int = 2) -> None:
        self.threshold = threshold  # failures in a row that open it
        self.failures = 0
        self.until_s = 0.0
        self.trial = False          # half-open, and its one trial is running

    def state(self, now: float) -> str:
        """Return closed, open or half-open."""
        if self.failures < self.threshold:
            return "closed"
        return "open" if now < self.until_s else "half-open"

    def allows(self, now: float) -> bool:
        """Tell whether one more request may be sent."""
        return self.failures < self.threshold or now >= self.until_s and not self.trial

    def begin(self) -> bool:
        """Note that a request is sent; tell whether it is the trial."""
        self.trial = self.failures >= self.threshold
        return self.trial

    def fail(self, now: float) -> bool:
        """Count a failure, and tell whether it was; from the threshold on the pause doubles each time.

        While it is open, what fails was sent before: all that a crash takes with it counts once.
        """
        if self.state(now) == "open":
            return False
        self.failures += 1
        self.trial = False
        if self.failures >= self.threshold:
            pause_s = self.FIRST_PAUSE_S * 2 ** min(self.failures - self.threshold, 10)
            self.until_s = now + min(pause_s, self.LAST_PAUSE_S)
        return True

    def forgive(self) -> None:
        """Take a failure back: it was the request's own, as every node failed it."""
        self.failures = max(0, self.failures - 1)

    def succeed(self) -> None:
        self.failures, self.trial = 0, False


class Wish:
    """A model that hosts.txt wants in a node's memory (load=): what became of loading it.

    The pause between two loads grows as long as none of them lasts. What the node cannot load, or only in place of
    another such model, is given up until the node or its line has changed.
    """

    FIRST_PAUSE_S, LAST_PAUSE_S = 60.0, 3600.0
    LASTED_S = 600.0                # a model that stayed for so long was not pushed out for want of room

    def __init__(self) -> None:
        self.loads = 0              # in a row, none of which lasted
        self.begun_s = self.retry_at_s = -math.inf      # of the last load; from then on it may be loaded again
        self.kept_s = -math.inf     # when the node was last asked to keep it
        self.unfinished = False     # the last load did not come to its end
        self.given_up = self.warned = False

    def begin(self, now: float) -> None:
        """Note that its load begins."""
        self.loads = 1 if now - self.begun_s > self.LASTED_S + self.LAST_PAUSE_S else self.loads + 1
        self.begun_s, self.kept_s, self.unfinished = now, now, True
        self.retry_at_s = now + min(self.FIRST_PAUSE_S * 2 ** min(self.loads - 1, 10), self.LAST_PAUSE_S)

    def stays(self, now: float) -> None:
        """Note that it is in memory: after a while its last load counts as one that lasted."""
        if now - self.begun_s > self.LASTED_S:
            self.loads = 0

    def gave_way(self) -> None:
        """Note that its load has ended for somebody's request: that is no fault of the model's."""
        self.loads, self.unfinished = self.loads - 1, False

    def restart(self) -> None:
        """Note that the node has gone: it is loaded at once when that comes back, unless its load was to blame."""
        if not self.unfinished:
            self.retry_at_s, self.given_up = -math.inf, False


class Wishes(dict[str, Wish]):
    """The Wish for each model of a node's load=, the most important first."""

    def configure(self, models: tuple[str, ...]) -> None:
        """Take over which models are wanted. Another list may fit where the last one did not."""
        if tuple(self) != models:
            self.clear()
            self.update((model, Wish()) for model in models)

    def restart(self) -> None:
        """Note that the node has gone."""
        for wish in self.values():
            wish.restart()


class Sleep:
    """How a node with mac= is woken up: its calls, and how long it usually takes to come up."""

    PAUSE_S = 60.0                  # between two magic packets
    USUAL_S, LEAST_S, MOST_S, GAIN = 60.0, 5.0, 150.0, 0.5  # first belief, bounds and EWMA gain of `usual_s`
    PATIENCE, REST_S = 3.0, 600.0   # times the usual: then it is not waited for; and not called again before so long

    def __init__(self) -> None:
        self.usual_s = self.USUAL_S
        self.called_s = -math.inf           # last packet
        self.begun_s: float | None = None   # first packet since it was up

    def waited_s(self, now: float) -> float:
        """Return for how long it has been waited for; infinite if it was not called or has been given up for long."""
        waited_s = math.inf if self.begun_s is None else now - self.begun_s
        return waited_s if waited_s < self.REST_S else math.inf

    def is_waking(self, now: float) -> bool:
        """Tell whether it was called and may still come up."""
        return self.waited_s(now) < self.PATIENCE * self.usual_s

    def is_in_vain(self, now: float) -> bool:
        """Tell whether it was lately called and did not come up."""
        return self.PATIENCE * self.usual_s <= self.waited_s(now) < math.inf

    def left_s(self, now: float) -> float:
        """Return when it would be up if it was called now, or has been, in seconds from now."""
        return max(0.0, self.usual_s - self.waited_s(now)) if self.is_waking(now) else self.usual_s

    def call(self, now: float) -> None:
        """Note that a magic packet is sent."""
        if self.waited_s(now) == math.inf:
            self.begun_s = now
        self.called_s = now

    def came_up(self, now: float) -> None:
        """Note that it is up; how long that took teaches only if it was called."""
        if self.is_waking(now):
            took_s = min(max(self.waited_s(now), self.LEAST_S), self.MOST_S)
            self.usual_s += self.GAIN * (took_s - self.usual_s)
        self.begun_s = None


class NodeError(NamedTuple):
    """What a node said, or did, when it failed last."""

    text: str
    status: int | None              # of its answer, if it was one
    at_s: float


class ErrorShare:
    """How many of a node's answers in the last minute were errors, counted in steps of STEP_S."""

    STEPS = 6
    LEAST = 3                       # answers from which on a node is said to answer nothing but errors

    def __init__(self) -> None:
        self.steps: collections.deque[list[int]] = collections.deque(maxlen=self.STEPS)     # [number, errors, answers]

    def add(self, error: bool, now: float) -> None:
        """Count an answer, or the lack of one."""
        number = int(now // STEP_S)
        if not self.steps or self.steps[-1][0] != number:
            self.steps.append([number, 0, 0])
        self.steps[-1][1] += error
        self.steps[-1][2] += 1

    def share(self, now: float) -> float | None:
        """Return the share of errors, None if there was no answer."""
        errors, answers = self.counts(now)
        return errors / answers if answers else None

    def counts(self, now: float) -> tuple[int, int]:
        recent = [step for step in self.steps if step[0] > now // STEP_S - self.STEPS]
        return sum(step[1] for step in recent), sum(step[2] for step in recent)

    def is_all(self, now: float) -> bool:
        """Tell whether there was nothing but errors."""
        errors, answers = self.counts(now)
        return errors == answers >= self.LEAST


class Changes:
    """What has happened on the nodes since a policy looked last: which models are worth another look."""

    def __init__(self) -> None:
        self.models: set[str | None] = set()            # for which a slot may have become free
        self.idle_models: set[str | None] = set()       # of nodes that have nothing to do
        self.everything = True
        self.count = 0              # of `note_all`: what was reckoned before is out of date

    def note_all(self) -> None:
        """Note that a node has changed, so that every prediction may be different."""
        self.everything = True
        self.count += 1

    def forget(self) -> None:
        """Begin anew: all waiting tickets that this concerns are being looked at."""
        self.models.clear()
        self.idle_models.clear()
        self.everything = False


@dataclass(slots=True, eq=False)
class Node:
    """One Ollama server."""

    settings: NodeSettings
    changes: Changes = field(default_factory=Changes)       # the cluster's
    name: str = field(init=False)
    rows: dict[str, Json] = field(default_factory=dict)     # models on its disk: {model: row of its /api/tags}
    made: dict[tuple[str, str], Made] = field(default_factory=dict)     # from what, by (model, digest)
    contexts: dict[str, int] = field(default_factory=dict)      # by model: PARAMETER num_ctx of those that have one
    runners: dict[str, Runner] = field(default_factory=dict)    # by model
    leases: list[Lease] = field(default_factory=list)       # of all models, also those without a slot
    busy: list[Runner] = field(default_factory=list)        # those with leases
    loading: list[Lease] = field(default_factory=list)      # those that wait for their model to load
    kept_snapshot: NodeSnapshot | None = None       # see `snapshot`

    probed: bool = False            # has answered, or failed to, at least once
    indexed: bool = False           # its models are known
    indexed_s: float = -math.inf    # and were asked for then
    up: bool = False
    draining: bool = False
    drained_seq: int = 0            # tickets with a lower `seq` waited before that
    calibrated: bool = False        # measured, or being measured, since it came up
    measuring: Lease | None = None      # among its leases: the gateway's own, which gives way to any other
    check_s: float = -math.inf      # from then on it may be measured
    check_pause_s: float = CHECK_PAUSE_S    # after the next measurement
    misses: int = 0                 # probes in a row without an answer
    answered_s: float = -math.inf   # when it answered one last
    lost_s: float = -math.inf       # when it was found to be unreachable last
    breaker: Breaker = field(default_factory=Breaker)
    suspect: bool = False           # in doubt: far more silent than predicted. It comes last; any byte ends that
    heard_s: float = 0.0            # last byte of any inference answer
    doubted_s: float = -math.inf    # last time it was in doubt
    advanced_s: float = 0.0         # up to when the runners' progress is counted
    loaded_s: float = -math.inf     # when a load ended last
    strangers_s: float = -math.inf  # when a request last had to wait for somebody else's
    speed: float = 1.0              # share of its usual speed that it runs at now, 0.03..1
    size_factor: float = 1.0        # its seconds per token over the prior's, over all its models
    overheads_s: collections.deque[float] = field(          # samples
        default_factory=lambda: collections.deque(maxlen=OVERHEADS_KEPT))
    overhead_s: float = OVERHEAD_S  # what a lone request takes outside prefill and decode
    load_factor: float = 1.0        # the seconds that its loads take, over the prior's
    on_cpu: bool = False            # all models that were seen resident lay wholly in main memory
    rtt_s: float = 0.0
    answer_s: float = 0.0           # EWMA of its answer times
    memory: MemoryEstimate = field(default_factory=MemoryEstimate)
    wishes: Wishes = field(default_factory=Wishes)
    demand_s: float = -math.inf     # when a queue last had it load a model
    sleep: Sleep = field(default_factory=Sleep)

    kept: dict[str, Json] = field(default_factory=dict)     # what was kept of its models, see "Memory"
    version: str = ""
    cloud: Json = field(default_factory=dict)   # its /api/status
    running: list[Json] = field(default_factory=list)       # rows of its /api/ps
    requests: int = 0
    errors: int = 0
    last_error: NodeError | None = None
    error_share: ErrorShare = field(default_factory=ErrorShare)
    latencies_s: collections.deque[float] = field(default_factory=lambda: collections.deque(maxlen=500))

    def __post_init__(self) -> None:
        self.name = self.settings.name
        self.wishes.configure(self.settings.load)

    def state(self, now: float) -> str:
        """Return up, suspect, draining, waking or down; of a node that is drained and down: down."""
        if not self.is_reachable(now):
            return "waking" if self.sleep.is_waking(now) else "down"
        if self.draining:
            return "draining"
        return "suspect" if self.suspect or self.error_share.is_all(now) else "up"

    def is_reachable(self, now: float) -> bool:
        """Tell whether it answers, drained or not."""
        return self.up and self.breaker.state(now) != "open"

    def is_alive(self, now: float) -> bool:
        """Tell whether it can be expected to serve: up, or no worse than suspect."""
        return self.is_reachable(now) and not self.draining

    def is_usable(self, now: float) -> bool:
        """Tell whether it may get new work."""
        return self.up and not self.draining and self.breaker.allows(now)

    def snapshot(self, now: float) -> NodeSnapshot:
        """Return what a request meets there: kept as long as nothing happens there, but LOOK_AGAIN_S at most."""
        known = self.kept_snapshot
        if known is None or known.changes != self.changes.count or now - known.at_s > LOOK_AGAIN_S:
            known = self.kept_snapshot = NodeSnapshot(self, now)
        return known

    def drain(self, draining: bool, seq: int) -> None:
        """Take no new work, or again some. `seq`: that of the next ticket; earlier ones may still come."""
        if draining and not self.draining:
            self.drained_seq = seq
        self.draining = draining

    # Requests.

    def begin(self, lease: Lease, now: float) -> None:
        """Note that a request is sent."""
        if not self.leases:
            self.heard_s = now
        self.leases.append(lease)
        self.requests += 1
        breakers = (self.breaker,) if lease.runner is None else (self.breaker, lease.runner.breaker)
        lease.trials = [breaker for breaker in breakers if breaker.failures and breaker.begin()]

    def end(self, lease: Lease, now: float) -> None:
        """Note that a request has ended."""
        self.advance(now)
        self.leases.remove(lease)
        if lease.measures:
            self.measuring = None if self.measuring is lease else self.measuring
            self.end_load(lease, now)
        elif lease.runner is not None:
            lease.runner.end(lease, now)
        if not self.leases:         # it is worth a look even for what had better wait for another node
            self.changes.idle_models.update(self.rows)
        for breaker in lease.trials:
            breaker.trial = False   # it may have ended without telling anything: its client left, say
        self.heard_s = now          # its silence, if any, ended with this lease

    def advance(self, now: float) -> None:
        """Count the solo-seconds that running requests have progressed. Before every change of who runs there."""
        self.kept_snapshot = None
        elapsed_s = now - self.advanced_s
        if elapsed_s > 0:
            for runner in self.busy:
                progress_s = elapsed_s / slowdown(self, runner)
                runner.progress_s += progress_s
                runner.shared_s += progress_s / self.speed
                runner.crowd_s += elapsed_s * LOGARITHMS[min(len(runner.leases), runner.slots.count, 256)]
            self.advanced_s = now

    def end_load(self, lease: Lease, now: float) -> None:
        """Note that a lease does not wait for its model any more, if it did."""
        if lease in self.loading:
            self.loading.remove(lease)
            self.loaded_s = now

    def worked(self, now: float) -> None:
        """Note that it has answered a request."""
        self.breaker.succeed()
        self.error_share.add(False, now)
        self.heard_s = now
        self.misses, self.check_pause_s = 0, CHECK_PAUSE_S

    def note_error(self, text: str, status: int | None, kind: str | None, now: float) -> None:
        """Note an error that it answered, or how else it failed. `Dispatcher.fail` draws the conclusions."""
        self.last_error = NodeError(text, status, now)
        if kind not in DIFFERENCES:
            self.error_share.add(True, now)

    def learn_overhead(self, hidden_s: float, alone: bool) -> None:
        """Take in what an answer spent outside load, prefill and decode. Beside others it may have waited."""
        if 0.0 <= hidden_s <= MOST_OVERHEAD_S and (alone or hidden_s < self.overhead_s):
            self.overheads_s.append(hidden_s)
            self.overhead_s = sorted(self.overheads_s)[len(self.overheads_s) // 4]

    # Doubt and speed.

    def doubt(self, now: float) -> None:
        self.doubted_s = now
        if not self.suspect:
            self.suspect = True
            self.changes.note_all()

    def trust(self, now: float) -> None:
        """End the doubt: it has sent something of an answer, or a check has found it idle."""
        self.suspect = False
        self.heard_s = now
        self.changes.note_all()

    def slow_down(self, seen: float) -> None:
        """Take in that a stream had `seen` of the lines expected of it: the node's speed just now."""
        self.speed = min(1.0, max(0.03, self.speed + 0.4 * (seen - self.speed)))
        self.kept_snapshot = None

    def reset_speed(self) -> None:
        self.speed = 1.0
        self.changes.note_all()

    def may_measure(self, now: float) -> bool:
        """Tell whether it may be measured: it does nothing for us, and its pause is over."""
        return self.up and not self.draining and not self.leases and now >= self.check_s

    def calibrates(self, done: bool = True) -> None:
        """Note that it is being measured, once each time it comes up; not `done`: it was in vain."""
        self.calibrated = done

    def pause_measuring(self, now: float) -> None:
        """Let it be measured again only after a pause, twice as long as the last one."""
        self.check_s = now + self.check_pause_s
        self.check_pause_s = min(2 * self.check_pause_s, LAST_CHECK_PAUSE_S)

    # Probes.

    def answered(self, version: str, rtt_s: float, now: float) -> None:
        """Note that it answered a probe; one that was down starts afresh."""
        if not self.up:
            self.breaker.succeed()
            self.sleep.came_up(now)
            self.changes.note_all()
        self.probed, self.up, self.misses, self.version, self.answered_s = True, True, 0, version, now
        self.rtt_s += (0.3 if self.rtt_s else 1.0) * (rtt_s - self.rtt_s)

    def missed(self, refused: bool, now: float) -> None:
        """Note a probe without an answer: dead is what refuses a connection, or has not answered for DEAD_S."""
        self.misses += 1
        self.indexed = self.indexed and not refused
        if refused or not self.probed or now - self.answered_s >= DEAD_S:
            self.lost(now)

    def lost(self, now: float) -> None:
        """Note that it cannot be reached: its models are gone from memory."""
        if self.up:
            self.lost_s = now
        self.probed, self.up, self.suspect, self.calibrated = True, False, False, False
        self.speed = 1.0
        self.check_s, self.check_pause_s = -math.inf, CHECK_PAUSE_S
        self.changes.note_all()
        self.wishes.restart()
        for runner in self.runners.values():
            runner.assume_unloaded()
            runner.slots.forget()

    def refused(self, now: float) -> None:
        """Note that it refuses connections: no new work. The next probe tells whether what runs there is lost."""
        self.up, self.lost_s = False, now

    def configure(self, settings: NodeSettings) -> None:
        """Take over the settings of a node whose server is the same."""
        was, self.settings, self.name = self.settings, settings, settings.name
        self.wishes.configure(settings.load)
        if was.slots != settings.slots:
            for runner in self.runners.values():
                runner.set_slots()

    # Models.

    def runner_for(self, model: str) -> Runner:
        """Return what is known of a model there, from now on."""
        runner = self.runners.get(model)
        if runner is None:
            runner = self.runners[model] = Runner(self, model, [model])
            runner.set_slots()
            runner.recall(self.kept.get(model, {}))
        return runner

    def take_tags(self, rows: list[Json], asked_s: float) -> bool:
        """Take over its /api/tags, unless a later request was answered before; tell whether it was taken over."""
        if asked_s < self.indexed_s:
            return False
        self.indexed_s = asked_s if asked_s < math.inf else self.indexed_s
        named = {row_name(row): row for row in rows}
        gone = [model for model in self.runners if model not in named]
        if gone:
            self.kept = learned_of_node(self).get("models", {})
        self.rows = named
        for model, row in named.items():
            runner = self.runner_for(model)
            runner.disk_bytes = row_bytes(row, "size") or PRIOR_MODEL_BYTES
            if embeds_only(row) and runner.slots.origin == "guessed":
                runner.slots.origin = "set"     # to one, by Ollama itself
        for model in gone:
            if not any(lease.ticket.spec.model == model for lease in self.runners[model].leases):
                del self.runners[model]
        share_runners(self)
        self.indexed = True
        return True

    def index_failed(self) -> None:
        """Note that it lives but does not say what it has: what it said last counts."""
        self.indexed = True

    def know_made(self, made: dict[tuple[str, str], Made]) -> None:
        """Take over what its models are made from: {(model, digest): Made}."""
        known = {(model, digest_of(self, model)) for model in self.rows}
        self.made = {key: one for key, one in {**self.made, **made}.items() if key in known}
        self.contexts = {model: one.num_ctx for (model, _), one in self.made.items() if one.num_ctx}
        share_runners(self)

    def take_ps(self, rows: list[Json], asked_s: float, now: float) -> None:
        """Take over its /api/ps, asked for at `asked_s`. It shows a runner under the name that was asked for first."""
        names = {row_name(row): row for row in rows}
        loading = {lease.slot for lease in self.loading}
        loading_bytes = sum(runner.resident_bytes() for runner in loading
                            if not any(model in names for model in runner.models))
        self.memory.learn({row_name(row): row for row in self.running}, names, loading_bytes)
        self.running = rows
        digests = {str(row["digest"]): row for row in rows if row.get("digest")}
        on_cpu = all(cpu_share(row) == 1.0 for row in rows) if rows else self.on_cpu
        changed, self.on_cpu = on_cpu != self.on_cpu, on_cpu
        for runner in each_runner(self):
            row = (next((names[model] for model in runner.models if model in names), None)
                   or digests.get(digest_of(self, runner.model)))
            changed = runner.take_row(row, asked_s, now) or changed
        if changed:
            self.changes.note_all()


# -----------------------------------------------------------------------------
# Learning: what does a finished answer teach about its node?
#
# Ollama tells neither its slots nor its queue, but the last line of an answer gives both away:
#     hidden wait = total_duration - load_duration - prompt_eval_duration - eval_duration
# Requests that overlap without hidden wait prove slots; hidden wait rejects them.
#
# Embeddings and the answers of /v1 tell no durations. There a node's order tells: it serves first come, first served,
# so when a request shows its first byte all that were sent before it have begun, and those of them that still run, run
# beside it. That is proof. If one of them left before, it may have waited for that one: then its latency is nearer to
# its work counted from its sending (it ran beside them) or from that one's end (it waited). Work is by its tokens, as
# long as a request sent alone takes for so many. Such an answer is only a vote; a few that agree decide.
#
# An answer is no sample of speed if a stall, a load or somebody else's request fell into it; a neighbour's prefill
# bounds what it says.
# -----------------------------------------------------------------------------

LEAST_WAIT_RATIO = 1.5              # a wait that makes less difference than this is lost in noise
WAITED_RATIO, FASTER_RATIO = 1.25, 0.7  # times the expected work: above, it surely waited; below, less was due
STALL_SHARE = 0.25                  # of an answer's time that the prefills of others may take from it
STRANGER_WAIT_S = 0.25              # in a node; less can be for the overhead of several requests of our own
STRANGERS_S = 30.0                  # somebody else's use of a node distorts speeds for so long after it was seen
LEAST_MEASURED_S = 0.15             # of the gateway's own answers that are to show a wait
TELLING_TOKENS = 500                # a prompt of so many shows by its time how much of it a cache held
PROMPT_BATCH_TOKENS = 1024          # of a prompt, evaluated in one go: Ollama's default
HIDDEN_WAIT_S = 0.05                # waiting inside a node below this (+2 % of the time taken) is noise


class Histogram:
    """Count values by upper bounds, as Prometheus wants them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Take in a value that was seen so often."""
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def share(self, share: float) -> float | None:
        """Return the lowest bound that at least this share of the values does not exceed; None without values."""
        total = sum(self.counts)
        for bound, count in zip((*self.bounds, math.inf), itertools.accumulate(self.counts), strict=True):
            if total and count >= share * total:
                return bound
        return None

    def samples(self, labels: str = "") -> Iterator[tuple[str, str, float]]:
        """Yield (suffix of the name, labels, value); `labels`: those of the whole histogram."""
        lead = labels + "," if labels else ""
        for bound, count in zip((*self.bounds, "+Inf"), itertools.accumulate(self.counts), strict=True):
            yield "_bucket", f'{lead}le="{bound}"', count
        yield "_sum", labels, self.sum
        yield "_count", labels, sum(self.counts)


@dataclass(slots=True)
class Timings:
    """The statistics in an answer's last line, in seconds and tokens; 0 = not given."""

    total_s: float = 0.0
    load_s: float = 0.0
    prompt_s: float = 0.0
    prompt_tokens: int = 0
    output_s: float = 0.0
    output_tokens: int = 0
    estimated: bool = False         # the counts, or one of them, are the gateway's own: see `accounted`

    @property
    def hidden_wait_s(self) -> float:
        """Time spent in the node's own queue, with templating and tokenising."""
        return self.total_s - self.load_s - self.prompt_s - self.output_s

    @property
    def tell_durations(self) -> bool:
        """Tell whether they say how long the node computed; those of /v1 and of embeddings do not."""
        return self.prompt_s > 0 or self.output_s > 0

    def show_a_wait(self, took_s: float, overhead_s: float = OVERHEAD_S) -> bool:
        """Tell whether the hidden wait of a request that took so long is more than overhead and noise."""
        return self.hidden_wait_s >= HIDDEN_WAIT_S + 0.02 * took_s + max(0.0, overhead_s - OVERHEAD_S)


NO_TIMINGS: Timings = Timings()
TIMING = re.compile(rb'"([a-z]+_[a-z_]+)":\s*(\d{1,18})')       # quotes inside a text would be escaped


def read_timings(tail: bytes) -> Timings:
    """Return the Timings in the last bytes of an answer, Ollama's or OpenAI's (counts only). Never raises."""
    value = dict(TIMING.findall(tail)).get
    return Timings(
        int(value(b"total_duration", 0)) / 1e9, int(value(b"load_duration", 0)) / 1e9,
        int(value(b"prompt_eval_duration", 0)) / 1e9,
        int(value(b"prompt_eval_count") or value(b"prompt_tokens") or value(b"input_tokens") or 0),
        int(value(b"eval_duration", 0)) / 1e9,
        int(value(b"eval_count") or value(b"completion_tokens") or value(b"output_tokens") or 0))


def waits_long(timings: Timings, took_s: float) -> bool:
    """Tell whether an answer waited in its node for longer than the overhead of several requests."""
    return timings.tell_durations and timings.hidden_wait_s > max(STRANGER_WAIT_S, 0.05 * took_s)


def batch_wait_s(lease: Lease) -> float:
    """Return for how long a request with a slot may have waited in its node: an engine that evaluates the prompt of
    another one looks for new requests only between two batches (on a CPU a batch takes seconds)."""
    return LEEWAY * min(lease.crowd_tokens, PROMPT_BATCH_TOKENS) * lease.slot.prefill_s()


def waited_for_strangers(lease: Lease, timings: Timings, took_s: float) -> bool:
    """Tell whether an answer had to wait in its node although all that we had sent there were proved to run at once."""
    if not waits_long(timings, took_s) or timings.hidden_wait_s <= batch_wait_s(lease):
        return False
    loading = lease.loads or timings.load_s > 1.0 or lease.ready_s > lease.sent_s or lease.node.loading
    return not loading and lease.position <= lease.slot.slots.proven and not ran_at_once(lease, timings)


def ran_at_once(lease: Lease, timings: Timings) -> int:
    """Return how many of our requests ran when one that had waited began, itself included; 0: it waited for others'."""
    began_s = lease.sent_s + timings.load_s + timings.hidden_wait_s - lease.node.overhead_s
    leeway_s = UNORDERED_S + lease.node.rtt_s + 0.02 * timings.hidden_wait_s + lease.node.overhead_s
    if not any(abs(left_s - began_s) <= leeway_s for left_s in lease.left_s):
        return 0
    return lease.position - sum(1 for left_s in lease.left_s if left_s <= began_s + leeway_s)


def ran_in_order(lease: Lease, timings: Timings) -> int:
    """Return how many of our requests surely ran when one that had waited began, itself included.

    A node serves in order: those sent before it have begun before, and run unless they have left by then.
    """
    if lease.order_unknown:
        return 0
    began_s = lease.sent_s + timings.load_s + timings.hidden_wait_s + UNORDERED_S + lease.node.rtt_s
    return lease.position - sum(1 for left_s in lease.left_s if left_s <= began_s)


def is_disturbed(lease: Lease) -> bool:
    """Tell whether an answer's time says nothing of its runner's speed: a stall, a load or somebody else fell into it.

    A node that others use for ever is measured in spite of them, a few times.
    """
    node, runner = lease.node, lease.slot
    if lease.sent_s <= node.doubted_s or node.speed < 0.6:
        return True
    if node.loading and node.loading != [lease] or lease.sent_s < node.loaded_s and not lease.loads:
        return True
    if lease.sent_s <= node.strangers_s and runner.slots.proven > 1:
        return True                 # with one slot somebody else's request ran before it, not beside it
    return lease.sent_s - node.strangers_s < STRANGERS_S and runner.speeds.samples >= KEPT_SAMPLES


def certainly_beside(lease: Lease) -> int:
    """Return how many run at the first byte of a lease, itself included, and were sent before it beyond any doubt."""
    sent_s = lease.sent_s - lease.node.rtt_s - UNORDERED_S
    return 1 + sum(1 for other in lease.slot.leases if other.sent_s <= sent_s and not other.is_held_up)


def is_answer(lease: Lease, timings: Timings) -> bool:
    """Tell whether an answer took a slot: a request without a prompt only loads the model."""
    spec = lease.ticket.spec
    return bool(timings.prompt_tokens or timings.output_tokens or lease.lines > 2 or spec.embeds and spec.prompt_chars)


def first_work_s(lease: Lease, timings: Timings) -> float:
    """Return the solo-seconds that an answer without durations should have taken to its first byte, by its tokens."""
    runner, spec, prompt_tokens = lease.slot, lease.ticket.spec, lease.new_tokens
    if timings.prompt_tokens and lease.prompt_tokens:
        prompt_tokens *= timings.prompt_tokens / lease.prompt_tokens
    unseen = 0 if spec.stream else timings.output_tokens
    return to_first_byte_s(runner, prompt_tokens, spec) + unseen * runner.decode_s()


def served_beside_s(lease: Lease) -> float:
    """Return the solo-seconds that a lease took to its first byte if it ran beside all that were sent before it."""
    slots = lease.slot.slots.count
    first_s = max(1e-6, lease.first_progress_s - lease.start_progress_s)
    if lease.position <= slots:
        return first_s
    # Progress was counted as if only slots were used.
    slowdowns = lease.slot.batching.slowdowns
    return first_s * slowdowns[slots] / slowdowns[min(lease.position, 256)]


def sign_of_wait(lease: Lease, work_s: float) -> bool | None:
    """Tell by its latency whether a lease that one sent before it has left since waited for that one; None: unclear.

    Both explanations are weighed by how far they are from its work, as factors. What is far too long for either has
    waited for even more.
    """
    assert lease.predecessor_left_progress_s is not None    # else there was nobody to wait for
    beside_s, waited_s = served_beside_s(lease), max(1e-6, lease.first_progress_s - lease.predecessor_left_progress_s)
    if waited_s > WAITED_RATIO * work_s:
        return True
    return beside_s * waited_s > work_s * work_s if beside_s > LEAST_WAIT_RATIO * waited_s else None


EVENT_LINES = 2                     # an event of OpenAI's is a line and an empty one
EVENTS_AFTER = 2                    # the last token: finish and [DONE]
LINES_OF_EVENTS = {"/v1/completions": 2, "/v1/chat/completions": 2, "/v1/messages": 3, "/v1/responses": 3}


def counted(lease: Lease, timings: Timings) -> Timings:
    """Return the Timings of an answer, a stream's output counted by its events where no usage was asked for."""
    if timings.output_tokens or not lease.ticket.spec.stream:
        return timings
    return replace(timings, output_tokens=max(0, lease.lines // EVENT_LINES - EVENTS_AFTER))


def accounted(lease: Lease, timings: Timings, path: str, is_whole: bool) -> Timings:
    """Return the Timings of an answer for whoever adds up tokens: what its node did not tell is estimated, and marked.

    A prompt is as long as predicted. Of a stream the events are counted, at about one token each; an answer that does
    not stream is as long as expected. Only a node's own numbers teach: these are for nothing else.
    """
    spec = lease.ticket.spec
    if lease.runner is None or not (timings.prompt_tokens or spec.prompt_chars or spec.prompt_images):
        return timings              # a mere load, for example
    prompt_tokens, output_tokens = timings.prompt_tokens or round(lease.prompt_tokens), timings.output_tokens
    if not (output_tokens or spec.embeds or timings.prompt_tokens and is_whole):
        events = lease.lines // LINES_OF_EVENTS.get(path, 1)
        after = EVENTS_AFTER if is_whole and spec.family is Family.OPENAI else 0
        output_tokens = max(0, events - after) if spec.stream else round(lease.output_tokens)
    if (prompt_tokens, output_tokens) == (timings.prompt_tokens, timings.output_tokens):
        return timings
    return replace(timings, prompt_tokens=prompt_tokens, output_tokens=output_tokens, estimated=True)


def learn_from(lease: Lease, timings: Timings, now: float) -> Timings:
    """Learn slots and speeds from a complete answer; return its Timings with what could be counted."""
    node, took_s = lease.node, now - lease.sent_s
    node.advance(now)
    if waited_for_strangers(lease, timings, took_s):
        node.strangers_s = now
    if timings.tell_durations:
        learn_slots(lease, timings, took_s, now)
        learn_speed(lease, timings, took_s, now)
    elif is_answer(lease, timings):
        timings = counted(lease, timings)
        learn_by_latency(lease, timings, now)
    lease.slot.speeds.learn_lines(lease.lines, timings.output_tokens)
    return timings


def learn_slots(lease: Lease, timings: Timings, took_s: float, now: float) -> None:
    """Take an answer with durations as proof that `lease.position` requests run at once, or that they do not."""
    runner, node, alone = lease.slot, lease.node, lease.position == 1
    slots = runner.slots
    if lease.loads or timings.load_s > 1.0:
        return                      # requests that came with a load also wait for it
    if timings.prompt_tokens:
        share = (runner.progress_s - lease.start_progress_s) / took_s if took_s else 1.0
        node.learn_overhead(timings.hidden_wait_s * share, alone)
    if slots.is_set:
        return
    if not timings.show_a_wait(took_s, node.overhead_s):
        # Had it waited for the first of those sent before it to leave, so much time would be unexplained.
        unexplained_s = took_s - timings.load_s - timings.prompt_s - timings.output_s
        if not lease.left_s or lease.left_s[0] - lease.sent_s > unexplained_s + UNORDERED_S:
            runner.confirm_slots(lease.position, now)
        if not alone:               # it could not have waited anyway
            slots.waits = 0
    elif lease.sent_s <= slots.rejected_s:
        return                      # sent while more were believed to fit: what it says is known by now
    elif timings.show_a_wait(took_s, batch_wait_s(lease) + (
            max(2 * node.overhead_s, OVERHEAD_S) if node.overheads_s else MOST_OVERHEAD_S)):
        learn_from_wait(lease, timings, now)    # beside others up to twice the lone overhead is none beyond doubt


def learn_from_wait(lease: Lease, timings: Timings, now: float) -> None:
    """Take an answer that had to wait in its node as proof of how many ran then, and that no more can."""
    runner, strangers_s = lease.slot, lease.node.strangers_s
    slots = runner.slots
    runner.confirm_slots(ran_in_order(lease, timings), now)
    if lease.position > slots.proven:
        runner.note_slots(slots.reject(now, strangers_s))
    else:
        runner.note_slots(slots.suspect(ran_at_once(lease, timings) or lease.position - 1, now, strangers_s))


def learn_speed(lease: Lease, timings: Timings, took_s: float, now: float) -> None:
    """Take an answer's durations as samples of the speeds that a lone request would see."""
    runner, tokens = lease.slot, timings.output_tokens
    if timings.load_s > 1.0:
        runner.learn_load(timings.load_s)
    if not timings.prompt_tokens or is_disturbed(lease):
        return
    share = (runner.shared_s - lease.start_shared_s) / took_s if took_s else 1.0
    learn_prefill(lease, timings.prompt_s, timings.prompt_tokens)
    if tokens >= 8 and timings.output_s > 1e-4:
        stalled_s = lease.stall_tokens * runner.prefill_s()
        learn_decode(runner, timings.output_s * share / tokens, now, stalled_s * share / tokens)
        learn_batching(lease, timings.output_s * share / tokens, took_s, stalled_s * share / tokens)


def learn_by_latency(lease: Lease, timings: Timings, now: float) -> None:
    """Learn slots and speeds from an answer that tells no durations."""
    node, runner = lease.node, lease.slot
    if timings.load_s > 1.0:
        runner.learn_load(timings.load_s)
    loading = lease.loads or timings.load_s > 1.0 or lease.ready_s > lease.sent_s
    if loading or lease.sent_s <= node.doubted_s or node.speed < 0.6:
        return                      # it may have waited for other things than a slot
    if not is_disturbed(lease):
        if lease.predecessor_left_progress_s is None and not lease.order_unknown:       # it waited for nobody
            learn_speed_by_latency(lease, timings, now)
        tokens, later_s = timings.output_tokens, runner.progress_s - lease.first_progress_s
        if lease.ticket.spec.stream and tokens >= 8 and later_s > 1e-4:     # once begun it waits for nobody either
            stalled_s = lease.stall_tokens * runner.prefill_s()
            learn_decode(runner, later_s / (tokens - 1), now, stalled_s / (tokens - 1))
            learn_batching(lease, later_s / (tokens - 1), now - lease.sent_s, stalled_s / (tokens - 1))
    weigh_latency(lease, timings, now)


def weigh_latency(lease: Lease, timings: Timings, now: float) -> None:
    """Take an answer without durations as proof of slots, or as a vote for or against them."""
    runner, streams, strangers_s = lease.slot, lease.ticket.spec.stream, lease.node.strangers_s
    slots, ratio, work_s = runner.slots, runner.unqueued_ratio.get(streams), first_work_s(lease, timings)
    if lease.overlapping >= lease.position:
        if not (lease.order_unknown or lease.has_list_input):
            sample = served_beside_s(lease) / work_s
            runner.unqueued_ratio[streams] = blend(ratio or sample, sample, SPEED_GAIN)
            if ratio is None and not slots.rejections:
                slots.retry_at_s = 0.0
        runner.confirm_slots(lease.overlapping, now)
        if lease.position > 1:      # alone it could not have waited anyway
            slots.waits = 0
    elif slots.is_set or lease.position > slots.proven + 1 or lease.has_list_input:
        return
    elif lease.predecessor_left_progress_s is None:
        return                      # sent at the same time as another one, and nobody knows which came first
    elif lease.sent_s <= slots.rejected_s:
        return                      # sent while more were believed to fit: what it says is known by now
    elif ratio is None:             # nothing to compare with: let one be alone
        slots.retry_at_s = max(slots.retry_at_s, now + RETRY_SLOT_S)
    elif served_beside_s(lease) < FASTER_RATIO * work_s * ratio:    # whoever slowed the node down is gone
        runner.unqueued_ratio[streams] = blend(ratio, served_beside_s(lease) / work_s, 2 * SPEED_GAIN)
    else:
        waited = sign_of_wait(lease, work_s * ratio)
        if waited and lease.stall_tokens * runner.prefill_s() < STALL_SHARE * work_s * ratio:   # else for those
            runner.note_slots(slots.vote(lease.position, -1, now, strangers_s))
        elif waited is False and not streams:       # streams that really overlap show it
            runner.note_slots(slots.vote(lease.position, 1, now, strangers_s))


def learn_speed_by_latency(lease: Lease, timings: Timings, now: float) -> None:
    """Take the latency of a request that waited for nobody as a sample of speed."""
    runner, overhead_s, tokens = lease.slot, lease.node.overhead_s, timings.output_tokens
    speeds, spec = runner.speeds, lease.ticket.spec
    first_s = max(1e-6, served_beside_s(lease) - lease.node.rtt_s)
    computed_s = max(first_s - overhead_s, 0.1 * first_s)
    if spec.stream:
        learn_prefill(lease, computed_s, timings.prompt_tokens or lease.prompt_tokens)
        return
    expected_s = max(first_work_s(lease, timings) - overhead_s, 1e-6)
    ratio, known_s, gain = computed_s / expected_s, runner.decode_s(), speeds.gain
    if spec.embeds:
        speeds.input_s = scaled(runner.input_s(), ratio, gain)
    if lease.new_tokens > 0.9 * lease.prompt_tokens and lease.fresh and not speeds.prefills:
        speeds.prefill_s = scaled(runner.prefill_s(), ratio, gain)
    if tokens >= 8:
        stalled_s = lease.stall_tokens * runner.prefill_s()
        learn_decode(runner, known_s * ratio, now, known_s * stalled_s / expected_s)
    elif spec.embeds:
        speeds.samples += 1


def learn_prefill(lease: Lease, seconds: float, tokens: float) -> None:
    """Take in the seconds that a lone prompt of so many tokens would have taken.

    What the node's cache held makes it faster than true, neighbours in prefill and other models slower; those that
    decode beside it hardly do: a batch of a prompt carries their tokens along.
    """
    runner = lease.slot
    if tokens < LEAST_PROMPT_TOKENS or seconds <= 0:
        return
    known, sample = runner.prefill_s(), seconds / tokens
    if tokens >= TELLING_TOKENS and lease.crowd_tokens <= STALL_SHARE * tokens:
        runner.learn_held(lease, max(0.0, 1 - sample / known))
    if not lease.fresh and sample < LEEWAY * known:
        return
    models = len(runner.node.busy) or 1
    if lease.crowd_tokens > STALL_SHARE * tokens or models > 1:
        sample = beyond(known, sample * tokens / (tokens + lease.crowd_tokens) / models, sample)
        if not sample:
            return
    runner.speeds.learn_prefill(known, sample, tokens)


def learn_batching(lease: Lease, sample: float, took_s: float, stalled_s: float) -> None:
    """Take in what an answer shows of batching, by the seconds per output token that a lone request would have seen.

    They were reckoned with what those beside it are believed to have slowed it down: that is put back. For up to
    `stalled_s` of them it stood still for the prefills of others; if that is much, it shows nothing.
    """
    batching = lease.slot.batching
    if took_s > 0 and stalled_s <= STALL_SHARE * sample:
        crowd = (lease.slot.crowd_s - lease.start_crowd_s) / took_s
        batching.learn(crowd, (sample - stalled_s / 2) * math.exp((1 - batching.batch_exponent) * crowd))


def learn_decode(runner: Runner, sample: float, now: float, stalled_s: float = 0.0) -> None:
    """Take in the seconds per output token that a lone request would have seen.

    For up to `stalled_s` of them it stood still for the prefills of others. If that is much, it is only a bound.
    """
    node, known = runner.node, runner.decode_s()
    if stalled_s <= STALL_SHARE * sample or not runner.speeds.samples:
        sample -= min(stalled_s, sample) / 2
    else:
        sample = beyond(known, max(sample - stalled_s, 0.1 * sample), sample)
        if not sample:
            return
    sample, gain = runner.speeds.learn_decode(known, sample, now)
    if gain == 1.0:
        runner.batching.restart()
    factor = size_factor(runner, sample)
    is_first = gain == 1.0 and not any(other.speeds.decode_s for other in node.runners.values() if other is not runner)
    node.size_factor = factor if is_first else blend(node.size_factor, factor, gain)


def size_factor(runner: Runner, decode_s: float) -> float:
    """Return seconds per token over what the model's size and place let expect: how slow its node is with any model."""
    expected_s = runner.disk_bytes / 1e9 * PRIOR_DECODE_S_PER_GB * runner.cpu_factor()
    return min(max(decode_s / expected_s, 0.01), 100.0)


def learn_measured(lease: Lease, timings: Timings, now: float) -> bool:
    """Learn from the answer to a measuring request; tell whether it says anything. Before its end."""
    node, runner = lease.node, lease.slot
    speeds = runner.speeds
    node.heard_s = now
    if waits_long(timings, now - lease.sent_s):     # somebody else uses the node
        node.strangers_s = now
        return False
    if timings.load_s > 1.0 or timings.output_tokens < 4 or timings.output_s <= 1e-4:
        return False
    node.learn_overhead(timings.hidden_wait_s, True)
    learn_prefill(lease, timings.prompt_s, timings.prompt_tokens)
    decode, prefill = timings.output_s / timings.output_tokens, timings.prompt_s / max(1, timings.prompt_tokens)
    if not speeds.samples or not 1 / ALIKE <= decode / runner.decode_s() <= ALIKE:
        speeds.samples = 0          # what was believed is of no use
        learn_decode(runner, decode, now)
    runner.batching.learn(0.0, decode)
    if prefill > GROSS * runner.prefill_s() or prefill and lease.fresh and runner.prefill_s() > GROSS * prefill:
        speeds.prefill_s = prefill
        speeds.prefills.clear()
    speeds.confirmed_s = now
    node.changes.note_all()
    return True


def learn_slots_measured(lease: Lease, answers: list[Timings], now: float) -> bool:
    """Learn how many of the answers that an idle node was asked for at once had a slot; tell whether all had.

    Whoever had none waited for a whole answer: so answers that were too short for that to show say nothing, nor does
    what took a load. Before the lease's end.
    """
    node, runner = lease.node, lease.slot
    work_s = min(answer.prompt_s + answer.output_s for answer in answers)
    if work_s < LEAST_MEASURED_S or runner.slots.is_set or any(answer.load_s > 1.0 for answer in answers):
        return False
    waited = sum(answer.hidden_wait_s > node.overhead_s + work_s / 2 for answer in answers)
    node.heard_s = now
    runner.confirm_slots(len(answers) - waited, now)
    if waited:
        runner.note_slots(runner.slots.reject(now, node.strangers_s, True))
    return not waited


# -----------------------------------------------------------------------------
# Estimates: what do answers teach, one number at a time?
#
# Slots: requests that ran at once prove so many; one that had to wait inside the node rejects more. What was rejected
# is tried again after a pause, for somebody else may have had the slot. Of two gateways before one node the one that
# has more sees more waits, so that it gives a slot back first, and tries for another one later: their shares converge.
#
# Batching: b requests of a model do more together than one alone. How much more is seen where answers have run beside
# one another and alone: it differs by the card, the model and its quantisation.
#
# Speeds are what a lone request would see. They are averages that two samples which agree can replace, if they are
# far off. Of prefill only the slow samples count, as the node's own cache makes the others faster than true.
# -----------------------------------------------------------------------------

CLIP = 3.0                          # one sample moves an estimate as if it were at most this many times off
LOG_CLIP = math.log(CLIP)
WAITS_TO_SHRINK = 3                 # one hidden wait within the proved slots may be chance
SIGNS_FOR, SIGNS_AGAINST = 3, 5     # by so many votes a slot is won or lost: one too few costs more than one too many
RETRY_SHARED_S = 10.0               # pause for each slot that is left, two at most, while others use the node
LAST_SHORT_PAUSE = 1                # doublings of the pause, at most, where the evidence is weak
FIRST_SURE_PAUSE = 2                # doublings of the pause, at least, where it is sure
PREFILLS_KEPT = 20                  # samples of prefill speed
SPREAD = 1.7                        # times: samples of undisturbed prefills are no farther apart
CONFIRMED_S = 600.0                 # how long an answer confirms
BATCH_GAIN = 0.7                    # b requests on one model together progress at b**0.7 of one, until it is learned
LEAST_GAIN, MOST_GAIN = 0.3, 1.0    # exponents that are believed
GAIN_STEP = 0.008                   # a change of an exponent by less is not reckoned with
BATCHES_FADE = 0.99                 # of what older answers have shown of an exponent, with each new one
PRIOR_SPREAD = 2.0                  # the prior counts like some ten answers beside one, two and three others


def retry_pause_s(rejections: int) -> float:
    """Return after how long one slot more is tried again that was disproved so often before."""
    return RETRY_SLOT_S * 2.0 ** min(rejections, 6)


class SlotEstimate:
    """How many requests a model works on at once on its node (OLLAMA_NUM_PARALLEL).

    Methods that may change `count` return whether they did.
    """

    def __init__(self) -> None:
        self.count = 1
        self.origin = "guessed"     # guessed, learned, or set: in hosts.txt, or to one for what only embeds
        self.proven = 1             # most that were proved to run at once, less what was taken back since
        self.max_proven = 1         # the same, nothing taken back
        self.retry_at_s = 0.0       # from then on one more than `count` may be tried
        self.seen, self.seen_s = 0, -math.inf   # most that ran at once lately, and when that was seen
        self.rejections, self.rejected_s = 0, -math.inf     # in a row; when `count` was lowered last
        self.waits = 0              # hidden waits in a row, among no more requests than were proved to run
        self.votes = 0              # answers whose latency speaks for one slot more, less those that speak against it

    @property
    def is_set(self) -> bool:
        """Tell whether the count is given, so that answers change nothing."""
        return self.origin == "set"

    def lately_seen(self, now: float) -> int:
        """Return how many were seen to run at once within CONFIRMED_S; 0 = none."""
        return self.seen if now - self.seen_s < CONFIRMED_S else 0

    def confirm(self, running: int, now: float) -> bool:
        """Note that so many requests ran at once."""
        self.seen, self.seen_s = max(running, self.lately_seen(now)), now
        self.proven, self.max_proven = max(self.proven, running), max(self.max_proven, running)
        if self.is_set or self.proven <= self.count:
            return False
        self.count, self.origin, self.rejections, self.votes = self.proven, "learned", 0, 0
        return True

    def suspect(self, running: int, now: float, strangers_s: float) -> bool:
        """Note that a request waited although more than `running` were proved to run: somebody else uses the node, or
        it has changed. A few such waits in a row take back what was proved."""
        self.waits += 1
        if self.waits < WAITS_TO_SHRINK or not running:
            return False
        self.proven, self.waits = running, 0
        return self.reject(now, strangers_s)

    def reject(self, now: float, strangers_s: float, sure: bool = False) -> bool:
        """Note that a request had to wait inside the node: no more than were proved, until a pause is over.

        It is a long one if that is `sure`. The pause grows only where the node is ours alone; a stranger, last seen at
        `strangers_s`, will give its slots back. If the stranger is a gateway, too, the one with fewer slots tries more
        often, until both have as many.
        """
        if self.is_set:
            return False
        self.count, self.origin = self.proven, "learned"
        if sure:
            self.rejections = max(self.rejections, FIRST_SURE_PAUSE)
        ours = self.proven >= self.max_proven and now - strangers_s > LATELY_S
        self.retry_at_s = now + (retry_pause_s(self.rejections) if ours else RETRY_SHARED_S * min(self.proven, 2))
        self.rejected_s = now
        self.rejections += ours
        return True

    def vote(self, position: int, vote: int, now: float, strangers_s: float) -> bool:
        """Count a latency that speaks for (1) or against (-1) `position` slots; decide once enough of them agree.

        Where they decide against, the pause stays short: the evidence is weak.
        """
        if position <= self.proven:
            if vote < 0:
                return self.suspect(position - 1, now, strangers_s)
            self.waits = 0
            return False
        self.votes += vote
        if self.votes >= SIGNS_FOR:
            return self.confirm(position, now)
        if self.votes <= -SIGNS_AGAINST:
            self.votes, self.rejections = 0, min(self.rejections, LAST_SHORT_PAUSE)
            return self.reject(now, strangers_s)
        return False

    def configure(self, slots: int | None, embeds: bool) -> None:
        """Take over the slots of hosts.txt; where it has none any more, those that were proved. One if it `embeds`."""
        if slots:
            self.count = self.proven = slots
            self.origin = "set"
        elif self.is_set:
            self.count = self.proven = 1 if embeds else self.max_proven
            self.origin = "set" if embeds else "learned" if self.max_proven > 1 else "guessed"

    def forget(self) -> None:
        """Forget what was learned: the node may come back with another OLLAMA_NUM_PARALLEL."""
        if not self.is_set:
            self.count = self.proven = self.max_proven = 1
            self.origin, self.retry_at_s, self.rejections = "guessed", 0.0, 0
            self.seen = self.votes = self.waits = 0

    def take_over(self, kept: Json, now: float) -> None:
        """Take over what the answers that a peer got have taught it."""
        if self.is_set or "count" not in kept:
            return
        rejections = kept.get("rejections", 0)
        if rejections > self.rejections:
            self.retry_at_s, self.rejected_s = now + retry_pause_s(rejections), now
        self.adopt(kept, rejections)

    def adopt(self, kept: Json, rejections: int) -> None:
        """Believe what was learned elsewhere."""
        self.count = self.proven = kept["count"]
        self.max_proven = max(self.count, kept.get("max_proven", 1))
        self.origin, self.rejections = "learned", rejections

    def limit(self, now: float) -> int:
        """Return how many may run at once: one more than known, or than seen lately, while another is tried."""
        if self.is_set:
            return self.count
        seen = self.lately_seen(now)
        if self.count > max(2, seen + 1):
            return max(2, seen + 1)
        return self.count + (self.retry_at_s <= now)

    def recall(self, kept: Json, indexed_s: float) -> None:
        """Take over what an earlier run has kept. The first hidden wait takes one of the slots back."""
        if "count" not in kept or self.origin != "guessed":
            return
        self.adopt(kept, min(kept.get("rejections", 0), LAST_SHORT_PAUSE))
        self.waits = WAITS_TO_SHRINK - 1
        if self.rejections:
            self.retry_at_s = max(0.0, indexed_s + RETRY_SLOT_S)


def blend(estimate: float, sample: float, gain: float) -> float:
    """Return the EWMA of an estimate and a sample, the sample clipped to CLIP times off."""
    return estimate + gain * (min(max(sample, estimate / CLIP), estimate * CLIP) - estimate)


def scaled(estimate: float, ratio: float, gain: float) -> float:
    """Return the EWMA of an estimate and of a sample that is `ratio` times as much."""
    return blend(estimate, max(ratio, 1e-6) * estimate, gain)


def usual_prefill_s(samples: collections.deque[float]) -> float:
    """Return the seconds a token that prompts take which no cache held, from samples of which some were cached.

    A cache only makes samples faster than true, so the slow ones count: the mean of those near the slowest that another
    one agrees with. Of twenty samples the slowest may be an outlier, too.
    """
    ordered = sorted(samples, reverse=True)
    ordered = ordered[(len(ordered) - 1) // 10:]
    mean = next((slow for slow, next_s in itertools.pairwise(ordered) if slow <= SPREAD * next_s), ordered[0])
    for _ in range(2):
        near = [sample for sample in ordered if mean / SPREAD <= sample <= mean * SPREAD]
        mean = sum(near) / len(near)
    return mean


def beyond(estimate: float, least: float, most: float) -> float:
    """Return the bound that the estimate is clearly outside of; 0 if it is within both: nothing to learn."""
    return most if estimate > LEEWAY * most else least if estimate * LEEWAY < least else 0.0


LOGARITHMS = [math.log(max(1, count)) for count in range(257)]     # of how many run


@functools.lru_cache
def slowdowns_of(exponent: float) -> list[float]:
    """Return by how much each of so many requests of one model is slower than alone, by how many there are."""
    return [max(1, count) ** (1 - exponent) for count in range(257)]


class BatchingEstimate:
    """How much more b requests of a model do together than one alone: b**batch_exponent times as much.

    The logarithm of the seconds per token is a line over the logarithm of b, its slope 1 - batch_exponent. It is fitted
    to the answers, the older ones fade; until they differ in b, the prior decides.
    """

    def __init__(self) -> None:
        self.batch_exponent = self.prior = self.reckoned = BATCH_GAIN
        self.slowdowns = slowdowns_of(BATCH_GAIN)   # times longer than alone, by how many run
        self.samples = 0.0                          # behind the means, faded
        self.crowd = self.log_s = 0.0               # means of ln(b), and of ln(seconds per token)
        self.spread = self.joint = 0.0              # sums of squares of ln(b), and of products of both; of deviations

    def learn(self, crowd: float, token_s: float) -> None:
        """Take in the seconds per token of an answer, beside others: the mean of ln(b) while it ran is `crowd`."""
        self.samples = samples = BATCHES_FADE * self.samples + 1
        crowd_off, log_off = crowd - self.crowd, math.log(token_s) - self.log_s
        if samples > 1 and not -LOG_CLIP < log_off < LOG_CLIP:
            log_off = math.copysign(LOG_CLIP, log_off)
        self.crowd += crowd_off / samples
        self.log_s += log_off / samples
        left = crowd - self.crowd
        self.spread = spread = BATCHES_FADE * self.spread + left * crowd_off
        self.joint = joint = BATCHES_FADE * self.joint + left * log_off
        self.believe(1 - (joint + PRIOR_SPREAD * (1 - self.prior)) / (spread + PRIOR_SPREAD))

    def believe(self, exponent: float) -> None:
        """Reckon with an exponent, as far as it can be; with steps of it: a table is kept for each."""
        self.batch_exponent = exponent = min(max(exponent, LEAST_GAIN), MOST_GAIN)
        if not -GAIN_STEP < exponent - self.reckoned < GAIN_STEP:
            self.reckoned = round(exponent, 2)
            self.slowdowns = slowdowns_of(self.reckoned)

    def restart(self) -> None:
        """Note that the speed of a lone request has changed: later answers are not compared with those before."""
        self.samples = 0.0

    def recall(self, kept: Json) -> None:
        """Take over what an earlier run has kept, as the prior."""
        self.prior = kept.get("batch_exponent", self.prior)
        self.believe(self.prior)


class SpeedEstimate:
    """How fast a model is on its node, as measured; 0 = not yet. All for a lone request."""

    def __init__(self) -> None:
        self.prefill_s = 0.0        # a prompt token
        self.prefills: collections.deque[float] = collections.deque(maxlen=PREFILLS_KEPT)   # samples of it
        self.decode_s = 0.0         # an output token
        self.slow_prefill_s = self.off_decode_s = 0.0   # the last samples, if they were grossly off
        self.input_s = 0.0          # a text to embed, beside its tokens
        self.samples = 0            # behind decode_s, or behind input_s of what only embeds
        self.confirmed_s = -math.inf        # when an answer last agreed with decode_s
        self.load_s = 0.0
        self.lines_per_token = 1.0  # streamed lines, as this model sends them
        self.streams = 0            # behind that

    @property
    def gain(self) -> float:
        """Return the weight of one more sample."""
        return max(SPEED_GAIN, 1 / (self.samples + 1))

    def is_confirmed(self, now: float) -> bool:
        """Tell whether an answer has lately agreed with it."""
        return now - self.confirmed_s < CONFIRMED_S

    def learn_prefill(self, known: float, sample: float, tokens: float) -> None:
        """Take in the seconds a token that a prompt of so many tokens took, in place of `known`.

        Two samples that agree and are grossly slower replace all before them.
        """
        if tokens <= FULL_PROMPT_TOKENS:
            if not self.prefills:
                self.prefill_s = blend(known, sample, self.gain * tokens / FULL_PROMPT_TOKENS)
            return
        before, self.slow_prefill_s = self.slow_prefill_s, sample if sample > GROSS * known else 0.0
        if before and self.slow_prefill_s and 1 / ALIKE <= sample / before <= ALIKE:
            self.prefills.clear()
            self.prefills.append(before)
        self.prefills.append(sample)
        self.prefill_s = usual_prefill_s(self.prefills)

    def learn_decode(self, known: float, sample: float, now: float) -> tuple[float, float]:
        """Take in the seconds that an output token took, in place of `known`; return (sample, gain) that count.

        Two samples that agree and are grossly off replace an estimate, unless it was confirmed often and lately.
        """
        gain = self.gain
        before, self.off_decode_s = self.off_decode_s, 0.0
        if not self.samples:
            self.decode_s = sample
        elif 1 / GROSS <= sample / known <= GROSS:
            self.decode_s = blend(known, sample, gain)
            if 1 / ALIKE <= sample / known <= ALIKE:
                self.confirmed_s = now
        elif (before and 1 / ALIKE <= sample / before <= ALIKE
              and (self.samples < MANY_SAMPLES or now - self.confirmed_s > LATELY_S)):
            sample = self.decode_s = math.sqrt(before * sample)
            self.samples, self.confirmed_s, gain = 1, now, 1.0
        else:
            self.decode_s, self.off_decode_s = blend(known, sample, gain), sample
        self.samples += 1
        return sample, gain

    def learn_lines(self, lines: int, tokens: int) -> None:
        """Take in how many lines a stream had for its tokens."""
        if lines > 8 and tokens > 8:
            self.streams += 1
            self.lines_per_token += max(SPEED_GAIN, 1 / self.streams) * (lines / tokens - self.lines_per_token)

    def recall(self, kept: Json) -> None:
        """Take over what an earlier run has kept; it counts as no more than a few samples."""
        for name in KEPT_OF_SPEEDS.keys() & kept.keys():
            setattr(self, name, kept[name])
        self.samples, self.streams = min(self.samples, KEPT_SAMPLES), min(self.streams, KEPT_SAMPLES)
        if self.prefill_s:
            self.prefills.extend([self.prefill_s] * KEPT_SAMPLES)


# -----------------------------------------------------------------------------
# Runners: what is known of one model on one node?
# -----------------------------------------------------------------------------

KEEP_LOADED_S = 300.0               # OLLAMA_KEEP_ALIVE: so long an idle model stays loaded
FOREVER_S = 4.1e9                   # the year 2100: what /api/ps shows to expire later stays for ever, until 2318
BEGINNINGS_KEPT = 300               # prompts of a runner, to know which ones its cache may have held
FRESH_SHARE = 0.1                   # of a prompt may have been seen before, then the cache hardly held any of it
PRIOR_INPUT_S = 0.0025              # per text to embed, beside its tokens: one call to the engine
CPU_SLOWDOWN = 20.0                 # of a model that lies wholly in main memory; 10 to 50 times were seen
PRIOR_LOAD_S, PRIOR_LOAD_S_PER_GB = 1.5, 0.5    # process start; weights from an NVMe drive
LOAD_GAIN = 0.5                     # of a node's load: its disk is the same for all models


@dataclass(slots=True)
class Cached:
    """A prompt that a runner's cache likely holds."""

    prefix: Prefix
    used_s: float                   # when it was sent
    pace: Pace | None = None        # of its conversation
    since_s: float = 0.0            # since when that has been there


NOTHING = Cached(((0, 0),), -math.inf)


class Prefixes:
    """The beginnings of the last prompts that a runner had: what its prefix cache likely holds."""

    def __init__(self) -> None:
        self.prompts: collections.OrderedDict[int, Cached] = collections.OrderedDict()  # by the whole prompt's hash
        self.conversations = 0      # of the prompts: those of so many parts that they are likely to go on
        self.hit_share = 0.5                    # EWMA: of the conversations that came, how many found their cache
        self.parts: dict[int, int] = collections.defaultdict(int)   # hash of a part: prompts that begin with it

    def remember(self, prompt: Cached, most: int) -> None:
        """Note a prompt by its (hash, chars) parts; forget the least recent ones beyond `most`."""
        whole = prompt.prefix[-1][0]
        if whole in self.prompts:
            self.prompts.move_to_end(whole)
        else:
            self.conversations += len(prompt.prefix) >= CONVERSATION_PARTS
            for part, _ in prompt.prefix:
                self.parts[part] += 1
        self.prompts[whole] = prompt
        while len(self.prompts) > most:
            self.forget(next(iter(self.prompts)))

    def forget_continued(self, prefix: Prefix, now: float) -> float:
        """Forget the turns that a prompt continues: a conversation has the cache of one slot, not one for each turn.

        Returns since when it has been there.
        """
        if len(prefix) >= CONVERSATION_PARTS:
            hit = self.common_chars(prefix) > CONTINUES_SHARE * prefix[-1][1]
            self.hit_share += HIT_GAIN * (hit - self.hit_share)
        since_s = now
        for part, _ in prefix[:-1]:
            if part in self.prompts:
                since_s = min(since_s, self.prompts[part].since_s)
                self.forget(part)
        return since_s

    def forget(self, whole: int) -> None:
        """Forget a prompt."""
        prefix = self.prompts.pop(whole).prefix
        self.conversations -= len(prefix) >= CONVERSATION_PARTS
        for part, _ in prefix:
            self.parts[part] -= 1
            if not self.parts[part]:
                del self.parts[part]

    def next_victim(self, slots: int, running: Container[int]) -> Cached:
        """Return what one more prompt would push out of the cache: the least recent that does not run, by its whole's
        hash; NOTHING while there is room."""
        if len(self.prompts) < slots:
            return NOTHING
        return next((prompt for whole, prompt in self.prompts.items() if whole not in running),
                    next(iter(self.prompts.values())))

    def evicted_chars(self, victim: Cached, now: float) -> float:
        """Return the characters that a conversation would need again if one more prompt pushed it out of the cache.

        A prompt of a few parts is no conversation yet: most of those are not continued. Where few conversations find
        their cache, others would push this one out in any case.
        """
        goes_on = len(victim.prefix) >= CONVERSATION_PARTS and now - victim.used_s < CONTINUED_S
        return victim.prefix[-1][1] * max(0.0, 2 * self.hit_share - 1) if goes_on else 0.0

    def expected_back(self, prefill_s: float, now: float) -> int:
        """Return how many of the conversations that it has are expected to go on sooner than their prompts could be
        evaluated again, at `prefill_s` a token."""
        return sum(1 for prompt in self.prompts.values() if prompt.pace is not None
                   and prompt.pace.is_back_within(prompt.prefix[-1][1] / CHARS_PER_TOKEN * prefill_s, now))

    def common_chars(self, prefix: Prefix) -> int:
        """Return how many leading characters a prompt shares with one of those remembered."""
        for part, chars in reversed(prefix):
            if part in self.parts:
                return chars
        return 0


@dataclass(slots=True, eq=False)
class Runner:
    """One model on one node: its residency, its slots and its speed, as far as they are known.

    Names of the same weights share one, as they do in Ollama. What belongs to a name is in `Node.rows`.
    """

    node: Node
    model: str                      # one of its names
    models: list[str] = field(default_factory=list)     # all of them
    disk_bytes: float = PRIOR_MODEL_BYTES
    vram_bytes: float = 0.0         # when resident; 0 = never seen
    cpu_share: float | None = None  # of it that is in main memory, when resident; None = never seen
    ready_s: float | None = None    # when it is or will be loaded; None = not resident
    options: RunnerOptions | None = None    # those it was loaded with; None = unknown, taken to match
    context: int = 0                # tokens that it was loaded for, as /api/ps tells; 0 = unknown
    own_context: int = 0            # the same, when it was loaded without num_ctx; 0 = never seen
    keep_alive_s: float = KEEP_LOADED_S     # of its last request that told
    listed: Json = field(default_factory=dict)  # its row in the last /api/ps
    leases: list[Lease] = field(default_factory=list)
    used_s: float = -math.inf       # last sent to
    seen_used_s: float = -math.inf  # when /api/ps last showed that somebody, whoever that is, had used it
    slots: SlotEstimate = field(default_factory=SlotEstimate)
    speeds: SpeedEstimate = field(default_factory=SpeedEstimate)
    batching: BatchingEstimate = field(default_factory=BatchingEstimate)
    unqueued_ratio: dict[bool, float] = field(default_factory=dict)     # does it stream: first byte, seen over expected
    progress_s: float = 0.0         # solo-seconds that each running request has advanced since the start
    shared_s: float = 0.0           # the same, had the node run at its usual speed
    crowd_s: float = 0.0            # seconds, each times the logarithm of how many requests ran
    prefixes: Prefixes = field(default_factory=Prefixes)    # beginnings of the last prompts
    beginnings: Prefixes = field(default_factory=Prefixes)  # of many more: its cache may still hold one of them
    held_in_slots: float = 1.0      # EWMA: of what a slot is believed to have, how much the answers show
    held_elsewhere: float = 0.0     # of what others have pushed out: newer servers keep prompts in RAM
    breaker: Breaker = field(default_factory=Breaker)   # answers 500 for this model

    @property
    def row(self) -> Json:
        """Its entry in the node's /api/tags; {} if it has none."""
        return self.node.rows.get(self.model, {})

    @property
    def on_disk(self) -> bool:
        """Whether the node has it, under any name."""
        return any(model in self.node.rows for model in self.models)

    # Speeds, the priors scaled by the node's other models while nothing was measured.

    def cpu_factor(self) -> float:
        """Return how many times slower than on a card it must be expected to run, by where its memory is."""
        share = float(self.node.on_cpu) if self.cpu_share is None else self.cpu_share
        return 1.0 + (CPU_SLOWDOWN - 1.0) * share

    def decode_s(self) -> float:
        """Return seconds per output token, alone."""
        return self.speeds.decode_s or (self.disk_bytes / 1e9 * PRIOR_DECODE_S_PER_GB * self.node.size_factor
                                        * self.cpu_factor())

    def prefill_s(self) -> float:
        """Return seconds per prompt token, alone."""
        return self.speeds.prefill_s or (self.disk_bytes / 1e9 * PRIOR_PREFILL_S_PER_GB * self.node.size_factor
                                         * self.cpu_factor())

    def input_s(self) -> float:
        """Return seconds per text to embed, alone, beside what its tokens take."""
        return self.speeds.input_s or PRIOR_INPUT_S * self.node.size_factor * self.cpu_factor()

    def load_s(self) -> float:
        return self.speeds.load_s or self.prior_load_s() * self.node.load_factor

    def prior_load_s(self) -> float:
        """Return what a load of so many bytes is expected to take where nothing was ever loaded."""
        return PRIOR_LOAD_S + self.disk_bytes / 1e9 * PRIOR_LOAD_S_PER_GB

    def learn_load(self, load_s: float) -> None:
        """Take in how long a load took: the node's other models are expected to take as long for their size."""
        self.speeds.load_s = load_s
        self.node.load_factor = blend(self.node.load_factor, load_s / self.prior_load_s(), LOAD_GAIN)

    def resident_bytes(self) -> float:
        """Return the memory that it takes when resident; weights and some context if never seen."""
        return self.vram_bytes or self.disk_bytes * 1.2

    # Requests.

    def begin(self, lease: Lease, now: float) -> None:
        """Note that a request is sent."""
        spec = lease.ticket.spec
        if lease.loads:
            self.assume_loaded(options_there(self.node, spec), lease.ready_s)
        if spec.keep_alive_s is not None:
            self.keep_alive_s = spec.keep_alive_s
        if spec.prefix and not spec.embeds:
            chars = max(1, spec.prompt_chars)
            lease.seen_share = self.beginnings.common_chars(spec.prefix) / chars
            lease.cached_share = self.prefixes.common_chars(spec.prefix) / chars
            since_s = self.prefixes.forget_continued(spec.prefix, now)
            self.prefixes.remember(Cached(spec.prefix, now, lease.ticket.pace, since_s), self.slots.count)
            ends = (*spec.prefix[:PREFIX_FIRST], spec.prefix[-1])
            self.beginnings.remember(Cached(ends, now), BEGINNINGS_KEPT)        # a KiB each
        if lease.ticket.pace is not None:
            lease.ticket.pace.running += 1
        if not self.leases:
            self.node.busy.append(self)
        elif now - self.leases[-1].sent_s <= self.node.rtt_s + UNORDERED_S:
            lease.order_unknown = self.leases[-1].order_unknown = True
        if spec.embeds:
            lease.has_list_input = any(other.ticket.spec.inputs > 1 for other in (lease, *self.leases))
        meet(lease)
        self.leases.append(lease)
        lease.position = len(self.leases)
        self.used_s = now
        if lease.loads:
            self.node.loading.append(lease)

    def learn_held(self, lease: Lease, share: float) -> None:
        """Take in how much of a prompt its time shows to have been cached, of a prompt that was seen here before."""
        if lease.cached_share > CONTINUES_SHARE:
            self.held_in_slots += HIT_GAIN * (min(1.0, share / lease.cached_share) - self.held_in_slots)
        elif lease.seen_share > CONTINUES_SHARE:
            self.held_elsewhere += HIT_GAIN * (min(1.0, share / lease.seen_share) - self.held_elsewhere)

    def end(self, lease: Lease, now: float) -> None:
        """Note that a request has ended; those sent after it may have waited for that."""
        place = self.leases.index(lease)
        del self.leases[place]
        if lease.ticket.pace is not None:
            lease.ticket.pace.end(now)
        if lease.first_s is None:
            self.watch_from(now)
        for later in self.leases[place:]:
            later.left_s += (now,)
            if later.first_s is None and later.predecessor_left_progress_s is None:
                later.predecessor_left_progress_s = self.progress_s
        self.used_s = now
        self.node.end_load(lease, now)
        if not self.leases:
            self.node.busy.remove(self)
            if not self.keep_alive_s:       # the node unloads it at once
                self.assume_unloaded()
        self.node.changes.models.update(self.models)

    def may_stop_s(self, tokens: float) -> float:
        """Return for how long a prompt may stop the others that run: the cache may not hold what it is believed to."""
        return GROSS * tokens * self.prefill_s()

    def is_stopped(self, now: float) -> bool:
        """Tell whether a prompt takes longer than it should: then the others' progress says nothing of the speed."""
        return any(lease.stops_long(now) and evaluates_prompt(lease) for lease in self.leases)

    def watch_from(self, now: float) -> None:
        """Judge the progress of all that run by what comes from now on: something has stopped them."""
        for lease in self.leases:
            lease.watch_from(now)

    def confirm_slots(self, running: int, now: float) -> None:
        """Note that so many requests ran at once."""
        self.note_slots(self.slots.confirm(running, now))

    def note_slots(self, changed: bool) -> None:
        """Forget what was reckoned with another count of slots, if it has changed."""
        if changed:
            self.node.kept_snapshot = None
            self.node.changes.models.update(self.models)

    def set_slots(self) -> None:
        """Take over the slots that hosts.txt tells."""
        self.slots.configure(self.node.settings.slots, bool(self.row) and embeds_only(self.row))

    # Residency.

    def assume_loaded(self, options: RunnerOptions, ready_s: float) -> None:
        """Note that a request makes the node load it, and what Ollama will evict for it."""
        for other in evicted_for(self):
            other.assume_unloaded()
        self.assume_unloaded()
        self.ready_s, self.options = ready_s, options

    def assume_unloaded(self) -> None:
        """Note that it is no longer resident; its prefix cache went with it."""
        self.ready_s, self.options, self.listed = None, None, {}
        self.context, self.keep_alive_s = 0, KEEP_LOADED_S
        self.prefixes, self.beginnings = Prefixes(), Prefixes()

    def promised_to_unload(self) -> None:
        """Note that its node has promised to unload it."""
        if not self.leases:
            self.assume_unloaded()

    def take_row(self, row: Json | None, asked_s: float, now: float) -> bool:
        """Take over its row of /api/ps, None if it has none; tell whether predictions change.

        What was placed since `asked_s` is trusted without it.
        """
        was, self.listed = self.listed, row or {}
        if row:
            self.take_expiry(row, was, now)
            changed = self.cpu_share != cpu_share(row)
            self.vram_bytes, self.cpu_share = row_vram_bytes(row), cpu_share(row)
            if self.ready_s is None or self.ready_s <= asked_s:     # else it may be of what ran before
                if self.context and self.context != context_of(row):
                    self.options = None     # somebody else has had it loaded anew
                self.context = context_of(row)
                if self.options is not None and not dict(self.options).get("num_ctx"):
                    self.own_context = self.context
            if self.ready_s is None:
                self.ready_s, self.options = now, None
                return True
            return changed
        if self.ready_s is None:
            return False
        if any(lease.runner is self and lease.measures for lease in self.node.loading):
            return False
        if not self.leases and self.used_s < asked_s - 1.0:
            self.assume_unloaded()
            return True
        if not any(lease in self.node.loading or lease.first_s is not None or lease.sent_s >= asked_s - 1.0
                   for lease in self.leases):
            self.wait_for_load(now)
            return True
        return False

    def take_expiry(self, row: Json, was: Json, now: float) -> None:
        """Take over until when a row of /api/ps says that it stays: that moves with each use, also by others."""
        if not was or row.get("expires_at") != was.get("expires_at"):
            self.seen_used_s = now
        if not self.leases and row.get("expires_at") and self.ready_s is not None and self.ready_s <= now:
            forever = instant_s(row["expires_at"]) > FOREVER_S
            if forever != (self.keep_alive_s == math.inf):
                self.keep_alive_s = math.inf if forever else KEEP_LOADED_S

    def wait_for_load(self, now: float) -> None:
        """Note that it was taken for loaded and is not: what was sent waits for it, behind what loads already."""
        self.ready_s = now + self.load_s()
        for lease in self.leases:
            lease.ready_s = self.ready_s
        self.node.loading += self.leases

    def recall(self, kept: Json) -> None:
        """Take over what was kept of it, if it is the same version."""
        digest = digest_of(self.node, self.model)
        if kept.get("digest") and digest and kept["digest"] != digest:
            return
        self.vram_bytes = kept.get("vram_bytes", self.vram_bytes)
        self.speeds.recall(kept)
        self.batching.recall(kept)
        self.unqueued_ratio = {name == "true": ratio for name, ratio in kept.get("unqueued_ratio", {}).items()}
        self.slots.recall(kept, self.node.indexed_s)


def resident_runners(node: Node, exclude: Runner | None = None) -> list[Runner]:
    """Return the runners of a node whose models are loaded or loading, `exclude` not among them."""
    return [runner for runner in each_runner(node) if runner.ready_s is not None and runner is not exclude]


def evicted_for(runner: Runner) -> list[Runner]:
    """Return what Ollama unloads to load a model: an idle one first, then by shortest keep-alive, not by last use."""
    others = resident_runners(runner.node, exclude=runner)
    others.sort(key=lambda other: (bool(other.leases), other.keep_alive_s, other.model))
    for count in range(len(others)):
        left = others[count:]
        held_bytes = sum(other.resident_bytes() for other in left)
        if not runner.node.memory.is_overfilled(held_bytes, runner.resident_bytes(), len(left)):
            return others[:count]
    return others


# -----------------------------------------------------------------------------
# Prediction: when would this request be finished there?
#
#     finish = wait for a slot or for the model, whichever is longer
#            + prefill of what the prefix cache lacks + decode of the expected output
#            + harm to other models that run there + the load that an eviction will cost somebody later
#            + the prefill that a conversation will need again which this prompt pushes out of the prefix cache
#            + work that is slower beside conversations which are expected back there soon
#
# Work is counted in solo-seconds: what a request would take alone. b requests of one model advance at b**(x - 1) of
# solo speed each, x as learned; prompts only one at a time. k models with work share the device, and `Node.speed` is
# what is left of its usual speed.
# All of these only read the nodes; an Offer and its NodeSnapshot keep what was reckoned until something happens there.
# The terms were chosen in a simulation study over 56 scenarios; see the README, "How it decides".
# -----------------------------------------------------------------------------

# These, their plateaus and what each is worth were measured on a simulator with real token traces.
HARM, SWAP, AFFINITY = 1.0, 2.0, 1.0    # weights: delay of others, a later reload, cached prefixes; x0.5..2 alike
EVICTION = 1.0                      # weight of a prefill that another conversation will need again
CONVERSATION_PARTS, CONTINUED_S = 4, 120.0  # messages of a conversation; so long it is expected to go on
HIT_GAIN = 0.1
HELD_BELOW, HELD_ABOVE = 0.7, 0.3   # shares that are no noise: slots have less than believed, RAM what was pushed out
NEAR = 0.25                         # weight of each conversation that is expected back soon; plateau 0.25..1
STAY = 16.0                         # times its prefill a conversation that goes on stays in a cache: see Offer.is_kept
MOST_KEPT_S = 120.0                 # a conversation waits no longer for others' to make room
CONTINUES_SHARE = 0.5               # a prompt of which so much is cached goes on with that
FORESIGHT_S = 3600.0                # no wait is predicted to be longer
OVERDUE = 3.0                       # times the predicted silence an answer is overdue; more while little is measured


def slowdown(node: Node, runner: Runner, extra: int = 0, full: bool = False) -> float:
    """Return how many times longer than alone a request of `runner` takes, with `extra` more of them there."""
    running, models = len(runner.leases), len(node.busy)
    if extra and not running:
        models += 1
    together = runner.slots.count if full else min(runner.slots.count, running + extra)
    return runner.batching.slowdowns[min(together, 256)] * (models or 1) / node.speed


def to_first_byte_s(runner: Runner, new_tokens: float, spec: RequestSpec) -> float:
    """Return how long a request takes alone to its first byte; the prefix cache lacks `new_tokens` of its prompt."""
    texts_s = spec.inputs * runner.input_s() if spec.embeds else 0.0
    return runner.node.overhead_s + new_tokens * runner.prefill_s() + texts_s


def alone_s(runner: Runner, demand: Demand) -> float:
    """Return how long a request takes alone, if the prefix cache holds nothing of it."""
    return to_first_byte_s(runner, demand.prompt_tokens, demand.spec) + demand.output_tokens * runner.decode_s()


def solo_left_s(lease: Lease, now: float) -> float:
    """Return the solo-seconds that a running request still needs; it never counts as nearer its end than 0.3 of it."""
    runner = lease.slot
    tokens_left = max(lease.output_tokens - lease.lines / runner.speeds.lines_per_token, 0.3 * lease.output_tokens)
    decode_left_s = tokens_left * runner.decode_s()
    if lease.first_s is not None:
        return decode_left_s
    advanced_s = runner.progress_s - lease.start_progress_s
    prefill_left_s = max(0.0, to_first_byte_s(runner, lease.new_tokens, lease.ticket.spec) - advanced_s)
    return prefill_left_s + decode_left_s + max(0.0, lease.ready_s - now)


def evaluates_prompt(lease: Lease) -> bool:
    """Tell whether a request's prompt may not be evaluated yet: of one that does not stream nobody sees that."""
    if lease.first_s is not None or lease.ticket.spec.stream:
        return lease.first_s is None
    runner = lease.slot
    prompt_s = lease.node.overhead_s + lease.new_tokens * runner.prefill_s()
    return runner.progress_s - lease.start_progress_s < prompt_s


def meet(lease: Lease) -> None:
    """Note whose prefill falls into whose answer: it stops all others of its runner. Before a lease is added there."""
    runner, new_tokens, crowd_tokens = lease.slot, lease.new_tokens, 0.0
    stalling_tokens = new_tokens if len(runner.leases) < runner.slots.count else 0.0    # else it waits in the node
    for other in runner.leases:
        other.stall_tokens += stalling_tokens
        if evaluates_prompt(other):
            crowd_tokens += other.new_tokens
            other.crowd_tokens += new_tokens
    lease.crowd_tokens = crowd_tokens


def stall(lease: Lease) -> None:
    """Note that a lease's prefill has fallen into the answers of the others on its runner."""
    for other in lease.slot.leases:
        if other is not lease:
            other.stall_tokens += lease.new_tokens


def options_there(node: Node, spec: RequestSpec) -> RunnerOptions:
    """Return the runner options of a request on a node: a model with a PARAMETER num_ctx brings that along."""
    num_ctx = node.contexts.get(spec.model or "") if node.contexts else None
    return (("num_ctx", num_ctx), *spec.options) if num_ctx and "num_ctx" not in dict(spec.options) else spec.options


def clamped_context(runner: Runner, num_ctx: float) -> float:
    """Return the context that a model is loaded with for a `num_ctx`: never more than its own maximum."""
    most = context_of(runner.row.get("details"))
    return min(num_ctx, most) if most else num_ctx


def has_context_for(runner: Runner, wanted: float, loaded: float) -> bool:
    """Tell whether the loaded context suits the `num_ctx` that is wanted, as far as is known; 0 = none was given."""
    if not wanted and not loaded and runner.options is not None:
        return True                 # the server's default, whatever that is
    there = runner.context or (clamped_context(runner, loaded) if loaded else 0)
    needed = clamped_context(runner, wanted) if wanted else runner.own_context
    if there and needed:
        return there == needed
    return runner.options is None or wanted == loaded


def is_loaded_for(runner: Runner, spec: RequestSpec) -> bool:
    """Tell whether the model is resident or loading, with options of equal values; what is unknown is taken to suit."""
    if runner.ready_s is None:
        return False
    options = options_there(runner.node, spec)
    if runner.options == options or runner.options is None and not runner.context:
        return True
    wanted, loaded = {**USUAL_OPTIONS, **dict(options)}, {**USUAL_OPTIONS, **dict(runner.options or ())}
    if not has_context_for(runner, wanted.pop("num_ctx", 0), loaded.pop("num_ctx", 0)):
        return False
    return runner.options is None or wanted == loaded


# A prompt below that fits everywhere: no server loads a model for less. Its tokens are known within a few per cent once
# answers have told; before that it may be a third more.
LEAST_WINDOW_TOKENS = 2048
WINDOW_MARGIN, FIRST_WINDOW_MARGIN = 1.05, 1.35


def window_tokens(runner: Runner, spec: RequestSpec) -> float:
    """Return the context that a request would get there; 0 if that is not known."""
    wanted = dict(options_there(runner.node, spec)).get("num_ctx", 0)
    if wanted:
        return clamped_context(runner, wanted)
    return runner.context if is_loaded_for(runner, spec) else runner.own_context


def fits(runner: Runner, demand: Demand) -> bool:
    """Tell whether a prompt fits into the context that it would get there, as far as that is known."""
    tokens = demand.prompt_tokens * (WINDOW_MARGIN if demand.samples else FIRST_WINDOW_MARGIN)
    return tokens <= LEAST_WINDOW_TOKENS or not 0 < window_tokens(runner, demand.spec) < tokens


def last_end_s(runner: Runner, now: float) -> float:
    """Return when the last request that runs there would be finished, in seconds from now."""
    slow = slowdown(runner.node, runner)
    return max((solo_left_s(lease, now) * slow for lease in runner.leases), default=0.0)


class MemoryLoad(NamedTuple):
    """What a model that is to be loaded meets in a node's memory."""

    held_bytes: float
    count: int                      # type: ignore[assignment]  # of other models there; hides `tuple.count`
    loaded_at_s: float              # loads come one after the other
    drained_at_s: float             # one of the others can be evicted


@dataclass(slots=True)
class Prediction:
    """What will become of a request on a node, in seconds from now."""

    silent: bool                    # it shows nothing before its end
    finish_s: float                 # it is finished, with what it costs others: what nodes are compared by
    start_s: float                  # a slot is free and the model there
    ready_s: float                  # the model is there
    prefill_s: float                # the request's own work, alone
    decode_s: float
    slow: float                     # times longer, with those that run beside it
    new_tokens: float               # what the prefix cache lacks
    loads: bool


class Offer:
    """What a runner can do for one more request, as long as nothing begins or ends on its node.

    A ticket that is held back for it claims the first slot until it would be finished. What runs there now is looked
    at only if no slot is free: mostly it is not needed.
    """

    def __init__(self, runner: Runner, snapshot: NodeSnapshot, now: float, claims_at_s: tuple[float, ...] = ()) -> None:
        node = runner.node
        self.runner, self.snapshot, self.claims_at_s = runner, snapshot, claims_at_s
        self.free = runner.slots.count - len(runner.leases) - len(claims_at_s)
        self.ends_at_s: list[float] | None = None   # when leases and claims end, ascending; reckoned once needed
        full = self.free <= 0
        self.slow = slowdown(node, runner, 1, full)     # times longer than alone, beside what runs then
        together = min(runner.slots.count if full else len(runner.leases) + 1, 256)
        self.prompt_slow = self.slow / runner.batching.slowdowns[together] * together   # prompts are not batched
        self.prefill_s, self.decode_s = runner.prefill_s(), runner.decode_s()
        self.fixed_s, self.overhead_s = node.rtt_s, node.overhead_s
        if node.busy and not runner.leases:
            self.fixed_s += snapshot.harm_s(now)
        self.loading: tuple[float, float, float] | None = None      # see `load`
        self.neighbours = len(runner.leases)
        self.victim, self.evicted_tokens, self.expected = NOTHING, 0.0, 0
        self.lost_share = 1.0       # of what is pushed out of the cache
        if runner.prefixes.conversations:
            self.look_at_conversations(now)

    def look_at_conversations(self, now: float) -> None:
        """Find out which conversations are cached here, and what it would cost them if one more prompt came."""
        runner = self.runner
        self.expected = runner.prefixes.expected_back(self.prefill_s, now)
        if runner.held_elsewhere > HELD_ABOVE:
            self.lost_share -= runner.held_elsewhere
        running = {lease.ticket.spec.prefix[-1][0] for lease in runner.leases if lease.ticket.spec.prefix}
        self.victim = runner.prefixes.next_victim(runner.slots.count, running)
        self.evicted_tokens = self.lost_share * runner.prefixes.evicted_chars(self.victim, now) / CHARS_PER_TOKEN

    def first_s(self, now: float) -> float:
        """Return when the first slot is free, in seconds from now."""
        if self.free > 0:
            return 0.0
        if self.ends_at_s is None:
            slow = slowdown(self.runner.node, self.runner)
            self.ends_at_s = sorted([now + solo_left_s(lease, now) * slow for lease in self.runner.leases]
                                    + [*self.claims_at_s])
        return max(0.0, self.ends_at_s[-self.runner.slots.count] - now)

    def claimed(self, at_s: float, now: float) -> Offer:
        """Return the Offer to tickets behind one that is held for this runner and will occupy a slot until `at_s`."""
        offer = Offer(self.runner, self.snapshot, now, (*self.claims_at_s, at_s))
        if self.ends_at_s is not None:
            offer.ends_at_s = sorted([*self.ends_at_s, at_s])
        return offer

    def load(self, now: float) -> tuple[float, float]:
        """Return (when the model would be loaded, what that costs others later), in seconds from now."""
        if self.loading is None or self.loading[0] != now:
            runner, there = self.runner, self.snapshot.memory_load(now)
            first_s, swaps = there.loaded_at_s - now, True
            if runner.ready_s is not None:      # loaded with other options
                first_s = max(first_s, 1.5 * last_end_s(runner, now))
            elif runner.node.memory.is_overfilled(there.held_bytes, runner.resident_bytes(), there.count):
                first_s = max(first_s, 1.5 * (there.drained_at_s - now))
            else:
                swaps = False
            load = runner.load_s()  # what is evicted will have to come back
            self.loading = now, load + min(max(first_s, 0.0), FORESIGHT_S), SWAP * load if swaps else 0.0
        return self.loading[1:]

    def start(self, demand: Demand, now: float) -> tuple[float, float, float, bool]:
        """Return when a request would begin, when its model would be there, what a load costs others later, and whether
        it needs one."""
        ready_at_s, ready_s, swap_s = self.runner.ready_s, 0.0, 0.0
        loads = ready_at_s is None or not is_loaded_for(self.runner, demand.spec)
        if loads:
            ready_s, swap_s = self.load(now)
        elif ready_at_s is not None and ready_at_s > now:
            ready_s = ready_at_s - now
        return ready_s if self.free > 0 else max(ready_s, self.first_s(now)), ready_s, swap_s, loads

    def new_tokens(self, demand: Demand) -> float:
        """Return how many tokens of a prompt the prefix cache lacks: those after the longest beginning seen there.

        By what answers have shown, some of that is not there, or some of what was pushed out is.
        """
        runner, tokens = self.runner, demand.prompt_tokens
        if not runner.prefixes.parts or runner.ready_s is None:
            return tokens
        chars = runner.prefixes.common_chars(demand.spec.prefix)
        if not chars and runner.held_elsewhere <= HELD_ABOVE:
            return tokens
        held = cached = demand.tokens_of(chars)
        if runner.held_in_slots < HELD_BELOW:
            held *= runner.held_in_slots
        if runner.held_elsewhere > HELD_ABOVE:
            seen = demand.tokens_of(runner.beginnings.common_chars(demand.spec.prefix))
            held += runner.held_elsewhere * max(0.0, seen - cached)
        return tokens - AFFINITY * held

    def predict(self, demand: Demand, now: float) -> Prediction:
        """Return the Prediction for a request that would go here.

        Its prefill stops the streams that run beside it: an engine works on one prompt at a time. It will be stopped as
        often: whoever comes after one of them has a prompt, too, of like length. Conversations that are expected back
        here will slow it down, and be slowed down.
        """
        start_s, ready_s, swap_s, loads = self.start(demand, now)
        new_tokens = self.new_tokens(demand)
        prompt_s, decode_s = new_tokens * self.prefill_s, demand.output_tokens * self.decode_s
        texts_s = demand.inputs * self.runner.input_s() if demand.inputs else 0.0
        slowed_s = (self.overhead_s + texts_s + decode_s) * self.slow + prompt_s * self.prompt_slow
        stops_s = HARM * prompt_s * self.neighbours if self.free > 0 else 0.0
        if self.expected:
            slowed_s *= 1 + NEAR * (self.expected - self.is_own(demand, new_tokens))
        finish_s = start_s + self.fixed_s + slowed_s + swap_s + stops_s
        if self.evicted_tokens and not self.is_own(demand, new_tokens):     # another conversation will need them again
            finish_s += EVICTION * self.evicted_tokens * self.prefill_s
        return Prediction(demand.spec.silent, finish_s, start_s + self.runner.node.rtt_s, ready_s,
                          self.overhead_s + prompt_s + texts_s, decode_s, self.slow, new_tokens, loads)

    def is_own(self, demand: Demand, new_tokens: float) -> bool:
        """Tell whether a prompt goes on with what is cached here."""
        return new_tokens < (1 - CONTINUES_SHARE) * demand.prompt_tokens

    def is_kept(self, demand: Demand, new_tokens: float, now: float) -> bool:
        """Tell whether a slot is kept from a conversation that is not cached here, for one whose place it would take.

        That other one is expected back sooner than its prompt could be evaluated again, and has not been here for long.
        What goes round and round over more conversations than slots would never be cached.
        """
        victim = self.victim
        if victim.pace is None or self.is_own(demand, new_tokens):
            return False
        again_s = self.lost_share * victim.prefix[-1][1] / CHARS_PER_TOKEN * self.prefill_s
        return victim.pace.is_back_within(again_s, now) and now - victim.since_s < STAY * again_s


class NodeSnapshot:
    """What a request meets on a node, as long as nothing there begins or ends. Each part is reckoned once needed."""

    def __init__(self, node: Node, now: float) -> None:
        self.node, self.at_s, self.changes = node, now, node.changes.count
        self.offers: dict[Runner, Offer] = {}
        self.harmed_s: float | None = None
        self.memory: MemoryLoad | None = None

    def harm_s(self, now: float) -> float:
        """Return what a request of a model that does not run there costs those that do: each gets slower."""
        if self.harmed_s is None:
            node = self.node
            self.harmed_s = sum(HARM * slowdown(node, other) / len(node.busy)
                                * sum([solo_left_s(lease, now) for lease in other.leases]) for other in node.busy)
        return self.harmed_s

    def memory_load(self, now: float) -> MemoryLoad:
        """Return the MemoryLoad that a model to be loaded meets."""
        if self.memory is None:
            there = resident_runners(self.node)
            ready_s = [runner.ready_s for runner in there if runner.ready_s is not None]
            self.memory = MemoryLoad(
                sum(runner.resident_bytes() for runner in there), len(there), max(ready_s, default=now),
                now + min((last_end_s(runner, now) for runner in there), default=0.0))
        return self.memory

    def offer(self, runner: Runner, now: float) -> Offer:
        """Return the Offer of one of the node's runners."""
        offer = self.offers.get(runner)
        if offer is None:
            offer = self.offers[runner] = Offer(runner, self, now)
        return offer


class Candidate(NamedTuple):
    """A node for a ticket; sorts by when it would be finished there, in seconds from now; those in doubt come last."""

    in_doubt: bool
    finish_s: float
    order: int                      # ties go to the node listed first
    offer: Offer
    prediction: Prediction

    @property
    def runner(self) -> Runner:
        return self.offer.runner


def overdue_s(prediction: Prediction, times: float = 1) -> float:
    """Return after how many seconds without a byte an answer is `times` far later than predicted."""
    work_s = prediction.prefill_s + (prediction.decode_s if prediction.silent else 0.0)
    return max(SILENT_S, times * OVERDUE * (prediction.start_s + work_s * prediction.slow))


def quiet_s(runner: Runner, prediction: Prediction) -> float:
    """Return the seconds for which an answer may show nothing before its node is in doubt; more if little is known.

    A race waits for no such leave: where a prediction is a mere guess, another node is the better bet.
    """
    samples = runner.speeds.samples
    unsure = 1 if samples >= 3 else 4 if samples else 10        # a CPU is 30 times slower than the prior
    return overdue_s(prediction, unsure)


# -----------------------------------------------------------------------------
# Policies: which waiting ticket goes to which node, now?
#
# A policy is asked whenever something has changed that could let a ticket run: an arrival, the end of a lease, a node
# that came back. Plain policies send a request on when it arrives, as a plain proxy does; it then waits in the node.
#
# CompletionTime walks the queue in order, gives each ticket the node that is predicted to finish it first, and holds a
# ticket back when the only free node would be 1.7 times slower than waiting for a better one, or would have to load its
# model beside others. A ticket that is held takes its virtual place on that better node, so those behind it see it as
# taken.
# -----------------------------------------------------------------------------

HOLD = 1.7                          # wait for a better node if a free one is this many times slower; plateau 1.4..2.0
LOOK_AHEAD = 8                      # tickets per model judged in one decision; plateau 4..32 up to ten nodes
FAR_S = 0.02                        # a round trip of a WAN; on a LAN nothing is gained by sending ahead
LEFT_S = 0.05                       # a slot stays free so long for a ticket of a peer; on a LAN it is taken within 1 ms
LOAD_PATIENCE = 3.0                 # a ticket waits so many loads longer before its model is loaded; plateau 2..5
MOST_HELD_S = 3.0                   # a ticket is held back no longer on beliefs that no answer has confirmed lately
YIELD_S = 30.0                      # for so long a node with an overdue load gets nothing else
DECISIONS_KEPT = 100


@dataclass(slots=True)
class DispatchPass:
    """One run of a policy: what it reads, and what it has decided so far."""

    waiting: WaitingRoom
    cluster: Cluster
    now: float
    leases: list[Lease] = field(default_factory=list)       # given
    refused: list[Ticket] = field(default_factory=list)
    held: list[Entry] = field(default_factory=list)         # heap entries that had better wait
    claimed: dict[Runner, Offer] = field(default_factory=dict)      # with the claims of those held for it
    left: dict[Runner, int] = field(default_factory=dict)   # slots left to tickets of peers

    def refuse(self, ticket: Ticket, refusal: Answer) -> None:
        self.refused.append(self.waiting.refuse(ticket, refusal))

    def refuse_model(self, model: str | None, text: str, since_seq: int = 0) -> None:
        """Refuse every ticket of a model that waits since `since_seq`, unless a node has not been looked at yet."""
        if any(not node.probed for node in self.cluster.nodes.values()):
            return
        pauses_s = [node.breaker.until_s - self.now for node in self.cluster.nodes_for(model) if node.up]
        refusal = Answer(503, text, retry_after_s=max(1.0, min(pauses_s, default=1.0)))
        for ticket in list(self.waiting.tickets):
            if ticket.spec.model == model and ticket.seq >= since_seq:
                self.refuse(ticket, refusal)


@dataclass(slots=True)
class Decision:
    """One dispatched ticket, for /api/stats: where it went, and when each candidate would have finished it."""

    at_s: float
    id: str
    model: str | None
    node: str
    candidates: list[Candidate]     # best first


class Policy:
    """Match waiting tickets to nodes."""

    binds_early = False             # True: requests queue inside the nodes, so a silent node proves nothing
    leaves = False                  # a slot was left to a ticket of a peer, in the last run

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.decisions: collections.deque[Decision] = collections.deque(maxlen=DECISIONS_KEPT)

    def assign(self, waiting: WaitingRoom, cluster: Cluster, now: float) -> tuple[list[Lease], list[Ticket]]:
        """Return (leases given, tickets refused)."""
        raise NotImplementedError

    def arrived(self, ticket: Ticket) -> None:
        """Note that a ticket waits from now on."""


class EarlyBinding(Policy):
    """Send every ticket at once to the node that `choose` names. What no node is known to have goes to any of them."""

    binds_early = True
    reason = ""                     # why a node was chosen, for X-SOLLOL-Reason

    def choose(self, nodes: list[Node]) -> Node:
        """Return one of the nodes that can be reached."""
        raise NotImplementedError

    def assign(self, waiting: WaitingRoom, cluster: Cluster, now: float) -> tuple[list[Lease], list[Ticket]]:
        work = DispatchPass(waiting, cluster, now)
        for model in list(waiting.heaps):
            self.assign_model(work, model)
        return work.leases, work.refused

    def assign_model(self, work: DispatchPass, model: str | None) -> None:
        """Send every waiting ticket of a model. Without a slot if nobody has it: the refusal must be Ollama's own."""
        waiting, cluster, now = work.waiting, work.cluster, work.now
        holders = cluster.holders.get(model)
        if not holders and any(not (node.indexed or node.probed and not node.up) for node in cluster.nodes.values()):
            return                  # somebody may have it; wait for the answer
        nodes = cluster.nodes_for(model)
        if not holders and model and cluster.is_in_cloud(model):
            nodes = sorted(nodes, key=lambda node: (not node.up, model in cluster.remote and model not in node.rows,
                                                    not node.settings.primary))[:1]
        kept = []                   # entries of those that only a node can serve that may come back
        while entry := waiting.first(model):
            ticket = entry[2]
            alive = untried(nodes, ticket)
            if ticket.peer is not None:
                kept.append(waiting.pop(model))
            elif not alive and not cluster.is_hopeless(ticket, now):
                if not any(node.up and not node.draining for node in nodes):
                    break           # so nobody else can be served either
                kept.append(waiting.pop(model))
            elif not alive and (ticket.tried or ticket.version != ""):
                work.refuse(ticket, Answer(*ALL_FAILED))
            elif not alive:
                work.refuse_model(model, "no node is up")
                break
            else:
                free = [node for node in alive if node.breaker.allows(now)] or alive
                node, reason = self.choose(free), "only choice" if len(free) == 1 else self.reason
                waiting.take(waiting.pop(model)[2])
                cluster.estimates.demand_of(ticket)     # as it is expected now
                runner = node.runners.get(model) if holders and model else None
                work.leases.append(give_lease(ticket, node, runner, now, reason))
        for entry in kept:
            waiting.restore(entry)


class LeastInflight(EarlyBinding):
    """The node with the fewest requests; of equals the one that is listed first."""

    reason = "least_inflight"

    def choose(self, nodes: list[Node]) -> Node:
        return min(nodes, key=lambda node: len(node.leases))


class RoundRobin(EarlyBinding):
    """The nodes in turn."""

    reason = "round_robin"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.picks = itertools.count()

    def choose(self, nodes: list[Node]) -> Node:
        return nodes[next(self.picks) % len(nodes)]


@dataclass(slots=True)
class ModelPass:
    """Where the tickets of one model can go during one run of CompletionTime."""

    model: str | None
    runners: list[Runner]           # on usable nodes, their own breakers not open
    forced: bool                    # every node fails the model: used in spite of its breaker
    looks_left: int                 # tickets that may still be held back
    left: dict[Runner, int]         # see DispatchPass
    keeps: bool = False             # a slot is kept for a conversation that may come back

    def has_room(self, runner: Runner, now: float) -> bool:
        """Tell whether one more request may be sent to a runner."""
        running, node = len(runner.leases), runner.node
        if self.left:
            running += self.left.get(runner, 0)
            if any(other.node is node and other is not runner for other in self.left):
                return False        # a peer may have another model loaded there, in a moment
        is_busy = running > 1 or running >= runner.slots.count      # else it is below any limit
        if is_busy and running >= slot_limit(runner, self.runners, now):
            return False
        if node.loading and yields(node, now):
            return False
        return self.forced or runner.breaker.allows(now) and node.breaker.allows(now)

    def first_open(self, candidates: list[Candidate], now: float) -> Candidate | None:
        """Return the first of some candidates that has room, or None."""
        for candidate in candidates:
            if self.has_room(candidate.runner, now):
                return candidate
        return None

    def is_open(self, now: float) -> bool:
        """Tell whether another ticket is worth a look."""
        return self.looks_left > 0 and any(self.has_room(runner, now) for runner in self.runners)


def slot_limit(runner: Runner, others: list[Runner], now: float) -> int:
    """Return how many may run at once: one more than the slots while the way to the node is long.

    Over a long way a slot would stand empty for a round trip between two requests, unless the next one waits there.
    One of `others` that has a free slot had better be taken then.
    """
    limit, count, node = runner.slots.limit(now), runner.slots.count, runner.node
    if limit != count or runner.slots.is_set:
        return limit
    far = node.rtt_s > max(FAR_S, 0.03 * node.answer_s)
    return count + (far and not any(len(other.leases) < other.slots.count for other in others))


def yields(node: Node, now: float) -> bool:
    """Tell whether a node gets a pause to load: Ollama loads once another model is idle, and a fed one never is."""
    first = node.loading[0]
    return not first.measures and SILENT_S < now - first.ready_s < SILENT_S + YIELD_S


def explain(candidates: list[Candidate], chosen: Candidate, demand: Demand) -> str:
    """Return why a node was chosen, in a few words."""
    short = "" if fits(chosen.runner, demand) else (
        f", {demand.prompt_tokens:.0f} tokens are more than any loaded context: a larger num_ctx would be needed")
    if len(candidates) == 1:
        return f"only choice, {chosen.finish_s:.2f} s predicted{short}"
    other = candidates[1] if candidates[0] is chosen else candidates[0]
    return f"{chosen.finish_s:.2f} s predicted, {other.runner.node.name} {other.finish_s:.2f} s{short}"


class Parked(NamedTuple):
    """A model whose first tickets had all better wait: nothing to decide, until something happens."""

    at_s: float
    last_key_s: float               # of the last ticket that was looked at; infinite if there was none behind it


class CompletionTime(Policy):
    """Bind late, when a slot is free, by predicted completion time.

    A model whose first tickets were all held back is parked: 10,000 tickets that have to wait cost nothing. It is
    looked at again when a slot may have become free for it, when a node has changed, or LOOK_AGAIN_S later.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.anywhere = LeastInflight(rng)      # for models that no node is known to have
        self.parked: dict[str | None, Parked] = {}          # by model

    def arrived(self, ticket: Ticket) -> None:
        parked = self.parked.get(ticket.spec.model)
        if parked and ticket.key_s < parked.last_key_s:
            del self.parked[ticket.spec.model]

    def assign(self, waiting: WaitingRoom, cluster: Cluster, now: float) -> tuple[list[Lease], list[Ticket]]:
        work, models, changes = DispatchPass(waiting, cluster, now), [], cluster.changes
        for model in list(waiting.heaps):
            looks, parked = LOOK_AHEAD, self.parked.get(model)
            if parked and not changes.everything and model not in changes.models:
                looks = 1           # the first ticket speaks for the others
                if model not in changes.idle_models and now - parked.at_s < LOOK_AGAIN_S:
                    continue
            holders = cluster.holders.get(model)
            if not holders:
                self.anywhere.assign_model(work, model)
            elif can_go := self.open(work, model, holders, looks):
                models.append(can_go)
        changes.forget()
        self.place_all(work, models)
        self.leaves = bool(work.left)
        return work.leases, work.refused

    def open(self, work: DispatchPass, model: str | None, holders: list[Runner], looks: int) -> ModelPass | None:
        """Return where the tickets of a model can go; None if they wait for a node to come back, or were refused."""
        usable = [runner for runner in holders if runner.node.is_usable(work.now) and runner.breaker.allows(work.now)]
        alive = usable or [runner for runner in holders if runner.node.up and not runner.node.draining]
        if alive:
            return ModelPass(model, alive, not usable, looks, work.left)
        if any(work.cluster.is_awaited(runner.node, work.now) for runner in holders):
            return None
        last = max((runner for runner in holders if runner.node.draining and runner.node.up),
                   key=lambda runner: runner.node.drained_seq, default=None)
        work.refuse_model(model, f"every node that has {model} is down or draining",
                          last.node.drained_seq if last else 0)
        return ModelPass(model, [last], True, looks, work.left) if last and work.waiting.first(model) else None

    def place_all(self, work: DispatchPass, models: list[ModelPass]) -> None:
        """Give free slots to waiting tickets, in the order of their keys."""
        waiting = work.waiting
        heads = [(*entry[:2], model) for model in models
                 if (entry := waiting.first(model.model)) and model.is_open(work.now)]
        heapq.heapify(heads)
        try:
            while heads:
                model = heapq.heappop(heads)[2]
                entry = waiting.pop(model.model)
                self.place_or_hold(work, entry, model)
                following = waiting.first(model.model)
                if following and model.is_open(work.now):
                    heapq.heappush(heads, (*following[:2], model))
                elif (following or work.held) and not work.left:
                    self.parked[model.model] = Parked(
                        work.now, entry[0] if following and not model.keeps else math.inf)
                else:               # nobody waits; or what a peer does not take is free again in a moment
                    self.parked.pop(model.model, None)
        finally:
            for entry in work.held:
                waiting.restore(entry)

    def place_or_hold(self, work: DispatchPass, entry: Entry, model: ModelPass) -> None:
        """Give a ticket the node that finishes it first, or hold it back if a better one is worth the wait."""
        ticket, now = entry[2], work.now
        demand = work.cluster.estimates.demand_of(ticket)
        candidates = self.candidates(work, ticket, demand, model.runners)
        free = model.first_open(candidates, now)
        if free and len(ticket.spec.prefix) >= CONVERSATION_PARTS and now - ticket.since_s < MOST_KEPT_S:
            free = model.first_open([one for one in candidates
                                     if not one.offer.is_kept(demand, one.prediction.new_tokens, now)], now)
            model.keeps = model.keeps or free is None
        if free and self.had_better_go(ticket, free, candidates[0], now):
            if ticket.peer is not None:
                self.leave_to_peer(work, entry, free)
                return
            work.waiting.take(ticket)
            runner, reason = free.runner, explain(candidates, free, demand)
            work.leases.append(give_lease(ticket, runner.node, runner, now, reason, free.prediction))
            self.decisions.append(Decision(now, ticket.id, model.model, runner.node.name, candidates))
        elif candidates or ticket.peer is not None or not work.cluster.is_hopeless(ticket, now):
            work.held.append(entry)
            model.looks_left -= free is not None    # a ticket that can use none of the free nodes blocks nobody
            if candidates and (free or not model.keeps):    # a slot that is kept is claimed by nobody
                best = candidates[0]
                work.claimed[best.runner] = best.offer.claimed(now + best.finish_s, now)
        else:
            work.waiting.take(ticket)
            work.refuse(ticket, Answer(*ALL_FAILED))

    def leave_to_peer(self, work: DispatchPass, entry: Entry, free: Candidate) -> None:
        """Leave a slot to a ticket that waits at a peer: it is next. What it leaves for LEFT_S, others may have."""
        ticket, now = entry[2], work.now
        work.held.append(entry)
        if ticket.offered is None or ticket.offered[0] is not free.runner:
            ticket.offered = free.runner, now
        if now - ticket.offered[1] < LEFT_S:
            work.left[free.runner] = work.left.get(free.runner, 0) + 1
            work.claimed[free.runner] = free.offer.claimed(now + free.finish_s, now)

    def candidates(self, work: DispatchPass, ticket: Ticket, demand: Demand, runners: list[Runner]) -> list[Candidate]:
        """Return a Candidate for each node that a ticket may use, best first."""
        candidates, now = [], work.now
        if ticket.tried or ticket.version != "":
            runners = [runner for runner in runners if ticket.may_use(runner.node)]
        for order, runner in enumerate(runners):
            node = runner.node
            snapshot, offer = node.snapshot(now), work.claimed.get(runner)
            if offer is None:
                offer = snapshot.offer(runner, now)
            elif offer.snapshot is not snapshot:    # a lease was given there
                offer = work.claimed[runner] = Offer(runner, snapshot, now, offer.claims_at_s)
            prediction = offer.predict(demand, now)
            finish_s = prediction.finish_s
            if node.suspect:        # as long as it has been silent, it may be again
                finish_s += max(0.0, now - node.heard_s)
            candidates.append(Candidate(node.suspect, finish_s, order, offer, prediction))
        if demand.prompt_tokens * FIRST_WINDOW_MARGIN > LEAST_WINDOW_TOKENS:
            candidates = [candidate for candidate in candidates if fits(candidate.runner, demand)] or candidates
        if ticket.spec.needs_account:
            candidates = [candidate for candidate in candidates if candidate.runner.node.settings.primary] or candidates
        candidates.sort()
        return candidates

    def had_better_go(self, ticket: Ticket, free: Candidate, best: Candidate, now: float) -> bool:
        """Tell whether a ticket goes to a free node, rather than to wait for the best one.

        It waits no longer than the best one was first predicted to need. A load may push out what somebody needs next:
        so a free node with other models that must load has to be the best one, or the wait becomes longer. Whether they
        fit beside it is often not known.
        """
        load_s, runner = 0.0, free.runner
        if free is not best and free.prediction.loads and resident_runners(runner.node, runner):
            load_s = runner.load_s()
        if free.finish_s <= (1.0 if load_s else HOLD) * best.finish_s:
            return True
        if ticket.held_until_s is None:
            sure = runner.speeds.is_confirmed(now) and best.runner.speeds.is_confirmed(now)
            ticket.held_until_s = now + (best.finish_s if sure else min(best.finish_s, MOST_HELD_S))
        return now >= ticket.held_until_s + LOAD_PATIENCE * load_s


POLICIES: dict[str, type[Policy]] = {
    "latency-weighted": CompletionTime,
    "least-inflight": LeastInflight,
    "round-robin": RoundRobin,
}


# -----------------------------------------------------------------------------
# Waiting room: who is next?
#
# The key of a ticket is a time: its arrival, less a head start for its priority, plus a fair share. The keys of a
# client never change, so neither does the order of two waiting clients: a heap suffices, and ageing costs nothing. A
# batch request that has waited longer than the head start of a fresh urgent one goes first, so nobody starves.
#
# Fair share is start-time fair queueing (Goyal 1996): each request of a client starts, virtually, when that client's
# previous request of the same or a higher priority ends. So the many requests of one client delay nobody else, and
# its batch work does not delay its own urgent work. A client with nothing waiting or running owes nothing: its request
# goes before the next one of any client that does, however much slower than charged the cluster is.
#
# The sessions of one client, an agent's conversation and somebody's chat, take turns within the places that the client
# has: a new request of a session with little under way takes the place of one whose session has more.
# -----------------------------------------------------------------------------

HEAD_START_S = 6.0                  # one level of priority, in seconds of waiting; high is 18 s before normal
TIE_S = 1e-6                        # just before another


class FairShare:
    """Keep, per client and priority, the virtual time at which its next request starts."""

    def __init__(self) -> None:
        self.next_s: dict[str, dict[int, float]] = {}           # client: {priority: virtual seconds}
        self.begun_s: dict[tuple[str, int], float] = {}         # (client, priority): virtual start of the last request
        self.active: dict[tuple[str, int], int] = collections.defaultdict(int)      # requests that wait or run

    def start_s(self, spec: RequestSpec, now: float) -> float:
        """Return the virtual start of a new request: not before what the client has asked for with higher priority.

        `now`: in virtual seconds, see WaitingRoom.virtual_s.
        """
        levels = self.next_s.get(spec.client)
        if not levels:
            return now
        return max([now, *[next_s for priority, next_s in levels.items() if priority >= spec.priority]])

    def charge(self, spec: RequestSpec, now: float, cost_s: float) -> float:
        """Count a new request that costs the cluster `cost_s` seconds; return its virtual start.

        Whoever has a share of two pays half.
        """
        start_s = self.start_s(spec, now)
        self.next_s.setdefault(spec.client, {})[spec.priority] = start_s + cost_s / spec.share
        self.begun_s[spec.client, spec.priority] = start_s
        self.active[spec.client, spec.priority] += 1
        return start_s

    def correct(self, spec: RequestSpec, more_s: float) -> None:
        """Charge a request that has not gone yet `more_s` seconds more; less if that is negative.

        The next one starts no earlier than the last one did: a client's requests keep their order.
        """
        account, levels = (spec.client, spec.priority), self.next_s.get(spec.client, {})
        if account in self.active:
            levels[spec.priority] = max(self.begun_s[account], levels[spec.priority] + more_s / spec.share)

    def settle(self, spec: RequestSpec) -> None:
        """Count a request as gone; forget a client with none left."""
        account = spec.client, spec.priority
        self.active[account] -= 1
        if not self.active[account]:
            levels = self.next_s[spec.client]
            del self.active[account], self.begun_s[account], levels[spec.priority]
            if not levels:
                del self.next_s[spec.client]


def is_valid(entry: Entry) -> bool:
    """Tell whether an entry of a heap stands for its ticket: it still waits, and has this key."""
    return entry[2].state is WAITING and entry[0] == entry[2].key_s


def place_of(ticket: Ticket) -> tuple[float, int]:
    return ticket.key_s, ticket.seq


def places_alike(one: RequestSpec, other: RequestSpec) -> bool:
    """Tell whether requests of one client may exchange their places: they wait for the same, and are as urgent."""
    return one.client == other.client and one.model == other.model and one.priority == other.priority


class WaitingRoom:
    """Hold waiting tickets: one heap per model, so that a model without a free node blocks no other one."""

    def __init__(self, max_tickets: int = 1024, timeout_s: float = 240.0) -> None:
        self.max_tickets, self.timeout_s = max_tickets, timeout_s
        self.heaps: dict[str | None, list[Entry]] = {}      # by model
        self.marked: dict[str | None, int] = collections.defaultdict(int)   # entries that no longer wait
        self.tickets: dict[Ticket, None] = {}   # that wait, in the order of their coming
        self.fair = FairShare()
        self.owing: dict[str | None, dict[int, list[Entry]]] = {}   # by model and priority: those whose client owes
        self.sessions: dict[tuple[str, int], int] = collections.defaultdict(int)    # (client, session): requests
        self.seq = itertools.count()

    def __len__(self) -> int:
        return len(self.tickets)

    def key_s(self, spec: RequestSpec, now: float) -> float:
        """Return the key that a new request would have: when it starts virtually, less its head start."""
        return self.fair.start_s(spec, self.virtual_s(spec, now)) - HEAD_START_S * spec.priority

    def virtual_s(self, spec: RequestSpec, now: float) -> float:
        """Return when the request of a client that owes nothing starts virtually: now, or just before the next request
        of the same model, and of no higher priority, whose client owes something."""
        for priority, heap in self.owing.get(spec.model, {}).items():
            while heap and not is_valid(heap[0]):
                heapq.heappop(heap)
            if heap and priority <= spec.priority:
                now = min(now, heap[0][0] + HEAD_START_S * priority - TIE_S)
        return now

    def enter(self, id: str, demand: Demand, cost_s: float, now: float, pace: Pace | None = None) -> Ticket:
        """Return a waiting ticket for a request that will keep the whole cluster busy for `cost_s`."""
        spec = demand.spec
        start_s = self.fair.charge(spec, self.virtual_s(spec, now), cost_s)
        key_s = start_s - HEAD_START_S * spec.priority
        ticket = Ticket(id, spec, now, key_s, next(self.seq), now, cost_s, demand, pace)
        self.sessions[spec.client, spec.session] += 1
        for other in self.take_turns(ticket):
            self.marked[spec.model] += 1
            self.push(other)
        self.push(ticket)
        return ticket

    def take_turns(self, ticket: Ticket) -> list[Ticket]:
        """Give a new ticket the place of its client's first ticket whose session has more ahead of it than its own has.

        Each later ticket of the client gets the place behind its own. Returns those whose keys have grown.
        """
        spec, line = ticket.spec, []
        if not self.tickets:
            return []
        ahead = self.sessions[spec.client, spec.session] - 1
        if ahead + 1 < self.fair.active[spec.client, spec.priority]:    # else the client has no other session
            line = sorted((other for other in self.tickets if not other.begun and places_alike(other.spec, spec)),
                          key=place_of)
        passed = collections.Counter({other.spec.session: self.sessions[spec.client, other.spec.session]
                                      for other in line})
        passed.subtract(other.spec.session for other in line)       # now: how many run
        for place, other in enumerate(line):
            if passed[other.spec.session] > ahead:
                moved = [ticket, *line[place:]]
                keys_s = [*(one.key_s for one in line[place:]), ticket.key_s]
                later = [one for one, key_s in zip(moved, keys_s, strict=True) if key_s > one.key_s]
                for one, key_s in zip(moved, keys_s, strict=True):
                    one.key_s = key_s
                return later
            passed[other.spec.session] += 1
        return []

    def unqueued(self, id: str, spec: RequestSpec, now: float) -> Ticket:
        """Return a ticket for a request that takes no slot: it never waits."""
        return Ticket(id, spec, now, now, next(self.seq))

    def push(self, ticket: Ticket) -> None:
        """Put a ticket at the place that its key gives it."""
        if ticket.pace is not None and ticket.state is not WAITING:
            ticket.pace.waiting += 1
        ticket.state = WAITING
        self.tickets[ticket] = None
        entry, spec = (ticket.key_s, ticket.seq, ticket), ticket.spec
        heapq.heappush(self.heaps.setdefault(spec.model, []), entry)
        if ticket.key_s + HEAD_START_S * spec.priority > ticket.arrived_s:
            heapq.heappush(self.owing.setdefault(spec.model, {}).setdefault(spec.priority, []), entry)

    def note(self, ticket: Ticket) -> None:
        """Let a ticket that waits at a peer keep its place among those here, until it is discarded."""
        ticket.state = WAITING
        heapq.heappush(self.heaps.setdefault(ticket.spec.model, []), (ticket.key_s, ticket.seq, ticket))

    def heads(self, most: int) -> Iterator[Ticket]:
        """Return the first tickets of each model that wait here, `most` at most, in any order."""
        for heap in self.heaps.values():
            looks, places, found = 4 * most, [(heap[0], 0)] if heap else [], 0
            while places and looks and found < most:        # down the tree of the heap, the next one first
                entry, place = heapq.heappop(places)
                for below in range(2 * place + 1, min(2 * place + 3, len(heap))):
                    heapq.heappush(places, (heap[below], below))
                looks -= 1
                if is_valid(entry) and entry[2].peer is None:
                    found += 1
                    yield entry[2]

    def discard(self, ticket: Ticket) -> None:
        """Take a ticket out. Its heap entry is only marked, and swept out when half of the heap is. Amortised O(1)."""
        if ticket.state is not WAITING:
            return
        self.take(ticket)
        model = ticket.spec.model
        self.marked[model] += 1
        heap = self.heaps.get(model, [])
        if self.marked[model] > 16 + len(heap) // 2:
            heap[:] = filter(is_valid, heap)
            heapq.heapify(heap)
            del self.marked[model]

    def first(self, model: str | None) -> Entry | None:
        """Return the first waiting entry of a model, or None."""
        heap = self.heaps.get(model, ())
        while heap and not is_valid(heap[0]):
            heapq.heappop(heap)
            self.marked[model] -= 1
        if not heap:
            for table in (self.heaps, self.marked, self.owing):
                table.pop(model, None)
            return None
        return heap[0]

    def pop(self, model: str | None) -> Entry:
        """Take the first waiting entry of a model out of its heap; it still waits, until `restore` or `take`."""
        self.first(model)           # takes those out that do not wait
        return heapq.heappop(self.heaps[model])

    def restore(self, entry: Entry) -> None:
        """Put an entry that `pop` returned back to its place."""
        heapq.heappush(self.heaps.setdefault(entry[2].spec.model, []), entry)

    def take(self, ticket: Ticket) -> None:
        """Let a ticket whose entry was popped wait no longer."""
        ticket.state = IDLE
        self.tickets.pop(ticket, None)      # that of a peer is not among them
        if ticket.pace is not None:
            ticket.pace.waiting -= 1

    def refuse(self, ticket: Ticket, refusal: Answer) -> Ticket:
        """Take a waiting ticket out with the answer that its client gets. Its entry may have been popped or not."""
        self.discard(ticket)
        ticket.state, ticket.refusal = REFUSED, refusal
        return ticket

    def first_key_s(self) -> float | None:
        """Return the key of the ticket that is next, of whichever model; None if none waits."""
        return min((entry[0] for model in list(self.heaps) if (entry := self.first(model))), default=None)

    def leave(self, ticket: Ticket) -> bool:
        """End a ticket, whatever has become of it; tell whether it had not left before. Its lease has ended."""
        if ticket.state is LEFT:
            return False
        self.discard(ticket)
        ticket.state = LEFT
        self.fair.settle(ticket.spec)
        session = ticket.spec.client, ticket.spec.session
        self.sessions[session] -= 1
        if not self.sessions[session]:
            del self.sessions[session]
        return True

    def to_displace(self, client: str, key_s: float) -> Ticket | None:
        """Return the ticket that makes room for a new one of `client` with this key; None = the new one has to go.

        It is the least urgent ticket of whoever has most waiting, with the new one; of equals the least urgent of all.
        So a crowd of addresses with urgent requests displaces its own, and nobody who waits for a single one. What has
        begun stays. O(n), so for a full queue only.
        """
        waiting = [ticket for ticket in self.tickets if not ticket.begun]
        counts = collections.Counter([client, *(ticket.spec.client for ticket in waiting)])
        most = max(counts.values())
        last = max((ticket for ticket in waiting if counts[ticket.spec.client] == most),
                   key=place_of, default=None)
        return None if counts[client] == most and (last is None or last.key_s <= key_s) else last

    def in_order(self) -> list[Ticket]:
        """Return the waiting tickets, the next one first. O(n log n): for people, not for dispatch."""
        return sorted(self.tickets, key=place_of)


# -----------------------------------------------------------------------------
# Dispatcher: what becomes of a ticket, from its arrival to its end?
# -----------------------------------------------------------------------------

OFF_LENGTHS = 8                     # answers in a row that are so much shorter than expected, or longer
RACE_LOAD_S = 60.0                  # of silence before a request that loads a model is raced: the loser's load ends
RACE_GAIN = 0.5                     # a race begins where its end is predicted within this share of the silence so far
STREAM_ON_TIME_SHARE = 0.75         # of the expected tokens: a smaller loss is noise, or for the learned speeds to show
JUDGE_S = 2.0                       # a stream's speed is judged so often
PRIOR_OUTPUT_TOKENS = 150.0
CHARS_PER_TOKEN = 4.0
IMAGE_TOKENS = 768.0                # what Ollama assumes of an image
FORECAST_S = 1.0                    # a full queue's Retry-After is kept so long: 1,024 requests take 3 ms to forecast
ERROR_BOUNDS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)   # time taken over time predicted
CONNECTION_FAILURES = frozenset(("refused", "died", "lost"))


class Dispatcher:
    """Own the waiting room, the cluster and the policy. Never waits, never looks at a clock."""

    def __init__(self, policy: str = "latency-weighted", *, max_queue: int = 1024, queue_timeout_s: float = 240.0,
                 early_refusal: bool = False, rng: random.Random | None = None) -> None:
        self.waiting, self.cluster = WaitingRoom(max_queue, queue_timeout_s), Cluster(queue_timeout_s)
        self.policy = POLICIES[policy](rng or random.Random(0))
        self.rates, self.early_refusal = ClusterRates(self.cluster), early_refusal
        self.displaced: list[Ticket] = []       # refused since the last dispatch
        self.forecast = -math.inf, 0.0          # when `drain_s` was reckoned last, and what came out
        self.ratios = Histogram(ERROR_BOUNDS)   # time taken over time predicted, of all answers
        self.rescues: collections.Counter[str] = collections.Counter()  # broken streams, see `rescued`

    # Tickets.

    def enter(self, id: str, spec: RequestSpec, now: float, version: str = "") -> Ticket:
        """Return a waiting ticket for a request; only nodes whose model has the digest `version`, if any, get it.

        If the queue is full, whoever has most waiting loses a ticket: it is refused by the next `dispatch`. Raises
        Refusal if it is the new one, or with --early-refusal if its turn would come too late.
        """
        if self.early_refusal:
            self.refuse_early(spec, now)
        if len(self.waiting) >= self.waiting.max_tickets:
            self.displace(spec, now)
        demand = self.cluster.estimates.demand(spec)
        if spec.model in self.cluster.holders:
            self.cluster.estimates.arrivals[spec.model].add(now)
        pace = self.cluster.estimates.paces.begin(spec, now)
        ticket = self.waiting.enter(id, demand, self.rates.cost_s(demand, now), now, pace)
        ticket.version = version
        self.policy.arrived(ticket)
        return ticket

    def refuse_early(self, spec: RequestSpec, now: float) -> None:
        """Raise Refusal if a new request is predicted to begin only when it would have waited too long."""
        timeout_s, estimates = self.waiting.timeout_s, self.cluster.estimates
        if self.drain_s(now) <= timeout_s:
            return
        forecast, key_s = Forecast(self.cluster, now), self.waiting.key_s(spec, now)
        for ticket in self.waiting.in_order():
            if ticket.key_s <= key_s:
                forecast.start_s(estimates.demand_of(ticket))
        start_s = forecast.start_s(estimates.demand(spec)) or 0.0
        if start_s > timeout_s:
            raise Refusal(503, f"no slot is predicted to become free within {timeout_s:g} s",
                          retry_after_s=start_s - timeout_s)

    def displace(self, spec: RequestSpec, now: float) -> None:
        """Refuse a ticket of a full queue for a new one. Raises Refusal if that has to go."""
        refusal = Answer(503, "the queue is full", retry_after_s=self.drain_s(now))
        last = self.waiting.to_displace(spec.client, self.waiting.key_s(spec, now))
        if last is None:
            raise refusal.error()
        self.displaced.append(self.waiting.refuse(last, refusal))

    def expire(self, now: float) -> list[Ticket]:
        """Refuse and return the tickets that have waited too long."""
        timeout_s = self.waiting.timeout_s
        late = [ticket for ticket in self.waiting.tickets if now - ticket.since_s >= timeout_s]
        if not late:
            return []
        refusal = Answer(503, f"no slot became free within {timeout_s:g} s", retry_after_s=self.drain_s(now))
        return [self.waiting.refuse(ticket, refusal) for ticket in late]

    def retry(self, ticket: Ticket, now: float) -> bool:
        """Put a failed ticket back at its old place, if a node is left for it; tell whether.

        Where no other is left, those whose connection failed are: what restarts comes back.
        """
        if ticket.attempts >= MAX_ATTEMPTS:
            return False
        if self.cluster.is_hopeless(ticket, now):
            ticket.tried -= ticket.gone
            ticket.gone.clear()
            if self.cluster.is_hopeless(ticket, now):
                return False
        self.waiting.push(ticket)
        self.policy.arrived(ticket)
        return True

    def leave(self, ticket: Ticket, now: float) -> bool:
        """End a ticket, whatever has become of it: waiting, running, refused or already left. Tell whether others may
        have its place."""
        had_place = ticket.state in (WAITING, LEASED)
        if ticket.lease is not None:
            self.release(ticket.lease, now)
        return self.waiting.leave(ticket) and had_place

    def drain_s(self, now: float) -> float:
        """Return when the queue would be empty if nothing more came, in seconds from now; at least 1."""
        at_s, drained_s = self.forecast
        if not at_s <= now < at_s + FORECAST_S:
            forecast = Forecast(self.cluster, now)
            drained_s = max([forecast.start_s(self.cluster.estimates.demand_of(ticket)) or 0.0
                             for ticket in self.waiting.in_order()], default=0.0)
            self.forecast = now, drained_s
        return max(1.0, drained_s)

    def rescued(self, whole: bool) -> None:
        """Count a broken stream that another node was to go on with, and whether it came to its end."""
        self.rescues["whole" if whole else "broken"] += 1

    # Leases.

    def dispatch(self, now: float) -> tuple[list[Lease], list[Ticket]]:
        """Match waiting tickets to nodes. Return (leases given, tickets refused)."""
        displaced, self.displaced = self.displaced, []
        if not self.waiting.tickets:    # mostly there is nothing to do when a request has ended
            return [], displaced
        leases, refused = self.policy.assign(self.waiting, self.cluster, now)
        return leases, displaced + refused

    def lease_unqueued(self, id: str, spec: RequestSpec, tried: set[str], now: float) -> Lease:
        """Return a lease without a slot for a request that only one suitable node need answer. Raises Refusal."""
        return self.lease_on(id, spec, *self.cluster.node_unqueued(spec, tried, now), now=now)

    def lease_on(self, id: str, spec: RequestSpec, node: Node, reason: str, now: float) -> Lease:
        """Return a lease without a slot on a given node."""
        return give_lease(self.waiting.unqueued(id, spec, now), node, None, now, reason)

    def lease_for_measuring(self, runner: Runner, spec: RequestSpec, now: float) -> Lease:
        """Return the lease of the gateway's own request on an idle node."""
        ticket = self.waiting.unqueued(f"measure-{runner.node.name}", spec, now)
        return own_lease(runner, ticket, now, "the gateway measures the node")

    def lease_for_loading(self, runner: Runner, spec: RequestSpec, now: float) -> Lease:
        """Return the lease of the gateway's own request for a model in the memory of an idle node."""
        return lease_for_loading(runner, self.waiting.unqueued(f"load-{runner.node.name}", spec, now), now)

    def observe(self, lease: Lease, timings: Timings, now: float) -> None:
        """Learn from a complete answer. Before its release."""
        node, took_s, estimates = lease.node, now - lease.sent_s, self.cluster.estimates
        lease.worked(now)
        if lease.runner is None:
            return
        node.latencies_s.append(took_s)
        node.answer_s += (0.1 if node.answer_s else 1.0) * (took_s - node.answer_s)
        if lease.predicted_end_s > lease.sent_s and took_s > 0:
            self.ratios.add(took_s / (lease.predicted_end_s - lease.sent_s))
        timings = learn_from(lease, timings, now)
        estimates.learn_prompt(lease.ticket.spec, timings.prompt_tokens)
        if timings.output_tokens or timings.prompt_tokens:
            self.charge(lease, timings.prompt_tokens or lease.prompt_tokens, timings.output_tokens, now)
        if timings.output_tokens and not lease.ticket.spec.embeds:
            spec = lease.ticket.spec
            estimates.lengths[spec.model].learn(lease.prompt_tokens, timings.output_tokens, spec.kind)

    def charge(self, lease: Lease, prompt_tokens: float, output_tokens: float, now: float) -> None:
        """Charge the client of a lease for what its request has really cost, in place of what was expected."""
        ticket = lease.ticket
        assert ticket.demand is not None        # it has waited for a slot
        cost_s = self.rates.cost_s(Demand(ticket.spec, min(prompt_tokens, MAX_OUTPUT_TOKENS),
                                          min(output_tokens, MAX_OUTPUT_TOKENS), 0, ticket.demand.inputs), now)
        self.waiting.fair.correct(ticket.spec, cost_s - ticket.cost_s)
        ticket.cost_s, lease.charged = cost_s, True

    def split(self, spec: RequestSpec, now: float) -> tuple[list[int], str]:
        """Return how a batch is cut, as Cluster.split does; not at all where requests are bound early."""
        return ([], "") if self.policy.binds_early else self.cluster.split(spec, now)

    def release(self, lease: Lease, now: float) -> None:
        """End a lease. One that was broken off, or whose answer told nothing, is charged by its lines."""
        if lease.runner is not None and not lease.charged:
            tokens = lease.lines / lease.runner.speeds.lines_per_token
            if tokens > lease.output_tokens:
                self.charge(lease, lease.prompt_tokens, tokens, now)
        lease.end(now)

    def fail(self, lease: Lease, kind: str, now: float) -> None:
        """Note that a node failed a request; see failover_kind and Failure for the kinds."""
        node, runner, ticket = lease.node, lease.runner, lease.ticket
        ticket.tried.add(node.name)
        if kind in CONNECTION_FAILURES:
            ticket.gone.add(node.name)
        if kind != "refused":       # else the request never reached the node
            ticket.attempts += 1
            ticket.since_s = now
        if kind in DIFFERENCES:
            ticket.exclude_alike(kind, node, self.cluster.nodes_for(ticket.spec.model))
            return
        node.errors += 1
        self.cluster.changes.note_all()
        if kind == "missing" and runner is not None:    # the index was wrong
            self.cluster.lacks(node, runner, ticket.spec.model)
        elif kind == "refused":
            node.refused(now)
        elif kind == "model" and runner is not None:
            ticket.record_failure(runner.breaker, now)
        elif kind in ("died", "garbage") or kind in ("busy", "proxy") and runner is not None:
            ticket.record_failure(node.breaker, now)

    def learn_too_long(self, lease: Lease, told_tokens: int) -> None:
        """Learn from a refusal how many tokens a prompt is, 0 = it was not told: then more than the context there."""
        spec, estimates = lease.ticket.spec, self.cluster.estimates
        window = window_tokens(lease.runner, spec) if lease.runner else 0
        if told_tokens or window > estimates.demand(spec).prompt_tokens:
            estimates.learn_prompt(spec, told_tokens or window)

    def drain(self, node: Node, draining: bool) -> None:
        """Give a node no new work, or again some."""
        self.cluster.drain(node, draining, next(self.waiting.seq))

    # Silence.

    def watch(self, now: float) -> tuple[list[Lease], list[Lease]]:
        """Look at who is silent. Return (leases whose node is dead and whose request can go elsewhere, races begun).

        Silence ends nothing: a silent node is in doubt, and what is far overdue there may be raced. With a plain
        proxy's policy requests queue in the node, and silence means nothing at all.
        """
        cluster = self.cluster
        cluster.leaving = [node for node in cluster.leaving if node.leases]
        nodes = (*cluster.nodes.values(), *cluster.leaving)
        leases = [lease for node in nodes for lease in node.leases
                  if lease.runner and not (lease.measures or lease.elsewhere or self.policy.binds_early)]
        stopped = {runner for runner in {lease.slot for lease in leases} if runner.is_stopped(now)}
        for lease in leases:
            if is_overdue(lease, now):
                lease.node.doubt(now)
            elif lease.first_s is not None and lease.ticket.spec.stream and lease.runner not in stopped:
                judge_speed(lease, now)
        lost = [lease for node in nodes if node.misses and not node.up for lease in node.leases
                if self.is_lost(lease, now)]
        raced = [self.race(lease.ticket, now) for lease in leases if lease not in lost]
        return lost, [lease for lease in raced if lease is not None]

    def is_lost(self, lease: Lease, now: float) -> bool:
        """Tell whether a request leaves a dead node: nothing of its answer was seen, and another node can serve.

        Of what takes no slot only a change of a model ends there without another node: that one is named in the answer.
        """
        ticket = lease.ticket
        if now - lease.heard_s <= SILENT_S:
            return False
        if lease.runner is None:
            return ticket.spec.repeatable or bool(ticket.spec.change)
        others = [node for node in untried(self.cluster.nodes_for(ticket.spec.model), ticket) if node is not lease.node]
        return lease.first_s is None and ticket.rival is None and bool(others)

    def race(self, ticket: Ticket, now: float) -> Lease | None:
        """Return a second lease for a ticket whose answer is far overdue, where another node would end it well before.

        Only on a slot that is free and that no waiting ticket could use; three nodes at most, a race at a time. A
        stream that has begun is raced by a replay, so that it must be deterministic and its model the same there.
        """
        first, model, spec = ticket.lease, ticket.spec.model, ticket.spec
        if (first is None or ticket.race is None or ticket.rival is not None or not spec.repeatable
                or spec.needs_account):
            return None
        silent_s, least_s = now - first.heard_s, RACE_LOAD_S if first in first.node.loading else 0.0
        patience_s = first.race_s if first.first_s is None else allowed_s(first)
        if ticket.attempts + 2 > MAX_ATTEMPTS or silent_s <= max(least_s, patience_s):
            return None
        digest = "" if first.first_s is None else digest_of(first.node, model)
        if first.first_s is not None and not (spec.deterministic and digest):
            return None
        demand, rivals = self.cluster.estimates.demand_of(ticket), []
        for order, runner in enumerate(self.cluster.holders.get(model, ())):
            if (self.may_race(runner, ticket, now) and fits(runner, demand)
                    and (not digest or digest_of(runner.node, model) == digest)):
                offer = runner.node.snapshot(now).offer(runner, now)
                prediction = offer.predict(demand, now)
                rivals.append(Candidate(False, prediction.finish_s, order, offer, prediction))
        best = min(rivals, default=None)
        if best is None or best.finish_s > RACE_GAIN * silent_s:
            return None
        reason = f"races {first.node.name}, silent for {silent_s:.1f} s"
        return give_lease(ticket, best.runner.node, best.runner, now, reason, best.prediction)

    def may_race(self, runner: Runner, ticket: Ticket, now: float) -> bool:
        """Tell whether a ticket's second attempt may go to a runner: nobody else waits for its free slot."""
        node = runner.node
        assert ticket.lease is not None
        return (node is not ticket.lease.node and ticket.may_use(node) and not node.suspect and node.is_usable(now)
                and runner.breaker.allows(now) and len(runner.leases) < runner.slots.count
                and not any(self.waiting.first(model) for model in node.rows))


KIND_SAMPLES, MOST_KINDS = 20, 256  # an EWMA over the last twenty; kinds of one model that are kept


class OutputLengths:
    """Learn how many tokens a model answers with, by kind of request and by size of the prompt."""

    def __init__(self) -> None:
        self.mean, self.samples = PRIOR_OUTPUT_TOKENS, 0
        self.buckets: dict[int, list[float]] = {}       # log2 of prompt tokens: [mean, samples]
        self.off: list[float] = []  # the last answers, as long as each was grossly shorter or each grossly longer
        self.prompts = PromptSizes()
        self.kinds: collections.OrderedDict[int, list[float]] = collections.OrderedDict()   # by kind: [mean, samples]

    def expect(self, prompt_tokens: float, kind: int = 0) -> float:
        """Return the expected output tokens: the mean of its kind, drawn to that of its size while it has few samples,
        and that to the model's."""
        mean, samples = self.buckets.get(int(prompt_tokens).bit_length(), (self.mean, 0))
        weight = min(samples, 50)
        by_size = (weight * mean + 4 * self.mean) / (weight + 4)
        if not kind or kind not in self.kinds:
            return by_size
        mean, samples = self.kinds[kind]
        return (samples * mean + by_size) / (samples + 1)

    def learn(self, prompt_tokens: float, output_tokens: float, kind: int = 0) -> None:
        """Take in one finished answer. Many in a row that are grossly off in one direction replace all before them."""
        if kind:
            known = self.kinds.setdefault(kind, [output_tokens, 0])
            self.kinds.move_to_end(kind)
            known[1] = min(known[1] + 1, KIND_SAMPLES)
            known[0] += (output_tokens - known[0]) / known[1]
            if len(self.kinds) > MOST_KINDS:
                self.kinds.popitem(last=False)
        expected = max(1.0, self.expect(prompt_tokens))
        if self.off and (self.off[-1] > expected) != (output_tokens > expected):
            self.off.clear()
        self.off = [*self.off, output_tokens] if not 1 / GROSS <= output_tokens / expected <= GROSS else []
        if len(self.off) >= OFF_LENGTHS:
            self.mean, self.samples = sum(self.off) / len(self.off), len(self.off)
            self.buckets.clear()
            self.off = []
            return
        self.samples += 1
        self.mean += max(OUTPUT_GAIN, 1 / self.samples) * (output_tokens - self.mean)
        bucket = self.buckets.setdefault(int(prompt_tokens).bit_length(), [self.mean, 0])
        bucket[1] += 1
        bucket[0] += max(OUTPUT_GAIN, 1 / bucket[1]) * (output_tokens - bucket[0])


@dataclass(slots=True, eq=False)
class PromptSize:
    """How large the beginning of a prompt is, as a node told it or as it follows from that."""

    chars: int = 0
    images: int = 0
    tokens: float = 0.0             # of the text and the images
    beside_tokens: int = 0          # marks around messages


NO_BEGINNING = PromptSize()


class PromptSizes:
    """Learn how many tokens the prompts of a model are.

    Most prompts of agents and chats begin with one whose size was told, so only what was added is estimated: by its
    characters, and images. Schemas of tools, which templates shorten, have other characters per token than the code
    and the outputs that come after them, and so has each program without tools.
    """

    GAIN, FAST_GAIN, FAR_OFF = 0.1, 0.3, 1.25       # EWMA; of a sample that is so many times off, too
    KIND_GAIN = 0.5                 # of one program
    MOST_KNOWN = 1024               # beginnings, 0.3 KiB each
    LEAD_SHARE = 0.75               # of a prompt: the size of a beginning that is at least so large follows from it
    CUT_CHARS_PER_TOKEN = 16.0      # more than that were added: the node has cut the prompt to its context

    def __init__(self) -> None:
        self.chars_per_token = CHARS_PER_TOKEN
        self.chars_per_token_with_tools = CHARS_PER_TOKEN   # of prompts without a known beginning
        self.chars_per_token_added = CHARS_PER_TOKEN        # to a known beginning with tools
        self.image_tokens = IMAGE_TOKENS
        self.samples: collections.Counter[str] = collections.Counter()      # behind each of these
        self.kinds: collections.OrderedDict[int, float] = collections.OrderedDict()     # characters per token, no tools
        self.known: collections.OrderedDict[int, PromptSize] = collections.OrderedDict()    # by hash of a beginning

    def tokens(self, spec: RequestSpec, known: PromptSize | None = None) -> float:
        """Return the tokens that a prompt is expected to be; `known` is its beginning, if that was looked up."""
        known = known or self.beginning(spec)
        return (known.tokens + max(0, spec.prompt_chars - known.chars) / self.ratio_of(spec, known)
                + max(0, spec.prompt_images - known.images) * self.image_tokens + spec.prompt_tokens)

    def beginning(self, spec: RequestSpec) -> PromptSize:
        """Return the size of the longest known beginning of a prompt."""
        for part, _ in reversed(spec.prefix):
            if part in self.known:
                return self.known[part]
        return NO_BEGINNING

    def ratio_of(self, spec: RequestSpec, known: PromptSize) -> float:
        """Return the characters per token of what is behind the known beginning of a prompt."""
        if not spec.has_tools:
            return self.kinds.get(spec.kind, self.chars_per_token)
        return self.chars_per_token_added if known.chars else self.chars_per_token_with_tools

    def learn(self, spec: RequestSpec, tokens: float) -> None:
        """Take in how many tokens a prompt was. With images in it the text is known better than they are."""
        tokens -= spec.prompt_tokens
        known = self.beginning(spec)
        chars, images = spec.prompt_chars - known.chars, spec.prompt_images - known.images
        added = tokens - known.tokens
        if images > 0:
            self.blend("image_tokens", (added - chars / self.ratio_of(spec, known)) / images)
        elif chars > 200 and added > 0 and not (known.chars and chars > self.CUT_CHARS_PER_TOKEN * added):
            self.learn_ratio(spec, known, chars / added)
        if tokens > 0 and spec.prefix and not spec.embeds:      # parts of a batch all have the prefix of the whole
            self.remember(spec, tokens, known)

    def learn_ratio(self, spec: RequestSpec, known: PromptSize, sample: float) -> None:
        """Take in how many characters a token had behind the known beginning of a prompt."""
        if spec.has_tools:
            self.blend("chars_per_token_added" if known.chars else "chars_per_token_with_tools", sample)
            return
        if spec.kind not in self.kinds:     # only the first of a kind tells about others
            self.blend("chars_per_token", sample)
        if spec.kind:
            self.kinds[spec.kind] = blend(self.ratio_of(spec, known), sample, self.KIND_GAIN)
            self.kinds.move_to_end(spec.kind)
            if len(self.kinds) > MOST_KINDS:
                self.kinds.popitem(last=False)

    def remember(self, spec: RequestSpec, tokens: float, known: PromptSize) -> None:
        """Note the size of a prompt, and of its lead, with which the next conversation of its program begins."""
        if spec.has_tools and not known.chars and not spec.prompt_images:
            for part, chars in spec.prefix[:PREFIX_FIRST]:
                behind_tokens = (spec.prompt_chars - chars) / self.chars_per_token_added
                if chars >= self.LEAD_SHARE * spec.prompt_chars and behind_tokens < tokens:
                    self.known[part] = PromptSize(chars, 0, tokens - behind_tokens)
        self.known[spec.prefix[-1][0]] = PromptSize(spec.prompt_chars, spec.prompt_images, tokens, spec.prompt_tokens)
        for part, _ in spec.prefix:
            if part in self.known:
                self.known.move_to_end(part)
        while len(self.known) > self.MOST_KNOWN:
            self.known.popitem(last=False)

    def blend(self, name: str, sample: float) -> None:
        """Take a sample into one of the estimates."""
        if sample > 0:
            self.samples[name] += 1
            known = getattr(self, name)
            gain = self.GAIN if 1 / self.FAR_OFF < sample / known < self.FAR_OFF else self.FAST_GAIN
            setattr(self, name, blend(known, sample, max(gain, 1 / (self.samples[name] + 1))))


@dataclass(slots=True)
class Demand:
    """What a request asks for, in the tokens that it is expected to cost."""

    spec: RequestSpec
    prompt_tokens: float
    output_tokens: float
    samples: int                    # answers that the model's lengths were learned from
    inputs: int = 0                 # texts to embed
    known: PromptSize = NO_BEGINNING    # of its prompt

    def tokens_of(self, chars: int) -> float:
        """Return how many tokens the first characters of the prompt are: a share of its known beginning or, if they are
        more than that, all of it and a share of the rest."""
        known, tokens = self.known, min(self.known.tokens + self.known.beside_tokens, self.prompt_tokens)
        if chars <= known.chars:
            return tokens * chars / max(1, known.chars)
        share = (chars - known.chars) / max(1, self.spec.prompt_chars - known.chars)
        return tokens + share * (self.prompt_tokens - tokens)


UNKNOWN_LENGTHS = OutputLengths()   # of a model that has not answered yet


class Arrivals:
    """How many requests of a model come per second, over the last minute, and whether some of them always wait."""

    SPAN_S = 60.0
    STEADY_S = 15.0                 # the least that waited is that of one to two such spans
    GAP_S = 2.0                     # several looks at the queue; without one for so long nobody has waited

    def __init__(self) -> None:
        self.at_s, self.per_s = -math.inf, 0.0
        self.looked_s = self.turned_s = -math.inf   # last look at its queue; when the present span began
        self.least, self.least_before = 0, 0        # that waited, in the present span and in the one before

    def rate(self, now: float) -> float:
        """Return the requests per second: an EWMA over time."""
        return self.per_s * math.exp((self.at_s - now) / self.SPAN_S)

    def add(self, now: float) -> None:
        """Count a request."""
        self.at_s, self.per_s = now, self.rate(now) + 1 / self.SPAN_S

    def look(self, queued: int, now: float) -> int:
        """Note how many wait; return how many have always waited for at least STEADY_S."""
        if now - self.looked_s > self.GAP_S:
            self.turned_s, self.least, self.least_before = now, queued, 0
        elif now - self.turned_s >= self.STEADY_S:
            self.turned_s, self.least_before, self.least = now, min(self.least, queued), queued
        self.looked_s, self.least = now, min(self.least, queued)
        return min(self.least, self.least_before)


class Estimates:
    """What the cluster has learned of models, whichever node they ran on."""

    def __init__(self) -> None:
        self.lengths: collections.defaultdict[str | None, OutputLengths] = collections.defaultdict(OutputLengths)
        self.paces = Paces()
        self.arrivals: collections.defaultdict[str | None, Arrivals] = collections.defaultdict(Arrivals)    # on nodes

    def demand(self, spec: RequestSpec) -> Demand:
        """Return the Demand of a request: its prompt by the model's own characters per token, and its mean output."""
        lengths = self.lengths.get(spec.model, UNKNOWN_LENGTHS)
        known = lengths.prompts.beginning(spec)
        prompt_tokens = lengths.prompts.tokens(spec, known)
        output_tokens = 0.0 if spec.embeds else lengths.expect(prompt_tokens, spec.kind)
        if spec.max_output is not None:
            output_tokens = min(output_tokens, spec.max_output)
        return Demand(spec, prompt_tokens, output_tokens, lengths.samples, spec.inputs if spec.embeds else 0, known)

    def learn_prompt(self, spec: RequestSpec, prompt_tokens: float) -> None:
        """Take in how many tokens a prompt was, if its answer told."""
        if prompt_tokens:
            self.lengths[spec.model].prompts.learn(spec, prompt_tokens)

    def demand_of(self, ticket: Ticket) -> Demand:
        """Return the Demand of a ticket, reckoned anew if its model has answered since."""
        demand = ticket.demand
        is_old = demand is None or demand.samples != self.lengths.get(ticket.spec.model, UNKNOWN_LENGTHS).samples
        if demand is None or is_old and ticket.peer is None:
            demand = ticket.demand = self.demand(ticket.spec)
        return demand


LATE = 6.0                          # times its usual pause: then a conversation is not waited for
MOST_PACES = 1000                   # conversations that are remembered


@dataclass(slots=True)
class Pace:
    """How soon a conversation goes on: an agent's tools take seconds, a person reads."""

    GAIN: ClassVar[float] = 0.3

    waiting: int = 0                # its requests in the waiting room
    running: int = 0                # and on nodes
    ended_s: float = -math.inf      # when the last one ended
    gap_s: float = math.inf         # EWMA of the time from the end of one to the next; infinite = never seen

    def begin(self, now: float) -> None:
        """Note that a request of it came."""
        if not (self.waiting or self.running) and self.ended_s > -math.inf:
            gap_s = now - self.ended_s
            self.gap_s = gap_s if self.gap_s == math.inf else self.gap_s + self.GAIN * (gap_s - self.gap_s)

    def end(self, now: float) -> None:
        """Note that one that ran has ended."""
        self.running -= 1
        self.ended_s = now

    def is_back_within(self, seconds: float, now: float) -> bool:
        """Tell whether its next request waits, or is expected within so many seconds from the end of the last one."""
        if self.running:
            return False
        return self.waiting > 0 or self.gap_s < seconds and now - self.ended_s < LATE * self.gap_s


class Paces:
    """The Pace of each conversation, the last ones."""

    def __init__(self) -> None:
        self.known: collections.OrderedDict[tuple[str, int], Pace] = collections.OrderedDict()

    def begin(self, spec: RequestSpec, now: float) -> Pace | None:
        """Return the Pace of a new request's conversation, if it belongs to one."""
        if not spec.session or len(spec.prefix) < CONVERSATION_PARTS:
            return None
        account = spec.client, spec.session
        pace = self.known.get(account)
        if pace is None:
            pace = self.known[account] = Pace()
        self.known.move_to_end(account)
        pace.begin(now)
        if len(self.known) > MOST_PACES:
            self.known.popitem(last=False)
        return pace


# Of a runner: how many run there as if each were alone; seconds a request, a prompt token, an output token, a text.
Rates = tuple[float, float, float, float, float]


class ClusterRates:
    """How fast the whole cluster is with a model: what fair share charges by."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.rates: dict[str | None, tuple[float, int, list[Rates]]] = {}       # when reckoned, after which changes

    def cost_s(self, demand: Demand, now: float) -> float:
        """Return how long a request would keep the whole cluster busy, with all slots of all nodes at work on it.

        Fair share stands and falls with this: were it too little, whoever keeps the queue full would owe nothing.
        """
        spec, inputs = demand.spec, demand.inputs
        prompt_tokens, output_tokens = demand.prompt_tokens, demand.output_tokens
        per_s = sum([at_once / (overhead_s + prompt_tokens * token_s + output_tokens * decoded_s + inputs * text_s)
                     for at_once, overhead_s, token_s, decoded_s, text_s in self.rates_of(spec.model, now)])
        return 1 / per_s if per_s else 0.0

    def rates_of(self, model: str | None, now: float) -> list[Rates]:
        """Return what a model's nodes need for it: reckoned anew LOOK_AGAIN_S later, or when a node has changed."""
        at_s, changes, rates = self.rates.get(model, (-math.inf, -1, []))
        holders = self.cluster.holders.get(model)
        if not holders:             # nothing is kept of names that clients make up
            self.rates.pop(model, None)
            return []
        if changes != self.cluster.changes.count or now - at_s > LOOK_AGAIN_S:
            rates = [(runner.slots.count / runner.batching.slowdowns[min(runner.slots.count, 256)],
                      runner.node.overhead_s, runner.prefill_s(), runner.decode_s(), runner.input_s())
                     for runner in holders]
            self.rates[model] = now, self.cluster.changes.count, rates
        return rates


def left_s(lease: Lease, slow: float, now: float) -> float:
    """Return when a running request is predicted to end, in seconds from now; if it shows no progress, by the clock."""
    left_s = solo_left_s(lease, now) * slow
    if lease.ticket.spec.stream:
        return left_s
    return min(left_s, max(lease.predicted_end_s - now, 0.3 * left_s))


Place = tuple[float, int, list[float], Runner]      # of a heap: when it is free, tie-break, slot, runner


class Forecast:
    """When will waiting requests begin, one after the other, on the nodes that can serve them?

    A slot of a node is taken by one request after the other, of any model, and is busy at first with what runs there.
    """

    def __init__(self, cluster: Cluster, now: float) -> None:
        self.cluster, self.now = cluster, now
        self.slots: dict[Node, list[list[float]]] = {}      # [[when a slot is free, in seconds from now], ...]
        self.heaps: dict[str | None, list[Place]] = {}      # of each model
        self.costs_s: dict[tuple[Runner, int, int, int], float] = {}     # by the size of a demand: its time in a slot

    def slots_of(self, node: Node) -> list[list[float]]:
        """Return the slots of a node, busy until what runs there now is predicted to end."""
        if node not in self.slots:
            count = max((runner.slots.count for runner in node.runners.values() if runner.on_disk), default=1)
            ends_s = sorted(left_s(lease, slowdown(node, runner), self.now)
                            for runner in node.busy for lease in runner.leases)[-count:]
            self.slots[node] = [[end_s] for end_s in [0.0] * (count - len(ends_s)) + ends_s]
        return self.slots[node]

    def heap_for(self, demand: Demand) -> list[Place]:
        """Return the slots where a model can run, the first one free on top; none before the model is there."""
        heap = []
        for runner in self.cluster.servers(demand.spec.model, self.now):
            slots = self.slots_of(runner.node)
            start_s, ready_s, *_ = NodeSnapshot(runner.node, self.now).offer(runner, self.now).start(demand, self.now)
            least_s = start_s if runner.slots.count < len(slots) else ready_s   # its own slots, or all of the node's
            heap += [(max(slot[0], least_s), id(slot), slot, runner) for slot in slots]
        heapq.heapify(heap)
        return heap

    def cost_s(self, runner: Runner, demand: Demand) -> float:
        """Return how long a request takes in a slot while all others are busy; once for all that are much alike."""
        prompt, inputs = (round(4 * math.log2(1 + size)) for size in (demand.prompt_tokens, demand.inputs))
        alike = runner, prompt, inputs, round(demand.output_tokens)
        if alike not in self.costs_s:
            count = min(len(self.slots_of(runner.node)), 256)
            self.costs_s[alike] = alone_s(runner, demand) * runner.batching.slowdowns[count]
        return self.costs_s[alike]

    def start_s(self, demand: Demand) -> float | None:
        """Let the next request take the first slot that is free; return when. None if no node can serve it."""
        model = demand.spec.model
        if model not in self.heaps:
            self.heaps[model] = self.heap_for(demand)
        heap = self.heaps[model]
        if not heap:
            return None
        while heap[0][2][0] > heap[0][0]:       # taken meanwhile, for this model or another
            _, order, slot, runner = heap[0]
            heapq.heapreplace(heap, (slot[0], order, slot, runner))
        start_s, _, slot, runner = heap[0]
        slot[0] = start_s + self.cost_s(runner, demand)
        return start_s


def is_overdue(lease: Lease, now: float) -> bool:
    """Tell whether a node has shown nothing of anything for much longer than predicted for one of its answers."""
    node = lease.node
    if lease.is_held_up:            # nobody listens to the node
        lease.heard_s = node.heard_s = now
        lease.watch_from(now)
        return False
    return now - max(lease.heard_s, node.heard_s) > allowed_s(lease)


def allowed_s(lease: Lease) -> float:
    """Return for how long an answer may show nothing until it is overdue."""
    if lease.first_s is None or lease.ticket.spec.silent:
        return lease.quiet_s
    runner = lease.slot
    gap_s = runner.decode_s() * slowdown(lease.node, runner) / runner.speeds.lines_per_token
    return max(SILENT_S, 10 * gap_s, 10 * (lease.heard_s - lease.first_s) / max(1, lease.lines))


def judge_speed(lease: Lease, now: float) -> None:
    """Compare a stream's lines of the last seconds with what was predicted: the node's speed just now."""
    node, runner = lease.node, lease.slot
    assert lease.first_s is not None        # its stream has begun
    stalled_s = runner.may_stop_s(lease.stall_tokens - lease.watched_stall_tokens)
    elapsed_s = now - max(lease.watched_s, lease.first_s) - stalled_s
    if elapsed_s < JUDGE_S or runner.speeds.samples < 3:
        return
    line_s = runner.decode_s() * slowdown(node, runner) * node.speed / runner.speeds.lines_per_token
    expected = elapsed_s / line_s
    if expected < 4:
        return
    seen = (lease.lines - lease.watched_lines) / expected
    if seen > STREAM_ON_TIME_SHARE:
        seen = 1.0                  # above 1 nothing counts, so noise below it must not either: speeds would drift
    node.slow_down(seen)
    lease.watch_from(now)


# -----------------------------------------------------------------------------
# Readiness: which models should be in memory, and which nodes awake, before a request needs them?
#
# A model is loaded without a request of its own where load= of hosts.txt wants it, or where that shortens a queue by
# more than it costs. Only a node that does nothing for us is asked, and a load gives way to requests that another one
# would wait for. What load= wants pushes out nothing that was used lately; what a queue wants nothing at all that is
# still asked for. A node with mac= that is down is called when work waits that it would finish sooner than the others.
# -----------------------------------------------------------------------------

IDLE_S = 5.0                        # so long a node does nothing for us before load= loads something there
KEEP_PAUSE_S = 10.0                 # between two requests to keep a model that others' requests let expire
HORIZON_S = 120.0                   # a load for a queue must pay within that
PAYS = 2.0                          # seconds of waiting that such a load saves for each second that it takes
DEMAND_PAUSE_S = 60.0               # between two such loads on a node
MOST_JUDGED = 1024                  # waiting tickets, when it is asked whether to wake a node: 3 ms


class Wanted(NamedTuple):
    """A model that a node is to load, or to keep loaded, now."""

    runner: Runner
    keep: bool                      # for ever, as load= wants it; else as long as the node keeps it by itself


def is_free(node: Node, waiting: WaitingRoom, now: float) -> bool:
    """Tell whether a node does nothing for us and nobody waits for one of its models."""
    return (node.is_usable(now) and node.indexed and not node.leases and not node.suspect
            and not any(waiting.first(model) for model in node.rows))


def used_lately(runner: Runner, now: float) -> bool:
    """Tell whether somebody would miss a model: its last use is not longer ago than the node keeps it."""
    used_s = max(runner.used_s, runner.seen_used_s)
    return bool(runner.leases) or now - used_s < min(runner.keep_alive_s, KEEP_LOADED_S)


def wish_for(runner: Runner) -> Wish | None:
    """Return the Wish for a model, under whichever of its names; None if load= does not want it there."""
    return next((runner.node.wishes[model] for model in runner.models if model in runner.node.wishes), None)


def may_push_out(runner: Runner, now: float) -> bool:
    """Tell whether load= may push a model out for another one."""
    wish = wish_for(runner)
    return wish.given_up if wish else not used_lately(runner, now)


def wanted_by_line(node: Node, now: float) -> Runner | None:
    """Return the model that load= wants in the memory of a node that is free, and that is not to stay there yet."""
    for model, wish in node.wishes.items():
        if model not in node.rows or wish.given_up:
            continue
        runner = node.runners[model]
        if runner.ready_s is not None:
            wish.stays(now)
            if runner.keep_alive_s < math.inf and now - wish.kept_s >= KEEP_PAUSE_S:
                return runner
        elif (now >= wish.retry_at_s and now - node.heard_s >= IDLE_S
              and all(may_push_out(other, now) for other in evicted_for(runner))):
            return runner
    return None


def waited_s(queued: float, growth_per_s: float, from_s: float, to_s: float) -> tuple[float, float]:
    """Return (seconds that requests wait in all, how many wait at the end) of a queue that grows or shrinks evenly."""
    span_s = max(0.0, to_s - from_s)
    end = queued + growth_per_s * span_s
    if end >= 0:
        return (queued + end) / 2 * span_s, end
    return queued * queued / (-2 * growth_per_s), 0.0


def requests_per_s(runner: Runner, demand: Demand) -> float:
    """Return how many requests like one a runner ends per second with all its slots at work."""
    return runner.slots.count / (alone_s(runner, demand) * slowdown(runner.node, runner, 1, full=True))


def saved_s(queued: int, growth_per_s: float, more_per_s: float, ready_s: float) -> float:
    """Return the seconds of waiting that another node saves within HORIZON_S, if it serves from `ready_s` on.

    Without it the queue grows by `growth_per_s`, with it by `more_per_s` less.
    """
    without_s, _ = waited_s(queued, growth_per_s, 0.0, HORIZON_S)
    before_s, left = waited_s(queued, growth_per_s, 0.0, min(ready_s, HORIZON_S))
    after_s, _ = waited_s(left, growth_per_s - more_per_s, ready_s, HORIZON_S)
    return without_s - before_s - after_s


def may_load_for_queue(runner: Runner, cluster: Cluster, now: float) -> bool:
    """Tell whether a queue's model may be loaded on an idle node: that pushes out nothing that is still asked for."""
    node = runner.node
    return (node.is_usable(now) and not node.leases and not node.suspect and runner.breaker.allows(now)
            and runner.ready_s is None and now - node.demand_s >= DEMAND_PAUSE_S
            and not any(wish_for(other) or used_lately(other, now) or cluster.is_asked_for(other, now)
                        for other in evicted_for(runner)))


def wanted_by_queue(dispatcher: Dispatcher, now: float) -> Runner | None:
    """Return a model that tickets wait for, on the idle node where its load saves most of their waiting; None if no
    load pays."""
    cluster, best_s, best = dispatcher.cluster, 0.0, None
    if dispatcher.policy.binds_early or not dispatcher.waiting.tickets:
        return None
    queues = collections.Counter(ticket.spec.model for ticket in dispatcher.waiting.tickets)
    for model, queued in queues.items():
        holders = [runner for runner in cluster.holders.get(model, ()) if runner.node.is_usable(now)]
        loaded = [runner for runner in holders if runner.ready_s is not None]
        free = [runner for runner in holders if may_load_for_queue(runner, cluster, now)] if loaded else []
        entry = dispatcher.waiting.first(model)
        if not free or entry is None or model not in cluster.estimates.arrivals:
            continue
        demand, arrivals = cluster.estimates.demand_of(entry[2]), cluster.estimates.arrivals[model]
        steady = arrivals.look(queued, now)
        growth_per_s = arrivals.rate(now) - sum(requests_per_s(other, demand) for other in loaded)
        for runner in free:
            ready_s, _ = runner.node.snapshot(now).offer(runner, now).load(now)
            more_per_s = requests_per_s(runner, demand)
            saving_s = max(saved_s(queued, growth_per_s, more_per_s, ready_s),
                           saved_s(steady, 0.0, more_per_s, ready_s)) - PAYS * ready_s
            if fits(runner, demand) and saving_s > best_s:
                best_s, best = saving_s, runner
    return best


def wanted_loads(dispatcher: Dispatcher, now: float) -> list[Wanted]:
    """Return what nodes are to load now, at most one model each."""
    wanted = [Wanted(runner, True) for node in dispatcher.cluster.nodes.values()
              if node.wishes and is_free(node, dispatcher.waiting, now) and (runner := wanted_by_line(node, now))]
    queued = wanted_by_queue(dispatcher, now)
    return wanted if queued is None else [*wanted, Wanted(queued, False)]


def judge_load(runner: Runner, missed: list[Runner]) -> tuple[Wish | None, str]:
    """Take in what a load for load= did to its node's memory. Return (Wish that is to be warned of, why), (None, "") if
    all is well.

    `missed`: the models that have gone meanwhile and that load= wants, or that were used lately. Of two of load= that
    do not fit together the one that is named first stays.
    """
    wish, order = wish_for(runner), list(runner.node.wishes.values())
    assert wish is not None         # as load= wants it
    wish.unfinished = False
    if runner.ready_s is None:
        return wish, "it was loaded and has gone again: it may not fit"
    for other in missed:
        rival = wish_for(other)
        if rival is not None:
            loser, winner = (wish, other) if order.index(rival) < order.index(wish) else (rival, runner)
            loser.given_up = True
            return loser, f"it does not fit beside {winner.model}, which is named first"
    names = ", ".join(other.model for other in missed)
    return (wish, f"it does not fit beside {names}, which it has pushed out") if missed else (None, "")


def nodes_to_wake(dispatcher: Dispatcher, now: float) -> list[Node]:
    """Return the sleeping nodes that would finish waiting work sooner than the others; each once a minute at most."""
    asleep = [node for node in dispatcher.cluster.nodes.values()
              if can_wake(node, now) and now - node.sleep.called_s >= Sleep.PAUSE_S]
    if not asleep or not dispatcher.waiting.tickets:
        return []
    forecast, wake = Forecast(dispatcher.cluster, now), []
    for ticket in dispatcher.waiting.in_order()[:MOST_JUDGED]:
        demand, model = dispatcher.cluster.estimates.demand_of(ticket), ticket.spec.model
        start_s = forecast.start_s(demand)
        others = dispatcher.cluster.servers(model, now)
        sooner = min((alone_s(other, demand) for other in others), default=0.0) + (start_s or 0.0)
        for node in asleep:
            unseen = not node.rows and not dispatcher.cluster.holders.get(model)    # it may have what nobody has
            if node in wake or not (model in node.rows or unseen) or not ticket.may_use(node):
                continue
            runner = node.runners.get(model or "")
            there_s = node.sleep.left_s(now) + (runner.load_s() + alone_s(runner, demand) if runner else 0.0)
            if start_s is None or there_s < sooner:
                wake.append(node)
    return wake


MAGIC_PORT = 9                      # discard: nobody need listen for a magic packet


def magic_packet(mac: str) -> bytes:
    """Return what wakes up the machine whose network card has this address, of 12 hexadecimal digits."""
    return b"\xff" * 6 + bytes.fromhex(mac) * 16


def packet_addresses(settings: NodeSettings, addresses: list[str]) -> list[Server]:
    """Return where a node's magic packet goes: to `wake=`, else to all machines of this network, and to those of the
    node's own, which is taken for a /24. `addresses`: those of the host of `wake=`, else the node's."""
    known = [address for address in addresses if ":" not in address]    # IPv6 has no broadcast
    if settings.wake:
        return [(address, int(settings.wake.rpartition(":")[2])) for address in known]
    near = [f"{address.rpartition('.')[0]}.255" for address in known]
    return [(address, MAGIC_PORT) for address in dict.fromkeys(("255.255.255.255", *near))]


# -----------------------------------------------------------------------------
# Inference: how is a request served that needs a slot?
#
# It waits for a lease, and sends the request to the leased node. What fails before the client has a byte is tried on
# another node: by the kind of failure, at most MAX_ATTEMPTS times, at the same place in the queue. An attempt that is
# far overdue is raced by a second one. Whatever ends it, a lease is released once, in the `finally` around it.
# -----------------------------------------------------------------------------

# What the status of a node's answer says, and never its text: no list of texts is complete. Before a client has seen a
# byte, all of these move a request on.
BUSY_STATUSES = frozenset((408, 425, 429, 503, 508))    # 508: a gateway as a node, and its way leads back here
PROXY_STATUSES = frozenset((401, 403, 502, 504, *range(300, 400), *range(520, 531)))    # of what stands before a node
TOO_LONG = re.compile(rb"context|too long|exceed", re.I)
UNSUPPORTED = re.compile(rb"support", re.I)
TOLD_TOKENS = re.compile(rb'n_prompt_tokens\W{1,9}(\d{1,9})|(\d{1,9}) tokens\)? exceed')     # of llama-server
FIRST_ERROR = re.compile(rb'\s*(?:data:\s*)?\{\s*"error"\s*:|event:\s*error')


def failover_kind(status: int, body: bytes, has_model: bool) -> str | None:
    """Return why another node is tried after an error answer; None if the client gets this answer.

    model: the runner is broken; busy: the node is busy; proxy: the error is of a proxy before the node; missing: the
    node does not have the model after all; route: the node is older and does not know the path; length, feature: a
    larger window or another version may help. If no node has the model (cloud models), most errors are the client's.
    """
    if status == 200 or status >= 500:
        return "busy" if status in BUSY_STATUSES else "proxy" if status in PROXY_STATUSES else "model"
    if not has_model:
        return None
    if status == 404:
        return "missing" if b"not found" in body and b"model" in body else "route"
    if status == 400:
        return "length" if TOO_LONG.search(body) else "feature" if UNSUPPORTED.search(body) else None
    return "busy" if status in BUSY_STATUSES else "proxy" if status in PROXY_STATUSES else None


class NodeAnswer(NamedTuple):
    """A node's own error answer, kept while another node is tried. If all refuse, the client gets the last one."""

    node: str                       # its name
    kind: str | None                # see failover_kind
    head: ResponseHead
    body: bytes

    @property
    def text(self) -> str:
        return f"answered {self.head.status}: {error_text(self.body)}".rstrip(": ")

    def error(self) -> Exception:
        """Return the exception that tells it."""
        return NodeRefused(self)


class NodeRefused(Exception):
    """A node has answered with an error of its own."""

    def __init__(self, value: NodeAnswer) -> None:
        super().__init__(f"{value.node}: {value.text}")
        self.value = value


async def begin(exchange: Exchange, lease: Lease) -> Begun:
    """Send a request to the leased node and wait until its answer has begun, however long that takes.

    Raises NodeFailure or NodeRefused: the client has seen nothing, so another node may answer. A stream begins with its
    first bytes: if they tell an error, or there are none, it counts as an answer with an error status.
    """
    pool, spec, head = exchange.gateway.node_io.pools[lease.node], exchange.spec, exchange.head

    def on_connection(connection: NodeConnection) -> None:
        lease.abandon = connection.fail
        if lease.lost_to is not None:
            connection.fail(lease.lost_to)

    lead, body = exchange.as_sent_to(lease.node)
    request = render_request(head, lease.node.settings, len(lead) + len(body)) + lead
    repeatable = spec.repeatable and not spec.change
    connection, answer = await pool.request(request, head.method, on_connection, repeatable, body)
    has_begun = False
    try:
        if spec.inference and await shows_failure(connection, answer):
            text = await Collector(connection, answer).collect()
            kind = failover_kind(answer.status, text, lease.runner is not None)
            raise NodeRefused(NodeAnswer(lease.node.name, kind, answer, text))
        has_begun = True
        return Begun(lease, connection, answer, bool(lead))
    finally:
        lease.abandon = None
        if not has_begun:
            pool.give_back(connection)


async def shows_failure(connection: NodeConnection, answer: ResponseHead) -> bool:
    """Tell whether an answer is an error, begins with one, or is empty. Only of a stream bytes of the body are read."""
    if answer.status != 200:
        return answer.status >= 300
    if is_stream(answer):
        payload = await connection.first_payload(answer)
        return not payload or FIRST_ERROR.match(payload) is not None
    return answer.length == 0


def pump(gateway: Gateway) -> None:
    """Let the dispatcher assign tickets to nodes, and wake the requests that it decided on.

    If another process of this gateway works on the same nodes, only once this one may, and with word to that one. Peers
    are told, too.
    """
    now = gateway.loop.time()
    if gateway.upgrade.may_give_slots(now):
        leases, refused = gateway.dispatcher.dispatch(now)
        if leases or refused:
            wake([*(lease.ticket for lease in leases), *refused])
    gateway.upgrade.spread()
    gateway.peers.spread()


def wake(tickets: Iterable[Ticket]) -> None:
    """Wake the requests of tickets that have a lease or a refusal now."""
    for ticket in tickets:
        if ticket.waiter is not None and not ticket.waiter.done():
            ticket.waiter.set_result(None)


async def acquire_lease(gateway: Gateway, ticket: Ticket) -> Lease:
    """Return the lease of a ticket, once it has one. Raises Refusal."""
    pump(gateway)
    while ticket.lease is None:
        if ticket.refusal is not None:
            raise ticket.refusal.error()
        ticket.waiter = gateway.loop.create_future()
        await ticket.waiter
    return ticket.lease


class Race:
    """A second attempt beside one that is far overdue, on another node: the first byte wins.

    It owns a task and a lease. `winner` hands their answer over to the caller; otherwise `close` ends both, once.
    """

    def __init__(self, inference: Inference, first: Lease, lease: Lease) -> None:
        self.inference, self.first, self.lease = inference, first, lease
        self.is_closed = False
        self.task = inference.loop.create_task(self.run())

    async def run(self) -> Begun | None:
        """Run the attempt; if it wins, the first one is given up."""
        inference, begun = self.inference, None
        with contextlib.suppress(Refusal):      # the gateway has no socket left
            begun = await inference.attempt(self.lease)
        stream = begun_stream(inference.exchange)
        if begun is not None and stream is not None:
            begun = await self.rehearsed(begun, stream)
        if begun is not None:
            self.first.lost_to = Failure("raced", f"{self.lease.node.name} was faster")
            if self.first.abandon is not None:
                self.first.abandon(self.first.lost_to)
        inference.gateway.telemetry.metrics.races[self.lease.node.name, "yes" if begun else "no"] += 1
        return begun

    async def rehearsed(self, begun: Begun, stream: LineRelay) -> Begun | None:
        """Return an answer if it can continue the client's stream.

        None if it says something else, if the first attempt sent more meanwhile, or if the stream is too long to keep.
        """
        inference, transcript = self.inference, stream.transcript
        known, is_taken = transcript.all_known(), False
        try:
            await rehearse(begun, known)
            has_gone_on = not self.first.released and transcript.all_known() != known
            is_taken = not has_gone_on and stream.can_be_continued()
        except NodeFailure as failed:
            inference.note(begun.lease, failed.value)
        except Refusal:
            inference.ticket.tried.add(begun.lease.node.name)
        finally:
            if not is_taken:
                inference.close(begun)
        return begun if is_taken else None

    async def winner(self) -> Begun | None:
        """Wait for the attempt and return its answer, which the caller owns then; None if it failed."""
        begun = await self.task
        self.is_closed = True
        return begun

    def close(self) -> None:
        """Give the attempt up, with its lease and its answer, unless they were handed over.

        The lease ends here, not in the task: one that is cancelled before its first step does nothing at all.
        """
        if self.is_closed:
            return
        self.is_closed = True
        if self.task.cancel():
            self.inference.end(self.lease)
        elif not self.task.cancelled() and (begun := self.task.result()) is not None:
            self.inference.close(begun)


NO_ANSWER = Answer(502, "no node answered")


class Inference:
    """One inference request on its way to an answer: a ticket, and the attempts to serve it, two at once at most."""

    def __init__(self, exchange: Exchange, ticket: Ticket) -> None:
        self.exchange, self.record, self.ticket = exchange, exchange.record, ticket
        self.gateway, self.loop = exchange.gateway, exchange.gateway.loop
        self.dispatcher = self.gateway.dispatcher
        self.race: Race | None = None       # under way
        self.last: Answer | NodeAnswer = NO_ANSWER

    async def run(self, take: Take) -> None:
        """Try one node after the other until the client has an answer. Raises Refusal or NodeRefused."""
        try:
            while True:
                try:
                    begun = await self.next_answer()
                except Refusal as refusal:
                    if self.ticket.attempts and refusal.status == 502:
                        break       # what the last node said is a better answer
                    raise
                if begun is not None:
                    if await self.pass_on(begun, take):
                        return
                    if stream := begun_stream(self.exchange):
                        stream.transcript.rewind(begun.lease.node.name)
                        self.ticket.pin_version_of(begun.lease.node)
                is_final = isinstance(self.last, NodeAnswer) and self.last.kind is None
                if self.race is None and (is_final or not self.dispatcher.retry(self.ticket, self.loop.time())):
                    break
            if isinstance(self.last, NodeAnswer):
                self.ticket.forgive()
            raise self.last.error()
        finally:
            self.ticket.race = None
            self.end_race()

    async def next_answer(self) -> Begun | None:
        """Wait for the attempts that run, until one begins to answer; None if they failed: the request may move on."""
        if self.race is None:
            lease = await acquire_lease(self.gateway, self.ticket)
            if not self.record.attempts:
                self.record.queue_s = lease.sent_s - self.ticket.arrived_s
            self.record.node, self.record.reason = lease.node.name, lease.reason
            self.ticket.race = self.begin_race
            begun = await self.attempt(lease)
            self.ticket.race = None
            if begun is not None:
                self.end_race()
                return begun
        begun = await self.race.winner() if self.race else None
        self.race = None
        return begun

    async def attempt(self, lease: Lease) -> Begun | None:
        """Wait until the leased node begins to answer; None if it failed. The lease ends here unless it did begin."""
        self.record.attempts += 1
        begun = None
        try:
            begun = await begin(self.exchange, lease)
        except (NodeRefused, NodeFailure) as failed:
            self.note(lease, failed.value)
        finally:
            if begun is None:
                self.end(lease)
        return begun

    async def pass_on(self, begun: Begun, take: Take) -> bool:
        """Pass an answer that has begun to the client; return False if it failed and another node may answer."""
        lease, record = begun.lease, self.record
        record.node, record.reason = lease.node.name, lease.reason
        if lease.loads:
            self.gateway.node_io.begin_job(lease.node, NodeIO.look_after_load)
        if self.exchange.transcript:    # if the stream falls silent, a replay may race it
            self.ticket.race, lease.abandon = self.begin_race, begun.connection.fail
        try:
            await take(self.exchange, begun)
            return True
        except (NodeRefused, NodeFailure) as failed:
            self.note(lease, failed.value)
            return False
        finally:
            self.ticket.race = lease.abandon = None
            self.close(begun)

    def begin_race(self, lease: Lease) -> None:
        """Begin a second attempt, on another node."""
        assert self.ticket.lease is not None    # the first attempt's
        self.race = Race(self, self.ticket.lease, lease)

    def end_race(self) -> None:
        """Give up the second attempt, if there is one."""
        if self.race is not None:
            self.race.close()
            self.race = None

    def note(self, lease: Lease, failed: Failure | NodeAnswer) -> None:
        """Keep the last failure or answer of a node, and count it as a failure of the node if it was one."""
        if failed.kind == "raced":
            return
        if isinstance(failed, NodeAnswer):
            self.last = failed
            if failed.kind == "length":
                tokens = TOLD_TOKENS.search(failed.body)
                self.dispatcher.learn_too_long(lease, int(tokens[1] or tokens[2]) if tokens else 0)
        elif not isinstance(self.last, NodeAnswer):
            self.last = Answer(502, f"{lease.node.name}: {failed.text}")
        if failed.kind is not None:
            self.gateway.node_io.record_failure(lease, failed)

    def end(self, lease: Lease) -> None:
        """End a lease and give its slot to others; if the client left, it ended with the ticket before."""
        if not lease.released:
            self.dispatcher.release(lease, self.loop.time())
            pump(self.gateway)

    def close(self, begun: Begun) -> None:
        """Give back what an answer was received with."""
        self.gateway.node_io.pools[begun.lease.node].give_back(begun.connection)
        self.end(begun.lease)


# What is done with an answer that has begun. Raises NodeFailure or NodeRefused if another node may answer.
Take = Callable[["Exchange", "Begun"], Awaitable[None]]


async def serve_inference(exchange: Exchange, take: Take | None = None) -> None:
    """Wait for a slot, run the request, and fail over until it is answered. Raises Refusal or NodeRefused."""
    gateway, dispatcher, loop = exchange.gateway, exchange.gateway.dispatcher, exchange.gateway.loop
    if exchange.spec.deterministic and gateway.options.rescue:
        exchange.transcript = Transcript()
    ticket = dispatcher.enter(exchange.record.id, exchange.spec, loop.time(), exchange.version)
    try:
        await Inference(exchange, ticket).run(take or relay_answer)
    except (Refusal, NodeRefused) as ended:
        stream = begun_stream(exchange)
        if stream is None:
            raise
        dispatcher.rescued(whole=False)
        break_off(exchange, stream, str(ended))
    finally:
        had_place = dispatcher.leave(ticket, loop.time())
        exchange.record.held = ticket.held
        if had_place:
            pump(gateway)


# -----------------------------------------------------------------------------
# Upstream: how do the bytes get to a node and back?
#
# A NodeConnection carries one request at a time and then waits in its node's pool. It collects bytes until the head of
# the answer is complete; from then on every piece goes from the socket's callback into a sink: a Relay writes it to the
# client at once, a Collector keeps a short answer. Back-pressure couples the two sockets: while the client's buffer is
# full, nothing is read from the node; for a request body it is the other way round. A connection is used again only if
# its last answer ended exactly where its framing said.
# -----------------------------------------------------------------------------

TAKEN_LINES = 12 * KIB              # of an answer's piece, in one step: 4,096 chunks of one line, 4 ms
READ_LINES, READ_BYTES = KIB, 4 * KIB   # the same where each line is read as JSON, 5 us each; bytes of one step then
ERROR_BODY_BYTES = 1 * MIB          # a node's error answer, held until we know whether another node does better
MAX_INTERIM = 16                    # 1xx answers before one request's own

# There is no first-byte time-out here: an answer's head comes after queue, load and prefill. What ends a
# request is a connection that ends: the kernel finds a vanished machine within 10 + 3 * 5 s.
CONNECT_TIMEOUT_S = 5.0             # SYNs after 0, 1 and 3 s
KEEP_ALIVE_IDLE_S, KEEP_ALIVE_PAUSE_S, KEEP_ALIVE_TRIES = 10, 5, 3
MOST_IDLE_UPSTREAM = 32             # connections kept per node; a node has a few slots
MOST_UNQUEUED = 64                  # requests without a slot, per node at once; the rest waits: descriptors must last


def watch_for_death(sock: socket.socket) -> None:
    """Let the kernel find out whether the other machine is still there, by keep-alive probes.

    TCP_USER_TIMEOUT would also end a connection whose other side is alive and only does not read.
    """
    with contextlib.suppress(OSError, AttributeError):      # a system that has not all of these
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_ALIVE_PAUSE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_ALIVE_TRIES)


# The event that the other side has closed its end, although nothing is read. Systems without it report only a reset.
HAS_LEFT: int = getattr(select, "POLLRDHUP", 0)


def socket_has(transport: Transport, event: int) -> bool:
    """Tell whether something has happened on a socket, before the event loop sees it. True if the socket is closed.

    `event`: HAS_LEFT, or select.POLLIN: there are bytes or an end to be read. Takes 1 us.
    """
    poll = select.poll()            # uvloop's socket object cannot peek, and select() takes no descriptor over 1023
    try:                            # asyncio's TLS transport tells its protocol of the end one turn of the loop later
        poll.register(transport.get_extra_info("socket").fileno(), event)
        return bool(poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return True


class NodeConnection(asyncio.Protocol):
    """One connection to a node."""

    __slots__ = ("loop", "turns", "transport", "buffer", "sink", "waiter", "failure", "ended", "busy", "reused",
                 "clean", "idle_s", "source", "write_paused", "unsent", "settings", "behind", "catching_up")

    def __init__(self, turns: LoopTurns) -> None:
        self.loop, self.turns = turns.loop, turns
        self.transport: asyncio.Transport   # there from connection_made on
        self.settings: NodeSettings | None = None       # what it was made by
        self.unsent: bytes | memoryview = b""       # of a long body
        self.buffer = b""
        self.sink: Sink | None = None
        self.behind = b""           # what the sink has still to take in, a step per turn of the loop
        self.catching_up: asyncio.Task[None] | None = None      # the task that sees to that
        self.waiter: asyncio.Future[None] | None = None     # of whoever waits for the head
        self.failure: Failure | Answer | None = None    # why there will be no (more) answer
        self.ended = False          # the node closed it in good order
        self.busy = True
        self.reused = False
        self.clean = True           # no request, or its answer ended where its framing said: it can be used again
        self.idle_s = 0.0
        self.source: ClientConnection | None = None     # whose reading stops while this socket's buffer is full
        self.write_paused = False

    def connection_made(self, transport: asyncio.Transport) -> None:    # type: ignore[override]  # any socket's is one
        self.transport = transport
        watch_for_death(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        if self.sink is not None:
            if self.behind or len(data) > DECODED_BYTES and self.sink.is_costly(data):
                self.behind += data
                self.transport.pause_reading()
                self.catching_up = self.catching_up or self.loop.create_task(self.catch_up(self.sink))
            else:
                self.sink.data(data)
        elif not self.busy:         # bytes that nobody asked for: they could be taken for the next answer
            self.fail(Failure("garbage", "bytes between two answers"))
        else:
            self.buffer += data
            if len(self.buffer) > READ_AHEAD_BYTES:
                self.transport.pause_reading()
            self.wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.failure is None:
            self.failure = Failure("died", "closed the connection" if exc is None else f"broke off: {exc}")
            self.ended = exc is None
        if self.sink is not None and not self.behind:
            self.sink.lost()
        self.wake()

    async def catch_up(self, sink: Sink) -> None:
        """Feed what is behind to the sink; then read on, or tell the sink that the connection has closed."""
        while self.behind and not sink.over:
            await self.turns.take()
            if self.sink is not sink:
                break
            most = sink.at_most()
            piece, self.behind = self.behind[:most], self.behind[most:]
            sink.data(piece)
        self.clean = self.clean and not self.behind
        self.behind, self.catching_up = b"", None
        if self.sink is not sink:
            return
        if self.failure is not None:
            sink.lost()
        elif self.is_open() and not sink.is_held_up():
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.source is not None:
            self.source.pause_reading()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.source is not None:
            self.source.resume_reading()
        if self.unsent:
            self.send_more()

    def send(self, head: bytes, body: Body | memoryview) -> None:
        """Send a request; a long body goes out in pieces, as the node takes them."""
        self.clean = False
        if len(body) <= SENT_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.unsent = memoryview(body)
            self.send_more()

    def send_more(self) -> None:
        """Send the next piece of a long body; one per turn of the loop."""
        if self.unsent and self.is_open() and not self.write_paused:
            piece, rest = self.unsent[:SENT_BYTES], self.unsent[SENT_BYTES:]
            self.unsent = rest or b""       # an empty view would keep the whole body
            self.transport.write(piece)
            if not self.write_paused:
                self.loop.call_soon(self.send_more)

    def pause_reading(self) -> None:
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on, unless there is still something to be taken in."""
        if not self.behind:
            self.transport.resume_reading()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, failure: Failure | Answer) -> None:
        """End the answer from this side: whoever waits for it gets `failure` instead."""
        self.buffer = b""           # or a complete head in it would still be read
        if self.failure is None:
            self.failure = failure
        if self.sink is not None:
            self.sink.finish(self.failure)
        self.wake()
        self.transport.abort()

    def is_open(self) -> bool:
        """Tell whether a request can be sent here."""
        return self.failure is None and not self.transport.is_closing()

    async def response(self, method: str) -> ResponseHead:
        """Wait for the head of the answer, however long it takes. Raises NodeFailure."""
        scanned = interim = 0
        while True:
            try:
                end = find_head(self.buffer, scanned) if self.buffer else None
                if end is not None:
                    head = parse_response(self.buffer[:end], method)
                    self.buffer, scanned = self.buffer[end:], 0
                    if head.status >= 200:
                        return head
                    interim += 1    # 1xx: the gateway asked for none, the client gets its own
                    if head.status == 101 or interim > MAX_INTERIM:
                        raise ProtocolError("switches protocols or sends no end of interim answers")
                    self.transport.resume_reading()
                    continue
            except ProtocolError as error:
                raise NodeFailure("garbage", f"answered what is not HTTP: {error}") from None
            scanned = len(self.buffer)
            await self.read_more()

    async def read_more(self) -> None:
        """Wait for more bytes. Raises what has ended the connection."""
        if self.failure is not None:
            raise self.failure.error()
        self.waiter = self.loop.create_future()
        await self.waiter

    async def first_payload(self, head: ResponseHead) -> bytes:
        """Wait for the first bytes of a body; return them, but keep them buffered. Empty: b"". Raises NodeFailure."""
        while True:
            body = body_decoder(head.length)
            try:
                payload, _ = body.feed(self.buffer[:DECODED_BYTES])     # more than the framing before any payload
            except ProtocolError as error:
                raise NodeFailure("garbage", f"broke the framing of its answer: {error}") from None
            if payload or body.done or self.ended and head.length == UNTIL_CLOSE:
                return payload
            await self.read_more()

    def attach(self, sink: Sink) -> None:
        """Give what has come after the head, and all that will come, to a sink."""
        self.sink = sink
        self.transport.resume_reading()     # first: what the sink writes now may pause it again
        data, self.buffer = self.buffer, b""
        if data:
            self.data_received(data)
        if self.failure is not None and not self.behind:
            sink.lost()


def trust_in(settings: NodeSettings) -> ssl.SSLContext | None:
    """Return the TLS context for connections to a node, None for plain HTTP. Raises ValueError for a bad ca= file."""
    if not settings.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca or None)
    except ssl.SSLError:
        raise ValueError(f"ca {settings.ca}: there is no certificate in PEM form in it") from None
    except OSError as error:
        raise ValueError(f"ca {settings.ca}: {error.strerror}") from None
    if settings.insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


# The gateway's own lack of sockets: no fault of the node.
EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))


def connect_error_text(error: OSError) -> str:
    """Return the system's words for a connection that failed, each once.

    asyncio's own text tells addresses; that of a name with several addresses has all their errors, and no number.
    """
    if isinstance(error, socket.gaierror):      # its numbers are others
        return error.strerror or str(error)
    numbers = [str(error.errno)] if error.errno else re.findall(r"\[Errno (\d+)\]", str(error))
    return ", ".join(dict.fromkeys(os.strerror(int(number)) for number in numbers)) or str(error)


class Pool:
    """The connections to one node. A connection made with earlier settings is not used again."""

    def __init__(self, settings: NodeSettings, turns: LoopTurns, via: bytes) -> None:
        self.loop, self.turns = turns.loop, turns
        self.via = via              # of the gateway's own questions
        self.idle: list[NodeConnection] = []        # the last used is used next, so that the rest can age
        self.closed = False         # its node was dropped: nothing is kept
        self.unqueued = asyncio.Semaphore(MOST_UNQUEUED)    # of requests without a slot
        self.configure(settings)

    def configure(self, settings: NodeSettings) -> None:
        """Take over settings, for connections from now on."""
        self.settings = settings
        self.tls: ssl.SSLContext | None = None      # the context of the connections, once there is one
        self.prune(math.inf)

    async def connect(self) -> NodeConnection:
        """Return a fresh connection. Raises NodeFailure."""
        node = self.settings        # the certificate is that of its name, whichever its address is
        try:
            self.tls = self.tls or trust_in(node)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await self.loop.create_connection(
                    lambda: NodeConnection(self.turns), node.address or node.host, node.port, ssl=self.tls,
                    server_hostname=node.host if node.tls else None)
            connection.settings = node
            return connection
        except TimeoutError:
            raise NodeFailure("refused", f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise NodeFailure("refused", f"its certificate is not believed: {error.verify_message}") from None
        except ssl.SSLError as error:
            reason = (error.reason or "broken off").lower().replace("_", " ")
            raise NodeFailure("refused", f"no TLS: {reason}") from None
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise Refusal(503, f"the gateway has no connection left: {error.strerror}", retry_after_s=1.0) from None
            raise NodeFailure("refused", f"no connection: {connect_error_text(error)}") from None
        except UnicodeError:
            raise NodeFailure("refused", f"no connection: {node.host!r} is not a host name") from None
        except ValueError as error:     # the file of ca= has become unusable
            raise NodeFailure("refused", str(error)) from None

    def take(self) -> NodeConnection | None:
        """Return a connection that was used before, or None.

        Never one with something to read: nobody asked for that, so it would be taken for the next answer. A busy event
        loop may not have read it yet. Over TLS it can only be an alert, an end or a superfluous record: a server sends
        its session tickets with the handshake, before the first answer; a later one costs a new connection, no more.
        """
        while self.idle:
            connection = self.idle.pop()
            if connection.is_open() and not socket_has(connection.transport, select.POLLIN):
                connection.busy = connection.reused = True
                return connection
            connection.transport.abort()
        return None

    def give_back(self, connection: NodeConnection) -> None:
        """Keep a connection whose answer ended cleanly; close any other one at once, unread bytes and all."""
        connection.sink = connection.source = connection.waiter = None
        is_clean = connection.clean and not (connection.buffer or connection.unsent or connection.behind)
        if is_clean and connection.is_open() and not self.closed and connection.settings is self.settings:
            connection.busy = False
            connection.idle_s = self.loop.time()
            connection.transport.resume_reading()       # a slow client may have stopped it; an end must be noticed
            self.idle.append(connection)
            if len(self.idle) > MOST_IDLE_UPSTREAM:
                self.idle.pop(0).transport.close()
        else:
            connection.unsent = b""
            connection.transport.abort()

    def prune(self, before_s: float) -> None:
        """Close the connections that have been idle since `before_s`."""
        for connection in self.idle:
            if connection.idle_s < before_s:
                connection.transport.close()
        self.idle = [connection for connection in self.idle if connection.idle_s >= before_s]

    def close(self) -> None:
        """Close every connection: the idle ones now, the others when they are given back."""
        self.closed = True
        self.prune(math.inf)

    async def request(self, data: bytes, method: str,
                      on_connection: Callable[[NodeConnection], None] = lambda connection: None, reuse: bool = True,
                      body: Body | memoryview = b"") -> tuple[NodeConnection, ResponseHead]:
        """Send a whole request, a head and a body; return (connection, head of the answer). Raises NodeFailure.

        A connection that was idle may have died unseen, which shows only now: then a fresh one is tried, once. What
        must not be done twice is sent on a fresh one to begin with (`reuse` False).
        """
        while True:
            connection = reuse and self.take() or await self.connect()
            on_connection(connection)
            head = None
            try:
                connection.send(data, body)
                head = await connection.response(method)
                return connection, head
            except NodeFailure as failure:
                if not connection.reused or failure.kind != "died" or connection.buffer:
                    raise
                self.prune(math.inf)
            finally:
                if head is None:
                    self.give_back(connection)


class Sink:
    """Take in the body of an answer until it is `over`: complete, or ended by a `failure`."""

    __slots__ = ("connection", "head", "body", "over", "failure", "waiter")
    reads_lines = False             # each line as JSON

    def __init__(self, connection: NodeConnection, head: ResponseHead) -> None:
        self.connection, self.head = connection, head
        self.body = body_decoder(head.length)
        self.over = False
        self.failure: Failure | Answer | None = None
        self.waiter: asyncio.Future[None] | None = None

    def is_costly(self, data: bytes) -> bool:
        """Tell whether a piece must be taken in by steps."""
        if self.reads_lines:
            return data.count(b"\n") > READ_LINES
        return isinstance(self.body, ChunkedBody) and data.count(b"\n") > TAKEN_LINES

    def at_most(self) -> int:
        """Return how many bytes of a costly piece are taken in one step."""
        return self.body.at_most() if isinstance(self.body, ChunkedBody) and not self.reads_lines else READ_BYTES

    def is_held_up(self) -> bool:
        """Tell whether reading must pause."""
        return False

    def data(self, data: bytes) -> None:
        """Take a piece from the socket."""
        if self.over:
            self.connection.clean = False
            return
        try:
            payload, used = self.body.feed(data)
        except ProtocolError as error:
            self.finish(Failure("garbage", f"broke the framing of its answer: {error}"))
            return
        self.take(payload, data if self.body.verbatim and used == len(data) else None)
        if self.body.done:
            self.end(used == len(data))

    def take(self, payload: bytes, verbatim: bytes | None) -> None:
        """Use a piece of the body; `verbatim`: the same piece as whole chunks, or None."""
        raise NotImplementedError

    def end(self, clean: bool) -> None:
        self.connection.clean = clean and self.head.keep_alive
        self.finish(None)

    def lost(self) -> None:
        """The connection has closed: the right end for a body without length, a failure for any other."""
        if self.head.length == UNTIL_CLOSE and self.connection.ended:
            self.end(False)
        else:
            self.finish(self.connection.failure)

    def finish(self, failure: Failure | Answer | None) -> None:
        """End the body, by a failure or, None, as it should."""
        if not self.over:
            self.over, self.failure = True, failure
            if self.waiter is not None and not self.waiter.done():
                self.waiter.set_result(None)

    async def finished(self) -> None:
        """Take in the body, from what came behind the head to its end. Raises NodeFailure."""
        if self.body.done:
            self.end(not self.connection.buffer)
        else:
            self.connection.attach(self)
        if not self.over:
            self.waiter = self.connection.loop.create_future()
            await self.waiter
        if self.failure is not None:
            raise self.failure.error()


class Collector(Sink):
    """Keep the body of an answer, up to `limit` bytes."""

    __slots__ = ("parts", "room")

    def __init__(self, connection: NodeConnection, head: ResponseHead, limit: int = ERROR_BODY_BYTES) -> None:
        super().__init__(connection, head)
        self.parts: list[bytes] = []
        self.room = limit

    def take(self, payload: bytes, verbatim: bytes | None) -> None:
        self.parts.append(payload)
        self.room -= len(payload)
        if self.room < 0:
            self.finish(Failure("garbage", "answer too long"))

    async def collect(self) -> bytes:
        """Return the whole body. Raises NodeFailure."""
        await self.finished()
        return b"".join(self.parts)


@remembered
def names_stream(content_type: bytes) -> bool:
    return content_type.lower().startswith((b"application/x-ndjson", b"text/event-stream"))


def is_stream(answer: ResponseHead) -> bool:
    """Tell whether an answer is lines or events that come one after the other."""
    return names_stream(answer.fields.get(b"content-type", b""))


# -----------------------------------------------------------------------------
# Wire to a node: how is a request written, and its answer read?
#
# Header lines pass unchanged, except those that concern one connection only. `feed` decodes bodies however their bytes
# are split.
# -----------------------------------------------------------------------------

MAX_CHUNK_LINE_BYTES = 4 * KIB      # a size line with its extensions, or one trailer line
MAX_TRAILER_BYTES = 16 * KIB
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(;[^\r\n]*)?\r\n")
LAST_CHUNK = b"0\r\n\r\n"


@remembered
def parse_status_line(line: bytes) -> tuple[int, bytes, int]:
    """Return (status, reason, minor version) of a status line. Raises ProtocolError."""
    match = STATUS_LINE.fullmatch(line)
    if not match:
        raise ProtocolError("malformed status line")
    return int(match[2]), match[3] or b"", int(match[1])


def parse_response(head: bytes, method: str) -> ResponseHead:
    """Parse the head of the answer to a `method` request. Raises ProtocolError."""
    first, *lines = head[:-4].split(b"\r\n")
    status, reason, version = parse_status_line(first)
    fields, raw_lines = parse_fields(lines)
    length = parse_length(fields, version)
    if method == "HEAD" or status < 200 or status in (204, 304):    # RFC 9112 6.3, step 1
        length = 0
    elif length == 0 and b"content-length" not in fields:           # step 8
        length = UNTIL_CLOSE
    keep_alive = wants_keep_alive(fields, version) and length != UNTIL_CLOSE
    return ResponseHead(status, reason, version, fields, raw_lines, length, keep_alive)


class LengthBody:
    """Decode a body of known length; `done` once it is complete."""

    verbatim = False                # see ChunkedBody

    def __init__(self, length: int) -> None:
        self.left = length
        self.done = length == 0

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Return (payload, count of bytes of `data` that belong to the body)."""
        if len(data) > self.left:
            data = data[:self.left]
        self.left -= len(data)
        self.done = self.left == 0
        return data, len(data)


@remembered
def plain_size(line: bytes) -> int:
    """Return the size in the first line of a chunk, with its CRLF; 0 for the last chunk, or one with an extension."""
    match = CHUNK_LINE.fullmatch(line)
    return int(match[1], 16) if match and not match[2] else 0


class ChunkedBody:
    """Decode the chunked coding (RFC 9112 7.1). Extensions and trailers are dropped.

    After each `feed`, `verbatim` tells whether its bytes were whole plain chunks: they can be passed on unchanged, and
    their receiver stands between two chunks, where an error line can still be added.
    """

    __slots__ = ("state", "left", "line", "trailer_bytes", "done", "verbatim")
    SIZE, DATA, DATA_END, TRAILER = range(4)

    def __init__(self) -> None:
        self.state, self.left, self.line, self.trailer_bytes = self.SIZE, 0, b"", 0
        self.done = self.verbatim = False

    def at_most(self) -> int:
        """Return how many bytes may be fed in one step: a chunk costs a microsecond, whatever its size."""
        return max(DECODED_BYTES, self.left)

    def plain_chunks(self, data: bytes) -> int:
        """Return the number of chunks in `data` if they all are whole and plain, as tokens mostly are; else 0.

        Such data can be passed on without `feed`: it would leave the decoder in the same state.
        """
        if self.state or self.line:
            return 0                # in the middle of a chunk
        count = at = 0
        while at < len(data):
            start = data.find(b"\r\n", at, at + 20) + 2
            end = start + plain_size(data[at:start])
            if end == start or data[end:end + 2] != b"\r\n":
                return 0
            at = end + 2
            count += 1
        return count

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Return (payload, count of bytes of `data` that belong to the body). Raises ProtocolError."""
        self.verbatim = self.state == self.SIZE and not self.line
        payload: list[bytes] = []
        at = 0
        while at < len(data) and not self.done:
            if self.state == self.DATA:
                part = data[at:at + self.left]
                payload.append(part)
                at += len(part)
                self.left -= len(part)
                if not self.left:
                    self.state = self.DATA_END
                continue
            end = data.find(b"\n", at) + 1 or len(data)
            self.line += data[at:end]
            at = end
            if len(self.line) > MAX_CHUNK_LINE_BYTES:
                raise ProtocolError("chunk line too long")
            if self.line[-1:] == b"\n":
                self.take_line(self.line)
                self.line = b""
        self.verbatim = self.verbatim and not self.line and (self.done or self.state == self.SIZE)
        return payload[0] if len(payload) == 1 else b"".join(payload), at

    def take_line(self, line: bytes) -> None:
        """Take one line of the framing, with its LF. Raises ProtocolError."""
        if self.state == self.SIZE:
            match = CHUNK_LINE.fullmatch(line)
            if not match:
                raise ProtocolError("malformed chunk size")
            self.left = int(match[1], 16)
            self.state = self.DATA if self.left else self.TRAILER
            self.verbatim = self.verbatim and not match[2]      # an extension is dropped
        elif self.state == self.DATA_END:
            if line != b"\r\n":
                raise ProtocolError("chunk longer than its size")
            self.state = self.SIZE
        elif line == b"\r\n":
            self.done = True
        else:
            self.verbatim = False
            self.trailer_bytes += len(line)
            if line[-2:] != b"\r\n" or self.trailer_bytes > MAX_TRAILER_BYTES:
                raise ProtocolError("malformed or too long trailers")


BodyDecoder = LengthBody | ChunkedBody


def body_decoder(length: int | None) -> BodyDecoder:
    """Return the decoder for a declared `length`: a number, None (chunked) or UNTIL_CLOSE (never `done` by itself)."""
    if length is None:
        return ChunkedBody()
    return LengthBody(sys.maxsize if length == UNTIL_CLOSE else length)


def chunk(data: bytes) -> bytes:
    """Encode `data` as one chunk; empty data as nothing, since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


# The gateway writes its own length, coding, Host and Via; it has answered Expect and Origin, and read X-Priority.
# Without Accept-Encoding nobody compresses the answers, in which it reads statistics.
NOT_FOR_NODES = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"origin", b"accept-encoding", b"x-priority",
                             b"via"}

# Only the gateway says these: a browser that gets two allowed origins accepts neither.
NOT_FOR_CLIENTS = HOP_BY_HOP | {b"content-length", b"x-request-id"}
OURS_TO_SAY = b"access-control-", b"x-sollol-"


def end_to_end(lines: HeadLines, fields: HeadFields, dropped: frozenset[bytes]) -> list[bytes]:
    """Return the raw lines that are passed on: those neither `dropped` nor named by Connection."""
    listed = fields.get(b"connection")
    if listed:
        dropped = dropped.union(name.strip() for name in listed.lower().split(b","))
    return [line for name, _, line in lines if name not in dropped]


def render_request(head: RequestHead, settings: NodeSettings, length: int | None) -> bytes:
    """Return the head to send to a node for `head`, with a body of `length` bytes (None = chunked)."""
    dropped = NOT_FOR_NODES | {b"authorization"} if settings.token else NOT_FOR_NODES
    prefix = settings.prefix.encode() if head.target != b"*" else b""
    lines = [b"%b %b%b HTTP/1.1" % (head.method.encode(), prefix, head.target),
             b"Host: " + settings.host_header.encode()]
    lines += end_to_end(head.lines, head.fields, dropped)
    if head.via:
        lines.append(b"Via: " + head.via)
    if settings.token:
        lines.append(b"Authorization: Bearer " + settings.token.encode())
    if length is None:
        lines.append(b"Transfer-Encoding: chunked")
    elif length or head.method in ("POST", "PUT", "PATCH"):
        lines.append(b"Content-Length: %d" % length)
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def render_response(head: ResponseHead, added: list[bytes], framing: list[bytes]) -> bytes:
    """Return the head to send to the client for a node's `head`; `added` and `framing` are raw lines."""
    lines = [b"HTTP/1.1 %d %b" % (head.status, head.reason)]
    foreign = [line for line in head.lines if not line[0].startswith(OURS_TO_SAY)]
    lines += end_to_end(foreign, head.fields, NOT_FOR_CLIENTS)
    return b"\r\n".join(lines + added + framing + [b"\r\n"])


# -----------------------------------------------------------------------------
# Relay: how does a node's answer get to the client?
#
# An answer that came in one piece with its head goes out in one piece. Any other passes through a Relay: its bytes as
# they come, in the client's framing. Only the last lines are read: they hold the node's statistics, which teach the
# dispatcher. A stream that breaks off ends in the words of its format, never with a made-up last line.
# -----------------------------------------------------------------------------

WHOLE_ANSWER_BYTES = 1 * MIB        # of one that does not stream, held until it is whole: it comes in one burst anyway


class Framing(enum.Enum):
    """How the client is told where the body ends."""

    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


UNBUFFERED = b"X-Accel-Buffering: no"       # nginx would hold a stream back


def client_head(exchange: Exchange, answer: ResponseHead) -> tuple[Framing, bytes]:
    """Return (Framing, head) of a node's answer for the client; clears `exchange.keep` if the end must be a close."""
    head, record, length = exchange.head, exchange.record, answer.fields.get(b"content-length")
    if head.method == "HEAD" or answer.status in (204, 304):
        framing, lines = Framing.LENGTH, [b"Content-Length: " + length] if length and answer.status != 204 else []
    elif answer.length is not None and answer.length != UNTIL_CLOSE:
        framing, lines = Framing.LENGTH, [b"Content-Length: %d" % answer.length]
    elif head.version == 1:
        framing, lines = Framing.CHUNKED, [b"Transfer-Encoding: chunked"]
    else:                           # RFC 9112 7: no chunked coding to HTTP/1.0
        framing, lines, exchange.keep = Framing.CLOSE, [], False
    added = [UNBUFFERED] if is_stream(answer) and b"x-accel-buffering" not in answer.fields else []
    added += [b"X-SOLLOL-Node: " + record.node.encode(),
              b"X-SOLLOL-Queue-Ms: %d" % (record.queue_s * 1000),
              b"X-SOLLOL-Attempts: %d" % record.attempts,
              b"X-SOLLOL-Priority: " + str(record.priority).encode(),
              b"X-SOLLOL-Reason: " + record.reason.encode("ascii", "replace"),
              b"X-Request-Id: " + record.id.encode(), *record.cors]
    return framing, render_response(answer, added, lines + connection_lines(exchange))


# How a complete stream ends: Ollama's statistics, OpenAI's and Anthropic's last events.
LAST_LINE = re.compile(rb'"(?:total_duration|eval_count)":\s*[0-9]+[^\n{]*\}\r?\n\Z|'
                       rb'(?:(?:^|\n)data: ?(?:\[DONE\]|\{"type":\s*"message_stop"\s*\})|'
                       rb'"input_tokens":\s*[0-9][^\n]*"total_tokens":\s*[0-9][^\n]*\})\r?\n\r?\n\Z')
ERROR_CHARS = 200                   # of what a node says of an error, in the log and in an error of the gateway's own
EVENT_END = re.compile(rb"(\r?\n\r?\n)")    # an event's lines may end in CRLF
LINE_END = re.compile(rb"(\n)")


def object_in(data: bytes | str) -> Json | None:
    """Return the JSON object in an answer or a text, None if it is anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def error_text(error: object) -> str:
    """Return the text of an error in one line of at most ERROR_CHARS characters.

    `error`: the bytes of a body or line, or its JSON, of which `error` and then `message` are taken if they are there.
    """
    if isinstance(error, bytes):
        error = object_in(error) or error[:4 * KIB].decode(errors="replace")
    for key in ("error", "message"):
        error = error.get(key) or error if isinstance(error, dict) else error
    text = error if isinstance(error, str) else json.dumps(error)
    return " ".join("".join(char if char.isprintable() else " " for char in text[:2 * KIB]).split())[:ERROR_CHARS]


def error_in_stream(ending: bytes) -> str:
    """Return the error that the last line or event of a stream tells, or ""."""
    if b"error" not in ending:
        return ""
    lines = [b"", *(line for line in ending.splitlines() if line.strip() and line != b"data: [DONE]")]
    last = lines[-1].removeprefix(b"data:").strip()
    has_error = (object_in(last) or {}).get("error") or lines[-2:-1] == [b"event: error"]
    return error_text(last) if has_error else ""


@dataclass(slots=True)
class Begun:
    """A lease whose answer has begun, and the connection that it comes on."""

    lease: Lease
    connection: NodeConnection
    answer: ResponseHead
    usage: bool = False             # the gateway has asked for the counts of its tokens, the client has not
    upload: Upload | None = None    # of a body that is still going up


class Relay(Sink):
    """Write an answer to the client as it comes. `prelude`, the head, goes out with the first bytes of the body.

    `hold`: keep up to so many bytes until the answer is whole: as long as the client has none, another node can answer.
    """

    __slots__ = ("client", "framing", "prelude", "hold", "heard", "time", "ends", "mark", "boundary", "recent",
                 "latest", "bytes", "between", "passing", "withheld")

    def __init__(self, exchange: Exchange, begun: Begun, hold: int = 0) -> None:
        connection, head = begun.connection, begun.answer
        super().__init__(connection, head)
        self.client, self.hold = exchange.client, hold
        self.framing, prelude = client_head(exchange, head)
        self.prelude: Body = bytearray(prelude)
        self.heard = begun.lease.heard
        self.time = connection.loop.time
        events = b"event-stream" in head.fields.get(b"content-type", b"")
        self.mark = b"_tokens" if events else b"_count"
        self.ends: tuple[bytes, ...] = (b"\n\n", b"\n\r\n") if events else (b"\n",)
        self.boundary = tuple(end + b"\r\n" for end in self.ends)
        self.recent: collections.deque[bytes] = collections.deque(maxlen=8)     # the last pieces, but for mere tokens
        self.latest = b""           # the last of those, in its chunks, if nothing came behind it
        self.bytes = 0              # written, without the head
        self.between = True         # two lines or events
        self.passing: ChunkedBody | None = None     # whose chunks pass to the client as they come; its head is out
        self.withheld = b""         # an error that the node told, kept from the client while another may do better

    def is_held_up(self) -> bool:
        return self.client.write_paused

    def data(self, data: bytes) -> None:
        """Take a piece from the socket. Most are one token in one chunk: it passes in one step, the last one is kept.

        When the next token of a stream comes, its objects have left the processor's caches: each one that is touched
        costs several times what it does in a loop. Statistics take the long way.
        """
        if (self.passing and self.between and not self.over and data.rfind(self.mark) < 0
                and data.endswith(self.boundary) and (chunks := self.passing.plain_chunks(data))):
            self.heard(data.count(b"\n") - 2 * chunks, self.time())
            self.bytes += len(data)
            self.latest = data
            if not self.client.gone:
                self.client.transport.write(data)
        else:
            super().data(data)

    def write(self, data: bytes) -> None:
        self.bytes += len(data)
        if self.prelude:
            self.prelude += data
            if len(self.prelude) < self.hold and not self.body.done:
                return
            data, self.prelude = bytes(self.prelude), b""
            if self.framing is Framing.CHUNKED and isinstance(self.body, ChunkedBody):
                self.passing = self.body
        self.client.write(data)

    def take(self, payload: bytes, verbatim: bytes | None) -> None:
        if payload:
            self.heard(payload.count(b"\n"), self.time())
            self.keep(payload)
        elif not self.body.done:
            return                  # part of the framing only
        self.send(payload, verbatim)

    def send(self, payload: bytes, verbatim: bytes | None) -> None:
        """Write a piece of the body in the client's framing; `verbatim`: the same piece as whole chunks, or None."""
        if self.framing is not Framing.CHUNKED:
            self.write(payload)
        elif verbatim is not None:
            self.write(verbatim)
        else:
            self.write(chunk(payload) + (LAST_CHUNK if self.body.done else b""))

    def end(self, clean: bool) -> None:
        self.hold = 0
        if self.framing is Framing.CHUNKED and self.head.length == UNTIL_CLOSE:
            self.write(LAST_CHUNK)
        elif self.prelude:
            self.write(b"")
        super().end(clean)

    def keep(self, payload: bytes) -> None:
        """Keep the end of what went to the client."""
        self.recent.append(payload[-TAIL_BYTES:])
        self.latest = b""
        self.between = payload.endswith(self.ends) or len(payload) < 4 and self.tail().endswith(self.ends)

    def ending(self) -> bytes:
        """Return the last pieces of the body: its statistics, and its last line."""
        return b"".join(self.recent) + ChunkedBody().feed(self.latest)[0]

    def tail(self) -> bytes:
        """Return the last bytes of the body, or at least those that hold its statistics."""
        return self.ending()[-TAIL_BYTES:]

    def is_complete(self) -> bool:
        """Tell whether the client has the stream's own last line: only the framing may be missing."""
        return self.between and LAST_LINE.search(self.tail()) is not None

    def close_with(self, text: str, family: Family) -> bool:
        """End a broken answer by an error in its format; return False if the format has none.

        There is no made-up last line, and no error behind a real one; a node's own error passes in its own words. A
        body of announced length can only be cut.
        """
        kind, lead = self.head.fields.get(b"content-type", b""), b"" if self.between else self.ends[0]
        if self.framing is Framing.LENGTH or self.client.gone:
            return False
        if self.is_complete():
            data = b""
        elif self.withheld:
            data = self.withheld
        elif b"ndjson" in kind:
            data = lead + json.dumps({"error": text}).encode() + b"\n"
        elif b"event-stream" in kind:
            name = b"event: error\n" if family is Family.ANTHROPIC else b""
            data = lead + name + b"data: " + error_body(family, 502, text) + b"\n\n"
        else:
            return False
        self.write(chunk(data) + LAST_CHUNK if self.framing is Framing.CHUNKED else data)
        return True


async def answer_whole(exchange: Exchange, answer: ResponseHead, pieces: Sequence[bytes]) -> None:
    """Write a node's whole answer, given in pieces, as fast as the client reads it."""
    client, record = exchange.client, exchange.record
    answer.length = record.bytes = sum(map(len, pieces))
    record.status = answer.status
    _, data = client_head(exchange, answer)
    for piece in pieces if exchange.head.method != "HEAD" else ():
        for at in range(0, len(piece), SENT_BYTES):
            if client.write_paused:
                await client.drained()
            client.write(data + piece[at:at + SENT_BYTES])
            data = b""
    client.write(data)


def pass_on_whole(exchange: Exchange, begun: Begun) -> None:
    """Pass on an answer that came in one piece with its head, in one piece."""
    connection, lease, record = begun.connection, begun.lease, exchange.record
    body, connection.buffer = connection.buffer, b""
    connection.transport.resume_reading()       # with its head it may have been more than is read ahead
    if body:
        lease.heard(body.count(b"\n"), connection.loop.time())
    _, head = client_head(exchange, begun.answer)
    exchange.client.write(head + body)
    record.status, record.bytes, record.first_s = begun.answer.status, len(body), lease.first_s
    judge_end(exchange, begun, body[-TAIL_BYTES:])
    connection.clean = begun.answer.keep_alive


async def pass_on_edited(exchange: Exchange, begun: Begun, edits: Edits) -> None:
    """Pass on an answer that does not stream, edited, once it is whole. Raises NodeFailure: the client has nothing."""
    gateway, lease, connection = exchange.gateway, begun.lease, begun.connection
    lease.ticket.race = None        # it is there, but for its bytes
    lease.heard(0, connection.loop.time())
    body = await Collector(connection, begun.answer, SHARE_ANSWER_BYTES).collect()
    ending = body[-TAIL_BYTES:]
    body = await gateway.work_on(body, edits.whole(body, begun.answer))
    exchange.record.first_s = lease.first_s
    judge_end(exchange, begun, ending)
    await answer_whole(exchange, begun.answer, [body])


def judge_end(exchange: Exchange, begun: Begun, ending: bytes) -> None:
    """Learn from an answer that ended as its framing said.

    An error in the last line of a stream is a failure of the node; a stream without its last line only shows that the
    node works.
    """
    if begun.answer.status >= 400:
        return
    gateway, record, lease, streams = exchange.gateway, exchange.record, begun.lease, is_stream(begun.answer)
    dispatcher, now = gateway.dispatcher, gateway.loop.time()
    timings = read_timings(ending[-TAIL_BYTES:])
    error = error_in_stream(ending) if streams else ""
    is_whole = not error and (not streams or LAST_LINE.search(ending[-TAIL_BYTES:]) is not None)
    if error:
        record.outcome, record.reason = "error", error
        if lease.runner is not None:    # of a push, say, it is its client's own
            gateway.node_io.record_failure(lease, Failure("model", f"broke off: {error}"))
    elif is_whole:
        dispatcher.observe(lease, timings, now)
    else:
        lease.worked(now)
    record.timings = accounted(lease, timings, exchange.head.path, is_whole)


def begun_stream(exchange: Exchange) -> LineRelay | None:
    """Return the relay whose stream the client has a part of, and another node may continue; None before that."""
    return exchange.transcript.relay if exchange.transcript else None


def make_relay(exchange: Exchange, begun: Begun) -> Relay:
    """Return the Relay for an answer. Raises NodeFailure if it cannot continue the stream that the client has begun."""
    answer, transcript, before = begun.answer, exchange.transcript, begun_stream(exchange)
    kind = answer.fields.get(b"content-type", b"")
    if before and (answer.status != 200 or kind != before.head.fields.get(b"content-type")):
        raise NodeFailure("garbage", f"answered {answer.status} {kind.decode(errors='replace')}")
    is_open_stream = answer.status == 200 and answer.length in (None, UNTIL_CLOSE) and is_stream(answer)
    edits = edits_of(exchange, begun)
    if transcript and (before or is_open_stream):
        return LineRelay(exchange, begun, edits, transcript)
    if edits and is_open_stream:
        return EditedRelay(exchange, begun, edits)
    is_whole = exchange.spec.inference and not exchange.spec.stream
    return Relay(exchange, begun, WHOLE_ANSWER_BYTES if is_whole else 0)


def break_off(exchange: Exchange, relay: Relay, text: str) -> None:
    """End an answer that nobody can complete: by an error in its format, else by a cut."""
    record = exchange.record
    record.reason = text
    has_end = relay.close_with(text, exchange.spec.family)
    if not has_end:
        relay.client.transport.abort()
        exchange.keep = False
    record.outcome = "error" if relay.withheld else "ok" if has_end and relay.is_complete() else "cut"


async def relay_answer(exchange: Exchange, begun: Begun) -> None:
    """Pass a node's answer on to the client as it comes, and learn from its end.

    Raises NodeFailure if the node fails and another one may answer: the client has nothing, or a transcript has what
    it got. Any other failure ends the answer here.
    """
    gateway, client, record, lease = exchange.gateway, exchange.client, exchange.record, begun.lease
    before, edits = begun_stream(exchange), edits_of(exchange, begun)
    if edits and not before and edits.need_all_of(begun.answer):
        await pass_on_edited(exchange, begun, edits)
        return
    if begun.answer.length == len(begun.connection.buffer) <= READ_AHEAD_BYTES and not before:
        pass_on_whole(exchange, begun)
        return
    relay = make_relay(exchange, begun)
    lease.held_up = lambda: client.write_paused
    if not isinstance(relay, LineRelay):
        lease.ticket.race = None    # no other node could go on with it
    client.source = begun.connection
    try:
        await relay.finished()
        judge_end(exchange, begun, relay.ending())
    except NodeFailure as failure:
        if relay.prelude:
            raise
        record.timings = accounted(lease, read_timings(relay.tail()), exchange.head.path, False)
        if isinstance(relay, LineRelay) and relay.can_be_continued():
            raise
        gateway.node_io.record_failure(lease, failure.value)
        break_off(exchange, relay, f"{lease.node.name} {failure}")
    finally:
        client.source = None
        if not relay.over:          # the client has left
            record.timings = accounted(lease, Timings(), exchange.head.path, False)
        record.status = begun.answer.status
        record.bytes = relay.bytes + (record.bytes if before else 0)
        record.first_s = record.first_s if before else lease.first_s
    if before:
        gateway.dispatcher.rescued(whole=not relay.failure)
        record.reason = f"rescued from {' and '.join(before.transcript.lost)}; {record.reason}"


# -----------------------------------------------------------------------------
# Own answers: what does the gateway itself say?
#
# A handler takes an Exchange, fills in what it finds out, and writes an answer or raises it: a Refusal, which gets the
# shape that clients of its path expect, or a node's own error. `keep` says whether the connection stays open.
# -----------------------------------------------------------------------------

REASONS = {200: b"OK", 204: b"No Content", 400: b"Bad Request", 401: b"Unauthorized", 403: b"Forbidden",
           404: b"Not Found", 405: b"Method Not Allowed", 408: b"Request Timeout", 413: b"Content Too Large",
           414: b"URI Too Long", 429: b"Too Many Requests", 431: b"Request Header Fields Too Large",
           500: b"Internal Server Error", 502: b"Bad Gateway", 503: b"Service Unavailable", 508: b"Loop Detected"}


class OwnAnswer(NamedTuple):
    """An answer of the gateway's own. `lines`: more raw lines of its head."""

    status: int
    body: bytes = b""
    content_type: bytes = b""
    lines: Sequence[bytes] = ()


def json_answer(value: object, status: int = 200) -> OwnAnswer:
    """Return an answer that is JSON."""
    return OwnAnswer(status, json.dumps(value, separators=(",", ":")).encode(), b"application/json; charset=utf-8")


ERROR_TYPES = {
    Family.OPENAI: {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
                    429: "rate_limit_error"},
    Family.ANTHROPIC: {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                       404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
                       503: "overloaded_error"},
}


def error_body(family: Family, status: int, text: str) -> bytes:
    """Return the error object in the shape that clients of a family parse."""
    if family is Family.OLLAMA:
        return json.dumps({"error": text}).encode()
    kind = ERROR_TYPES[family].get(status, "api_error")
    if family is Family.OPENAI:
        return json.dumps({"error": {"message": text, "type": kind, "param": None, "code": None}}).encode()
    return json.dumps({"type": "error", "error": {"type": kind, "message": text}}).encode()


def connection_lines(exchange: Exchange) -> list[bytes]:
    """Return the raw line, if one is needed, that tells the client whether its connection stays open."""
    if not exchange.keep or exchange.gateway.is_ending:
        return [b"Connection: close"]
    return [b"Connection: keep-alive"] if exchange.head.version == 0 else []


def answer_locally(exchange: Exchange, own: OwnAnswer) -> None:
    """Write an answer of the gateway's own."""
    record = exchange.record
    lines = [b"HTTP/1.1 %d %b" % (own.status, REASONS.get(own.status, b"")),
             b"Date: " + email.utils.formatdate(usegmt=True).encode(), *own.lines]
    if own.status != 204:           # RFC 9110 8.6: "MUST NOT send a Content-Length header field"
        lines.append(b"Content-Length: %d" % len(own.body))
    if own.content_type:
        lines.append(b"Content-Type: " + own.content_type)
    if record.id:
        lines += [b"X-Request-Id: " + record.id.encode(), *record.cors]
    record.status, record.bytes = own.status, len(own.body)
    lines += connection_lines(exchange)
    exchange.client.write(b"\r\n".join(lines) + b"\r\n\r\n" + (b"" if exchange.head.method == "HEAD" else own.body))


def answer_refusal(exchange: Exchange, refusal: Refusal) -> None:
    """Write a Refusal in the family of the path."""
    record, path, status = exchange.record, exchange.head.path, refusal.status
    lines: list[bytes] = []
    if refusal.retry_after_s is not None:
        lines.append(b"Retry-After: %d" % max(1, math.ceil(refusal.retry_after_s)))
    if status == 401:               # RFC 9110 11.6.1; a browser asks for a password only if the scheme is Basic
        scheme = b"Basic" if path.startswith("/dashboard") else b"Bearer"
        lines.append(b'WWW-Authenticate: %b realm="SOLLOL"' % scheme)
    if status == 405:               # RFC 9110 15.5.6: "MUST generate an Allow header field"
        lines.append(b"Allow: " + ALLOWED_METHODS)
    record.reason = record.reason or refusal.text
    record.outcome = record.outcome or ("error" if status in (500, 502) else "refused")
    exchange.keep = exchange.keep and not refusal.close
    body = error_body(family_of(path), status, refusal.text)
    answer_locally(exchange, OwnAnswer(status, body, b"application/json", lines))


def refuse_unread(gateway: Gateway, client: ClientConnection, refusal: Refusal) -> None:
    """Write a Refusal to a client whose head has not come, or cannot be read: it gets no id, and no line of the log."""
    head = RequestHead("GET", b"", "", 1, {}, [], 0, False, False)
    answer_refusal(Exchange(gateway, client, head, Record("", client.address, "", "", 0.0), False), refusal)


# -----------------------------------------------------------------------------
# Edited answers: what must a client not see of a node's answer?
#
# The name of the model, where the client calls it by an alias. It stands at known places: in an answer or event itself,
# in Anthropic's `message` and in `response` of /v1/responses; a text that holds the same bytes, or the arguments of a
# tool call, stay as they are. And the counts of a stream's tokens, where only the gateway has asked for them. A stream
# is edited in whole lines or events, however its bytes are cut.
# -----------------------------------------------------------------------------

NAMING = frozenset(("model", "message", "response", "id"))      # members of an answer that name its model, or may
# The name behind members that are no objects and no long texts, as nearly all lines have it. Quotes within a text would
# be escaped.
EARLY_NAME = re.compile(rb'(?:event:[^\n]*\n)?(?:data: ?)?\{'
                        rb'(?:(?!"model")"[a-z_]{1,40}": ?(?:"[^"\\]{0,200}"|[a-z0-9.]{1,30}), ?){0,8}+'
                        rb'"model": ?("[^"\\]{0,2048}")')


def named_span(data: bytes, key: str) -> Steps[Span | None]:
    """Return where an answer, a line or an event names its model, by its member `key`. Raises ValueError."""
    lead = EVENT_LEAD.match(data)
    spans = yield from spans_in(data, lead.end() if lead else 0, NAMING)
    for outer in ("message", "response"):
        if key not in spans and outer in spans and data[spans[outer].start:spans[outer].start + 1] == b"{":
            spans = yield from spans_in(data, spans[outer].start, NAMING)
    return spans.get(key)


def renamed(data: bytes, alias: Alias) -> Steps[bytes]:
    """Return an answer, a line or an event of one, that calls the model as the client does; else byte for byte."""
    if b'"%b"' % alias.key.encode() not in data:
        return data
    if early := EARLY_NAME.match(data) if alias.key == "model" else None:
        span: Span | None = Span(*early.span(1))
    else:
        try:
            span = yield from named_span(data, alias.key)
        except ValueError:          # no JSON: [DONE], or an error in words
            span = None
    if span is None:
        return data
    try:
        name = json.loads(data[span.start:span.end])
    except ValueError:
        return data
    if not isinstance(name, str) or canonical(name) != canonical(alias.model):
        return data                 # an error of OpenAI's has an empty one
    return data[:span.start] + alias.asked + data[span.end:]


def split_lines(data: bytes, separator: re.Pattern[bytes]) -> list[bytes]:
    """Return the lines or events in whole ones, each with its end; what stands behind the last end is the last."""
    *parts, rest = separator.split(data)
    return [line + end for line, end in zip(parts[::2], parts[1::2], strict=True)] + ([rest] if rest else [])


USAGE = b'"usage"'                  # quotes and line ends within a text would be escaped
ZERO_USAGE = b',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}\n\n'
EMPTY_CHOICES = re.compile(rb'"choices": ?\[\]')
USAGE_AT_END = re.compile(rb', ?"usage": ?(?:null|\{[^{}]*\})(?=\}\s*\Z)')


def without_usage(event: bytes) -> bytes:
    """Return an event of OpenAI's as a client gets it that has not asked for usage: b"" for that with nothing else.

    Ollama sends one more event, with empty `choices`, and on /v1/completions a `usage` of zeros at the end of each of
    the others (middleware/openai.go).
    """
    lead = EVENT_LEAD.match(event)
    value = object_in(event[lead.end():]) if lead and EMPTY_CHOICES.search(event) else None
    if value and value.get("choices") == [] and value.get("usage"):
        return b""
    return USAGE_AT_END.sub(b"", event, 1)


class Edits(NamedTuple):
    """What is to be changed in a node's answer."""

    alias: Alias | None
    usage: bool = False             # the gateway has asked for the counts of a stream, the client has not

    def need_all_of(self, answer: ResponseHead) -> bool:
        """Tell whether an answer is edited as a whole: its length changes, or it is no lines."""
        return answer.length not in (None, UNTIL_CLOSE) if is_stream(answer) else self.alias is not None

    def line(self, line: bytes) -> bytes:
        """Return a line or event for the client."""
        if self.usage and USAGE in line:
            line = without_usage(line)
        return at_once(renamed(line, self.alias)) if self.alias else line

    def lines(self, data: bytes, separator: re.Pattern[bytes]) -> bytes:
        """Return whole lines or events for the client."""
        if not self.alias:          # then all of it is about usage, and nearly all events are short work
            data = data.replace(ZERO_USAGE, b"}\n\n")
            if USAGE not in data:
                return data
        return b"".join(map(self.line, split_lines(data, separator)))

    def whole(self, body: bytes, answer: ResponseHead) -> Steps[bytes]:
        """Return a whole answer for the client."""
        if is_stream(answer):
            return self.lines(body, EVENT_END if b"event" in answer.fields[b"content-type"].lower() else LINE_END)
        return (yield from renamed(body, self.alias)) if self.alias else body


def edits_of(exchange: Exchange, begun: Begun) -> Edits | None:
    """Return what is to be changed in an answer, None: nothing."""
    return Edits(exchange.alias, begun.usage) if exchange.alias or begun.usage else None


class EditedRelay(Relay):
    """Relay a stream in whole lines or events, edited. Pieces that need no edit pass as in any Relay."""

    __slots__ = ("edits", "separator", "partial", "direct")
    reads_lines = True

    def __init__(self, exchange: Exchange, begun: Begun, edits: Edits | None) -> None:
        super().__init__(exchange, begun)
        self.edits, self.partial = edits, b""
        self.separator = EVENT_END if len(self.ends) > 1 else LINE_END
        is_chunked = self.framing is Framing.CHUNKED and edits is not None and not edits.alias
        self.direct = self.body if is_chunked and isinstance(self.body, ChunkedBody) else None

    def take(self, payload: bytes, verbatim: bytes | None) -> None:
        if payload:
            self.heard(payload.count(b"\n"), self.time())
        self.pass_whole(*self.whole_lines(payload, self.body.done), payload, verbatim)

    def pass_whole(self, whole: bytes, rest: bytes, payload: bytes = b"", verbatim: bytes | None = None) -> None:
        """Send whole lines to the client, and hold the rest; `verbatim`: the chunks of `payload`, which came last."""
        assert self.edits is not None   # else a plain Relay does it
        edited, self.partial = self.edits.lines(whole, self.separator), rest
        if whole:
            self.keep(whole)
        if edited or self.body.done:
            self.send(edited, verbatim if edited == whole == payload else None)
        if not self.prelude:
            self.passing = None if rest else self.direct

    def whole_lines(self, payload: bytes, is_last: bool) -> tuple[bytes, bytes]:
        """Return (what has come in whole lines or events, the rest). A very long line, or the last one, counts so."""
        data = self.partial + payload if self.partial else payload
        if data.endswith(self.ends):
            return data, b""
        end = max((at + len(mark) for mark in self.ends if (at := data.rfind(mark)) >= 0), default=0)
        if is_last or not end and len(data) > MAX_LINE_BYTES:
            end = len(data)
        return data[:end], data[end:]

    def end(self, clean: bool) -> None:
        if self.partial:            # of a body that ends with its connection
            self.pass_whole(self.partial, b"")
        super().end(clean)


# -----------------------------------------------------------------------------
# Rescue: how does another node go on with a stream that has broken off?
#
# Only a deterministic stream is asked for again; the client gets what the first node had not sent. A Transcript keeps
# the text that the client has; the replay must say the same. A LineRelay compares while it relays; what it passes on of
# a replay gets the ids and numbers of the first stream. A stream that falls silent is raced by such a replay, which is
# read ahead (`rehearse`).
# -----------------------------------------------------------------------------

TRANSCRIPT_CHARS = 1 * MIB          # of a stream's text, kept so that another node can go on with it
REPLAY_BYTES = 8 * MIB              # of a replay that is read ahead: a token's line has some 100 to 200 bytes
SAID = ("thinking", "reasoning", "response", "content", "text", "tool_calls", "finish_reason")
SAID_IN_EVENTS = ("delta", "text", "thinking", "partial_json")      # a piece of text, in events that have a type
SAID_OF_PARTS = ("type", "name", "input", "content", "action", "stop_reason")   # of what such an event begins or ends
LAST_EVENTS = ("message_stop", "response.completed", "response.failed", "response.incomplete")
EVENT_LEAD = re.compile(rb"(?:event:[^\n]*\n)?data: ?")
NAMES = ("id", "created", "item_id", "call_id", "tool_use_id")      # what a node drew for an answer, or a part of it
MOST_NAMES = 1000                   # that are kept of one answer


def objects(*values: object) -> list[Json]:
    """Return the JSON objects among some values, and in the arrays among them."""
    arrays = [value if isinstance(value, list) else [value] for value in values]
    return [item for array in arrays for item in array if isinstance(item, dict)]


def delta_texts(value: Json) -> list[tuple[Json, str, str]]:
    """Return the texts in an object of a stream, in order: [(object that holds it, key, text)].

    The ids of tool calls are left out: nodes draw them at random.
    """
    kind, choices = value.get("type"), objects(value.get("choices"))
    if isinstance(kind, str) and not choices:
        return event_texts(value, kind)
    holders = objects(value, value.get("message"), *(choice.get("delta") for choice in choices), *choices)
    deltas = [(holder, key, holder[key]) for holder in holders for key in SAID if holder.get(key)]
    return [(holder, key, delta if isinstance(delta, str) else re.sub(r'"id": "[^"]*"', "", json.dumps(delta)))
            for holder, key, delta in deltas]


def event_texts(value: Json, kind: str) -> list[tuple[Json, str, str]]:
    """Return the same of an event with a type, as /v1/messages and /v1/responses have them.

    For an event that adds no text, its type, its place and its parts stand as a text: a replay must have the
    same event there. Source: Ollama, anthropic/anthropic.go and openai/responses.go.
    """
    texts = [(holder, key, holder[key]) for holder in objects(value, value.get("delta")) for key in SAID_IN_EVENTS
             if isinstance(holder.get(key), str)]
    if kind.endswith("delta") and texts or kind == "ping":
        return [text for text in texts if text[-1]]
    parts = objects(*map(value.get, ("content_block", "item", "part", "delta")))
    about = [{key: part[key] for key in SAID_OF_PARTS if part.get(key)} for part in parts]
    return [(value, "type", json.dumps([kind, value.get("index"), value.get("output_index"), about]))]


def named_parts(value: Json) -> Iterator[tuple[Json, str, str | int]]:
    """Yield the names in an event: (object that holds it, key, name)."""
    answers = objects(value.get("response"))
    for holder in objects(value, *answers, value.get("item"), value.get("content_block"),
                          *(answer.get("output") for answer in answers)):
        for key in NAMES:
            if isinstance(holder.get(key), (str, int)):
                yield holder, key, holder[key]


class Transcript:
    """What a client has got of a deterministic stream, so that another node can continue it.

    A replay is compared by its text, not by its bytes: time stamps differ, and tokens may be split in another way.
    """

    def __init__(self) -> None:
        self.known = ""             # what the client had when the replay began; NULs set off kinds of text
        self.fresh: list[str] = []  # what it has got since
        self.at = 0                 # how much of the running answer has been read
        self.key = ""               # what kind of text it was last
        self.relay: LineRelay | None = None         # that has written to the client last
        self.done = False           # the client has the last line
        self.used = False           # the client has OpenAI's count of tokens
        self.names: list[str | int] = []    # ids and time, in the order in which the client had them first
        self.renamed: dict[str | int, str | int] = {}   # those of the running answer: what the client has instead
        self.number = 0             # of the next event, where they are numbered
        self.lost: list[str] = []   # names of nodes that did not come to the end

    def begin_again(self) -> None:
        """Forget the running answer: the client has got nothing of it."""
        self.fresh, self.at, self.key, self.used, self.names, self.renamed = [], 0, "", False, [], {}

    def rewind(self, name: str) -> None:
        """Begin anew, on another node than `name`."""
        self.lost.append(name)
        self.known = self.all_known()
        self.fresh, self.at, self.key, self.renamed = [], 0, "", {}

    def all_known(self) -> str:
        """Return all the text that the client has."""
        return self.known + "".join(self.fresh)

    @property
    def is_behind(self) -> bool:
        """Tell whether the replay still repeats what the client has."""
        return self.at < len(self.known)

    @property
    def is_short(self) -> bool:
        """Tell whether the text is short enough to be kept."""
        return self.at <= TRANSCRIPT_CHARS

    def consume(self, key: str, text: str) -> str:
        """Take in the next text of the running answer; return what the client lacks of it. Raises Refusal."""
        spoken = text if key == self.key else f"\0{key}\0{text}"
        known = self.known[self.at:self.at + len(spoken)] if self.is_behind else ""
        if not spoken.startswith(known):
            raise Refusal(502, "the answer of another node differs")
        self.key = key
        self.at += len(spoken)
        if self.is_short:
            self.fresh.append(spoken[len(known):])
        return text[max(0, len(known) - len(spoken) + len(text)):]

    def rename(self, value: Json) -> bool:
        """Give an event of a replay the ids and time of the stream that it continues; tell whether they differed.

        Nodes draw them at random, but equal answers name equal parts in the same order.
        """
        differs = False
        for holder, key, name in named_parts(value):
            if name not in self.renamed and len(self.renamed) < MOST_NAMES:
                self.names += [name] if len(self.renamed) == len(self.names) else []
                self.renamed[name] = self.names[len(self.renamed)]
            holder[key] = self.renamed.get(name, name)
            differs = differs or holder[key] != name
        return differs

    def renumber(self, value: Json) -> bool:
        """Give a numbered event of a replay, which goes to the client, the next number; tell whether that differs."""
        number = value.get("sequence_number")
        if type(number) is not int:
            return False
        value["sequence_number"] = self.number if self.lost else number
        self.number = value["sequence_number"] + 1
        return bool(number != value["sequence_number"])

    def unsent_part(self, line: bytes) -> bytes:
        """Return what the client lacks of a streamed line or event: all, nothing, or a new line with the rest.

        Until a node is lost, this is the line as it came. Raises NodeFailure for a line that tells an error, Refusal
        for a replay that differs.
        """
        event = EVENT_LEAD.match(line)
        lead = event[0] if event else b""
        text = line[len(lead):].strip()
        value = {"done": True} if text == b"[DONE]" else object_in(text) or {}
        if value.get("error"):
            raise NodeFailure("model", f"broke off: {error_text(value)}")
        was_behind, said = self.is_behind, delta_texts(value)
        rests = [self.consume(key, text) for _, key, text in said]
        is_last = value.get("done") is True or value.get("type") in LAST_EVENTS
        if is_last and self.is_behind:
            raise Refusal(502, "the answer of another node is shorter")
        differs = bool(lead) and self.rename(value)
        self.done = is_last
        counts = bool(lead and value.get("usage") and not value.get("choices"))     # others may have it, all zeros
        if was_behind and not any(rests) and (said or self.is_behind) or self.lost and self.used and counts:
            return b""
        self.used = self.used or counts
        differs = self.renumber(value) or differs
        if not was_behind and not differs:
            return line
        for (holder, key, text_of_key), rest in zip(said, rests, strict=True):
            if not rest:
                holder[key] = type(holder[key])()
            elif rest != text_of_key:
                holder[key] = rest
        return lead + json.dumps(value).encode() + (b"\n\n" if lead else b"\n")


class LineRelay(EditedRelay):
    """Relay a deterministic stream in whole lines, and keep a transcript, so that another node can continue it."""

    __slots__ = ("transcript",)

    def __init__(self, exchange: Exchange, begun: Begun, edits: Edits | None, transcript: Transcript) -> None:
        super().__init__(exchange, begun, edits)
        self.transcript = transcript
        if transcript.relay is not None:    # the client has the head, and a part of the body
            self.framing, self.prelude = transcript.relay.framing, b""

    def data(self, data: bytes) -> None:
        Sink.data(self, data)       # the long way: every line is read

    def take(self, payload: bytes, verbatim: bytes | None) -> None:
        if not payload:
            return
        self.heard(payload.count(b"\n"), self.time())
        before, (whole, self.partial) = self.partial, self.whole_lines(payload, False)
        if whole and not whole.endswith(self.ends):     # a picture, say: it passes, and that ends the transcript
            self.transcript.at = sys.maxsize
        is_all = not before and not self.partial and not self.body.done
        self.pass_on(whole, verbatim if is_all else None)

    def pass_on(self, whole: bytes, verbatim: bytes | None = None) -> None:
        """Send the client what it lacks of whole lines; `verbatim`: the same lines as chunks, or None."""
        lines, parts = split_lines(whole, self.separator), list[bytes]()
        failure: Failure | Answer | None = None
        try:
            for line in lines:
                parts.append(self.transcript.unsent_part(line))
        except (NodeFailure, Refusal) as ended:
            failure = ended.value
            self.withheld = b"".join(lines[len(parts):]) if isinstance(ended, NodeFailure) else b""
        data = b"".join(parts)
        if failure and self.prelude:    # nothing is out, and nothing has to be: any node may begin anew
            self.transcript.begin_again()
        elif data:
            self.keep(data)
            self.transcript.relay = self
            data = b"".join(map(self.edits.line, parts)) if self.edits else data
            framed = chunk(data) if verbatim is None or data != whole else verbatim
            self.write(framed if self.framing is Framing.CHUNKED else data)
        if failure:
            self.finish(failure)

    def end(self, clean: bool) -> None:
        """End the stream; one that ends with its connection and without its last line was cut."""
        if not self.over:
            self.pass_on(self.partial)
        if self.over:
            return
        if self.head.length == UNTIL_CLOSE and not self.is_complete():
            self.finish(Failure("died", "closed the connection"))
        elif self.transcript.is_behind:
            self.finish(Answer(502, "the answer of another node is shorter"))
        else:
            self.write(LAST_CHUNK if self.framing is Framing.CHUNKED else b"")
            Sink.end(self, clean)

    def is_complete(self) -> bool:
        return self.transcript.done

    def can_be_continued(self) -> bool:
        """Tell whether another node can go on."""
        return self.transcript.is_short and not self.is_complete() and not self.client.gone


async def rehearse(begun: Begun, known: str) -> None:
    """Read a replay until it has said all of `known`; what was read stays buffered for the relay.

    Raises NodeFailure, or Refusal for a replay that differs or takes more than REPLAY_BYTES.
    """
    connection, body, transcript = begun.connection, body_decoder(begun.answer.length), Transcript()
    events = b"event-stream" in begun.answer.fields.get(b"content-type", b"")
    separator, rest = EVENT_END if events else LINE_END, b""
    replay: list[bytes] = []
    room, transcript.known = REPLAY_BYTES, known
    while transcript.is_behind and not body.done:
        data, connection.buffer = connection.buffer, b""
        if not data:
            connection.transport.resume_reading()
            await connection.read_more()
            continue
        replay.append(data)
        room -= len(data)
        if room < 0:
            raise Refusal(502, "the answer of another node is too long to be compared")
        *lines, rest = separator.split(rest + body.feed(data)[0])
        for line in lines[::2]:     # the others are line ends
            if transcript.is_behind:
                transcript.unsent_part(line)
    if transcript.is_behind:
        raise Refusal(502, "the answer of another node is shorter")
    connection.buffer = b"".join(replay) + connection.buffer


# -----------------------------------------------------------------------------
# Without a slot: how does a request that need not queue reach a node?
#
# It goes to one node that has the model, or to the primary one. A body that nobody here needs is not read: an Upload
# passes it on as it comes, with back-pressure.
# -----------------------------------------------------------------------------

class Upload:
    """Pass a request body on to a node while it comes, in constant memory."""

    def __init__(self, client: ClientConnection, connection: NodeConnection, length: int | None,
                 turns: LoopTurns) -> None:
        self.client, self.connection, self.turns = client, connection, turns
        self.body = body_decoder(length)
        self.behind = b""           # what has come and is not decoded yet: chunks so small that it takes several steps
        self.catching_up: asyncio.Task[None] | None = None      # the task that does it

    def start(self, grace_s: float) -> None:
        """Begin with what came behind the head; the body's average is asked for after `grace_s`."""
        self.client.deadline_s = self.client.loop.time() + grace_s
        self.connection.source = self.client
        self.client.sink = self
        data = bytes(self.client.buffer)
        self.client.buffer.clear()
        if self.client.read_paused:
            self.client.resume_reading()
        self.data(data)

    def expire(self) -> None:
        """End an upload that is too slow, unless the node is what does not read."""
        if self.connection.write_paused:
            self.client.deadline_s = self.client.loop.time() + BODY_PAUSE_S
        elif self.connection.sink is None:
            self.connection.fail(Answer(408, "the request took too long to arrive", close=True))
        else:
            self.client.transport.abort()

    def data(self, data: bytes) -> None:
        """Take a piece from the client's socket; what lies behind the body stays for the next request."""
        self.client.deadline_s = body_due_s(self.client.deadline_s, len(data), self.client.loop.time())
        if self.connection.failure is not None:
            return                  # nobody reads it any more
        self.behind += data
        is_answered = socket_has(self.connection.transport, select.POLLIN)
        if self.catching_up is None and not is_answered:    # else asyncio's write to a node that has answered and left
            self.step()                                     # would fail before the answer is read: see it first
        if self.behind:
            self.client.pause_reading()
            self.catching_up = self.catching_up or self.client.loop.create_task(self.catch_up())

    async def catch_up(self) -> None:
        """Decode what has come, a step per turn of the loop; then read on."""
        while self.behind and self.client.sink is self and self.connection.failure is None:
            await self.turns.take()
            self.step()
        self.catching_up = None
        if not self.connection.write_paused:
            self.client.resume_reading()

    def end(self) -> None:
        """Take in no more."""
        if self.catching_up is not None:
            self.catching_up.cancel()
        self.client.sink, self.client.deadline_s = None, math.inf

    def step(self) -> None:
        """Decode some of what has come, and pass it on."""
        most = self.body.at_most() if isinstance(self.body, ChunkedBody) else len(self.behind)
        data, self.behind = self.behind[:most], self.behind[most:]
        try:
            payload, used = self.body.feed(data)
        except ProtocolError as error:
            if self.connection.sink is None:
                self.connection.fail(error.value)
            else:                   # an answer is on its way already; there is no room for another
                self.client.transport.abort()
            self.behind = b""
            return
        if isinstance(self.body, ChunkedBody):
            payload = chunk(payload) + (LAST_CHUNK if self.body.done else b"")
        if payload:
            self.connection.transport.write(payload)
        if self.body.done:
            self.client.sink, self.client.deadline_s = None, math.inf
            self.client.buffer += data[used:] + self.behind
            self.behind = b""


async def begin_upload(exchange: Exchange, lease: Lease) -> Begun:
    """Send a request whose body passes through as it comes, and wait until its answer has begun. Raises NodeFailure.

    It takes a fresh connection: what was sent on an idle one that turns out to be dead could not be sent again.
    """
    gateway, client, head = exchange.gateway, exchange.client, exchange.head
    pool = gateway.node_io.pools[lease.node]
    client.pause_reading()          # until the Upload takes the bytes
    connection = await pool.connect()
    lease.abandon = connection.fail
    upload, has_begun = Upload(client, connection, head.length, gateway.turns), False
    try:
        client.send_continue(head)
        connection.send(render_request(head, lease.node.settings, head.length), b"")
        upload.start(gateway.header_timeout_s)
        answer = await connection.response(head.method)
        exchange.keep, has_begun = head.keep_alive and upload.body.done, True
        return Begun(lease, connection, answer, upload=upload)
    finally:
        if not has_begun:
            upload.end()
            pool.give_back(connection)


async def serve_control(exchange: Exchange) -> None:
    """Send a request without a slot to one suitable node; to another one only if the first cannot be reached.

    An upload is tried once, and ends the connection unless the node has got it all: the rest of the body could be taken
    for the next request.
    """
    gateway, record, spec = exchange.gateway, exchange.record, exchange.spec
    dispatcher, loop = gateway.dispatcher, gateway.loop
    uploads = exchange.route.kind == "raw" and exchange.head.length != 0
    exchange.keep = exchange.keep and not uploads
    tried: set[str] = set()
    while True:
        lease, begun = dispatcher.lease_unqueued(record.id, spec, tried, loop.time()), None
        pool = gateway.node_io.pools[lease.node]
        record.node, record.reason = lease.node.name, lease.reason
        record.attempts += 1
        try:
            async with pool.unqueued:
                begun = await (begin_upload if uploads else begin)(exchange, lease)
                await relay_answer(exchange, begun)
            return
        except NodeFailure as failure:
            gateway.node_io.record_failure(lease, failure.value)
            tried.add(lease.node.name)
            if uploads or failure.kind != "refused" and not spec.repeatable or len(tried) >= MAX_ATTEMPTS:
                raise Refusal(502, f"{lease.node.name}: {failure}", close=uploads) from None
        finally:
            if begun is not None:
                if begun.upload is not None:
                    begun.upload.end()
                    begun.connection.clean &= begun.upload.body.done
                pool.give_back(begun.connection)
            dispatcher.release(lease, loop.time())


# -----------------------------------------------------------------------------
# Many nodes: how does one request change a model wherever it is?
#
# The request is sent to all nodes of the model at once. Their progress is merged into one stream that shows how far the
# slowest is. The index is refreshed before the last line, so that the client then finds the model changed. If a node
# fails, hangs or sends garbage, the answer is an error that names it.
# -----------------------------------------------------------------------------

class Outcome(NamedTuple):
    """What became of a change on one node. `body`: of its answer; of a stream the last line."""

    node: Node
    answer: ResponseHead | None
    body: bytes
    error: str                      # "" = it was done


class Progress:
    """Merge the progress of several nodes: the slowest node's of each layer; other lines once all nodes sent them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)     # of the nodes that are waited for
        self.counts: dict[str, dict[str, int]] = {}     # digest: {name: completed bytes}
        self.reached: dict[str, set[str]] = {}  # status without a digest: names that have sent it
        self.shown: dict[str, int] = {}         # digest or status: completed bytes, as the client saw them last

    def take(self, name: str, line: Json) -> Json | None:
        """Take in a line of one node; return the line that the client gets now, or None."""
        status, digest, done = str(line.get("status")), line.get("digest"), line.get("completed")
        if isinstance(digest, str):
            counts = self.counts.setdefault(digest, {})
            counts[name] = done if isinstance(done, int) else 0
            slowest = min(counts.get(other, 0) for other in self.names | {name})
            if slowest <= self.shown.get(digest, -1):
                return None
            self.shown[digest] = slowest
            return {**line, "completed": slowest}
        reached = self.reached.setdefault(status, set())
        reached.add(name)
        if status in self.shown or self.shown and not self.names <= reached:
            return None             # the very first line passes at once: something happens
        self.shown[status] = 0
        return line


class Lines(Sink):
    """Hand each line of an answer to `hear` as it comes, which may end the answer by raising NodeFailure."""

    __slots__ = ("hear", "rest", "last")
    reads_lines = True

    def __init__(self, connection: NodeConnection, head: ResponseHead, hear: Callable[[bytes], None]) -> None:
        super().__init__(connection, head)
        self.hear, self.rest, self.last = hear, b"", b""

    def take(self, payload: bytes, verbatim: bytes | None) -> None:
        *lines, self.rest = (self.rest + payload).split(b"\n")
        if len(self.rest) > MAX_LINE_BYTES:
            self.finish(Failure("garbage", "a line without end"))
        try:
            for line in lines:
                if line.strip() and not self.over:
                    self.last = line
                    self.hear(line)
        except NodeFailure as failure:
            self.finish(failure.value)

    async def collect(self) -> bytes:
        """Return the last line. Raises NodeFailure."""
        await self.finished()
        return self.rest or self.last


class LineAnswer:
    """An answer of lines to a client. Its head is that of a node's answer, and goes out with the first line."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.framing: Framing | None = None     # nothing is out yet

    def write(self, answer: ResponseHead | None, line: bytes) -> None:
        """Write a line; `answer` is the head of the node that it comes from."""
        record, data = self.exchange.record, line + b"\n"
        record.bytes += len(data)
        head = b""
        if self.framing is None:
            assert answer is not None       # the first line is a node's
            answer.length, record.status = None, answer.status
            self.framing, head = client_head(self.exchange, answer)
        self.exchange.client.write(head + (chunk(data) if self.framing is Framing.CHUNKED else data))

    def end(self) -> None:
        if self.framing is Framing.CHUNKED:
            self.exchange.client.write(LAST_CHUNK)


def read_line(line: bytes) -> Json:
    """Return the object in a line. Raises NodeFailure."""
    value = object_in(line)
    if value is None:
        raise NodeFailure("garbage", "answered what is not JSON")
    return value


def error_in(change: str, status: int, body: bytes) -> str:
    """Return why a change was not done, by a node's answer or last line, or "". Raises NodeFailure for garbage."""
    if status >= 400:
        value = object_in(body) or {}
        return error_text(value) if value.get("error") else f"answered {status}"
    if change in ("copy", "delete"):
        return "" if status == 200 else f"answered {status}"
    last = read_line(body)
    if last.get("error"):
        return error_text(last)
    done = last.get("done_reason") == "unload" if change == "unload" else last.get("status") == "success"
    return "" if done else "ended without success"


def without_absent(change: str, outcomes: list[Outcome]) -> list[Outcome]:
    """Leave out the nodes that had nothing to delete or unload, if another node had."""
    if change not in ("delete", "unload"):
        return outcomes
    return [outcome for outcome in outcomes if not outcome.answer or outcome.answer.status != 404] or outcomes


NOT_IN_REGISTRY = "file does not exist"


def lacks_nodes(outcomes: list[Outcome], wanted: int) -> bool:
    """Tell whether another node should pull a model: fewer than `wanted` could, for reasons of their own.

    They may be full, too old, or without the engine that the model needs. What the registry lacks nobody can pull.
    """
    errors = [outcome.error for outcome in outcomes if outcome.error]
    return len(outcomes) - len(errors) < wanted and not any(NOT_IN_REGISTRY in error for error in errors)


def explain_failure(outcomes: list[Outcome]) -> tuple[int, str]:
    """Return (status, text): which nodes failed, why, and on which the change was made."""
    failed = [outcome for outcome in outcomes if outcome.error]
    done = [outcome.node.name for outcome in outcomes if not outcome.error]
    statuses = [outcome.answer.status if outcome.answer else 502 for outcome in failed]
    status = 502 if done else max(502 if status < 400 else status for status in statuses)
    text = "; ".join(f"{outcome.node.name}: {outcome.error}" for outcome in failed)
    return status, text + (f"; done on {', '.join(done)}" if done else "")


async def change_on(exchange: Exchange, node: Node, hear: Callable[[Node, ResponseHead, bytes], None]) -> Outcome:
    """Make a change on one node; return its Outcome, never raise. `hear` gets each line; its NodeFailure ends it."""
    gateway, spec = exchange.gateway, exchange.spec
    dispatcher, loop = gateway.dispatcher, gateway.loop
    lease, begun = dispatcher.lease_on(exchange.record.id, spec, node, spec.change, loop.time()), None

    def on_line(line: bytes) -> None:
        lease.heard(0, loop.time())
        hear(node, answer, line)

    try:
        begun = await begin(exchange, lease)
        answer, lease.abandon = begun.answer, begun.connection.fail
        is_stream_of_lines = answer.status == 200 and b"ndjson" in answer.fields.get(b"content-type", b"")
        sink = Lines(begun.connection, answer, on_line) if is_stream_of_lines else Collector(begun.connection, answer)
        last = await sink.collect()
        if answer.status < 400:
            dispatcher.observe(lease, Timings(), loop.time())
        if edits := edits_of(exchange, begun):      # of an unload: no other change follows an alias
            last = at_once(edits.whole(last, answer))
        error = error_in(spec.change, answer.status, last)
        if not error and spec.change == "unload" and (runner := node.runners.get(spec.model or "")) is not None:
            runner.promised_to_unload()
        return Outcome(node, answer, last, error)
    except NodeFailure as failure:
        gateway.node_io.record_failure(lease, failure.value)
        return Outcome(node, None, b"", str(failure))
    except Refusal as refusal:      # the gateway's own lack of sockets
        return Outcome(node, None, b"", refusal.text)
    finally:
        lease.abandon = None
        if begun is not None:
            gateway.node_io.pools[node].give_back(begun.connection)
        dispatcher.release(lease, loop.time())


async def answer_change(exchange: Exchange, lines: LineAnswer, outcomes: list[Outcome]) -> None:
    """Write the end of the answer to a change, of which `lines` may be out. Raises Refusal."""
    failed = [outcome for outcome in outcomes if outcome.error]
    statuses = {outcome.answer.status if outcome.answer else 0 for outcome in outcomes}
    own = outcomes[0].answer        # it speaks for all if all did it, or all refused it alike
    is_one = not failed or len(outcomes) == 1 or len(statuses) == 1 and min(statuses) >= 400
    status, text = explain_failure(outcomes) if failed else (200, "")
    if failed:
        exchange.record.outcome, exchange.record.reason = "error", text
    if own and is_one and lines.framing is None and b"ndjson" not in own.fields.get(b"content-type", b""):
        await answer_whole(exchange, own, [outcomes[0].body])
        return
    if own and is_one:
        lines.write(own, outcomes[0].body)
    elif lines.framing is None:
        raise Refusal(status, text)
    else:
        lines.write(None, json.dumps({"error": text}).encode())
    lines.end()


async def serve_change(exchange: Exchange) -> None:
    """Change a model on all nodes concerned; succeed only if all of them do."""
    gateway, record, spec = exchange.gateway, exchange.record, exchange.spec
    nodes, spares = gateway.dispatcher.cluster.nodes_to_change(spec, gateway.options.replicas, gateway.loop.time())
    record.node, record.attempts = ",".join(node.name for node in nodes), len(nodes)
    wanted = len(nodes)
    record.reason = f"{spec.change} on {'every node that has it' if len(nodes) > 1 else 'one node'}"
    lines, progress = LineAnswer(exchange), Progress(node.name for node in nodes)

    def hear(node: Node, answer: ResponseHead, line: bytes) -> None:
        """Pass a line on: unchanged of one node, merged of several. The last line of each stream is held back."""
        value = read_line(line)
        if value.get("error"):
            progress.names.discard(node.name)
        elif value.get("status") != "success":
            due = progress.take(node.name, value)
            if len(nodes) == 1 or due is not None:
                lines.write(answer, line if len(nodes) == 1 else json.dumps(due, separators=(",", ":")).encode())

    async def one(node: Node) -> Outcome:
        outcome = await change_on(exchange, node, hear)
        progress.names.discard(node.name)       # it sends no more: the merged progress must not wait for it
        if outcome.error and spares:
            LOG.warning({"event": "failure", "node": node.name, "kind": spec.change, "why": outcome.error})
        return outcome

    outcomes = await asyncio.gather(*map(one, nodes))
    while spares and lacks_nodes(outcomes, wanted):
        nodes.append(spares.pop(0))
        record.node, record.attempts = f"{record.node},{nodes[-1].name}", record.attempts + 1
        outcomes.append(await one(nodes[-1]))
    done = [outcome for outcome in outcomes if not outcome.error]
    outcomes = done if len(done) == wanted else outcomes
    if spec.change != "unload":     # the client looks at the models next; a node that is silent now is probed later
        looks = [gateway.node_io.look_after_change(outcome.node) for outcome in outcomes if outcome.answer]
        await asyncio.gather(*looks, return_exceptions=True)
    pump(gateway)
    await answer_change(exchange, lines, without_absent(spec.change, outcomes))


# -----------------------------------------------------------------------------
# Batches: how do many nodes embed one long list?
#
# The list is cut into shares. Each is a request of its own in the queue: a share that fails moves on alone, and other
# requests run between two shares. The answers are joined as bytes: no number is parsed, so none can change, and 10 MB
# do not delay the streams of others.
# -----------------------------------------------------------------------------

SHARES_AHEAD = 2                    # of one batch per node, running and queued: the next one is there when one ends
LIST_START_BYTES = 64 * KIB         # of an answer, in which its list must begin
SHARE_ANSWER_BYTES = 256 * MIB      # 5000 vectors of 4096 numbers, as JSON
LIST_START = re.compile(rb'"(embeddings|data)"\s*:\s*\[')
INDEX = re.compile(rb'"index"\s*:\s*(\d+)')
TOTAL = re.compile(rb'"(prompt_eval_count|prompt_tokens|total_tokens|total_duration|load_duration)"\s*:\s*(\d{1,18})')


class Cut(NamedTuple):
    """An embedding's answer, cut at the list in it."""

    before: bytes
    rows: bytes
    after: bytes


@dataclass(slots=True)
class Share:
    """Some texts of a batch, their request, and a node's answer to it."""

    texts: list[str]
    spec: RequestSpec
    record: Record
    answer: ResponseHead | None = None
    cut: Cut | None = None


def cut_answer(body: bytes, count: int) -> Cut:
    """Return the Cut of an answer with `count` embeddings. Raises NodeFailure if it is none."""
    start, end = LIST_START.search(body, 0, LIST_START_BYTES), body.rfind(b"]")
    if not start or body[start.end():end].rstrip()[-1:] not in (b"]", b"}"):
        raise NodeFailure("garbage", "answered no list of embeddings")
    cut = Cut(body[:start.end()], body[start.end():end], body[end:])
    rows = cut.rows.count(b'"index"' if start[1] == b"data" else b"[")
    if rows != count:
        raise NodeFailure("garbage", f"answered {rows} embeddings for {count} texts")
    return cut


def renumbered(rows: bytes, offset: int) -> bytes:
    """Return rows of /v1/embeddings with `offset` added to each index."""
    return INDEX.sub(lambda number: b'"index":%d' % (int(number[1]) + offset), rows)


def joined(cuts: list[Cut], counts: list[int], took_s: float) -> Generator[None, None, list[bytes]]:
    """Return the pieces of one body made of all Cuts: token counts summed, `took_s` at work. One share is one step."""
    totals: collections.defaultdict[bytes, list[int]] = collections.defaultdict(list)
    for cut in cuts:
        for name, value in TOTAL.findall(cut.after):
            totals[name].append(int(value))

    def total(match: re.Match[bytes]) -> bytes:
        name, values = match[1], totals[match[1]]
        if name == b"total_duration":
            values = [round(took_s * 1e9)]
        return b'"%b":%d' % (name, max(values) if name == b"load_duration" else sum(values))

    pieces = [cuts[0].before]
    for cut, offset in zip(cuts, itertools.accumulate(counts[:-1], initial=0), strict=True):
        pieces += [b",", renumbered(cut.rows, offset)] if offset else [cut.rows]
        yield
    return [*pieces, TOTAL.sub(total, cuts[0].after)]


def cut_batch(spec: RequestSpec, sizes: list[int], record: Record) -> list[Share]:
    """Return the Shares of a batch, of the given sizes."""
    assert spec.batch is not None
    texts = iter(spec.batch["input"])
    parts = [list(itertools.islice(texts, size)) for size in sizes]
    return [Share(part, replace(spec, prompt_chars=sum(map(len, part)), inputs=len(part), batch=None),
                  replace(record)) for part in parts]


async def keep_share(share: Share, exchange: Exchange, begun: Begun) -> None:
    """Keep a node's answer to a share. Raises NodeFailure or NodeRefused."""
    dispatcher, loop, lease = exchange.gateway.dispatcher, exchange.gateway.loop, begun.lease
    lease.heard(0, loop.time())
    body = await Collector(begun.connection, begun.answer, SHARE_ANSWER_BYTES).collect()
    if begun.answer.status != 200:
        raise NodeRefused(NodeAnswer(lease.node.name, None, begun.answer, body))
    if edits := edits_of(exchange, begun):
        body = await exchange.gateway.work_on(body, edits.whole(body, begun.answer))
    share.answer, share.cut = begun.answer, cut_answer(body, len(share.texts))
    timings = read_timings(body[-TAIL_BYTES:])
    dispatcher.observe(lease, timings, loop.time())
    share.record.timings = accounted(lease, timings, exchange.head.path, True)


async def serve_share(batch: Exchange, share: Share, version: str) -> None:
    """Let a node that has one version of the model embed a share of a batch."""
    lines = [line for line in batch.head.lines if line[0] != b"content-encoding"]
    exchange = Exchange(batch.gateway, batch.client, replace(batch.head, lines=lines), share.record, keep=True)
    exchange.spec, exchange.version, exchange.alias = share.spec, version, batch.alias
    exchange.body = json.dumps({**(batch.spec.batch or {}), "input": share.texts}).encode()
    await serve_inference(exchange, functools.partial(keep_share, share))


async def serve_batch(exchange: Exchange, sizes: list[int], version: str) -> None:
    """Let the nodes that have one version of the model embed shares of a batch; answer as one node would."""
    gateway, record = exchange.gateway, exchange.record
    dispatcher, loop = gateway.dispatcher, gateway.loop
    shares = cut_batch(exchange.spec, sizes, record)
    left = iter(shares)

    async def work() -> None:
        """Serve one share after the other, so that other requests of the same client run in between."""
        for share in left:
            await serve_share(exchange, share, version)

    nodes = dispatcher.cluster.count_with(exchange.spec.model, version)
    tasks = [loop.create_task(work()) for _ in range(min(SHARES_AHEAD * nodes, len(shares)))]
    try:
        await asyncio.gather(*tasks)
    finally:                        # with the first that fails, all end
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        records = record.shares = [share.record for share in shares]
        record.held = tuple(itertools.chain.from_iterable(part.held for part in records))
        record.timings = Timings(prompt_tokens=sum(part.timings.prompt_tokens for part in records),
                                 estimated=any(part.timings.estimated for part in records))
        used = {part.node for part in records}
        record.node = ",".join(name for name in dispatcher.cluster.nodes if name in used)
        record.attempts = sum(part.attempts for part in records)
        record.queue_s = min(part.queue_s for part in records)
        record.reason = f"{len(shares)} shares"
    cuts, answer = [share.cut for share in shares if share.cut], shares[0].answer
    assert answer is not None       # as all shares have
    pieces = await gateway.turns.run(joined(cuts, sizes, loop.time() - record.started_s))
    await answer_whole(exchange, answer, pieces)


async def serve_embedding(exchange: Exchange) -> None:
    """Serve texts to embed: a long list by many nodes."""
    spec, gateway = exchange.spec, exchange.gateway
    if spec.batch and gateway.options.split_embed:
        sizes, version = gateway.dispatcher.split(spec, gateway.loop.time())
        if len(sizes) > 1:
            await serve_batch(exchange, sizes, version)
            return
    await serve_inference(exchange)


# -----------------------------------------------------------------------------
# Cluster-wide answers: what does the whole cluster look like, as one Ollama?
#
# Answers are merged from what the probes saw last, so that a slow or hung node delays nobody. Rows keep all fields that
# the nodes sent; of several rows for one name the newest counts. Orders to nodes and the dashboard's events follow.
# -----------------------------------------------------------------------------

def live_nodes(gateway: Gateway) -> list[Node]:
    """Return the nodes that are up. Raises Refusal if there is none."""
    nodes = [node for node in gateway.dispatcher.cluster.nodes.values() if node.up]
    if not nodes:
        raise Refusal(503, "no node is up", retry_after_s=gateway.options.probe_interval)
    return nodes


def merge_rows(rows: Iterable[Json], newest: str) -> list[Json]:
    """Return one row per canonical name: the one with the greatest `newest` field; greatest first."""
    best: dict[str, Json] = {}
    for row in rows:
        name = row_name(row)
        if name not in best or instant_s(row.get(newest)) > instant_s(best[name].get(newest)):
            best[name] = row
    return sorted(best.values(), key=lambda row: instant_s(row.get(newest)), reverse=True)


def all_tags(gateway: Gateway, models: ModelSet) -> list[Json]:
    """Return the rows of /api/tags for the models of a set, merged; what a sleeping node has can be asked for, too."""
    now, nodes = gateway.loop.time(), gateway.dispatcher.cluster.nodes.values()
    listed = [node for node in nodes if node.up or can_wake(node, now) and node.rows] or live_nodes(gateway)
    return models.rows(merge_rows((row for node in listed for row in node.rows.values()), "modified_at"))


def answer_root(gateway: Gateway) -> OwnAnswer:
    return OwnAnswer(200, b"Ollama is running", b"text/plain; charset=utf-8")


def answer_tags(gateway: Gateway, models: ModelSet) -> OwnAnswer:
    return json_answer({"models": all_tags(gateway, models)})


def answer_ps(gateway: Gateway, models: ModelSet) -> OwnAnswer:
    rows = merge_rows((row for node in live_nodes(gateway) for row in node.running), "expires_at")
    return json_answer({"models": models.rows(rows)})


def answer_version(gateway: Gateway) -> OwnAnswer:
    """Answer with the lowest version of all nodes: every node can do what it can."""
    versions = [node.version for node in live_nodes(gateway)]
    return json_answer({"version": min(versions, key=lambda text: [int(part) for part in re.findall(r"\d+", text)])})


def answer_status(gateway: Gateway) -> OwnAnswer:
    """Answer /api/status: the cloud is disabled only if it is on all nodes that said anything of it."""
    states = [node.cloud for node in live_nodes(gateway) if isinstance(node.cloud.get("cloud"), dict)]
    enabled = [state for state in states if not state["cloud"].get("disabled")]
    return json_answer((enabled or states or [{"cloud": {"disabled": False, "source": "none"}}])[0])


def answer_openai_models(gateway: Gateway, models: ModelSet) -> OwnAnswer:
    """Answer /v1/models; `data` is null when there is no model, as Ollama has it, and so are type and newline."""
    data = [{"id": row["name"], "object": "model", "created": int(instant_s(row.get("modified_at"))),
             "owned_by": row["name"].rpartition("/")[0].rpartition("/")[2] or "library"}
            for row in all_tags(gateway, models)]
    own = json_answer({"object": "list", "data": data or None})
    return OwnAnswer(200, own.body + b"\n", b"application/json")


async def serve_own(exchange: Exchange) -> None:
    """Answer from what is known. Only a route with a `look` waits for nodes: see NodeIO.look_again."""
    if exchange.route.look is not None:
        await exchange.gateway.node_io.look_again(exchange.route.look)
    answer_locally(exchange, exchange.gateway.own_answer(exchange.head.path, exchange.verdict.models))


async def serve_token_count(exchange: Exchange) -> None:
    """Answer how many tokens a prompt is, as learned from answers: Ollama itself has no such path."""
    tokens = exchange.gateway.dispatcher.cluster.estimates.demand(exchange.spec).prompt_tokens
    answer_locally(exchange, json_answer({"input_tokens": math.ceil(tokens)}))


ORDERS = "drain", "resume", "load", "unload"


async def serve_order(exchange: Exchange) -> None:
    """Drain or resume a node: no new work there, or some again; or have it load or unload a model. Answer at once, with
    its state. Raises Refusal."""
    gateway, nodes = exchange.gateway, exchange.gateway.dispatcher.cluster.nodes
    name, _, verb = exchange.head.path.removeprefix("/api/nodes/").rpartition("/")
    if name not in nodes or verb not in ORDERS:
        raise Refusal(404, f"POST /api/nodes/NAME/drain or /resume, or /load?model=MODEL or /unload?model=MODEL, "
                      f"where NAME is one of {', '.join(nodes)}")
    node = nodes[name]
    if verb in ("drain", "resume"):
        gateway.dispatcher.drain(node, verb == "drain")
        gateway.files.save_soon()
        gateway.node_io.log_state(node, f"asked to {verb}")
    else:
        model = ordered_model(exchange, node)
        work = load_ordered if verb == "load" else unload_ordered
        gateway.node_io.begin_job(node, functools.partial(work, model=model))
        await asyncio.sleep(0)      # it has begun, so that its state shows it
    gateway.answers.clear()         # it is to be seen at once
    pump(gateway)
    answer_locally(exchange, json_answer(node_stats(node, gateway.loop.time(), exchange.verdict.models)))


def ordered_model(exchange: Exchange, node: Node) -> str:
    """Return the model that an order names, canonical. Raises Refusal."""
    asked = urllib.parse.parse_qs(exchange.head.target.partition(b"?")[2].decode("latin-1")).get("model", [""])
    model = canonical(asked[-1])
    if model not in node.rows or model not in exchange.verdict.models:
        raise Refusal(404, f"{node.name} has no model {asked[-1][:SHOWN_CHARS]!r}: ?model=MODEL names one on its disk")
    if not node.up:
        raise Refusal(503, f"{node.name} is {state_in_words(node, exchange.gateway.loop.time())}", retry_after_s=1.0)
    if node.measuring is not None and node.measuring.loads:
        raise Refusal(503, f"{node.name} loads a model just now", retry_after_s=1.0)
    return model


def begin_endless(exchange: Exchange, content_type: bytes) -> None:
    """Begin an answer of the gateway's own that goes on until the connection closes."""
    exchange.client.begin_serving()
    exchange.keep, exchange.record.status = False, 200
    lines = [b"HTTP/1.1 200 OK", b"Content-Type: " + content_type, b"Cache-Control: no-store", UNBUFFERED,
             b"Connection: close", *exchange.record.cors]
    exchange.client.write(b"\r\n".join(lines) + b"\r\n\r\n")


async def serve_events(exchange: Exchange) -> None:
    """Send the dashboard what it shows, every EVENT_S, until it or the gateway goes; close the connection then.

    A gateway that is told to end shows what still runs until that has ended. The history of the day comes once, and
    again when it has changed.
    """
    gateway, client = exchange.gateway, exchange.client
    telemetry, models = gateway.telemetry, exchange.verdict.models
    sees_all = gateway.access.sees_all(exchange.head, exchange.verdict)
    may_order = gateway.access.may_order(exchange.head, exchange.verdict)
    begin_endless(exchange, b"text/event-stream")
    client.write(b"retry: 1000\n\n")
    day, is_last = b"", False
    while not (is_last or gateway.retired):
        is_last = gateway.draining and not (gateway.dispatcher.cluster.in_flight() or gateway.dispatcher.waiting)
        if not client.write_paused:     # one that does not read misses some
            state = telemetry.snapshot(models)
            state = telemetry.with_people(state) if sees_all else state
            client.write(b"data: " + (state[:-1] + b',"orders":true}' if may_order else state) + b"\n\n")
            if day is not telemetry.day_seen():
                day = telemetry.day_seen()
                client.write(b"event: day\ndata: " + day + b"\n\n")
        if not is_last:
            await asyncio.sleep(EVENT_S)


async def serve_peers(exchange: Exchange) -> None:
    """Tell a peer what runs and waits here, until it or the gateway goes; close the connection then. Raises Refusal."""
    gateway = exchange.gateway
    if gateway.access.needs_key and not gateway.access.sees_all(exchange.head, exchange.verdict):
        raise Refusal(403, "a peer needs a key with admin=yes")
    if len(gateway.peers.followers) >= MOST_PEERS:
        raise Refusal(503, f"{MOST_PEERS} others ask for that already")
    begin_endless(exchange, b"application/x-ndjson")
    follower = Follower(gateway, exchange.client)
    gateway.peers.followers.append(follower)
    try:
        follower.tell(progress=True)
        while not (gateway.retired or gateway.draining and follower.knows_nothing):
            await asyncio.sleep(SWEEP_S)
    finally:
        gateway.peers.followers.remove(follower)


# -----------------------------------------------------------------------------
# Usage: who used how much, of which model, on which node and which day?
#
# A day begins at local midnight, and a request counts on the day on which it ended. While it lasts, a day is a table:
# person, model and node -> what was used. A day that is over is closed: what stays is the text of its rows in the file,
# a sixth of that. Whatever goes through whole tables is written in steps.
# -----------------------------------------------------------------------------

MOST_PEOPLE, MOST_ROWS = 10_000, 12_000     # of one day: who and what comes on top is counted as OTHER
DAYS_KEPT, CLOSED_DAYS_BYTES = 90, 3 * MIB  # the oldest ones are folded: their users become OTHER
ROWS_IN_STEP = 500                  # 1 to 2 ms
OTHER = "other"
USAGE_FORMAT: Json = {"format": "sollol-usage", "version": 1}
ROW_GAP = ",\n"                     # between two rows in the file; within a row there is no line end
MOST_USED = 10**15                  # of whatever is counted: what says more is no usage file
MOST_GROUPS = 20_000                # rows of a report; more people are reported as OTHER

Person = tuple[str, str]            # the key, "" without one; the user behind it, without a key that or the address
RowName = tuple[Person, str, str]   # who, of which model, on which node
Group = tuple[str, ...]             # some of: day, key, user, model, node


@dataclass(slots=True)
class Use:
    """What was used."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    slot_s: float = 0.0             # for how long slots were held
    failures: int = 0               # of the requests: those with outcome `error` or `cut`
    estimated: int = 0              # of the requests: those of which no node told tokens

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def add(self, more: Use) -> None:
        self.requests += more.requests
        self.prompt_tokens += more.prompt_tokens
        self.output_tokens += more.output_tokens
        self.slot_s += more.slot_s
        self.failures += more.failures
        self.estimated += more.estimated

    def values(self) -> list[int | float]:
        """Return the numbers in the order of USE_NAMES."""
        return [self.requests, self.prompt_tokens, self.output_tokens, round(self.slot_s, 3), self.failures,
                self.estimated]


USE_NAMES = ("requests", "prompt_tokens", "output_tokens", "slot_s", "failures", "estimated")


def local_day() -> str:
    """Return the day that it is here, as YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d")


def days_before(day: str, days: int) -> str:
    """Return the day so many days earlier; the first one of all if there is none."""
    number = datetime.date.fromisoformat(day).toordinal() - days
    return datetime.date.fromordinal(max(1, number)).isoformat()


def uses_of(record: Record) -> dict[str, Use]:
    """Return what a finished request has used on each node. Itself it counts once, where it was answered.

    The tokens of a batch count where each share was embedded; slots count where they were held.
    """
    timings, failed = record.timings, record.outcome in ("error", "cut")
    is_untold = timings.estimated or bool(record.held) and record.outcome == "ok" and not (
        timings.prompt_tokens or timings.output_tokens)
    use = Use(1, timings.prompt_tokens, timings.output_tokens, 0.0, int(failed), int(is_untold))
    node = record.node.partition(",")[0]
    uses = {node: use}
    if record.shares:
        use.prompt_tokens = use.output_tokens = 0
    for share in record.shares:
        part = uses.setdefault(share.node, Use())
        part.prompt_tokens += share.timings.prompt_tokens
        part.output_tokens += share.timings.output_tokens
    for node, held_s in record.held:
        if node not in uses:
            uses[node] = Use()
        uses[node].slot_s += held_s
    return uses


class Day:
    """What was used on a day that is not closed yet."""

    def __init__(self) -> None:
        self.people: dict[Person, Use] = {}
        self.rows: dict[RowName, Use] = {}

    def add(self, person: Person, model: str, node: str, use: Use) -> None:
        """Count a use. The key is always known: there are few."""
        sums = self.people.get(person)
        if sums is None:
            if len(self.people) >= MOST_PEOPLE:
                person = person[0], OTHER
            sums = self.people.setdefault(person, Use())
        row = self.rows.get((person, model, node))
        if row is None:
            is_full = len(self.rows) >= MOST_ROWS
            name = ((person[0], OTHER), OTHER, OTHER) if is_full else (person, model, node)
            row = self.rows.setdefault(name, Use())
        sums.add(use)
        row.add(use)


def row_text(name: RowName, use: Use) -> str:
    """Return a row as it is in the file."""
    (key, user), model, node = name
    return json.dumps([key, user, model, node, *use.values()], separators=(",", ":"))


def read_row(row: Any) -> tuple[RowName, Use]:
    """Return what a row of the file says. Raises ValueError."""
    names, numbers = (row[:4], row[4:]) if isinstance(row, list) else ([], [])
    if (len(names) != 4 or not all(isinstance(name, str) and len(name) <= MAX_LINE_CHARS for name in names)
            or len(numbers) != len(USE_NAMES)
            or not all(type(number) in (int, float) and 0 <= number <= MOST_USED for number in numbers)):
        raise ValueError("a row is not [key, user, model, node, numbers]")
    key, user, model, node = names
    requests, prompt_tokens, output_tokens, slot_s, failures, estimated = numbers
    return ((key, user), model, node), Use(int(requests), int(prompt_tokens), int(output_tokens), float(slot_s),
                                           int(failures), int(estimated))


def row_groups(table: Day | str) -> Iterator[list[tuple[RowName, Use]]]:
    """Yield the rows of a day, closed or not, ROWS_IN_STEP at a time."""
    if isinstance(table, Day):
        rows = list(table.rows.items())
        for at in range(0, len(rows), ROWS_IN_STEP):
            yield rows[at:at + ROWS_IN_STEP]
        return
    lines = table.split(ROW_GAP) if table else []
    for at in range(0, len(lines), ROWS_IN_STEP):
        yield [read_row(row) for row in json.loads(f"[{','.join(lines[at:at + ROWS_IN_STEP])}]")]


def day_text(table: Day | str) -> Steps[str]:
    """Return the rows of a day as they are in the file."""
    if isinstance(table, str):
        return table
    texts = []
    for rows in row_groups(table):
        texts += [row_text(*row) for row in rows]
        yield
    return ROW_GAP.join(texts)


def folded(text: str) -> Steps[str]:
    """Return a closed day without its users."""
    sums: dict[RowName, Use] = {}
    for rows in row_groups(text):
        for ((key, user), model, node), use in rows:
            sums.setdefault(((key, user and OTHER), model, node), Use()).add(use)
        yield
    day = Day()
    day.rows = sums
    return (yield from day_text(day))


class Usage:
    """What everybody has used, by day. Pure: it is told which day it is."""

    def __init__(self) -> None:
        self.today = ""             # the day that was counted on last
        self.days: dict[str, Day] = {}
        self.closed: dict[str, str] = {}
        self.noted = 0              # changes with each note

    def note(self, day: str, person: Person, model: str, node: str, use: Use) -> None:
        """Count what a request used on one node."""
        if day != self.today:
            self.begin(day)
        self.days[day].add(person, model, node, use)
        self.noted += 1

    def begin(self, day: str) -> None:
        """Let a day be today; it is opened again if it was closed: by a restart, or because the clock was set."""
        self.today = day
        if day not in self.days:
            opened = self.days[day] = Day()
            for rows in row_groups(self.closed.pop(day, "")):
                for (person, model, node), use in rows:
                    opened.add(person, model, node, use)

    def close_days(self) -> Steps[None]:
        """Close all days but today, and forget what is too old or too much."""
        for day in [day for day in self.days if day != self.today]:
            text = yield from day_text(self.days[day])
            if day != self.today:   # the clock may have been set meanwhile
                self.closed[day] = text
                del self.days[day]
        for day in [day for day in self.closed if day < self.oldest_day()]:
            del self.closed[day]
        for day in sorted(self.closed):
            if self.closed_bytes() > CLOSED_DAYS_BYTES:
                text = yield from folded(self.closed[day])
                if day in self.closed:
                    self.closed[day] = text
        while self.closed_bytes() > CLOSED_DAYS_BYTES:
            del self.closed[min(self.closed)]

    def tables(self) -> dict[str, Day | str]:
        """Return all days."""
        return {**self.closed, **self.days}

    def oldest_day(self) -> str:
        """Return the first day that is kept. It follows from the last day but one: the clock may go wrong for once."""
        *_, reference, _ = "", *sorted(self.tables())
        return reference and days_before(reference, DAYS_KEPT - 2)

    def closed_bytes(self) -> int:
        """Return how much the closed days take."""
        return sum(map(len, self.closed.values()))

    def report(self, query: UsageQuery, key: str | None) -> Steps[list[tuple[Group, Use]]]:
        """Return the rows of a report, those with most tokens first, and if it is by day, the days in order.

        `key`: only what was used with it; None = all.
        """
        sums: dict[Group, Use] = {}
        select = group_of(query.by)
        tables = self.tables()
        for day in [day for day in tables if query.since <= day <= query.until]:
            for rows in row_groups(tables[day]):
                for ((of_key, user), model, node), use in rows:
                    if key is not None and of_key != key:
                        continue
                    group = select((day, of_key, user, model, node))
                    if group not in sums and len(sums) >= MOST_GROUPS:
                        group = select((day, of_key, OTHER, OTHER, OTHER))
                    sums.setdefault(group, Use()).add(use)
                yield
        items, ranked = list(sums.items()), []
        for at in range(0, len(items), ROWS_IN_STEP):
            ranked += [(group[0] if "day" in query.by else "", -use.tokens, group, use)
                       for group, use in items[at:at + ROWS_IN_STEP]]
            yield
        ranked.sort()               # each group is there once: no Use is compared
        return [(group, use) for _, _, group, use in ranked]

    def pieces(self) -> Steps[list[str]]:
        """Return the pieces of the usage file: one row a line."""
        pieces = [json.dumps(USAGE_FORMAT)[:-1] + ', "days": {']
        for number, (day, table) in enumerate(sorted(self.tables().items())):
            text = yield from day_text(table)
            pieces += [",\n" if number else "\n", f'"{day}": [\n', text, "]"]
        return [*pieces, "}}\n"]

    def load(self, text: bytes, today: str) -> None:
        """Take over what a usage file says. Raises ValueError, and has taken over nothing then."""
        days = object_of(USAGE_FORMAT, text).get("days")
        if not isinstance(days, dict) or not all(isinstance(rows, list) for rows in days.values()):
            raise ValueError("it has no days")
        self.closed = {parse_day(day): ROW_GAP.join([row_text(*read_row(row)) for row in rows])
                       for day, rows in days.items()}
        self.begin(today)
        at_once(self.close_days())


class UsageQuery(NamedTuple):
    """What a report is asked for: of which days, and what its rows stand for."""

    since: str                      # a day
    until: str                      # the last one
    by: Sequence[str] = ("user",)
    as_csv: bool = False


GROUP_NAMES = ("day", "key", "user", "model", "node")
USAGE_DAYS = 7                      # of a report, if it is not asked for others


def columns_of(by: Sequence[str]) -> list[str]:
    """Return the names in a row of a report. A user is one of a key."""
    return [name for name in GROUP_NAMES if name in by or name == "key" and "user" in by]


def group_of(by: Sequence[str]) -> Callable[[Group], Group]:
    """Return what picks the columns of a report out of (day, key, user, model, node)."""
    places = [GROUP_NAMES.index(name) for name in columns_of(by)]
    return lambda names: tuple([names[place] for place in places])


def parse_day(text: str) -> str:
    """Return a day that is written as YYYY-MM-DD. Raises ValueError."""
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.A):
            return datetime.date.fromisoformat(text).isoformat()
    raise ValueError(f"must be a day such as 2026-01-31, not {text[:SHOWN_CHARS]!r}")


def parse_since(text: str, today: str) -> str:
    """Return the first day of a report: YYYY-MM-DD, or 7d for the last seven, today among them. Raises ValueError."""
    if days := re.fullmatch(r"([1-9]\d{0,3})d", text, re.A):
        return days_before(today, int(days[1]) - 1)
    try:
        return parse_day(text)
    except ValueError as error:
        raise ValueError(f"{error}; 7d are the last seven days") from None


def parse_by(text: str) -> str:
    """Return the names of a report's columns, separated by commas. Raises ValueError."""
    if not set(text.split(",")) <= set(GROUP_NAMES):
        raise ValueError(f"must be some of {', '.join(GROUP_NAMES)}, separated by commas")
    return text


def parse_format(text: str) -> str:
    """Return json or csv. Raises ValueError."""
    if text not in ("json", "csv"):
        raise ValueError("must be json or csv")
    return text


def parse_usage_query(query: bytes, today: str) -> UsageQuery:
    """Return what the query of /api/usage asks for. Raises Refusal."""
    parsers: dict[str, Callable[[str], str]] = {
        "by": parse_by, "since": functools.partial(parse_since, today=today), "until": parse_day,
        "format": parse_format}
    asked: dict[str, str] = {}
    for name, text in urllib.parse.parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        try:
            if name not in parsers:
                raise ValueError(f"is unknown; there are {', '.join(parsers)}")
            if name in asked:
                raise ValueError("is given twice")
            asked[name] = parsers[name](text)
        except ValueError as error:
            raise Refusal(400, f"{name[:SHOWN_CHARS]!r} {error}") from None
    since = asked.get("since", days_before(today, USAGE_DAYS - 1))
    until = asked.get("until", max(since, today))
    if until < since:
        raise Refusal(400, f"'until' must not be before {since}, the first day")
    return UsageQuery(since, until, asked.get("by", "user").split(","), asked.get("format") == "csv")


def csv_cell(text: str) -> str:
    """Return a text for a table; spreadsheets would compute one that begins as a formula."""
    text = "'" + text if text[:1] in ("=", "+", "-", "@") else text
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def usage_csv(query: UsageQuery, rows: list[tuple[Group, Use]]) -> Steps[bytes]:
    """Return a report as CSV (RFC 4180), with a line of names."""
    pieces = [",".join([*columns_of(query.by), *USE_NAMES])]
    for at in range(0, len(rows), ROWS_IN_STEP):
        pieces += [",".join([*map(csv_cell, group), *map(str, use.values())])
                   for group, use in rows[at:at + ROWS_IN_STEP]]
        yield
    return "\r\n".join([*pieces, ""]).encode(errors="replace")


def usage_json(query: UsageQuery, rows: list[tuple[Group, Use]]) -> Steps[bytes]:
    """Return a report as JSON."""
    names, total, texts = (*columns_of(query.by), *USE_NAMES), Use(), []
    for at in range(0, len(rows), ROWS_IN_STEP):
        for group, use in rows[at:at + ROWS_IN_STEP]:
            total.add(use)
            texts.append(json.dumps(dict(zip(names, (*group, *use.values()), strict=True)), separators=(",", ":")))
        yield
    lead = json.dumps({"since": query.since, "until": query.until, "by": query.by,
                       "total": dict(zip(USE_NAMES, total.values(), strict=True))}, separators=(",", ":"))
    return f'{lead[:-1]},"rows":[{",".join(texts)}]}}'.encode()


async def serve_usage(exchange: Exchange) -> None:
    """Answer who used what: all to an admin, and to a key what was used with it. Raises Refusal."""
    gateway, telemetry, key = exchange.gateway, exchange.gateway.telemetry, exchange.verdict.key
    sees_all = gateway.access.sees_all(exchange.head, exchange.verdict)
    if key is None and not sees_all:
        raise Refusal(403, "only this machine, or with --keys a key, may see that")
    query = parse_usage_query(exchange.head.target.partition(b"?")[2], local_day())
    exchange.client.begin_serving()
    telemetry.tally()
    async with telemetry.reporting:     # a report may take some MiB while it is made
        steps = telemetry.usage.report(query, None if sees_all or key is None else key.settings.name)
        rows = await gateway.turns.run(steps)
        body = await gateway.turns.run((usage_csv if query.as_csv else usage_json)(query, rows))
    kind = b"text/csv; charset=utf-8" if query.as_csv else b"application/json; charset=utf-8"
    answer_locally(exchange, OwnAnswer(200, body, kind, [b"Cache-Control: no-store"]))


# -----------------------------------------------------------------------------
# What is going on: health, statistics, the log
# -----------------------------------------------------------------------------

TALLY_DELAY_S = 0.05                # finished requests are counted and logged together, at most this late
NOTIFY_S = 0.2                      # most that a message to the service manager, and with it every stream, may wait
MAX_LOG_BYTES = 1 * MIB             # of the log, not yet written: some 4,000 requests
LOG_FLUSH_S, LOG_RETRY_S = 1.0, 0.05    # at the end; while its descriptor takes nothing

# Prometheus keeps a series for each combination of labels, so no label may hold what clients can make up.
MOST_SERIES = 5000                  # of one family; after that its models are folded into `other`
TIME_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
STEP_VALUES = 500                   # of one step, the latest: enough for a P95
PART_S, PARTS_KEPT = 300.0, 288     # the dashboard's other lines: a day
FAILURES_KEPT, FAILURE_CHARS = 100, 300     # the last failures of nodes, and of the text of each


def answer_health(gateway: Gateway) -> OwnAnswer:
    """Answer /api/health: 200 while at least one node is alive, or asleep, and the gateway is to go on.

    A node that answers only errors is not counted as up.
    """
    now, nodes = gateway.loop.time(), gateway.dispatcher.cluster.nodes.values()
    alive = [node for node in nodes if node.is_alive(now)]
    up = sum(1 for node in alive if not node.error_share.is_all(now))
    draining, down = sum(node.draining for node in nodes), sum(not node.is_reachable(now) for node in nodes)
    ready = any(is_at_hand(node, now) for node in nodes)
    status = "down" if not ready else "ok" if up == len(nodes) else "degraded"
    if gateway.leaving:
        status = "draining"
    return json_answer({
        "status": status, "service": "SOLLOL", "version": __version__, "uptime_s": round(now - gateway.started_s, 3),
        "draining": gateway.leaving, "nodes": {"up": up, "draining": draining, "down": down, "total": len(nodes)},
        "queued": len(gateway.dispatcher.waiting),
        "inflight": gateway.dispatcher.cluster.in_flight()}, 200 if ready and not gateway.leaving else 503)


def percentile(ordered: list[float], share: float) -> float | None:
    """Return the nearest-rank percentile of an ascending list, None for an empty one."""
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)] if ordered else None


def rounded(seconds: float | None) -> float | None:
    """Return a time to the millisecond, None for None."""
    return None if seconds is None else round(seconds, 3)


def shown(name: str | None) -> str | None:
    """Return a name for logs and statistics: a client may have made it up, so cut it at SHOWN_CHARS."""
    return name and name[:SHOWN_CHARS]


def runner_stats(node: Node, model: str, now: float) -> Json:
    """Return what /api/stats says of one model on one node."""
    runner = node.runners[model]
    return {"on_disk": model in node.rows, "resident": runner.ready_s is not None,
            "loading": runner.ready_s is not None and runner.ready_s > now,
            "vram_bytes": int(runner.vram_bytes) or None, "slots": runner.slots.count,
            "slots_known": runner.slots.origin,
            "inflight": sum(lease.ticket.spec.model == model for lease in runner.leases),
            "decode_tok_s": round(1 / runner.speeds.decode_s, 1) if runner.speeds.decode_s else None,
            "prefill_tok_s": round(1 / runner.speeds.prefill_s, 1) if runner.speeds.prefill_s else None,
            "load_s": round(runner.speeds.load_s, 2) or None, "samples": runner.speeds.samples,
            "batch_exponent": round(runner.batching.batch_exponent, 2)}


def running_stats(lease: Lease, now: float) -> Json:
    """Return what /api/stats says of one running request."""
    spec = lease.ticket.spec
    return {"id": lease.ticket.id, "model": shown(spec.model), "priority": spec.priority, "client": spec.client,
            "slot": lease.runner is not None, "since_s": round(now - lease.sent_s, 3),
            "began": lease.first_s is not None,
            "predicted_left_s": round(lease.predicted_end_s - now, 3) if lease.predicted_end_s else None,
            "reason": lease.reason}


def node_slots(node: Node) -> tuple[int, str]:
    """Return (slots, how they are known) of a node's model that is resident, or was used last."""
    runner = max(node.runners.values(), key=lambda runner: (runner.ready_s is not None, runner.used_s), default=None)
    return (runner.slots.count, runner.slots.origin) if runner else (node.settings.slots or 1, "guessed")


def state_in_words(node: Node, now: float) -> str:
    """Return the state of a node for people to read; of a dead drained node both."""
    return "down, draining" if node.draining and not node.is_reachable(now) else node.state(now)


def node_stats(node: Node, now: float, seen: ModelSet = EVERY_MODEL) -> Json:
    """Return what /api/stats says of one node, and of the models `seen`."""
    latencies_s, error = sorted(node.latencies_s), node.last_error
    text = error and (error.text if seen is EVERY_MODEL else f"status {error.status}")    # it may name a model
    slots, slots_known = node_slots(node)
    return {
        "name": node.name, "url": node.settings.url, "state": node.state(now), "draining": node.draining,
        "version": node.version, "primary": node.settings.primary, "slots": slots, "slots_known": slots_known,
        "running": [running_stats(lease, now) for lease in node.leases if (lease.ticket.spec.model or "") in seen],
        "inflight": len(node.leases), "requests": node.requests, "errors": node.errors,
        "error_share": node.error_share.share(now),
        "last_error": error and {"text": text, "status": error.status, "ago_s": round(now - error.at_s, 3)},
        "breaker": node.breaker.state(now), "speed": round(node.speed, 3), "rtt_ms": round(node.rtt_s * 1000, 2),
        "latency_s": {f"p{share}": rounded(percentile(latencies_s, share / 100)) for share in (50, 95, 99)},
        "models": {model: runner_stats(node, model, now) for model in sorted(node.runners) if model in seen}}


def queue_stats(dispatcher: Dispatcher, now: float, seen: ModelSet = EVERY_MODEL) -> list[Json]:
    """Return what /api/queue says of the waiting tickets for the models `seen`, the next one first.

    Their cost is estimated anew; the places of the others are counted.
    """
    forecast = Forecast(dispatcher.cluster, now)
    return [ticket_stats(ticket, position, now, forecast.start_s(dispatcher.cluster.estimates.demand_of(ticket)))
            for position, ticket in enumerate(dispatcher.waiting.in_order(), 1) if (ticket.spec.model or "") in seen]


def ticket_stats(ticket: Ticket, position: int, now: float, start_s: float | None) -> Json:
    """Return what is said of one waiting ticket; `start_s`: when it is predicted to begin, in seconds from now."""
    return {"id": ticket.id, "model": shown(ticket.spec.model), "priority": ticket.spec.priority,
            "client": ticket.spec.client, "position": position, "waited_s": round(now - ticket.arrived_s, 3),
            "predicted_start_s": rounded(start_s)}


def answer_queue(gateway: Gateway, models: ModelSet) -> OwnAnswer:
    """Answer /api/queue: the waiting tickets alone."""
    return json_answer({"queue": queue_stats(gateway.dispatcher, gateway.loop.time(), models)})


def decision_stats(decisions: Sequence[Decision], now: float, seen: ModelSet) -> list[Json]:
    """Return what is said of decisions about the models `seen`, the last one first."""
    return [{"ago_s": round(now - made.at_s, 3), "id": made.id, "model": shown(made.model), "node": made.node,
             "predicted_finish_s": {other.runner.node.name: round(other.finish_s, 3) for other in made.candidates}}
            for made in reversed(decisions) if (made.model or "") in seen]


def peer_stats(peer: PeerGateway, now: float) -> Json:
    """Return what /api/stats says of another gateway: what of its requests counts here."""
    return {"name": peer.name, "url": peer.settings.url, "state": peer.state, "why": peer.why or None,
            "since_s": round(now - peer.since_s, 3), "running": len(peer.slots.leases), "waiting": len(peer.waiting)}


def answer_stats(gateway: Gateway, models: ModelSet) -> OwnAnswer:
    """Answer /api/stats: nodes, queue and the last decisions."""
    gateway.telemetry.tally()
    dispatcher, now, outcomes = gateway.dispatcher, gateway.loop.time(), gateway.telemetry.metrics.outcomes()
    view = look(gateway, models)
    return json_answer({
        "headline": headline_of(view.situation)._asdict(),
        "service": "SOLLOL", "version": __version__, "policy": gateway.options.policy,
        "uptime_s": round(now - gateway.started_s, 3), "draining": gateway.leaving,
        "nodes": [node_stats(node, now, models) | {"outcomes": outcomes[node.name]}
                  for node in dispatcher.cluster.nodes.values()],
        "queue": queue_stats(dispatcher, now, models),
        "rescues": {"whole": dispatcher.rescues["whole"], "broken": dispatcher.rescues["broken"]},
        "peers": [peer_stats(peer, now) for peer in gateway.peers.others.values()],
        "decisions": decision_stats(dispatcher.policy.decisions, now, models)})


LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})


def labelled(**labels: str | int) -> str:
    """Return labels as the text format has them."""
    return ",".join(f'{name}="{str(value).translate(LABEL_ESCAPES)}"' for name, value in labels.items())


def route_label(path: str) -> str:
    """Return the path's row in the table of routes, or `other`."""
    if path in KNOWN_PATHS:
        return path
    return next((above for _, above, _ in ROUTES_BELOW if path.startswith(above)), "other")


class Step:
    """What finished within STEP_S, and how long the queue was meanwhile, for the dashboard's lines."""

    def __init__(self, number: int) -> None:
        self.number = number        # of the step, since the clock's zero
        self.requests = 0           # that were answered
        self.failed = 0             # that ended with an error, a cut, or a refusal for want of a node or of room
        self.queued = 0             # most that waited
        self.total_s: collections.deque[float] = collections.deque(maxlen=STEP_VALUES)
        self.first_s: collections.deque[float] = collections.deque(maxlen=STEP_VALUES)
        self.tokens: collections.Counter[str] = collections.Counter()       # node: output tokens
        self.answers: collections.Counter[str] = collections.Counter()      # node: those of `requests`
        self.errors: collections.Counter[str] = collections.Counter()       # node: attempts that it failed
        self.cuts: collections.Counter[str] = collections.Counter()         # node: streams that broke off there
        self.bad_models: collections.Counter[str] = collections.Counter()   # model: attempts that nodes failed
        self.times = StepTimes()    # see `rank`
        self.sorted_first_s: list[float] = []
        self.ranked = 0             # after how many requests

    def add(self, node: str, total_s: float, first_s: float | None, tokens: int) -> None:
        """Take in a finished request; `first_s`: None if it had no first byte."""
        self.requests += 1
        self.total_s.append(total_s)
        if first_s is not None:
            self.first_s.append(first_s)
        self.tokens[node] += tokens
        self.answers[node] += 1

    def rank(self) -> Step:
        """Bring `times` and `sorted_first_s` up to date: no work for a step that is over. Returns itself."""
        if self.ranked != self.requests:
            total_s, self.sorted_first_s = sorted(self.total_s), sorted(self.first_s)
            self.times = StepTimes(*(rounded(percentile(values, share)) for values in (total_s, self.sorted_first_s)
                                     for share in (0.5, 0.95)))
            self.ranked = self.requests
        return self


class StepTimes(NamedTuple):
    """Percentiles of a Step, in seconds; None where nothing finished."""

    total_p50_s: float | None = None
    total_p95_s: float | None = None
    first_p50_s: float | None = None
    first_p95_s: float | None = None


class DayPart(NamedTuple):
    """What happened in PART_S of the wall clock."""

    number: int                     # since 1970
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    queued: int = 0                 # most that waited
    p95_s: float | None = None


class History:
    """The last day in parts of PART_S, which Steps are folded into."""

    def __init__(self) -> None:
        self.parts: collections.deque[DayPart] = collections.deque(maxlen=PARTS_KEPT)
        self.number = 0             # of the part that lasts; 0 = not known yet
        self.folded = -1            # the last Step that is in a part
        self.changes = 0

    def turn(self, steps: Iterable[Step], now: float, wall_s: float) -> None:
        """Begin another part if it is time, and fold the Steps that are over into the one that was."""
        number = int(wall_s // PART_S)
        if self.number not in (0, number):
            self.fold(steps, int(now // STEP_S) - 1)
        self.number = number

    def fold(self, steps: Iterable[Step], last: int) -> None:
        """Add the Steps up to number `last` to the part that lasts. 5 ms if each is full, every five minutes."""
        if not self.number:
            return
        over = [step for step in steps if self.folded < step.number <= last]
        self.folded = last
        total_s = sorted(itertools.chain.from_iterable(step.total_s for step in over))
        self.add(DayPart(self.number, sum(step.requests for step in over), sum(step.failed for step in over),
                         sum(step.tokens.total() for step in over), max((step.queued for step in over), default=0),
                         rounded(percentile(total_s, 0.95))))

    def add(self, part: DayPart) -> None:
        """Take in a part, or the rest of one that a restart has cut in two. A clock that is set back overwrites."""
        before = [known for known in self.parts if known.number == part.number]
        while self.parts and self.parts[-1].number >= part.number:
            self.parts.pop()
        if before:
            times_s = [one.p95_s for one in (before[0], part) if one.p95_s is not None]
            part = DayPart(part.number, before[0].requests + part.requests, before[0].failed + part.failed,
                           before[0].tokens + part.tokens, max(before[0].queued, part.queued),
                           max(times_s, default=None))
        self.parts.append(part)
        self.changes += 1

    def kept(self) -> list[str]:
        """Return the parts for the state file, one text each."""
        return [json.dumps(part, separators=(",", ":")) for part in self.parts]

    def recall(self, entries: object) -> None:
        """Take over what `kept` returned; what is no part is left out."""
        for entry in entries[-PARTS_KEPT:] if isinstance(entries, list) else ():
            part = read_part(entry)
            if part is not None and (not self.parts or part.number > self.parts[-1].number):
                self.add(part)

    def as_seen(self) -> Json:
        """Return what the dashboard shows: one value a part, None for those of which nothing is known."""
        last = max(self.number - 1, self.parts[-1].number if self.parts else 0)
        by_number = {part.number: part for part in self.parts}
        parts = [by_number.get(number) for number in range(last - PARTS_KEPT + 1, last + 1)]
        columns = zip(*(part or (None,) * len(DayPart._fields) for part in parts), strict=True)
        return {"step_s": PART_S, "end_s": (last + 1) * PART_S, **dict(zip(DayPart._fields, columns, strict=True))}


def read_part(entry: object) -> DayPart | None:
    """Return a part of the state file, None if it is none."""
    try:
        values = json.loads(entry) if isinstance(entry, str) else None
    except ValueError:
        return None
    if not isinstance(values, list) or len(values) != len(DayPart._fields):
        return None
    number, requests, failed, tokens, queued, p95_s = values
    if not all(type(count) is int and 0 <= count <= MOST_USED for count in values[:-1]):
        return None
    is_time = type(p95_s) in (int, float) and 0 <= p95_s < 1e6
    return DayPart(number, requests, failed, tokens, queued, float(p95_s) if is_time else None)


class NotedFailure(NamedTuple):
    """A failure of a node, or of an order to it. The same again is counted and becomes the last one."""

    at_s: float
    node: str
    model: str
    kind: str
    text: str
    status: int | None              # of its answer, if it was one
    client: str                     # who asked last
    times: int = 1

    @property
    def what(self) -> tuple[str, str, str, str]:
        return self.node, self.model, self.kind, self.text


Series = collections.Counter[tuple[str | int, ...]]         # values of labels: count


class Metrics:
    """Count what finished requests were like, nothing per token. Names that a client can invent share a label."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.requests: Series = collections.Counter()       # (node, model, route, status, outcome)
        self.tokens: Series = collections.Counter()         # (node, model, prompt or output, key)
        self.slot_s: dict[str, float] = collections.defaultdict(float)      # by key: for how long slots were held
        self.failovers: Series = collections.Counter()      # (node, reason)
        self.races: Series = collections.Counter()          # (node, yes or no: it won)
        self.request_s, self.first_s = Histogram(TIME_BOUNDS_S), Histogram(TIME_BOUNDS_S)
        self.queue_s: dict[int | str, Histogram] = collections.defaultdict(     # by priority
            lambda: Histogram(TIME_BOUNDS_S))
        self.steps: collections.deque[Step] = collections.deque(maxlen=STEPS_KEPT)      # those in which something was

    def count(self, counter: Series, amount: int, node: str, model: str, *more: str | int) -> None:
        """Add to a counter; once it has MOST_SERIES, new models are folded."""
        key = node, model, *more
        if key not in counter and len(counter) >= MOST_SERIES:
            key = node, "other", *more
        counter[key] += amount

    def step(self, now: float) -> Step:
        """Return the Step that `now` falls into; the last one for what is counted a moment late."""
        number = int(now // STEP_S)
        if not self.steps or self.steps[-1].number < number:
            self.steps.append(Step(number))
        return self.steps[-1]

    def outcomes(self) -> dict[str, collections.Counter[str]]:
        """Return how the requests that each node answered ended: {node: {outcome: count}}."""
        outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for (node, *_, outcome), count in self.requests.items():
            outcomes[str(node)][str(outcome)] += count
        return outcomes

    def count_request(self, record: Record, total_s: float) -> None:
        """Take in a finished request."""
        cluster, node, model = self.dispatcher.cluster, record.node, record.model
        if node and node not in cluster.nodes:
            node = "several" if "," in node else "other"
        if model and model not in cluster.holders:
            model = "other"         # clients can make up any number of names
        self.count(self.requests, 1, node, model, route_label(record.path), record.status, record.outcome)
        if record.path not in INFERENCE_PATHS:
            return
        if record.outcome == "cut" or record.outcome in ("error", "refused") and not 400 <= record.status < 500:
            step = self.step(record.started_s + total_s)
            step.failed += 1        # its client did not get it answered
            if record.outcome == "cut":
                step.cuts[record.node] += 1
        if not record.attempts:
            return
        first_s = None if record.first_s is None else record.first_s - record.started_s
        if record.outcome == "ok":
            self.step(record.started_s + total_s).add(node, total_s, first_s, record.timings.output_tokens)
        self.request_s.add(total_s)
        if first_s is not None:
            self.first_s.add(first_s)
        self.queue_s[record.priority].add(record.queue_s)
        for kind, tokens in (("prompt", record.timings.prompt_tokens), ("output", record.timings.output_tokens)):
            if tokens:
                self.count(self.tokens, tokens, node, model, kind, record.key)
        for _, held_s in record.held:
            self.slot_s[record.key] += held_s


Samples = Iterable[tuple[str, str, float]]


def cluster_families(dispatcher: Dispatcher, seen: ModelSet, now: float) -> Iterable[tuple[str, str, str, Samples]]:
    """Yield the families that tell who waits for what, and where the models `seen` are."""
    cluster, tickets = dispatcher.cluster, dispatcher.waiting.tickets
    wanted = collections.Counter(ticket.spec.model for ticket in tickets)
    yield ("sollol_queue_oldest_seconds", "gauge", "Age of the waiting request that came first, 0 without any.",
           [("", "", round(now - min((ticket.arrived_s for ticket in tickets), default=now), 3))])
    yield ("sollol_node_wanted", "gauge", "Waiting requests whose model a node has.",
           [("", labelled(node=node.name), sum(wanted[model] for model in wanted if model in node.rows))
            for node in cluster.nodes.values()])
    yield ("sollol_model_nodes", "gauge", "Nodes with a model that are up and not drained, or asleep.",
           [("", labelled(model=model or ""), sum(is_at_hand(runner.node, now) for runner in holders))
            for model, holders in cluster.holders.items() if (model or "") in seen])
    yield ("sollol_model_resident", "gauge", "1 for a model that is in a node's memory, or is being loaded.",
           [("", labelled(node=node.name, model=model), 1) for node in cluster.nodes.values()
            for model, runner in node.runners.items() if runner.ready_s is not None and model in seen])


def metric_families(gateway: Gateway, seen: ModelSet) -> Iterable[tuple[str, str, str, Samples]]:
    """Yield (name, type, help, [(suffix, labels, value)]) of everything that /metrics shows of the models `seen`."""
    metrics, dispatcher, now = gateway.telemetry.metrics, gateway.dispatcher, gateway.loop.time()
    nodes = dispatcher.cluster.nodes.values()
    waiting = collections.Counter(ticket.spec.priority for ticket in dispatcher.waiting.tickets)

    def counted(counter: Series, *names: str) -> Samples:
        rows = [(dict(zip(names, key, strict=True)), value) for key, value in counter.items()]
        return [("", labelled(**labels), value) for labels, value in rows if "model" not in labels
                or str(labels["model"]) in seen]

    def of_nodes(value: Callable[[Node], float]) -> Samples:
        return [("", labelled(node=node.name), value(node)) for node in nodes]

    yield ("sollol_requests_total", "counter", "Finished requests.",
           counted(metrics.requests, "node", "model", "route", "code", "outcome"))
    yield ("sollol_request_seconds", "histogram", "Inference requests, from their head to the end of the answer.",
           metrics.request_s.samples())
    yield ("sollol_ttft_seconds", "histogram", "Inference requests, from their head to the first byte of the answer.",
           metrics.first_s.samples())
    yield ("sollol_queue_seconds", "histogram", "Inference requests, time in the gateway's queue.",
           [sample for priority, histogram in sorted(metrics.queue_s.items())
            for sample in histogram.samples(labelled(priority=priority))])
    yield ("sollol_queue_depth", "gauge", "Waiting requests.",
           [("", labelled(priority=priority), waiting[priority]) for priority in range(1, 11)])
    yield "sollol_inflight", "gauge", "Requests running on a node.", of_nodes(lambda node: len(node.leases))
    yield ("sollol_slots", "gauge", "Requests of one model that a node runs at once, as far as is known.",
           of_nodes(lambda node: node_slots(node)[0]))
    yield ("sollol_node_up", "gauge", "1 if a node answers, drained or not.",
           of_nodes(lambda node: int(node.is_reachable(now))))
    yield ("sollol_node_draining", "gauge", "1 if a node gets no new work, by its line or by an order.",
           of_nodes(lambda node: int(node.draining)))
    yield ("sollol_node_waking", "gauge", "1 if a sleeping node was called by a magic packet and is waited for.",
           of_nodes(lambda node: int(node.state(now) == "waking")))
    yield ("sollol_node_asleep", "gauge", "1 if a node does not answer and a magic packet may wake it.",
           of_nodes(lambda node: int(can_wake(node, now))))
    yield from cluster_families(dispatcher, seen, now)
    yield "sollol_tokens_total", "counter", "Tokens.", counted(metrics.tokens, "node", "model", "kind", "key")
    yield ("sollol_slot_seconds_total", "counter", "Time for which requests had slots.",
           [("", labelled(key=key), round(held_s, 3)) for key, held_s in metrics.slot_s.items()])
    yield ("sollol_failovers_total", "counter", "Requests that a node failed.",
           counted(metrics.failovers, "node", "reason"))
    yield ("sollol_races_total", "counter", "Second attempts beside one that was far overdue, by whether they won.",
           counted(metrics.races, "node", "won"))
    yield ("sollol_predicted_error_ratio", "histogram", "Time that an answer took, over the time predicted for it.",
           dispatcher.ratios.samples())
    yield ("sollol_rescues_total", "counter", "Broken streams that another node was to go on with.",
           [("", labelled(result=result), dispatcher.rescues[result]) for result in ("whole", "broken")])
    yield "sollol_build_info", "gauge", "The version that runs.", [("", labelled(version=__version__), 1)]


def answer_metrics(gateway: Gateway, models: ModelSet) -> OwnAnswer:
    """Answer /metrics in Prometheus' text format 0.0.4."""
    gateway.telemetry.tally()
    lines: list[str] = []
    for name, kind, help, samples in metric_families(gateway, models):
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{suffix}{{{labels}}} {value}" if labels else f"{name}{suffix} {value}"
                  for suffix, labels, value in samples]
    return OwnAnswer(200, ("\n".join(lines) + "\n").encode(), b"text/plain; version=0.0.4; charset=utf-8")


def milliseconds(seconds: float | None) -> int | str:
    """Return whole milliseconds, or "" for None."""
    return "" if seconds is None else round(seconds * 1000)


def log_level(record: Record) -> int:
    """Return the level of a request's log line: warning if the nodes failed it, debug for a scrape that succeeded."""
    if record.path in PROBED_PATHS and record.method in ("GET", "HEAD") and record.status < 400:
        return logging.DEBUG
    return logging.WARNING if record.attempts and record.outcome in ("cut", "error") else logging.INFO


def request_fields(record: Record, total_s: float) -> Json:
    """Return what the log says of a finished request, in its fixed order. No prompt, no key."""
    first_s = None if record.first_s is None else record.first_s - record.started_s
    return {"event": "request", "id": record.id, "client": record.client, "key": record.key, "user": record.user,
            "method": shown(record.method), "path": shown(record.path), "model": shown(record.model),
            "priority": record.priority, "node": record.node,
            "attempts": record.attempts, "status": record.status, "queue_ms": milliseconds(record.queue_s),
            "ttft_ms": milliseconds(first_s), "total_ms": milliseconds(total_s),
            "prompt_tokens": record.timings.prompt_tokens, "output_tokens": record.timings.output_tokens,
            "bytes": record.bytes, "reason": record.reason, "outcome": record.outcome}


# Paths that a service manager, a load balancer and Prometheus ask for every few seconds.
PROBED_PATHS = frozenset(("/", "/api/version", "/api/health", "/metrics"))


class Telemetry:
    """Count and log finished requests, in groups, which is much cheaper."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.loop = gateway, gateway.loop
        self.metrics = Metrics(gateway.dispatcher)
        self.usage, self.reporting = Usage(), asyncio.Lock()    # which lets the askers in one by one
        self.finished: list[tuple[Record, float]] = []          # since the last `tally`: with the seconds taken
        self.history, self.forecast = History(), QueueForecast()
        self.failures: collections.deque[NotedFailure] = collections.deque(maxlen=FAILURES_KEPT)
        self.shown: dict[ModelSet, tuple[float, bytes]] = {}    # what dashboards were sent last, and when
        self.people, self.people_s = b"", -math.inf
        self.day, self.day_changes = b"", -1        # `history` as it is sent, and after which changes

    def finish(self, record: Record) -> None:
        """Let a finished request be counted and logged within TALLY_DELAY_S."""
        record.outcome = record.outcome or ("ok" if 0 < record.status < 400 else "error")
        if not self.finished:
            self.loop.call_later(TALLY_DELAY_S, self.tally)
        self.finished.append((record, self.loop.time() - record.started_s))

    def tally(self) -> None:
        """Count and log the requests that have finished since the last time."""
        finished, self.finished = self.finished, []
        day = local_day()
        for record, total_s in finished:
            self.metrics.count_request(record, total_s)
            if record.attempts and record.path in INFERENCE_PATHS:
                self.count_use(record, day)
        for level, rows in itertools.groupby(finished, lambda row: log_level(row[0])):
            if LOG.isEnabledFor(level):
                LOG.log(level, [request_fields(record, total_s) for record, total_s in rows])

    def count_use(self, record: Record, day: str) -> None:
        """Count what a finished request has used."""
        person = record.key, record.user or ("" if record.key else record.client)
        model = record.model if record.model in self.gateway.dispatcher.cluster.holders else record.model and OTHER
        for node, use in uses_of(record).items():
            self.note_use(day, (person, model, node), use)

    def note_use(self, day: str, name: RowName, use: Use) -> None:
        """Count what a request used on one node, here and in the process that keeps the file, if that is another."""
        self.usage.note(day, *name, use)
        self.gateway.upgrade.note_use(day, name, use)

    def snapshot(self, models: ModelSet = EVERY_MODEL) -> bytes:
        """Return what dashboards show, as JSON; made once for all that look and see the same models, however many."""
        now = self.loop.time()
        shown_s, shown = self.shown.get(models, (-math.inf, b""))
        if now - shown_s >= EVENT_S / 2:
            self.tally()
            shown = json.dumps(dashboard_state(self.gateway, models), separators=(",", ":")).encode()
            self.shown = {seen: (at_s, text) for seen, (at_s, text) in self.shown.items() if now - at_s < EVENT_S}
            self.shown[models] = now, shown
        return shown

    def with_people(self, state: bytes) -> bytes:
        """Return what a dashboard shows to those that may see who used what; the people are made once for all, too."""
        now = self.loop.time()
        if now - self.people_s >= EVENT_S / 2:
            people = people_state(self.usage, self.gateway.dispatcher, local_day())
            self.people, self.people_s = json.dumps(people, separators=(",", ":")).encode(), now
        return state[:-1] + b',"people":' + self.people + b"}"

    def day_seen(self) -> bytes:
        """Return the last day for dashboards, as JSON; made once after each change."""
        if self.day_changes != self.history.changes:
            self.day = json.dumps(self.history.as_seen(), separators=(",", ":")).encode()
            self.day_changes = self.history.changes
        return self.day

    def note_failure(self, node: str, spec: RequestSpec, failure: Failure, status: int | None) -> None:
        """Note why a node failed a request, unless nodes only differ: that is no fault of any."""
        if failure.kind in DIFFERENCES:
            return
        now, model = self.loop.time(), shown(spec.model) or ""
        step = self.metrics.step(now)
        step.errors[node] += 1
        if model in self.gateway.dispatcher.cluster.holders:    # clients can make up any number of names
            step.bad_models[model] += 1
        noted = NotedFailure(now, node, model, failure.kind, failure.text[:FAILURE_CHARS], status, spec.client)
        last = next((known for known in self.failures if known.what == noted.what), None)
        if last is not None:
            self.failures.remove(last)
            noted = noted._replace(times=last.times + 1)
        self.failures.append(noted)

    def sweep(self, now: float) -> None:
        """Note how long the queue is, and fold what is over into the history of the day."""
        step = self.metrics.step(now)
        step.queued = max(step.queued, len(self.gateway.dispatcher.waiting))
        self.history.turn(self.metrics.steps, now, wall_clock_s())

    def keep_history(self) -> list[str]:
        """Return the history up to this moment, for the state file or another process."""
        self.tally()
        self.history.fold(self.metrics.steps, int(self.loop.time() // STEP_S))
        return self.history.kept()


PLAIN = re.compile(r"[\w.:/@%+\-]+").fullmatch


@remembered                         # models, nodes, paths and most numbers come again and again
def bare(text: str) -> str:
    """Return a value as it is written in a key=value line: quoted if it could be misread."""
    return text if PLAIN(text) else json.dumps(text)


class LogFormat(logging.Formatter):
    """Write one line per event, `key=value ...` or a JSON object. A message is an event's dict, or a list of them."""

    converter = staticmethod(time.gmtime)
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def __init__(self, style: str) -> None:
        super().__init__()
        self.as_json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        message: Any = record.msg if isinstance(record.msg, (dict, list)) else {"message": record.getMessage()}
        lead = {"ts": self.formatTime(record), "level": record.levelname.lower()}
        if record.exc_info and self.as_json:
            message = {**message, "traceback": self.formatException(record.exc_info)}
        lines = [self.line(lead, fields) for fields in (message if isinstance(message, list) else [message])]
        if record.exc_info and not self.as_json:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)

    def line(self, lead: Json, fields: Json) -> str:
        """Return the line of one event."""
        if self.as_json:
            return json.dumps({**lead, **fields})
        return " ".join([f"{key}={bare(f'{value}')}" for key, value in (*lead.items(), *fields.items())])


class LogWriter(logging.Handler):
    """Write the log to a file descriptor, in a thread: a pipe that nobody reads, or a slow disk, delays no request.

    Lines beyond MAX_LOG_BYTES are dropped; their number is logged when the log flows again.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()       # None = the end
        self.taken_bytes = self.lost_lines = 0      # changed under the lock of the handler only
        self.written_bytes = self.reported_lines = 0        # changed by the thread only
        self.thread = threading.Thread(target=self.run, name="log", daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        data = (self.format(record) + "\n").encode(errors="backslashreplace")
        if self.taken_bytes - self.written_bytes + len(data) > MAX_LOG_BYTES:
            self.lost_lines += data.count(b"\n")
            return
        self.queue_lines(data)

    def queue_lines(self, data: bytes) -> None:
        """Let lines be written."""
        self.taken_bytes += len(data)
        self.queue.put(data)

    def run(self) -> None:
        """Write what is queued, until the end."""
        while (data := self.queue.get()) is not None:
            self.write(data)
            self.written_bytes += len(data)
            if self.queue.empty():
                self.report_loss()
        self.report_loss()

    def report_loss(self) -> None:
        """Write how many lines were dropped since the last report, if any were."""
        lost = self.lost_lines - self.reported_lines
        if lost:
            self.reported_lines += lost
            fields = {"event": "log", "lost": lost, "why": "nobody read the log for a while"}
            record = LOG.makeRecord(LOG.name, logging.WARNING, "", 0, fields, (), None)
            self.write((self.format(record) + "\n").encode())

    def write(self, data: bytes) -> None:
        """Write bytes, however long it takes; give up if nobody can read them any more."""
        while data:
            try:
                data = data[os.write(self.descriptor, data):]
            except BlockingIOError:     # another process that shares the descriptor made it non-blocking
                time.sleep(LOG_RETRY_S)
            except OSError:
                return

    def close(self) -> None:
        """Write the rest, for LOG_FLUSH_S at most. Python's logging calls this at the end of the process, too."""
        self.queue.put(None)
        self.thread.join(LOG_FLUSH_S)
        super().close()


def start_log(style: str, level: str) -> None:
    """Send the log to standard error."""
    try:
        handler: logging.Handler = LogWriter(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):       # standard error has no descriptor
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormat(style))
    for former in LOG.handlers:
        former.close()
    LOG.handlers[:] = [handler]
    LOG.setLevel(level.upper())
    LOG.propagate = False


def tell_systemd(message: str) -> None:
    """Send a state to the service manager, if one started this process; see sd_notify(3).

    Ten messages fill the socket of a busy manager: then a watchdog ping is dropped, any other message waits NOTIFY_S.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.settimeout(0.0 if message == "WATCHDOG=1" else NOTIFY_S)
        channel.connect("\0" + address[1:] if address[0] == "@" else address)
        channel.send(message.encode())


# -----------------------------------------------------------------------------
# Headline: is all well, and if not, what is wrong?
#
# What an operator needs at three in the morning, in one sentence. Everything here is a function of plain values: what a
# Situation says is gathered from the nodes and the queue in the next room.
# -----------------------------------------------------------------------------

OLD_S = 30.0                        # a request that has waited for so long makes the queue old,
LONG_S = 60.0                       # as does one that is predicted to start only then
IDLE_BESIDE_S = 10.0                # longer nobody should wait while a node that is as fast does nothing
FEW_FAILED, MANY_FAILED = 0.1, 0.5  # shares of the requests of a minute
LEAST_JUDGED = 5                    # requests of a minute, before anything is said of their share
LONE_SHARE, LEAST_LONE = 0.9, 20    # one node gives this share of a minute's answers, and that many at least
AS_FAST = 1.5                       # a node is as fast as another if a token takes at most this many times as long
NAMED = 4                           # nodes and models in one sentence; the rest is counted
SAID_CHARS = 60                     # of a node's own error
CANNOT_SERVE = ("unreachable", "failing", "waking", "draining")     # the worst first


class Level(enum.IntEnum):
    """How bad is it?"""

    OK = 0
    WARN = 1                        # somebody should look when there is time
    BAD = 2                         # clients suffer, or soon will


class NodeHealth(NamedTuple):
    """What is said of one node. `kind`: one of CANNOT_SERVE, or silent, slow, asleep, new; "" is well."""

    name: str
    kind: str = ""
    why: str = ""                   # an error of the node's own, or what a probe met
    for_s: float = 0.0              # since when it is so
    busy: int = 0                   # slots
    slots: int = 0
    failing: tuple[str, ...] = ()   # models of which it has failed every request lately
    draining: bool = False          # whatever it is besides


class Wait(NamedTuple):
    """Requests for one model that wait."""

    model: str
    queued: int
    oldest_s: float
    holders: tuple[str, ...] = ()   # nodes that can serve it
    idle: tuple[str, ...] = ()      # those of them that do nothing, and are as fast as those that work
    others: tuple[str, ...] = ()    # nodes that do nothing and have it not


class Situation(NamedTuple):
    """All that the headline is made of."""

    nodes: Sequence[NodeHealth] = ()
    waits: Sequence[Wait] = ()      # the oldest first
    last_start_s: float | None = None   # when the last one of the queue is predicted to begin, in seconds from now
    timeout_s: float = 240.0        # --queue-timeout
    answered: int = 0               # requests, in the last minute
    failed: int = 0                 # the same
    lone: tuple[str, ...] = ()      # a node that gave nearly all answers, and those as fast that gave none
    leaving: bool = False           # the gateway itself ends,
    refusing: bool = False          # and takes nothing new

    @property
    def queued(self) -> int:
        return sum(wait.queued for wait in self.waits)

    @property
    def oldest_s(self) -> float:
        return max((wait.oldest_s for wait in self.waits), default=0.0)


class Trouble(NamedTuple):
    """One thing that is wrong. `about`: the number on the page that shows it: nodes, queue or failures."""

    level: Level
    about: str
    text: str
    key: str                        # the same as long as it is the same trouble: without times and counts


class Headline(NamedTuple):
    """The sentence, and the levels of what it is about: {"nodes": Level.BAD}."""

    level: Level
    short: str                      # for the title of a window
    text: str
    key: str                        # changes with what is wrong, not with times and counts
    about: dict[str, Level]


def for_people(seconds: float) -> str:
    """Return a time as one says it: 41 s, 4 min, 3 h, 2 days."""
    for unit_s, unit, least_s in ((86400.0, "days", 172800.0), (3600.0, "h", 7200.0), (60.0, "min", 100.0)):
        if seconds >= least_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def listed(names: Sequence[str]) -> str:
    """Return names for a sentence: a few of them, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def number_of(count: int, what: str, verb: str = "") -> str:
    """Return `1 request waits` or `3 requests wait`: what is counted, and maybe what it does."""
    return f"{count} {what}{'s' * (count != 1)}" + (f" {verb}{'s' * (count == 1)}" if verb else "")


def said(text: str) -> str:
    """Return a node's own words for a sentence: the first line, short, without an end of their own."""
    line = re.sub(r"^answered \d+: ", "", text.strip().partition("\n")[0].strip())
    return (line if len(line) <= SAID_CHARS else line[:SAID_CHARS] + "…").rstrip(".")


def model_name(model: str) -> str:
    return shown(model.removesuffix(":latest")) or "a model that cannot be read"


def node_in_words(node: NodeHealth) -> str:
    """Return what is wrong with a node, for a sentence."""
    if node.kind == "draining":
        return f"{node.name} draining" + (f", {node.busy} left" if node.busy else "")
    also = ", draining" if node.draining else ""
    if node.kind == "failing":
        return f"{node.name} fails every request{': ' * bool(node.why)}{said(node.why)}{also}"
    return f"{node.name} {node.kind} for {for_people(node.for_s)}{also}"


def node_troubles(nodes: Sequence[NodeHealth]) -> list[Trouble]:
    """Return what is wrong with nodes: those that cannot serve in one sentence, the others one each."""
    lost = sorted((node for node in nodes if node.kind in CANNOT_SERVE),
                  key=lambda node: CANNOT_SERVE.index(node.kind))
    troubles = []
    if not nodes:
        troubles.append(Trouble(Level.BAD, "nodes", "No node: put its URL into the hosts file and save it", "no node"))
    elif lost:
        able = len(nodes) - len(lost)
        bad = not able or any(node.kind in ("unreachable", "failing") for node in lost)
        lead = f"{len(lost)} of {len(nodes)} nodes cannot serve" if able else (
            f"None of {len(nodes)} nodes can serve" if len(nodes) > 1 else "The only node cannot serve")
        troubles.append(Trouble(Level.BAD if bad else Level.WARN, "nodes",
                                f"{lead}: {listed([node_in_words(node) for node in lost])}",
                                " ".join(f"{node.name} {node.kind}" for node in lost)))
    for node in nodes:
        if node.kind == "silent":
            troubles.append(Trouble(Level.WARN, "nodes", node_in_words(node), f"{node.name} silent"))
        elif node.kind not in CANNOT_SERVE and node.failing:
            models = listed([model_name(model) for model in node.failing])
            text = f"{node.name} fails {models}{': ' * bool(node.why)}{said(node.why)}"
            troubles.append(Trouble(Level.WARN, "nodes", text, f"{node.name} fails {models}"))
    return troubles


def queue_troubles(now: Situation) -> list[Trouble]:
    """Return what is wrong with the queue."""
    troubles, able = [], [node for node in now.nodes if node.kind not in (*CANNOT_SERVE, "asleep", "new")]
    for wait in now.waits:
        model = model_name(wait.model)
        waits = f"{number_of(wait.queued, 'request', 'wait')} for {model}"
        if not wait.holders:
            troubles.append(Trouble(Level.BAD, "queue", f"{waits}, which no node can serve", f"{model} unserved"))
        elif wait.idle and wait.oldest_s >= IDLE_BESIDE_S:
            has, does = ("has", "does") if len(wait.idle) == 1 else ("have", "do")
            doing = f"{listed(wait.idle)}, which {has} it, {does} nothing"
            troubles.append(Trouble(Level.WARN, "queue", f"{waits} while {doing}", f"{model} starved"))
        elif wait.others and wait.oldest_s >= OLD_S:
            text = f"{waits}, which only {listed(wait.holders)} can serve; {listed(wait.others)} idle"
            troubles.append(Trouble(Level.WARN, "queue", text, f"{model} scarce"))
    starts = now.last_start_s
    if now.oldest_s >= OLD_S or now.queued and (starts or 0.0) >= LONG_S:
        lead = "All slots are busy; " if able and all(node.busy >= node.slots for node in able) else ""
        ahead = "" if starts is None else f", the last one is predicted to start in {for_people(starts)}"
        late = max(now.oldest_s, starts or 0.0) >= now.timeout_s * 0.75
        after = f"; after {for_people(now.timeout_s)} they get 503" if late else ""
        troubles.append(Trouble(Level.BAD if late else Level.WARN, "queue",
                                f"{lead}{number_of(now.queued, 'request', 'wait')}, the oldest for "
                                f"{for_people(now.oldest_s)}{ahead}{after}", "queue late" if late else "queue old"))
    return troubles


def other_troubles(now: Situation) -> list[Trouble]:
    """Return what is wrong with answers."""
    troubles, ended = [], now.answered + now.failed
    if now.failed and ended >= LEAST_JUDGED and now.failed / ended >= FEW_FAILED:
        level = Level.BAD if now.failed / ended >= MANY_FAILED else Level.WARN
        text = f"{100 * now.failed / ended:.0f} % of the last minute's requests have failed"
        troubles.append(Trouble(level, "failures", text, f"failures {level.name}"))
    if len(now.lone) > 1:
        node, *others = now.lone
        text = f"{node} does nearly all the work: {listed(others)}, as fast and able, did nothing for a minute"
        troubles.append(Trouble(Level.WARN, "nodes", text, f"{node} alone"))
    return troubles


def troubles_of(now: Situation) -> list[Trouble]:
    """Return all that is wrong, the worst first."""
    troubles = [*node_troubles(now.nodes), *queue_troubles(now), *other_troubles(now)]
    return sorted(troubles, key=lambda trouble: -trouble.level)


def headline_of(now: Situation) -> Headline:
    """Return whether all is well, in a sentence or a few; the worst first."""
    troubles, busy = troubles_of(now), sum(node.busy for node in now.nodes)
    about = {name: max((trouble.level for trouble in troubles if trouble.about == name), default=Level.OK)
             for name in ("nodes", "queue", "failures")}
    doing = f"{number_of(busy, 'request')} running, {now.queued or 'none'} waiting"
    if now.leaving:
        refused = " New requests are refused." if now.refusing else ""
        return Headline(Level.WARN, "shutting down", f"Shutting down: {doing}.{refused}", "leaving", about)
    if not troubles:
        asleep = sum(node.kind == "asleep" for node in now.nodes)
        up = f"{number_of(len(now.nodes) - asleep, 'node')} up" + (f", {asleep} asleep" if asleep else "")
        return Headline(Level.OK, "all is well", f"All is well: {up}, {doing}.", "", about)
    first, key = troubles[0], " | ".join(trouble.key for trouble in troubles)
    return Headline(first.level, re.split("[:;,]", first.text)[0],
                    ". ".join(trouble.text for trouble in troubles[:NAMED]) + ".", key, about)


# -----------------------------------------------------------------------------
# Dashboard: what does a person see?
#
# One page without outside resources. It contains the current state, and gets the whole state again every second: the
# state is small, and a page that missed an event, or the gateway's restart, is right one second later.
# -----------------------------------------------------------------------------

ROWS_SHOWN, DECISIONS_SHOWN, PEOPLE_SHOWN = 50, 12, 12  # of queue, decisions and people, on the dashboard
FAILURES_SHOWN, MODELS_SHOWN = 12, 40
NAMES_SHOWN = 6                     # nodes that have a model in memory


def page_policy() -> bytes:
    """Return the Content-Security-Policy of the page: its own script and nothing else."""
    script = PAGE.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'").encode()


def past(steps: Iterable[Step], now: float) -> Json:
    """Return the values of the page's lines: one a step of STEP_S, None where nothing finished."""
    by_number, last = {step.number: step for step in steps}, int(now // STEP_S)
    recent = [by_number.get(number) or Step(number) for number in range(last - STEPS_KEPT + 1, last + 1)]
    times = zip(*(step.rank().times for step in recent), strict=True)
    return {"step_s": STEP_S, **dict(zip(StepTimes._fields, times, strict=True)),
            "requests": [step.requests for step in recent], "failed": [step.failed for step in recent],
            "queued": [step.queued for step in recent], "tokens": [step.tokens.total() for step in recent]}


class QueueForecast:
    """When waiting tickets are predicted to begin, reckoned so seldom that it takes a thousandth of the time.

    1 ms for 100 tickets of one model and ten nodes, 17 ms for 340 of twenty models and forty nodes.
    """

    SHARE = 0.001

    def __init__(self) -> None:
        self.starts_s: dict[Ticket, float] = {}     # on the clock of the loop
        self.again_s = -math.inf

    def look(self, dispatcher: Dispatcher, now: float) -> None:
        """Reckon anew if it is time."""
        if now < self.again_s:
            return
        began_s, forecast = time.thread_time(), Forecast(dispatcher.cluster, now)
        starts = {ticket: forecast.start_s(dispatcher.cluster.estimates.demand_of(ticket))
                  for ticket in dispatcher.waiting.in_order()}
        self.starts_s = {ticket: now + start_s for ticket, start_s in starts.items() if start_s is not None}
        self.again_s = now + (time.thread_time() - began_s) / self.SHARE

    def left_s(self, ticket: Ticket, now: float) -> float | None:
        """Return when a ticket is predicted to begin, in seconds from now; None if that is not known."""
        start_s = self.starts_s.get(ticket)
        return None if start_s is None else max(0.0, start_s - now)


class Recent(NamedTuple):
    """Sums over the last steps. Of a minute: `answered` to `first_s`; of ten minutes: the rest."""

    answered: int
    failed: int
    tokens: Mapping[str, int]       # by node
    answers: Mapping[str, int]      # by node
    first_s: list[float]            # ascending
    errors: Mapping[str, int]       # by node
    cuts: Mapping[str, int]         # by node
    bad_models: Mapping[str, int]   # by model


def sums(counters: Iterable[collections.Counter[str]]) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    for counter in counters:
        if counter:                 # most are empty
            total.update(counter)
    return total


def recent_of(steps: Iterable[Step], now: float) -> Recent:
    """Return what the last steps sum up to."""
    number = int(now // STEP_S)
    ten = [step for step in steps if step.number > number - STEPS_KEPT]
    minute = [step for step in ten if step.number > number - 60 / STEP_S]
    return Recent(
        sum(step.requests for step in minute), sum(step.failed for step in minute),
        sums(step.tokens for step in minute), sums(step.answers for step in minute),
        sorted(itertools.chain.from_iterable(step.rank().sorted_first_s for step in minute)),
        sums(step.errors for step in ten), sums(step.cuts for step in ten), sums(step.bad_models for step in ten))


def trouble_with(node: Node, runners: Sequence[Runner], failing: Sequence[str], now: float) -> str:
    """Return the kind of a node's NodeHealth; `failing`: models of which it fails all requests."""
    if not node.probed:
        return "new"
    if not node.up:
        return "waking" if node.sleep.is_waking(now) else "asleep" if can_wake(node, now) else "unreachable"
    fails_all = failing and all(runner.model in failing for runner in runners if runner.used_s > -math.inf)
    if fails_all or node.breaker.state(now) != "closed" or node.error_share.is_all(now):
        return "failing"
    return "draining" if node.draining else "silent" if node.suspect else ""


def why_of(gateway: Gateway, node: Node, kind: str, now: float, seen: ModelSet) -> str:
    """Return why a node is as it is; its own words only to those that see every model, as they may name one."""
    if kind in ("failing", "silent", "") and node.last_error is not None:
        error = node.last_error
        return error.text if seen is EVERY_MODEL else f"status {error.status}" if error.status else "no answer"
    if kind == "unreachable":
        return gateway.node_io.reasons.get(node, "")
    if kind == "draining":
        is_ordered = server_of(node.settings) in gateway.dispatcher.cluster.orders
        return "by an order" if is_ordered else "by drain=yes in its line"
    if kind == "waking":
        return f"called {for_people(node.sleep.waited_s(now))} ago, usually up after {node.sleep.usual_s:.0f} s"
    return "it is woken when work waits for it" if kind == "asleep" else ""


def health_of(gateway: Gateway, node: Node, now: float, seen: ModelSet) -> NodeHealth:
    """Return what is said of a node to somebody who sees the models `seen`."""
    runners = each_runner(node)
    failing = tuple(runner.model for runner in runners
                    if runner.breaker.failures and runner.breaker.state(now) != "closed")
    kind = trouble_with(node, runners, failing, now)
    slots = sum(runner.slots.count for runner in runners if runner.ready_s is not None)
    busy = sum(len(runner.leases) for runner in node.busy)
    since_s = node.doubted_s if kind == "silent" else gateway.node_io.since_s.get(node, now)
    return NodeHealth(node.name, kind, why_of(gateway, node, kind, now, seen) if kind or failing else "",
                      max(0.0, now - since_s), busy, max(busy, slots or node.settings.slots or 1),
                      tuple(model for model in failing if model in seen), node.draining)


def is_idle(node: Node, now: float) -> bool:
    """Tell whether a node could take work and has none; a measurement gives way."""
    return node.is_usable(now) and not node.suspect and not node.busy and not node.loading


def wait_of(model: str | None, tickets: Sequence[Ticket], cluster: Cluster, now: float) -> Wait:
    """Return what is said of the waiting tickets for one model."""
    oldest_s = now - min(ticket.arrived_s for ticket in tickets)
    holders = cluster.holders.get(model, ())
    able = [runner for runner in holders if runner.node.is_usable(now) and runner.breaker.state(now) != "open"]
    if not holders:                 # nobody is known to have it: any node may say so
        names = tuple(node.name for node in cluster.nodes.values() if node.is_usable(now))
        return Wait(model or "", len(tickets), oldest_s, names)
    best_s = min((runner.decode_s() for runner in able if runner.node.busy), default=math.inf)
    idle = tuple(runner.node.name for runner in able
                 if is_idle(runner.node, now) and runner.decode_s() <= AS_FAST * best_s)
    others = () if idle else tuple(node.name for node in cluster.nodes.values()
                                   if model not in node.rows and is_idle(node, now))
    return Wait(model or "", len(tickets), oldest_s, tuple(runner.node.name for runner in able), idle, others)


def waits_of(dispatcher: Dispatcher, now: float, seen: ModelSet) -> list[Wait]:
    """Return who waits for which of the models `seen`, the oldest first."""
    tickets: dict[str | None, list[Ticket]] = {}
    for ticket in dispatcher.waiting.tickets:
        tickets.setdefault(ticket.spec.model, []).append(ticket)
    waits = [wait_of(model, some, dispatcher.cluster, now) for model, some in tickets.items() if (model or "") in seen]
    return sorted(waits, key=lambda wait: -wait.oldest_s)


def lone_worker(cluster: Cluster, answers: Mapping[str, int], now: float) -> tuple[str, ...]:
    """Return a node whose slots are all busy and that gave nearly all answers of a minute, and those that gave none
    though they have its models and are as fast; () if there are no such nodes."""
    name = max(answers, key=lambda node: answers[node], default="")
    lone = cluster.nodes.get(name)
    if lone is None or answers[name] < max(LEAST_LONE, LONE_SHARE * sum(answers.values())):
        return ()
    if not any(len(runner.leases) >= runner.slots.count for runner in lone.busy):
        return ()
    others = [node.name for node in cluster.nodes.values() if not answers.get(node.name) and is_idle(node, now)
              and any(model in node.rows and node.runners[model].decode_s() <= AS_FAST * runner.decode_s()
                      for runner in lone.busy for model in runner.models)]
    return (name, *others) if others else ()


def slot_state(lease: Lease, now: float) -> Json:
    """Return what the dashboard shows of a running request."""
    spec, left_s = lease.ticket.spec, lease.predicted_end_s - now
    return {"id": lease.ticket.id, "model": shown(spec.model), "client": spec.client, "priority": spec.priority,
            "slot": lease.runner is not None, "since_s": round(now - lease.sent_s, 1), "own": lease.measures,
            "began": lease.first_s is not None, "left_s": round(left_s, 1) if lease.predicted_end_s else None}


def node_state(node: Node, health: NodeHealth, recent: Recent, now: float, seen: ModelSet) -> Json:
    """Return what the dashboard shows of a node and of the models `seen`; nothing of its speed while it is away."""
    is_there, name = node.up, node.name
    measured = [runner for runner in node.runners.values() if runner.speeds.decode_s and runner.model in seen]
    used = max(measured, key=lambda runner: runner.used_s, default=None) if is_there else None
    models = {}
    for runner in each_runner(node):
        model = next((model for model in (runner.model, *runner.models) if model in seen), None)
        if model and (runner.ready_s is not None or runner.leases):
            models[model] = {"slots": runner.slots.count, "known": runner.slots.origin,
                             "loading": runner.ready_s is not None and runner.ready_s > now,
                             "resident": runner.ready_s is not None}
    return {"name": name, "state": node.state(now), "kind": health.kind, "draining": node.draining, "why": health.why,
            "for_s": round(health.for_s), "url": node.settings.url, "version": node.version, "failing": health.failing,
            "errors": recent.errors.get(name, 0), "cuts": recent.cuts.get(name, 0), "busy": health.busy,
            "slots": health.slots, "tok_s": round(recent.tokens.get(name, 0) / 60, 1) if is_there else None,
            "decode_tok_s": round(1 / used.speeds.decode_s, 1) if used else None,
            "speed": round(node.speed, 2) if is_there else None, "on_disk": len(node.rows),
            "answer_s": rounded(node.answer_s) if is_there and node.answer_s else None, "models": models,
            "running": [slot_state(lease, now) for lease in node.leases if (lease.ticket.spec.model or "") in seen]}


def working(cluster: Cluster) -> Iterator[Lease]:
    """Yield the leases of requests that take slots; the gateway's own questions take none."""
    return (lease for node in cluster.nodes.values() for lease in node.leases
            if lease.runner is not None and not lease.measures)


def models_state(cluster: Cluster, waits: Sequence[Wait], recent: Recent, seen: ModelSet) -> Json:
    """Return what the dashboard shows of models: those that are in memory, waited for, or failed lately."""
    running = collections.Counter(lease.ticket.spec.model for lease in working(cluster))
    waiting, rows = {wait.model: wait.queued for wait in waits}, list[Json]()
    for model, runners in cluster.holders.items():
        if model is None or model not in seen:
            continue
        there = [runner for runner in runners if runner.ready_s is not None and runner.node.up]
        if there or model in waiting or model in recent.bad_models:
            rates = sorted(1 / runner.speeds.decode_s for runner in there if runner.speeds.decode_s)
            rows.append({"name": model, "running": running[model], "waiting": waiting.get(model, 0),
                         "resident": [runner.node.name for runner in there[:NAMES_SHOWN]], "resident_on": len(there),
                         "on_disk": len(runners), "tok_s": [round(rate, 1) for rate in (*rates[:1], *rates[1:][-1:])],
                         "failures": recent.bad_models.get(model, 0)})
    rows.sort(key=lambda row: (-row["waiting"], -row["failures"], -row["running"], row["name"]))
    known = sum(model is not None and model in seen for model in cluster.holders)
    return {"rows": rows[:MODELS_SHOWN], "count": known}


def people_state(usage: Usage, dispatcher: Dispatcher, day: str) -> Json:
    """Return what the dashboard shows of people: those with work here, then those with most tokens of the day."""
    people = usage.days[day].people if day in usage.days else {}
    running = collections.Counter(lease.ticket.spec.client for lease in working(dispatcher.cluster))
    waiting = collections.Counter(ticket.spec.client for ticket in dispatcher.waiting.tickets)
    most = heapq.nlargest(PEOPLE_SHOWN, people.items(), key=lambda item: item[1].tokens)
    names = [name for name, _ in (running + waiting).most_common(PEOPLE_SHOWN)]
    names = list(dict.fromkeys([*names, *("/".join(filter(None, person)) for person, _ in most)]))[:PEOPLE_SHOWN]
    rows = []
    for name in names:
        key, _, user = name.partition("/")
        use = people.get((key, user)) or people.get(("", name)) or Use()
        rows.append({"name": name, "running": running[name], "waiting": waiting[name], "requests": use.requests,
                     "tokens": use.tokens, "slot_s": round(use.slot_s, 1)})
    return {"count": max(len(people), len(names)), "most": rows}


def failures_state(failures: Sequence[NotedFailure], now: float, seen: ModelSet) -> list[Json]:
    """Return what the dashboard shows of the last failures, the last one first; a text may name any model."""
    noted = [failure for failure in reversed(failures) if failure.model in seen][:FAILURES_SHOWN]
    return [{"ago_s": round(now - failure.at_s), "node": failure.node, "model": failure.model, "kind": failure.kind,
             "text": failure.text if seen is EVERY_MODEL else "", "status": failure.status,
             "client": failure.client, "times": failure.times} for failure in noted]


class View(NamedTuple):
    """What the headline and the dashboard are made of."""

    situation: Situation
    recent: Recent
    queue: Sequence[tuple[int, Ticket]]     # (position, ticket), the next one first


def look(gateway: Gateway, seen: ModelSet) -> View:
    """Return what there is to see now, of the models `seen`."""
    dispatcher, now, forecast = gateway.dispatcher, gateway.loop.time(), gateway.telemetry.forecast
    recent = recent_of(gateway.telemetry.metrics.steps, now)
    forecast.look(dispatcher, now)
    queue = [(position, ticket) for position, ticket in enumerate(dispatcher.waiting.in_order(), 1)
             if (ticket.spec.model or "") in seen]
    starts_s = [start_s for _, ticket in queue if (start_s := forecast.left_s(ticket, now)) is not None]
    situation = Situation(
        [health_of(gateway, node, now, seen) for node in dispatcher.cluster.nodes.values()],
        waits_of(dispatcher, now, seen), rounded(max(starts_s, default=None)), dispatcher.waiting.timeout_s,
        recent.answered, recent.failed, lone_worker(dispatcher.cluster, recent.answers, now),
        gateway.leaving, gateway.draining)
    return View(situation, recent, queue)


def dashboard_state(gateway: Gateway, seen: ModelSet) -> Json:
    """Return what the dashboard shows now, of the models `seen`."""
    dispatcher, now, telemetry = gateway.dispatcher, gateway.loop.time(), gateway.telemetry
    nodes, (situation, recent, queue) = dispatcher.cluster.nodes.values(), look(gateway, seen)
    return {
        "version": f"version {__version__}", "policy": gateway.options.policy, "draining": gateway.leaving,
        "uptime_s": round(now - gateway.started_s), "headline": headline_of(situation)._asdict(),
        "per_min": recent.answered, "failed": recent.failed, "tok_s": round(sum(recent.tokens.values()) / 60, 2),
        "ttft_s": percentile(recent.first_s, 0.5), "oldest_s": round(situation.oldest_s, 1),
        "last_start_s": situation.last_start_s,
        "nodes": [node_state(node, health, recent, now, seen)
                  for node, health in zip(nodes, situation.nodes, strict=True)],
        "queued": len(dispatcher.waiting),
        "queue": [ticket_stats(ticket, position, now, telemetry.forecast.left_s(ticket, now))
                  for position, ticket in queue[:ROWS_SHOWN]],
        "models": models_state(dispatcher.cluster, situation.waits, recent, seen),
        "failures": failures_state(telemetry.failures, now, seen),
        "decisions": decision_stats(list(dispatcher.policy.decisions)[-DECISIONS_SHOWN:], now, seen),
        "past": past(telemetry.metrics.steps, now)}


def answer_dashboard(gateway: Gateway, models: ModelSet) -> OwnAnswer:
    """Answer with the page and its first state, in which no `<` may end the page's script."""
    state = gateway.telemetry.snapshot(models).replace(b"<", b"\\u003c")
    return OwnAnswer(200, PAGE.encode().replace(b"@STATE@", state, 1), b"text/html; charset=utf-8", PAGE_LINES)


# -----------------------------------------------------------------------------
# Probes: which nodes live, and what do they hold?
#
# One task per node. /api/version tells whether it lives, /api/ps only what is loaded: it can block for seconds while a
# model is unloaded. Intervals have jitter, so that the probes of several gateways spread.
# -----------------------------------------------------------------------------

PROBE_TIMEOUT_S = 3.0
LOAD_TIMEOUT_S = 3600.0             # of the gateway's own loads; users raise OLLAMA_LOAD_TIMEOUT to half an hour
RETURN_S, RETURN_PROBE_S = 60.0, 1.0    # how long, and at which pause, a node that has gone is probed
IDLE_UPSTREAM_S = 90.0              # Ollama itself never closes an idle connection
GENTLE_IDLE_S = 2.0                 # with probe=: an open connection is watched by the kernel, which keeps nodes awake
CALIBRATION_S = 30.0                # a node that is slower than this is not worth measuring
CALIBRATION_WORDS, CALIBRATION_TOKENS = 10, 8   # a word of four characters is five tokens at most: 64 in all
MEASURED_S, MOST_MEASURED_TOKENS = 0.5, 256     # of an answer that shows by its wait whether it had a slot
MOST_MEASURED_SLOTS = 8             # asked for at once; more are learned from real requests
MAX_ANSWER_BYTES, MOST_MODELS = 4 * MIB, 1000    # of an answer to the gateway's own questions: each is read in 50 ms
SLOW_CHECK_S = 0.5                  # a check that takes that much longer than expected finds the node still slow


def rows_of(answer: Json) -> list[Json]:
    """Return the first MOST_MODELS rows of /api/tags or /api/ps, those of them that have a name."""
    rows = answer.get("models")
    return [row for row in (rows[:MOST_MODELS] if isinstance(rows, list) else [])
            if isinstance(row, dict) and isinstance(row.get("name"), str) and row["name"].strip()]


class OllamaApi:
    """The gateway's own questions to one node. Only this class knows Ollama's paths for them and the answers' JSON.

    A server of another kind needs one more class with these methods, chosen in `NodeIO.api`. Each method raises
    NodeFailure without a usable answer, and Refusal if the gateway itself has no socket left.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def fetch(self, method: str, path: str, value: Json | None = None, timeout_s: float = PROBE_TIMEOUT_S,
                    max_bytes: int = MAX_ANSWER_BYTES) -> tuple[int, Json | None, bytes]:
        """Return (status, JSON object or None, body) of an answer of at most `max_bytes`."""
        body = b"" if value is None else json.dumps(value).encode()
        head = RequestHead(method, path.encode(), path, 1, {}, [parse_field(b"Content-Type: application/json")],
                           len(body), True, False, self.pool.via)
        connection = None
        try:
            async with asyncio.timeout(timeout_s):
                request = render_request(head, self.pool.settings, len(body)) + body
                connection, answer = await self.pool.request(request, method)
                text = await Collector(connection, answer, max_bytes).collect()
        except TimeoutError:
            raise NodeFailure("lost", f"no answer to {path} within {timeout_s:g} s") from None
        finally:
            if connection is not None:
                self.pool.give_back(connection)
        return answer.status, object_in(text), text

    async def ask(self, path: str, timeout_s: float = PROBE_TIMEOUT_S) -> Json:
        """Return the JSON object that a node answers with status 200."""
        status, answer, _ = await self.fetch("GET", path, timeout_s=timeout_s)
        if status != 200 or answer is None:
            raise NodeFailure("garbage", f"{path} answered {status} and not the JSON of an Ollama server")
        return answer

    async def version(self, timeout_s: float = PROBE_TIMEOUT_S) -> str:
        """Return the version of the server: the cheapest proof that it lives."""
        return str((await self.ask("/api/version", timeout_s)).get("version", ""))[:40]

    async def models(self, timeout_s: float = PROBE_TIMEOUT_S) -> list[Json]:
        """Return the models on disk."""
        return rows_of(await self.ask("/api/tags", timeout_s))

    async def loaded(self, timeout_s: float = PROBE_TIMEOUT_S) -> list[Json]:
        """Return the models in memory."""
        return rows_of(await self.ask("/api/ps", timeout_s))

    async def cloud(self, timeout_s: float = PROBE_TIMEOUT_S) -> Json:
        """Return whether the server uses the cloud; old ones do not tell."""
        return await self.ask("/api/status", timeout_s)

    async def made(self, model: str) -> Made:
        """Return what a model is made from, as far as the server tells."""
        status, answer, _ = await self.fetch("POST", "/api/show", {"model": model})
        return made_from(answer.get("modelfile")) if status == 200 and answer else Made()

    @staticmethod
    def with_options(options: Json) -> Json:
        """Return the fields of a request with runner options; `shift` is the only one that stands beside the others."""
        fields: Json = {"options": {name: value for name, value in options.items() if name != "shift"}}
        return fields if "shift" not in options else {**fields, "shift": bool(options["shift"])}

    async def generate(self, model: str, prompt: str, options: Json, timeout_s: float) -> Timings:
        """Let a model continue a raw text; return what its answer tells of the work."""
        value = {"model": model, "raw": True, "stream": False, "prompt": prompt, **self.with_options(options)}
        status, answer, text = await self.fetch("POST", "/api/generate", value, timeout_s)
        if status != 200 or answer is None:
            raise NodeFailure("garbage", f"the measurement was answered with {status}")
        return read_timings(text[-TAIL_BYTES:])

    async def load(self, model: str, embeds: bool, options: Json, keep_alive: int | None) -> Timings:
        """Have a model in memory: a request without a prompt. Return what the answer tells.

        `keep_alive`: -1 keeps it for ever, None as long as the node does by itself, and 0 unloads it once it is idle.
        """
        path, nothing = ("/api/embed", "input") if embeds else ("/api/generate", "prompt")
        value = {"model": model, "stream": False, nothing: [] if embeds else "", **self.with_options(options)}
        if keep_alive is not None:
            value["keep_alive"] = keep_alive
        status, answer, text = await self.fetch("POST", path, value, LOAD_TIMEOUT_S)
        if status != 200:
            why = str((answer or {}).get("error") or "no reason given")
            raise NodeFailure("busy" if status == 503 else "model", f"{status}: {why[:200]}")
        return read_timings(text[-TAIL_BYTES:])

    async def is_there(self) -> bool:
        """Tell whether this is an Ollama server, and not a gateway such as this one."""
        _, health, _ = await self.fetch("GET", "/api/health", max_bytes=64 * KIB)
        if health and health.get("service") == "SOLLOL":
            return False
        status, answer, _ = await self.fetch("GET", "/api/version", max_bytes=64 * KIB)
        return status == 200 and isinstance(answer and answer.get("version"), str)


Followed = TypeVar("Followed")      # a node, or the name of a source


def supervise(tasks: dict[Followed, asyncio.Task[None]], key: Followed,
              work: Callable[[Followed], Coroutine[None, None, None]], pause_s: float) -> None:
    """Start the task `tasks[key]`; if a defect ends it, log that and start it again after a pause."""
    loop = asyncio.get_running_loop()
    task = tasks[key] = loop.create_task(work(key))

    def again() -> None:
        if tasks.get(key) is task:      # else dropped meanwhile
            supervise(tasks, key, work, pause_s)

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and tasks.get(key) is task:
            LOG.error({"event": "error", "node": getattr(key, "name", key)}, exc_info=task.exception())
            loop.call_later(pause_s, again)

    task.add_done_callback(ended)


class NodeIO:
    """All that the gateway does with nodes by itself: connection pools, probes, short jobs, the log of their states."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.dispatcher, self.loop = gateway, gateway.dispatcher, gateway.loop
        self.pools: dict[Node, Pool] = {}           # of dropped nodes, too, until their last request has ended
        self.probes: dict[Node, asyncio.Task[None]] = {}
        self.jobs: dict[tuple[Node, Job], asyncio.Task[str | None]] = {}
        self.reasons: dict[Node, str] = {}          # of each node that was probed: what went wrong last, or ""
        self.looking: dict[Look, asyncio.Future[list[None | BaseException]]] = {}       # under way; see `look_again`
        self.logged_states: dict[Node, str] = {}
        self.since_s: dict[Node, float] = {}        # when each came into the state that was logged last

    def api(self, node: Node) -> OllamaApi:
        """Return how to ask a node."""
        return OllamaApi(self.pools[node])

    def configure(self, added: list[Node], dropped: list[Node]) -> list[Node]:
        """Begin to probe the nodes that were added, end all work on those dropped; return those with new settings."""
        for node in added:
            self.pools[node] = Pool(node.settings, self.gateway.turns, self.gateway.via)
            supervise(self.probes, node, self.probe_forever, self.gateway.options.probe_interval)
        for node in dropped:
            self.reasons.pop(node, None)
            self.probes.pop(node).cancel()
            for owner, work in self.jobs:
                if owner is node:
                    self.jobs[owner, work].cancel()
            self.pools[node].close()
        nodes = self.dispatcher.cluster.nodes.values()
        changed = [node for node in nodes if self.pools[node].settings != node.settings]
        for node in changed:
            self.pools[node].configure(node.settings)
        insecure = " ".join(node.name for node in (*added, *changed) if node.settings.insecure)
        if insecure:
            LOG.warning({"event": "tls", "nodes": insecure, "why": "insecure=yes: anybody on the way can pose as them"})
        return changed

    def begin_job(self, node: Node, work: Job) -> None:
        """Start a short piece of work on a node, unless it is under way or the node was dropped."""
        job = node, work
        if job not in self.jobs and self.dispatcher.cluster.nodes.get(node.name) is node:
            task = self.jobs[job] = self.loop.create_task(work(self, node))
            task.add_done_callback(lambda task: self.jobs.pop(job, None))

    async def look_at_models(self, node: Node) -> None:
        """Find out which models a node has. Raises as OllamaApi."""
        asked_s = self.loop.time()
        self.dispatcher.cluster.take_tags(node, await self.api(node).models(), asked_s)

    async def look_at_residency(self, node: Node, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        """Find out which models are loaded on a node. Raises as OllamaApi."""
        asked_s = self.loop.time()
        rows = await self.api(node).loaded(timeout_s)
        node.take_ps(rows, asked_s, self.loop.time())

    async def look_at_twins(self, node: Node) -> None:
        """Find out what look-alike models of a node are made from; each is asked once. Raises as OllamaApi."""
        for model in possible_twins(node):
            key = model, digest_of(node, model)
            self.dispatcher.cluster.know_made(node, {key: await self.api(node).made(model)})

    async def look_after_change(self, node: Node) -> None:
        """See at once what a change has made of a node's models. Raises as OllamaApi."""
        await self.look_at_models(node)
        await self.look_at_twins(node)

    async def look_at_cloud(self, node: Node, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        """Find out whether a node uses the cloud. Raises as OllamaApi."""
        node.cloud = await self.api(node).cloud(timeout_s)

    async def look_after_load(self, node: Node) -> None:
        """See at once which models a load has pushed out: the next decision should know what fits together."""
        with contextlib.suppress(NodeFailure, Refusal):
            await self.look_at_residency(node)
            pump(self.gateway)

    async def look_again(self, look: Look) -> None:
        """Look at all nodes, for FRESH_S at most; what does not answer by then stays as last seen.

        A client that asks /api/ps has often just caused a load. One look serves all clients that ask meanwhile.
        """
        if look not in self.looking:
            looks = [look(self, node, FRESH_S) for node in self.dispatcher.cluster.nodes.values()
                     if node.up and not node.settings.probe_s]
            self.looking[look] = asyncio.gather(*looks, return_exceptions=True)
            self.looking[look].add_done_callback(lambda looks: self.looking.pop(look, None))
        await asyncio.shield(self.looking[look])

    async def probe(self, node: Node) -> str:
        """Look at a node once: does it live, which models has it, which are loaded? Return what went wrong, or ""."""
        loop, why, answered = self.loop, "", False
        asked_s = loop.time()
        try:
            version = await self.api(node).version(DEAD_S if node.up else PROBE_TIMEOUT_S)
            answered = True
            node.answered(version, loop.time() - asked_s, loop.time())
            await self.look_at_models(node)
            await self.look_at_residency(node)
            await self.look_at_twins(node)
        except (NodeFailure, Refusal) as failure:
            why = str(failure)
            if answered:
                node.index_failed()
            elif isinstance(failure, NodeFailure):      # a Refusal is the gateway's own lack of sockets
                node.missed(failure.kind == "refused", loop.time())
        if node in self.probes:         # else dropped meanwhile
            self.reasons[node] = why
        self.log_state(node, why)
        pump(self.gateway)
        return why

    async def probe_forever(self, node: Node) -> None:
        """Probe a node until it is dropped."""
        while True:
            await self.probe(node)
            pause_s = node.settings.probe_s or self.gateway.options.probe_interval
            if not (node.up or node.settings.probe_s) and self.loop.time() - node.lost_s < RETURN_S:
                pause_s = min(pause_s, RETURN_PROBE_S)
            await asyncio.sleep(pause_s * self.gateway.rng.uniform(0.85, 1.15))

    def log_state(self, node: Node, why: str = "") -> None:
        """Log the state of a node if it is not the one logged last."""
        now = self.loop.time()
        was, state = self.logged_states.get(node, "new"), state_in_words(node, now)
        if not node.probed or state == was or node.up and not node.indexed:
            return                      # the line shows its models: wait for them
        self.logged_states[node], self.since_s[node] = state, now
        bad, error = node.state(now) in ("down", "suspect"), node.last_error
        if bad and error and now - error.at_s < 60:     # a request saw the reason before the probe
            why = why or error.text
        LOG.log(logging.WARNING if bad or not node.up and state != "waking" else logging.INFO,
                {"event": "node", "node": node.name, "url": node.settings.url, "state": state, "was": was,
                 "version": node.version, "models": " ".join(sorted(node.rows)), "why": why})

    def record_failure(self, lease: Lease, failure: Failure | NodeAnswer) -> None:
        """Note and log that a node failed a request, and look at once what has become of it."""
        assert failure.kind is not None     # else it is no fault of the node's
        self.dispatcher.fail(lease, failure.kind, self.loop.time())
        self.gateway.telemetry.metrics.failovers[lease.node.name, failure.kind] += 1
        status = failure.head.status if isinstance(failure, NodeAnswer) else None
        lease.node.note_error(failure.text, status, failure.kind, self.loop.time())
        noted = Failure(failure.kind, failure.text)
        self.gateway.telemetry.note_failure(lease.node.name, lease.ticket.spec, noted, status)
        LOG.warning({"event": "failure", "node": lease.node.name, "kind": failure.kind, "why": failure.text})
        if failure.kind in CONNECTION_FAILURES:
            self.begin_job(lease.node, NodeIO.probe)
        elif failure.kind == "model":
            self.begin_job(lease.node, NodeIO.look_after_load)

    def sweep(self, now: float) -> None:
        """Log what has become of nodes, measure, load and wake those that need it, and close connections that have been
        idle long."""
        if not (self.gateway.leaving or self.gateway.retired):      # else another process does it
            for wanted in wanted_loads(self.dispatcher, now):
                self.begin_job(wanted.runner.node, load_wanted)
        for node in nodes_to_wake(self.dispatcher, now):
            self.begin_job(node, wake_up)
        for node in self.dispatcher.cluster.nodes.values():
            self.log_state(node)
            if node.wishes:
                warn_of_missing(node)
            if self.gateway.retired or not node.may_measure(now):
                continue
            if node.suspect or node.speed < 0.7:
                self.begin_job(node, check)
            elif self.gateway.options.calibrate and (
                    not node.calibrated and loaded_runners(node) or self.dispatcher.cluster.is_unsure(node, now)):
                self.begin_job(node, calibrate)
        for node, pool in list(self.pools.items()):
            pool.prune(now - (GENTLE_IDLE_S if node.settings.probe_s else IDLE_UPSTREAM_S))
            if self.dispatcher.cluster.nodes.get(node.name) is not node and not node.leases:
                del self.pools[node]
                self.logged_states.pop(node, None)
                self.since_s.pop(node, None)


Value = TypeVar("Value")            # of a question to a node
Job = Callable[[NodeIO, Node], Coroutine[None, None, str | None]]       # a method of NodeIO, or `check`, `calibrate`
Look = Callable[[NodeIO, Node, float], Coroutine[None, None, None]]


def loaded_options(runner: Runner) -> Json | None:
    """Return the options with which a request loads nothing anew; None if they are not known."""
    if not runner.context and runner.options is None:
        return None
    return {**dict(runner.options or ()), **({"num_ctx": runner.context} if runner.context else {})}


def loaded_runners(node: Node) -> list[Runner]:
    """Return the models of a node that /api/ps shows, that answer with text, and whose options are known."""
    return [runner for runner in each_runner(node) if runner.listed and loaded_options(runner) is not None
            and not embeds_only(runner.row or runner.listed)]


async def answered(lease: Lease, question: Coroutine[None, None, Value]) -> asyncio.Task[Value]:
    """Ask a node under the gateway's own lease; return the task that did it, ended. Whoever ends the lease ends it."""
    asking = asyncio.get_running_loop().create_task(question)
    lease.abandon = lambda failure: asking.cancel()
    try:
        await asyncio.wait([asking])
        return asking
    finally:
        asking.cancel()


async def ask_together(questions: list[Coroutine[None, None, Timings]]) -> list[Timings]:
    """Return the answers to questions that are asked at the same time. Raises ExceptionGroup if one has none."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(question) for question in questions]
    return [task.result() for task in tasks]


async def measure(nodes: NodeIO, runner: Runner, words: int, tokens: int, count: int = 1) -> bool | None:
    """Ask a runner of an idle node for a few tokens, `count` times at once. Return what `learn_measured`, or of several
    `learn_slots_measured`, says of the answers; None if none came.

    Any request ends it at once. It loads no model, and reloads none with other options.
    """
    dispatcher, loop, node, rng = nodes.dispatcher, nodes.loop, runner.node, nodes.gateway.rng
    prompts = [" ".join(f"{rng.getrandbits(16):04x}" for _ in range(words)) for _ in range(count)]
    options = loaded_options(runner)
    assert options is not None      # as `loaded_runners` returns them
    spec = RequestSpec(Family.OLLAMA, row_name(runner.listed), prompt_chars=len(prompts[0]), max_output=tokens)
    lease = dispatcher.lease_for_measuring(runner, spec, loop.time())
    nodes.gateway.peers.spread()
    try:
        asking = await answered(lease, ask_together([nodes.api(node).generate(
            runner.listed["name"], prompt, {**options, "num_predict": tokens}, CALIBRATION_S) for prompt in prompts]))
        if asking.cancelled() or asking.exception() or lease.released:
            return None
        answers, now = asking.result(), loop.time()
        return learn_slots_measured(lease, answers, now) if count > 1 else learn_measured(lease, answers[0], now)
    finally:
        if not lease.released:
            dispatcher.release(lease, loop.time())


async def measure_slots(nodes: NodeIO, runner: Runner) -> None:
    """Ask a runner of an idle node for two, four and eight answers at once, until some have to wait there."""
    tokens, count = min(max(round(MEASURED_S / runner.decode_s()), CALIBRATION_TOKENS), MOST_MEASURED_TOKENS), 2
    while (count <= MOST_MEASURED_SLOTS and not runner.node.leases
           and await measure(nodes, runner, CALIBRATION_WORDS, tokens, count)):
        count *= 2


async def loaded_runner(nodes: NodeIO, node: Node) -> Runner | None:
    """Return a loaded model of a node to measure, after a look; None if there is none, or the node became busy."""
    loop = nodes.loop
    try:
        await nodes.look_at_residency(node)
    except (NodeFailure, Refusal):
        node.pause_measuring(loop.time())
    if not node.may_measure(loop.time()):
        return None
    return min(loaded_runners(node), default=None,
               key=lambda runner: (runner.speeds.confirmed_s, runner.speeds.samples))


async def calibrate(nodes: NodeIO, node: Node) -> None:
    """Measure the speed and the slots of an idle node on a loaded model: once after it came up, and when answers have
    not shown them for long although the model is asked for.

    Without it the first wave of requests goes out blindly: 74 s instead of 6 s for ten agents on a simulated cluster
    with a CPU node.
    """
    node.calibrates()
    runner = await loaded_runner(nodes, node)
    if runner is None:
        node.calibrates(False)          # it is looked at again
        return
    node.pause_measuring(nodes.loop.time())
    if not runner.speeds.is_confirmed(nodes.loop.time()) and not await measure(
            nodes, runner, CALIBRATION_WORDS, CALIBRATION_TOKENS):
        node.calibrates(False)          # it is tried again, after that pause
        return
    if runner.slots.origin == "guessed":
        await measure_slots(nodes, runner)
    LOG.info({"event": "calibrated", "node": node.name, "model": runner.model, "slots": runner.slots.count,
              "decode_tok_s": round(1 / runner.decode_s(), 1)})
    pump(nodes.gateway)


async def check(nodes: NodeIO, node: Node) -> None:
    """Check a node in doubt: one token of a loaded model shows whether it works, and whether it is slow."""
    loop = nodes.loop
    runner = await loaded_runner(nodes, node)
    if not node.may_measure(loop.time()):
        return
    due_s = math.inf
    if runner is not None:          # else there is nothing to ask: its next request will show
        node.pause_measuring(loop.time())
        work_s = node.overhead_s + 8 * runner.prefill_s() + runner.decode_s() + node.rtt_s
        due_s = loop.time() + 2 * work_s + SLOW_CHECK_S
        if await measure(nodes, runner, 1, 1) is None:
            return
    node.trust(loop.time())
    if loop.time() < due_s:
        node.reset_speed()
    pump(nodes.gateway)


def warn(node: Node, wish: Wish, model: str, why: str) -> None:
    """Log a warning about a model of load=, once."""
    if not wish.warned:
        LOG.warning({"event": "load", "node": node.name, "model": model, "why": why})
    wish.warned = True


def warn_of_missing(node: Node) -> None:
    """Log which models of load= a node does not have: nothing is pulled for it."""
    for model, wish in node.wishes.items() if node.up and node.indexed else ():
        if model not in node.rows:
            warn(node, wish, model, "the node does not have it; it can be pulled there")


async def ask_to_load(nodes: NodeIO, wanted: Wanted) -> NodeFailure | Refusal | None:
    """Have a node load a model, or keep it; return what went wrong. Requests that it would hold up end it."""
    loop, runner, node = nodes.loop, wanted.runner, wanted.runner.node
    name = next(model for model in runner.models if model in node.rows)
    num_ctx = window_for(name, nodes.gateway.options.num_ctx)
    options = loaded_options(runner) if runner.ready_s is not None else None
    if options is None:
        options = {"num_ctx": num_ctx} if num_ctx else {}
    spec = RequestSpec(Family.OLLAMA, name, options=tuple(options.items()),
                       keep_alive_s=math.inf if wanted.keep else None)
    lease, load_s = nodes.dispatcher.lease_for_loading(runner, spec, loop.time()), None
    nodes.gateway.peers.spread()
    try:
        asking = await answered(lease, nodes.api(node).load(
            node.rows[name]["name"], embeds_only(node.rows[name]), options, -1 if wanted.keep else None))
        if lease.released:
            return NodeFailure("busy", "it gave way")
        if asking.cancelled():
            return NodeFailure("lost", "the node is gone")
        error = asking.exception()
        if error is None:
            load_s = asking.result().load_s
        elif not isinstance(error, (NodeFailure, Refusal)):
            raise error
        return error
    finally:
        end_loading(lease, load_s, loop.time())


async def load_wanted(nodes: NodeIO, node: Node) -> None:
    """Load a model on an idle node because its line or a queue wants it there, and see what that did to the others."""
    loop = nodes.loop
    with contextlib.suppress(NodeFailure, Refusal):
        await nodes.look_at_residency(node)
    wanted = next((one for one in wanted_loads(nodes.dispatcher, loop.time()) if one.runner.node is node), None)
    if wanted is None:
        return
    began_s, runner, wish = loop.time(), wanted.runner, wish_for(wanted.runner) if wanted.keep else None
    loads, missed = runner.ready_s is None, [
        other for other in resident_runners(node, exclude=runner)
        if (not its.given_up if (its := wish_for(other)) else used_lately(other, began_s))]
    if wish is None:
        node.demand_s = began_s
    elif loads:
        wish.begin(began_s)
    else:
        wish.kept_s = began_s
    error = await ask_to_load(nodes, wanted)
    if loads and error is None:
        LOG.info({"event": "load", "node": node.name, "model": runner.model, "why": "load=" if wish else "queue",
                  "took_s": round(loop.time() - began_s, 1)})
    await nodes.look_after_load(node)
    if loads and wish is not None:
        note_load(wanted, wish, error, [other for other in missed if other.ready_s is None])
    pump(nodes.gateway)


async def load_ordered(nodes: NodeIO, node: Node, model: str) -> None:
    """Load a model because somebody has ordered that; it stays until there is no room, or a request says otherwise."""
    if node.measuring is not None:
        node.measuring.give_way(nodes.loop.time())
    began_s = nodes.loop.time()
    error = await ask_to_load(nodes, Wanted(node.runners[model], True))
    await end_order(nodes, node, model, "load", error, began_s)


async def unload_ordered(nodes: NodeIO, node: Node, model: str) -> None:
    """Unload a model because somebody has ordered that. What runs there is finished."""
    began_s, error, row, runner = nodes.loop.time(), None, node.rows[model], node.runners[model]
    try:
        await nodes.api(node).load(row["name"], embeds_only(row), loaded_options(runner) or {}, 0)
        runner.promised_to_unload()
    except (NodeFailure, Refusal) as failure:
        error = failure
    await end_order(nodes, node, model, "unload", error, began_s)


async def end_order(nodes: NodeIO, node: Node, model: str, verb: str, error: NodeFailure | Refusal | None,
                    began_s: float) -> None:
    """Log what became of an order, and see what it has done to the node's memory."""
    fields = {"event": verb, "node": node.name, "model": model, "why": f"ordered: {error}" if error else "ordered"}
    LOG.log(logging.WARNING if error else logging.INFO, {**fields, "took_s": round(nodes.loop.time() - began_s, 1)})
    if error:
        spec = RequestSpec(Family.OLLAMA, model, client="an order")
        nodes.gateway.telemetry.note_failure(node.name, spec, Failure("order", f"{verb}: {error}"), None)
    await nodes.look_after_load(node)
    pump(nodes.gateway)


def note_load(wanted: Wanted, wish: Wish, error: NodeFailure | Refusal | None, missed: list[Runner]) -> None:
    """Take in, and log once, what became of a load for load=; `missed`: see judge_load."""
    runner, node = wanted.runner, wanted.runner.node
    if error is None:
        warned, why = judge_load(runner, missed)
        if warned is not None:
            warn(node, warned, next(model for model, known in node.wishes.items() if known is warned), why)
    elif isinstance(error, NodeFailure) and error.kind == "model":
        wish.given_up, wish.unfinished = True, False
        warn(node, wish, runner.model, f"the node cannot load it: {error}")
    elif isinstance(error, Refusal) or error.kind == "busy":
        wish.gave_way()


async def wake_up(nodes: NodeIO, node: Node) -> None:
    """Send a magic packet to a sleeping node, and look until it is up or the next packet may be due."""
    loop, settings = nodes.loop, node.settings
    node.sleep.call(loop.time())
    until_s = loop.time() + Sleep.PAUSE_S
    nodes.log_state(node)
    host, addresses, why = settings.wake.rpartition(":")[0] or settings.host, [], ""
    try:
        address = literal(host)
        addresses = [address] if address else await nodes.gateway.sources.look_up(host)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
    sent, refused = send_packet(magic_packet(settings.mac), packet_addresses(settings, addresses))
    LOG.log(logging.INFO if sent else logging.WARNING, {
        "event": "wake", "node": node.name, "to": " ".join(sent), "usual_s": round(node.sleep.usual_s),
        "why": refused or why})
    while not node.up and loop.time() < until_s:
        await asyncio.sleep(RETURN_PROBE_S)
        await nodes.probe(node)


def send_packet(packet: bytes, addresses: list[Server]) -> tuple[list[str], str]:
    """Broadcast a packet over UDP; return (where it has gone, the last error, "" if there was none)."""
    sent, why = [], ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for host, port in addresses:
            try:
                sender.sendto(packet, (host, port))
                sent.append(f"{host}:{port}")
            except OSError as error:        # of one network; the others may be there
                why = error.strerror or str(error)
    return sent, why


# -----------------------------------------------------------------------------
# Routes: which handler answers which path?
#
# The README's table of routes, path by path. A row names its handler, so the table stands behind all handlers. A new
# path is one row, and a handler if none of these fits.
# -----------------------------------------------------------------------------

def queued(kind: str, family: Family = Family.OLLAMA, streams: bool = False) -> Route:
    """Return the Route of a request that waits for a slot."""
    return Route(serve_embedding if kind == "embed" else serve_inference, Where.QUEUED, kind, family, streams)


ROUTE_ROWS = (                      # methods, path; one that ends in a slash stands for all below it
    ("GET HEAD", "/", Route(serve_own, Where.GATEWAY, own=answer_root)),
    ("GET HEAD", "/api/health", Route(serve_own, Where.GATEWAY, own=answer_health)),
    ("GET HEAD", "/api/stats", Route(serve_own, Where.GATEWAY, shows=answer_stats)),
    ("GET HEAD", "/api/queue", Route(serve_own, Where.GATEWAY, shows=answer_queue)),
    ("GET HEAD", "/api/usage", Route(serve_usage, Where.GATEWAY)),
    ("GET HEAD", "/metrics", Route(serve_own, Where.GATEWAY, shows=answer_metrics)),
    ("POST", "/api/nodes/", Route(serve_order, Where.GATEWAY, "order", guarded=True)),
    ("GET HEAD", "/dashboard", Route(serve_own, Where.GATEWAY, shows=answer_dashboard)),
    ("GET", "/dashboard/events", Route(serve_events, Where.GATEWAY)),
    ("GET", "/api/peers", Route(serve_peers, Where.GATEWAY, blind=True)),
    ("GET HEAD", "/api/version", Route(serve_own, Where.MERGED, own=answer_version)),
    ("GET HEAD", "/api/tags", Route(serve_own, Where.MERGED, shows=answer_tags)),
    ("GET", "/api/ps", Route(serve_own, Where.MERGED, shows=answer_ps, look=NodeIO.look_at_residency)),
    ("GET", "/api/status", Route(serve_own, Where.MERGED, own=answer_status, look=NodeIO.look_at_cloud)),
    ("GET", "/v1/models", Route(serve_own, Where.MERGED, family=Family.OPENAI, shows=answer_openai_models)),
    ("POST", "/api/generate", queued("generate", streams=True)),
    ("POST", "/api/chat", queued("chat", streams=True)),
    ("POST", "/api/embed", queued("embed")),
    ("POST", "/api/embeddings", queued("embed")),
    ("POST", "/v1/completions", queued("generate", Family.OPENAI)),
    ("POST", "/v1/chat/completions", queued("chat", Family.OPENAI)),
    ("POST", "/v1/responses", queued("chat", Family.OPENAI)),
    ("POST", "/v1/embeddings", queued("embed", Family.OPENAI)),
    ("POST", "/v1/messages", queued("chat", Family.ANTHROPIC)),
    ("POST", "/v1/messages/count_tokens", Route(serve_token_count, Where.ANY, "chat", Family.ANTHROPIC)),
    ("POST", "/v1/systemone", queued("generate", Family.OPENAI)),
    ("POST", "/v1/images/generations", queued("image", Family.OPENAI)),
    ("POST", "/v1/images/edits", queued("transcribe", Family.OPENAI)),
    ("POST", "/v1/audio/transcriptions", queued("transcribe", Family.OPENAI)),
    ("POST", "/api/show", Route(serve_control, Where.ANY, "show")),
    ("GET", "/v1/models/", Route(serve_control, Where.ANY, family=Family.OPENAI)),
    ("POST", "/api/pull", Route(serve_change, Where.EVERY, "pull", streams=True, guarded=True)),
    ("POST", "/api/copy", Route(serve_change, Where.EVERY, "copy", guarded=True)),
    ("DELETE", "/api/delete", Route(serve_change, Where.EVERY, "delete", guarded=True)),
    ("HEAD", "/api/blobs/", Route(serve_control, Where.PRIMARY)),
    ("POST", "/api/blobs/", Route(serve_control, Where.PRIMARY, guarded=True)),
    ("POST", "/api/create", Route(serve_change, Where.PRIMARY, "create", streams=True, guarded=True)),
    ("POST", "/api/push", Route(serve_control, Where.PRIMARY, "push", streams=True, guarded=True)),
    ("POST", "/api/me", Route(serve_control, Where.PRIMARY, "account", guarded=True)),
    ("POST", "/api/signout", Route(serve_control, Where.PRIMARY, "account", guarded=True)),
    ("DELETE", "/api/user/keys/", Route(serve_control, Where.PRIMARY, "account", guarded=True)),
    # These use the primary node's account and change nothing: agents such as OpenClaw search the web with them.
    ("POST", "/api/experimental/web_search", Route(serve_control, Where.PRIMARY, "account")),
    ("POST", "/api/experimental/web_fetch", Route(serve_control, Where.PRIMARY, "account")),
    ("GET", "/api/experimental/model-recommendations", Route(serve_control, Where.PRIMARY, "account", blind=True)),
)
ROUTES = {(method, path): route for methods, path, route in ROUTE_ROWS for method in methods.split()}
ROUTES_BELOW = [(method, path, route) for (method, path), route in ROUTES.items() if path[-1] == "/" != path]
ANSWERED_HERE = Where.GATEWAY, Where.MERGED
KNOWN_PATHS = frozenset(path for _, path in ROUTES)
INFERENCE_PATHS = frozenset(path for (_, path), route in ROUTES.items() if route.where is Where.QUEUED)

# An unknown path may change something, as POST /api/experimental/aliases does. On /v1/ new paths are inference.
ELSEWHERE = {(family, guarded): Route(serve_control, Where.ANY, family=family, guarded=guarded, blind=True)
             for family in Family for guarded in (False, True)}


# -----------------------------------------------------------------------------
# hosts.txt: which nodes?
#
# A line is a URL and then settings such as slots=4; `#` begins a comment. The keys file has a key instead of the URL:
# `read_file`, `parse_lines` and `parse_settings` serve both.
# -----------------------------------------------------------------------------

# Bounds of this and the keys file: one is read at once, within 50 ms.
MAX_FILE_BYTES, MAX_FILE_LINES, MAX_LINE_CHARS = 1 * MIB, 4096, 4096
MAX_NODES = 1024                    # in one file


def parse_switch(text: str) -> bool:
    """Return the truth value of yes or no. Raises ValueError."""
    if text not in ("yes", "no"):
        raise ValueError(f"must be yes or no, not {text!r}")
    return text == "yes"


def parse_whole(text: str, most: int = 10**9) -> int:
    """Return a whole number from 1 to `most`. Raises ValueError."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise ValueError(f"must be a whole number from 1 to {most}, not {text!r}")
    return int(text)


def parse_word(text: str) -> str:
    """Return a text that can stand in a header field. Raises ValueError, without the text: it may be a token."""
    if not text or not text.isascii() or not text.isprintable():
        raise ValueError("must be printable ASCII")
    return text


def parse_resolve(text: str) -> bool:
    """Return True for `all`, the only value of resolve=. Raises ValueError."""
    if text != "all":
        raise ValueError(f"must be all, not {text!r}")
    return True


def parse_prefix(text: str) -> str:
    """Return a path prefix without its last slash. Raises ValueError."""
    if not text.startswith("/"):
        raise ValueError(f"must begin with a slash, not {text!r}")
    return parse_word(text).rstrip("/")


def parse_wanted(text: str) -> tuple[str, ...]:
    """Return the canonical names in a list of models with commas. Raises ValueError."""
    models = tuple(dict.fromkeys(canonical(name) for name in text.split(",")))
    if not all(models):
        raise ValueError(f"must be models with commas, such as llama3.2,qwen3:14b, not {text!r}")
    remote = next(filter(is_cloud, models), None)
    if remote:
        raise ValueError(f"{remote} runs in the cloud: no node loads it")
    return models


def parse_mac(text: str) -> str:
    """Return the 12 hexadecimal digits of a network card's address, such as AA:BB:CC:DD:EE:FF. Raises ValueError."""
    if not re.fullmatch(r"[0-9A-Fa-f]{2}([:-])[0-9A-Fa-f]{2}(\1[0-9A-Fa-f]{2}){4}", text):
        raise ValueError(f"must be like AA:BB:CC:DD:EE:FF, not {text!r}")
    return re.sub("[:-]", "", text).lower()


def parse_wake(text: str) -> str:
    """Return HOST:PORT, the port 9 unless it is told. Raises ValueError."""
    host, colon, port = text.rpartition(":") if ":" in text else (text, "", str(MAGIC_PORT))
    if not re.fullmatch(r"[0-9A-Za-z.-]+", host) or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"must be HOST or HOST:PORT, such as 192.168.1.255, not {text!r}")
    return f"{host}:{port}"


def parse_pause(text: str) -> float:
    """Return the seconds in a time such as 60s. Raises ValueError."""
    try:
        return parse_seconds(text)
    except argparse.ArgumentTypeError:
        raise ValueError(f"must be a time such as 60s or 5m, not {text!r}") from None


SettingParsers = Mapping[str, Callable[[str], str | float | tuple[int, float] | tuple[str, ...] | ModelSet]]
NODE_SETTINGS: SettingParsers = {
    "name": parse_word, "slots": functools.partial(parse_whole, most=64), "token": parse_word, "host": parse_word,
    "prefix": parse_prefix, "primary": parse_switch, "drain": parse_switch, "ca": parse_word,
    "insecure": parse_switch, "resolve": parse_resolve, "load": parse_wanted, "mac": parse_mac, "wake": parse_wake,
    "probe": parse_pause}


def open_regular(path: str) -> int:
    """Return a descriptor to read a file. Raises ConfigError, also for a pipe or a device, which may have no end."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)   # a pipe would be waited for
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ConfigError(f"{path}: this is not a regular file")


def read_file(path: str) -> tuple[str, int]:
    """Return (text, mode) of a file that a person writes, up to MAX_FILE_BYTES long. Raises ConfigError."""
    with open(open_regular(path), "rb") as file:
        data, mode = file.read(MAX_FILE_BYTES + 1), os.fstat(file.fileno()).st_mode
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: this is not UTF-8") from None
    if len(data) > MAX_FILE_BYTES or len(text.splitlines()) > MAX_FILE_LINES:
        raise ConfigError(f"{path}: longer than {MAX_FILE_BYTES // MIB} MiB or {MAX_FILE_LINES} lines")
    return text, mode


Settings = TypeVar("Settings", NodeSettings, KeySettings)


def parse_lines(text: str, place: str, kind: str, parse: Callable[[str], Settings],
                most: int = MAX_FILE_LINES) -> list[Settings]:
    """Return what `parse` makes of each line that is more than a comment; `kind` is nodes or keys.

    Raises ConfigError that names `place` and line, also if there are more than `most`, or two of one name.
    """
    by_name: dict[str, Settings] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if len(line) > MAX_LINE_CHARS:
                raise ValueError(f"a line of {len(line)} characters")
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if not line:
                continue
            settings = parse(line)
            if settings.name in by_name:
                raise ValueError(f"there are two {kind} named {settings.name!r}; give one of them another name=")
            if len(by_name) == most:
                raise ValueError(f"more than {most} {kind}")
        except ValueError as error:
            raise ConfigError(f"{place}:{number}: {error}") from None
        by_name[settings.name] = settings
    return list(by_name.values())


def parse_settings(words: list[str], parsers: SettingParsers, secret: bool) -> dict[str, Any]:
    """Return the values of words such as slots=4, by name. Raises ValueError; it shows no word that may be `secret`."""
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in parsers:
            complaint = "a setting is none of" if secret else f"unknown setting {name!r}; there are"
            raise ValueError(f"{complaint} {', '.join(parsers)}")
        try:
            values[name.replace("-", "_")] = parsers[name](text)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return values


def parse_url(url: str, usual_port: int = 11434) -> tuple[str, int, bool, str]:
    """Return (host, port, whether TLS, path) of a node's URL; without a scheme it is http."""
    shown = re.sub(r"(?<![^/])[^/]*@", "...@", url)     # no log may show a password
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else "http://" + url)
        port = usual_port if parts.port is None else parts.port
        if not port:
            raise ValueError
    except ValueError:
        raise ValueError(f"{shown!r} has no valid port") from None
    if (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query
            or parts.fragment or not url.isascii() or not url.isprintable()):
        raise ValueError(f"{shown!r} is not the URL of a node, such as http://gpu-box:11434")
    return parts.hostname, port, parts.scheme == "https", parts.path.rstrip("/")


def parse_node(line: str, parsers: SettingParsers | None = None, usual_port: int = 11434) -> NodeSettings:
    """Return the NodeSettings of one line: a URL, then key=value settings, by NODE_SETTINGS. Raises ValueError."""
    url, *words = line.split()
    host, port, tls, prefix = parse_url(url, usual_port)
    values = {"prefix": prefix, **parse_settings(words, parsers or NODE_SETTINGS, secret=False)}
    for key in ("ca", "insecure"):
        if key in values and not tls:
            raise ValueError(f"{key}= is for https:// only")
    if values.get("insecure") and "ca" in values:
        raise ValueError("ca= and insecure=yes contradict each other")
    if "wake" in values and "mac" not in values:
        raise ValueError("wake= is for a node with mac=")
    if "mac" in values and "resolve" in values:
        raise ValueError("mac= is of one machine, resolve=all is for many")
    shown = bracketed(host)
    return NodeSettings(values.pop("name", f"{shown}:{port}"), host, port, tls,
                        host_header=values.pop("host", f"{shown}:{port}"), probe_s=values.pop("probe", 0.0), **values)


def with_authority(node: NodeSettings, folder: str) -> NodeSettings:
    """Return the NodeSettings with the path of ca= seen from `folder`. Raises ValueError if there is no certificate."""
    if not node.ca:
        return node
    node = node._replace(ca=os.path.join(folder, node.ca))
    if os.path.exists(node.ca) and stat.S_ISFIFO(os.stat(node.ca).st_mode):     # to read it would wait for a writer
        raise ValueError(f"ca {node.ca}: this is not a regular file")
    trust_in(node)
    return node


def parse_hosts(text: str, place: str) -> list[NodeSettings]:
    """Return the NodeSettings of a hosts file. Raises ConfigError that names `place` and line."""
    folder = os.path.dirname(place)
    return parse_lines(text, place, "nodes", lambda line: with_authority(parse_node(line), folder), MAX_NODES)


def read_nodes(options: argparse.Namespace) -> list[NodeSettings]:
    """Return the NodeSettings from --hosts and --node. Raises ConfigError."""
    nodes: list[NodeSettings] = []
    if options.hosts:
        text, mode = read_file(options.hosts)
        nodes = parse_hosts(text, options.hosts)
        if any(node.token for node in nodes):
            warn_of_readers("hosts", options.hosts, mode)
    nodes += parse_hosts("\n".join(options.node), "--node")
    if not nodes and not options.discover:
        raise ConfigError(f"{options.hosts or '--node'}: there is no node in it")
    for name, count in collections.Counter(node.name for node in nodes).items():
        if count > 1:
            raise ConfigError(f"--node: there are two nodes named {name!r}")
    return nodes


# -----------------------------------------------------------------------------
# The keys file: whose keys?
# -----------------------------------------------------------------------------

PERIODS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_rate(text: str) -> tuple[int, float]:
    """Return (requests, seconds) of a rate such as 60/min. Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d{0,8})/(s|min|h|d)", text, re.ASCII)
    if not match:
        raise ValueError(f"must be a number of requests in a s, min, h or d, such as 60/min, not {text!r}")
    return int(match[1]), PERIODS_S[match[2]]


def parse_share(text: str) -> float:
    """Return a share such as 2 or 0.5. Raises ValueError."""
    if not re.fullmatch(r"\d{1,3}(\.\d{1,3})?", text, re.ASCII) or not 0.1 <= float(text) <= 100:
        raise ValueError(f"must be a number from 0.1 to 100, not {text!r}")
    return float(text)


def parse_budget(text: str) -> tuple[int, float]:
    """Return (tokens, seconds) of a budget such as 2M/d; CALENDAR_DAY for a d. Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d{0,8})([KMG]?)/(s|min|h|d)", text, re.ASCII | re.I)
    if not match:
        raise ValueError(f"must be a number of tokens in a s, min, h or d, such as 500K/h or 2M/d, not {text!r}")
    period_s = CALENDAR_DAY if match[3].lower() == "d" else PERIODS_S[match[3].lower()]
    return int(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "), period_s


def parse_models(text: str) -> ModelSet:
    """Return the models in a list with commas, each a name or a pattern such as qwen3:*. Raises ValueError."""
    if not re.fullmatch(r"[\w.:/*-]+(,[\w.:/*-]+)*", text, re.ASCII):
        raise ValueError(f"must be names of models with commas between, such as llama3.2,qwen3:*, not {text!r}")
    for word in text.lower().split(","):
        if word.endswith(("registry.ollama.ai/*", "library/*")):    # nothing of that is left in canonical names
            raise ValueError(f"{word!r} would be every model")
    patterns = set(map(parse_pattern, text.split(",")))
    exact = frozenset(pattern for pattern in patterns if "*" not in pattern)
    return EVERY_MODEL if "*" in patterns else ModelSet(exact, tuple(sorted(patterns - exact)))


def parse_routes(text: str) -> str:
    """Return the word for the routes that a key may use. Raises ValueError."""
    if text not in ("inference", "read", "all"):
        raise ValueError(f"must be inference, read or all, not {text!r}")
    return text


KEY_SETTINGS: SettingParsers = {
    "name": parse_word, "priority": parse_priority, "max-priority": parse_priority, "rate": parse_rate,
    "concurrency": parse_whole, "admin": parse_switch, "proxy": parse_switch, "share": parse_share,
    "models": parse_models, "routes": parse_routes, "tokens": parse_budget}


def parse_key(line: str) -> KeySettings:
    """Return the KeySettings of one line: a key, then key=value settings. Raises ValueError, never with the key."""
    secret, *words = line.split()
    values = parse_settings(words, KEY_SETTINGS, secret=True)
    values["budget"] = values.pop("tokens", (0, 1.0))
    if "name" not in values:
        raise ValueError("name= is missing: whose key is it?")
    if not secret.isascii() or not secret.isprintable():
        raise ValueError("a key must be printable ASCII")
    most = values.get("max_priority", 10)
    if values.setdefault("priority", min(DEFAULT_PRIORITY, most)) > most:
        raise ValueError("priority must not be over max-priority")
    return KeySettings(digest_of_key(secret.encode()), **values)


def parse_keys(text: str, place: str) -> list[KeySettings]:
    """Return the KeySettings of a keys file. Raises ConfigError that names `place` and line."""
    owners: dict[bytes, str] = {}

    def parse(line: str) -> KeySettings:
        key = parse_key(line)
        owner = owners.setdefault(key.digest, key.name)
        if owner != key.name:
            raise ValueError(f"this is the key of {owner!r}, too")
        return key

    keys = parse_lines(text, place, "keys", parse)
    if not keys:
        raise ConfigError(f"{place}: there is no key in it")
    return keys


def warn_of_readers(event: str, path: str, mode: int) -> None:
    """Warn if others than its owner can read a secret file.

    A file of systemd's LoadCredential= is safe: the rights of its group are those of an ACL.
    """
    given_by_systemd = os.path.dirname(path) == os.environ.get("CREDENTIALS_DIRECTORY", "none")
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and not given_by_systemd:
        LOG.warning({"event": event, "why": f"others than its owner can read {path}: chmod 600 it"})


def read_keys(options: argparse.Namespace) -> list[KeySettings]:
    """Return the KeySettings from --keys, none without it. Raises ConfigError; warns if others can read the file."""
    if not options.keys:
        return []
    text, mode = read_file(options.keys)
    keys = parse_keys(text, options.keys)
    warn_of_readers("keys", options.keys, mode)
    return keys


# -----------------------------------------------------------------------------
# Certificate and key of the gateway's own port
# -----------------------------------------------------------------------------

def no_password() -> NoReturn:
    raise ConfigError("is encrypted, and nobody is here to give the password")


def read_certificate(options: argparse.Namespace) -> ssl.SSLContext | None:
    """Return the TLS context of --tls-cert and --tls-key, None without them.

    Raises ConfigError that names the file; warns if others can read the key. It speaks TLS 1.2 at least, and HTTP/1.1.
    """
    if not options.tls_cert:
        return None
    certificate, key = options.tls_cert, options.tls_key
    for path in (certificate, key):     # ssl would not say which one cannot be read, and would wait for a pipe's end
        os.close(open_regular(path))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION      # else a write might have to wait for a read
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, no_password)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except (ssl.SSLError, OSError) as error:
        try:
            context.load_verify_locations(certificate)
        except ssl.SSLError:
            raise ConfigError(f"{certificate}: there is no certificate in PEM form in it") from None
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key}: this is not the key of the certificate in {certificate}") from None
        raise ConfigError(f"{key}: there is no usable private key in PEM form in it") from None
    warn_of_readers("tls", key, os.stat(key).st_mode)
    return context


# -----------------------------------------------------------------------------
# Sources: where do the nodes come from?
#
# There are three sources: the lines of hosts.txt and of flags, the addresses that DNS has for their names, and the
# servers that scans have found. `merge_sources` makes one list of settings of them; Gateway.join takes it over whenever
# a source has changed.
# -----------------------------------------------------------------------------

SCAN_S = 180.0                      # between two scans of the networks in --discover
SCAN_CONNECT_S = 0.5                # a machine of a LAN answers within a few ms
SCAN_AT_ONCE = 32                   # half of SPARE_DESCRIPTORS: a /24 takes 4 s if nobody answers, a /20 a minute
MOST_SCANNED = 4096                 # addresses in a network: a /20, or a /116 of IPv6
SCANS_KEPT = 10                     # a scanned node may miss so many: half an hour
FOLLOW_S = 30.0                     # at most between two looks at a name: the time to live of Kubernetes' names
Addresses = dict[str, list[str]]    # of names, as DNS answered last
Server = tuple[str, int]            # address and port
Scanned = dict[Server, int]         # servers that scans have found: scans in a row without an answer


def addresses_of(line: NodeSettings, dns: Addresses) -> list[str]:
    """Return the known addresses of a line's host."""
    address = literal(line.host)
    return [address] if address else dns.get(line.host, [])


def expand(line: NodeSettings, dns: Addresses) -> list[NodeSettings]:
    """Return the NodeSettings of every address behind a line; only IPv4 if there are both: a server has both."""
    addresses = addresses_of(line, dns)
    addresses = [address for address in addresses if ":" not in address] or addresses
    name = line.name.removesuffix(":11434")
    return [line._replace(name=f"{name}@{address}", address=address, resolve=False, primary=line.primary and not number)
            for number, address in enumerate(addresses)]


def servers_in(lines: Iterable[NodeSettings], dns: Addresses) -> set[Server]:
    """Return the servers that lines name."""
    return {(address, line.port) for line in lines for address in addresses_of(line, dns)}


def is_own(address: str) -> bool:
    """Tell whether an address is one of this machine's: only to those can a socket be bound."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return not is_loopback(address)


def merge_sources(lines: Iterable[NodeSettings], dns: Addresses, scanned: Iterable[Server],
                  is_own: Callable[[str], bool] = is_own) -> list[NodeSettings]:
    """Return the NodeSettings of all nodes that the sources know; a scanned server that is also written counts once."""
    nodes: dict[str, NodeSettings] = {}
    written = servers_in(lines, dns)
    here = {port for address, port in written if is_loopback(address)}      # this machine, written as localhost
    for line in lines:
        for node in expand(line, dns) if line.resolve else [line]:
            nodes.setdefault(node.name, node)
    for address, port in scanned:
        if (address, port) not in written and not (port in here and is_own(address)):
            node = parse_node(f"{bracketed(address)}:{port}")
            nodes.setdefault(node.name, node)
    return list(nodes.values())


async def look_up(name: str) -> list[str]:
    """Ask DNS for the addresses behind a name. Raises OSError, or UnicodeError if it cannot be one."""
    rows = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return [str(row[4][0]) for row in rows]


def parse_network(text: str) -> Network:
    """Return the network of a CIDR such as 192.168.1.0/24, or of one address. Raises ArgumentTypeError."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a network such as 192.168.1.0/24") from None
    if network.num_addresses > MOST_SCANNED:
        raise argparse.ArgumentTypeError(f"{text} has more than {MOST_SCANNED} addresses; a /20 has as many, "
                                         "or a /116 of IPv6")
    return network


def after_scan(scanned: Scanned, answered: Iterable[Server], up: set[Server]) -> Scanned:
    """Return what is known after a scan. `up`: servers that were not asked, because they are nodes that answer."""
    known = {server: 0 if server in up else missed + 1 for server, missed in scanned.items()}
    known.update(dict.fromkeys(answered, 0))
    return {server: missed for server, missed in known.items() if missed < SCANS_KEPT}


SCAN = "--discover"                 # the scans' key among the tasks; no host is called so


class Sources:
    """What the sources know, and the tasks that keep up with DNS and with the networks of --discover."""

    def __init__(self, gateway: Gateway, look_up: Callable[[str], Awaitable[list[str]]], scan_port: int) -> None:
        self.gateway, self.options, self.loop = gateway, gateway.options, gateway.loop
        self.look_up = look_up      # name -> its addresses
        self.scan_port = scan_port  # of the servers that are looked for
        self.lines: list[NodeSettings] = []         # as written
        self.dns: Addresses = {}
        self.unresolved: set[str] = set()           # names for which DNS failed last
        self.scanned: Scanned = dict(self.options.inherited.scanned)
        self.tasks: dict[str, asyncio.Task[None]] = {}          # by name, or SCAN

    def configure(self, lines: list[NodeSettings]) -> None:
        """Take over the lines of hosts.txt and of flags, and follow the names in them."""
        self.lines = lines          # beside a scan, all names are looked up: it finds their servers again
        names = {line.host for line in lines if (line.resolve or self.options.discover) and not literal(line.host)}
        names |= {line.host for line in self.options.peer if line.resolve and not literal(line.host)}
        for name in self.tasks.keys() - names - {SCAN}:
            self.tasks.pop(name).cancel()
            self.dns.pop(name, None)
            self.unresolved.discard(name)
        for name in names - self.tasks.keys():
            supervise(self.tasks, name, self.follow, self.options.probe_interval)

    def new_names(self) -> set[str]:
        """Return the names that were not looked up yet."""
        return self.tasks.keys() - self.dns.keys() - self.unresolved - {SCAN}

    async def resolve(self, name: str) -> bool:
        """Note the addresses behind a name; tell whether they have changed. If DNS fails, its last answer stays."""
        former, failed = self.dns.get(name, []), name in self.unresolved
        try:
            current, why = set(await self.look_up(name)), "no address"
        except (OSError, UnicodeError) as error:
            current, why = set(), getattr(error, "strerror", None) or str(error)
        if not current:
            self.unresolved.add(name)
            if not failed:
                LOG.warning({"event": "dns", "name": name, "addresses": " ".join(former), "why": why})
            return False
        self.unresolved.discard(name)
        # In the order in which they came: the first one may be the primary node.
        self.dns[name] = [address for address in former if address in current] + sorted(current.difference(former))
        if failed or self.dns[name] != former:
            LOG.info({"event": "dns", "name": name, "addresses": " ".join(self.dns[name])})
        return self.dns[name] != former

    async def follow(self, name: str) -> None:
        """Keep up with the addresses behind a name."""
        while True:
            if await self.resolve(name):
                self.gateway.join()
                pump(self.gateway)
            await asyncio.sleep(min(self.options.probe_interval, FOLLOW_S) * self.gateway.rng.uniform(0.85, 1.15))

    async def is_ollama(self, address: str) -> bool:
        """Tell whether an Ollama server listens at an address."""
        pool = Pool(parse_node(f"{bracketed(address)}:{self.scan_port}"), self.gateway.turns, self.gateway.via)
        try:
            async with asyncio.timeout(SCAN_CONNECT_S):
                pool.give_back(await pool.connect())
            return await OllamaApi(pool).is_there()
        except (TimeoutError, NodeFailure, Refusal):
            return False
        finally:
            pool.close()

    async def scan(self) -> None:
        """Look once for Ollama servers in the networks of --discover. Nodes that are up are not asked again."""
        networks, port, began_s = self.options.discover, self.scan_port, self.loop.time()
        up = {(node.settings.address or node.settings.host, node.settings.port)
              for node in self.gateway.dispatcher.cluster.nodes.values() if node.up}
        known = up | servers_in(self.lines, self.dns) | {self.gateway.listener.address}
        addresses = list(dict.fromkeys(str(address) for network in networks for address in network.hosts()))
        LOG.info({"event": "scan", "networks": " ".join(map(str, networks)), "port": port,
                  "addresses": len(addresses)})
        unknown = (address for address in addresses if (address, port) not in known)
        answered: set[str] = set()

        async def look() -> None:
            for address in unknown:
                if await self.is_ollama(address):
                    answered.add(address)

        await asyncio.gather(*(look() for _ in range(SCAN_AT_ONCE)))
        former = self.scanned
        self.scanned = after_scan(former, [(address, port) for address in addresses if address in answered], up)
        LOG.info({"event": "scan",
                  "found": " ".join(address for address, _ in self.scanned if (address, port) not in former),
                  "gone": " ".join(address for address, _ in former if (address, port) not in self.scanned),
                  "known": len(self.scanned), "took_s": round(self.loop.time() - began_s, 1)})

    async def scan_forever(self, _: str) -> None:
        """Keep up with the servers in the networks of --discover."""
        while True:
            await self.scan()
            self.gateway.join()
            pump(self.gateway)
            await asyncio.sleep(SCAN_S * self.gateway.rng.uniform(0.85, 1.15))


# -----------------------------------------------------------------------------
# Memory: what is worth keeping of what was learned?
#
# Speeds, slots and lengths, as plain values for a file: {"nodes": [...], "lengths": {model: ...}}. When it is read,
# numbers out of range are left out, and the rest counts as a few samples only, which new ones soon outweigh. Beside
# them, under "orders", which nodes were drained or resumed, and, under "history", the last day; see History.
# -----------------------------------------------------------------------------

Range = tuple[type[float], float, float]        # kind of number, least, most
KEPT_OF_NODE: dict[str, Range] = {
    "size_factor": (float, 0.01, 100.0), "overhead_s": (float, 0.0, MOST_OVERHEAD_S), "load_factor": (float, 0.01, 1e3)}
KEPT_OF_MEMORY: dict[str, Range] = {
    "seen_bytes": (float, 0.0, 1e15), "limit_bytes": (float, 1.0, 1e15), "most_loaded": (float, 1.0, 1e4)}
KEPT_OF_RUNNER: dict[str, Range] = {"vram_bytes": (float, 1.0, 1e15)}
KEPT_OF_SPEEDS: dict[str, Range] = {
    "decode_s": (float, 1e-6, 1e3), "prefill_s": (float, 1e-8, 1e3), "input_s": (float, 1e-8, 1e3),
    "load_s": (float, 1e-3, 1e4), "lines_per_token": (float, 1e-3, 1e3),
    "samples": (int, 1, 10**12), "streams": (int, 1, 10**12)}
KEPT_OF_BATCHING: dict[str, Range] = {"batch_exponent": (float, LEAST_GAIN, MOST_GAIN)}
KEPT_OF_SLOTS: dict[str, Range] = {"count": (int, 1, 256), "max_proven": (int, 1, 256), "rejections": (int, 0, 1000)}
KEPT_OF_LENGTHS: dict[str, Range] = {
    "mean": (float, 0.0, 1e7), "samples": (int, 1, 10**12)}
KEPT_OF_PROMPTS: dict[str, Range] = {
    "chars_per_token": (float, 0.01, 1000.0), "chars_per_token_with_tools": (float, 0.01, 1000.0),
    "chars_per_token_added": (float, 0.01, 1000.0), "image_tokens": (float, 1.0, 1e6)}
KEPT_RATIOS: dict[str, Range] = {"true": (float, 1e-3, 1e3), "false": (float, 1e-3, 1e3)}
KEPT_BUCKETS: dict[str, Range] = {str(bits): (float, 0.0, 1e7) for bits in range(41)}
MOST_KEPT = 500                     # nodes, and models of each: pods that never return would pile up


def within(values: Any, ranges: dict[str, Range]) -> Json:
    """Return the values that are numbers in their range: {name: number}; none if `values` is no dict."""
    found = {}
    for name, (kind, least, most) in ranges.items() if isinstance(values, dict) else ():
        value = values.get(name)
        if type(value) in (int, kind) and least <= value <= most:
            found[name] = kind(value)
    return found


def attributes(owner: Node | MemoryEstimate | Runner | SpeedEstimate | BatchingEstimate | SlotEstimate | OutputLengths
               | PromptSizes, ranges: dict[str, Range]) -> Json:
    """Return the attributes of an estimate that are in their range."""
    return within({name: getattr(owner, name) for name in ranges}, ranges)


def learned_of_runner(runner: Runner, digest: str) -> Json:
    """Return what to keep of a model on a node; {} if nothing was learned."""
    kept = {**attributes(runner, KEPT_OF_RUNNER), **attributes(runner.speeds, KEPT_OF_SPEEDS)}
    if not runner.speeds.samples:
        kept.pop("lines_per_token", None)
    if runner.batching.samples:
        kept.update(attributes(runner.batching, KEPT_OF_BATCHING))
    if runner.slots.origin == "learned":
        kept.update(attributes(runner.slots, KEPT_OF_SLOTS))
    if runner.unqueued_ratio:
        ratios = {str(streams).lower(): ratio for streams, ratio in runner.unqueued_ratio.items()}
        kept["unqueued_ratio"] = within(ratios, KEPT_RATIOS)
    return {**kept, "digest": digest} if kept else {}


def learned_of_node(node: Node) -> Json:
    """Return what to keep of a node, with what was kept of models that it does not have now."""
    models = {model: learned for model, runner in node.runners.items()
              if (learned := learned_of_runner(runner, digest_of(node, model)))}
    kept = {model: learned for model, learned in node.kept.items() if model not in models}
    models = dict([*kept.items(), *models.items()][-MOST_KEPT:])
    if not models:
        return {}
    return {"name": node.name, "url": node.settings.url, **attributes(node, KEPT_OF_NODE),
            **attributes(node.memory, KEPT_OF_MEMORY), "models": models}


def learned_of_lengths(lengths: OutputLengths) -> Json:
    """Return what to keep of a model's lengths."""
    return {**attributes(lengths, KEPT_OF_LENGTHS), **attributes(lengths.prompts, KEPT_OF_PROMPTS),
            "buckets": {str(bits): mean for bits, (mean, _) in sorted(lengths.buckets.items())}}


def read_node(entry: Any) -> Json | None:
    """Return what was kept of a node, in range; None if `entry` is not of that kind."""
    if not (isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("url"), str)
            and isinstance(entry.get("models"), dict)):
        return None
    models = {}
    for model, kept in itertools.islice(entry["models"].items(), MOST_KEPT):
        if read := within(kept, {**KEPT_OF_RUNNER, **KEPT_OF_SPEEDS, **KEPT_OF_BATCHING, **KEPT_OF_SLOTS}):
            ratios = within(kept.get("unqueued_ratio"), KEPT_RATIOS)
            models[model] = {**read, **({"unqueued_ratio": ratios} if ratios else {}),
                             "digest": str(kept.get("digest") or "")[:100]}
    return {"name": entry["name"], "url": entry["url"], **within(entry, {**KEPT_OF_NODE, **KEPT_OF_MEMORY}),
            "models": models}


def read_lengths(entry: Any) -> OutputLengths:
    """Return the OutputLengths that were kept of a model; values out of range are left out."""
    lengths = OutputLengths()
    for name, value in within(entry, KEPT_OF_LENGTHS).items():
        setattr(lengths, name, value)
    for name, value in within(entry, KEPT_OF_PROMPTS).items():
        setattr(lengths.prompts, name, value)
        lengths.prompts.samples[name] = KEPT_SAMPLES
    lengths.samples = min(lengths.samples, 3 * KEPT_SAMPLES)    # lengths vary more than speeds
    means = within(entry["buckets"], KEPT_BUCKETS) if isinstance(entry, dict) and "buckets" in entry else {}
    lengths.buckets = {int(bits): [mean, lengths.samples] for bits, mean in means.items()}
    return lengths


def read_orders(entries: Any) -> dict[tuple[str, str], bool]:
    """Return the orders that were kept: {server: drained?}; what is none is left out."""
    return {(entry["url"], entry["host"]): entry["draining"]
            for entry in (entries[-MOST_KEPT:] if isinstance(entries, list) else ())
            if isinstance(entry, dict) and isinstance(entry.get("url"), str) and isinstance(entry.get("host"), str)
            and isinstance(entry.get("draining"), bool)}


def kept_of(entries: list[Json], settings: NodeSettings) -> Json:
    """Return what was kept of a server: under its URL and name, else its URL, else its name; {} if nothing was."""
    def likeness(entry: Json) -> int:
        return int(entry["url"] == settings.url) * 2 + int(entry["name"] == settings.name)

    best = max(reversed(entries), key=likeness, default=None)       # of equals the one that was seen last
    return best if best and likeness(best) else {}


def recall(entries: list[Json], node: Node) -> Node:
    """Return a new node, with what was kept of its server: it need not be calibrated then."""
    entry = kept_of(entries, node.settings)
    node.kept = entry.get("models", {})
    for owner, names in ((node, KEPT_OF_NODE), (node.memory, KEPT_OF_MEMORY)):
        for name in names.keys() & entry.keys():
            setattr(owner, name, entry[name])
    node.calibrated = any("decode_s" in learned for learned in node.kept.values())
    if node.settings.mac and node.kept:     # it may be asleep: what it had is what it is woken for
        node.take_tags([{"name": model, "digest": kept.get("digest", "")} for model, kept in node.kept.items()],
                       -math.inf)
    return node


# -----------------------------------------------------------------------------
# The state file: what did an earlier run learn?
# -----------------------------------------------------------------------------

MOST_STATE_BYTES = 64 * MIB         # some 100 KiB for ten nodes with twenty models
STATE_FORMAT: Json = {"format": "sollol-state", "version": 1}


def object_of(format: Json, text: bytes) -> Json:
    """Return the object in a file of our own, which must have the members of its format. Raises ValueError."""
    state = object_in(text)
    if state is None:
        raise ValueError("it is not a JSON object")
    if any(state.get(name) != value for name, value in format.items()):
        raise ValueError(f"it does not have {format}")
    return state


def parse_state(text: bytes) -> Json:
    """Return what is in a state file, at least a list `nodes` and an object `lengths`. Raises ValueError."""
    state = object_of(STATE_FORMAT, text)
    if not isinstance(state.get("nodes"), list) or not isinstance(state.get("lengths"), dict):
        raise ValueError("it has no nodes or no lengths")
    return state


class KeptFile:
    """A file of our own that outlives a restart. One that cannot be used is renamed, not overwritten."""

    event = "state"                 # what the log calls it

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)      # what a link points to is replaced, not the link
        self.foreign = False        # there is a file that we must not overwrite
        self.failed = False         # the last write failed
        try:
            self.replace_with(None)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise ConfigError(f"--state: {path}: {error.strerror}") from None
            self.note_failure(error)        # there may be room again; nobody's request has to wait for that

    def note_failure(self, error: OSError) -> None:
        """Log that the file could not be written, the first of several times."""
        if not self.failed:
            LOG.error({"event": self.event, "file": self.path, "why": error.strerror})
        self.failed = True

    def read_with(self, take: Callable[[bytes], Json]) -> None:
        """Let `take` read the text, and log what it returns; log one line if the file cannot be used."""
        try:
            with open(self.path, "rb") as file:
                text = file.read(MOST_STATE_BYTES + 1)
            if len(text) > MOST_STATE_BYTES:
                raise ValueError(f"larger than {MOST_STATE_BYTES // MIB} MiB")
            told = take(text)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(f"--state: {self.path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            self.foreign = True
            LOG.warning({"event": self.event, "file": self.path, "ignored": str(error)[:200],
                         "why": f"it will be kept as {self.path}.ignored"})
            return
        LOG.info({"event": self.event, "file": self.path, **told})

    def write_pieces(self, pieces: Iterable[str]) -> bool:
        """Write the file, whole or not at all; tell whether it was."""
        try:
            if self.foreign:
                os.replace(self.path, f"{self.path}.ignored")
                self.foreign = False
            self.replace_with(pieces)
            self.failed = False
        except OSError as error:
            self.note_failure(error)
        return not self.failed

    def replace_with(self, pieces: Iterable[str] | None) -> None:
        """Replace the file by a text in one step; None only tries whether that is possible. Raises OSError."""
        if os.path.isdir(self.path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.exists(self.path) and not os.path.isfile(self.path):     # root would replace /dev/null
            raise OSError(errno.EINVAL, "not a regular file")
        number, temporary = tempfile.mkstemp(dir=os.path.dirname(self.path) or ".", prefix=".sollol-")
        try:
            with open(number, "w", encoding="utf-8") as file:
                file.writelines(pieces or ())
                file.flush()
                os.fsync(number)    # else a power cut could leave the new name with no content
            if pieces is not None:
                os.replace(temporary, self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):    # it has become the file
                os.unlink(temporary)


class StateFile(KeptFile):
    """Keep what was learned."""

    text = ""                       # as written last

    def read(self, dispatcher: Dispatcher, history: History) -> None:
        """Let a dispatcher and the history of the day remember what is in the file."""
        def take(text: bytes) -> Json:
            state = parse_state(text)
            dispatcher.cluster.remember(state)
            history.recall(state.get("history"))
            return {"nodes": len(dispatcher.cluster.kept)}

        self.read_with(take)

    def write(self, learned: Json) -> None:
        """Write what was learned, if it has changed."""
        text = json.dumps({**STATE_FORMAT, **learned}, indent=1) + "\n"
        if text != self.text and self.write_pieces([text]):
            self.text = text


class UsageFile(KeptFile):
    """Keep who used what."""

    event = "usage"
    noted = 0                       # `Usage.noted` of what was written last

    def read(self, usage: Usage) -> None:
        """Let `usage` take over what is in the file."""
        def take(text: bytes) -> Json:
            usage.load(text, local_day())
            return {"days": len(usage.days) + len(usage.closed)}

        self.read_with(take)

    def write(self, pieces: Iterable[str], noted: int) -> None:
        """Write the pieces of a Usage, `noted` of which are in them at least."""
        if self.write_pieces(pieces):
            self.noted = noted


def usage_path(state: str) -> str:
    """Return the path of the usage file, beside the state file: /x/state.json -> /x/state.usage.json."""
    root, suffix = os.path.splitext(os.path.realpath(state))
    return f"{root}.usage{suffix}"


# -----------------------------------------------------------------------------
# Files: what has been saved, by somebody else or by us?
# -----------------------------------------------------------------------------

STATE_S = 55.0                      # between two writes of what is kept: less than a minute of it can be lost


class Files:
    """Take over hosts.txt, keys and certificate when they have changed, and keep the state and the usage file."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.options, self.loop = gateway, gateway.options, gateway.loop
        self.seen = self.before = self.stamps()     # as taken over; as in the last sweep
        self.state = StateFile(self.options.state) if self.options.state else None
        self.usage = UsageFile(usage_path(self.options.state)) if self.options.state else None
        self.saved_s = self.loop.time()
        self.saving: asyncio.Task[None] | None = None
        learned = self.options.inherited.learned
        gateway.telemetry.history.recall(learned and learned.get("history"))    # first: it is newer than the file
        if self.state and self.usage:
            self.state.read(gateway.dispatcher, gateway.telemetry.history)
            self.usage.read(gateway.telemetry.usage)
        if learned:
            gateway.dispatcher.cluster.remember(learned)

    def stamps(self) -> list[tuple[int, int, int] | None]:
        """Return what changes when the hosts or the keys file is saved; a file that is away for a moment is None."""
        stamps: list[tuple[int, int, int] | None] = []
        for path in (self.options.hosts, self.options.keys):
            try:
                status = os.stat(path) if path else None
            except OSError:
                status = None
            stamps.append(status and (status.st_mtime_ns, status.st_size, status.st_ino))
        return stamps

    def reload(self) -> None:
        """Read all files again. A bad one is refused with one log line, and what it said before stays."""
        tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={int(self.loop.time() * 1e6)}")
        self.seen = self.stamps()
        for read in (self.read_hosts, self.read_keys, self.read_certificate):
            try:
                if changes := read():
                    LOG.info({"event": "reload", **changes})
            except ConfigError as error:
                LOG.error({"event": "reload", "refused": str(error)})
        tell_systemd("READY=1")
        pump(self.gateway)

    def read_hosts(self) -> Json:
        """Take over the nodes; return what to log. Raises ConfigError, as the next two do."""
        changes = zip(("added", "dropped", "changed"), self.gateway.configure(read_nodes(self.options)), strict=True)
        return {change: " ".join(node.name for node in nodes) for change, nodes in changes}

    def read_keys(self) -> Json:
        """Take over the keys, if there is a file of them; return what to log."""
        if not self.options.keys:
            return {}
        self.gateway.access.configure(read_keys(self.options))
        return {"keys": len(self.gateway.access.keys)}

    def read_certificate(self) -> Json:
        """Take over the certificate, if there is one, for new connections; return what to log."""
        self.gateway.listener.tls = read_certificate(self.options)
        return {"certificate": self.options.tls_cert} if self.options.tls_cert else {}

    def sweep(self, now: float) -> None:
        """Read files that have been saved, and save what was learned, each when it is time."""
        former, self.before = self.before, self.stamps()
        if former == self.before and any(       # unchanged for SWEEP_S: nobody is writing
                stamp not in (None, seen) for stamp, seen in zip(former, self.seen, strict=True)):
            self.reload()
        is_saving = self.saving is not None and not self.saving.done()
        if now - self.saved_s >= STATE_S and not is_saving and self.gateway.upgrade.task is None:
            self.saved_s = now
            self.saving = self.loop.create_task(self.save())

    async def save(self) -> None:
        """Save what was learned and used, in a thread: a disk may be slow. Close the days that are over."""
        usage = self.gateway.telemetry.usage
        await self.gateway.turns.run(usage.close_days())
        if self.state and self.usage:
            learned = self.gateway.dispatcher.cluster.learned()
            learned["history"] = self.gateway.telemetry.history.kept()
            await self.loop.run_in_executor(None, self.state.write, learned)
            if usage.noted != self.usage.noted:
                noted, pieces = usage.noted, await self.gateway.turns.run(usage.pieces())
                await self.loop.run_in_executor(None, self.usage.write, pieces, noted)

    def save_soon(self) -> None:
        """Save at the next sweep: what was ordered is to survive a crash, too."""
        self.saved_s = -math.inf

    async def save_usage(self) -> None:
        """Save what was used up to this moment, for a new process to read; see Upgrade.note_use."""
        if self.saving:
            await asyncio.wait([self.saving])
        if self.usage:
            usage = self.gateway.telemetry.usage
            pieces = at_once(usage.pieces())
            self.gateway.upgrade.uses.clear()
            await self.loop.run_in_executor(None, self.usage.write, pieces, usage.noted)

    def hand_over(self) -> None:
        """Write no file any more: another process does."""
        self.state = self.usage = None

    async def close(self) -> None:
        """Save what was learned and used for the last time."""
        if self.saving:
            await asyncio.wait([self.saving])
        if self.state and self.usage:
            history = self.gateway.telemetry.keep_history()
            self.state.write({**self.gateway.dispatcher.cluster.learned(), "history": history})
            usage = self.gateway.telemetry.usage
            if usage.noted != self.usage.noted:
                self.usage.write(at_once(usage.pieces()), usage.noted)


# -----------------------------------------------------------------------------
# Upgrade: how does a new process take over?
#
# SIGUSR2 starts the program that is on disk, with the same arguments. A socket pair joins the two processes; each
# message is a line of JSON, an object with some of these fields:
#
#   hello       to the new one, with the listening sockets and standard error: what was learned
#   ready       to the old one: files are read, nodes looked at
#   go          to the new one, which accepts from then on, while the old one finishes what it has: orders to nodes
#   running     both ways: requests that have begun on nodes, or how far they are; `ended`: which have ended
#   first_key_s both ways: the key of the ticket that is next, if one waits
#   want, turn  both ways: may I give slots? You may
#   used        to the new one, which keeps the usage file: what requests have used since it was saved for it
#
# What runs elsewhere is a lease here: its slot is taken, and predictions count it. Only who has the turn gives slots,
# and passes it on with all that it knows, so no slot is given twice. When several upgrades follow each other, the
# processes form a chain; each tells its neighbours of the others, and knows which way the turn is (Raymond 1989).
# -----------------------------------------------------------------------------

UPGRADE_S = 30.0                    # time that a new process has to get ready
TURN_S = 2.0                        # who does not pass the turn on for so long hangs: slots are given without it
CLOSE_S = 1.0                       # for the last words to a process that does not read
MOST_PENDING_BYTES = 16 * MIB       # to a process that does not read, or of one message from it: it does not work
MOST_SOCKETS = 16                   # that a supervisor may pass
FIRST_PASSED = 3                    # SD_LISTEN_FDS_START
PREDECESSOR = "SOLLOL_PREDECESSOR"  # the variable that tells a new process its end of the socket pair
LATER = (signal.SIGHUP, signal.SIGUSR2)     # blocked in a new process until it handles them: they would end it
PASSED_ON = (signal.SIGTERM, signal.SIGINT, *LATER)     # from the first process to those after it
SET_SUBREAPER = 36                  # PR_SET_CHILD_SUBREAPER of prctl(2)


class Inherited(NamedTuple):
    """What a process got at its start, from the one before it or from a supervisor."""

    sockets: Sequence[socket.socket] = ()   # that listen
    channel: socket.socket | None = None    # to the process before; None: there is none
    stderr: int = 2                 # the descriptor of the log, from the moment at which it takes over
    learned: Json | None = None     # as in a state file
    scanned: Mapping[Server, int] = types.MappingProxyType({})      # see Sources.scanned
    lifeline: int | None = None     # a pipe that ends with the first process of all, if that waits for the others


def listening(descriptor: int) -> socket.socket:
    """Return the socket behind a descriptor. Raises ConfigError if it is none that listens for TCP."""
    try:
        passed = socket.socket(fileno=descriptor)
        if passed.family in (socket.AF_INET, socket.AF_INET6) and passed.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            passed.set_inheritable(False)
            return passed
        passed.detach()
    except OSError:
        pass
    raise ConfigError(f"LISTEN_FDS: descriptor {descriptor} is no socket that listens for TCP")


def passed_sockets(environ: MutableMapping[str, str], pid: int) -> list[socket.socket]:
    """Return the sockets that a supervisor has opened for this process; see sd_listen_fds(3). Raises ConfigError.

    What told of them is taken out of the environment: it is not meant for a successor.
    """
    told_pid, count, _ = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if told_pid != str(pid):
        return []
    if not count.isdecimal() or int(count) > MOST_SOCKETS:
        raise ConfigError(f"LISTEN_FDS: {count[:99]!r} is no number up to {MOST_SOCKETS}")
    return [listening(FIRST_PASSED + number) for number in range(int(count))]


def inherit(number: str) -> Inherited:
    """Return what the process before hands over through its descriptor. Raises ConfigError if it has gone."""
    try:
        channel = socket.socket(fileno=int(number))
        channel.set_inheritable(False)
        channel.settimeout(UPGRADE_S)
        _, (stderr, *descriptors), _, _ = socket.recv_fds(channel, 1, 2 + MOST_SOCKETS)
        text = bytearray()
        while not text.endswith(b"\n") and (piece := channel.recv(READ_AHEAD_BYTES)):
            text += piece
        hello = json.loads(text)["hello"]
        learned = parse_state(json.dumps(hello["state"]).encode())
        scanned = {(address, port): missed for address, port, missed in hello["scanned"]}
        lifeline = descriptors.pop() if hello["is_waited_for"] else None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{PREDECESSOR}: the process before says nothing of use: {error!r}") from None
    return Inherited([listening(descriptor) for descriptor in descriptors], channel, stderr, learned, scanned,
                     lifeline)


def start_folder() -> str:
    """Return the folder that the program was started in, by the name that was used: a link may lead elsewhere later."""
    named, real = os.environ.get("PWD", ""), os.getcwd()
    with contextlib.suppress(OSError):
        if os.path.isabs(named) and os.path.samefile(named, real):
            return named
    return real


def unnamed_file() -> int:
    """Return the descriptor of a file that has no name. Raises OSError."""
    with contextlib.suppress(OSError, AttributeError):
        return os.memfd_create("sollol-start")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def last_words(descriptor: int) -> str:
    """Return the last line of a file that is not empty, for the log; of a traceback, with the place before it."""
    size = os.fstat(descriptor).st_size
    text = os.pread(descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES)).decode(errors="replace").strip()
    places = re.findall(r'(?m)^ *File "(?:.*/)?(.+)", line (\d+)', text)
    return text.rpartition("\n")[2][:500] + "".join(f" ({file}:{line})" for file, line in places[-1:])


def take_stderr(descriptor: int, style: str, level: str) -> None:
    """Make a descriptor standard error, and log there what went to another file so far."""
    for handler in LOG.handlers:
        handler.close()             # which writes what it has
    text = os.pread(2, os.fstat(2).st_size, 0)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    start_log(style, level)
    for handler in LOG.handlers:
        if isinstance(handler, LogWriter):
            handler.queue_lines(text)


def become_reaper() -> bool:
    """Let this process be the parent of those whose parent ends, of all that come from it; tell whether that worked."""
    if os.getpid() == 1:
        return True
    with contextlib.suppress(ImportError, OSError, AttributeError):     # only Linux has this call
        import ctypes
        return bool(ctypes.CDLL(None).prctl(SET_SUBREAPER, 1, 0, 0, 0) == 0)
    return False


def outlive(heir: int) -> int:
    """Wait until no process that came from this one is left, and pass signals on to them. Return an exit status: the
    first that is not 0, as all but the last process end with 0.

    So whoever knows only this process, such as a shell, a supervisor or a container, sees one program that goes on.
    """
    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(heir, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = 0
    while True:
        try:
            _, ended = os.wait()
        except ChildProcessError:
            return status
        code = os.waitstatus_to_exitcode(ended)
        status = status or (code if code >= 0 else 128 - code)


def row_of(lease: Lease) -> Json:
    """Return what another process must know of a lease that takes a slot."""
    spec = lease.ticket.spec
    return {"id": lease.ticket.id, "server": server_of(lease.node.settings), "node": lease.node.name,
            "model": spec.model or lease.slot.model, "loaded_s": lease.ready_s if lease.loads else None,
            "measures": lease.measures and not lease.loads,
            "stream": spec.stream, "embeds": spec.embeds, "sent_s": lease.sent_s,
            "predicted_end_s": lease.predicted_end_s, "prompt_tokens": lease.prompt_tokens,
            "new_tokens": lease.new_tokens, "output_tokens": lease.output_tokens,
            "begun": lease.first_s is not None, "lines": lease.lines}


MOST_ON_NODE = 256                  # as many slots may be known; work grows with the square: 256 that end take 15 ms
ROW_TIMES: dict[str, Range] = dict.fromkeys(("sent_s", "predicted_end_s", "loaded_s", "key_s", "since_s"), (
    float, -1e10, 1e10))
ROW_NUMBERS: dict[str, Range] = {**ROW_TIMES, **dict.fromkeys(("prompt_tokens", "new_tokens", "output_tokens"), (
    float, 0.0, 1e8)), "lines": (int, 0, 10**9), "inputs": (int, 0, 10**9)}


class SharedSlots:
    """What two processes, or a gateway and a peer, tell each other of the requests that they run on the same nodes."""

    def __init__(self, dispatcher: Dispatcher, peer: PeerGateway | None = None) -> None:
        self.dispatcher, self.cluster, self.peer = dispatcher, dispatcher.cluster, peer
        self.ahead_s = 0.0          # the clock here minus the clock there
        self.numbers = itertools.count()
        self.told: dict[Lease, tuple[int, int]] = {}    # (its number, lines) of those that the other one knows
        self.leases: dict[int, Lease] = {}      # what the other one runs, by its numbers
        self.first_key_s: float | None = None   # of what waits there
        self.told_key_s: float | None = None    # of what waits here

    def running(self) -> list[Lease]:
        """Return the leases that the other one has to be told of. Peers tell of their own themselves."""
        theirs = set(self.leases.values())
        return [lease for node in (*self.cluster.nodes.values(), *self.cluster.leaving) for lease in node.leases
                if lease.runner and lease.ticket.peer is None and lease not in theirs]

    def news(self, first_key_s: float | None, progress: bool = False) -> Json:
        """Return what the other one does not know; {} if it knows everything. `progress`: that of streams, too."""
        running = dict.fromkeys(self.running())
        new = [lease for lease in running
               if lease not in self.told or progress and self.told[lease][1] != lease.lines]
        ended = [self.told.pop(lease)[0] for lease in list(self.told) if lease not in running]
        for lease in new:
            number = self.told[lease][0] if lease in self.told else next(self.numbers)
            self.told[lease] = number, lease.lines
        news: Json = {"running": [(self.told[lease][0], row_of(lease)) for lease in new], "ended": ended}
        news = {name: changes for name, changes in news.items() if changes}
        if first_key_s != self.told_key_s:
            news["first_key_s"] = self.told_key_s = first_key_s
        return news

    def take(self, news: Json, now: float) -> bool:
        """Take over the other one's news; tell whether a slot has become free or was taken."""
        self.first_key_s = news.get("first_key_s", self.first_key_s)
        for number, row in news.get("running", ()):
            lease = self.leases.get(number) or self.begin(number, row, now)
            if lease is not None:
                lease.lines, lease.heard_s = within(row, ROW_NUMBERS)["lines"], now
                if row["begun"] and lease.first_s is None:
                    lease.first_byte(now)
        for number in news.get("ended", ()):
            if number in self.leases:
                self.leases.pop(number).end(now)
        return "running" in news or "ended" in news

    def begin(self, number: int, row: Json, now: float) -> Lease | None:
        """Note a request that the other one runs; None if its node is unknown here, or has more than enough to do."""
        node, numbers = self.node_at(tuple(row["server"]), row.get("node")), self.numbers_in(row)
        if node is None or len(node.leases) >= MOST_ON_NODE:
            return None
        ticket = self.ticket_of(row, now)
        runner, loaded_s, measures = node.runner_for(row["model"]), numbers.get("loaded_s"), bool(row.get("measures"))
        lease = self.leases[number] = lease_elsewhere(runner, ticket, now, loaded_s, measures)
        for name in ("sent_s", "predicted_end_s", "prompt_tokens", "new_tokens", "output_tokens"):
            setattr(lease, name, numbers[name])
        return lease

    def node_at(self, server: tuple[str, str], name: str | None) -> Node | None:
        """Return the node of a server, or of a name; None if there is none.

        What is called localhost on the machine of a peer is another server, unless both lines have the same name=.
        """
        def is_near(node: Node) -> bool:
            host = node.settings.address or node.settings.host
            return self.peer is None or self.peer.is_near or not is_loopback(host)

        node = next((node for node in self.cluster.nodes.values()
                     if server_of(node.settings) == server and is_near(node)), None)
        named = self.cluster.nodes.get(name or "")
        is_given = named is not None and named.name != f"{bracketed(named.settings.host)}:{named.settings.port}"
        return node or (named if named is not None and (is_given or is_near(named)) else None)

    def numbers_in(self, row: Json) -> Json:
        """Return the numbers of a row, its times by the clock here."""
        return {name: number + self.ahead_s if name in ROW_TIMES else number
                for name, number in within(row, ROW_NUMBERS).items()}

    def ticket_of(self, row: Json, now: float) -> Ticket:
        """Return the ticket of a request of the other one. Raises ValueError."""
        if not isinstance(row["model"], str) or len(row["model"]) > MAX_NAME_CHARS:
            raise ValueError(f"this is the name of no model: {row['model']!r:.99}")
        spec = RequestSpec(Family.OLLAMA, row["model"], stream=bool(row["stream"]), embeds=bool(row["embeds"]))
        ticket = self.dispatcher.waiting.unqueued(str(row["id"])[:SHOWN_CHARS], spec, now)
        ticket.peer = self.peer
        return ticket

    def end(self, now: float) -> None:
        """Note that the other process has ended, and all that it ran."""
        self.first_key_s = None
        for lease in self.leases.values():
            lease.end(now)
        self.leases.clear()


class Neighbour(asyncio.Protocol):
    """The other end of a socket pair: the process before this one, or the one after it."""

    def __init__(self, upgrade: Upgrade, slots: SharedSlots) -> None:
        self.upgrade, self.slots = upgrade, slots
        self.buffer = bytearray()
        self.transport: asyncio.Transport
        self.agreed: asyncio.Future[Json] = upgrade.loop.create_future()    # its `ready` or `go`; {} if it has gone

    async def connect(self, channel: socket.socket) -> None:
        """Talk over one end of a socket pair from now on."""
        channel.setblocking(False)
        await self.upgrade.loop.create_unix_connection(lambda: self, sock=channel)

    def connection_made(self, transport: asyncio.Transport) -> None:    # type: ignore[override]  # of a socket
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) > MOST_PENDING_BYTES:
            self.transport.abort()
            return
        if b"\n" not in data:
            return
        *lines, rest = self.buffer.split(b"\n")
        self.buffer = rest
        try:
            for line in lines:
                self.upgrade.hear(self, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            LOG.exception({"event": "upgrade"})
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.agree({})
        self.upgrade.lost(self)

    def agree(self, answer: Json) -> None:
        if not self.agreed.done():
            self.agreed.set_result(answer)

    def tell(self, message: Json) -> None:
        self.transport.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        if self.transport.get_write_buffer_size() > MOST_PENDING_BYTES:
            self.transport.abort()


class Turn:
    """Which way is the right to give slots, and who wants it? `None` is this process."""

    def __init__(self) -> None:
        self.at: Neighbour | None = None
        self.asked_s: float | None = None       # when that neighbour was asked for it
        self.wanted: list[Neighbour | None] = []        # by whom, the first one first

    def is_here(self, now: float) -> bool:
        """Tell whether this process has it; it is taken from one that hangs."""
        if self.asked_s is not None and now - self.asked_s > TURN_S:
            self.come()
        return self.at is None

    def want(self, who: Neighbour | None, now: float) -> Neighbour | None:
        """Note who wants it, while it is elsewhere; return whom to ask for it, None if that was done before."""
        if who not in self.wanted:
            self.wanted.append(who)
        if self.asked_s is not None:
            return None
        self.asked_s = now
        return self.at

    def come(self) -> None:
        """Note that it has come here."""
        self.at = self.asked_s = None

    def next(self) -> Neighbour | None:
        """Return the neighbour that wants it next, once this process has used it; None if none does."""
        self.wanted = [who for who in self.wanted if who is not None]
        return self.wanted.pop(0) if self.wanted else None

    def leave(self, neighbour: Neighbour, now: float) -> bool:
        """Note that it goes to a neighbour; tell whether that is asked to give it back."""
        self.at, self.asked_s = neighbour, now if self.wanted else None
        return bool(self.wanted)

    def forget(self, neighbour: Neighbour) -> None:
        """Note that a process has ended, perhaps with the turn."""
        self.wanted = [who for who in self.wanted if who is not neighbour]
        if self.at is neighbour:
            self.come()


class Upgrade:
    """The processes before and after this one: start, ready, go, and the slots that each uses meanwhile."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.loop, self.dispatcher = gateway, gateway.loop, gateway.dispatcher
        self.inherited: Inherited = gateway.options.inherited
        self.folder = start_folder()
        self.predecessor: Neighbour | None = None       # that still works
        self.successor: Neighbour | None = None         # the same
        self.turn = Turn()
        self.yields = True          # the turn, to one with an earlier ticket; not while it was just given here
        self.task: asyncio.Task[None] | None = None     # an upgrade that is under way
        self.lifeline = self.inherited.lifeline
        self.life = -1              # the other end of that pipe, in the first process only: it ends with this process
        self.uses: list[Json] = []  # since the usage file was saved for a new process
        self.heir = 0               # the process that has taken over
        self.outlives = False       # this process waits for the end of that

    @property
    def neighbours(self) -> list[Neighbour]:
        return [neighbour for neighbour in (self.predecessor, self.successor) if neighbour is not None]

    # The old process.

    def begin(self) -> None:
        """Start the program that is on disk, to take over; one that was taken over from does nothing.

        A handler of SIGUSR2, which comes to all processes of the gateway.
        """
        if self.gateway.retired:
            return
        is_new = self.predecessor is not None and not self.predecessor.agreed.done()
        refusal = ("the simulated nodes of --demo are in this process" if self.gateway.options.demo
                   else "another upgrade is under way" if is_new or self.task is not None
                   else "this process ends" if self.gateway.leaving else "")
        if refusal:
            LOG.warning({"event": "upgrade", "refused": refusal})
        else:
            self.task = self.loop.create_task(self.run())

    def withdraw(self) -> None:
        """End an upgrade that is under way: this process is to end, and not to go on as another one."""
        if self.task is not None and not self.heir:
            self.task.cancel()

    async def run(self) -> None:
        """Hand over to a new process once it is ready; log why not, if it does not come up."""
        tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={int(self.loop.time() * 1e6)}")
        why = "this process ends"       # if it is cancelled
        try:
            why = await self.try_program()
        except TimeoutError:
            why = f"it was not ready within {UPGRADE_S:g} s"
        except OSError as error:
            why = str(error)
        finally:
            self.task = None
            if not self.heir:
                tell_systemd("READY=1")
                LOG.error({"event": "upgrade", "refused": why})

    async def try_program(self) -> str:
        """Start the program and hand over to it; return why not, or "". Raises TimeoutError, OSError."""
        neighbour = Neighbour(self, SharedSlots(self.dispatcher))
        output = unnamed_file()
        process: subprocess.Popen[bytes] | None = None
        try:
            await self.gateway.files.save_usage()
            ours, theirs = socket.socketpair()
            await neighbour.connect(ours)
            with theirs:
                process = self.start_program(theirs, output)
            async with asyncio.timeout(UPGRADE_S):
                self.greet(neighbour, ours)
                if await neighbour.agreed:
                    self.hand_over(neighbour, process.pid)
                    return ""
            process.kill()          # it has ended, or closed its end of the socket pair
            status = await self.loop.run_in_executor(None, process.wait)
            return last_words(output) or f"it ended with status {status}"
        finally:
            os.close(output)
            if process is not None and not self.heir:
                neighbour.transport.abort()
                process.kill()
                self.loop.run_in_executor(None, process.wait)

    def start_program(self, channel: socket.socket, output: int) -> subprocess.Popen[bytes]:
        """Start the program as this one was started, with its standard error in a file for now. Raises OSError.

        systemd is told that another process is the gateway; nobody else can know. So without it the first process stays
        until the others have ended, as process 1 of a container does: a container ends with that. Those that come after
        it have a process group of their own, by which signals are passed on to all of them.
        """
        is_first = self.inherited.lifeline is None and (os.getpid() == 1 or not os.environ.get("NOTIFY_SOCKET"))
        self.outlives = is_first
        signal.pthread_sigmask(signal.SIG_BLOCK, LATER)
        try:
            return subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]], cwd=self.folder, stderr=output, pass_fds=(channel.fileno(),),
                env={**os.environ, PREDECESSOR: str(channel.fileno())}, process_group=0 if is_first else None)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, LATER)

    def greet(self, neighbour: Neighbour, channel: socket.socket) -> None:
        """Hand a new process what it needs to get ready. Raises OSError."""
        if self.outlives and self.lifeline is None and become_reaper():
            self.lifeline, self.life = os.pipe()
        lifeline = [] if self.lifeline is None else [self.lifeline]
        socket.send_fds(channel, [b" "], [2, *self.gateway.listener.descriptors(), *lifeline])
        neighbour.tell({"hello": {"state": {**STATE_FORMAT, **self.dispatcher.cluster.learned(),
                                       "history": self.gateway.telemetry.keep_history()},
                             "scanned": [(*server, missed) for server, missed in
                                         self.gateway.sources.scanned.items()],
                             "is_waited_for": bool(lifeline)}})

    def hand_over(self, neighbour: Neighbour, pid: int) -> None:
        """Let a process that is ready take over, and finish what is here."""
        cluster, waiting = self.dispatcher.cluster, self.dispatcher.waiting
        LOG.info({"event": "upgrade", "pid": pid, "running": cluster.in_flight(), "queued": len(waiting)})
        self.heir, self.successor = pid, neighbour
        tell_systemd("READY=1" if self.outlives else f"MAINPID={pid}\nREADY=1")
        os.environ.pop("NOTIFY_SOCKET", None)       # from here on the other process speaks for the service
        self.gateway.telemetry.tally()
        orders = [(*server, draining) for server, draining in cluster.orders.items()]
        self.tell(neighbour, go={"orders": orders}, used=self.uses)
        self.gateway.retire()
        if self.outlives:
            for number in PASSED_ON:
                self.loop.add_signal_handler(number, self.pass_on, number)

    def pass_on(self, number: int) -> None:
        """Pass a signal on to the processes after this one. One that ends them ends this one, too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.heir, number)
        if number in (signal.SIGTERM, signal.SIGINT):
            self.gateway.drain()

    # The new process.

    async def take_over(self) -> None:
        """Tell the process before that this one is ready, and wait until that hands over; without one, do nothing.

        If that has gone meanwhile, its port is here.
        """
        if self.inherited.channel is None or self.gateway.leaving:
            return
        neighbour = Neighbour(self, SharedSlots(self.dispatcher))
        await neighbour.connect(self.inherited.channel)
        self.predecessor = self.turn.at = neighbour
        neighbour.tell({"ready": __version__})
        await neighbour.agreed
        take_stderr(self.inherited.stderr, self.gateway.options.log_format, self.gateway.options.log_level)
        if self.lifeline is not None:
            self.loop.add_reader(self.lifeline, self.first_has_gone)

    def first_has_gone(self) -> None:
        """End as after SIGTERM: whoever killed the first process meant all, and may start another one on this port."""
        assert self.lifeline is not None
        self.loop.remove_reader(self.lifeline)
        LOG.warning({"event": "drain", "why": "the first process was killed"})
        self.gateway.drain()

    # Both.

    def hear(self, neighbour: Neighbour, message: Json) -> None:
        """Take in a message."""
        now = self.loop.time()
        if "go" in message:
            orders = {(url, host): draining for url, host, draining in message["go"]["orders"]}
            for node in self.dispatcher.cluster.nodes.values():
                draining = orders.get(server_of(node.settings), node.draining)
                if draining is not node.draining:
                    self.dispatcher.drain(node, draining)
        for row in message.get("used", ()):
            self.gateway.telemetry.note_use(row["day"], *read_row(row["row"]))
        if "go" in message or "ready" in message:
            neighbour.agree(message)
        changed = neighbour.slots.take(message, now)
        if "turn" in message:
            self.take_turn(neighbour, message["want"])
        elif changed:
            pump(self.gateway)
        if "want" in message and "turn" not in message:
            self.give_or_want(neighbour, now)

    def lost(self, neighbour: Neighbour) -> None:
        """Note that a process has ended."""
        if neighbour in self.neighbours:
            self.predecessor = None if self.predecessor is neighbour else self.predecessor
            self.successor = None if self.successor is neighbour else self.successor
            neighbour.slots.end(self.loop.time())
            self.turn.forget(neighbour)
            self.use_turn()

    async def close(self) -> None:
        """End the talk with other processes: nothing runs here any more. They get what was told last."""
        if self.task is not None:
            self.task.cancel()
        for neighbour in self.neighbours:
            neighbour.transport.close()
        deadline_s = self.loop.time() + CLOSE_S
        while self.neighbours and self.loop.time() < deadline_s:
            await asyncio.sleep(0.005)

    def note_use(self, day: str, name: RowName, use: Use) -> None:
        """Tell the process that keeps the usage file what a request has used, or remember it for one that starts."""
        if self.successor is None and self.task is None:
            return
        (key, user), model, node = name
        row = {"day": day, "row": [key, user, model, node, *use.values()]}
        if self.successor is not None:
            self.successor.tell({"used": [row]})
        else:
            self.uses.append(row)

    def first_key_s(self, neighbour: Neighbour) -> float | None:
        """Return the key of the ticket that is next, in this process or behind it as seen from a neighbour."""
        keys_s = [self.dispatcher.waiting.first_key_s(), *(other.slots.first_key_s for other in self.neighbours
                                                           if other is not neighbour)]
        return min((key_s for key_s in keys_s if key_s is not None), default=None)

    def tell(self, neighbour: Neighbour, progress: bool = False, **more: Json | list[Json] | bool) -> None:
        """Tell a neighbour what it does not know of what runs and waits here, and `more`."""
        message = {**neighbour.slots.news(self.first_key_s(neighbour), progress), **more}
        if message:
            neighbour.tell(message)

    def spread(self, progress: bool = False) -> None:
        """Tell the other processes what has begun and ended here."""
        for neighbour in self.neighbours:
            self.tell(neighbour, progress)

    def may_give_slots(self, now: float) -> bool:
        """Tell whether this process may give slots to its tickets; if not, it asks for the turn.

        Whoever has the turn lets one with an earlier ticket go first.
        """
        if not (self.neighbours and self.dispatcher.waiting.tickets):
            return True
        if not self.turn.is_here(now):
            self.give_or_want(None, now)
            return False
        first_s = self.dispatcher.waiting.first_key_s()
        earlier = [neighbour for neighbour in self.neighbours if self.yields and first_s is not None
                   and neighbour.slots.first_key_s is not None and neighbour.slots.first_key_s < first_s]
        if earlier:
            self.turn.wanted = [None]
            self.give_turn(earlier[0], now)
        return not earlier

    def give_or_want(self, who: Neighbour | None, now: float) -> None:
        """Give the turn to a neighbour that wants it, or ask for it: for a neighbour, or for this process (None)."""
        if who is not None and self.turn.is_here(now):
            self.give_turn(who, now)
        elif who is None or who is not self.turn.at:    # else it is on its way there
            asked = self.turn.want(who, now)
            if asked is not None:
                self.tell(asked, want=True)

    def give_turn(self, neighbour: Neighbour, now: float) -> None:
        """Give the turn to a neighbour, with all that it must know."""
        self.tell(neighbour, turn=True, want=self.turn.leave(neighbour, now))

    def take_turn(self, neighbour: Neighbour, is_wanted: bool) -> None:
        """Note that a neighbour gave the turn, and whether that wants it back."""
        self.turn.come()
        if is_wanted:
            self.turn.wanted.append(neighbour)
        self.use_turn()

    def use_turn(self) -> None:
        """Give slots, if the turn is here. Then it goes to the next one that wants it."""
        self.yields = False
        pump(self.gateway)
        self.yields = True
        if self.turn.at is None and (next_one := self.turn.next()) is not None:
            self.give_turn(next_one, self.loop.time())


# -----------------------------------------------------------------------------
# Peers: what do other gateways before the same nodes do?
#
# Each follows those that --peer names: GET /api/peers answers with a line of JSON whenever something changes, and every
# SWEEP_S. A line is an object with some of these fields:
#
#   format, version, gateway    in the first line: how it tells, and who
#   now_s       its clock; every other time is of that
#   running     requests that have begun on nodes, or how far they are: (number, row)
#   waiting     the first tickets of each model: (number, row)
#   ended       numbers of both
#   known       slots and speeds, as in the state file; `learned`: what has changed since
#
# What runs at a peer is a lease here, as in "Upgrade". What waits there keeps its place in the queue here: a slot that
# it would get is left to it for LEFT_S. There is no lock: of two that take one slot in the same instant one waits in
# the node. A peer that has not spoken for PEER_SILENT_S, or talks nonsense, counts no longer: its requests are those
# of somebody who uses the nodes directly, until it speaks again.
# -----------------------------------------------------------------------------

PEER_SILENT_S = 4 * SWEEP_S
PEER_PAUSE_S, PEER_RETRY_S, PEER_SELF_S = 0.1, 1.0, 30.0    # before it is asked again: it spoke, it did not, it is us
PEER_LEASE_S = 300.0                # a request of which a peer has told nothing for so long counts no longer
MOST_PEERS = 16                     # that are told
MOST_TOLD = 10_000                  # requests of one peer
LESSONS_TOLD = 16                   # nodes in a line: that is far below MAX_LINE_BYTES
PEER_FORMAT: Json = {"format": "sollol-peers", "version": 1}
PEER_SETTINGS: SettingParsers = {name: NODE_SETTINGS[name]
                                 for name in ("name", "token", "host", "prefix", "ca", "insecure", "resolve")}


class Follower:
    """A peer that is told what runs and waits here."""

    def __init__(self, gateway: Gateway, client: ClientConnection) -> None:
        self.loop, self.dispatcher, self.client = gateway.loop, gateway.dispatcher, client
        self.slots = SharedSlots(gateway.dispatcher)
        self.heads: dict[tuple[float, int], int] = {}   # {place of a ticket: its number} of those that it knows
        self.learned: dict[Runner, Json] = {}   # what it knows of their slots
        self.first: Json = {**PEER_FORMAT, "gateway": gateway.peers.id}

    @property
    def knows_nothing(self) -> bool:
        """Tell whether nothing runs or waits here, as far as it was told."""
        return not self.slots.told and not self.heads

    def tell(self, progress: bool = False) -> None:
        """Tell what it does not know; with `progress` also how far streams are and what was learned, and that we live.

        One that reads too slowly gets it later.
        """
        if self.client.write_paused:
            return
        news = {**self.first, **self.slots.news(None, progress)}
        self.add_heads(news)
        if news or progress:
            self.write(news)
        lessons, kind = self.lessons() if progress else [], "known" if self.first else "learned"
        for at in range(0, len(lessons), LESSONS_TOLD):
            self.write({kind: lessons[at:at + LESSONS_TOLD]})
        self.first = {}

    def write(self, news: Json) -> None:
        """Write a line."""
        self.client.write(json.dumps({**news, "now_s": self.loop.time()}, separators=(",", ":")).encode() + b"\n")

    def add_heads(self, news: Json) -> None:
        """Add to news which tickets are next, and which are not any more."""
        heads = {place_of(ticket): ticket for ticket in self.dispatcher.waiting.heads(LOOK_AHEAD)}
        ended = [self.heads.pop(place) for place in list(self.heads) if place not in heads]
        rows = []
        for place, ticket in heads.items():
            if place not in self.heads:
                number = self.heads[place] = next(self.slots.numbers)
                rows.append((number, row_of_ticket(ticket, self.dispatcher.cluster.estimates)))
        if ended:
            news["ended"] = [*news.get("ended", ()), *ended]
        if rows:
            news["waiting"] = rows

    def lessons(self) -> list[Json]:
        """Return what it does not know of slots and, while little was known, of speeds: entries as in a state file."""
        entries = []
        for node in self.dispatcher.cluster.nodes.values():
            models = {}
            for model, runner in node.runners.items():
                lesson = lesson_of(runner)
                if lesson != self.learned.get(runner, {}):
                    self.learned[runner] = lesson
                    models[model] = learned_of_runner(runner, digest_of(node, model))
            if models:
                entries.append({"name": node.name, "url": node.settings.url, "host": node.settings.host_header,
                                "models": models})
        return entries


def lesson_of(runner: Runner) -> Json:
    """Return what a peer is told again when it changes; {} if nothing was learned."""
    samples = min(runner.speeds.samples, KEPT_SAMPLES)
    slots = attributes(runner.slots, KEPT_OF_SLOTS) if runner.slots.origin == "learned" else {}
    return {**slots, "samples": samples} if slots or samples else {}


def row_of_ticket(ticket: Ticket, estimates: Estimates) -> Json:
    """Return what a peer must know of a ticket that waits."""
    spec, demand = ticket.spec, estimates.demand_of(ticket)
    return {"id": ticket.id, "model": spec.model, "stream": spec.stream, "embeds": spec.embeds, "key_s": ticket.key_s,
            "since_s": ticket.since_s, "prompt_tokens": demand.prompt_tokens, "output_tokens": demand.output_tokens,
            "inputs": demand.inputs}


class PeerGateway:
    """Another gateway before the same nodes, and what it told last."""

    def __init__(self, gateway: Gateway, settings: NodeSettings) -> None:
        self.gateway, self.loop, self.settings, self.name = gateway, gateway.loop, settings, settings.name
        self.is_near = is_loopback(settings.address or settings.host)       # it is on this machine
        self.slots = SharedSlots(gateway.dispatcher, self)
        self.waiting: dict[int, Ticket] = {}    # what waits there, by its numbers
        self.state, self.why, self.since_s = "down", "not asked yet", self.loop.time()
        self.id = ""                # of the gateway; "" = it has not spoken, this time
        self.silence = asyncio.timeout(None)

    # Its answer.

    async def follow(self) -> None:
        """Take in what it tells, for ever; ask again when that ends."""
        while True:
            self.id, pause_s = "", PEER_RETRY_S
            try:
                await self.listen()
                if self.id:         # it has ended or, after an upgrade, another process answers: see `introduce`
                    pause_s = PEER_PAUSE_S
                else:
                    self.end("ends its answer without a word")
            except TimeoutError:
                self.end(f"silent for {PEER_SILENT_S:g} s")
            except NodeFailure as failure:
                is_itself = failure.value.kind == "itself"
                pause_s = PEER_SELF_S if is_itself else pause_s
                self.end(failure.value.text, "itself" if is_itself else "down")
            except Refusal as refusal:
                self.end(refusal.text)
            pump(self.gateway)
            await asyncio.sleep(pause_s)

    async def listen(self) -> None:
        """Take in one answer. Raises TimeoutError, NodeFailure, Refusal."""
        pool, connection = Pool(self.settings, self.gateway.turns, b""), None
        head = RequestHead("GET", b"/api/peers", "/api/peers", 1, {}, [], 0, True, False)
        try:
            async with asyncio.timeout(PEER_SILENT_S) as self.silence:
                connection, answer = await pool.request(render_request(head, self.settings, 0), "GET")
                if answer.status != 200:
                    text = await Collector(connection, answer).collect()
                    raise NodeFailure("garbage", f"{answer.status}: {error_text(object_in(text))[:SHOWN_CHARS]}")
                await Lines(connection, answer, self.hear).collect()
        finally:
            pool.close()            # before: a refusal may leave the connection clean, and none is to be kept
            if connection is not None:
                pool.give_back(connection)

    def hear(self, line: bytes) -> None:
        """Take in a line. Raises NodeFailure if that is none of a peer, or it is this gateway itself."""
        now, is_first = self.loop.time(), not self.id
        try:
            news = json.loads(line)
            if is_first:
                self.introduce(object_of(PEER_FORMAT, line))
            changed = self.take(news, now) or is_first
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise NodeFailure("garbage", f"says what no peer says: {error!r:.200}") from None
        if not self.silence.expired():
            self.silence.reschedule(now + PEER_SILENT_S)
        if changed:
            pump(self.gateway)

    def introduce(self, news: Json) -> None:
        """Take in who it is; what was told before counts no longer. Raises NodeFailure."""
        self.id = str(news["gateway"])
        same = [peer for peer in self.gateway.peers.others.values() if peer.id == self.id and peer is not self]
        if self.id == self.gateway.peers.id or same:
            raise NodeFailure("itself", f"the same as {same[0].name}" if same else "this gateway")
        self.end("", "up")

    def take(self, news: Json, now: float) -> bool:
        """Take over news; tell whether that may let something run."""
        ahead = within(news, {"now_s": ROW_TIMES["sent_s"]})
        self.slots.ahead_s = now - ahead["now_s"]
        changed = self.slots.take(news, now)
        for number in news.get("ended", ()):
            if number in self.waiting:
                self.forget(self.waiting.pop(number))
        for number, row in news.get("waiting", ()):
            self.note(number, row, now)
        for entry in (*news.get("known", ()), *news.get("learned", ())):
            self.learn(entry, "learned" in news, now)
        if len(self.waiting) + len(self.slots.leases) > MOST_TOLD:
            raise ValueError(f"more than {MOST_TOLD} requests")
        return changed or "waiting" in news

    def note(self, number: int, row: Json, now: float) -> None:
        """Note a ticket that waits there, if the model is known here."""
        dispatcher, numbers = self.gateway.dispatcher, self.slots.numbers_in(row)
        if row["model"] not in dispatcher.cluster.holders or number in self.waiting:
            return
        ticket = self.waiting[number] = self.slots.ticket_of(row, now)
        ticket.key_s, ticket.since_s = numbers["key_s"], numbers["since_s"]
        ticket.demand = Demand(ticket.spec, numbers["prompt_tokens"], numbers["output_tokens"], 0, numbers["inputs"])
        dispatcher.waiting.note(ticket)
        dispatcher.policy.arrived(ticket)

    def forget(self, ticket: Ticket) -> None:
        """Let a ticket give up its place here: it waits there no longer."""
        self.gateway.dispatcher.waiting.discard(ticket)
        self.gateway.dispatcher.cluster.changes.models.add(ticket.spec.model)

    def learn(self, entry: Json, is_news: bool, now: float) -> None:
        """Take over what was learned of a node: its slots, and speeds of which little is known here.

        Of two counts of slots that were learned before the peers met, the larger one counts: it was proved.
        """
        lessons, node = read_node(entry), self.slots.node_at((entry["url"], entry["host"]), entry["name"])
        for model, kept in lessons["models"].items() if lessons and node else ():
            runner = node.runners.get(model) if node else None
            if runner is None or node is None or kept["digest"] != digest_of(node, model):
                continue
            if runner.speeds.samples < KEPT_SAMPLES <= kept.get("samples", 0):
                runner.speeds.recall(kept)
            if is_news or kept.get("count", 0) > runner.slots.count:
                runner.slots.take_over(kept, now)
                runner.note_slots(True)
            for follower in self.gateway.peers.followers:
                follower.learned[runner] = lesson_of(runner)        # each tells of its own answers only

    def end(self, why: str, state: str = "down") -> None:
        """Let nothing count any longer that it told; note its state, and why."""
        self.slots.end(self.loop.time())
        for ticket in self.waiting.values():
            self.forget(ticket)
        self.waiting.clear()
        if (state, why) != (self.state, self.why):
            level = logging.WARNING if state == "down" else logging.INFO
            LOG.log(level, {"event": "peer", "peer": self.name, "state": state, "why": why})
            self.state, self.why, self.since_s = state, why, self.loop.time()

    def sweep(self, now: float) -> None:
        """Let requests count no longer of which it has told nothing for long."""
        for number, lease in list(self.slots.leases.items()):
            if now - lease.heard_s > PEER_LEASE_S:
                self.slots.leases.pop(number).end(now)


class Peers:
    """The other gateways, those that are followed and those that follow this one."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.loop = gateway, gateway.loop
        self.id = secrets.token_hex(8)
        self.others: dict[str, PeerGateway] = {}        # by URL
        self.followers: list[Follower] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}  # that follow them, by URL
        self.started = False
        self.tells = False          # at the end of this turn of the event loop, once for all that changes in it
        self.timer: asyncio.TimerHandle | None = None

    def configure(self, lines: list[NodeSettings]) -> None:
        """Take over the settings of the other gateways."""
        known, self.others = self.others, {}
        for line in lines:
            peer = known.get(line.url)
            self.others[line.url] = peer if peer and peer.settings == line else PeerGateway(self.gateway, line)
        for url, peer in known.items():
            if self.others.get(url) is not peer:
                if url in self.tasks:
                    self.tasks.pop(url).cancel()
                peer.end("not followed any more")
        if self.started:
            self.start()

    def start(self) -> None:
        """Follow them."""
        self.started = True
        for url in [url for url in self.others if url not in self.tasks]:
            supervise(self.tasks, url, lambda url: self.others[url].follow(), PEER_RETRY_S)

    def spread(self, progress: bool = False) -> None:
        """Tell those that follow what has changed. Look again at what was left to them and they do not take."""
        if progress:
            self.tell(progress)
            for peer in self.others.values():
                peer.sweep(self.loop.time())
        elif self.followers and not self.tells:
            self.tells = True
            self.loop.call_soon(self.tell)
        if self.gateway.dispatcher.policy.leaves and self.timer is None:
            self.timer = self.loop.call_later(LEFT_S, self.look_again)

    def tell(self, progress: bool = False) -> None:
        """Tell those that follow what they do not know."""
        self.tells = False
        for follower in self.followers:
            follower.tell(progress)

    def look_again(self) -> None:
        """Give slots that were left to others and not taken."""
        self.timer = None
        pump(self.gateway)


# -----------------------------------------------------------------------------
# Server life: start, reload, drain, stop
# -----------------------------------------------------------------------------

START_S = 0.5                       # that nodes have to answer before the gateway listens
ECHO_S = 1.0                        # signals within this count once: timeout(1) sends two, to its child and its group
COSTLY_S = 0.005                    # an own answer that takes longer to make is kept for FRESH_S
MOST_ANSWERS = 64                   # of them; more may differ by the models that keys see


class Gateway:
    """Start, reload, drain and stop the services that own sockets, tasks and files. The Dispatcher decides."""

    def __init__(self, options: argparse.Namespace, lines: list[NodeSettings], keys: Iterable[KeySettings] = (),
                 tls: ssl.SSLContext | None = None, *, look_up: Callable[[str], Awaitable[list[str]]] = look_up,
                 scan_port: int = 11434) -> None:
        self.options = options
        self.loop = asyncio.get_running_loop()
        self.rng = random.Random(options.seed)
        self.via = via_of(secrets.token_hex(4))
        self.started_s = self.loop.time()
        self.leaving, self.left_s = False, -math.inf    # it was told to end, and when
        self.draining = False       # and takes no new requests
        self.retired = False        # another process has taken its place; it takes those of clients that it has
        self.stopped = asyncio.Event()
        self.timer: asyncio.TimerHandle | None = None
        self.dispatcher = Dispatcher(options.policy, max_queue=options.max_queue,
                                     queue_timeout_s=options.queue_timeout, early_refusal=options.early_refusal,
                                     rng=self.rng)
        self.access = Access(options, keys)
        self.max_body_bytes, self.header_timeout_s = options.max_body, options.header_timeout
        self.turns = LoopTurns(self.loop)       # of work that takes long
        self.memory = BodyMemory(options.max_memory, self.turns)
        self.answers: dict[tuple[str, ModelSet], tuple[float, OwnAnswer]] = {}     # (until when it is good, answer)
        self.telemetry = Telemetry(self)
        self.node_io = NodeIO(self)
        self.sources = Sources(self, look_up, scan_port)
        self.listener = Listener(self, tls)
        self.upgrade = Upgrade(self)
        self.peers = Peers(self)
        self.files = Files(self)
        self.configure(lines)

    async def work_on(self, body: Body, steps: Steps[Parsed]) -> Parsed:
        """Do work on a body: at once if that is short, else in turn with others; return its result."""
        return at_once(steps) if len(body) <= SHORT_BODY_BYTES else await self.turns.run(steps)

    async def start(self) -> Gateway:
        """Look at every node, then listen. Nodes that do not answer at once delay that by START_S at most, and longer
        while another process still serves the clients."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S if self.upgrade.inherited.channel is None else UPGRADE_S / 6):
                await self.first_looks()
        await self.upgrade.take_over()
        if not self.leaving:        # else a signal came first
            await self.listener.start()
            self.peers.start()
            self.timer = self.loop.call_later(SWEEP_S, self.sweep)
            if self.options.discover:
                supervise(self.sources.tasks, SCAN, self.sources.scan_forever, self.options.probe_interval)
        return self

    @property
    def is_ending(self) -> bool:
        """Tell whether a connection ends with the answer to its request."""
        return self.leaving or self.retired

    async def first_looks(self) -> None:
        """Wait until every name has been looked up, and every node probed, at least once."""
        while self.sources.new_names() or self.node_io.probes.keys() - self.node_io.reasons.keys():
            await asyncio.sleep(0.005)

    def configure(self, lines: list[NodeSettings]) -> tuple[list[Node], list[Node], list[Node]]:
        """Take over the NodeSettings of hosts.txt and of flags. Returns (added, dropped, changed) nodes."""
        self.sources.configure(lines)
        for pool in self.node_io.pools.values():
            if pool.settings.ca:
                pool.tls = None     # the file may have been renewed
        return self.join()

    def join(self) -> tuple[list[Node], list[Node], list[Node]]:
        """Take over what the sources know. Returns (added, dropped, changed) nodes."""
        sources = self.sources
        settings = merge_sources(sources.lines, sources.dns, sources.scanned)
        added, dropped = self.dispatcher.cluster.configure(settings, next(self.dispatcher.waiting.seq))
        self.peers.configure([one for line in self.options.peer
                              for one in (expand(line, sources.dns) if line.resolve else [line])])
        return added, dropped, self.node_io.configure(added, dropped)

    def own_answer(self, path: str, models: ModelSet) -> OwnAnswer:
        """Return the gateway's own answer on a path, to somebody who may see these models.

        A costly one serves all who ask within FRESH_S.
        """
        until_s, answer = self.answers.get((path, models), (-math.inf, None))
        if answer is None or self.loop.time() >= until_s:
            began_s, route = time.thread_time(), ROUTES["GET", path]
            if route.shows is not None:
                answer = route.shows(self, models)
            else:
                assert route.own is not None    # as all routes of serve_own have it
                answer = route.own(self)
            costly = time.thread_time() - began_s > COSTLY_S
            if len(self.answers) >= MOST_ANSWERS:
                self.answers.clear()
            self.answers[path, models] = self.loop.time() + FRESH_S if costly else -math.inf, answer
        return answer

    def sweep(self) -> None:
        """Serve every time-out: slow clients, late tickets, silent nodes, idle connections, saved files."""
        self.timer = self.loop.call_later(SWEEP_S, self.sweep)
        now = self.loop.time()
        self.listener.sweep(now)
        wake(self.dispatcher.expire(now))
        lost, races = self.dispatcher.watch(now)
        for lease in lost:
            if lease.abandon is not None:
                lease.abandon(Failure("lost", f"has answered nothing for {DEAD_S:g} s"))
        for lease in races:
            if lease.ticket.race is not None:
                lease.ticket.race(lease)
        self.node_io.sweep(now)
        self.telemetry.sweep(now)
        self.files.sweep(now)
        self.upgrade.spread(progress=True)
        self.peers.spread(progress=True)
        tell_systemd("WATCHDOG=1")
        pump(self)

    def drain(self) -> None:
        """Stop listening and finish what is running and queued; a second call stops at once, unless it is an echo.

        With --drain-delay, whoever asks for its health is told first, and everybody is still served.
        """
        now = self.loop.time()
        if self.leaving:
            if now - self.left_s > ECHO_S:
                self.stopped.set()
            return
        self.leaving, self.left_s = True, now
        tell_systemd("STOPPING=1")
        LOG.info({"event": "drain", "running": self.dispatcher.cluster.in_flight(),
                  "queued": len(self.dispatcher.waiting)})
        self.upgrade.withdraw()
        if self.options.drain_delay and self.listener.servers and not self.retired:
            self.loop.call_later(self.options.drain_delay, self.drain_now)
        else:
            self.drain_now()

    def drain_now(self) -> None:
        """Take no new requests, and stop once those under way have ended."""
        self.draining = True
        self.listener.drain()
        self.loop.create_task(self.wait_until_idle())

    def retire(self) -> None:
        """Leave the port and the files to another process, and stop once the clients that are here have gone."""
        self.retired = True
        self.files.hand_over()
        self.listener.close()
        self.loop.create_task(self.wait_until_idle())

    async def wait_until_idle(self) -> None:
        """Set `stopped` when no client is being served any more, or the drain time is over.

        The process before this one must have ended, too: only this one tells the next one what still runs there.
        """
        deadline_s = self.loop.time() + self.options.drain_timeout
        while (self.listener.clients or self.upgrade.predecessor) and self.loop.time() < deadline_s:
            await asyncio.sleep(0.05)
        self.stopped.set()

    async def stop(self) -> None:
        """Close everything at once."""
        self.leaving = self.draining = True
        if self.timer:
            self.timer.cancel()
        tasks = [*self.sources.tasks.values(), *self.node_io.probes.values(), *self.node_io.jobs.values(),
                 *self.peers.tasks.values(), *self.listener.abort()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pool in self.node_io.pools.values():
            pool.prune(math.inf)
        self.telemetry.tally()
        await self.upgrade.close()
        await self.files.close()


# -----------------------------------------------------------------------------
# Command line
# -----------------------------------------------------------------------------

def parse_size(text: str) -> int:
    """Return a number of bytes: `64MiB`, `1GiB`, `4096`."""
    match = re.fullmatch(r"(\d+)\s*(|[KMG]i?B?|B)", text.strip(), re.I)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64MiB")
    return int(match[1]) * {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB}[match[2][:1].upper()]


def parse_seconds(text: str) -> float:
    """Return the seconds in a time: `90`, `90s`, `500ms`, `5m`, `2h`."""
    match = re.fullmatch(r"(.*?)(|ms|[smh])", text.strip(), re.S)
    assert match is not None        # any text does
    number, unit = match.groups()
    try:
        seconds = float(number) * UNIT_S[unit or "s"]
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90, 90s, 500ms, 5m or 2h")
    return seconds


def parse_delay(text: str) -> float:
    """Return the seconds in a time, or 0."""
    return 0.0 if text.strip() in ("0", "0s") else parse_seconds(text)


def parse_count(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_window(text: str) -> tuple[str, int]:
    """Return (pattern, tokens) of a MODEL=N."""
    model, _, tokens = text.rpartition("=")
    if not model.strip() or not re.fullmatch(r"[1-9]\d{0,8}", tokens, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL=TOKENS such as qwen3:14b=32768 or 'qwen3:*=32768'")
    return parse_pattern(model), int(tokens)


def parse_alias(text: str) -> tuple[str, str]:
    """Return (pattern, model) of a PATTERN=MODEL."""
    pattern, _, model = map(str.strip, text.rpartition("="))
    if not pattern or not model or "*" in model or not model.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=MODEL such as gpt-4o=qwen3 or 'claude-*=qwen3:14b'")
    return parse_pattern(pattern), model


def parse_port(text: str) -> int:
    """Return a port number; 0 lets the system choose."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port number")
    return int(text)


def parse_bind(text: str) -> str:
    """Return the name or address to listen on. An empty one is refused: it would mean every address."""
    with contextlib.suppress(UnicodeError):
        if text.encode("idna"):
            return text
    raise argparse.ArgumentTypeError(f"{text!r} is not an address or a host name")


def parse_secret_file(text: str) -> str:
    """Return the path of a file that protects the gateway. An empty one is refused: a variable was not set."""
    if not text:
        raise argparse.ArgumentTypeError("no file is named")
    return text


def parse_peer(text: str) -> NodeSettings:
    """Return the settings of another gateway, as on a line of --hosts. Raises ArgumentTypeError."""
    try:
        return with_authority(parse_node(text or "''", PEER_SETTINGS, 8000), "")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_proxies(text: str) -> list[Network]:
    """Return the networks in a list with commas."""
    try:
        return [ipaddress.ip_network(word.strip(), strict=False) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: it takes networks such as 10.0.0.5,172.16.0.0/12") from None


def parse_origins(text: str) -> list[str]:
    """Return the origins in a list with commas; each may have one `*`."""
    origins = [word.strip() for word in text.split(",") if word.strip()]
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^*/\s]*\*?[^*/\s]*", origin):
            raise argparse.ArgumentTypeError(f"{origin!r} is not an origin such as https://chat.example or "
                                             "https://*.example")
    return origins


class OneLineParser(argparse.ArgumentParser):
    """Say a mistake on one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


class ListFlag(argparse.Action):
    """Collect the values of a flag that may be repeated; they replace those of its variable."""

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, value: Any,
                 flag: str | None = None) -> None:
        values = getattr(options, self.dest)
        setattr(options, self.dest, [value] if values is self.default else [*values, value])


FlagSettings = dict[str, Any]           # arguments of argparse's add_argument
FILE: FlagSettings = {"metavar": "FILE"}
NEEDED_FILE: FlagSettings = {"metavar": "FILE", "type": parse_secret_file}
TIME: FlagSettings = {"metavar": "TIME", "type": parse_seconds}
SIZE: FlagSettings = {"metavar": "SIZE", "type": parse_size}
COUNT: FlagSettings = {"metavar": "N", "type": parse_count}
LIST: FlagSettings = {"action": ListFlag, "default": []}
ON: FlagSettings = {"action": "store_true"}
OFF: FlagSettings = {"action": "store_false"}

# By the groups of --help. What holds without the flag stands in brackets; a help without brackets gets its default.
FLAGS: dict[str, dict[str, FlagSettings]] = {
    "nodes": {
        "--hosts": dict(FILE, help="one node per line; read again when saved, or on SIGHUP (none)"),
        "--node": dict(LIST, metavar="URL", help="a node, as on a line of --hosts; may be repeated (none)"),
        "--discover": dict(LIST, metavar="CIDR", type=parse_network, help="network to scan for Ollama servers, such as "
                           "192.168.1.0/24; may be repeated (none)"),
        "--peer": dict(LIST, metavar="URL", type=parse_peer, help="another gateway before the same nodes, for common "
                       "slots and one queue: with token=, ca=, resolve=all as on a line of --hosts; this one may be "
                       "among them; may be repeated (none)"),
        "--probe-interval": dict(TIME, default="5s", help="time between two looks at a node"),
        "--state": dict(FILE, help="what is learned of nodes is kept there over restarts, and beside it who used "
                        "what (nowhere)"),
        "--no-calibrate": dict(OFF, dest="calibrate", help="do not measure idle nodes at the start (they are, with one "
                               "short request to a model that is loaded)"),
        "--demo": dict(ON, help="run in front of three simulated nodes (needs bench.py beside it) (no)"),
        "--check": dict(ON, help="probe every node, print a table, and exit: 0 all up, 1 some down, 2 bad file (no)"),
    },
    "listening": {
        "--bind": dict(metavar="ADDRESS", type=parse_bind, default="127.0.0.1", help="address to listen on"),
        "--port": dict(metavar="N", type=parse_port, default="8000", help="port to listen on"),
        "--drain-delay": dict(metavar="TIME", type=parse_delay, default="0s", help="time after SIGTERM for which it "
                              "still accepts, while /api/health says 503"),
        "--drain-timeout": dict(TIME, default="300s", help="time that running requests have to finish on SIGTERM"),
        "--no-uvloop": dict(OFF, dest="uvloop", help="use plain asyncio even if uvloop is there (uvloop)"),
    },
    "scheduling": {
        "--policy": dict(choices=list(POLICIES), default="latency-weighted", help="where each request is predicted to "
                         "finish first, or, for comparison, as plain proxies do"),
        "--max-queue": dict(COUNT, default="1024", help="waiting requests; beyond that 503"),
        "--queue-timeout": dict(TIME, default="240s", help="time a request may wait for a slot; then 503"),
        "--early-refusal": dict(ON, help="503 at once for a request whose turn is predicted to come after "
                                "--queue-timeout (it waits)"),
        "--no-split-embed": dict(OFF, dest="split_embed", help="do not spread a long list of texts to embed over the "
                                 "nodes (it is)"),
        "--no-rescue": dict(OFF, dest="rescue", help="do not let another node go on with a stream whose node died, if "
                            "temperature 0 or a seed makes it say the same (it does)"),
        "--no-count-streams": dict(OFF, dest="count_streams", help="do not ask nodes for the tokens of a stream of /v1 "
                                   "whose client does not ask (they are, and what they tell is taken out again)"),
        "--no-stable-prefix": dict(OFF, dest="stable_prefix", help="leave Claude Code's first block as it is: another "
                                   "in each conversation, so that no prompt cache helps (it is made constant)"),
        "--num-ctx": dict(LIST, metavar="MODEL=N", type=parse_window, help="context in tokens for requests to Ollama's "
                          "own API that ask for none; * stands for anything; may be repeated (the node's default)"),
        "--alias": dict(LIST, metavar="PATTERN=MODEL", type=parse_alias, help="model that serves requests for others; "
                        "* stands for anything; a model that exists wins over a pattern with one; may be repeated "
                        "(none)"),
        "--replicas": dict(COUNT, default="1", help="nodes that pull a model which none has yet"),
        "--seed": dict(metavar="N", type=int, help="of the random numbers (random)"),
    },
    "limits": {
        "--max-body": dict(SIZE, default="64MiB", help="bytes of a body that is read for routing; blobs have no limit"),
        "--max-memory": dict(SIZE, default="512MiB", help="bytes of such bodies at once; further ones wait unread"),
        "--header-timeout": dict(TIME, default="10s", help="time a head may take to arrive"),
        "--max-connections": dict(COUNT, default="4096", help="client connections"),
    },
    "security": {
        "--keys": dict(NEEDED_FILE, help="one key per line, `KEY name=alice`; requests need one; read again like "
                       "--hosts (none: everybody may ask)"),
        "--trusted-proxies": dict(metavar="CIDR,...", type=parse_proxies, default="", help="addresses that may tell "
                                  "for whom they ask: X-OpenWebUI-User-Email, X-User-Id, user, metadata.user_id, "
                                  "X-Forwarded-For (none; a key with proxy=yes may, too)"),
        "--tls-cert": dict(NEEDED_FILE, help="certificate of this port in PEM form, the chain behind it: it speaks TLS "
                           "then; read again on SIGHUP (none: plain HTTP)"),
        "--tls-key": dict(NEEDED_FILE, help="private key of --tls-cert, in PEM form (none)"),
        "--origins": dict(metavar="LIST", type=parse_origins, default="", help="web pages that may ask, and change "
                          "models, besides those of this machine, with commas; * stands for anything; a bare * lets "
                          "every page ask, but change nothing (none)"),
    },
    "monitoring": {
        "--grafana": dict(ON, help="print a dashboard for Grafana, which shows /metrics, and exit (no)"),
        "--alerts": dict(ON, help="print alerting rules for Prometheus, and exit (no)"),
    },
    "log": {
        "--log-format": dict(choices=("kv", "json"), default="kv", help="key=value or JSON lines"),
        "--log-level": dict(choices=("debug", "info", "warning", "error"), default="info", help="least that is "
                            "told; probes and scrapes that succeed are debug"),
    },
}


HELP_START = """\
One address in front of several Ollama nodes.

  sollol.py --demo                        try it, without any Ollama
  sollol.py --hosts hosts.txt --check     which nodes are up, and what is there?
  sollol.py --hosts hosts.txt             serve"""


HELP_END = """\
A TIME is 90 or 90s, 500ms, 5m, 2h. Every flag can be set in the environment:
--queue-timeout is SOLLOL_QUEUE_TIMEOUT; the flag wins.

Files are read again when they have been saved, or on SIGHUP; a bad one is
refused, and the old one stays. SIGUSR2 lets the program that is on disk take
over. SIGTERM lets running and queued requests finish; a second one, more than
a second later, stops at once. Exit status 2: a mistake on the command line, in
a variable or in a file, told in one line; 1: the port is in use. A supervisor's
listening socket (LISTEN_FDS) is taken in place of --bind and --port.

The file of --hosts explains itself. A line of --keys is a key, then settings:
  name=alice          in the log, the counts and /api/usage (needed)
  priority=low        of requests that name none
  max-priority=5      what asks for more gets this
  rate=60/min         requests in a s, min, h or d; beyond that 429
  tokens=2M/d         of prompts and answers, counted when an answer has ended; a
                      d ends at midnight (TZ); it begins anew with a restart
  concurrency=4       requests at once; beyond that 429
  share=2             of fairness, for each person behind the key
  models=A,qwen3:*    that it may use; others are not there for it, and a body
                      that cannot be read, such as a compressed one, gets 403
  routes=read         GET, HEAD and show; inference: all that changes nothing
                      and uses no account; all (default)
  admin=yes           may change models, use the account and order nodes, and
                      sees all of /api/usage
  proxy=yes           is believed for whom it asks, as --trusted-proxies"""


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the flags alone."""
    parser = OneLineParser(prog="sollol.py", description=HELP_START, epilog=HELP_END,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, settings in flags.items():
            default = "" if settings["help"].endswith(")") else " (%(default)s)"
            group.add_argument(flag, **{**settings, "help": settings["help"] + default})
    parser.add_argument("--version", action="version", version=f"SOLLOL {__version__}")
    return parser


SWITCHES = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False, "": False}


def twin_value(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> Any:
    """Return the value that the text of a variable gives to its flag. Raises ArgumentError."""
    def value_of(word: str) -> Any:
        value = parser._get_value(action, word)
        parser._check_value(action, value)
        return value

    if isinstance(action, ListFlag):
        return [value_of(word) for word in text.split()]
    if action.nargs != 0:
        return value_of(text)
    if text.lower() not in SWITCHES:
        raise argparse.ArgumentError(None, f"{text!r} is neither yes nor no")
    return action.const if SWITCHES[text.lower()] else not action.const


# The variables, NAME=VALUE, that Kubernetes sets in a pod for a Service named sollol, or sollol-web. SOLLOL_PORT is the
# twin of a flag, too.
SERVICE_LINK = re.compile(r"SOLLOL_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(?==\w+://)|"
                          r"PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)=")


def twin_name(flag: str) -> str:
    """Return the name of the environment variable that sets a flag."""
    return "SOLLOL_" + flag.lstrip("-").upper().replace("-", "_")


def take_variables(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """Make the variables in the environment the defaults of their flags. Exits at a mistake."""
    for flag, action in parser._option_string_actions.items():
        name = twin_name(flag)
        if name in environ and action.dest not in ("help", "version"):
            try:
                action.default = twin_value(parser, action, environ[name])
            except argparse.ArgumentError as error:
                parser.error(f"{name}: {error.message}")


def refuse_unknown(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Exit at the first variable that belongs to no flag: a mistyped one would silently change nothing."""
    known = {twin_name(flag)[7:] for flags in FLAGS.values() for flag in flags}     # compared without SOLLOL_
    for name in names:
        if name.startswith("SOLLOL_") and name[7:] not in known:
            near = difflib.get_close_matches(name[7:], known, 1)
            parser.error(f"unknown variable {name}: " + (f"is SOLLOL_{near[0]} meant?" if near else "see --help"))


def parse_options(argv: list[str] | None, environ: Mapping[str, str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; a flag wins over its twin SOLLOL_<FLAG>. Exits with 2 at a mistake."""
    environ = os.environ if environ is None else environ
    links = [name for name, value in environ.items() if SERVICE_LINK.match(f"{name}={value}")]
    environ = {name: value for name, value in environ.items() if name not in links}
    parser = command_line()
    take_variables(parser, environ)
    options = parser.parse_args(argv)
    options.ignored = links
    options.inherited = Inherited()
    refuse_unknown(parser, environ)
    if not (options.hosts or options.node or options.discover or options.demo or options.grafana or options.alerts):
        parser.error("where are the nodes? Give --hosts FILE, --node URL or --discover CIDR, or try --demo")
    if bool(options.tls_cert) != bool(options.tls_key):
        parser.error("--tls-cert and --tls-key: one is nothing without the other")
    return options


def raise_descriptor_limit() -> None:
    """Allow as many open sockets as the system grants: a request may need two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run_gateway(options: argparse.Namespace, nodes: list[NodeSettings], keys: list[KeySettings],
                      tls: ssl.SSLContext | None, greeting: str = "") -> int | None:
    """Serve until a signal ends it. `greeting` is printed once the port is open, with the gateway's {url}.

    Returns the process that has taken over, if this one is to wait for its end.
    """
    gateway = Gateway(options, nodes, keys, tls)
    gateway.loop.set_exception_handler(gateway.listener.report)
    for number in (signal.SIGTERM, signal.SIGINT):
        gateway.loop.add_signal_handler(number, gateway.drain)
    gateway.loop.add_signal_handler(signal.SIGHUP, gateway.files.reload)
    gateway.loop.add_signal_handler(signal.SIGUSR2, gateway.upgrade.begin)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LATER)       # see Upgrade.start_program
    try:
        await gateway.start()
        if gateway.leaving:
            return None
        assert gateway.listener.address is not None
        host, port = gateway.listener.address
        url = f"{'https' if tls else 'http'}://{bracketed(host)}:{port}"
        LOG.info({"event": "start", "version": __version__, "url": url, "nodes": len(gateway.dispatcher.cluster.nodes),
                  "policy": options.policy, "loop": type(gateway.loop).__module__})
        if not is_loopback(options.bind) and not options.keys:
            LOG.warning({"event": "start", "why": f"listening on {options.bind} without keys: "
                         "whoever reaches this port can use the nodes"})
        if gateway.listener.max_clients < options.max_connections:
            LOG.warning({"event": "start", "why": f"the limit of open files allows {gateway.listener.max_clients} "
                         f"clients, not {options.max_connections}: raise it (LimitNOFILE=, ulimit -n)"})
        tell_systemd("READY=1")
        if greeting:
            try:
                print(greeting.format(url=url), flush=True)
            except OSError:         # a full disk, or a closed pipe: Python would fail again at the exit
                sys.stdout = None
        await gateway.stopped.wait()
    finally:
        await gateway.stop()
        if gateway.listener.address:        # else it did not start
            LOG.info({"event": "stop"})
    if gateway.retired:             # what is meant for others must not kill it at its exit; `outlive` can take it
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    return gateway.upgrade.heir if gateway.retired and gateway.upgrade.outlives else None


Demo = Callable[[argparse.Namespace, list[KeySettings], ssl.SSLContext | None], Coroutine[None, None, None]]


def exec_demo(argv: list[str]) -> int:
    """Become bench.py, which calls `main` with a Demo: imports go one way only. Returns 2 if bench.py is missing."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bench.py")
    if not os.path.exists(program):
        print("sollol.py: --demo: bench.py must be beside sollol.py", file=sys.stderr)
        return 2
    os.execv(sys.executable, [sys.executable, program, "demo", *argv])


MODELS_IN_A_ROW, ROW_CHARS = 3, 120


def table_lines(rows: list[tuple[str | list[str], ...]]) -> list[str]:
    """Return the lines of a table. A list in a cell has one word a line if it is long, or the row too wide."""
    def cells(row: tuple[str | list[str], ...], split: bool) -> list[list[str]]:
        """Return the lines of each cell."""
        return [[cell] if isinstance(cell, str) else cell if split or len(cell) > MODELS_IN_A_ROW else [" ".join(cell)]
                for cell in row]

    def laid_out(table: list[list[list[str]]]) -> list[list[str]]:
        """Return the lines of each row, cells filled up to the width of their column."""
        widths = [max(len(line) for row in table for line in row[column]) for column in range(len(table[0]))]
        return [["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
                 for line in itertools.zip_longest(*row, fillvalue="")] for row in table]

    narrow = [max(map(len, lines)) <= ROW_CHARS for lines in laid_out([cells(row, False) for row in rows])]
    table = [cells(row, not fits) for row, fits in zip(rows, narrow, strict=True)]
    return [line for lines in laid_out(table) for line in lines]


async def run_check(options: argparse.Namespace, settings: list[NodeSettings]) -> int:
    """Print what every node answers; return the exit status."""
    options.state = None
    LOG.setLevel(logging.ERROR)
    gateway = Gateway(options, settings)
    await gateway.first_looks()
    if options.discover:
        await gateway.sources.scan()
        gateway.join()
        await gateway.first_looks()
    nodes, reasons = gateway.dispatcher.cluster.nodes.values(), gateway.node_io.reasons
    missing = [line for line in settings if line.resolve and not expand(line, gateway.sources.dns)]
    rows: list[tuple[str | list[str], ...]] = [
        ("NODE", "URL", "STATE", "VERSION", ["MODELS"], ["LOADED"], "WHY" if any(reasons.values()) else "")]
    for node in nodes:
        models = sorted(node.rows)
        loaded = sorted(model for model, runner in node.runners.items() if runner.ready_s is not None)
        rows.append((node.name, node.settings.url, state_in_words(node, gateway.loop.time()), node.version or "-",
                     models or ["-"], loaded or ["-"], reasons[node]))
    rows += [(line.name, line.url, "no address", "-", ["-"], ["-"], "") for line in missing]
    print("\n".join(table_lines(rows)))
    if any(reason.endswith(os.strerror(errno.ECONNREFUSED)) for reason in reasons.values()):
        print("Connection refused: Ollama does not run there, or only its own machine may ask (OLLAMA_HOST=0.0.0.0).")
    await gateway.stop()
    return 0 if nodes and not missing and all(node.up for node in nodes) else 1


def new_loop(fast: bool) -> asyncio.AbstractEventLoop:
    """Return uvloop's event loop if `fast` and it can be imported, else asyncio's."""
    if fast:
        with contextlib.suppress(ImportError):
            import uvloop           # type: ignore[import-not-found, unused-ignore]
            loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
            return loop
    return asyncio.new_event_loop()


def trim_memory() -> None:
    """Return to the system what Python needed to compile this file: 15 MiB after `python3 -m sollol`.

    For a script this returns next to nothing: Python keeps the parse tree while the script runs.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError):     # glibc has this call, others need none
        import ctypes
        ctypes.CDLL(None).malloc_trim(0)


def main(argv: list[str] | None = None, demo: Demo | None = None) -> int:
    """Run the command line; return the exit status. `demo` serves with --demo: see exec_demo."""
    channel = os.environ.pop(PREDECESSOR, "")       # before `parse_options`, which knows no such flag
    options = parse_options(argv)
    if options.grafana or options.alerts:
        print(grafana_dashboard() if options.grafana else alerting_rules())
        return 0
    if options.demo and not demo:
        return exec_demo(sys.argv[1:] if argv is None else argv)
    start_log(options.log_format, options.log_level)
    if options.ignored:
        LOG.info({"event": "start", "ignored": " ".join(options.ignored), "why": "set for a Service of Kubernetes"})
    raise_descriptor_limit()
    if sys.implementation.name == "cpython":    # PyPy has no thresholds
        gc.set_threshold(20_000, 20, 20)    # the default of 700 costs 6 % of the relay's time, and finds little
    try:
        options.inherited = inherit(channel) if channel else Inherited(passed_sockets(os.environ, os.getpid()))
        if options.inherited.sockets:
            options.bind, options.port = options.inherited.sockets[0].getsockname()[:2]
        nodes = [] if options.demo else read_nodes(options)
        keys, tls = read_keys(options), read_certificate(options)
        trim_memory()
        with asyncio.Runner(loop_factory=lambda: new_loop(options.uvloop)) as runner:
            if options.check:
                return runner.run(run_check(options, nodes))
            heir = runner.run(demo(options, keys, tls) if demo else run_gateway(options, nodes, keys, tls))
    except ConfigError as error:
        print(f"sollol.py: {error}" if str(error).startswith("--") else error, file=sys.stderr)
        return 2
    except OSError as error:        # asyncio's own text would repeat the address
        number = error.errno
        text = os.strerror(number) if number is not None and number in errno.errorcode else error.strerror or error
        print(f"sollol.py: {bracketed(options.bind)}:{options.port}: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:       # of --check, or before the gateway handles it
        return 128 + signal.SIGINT
    return 0 if heir is None else outlive(heir)


def abandon_unwritten() -> None:
    """Drop what a full disk kept from standard error: Python would fail to write it at the exit."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        sys.stderr = None


# -----------------------------------------------------------------------------
# Monitoring, as data: what Grafana shows of /metrics, and when Prometheus calls for help
# -----------------------------------------------------------------------------

INFERENCE = f'route=~"{"|".join(sorted(INFERENCE_PATHS))}"'
FAILED = f'sollol_requests_total{{{INFERENCE}, outcome=~"cut|error|refused", code!~"4.."}}'     # not by the client
ERROR_SHARE = f"(sum(rate({FAILED}[%s])) or vector(0)) / sum(rate(sollol_requests_total{{{INFERENCE}}}[%s]))"
RANGE = "$__rate_interval"          # Grafana's word for a range that has enough samples


def quantiles(histogram: str) -> dict[str, str]:
    """Return the queries for the median and the P95 of a histogram."""
    return {f"P{percent}": f"histogram_quantile({percent / 100}, sum by (le) (rate({histogram}_bucket[{RANGE}])))"
            for percent in (50, 95)}


class Panel(NamedTuple):
    """One picture of the dashboard. `queries`: by their legends, which may name labels."""

    title: str
    unit: str                       # as Grafana calls it
    queries: dict[str, str]
    kind: str = "timeseries"
    stacked: bool = False


PANELS = (
    Panel("Requests by outcome", "reqps", {
        "{{outcome}}": f"sum by (outcome) (rate(sollol_requests_total{{{INFERENCE}}}[{RANGE}]))"}, stacked=True),
    Panel("Requests that failed, share", "percentunit", {"failed": ERROR_SHARE % (RANGE, RANGE)}),
    Panel("Requests that wait and that run", "short", {
        "wait": "sum(sollol_queue_depth)", "run": "sum(sollol_inflight)"}),
    Panel("Time in the queue", "s", {"oldest that waits": "max(sollol_queue_oldest_seconds)"}
          | quantiles("sollol_queue_seconds")),
    Panel("Time to the first byte", "s", quantiles("sollol_ttft_seconds")),
    Panel("Time to the end of the answer", "s", quantiles("sollol_request_seconds")),
    Panel("Output by node", "suffix:tokens/s", {
        "{{node}}": f'sum by (node) (rate(sollol_tokens_total{{kind="output"}}[{RANGE}]))'}, stacked=True),
    Panel("State of the nodes", "none", {
        "{{node}}": "sollol_node_up + 2 * sollol_node_draining + 4 * sollol_node_asleep + 8 * sollol_node_waking"},
          "state-timeline"),
    Panel("Slots used by node, of all models", "short", {"{{node}}": "sum by (node) (sollol_inflight)"}, stacked=True),
    Panel("Slots known by node, of one model", "short", {"{{node}}": "max by (node) (sollol_slots)"}, stacked=True),
    Panel("Failures by node", "reqps", {
        "{{node}}: {{reason}}": f"sum by (node, reason) (rate(sollol_failovers_total[{RANGE}]))"}),
    Panel("Second attempts", "reqps", {
        "{{node}} races, won: {{won}}": f"sum by (node, won) (rate(sollol_races_total[{RANGE}]))",
        "broken streams, now {{result}}": f"sum by (result) (rate(sollol_rescues_total[{RANGE}]))"}),
    Panel("Nodes that have a model in memory", "short", {"{{model}}": "sum by (model) (sollol_model_resident)"},
          stacked=True),
    Panel("Models in memory by node", "none", {"": "max by (node, model) (sollol_model_resident)"}, "table"),
)

# What the sum in the panel of states means: (text, colour).
NODE_STATES = {0: ("down", "red"), 1: ("up", "green"), 2: ("down, draining", "dark-red"), 3: ("draining", "yellow"),
               4: ("asleep", "blue"), 8: ("waking", "purple"), 10: ("waking, draining", "purple"),
               12: ("waking", "purple")}
LEGEND: Json = {"displayMode": "table", "placement": "right", "showLegend": True, "calcs": ["lastNotNull", "max"]}
OPTIONS: dict[str, Json] = {        # by the kind of panel
    "timeseries": {"legend": LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "state-timeline": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": False},
                       "tooltip": {"mode": "single", "sort": "none"}, "showValue": "auto", "rowHeight": 0.9,
                       "mergeValues": True},
    "table": {"showHeader": True},
}
SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
PANEL_WIDTH, PANEL_HEIGHT = 12, 8   # of a grid 24 wide


def grafana_panel(number: int, panel: Panel) -> Json:
    """Return a panel as Grafana reads it; `number` counts from 0, two a row."""
    is_table = panel.kind == "table"
    targets = [{"refId": chr(ord("A") + row), "datasource": SOURCE, "editorMode": "code", "expr": query,
                "legendFormat": legend, "range": not is_table, "instant": is_table,
                "format": "table" if is_table else "time_series"}
               for row, (legend, query) in enumerate(panel.queries.items())]
    defaults: Json = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        defaults["custom"] = {"fillOpacity": 20 if panel.stacked else 0, "showPoints": "never",
                              "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"}}
    if panel.kind == "state-timeline":
        defaults["mappings"] = [{"type": "value", "options": {
            str(value): {"text": text, "color": color, "index": index}
            for index, (value, (text, color)) in enumerate(NODE_STATES.items())}}]
    hidden = {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}
    row, column = divmod(number, 24 // PANEL_WIDTH)
    return {"id": number + 1, "type": panel.kind, "title": panel.title, "datasource": SOURCE,
            "gridPos": {"x": column * PANEL_WIDTH, "y": row * PANEL_HEIGHT, "w": PANEL_WIDTH, "h": PANEL_HEIGHT},
            "fieldConfig": {"defaults": defaults, "overrides": []}, "options": OPTIONS[panel.kind],
            "targets": targets, "transformations": [hidden] if is_table else []}


def grafana_dashboard() -> str:
    """Return the dashboard that --grafana prints. Source: @grafana/schema, Dashboard, schema version 42."""
    variable = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus",
                "includeAll": False, "multi": False, "hide": 0}
    return json.dumps({
        "uid": "sollol", "title": "SOLLOL", "tags": ["sollol", "ollama"], "schemaVersion": 42, "editable": True,
        "graphTooltip": 1, "time": {"from": "now-3h", "to": "now"}, "refresh": "30s", "timezone": "browser",
        "templating": {"list": [variable]}, "annotations": {"list": []},
        "panels": [grafana_panel(number, panel) for number, panel in enumerate(PANELS)]}, indent=1)


class Alert(NamedTuple):
    """When Prometheus calls, and what the one who is called shall do."""

    name: str
    query: str
    lasts: str                      # so long it must hold
    severity: str
    summary: str


ALERTS = (
    Alert("SollolGone", "absent(sollol_build_info)", "2m", "critical",
          "Prometheus gets no /metrics from any SOLLOL. See whether the gateway runs (systemctl status sollol), and "
          "whether Prometheus may ask it: with --keys it needs a key."),
    Alert("SollolNoNode", "sum without (node) (sollol_node_up * (1 - sollol_node_draining) + sollol_node_asleep) == 0",
          "1m", "critical",
          "No node can serve: all are down or drained, and every request is refused. Start Ollama on the nodes, or "
          "resume the drained ones; sollol.py --check tells why each does not answer."),
    Alert("SollolNodeDown", "sollol_node_up == 0 and sollol_node_draining == 0 and sollol_node_asleep == 0",
          "2m", "warning",
          "Node {{ $labels.node }} does not answer, and others do its work. See whether the machine and its Ollama "
          "run; last_error in /api/stats tells more. If it is to stay away, drain it or take it out of hosts.txt."),
    Alert("SollolNothingRuns", "sum without (priority) (sollol_queue_depth) > 0 and "
          "sum without (node) (sollol_inflight) == 0", "1m", "critical",
          "{{ $value }} requests wait and none runs. See in /api/queue which models they want, and in /api/stats "
          "whether a node that is up has them."),
    Alert("SollolQueueOld", "sollol_queue_oldest_seconds > 60", "5m", "warning",
          "Requests have waited for {{ $value | humanizeDuration }}; after --queue-timeout they get 503. See in "
          "/api/queue who asks for what: give batch work a low priority, add a node, or pull the model onto more."),
    Alert("SollolModelWithoutNode", "sollol_model_nodes == 0 and sum without (node, route, code, outcome) "
          "(increase(sollol_requests_total[1h])) > 0", "2m", "critical",
          "{{ $labels.model }} was asked for within the hour, and no node that has it is up. Bring one of its nodes "
          "back, or pull the model: ollama pull {{ $labels.model }} at the gateway brings it to a node that is up."),
    Alert("SollolErrors", ERROR_SHARE % ("10m", "10m") + f" > 0.05 and sum(increase({FAILED}[10m])) > 5",
          "5m", "warning",
          "{{ $value | humanizePercentage }} of the requests fail or are refused for want of a node. The log's lines "
          "with event=failure name the nodes and why; drain a node that fails often."),
    Alert("SollolNodeIdle", "sollol_node_wanted > 0 and sollol_inflight == 0 and sollol_node_up == 1 and "
          "sollol_node_draining == 0", "5m", "warning",
          "Node {{ $labels.node }} is idle while {{ $value }} requests wait whose model it has. If it is as fast as "
          "the busy ones, look at its state, last_error and speed in /api/stats; if it is far slower, waiting may be "
          "quicker, and it is idle for a reason."),
)


def alerting_rules() -> str:
    """Return the rules that --alerts prints, in YAML, of which a string in JSON is a part."""
    lines = ["groups:", "- name: sollol", "  rules:"]
    for alert in ALERTS:
        lines += [f"  - alert: {alert.name}", f"    expr: {json.dumps(alert.query)}", f"    for: {alert.lasts}",
                  f"    labels: {{severity: {alert.severity}}}",
                  "    annotations:", f"      summary: {json.dumps(alert.summary)}"]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# The page of the dashboard, as data
# -----------------------------------------------------------------------------

PAGE = r'''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>SOLLOL</title>
<link rel="icon" id="icon" href="data:,">
<style>
:root { --ground: #f6f5f2; --card: #fff; --ink: #1f2428; --soft: #596168; --line: #e2e0da; --empty: #eceae4;
  --good: #1f6f45; --well: #1f6f45; --warn: #8a5200; --bad: #b3261e; --a: #2a6fb0; --b: #b05a1f; --on: #fff;
  --m0: #4c8bc4; --m1: #c9803f; --m2: #5a9e6f; --m3: #9a73b8; --m4: #c2637a;
  --m5: #4fa3a5; --m6: #a08f3c; --m7: #7a7f8a }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181b; --card: #1d2125; --ink: #e7e9ea; --soft: #a8b0b7; --line: #2f353b; --empty: #2a3035;
    --good: #6fcf97; --well: #1c4a33; --warn: #e8b44c; --bad: #ff8f85; --a: #79b4ec; --b: #e8a06a; --on: #15181b } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.4 system-ui, sans-serif;
  font-variant-numeric: tabular-nums }
h1, h2, h3, p, ul { margin: 0; padding: 0; list-style: none }
h1 { font-size: 18px; letter-spacing: .06em }
h2 { font-size: 14px; color: var(--soft) }
h3 { font-size: 15px; min-width: 0; overflow-wrap: anywhere }
button, select, input, summary { font: inherit; font-size: 14px; color: inherit }
button, select, input { background: var(--card); border: 1px solid var(--soft); border-radius: 6px; padding: 2px 10px;
  max-width: 100%; min-height: 26px }
button { cursor: pointer } button[aria-pressed=true] { background: var(--ink); color: var(--ground) }
summary { cursor: pointer; color: var(--soft); width: fit-content; min-height: 24px }
:focus-visible { outline: 3px solid var(--a); outline-offset: 1px }
.hidden { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; white-space: nowrap }
#headline { display: flex; gap: 12px; padding: 12px 24px; font-size: 21px; font-weight: 600; color: var(--on);
  background: var(--well) }
#headline.l0 { color: #fff } #headline.l1 { background: var(--warn) } #headline.l2 { background: var(--bad) }
#headline.lost { background: var(--soft) }
#sentence { overflow-wrap: anywhere; min-width: 0 }
.bar { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; padding: 8px 24px 0 }
#link { color: var(--soft); flex: 1; min-width: 12em }
main { padding: 0 24px 24px; display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr) }
main > div { display: contents } main > div > section { order: 5 }
#at-queue { order: 1 } #at-nodes { order: 2 } #at-failures { order: 3 }
.lost main { opacity: .6 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(96px, 1fr)); gap: 10px; margin-top: 10px }
.tiles li, section { background: var(--card); border: 1px solid var(--line); border-radius: 9px }
.tiles li { padding: 7px 11px }
.tiles b { display: block; font-size: 23px; font-weight: 600; line-height: 1.25; white-space: nowrap }
.tiles b small { font-size: 14px; font-weight: 400 }
.tiles span, .soft, .none { color: var(--soft); font-size: 13px; font-weight: 400 }
.tiles .l1 { border-color: var(--warn); box-shadow: inset 4px 0 var(--warn) } .tiles .l1 b { color: var(--warn) }
.tiles .l2 { background: var(--bad); border-color: var(--bad) } .tiles .l2 * { color: var(--on) }
section { padding: 10px 14px; min-width: 0 }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; margin-bottom: 6px }
.head h2 { flex: 1; min-width: 7em }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 8px; align-items: start }
.node { border: 1px solid var(--line); border-left: 4px solid var(--good); border-radius: 7px; padding: 6px 10px;
  display: grid; grid-template-columns: minmax(0, 1fr); gap: 4px; min-width: 0; align-content: start }
.node > * { min-width: 0 }
.node.l1 { border-color: var(--warn) } .node.l2 { border: 1px solid var(--bad); border-left-width: 4px }
.node.l2 .top, .node.l2 .why { color: var(--bad) } .node.l1 .top span, .node.l1 .why { color: var(--warn) }
.node.away { border-left-color: var(--soft) }
.top { display: flex; gap: 6px; align-items: baseline; width: auto; color: var(--ink) }
.top::before { content: "▸"; font-size: 12px; color: var(--soft) } [open] > .top::before { content: "▾" }
.top h3 { flex: 1 } .top span { font-size: 13px; white-space: nowrap; color: var(--good) }
.away .top span { color: var(--soft) }
.node.l2 .top span { color: var(--bad) }
.why { font-size: 13px; font-weight: 600; overflow-wrap: anywhere; max-height: 4.3em; overflow: hidden }
.slots { display: flex; flex-wrap: wrap; gap: 3px }
.slots li { font-size: 13px; line-height: 19px; padding: 0 6px; border-radius: 4px; max-width: 100%; display: flex;
  gap: 4px; white-space: nowrap; background: var(--empty); border-left: 4px solid var(--hue) }
.slots b, .slots i { overflow: hidden; text-overflow: ellipsis; font-style: normal }
.slots i { flex: none; max-width: 9em }
.slots .free { width: 22px; height: 19px; border: 1px dashed var(--soft); background: none }
.slots .early { border-left-style: dotted }
.key { display: inline-block; width: 9px; height: 9px; border-radius: 3px; background: var(--hue); margin-right: 5px }
.orders { display: flex; flex-wrap: wrap; gap: 6px; margin: 5px 0 }
.url { overflow-wrap: anywhere }
.many .cards { grid-template-columns: repeat(auto-fill, minmax(222px, 1fr)); gap: 6px }
.many .node { padding: 3px 8px; gap: 2px } .many .extra { display: none }
.many .slots li { font-size: 12px; line-height: 16px }
.many .slots .free { height: 16px; width: 16px }
.many .why { max-height: 2.8em } .many .slots { gap: 2px 3px }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-size: 12px; font-weight: 500; color: var(--soft); padding: 3px 12px 3px 0 }
td, tbody th { padding: 4px 12px 4px 0; border-top: 1px solid var(--line); vertical-align: top; font-size: 14px;
  overflow-wrap: anywhere }
tbody th { font-weight: 600; color: var(--ink) }
td.id { font-size: 13px; max-width: 9em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.n { text-align: right; white-space: nowrap } th:last-child, td:last-child { padding-right: 0 }
.name { min-width: 7em }
td.l2 { color: var(--bad); font-weight: 600 }
.prio { display: inline-block; min-width: 24px; text-align: center; border-radius: 5px; background: var(--empty) }
.prio.high { background: var(--a); color: var(--on); font-weight: 600 }
.chip { color: var(--soft); font-size: 13px; margin-right: 12px; white-space: nowrap } .chip.won { color: var(--ink) }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 10px 16px }
.charts h3 { font-size: 13px; font-weight: 500; color: var(--soft); display: flex; flex-wrap: wrap; gap: 0 12px }
.charts h3 i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: var(--hue);
  vertical-align: middle; margin-right: 5px }
svg { display: block; width: 100%; height: 108px }
svg text { fill: var(--soft); font-size: 11px } svg .grid { stroke: var(--line) }
svg path, svg circle { stroke: var(--hue); fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
svg circle { fill: var(--hue); stroke: none }
dialog { background: var(--card); color: var(--ink); border: 1px solid var(--soft); border-radius: 10px;
  max-width: 32em; padding: 18px 22px }
dialog::backdrop { background: #0008 } dialog > * + * { margin-top: 12px }
#refused { color: var(--bad); font-weight: 600 }
@media (min-width: 1200px) {
  main { grid-template: "t t" auto "a b" auto "c b" 1fr / minmax(0, 8fr) minmax(0, 5fr) } .tiles { grid-area: t }
  main > div { display: grid; gap: 12px; align-content: start; grid-template-columns: minmax(0, 1fr) }
  #a { grid-area: a } #b { grid-area: b } #c { grid-area: c } }
@media (min-width: 1200px) and (max-width: 2199px) {
  .many main { grid-template: "t t" auto "a a" auto "b c" 1fr / minmax(0, 1fr) minmax(0, 1fr) } }
@media (min-width: 2200px) {
  body { font-size: 17px } body:not(.many) main { zoom: 1.15 }
  #headline { font-size: 28px } .tiles b { font-size: 30px }
  main { grid-template: "t t t" auto "a b c" 1fr / minmax(0, 7fr) minmax(0, 5fr) minmax(0, 5fr) }
  .many main { grid-template-columns: minmax(0, 8fr) minmax(0, 4fr) minmax(0, 4fr) }
  .cards { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) } svg { height: 140px } }
@media (max-width: 640px) {
  #headline { padding: 10px 12px; font-size: 17px } .bar { padding: 6px 12px 0 } main { padding: 0 8px 16px; gap: 8px }
  .tiles { grid-template-columns: repeat(3, 1fr); gap: 6px } .tiles li { padding: 5px 8px } .tiles b { font-size: 18px }
  .tiles span { font-size: 12px } #link { order: 1; flex-basis: 100% } h1 { flex: 1 }
  section { padding: 8px 10px } td.n { text-align: left } table, tbody { display: block }
  thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden }
  tr { display: flex; flex-wrap: wrap; gap: 1px 14px; padding: 6px 0; border-top: 1px solid var(--line) }
  td, tbody th { border: 0; padding: 0 } .wide { flex-basis: 100% }
  td[data-is]::before { content: attr(data-is) " "; color: var(--soft); font-size: 13px } }
</style>
</head>
<body>
<header>
<div id="headline"><span id="mark" aria-hidden="true"></span><p id="sentence">connecting</p></div>
<p id="spoken" class="hidden" role="status"></p>
<div class="bar"><h1>SOLLOL</h1><span id="link"></span><button id="pause" aria-pressed="false">Pause</button></div>
</header>
<main>
<ul class="tiles" id="tiles" aria-label="Now"></ul>
<div id="a"><section id="at-nodes" aria-labelledby="h-nodes"><div class="head"><h2 id="h-nodes">Nodes</h2>
<label>Sort <select id="sort"><option value="trouble">trouble first</option><option value="name">name</option>
<option value="busy">busy first</option><option value="fast">tokens/s</option></select></label>
<label>Filter <input id="filter" type="search" size="16" placeholder="node, model, person"></label></div>
<div id="nodes"></div></section></div>
<div id="b"><section id="at-queue" aria-labelledby="h-queue"><div class="head">
<h2 id="h-queue">Queue, the next one first</h2></div><div id="queue"></div></section>
<section id="at-failures" aria-labelledby="h-failures"><div class="head"><h2 id="h-failures">Last failures</h2></div>
<div id="failures"></div></section>
<section aria-labelledby="h-charts"><div class="head"><h2 id="h-charts">History</h2>
<button id="ten" aria-pressed="true">10 minutes</button><button id="long" aria-pressed="false">A day</button></div>
<div class="charts" id="charts"></div></section></div>
<div id="c"><section aria-labelledby="h-models"><div class="head"><h2 id="h-models">Models</h2></div>
<div id="models"></div></section>
<section aria-labelledby="h-people" id="used" hidden><div class="head"><h2 id="h-people">People, today</h2></div>
<div id="people"></div></section>
<section aria-labelledby="h-decisions"><details><summary id="h-decisions">Last decisions: when each candidate would have
finished</summary><div id="decisions"></div></details></section></div>
</main>
<dialog id="ask" aria-labelledby="asked"><p id="asked"></p>
<p id="pick"><label>Model <select id="model"></select></label></p><p id="refused" role="alert"></p>
<div class="orders"><button id="no">Cancel</button><button id="yes"></button></div></dialog>
<script type="application/json" id="first-state">@STATE@</script>
<script>
"use strict";
const at = (id) => document.getElementById(id);
const short = (model) => String(model || "no model").replace(/:latest$/, "");
const took = (s) => s == null ? "–" : s < 0.095 ? `${Math.round(s * 1000)} ms` : s < 9.95 ? `${s.toFixed(1)} s` :
  s < 99.5 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : s < 172800 ?
  `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
const age = (s) => s != null && s < 99.5 ? `${Math.max(1, Math.round(s))} s` : took(s);
const rate = (x) => x == null ? "–" : x && x < 9.95 ? x.toFixed(1) : x < 99500 ? String(Math.round(x)) :
  `${Math.round(x / 1000)}k`;
const some = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const hues = new Map();
function hue(model) {                   // one colour per model, in the order in which they turn up
  if (hues.size > 99) hues.clear();
  if (!hues.has(model)) hues.set(model, hues.size % 8);
  return `--hue: var(--m${hues.get(model)})`;
}

// What is to be seen is described by plain values; `patch` changes what differs and keeps the rest, so that focus, open
// folds and what a screen reader is at stay. Data only ever becomes text or the value of an attribute.
const h = (kind, attributes, ...children) =>
  ({kind, attributes: attributes || {}, children: children.flat(3).filter((it) => it != null && it !== "")});

function make(parent, it) {
  const space = it.kind === "svg" ? "http://www.w3.org/2000/svg" : parent.namespaceURI;
  const node = document.createElementNS(space, it.kind);
  node.key = it.attributes.key;
  node.was = {};
  return node;
}

function dress(node, attributes) {
  for (const name of Object.keys(node.was))
    if (!(name in attributes)) { node.removeAttribute(name); delete node.was[name]; }
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.onclick = value;
    else if (name !== "key" && node.was[name] !== value) node.setAttribute(name, node.was[name] = value);
  }
}

function patch(parent, children) {
  const keyed = new Map();
  for (const node of parent.childNodes) if (node.key != null) keyed.set(node.key, node);
  children.forEach((it, place) => {
    const there = parent.childNodes[place];
    if (typeof it !== "object") {
      if (there && there.nodeType === 3) { if (there.data !== String(it)) there.data = it; }
      else parent.insertBefore(document.createTextNode(it), there || null);
      return;
    }
    let node = it.attributes.key == null ? there : keyed.get(it.attributes.key);
    if (!node || node.localName !== it.kind || node.key !== it.attributes.key) node = make(parent, it);
    if (node !== there) parent.insertBefore(node, there || null);
    dress(node, it.attributes);
    patch(node, it.children);
  });
  while (parent.childNodes.length > children.length) parent.lastChild.remove();
}

function put(id, ...children) {
  const focused = document.activeElement;
  patch(at(id), children.flat().filter((it) => it != null));
  if (focused !== document.activeElement && focused.isConnected) focused.focus();     // it was moved
}

const table = (name, heads, rows) => h("table", {role: "table", "aria-label": name},
  h("thead", {role: "rowgroup"}, h("tr", {role: "row"}, heads.map(([text, kind]) =>
    h("th", {role: "columnheader", scope: "col", class: kind || ""}, text)))),
  h("tbody", {role: "rowgroup"}, rows));
const row = (...cells) => h("tr", {role: "row"}, cells);
const cell = (text, kind, is) => h("td", {role: "cell", class: kind || "", ...(is ? {"data-is": is} : {})}, text);
const lead = (text, kind) => h("th", {role: "rowheader", scope: "row", class: kind || ""}, text);
const none = (text) => h("p", {class: "none"}, text);
const dot = (model) => [h("span", {class: "key", style: hue(model)}), short(model)];
const fold = (rows, seen, head) => [table(...head, rows.slice(0, seen)), rows.length > seen ? h("details", {},
  h("summary", {}, `${rows.length - seen} more`), table(...head, rows.slice(seen))) : null];

const BAD = {unreachable: 2, failing: 2, waking: 1, draining: 1, silent: 1, new: 1};
const WORDS = {unreachable: "down", silent: "suspect", "": "up"};
const ORDER = ["unreachable", "failing", "waking", "draining", "silent", "new"];
const AWAY = ["unreachable", "waking", "asleep", "new"];
const level = (node) => Math.max(BAD[node.kind] || 0, node.failing.length ? 1 : 0);
const sorts = {
  trouble: (a, b) => level(b) - level(a) || ORDER.indexOf(a.kind) - ORDER.indexOf(b.kind),
  name: (a, b) => a.name.localeCompare(b.name, "en", {numeric: true}),
  busy: (a, b) => b.busy - a.busy || b.busy / b.slots - a.busy / a.slots,
  fast: (a, b) => (b.tok_s || 0) - (a.tok_s || 0)};

function slots(node) {
  const running = node.running.map((it) => {
    const who = it.own ? "the gateway itself" : it.client;
    const doing = it.began ? "" : it.own ? ", loads or measures" : ", no token yet";
    return h("li", {class: it.began ? "" : "early", style: hue(it.model), title: `priority ${it.priority}${doing}`},
      h("b", {}, who), h("i", {}, ` ${short(it.model)}`), ` ${age(it.since_s)}${it.slot || it.own ? "" : ", no slot"}`);
  });
  const free = AWAY.includes(node.kind) ? 0 : Math.min(Math.max(0, node.slots - node.busy), 16);
  const boxes = Array.from({length: free}, () => h("li", {class: "free"}, h("span", {class: "hidden"}, "free")));
  return running.length + free ? h("ul", {class: "slots", "aria-label": `${node.busy} of ${node.slots} slots busy`},
    running, boxes) : null;
}

function loaded(node) {
  const models = Object.entries(node.models).map(([name, it]) =>
    h("span", {}, dot(name), ` ${some(it.slots, "slot")}${it.loading ? ", loading" : ""} `));
  return AWAY.includes(node.kind) ? null :
    h("p", {class: "soft extra"}, models.length ? models : "nothing in memory");
}

function orders(node, may) {
  if (!may) return null;
  const button = (text, ...what) => h("button", {key: text, onclick: () => ask(node.name, ...what)}, text);
  const resident = Object.keys(node.models).filter((name) => node.models[name].resident);
  return h("div", {class: "orders"}, node.draining ? button("Resume", "resume") : button("Drain", "drain"),
    AWAY.includes(node.kind) ? null : button("Load a model", "load", ""),
    AWAY.includes(node.kind) ? null : resident.map((name) => button(`Unload ${short(name)}`, "unload", name)));
}

function nodeCard(node, may) {
  const away = AWAY.includes(node.kind), bad = [node.errors ? some(node.errors, "error") : "", node.cuts ?
    some(node.cuts, "cut stream") : ""].filter(Boolean).join(", ");
  const fails = node.failing.length && node.kind !== "failing" ? `fails ${node.failing.map(short).join(", ")}: ` : "";
  const speeds = away ? [] : [`${rate(node.tok_s)} tokens/s`, node.decode_tok_s == null ? "" :
    `${rate(node.decode_tok_s)} one stream`, node.answer_s == null ? "" : `${took(node.answer_s)} an answer`,
    node.speed < 0.8 ? `at ${Math.round(100 * node.speed)} % of its speed` : ""].filter(Boolean);
  const word = (WORDS[node.kind] ?? node.kind) + (node.draining && node.kind !== "draining" ? ", draining" : "");
  return h("li", {key: node.name, class: `node l${level(node)}${node.kind === "asleep" ? " away" : ""}`},
    h("details", {}, h("summary", {class: "top"}, h("h3", {}, node.name),
      h("span", {}, node.kind ? `${word} for ${age(node.for_s)}` : `${word}, ${node.busy} of ${node.slots} busy`)),
    h("p", {class: "soft url"}, `${node.url} · Ollama ${node.version || "of unknown version"} · ${
      node.kind || "up"} for ${age(node.for_s)} · ${some(node.on_disk, "model")} on disk${
      speeds.length ? ` · ${speeds.join(" · ")}` : ""}`), orders(node, may)),
    node.why || fails ? h("p", {class: "why"}, `${fails}${node.why}`) : null,
    bad ? h("p", {class: "why"}, `${bad} in 10 min`) : null,
    slots(node), loaded(node),
    speeds.length ? h("p", {class: "soft extra"}, speeds.join(" · ")) : null);
}

function showNodes(state) {
  const wanted = at("filter").value.trim().toLowerCase();
  const text = (node) => [node.name, node.kind || "up", node.why, ...Object.keys(node.models),
    ...node.running.map((it) => `${it.client} ${it.model}`)].join(" ").toLowerCase();
  const nodes = state.nodes.filter((node) => !wanted || text(node).includes(wanted)).sort(sorts[at("sort").value]);
  document.body.classList.toggle("many", state.nodes.length > 12);
  const left = state.nodes.length - nodes.length;
  put("nodes", state.nodes.length ? h("ul", {class: "cards"}, nodes.map((node) => nodeCard(node, state.orders))) :
    none("No node yet: put its URL into the hosts file and save it."), left ? none(`${left} filtered out`) : null);
}

function showTiles(state) {
  const about = state.headline.about, nodes = state.nodes;
  const can = nodes.filter((node) => !["unreachable", "failing", "waking", "draining", "new"].includes(node.kind));
  const sum = (name) => nodes.reduce((total, node) => total + (AWAY.includes(node.kind) ? 0 : node[name]), 0);
  const tile = (value, unit, name, level) => h("li", {class: `l${level || 0}`}, h("b", {}, String(value),
    unit ? h("small", {}, ` ${unit}`) : null), h("span", {}, name));
  put("tiles", tile(can.length, `of ${nodes.length}`, "nodes can serve", about.nodes),
    tile(sum("busy"), `of ${sum("slots")}`, "slots busy"), tile(state.queued, "", "waiting", about.queue),
    tile(state.queued ? age(state.oldest_s) : "–", "", "longest wait", about.queue),
    tile(state.queued ? age(state.last_start_s) : "–", "", "last starts in", about.queue),
    tile(rate(state.per_min), "/min", "answers"), tile(state.failed, "/min", "failed", about.failures),
    tile(rate(state.tok_s), "/s", "tokens"), tile(took(state.ttft_s), "", "first token, P50"));
}

function showQueue(state) {
  const starts = (s) => s == null ? "–" : s ? age(s) : "next";
  const rows = state.queue.map((it) => row(cell(it.position, "n", "#"),
    cell(h("span", {class: `prio ${it.priority > 5 ? "high" : ""}`}, it.priority), "", "priority"),
    cell(dot(it.model), "name"), cell(it.client, "name"), cell(age(it.waited_s), "n", "waited"),
    cell(starts(it.predicted_start_s), "n", "starts in"), cell(it.id, "wide soft id")));
  const heads = [["#", "n"], ["Priority"], ["Model"], ["Who"], ["Waited", "n"], ["Starts in", "n"], ["Request"]];
  const hidden = state.queued - state.queue.length;
  put("queue", state.queued ? fold(rows, 6, ["Queue", heads]) : none("Nobody waits."),
    hidden ? none(`and ${hidden} more`) : null);
}

function showModels(state) {
  const rows = state.models.rows.map((it) => {
    const more = it.resident_on - it.resident.length;
    return row(lead(dot(it.name), "name"), cell(it.waiting, "n", "waiting"), cell(it.running, "n", "running"),
      cell(it.resident.join(", ") + (more ? ` and ${more} more` : "") || "–", "name", "in memory on"),
      cell(some(it.on_disk, "node"), "n", "on disk of"), cell(it.tok_s.map(rate).join("–") || "–", "n", "tokens/s"),
      cell(it.failures, it.failures ? "n l2" : "n", "failures"));
  });
  const left = state.models.count - rows.length;
  put("models", rows.length ? fold(rows, 8, ["Models", [["Model"], ["Waiting", "n"], ["Running", "n"], ["In memory"],
    ["On disk", "n"], ["Tokens/s", "n"], ["Failures", "n"]]]) : none("None is in memory or asked for."),
    left > 0 ? none(`${left} more on disk only`) : null);
}

function showPeople(state) {
  at("used").hidden = !state.people;    // only who may see it is told
  if (!state.people) return;
  const rows = state.people.most.map((it) => row(lead(it.name, "name"), cell(it.running, "n", "running"),
    cell(it.waiting, "n", "waiting"), cell(it.requests, "n", "requests"),
    cell(it.tokens.toLocaleString("en"), "n", "tokens"), cell(took(it.slot_s), "n", "slot time")));
  const others = state.people.count - rows.length;
  put("people", rows.length ? fold(rows, 8, ["People", [["Who"], ["Running", "n"], ["Waiting", "n"], ["Requests", "n"],
    ["Tokens", "n"], ["Slot time", "n"]]]) : none("Nobody yet."), others > 0 ? none(`and ${others} more`) : null);
}

function showFailures(state) {
  const rows = state.failures.map((it) => row(cell(`${age(it.ago_s)} ago`, "n"),
    h("th", {role: "rowheader", scope: "row", class: "name"}, it.node,
      h("p", {class: "soft"}, it.model ? dot(it.model) : "", ` for ${it.client}`)),
    cell([it.text || `${it.kind}${it.status ? `, status ${it.status}` : ""}`, it.times > 1 ?
      h("span", {class: "soft"}, ` ×${it.times}`) : null], "wide")));
  const heads = [["When", "n"], ["Where"], ["What it said"]];
  put("failures", rows.length ? fold(rows, 5, ["Failures", heads]) : none("None."));
}

function showDecisions(state) {
  const rows = state.decisions.map((it) => {
    const all = Object.entries(it.predicted_finish_s).sort((one, other) => one[1] - other[1]);
    const seen = all.filter(([name], place) => place < 3 || name === it.node);
    const chips = seen.map(([name, s]) => h("span", {class: name === it.node ? "chip won" : "chip"},
      `${name === it.node ? "→ " : ""}${name} ${took(s)}`));
    if (all.length > seen.length) chips.push(h("span", {class: "chip"}, `and ${all.length - seen.length} more`));
    return row(cell(`${age(it.ago_s)} ago`, "n"), cell(dot(it.model), "name"), cell(chips, "wide"));
  });
  const heads = [["When", "n"], ["Model"], ["Predicted finish"]];
  put("decisions", rows.length ? table("Decisions", heads, rows) : none("None yet."));
}

function chart(key, name, lines, step_s, say) {
  const box = at(`c-${key}`), wide = box?.clientWidth || 300, high = box?.clientHeight || 108;
  const left = 42, foot = 16, top = 8;
  const most = Math.max(...lines.flatMap(([, , values]) => values.map((value) => value || 0)));
  const unit = 10 ** Math.floor(Math.log10(most || 1)), roof = [1, 2, 5, 10].find((n) => n * unit >= most) * unit;
  const count = lines[0][2].length, x = (n) => left + (wide - left - 4) * n / (count - 1);
  const y = (value) => high - foot - (high - foot - top) * value / roof;
  const grid = [0, roof].map((value) => [
    h("line", {class: "grid", x1: left, x2: wide - 4, y1: y(value), y2: y(value)}),
    h("text", {x: left - 5, y: y(value) + 4, "text-anchor": "end"}, value ? say(value) : "0")]);
  const minutes = (count - 1) * step_s / 60, span = minutes > 90 ? `${Math.round(minutes / 60)} h` : `${minutes} min`;
  const drawn = lines.map(([, colour, values]) => {
    let path = "";
    const dots = [];
    values.forEach((value, n) => {
      if (value == null) return;
      const joined = n && values[n - 1] != null;
      path += `${joined ? "L" : "M"}${x(n).toFixed(1)} ${y(value).toFixed(1)}`;
      if (!joined && values[n + 1] == null)
        dots.push(h("circle", {cx: x(n).toFixed(1), cy: y(value).toFixed(1), r: 2}));
    });
    return h("g", {style: `--hue: var(${colour})`}, h("path", {d: path}), dots);
  });
  const last = (values) => values.findLast((value) => value != null);
  const said = lines.map(([label, , values]) => `${label} ${say(last(values))}`).join(", ");
  return h("div", {key}, h("h3", {}, name, lines.map(([label, colour, values]) =>
    h("span", {}, h("i", {style: `--hue: var(${colour})`}), `${label} ${say(last(values))}`))),
    h("svg", {id: `c-${key}`, viewBox: `0 0 ${wide} ${high}`, role: "img",
      "aria-label": `${name} over ${span}; last ${said}; most ${say(most)}`}, grid,
      h("text", {x: left, y: high - 3}, `${span} ago`),
      h("text", {x: wide - 4, y: high - 3, "text-anchor": "end"}, "now"), drawn));
}

function showCharts(state) {
  const past = wantsDay && day ? day : state.past, each = (values, by) => values.map((v) => v == null ? v : v / by);
  const line = (...it) => chart(...it.slice(0, 3), past.step_s, it[3]);
  at("ten").setAttribute("aria-pressed", past !== day);
  at("long").setAttribute("aria-pressed", past === day);
  put("charts", line("requests", "Per second", [["answers", "--a", each(past.requests, past.step_s)],
    ["failed", "--bad", each(past.failed, past.step_s)]], (v) => v && v < 0.95 ? v.toFixed(2) : rate(v)),
  line("queue", "Queue", [["waiting", "--a", past.queued]], rate),
  line("tokens", "Tokens", [["per second", "--a", each(past.tokens, past.step_s)]], rate),
  line("total", "Latency", past === day ? [["P95", "--b", past.p95_s]] :
    [["P50", "--a", past.total_p50_s], ["P95", "--b", past.total_p95_s]], took),
  past === day ? null : line("first", "First token",
    [["P50", "--a", past.first_p50_s], ["P95", "--b", past.first_p95_s]], took));
}

const MARKS = ["✔", "▲", "✖"];
const SHAPES = ["<circle cx='8' cy='8' r='7' fill='%23238a55'/>", "<path d='M8 1L15.5 15H.5z' fill='%23e09000'/>",
  "<path d='M0 0h16v16H0z' fill='%23d02a20'/><path d='M4 4l8 8M12 4l-8 8' stroke='%23fff' stroke-width='2.5'/>",
  "<circle cx='8' cy='8' r='6' fill='none' stroke='%23888' stroke-width='3'/>"];
function tell(lost) {                   // the line on top, the title and the icon
  const ended = lost && state.draining, line = state.headline;
  const why = ended ? "It was shutting down and has gone" : "Connection lost";
  const text = lost ? `${why}. This is the state of ${seen}.` : line.text;
  const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  document.body.classList.toggle("lost", lost);
  at("headline").className = lost ? "lost" : `l${line.level}`;
  put(at("mark"), lost ? "…" : MARKS[line.level]);
  put(at("sentence"), text);
  put(at("link"), paused ? `paused at ${seen}` : `${state.version}, ${state.policy}, up for ${age(state.uptime_s)}`);
  const title = `${lost ? "…" : MARKS[line.level]} ${lost ? "connection lost" : line.short} – SOLLOL`;
  if (document.title !== title) document.title = title;
  const icon = `data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>${
    SHAPES[lost ? 3 : line.level]}</svg>`;
  if (at("icon").getAttribute("href") !== icon) at("icon").setAttribute("href", icon);
  const key = lost ? "lost" : line.key;
  if (key !== spoken) put(at("spoken"), text);      // times and counts alone are not spoken
  spoken = key;
}

function show() {
  for (const part of [showTiles, showNodes, showQueue, showCharts, showFailures, showModels, showPeople, showDecisions])
    part(state);
}

let state = JSON.parse(at("first-state").textContent), paused = false, seen = "", spoken = null, day = null;
let wantsDay = false, asked = null;
function take(next) {
  state = next;
  if (paused) return;
  seen = new Date().toLocaleTimeString();
  show();
  tell(false);
}
function listen() {
  const events = new EventSource("/dashboard/events");
  events.onmessage = (event) => take(JSON.parse(event.data));
  events.addEventListener("day", (event) => { day = JSON.parse(event.data); });
  events.onerror = () => {              // it tries again by itself, unless it was answered with an error
    tell(true);
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
}

const ORDERS = {
  drain: (node) => `Drain ${node}? It gets no new work; what runs there is finished.`,
  resume: (node) => `Resume ${node}? It gets new work again.`,
  load: (node) => `Load a model on ${node}? It may push out another one that is idle.`,
  unload: (node, model) =>
    `Unload ${short(model)} from ${node}? What runs is finished; its next request there waits for a load.`};
async function ask(node, verb, model) { // ask back before an order is given
  asked = {node, verb, model};
  at("asked").textContent = ORDERS[verb](node, model);
  at("yes").textContent = verb[0].toUpperCase() + verb.slice(1);
  at("refused").textContent = "";
  at("pick").hidden = verb !== "load";
  at("model").replaceChildren();
  at("ask").showModal();
  if (verb !== "load") return;
  const stats = await (await fetch("/api/stats")).json();
  const models = Object.entries(stats.nodes.find((it) => it.name === node)?.models || {});
  for (const [name, it] of models) if (it.on_disk && !it.resident) at("model").append(new Option(short(name), name));
}
at("yes").onclick = async () => {
  const model = asked.verb === "load" ? at("model").value : asked.model;
  const path = `/api/nodes/${encodeURIComponent(asked.node)}/${asked.verb}`;
  try {
    const answer = await fetch(`${path}${model ? `?model=${encodeURIComponent(model)}` : ""}`, {method: "POST"});
    if (!answer.ok) throw new Error((await answer.json()).error);
    at("ask").close();
  } catch (error) { at("refused").textContent = error.message; }
};
at("no").onclick = () => at("ask").close();
at("pause").onclick = () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", paused);
  at("pause").textContent = paused ? "Go on" : "Pause";
  if (paused) tell(false); else take(state);
};
at("sort").onchange = at("filter").oninput = () => showNodes(state);
at("ten").onclick = () => { wantsDay = false; showCharts(state); };
at("long").onclick = () => { wantsDay = true; showCharts(state); };
addEventListener("resize", () => showCharts(state));
take(state);
showCharts(state);                      // they know their width now
listen();
</script>
</body>
</html>
'''
PAGE_LINES = [b"Content-Security-Policy: " + page_policy(), b"Cache-Control: no-store"]


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        abandon_unwritten()
