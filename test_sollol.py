"""The promises of SOLLOL, in the order of sollol.py: pure parts by tables, the rest over real sockets.

    python -m pytest -q

Tests over sockets run twice: on plain asyncio with a virtual clock (waiting costs nothing) and on uvloop in real time.
The nodes are bench.py's simulated ones, or scripted ones where exact bytes matter.
"""

import ast
import asyncio
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import http.client
import http.server
import inspect
import itertools
import json
import math
import operator
import os
import pathlib
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import urllib.error
import urllib.request
import zoneinfo
from dataclasses import replace

import pytest

import bench
import sollol
from sollol import Family, NodeSettings, ProtocolError, Refusal, RequestSpec, Ticket, TicketState, Timings, Where

HERE = pathlib.Path(__file__).parent
# How many times as many random cases are tried as in a quick run of the tests.
FUZZ = int(os.environ.pop("SOLLOL_TEST_FUZZ", 1))       # no program that a test starts would take it for a flag's


@pytest.fixture(autouse=True)
def log_that_pytest_sees():
    """Undo what the program does to its log: pytest gives one that does not propagate a handler of its own."""
    yield
    sollol.LOG.handlers.clear()
    sollol.LOG.propagate = True


def table(names, rows):
    """Parametrize by rows whose first item is the test id."""
    return pytest.mark.parametrize(names, [pytest.param(*row[1:], id=row[0]) for row in rows])


def listed(name, values):
    """Parametrize by values that are their own test ids."""
    return pytest.mark.parametrize(name, values, ids=lambda value: repr(value)[:70])


def want(model="m", **more):
    given = {"family": Family.OLLAMA, "stream": True, "prompt_chars": 400, **more}
    return RequestSpec(model=sollol.canonical(model), **given)


# -----------------------------------------------------------------------------
# Wire: request heads
# -----------------------------------------------------------------------------

# What may stand behind a head in the same read: a body with bytes that no head may contain, then a request.
TRAILING = b'{\n\x00\r "a": 1}GET /next HTTP/1.1\r\nHost: b\r\n\r\n'


def feed_head(raw, step):
    """Return what `raw`, arriving `step` bytes at a time, is taken for: RequestHead, ProtocolError, None."""
    buffer, scanned = bytearray(), 0
    for at in range(0, len(raw), step):
        buffer += raw[at:at + step]
        while buffer[:2] == b"\r\n":
            del buffer[:2]
        try:
            end = sollol.find_head(buffer, scanned)
            if end is not None:
                return sollol.parse_request(bytes(buffer[:end]))
        except ProtocolError as error:
            return error
        scanned = len(buffer)
    return None


def every_way(raw):
    """Return the outcomes of a head fed whole, byte by byte, in threes, and with trailing data."""
    return [*(feed_head(raw, step) for step in (len(raw), 1, 3)), feed_head(raw + TRAILING, len(raw) + 99)]


def head(*lines):
    return b"\r\n".join(lines) + b"\r\n\r\n"


def get(*fields, target=b"/"):
    return head(b"GET " + target + b" HTTP/1.1", b"Host: a", *fields)


def post(*fields):
    return head(b"POST /api/chat HTTP/1.1", b"Host: a", *fields)


@table("raw, expected", [
    ("minimal", get(), dict(method="GET", target=b"/", path="/", version=1, length=0, keep_alive=True,
                            expects_continue=False, fields={b"host": b"a"}, lines=[(b"host", b"a", b"Host: a")])),
    ("empty lines before", b"\r\n\r\n" + get(), dict(method="GET")),
    ("empty host", head(b"GET / HTTP/1.1", b"Host:"), dict(fields={b"host": b""})),
    ("ipv6 host", head(b"GET / HTTP/1.1", b"Host: [::1]:8"), dict(fields={b"host": b"[::1]:8"})),
    ("1.0 without host", head(b"GET / HTTP/1.0"), dict(version=0, keep_alive=False)),
    ("1.0 keep-alive", head(b"GET / HTTP/1.0", b"Connection: Keep-Alive"), dict(version=0, keep_alive=True)),
    ("1.0 expects nothing", head(b"POST / HTTP/1.0", b"Expect: 100-continue"), dict(expects_continue=False)),
    ("close", get(b"Connection: close"), dict(keep_alive=False)),
    ("close in a list", get(b"Connection: keep-alive, CLOSE"), dict(keep_alive=False)),
    ("close in two lines", get(b"Connection: x", b"connection: close"), dict(keep_alive=False)),
    ("length", post(b"Content-Length: 5"), dict(method="POST", target=b"/api/chat", length=5)),
    ("length zero", post(b"Content-Length: 0"), dict(length=0)),
    ("leading zeros", post(b"Content-Length: 007"), dict(length=7)),
    ("no space after colon", post(b"content-LENGTH:5"), dict(length=5)),
    ("tabs around value", post(b"Content-Length:\t5\t "), dict(length=5)),
    ("underscore is another name", post(b"Content_Length: 9"), dict(length=0)),
    ("chunked", post(b"Transfer-Encoding: chunked"), dict(length=None)),
    ("Chunked in any case", post(b"TRANSFER-ENCODING: \tChunked "), dict(length=None)),
    ("expect", post(b"Content-Length: 9", b"Expect: 100-Continue"), dict(length=9, expects_continue=True)),
    ("body on DELETE", head(b"DELETE /x HTTP/1.0", b"Content-Length: 3"), dict(method="DELETE", length=3)),
    ("escapes stay", get(target=b"/a%2Fb%20c?q=%41"), dict(target=b"/a%2Fb%20c?q=%41", path="/a/b c")),
    ("question mark in query", get(target=b"/a?b?c"), dict(target=b"/a?b?c", path="/a")),
    ("two slashes", get(target=b"//x//y"), dict(target=b"//x//y", path="//x//y")),
    ("dots in names", get(target=b"/v1/models/a..b/.c/d../...;x"), dict(path="/v1/models/a..b/.c/d../...;x")),
    ("dots in the query", get(target=b"/a?x=/../&y=%00"), dict(target=b"/a?x=/../&y=%00", path="/a")),
    ("raw utf-8", get(target=b"/\xc3\xa4"), dict(target=b"/\xc3\xa4")),
    ("absolute", get(target=b"http://gw:8000/api/tags?x=1"), dict(target=b"/api/tags?x=1", path="/api/tags")),
    ("absolute, upper case", get(target=b"HTTPS://GW/a"), dict(target=b"/a")),
    ("absolute without path", get(target=b"http://gw"), dict(target=b"/", path="/")),
    ("absolute, query only", get(target=b"http://gw?x=/y"), dict(target=b"/?x=/y", path="/")),
    ("OPTIONS *", head(b"OPTIONS * HTTP/1.1", b"Host: a"), dict(method="OPTIONS", target=b"*")),
    ("methods keep their case", head(b"brew / HTTP/1.1", b"Host: a"), dict(method="brew")),
    ("h2c offer", get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"), dict(keep_alive=True)),
    ("repeated fields", get(b"Accept: a", b"ACCEPT:b", b"X:"), dict(
        fields={b"host": b"a", b"accept": b"a, b", b"x": b""},
        lines=[(b"host", b"a", b"Host: a"), (b"accept", b"a", b"Accept: a"), (b"accept", b"b", b"ACCEPT:b"),
               (b"x", b"", b"X:")])),
    ("header of 60 KB", get(b"X: " + b"x" * 60_000), dict(length=0)),
    ("longest target", get(target=b"/" * 16_384), dict(target=b"/" * 16_384)),
])
def test_valid_head(raw, expected):
    for found in every_way(raw):
        assert not isinstance(found, ProtocolError), found
        assert {key: getattr(found, key) for key in expected} == expected


# Fields of a POST; | separates lines.
REFUSED_FIELDS = [
    b"Content-Length: 5|Content-Length: 5", b"Content-Length: 5|content-length: 6", b"Content-Length: 5, 5",
    b"Content-Length: +5", b"Content-Length: -5", b"Content-Length: 0x5", b"Content-Length: 5.0",
    b"Content-Length: 5 5", b"Content-Length: 5_0", b"Content-Length: five", b"Content-Length: \xd9\xa5",
    b"Content-Length: \xb2", b"Content-Length:", b"Content-Length: 99999999999999999999",
    b"Content-Length : 5", b"Content-Length\t: 5", b"Transfer-Encoding: chunked|Content-Length: 5",
    b"Content-Length: 5|Transfer-Encoding: chunked", b"Transfer-Encoding: chunked|Transfer-Encoding: chunked",
    b"Transfer-Encoding: chunked|transfer-encoding: identity", b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunkedx", b"Transfer-Encoding: chunked,", b'Transfer-Encoding: "chunked"',
    b"Transfer-Encoding: chunked;q=1", b"Transfer-Encoding:", b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: \xa0chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding:| chunked",
    b"X: y\rContent-Length: 5", b"X: y\nContent-Length: 5", b"X: y\r|Content-Length: 5",
    b"X: y| Content-Length: 5", b"X: y|\tz", b"X: a\x00b", b"X: \x1b[31m", b"X: \x7f",
    b"Content-Length: 55\x08", b"Content-\x00Length: 5", b"Content-Length 5", b": 5", b":", b"(x): 5",
    b"Content-L\xc3\xa4ngth: 5", b'"Host": b', b"Host: a", b"host:",
]
# Targets with a segment `.` or `..` for some server or other.
DOTTED = [
    b"/..", b"/.", b"/../admin/secret", b"/a/../b", b"/a/..", b"/a/./b", b"/a/.?x", b"/..?x=1", b"//../a", b"/%2e%2e/a",
    b"/%2E%2e", b"/.%2e/a", b"/%2e./a", b"/%2e", b"/..%2fa", b"/a%2f..%2Fb", b"/a%2f%2e%2e", b"/a\\..\\b", b"/..\\a",
    b"/a%5c..%5cb", b"/..%5Ca", b"/..;/a", b"/..;x=1/a", b"/..%3b/a", b"/..#a", b"/..%23", b"/..%3fa", b"/%252e%252e/a",
    b"/..%252fa", b"/%25252e./a", b"http://gw/../a", b"http://gw/a/%2e%2e", b"HTTP://gw/..", b"http://gw#/../a",
]
REFUSED_LINES = [
    b"GET / HTTP/2.0", b"GET / HTTP/1.2", b"GET / HTTP/0.9", b"GET /", b"GET / http/1.1", b"GET / HTTP/1.1x",
    b"GET / HTTP/1.10", b"GET / HTTP/1", b"GET / HTTP/01.1", b"GET / HTTP/1.1 ", b" GET / HTTP/1.1",
    b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET /\tHTTP/1.1", b"GET\x0c/ HTTP/1.1",
    b"GET HTTP/1.1", b"GET  HTTP/1.1", b"GET /a b HTTP/1.1", b"GET /a\tb HTTP/1.1", b"GET /a\x00b HTTP/1.1",
    b"GET /a\x7f HTTP/1.1", b"GET /a\rb HTTP/1.1", b"GET /a\nb HTTP/1.1", b"GET api/tags HTTP/1.1",
    b"GET a:443 HTTP/1.1", b"GET http:///x HTTP/1.1", b"GET http:// HTTP/1.1",
    b"GET http:/a HTTP/1.1", b"GET ftp://a/ HTTP/1.1", b"GET * HTTP/1.1", b"options * HTTP/1.1",
    *(b"GET %b HTTP/1.1" % target for target in DOTTED), *(b"GET /a%b HTTP/1.1" % code for code in (
        b"%00", b"/%0d%0aHost:%20evil", b"%1F/", b"%7f")),
    b"GE(T) / HTTP/1.1", b"G\xc3\x89T / HTTP/1.1", b"\x00GET / HTTP/1.1", b"\nGET / HTTP/1.1",
    b"\rGET / HTTP/1.1",
]
REFUSED_HEADS = [
    head(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked"), head(b"GET / HTTP/1.0", b"Host: a b"),
    head(b"GET / HTTP/1.1"), head(b"GET / HTTP/1.1", b"Hostess: a"), head(b"GET / HTTP/1.1", b"Host: a b"),
    head(b"GET / HTTP/1.1", b"Host: a/b"), head(b"GET / HTTP/1.1", b"Host: u@a"),
    head(b"GET / HTTP/1.1", b"Host: a, b"), head(b"GET / HTTP/1.1", b" Host: a"),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    b"GET / HTTP/1.1\nHost: a\n\n", b"GET / HTTP/1.1\r\nHost: a\n\nX: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n\nX: y\r\n\r\n",
]


REFUSED = [post(*lines.split(b"|")) for lines in REFUSED_FIELDS] + [
    head(line, b"Host: a") for line in REFUSED_LINES] + REFUSED_HEADS


@listed("raw", REFUSED)
def test_head_that_can_be_misread_is_refused_and_ends_the_connection(raw):
    assert [(found.status, found.close) for found in every_way(raw)] == [(400, True)] * 4


@pytest.mark.parametrize("line", [b"TRACE / HTTP/1.1", b"TRACE /api/health HTTP/1.1", b"CONNECT a:443 HTTP/1.1",
                                  b"CONNECT / HTTP/1.0", b"TRACE http://gw/ HTTP/1.1"])
def test_method_that_no_gateway_serves_is_refused(line):
    assert [(found.status, found.close) for found in every_way(head(line, b"Host: a"))] == [(405, True)] * 4


TOO_LONG = [
    ("target one too long", get(target=b"/" * 16_385), 414),
    ("target over a whole head", get(target=b"/" * 70_000), 414), ("endless first line", b"A" * 66_000, 414),
    ("one long header", get(b"X: " + b"x" * 66_000), 431),
    ("many fields", get(*[b"X: y"] * 257), 431),
    ("many headers", get(*[b"X-%d: y" % number for number in range(7000)]), 431),
    ("longest target, long head", get(b"X: " + b"x" * 66_000, target=b"/" * 16_384), 431),
]


@table("raw, status", TOO_LONG)
def test_head_that_is_too_long_is_refused(raw, status):
    assert [getattr(found, "status", None) for found in every_way(raw)] == [status] * 4


@listed("raw", [b"GET / HTTP/1.1\r\nX: y\nZ", b"GET / \x00", b"GET / HTTP/1.1\rH", b"GET / HTTP/1.1\r\n H"])
def test_illegal_byte_is_refused_before_the_head_is_complete(raw):
    assert [feed_head(raw, step).status for step in (1, 2, 99)] == [400] * 3


@listed("raw", [b"", b"\r", b"\r\n", b"GET / HTTP/1.1\r", b"GET / HTTP/1.1\r\nHost: a\r\n\r"])
def test_incomplete_head_is_waited_for(raw):
    assert feed_head(raw, 1) is None


# -----------------------------------------------------------------------------
# Wire: response heads
# -----------------------------------------------------------------------------

@pytest.mark.parametrize("raw, status, length, keep_alive", [
    (b"HTTP/1.1 200 OK|Content-Length: 5", 200, 5, True),
    (b"HTTP/1.1 200 OK|Content-Length: 0", 200, 0, True),
    (b"HTTP/1.1 200 OK|Transfer-Encoding: chunked", 200, None, True),
    (b"HTTP/1.1 200 OK|Transfer-Encoding: chunked|Connection: close", 200, None, False),
    (b"HTTP/1.1 200 OK", 200, -1, False), (b"HTTP/1.0 200 OK|Connection: keep-alive", 200, -1, False),
    (b"HTTP/1.0 200 OK|Content-Length: 2", 200, 2, False),
    (b"HTTP/1.0 200 OK|Content-Length: 2|Connection: keep-alive", 200, 2, True),
    (b"HTTP/1.1 100 Continue", 100, 0, True), (b"HTTP/1.1 103 Early Hints|Link: </a>", 103, 0, True),
    (b"HTTP/1.1 204 No Content", 204, 0, True),
    (b"HTTP/1.1 304 Not Modified|Content-Length: 99", 304, 0, True),
    (b"HTTP/1.1 500|Content-Length: 0", 500, 0, True), (b"HTTP/1.1 200 |Content-Length: 0", 200, 0, True),
    (b"HTTP/1.1 404 o\xc3\xb9|Content-Length: 0", 404, 0, True),
    (b"HTTP/1.1 599 X|Content-Length: 1", 599, 1, True),
])
def test_response_head_tells_where_the_answer_ends(raw, status, length, keep_alive):
    found = sollol.parse_response(head(*raw.split(b"|")), "GET")
    assert (found.status, found.length, found.keep_alive) == (status, length, keep_alive)
    assert found.reason == raw.split(b"|")[0][13:]
    assert sollol.parse_response(head(*raw.split(b"|")), "HEAD").length == 0


@listed("raw", [
    b"http/1.1 200 OK", b"HTTP/2 200", b"HTTP/1.2 200 OK", b"HTTP/1.1 99 X", b"HTTP/1.1 600 X",
    b"HTTP/1.1 2000 X", b"HTTP/1.1 two OK", b"HTTP/1.1  OK", b"HTTP/1.1  200 OK", b"ICY 200 OK", b"<html>",
    b"", b"HTTP/1.1 200 O\rK", b"HTTP/1.1 200 OK\nX: y", b"HTTP/1.1 200 OK\x00", b"HTTP/1.1 200 OK|X: y| z",
    b"HTTP/1.1 200 OK|Content-Length: -1", b"HTTP/1.1 200 OK|Transfer-Encoding: chunked|Content-Length: 5",
    b"HTTP/1.1 200 OK|Transfer-Encoding: gzip", b"HTTP/1.1 200 OK|Content-Length: 5|Content-Length: 5",
    b"HTTP/1.1 200 OK|Content-Length : 5", b"HTTP/1.0 200 OK|Transfer-Encoding: chunked",
])
def test_garbage_is_no_response(raw):
    with pytest.raises(ProtocolError):
        sollol.parse_response(head(*raw.split(b"|")), "GET")


# -----------------------------------------------------------------------------
# Wire: bodies
# -----------------------------------------------------------------------------

def decode(decoder, data, step):
    """Return (payload, bytes used, done) after feeding `data`, `step` bytes at a time, until done."""
    payload, total = b"", 0
    for at in range(0, len(data), step):
        part, used = decoder.feed(data[at:at + step])
        payload += part
        total += used
        if decoder.done:
            break
        assert used == len(data[at:at + step])
    return payload, total, decoder.done


HELLO, END = b"5\r\nhello\r\n", b"0\r\n\r\n"


@pytest.mark.parametrize("length, data, payload, left_over, done", [
    (0, b"", b"", b"", True), (5, b"hello", b"hello", b"", True), (5, b"hel", b"hel", b"", False),
    (5, b"helloGET /", b"hello", b"GET /", True), (-1, b"hello", b"hello", b"", False),
    (None, END, b"", b"", True), (None, HELLO + b"1\r\n!\r\n" + END, b"hello!", b"", True),
    (None, b"000000\r\n\r\n", b"", b"", True), (None, b"0000" + HELLO + END, b"hello", b"", True),
    (None, b"A\r\n0123456789\r\n" + END, b"0123456789", b"", True),
    (None, b"b\r\n0123456789a\r\n" + END, b"0123456789a", b"", True),
    (None, b"5;a=b;c\r\nhello\r\n0;z\r\n\r\n", b"hello", b"", True),
    (None, HELLO + b"0\r\nX: y\r\nZ: z\r\n\r\n", b"hello", b"", True),
    (None, b"4\r\n\r\n\r\n\r\n" + END, b"\r\n\r\n", b"", True),
    (None, HELLO + END + b"GET /", b"hello", b"GET /", True), (None, HELLO + b"5", b"hello", b"", False),
    (None, b"5\r\nhel", b"hel", b"", False), (None, b"5\r\nhello", b"hello", b"", False),
    (None, HELLO + b"0\r\n", b"hello", b"", False), (None, HELLO + b"0\r\nX: y\r\n", b"hello", b"", False),
    (None, b"fffffffffff\r\nhello", b"hello", b"", False),
])
def test_body_is_decoded_to_its_end_and_not_beyond(length, data, payload, left_over, done):
    for step in (1, 2, 3, 7, max(1, len(data))):
        assert decode(sollol.body_decoder(length), data, step) == (payload, len(data) - len(left_over), done)


BAD_CHUNKS = [
    b"\r\nhello", b"g\r\n", b"0x5\r\nhello\r\n", b"-5\r\nhello\r\n", b"+5\r\nhello\r\n", b" 5\r\nhello\r\n",
    b"5 \r\nhello\r\n", b"1_0\r\n", b";a\r\n", b"0000000000000005\r\nhello\r\n", b"ffffffffffffffffffff\r\n",
    b"5\nhello\r\n", b"5;a\rb\r\nhello\r\n", b"5\r\r\nhello\r\n", b"5\r\nhello!\r\n0\r\n\r\n",
    b"5\r\nhell\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"0\r\n\n", b"0\r\nX: y\n\r\n",
    b"5;" + b"a" * 5000 + b"\r\n", b"0" * 5000, b"0\r\nX: " + b"y" * 5000 + b"\r\n\r\n",
    b"0\r\n" + b"X: y\r\n" * 4000 + b"\r\n",
]


@listed("data", BAD_CHUNKS)
def test_malformed_chunks_are_refused(data):
    for step in (1, 3, len(data)):
        with pytest.raises(ProtocolError):
            decode(sollol.ChunkedBody(), data, step)


@table("pieces, expected", [
    ("whole plain chunks", [HELLO, HELLO + HELLO, END], [True, True, True]),
    ("all in one", [HELLO + END], [True]),
    ("cut in the size", [b"5", b"\r\nhello\r\n", HELLO], [False, False, True]),
    ("cut in the data", [b"5\r\nhe", b"llo\r\n", HELLO], [False, False, True]),
    ("cut before the line end", [b"5\r\nhello", b"\r\n", HELLO], [False, False, True]),
    ("cut in the line end", [b"5\r\nhello\r", b"\n", HELLO], [False, False, True]),
    ("cut in the end", [HELLO + b"0\r\n", b"\r\n"], [False, False]),
    ("after the end", [END, b"more"], [True, False]),
    ("extension", [b"5;x\r\nhello\r\n", HELLO], [False, True]), ("trailer", [b"0\r\nX: y\r\n\r\n"], [False]),
])
def test_verbatim_tells_whether_bytes_can_be_handed_on_as_they_are(pieces, expected):
    decoder = sollol.ChunkedBody()
    assert [decoder.feed(piece) and decoder.verbatim for piece in pieces] == expected


def random_body(rng):
    """Return (payload, a random chunked coding of it)."""
    payload, coded = b"", b""
    for _ in range(rng.randrange(6)):
        part = rng.choice([b"\r\n", b"0\r\n\r\n", b'{"a":1}\n', rng.randbytes(rng.randrange(1, 40))])
        size = rng.choice([b"%x", b"%X", b"00%x"]) % len(part)
        payload += part
        coded += size + rng.choice([b"", b"", b";x=y"]) + b"\r\n" + part + b"\r\n"
    return payload, coded + rng.choice([END, END, b"0\r\nT: u\r\n\r\n"])


def test_any_split_gives_the_same_payload_and_verbatim_is_never_a_lie():
    rng = random.Random(0)
    for _ in range(500):
        payload, coded = random_body(rng)
        data, decoder, found, at = coded + b"GET", sollol.ChunkedBody(), b"", 0
        while at < len(data) and not decoder.done:
            piece = data[at:at + rng.choice([1, 2, 5, 20, 90])]
            part, used = decoder.feed(piece)
            found, at = found + part, at + used
            if decoder.verbatim:
                again = sollol.ChunkedBody()
                assert again.feed(piece[:used]) == (part, used), data
                assert all(it.done or it.state == it.SIZE and not it.line for it in (decoder, again)), data
        assert (found, at, decoder.done) == (payload, len(coded), True), data


def test_chunk_of_nothing_is_nothing():
    assert [sollol.chunk(b""), sollol.chunk(b"0123456789")] == [b"", b"a\r\n0123456789\r\n"]


# -----------------------------------------------------------------------------
# Wire: heads that are handed on
# -----------------------------------------------------------------------------

PLAIN = NodeSettings("n", "node", 11434, host_header="node:11434")
GUARDED = PLAIN._replace(prefix="/ollama", token="SECRET")
HOST, TOKEN = b"Host: node:11434", b"Authorization: Bearer SECRET"


def sent(raw, settings=PLAIN, length=0):
    """Return the lines of the head that a node gets for a client's head."""
    rendered = sollol.render_request(sollol.parse_request(raw), settings, length)
    assert rendered.endswith(b"\r\n\r\n")
    return rendered[:-4].split(b"\r\n")


def test_only_end_to_end_fields_are_handed_on_as_they_were_sent():
    raw = get(b"Connection: close, X-Mine , keep-alive", b"Keep-Alive: 5", b"TE: trailers", b"Trailer: X",
              b"Upgrade: h2c", b"HTTP2-Settings: AA", b"Proxy-Authorization: x", b"Proxy-Authenticate: y",
              b"Proxy-Connection: z", b"x-mine: secret", b"ACCEPT:\t*/*  ", b"Accept: two",
              b"User-Agent: \xe4", b"Expect: 100-continue", b"X-Priority: high", b"Authorization: Bearer k",
              b"Accept-Encoding: gzip, br", b"Content-Encoding: zstd", b"Origin: http://localhost")
    assert sent(raw) == [b"GET / HTTP/1.1", HOST, b"ACCEPT:\t*/*  ", b"Accept: two", b"User-Agent: \xe4",
                         b"Authorization: Bearer k", b"Content-Encoding: zstd"]


@table("raw, settings, length, first, last", [
    ("token is ours", post(b"authorization: Bearer k"), GUARDED, 3, b"POST /ollama/api/chat HTTP/1.1",
     [HOST, TOKEN, b"Content-Length: 3"]),
    ("length is of what is sent", post(b"Content-Length: 9"), PLAIN, 8, b"POST /api/chat HTTP/1.1",
     [HOST, b"Content-Length: 8"]),
    ("chunked is decoded", post(b"Transfer-Encoding: chunked"), PLAIN, 8, b"POST /api/chat HTTP/1.1",
     [HOST, b"Content-Length: 8"]),
    ("chunked stays", post(b"Transfer-Encoding: chunked"), PLAIN, None, b"POST /api/chat HTTP/1.1",
     [HOST, b"Transfer-Encoding: chunked"]),
    ("empty POST has a length", post(), PLAIN, 0, b"POST /api/chat HTTP/1.1", [HOST, b"Content-Length: 0"]),
    ("empty GET has none", get(), PLAIN, 0, b"GET / HTTP/1.1", [HOST]),
    ("body on DELETE", head(b"DELETE /x HTTP/1.0", b"Content-Length: 2"), PLAIN, 2, b"DELETE /x HTTP/1.1",
     [HOST, b"Content-Length: 2"]),
    ("bytes of the target stay", get(target=b"/a%2fb//%C3%A4?x=%20&y=+\xff"), GUARDED, 0,
     b"GET /ollama/a%2fb//%C3%A4?x=%20&y=+\xff HTTP/1.1", [HOST, TOKEN]),
    ("absolute becomes origin form", get(target=b"http://gw/a?b"), PLAIN, 0, b"GET /a?b HTTP/1.1", [HOST]),
    ("OPTIONS *", head(b"OPTIONS * HTTP/1.1", b"Host: a"), PLAIN, 0, b"OPTIONS * HTTP/1.1", [HOST]),
    ("listed length", post(b"Connection: content-length, host", b"Content-Length: 2"), PLAIN, 2,
     b"POST /api/chat HTTP/1.1", [HOST, b"Content-Length: 2"]),
])
def test_request_is_framed_anew_for_the_node(raw, settings, length, first, last):
    assert sent(raw, settings, length) == [first, *last]


OURS = sollol.via_of("abc")


@table("given, via", [
    ("first", b"", b"1.1 sollol (abc)"), ("behind a proxy", b"1.1 nginx", b"1.1 nginx, 1.1 sollol (abc)"),
    ("behind others", b"1.1 sollol (abd), 1.0 x", b"1.1 sollol (abd), 1.0 x, 1.1 sollol (abc)"),
    ("own id as another's name", b"1.1 abc", b"1.1 abc, 1.1 sollol (abc)"),
    ("many proxies", b"1.1 p, " * 30 + b"1.1 q", b"1.1 p, " * 30 + b"1.1 q, 1.1 sollol (abc)"),
    ("eighth gateway", b", ".join([b"1.1 sollol (x)"] * 7), b", ".join([b"1.1 sollol (x)"] * 7 + [OURS])),
    ("ninth gateway", b", ".join([b"1.1 sollol (x)"] * 8), None), ("without comments", b"1.1 sollol," * 8, None),
    ("seen before", OURS, None), ("seen before others", b"1.1 a, " + OURS + b", 1.1 sollol (x)", None),
])
def test_request_carries_where_it_has_been_and_no_further_than_once_around(given, via):
    if via is None:
        with pytest.raises(Refusal) as caught:
            sollol.via_after(given, OURS)
        assert caught.value.status == 508 and caught.value.close
        return
    found = sollol.parse_request(get(b"Connection: via", b"Via: " + given))
    found.via = sollol.via_after(given, OURS)
    assert sollol.render_request(found, PLAIN, 0).split(b"\r\n")[1:] == [HOST, b"Via: " + via, b"", b""]


def test_response_is_framed_anew_for_the_client():
    found = sollol.parse_response(head(
        b"HTTP/1.0 200 Fine", b"Content-Length: 5", b"Connection: X-Hop", b"X-Hop: 1", b"Keep-Alive: 9",
        b"Access-Control-Allow-Origin: *", b"access-control-expose-headers: x", b"X-SOLLOL-Node: behind",
        b"X-Request-Id: its", b"Trailer: X", b"Date: then", b"Server: it", b"Content-Encoding: gzip",
        b"Content-Type:  a/b", b"Set-Cookie: x", b"Set-Cookie: y", b"Upgrade: h2c"), "GET")
    assert sollol.render_response(found, [b"X-Added: 1"], [b"Transfer-Encoding: chunked"]) == head(
        b"HTTP/1.1 200 Fine", b"Date: then", b"Server: it", b"Content-Encoding: gzip", b"Content-Type:  a/b",
        b"Set-Cookie: x", b"Set-Cookie: y", b"X-Added: 1",
        b"Transfer-Encoding: chunked")


# -----------------------------------------------------------------------------
# Wire: mutations
# -----------------------------------------------------------------------------

SPICE = [b"\r\n", b"\n", b"\r", b"\x00", b" ", b"\t", b":", b",", b";", b"0", b"5", b"f", b"\r\n\r\n",
         b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: host\r\n", b"chunked", b"http://x"]


def mutated(rng, data):
    """Return `data` after a few random deletions, copies, swaps and insertions."""
    for _ in range(rng.randrange(1, 4)):
        at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        data = rng.choice([
            data[:at] + data[min(to, at + 5):],
            data[:at] + rng.choice(SPICE) + data[at:],
            data[:at] + rng.choice(SPICE) + data[at + 1:],
            data[:at] + rng.randbytes(1) + data[at + 1:],
            data[:to] + data[at:to] + data[to:]])
    return data


def only_refused(call, *given, data):
    """Return the call's result, or None after a ProtocolError; anything else raised fails the test."""
    try:
        return call(*given)
    except ProtocolError:
        return None
    except Exception as error:
        pytest.fail(f"{error!r} for {data!r}")


def test_mutated_heads_are_refused_or_mean_the_same_to_the_node():
    rng = random.Random(1)
    seeds = [get(b"Accept: */*"), post(b"Content-Length: 5"), get(target=b"http://gw:8000/a?b=c"),
             post(b"Transfer-Encoding: chunked", b"Connection: te, x"), head(b"GET /%20 HTTP/1.0")]
    for _ in range(2000 * FUZZ):
        raw = mutated(rng, rng.choice(seeds))
        found, parts = (only_refused(feed_head, raw, step, data=raw)
                        for step in (len(raw) or 1, rng.randrange(1, 20)))
        assert getattr(found, "status", found) == getattr(parts, "status", parts), raw
        if isinstance(found, sollol.RequestHead):
            again = sollol.parse_request(sollol.render_request(found, PLAIN, found.length))
            for name in ("method", "target", "length"):
                assert getattr(again, name) == getattr(found, name), raw


def test_mutated_responses_raise_nothing_but_protocol_errors():
    rng = random.Random(2)
    seeds = [head(b"HTTP/1.1 200 OK", line) for line in (b"Content-Length: 5", b"Transfer-Encoding: chunked")]
    for _ in range(2000 * FUZZ):
        raw = mutated(rng, rng.choice(seeds))
        end = only_refused(sollol.find_head, raw, data=raw)
        if end:
            only_refused(sollol.parse_response, raw[:end], "GET", data=raw)


def test_mutated_chunks_raise_nothing_but_protocol_errors_and_any_split_gives_the_same():
    rng = random.Random(3)
    for _ in range(2000 * FUZZ):
        data = mutated(rng, random_body(rng)[1])
        found = {only_refused(decode, sollol.ChunkedBody(), data, step, data=data)
                 for step in (1, rng.randrange(2, 9), len(data) or 1)}
        assert len(found) == 1, data


# -----------------------------------------------------------------------------
# Reading a request
# -----------------------------------------------------------------------------

def asked(path="/api/chat", body=b"", method="POST", **fields):
    """Return the RequestSpec of a body (bytes, or a value for JSON) on a path, with header fields."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {name.replace("_", "-").encode(): value for name, value in fields.items()}
    given = sollol.RequestHead(method, path.encode(), path, 1, fields, [], len(body), True, False)
    route = sollol.ROUTES[method, path]
    return sollol.read_spec(given, route, sollol.at_once(sollol.reading_steps(given, route, body)), "10.0.0.1")


@pytest.mark.parametrize("name, full", [
    ("llama3.2", "llama3.2:latest"), ("llama3.2:latest", "llama3.2:latest"),
    ("library/llama3.2", "llama3.2:latest"),
    ("registry.ollama.ai/library/llama3.2:latest", "llama3.2:latest"), (" LLaMa3.2 ", "llama3.2:latest"),
    ("https://registry.ollama.ai/library/llama3.2", "llama3.2:latest"), ("Llama3.2:3B", "llama3.2:3b"),
    ("registry.ollama.ai/me/x", "me/x:latest"), ("me/x:Q4", "me/x:q4"),
    ("hf.co/u/m:Q4_K_M", "hf.co/u/m:q4_k_m"), ("hf.co/u/m", "hf.co/u/m:latest"),
    ("hf.co/library/m", "hf.co/library/m:latest"), ("", ""), ("  ", ""),
    ("host:5000/me/x", "host:5000/me/x:latest"), ("host:5000/me/x:1", "host:5000/me/x:1"),
    ("x:cloud", "x:cloud"), ("llama3.2:local", "llama3.2:latest"), ("llama3.2:3b:local", "llama3.2:3b"),
    ("x:20b-cloud", "x:20b-cloud"), ("x:20b:Cloud", "x:20b-cloud"), ("me/x: local", "me/x:latest"),
    ("host:5000/x:cloud", "host:5000/x:cloud"), ("x@sha256:1f", "x@sha256:1f"),
])
def test_names_of_one_model_are_one_name(name, full):
    assert sollol.canonical(name) == full == sollol.canonical(full)


@pytest.mark.parametrize("name, cloud", [("x:cloud", True), ("gpt-oss:120b-cloud", True), ("cloud", False),
                                         ("x:cloudy", False), ("x-cloud", False)])
def test_cloud_models_are_told_by_their_tag(name, cloud):
    assert sollol.is_cloud(sollol.canonical(name)) == cloud


@pytest.mark.parametrize("text, meant, others", [
    ("llama3.2", ["llama3.2", "LLAMA3.2:latest", "library/llama3.2", "llama3.2:local"], ["llama3.2:1b", "me/llama3.2"]),
    ("qwen3:*", ["qwen3", "qwen3:8b", "Qwen3:30B", "qwen3:8b:local", "qwen3:cloud"], ["qwen3-coder:8b", "me/qwen3"]),
    ("Registry.Ollama.ai/library/QWEN3:*", ["qwen3:8b"], ["qwen2:8b"]), ("*coder", ["qwen3-coder"], ["qwen3-coder:1b"]),
    ("*coder*", ["coder", "me/x-coder:1b"], ["code"]), ("hf.co/me/*:Q4*", ["hf.co/Me/x:Q4_K_M"], ["hf.co/me/x:Q8_0"]),
    ("hf.co/*", ["hf.co/a/b"], ["x/hf.co/a"]), ("*:8b", ["a:8b", "me/a:8b"], ["a:8b-q4", "a"]), ("*", ["a", ""], []),
    ("a*a", ["aa", "aba"], ["a"]), ("a*b*c:1", ["abc:1", "axbybc:1"], ["acb:1", "abc"]), ("a:*b*b", ["a:bb"], ["a:b"]),
    ("a.c", ["a.c"], ["abc"]), ("*a*b*", ["ab", "xaxbx"], ["ba"])])
def test_pattern_means_models_by_their_canonical_names(text, meant, others):
    pattern = sollol.parse_pattern(text)
    assert [name for name in meant + others if sollol.is_meant(sollol.canonical(name), pattern)] == meant


def test_pattern_is_read_as_the_regex_that_it_stands_for():
    rng = random.Random(5)
    for _ in range(3000):
        pattern, name = ("".join(rng.choices("ab*:", k=rng.randrange(8))) for _ in range(2))
        regex = ".*".join(map(re.escape, pattern.split("*")))
        assert sollol.is_meant(name, pattern) == bool(re.fullmatch(regex, name)), (name, pattern)


def test_no_name_makes_a_pattern_slow():
    before_s = time.perf_counter()
    for _ in range(20):
        assert not sollol.is_meant("a" * sollol.MAX_NAME_CHARS, "*a" * 100 + "*b")
    assert time.perf_counter() - before_s < 0.5


# How many names some server could read: of a route, its content type, the rest of its target, and a body. [] = a body
# that names none, None = it cannot be told.
FORM = b"multipart/form-data; boundary=B"


def part(name, value, more=b""):
    return b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name, more, value)


CHAT, OPENAI = "/api/chat", "/v1/chat/completions"
AUDIO, IMAGES = "/v1/audio/transcriptions", "/v1/images/edits"
SPEECH = part(b"file", b"RIFF\r\n\r\n\x00--", b'; filename="a \\"b\\" c.wav"\r\nContent-Type: audio/wav')


def named(path, body, kind=b"", query=b""):
    given = sollol.RequestHead("POST", path.encode() + query, path, 1, {b"content-type": kind}, [], 0, True, False)
    route = sollol.ROUTES["DELETE" if path == "/api/delete" else "POST", path]
    names = sollol.at_once(sollol.named_models(given, route, body))
    if len(body) <= sollol.SHORT_BODY_BYTES:        # as the reader of longer ones
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sollol, "SHORT_BODY_BYTES", -1)
            assert sollol.at_once(sollol.named_models(given, route, body)) == names
    return names


@table("path, body, names", [
    ("model", CHAT, b'{"model":"a"}', ["a"]), ("no model", CHAT, b'{"name":"a"}', [""]),
    ("twice", CHAT, b'{"model":"a","model":"b"}', ["a", "b"]),
    ("any case", CHAT, b'{"MODEL":"a","Model":"b"}', ["a", "b"]),
    ("null leaves the former", CHAT, b'{"model":"a","model":null}', ["a"]), ("null", CHAT, b'{"model":null}', [""]),
    ("escaped key", CHAT, rb'{"m\u006fdel":"a"}', ["a"]), ("escaped name", CHAT, rb'{"model":"\u0061"}', ["a"]),
    ("trailing", CHAT, b'{"model":"a"}{"model":"b"}', ["a"]),
    ("deeper", CHAT, b'{"x":{"model":"b"},"model":"a"}', ["a"]),
    ("in a text", CHAT, rb'{"x":"\",\"model\":\"b","model":"a"}', ["a"]),
    ("number", CHAT, b'{"model":5}', None), ("list", CHAT, b'{"model":["a"]}', None), ("nothing", CHAT, b"", None),
    ("array", CHAT, b'[{"model":"a"}]', None), ("array of pairs", CHAT, b'[["model","a"]]', None),
    ("cut", CHAT, b'{"model":"a"', None),
    ("zstd", CHAT, b"(\xb5/\xfd", None),
    ("gzip", CHAT, gzip.compress(b'{"model":"a"}'), None), ("form of a chat", CHAT, part(b"model", b"a"), None),
    ("long", CHAT, b'{"model":"%b"}' % (b"a" * 513), None),
    ("very long", CHAT, b'{"model":"%b"}' % (b"a" * 99_999), None),
    ("byte order mark", CHAT, b'\xef\xbb\xbf{"model":"a"}', None),
    ("more than is looked at", CHAT, b'{"model":"a",%b"model":"b"}' % (b'"x":1,' * 20_000), None),
    ("long body", CHAT, b'{"model":"a","x":"%b","model":"b"}' % (b"y" * 3_000_000), ["a", "b"]),
    ("show", "/api/show", b'{"model":"a","name":"b"}', ["a", "b"]), ("push", "/api/push", b'{"name":"a"}', ["a"]),
    ("delete", "/api/delete", b'{"name":"a","model":""}', ["a", ""]),
    ("copy", "/api/copy", b'{"source":"a","destination":"b","model":"c"}', ["a", "b"]),
    ("copy, as Go compares", "/api/copy", '{"source":"a","\u017fource":"b","de\u017ftination":"c"}'.encode(),
     ["a", "b", "c"]),
    ("no letter of it", "/api/copy", '{"destination":"a","de\ufb06ination":"b"}'.encode(), ["a"]),
    ("create", "/api/create", b'{"model":"a","from":"b","files":{"c":"d"}}', ["a", "b"]),
    ("create, as older servers", "/api/create", b'{"name":"a","modelfile":"FROM b"}', ["a", "FROM b"]),
    ("account", "/api/me", b'{"model":"a"}', []), ("search", "/api/experimental/web_search", b'{"model":"a"}', []),
    ("image", "/v1/images/generations", b'{"model":"a"}', ["a"]), ("edit as JSON", IMAGES, b'{"model":"a"}', ["a"])])
def test_every_name_that_some_server_could_read_is_looked_at(path, body, names):
    assert named(path, body) == names


@table("body, kind, query, names", [
    ("plain", SPEECH + part(b"model", b"a") + b"--B--\r\n", FORM, b"", ["a"]),
    ("first", part(b"model", b"a") + SPEECH + b"--B--", FORM, b"", ["a"]),
    ("quoted", part(b"model", b"a") + b"--B--", b'multipart/form-data; boundary="B"', b"", ["a"]),
    ("with a charset", part(b"model", b"a") + b"--B--", b"Multipart/Form-Data;charset=utf-8;boundary=B", b"", ["a"]),
    ("twice", part(b"model", b"a") + part(b"model", b"b") + b"--B--", FORM, b"", ["a", "b"]),
    ("as a file", part(b"model", b"a", b'; filename=""') + b"--B--", FORM, b"", ["a"]),
    ("none", SPEECH + b"--B--", FORM, b"", [""]), ("empty", part(b"model", b"") + b"--B--", FORM, b"", [""]),
    ("query", part(b"model", b"a") + b"--B--", FORM, b"?x=1&mode%6c=b+c&model=", ["b c", "", "a"]),
    ("name as a word", b"--B\r\ncontent-disposition:form-data;name=model\r\n\r\na\r\n--B--", FORM, b"", ["a"]),
    ("name in a file's name", part(b"x", b"a", b'; filename="; name=model"') + part(b"model", b"b") + b"--B--", FORM,
     b"", ["b"]),
    ("no end", part(b"model", b"a"), FORM, b"", None), ("cut", part(b"model", b"a") + b"--B", FORM, b"", None),
    ("no first boundary", b"xxB" + part(b"model", b"a")[3:] + b"--B--", FORM, b"", None),
    ("preamble", b"x\r\n" + part(b"model", b"a") + b"--B--", FORM, b"", None),
    ("bare LF", part(b"model", b"a").replace(b"\r", b"") + b"--B--", FORM, b"", None),
    ("bare LF before", part(b"x", b"a\n" + part(b"model", b"b")) + b"--B--", FORM, b"", None),
    ("bare LF in a head", part(b"x", b"a", b"\n\nb") + b"--B--", FORM, b"", None),
    ("bare LF in another field", part(b"x", b"a").replace(
        b"\r\nC", b'\r\nX: y\nContent-Disposition: form-data; name="model"\r\nC') + b"--B--", FORM, b"", None),
    ("folded other field", part(b"x", b"a", b"\r\n\tX: y") + b"--B--", FORM, b"", None),
    ("space behind the boundary", part(b"model", b"a").replace(b"--B", b"--B ") + b"--B--", FORM, b"", None),
    ("longer boundary", part(b"model", b"a").replace(b"--B", b"--BC") + b"--BC--", FORM, b"", None),
    ("behind the end", part(b"model", b"a") + b"--B--\r\n" + part(b"model", b"b"), FORM, b"", None),
    ("folded", part(b"model", b"a", b";\r\n name=x") + b"--B--", FORM, b"", None),
    ("two names", part(b"x", b"a", b'; name="model"') + b"--B--", FORM, b"", None),
    ("encoded name", part(b"x", b"a").replace(b'name="x"', b"name*=utf-8''model") + b"--B--", FORM, b"", None),
    ("two dispositions", part(b"x", b"a", b'\r\nContent-Disposition: form-data; name="model"') + b"--B--", FORM, b"",
     None),
    ("quoted-printable", part(b"model", b"=61", b"\r\nContent-Transfer-Encoding: Quoted-Printable") + b"--B--", FORM,
     b"", None),
    ("no head", b"--B\r\n\r\nx\r\n--B--", FORM, b"", None),
    ("two boundaries", part(b"model", b"a") + b"--B--", b"multipart/form-data; xboundary=B; boundary=C", b"", None),
    ("two types", part(b"model", b"a") + b"--B--", FORM + b", multipart/form-data; boundary=C", b"", None),
    ("no boundary", part(b"model", b"a") + b"--B--", b"multipart/form-data", b"", None),
    ("JSON as a form", b'{"model":"a"}', FORM, b"", None),
    ("form as JSON", part(b"model", b"a"), b"text/plain", b"", None),
    ("very many parts", part(b"x", b"a") * 1001 + b"--B--", FORM, b"", None)])
def test_form_whose_model_servers_could_read_in_two_ways_names_none(body, kind, query, names):
    assert named(AUDIO, body, kind, query) == names


def go_names(body, fields):
    """Return what Go's reader takes for the values of some fields: the last text, which null does not replace."""
    found = {}

    def note(pairs):
        for key, value in pairs:
            if value is not None and key.lower().replace("\u017f", "s") in fields:
                found[key.lower().replace("\u017f", "s")] = value
        return dict(pairs)

    value, _ = json.JSONDecoder(object_pairs_hook=lambda pairs: pairs).raw_decode(body.decode())
    note(value)
    return set(found.values())


def test_whatever_go_reads_as_a_name_is_looked_at():
    rng = random.Random(8)
    keys = "model", "Model", "MODEL", "name", "source", "\u017fource", "destination", "x", 'a"b', "a\\"
    for _ in range(2000):
        pairs = [(rng.choice(keys), rng.choice(("a", "b", None, "c\\", 'd"', "{[", "\u00e4"))) for _ in range(5)]
        texts = [f"{json.dumps(key)}:{json.dumps(value, ensure_ascii=rng.random() < 0.5)}" for key, value in pairs]
        body = ("{" + rng.choice((",", " ,\n", ', "y":[{"model":"no"}],')).join(texts) + "}").encode()
        for path, fields in (("/api/show", ("model", "name")), ("/api/copy", ("source", "destination"))):
            assert go_names(body, fields) <= set(named(path, body)), body


@table("path, name, text", [
    ("chat", CHAT, "X", "model 'X' not found"),
    ("embed", "/api/embed", "x", 'model "x" not found, try pulling it first'),
    ("old embed", "/api/embeddings", "x", 'model "x" not found, try pulling it first'),
    ("quote", "/api/embed", 'x"', 'model "x\\"" not found, try pulling it first'),
    ("copy", "/api/copy", "x", 'model "x" not found'), ("show", "/api/show", "Library/X", "model 'X:latest' not found"),
    ("show a tag", "/api/show", "hf.co/a/X:Q4", "model 'hf.co/a/X:Q4' not found"),
    ("pull", "/api/pull", "x", "pull model manifest: file does not exist")])
def test_model_that_is_not_there_is_told_in_ollamas_words(path, name, text):
    assert sollol.missing_text(sollol.ROUTES["POST", path].kind, name) == text


@pytest.mark.parametrize("body, model", [
    (b'{"model":"m"}', "m"), (b'{"name":"m"}', "m"), (b'{"MODEL":"m"}', "m"),
    (b'{"model":"a","model":"b"}', "b"), (b'{"model":"a","Model":"b"}', "b"),
    (b'{"model":"m"} {"model":"x"} \x00', "m"), (b'\r\n\t {"model":"m"}', "m"),
    (rb'{"mod\u0065l":"\u006d"}', "m"), (b'{"model":5}', None), (b'{"model":["m"]}', None),
    (b'{"model":null}', None), (b'{"model":""}', None), (b"", None), (b" \n", None), (b'{"model":"m"', None),
    (b'[{"model":"m"}]', None), (b"5", None), (b'"model"', None), (b'\xef\xbb\xbf{"model":"m"}', None),
    (b"\x28\xb5\x2f\xfd", None), (b"model=m", None), (b'{"model":"m","n":' + b"9" * 5000 + b"}", None),
    (b"[" * 100_000, None), (b'{"model":"m","a":' * 100_000, None),
    (b'{"model":"m","prompt":"\xff"}', "m"), (b'{"model":"m"}\xff', "m"),
], ids=lambda value: repr(value)[:50])
def test_model_is_read_as_ollama_reads_it(body, model):
    for path in ("/api/generate", "/v1/chat/completions", "/api/show"):
        assert asked(path, body).model == (model and model + ":latest")


def test_copy_names_its_model_source():
    assert asked("/api/copy", {"source": "a", "destination": "b"}).model == "a:latest"


STREAMING = {"/api/generate", "/api/chat", "/api/pull", "/api/push", "/api/create"}
EMBEDDING = {"/api/embed", "/api/embeddings", "/v1/embeddings"}
NOT_JSON = {"raw", "account", "transcribe"}
READ = [(method, path) for (method, path), route in sollol.ROUTES.items() if route.kind not in NOT_JSON]


@pytest.mark.parametrize("method, path", READ)
def test_what_a_path_means_when_the_body_does_not_say(method, path):
    spec = asked(path, b"{}", method)
    assert (spec.stream, spec.embeds) == (path in STREAMING, path in EMBEDDING)
    assert spec.inference == (spec.where is Where.QUEUED) and spec.family is sollol.family_of(path)
    assert (spec.priority, spec.max_output, spec.options, spec.client) == (5, None, (), "10.0.0.1")
    for stream in (True, False, "yes", 1, None, []):
        expected = stream if isinstance(stream, bool) else path in STREAMING
        assert asked(path, {"stream": stream}, method).stream is expected


@pytest.mark.parametrize("path, family", [
    ("/api/chat", "ollama"), ("/", "ollama"), ("/v1/chat/completions", "openai"), ("/v1/models/x", "openai"),
    ("/v1/messages", "anthropic"), ("/v1/messages/count_tokens", "anthropic"), ("/v10/x", "ollama")])
def test_error_shape_follows_the_path(path, family):
    assert sollol.family_of(path) is Family(family)


@pytest.mark.parametrize("path, body, chars", [
    ("/api/generate", {"prompt": "abc", "system": "de"}, 5), ("/api/generate", {"prompt": "x" * 5000}, 5000),
    ("/api/chat", {"messages": [{"content": "abc"}, {"content": "d"}, {}, "x", None]}, 4),
    ("/api/chat", {"messages": [{"content": "abc", "images": ["A" * 9999]}]}, 3),
    ("/v1/chat/completions", {"messages": [{"content": [
        {"type": "text", "text": "ab"}, {"type": "image_url", "image_url": {"url": "data:" + "A" * 999}},
        "c", 5, None, {"text": 5}, {"text": None}]}]}, 3),
    ("/v1/messages", {"system": [{"type": "text", "text": "ab"}], "messages": [{"content": "c"}]}, 3),
    ("/v1/messages", {"system": "ab", "messages": [{"content": "ab"}]}, 4),
    ("/api/generate", {"prompt": "abc", "messages": [{"role": "system", "content": "de"}]}, 3),
    ("/v1/responses", {"input": "abc"}, 3), ("/v1/responses", {"input": [{"content": [{"text": "abc"}]}]}, 3),
    ("/api/embed", {"input": "abc"}, 3), ("/api/embed", {"input": ["abc", "d"]}, 4),
    ("/api/embeddings", {"prompt": "abc"}, 3), ("/v1/embeddings", {"input": [[1, 2], [3]]}, 0),
    ("/api/show", {"prompt": "abc", "system": "x"}, 0), ("/api/chat", {"messages": {"content": "abc"}}, 0),
    ("/api/generate", {"prompt": 5}, 0),
])
def test_size_of_the_prompt(path, body, chars):
    assert asked(path, body).prompt_chars == chars


CALL = {"name": "read", "arguments": {"path": "a.py"}}
BILLED = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.37.fbe; cc_entrypoint=cli; cch=6a2f1;"}


@table("path, body, chars, images", [
    ("tools", "/api/chat", {"tools": [{"a": 1}], "messages": []}, len('[{"a": 1}]'), 0),
    ("a call of Ollama's", "/api/chat", {"messages": [{"content": "", "tool_calls": [{"function": CALL}]}]},
     len('read{"path": "a.py"}'), 0),
    ("a call of OpenAI's", "/v1/chat/completions", {"messages": [{"tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path":"a.py"}'}}]}]},
     len('read{"path":"a.py"}'), 0),
    ("a call and its result, as responses", "/v1/responses", {"input": [
        {"type": "function_call", "call_id": "c", "name": "read", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "12345"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "why"}], "encrypted_content": "x" * 99}]},
     len("read{}12345why"), 0),
    ("a call and its result of Anthropic's", "/v1/messages", {"messages": [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "read", "input": {"p": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [
            {"type": "text", "text": "123"}, {"type": "image", "source": {"type": "base64", "data": "A" * 99}}]}]}]},
     len('read{"p": 1}123'), 1),
    ("thinking", "/api/chat", {"messages": [{"content": "a", "thinking": "bc"}]}, 3, 0),
    ("a document", "/v1/messages", {"messages": [{"content": [
        {"type": "document", "source": {"type": "text", "data": "abc"}}]}]}, 3, 0),
    ("images of Ollama's", "/api/chat", {"messages": [{"content": "a", "images": ["A" * 99, "B" * 99]}]}, 1, 2),
    ("images of a prompt", "/api/generate", {"prompt": "a", "images": ["A" * 99]}, 1, 1),
    ("images of responses", "/v1/responses", {"input": [
        {"content": [{"type": "input_image", "image_url": "A"}]}]}, 0, 1),
    ("suffix", "/api/generate", {"prompt": "ab", "suffix": "cd"}, 4, 0),
    ("a block that is another one each time", "/v1/messages", {
        "system": [BILLED, {"text": "ab"}], "messages": []}, 2, 0),
    ("nested without end", "/v1/messages", {"messages": [{"content": [[[[[[[[["abc"]]]]]]]]]}]}, 0, 0),
])
def test_prompt_is_all_that_the_model_reads(path, body, chars, images):
    spec = asked(path, body)
    assert (spec.prompt_chars, spec.prompt_images) == (chars, images)


def test_tokens_given_as_numbers_count():
    assert asked("/api/generate", {"prompt": "", "context": [1, 2, 3]}).prompt_tokens == 3


def test_changing_first_block_of_claude_code_changes_no_prefix():
    system = [{"type": "text", "text": "You are Claude Code"}]
    bodies = [{"system": [{**BILLED, "text": BILLED["text"].replace("6a2f1", hash)}, *system],
               "messages": [{"role": "user", "content": "hi"}]} for hash in ("12345", "abcde")]
    one, two = (asked("/v1/messages", body).prefix for body in bodies)
    assert one == two


@pytest.mark.parametrize("path, body, bound", [
    ("/api/chat", {"options": {"num_predict": 7}}, 7), ("/api/chat", {"options": {"num_predict": -1}}, None),
    ("/api/chat", {"options": [["num_predict", 7]]}, None), ("/api/chat", {"max_tokens": 9}, None),
    ("/v1/messages", {"max_tokens": 9}, 9), ("/v1/messages", {"options": {"num_predict": 7}}, None),
    ("/v1/chat/completions", {"max_tokens": 9, "max_completion_tokens": 8, "max_output_tokens": 7}, 9),
    ("/v1/chat/completions", {"max_completion_tokens": 8, "num_predict": 7}, None),
    ("/v1/chat/completions", {"max_output_tokens": 8, "options": {"num_predict": 7}}, None),
    ("/v1/completions", {"max_tokens": 9, "max_completion_tokens": 8}, 9),
    ("/v1/messages", {"max_output_tokens": 1, "max_tokens": 9}, 9), ("/v1/messages", {"max_output_tokens": 1}, None),
    ("/v1/responses", {"max_output_tokens": 3, "max_tokens": 1}, 3), ("/v1/responses", {"max_tokens": 1}, None),
    ("/v1/responses", {"max_output_tokens": 3}, 3), ("/v1/messages", {"max_tokens": 0}, None),
    ("/v1/messages", {"max_tokens": True}, None), ("/v1/messages", {"max_tokens": "9"}, None),
    ("/v1/messages", {"max_tokens": 9.5}, None),
])
def test_bound_of_the_output(path, body, bound):
    assert asked(path, body).max_output == bound


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_only_what_ollama_reads_makes_a_stream_deterministic(path):
    """Ollama reads no seed of /v1/messages and /v1/responses."""
    def is_so(**sampling):
        given = {"options": sampling} if path.startswith("/api") else sampling
        return asked(path, {"stream": True, **given}).deterministic

    assert is_so(temperature=0) and is_so(temperature=0.0, seed=-1)
    assert not is_so() and not is_so(temperature=0.1) and not is_so(temperature=False) and not is_so(seed=-1)
    assert is_so(seed=7) == (path in ("/api/chat", "/v1/chat/completions"))
    assert not asked(path, {"stream": False, "temperature": 0, "options": {"temperature": 0}}).deterministic


@pytest.mark.parametrize("options, expected", [
    ({"num_ctx": 8192, "temperature": 0, "num_predict": 3}, (("num_ctx", 8192),)),
    ({"num_gpu": 0}, (("num_gpu", 0),)),
    ({"num_thread": 4, "use_mmap": False, "num_ctx": 1},
     (("num_ctx", 1), ("use_mmap", False), ("num_thread", 4))),
    ({"num_gpu": -1}, ()), ({"num_ctx": "8192", "num_batch": [1], "main_gpu": {}, "use_mmap": None}, ()),
    (None, ()), ([], ()), ("num_ctx", ()),
])
def test_options_that_reload_a_model(options, expected):
    assert asked("/api/chat", {"options": options}).options == expected


@pytest.mark.parametrize("path, body, header, priority", [
    (CHAT, {}, None, 5), (CHAT, {}, b"8", 8), (CHAT, {}, b" High ", 8), (CHAT, {}, b"batch", 1),
    (CHAT, {}, b"CRITICAL", 10), (CHAT, {}, b"low", 3), (CHAT, {"priority": 9}, None, 9),
    (CHAT, {"priority": 9}, b"2", 2), (CHAT, {"priority": "x"}, b"2", 2), (CHAT, {"priority": None}, None, 5),
    (OPENAI, {"service_tier": "priority"}, None, 8), (OPENAI, {"service_tier": "flex"}, None, 3),
    (OPENAI, {"service_tier": "auto"}, None, 5), (OPENAI, {"service_tier": ["flex"]}, None, 5),
    (OPENAI, {"service_tier": "flex", "priority": 10}, None, 10), (CHAT, {"service_tier": "flex"}, None, 5),
    ("/api/show", {"priority": 99}, None, 5),
])
def test_priority_comes_from_header_then_body_then_tier(path, body, header, priority):
    assert asked(path, body, **({"x_priority": header} if header else {})).priority == priority


@pytest.mark.parametrize("body, fields", [
    *(({}, {"x_priority": header}) for header in (
        b"0", b"11", b"-1", b"+5", b"5.0", b"urgent", b"", b"\xb2", b"5, 5", b"1e1", b"010", b"\xff")),
    *(({"priority": value}, {}) for value in (0, 11, -1, 5.0, True, "5", "high", [5], {}, 10**30))])
def test_priority_that_is_none_is_refused(body, fields):
    with pytest.raises(Refusal) as caught:
        asked(body=body, **fields)
    assert caught.value.status == 400 and not caught.value.close


@pytest.mark.parametrize("path, body, change", [
    ("/api/generate", {"keep_alive": 0}, "unload"), ("/api/generate", {"keep_alive": "0s", "prompt": ""}, "unload"),
    ("/api/generate", {"keep_alive": 0, "prompt": "x"}, ""), ("/api/generate", {"keep_alive": 5}, ""),
    ("/api/chat", {"keep_alive": 0, "messages": []}, "unload"), ("/api/chat", {"keep_alive": 0, "messages": [{}]}, ""),
    ("/v1/completions", {"keep_alive": 0}, ""), ("/api/embed", {"keep_alive": 0}, ""),
    ("/api/pull", {"keep_alive": 0}, "pull"), ("/api/push", {"keep_alive": 0}, "")])
def test_what_changes_a_model_on_every_node(path, body, change):
    assert asked(path, {"model": "m", **body}).change == change


def chat(turns, system="be kind", **more):
    return asked(body={"model": "m", "system": system, **more, "messages": [
        {"role": "user", "content": f"message {number} " * 20} for number in range(turns)]})


@pytest.mark.parametrize("turns", [1, 3, 5, 11, 14, 15, 20, 101])
def test_continued_chat_shares_its_beginning(turns):
    earlier, later = ({part for part, _ in chat(count).prefix} for count in (turns, turns + 2))
    assert len(later - earlier) == 2


def test_chats_that_begin_otherwise_share_nothing():
    parts = [{part for part, _ in spec.prefix} for spec in (
        chat(5), chat(5, system="be cruel"), chat(5, tools=[{"name": "t"}]), chat(5, tools=[{"name": "u"}]))]
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_prefix_counts_characters_and_stays_short():
    spec = chat(100)
    assert len(spec.prefix) == sollol.PREFIX_FIRST + sollol.PREFIX_LAST
    assert (spec.prefix[0][1], spec.prefix[-1][1]) == (len("be kind"), spec.prompt_chars)


def junk(rng, depth=4):
    """Return a random JSON-ish value whose keys are often those that are looked at."""
    kind = rng.randrange(10 if depth else 7)
    if kind < 7:
        return [None, rng.random() < 0.5, rng.choice([0, -1, 5, 10**30]), rng.choice([0.5, -1e308, math.nan]),
                rng.choice(["", "m", "yes", "\x00", "\ud800", "ä" * 600]), [], {}][kind]
    if kind == 7:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = ["model", "Model", "name", "messages", "content", "text", "input", "prompt", "system", "options",
            "num_ctx", "tools", "num_predict", "num_gpu", "max_tokens", "stream", "priority", "service_tier"]
    return {rng.choice(keys): junk(rng, depth - 1) for _ in range(rng.randrange(8))}


def test_no_body_raises_anything_but_a_refusal():
    rng = random.Random(4)
    for _ in range(3000):
        method, path = rng.choice(list(sollol.ROUTES))
        body = json.dumps({"messages": junk(rng), "system": junk(rng), "options": junk(rng), "x": junk(rng)}
                          if rng.random() < 0.5 else junk(rng)).encode()
        body = mutated(rng, body) if rng.random() < 0.3 else body
        try:
            spec = asked(path, body, method)
        except Refusal as refusal:
            assert refusal.status == 400
            continue
        except Exception as error:
            pytest.fail(f"{error!r} for {body!r}")
        assert isinstance(spec.model, str | None) and isinstance(spec.stream, bool)
        assert 1 <= spec.priority <= 10 and spec.prompt_chars >= 0


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_no_depth_of_nesting_raises(opening, closing):
    for depth in (*range(850, 1010, 7), 5000):
        asked(body=b'{"model":"m","tools":' + opening * depth + b"1" + closing * depth + b"}")


def looked_at(fields):
    """Return what is looked at of the fields of a body, without what stands in lists."""
    found = {name: value for name, value in fields.items() if type(value) in (str, int, float, bool, type(None))}
    options = fields.get("options")
    return {**found, "options": looked_at(options) if type(options) is dict else None}


def test_skimmed_body_is_read_as_a_whole_one(monkeypatch):
    """What stands where in a large body is found as json finds it; what is short there is read as everywhere."""
    rng = random.Random(6)
    for number in range(1500):
        names = ("model", "Stream", "options", "messages", "x", "tools", 'a\\"')
        value = {rng.choice(names): junk(rng) for _ in range(4)}
        body = json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=number % 2 == 0).encode(errors="replace")
        expected = {key: found for key, found in sollol.read_object(body).items() if key in sollol.SKIMMED_FIELDS}
        found = sollol.at_once(sollol.skimmed(body + b" trailing")).fields
        assert found.keys() == expected.keys() and repr(looked_at(found)) == repr(looked_at(expected)), body
    monkeypatch.setattr(sollol, "SHORT_VALUE_BYTES", -1)
    for size in (10, 63, 64, 65, 127, 128, 1000, 70_000, 300_000):
        for unit in ("a", "\\", '"', "[", "}", "ä\\", '{"', "\\\\\""):
            value = {"tools": [[unit * size, {unit: [1, unit]}], unit], "prompt": unit * size,
                     "system": [[[unit]]] * size}
            body = json.dumps(value).encode()
            found = sollol.at_once(sollol.skimmed(body)).fields
            assert {name: json.loads(body[at.start:at.end]) for name, at in found.items()} == value


def test_last_of_a_fields_spellings_wins_in_a_long_body_too():
    body = b'{"model":"a","Model":"b","model":"c","prompt":"%b","MODEL":"d"}'
    for text in (b"x", b"x " * 2**21):
        assert asked("/api/generate", body % text).model == "d:latest"
        assert asked("/api/generate", (body % text).replace(b"MODEL", b"MODE")).model == "c:latest"


def test_large_body_tells_what_a_short_one_tells():
    text = "some words of a prompt, " * 100
    for path, name in ((CHAT, "messages"), ("/api/embed", "input"), ("/v1/responses", "input")):
        turns = [{"role": "user", "content": text} if name == "messages" else text for _ in range(2000)]
        body = {"model": "Big", "stream": False, "options": {"num_ctx": 8192, "num_predict": 7}, "priority": 8,
                "service_tier": "flex", "max_output_tokens": 9, name: turns}
        large, longer = asked(path, body), asked(path, {**body, name: turns + turns[:100]})
        short = asked(path, {**body, name: turns[:1]})
        assert replace(large, prompt_chars=0, prompt_tokens=0, prefix=(), inputs=1, batch=None, session=0) == replace(
            short, prompt_chars=0, prompt_tokens=0, prefix=(), inputs=1, batch=None, session=0)
        assert large.prompt_chars == pytest.approx(2000 * len(text), rel=0.03)
        assert len(large.prefix) == sollol.PREFIX_FIRST + sollol.PREFIX_LAST
        assert large.prefix[:4] == longer.prefix[:4]
        assert not set(large.prefix) & set(asked(path, {**body, "system": "x", name: turns}).prefix)
        assert large.inputs == (2000 if path == "/api/embed" else 1)


def test_image_is_no_part_of_a_large_prompt():
    image = {"role": "user", "content": "what is it? " * 10, "images": ["iVBORw0KGgo" * 300_000]}
    assert asked(CHAT, {"model": "m", "messages": [image]}).prompt_chars < 2 * sollol.PROMPT_BLOCK_BYTES



ALIASES = [sollol.parse_alias(text) for text in (
    "*-mini=small", "claude-*=qwen3:14b", "gpt-4o=llama3.2", "gpt-*=big", "llama3.2=mistral", "claude-x=claude-y",
    "qwen3*=qwen3:14b")]


@table("name, is_there, model", [
    ("by its name", "gpt-4o", False, "llama3.2"), ("in full", " GPT-4o:Latest ", False, "llama3.2"),
    ("by a pattern", "claude-sonnet-4", False, "qwen3:14b"), ("in upper case", "Claude-Opus", False, "qwen3:14b"),
    ("the end of a name", "gpt-4o-mini", False, "small"), ("a tag", "claude-3:8b", False, "qwen3:14b"),
    ("the first pattern counts", "claude-mini", False, "small"), ("another one", "gpt-5", False, "big"),
    ("a model that exists wins over a pattern", "gpt-5", True, None),
    ("and an alias without * over a model that exists", "llama3.2", True, "mistral"),
    ("and over an earlier pattern", "claude-x", False, "claude-y"), ("no chain", "claude-y", False, "qwen3:14b"),
    ("itself", "qwen3:14b", False, None), ("no alias", "mistral", False, None),
    ("another tag", "gpt-4o:1", False, "big"),
    ("part of a name", "my-claude-3", False, None), ("nothing", "", False, None)])
def test_alias_leads_to_a_model(name, is_there, model):
    assert sollol.alias_target(name, ALIASES, is_there) == model


@listed("text", ["", "=", "x", "x=", "=x", "  = x", "a=b*", "a=b\nc", "a=\x00"])
def test_alias_that_means_nothing_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        sollol.parse_options(["--alias", text], {})
    assert "PATTERN=MODEL" in capsys.readouterr().err


LONG_TEXT = b'\\"{' * 20_000
PICTURE = b'"' + b"iVBORw0KGgo" * 300_000 + b'"'        # more than json reads


@table("body, key, sent", [
    ("first", b'{"model":"x","prompt":"x"}', "model", b'{"model":"q","prompt":"x"}'),
    ("spaces, another case, a tail", b' {"a":[{"model":"x"}], "MoDel" :\n "x" } tail', "model",
     b' {"a":[{"model":"x"}], "MoDel" :\n "q" } tail'),
    ("the last of three", b'{"model":"a","Model":"b","model":"x"}', "model", b'{"model":"a","Model":"b","model":"q"}'),
    ("old clients", b'{"name":"x","model":""}', "name", b'{"name":"q","model":""}'),
    ("escapes", rb'{"mod\u0065l":"\u0078","prompt":"\ud83d\ude00 \"model\":\"x\""}', "model",
     rb'{"mod\u0065l":"q","prompt":"\ud83d\ude00 \"model\":\"x\""}'),
    ("bytes that are no text", b'{"prompt":"\xff","model":"x"}', "model", b'{"prompt":"\xff","model":"q"}'),
    ("a long text", b'{"prompt":"%b","model":"x"}' % LONG_TEXT, "model", b'{"prompt":"%b","model":"q"}' % LONG_TEXT),
    ("a body that is skimmed", b'{"images":[%b],"model":"x"}' % PICTURE, "model",
     b'{"images":[%b],"model":"q"}' % PICTURE),
    ("a name of any length", b'{"model":"%b"}' % (b"x" * 5000), "model", None),
    ("a key that the skimmer does not read", b'{"%b":1,"model":"x"}' % (b"k" * 5000), "model", None)])
def test_only_the_name_of_the_model_is_changed_in_a_body(body, key, sent):
    changed, alias = sollol.at_once(sollol.with_model(bytearray(body), key, "q"))
    assert bytes(changed) == (sent or body) and (alias is None) == (sent is None)
    if sent:
        assert bytes(changed).replace(b'"q"', alias.asked, 1) == body and asked("/api/show", sent).model == "q:latest"


@table("body, data", [
    ("none", b' {"stream":true,"model":"m"}', b' {"stream_options":{"include_usage":true},"stream":true,"model":"m"}'),
    ("false", b'{"model":"m","Stream_Options" : {"include_usage":false, "x":1}}',
     b'{"model":"m","Stream_Options" : {"include_usage": true, "x": 1}}'),
    ("null", b'{"stream_options":null,"model":"m"}', b'{"stream_options":{"include_usage": true},"model":"m"}'),
    ("empty", b'{"stream_options":{}}', b'{"stream_options":{"include_usage": true}}'),
    ("asked for", b'{"stream_options":{"include_usage":true}}', None),
    ("in another case", b'{"stream_options":{"Include_Usage":true}}', None),
    ("what a node refuses", b'{"stream_options":{"include_usage":0}}', None),
    ("no object", b'{"stream_options":[1]}', None), ("nor this", b'{"stream_options":true}', None),
    ("nor this ", b'{"stream_options":0}', None),
    ("long", b'{"images":[%b],"model":"m"}' % PICTURE,
     b'{"stream_options":{"include_usage":true},"images":[%b],"model":"m"}' % PICTURE),
    ("long, and no", b'{"images":[%b],"stream_options":null}' % PICTURE, None)])
def test_counts_of_a_stream_are_asked_for_where_a_client_does_not(body, data):
    fields = sollol.at_once(sollol.skimmed(body)).fields
    splice = sollol.at_once(sollol.asking_for_usage(body, fields))
    assert (splice and b"".join(splice.cut(body))) == data


@pytest.mark.parametrize("version, counts", [("0.5.2", True), ("0.5.1", False), ("0.33.0-rc2", True), ("1.0", True),
                                             ("0.0.0", False), ("", False), ("?", False), ("0.12.4", True)])
def test_counts_are_asked_for_of_versions_that_know_them(version, counts):
    assert sollol.counts_streams(version) == counts


# -----------------------------------------------------------------------------
# Cluster and nodes
# -----------------------------------------------------------------------------

def test_configure_keeps_known_nodes_and_drains_dropped_ones():
    dispatcher = cluster(n1=["m"], n2=["m"], n3=["m"])
    tickets = enter(dispatcher, want(), want(), want())
    placed(dispatcher)
    old = dict(dispatcher.cluster.nodes)
    added, dropped = dispatcher.cluster.configure([old["n1"].settings, old["n2"].settings._replace(port=5),
                                           NodeSettings("n4", "d", 4)])
    assert [node.name for node in added] == ["n2", "n4"] and dropped == [old["n2"], old["n3"]]
    assert dispatcher.cluster.nodes["n1"] is old["n1"] and dispatcher.cluster.nodes["n2"] is not old["n2"]
    assert [old[name].state(0.0) for name in ("n1", "n2", "n3")] == ["up", "draining", "draining"]
    assert [it.node for it in dispatcher.cluster.holders["m:latest"]] == [old["n1"]]
    for it in tickets:
        finish(dispatcher, it, 1.0)
    assert not any(node.leases for node in old.values())
    enter(dispatcher, want(), now=1.0)
    assert placed(dispatcher, 1.0) == ["n1"]


def test_changed_settings_leave_a_node_its_requests_and_what_is_known_of_it():
    dispatcher = cluster(slots=0, n1=["m", "nomic-embed"], n2=["m"])
    enter(dispatcher, want(), want())
    placed(dispatcher)
    (_, one), (_, two) = dispatcher.cluster.nodes.items()
    it, embeds, lease = runner(dispatcher, "n1"), one.runners["nomic-embed:latest"], one.leases[0]
    it.speeds.decode_s, it.speeds.samples = 0.005, 7
    it.confirm_slots(3, 0.0)

    def change(**more):
        assert dispatcher.cluster.configure([one.settings._replace(**more), two.settings]) == ([], [])
        assert dispatcher.cluster.nodes[more.get("name", one.name)] is one and one.leases[0] is lease
        return it.slots.count, it.slots.origin, embeds.slots.count, embeds.slots.origin

    assert change(token="x", primary=False) == (3, "learned", 1, "set") and one.settings.token == "x"
    assert change(slots=2) == (2, "set", 2, "set")
    enter(dispatcher, *[want()] * 4, now=1.0)
    assert placed(dispatcher, 1.0).count("n1") == 1
    assert change(name="renamed") == (2, "set", 2, "set")
    assert change(slots=0) == (3, "learned", 1, "set") and it.speeds.decode_s == 0.005
    assert dispatcher.cluster.configure([two.settings._replace(name="n2", host_header="other")])[0] != []


def test_two_lines_that_swap_their_names_keep_their_nodes():
    dispatcher = cluster(n1=["m"], n2=["m"])
    (_, one), (_, two) = dispatcher.cluster.nodes.items()
    swapped = [one.settings._replace(name="n2"), two.settings._replace(name="n1")]
    assert dispatcher.cluster.configure(swapped) == ([], [])
    assert dispatcher.cluster.nodes == {"n2": one, "n1": two} and (one.name, two.name) == ("n2", "n1")


def test_node_that_comes_back_while_its_requests_run_has_that_many_slots_less():
    dispatcher = cluster(n1=["m"], n2=["m"])
    first, second = enter(dispatcher, want(), want())
    placed(dispatcher)
    (_, one), (_, two) = dispatcher.cluster.nodes.items()
    dispatcher.cluster.configure([two.settings])
    assert dispatcher.cluster.configure([one.settings, two.settings]) == ([one], [])
    assert dispatcher.cluster.nodes["n1"] is one and one.state(0.0) == "up" and not dispatcher.cluster.leaving
    enter(dispatcher, want(), now=1.0)
    assert placed(dispatcher, 1.0) == []
    finish(dispatcher, first, 2.0)
    assert placed(dispatcher, 2.0) == ["n1"]


def test_node_is_dead_that_refuses_or_has_not_answered_for_fifteen_seconds():
    dispatcher = cluster(n1=["m"])
    node = dispatcher.cluster.nodes["n1"]
    for now in (5.0, 14.9):
        node.missed(False, now)
        assert node.state(now) == "up"
    node.missed(False, 15.0)
    assert node.state(15.0) == "down" and runner(dispatcher, "n1").ready_s is None
    node.answered("1", 0.001, 16.0)
    assert node.state(16.0) == "up"
    node.missed(True, 17.0)
    assert node.state(17.0) == "down"


def test_residency_is_taken_over_except_for_what_was_placed_since():
    dispatcher = cluster(resident=False, n1=["m", "x"])
    node = dispatcher.cluster.nodes["n1"]
    it, = enter(dispatcher, want(), now=10.0)
    placed(dispatcher, 10.0)
    node.take_ps([], 10.0, 10.1)
    assert runner(dispatcher, "n1").ready_s is not None
    dispatcher.leave(it, 11.0)
    node.take_ps([], 11.5, 11.6)
    assert runner(dispatcher, "n1").ready_s is not None
    node.take_ps([{"name": "other", "digest": "x"}], 20.0, 20.1)
    assert runner(dispatcher, "n1").ready_s is None
    assert runner(dispatcher, "n1", "x:latest").ready_s == 20.1


def ps_rows(*models, size=5e9):
    """Return rows of /api/ps."""
    return [{"name": model, "size": size, "size_vram": size} for model in models]


def test_memory_is_learned_from_what_left_while_another_came():
    dispatcher = cluster(resident=False, n1=["a", "b", "c"])
    node = dispatcher.cluster.nodes["n1"]
    node.take_ps(ps_rows("a", "b"), 0.0, 0.0)
    node.take_ps(ps_rows("a"), 5.0, 5.0)  # expired, as nothing came
    assert (node.memory.seen_bytes, node.memory.limit_bytes) == (10e9, math.inf)
    node.take_ps(ps_rows("a", "b"), 10.0, 10.0)
    node.take_ps(ps_rows("b", "c"), 15.0, 15.0)
    assert node.memory.limit_bytes == 15e9
    assert sollol.evicted_for(runner(dispatcher, "n1", "a:latest"))


def test_model_that_still_loads_has_its_room_when_memory_is_learned():
    dispatcher = cluster(resident=False, n1=["a", "b", "c", "d"])
    node = dispatcher.cluster.nodes["n1"]
    node.take_ps(ps_rows("a", "b"), 0.0, 0.0)
    enter(dispatcher, want("d"), now=1.0)
    assert placed(dispatcher, 1.0) == ["n1"]
    loading_bytes = runner(dispatcher, "n1", "d:latest").resident_bytes()
    node.take_ps(ps_rows("b", "c"), 2.0, 2.0)
    assert node.memory.limit_bytes == 15e9 + loading_bytes


def test_eviction_by_count_is_no_sign_of_a_memory_limit():
    """Ollama keeps at most three models loaded for each card, whatever its memory."""
    dispatcher = cluster(resident=False, n1=["a", "b", "c", "d", "e"])
    node = dispatcher.cluster.nodes["n1"]
    node.take_ps(ps_rows("a", "b", "c"), 0.0, 0.0)
    node.take_ps(ps_rows("b", "c", "d"), 5.0, 5.0)
    assert (node.memory.most_loaded, node.memory.limit_bytes) == (3, math.inf)
    assert sollol.evicted_for(runner(dispatcher, "n1", "e:latest"))
    node.take_ps(ps_rows("b"), 10.0, 10.0)        # the others have expired
    assert not sollol.evicted_for(runner(dispatcher, "n1", "e:latest"))
    node.take_ps(ps_rows("a", "b", "c", "d"), 15.0, 15.0)
    assert node.memory.most_loaded == math.inf                         # somebody has raised it
    node.take_ps(ps_rows("a", "b", "e"), 20.0, 20.0)
    # Three are fewer than there were: it is the memory that is full.
    assert (node.memory.most_loaded, node.memory.limit_bytes) == (math.inf, 20e9)


def test_model_with_the_shortest_keep_alive_is_evicted_however_lately_it_was_used():
    dispatcher = cluster(slots=2, n1=["a", "b", "c", "d"], resident=False)
    node, now = dispatcher.cluster.nodes["n1"], 0.0
    node.memory.most_loaded = 3.0
    for model, keep_alive_s in (("a", 60.0), ("b", math.inf), ("c", None)):
        it, = enter(dispatcher, want(model, keep_alive_s=keep_alive_s), now=now)
        placed(dispatcher, now)
        finish(dispatcher, it, now + 5)
        now += 10.0
    for model in ("b", "c", "a"):       # `a` was used last; what a request does not say stays
        it, = enter(dispatcher, want(model), now=now)
        placed(dispatcher, now)
        finish(dispatcher, it, now + 5)
        now += 10.0
    there = {model: runner(dispatcher, "n1", f"{model}:latest") for model in "abcd"}
    assert [there[model].keep_alive_s for model in "abc"] == [60.0, math.inf, 300.0]
    enter(dispatcher, want("d"), now=now)
    placed(dispatcher, now)
    assert [model for model, it in there.items() if it.ready_s is None] == ["a"]


def test_keep_alive_of_zero_stays_with_the_runner_and_unloads_it_after_its_last_answer():
    dispatcher = cluster(slots=2, n1=["m"])
    known = runner(dispatcher, "n1")
    first, second = enter(dispatcher, want(keep_alive_s=0.0), want())
    placed(dispatcher)
    finish(dispatcher, first, 1.0)
    assert known.ready_s is not None
    finish(dispatcher, second, 2.0)
    assert known.ready_s is None
    again, = enter(dispatcher, want(), now=3.0)
    placed(dispatcher, 3.0)
    assert again.lease.loads
    finish(dispatcher, again, 9.0)
    assert known.ready_s is not None        # loaded anew, by a request that says nothing of it


@table("loaded, asked, same", [
    ("the value that is there", (4096, ()), (("num_ctx", 4096),), True),
    ("another one", (4096, ()), (("num_ctx", 8192),), False),
    ("more than the model can, clamped", (32768, ()), (("num_ctx", 99999),), True),
    ("what it was loaded with", (8192, (("num_ctx", 8192),)), (("num_ctx", 8192),), True),
    ("none: the server's default", (8192, (("num_ctx", 8192),)), (), False),
    ("no mapping of files", (4096, ()), (("use_mmap", False),), True),
    ("mapping of files", (4096, ()), (("use_mmap", True),), False),
    ("shift", (4096, ()), (("shift", True),), True), ("no shift", (4096, ()), (("shift", False),), False),
    ("main_gpu", (4096, ()), (("main_gpu", 0), ("num_thread", 0)), True),
    ("batch", (4096, ()), (("num_batch", 128),), False),
    ("loaded by others, the same value", (4096, None), (("num_ctx", 4096),), True),
    ("loaded by others, another value", (4096, None), (("num_ctx", 8192),), False),
    ("loaded by others, nobody knows how", (4096, None), (("num_batch", 128),), True),
    ("loaded by others, untold", (4096, None), (), True), ("nothing is known", (0, None), (("num_ctx", 8192),), True),
    ("an old node that does not tell", (0, ()), (("num_ctx", 4096),), False),
])
def test_model_is_loaded_anew_only_for_another_value_of_an_option(loaded, asked, same):
    dispatcher = cluster(resident=False, n1=["m"])
    node, (context, options) = dispatcher.cluster.nodes["n1"], loaded
    row = {"name": "m", "size": 2e9, "details": {"context_length": 32768}}
    dispatcher.cluster.take_tags(node, [row])
    node.take_ps([{**row, **({"context_length": context} if context else {})}], 1.0, 1.0)
    runner(dispatcher, "n1").options = options
    it, = enter(dispatcher, want(options=asked), now=2.0)
    placed(dispatcher, 2.0)
    assert it.lease.loads is not same


def test_model_that_somebody_loaded_with_another_context_than_the_default_is_loaded_anew():
    """Once a request without num_ctx has shown what the server's default is."""
    dispatcher = cluster(resident=False, n1=["m"])
    node, known = dispatcher.cluster.nodes["n1"], runner(dispatcher, "n1")
    it, = enter(dispatcher, want())
    placed(dispatcher)
    finish(dispatcher, it, 5.0)
    shown = [{"name": "m", "size": 2e9, "context_length": 4096}]
    node.take_ps(shown, 10.0, 10.0)
    node.take_ps([], 20.0, 20.0)
    node.take_ps([{**shown[0], "context_length": 16384}], 30.0, 30.0)
    assert not sollol.is_loaded_for(known, want()) and sollol.is_loaded_for(known, want(options=(("num_ctx", 16384),)))
    node.take_ps(shown, 50.0, 50.0)
    assert sollol.is_loaded_for(known, want())
    it, = enter(dispatcher, want(), now=51.0)
    placed(dispatcher, 51.0)
    finish(dispatcher, it, 55.0)
    node.take_ps([{**shown[0], "context_length": 16384}], 60.0, 60.0)     # by a user of the node
    assert not sollol.is_loaded_for(known, want()) and known.own_context == 4096


def test_request_with_the_context_that_was_found_loaded_does_not_make_it_an_explicit_one():
    dispatcher = cluster(resident=False, n1=["m"])
    node, known = dispatcher.cluster.nodes["n1"], runner(dispatcher, "n1")
    node.take_ps([{"name": "m", "size": 2e9, "context_length": 4096}], 1.0, 1.0)
    it, = enter(dispatcher, want(options=(("num_ctx", 4096),)), now=2.0)
    placed(dispatcher, 2.0)
    it.lease.heard(1, 3.0)
    finish(dispatcher, it, 4.0)
    assert sollol.is_loaded_for(known, want())


def test_look_at_ps_never_unbelieves_a_load_under_way():
    """It may block for seconds meanwhile, and does not list what still loads."""
    dispatcher = cluster(resident=False, n1=["m", "x"])
    node = dispatcher.cluster.nodes["n1"]
    it, = enter(dispatcher, want(options=(("num_ctx", 8192),)))
    placed(dispatcher)
    ready_s = runner(dispatcher, "n1").ready_s
    for now in (1.0, 20.0, 100.0):
        node.take_ps(ps_rows("x"), now - 0.9, now)
        node.index_failed()
        assert runner(dispatcher, "n1").ready_s == ready_s and node.loading == [it.lease]
    old = [{"name": "m", "size": 2e9, "context_length": 4096}]
    runner(dispatcher, "n1").ready_s = 130.0
    node.take_ps(old, 120.0, 120.0)       # what is unloaded to be loaded with other options
    assert sollol.is_loaded_for(runner(dispatcher, "n1"), it.spec)


def test_node_whose_load_is_overdue_is_not_fed_with_other_models_for_half_a_minute():
    dispatcher = cluster(resident=False, slots=4, n1=["a", "b"])
    dispatcher.cluster.nodes["n1"].take_ps(ps_rows("a"), 0.0, 0.0)
    loads, = enter(dispatcher, want("b"), now=1.0)
    assert placed(dispatcher, 1.0) == ["n1"]
    late_s = loads.lease.ready_s + sollol.SILENT_S + 0.1
    enter(dispatcher, *[want("a")] * 2, now=late_s)
    assert placed(dispatcher, late_s) == [] == placed(dispatcher, late_s + sollol.YIELD_S - 0.2)
    assert placed(dispatcher, late_s + sollol.YIELD_S) == ["n1"] * 2
    loads.lease.heard(1, late_s + 60)
    enter(dispatcher, want("a"), now=late_s + 60)
    assert placed(dispatcher, late_s + 60) == ["n1"]


def test_model_gone_from_disk_is_known_no_more():
    dispatcher = cluster(n1=["m", "x"])
    dispatcher.cluster.take_tags(dispatcher.cluster.nodes["n1"], rows("x"))
    assert list(dispatcher.cluster.holders) == ["x:latest"] == list(dispatcher.cluster.nodes["n1"].runners)


@table("row", [
    ("nothing", {}), ("null name", {"name": None}), ("name no text", {"name": 5, "model": []}), ("no row", 5),
    ("huge size", {"name": "m", "size": 10**400, "size_vram": 10**400}),
    ("size no number", {"name": "m", "size": "big"}), ("negative size", {"name": "m", "size": -1}),
    ("size_vram no number", {"name": "m", "size_vram": "big"}),
    ("digest no text", {"name": "m", "digest": ["x"]}),
])
def test_garbage_from_a_node_raises_nothing(row):
    dispatcher = cluster(n1=["m"])
    found = sollol.rows_of({"models": [row]})
    dispatcher.cluster.take_tags(dispatcher.cluster.nodes["n1"], found)
    dispatcher.cluster.nodes["n1"].take_ps(found, 1.0, 1.0)
    assert all(it.disk_bytes > 0 for it in dispatcher.cluster.nodes["n1"].runners.values())


def test_lines_of_many_tokens_are_not_taken_for_a_slow_node():
    """What the first streamed answer says of them counts in full: a few tokens a line are a model's own way."""
    dispatcher = cluster(n1=["m"])
    for start in range(0, 80, 20):
        it, = enter(dispatcher, want(), now=start)
        placed(dispatcher, start)
        for now in range(start + 1, start + 16):
            it.lease.heard(6, now)
            dispatcher.watch(now)
        finish(dispatcher, it, start + 15.0, Timings(15, 0, 0.5, 100, 14.5, 1450))
    assert runner(dispatcher, "n1").speeds.samples == 4
    assert runner(dispatcher, "n1").speeds.lines_per_token == pytest.approx(0.062, rel=0.01)
    assert dispatcher.cluster.nodes["n1"].speed == 1.0


def test_noise_of_streams_is_not_taken_for_a_slow_node():
    """What is above the usual speed does not count; did what is below, the learned speeds would drift upwards."""
    dispatcher, rng = cluster(n1=["m"]), random.Random(1)
    node, known = dispatcher.cluster.nodes["n1"], runner(dispatcher, "n1")
    known.speeds.decode_s, known.speeds.samples = 0.02, 3
    it, = enter(dispatcher, want())
    placed(dispatcher)
    for now in range(1, 200):
        it.lease.heard(round(50 * rng.uniform(0.85, 1.15)), now)
        dispatcher.watch(now)
    assert node.speed == 1.0
    for now in range(200, 230):
        it.lease.heard(5, now)
        dispatcher.watch(now)
    assert 0.1 <= node.speed < 0.15


def test_silent_node_comes_last_and_any_byte_ends_that():
    dispatcher = cluster(slots=2, n1=["m"], n2=["m"])
    runner(dispatcher, "n2").speeds.decode_s = 5 * runner(dispatcher, "n1").decode_s()
    it, beside = enter(dispatcher, want(), want())
    assert placed(dispatcher) == ["n1", "n1"]
    node = it.lease.node
    it.lease.heard(1, 0.5)
    assert dispatcher.watch(5.0) == ([], []) and node.state(5.0) == "up"
    assert dispatcher.watch(100.0) == ([], []) and node.state(100.0) == "suspect"
    dispatcher.leave(beside, 100.0)
    others = enter(dispatcher, *[want()] * 2, now=100.0)
    assert placed(dispatcher, 100.0) == ["n2", "n2"]
    it.lease.heard(1, 101.0)
    assert node.state(101.0) == "up"
    enter(dispatcher, want(), now=101.0)
    assert placed(dispatcher, 101.0) == ["n1"] and all(other.lease for other in others)


def test_only_node_is_used_however_silent_it_is():
    dispatcher = cluster(slots=2, n1=["m"])
    enter(dispatcher, want())
    placed(dispatcher)
    dispatcher.watch(500.0)
    assert dispatcher.cluster.nodes["n1"].suspect
    enter(dispatcher, want(), now=500.0)
    assert placed(dispatcher, 500.0) == ["n1"]


@table("given, model_is_there", [
    ("a stream", dict(), True), ("a load", dict(), False), ("no stream", dict(stream=False, silent=True), True),
    ("tools", dict(silent=True), True), ("a long prompt", dict(prompt_chars=100_000), True),
])
def test_silence_ends_nothing(given, model_is_there):
    for begun in (False, True):
        dispatcher = cluster(resident=model_is_there, n1=["m"], n2=["x"])
        it, = enter(dispatcher, want(**given))
        placed(dispatcher)
        if begun:
            it.lease.heard(1, 0.5)
        assert all(dispatcher.watch(now * 10.0) == ([], []) for now in range(1, 1000))


def test_node_that_other_nodes_may_better_is_not_said_to_fail():
    dispatcher = cluster(n1=["m"], n2=["m"])
    node = dispatcher.cluster.nodes["n1"]
    for kind in sorted(sollol.DIFFERENCES):
        node.note_error("answered 400: the prompt is too long", 400, kind, 0.0)
    assert node.state(0.0) == "up" and node.error_share.share(0.0) is None and node.last_error
    for _ in range(3):
        node.note_error("answered 500: oops", 500, "model", 0.0)
    assert node.state(0.0) == "suspect"


@table("change, repeatable, leaves", [
    ("show", "", True, True), ("upload or push", "", False, False), ("pull", "pull", False, True)])
def test_only_what_may_go_elsewhere_and_changes_of_models_leave_a_dead_node(change, repeatable, leaves):
    dispatcher = cluster(n1=["m"], n2=["m"])
    node = dispatcher.cluster.nodes["n1"]
    lease = dispatcher.lease_on("r", want(inference=False, change=change, repeatable=repeatable), node, "any node", 0.0)
    node.missed(False, 20.0)
    assert not node.up and dispatcher.watch(20.0) == ([lease] if leaves else [], [])


def racing(dispatcher, it):
    """Let a ticket be raced, as the I/O side does; return it."""
    it.race = lambda lease: None
    return it


def raced(dispatcher, now):
    """Return the names of the nodes where races begin."""
    lost, races = dispatcher.watch(now)
    assert not lost
    return [lease.node.name for lease in races]


def test_answer_far_overdue_is_raced_once_where_a_slot_is_free_and_nobody_waits_for_it():
    dispatcher = cluster(slots=1, n1=["m", "x"], n2=["m", "x"], n3=["m"])
    it, other = enter(dispatcher, want(), want("x"))
    placed(dispatcher)
    racing(dispatcher, it)
    quiet_s = it.lease.quiet_s
    assert raced(dispatcher, quiet_s - 0.1) == []
    busy = enter(dispatcher, *[want()] * 3, now=499.0)
    assert placed(dispatcher, 499.0) and raced(dispatcher, 500.0) == []
    for one in busy:
        dispatcher.leave(one, 500.0)
    assert raced(dispatcher, 500.0) in (["n2"], ["n3"]) and raced(dispatcher, 600.0) == []
    first, rival = it.lease, it.rival
    dispatcher.release(first, 600.0)
    assert it.lease is rival and it.rival is None
    dispatcher.leave(it, 600.0)
    assert rival.released


@table("given", [("not repeatable", dict(repeatable=False)), ("begun", dict())])
def test_what_may_not_be_done_twice_is_not_raced(given):
    dispatcher = cluster(slots=1, n1=["m"], n2=["m"])
    it, = enter(dispatcher, want(**given))
    placed(dispatcher)
    racing(dispatcher, it)
    if not given:
        it.lease.heard(1, 0.5)
    assert raced(dispatcher, 500.0) == []


def test_begun_stream_is_raced_by_a_replay_only_where_the_model_is_the_same():
    for digest, names in (("m", ["n2"]), ("other", [])):
        dispatcher = cluster(slots=1, n1=["m"], n2=["m"])
        runner(dispatcher, "n2").row["digest"] = digest
        it, = enter(dispatcher, want(deterministic=True))
        placed(dispatcher)
        racing(dispatcher, it)
        it.lease.heard(1, 0.5)
        assert raced(dispatcher, 500.0) == names


def test_node_that_was_never_measured_may_be_as_slow_as_a_cpu():
    dispatcher = cluster(n1=["m"])
    it, = enter(dispatcher, want(prompt_chars=6000))
    placed(dispatcher)
    cpu_s = bench.solo_s("cpu", "llama3.2", 1500, 1)    # of the size that `rows` says
    assert cpu_s < it.lease.quiet_s + 5 * cpu_s             # in doubt it comes last; nothing is taken from it


def test_where_a_prediction_is_a_mere_guess_a_race_does_not_wait_for_doubt():
    dispatcher = cluster(slots=1, n1=["m"], n2=["m"])
    it, = enter(dispatcher, want(prompt_chars=30_000))
    placed(dispatcher)
    racing(dispatcher, it)
    assert it.lease.race_s < it.lease.quiet_s
    assert raced(dispatcher, it.lease.race_s - 0.1) == [] and raced(dispatcher, it.lease.quiet_s - 0.1) == ["n2"]
    assert not dispatcher.cluster.nodes["n1"].suspect


LARGE = (("num_ctx", 8192),)


def test_options_of_a_model_that_was_found_loaded_are_known_once_it_answers():
    dispatcher = cluster(slots=2, n1=["m"])
    first, = enter(dispatcher, want())
    placed(dispatcher)
    first.lease.heard(1, 0.5)
    other, = enter(dispatcher, want(options=LARGE), now=1.0)
    placed(dispatcher, 1.0)
    assert other.lease.loads


DETAILS = {"family": "llama", "parameter_size": "3.2B", "quantization_level": "Q4_K_M", "format": "gguf"}
BLOB_A, BLOB_B = "sha256-" + "a" * 64, "sha256-" + "b" * 64


def twin_rows(*models, size=2e9):
    return [{"name": model, "size": size + 1000 * number, "digest": f"d-{model}", "details": DETAILS}
            for number, model in enumerate(models)]


def of_blobs(dispatcher, node, **blobs):
    """Tell a dispatcher the weights of models, by their names."""
    dispatcher.cluster.know_made(node, {(f"{model}:latest", f"d-{model}"): sollol.Made(blob)
                                        for model, blob in blobs.items()})


def twins(slots=2, *more):
    """Return a dispatcher whose one node has two names of the same weights, and its node."""
    dispatcher = cluster(slots=slots, resident=False, n1=["a", "b", *more])
    node = dispatcher.cluster.nodes["n1"]
    dispatcher.cluster.take_tags(node, twin_rows("a", "b", *more))
    of_blobs(dispatcher, node, a=BLOB_A, b=BLOB_A, **{model: BLOB_B for model in more})
    return dispatcher, node


def test_only_models_that_look_alike_are_asked_for_their_weights():
    dispatcher = cluster(n1=["a"])
    node = dispatcher.cluster.nodes["n1"]
    alike = twin_rows("a", "b", "c")
    alike[2]["digest"] = "d-b"          # a copy of b: the same in any case
    other = [{**row, "name": row["name"] + name} for name, row in zip("12", twin_rows("x", "y"), strict=True)]
    other[1]["details"] = {**DETAILS, "quantization_level": "Q8_0"}
    bare = [{"name": "p", "size": 2e9, "digest": "p"}, {"name": "q", "size": 2e9, "digest": "q", "details": {}},
            {"name": "r", "size": 2e9, "digest": "r", "details": 5}]
    larger = twin_rows("z", size=2e9 + 3 * sollol.MIB)
    dispatcher.cluster.take_tags(node, [*alike, *bare, *larger])
    assert sorted(sollol.possible_twins(node)) == ["a:latest", "b:latest"]
    dispatcher.cluster.take_tags(node, [other[0], {**other[1], "digest": "d2"}])
    assert sollol.possible_twins(node) == []
    dispatcher.cluster.take_tags(node, twin_rows("a", "b"))
    of_blobs(dispatcher, node, a=BLOB_A, b="")
    assert sollol.possible_twins(node) == []


@pytest.mark.parametrize("modelfile, num_ctx", [
    ("FROM x\nPARAMETER num_ctx 32768\nPARAMETER stop x", 32768), ("PARAMETER num_ctx 8192", 8192),
    ("# PARAMETER num_ctx 1\nPARAMETER temperature 1", 0), ("PARAMETER num_ctx many", 0), (None, 0)])
def test_context_that_a_model_brings_along_is_told_in_its_modelfile(modelfile, num_ctx):
    assert sollol.made_from(modelfile).num_ctx == num_ctx


@pytest.mark.parametrize("modelfile, blob", [
    (f"# Modelfile\n# FROM llama3.2:latest\n\nFROM /usr/share/ollama/blobs/{BLOB_A}\nTEMPLATE x", BLOB_A),
    (f"FROM C:\\Users\\x\\blobs\\{BLOB_B}\r\nFROM /blobs/{BLOB_A}", BLOB_B), ("FROM llama3.2", ""), ("", ""),
    (f"# FROM /blobs/{BLOB_A}", ""), (None, ""), (5, "")])
def test_weights_of_a_model_are_named_in_its_modelfile(modelfile, blob):
    assert sollol.made_from(modelfile).blob == blob


def test_names_of_the_same_weights_share_runner_slots_residency_and_speeds():
    dispatcher, node = twins(2, "c")
    a, b, c = (runner(dispatcher, "n1", f"{model}:latest") for model in "abc")
    assert a is b is not c and a.models == ["a:latest", "b:latest"] and len(sollol.each_runner(node)) == 2
    node.take_ps(ps_rows("a"), 1.0, 1.0)
    tickets = enter(dispatcher, want("b"), want("a"), want("b"), want("a"), now=2.0)
    assert placed(dispatcher, 2.0) == ["n1", "n1"]
    assert not any(it.lease.loads for it in tickets[:2])
    stats = sollol.node_stats(node, 2.0)["models"]
    assert [(stats[f"{model}:latest"]["resident"], stats[f"{model}:latest"]["inflight"]) for model in "abc"] == [
        (True, 1), (True, 1), (False, 0)]
    finish(dispatcher, tickets[0], 3.0, prompted(100, 0.001, 1.0, 80))
    assert placed(dispatcher, 3.0) == ["n1"] and a.leases[1].ticket is tickets[2]
    assert list(dispatcher.cluster.estimates.lengths) == ["b:latest"]
    finish(dispatcher, tickets[1], 4.0)
    assert placed(dispatcher, 4.0) == ["n1"]
    for it in tickets[2:]:
        finish(dispatcher, it, 5.0)
    node.runners["a:latest"].promised_to_unload()
    assert b.ready_s is None and empty(dispatcher)


def test_names_are_shared_and_parted_as_what_is_known_of_their_weights_changes():
    dispatcher = cluster(slots=0, resident=False, n1=["a", "b"])
    node = dispatcher.cluster.nodes["n1"]
    dispatcher.cluster.take_tags(node, twin_rows("a", "b"))
    a, b = runner(dispatcher, "n1", "a:latest"), runner(dispatcher, "n1", "b:latest")
    b.speeds.samples, b.speeds.decode_s = 5, 0.01
    node.take_ps(ps_rows("a"), 1.0, 1.0)
    first, = enter(dispatcher, want("a"), now=1.0)
    placed(dispatcher, 1.0)
    b.leases.append(first.lease)        # both work: they stay as they are
    of_blobs(dispatcher, node, a=BLOB_A, b=BLOB_A)
    assert (node.runners["a:latest"], node.runners["b:latest"]) == (a, b)
    b.leases.clear()
    dispatcher.cluster.take_tags(node, twin_rows("a", "b"))
    assert node.runners["b:latest"] is node.runners["a:latest"] is a
    finish(dispatcher, first, 2.0)
    dispatcher.cluster.take_tags(node, [*twin_rows("a"), {**twin_rows("b")[0], "digest": "newer"}])
    new = node.runners["b:latest"]
    assert new is not node.runners["a:latest"] is a and (a.models, new.models) == (["a:latest"], ["b:latest"])
    dispatcher.cluster.take_tags(node, twin_rows("a", "b"))
    of_blobs(dispatcher, node, b=BLOB_A)
    dispatcher.cluster.take_tags(node, twin_rows("b"))      # the name that it had first is gone
    assert list(node.runners) == ["b:latest"] == node.runners["b:latest"].models
    assert node.runners["b:latest"].model == "b:latest" and list(dispatcher.cluster.holders) == ["b:latest"]


def test_name_that_a_node_does_not_know_leaves_the_other_name_loaded():
    dispatcher, node = twins()
    node.take_ps(ps_rows("a"), 1.0, 1.0)
    it, = enter(dispatcher, want("b"), now=1.0)
    placed(dispatcher, 1.0)
    assert not fail(dispatcher, it, "missing", 2.0)
    assert list(dispatcher.cluster.holders) == ["a:latest"] and runner(dispatcher, "n1", "a:latest").ready_s is not None


def test_place_prefers_a_holder_and_takes_no_slot():
    dispatcher = cluster(n1=["x"], n2=["m"])
    spec = want(inference=False)
    lease = dispatcher.lease_unqueued("c1", spec, set(), 0.0)
    assert (lease.node.name, lease.runner) == ("n2", None)
    assert dispatcher.lease_unqueued("c2", spec, {"n2"}, 0.0).node.name == "n1"
    assert dispatcher.lease_unqueued("c3", want("unknown"), set(), 0.0).node.name == "n1"
    with pytest.raises(Refusal) as caught:
        dispatcher.lease_unqueued("c4", spec, {"n1", "n2"}, 0.0)
    assert caught.value.status == 502
    for node in dispatcher.cluster.nodes.values():
        node.lost(0.0)
    with pytest.raises(Refusal) as caught:
        dispatcher.lease_unqueued("c5", spec, set(), 0.0)
    assert caught.value.status == 503 and caught.value.retry_after_s >= 1


def test_round_robin_takes_turns_and_skips_what_is_down():
    dispatcher = cluster("round-robin", n1=["m"], n2=["m"], n3=["m"])
    enter(dispatcher, *[want()] * 7)
    assert placed(dispatcher) == ["n1", "n2", "n3"] * 2 + ["n1"]
    dispatcher.cluster.nodes["n2"].lost(0.0)
    enter(dispatcher, *[want()] * 4)
    assert sorted(placed(dispatcher)) == ["n1", "n1", "n3", "n3"]


def test_least_inflight_takes_the_emptiest_and_skips_what_is_down():
    dispatcher = cluster("least-inflight", n1=["m"], n2=["m"], n3=["m"])
    tickets = enter(dispatcher, *[want()] * 6)
    assert placed(dispatcher) == ["n1", "n2", "n3"] * 2
    finish(dispatcher, tickets[2], 1.0)
    enter(dispatcher, want(), now=1.0)
    assert placed(dispatcher, 1.0) == ["n3"]
    dispatcher.cluster.nodes["n1"].lost(1.0)
    enter(dispatcher, want(), want(), now=1.0)
    assert placed(dispatcher, 1.0) == ["n2", "n3"]


# -----------------------------------------------------------------------------
# Statistics in an answer's last line
# -----------------------------------------------------------------------------

@table("tail, expected", [
    ("chat", b'..."}\n{"model":"m","done":true,"total_duration":5000000000,"load_duration":1000000000,'
     b'"prompt_eval_count":26,"prompt_eval_duration":500000000,"eval_count":8,"eval_duration":2500000000}\n',
     Timings(5, 1, 0.5, 26, 2.5, 8)),
    ("spaces", b'{"eval_count": 7, "total_duration":\t3000000000}', Timings(3, output_tokens=7)),
    ("embed", b'{"total_duration":2000000000,"load_duration":1000000000,"prompt_eval_count":8}',
     Timings(2, 1, 0, 8)),
    ("openai", b'data: {"usage":{"prompt_tokens":5,"completion_tokens":9}}\n\ndata: [DONE]\n\n',
     Timings(prompt_tokens=5, output_tokens=9)),
    ("anthropic", b'event: message_delta\ndata: {"usage":{"input_tokens":5,"output_tokens":9}}\n\n',
     Timings(prompt_tokens=5, output_tokens=9)),
    ("the last one counts", b'{"completion_tokens":0}\n{"completion_tokens":4}', Timings(output_tokens=4)),
    ("quoted in the text", rb'{"response":"{\"eval_count\":9}","done":false}', Timings()),
    ("cut", b'_count":5,"eval_count":', Timings()), ("empty", b"", Timings()),
    ("garbage", b'\xff"eval_count"', Timings()),
    ("wrong types", b'{"eval_count":"9","total_duration":null,"prompt_eval_count":-5}', Timings()),
])
def test_timings_are_read_from_the_end_of_an_answer(tail, expected):
    assert sollol.read_timings(tail) == expected


def test_huge_numbers_in_timings_raise_nothing():
    assert sollol.read_timings(b'{"eval_count":' + b"9" * 5000 + b"}").output_tokens > 0


def test_hidden_wait_is_what_no_duration_explains():
    assert Timings(5, 1, 0.5, 26, 2.5, 298).hidden_wait_s == 1.0


def test_title_of_a_chat_is_short_and_the_chat_is_long():
    lengths = sollol.OutputLengths()
    for _ in range(10):
        lengths.learn(500, 12, kind=1)
        lengths.learn(500, 700, kind=2)
    assert lengths.expect(500, 1) < 60 and lengths.expect(500, 2) > 640
    assert lengths.expect(500) == lengths.expect(500, 3) == pytest.approx(356, abs=60)
    for kind in range(3, 3 + 2 * sollol.MOST_KINDS):
        lengths.learn(500, 5, kind)
    assert len(lengths.kinds) == sollol.MOST_KINDS


@table("one, other, alike", [
    ("another question", {}, {"messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "b"}]}, True),
    ("another system prompt", {}, {"messages": [{"role": "system", "content": "t"}]}, False),
    ("another format", {}, {"format": "json"}, False), ("with tools", {}, {"tools": [{"a": 1}]}, False),
    ("thinking", {}, {"think": True}, False),
    ("no system prompt", {"messages": [{"role": "user", "content": "a"}]}, {"messages": []}, True)])
def test_kind_of_a_request_is_what_its_answers_length_depends_on(one, other, alike):
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}
    kinds = [asked("/api/chat", {**chat, **change}).kind for change in (one, other)]
    assert (kinds[0] == kinds[1]) is alike and bool(kinds[0]) is ("messages" not in one)


def test_conversation_has_the_cache_of_one_slot_and_the_least_recent_one_is_pushed_out():
    known, turns = sollol.Prefixes(), [tuple((part, 4000 * part) for part in range(1, last + 1)) for last in (4, 6, 8)]
    for now, turn in enumerate(turns):
        since_s = known.forget_continued(turn, now)
        known.remember(sollol.Cached(turn, now, None, since_s), 2)
    assert len(known.prompts) == 1 and known.common_chars(turns[0]) == 16_000 and since_s == 0.0
    assert known.next_victim(2, ()) is sollol.NOTHING and known.evicted_chars(sollol.NOTHING, 3.0) == 0
    known.hit_share = 1.0
    known.remember(sollol.Cached(((77, 100),), 3.0), 2)
    victim = known.next_victim(2, ())
    assert known.evicted_chars(victim, 4.0) == 32_000       # the conversation, which may go on
    assert known.next_victim(2, (turns[-1][-1][0],)).prefix == ((77, 100),)     # what runs stays
    assert known.evicted_chars(victim, 4.0 + sollol.CONTINUED_S) == 0
    known.hit_share = 0.5                               # others push it out in any case
    assert known.evicted_chars(victim, 4.0) == 0
    known.remember(sollol.Cached(((78, 100),), 5.0), 2)
    assert not known.common_chars(turns[0]) and len(known.prompts) == 2


def test_hits_of_conversations_are_learned_and_single_prompts_are_none():
    known = sollol.Prefixes()
    for number in range(40):
        turn = tuple((part, 4000 * part) for part in range(1, 5 + number))
        known.forget_continued(turn, number)
        known.remember(sollol.Cached(turn, number), 2)
        known.forget_continued(((-number, 10),), number)
    assert known.hit_share > 0.95


@table("told, seconds, now, is_back", [
    ("never seen to go on", "b0 e1", 60, 2, False), ("back after two seconds", "b0 e1 b3 e4", 5, 5, True),
    ("not within one", "b0 e1 b3 e4", 1, 5, False), ("late", "b0 e1 b3 e4", 5, 17, False),
    ("it waits", "b0 e1 b3 e4 b100 w", 1, 200, True), ("it runs", "b0 e1 b3 e4 b6 r", 60, 7, False),
    ("one beside another is no pause", "b0 e1 b3 r b3.1 e9 b11 e12", 2.5, 13, True)])
def test_conversation_is_expected_back_by_its_usual_pause(told, seconds, now, is_back):
    pace = sollol.Pace()
    for word in told.split():
        if word in "rw":
            pace.running, pace.waiting = word.count("r"), word.count("w")
        elif word[0] == "b":
            pace.begin(float(word[1:]))
        else:
            pace.running, pace.waiting = 1, 0
            pace.end(float(word[1:]))
    assert pace.is_back_within(seconds, now) is is_back


def turn_of(session, parts, now, dispatcher, **more):
    """Enter a turn of a conversation of 4,000 characters, about 0.7 s of prefill, a part; return its ticket."""
    prefix = tuple((session * 1000 + part, 4000 * part) for part in range(1, parts + 1))
    it, = enter(dispatcher, want(prefix=prefix, prompt_chars=4000 * parts, session=session, **more), now=now)
    return it


def test_slot_is_kept_for_a_conversation_that_goes_on_but_not_for_ever():
    dispatcher = cluster(slots=1, n1=["m"])
    runner(dispatcher, "n1").speeds.prefill_s = 0.001       # 4 s for a conversation of 16,000 characters
    now = 0.0
    for parts in (4, 5, 6):
        first = turn_of(1, parts, now, dispatcher)
        assert placed(dispatcher, now) == ["n1"]
        finish(dispatcher, first, now + 1.0)
        now += 2.0                  # its tools take a second
    other, single = turn_of(2, 5, 5.5, dispatcher), turn_of(3, 3, 5.6, dispatcher)
    assert placed(dispatcher, 5.7) == ["n1"] and single.lease       # a question that is no conversation is not held up
    finish(dispatcher, single, 5.8)
    first = turn_of(1, 7, 6.0, dispatcher)          # it lost its cache: whoever came first goes first
    assert placed(dispatcher, 6.1) == ["n1"] and other.lease
    finish(dispatcher, other, 7.0)
    assert placed(dispatcher, 7.0) == ["n1"] and first.lease
    finish(dispatcher, first, 8.0)
    for parts, now in ((8, 9.0), (9, 11.0)):
        first = turn_of(1, parts, now, dispatcher)
        placed(dispatcher, now)
        finish(dispatcher, first, now + 1.0)
    other = turn_of(2, 6, 12.1, dispatcher)
    assert placed(dispatcher, 12.1) == [] == placed(dispatcher, 12.9)
    first = turn_of(1, 10, 13.0, dispatcher)
    assert placed(dispatcher, 13.0) == ["n1"] and first.lease and not other.lease
    finish(dispatcher, first, 14.0)
    assert placed(dispatcher, 14.5) == [] and placed(dispatcher, 30.0) == ["n1"]     # it comes back no more
    finish(dispatcher, other, 31.0)


@pytest.mark.parametrize("in_slots, elsewhere", [(True, False), (False, False), (True, True)])
def test_answers_show_how_much_a_cache_really_holds(in_slots, elsewhere):
    """Two conversations in turn on one slot, then one alone; a part of a prompt takes a second."""
    dispatcher, now = cluster(slots=1, n1=["m"]), 0.0
    known = runner(dispatcher, "n1")
    known.speeds.prefill_s = 0.001
    known.speeds.prefills.extend([0.001] * 20)

    def turn(session, parts, cached):
        nonlocal now
        it = turn_of(session, parts, now, dispatcher)
        assert placed(dispatcher, now) == ["n1"]
        work_s = 0.001 * parts * 1000 * (0.05 if cached else 1.0)
        it.lease.heard(1, now + work_s)
        finish(dispatcher, it, now + work_s + 0.8, prompted(1000 * parts, work_s / parts / 1000, 0.8, 40))
        now += work_s + 150.0       # so that no conversation is waited for

    for parts in range(4, 24):
        for session in (1, 2):
            turn(session, parts, elsewhere and parts > 4)
    for parts in range(24, 44):
        turn(1, parts, in_slots)
    assert (known.held_elsewhere > sollol.HELD_ABOVE) is elsewhere
    assert (known.held_in_slots > sollol.HELD_BELOW) is in_slots
    offer = sollol.NodeSnapshot(known.node, now).offer(known, now)
    demands = [dispatcher.cluster.estimates.demand(turn_of(session, parts, now, dispatcher).spec)
               for session, parts in ((1, 44), (2, 24))]
    lacks = [offer.new_tokens(demand) / demand.prompt_tokens < 0.5 for demand in demands]
    assert lacks == [in_slots, elsewhere]


def test_new_conversation_goes_where_no_other_one_is_expected_back():
    dispatcher = cluster(slots=2, n1=["m"], n2=["m"])
    for node in ("n1", "n2"):
        runner(dispatcher, node).speeds.prefill_s = 0.001
    now = 0.0
    for parts in (4, 5, 6):
        first = turn_of(1, parts, now, dispatcher)
        assert placed(dispatcher, now) == ["n1"]
        finish(dispatcher, first, now + 1.0)
        now += 2.0
    known = runner(dispatcher, "n1").prefixes
    assert [known.expected_back(0.001, now) for now in (5.5, 100.0)] == [1, 0] and not known.expected_back(0.0001, 5.5)
    second = turn_of(2, 4, 5.5, dispatcher)
    assert placed(dispatcher, 5.5) == ["n2"] and second.lease
    first = turn_of(1, 7, 6.0, dispatcher)
    assert placed(dispatcher, 6.0) == ["n1"]
    finish(dispatcher, first, 7.0)
    third = turn_of(3, 4, 100.0, dispatcher)        # by then nobody comes back to n1
    assert placed(dispatcher, 100.0) == ["n1"] and third.lease


def test_conversation_waits_for_others_no_longer_than_their_stay():
    dispatcher = cluster(slots=1, n1=["m"])
    runner(dispatcher, "n1").speeds.prefill_s = 0.001
    now, other = 0.0, None
    for parts in range(4, 100):
        first = turn_of(1, parts, now, dispatcher)
        other = other or (turn_of(2, 5, now, dispatcher) if parts == 6 else None)
        placed(dispatcher, now)
        if not first.lease:
            break
        finish(dispatcher, first, now + 1.0)
        placed(dispatcher, now + 1.0)
        now += 2.0
    assert other.lease and other.lease.sent_s == pytest.approx(4.0 + sollol.MOST_KEPT_S, abs=2.1)


def test_ten_answers_tell_how_many_tokens_chats_agents_and_pictures_are():
    """Chats of 4.4 characters a token, agents of 2.9, pictures of 280 tokens, in turn: none spoils the others."""
    sizes, true = sollol.PromptSizes(), {"chat": 4.4, "agent": 2.9, "picture": 4.4}
    specs = {"chat": want(prompt_chars=3000, prompt_tokens=40),
             "agent": want(prompt_chars=90_000, has_tools=True, prompt_tokens=120),
             "picture": want(prompt_chars=500, prompt_images=3, prompt_tokens=4)}
    tokens = {kind: spec.prompt_chars / true[kind] + spec.prompt_images * 280 + spec.prompt_tokens
              for kind, spec in specs.items()}
    for _ in range(10):
        for kind, spec in specs.items():
            sizes.learn(spec, tokens[kind])
    for kind, spec in specs.items():
        assert sizes.tokens(spec) == pytest.approx(tokens[kind], rel=0.15)


def turn_of_agent(name, turns, schema_chars, text="x = 1\n"):
    """Return (RequestSpec, tokens) of a turn: a schema of five characters a token, then three a token in each turn."""
    said = [{"role": "user", "content": "do it"}]
    for turn in range(turns):
        said += [{"role": "assistant", "content": f"turn {turn}"}, {"role": "user", "content": text * 700}]
    spec = asked("/v1/messages", {"tools": [{"name": name, "description": "d" * schema_chars}], "messages": said})
    lead_chars = spec.prefix[0][1]
    return spec, lead_chars / 5 + (spec.prompt_chars - lead_chars) / 3 + spec.prompt_tokens


def test_turns_of_agents_are_as_many_tokens_as_was_told_and_what_they_add():
    """Of two agents of one model, with large schemas and small ones, and of chats between their turns."""
    sizes, chat = sollol.PromptSizes(), want(prompt_chars=3000, prompt_tokens=40)
    for turns in range(10):
        for spec, tokens in (turn_of_agent("a", turns, 70_000), turn_of_agent("b", turns, 15_000), (chat, 722)):
            if turns > 4:
                assert sizes.tokens(spec) == pytest.approx(tokens, rel=0.1)
            sizes.learn(spec, tokens)
    for name, schema_chars in (("a", 70_000), ("b", 15_000)):      # another conversation begins with the same lead
        spec, tokens = turn_of_agent(name, 1, schema_chars, "y = 2\n")
        assert sizes.tokens(spec) == pytest.approx(tokens, rel=0.06)
    spec, tokens = turn_of_agent("c", 0, 40_000)                    # so does another agent: with a schema
    assert sizes.tokens(spec) == pytest.approx(tokens, rel=0.2)


def test_programs_without_tools_do_not_spoil_each_other_nor_chats():
    """Two send tables of numbers, which have few characters a token."""
    sizes, true = sollol.PromptSizes(), {1: 2.4, 2: 3.2, 0: 4.2}
    for number in range(1, 11):
        for kind, chars_per_token in true.items():
            spec = want(prompt_chars=3000 + 700 * number, kind=kind)
            if number > 5:
                assert sizes.tokens(spec) == pytest.approx(spec.prompt_chars / chars_per_token, rel=0.15)
            sizes.learn(spec, spec.prompt_chars / chars_per_token)
    for kind in range(100, 1100):
        sizes.learn(want(kind=kind), 100)
    assert len(sizes.kinds) == sollol.MOST_KINDS and sizes.chars_per_token == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("chars, tokens", [(0, 0), (600, 300), (1200, 600), (1500, 700), (1800, 800), (2100, 900)])
def test_beginning_of_a_prompt_is_a_share_of_what_is_known_of_it(chars, tokens):
    """600 tokens were told of the first 1,200 characters; 300 are expected of the 900 behind them."""
    known = sollol.PromptSize(1200, 0, 590, 10)
    assert sollol.Demand(want(prompt_chars=2100), 900, 1, 1, known=known).tokens_of(chars) == pytest.approx(tokens)
    assert sollol.Demand(want(prompt_chars=2100), 900, 1, 1).tokens_of(chars) == pytest.approx(chars * 3 / 7)


def test_what_a_cache_lacks_of_an_agents_turn_is_what_the_turn_adds():
    """A large schema has five characters a token, and what a turn adds has three."""
    dispatcher, now = cluster(n1=["m"]), 0.0
    for turns in range(6):
        spec, tokens = turn_of_agent("a", turns, 70_000)
        spec = replace(spec, model="m:latest")
        demand = dispatcher.cluster.estimates.demand(spec)
        it, = enter(dispatcher, spec, now=now)
        placed(dispatcher, now)
        new_tokens = it.lease.new_tokens
        finish(dispatcher, it, now + 3.0, Timings(3.0, 0, 2.0, tokens, 1.0, 20))
        now += 10
    assert new_tokens == pytest.approx(700 * 6 / 3 + 7 / 3 + 8, rel=0.1)
    assert demand.prompt_tokens == pytest.approx(tokens, rel=0.02)


def test_pictures_of_earlier_turns_are_counted_once():
    sizes = sollol.PromptSizes()
    said = [{"role": "user", "content": "a" * 400, "images": ["A"]}]
    sizes.learn(asked(body={"messages": said}), 100 + 280 + 4)
    said += [{"role": "assistant", "content": "b" * 400}, {"role": "user", "content": "c" * 400}]
    assert sizes.tokens(asked(body={"messages": said})) == 300 + 280 + 3 * 4


def test_prompt_that_a_node_has_cut_does_not_tell_characters_per_token():
    """It is as large as the context of that node, whatever was added to it."""
    sizes = sollol.PromptSizes()
    for turns in range(10):
        spec, tokens = turn_of_agent("a", turns, 8_000)
        sizes.learn(spec, min(tokens, 4096 + 20 * turns))
    assert sizes.chars_per_token_added < 4.5


def test_parts_of_a_batch_are_not_taken_for_the_whole():
    sizes, whole = sollol.PromptSizes(), want(embeds=True, prompt_chars=8000, prefix=((1, 8000),))
    sizes.learn(replace(whole, prompt_chars=2000), 1000)
    assert sizes.tokens(whole) == 8000 / sizes.chars_per_token


def test_sizes_of_the_last_prompts_are_known_and_of_the_leads_in_use():
    sizes = sollol.PromptSizes()
    for number in range(3000):
        sizes.learn(want(has_tools=True, prefix=((-1, 400), (number, 440)), prompt_chars=440), 110)
    assert len(sizes.known) == sizes.MOST_KNOWN and {-1, 2999} <= sizes.known.keys() and 9 not in sizes.known
    assert sizes.samples == {"chars_per_token_with_tools": 1}       # all the others began with a known lead


def test_output_lengths_are_learned_by_size_of_the_prompt():
    lengths = sollol.OutputLengths()
    assert lengths.expect(100) == sollol.PRIOR_OUTPUT_TOKENS
    for _ in range(200):
        lengths.learn(100, 20)
        lengths.learn(5000, 800)
    assert lengths.expect(100) < 80 and lengths.expect(5000) > 700
    assert lengths.expect(100) < lengths.expect(1_000_000) == lengths.mean < lengths.expect(5000)


# -----------------------------------------------------------------------------
# Learning, estimates and runners
# -----------------------------------------------------------------------------

def two_on_one(now=0.0):
    """Return a dispatcher whose one node of unknown slots runs two requests, the second sent 0.1 s later."""
    dispatcher = cluster(slots=0, n1=["m"])
    tickets = []
    for at in (now, now + 0.1):
        tickets += enter(dispatcher, want(), now=at)
        assert placed(dispatcher, at) == ["n1"]
    return dispatcher, tickets


def test_streams_that_overlap_prove_slots():
    dispatcher, tickets = two_on_one()
    tickets[0].lease.heard(1, 0.5)
    assert runner(dispatcher, "n1").slots.count == 1
    tickets[1].lease.heard(1, 0.6)
    assert (runner(dispatcher, "n1").slots.count, runner(dispatcher, "n1").slots.origin) == (2, "learned")


def test_overlap_without_hidden_wait_proves_slots():
    dispatcher, (_, second) = two_on_one()
    finish(dispatcher, second, 2.0, Timings(1.9, 0, 0.4, 100, 1.5, 50))
    assert runner(dispatcher, "n1").slots.count == 2


@pytest.mark.parametrize("left_s, slots", [(1.5, 2), (0.4, 2), (0.2, 1)])
def test_answers_that_end_in_their_order_prove_slots_if_a_wait_would_have_shown(left_s, slots):
    """As those of equal length do, that come whole: when one ends, those sent before it have left."""
    dispatcher, (first, second) = two_on_one()
    finish(dispatcher, first, left_s, Timings(left_s - 0.05, 0, 0.1, 100, left_s - 0.15, 50))
    finish(dispatcher, second, 2.0, Timings(1.85, 0, 0.4, 100, 1.4, 50))
    assert runner(dispatcher, "n1").slots.count == slots


def test_requests_sent_at_the_same_instant_prove_slots_too():
    dispatcher = cluster(slots=0, n1=["m"])
    _, second = enter(dispatcher, want(), want())
    assert placed(dispatcher) == ["n1", "n1"]
    finish(dispatcher, second, 2.0, Timings(1.9, 0, 0.4, 100, 1.5, 50))
    assert runner(dispatcher, "n1").slots.count == 2


def test_hidden_waits_in_a_row_shrink_what_was_proved():
    """Somebody else uses the node: three requests in a row had to wait within the slots that it was proved to have."""
    dispatcher = cluster(slots=0, n1=["m"])
    runner(dispatcher, "n1").confirm_slots(4, 0.0)
    for number in range(3):
        assert runner(dispatcher, "n1").slots.count == 4
        tickets = enter(dispatcher, *[want()] * 4, now=10.0 * number)
        assert len(placed(dispatcher, 10.0 * number)) == 4
        finish(dispatcher, tickets[3], 10.0 * number + 5, Timings(4.9, 0, 0.4, 100, 1.5, 50))
        for it in tickets[:3]:
            dispatcher.leave(it, 10.0 * number + 5)
    assert (runner(dispatcher, "n1").slots.count, runner(dispatcher, "n1").slots.retry_at_s) == (3, 45.0)


def test_embeddings_do_not_disprove_slots_by_computing():
    dispatcher = cluster(slots=0, n1=["m"])
    _, second = enter(dispatcher, *[want(embeds=True)] * 2)
    placed(dispatcher)
    finish(dispatcher, second, 2.0, Timings(1.9, 0, 0, 100))
    assert runner(dispatcher, "n1").slots.origin == "guessed"


COUNTS = Timings(prompt_tokens=100, output_tokens=50)   # all that an answer of /v1 tells


def whole(**more):
    """A request whose answer comes in one piece and tells no durations."""
    return want(stream=False, family=Family.OPENAI, **more)


def answered(dispatcher, done, now, timings=COUNTS):
    """Answer a ticket in one piece, and end it."""
    done.lease.heard(1, now)
    finish(dispatcher, done, now, timings)


def sent_apart(*spec, slots=0, apart_s=0.2, known=1):
    """Return a dispatcher whose one node has been sent requests one after the other, from 100 s on, and their tickets.

    Three requests before them were alone, and took one second each.
    """
    dispatcher, tickets = cluster(slots=slots, n1=["m"]), []
    for number in range(3):
        alone, = enter(dispatcher, whole(), now=10.0 * number)
        placed(dispatcher, 10.0 * number)
        answered(dispatcher, alone, 10.0 * number + 1.0)
    runner(dispatcher, "n1").confirm_slots(known, 0.0)
    for number, it in enumerate(spec):
        tickets += enter(dispatcher, it, now=100 + number * apart_s)
        assert placed(dispatcher, 100 + number * apart_s) == ["n1"]
    return dispatcher, tickets


def test_answer_that_overtakes_an_earlier_one_proves_slots():
    dispatcher, (_, second) = sent_apart(whole(), whole())
    answered(dispatcher, second, 100.9)
    assert (runner(dispatcher, "n1").slots.count, runner(dispatcher, "n1").slots.origin) == (2, "learned")


@table("spec, apart_s, timings", [
    ("sent at the same time: who was first?", [whole(), whole()], 0.001, COUNTS),
    ("no prompt, so it only loads", [whole(), whole()], 0.2, Timings()),
    ("the first one waits for a load of its own", [whole(options=(("num_ctx", 1),)), whole()], 0.2, COUNTS)])
def test_answer_that_overtakes_an_earlier_one_for_other_reasons_proves_nothing(spec, apart_s, timings):
    dispatcher, (_, second) = sent_apart(*spec, apart_s=apart_s)
    answered(dispatcher, second, 100.9, timings)
    assert runner(dispatcher, "n1").slots.count == 1


def followed(took_s, times=1, known=1, **more):
    """Return the runner after requests that were each sent 0.1 s after one that took a second, and took so long."""
    dispatcher, tickets = sent_apart(known=known)
    for number in range(times):
        start = 100 + 10.0 * number
        if known == 1:
            runner(dispatcher, "n1").slots.retry_at_s = min(runner(dispatcher, "n1").slots.retry_at_s, start)
        first, = enter(dispatcher, whole(**more), now=start)
        placed(dispatcher, start)
        second, = enter(dispatcher, whole(**more), now=start + 0.1)
        placed(dispatcher, start + 0.1)
        answered(dispatcher, first, start + 1.0)
        answered(dispatcher, second, start + 0.1 + took_s)
    return runner(dispatcher, "n1")


def test_latency_near_the_one_seen_alone_is_a_sign_for_a_slot_and_some_signs_prove_it():
    assert followed(1.2, sollol.SIGNS_FOR - 1).slots.count == 1
    assert followed(1.2, sollol.SIGNS_FOR).slots.count == 2


def test_latency_with_all_the_wait_in_it_is_a_sign_against_a_slot_and_some_signs_disprove_it():
    kept, stopped = followed(1.9, sollol.SIGNS_AGAINST - 1), followed(1.9, sollol.SIGNS_AGAINST)
    assert (kept.slots.origin, kept.slots.rejections) == ("guessed", 0)
    assert (stopped.slots.count, stopped.slots.origin, stopped.slots.rejections) == (1, "learned", 1)


def test_falsely_proved_slot_is_given_up_again():
    assert followed(1.9, sollol.WAITS_TO_SHRINK - 1, known=2).slots.count == 2
    assert followed(1.9, sollol.WAITS_TO_SHRINK, known=2).slots.count == 1


def test_list_of_inputs_is_no_sign_of_slots():
    """Each input takes a slot of its own, so that its latency says nothing of how many requests fit."""
    assert followed(1.9, 10, embeds=True, inputs=3).slots.origin == "guessed"
    assert followed(1.2, 10, embeds=True, inputs=3).slots.origin == "guessed"


def test_list_of_inputs_is_counted():
    for value, inputs in (("text", 1), (["a", "b"], 2), ([], 1), (None, 1)):
        assert asked("/api/embed", json.dumps({"model": "m", "input": value}).encode()).inputs == inputs


def test_stream_without_usage_is_counted_by_its_events():
    dispatcher = cluster(n1=["m"])
    for start in range(0, 100, 10):
        it, = enter(dispatcher, want(family=Family.OPENAI), now=start)
        placed(dispatcher, start)
        it.lease.heard(2, start + 1.0)
        it.lease.heard(2 * 41, start + 5.0)     # 40 tokens in all, then the finish and [DONE]
        finish(dispatcher, it, start + 5.0)
    assert dispatcher.cluster.estimates.lengths["m:latest"].mean == pytest.approx(40)
    assert runner(dispatcher, "n1").speeds.decode_s == pytest.approx(0.1, rel=0.05)
    assert runner(dispatcher, "n1").speeds.lines_per_token > 1.5


@table("given, told, path, is_whole, expected", [
    ("told", dict(lines=5), (7, 4), "/api/chat", True, (7, 4, False)),
    ("an empty answer", dict(lines=2), (7, 0), "/api/chat", True, (7, 0, False)),
    ("the prompt is not told", dict(lines=5), (0, 4), "/api/chat", True, (100, 4, True)),
    ("a whole stream without usage", dict(lines=2 * 42, family=Family.OPENAI), (0, 0), OPENAI, True, (100, 40, True)),
    ("cut", dict(lines=2 * 42 + 1, family=Family.OPENAI), (0, 0), OPENAI, False, (100, 42, True)),
    ("cut, Ollama's own", dict(lines=42), (0, 0), "/api/chat", False, (100, 42, True)),
    ("cut, Anthropic's", dict(lines=3 * 42, family=Family.ANTHROPIC), (9, 0), "/v1/messages", False, (9, 42, True)),
    ("nothing of it was seen", dict(lines=0), (0, 0), "/api/chat", False, (100, 0, True)),
    ("a whole answer", dict(lines=1, stream=False), (0, 0), "/api/chat", True, (100, 30, True)),
    ("texts to embed", dict(lines=1, stream=False, embeds=True), (0, 0), "/api/embeddings", True, (100, 0, True)),
    ("texts to embed, told", dict(lines=1, stream=False, embeds=True), (7, 0), "/api/embed", True, (7, 0, False)),
    ("a mere load", dict(lines=1, prompt_chars=0), (0, 0), "/api/generate", True, (0, 0, False))])
def test_tokens_that_a_node_does_not_tell_are_estimated_and_marked(given, told, path, is_whole, expected):
    lines = given.pop("lines")
    dispatcher = cluster(n1=["m"])
    it, = enter(dispatcher, want(**given))
    placed(dispatcher)
    it.lease.lines, it.lease.prompt_tokens, it.lease.output_tokens = lines, 100.2, 30.1
    found = sollol.accounted(it.lease, Timings(prompt_tokens=told[0], output_tokens=told[1]), path, is_whole)
    assert (found.prompt_tokens, found.output_tokens, found.estimated) == expected


def test_node_that_was_lost_is_learned_anew():
    dispatcher = cluster(slots=0, n1=["m"])
    runner(dispatcher, "n1").confirm_slots(4, 0.0)
    slots = runner(dispatcher, "n1").slots
    slots.vote(5, 1, 0.0, -math.inf)
    slots.suspect(0, 0.0, -math.inf)
    dispatcher.cluster.nodes["n1"].missed(True, 1.0)
    assert (slots.count, slots.origin) == (1, "guessed")
    assert (slots.votes, slots.waits, slots.lately_seen(1.0)) == (0, 0, 0)


def test_no_hidden_wait_proves_nothing_if_the_first_one_left_meanwhile():
    dispatcher, (first, second) = two_on_one()
    finish(dispatcher, first, 1.0, Timings(0.9, 0, 0.4, 100, 0.5, 50))
    finish(dispatcher, second, 2.0, Timings(0.9, 0, 0.4, 100, 0.5, 50))
    assert runner(dispatcher, "n1").slots.count == 1


@table("timings", [("load in the answer", Timings(9, 2, 0.4, 100, 1.5, 50)), ("no statistics", Timings())])
def test_answers_that_say_nothing_of_slots_teach_none(timings):
    dispatcher, (_, second) = two_on_one()
    finish(dispatcher, second, 9.0, timings)
    assert (runner(dispatcher, "n1").slots.count, runner(dispatcher, "n1").slots.origin) == (1, "guessed")


def test_hidden_wait_disproves_a_slot_for_a_pause_that_doubles():
    dispatcher, now, pauses = cluster(slots=0, n1=["m"]), 0.0, []
    for _ in range(8):
        first, = enter(dispatcher, want(), now=now)
        placed(dispatcher, now)
        second, third, fourth = enter(dispatcher, want(), want(), want(), now=now + 0.1)
        assert placed(dispatcher, now + 0.1) == ["n1"]
        finish(dispatcher, first, now + 2.1)
        finish(dispatcher, second, now + 4, Timings(3.9, 0, 0.4, 100, 1.5, 50))
        assert runner(dispatcher, "n1").slots.count == 1 and placed(dispatcher, now + 4) == ["n1"]
        pauses.append(runner(dispatcher, "n1").slots.retry_at_s - now - 4)
        for it in (third, fourth):
            if it.lease:
                finish(dispatcher, it, now + 5)
            dispatcher.leave(it, now + 5)
        now = runner(dispatcher, "n1").slots.retry_at_s
    assert pauses == pytest.approx([30 * 2**number for number in (0, 1, 2, 3, 4, 5, 6, 6)])


def test_what_was_sent_before_a_slot_was_taken_back_does_not_take_it_back_again():
    """Somebody else fills a node of four slots: one burst of waits costs one slot, and it is tried again in 30 s."""
    dispatcher = cluster(slots=0, n1=["m"])
    known = runner(dispatcher, "n1")
    known.confirm_slots(4, 0.0)
    tickets = enter(dispatcher, *[want()] * 5)
    assert len(placed(dispatcher)) == 5
    for it in tickets[::-1]:
        finish(dispatcher, it, 9.0, Timings(8.9, 0, 0.4, 100, 1.5, 50))
    assert (known.slots.count, known.slots.rejections, known.slots.retry_at_s) == (4, 1, 39.0)


def test_slot_that_was_proved_before_is_tried_again_every_ten_seconds():
    dispatcher = cluster(slots=0, n1=["m"])
    known = runner(dispatcher, "n1")
    known.confirm_slots(2, 0.0)
    known.slots.proven, pauses = 1, []
    for _ in range(5):
        known.note_slots(known.slots.reject(100.0, known.node.strangers_s))
        pauses.append(known.slots.retry_at_s - 100)
    assert pauses == [10, 10, 10, 10, 10]
    dispatcher.cluster.nodes["n1"].missed(True, 200.0)
    assert known.slots.max_proven == 1


def test_slot_that_others_may_have_taken_is_tried_again_every_ten_seconds():
    """A request that was alone, as far as we know, had to wait: somebody else uses the node. Then no pause grows."""
    dispatcher, now, pauses = cluster(slots=0, n1=["m"]), 0.0, []
    for _ in range(6):
        first, = enter(dispatcher, want(), now=now)
        placed(dispatcher, now)
        second, = enter(dispatcher, want(), now=now + 0.1)
        assert placed(dispatcher, now + 0.1) == ["n1"]
        finish(dispatcher, first, now + 4, Timings(3.9, 0, 0.4, 100, 1.5, 50))
        finish(dispatcher, second, now + 6, Timings(5.8, 0, 0.4, 100, 1.5, 50))
        pauses.append(runner(dispatcher, "n1").slots.retry_at_s - now - 6)
        now = runner(dispatcher, "n1").slots.retry_at_s
    assert pauses == pytest.approx([10] * 6)


@table("proven, pause_s", [("one", 1, 10.0), ("two", 2, 20.0), ("many", 8, 20.0)])
def test_gateway_that_has_more_of_a_shared_node_tries_less_often_to_get_another_slot(proven, pause_s):
    slots = sollol.SlotEstimate()
    slots.confirm(9, 0.0)
    slots.proven = proven
    assert slots.reject(100.0, 99.0) and slots.retry_at_s == 100.0 + pause_s


@table("left_s, apart_s, slots", [
    ("the other one still runs", None, 0.1, 2), ("it has left after the wait", 2.5, 0.1, 2),
    ("it has left before", 0.5, 0.1, 1), ("it has left just then", 1.05, 0.1, 1),
    ("sent at the same time", None, 0.0, 1)])
def test_wait_that_ends_while_another_of_ours_runs_proves_that_both_run_at_once(left_s, apart_s, slots):
    """Somebody else's request was before it; of /api, in one piece."""
    dispatcher = cluster(slots=0, n1=["m"])
    first, = enter(dispatcher, want(stream=False))
    placed(dispatcher)
    second, = enter(dispatcher, want(stream=False), now=apart_s)
    placed(dispatcher, apart_s)
    if left_s:
        finish(dispatcher, first, left_s)
    finish(dispatcher, second, apart_s + 3.0, Timings(2.9, 0, 0.4, 100, 1.5, 50))
    assert runner(dispatcher, "n1").slots.proven == slots


def test_set_slots_are_never_unlearned():
    dispatcher = cluster(slots=2, n1=["m"])
    _, second = enter(dispatcher, want(), want())
    placed(dispatcher)
    finish(dispatcher, second, 4.0, Timings(3.9, 0, 0.4, 100, 0.5, 50))
    assert (runner(dispatcher, "n1").slots.count, runner(dispatcher, "n1").slots.origin) == (2, "set")


def batched(exponent, beside=(1, 2, 3, 4), count=200, noise=0.1, alone_s=0.02):
    """Return what is learned from answers beside others, on a runner whose total speed goes with b**exponent."""
    known, rng = sollol.BatchingEstimate(), random.Random(1)
    for _ in range(count):
        there = rng.choice(beside)
        known.learn(math.log(there), alone_s * there ** (1 - exponent) * math.exp(rng.gauss(0, noise)))
    return known


@table("exponent, given, least, most", [
    ("nothing seen", 0.4, {"count": 0}, 0.7, 0.7), ("one answer", 0.4, {"count": 1}, 0.7, 0.7),
    ("always alone", 0.4, {"beside": (1,)}, 0.7, 0.7), ("always full", 0.4, {"beside": (4,)}, 0.7, 0.7),
    ("poor", 0.4, {}, 0.37, 0.46), ("usual", 0.7, {}, 0.67, 0.73), ("full", 1.0, {}, 0.94, 1.0),
    ("one or two", 0.4, {"beside": (1, 2)}, 0.4, 0.55), ("many slots", 0.4, {"beside": range(1, 17)}, 0.37, 0.43),
    ("few answers", 0.4, {"count": 10}, 0.45, 0.65), ("much noise", 0.4, {"noise": 0.5}, 0.3, 0.6),
    ("much noise, usual", 0.7, {"noise": 0.5}, 0.55, 0.85), ("none at all", 0.0, {"noise": 0.0}, 0.3, 0.3),
    ("more than can be", 1.5, {"noise": 0.0}, 1.0, 1.0)])
def test_gain_of_batching_is_learned_within_bounds(exponent, given, least, most):
    known = batched(exponent, **given)
    assert least - 1e-9 <= known.batch_exponent <= most + 1e-9
    assert known.slowdowns[4] == pytest.approx(4 ** (1 - known.batch_exponent), rel=0.02) and known.slowdowns[1] == 1


def test_gain_of_batching_outlives_outliers_and_a_change_of_speed_and_follows_a_change_of_its_own():
    known = batched(0.4)
    before = known.batch_exponent
    for token_s in (1e6, 1e-6):
        known.learn(math.log(4), token_s)
        assert known.batch_exponent == pytest.approx(before, abs=0.1)
    known = batched(0.4)
    known.restart()
    for there in (1, 2, 3, 4) * 10:
        known.learn(math.log(there), 0.2 * there ** 0.6)
        assert known.batch_exponent == pytest.approx(before, abs=0.05)
    for there in (1, 2, 3, 4) * 100:
        known.learn(math.log(there), 0.2)
    assert known.batch_exponent > 0.95


@table("share, learns", [("none", 0.0, True), ("a little", 0.2, True), ("much", 0.3, False)])
def test_prefills_of_others_are_not_taken_for_what_batching_costs(share, learns):
    dispatcher = cluster(slots=2, n1=["m"])
    first, second = enter(dispatcher, want(), want())
    placed(dispatcher)
    known = runner(dispatcher, "n1")
    known.speeds.prefill_s, first.lease.stall_tokens = 0.001, 4000 * share
    finish(dispatcher, first, 5.0, Timings(5.0, 0, 1.0, 1000, 4.0, 100))
    assert (known.batching.samples > 0) is learns
    if learns:
        seen_s = 0.04 * (1 - share / 2)
        assert (known.batching.crowd, known.batching.log_s) == pytest.approx((math.log(2), math.log(seen_s)), abs=0.01)


def test_speeds_and_lengths_are_learned_from_answers():
    dispatcher, now = cluster(n1=["m"]), 0.0
    for _ in range(30):
        it, = enter(dispatcher, want(prompt_chars=3000), now=now)
        placed(dispatcher, now)
        finish(dispatcher, it, now + 3.03, Timings(3.03, 0, 1.03, 1000, 2.0, 40))
        now += 10
    known = runner(dispatcher, "n1")
    assert known.speeds.decode_s == pytest.approx(0.05) and known.speeds.prefill_s == pytest.approx(0.001, rel=0.1)
    lengths = dispatcher.cluster.estimates.lengths["m:latest"]
    assert lengths.prompts.chars_per_token == pytest.approx(3.0, rel=0.1) and lengths.mean == pytest.approx(40)
    offer = known.node.snapshot(now).offer(known, now)
    it = offer.predict(dispatcher.cluster.estimates.demand(want(prompt_chars=3000)), now)
    assert (it.prefill_s, it.decode_s) == pytest.approx((1.03, 2.0), rel=0.1)


def answer_alone(dispatcher, now, timings, took_s=None, **more):
    """Let one request run alone, and be answered."""
    it, = enter(dispatcher, want(**more), now=now)
    placed(dispatcher, now)
    it.lease.first_s = now
    now += took_s or timings.total_s
    finish(dispatcher, it, now, timings)
    return now + 1.0


def prompted(tokens, prefill_s, output_s=1.0, outputs=50, wait_s=0.0, load_s=0.0):
    """Return the Timings of an answer."""
    prompt_s = tokens * prefill_s
    took_s = sollol.OVERHEAD_S + prompt_s + output_s + wait_s + load_s
    return Timings(took_s, load_s, prompt_s, tokens, output_s, outputs)


@pytest.mark.parametrize("truth_s", [0.005, 0.0002, 0.01])
@pytest.mark.parametrize("hits, off", [(0.0, 0.10), (0.5, 0.25)])
def test_hits_of_the_nodes_cache_do_not_pass_for_a_fast_prefill(hits, off, truth_s):
    """Whatever held them: we see only that they are 3 to 10 times faster. The prior is up to 30 times off."""
    for seed in range(100):
        dispatcher, now, rng = cluster(n1=["m"]), 0.0, random.Random(seed)
        for _ in range(20):
            faster = rng.uniform(3, 10) if rng.random() < hits else 1.0
            now = answer_alone(dispatcher, now, prompted(rng.randrange(70, 2000),
                                                         truth_s * math.exp(rng.gauss(0, 0.1)) / faster))
        assert runner(dispatcher, "n1").speeds.prefill_s == pytest.approx(truth_s, rel=off), seed


def test_prompt_that_begins_like_an_earlier_one_tells_no_fast_prefill():
    """Even if it is long ago: the cache of a node may hold more than the last prompts."""
    dispatcher, now = cluster(n1=["m"]), 0.0
    talk = [((number, 3000), (number, 4000)) for number in range(100)]
    for prefix in talk:
        now = answer_alone(dispatcher, now, prompted(1000, 0.005), prompt_chars=4000, prefix=prefix)
    for prefix in talk[:50]:
        now = answer_alone(dispatcher, now, prompted(1000, 0.0005), prompt_chars=4000, prefix=(prefix[0], (-now, 4000)))
    assert runner(dispatcher, "n1").speeds.prefill_s == pytest.approx(0.005)
    assert len(runner(dispatcher, "n1").beginnings.prompts) == 150
    for number in range(100, 1000):
        now = answer_alone(dispatcher, now, Timings(), 1.0, prompt_chars=4000, prefix=((number, 4000),))
    assert len(runner(dispatcher, "n1").beginnings.prompts) == sollol.BEGINNINGS_KEPT


def test_short_prompt_tells_a_little_of_prefill_speed_as_long_as_no_long_one_did():
    found = []
    for tokens in (4, 16, 32, 64):
        dispatcher = cluster(n1=["m"])
        known = runner(dispatcher, "n1")
        prior_s = known.prefill_s()
        now = answer_alone(dispatcher, 0.0, prompted(tokens, 2 * prior_s, outputs=5))
        found.append(known.prefill_s() / prior_s)
        now = answer_alone(dispatcher, now, prompted(1000, 0.005))
        answer_alone(dispatcher, now, prompted(tokens, 0.02))
        assert known.speeds.prefill_s == pytest.approx(0.005)
    assert found == pytest.approx([1, 1.25, 1.5, 2])


@table("slower", [("a card that was taken for a CPU", 0.1), ("a CPU that was taken for a card", 10)])
def test_two_samples_that_agree_replace_an_estimate_that_is_grossly_off(slower):
    """What was measured beside a user of the node was 100 times off."""
    dispatcher, now = cluster(n1=["m"]), 0.0
    known = runner(dispatcher, "n1")
    for _ in range(3):
        now = answer_alone(dispatcher, now, prompted(100, 0.001, 1.0))
    assert (known.speeds.decode_s, known.speeds.confirmed_s) == pytest.approx((0.02, now - 1.0))
    before_s = known.speeds.confirmed_s
    now = answer_alone(dispatcher, now, prompted(100, 0.001, slower))
    assert known.speeds.confirmed_s == before_s and abs(math.log(known.speeds.decode_s / 0.02)) < 1
    now = answer_alone(dispatcher, now, prompted(100, 0.001, 1.2 * slower))
    assert (known.speeds.decode_s, known.speeds.confirmed_s) == pytest.approx((0.0219 * slower, now - 1.0), rel=0.01)
    now = answer_alone(dispatcher, now, prompted(100, 0.001, slower))
    assert known.speeds.decode_s == pytest.approx(0.02 * slower, rel=0.15)


def test_estimate_that_was_confirmed_often_and_lately_outlives_two_odd_samples():
    dispatcher, now = cluster(n1=["m"]), 0.0
    for _ in range(20):
        now = answer_alone(dispatcher, now, prompted(100, 0.001, 1.0))
    for _ in range(2):
        now = answer_alone(dispatcher, now, prompted(100, 0.001, 10.0))
    assert runner(dispatcher, "n1").speeds.decode_s < 0.04
    now += 100.0
    for _ in range(2):
        now = answer_alone(dispatcher, now, prompted(100, 0.001, 10.0))
    assert runner(dispatcher, "n1").speeds.decode_s == pytest.approx(0.2)


def test_odd_samples_that_do_not_agree_or_do_not_follow_each_other_replace_nothing():
    dispatcher, now = cluster(n1=["m"]), 0.0
    for output_s in (1.0, 1.0, 10.0, 1.0, 10.0, 1.0, 10.0, 1.0, 30.0, 1.0, 0.1, 10.0):
        now = answer_alone(dispatcher, now, prompted(100, 0.001, output_s))
    assert 0.015 < runner(dispatcher, "n1").speeds.decode_s < 0.07


def known_speeds(dispatcher):
    """Give the runner speeds that were confirmed often: 0.02 s a token, and 0.001 s for one of the prompt."""
    known = runner(dispatcher, "n1")
    known.speeds.decode_s, known.speeds.prefill_s, known.speeds.samples = 0.02, 0.001, 10
    known.speeds.prefills.extend([0.001] * 10)
    return known


@table("timings, taught", [
    ("alone", prompted(1000, 0.0015, 1.6, wait_s=0.0), True),
    ("it waited for somebody else", prompted(1000, 0.0015, 1.6, wait_s=2.0), False)])
def test_nothing_is_learned_of_speed_while_others_use_the_node(timings, taught):
    dispatcher = cluster(n1=["m"])
    known = known_speeds(dispatcher)
    now = answer_alone(dispatcher, 0.0, timings)
    assert (known.speeds.decode_s > 0.02, len(known.speeds.prefills) > 10) == (taught, taught)
    found = known.speeds.decode_s
    now = answer_alone(dispatcher, now, prompted(1000, 0.002, 2.5))     # the others may still be there
    assert (known.speeds.decode_s > found) is taught
    found = known.speeds.decode_s
    answer_alone(dispatcher, now + sollol.STRANGERS_S, prompted(1000, 0.002, 2.5))
    assert known.speeds.decode_s > found


def test_node_that_others_use_for_ever_is_measured_in_spite_of_them():
    dispatcher, now = cluster(n1=["m"]), 0.0
    for number in range(20):
        now = answer_alone(dispatcher, now, prompted(1000, 0.002, 2.5, wait_s=number % 2))
    assert runner(dispatcher, "n1").speeds.decode_s == pytest.approx(0.05)


def test_nothing_is_learned_of_speed_during_a_load():
    dispatcher = cluster(slots=2, n1=["m", "x"])
    known = known_speeds(dispatcher)
    runner(dispatcher, "n1", "x:latest").assume_unloaded()
    it, loads = enter(dispatcher, want(), want("x"))
    placed(dispatcher)
    assert loads.lease.loads
    loads.lease.heard(1, 2.0)
    finish(dispatcher, it, 5.0, prompted(1000, 0.0015, 1.6))
    finish(dispatcher, loads, 6.0)
    assert (known.speeds.decode_s, known.speeds.prefill_s) == (0.02, 0.001)
    answer_alone(dispatcher, 10.0, prompted(1000, 0.0015, 1.6))
    assert known.speeds.decode_s > 0.02 and len(known.speeds.prefills) > 10


@table("chars, output_s, decode_s", [
    ("no neighbour", 0, 1.6, 0.0218), ("a short prompt", 200, 1.6, 0.0217), ("a long one explains it", 4000, 1.6, 0.02),
    ("a long one does not explain it all", 4000, 3.0, 0.023),
    ("faster than believed, in spite of it", 4000, 0.5, 0.0185)])
def test_prefill_of_a_neighbour_is_not_taken_for_slow_decoding(chars, output_s, decode_s):
    """It stops every other stream of the same runner; so the sample moves the estimate only as far as it must."""
    dispatcher = cluster(slots=2, n1=["m"])
    known = known_speeds(dispatcher)
    it, = enter(dispatcher, want())
    placed(dispatcher)
    it.lease.heard(1, 0.1)
    if chars:
        neighbour, = enter(dispatcher, want(prompt_chars=chars), now=0.2)
        placed(dispatcher, 0.2)
        dispatcher.leave(neighbour, 0.2)
    finish(dispatcher, it, 2.0, prompted(50, 0.001, output_s))
    assert known.speeds.decode_s == pytest.approx(decode_s, rel=0.005)


def test_node_that_seems_slow_just_now_is_not_learned_as_a_faster_one():
    """What is not seen of its speed, such as gaps for a neighbour's prompt, must not be reckoned off once more."""
    dispatcher, now = cluster(n1=["m"]), 0.0
    dispatcher.cluster.nodes["n1"].speed = 0.7
    for _ in range(10):
        now = answer_alone(dispatcher, now, prompted(1000, 0.001, 1.0))
    assert runner(dispatcher, "n1").speeds.decode_s == pytest.approx(0.02)
    assert runner(dispatcher, "n1").speeds.prefill_s == pytest.approx(0.001)


def test_prefill_beside_answers_that_decode_is_as_fast_as_alone():
    """A batch of the prompt carries a token of each of them along."""
    dispatcher = cluster(slots=4, n1=["m"])
    known = known_speeds(dispatcher)
    known.speeds.prefills.clear()
    others = enter(dispatcher, *[want()] * 3)
    placed(dispatcher)
    for it in others:
        it.lease.heard(1, 0.1)
    it, = enter(dispatcher, want(prompt_chars=4000), now=0.2)
    placed(dispatcher, 0.2)
    it.lease.heard(1, 1.7)
    finish(dispatcher, it, 4.0, prompted(1000, 0.0015, 2.0))
    assert known.speeds.prefill_s == pytest.approx(0.0015)


def test_prompts_that_are_prefilled_side_by_side_are_not_taken_for_a_slow_prefill():
    for slower, expected in ((2.0, 0.001), (20.0, 0.01)):
        dispatcher = cluster(slots=2, n1=["m"])
        known = known_speeds(dispatcher)
        known.speeds.prefills.clear()
        one, two = enter(dispatcher, *[want(prompt_chars=4000)] * 2)
        placed(dispatcher)
        for it in (one, two):
            finish(dispatcher, it, 5.0, prompted(1000, 0.001 * slower))
        assert known.speeds.prefill_s == pytest.approx(expected, rel=0.35)


def measuring(dispatcher, now=0.0):
    """Return the lease of a measurement of the first node, and whether it was told to give up."""
    known, told = runner(dispatcher, "n1"), []
    lease = dispatcher.lease_for_measuring(known, want(prompt_chars=50), now)
    lease.abandon = told.append
    return lease, told


@table("come", [
    ("a request that is queued", lambda dispatcher: (enter(dispatcher, want(), now=1.0), placed(dispatcher, 1.0))),
    ("one of another model", lambda dispatcher: (enter(dispatcher, want("x"), now=1.0), placed(dispatcher, 1.0))),
    ("one without a slot", lambda dispatcher: dispatcher.lease_unqueued("c", want(inference=False), set(), 1.0)),
    ("a reload without the node", lambda dispatcher: dispatcher.cluster.configure([NodeSettings("n2", "b", 2)]))])
def test_measurement_takes_no_slot_and_ends_when_somebody_comes(come):
    dispatcher = cluster(slots=1, n1=["m", "x"])
    node = dispatcher.cluster.nodes["n1"]
    lease, told = measuring(dispatcher)
    assert node.leases == [lease] and dispatcher.cluster.in_flight() == 1 and not node.may_measure(100.0)
    come(dispatcher)
    assert lease.released and len(told) == 1 and lease not in node.leases and node.measuring is None
    assert len(node.leases) == (0 if node.draining else 1)


@table("timings, taught", [
    ("alone", prompted(50, 0.002, 0.8, 8), True), ("somebody else was there", prompted(50, 0.002, 0.8, 8, 1.0), False),
    ("the model was loaded", prompted(50, 0.002, 0.8, 8, load_s=5.0), False), ("nothing came", Timings(), False)])
def test_disturbed_measurement_teaches_nothing(timings, taught):
    dispatcher = cluster(slots=0, n1=["m"])
    known = runner(dispatcher, "n1")
    before = known.prefill_s(), known.node.size_factor
    lease, _ = measuring(dispatcher)
    assert sollol.learn_measured(lease, timings, timings.total_s) is taught
    dispatcher.release(lease, timings.total_s)
    assert (known.speeds.decode_s == pytest.approx(0.1), known.speeds.samples) == (taught, int(taught))
    assert ((known.prefill_s(), known.node.size_factor) != before) is taught
    assert empty(dispatcher) and dispatcher.cluster.in_flight() == 0


def waited_s(*waits_s, output_s=0.5, load_s=0.0):
    """Return answers to the gateway's own questions, asked at once, that waited so long in the node."""
    return [prompted(50, 0.002, output_s, 8, wait_s, load_s=load_s) for wait_s in waits_s]


@table("answers, count, origin, retry_s", [
    ("all at once", waited_s(0.03, 0.04), 2, "learned", 0.0),
    ("two of four", waited_s(0.03, 0.04, 0.6, 0.7), 2, "learned", 120.0),
    ("one after the other", waited_s(0.03, 0.6), 1, "learned", 120.0),
    ("the other way round", waited_s(0.6, 0.03), 1, "learned", 120.0),
    ("too short to tell", waited_s(0.03, 0.08, output_s=0.01), 1, "guessed", 0.0),
    ("they waited for a load", waited_s(0.0, 0.0, load_s=5.0), 1, "guessed", 0.0)])
def test_measured_slots_are_those_whose_requests_did_not_wait(answers, count, origin, retry_s):
    """What would be one slot more is tried again later than after a wait among the requests of others."""
    dispatcher = cluster(slots=0, n1=["m"])
    slots, (lease, _) = runner(dispatcher, "n1").slots, measuring(dispatcher)
    assert sollol.learn_slots_measured(lease, answers, 2.0) is (retry_s == 0.0 and origin == "learned")
    assert (slots.count, slots.origin, max(slots.retry_at_s - 2.0, 0.0)) == (count, origin, retry_s)


def test_predictions_are_judged_by_what_became_of_them():
    dispatcher, now = cluster(n1=["m"]), 0.0
    assert dispatcher.ratios.share(0.5) is None
    for number in range(40):
        it, = enter(dispatcher, want(), now=now)
        placed(dispatcher, now)
        finish(dispatcher, it, now + (it.lease.predicted_end_s - now) * (1.9 if number % 2 else 0.49))
        now += 100
    assert [dispatcher.ratios.share(share) for share in (0.1, 0.5, 0.51, 0.9)] == [0.5, 0.5, 2.0, 2.0]


def test_forecast_tells_a_long_list_from_one_text():
    dispatcher = cluster(n1=["nomic-embed-text"])
    model = "nomic-embed-text:latest"
    holder, forecast = runner(dispatcher, "n1", model), sollol.Forecast(dispatcher.cluster, 0.0)
    one, many = (dispatcher.cluster.estimates.demand(want(model, embeds=True, prompt_chars=4000, inputs=inputs))
                 for inputs in (1, 1000))
    assert forecast.cost_s(holder, many) > 5 * forecast.cost_s(holder, one)


def test_request_of_the_primary_is_not_sent_there_again_after_it_has_failed_it():
    dispatcher = cluster(n1=["m"], n2=["m"])
    with pytest.raises(Refusal) as caught:
        dispatcher.cluster.node_unqueued(want("unknown", where=Where.PRIMARY), {"n1"}, 0.0)
    assert caught.value.status == 502


def test_load_time_is_learned():
    dispatcher = cluster(resident=False, n1=["m"])
    it, = enter(dispatcher, want())
    placed(dispatcher)
    assert it.lease.loads
    finish(dispatcher, it, 25.0, Timings(24, 20, 1, 100, 3, 50))
    assert runner(dispatcher, "n1").load_s() == 20


@table("load_s, times, expected", [
    ("as expected", 4.0, 1, 1.0), ("slow, once", 12.0, 1, 2.0), ("slow, often", 20.0, 8, 5.0), ("fast", 1.2, 8, 0.3),
    ("grossly slow, once", 4000.0, 1, 2.0)])
def test_loads_of_one_model_tell_how_long_those_of_others_take_on_that_node(load_s, times, expected):
    dispatcher = cluster(n1=["m", "x"], n2=["m", "x"])
    known, other = runner(dispatcher, "n1"), runner(dispatcher, "n1", "x:latest")
    known.disk_bytes, other.disk_bytes = 5e9, 10e9
    far_s = runner(dispatcher, "n2").load_s()
    for _ in range(times):
        known.learn_load(load_s)
    assert known.load_s() == load_s and runner(dispatcher, "n2").load_s() == far_s
    assert other.load_s() == pytest.approx(expected * 6.5, rel=0.05)


@table("vram, slower", [("on a card", 5e9, 1), ("on the CPU", 0, 20), ("half and half", 2.5e9, 10.5),
                        ("untold", None, 1)])
def test_model_on_the_cpu_is_not_taken_for_one_on_a_card(vram, slower):
    dispatcher = cluster(resident=False, n1=["m", "x"])
    known = runner(dispatcher, "n1")
    card_s = known.decode_s(), known.prefill_s(), known.input_s()
    row = {"name": "m", "size": 5e9, "size_vram": vram}
    dispatcher.cluster.nodes["n1"].take_ps([{key: it for key, it in row.items() if it is not None}], 1.0, 1.0)
    found_s = known.decode_s(), known.prefill_s(), known.input_s()
    assert found_s == pytest.approx([slower * it for it in card_s])
    assert sollol.size_factor(known, found_s[0]) == pytest.approx(1)    # the node is as slow as expected
    other = runner(dispatcher, "n1", "x:latest")        # not resident: it will run where the others do
    assert other.decode_s() == pytest.approx(card_s[0] * (20 if vram == 0 else 1))
    known.speeds.decode_s = 0.5
    assert known.decode_s() == 0.5


def test_node_with_one_model_on_its_card_has_a_card():
    dispatcher = cluster(resident=False, n1=["m", "x", "y"])
    rows_seen = [{"name": "m", "size": 5e9, "size_vram": 0}, {"name": "x", "size": 5e9, "size_vram": 5e9}]
    dispatcher.cluster.nodes["n1"].take_ps(rows_seen, 1.0, 1.0)
    assert runner(dispatcher, "n1", "y:latest").cpu_factor() == 1
    assert runner(dispatcher, "n1").cpu_factor() == 20


def embedding(texts, chars=20, **more):
    return want("nomic-embed", embeds=True, stream=False, inputs=texts, prompt_chars=texts * chars, **more)


def test_texts_to_embed_cost_each_and_not_only_by_their_tokens():
    """Measured on a real node: 12,000 short texts take 31 s."""
    dispatcher = cluster(slots=0, n1=["nomic-embed"])
    known = runner(dispatcher, "n1", "nomic-embed:latest")
    known.disk_bytes = 0.27e9
    long = dispatcher.cluster.estimates.demand(embedding(12_000))
    offer = known.node.snapshot(0.0).offer(known, 0.0)
    assert 25 < offer.predict(long, 0.0).finish_s < 40 and 25 < offer.predict(long, 0.0).prefill_s < 40
    assert dispatcher.rates.cost_s(long, 0.0) > 25
    it, = enter(dispatcher, embedding(12_000))
    placed(dispatcher)
    assert it.lease.predicted_end_s > 25 and sollol.solo_left_s(it.lease, 1.0) > 25


@pytest.mark.parametrize("texts, took_s", [(1000, 10.0), (1000, 0.5), (1, 0.08)])
def test_cost_of_a_text_is_learned_from_answers(texts, took_s):
    dispatcher = cluster(slots=0, n1=["nomic-embed"])
    for now in range(0, 1500, 50):
        it, = enter(dispatcher, embedding(texts), now=now)
        placed(dispatcher, now)
        answered(dispatcher, it, now + took_s, Timings(total_s=took_s, prompt_tokens=5 * texts))
    it, = enter(dispatcher, embedding(texts), now=2000.0)
    placed(dispatcher, 2000.0)
    assert it.lease.predicted_end_s - 2000 == pytest.approx(took_s, rel=0.15)


@pytest.mark.parametrize("kind, up, node_failures, runner_failures, on_disk, resident", [
    ("refused", False, 0, 0, True, True), ("died", True, 1, 0, True, True),
    ("garbage", True, 1, 0, True, True), ("busy", True, 1, 0, True, True),
    ("lost", True, 0, 0, True, True), ("model", True, 0, 1, True, True), ("proxy", True, 1, 0, True, True),
    ("missing", True, 0, 0, False, False),
])
def test_failure_is_held_against_what_failed(kind, up, node_failures, runner_failures, on_disk, resident):
    dispatcher = cluster(n1=["m"], n2=["m"])
    it, = enter(dispatcher, want())
    placed(dispatcher)
    node, known = it.lease.node, it.lease.runner
    assert fail(dispatcher, it, kind)
    assert (node.up, known.on_disk, known.ready_s is not None) == (up, on_disk, resident)
    assert (node.breaker.failures, known.breaker.failures) == (node_failures, runner_failures)
    assert it.tried == {"n1"} and node.errors == 1 and placed(dispatcher) == ["n2"]


def test_node_that_failed_twice_is_left_alone_for_five_seconds_then_gets_one_trial():
    dispatcher = cluster(slots=4, n1=["m"], n2=["m"])
    runner(dispatcher, "n2").speeds.decode_s = 10 * runner(dispatcher, "n1").decode_s()
    for it in enter(dispatcher, want(), want()):
        assert "n1" in placed(dispatcher) or it.lease
        fail(dispatcher, it)
        dispatcher.leave(it, 0.0)
    for _ in enter(dispatcher, *[want()] * 4):
        assert set(placed(dispatcher)) <= {"n2"}
    for it in list(dispatcher.cluster.nodes["n2"].leases):
        dispatcher.leave(it.ticket, 0.5)
    tickets = enter(dispatcher, *[want()] * 4, now=5.5)
    assert placed(dispatcher, 5.5) == ["n1"]
    finish(dispatcher, next(it for it in tickets if it.lease), 6.0)
    assert placed(dispatcher, 6.0) == ["n1"] * 3


def test_only_node_that_can_serve_always_may():
    """However often it has failed: what a plain Ollama would have answered is for the client to see."""
    dispatcher = cluster(slots=4, n1=["m"], n2=["x"])
    for _ in range(5):
        it, = enter(dispatcher, want())
        assert placed(dispatcher) == ["n1"]
        assert not fail(dispatcher, it, "model")
        dispatcher.leave(it, 0.0)
    enter(dispatcher, *[want()] * 4)
    assert placed(dispatcher) == ["n1"] * 4


def test_request_that_every_node_fails_is_no_fault_of_theirs():
    dispatcher = cluster(n1=["m"], n2=["m"])
    for _ in range(5):
        it, = enter(dispatcher, want())
        placed(dispatcher)
        assert fail(dispatcher, it, "model") and placed(dispatcher) and not fail(dispatcher, it, "model")
        it.forgive()
        dispatcher.leave(it, 0.0)
    assert [runner(dispatcher, name).breaker.failures for name in ("n1", "n2")] == [0, 0]


def test_what_was_not_counted_against_a_node_is_not_taken_back():
    """Five requests die with a node, which counts as two failures; then all others fail one of them, too."""
    dispatcher = cluster(slots=5, n1=["m"], n2=["m"])
    runner(dispatcher, "n2").speeds.decode_s = 10 * runner(dispatcher, "n1").decode_s()
    tickets = enter(dispatcher, *[want()] * 5)
    assert placed(dispatcher) == ["n1"] * 5
    assert all([fail(dispatcher, it) for it in tickets])
    last = tickets[-1]
    assert placed(dispatcher) == ["n2"] * 5
    fail(dispatcher, last, "model")
    last.forgive()
    assert dispatcher.cluster.nodes["n1"].breaker.state(0.0) == "open"


def test_nobody_waits_for_a_model_whose_breaker_is_open():
    dispatcher = cluster(n1=["m"], n2=["m"])
    runner(dispatcher, "n2").speeds.decode_s = 10 * runner(dispatcher, "n1").decode_s()
    for it in enter(dispatcher, want(), want()):
        placed(dispatcher)
        fail(dispatcher, it, "model")
        dispatcher.leave(it, 0.0)
    enter(dispatcher, want(), now=0.5)
    assert placed(dispatcher, 0.5) == ["n2"]


def test_end_of_an_older_request_does_not_allow_a_second_trial():
    dispatcher = cluster(slots=4, n1=["m"], n2=["m"])
    runner(dispatcher, "n2").speeds.decode_s = 10 * runner(dispatcher, "n1").decode_s()
    old, bad, worse = enter(dispatcher, want(), want(), want())
    assert placed(dispatcher) == ["n1"] * 3
    for it in (bad, worse):
        fail(dispatcher, it)
        dispatcher.leave(it, 0.0)
    trial, = enter(dispatcher, want(), now=5.5)
    assert placed(dispatcher, 5.5) == ["n1"] and trial.lease
    dispatcher.leave(old, 5.6)
    enter(dispatcher, want(), now=5.7)
    assert placed(dispatcher, 5.7) == ["n2"]


def test_ticket_that_tried_every_node_takes_nobody_else_down():
    dispatcher = cluster("least-inflight", n1=["m"], n2=["m"])
    spent, fresh = enter(dispatcher, want(), want())
    spent.tried = {"n1", "n2"}
    leases, refused = dispatcher.dispatch(0.0)
    assert [lease.ticket for lease in leases] == [fresh] and refused == [spent]


def test_no_bound_of_the_output_is_too_large_to_reckon_with():
    dispatcher = cluster(n1=["m"])
    enter(dispatcher, asked(body={"model": "m", "stream": False, "options": {"num_predict": 10**400}}))
    assert placed(dispatcher) == ["n1"]


def test_wait_that_ends_when_one_of_ours_leaves_tells_the_slots_and_no_stranger():
    """Eight are believed, two are there: the third begins when the first has left."""
    dispatcher = cluster(slots=0, n1=["m"])
    known = runner(dispatcher, "n1")
    known.slots.count = known.slots.proven = known.slots.max_proven = known.slots.seen = 8
    known.slots.origin, known.slots.seen_s = "learned", 0.0
    tickets, now = enter(dispatcher, *[want()] * 40), 0.0
    placed(dispatcher, now)
    for _ in range(8):
        running = [lease.ticket for lease in dispatcher.cluster.nodes["n1"].leases]
        now += 5.0
        done = running[0]
        waited_s = max(0.0, now - 10.0 - done.lease.sent_s)
        took_s = now - done.lease.sent_s
        finish(dispatcher, done, now, Timings(took_s, 0, 1, 100, took_s - waited_s - 1, 50))
        placed(dispatcher, now)
    assert known.slots.count == 2 and dispatcher.cluster.nodes["n1"].strangers_s == -math.inf and len(tickets) == 40


@table("waited_s, lost", [("for less than a batch", 4.0, False), ("for longer than a batch", 9.0, True)])
def test_wait_for_the_batch_of_a_neighbours_prompt_costs_no_slot_and_shows_no_stranger(waited_s, lost):
    """An engine looks for new requests between two batches of a prompt: on a CPU seconds pass."""
    dispatcher = cluster(slots=0, n1=["m"])
    known, now = runner(dispatcher, "n1"), 0.0
    known.slots.count = known.slots.proven = known.slots.max_proven = known.slots.seen = 4
    known.slots.origin, known.slots.seen_s, known.speeds.prefill_s = "learned", 0.0, 0.005
    for _ in range(4):
        enter(dispatcher, *[want(prompt_chars=4000)] * 4, now=now)
        placed(dispatcher, now)
        for ticket in [lease.ticket for lease in dispatcher.cluster.nodes["n1"].leases]:
            took_s = 20.0 + waited_s
            finish(dispatcher, ticket, now + took_s, Timings(took_s, 0, 10, 1000, 10, 50))
        now += 100.0
    assert (known.slots.count < 4) is lost and (dispatcher.cluster.nodes["n1"].strangers_s > 0) is lost


@table("prefill_s", [("as believed", 1.0), ("twice as long", 2.0), ("ten times as long", 10.0)])
def test_prompt_of_a_neighbour_that_takes_longer_than_believed_makes_no_node_slow(prefill_s):
    dispatcher = cluster(slots=4, n1=["m"])
    known = runner(dispatcher, "n1")
    known.speeds.samples, known.speeds.decode_s, known.speeds.prefill_s = 20, 0.05, 0.001
    stream, = enter(dispatcher, want())
    placed(dispatcher, 0.0)
    stream.lease.heard(1, 0.1)
    neighbour, now, ready_s = None, 0.0, 0.0
    for _ in range(200):
        now += 0.5
        if neighbour is None and now >= ready_s + 4.0:
            neighbour, = enter(dispatcher, want(prompt_chars=4000), now=now)
            placed(dispatcher, now)
            ready_s = now + prefill_s
        elif neighbour is not None and now >= ready_s:
            neighbour.lease.heard(1, now)
            finish(dispatcher, neighbour, now)
            neighbour = None
        elif neighbour is None:
            stream.lease.heard(10, now)
        dispatcher.watch(now)
    assert known.node.speed == 1.0


def test_slots_that_nobody_has_seen_for_long_are_tried_one_by_one():
    dispatcher = cluster(slots=0, n1=["m"])
    known = runner(dispatcher, "n1")
    known.slots.count = known.slots.proven = known.slots.max_proven = 6
    known.slots.origin, known.slots.retry_at_s = "learned", math.inf
    enter(dispatcher, *[want()] * 9)
    for now, sent in ((0.0, 2), (1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)):
        assert placed(dispatcher, now) == ["n1"] * sent
        for lease in dispatcher.cluster.nodes["n1"].leases:
            lease.heard(1, now + 0.5)
    assert placed(dispatcher, 5.0) == []


def test_many_answers_grossly_off_in_one_direction_replace_the_expected_length():
    lengths = sollol.OutputLengths()
    lengths.mean, lengths.samples = 3000.0, 50
    for _ in range(sollol.OFF_LENGTHS - 1):
        lengths.learn(100, 60)
    assert lengths.expect(100) > 500
    lengths.learn(100, 60)
    assert lengths.expect(100) == pytest.approx(60)
    for tokens in (400, 10) * 20:       # long and short ones in turn are nothing odd
        lengths.learn(100, tokens)
    assert 100 < lengths.expect(100) < 300


def test_request_costs_a_node_what_lone_ones_have_shown_outside_prefill_and_decode():
    node = next(iter(cluster(n1=["m"]).cluster.nodes.values()))
    for hidden_s, alone in ((0.2, True), (0.9, True), (5.0, True), (0.21, True), (0.35, False), (0.19, True)):
        node.learn_overhead(hidden_s, alone)
    assert 0.19 <= node.overhead_s <= 0.2


def test_embedding_model_in_use_makes_nobody_measure_its_node():
    async def run():
        node = bench.SimNode(models=("llama3.2", "nomic-embed-text"), loaded=("llama3.2", "nomic-embed-text"))
        async with gateway_for(node) as gateway:
            gateway.options.calibrate = True
            await asyncio.sleep(5.0)
            asked = sum(record.path == "/api/ps" for record in node.requests)
            body = {"model": "nomic-embed-text", "input": "a text"}
            assert (await call(gateway, "POST", "/api/embed", body)).status == 200
            await asyncio.sleep(20.0)
            assert sum(record.path == "/api/ps" for record in node.requests) - asked <= 6
    bench.run_virtual(run())


def test_idle_node_is_measured_again_when_what_is_believed_was_not_confirmed_for_long():
    async def run():
        nodes = [bench.SimNode(loaded=("llama3.2",), seed=seed) for seed in range(2)]
        async with gateway_for(*nodes) as gateway:
            gateway.options.calibrate = True
            await asyncio.sleep(5.0)
            first, second = (node.runners["llama3.2:latest"] for node in gateway.dispatcher.cluster.nodes.values())
            true_s = second.speeds.decode_s
            second.speeds.decode_s, second.speeds.confirmed_s = 100 * true_s, -math.inf
            await asyncio.sleep(60.0)
            assert second.speeds.decode_s == 100 * true_s      # nobody asks for the model
            assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
            await asyncio.sleep(3.0)
            assert second.speeds.decode_s == pytest.approx(true_s, rel=0.3) and first.speeds.confirmed_s > 0
    bench.run_virtual(run())


# -----------------------------------------------------------------------------
# Policies and dispatcher: stories
# -----------------------------------------------------------------------------

def rows(*models):
    return [{"name": name, "size": 2_000_000_000, "digest": name} for name in models]


def cluster(policy="latency-weighted", slots=1, resident=True, max_queue=1024, **models):
    """Return a Dispatcher over nodes that are up at time 0: name=(models, resident unless told)."""
    dispatcher = sollol.Dispatcher(policy, max_queue=max_queue)
    dispatcher.cluster.configure([NodeSettings(name, "127.0.0.1", 11434 + number, slots=slots, primary=not number)
                          for number, name in enumerate(models)])
    for node in dispatcher.cluster.nodes.values():
        node.answered("0.33.0", 0.001, 0.0)
        dispatcher.cluster.take_tags(node, rows(*models[node.name]))
        node.take_ps(rows(*models[node.name]) if resident else [], 0.0, 0.0)
    return dispatcher


def runner(dispatcher, name, model="m:latest"):
    return dispatcher.cluster.nodes[name].runners[model]


def enter(dispatcher, *spec, now=0.0):
    return [dispatcher.enter(f"r{next(IDS)}", it, now) for it in spec]


IDS = iter(range(10**9))


def placed(dispatcher, now=0.0):
    """Dispatch; return the names of the nodes that got a lease. Nobody may be refused."""
    leases, refused = dispatcher.dispatch(now)
    assert not refused
    return [lease.node.name for lease in leases]


def finish(dispatcher, done, now, timings=None):
    """Answer a ticket that runs, and end it."""
    dispatcher.observe(done.lease, timings or Timings(), now)
    dispatcher.release(done.lease, now)
    dispatcher.leave(done, now)


def fail(dispatcher, failed, kind="died", now=0.0):
    """Fail a running ticket as the I/O side does; tell whether it is tried again."""
    lease = failed.lease
    dispatcher.fail(lease, kind, now)
    dispatcher.release(lease, now)
    return dispatcher.retry(failed, now)


@table("policy, models", [
    ("plain policy", "round-robin", ["m"]), ("no node is known to have it", "latency-weighted", [])])
def test_request_that_waits_for_a_node_to_come_back_is_in_nobodys_way(policy, models):
    dispatcher = cluster(policy, n1=models, n2=models)
    first, = enter(dispatcher, want())
    assert placed(dispatcher) == ["n1"] and fail(dispatcher, first)
    assert placed(dispatcher) == ["n2"]
    dispatcher.cluster.nodes["n1"].lost(1.0)
    assert fail(dispatcher, first, "busy", 1.0)
    other, = enter(dispatcher, want(), now=2.0)
    assert placed(dispatcher, 2.0) == ["n2"] and first.state is TicketState.WAITING and other.lease
    dispatcher.cluster.nodes["n1"].answered("0.33.0", 0.001, 3.0)
    assert placed(dispatcher, 3.0) == ["n1"] and first.lease


def test_request_whose_connection_was_refused_waits_no_longer_for_that():
    dispatcher = cluster(n1=["m"], n2=["m"])
    running, first, *others = enter(dispatcher, *[want()] * 4)
    assert placed(dispatcher) == ["n1", "n2"]
    for it in (first, *others):
        it.since_s = 0.0 if it is first else 200.0
    assert fail(dispatcher, first, "refused", 230.0)
    assert dispatcher.expire(239.0) == [] and dispatcher.expire(240.0) == [first]


def test_never_more_leases_than_set_slots():
    dispatcher = cluster(slots=2, n1=["m"], n2=["m"])
    tickets = enter(dispatcher, *[want()] * 10)
    assert sorted(placed(dispatcher)) == ["n1", "n1", "n2", "n2"]
    assert placed(dispatcher) == []
    finish(dispatcher, tickets[0], 1.0)
    assert len(placed(dispatcher, 1.0)) == 1 and len(dispatcher.waiting) == 5


def test_one_more_than_the_guessed_slots_is_tried():
    dispatcher = cluster(slots=0, n1=["m"])
    enter(dispatcher, *[want()] * 10)
    assert placed(dispatcher) == ["n1", "n1"]


@pytest.mark.parametrize("slots, sent", [(0, 2), (1, 1)])
def test_one_more_than_learned_slots_is_sent_ahead_if_the_way_is_long(slots, sent):
    dispatcher = cluster(slots=slots, n1=["m"])
    node = dispatcher.cluster.nodes["n1"]
    node.rtt_s, node.answer_s, runner(dispatcher, "n1").slots.retry_at_s = 0.1, 1.0, 1e9
    enter(dispatcher, *[want()] * 5)
    assert placed(dispatcher) == ["n1"] * sent


def test_model_resident_on_the_second_node_is_used_there():
    dispatcher = cluster(resident=False, n1=["m"], n2=["m"])
    dispatcher.cluster.nodes["n2"].take_ps(rows("m"), 0.0, 0.0)
    enter(dispatcher, want())
    assert placed(dispatcher) == ["n2"]


@table("loads, goes_s", [("loaded there", "", 3.0), ("to be loaded beside another one", "beside", 33.0),
                         ("to be loaded into empty memory", "into empty memory", 3.0)])
def test_ticket_waits_longer_for_a_busy_node_where_the_free_one_would_have_to_load_its_model(loads, goes_s):
    """A load of 10 s: what is held back for 3 s at the most goes there after three times as long, too."""
    dispatcher = cluster(n1=["m"], n2=["m", "other"])
    fast, slow = runner(dispatcher, "n1"), runner(dispatcher, "n2")
    for known, decode_s in ((fast, 0.01), (slow, 0.01 if loads else 0.2)):
        known.speeds.decode_s, known.speeds.load_s, known.speeds.samples = decode_s, 10.0, 20
    if loads:
        slow.assume_unloaded()
        if loads == "into empty memory":
            runner(dispatcher, "n2", "other:latest").assume_unloaded()
    enter(dispatcher, want(), want())
    assert placed(dispatcher, 0.0) == ["n1"]
    now = 0.0
    while not placed(dispatcher, now := now + 0.5):
        assert now < 100.0
    assert now == goes_s


def test_free_node_that_would_finish_first_loads_the_model_at_once():
    dispatcher = cluster(n1=["m"], n2=["m"])
    fast, slow = runner(dispatcher, "n2"), runner(dispatcher, "n1")
    slow.speeds.decode_s, fast.speeds.decode_s, fast.speeds.load_s = 1.0, 0.01, 5.0
    fast.assume_unloaded()
    enter(dispatcher, want())
    assert placed(dispatcher, 0.0) == ["n2"]


def test_model_loaded_with_other_options_is_as_good_as_cold():
    dispatcher = cluster(n1=["m"], n2=["m"])
    runner(dispatcher, "n1").options = ()
    runner(dispatcher, "n2").options = (("num_ctx", 8192),)
    enter(dispatcher, want(options=(("num_ctx", 8192),)))
    assert placed(dispatcher) == ["n2"]


def test_model_that_one_node_has_waits_for_that_node():
    dispatcher = cluster(n1=["x"], n2=["m"])
    first, second = enter(dispatcher, want(), want())
    assert placed(dispatcher) == ["n2"]
    finish(dispatcher, first, 1.0)
    assert placed(dispatcher, 1.0) == ["n2"] and second.lease.runner is runner(dispatcher, "n2")


def test_conversation_returns_to_the_node_that_holds_its_prefix():
    dispatcher = cluster(n1=["m"], n2=["m"])
    talks = [want(prompt_chars=20_000, prefix=((number, 20_000),)) for number in (1, 2)]
    tickets = enter(dispatcher, *talks)
    assert placed(dispatcher) == ["n1", "n2"]
    for it in tickets:
        finish(dispatcher, it, 9.0)
    enter(dispatcher, want(prompt_chars=20_100, prefix=((2, 20_000), (3, 20_100))), now=9.0)
    assert placed(dispatcher, 9.0) == ["n2"]


def unequal():
    """A cluster of a slow node and one ten times as fast: 15 s and 1.5 s for a usual answer."""
    dispatcher = cluster(slow=["m"], fast=["m"])
    for name, speed_s in (("slow", 0.1), ("fast", 0.01)):
        runner(dispatcher, name).speeds.decode_s, runner(dispatcher, name).speeds.prefill_s = speed_s, 1e-5
    return dispatcher


def test_ticket_is_held_back_for_a_much_better_node():
    dispatcher = unequal()
    first, second = enter(dispatcher, want(), want())
    assert placed(dispatcher) == ["fast"]
    assert placed(dispatcher, 0.5) == [] and second.state is TicketState.WAITING
    finish(dispatcher, first, 1.5)
    assert placed(dispatcher, 1.5) == ["fast"]


def test_held_ticket_takes_its_place_on_the_better_node_so_that_a_later_one_takes_the_slow_one():
    dispatcher = unequal()
    tickets = enter(dispatcher, *[want()] * 12)
    assert placed(dispatcher) == ["fast", "slow"]
    slow = next(number for number, it in enumerate(tickets) if it.lease and it.lease.node.name == "slow")
    assert 4 <= slow <= 6
    assert [it.id for it in dispatcher.waiting.in_order()] == [it.id for it in tickets if not it.lease]


def test_urgent_overtakes_and_freed_slot_goes_to_the_first_in_line():
    dispatcher = cluster(n1=["m"])
    usual, batch, later, urgent = enter(dispatcher, want(), want(priority=1), want(), want(priority=10))
    assert placed(dispatcher) == ["n1"] and urgent.lease
    for now, (done, following) in enumerate([(urgent, usual), (usual, later), (later, batch)], 1):
        finish(dispatcher, done, now)
        assert placed(dispatcher, now) == ["n1"] and following.lease


def test_batch_work_of_a_client_never_overtakes_its_own_urgent_backlog():
    """However long that is: one address may be a server with many users behind it."""
    dispatcher, now = cluster(n1=["m"]), 0.0
    dispatcher.cluster.estimates.lengths["m:latest"].mean = 2000.0
    tickets = [dispatcher.enter(str(number), want(priority=priority), now)
               for number, priority in enumerate([8] * 60 + [1] * 3 + [8] * 3)]
    waiting = dispatcher.waiting.in_order()
    assert tickets[59].key_s - tickets[0].key_s > 5 * sollol.HEAD_START_S
    assert [ticket.spec.priority for ticket in waiting] == [8] * 63 + [1] * 3


def test_offers_are_made_anew_when_slots_are_proved():
    """A kept one would look for the end of a slot that it does not know."""
    dispatcher = cluster(slots=0, n1=["m"])
    enter(dispatcher, want())
    assert placed(dispatcher) == ["n1"]
    runner(dispatcher, "n1").slots.retry_at_s = math.inf     # not one more on trial
    waiting, = enter(dispatcher, want())
    assert placed(dispatcher) == []
    node = dispatcher.cluster.nodes["n1"]
    assert node.snapshot(0.0).offer(runner(dispatcher, "n1"), 0.0).first_s(0.0) > 0
    runner(dispatcher, "n1").confirm_slots(3, 0.0)
    assert placed(dispatcher) == ["n1"] and waiting.lease


def test_batch_that_waited_longer_than_the_head_start_goes_before_a_fresh_urgent_one():
    dispatcher = cluster(n1=["m"])
    running, = enter(dispatcher, want(client="another"))
    placed(dispatcher)
    batch, = enter(dispatcher, want(priority=1))
    enter(dispatcher, want(priority=10), now=9 * sollol.HEAD_START_S + 1)
    finish(dispatcher, running, 60.0)
    assert placed(dispatcher, 60.0) == ["n1"] and batch.lease


def test_one_clients_flood_does_not_delay_another_client():
    dispatcher = cluster(n1=["m"])
    flood = enter(dispatcher, *[want(client="greedy")] * 50)
    modest, = enter(dispatcher, want(client="modest"))
    placed(dispatcher)
    finish(dispatcher, flood[0], 1.0)
    placed(dispatcher, 1.0)
    assert modest.lease


@pytest.mark.parametrize("end", ["whole", "untold", "left", "failed"])
def test_answers_longer_than_claimed_or_expected_are_charged_in_full(end):
    """Nine in ten tokens were not foreseen; if the client leaves before the end, nothing tells their number."""
    dispatcher, now = cluster(n1=["m"]), 0.0
    dispatcher.cluster.estimates.lengths["m:latest"].mean = 100.0
    enter(dispatcher, *[want(client="long")] * 9)
    expected_s = dispatcher.waiting.fair.start_s(want(client="long"), now)
    for _ in range(3):
        placed(dispatcher, now)
        done = dispatcher.cluster.nodes["n1"].leases[0].ticket
        done.lease.heard(2000 if end == "untold" else 1000, now)    # events of OpenAI: two lines each
        if end == "left":
            dispatcher.leave(done, now)
        elif end == "failed":
            assert not fail(dispatcher, done, "busy", now=now)
            dispatcher.leave(done, now)
            dispatcher.cluster.nodes["n1"].answered("0.33.0", 0.001, now)
            dispatcher.cluster.nodes["n1"].breaker.succeed()
        else:
            finish(dispatcher, done, now, Timings(output_tokens=1000 * (end == "whole"), prompt_tokens=100))
        dispatcher.cluster.estimates.lengths["m:latest"].mean = 100.0
    more_s = dispatcher.waiting.fair.start_s(want(client="long"), now) - expected_s
    assert more_s == pytest.approx(3 * 900 * runner(dispatcher, "n1").decode_s(), rel=0.2)
    assert dispatcher.waiting.fair.start_s(want(client="other"), now) == now


def test_answers_shorter_than_expected_are_given_back():
    dispatcher = cluster(n1=["m"])
    first, *_ = enter(dispatcher, *[want(client="c", prompt_chars=0)] * 3)
    before_s = dispatcher.waiting.fair.start_s(want(client="c"), 0.0)
    placed(dispatcher)
    finish(dispatcher, first, 0.0, Timings(output_tokens=1, prompt_tokens=1))
    assert before_s / 3 * 2 < dispatcher.waiting.fair.start_s(want(client="c"), 0.0) < before_s / 3 * 2.1


def test_failed_ticket_skips_the_nodes_it_tried_and_keeps_its_place():
    dispatcher = cluster(n1=["m"], n2=["m"])
    first, second, third = enter(dispatcher, want(), want(), want())
    assert placed(dispatcher) == ["n1", "n2"]
    assert fail(dispatcher, first, "busy")
    assert [it.id for it in dispatcher.waiting.in_order()] == [first.id, third.id]
    assert placed(dispatcher) == ["n1"] and third.lease and first.state is TicketState.WAITING
    finish(dispatcher, second, 1.0)
    assert placed(dispatcher, 1.0) == ["n2"] and first.lease.node.name == "n2"
    assert not fail(dispatcher, first, "busy", now=1.0)


def test_tickets_that_wait_for_another_node_stand_in_nobodys_way():
    dispatcher = cluster(n1=["m"], n2=["m"])
    busy, *spent = enter(dispatcher, *[want()] * (sollol.LOOK_AHEAD + 2))
    for it in spent:
        it.tried = {"n1"}
    fresh, = enter(dispatcher, want(), now=1.0)
    assert sorted(placed(dispatcher, 1.0)) == ["n1", "n2"]
    finish(dispatcher, busy, 2.0)
    assert placed(dispatcher, 2.0) == ["n1"] and fresh.lease


def test_at_most_three_nodes_are_tried():
    dispatcher = cluster(**{f"n{number}": ["m"] for number in range(5)})
    it, = enter(dispatcher, want())
    tries = 0
    while tries < 9:
        tries += len(placed(dispatcher))
        if not fail(dispatcher, it):
            break
    assert tries == sollol.MAX_ATTEMPTS == len(it.tried)


@listed("policy", sollol.POLICIES)
def test_nodes_that_went_away_are_waited_for_as_long_as_a_ticket_may_wait(policy):
    dispatcher = cluster(policy, n1=["m"], n2=["m"])
    for node in dispatcher.cluster.nodes.values():
        node.missed(True, 10.0)
    waiting = enter(dispatcher, want(), want("unknown"), now=100.0)
    assert dispatcher.dispatch(100.0) == ([], []) == dispatcher.dispatch(249.9)
    leases, refused = dispatcher.dispatch(250.0)
    assert not leases and set(refused) == set(waiting)
    late = enter(dispatcher, want(), want("unknown"), now=250.0)
    assert set(dispatcher.dispatch(250.0)[1]) == set(late)
    assert all(it.refusal.status == 503 and it.refusal.retry_after_s >= 1 for it in (*waiting, *late))


def test_request_of_the_only_holder_that_restarts_is_sent_again():
    for kind in ("refused", "died", "lost"):
        dispatcher = cluster(n1=["m"], n2=["x"])
        node = dispatcher.cluster.nodes["n1"]
        it, = enter(dispatcher, want())
        assert placed(dispatcher) == ["n1"] and fail(dispatcher, it, kind, 1.0)
        node.missed(True, 1.1)
        assert placed(dispatcher, 1.2) == [] and it.state is TicketState.WAITING
        node.answered("0.33.0", 0.001, 3.0)
        assert placed(dispatcher, 3.0) == ["n1"]


def test_request_that_takes_its_node_down_does_so_three_times_at_most():
    dispatcher = cluster(n1=["m"])
    it, = enter(dispatcher, want())
    for now in (1.0, 2.0, 3.0):
        assert placed(dispatcher, now) == ["n1"]
        assert fail(dispatcher, it, "died", now) == (now < 3.0)


def test_nobody_is_refused_before_every_node_was_looked_at():
    dispatcher = sollol.Dispatcher()
    dispatcher.cluster.configure([NodeSettings("n1", "a", 1), NodeSettings("n2", "b", 2)])
    it, = enter(dispatcher, want())
    dispatcher.cluster.nodes["n1"].missed(True, 0.0)
    assert dispatcher.dispatch(0.0) == ([], []) and it.state is TicketState.WAITING
    dispatcher.cluster.nodes["n2"].answered("1", 0.001, 0.0)
    assert dispatcher.dispatch(0.0) == ([], []) and it.state is TicketState.WAITING
    dispatcher.cluster.take_tags(dispatcher.cluster.nodes["n2"], rows("m"))
    assert placed(dispatcher) == ["n2"]


def test_unknown_model_goes_to_the_emptiest_node_without_a_slot():
    dispatcher = cluster(n1=["m"], n2=["m"])
    enter(dispatcher, want())
    assert placed(dispatcher) == ["n1"]
    tickets = enter(dispatcher, *[want("unknown")] * 3)
    assert placed(dispatcher) == ["n2", "n1", "n2"]
    assert all(it.lease.runner is None for it in tickets)


def test_cloud_model_goes_to_the_primary_node():
    dispatcher = cluster(n1=["m"], n2=["m"])
    enter(dispatcher, want(), *[want("x:cloud")] * 3)
    assert sorted(placed(dispatcher)) == ["n1"] * 4


def test_model_that_another_server_runs_takes_no_slot_whatever_it_is_called():
    dispatcher = cluster(n1=["m"], n2=["m"])
    remote = {"name": "mine", "remote_model": "gpt-oss:120b", "remote_host": "https://ollama.com:443"}
    dispatcher.cluster.take_tags(dispatcher.cluster.nodes["n2"], [*rows("m"), remote])
    tickets = enter(dispatcher, *[want("mine")] * 3)
    assert placed(dispatcher) == ["n2"] * 3 and all(it.lease.runner is None for it in tickets)
    dispatcher.cluster.take_tags(dispatcher.cluster.nodes["n1"], [*rows("m"), remote])
    enter(dispatcher, want("mine"))
    assert placed(dispatcher)[-1] == "n1"       # the primary, once it knows the model
    dispatcher.cluster.take_tags(dispatcher.cluster.nodes["n1"], rows("m", "mine"))
    tickets = enter(dispatcher, want("mine"))
    placed(dispatcher)
    assert tickets[0].lease.runner.node.name == "n1"        # weights of its own under that name


def empty(dispatcher):
    """Tell whether nothing is left of any request."""
    return (not dispatcher.waiting.tickets and not dispatcher.waiting.fair.active and not dispatcher.waiting.fair.next_s
            and not dispatcher.waiting.sessions
            and not any(dispatcher.waiting.first(model) for model in list(dispatcher.waiting.heaps))
            and not any(node.leases or node.busy or any(it.leases for it in node.runners.values())
                        for node in dispatcher.cluster.nodes.values()))


def all_states():
    """Return a dispatcher with a ticket that runs, one that waits and one that was refused."""
    dispatcher = cluster(n1=["m"])
    tickets = enter(dispatcher, want(), want(), want())
    placed(dispatcher)
    dispatcher.waiting.refuse(tickets[2], Refusal(503, "no"))
    return dispatcher, tickets


def test_leave_ends_a_ticket_whatever_its_state():
    dispatcher, tickets = all_states()
    for it in tickets:
        dispatcher.leave(it, 1.0)
    assert empty(dispatcher) and dispatcher.dispatch(1.0) == ([], [])


def test_leaving_twice_is_leaving_once():
    dispatcher, tickets = all_states()
    for it in tickets + tickets:
        dispatcher.leave(it, 1.0)
    assert empty(dispatcher)


def test_cancelled_tickets_do_not_pile_up_behind_a_busy_node():
    dispatcher = cluster(n1=["m"])
    enter(dispatcher, want())
    placed(dispatcher)
    for _ in range(2000):
        dispatcher.leave(enter(dispatcher, want())[0], 0.0)
        placed(dispatcher)
    assert sum(map(len, dispatcher.waiting.heaps.values())) < 1000


def test_releasing_twice_is_an_error():
    dispatcher = cluster(n1=["m"])
    it, = enter(dispatcher, want())
    placed(dispatcher)
    lease = it.lease
    dispatcher.release(lease, 1.0)
    with pytest.raises(AssertionError):
        dispatcher.release(lease, 1.0)
    assert not dispatcher.cluster.nodes["n1"].leases


def test_queue_is_bounded():
    dispatcher = cluster(max_queue=2, n1=["m"])
    enter(dispatcher, want(), want())
    with pytest.raises(Refusal) as caught:
        enter(dispatcher, want())
    assert caught.value.status == 503 and caught.value.retry_after_s >= 1
    placed(dispatcher)
    enter(dispatcher, want())


def test_urgent_newcomer_displaces_the_least_urgent_of_a_full_queue():
    dispatcher = cluster(max_queue=3, n1=["m"])
    low, batch, normal = enter(dispatcher, want(priority=3), want(priority=1), want(priority=5, client="flood"))
    urgent, = enter(dispatcher, want(priority=8), now=1.0)
    assert dispatcher.waiting.in_order() == [urgent, normal, low] and batch.state is not TicketState.WAITING
    assert batch.refusal.status == 503 and batch.refusal.retry_after_s >= 1
    assert dispatcher.dispatch(1.0) == ([urgent.lease], [batch]) and batch.lease is None
    assert dispatcher.dispatch(1.0) == ([], [])
    with pytest.raises(Refusal):
        cluster(max_queue=0, n1=["m"]).enter("r", want(priority=10), 0.0)


def test_equal_newcomer_displaces_nobody_and_owes_nothing_for_it():
    dispatcher = cluster(max_queue=2, n1=["m"])
    enter(dispatcher, want(client="a"), want(client="b"))
    for spec in (want(client="a"), want(client="c"), want(client="c", priority=1)):
        with pytest.raises(Refusal):
            enter(dispatcher, spec)
    assert set(dispatcher.waiting.fair.active) == {("a", 5), ("b", 5)} and not dispatcher.displaced


def test_stream_that_has_begun_is_not_displaced_while_it_waits_for_its_rescue():
    dispatcher = cluster(max_queue=2, n1=["m"], n2=["m"])
    begun, _ = enter(dispatcher, want(priority=1), want(priority=5))
    assert sorted(placed(dispatcher)) == ["n1", "n2"]
    begun.pin_version_of(begun.lease.node)
    assert fail(dispatcher, begun)
    low, = enter(dispatcher, want(priority=3))
    urgent, = enter(dispatcher, want(priority=8))
    assert low.refusal and begun.state is TicketState.WAITING and urgent.state is TicketState.WAITING
    enter(dispatcher, want(priority=9))
    assert urgent.refusal and begun.state is TicketState.WAITING
    with pytest.raises(Refusal):
        enter(dispatcher, want(priority=8))


@pytest.mark.parametrize("share", [True, False])
def test_what_is_held_to_a_version_goes_to_no_node_that_joins_or_changes_with_another(share):
    dispatcher = cluster(n1=["m"], n2=["m"])
    settings = [node.settings for node in dispatcher.cluster.nodes.values()]
    others = enter(dispatcher, want(), want())
    placed(dispatcher)
    if share:                       # of a batch, and waiting
        held = dispatcher.enter("held", want(), 0.0, rows("m")[0]["digest"])
    else:                           # a stream that is to be gone on with
        held = next(it for it in others if it.lease.node.name == "n2")
        held.pin_version_of(held.lease.node)
        assert fail(dispatcher, held)
    assert placed(dispatcher) == []
    dispatcher.cluster.configure([*settings, NodeSettings("n3", "127.0.0.1", 9)])
    for name in ("n3", "n2"):
        dispatcher.cluster.nodes[name].answered("0.33.0", 0.001, 0.0)
        dispatcher.cluster.take_tags(dispatcher.cluster.nodes[name], [{**rows("m")[0], "digest": "new"}])
    assert placed(dispatcher) == [] and held.state is TicketState.WAITING
    for ticket in others:
        if ticket.lease and ticket.lease.node.name == "n2":
            finish(dispatcher, ticket, 1.0)
            assert placed(dispatcher, 1.0) == []
    dispatcher.cluster.take_tags(dispatcher.cluster.nodes["n1"], [{**rows("m")[0], "digest": "new"}])
    assert dispatcher.dispatch(1.0) == ([], [held])


def test_aged_batch_is_not_displaced_by_a_fresh_urgent_one():
    dispatcher = cluster(max_queue=1, n1=["m"])
    enter(dispatcher, want(priority=1))
    with pytest.raises(Refusal):
        enter(dispatcher, want(priority=10), now=9 * sollol.HEAD_START_S)


def test_of_a_flood_the_last_is_displaced_by_another_client():
    dispatcher = cluster(max_queue=5, n1=["m"])
    flood = enter(dispatcher, *[want(client="flood")] * 5)
    other, = enter(dispatcher, want(client="other"))
    assert dispatcher.waiting.in_order() == [flood[0], other, *flood[1:4]] and flood[4].refusal.status == 503


def test_waiting_too_long_is_refused_with_503():
    dispatcher = cluster(n1=["m"])
    enter(dispatcher, want())
    placed(dispatcher)
    old, = enter(dispatcher, want(), now=0.0)
    enter(dispatcher, want(priority=10), now=100.0)
    assert dispatcher.expire(239.9) == []
    assert dispatcher.expire(240.0) == [old] and len(dispatcher.waiting) == 1
    assert old.refusal.status == 503 and old.refusal.retry_after_s >= 1 and old.state is not TicketState.WAITING


def test_failed_ticket_that_waits_again_is_late_by_its_own_waiting():
    dispatcher = cluster(n1=["m"], n2=["m"])
    failed, _ = enter(dispatcher, want(), want())
    placed(dispatcher)
    enter(dispatcher, *[want()] * 2, now=100.0)
    assert fail(dispatcher, failed, "busy", now=200.0)
    assert placed(dispatcher, 200.0) == ["n1"] and failed.state is TicketState.WAITING
    younger, = dispatcher.expire(340.0)
    assert younger is not failed and dispatcher.expire(440.0) == [failed]


def test_ticket_that_its_node_did_not_get_is_late_by_all_of_its_waiting():
    dispatcher = cluster(n1=["m"], n2=["m"])
    unsent, _ = enter(dispatcher, want(), want())
    placed(dispatcher)
    enter(dispatcher, *[want()] * 2, now=100.0)
    assert fail(dispatcher, unsent, "refused", now=200.0) and placed(dispatcher, 200.0) == []
    assert dispatcher.expire(239.9) == [] and dispatcher.expire(240.0) == [unsent]


# -----------------------------------------------------------------------------
# Waiting room: queue, fair share; breaker
# -----------------------------------------------------------------------------

def ticket(seq, model="m", priority=5, now=0.0):
    return Ticket(str(seq), want(model, priority=priority), now, now - sollol.HEAD_START_S * priority, seq)


def drained(queue, model="m:latest"):
    """Return the ids of a model's tickets in the order in which they come out."""
    ids = []
    while queue.first(model):
        found = queue.pop(model)[2]
        queue.take(found)
        ids.append(found.id)
    return ids


@table("tickets, order", [
    ("first come, first served", [(5, 0), (5, 0), (5, 0)], "012"),
    ("urgent first", [(1, 0), (5, 0), (10, 0)], "210"),
    ("head start", [(5, 0), (8, 17)], "10"),
    ("waited longer than the head start", [(5, 0), (8, 19)], "01"),
    ("batch before urgent after its head start", [(1, 0), (10, 53), (10, 55)], "102"),
])
def test_order_is_arrival_less_the_head_start(tickets, order):
    queue = sollol.WaitingRoom()
    for seq, (priority, now) in enumerate(tickets):
        queue.push(ticket(seq, priority=priority, now=now))
    assert "".join(it.id for it in queue.in_order()) == order
    assert "".join(drained(queue)) == order
    assert len(queue) == 0 and not queue.heaps


def test_discarded_tickets_are_stepped_over():
    queue, tickets = sollol.WaitingRoom(), [ticket(seq) for seq in range(4)]
    for it in tickets:
        queue.push(it)
    queue.discard(tickets[0])
    queue.discard(tickets[0])
    queue.discard(tickets[2])
    assert len(queue) == 2 and drained(queue) == ["1", "3"] and queue.first("m:latest") is None


def test_restored_ticket_keeps_its_place():
    queue = sollol.WaitingRoom()
    for seq in range(3):
        queue.push(ticket(seq))
    entry = queue.pop("m:latest")
    assert len(queue) == 3 and queue.first("m:latest")[2].id == "1"
    queue.restore(entry)
    assert drained(queue) == ["0", "1", "2"]


def test_models_do_not_stand_in_each_others_way():
    queue = sollol.WaitingRoom()
    for seq, model in enumerate("aab"):
        queue.push(ticket(seq, model))
    assert drained(queue, "b:latest") == ["2"] and drained(queue, "a:latest") == ["0", "1"]
    assert queue.first("c:latest") is None


@table("waiting, newcomer, goes", [
    ("least urgent of equals", "a5 b3 c8", "d5", 1),
    ("newcomer is the least urgent of equals", "a5 b3 c8", "d1", "new"),
    ("equals in all", "a5 b5", "c5", "new"), ("of whoever has most", "a1 b9 b8 c2", "d1", 2),
    ("however urgent", "a10 a10 b1", "c1", 1), ("of two with most the least urgent", "a5 a5 b4 b9", "c1", 2),
    ("newcomer makes its client the greatest", "a5 a3 b1 b2", "a9", 1),
    ("and is the least urgent", "a5 a3 b1 b2", "a2", "new"), ("only one client", "a5 a3", "a4", 1),
    ("nobody waits", "", "a5", "new"), ("what has begun stays", "a1* a2* a5", "b1", "new"),
    ("and does not count", "a1* a2* a5 b3 b4", "c1", 3), ("all have begun", "a1* b1*", "c9", "new"),
])
def test_full_queue_makes_room_at_the_cost_of_whoever_has_most_waiting(waiting, newcomer, goes):
    queue, tickets = sollol.WaitingRoom(), []
    for seq, (client, priority, begun) in enumerate(re.findall(r"(\w)(\d+)(\*?)", waiting)):
        tickets.append(Ticket(str(seq), want(client=client), 0.0, -6.0 * int(priority), seq, begun=bool(begun)))
        queue.push(tickets[-1])
    found = queue.to_displace(newcomer[0], -6.0 * int(newcomer[1:]))
    assert (tickets.index(found) if found else "new") == goes


def test_many_addresses_with_urgent_requests_displace_each_others_and_nobodys_only_one():
    dispatcher = cluster(max_queue=1000, n1=["m"])
    modest = enter(dispatcher, *(want(client=f"modest {number}") for number in range(50)))
    for number in range(5000):
        with contextlib.suppress(Refusal):
            dispatcher.enter("flood", want(client=f"flood {number % 250}", priority=10), number / 1000)
    late, = enter(dispatcher, want(client="late"), now=5.0)
    assert all(it.state is TicketState.WAITING for it in (late, *modest)) and len(dispatcher.waiting) == 1000


def test_500_requests_of_one_client_do_not_stand_before_anothers_one():
    fair = sollol.FairShare()
    greedy = [fair.charge(want(client="greedy"), 0.0, 1.0) for _ in range(500)]
    assert greedy == list(range(500))
    assert fair.charge(want(client="modest"), 0.5, 1.0) == 0.5
    assert fair.charge(want(client="greedy", priority=8), 0.5, 1.0) == 0.5


def entered(queue, *tickets, first=0):
    """Let tickets enter a waiting room: "client session priority now", each with a cost of a second."""
    for seq, text in enumerate(tickets, first):
        client, session, priority, now = text.split()
        spec = want(client=client, session=int(session), priority=int(priority))
        queue.enter(f"{client}{session}-{seq}", sollol.Demand(spec, 1.0, 1.0, 0), 1.0, float(now))


@table("tickets, running, order", [
    ("one session", ["c 1 5 0"] * 3, 0, "c1-0 c1-1 c1-2"),
    ("two of a client take turns", ["c 1 5 0"] * 3 + ["c 2 5 0"] * 2, 0, "c1-0 c2-3 c1-1 c2-4 c1-2"),
    ("what runs counts", ["c 1 5 0"] * 3 + ["c 2 5 0"] * 2, 1, "c2-3 c1-1 c2-4 c1-2"),
    ("much runs", ["c 1 5 0"] * 4 + ["c 2 5 0"] * 3, 3, "c2-4 c2-5 c2-6 c1-3"),
    ("three sessions", ["c 1 5 0"] * 3 + ["c 2 5 0", "c 3 5 0", "c 2 5 0"], 0, "c1-0 c2-3 c3-4 c1-1 c2-5 c1-2"),
    ("no place of another client is lost", ["c 1 5 0", "c 1 5 0", "d 1 5 0.5", "c 1 5 0.5", "c 2 5 0.5"], 1,
     "d1-2 c2-4 c1-1 c1-3"),
    ("another priority is a line of its own", ["c 1 5 0"] * 2 + ["c 2 3 0"], 0, "c1-0 c1-1 c2-2"),
])
def test_sessions_of_a_client_take_turns_within_its_places(tickets, running, order):
    queue = sollol.WaitingRoom()
    entered(queue, *tickets[:running])
    for _ in range(running):
        queue.take(queue.pop("m:latest")[2])
    entered(queue, *tickets[running:], first=running)
    assert " ".join(it.id for it in queue.in_order()) == order
    assert drained(queue) == order.split() and not queue.heaps and not queue.owing


def test_client_that_owes_nothing_goes_before_whoever_does_however_slow_the_cluster_is():
    queue = sollol.WaitingRoom()
    entered(queue, *["greedy 0 5 0"] * 8, "early 0 5 3.5", "greedy 0 9 3.5", *["greedy 0 9 3.6"] * 2)
    for _ in range(2):
        queue.take(queue.pop("m:latest")[2])        # greedy's first of priority 9, and the next: they run for long
    entered(queue, "late 0 5 100", "late 0 5 100", "later 0 5 101", "low 0 4 102")
    assert drained(queue)[:6] == ["greedy0-11", "greedy0-0", "early0-8", "late0-0", "later0-2", "greedy0-1"]


def test_client_with_nothing_left_is_forgotten():
    fair, spec = sollol.FairShare(), want(client="c")
    fair.charge(spec, 0.0, 100.0)
    fair.charge(spec, 0.0, 100.0)
    fair.settle(spec)
    assert fair.charge(spec, 1.0, 1.0) == 200.0
    fair.settle(spec)
    fair.settle(spec)
    assert not fair.active and not fair.next_s and not fair.begun_s
    fair.correct(spec, 100.0)
    assert fair.charge(spec, 2.0, 1.0) == 2.0


@table("charged, more_s, now, start_s", [
    ("right", [10.0], 0.0, 0.0, 10.0), ("too little", [10.0], 5.0, 0.0, 15.0), ("too much", [10.0], -4.0, 0.0, 6.0),
    ("the first of two", [10.0, 10.0], 5.0, 0.0, 25.0), ("of two, too much", [10.0, 10.0], -4.0, 0.0, 16.0),
    ("no credit before the last one", [10.0, 1.0], -9.0, 0.0, 10.0), ("no credit at all", [10.0], -20.0, 0.0, 0.0),
    ("no credit over time", [10.0], -9.0, 3.0, 3.0),
])
def test_client_is_charged_for_what_its_requests_have_really_cost(charged, more_s, now, start_s):
    fair, spec = sollol.FairShare(), want(client="c")
    for cost_s in charged:
        fair.charge(spec, 0.0, cost_s)
    fair.correct(spec, more_s)
    assert fair.start_s(spec, now) == start_s
    assert fair.start_s(want(client="other"), now) == now
    assert fair.start_s(want(client="c", priority=9), now) == now


def test_breaker_opens_for_growing_pauses_lets_one_trial_through_and_closes_on_success():
    breaker = sollol.Breaker(2)
    assert breaker.state(0) == "closed" and breaker.allows(0)
    breaker.fail(0)
    assert breaker.state(0) == "closed" and breaker.allows(0)
    breaker.fail(0)
    assert breaker.state(4.9) == "open" and not breaker.allows(4.9)
    assert breaker.state(5) == "half-open" and breaker.allows(5)
    assert breaker.begin()
    assert not breaker.allows(5)
    breaker.fail(5)
    assert not breaker.allows(14.9) and breaker.allows(15)
    pauses = []
    for now in range(100, 800, 100):
        breaker.fail(now)
        pauses.append(breaker.until_s - now)
    assert pauses == [20, 40, 60, 60, 60, 60, 60]
    breaker.succeed()
    assert breaker.state(700) == "closed" and breaker.allows(700)
    breaker.fail(700)
    assert breaker.allows(700)


def test_everything_that_one_crash_takes_along_counts_as_one_failure():
    breaker = sollol.Breaker(2)
    for _ in range(8):
        breaker.fail(0)
    assert breaker.until_s == 5.0


# -----------------------------------------------------------------------------
# Readiness: models in memory and nodes awake, before a request needs them
# -----------------------------------------------------------------------------

def wishing(load, now=0.0, resident=(), **settings):
    """Return (Dispatcher, node) of a node at `now` that has the models m, n, o on disk and wants those of `load`."""
    dispatcher = sollol.Dispatcher()
    models = tuple(map(sollol.canonical, load))
    dispatcher.cluster.configure([NodeSettings("a", "127.0.0.1", 1, load=models, **settings)])
    node = dispatcher.cluster.nodes["a"]
    node.answered("0.33.0", 0.001, now)
    dispatcher.cluster.take_tags(node, rows("m", "n", "o"))
    node.take_ps(rows(*resident), now, now)
    return dispatcher, node


def wanted(dispatcher, now):
    """Return the models that nodes are to load, and whether they are to be kept."""
    return [(known.runner.node.name, known.runner.model, known.keep) for known in sollol.wanted_loads(dispatcher, now)]


def loaded(dispatcher, node, model, now, rows_after, missed=()):
    """Let a node load a model for load=; return which model is warned of, and why."""
    known = node.runners[sollol.canonical(model)]
    sollol.wish_for(known).begin(now)
    spec = want(model, prompt_chars=0, keep_alive_s=math.inf)
    lease = dispatcher.lease_for_loading(known, spec, now)
    sollol.end_loading(lease, 5.0, now + 5)
    node.take_ps(rows_after, now + 5, now + 5)
    warned, why = sollol.judge_load(known, [node.runners[sollol.canonical(name)] for name in missed])
    return next((name for name, wish in node.wishes.items() if wish is warned), None), why


def forever(*models):
    return [{**row, "expires_at": "2318-01-01T00:00:00Z"} for row in rows(*models)]


def test_wanted_models_are_loaded_in_their_order_and_kept():
    dispatcher, node = wishing(["m", "n"], now=100.0)
    assert wanted(dispatcher, 100.0) == [("a", "m:latest", True)]
    assert loaded(dispatcher, node, "m", 100.0, forever("m")) == (None, "")
    assert wanted(dispatcher, 106.0) == [] and wanted(dispatcher, 111.0) == [("a", "n:latest", True)]
    assert loaded(dispatcher, node, "n", 111.0, forever("m", "n")) == (None, "")
    assert wanted(dispatcher, 10_000.0) == []
    assert all(known.keep_alive_s == math.inf for known in node.runners.values() if known.ready_s is not None)


@table("change", [
    ("a request runs", lambda dispatcher, node: dispatcher.lease_on("x", want(), node, "", 99.0)),
    ("a request waits", lambda dispatcher, node: enter(dispatcher, want())),
    ("down", lambda dispatcher, node: node.lost(99.0)), ("in doubt", lambda dispatcher, node: node.doubt(99.0)),
    ("draining", lambda dispatcher, node: dispatcher.drain(node, True)),
    ("its models are not known", lambda dispatcher, node: node.missed(True, 99.0)),
    ("it has just worked", lambda dispatcher, node: setattr(node, "heard_s", 99.0))])
def test_wanted_model_takes_no_slot_from_anybody(change):
    dispatcher, node = wishing(["m"], now=50.0)
    assert wanted(dispatcher, 100.0)
    change(dispatcher, node)
    assert wanted(dispatcher, 100.0) == []


def test_load_goes_on_beside_a_request_for_its_model_and_gives_way_to_one_that_it_would_hold_up():
    dispatcher, node = wishing(["m"], resident=["o"])
    told = []

    def begun(now):
        lease = dispatcher.lease_for_loading(node.runners["m:latest"], want(prompt_chars=0), now)
        lease.abandon = told.append
        return lease

    lease = begun(10.0)
    assert node.leases == node.loading == [lease] and not node.runners["m:latest"].leases
    node.take_ps(rows("o"), 11.0, 11.0)
    assert node.runners["m:latest"].ready_s == lease.ready_s > 11.0     # /api/ps lists only what is loaded
    for model in ("m", "o"):
        one, = enter(dispatcher, want(model), now=12.0)
        assert placed(dispatcher, 12.0) == ["a"] and not lease.released
        finish(dispatcher, one, 13.0)
    enter(dispatcher, want("n"), now=14.0)
    assert placed(dispatcher, 14.0) == ["a"] and lease.released and len(told) == 1
    assert node.measuring is None and lease not in node.loading
    sollol.end_loading(lease, None, 14.0)
    assert node.runners["m:latest"].ready_s is None


def test_model_that_others_requests_let_expire_is_kept_again():
    dispatcher, node = wishing(["m"])
    loaded(dispatcher, node, "m", 10.0, forever("m"))
    node.take_ps(rows("m"), 30.0, 30.0)         # an old version, which does not tell
    assert wanted(dispatcher, 30.0) == []
    node.take_ps([rows("m")[0] | {"expires_at": "2026-01-01T00:05:00Z"}], 30.0, 30.0)
    assert wanted(dispatcher, 30.0) == [("a", "m:latest", True)]
    node.take_ps(forever("m"), 31.0, 31.0)
    assert wanted(dispatcher, 60.0) == []
    one, = enter(dispatcher, want("m", keep_alive_s=60.0), now=61.0)
    placed(dispatcher, 61.0)
    finish(dispatcher, one, 62.0)
    assert wanted(dispatcher, 62.0) == [("a", "m:latest", True)]


def test_wanted_model_is_no_victim_as_far_as_the_node_itself_evicts_it_last():
    dispatcher, node = wishing(["m"])
    loaded(dispatcher, node, "m", 10.0, forever("m"))
    node.take_ps(forever("m") + rows("o"), 20.0, 20.0)
    node.memory.limit_bytes = 5e9
    assert [other.model for other in sollol.evicted_for(node.runners["n:latest"])] == ["o:latest"]
    node.memory.limit_bytes = 3e9
    assert [other.model for other in sollol.evicted_for(node.runners["n:latest"])] == ["o:latest", "m:latest"]


def test_wanted_model_pushes_out_nothing_that_was_used_lately():
    dispatcher, node = wishing(["m"], now=1000.0, resident=["o"])
    node.memory.limit_bytes = 3e9           # one at a time
    assert wanted(dispatcher, 1010.0) == []
    node.take_ps([rows("o")[0] | {"expires_at": "2026-01-01T00:05:00Z"}], 1200.0, 1200.0)      # used by somebody else
    assert wanted(dispatcher, 1400.0) == [] and wanted(dispatcher, 1501.0) == [("a", "m:latest", True)]


def test_model_that_does_not_stay_is_loaded_ever_more_rarely():
    dispatcher, node = wishing(["m"])
    times, now = [], 10.0
    while now < 4 * 3600.0:
        if wanted(dispatcher, now):
            times.append(now)
            loaded(dispatcher, node, "m", now, [])      # it has gone again
        now += 5.0
    assert len(times) <= 10 and times[1] - times[0] == pytest.approx(60, abs=5)
    assert times[-1] - times[-2] >= 3600


@table("first, missed, warned, stays", [
    ("the second came last", "n", "m", "n:latest", "m:latest"),
    ("the first came last", "m", "n", "n:latest", "m:latest")])
def test_of_two_wanted_models_that_do_not_fit_together_the_first_stays(first, missed, warned, stays):
    dispatcher, node = wishing(["m", "n"])
    loaded(dispatcher, node, missed, 10.0, forever(missed))
    node.memory.limit_bytes = math.inf
    name, why = loaded(dispatcher, node, first, 20.0, forever(first), [missed])
    assert name == warned and why == "it does not fit beside m:latest, which is named first"
    assert node.wishes[warned].given_up and not node.wishes[stays].given_up
    due = {name for now in range(30, 4000, 10) for _, name, _ in wanted(dispatcher, float(now))}
    assert due == ({"m:latest"} if first == "n" else set())     # the one that stays comes back


@table("change, again", [
    ("the node restarts", lambda node: node.lost(50.0), True),
    ("another list", lambda node: node.configure(node.settings._replace(load=("n:latest", "m:latest"))), True),
    ("another token", lambda node: node.configure(node.settings._replace(token="t")), False),
    ("the load was to blame", lambda node: (
        setattr(node.wishes["m:latest"], "unfinished", True), node.lost(50.0)), False)])
def test_model_that_was_given_up_is_tried_again_once_something_has_changed(change, again):
    _, node = wishing(["m"])
    wish = node.wishes["m:latest"]
    wish.begin(10.0)
    wish.unfinished, wish.given_up = False, True
    change(node)
    assert (not node.wishes["m:latest"].given_up) == again


@pytest.mark.parametrize("queued, growth, from_s, to_s, expected", [
    (4, 0.0, 0, 10, (40.0, 4.0)), (0, 0.5, 0, 10, (25.0, 5.0)), (2, -0.5, 0, 10, (4.0, 0.0)),
    (2, -0.1, 0, 10, (15.0, 1.0)), (0, -1.0, 0, 10, (0.0, 0.0)), (3, 1.0, 10, 5, (0.0, 3.0)),
    (0, 0.0, 0, 9, (0.0, 0.0))])
def test_waiting_of_a_queue_that_grows_or_shrinks_evenly(queued, growth, from_s, to_s, expected):
    assert sollol.waited_s(queued, growth, from_s, to_s) == pytest.approx(expected)


def test_another_node_saves_more_of_a_queue_the_sooner_it_is_ready_and_nothing_of_one_that_ends_before():
    savings = [sollol.saved_s(4, 0.0, 0.2, ready_s) for ready_s in (0.0, 5.0, 20.0, 60.0, 500.0)]
    assert savings == sorted(savings, reverse=True) and savings[0] > 400 and savings[-1] == 0
    assert sollol.saved_s(2, -0.5, 0.2, 5.0) == 0


def queue_of(count, rate, **more):
    """Return (Dispatcher, time) of a queue on node a, while node b has its model on disk and does nothing.

    `rate`: requests per second of the last minute.
    """
    dispatcher = cluster(a=["m", "n"], b=["m", "n"], resident=False, **more)
    dispatcher.cluster.nodes["a"].take_ps(rows("m"), 0.0, 0.0)
    runner(dispatcher, "b").speeds.load_s = 24.0        # else one of them goes there, and loads it
    enter(dispatcher, *[want(prompt_chars=4000)] * (count + 1), now=200.0)
    dispatcher.dispatch(200.0)
    dispatcher.cluster.estimates.arrivals["m:latest"].per_s = rate
    return dispatcher, 201.0


@table("queue, loads", [
    ("nobody waits", queue_of(0, 1.0), False), ("a short burst is over before", queue_of(1, 0.0), False),
    ("a steady queue", queue_of(2, 0.8), True), ("a long queue", queue_of(30, 0.0), True),
    ("early binding", queue_of(2, 0.8, policy="round-robin"), False)])
def test_steady_queue_has_its_model_loaded_on_an_idle_node(queue, loads):
    dispatcher, now = queue
    assert wanted(dispatcher, now) == ([("b", "m:latest", False)] if loads else [])


@table("change, loads", [
    ("as it is", lambda dispatcher, node: None, True),
    ("it works", lambda dispatcher, node: dispatcher.lease_on("x", want(), node, "", 200.0), False),
    ("it is drained", lambda dispatcher, node: dispatcher.drain(node, True), False),
    ("it has just loaded something for a queue", lambda dispatcher, node: setattr(node, "demand_s", 180.0), False),
    ("another model is there, and there is room", lambda dispatcher, node: node.take_ps(rows("n"), 200.0, 200.0), True),
    ("another model would be pushed out that was used lately", lambda dispatcher, node: (
        node.take_ps(rows("n"), 150.0, 150.0), setattr(node.memory, "limit_bytes", 3e9)), False),
    ("another model would be pushed out that nobody uses", lambda dispatcher, node: (
        node.take_ps(rows("n"), -500.0, -500.0), setattr(node.memory, "limit_bytes", 3e9)), True),
    ("a model of load= would be pushed out", lambda dispatcher, node: (
        node.take_ps(forever("n"), -500.0, -500.0), setattr(node.memory, "limit_bytes", 3e9),
        node.configure(node.settings._replace(load=("n:latest",)))), False)])
def test_load_for_a_queue_takes_nothing_from_others(change, loads):
    dispatcher, now = queue_of(8, 0.8)
    change(dispatcher, dispatcher.cluster.nodes["b"])
    assert wanted(dispatcher, now) == ([("b", "m:latest", False)] if loads else [])


def test_arrivals_are_counted_over_the_last_minute():
    arrivals = sollol.Arrivals()
    assert arrivals.rate(5.0) == 0.0
    for second in range(600):
        arrivals.add(second / 2)
    assert arrivals.rate(300.0) == pytest.approx(2.0, rel=0.02)
    assert arrivals.rate(360.0) == pytest.approx(0.73, rel=0.05)


def test_queue_is_steady_once_somebody_has_waited_all_the_time():
    arrivals = sollol.Arrivals()
    seen = [arrivals.look(5 - (second % 3), second) for second in range(40)]
    assert seen[:15] == [0] * 15 and set(seen[16:]) == {3}
    assert arrivals.look(1, 40.0) == 1 and arrivals.look(4, 41.0) == 1
    assert arrivals.look(4, 50.0) == 0          # nobody waited meanwhile


def test_sleeping_node_is_waking_for_its_usual_time_which_is_learned():
    sleep = sollol.Sleep()
    assert not sleep.is_waking(0.0) and not sleep.is_in_vain(0.0) and sleep.left_s(0.0) == 60.0
    sleep.call(100.0)
    assert sleep.is_waking(101.0) and sleep.left_s(110.0) == 50.0
    sleep.call(160.0)                   # once more: it is the same waking
    assert sleep.left_s(170.0) == 0.0 and sleep.is_waking(270.0) and not sleep.is_waking(281.0)
    assert sleep.is_in_vain(281.0) and not sleep.is_in_vain(701.0)      # then it may be called again
    sleep.call(800.0)
    sleep.came_up(820.0)
    assert sleep.usual_s == 40.0 and not sleep.is_waking(821.0)
    sleep.came_up(900.0)                # by itself: that teaches nothing
    assert sleep.usual_s == 40.0


def asleep(waiting=1, model="m", busy=("n",), **settings):
    """Return (Dispatcher, sleeping node) where requests for a model wait; node a serves the models of `busy`."""
    dispatcher = sollol.Dispatcher()
    settings = {"mac": "aabbccddeeff", **settings}
    dispatcher.cluster.configure([NodeSettings("a", "127.0.0.1", 1, slots=1),
                                  NodeSettings("b", "127.0.0.1", 2, **settings)])
    for node, models in zip(dispatcher.cluster.nodes.values(), (busy, ("m",)), strict=True):
        node.answered("0.33.0", 0.001, 0.0)
        dispatcher.cluster.take_tags(node, rows(*models))
        node.take_ps(rows(*models), 0.0, 0.0)
    dispatcher.cluster.nodes["b"].lost(1.0)
    enter(dispatcher, *[want(model)] * waiting, now=1000.0)
    dispatcher.dispatch(1000.0)
    return dispatcher, dispatcher.cluster.nodes["b"]


@table("given, wakes", [
    ("nobody else has it", dict(), True), ("nobody waits", dict(waiting=0), False),
    ("without mac=", dict(mac="", waiting=0), False), ("another model waits", dict(model="n", waiting=9), False),
    ("a short queue", dict(busy=("m",), waiting=3), False), ("a long queue", dict(busy=("m",), waiting=99), True)])
def test_sleeping_node_is_woken_for_work_that_it_would_finish_sooner(given, wakes):
    dispatcher, node = asleep(**given)
    assert sollol.nodes_to_wake(dispatcher, 1000.5) == ([node] if wakes else [])
    if wakes:
        node.sleep.call(1000.5)
        assert sollol.nodes_to_wake(dispatcher, 1060.0) == []       # once a minute at most
        assert sollol.nodes_to_wake(dispatcher, 1061.0) == [node]


def test_sleeping_node_that_was_never_seen_is_woken_for_what_nobody_is_known_to_have():
    dispatcher = sollol.Dispatcher()
    dispatcher.cluster.configure([NodeSettings("b", "127.0.0.1", 2, mac="aabbccddeeff")])
    node = dispatcher.cluster.nodes["b"]
    node.missed(True, 0.0)
    enter(dispatcher, want(), now=1000.0)
    assert dispatcher.dispatch(1000.0) == ([], []) and sollol.nodes_to_wake(dispatcher, 1000.0) == [node]


def test_request_waits_for_a_sleeping_node_and_is_refused_once_that_was_called_in_vain():
    dispatcher, node = asleep()
    waiting, = dispatcher.waiting.tickets
    assert node.state(1000.0) == "down"
    node.sleep.call(1001.0)
    assert node.state(1001.0) == "waking" and dispatcher.dispatch(1100.0) == ([], [])
    assert dispatcher.dispatch(1182.0) == ([], [waiting]) and waiting.refusal.status == 503
    assert node.state(1182.0) == "down" and sollol.nodes_to_wake(dispatcher, 1200.0) == []
    late, = enter(dispatcher, want(), now=1700.0)
    assert dispatcher.dispatch(1700.0) == ([], []) and sollol.nodes_to_wake(dispatcher, 1700.0) == [node]
    node.answered("0.33.0", 0.001, 1720.0)
    assert placed(dispatcher, 1720.0) == ["b"] and late.lease is not None and node.state(1720.0) == "up"


def test_models_of_a_sleeping_node_are_known_after_a_restart():
    learned = taught().cluster.learned()
    later = sollol.Dispatcher()
    later.cluster.remember(learned)
    settings = settings_of(taught())
    later.cluster.configure([line._replace(mac="aabbccddeeff") for line in settings])
    assert later.cluster.holders and all(not node.up for node in later.cluster.nodes.values())


def test_magic_packet_and_where_it_goes():
    packet = sollol.magic_packet("aabbccddeeff")
    assert packet == b"\xff" * 6 + bytes.fromhex("aabbccddeeff") * 16 and len(packet) == 102
    node = NodeSettings("a", "gpu", 1, mac="aabbccddeeff")
    assert sollol.packet_addresses(node, ["192.168.7.20", "fd00::1", "192.168.7.21"]) == [
        ("255.255.255.255", 9), ("192.168.7.255", 9)]
    assert sollol.packet_addresses(node, []) == [("255.255.255.255", 9)]
    assert sollol.packet_addresses(node._replace(wake="relay:40000"), ["10.0.0.9", "fd00::1"]) == [("10.0.0.9", 40000)]


# -----------------------------------------------------------------------------
# Dispatcher: a random walk
# -----------------------------------------------------------------------------

class Walk:
    """Do random things to a dispatcher, as the I/O side may, and look at its books after each."""

    def __init__(self, policy, seed):
        self.rng, self.now = random.Random(seed), 0.0
        models = {"n1": ["a", "b"], "n2": ["a"], "n3": ["b"]}
        self.dispatcher = cluster(policy, slots=0, resident=False, max_queue=25, **models)
        self.settings = [node.settings for node in self.dispatcher.cluster.nodes.values()]
        self.settings[2] = self.settings[2]._replace(slots=3)
        self.nodes = set(self.dispatcher.cluster.nodes.values())
        self.tickets = []

    def running(self):
        return [it for it in self.tickets if it.lease is not None]

    def step(self):
        actions = [self.enter] * 6 + [self.dispatch] * 6 + [self.hear] * 4 + [self.finish] * 4 + [
            self.fail, self.leave, self.flap, self.look, self.configure, self.watch, self.leave_refused]
        self.now += self.rng.choice([0.0, 0.01, 0.3, 2.0])
        self.rng.choice(actions)()
        self.look_at_the_books()

    def enter(self):
        rng = self.rng
        spec = want(rng.choice(["a", "a", "b", "unknown", "x:cloud"]), priority=rng.randint(1, 10),
                     client=rng.choice("xyz"), stream=rng.random() < 0.7, prompt_chars=rng.choice([0, 50000]),
                     max_output=rng.choice([None, 1, 500]), embeds=rng.random() < 0.1,
                     options=rng.choice([(), (), (("num_ctx", 8192),)]), prefix=((rng.randrange(5), 200),),
                     session=rng.randrange(3))
        waiting = list(self.dispatcher.waiting.tickets)
        full = len(waiting) >= self.dispatcher.waiting.max_tickets
        try:
            self.tickets += enter(self.dispatcher, spec, now=self.now)
        except Refusal:
            assert full and [it for it in waiting if it.state is not TicketState.WAITING] == []
            return
        displaced = [it.spec.client for it in waiting if it.state is not TicketState.WAITING]
        clients = [spec.client, *(it.spec.client for it in waiting)]
        assert len(displaced) == full and all(
            clients.count(client) == max(map(clients.count, "xyz")) for client in displaced)

    def dispatch(self):
        leases, refused = self.dispatcher.dispatch(self.now)
        for lease in leases:
            assert lease.node.up and not lease.node.draining and lease.node.name not in lease.ticket.tried
            assert self.now <= lease.predicted_end_s < 1e6 or lease.runner is None
            if lease.runner and not self.dispatcher.policy.binds_early:
                assert lease.position <= lease.runner.slots.count + 1
        assert all(it.refusal.status in (502, 503) for it in refused)

    def hear(self):
        for it in self.running()[:3]:
            it.lease.heard(self.rng.randrange(20), self.now)

    def finish(self):
        if self.running():
            done = self.rng.choice(self.running())
            took_s = self.now - done.lease.sent_s
            share = self.rng.random()
            finish(self.dispatcher, done, self.now, self.rng.choice([
                Timings(),
                Timings(took_s, 0, took_s * share / 2, 9, took_s * share / 2, self.rng.randrange(99))]))
            self.tickets.remove(done)

    def fail(self):
        if self.running():
            failed = self.rng.choice(self.running())
            kind = self.rng.choice(["refused", "died", "garbage", "lost", "busy", "proxy", "model", "missing", "length",
                                    "feature", "route"])
            if not fail(self.dispatcher, failed, kind, self.now):
                self.remove(failed)

    def leave(self):
        if self.tickets:
            self.remove(self.rng.choice(self.tickets))

    def leave_refused(self):
        for it in [it for it in self.tickets if it.refusal]:
            self.remove(it)

    def remove(self, it):
        self.dispatcher.leave(it, self.now)
        self.tickets.remove(it)

    def flap(self):
        node = self.rng.choice(list(self.dispatcher.cluster.nodes.values()))
        if self.rng.random() < 0.4:
            node.missed(self.rng.random() < 0.3, self.now)
        else:
            node.answered("1", 0.001, self.now)

    def look(self):
        node = self.rng.choice(list(self.dispatcher.cluster.nodes.values()))
        self.dispatcher.cluster.take_tags(node, rows(*self.rng.sample(["a", "b", "c"], self.rng.randint(1, 3))))
        row, = rows(self.rng.choice("abc"))
        node.take_ps([{**row, "size_vram": 3 * 10**9}], self.now - 1, self.now)

    def configure(self):
        if self.rng.random() < 0.3:
            added, _ = self.dispatcher.cluster.configure(self.rng.sample(self.settings, self.rng.randint(1, 3)))
            self.nodes.update(added)

    def watch(self):
        self.dispatcher.watch(self.now)
        self.dispatcher.expire(self.now)
        for node in self.dispatcher.cluster.nodes.values():
            if node.suspect and self.rng.random() < 0.7:
                node.trust(self.now)

    def look_at_the_books(self):
        queue, running = self.dispatcher.waiting, self.running()
        for node in self.nodes:
            held = [lease for it in node.busy for lease in it.leases]
            assert sorted(map(id, held)) == sorted(id(it) for it in node.leases if it.runner)
            assert len(set(node.busy)) == len(node.busy) and all(it.leases for it in node.busy)
            assert all(it in node.busy for it in node.runners.values() if it.leases)
            assert all(it.ticket.lease is it and not it.released and it.node is node for it in node.leases)
            assert 0.03 <= node.speed <= 1
            assert all(1 <= it.slots.proven <= it.slots.count for it in node.runners.values())
        leases = [lease for node in self.nodes for lease in node.leases]
        assert sorted(map(id, leases)) == sorted(id(it.lease) for it in running)
        assert set(queue.tickets) == {it for it in self.tickets if it.state is TicketState.WAITING}
        states = {TicketState.WAITING: "", TicketState.LEASED: "lease", TicketState.REFUSED: "refusal"}
        assert all(it.state in states and [name for name in ("lease", "refusal") if getattr(it, name)]
                   == [name for name in [states[it.state]] if name] for it in self.tickets)
        fair = self.dispatcher.waiting.fair
        assert sum(fair.active.values()) == len(self.tickets) and fair.begun_s.keys() == fair.active.keys()
        assert sum(queue.sessions.values()) == len(self.tickets)
        paces = {id(it.pace): it.pace for it in self.tickets if it.pace}.values()
        assert sum(pace.waiting for pace in paces) == sum(bool(it.pace) for it in queue.tickets)
        assert sum(pace.running for pace in paces) == sum(bool(it.ticket.pace) for it in leases if it.runner)
        valid = [entry[2] for heap in queue.heaps.values() for entry in heap if sollol.is_valid(entry)]
        assert len(valid) == len(queue.tickets) and set(valid) == set(queue.tickets)
        assert all(fair.next_s[client][priority] >= begun_s for (client, priority), begun_s in fair.begun_s.items())


@pytest.mark.parametrize("policy, seed", [("latency-weighted", seed) for seed in range(8)] + [
    (policy, seed) for policy in ("round-robin", "least-inflight") for seed in range(2)])
def test_books_stay_in_order_over_a_random_walk_and_are_empty_at_its_end(policy, seed):
    walk = Walk(policy, seed)
    for _ in range(600):
        walk.step()
    for it in list(walk.tickets):
        walk.remove(it)
        walk.look_at_the_books()
    assert empty(walk.dispatcher) and not any(node.leases or node.busy for node in walk.nodes)


# -----------------------------------------------------------------------------
# Memory: what a restart keeps
# -----------------------------------------------------------------------------

def taught():
    """Return a Dispatcher that has learned something of each of its nodes."""
    dispatcher = cluster(slots=0, n1=["m", "nomic-embed"], n2=["m"])
    it = runner(dispatcher, "n1")
    speeds, it.unqueued_ratio = it.speeds, {True: 1.5}
    speeds.decode_s, speeds.prefill_s, speeds.load_s, speeds.samples = 0.005, 0.0002, 4.0, 40
    it.batching = batched(0.4)
    it.speeds.input_s = 0.007
    it.confirm_slots(4, 0.0)
    runner(dispatcher, "n2").speeds.load_s = 9.0
    runner(dispatcher, "n2").slots.reject(0.0, -math.inf)
    dispatcher.cluster.nodes["n1"].size_factor, dispatcher.cluster.nodes["n1"].memory.limit_bytes = 0.3, 8e9
    dispatcher.cluster.nodes["n1"].load_factor = 2.5
    for _ in range(50):
        dispatcher.cluster.estimates.lengths["m:latest"].learn(100, 40)
    return dispatcher


def restarted(learned, settings, models=("m", "nomic-embed"), digest=None):
    """Return a Dispatcher that remembers, over nodes that have the models."""
    dispatcher = sollol.Dispatcher()
    dispatcher.cluster.remember(json.loads(json.dumps(learned)))
    dispatcher.cluster.configure(settings)
    for node in dispatcher.cluster.nodes.values():
        node.answered("0.33.0", 0.001, 100.0)
        dispatcher.cluster.take_tags(node, [{**row, "digest": digest or row["digest"]} for row in rows(*models)], 100.0)
    return dispatcher


def settings_of(dispatcher):
    return [node.settings for node in dispatcher.cluster.nodes.values()]


def test_what_was_learned_is_known_again_as_an_estimate():
    first = taught()
    again = restarted(first.cluster.learned(), settings_of(first))
    one, two = again.cluster.nodes.values()
    it, other = runner(again, "n1"), runner(again, "n2")
    assert (it.speeds.decode_s, it.speeds.prefill_s, it.speeds.load_s) == (0.005, 0.0002, 4.0)
    assert it.unqueued_ratio == {True: 1.5}
    assert it.batching.batch_exponent == it.batching.prior == pytest.approx(0.4, abs=0.05)
    assert it.batching.slowdowns[4] > 2 and other.batching.batch_exponent == sollol.BATCH_GAIN
    assert it.speeds.input_s == 0.007
    assert (it.slots.count, it.slots.proven, it.slots.origin) == (4, 4, "learned")
    assert it.speeds.samples == sollol.KEPT_SAMPLES
    assert (one.size_factor, one.memory.limit_bytes, two.memory.limit_bytes) == (0.3, 8e9, math.inf)
    assert (one.load_factor, two.load_factor) == (2.5, 1.0)
    assert (one.calibrated, two.calibrated, other.speeds.load_s) == (True, False, 9.0)
    assert (other.slots.count, other.slots.origin) == (1, "learned")
    assert other.slots.retry_at_s == 100.0 + sollol.RETRY_SLOT_S
    assert again.cluster.estimates.demand(want(prompt_chars=400)).output_tokens == pytest.approx(40)
    assert one.runners["nomic-embed:latest"].slots.origin == "set"


def test_what_is_known_of_an_embedding_models_prompts_is_kept():
    dispatcher = cluster(n1=["nomic-embed-text"])
    it, = enter(dispatcher, want("nomic-embed-text:latest", embeds=True, prompt_chars=3000))
    placed(dispatcher)
    finish(dispatcher, it, 1.0, Timings(0.5, 0, 0, 1500))
    again = restarted(dispatcher.cluster.learned(), settings_of(dispatcher))
    sizes = again.cluster.estimates.lengths["nomic-embed-text:latest"].prompts
    assert sizes.chars_per_token < sollol.CHARS_PER_TOKEN


def test_new_answers_outweigh_what_was_kept():
    first = taught()
    it = runner(restarted(first.cluster.learned(), settings_of(first)), "n1")
    for _ in range(12):
        sollol.learn_decode(it, 0.02, 0.0)
    assert it.speeds.decode_s == pytest.approx(0.02, rel=0.2)
    it.note_slots(it.slots.suspect(3, 200.0, it.node.strangers_s))
    assert it.slots.count == 3


def test_hosts_file_and_another_version_of_a_model_count_more_than_what_was_kept():
    first = taught()
    settings = [line._replace(slots=2) for line in settings_of(first)]
    assert runner(restarted(first.cluster.learned(), settings), "n1").slots.count == 2
    it = runner(restarted(first.cluster.learned(), settings_of(first), digest="newer"), "n1")
    assert (it.speeds.decode_s, it.slots.count, it.speeds.samples) == (0.0, 1, 0)


@table("change, known", [
    ("another name", dict(name="x"), True), ("another address", dict(host="10.9.9.9"), True),
    ("both", dict(name="x", host="10.9.9.9"), False)])
def test_server_is_known_again_by_its_url_or_its_name(change, known):
    first = taught()
    again = restarted(first.cluster.learned(), [settings_of(first)[0]._replace(**change)])
    assert (next(iter(again.cluster.nodes.values())).runners["m:latest"].speeds.decode_s == 0.005) is known
    kept = {entry["url"]: entry for entry in again.cluster.learned()["nodes"]}
    assert kept["http://127.0.0.1:11435"]["models"]["m:latest"]["load_s"] == 9.0    # of whom nothing is known now
    assert set(kept) >= {line.url for line in settings_of(first)}


def test_node_that_comes_back_and_a_model_that_comes_back_are_known_again():
    dispatcher = taught()
    one, two = settings_of(dispatcher)
    dispatcher.cluster.configure([two])
    dispatcher.watch(1.0)
    assert not dispatcher.cluster.leaving
    dispatcher.cluster.configure([one, two])
    node = dispatcher.cluster.nodes["n1"]
    dispatcher.cluster.take_tags(node, rows("m"))
    assert node.runners["m:latest"].speeds.decode_s == 0.005
    for models in (["m"], ["x"], ["m"]):
        dispatcher.cluster.take_tags(node, rows(*models))
    assert node.runners["m:latest"].speeds.decode_s == 0.005


def test_what_was_kept_is_bounded_by_number():
    learned, entry = taught().cluster.learned(), taught().cluster.learned()["nodes"][0]
    learned["nodes"] = [{**entry, "name": f"n{number}", "url": f"http://{number}"} for number in range(2000)]
    dispatcher = sollol.Dispatcher()
    dispatcher.cluster.remember(learned)
    assert len(dispatcher.cluster.learned()["nodes"]) == sollol.MOST_KEPT
    assert dispatcher.cluster.learned()["nodes"][-1]["name"] == "n1999"


def test_rubbish_in_a_state_file_is_left_out_and_never_raises():
    """Random values anywhere in it; what is taken over is a number in its range."""
    rng, good = random.Random(5), json.dumps(taught().cluster.learned())
    odd = [0, -1, 1e400, -1e400, float("nan"), 10**400, True, None, "5", [], {}, 0.5, 1e9, 257]

    def spoil(value):
        if rng.random() < 0.15:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    def figures(thing, ranges):
        for name, (kind, least, most) in ranges.items():
            value = getattr(thing, name)
            assert type(value) is kind and (not value or value == math.inf or least <= value <= most), (name, value)

    for _ in range(300 * FUZZ):
        learned = json.loads(good)
        learned["nodes"], learned["lengths"] = ([spoil(entry) for entry in learned["nodes"]],
                                                {key: spoil(entry) for key, entry in learned["lengths"].items()})
        dispatcher = restarted(learned, settings_of(taught()))
        for node in dispatcher.cluster.nodes.values():
            figures(node, sollol.KEPT_OF_NODE)
            figures(node.memory, sollol.KEPT_OF_MEMORY)
            for it in node.runners.values():
                figures(it, sollol.KEPT_OF_RUNNER)
                figures(it.speeds, sollol.KEPT_OF_SPEEDS)
                figures(it.batching, sollol.KEPT_OF_BATCHING)
                figures(it.slots, sollol.KEPT_OF_SLOTS)
                assert it.speeds.samples <= sollol.KEPT_SAMPLES and it.slots.proven == it.slots.count
        enter(dispatcher, want())
        assert placed(dispatcher, 100.0)
        json.dumps(dispatcher.cluster.learned(), allow_nan=False)


# -----------------------------------------------------------------------------
# hosts.txt and command line
# -----------------------------------------------------------------------------

@table("line, expected", [
    ("plain", "http://gpu:11434", dict(name="gpu:11434", host="gpu", port=11434, host_header="gpu:11434")),
    ("no port", "http://gpu", dict(name="gpu:11434", port=11434)),
    ("no scheme", "gpu", dict(host="gpu", port=11434)),
    ("no scheme, port", "gpu:9", dict(host="gpu", port=9, tls=False)),
    ("https", "https://gpu:443", dict(port=443, tls=True)),
    ("https, no port", "https://gpu", dict(port=11434, tls=True)),
    ("capitals", "HTTP://GPU:9", dict(host="gpu", tls=False)),
    ("ipv6", "http://[::1]:9", dict(name="[::1]:9", host="::1", port=9, host_header="[::1]:9")),
    ("ipv6 again", "[::1]", dict(url="http://[::1]:11434")),
    ("slash", "http://gpu:9/", dict(prefix="", url="http://gpu:9")),
    ("path", "http://gpu:9/a/b/", dict(prefix="/a/b")),
    ("all settings", "gpu name=g slots=4 token=a=b#c host=localhost prefix=/p/ primary=yes",
     dict(name="g", slots=4, token="a=b#c", host_header="localhost", prefix="/p", primary=True)),
    ("comment", "gpu slots=64  # fixed", dict(slots=64)),
    ("any certificate", "https://gpu insecure=yes", dict(tls=True, insecure=True, ca="")),
    ("every address", "gpu resolve=all", dict(resolve=True)),
    ("drained", "gpu drain=yes", dict(drain=True)), ("not drained", "gpu drain=no", dict(drain=False)),
    ("models to load", "gpu load=Llama3.2,qwen3:14b,llama3.2:latest", dict(load=("llama3.2:latest", "qwen3:14b"))),
    ("asleep", "gpu mac=AA:bb:CC:dd:EE:0f probe=60s", dict(mac="aabbccddee0f", wake="", probe_s=60.0)),
    ("mac with dashes", "gpu mac=AA-BB-CC-DD-EE-FF wake=10.0.0.255", dict(mac="aabbccddeeff", wake="10.0.0.255:9")),
    ("packet to a port", "gpu mac=AA:BB:CC:DD:EE:FF wake=relay:40000", dict(wake="relay:40000")),
    ("tabs and spaces", "\t gpu \t name=g ", dict(name="g")),
])
def test_line_of_a_hosts_file(line, expected):
    node, = sollol.parse_hosts(f"# nodes\n\n{line}\r\n", "hosts.txt")
    assert {key: getattr(node, key) for key in expected} == expected
    assert node.primary == ("primary=yes" in line)


def test_first_line_is_primary_unless_another_says_so():
    for text, expected in (("a\nb", [True, False]), ("a\nb primary=yes", [False, True])):
        dispatcher = sollol.Dispatcher()
        dispatcher.cluster.configure(sollol.parse_hosts(text, "h"))
        assert [node.settings.primary for node in dispatcher.cluster.nodes.values()] == expected


@table("line, message", [
    ("slots in words", "gpu slots=four", "slots must be a whole number from 1 to 64, not 'four'"),
    ("no slots", "gpu slots=0", "slots must be a whole number from 1 to 64, not '0'"),
    ("many slots", "gpu slots=65", "slots must be a whole number from 1 to 64, not '65'"),
    ("half a slot", "gpu slots=1.5", "slots must be a whole number from 1 to 64, not '1.5'"),
    ("slots squared", "gpu slots=²", "slots must be a whole number from 1 to 64, not '²'"),
    ("unknown setting", "gpu weight=3", "unknown setting 'weight'"),
    ("word", "gpu fast", "unknown setting 'fast'"),
    ("space around equals", "gpu slots = 4", "unknown setting 'slots'"),
    ("empty name", "gpu name=", "name must be printable"),
    ("name not ASCII", "gpu name=grün", "name must be printable ASCII"),
    ("prefix", "gpu prefix=p", "prefix must begin with a slash"),
    ("switch", "gpu primary=maybe", "primary must be yes or no, not 'maybe'"),
    ("drain", "gpu drain=on", "drain must be yes or no, not 'on'"),
    ("resolve", "gpu resolve=one", "resolve must be all, not 'one'"),
    ("scheme", "ftp://gpu", "is not the URL of a node"), ("no host", "http://", "is not the URL of a node"),
    ("query", "http://gpu/?x", "is not the URL of a node"),
    ("user", "http://u:p@gpu", "is not the URL of a node"), ("port", "gpu:eleven", "has no valid port"),
    ("port too large", "http://gpu:99999", "has no valid port"), ("bracket", "http://[::1", ""),
    ("ca of plain HTTP", "http://gpu ca=a.pem", "ca= is for https:// only"),
    ("insecure plain HTTP", "gpu insecure=yes", "insecure= is for https:// only"),
    ("both", "https://gpu ca=a.pem insecure=yes", "ca= and insecure=yes contradict each other"),
    ("ca not there", "https://gpu ca=none.pem", "ca none.pem: No such file or directory"),
    ("ca without certificate", "https://gpu ca=/dev/null", "ca /dev/null: there is no certificate in PEM form in it"),
    ("insecure in words", "https://gpu insecure=1", "insecure must be yes or no, not '1'"),
    ("no model", "gpu load=", "load must be models with commas, such as llama3.2,qwen3:14b, not ''"),
    ("model missing", "gpu load=a,,b", "load must be models with commas"),
    ("cloud model", "gpu load=a,gpt-oss:120b-cloud", "load gpt-oss:120b-cloud runs in the cloud: no node loads it"),
    ("half a mac", "gpu mac=AA:BB:CC", "mac must be like AA:BB:CC:DD:EE:FF, not 'AA:BB:CC'"),
    ("mac of mixed kind", "gpu mac=AA:BB-CC:DD:EE:FF", "mac must be like"),
    ("mac without marks", "gpu mac=AABBCCDDEEFF", "mac must be like"),
    ("mac of many", "gpu mac=AA:BB:CC:DD:EE:FF resolve=all", "mac= is of one machine, resolve=all is for many"),
    ("wake without mac", "gpu wake=10.0.0.255", "wake= is for a node with mac="),
    ("wake nowhere", "gpu mac=AA:BB:CC:DD:EE:FF wake=a:0", "wake must be HOST or HOST:PORT"),
    ("wake no host", "gpu mac=AA:BB:CC:DD:EE:FF wake=:9", "wake must be HOST or HOST:PORT"),
    ("probe in words", "gpu probe=rarely", "probe must be a time such as 60s or 5m, not 'rarely'"),
    ("probe never", "gpu probe=0", "probe must be a time such as 60s or 5m, not '0'"),
    ("twice", "http://one", "there are two nodes named 'one:11434'"),
    ("port 0", "http://gpu:0", "has no valid port"),
    ("password only", "http://:p@gpu", "is not the URL of a node"),
    ("control character in the host", "http://gp\x01u", "is not the URL of a node"),
    ("host not ASCII", "http://grün", ""), ("path not ASCII", "http://gpu/grün", ""),
])
def test_mistake_in_a_hosts_file_names_place_line_and_mistake(line, message):
    with pytest.raises(sollol.ConfigError) as caught:
        sollol.parse_hosts(f"http://one\n# two\n{line}\nhttp://four", "hosts.txt")
    text = str(caught.value)
    assert text.startswith("hosts.txt:3: ") and message in text and "\n" not in text


@pytest.mark.parametrize("line", [
    "gpu token=s3cret\u00e4", "gpu tokn=s3cret", "http://me:s3cret@gpu", "http://me:s3cret@gpu:port",
    "http://s3cret@gpu", "me:s3cret@gpu", "gpu token=s3cret slots=0"])
def test_mistake_in_a_hosts_file_is_told_without_the_secret(line):
    with pytest.raises(sollol.ConfigError) as caught:
        sollol.parse_hosts(line, "hosts.txt")
    assert "s3cret" not in str(caught.value)


def test_nodes_come_from_file_and_flags(tmp_path):
    path = tmp_path / "hosts.txt"
    path.write_text("a\nb")
    options = sollol.parse_options(["--hosts", str(path), "--node", "c", "--node", "d:9"], {})
    assert [node.name for node in sollol.read_nodes(options)] == ["a:11434", "b:11434", "c:11434", "d:9"]


TOLD = {"pods": ["10.0.0.2", "10.0.0.1"], "both": ["fd00::1", "10.0.0.3"], "six": ["fd00::1"]}
SCANNED = {("10.0.0.2", 11434): 0, ("fd00::2", 11434): 3, ("10.0.0.8", 11434): 0}       # the last one is this machine


@table("text, found, expected", [
    ("only found", "", SCANNED, ["10.0.0.2:11434 10.0.0.2 10.0.0.2:11434 *",
                                 "[fd00::2]:11434 [fd00::2] [fd00::2]:11434",
                                 "10.0.0.8:11434 10.0.0.8 10.0.0.8:11434"]),
    ("found and written", "[fd00:0::2]\nlocalhost:9\n10.0.0.8:80", SCANNED, [
        "[fd00:0::2]:11434 [fd00:0::2] [fd00:0::2]:11434 *", "localhost:9 localhost localhost:9",
        "10.0.0.8:80 10.0.0.8 10.0.0.8:80", "10.0.0.2:11434 10.0.0.2 10.0.0.2:11434",
        "10.0.0.8:11434 10.0.0.8 10.0.0.8:11434"]),
    ("found and told, found as localhost", "pods resolve=all\nhttp://127.0.0.1", SCANNED, [
        "pods@10.0.0.2 10.0.0.2 pods:11434 *", "pods@10.0.0.1 10.0.0.1 pods:11434",
        "127.0.0.1:11434 127.0.0.1 127.0.0.1:11434", "[fd00::2]:11434 [fd00::2] [fd00::2]:11434"]),
    ("found behind a written name", "six:11434", {("fd00::1", 11434): 0}, ["six:11434 six six:11434 *"]),
    ("every address", "pods resolve=all\nb", {}, ["pods@10.0.0.2 10.0.0.2 pods:11434 *",
                                                  "pods@10.0.0.1 10.0.0.1 pods:11434", "b:11434 b b:11434"]),
    ("its own name and port", "b\npods:80 resolve=all name=p", {}, [
        "b:11434 b b:11434 *", "p@10.0.0.2 10.0.0.2 pods:80", "p@10.0.0.1 10.0.0.1 pods:80"]),
    ("name without one", "pods:80 resolve=all host=h", {}, [
        "pods:80@10.0.0.2 10.0.0.2 h *", "pods:80@10.0.0.1 10.0.0.1 h"]),
    ("one primary", "b\npods resolve=all primary=yes", {}, ["b:11434 b b:11434", "pods@10.0.0.2 10.0.0.2 pods:11434 *",
                                                        "pods@10.0.0.1 10.0.0.1 pods:11434"]),
    ("a server has both families", "both resolve=all", {}, ["both@10.0.0.3 10.0.0.3 both:11434 *"]),
    ("only IPv6", "six resolve=all", {}, ["six@fd00::1 [fd00::1] six:11434 *"]),
    ("address", "10.0.0.9 resolve=all", {}, ["10.0.0.9@10.0.0.9 10.0.0.9 10.0.0.9:11434 *"]),
    ("not told", "gone resolve=all\nb", {}, ["b:11434 b b:11434 *"]), ("nothing", "gone resolve=all", {}, []),
])
def test_nodes_that_the_sources_make_together(text, found, expected):
    dispatcher = sollol.Dispatcher()
    lines = sollol.parse_hosts(text, "h")
    dispatcher.cluster.configure(sollol.merge_sources(lines, TOLD, found, lambda address: address == "10.0.0.8"))
    found = [node.settings for node in dispatcher.cluster.nodes.values()]
    assert [f"{it.name} {re.sub('^http://|:[0-9]+$', '', it.url)} {it.host_header}" + " *" * it.primary
            for it in found] == expected


@pytest.mark.parametrize("text, addresses", [
    ("192.168.1.0/24", 254), ("192.168.1.7/24", 254), ("10.0.0.0/20", 4094), ("10.0.0.5", 1), ("10.0.0.5/32", 1),
    ("fd00::/116", 4095), ("::1", 1), ("10.0.0.0/19", 0), ("fd00::/115", 0), ("0.0.0.0/0", 0), ("10.0.0.0/33", 0),
    ("lan", 0), ("10.0.0.0/24:11434", 0), ("", 0)])
def test_network_to_scan_is_small(text, addresses):
    if addresses:
        assert len(list(sollol.parse_network(text).hosts())) == addresses
    else:
        with pytest.raises(sollol.argparse.ArgumentTypeError):
            sollol.parse_network(text)


def test_found_server_is_forgotten_after_ten_scans_without_it():
    a, b = ("10.0.0.1", 11434), ("10.0.0.2", 11434)
    found = sollol.after_scan({}, [a, b], set())
    assert found == {a: 0, b: 0}
    for missed in range(1, sollol.SCANS_KEPT):
        found = sollol.after_scan(found, [], {b})
        assert found == {a: missed, b: 0}
    assert sollol.after_scan(found, [a], set()) == {a: 0, b: 1}
    assert sollol.after_scan(found, [], set()) == {b: 1}


@table("argv, content, message", [
    ("no file", ["--hosts", "FILE"], None, "No such file"),
    ("not text", ["--hosts", "FILE"], b"\xff\xfe", "FILE"),
    ("empty file", ["--hosts", "FILE"], b"# none\n", "no node"),
    ("bad line", ["--hosts", "FILE"], b"a\nb c\n", "FILE:2: "),
    ("bad flag", ["--node", "ftp://x"], None, "--node:1: "),
    ("bad flag beside a file", ["--hosts", "FILE", "--node", "ftp://x"], b"a\nb", "--node"),
])
def test_bad_list_of_nodes_is_told_in_one_line(tmp_path, argv, content, message):
    path = tmp_path / "hosts.txt"
    if content is not None:
        path.write_bytes(content)
    argv = [word.replace("FILE", str(path)) for word in argv]
    with pytest.raises(sollol.ConfigError) as caught:
        sollol.read_nodes(sollol.parse_options(argv, {}))
    assert message.replace("FILE", str(path)) in str(caught.value) and "\n" not in str(caught.value)


@table("argv, environ, expected", [
    ("defaults", [], {}, dict(
        bind="127.0.0.1", port=8000, policy="latency-weighted", probe_interval=5.0, max_queue=1024, seed=None,
        queue_timeout=240.0, max_body=64 * 2**20, header_timeout=10.0, max_connections=4096,
        drain_timeout=300.0, log_format="kv", log_level="info", calibrate=True, uvloop=True, check=False)),
    ("environment", [], {"SOLLOL_PORT": "9", "SOLLOL_MAX_BODY": "1GiB", "SOLLOL_POLICY": "round-robin"},
     dict(port=9, max_body=2**30, policy="round-robin")),
    ("flag wins", ["--port", "10"], {"SOLLOL_PORT": "9"}, dict(port=10)),
    ("switches", [], {"SOLLOL_NO_CALIBRATE": "1", "SOLLOL_NO_UVLOOP": "Yes", "SOLLOL_CHECK": "0"},
     dict(calibrate=False, uvloop=False, check=False)),
    ("hosts", [], {"SOLLOL_HOSTS": "h.txt"}, dict(hosts="h.txt")),
    ("port 0", ["--port=0"], {}, dict(port=0)), ("switch", ["--no-calibrate"], {}, dict(calibrate=False)),
    ("flag wins over a list", [], {"SOLLOL_NODE": "b c"}, dict(node=["a"])),
])
def test_every_flag_has_its_twin_in_the_environment(argv, environ, expected):
    options = sollol.parse_options(["--node", "a", *argv], environ)
    assert {key: getattr(options, key) for key in expected} == expected


def test_what_kubernetes_sets_for_a_service_of_our_name_is_ignored_and_told(capsys):
    links = {"SOLLOL_SERVICE_HOST": "10.0.0.1", "SOLLOL_SERVICE_PORT": "8000", "SOLLOL_SERVICE_PORT_HTTP": "8000",
             "SOLLOL_PORT": "tcp://10.0.0.1:8000", "SOLLOL_PORT_8000_TCP": "tcp://10.0.0.1:8000",
             "SOLLOL_PORT_8000_TCP_PROTO": "tcp", "SOLLOL_PORT_8000_TCP_PORT": "8000",
             "SOLLOL_PORT_8000_TCP_ADDR": "10.0.0.1", "SOLLOL_WEB_SERVICE_HOST": "10.0.0.2",
             "SOLLOL_WEB_PORT": "tcp://10.0.0.2:80", "SOLLOL_WEB_PORT_80_TCP": "tcp://10.0.0.2:80"}
    options = sollol.parse_options(["--demo"], {**links, "SOLLOL_MAX_QUEUE": "7", "PORT": "x", "SOLLOLX": "y"})
    assert (options.port, options.max_queue, options.ignored) == (8000, 7, list(links))
    with program("sollol.py", "--node", "127.0.0.1:1", env={**links, "SOLLOL_PORT": "0"}) as gateway:
        assert "SOLLOL_SERVICE_HOST" in read_until(gateway, "event=start ignored=(.*)")[1]
        read_until(gateway, "event=start version=")
        assert all_output(gateway).count("ignored") == 1


def test_nodes_in_the_environment_are_a_list():
    assert sollol.parse_options([], {"SOLLOL_NODE": "a b:9"}).node == ["a", "b:9"]
    options = sollol.parse_options([], {"SOLLOL_DISCOVER": "10.0.0.0/24 ::1"})
    assert [str(network) for network in options.discover] == ["10.0.0.0/24", "::1/128"]
    assert sollol.read_nodes(options) == []


@table("argv, environ, message", [
    ("no nodes", [], {}, "--hosts FILE"), ("unknown flag", ["--hots", "x"], {}, "--hots"),
    ("port", ["--demo", "--port", "http"], {}, "'http' is not a port number"),
    ("port too large", ["--demo", "--port", "65536"], {}, "'65536' is not a port number"),
    ("port below zero", ["--demo", "--port=-1"], {}, "is not a port number"),
    ("size", ["--demo", "--max-body", "much"], {}, "'much' is not a size such as 64MiB"),
    ("no time", ["--demo", "--queue-timeout", "0"], {}, "'0' is not a time such as 90, 90s, 500ms, 5m or 2h"),
    ("no unit of time", ["--demo", "--drain-timeout", "5 min"], {}, "'5 min' is not a time"),
    ("infinite time", ["--demo", "--drain-timeout", "inf"], {}, "'inf' is not a time"),
    ("count", ["--demo", "--max-queue", "0"], {}, "'0' is not a whole number of at least 1"),
    ("policy", ["--demo", "--policy", "best"], {}, "best"), ("no value", ["--demo", "--port"], {}, "--port"),
    ("origin", ["--demo", "--origins", "http://a,b.example"], {}, "'b.example' is not an origin"),
    ("replicas", ["--demo", "--replicas", "0"], {}, "'0' is not a whole number of at least 1"),
    ("seed", ["--demo", "--seed", "x"], {}, "--seed"), ("stray word", ["--demo", "x"], {}, "x"),
    ("large network", ["--discover", "10.0.0.0/8"], {}, "10.0.0.0/8 has more than 4096 addresses"),
    ("no network", [], {"SOLLOL_DISCOVER": "10.0.0.0/24 lan"}, "SOLLOL_DISCOVER: 'lan' is not a network"),
    ("environment", ["--demo"], {"SOLLOL_PORT": "http"}, "'http' is not a port number"),
    ("unknown in the environment", ["--demo"], {"SOLLOL_QUEUE_TIMOUT": "9"},
     "unknown variable SOLLOL_QUEUE_TIMOUT: is SOLLOL_QUEUE_TIMEOUT meant?"),
    ("unlike any in the environment", ["--demo"], {"SOLLOL_X": ""}, "unknown variable SOLLOL_X: see --help"),
    ("no flag's value in the environment", ["--demo"], {"SOLLOL_VERSION": "1"}, "unknown variable SOLLOL_VERSION"),
    ("policy in the environment", ["--demo"], {"SOLLOL_POLICY": "best"}, "best"),
    ("log format in the environment", ["--demo"], {"SOLLOL_LOG_FORMAT": "xml"}, "xml"),
    ("log level in the environment", ["--demo"], {"SOLLOL_LOG_LEVEL": "loud"}, "loud"),
    ("switch in the environment", ["--demo"], {"SOLLOL_NO_UVLOOP": "perhaps"}, "perhaps"),
    ("everybody's address", ["--demo", "--bind", ""], {}, "'' is not an address"),
    ("no address", ["--demo", "--bind", "a..b"], {}, "'a..b' is not an address"),
    ("keys unset", ["--demo", "--keys", ""], {}, "--keys: no file is named"),
    ("keys unset in the environment", ["--demo"], {"SOLLOL_KEYS": ""}, "SOLLOL_KEYS: no file is named"),
    ("certificate unset", ["--demo", "--tls-cert", "", "--tls-key", ""], {}, "--tls-cert: no file is named"),
])
def test_mistake_on_the_command_line_is_one_line_and_status_2(capsys, argv, environ, message):
    with pytest.raises(SystemExit) as caught:
        sollol.parse_options(argv, environ)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("sollol.py: ") and message in text and text.count("\n") == 1


@pytest.mark.parametrize("name", ["sollol.py", "bench.py"])
def test_older_python_gets_one_clear_line_and_status_2(name):
    """The file has to compile there before it can say so. Before 3.8 the line of the check itself is shown."""
    source = (HERE / name).read_text()
    ast.parse(source, feature_version=(3, 8))
    with pytest.raises(SyntaxError) as caught:
        ast.parse((HERE / "sollol.py").read_text(), feature_version=(3, 7))
    assert "needed := (3, 11)" in caught.value.text
    for python in ("python3.8", "python3.9", "python3.10"):
        if shutil.which(python) and not subprocess.run([python, "-c", ""], capture_output=True).returncode:
            done = subprocess.run([python, HERE / name, "--help"], capture_output=True, text=True)
            assert (done.returncode, done.stdout) == (2, "")
            assert re.fullmatch(r"SOLLOL needs Python 3.11 or later, and this is 3\.\d+\n", done.stderr)


def test_help_tells_every_flag_its_unit_and_its_default(capsys):
    with pytest.raises(SystemExit):
        sollol.parse_options(["--help"], {})
    text = capsys.readouterr().out
    assert re.findall(r"^(\w+):$", text, re.M) == [
        "options", "nodes", "listening", "scheduling", "limits", "security", "monitoring", "log"]
    assert text.count("SOLLOL_") == 1
    for action in sollol.command_line()._actions[1:-1]:
        assert re.search(r"\([^()]+\)$", action.help.replace("%(default)s", "x")), action
        if action.type is sollol.parse_size:
            assert action.help.startswith("bytes "), action
        if action.type is sollol.parse_seconds:
            assert action.metavar == "TIME" and action.default.endswith("s"), action
    assert "A TIME is 90 or 90s, 500ms, 5m, 2h." in text
    assert not re.search(r"\bseconds", text)
    keys = sollol.parse_keys("\n".join(f"KEY{at} name=x{at} {setting}" if "name=" not in setting else f"KEY {setting}"
                             for at, setting in enumerate(re.findall(r"^  ([a-z-]+=\S+)", text, re.M))), "help")
    assert len(keys) == len(sollol.KEY_SETTINGS)


@pytest.mark.parametrize("text, size", [
    ("4096", 4096), ("1B", 1), ("2k", 2048), ("2KB", 2048), ("2KiB", 2048), ("64 MiB", 2**26),
    (" 1g ", 2**30)])
def test_size(text, size):
    assert sollol.parse_size(text) == size


@pytest.mark.parametrize("text, seconds", [
    ("5", 5.0), ("0.5", 0.5), ("1e3", 1000.0), (" 2 ", 2.0), ("90s", 90.0), ("5m", 300.0), ("2h", 7200.0),
    ("500ms", 0.5), (" 1.5 h ", 5400.0)])
def test_seconds(text, seconds):
    assert sollol.parse_seconds(text) == seconds


@pytest.mark.parametrize("parse, text", [
    *((sollol.parse_size, text) for text in ("", "-1", "1.5GiB", "MiB", "1TiB", "1 M iB", "1MiBs", "0x10")),
    *((sollol.parse_seconds, text) for text in ("", "0", "-1", "nan", "inf", "1e9", "5d", "s", "5 min", "5sm", "3000h",
                                                 "five")),
    *((sollol.parse_count, text) for text in ("", "0", "-1", "1.0", "²", "٣")),
    *((sollol.parse_port, text) for text in ("", "-1", "65536", "²", "80 "))])
def test_no_number(parse, text):
    with pytest.raises(sollol.argparse.ArgumentTypeError):
        parse(text)


@pytest.mark.parametrize("address, expected", [
    ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
    ("::", False), ("10.0.0.1", False), ("gw", False)])
def test_loopback(address, expected):
    assert sollol.is_loopback(address) == expected


@pytest.mark.parametrize("host, expected", [
    ("", True), ("localhost", True), ("LOCALHOST:8000", True), ("a.localhost:1", True), ("Box:8000", True),
    ("box.local", True), ("host.docker.internal:8000", True), ("127.0.0.1:8000", True), ("[::1]:8000", True),
    ("[::1]", True), ("10.0.0.1", True), ("8.8.8.8:80", True), ("chat.example", True), ("Chat.Example", True),
    ("gw.chat.example:8000", True), ("evil.example", False), ("evil.example:8000", False), ("localhost.evil", False),
    ("127.0.0.1.evil.example", False), ("local", False), ("internal:80", False), ("notlocalhost", False),
    ("box.evil", False), ("chat.example:8000", False), ("2130706433", False), ("0x7f.1", False),
    ("127.1", False), ("localhost.", False), ("evil.example:", False), ("\xff", False)])
def test_host_that_dns_rebinding_could_have_made_ours(host, expected):
    allowed = ["https://chat.example", "http://*.chat.example:8000"]
    assert sollol.is_trusted_host(host.encode("latin-1"), "box", allowed) == expected


# -----------------------------------------------------------------------------
# Over sockets: how the tests below talk to a gateway
# -----------------------------------------------------------------------------

def run_real(coroutine):
    """Run a coroutine on uvloop in real time."""
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 60))


LOOPS = {"virtual": bench.run_virtual, "uvloop": run_real}


def over_sockets(test):
    """Run an async test on both loops."""
    signature = inspect.signature(test)

    @pytest.mark.parametrize("loop", LOOPS)
    @functools.wraps(test)
    def run(loop, **given):
        LOOPS[loop](test(**given))

    run.__signature__ = signature.replace(parameters=[
        inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values()])
    return run


class ScriptedNode:
    """A node that answers the probes, and everything else with bytes that a test gives it.

    `script(request) -> [bytes | float | coroutine function]`: sent one after the other; a float sleeps; ends by
    closing the connection unless the last item is KEEP.
    """

    KEEP = object()

    def __init__(self, script=lambda request: [], models=("llama3.2:latest",)):
        self.script, self.models = script, models
        self.requests, self.connections = [], set()
        self.digests = {}           # of models, if not their names
        self.told = {}              # more fields of the row of a model in /api/tags
        self.loaded = []            # rows of /api/ps
        self.reads_chunks = False   # else a chunked body is left to the script
        self.tls = None             # the ssl.SSLContext that it speaks TLS with

    async def start(self, port=0, host="127.0.0.1"):
        self.server = await asyncio.start_server(self.converse, host, port, limit=2**26, ssl=self.tls)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self.tls else ''}://{host}:{self.port}"
        return self

    async def stop(self):
        self.server.close()
        for writer in list(self.connections):
            writer.transport.abort()
        await asyncio.sleep(0)

    def own_answer(self, raw):
        path = raw.split(b" ")[1]
        if path == b"/api/version":
            return {"version": "0.33.0"}
        if path == b"/api/tags":
            return {"models": [{"name": name, "size": 2 * 10**9, "digest": self.digests.get(name, name),
                                "modified_at": "2026-01-01T00:00:00Z",
                                **self.told.get(name, {})} for name in self.models]}
        return {"models": self.loaded} if path == b"/api/ps" else None

    async def converse(self, reader, writer):
        self.connections.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
                raw = head + (await reader.readexactly(int(length[1])) if length else b"")
                if self.reads_chunks and b"\r\nTransfer-Encoding: chunked\r\n" in head:
                    while not re.search(rb"\r\n0+\r\n\r\n\Z", raw):
                        raw += await reader.readuntil(b"\r\n")
                own = self.own_answer(raw)
                if own is not None:
                    writer.write(framed(json.dumps(own).encode()))
                    continue
                self.requests.append(raw)
                script = self.script(raw)
                for item in script:
                    if isinstance(item, float):
                        await asyncio.sleep(item)
                    elif isinstance(item, bytes):
                        writer.write(item)
                    elif callable(item):
                        await item(reader, writer)
                if not script or script[-1] is not self.KEEP:
                    break
        self.connections.discard(writer)
        writer.close()


KEEP = ScriptedNode.KEEP


def framed(body, status=b"200 OK", kind=b"application/json"):
    """Return a whole answer with a length."""
    return (b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (status, kind, len(body))) + body


def chunked(*pieces, status=b"200 OK", kind=b"application/x-ndjson", end=b"0\r\n\r\n"):
    """Return a whole chunked answer."""
    return (b"HTTP/1.1 %b\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % (status, kind)
            + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end)


tls_flags = []      # of every gateway below: some of these tests are run over TLS, too


def trusting(certificate):
    """Return what lets a client trust a certificate."""
    return ssl.create_default_context(cafile=certificate)


def spoken(gateway):
    """Return how to connect to a gateway: over TLS if that is what it speaks."""
    certificate = gateway.options.tls_cert
    return {"ssl": trusting(certificate), "server_hostname": "localhost"} if certificate else {}


@contextlib.asynccontextmanager
async def gateway_for(*nodes, flags=(), hosts=None, lines=None, **given):
    """Start nodes and a gateway in front of them; stop all at the end. Nodes may be given not started.

    The gateway knows them by themselves, by the file `hosts`, or by `lines` as in such a file.
    """
    for node in nodes:
        if not getattr(node, "port", 0):
            await node.start()
    named = [f"{node.url} {getattr(node, 'line', '')}" for node in nodes]
    argv = [*(["--hosts", str(hosts)] if hosts else []), "--port", "0", "--no-calibrate", "--seed", "1",
            "--origins", "http://a,http://x", *flags,       # what these tests call the gateway in Host
            *tls_flags]
    options = sollol.parse_options(argv + ([] if hosts else ["--node", "http://127.0.0.1:1"]), {})
    keys = sollol.read_keys(options)
    lines = "\n".join(named) if lines is None else lines
    settings = sollol.read_nodes(options) if hosts else sollol.parse_hosts(lines, "test")
    gateway = await sollol.Gateway(options, settings, keys, sollol.read_certificate(options), **given).start()
    try:
        yield gateway
    finally:
        await gateway.stop()
        for node in nodes:
            await node.stop()


class Caller(bench.HttpClient):
    """One client connection to a gateway."""

    @classmethod
    async def to(cls, gateway):
        return await super().to(*gateway.listener.address, limit=2**26, **spoken(gateway))


async def call(gateway, method, path, value=None, **fields):
    """Make one request on a connection of its own."""
    caller = await Caller.to(gateway)
    try:
        return await caller.ask(method, path, value, **fields)
    finally:
        caller.close()


async def raw_call(gateway, data, eof=False):
    """Send bytes and return all that comes back until the connection closes."""
    caller = await Caller.to(gateway)
    caller.writer.write(data)
    if eof:
        caller.writer.write_eof()
    try:
        return await asyncio.wait_for(caller.reader.read(), 30)
    finally:
        caller.close()


def generate(model="llama3.2", tokens=5, stream=False, **more):
    """Return the body of a /api/generate request."""
    return {"model": model, "prompt": f"say <out={tokens}>", "stream": stream, **more}


def posted(value, path=b"/api/generate"):
    """Return the bytes of a request."""
    body = json.dumps(value).encode()
    return b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)


def health(gateway):
    return json.loads(sollol.answer_health(gateway)[1])


async def one_of_two(tmp_path, **first):
    """Start two nodes; return them and a hosts.txt that names the first, which has the settings `first`."""
    one, two = await bench.SimNode(**(first or FAST)).start(), await bench.SimNode(**FAST).start()
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"{one.url} name=one\n")
    return one, two, hosts


async def until(condition, patience_s=10.0):
    """Wait until a condition holds."""
    deadline_s = asyncio.get_running_loop().time() + patience_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s, "waited in vain"
        await asyncio.sleep(0.01)


FAST = {"speed": 50.0}


# -----------------------------------------------------------------------------
# Upstream and conversation: answers arrive as the node sent them
# -----------------------------------------------------------------------------

NDJSON = (b'{"model":"llama3.2","message":{"role":"assistant","content":"He"},"done":false}\n',
          b'{ "odd" :  "spacing" , "done":false}\n',
          b'{"model":"llama3.2","done":true,"total_duration":5000000,"eval_count":2}\n')
SSE = (b'data: {"choices":[{"delta":{"content":"He"}}]}\n\n', b"data: [DONE]\n\n")


@over_sockets
async def test_front_page_names_the_functions_that_a_streamed_chat_passes_in_their_order():
    front = re.findall(r"^    ([A-Za-z_.]+(?:, [A-Za-z_.]+)?)   ", sollol.__doc__, re.M)
    named, seen = [name for names in front for name in names.split(", ")], {}

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename == sollol.__file__:
            seen.setdefault(getattr(frame.f_code, "co_qualname", frame.f_code.co_name), len(seen))

    async with gateway_for(bench.SimNode(loaded=("llama3.2",))) as gateway:
        sys.setprofile(note)
        try:
            chat = {"model": "llama3.2", "messages": [{"role": "user", "content": "x"}]}
            assert (await call(gateway, "POST", "/api/chat", chat)).status == 200
        finally:
            sys.setprofile(None)
    assert len(named) <= 25 and named == sorted(named, key=seen.__getitem__)


@pytest.mark.parametrize("path, kind, pieces", [
    ("/api/chat", b"application/x-ndjson", NDJSON), ("/v1/chat/completions", b"text/event-stream", SSE)])
@over_sockets
async def test_stream_reaches_the_client_byte_for_byte_and_piece_by_piece(path, kind, pieces):
    def script(request):
        answer = chunked(*pieces, kind=kind)
        head = answer[:answer.index(b"\r\n\r\n") + 4]
        frames = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
        return [head, *[item for frame in frames for item in (frame, 0.05)], b"0\r\n\r\n", KEEP]

    body = b'{"model":"llama3.2", "messages":[{"role":"user","content":"hi"}] , "stream":true}  trailing'
    node = ScriptedNode(script)
    async with gateway_for(node) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (
            path.encode(), len(body), body))
        head = bench.Response(await caller.head())
        assert head.fields["content-type"].encode() == kind
        assert [piece async for piece in caller.chunks()] == list(pieces)
        asked = body.replace(b"{", b"{" + sollol.ASK_USAGE, 1) if path == OPENAI else body
        assert node.requests[0].endswith(b"\r\n\r\n" + asked)
        caller.close()


CRLF = tuple(piece.replace(b"\n", b"\r\n") for piece in SSE)
ZEROED = tuple(b'data: {"choices":[%b],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\n' % it for it in (
    (b'{"text":"He"}', 0, 0), (b'{"text":"","finish_reason":"stop"}', 0, 0), (b"", 3, 0), (b"", 3, 1)))


@table("path, kind, pieces", [
    ("lines", "/api/chat", b"application/x-ndjson", NDJSON),
    ("events", "/v1/chat/completions", b"text/event-stream", SSE),
    ("events with CRLF", "/v1/chat/completions", b"text/event-stream; charset=utf-8", CRLF),
    ("usage on every event", "/v1/completions", b"text/event-stream", (*ZEROED, SSE[1])),
    ("odd spacing", "/v1/completions", b"text/event-stream",
     (b": hello\n\n", b'data:{"choices": [ {"text":"x"}]}\n\n', b"id: 7\ndata: \xe4\n\r\n", b"data:[DONE]\n\n")),
    ("odd shapes", "/v1/completions", b"text/event-stream", (
        b'data: {"type" :["x"],"choices":7,"usage":[1]}\n\n',
        b'event: x\ndata: {"type":"x_delta","delta":[{"text":7}]}\n\n',
        b'event: x\r\ndata: {"type":"x.done","item":{"id":{}},"response":{"output":[[],{"id":7}]}}\r\n\r\n',
        b'data:{"type":"ping","sequence_number":true,"index":{}}\n\n', b"event: x\n\n", b"data: 7\n\n", SSE[1]))])
@pytest.mark.parametrize("seed", [{}, {"seed": 7}], ids=["drawn", "deterministic"])
@over_sockets
async def test_first_run_of_a_stream_passes_as_it_comes_whoever_could_rescue_it(seed, path, kind, pieces):
    head = chunked(kind=kind, end=b"")
    node = ScriptedNode(lambda request: [head, *(it for piece in pieces for it in (
        b"%x\r\n%b\r\n" % (len(piece), piece), 0.03)), b"0\r\n\r\n", KEEP])
    value = {"model": "llama3.2", "prompt": "x", "messages": [], "stream": True, "options": seed, **seed, **USAGE}
    async with gateway_for(node) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.write(posted(value, path.encode()))
        fields = bench.Response(await caller.head()).fields
        assert fields["content-type"].encode() == kind and fields["x-accel-buffering"] == "no"
        assert [piece async for piece in caller.chunks()] == list(pieces)
        caller.close()


ABOUT = b"Date: then\r\nServer: it\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
PACKED, STREAMED = b"\x1f\x8b\x08 not really", b"Content-Type: application/x-ndjson\r\n"


@table("method, raw, fields, body", [
    ("fields of its own", "POST", b"HTTP/1.1 200 OK\r\n%bContent-Length: 2\r\n\r\n{}" % ABOUT,
     b"Content-Length: 2\r\n", b"{}"),
    ("compressed all the same", "POST",
     b"HTTP/1.1 200 OK\r\n%bContent-Encoding: gzip\r\nContent-Length: 16\r\n\r\n%b" % (ABOUT, PACKED),
     b"Content-Encoding: gzip\r\nContent-Length: 16\r\n", PACKED),
    ("origins of its own", "POST", b"HTTP/1.1 200 OK\r\n%bAccess-Control-Allow-Origin: *\r\n"
     b"access-control-allow-credentials: true\r\nContent-Length: 2\r\n\r\n{}" % ABOUT, b"Content-Length: 2\r\n", b"{}"),
    ("HEAD", "HEAD", b"HTTP/1.1 200 OK\r\n%bContent-Length: 17\r\n\r\n" % ABOUT, b"Content-Length: 17\r\n", b""),
    ("HEAD of what would be chunked", "HEAD", b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % ABOUT,
     b"", b""),
    ("204", "POST", b"HTTP/1.1 204 No Content\r\n%b\r\n" % ABOUT, b"", b""),
    ("304 with the length of the other", "GET", b"HTTP/1.1 304 Not Modified\r\n%bContent-Length: 9\r\n\r\n" % ABOUT,
     b"Content-Length: 9\r\n", b""),
    ("extensions and trailers", "POST", b"HTTP/1.1 200 OK\r\n%bTrailer: X\r\nTransfer-Encoding: chunked\r\n\r\n"
     b"2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n" % ABOUT, b"Transfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n"),
    ("HTTP/1.0 until it closes", "POST", b"HTTP/1.0 200 OK\r\n%b\r\n{}" % ABOUT, b"Transfer-Encoding: chunked\r\n",
     b"2\r\n{}\r\n0\r\n\r\n"),
    ("its own word on buffering", "POST", b"HTTP/1.1 200 OK\r\n%b%bx-accel-buffering: yes\r\n"
     b"Content-Length: 3\r\n\r\n{}\n" % (ABOUT, STREAMED),
     STREAMED + b"x-accel-buffering: yes\r\nContent-Length: 3\r\n", b"{}\n"),
])
@over_sockets
async def test_answer_keeps_all_but_what_is_of_one_connection_or_the_gateways_to_say(method, raw, fields, body):
    async with gateway_for(ScriptedNode(lambda request: [raw, 0.02])) as gateway:
        got = await raw_call(gateway, b"%b /v1/models/llama3.2 HTTP/1.1\r\nHost: localhost\r\n"
                             b"Connection: close\r\n\r\n" % method.encode())
        head, _, rest = got.partition(b"\r\n\r\n")
        head = re.sub(rb"\r\n(X-SOLLOL|X-Request|Connection)[^\r]*", b"", head)
        first = raw.partition(b"\r\n")[0].replace(b"HTTP/1.0", b"HTTP/1.1")
        assert head + b"\r\n" == first + b"\r\n" + ABOUT + fields and rest == body


@over_sockets
async def test_every_stream_tells_a_proxy_not_to_hold_it_back():
    async with surface() as gateway:
        brief = {"model": "llama3.2", "messages": MESSAGES, "max_tokens": 3, "stream": True}
        for path, value in (("/api/chat", {"model": "llama3.2", "messages": MESSAGES}), ("/v1/messages", brief),
                            ("/api/generate", {"model": "llama3.2", "prompt": "x", "options": {"seed": 1}}),
                            ("/api/pull", {"model": "mistral"}), ("/api/push", {"model": "mistral"})):
            assert (await call(gateway, "POST", path, value)).head.count(b"X-Accel-Buffering: no\r\n") == 1
            assert b"X-Accel" not in (await call(gateway, "POST", path, {**value, "stream": False})).head
        caller = await Caller.to(gateway)
        caller.writer.write(b"GET /dashboard/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"X-Accel-Buffering: no\r\n" in await caller.head()
        caller.close()


@pytest.mark.parametrize("split", [1, 3, 7, 50])
@over_sockets
async def test_answer_is_whole_however_the_node_cuts_it(split):
    raw = chunked(*NDJSON)
    node = ScriptedNode(lambda request: [
        item for at in range(0, len(raw), split) for item in (raw[at:at + split], 0.001)] + [KEEP])
    async with gateway_for(node) as gateway:
        answer = await call(gateway, "POST", "/api/chat", {"model": "llama3.2", "messages": []})
        assert answer.body == b"".join(NDJSON)


@over_sockets
async def test_response_headers_tell_where_and_why():
    async with gateway_for(ScriptedNode(lambda request: [framed(b"{}"), KEEP])) as gateway:
        answer = await call(gateway, "POST", "/api/generate", generate(), X_Priority="high", X_Request_Id="mine-1")
        assert answer.fields["x-sollol-node"].startswith("127.0.0.1:")
        assert answer.fields["x-sollol-attempts"] == "1"
        assert answer.fields["x-sollol-priority"] == "8"
        assert int(answer.fields["x-sollol-queue-ms"]) < 100
        assert "only choice" in answer.fields["x-sollol-reason"]
        assert answer.fields["x-request-id"] == "mine-1"


@over_sockets
async def test_keep_alive_pipelining_and_http_1_0():
    async with gateway_for(bench.SimNode(**FAST)) as gateway:
        caller = await Caller.to(gateway)
        one = json.dumps(generate()).encode()
        request = b"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(one), one)
        caller.writer.write(request + b"GET /api/health HTTP/1.1\r\nHost: x\r\n\r\n" + request)
        answers = [await caller.answer() for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert answers[1].json()["service"] == "SOLLOL"
        caller.close()
        streamed = json.dumps(generate(stream=True)).encode()
        raw = await raw_call(gateway, b"POST /api/generate HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (
            len(streamed), streamed))
        head, _, body = raw.partition(b"\r\n\r\n")
        assert b"Connection: close" in head and b"chunked" not in head
        assert [json.loads(line)["done"] for line in body.splitlines()][-1] is True
        raw = await raw_call(gateway, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n")
        assert raw.count(b"Ollama is running") == 2


STOLEN = framed(b'{"response":"stolen","done":true}')


@pytest.mark.parametrize("certificate", ["", "one"], ids=["plain", "tls"])
@pytest.mark.parametrize("sent", [STOLEN, STOLEN[:1], None], ids=["an answer", "a byte", "the end"])
@over_sockets
async def test_bytes_that_come_between_two_answers_are_never_the_next_one(sent, certificate, request):
    """They come at the last moment, before the loop could read them; over TLS what counts is that some have come."""
    tries, taken = 1000 if sent == STOLEN else 50, []
    node = ScriptedNode(lambda request: [framed(b'{"response":"own","done":true}'), KEEP])
    if certificate:
        pems = request.getfixturevalue("pems")
        node.tls, node.line = shown(pems, certificate), f"ca={pems / certificate}.pem"
    async with gateway_for(node) as gateway:
        pool, = gateway.node_io.pools.values()
        take = pool.take

        def take_late():
            """Take a connection whose node has said something that no turn of the loop has passed since."""
            for writer in node.connections:
                with (contextlib.suppress(OSError, AttributeError),     # of an earlier try, and closed
                      socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as it):
                    it.send(sent) if sent else it.shutdown(socket.SHUT_WR)
            taken.append(take())
            return taken[-1]

        caller, pool.take = await Caller.to(gateway), take_late
        for number in range(tries):
            answer = await caller.ask("POST", "/api/generate", generate(stream=number % 2 > 0))
            assert (answer.status, answer.json()["response"]) == (200, "own")
        assert len(taken) >= tries and not any(taken)
        caller.close()
        pool.take = take
        assert (await call(gateway, "POST", "/api/generate", generate())).json()["response"] == "own"
        await asyncio.sleep(0.05)
        before = list(pool.idle)
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
        await until(lambda: pool.idle == before and before)     # an untouched connection is used again, over TLS too


@over_sockets
async def test_connection_that_stood_still_for_a_slow_reader_at_the_end_serves_the_next_client():
    node = ScriptedNode(lambda request: [chunked(b"x" * 60_000) if b"/x" in request else OK, KEEP])
    async with gateway_for(node) as gateway:
        pool, = gateway.node_io.pools.values()
        caller = await Caller.to(gateway)
        await until(lambda: gateway.listener.clients)
        caller.writer.transport.pause_reading()
        for transport, option in ((caller.writer.transport, socket.SO_RCVBUF),
                                  (next(iter(gateway.listener.clients)).transport, socket.SO_SNDBUF)):
            with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as it:
                it.setsockopt(socket.SOL_SOCKET, option, 4096)
        caller.writer.write(get(target=b"/x"))
        await until(lambda: node.requests and pool.idle)
        assert (await asyncio.wait_for(call(gateway, "POST", "/api/generate", generate()), 10)).status == 200
        caller.close()


@over_sockets
async def test_h2c_upgrade_offer_is_served_as_1_1_and_not_forwarded():
    node = ScriptedNode(lambda request: [framed(b"{}"), KEEP])
    async with gateway_for(node) as gateway:
        answer = await call(gateway, "POST", "/api/generate", generate(), Upgrade="h2c", HTTP2_Settings="AAMAAABk",
                            Connection="Upgrade, HTTP2-Settings, X-Hop", X_Hop="1", Traceparent="00-1")
        assert answer.status == 200
        assert b"pgrade" not in node.requests[0] and b"X-Hop" not in node.requests[0]
        assert b"Traceparent: 00-1" in node.requests[0]
        assert b"\r\nHost: 127.0.0.1:%d\r\n" % node.port in node.requests[0]


@over_sockets
async def test_chunked_request_body_and_expect_100_continue():
    node = ScriptedNode(lambda request: [framed(b"{}"), KEEP])
    async with gateway_for(node) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.write(b"POST /api/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
                            b"Expect: 100-continue\r\n\r\n")
        assert await caller.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        caller.writer.write(b'5;x=1\r\n{"mod\r\n11\r\nel": "llama3.2" }\r\n0\r\nTrailer: x\r\n\r\n')
        assert (await caller.answer()).status == 200
        assert node.requests[0].endswith(b'\r\n\r\n{"model": "llama3.2" }')
        assert b"Expect" not in node.requests[0] and b"Trailer" not in node.requests[0]
        caller.close()


@over_sockets
async def test_head_of_up_to_64_kib_is_read_like_a_short_one():
    node = ScriptedNode(lambda request: [framed(b"{}"), KEEP])
    async with gateway_for(node) as gateway:
        for size in (1, 31 * 1024, 33 * 1024, 63 * 1024):
            node.requests.clear()
            raw = await raw_call(gateway, get(b"Cookie: " + b"x" * size, b"Connection: close", target=b"/x"))
            assert raw.startswith(b"HTTP/1.1 200 ") and b"x" * size in node.requests[0], size


HOSTILE = [
    b"GET / HTTP/1.1\nHost: x\n\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
    b"POST /unknown HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
    b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n", b"\n\n\n",
    b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 20_000),
    b"GET / HTTP/1.1\r\nHost: x\r\nA: %b\r\n\r\n" % (b"a" * 70_000), b"A" * 70_000,
    b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST /api/generate HTTP/1.1\r\nHost: x\r\nX-Priority: 11\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
]


@over_sockets
async def test_malformed_input_gets_a_4xx_a_closed_connection_and_reaches_no_node(caplog):
    sollol.LOG.propagate = True
    node = ScriptedNode(lambda request: [framed(b"{}"), KEEP])
    async with gateway_for(node) as gateway:
        for data in HOSTILE:
            raw = await raw_call(gateway, data)
            assert re.match(rb"HTTP/1.1 4\d\d ", raw), (data[:80], raw[:200])
        assert health(gateway)["inflight"] == 0
    for raw in node.requests:       # the one whose body turned out malformed on its way
        assert raw.startswith(b"POST /unknown ")
    assert not [record for record in caplog.records if record.exc_info]


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED_POST = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

# Refused, whatever stands behind it: (bytes, status; None: any 4xx).
HOSTILE_RAW = [
    *((raw, 400) for raw in REFUSED), *((raw, status) for _, raw, status in TOO_LONG),
    *((CHUNKED_POST % path + data, 400) for data in BAD_CHUNKS for path in (b"/api/chat", b"/api/blobs/a", b"/x")),
    *((raw, None) for raw in HOSTILE),
]

# What is odd and yet can be read in one way only: (name, bytes, statuses of the answers, bytes that a node sees).
ODD = [
    ("request in a body", post(b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED, [200], SMUGGLED),
    ("request in a chunk", CHUNKED_POST % b"/api/chat" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED), [200],
     b"Content-Length: %d\r\n" % len(SMUGGLED)),
    ("length that Connection names", post(b"Connection: Content-Length, Host", b"Content-Length: 2") + b"{}", [200],
     b"Content-Length: 2\r\n"),
    ("coding that Connection names", head(b"POST /x HTTP/1.1", b"Host: a", b"Connection: transfer-encoding",
                                          b"Transfer-Encoding: chunked") + b"0\r\n\r\n", [200], b"POST /x "),
    ("length with an underscore", post(b"Content_Length: 2") + get(target=b"/y"), [200, 200], b"GET /y "),
    ("length with zeros", post(b"Content-Length: 0002") + b"{}", [200], b"Content-Length: 2\r\n"),
    ("length in a trailer", CHUNKED_POST % b"/api/chat" + b"2\r\n{}\r\n0\r\nContent-Length: 99\r\n\r\n", [200],
     b"Content-Length: 2\r\n"),
    ("chunk extensions", CHUNKED_POST % b"/api/chat" + b"2;a=\"b\"\r\n{}\r\n0;x\r\n\r\n", [200], b"\r\n\r\n{}"),
    ("chunk size with zeros", CHUNKED_POST % b"/api/chat" + b"0002\r\n{}\r\n000\r\n\r\n", [200], b"\r\n\r\n{}"),
    ("another authority", get(target=b"http://evil/x"), [200], b"GET /x "),
    ("line ends in the query", get(target=b"/x?%0d%0aHost:%20evil"), [200], b"GET /x?%0d%0aHost:%20evil "),
    ("dots in a name", get(target=b"/x/...../..y"), [200], b"GET /x/...../..y "),
    ("websocket", get(b"Connection: Upgrade", b"Upgrade: websocket", target=b"/x"), [200], b"GET /x "),
    ("proxy's own fields", get(b"Proxy-Connection: close", b"Proxy-Authorization: x", target=b"/x"), [200], b"GET /x "),
    ("pipelined", get(target=b"/x") * 3, [200] * 3, b"GET /x "),
    ("body on GET", get(b"Content-Length: 5", target=b"/x") + b"hello", [200], b"GET /x "),
]


def sound(raw, node):
    """Tell whether what a node got is one request that can be read in one way only."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")[1:]
    names = [line.partition(b":")[0].lower() for line in lines]
    lengths = [line.partition(b":")[2].strip() for line in lines if line.lower().startswith(b"content-length:")]
    return (not re.search(rb"[\r\n\x00]", head.replace(b"\r\n", b"")) and names.count(b"host") == 1
            and b"Host: 127.0.0.1:%d" % node.port in lines and b"connection" not in names and b"upgrade" not in names
            and names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
            and all(re.fullmatch(rb"0|[1-9][0-9]*", length) and int(length) == len(body) for length in lengths)
            and all(re.fullmatch(rb"[!#-'*+.^_`|~0-9a-z-]+", name) for name in names))


@over_sockets
async def test_hostile_input_gets_its_refusal_and_nothing_of_it_reaches_a_node_in_an_ambiguous_form(caplog):
    sollol.LOG.propagate = True
    assert len(HOSTILE_RAW) > 100
    node = ScriptedNode(lambda request: [framed(b"{}"), KEEP])
    async with gateway_for(node) as gateway:
        for data, status in HOSTILE_RAW:
            raw = await raw_call(gateway, data + SMUGGLED)
            assert re.match(b"HTTP/1.1 %b " % (b"%d" % status if status else b"4.."), raw), (data[:80], raw[:200])
            assert raw.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in raw, (data[:80], raw[:300])
        assert health(gateway)["inflight"] == 0
        for raw in node.requests:   # only what goes up while it comes; behind its head is nothing but whole chunks
            assert raw.startswith((b"POST /x ", b"POST /api/blobs/a ", b"POST /unknown ")), raw
        assert all(sound(raw, node) for raw in node.requests)
    assert not [record for record in caplog.records if record.exc_info]


@table("raw, statuses, seen", ODD)
@over_sockets
async def test_odd_input_reaches_a_node_in_one_clear_form(raw, statuses, seen):
    node = ScriptedNode(lambda request: [framed(b"{}"), KEEP])
    async with gateway_for(node) as gateway:
        answers = await raw_call(gateway, raw + b"BREAK\r\n\r\n")
        assert [int(it) for it in re.findall(rb"HTTP/1.1 (\d+)", answers)] == [*statuses, 400]
        assert len(node.requests) >= 1 and all(sound(it, node) for it in node.requests), node.requests
        assert any(seen in it for it in node.requests), node.requests


def no_traceback(caplog, data):
    """Fail, and show the bytes, if something was raised that nobody expected."""
    assert not [it for it in caplog.records if it.exc_info or it.levelname == "CRITICAL"], data


def test_mutated_requests_harm_neither_gateway_nor_node_nor_the_next_request(caplog):
    """Virtual time: what waits for more bytes is given a second, then the end of them."""
    rng = random.Random(4)
    seeds = [posted(generate(stream=False)), posted(generate(stream=True), b"/api/chat"), get(target=b"/api/tags"),
             CHUNKED_POST % b"/api/chat" + b'10;a=b\r\n{"model":"llama"\r\n1\r\n}\r\n0\r\nX: y\r\n\r\n',
             CHUNKED_POST % b"/api/blobs/a" + b"5\r\nhello\r\n0\r\n\r\n", get(b"Expect: 100-continue", target=b"/x"),
             head(b"DELETE /api/delete HTTP/1.0", b"Connection: keep-alive", b"Content-Length: 2") + b"{}",
             post(b"Content-Length: 2") + b"{}" + get(target=b"/x")]

    async def try_it(gateway, node, data):
        caller = await Caller.to(gateway)
        caller.writer.write(data)
        got = b""
        with contextlib.suppress(ConnectionError):
            try:
                got = await asyncio.wait_for(caller.reader.read(2**20), 1)
                caller.writer.write_eof()
                got += await asyncio.wait_for(caller.reader.read(), 10)
            except TimeoutError:
                caller.writer.write_eof()
                got += await asyncio.wait_for(caller.reader.read(), 10)
        caller.close()
        assert not got or got.startswith(b"HTTP/1.1 "), (data, got)
        for raw in node.requests:
            assert sound(raw, node), (data, raw)
        node.requests.clear()
        no_traceback(caplog, data)

    async def main():
        node = ScriptedNode(lambda request: [framed(b'{"done":true}'), KEEP])
        node.reads_chunks = True
        async with gateway_for(node) as gateway:
            for number in range(2000 * FUZZ):
                await try_it(gateway, node, mutated(rng, rng.choice(seeds)))
                if number % 100 == 0:
                    assert (await call(gateway, "POST", "/api/generate", generate())).body == b'{"done":true}'
            await asyncio.sleep(5)
            assert health(gateway)["inflight"] == health(gateway)["queued"] == 0 and not gateway.listener.clients

    sollol.LOG.propagate = True
    bench.run_virtual(main())


def test_mutated_answers_become_whole_answers_errors_or_cuts_and_spoil_no_later_one(caplog):
    """A node that sends nonsense beside a good one; whatever it says, the next request is answered rightly."""
    rng = random.Random(5)
    seeds = [GOOD[True], GOOD[False], framed(b"{}", b"503 Busy"), framed(b'{"error":"no"}', b"404 Not Found"),
             b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD[False], b"HTTP/1.0 200 OK\r\n\r\n" + TOKENS[0] + STREAM_END,
             chunked(*SSE, kind=b"text/event-stream")]

    async def try_it(gateway, bad, value):
        caller = await Caller.to(gateway)
        try:
            answer = await asyncio.wait_for(caller.ask("POST", "/api/generate", value), 1)
            assert 200 <= answer.status < 600, bad.now
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            answer = None           # cut, or waiting for the rest of what was announced
        caller.close()
        for node in gateway.dispatcher.cluster.nodes.values():
            node.breaker.succeed()
            for runner in node.runners.values():
                runner.breaker.succeed()
        no_traceback(caplog, bad.now)
        return answer

    async def main():
        bad = ScriptedNode(lambda request: [bad.now, KEEP] if rng.random() < 0.5 else [bad.now])
        good = ScriptedNode(lambda request: [framed(WHOLE), KEEP])
        async with gateway_for(bad, good, flags=["--policy", "round-robin", "--probe-interval", "3600"]) as gateway:
            row = gateway.dispatcher.cluster.nodes[f"127.0.0.1:{bad.port}"].rows["llama3.2:latest"]
            for number in range(1500 * FUZZ):
                bad.now = mutated(rng, rng.choice(seeds))
                await try_it(gateway, bad, generate(stream=number % 3 == 0, options={"seed": number % 2 - 1}))
                known = gateway.dispatcher.cluster.nodes[f"127.0.0.1:{bad.port}"]
                known.rows.setdefault("llama3.2:latest", row)       # a 404 has cost it its place in the index
                gateway.dispatcher.cluster.reindex()
                if number % 50 == 0:
                    bad.now = framed(WHOLE)
                    for _ in range(2):
                        answer = await try_it(gateway, bad, generate())
                        assert answer and answer.body == WHOLE
            assert len(bad.requests) > 600 * FUZZ
            await until(lambda: health(gateway)["inflight"] == 0 and not gateway.listener.clients)

    sollol.LOG.propagate = True
    bench.run_virtual(main())


@over_sockets
async def test_slow_head_gets_408_but_a_slow_model_is_waited_for():
    node = bench.SimNode(speed=1.5)
    async with gateway_for(node, flags=["--header-timeout", "1"]) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.write(b"GET / HTTP/1.1\r\nHo")
        slow = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=10)))
        assert (await caller.answer()).status == 408
        assert await caller.reader.read() == b""
        caller.close()
        assert (await slow).json()["eval_count"] == 10


@over_sockets
async def test_many_interim_answers_do_not_stop_the_final_one_and_a_switch_of_protocols_does():
    early = b"HTTP/1.1 103 Early Hints\r\nLink: " + b"x" * 40_000 + b"\r\n\r\n"
    for interim, status in ((early * 10, 200), (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 502),
                            (early * 20, 502)):
        node = ScriptedNode(lambda request, interim=interim: [interim, OK, KEEP])
        async with gateway_for(node) as gateway:
            assert (await call(gateway, "POST", "/api/generate", generate())).status == status


@over_sockets
async def test_part_of_a_chunk_head_is_no_first_byte():
    cut = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n5"
    nodes = [ScriptedNode(lambda request: [cut, 0.02]), ScriptedNode(lambda request: [OK, KEEP])]
    async with gateway_for(*nodes, flags=["--policy", "round-robin"]) as gateway:
        answer = await call(gateway, "POST", "/api/generate", generate(stream=True))
        assert answer.body == b'{"response":"fine","done":true}'


# -----------------------------------------------------------------------------
# Access: keys
# -----------------------------------------------------------------------------

KEYS = """\
# who may ask
alice-secret  name=alice
bob-secret    name=bob  priority=high max-priority=8 rate=2/min   # two in a burst, then one in 30 s
carol-secret  name=carol concurrency=1 max-priority=3
root-secret   name=root admin=yes
"""


@contextlib.asynccontextmanager
async def guarded(folder, *nodes, keys=KEYS):
    """Run a gateway that wants keys; yield it. Its keys file is `folder`/keys."""
    (folder / "keys").write_text(keys)
    (folder / "keys").chmod(0o600)
    async with gateway_for(*nodes, flags=["--keys", str(folder / "keys")]) as gateway:
        yield gateway


def bearer(name):
    return {"Authorization": f"Bearer {name}-secret"}


def test_keys_file_is_read():
    keys = {key.name: key for key in sollol.parse_keys(KEYS, "keys")}
    assert [(key.priority, key.max_priority, key.rate[0], key.concurrency, key.admin) for key in keys.values()] == [
        (5, 10, 0, 0, False), (8, 8, 2, 0, False), (3, 3, 0, 1, False), (5, 10, 0, 0, True)]
    assert "secret" not in repr(keys)


@pytest.mark.parametrize("line, complaint", [
    ("abc-secret", "name= is missing"), ("abc-secret name=x rate=60", "rate must be a number of requests"),
    ("abc-secret name=x rate=0/min", "rate must be"), ("abc-secret name=x priority=11", "priority must be 1 to 10"),
    ("abc-secret name=x priority=9 max-priority=8", "must not be over"), ("abc-secret name=x admin=1", "admin must be"),
    ("abc-secret name=x share=0", "share must be"), ("abc-secret name=x share=101", "share must be"),
    ("abc-secret name=x proxy=maybe", "proxy must be"),
    ("abc-secret name=x concurrency=0", "concurrency must be"), ("abc-secret name=x colour=red", "none of name"),
    ("abc-secret name=x models=", "models must be names"), ("abc-secret name=x models=a,,b", "models must be names"),
    ("abc-secret name=x models=a, b", "models must be names"),
    ("abc-secret name=x models=a[1-3]", "models must be names"),
    ("abc-secret name=x models=a,library/*", "'library/*' would be every model"),
    ("abc-secret name=x models=Registry.ollama.ai/Library/*", "would be every model"),
    ("abc-secret name=x routes=write", "routes must be inference, read or all"),
    ("abc-secret name=x tokens=2M", "tokens must be a number of tokens"),
    ("abc-secret name=x tokens=0/d", "tokens must be"), ("abc-secret name=x tokens=1.5M/d", "tokens must be"),
    ("abc-secret name=x tokens=2T/d", "tokens must be"), ("abc-secret name=x tokens=2M/week", "tokens must be"),
    ("abc-secret name=x tokens=-1/d", "tokens must be"), ("abc-secret name=x budget=2M/d", "none of name"),
    ("name=x abc-secret", "none of name"), ("abc-secret name=alice", "two keys named 'alice'"),
    ("alice-secret name=x", "the key of 'alice', too"), ("\u00e4-secret name=x", "printable ASCII")])
def test_mistake_in_the_keys_file_is_told_by_its_line_without_the_key(line, complaint):
    with pytest.raises(sollol.ConfigError) as caught:
        sollol.parse_keys("alice-secret name=alice\n" + line, "keys")
    assert str(caught.value).startswith("keys:2: ") and complaint in str(caught.value)
    assert "secret" not in str(caught.value)


def test_keys_in_the_readme_are_valid():
    lines = re.findall(r"^    ([^ /]+ +name=.*)$", (HERE / "README.md").read_text(), re.M)
    assert [key.name for key in sollol.parse_keys("\n".join(lines), "README.md")] == [
        "alice", "batch", "ops", "school", "monitor"]


def test_hosts_file_and_its_examples_are_valid():
    text = (HERE / "hosts.txt").read_text()
    assert [node.url for node in sollol.parse_hosts(text, "hosts.txt")] == ["http://localhost:11434"]
    text = "\n".join(re.findall(r"^#   (https?://.*)$", text, re.M))
    with pytest.raises(sollol.ConfigError, match="hosts.txt:2: .*far.pem: No such file"):
        sollol.parse_hosts(text, "hosts.txt")
    nodes = sollol.parse_hosts(text.replace("ca=far.pem", ""), "hosts.txt")
    assert [(node.slots, node.resolve, node.drain) for node in nodes] == [
        (4, False, False), (0, False, False), (0, True, False), (0, False, True), (0, False, False), (0, False, False)]
    assert nodes[4].load == ("llama3.2:latest", "qwen3:14b") and nodes[5].mac and nodes[5].probe_s == 60.0


def test_empty_keys_file_lets_nobody_in_by_mistake():
    with pytest.raises(sollol.ConfigError, match="there is no key in it"):
        sollol.parse_keys("# nothing\n", "keys")


WEBUI = {"X_OpenWebUI_User_Name": "J%C3%B6rg M%C3%BCller", "X_OpenWebUI_User_Id": "4f1c-9e",
         "X_OpenWebUI_User_Email": "joerg@example.org", "X_OpenWebUI_User_Role": "user", "X_OpenWebUI_Chat_Id": "77"}
CLAUDE_USER = json.dumps({"device_id": "d-1", "account_uuid": "", "session_id": "s-9"})


@table("keys, trusted, fields, body, person, user", [
    ("an address", "", "", {}, {}, "127.0.0.1", ""),
    ("nobody may tell", "", "", {**WEBUI, "X_Forwarded_For": "1.2.3.4"}, {"user": "bob"}, "127.0.0.1", ""),
    ("a front end's user", "", "127.0.0.1", WEBUI, {"user": "bob"}, "joerg@example.org",
     "joerg@example.org"),
    ("by number", "", "127.0.0.0/8", {"X_OpenWebUI_User_Id": "4f1c-9e", "X_OpenWebUI_User_Name": "Ada"}, {}, "4f1c-9e",
     "4f1c-9e"),
    ("by name, encoded", "", "127.0.0.1", {"X_OpenWebUI_User_Name": WEBUI["X_OpenWebUI_User_Name"]}, {},
     "J\xf6rg M\xfcller", "J\xf6rg M\xfcller"),
    ("another front end's", "", "::1,127.0.0.1", {"X_User_Id": "carl"}, {}, "carl", "carl"),
    ("OpenAI's field", "", "127.0.0.1", {}, {"user": "bob"}, "bob", "bob"),
    ("Anthropic's field", "", "127.0.0.1", {}, {"metadata": {"user_id": "user_1_account_2_session_3"}},
     "user_1_account_2", "user_1_account_2"),
    ("Claude Code's", "", "127.0.0.1", {}, {"metadata": {"user_id": CLAUDE_USER}}, "d-1", "d-1"),
    ("no text", "", "127.0.0.1", {}, {"user": 5, "metadata": [1]}, "127.0.0.1", ""),
    ("half a character, and no JSON", "", "127.0.0.1", {}, {"user": "{b\ud800"}, "{b", "{b"),
    ("the address behind", "", "127.0.0.1", {"X_Forwarded_For": "6.6.6.6, 9.8.7.6:4711"}, {}, "9.8.7.6", "9.8.7.6"),
    ("behind two proxies", "", "127.0.0.1,10.0.0.0/8", {"X_Forwarded_For": "6.6.6.6, 9.8.7.6, 10.1.1.1"}, {}, "9.8.7.6",
     "9.8.7.6"),
    ("RFC 7239", "", "127.0.0.1", {"Forwarded": 'for=6.6.6.6;proto=http, For="[2001:db8::1]:80";by=x'}, {},
     "2001:db8::1", "2001:db8::1"),
    ("hidden", "", "127.0.0.1", {"Forwarded": "for=6.6.6.6, for=_hidden"}, {}, "127.0.0.1", ""),
    ("a key that may not tell", "alice", "", {**WEBUI, "X_Forwarded_For": "1.2.3.4"}, {"user": "bob"}, "alice", ""),
    ("a key, whatever its address", "alice", "127.0.0.1", WEBUI, {}, "alice", ""),
    ("a front end's key", "webui", "", WEBUI, {}, "webui/joerg@example.org", "joerg@example.org"),
    ("a front end's key and a field", "webui", "", {}, {"user": "bob"}, "webui/bob", "bob"),
    ("a front end's key alone", "webui", "", {}, {}, "webui", ""),
    ("cleaned and cut", "", "127.0.0.1", {"X_User_Id": "%0a<b>%1b[31m" + "x" * 300}, {}, "<b>[31m" + "x" * 57,
     "<b>[31m" + "x" * 57)])
def test_who_asks_is_the_key_the_user_behind_it_or_the_address(keys, trusted, fields, body, person, user, tmp_path):
    (tmp_path / "keys").write_text("alice-secret name=alice\nwebui-secret name=webui proxy=yes")
    flags = ["--trusted-proxies", trusted, *(["--keys", str(tmp_path / "keys")] if keys else [])]
    options = sollol.parse_options([*flags, "--node", "http://127.0.0.1:1"], {})
    access = sollol.Access(options, sollol.read_keys(options))
    given = {name.replace("_", "-"): value for name, value in {**fields, **(bearer(keys) if keys else {})}.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    head = sollol.parse_request(f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
    verdict = access.check(head, sollol.find_route(head.method, head.path), "127.0.0.1")
    found = verdict.user or verdict.tells_users and sollol.user_in(body) or verdict.behind
    assert (verdict.person(found), found) == (person, user)


@over_sockets
async def test_two_people_behind_one_front_end_share_as_two_and_a_forged_name_changes_nothing(caplog):
    """Sixty requests of one, then one of the other: with names it waits for what runs, without for all sixty."""
    waited_s = {}
    for flags in ([], ["--trusted-proxies", "127.0.0.1"]):
        async with gateway_for(bench.SimNode(slots=1, speed=20), flags=flags) as gateway:
            value = generate(tokens=10, model="llama3.2")
            flood = [asyncio.create_task(call(gateway, "POST", "/api/generate", value, X_OpenWebUI_User_Id="greedy"))
                     for _ in range(60)]
            await until(lambda: health(gateway)["queued"] > 50)
            answer = await call(gateway, "POST", "/api/generate", value, X_OpenWebUI_User_Id="modest")
            waited_s[bool(flags)] = int(answer.fields["x-sollol-queue-ms"]) / 1000
            left = sum(not task.done() for task in flood)
            assert left > 50 if flags else left == 0
            await asyncio.gather(*flood)
    assert waited_s[True] < waited_s[False] / 3        # with names: for the load, and the request that runs


def test_person_with_twice_the_share_is_served_twice_as_often():
    queue = sollol.WaitingRoom()
    for seq in range(12):
        for client, share in (("a", 2.0), ("b", 1.0)):
            queue.enter(f"{client}{seq}", sollol.Demand(want(client=client, share=share), 1.0, 1.0, 0), 1.0, 0.0)
    first = "".join(it.id[0] for it in queue.in_order())[:12]
    assert first.count("a") == 8 and first.count("b") == 4


@table("text, budget", [
    ("plain", "500/s", (500, 1.0)), ("thousands", "20K/min", (20_000, 60.0)), ("millions", "2m/H", (2_000_000, 3600.0)),
    ("a day", "1G/d", (1_000_000_000, sollol.CALENDAR_DAY))])
def test_budget_is_read(text, budget):
    assert sollol.parse_keys(f"x-secret name=x tokens={text}", "keys")[0].budget == budget


def test_models_of_a_key_are_read():
    def models(text):
        return sollol.parse_keys(f"x-secret name=x models={text}", "keys")[0].models

    some = models("QWEN3:*,Llama3.2,hf.co/Me/X:Q4_K_M,registry.ollama.ai/library/phi4,me/*")
    assert some.names == {"llama3.2:latest", "hf.co/me/x:q4_k_m", "phi4:latest"}
    assert some.patterns == ("me/*", "qwen3:*")
    assert models("llama3.2,*") is sollol.EVERY_MODEL and some == models(
        "me/*,qwen3:*,library/llama3.2:latest,phi4,hf.co/me/x:q4_k_m")


def test_rate_is_a_bucket_that_fills_steadily():
    key = sollol.Key(sollol.KeySettings(b"", "x", rate=(2, 60.0)))
    for now in (100.0, 100.0, 130.0):
        key.take(now)
    with pytest.raises(Refusal) as caught:
        key.take(145.0)
    assert (caught.value.status, caught.value.retry_after_s) == (429, pytest.approx(15.0))
    key.take(160.5)
    key.configure(sollol.KeySettings(b"", "x", rate=(2, 60.0)))
    with pytest.raises(Refusal):
        key.take(161.0)


NOON_S = 1_800_014_400.0            # 15 January 2027, 12:00 UTC


def budgeted(text, used=0.0, wall_s=NOON_S):
    """Return a key with a budget of which so many tokens have just been used."""
    key = sollol.Key(sollol.parse_keys(f"x-secret name=x tokens={text}", "keys")[0])
    spend(key, used, wall_s)
    return key


def spend(key, tokens, wall_s):
    key.take(0.0)
    key.give_back(tokens, wall_s - NOON_S, wall_s)


def opens_in_s(key, wall_s):
    """Return the seconds for which a key gets 429."""
    try:
        key.check_budget(wall_s - NOON_S, wall_s)
    except Refusal as refusal:
        assert refusal.status == 429 and "the key x has used up its" in refusal.text
        return refusal.retry_after_s
    return 0.0


@table("text, used, left_s", [
    ("fresh", "100/min", 0, 0.0), ("the last token is left", "100/min", 99, 0.0), ("used up", "100/min", 100, 0.6),
    ("overdrawn", "100/min", 160, 36.6), ("a second", "10/s", 10, 0.1), ("an hour", "3600/h", 3600, 1.0)])
def test_budget_of_seconds_minutes_and_hours_comes_back_steadily(text, used, left_s):
    key = budgeted(text, used)
    assert opens_in_s(key, NOON_S) == pytest.approx(left_s)
    assert not left_s or opens_in_s(key, NOON_S + left_s - 1e-3) > 0.0
    assert opens_in_s(key, NOON_S + left_s + 1e-3) == 0.0


def test_budget_holds_no_more_than_one_period_however_long_it_was_not_used():
    key = budgeted("100/min", 100)
    spend(key, 100, NOON_S + 86_400)
    assert opens_in_s(key, NOON_S + 86_400) == pytest.approx(0.6)


def test_budget_of_a_day_opens_at_local_midnight(monkeypatch):
    for zone, left_s in (("UTC", 12 * 3600), ("Europe/Berlin", 11 * 3600), ("Asia/Kolkata", 6.5 * 3600)):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        try:
            key = budgeted("1K/d", 999)
            assert opens_in_s(key, NOON_S) == 0.0
            spend(key, 5_000, NOON_S)
            assert opens_in_s(key, NOON_S) == left_s and opens_in_s(key, NOON_S + left_s - 0.5) == 0.5
            assert opens_in_s(key, NOON_S + left_s) == 0.0      # what was overdrawn is forgiven
            spend(key, 1_000, NOON_S + left_s)
            assert opens_in_s(key, NOON_S + left_s) == 24 * 3600
        finally:
            monkeypatch.delenv("TZ")
            time.tzset()


@table("zone, day, hours", [
    ("UTC", "UTC", (2027, 3, 28), 24), ("forward", "Europe/Berlin", (2027, 3, 28), 23),
    ("back", "Europe/Berlin", (2027, 10, 31), 25), ("forward at midnight", "America/Asuncion", (2023, 10, 1), 23),
    ("back at midnight", "America/Asuncion", (2023, 3, 25), 25), ("by half an hour", "Australia/Lord_Howe",
                                                                  (2027, 4, 4), 24.5)])
def test_day_ends_at_midnight_where_the_clocks_are_changed_too(zone, day, hours, monkeypatch):
    begin_s = datetime.datetime(*day, tzinfo=zoneinfo.ZoneInfo(zone)).timestamp()
    end_s = begin_s + hours * 3600
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for given in (zoneinfo.ZoneInfo(zone), None):       # None: that of the machine
            for step in range(int(4 * hours)):
                assert sollol.day_end_s(begin_s + 900 * step, given) == end_s
            assert sollol.day_end_s(end_s - 1, given) == end_s < sollol.day_end_s(end_s, given)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_budget_outlives_a_reload_and_a_clock_that_is_set():
    key = budgeted("100/h", 100)
    for text, now, left_s in (("100/h", NOON_S, 36.0), ("200/h", NOON_S, 0.0), ("50/h", NOON_S, 51 * 72.0),
                              ("100/d", NOON_S, 12 * 3600.0)):
        key.configure(sollol.parse_keys(f"x-secret name=x tokens={text}", "keys")[0])
        assert opens_in_s(key, now) == pytest.approx(left_s), text
    assert opens_in_s(key, NOON_S - 3600) == 13 * 3600.0        # back by an hour: it is still the same day
    assert opens_in_s(key, NOON_S - 5 * 86_400) == 0.0          # by days: that is another one
    key = budgeted("100/h", 100)
    assert key.budget.wait_s((100, 3600.0), 0.0, NOON_S + 1e6) == pytest.approx(36.0)   # an hour is timed otherwise


def test_key_without_a_budget_has_no_bound():
    key = sollol.Key(sollol.KeySettings(b"", "x"))
    spend(key, 1e12, NOON_S)
    assert opens_in_s(key, NOON_S) == 0.0


def test_concurrency_and_rate_at_their_edges():
    key = sollol.Key(sollol.KeySettings(b"", "x", rate=(3, 1.0), concurrency=2))
    key.take(0.0)
    key.take(0.0)
    with pytest.raises(Refusal, match="2 requests running"):
        key.take(0.0)
    key.give_back(0.0, 0.0, 0.0)
    key.take(0.0)                   # the one that was refused has used up nothing
    key.give_back(0.0, 0.0, 0.0)
    with pytest.raises(Refusal, match="3 requests in 1 s"):
        key.take(0.333)
    key.take(0.334)


@pytest.mark.parametrize("fields", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"},
                                    {"Authorization": "alice-secret"}, {"X_API_Key": "alice-secre"},
                                    {"Authorization": "Basic %%%"}, {"X_API_Key": ""}])
@over_sockets
async def test_without_a_right_key_there_is_only_what_stays_open(fields, tmp_path):
    node = fixed(1)
    async with guarded(tmp_path, node) as gateway:
        before = len(node.requests)
        for path, shape in (("/api/chat", ("error",)), ("/v1/chat/completions", ("error", "type")),
                            ("/v1/messages", ("error", "type")), ("/api/blobs/sha256:1", ("error",))):
            answer = await call(gateway, "POST", path, {"model": "llama3.2", "messages": MESSAGES}, **fields)
            found = answer.json()
            assert answer.status == 401 and answer.fields["www-authenticate"].startswith("Bearer")
            for part in shape:
                found = found[part]
            assert len(shape) == 1 or found == "authentication_error"
        for path in ("/api/tags", "/api/ps", "/api/stats", "/api/queue", "/metrics", "/no/such"):
            assert (await call(gateway, "GET", path, **fields)).status == 401
        for path in ("/", "/api/version", "/api/health"):
            assert (await call(gateway, "GET", path, **fields)).status == 200
            assert (await call(gateway, "HEAD", path, **fields)).status == 200
            for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "get", "BREW"):
                assert (await call(gateway, method, path, **fields)).status == 401
            for method in ("TRACE", "CONNECT"):
                answer = await call(gateway, method, path, **fields)
                assert answer.status == 405 and "GET" in answer.fields["allow"]
            assert (await call(gateway, "GET", path + "/", **fields)).status == 401 or path == "/"
        assert len(node.requests) == before or {(it.method, it.path) for it in list(node.requests)[before:]} <= {
            ("GET", path) for path in ("/api/version", "/api/tags", "/api/ps")}


@pytest.mark.parametrize("fields", [bearer("alice"), {"Authorization": "bearer  alice-secret"},
                                    {"X_API_Key": "alice-secret"},
                                    {"Authorization": "Basic " + "YW55Ym9keTphbGljZS1zZWNyZXQ="}])
@over_sockets
async def test_key_opens_and_goes_no_further(fields, tmp_path):
    node = ScriptedNode(lambda request: [framed(b'{"done":true}'), KEEP])
    async with guarded(tmp_path, node) as gateway:
        assert (await call(gateway, "POST", "/api/generate", generate(), **fields)).status == 200
        assert b"secret" not in node.requests[-1] and b"YW55" not in node.requests[-1]


@over_sockets
async def test_only_the_field_that_held_the_key_is_taken_away(tmp_path):
    node = ScriptedNode(lambda request: [framed(b'{"done":true}'), KEEP])
    async with guarded(tmp_path, node) as gateway:
        for fields in ({"X_API_Key": "alice-secret", "Authorization": "Bearer for-the-node"},
                       {"X_API_Key": "for-the-node", **bearer("alice")}):
            assert (await call(gateway, "POST", "/api/generate", generate(), **fields)).status == 200
            assert b"for-the-node" in node.requests[-1] and b"secret" not in node.requests[-1]


@over_sockets
async def test_key_has_a_default_and_a_highest_priority(tmp_path):
    async with guarded(tmp_path, fixed(4)) as gateway:
        for name, asked, given in (("alice", {}, "5"), ("bob", {}, "8"), ("bob", {"X_Priority": "10"}, "8"),
                                   ("carol", {"X_Priority": "high"}, "3"), ("carol", {"X_Priority": "1"}, "1")):
            answer = await call(gateway, "POST", "/api/generate", generate(), **bearer(name), **asked)
            assert answer.fields["x-sollol-priority"] == given


@over_sockets
async def test_rate_and_concurrency_of_a_key_are_kept(tmp_path):
    async with guarded(tmp_path, fixed(4)) as gateway:
        async def one(name, tokens=5):
            return await call(gateway, "POST", "/api/generate", generate(tokens=tokens), **bearer(name))

        assert [(await one("bob")).status for _ in range(3)] == [200, 200, 429]
        answer = await one("bob")
        assert answer.status == 429 and 25 <= int(answer.fields["retry-after"]) <= 30
        assert "close" not in answer.fields.get("connection", "")
        assert (await call(gateway, "GET", "/api/tags", **bearer("bob"))).status == 200
        first = asyncio.create_task(one("carol", 50))
        await until(lambda: health(gateway)["inflight"] == 1)
        answer = await one("carol")
        assert answer.status == 429 and answer.fields["retry-after"] == "1" and "carol" in answer.json()["error"]
        assert (await one("alice")).status == 200
        assert (await first).status == 200 and (await one("carol")).status == 200


@over_sockets
async def test_client_that_leaves_gives_its_keys_place_back(tmp_path):
    async with guarded(tmp_path, fixed(1)) as gateway:
        caller = await Caller.to(gateway)
        task = asyncio.create_task(caller.ask("POST", "/api/generate", generate(tokens=500), **bearer("carol")))
        await until(lambda: health(gateway)["inflight"] == 1)
        caller.close()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: health(gateway)["inflight"] == 0)
        assert (await call(gateway, "POST", "/api/generate", generate(), **bearer("carol"))).status == 200


@over_sockets
async def test_who_shares_fairly_and_who_is_logged_is_the_keys_name(tmp_path, caplog):
    caplog.set_level("INFO", "sollol")
    async with guarded(tmp_path, fixed(1)) as gateway:
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50), **bearer(name)))
                 for name in ("alice", "alice", "root")]
        await until(lambda: health(gateway)["queued"] == 2)
        queue = (await call(gateway, "GET", "/api/queue", **bearer("root"))).json()["queue"]
        assert [ticket["client"] for ticket in queue] == ["root", "alice"]
        await asyncio.gather(*tasks)
        await call(gateway, "GET", "/api/tags", Authorization="Bearer mallory-secret")
        await asyncio.sleep(0.2)
    lines = [fields for record in caplog.records if isinstance(record.msg, list) for fields in record.msg]
    assert {(fields["key"], fields["client"]) for fields in lines} >= {("alice", "127.0.0.1"), ("", "127.0.0.1")}
    assert "secret" not in caplog.text


def test_key_is_kept_as_a_digest_that_nobody_can_foresee_and_compared_in_constant_time(monkeypatch):
    compared, compare = [], sollol.hmac.compare_digest
    monkeypatch.setattr(sollol.hmac, "compare_digest", lambda *given: compared.append(given) or compare(*given))
    access = sollol.Access(sollol.parse_options(["--node", "a", "--keys", "k"], {}), sollol.parse_keys(KEYS, "keys"))
    assert access.find_key(b"alice-secret").settings.name == "alice" and len(compared) == 1
    assert [access.find_key(wrong) for wrong in (b"alice-secre", b"", b"\xff" * 70_000)] == [None] * 3
    assert hashlib.blake2b(b"alice-secret").digest() not in access.keys
    assert not any(b"secret" in digest for digest in access.keys)


@over_sockets
async def test_no_key_and_no_token_is_in_a_log_a_page_or_an_error(tmp_path, caplog):
    """Right and wrong ones, in every field, for requests that go well, are refused, and fail."""
    caplog.set_level("DEBUG")
    good, bad = fixed(1), ScriptedNode(lambda request: [framed(b'{"error":"no"}', status=b"500 Oh")], models=["other"])
    bad.line = "token=token-secret"
    async with guarded(tmp_path, good, bad) as gateway:
        seen = []
        for fields in (bearer("alice"), bearer("root"), {"X_API_Key": "bob-secret"}, bearer("wrong"), {},
                       {"Authorization": "Basic bm9ib2R5OnJvb3Qtc2VjcmV0"}, {"X_API_Key": "wrong-secret"}):
            for method, path, value in (
                    ("POST", "/api/generate", generate()), ("POST", "/api/generate", generate("other")),
                    ("POST", "/v1/chat/completions", {"model": "other"}), ("POST", "/v1/messages", {"priority": 99}),
                    ("POST", "/api/nodes/none/drain", None), ("GET", "/no/such", None), ("GET", "/api/tags", None)):
                seen.append(await call(gateway, method, path, value, **fields, X_Forwarded_For="10.0.0.1"))
        assert {200, 401, 403, 404, 429, 500} <= {answer.status for answer in seen}
        for path in ("/api/stats", "/api/queue", "/metrics", "/dashboard"):
            seen.append(await call(gateway, "GET", path, **bearer("root")))
            assert seen[-1].status == 200
        (tmp_path / "keys").write_text(KEYS + "other-secret nme=x")
        gateway.files.reload()
        await asyncio.sleep(0.2)
    texts = [caplog.text, *(str(record.msg) for record in caplog.records), *(f"{it.head}{it.body}" for it in seen)]
    assert b"token-secret" in bad.requests[0] and "reload" in texts[0] + "".join(texts)
    for text in texts:
        assert "-secret" not in text and "Qtc2VjcmV0" not in text


@over_sockets
async def test_where_keys_are_used_only_an_administrators_key_orders_nodes(tmp_path):
    async with guarded(tmp_path, fixed(1)) as gateway:
        path = f"/api/nodes/{next(iter(gateway.dispatcher.cluster.nodes))}/drain"
        for fields in ({"X_Forwarded_For": "10.0.0.1"}, {}):        # also on this machine
            assert (await call(gateway, "POST", path, **fields)).status == 401
            assert (await call(gateway, "POST", path, **fields, **bearer("alice"))).status == 403
            assert health(gateway)["nodes"]["up"] == 1
            assert (await call(gateway, "POST", path, **fields, **bearer("root"))).json()["state"] == "draining"
            again = await call(gateway, "POST", path.replace("drain", "resume"), **bearer("root"))
            assert again.json()["state"] == "up"


UNLOAD = {"model": "llama3.2", "keep_alive": 0}
# What needs a key with admin=yes: (method, path, body).
CHANGING = [
    ("POST", "/api/nodes/a/drain", None), ("POST", "/api/nodes/a/resume", None), ("POST", "/api/nodes/a/load", {}),
    ("POST", "/api/pull", {"model": "mistral"}), ("POST", "/api/push", {"model": "llama3.2"}),
    ("POST", "/api/create", {"model": "x", "from": "llama3.2"}), ("POST", "/api/blobs/sha256:1", b"weights"),
    ("POST", "/api/copy", {"source": "llama3.2", "destination": "x"}), ("DELETE", "/api/delete", {"model": "llama3.2"}),
    ("POST", "/api/me", {}), ("POST", "/api/signout", {}), ("DELETE", "/api/user/keys/abc", None),
    ("POST", "/api/generate", UNLOAD), ("POST", "/api/generate", {**UNLOAD, "keep_alive": "0s", "prompt": ""}),
    ("POST", "/api/chat", {**UNLOAD, "messages": []}), ("POST", "/api/chat", b'{"MODEL":"llama3.2","Keep_Alive":0}'),
    ("POST", "/api/experimental/aliases", {}), ("DELETE", "/api/experimental/aliases", {}), ("PUT", "/api/tags", {}),
    ("DELETE", "//api/delete", {"model": "x"}), ("POST", "/api//pull", {"model": "x"}), ("POST", "//api/pull", {}),
    ("DELETE", "/api/%64elete", {"model": "llama3.2"}), ("POST", "/api%2fpull", {"model": "x"}),
    ("DELETE", "/api/delete/", {"model": "x"}), ("DELETE", "/v1/models/llama3.2", None), ("BREW", "/api/chat", {}),
    ("POST", "http://gw/api/pull", {"model": "x"}),
]
# What any key may: (method, path, body).
USING = [
    ("GET", "/api/tags", None), ("GET", "/api/ps", None), ("POST", "/api/show", {"model": "llama3.2"}),
    ("POST", "/api/generate", generate()), ("POST", "/api/chat", {"model": "llama3.2", "messages": []}),
    ("POST", "/api/generate", generate(keep_alive=0)), ("GET", "/v1/models/llama3.2", None),
    ("POST", "/v1/messages/count_tokens", {"model": "llama3.2"}), ("POST", "/v1/images/generations", {}),
    ("HEAD", "/api/blobs/sha256:1", None), ("POST", "/api/experimental/web_search", {"query": "x"}),
    ("POST", "/api/experimental/web_fetch", {"url": "x"}), ("GET", "/api/experimental/model-recommendations", None),
    ("GET", "/api/stats", None), ("GET", "/dashboard", None), ("GET", "/nowhere", None),
]


@over_sockets
async def test_only_an_administrators_key_changes_models_accounts_and_nodes(tmp_path):
    node = ScriptedNode(lambda request: [framed(b'{"done":true,"done_reason":"unload","status":"success"}'), KEEP])
    node.line, node.reads_chunks = "name=a", True
    async with guarded(tmp_path, node) as gateway:
        for method, path, body in CHANGING:
            for fields in (bearer("alice"), {**bearer("carol"), "Host": "127.0.0.1"}):
                answer = await call(gateway, method, path, body, **fields)
                assert answer.status == 403 and "admin=yes" in str(answer.json()["error"]), (method, path)
        assert not node.requests and not gateway.dispatcher.cluster.nodes["a"].draining
        for method, path, body in CHANGING:
            assert (await call(gateway, method, path, body, **bearer("root"))).status in (200, 404), (method, path)
        for method, path, body in USING:
            assert (await call(gateway, method, path, body, **bearer("alice"))).status in (200, 404), (method, path)


@over_sockets
async def test_without_keys_everybody_changes_models_as_with_plain_ollama():
    node = ScriptedNode(lambda request: [framed(b'{"done":true,"done_reason":"unload","status":"success"}'), KEEP])
    node.line, node.reads_chunks = "name=a", True
    async with gateway_for(node) as gateway:
        for method, path, body in CHANGING:
            status = (await call(gateway, method, path, body, X_Forwarded_For="10.0.0.1")).status
            assert (status == 403) == ("/nodes/" in path), (method, path)


def test_every_route_that_changes_something_is_guarded():
    free = {"/api/generate", "/api/chat", "/api/embed", "/api/embeddings", "/api/show", "/v1/completions",
            "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/messages", "/v1/audio/transcriptions",
            "/v1/messages/count_tokens", "/v1/systemone", "/v1/images/generations", "/v1/images/edits",
            "/api/experimental/web_search", "/api/experimental/web_fetch"}
    assert {path for (method, path), route in sollol.ROUTES.items()
            if method not in ("GET", "HEAD") and not route.guarded} == free
    assert not any(route.guarded for (method, _), route in sollol.ROUTES.items() if method in ("GET", "HEAD"))


OWN_PAGE = {"Origin": "http://gw:8000", "Host": "gw:8000"}


@table("fields, order, change", [
    ("a program", {}, True, True), ("own page", OWN_PAGE, True, True),
    ("own page in a new browser", {**OWN_PAGE, "Sec-Fetch-Site": "same-origin"}, True, True),
    ("own page over TLS", {"Origin": "https://gw:8000", "Host": "gw:8000"}, True, True),
    ("typed by hand", {"Sec-Fetch-Site": "none"}, True, True),
    ("own page without Origin", {"Sec-Fetch-Site": "same-origin"}, True, True),
    ("a link elsewhere", {"Sec-Fetch-Site": "cross-site"}, False, False),
    ("a sister host", {"Sec-Fetch-Site": "same-site"}, False, False),
    ("the same host without TLS", {**OWN_PAGE, "Sec-Fetch-Site": "cross-site"}, False, False),
    ("local page", {"Origin": "http://localhost:3000", "Host": "gw:8000"}, False, True),
    ("local page in a new browser", {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"}, False, True),
    ("app", {"Origin": "app://obsidian.md"}, False, True), ("listed", {"Origin": "https://chat.example"}, False, True),
    ("any", {"Origin": "https://evil.example"}, False, False), ("sandbox", {"Origin": "null"}, False, False),
    ("own name as another port", {"Origin": "http://gw", "Host": "gw:8000"}, False, False)])
def test_web_pages_that_may_change_something(fields, order, change):
    given = {name.lower().encode(): value.encode() for name, value in fields.items()}
    listed = sollol.LOCAL_ORIGINS + ["https://chat.example"]
    assert (sollol.page_may_change(given, ()), sollol.page_may_change(given, listed)) == (order, change)


ALICE, ROOT = (b"Authorization: Bearer %b-secret" % name for name in (b"alice", b"root"))
LISTED, STRANGE = b"Origin: https://chat.example", b"Origin: https://evil.example"


@table("flags, line, fields, address, status, text, client, most", [
    ("on this machine", [], "POST /api/chat", [], "127.0.0.1", 0, "", "127.0.0.1", 10),
    ("from afar", [], "POST /api/chat", [], "10.0.0.1", 0, "", "10.0.0.1", 8),
    ("through a proxy", [], "POST /api/chat", [b"X-Real-IP: 10.0.0.1"], "127.0.0.1", 0, "", "127.0.0.1", 8),
    ("order", [], "POST /api/nodes/a/drain", [], "127.0.0.1", 0, "", "127.0.0.1", 10),
    ("order from afar", [], "POST /api/nodes/a/drain", [], "10.0.0.1", 403, "only this machine", "10.0.0.1", 10),
    ("order by a page", [], "POST /api/nodes/a/drain", [LISTED], "127.0.0.1", 403, "a web page", "127.0.0.1", 10),
    ("change by a listed page", [], "POST /api/pull", [LISTED], "10.0.0.1", 0, "", "10.0.0.1", 8),
    ("strange page", [], "POST /api/chat", [STRANGE], "127.0.0.1", 403, None, "127.0.0.1", 10),
    ("preflight", [], "OPTIONS /api/chat", [LISTED], "127.0.0.1", 204, None, "127.0.0.1", 10),
    ("rebound", [], "GET /", [b"Host: evil.example"], "127.0.0.1", 403, "this Host", "127.0.0.1", 10),
    ("another name", ["--bind", "::"], "GET /", [b"Host: evil.example"], "127.0.0.1", 0, "", "127.0.0.1", 8),
    ("no key", ["--keys", "k"], "POST /api/chat", [], "127.0.0.1", 401, "a key is needed", "127.0.0.1", 10),
    ("no key needed", ["--keys", "k"], "GET /api/health", [], "10.0.0.1", 0, "", "10.0.0.1", 10),
    ("key", ["--keys", "k"], "POST /api/chat", [ALICE], "10.0.0.1", 0, "", "alice", 10),
    ("change by a key", ["--keys", "k"], "POST /api/pull", [ALICE], "10.0.0.1", 403, "alice may not", "alice", 10),
    ("order by an administrator", ["--keys", "k"], "POST /api/nodes/a/drain", [ROOT], "10.0.0.1", 0, "", "root", 10)])
def test_may_this_request_be_made(flags, line, fields, address, status, text, client, most):
    options = sollol.parse_options(["--node", "a", "--origins", "https://chat.example", *flags], {})
    access = sollol.Access(options, sollol.parse_keys(KEYS, "keys") if options.keys else [])
    fields = fields if any(field.startswith(b"Host:") for field in fields) else [b"Host: localhost", *fields]
    parsed = sollol.parse_request(head(line.encode() + b" HTTP/1.1", *fields))
    verdict = access.check(parsed, sollol.find_route(parsed.method, parsed.path), address)
    page_status = status if text is None else 0
    assert (verdict.person(""), verdict.max_priority, verdict.page_status) == (client, most, page_status)
    assert (verdict.refusal is not None) == bool(text) and bool(verdict.cors) == (LISTED in fields)
    if verdict.refusal:
        assert verdict.refusal.status == status and text in verdict.refusal.text
    assert not any(b"secret" in raw for *_, raw in parsed.lines)


@pytest.mark.parametrize("keys", [False, True])
@over_sockets
async def test_pages_that_cors_lets_read_order_nothing_and_only_listed_ones_change_models(keys, tmp_path):
    node = ScriptedNode(lambda request: [framed(b'{"done":true,"done_reason":"unload","status":"success"}'), KEEP])
    node.line, node.reads_chunks = "name=a", True
    (tmp_path / "keys").write_text(KEYS)
    flags = ["--origins", "*,https://chat.example", *(["--keys", str(tmp_path / "keys")] if keys else [])]
    key = bearer("root") if keys else {}
    async with gateway_for(node, flags=flags) as gateway:
        for origin, may_change in (("https://evil.example", False), ("null", False), ("https://chat.example", True),
                                   ("http://localhost:3000", True)):
            assert (await call(gateway, "OPTIONS", "/api/pull", Origin=origin)).status == 204
            assert (await call(gateway, "GET", "/api/tags", Origin=origin, **key)).status == 200
            for method, path, body in CHANGING:
                answer = await call(gateway, method, path, body, Origin=origin, **key)
                refused = "/nodes/" in path or not may_change
                assert (answer.status == 403) == refused, (origin, method, path)
                assert not refused or "access-control-allow-origin" in answer.fields
            for method, path, body in USING:
                assert (await call(gateway, method, path, body, Origin=origin, **key)).status in (200, 404)
        own = {"Host": "localhost:8000", "Origin": "http://localhost:8000", "Sec_Fetch_Site": "same-origin", **key}
        assert (await call(gateway, "POST", "/api/nodes/a/drain", **own)).status == 200


@over_sockets
async def test_without_a_key_only_this_machine_is_more_urgent_than_high(tmp_path):
    async with gateway_for(fixed(4)) as gateway:
        for asked, far, here in ((10, "8", "10"), (9, "8", "9"), (8, "8", "8"), (1, "1", "1")):
            for fields, given in (({"X_Forwarded_For": "10.0.0.1"}, far), ({}, here)):
                answer = await call(gateway, "POST", "/api/generate", generate(), **fields, X_Priority=asked)
                assert (answer.status, answer.fields["x-sollol-priority"]) == (200, given)
                answer = await call(gateway, "POST", "/api/generate", generate(priority=asked), **fields)
                assert (answer.status, answer.fields["x-sollol-priority"]) == (200, given)
        answer = await call(gateway, "POST", "/api/generate", generate(), X_Priority="11", X_Real_IP="10.0.0.1")
        assert answer.status == 400
    async with guarded(tmp_path, fixed(4)) as gateway:
        answer = await call(gateway, "POST", "/api/generate", generate(), X_Priority="critical", **bearer("alice"),
                            X_Forwarded_For="10.0.0.1")
        assert answer.fields["x-sollol-priority"] == "10"


# What a key with models= may use, in some spellings, and what it may not.
PEN_KEYS = """\
pen-secret   name=pen  models=llama3.2,qwen3:*,me/*,hf.co/Me/X:Q4_K_M,big:20b-cloud admin=yes
root-secret  name=root admin=yes
"""
ALLOWED = ["llama3.2", "LLaMa3.2:LATEST", "library/llama3.2", "registry.ollama.ai/library/llama3.2:latest",
           "llama3.2:local", "qwen3:8b", "Qwen3:30B", "me/mine", "ME/Mine:latest", "hf.co/me/x:q4_k_m", "big:20b-cloud",
           "big:20b:cloud"]
HIDDEN = ["secret", "Secret:latest", "library/secret", "secret:local", "llama3.2:1b", "qwen2:8b", "you/mine",
          "you/me/x", "hf.co/me/x:q8_0", "hf.co/me/x", "big:120b-cloud", "secret:cloud", "llama3.2@sha256:12",
          " secret", "", "*", "registry.ollama.ai/you/secret"]


def multipart(model):
    return part(b"file", b"RIFF", b'; filename="a.wav"') + part(b"model", model.encode()) + b"--B--\r\n"


# How a request of each kind names a model.
NAMING = {
    "generate": lambda name: {"model": name, "prompt": "x", "stream": False},
    "chat": lambda name: {"model": name, "messages": MESSAGES, "input": "x", "max_tokens": 9, "stream": False},
    "embed": lambda name: {"model": name, "input": "x", "prompt": "x"},
    "image": lambda name: {"model": name, "prompt": "x"}, "transcribe": multipart,
    **dict.fromkeys(("show", "pull", "push", "delete"), lambda name: {"model": name}),
    "create": lambda name: {"model": name, "from": name}, "copy": lambda name: {"source": name, "destination": name}}
SHOWING = {"/api/stats", "/api/queue", "/metrics", "/dashboard", "/api/tags", "/api/ps", "/v1/models"}
NAMELESS = {"/", "/api/health", "/api/version", "/api/status", "/api/nodes/", "/dashboard/events", "/api/blobs/",
            "/api/usage", "/api/me", "/api/signout", "/api/user/keys/", "/api/experimental/web_search",
            "/api/experimental/web_fetch"}


def form_fields(route):
    return {"Content_Type": FORM.decode()} if route.kind == "transcribe" else {}


def test_every_row_of_the_table_is_tried_with_a_key_that_may_use_some_models_only():
    """By the two tests below; a row that is added has to be found in one of these."""
    for _, path, route in sollol.ROUTE_ROWS:
        told = [route.kind in NAMING, path in SHOWING, path in NAMELESS, path == "/v1/models/", route.blind]
        assert told.count(True) == 1, path
        assert (route.shows is not None) == (path in SHOWING), path


@over_sockets
async def test_key_with_models_gets_exactly_these_on_every_route(tmp_path):
    """The node would answer all of them, and gets those that are allowed only."""
    node = ScriptedNode(lambda request: [framed(b'{"done":true,"status":"success"}'), KEEP], models=["x:latest"])
    node.line = "name=a"
    async with guarded(tmp_path, node, keys=PEN_KEYS) as gateway:
        caller = await Caller.to(gateway)

        async def got(method, path, body, **fields):
            nonlocal caller
            before = len(node.requests)
            answer = await caller.ask(method, path, body, **bearer("pen"), **fields)
            if "close" in answer.fields.get("connection", ""):
                caller.close()
                caller = await Caller.to(gateway)
            assert len(node.requests) - before == (answer.status == 200 and "count" not in path), (method, path, body)
            return answer

        for methods, path, route in sollol.ROUTE_ROWS:
            if path == "/v1/models/":
                for name in ALLOWED:
                    assert (await got("GET", path + name, None)).status == 200, name
                for name in filter(str.strip, HIDDEN):
                    answer = await got("GET", path + name.replace(" ", "%20"), None)
                    assert answer.status == 404 and answer.json()["error"]["type"] == "not_found_error"
            if route.blind:
                assert (await got(methods.split()[0], path, None)).status == 403
            for name in ALLOWED if route.kind in NAMING else ():
                answer = await got(methods, path, NAMING[route.kind](name), **form_fields(route))
                assert answer.status == 200, (path, name)
            for name in HIDDEN if route.kind in NAMING else ():
                answer = await got(methods, path, NAMING[route.kind](name), **form_fields(route))
                assert answer.status == 404, (path, name)
        for method, path in (("GET", "/nowhere"), ("POST", "/v1/new"), ("PUT", "/api/chat"), ("OPTIONS", "/api/chat"),
                             ("HEAD", "/v1/models/secret"), ("DELETE", "/v1/models/llama3.2"), ("POST", "//api/chat"),
                             ("POST", "/api/chat/"), ("GET", "/v1//models/secret")):
            assert (await got(method, path, {"model": "secret"})).status == 403, path
        for first, second, status in (("llama3.2", "qwen3:1b", 200), ("llama3.2", "secret", 404),
                                      ("secret", "qwen3", 404)):
            for path, fields in (("/api/copy", ("source", "destination")), ("/api/create", ("from", "model"))):
                body = dict(zip(fields, (first, second), strict=True))
                assert (await got("POST", path, body)).status == status, (path, body)
        caller.close()


@over_sockets
async def test_key_with_models_is_told_nothing_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(sollol, "COSTLY_S", -1.0)       # so that answers are kept for a while
    node = bench.SimNode(models=("llama3.2", "secret:7b"), slots=1, loaded=("secret:7b", "llama3.2"))
    node.line = "name=a slots=1"
    async with guarded(tmp_path, node, keys=PEN_KEYS) as gateway:
        def ask(name, key="root", tokens=5):
            return call(gateway, "POST", "/api/generate", generate(name, tokens=tokens), **bearer(key))

        assert [(await ask(name)).status for name in ("secret:7b", "llama3.2")] == [200, 200]
        gateway.dispatcher.cluster.nodes["a"].note_error("secret:7b is broken", 500, "model", gateway.loop.time())
        for path in ("/", "/api/health", "/api/version", "/api/status"):
            assert b"secret" not in (await call(gateway, "GET", path, **bearer("pen"))).body
        tasks = [asyncio.create_task(ask(name, tokens=400)) for name in ("secret:7b", "llama3.2") * 2]
        await until(lambda: health(gateway)["queued"] == 2)
        for path in (*SHOWING, "/dashboard/events"):
            for name, hides in (("pen", True), ("root", False), ("pen", True)):
                if path == "/dashboard/events":
                    caller = await Caller.to(gateway)
                    caller.writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {name}-secret\r\n\r\n".encode())
                    text = (await caller.reader.readuntil(b"}\n\n")).replace(b"name-secret", b"")
                    caller.close()
                else:
                    text = (await call(gateway, "GET", path, **bearer(name))).body
                assert (b"secret:7b" in text) != hides and b"llama3.2" in text, (path, name)
        order = await call(gateway, "POST", "/api/nodes/a/resume", **bearer("pen"))
        assert order.status == 200 and b"secret" not in order.body and b"llama3.2" in order.body
        queue = (await call(gateway, "GET", "/api/queue", **bearer("pen"))).json()["queue"]
        assert [row["model"] for row in queue] == ["llama3.2:latest"] and queue[0]["position"] in (1, 2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@over_sockets
async def test_only_who_may_order_nodes_is_told_so_and_models_of_others_are_not_loaded(tmp_path):
    node = bench.SimNode(models=("llama3.2", "secret"), **FAST)
    node.line = "name=a"
    keys = PEN_KEYS + "plain-secret name=plain\nreader-secret name=reader admin=yes routes=read\n"
    async with guarded(tmp_path, node, keys=keys) as gateway:
        may = {name: "orders" in (await events(gateway, 1, f"{name}-secret"))[0]
               for name in ("pen", "root", "plain", "reader")}
        assert may == {"pen": True, "root": True, "plain": False, "reader": False}
        for name, status in (("pen", 404), ("plain", 403), ("reader", 403), ("root", 200)):
            answer = await call(gateway, "POST", "/api/nodes/a/load?model=secret", **bearer(name))
            assert answer.status == status, name
        await until(lambda: not gateway.node_io.jobs)


@over_sockets
async def test_words_of_a_node_are_shown_only_to_who_sees_every_model(tmp_path):
    node = bench.SimNode(models=("llama3.2", "secret"), **FAST)
    node.line = "name=a"
    async with guarded(tmp_path, node, keys=PEN_KEYS) as gateway:
        node.fail(500, text="no room beside secret:7b")
        for _ in range(3):
            await call(gateway, "POST", "/api/generate", generate(), **bearer("root"))
        for name, hides in (("pen", True), ("root", False)):
            seen = (await events(gateway, 1, f"{name}-secret"))[0]
            assert seen["headline"]["text"].startswith("The only node cannot serve: a fails every request: ")
            assert ("secret" in json.dumps(seen)) != hides and seen["failures"][0]["status"] == 500
        assert (await events(gateway, 1, "pen-secret"))[0]["nodes"][0]["why"] == "status 500"


@over_sockets
async def test_page_from_afar_or_of_another_origin_gets_no_buttons():
    async with gateway_for(fixed(1)) as gateway:
        for fields, may in (({}, True), ({"Sec-Fetch-Site": "same-origin"}, True),
                            ({"X-Forwarded-For": "10.0.0.1"}, False), ({"Sec-Fetch-Site": "cross-site"}, False),
                            ({"Origin": "http://a"}, False)):
            caller = await Caller.to(gateway)
            lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            caller.writer.write(f"GET /dashboard/events HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
            text = await caller.reader.readuntil(b"}\n\n")
            caller.close()
            assert (b'"orders":true' in text) == may, fields


@over_sockets
async def test_model_that_a_key_may_not_use_is_refused_as_one_that_is_not_there(tmp_path):
    node = bench.SimNode(models=("llama3.2", "secret"), **FAST)
    async with guarded(tmp_path, node, keys=PEN_KEYS) as gateway:
        for methods, path, route in sollol.ROUTE_ROWS:
            if route.kind not in NAMING or route.kind in ("pull", "push", "create") or "count" in path:
                continue            # in the middle of a stream, or never
            for name, other in (("secret", "nobody"), ("Secret:8B", "Nobody:8B"), ("you/Secret", "you/Nobody")):
                ask = functools.partial(call, gateway, methods, path, **form_fields(route))
                hidden = await ask(NAMING[route.kind](name), **bearer("pen"))
                missing = await ask(NAMING[route.kind](other), **bearer("root"))
                said = json.loads(missing.body.replace(b"nobody", b"secret").replace(b"Nobody", b"Secret"))
                said.pop("request_id", None)
                assert (hidden.status, missing.status, hidden.json()) == (404, 404, said), path
        for path in ("/v1/messages/count_tokens", "/v1/messages"):
            answer = await call(gateway, "POST", path, NAMING["chat"]("secret"), **bearer("pen"))
            assert answer.json() == {"type": "error", "error": {"type": "not_found_error",
                                                                "message": "model 'secret' not found"}}
        for path, body in (("/api/pull", {"model": "secret"}), ("/api/push", {"name": "secret"}),
                           ("/api/create", {"model": "me/x", "from": "secret"})):
            assert (await call(gateway, "POST", path, body, **bearer("pen"))).status == 404
        answer = await call(gateway, "GET", "/v1/models/Secret", **bearer("pen"))
        assert answer.json() == (await call(gateway, "GET", "/v1/models/Nobody", **bearer("root"))).json() | {
            "error": answer.json()["error"]} and answer.json()["error"]["message"] == "model 'Secret:latest' not found"


@over_sockets
async def test_body_that_cannot_be_read_is_for_keys_that_may_use_every_model(tmp_path):
    node = ScriptedNode(lambda request: [framed(b'{"done":true}'), KEEP])
    async with guarded(tmp_path, node, keys=PEN_KEYS) as gateway:
        for body in (gzip.compress(b'{"model":"llama3.2"}'), b"(\xb5/\xfd\x00", b"", b'{"model":["llama3.2"]}', b"[1]",
                     b'{"model":"llama3.2"' + b" " * 40_000, b'{"model":"llama3.2",' + b'"x":1,' * 40_000 + b'"y":2}'):
            for path, kind in (("/v1/chat/completions", "error"), ("/api/generate", "error"), (AUDIO, "error")):
                before = len(node.requests)
                answer = await call(gateway, "POST", path, body, **bearer("pen"), Content_Encoding="zstd")
                assert answer.status == 403 and "cannot be read" in str(answer.json()[kind]), (path, body[:40])
                assert len(node.requests) == before
                assert (await call(gateway, "POST", path, body, **bearer("root"))).status == 200


@over_sockets
async def test_routes_of_a_key(tmp_path):
    node = ScriptedNode(lambda request: [framed(b'{"done":true,"done_reason":"unload","status":"success"}'), KEEP])
    node.line, node.reads_chunks = "name=a", True
    keys = """\
        read-secret name=read routes=read admin=yes
        asks-secret name=asks routes=inference admin=yes
        some-secret name=some routes=all
        all-secret  name=all  routes=all admin=yes"""
    async with guarded(tmp_path, node, keys=keys) as gateway:
        for method, path, body in CHANGING:
            for name in ("read", "asks", "some"):
                answer = await call(gateway, method, path, body, **bearer(name))
                why = "admin=yes" if name == "some" else f"routes={'read' if name == 'read' else 'inference'}"
                assert answer.status == 403 and why in str(answer.json()["error"]), (name, method, path)
            if path != "/api/nodes/a/drain":
                assert (await call(gateway, method, path, body, **bearer("all"))).status in (200, 404), (method, path)
        before = len(node.requests)
        for method, path, body in USING:
            for name in ("asks", "some", "all"):
                assert (await call(gateway, method, path, body, **bearer(name))).status in (200, 404), (name, path)
            answer = await call(gateway, method, path, body, **bearer("read"))
            assert answer.status == (200 if method in ("GET", "HEAD") or path == "/api/show" else 403), path
        for path, shape in (("/v1/messages", ("error", "message")), ("/v1/chat/completions", ("error", "message"))):
            found = (await call(gateway, "POST", path, {"model": "llama3.2"}, **bearer("read"))).json()
            assert found[shape[0]][shape[1]] == "the key read may only read: it has routes=read"
        assert len(node.requests) > before


@over_sockets
async def test_tokens_of_a_key_are_counted_and_used_up(tmp_path, monkeypatch):
    """As an answer tells them, or estimated: the one that uses the budget up is finished, the next one is refused."""
    clock = [NOON_S]
    monkeypatch.setattr(sollol.time, "time", lambda: clock[0])
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    stream = chunked(*[b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'] * 30, b"data: [DONE]\n\n",
                     kind=b"text/event-stream")
    answers = {b"/api/generate": framed(b'{"done":true,"prompt_eval_count":40,"eval_count":60}\n'),
               b"/api/embed": framed(b'{"embeddings":[[1]],"prompt_eval_count":70}'), b"/v1/chat/completions": stream,
               b"/api/chat": framed(b'{"error":"no"}', status=b"500 Oh"),
               b"/api/embeddings": framed(b'{"embedding":[1]}')}
    node = ScriptedNode(lambda request: [answers.get(request.split(b" ")[1], framed(b"{}")), KEEP])
    async with guarded(tmp_path, node, keys="x-secret name=x tokens=200/d\ny-secret name=y") as gateway:
        key = next(key for key in gateway.access.keys.values() if key.settings.name == "x")

        async def ask(path, name="x", **more):
            body = {"model": "llama3.2", "prompt": "say it", "messages": MESSAGES, "input": "say it " * 9, **more}
            return await call(gateway, "POST", path, body, **bearer(name))

        assert (await ask("/api/generate")).status == 200 and key.budget.used == 100
        assert (await ask("/api/embed")).status == 200 and key.budget.used == 170
        assert (await ask("/api/chat")).status == 500 and key.budget.used == 170
        assert (await ask("/api/show")).status == 200 and key.budget.used == 170
        assert (await ask("/api/embeddings")).status == 200 and 170 < key.budget.used < 200
        assert (await ask(OPENAI, stream=True)).status == 200 and 200 < key.budget.used < 260
        answer = await ask(OPENAI)
        assert answer.status == 429 and answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.fields["retry-after"] == str(12 * 3600) and "its 200 tokens in a day" in answer.body.decode()
        assert (await ask("/api/generate", "y")).status == 200 and (await ask("/api/show")).status == 200
        assert (await call(gateway, "GET", "/api/tags", **bearer("x"))).status == 200
        (tmp_path / "keys").write_text("x-secret name=x tokens=201/d")
        gateway.files.read_keys()
        assert (await ask("/api/generate")).status == 429
        clock[0] += 12 * 3600 - 1
        assert (await ask("/api/generate")).fields["retry-after"] == "1"
        clock[0] += 1
        assert (await ask("/api/generate")).status == 200 and key.budget.used == 100
    monkeypatch.undo()
    time.tzset()


@over_sockets
async def test_tokens_are_counted_for_parts_of_a_batch_and_for_a_stream_that_its_client_leaves(tmp_path):
    nodes = [bench.SimNode(models=("nomic-embed-text", "llama3.2"), loaded=("llama3.2",), speed=0.5) for _ in range(2)]
    async with guarded(tmp_path, *nodes, keys="x-secret name=x tokens=1M/d") as gateway:
        key = next(iter(gateway.access.keys.values()))
        texts = {"model": "nomic-embed-text", "input": ["some words to embed"] * 800}
        answer = await call(gateway, "POST", "/api/embed", texts, **bearer("x"))
        assert answer.status == 200 and answer.fields["x-sollol-reason"].endswith("shares")
        assert key.budget.used == answer.json()["prompt_eval_count"]
        before, known = key.budget.used, gateway.dispatcher.cluster.nodes.values()
        answers = sum(len(node.latencies_s) for node in known)
        caller = await Caller.to(gateway)
        more = {**texts, "input": 4 * texts["input"]}
        task = asyncio.create_task(caller.ask("POST", "/api/embed", more, **bearer("x")))
        await until(lambda: sum(len(node.latencies_s) for node in known) > answers)
        caller.close()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not key.running)
        assert before < key.budget.used < 5 * before    # of a batch whose client leaves, the shares that were answered
        before = key.budget.used
        caller = await Caller.to(gateway)
        long = generate(tokens=500, stream=True)
        task = asyncio.create_task(caller.ask("POST", "/api/generate", long, **bearer("x")))
        await until(lambda: any(lease.lines > 20 for node in gateway.dispatcher.cluster.nodes.values()
                                for lease in node.leases))
        caller.close()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: health(gateway)["inflight"] == 0)
        assert 20 < key.budget.used - before < 400


@over_sockets
async def test_keys_are_read_again_when_saved_and_a_bad_file_is_refused(tmp_path, caplog):
    caplog.set_level("INFO", "sollol")
    async with guarded(tmp_path, fixed(1)) as gateway:
        async def status(name):
            return (await call(gateway, "GET", "/api/queue", **bearer(name))).status

        assert [await status(name) for name in ("alice", "dave")] == [200, 401]
        (tmp_path / "keys").write_text("dave-secret name=dave\nalice-secret\n")
        await until(lambda: "name= is missing" in caplog.text)
        assert [await status(name) for name in ("alice", "dave")] == [200, 401]
        for number, line in enumerate(("models=a[b]", "tokens=2M", "routes=none", "model=a")):
            (tmp_path / "keys").write_text("# who\n" * number + f"dave-secret name=dave {line}")
            gateway.files.reload()
            complaint = "a setting is none of" if number == 3 else line.partition("=")[0] + " must be"
            assert f"keys:{number + 1}: {complaint}" in caplog.text
            assert [await status(name) for name in ("alice", "dave")] == [200, 401]
        (tmp_path / "keys").write_text("dave-secret name=dave")
        await until(lambda: "dave" in {key.settings.name for key in gateway.access.keys.values()})
        assert [await status(name) for name in ("alice", "dave")] == [401, 200]
        (tmp_path / "keys").write_text(KEYS)
        gateway.files.reload()
        assert [await status(name) for name in ("alice", "dave")] == [200, 401]
    assert "secret" not in caplog.text


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_keys_file_that_others_can_read_is_warned_about(mode, warned, tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(KEYS)
    path.chmod(mode)
    sollol.read_keys(sollol.parse_options(["--node", "a", "--keys", str(path)], {}))
    assert ("chmod 600" in caplog.text) is warned


def test_keys_that_systemd_hands_over_are_not_warned_about(tmp_path, caplog, monkeypatch):
    """It closes them to others by an ACL, which shows as mode 0440."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    path = tmp_path / "keys"
    path.write_text(KEYS)
    path.chmod(0o440)
    assert sollol.read_keys(sollol.parse_options(["--node", "a"], {"SOLLOL_KEYS": str(path)})) and not caplog.text


def test_bad_keys_file_stops_the_start_and_the_missing_warning_is_for_those_without(tmp_path, capsys):
    path = tmp_path / "keys"
    assert sollol.main(["--node", "a", "--keys", str(path)]) == 2
    assert capsys.readouterr().err == f"{path}: No such file or directory\n"


# -----------------------------------------------------------------------------
# Access: web pages
# -----------------------------------------------------------------------------

@table("origin, allowed", [
    ("localhost", "http://localhost", True), ("any port", "https://127.0.0.1:3000", True), ("app", "app://x/y", True),
    ("editor", "vscode-webview://abc", True), ("other", "https://evil.example", False),
    ("longer host", "http://localhost.evil.example", False), ("null", "null", False),
    ("own", "http://gw:8000", True), ("own over TLS", "https://gw:8000", True),
    ("own host, other port", "http://gw", False),
    ("listed", "https://chat.example", True), ("listed with a star", "https://a.b.example.org", True),
    ("star needs its end", "https://a.example.org.evil", False), ("upper case", "HTTPS://CHAT.EXAMPLE", False)])
def test_origins_are_allowed_as_ollama_allows_them(origin, allowed):
    listed = sollol.LOCAL_ORIGINS + sollol.parse_origins("https://chat.example, https://*.example.org")
    assert (sollol.origin_lines(origin.encode(), b"gw:8000", listed) is not None) == allowed
    assert sollol.origin_lines(origin.encode(), b"x", [*listed, "*"]) == [b"Access-Control-Allow-Origin: *"]


@pytest.mark.parametrize("method, path, keys", [
    ("POST", "/api/chat", {"error"}), ("DELETE", "/api/delete", {"error"}), ("POST", "/api/pull", {"error"}),
    ("POST", "/v1/chat/completions", {"message", "type", "param", "code"}), ("GET", "/v1/models", {"message", "type",
                                                                                                  "param", "code"}),
    ("POST", "/v1/messages", {"type", "error"})])
@over_sockets
async def test_errors_have_the_shape_of_their_path(method, path, keys):
    node = bench.SimNode(**FAST)
    async with gateway_for(node, flags=("--probe-interval", "0.1", "--queue-timeout", "1s")) as gateway:
        node.kill()
        await until(lambda: health(gateway)["nodes"]["up"] == 0)
        answer = await call(gateway, method, path, {"model": "m", "messages": [], "max_tokens": 1})
        assert answer.status == 503 and answer.fields["content-type"] == "application/json"
        found = answer.json()
        assert (found["error"] if "code" in keys else found).keys() == keys


@over_sockets
async def test_web_page_gets_its_answers_and_its_preflight_from_the_gateway():
    async with surface(flags=("--origins", "https://chat.example")) as gateway:
        origin = {"Origin": "https://chat.example"}
        answer = await call(gateway, "OPTIONS", "/api/chat", **origin, Access_Control_Request_Method="POST")
        assert answer.status == 204 and answer.fields["access-control-max-age"] == "43200"
        assert "POST" in answer.fields["access-control-allow-methods"] and "content-length" not in answer.fields
        asked = [("GET", "/api/tags", None), ("POST", "/api/generate", generate(stream=True)),
                 ("POST", "/api/show", {}),
                 ("POST", "/api/pull", {"model": "mistral"}), ("POST", "/api/generate", {"priority": 99}),
                 ("GET", "/nowhere", None), ("DELETE", "/api/delete", {"model": "mistral"})]
        for method, path, body in asked:
            answer = await call(gateway, method, path, body, **origin)
            assert answer.fields["access-control-allow-origin"] == "https://chat.example"
            assert answer.fields["vary"] == "Origin" and answer.head.lower().count(b"access-control-allow-origin") == 1
        assert not any(b"origin" in record.head.lower() for node in gateway.nodes for record in node.requests)


@over_sockets
async def test_strange_web_page_gets_403_with_an_empty_body_and_reaches_no_node():
    async with surface() as gateway:
        before = [len(node.requests) for node in gateway.nodes]
        for method, path, body in (("GET", "/api/tags", None), ("OPTIONS", "/api/chat", None),
                                   ("POST", "/api/chat", {"model": "llama3.2", "messages": MESSAGES}),
                                   ("POST", f"/api/blobs/sha256:{DIGEST}", b"weights")):
            answer = await call(gateway, method, path, body, Origin="https://evil.example")
            assert (answer.status, answer.body, answer.fields["content-length"]) == (403, b"", "0")
            assert "access-control-allow-origin" not in answer.fields
        assert [len(node.requests) for node in gateway.nodes] == before
        answer = await call(gateway, "OPTIONS", "/api/chat")
        assert answer.status == 405
        for origin in ("http://x", ""):         # the gateway's own Host; none
            answer = await call(gateway, "GET", "/api/version", Origin=origin, Host="x")
            assert answer.status == 200 and "access-control-allow-origin" not in answer.fields


REBOUND = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}   # a browser sends both alike


@over_sockets
async def test_page_that_dns_rebinding_leads_here_is_refused_whatever_it_asks():
    async with surface() as gateway:
        before = [len(node.requests) for node in gateway.nodes]
        name = next(iter(gateway.dispatcher.cluster.nodes))
        asked = [("GET", path, None) for path in ("/", "/dashboard", "/dashboard/events", "/api/stats", "/api/queue",
                                                  "/metrics", "/api/health", "/api/tags", "/nowhere")]
        asked += [("POST", path, {"model": "llama3.2"}) for path in (
            f"/api/nodes/{name}/drain", "/api/chat", "/v1/chat/completions", f"/api/blobs/sha256:{DIGEST}")]
        for method, path, value in asked:
            for fields in (REBOUND, {"Host": "evil.example"}):
                answer = await call(gateway, method, path, value, **fields)
                assert answer.status == 403 and "error" in answer.json()
                assert "access-control-allow-origin" not in answer.fields
        assert [len(node.requests) for node in gateway.nodes] == before
        assert not any(node.draining for node in gateway.dispatcher.cluster.nodes.values())
        assert (await call(gateway, "GET", "/api/stats", Host=f"127.0.0.1:{gateway.listener.address[1]}")).status == 200
        assert (await call(gateway, "GET", "/api/stats", Host=socket.gethostname())).status == 200
    async with surface(flags=["--origins", "https://evil.example"]) as gateway:
        assert (await call(gateway, "GET", "/api/stats", Host="evil.example")).status == 200
        assert (await call(gateway, "POST", f"/api/nodes/{name}/drain", Host="evil.example")).status == 403


@over_sockets
async def test_gateway_that_is_bound_to_more_than_loopback_is_called_what_others_call_it():
    async with surface(flags=["--bind", "0.0.0.0"]) as gateway:
        gateway.listener.address = "127.0.0.1", gateway.listener.address[1]
        for path in ("/dashboard", "/api/stats", "/api/tags"):
            assert (await call(gateway, "GET", path, Host="gateway.example")).status == 200
        path = f"/api/nodes/{next(iter(gateway.dispatcher.cluster.nodes))}/drain"
        assert (await call(gateway, "POST", path, Host="gateway.example")).status == 403
        assert (await call(gateway, "POST", path)).status == 200


# -----------------------------------------------------------------------------
# Gateways before gateways
# -----------------------------------------------------------------------------

@over_sockets
async def test_every_request_to_a_node_carries_via():
    node = ScriptedNode(lambda request: [framed(b"{}"), KEEP])
    node.own_answer, own_answer = lambda raw: seen.append(raw) or own_answer(raw), node.own_answer
    seen = []
    async with gateway_for(node) as gateway:
        for method, path in (("POST", "/api/chat"), ("POST", "/api/show"), ("DELETE", "/api/delete"), ("GET", "/x"),
                             ("POST", "/api/blobs/a"), ("POST", "/v1/embeddings")):
            await call(gateway, method, path, {"model": "llama3.2"}, Via="1.1 theirs", Connection="Via")
        assert len(node.requests) == 6 and len(seen) > 8
        for raw in seen:
            asked = raw in node.requests or raw.split(b" ")[1] in {it.split(b" ")[1] for it in node.requests}
            assert re.findall(rb"\r\nvia: (.*?)\r\n", raw, re.I) == [
                b"1.1 theirs, " * asked + gateway.via], raw


@over_sockets
async def test_request_over_gateways_that_list_each_other_ends_at_its_second_pass():
    """What is pinned to a primary node, and that is the other gateway, cannot be done; the rest a node of one does."""
    nodes = [bench.SimNode(models=("mistral",), **FAST), fixed(1)]
    async with gateway_for(nodes[0]) as first, gateway_for(nodes[1]) as second:
        urls = [f"http://127.0.0.1:{gateway.listener.address[1]}" for gateway in (first, second)]
        first.configure(sollol.parse_hosts(f"{urls[1]} name=second\n{nodes[0].url} name=own", "test"))
        second.configure(sollol.parse_hosts(f"{urls[0]} name=first\n{nodes[1].url} name=own", "test"))
        for gateway in (first, second):
            await until(lambda gateway=gateway: health(gateway)["nodes"]["up"] == 2)
        for path, value in (("/api/generate", generate()), ("/api/show", {"model": "llama3.2"}),
                            ("/api/generate", generate("nobody-has-this")), ("/api/me", {}), ("/api/nowhere", {})):
            answer = await call(first, "POST", path, value)
            assert answer.status in (200, 404, 405, 508), (path, answer.head)
            assert answer.status != 508 or path in ("/api/me", "/api/nowhere"), path
        assert len(first.listener.clients) < 20 and len(second.listener.clients) < 20
        own = await call(first, "GET", "/", Via=first.via.decode())
        assert own.status == 508 and "leads back" in own.json()["error"]


@over_sockets
async def test_gateway_that_lists_itself_says_why_that_node_is_down(caplog):
    async with gateway_for(bench.SimNode(**FAST), flags=["--probe-interval", "0.1"]) as gateway:
        itself = f"http://127.0.0.1:{gateway.listener.address[1]} name=itself"
        gateway.configure(sollol.parse_hosts(f"{next(iter(gateway.sources.lines)).url}\n{itself}", "test"))
        await until(lambda: "answered 508" in caplog.text)
        assert not gateway.dispatcher.cluster.nodes["itself"].up
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200


# -----------------------------------------------------------------------------
# Queue, slots and routing, on the request's real path
# -----------------------------------------------------------------------------

def fixed(slots, **settings):
    """Return a simulated node whose slots are told in hosts.txt, its model loaded."""
    node = bench.SimNode(slots=slots, loaded=("llama3.2",), **settings)
    node.line = f"slots={slots}"
    return node


@over_sockets
async def test_never_more_in_flight_than_slots():
    nodes = [fixed(1, speed=20), fixed(2, speed=20), fixed(4, speed=20)]
    async with gateway_for(*nodes) as gateway:
        answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(tokens=40))
                                         for _ in range(40)))
        assert {answer.status for answer in answers} == {200}
        assert [node.max_in_flight for node in nodes] == [1, 2, 4]


@over_sockets
async def test_slots_are_learned():
    """A node with four slots is found to have four, one with a single slot keeps one; at most one more is tried."""
    nodes = [bench.SimNode(slots=slots, speed=8, loaded=("llama3.2",)) for slots in (1, 2, 4)]
    async with gateway_for(*nodes) as gateway:
        for _ in range(2):
            answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(tokens=200, stream=True))
                                             for _ in range(40)))
            assert {answer.status for answer in answers} == {200}
        learned = [node.runners["llama3.2:latest"].slots.count for node in gateway.dispatcher.cluster.nodes.values()]
        assert learned == [1, 2, 4]
        assert [node.max_in_flight for node in nodes] == [2, 3, 5]


def untimed(path, **fields):
    """Return what draws a request whose answer tells no durations: sizes vary unless fields are given."""
    def draw(rng):
        words, tokens = "word " * rng.randrange(10, 1000), rng.randrange(20, 300)
        text = {"messages": [{"role": "user", "content": f"<out={tokens}> {rng.random()} {words}"}]}
        return path, {"model": "llama3.2", **({"input": words} if "embed" in path else text), **fields}
    return draw


EQUAL = {"messages": [{"role": "user", "content": "<out=100> " + "word " * 200}]}


async def work_through(gateway, draw, clients, count):
    """Let clients send requests one after the other, all from one seed."""
    rng, numbers = random.Random(1), iter(range(count))

    async def client():
        for _ in numbers:
            answer = await call(gateway, "POST", *draw(rng))
            assert answer.status == 200

    await asyncio.gather(*(client() for _ in range(clients)))


@table("draw, tokens_told", [
    ("embeddings", untimed("/api/embed"), False),
    ("embeddings of one size", untimed("/api/embed", input="word " * 400), False),
    ("embeddings of /v1", untimed("/v1/embeddings"), False),
    ("answers of /v1", untimed("/v1/chat/completions"), True),
    ("answers of /v1, of one size", untimed("/v1/chat/completions", **EQUAL), True),
    ("streams of /v1 without usage", untimed("/v1/chat/completions", stream=True), True),
    ("streams of /v1 with usage", untimed("/v1/chat/completions", stream=True, stream_options={"include_usage": True}),
     True)])
def test_slots_and_speeds_are_learned_from_answers_that_tell_no_durations(draw, tokens_told):
    """Never one too few in the end, at most one too many; the speed within 20 %, although nobody tells it."""
    async def run():
        nodes = [bench.SimNode(slots=slots, loaded=("llama3.2",), noise=0.08, seed=slots) for slots in (1, 2, 4)]
        async with gateway_for(*nodes) as gateway:
            await work_through(gateway, draw, 12, 240)
            known = [node.runners["llama3.2:latest"] for node in gateway.dispatcher.cluster.nodes.values()]
            for slots, found in zip((1, 2, 4), known, strict=True):
                assert slots <= found.slots.count <= slots + 1
                assert not tokens_told or 0.8 < 115 * found.speeds.decode_s < 1.25
    bench.run_virtual(run())


@table("path, exponent, least, most", [
    ("poor", CHAT, 0.4, 0.3, 0.55), ("usual", CHAT, 0.7, 0.6, 0.8), ("full", CHAT, 1.0, 0.85, 1.0),
    ("poor, without durations", OPENAI, 0.4, 0.3, 0.6), ("full, without durations", OPENAI, 1.0, 0.8, 1.0)])
def test_gain_of_batching_is_learned_from_answers(path, exponent, least, most):
    """One to six clients, one after the other more of them; the speed of a lone request is then known, too."""
    async def run():
        node = bench.SimNode(slots=4, loaded=("llama3.2",), noise=0.1, machine=bench.Machine(exponent))
        async with gateway_for(node) as gateway:
            for clients in (1, 2, 3, 4, 6):
                await work_through(gateway, untimed(path, stream=True), clients, 25)
            known = gateway.dispatcher.cluster.nodes[f"127.0.0.1:{node.port}"].runners["llama3.2:latest"]
            shown = (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]["models"]["llama3.2:latest"]
            learned = known.batching.batch_exponent
            assert least <= learned <= most and shown["batch_exponent"] == round(learned, 2)
            assert 0.8 < 115 * known.speeds.decode_s < 1.25
    bench.run_virtual(run())


@table("path", [("with durations", "/api/chat"), ("without", "/v1/chat/completions")])
def test_other_users_of_a_node_shrink_its_slots_for_a_while(path):
    """Three others send to the node directly, and take up to three of its four slots; within a minute after they
    have left all four are back.
    """
    async def run():
        node, draw, rng = bench.SimNode(slots=4, loaded=("llama3.2",), noise=0.08), untimed(path), random.Random(1)
        async with gateway_for(node) as gateway:
            known_node, = gateway.dispatcher.cluster.nodes.values()
            known, ended = known_node.runners["llama3.2:latest"], asyncio.Event()

            async def client(address, ended):
                caller = bench.Caller(*address)
                while not ended.is_set():
                    body = {**draw(rng)[1], "stream": False}
                    assert (await caller.call(json.dumps(body).encode(), path=path)).status == 200
                caller.close()

            own = [asyncio.create_task(client(gateway.listener.address, ended)) for _ in range(10)]
            await until(lambda: known.slots.count == 4, 60)
            others_ended = asyncio.Event()
            others = [asyncio.create_task(client(("127.0.0.1", node.port), others_ended)) for _ in range(3)]
            await until(lambda: known.slots.count <= 2, 60)
            await asyncio.sleep(60)
            assert known.slots.count <= 3
            others_ended.set()
            await asyncio.gather(*others)
            await until(lambda: known.slots.count == 4, 60)
            await asyncio.sleep(60)
            assert 4 <= known.slots.count <= 5
            ended.set()
            await asyncio.gather(*own)
    bench.run_virtual(run())


@over_sockets
async def test_urgent_overtakes_batch_and_batch_does_not_starve():
    async with gateway_for(fixed(1, speed=20)) as gateway:
        finished = []

        async def one(name, priority):
            await call(gateway, "POST", "/api/generate", generate(tokens=20), X_Priority=priority)
            finished.append(name)

        batch = [asyncio.create_task(one(f"batch {number}", "batch")) for number in range(10)]
        await until(lambda: health(gateway)["queued"] == 9)
        await one("urgent", "high")
        assert len(finished) <= 3
        await asyncio.gather(*batch)
        assert len(finished) == 11


def test_one_clients_flood_does_not_delay_another_client_over_sockets():
    """Two clients tell each other apart by their addresses; on one slot the modest one waits for two others at most."""
    async def run():
        async with gateway_for(fixed(1, speed=20)) as gateway:
            address = gateway.listener.address
            greedy, modest = bench.Caller(*address), bench.Caller(*address, "127.0.0.2")
            loop, ended_s = asyncio.get_running_loop(), []

            async def one(caller):
                answer = await caller.call(json.dumps(generate(tokens=100)).encode(), path="/api/generate")
                assert answer.status == 200
                ended_s.append(loop.time())

            flood = [asyncio.create_task(one(greedy)) for _ in range(60)]
            await until(lambda: health(gateway)["queued"] > 50)
            for _ in range(5):
                before = len(ended_s)
                await one(modest)
                assert len(ended_s) - before <= 3
            await asyncio.gather(*flood)
            greedy.close()
            modest.close()
    bench.run_virtual(run())


def test_shared_system_prompt_does_not_pile_everything_onto_one_node():
    async def run():
        async with gateway_for(fixed(2), fixed(2)) as gateway:
            def ask(number):
                messages = [{"role": "system", "content": "You are kind. " * 300},
                            {"role": "user", "content": f"<out=30> {number} {'word ' * 100}"}]
                return call(gateway, "POST", "/api/chat", {"model": "llama3.2", "messages": messages, "stream": False})

            await ask("the first one leaves the prompt on one node")
            answers = await asyncio.gather(*map(ask, range(40)))
            assert {answer.status for answer in answers} == {200}
            assert all(15 <= node.requests <= 26 for node in gateway.dispatcher.cluster.nodes.values())
    bench.run_virtual(run())


def test_requests_with_different_num_ctx_settle_each_on_a_node_of_its_own():
    async def run():
        nodes = [bench.SimNode(speed=5, seed=seed) for seed in (1, 2)]
        async with gateway_for(*nodes) as gateway:
            for number in range(30):
                body = generate(tokens=60, options={"num_ctx": 4096 if number % 2 else 8192})
                assert (await call(gateway, "POST", "/api/generate", body)).status == 200
            assert [node.loads for node in nodes] == [1, 1]
    bench.run_virtual(run())


def test_model_and_its_variant_with_another_num_ctx_settle_each_on_a_node_of_its_own():
    """Made from the same weights, they share a runner, which is loaded anew for the other's window."""
    async def run():
        nodes = [bench.SimNode(speed=5, seed=seed) for seed in (1, 2)]
        async with gateway_for(*nodes) as gateway:
            value = {"model": "wide", "from": "llama3.2", "parameters": {"num_ctx": 16384}, "stream": False}
            assert (await call(gateway, "POST", "/api/create", value)).json() == {"status": "success"}
            assert all("wide:latest" in node.contexts for node in gateway.dispatcher.cluster.nodes.values())
            for number in range(30):
                body = generate("wide" if number % 2 else "llama3.2", tokens=60)
                path = "/v1/completions" if number % 3 else "/api/generate"
                assert (await call(gateway, "POST", path, body)).status == 200
            assert [node.loads for node in nodes] == [1, 1]
            answers = [await call(gateway, "POST", "/v1/completions", generate("wide", prompt="word " * 9000))
                       for _ in range(2)]
            assert {answer.status for answer in answers} == {200} and [node.loads for node in nodes] == [1, 1]
    bench.run_virtual(run())


WINDOWS = [("llama3.2:latest", 8192), ("qwen3:*", 32768)]


@table("body, sent", [
    ("none", b'{"model":"llama3.2","prompt":"x"}', b'{"options":{"num_ctx":8192},"model":"llama3.2","prompt":"x"}'),
    ("by a pattern", b' {"model" : "Qwen3:14B"} tail', b' {"options":{"num_ctx":32768},"model" : "Qwen3:14B"} tail'),
    ("other options", b'{"model":"llama3.2","Options" : {"seed":1}}',
     b'{"model":"llama3.2","Options" : {"num_ctx":8192,"seed":1}}'),
    ("empty ones", b'{"options":{},"model":"llama3.2"}', b'{"options":{"num_ctx":8192},"model":"llama3.2"}'),
    ("null", b'{"options":null,"model":"llama3.2"}', b'{"options":{"num_ctx":8192},"model":"llama3.2"}'),
    ("one is asked for", b'{"model":"llama3.2","options":{"num_ctx":4096}}', None),
    ("no number", b'{"model":"llama3.2","options":{"num_ctx":"many"}}', None),
    ("no object", b'{"model":"llama3.2","options":[1]}', None), ("another model", b'{"model":"mistral"}', None),
    ("another tag", b'{"model":"llama3.2:1b"}', None), ("no model", b'{"model":5}', None), ("no JSON", b"x", None),
    ("a key that the skimmer does not read", b'{"%b":1,"model":"llama3.2"}' % (b"k" * 5000), None),
    ("a long text", b'{"prompt":"%b","model":"llama3.2"}' % (b'\\"{' * 20_000),
     b'{"options":{"num_ctx":8192},"prompt":"%b","model":"llama3.2"}' % (b'\\"{' * 20_000)),
])
def test_num_ctx_is_added_for_a_model_and_not_another_byte_changed(body, sent):
    fields = sollol.read_object(body)
    assert bytes(sollol.at_once(sollol.widened(body, fields, WINDOWS))) == (sent or body)
    assert fields == sollol.read_object(sent or body)


@over_sockets
async def test_num_ctx_of_the_command_line_is_what_a_node_loads_a_model_with():
    nodes = [bench.SimNode(speed=20, seed=seed) for seed in (1, 2)]
    async with gateway_for(*nodes, flags=["--num-ctx", "llama3.2=16384"]) as gateway:
        long = {"model": "llama3.2", "messages": [{"role": "user", "content": "word " * 5000}]}
        for path, value in (("/api/generate", generate(tokens=5)), ("/api/chat", long),
                            ("/api/generate", generate(options={"num_ctx": 16384}))):
            assert (await call(gateway, "POST", path, value)).status == 200
        rows = [row for node in nodes for row in (await ask(node, "/api/ps", b"", "GET")).json()["models"]]
        assert [row["context_length"] for row in rows] == [16384]


def test_two_models_settle_each_on_a_small_node_of_its_own():
    """Either node has room for one of them; the requests alternate, some at the same time."""
    async def run():
        models = ("llama3.1:8b", "mistral")
        nodes = [bench.SimNode(models=models, vram_gb=8, speed=5, seed=seed) for seed in (1, 2)]
        async with gateway_for(*nodes) as gateway:
            for _ in range(15):
                answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(name, tokens=60))
                                                 for name in models))
                assert {answer.status for answer in answers} == {200}
            for number in range(30):
                await call(gateway, "POST", "/api/generate", generate(models[number % 2], tokens=60))
            assert sum(node.loads for node in nodes) <= 3
            assert sorted(name for node in nodes for name in node.engine.resident) == [
                "llama3.1:8b", "mistral:latest"]
    bench.run_virtual(run())


@over_sockets
async def test_model_loaded_on_the_second_node_is_used_there():
    nodes = [bench.SimNode("rtx4090", speed=10), bench.SimNode("rtx3060", loaded=("llama3.2",), speed=10)]
    async with gateway_for(*nodes) as gateway:
        for _ in range(3):
            answer = await call(gateway, "POST", "/api/generate", generate())
            assert answer.fields["x-sollol-node"] == f"127.0.0.1:{nodes[1].port}"
        assert nodes[0].loads == 0


@over_sockets
async def test_request_goes_where_the_model_is_and_an_unknown_one_gets_a_nodes_own_answer():
    nodes = [bench.SimNode(models=("mistral",), **FAST), bench.SimNode(models=("llama3.2",), **FAST)]
    async with gateway_for(*nodes) as gateway:
        for name in ("llama3.2", "LLAMA3.2:latest", "library/llama3.2"):
            assert (await call(gateway, "POST", "/api/generate", generate(name))).status in (200, 404)
        assert nodes[0].in_flight == nodes[0].max_in_flight == 0
        answer = await call(gateway, "POST", "/api/generate", generate("nobody-has-this"))
        assert (answer.status, answer.json()) == (404, {"error": "model 'nobody-has-this' not found"})
        answer = await call(gateway, "POST", "/api/chat", b"\xff{ not json")
        assert answer.status == 400 and "x-sollol-node" in answer.fields


@over_sockets
async def test_queue_is_bounded_and_its_time_is_too():
    async with (gateway_for(fixed(1, speed=1), flags=["--max-queue", "2", "--queue-timeout", "1"]) as gateway,
                contextlib.AsyncExitStack() as stack):
        running = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=400)))
        stack.callback(running.cancel)
        await until(lambda: health(gateway)["inflight"] == 1)
        waiting = [asyncio.create_task(call(gateway, "POST", "/v1/completions", generate())) for _ in range(2)]
        await until(lambda: health(gateway)["queued"] == 2)
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert answer.status == 503 and answer.json() == {"error": "the queue is full"}
        assert int(answer.fields["retry-after"]) >= 1
        urgent = asyncio.create_task(call(gateway, "POST", "/v1/completions", generate(), X_Priority="critical"))
        displaced, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert ["queue is full" in it.result().json()["error"]["message"] for it in displaced] == [True]
        for answer in await asyncio.gather(*waiting, urgent):
            assert answer.status == 503 and answer.json()["error"]["type"] == "api_error"
            assert int(answer.fields["retry-after"]) >= 1


@pytest.mark.parametrize("policy, expected", [("round-robin", [4, 4]), ("least-inflight", [4, 4])])
@over_sockets
async def test_plain_policies_send_at_once_and_share_evenly(policy, expected):
    nodes = [fixed(1, hardware="rtx4090", speed=1), fixed(1, hardware="cpu", speed=1)]
    async with gateway_for(*nodes, flags=["--policy", policy]) as gateway:
        await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate()) for _ in range(8)))
        assert [node.requests for node in gateway.dispatcher.cluster.nodes.values()] == expected
        assert nodes[0].max_in_flight == nodes[1].max_in_flight == 4


@over_sockets
async def test_weights_are_asked_for_once():
    def shown(raw):
        if b"broken" in raw:
            return [framed(b'{"error":"x"}', b"500 Internal Server Error"), KEEP]
        blob = BLOB_A if b'"one:' in raw or b'"two:' in raw else BLOB_B
        return [framed(json.dumps({"modelfile": f"FROM /x/blobs/{blob}\n"}).encode()), KEEP]

    node = ScriptedNode(shown, ("one", "two", "three", "broken", "alone"))
    node.told = {name: {"size": 5000, "details": DETAILS} for name in ("one", "two", "three", "broken")}
    async with gateway_for(node, flags=["--probe-interval", "0.1"]) as gateway:
        known, = gateway.dispatcher.cluster.nodes.values()
        await until(lambda: len(known.made) == 4)
        await asyncio.sleep(0.5)
        assert len(node.requests) == 4 and all(b"POST /api/show" in it for it in node.requests)
        runners = [known.runners[f"{name}:latest"] for name in ("one", "two", "three", "broken", "alone")]
        assert runners[0] is runners[1] and len(set(runners)) == 4
        found = (await call(gateway, "GET", "/api/tags")).json()["models"]
        assert {row["name"] for row in found} == set(node.models)


def measurable(*given, **more):
    """Return a simulated node with its model loaded, for which an option of the value that is there loads nothing."""
    node = bench.SimNode(*given, loaded=("llama3.2",), **more)
    node.engine._hot = lambda model, options: node.engine.resident.get(model.name)
    return node


def measurements(node):
    return [json.loads(record.body) for record in node.requests if b'"raw": true' in record.body]


@over_sockets
async def test_calibration_learns_an_idle_nodes_speed_from_one_short_request():
    node = measurable("rtx4090", slots=4)
    async with gateway_for(node) as gateway:
        known = next(iter(gateway.dispatcher.cluster.nodes.values()))
        await sollol.calibrate(gateway.node_io, known)
        runner = known.runners["llama3.2:latest"]
        assert 1 / runner.speeds.decode_s == pytest.approx(265, rel=0.3)
        assert (known.calibrated, known.leases) == (True, [])
        asked, *at_once = measurements(node)
        words = asked["prompt"].split()
        assert len(words) * 5 <= 64 and max(map(len, words)) <= 4 and not node.loads
        assert asked["options"] == {"num_predict": 8, "num_ctx": runner.context} and runner.context
        await sollol.calibrate(gateway.node_io, known)
        assert len(measurements(node)) == 1 + len(at_once)      # its speed is known


@over_sockets
@listed("slots, asked", [(1, [1, 2]), (2, [1, 2, 4]), (3, [1, 2, 4]), (4, [1, 2, 4, 8]), (8, [1, 2, 4, 8])])
async def test_calibration_counts_an_idle_nodes_slots(slots, asked):
    """It asks for twice as many answers at once until some have to wait: so a node is not overrun."""
    node = measurable("rtx3060", slots=slots)
    async with gateway_for(node) as gateway:
        known = next(iter(gateway.dispatcher.cluster.nodes.values()))
        await sollol.calibrate(gateway.node_io, known)
        runner = known.runners["llama3.2:latest"]
        assert (runner.slots.count, runner.slots.origin, known.leases) == (slots, "learned", [])
        assert len(measurements(node)) == sum(asked) and not node.loads and node.max_in_flight == asked[-1]
        assert known.check_s - gateway.loop.time() <= 5.0       # all that is one measurement: one pause


@over_sockets
async def test_measurement_gives_way_to_any_request_and_teaches_nothing():
    node = measurable("cpu", slots=1, speed=0.3)
    async with gateway_for(node) as gateway:
        known = next(iter(gateway.dispatcher.cluster.nodes.values()))
        gateway.node_io.begin_job(known, sollol.calibrate)
        await until(lambda: node.in_flight)
        stats = (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]
        assert [(row["id"], row["slot"]) for row in stats["running"]] == [(f"measure-{known.name}", True)]
        assert health(gateway)["inflight"] == 1
        answer = await call(gateway, "POST", "/api/generate", generate(tokens=1, stream=True))
        assert answer.status == 200 and b'"done":true' in answer.body
        assert node.aborted == 1 and not gateway.node_io.jobs and not known.measuring
        assert known.runners["llama3.2:latest"].speeds.samples == 0 and not known.calibrated
        assert known.check_s > gateway.loop.time()


@over_sockets
async def test_only_what_ps_lists_is_measured_and_only_as_it_is_loaded():
    """Nothing that loads a model, and nothing that loads one anew because its options are unknown."""
    node = ScriptedNode(lambda request: [framed(
        b'{"done":true,"total_duration":500000000,"prompt_eval_count":40,"prompt_eval_duration":100000000,'
        b'"eval_count":8,"eval_duration":400000000}'), KEEP])
    async with gateway_for(node) as gateway:
        known = next(iter(gateway.dispatcher.cluster.nodes.values()))
        runner = known.runners["llama3.2:latest"]
        for loaded, options in (([], ()), ([{"name": "llama3.2:latest", "size": 5e9}], None)):
            node.loaded = loaded
            await gateway.node_io.look_at_residency(known)
            runner.options = options
            await sollol.calibrate(gateway.node_io, known)
            await sollol.check(gateway.node_io, known)
            assert node.requests == [] and not known.calibrated
        node.loaded[0]["context_length"] = 8192
        await sollol.calibrate(gateway.node_io, known)
        asked = json.loads(node.requests[0].partition(b"\r\n\r\n")[2])
        assert asked["options"] == {"num_ctx": 8192, "num_predict": 8} and "keep_alive" not in asked
        assert runner.speeds.decode_s == pytest.approx(0.05) and runner.speeds.samples == 1
        runner.options = (("use_mmap", True), ("shift", False))
        known.check_s = 0.0
        await sollol.check(gateway.node_io, known)
        asked = json.loads(node.requests[-1].partition(b"\r\n\r\n")[2])
        assert (asked["options"], asked["shift"]) == ({"num_ctx": 8192, "use_mmap": True, "num_predict": 1}, False)
        assert len(asked["prompt"].split()) == 1


@over_sockets
async def test_checks_are_rare_and_never_made_while_the_node_works():
    node = measurable("rtx3060", slots=2)
    async with gateway_for(node) as gateway:
        dispatcher, known = gateway.dispatcher, next(iter(gateway.dispatcher.cluster.nodes.values()))
        running = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=20, stream=True)))
        await until(lambda: node.in_flight)
        known.suspect = True
        await sollol.check(gateway.node_io, known)
        assert known.suspect and not measurements(node)
        await running
        for pause_s in (5, 10, 20, 40, 80, 160, 300, 300):
            known.suspect, known.check_s = True, 0.0
            await sollol.check(gateway.node_io, known)
            assert not known.suspect and known.check_s - gateway.loop.time() == pytest.approx(pause_s, abs=1)
            known.suspect = True
            await sollol.check(gateway.node_io, known)
            assert known.suspect
        assert len(measurements(node)) == 8
        known.suspect = False
        await call(gateway, "POST", "/api/generate", generate(tokens=2))
        assert known.check_pause_s == sollol.CHECK_PAUSE_S and dispatcher.cluster.in_flight() == 0


@over_sockets
async def test_check_of_a_slow_node_tells_whether_it_still_is():
    node = measurable("rtx3060", slots=1)
    async with gateway_for(node) as gateway:
        known = next(iter(gateway.dispatcher.cluster.nodes.values()))
        await call(gateway, "POST", "/api/generate", generate(tokens=50))
        for factor, speed in ((100.0, 0.5), (1.0, 1.0)):
            node.slow(factor)
            known.speed, known.check_s = 0.5, 0.0
            await sollol.check(gateway.node_io, known)
            assert known.speed == speed
        node.recover()


@over_sockets
async def test_absurd_bound_of_the_output_harms_nobody():
    """A number too large to reckon with once stopped the dispatch for everybody."""
    node = fixed(1, speed=10)
    async with gateway_for(node) as gateway:
        absurd = b'{"model":"llama3.2","prompt":"<out=3>","stream":false,"options":{"num_predict":1%b}}' % (b"0" * 400)
        answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", body)
                                         for body in (generate(), generate(), absurd, generate())))
        assert [answers[number].status for number in (0, 1, 3)] == [200, 200, 200]
        await until(lambda: health(gateway)["inflight"] == 0 and not gateway.dispatcher.waiting.fair.active)


@over_sockets
async def test_unknown_model_is_answered_beside_a_node_that_does_not_tell_its_models():
    class Mute(ScriptedNode):
        def own_answer(self, raw):
            return None if b"/api/tags" in raw else super().own_answer(raw)

    mute = Mute(lambda request: [framed(b"{}", b"500 Internal Server Error"), KEEP])
    async with gateway_for(mute, bench.SimNode(**FAST)) as gateway:
        answer = await call(gateway, "POST", "/api/generate", generate("nobody-has-this"))
        assert answer.status in (404, 500) and "x-sollol-node" in answer.fields


@over_sockets
async def test_node_that_tells_gigabytes_or_thousands_of_models_holds_up_nobody():
    node, huge = ScriptedNode(), b'{"models":[%b{}]}' % (b'{"name":"x"},' * 400_000)
    node.own_answer, own_answer = lambda raw: None if b"/api/tags" in raw else own_answer(raw), node.own_answer
    node.script = lambda raw: [framed(huge if b"/api/tags" in raw else b'{"done":true}'), KEEP]
    async with gateway_for(node) as gateway:
        (it,) = gateway.dispatcher.cluster.nodes.values()
        assert it.up and gateway.node_io.reasons[it] == "answer too long"
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
    assert len(sollol.rows_of({"models": rows(*map(str, range(5000)))})) == sollol.MOST_MODELS


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("too_long", ["refuse", "exceed", "cut"])
def test_prompt_goes_only_where_it_fits(at_once, too_long):
    """Ten thousand tokens, windows of 4,096 and 32,768, the smaller node being faster: nothing is refused or cut."""
    async def run():
        nodes = [bench.SimNode(loaded=("llama3.2",), seed=seed, context=context, speed=speed, slots=1,
                               too_long=too_long) for seed, context, speed in ((1, 4096, 3.0), (2, 32768, 1.0))]
        async with gateway_for(*nodes) as gateway:
            for turn in range(16 // at_once):
                bodies = [{**generate(tokens=5), "prompt": f"{turn} {number} " + "word " * 10_000}
                          for number in range(at_once)]
                answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", body) for body in bodies))
                assert [answer.status for answer in answers] == [200] * at_once
                assert all(answer.json()["prompt_eval_count"] > 9_000 for answer in answers)
            short = await call(gateway, "POST", "/api/generate", generate(tokens=5))
            assert short.fields["x-sollol-node"].endswith(str(nodes[0].port))
    bench.run_virtual(run())


@over_sockets
async def test_tokens_are_counted_here_by_what_answers_have_told():
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "word " * 800}], "max_tokens": 1}
    async with gateway_for(fixed(1)) as gateway:
        counts = []
        for _ in range(6):
            counted = await call(gateway, "POST", "/v1/messages/count_tokens", body)
            counts.append(counted.json()["input_tokens"])
            answer = (await call(gateway, "POST", "/v1/messages", body)).json()
        assert counts[0] == 1004 and counts[-1] == pytest.approx(answer["usage"]["input_tokens"], rel=0.15)


@pytest.mark.parametrize("flags, seen", [((), 1), (("--no-stable-prefix",), 2)])
def test_changing_first_block_of_claude_code_is_constant_for_nodes(flags, seen):
    async def run():
        bodies = [json.dumps({"model": "llama3.2", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}],
                              "system": [{**BILLED, "text": BILLED["text"].replace("6a2f1", hash)}]}).encode()
                  for hash in ("12345", "abcde")]
        node = fixed(1)
        async with gateway_for(node, flags=flags) as gateway:
            for body in bodies:
                assert (await call(gateway, "POST", "/v1/messages", body)).status == 200
            sent = {record.body for record in node.requests if record.path == "/v1/messages"}
            assert len(sent) == seen and all(json.loads(body)["system"][0]["text"] for body in sent)
    asyncio.run(run())


# -----------------------------------------------------------------------------
# Readiness: what nodes are asked before a request comes
# -----------------------------------------------------------------------------

def wishing_node(load, **more):
    """Return a simulated node that its line wants to hold models."""
    node = bench.SimNode("rtx3060", ["llama3.2", "llama3.1:8b", "qwen2.5:7b", "nomic-embed-text"], **more)
    node.line = f"name=box load={load}"
    return node


def load_requests(node):
    """Return (path, body) of the requests without a prompt that a node got."""
    bodies = [(record.path, json.loads(record.body)) for record in node.requests if record.path in (
        "/api/generate", "/api/embed")]
    return [(path, body) for path, body in bodies if not (body.get("prompt") or body.get("input"))]


def load_warnings(caplog):
    return [(record.msg["model"], record.msg["why"]) for record in caplog.records if isinstance(record.msg, dict)
            and record.msg.get("event") == "load" and record.levelname == "WARNING"]


def in_virtual_time(test):
    """Run an async test once, on the virtual clock: it waits for minutes."""
    signature = inspect.signature(test)

    @functools.wraps(test)
    def run(**given):
        bench.run_virtual(test(**given))

    run.__signature__ = signature
    return run


@in_virtual_time
async def test_wanted_models_are_there_when_the_node_comes_up_and_after_a_crash(caplog):
    node = wishing_node("llama3.2,nomic-embed-text", context=8192)
    async with gateway_for(node, flags=("--num-ctx", "llama3.2=16384")) as gateway:
        await asyncio.sleep(30.0)
        assert sorted(node.engine.resident) == ["llama3.2:latest", "nomic-embed-text:latest"]
        assert all(known.keep_alive_s == math.inf for known in node.engine.resident.values())
        assert node.engine.resident["llama3.2:latest"].context_length == 16384
        asked = load_requests(node)
        assert [(path, body["model"], body["keep_alive"], body["options"]) for path, body in asked] == [
            ("/api/generate", "llama3.2:latest", -1, {"num_ctx": 16384}),
            ("/api/embed", "nomic-embed-text:latest", -1, {})]
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert answer.status == 200 and answer.json().get("load_duration", 0) < 1e9
        node.kill()
        await asyncio.sleep(10.0)
        await node.restart()
        await asyncio.sleep(60.0)
        assert sorted(node.engine.resident) == ["llama3.2:latest", "nomic-embed-text:latest"] and node.loads == 4
        await asyncio.sleep(3600.0)
        assert node.loads == 4 and len(load_requests(node)) == 4 and load_warnings(caplog) == []


@in_virtual_time
async def test_wanted_model_comes_back_after_a_direct_user_pushed_it_out_and_has_left():
    node = wishing_node("llama3.1:8b", vram_gb=9.0, context=4096)
    async with gateway_for(node) as gateway:
        await asyncio.sleep(30.0)
        assert list(node.engine.resident) == ["llama3.1:8b"]
        for _ in range(8):              # somebody works there with another model, past the gateway, for four minutes
            await node.direct_user(model="qwen2.5:7b")
            assert list(node.engine.resident) == ["qwen2.5:7b"]
            await asyncio.sleep(30.0)
        assert node.loads == 2
        await asyncio.sleep(420.0)
        assert list(node.engine.resident) == ["llama3.1:8b"] and node.loads == 3
        assert (await call(gateway, "POST", "/api/generate", generate("llama3.1:8b"))).status == 200
        await asyncio.sleep(3600.0)
        assert node.loads == 3


@in_virtual_time
async def test_wanted_model_is_kept_although_a_client_lets_it_expire():
    node = wishing_node("llama3.2")
    async with gateway_for(node) as gateway:
        await asyncio.sleep(30.0)
        await call(gateway, "POST", "/api/generate", generate(keep_alive="1m"))
        await asyncio.sleep(600.0)
        assert list(node.engine.resident) == ["llama3.2:latest"] and node.loads == 1 and len(load_requests(node)) == 2


@in_virtual_time
async def test_wanted_model_that_a_node_lacks_is_one_warning_and_no_download(caplog):
    node = wishing_node("llama3.2,gemma3:4b")
    async with gateway_for(node):
        await asyncio.sleep(600.0)
        node.kill()
        await node.restart(5.0)
        await asyncio.sleep(600.0)
        assert load_warnings(caplog) == [("gemma3:4b", "the node does not have it; it can be pulled there")]
        assert not [record for record in node.requests if record.path == "/api/pull"]
        assert list(node.engine.resident) == ["llama3.2:latest"]


@in_virtual_time
async def test_two_wanted_models_that_do_not_fit_together_are_one_warning_and_no_loop(caplog):
    node = wishing_node("llama3.1:8b,qwen2.5:7b", vram_gb=9.0, context=4096)
    async with gateway_for(node):
        await asyncio.sleep(6 * 3600.0)
        assert load_warnings(caplog) == [("qwen2.5:7b", "it does not fit beside llama3.1:8b, which is named first")]
        assert list(node.engine.resident) == ["llama3.1:8b"] and node.loads == 3


@in_virtual_time
async def test_wanted_model_that_a_node_refuses_is_one_warning_and_no_loop(caplog):
    node = wishing_node("llama3.1:8b,llama3.2")
    node.fail(500, text="model requires more system memory (9.1 GiB) than is available", models=["llama3.1:8b"])
    async with gateway_for(node):
        await asyncio.sleep(3 * 3600.0)
        assert load_warnings(caplog) == [("llama3.1:8b", "the node cannot load it: 500: model requires more system "
                                          "memory (9.1 GiB) than is available")]
        assert [body["model"] for _, body in load_requests(node)] == ["llama3.1:8b", "llama3.2:latest"]


@in_virtual_time
async def test_wanted_model_is_not_loaded_while_somebody_is_served(caplog):
    node = wishing_node("llama3.1:8b", loaded=("llama3.2",), slots=1)
    async with gateway_for(node) as gateway:
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=1500))) for _ in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.gather(*tasks)
        assert load_requests(node) == []
        await asyncio.sleep(30.0)
        assert "llama3.1:8b" in node.engine.resident


@in_virtual_time
async def test_steady_queue_has_its_model_loaded_on_a_second_node():
    nodes = [bench.SimNode("rtx3060", ["llama3.1:8b"], slots=1, name=name) for name in ("a", "b")]
    nodes[0]._loaded = ("llama3.1:8b",)
    for node in nodes:
        node.line = f"name={node.name} slots=1"
    async with gateway_for(*nodes) as gateway:
        for _ in range(20):             # it is known how long they take
            await call(gateway, "POST", "/api/generate", generate("llama3.1:8b", tokens=40))
        end_s = asyncio.get_running_loop().time() + 120.0

        async def user():
            while asyncio.get_running_loop().time() < end_s:
                answer = await call(gateway, "POST", "/api/generate", generate("llama3.1:8b", tokens=40))
                assert answer.status == 200

        await asyncio.gather(user(), user(), user())
        assert nodes[1].loads == 1
        served = [sum(record.path == "/api/generate" for record in node.requests) for node in nodes]
        assert served[1] > 0.6 * served[0]
        body, = [body for _, body in load_requests(nodes[1])]
        assert "keep_alive" not in body


class Woken(asyncio.DatagramProtocol):
    """Listen for magic packets in place of a network card; the first one starts a node, after some seconds."""

    def __init__(self, node, after_s):
        self.node, self.after_s, self.packets, self.task = node, after_s, [], None

    def datagram_received(self, data, address):
        self.packets.append((asyncio.get_running_loop().time(), data))
        if self.task is None and self.node is not None:
            self.task = asyncio.ensure_future(self.node.restart(self.after_s))


@contextlib.asynccontextmanager
async def network_card(node, after_s=0.0):
    transport, card = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Woken(node, after_s), local_addr=("127.0.0.1", 0))
    card.address = "127.0.0.1:%d" % transport.get_extra_info("sockname")[1]
    try:
        yield card
    finally:
        transport.close()
        if card.task:
            await card.task


@over_sockets
async def test_waiting_request_wakes_the_only_node_that_has_its_model_and_is_served(caplog):
    caplog.set_level("INFO", "sollol")
    other, node = fixed(1, **FAST), await bench.SimNode(models=["mistral"], **FAST).start()
    other.line = "name=other"
    async with network_card(node, 1.5) as card:
        node.line = f"name=box mac=AA:BB:CC:DD:EE:FF wake={card.address} probe=300s"
        async with gateway_for(other, node, flags=("--probe-interval", "0.2")) as gateway:
            box = gateway.dispatcher.cluster.nodes["box"]
            node.kill()
            await gateway.node_io.probe(box)
            box.lost_s -= 3600.0
            assert not box.up and card.packets == [] and health(gateway)["status"] == "degraded"
            assert "mistral:latest" in (await call(gateway, "GET", "/api/tags")).body.decode()
            asking = asyncio.create_task(call(gateway, "POST", "/api/generate", generate("mistral")))
            await until(lambda: card.packets)
            await until(lambda: box.state(gateway.loop.time()) == "waking")
            stats = (await call(gateway, "GET", "/api/stats")).json()["nodes"]
            assert [row["state"] for row in stats] == ["up", "waking"]
            page = (await call(gateway, "GET", "/metrics")).body
            assert b'sollol_node_waking{node="box"} 1' in page and b'sollol_node_asleep{node="box"} 1' in page
            assert b'sollol_model_nodes{model="mistral:latest"} 1' in page
            page = sollol.dashboard_state(gateway, sollol.EVERY_MODEL)
            assert [row["state"] for row in page["nodes"]] == ["up", "waking"]
            answer = await asking
            assert answer.status == 200 and answer.fields["x-sollol-node"] == "box"
            assert [data for _, data in card.packets] == [sollol.magic_packet("aabbccddeeff")]
            assert 30.0 < box.sleep.usual_s < 40.0 and box.state(gateway.loop.time()) == "up"
    states = [(record.msg["was"], record.msg["state"]) for record in caplog.records if isinstance(record.msg, dict)
              and record.msg.get("event") == "node" and record.msg["node"] == "box"]
    assert ("waking", "up") in states and any(state == "waking" for _, state in states)


@in_virtual_time
async def test_node_that_does_not_wake_up_is_called_once_a_minute_and_then_given_up():
    node = await bench.SimNode(models=["mistral"]).start()
    async with network_card(None) as card:
        node.line = f"name=box mac=AA:BB:CC:DD:EE:FF wake={card.address}"
        async with gateway_for(node, flags=("--queue-timeout", "1000s")) as gateway:
            box = gateway.dispatcher.cluster.nodes["box"]
            node.kill()
            await gateway.node_io.probe(box)
            box.lost_s -= 3600.0
            asked_s = gateway.loop.time()
            answer = await call(gateway, "POST", "/api/generate", generate("mistral"))
            assert answer.status == 503 and 180 <= gateway.loop.time() - asked_s < 190
            assert (await call(gateway, "POST", "/api/generate", generate("mistral"))).status == 503
            times = [at_s for at_s, _ in card.packets]
            assert len(times) == 3 and all(later - at_s >= 60.0 for at_s, later in itertools.pairwise(times))


@in_virtual_time
async def test_node_with_probe_is_left_alone_so_that_it_can_fall_asleep():
    node = bench.SimNode()
    node.line = "probe=60s"
    async with gateway_for(node) as gateway:
        await asyncio.sleep(10.0)
        pool, = gateway.node_io.pools.values()
        assert pool.idle == []          # nothing that the kernel would watch
        seen = len(node.requests)
        for _ in range(20):
            await call(gateway, "GET", "/api/ps")
            await asyncio.sleep(30.0)
        asked = [record for record in list(node.requests)[seen:] if record.path == "/api/version"]
        assert 8 <= len(asked) <= 12 and len(node.requests) - seen <= 3 * 12
        node.kill()
        node_ = next(iter(gateway.dispatcher.cluster.nodes.values()))
        await until(lambda: not node_.up, 80.0)
        await node.restart()
        await asyncio.sleep(30.0)
        assert not node_.up             # it is not asked every second after it has gone either


# -----------------------------------------------------------------------------
# Failures of nodes
# -----------------------------------------------------------------------------

OK = framed(b'{"response":"fine","done":true}')


@pytest.mark.parametrize("bad", [
    [],                                                         # closes before the status line
    [b"HTTP/1.1 200"], [b"garbage\r\n\r\n"], [b"HTTP/1.1 200 OK\r\nA: b\nC: d\r\n\r\n"],
    [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"],
    [b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n"], [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000],
    [framed(b'{"error":"server busy"}', b"503 Service Unavailable"), KEEP],
    [framed(b"", b"502 Bad Gateway"), KEEP], [framed(b"{}", b"429 Too Many Requests"), KEEP],
    [framed(b'{"error":"llama runner process has terminated"}', b"500 Internal Server Error"), KEEP],
    [framed(b'{"error":"model \'llama3.2\' not found"}', b"404 Not Found"), KEEP],
], ids=lambda bad: repr(bad[0][:40]) if bad else "closes")
@over_sockets
async def test_failure_before_the_first_byte_is_not_seen_by_the_client(bad):
    nodes = [ScriptedNode(lambda request: bad), ScriptedNode(lambda request: [OK, KEEP])]
    async with gateway_for(*nodes, flags=["--policy", "round-robin"]) as gateway:
        for _ in range(2):
            answer = await call(gateway, "POST", "/api/generate", generate())
            assert (answer.status, answer.body) == (200, b'{"response":"fine","done":true}')
        assert len(nodes[0].requests) >= 1
        assert health(gateway)["inflight"] == 0


RUNNER_ERRORS = (           # of status 500: this runner is broken, another node may do it. There are more
    bench.STOPPED, "an error was encountered while running the model: unexpected EOF",
    "an error was encountered while running the model: read tcp 127.0.0.1:50001->127.0.0.1:50002: wsarecv: An existing "
    "connection was forcibly closed by the remote host.",
    "an error was encountered while running the model: GGML_ASSERT(n_tokens > 0) failed",
    'do embedding request: Post "http://127.0.0.1:50001/embedding": EOF',
    'POST predict: Post "http://127.0.0.1:50001/completion": EOF', "llama runner process has terminated: exit status 2",
    "timed out waiting for llama-server to start", "llama-server process no longer running: -1",
    "error starting llama-server: fork/exec /usr/lib/ollama/llama-server: input/output error",
    "llama-server binary not found", "error reading llama-server response: unexpected EOF",
    'health resp: Get "http://127.0.0.1:50001/health": EOF', "read /root/.ollama/models/blobs: input/output error",
    "CUDA error: an illegal memory access was encountered", "ggml_metal_graph_compute: command buffer 0 failed", "")


HTML = b"<html><body>upstream is away</body></html>"
BROKEN = {
    **{f"500 {text[:50]}": framed(json.dumps({"error": text}).encode(), b"500 Internal Server Error")
       for text in RUNNER_ERRORS},
    "500 without a body": framed(b"", b"500 Internal Server Error"),
    **{f"{status} of a proxy": framed(HTML, b"%d X" % status, b"text/html") for status in (
        301, 302, 307, 308, 401, 403, 408, 425, 429, 502, 503, 504, 520, 522, 524, 527, 530)},
    "404 of a route": framed(b"404 page not found", b"404 Not Found", b"text/plain"),
    "404 of the model": framed(b'{"error":"model \'llama3.2\' not found"}', b"404 Not Found"),
    "200 that begins with an error": chunked(b'{"error":"unexpected EOF"}\n'),
    "200 of events that begins with an error": chunked(b'data: {"error":{"message":"EOF"}}\n\n',
                                                       kind=b"text/event-stream"),
    "200 without anything": chunked(), "200 of length 0": framed(b""),
}


@pytest.mark.parametrize("kind", BROKEN)
@over_sockets
async def test_whatever_kind_of_failure_it_is_another_node_answers(kind):
    nodes = ScriptedNode(lambda request: [BROKEN[kind], KEEP]), ScriptedNode(lambda request: [OK, KEEP])
    async with gateway_for(*nodes) as gateway:
        first, second = gateway.dispatcher.cluster.nodes.values()
        first.version, second.version = "0.32.0", "0.33.0"
        first.rtt_s, second.rtt_s = 0.001, 0.002        # so it is asked first
        answer = await call(gateway, "POST", "/api/generate", generate(stream=True))
        assert (answer.status, answer.body, answer.fields["x-sollol-attempts"]) == (200, OK.rpartition(b"\r\n")[2], "2")
        assert second.errors == 0 and "llama3.2:latest" in second.rows
        known = first.runners["llama3.2:latest"]
        counted = first.breaker.failures + known.breaker.failures
        assert counted == (not kind.startswith("404")) and first.errors == (kind != "404 of a route")


@listed("status", [500, 502, 401, 429])
def test_node_that_fails_at_once_does_not_look_free(status):
    """Sixty requests to a broken and a good node: three at most touch the broken one."""
    async def run():
        nodes = [bench.SimNode(loaded=("llama3.2",), seed=seed) for seed in range(2)]
        async with gateway_for(*nodes) as gateway:
            nodes[0].fail(status)

            async def client():
                for _ in range(20):
                    assert (await call(gateway, "POST", "/api/generate", generate(tokens=8))).status == 200

            await asyncio.gather(*(client() for _ in range(3)))
            assert len(bench.inferences(nodes[0])) <= 3
    bench.run_virtual(run())


@table("model, path, refusal", [
    ("the cloud's limit", "gpt-oss:cloud", "/api/generate", framed(b'{"error":"limit"}', b"429 Too Many Requests")),
    ("a route that it lacks", "llama3.2", "/v1/responses",
     framed(b"404 page not found", b"404 Not Found", b"text/plain")),
    ("a prompt too long", "llama3.2", "/api/generate", framed(
        b'{"error":"the input length exceeds the context length"}', b"400 Bad Request")),
    ("no such feature", "llama3.2", "/api/generate", framed(
        b'{"error":"\\"llama3.2\\" does not support thinking"}', b"400 Bad Request")),
])
@over_sockets
async def test_refusal_that_is_no_fault_of_a_node_is_not_held_against_it(model, path, refusal):
    node = ScriptedNode(lambda request: [refusal, KEEP])
    async with gateway_for(node) as gateway:
        for _ in range(3):
            answer = await call(gateway, "POST", path, {**generate(model), "input": "x"})
            assert answer.body == refusal.rpartition(b"\r\n\r\n")[2]
        known, = gateway.dispatcher.cluster.nodes.values()
        assert known.breaker.failures == 0 and known.errors == 0 and known.rows and known.state(1e9) == "up"
        assert all(runner.breaker.failures == 0 for runner in known.runners.values())


def test_prompt_that_is_too_long_for_one_node_is_sent_to_the_one_with_the_larger_window():
    async def run():
        small = bench.SimNode("rtx4090", loaded=("llama3.2",), context=4096)
        large = bench.SimNode("rtx3060", loaded=("llama3.2",), context=32768)
        async with gateway_for(small, large) as gateway:
            answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(
                prompt=bench.worded(f"{number} <out=5> ", 10_000))) for number in range(4)))
            assert [answer.status for answer in answers] == [200] * 4
            answer = await call(gateway, "POST", "/api/generate", generate(prompt=bench.worded("<out=5> ", 40_000)))
            assert answer.status == 400 and b"context" in answer.body
            assert len(bench.inferences(small)) <= 5 and len(bench.inferences(large)) == 5
    bench.run_virtual(run())


@pytest.mark.parametrize("status", [b"400 Bad Request", b"401 Unauthorized", b"403 Forbidden", b"404 Not Found"])
@over_sockets
async def test_clients_own_mistakes_are_not_tried_elsewhere(status):
    nodes = [ScriptedNode(lambda request: [framed(b'{"error":"yours"}', status), KEEP], models=()) for _ in range(2)]
    async with gateway_for(*nodes) as gateway:
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert (answer.status, answer.body) == (int(status[:3]), b'{"error":"yours"}')
        assert len(nodes[0].requests) + len(nodes[1].requests) == 1


@over_sockets
async def test_if_all_refuse_the_client_gets_the_last_nodes_own_answer():
    refusal = framed(b'{"error":"server busy, please try again"}', b"503 Service Unavailable")
    nodes = [ScriptedNode(lambda request: [refusal, KEEP]) for _ in range(5)]
    async with gateway_for(*nodes) as gateway:
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert (answer.status, answer.json()) == (503, {"error": "server busy, please try again"})
        assert answer.fields["x-sollol-attempts"] == "3"
        assert sum(len(node.requests) for node in nodes) == 3


@over_sockets
async def test_if_all_die_the_client_gets_a_502_that_names_the_node():
    async with gateway_for(ScriptedNode(), ScriptedNode()) as gateway:
        answer = await call(gateway, "POST", "/v1/completions", generate())
        assert answer.status == 502 and "127.0.0.1:" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path, kind, piece, ending", [
    ("/api/chat", b"application/x-ndjson", NDJSON[0], rb'\{"error": "127[^\n]*"\}\n'),
    ("/v1/chat/completions", b"text/event-stream", SSE[0], rb'data: \{"error": \{"message": "127[^\n]*\}\}\n\n'),
    ("/v1/messages", b"text/event-stream", SSE[0],
     rb'event: error\ndata: \{"type": "error", "error": \{[^\n]*\}\}\n\n'),
])
@over_sockets
async def test_stream_whose_node_dies_ends_with_an_error_line_and_a_clean_end(path, kind, piece, ending):
    for cut in (chunked(piece, kind=kind, end=b""), chunked(piece, kind=kind, end=b"50\r\n{\"half")):
        async with gateway_for(ScriptedNode(lambda request, cut=cut: [cut, 0.05])) as gateway:
            caller = await Caller.to(gateway)
            answer = await caller.ask("POST", path, {"model": "llama3.2", "messages": [], "stream": True})
            assert answer.body.startswith(piece)
            assert re.fullmatch(rb'(\{"half\n+)?' + ending, answer.body[len(piece):]), answer.body
            assert (await caller.ask("GET", "/")).status == 200
            caller.close()


def named_event(name, **fields):
    return b"event: %b\ndata: %b\n\n" % (name.encode(), json.dumps({"type": name, **fields}).encode())


@table("path, pieces", [
    ("chat", "/v1/chat/completions", SSE), ("chat with CRLF", "/v1/chat/completions", CRLF),
    ("last event in two parts", "/v1/chat/completions", (SSE[0], SSE[1][:-1], SSE[1][-1:])),
    ("messages", "/v1/messages",
     (named_event("content_block_delta", delta={"text": "He"}), named_event("message_stop"))),
    ("responses", "/v1/responses", (
        named_event("response.output_text.delta", delta="He"),
        named_event("response.completed", response={"output": "x" * 3000, "error": None, "usage": {
            "input_tokens": 3, "output_tokens": 1, "total_tokens": 4}, "tools": []}))),
])
@over_sockets
async def test_no_error_stands_behind_the_last_event_of_a_stream(path, pieces):
    script = [chunked(pieces[0], kind=b"text/event-stream", end=b""), 0.03,
              *(it for piece in pieces[1:] for it in (b"%x\r\n%b\r\n" % (len(piece), piece), 0.03))]
    async with gateway_for(ScriptedNode(lambda request: script)) as gateway:
        answer = await call(gateway, "POST", path, {"model": "llama3.2", "messages": [], "stream": True})
        assert answer.body == b"".join(pieces)
    async with gateway_for(ScriptedNode(lambda request: script[:-2])) as gateway:
        answer = await call(gateway, "POST", path, {"model": "llama3.2", "messages": [], "stream": True})
        begun = b"".join(piece for piece in pieces[:-1] if piece.endswith((b"\n\n", b"\n\r\n")))   # no half one
        assert answer.body.startswith(begun) and b'"error": {' in answer.body[len(begun):]


@over_sockets
async def test_fixed_length_answer_whose_node_dies_is_cut_and_never_padded():
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 2_000_000  # more than is held
    async with gateway_for(ScriptedNode(lambda request: [cut, 0.05])) as gateway:
        caller = await Caller.to(gateway)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await caller.ask("POST", "/api/generate", generate())
        caller.close()
        await until(lambda: health(gateway)["inflight"] == 0)


REFUSED = "[Errno 111] Connect call failed ('{}', 11434)"


@table("error, text", [
    ("one address", OSError(111, "Connect call failed ('127.0.0.1', 11434)"), "Connection refused"),
    ("two addresses", OSError(f"Multiple exceptions: {REFUSED.format('::1')}, {REFUSED.format('127.0.0.1')}"),
     "Connection refused"),
    ("two reasons", OSError("Multiple exceptions: [Errno 101] x, [Errno 113] y"),
     "Network is unreachable, No route to host"),
    ("no such name", socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
    ("its number on other systems", socket.gaierror(8, "nodename nor servname provided"),
     "nodename nor servname provided"),
    ("no number", OSError("odd"), "odd")])
def test_failed_connection_is_told_in_the_systems_words_each_once(error, text):
    assert sollol.connect_error_text(error) == text


@over_sockets
async def test_pooled_connection_that_died_unseen_is_replaced():
    node = bench.SimNode(**FAST)
    async with gateway_for(node) as gateway:
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
        node.kill()
        await node.restart()
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert (answer.status, answer.fields["x-sollol-attempts"]) == (200, "1")


@over_sockets
async def test_connection_is_used_again_after_an_answer_as_long_as_what_is_read_ahead(monkeypatch):
    monkeypatch.setattr(sollol, "READ_AHEAD_BYTES", 1000)
    answer = framed(b'{"response":"' + b"x" * 920 + b'","done":true}')
    node = ScriptedNode(lambda request: [answer, KEEP])
    assert len(answer) > 1000
    async with gateway_for(node) as gateway:
        for _ in range(3):
            assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
        assert len(node.connections) == 1


@over_sockets
async def test_bytes_behind_an_answer_never_reach_the_next_one():
    node = ScriptedNode(lambda request: [OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", KEEP])
    async with gateway_for(node) as gateway:
        caller = await Caller.to(gateway)
        for _ in range(3):
            answer = await caller.ask("POST", "/api/generate", generate())
            assert answer.body == b'{"response":"fine","done":true}'
        caller.close()


@over_sockets
async def test_every_node_is_logged_once_at_the_start_with_its_models(caplog):
    caplog.set_level("INFO", "sollol")
    sollol.LOG.propagate = True
    nodes = [bench.SimNode(models=("mistral", "llama3.2"), **FAST), bench.SimNode(latency_s=0.3, **FAST),
             bench.SimNode(models=(), **FAST)]
    async with gateway_for(*nodes) as gateway:
        await until(lambda: health(gateway)["nodes"]["up"] == 3)
        await until(lambda: len(gateway.node_io.logged_states) == 3)
        await asyncio.sleep(2 * sollol.SWEEP_S)
    told = [ast.literal_eval(line) for line in caplog.messages if "'event': 'node'" in line]
    assert {it["url"]: (it["state"], it["models"]) for it in told} == {
        nodes[0].url: ("up", "llama3.2:latest mistral:latest"), nodes[1].url: ("up", "llama3.2:latest"),
        nodes[2].url: ("up", "")}
    assert len(told) == 3


@over_sockets
async def test_bad_nodes_at_the_start_delay_nobody():
    """Dead, instantly failing and hanging nodes beside a good one."""
    good, failing, frozen = bench.SimNode(loaded=("llama3.2",), **FAST), bench.SimNode(**FAST), bench.SimNode(**FAST)
    for node in (failing, frozen):
        await node.start()
    failing.fail(503)
    frozen.freeze()
    dead = bench.SimNode(port=1)
    dead.start = dead.stop = lambda: asyncio.sleep(0)
    async with gateway_for(dead, frozen, failing, good) as gateway:
        now = asyncio.get_running_loop().time
        for _ in range(10):
            started_s = now()
            assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
            assert now() - started_s < 0.5
        assert (await call(gateway, "GET", "/api/tags")).status == 200


EVERY_PATH = [route.path for route in bench.ENDPOINTS]


@pytest.mark.parametrize("paths", [None, EVERY_PATH], ids=["inference", "everything"])
def test_of_five_nodes_a_failing_and_a_silent_one_cost_nothing_and_get_next_to_nothing(paths):
    """A virtual minute; one node answers 503 at once, to inferences or to everything, one accepts and is silent."""
    async def main():
        nodes = [bench.SimNode("rtx4090", loaded=("llama3.2",), seed=seed, tokens_per_line=16) for seed in range(5)]
        async with gateway_for(*nodes) as gateway:
            nodes[0].fail(503, paths)
            nodes[1].freeze()
            statuses, asked = [], lambda: [len(bench.inferences(node)) for node in nodes]
            settled = []

            async def client(number):
                await asyncio.sleep(number / 10)
                while gateway.loop.time() < 60:
                    if not settled and gateway.loop.time() > 5:
                        settled.extend(asked())
                    answer = await call(gateway, "POST", "/api/generate", generate(tokens=60, stream=number % 2 == 0))
                    statuses.append(answer.status == 200 and b'"done":true' in answer.body)

            await asyncio.gather(*(client(number) for number in range(8)))
            later = [now - before for now, before in zip(asked(), settled, strict=True)]
            assert len(statuses) > 500 and sum(statuses) >= 0.99 * len(statuses)
            assert later[0] + later[1] < sum(later) / 50, later
    bench.run_virtual(main())


@listed("body, text", [
    (b'{"error":"odd\\u001b[31m\\nthing"}', "answered 500: odd [31m thing"), (b"", "answered 500"),
    (b'{"error":{"message":"x' + b"y" * 300 + b'"}}', "answered 500: x" + "y" * 199),
    (b"<html>\r\n\x00oops \xff</html>", "answered 500: <html> oops \ufffd</html>"), (b"[1]", "answered 500: [1]")])
def test_error_text_of_a_node_is_one_short_line(body, text):
    head = sollol.parse_response(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", "POST")
    assert sollol.NodeAnswer("n1", None, head, body).text == text


@over_sockets
async def test_node_that_answers_only_errors_is_not_up_and_says_why(caplog):
    """Its errors are the client's, as far as one can tell: so it is used all the same."""
    sollol.LOG.propagate = True
    node = ScriptedNode(lambda request: [framed(b'{"error":"odd thing"}', b"500 No"), KEEP])
    async with gateway_for(node, flags=["--probe-interval", "0.2"]) as gateway:
        for number in range(4):
            told = (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]
            assert told["state"] == ("up" if number < 3 else "suspect")
            assert (await call(gateway, "POST", "/api/generate", generate())).status == 500
        told = (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]
        assert told["error_share"] == 1.0 and 0 <= told["last_error"].pop("ago_s") < 5
        assert told["last_error"] == {"text": "answered 500: odd thing", "status": 500}
        answer = await call(gateway, "GET", "/api/health")
        assert answer.status == 200 and answer.json()["status"] == "degraded"
        assert answer.json()["nodes"] == {"up": 0, "draining": 0, "down": 0, "total": 1}
        shown = json.loads(gateway.telemetry.snapshot())["nodes"][0]
        assert (shown["state"], shown["kind"], shown["errors"]) == ("suspect", "failing", 4)
        await until(lambda: "'state': 'suspect'" in caplog.text)
        node.script = lambda request: [framed(b'{"done":true}'), KEEP]
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
        told = (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]
        assert (told["state"], told["error_share"]) == ("up", 0.8)
    assert caplog.text.count("'kind': 'model', 'why': 'answered 500: odd thing'") == 4
    state, = (it for it in caplog.records if isinstance(it.msg, dict) and it.msg.get("state") == "suspect")
    assert (state.levelname, state.msg["why"]) == ("WARNING", "answered 500: odd thing")


def test_errors_of_the_last_minute_are_forgotten_after_it():
    errors = sollol.ErrorShare()
    assert errors.share(0.0) is None
    for now, error in ((0.0, True), (1.0, True), (30.0, False), (59.0, True)):
        errors.add(error, now)
    assert errors.share(59.0) == 0.75 and not errors.is_all(59.0)
    assert errors.share(65.0) == 0.5 and errors.share(100.0) == 1.0 and errors.share(125.0) is None
    for _ in range(2):
        errors.add(True, 100.0)
    assert errors.is_all(100.0) and not errors.is_all(125.0)


@over_sockets
async def test_node_that_traffic_finds_dead_is_warned_about_with_the_reason(caplog):
    sollol.LOG.propagate = True
    caplog.set_level("INFO", "sollol")
    nodes = [fixed(1, **FAST), fixed(1, **FAST)]
    async with gateway_for(*nodes, flags=["--probe-interval", "1000"]) as gateway:
        first, second = gateway.dispatcher.cluster.nodes.values()
        first.rtt_s, second.rtt_s = 0.001, 0.002        # so it is asked first
        nodes[0].kill()
        for _ in range(4):
            assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
        await until(lambda: "'state': 'down'" in caplog.text)
        stats = (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]
        assert stats["last_error"]["status"] is None and "no connection" in stats["last_error"]["text"]
    down, = (it for it in caplog.records if isinstance(it.msg, dict) and it.msg.get("state") == "down")
    assert down.levelname == "WARNING" and down.msg["why"] == stats["last_error"]["text"]


@over_sockets
async def test_all_down_is_said_at_once_but_an_inference_waits_for_a_node_that_comes_back():
    node = bench.SimNode(**FAST)
    async with gateway_for(node, flags=["--probe-interval", "0.5"]) as gateway:
        node.kill()
        await until(lambda: health(gateway)["nodes"]["up"] == 0)
        now = asyncio.get_running_loop().time
        waiting = asyncio.create_task(call(gateway, "POST", "/api/generate", generate()))
        for method, path in (("GET", "/api/tags"), ("POST", "/api/show")):
            started_s = now()
            answer = await call(gateway, method, path, generate())
            assert answer.status == 503 and int(answer.fields["retry-after"]) >= 1
            assert now() - started_s < 0.2
        assert (await call(gateway, "GET", "/api/health")).status == 503
        await node.restart()
        assert (await waiting).status == 200


def test_restart_of_the_only_holder_costs_no_request_that_had_shown_no_byte():
    """Two running, of one slot each, the others queued; the node is gone for two seconds."""
    async def main():
        node, other = bench.SimNode(loaded=("llama3.2",), slots=2), bench.SimNode(models=("mistral",))
        async with gateway_for(node, other) as gateway:
            tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50))) for _ in range(8)]
            await asyncio.sleep(0.5)
            node.kill()
            await asyncio.sleep(2.0)
            await node.restart()
            assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}
    bench.run_virtual(main())


@over_sockets
async def test_killed_node_costs_no_request_that_does_not_stream():
    nodes = [bench.SimNode(loaded=("llama3.2",), speed=10) for _ in range(3)]
    async with gateway_for(*nodes) as gateway:
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=60))) for _ in range(30)]
        await until(lambda: nodes[0].in_flight > 0)
        nodes[0].kill()
        assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}


def test_wedged_node_is_found_and_its_requests_move():
    """The card stands still while /api/version answers: requests without a byte run again elsewhere."""
    async def main():
        nodes = [bench.SimNode("rtx4090", loaded=("llama3.2",)), bench.SimNode(loaded=("llama3.2",))]
        async with gateway_for(*nodes) as gateway:
            for _ in range(10):
                await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(tokens=50, stream=True))
                                       for _ in range(3)))
            nodes[0].hang()
            answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(tokens=50, stream=True))
                                             for _ in range(6)))
            assert {answer.status for answer in answers} == {200}
            first = next(iter(gateway.dispatcher.cluster.nodes.values()))
            assert first.suspect
            nodes[0].recover()
            await asyncio.sleep(30)
            assert not first.suspect
    bench.run_virtual(main())


def test_cold_load_of_a_minute_is_neither_aborted_nor_sent_twice():
    async def main():
        nodes = [bench.SimNode(speed=0.05), bench.SimNode(speed=0.05)]
        async with gateway_for(*nodes) as gateway:
            answer = await call(gateway, "POST", "/api/generate", generate(tokens=5))
            assert answer.status == 200 and answer.fields["x-sollol-attempts"] == "1"
            assert answer.json()["load_duration"] > 40e9
            assert sum(node.loads for node in nodes) == 1 and sum(node.aborted for node in nodes) == 0
    bench.run_virtual(main())


@over_sockets
async def test_node_that_crashed_with_many_requests_is_used_again_at_once():
    node = bench.SimNode(slots=8, loaded=("llama3.2",), speed=5)
    node.line = "slots=8"
    async with gateway_for(node, flags=["--probe-interval", "0.5"]) as gateway:
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=300, stream=True)))
                 for _ in range(8)]
        await until(lambda: node.in_flight == 8)
        node.kill()
        await node.restart()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1.5)
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200


@over_sockets
async def test_dropped_node_is_forgotten_with_its_connections_once_it_is_idle(tmp_path):
    one, two, hosts = await one_of_two(tmp_path, loaded=("llama3.2",), speed=1)
    async with gateway_for(one, two, hosts=hosts) as gateway:
        task = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=200)))
        await until(lambda: one.in_flight == 1)
        hosts.write_text(f"{two.url} name=two\n")
        await until(lambda: list(gateway.dispatcher.cluster.nodes) == ["two"])
        assert health(gateway)["inflight"] == 1
        assert (await task).status == 200
        await until(lambda: len(gateway.node_io.pools) == 1 and not one.connections)


@over_sockets
async def test_node_that_is_dropped_while_it_is_measured_keeps_no_connection(tmp_path):
    one, two = await fixed(1, speed=0.3).start(), await bench.SimNode(**FAST).start()
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"{one.url} name=one\n{two.url} name=two\n")
    async with gateway_for(one, two, hosts=hosts) as gateway:
        node = gateway.dispatcher.cluster.nodes["one"]
        gateway.node_io.begin_job(node, sollol.calibrate)
        await until(lambda: one.in_flight)
        hosts.write_text(f"{two.url} name=two\n")
        gateway.files.reload()
        await until(lambda: node not in gateway.node_io.pools)
        await until(lambda: not gateway.node_io.jobs and not one.connections and not node.leases)


def test_node_that_is_dropped_while_it_is_looked_at_is_looked_at_no_longer(caplog):
    async def main():
        one, two = bench.SimNode(**FAST), bench.SimNode(**FAST)
        async with gateway_for(one, two) as gateway:
            gateway.loop.set_exception_handler(gateway.listener.report)
            node = next(iter(gateway.dispatcher.cluster.nodes.values()))
            one.freeze()
            gateway.node_io.begin_job(node, sollol.NodeIO.probe)
            await asyncio.sleep(1)
            gateway.configure(gateway.sources.lines[1:])
            await until(lambda: node not in gateway.node_io.pools)
            gateway.node_io.begin_job(node, sollol.NodeIO.probe)
            one.recover()
            await until(lambda: not gateway.node_io.jobs)
            gc.collect()
            await asyncio.sleep(1)
    bench.run_virtual(main())
    assert "ERROR" not in {it.levelname for it in caplog.records}


@over_sockets
async def test_node_that_comes_back_keeps_its_connections_in_one_pool(tmp_path):
    node, other = await fixed(1, speed=1).start(), await bench.SimNode(**FAST).start()
    hosts, line = tmp_path / "hosts.txt", f"{node.url} name=one slots=1\n"
    hosts.write_text(line)
    async with gateway_for(node, other, hosts=hosts) as gateway:
        running = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=100)))
        await until(lambda: node.in_flight == 1)
        for text in (f"{other.url}\n", line):
            hosts.write_text(text)
            gateway.files.reload()
        queued = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=100)))
        await until(lambda: health(gateway)["queued"] == 1)
        assert {(await task).status for task in (running, queued)} == {200}
        assert node.max_in_flight == 1
        pool, = gateway.node_io.pools.values()
        await until(lambda: len(pool.idle) == len(node.connections))


# -----------------------------------------------------------------------------
# Do no harm: what one plain Ollama would have answered, the gateway answers
# -----------------------------------------------------------------------------

WHOLE_ENDS = {"/api/chat": b'"done":true', "/api/generate": b'"done":true', OPENAI: b"data: [DONE]\n\n",
              "/v1/responses": b"response.completed", "/v1/messages": b"message_stop", "/api/embed": b'"embeddings"'}


def slow_nodes(count, **more):
    """Return nodes without a card, the model in memory: 100 tokens/s of a prompt, one slot."""
    given = {"models": ("llama3.2:1b",), "loaded": ("llama3.2:1b",), "context": 32768, **more}
    return [bench.SimNode("cpu-small", seed=seed, **given) for seed in range(count)]


def said(text, **more):
    return {"model": "llama3.2:1b", "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 30,
            **more}


BIG_TOOLS = [{"type": "function", "function": {"name": f"tool_{number}", "description": "word " * 120,
                                               "parameters": {"type": "object"}}} for number in range(55)]
RESULT = "line of a file\n" * 4000
HEAVY = {
    "a picture": ("/api/chat", {"model": "llama3.2:1b", "messages": [
        {"role": "user", "content": "what is it? <out=5>", "images": ["aGk="]}]}),
    "36 KB of tools": ("/api/chat", said("<out=5> <call> hi", tools=BIG_TOOLS)),
    "36 KB of tools, for OpenAI's": (OPENAI, said("<out=5> <call> hi", tools=BIG_TOOLS)),
    "60 KB of results, for OpenAI's": (OPENAI, said("<out=5>", messages=[
        {"role": "tool", "content": RESULT}, {"role": "user", "content": "<out=5>"}])),
    "60 KB of results, for Anthropic's": ("/v1/messages", said("", messages=[
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": RESULT},
                                     {"type": "text", "text": "<out=5>"}]}])),
    "60 KB of results, as responses": ("/v1/responses", {"model": "llama3.2:1b", "stream": True, "input": [
        {"type": "function_call_output", "call_id": "x", "output": RESULT}, {"role": "user", "content": "<out=5>"}]}),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("asked", HEAVY)
def test_answer_whose_first_byte_comes_late_is_whole(asked, count):
    """Of nodes that were never measured; the same twice, so that the second is judged by what the first has taught."""
    async def run():
        path, body = HEAVY[asked]
        async with gateway_for(*slow_nodes(count)) as gateway:
            for number in range(2):
                started_s = gateway.loop.time()
                answer = await call(gateway, "POST", path, body)
                assert answer.status == 200 and WHOLE_ENDS[path] in answer.body, answer.body[-300:]
                assert number or gateway.loop.time() - started_s > 14
            assert sum(node.errors for node in gateway.dispatcher.cluster.nodes.values()) == 0
    bench.run_virtual(run())


@pytest.mark.parametrize("count", [1, 2, 3])
@table("script", [
    ("150 s of silence in a stream", [chunked(b'{"response":"a"}\n', end=b""), 150.0,
                                      b'1e\r\n{"done":true,"eval_count":1}\n\r\n0\r\n\r\n', KEEP]),
    ("a first byte after 1,000 s", [1000.0, framed(b'{"response":"a","done":true}'), KEEP]),
])
def test_silence_ends_no_answer(script, count):
    script = [item.replace(b"1e\r\n", b"%x\r\n" % len(b'{"done":true,"eval_count":1}\n')) if isinstance(item, bytes)
              else item for item in script]

    async def run():
        async with gateway_for(*(ScriptedNode(lambda request: script) for _ in range(count))) as gateway:
            answer = await call(gateway, "POST", "/api/generate", generate(stream=True))
            assert answer.status == 200 and b'"done":true' in answer.body
            assert answer.fields["x-sollol-attempts"] == "1" or count > 1
    bench.run_virtual(run())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_long_chats_in_turn_on_one_slot_are_answered_turn_by_turn(count):
    async def run():
        async with gateway_for(*slow_nodes(count)) as gateway:
            chats = [[{"role": "user", "content": bench.worded(f"chat {number} <out=5> ", 10_000)}]
                     for number in (1, 2)]
            for turn in range(4):
                for chat in chats:
                    answer = await call(gateway, "POST", "/api/chat", {"model": "llama3.2:1b", "messages": chat})
                    assert answer.status == 200 and b'"done":true' in answer.body
                    chat += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": f"{turn} <out=5>"}]
    bench.run_virtual(run())


def test_small_requests_beside_a_silent_tool_call_take_no_longer_than_directly():
    """One node of two slots: the call writes 900 tokens, which nobody sees."""
    async def run():
        async def small(address):
            started_s = asyncio.get_running_loop().time()
            caller = bench.Caller(*address)
            answer = await caller.call(json.dumps(said("short <out=5>", model="llama3.2")).encode())
            caller.close()
            assert answer.status == 200
            return asyncio.get_running_loop().time() - started_s

        async def took(gateway, address):
            silent = asyncio.create_task(call(gateway, "POST", "/api/chat", said(
                "<call> <out=900>", model="llama3.2", tools=BIG_TOOLS[:1])))
            await asyncio.sleep(1.0)
            found = [await small(address) for _ in range(8)]
            assert (await silent).status == 200
            return sum(found) / 8

        node = bench.SimNode(slots=2, loaded=("llama3.2",), silent_tools=True)
        async with gateway_for(node) as gateway:
            through = await took(gateway, gateway.listener.address)
            directly = await took(gateway, ("127.0.0.1", node.port))
            assert through < 1.1 * directly + 0.05
            assert not next(iter(gateway.dispatcher.cluster.nodes.values())).errors
    bench.run_virtual(run())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_long_prefill_after_three_short_prompts_is_whole(count):
    async def run():
        async with gateway_for(*slow_nodes(count)) as gateway:
            for tokens in (20, 20, 20, 3500):
                answer = await call(gateway, "POST", "/api/chat", said(bench.worded("hi <out=5> ", tokens)))
                assert answer.status == 200 and b'"done":true' in answer.body
    bench.run_virtual(run())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_requests_behind_four_direct_users_of_a_node_wait_and_are_answered(count):
    async def run():
        nodes = slow_nodes(count)
        async with gateway_for(*nodes) as gateway:
            users = [asyncio.create_task(node.direct_user(40, 200, requests=50)) for node in nodes for _ in range(4)]
            for _ in range(4):
                answer = await call(gateway, "POST", "/api/chat", said("hi <out=5>"))
                assert answer.status == 200 and b'"done":true' in answer.body
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)
    bench.run_virtual(run())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_keep_alive_of_nothing_loads_again_for_every_request(count):
    async def run():
        nodes = [bench.SimNode("cpu", models=("llama3.2",), speed=1.0, seed=seed) for seed in range(count)]
        async with gateway_for(*nodes) as gateway:
            for _ in range(7):
                answer = await call(gateway, "POST", "/api/chat", said("hi <out=3>", model="llama3.2", keep_alive=0))
                assert answer.status == 200 and b'"done":true' in answer.body
                await asyncio.sleep(1.0)
            assert sum(node.loads for node in nodes) == 7 and sum(node.aborted for node in nodes) == 0
    bench.run_virtual(run())


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_two_models_that_swap_on_one_card_are_both_answered(count, blocks):
    async def run():
        models = ("qwen3:14b", "phi4:14b")
        nodes = [bench.SimNode("rtx3060", models=models, vram_gb=12, ps_blocks=blocks, seed=seed)
                 for seed in range(count)]
        async with gateway_for(*nodes) as gateway:
            async def client(model):
                for number in range(6):
                    answer = await call(gateway, "POST", "/api/chat", said(f"{number} <out=40>", model=model))
                    assert answer.status == 200 and b'"done":true' in answer.body

            await asyncio.gather(*(client(model) for model in models for _ in range(2)))
            assert not any(record.aborted for node in nodes for record in bench.inferences(node))
    bench.run_virtual(run())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_twelve_thousand_texts_are_embedded_however_long_that_takes(count):
    async def run():
        nodes = [bench.SimNode("cpu-small", models=("nomic-embed-text",), loaded=("nomic-embed-text",), seed=seed)
                 for seed in range(count)]
        async with gateway_for(*nodes) as gateway:
            started_s = gateway.loop.time()
            answer = await call(gateway, "POST", "/api/embed", {
                "model": "nomic-embed-text", "input": [f"text {number}" for number in range(12_000)]})
            assert answer.status == 200 and len(answer.json()["embeddings"]) == 12_000
            assert gateway.loop.time() - started_s > 20 / count
    bench.run_virtual(run())


def test_start_up_measurement_of_slow_nodes_delays_nobody_by_more_than_a_second():
    async def took(*flags):
        async with gateway_for(*slow_nodes(2), flags=["--no-calibrate", *flags]) as gateway:
            gateway.options.calibrate = not flags
            await asyncio.sleep(1.0)
            started_s, found = gateway.loop.time(), []
            for number in range(6):
                answer = await call(gateway, "POST", "/api/chat", said(f"{number} <out=3>"))
                assert answer.status == 200
                found.append(gateway.loop.time() - started_s)
                started_s = gateway.loop.time()
            return max(found)

    assert bench.run_virtual(took()) < bench.run_virtual(took("--seed", "2")) + 1.0


@pytest.mark.parametrize("fault", ["hang", "freeze"])
def test_wedged_node_among_three_costs_a_wait_and_no_error(fault):
    """It accepts and never answers, or is stopped as a whole; under load, for the whole run."""
    async def p95_s(harm):
        nodes = [bench.SimNode("rtx3060", loaded=("llama3.2",), seed=seed, drawn=True) for seed in range(3)]
        async with gateway_for(*nodes) as gateway:
            found = []

            async def client(number):
                for turn in range(40):
                    if harm and (number, turn) == (0, 4):
                        getattr(nodes[0], fault)()
                    started_s = gateway.loop.time()
                    answer = await call(gateway, "POST", "/api/chat", said(
                        f"{number} {turn} <out={40 + 10 * turn % 90}>", model="llama3.2"))
                    assert answer.status == 200 and b'"done":true' in answer.body
                    found.append(gateway.loop.time() - started_s)

            await asyncio.gather(*(client(number) for number in range(3)))
            return sorted(found)[int(0.95 * len(found))]

    assert bench.run_virtual(p95_s(True)) < 1.5 * bench.run_virtual(p95_s(False))


def test_two_gateways_before_the_same_nodes_doubt_none_of_them_for_long():
    async def run():
        nodes = [bench.SimNode("rtx3060", loaded=("llama3.2",), seed=seed, drawn=True) for seed in range(3)]
        async with gateway_for(*nodes) as one, gateway_for(*nodes) as two:
            doubted = collections.Counter()

            async def client(gateway, number):
                for turn in range(25):
                    answer = await call(gateway, "POST", "/api/chat", said(
                        f"{number} {turn} <out={30 + 20 * turn % 200}>", model="llama3.2"))
                    assert answer.status == 200 and b'"done":true' in answer.body

            async def watcher():
                while True:
                    for gateway in (one, two):
                        for node in gateway.dispatcher.cluster.nodes.values():
                            doubted[gateway, node] = node.suspect and doubted[gateway, node] + 1
                            assert doubted[gateway, node] <= 10
                    await asyncio.sleep(0.5)

            watching = asyncio.create_task(watcher())
            await asyncio.gather(*(client(gateway, number) for gateway in (one, two) for number in range(6)))
            assert not watching.done()
            watching.cancel()
    bench.run_virtual(run())


@pytest.mark.parametrize("peers", [False, True], ids=["strangers", "peers"])
def test_two_gateways_share_nodes_fairly_and_the_one_that_survives_has_all_slots(peers):
    """The second one comes when the first has learned all slots, and dies in the end; its clients ask again."""
    scenario, = (one for one in bench.twin_scenarios(["mild3"]) if (one.clients, len(one.models)) == (20, 1))
    run = bench.simulate_twins(scenario, 2, 2, peers)
    assert min(run.counts) >= 0.8 * max(run.counts) and not run.lost
    assert run.survived.per_s >= 0.85 * run.shared.per_s


@contextlib.contextmanager
def counting_memory():
    """Trace memory, and let only reference counts free it: a cycle would keep a body for long."""
    gc.disable()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("end", ["404", "500", "late"])
@over_sockets
async def test_finished_request_holds_nothing_however_it_ended(end):
    """120 that fail, with bodies of 4 MiB."""
    nodes = [bench.SimNode(loaded=("llama3.2",), **FAST) for _ in range(2)]
    async with gateway_for(*nodes, flags=["--queue-timeout", "1"]) as gateway:
        body = json.dumps(generate("none" if end == "404" else "llama3.2", prompt="x" * 2**22)).encode()
        for node in nodes:
            if end == "500":
                node.fail(500)
            elif end == "late":
                node.slow(1000)

        async def one():
            caller = await Caller.to(gateway)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(6.0):
                    await caller.ask("POST", "/api/generate", body)
            caller.close()

        await one()
        with counting_memory():
            before_bytes = tracemalloc.get_traced_memory()[0]
            for _ in range(12):
                await asyncio.gather(*(one() for _ in range(10)))
            for node in nodes:
                node.recover()
            await until(lambda: not health(gateway)["inflight"] and not gateway.listener.clients)
            assert tracemalloc.get_traced_memory()[0] - before_bytes < 20 * 2**20


def test_wrong_beliefs_cost_little_and_no_request():
    """Speeds 100 times off, slots 1 to 8, lengths 50 times off; `bench.py --misled 200` tries more of them."""
    seen = [bench.misled(seed) for seed in range(1, 6 * FUZZ)]
    assert all(not found.failed and found.ratio < bench.MISLED_MOST for found in seen), seen
    assert sorted(found.idle_s for found in seen)[-1 - len(seen) // 5] <= bench.IDLE_MOST_S, seen


# -----------------------------------------------------------------------------
# Edited answers: aliases, counts of tokens
# -----------------------------------------------------------------------------

TEXT_PATHS = "/api/generate", "/api/chat", "/v1/completions", OPENAI, "/v1/responses", "/v1/messages"
NAMED = sollol.Alias(b'"cl\\u0061ude"', "Qwen3:latest")
TRAP = '\\"model\\":\\"qwen3\\" "model" \\'      # in a text
CALL_TRAP = {"model": "qwen3", "response": {"model": "qwen3"}, "message": {"model": "qwen3"}}


def both(make):
    """Return what a node says, and what the client gets: `make(name)` is JSON of one answer, compact."""
    text = json.dumps(make("qwen3"), separators=(",", ":")).encode()
    return text, json.dumps(make("\0name"), separators=(",", ":")).encode().replace(b'"\\u0000name"', NAMED.asked)


ANSWERED = {
    "generate": both(lambda name: {"model": name, "created_at": "x", "response": TRAP, "done": False}),
    "chat": both(lambda name: {"model": name, "message": {"role": "assistant", "content": TRAP, "tool_calls": [
        {"function": {"name": "f", "arguments": CALL_TRAP}}]}, "done": False}),
    "behind the rest": both(lambda name: {"message": {"tool_calls": [CALL_TRAP]}, "response": TRAP, "model": name}),
    "OpenAI's": both(lambda name: {"id": "x", "created": 1, "model": name, "choices": [{"delta": {"content": TRAP}}]}),
    "completion": both(lambda name: {"id": "x", "choices": [{"text": TRAP, "index": 0}], "model": name}),
    "llama.cpp's": both(lambda name: {"choices": [{"delta": {"content": TRAP}}], "id": TRAP * 30, "model": name}),
    "message": both(lambda name: {"type": "message_start", "message": {"role": "assistant", "model": name, "content": [
        {"type": "tool_use", "input": CALL_TRAP}]}}),
    "response": both(lambda name: {"response": {"metadata": CALL_TRAP, "model": name, "output": [], "tools": [
        {"parameters": CALL_TRAP}]}, "type": "response.created"}),
    "embeddings": both(lambda name: {"object": "list", "data": [{"embedding": [0.5] * 3000}] * 9, "model": name}),
    "a tool call alone": both(lambda name: {"message": {"role": "x"}, "item": CALL_TRAP, "delta": TRAP}),
    "an empty name": both(lambda name: {"id": "x", "model": "", "choices": []}),
    "another name": both(lambda name: {"model": "qwen3:14b", "message": {"content": TRAP}}),
    "no name": both(lambda name: {"model": ["qwen3"], "content": "model"}),
    "no object": both(lambda name: ["model", "qwen3", CALL_TRAP]),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_name_of_the_model_is_put_back_where_it_stands_and_nowhere_else(name):
    said, expected = ANSWERED[name]
    for lead in (b"", b"data: ", b"data:", b"event: x\ndata: "):
        for end in (b"", b"\n", b"\n\n", b"\r\n\r\n"):
            assert sollol.at_once(sollol.renamed(lead + said + end, NAMED)) == lead + expected + end
    spaced = json.dumps(json.loads(said)).encode()
    assert json.loads(sollol.at_once(sollol.renamed(spaced, NAMED))) == json.loads(expected)
    for cut in range(0, len(said) - 1, 7):         # whatever it is, nothing is raised
        sollol.at_once(sollol.renamed(said[:cut], NAMED))


def test_name_in_a_stream_is_put_back_in_some_microseconds_a_line():
    for name, most_us in (("chat", 25), ("OpenAI's", 25), ("completion", 250)):
        line, edits = b"data: " + ANSWERED[name][0] + b"\n\n", sollol.Edits(NAMED)
        assert min(timed(list, map(edits.line, [line] * 100)) for _ in range(20)) / 100 < most_us * 1e-6


def sent_somehow(rng, kind, lines):
    """Return what a ScriptedNode sends for a stream: in any framing, cut anywhere, or in one read for each chunk."""
    body, form = b"".join(lines), rng.randrange(5)
    cuts = [0, *sorted(rng.sample(range(1, len(body)), 5)), len(body)]
    pieces = lines if form < 3 else [body[start:end] for start, end in itertools.pairwise(cuts)]
    frames = [chunked(kind=kind, end=b""), *(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces), END]
    if form == 0:
        frames = [framed(body, kind=kind)]
    elif form == 1:
        frames = [b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n\r\n" % kind, body]
    raw = b"".join(frames)
    cuts = [0, *sorted(rng.sample(range(1, len(raw)), rng.choice((1, 3, 12)))), len(raw)]
    parts = frames if rng.random() < 0.5 else [raw[start:end] for start, end in itertools.pairwise(cuts)]
    return [item for part in parts for item in (part, 0.01)] + [KEEP] * (form != 1)


SIMULATED = dict(zip(TEXT_PATHS, (bench.GenerateLines, bench.ChatLines, bench.CompletionEvents, bench.ChatEvents,
                                  bench.ResponseEvents, bench.MessageEvents), strict=True))


def pieces_of(path, usage=False):
    """Return the pieces of a stream as Ollama writes it on a path, with or without the counts that are asked for."""
    ask = bench.Ask("qwen3", bench.model_named("qwen3"), "hi", True, 9, (), None, usage)
    form = SIMULATED[path](ask, types.SimpleNamespace(number=1, time_s=0.0))
    texts = "He", TRAP, '"choices":[],"usage":1}\n\n', ',"usage":{"prompt_tokens":0}', "input_tokens", "!"
    return [*(form.part(text, 0.0) for text in texts), *form.last(bench.Stats("stop", 1.0, 0.0, 30, 0.1, 3, 0.2), 0.0)]


@pytest.mark.parametrize("seed", [{}, {"seed": 7, "temperature": 0, "options": {"seed": 7}}],
                         ids=["drawn", "deterministic"])
@pytest.mark.parametrize("path", TEXT_PATHS)
def test_stream_under_an_alias_is_the_nodes_but_for_the_name_however_its_bytes_are_cut(path, seed):
    async def main():
        rng = random.Random(path)
        kind, own = SIMULATED[path].media_type.encode(), pieces_of(path)
        node = ScriptedNode(models=("qwen3:latest",))
        async with gateway_for(node, flags=["--alias", "claude*=qwen3"]) as gateway:
            for number in range(40):
                lines = [*own[:-1], own[-1][:-1]] if number % 4 == 0 else own       # the last line without its end
                expected = b"".join(lines).replace(b'"model":"qwen3"', b'"model":' + NAMED.asked)
                parts = sent_somehow(rng, kind, lines)
                node.script = lambda request, parts=parts: parts
                value = {"model": "Claude", "prompt": "x", "messages": [], "stream": True, **seed}
                body = json.dumps(value).replace("Claude", "cl\\u0061ude").encode()
                answer = await call(gateway, "POST", path, body)
                assert answer.status == 200 and answer.body == expected
                assert node.requests[-1].endswith(body.replace(b'"cl\\u0061ude"', b'"qwen3"')[-30:])
            assert gateway.dispatcher.cluster.nodes[node.url.removeprefix("http://")].errors == 0
    bench.run_virtual(main())


@over_sockets
async def test_model_that_exists_wins_over_a_pattern_and_aliases_are_in_no_list():
    node = bench.SimNode(models=("llama3.2", "gpt-4o", "mistral"), **FAST)
    flags = ["--alias", "gpt-*=llama3.2", "--alias", "mistral=llama3.2", "--alias", "a=b", "--alias", "b=llama3.2"]
    async with gateway_for(node, flags=flags) as gateway:
        for name, served in (("gpt-4o", "gpt-4o"), ("gpt-5", "llama3.2"), ("GPT-5", "llama3.2"),
                             ("mistral", "llama3.2")):
            answer = await call(gateway, "POST", "/api/generate", generate(name))
            assert answer.json()["model"] == name and json.loads(node.requests[-1].body)["model"] == served
        answer = await call(gateway, "POST", "/api/generate", generate("a"))
        assert answer.status == 404 and answer.json() == {"error": "model 'b' not found"}    # no chain
        for path in ("/api/tags", "/v1/models", "/api/ps"):
            assert b"gpt-5" not in (await call(gateway, "GET", path)).body
        for path in ("/api/pull", "/api/copy", "/api/push", "/api/create"):     # these mean the very name
            await call(gateway, "POST", path, {"model": "gpt-6", "source": "gpt-6", "stream": False})
        assert (await call(gateway, "DELETE", "/api/delete", {"model": "gpt-6"})).status == 404
        asked = [json.loads(it.body) for it in node.requests if it.body and b"gpt-6" in it.body]
        assert len(asked) == 5
        count = await call(gateway, "POST", "/v1/messages/count_tokens", {"model": "gpt-5", "messages": MESSAGES})
        assert count.json()["input_tokens"] > 0


@over_sockets
async def test_statistics_log_and_window_speak_of_the_model_behind_an_alias(caplog):
    caplog.set_level("INFO", logger="sollol")
    node = bench.SimNode(**FAST)
    async with gateway_for(node, flags=["--alias", "gpt-*=llama3.2", "--num-ctx", "llama3.2=8192"]) as gateway:
        for stream in (True, False):
            assert (await call(gateway, "POST", "/api/generate", generate("gpt-5", stream=stream))).status == 200
        assert json.loads(node.requests[-1].body)["options"]["num_ctx"] == 8192
        gateway.telemetry.tally()
        rows = [row for record in caplog.records for row in (record.msg if isinstance(record.msg, list) else ())]
        assert {row["model"] for row in rows if row["path"] == "/api/generate"} == {"llama3.2:latest"}
        text = (await call(gateway, "GET", "/metrics")).body.decode()
        assert 'model="llama3.2:latest"' in text and "gpt-5" not in text
        assert gateway.dispatcher.cluster.estimates.lengths.keys() == {"llama3.2:latest"}


@over_sockets
async def test_long_body_under_an_alias_goes_on_with_its_name_changed_and_nothing_else():
    node = ScriptedNode(lambda request: [framed(b'{"model":"qwen3","done":true}'), KEEP], models=("qwen3:latest",))
    async with gateway_for(node, flags=["--alias", "claude-*=qwen3"]) as gateway:
        body = b'{"images":[%b],"stream":false, "Model" : "claude-3" ,"prompt":"claude-3"} tail' % PICTURE
        answer = await call(gateway, "POST", "/api/generate", body)
        assert answer.body == b'{"model":"claude-3","done":true}' and answer.fields["content-length"] == "32"
        assert node.requests[0].endswith(b"\r\n\r\n" + body.replace(b'"Model" : "claude-3"', b'"Model" : "qwen3"'))


@over_sockets
async def test_list_of_texts_under_an_alias_is_embedded_by_many_nodes():
    nodes = embedders(3, **FAST)
    async with surface(nodes, flags=["--alias", "ada=nomic-embed-text"]) as gateway:
        for path, key in (("/api/embed", "embeddings"), ("/v1/embeddings", "data")):
            answer = await call(gateway, "POST", path, {"model": "ada", "input": TEXTS[:400]})
            assert answer.status == 200 and answer.json()["model"] == "ada" and len(answer.json()[key]) == 400
            assert answer.body.count(b'"model":"ada"') == 1 and len(asked_of(gateway, path)) > 1


@pytest.mark.parametrize("path", TEXT_PATHS)
def test_stream_under_an_alias_is_rescued_and_raced_under_it(path):
    """A node dies, and another one falls silent, in the middle of a stream."""
    async def main():
        for end in ("kill", "hang"):
            nodes = [bench.SimNode(loaded=("llama3.2",)) for _ in range(2)]
            text = joined if path in EVENTS_OF else text_of
            async with gateway_for(*nodes, flags=["--alias", "gpt-*=llama3.2"]) as gateway:
                value = {**asked_for(200), "model": "gpt-4o"}
                expected = text((await call(gateway, "POST", path, value)).body)
                stream = asyncio.create_task(call(gateway, "POST", path, value))
                leases = [node.leases for node in gateway.dispatcher.cluster.nodes.values()]
                await until(lambda leases=leases: any(lease.lines > 20 for held in leases for lease in held))
                getattr(next(node for node in nodes if node.in_flight), end)()
                answer = await stream
                assert text(answer.body) == expected and gateway.dispatcher.rescues == {"whole": 1}
                names = re.findall(rb'"model": ?("[^"]*")', answer.body)
                assert set(names) == {b'"gpt-4o"'} and b"llama3.2" not in answer.body
    bench.run_virtual(main())


USAGE_PATHS = sorted(sollol.USAGE_STREAMS)


@contextlib.asynccontextmanager
async def recorded(*nodes, flags=()):
    """Start nodes and a gateway; yield it and the Records of the requests that have finished."""
    async with gateway_for(*nodes, flags=flags) as gateway:
        finished, finish = [], gateway.telemetry.finish
        gateway.telemetry.finish = lambda record: (finished.append(record), finish(record))
        yield gateway, finished


@pytest.mark.parametrize("alias", [None, NAMED], ids=["own name", "alias"])
@pytest.mark.parametrize("seed", [{}, {"seed": 7}], ids=["drawn", "deterministic"])
@pytest.mark.parametrize("path", USAGE_PATHS)
def test_counts_that_only_the_gateway_asked_for_are_taken_out_however_the_bytes_are_cut(path, seed, alias):
    async def main():
        rng = random.Random(path)
        plain, counted = pieces_of(path), pieces_of(path, usage=True)
        node = ScriptedNode(models=("qwen3:latest",))
        async with recorded(node, flags=["--alias", "claude=qwen3"]) as (gateway, finished):
            for _ in range(40):
                parts = sent_somehow(rng, b"text/event-stream", counted)
                node.script = lambda request, parts=parts: parts
                value = {"model": "claude" if alias else "qwen3", "prompt": "x", "messages": [], "stream": True, **seed}
                answer = await call(gateway, "POST", path, value)
                expected = b"".join(plain)
                expected = expected.replace(b'"model":"qwen3"', b'"model":"claude"') if alias else expected
                assert answer.body == expected and b'"include_usage":true' in node.requests[-1]
                timings = finished[-1].timings
                assert (timings.prompt_tokens, timings.output_tokens, timings.estimated) == (30, 3, False)
    bench.run_virtual(main())


@over_sockets
async def test_tokens_of_every_stream_are_known_and_marked_where_they_are_estimated():
    """By nodes that know how to count, by an old one, and with the switch off."""
    for version, flags, is_asked in (("0.33.0", [], True), ("0.5.1", [], False),
                                     ("0.33.0", ["--no-count-streams"], False)):
        node = bench.SimNode(version=version, loaded=("llama3.2",), **FAST)
        async with recorded(node, flags=flags) as (gateway, finished):
            said = [{"role": "user", "content": "hi <out=4>"}]
            value = {**CHATTY, "prompt": "hi <out=4>", "messages": said, "input": "hi <out=4>", "stream": True}
            for path in TEXT_PATHS:
                answer = await call(gateway, "POST", path, value)
                is_counted = path not in USAGE_PATHS
                assert is_counted or b'"usage"' not in answer.body
                timings = finished[-1].timings
                assert timings.prompt_tokens > 0 and timings.output_tokens == 4
                assert timings.estimated == (not is_counted and not is_asked)
                assert (b"include_usage" in node.requests[-1].body) == (not is_counted and is_asked)
            answer = await call(gateway, "POST", OPENAI, {**value, **USAGE})
            assert answer.body.count(b'"completion_tokens":4') == 1 and not finished[-1].timings.estimated


@pytest.mark.parametrize("path", TEXT_PATHS)
def test_tokens_of_a_stream_that_breaks_off_or_that_its_client_leaves_are_estimated(path):
    async def main():
        for end, temperature in itertools.product(("leave", "kill"), (1, 0)):   # 0: another node would go on with it
            node = bench.SimNode(loaded=("llama3.2",))
            async with recorded(node) as (gateway, finished):
                caller = await Caller.to(gateway)
                sampling = {"temperature": temperature}
                value = {**asked_for(500), "options": sampling, **sampling, "stream": True}
                caller.writer.write(posted(value, path.encode()))
                leases = next(iter(gateway.dispatcher.cluster.nodes.values())).leases
                await until(lambda leases=leases: any(lease.lines > 60 for lease in leases))
                caller.writer.transport.abort() if end == "leave" else node.kill()
                await until(lambda finished=finished: finished, 300.0)
                timings = finished[0].timings
                assert timings.estimated and 15 <= timings.output_tokens < 100 and timings.prompt_tokens > 0
                caller.close()
    bench.run_virtual(main())


@over_sockets
async def test_second_name_of_a_model_is_made_on_every_node_by_one_copy_and_shares_its_runner():
    nodes = [bench.SimNode(loaded=("llama3.2",), seed=seed) for seed in (1, 2)]
    async with gateway_for(*nodes) as gateway:
        copied = await call(gateway, "POST", "/api/copy", {"source": "llama3.2", "destination": "gpt-4o"})
        assert copied.status == 200
        answers = await asyncio.gather(*(call(gateway, "POST", OPENAI, {"model": "gpt-4o", "messages": MESSAGES})
                                         for _ in range(4)))
        assert {answer.json()["model"] for answer in answers} == {"gpt-4o"}
        assert len({answer.fields["x-sollol-node"] for answer in answers}) == 2
        assert [node.loads for node in nodes] == [0, 0]


# -----------------------------------------------------------------------------
# Rescue of broken streams
# -----------------------------------------------------------------------------

def line(**fields):
    return json.dumps(fields).encode() + b"\n"


def sse(**fields):
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(text, **more):
    return sse(id="x", choices=[{"index": 0, "delta": {"content": text, **more}, "finish_reason": None}])


# Path: (content type, one piece of text as this path streams it, the stream's last lines).
DIALECTS = {
    "/api/generate": (b"application/x-ndjson", lambda text: line(model="m", response=text, done=False),
                      [line(model="m", response="", done=True, eval_count=5)]),
    "/api/chat": (b"application/x-ndjson",
                  lambda text: line(model="m", message={"role": "assistant", "content": text}, done=False),
                  [line(model="m", message={"role": "assistant", "content": ""}, done=True, eval_count=5)]),
    "/v1/chat/completions": (b"text/event-stream", delta,
                             [sse(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]), b"data: [DONE]\n\n"]),
    "/v1/completions": (b"text/event-stream", lambda text: sse(choices=[{"text": text, "index": 0}]),
                        [sse(choices=[{"text": "", "index": 0, "finish_reason": "stop"}]), b"data: [DONE]\n\n"]),
}


def text_of(body):
    """Return the text in a stream's lines, each kind of it behind the other."""
    said = {}
    for one in body.split(b"\n"):
        one = one.removeprefix(b"data: ")
        if one and one != b"[DONE]":
            value = json.loads(one)
            for choice in (value, value.get("message", {}), *value.get("choices", ()),
                           *(it.get("delta", {}) for it in value.get("choices", ()))):
                for key in ("thinking", "response", "content", "text"):
                    said[key] = said.get(key, "") + choice.get(key, "")
    return "|".join(text for text in said.values() if text)


def repeatable(path="/api/generate", **more):
    """Return the body of a deterministic stream's request."""
    if path.startswith("/v1"):
        return {"model": "llama3.2", "messages": [], "prompt": "hi", "stream": True, "temperature": 0, **more}
    return {"model": "llama3.2", "messages": [], "prompt": "hi", "options": {"seed": 7}, **more}


def dying(path, *texts, then=()):
    """Return a node that streams texts and dies, each time."""
    kind, said, _ = DIALECTS[path]
    return ScriptedNode(lambda request: [chunked(*map(said, texts), *then, kind=kind, end=b""), 0.02])


def lasting(path, *texts):
    """Return a node that streams texts to their end."""
    kind, said, last = DIALECTS[path]
    return ScriptedNode(lambda request: [chunked(*map(said, texts), *last, kind=kind), KEEP])


IN_TURN = ["--policy", "round-robin"]   # the first request goes to the first node


async def rescued(path, *nodes, value=None, flags=()):
    """Return (answer, gateway) of a stream that begins on the first node."""
    async with gateway_for(*nodes, flags=[*IN_TURN, *flags]) as gateway:
        caller = await Caller.to(gateway)
        answer = await caller.ask("POST", path, value or repeatable(path))
        if answer.fields.get("transfer-encoding"):
            assert (await caller.ask("GET", "/")).status == 200
        caller.close()
        assert health(gateway)["inflight"] == health(gateway)["queued"] == 0
        return answer, gateway


@pytest.mark.parametrize("path", DIALECTS)
@over_sockets
async def test_deterministic_stream_goes_on_on_another_node_as_if_nothing_had_happened(path):
    """Cut between lines, within a line of the replay, before any text, and behind the last text."""
    kind, said, last = DIALECTS[path]
    for begun, replay, seam in ((["He", "llo"], ["He", "llo", " wor", "ld"], " wor"),
                                (["He", "llo"], ["H", "ello wor", "ld"], " wor"),
                                (["Hello w"], ["Hello world"], "orld"),
                                (["Hello world"], ["Hel", "lo world"], None)):
        nodes = dying(path, *begun), lasting(path, *replay)
        answer, gateway = await rescued(path, *nodes)
        assert answer.status == 200 and text_of(answer.body) == "Hello world"
        before = b"".join(map(said, begun))
        assert answer.body.startswith(before) and answer.body.endswith(b"".join(last))
        if seam:
            lead = b"data: " if kind == b"text/event-stream" else b""
            following = re.split(rb"(?<=\n)(?!\n)", answer.body[len(before):])[0]
            assert json.loads(following.removeprefix(lead)) == json.loads(said(seam).removeprefix(lead))
        assert gateway.dispatcher.rescues == {"whole": 1}
        assert [len(node.requests) for node in nodes] == [1, 1]


@over_sockets
async def test_thinking_and_tool_calls_are_compared_too():
    def message(**fields):
        return line(message={"role": "assistant", "content": "", **fields}, done=False)

    def calls(id, city):
        return message(tool_calls=[{"id": id, "function": {"name": "weather", "arguments": {"city": city}}}])

    end = line(message={"role": "assistant", "content": ""}, done=True)
    begun = message(thinking="Hm"), message(thinking="m."), message(content="So"), calls("call_1", "Oslo")

    def nodes(*replay):
        return (ScriptedNode(lambda request: [chunked(*begun, end=b""), 0.02]),
                ScriptedNode(lambda request: [chunked(*replay, end), KEEP]))

    same = message(thinking="Hmm."), message(content="So"), calls("call_2", "Oslo"), calls("call_3", "Rome")
    answer, _ = await rescued("/api/chat", *nodes(*same))
    assert answer.body == b"".join((*begun, calls("call_3", "Rome"), end))
    for other in (calls("call_2", "Rome"), message(content="Oslo")):
        answer, _ = await rescued("/api/chat", *nodes(*same[:2], other))
        assert answer.body.startswith(b"".join(begun)) and b"differs" in answer.body[len(b"".join(begun)):]


@over_sockets
async def test_stream_is_rescued_from_one_node_after_the_other():
    path = "/api/chat"
    nodes = dying(path, "a", "b"), dying(path, "a", "b", "c"), lasting(path, "abcd")
    answer, gateway = await rescued(path, *nodes)
    assert text_of(answer.body) == "abcd" and gateway.dispatcher.rescues == {"whole": 1}
    nodes = dying(path, "a", "b"), dying(path, "a"), ScriptedNode(lambda request: [framed(b"{}", b"400 Bad Request")])
    answer, gateway = await rescued(path, *nodes)
    assert answer.body.startswith(DIALECTS[path][1]("a") + DIALECTS[path][1]("b") + b'{"error": "127.0.0.1:')
    assert gateway.dispatcher.rescues == {"broken": 1}


@over_sockets
async def test_rescued_stream_is_one_completion_with_one_count_of_tokens():
    """Cut in the middle of the text, within it, behind it, and behind the count of tokens."""
    def events(name, created, *texts):
        common = {"id": name, "object": "chat.completion.chunk", "created": created, "model": "m"}
        return [*(sse(**common, choices=[{"index": 0, "delta": {"content": text}}]) for text in texts),
                sse(**common, choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
                sse(**common, choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4}), b"data: [DONE]\n\n"]

    kind, first, second = b"text/event-stream", events("one", 1, "a", "b", "c"), events("two", 2, "ab", "c")
    for cut in range(1, 6):
        nodes = (ScriptedNode(lambda request, cut=cut: [chunked(*first[:cut], kind=kind, end=b""), 0.02]),
                 ScriptedNode(lambda request: [chunked(*second, kind=kind), KEEP]))
        answer, gateway = await rescued(OPENAI, *nodes, value=repeatable(OPENAI, **USAGE))
        *values, last = answer.body.split(b"\n\n")[:-1]
        values = [json.loads(value.removeprefix(b"data: ")) for value in values]
        assert last == b"data: [DONE]" and text_of(answer.body) == "abc"
        assert {(value["id"], value["created"]) for value in values} == {("one", 1)}
        assert [bool(value.get("usage")) for value in values] == [False] * (len(values) - 1) + [True]
        assert gateway.dispatcher.rescues == {"whole": 1}


def message_events(number, *blocks):
    """Return the events of /v1/messages (anthropic/anthropic.go). `blocks`: (type, its text in pieces)."""
    message = {"id": f"msg_{number}", "type": "message", "role": "assistant", "model": "m", "content": []}
    told = {"text": ("text_delta", "text", {"text": ""}), "thinking": ("thinking_delta", "thinking", {"thinking": ""}),
            "tool_use": ("input_json_delta", "partial_json", {"id": "", "name": "look", "input": {}}),
            "server_tool_use": ("", "", {"id": "", "name": "web_search", "input": {"query": "x"}}),
            "web_search_tool_result": ("", "", {"tool_use_id": f"srvtoolu_{number}", "content": [{"url": "u"}]})}
    events = [named_event("message_start", message={**message, "usage": {"input_tokens": 3, "output_tokens": 0}})]
    for index, (kind, *texts) in enumerate(blocks):
        name, key, block = told[kind]
        deltas = ({"type": name, key: text} for text in texts)
        drawn = {"tool_use": f"call_{number}_{index}", "server_tool_use": f"srvtoolu_{number}"}
        block |= {"id": drawn[kind]} if kind in drawn else {}
        events += [named_event("content_block_start", index=index, content_block={"type": kind, **block}),
                   *(named_event("content_block_delta", index=index, delta=delta) for delta in deltas),
                   named_event("content_block_stop", index=index)]
    usage = {"input_tokens": 9, "output_tokens": 7}
    return [*events, named_event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage),
            named_event("message_stop")]


def response_events(number, *items):
    """Return the events of /v1/responses (openai/responses.go). `items`: (type, its text in pieces)."""
    events, output = [], []

    def add(name, **fields):
        fields |= {"type": f"response.{name}", "sequence_number": len(events)}
        data = json.dumps(fields, sort_keys=True).encode()
        events.append(b"event: response.%b\ndata: %b\n\n" % (name.encode(), data))

    def response(status, **more):
        return {"id": f"resp_{number}", "object": "response", "created_at": number, "status": status, "error": None,
                "tools": [{"name": "look", "parameters": {"id": "x"}}], "output": output, **more}

    add("created", response=response("in_progress"))
    add("in_progress", response=response("in_progress"))
    for index, (kind, *texts) in enumerate(items):
        text, item = "".join(texts), {"id": f"{kind}_{number}_{index}", "type": kind}
        place, part = {"item_id": item["id"], "output_index": index}, {"type": "output_text", "annotations": []}
        if kind == "message":
            item |= {"role": "assistant"}
            add("output_item.added", output_index=index, item={**item, "status": "in_progress", "content": []})
            add("content_part.added", content_index=0, part={**part, "text": ""}, **place)
            for piece in texts:
                add("output_text.delta", content_index=0, delta=piece, logprobs=[], **place)
            add("output_text.done", content_index=0, text=text, logprobs=[], **place)
            add("content_part.done", content_index=0, part={**part, "text": text}, **place)
            item |= {"status": "completed", "content": [{**part, "text": text}]}
        elif kind == "reasoning":
            add("output_item.added", output_index=index, item={**item, "summary": []})
            for piece in texts:
                add("reasoning_summary_text.delta", summary_index=0, delta=piece, **place)
            add("reasoning_summary_text.done", summary_index=0, text=text, **place)
            item |= {"summary": [{"type": "summary_text", "text": text}], "encrypted_content": text}
        else:
            item |= {"call_id": f"call_{number}_{index}", "name": "look", "status": "completed", "arguments": text}
            add("output_item.added", output_index=index, item={**item, "status": "in_progress", "arguments": ""})
            for piece in texts:
                add("function_call_arguments.delta", delta=piece, **place)
            add("function_call_arguments.done", arguments=text, **place)
        add("output_item.done", output_index=index, item=item)
        output.append(item)
    usage = {"input_tokens": 9, "output_tokens": 7, "total_tokens": 16}
    add("completed", response=response("completed", usage=usage))
    return events


EVENTS_OF = {"/v1/messages": message_events, "/v1/responses": response_events}


def delta_in(value):
    """Return (object, key) of the text that an event adds, or None."""
    delta = value.get("delta")
    if isinstance(delta, str):
        return value, "delta"
    return next(((delta, key) for key in ("text", "thinking", "partial_json") if key in (delta or {})), None)


def joined(body):
    """Return the objects of a stream of named events, pieces of one text put together and times left out.

    Events must bear the name of their object, and numbers must count them. Ids are numbered as they come.
    """
    found, last, ids = [], None, {}
    body = re.sub(rb'(?<=id":) ?("[a-z]+_[^"]*")', lambda name: b"%d" % ids.setdefault(name[1], len(ids)), body)
    for number, one in enumerate(body.removesuffix(b"\n\n").split(b"\n\n")):
        name, data = re.fullmatch(rb"event: (\S+)\ndata: (.*)", one).groups()
        value = json.loads(data)
        assert value["type"] == name.decode() and value.pop("sequence_number", number) == number, (number, body)
        for key in ("created_at", "completed_at"):
            value.get("response", {}).pop(key, None)
        place = delta_in(value)
        text, about = (place[0].pop(place[1]), json.dumps(value)) if place else ("", None)
        assert text or not place
        if place and about == last:
            found[-1][1] += text
        else:
            found.append([value, text])
        last = about
    return found


ANSWERS = {
    ("a text", "/v1/messages"): (("text", "He", "llo", " wor", "ld"),),
    ("nothing", "/v1/messages"): (),
    ("thinking, then a text", "/v1/messages"): (("thinking", "Hm", "m."), ("text", "So", "!")),
    ("a text, then two calls", "/v1/messages"): (("text", "I ", "look"), ("tool_use", '{"a":', "1}"),
                                                 ("tool_use", "{}")),
    ("a search", "/v1/messages"): (("text", "I ", "look"), ("server_tool_use",), ("web_search_tool_result",),
                                   ("text", "So")),
    ("a text", "/v1/responses"): (("message", "He", "llo", " wor", "ld"),),
    ("nothing", "/v1/responses"): (),
    ("thinking, then a text", "/v1/responses"): (("reasoning", "Hm", "m."), ("message", "So", "!")),
    ("thinking, then two calls", "/v1/responses"): (("reasoning", "I ", "look"), ("function_call", '{"a":', "1}"),
                                                    ("function_call", "{}")),
}


def split_anew(parts, rng):
    """Return parts of an answer with their texts in other pieces."""
    def pieces(text):
        cuts = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(0, 4)))) if text else []
        return [text[at:end] for at, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    return [(kind, *filter(None, pieces("".join(texts)))) for kind, *texts in parts]


@pytest.mark.parametrize("answer", ANSWERS, ids=" of ".join)
def test_stream_of_named_events_is_one_answer_wherever_it_is_cut(answer):
    """Cut behind every event, once or twice; tokens come in other pieces, and all ids are others."""
    events_of, parts = EVENTS_OF[answer[1]], ANSWERS[answer]
    first, rng = events_of(1, *parts), random.Random(1)
    for cut in range(1, len(first)):
        for again in (None, *range(1, len(first))):
            transcript, sent = sollol.Transcript(), []
            for number, most in ((1, cut), (22, again), (333, sys.maxsize)):
                if most is not None:
                    answers = first if number == 1 else events_of(number, *split_anew(parts, rng))
                    sent += [transcript.unsent_part(event) for event in answers[:most]]
                    assert transcript.done == (most >= len(answers))
                    transcript.rewind("n")
            assert joined(b"".join(sent)) == joined(b"".join(first)), (cut, again)


@pytest.mark.parametrize("answer", [answer for answer in ANSWERS if answer[0].startswith("thinking")], ids=" of ".join)
def test_stream_of_named_events_goes_on_with_no_other_answer(answer):
    events_of, parts = EVENTS_OF[answer[1]], [list(part) for part in ANSWERS[answer]]
    first, changed = events_of(1, *parts), []
    for at, part in enumerate(parts):
        changed.append([*parts[:at], [part[0], "x" + part[1], *part[2:]], *parts[at + 1:]])
        changed.append(parts[:at])
    for others in (*changed, parts[::-1]):
        transcript = sollol.Transcript()
        for event in first[:-3]:
            transcript.unsent_part(event)
        transcript.rewind("n")
        with pytest.raises(Refusal, match="differs"):
            for event in events_of(2, *others):
                transcript.unsent_part(event)


def test_named_events_keep_a_bound_of_ids_and_go_on_counting_where_the_first_node_was():
    transcript = sollol.Transcript()
    for number in range(3 * sollol.MOST_NAMES):
        given = {"index": number, "item": {"id": f"item_{number}"}, "sequence_number": number + 7}
        assert transcript.unsent_part(named_event("response.output_item.added", **given))
    assert len(transcript.names) == sollol.MOST_NAMES and transcript.known == ""
    transcript.rewind("n")
    transcript.known = ""           # as if it had been said
    event = transcript.unsent_part(named_event("response.in_progress", sequence_number=0))
    assert json.loads(event.split(b"data: ")[1])["sequence_number"] == number + 8


@table("event, other", [
    ("what is called", {"item": {"name": "a"}}, {"item": {"name": "b"}}),
    ("what it is", {"part": {"type": "a"}}, {"part": {"type": "b"}}),
    ("what is searched for", {"content_block": {"input": {"q": "a"}}}, {"content_block": {"input": {"q": "b"}}}),
    ("what was found", {"content_block": {"content": ["a"]}}, {"content_block": {"content": ["b"]}}),
    ("what is done", {"item": {"action": {"query": "a"}}}, {"item": {"action": {"query": "b"}}}),
    ("why it ends", {"delta": {"stop_reason": "a"}}, {"delta": {"stop_reason": "b"}}),
    ("its place", {"index": 0}, {"index": 1}), ("its place in the answer", {"output_index": 0}, {"output_index": 1})])
def test_named_event_that_adds_no_text_is_compared_by_what_it_begins(event, other):
    for replay, is_same in ((event, True), (other, False)):
        transcript = sollol.Transcript()
        for sent in (named_event("x", **event), named_event("ping"), named_event("x_delta", delta={"text": ""})):
            assert transcript.unsent_part(sent) == sent
        transcript.rewind("n")
        with contextlib.nullcontext() if is_same else pytest.raises(Refusal, match="differs"):
            assert transcript.unsent_part(named_event("x", **replay, text="it takes no part")) == b""
            assert transcript.unsent_part(named_event("y", **event)) == named_event("y", **event)
    transcript = sollol.Transcript()
    transcript.unsent_part(named_event("x", **event))
    transcript.rewind("n")
    with pytest.raises(Refusal, match="differs"):
        transcript.unsent_part(named_event("y", **event))


def test_completion_whose_chunks_have_a_type_is_compared_by_its_text():
    (_, *said), = sollol.delta_texts({"type": "chunk", "choices": [{"delta": {"content": "a"}}]})
    assert said == ["content", "a"]


@pytest.mark.parametrize("path", EVENTS_OF)
def test_stream_of_named_events_is_rescued_whatever_byte_it_is_cut_at(path):
    """Behind every event, and within each: in its name, in its text and before its last byte."""
    parts = ANSWERS["thinking, then a text", path]
    first, second = EVENTS_OF[path](1, *parts), EVENTS_OF[path](2, *split_anew(parts, random.Random(2)))
    kind, whole, ends = b"text/event-stream", b"".join(first), list(itertools.accumulate(map(len, first)))
    cuts = sorted({max(1, end - back) for end, event in zip(ends, first, strict=True)
                   for back in (0, 1, 2, 5, len(event) // 2, len(event) - 9)})

    async def main():
        for cut in cuts:
            begun = chunked(whole[:cut], kind=kind, end=b"")
            nodes = (ScriptedNode(lambda request, begun=begun: [begun, 0.02]),
                     ScriptedNode(lambda request: [chunked(*second, kind=kind), KEEP]))
            answer, gateway = await rescued(path, *nodes)
            assert joined(answer.body) == joined(whole), cut
            assert len(nodes[1].requests) == (cut < len(whole))
            assert gateway.dispatcher.rescues == ({"whole": 1} if len(first[0]) <= cut < len(whole) else {})
    bench.run_virtual(main())


@over_sockets
async def test_error_line_of_the_node_itself_is_rescued_too():
    path = "/api/generate"
    nodes = dying(path, "a", then=[line(error="llama runner process no longer running")]), lasting(path, "a", "b")
    answer, _ = await rescued(path, *nodes)
    assert text_of(answer.body) == "ab" and b"error" not in answer.body


@pytest.mark.parametrize("path", EVENTS_OF)
@over_sockets
async def test_named_error_is_rescued_and_any_node_begins_anew_where_nothing_is_out(path):
    kind, parts = b"text/event-stream", ANSWERS["a text", path]
    first, second, third = (EVENTS_OF[path](number, *parts) for number in (1, 2, 3))
    later = b"".join(first[4:6]) + named_event("error", error={"type": "api_error", "message": "unexpected EOF"})
    later = b"%x\r\n%b\r\n0\r\n\r\n" % (len(later), later)
    begun = chunked(b"".join(first[:4]), kind=kind, end=b"")
    late, at_once, lasts = [begun, 0.02, later, KEEP], [begun + later, KEEP], [chunked(*third, kind=kind), KEEP]
    dies = [chunked(*second[:5], kind=kind, end=b""), 0.02]     # asked second, as the last of three
    for scripts in ((late, lasts), (at_once, lasts), (at_once, lasts, dies)):
        nodes = [ScriptedNode(lambda request, script=script: script) for script in scripts]
        answer, gateway = await rescued(path, *nodes)
        assert joined(answer.body) == joined(b"".join(first))
        assert gateway.dispatcher.rescues == ({"whole": 1} if late in scripts or dies in scripts else {})
        assert gateway.dispatcher.rescues or answer.body == b"".join(third)


@over_sockets
async def test_text_before_an_error_in_one_piece_is_not_lost():
    path = "/api/generate"
    said = DIALECTS[path][1]
    later = b"".join((said("b"), line(error="unexpected EOF")))
    script = [chunked(said("a"), end=b""), 0.02, b"%x\r\n%b\r\n0\r\n\r\n" % (len(later), later), KEEP]
    nodes = ScriptedNode(lambda request: script), lasting(path, "ab", "c")
    answer, gateway = await rescued(path, *nodes)
    assert text_of(answer.body) == "abc" and gateway.dispatcher.rescues == {"whole": 1}
    for one in (said("a") + later, later):      # at once: nothing is out, so that any node may begin anew
        nodes = ScriptedNode(lambda request, one=one: [chunked(one), KEEP]), lasting(path, "ab", "c")
        answer, gateway = await rescued(path, *nodes)
        assert text_of(answer.body) == "abc" and not gateway.dispatcher.rescues
    nodes = ScriptedNode(lambda request: [chunked(later), KEEP]), lasting(path, "abc"), dying(path, "a", "b")
    answer, gateway = await rescued(path, *nodes)
    assert answer.fields["x-sollol-node"].endswith(f":{nodes[2].port}")     # that one was the second
    assert text_of(answer.body) == "abc" and gateway.dispatcher.rescues == {"whole": 1}


@over_sockets
async def test_error_that_nobody_can_better_is_told_in_the_nodes_own_words():
    for path, told in (("/api/generate", b'{"error" :"unexpected EOF"}\n'),
                       ("/v1/completions", b'data: {"error":{"message":"EOF" ,"code":7}}\n\ndata: [DONE]\n\n')):
        kind, said, _ = DIALECTS[path]
        script = [chunked(said("a"), kind=kind, end=b""), 0.02, b"%x\r\n%b\r\n0\r\n\r\n" % (len(told), told), KEEP]
        for value in (repeatable(path), {**repeatable(path), "options": {}, "temperature": 0.5}):
            answer, _ = await rescued(path, ScriptedNode(lambda request, script=script: script), value=value)
            assert answer.body == said("a") + told


@table("path, value, flags, replay, digest", [
    ("replay differs", "/api/generate", {}, [], ["a", "x"], None),
    ("replay is shorter", "/api/generate", {}, [], ["a"], None),
    ("of a chat for OpenAI's clients", "/v1/chat/completions", {}, [], ["a", "x"], None),
    ("another version of the model", "/api/generate", {}, [], None, "another"),
    ("no seed", "/api/generate", {"options": {"temperature": 0.5}}, [], None, None),
    ("a random seed", "/api/generate", {"options": {"seed": -1}}, [], None, None),
    ("temperature where it does not count", "/api/generate", {"options": {}, "temperature": 0}, [], None, None),
    ("probabilities", "/api/generate", {"logprobs": True}, [], None, None),
    ("switched off", "/api/generate", {}, ["--no-rescue"], None, None),
])
@over_sockets
async def test_stream_that_cannot_be_rescued_ends_with_an_error_line(path, value, flags, replay, digest):
    kind, said, _ = DIALECTS[path]
    nodes = dying(path, "a", "b"), lasting(path, *(replay or ["a", "b", "c"]))
    if digest:
        nodes[1].digests["llama3.2:latest"] = digest
    answer, _ = await rescued(path, *nodes, value=repeatable(path, **value), flags=flags)
    begun = said("a") + said("b")
    assert answer.body.startswith(begun)
    assert re.fullmatch(rb'(data: )?\{"error": [^\n]*\}\n+', answer.body[len(begun):]), answer.body
    assert len(nodes[1].requests) == (replay is not None)


@over_sockets
async def test_stream_that_lost_only_its_framing_is_whole():
    for value in (repeatable(), generate(stream=True)):
        kind, said, last = DIALECTS["/api/generate"]
        nodes = dying("/api/generate", "a", then=last), lasting("/api/generate", "a")
        answer, _ = await rescued("/api/generate", *nodes, value=value)
        assert answer.body == said("a") + last[0] and not nodes[1].requests


@over_sockets
async def test_deterministic_stream_arrives_as_sent_however_it_is_cut_and_a_huge_one_is_not_kept():
    kind, said, last = DIALECTS["/api/generate"]
    raw = chunked(said("a") + said("b")[:9], said("b")[9:], b"\n", b"garbage\n", *last)
    node = ScriptedNode(lambda request: [*(raw[at:at + 3] for at in range(0, len(raw), 3)), KEEP])
    answer, _ = await rescued("/api/generate", node)
    assert answer.body == said("a") + said("b") + b"\ngarbage\n" + last[0]
    big = "x" * (2 * sollol.MIB)
    nodes = dying("/api/generate", "a", big), lasting("/api/generate", "a", big)
    answer, _ = await rescued("/api/generate", *nodes)
    assert answer.body.startswith(said("a") + said(big) + b'{"error"') and not nodes[1].requests


def test_under_kills_deterministic_streams_are_whole_and_nothing_else_is_lost():
    """Three nodes, one killed every few seconds for a minute, in turn; clients of four kinds."""
    async def main():
        nodes = [bench.SimNode(loaded=("llama3.2",), seed=seed) for seed in range(3)]
        quiet = bench.SimNode(loaded=("llama3.2",))
        found = {"exact": 0, "done": 0, "error": 0, "plain": 0}
        async with gateway_for(quiet) as gateway:
            expected = text_of((await call(gateway, "POST", "/api/generate", generate(tokens=120, stream=True))).body)
            told = asked_for(120)
            whole = {path: joined((await call(gateway, "POST", path, told)).body) for path in EVENTS_OF}
        async with gateway_for(*nodes, flags=["--probe-interval", "0.5"]) as gateway:
            end_s = gateway.loop.time() + 60

            async def client(stream, options):
                while gateway.loop.time() < end_s:
                    answer = await call(gateway, "POST", "/api/generate",
                                        generate(tokens=120, stream=stream, options=options))
                    assert answer.status == 200, answer.body
                    if not stream:
                        found["plain"] += bool(answer.json()["done"])
                    elif options:
                        assert text_of(answer.body) == expected and b'"done":true' in answer.body
                        found["exact"] += 1
                    else:
                        last = json.loads(answer.body.splitlines()[-1])
                        found["error" if "error" in last else "done"] += 1
                        assert "error" in last or last["done"]

            async def client_of_events(path):
                while gateway.loop.time() < end_s:
                    answer = await call(gateway, "POST", path, told)
                    assert joined(answer.body) == whole[path]
                    found["exact"] += 1

            async def killer():
                while gateway.loop.time() < end_s:
                    for node in nodes:
                        await asyncio.sleep(3)
                        node.kill()
                        await asyncio.sleep(1.5)
                        await node.restart()

            task = asyncio.create_task(killer())
            await asyncio.gather(*(client(stream, options) for stream, options in
                                   ((True, {"seed": 1}), (True, {"temperature": 0}), (True, {}), (False, {}))),
                                 *map(client_of_events, EVENTS_OF))
            task.cancel()
            assert gateway.dispatcher.rescues["whole"] > 3 and not gateway.dispatcher.rescues["broken"]
            assert found["exact"] > 20 and found["error"] > 0 and found["plain"] > 10
    bench.run_virtual(main())


def asked_for(tokens):
    """Return the body of a deterministic stream's request, for any path."""
    text = f"say <out={tokens}>"
    return generate(tokens=tokens, stream=True, options={"temperature": 0}, temperature=0, input=text,
                    max_tokens=tokens, messages=[{"role": "user", "content": text}])


@pytest.mark.parametrize("path", TEXT_PATHS)
def test_deterministic_stream_of_a_wedged_node_is_raced_by_a_replay(path):
    async def main():
        nodes, text = [bench.SimNode(loaded=("llama3.2",)) for _ in range(2)], joined if path in EVENTS_OF else text_of
        async with gateway_for(*nodes) as gateway:
            value = asked_for(200)
            expected = text((await call(gateway, "POST", path, value)).body)
            stream = asyncio.create_task(call(gateway, "POST", path, value))
            leases = [node.leases for node in gateway.dispatcher.cluster.nodes.values()]
            await until(lambda: any(lease.lines > 20 for held in leases for lease in held))
            next(node for node in nodes if node.in_flight).hang()
            answer = await stream
            assert text(answer.body) == expected and gateway.dispatcher.rescues == {"whole": 1}
    bench.run_virtual(main())


def overdue(texts, pause_s, path="/api/generate", framing=chunked):
    """Return a node that streams texts to their end, and is silent for so long behind the second one."""
    kind, said, last = DIALECTS[path]
    pieces = [*map(said, texts), *last]
    raw = framing(*pieces, kind=kind) if framing is chunked else framing(b"".join(pieces), kind=kind)
    cut = raw.index(pieces[2])
    cut = raw.rindex(b"\r\n", 0, cut - 2) + 2 if framing is chunked else cut
    return ScriptedNode(lambda request: [raw[:cut], pause_s, raw[cut:], KEEP])


async def raced_stream(*nodes, path="/api/generate"):
    """Return (answer, Record, gateway) of a deterministic stream that begins on the first node."""
    async with gateway_for(*nodes) as gateway:
        finished, finish = [], gateway.telemetry.finish
        gateway.telemetry.finish = lambda record: (finished.append(record), finish(record))
        answer = await call(gateway, "POST", path, repeatable(path))
        await until(lambda: not health(gateway)["inflight"])
        return answer, finished[0], gateway


@pytest.mark.parametrize("path", EVENTS_OF)
def test_stream_of_named_events_is_raced_before_its_first_byte_and_behind_every_event(path):
    async def main():
        parts, kind = ANSWERS["a text", path], b"text/event-stream"
        first, second = EVENTS_OF[path](1, *parts), EVENTS_OF[path](2, *split_anew(parts, random.Random(3)))
        for cut in range(len(first)):
            begun = [chunked(*first[:cut], kind=kind, end=b"")] if cut else []
            nodes = (ScriptedNode(lambda request, begun=begun: [*begun, 90.0, KEEP]),
                     ScriptedNode(lambda request: [chunked(*second, kind=kind), KEEP]))
            started_s = asyncio.get_running_loop().time()
            answer, _, gateway = await raced_stream(*nodes, path=path)
            assert joined(answer.body) == joined(b"".join(first)), cut
            assert gateway.dispatcher.rescues == ({"whole": 1} if cut else {}) and gateway.loop.time() < started_s + 70
            assert gateway.telemetry.metrics.races[nodes[1].url.removeprefix("http://"), "yes"] == 1
    bench.run_virtual(main())


def test_replay_that_says_something_else_ends_no_stream_and_is_not_asked_for_again():
    async def main():
        nodes = overdue("abcd", 60.0), lasting("/api/generate", "a", "x")
        answer, record, gateway = await raced_stream(*nodes)
        assert text_of(answer.body) == "abcd" and not gateway.dispatcher.rescues
        assert [len(node.requests) for node in nodes] == [1, 1]
        assert answer.fields["x-sollol-node"] == record.node and record.outcome == "ok"
    bench.run_virtual(main())


@pytest.mark.parametrize("room, winner", [(sollol.REPLAY_BYTES, 1), (50, 0)])
def test_replay_that_is_read_ahead_is_kept_only_up_to_a_bound(room, winner, monkeypatch):
    monkeypatch.setattr(sollol, "REPLAY_BYTES", room)

    async def main():
        nodes = overdue("abcd", 60.0), lasting("/api/generate", *"abcd")
        answer, _, gateway = await raced_stream(*nodes)
        assert text_of(answer.body) == "abcd" and [len(node.requests) for node in nodes] == [1, 1]
        assert gateway.dispatcher.rescues["whole"] == winner
    bench.run_virtual(main())


def test_stream_that_goes_on_by_itself_is_not_taken_over():
    async def main():
        said, last = DIALECTS["/api/generate"][1:]
        pieces = [b"%x\r\n%b\r\n" % (len(it), it) for it in (*map(said, "abcd"), *last)]

        def node(*pauses):
            parts = [part for pair in zip(pauses, pieces[1:], strict=True) for part in pair]
            return ScriptedNode(lambda request: [STREAM_HEAD + pieces[0], *parts, b"0\r\n\r\n", KEEP])

        nodes = node(0.0, 20.0, 15.0, 0.0), node(15.0, 0.0, 0.0, 0.0)   # the second says as much when the first goes on
        answer, record, gateway = await raced_stream(*nodes)
        assert text_of(answer.body) == "abcd" and not gateway.dispatcher.rescues
        assert answer.fields["x-sollol-node"] == record.node and len(nodes[1].requests) == 1
    bench.run_virtual(main())


def test_begun_answer_that_nobody_could_go_on_with_is_not_raced():
    async def main():
        nodes = overdue("abcd", 60.0, framing=framed), lasting("/api/generate", "a", "b", "c", "d")
        answer, _, _ = await raced_stream(*nodes)
        assert text_of(answer.body) == "abcd" and [len(node.requests) for node in nodes] == [1, 0]
    bench.run_virtual(main())


def test_exchange_that_is_given_up_yields_no_answer_even_if_one_has_just_come():
    async def main():
        connection = sollol.NodeConnection(sollol.LoopTurns(asyncio.get_running_loop()))
        connection.transport = types.SimpleNamespace(abort=lambda: None)
        head = asyncio.ensure_future(connection.response("POST"))
        await asyncio.sleep(0)
        connection.data_received(chunked(b"x"))
        connection.fail(sollol.Failure("raced", "another was faster"))
        with pytest.raises(sollol.NodeFailure, match="faster"):
            await head
    bench.run_virtual(main())


def test_race_that_is_lost_before_its_first_step_keeps_no_slot():
    async def main():
        nodes = [ScriptedNode(lambda request: [60.0, KEEP]) for _ in range(2)]
        async with gateway_for(*nodes) as gateway:
            caller = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(stream=True)))
            dispatcher = gateway.dispatcher
            await until(lambda: sum(len(node.requests) for node in nodes))
            lease, = (lease for node in dispatcher.cluster.nodes.values() for lease in node.leases)
            other = next(node for node in dispatcher.cluster.nodes.values() if node is not lease.node)
            runner = other.runners["llama3.2:latest"]
            rival = sollol.give_lease(lease.ticket, other, runner, gateway.loop.time(), "races")
            lease.abandon.__self__.data_received(BEGUN)     # of the first node
            lease.ticket.race(rival)
            await asyncio.sleep(0.1)
            assert rival.released and not other.leases and lease.ticket.lease is lease
            caller.cancel()
    bench.run_virtual(main())


@pytest.mark.parametrize("moment, ended, closed", [
    ("before its first step", 1, 0), ("under way", 1, 0), ("answered", 0, 1), ("failed", 0, 0), ("handed over", 0, 0)])
def test_race_gives_back_what_it_holds_once(moment, ended, closed):
    async def main():
        done, calls = asyncio.Event(), collections.Counter()
        answer = None if moment == "failed" else types.SimpleNamespace()

        async def attempt(lease):
            await done.wait()
            return answer

        inference = types.SimpleNamespace(
            loop=asyncio.get_running_loop(), attempt=attempt, exchange=types.SimpleNamespace(transcript=None),
            gateway=types.SimpleNamespace(telemetry=types.SimpleNamespace(
                metrics=types.SimpleNamespace(races=collections.Counter()))),
            end=lambda lease: calls.update(("ended",)), close=lambda begun: calls.update(("closed",)))
        first, second = (types.SimpleNamespace(node=types.SimpleNamespace(name=name), abandon=None) for name in "ab")
        race = sollol.Race(inference, first, second)
        if moment != "before its first step":
            await asyncio.sleep(0)
        if moment in ("answered", "failed", "handed over"):
            done.set()
            await asyncio.sleep(0.01)
        if moment == "handed over":
            assert await race.winner() is answer
        race.close()
        race.close()
        assert (calls["ended"], calls["closed"]) == (ended, closed)
    asyncio.run(main())


def test_race_is_won_even_while_the_first_attempt_still_connects():
    async def main():
        nodes = ScriptedNode(lambda request: [60.0, KEEP]), lasting("/api/generate", "a", "b")
        async with gateway_for(*nodes) as gateway:
            dispatcher, connects = gateway.dispatcher, asyncio.Event()
            one, two = dispatcher.cluster.nodes.values()
            connect = gateway.node_io.pools[one].connect

            async def connect_late():
                await connects.wait()
                return await connect()

            gateway.node_io.pools[one].take, gateway.node_io.pools[one].connect = lambda: None, connect_late
            answer = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(stream=True)))
            await until(lambda: one.leases)
            ticket = one.leases[0].ticket
            ticket.race(sollol.give_lease(ticket, two, two.runners["llama3.2:latest"], gateway.loop.time(), "races"))
            await asyncio.sleep(0.1)
            connects.set()
            assert text_of((await asyncio.wait_for(answer, 1)).body) == "ab" and not health(gateway)["inflight"]
    bench.run_virtual(main())


def random_script(rng, sound):
    """Return the script of a node that pauses anywhere; one that is not `sound` fails in any way, too."""
    end = line(response="", done=True, eval_count=6)

    def pause():
        return rng.choice((0.0, 0.0, 0.05, 0.1, 0.2, 0.3))

    def script(request):
        fate = "sound" if sound or rng.random() < 0.5 else rng.choice(("closes", "fails", "refuses", "cut", "differs"))
        if fate == "closes":
            return [pause()]
        if fate in ("fails", "refuses"):
            return [pause(), framed(b"{}", b"500 Oops" if fate == "fails" else b"400 Bad Request"), KEEP]
        if b'"stream": false' in request:
            return [pause(), framed(line(response="abcdef", done=True)), KEEP]
        words = "ABCDEF" if fate == "differs" else "abcdef"
        lines = [*(line(response=word, done=False) for word in words), end]
        if rng.random() < 0.1:
            raw = framed(b"".join(lines), kind=b"application/x-ndjson")
            return [*(part for at in range(0, len(raw), 150) for part in (pause(), raw[at:at + 150])), KEEP]
        lines = lines[:rng.randrange(len(lines))] if fate == "cut" else lines
        pieces = [part for it in lines for part in (pause(), b"%x\r\n%b\r\n" % (len(it), it))]
        return [pause(), STREAM_HEAD, *pieces] + ([] if fate == "cut" else [b"0\r\n\r\n", KEEP])

    return script


async def race_in_all_ways(seed):
    """Let clients come and leave at random moments, of which many fall together, while everything is raced."""
    rng = random.Random(seed)
    sound = seed % 2 == 0
    nodes = [ScriptedNode(random_script(rng, sound)) for _ in range(rng.choice((2, 3, 4)))]
    async with gateway_for(*nodes) as gateway:
        tasks, dispatcher = asyncio.all_tasks(), gateway.dispatcher

        async def client():
            stream, leaves = rng.random() < 0.7, rng.random() < 0.3
            value = generate(stream=stream, **({"options": {"seed": 1}} if rng.random() < 0.6 else {}))
            await asyncio.sleep(rng.randrange(60) * 0.05)
            try:
                async with asyncio.timeout(rng.randrange(40) * 0.05 if leaves else 400):
                    answer = await call(gateway, "POST", "/api/generate", value)
            except TimeoutError:
                assert leaves
                return
            except asyncio.IncompleteReadError:
                assert not sound
                return
            said = answer.body.splitlines()[-1]
            whole = answer.status == 200 and b"error" not in said and json.loads(said)["done"]
            assert whole or not sound
            assert not whole or text_of(answer.body) in ("abcdef", "ABCDEF")

        await asyncio.gather(*(client() for _ in range(10)))
        await asyncio.sleep(3)
        waiting = dispatcher.waiting
        assert not dispatcher.cluster.in_flight() and not waiting.tickets and not waiting.fair.active
        for node in dispatcher.cluster.nodes.values():
            breakers = [node.breaker, *(it.breaker for it in node.runners.values())]
            assert not (node.busy or node.loading or any(breaker.trial for breaker in breakers))
            served = next(it for it in nodes if it.url == node.settings.url)
            assert len(served.connections) <= len(gateway.node_io.pools[node].idle) + 1     # and a probe's
        left = {task.get_coro().__qualname__ for task in asyncio.all_tasks() - tasks}
        assert left <= {"ScriptedNode.converse", "probe"}
        return sum(gateway.telemetry.metrics.races.values())


def test_races_end_no_answer_and_leave_nothing_behind_whenever_clients_and_nodes_leave(monkeypatch, caplog):
    for name, value in (("SWEEP_S", 0.05), ("SILENT_S", 0.1), ("RACE_LOAD_S", 0.1), ("RACE_GAIN", 1e9)):
        monkeypatch.setattr(sollol, name, value)
    monkeypatch.setattr(sollol, "allowed_s", lambda lease: 0.1)
    assert sum(bench.run_virtual(race_in_all_ways(seed)) for seed in range(int(60 * FUZZ))) > 100
    assert "ERROR" not in {it.levelname for it in caplog.records}


@over_sockets
async def test_whole_answer_that_is_cut_in_the_middle_runs_again_elsewhere():
    whole = b'{"response":"' + b"x" * 5000 + b'","done":true}'
    for cut in (framed(whole)[:-9], chunked(whole[:2000], whole[2000:4000], end=b"")):
        nodes = ScriptedNode(lambda request, cut=cut: [cut, 0.02]), ScriptedNode(lambda request: [framed(whole), KEEP])
        answer, _ = await rescued("/api/generate", *nodes, value=generate())
        assert (answer.status, answer.body, answer.fields["x-sollol-attempts"]) == (200, whole, "2")


# -----------------------------------------------------------------------------
# Every failure of a node, at every moment of a request
# -----------------------------------------------------------------------------

TOKENS = [b'{"model":"llama3.2","response":"%b","done":false}\n' % token for token in (b"He", b"llo")]
STREAM_END = b'{"model":"llama3.2","response":"","done":true,"eval_count":2}\n'
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
BEGUN, BEGUN_BODY = chunked(*TOKENS, end=b""), b"".join(TOKENS)
WHOLE = b'{"model":"llama3.2","response":"Hello","done":true,"eval_count":2}'
GOOD = {True: chunked(*TOKENS, STREAM_END), False: framed(WHOLE)}


async def reset(reader, writer):
    """Break the connection off with a reset, as a crashed or firewalled machine does."""
    await asyncio.sleep(0.02)
    writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def ramble(reader, writer):
    """Send tokens until the connection breaks."""
    while not writer.transport.is_closing():
        writer.write(b"%x\r\n%b\r\n" % (len(TOKENS[0]), TOKENS[0]))
        await asyncio.sleep(0.01)


ANOTHER = "another node's whole answer"     # as if nothing had happened
ENDED = "what came, an error line, a clean end"
COMPLETE = "what the node sent, whole"

# When: (what the node sends for a stream, for a whole answer; what the client gets of a stream, of a whole answer).
MOMENTS = [
    ("connection refused", None, None, ANOTHER, ANOTHER),
    ("closes before the status line", [], [], ANOTHER, ANOTHER),
    ("resets before the status line", [reset], [reset], ANOTHER, ANOTHER),
    ("closes in the status line", [b"HTTP/1.1 20"], [b"HTTP/1.1 20"], ANOTHER, ANOTHER),
    ("closes in the head", [STREAM_HEAD[:-2]], [GOOD[False][:40]], ANOTHER, ANOTHER),
    ("resets in the head", [STREAM_HEAD[:-2], reset], [GOOD[False][:40], reset], ANOTHER, ANOTHER),
    ("garbage status line", [b"SSH-2.0-OpenSSH\r\n\r\n"], [b"SSH-2.0-OpenSSH\r\n\r\n"], ANOTHER, ANOTHER),
    ("status that is none", [b"HTTP/1.1 999 Huh\r\n\r\n", KEEP], [b"HTTP/1.1 0 Huh\r\n\r\n", KEEP],
     ANOTHER, ANOTHER),
    ("header of 2 MiB", [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2**21 + b"\r\n\r\n", KEEP],
     [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 2**21 + b"\r\n\r\n", KEEP], ANOTHER, ANOTHER),
    ("bare CR in a header", [b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n"], [b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n"],
     ANOTHER, ANOTHER),
    ("bare LF in a header", [b"HTTP/1.1 200 OK\r\nX: a\nb: c\r\n\r\n"], [b"HTTP/1.1 200 OK\r\nX: a\nb: c\r\n\r\n"],
     ANOTHER, ANOTHER),
    ("two lengths", [framed(WHOLE).replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n"), KEEP],
     [framed(WHOLE).replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n"), KEEP], ANOTHER, ANOTHER),
    ("length and chunks", [STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n")],
     [STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n")], ANOTHER, ANOTHER),
    ("switches protocols", [b"HTTP/1.1 101 Switching Protocols\r\n\r\n", KEEP],
     [b"HTTP/1.1 101 Switching Protocols\r\n\r\n", KEEP], ANOTHER, ANOTHER),
    ("instant 503", [framed(b"{}", b"503 Busy"), KEEP], [framed(b"{}", b"503 Busy"), KEEP], ANOTHER, ANOTHER),
    ("503 cut in its body", [framed(b"{}" * 9, b"503 Service Unavailable")[:-5]],
     [framed(b"{}" * 9, b"503 Service Unavailable")[:-5]], ANOTHER, ANOTHER),
    ("runner has died", [framed(b'{"error":"llama runner process has terminated"}', b"500 Oops"), KEEP],
     [framed(b'{"error":"llama runner process has terminated"}', b"500 Oops"), KEEP], ANOTHER, ANOTHER),
    ("404 against the index", [framed(b'{"error":"model not found"}', b"404 Not Found"), KEEP],
     [framed(b'{"error":"model not found"}', b"404 Not Found"), KEEP], ANOTHER, ANOTHER),
    ("head and no more", [STREAM_HEAD], [framed(WHOLE)[:-len(WHOLE)]], ANOTHER, ANOTHER),
    ("closes between tokens", [BEGUN, 0.02], [BEGUN, 0.02], ENDED, ANOTHER),
    ("resets between tokens", [BEGUN, reset], [BEGUN, reset], ENDED, ANOTHER),
    ("closes in a token", [BEGUN, b'20\r\n{"resp', 0.02], [framed(WHOLE)[:-9], 0.02], ENDED, ANOTHER),
    ("bad chunk size", [BEGUN, 0.05, b"zz\r\n", KEEP], [BEGUN, 0.05, b"zz\r\n", KEEP], ENDED, ANOTHER),
    ("negative chunk size", [BEGUN, 0.05, b"-5\r\n", KEEP], [BEGUN, 0.05, b"-5\r\n", KEEP], ENDED, ANOTHER),
    ("chunk without its end", [BEGUN, 0.05, b"2\r\n{}}}\r\n", KEEP], [BEGUN, 0.05, b"2\r\n{}}}\r\n", KEEP],
     ENDED, ANOTHER),
    ("bad chunk size at once", [BEGUN + b"zz\r\n", KEEP], [BEGUN + b"zz\r\n", KEEP], ANOTHER, ANOTHER),
    ("closes before the last chunk", [chunked(*TOKENS, STREAM_END, end=b""), 0.02], [framed(WHOLE)[:-1], 0.02],
     COMPLETE, ANOTHER),
    ("closes behind an argument that is called done",
     [BEGUN, b'48\r\n{"message":{"tool_calls":[{"arguments":{"done":true}}]},"done":false  }\n\r\n', 0.02],
     [framed(WHOLE)[:-1], 0.02], ENDED, ANOTHER),
    ("closes in the last chunk", [chunked(*TOKENS, STREAM_END, end=b"0\r\n"), 0.02],
     [chunked(WHOLE, end=b"0\r\n"), 0.02], COMPLETE, ANOTHER),
    ("length too long", [framed(TOKENS[0] + STREAM_END).replace(b"h: ", b"h: 9"), 0.02],
     [framed(WHOLE).replace(b"h: ", b"h: 9"), 0.02], "cut", ANOTHER),
    ("length too short", [framed(TOKENS[0]) + STREAM_END, KEEP], [framed(WHOLE) + b"evil", KEEP], COMPLETE, COMPLETE),
    ("another answer behind", [GOOD[True] + framed(b"evil"), KEEP], [GOOD[False] + framed(b"evil"), KEEP],
     COMPLETE, COMPLETE),
    ("no length at all", [b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n" + TOKENS[0] + STREAM_END],
     [b"HTTP/1.1 200 OK\r\n\r\n" + WHOLE], COMPLETE, COMPLETE),
]


def client_got(expected, answer, sent, good):
    """Tell whether an answer is what a row of MOMENTS says."""
    if expected == "cut":
        return answer is None
    if answer is None or answer.status != 200:
        return False
    if expected == ENDED:
        begun, rest = answer.body[:len(BEGUN_BODY)], answer.body[len(BEGUN_BODY):]
        ending = rb'(\{"resp\n|\{\}\n|\{"message.*\n)?\{"error": "127.0.0.1:[^\n]*"\}\n'
        return begun == BEGUN_BODY and re.fullmatch(ending, rest)
    if expected == COMPLETE and b"evil" not in answer.body and answer.body in sent:
        return True
    return answer.body == (b"".join((*TOKENS, STREAM_END)) if good else WHOLE)


@table("sends, sends_whole, of_a_stream, of_a_whole", MOMENTS)
@over_sockets
async def test_failure_of_a_node_costs_its_client_no_more_than_it_must(sends, sends_whole, of_a_stream, of_a_whole):
    for stream, script, expected in ((True, sends, of_a_stream), (False, sends_whole, of_a_whole)):
        nodes = ScriptedNode(lambda request, script=script: script), ScriptedNode(
            lambda request, stream=stream: [GOOD[stream], KEEP])
        async with gateway_for(*nodes, flags=IN_TURN) as gateway:
            if script is None:
                await nodes[0].stop()
            caller = await Caller.to(gateway)
            try:
                answer = await asyncio.wait_for(caller.ask("POST", "/api/generate", generate(stream=stream)), 5)
            except (asyncio.IncompleteReadError, ConnectionError):
                answer = None
            sent = b"".join(item for item in script or () if isinstance(item, bytes))
            assert client_got(expected, answer, sent, stream), (answer and (answer.head, answer.body))
            assert len(nodes[1].requests) == (expected == ANOTHER)
            if answer:              # and the next one on the same connection is right
                again = await caller.ask("POST", "/api/generate", generate(stream=stream))
                assert client_got(of_a_stream if stream else of_a_whole, again, sent, stream) or client_got(
                    ANOTHER, again, sent, stream), again.body
            caller.close()
            assert health(gateway)["inflight"] == 0


def test_node_that_is_silent_at_connect_costs_five_seconds_once():
    """Its host is off, or a firewall drops what is sent to it: here a listener whose backlog is full."""
    async def main():
        deaf, good = ScriptedNode(), ScriptedNode(lambda request: [OK, KEEP])
        async with gateway_for(deaf, good, flags=IN_TURN) as gateway:
            port = deaf.port
            await deaf.stop()
            with socket.socket() as listener, contextlib.ExitStack() as stack:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", port))
                listener.listen(0)
                for _ in range(4):      # more than fit
                    filler = stack.enter_context(socket.socket())
                    filler.setblocking(False)
                    filler.connect_ex(("127.0.0.1", port))
                for pool in gateway.node_io.pools.values():
                    pool.prune(math.inf)
                for most_s in (5.5, 0.5, 0.5):
                    started_s = gateway.loop.time()
                    answer = await call(gateway, "POST", "/api/generate", generate())
                    assert answer.status == 200 and gateway.loop.time() - started_s < most_s
    bench.run_virtual(main())


@pytest.mark.parametrize("stream", [True, False])
@over_sockets
async def test_answer_that_never_ends_is_passed_on_in_bounded_memory_until_its_client_leaves(stream):
    async def flood(reader, writer):
        with contextlib.suppress(ConnectionError):
            while not writer.transport.is_closing():
                writer.write(b"%x\r\n%b\r\n" % (2**16, b"x" * 2**16))
                await writer.drain()

    node = ScriptedNode(lambda request: [STREAM_HEAD, flood])
    async with gateway_for(node) as gateway:
        for options in ({}, {"options": {"seed": 1}}):
            caller = await Caller.to(gateway)
            caller.writer.write(posted(generate(stream=stream, **options)))
            await caller.head()
            for _ in range(8):
                await caller.reader.readexactly(sollol.MIB)
            assert all(client.transport.get_write_buffer_size() < 4 * sollol.MIB for client in gateway.listener.clients)
            caller.writer.transport.abort()
            await until(lambda: health(gateway)["inflight"] == 0 and not gateway.listener.clients)


@over_sockets
async def test_many_pooled_connections_that_died_in_a_restart_cost_one_fresh_one_each():
    node = ScriptedNode(lambda request: [0.05, OK, KEEP])
    node.line = "slots=8"
    async with gateway_for(node) as gateway:
        for _ in range(3):
            answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate()) for _ in range(8)))
            assert {(it.status, it.fields["x-sollol-attempts"]) for it in answers} == {(200, "1")}
            port = node.port
            await node.stop()
            await node.start(port)


# -----------------------------------------------------------------------------
# How a request ended
# -----------------------------------------------------------------------------

def lines_then(*after, path="/api/generate"):
    """Return a script: some tokens, then these bytes of the body, each a chunk of its own, and the last chunk."""
    kind, said, _ = DIALECTS[path]
    return [chunked(said("He"), said("llo"), kind=kind, end=b""), 0.02,
            *(b"%x\r\n%b\r\n" % (len(it), it) for it in after), b"0\r\n\r\n", KEEP]


ERRORS = line(error="unexpected EOF"), sse(error={"message": "unexpected EOF"}), b"event: error\n" + sse(message="EOF")
FINISHED = DIALECTS["/api/generate"][2][0]

# What: (path, request, what the node sends, outcome, status; the kind that is held against the node, does it teach).
ENDINGS = [
    ("a whole stream", "/api/generate", {}, lines_then(FINISHED), "ok", 200, None, True),
    ("a whole answer", "/api/generate", {"stream": False}, [0.02, framed(WHOLE), KEEP], "ok", 200, None, True),
    ("a stream that is cut", "/api/generate", {}, lines_then()[:2], "cut", 200, "died", False),
    ("a stream of events that is cut", OPENAI, {}, lines_then(path=OPENAI)[:2], "cut", 200, "died", False),
    ("a deterministic stream that is cut", "/api/generate", {"options": {"seed": 7}}, lines_then()[:2], "cut", 200,
     "died", False),
    ("a stream that breaks its framing", "/api/generate", {}, [*lines_then()[:2], b"zz\r\n", KEEP], "cut", 200,
     "garbage", False),
    ("a stream of known length that is cut", "/api/generate", {}, [
        framed(TOKENS[0] * 9, kind=b"application/x-ndjson")[:-9], 0.02], "cut", 200, "died", False),
    ("a stream that lost its framing only", "/api/generate", {}, lines_then(FINISHED)[:3], "ok", 200, "died", False),
    ("an error line", "/api/generate", {}, lines_then(ERRORS[0]), "error", 200, "model", False),
    ("an error line of a deterministic stream", "/api/generate", {"options": {"seed": 7}}, lines_then(ERRORS[0]),
     "error", 200, "model", False),
    ("an error line of known length", "/api/generate", {}, [
        framed(TOKENS[0] + ERRORS[0], kind=b"application/x-ndjson"), KEEP], "error", 200, "model", False),
    ("an error event", OPENAI, {}, lines_then(ERRORS[1], path=OPENAI), "error", 200, "model", False),
    ("an error event with CRLF", OPENAI, {}, lines_then(ERRORS[1].replace(b"\n", b"\r\n"), path=OPENAI), "error", 200,
     "model", False),
    ("an error event before the last one", OPENAI, {}, lines_then(ERRORS[1], SSE[1], path=OPENAI), "error", 200,
     "model", False),
    ("an event that is called error", OPENAI, {}, lines_then(ERRORS[2], path=OPENAI), "error", 200, "model", False),
    ("a stream without its last line", "/api/generate", {}, lines_then(), "ok", 200, None, False),
    ("a deterministic stream without its last line", "/api/generate", {"options": {"seed": 7}}, lines_then(), "ok",
     200, None, False),
    ("events without the last one", OPENAI, {}, lines_then(path=OPENAI), "ok", 200, None, False),
    ("an error in a text", "/api/generate", {}, lines_then(line(response='{"error":"x"}', done=False), FINISHED), "ok",
     200, None, True),
    ("a node's own 400", "/api/generate", {}, [framed(b'{"error":"no"}', b"400 Bad Request"), KEEP], "error", 400,
     None, False),
    ("no node that answers", "/api/generate", {}, [], "error", 502, "died", False),
]


@table("path, asked, script, outcome, status, kind, teaches", ENDINGS)
@over_sockets
async def test_what_fails_after_the_first_byte_counts_as_failed(
        path, asked, script, outcome, status, kind, teaches, caplog):
    caplog.set_level("INFO", sollol.LOG.name)
    value = {"model": "llama3.2", "messages": [], "prompt": "x", "stream": True, **asked}
    async with gateway_for(ScriptedNode(lambda request: script)) as gateway:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            assert (await call(gateway, "POST", path, value)).status == status
        await until(lambda: gateway.telemetry.metrics.requests or gateway.telemetry.finished)
        node, = (await call(gateway, "GET", "/api/stats")).json()["nodes"]
        tries = node["errors"]          # the only node gets what it broke off, and may be repeated, three times
        assert tries in ((1, 3) if kind == "died" else (1,) if kind else (0,)) and node["outcomes"] == {outcome: 1}
        judged = b"sollol_predicted_error_ratio_count %d\n" % teaches
        assert judged in (await call(gateway, "GET", "/metrics")).body
        assert (node["latency_s"]["p50"] is not None) == teaches
        (name, _, route, code, ended), = (it for it in gateway.telemetry.metrics.requests if it[2] == path)
        assert (name, route, code, ended) == (node["name"], path, status, outcome)
        assert dict(gateway.telemetry.metrics.failovers) == ({(node["name"], kind): tries} if kind else {})
        broken = gateway.dispatcher.cluster.nodes[name].runners["llama3.2:latest"].breaker.failures
        assert broken == (kind == "model")
        assert sum(step.requests for step in gateway.telemetry.metrics.steps) == (outcome == "ok")
        (level, fields), = ((it.levelname, one) for it in caplog.records if isinstance(it.msg, list)
                            for one in it.msg if one["path"] == path)
        assert (level, fields["outcome"]) == ("INFO" if outcome == "ok" else "WARNING", outcome)


@over_sockets
async def test_request_that_reached_no_node_or_whose_client_left_is_no_error(tmp_path, caplog):
    caplog.set_level("INFO", sollol.LOG.name)
    (tmp_path / "keys").write_text("secret name=alice rate=2/h\n")
    node = ScriptedNode(lambda request: [100.0])
    async with gateway_for(node, flags=("--keys", str(tmp_path / "keys"))) as gateway:
        fields = {"Authorization": "Bearer secret"}
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 401
        assert (await call(gateway, "POST", "/api/generate", generate(), X_Priority="huge", **fields)).status == 400
        caller = await Caller.to(gateway)
        caller.writer.write(posted(generate()).replace(b"Host", b"X-API-Key: secret\r\nHost"))
        await until(lambda: health(gateway)["inflight"])
        caller.close()
        await until(lambda: not health(gateway)["inflight"])
        assert (await call(gateway, "POST", "/api/generate", generate(), **fields)).status == 429
        gateway.telemetry.tally()
        ended = collections.Counter((code, outcome) for *_, code, outcome in gateway.telemetry.metrics.requests)
        assert ended == {(401, "refused"): 1, (400, "refused"): 1, (499, "client_left"): 1, (429, "refused"): 1}
        assert all(it.levelname == "INFO" for it in caplog.records if isinstance(it.msg, list))


@over_sockets
async def test_error_in_a_push_is_its_clients_own():
    script = [chunked(line(status="pushing"), line(error="you need to sign in")), KEEP]
    node = ScriptedNode(lambda request: script)
    async with gateway_for(node) as gateway:
        for _ in range(3):
            await call(gateway, "POST", "/api/push", {"model": "llama3.2"})
        found, = (await call(gateway, "GET", "/api/stats")).json()["nodes"]
        assert (found["state"], found["errors"], found["outcomes"]) == ("up", 0, {"error": 3})


# -----------------------------------------------------------------------------
# Back-pressure, uploads, disconnects
# -----------------------------------------------------------------------------

@over_sockets
async def test_slow_reader_slows_the_node_and_not_the_gateways_memory(node_tls=None):
    sent = 0

    async def flood(reader, writer):
        nonlocal sent
        with contextlib.suppress(ConnectionError):
            for _ in range(400):
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
                sent += 65536
            writer.write(b"0\r\n\r\n")

    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    node = ScriptedNode(lambda request: [head, flood, KEEP])
    node.tls, node.line = node_tls, "insecure=yes" if node_tls else ""
    async with gateway_for(node) as gateway:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, gateway.listener.address)
        reader, writer = await asyncio.open_connection(sock=raw, limit=65536, **spoken(gateway))
        body = json.dumps(generate(stream=True)).encode()
        writer.write(b"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await asyncio.sleep(0.5)
        stuck_at = sent
        assert stuck_at < 16 * 2**20
        total = 0
        while total < 400 * 65536:
            total += len(await reader.read(2**20))
        assert sent == 400 * 65536 > stuck_at
        writer.close()


@over_sockets
async def test_blob_streams_up_with_either_framing():
    node = bench.SimNode(**FAST)
    blob = os.urandom(3 * 2**20)
    digest = hashlib.sha256(blob).hexdigest()
    async with gateway_for(node) as gateway:
        path = f"/api/blobs/sha256:{digest}"
        assert (await call(gateway, "HEAD", path)).status == 404
        caller = await Caller.to(gateway)
        caller.writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for at in range(0, len(blob), 50_000):
            caller.writer.write(sollol.chunk(blob[at:at + 50_000]))
            await caller.writer.drain()
        caller.writer.write(b"0\r\n\r\n")
        assert (await caller.answer()).status == 201
        assert (await caller.ask("GET", "/api/health")).status == 200   # the connection lives on
        caller.close()
        assert (await call(gateway, "HEAD", path)).status == 200
        node.blobs.clear()
        assert (await call(gateway, "POST", path, blob)).status == 201
        assert node.blobs == {digest: len(blob)}


@over_sockets
async def test_body_of_a_refused_upload_is_never_taken_for_a_request():
    node = bench.SimNode(**FAST)
    async with gateway_for(node) as gateway:
        node.kill()
        await until(lambda: health(gateway)["nodes"]["up"] == 0)
        body = get(target=b"/api/version")
        raw = await raw_call(gateway, head(b"POST /api/blobs/sha256:0 HTTP/1.1", b"Host: a",
                                           b"Content-Length: %d" % len(body)) + body)
        assert raw.startswith(b"HTTP/1.1 503 ") and b"Connection: close" in raw and raw.count(b"HTTP/1.1") == 1


@over_sockets
async def test_answer_before_the_end_of_an_upload_is_not_lost():
    node = bench.SimNode(**FAST)
    blob = b"x" * (8 * 2**20)
    digest = hashlib.sha256(blob).hexdigest()
    async with gateway_for(node) as gateway:
        node.blobs[digest] = len(blob)
        caller = await Caller.to(gateway)
        caller.writer.write(f"POST /api/blobs/sha256:{digest} HTTP/1.1\r\nHost: x\r\n"
                            f"Content-Length: {len(blob)}\r\n\r\n".encode() + blob[:2**20])
        assert (await caller.answer()).status == 200
        caller.close()
        await until(lambda: health(gateway)["inflight"] == 0)


@over_sockets
async def test_answer_of_a_node_that_breaks_an_upload_off_is_not_lost():
    async def leave(reader, writer):
        writer.transport.abort()    # what it has not read makes that a reset

    node = ScriptedNode(lambda request: [framed(b'{"error":"too large"}', b"413 Content Too Large"), leave])
    async with gateway_for(node) as gateway:
        for _ in range(5):
            caller = await Caller.to(gateway)
            caller.writer.write(head(b"POST /api/blobs/sha256:0 HTTP/1.1", b"Host: a", b"Transfer-Encoding: chunked")
                                + sollol.chunk(b"x" * 2**20) * 16)
            assert (await caller.answer()).body == b'{"error":"too large"}'
            caller.close()


@over_sockets
async def test_client_that_leaves_an_upload_which_its_node_does_not_read_is_noticed():
    async def deaf(reader, writer):
        writer.transport.pause_reading()
        await asyncio.sleep(3600)

    async with gateway_for(ScriptedNode(lambda request: [deaf])) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.write(head(b"POST /api/blobs/sha256:0 HTTP/1.1", b"Host: a", b"Transfer-Encoding: chunked")
                            + sollol.chunk(b"x" * 2**20) * 64)
        await until(lambda: any(client.sink and client.read_paused for client in gateway.listener.clients))
        caller.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        caller.writer.transport.abort()
        await until(lambda: health(gateway)["inflight"] == 0, 2.0)


@over_sockets
async def test_client_hangup_frees_slot_queue_and_node_connection():
    """While queued, before the first byte, and after it."""
    node = bench.SimNode(slots=1, speed=1.0, loaded=("llama3.2",))
    node.line = "slots=1"
    async with gateway_for(node) as gateway:
        callers = [await Caller.to(gateway) for _ in range(3)]
        body = json.dumps(generate(tokens=2000, stream=True)).encode()
        for caller in callers:
            caller.writer.write(b"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (
                len(body), body))
            await asyncio.sleep(0.02)
        await callers[0].head()
        assert (health(gateway)["inflight"], health(gateway)["queued"]) == (1, 2)
        callers[2].close()
        await until(lambda: health(gateway)["queued"] == 1, 0.3)
        callers[0].close()
        await until(lambda: node.aborted == 1 and health(gateway)["queued"] == 0, 0.3)
        await until(lambda: node.in_flight == 1, 0.3)
        callers[1].writer.transport.abort()
        await until(lambda: health(gateway)["inflight"] == 0 and node.in_flight == 0, 0.3)


@over_sockets
async def test_200_clients_that_vanish_leave_nothing_behind():
    nodes = [bench.SimNode("rtx4090", slots=4, loaded=("llama3.2",)), bench.SimNode(slots=2, loaded=("llama3.2",)),
             bench.SimNode("m2", slots=1)]
    async with gateway_for(*nodes) as gateway:
        async def vanish(number):
            caller = await Caller.to(gateway)
            body = json.dumps(generate(tokens=300, stream=bool(number % 2))).encode()
            data = b"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            caller.writer.write(data[:len(data) - (number % 5 == 0) * 10])
            await asyncio.sleep(gateway.rng.uniform(0, 1.0))
            if number % 3:
                caller.writer.transport.abort()
            else:
                caller.close()
        await asyncio.gather(*(vanish(number) for number in range(200)))
        await until(lambda: health(gateway)["inflight"] == health(gateway)["queued"] == 0, 0.3)
        await until(lambda: sum(node.in_flight for node in nodes) == 0, 0.3)
        assert not gateway.dispatcher.waiting.fair.active
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert answer.status == 200


@over_sockets
async def test_too_many_connections_are_told_so():
    async with gateway_for(bench.SimNode(**FAST), flags=["--max-connections", "2"]) as gateway:
        callers = [await Caller.to(gateway) for _ in range(2)]
        await until(lambda: len(gateway.listener.clients) == 2)
        raw = await raw_call(gateway, b"")
        assert raw.startswith(b"HTTP/1.1 503 ") and raw.endswith(b'{"error": "too many connections"}')
        for caller in callers:
            assert (await caller.ask("GET", "/")).status == 200
            caller.close()


@over_sockets
async def test_pipelining_without_reading_is_bounded_in_memory():
    async with gateway_for(bench.SimNode(**FAST)) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.transport.pause_reading()
        caller.writer.write(b"GET /api/stats HTTP/1.1\r\nHost: x\r\n\r\n" * 400_000)
        await asyncio.sleep(0.5)
        client = next(iter(gateway.listener.clients))
        assert len(client.buffer) < 2 * sollol.READ_AHEAD_BYTES
        assert client.transport.get_write_buffer_size() < 2**20
        caller.writer.transport.abort()


def test_reader_of_a_kilobyte_a_second_is_never_cut_and_one_that_reads_nothing_is():
    async def flood(reader, writer):
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"10000\r\n" + b"x" * 65535 + b"\n\r\n")
                await writer.drain()

    async def main():
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with gateway_for(ScriptedNode(lambda request: [head, flood])) as gateway:
            clients = [socket.socket() for _ in range(2)]
            for client in clients:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(gateway.listener.address)
                client.sendall(posted(generate(stream=True)))
                client.setblocking(False)
            await asyncio.sleep(5)
            for _ in range(250):    # 1250 s
                await asyncio.sleep(5)
                with contextlib.suppress(BlockingIOError):
                    assert len(clients[0].recv(5000))
            assert health(gateway)["inflight"] == 1
            for client in clients:
                client.close()
            await until(lambda: health(gateway)["inflight"] == 0, 700.0)
    bench.run_virtual(main())


@over_sockets
async def test_slow_reader_does_not_make_its_node_suspect():
    async def flood(reader, writer):
        for _ in range(200):
            writer.write(sollol.chunk(b'{"done":false}\n' * 5000))
            await writer.drain()

    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with gateway_for(ScriptedNode(lambda request: [head, flood])) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.transport.pause_reading()
        body = json.dumps(generate(stream=True)).encode()
        caller.writer.write(b"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (
            len(body), body))
        await until(lambda: any(client.write_paused for client in gateway.listener.clients))
        await asyncio.sleep(2.8)
        assert not next(iter(gateway.dispatcher.cluster.nodes.values())).suspect
        caller.writer.transport.abort()


def test_upload_that_stops_coming_is_ended():
    async def main():
        async with gateway_for(bench.SimNode(**FAST)) as gateway:
            caller = await Caller.to(gateway)
            caller.writer.write(b"POST /api/blobs/sha256:%b HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nab" % (
                b"0" * 64))
            assert (await caller.answer()).status == 408
            caller.close()
            await until(lambda: health(gateway)["inflight"] == 0)
    bench.run_virtual(main())


BLOB_PATH = b"/api/blobs/sha256:" + b"0" * 64


async def drip(gateway, path, size, framing, piece, pause_s):
    """Send a body piece by piece until it is whole or refused; return (status, seconds taken)."""
    caller, start_s = await Caller.to(gateway), gateway.loop.time()
    field = b"Transfer-Encoding: chunked" if framing == "chunked" else b"Content-Length: %d" % size
    caller.writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % (path, field))
    answer, sent = asyncio.create_task(caller.answer()), 0
    body = json.dumps({"model": "llama3.2", "prompt": "", "stream": False, "pad": ""})[:-2].encode()
    body = body + b"x" * (size - len(body) - 2) + b'"}'
    while sent < size and not answer.done():
        data = body[sent:sent + piece]
        caller.writer.write(sollol.chunk(data) if framing == "chunked" else data)
        sent += len(data)
        await asyncio.wait([answer], timeout=pause_s)
    if framing == "chunked" and not answer.done():
        caller.writer.write(b"0\r\n\r\n")
    status = (await answer).status
    if status == 408:
        assert await caller.reader.read() == b""
    caller.close()
    return status, gateway.loop.time() - start_s


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("path, accepted", [(b"/api/generate", 200), (BLOB_PATH, 400)])
def test_body_that_comes_too_slowly_gets_408_and_a_slow_but_steady_one_is_taken(path, accepted, framing):
    """In vain: 100 bytes a second, a byte a second, silence. The blob's digest is wrong: 400 if it came whole."""
    async def main():
        async with gateway_for(bench.SimNode(**FAST)) as gateway:
            for piece, pause_s in ((100, 1.0), (1, 1.0), (1, 1000.0)):
                status, took_s = await drip(gateway, path, 50_000, framing, piece, pause_s)
                assert status == 408 and 9 < took_s < 15
            status, took_s = await drip(gateway, path, 200_000, framing, 40_000, 50.0)
            assert status == 408 and 45 < took_s < 52   # silence for longer than has been paid for
            for piece, pause_s, least_s in ((1500, 1.0, 290), (60_000, 50.0, 290), (100_000, 1.0, 3)):
                status, took_s = await drip(gateway, path, 480_000, framing, piece, pause_s)
                assert status == accepted and took_s > least_s
            assert health(gateway)["inflight"] == health(gateway)["queued"] == 0
    bench.run_virtual(main())


def test_body_that_its_node_does_not_read_is_not_called_slow():
    async def main():
        class Blobs(ScriptedNode):
            async def converse(self, reader, writer):
                head = await reader.readuntil(b"\r\n\r\n")
                if b" /api/blobs" not in head:
                    writer.write(framed(json.dumps(self.own_answer(head)).encode()))
                    writer.close()
                    return
                await asyncio.sleep(200)
                await reader.readexactly(20_000_000)
                writer.write(framed(b"", b"201 Created"))

        async with gateway_for(Blobs()) as gateway:
            caller = await Caller.to(gateway)
            caller.writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n" % BLOB_PATH)
            caller.writer.write(bytes(20_000_000))
            assert (await caller.answer()).status == 201
            caller.close()
    bench.run_virtual(main())


# -----------------------------------------------------------------------------
# The loop is never held, and memory has bounds
# -----------------------------------------------------------------------------

HOLD_S = 0.05                       # of the loop's thread: what other threads and processes take does not count


class PatientNode(http.server.ThreadingHTTPServer):
    """A node in threads of its own: what it does holds up no loop. It reads any body, and answers `pause_s` later."""

    daemon_threads = True
    line, pause_s = "", 0.0

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def tell(self, value):
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.tell(ScriptedNode().own_answer(f"GET {self.path} ".encode()))

        def do_POST(self):
            left = int(self.headers.get("Content-Length", 0))
            while left and (data := self.rfile.read(min(left, 2**20))):
                left -= len(data)
            while self.headers.get("Transfer-Encoding") and (size := int(self.rfile.readline(), 16)):
                self.rfile.read(size + 2)
            time.sleep(self.server.pause_s)
            self.tell({"response": "fine", "done": True})

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.port = self.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    async def stop(self):
        await asyncio.to_thread(self.shutdown)
        self.server_close()


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """How long the loop was held at the most, in its thread's CPU time, and by how much the process grew."""

    async def __aenter__(self):
        self.hold_s, self.before_bytes, self.most_bytes = 0.0, resident_bytes(), 0
        self.task = asyncio.create_task(self.beat())
        await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_):
        self.task.cancel()

    async def beat(self):
        while True:
            began_s = time.thread_time()
            await asyncio.sleep(0.001)
            self.hold_s = max(self.hold_s, time.thread_time() - began_s)
            self.most_bytes = max(self.most_bytes, resident_bytes())

    @property
    def grown_mib(self):
        return (self.most_bytes - self.before_bytes) / 2**20


def blast(address, data, patience_s=30.0):
    """Send bytes from another thread, and return what came back until the connection closed or an answer was whole."""
    received = []
    with socket.create_connection(address) as client:
        client.settimeout(patience_s)
        sender = threading.Thread(target=swallow, args=(client, data))
        sender.start()
        with contextlib.suppress(OSError):
            while piece := client.recv(2**20):
                received.append(piece)
                if b"\r\n\r\n" in piece and b"Connection: close" not in data[-200:]:
                    break
            client.shutdown(socket.SHUT_RDWR)
        sender.join()
    return b"".join(received)


def swallow(client, data):
    """Send bytes for as long as they are taken."""
    with contextlib.suppress(OSError):
        client.sendall(data)


def filled(lead, unit, tail, size):
    return lead + unit * ((size - len(lead) - len(tail)) // len(unit)) + tail


def sent_whole(body, path=b"/api/chat", *fields):
    lines = [b"POST %b HTTP/1.1" % path, b"Host: localhost", b"Content-Length: %d" % len(body), *fields]
    return head(*lines) + body


def in_chunks_of_one(path, count):
    body = filled(b'{"model":"llama3.2","prompt":"', b"a", b'"}', count)
    return (head(b"POST %b HTTP/1.1" % path, b"Host: localhost", b"Transfer-Encoding: chunked")
            + re.sub(rb"(?s)(.)", rb"1\r\n\1\r\n", body) + END)


LEAD, LAST = b'{"model":"llama3.2",', head(b"GET / HTTP/1.1", b"Host: localhost", b"Connection: close")
MULTIPART = b"Content-Type: multipart/form-data; boundary=c"
# Name, what is sent, the status, and by how many MiB the gateway may grow. A body as it is held is part of that.
GREEDY = [
    ("pipelined questions", lambda: b"HEAD /api/stats HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000 + LAST, 200, 16),
    ("pipelined metrics", lambda: b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000 + LAST, 200, 64),
    ("objects", lambda: sent_whole(filled(LEAD + b'"messages":[0,', b"{},", b"0]}", 2**24)), 200, 64),
    ("objects, short", lambda: sent_whole(filled(LEAD + b'"messages":[0,', b"{},", b"0]}", 2**18)), 200, 16),
    ("lists of lists", lambda: sent_whole(filled(LEAD + b'"messages":[0,', b"[[[[[]]]]],", b"0]}", 2**24)), 200, 64),
    ("depth", lambda: sent_whole(filled(LEAD + b'"messages":', b"[", b"", 2**24)), 200, 64),
    ("depth of objects", lambda: sent_whole(filled(LEAD + b'"tools":', b'{"":', b"", 2**24)), 200, 64),
    ("strings", lambda: sent_whole(filled(LEAD + b'"messages":[0,', b'"",', b"0]}", 2**24)), 200, 64),
    ("keys", lambda: sent_whole(filled(LEAD, b'"Model":"llama3.2",', b'"a":0}', 2**24)), 200, 64),
    ("options", lambda: sent_whole(filled(LEAD, b'"options":[' + b"{}," * 9000 + b"0],", b'"a":0}', 2**22)), 200, 64),
    ("space", lambda: sent_whole(filled(b"", b" ", b'{"model":"llama3.2"}', 2**24)), 200, 64),
    ("a prompt", lambda: sent_whole(filled(LEAD + b'"prompt":"', b"word ", b'"}', 2**26), b"/api/generate"), 200, 160),
    ("escapes", lambda: sent_whole(filled(LEAD + b'"prompt":"', b'\\"\\\\', b'"}', 2**24), b"/api/generate"), 200, 64),
    ("a context", lambda: sent_whole(filled(LEAD + b'"context":[', b"12345,", b"0]}", 2**24)), 200, 64),
    ("texts", lambda: sent_whole(filled(LEAD + b'"input":[', b'"one text",', b'""]}', 2**22), b"/api/embed"), 200, 64),
    ("a name", lambda: sent_whole(filled(b'{"model":"', b"x", b'"}', 2**24)), 200, 64),
    ("form", lambda: sent_whole(b"--c\r\n\r\n\r\n" * 2**20, b"/v1/audio/transcriptions", MULTIPART), 200, 64),
    ("chunks of one byte", lambda: in_chunks_of_one(b"/api/chat", 2**19), 200, 32),
    ("upload of such chunks", lambda: in_chunks_of_one(b"/api/blobs/sha256:" + b"0" * 64, 2**19), 200, 32),
    ("empty lines", lambda: b"\r\n" * 2**21, 400, 16),
    ("fields", lambda: get(*[b"a:"] * 12_500), 431, 16),
    ("more than it may be", lambda: sent_whole(b"x" * (2**26 + 1)), 413, 16),
]


@table("make, status, most_mib", GREEDY)
def test_nothing_that_a_client_sends_holds_the_loop_or_grows_it_without_bound(make, status, most_mib):
    async def main():
        async with gateway_for(PatientNode(), flags=["--no-split-embed"]) as gateway:
            data = make()
            for _ in range(3):      # a busy machine may hold it once
                async with Watch() as watch:
                    answer = await asyncio.to_thread(blast, gateway.listener.address, data)
                assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
                if watch.hold_s < HOLD_S and watch.grown_mib < most_mib:
                    break
            assert watch.hold_s < HOLD_S and watch.grown_mib < most_mib
            await until(lambda: not gateway.memory.held_bytes and not gateway.listener.clients)
    run_real(main())


@pytest.mark.parametrize("behind", [b"", b"POST / HTTP/1.1"])
def test_long_body_is_not_copied_out_of_the_buffer_that_it_came_in(behind):
    client = sollol.ClientConnection(types.SimpleNamespace(time=lambda: 0.0), None)
    client.buffer = bytearray(b"x" * 2**24 + behind)
    tracemalloc.start()
    try:
        body = client.take(2**24)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert (len(body), client.buffer) == (2**24, behind)


@over_sockets
async def test_head_that_comes_alone_may_be_as_long_as_heads_may_be():
    async with gateway_for(bench.SimNode(**FAST)) as gateway:
        caller, question = await Caller.to(gateway), head(b"GET / HTTP/1.1", b"Host: localhost", b"X: x")
        for size in (sollol.SHORT_BODY_BYTES + 1, sollol.MAX_HEAD_BYTES + 4):
            caller.writer.write(question[:-4] + b"x" * (size - len(question)) + question[-4:])
            assert (await caller.answer()).status == 200
        caller.close()


def test_several_giant_bodies_at_once_hold_the_loop_no_longer():
    async def main():
        async with gateway_for(PatientNode()) as gateway:
            data = sent_whole(filled(LEAD + b'"messages":[0,', b"{},[],", b"0]}", 2**24))
            for _ in range(3):
                async with Watch() as watch:
                    answers = await asyncio.gather(*(
                        asyncio.to_thread(blast, gateway.listener.address, data) for _ in range(6)))
                assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
                if watch.hold_s < HOLD_S:
                    break
            assert watch.hold_s < HOLD_S
    run_real(main())


def crumbled(body, kind=b"application/x-ndjson"):
    """Return a whole answer in chunks of one byte."""
    return (head(b"HTTP/1.1 200 OK", b"Content-Type: " + kind, b"Transfer-Encoding: chunked")
            + re.sub(rb"(?s)(.)", rb"1\r\n\1\r\n", body) + END)


LONG_LINE = b'{"response":"%b","done":false}\n' % (b"a" * 2**18) + FINISHED
SEEDED, SHORT_LINES = {"options": {"seed": 1}}, b'{"response":"a"}\n' * 2**15 + FINISHED
SHORT_EVENTS = named_event("response.output_text.delta", delta="a", item_id="x", sequence_number=1) * 2**14
# Name, path, the request, what the node sends, the body that the client gets.
LAVISH = [
    ("chunks of one byte", "/api/generate", {}, crumbled(LONG_LINE), LONG_LINE),
    ("chunks of one line", "/api/generate", {}, chunked(*[b"\n"] * 2**18, FINISHED), b"\n" * 2**18 + FINISHED),
    ("a whole answer in chunks of one byte", "/api/generate", {"stream": False}, crumbled(LONG_LINE), LONG_LINE),
    ("a deterministic stream in chunks of one byte", "/api/generate", SEEDED, crumbled(LONG_LINE), LONG_LINE),
    ("short lines of a deterministic stream", "/api/generate", SEEDED, chunked(SHORT_LINES), SHORT_LINES),
    ("short named events", "/v1/responses", {"stream": True, "temperature": 0},
     chunked(SHORT_EVENTS, kind=b"text/event-stream"), SHORT_EVENTS),
    ("the same, cut", "/api/generate", SEEDED, chunked(SHORT_LINES[:-9], end=b""), None),
    ("the same, until it closes", "/api/generate", SEEDED,
     head(b"HTTP/1.1 200 OK", b"Content-Type: application/x-ndjson") + SHORT_LINES, SHORT_LINES),
    ("chunks of one byte, and more than the last one", "/api/generate", {}, crumbled(LONG_LINE) + b"x", LONG_LINE),
    ("an object in chunks of one byte", "/api/show", {}, crumbled(b"x" * 2**18), b"x" * 2**18),
    ("short lines of progress", "/api/pull", {},
     chunked(b'{"status":"a"}\n' * 2**15 + b'{"status":"success"}\n'), None),
]


def whole_answer(address, path, value):
    """Return the body of an answer, however long reading it takes."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("POST", path, json.dumps(value))
    body = connection.getresponse().read()
    connection.close()
    return body


@table("path, fields, sent, expected", LAVISH)
def test_nothing_that_a_node_sends_holds_the_loop(path, fields, sent, expected):
    async def main():
        node = ScriptedNode(lambda request: [sent])
        async with gateway_for(node) as gateway:
            request = {"model": "llama3.2", **fields}
            for _ in range(3):      # a busy machine may hold it once
                async with Watch() as watch:
                    body = await asyncio.to_thread(whole_answer, gateway.listener.address, path, request)
                assert body == expected or expected is None and body.splitlines()[-1][:8] in (b'{"error"', b'{"status')
                if watch.hold_s < HOLD_S / 2:
                    break
            assert watch.hold_s < HOLD_S / 2
            await until(lambda: health(gateway)["inflight"] == 0)
    run_real(main())


def test_connection_that_was_given_back_is_not_taken_again_by_what_was_still_to_be_decoded():
    async def main():
        loop = asyncio.get_running_loop()
        connection = sollol.NodeConnection(sollol.LoopTurns(loop))
        connection.transport = types.SimpleNamespace(pause_reading=lambda: None, resume_reading=lambda: None,
                                                     is_closing=lambda: False)
        answer = sollol.parse_response(crumbled(b"")[:-len(END)], "POST")
        for is_over in (False, True):
            connection.sink = collector = sollol.Collector(connection, answer)
            connection.data_received(b"1\r\nx\r\n" * 2**14)
            if is_over:
                collector.finish(sollol.Failure("lost", "silent"))
            connection.sink = None
            await asyncio.sleep(1)
            assert connection.sink is None and not collector.parts
    bench.run_virtual(main())


def test_long_answer_in_chunks_of_one_byte_to_a_client_that_does_not_read_is_held_within_bounds():
    async def main():
        body = b'{"response":"%b","done":false}\n' % (b"a" * 2**20) + FINISHED
        async with gateway_for(ScriptedNode(lambda request: [crumbled(body)])) as gateway:
            caller = await Caller.to(gateway)
            caller.writer.transport.pause_reading()
            caller.writer.write(posted(generate()))
            held = []
            for _ in range(50):
                await asyncio.sleep(0.02)
                held += [len(client.source.behind) for client in gateway.listener.clients if client.source]
            assert max(held) < 2 * sollol.READ_AHEAD_BYTES + 2**16
            caller.writer.transport.resume_reading()
            assert (await caller.answer()).body == body
            caller.close()
    run_real(main())


def test_many_that_ask_ahead_delay_nobody_else():
    async def main():
        async with gateway_for(PatientNode()) as gateway:
            async def honest_s():
                began_s = gateway.loop.time()
                assert (await call(gateway, "POST", "/api/chat", {"model": "llama3.2", "stream": False})).status == 200
                return gateway.loop.time() - began_s

            async def beside_greedy_s():
                greedy = [await Caller.to(gateway) for _ in range(20)]
                for caller in greedy:
                    caller.writer.write(b"HEAD /api/stats HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000)
                took_s = await honest_s()
                for caller in greedy:
                    caller.writer.transport.abort()
                await until(lambda: not gateway.listener.clients)
                return took_s

            quiet_s = await honest_s()
            assert min([await beside_greedy_s() for _ in range(3)]) < quiet_s + 0.2
    run_real(main())


@over_sockets
async def test_request_behind_another_one_may_be_large_and_costs_it_nothing():
    node = fixed(1, speed=20)
    async with gateway_for(node) as gateway:
        caller = await Caller.to(gateway)
        second = generate(padding="x" * 2**21)
        caller.writer.write(posted(generate(tokens=30)) + posted(second))
        assert [(await caller.answer()).status for _ in range(2)] == [200, 200]
        caller.close()


@over_sockets
async def test_client_that_leaves_is_noticed_although_it_is_not_read():
    node = fixed(1, speed=1)
    async with gateway_for(node) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.write(posted(generate(tokens=2000)) + posted(generate(padding="x" * 10**6)))
        await until(lambda: node.in_flight and any(client.read_paused for client in gateway.listener.clients))
        caller.writer.transport.abort()
        await until(lambda: node.aborted == 1 and health(gateway)["inflight"] == 0, 2.0)


@over_sockets
async def test_request_whose_client_leaves_while_its_body_is_decoded_reaches_no_node():
    node = fixed(1)
    async with recorded(node) as (gateway, finished):
        caller = await Caller.to(gateway)
        body = json.dumps(generate(padding="x" * 100_000)).encode()
        caller.writer.write(head(b"POST /api/generate HTTP/1.1", b"Host: localhost", b"Transfer-Encoding: chunked")
                            + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
        caller.close()
        await until(lambda: finished)
        assert (finished[0].outcome, finished[0].attempts, node.in_flight) == ("client_left", 0, 0)


def test_connection_that_sends_only_empty_lines_is_as_idle_as_one_that_sends_nothing():
    async def main():
        async with gateway_for(bench.SimNode(**FAST)) as gateway:
            caller, began_s = await Caller.to(gateway), gateway.loop.time()
            for _ in range(sollol.MAX_EMPTY_LINES):
                caller.writer.write(b"\r\n")
                await asyncio.sleep(sollol.KEEP_ALIVE_S / 5)
            assert await caller.reader.read() == b""
            assert gateway.loop.time() - began_s < sollol.KEEP_ALIVE_S + 1
            caller.close()
    bench.run_virtual(main())


async def begun_upload(gateway, size, sent):
    """Return a Caller that has sent the first bytes of a body."""
    caller = await Caller.to(gateway)
    body = json.dumps(generate(padding="x" * size)).encode()
    caller.rest = body[sent:]
    caller.writer.write(head(b"POST /api/generate HTTP/1.1", b"Host: localhost", b"Content-Length: %d" % len(body))
                        + body[:sent])
    return caller


def test_bodies_beyond_the_memory_for_them_wait_unread_and_short_ones_do_not():
    async def main():
        async with gateway_for(bench.SimNode(**FAST), flags=["--max-memory", "1MiB"]) as gateway:
            first = await begun_upload(gateway, 800_000, 1000)
            await until(lambda: gateway.memory.held_bytes)
            second = await begun_upload(gateway, 800_000, 700_000)
            await asyncio.sleep(1)
            assert gateway.memory.held_bytes < 2**20
            assert sum(len(client.buffer) for client in gateway.listener.clients) < 2 * sollol.READ_AHEAD_BYTES
            assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
            first.writer.write(first.rest)
            assert (await first.answer()).status == 200
            second.writer.write(second.rest)
            assert (await second.answer()).status == 200
            await until(lambda: not gateway.memory.held_bytes)
            held = [await begun_upload(gateway, size, 1000) for size in (1_000_000, 500_000)]
            await until(lambda: len(gateway.memory.waiting) == 1)
            held[1].writer.transport.abort()        # whoever leaves waits no longer
            await until(lambda: not gateway.memory.waiting or gateway.memory.waiting[0][1].done())
            late = await begun_upload(gateway, 500_000, 1000)
            drip = asyncio.create_task(feed(held[0]))
            answer = await late.answer()
            assert (answer.status, "retry-after" in answer.fields) == (503, True)
            drip.cancel()
            for caller in (first, second, held[0], late):
                caller.close()
            await until(lambda: not gateway.memory.held_bytes)
    bench.run_virtual(main())


@pytest.mark.parametrize("count", [1, 2, 8])
def test_chunked_bodies_that_together_fill_the_memory_are_all_read_and_take_little_more(count):
    """They ask for memory as they grow, so that each may hold a part of it and wait for the rest."""
    body, most = json.dumps(generate(padding="x" * 700_000)).encode(), []

    async def slowly(gateway):
        caller = await Caller.to(gateway)
        caller.writer.write(head(b"POST /api/generate HTTP/1.1", b"Host: localhost", b"Transfer-Encoding: chunked"))
        for at in range(0, len(body), 20_000):
            caller.writer.write(sollol.chunk(body[at:at + 20_000]))
            await asyncio.sleep(0.01)
            most.append(gateway.memory.held_bytes)
        caller.writer.write(b"0\r\n\r\n")
        status = (await caller.answer()).status
        caller.close()
        return status

    async def main():
        async with gateway_for(bench.SimNode(**FAST), flags=["--max-memory", "1MiB"]) as gateway:
            began_s = gateway.loop.time()
            assert await asyncio.gather(*(slowly(gateway) for _ in range(count))) == [200] * count
            assert gateway.loop.time() - began_s < 10.0 and max(most) <= 2**20 + 2 * len(body)
            await until(lambda: not (gateway.memory.held_bytes or gateway.memory.waiting))
    bench.run_virtual(main())


async def feed(caller):
    """Send the rest of a body steadily, and never to its end."""
    for at in range(0, len(caller.rest) - 10_000, 10_000):
        caller.writer.write(caller.rest[at:at + 10_000])
        await asyncio.sleep(1)


@over_sockets
async def test_rate_of_a_key_is_checked_before_its_body_is_read(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret name=alice rate=1/h\n")
    keys.chmod(0o600)
    async with gateway_for(bench.SimNode(**FAST), flags=["--keys", str(keys)]) as gateway:
        caller = await Caller.to(gateway)
        allowed = {"Authorization": "Bearer secret"}
        assert (await caller.ask("POST", "/api/generate", generate(), **allowed)).status == 200
        answer = await caller.ask("POST", "/api/generate", generate(), **allowed)       # short: it is read, and goes on
        assert (answer.status, answer.fields.get("connection")) == (429, None)
        caller.writer.write(head(b"POST /api/generate HTTP/1.1", b"Host: localhost", b"Authorization: Bearer secret",
                                 b"Content-Length: 60000000"))
        answer = await caller.answer()
        assert (answer.status, answer.fields["connection"]) == (429, "close")
        caller.close()


@over_sockets
async def test_idle_connections_to_a_node_are_bounded():
    async with gateway_for(bench.SimNode(**FAST)) as gateway:
        for number in range(sollol.MOST_IDLE_UPSTREAM + 20):
            await call(gateway, "DELETE", "/api/delete", {"model": f"none{number}"})
        pool, = gateway.node_io.pools.values()
        assert len(pool.idle) <= sollol.MOST_IDLE_UPSTREAM


@over_sockets
async def test_requests_without_a_slot_are_bounded_per_node_and_the_rest_waits():
    release = asyncio.Event()

    async def hold(reader, writer):
        await release.wait()

    node = ScriptedNode(lambda request: [hold, framed(b"{}"), KEEP])
    async with gateway_for(node) as gateway:
        asking = [asyncio.create_task(call(gateway, *request)) for _ in range(sollol.MOST_UNQUEUED)
                  for request in (("GET", "/unknown"), ("POST", "/unknown", b"{}"))]
        await until(lambda: len(node.requests) == sollol.MOST_UNQUEUED)
        await asyncio.sleep(0.05)
        assert len(node.requests) == sollol.MOST_UNQUEUED
        release.set()
        assert {(await task).status for task in asking} == {200}


@over_sockets
async def test_name_that_a_client_makes_up_is_cut_where_it_is_kept_and_passes_as_it_is(capsys):
    sollol.start_log("kv", "info")
    node, name = ScriptedNode(lambda request: [OK, KEEP]), "x" * 10**5
    async with gateway_for(node) as gateway:
        assert (await call(gateway, "POST", "/api/generate", generate(name))).status == 200
        assert (await call(gateway, "GET", "/" + "y" * 10_000)).status == 200
        assert json.loads(node.requests[0].partition(b"\r\n\r\n")[2])["model"] == name
        assert (await call(gateway, "GET", "/api/stats")).body.count(b"x" * (sollol.SHOWN_CHARS + 1)) == 0
    assert max(map(len, capsys.readouterr().err.splitlines())) < 1000
    assert len(sollol.canonical(name)) < sollol.MAX_NAME_CHARS + 10
    sollol.LOG.handlers.clear()


@over_sockets
async def test_idle_connection_gives_way_to_a_new_one():
    async with gateway_for(bench.SimNode(**FAST), flags=["--max-connections", "2"]) as gateway:
        idle = [await Caller.to(gateway) for _ in range(2)]
        for caller in idle:
            assert (await caller.ask("GET", "/")).status == 200
        await asyncio.sleep(1.2 * sollol.SPARED_S)
        assert (await idle[0].ask("GET", "/")).status == 200
        assert (await call(gateway, "GET", "/")).status == 200
        assert await idle[1].reader.read() == b""       # it had been idle for longer
        assert (await idle[0].ask("GET", "/")).status == 200
        for caller in idle:
            caller.close()


@over_sockets
async def test_one_address_without_a_key_cannot_take_all_connections(tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("secret name=alice\n")
    keys.chmod(0o600)
    monkeypatch.setattr(sollol, "is_loopback", lambda address: False)
    async with gateway_for(bench.SimNode(**FAST), flags=["--keys", str(keys)]) as gateway:
        gateway.listener.max_strangers = 3
        callers = [await Caller.to(gateway) for _ in range(3)]
        await until(lambda: len(gateway.listener.clients) == 3)
        assert b"too many connections from 127.0.0.1" in await raw_call(gateway, b"")
        answer = await callers[0].ask("GET", "/api/tags", Authorization="Bearer secret")
        assert answer.status == 200     # it is a stranger no longer
        callers.append(await Caller.to(gateway))
        await until(lambda: len(gateway.listener.clients) == 4)
        for caller in callers:
            caller.close()
        await until(lambda: not gateway.listener.strangers)


@over_sockets
async def test_answer_of_the_gateways_own_that_costs_much_is_made_once_for_all_who_ask(monkeypatch):
    monkeypatch.setattr(sollol, "COSTLY_S", -1.0)
    async with gateway_for(bench.SimNode(**FAST)) as gateway:
        first, second = [(await call(gateway, "GET", "/api/stats")).body for _ in range(2)]
        await asyncio.sleep(1.2 * sollol.FRESH_S)
        assert first == second != (await call(gateway, "GET", "/api/stats")).body
        node, = gateway.dispatcher.cluster.nodes
        assert (await call(gateway, "POST", f"/api/nodes/{node}/drain")).status == 200
        assert (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]["state"] == "draining"


def test_log_that_nobody_reads_holds_up_nobody_and_its_loss_is_told():
    reading, writing = os.pipe()
    writer = sollol.LogWriter(writing)
    writer.setFormatter(sollol.LogFormat("json"))
    record = sollol.LOG.makeRecord("sollol", 20, "", 0, {"event": "test", "pad": "x" * 1000}, (), None)
    began_s = time.monotonic()
    for _ in range(5000):
        writer.handle(record)
    assert time.monotonic() - began_s < 2 and writer.taken_bytes < 2 * sollol.MAX_LOG_BYTES
    closing = threading.Thread(target=writer.close)
    closing.start()
    closing.join(2 * sollol.LOG_FLUSH_S)
    assert not closing.is_alive()           # at the end of the process nobody waits for it for ever either
    lines = []
    with open(reading, encoding="utf-8") as log:
        while not lines or lines[-1]["event"] != "log":
            lines.append(json.loads(log.readline()))
    assert len(lines) - 1 + lines[-1]["lost"] == 5000 and lines[-1]["level"] == "warning"
    os.close(writing)


@over_sockets
async def test_hosts_file_that_is_being_written_or_is_no_file_is_not_taken_over(tmp_path, caplog):
    sollol.LOG.propagate = True
    one, two, hosts = await one_of_two(tmp_path)
    async with gateway_for(one, two, hosts=hosts) as gateway:
        text = f"{one.url} name=one\n{two.url} name=two slots=4 # the second\n"
        for size in (4, 9, 40, 61, 70, len(text)):
            hosts.write_text(text[:size])
            await asyncio.sleep(0.8 * sollol.SWEEP_S)
        await until(lambda: list(gateway.dispatcher.cluster.nodes) == ["one", "two"])
        assert "refused" not in caplog.text
        hosts.unlink()
        os.mkfifo(hosts)
        await until(lambda: f"{hosts}: this is not a regular file" in caplog.text)
        assert list(gateway.dispatcher.cluster.nodes) == ["one", "two"]


@table("content, message", [
    ("a long line", "http://" + "a" * 10**6, "FILE:1: a line of 1000007 characters"),
    ("a long comment", "#" + "a" * 10_000, "FILE:1: a line of 10001 characters"),
    ("many lines", "\n" * 5000, "FILE: longer than 1 MiB or 4096 lines"),
    ("large", "#\n" * 4000 + "#" * 2**20, "FILE: longer than 1 MiB or 4096 lines"),
    ("many nodes", "".join(f"http://node{number}\n" for number in range(1025)), "FILE:1025: more than 1024 nodes"),
    ("at signs", "http://" + "@" * 4000, "FILE:1: 'http://...@' is not the URL of a node"),
])
def test_hosts_file_out_of_all_proportion_is_refused_in_no_time(tmp_path, content, message):
    path = tmp_path / "hosts.txt"
    path.write_text(content)
    for _ in range(3):
        began_s = time.thread_time()
        with pytest.raises(sollol.ConfigError) as caught:
            sollol.read_nodes(sollol.parse_options(["--hosts", str(path)], {}))
        if time.thread_time() - began_s < HOLD_S:
            break
    assert time.thread_time() - began_s < HOLD_S
    assert str(caught.value).replace(str(path), "FILE").startswith(message)


# -----------------------------------------------------------------------------
# The whole surface, over three nodes with different models
# -----------------------------------------------------------------------------

def three(**more):
    """Return unequal nodes: a, the primary, b and c. All have llama3.2, two mistral, only c embeds."""
    nodes = [bench.SimNode("rtx4090", ("llama3.2", "qwen3:14b"), name="a", **FAST | more),
             bench.SimNode("rtx3060", ("llama3.2", "mistral"), name="b", **FAST | more),
             bench.SimNode("m2", ("llama3.2", "mistral", "nomic-embed-text"), name="c", **FAST | more)]
    for node in nodes:
        node.line = f"name={node.name}"
    return nodes


@contextlib.asynccontextmanager
async def surface(nodes=None, flags=()):
    """Run a gateway in front of nodes; yield it."""
    nodes = nodes or three()
    async with gateway_for(*nodes, flags=flags) as gateway:
        gateway.nodes = nodes
        yield gateway


def asked_of(gateway, path, method=None):
    """Return the names of the nodes that were asked for a path."""
    return [node.name for node in gateway.nodes if any(it.path == path and method in (None, it.method)
                                                       for it in node.requests)]


def lines_of(answer):
    """Return the objects of an NDJSON answer."""
    return [json.loads(line) for line in answer.body.splitlines()]


DIGEST = hashlib.sha256(b"weights").hexdigest()
MESSAGES = [{"role": "user", "content": "hi <out=3>"}]


def form(**fields):
    """Return (body, content type) of a multipart form."""
    parts = "".join(f'--cut\r\nContent-Disposition: form-data; name="{name}"{"; filename=f" * (name == "file")}\r\n\r\n'
                    f'{value}\r\n' for name, value in fields.items())
    return (parts + "--cut--\r\n").encode(), "multipart/form-data; boundary=cut"


def packed(value):
    """Return JSON in a zstd frame of one segment and one raw block."""
    body = json.dumps(value).encode()
    return b"\x28\xb5\x2f\xfd\xa0" + len(body).to_bytes(4, "little") + (len(body) << 3 | 1).to_bytes(3, "little") + body


# -----------------------------------------------------------------------------
# Merged and pinned answers
# -----------------------------------------------------------------------------

def newer(node, name, weights, modified_s):
    """Give a node another version of a model."""
    node.models[bench.canonical(name)] = bench.model_named(name)._replace(weights=weights)
    node.modified_s[bench.canonical(name)] = modified_s


@over_sockets
async def test_of_two_versions_of_a_model_the_newest_is_listed_and_shown():
    nodes = three()
    newer(nodes[2], "llama3.2", "v2", 3600.0)
    async with surface(nodes) as gateway:
        rows = (await call(gateway, "GET", "/api/tags")).json()["models"]
        assert rows[0]["name"] == "llama3.2:latest" and rows[0]["digest"] == nodes[2].models["llama3.2:latest"].digest
        assert len(rows) == 4
        for _ in range(3):
            assert (await call(gateway, "POST", "/api/show", {"model": "llama3.2"})).fields["x-sollol-node"] == "c"
            assert (await call(gateway, "GET", "/v1/models/llama3.2")).fields["x-sollol-node"] == "c"


@listed("text", ["2026-01-01T00:00:00Z", "2025-12-31T16:00:00-08:00", "2026-01-01T01:00:00.123456789+01:00"])
def test_instants_are_compared_over_time_zones(text):
    assert int(sollol.instant_s(text)) == 1767225600


@listed("value", ["", "yesterday", None, 5, {"a": 1}, [], "9" * 5000])
def test_what_is_no_instant_is_the_oldest(value):
    assert sollol.instant_s(value) == 0.0


@over_sockets
async def test_merged_answers_wait_for_no_hung_node():
    async with surface() as gateway:
        await call(gateway, "GET", "/api/status")
        gateway.nodes[1].freeze()
        started_s = gateway.loop.time()
        for path in ("/api/tags", "/api/ps", "/v1/models", "/api/version", "/api/status"):
            assert (await call(gateway, "GET", path)).status == 200
        assert gateway.loop.time() - started_s < 1.0


@over_sockets
async def test_status_says_disabled_only_if_every_node_does():
    def node(disabled):
        status = {"cloud": {"disabled": disabled, "source": "env"}, "more": 1}
        return ScriptedNode(lambda request: [framed(json.dumps(status).encode()), KEEP])

    for disabled, expected in (([True, True], True), ([True, False], False)):
        async with gateway_for(*map(node, disabled)) as gateway:
            answer = (await call(gateway, "GET", "/api/status")).json()
            assert answer == {"cloud": {"disabled": expected, "source": "env"}, "more": 1}


@over_sockets
async def test_what_is_pinned_waits_for_its_node_and_never_strays():
    nodes = three()
    nodes[1].line = "name=b primary=yes"
    for node in nodes:
        node.account = node.name
    async with surface(nodes, ("--probe-interval", "0.1")) as gateway:
        for method, path in (("POST", "/api/me"), ("POST", "/api/experimental/web_search"),
                             ("GET", "/api/experimental/model-recommendations"), ("POST", "/api/signout")):
            answer = await call(gateway, method, path, {"query": "x"} if method == "POST" else None)
            assert (answer.status, answer.fields["x-sollol-node"]) == (200, "b")
        assert [node.account for node in nodes] == ["a", "", "c"]
        nodes[1].kill()
        await until(lambda: health(gateway)["nodes"]["up"] == 2)
        answer = await call(gateway, "POST", "/api/me", {})
        assert answer.status == 503 and "primary" in answer.json()["error"]
        answer = await call(gateway, "POST", f"/api/blobs/sha256:{DIGEST}", b"weights")
        assert answer.status == 503 and not nodes[0].blobs and not nodes[2].blobs


@over_sockets
async def test_push_goes_to_a_node_that_has_the_model_the_primary_first():
    nodes = three()
    for node in nodes:
        node.account = node.name
    async with surface(nodes) as gateway:
        for model, name in (("llama3.2", "a"), ("mistral", "b"), ("nobodys", "a")):
            answer = await call(gateway, "POST", "/api/push", {"model": model, "stream": False})
            assert answer.fields["x-sollol-node"] == name and answer.status == (404 if model == "nobodys" else 200)


@pytest.mark.parametrize("path, type, is_pinned", [
    ("/v1/messages", "web_search_20250305", True), ("/v1/messages", "custom", False),
    ("/v1/responses", "web_search", False)])
@over_sockets
async def test_request_for_which_a_node_searches_the_web_goes_to_the_primary(path, type, is_pinned):
    nodes = three()
    nodes[2].line += " primary=yes"
    async with surface(nodes) as gateway:
        tools = [{"type": type, "name": "web_search"}]
        value = {"model": "llama3.2", "max_tokens": 9, "messages": MESSAGES, "input": MESSAGES, "tools": tools}
        answers = await asyncio.gather(*[call(gateway, "POST", path, value) for _ in range(6)])
        assert {answer.status for answer in answers} == {200}
        assert ({answer.fields["x-sollol-node"] for answer in answers} == {"c"}) == is_pinned
        nodes[2].kill()
        answer = await call(gateway, "POST", path, value)
        assert (answer.status, answer.fields["x-sollol-node"] in "ab") == (200, True)
        value["model"] = "qwen3:14b"
        assert (await call(gateway, "POST", path, value)).fields["x-sollol-node"] == "a"


@over_sockets
async def test_cloud_model_goes_to_the_primary_even_if_others_list_it():
    nodes = three()
    for node in nodes:
        node.account = node.name
    for node in nodes[1:]:
        node.models["gpt-oss:120b-cloud"] = bench.model_named("gpt-oss:120b-cloud")
    async with surface(nodes) as gateway:
        answer = await call(gateway, "POST", "/api/generate", generate("gpt-oss:120b-cloud"))
        assert (answer.status, answer.fields["x-sollol-node"]) == (200, "a")
        assert len((await call(gateway, "GET", "/api/tags")).json()["models"]) == 5


# -----------------------------------------------------------------------------
# One node: forms and compressed bodies
# -----------------------------------------------------------------------------

@table("content_type, body, model", [
    ("plain", b"multipart/form-data; boundary=cut", form(file="RIFF", model="Mistral")[0], "Mistral"),
    ("quoted", b'multipart/form-data; charset=x; BOUNDARY="cut"', form(model="m", file="x")[0], "m"),
    ("no boundary", b"multipart/form-data", form(model="m")[0], None),
    ("other boundary", b"multipart/form-data; boundary=x", form(model="m")[0], None),
    ("no such field", b"multipart/form-data; boundary=cut", form(file="x")[0], None),
    ("cut short", b"multipart/form-data; boundary=cut", form(model="m")[0][:60], None),
    ("a file that looks like it", b"multipart/form-data; boundary=cut",
     form(file='name="model"\r\n\r\nx', model="m")[0], "m"),
    ("no form", b"application/json", b'{"model":"m"}', None),
    ("empty", b"multipart/form-data; boundary=cut", b"", None),
])
def test_field_of_a_form(content_type, body, model):
    assert sollol.at_once(sollol.form_field(content_type, body, b"model")) == model


@over_sockets
async def test_transcription_goes_to_a_holder_byte_for_byte():
    async with surface() as gateway:
        body, kind = form(language="en", file="RIFF" * 1000, model="mistral")
        answer = await call(gateway, "POST", "/v1/audio/transcriptions", body, Content_Type=kind)
        assert answer.json() == {"text": "4000 bytes of speech"} and answer.fields["x-sollol-node"] in "bc"
        node = next(node for node in gateway.nodes if node.name == answer.fields["x-sollol-node"])
        assert node.requests[-1].body == body


@over_sockets
async def test_compressed_body_that_cannot_be_read_goes_unchanged_to_a_node():
    async with surface() as gateway:
        for model, status in (("llama3.2", 200), ("nobodys", 404)):
            body = packed({"model": model, "messages": MESSAGES})
            answer = await call(gateway, "POST", "/v1/chat/completions", body, Content_Encoding="zstd")
            assert answer.status == status
            sent = [record for node in gateway.nodes for record in node.requests if record.body == body]
            assert len(sent) == 1 and b"Content-Encoding: zstd" in sent[0].head
        assert health(gateway)["nodes"]["up"] == 3


# -----------------------------------------------------------------------------
# Changes on many nodes
# -----------------------------------------------------------------------------

def merged(names, *lines):
    """Return what Progress tells of lines "name status" or "name digest completed"; "name -" drops one."""
    progress, told = sollol.Progress(names), []
    for line in lines:
        name, what, *count = line.split()
        if what == "-":
            progress.names.discard(name)
            continue
        value = {"status": f"pulling {what}", "digest": what, "total": 9, "completed": int(count[0])} if count else {
            "status": what}
        told.append(progress.take(name, value))
    return [f"{line['digest']} {line['completed']}" if "digest" in line else line["status"] for line in told if line]


@table("names, lines, told", [
    ("one node", "a", ["a manifest", "a x 1", "a x 9", "a verify"], ["manifest", "x 1", "x 9", "verify"]),
    ("the first line at once, later ones when all have said them", "ab",
     ["a manifest", "a verify", "b manifest", "b verify", "b verify"], ["manifest", "verify"]),
    ("a layer is as far as on the slowest", "ab", ["a m", "a x 5", "b x 2", "b x 6", "a x 9", "b x 9"],
     ["m", "x 0", "x 2", "x 5", "x 6", "x 9"]),
    ("never backwards", "ab", ["a m", "a x 5", "b x 5", "b x 3", "a x 6"], ["m", "x 0", "x 5"]),
    ("who has failed is waited for no longer", "ab", ["a m", "a x 5", "b x 1", "b -", "a x 6", "a verify"],
     ["m", "x 0", "x 1", "x 6", "verify"]),
    ("who is ready waits for the others", "ab", ["a m", "a x 9", "a verify", "a -", "b m", "b x 4", "b verify"],
     ["m", "x 0", "x 4", "verify"]),
])
def test_progress_of_several_nodes_is_that_of_the_slowest(names, lines, told):
    assert merged(names, *lines) == told


def test_new_model_goes_to_the_emptiest_of_equals_the_fastest():
    dispatcher = cluster(n1=["x", "y"], n2=["x"], n3=["x"])
    dispatcher.cluster.nodes["n2"].size_factor = 2.0
    spec = RequestSpec(Family.OLLAMA, "new:latest", change="pull", inference=False)

    def names(replicas, model="new:latest"):
        spec.model = model
        return [node.name for node in dispatcher.cluster.nodes_to_change(spec, replicas, 0.0)[0]]

    assert [names(count) for count in (1, 2, 9)] == [["n3"], ["n2", "n3"], ["n1", "n2", "n3"]]
    assert names(1, "y:latest") == ["n1"] and names(1, "x:latest") == ["n1", "n2", "n3"]
    assert names(9, "x:120b-cloud") == ["n1"]
    dispatcher.cluster.nodes["n2"].draining = True
    assert names(2) == ["n1", "n3"] and names(1, "x:latest") == ["n1", "n2", "n3"]
    dispatcher.cluster.nodes["n3"].lost(0.0)
    assert names(1) == ["n1"] and names(1, "x:latest") == ["n1", "n2"]


def test_older_answer_never_overwrites_a_newer_index():
    dispatcher = cluster(n1=["x"])
    node = dispatcher.cluster.nodes["n1"]
    dispatcher.cluster.take_tags(node, rows("y"), 10.0)
    dispatcher.cluster.take_tags(node, rows("x"), 9.0)
    assert list(dispatcher.cluster.holders) == ["y:latest"]
    dispatcher.cluster.take_tags(node, rows("x"), 11.0)
    assert list(dispatcher.cluster.holders) == ["x:latest"]


@pytest.mark.parametrize("value, seconds", [
    (0, 0), (300, 300), (2.5, 2.5), (-1, math.inf), (10**400, 1e9), (float("nan"), None), ("5m", 300), ("0", 0),
    ("1h30m", 5400), ("1.5h", 5400), ("-1m", math.inf), ("-0s", 0), ("250ms", 0.25), ("300", None), ("-1", None),
    ("", None), ("m", None), (True, None), (None, None), ([], None), ({}, None), ("9" * 10_000 + "s", None)])
def test_keep_alive_is_read_as_ollama_reads_it(value, seconds):
    spec = asked("/api/generate", json.dumps({"model": "m", "prompt": "hi", "keep_alive": value}).encode())
    assert spec.keep_alive_s == pytest.approx(seconds) if seconds is not None else spec.keep_alive_s is None
    assert asked("/v1/completions", {"model": "m", "prompt": "hi", "keep_alive": 5}).keep_alive_s is None


@pytest.mark.parametrize("keep_alive, prompt, expected", [
    (0, "", True), (0.0, None, True), ("0", "", True), ("0s", "", True), ("0m", "", True), (-1, "", False),
    ("5m", "", False), (None, "", False), ("0s", "hi", False), (0, "hi", False), ("zero", "", False),
    (False, "", False), ("-0s", "", True)])
def test_unload_is_an_empty_prompt_kept_alive_for_no_time(keep_alive, prompt, expected):
    for path, fields in (("/api/generate", {"prompt": prompt}),
                         ("/api/chat", {"messages": [{"role": "user", "content": prompt}] if prompt else []})):
        spec = asked(path, {"model": "m", "keep_alive": keep_alive, **fields})
        assert (spec.change == "unload", spec.inference) == (expected, not expected)
    assert not asked("/v1/chat/completions", {"model": "m", "keep_alive": 0}).change


@over_sockets
async def test_unload_reaches_every_node_where_the_model_is():
    nodes = [bench.SimNode(name=name, loaded=("llama3.2",), **FAST) for name in "abc"]
    async with surface(nodes) as gateway:
        assert len((await call(gateway, "GET", "/api/ps")).json()["models"]) == 1
        body = {"model": "llama3.2", "keep_alive": 0}
        answer = await call(gateway, "POST", "/api/generate", body)
        assert answer.status == 200 and answer.json()["done_reason"] == "unload"
        assert not any(node.engine.resident for node in nodes)
        assert not any(sollol.loaded_runners(node) for node in gateway.dispatcher.cluster.nodes.values())
        assert all(node.requests[-1].body == json.dumps(body).encode() for node in nodes)
        assert (await call(gateway, "GET", "/api/ps")).json() == {"models": []}
        answer = await call(gateway, "POST", "/api/chat", {"model": "nobodys", "messages": [], "keep_alive": "0s"})
        assert answer.status == 404 and answer.json() == {"error": "model 'nobodys' not found"}


@over_sockets
async def test_delete_and_copy_reach_every_holder_and_are_seen_at_once():
    async with surface() as gateway:
        answer = await call(gateway, "POST", "/api/copy", {"source": "mistral", "destination": "mine"})
        assert (answer.status, answer.body, answer.fields["x-sollol-node"]) == (200, b"", "b,c")
        assert asked_of(gateway, "/api/copy") == ["b", "c"]
        assert "mine:latest" in [row["name"] for row in (await call(gateway, "GET", "/api/tags")).json()["models"]]
        assert (await call(gateway, "POST", "/api/show", {"model": "mine"})).status == 200
        assert (await call(gateway, "DELETE", "/api/delete", {"model": "mine"})).status == 200
        assert asked_of(gateway, "/api/delete") == ["b", "c"]
        assert (await call(gateway, "POST", "/api/show", {"model": "mine"})).status == 404
        for method, path, body in (("DELETE", "/api/delete", {"name": "mine"}),
                                   ("POST", "/api/copy", {"source": "mine", "destination": "x"})):
            answer = await call(gateway, method, path, body)
            assert answer.status == 404 and "not found" in answer.json()["error"]


@table("statuses, expected", [
    ("all alike", [b"400 Bad Request", b"400 Bad Request"], 400),
    ("in two ways", [b"400 Bad Request", b"500 Internal Server Error"], 500),
    ("by one of them", [b"200 OK", b"400 Bad Request"], 502)])
@over_sockets
async def test_change_that_all_nodes_refuse_alike_gets_the_answer_of_one(statuses, expected):
    body, kind = b'{"error" : "destination is odd"}', b"application/json; charset=utf-8"
    nodes = [ScriptedNode(lambda request, status=status: [framed(body, status, kind), KEEP]) for status in statuses]
    async with gateway_for(*nodes) as gateway:
        answer = await call(gateway, "POST", "/api/copy", {"source": "llama3.2", "destination": "?"})
        assert answer.status == expected
        assert (answer.body == body and answer.fields["content-type"] == kind.decode()) == (expected == 400)


@over_sockets
async def test_node_that_had_lost_a_model_is_no_failure_of_its_delete():
    async with surface() as gateway:
        del gateway.nodes[1].models["mistral:latest"]
        assert (await call(gateway, "DELETE", "/api/delete", {"model": "mistral"})).status == 200
        assert not any("mistral:latest" in node.models for node in gateway.nodes)


@pytest.mark.parametrize("method, path, body", [
    ("DELETE", "/api/delete", {"model": "mistral"}), ("POST", "/api/pull", {"model": "mistral"})])
def test_node_that_freezes_in_a_change_is_named(method, path, body):
    async def run():
        async with surface() as gateway:
            gateway.nodes[2].freeze()
            answer = await asyncio.wait_for(call(gateway, method, path, body), 4 * sollol.DEAD_S)
            told = lines_of(answer)[-1]["error"]
            assert "c: " in told and "done on b" in told
            assert (await call(gateway, "GET", "/api/tags")).status == 200

    bench.run_virtual(run())


@over_sockets
async def test_copy_is_made_where_the_newest_version_is():
    nodes = three()
    newer(nodes[2], "llama3.2", "v2", 3600.0)
    async with surface(nodes) as gateway:
        assert (await call(gateway, "POST", "/api/copy", {"source": "llama3.2", "destination": "x"})).status == 200
        assert asked_of(gateway, "/api/copy") == ["c"]


@over_sockets
async def test_held_model_is_pulled_by_all_holders_as_one_stream():
    async with surface() as gateway:
        answer = await call(gateway, "POST", "/api/pull", {"model": "mistral"})
        assert asked_of(gateway, "/api/pull") == ["b", "c"]
        assert answer.fields["content-type"] == "application/x-ndjson"
        found = [line["status"] for line in lines_of(answer)]
        assert found[0] == "pulling manifest" and found.count("success") == 1 and found[-1] == "success"
        newest = {**bench.MODELS, "mistral:latest": bench.MODELS["mistral:latest"]._replace(weights="v2")}
        for node in gateway.nodes:
            node.registry = newest
        lines = lines_of(await call(gateway, "POST", "/api/pull", {"model": "mistral"}))
        counts = [line["completed"] for line in lines if "digest" in line]
        assert counts == sorted(set(counts)) and counts[-1] == lines[-4]["total"]
        digest = newest["mistral:latest"].digest
        assert {node.models["mistral:latest"].digest for node in gateway.nodes[1:]} == {digest}
        assert [row["digest"] for row in (await call(gateway, "GET", "/api/tags")).json()["models"]
                if row["name"] == "mistral:latest"] == [digest]


@pytest.mark.parametrize("replicas, names", [(1, ["b"]), (2, ["b", "c"])])
@over_sockets
async def test_new_model_is_pulled_by_as_many_nodes_as_asked_and_usable_at_once(replicas, names):
    async with surface(flags=("--replicas", str(replicas))) as gateway:
        answer = await call(gateway, "POST", "/api/pull", {"model": "gemma3:4b"})
        assert lines_of(answer)[-1] == {"status": "success"} and asked_of(gateway, "/api/pull") == names
        answer = await call(gateway, "POST", "/api/generate", generate("gemma3:4b"))
        assert answer.status == 200 and answer.fields["x-sollol-node"] in names
        answer = await call(gateway, "POST", "/api/pull", {"model": "gemma3:4b", "stream": False})
        assert answer.json() == {"status": "success"}


@over_sockets
async def test_pull_of_one_node_arrives_byte_for_byte_errors_too():
    lines = [b'{"status":"pulling manifest"}\n', b'{"status": "x",  "odd":1}\n', b'{"status":"success"}\n']
    for end in (lines[2], b'{"error":"pull model manifest: file does not exist"}\n'):
        node = ScriptedNode(lambda request, end=end: [chunked(*lines[:2], end), KEEP])
        async with gateway_for(node) as gateway:
            answer = await call(gateway, "POST", "/api/pull", {"model": "x"})
            assert (answer.status, answer.body) == (200, b"".join(lines[:2]) + end)


NO_MLX = "this model requires MLX support, but the MLX runtime is not available"


@pytest.mark.parametrize("stream", [True, False])
@over_sockets
async def test_new_model_that_a_node_cannot_pull_is_pulled_by_the_next(stream):
    def refuse(request):
        error = json.dumps({"error": NO_MLX}).encode()
        return [chunked(b'{"status":"pulling manifest"}\n', error + b"\n") if stream
                else framed(error, b"500 Internal Server Error"), KEEP]

    linux = [ScriptedNode(refuse, ()), ScriptedNode(refuse, ())]
    mac = bench.SimNode("m2", ("llama3.2", "mistral"), name="c", **FAST)
    async with gateway_for(*linux, mac) as gateway:
        answer = await call(gateway, "POST", "/api/pull", {"model": "gemma3:4b", "stream": stream})
        lines = lines_of(answer)
        assert answer.status == 200 and lines[-1] == {"status": "success"} and "error" not in str(lines)
        assert [line["status"] for line in lines].count("pulling manifest") == stream
        assert [len(node.requests) for node in linux] == [1, 1] and "gemma3:4b" in mac.models
    async with gateway_for(*[ScriptedNode(refuse, ()) for _ in range(3)]) as gateway:
        answer = await call(gateway, "POST", "/api/pull", {"model": "gemma3:4b", "stream": stream})
        assert (answer.status == 200) == stream and lines_of(answer)[-1]["error"].count(NO_MLX) in (1, 3)


@over_sockets
async def test_missing_model_is_told_in_band_or_with_its_status():
    async with surface(flags=("--replicas", "2")) as gateway:
        lines = lines_of(await call(gateway, "POST", "/api/pull", {"model": "no-such"}))
        assert lines[0] == {"status": "pulling manifest"} and "success" not in str(lines)
        assert lines[-1]["error"].count("file does not exist") == 2 and "b: " in lines[-1]["error"]
        answer = await call(gateway, "POST", "/api/pull", {"model": "no-such", "stream": False})
        assert answer.status == 500 and "file does not exist" in answer.json()["error"]
        answer = await call(gateway, "POST", "/api/pull", {"model": " "})
        assert answer.status == 400


@over_sockets
async def test_http_1_0_client_gets_the_progress_without_chunks():
    async with surface() as gateway:
        raw = await raw_call(gateway, b'POST /api/pull HTTP/1.0\r\nContent-Length: 19\r\n\r\n{"model":"mistral"}')
        head, _, body = raw.partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower() and b"Connection: close" in head
        assert json.loads(body.splitlines()[-1]) == {"status": "success"}


@over_sockets
async def test_blobs_and_create_are_on_one_home_and_the_new_model_is_seen_at_once():
    async with surface() as gateway:
        path = f"/api/blobs/sha256:{DIGEST}"
        assert (await call(gateway, "HEAD", path)).status == 404
        assert (await call(gateway, "POST", path, b"weights")).status == 201
        assert (await call(gateway, "HEAD", path)).status == 200
        body = {"model": "mine", "files": {"x": f"sha256:{DIGEST}"}}
        lines = lines_of(await call(gateway, "POST", "/api/create", body))
        assert lines[-1] == {"status": "success"}
        assert (await call(gateway, "POST", "/api/show", {"model": "mine"})).fields["x-sollol-node"] == "a"
        lines = lines_of(await call(gateway, "POST", "/api/create", {"model": "his", "from": "mistral"}))
        assert lines[-1] == {"status": "success"} and [line["status"] for line in lines].count("success") == 1
        assert ["his:latest" in node.models for node in gateway.nodes] == [False, True, True]   # where mistral is
        body = {"model": "mistral", "from": "llama3.2", "files": {"x": f"sha256:{DIGEST}"}}
        assert lines_of(await call(gateway, "POST", "/api/create", body))[-1] == {"status": "success"}
        paths = [request.path for request in gateway.nodes[0].requests]
        assert paths.count("/api/create") == 2      # where the blob is, though b has a mistral
        body = {"model": "drafts", "from": "mistral", "draft_files": {"x": f"sha256:{DIGEST}"}, "stream": False}
        assert (await call(gateway, "POST", "/api/create", body)).fields["x-sollol-node"] == "a"
        answer = await call(gateway, "POST", "/api/create", {"model": "none", "stream": False})
        assert answer.status == 400 and answer.fields["x-sollol-node"] == "a"


def failing(script, models=("llama3.2:latest", "mistral:latest")):
    """Return a scripted node, named bad, that says it has the same models as the others."""
    node = ScriptedNode(script, models)
    node.name, node.line = "bad", "name=bad"
    node.digests = {name: bench.model_named(name).digest for name in models}
    return node


CHANGED = [("DELETE", "/api/delete", {"model": "mistral"}),
           ("POST", "/api/copy", {"source": "mistral", "destination": "x"}),
           ("POST", "/api/pull", {"model": "mistral"}), ("POST", "/api/pull", {"model": "mistral", "stream": False}),
           ("POST", "/api/generate", {"model": "mistral", "keep_alive": 0})]


@pytest.mark.parametrize("method, path, body", CHANGED, ids=lambda value: str(value)[-12:])
@pytest.mark.parametrize("script", [
    [], [b"HTTP/1.1 500"], [b"\x00 garbage\r\n\r\n"],
    [framed(b'{"error":"disk full"}', b"500 Internal Server Error"), KEEP],
    [chunked(b'{"status":"pulling manifest"}\n', end=b"")],
    [chunked(b'{"status":"pulling manifest"}\n', b"no json\n"), KEEP],
    ], ids=["dies", "dies in the head", "garbage", "error", "dies in the stream", "garbage lines"])
def test_node_that_fails_a_change_is_named_and_nothing_half_done_is_a_success(method, path, body, script):
    async def run():
        flags = ("--probe-interval", "600")     # fewer turns of the virtual clock
        async with surface([*three(), failing(lambda request: script)], flags) as gateway:
            answer = await asyncio.wait_for(call(gateway, method, path, body), 5.0)
            told = lines_of(answer)[-1] if answer.status == 200 else answer.json()
            assert told.keys() == {"error"} and "bad: " in told["error"] and "done on b, c" in told["error"]
            assert b"success" not in answer.body
            assert answer.status == 502 or answer.status == 200 and answer.fields["content-type"].endswith("ndjson")
            assert health(gateway)["inflight"] == 0

    bench.run_virtual(run())


@over_sockets
async def test_client_that_leaves_stops_the_pulls():
    async with surface(three(speed=1.0)) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.write(b"POST /api/pull HTTP/1.1\r\nHost: x\r\nContent-Length: 21\r\n\r\n"
                            b'{"model":"gemma3:4b"}')
        await caller.head()
        assert health(gateway)["inflight"] == 1
        caller.close()
        await until(lambda: health(gateway)["inflight"] == 0)
        await until(lambda: sum(node.aborted for node in gateway.nodes) == 1)
        assert not any("gemma3:4b" in node.models for node in gateway.nodes)


# -----------------------------------------------------------------------------
# Batches of texts to embed
# -----------------------------------------------------------------------------

@table("count, rates, sizes", [
    ("one node, short", 100, [1000], [100]), ("one node, long", 3000, [1000], [1000] * 3),
    ("equal nodes", 1000, [500, 500], [500, 500]), ("in proportion", 1000, [750, 250], [750, 250]),
    ("in shares of a second", 1000, [300, 100], [375, 125, 375, 125]), ("uneven", 10, [8, 8, 8], [10]),
    ("few texts", 20, [10, 10, 10], [10, 10]), ("too slow for a share", 1000, [1000, 1], [1000]),
    ("short work is not cut", 50, [1000, 1000], [50]), ("rounding loses none", 1000, [333, 333, 333], [333, 334, 333]),
])
def test_batch_is_cut_in_proportion_to_speed(count, rates, sizes):
    assert sollol.share_sizes(count, rates) == sizes and sum(sizes) == count


def test_answers_of_shares_become_one():
    one = sollol.cut_answer(b'{"model":"m","embeddings":[[1,2.50],[3]],"total_duration":9,"prompt_eval_count":5}', 2)
    two = sollol.cut_answer(b'{"model":"m","embeddings":[[4]],"total_duration":7,"prompt_eval_count":6}', 1)
    assert b"".join(sollol.at_once(sollol.joined([one, two], [2, 1], 1.5))) == (
        b'{"model":"m","embeddings":[[1,2.50],[3],[4]],"total_duration":1500000000,"prompt_eval_count":11}')
    one = sollol.cut_answer(b'{"data":[{"embedding":"AA=","index":0},{"embedding":[1],"index": 1}],'
                            b'"usage":{"prompt_tokens":2,"total_tokens":3}}', 2)
    two = sollol.cut_answer(b'{"data":[{"embedding":"BB=","index":0}],"usage":{"prompt_tokens":4,"total_tokens":4}}', 1)
    assert b"".join(sollol.at_once(sollol.joined([one, two], [2, 1], 1.0))) == (
        b'{"data":[{"embedding":"AA=","index":0},{"embedding":[1],"index": 1},{"embedding":"BB=","index":2}],'
        b'"usage":{"prompt_tokens":6,"total_tokens":7}}')


@listed("body", [b"", b"{}", b'{"error":"x"}', b'{"embeddings":[]}', b'{"embeddings":[[1]]}', b'{"embeddings":null}',
                 b'{"embeddings":[[1],[2]', b'{"data":[{"embedding":[1]},{"embedding":[2]}]}', b"\x00[[1],[2]]"])
def test_what_is_no_answer_to_a_share_is_garbage(body):
    with pytest.raises(sollol.NodeFailure):
        sollol.cut_answer(body, 2)


TEXTS = [f"text {number} " + "x" * 1500 for number in range(1000)]


def embedders(count=3, hardware="m2", slow=(), **more):
    """Return nodes with an embedding model in memory."""
    nodes = [bench.SimNode("cpu" if name in slow else hardware, ("nomic-embed-text",), name=name, **{
        "loaded": ("nomic-embed-text",), **more}) for name in "abcde"[:count]]
    for node in nodes:
        node.line = f"name={node.name}"
    return nodes


async def embed_timed(gateway, texts=TEXTS, path="/api/embed", **more):
    """Return (answer, seconds) of a batch."""
    started_s = gateway.loop.time()
    answer = await call(gateway, "POST", path, {"model": "nomic-embed-text", "input": texts, **more})
    return answer, gateway.loop.time() - started_s


def expected_vectors(texts):
    return [bench.embedded(bench.model_named("nomic-embed-text"), text) for text in texts]


@pytest.mark.parametrize("count, least", [(2, 1.7), (3, 2.5), (5, 3.8)])
def test_n_nodes_embed_a_long_list_about_n_times_as_fast(count, least):
    async def run():
        async with surface(embedders(1)) as gateway:
            one, one_s = await embed_timed(gateway)
        async with surface(embedders(count)) as gateway:
            await embed_timed(gateway, TEXTS[:200])
            many, many_s = await embed_timed(gateway)
            assert one_s / many_s > least
            assert many.json()["embeddings"] == one.json()["embeddings"] == expected_vectors(TEXTS)
            assert many.json()["prompt_eval_count"] == one.json()["prompt_eval_count"]
            assert many.fields["x-sollol-node"] == ",".join("abcde"[:count])

    bench.run_virtual(run())


def test_unequal_nodes_take_shares_in_proportion_to_what_was_learned():
    async def run():
        nodes = [*embedders(2, "rtx4090"), *embedders(3, "m2")[2:]]
        async with surface(nodes) as gateway:
            for _ in range(3):
                await embed_timed(gateway)
            before = [sum(it.body.count(b"text ") for it in node.requests) for node in nodes]
            _, taken_s = await embed_timed(gateway)
            taken = [sum(it.body.count(b"text ") for it in node.requests) - had
                     for node, had in zip(nodes, before, strict=True)]
            speeds = [node.engine.hardware.prefill_tok_s for node in nodes]
            assert sum(taken) == 1000
            for count, speed in zip(taken, speeds, strict=True):
                assert abs(count / 1000 - speed / sum(speeds)) < 0.1

    bench.run_virtual(run())


@pytest.mark.parametrize("encoding", ["float", "base64"])
@over_sockets
async def test_openai_batch_is_one_list_in_order(encoding):
    async with surface(embedders(3, speed=20.0)) as gateway:
        answer, _ = await embed_timed(gateway, TEXTS[:300], "/v1/embeddings", encoding_format=encoding)
        found = answer.json()
        assert [row["index"] for row in found["data"]] == list(range(300))
        vectors = expected_vectors(TEXTS[:300])
        assert [row["embedding"] for row in found["data"]] == (
            vectors if encoding == "float" else list(map(bench.floats_in_base64, vectors)))
        tokens = sum(map(bench.token_count, TEXTS[:300]))
        assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert answer.fields["x-sollol-node"] == "a,b,c"


@over_sockets
async def test_short_and_endless_lists_and_switched_off_splitting_pass_byte_for_byte():
    for texts, flags in ((TEXTS[:9], ()), (TEXTS[:300], ("--no-split-embed",)), (["short"] * 5000, ())):
        async with surface(embedders(3, speed=20.0), flags) as gateway:
            answer, _ = await embed_timed(gateway, texts)
            body = json.dumps({"model": "nomic-embed-text", "input": texts}).encode()
            assert answer.json()["embeddings"] == expected_vectors(texts)
            assert [it.body for node in gateway.nodes for it in node.requests if it.path == "/api/embed"] == [body]


@pytest.mark.parametrize("status", [500, 503])
@over_sockets
async def test_share_that_fails_moves_to_another_node(status):
    nodes = embedders(3, speed=20.0)
    async with surface(nodes) as gateway:
        nodes[1].fail(status)
        answer, _ = await embed_timed(gateway, TEXTS[:300])
        assert answer.status == 200 and answer.json()["embeddings"] == expected_vectors(TEXTS[:300])
        assert any(it.status == status for it in nodes[1].requests) and answer.fields["x-sollol-node"] == "a,c"


@over_sockets
async def test_share_of_a_node_that_dies_moves_to_another_one():
    nodes = embedders(3, speed=20.0)
    async with surface(nodes) as gateway:
        task = asyncio.create_task(embed_timed(gateway, TEXTS))
        await until(lambda: nodes[2].in_flight)
        nodes[2].kill()
        assert (await task)[0].json()["embeddings"] == expected_vectors(TEXTS)
        assert nodes[2].aborted == 1


@over_sockets
async def test_garbage_for_a_share_moves_it_too():
    bad = ScriptedNode(lambda request: [framed(b'{"embeddings":[[1]]}'), KEEP], ("nomic-embed-text:latest",))
    bad.name, bad.line = "bad", "name=bad"
    bad.digests = {"nomic-embed-text:latest": bench.model_named("nomic-embed-text").digest}
    async with surface([bad, *embedders(2, loaded=(), speed=20.0)]) as gateway:
        answer, _ = await embed_timed(gateway, TEXTS[:300])
        assert answer.json()["embeddings"] == expected_vectors(TEXTS[:300]) and bad.requests


@over_sockets
async def test_nodes_with_another_version_of_the_model_take_no_share():
    nodes = embedders(4, speed=20.0)
    for node in (nodes[1], nodes[3]):
        newer(node, "nomic-embed-text", "v2", 60.0)
    nodes[3].models["nomic-embed-text:latest"] = nodes[0].models["nomic-embed-text:latest"]
    async with surface(nodes) as gateway:
        answer, _ = await embed_timed(gateway, TEXTS[:400])
        assert answer.json()["embeddings"] == expected_vectors(TEXTS[:400])
        assert asked_of(gateway, "/api/embed") == ["a", "c", "d"]


@over_sockets
async def test_refused_batch_gets_the_nodes_own_refusal():
    async with surface(embedders(3, speed=20.0)) as gateway:
        answer, _ = await embed_timed(gateway, TEXTS[:300], options={"num_ctx": "many"})
        assert answer.status == 400 and "num_ctx" in answer.json()["error"]
        await until(lambda: health(gateway)["inflight"] == health(gateway)["queued"] == 0)
        answer = await call(gateway, "POST", "/api/embed", {"model": "nobodys", "input": TEXTS[:100]})
        assert answer.status == 404 and "try pulling it first" in answer.json()["error"]


@over_sockets
async def test_client_that_leaves_ends_its_shares():
    async with surface(embedders(2)) as gateway:
        caller = await Caller.to(gateway)
        task = asyncio.create_task(caller.ask("POST", "/api/embed", {"model": "nomic-embed-text", "input": TEXTS}))
        await until(lambda: health(gateway)["inflight"] == 2)
        caller.close()
        await until(lambda: health(gateway)["inflight"] == health(gateway)["queued"] == 0)
        await asyncio.gather(task, return_exceptions=True)
        assert not gateway.dispatcher.waiting.fair.active


def test_long_batch_lets_others_pass():
    async def run():
        async with surface(embedders(2, speed=0.4)) as gateway:
            await embed_timed(gateway, TEXTS[:200])
            batch = asyncio.create_task(embed_timed(gateway))
            await until(lambda: health(gateway)["inflight"] == 2)
            started_s = gateway.loop.time()
            for _ in range(3):
                assert (await embed_timed(gateway, "short"))[0].status == 200
            assert (gateway.loop.time() - started_s) / 3 < 2.5 * sollol.SHARE_S
            assert not batch.done()
            await batch

    bench.run_virtual(run())


# -----------------------------------------------------------------------------
# Cluster-wide answers
# -----------------------------------------------------------------------------

@over_sockets
async def test_merged_answers_show_one_ollama():
    nodes = [bench.SimNode(models=("llama3.2", "mistral"), loaded=("mistral",), version="0.33.0", **FAST),
             bench.SimNode(models=("llama3.2", "qwen3:14b"), version="0.9.1", **FAST)]
    async with gateway_for(*nodes) as gateway:
        tags = (await call(gateway, "GET", "/api/tags")).json()["models"]
        assert sorted(row["name"] for row in tags) == ["llama3.2:latest", "mistral:latest", "qwen3:14b"]
        assert {"modified_at", "size", "digest", "details"} <= set(tags[0])
        assert [row["name"] for row in (await call(gateway, "GET", "/api/ps")).json()["models"]] == ["mistral:latest"]
        assert (await call(gateway, "GET", "/api/version")).json() == {"version": "0.9.1"}
        models = (await call(gateway, "GET", "/v1/models")).json()
        assert sorted(row["id"] for row in models["data"]) == sorted(row["name"] for row in tags)
        assert (await call(gateway, "HEAD", "/api/tags")).fields["content-length"]
        for node in nodes:
            node.freeze()
        assert len((await call(gateway, "GET", "/api/tags")).json()["models"]) == 3
        assert (await call(gateway, "GET", "/")).body == b"Ollama is running"


@over_sockets
async def test_show_goes_to_a_holder_and_other_paths_to_some_node():
    nodes = [bench.SimNode(models=("mistral",), **FAST), bench.SimNode(models=("qwen3:14b",), **FAST)]
    async with gateway_for(*nodes) as gateway:
        assert (await call(gateway, "POST", "/api/show", {"model": "qwen3:14b"})).status == 200
        for model, port in (("mistral", nodes[0].port), ("qwen3:14b", nodes[1].port)):
            answer = await call(gateway, "GET", f"/v1/models/{model}")
            assert answer.status == 200 and answer.fields["x-sollol-node"] == f"127.0.0.1:{port}"
        answer = await call(gateway, "GET", "/no/such/path?x=%20y")
        assert (answer.status, answer.body) == (404, b"404 page not found")
        assert (await call(gateway, "PUT", "/api/chat")).status == 405


def test_decisions_that_are_kept_hold_no_request():
    dispatcher = cluster(n1=["m"], n2=["m"])
    it, = enter(dispatcher, want(embeds=True, prompt_chars=8, batch={"input": ["a body of many MiB", "and more"]}))
    assert placed(dispatcher) and len(dispatcher.policy.decisions) == 1
    finish(dispatcher, it, 1.0)
    del it
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is RequestSpec and one.batch
                and "a body of many MiB" in one.batch["input"]]


@over_sockets
async def test_stats_show_nodes_queue_and_decisions():
    async with gateway_for(fixed(1)) as gateway:
        def one(priority):
            return asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50), X_Priority=priority))

        tasks = [one(5)]
        await until(lambda: health(gateway)["inflight"] == 1)
        tasks += [one(3), one(9)]
        await until(lambda: health(gateway)["queued"] == 2)
        stats = (await call(gateway, "GET", "/api/stats")).json()
        node = stats["nodes"][0]
        assert node["state"] == "up" and node["models"]["llama3.2:latest"]["slots"] == 1
        assert [(ticket["priority"], ticket["position"]) for ticket in stats["queue"]] == [(9, 1), (3, 2)]
        assert stats["decisions"][0]["predicted_finish_s"].keys() == {node["name"]}
        await asyncio.gather(*tasks)
        assert b"sollol_predicted_error_ratio_count 3\n" in (await call(gateway, "GET", "/metrics")).body


@over_sockets
async def test_client_finds_itself_in_the_queue_by_its_own_name():
    async with gateway_for(fixed(1)) as gateway:
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50),
                                          X_Request_Id=f"mine-{number}")) for number in range(3)]
        await until(lambda: health(gateway)["queued"] == 2)
        queue = (await call(gateway, "GET", "/api/queue")).json()["queue"]
        running = (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]["running"]
        assert {row["id"] for row in queue + running} == {"mine-0", "mine-1", "mine-2"}
        assert [row["position"] for row in queue] == [1, 2]
        assert 0 <= queue[0]["predicted_start_s"] < queue[1]["predicted_start_s"]
        assert running[0]["slot"] and running[0]["predicted_left_s"] is not None
        await asyncio.gather(*tasks)


def test_predicted_start_follows_what_is_learned_while_a_ticket_waits():
    dispatcher = cluster(n1=["m"])
    running, *_ = enter(dispatcher, *[want()] * 3)
    assert placed(dispatcher) == ["n1"]
    before_s = sollol.queue_stats(dispatcher, 0.0)[1]["predicted_start_s"]
    finish(dispatcher, running, 0.1, Timings(0.1, 0, 0.01, 100, 0.09, 10))
    after_s = sollol.queue_stats(dispatcher, 0.1)[1]["predicted_start_s"]
    assert 0 < after_s < 0.3 * before_s


def last_start_s(dispatcher, now=0.0):
    return sollol.queue_stats(dispatcher, now)[-1]["predicted_start_s"]


def test_predicted_start_counts_only_nodes_that_can_serve():
    """And Retry-After: with two of three nodes drained, down or failing it takes three times as long."""
    whole = cluster(**{name: ["m"] for name in "abc"})
    enter(whole, *[want()] * 30)
    placed(whole)
    for harm in (lambda dispatcher, node: dispatcher.drain(node, True),
                 lambda dispatcher, node: node.lost(0.0),
                 lambda dispatcher, node: [node.breaker.fail(0.0) for _ in range(2)]):
        dispatcher = cluster(**{name: ["m"] for name in "abc"})
        for name in "bc":
            harm(dispatcher, dispatcher.cluster.nodes[name])
        enter(dispatcher, *[want()] * 28)
        placed(dispatcher)
        assert len(dispatcher.waiting) == len(whole.waiting)
        assert last_start_s(dispatcher) == pytest.approx(3 * last_start_s(whole), rel=0.1)
        assert dispatcher.drain_s(0.0) == pytest.approx(last_start_s(dispatcher), abs=0.001)
    for node in dispatcher.cluster.nodes.values():
        node.lost(0.0)
    assert last_start_s(dispatcher) is None and dispatcher.drain_s(9.0) == 1.0


@pytest.mark.parametrize("stream", [True, False])
def test_predicted_start_counts_what_the_nodes_are_busy_with(stream):
    dispatcher = cluster(slots=2, n1=["m"])
    first, second, _ = enter(dispatcher, *(want(stream=stream, max_output=most) for most in (1000, 500, 500)))
    for it in (first, second):      # nothing was learned yet: as much as is allowed is expected
        it.demand = replace(it.demand, output_tokens=it.spec.max_output)
    assert placed(dispatcher) == ["n1", "n1"]
    second.lease.predicted_end_s = last_start_s(dispatcher)
    assert last_start_s(dispatcher) == pytest.approx(
        min(sollol.solo_left_s(it.lease, 0.0) for it in (first, second)) * sollol.slowdowns_of(0.7)[2], rel=0.01)
    half_s = last_start_s(dispatcher) / 2
    second.lease.heard(int(second.lease.output_tokens / 2) if stream else 0, half_s)
    assert last_start_s(dispatcher, half_s) == pytest.approx(half_s, rel=0.05)
    dispatcher.leave(second, half_s)
    assert last_start_s(dispatcher, half_s) == 0.0


def test_predicted_start_of_one_model_counts_the_work_of_another_on_the_same_node():
    dispatcher = cluster(a=["m", "other"], b=["third"])
    enter(dispatcher, *[want()] * 9, want("other"), *[want("third")] * 2)
    placed(dispatcher)
    starts_s = {row["model"]: row["predicted_start_s"] for row in sollol.queue_stats(dispatcher, 0.0)}
    assert starts_s["third:latest"] < starts_s["m:latest"] / 4
    if "other:latest" in starts_s:
        assert starts_s["other:latest"] > starts_s["third:latest"]


def test_forecast_of_ten_thousand_is_quick():
    dispatcher = cluster(slots=2, max_queue=20_000, **{f"n{number}": ["m", "a", "b"] for number in range(50)})
    enter(dispatcher, *(want("mab"[number % 3]) for number in range(10_000)))
    placed(dispatcher)
    took_s = min(timed(sollol.queue_stats, dispatcher, 1.0) for _ in range(3))
    assert took_s < 0.2             # 0.03 s on a machine that does nothing else


def timed(call, *given):
    started_s = time.perf_counter()
    call(*given)
    return time.perf_counter() - started_s


@pytest.mark.parametrize("early", [False, True])
def test_prediction_refuses_nobody_unless_it_is_asked_to(early):
    dispatcher = cluster(n1=["m"])
    dispatcher.waiting.timeout_s, dispatcher.early_refusal = 20.0, early
    enter(dispatcher, want(client="a"))
    placed(dispatcher)
    waiting = 0
    with pytest.raises(Refusal) if early else contextlib.nullcontext() as refused:
        for _ in range(50):
            enter(dispatcher, want(client="a"), now=0.01)
            waiting += 1
            dispatcher.forecast = -math.inf, 0.0
    assert (waiting < 50) is early
    if early:
        assert (refused.value.status, 0 < refused.value.retry_after_s < 10) == (503, True)
        assert "no slot is predicted to become free within 20 s" in refused.value.text
        assert last_start_s(dispatcher, 0.01) <= 20.0 + 5.0
        enter(dispatcher, want(client="b"), now=0.01)       # goes before those of a client with so many
        assert len(dispatcher.waiting) == waiting + 1


# -----------------------------------------------------------------------------
# Drain and resume
# -----------------------------------------------------------------------------

@over_sockets
async def test_drained_node_finishes_its_work_and_gets_no_more_until_it_is_resumed():
    nodes = [fixed(2), fixed(2)]
    for node, name in zip(nodes, "ab", strict=True):
        node.line += f" name={name}"
    async with gateway_for(*nodes) as gateway:
        async def stream():
            return await call(gateway, "POST", "/api/generate", generate(tokens=100, stream=True))

        async def used(count):
            answers = await asyncio.gather(*(stream() for _ in range(count)))
            assert all(json.loads(answer.body.splitlines()[-1])["done"] for answer in answers)
            return {answer.fields["x-sollol-node"] for answer in answers}

        tasks = [asyncio.create_task(stream()) for _ in range(4)]
        await until(lambda: health(gateway)["inflight"] == 4)
        drained = (await call(gateway, "POST", "/api/nodes/a/drain")).json()
        assert (drained["name"], drained["state"], drained["inflight"]) == ("a", "draining", 2)
        assert await used(4) == {"b"} and health(gateway)["nodes"] == {
            "up": 1, "draining": 1, "down": 0, "total": 2}
        assert {(await task).fields["x-sollol-node"] for task in tasks} == {"a", "b"}
        assert (await call(gateway, "POST", "/api/nodes/b/drain")).status == 200
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 503
        for name in "ab":
            assert (await call(gateway, "POST", f"/api/nodes/{name}/resume")).json()["state"] == "up"
        assert await used(4) == {"a", "b"}


@over_sockets
async def test_drained_node_is_not_measured_until_it_is_resumed():
    node = bench.SimNode(loaded=("llama3.2",), **FAST)
    async with gateway_for(node) as gateway:
        name, = gateway.dispatcher.cluster.nodes
        await call(gateway, "POST", f"/api/nodes/{name}/drain")
        gateway.options.calibrate = True
        await asyncio.sleep(3 * sollol.SWEEP_S)
        assert "/api/generate" not in {request.path for request in node.requests}
        await call(gateway, "POST", f"/api/nodes/{name}/resume")
        await until(lambda: "/api/generate" in {request.path for request in node.requests})


@pytest.mark.parametrize("fields", [{"X_Forwarded_For": "127.0.0.1"}, {"Forwarded": "for=127.0.0.1"}, {"Via": "1.1 x"},
                                    {"X_Real_IP": "127.0.0.1"}, {"Host": "evil.example"}, {"Host": "evil.example:80"},
                                    {"Origin": "http://evil.example"}])
@over_sockets
async def test_nobody_from_elsewhere_drains_a_node(fields):
    async with gateway_for(fixed(1)) as gateway:
        name, = gateway.dispatcher.cluster.nodes
        assert (await call(gateway, "POST", f"/api/nodes/{name}/drain", **fields)).status == 403
        assert health(gateway)["nodes"]["up"] == 1


@pytest.mark.parametrize("address, own", [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
                                          ("::ffff:127.0.0.1", True), ("10.0.0.1", False), ("x.example", False),
                                          ("", False)])
def test_loopback_addresses(address, own):
    assert sollol.is_loopback(address) is own


@over_sockets
async def test_order_loads_a_model_and_unloads_it_when_what_runs_has_ended(caplog):
    caplog.set_level("INFO", "sollol")
    node = bench.SimNode(models=("llama3.2", "nomic-embed-text"), **FAST)
    node.line = "name=team/a"
    async with gateway_for(node) as gateway:
        runners = gateway.dispatcher.cluster.nodes["team/a"].runners
        for model in ("llama3.2", "nomic-embed-text"):
            full = f"{model}:latest"
            told = (await call(gateway, "POST", f"/api/nodes/team%2Fa/load?model={model}")).json()
            assert told["models"][full]["loading"] and told["running"][0]["reason"] == "the gateway loads a model"
            await until(lambda: node.engine.resident and not gateway.node_io.jobs)      # noqa: B023
            assert node.engine.resident[full].keep_alive_s == math.inf and runners[full].ready_s is not None
            assert not gateway.dispatcher.cluster.nodes["team/a"].leases
            if model == "llama3.2":
                asking = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=6000)))
                await until(lambda: node.in_flight == 1)
                assert (await call(gateway, "POST", f"/api/nodes/team%2Fa/unload?model={model}")).status == 200
                await asyncio.sleep(0.1)
                assert not asking.done() and (await asking).status == 200
            else:
                assert (await call(gateway, "POST", f"/api/nodes/team%2Fa/unload?model={model}")).status == 200
            await until(lambda: not node.engine.resident and not gateway.node_io.jobs)
            await asyncio.sleep(1.1)        # an older /api/ps would not be believed
            await gateway.node_io.look_at_residency(gateway.dispatcher.cluster.nodes["team/a"])
            assert runners[full].ready_s is None
    orders = [(record.msg["event"], record.msg["model"]) for record in caplog.records
              if isinstance(record.msg, dict) and record.msg.get("why") == "ordered"]
    assert orders == [(verb, model) for model in ("llama3.2:latest", "nomic-embed-text:latest")
                      for verb in ("load", "unload")]


@over_sockets
async def test_order_to_load_what_cannot_be_loaded_is_refused_or_seen_among_the_failures():
    node, other = bench.SimNode(models=("llama3.2", "mistral"), **FAST), bench.SimNode(models=("mistral",), **FAST)
    node.line, other.line = "name=a", "name=b"
    async with gateway_for(node, other) as gateway:
        for query in ("", "?model=", "?model=nothing", "?model=../a", "?models=mistral"):
            for verb in ("load", "unload"):
                answer = await call(gateway, "POST", f"/api/nodes/a/{verb}{query}")
                assert answer.status == 404 and "has no model" in answer.json()["error"]
        assert (await call(gateway, "POST", "/api/nodes/b/load?model=llama3.2")).status == 404
        node.fail(500, text="CUDA error: out of memory")
        for verb in ("load", "unload"):
            assert (await call(gateway, "POST", f"/api/nodes/a/{verb}?model=mistral")).status == 200
            await until(lambda: not gateway.node_io.jobs)
        told = [(noted.kind, noted.client, noted.text) for noted in gateway.telemetry.failures]
        assert [(kind, client, text.partition(": ")[0]) for kind, client, text in told] == [
            ("order", "an order", "load"), ("order", "an order", "unload")]
        assert "out of memory" in told[0][2] and gateway.dispatcher.cluster.nodes["a"].runners[
            "mistral:latest"].ready_s is None
        other.kill()
        await gateway.node_io.probe(gateway.dispatcher.cluster.nodes["b"])
        assert (await call(gateway, "POST", "/api/nodes/b/load?model=mistral")).status == 503


@over_sockets
async def test_ordered_load_gives_way_to_a_request_and_a_second_one_waits_for_the_first():
    node = bench.SimNode(models=("llama3.2", "mistral"), speed=2, max_loaded=1)
    node.line = "name=a"
    async with gateway_for(node) as gateway:
        assert (await call(gateway, "POST", "/api/nodes/a/load?model=mistral")).status == 200
        second = await call(gateway, "POST", "/api/nodes/a/load?model=llama3.2")
        assert second.status == 503 and "loads a model" in second.json()["error"]
        assert (await call(gateway, "POST", "/api/generate", generate(tokens=5))).status == 200
        await until(lambda: not gateway.node_io.jobs)
        assert [(noted.kind, noted.text) for noted in gateway.telemetry.failures] == [("order", "load: it gave way")]
        assert not gateway.dispatcher.cluster.nodes["a"].leases


@over_sockets
async def test_order_to_a_node_that_is_none_tells_which_there_are():
    async with gateway_for(fixed(1)) as gateway:
        name, = gateway.dispatcher.cluster.nodes
        for path in ("/api/nodes/x/drain", f"/api/nodes/{name}/explode", f"/api/nodes/{name}", "/api/nodes/drain"):
            answer = await call(gateway, "POST", path)
            assert answer.status == 404 and name in answer.json()["error"]


def test_what_waits_for_the_only_node_with_its_model_is_still_served_there_when_it_drains():
    dispatcher = cluster(a=["m", "other"], b=["other"])
    running, first, second, other = enter(dispatcher, want(), want(), want(), want("other"))
    leases, _ = dispatcher.dispatch(0.0)
    assert {lease.ticket for lease in leases} == {running, other} and other.lease.node.name == "b"
    dispatcher.drain(dispatcher.cluster.nodes["a"], True)
    late, = enter(dispatcher, want())
    assert dispatcher.dispatch(0.0) == ([], [late]) and late.refusal.status == 503
    for ended, following in ((running, first), (first, second)):
        finish(dispatcher, ended, 1.0)
        assert placed(dispatcher, 1.0) == ["a"] and following.lease
    another, = enter(dispatcher, want("other"))
    finish(dispatcher, second, 2.0)
    assert placed(dispatcher, 2.0) == [] and another.state is TicketState.WAITING
    finish(dispatcher, other, 3.0)
    assert placed(dispatcher, 3.0) == ["b"]


def test_what_waits_for_a_draining_node_is_refused_when_it_goes_down():
    dispatcher = cluster(a=["m"])
    running, waiting = enter(dispatcher, want(), want())
    assert placed(dispatcher) == ["a"]
    dispatcher.drain(dispatcher.cluster.nodes["a"], True)
    assert dispatcher.dispatch(0.0) == ([], [])
    dispatcher.cluster.nodes["a"].lost(1.0)
    assert dispatcher.dispatch(1.0) == ([], [waiting])


@over_sockets
async def test_what_is_pinned_to_a_drained_primary_node_is_told_so():
    async with gateway_for(fixed(1), fixed(1)) as gateway:
        name = next(iter(gateway.dispatcher.cluster.nodes))
        await call(gateway, "POST", f"/api/nodes/{name}/drain")
        answer = await call(gateway, "POST", "/api/me")
        assert answer.status == 503 and answer.json()["error"] == f"{name}, the primary node, is draining"


def test_drained_node_stays_drained_over_a_reload():
    dispatcher = cluster(a=["m"], b=["m"])
    settings = [node.settings for node in dispatcher.cluster.nodes.values()]
    dispatcher.drain(dispatcher.cluster.nodes["a"], True)
    dispatcher.cluster.configure(settings)
    assert [node.draining for node in dispatcher.cluster.nodes.values()] == [True, False]


@pytest.mark.parametrize("running", [False, True])
def test_drained_node_that_was_away_for_a_moment_is_still_drained(running):
    """A pod that is drained is often not ready for a while, and then DNS does not tell it."""
    dispatcher = cluster(a=["m"], b=["m"])
    settings = [node.settings for node in dispatcher.cluster.nodes.values()]
    if running:
        enter(dispatcher, want(), want())
        placed(dispatcher)
    dispatcher.drain(dispatcher.cluster.nodes["a"], True)
    for lines in (settings[1:], settings[:1], settings):
        dispatcher.cluster.configure(lines)
    assert [node.draining for node in dispatcher.cluster.nodes.values()] == [True, False]
    dispatcher.drain(dispatcher.cluster.nodes["a"], False)
    for lines in (settings[1:], settings):
        dispatcher.cluster.configure(lines)
    assert [node.draining for node in dispatcher.cluster.nodes.values()] == [False, False]


@table("steps, draining", [
    ("drained by its line", "yes", True), ("resumed by its line", "yes no", False),
    ("ordered over a line without it", "no drain", True), ("ordered over a line with it", "yes resume", False),
    ("an order holds while the line stays", "yes resume yes yes", False),
    ("an order ends when the line says the same", "no drain yes no", False),
    ("the same, resumed", "yes resume no yes", True),
    ("an order that says what the line says changes nothing later", "yes drain no", False),
    ("an order and back", "no drain resume yes", True),
    ("a restart", "yes restart yes", True), ("an order survives a restart", "no drain restart no", True),
    ("so does one over a line with it", "yes resume restart yes", False),
    ("the line is changed meanwhile", "yes resume restart no yes", True),
    ("an order is taken back before a restart", "no drain resume restart no", False),
])
def test_line_or_the_last_order_that_it_does_not_repeat_tells_whether_a_node_is_drained(steps, draining):
    dispatcher = sollol.Dispatcher()
    for step in steps.split():
        if step == "restart":
            kept = json.loads(json.dumps(dispatcher.cluster.learned()))
            dispatcher = sollol.Dispatcher()
            dispatcher.cluster.remember(kept)
        elif step in ("yes", "no"):
            dispatcher.cluster.configure(sollol.parse_hosts(f"gpu name=a drain={step}\nb", "h"))
        else:
            dispatcher.drain(dispatcher.cluster.nodes["a"], step == "drain")
    assert [node.draining for node in dispatcher.cluster.nodes.values()] == [draining, False]


def test_what_waits_for_the_only_node_with_its_model_is_served_there_when_its_line_drains_it():
    dispatcher = cluster(a=["m"], b=["other"])
    running, waiting = enter(dispatcher, want(), want())
    assert placed(dispatcher) == ["a"]
    lines = [node.settings for node in dispatcher.cluster.nodes.values()]
    dispatcher.cluster.configure([lines[0]._replace(drain=True), lines[1]], next(dispatcher.waiting.seq))
    late, = enter(dispatcher, want())
    assert dispatcher.dispatch(0.0) == ([], [late])
    finish(dispatcher, running, 1.0)
    assert placed(dispatcher, 1.0) == ["a"] and waiting.lease


@table("orders", [
    ("no list", 5), ("an object", {}), ("no objects", [1, None, "x", []]),
    ("no host", [{"url": "u", "draining": True}]), ("no truth value", [{"url": "u", "host": "h", "draining": 1}]),
    ("numbers", [{"url": 1, "host": "h", "draining": True}]), ("none", None)])
def test_orders_in_a_state_file_that_are_none_are_left_out(orders):
    dispatcher = sollol.Dispatcher()
    dispatcher.cluster.remember({**GOOD_STATE, "orders": orders})
    assert dispatcher.cluster.orders == {}


@pytest.mark.parametrize("drained, dies, state, whole", [
    (False, False, "up", "up"), (True, False, "draining", "draining"), (False, True, "down", "down"),
    (True, True, "down", "down, draining")])
@over_sockets
async def test_drained_and_down_are_told_apart_everywhere(drained, dies, state, whole, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "sollol")
    sollol.LOG.propagate = True
    node, other = bench.SimNode(**FAST), bench.SimNode(**FAST)
    await node.start()
    await other.start()
    lines = f"{node.url} name=a{' drain=yes' * drained}\n{other.url} name=b"
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(lines)
    async with gateway_for(node, other, hosts=hosts, flags=["--probe-interval", "0.1"]) as gateway:
        if dies:
            node.kill()
        await until(lambda: f"'node': 'a', 'url': '{node.url}', 'state': '{whole}'" in caplog.text)
        shown = (await call(gateway, "GET", "/api/stats")).json()["nodes"][0]
        assert (shown["state"], shown["draining"]) == (state, drained)
        page = json.loads(gateway.telemetry.snapshot())["nodes"][0]
        assert (page["state"], page["draining"]) == (state, drained)
        assert health(gateway)["nodes"] == {
            "up": 1 + (state == "up"), "draining": int(drained), "down": int(dies), "total": 2}
        metrics = scraped((await call(gateway, "GET", "/metrics")).body.decode())
        assert metrics["sollol_node_up", frozenset({("node", "a")})] == (not dies)
        assert metrics["sollol_node_draining", frozenset({("node", "a")})] == drained
        level = sollol.LOG.level
        status = await sollol.run_check(gateway.options, sollol.read_nodes(gateway.options))
        sollol.LOG.setLevel(level)
        assert status == dies and re.search(rf"(?m)^a .* {whole} ", capsys.readouterr().out)


@over_sockets
async def test_drain_by_a_saved_line_lets_streams_end_and_by_the_next_save_gives_work_again(tmp_path):
    nodes = [fixed(1), fixed(1)]
    for node in nodes:
        await node.start()
    hosts = tmp_path / "hosts.txt"
    one, two = (f"{node.url} name={name}" for node, name in zip(nodes, "ab", strict=True))
    hosts.write_text(f"{one}\n{two}")
    async with gateway_for(*nodes, hosts=hosts) as gateway:
        async def used(tokens=3):
            answer = await call(gateway, "POST", "/api/generate", generate(tokens=tokens, stream=True))
            assert json.loads(answer.body.splitlines()[-1])["done"]
            return answer.fields["x-sollol-node"]

        long_ones = [asyncio.create_task(used(300)) for _ in range(2)]
        await until(lambda: health(gateway)["inflight"] == 2)
        hosts.write_text(f"{one} drain=yes\n{two}")
        gateway.files.reload()
        assert {await task for task in long_ones} == {"a", "b"}
        assert [await used() for _ in range(4)] == ["b"] * 4
        hosts.write_text(f"{one}\n{two} drain=yes")
        gateway.files.reload()
        assert [await used() for _ in range(4)] == ["a"] * 4


@over_sockets
async def test_order_is_in_the_state_file_long_before_the_next_save(tmp_path):
    path, node = tmp_path / "state.json", bench.SimNode(**FAST)
    async with gateway_for(node, flags=["--state", str(path)]) as gateway:
        name, = gateway.dispatcher.cluster.nodes
        for verb, kept in (("drain", [{"url": node.url, "host": name, "draining": True}]), ("resume", [])):
            assert (await call(gateway, "POST", f"/api/nodes/{name}/{verb}")).status == 200
            await until(lambda kept=kept: path.exists() and json.loads(path.read_text())["orders"] == kept, 50.0)


# -----------------------------------------------------------------------------
# Usage: who used what
# -----------------------------------------------------------------------------

ADA, BOB, EVE, OPS = ("web", "ada"), ("web", "bob"), ("", "10.0.0.9"), ("ops", "")
USED = [                            # day, person, model, node, requests, prompt and output tokens, slot time, failures
    ("2026-11-26", ADA, "m:latest", "a", 1, 10, 100, 1.5, 0), ("2026-11-27", ADA, "m:latest", "a", 1, 20, 200, 2.0, 0),
    ("2026-11-27", ADA, "n:latest", "b", 1, 30, 300, 3.0, 1), ("2026-11-27", BOB, "m:latest", "b", 1, 1, 1, 0.25, 0),
    ("2026-11-28", EVE, "m:latest", "a", 1, 5, 5, 4.0, 0), ("2026-11-28", OPS, "m:latest", "a", 1, 2, 2, 1.0, 0)]


def used(rows=USED):
    usage = sollol.Usage()
    for day, person, model, node, *numbers in rows:
        usage.note(day, person, model, node, sollol.Use(*numbers))
    return usage


def report(usage, query="", today="2026-11-28", key=None):
    """Return {names: numbers} of a report."""
    query = sollol.parse_usage_query(query.encode(), today)
    return {group: use.values() for group, use in sollol.at_once(usage.report(query, key))}


@table("query, expected", [
    ("nothing asked", "", {("web", "ada"): [3, 60, 600, 6.5, 1, 0], ("", "10.0.0.9"): [1, 5, 5, 4.0, 0, 0],
                           ("ops", ""): [1, 2, 2, 1.0, 0, 0], ("web", "bob"): [1, 1, 1, 0.25, 0, 0]}),
    ("key", "by=key", {("web",): [4, 61, 601, 6.75, 1, 0], ("",): [1, 5, 5, 4.0, 0, 0],
                       ("ops",): [1, 2, 2, 1.0, 0, 0]}),
    ("model", "by=model", {("m:latest",): [5, 38, 308, 8.75, 0, 0], ("n:latest",): [1, 30, 300, 3.0, 1, 0]}),
    ("node", "by=node", {("a",): [4, 37, 307, 8.5, 0, 0], ("b",): [2, 31, 301, 3.25, 1, 0]}),
    ("days in order", "by=key,day&since=2026-11-27", {
        ("2026-11-27", "web"): [3, 51, 501, 5.25, 1, 0], ("2026-11-28", ""): [1, 5, 5, 4.0, 0, 0],
        ("2026-11-28", "ops"): [1, 2, 2, 1.0, 0, 0]}),
    ("today", "by=day&since=1d", {("2026-11-28",): [2, 7, 7, 5.0, 0, 0]}),
    ("until", "by=node&since=2d&until=2026-11-27", {("b",): [2, 31, 301, 3.25, 1, 0],
                                                    ("a",): [1, 20, 200, 2.0, 0, 0]}),
    ("one day", "by=key&since=2026-11-26&until=2026-11-26", {("web",): [1, 10, 100, 1.5, 0, 0]}),
    ("before all", "since=2026-01-01&until=2026-01-02", {})])
@pytest.mark.parametrize("keep", ["open", "closed", "over a restart"])
def test_report_is_the_sum_of_what_was_used(query, expected, keep):
    usage = used()
    if keep == "closed":
        sollol.at_once(usage.close_days())
        assert list(usage.days) == ["2026-11-28"] and list(usage.closed) == ["2026-11-26", "2026-11-27"]
    elif keep == "over a restart":
        text = "".join(sollol.at_once(usage.pieces())).encode()
        usage = sollol.Usage()
        usage.load(text, "2026-11-28")
        assert "".join(sollol.at_once(usage.pieces())).encode() == text
    found = report(usage, query)
    assert found == expected and list(found) == list(expected)


def test_key_gets_only_what_was_used_with_it():
    assert report(used(), "by=model", key="web") == {("m:latest",): [3, 31, 301, 3.75, 0, 0],
                                                     ("n:latest",): [1, 30, 300, 3.0, 1, 0]}
    assert report(used(), "by=user", key="w") == {}


@listed("query", ["by=", "by=users", "by=user,", "by=user;model", "since=yesterday", "since=0d", "since=20261127",
                  "since=2026-02-30", "since=99999d", "since=", "since=-1d", "since=2026-11-27T00:00", "until=7d",
                  "until=2026-11-99", "since=2026-11-27&until=2026-11-26", "format=xml", "format=", "user=ada",
                  "by=key&by=user", "By=key", "since=٢d", "%00=1"])
def test_report_that_cannot_be_understood_is_refused_by_its_parameter(query):
    with pytest.raises(Refusal) as refused:
        sollol.parse_usage_query(query.encode(), "2026-11-28")
    assert refused.value.status == 400 and re.match("'.+' (must|is) ", str(refused.value))
    assert query.partition("=")[0].strip("%0") in str(refused.value) or "until" in str(refused.value)


def test_report_on_the_future_has_a_last_day():
    assert sollol.parse_usage_query(b"since=2027-01-01", "2026-11-28")[:2] == ("2027-01-01", "2027-01-01")
    assert sollol.parse_usage_query(b"", "2026-11-28") == ("2026-11-22", "2026-11-28", ["user"], False)


@table("name, cell", [("plain", "ada", "ada"), ("comma", "a,b", '"a,b"'), ("quote", 'a"b', '"a""b"'),
                      ("formula", "=1+1", "'=1+1"), ("formula and comma", "@a,b", '"\'@a,b"'), ("minus", "-1", "'-1"),
                      ("empty", "", ""), ("line end", "a\nb", '"a\nb"')])
def test_name_in_csv_is_one_cell_and_no_formula(name, cell):
    assert sollol.csv_cell(name) == cell


def ended(**given):
    """Return the Record of a finished request."""
    return sollol.Record("id", "10.0.0.9", "POST", "/api/chat", 0.0, attempts=1,
                         **{"node": "a", "status": 200, "outcome": "ok", **given})


COUNTED = Timings(prompt_tokens=30, output_tokens=7)


@table("record, expected", [
    ("answered", ended(timings=COUNTED, held=(("a", 2.0),)), {"a": [1, 30, 7, 2.0, 0, 0]}),
    ("on the second node", ended(node="b", timings=COUNTED, held=(("a", 2.0), ("b", 3.0))),
     {"b": [1, 30, 7, 3.0, 0, 0], "a": [0, 0, 0, 2.0, 0, 0]}),
    ("twice on one node", ended(timings=COUNTED, held=(("a", 2.0), ("a", 3.0))), {"a": [1, 30, 7, 5.0, 0, 0]}),
    ("cut", ended(outcome="cut", held=(("a", 2.0),)), {"a": [1, 0, 0, 2.0, 1, 0]}),
    ("error", ended(outcome="error", status=502, held=(("a", 2.0),)), {"a": [1, 0, 0, 2.0, 1, 0]}),
    ("left", ended(outcome="client_left", status=499, held=(("a", 2.0),)), {"a": [1, 0, 0, 2.0, 0, 0]}),
    ("without counts", ended(held=(("a", 2.0),)), {"a": [1, 0, 0, 2.0, 0, 1]}),
    ("estimated", ended(timings=replace(COUNTED, estimated=True), held=(("a", 2.0),)), {"a": [1, 30, 7, 2.0, 0, 1]}),
    ("without a slot", ended(), {"a": [1, 0, 0, 0.0, 0, 0]}),
    ("batch", ended(node="a,b", timings=Timings(prompt_tokens=100), held=(("b", 1.0), ("a", 2.0), ("a", 3.0)), shares=[
        ended(timings=Timings(prompt_tokens=25)), ended(node="b", timings=Timings(prompt_tokens=75))]),
     {"a": [1, 25, 0, 5.0, 0, 0], "b": [0, 75, 0, 1.0, 0, 0]}),
    ("failed batch", ended(node="a,b", outcome="error", status=502, held=(("b", 1.0),), shares=[
        ended(), ended(node="b", timings=Timings(prompt_tokens=75))]),
     {"a": [1, 0, 0, 0.0, 1, 0], "b": [0, 75, 0, 1.0, 0, 0]})])
def test_request_counts_once_and_what_it_used_where_it_used_it(record, expected):
    assert {node: use.values() for node, use in sollol.uses_of(record).items()} == expected


def test_more_people_than_are_kept_are_others_of_their_key_and_no_sum_changes(monkeypatch):
    monkeypatch.setattr(sollol, "MOST_PEOPLE", 5)
    monkeypatch.setattr(sollol, "MOST_ROWS", 8)
    rng, usage, sums = random.Random(1), sollol.Usage(), collections.Counter()
    for _ in range(2000):
        key = rng.choice("kl")
        usage.note("2026-11-28", (key, f"user-{rng.randrange(1000)}"), f"m{rng.randrange(50)}", rng.choice("ab"),
                   sollol.Use(1, 2, 3, 1.0))
        sums[key,] += 1
    found = report(usage, "by=key")
    assert {key: numbers[0] for key, numbers in found.items()} == sums
    assert len(report(usage, "by=user")) <= 7 and report(usage, "by=user")["k", "other"][0] > 900
    day = usage.days["2026-11-28"]
    assert len(day.people) <= 7 and len(day.rows) <= 10
    monkeypatch.setattr(sollol, "MOST_GROUPS", 3)
    assert sum(numbers[0] for numbers in report(usage, "by=user,model").values()) == 2000


def test_90_days_are_kept_and_of_too_much_the_oldest_lose_their_users_first(monkeypatch):
    usage, start = sollol.Usage(), sollol.datetime.date(2026, 1, 1)
    for number in range(100):
        day = (start + sollol.datetime.timedelta(number)).isoformat()
        for user in range(20):
            usage.note(day, ("k", f"user-{user}"), "m:latest", "a", sollol.Use(1, 1, 1, 1.0))
        sollol.at_once(usage.close_days())
    assert len(usage.closed) + len(usage.days) == 90 and min(usage.closed) == "2026-01-11"
    assert report(usage, "by=key&since=90d", today=day) == {("k",): [1800, 1800, 1800, 1800.0, 0, 0]}
    monkeypatch.setattr(sollol, "CLOSED_DAYS_BYTES", usage.closed_bytes() // 2)
    sollol.at_once(usage.close_days())
    assert report(usage, "by=key&since=90d", today=day) == {("k",): [1800, 1800, 1800, 1800.0, 0, 0]}
    assert set(report(usage, "by=user&since=2026-01-11&until=2026-01-20", today=day)) == {("k", "other")}
    assert len(report(usage, "by=user&since=10d", today=day)) == 20
    monkeypatch.setattr(sollol, "CLOSED_DAYS_BYTES", 1000)
    sollol.at_once(usage.close_days())
    assert usage.closed_bytes() <= 1000 and day in usage.days and max(usage.closed) > "2026-04-05"


def test_clock_that_is_set_back_opens_a_closed_day_again():
    usage = used()
    sollol.at_once(usage.close_days())
    usage.note("2026-11-27", ADA, "m:latest", "a", sollol.Use(1, 1, 1, 1.0))
    assert report(usage, "by=day")["2026-11-27",] == [4, 52, 502, 6.25, 1, 0]
    sollol.at_once(usage.close_days())
    assert list(usage.days) == ["2026-11-27"] and sum(n[0] for n in report(usage, "by=day").values()) == 7


@pytest.mark.parametrize("hours", [14, 0, -12])
def test_day_begins_at_local_midnight(hours, monkeypatch):
    def day_there():
        zone = sollol.datetime.timezone(sollol.datetime.timedelta(hours=hours))
        return sollol.datetime.datetime.now(zone).date().isoformat()

    with monkeypatch.context() as patched:
        patched.setenv("TZ", f"<xyz>{-hours}")
        time.tzset()
        try:
            before = day_there()
            assert sollol.local_day() in (before, day_there())
        finally:
            patched.undo()
            time.tzset()


def test_10_000_people_take_10_mib_and_no_step_of_their_report_is_long():
    """Without the garbage collector, which here goes through what thousands of tests have left, too."""
    usage, slowest_s = sollol.Usage(), 0.0

    def run(steps):
        nonlocal slowest_s
        while True:
            started_s = time.thread_time()
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            finally:
                slowest_s = max(slowest_s, time.thread_time() - started_s)

    gc.collect()
    tracemalloc.start()
    try:
        for day in ("2026-11-26", "2026-11-27", "2026-11-28"):
            for number in range(15_000):
                usage.note(day, ("webui", f"{number % 10_000}-user@example.com"), f"model-{number // 10_000}:latest",
                           "gpu", sollol.Use(1, 1000 + number, 500 + number, number / 7))
                if not number:
                    sollol.at_once(usage.close_days())
        assert tracemalloc.get_traced_memory()[0] < 10 * sollol.MIB
    finally:
        tracemalloc.stop()
    query = sollol.parse_usage_query(b"by=user&since=3d", "2026-11-28")
    gc.disable()
    try:
        rows = run(usage.report(query, None))
        assert len(rows) == 10_001 and sum(use.requests for _, use in rows) == 45_000
        assert len(json.loads(run(sollol.usage_json(query, rows)))["rows"]) == 10_001
        assert run(sollol.usage_csv(query, rows)).count(b"\r\n") == 10_002
        run(usage.pieces())
        usage.note("2026-11-29", ADA, "m:latest", "a", sollol.Use(1))
        run(usage.close_days())
    finally:
        gc.enable()
    assert slowest_s < 0.02         # 4 ms


GOOD_USAGE = {"format": "sollol-usage", "version": 1,
              "days": {"2026-11-28": [["k", "u", "m", "a", 1, 2, 3, 4.5, 0, 0]]}}


def usage_with(*row, day="2026-11-28"):
    return {**GOOD_USAGE, "days": {day: [[*row]]}}


@table("content", [
    ("empty", b""), ("torn", b'{"format": "sollol-usage", "ver'), ("deep", b"[" * 100_000), ("bytes", b"\xff\x00"),
    *((name, json.dumps(value).encode()) for name, value in {
        "list": [], "state file": {"format": "sollol-state", "version": 1, "nodes": [], "lengths": {}},
        "newer": {**GOOD_USAGE, "version": 2}, "days": {**GOOD_USAGE, "days": []},
        "no rows": {**GOOD_USAGE, "days": {"2026-11-28": 1}}, "no day": usage_with(day="today"),
        "row": {**GOOD_USAGE, "days": {"2026-11-28": [1]}}, "short row": usage_with("k", "u", "m", "a", 1, 2, 3, 4, 0),
        "name": usage_with("k", 1, "m", "a", 1, 2, 3, 4, 0, 0), "minus": usage_with(*"kuma", -1, 2, 3, 4, 0, 0),
        "truth": usage_with(*"kuma", True, 2, 3, 4, 0, 0), "nan": usage_with(*"kuma", *[math.nan] * 6),
        "huge": usage_with(*"kuma", 10**30, 2, 3, 4, 0, 0)}.items())])
def test_usage_file_that_cannot_be_used_is_told_once_and_put_aside(content, tmp_path, caplog):
    caplog.set_level("WARNING", "sollol")
    sollol.LOG.propagate = True
    path = tmp_path / "state.usage.json"
    path.write_bytes(content)

    async def main():
        async with gateway_for(bench.SimNode(**FAST), flags=["--state", str(tmp_path / "state.json")]) as gateway:
            assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
            assert path.read_bytes() == content

    bench.run_virtual(main())
    assert len(caplog.messages) == 1 and str(path) in caplog.messages[0]
    assert (tmp_path / "state.usage.json.ignored").read_bytes() == content
    assert [len(rows) for rows in json.loads(path.read_bytes())["days"].values()] == [1]


@over_sockets
async def test_usage_is_kept_over_a_restart_and_written_only_if_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(sollol, "STATE_S", 0.1)
    flags, path = ["--state", str(tmp_path / "state.json")], tmp_path / "state.usage.json"
    for number in range(2):
        async with gateway_for(fixed(1), flags=flags) as gateway:
            await call(gateway, "POST", "/api/generate", generate(tokens=5))
            await until(lambda: path.exists() and gateway.files.usage.noted == 1, 600)  # a disk knows no virtual time
            before = path.stat()
            await asyncio.sleep(1.2)
            assert path.stat().st_ino == before.st_ino
            row, = (await call(gateway, "GET", "/api/usage")).json()["rows"]
            assert (row["requests"], row["output_tokens"]) == (number + 1, 5 * (number + 1))
    assert before.st_mode & 0o777 == 0o600


@over_sockets
async def test_day_that_ends_is_closed_while_it_is_told(monkeypatch):
    monkeypatch.setattr(sollol, "STATE_S", 0.1)
    day = "2026-11-27"
    monkeypatch.setattr(sollol, "local_day", lambda: day)
    async with gateway_for(fixed(1)) as gateway:
        await call(gateway, "POST", "/api/generate", generate(tokens=5))
        assert (await call(gateway, "GET", "/api/usage?by=day")).json()["total"]["requests"] == 1
        day = "2026-11-28"
        assert (await events(gateway, 1))[0]["people"] == {"count": 0, "most": []}
        await call(gateway, "POST", "/api/generate", generate(tokens=7))
        await until(lambda: list(gateway.telemetry.usage.closed) == ["2026-11-27"])
        rows = (await call(gateway, "GET", "/api/usage?by=day")).json()["rows"]
        assert [(row["day"], row["output_tokens"]) for row in rows] == [("2026-11-27", 5), ("2026-11-28", 7)]


PEOPLE_KEYS = KEYS + "webui-secret name=webui proxy=yes\n"


@over_sockets
async def test_admin_sees_what_all_used_and_a_key_itself(tmp_path):
    async with guarded(tmp_path, fixed(1), keys=PEOPLE_KEYS) as gateway:
        await call(gateway, "POST", "/api/generate", generate(tokens=5), **bearer("alice"))
        for user, tokens in (("ada", 7), ("bob%20b", 8), ("ada", 9)):
            await call(gateway, "POST", "/api/generate", generate(tokens=tokens), X_OpenWebUI_User_Id=user,
                       **bearer("webui"))

        async def told(name, query=""):
            answer = await call(gateway, "GET", f"/api/usage{query}", **bearer(name))
            assert answer.status == 200 and answer.fields["cache-control"] == "no-store"
            return {(row["key"], row["user"], row["output_tokens"]) for row in answer.json()["rows"]}

        assert await told("root") == {("alice", "", 5), ("webui", "ada", 16), ("webui", "bob b", 8)}
        assert await told("webui") == {("webui", "ada", 16), ("webui", "bob b", 8)}
        assert await told("alice") == {("alice", "", 5)}
        assert (await call(gateway, "GET", "/api/usage")).status == 401
        answer = await call(gateway, "GET", "/api/usage?since=soon", **bearer("alice"))
        assert answer.status == 400 and "'since' must be a day" in answer.json()["error"]
        answer = await call(gateway, "GET", "/api/usage?by=key,user&format=csv", **bearer("root"))
        assert answer.fields["content-type"] == "text/csv; charset=utf-8"
        names, first, *_ = answer.body.decode().splitlines()
        assert names == "key,user,requests,prompt_tokens,output_tokens,slot_s,failures,estimated"
        assert re.fullmatch(r"webui,ada,2,\d+,16,\d+\.\d+,0,0", first)
        head = await call(gateway, "HEAD", "/api/usage", **bearer("root"))
        assert head.status == 200 and not head.body and int(head.fields["content-length"]) > 100
        people = (await events(gateway, 1, "root-secret"))[0]["people"]
        assert people["count"] == 3 and people["most"][0]["name"] == "webui/ada" and people["most"][0]["requests"] == 2
        assert "people" not in (await events(gateway, 1, "alice-secret"))[0]


@over_sockets
async def test_without_keys_only_this_machine_sees_what_was_used():
    async with gateway_for(fixed(1)) as gateway:
        await call(gateway, "POST", "/api/generate", generate(tokens=5))
        row, = (await call(gateway, "GET", "/api/usage")).json()["rows"]
        assert (row["key"], row["user"], row["requests"], row["output_tokens"]) == ("", "127.0.0.1", 1, 5)
        answer = await call(gateway, "GET", "/api/usage", X_Forwarded_For="10.0.0.1")
        assert answer.status == 403 and "only this machine" in answer.json()["error"]
        assert (await events(gateway, 1))[0]["people"]["most"][0]["name"] == "127.0.0.1"


@over_sockets
async def test_batch_of_texts_is_used_by_share_and_counts_once():
    nodes = [bench.SimNode(models=("nomic-embed-text",), loaded=("nomic-embed-text",), **FAST) for _ in range(2)]
    async with gateway_for(*nodes) as gateway:
        value = {"model": "nomic-embed-text", "input": [f"text {number} of many" for number in range(200)]}
        answer = (await call(gateway, "POST", "/api/embed", value)).json()
        told = (await call(gateway, "GET", "/api/usage?by=node")).json()
        assert len(told["rows"]) == 2 and all(row["prompt_tokens"] and row["slot_s"] for row in told["rows"])
        assert told["total"]["prompt_tokens"] == answer["prompt_eval_count"] and told["total"]["requests"] == 1


class Bill:
    """What the clients themselves have counted: {(key, user): [requests, prompt tokens, output tokens, failures]}."""

    def __init__(self):
        self.sums, self.ends_s = collections.defaultdict(lambda: [0, 0, 0, 0]), []

    def add(self, who, answer):
        """Add an answer."""
        last = json.loads(answer.body.splitlines()[-1])
        count = last.get("usage", {})
        self.sums[who] = [one + more for one, more in zip(self.sums[who], [
            1, last.get("prompt_eval_count", 0) or count.get("prompt_tokens", 0),
            last.get("eval_count", 0) or count.get("completion_tokens", 0),
            int(answer.status != 200 or "error" in last)], strict=True)]
        self.ends_s.append(asyncio.get_running_loop().time())


    def agrees(self, told):
        """Tell whether /api/usage says the same. What was estimated, of a stream that was cut, no client can count."""
        rows = {(row["key"], row["user"]): row for row in told["rows"]}
        assert rows.keys() == self.sums.keys() and not all(row["estimated"] for row in rows.values())
        for who, row in rows.items():
            requests, *tokens, failures = self.sums[who]
            assert (row["requests"], row["failures"]) == (requests, failures)
            counted = [row["prompt_tokens"], row["output_tokens"]]
            assert counted == tokens or row["estimated"] and all(map(operator.ge, counted, tokens))
        return True


def test_usage_is_what_clients_have_counted_over_kills_and_a_restart_and_a_sigkill_costs_under_a_minute(tmp_path):
    keys = "".join(f"k{number}-secret name=k{number} proxy=yes\n" for number in range(4))
    file = tmp_path / "s.usage.json"
    (tmp_path / "keys").write_text(keys + "root-secret name=root admin=yes\n")
    (tmp_path / "keys").chmod(0o600)
    flags = ["--keys", str(tmp_path / "keys"), "--state", str(tmp_path / "s.json")]
    rng, bill, copies = random.Random(7), Bill(), []
    people = [(f"k{number % 4}", f"user-{number}") for number in range(19)] + [("root", "")]

    async def ask(gateway, who, number):
        await asyncio.sleep(rng.uniform(0, 150))
        key, user = who
        fields = {**bearer(key), **({"X_OpenWebUI_User_Id": user} if user else {})}
        path, value = rng.choices([
            ("/api/generate", generate(tokens=rng.randint(5, 400), stream=rng.random() < 0.5)),
            ("/v1/chat/completions", {"model": "llama3.2", "messages": [
                {"role": "user", "content": f"{number} <out=60>"}]}),
            ("/api/embed", {"model": "llama3.2", "input": [f"text {n}" for n in range(rng.choice((1, 40)))]}),
            ("/api/generate", generate("no-such"))], (4, 2, 2, 1))[0]
        bill.add(who, await call(gateway, "POST", path, value, **fields))

    async def kill(nodes):
        while True:
            await asyncio.sleep(rng.uniform(1, 3))
            node = rng.choice(nodes)
            node.kill()
            await node.restart(1)

    async def watch():
        """Copy the file as a SIGKILL would leave it, now and then."""
        while True:
            await asyncio.sleep(rng.uniform(20, 40))
            copies.append((asyncio.get_running_loop().time(), file.read_bytes() if file.exists() else b""))

    def in_no_time(_, work, *given):
        """Do what a thread would do: virtual time does not wait for threads."""
        done = asyncio.get_running_loop().create_future()
        done.set_result(work(*given))
        return done

    async def main():
        asyncio.get_running_loop().run_in_executor = in_no_time
        for _ in range(2):
            nodes = [bench.SimNode(hardware, loaded=("llama3.2",)) for hardware in ("rtx4090", "rtx3060", "m2")]
            async with gateway_for(*nodes, flags=flags) as gateway:
                tasks = [asyncio.create_task(work) for work in (kill(nodes), watch())]
                await asyncio.gather(*(ask(gateway, people[number % 20], number) for number in range(500)))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                told = (await call(gateway, "GET", "/api/usage", **bearer("root"))).json()
                assert bill.agrees(told)
                assert sum(gateway.telemetry.metrics.failovers.values()) > 10
                assert sum(count["cut"] for count in gateway.telemetry.metrics.outcomes().values()) > 2
                by_node = (await call(gateway, "GET", "/api/usage?by=node", **bearer("root"))).json()
                assert by_node["total"] == told["total"] and len(by_node["rows"]) >= 3
                page = (await call(gateway, "GET", "/metrics", **bearer("root"))).body.decode()
                held_s = sum(map(float, re.findall(r"^sollol_slot_seconds_total{key=\"\w+\"} (.+)$", page, re.M)))
                assert 0 < held_s <= told["total"]["slot_s"] + 0.1
        assert told["total"]["failures"] > 20 and told["total"]["requests"] == 1000 and told["total"]["slot_s"] > 100

    bench.run_virtual(main())
    for at_s, text in copies:
        usage = sollol.Usage()
        if text:
            usage.load(text, sollol.local_day())
        kept = sum(numbers[0] for numbers in report(usage, "by=day", sollol.local_day()).values())
        assert kept >= sum(end_s < at_s - 60 for end_s in bill.ends_s if end_s < at_s)
    assert len(copies) > 5


# -----------------------------------------------------------------------------
# Metrics
# -----------------------------------------------------------------------------

def test_histogram_counts_up_to_each_bound():
    histogram = sollol.Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    assert list(histogram.samples('a="b"')) == [
        ("_bucket", 'a="b",le="1.0"', 2), ("_bucket", 'a="b",le="2.0"', 3), ("_bucket", 'a="b",le="+Inf"', 4),
        ("_sum", 'a="b"', 12.0), ("_count", 'a="b"', 4)]


@pytest.mark.parametrize("path, label", [("/api/chat", "/api/chat"), ("/v1/models/x", "/v1/models/"), ("/x/1", "other"),
                                         ("/api/blobs/sha256:1", "/api/blobs/"), ("/", "/")])
def test_paths_are_folded_into_the_table_of_routes(path, label):
    assert sollol.route_label(path) == label


def test_number_of_series_is_bounded_whatever_clients_make_up(monkeypatch):
    monkeypatch.setattr(sollol, "MOST_SERIES", 20)
    dispatcher = cluster(a=["m"])
    metrics = sollol.Metrics(dispatcher)
    record = sollol.Record("id", "::1", "POST", "/api/chat", 0.0, node="a", attempts=1, status=200, priority=5,
                           outcome="ok")
    for number in range(100):
        metrics.count_request(sollol.replace(record, model=f"made-up-{number}:latest", path=f"/made/up/{number}"), 1.0)
    assert list(metrics.requests) == [("a", "other", "other", 200, "ok")]
    dispatcher.cluster.holders = {f"real-{number}:latest": [] for number in range(100)}
    for model in dispatcher.cluster.holders:
        metrics.count_request(sollol.replace(record, model=model), 1.0)
    assert len(metrics.requests) <= 21 and sum(metrics.requests.values()) == 200


def scraped(text):
    """Return {(name, frozenset of labels): value} of a text that Prometheus' own parser has read."""
    parser = pytest.importorskip("prometheus_client.parser", reason="PyPI prometheus-client is not installed")
    families = list(parser.text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families) == text.count("# TYPE")
    return {(sample.name, frozenset(sample.labels.items())): sample.value for family in families
            for sample in family.samples}


@over_sockets
async def test_metrics_are_what_prometheus_reads_and_what_has_happened():
    text = b"HTTP/1.1 500 x\r\nContent-Length: 18\r\n\r\nmodel failed: load"
    broken = ScriptedNode(lambda request: [text, KEEP], ["broken:latest"])
    good = fixed(1)
    good.line += ' name=a"\\'
    async with gateway_for(good, broken) as gateway:
        for stream in (True, False):
            await call(gateway, "POST", "/api/generate", generate(tokens=5, stream=stream), X_Priority=8)
        for model in ("no-such", "broken"):
            await call(gateway, "POST", "/api/generate", generate(model))
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50))) for _ in range(4)]
        await until(lambda: health(gateway)["queued"])
        answer = await call(gateway, "GET", "/metrics")
        assert answer.fields["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        await asyncio.gather(*tasks)
        found, later = scraped(answer.body.decode()), scraped((await call(gateway, "GET", "/metrics")).body.decode())

        def value(name, seen=later, **labels):
            return seen[name, frozenset(labels.items())]

        name = 'a"\\'
        assert value("sollol_requests_total", node=name, model="llama3.2:latest", route="/api/generate",
                     code="200", outcome="ok") == 6
        assert value("sollol_requests_total", node=name, model="other", route="/api/generate", code="404",
                     outcome="error") == 1
        assert value("sollol_request_seconds_count") == 8 and value("sollol_ttft_seconds_count") >= 6
        assert value("sollol_queue_seconds_count", priority="8") == 2
        assert value("sollol_queue_depth", found, priority="5") >= 1
        assert value("sollol_inflight", found, node=name) == 1 and value("sollol_slots", node=name) == 1
        assert value("sollol_node_up", node=name) == 1
        assert value("sollol_tokens_total", node=name, model="llama3.2:latest", kind="output", key="") == 210
        assert value("sollol_slot_seconds_total", key="") > value("sollol_slot_seconds_total", found, key="") > 0
        assert value("sollol_failovers_total", node=f"127.0.0.1:{broken.port}", reason="model") == 1
        assert value("sollol_predicted_error_ratio_count") >= 6
        assert value("sollol_build_info", version=sollol.__version__) == 1


def steps_of(*numbers, failed=0):
    """Return Steps with these numbers, one answer of 1 s and 10 tokens in each."""
    steps = [sollol.Step(number) for number in numbers]
    for step in steps:
        step.add("a", 1.0, 0.5, 10)
        step.failed, step.queued = failed, step.number
    return steps


def test_history_of_a_day_is_made_of_the_steps_each_once():
    history, wall_s = sollol.History(), 1000 * sollol.PART_S
    history.turn([], 5.0, wall_s + 1.0)
    steps = steps_of(0, 1, 2, failed=1)
    history.turn(steps, 25.0, wall_s + 299.0)
    assert not history.parts                # the part still lasts
    history.turn(steps, 27.0, wall_s + 301.0)
    assert list(history.parts) == [sollol.DayPart(1000, 2, 2, 20, 1, 1.0)]      # step 2 is not over
    history.turn(steps_of(2, 3), 327.0, wall_s + 601.0)
    assert history.parts[-1] == sollol.DayPart(1001, 2, 0, 20, 3, 1.0)
    history.turn([], 900.0, wall_s + 1300.0)
    assert history.parts[-1] == sollol.DayPart(1002)     # nothing happened; 1003 was slept through
    seen = history.as_seen()
    assert seen["requests"][-5:] == (None, 2, 2, 0, None) and seen["p95_s"][-4:] == (1.0, 1.0, None, None)
    assert len(seen["queued"]) == sollol.PARTS_KEPT and seen["end_s"] == 1004 * sollol.PART_S


def test_history_is_bounded_and_outlives_a_restart_and_a_clock_that_is_set():
    history = sollol.History()
    for number in range(2000):
        history.add(sollol.DayPart(number, number, 0, 0, 0, 0.25))
    kept = history.kept()
    assert len(kept) == sollol.PARTS_KEPT and sum(map(len, kept)) < 16 * 1024
    again = sollol.History()
    again.recall(kept)
    assert again.parts == history.parts
    again.add(sollol.DayPart(1999, 5, 1, 7, 3, 2.0))     # the rest of what the restart has cut in two
    assert again.parts[-1] == sollol.DayPart(1999, 2004, 1, 7, 3, 2.0) and len(again.parts) == sollol.PARTS_KEPT
    again.add(sollol.DayPart(1990, 1))       # the clock was set back
    assert [part.number for part in again.parts][-2:] == [1989, 1990]


@pytest.mark.parametrize("entries", [
    None, {}, "x", [1, None, {}, "", "{", "[]", "[1]", "[1,2,3,4,5,6,7]", '["1",0,0,0,0,0]', "[-1,0,0,0,0,0]",
                    "[1e400,0,0,0,0,0]", "[true,0,0,0,0,0]"]])
def test_history_that_is_none_is_left_out(entries):
    history = sollol.History()
    history.recall(entries)
    assert not history.parts
    history.recall(["[5,1,0,2,3,NaN]", "[4,1,0,2,3,1]", "[6,1,0,2,3,0.5]"])
    assert list(history.parts) == [sollol.DayPart(5, 1, 0, 2, 3), sollol.DayPart(6, 1, 0, 2, 3, 0.5)]


@in_virtual_time
async def test_history_of_the_day_is_in_the_state_file_and_back_after_a_restart(tmp_path, monkeypatch):
    loop, state = asyncio.get_running_loop(), tmp_path / "state.json"
    monkeypatch.setattr(sollol, "wall_clock_s", lambda: 1.7e9 + loop.time())
    node = fixed(1, **FAST)
    async with gateway_for(node, flags=["--state", str(state)]) as gateway:
        for _ in range(3):
            await call(gateway, "POST", "/api/generate", generate(tokens=20))
        await asyncio.sleep(sollol.PART_S + 60.0)
        assert [part.requests for part in gateway.telemetry.history.parts] == [3]
        assert json.loads(json.loads(state.read_text())["history"][0])[1] == 3
        await call(gateway, "POST", "/api/generate", generate(tokens=20))
        assert (await events(gateway, 1, name="day"))[0]["requests"][-1] == 3
    async with gateway_for(bench.SimNode(**FAST), flags=["--state", str(state)]) as gateway:
        assert [part.requests for part in gateway.telemetry.history.parts] == [3, 1]    # also what was under way


@over_sockets
async def test_last_failures_are_kept_with_their_reasons_and_the_same_one_is_counted():
    node = bench.SimNode(**FAST)
    node.line = "name=a"
    async with gateway_for(node) as gateway:
        node.fail(500, text="CUDA error: out of memory")
        for _ in range(3):
            await call(gateway, "POST", "/api/generate", generate())
        node.fail(500, text="x" * 5000)
        await call(gateway, "POST", "/api/generate", generate())
        seen = (await events(gateway, 1))[0]
        assert [(row["node"], row["model"], row["status"], row["times"]) for row in seen["failures"]] == [
            ("a", "llama3.2:latest", 500, 1), ("a", "llama3.2:latest", 500, 3)]
        assert "out of memory" in seen["failures"][1]["text"] and seen["failures"][1]["client"] == "127.0.0.1"
        assert len(seen["failures"][0]["text"]) <= sollol.FAILURE_CHARS
        row, = seen["models"]["rows"]
        assert seen["nodes"][0]["errors"] == row["failures"] == 4 and seen["failed"] == 4
        for number in range(2 * sollol.FAILURES_KEPT):
            spec = sollol.RequestSpec(sollol.Family.OLLAMA, f"made-up-{number}")
            gateway.telemetry.note_failure("a", spec, sollol.Failure("model", f"reason {number}"), None)
        assert len(gateway.telemetry.failures) == sollol.FAILURES_KEPT
        assert not any("made-up" in model for step in gateway.telemetry.metrics.steps for model in step.bad_models)


@pytest.mark.parametrize("outcome, status, counts", [
    ("ok", 200, False), ("cut", 200, True), ("error", 200, True), ("error", 502, True), ("error", 400, False),
    ("error", 404, False), ("refused", 429, False), ("refused", 503, True), ("client_left", 499, False)])
def test_only_what_a_client_did_not_get_counts_as_failed(outcome, status, counts):
    metrics = sollol.Metrics(cluster(a=["m"]))
    record = sollol.Record("r", "c", "POST", "/api/chat", 0.0, node="a", attempts=1, status=status, outcome=outcome)
    metrics.count_request(record, 1.0)
    assert sum(step.failed for step in metrics.steps) == counts
    assert sum(step.cuts["a"] for step in metrics.steps) == (outcome == "cut")


# -----------------------------------------------------------------------------
# Headline
# -----------------------------------------------------------------------------

Health, Wait, Level = sollol.NodeHealth, sollol.Wait, sollol.Level
WELL = [Health(name, busy=1, slots=4) for name in "abcde"]
FULL = [Health("a", busy=4, slots=4)]
DEAD = Health("dead-box", "unreachable", "no connection", 245.0)
OOM = Health("oom-box", "failing", "answered 500: CUDA error: out of memory", 30.0, 0, 2)


@pytest.mark.parametrize("now, level, text", [
    ({"nodes": WELL}, 0, "All is well: 5 nodes up, 5 requests running, none waiting."),
    ({"nodes": [*WELL, Health("attic", "asleep")]}, 0,
     "All is well: 5 nodes up, 1 asleep, 5 requests running, none waiting."),
    ({}, 2, "No node: put its URL into the hosts file and save it."),
    ({"nodes": [*WELL[:2], DEAD, Health("rtx4090", "draining"), OOM]}, 2,
     "3 of 5 nodes cannot serve: dead-box unreachable for 4 min, oom-box fails every request: CUDA error: out of "
     "memory, rtx4090 draining."),
    ({"nodes": [DEAD._replace(draining=True)]}, 2,
     "The only node cannot serve: dead-box unreachable for 4 min, draining."),
    ({"nodes": [DEAD, OOM]}, 2,
     "None of 2 nodes can serve: dead-box unreachable for 4 min, oom-box fails every request: CUDA error: out of "
     "memory."),
    ({"nodes": [*WELL, *(DEAD._replace(name=f"n{number}") for number in range(6))]}, 2,
     "6 of 11 nodes cannot serve: n0 unreachable for 4 min, n1 unreachable for 4 min, n2 unreachable for 4 min, "
     "n3 unreachable for 4 min and 2 more."),
    ({"nodes": [*WELL, Health("d", "draining", busy=2)]}, 1, "1 of 6 nodes cannot serve: d draining, 2 left."),
    ({"nodes": [*WELL, Health("d", "waking", for_s=12)]}, 1, "1 of 6 nodes cannot serve: d waking for 12 s."),
    ({"nodes": [*WELL, Health("s", "silent", for_s=41)]}, 1, "s silent for 41 s."),
    ({"nodes": [Health("f", failing=("m:latest", "q:7b"), why="answered 500: no")]}, 1, "f fails m, q:7b: no."),
    ({"nodes": WELL, "waits": [Wait("m:latest", 12, 3.0)]}, 2, "12 requests wait for m, which no node can serve."),
    ({"nodes": WELL, "waits": [Wait("m:latest", 1, 9.0, ("a", "b"), ("b",))]}, 0,
     "All is well: 5 nodes up, 5 requests running, 1 waiting."),
    ({"nodes": WELL, "waits": [Wait("m:latest", 1, 12.0, ("a", "b"), ("b",))]}, 1,
     "1 request waits for m while b, which has it, does nothing."),
    ({"nodes": WELL, "waits": [Wait("m:latest", 9, 31.0, ("a",), (), ("b", "c"))]}, 1,
     "9 requests wait for m, which only a can serve; b, c idle. 9 requests wait, the oldest for 31 s."),
    ({"nodes": FULL, "waits": [Wait("m:latest", 300, 121.0, ("a",))], "last_start_s": 150.0}, 1,
     "All slots are busy; 300 requests wait, the oldest for 2 min, the last one is predicted to start in 2 min."),
    ({"nodes": FULL, "waits": [Wait("m:latest", 300, 31.0, ("a",))], "last_start_s": 500.0}, 2,
     "All slots are busy; 300 requests wait, the oldest for 31 s, the last one is predicted to start in 8 min; "
     "after 4 min they get 503."),
    ({"nodes": FULL, "waits": [Wait("m:latest", 300, 3.0, ("a",))], "last_start_s": 90.0}, 1,
     "All slots are busy; 300 requests wait, the oldest for 3 s, the last one is predicted to start in 90 s."),
    ({"nodes": FULL, "waits": [Wait("m:latest", 300, 3.0, ("a",))], "last_start_s": 59.0}, 0,
     "All is well: 1 node up, 4 requests running, 300 waiting."),
    ({"nodes": WELL, "answered": 90, "failed": 9}, 0, "All is well: 5 nodes up, 5 requests running, none waiting."),
    ({"nodes": WELL, "answered": 80, "failed": 20}, 1, "20 % of the last minute's requests have failed."),
    ({"nodes": WELL, "answered": 2, "failed": 3}, 2, "60 % of the last minute's requests have failed."),
    ({"nodes": WELL, "answered": 0, "failed": 4}, 0, "All is well: 5 nodes up, 5 requests running, none waiting."),
    ({"nodes": WELL, "lone": ("a", "b", "c")}, 1,
     "a does nearly all the work: b, c, as fast and able, did nothing for a minute."),
    ({"nodes": WELL, "leaving": True}, 1, "Shutting down: 5 requests running, none waiting."),
    ({"nodes": [DEAD], "leaving": True, "refusing": True}, 1,
     "Shutting down: 0 requests running, none waiting. New requests are refused."),
    ({"nodes": [*WELL, DEAD], "answered": 1, "failed": 9, "waits": [Wait("m:latest", 2, 50.0, ("a",))]}, 2,
     "1 of 6 nodes cannot serve: dead-box unreachable for 4 min. 90 % of the last minute's requests have failed. "
     "2 requests wait, the oldest for 50 s."),
])
def test_headline_says_in_words_what_is_wrong_the_worst_first(now, level, text):
    headline = sollol.headline_of(sollol.Situation(**now))
    assert (headline.level, headline.text) == (level, text)


def test_headline_names_the_numbers_that_are_bad_and_is_the_same_as_long_as_the_trouble_is():
    now = sollol.Situation([*WELL, DEAD], [Wait("m:latest", 2, 50.0, ("a",))])
    headline = sollol.headline_of(now)
    assert headline.about == {"nodes": Level.BAD, "queue": Level.WARN, "failures": Level.OK}
    assert headline.short == "1 of 6 nodes cannot serve"
    later = now._replace(nodes=[*WELL, DEAD._replace(for_s=900.0)], waits=[Wait("m:latest", 7, 80.0, ("a",))])
    assert sollol.headline_of(later).key == headline.key and sollol.headline_of(later).text != headline.text
    assert sollol.headline_of(now._replace(nodes=[*WELL[1:], DEAD, OOM])).key != headline.key


def test_headline_tells_only_the_beginning_of_what_a_node_said():
    text = sollol.headline_of(sollol.Situation([OOM._replace(why="no\u2028way " * 2000)])).text
    assert len(text) < 200 and "\n" not in text


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (99.4, "99 s"), (100.0, "2 min"), (7100.0, "118 min"),
                                           (7200.0, "2 h"), (90000.0, "25 h"), (172800.0, "2 days")])
def test_times_for_people(seconds, text):
    assert sollol.for_people(seconds) == text


@over_sockets
async def test_metrics_tell_who_waits_and_where_models_are():
    one, two = fixed(1), bench.SimNode(models=("mistral",))
    one.line, two.line = one.line + " name=one", "name=two"
    async with gateway_for(one, two) as gateway:
        async def shown():
            """Return {(name, value of its label or labels): value} of what is no counter."""
            text = (await call(gateway, "GET", "/metrics")).body.decode()
            return {(name, *(value for _, value in sorted(labels))): value
                    for (name, labels), value in scraped(text).items()}

        quiet = await shown()
        assert quiet["sollol_queue_oldest_seconds",] == 0 and quiet["sollol_node_wanted", "one"] == 0
        assert quiet["sollol_model_nodes", "llama3.2:latest"] == 1 and quiet["sollol_node_asleep", "one"] == 0
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50))) for _ in range(3)]
        await until(lambda: health(gateway)["queued"] == 2)
        await asyncio.sleep(0.05)
        busy = await shown()
        assert busy["sollol_node_wanted", "one"] == 2 and busy["sollol_node_wanted", "two"] == 0
        assert busy["sollol_queue_oldest_seconds",] >= 0.05
        assert [key[1:] for key in busy if key[0] == "sollol_model_resident"] == [("llama3.2:latest", "one")]
        await asyncio.gather(*tasks)
        gateway.dispatcher.drain(gateway.dispatcher.cluster.nodes["one"], True)
        assert (await shown())["sollol_model_nodes", "llama3.2:latest"] == 0


# -----------------------------------------------------------------------------
# Dashboard
# -----------------------------------------------------------------------------

async def events(gateway, count, key="", name=""):
    """Return the first events of a name that a dashboard gets, maybe with a key."""
    caller, found = await Caller.to(gateway), []
    try:
        caller.writer.write(f"GET /dashboard/events HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {key}\r\n\r\n".encode())
        head = await caller.head()
        assert b" 200 " in head and b"text/event-stream" in head
        kind = ""
        while len(found) < count and (line := await caller.reader.readline()):
            if line.startswith(b"event: "):
                kind = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                found += [json.loads(line[6:])] if kind == name else []
                kind = ""
    finally:
        caller.close()
    return found


@over_sockets
async def test_dashboard_is_told_every_second_what_goes_on():
    async with gateway_for(fixed(1)) as gateway:
        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50, stream=True),
                                                  X_Request_Id=f"mine-{number}", X_Priority=number + 4)))
            await until(lambda: health(gateway)["inflight"] + health(gateway)["queued"] == len(tasks))
        seen = await events(gateway, 1)
        node, = seen[0]["nodes"]
        assert [row["id"] for row in (*node["running"], *seen[0]["queue"])] == ["mine-0", "mine-2", "mine-1"]
        assert node["models"]["llama3.2:latest"]["slots"] == 1 and seen[0]["decisions"][0]["id"] == "mine-0"
        await asyncio.gather(*tasks)
        started_s = asyncio.get_running_loop().time()
        first, second = await events(gateway, 2)
        assert 0.9 < asyncio.get_running_loop().time() - started_s < 1.5
        assert first["per_min"] == 3 and first["nodes"][0]["tok_s"] == 2.5 and not first["nodes"][0]["running"]
        shown = [value for value in first["past"]["total_p95_s"] if value]
        assert shown and first["past"]["first_p50_s"][-1] is not None or len(shown) > 1
        assert second["queued"] == 0


@over_sockets
async def test_prompt_that_is_too_long_for_a_node_is_no_failure_of_it():
    async with gateway_for(bench.SimNode(**FAST)) as gateway:
        spec = want("llama3.2")
        for kind in sollol.DIFFERENCES:
            gateway.telemetry.note_failure("a", spec, sollol.Failure(kind, "no"), 400)
        assert not gateway.telemetry.failures and not any(step.errors for step in gateway.telemetry.metrics.steps)


def test_forecast_of_the_queue_is_reckoned_seldom_and_counts_down_meanwhile():
    dispatcher = cluster(a=["m"])
    first, second = enter(dispatcher, want(), want())
    forecast = sollol.QueueForecast()
    forecast.look(dispatcher, 1.0)
    left_s = forecast.left_s(second, 1.0)
    assert forecast.left_s(first, 1.0) == 0.0 and left_s > 0.5 and forecast.again_s > 1.0
    forecast.again_s = 4.0
    later, = enter(dispatcher, want(), now=2.0)
    forecast.look(dispatcher, 3.9)
    assert forecast.left_s(later, 3.9) is None and forecast.left_s(second, 1.25) == pytest.approx(left_s - 0.25)
    assert forecast.left_s(second, 1000.0) == 0.0
    forecast.look(dispatcher, 4.0)
    assert forecast.left_s(later, 4.0) > forecast.left_s(second, 4.0) > 0.0


def tripped(breaker, now=0.0):
    """Let a breaker open."""
    for _ in range(breaker.threshold):
        breaker.fail(now)


def trouble_of(node, now=1.0):
    failing = [runner.model for runner in node.runners.values() if runner.breaker.state(now) != "closed"]
    return sollol.trouble_with(node, sollol.each_runner(node), failing, now)


def test_kinds_of_trouble_with_a_node():
    dispatcher = cluster(a=["m", "n"])
    node = dispatcher.cluster.nodes["a"]
    assert trouble_of(node) == ""
    node.runners["m:latest"].used_s = node.runners["n:latest"].used_s = 0.5
    tripped(node.runners["m:latest"].breaker)
    assert trouble_of(node) == ""       # another model works there
    tripped(node.runners["n:latest"].breaker)
    assert trouble_of(node) == trouble_of(node, 1000.0) == "failing"    # also when nobody has asked for long
    node.draining = True
    assert trouble_of(node) == "failing"
    for runner in node.runners.values():
        runner.breaker.succeed()
    assert trouble_of(node) == "draining"
    node.draining = False
    node.doubt(1.0)
    assert trouble_of(node) == "silent"
    tripped(node.breaker)
    assert trouble_of(node) == "failing"
    node.lost(1.0)
    assert trouble_of(node) == "unreachable"
    node.settings = node.settings._replace(mac="aabbccddeeff")
    assert trouble_of(node) == "asleep"
    node.sleep.call(1.0)
    assert trouble_of(node) == "waking"
    node.probed = False
    assert trouble_of(node) == "new"


def waits(dispatcher, now, seen=sollol.EVERY_MODEL):
    return sollol.waits_of(dispatcher, now, seen)


def test_waits_tell_who_could_serve_and_does_nothing():
    dispatcher = cluster(a=["m"], b=["m"], slow=["m"], other=["n"])
    enter(dispatcher, *(want("m:latest") for _ in range(5)))
    a, b, slow = (runner(dispatcher, name) for name in ("a", "b", "slow"))
    for known, decode_s in ((a, 0.02), (b, 0.025), (slow, 0.4)):
        known.speeds.decode_s, known.speeds.samples = decode_s, 9
    sollol.give_lease(dispatcher.waiting.in_order()[0], a.node, None, 0.0, "")
    assert waits(dispatcher, 12.0) == [Wait("m:latest", 5, 12.0, ("a", "b", "slow"), ("a", "b", "slow"), ())]
    lease = sollol.give_lease(dispatcher.waiting.in_order()[0], a.node, a, 0.0, "")
    assert waits(dispatcher, 12.0) == [Wait("m:latest", 5, 12.0, ("a", "b", "slow"), ("b",), ())]   # slow is no match
    b.node.drain(True, 0)
    assert waits(dispatcher, 12.0) == [Wait("m:latest", 5, 12.0, ("a", "slow"), (), ("other",))]
    for name in ("a", "slow"):
        dispatcher.cluster.nodes[name].lost(1.0)
    assert waits(dispatcher, 12.0) == [Wait("m:latest", 5, 12.0, (), (), ("other",))]
    assert waits(dispatcher, 12.0, sollol.parse_models("n")) == [] and lease.node is a.node


@pytest.mark.parametrize("answers, slow, lone", [
    ({"a": 30}, (), ("a", "b", "c")), ({"a": 30, "b": 3}, (), ("a", "c")), ({"a": 30, "b": 4}, (), ()),
    ({"a": 19}, (), ()), ({"a": 30}, ("b", "c"), ()), ({"gone": 30}, (), ()), ({}, (), ())])
def test_node_that_does_all_the_work_is_named_only_beside_others_that_could(answers, slow, lone):
    dispatcher = cluster(a=["m"], b=["m"], c=["m"], d=["n"])
    for name in "abc":
        runner(dispatcher, name).speeds.decode_s = 0.2 if name in slow else 0.02
    enter(dispatcher, want("m:latest"))
    assert sollol.lone_worker(dispatcher.cluster, answers, 1.0) == ()     # it has a free slot
    ticket, = dispatcher.waiting.tickets
    dispatcher.waiting.discard(ticket)
    sollol.give_lease(ticket, runner(dispatcher, "a").node, runner(dispatcher, "a"), 0.0, "")
    assert sollol.lone_worker(dispatcher.cluster, answers, 1.0) == lone


@over_sockets
async def test_dashboard_says_what_is_wrong_and_nothing_of_the_speed_of_a_dead_node():
    dead, failing, well = (fixed(1, **FAST) for _ in range(3))
    for node, name in ((dead, "dead-box"), (failing, "oom-box"), (well, "well")):
        node.line += f" name={name} token=hush"
    async with gateway_for(dead, failing, well) as gateway:
        for _ in range(9):
            await call(gateway, "POST", "/api/generate", generate(tokens=20))
        failing.fail(500, text="CUDA error: out of memory")
        dead.kill()
        await gateway.node_io.probe(gateway.dispatcher.cluster.nodes["dead-box"])
        for _ in range(4):
            await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(tokens=200)) for _ in range(6)))
        seen = (await events(gateway, 1))[0]
        assert seen["headline"]["level"] == 2 and seen["headline"]["about"]["nodes"] == 2
        assert re.match(r"2 of 3 nodes cannot serve: dead-box unreachable for \d s, oom-box fails every request: "
                        r"CUDA error: out of memory", seen["headline"]["text"]), seen["headline"]
        rows = {row["name"]: row for row in seen["nodes"]}
        assert rows["dead-box"]["kind"] == "unreachable" and "no connection" in rows["dead-box"]["why"]
        assert [rows["dead-box"][name] for name in ("tok_s", "decode_tok_s", "speed", "answer_s")] == [None] * 4
        assert rows["well"]["decode_tok_s"] > 0 and rows["well"]["version"] and rows["well"]["url"] == well.url
        assert rows["oom-box"]["errors"] >= 2 and "hush" not in json.dumps(seen)
        assert (await call(gateway, "GET", "/api/stats")).json()["headline"] == seen["headline"]


@over_sockets
async def test_dashboard_shows_the_shutting_down_until_what_runs_has_ended():
    node = fixed(1, speed=5)
    async with gateway_for(node) as gateway:
        task = asyncio.create_task(events(gateway, 100))
        asking = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=2000)))
        await until(lambda: health(gateway)["inflight"] == 1)
        gateway.drain()
        assert (await asking).status == 200
        await asyncio.wait_for(gateway.stopped.wait(), 3)
        told = [seen["headline"]["text"] for seen in await task if seen["draining"]]
        assert told[0] == "Shutting down: 1 request running, none waiting. New requests are refused."
        assert told[-1].startswith("Shutting down: 0 requests running") and len(told) >= 2


@over_sockets
async def test_open_dashboard_does_not_hold_up_the_end():
    async with gateway_for(fixed(1)) as gateway:
        task = asyncio.create_task(events(gateway, 100))
        await until(lambda: len(gateway.listener.clients) == 1)
        await asyncio.sleep(1.5)
        gateway.drain()
        await asyncio.wait_for(gateway.stopped.wait(), 3)
        assert [told["draining"] for told in await task] == [False, False, True]


def test_lines_of_the_dashboard_have_gaps_where_nothing_finished():
    metrics = sollol.Metrics(cluster(a=["m"]))
    for now, took_s in ((5.0, 1.0), (6.0, 3.0), (27.0, 2.0)):
        metrics.step(now).add("a", took_s, None, 10)
    shown = sollol.past(metrics.steps, 31.0)
    assert len(shown["total_p50_s"]) == sollol.STEPS_KEPT
    assert shown["total_p50_s"][-4:] == (1.0, None, 2.0, None) and shown["total_p95_s"][-4:] == (3.0, None, 2.0, None)
    assert not any(shown["first_p50_s"]) and shown["requests"][-4:] == [2, 0, 1, 0]
    last = metrics.step(30.0)
    assert metrics.step(29.99) is last      # what is counted a moment late


def test_page_needs_nothing_from_elsewhere():
    assert not re.search(r"(src|href|url|import)\s*[=(:]?\s*[\"'(]?(https?:)?//", sollol.PAGE)
    assert len(sollol.PAGE.encode()) < 60 * 1024
    assert "innerHTML" not in sollol.PAGE and "insertAdjacentHTML" not in sollol.PAGE   # data is never read as HTML


@over_sockets
async def test_page_carries_its_state_and_nothing_in_it_ends_its_script():
    node = fixed(1)
    node.line += " name=</script><b>"
    async with gateway_for(node) as gateway:
        answer = await call(gateway, "GET", "/dashboard")
        assert answer.fields["content-type"].startswith("text/html") and "sha256-" in answer.fields[
            "content-security-policy"]
        text = re.search(r'id="first-state">(.*?)</script>', answer.body.decode(), re.S)[1]
        assert json.loads(text)["nodes"][0]["name"] == "</script><b>"


class Browser:
    """A headless Chromium with one page, spoken to over a pipe by its DevTools protocol."""

    FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--remote-debugging-pipe"]

    def __init__(self, program, folder):
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (*os.pipe(), *os.pipe())]
        self.process = subprocess.Popen(
            [program, *self.FLAGS, f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[3], 4)))
        os.close(ends[0])
        os.close(ends[3])
        self.inbox, self.outbox = os.fdopen(ends[2], "rb", buffering=0), ends[1]
        self.number, self.rest, self.session = 0, b"", {}

    def ask(self, method, **values):
        """Return the result of a command."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": values, **self.session}
        os.write(self.outbox, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.inbox], [], [], 20.0)[0], f"no answer to {method}"
                piece = self.inbox.read(65536)
                assert piece, "the browser has ended"
                self.rest += piece
            message, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(message)
            if message.get("id") == self.number:
                assert "result" in message, message
                return message["result"]

    def open(self, url, width=1600, height=900):
        """Show a page."""
        self.session = {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=url)

    def value(self, script):
        """Return the value of a JavaScript expression in the page."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script, patience_s=10.0):
        """Wait until an expression is true; return its value."""
        deadline_s = time.monotonic() + patience_s
        while not (value := self.value(script)):
            assert time.monotonic() < deadline_s, (script, self.value("document.body.innerText"))
            time.sleep(0.05)
        return value

    def close(self):
        self.process.kill()
        self.process.wait()
        self.inbox.close()
        os.close(self.outbox)


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium is installed")
    browser = Browser(program, tmp_path / "profile")
    yield browser
    browser.close()


TEXT = "document.getElementById('{}').innerText"
ROWS = "[...document.querySelectorAll('#{} tbody tr')].map((row) => row.innerText.replace(/\\s+/g, ' '))"
CARDS = "[...document.querySelectorAll('#nodes .node')].map((card) => card.innerText.replace(/\\s+/g, ' '))"


def ask_later(url, **fields):
    """Ask for a long answer in the background; return the process."""
    lines = [word for name, value in fields.items() for word in ("-H", f"{name.replace('_', '-')}: {value}")]
    return subprocess.Popen(["curl", "-s", f"{url}/api/generate", *lines, "-d", json.dumps(generate(tokens=2000))],
                            stdout=subprocess.DEVNULL)


def test_browser_shows_nodes_queue_and_decisions_and_finds_a_restarted_gateway(browser):
    with program("bench.py", "--nodes", 3, "--port", 0) as nodes, contextlib.ExitStack() as asking:
        flags = ["--port", bench.free_port(), "--no-calibrate"]
        for name in "abc":
            flags += ["--node", f"{read_until(nodes, 'http://[^ ]+')[0]} name={name} slots=1"]
        with program("sollol.py", *flags) as gateway:
            url = read_until(gateway, r"event=start .*url=(\S+)")[1]
            browser.open(f"{url}/dashboard")
            browser.wait(CARDS + ".length === 3")
            rows = browser.value(CARDS)
            assert [re.search(r"[abc]\b", row)[0] for row in rows] == list("abc")
            assert all(" up, " in row for row in rows)
            assert "Nobody waits." in browser.value(TEXT.format("queue"))
            assert browser.value(TEXT.format("sentence")).startswith("All is well: 3 nodes up")
            for number in range(5):
                asking.callback(ask_later(url, X_Request_Id=f"mine-{number}", X_Priority=3 + number).kill)
                time.sleep(0.1)
            queue = browser.wait(f"(({ROWS.format('queue')}).length === 2) && {ROWS.format('queue')}")
            assert re.match(r"1 7 llama3.2 127.0.0.1 .+ mine-4", queue[0]), queue
            assert re.match(r"2 6 llama3.2 127.0.0.1 .+ mine-3", queue[1]), queue
            busy = browser.wait("(it => it.length === 3 && it.map(one => one.innerText).join())("
                                "[...document.querySelectorAll('#nodes .slots li:not(.free)')])")
            assert busy.count("127.0.0.1") == busy.count("llama3.2") == 3
            decisions = browser.value("[...document.querySelectorAll('#decisions tbody tr')].map(it => it.textContent)")
            assert len(decisions) == 3 and all("→" in row for row in decisions) and "llama3.2" in decisions[0]
            press(browser, "c", "Drain")
            assert "Drain c?" in browser.value(TEXT.format("asked"))
            assert "draining" not in browser.value(f"{CARDS}.join()")
            browser.value("document.getElementById('yes').click()")
            browser.wait(f"{CARDS}[0].includes('draining') && !document.getElementById('ask').open")      # sorted first
            browser.wait("document.title.includes('1 of 3 nodes cannot serve')")
            assert "c draining" in browser.value(TEXT.format("sentence"))
            assert "image/svg" in browser.value("document.getElementById('icon').href")
            press(browser, "c", "Load a model")
            model = browser.wait("document.getElementById('model').value")
            browser.value("document.getElementById('yes').click()")
            browser.wait(f"{CARDS}.find(it => it.includes('draining')).includes({model.split(':')[0]!r})")
            for width in (390, 1600):
                browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                            mobile=False)
                assert browser.wait("document.documentElement.scrollWidth <= innerWidth")
        browser.wait("document.body.classList.contains('lost')")
        assert "Connection lost" in browser.value(TEXT.format("sentence"))
        with program("sollol.py", *flags) as gateway:
            read_until(gateway, r"event=start")
            browser.wait("!document.body.classList.contains('lost')")
            browser.wait(f"{CARDS}.length === 3 && !{TEXT.format('nodes')}.includes('draining')")
            assert browser.value("document.querySelectorAll('th[scope=col]').length") >= 3
            assert not browser.value("document.querySelectorAll('script[src], link[href^=http], img').length")


def press(browser, node, text):
    """Unfold a node's card and press a button there."""
    browser.wait(f"""(() => {{
        const cards = [...document.querySelectorAll('#nodes .node')];
        const card = cards.find(it => it.querySelector('h3').innerText === '{node}');
        card.querySelector('details').open = true;
        const button = [...card.querySelectorAll('button')].find(it => it.innerText === '{text}');
        if (button) button.click();
        return !!button; }})()""")


# An hour of updates: nodes change their order and their state, requests come and go, models turn up.
SOME_MINUTES = """(() => {
  const first = JSON.parse(document.getElementById('first-state').textContent), node = first.nodes[0];
  for (let n = BEGIN; n < BEGIN + 200; n++) {
    const kinds = ['', 'failing', 'draining', '', 'unreachable'];
    const nodes = Array.from({length: 12}, (_, k) => ({...node, name: `node-${k}`, kind: kinds[(n + k) % 5],
      slots: 4, busy: n % 4, models: {[`model-${n % 300}`]: {slots: 2, known: 'learned'}},
      running: Array.from({length: (n + k) % 5}, (_, i) => ({client: `person-${n}`, model: `m${i}`, since_s: n,
        began: true, slot: true, priority: 5}))}));
    const queue = Array.from({length: n % 50}, (_, k) => ({id: `r${n}-${k}`, model: `m${k}`, priority: 5, client: 'c',
      position: k + 1, waited_s: n, predicted_start_s: k}));
    take({...first, nodes, queue, queued: queue.length, headline: {...first.headline, level: n % 3, key: `${n}`}});
  }
  return document.querySelectorAll('*').length; })()"""


def test_browser_holds_its_memory_over_an_hour_of_updates_and_keeps_the_focus(browser):
    with program("sollol.py", "--port", "0", "--node", "http://127.0.0.1:9 name=a") as gateway:
        browser.open(read_until(gateway, r"event=start .*url=(\S+)")[1] + "/dashboard")
        browser.wait(CARDS + ".length === 1")

        def held():
            browser.ask("HeapProfiler.collectGarbage")
            metrics = {row["name"]: row["value"] for row in browser.ask("Performance.getMetrics")["metrics"]}
            return metrics["JSHeapUsedSize"], metrics["Nodes"]

        browser.ask("Performance.enable")
        browser.value("document.querySelector('#nodes summary').focus()")
        elements, heaps, nodes = [], [], []
        for second in range(0, 3600, 200):
            elements.append(browser.value(SOME_MINUTES.replace("BEGIN", str(second))))
            heap, node_count = held()
            heaps.append(heap)
            nodes.append(node_count)
        assert max(elements) < 3000 and max(nodes[9:]) < 1.2 * max(nodes[:9])
        assert max(heaps[9:]) < 1.2 * max(heaps[:9]), heaps
        browser.value("document.querySelector('#nodes .node:last-child summary').focus()")
        name = browser.value("document.activeElement.querySelector('h3').innerText")
        browser.value("at('sort').value = 'busy', take({...state, nodes: state.nodes.slice().reverse()})")
        assert browser.value("document.activeElement.querySelector('h3').innerText") == name


# -----------------------------------------------------------------------------
# The README's table of routes, path by path
# -----------------------------------------------------------------------------

MISTRAL = {"model": "mistral", "stream": False, "max_tokens": 3, "prompt": "hi <out=3>", "messages": MESSAGES,
           "input": "hi <out=3>"}
NOMIC = {"model": "nomic-embed-text", "input": "hi", "prompt": "hi"}
BLOB = f"/api/blobs/sha256:{hashlib.sha256(b'weights').hexdigest()}"

# Method and path: what is asked, the status, what is in the answer, and which node or nodes give it; None: none does.
SURFACE = {
    ("GET", "/"): ("/", None, 200, "Ollama is running", None),
    ("HEAD", "/"): ("/", None, 200, "", None),
    ("GET", "/api/health"): ("/api/health", None, 200, '"up":3', None),
    ("HEAD", "/api/health"): ("/api/health", None, 200, "", None),
    ("GET", "/api/stats"): ("/api/stats", None, 200, '"nodes":', None),
    ("HEAD", "/api/stats"): ("/api/stats", None, 200, "", None),
    ("GET", "/api/queue"): ("/api/queue", None, 200, '{"queue":[]}', None),
    ("HEAD", "/api/queue"): ("/api/queue", None, 200, "", None),
    ("GET", "/api/usage"): ("/api/usage?by=model", None, 200, '"by":["model"] "total":{"requests":', None),
    ("HEAD", "/api/usage"): ("/api/usage?format=csv", None, 200, "", None),
    ("POST", "/api/nodes/"): ("/api/nodes/b/drain", None, 200, '"name":"b" "state":"draining"', None),
    ("GET", "/dashboard"): ("/dashboard", None, 200, "<title>SOLLOL</title> first-state", None),
    ("HEAD", "/dashboard"): ("/dashboard", None, 200, "", None),
    ("GET", "/metrics"): ("/metrics", None, 200, 'sollol_node_up{node="a"} sollol_build_info{version=', None),
    ("HEAD", "/metrics"): ("/metrics", None, 200, "", None),
    ("GET", "/api/version"): ("/api/version", None, 200, '"0.9.1"', None),
    ("HEAD", "/api/version"): ("/api/version", None, 200, "", None),
    ("GET", "/api/tags"): ("/api/tags", None, 200, "qwen3:14b mistral:latest nomic-embed-text:latest", None),
    ("HEAD", "/api/tags"): ("/api/tags", None, 200, "", None),
    ("GET", "/api/ps"): ("/api/ps", None, 200, "mistral:latest", None),
    ("GET", "/api/status"): ("/api/status", None, 200, '"disabled":false', None),
    ("GET", "/v1/models"): ("/v1/models", None, 200, "qwen3:14b mistral:latest nomic-embed-text:latest", None),
    ("POST", "/api/generate"): ("/api/generate", MISTRAL, 200, '"done_reason":"stop"', "b"),
    ("POST", "/api/chat"): ("/api/chat", MISTRAL, 200, '"done_reason":"stop"', "b"),
    ("POST", "/api/embed"): ("/api/embed", NOMIC, 200, '"embeddings":', "c"),
    ("POST", "/api/embeddings"): ("/api/embeddings", NOMIC, 200, '"embedding":', "c"),
    ("POST", "/v1/completions"): ("/v1/completions", MISTRAL, 200, '"text_completion"', "b"),
    ("POST", "/v1/chat/completions"): ("/v1/chat/completions", MISTRAL, 200, '"chat.completion"', "b"),
    ("POST", "/v1/responses"): ("/v1/responses", MISTRAL, 200, '"object":"response"', "b"),
    ("POST", "/v1/embeddings"): ("/v1/embeddings", NOMIC, 200, '"object":"embedding"', "c"),
    ("POST", "/v1/messages"): ("/v1/messages", MISTRAL, 200, '"type":"message"', "b"),
    ("POST", "/v1/audio/transcriptions"): ("/v1/audio/transcriptions", form(model="mistral", file="RIFF")[0], 200,
                                           "4 bytes of speech", "b"),
    ("POST", "/v1/messages/count_tokens"): ("/v1/messages/count_tokens", MISTRAL, 200, '"input_tokens":', None),
    ("POST", "/v1/systemone"): ("/v1/systemone", MISTRAL, 200, '"decision":', "b"),
    ("POST", "/v1/images/generations"): ("/v1/images/generations", MISTRAL, 200, '"b64_json":', "b"),
    ("POST", "/v1/images/edits"): ("/v1/images/edits", form(model="mistral", image="RIFF")[0], 200, '"b64_json":', "b"),
    ("POST", "/api/show"): ("/api/show", {"model": "qwen3:14b"}, 200, '"model_info":', "a"),
    ("GET", "/v1/models/"): ("/v1/models/qwen3:14b", None, 200, '"object":"model"', "a"),
    ("POST", "/api/pull"): ("/api/pull", {"model": "mistral"}, 200, '{"status":"success"}', "b,c"),
    ("POST", "/api/copy"): ("/api/copy", {"source": "mistral", "destination": "x"}, 200, "", "b,c"),
    ("DELETE", "/api/delete"): ("/api/delete", {"model": "mistral"}, 200, "", "b,c"),
    ("HEAD", "/api/blobs/"): (BLOB, None, 404, "", "a"),
    ("POST", "/api/blobs/"): (BLOB, b"weights", 201, "", "a"),
    ("POST", "/api/create"): ("/api/create", {"model": "x", "from": "qwen3:14b"}, 200, '{"status":"success"}', "a"),
    ("POST", "/api/push"): ("/api/push", {"model": "llama3.2"}, 200, '{"status":"success"}', "a"),
    ("POST", "/api/me"): ("/api/me", {}, 200, '"name":"a"', "a"),
    ("POST", "/api/signout"): ("/api/signout", {}, 200, "", "a"),
    ("DELETE", "/api/user/keys/"): ("/api/user/keys/abc", None, 200, "", "a"),
    ("POST", "/api/experimental/web_search"): ("/api/experimental/web_search", {"query": "x"}, 200, "llama.example",
                                               "a"),
    ("POST", "/api/experimental/web_fetch"): ("/api/experimental/web_fetch", {"url": "x"}, 200, "llama.example", "a"),
    ("GET", "/api/experimental/model-recommendations"): ("/api/experimental/model-recommendations", None, 200,
                                                         "llama.example", "a"),
}


# Directly and through the gateway, byte for byte: every route of a node, in all its forms.
CHATTY = {"model": "llama3.2", "prompt": "hi <out=4>", "messages": MESSAGES, "input": "hi <out=3>", "max_tokens": 9}
USAGE = {"stream_options": {"include_usage": True}}
FORMS = [
    *(("POST", path, {**CHATTY, "stream": stream, **more}) for path in TEXT_PATHS for stream in (True, False)
      for more in ({}, {"seed": 7, "options": {"seed": 7}}, {**USAGE, "seed": 7}, USAGE)),
    *(("POST", path, body) for path in TEXT_PATHS for body in (
        {**CHATTY, "model": "no-such"}, {"messages": 7, "model": "llama3.2"}, b"no json", {})),
    ("POST", "/api/generate", {"model": "llama3.2"}), ("POST", "/api/generate", {"model": "llama3.2", "keep_alive": 0}),
    ("POST", "/api/chat", {"model": "llama3.2", "keep_alive": 0}),
    ("POST", "/api/embed", {"model": "nomic-embed-text", "input": ["a", "b"]}),
    ("POST", "/api/embeddings", {"model": "nomic-embed-text", "prompt": "a"}),
    ("POST", "/v1/embeddings", {"model": "nomic-embed-text", "input": "a", "encoding_format": "base64"}),
    ("POST", "/v1/audio/transcriptions", form(model="llama3.2", file="RIFF")[0]),
    *((method, path, None) for method in ("GET", "HEAD", "PUT", "OPTIONS") for path in (
        "/", "/api/version", "/api/tags", "/api/ps", "/api/status", "/api/chat", "/no/such/path", "/v1/no-such",
        "/v1/models/llama3.2", "/v1/models/no-such", BLOB)),
    ("POST", "/api/show", {"model": "llama3.2"}), ("POST", "/api/show", {"model": "no-such"}),
    *(("POST", path, {"model": model, "stream": stream}) for path in ("/api/pull", "/api/push")
      for model in ("gemma3:4b", "no-such", "llama3.2") for stream in (True, False)),
    ("POST", "/api/create", {"model": "x", "from": "llama3.2"}),
    ("POST", "/api/create", {"model": "x", "stream": False}),
    ("POST", "/api/copy", {"source": "llama3.2", "destination": "y"}), ("POST", "/api/copy", {"source": "no-such"}),
    ("DELETE", "/api/delete", {"model": "llama3.2"}), ("DELETE", "/api/delete", {"model": "no-such"}),
    ("POST", BLOB, b"weights"), ("POST", BLOB, b"others"),
    ("POST", "/api/me", {}), ("POST", "/api/signout", {}), ("DELETE", "/api/user/keys/abc", None),
    ("POST", "/api/experimental/web_search", {"query": "x"}),
    ("GET", "/api/experimental/model-recommendations", None),
]
# What differs between two runs of the same thing: times, and numbers that a node gives its requests.
DRAWN = re.compile(rb'("(?:created_at|expires_at|modified_at)":)"[^"]*"|("[a-z_]*(?:_duration|created(?:_at)?)":)\d+|'
                   rb'((?:chatcmpl|cmpl|resp|msg|req)_?-?)\d+')


def alike(answer):
    """Return what two answers of equal nodes must have in common: status line, fields, body."""
    first, *lines = answer.head[:-4].split(b"\r\n")
    added = b"x-sollol-", b"x-request-id:", b"x-accel-buffering:", b"date:"
    lines = sorted(line for line in lines if not line.lower().startswith(added))
    return first, lines, DRAWN.sub(rb"\1\2\3", answer.body)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("asked", FORMS, ids=lambda asked: f"{asked[0]} {asked[1]} {str(asked[2])[:60]}")
def test_answer_of_one_node_is_what_the_node_says_byte_for_byte(asked, version):
    async def main():
        def node():
            return bench.SimNode(models=("llama3.2", "nomic-embed-text"), loaded=("llama3.2",), **FAST)

        method, path, value = asked
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = form()[1] if path.endswith("transcriptions") else "application/x-www-form-urlencoded"    # curl's
        raw = (f"{method} {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: {kind}\r\n".encode()
               + b"Content-Length: %d\r\n" % len(body) * bool(body) + b"\r\n" + body)
        found = []
        direct = await node().start()
        async with gateway_for(node()) as gateway:
            for address in ((direct.host, direct.port), gateway.listener.address):
                caller = await bench.HttpClient.to(*address)
                caller.writer.write(raw)
                found.append(alike(await caller.answer(method)))
                caller.close()
        await direct.stop()
        assert found[1] == found[0]

    bench.run_virtual(main())


def aliased_forms():
    """Return what the next test asks for: (method, path, body with the model's own name)."""
    text = {"prompt": "hi <out=4>", "messages": MESSAGES, "input": "hi <out=3>", "max_tokens": 9}
    tools = {"tools": [{"type": "function", "name": "look", "function": {"name": "look"}, "input_schema": {}}]}
    return [
        *(("POST", path, {"model": "llama3.2", "stream": stream, **text, **more}) for path in TEXT_PATHS
          for stream in (True, False) for more in ({}, USAGE, {"temperature": 0, "options": {"seed": 7}}, tools)),
        ("POST", "/api/embed", {"model": "nomic-embed-text", "input": ["a", "b"]}),
        ("POST", "/api/embeddings", {"model": "nomic-embed-text", "prompt": "a"}),
        ("POST", "/v1/embeddings", {"model": "nomic-embed-text", "input": ["a"] * 40}),
        ("POST", "/api/generate", {"model": "llama3.2"}), ("POST", "/api/chat", {"model": "llama3.2", "keep_alive": 0}),
        ("POST", "/api/show", {"model": "llama3.2"}), ("POST", "/api/show", {"name": "llama3.2"}),
        ("POST", "/v1/audio/transcriptions", form(model="llama3.2", file="RIFF")[0]),
        ("GET", "/v1/models/llama3.2", None), ("GET", "/v1/models/llama3.2?x=llama3.2", None)]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("asked", aliased_forms(), ids=lambda asked: f"{asked[0]} {asked[1]} {str(asked[2])[:60]}")
def test_answer_under_an_alias_is_the_nodes_own_byte_for_byte_but_for_the_name(asked, version):
    async def main():
        def node():
            return bench.SimNode(models=("llama3.2", "nomic-embed-text"), loaded=("llama3.2",), **FAST)

        method, path, value = asked
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = form()[1] if path.endswith("transcriptions") else "application/x-www-form-urlencoded"
        found, direct = [], await node().start()
        flags = ["--alias", "gpt-*=llama3.2", "--alias", "embed-*=nomic-embed-text"]
        async with gateway_for(node(), flags=flags) as gateway:
            for own, other, address in ((b"", b"", (direct.host, direct.port)),
                                        (b"llama3.2", b"gpt-4o", gateway.listener.address)):
                sent = body.replace(own, other).replace(b"nomic-", b"") if own else body
                target = path.replace("llama3.2", "gpt-4o", 1) if own else path
                caller = await bench.HttpClient.to(*address)
                caller.writer.write(f"{method} {target} HTTP/{version}\r\nHost: localhost\r\n"
                                    f"Content-Type: {kind}\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
                first, _, said = alike(await caller.answer(method))
                found.append((first, said))
                caller.close()
        await direct.stop()
        key, expected = b'"id":' if path.startswith("/v1/models") else b'"model":', found[0][1]
        for name, other in ((b"llama3.2", b"gpt-4o"), (b"nomic-embed-text", b"embed-text")):
            expected = expected.replace(b'%b"%b"' % (key, name), b'%b"%b"' % (key, other))
        assert found[1] == (b"HTTP/1.1 200 OK", expected) and found[0][0] == found[1][0]
    bench.run_virtual(main())


@over_sockets
async def test_list_of_models_for_openai_has_ollamas_type_and_newline():
    async with gateway_for(bench.SimNode()) as gateway:
        answer = await call(gateway, "GET", "/v1/models")
        assert answer.fields["content-type"] == "application/json" and answer.body.endswith(b"}]}\n")


ENDLESS = ("GET", "/dashboard/events"), ("GET", "/api/peers")


@pytest.mark.parametrize("row", [row for row in sollol.ROUTES if row not in ENDLESS], ids=" ".join)
@over_sockets
async def test_route_does_what_its_row_says(row):
    nodes = three(speed=1000.0)
    nodes[1].version = "0.9.1"
    nodes[1]._loaded = ("mistral",)
    for node in nodes:
        node.account = node.name
    path, body, status, part, names = SURFACE[row]
    async with surface(nodes) as gateway:
        fields = {"Content_Type": form()[1]} if path.endswith(("transcriptions", "edits")) else {}
        answer = await call(gateway, row[0], path, body, **fields)
        assert (answer.status, answer.fields.get("x-sollol-node")) == (status, names)
        assert all(word in answer.body.decode() for word in part.split(" ")) and bool(answer.body) == bool(part)
        if names:
            assert asked_of(gateway, path, row[0]) == names.split(",")


def test_every_path_has_one_row_and_every_row_a_handler_that_has_what_it_needs():
    rows = [(method, path) for methods, path, _ in sollol.ROUTE_ROWS for method in methods.split()]
    assert len(rows) == len(set(rows)) == len(sollol.ROUTES)
    for (method, path), route in sollol.ROUTES.items():
        assert asyncio.iscoroutinefunction(route.handler), path
        assert (route.own, route.shows).count(None) == (1 if route.handler is sollol.serve_own else 2), path
        assert sollol.find_route(method, path + "x" if path[-1] == "/" != path else path) is route
        # HEAD is answered as GET is.
        assert route.handler is not sollol.serve_own or "GET" in method or ("GET", path) in rows


def test_readme_lists_every_route_and_what_is_done_with_it():
    text = (HERE / "README.md").read_text()
    listed = [(method, path, where)
              for where, cell in re.findall(r"^\| ([a-z, ]+) \| (`[A-Z ]+` `/.*?) \|", text, re.M)
              for methods, paths in re.findall(r"`([A-Z ]+)` ((?:`/[^`]*`(?:, )?)+)", cell)
              for method in methods.split() for path in re.findall(r"`(.+?)`", paths)]
    assert sorted(listed) == sorted((method, path, route.where.value)
                                    for (method, path), route in sollol.ROUTES.items())


def test_big_blob_passes_in_constant_memory():
    """The speed, at least 80 % of the direct one, is what `bench.py --overhead` measures."""
    async def run(stack):
        node = bench.light_process(stack, "node", "bench.serve_light(bench.BlobNode)")
        gateway = bench.sollol_process(stack, "gateway", node, 1)
        await bench.first_answer_s(gateway)
        cost = await bench.blob(gateway)
        assert cost.mib < 32 and cost.rate > 50

    with contextlib.ExitStack() as stack:
        bench.run_quick(run(stack))


# -----------------------------------------------------------------------------
# What well-known programs send, at their start and in use
#
# Recorded from langchain-ollama, llama-index and litellm; that of Open WebUI, aider and the ollama command line is
# written after their sources. The heads are theirs, field for field.
# -----------------------------------------------------------------------------

PYTHON_HEAD = """\
Accept-Encoding: gzip, deflate, zstd
Connection: keep-alive
content-type: application/json
accept: application/json
user-agent: ollama-python/0.6.3 (x86_64 linux) Python/3.11.7"""
LITELLM_HEAD = """\
Accept: */*
Accept-Encoding: gzip, deflate, zstd
Connection: keep-alive
User-Agent: litellm/1.110.2"""
WEBUI_HEAD = """\
Content-Type: application/json
X-OpenWebUI-User-Name: Ada%20L
X-OpenWebUI-User-Role: admin
Accept: */*
Accept-Encoding: gzip, deflate, br
User-Agent: Python/3.11 aiohttp/3.12.15"""
GO_HEAD = """\
User-Agent: ollama/0.33.0 (amd64 linux) Go/go1.24.1
Accept: application/json
Content-Type: application/json
Accept-Encoding: gzip"""
GO_STREAM_HEAD = GO_HEAD.replace("application/json\nContent", "application/x-ndjson\nContent")
SAID = '[{"role":"user","content":"hi <out=3>"}]'

# Program: [(head, request, body, what the answer holds)]
PROGRAMS = {
    "LangChain": [
        (PYTHON_HEAD, "GET /api/tags", "", '"models":['),
        (PYTHON_HEAD, "POST /api/chat",
         '{"model":"llama3.2","stream":true,"options":{"temperature":0.0},"messages":%s,"tools":[]}' % SAID,
         '"done":true'),
        (PYTHON_HEAD, "POST /api/generate",
         '{"model":"llama3.2","stream":true,"options":{},"format":"","prompt":"hi <out=3>"}', '"done":true'),
        (PYTHON_HEAD, "POST /api/embed",
         '{"model":"nomic-embed-text","input":["one","two"],"options":{"mirostat":null,"mirostat_eta":null,'
         '"mirostat_tau":null,"num_ctx":null,"num_gpu":null,"num_thread":null,"repeat_last_n":null,"stop":null}}',
         '"embeddings":[['),
    ],
    "LlamaIndex": [
        (PYTHON_HEAD, "POST /api/show", '{"model":"llama3.2"}', '"model_info":'),
        (PYTHON_HEAD, "POST /api/chat",
         '{"model":"llama3.2","stream":false,"options":{"temperature":null,"num_ctx":3900},"messages":%s,"tools":[]}'
         % SAID, '"done":true'),
        (PYTHON_HEAD, "POST /api/embed", '{"model":"nomic-embed-text","input":["one","two"],"options":{}}',
         '"embeddings":[['),
    ],
    "litellm": [
        (LITELLM_HEAD + "\nContent-Type: application/json", "POST /api/show", '{"name":"llama3.2"}', '"model_info":'),
        (LITELLM_HEAD, "POST /api/generate", '{"model": "llama3.2", "prompt": "### User:\\nhi <out=3>\\n\\n", '
         '"options": {}, "stream": true, "images": []}', '"done":true'),
        (LITELLM_HEAD + "\nContent-Type: application/json", "POST /api/embed",
         '{"model":"nomic-embed-text","input":["one","two"]}', '"embeddings":[['),
    ],
    "aider": [
        (LITELLM_HEAD + "\nContent-Type: application/json", "POST /api/show", '{"name":"llama3.2"}', '"model_info":'),
        (LITELLM_HEAD, "POST /api/chat", '{"model": "llama3.2", "messages": [{"role": "system", "content": "Act as an '
         'expert software developer."}, {"role": "user", "content": "hi <out=3>", "images": []}], '
         '"options": {"num_ctx": 9017, "temperature": 0}, "stream": true}', '"done":true'),
    ],
    "Open WebUI": [
        (WEBUI_HEAD, "GET /api/version", "", '"version":"'),
        (WEBUI_HEAD, "GET /api/tags", "", '"model":"mistral:latest"'),
        (WEBUI_HEAD, "GET /api/ps", "", '"models":['),
        (WEBUI_HEAD, "POST /api/chat", '{"model": "mistral:latest", "messages": %s, "options": {}, "stream": true, '
         '"keep_alive": "5m"}' % SAID, '"done":true'),
        (WEBUI_HEAD, "POST /api/embed", '{"input": ["one", "two"], "model": "nomic-embed-text:latest"}',
         '"embeddings":[['),
        (WEBUI_HEAD, "POST /api/pull", '{"model": "mistral"}', '{"status":"success"}'),
        (WEBUI_HEAD, "POST /api/generate", '{"model": "mistral:latest", "keep_alive": 0, "prompt": ""}',
         '"done_reason":"unload"'),
        (WEBUI_HEAD, "GET /v1/models", "", '"object":"list"'),
        (WEBUI_HEAD, "DELETE /api/delete", '{"model": "mistral:latest"}', ""),
    ],
    "ollama": [
        (GO_HEAD, "HEAD /", "", ""),
        (GO_HEAD, "GET /api/status", "", '"cloud":'),
        (GO_HEAD, "POST /api/show?ts=1767225600", '{"model":"llama3.2","system":"","template":"","verbose":false,'
         '"options":null,"name":"llama3.2"}', '"capabilities":["completion","tools"]'),
        (GO_STREAM_HEAD, "POST /api/generate", '{"model":"llama3.2","prompt":"","suffix":"","system":"","template":"",'
         '"keep_alive":null,"options":null,"think":null}', '"done_reason":"load"'),
        (GO_STREAM_HEAD, "POST /api/chat", '{"model":"llama3.2","messages":%s,"format":"","options":{}}' % SAID,
         '"done":true'),
        (GO_HEAD, "GET /api/ps", "", '"name":"llama3.2:latest"'),
        (GO_STREAM_HEAD, "POST /api/generate", '{"model":"llama3.2","prompt":"","suffix":"","system":"","template":"",'
         '"keep_alive":0,"options":null}', '"done_reason":"unload"'),
        (GO_STREAM_HEAD, "POST /api/pull",
         '{"model":"mistral","insecure":false,"username":"","password":"","name":"mistral"}', '{"status":"success"}'),
        (GO_HEAD, "POST /api/copy", '{"source":"mistral","destination":"mine"}', ""),
        (GO_HEAD, "GET /api/tags", "", '"name":"mine:latest"'),
        (GO_STREAM_HEAD, "POST /api/generate", '{"model":"mine","prompt":"","keep_alive":0}', '"done_reason":"unload"'),
        (GO_HEAD, "DELETE /api/delete", '{"model":"mine","name":"mine"}', ""),
        (GO_HEAD, "HEAD " + BLOB, "", None),
        (GO_HEAD.replace("json\nAccept-", "octet-stream\nAccept-"), "POST " + BLOB, "weights", ""),
        (GO_HEAD, "HEAD " + BLOB, "", ""),
        (GO_STREAM_HEAD, "POST /api/create", '{"model":"her","files":{"w.gguf":"%s"},"stream":true,"name":"her"}'
         % BLOB.rpartition("/")[2], '{"status":"success"}'),
        (GO_HEAD, "POST /api/me", "", None),
    ],
}


@pytest.mark.parametrize("program", PROGRAMS)
@over_sockets
async def test_programs_find_one_ollama(program):
    async with surface(three(speed=200.0)) as gateway:
        caller = await Caller.to(gateway)
        for fields, request, body, part in PROGRAMS[program]:
            upload = request.startswith("POST " + BLOB)
            framing = "Transfer-Encoding: chunked\n" if upload else f"Content-Length: {len(body)}\n" if body else ""
            lines = f"{request} HTTP/1.1\nHost: localhost:8000\n{framing}{fields}\n\n".replace("\n", "\r\n").encode()
            sent = sollol.chunk(body.encode()) + sollol.LAST_CHUNK if upload else body.encode()
            caller.writer.write(lines + sent)
            answer = await caller.answer(request.split(" ")[0])
            assert answer.status == (201 if upload else 200 if part is not None else 404 if "blobs" in request else 401)
            assert (part or "").encode() in answer.body
            if answer.fields.get("x-sollol-node") and body and not upload:
                record = [node for node in gateway.nodes if node.name in answer.fields["x-sollol-node"]][0].requests
                assert any(it.body == body.encode() for it in record)
        caller.close()


# -----------------------------------------------------------------------------
# The state file
# -----------------------------------------------------------------------------

@over_sockets
async def test_first_decision_after_a_restart_is_the_right_one(tmp_path):
    slow = await bench.SimNode(speed=2.0, loaded=("llama3.2",), name="slow").start()
    fast = await bench.SimNode(speed=50.0, loaded=("llama3.2",), name="fast").start()
    lines = f"{slow.url} name=slow\n{fast.url} name=fast"
    keep = ["--state", str(tmp_path / "state.json")]
    async with gateway_for(lines=lines) as gateway:
        await used_names(gateway, 1)
        one_s, other_s = (it.finish_s for it in gateway.dispatcher.policy.decisions[0].candidates)
        assert other_s < 1.2 * one_s        # it knows nothing
    async with gateway_for(lines=lines, flags=keep) as gateway:
        assert await used_names(gateway, 6, tokens=60) == {"slow", "fast"}
        gateway.drain()
        await gateway.stopped.wait()

    def asked():
        return sum(bool(record.model) for node in (slow, fast) for record in node.requests)

    before = asked()
    async with gateway_for(lines=lines, flags=keep) as gateway:
        gateway.options.calibrate = True
        await asyncio.sleep(2 * sollol.SWEEP_S)
        assert all(node.calibrated and not node.requests for node in gateway.dispatcher.cluster.nodes.values())
        assert asked() == before
        assert await used_names(gateway, 1) == {"fast"}
        fast_s, slow_s = (it.finish_s for it in gateway.dispatcher.policy.decisions[0].candidates)
        assert slow_s > 5 * fast_s
    for node in (slow, fast):
        await node.stop()


@over_sockets
async def test_state_is_written_while_it_runs_and_only_if_something_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sollol, "STATE_S", 0.1)
    path = tmp_path / "state.json"
    async with gateway_for(bench.SimNode(**FAST), flags=["--state", str(path), "--probe-interval", "0.1"]) as gateway:
        await call(gateway, "POST", "/api/generate", generate())
        await until(lambda: path.exists() and "llama3.2:latest" in path.read_text())
        await asyncio.sleep(1.2)
        before = path.stat()
        await asyncio.sleep(1.2)
        assert path.stat().st_ino == before.st_ino
        names = [entry["name"] for entry in json.loads(path.read_text())["nodes"]]
        assert names == list(gateway.dispatcher.cluster.nodes)
    assert sorted(os.listdir(tmp_path)) == ["state.json", "state.usage.json"] and before.st_mode & 0o777 == 0o600


GOOD_STATE = {"format": "sollol-state", "version": 1, "nodes": [], "lengths": {}}


@table("content", [
    ("empty", b""), ("torn", b'{"format": "sollol-state", "ver'), ("another file", b"http://gpu slots=4\n"),
    ("bytes", b"\xff\x00\xfe"), ("deep", b"[" * 100_000), ("list", b"[]"), ("another program's", b'{"version": 1}'),
    ("newer", json.dumps({**GOOD_STATE, "version": 2}).encode()),
    ("no nodes", json.dumps({**GOOD_STATE, "nodes": 1}).encode()),
    ("no lengths", json.dumps({**GOOD_STATE, "lengths": None}).encode()), ("large", b" " * 1_000_001)])
def test_state_file_that_cannot_be_used_is_told_once_and_put_aside(content, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sollol, "MOST_STATE_BYTES", 1_000_000)
    caplog.set_level("WARNING", "sollol")
    sollol.LOG.propagate = True
    path = tmp_path / "state.json"
    path.write_bytes(content)

    async def main():
        async with gateway_for(bench.SimNode(**FAST), flags=["--state", str(path)]) as gateway:
            assert (await call(gateway, "POST", "/api/generate", generate(tokens=20))).status == 200
            assert path.read_bytes() == content

    bench.run_virtual(main())
    assert len(caplog.messages) == 1 and str(path) in caplog.messages[0]
    assert (tmp_path / "state.json.ignored").read_bytes() == content
    assert len(sollol.parse_state(path.read_bytes())["nodes"]) == 1


def test_state_that_cannot_be_written_is_told_once_and_leaves_nothing_behind(tmp_path, caplog):
    caplog.set_level("WARNING", "sollol")
    sollol.LOG.propagate = True
    folder = tmp_path / "away"
    folder.mkdir()
    state = sollol.StateFile(str(folder / "state.json"))
    folder.rmdir()
    for number in range(3):
        state.write({"nodes": [number], "lengths": {}})
    assert len(caplog.messages) == 1 and "No such file" in caplog.messages[0]
    folder.mkdir()
    state.write({"nodes": [], "lengths": {}})
    assert os.listdir(folder) == ["state.json"]


def test_full_disk_at_the_start_is_told_once_and_stops_nobody(tmp_path, monkeypatch, caplog):
    caplog.set_level("WARNING", "sollol")
    sollol.LOG.propagate = True
    path = tmp_path / "state.json"

    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full)
        state = sollol.StateFile(str(path))
        state.write({"nodes": [], "lengths": {}})
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.messages[0]
    state.write({"nodes": [], "lengths": {}})
    assert path.exists()


@contextlib.contextmanager
def program(*argv, env=None, cwd=HERE):
    """Run a program of this folder, and leave nothing of it behind. Its output goes to a file: a pipe could fill up."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=cwd, stdout=output, stderr=output,
                                   env={**os.environ, **(env or {})})
        process.output = os.fdopen(os.dup(output.fileno()))
        process.seen = 0
        try:
            yield process
        finally:
            kill_successors(process.pid)
            process.kill()
            process.wait()
            process.output.close()


def kill_successors(pid):
    """Kill the children of a process that runs on after upgrades: they have a process group of their own."""
    with contextlib.suppress(OSError):
        for child in map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            if os.getpgid(child) != os.getpgid(pid):
                os.killpg(os.getpgid(child), signal.SIGKILL)


def all_output(process):
    """Return what a program has printed so far."""
    size = os.fstat(process.output.fileno()).st_size
    return os.pread(process.output.fileno(), size, 0).decode()


def read_until(process, pattern, patience_s=20.0):
    """Return the match of the next line of output that has the pattern."""
    deadline_s = time.monotonic() + patience_s
    while True:
        lines = all_output(process).splitlines(keepends=True)
        for number in range(process.seen, len(lines)):
            if lines[number].endswith("\n") and (match := re.search(pattern, lines[number])):
                process.seen = number + 1
                return match
        assert process.poll() is None and time.monotonic() < deadline_s, f"no {pattern} in {lines}"
        time.sleep(0.02)


def curl(url, value=None, timeout_s=20):
    """Make a plain HTTP request with the standard library; return the body."""
    data = None if value is None else json.dumps(value).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=timeout_s) as answer:
        return answer.read()


def test_node_processes_killed_under_load_cost_no_request(monkeypatch):
    """SIGKILL to real processes, real time, the gateway a process of its own; a request that may not be lost is not."""
    monkeypatch.setattr(bench, "KILL_GAP_S", 3.0)
    rows, violations = bench.run_quick(bench.run_kills(3.2, seed=1))
    assert not violations
    assert rows[0][0].startswith("1 kills") and all(int(row[2]) > 2 for row in rows[1:])


def test_others_notice_little_of_heads_that_never_end_and_of_slow_readers(monkeypatch):
    """The best round counts: a busy machine may delay one."""
    monkeypatch.setattr(bench, "SIEGE_SETTLE_S", 0.5)
    seen = collections.defaultdict(list)
    while len(seen["without"]) < 3 and (not seen["with"] or bench.siege_violations(seen)):
        flags = "--header-timeout", "1s"
        for name, found in bench.run_quick(bench.run_siege(0.8, 1, 1, names=(), readers=40, flags=flags)).items():
            seen[name] += found
    assert not bench.siege_violations(seen)


@table("most_mib, p95_s, violation", [
    ("little", 63.0, 0.49, None),
    ("late", 63.0, 0.51, "with: the P95 of others was 0.510 s, at most 0.500 s are right"),
    ("large", 65.0, 0.31, "with: the gateway grew by 65.0 MiB")])
def test_siege_sees_what_others_notice(most_mib, p95_s, violation):
    seen = {"without": [bench.Besieged(0.3, 0.3, 32.0, 50.0, 0.0)],
            "with": [bench.Besieged(0.3, p95_s, 32.0, 90.0, most_mib), bench.Besieged(0.3, 9.0, 32.0, 90.0, 1.0)]}
    assert bench.siege_violations(seen) == [violation] * (violation is not None)


LIMITED = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (%d, %d)); "
           "sys.argv[0] = 'sollol.py'; runpy.run_path('sollol.py', run_name='__main__')")


@pytest.mark.parametrize("flags", [[], ["--no-uvloop"]])
def test_too_many_open_files_are_survived_and_running_streams_go_on(flags):
    """100 descriptors allow 18 clients; 200 at once are more than can be accepted, and so are told so or wait."""
    with program("-c", LIMITED % (100, 100), "--demo", "--port", "0", *flags) as process:
        port = int(read_until(process, r"event=start.* url=http://127.0.0.1:(\d+)")[1])
        read_until(process, "allows 18 clients")

        def connect(data=b""):
            client = socket.create_connection(("127.0.0.1", port), timeout=20)
            client.sendall(data)
            return client

        stream = connect(posted(generate(tokens=120, stream=True)))
        assert stream.recv(20).startswith(b"HTTP/1.1 200")
        crowd = [connect() for _ in range(200)]
        told = 0
        for client in crowd[20::6]:
            with contextlib.suppress(OSError):
                client.settimeout(0.005)
                told += client.recv(20).startswith(b"HTTP/1.1 503")
        for client in crowd:
            client.close()
        whole = b""
        while not whole.endswith(b"\r\n0\r\n\r\n"):
            piece = stream.recv(65536)
            assert piece, whole[-200:]
            whole += piece
        assert told > 0 and b'"done":true' in whole

        def is_served():            # as soon as those that have left are forgotten
            with contextlib.suppress(urllib.error.HTTPError):
                return json.loads(curl(f"http://127.0.0.1:{port}/api/generate", generate()))["done"]

        assert any(is_served() or time.sleep(0.1) for _ in range(50))
        assert all_output(process).count("cannot accept") < 10 and "Traceback" not in all_output(process)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_disk_under_the_log_is_survived(unbuffered):
    """An empty PYTHONUNBUFFERED is as none: Python then keeps what it could not write, and tries again at its exit."""
    with open("/dev/full", "w") as full, subprocess.Popen(
            [sys.executable, "sollol.py", "--demo", "--port", "0"], cwd=HERE, stdout=subprocess.PIPE, stderr=full,
            text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}) as process:
        try:
            url = next(re.search(r"http://[0-9.:]+", row)[0] for row in process.stdout if "http://" in row)
            for _ in range(5):
                assert json.loads(curl(url + "/api/generate", generate()))["done"]
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_greeting_that_cannot_be_printed_stops_nothing():
    with open("/dev/full", "w") as full, subprocess.Popen(
            [sys.executable, "sollol.py", "--demo", "--port", "0"], cwd=HERE, stdout=full, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONUNBUFFERED": ""}) as process:
        try:
            url = next(match[1] for row in process.stderr if (match := re.search(r"event=start .*url=(\S+)", row)))
            assert json.loads(curl(url + "/api/generate", generate()))["done"]
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("asked, descriptors, allowed", [
    (4096, 1024, 480), (100, 1024, 100), (4096, 10, 1), (4096, -1, 4096)])
def test_clients_are_no_more_than_open_files_allow(asked, descriptors, allowed):
    assert sollol.affordable_clients(asked, descriptors) == allowed


def test_demo_answers_and_sigterm_ends_it_cleanly():
    with program("sollol.py", "--demo", "--port", 0) as demo:
        url = read_until(demo, r"event=start .*url=(\S+)")[1]
        body = curl(f"{url}/api/chat", {"model": "llama3.2", "messages": [{"role": "user", "content": "hi <out=3>"}]})
        assert [json.loads(line)["done"] for line in body.splitlines()] == [False, False, False, True]
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(10) == 0


def test_first_answer_of_the_demo_is_fast_and_says_that_it_is_simulated():
    """The model is in memory on the fastest node. Nothing is drawn that another node would draw otherwise."""
    with program("sollol.py", "--demo", "--port", 0) as demo:
        url = read_until(demo, r"event=start .*url=(\S+)")[1]
        value = {"model": "llama3.2", "stream": False, "messages": [{"role": "user", "content": "Who are you?"}]}
        with urllib.request.urlopen(f"{url}/api/chat", json.dumps(value).encode(), timeout=20) as response:
            assert response.headers["X-SOLLOL-Node"] == "rtx4090"
            body = json.load(response)
        text = body["message"]["content"]
        assert text.startswith("This answer is simulated: ") and text.endswith(".") and 20 < len(text.split()) < 120
        assert body.get("load_duration", 0) < 1e8 and body["total_duration"] < 2e9
        loaded = {row["name"] for row in json.loads(curl(f"{url}/api/ps"))["models"]}
        assert loaded == {"llama3.2:latest", "llama3.1:8b", "llama3.2:1b"}


@pytest.mark.parametrize("prompt, num_predict, words, reason", [
    ("hi", -1, range(20, 120), "stop"), ("<out=3> hi", -1, [3], "stop"), ("<out=500> hi", -1, [500], "stop"),
    ("<out=0> hi", -1, [0], "stop"), ("hi", 5, [5], "length"), ("<out=500> hi", 5, [5], "length")])
def test_simulated_answer_has_the_length_that_was_asked_for_and_is_the_same_everywhere(prompt, num_predict, words,
                                                                                       reason):
    ask = bench.Ask("llama3.2", bench.model_named("llama3.2"), prompt, True, num_predict, (), None)
    tokens, told = bench.composed(ask, 1000, for_people=True)
    assert len(tokens) in words and told == reason and bench.composed(ask, 1000, for_people=True)[0] == tokens
    assert "This answer is simulated: no".startswith("".join(tokens[:5]))


def test_demo_without_bench_beside_it_is_one_clear_line(tmp_path):
    shutil.copy(HERE / "sollol.py", tmp_path)
    done = subprocess.run([sys.executable, tmp_path / "sollol.py", "--demo"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "sollol.py: --demo: bench.py must be beside sollol.py\n"


def test_demo_takes_its_flags_from_the_environment_too():
    with program("sollol.py", env={"SOLLOL_DEMO": "1", "SOLLOL_PORT": "0", "SOLLOL_LOG_FORMAT": "json"}) as demo:
        assert json.loads(read_until(demo, '.*"event": "start".*')[0])["nodes"] == 3


def test_check_that_is_interrupted_ends_without_a_traceback():
    with socket.create_server(("127.0.0.1", 0)) as mute, program(
            "sollol.py", "--check", "--node", f"http://127.0.0.1:{mute.getsockname()[1]}") as check:
        mute.settimeout(20)
        mute.accept()               # so it probes
        check.send_signal(signal.SIGINT)
        assert check.wait(10) == 128 + signal.SIGINT and all_output(check) == ""


def test_check_prints_a_table_and_tells_by_its_exit_status(tmp_path):
    hosts = tmp_path / "hosts.txt"
    with program("bench.py", "--nodes", 1, "--port", 0) as node:
        url = read_until(node, r"http://\S+")[0]

        def check(text):
            hosts.write_text(text)
            done = subprocess.run([sys.executable, "sollol.py", "--hosts", hosts, "--check"], cwd=HERE,
                                  capture_output=True, text=True, timeout=30)
            return done.returncode, done.stdout + done.stderr

        status, out = check(f"{url} name=good\n")
        assert status == 0 and re.search(r"good +http\S+ +up +\S+ +llama3.1:8b +\S+\n +llama3.2:latest\n", out)
        status, out = check(f"{url} name=good\nhttp://127.0.0.1:1 name=bad\n")
        assert status == 1 and re.search(r"bad +http://127.0.0.1:1 +down .* no connection: Connection refused\n", out)
        assert out.endswith(" (OLLAMA_HOST=0.0.0.0).\n")
        status, out = check("# nothing\n\nhttp://x slots=four\n")
        assert (status, out) == (2, f"{hosts}:3: slots must be a whole number from 1 to 64, not 'four'\n")


@table("models, loaded, why, lines", [
    ("few", ["a", "b", "c"], ["a"], "", ["NODE  MODELS  LOADED  WHY", "n     a b c   a"]),
    ("many", ["a", "b", "c", "d"], ["c", "d"], "x", ["NODE  MODELS  LOADED  WHY", "n     a       c d     x",
                                                    "      b", "      c", "      d"]),
    ("long", ["a" * 60, "b" * 60], ["b"], "", ["NODE  MODELS" + 56 * " " + "LOADED  WHY", f"n     {'a' * 60}  b",
                                              f"      {'b' * 60}"])])
def test_models_of_a_node_are_listed_below_each_other_where_they_are_many(models, loaded, why, lines):
    assert sollol.table_lines([("NODE", ["MODELS"], ["LOADED"], "WHY"), ("n", models, loaded, why)]) == lines


@pytest.mark.parametrize("path, why", [("no/such/folder/state", "No such file"), ("FOLDER", "Is a directory"),
                                       ("hosts.txt/state", "Not a directory"), ("/proc/state", "")])
def test_state_file_that_can_never_be_written_stops_the_start(tmp_path, path, why):
    path = path.replace("FOLDER", str(tmp_path))
    done = subprocess.run([sys.executable, "sollol.py", "--node", "127.0.0.1:1", "--port", "0", "--state", path],
                          cwd=HERE, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and os.listdir(tmp_path) == []
    assert done.stderr.startswith(f"sollol.py: --state: {path}: {why}") and done.stderr.count("\n") == 1


def test_state_replaces_only_a_regular_file_also_behind_a_link(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(sollol.ConfigError, match="pipe: not a regular file"):
        sollol.StateFile(str(tmp_path / "pipe"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").symlink_to("disk/state")
    sollol.StateFile(str(tmp_path / "state")).write({"nodes": [], "lengths": {}})
    assert (tmp_path / "state").is_symlink() and os.listdir(tmp_path / "disk") == ["state"]


def test_terminated_program_keeps_what_it_has_learned(tmp_path):
    """At twice the speed: at 20 times a busy machine makes 20 tokens in less than can be learned from, 0.1 ms."""
    path = tmp_path / "state.json"
    with program("bench.py", "--nodes", 1, "--port", 0, "--speed", 2) as node:
        argv = "sollol.py", "--node", read_until(node, r"http://\S+")[0], "--port", 0, "--state", path
        with program(*argv) as gateway:
            curl(read_until(gateway, r"event=start .*url=(\S+)")[1] + "/api/generate", generate(tokens=20))
            gateway.send_signal(signal.SIGTERM)
            assert gateway.wait(10) == 0
        decode_s = sollol.parse_state(path.read_bytes())["nodes"][0]["models"]["llama3.2:latest"]["decode_s"]
        with program(*argv) as gateway:
            read_until(gateway, r"event=state .*nodes=1")
            stats = json.loads(curl(read_until(gateway, r"event=start .*url=(\S+)")[1] + "/api/stats"))
            assert stats["nodes"][0]["models"]["llama3.2:latest"]["decode_tok_s"] == round(1 / decode_s, 1)


def test_restart_on_the_same_port_works_at_once_and_a_second_signal_stops_at_once():
    """SIGTERM with a stream running and connections open; the next one listens while the first still drains."""
    with program("bench.py", "--nodes", 1, "--port", 0, "--speed", 4) as node, socket.socket() as probe:
        url = read_until(node, r"http://\S+")[0]
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()

        def connected(data=b""):
            client = socket.create_connection(("127.0.0.1", port), timeout=20)
            client.sendall(data)
            return client

        argv = ["sollol.py", "--node", url, "--port", port]
        with program(*argv) as first:
            read_until(first, "event=start .*url=")
            idle = [connected(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(20)]
            stream = connected(posted(generate(tokens=200, stream=True)))
            assert stream.recv(12) == b"HTTP/1.1 200"
            first.send_signal(signal.SIGTERM)
            read_until(first, "event=drain")
            with program(*argv) as next_one:
                read_until(next_one, "event=start .*url=")
                assert curl(f"http://127.0.0.1:{port}/") == b"Ollama is running"
                whole = b""
                while piece := stream.recv(65536):
                    whole += piece
                assert b'"done":true' in whole and first.wait(10) == 0
                running = connected(posted(generate(tokens=2000, stream=True)))
                assert running.recv(12) == b"HTTP/1.1 200"
                next_one.send_signal(signal.SIGTERM)
                read_until(next_one, "event=drain")
                next_one.send_signal(signal.SIGTERM)        # as timeout(1) does, which sends two
                running.settimeout(20)
                until_s = time.monotonic() + 1.2
                while time.monotonic() < until_s:
                    assert running.recv(65536) and next_one.poll() is None
                next_one.send_signal(signal.SIGTERM)
                assert next_one.wait(5) == 0
            with program(*argv) as last:
                read_until(last, "event=start .*url=")
            for client in (*idle, stream, running):
                client.close()


def free_ports(count):
    """Return ports on which nobody listens."""
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


@pytest.mark.parametrize("peers", [False, True], ids=["strangers", "peers"])
def test_gateway_killed_beside_its_twin_costs_no_request_of_clients_that_ask_again(peers):
    """SIGKILL to one of two processes before the same nodes; each client knows both, and goes to the other."""
    with program("bench.py", "--nodes", 2, "--port", 0, "--speed", 10) as nodes, contextlib.ExitStack() as stack:
        argv = [word for _ in range(2) for word in ("--node", read_until(nodes, r"http://\S+")[0])]
        ports = free_ports(2)
        argv += [word for port in ports for word in ("--peer", f"127.0.0.1:{port}") if peers]
        twins = [stack.enter_context(program("sollol.py", "--port", port, *argv)) for port in ports]
        for twin in twins:
            read_until(twin, "event=start .*url=")
        if peers:
            read_until(twins[0], "event=peer peer=.* state=up")

        async def client(number, tries):
            callers = [bench.Caller("127.0.0.1", port) for port in ports]
            for turn in range(20):
                body, response = json.dumps(generate(prompt=f"{number} {turn}", tokens=30, stream=True)), None
                while response is None or b'"done":true' not in response.body:
                    assert len(tries) < 400
                    tries.append(ports[number % 2])
                    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                        response = await callers[number % 2].call(body.encode(), path="/api/generate")
                    number += response is None or not response.whole
                if number == 0 and turn == 5:
                    twins[1].kill()
            for caller in callers:
                caller.close()

        async def run():
            tries = []
            await asyncio.gather(*(client(number, tries) for number in range(8)))
            return tries

        tries = asyncio.run(run())
        assert 160 < len(tries) <= 180 and min(collections.Counter(tries).values()) >= 8
        assert json.loads(curl(f"http://127.0.0.1:{ports[0]}/api/health"))["nodes"]["up"] == 2


@over_sockets
async def test_wall_clock_that_jumps_changes_nothing():
    with bench.mad_wall_clock(1):
        async with gateway_for(bench.SimNode(**FAST), bench.SimNode(**FAST)) as gateway:
            for stream in (False, True) * 20:
                answer = await call(gateway, "POST", "/api/generate", generate(stream=stream))
                assert answer.status == 200 and b'"done":true' in answer.body
            await asyncio.sleep(2)
            assert health(gateway)["nodes"]["up"] == 2 and health(gateway)["uptime_s"] < 60
    source = inspect.getsource(sollol)
    days = inspect.getsource(sollol.wall_clock_s)       # what is about days cannot do without
    assert not re.search(r"\btime\.time\(|\bnow\(\)|utcnow|\.today\(", source.replace(days, ""))


@over_sockets
async def test_reload_under_load_costs_no_request(tmp_path):
    """Nodes leave and come back while requests run and wait."""
    nodes = [await bench.SimNode(loaded=("llama3.2",), speed=10, seed=seed).start() for seed in range(3)]
    lines = [f"{node.url} name=n{number}\n" for number, node in enumerate(nodes)]
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("".join(lines))
    async with gateway_for(*nodes, hosts=hosts) as gateway:
        values = [generate(tokens=40, stream=number % 2 == 0) for number in range(60)]
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", value)) for value in values]
        for turn in range(20):
            hosts.write_text("".join(lines[:turn % 3] + lines[turn % 3 + 1:]) if turn % 4 else "no URL at all\n")
            gateway.files.reload()
            await asyncio.sleep(0.05)
        hosts.write_text("".join(lines))
        gateway.files.reload()
        answers = await asyncio.gather(*tasks)
        assert all(answer.status == 200 and b'"done":true' in answer.body for answer in answers)
        await until(lambda: health(gateway)["nodes"].items() >= {"up": 3, "total": 3}.items())


@pytest.mark.parametrize("flags", [[], ["--no-uvloop"]])
def test_port_in_use_is_one_clear_line(flags):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "sollol.py", "--node", "127.0.0.1:1", "--port", str(port), *flags],
                              cwd=HERE, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    *_, node, said = done.stderr.splitlines()
    assert said == f"sollol.py: 127.0.0.1:{port}: Address already in use" and "event=node" in node


def test_busy_service_manager_does_not_stop_the_gateway(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setattr(sollol, "NOTIFY_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        stuck = threading.Timer(4.0, manager.close)     # a send that waits for ever ends then
        stuck.start()
        for number in range(2000):
            sollol.tell_systemd("WATCHDOG=1" if number < 1990 else "READY=1")
        assert stuck.is_alive() and manager.recv(99) == b"WATCHDOG=1"
        stuck.cancel()


def test_service_manager_is_told_ready_and_stopping(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(10)
        with program("sollol.py", "--node", "127.0.0.1:1", "--port", 0,
                     env={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as gateway:
            assert channel.recv(1000) == b"READY=1"
            gateway.send_signal(signal.SIGHUP)
            while not (said := channel.recv(1000)).startswith(b"RELOADING=1"):
                assert said == b"WATCHDOG=1"
            gateway.send_signal(signal.SIGTERM)
            while channel.recv(1000) != b"STOPPING=1":
                pass
            assert gateway.wait(10) == 0


@pytest.mark.parametrize("words", [["verify"], ["verify", "with secrets"],
                                   ["security", "--offline=true", "--threshold=15"]], ids=" ".join)
def test_service_is_valid_and_exposed_to_little(words, tmp_path):
    """The threshold is ten times the exposure: 1.5 of 10."""
    if not shutil.which("systemd-analyze") or not pathlib.Path("/usr/bin/python3").exists():
        pytest.skip("systemd-analyze or /usr/bin/python3 is not installed")
    path, text = HERE / "sollol.service", (HERE / "sollol.service").read_text()
    if words[1:] == ["with secrets"]:
        path, words, (text, count) = tmp_path / path.name, words[:1], re.subn(r"(?m)^#(?=\w+=)", "", text)
        path.write_text(text)
        assert count == 7 and "\nEnvironment=SOLLOL_KEYS=%d/keys\n" in text
    done = subprocess.run(["systemd-analyze", *words, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "sollol.service:" not in done.stderr, done.stderr + done.stdout[-300:]


def container_files(uncomment=False):
    """Return what the README's compose file and its objects of Kubernetes say; `uncomment` the GPU's line."""
    yaml = pytest.importorskip("yaml", reason="PyPI pyyaml is not installed")
    blocks = re.findall(r"^```yaml\n(.*?)^```", (HERE / "README.md").read_text(), re.M | re.S)
    if uncomment:
        blocks = [re.sub(r"(?m)^( +)# (?=deploy: )", r"\1", block) for block in blocks]
    (compose,), objects = (list(yaml.safe_load_all(block)) for block in blocks)
    return compose, {(each["kind"], each["metadata"]["name"]): each["spec"] for each in objects}


def container_commands():
    """Return the words of the gateway's command in each of the README's snippets for containers; without a parser."""
    text = (HERE / "README.md").read_text()
    lines = re.search(r"(?m)^    command:\n((?:    - .*\n)+)", text)[1].splitlines()
    words = re.search(r"(?s) command: \[(.*?)\]", text)[1].split(",")
    return [re.sub(" +#.*", "", line).removeprefix("    - ") for line in lines], [word.strip(' \n"') for word in words]


def test_commands_for_containers_run(tmp_path):
    """And the health check of the compose file tells whether a node is up."""
    (tmp_path / "sollol.py").symlink_to(HERE / "sollol.py")
    (tmp_path / "keys").write_text("wFp3vJ0sXk9 name=alice\n")
    check = re.search(r'test: \[CMD, python, -c, "(.*)"\]', (HERE / "README.md").read_text())[1]
    moved = {"//host.docker.internal:11434": "//127.0.0.1:1", "//192.168.1.20:11434": "//127.0.0.1:2"}
    for words, total in zip(container_commands(), (3, 1), strict=True):
        assert words[:2] == ["python", "/app/sollol.py"] and sollol.parse_options(words[2:], {}).bind == "0.0.0.0"
        words = [re.sub("(^|=)/(app|state|keys)/", rf"\1{tmp_path}/", word) for word in words[1:]]
        for place, other in moved.items():
            words = [word.replace(place, other) for word in words]
        with program("bench.py", "--nodes", 1, "--port", 0) as node:
            port = re.search(r":(\d+)", read_until(node, r"http://\S+")[0])[1]
            words = [word.replace("//ollama", f"//localhost:{port}") for word in words]
            with program(*words, "--probe-interval", "0.2s", "--port", 0) as gateway:
                url = read_until(gateway, r"event=start .*url=(\S+)")[1].replace("0.0.0.0", "127.0.0.1")
                assert json.loads(curl(url + "/api/health"))["nodes"].items() >= {"up": 1, "total": total}.items()
                script = [sys.executable, "-c", check.replace("http://127.0.0.1:8000", url)]
                assert script[2] != check and not subprocess.run(script, timeout=30).returncode
                node.kill()
                read_until(gateway, "event=node .*state=down was=up")
                assert subprocess.run(script, capture_output=True, timeout=30).returncode
                gateway.send_signal(signal.SIGTERM)
                assert gateway.wait(10) == 0
    assert (tmp_path / "state.json").exists()


def test_compose_file_of_the_readme_is_what_it_should_be():
    compose, services = container_files()[0], container_files()[0]["services"]
    assert services["sollol"]["command"] == container_commands()[0]
    options = sollol.parse_options(services["sollol"]["command"][2:], {})
    assert [url.split()[0] for url in options.node][:2] == ["http://ollama", "http://host.docker.internal:11434"]
    assert services["sollol"]["extra_hosts"] == ["host.docker.internal:host-gateway"]
    assert services["open-webui"]["environment"] == {
        "OLLAMA_BASE_URL": "http://sollol:8000", "ENABLE_FORWARD_USER_INFO_HEADERS": "true"}
    assert options.port == 8000 and set(services) == {"sollol", "ollama", "open-webui"}
    volumes = {name for each in services.values() for name, _ in (volume.split(":", 1) for volume in each["volumes"])}
    assert volumes == {".", *compose["volumes"]} and options.state.startswith("/state/")
    assert {each["restart"] for each in services.values()} == {"unless-stopped"}
    assert float(services["sollol"]["stop_grace_period"].removesuffix("s")) > options.drain_timeout
    device, = container_files(uncomment=True)[0]["services"]["ollama"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and "deploy" not in services["ollama"]


def test_objects_of_kubernetes_in_the_readme_are_what_they_should_be():
    objects = container_files()[1]
    assert set(objects) == {("Service", "ollama"), ("Service", "sollol"), ("PodDisruptionBudget", "sollol"),
                            ("Deployment", "sollol")}
    nodes, deployment = objects["Service", "ollama"], objects["Deployment", "sollol"]
    pods, labels = deployment["template"]["spec"], deployment["template"]["metadata"]["labels"]
    container, = pods["containers"]
    assert container["command"] == container_commands()[1]
    options = sollol.parse_options(container["command"][2:], {})
    assert options.node == ["http://ollama resolve=all"] and deployment["replicas"] == 2
    assert nodes["clusterIP"] == "None" and nodes["ports"] == [{"port": 11434}]
    budget = objects["PodDisruptionBudget", "sollol"]
    assert budget["minAvailable"] == 1
    for selector in (deployment["selector"]["matchLabels"], budget["selector"]["matchLabels"],
                     objects["Service", "sollol"]["selector"]):
        assert selector == labels
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    kinds = {volume["name"]: {key: value for key, value in volume.items() if key != "name"}
             for volume in pods["volumes"]}
    assert [kinds.pop(mounts[path]) for path in ("/app", "/keys", "/state")] == [
        {"configMap": {"name": "sollol"}}, {"secret": {"secretName": "sollol"}}, {"emptyDir": {}}] and not kinds
    assert (options.keys, options.state) == ("/keys/keys", "/state/state.json")
    for name in ("readinessProbe", "livenessProbe"):
        probe = container[name]["httpGet"]
        assert probe["path"] in sollol.OPEN_PATHS and probe["port"] == container["ports"][0]["containerPort"] == 8000
    assert objects["Service", "sollol"]["ports"] == [{"port": 8000}]
    assert pods["terminationGracePeriodSeconds"] > options.drain_delay + options.drain_timeout
    assert (HERE / "sollol.py").stat().st_size < 2**20      # the most that a ConfigMap holds


def test_kubectl_makes_the_objects_that_the_readme_asks_of_it(tmp_path):
    """As far as it does without a cluster: with --dry-run=client."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    commands = [command.partition(" | ")[0] for command in readme_commands() if command.startswith("kubectl create")]
    assert len(commands) == 2
    (tmp_path / "sollol.py").symlink_to(HERE / "sollol.py")
    (tmp_path / "keys").write_text("wFp3vJ0sXk9 name=alice\n")
    for command in commands:
        words = [*shlex.split(command), *(["--dry-run=client", "-o", "yaml"] if "--dry-run" not in command else [])]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "HOME": str(tmp_path)})
        assert done.returncode == 0 and "\n  name: sollol\n" in done.stdout, done.stderr
    (tmp_path / "sollol.yaml").write_text(re.findall(r"(?ms)^```yaml\n(.*?)^```", (HERE / "README.md").read_text())[1])
    (tmp_path / "kustomization.yaml").write_text("resources: [sollol.yaml]\n")
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 0 and done.stdout.count("\nkind: ") == 4, done.stderr


# -----------------------------------------------------------------------------
# Upgrade: how does a new process take over?
# -----------------------------------------------------------------------------

class Sibling:
    """A process of the gateway, as far as an Upgrade needs it: a dispatcher over the nodes n1 and n2, and a clock."""

    now_s = 0.0                     # of all

    def __init__(self, slots=2):
        self.loop = self
        self.dispatcher = cluster(slots=slots, n1=["m"], n2=["m"])
        self.options = types.SimpleNamespace(inherited=sollol.Inherited(), demo=False)
        self.leaving = self.retired = self.is_ending = False
        self.upgrade, self.peers = sollol.Upgrade(self), sollol.Peers(self)
        self.tickets = []           # that wait or run

    def time(self):
        return Sibling.now_s

    def create_future(self):
        return types.SimpleNamespace(done=lambda: True)

    def ask(self, **more):
        """Let a request arrive."""
        self.tickets += enter(self.dispatcher, want(**more), now=self.time())
        sollol.pump(self)

    def answer(self, ticket):
        """Let a request end, whether it runs or waits."""
        self.tickets.remove(ticket)
        if self.dispatcher.leave(ticket, self.time()):
            sollol.pump(self)

    def running(self):
        """Return the nodes that its own requests run on."""
        return [ticket.lease.node.name for ticket in self.tickets if ticket.lease]


class Post:
    """The transport of a Peer in memory: messages wait until the test delivers them."""

    def __init__(self):
        self.messages, self.other, self.aborted = collections.deque(), None, False
        self.get_write_buffer_size = lambda: 0

    def write(self, data):
        self.messages.append(data)

    def deliver(self):
        self.other.data_received(self.messages.popleft())

    def abort(self):
        self.aborted = True


def join(old, new):
    """Let `new` take over from `old`, as `hand_over` and `take_over` do; return the two ways between them."""
    peers = [sollol.Neighbour(it.upgrade, sollol.SharedSlots(it.dispatcher)) for it in (old, new)]
    ways = [Post(), Post()]
    for peer, way, other in zip(peers, ways, reversed(peers), strict=True):
        peer.transport, way.other = way, other
    old.upgrade.successor, new.upgrade.predecessor = peers
    new.upgrade.turn.at = peers[1]
    peers[0].tell({"go": {"orders": []}, **peers[0].slots.news(old.upgrade.first_key_s(peers[0]))})
    ways[0].deliver()               # the new one accepts only from then on
    return ways


def deliver_all(ways):
    while any(way.messages for way in ways):
        for way in ways:
            if way.messages:
                way.deliver()


def test_what_runs_in_the_process_before_takes_its_slots_until_it_ends():
    old, new, Sibling.now_s = Sibling(), Sibling(), 0.0
    for number in range(6):
        old.ask(client=f"c{number}")
    assert len(old.running()) == 4
    ways = join(old, new)
    nodes = new.dispatcher.cluster.nodes
    assert [len(node.leases) for node in nodes.values()] == [2, 2]
    Sibling.now_s = 1.0
    new.ask()
    deliver_all(ways)
    assert new.running() == []
    for _ in range(2):              # what waited before goes first
        old.answer(next(ticket for ticket in old.tickets if ticket.lease))
        deliver_all(ways)
        assert new.running() == [] and len(old.running()) == 4
    ended = next(ticket for ticket in old.tickets if ticket.lease.node.name == "n2")
    old.answer(ended)
    deliver_all(ways)
    assert new.running() == ["n2"] and len(old.running()) == 3
    old.upgrade.lost(old.upgrade.successor)         # so does what runs in the process after it
    assert not any(lease.elsewhere for node in old.dispatcher.cluster.nodes.values() for lease in node.leases)
    new.upgrade.lost(new.upgrade.predecessor)
    assert [len(node.leases) for node in nodes.values()] == [0, 1]
    new.answer(new.tickets[0])


def test_what_runs_elsewhere_is_in_no_doubt_and_is_not_raced_and_its_node_is_not_measured():
    old, new = Sibling(), Sibling()
    old.ask(silent=True)
    join(old, new)
    (node,) = [node for node in new.dispatcher.cluster.nodes.values() if node.leases]
    assert new.dispatcher.watch(10_000.0) == ([], []) and not node.suspect and not node.may_measure(10_000.0)
    assert sollol.running_stats(node.leases[0], 0.0)["reason"] == "runs in another process of this gateway"


@pytest.mark.parametrize("seed", range(12 * FUZZ))
def test_processes_of_a_chain_never_give_one_slot_twice_and_nobody_waits_for_ever(seed, monkeypatch):
    """Whatever the order in which requests come, end and wait, and in which messages arrive.

    With few requests slots are free at times: one that is always taken anew by the same process shows no fault.
    """
    monkeypatch.setattr(sollol, "TURN_S", math.inf)     # a message may take as long as it likes
    rng = random.Random(seed)
    Sibling.now_s = 0.0
    chain, ways = [Sibling()], []
    for step in range(600):
        Sibling.now_s += rng.choice((0.0, 0.001, 0.01))
        one = rng.choice(chain)
        if step in (100, 150, 200, 400):
            chain.append(Sibling())
            ways += join(chain[-2], chain[-1])
        elif rng.random() < 0.4 and sum(len(it.tickets) for it in chain) < (6 if seed % 2 else 30):
            one.ask(priority=rng.randint(1, 10), client=rng.choice("abc"))
        elif rng.random() < 0.3 and one.tickets:
            one.answer(rng.choice(one.tickets))
        elif full := [way for way in ways if way.messages]:
            rng.choice(full).deliver()
        running = [node for it in chain for node in it.running()]
        assert max(collections.Counter(running).values(), default=0) <= 2, step
    while any(it.tickets for it in chain):
        deliver_all(ways)
        running = [(it, ticket) for it in chain for ticket in it.tickets if ticket.lease]
        assert running and len(running) == min(4, sum(len(it.tickets) for it in chain))
        it, ticket = rng.choice(running)
        it.answer(ticket)
    deliver_all(ways)
    assert not any(node.leases for it in chain for node in it.dispatcher.cluster.nodes.values())


def test_more_urgent_request_of_the_other_process_goes_first():
    old, new, Sibling.now_s = Sibling(slots=1), Sibling(slots=1), 0.0
    for _ in range(4):
        old.ask()
    ways = join(old, new)
    new.ask(priority=10)
    deliver_all(ways)
    old.ask()                       # the turn is with the old one now
    deliver_all(ways)
    assert old.upgrade.turn.at is None
    old.answer(old.tickets[0])
    deliver_all(ways)
    assert len(new.running()) == 1 and len(old.running()) == 1


def test_process_that_hangs_with_the_turn_holds_up_nobody_for_long():
    old, new = Sibling(), Sibling()
    Sibling.now_s = 5.0
    join(old, new)
    new.ask()
    assert new.running() == []
    Sibling.now_s += sollol.TURN_S / 2
    sollol.pump(new)
    assert new.running() == []
    Sibling.now_s += sollol.TURN_S
    sollol.pump(new)
    assert len(new.running()) == 1


@table("data", [("a row without numbers", [b'{"running": [[1, {}]]}\n']), ("gigabytes", [b"x" * 2**20] * 17)])
def test_process_that_talks_nonsense_is_heard_no_more(data):
    old, new = Sibling(), Sibling()
    join(old, new)
    process = new.upgrade.predecessor
    for piece in data:
        process.data_received(piece)
    assert process.transport.aborted and len(process.buffer) < 2**25


@pytest.fixture
def third_descriptor():
    """Leave descriptor 3 to a test: what is there now comes back."""
    try:
        kept = os.dup(3)
    except OSError:
        kept = None
    yield
    if kept is None:
        with contextlib.suppress(OSError):
            os.close(3)
    else:
        os.dup2(kept, 3)
        os.close(kept)


@table("environ, kind, expected", [
    ("none", {}, "listens", 0), ("of another process", {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, "listens", 0),
    ("one", {"LISTEN_PID": "7", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}, "listens", 1),
    ("none told", {"LISTEN_PID": "7", "LISTEN_FDS": "0"}, "listens", 0),
    ("no number", {"LISTEN_PID": "7", "LISTEN_FDS": "x"}, "listens", "LISTEN_FDS: 'x' is no number up to 16"),
    ("too many", {"LISTEN_PID": "7", "LISTEN_FDS": "99"}, "listens", "LISTEN_FDS: '99' is no number up to 16"),
    ("not listening", {"LISTEN_PID": "7", "LISTEN_FDS": "1"}, "bound", "descriptor 3 is no socket that listens"),
    ("no TCP", {"LISTEN_PID": "7", "LISTEN_FDS": "1"}, "unix", "descriptor 3 is no socket that listens for TCP"),
    ("no socket", {"LISTEN_PID": "7", "LISTEN_FDS": "1"}, "file", "descriptor 3 is no socket that listens"),
])
def test_sockets_of_a_supervisor_are_taken(environ, kind, expected, third_descriptor, tmp_path):
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as given, tempfile.TemporaryFile() as file:
        given.bind(str(tmp_path / "unix") if kind == "unix" else ("127.0.0.1", 0))
        if kind != "bound":
            given.listen()
        os.dup2(file.fileno() if kind == "file" else given.fileno(), 3)
        if isinstance(expected, str):
            with pytest.raises(sollol.ConfigError, match=re.escape(expected)):
                sollol.passed_sockets(environ, 7)
            return
        sockets = sollol.passed_sockets(environ, 7)
        assert len(sockets) == expected and not environ.keys() & {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}
        for taken in sockets:
            assert taken.getsockname() == given.getsockname() and not taken.get_inheritable()
            taken.detach()


def handed(*messages, descriptors=1):
    """Return the end of a socket pair to which a process before this one has sent a hello and gone."""
    ours, theirs = socket.socketpair()
    with ours, socket.create_server(("127.0.0.1", 0)) as listens:
        socket.send_fds(ours, [b" "], [2, *[listens.fileno()] * descriptors, 1])
        for message in messages:
            ours.sendall(message)
    return str(theirs.detach())


def test_new_process_gets_sockets_what_was_learned_and_what_scans_have_found():
    state = {**sollol.STATE_FORMAT, "nodes": [{"name": "a"}], "lengths": {}}
    hello = {"hello": {"state": state, "scanned": [["10.0.0.1", 11434, 2]], "is_waited_for": True}}
    raw = json.dumps(hello).encode() + b"\n"
    got = sollol.inherit(handed(raw[:50], raw[50:]))
    with got.channel, got.sockets[0] as listens:
        assert listens.getsockname()[0] == "127.0.0.1" and got.learned == state and got.lifeline
        assert got.scanned == {("10.0.0.1", 11434): 2} and os.fstat(got.stderr).st_ino == os.fstat(2).st_ino
        os.close(got.stderr)
        os.close(got.lifeline)


@listed("message", [b"", b'{"hello": ', b"[]\n", b"{}\n", b'{"hello": {"state": {}}}\n', b"\xff\n"])
def test_new_process_that_is_told_nothing_of_use_says_so(message):
    with pytest.raises(sollol.ConfigError, match="SOLLOL_PREDECESSOR: the process before says nothing of use: "):
        sollol.inherit(handed(message, descriptors=0))
    with pytest.raises(sollol.ConfigError, match="SOLLOL_PREDECESSOR: "):
        sollol.inherit("no number")


@over_sockets
async def test_nodes_that_scans_have_found_are_known_to_the_new_process_before_it_has_scanned(monkeypatch):
    node = await bench.SimNode(**FAST).start()
    inherited = sollol.Inherited(scanned={("127.0.0.1", node.port): 0})
    monkeypatch.setattr(sollol, "Inherited", lambda: inherited)
    async with gateway_for(lines="") as gateway:
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
    await node.stop()


@over_sockets
async def test_history_of_the_day_is_known_to_the_new_process_without_a_state_file(monkeypatch):
    node = await bench.SimNode(**FAST).start()
    async with gateway_for(lines=node.url) as gateway:
        gateway.telemetry.sweep(gateway.loop.time())
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
        ours, theirs = socket.socketpair()
        peer = sollol.Neighbour(gateway.upgrade, sollol.SharedSlots(gateway.dispatcher))
        await peer.connect(ours)
        gateway.upgrade.greet(peer, ours)
        inherited = sollol.inherit(str(theirs.detach()))
        peer.transport.abort()
    for passed in (inherited.channel, *inherited.sockets):
        passed.close()
    monkeypatch.setattr(sollol, "Inherited", lambda: inherited._replace(channel=None, sockets=()))
    async with gateway_for(lines=node.url) as gateway:
        assert [part.requests for part in gateway.telemetry.history.parts] == [1]
    await node.stop()


class Upgradable:
    """A folder with a copy of the program, one slow node with two slots, and what starts the gateway there."""

    def __init__(self, folder, node_url):
        self.folder, self.path = folder, folder / "sollol.py"
        shutil.copy(HERE / "sollol.py", self.path)
        self.hosts = folder / "hosts.txt"
        self.hosts.write_text(f"{node_url} name=a slots=2\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # By a relative path, as the new one must find the same.
        self.argv = ["sollol.py", "--hosts", "hosts.txt", "--state", "state.json", "--port", str(self.port)]

    def get(self, path):
        return json.loads(curl(f"http://127.0.0.1:{self.port}{path}"))

    def connect(self, data=b""):
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        client.sendall(data)
        return client

    def stream(self, tokens):
        """Begin a stream on a connection of its own."""
        return self.connect(posted(generate(tokens=tokens, stream=True, options={"temperature": 0})))


@pytest.fixture
def upgradable(tmp_path):
    """Run a simulated node, and yield an Upgradable in front of it."""
    with program("bench.py", "--nodes", 1, "--port", 0, "--speed", 2) as node:
        yield Upgradable(tmp_path, read_until(node, r"http://\S+")[0])


def stream_on(client):
    """Return the rest of a stream on a connection that may be kept, to its last chunk."""
    whole = b""
    while not whole.endswith(b"0\r\n\r\n") and (piece := client.recv(65536)):
        whole += piece
    return whole


def answer_on(client):
    """Return (status, fields) of the next answer with a length on a connection; its body is read, too."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
    while len(body) < int(fields["content-length"]):
        body += client.recv(65536)
    return int(head[9:12]), fields


def upgraded(gateway):
    """Upgrade a program that logs into a file; return (the new process, the line of the log), once that serves."""
    begun, done = "event=start version", r".*level=info event=upgrade pid=(\d+) .*"
    starts, lines = all_output(gateway).count(begun), len(re.findall(done, all_output(gateway)))
    gateway.send_signal(signal.SIGUSR2)
    deadline_s = time.monotonic() + 30
    while not (all_output(gateway).count(begun) > starts and len(re.findall(done, all_output(gateway))) > lines):
        assert gateway.poll() is None and time.monotonic() < deadline_s, all_output(gateway)
        time.sleep(0.02)
    line = list(re.finditer(done, all_output(gateway)))[-1]
    return int(line[1]), line[0]


@pytest.mark.parametrize("flags", [[], ["--no-uvloop"]], ids=["uvloop", "asyncio"])
def test_upgrade_refuses_nobody_and_breaks_nothing_off(flags, upgradable):
    """Two in a row, with streams that run and wait, an idle connection, a drained node's order and what was learned."""
    it, answers = upgradable, []
    with program(*it.argv, *flags, cwd=it.folder) as gateway:
        read_until(gateway, "event=start .*url=")
        assert curl(f"http://127.0.0.1:{it.port}/api/generate", generate(tokens=40))
        decode_tok_s = it.get("/api/stats")["nodes"][0]["models"]["llama3.2:latest"]["decode_tok_s"]
        idle = it.connect(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer_on(idle)[1].get("connection") != "close"
        streams = [it.stream(900), it.stream(1000), it.stream(30)]
        for stream in streams[:2]:
            assert stream.recv(12) == b"HTTP/1.1 200"
        for number in range(2):
            it.path.write_text(it.path.read_text().replace('__version__ = "', f'__version__ = "{number}.'))
            pid, line = upgraded(gateway)
            assert re.search("running=2 queued=[01]$", line)
            now = it.get("/api/stats")
            assert now["version"].startswith(f"{number}.") and now["uptime_s"] < 5
            assert now["nodes"][0]["inflight"] == 2
            assert now["nodes"][0]["models"]["llama3.2:latest"]["decode_tok_s"] == decode_tok_s
            answers.append(it.stream(20))           # it waits for a slot of the first process
        idle.sendall(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, fields = answer_on(idle)
        assert status == 200 and fields["connection"] == "close" and idle.recv(1) == b""
        for client in (*streams, *answers):
            whole = stream_on(client)
            assert b'"done":true' in whole and whole.endswith(b"0\r\n\r\n")
        read_until(gateway, "event=stop")
        read_until(gateway, "event=stop")
        assert it.get("/api/health")["inflight"] == 0 and gateway.poll() is None
        rows = it.get("/api/usage?by=model")
        assert [row["requests"] for row in rows["rows"]] == [6]
        os.kill(gateway.pid, signal.SIGHUP)         # which goes on to the last one
        os.kill(gateway.pid, signal.SIGTERM)
        assert gateway.wait(10) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        said = all_output(gateway)
        assert said.count("event=stop") == 3 and "level=error" not in said and "Traceback" not in said
    assert sollol.parse_state((it.folder / "state.json").read_bytes())["nodes"]


def test_process_between_two_others_stays_until_the_one_before_it_has_ended(upgradable):
    """Else nobody would tell the last one what the first one still runs."""
    it = upgradable
    with program(*it.argv, cwd=it.folder) as gateway:
        read_until(gateway, "event=start .*url=")
        stream = it.stream(2000)
        assert stream.recv(12) == b"HTTP/1.1 200"
        for _ in range(2):
            upgraded(gateway)
        time.sleep(0.5)
        assert it.get("/api/stats")["nodes"][0]["inflight"] == 1 and "event=stop" not in all_output(gateway)
        assert b'"done":true' in stream_on(stream)
        for _ in range(2):
            read_until(gateway, "event=stop")
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(10) == 0


def test_first_process_ends_as_the_last_one_does(upgradable):
    it = upgradable
    with program(*it.argv, cwd=it.folder) as gateway:
        read_until(gateway, "event=start .*url=")
        pid, _ = upgraded(gateway)
        read_until(gateway, "event=stop")
        assert gateway.poll() is None
        os.kill(pid, signal.SIGKILL)
        assert gateway.wait(10) == 128 + signal.SIGKILL


def test_successor_of_a_process_that_was_killed_leaves_the_port_and_finishes_its_requests(upgradable):
    it = upgradable
    with program(*it.argv, cwd=it.folder) as gateway:
        read_until(gateway, "event=start .*url=")
        pid, _ = upgraded(gateway)
        read_until(gateway, "event=stop")
        stream = it.stream(1000)
        assert stream.recv(12) == b"HTTP/1.1 200"
        gateway.kill()
        deadline_s = time.monotonic() + 10
        while "the first process was killed" not in all_output(gateway):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        with program(*it.argv, cwd=it.folder) as another:
            read_until(another, "event=start .*url=")
            assert b'"done":true' in stream_on(stream)
    while pathlib.Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


# Ends as if the program had been given less time to get ready.
HURRIED = "import sollol, sys; sollol.UPGRADE_S = 5.0; sys.argv[0] = 'sollol.py'; sys.exit(sollol.main())"


@table("change, why", [
    ("no Python", lambda it: it.path.write_text(it.path.read_text() + "this is no Python\n"),
     r"SyntaxError: .* \(sollol.py:\d+\)"),
    ("bad file", lambda it: it.hosts.write_text("http://a:x\n"), "hosts.txt:1: .*"),
    ("another program", lambda it: it.path.write_text("def main():\n    return 3\n"), "it ended with status 3"),
    ("too old", lambda it: it.path.write_text(it.path.read_text().replace(
        'channel = os.environ.pop(PREDECESSOR, "")', 'channel = ""')), "sollol.py: unknown variable .*"),
    ("not ready", lambda it: it.path.write_text("import time\n\n\ndef main():\n    time.sleep(99)\n"),
     "it was not ready within 5 s"),
])
def test_upgrade_that_fails_costs_one_line_of_the_log(change, why, upgradable):
    it = upgradable
    with program("-c", HURRIED, *it.argv[1:], cwd=it.folder) as gateway:
        read_until(gateway, "event=start .*url=")
        stream = it.stream(300)
        assert stream.recv(12) == b"HTTP/1.1 200"
        before, before_text = len(all_output(gateway).splitlines()), it.path.read_text()
        hosts = it.hosts.read_text()
        change(it)
        gateway.send_signal(signal.SIGUSR2)
        read_until(gateway, f'level=error event=upgrade refused="{why}"$')
        it.hosts.write_text(hosts)
        usual = "event=(reload|request|calibrated)"     # the bad file is seen by the old one, too
        new = [line for line in all_output(gateway).splitlines()[before:] if not re.search(usual, line)]
        assert len(new) == 1, new
        assert b'"done":true' in stream_on(stream)
        it.path.write_text(before_text)
        upgraded(gateway)
        assert it.get("/api/health")["status"] == "ok"
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(10) == 0


def test_demo_is_not_upgraded():
    with program("sollol.py", "--demo", "--port", 0) as gateway:
        read_until(gateway, "event=start .*url=")
        gateway.send_signal(signal.SIGUSR2)
        read_until(gateway, 'event=upgrade refused="the simulated nodes of --demo are in this process"')
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(10) == 0


def test_stop_during_an_upgrade_ends_both(upgradable):
    it = upgradable
    with program("-c", HURRIED.replace("5.0", "30.0"), *it.argv[1:], cwd=it.folder) as gateway:
        read_until(gateway, "event=start .*url=")
        it.path.write_text(f"import os, time\n\n\ndef main():\n    open({str(it.folder / 'pid')!r}, 'w').write("
                           "str(os.getpid()))\n    time.sleep(99)\n")
        gateway.send_signal(signal.SIGUSR2)
        deadline_s = time.monotonic() + 10
        while not ((it.folder / "pid").exists() and (it.folder / "pid").read_text()):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        gateway.send_signal(signal.SIGTERM)
        read_until(gateway, 'event=upgrade refused="this process ends"')
        assert gateway.wait(10) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(int((it.folder / "pid").read_text()), 0)


class Manager:
    """As much of a service manager as the program sees: it passes a listening socket, and hears who says what."""

    def __init__(self, folder):
        self.path = str(folder / "notify")
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(self.path)
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.channel.settimeout(20)

    def hear(self):
        """Return (pid, message) of the next message that is no ping of the watchdog."""
        while True:
            data, ((_, _, credentials), *_), _, _ = self.channel.recvmsg(4096, 1024)
            if data != b"WATCHDOG=1":
                return struct.unpack("3i", credentials)[0], data.decode()

    def pings(self, count):
        """Return who sends the next pings of the watchdog."""
        pids = set()
        while count:
            data, ((_, _, credentials), *_), _, _ = self.channel.recvmsg(4096, 1024)
            if data == b"WATCHDOG=1":
                pids.add(struct.unpack("3i", credentials)[0])
                count -= 1
        return pids


# Becomes another program, with a listening socket as sd_listen_fds(3) tells.
WITH_SOCKET = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_PID=str(os.getpid()), "
               "LISTEN_FDS='1'); os.execv(sys.argv[2], sys.argv[2:])")


def test_upgrade_under_a_service_manager(upgradable):
    """A test double of systemd: its protocol over a real socket. It knows each time which process is the main one."""
    it, manager = upgradable, Manager(upgradable.folder)
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.closing(manager.channel):
        it.port = listening.getsockname()[1]
        words = [sys.executable, *it.argv[:-2]]         # no port: that of the socket
        with open(it.folder / "log", "wb") as log:
            old = subprocess.Popen([sys.executable, "-c", WITH_SOCKET, str(listening.fileno()), *words], cwd=it.folder,
                                   pass_fds=(listening.fileno(),), stderr=log,
                                   env={**os.environ, "NOTIFY_SOCKET": manager.path})
        try:
            listening.close()
            assert manager.hear() == (old.pid, "READY=1")
            stream = it.stream(600)
            assert stream.recv(12) == b"HTTP/1.1 200"
            old.send_signal(signal.SIGUSR2)
            assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", manager.hear()[1])
            pid, said = manager.hear()
            new = int(re.fullmatch(r"MAINPID=(\d+)\nREADY=1", said)[1])
            assert pid == old.pid and manager.hear() == (new, "READY=1")
            assert manager.pings(3) == {new}
            assert it.get("/api/health")["uptime_s"] < 5
            assert b'"done":true' in stream_on(stream) and old.wait(10) == 0
            good = it.path.read_text()
            it.path.write_text("no Python\n")
            os.kill(new, signal.SIGUSR2)
            assert manager.hear()[1].startswith("RELOADING=1\n") and manager.hear() == (new, "READY=1")
            it.path.write_text(good)
            assert it.get("/api/health")["status"] == "ok"
            os.kill(new, signal.SIGTERM)
            assert manager.hear() == (new, "STOPPING=1")
            deadline_s = time.monotonic() + 10
            while "event=stop" not in (it.folder / "log").read_text().splitlines()[-1]:
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
        finally:
            old.kill()
            old.wait()
            with contextlib.suppress(ProcessLookupError, UnboundLocalError):
                os.kill(new, signal.SIGKILL)


def test_process_1_of_a_container_stays_and_passes_signals_on(upgradable):
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespace of processes can be made here")
    it = upgradable
    with open(it.folder / "log", "wb") as log, \
         subprocess.Popen([*alone, sys.executable, *it.argv], cwd=it.folder, stderr=log) as container:
        try:
            def wait_for(event, count):
                deadline_s = time.monotonic() + 20
                while (it.folder / "log").read_text().count(f"event={event} ") < count:
                    assert time.monotonic() < deadline_s and container.poll() is None
                    time.sleep(0.02)

            wait_for("start", 1)
            children = pathlib.Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
            stream = it.stream(300)
            assert stream.recv(12) == b"HTTP/1.1 200"
            for number in range(2, 4):
                os.kill(int(children[0]), signal.SIGUSR2)
                wait_for("upgrade", number - 1)
                wait_for("start", number)
                assert it.get("/api/health")["uptime_s"] < 5
            assert b'"done":true' in stream_on(stream)
            os.kill(int(children[0]), signal.SIGTERM)
            assert container.wait(10) == 0
        finally:
            container.kill()


# -----------------------------------------------------------------------------
# Peers: what do other gateways before the same nodes do?
# -----------------------------------------------------------------------------

def join_peers(*gateways):
    """Let gateways know of each other, each also of itself."""
    for gateway in gateways:
        gateway.options.peer, certificate = [], gateway.options.tls_cert
        for number, other in enumerate(gateways):
            url = f"{'https' if certificate else 'http'}://127.0.0.1:{other.listener.address[1]} name=p{number}"
            gateway.options.peer.append(sollol.parse_peer(f"{url} ca={certificate}" if certificate else url))
        gateway.join()


def peers_of(gateway):
    """Return {name: (state, why)} of the peers in /api/stats."""
    stats = json.loads(sollol.answer_stats(gateway, sollol.EVERY_MODEL)[1])
    return {peer["name"]: (peer["state"], peer["why"]) for peer in stats["peers"]}


def elsewhere(gateway):
    """Return the leases of what runs at peers."""
    return [lease for node in gateway.dispatcher.cluster.nodes.values() for lease in node.leases if lease.elsewhere]


@contextlib.asynccontextmanager
async def gateways_for(count, *nodes, **given):
    """Run gateways before the same nodes, as peers that have heard of each other; yield them."""
    async with contextlib.AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(gateway_for(*nodes, **given)) for _ in range(count)]
        join_peers(*gateways)
        await until(lambda: all([state for state, _ in peers_of(gateway).values()].count("up") == count - 1
                                for gateway in gateways))
        yield gateways


@pytest.mark.parametrize("count", [2, 3])
@over_sockets
async def test_peers_never_give_a_slot_twice_and_go_by_priority(count):
    node = fixed(1, speed=20)
    async with gateways_for(count, node) as gateways:
        node.hang()                 # until all wait
        first = asyncio.create_task(call(gateways[0], "POST", "/api/generate", generate(tokens=20)))
        await until(lambda: all(len(elsewhere(gateway)) == 1 for gateway in gateways[1:]))
        done = []

        async def ask(gateway, priority):
            answer = await call(gateway, "POST", "/api/generate", generate(tokens=20), X_Priority=str(priority))
            assert answer.status == 200
            done.append(priority)

        tasks = []
        for number, priority in enumerate((2, 5, 4, 8, 3, 7)):
            tasks.append(asyncio.create_task(ask(gateways[number % count], priority)))
            await until(lambda: sum(health(gateway)["queued"] for gateway in gateways) == len(tasks))
        node.recover()
        await asyncio.gather(first, *tasks)
        assert done == [8, 7, 5, 4, 3, 2] and node.max_in_flight == 1
        await until(lambda: not any(map(elsewhere, gateways)))
        assert not any(gateway.dispatcher.waiting.first("llama3.2:latest") for gateway in gateways)


@over_sockets
async def test_slots_and_speeds_that_one_peer_has_learned_are_known_to_the_others():
    node = bench.SimNode("rtx3060", slots=4, loaded=("llama3.2",), speed=20)
    async with gateways_for(2, node) as (one, two):
        for _ in range(4):
            await asyncio.gather(*(call(one, "POST", "/api/generate", generate(tokens=60, stream=True))
                                   for _ in range(4)))

        def known(gateway):
            (it,) = gateway.dispatcher.cluster.nodes.values()
            return it.runners["llama3.2:latest"]

        assert known(one).slots.count > 1
        await until(lambda: known(two).slots.count == known(one).slots.count and known(two).speeds.samples)
        assert 0.5 < known(two).speeds.decode_s / known(one).speeds.decode_s < 2


@over_sockets
async def test_load_that_a_peer_has_begun_is_known_and_its_models_are_in_use():
    node = bench.SimNode("rtx3060", models=("llama3.2", "mistral"), slots=1, speed=5)
    node.line = "slots=1"
    async with gateways_for(2, node) as (one, two):
        task = asyncio.create_task(call(one, "POST", "/api/generate", generate(tokens=30)))
        await until(lambda: elsewhere(two))
        (lease,) = elsewhere(two)
        assert lease.loads and lease.slot.ready_s is not None and lease in lease.node.loading
        assert sollol.used_lately(lease.slot, two.loop.time())
        assert sollol.running_stats(lease, two.loop.time())["reason"] == "runs at p0"
        assert (await task).status == 200
        await until(lambda: not elsewhere(two))
        assert not lease.node.loading and lease.slot.ready_s is not None


@over_sockets
async def test_peer_that_dies_gives_back_its_slots_and_one_that_comes_back_is_heard_again():
    node = fixed(1, speed=2)
    async with gateway_for(node) as one:
        lines = f"{node.url} slots=1"
        async with gateway_for(lines=lines) as two:
            join_peers(one, two)
            port = two.listener.address[1]
            await until(lambda: peers_of(one)["p1"][0] == "up")
            lost = asyncio.create_task(call(two, "POST", "/api/generate", generate(tokens=500)))
            await until(lambda: elsewhere(one))
            task = asyncio.create_task(call(one, "POST", "/api/generate", generate(tokens=5)))
            await until(lambda: health(one)["queued"] == 1)
            two.listener.abort()
            two.listener.close()
            for peer in two.peers.tasks.values():
                peer.cancel()
            await asyncio.gather(lost, return_exceptions=True)
            assert (await task).status == 200
            await until(lambda: peers_of(one)["p1"][0] == "down" and not elsewhere(one))
        async with gateway_for(lines=lines, flags=["--port", str(port)]) as three:
            await until(lambda: peers_of(one)["p1"][0] == "up")
            task = asyncio.create_task(call(three, "POST", "/api/generate", generate(tokens=5)))
            await until(lambda: elsewhere(one))
            assert (await task).status == 200


def peer_line(**news):
    """Return a first line that a peer tells."""
    return json.dumps({**sollol.PEER_FORMAT, "gateway": "other", "now_s": 1000.0, **news}).encode() + b"\n"


PEER_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n"


def running_row(node, **more):
    """Return the row of a request that runs at a peer."""
    return {"id": "r", "server": [node.url, node.url.removeprefix("http://")], "node": "x", "model": "llama3.2:latest",
            "loaded_s": None, "stream": True, "embeds": False, "sent_s": 999.0, "predicted_end_s": 1001.0,
            "prompt_tokens": 10, "new_tokens": 10, "output_tokens": 50, "begun": True, "lines": 1, **more}


WAITING_ROW = {"id": "w", "model": "llama3.2:latest", "stream": True, "embeds": False, "key_s": 900.0, "since_s": 900.0,
               "prompt_tokens": 10, "output_tokens": 50, "inputs": 0}


@contextlib.asynccontextmanager
async def scripted_peer(node, *items, beside=()):
    """Run a gateway before a node and those beside it, whose peer tells what a test gives; yield the gateway."""
    peer = await ScriptedNode(lambda request: [PEER_HEAD, *items, 3600.0]).start()
    async with gateway_for(node, *beside, flags=["--peer", f"{peer.url} name=p"]) as gateway:
        yield gateway
    await peer.stop()


@over_sockets
async def test_node_that_a_peer_measures_has_its_slots_and_is_not_measured():
    node = fixed(1, **FAST)
    await node.start()
    lines = [peer_line(running=[(1, running_row(node, measures=True))]), 1.0, b'{"now_s":1,"ended":[1]}\n']
    async with scripted_peer(node, *lines) as gateway:
        (it,) = gateway.dispatcher.cluster.nodes.values()
        await until(lambda: elsewhere(gateway))
        assert not it.may_measure(math.inf)
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert answer.status == 200 and float(answer.fields["x-sollol-queue-ms"]) < 500
        await until(lambda: not elsewhere(gateway))
        assert it.may_measure(math.inf)


@over_sockets
async def test_peer_that_hangs_counts_no_longer_and_delays_nobody():
    node = fixed(1, **FAST)
    await node.start()
    async with scripted_peer(node, peer_line(running=[(1, running_row(node))], waiting=[(2, WAITING_ROW)])) as gateway:
        await until(lambda: elsewhere(gateway))
        (lease,) = elsewhere(gateway)
        assert gateway.loop.time() - lease.sent_s < 2       # by its own clock that was at 999 s
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert answer.status == 200 and float(answer.fields["x-sollol-queue-ms"]) < 1000 * (sollol.PEER_SILENT_S + 1)
        assert peers_of(gateway)["p"] == ("down", "silent for 2 s")


@over_sockets
async def test_slot_that_is_left_to_a_peer_and_not_taken_is_given():
    node = fixed(1, **FAST)
    await node.start()
    waiting = [(number, {**WAITING_ROW, "id": f"w{number}"}) for number in range(3)]
    async with scripted_peer(node, peer_line(waiting=waiting)) as gateway:
        await until(lambda: peers_of(gateway)["p"][0] == "up")
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert 1000 * sollol.LEFT_S <= float(answer.fields["x-sollol-queue-ms"]) < 20_000 * sollol.LEFT_S
        assert sum(map(len, gateway.dispatcher.waiting.heaps.values())) == 3
        await until(lambda: peers_of(gateway)["p"][0] == "down")
        assert gateway.dispatcher.waiting.first("llama3.2:latest") is None


@table("kind, theirs, count, retries", [
    ("more, known before", "known", 4, 4, False), ("fewer, known before", "known", 1, 2, False),
    ("more, since then", "learned", 4, 4, False), ("fewer, since then", "learned", 1, 1, True)])
@over_sockets
async def test_slots_of_a_peer_are_taken_over_if_they_are_more_or_news(kind, theirs, count, retries):
    node = bench.SimNode(slots=4, loaded=("llama3.2",), **FAST)
    await node.start()
    lesson = {"name": "x", "url": node.url, "host": node.url.removeprefix("http://"),
              "models": {"llama3.2:latest": {"count": theirs, "max_proven": 4, "rejections": int(theirs == 1)}}}
    learned = asyncio.Event()

    async def tell(_, writer):
        await learned.wait()
        writer.write(peer_line() + json.dumps({kind: [lesson], "now_s": 0}).encode() + b"\n")

    async with scripted_peer(node, tell) as gateway:
        (it,) = gateway.dispatcher.cluster.nodes.values()
        known = it.runners["llama3.2:latest"]
        known.confirm_slots(2, gateway.loop.time())
        lesson["models"]["llama3.2:latest"]["digest"] = sollol.digest_of(it, "llama3.2:latest")
        learned.set()
        await until(lambda: peers_of(gateway)["p"][0] == "up")
        assert known.slots.count == count and (known.slots.retry_at_s > gateway.loop.time()) is retries


@listed("line", [
    b"\n" + b"no JSON\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 100_000 + b"\n", peer_line(version=2),
    peer_line(now_s=None), peer_line(now_s="x"), peer_line(now_s=math.nan), peer_line(running=3),
    peer_line(running=[[1]]),
    peer_line(running=[[1, {}]]), peer_line(ended=[[]]), peer_line(waiting=[[1, {"model": "llama3.2:latest"}]]),
    peer_line(waiting=[[1, {**WAITING_ROW, "key_s": math.inf}]]), peer_line(learned=[{}]), peer_line(learned=3),
    peer_line(waiting=[[number, WAITING_ROW] for number in range(sollol.MOST_TOLD + 1)]),
    b"x" * (sollol.MAX_LINE_BYTES + 1)])
@over_sockets
async def test_peer_that_talks_nonsense_counts_for_nothing(line):
    node = fixed(1, **FAST)
    await node.start()
    async with scripted_peer(node, line) as gateway:
        await until(lambda: peers_of(gateway)["p"][1] != "not asked yet")
        state, why = peers_of(gateway)["p"]
        assert state == "down" and re.search("says what no peer says|a line without end", why)
        assert not elsewhere(gateway) and gateway.dispatcher.waiting.first("llama3.2:latest") is None
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert answer.status == 200 and float(answer.fields["x-sollol-queue-ms"]) < 10


@over_sockets
async def test_peer_that_says_nothing_at_all_counts_no_longer():
    node = fixed(1, **FAST)
    await node.start()
    told = [peer_line(running=[(1, running_row(node))])]
    peer = await ScriptedNode(lambda request: [PEER_HEAD, *(told and [told.pop()])]).start()
    async with gateway_for(node, flags=["--peer", f"{peer.url} name=p"]) as gateway:
        await until(lambda: elsewhere(gateway))
        await until(lambda: peers_of(gateway)["p"] == ("down", "ends its answer without a word"))
        assert not elsewhere(gateway) and (await call(gateway, "POST", "/api/generate", generate())).status == 200
    await peer.stop()


@over_sockets
async def test_peer_that_begins_anew_keeps_the_slots_of_what_still_runs_there():
    """As after its upgrade, when another process of it answers."""
    node, answers = fixed(1, **FAST), itertools.count()
    await node.start()

    def script(_):
        line = peer_line(gateway=f"process {next(answers)}", running=[(1, running_row(node))])
        return [PEER_HEAD, line, 0.2 if line.count(b"process 0") else 3600.0]

    peer = await ScriptedNode(script).start()
    async with gateway_for(node, flags=["--peer", f"{peer.url} name=p"]) as gateway:
        await until(lambda: elsewhere(gateway))
        task = asyncio.create_task(call(gateway, "POST", "/api/generate", generate()))
        await until(lambda: len(peer.requests) == 2)
        await asyncio.sleep(0.2)
        assert health(gateway)["queued"] == 1 and peers_of(gateway)["p"][0] == "up"
        assert (await task).status == 200       # once the peer has been silent for long
    await peer.stop()


@over_sockets
async def test_no_connection_to_a_peer_that_refuses_is_kept(monkeypatch):
    monkeypatch.setattr(sollol, "PEER_RETRY_S", 0.05)
    node = fixed(1, **FAST)
    await node.start()
    peer = await ScriptedNode(lambda request: [framed(b"{}", b"404 Not Found"), KEEP]).start()
    async with gateway_for(node, flags=["--peer", f"{peer.url} name=p"]):
        await until(lambda: len(peer.requests) > 3)
        assert len(peer.connections) <= 2
    await peer.stop()


@listed("row", [{"model": 5}, {"model": "x" * 1000}, {"lines": "many"}, {"output_tokens": -1}, {"sent_s": None}])
@over_sockets
async def test_row_of_a_peer_that_cannot_be_is_nonsense(row):
    node = fixed(1, **FAST)
    await node.start()
    async with scripted_peer(node, peer_line(running=[(1, running_row(node, **row))])) as gateway:
        await until(lambda: "says what no peer says" in peers_of(gateway)["p"][1])
        assert not elsewhere(gateway) and (await call(gateway, "POST", "/api/generate", generate())).status == 200


@over_sockets
async def test_peer_with_thousands_of_requests_on_one_node_delays_nobody():
    node, other = fixed(1, **FAST), fixed(1, models=("mistral",), **FAST)
    await node.start()
    await other.start()
    rows, told = range(2000), asyncio.Event()
    line = peer_line(running=[(number, running_row(node)) for number in rows])

    async def tell(_, writer):
        await told.wait()
        writer.write(json.dumps({"now_s": 1000.0, "ended": list(rows)}).encode() + b"\n")

    async with scripted_peer(node, line, tell, beside=[other]) as gateway:
        await until(lambda: elsewhere(gateway))
        assert len(elsewhere(gateway)) == sollol.MOST_ON_NODE
        answer = await call(gateway, "POST", "/api/generate", generate("mistral"))
        assert answer.status == 200 and float(answer.fields["x-sollol-queue-ms"]) < 500
        told.set()
        await until(lambda: not elsewhere(gateway))


@over_sockets
async def test_request_of_which_a_peer_tells_nothing_for_long_counts_no_longer(monkeypatch):
    monkeypatch.setattr(sollol, "PEER_LEASE_S", 0.2)
    node = fixed(1, **FAST)
    await node.start()
    lines = [item for _ in range(20) for item in (b'{"now_s":1}\n', 0.2)]
    async with scripted_peer(node, peer_line(running=[(1, running_row(node))]), *lines) as gateway:
        await until(lambda: elsewhere(gateway))
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
        assert peers_of(gateway)["p"][0] == "up" and not elsewhere(gateway)


@over_sockets
async def test_gateway_among_its_own_peers_and_a_peer_with_two_names_count_once():
    async with gateways_for(2, fixed(1)) as (one, two):
        one.options.peer.append(sollol.parse_peer(f"http://localhost:{two.listener.address[1]} name=again"))
        one.join()
        await until(lambda: peers_of(one)["again"][0] != "down")
        assert peers_of(one) == {"p0": ("itself", "this gateway"), "p1": ("up", None),
                                 "again": ("itself", "the same as p1")}
        assert peers_of(two) == {"p0": ("up", None), "p1": ("itself", "this gateway")}


@table("own, theirs, is_near, expected", [
    ("one URL, two names", "http://gpu:1 name=a", "http://gpu:1 name=b", False, True),
    ("one name, two URLs", "http://gpu:1 name=a", "http://10.0.0.1:1 name=a", False, True),
    ("neither", "http://gpu:1 name=a", "http://10.0.0.1:1 name=b", False, False),
    ("localhost here and there", "http://localhost:1", "http://localhost:1", False, False),
    ("localhost, two names", "http://localhost:1 name=a", "http://localhost:1 name=b", False, False),
    ("localhost by name", "http://localhost:1 name=a", "http://10.0.0.1:1 name=a", False, True),
    ("localhost of one machine", "http://localhost:1", "http://localhost:1", True, True),
    ("behind one proxy", "http://gpu:1 host=x name=a", "http://gpu:1 host=y name=b", False, False)])
def test_nodes_of_peers_are_known_by_url_or_name(own, theirs, is_near, expected):
    dispatcher = sollol.Dispatcher()
    dispatcher.cluster.configure([sollol.parse_node(own)])
    slots, there = sollol.SharedSlots(dispatcher, types.SimpleNamespace(is_near=is_near)), sollol.parse_node(theirs)
    assert (slots.node_at(sollol.server_of(there), there.name) is not None) is expected


@over_sockets
async def test_peer_needs_an_administrators_key(tmp_path):
    node = fixed(1)
    async with guarded(tmp_path, node) as one, gateway_for(node) as two:
        url = f"http://127.0.0.1:{one.listener.address[1]}"
        for settings, state, why in (("", "down", "401: a key is needed: Authorization: Bearer KEY"),
                                     (" token=alice-secret", "down", "403: a peer needs a key with admin=yes"),
                                     (" token=root-secret", "up", None)):
            two.options.peer = [sollol.parse_peer(f"{url} name=p{settings}")]
            two.join()
            await until(lambda state=state, why=why: peers_of(two)["p"] == (state, why))
        task = asyncio.create_task(call(one, "POST", "/api/generate", generate(tokens=50), **bearer("root")))
        await until(lambda: elsewhere(two))
        assert (await task).status == 200


@over_sockets
async def test_peers_behind_a_name_are_followed_as_they_come_and_go():
    dns, node = Dns(**{"pods.localhost": ["127.0.0.1"]}), fixed(1)
    async with gateway_for(node) as one:
        port = one.listener.address[1]
        flags = ["--peer", f"http://pods.localhost:{port} resolve=all", "--probe-interval", "0.1"]
        async with gateway_for(node, flags=flags, look_up=dns) as two:
            await until(lambda: peers_of(two) == {f"pods.localhost:{port}@127.0.0.1": ("up", None)})
            dns.told["pods.localhost"] = ["127.0.0.9"]
            await until(lambda: list(peers_of(two)) == [f"pods.localhost:{port}@127.0.0.9"])
            await until(lambda: not one.peers.followers)
            dns.told["pods.localhost"] = ["127.0.0.1"]
            await until(lambda: peers_of(two) == {f"pods.localhost:{port}@127.0.0.1": ("up", None)})


@over_sockets
async def test_gateway_that_drains_tells_its_peers_until_its_last_request_has_ended():
    node = fixed(1, speed=2)
    async with gateways_for(2, node) as (one, two):
        task = asyncio.create_task(call(one, "POST", "/api/generate", generate(tokens=500)))
        await until(lambda: elsewhere(two))
        one.drain()
        await asyncio.sleep(1)
        assert elsewhere(two) and peers_of(two)["p0"][0] == "up" and not one.stopped.is_set()
        assert (await task).status == 200
        await until(lambda: one.stopped.is_set() and not elsewhere(two), 3)


@over_sockets
async def test_followers_are_told_once_of_all_that_changes_in_one_turn_of_the_event_loop():
    """Sixteen that are told at each change took half of what the gateway can do."""
    async with gateway_for(fixed(1)) as gateway:
        told = []
        gateway.peers.followers.append(types.SimpleNamespace(tell=told.append))
        for _ in range(5):
            sollol.pump(gateway)
        assert told == []
        await asyncio.sleep(0.01)
        assert told == [False]
        sollol.pump(gateway)
        await asyncio.sleep(0.01)
        assert told == [False, False]


@over_sockets
async def test_only_so_many_are_told(monkeypatch):
    monkeypatch.setattr(sollol, "MOST_PEERS", 1)
    async with gateways_for(2, fixed(1)) as (one, two):
        assert (await call(one, "GET", "/api/peers")).status == 503
        assert peers_of(two)["p0"][0] == "up"


def test_peer_that_is_upgraded_is_heard_on(upgradable):
    """What runs in its old process counts, as the new one tells of it."""
    it, (port,) = upgradable, free_ports(1)
    (line,) = it.hosts.read_text().splitlines()
    with program(*it.argv, "--peer", f"127.0.0.1:{port}", cwd=it.folder) as gateway, program(
            "sollol.py", "--port", port, "--node", line, "--peer", f"127.0.0.1:{it.port}") as other:
        read_until(other, "event=peer peer=.* state=up")
        stream = it.stream(1500)
        assert stream.recv(12) == b"HTTP/1.1 200"
        upgraded(gateway)

        def shared():
            stats = [it.get("/api/stats"), json.loads(curl(f"http://127.0.0.1:{port}/api/stats"))]
            return [(one["nodes"][0]["inflight"], one["peers"][0]["running"]) for one in stats]

        deadline_s = time.monotonic() + 10
        while shared() != [(1, 0), (1, 1)]:     # of its old process the new one knows by the upgrade, not as of a peer
            assert time.monotonic() < deadline_s, shared()
        assert b'"done":true' in stream_on(stream)
        stream.close()


@table("text, why", [
    ("no URL", "ftp://a", "is not the URL of a node"), ("no setting", "a b", "unknown setting"),
    ("slots", "http://a slots=4", "unknown"),
    ("ca", "http://a ca=x", "ca= is for https"), ("no file", "https://a ca=/none", "No such file")])
def test_peer_that_cannot_be_is_one_clear_line(text, why, capsys):
    with pytest.raises(SystemExit):
        sollol.parse_options(["--node", "a", "--peer", text], {})
    assert re.fullmatch(f"sollol.py: argument --peer: .*{why}.*\n", capsys.readouterr().err)
    assert sollol.parse_peer("box").url == "http://box:8000"


# -----------------------------------------------------------------------------
# Server life: log, reload, drain, and the program as a process
# -----------------------------------------------------------------------------

LOG_KEYS = ["ts", "level", "event", "id", "client", "key", "user", "method", "path", "model", "priority", "node",
            "attempts", "status", "queue_ms", "ttft_ms", "total_ms", "prompt_tokens", "output_tokens", "bytes",
            "reason", "outcome"]


@over_sockets
async def test_request_log_has_its_keys_in_order_and_no_prompt(capsys):
    for style in ("kv", "json"):
        sollol.start_log(style, "info")
        async with gateway_for(bench.SimNode(**FAST)) as gateway:
            await call(gateway, "POST", "/api/generate", generate(prompt="secret words"), Authorization="Bearer hush")
        line = next(line for line in capsys.readouterr().err.splitlines() if "/api/generate" in line)
        keys = re.findall(r"(?:^| )(\w+)=", line) if style == "kv" else list(json.loads(line))
        assert keys == LOG_KEYS
        assert "secret" not in line and "hush" not in line
    sollol.LOG.handlers.clear()


@over_sockets
async def test_probes_that_succeed_are_logged_at_debug_only(caplog):
    caplog.set_level("DEBUG", "sollol")
    sollol.LOG.propagate = True
    node = bench.SimNode(**FAST)
    async with gateway_for(node) as gateway:
        for method, path in (("GET", "/"), ("HEAD", "/"), ("GET", "/api/version"), ("GET", "/metrics"),
                             ("GET", "/api/health"), ("GET", "/api/tags"), ("POST", "/metrics")):
            await call(gateway, method, path)
        node.kill()
        await until(lambda: health(gateway)["nodes"]["up"] == 0, 20)
        assert (await call(gateway, "GET", "/api/health")).status == 503
        gateway.telemetry.tally()
    told = {level: [(it["method"], it["path"]) for record in caplog.records if isinstance(record.msg, list)
                    and record.levelname == level for it in record.msg] for level in ("DEBUG", "INFO")}
    assert told["INFO"] == [("GET", "/api/tags"), ("GET", "/api/health")]
    assert told["DEBUG"] == [("GET", "/"), ("HEAD", "/"), ("GET", "/api/version"), ("GET", "/metrics"),
                             ("GET", "/api/health")]


@over_sockets
async def test_saved_hosts_file_is_taken_over_and_a_bad_one_refused(tmp_path, caplog):
    sollol.LOG.propagate = True
    one, two, hosts = await one_of_two(tmp_path)
    async with gateway_for(one, two, hosts=hosts) as gateway:
        first = gateway.dispatcher.cluster.nodes["one"]
        hosts.write_text(f"{one.url} name=one\n{two.url} name=two slots=four\n")
        await until(lambda: f"{hosts}:2: slots must be a whole number from 1 to 64, not 'four'" in caplog.text)
        assert list(gateway.dispatcher.cluster.nodes) == ["one"]
        hosts.write_text(f"{one.url} name=one\n{two.url} name=two slots=4\n")
        await until(lambda: list(gateway.dispatcher.cluster.nodes) == ["one", "two"])
        assert gateway.dispatcher.cluster.nodes["one"] is first
        await until(lambda: health(gateway)["nodes"].items() >= {"up": 2, "total": 2}.items())
        hosts.write_text(f"{one.url} name=one slots=3 token=t\n{two.url} name=two slots=4\n")
        await until(lambda: first.settings.slots == 3)
        assert gateway.dispatcher.cluster.nodes["one"] is first and gateway.node_io.pools[first].settings.token == "t"
        hosts.write_text(f"{two.url} name=two slots=4\n")
        await until(lambda: list(gateway.dispatcher.cluster.nodes) == ["two"])
        assert (await call(gateway, "POST", "/api/generate", generate())).fields["x-sollol-node"] == "two"


class Dns:
    """DNS for a gateway: {name: addresses}, or an error."""

    def __init__(self, **told):
        self.told, self.asked = told, 0

    async def __call__(self, name):
        self.asked += 1
        await asyncio.sleep(0.001)
        if isinstance(self.told[name], OSError):
            raise self.told[name]
        return self.told[name]

    async def ask_again(self):
        """Wait until an answer that is given from now on has been taken over."""
        asked = self.asked
        await until(lambda: self.asked >= asked + 2)


NO_DNS = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


async def replicas(count, **settings):
    """Start simulated nodes at one port of 127.0.0.2, 127.0.0.3 and so on."""
    nodes = []
    for number in range(count):
        port = nodes[0].port if nodes else 0
        nodes.append(await bench.SimNode(host=f"127.0.0.{number + 2}", port=port, loaded=("llama3.2",),
                                         **settings).start())
    return nodes


async def used_names(gateway, count=4, tokens=5):
    """Return the names of the nodes that so many requests at once went to."""
    answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(tokens=tokens))
                                     for _ in range(count)))
    assert all(answer.status == 200 for answer in answers)
    return {answer.fields["x-sollol-node"] for answer in answers}


@over_sockets
async def test_every_address_behind_a_name_is_a_node_for_as_long_as_dns_tells_it(caplog):
    caplog.set_level("WARNING", "sollol")
    sollol.LOG.propagate = True
    one, two = await replicas(2, **FAST)
    dns = Dns(pods=["127.0.0.2"])
    async with gateway_for(one, two, lines=f"http://pods:{one.port} resolve=all slots=2 name=pods",
                           flags=["--probe-interval", "0.1"], look_up=dns) as gateway:
        assert await used_names(gateway) == {"pods@127.0.0.2"}
        dns.told["pods"] = ["127.0.0.3", "127.0.0.2"]
        await until(lambda: health(gateway)["nodes"].items() >= {"up": 2, "total": 2}.items())
        assert await used_names(gateway, tokens=100) == {"pods@127.0.0.2", "pods@127.0.0.3"}
        running = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=1000, stream=True)))
                   for _ in range(4)]
        await until(lambda: two.in_flight == one.in_flight == 2)
        dns.told["pods"] = ["127.0.0.3"]
        await until(lambda: list(gateway.dispatcher.cluster.nodes) == ["pods@127.0.0.3"])
        answers = await asyncio.gather(*running)
        assert {answer.fields["x-sollol-node"] for answer in answers} == {"pods@127.0.0.2", "pods@127.0.0.3"}
        assert all(json.loads(answer.body.splitlines()[-1])["done"] for answer in answers)
        assert await used_names(gateway) == {"pods@127.0.0.3"}
        for answer in (NO_DNS, []):
            dns.told["pods"] = answer
            await dns.ask_again()
            gateway.join()          # as a reload does
        assert await used_names(gateway) == {"pods@127.0.0.3"}
    assert caplog.text.count("'event': 'dns'") == 1 and "Temporary failure" in caplog.text


@over_sockets
async def test_name_without_an_address_at_the_start_is_asked_for_again():
    one, two = await replicas(2, **FAST)
    dns = Dns(pods=NO_DNS)
    lines = f"http://pods:{one.port} resolve=all\n{two.url} name=two"
    async with gateway_for(one, two, lines=lines, flags=["--probe-interval", "0.1"], look_up=dns) as gateway:
        assert await used_names(gateway) == {"two"}
        dns.told["pods"] = ["127.0.0.2"]
        await until(lambda: health(gateway)["nodes"].items() >= {"up": 2, "total": 2}.items())
        assert list(gateway.dispatcher.cluster.nodes) == [f"pods:{one.port}@127.0.0.2", "two"]


@over_sockets
async def test_gateway_without_any_node_answers_and_goes_on():
    dns = Dns(pods=NO_DNS)
    async with gateway_for(lines="http://pods resolve=all", look_up=dns) as gateway:
        assert (await call(gateway, "GET", "/api/health")).status == 503
        for method, path, status in (("POST", "/api/generate", 503), ("POST", "/api/show", 503),
                                     ("POST", "/api/pull", 503), ("POST", "/api/me", 503), ("GET", "/api/stats", 200),
                                     ("GET", "/metrics", 200), ("DELETE", "/api/delete", 503), ("GET", "/other", 503),
                                     ("GET", "/api/tags", 503)):
            assert (await call(gateway, method, path, generate())).status == status, path


def test_real_name_is_looked_up():
    """In real time only: DNS is asked in a thread, and virtual time does not wait for threads."""
    async def main():
        node = await bench.SimNode(**FAST).start()
        async with gateway_for(node, lines=f"localhost:{node.port} resolve=all") as gateway:
            await until(lambda: health(gateway)["nodes"]["up"] == 1)
            assert await used_names(gateway) == {f"localhost:{node.port}@127.0.0.1"}
    run_real(main())


def discovering(nodes, *flags):
    """Return what makes a gateway find simulated nodes on this machine."""
    return {"flags": ["--discover", "127.0.0.0/28", "--probe-interval", "0.1", *flags], "scan_port": nodes[0].port}


@over_sockets
async def test_scan_finds_ollama_servers_and_nothing_else(caplog):
    caplog.set_level("INFO", "sollol")
    sollol.LOG.propagate = True
    nodes = await replicas(2, **FAST)
    port = nodes[0].port
    no_ollama = await ScriptedNode(lambda request: [framed(b"hello"), KEEP]).start(port, "127.0.0.4")
    no_ollama.own_answer = lambda raw: None
    no_http = await asyncio.start_server(lambda reader, writer: writer.write(b"SSH-2.0-OpenSSH_9.2\r\n"),
                                         "127.0.0.5", port)
    bare = await ScriptedNode(models=()).start(port, "127.0.0.6")       # written by its name
    listed = f"http://127.0.0.3:{port} name=listed\nhttp://gpu:{port} name=named"
    try:
        async with gateway_for(flags=["--bind", "127.0.0.7", "--port", str(port)]), \
                gateway_for(*nodes, lines=listed, look_up=Dns(gpu=["127.0.0.6"]),
                            **discovering(nodes, "--bind", "127.0.0.8", "--port", str(port))) as gateway:
            await until(lambda: caplog.text.count("'event': 'scan'") == 2)
            assert list(gateway.dispatcher.cluster.nodes) == ["listed", "named", f"127.0.0.2:{port}"]
            await until(lambda: health(gateway)["nodes"]["up"] == 2)
            assert "listed" in await used_names(gateway, tokens=100)
            line = next(line for line in caplog.messages if f"'url': 'http://127.0.0.2:{port}'" in line)
            assert "'was': 'new'" in line and "'models': 'llama3.2:latest'" in line
    finally:
        no_http.close()
        for node in (no_ollama, bare):
            await node.stop()


@over_sockets
async def test_found_servers_stay_over_a_reload_and_go_when_they_stay_away(monkeypatch, tmp_path):
    monkeypatch.setattr(sollol, "SCAN_S", 0.2)
    monkeypatch.setattr(sollol, "SCANS_KEPT", 3)
    nodes, hosts = await replicas(2, **FAST), tmp_path / "hosts.txt"
    hosts.write_text("# none yet\n")
    async with gateway_for(*nodes, hosts=hosts, **discovering(nodes)) as gateway:
        await until(lambda: health(gateway)["nodes"].items() >= {"up": 2, "total": 2}.items())
        found = dict(gateway.dispatcher.cluster.nodes)
        hosts.write_text(f"{nodes[1].url} name=listed\n")
        await until(lambda: "listed" in gateway.dispatcher.cluster.nodes)
        assert list(gateway.dispatcher.cluster.nodes.values()) == list(found.values())[::-1]
        await asyncio.sleep(1.0)    # more scans; who is up is not asked again
        assert [record.path for record in nodes[0].requests].count("/api/health") == 1
        nodes[0].kill()
        await until(lambda: list(gateway.dispatcher.cluster.nodes) == ["listed"])
        await nodes[0].restart()
        await until(lambda: health(gateway)["nodes"].items() >= {"up": 2, "total": 2}.items())


def certificate(folder, name):
    """Make a certificate for a name that its own key has signed; return its path and a server's TLS context."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-addext",
                    f"subjectAltName=DNS:{name}", "-out", paths[0], "-keyout", paths[1]],
                   check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*paths)
    return paths[0], context


@over_sockets
async def test_every_address_behind_a_name_must_have_the_certificate_of_the_name(tmp_path, monkeypatch):
    trusted, tls = certificate(tmp_path, "pods.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    node = ScriptedNode(lambda request: [OK, KEEP])
    node.tls = tls
    await node.start(host="127.0.0.2")
    dns = Dns(**{"pods.example": ["127.0.0.2"], "other.example": ["127.0.0.2"]})
    lines = f"https://pods.example:{node.port} resolve=all name=pods\nhttps://other.example:{node.port} resolve=all"
    async with gateway_for(node, lines=lines, look_up=dns) as gateway:
        await until(lambda: all(node.probed for node in gateway.dispatcher.cluster.nodes.values()))
        assert [node.up for node in gateway.dispatcher.cluster.nodes.values()] == [True, False]
        assert await used_names(gateway) == {"pods@127.0.0.2"}
        assert {re.search(rb"\r\nHost: (.*?)\r\n", raw)[1].decode() for raw in node.requests} == {
            f"pods.example:{node.port}"}


@over_sockets
async def test_drain_finishes_running_and_queued_and_refuses_new():
    async with gateway_for(fixed(1, speed=5)) as gateway:
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50))) for _ in range(3)]
        idle = await Caller.to(gateway)
        await until(lambda: health(gateway)["queued"] == 2)
        gateway.drain()
        assert await idle.reader.read() == b""
        assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}
        await asyncio.wait_for(gateway.stopped.wait(), 5)
        with pytest.raises(OSError):
            await Caller.to(gateway)


@over_sockets
async def test_request_that_comes_while_the_gateway_drains_is_told_to_come_back():
    """On a connection that was about to ask, while another request runs. Idle ones are closed in good order."""
    async with gateway_for(fixed(1, speed=5)) as gateway:
        task = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=50)))
        late, looking, idle = [await Caller.to(gateway) for _ in range(3)]
        raw = posted(generate())
        late.writer.write(raw[:20])
        looking.writer.write(b"GET /api/hea")
        await until(lambda: health(gateway)["inflight"] == 1)
        await asyncio.sleep(0.1)
        gateway.drain()
        idle.writer.write(raw)      # just too late: told so if that can still be said, and never reset
        assert (await idle.reader.read())[:13] in (b"", b"HTTP/1.1 503 ")
        late.writer.write(raw[20:])
        answer = await late.answer()
        assert answer.status == 503 and answer.json()["error"] == "the gateway is shutting down"
        assert answer.fields["retry-after"] == "5" and answer.fields["connection"] == "close"
        looking.writer.write(b"lth HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await looking.answer()
        assert answer.status == 503 and answer.fields["connection"] == "close"
        assert answer.json()["status"] == "draining" and answer.json()["draining"] is True
        assert (await task).status == 200
        for caller in (late, looking, idle):
            caller.close()
        await asyncio.wait_for(gateway.stopped.wait(), 5)


@over_sockets
async def test_drain_delay_serves_everybody_but_says_that_it_will_end():
    async with gateway_for(bench.SimNode(**FAST), flags=["--drain-delay", "1s"]) as gateway:
        idle = await Caller.to(gateway)
        gateway.drain()
        answer = await call(gateway, "GET", "/api/health")
        assert answer.status == 503 and answer.json()["status"] == "draining"
        idle.writer.write(posted(generate()))
        answer = await idle.answer()
        assert answer.status == 200 and answer.fields["connection"] == "close" and await idle.reader.read() == b""
        idle.close()
        stream = await call(gateway, "POST", "/api/generate", generate(stream=True))
        assert stream.status == 200 and stream.fields["connection"] == "close"
        await asyncio.sleep(1.1)
        with pytest.raises(OSError):
            await Caller.to(gateway)
        await asyncio.wait_for(gateway.stopped.wait(), 5)


@over_sockets
async def test_drain_waits_for_a_body_that_is_still_coming():
    async with gateway_for(bench.SimNode(**FAST)) as gateway:
        caller = await Caller.to(gateway)
        body = json.dumps(generate()).encode()
        caller.writer.write(b"POST /api/generate HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                            b"Content-Length: %d\r\n\r\n" % len(body))
        assert b"100 Continue" in await caller.head()
        gateway.drain()
        await asyncio.sleep(0.1)
        caller.writer.write(body)
        assert (await caller.answer()).status == 200
        caller.close()


def test_signal_during_the_start_ends_it(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with program("sollol.py", "--node", f"127.0.0.1:{silent.getsockname()[1]}", "--port", 0) as gateway:
            time.sleep(0.4)
            gateway.send_signal(signal.SIGTERM)
            assert gateway.wait(10) in (0, -signal.SIGTERM)


# -----------------------------------------------------------------------------
# TLS: on the gateway's own port
# -----------------------------------------------------------------------------

@pytest.fixture(scope="session")
def pems(tmp_path_factory):
    """A folder with two self-signed certificates of this machine and their keys: one.pem, one.key, two.pem, two.key."""
    if not shutil.which("openssl"):
        pytest.skip("the openssl command is not installed")
    folder = tmp_path_factory.mktemp("pems")
    for name in ("one", "two"):
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN={name} "
            "-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -addext keyUsage=critical,digitalSignature,keyCertSign "
            f"-keyout {name}.key -out {name}.pem".split(), cwd=folder, check=True, capture_output=True)
    return folder


def pair(folder, certificate="one.pem", key="one.key"):
    return ["--tls-cert", str(folder / certificate), "--tls-key", str(folder / key)]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("test", [
    functools.partial(test_stream_reaches_the_client_byte_for_byte_and_piece_by_piece.__wrapped__,
                      "/api/chat", b"application/x-ndjson", NDJSON),
    functools.partial(test_peers_never_give_a_slot_twice_and_go_by_priority.__wrapped__, 2),
    *(test.__wrapped__ for test in (
        test_keep_alive_pipelining_and_http_1_0, test_chunked_request_body_and_expect_100_continue,
        test_slow_head_gets_408_but_a_slow_model_is_waited_for,
        test_slow_reader_slows_the_node_and_not_the_gateways_memory, test_blob_streams_up_with_either_framing,
        test_answer_before_the_end_of_an_upload_is_not_lost, test_client_hangup_frees_slot_queue_and_node_connection,
        test_200_clients_that_vanish_leave_nothing_behind, test_drain_waits_for_a_body_that_is_still_coming,
        test_drain_finishes_running_and_queued_and_refuses_new))],
    ids=lambda test: getattr(test, "func", test).__name__)
def test_over_tls_all_is_as_without(loop, test, pems, monkeypatch, caplog):
    monkeypatch.setattr(sys.modules[__name__], "tls_flags", pair(pems))
    LOOPS[loop](test())
    assert not caplog.records or "Traceback" not in caplog.text


@over_sockets
async def test_clients_that_are_too_many_or_shake_no_hands_are_let_go(pems):
    flags = [*pair(pems), "--max-connections", "2", "--header-timeout", "1"]
    async with gateway_for(bench.SimNode(**FAST), flags=flags) as gateway:
        silent = [await asyncio.open_connection(*gateway.listener.address) for _ in range(2)]
        silent[1][1].write(b"\x16\x03\x01\x02\x00")     # the beginning of a handshake
        await until(lambda: len(gateway.listener.clients) == 2)
        reader, writer = await asyncio.open_connection(*gateway.listener.address)
        assert await reader.read() == b"" and len(gateway.listener.clients) == 2
        started_s = asyncio.get_running_loop().time()
        for reader, _ in silent:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
        assert asyncio.get_running_loop().time() - started_s > 0.4
        await until(lambda: not gateway.listener.clients)
        assert (await call(gateway, "GET", "/")).status == 200
        for _, it in (*silent, (reader, writer)):
            it.close()


@over_sockets
async def test_mutated_handshakes_and_records_harm_nobody(pems, caplog):
    rng, context = random.Random(5), trusting(pems / "one.pem")

    async def attack(gateway, before, garbage):
        """Shake hands, send so many sound bytes of a record, then something else."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await asyncio.open_connection(*gateway.listener.address)
        with contextlib.suppress(ConnectionError):
            while before == "record":
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                    tls.write(posted(generate()))
                    break
                writer.write(outgoing.read())
                incoming.write(await reader.read(65536))
            else:
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
            data = bytearray(outgoing.read())
            for _ in range(rng.choice((1, 1, 4))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            writer.write(data[:rng.choice((len(data), rng.randrange(len(data))))] + garbage)
            if before == "record" or rng.random() < 0.5:    # else a cut record is waited for as for a next request
                writer.write_eof()
            await asyncio.wait_for(reader.read(), 30)
        writer.close()

    async with gateway_for(bench.SimNode(**FAST), flags=[*pair(pems), "--header-timeout", "0.5"]) as gateway:
        await asyncio.gather(*(attack(gateway, before, rng.choice((b"", rng.randbytes(600))))
                               for before in ("hello", "record") for _ in range(40 * FUZZ)))
        await until(lambda: not gateway.listener.clients)
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200
        assert health(gateway)["inflight"] == 0
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("serving", [False, True], ids=["idle", "serving"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@over_sockets
async def test_broken_record_is_answered_by_an_alert_and_ends_what_runs(version, serving, pems):
    context = trusting(pems / "one.pem")
    context.maximum_version = version
    async with gateway_for(fixed(1, speed=1), flags=pair(pems)) as gateway:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await asyncio.open_connection(*gateway.listener.address)

        async def do(step):
            while True:
                try:
                    done = step()
                    writer.write(outgoing.read())
                    return done
                except ssl.SSLWantReadError:
                    writer.write(outgoing.read())
                    data = await asyncio.wait_for(reader.read(65536), 30)
                    assert data, "no alert before the end"
                    incoming.write(data)

        await do(tls.do_handshake)
        if serving:
            tls.write(posted(generate(tokens=4000, stream=True)))
            await do(lambda: tls.read(65536))
            assert health(gateway)["inflight"] == 1
        tls.write(b"GET / HTTP/1.1\r\n")
        record = bytearray(outgoing.read())
        record[-1] ^= 1
        writer.write(record)
        with pytest.raises(ssl.SSLError, match="alert bad record mac"):
            while True:
                await do(lambda: tls.read(65536))
        await until(lambda: not gateway.listener.clients and not health(gateway)["inflight"])
        writer.close()


def tls_connection(port, context):
    """Return a TLS connection that raises an error at an end that is not clean."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=20)
    return context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False)


def read_all(connection):
    """Return what comes until a clean end."""
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


@pytest.mark.parametrize("flags", [[], ["--no-uvloop"]], ids=["uvloop", "asyncio"])
def test_tls_with_real_clients_from_the_first_handshake_over_a_renewed_certificate_to_the_end(flags, pems, tmp_path):
    for name in ("used.pem", "used.key"):
        shutil.copy(pems / name.replace("used", "one"), tmp_path / name)
    with program("bench.py", "--nodes", 1, "--port", 0, "--speed", 10) as node, \
         program("sollol.py", "--node", read_until(node, r"http://\S+")[0], "--port", 0,
                 *pair(tmp_path, "used.pem", "used.key"), *flags) as gateway:
        port = int(read_until(gateway, r"event=start .*url=https://127.0.0.1:(\d+)")[1])
        url, one, two = f"https://localhost:{port}", trusting(pems / "one.pem"), trusting(pems / "two.pem")

        def ask(context, path="/api/version", value=None):
            data = None if value is None else json.dumps(value).encode()
            with urllib.request.urlopen(urllib.request.Request(url + path, data), context=context, timeout=20) as it:
                return it.read()

        assert json.loads(ask(one, "/api/generate", generate(tokens=3)))["done"]
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            ask(two)
        one.set_alpn_protocols(["h2", "http/1.1"])
        with tls_connection(port, one) as connection:
            assert (connection.version(), connection.selected_alpn_protocol()) == ("TLSv1.3", "http/1.1")
        old = trusting(pems / "one.pem")
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with tls_connection(port, old) as connection:
            assert connection.version() == "TLSv1.2"
        with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
            plain.sendall(b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            told = plain.makefile("rb").read()
            assert told.startswith(b"HTTP/1.1 400 ") and told.endswith(b"\r\n\r\n" + sollol.NOT_TLS[-38:])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as garbage:
            garbage.sendall(b"\x16\x03\x01\x00\x05hello" + b"\x00" * 100)
            with contextlib.suppress(ConnectionError):
                garbage.makefile("rb").read()

        with tls_connection(port, one) as refused:  # and goes on sending meanwhile
            refused.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n")
            for _ in range(20):
                refused.sendall(b"x" * 65536)
                time.sleep(0.02)
            assert refused.recv(65536).startswith(b"HTTP/1.1 413 ")

        idle, stream = tls_connection(port, one), tls_connection(port, one)
        idle.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(65536).startswith(b"HTTP/1.1 200 ")
        stream.sendall(posted(generate(tokens=1500, stream=True)))
        said = stream.recv(65536)
        shutil.copy(pems / "two.pem", tmp_path / "used.pem")
        gateway.send_signal(signal.SIGHUP)
        read_until(gateway, r"level=error event=reload refused=.*used.key: this is not the key of the certificate in ")
        assert ask(one)
        shutil.copy(pems / "two.key", tmp_path / "used.key")
        gateway.send_signal(signal.SIGHUP)
        read_until(gateway, "level=info event=reload certificate=")
        assert ask(two)
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            ask(one)
        idle.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(65536).startswith(b"HTTP/1.1 200 ")
        gateway.send_signal(signal.SIGTERM)
        assert read_all(idle) == b""
        said += read_all(stream)
        assert b'"done":true' in said and said.endswith(b"0\r\n\r\n")
        assert gateway.wait(10) == 0
        assert "Traceback" not in all_output(gateway) and "level=error event=error" not in all_output(gateway)


@table("argv, message", [
    ("no key", ["--tls-cert", "one.pem"], "sollol.py: --tls-cert and --tls-key: one is nothing without the other"),
    ("no certificate", ["--tls-key", "one.key"], "sollol.py: --tls-cert and --tls-key: one is nothing without"),
    ("not there", ["--tls-cert", "one.pem", "--tls-key", "no.key"], "no.key: No such file or directory"),
    ("neither", ["--tls-cert", "no.pem", "--tls-key", "no.key"], "no.pem: No such file or directory"),
    ("a folder", ["--tls-cert", ".", "--tls-key", "one.key"], ".: Is a directory"),
    ("another's key", ["--tls-cert", "one.pem", "--tls-key", "two.key"],
     "two.key: this is not the key of the certificate in one.pem"),
    ("no such thing", ["--tls-cert", "words", "--tls-key", "one.key"], "words: there is no certificate in PEM form"),
    ("changed about", ["--tls-cert", "one.key", "--tls-key", "one.pem"], "one.key: there is no certificate in PEM"),
    ("no key in it", ["--tls-cert", "one.pem", "--tls-key", "words"], "words: there is no usable private key in PEM"),
    ("password", ["--tls-cert", "one.pem", "--tls-key", "locked.key"], "locked.key: is encrypted, and nobody is here")])
def test_bad_certificate_or_key_stops_the_start_with_one_line(argv, message, pems, monkeypatch, capsys):
    monkeypatch.chdir(pems)
    pathlib.Path("words").write_text("hello\n")
    subprocess.run(["openssl", "ec", "-in", "one.key", "-aes256", "-passout", "pass:x", "-out", "locked.key"],
                   check=True, capture_output=True)
    try:
        assert sollol.main(["--node", "a", *argv]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    told = capsys.readouterr().err
    assert told.startswith(message) and told.count("\n") == 1


@pytest.mark.parametrize("text, mode, warned", [
    ("a token=hush", 0o600, False), ("a token=hush", 0o644, True), ("a", 0o644, False)])
def test_hosts_file_with_a_token_that_others_can_read_is_warned_about(text, mode, warned, tmp_path, caplog):
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(text)
    hosts.chmod(mode)
    sollol.read_nodes(sollol.parse_options(["--hosts", str(hosts)], {}))
    assert (f"others than its owner can read {hosts}: chmod 600 it" in caplog.text) is warned


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o640, True)])
def test_private_key_that_others_can_read_is_warned_about(mode, warned, pems, tmp_path, caplog):
    key = tmp_path / "my.key"
    shutil.copy(pems / "one.key", key)
    key.chmod(mode)
    sollol.read_certificate(sollol.parse_options(["--node", "a", *pair(pems, key=key)], {}))
    assert (f"others than its owner can read {key}: chmod 600 it" in caplog.text) is warned


# -----------------------------------------------------------------------------
# TLS: towards nodes
# -----------------------------------------------------------------------------

def shown(folder, name):
    """Return what a node shows its certificate with."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


def tls_node(folder, name="one", **more):
    """Return a simulated node that speaks TLS."""
    node = bench.SimNode(**FAST, **more)
    node.tls = shown(folder, name)
    return node


@over_sockets
async def test_node_over_tls_is_used_if_its_certificate_is_believed(pems, tmp_path, caplog):
    """Each by the authority of its own line; a path is seen from the hosts file; a renewed file is read on reload."""
    nodes = [await tls_node(pems, name).start() for name in ("one", "one", "one", "two")]
    shutil.copy(pems / "one.pem", tmp_path / "ca.pem")
    lines = [f"{node.url} name={name}" for name, node in zip(("good", "wrong", "unknown", "any"), nodes, strict=True)]
    (tmp_path / "hosts.txt").write_text("{} ca=ca.pem\n{} ca={}\n{}\n{} insecure=yes\n".format(
        *lines[:2], pems / "two.pem", *lines[2:]))
    async with gateway_for(*nodes, hosts=tmp_path / "hosts.txt", flags=["--probe-interval", "0.2"]) as gateway:
        assert {name: node.up for name, node in gateway.dispatcher.cluster.nodes.items()} == {
            "good": True, "wrong": False, "unknown": False, "any": True}
        logged = [record.msg for record in caplog.records]
        assert [it["nodes"] for it in logged if it["event"] == "tls"] == ["any"]
        assert {it["node"]: it["why"] for it in logged if it["event"] == "node" and it["state"] == "down"} == {
            name: "its certificate is not believed: self-signed certificate" for name in ("wrong", "unknown")}
        for _ in range(4):
            answer = await call(gateway, "POST", "/api/generate", generate(stream=True))
            assert answer.status == 200 and answer.fields["x-sollol-node"] in ("good", "any")
        blob = os.urandom(3 * 2**20)
        path = f"/api/blobs/sha256:{hashlib.sha256(blob).hexdigest()}"
        assert (await call(gateway, "POST", path, blob)).status == 201 and nodes[0].blobs
        for pool in gateway.node_io.pools.values():
            pool.prune(math.inf)
        shutil.copy(pems / "two.pem", tmp_path / "ca.pem")
        gateway.files.reload()
        await until(lambda: not gateway.dispatcher.cluster.nodes["good"].up)
        shutil.copy(pems / "one.pem", tmp_path / "ca.pem")
        gateway.files.reload()
        await until(lambda: gateway.dispatcher.cluster.nodes["good"].up)


@over_sockets
async def test_connection_made_by_the_settings_of_before_is_not_used_again():
    async with gateway_for(bench.SimNode(**FAST)) as gateway:
        pool, = gateway.node_io.pools.values()
        old = await pool.connect()
        pool.configure(pool.settings._replace(token="another"))
        pool.give_back(old)
        new = await pool.connect()
        pool.give_back(new)
        assert pool.idle[-1] is new and old not in pool.idle and not old.is_open()


@over_sockets
async def test_authority_may_go_with_its_line_and_a_node_whose_authority_has_gone_is_down(pems, tmp_path, caplog):
    nodes = [await tls_node(pems).start() for _ in range(2)]
    hosts, authorities = tmp_path / "hosts.txt", [tmp_path / "1.pem", tmp_path / "2.pem"]
    lines = [f"{node.url} name=n{number} ca={number}.pem\n" for number, node in enumerate(nodes, 1)]
    for path in authorities:
        shutil.copy(pems / "one.pem", path)
    hosts.write_text("".join(lines))
    async with gateway_for(*nodes, hosts=hosts, flags=["--probe-interval", "0.1"]) as gateway:
        authorities[0].unlink()
        hosts.write_text(lines[1])
        await until(lambda: list(gateway.dispatcher.cluster.nodes) == ["n2"])
        hosts.write_text(lines[1].replace("ca=2.pem", "insecure=yes"))
        await until(lambda: "insecure=yes: anybody" in caplog.text)
        hosts.write_text(lines[1])
        await until(lambda: gateway.dispatcher.cluster.nodes["n2"].settings.ca)
        node = gateway.dispatcher.cluster.nodes["n2"]
        gateway.node_io.pools[node].configure(node.settings._replace())      # a connection in the making, too, is old
        authorities[1].unlink()
        await until(lambda: not gateway.dispatcher.cluster.nodes["n2"].up)
        assert f"ca {authorities[1]}: No such file or directory" in caplog.text
        shutil.copy(pems / "one.pem", authorities[1])
        await until(lambda: gateway.dispatcher.cluster.nodes["n2"].up)


@pytest.mark.parametrize("loop", LOOPS)
def test_slow_reader_slows_a_node_over_tls_too(loop, pems):
    LOOPS[loop](test_slow_reader_slows_the_node_and_not_the_gateways_memory.__wrapped__(shown(pems, "one")))


@over_sockets
async def test_node_that_dies_over_tls_is_replaced(pems):
    nodes = [tls_node(pems, slots=1), tls_node(pems, slots=1)]
    for node in nodes:
        node.line = f"ca={pems / 'one.pem'} slots=1"
    async with gateway_for(*nodes, flags=["--probe-interval", "0.2"]) as gateway:
        tasks = [asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=300))) for _ in range(6)]
        await until(lambda: health(gateway)["inflight"] == 2)
        nodes[0].kill()
        assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200


def test_check_says_why_a_node_over_tls_is_down(pems, capsys):
    async def plain(reader, writer):
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        writer.close()

    async def main():
        node, server = await tls_node(pems).start(), await asyncio.start_server(plain, "127.0.0.1", 0)
        lines = (f"{node.url} name=strange\n{node.url} name=good ca={pems / 'one.pem'}\n"
                 f"https://127.0.0.1:{server.sockets[0].getsockname()[1]} name=plain\n")
        try:
            return await sollol.run_check(sollol.parse_options(["--node", "a"], {}), sollol.parse_hosts(lines, "h"))
        finally:
            server.close()
            await node.stop()

    level = sollol.LOG.level
    assert asyncio.run(main()) == 1
    sollol.LOG.setLevel(level)
    out = capsys.readouterr().out
    assert re.search(r"(?m)^strange .* down .* its certificate is not believed: self-signed certificate$", out)
    assert re.search(r"(?m)^good .* up ", out)
    assert re.search(r"(?m)^plain .* down .* no TLS: wrong version number$", out)


# -----------------------------------------------------------------------------
# Monitoring: Grafana's dashboard and Prometheus' rules
# -----------------------------------------------------------------------------

QUERIES = {**{panel.title: [query.replace(sollol.RANGE, "5m") for query in panel.queries.values()]
              for panel in sollol.PANELS}, **{alert.name: [alert.query] for alert in sollol.ALERTS}}
LEGENDS = {**{panel.title: " ".join(panel.queries) for panel in sollol.PANELS},
         **{alert.name: alert.summary for alert in sollol.ALERTS}}


@functools.cache
def scrape_of_a_gateway():
    """Return {name of a sample: its labels} of a gateway to which all has happened that it counts."""
    async def run():
        async with gateway_for(bench.SimNode(**FAST)) as gateway:
            await call(gateway, "POST", "/api/generate", generate())
            for counter in (gateway.telemetry.metrics.failovers, gateway.telemetry.metrics.races):
                counter["a", "yes"] += 1
            return (await call(gateway, "GET", "/metrics")).body.decode()

    samples = re.findall(r"(?m)^(sollol_\w+)(?:\{(.*)\})? ", bench.run_quick(run()))
    return {name: set(re.findall(r'(\w+)="', labels)) for name, labels in samples}


@pytest.mark.parametrize("name", QUERIES)
def test_every_metric_and_label_of_a_panel_or_rule_is_one_of_the_gateways(name):
    seen = scrape_of_a_gateway()
    for query in QUERIES[name]:
        metrics = re.findall(r"(sollol_\w+)(?:\{(.*?)\})?", query)
        assert metrics
        for metric, selector in metrics:
            assert metric in seen and set(re.findall(r'(\w+) ?[=!]~?"', selector)) <= seen[metric]
        known = set().union(*(seen[metric] for metric, _ in metrics))
        grouped = [label for labels in re.findall(r"(?:by|without) \((.*?)\)", query) for label in labels.split(", ")]
        assert set(grouped) <= known
    known = set().union(*(seen[metric] for query in QUERIES[name] for metric in re.findall(r"sollol_\w+", query)))
    assert set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", LEGENDS[name])) <= known


def test_panels_of_the_dashboard_lie_side_by_side():
    panels = json.loads(sollol.grafana_dashboard())["panels"]
    places = [(panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y) for panel in panels
              for x in range(panel["gridPos"]["w"]) for y in range(panel["gridPos"]["h"])]
    assert len(set(places)) == len(places) and all(0 <= x < 24 for x, _ in places)
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})


def test_grafana_knows_every_field_of_the_dashboard():
    """Its own classes read the dashboard and write it again: what they do not know would be lost."""
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard",
                                    reason="PyPI grafana-foundation-sdk is not installed").Dashboard
    from grafana_foundation_sdk.cog import encoder, plugins

    def assert_within(part, whole):
        if isinstance(part, dict):
            assert part.keys() <= whole.keys()
        else:
            assert len(part) == len(whole)
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, (dict, list)):
                assert_within(value, whole[key])
            else:
                assert value == whole[key]

    plugins.register_default_plugins()
    given = json.loads(sollol.grafana_dashboard())
    assert_within(given, json.loads(encoder.JSONEncoder().encode(dashboard.from_json(given))))


def promtool(*words):
    """Run Prometheus' own tool; return what it says. It ends with an error if it has found one."""
    program = shutil.which("promtool", path=f"{os.environ['PATH']}:{HERE}/.venv/prometheus/usr/bin")
    if not program:
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    done = subprocess.run([program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_reads_the_rules_and_every_query_of_the_dashboard(tmp_path):
    rules, queries = tmp_path / "rules.yml", tmp_path / "queries.yml"
    rules.write_text(sollol.alerting_rules())
    assert f"{len(sollol.ALERTS)} rules found" in promtool("check", "rules", rules)
    rows = [{"record": f"query:{number}", "expr": query} for number, query in
            enumerate(query for panel in sollol.PANELS for query in QUERIES[panel.title])]
    queries.write_text(json.dumps({"groups": [{"name": "panels", "rules": rows}]}))
    assert f"{len(rows)} rules found" in promtool("check", "rules", queries)


NODE_SERIES = {"sollol_node_up": 1, "sollol_node_draining": 0, "sollol_node_asleep": 0, "sollol_inflight": 1,
        "sollol_node_wanted": 0}
WAS_OK, WAS_BAD, WAS_WRONG = (
    f'sollol_requests_total{{node="a",model="m",route="/api/chat",code="{code}",outcome="{outcome}"}}'
                  for code, outcome in (("200", "ok"), ("503", "refused"), ("404", "error")))
# Alert, series of node a, other series, what its summary says of value and labels; None: it is not called for.
CALLS = [
    ("SollolGone", {}, {}, {}), ("SollolGone", {}, {"sollol_build_info": "1x40"}, None),
    ("SollolNodeDown", {"sollol_node_up": 0}, {}, {"node": "a"}), ("SollolNodeDown", {}, {}, None),
    ("SollolNodeDown", {"sollol_node_up": 0, "sollol_node_draining": 1}, {}, None),
    ("SollolNodeDown", {"sollol_node_up": 0, "sollol_node_asleep": 1}, {}, None),
    ("SollolNoNode", {"sollol_node_draining": 1}, {}, {}), ("SollolNoNode", {"sollol_node_up": 0}, {}, {}),
    ("SollolNoNode", {"sollol_node_up": 0, "sollol_node_asleep": 1}, {}, None),
    ("SollolNoNode", {"sollol_node_up": 0}, {'sollol_node_up{node="b"}': "1x40",
     'sollol_node_draining{node="b"}': "0x40", 'sollol_node_asleep{node="b"}': "0x40"}, None),
    ("SollolNothingRuns", {"sollol_inflight": 0}, {'sollol_queue_depth{priority="5"}': "3x40"}, {"$value": "3"}),
    ("SollolNothingRuns", {}, {'sollol_queue_depth{priority="5"}': "3x40"}, None),
    ("SollolQueueOld", {}, {"sollol_queue_oldest_seconds": "90x40"}, {"$value | humanizeDuration": "1m 30s"}),
    ("SollolQueueOld", {}, {"sollol_queue_oldest_seconds": "90x2 0x40"}, None),
    ("SollolModelWithoutNode", {}, {'sollol_model_nodes{model="m"}': "0x40", WAS_OK: "0+1x40"}, {"model": "m"}),
    ("SollolModelWithoutNode", {}, {'sollol_model_nodes{model="m"}': "1x40", WAS_OK: "0+1x40"}, None),
    ("SollolModelWithoutNode", {}, {'sollol_model_nodes{model="m"}': "0x40", WAS_OK: "7x40"}, None),
    ("SollolErrors", {}, {WAS_OK: "0+9x40", WAS_BAD: "0+1x40"}, {"$value | humanizePercentage": "10%"}),
    ("SollolErrors", {}, {WAS_OK: "0+9x40", WAS_WRONG: "0+1x40"}, None),
    ("SollolErrors", {}, {WAS_OK: "0+99x40", WAS_BAD: "0+1x40"}, None),
    ("SollolNodeIdle", {"sollol_node_wanted": 2, "sollol_inflight": 0}, {}, {"node": "a", "$value": "2"}),
    ("SollolNodeIdle", {"sollol_node_wanted": 2}, {}, None), ("SollolNodeIdle", {"sollol_inflight": 0}, {}, None),
    ("SollolNodeIdle", {"sollol_node_wanted": 2, "sollol_inflight": 0, "sollol_node_draining": 1}, {}, None)]


def test_each_alert_is_called_for_when_it_must_be_and_only_then(tmp_path):
    """The series are samples of 30 s; after 15 minutes each alert has lasted long enough."""
    tests = []
    for name, changed, series, said in CALLS:
        alert, = (alert for alert in sollol.ALERTS if alert.name == name)
        summary = alert.summary
        for word, text in (said or {}).items():
            summary = summary.replace("{{ %s }}" % (word if word[0] == "$" else f"$labels.{word}"), text)
        labels = {word: text for word, text in (said or {}).items() if word[0] != "$"}
        expected = {"exp_labels": {"severity": alert.severity, **labels}, "exp_annotations": {"summary": summary}}
        of_node = NODE_SERIES | changed
        rows = {**{f'{metric}{{node="a"}}': f"{value}x40" for metric, value in of_node.items()}, **series}
        tests.append({"interval": "30s", "input_series": [{"series": row, "values": values}
                                                          for row, values in rows.items()],
                      "alert_rule_test": [{"eval_time": "15m", "alertname": name,
                                           "exp_alerts": [] if said is None else [expected]}]})
    (tmp_path / "rules.yml").write_text(sollol.alerting_rules())
    (tmp_path / "tests.yml").write_text(json.dumps(
        {"rule_files": ["rules.yml"], "evaluation_interval": "30s", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "tests.yml")


@pytest.mark.parametrize("flag", ["--grafana", "--alerts"])
def test_monitoring_is_printed_without_nodes(flag):
    done = subprocess.run([sys.executable, "sollol.py", flag], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    if flag == "--grafana":
        assert json.loads(done.stdout)["title"] == "SOLLOL"
    else:
        yaml = pytest.importorskip("yaml", reason="PyPI pyyaml is not installed")
        rules = yaml.safe_load(done.stdout)["groups"][0]["rules"]
        assert [(rule["alert"], rule["expr"], rule["for"], rule["labels"], rule["annotations"]) for rule in rules] == [
            (alert.name, alert.query, alert.lasts, {"severity": alert.severity}, {"summary": alert.summary})
            for alert in sollol.ALERTS]


# -----------------------------------------------------------------------------
# The README's commands: each is run, here or by .ci/run, the long ones with smaller numbers
# -----------------------------------------------------------------------------

def readme_commands():
    """Return every command in the README, without its comment."""
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (?:\$ )?((?:python3|curl|sudo|docker|journalctl|kubectl) .*)", text, re.M)
    spans = re.findall(r"`((?:python3 )?(?:bench|sollol)\.py(?: .*?)?|(?:curl|docker|kubectl|sudo) .*?)`", text)
    commands = {re.sub(r" +#.*", "", command) for command in (*lines, *spans)}
    return sorted(command if not command.startswith(("bench", "sollol")) else f"python3 {command}"
                  for command in commands if command not in ("bench.py", "sollol.py"))


SERVES = {"python3 sollol.py --demo", "python3 sollol.py --hosts hosts.txt"}
ENDS = {"python3 sollol.py --hosts hosts.txt --check": (0, 1),      # whether this machine has an Ollama or not
        "python3 sollol.py --help": (0,), "python3 bench.py --help": (0,),
        "python3 sollol.py --grafana": (0,), "python3 sollol.py --alerts": (0,),
        "python3 bench.py compare --scenario seed/mild5": (0,),
        "python3 bench.py compare --scenario models5/mild5": (0,),
        "python3 bench.py matrix": (0,), "python3 bench.py coding": (0,), "python3 bench.py gateways": (0,)}
SMALLER = {"python3 bench.py matrix": ["seed/hom3"], "python3 bench.py coding": ["2"],
           "python3 bench.py gateways": ["20 clients, 1 model", "--clusters", "hom3", "--rounds", "1"]}
# What runs the others: a test, or a line of .ci/run with these words.
ELSEWHERE = {"curl ": "test_demo_of_the_readme_answers_its_curls",
             "docker compose ": "test_compose_file_of_the_readme_is_what_it_should_be",
             "kubectl create": "test_kubectl_makes_the_objects_that_the_readme_asks_of_it",
             **dict.fromkeys(("kubectl apply", "kubectl rollout restart deployment sollol"),
                             "test_objects_of_kubernetes_in_the_readme_are_what_they_should_be"),
             "sudo install": "test_service_is_installed_by_the_readmes_commands",
             "python3 bench.py live": "test_live_cluster_is_measured_against_round_robin_over_its_hosts",
             "python3 bench.py tradeoff": "test_tradeoff_shows_the_median_and_the_tail_of_each_way",
             "python3 bench.py mismatch": "test_mismatch_shows_how_we_stand_and_fails_if_a_gain_becomes_a_loss",
             "python3 bench.py misled": "test_wrong_beliefs_cost_little_and_no_request",
             "python3 -m venv": "'^    python3 -m venv '",
             **{f"python3 bench.py {name}": f"bench.py {name}" for name in (
                 "overhead", "streams", "kills", "siege", "soak", "upgrades")}}
NEEDS_SYSTEMD = ("sudo systemctl daemon-reload", "sudo systemctl enable --now sollol", "journalctl -u sollol -f",
                 "sudo systemctl restart sollol", "sudo systemctl reload-or-restart sollol")


@pytest.mark.parametrize("command", readme_commands())
def test_command_of_the_readme_is_run(command):
    if command in NEEDS_SYSTEMD:
        pytest.skip("would change this machine")
    words = shlex.split(command)[1:]
    if command in SERVES:
        with program(*words, "--port", 0) as process:
            read_until(process, r"http://127.0.0.1:\d+")
            process.send_signal(signal.SIGTERM)
            process.wait(10)
    elif command in ENDS:
        done = subprocess.run([sys.executable, *words, *SMALLER.get(command, ())], cwd=HERE, capture_output=True)
        assert done.returncode in ENDS[command] and done.stdout
    else:
        runner, = (runner for beginning, runner in ELSEWHERE.items() if command.startswith(beginning))
        assert runner in globals() or runner in (HERE / ".ci" / "run").read_text()


def test_demo_of_the_readme_answers_its_curls():
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    commands = [command for command in readme_commands() if command.startswith("curl")]
    assert len(commands) == 4
    with program("sollol.py", "--demo", "--port", 0) as demo:
        url = read_until(demo, r"event=start .*url=(\S+)")[1]
        for command in commands:
            words = shlex.split(command.replace("http://127.0.0.1:8000", url).replace("/NAME/", "/m2/"))
            done = subprocess.run([*words, "-sS", "--fail"], capture_output=True, check=True)
            if "-N" in words:
                lines = done.stdout.splitlines()
                assert json.loads(lines[0])["done"] is False and json.loads(lines[-1])["done"] is True


def test_addresses_in_the_readme_are_those_of_the_gateway():
    """For every client it names: the port is the default one, and where a path is told, it is /v1."""
    found = re.findall(r"http://(?:127\.0\.0\.1|localhost|sollol):8000([^\s\"'`)>]*)", (HERE / "README.md").read_text())
    assert sollol.command_line().get_default("port") == "8000" and len(found) >= 10
    assert set(found) <= {"", "/v1", "/dashboard", "/api/chat", "/api/pull", "/api/health", "/api/nodes/NAME/drain"}


def installed(root, secrets=False):
    """Install the service as the README does, below another root; return {key: [values]} of its unit, seen from there.

    With `secrets` the unit's commented lines count, and %d is the folder `credentials`.
    """
    for command in readme_commands():
        if command.startswith("sudo install"):
            words = shlex.split(re.sub(" (/opt|/etc)", rf" {root}\1", command.removeprefix("sudo ")))
            subprocess.run(words, cwd=HERE, check=True)
    text = (root / "etc/systemd/system/sollol.service").read_text()
    found = {}
    for key, value in re.findall(r"(?m)^%s(\w+)=(.*)" % ("#?" if secrets else ""), text):
        value = value.replace("%S", f"{root}/state").replace("%d", f"{root}/credentials")
        found.setdefault(key, []).append(re.sub(r"(^|[ =:])(?=/(opt|etc)/)", rf"\1{root}", value))
    return found


def environment_of(unit):
    """Return what a unit sets in the environment; the last line wins."""
    return dict(word.split("=", 1) for line in unit["Environment"] for word in line.split())


def test_service_is_installed_by_the_readmes_commands(tmp_path):
    """Under another root, and without systemd: its command then runs, with the settings of its environment."""
    unit = installed(tmp_path)
    (folder,), (command,) = unit["WorkingDirectory"], unit["ExecStart"]
    if shutil.which("systemctl"):
        subprocess.run(["systemctl", f"--root={tmp_path}", "enable", "sollol"], check=True, capture_output=True)
        assert (tmp_path / "etc/systemd/system/multi-user.target.wants/sollol.service").is_symlink()
    (tmp_path / "state/sollol").mkdir(parents=True)
    with subprocess.Popen([sys.executable, *command.split()[1:], "--port", "0"], cwd=folder, text=True,
                          stderr=subprocess.PIPE, env={**os.environ, **environment_of(unit)}) as process:
        try:
            assert any("event=start" in line for line in process.stderr)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


NOBODY = 65534
AS_NOBODY = [*f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --inh-caps=-all --bounding-set=-all".split(),
             "--no-new-privs"]
# ProtectSystem=strict and ProtectHome=yes, where the test may mount: all but the folder of the state is read-only.
STRICT = ("mount --make-rprivate / && mount --bind {state} {state} && mount -o remount,bind,ro / && "
          "mount -t tmpfs -o ro tmpfs /root && cd {folder} && exec \"$@\"")


@pytest.fixture
def open_folder():
    """A folder that every user can look into, as those of /opt and /etc."""
    with tempfile.TemporaryDirectory(prefix="sollol-") as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder)


@pytest.mark.parametrize("secrets", [False, True], ids=["plain", "with secrets"])
def test_service_runs_as_a_user_who_may_do_nothing(secrets, open_folder, pems):
    """As systemd runs it: a user without capabilities, a read-only file system, an environment of its own."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    python = "/usr/bin/python3"
    if not shutil.which("setpriv") or subprocess.run([python, "-c", "import tomllib"], capture_output=True).returncode:
        pytest.skip("setpriv or /usr/bin/python3, 3.11 or later, is not installed")
    unit = installed(open_folder, secrets)
    (folder,), (command,), state = unit["WorkingDirectory"], unit["ExecStart"], open_folder / "state"
    hosts = open_folder / "etc/sollol/hosts.txt"
    (state / "sollol").mkdir(parents=True)
    os.chown(state / "sollol", NOBODY, NOBODY)
    os.chmod(state / "sollol", 0o700)
    if secrets:
        hosts.write_text("http://127.0.0.1:1 token=hush\n")
        hosts.chmod(0o600)
        (hosts.parent / "keys").write_text("hushhush name=alice\n")
        for name in ("tls.pem", "tls.key"):
            shutil.copy(pems / name.replace("tls", "one"), hosts.parent / name)
        (open_folder / "credentials").mkdir()
        for line in unit["LoadCredential"]:
            name, path = line.split(":")
            shutil.copy(path, open_folder / "credentials" / name)
            os.chown(open_folder / "credentials" / name, NOBODY, NOBODY)
            os.chmod(open_folder / "credentials" / name, 0o400)
    words = [*AS_NOBODY, *command.split(), "--port", "0"]
    strict = ["unshare", "--mount", "sh", "-c", STRICT.format(state=state, folder=folder), "sh"]
    if not subprocess.run([*strict, "true"], capture_output=True).returncode:       # else only users and rights
        words = [*strict, *words]
    environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "LANG": "C",
               "NOTIFY_SOCKET": str(open_folder / "notify"), **environment_of(unit),
               **({"CREDENTIALS_DIRECTORY": str(open_folder / "credentials")} if secrets else {})}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, \
         tempfile.TemporaryFile("w+") as output, \
         subprocess.Popen(words, cwd=folder, env=environ, stdout=output, stderr=output,
                          preexec_fn=functools.partial(os.umask, int(unit["UMask"][0], 8))) as process:
        process.output, process.seen = output, 0
        manager.bind(str(open_folder / "notify"))
        os.chmod(open_folder / "notify", 0o777)
        manager.settimeout(20)
        try:
            url = read_until(process, r"event=start .*url=(\S+)")[1]
            assert manager.recv(1000) == b"READY=1" and url.startswith("https:" if secrets else "http:")
            if not secrets:         # saved, it is read again
                hosts.write_text("http://127.0.0.1:1 name=another\n")
                read_until(process, "event=reload added=another")
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
        text = all_output(process)
        assert "Traceback" not in text and "chmod" not in text and "level=error" not in text
    found = (state / "sollol/state.json").stat()
    assert (found.st_uid, found.st_mode & 0o777) == (NOBODY, 0o600)


# -----------------------------------------------------------------------------
# Official clients
# -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cluster_url():
    """Run three simulated nodes and a gateway as processes; yield the gateway's URL."""
    with program("bench.py", "--nodes", 3, "--port", 0, "--speed", 20) as nodes:
        urls = [read_until(nodes, r"http://\S+")[0] for _ in range(3)]
        with program("sollol.py", "--port", 0, *(word for url in urls for word in ("--node", url))) as gateway:
            yield read_until(gateway, r"event=start .*url=(\S+)")[1]


def test_official_ollama_client_asks_models(cluster_url):
    ollama = pytest.importorskip("ollama", reason="PyPI ollama is not installed")
    client = ollama.Client(cluster_url)
    assert client.chat("llama3.2", MESSAGES).message.content
    parts = list(client.chat("llama3.2", MESSAGES, stream=True))
    assert parts[-1].done and parts[-1].eval_count == 3
    assert client.generate("llama3.2", "hi <out=4>").response
    assert list(client.generate("llama3.2", "hi <out=4>", stream=True))[-1].done
    assert client.embed("nomic-embed-text", "one").embeddings == [expected_vectors(["one"])[0]]
    assert client.embed("nomic-embed-text", TEXTS[:100]).embeddings == expected_vectors(TEXTS[:100])
    assert client.embeddings("nomic-embed-text", "one").embedding
    assert "llama3.2:latest" in [model.model for model in client.ps().models]
    assert client.generate("llama3.2", "", keep_alive=0).done_reason == "unload"
    assert "llama3.2:latest" not in [model.model for model in client.ps().models]
    for ask in (lambda: client.chat("no-such-model", MESSAGES),
                lambda: list(client.chat("no-such-model", MESSAGES, stream=True)),
                lambda: client.embed("no-such-model", "x"), lambda: client.generate("no-such-model", "x")):
        with pytest.raises(ollama.ResponseError, match="not found") as caught:
            ask()
        assert caught.value.status_code == 404


# Ollama, server/routes.go.
OLLAMA_PATHS = [
    "/", "/api/version", "/api/status", "/api/pull", "/api/push", "/api/tags", "/api/show", "/api/delete", "/api/me",
    "/api/signout", "/api/user/keys/{}", "/api/create", "/api/blobs/{}", "/api/copy", "/api/experimental/web_search",
    "/api/experimental/web_fetch", "/api/experimental/model-recommendations", "/api/ps", "/api/generate", "/api/chat",
    "/api/embed", "/api/embeddings", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models",
    "/v1/models/{}", "/v1/responses", "/v1/audio/transcriptions", "/v1/messages", "/v1/images/generations",
    "/v1/images/edits"]


@pytest.mark.parametrize("package, pattern, before", [
    ("ollama", r"""['"](/api/[a-z_/{}-]*)""", ""), ("openai", r'"(/[a-z0-9_/{}-]+)', "/v1"),
    ("anthropic", r'"(/v1/[a-z0-9_/{}-]+)', "")])
def test_every_path_of_an_official_client_that_ollama_serves_has_a_row(package, pattern, before):
    module = pytest.importorskip(package, reason=f"PyPI {package} is not installed")
    folder = pathlib.Path(module.__file__).parent
    paths = {before + re.sub(r"{[^}]*}", "{}", path) for file in folder.rglob("*.py")
             for path in re.findall(pattern, file.read_text())}
    served = paths & {*OLLAMA_PATHS, "/v1/messages/count_tokens"}
    assert len(served) >= {"ollama": 12, "openai": 8, "anthropic": 3}[package]
    assert package != "ollama" or served == paths
    assert not [path for path in served if path.removesuffix("{}") not in sollol.KNOWN_PATHS]


def test_every_path_of_ollamas_own_has_a_row():
    assert not [path for path in OLLAMA_PATHS if path.removesuffix("{}") not in sollol.KNOWN_PATHS]


def test_official_ollama_client_changes_models(cluster_url, tmp_path):
    ollama = pytest.importorskip("ollama", reason="PyPI ollama is not installed")
    client = ollama.Client(cluster_url)

    def listed():
        return {model.model for model in client.list().models}

    assert client.pull("phi4:14b").status == "success" and "phi4:14b" in listed()
    found = [part.status for part in client.pull("llama3.1:8b", stream=True)]
    assert found[0] == "pulling manifest" and found.count("success") == 1 == found[-1:].count("success")
    assert client.show("phi4:14b").details
    assert client.copy("phi4:14b", "mine").status == "success" and "mine:latest" in listed()
    assert client.create("his", from_="phi4:14b").status == "success" and "his:latest" in listed()
    weights = tmp_path / "weights.gguf"
    weights.write_bytes(os.urandom(2**20))
    digest = client.create_blob(weights)
    parts = list(client.create("her", files={"weights.gguf": digest}, stream=True))
    assert parts[-1].status == "success" and client.show("her").modelfile
    for model in ("phi4:14b", "mine", "his", "her"):
        assert client.delete(model).status == "success"
    assert not listed() & {"phi4:14b", "mine:latest", "his:latest", "her:latest"}
    for change in (lambda: client.delete("mine"), lambda: client.copy("mine", "x"), lambda: client.show("mine"),
                   lambda: client.pull("no-such"), lambda: list(client.pull("no-such", stream=True)),
                   lambda: client.create("x")):
        with pytest.raises(ollama.ResponseError):
            change()


def test_official_ollama_client_without_waiting(cluster_url, tmp_path):
    ollama = pytest.importorskip("ollama", reason="PyPI ollama is not installed")
    weights = tmp_path / "weights.gguf"
    weights.write_bytes(os.urandom(2**20))

    async def run():
        client = ollama.AsyncClient(cluster_url)
        answers = await asyncio.gather(*(client.chat("llama3.2", MESSAGES) for _ in range(8)))
        assert len({answer.message.content for answer in answers}) == 1
        assert [part async for part in await client.chat("llama3.2", MESSAGES, stream=True)][-1].done
        assert (await client.create_blob(weights)).startswith("sha256:")        # in chunks

    asyncio.run(run())


def test_official_openai_client(cluster_url):
    openai = pytest.importorskip("openai", reason="PyPI openai is not installed")
    client = openai.OpenAI(base_url=f"{cluster_url}/v1", api_key="unused", max_retries=0)
    assert client.chat.completions.create(model="llama3.2", messages=MESSAGES).usage.completion_tokens == 3
    stream = client.chat.completions.create(model="llama3.2", messages=MESSAGES, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream)
    assert client.completions.create(model="llama3.2", prompt="hi <out=4>").choices[0].text
    texts = TEXTS[:100]
    found = client.embeddings.create(model="nomic-embed-text", input=texts)
    assert [row.index for row in found.data] == list(range(100))
    for row, vector in zip(found.data, expected_vectors(texts), strict=True):
        assert row.embedding == pytest.approx(vector)
    assert "llama3.2:latest" in [model.id for model in client.models.list()]
    assert client.models.retrieve("qwen3:14b").id == "qwen3:14b"
    assert client.responses.create(model="llama3.2", input="hi <out=3>").output_text
    events = list(client.responses.create(model="llama3.2", input="hi <out=3>", stream=True))
    assert events[-1].type == "response.completed" and events[-1].response.usage.output_tokens == 3
    for ask in (lambda: client.chat.completions.create(model="no-such-model", messages=MESSAGES),
                lambda: client.embeddings.create(model="no-such-model", input=texts),
                lambda: client.responses.create(model="no-such-model", input="hi", stream=True)):
        with pytest.raises(openai.NotFoundError, match="not found"):
            ask()


def test_official_anthropic_client(cluster_url):
    anthropic = pytest.importorskip("anthropic", reason="PyPI anthropic is not installed")
    client = anthropic.Anthropic(base_url=cluster_url, api_key="unused", max_retries=0)
    asked = {"model": "llama3.2", "max_tokens": 50, "messages": MESSAGES}
    whole = client.messages.create(**asked)
    assert whole.content[0].text and whole.usage.output_tokens == 3
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().stop_reason == "end_turn"
    with pytest.raises(anthropic.NotFoundError, match="not found"):
        client.messages.create(**{**asked, "model": "no-such-model"})
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**{**asked, "max_tokens": 0})


def test_official_clients_read_rescued_streams_as_one():
    """Cut behind every event."""
    anthropic = pytest.importorskip("anthropic", reason="PyPI anthropic is not installed")
    openai = pytest.importorskip("openai", reason="PyPI openai is not installed")

    async def messages(url):
        asked = {"model": "llama3.2", "max_tokens": 9, "messages": MESSAGES, "extra_body": {"temperature": 0}}
        async with (anthropic.AsyncAnthropic(base_url=url, api_key="unused", max_retries=0) as client,
                    client.messages.stream(**asked) as stream):
            text = "".join([piece async for piece in stream.text_stream])
            whole = await stream.get_final_message()
        return text, whole.content[-1].text, whole.id, whole.usage.output_tokens

    async def responses(url):
        async with (openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
                    client.responses.stream(model="llama3.2", input="hi", temperature=0) as stream):
            text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
            whole = await stream.get_final_response()
        return text, whole.output_text, whole.id, whole.usage.output_tokens

    async def run():
        for path, ask, name in (("/v1/messages", messages, "msg_1"), ("/v1/responses", responses, "resp_1")):
            parts = ANSWERS["thinking, then a text", path]
            first, second = EVENTS_OF[path](1, *parts), EVENTS_OF[path](2, *split_anew(parts, random.Random(4)))
            for cut in range(1, len(first)):
                begun, whole = (chunked(*events, kind=b"text/event-stream", end=end) for events, end in (
                    (first[:cut], b""), (second, b"0\r\n\r\n")))
                nodes = (ScriptedNode(lambda request, begun=begun: [begun, 0.02]),
                         ScriptedNode(lambda request, whole=whole: [whole, KEEP]))
                async with gateway_for(*nodes, flags=IN_TURN) as gateway:
                    url = "http://{}:{}".format(*gateway.listener.address)
                    assert await ask(url) == ("So!", "So!", name, 7) and gateway.dispatcher.rescues == {"whole": 1}

    asyncio.run(run())


OLLAMA_JS = """
const { Ollama } = require("ollama");
(async () => {
  const client = new Ollama({ host: process.argv[1] }), messages = [{ role: "user", content: "hi <out=3>" }];
  const said = (await client.chat({ model: "llama3.2", messages })).message.content;
  let streamed = "", last;
  for await (const part of await client.chat({ model: "llama3.2", messages, stream: true })) {
    streamed += part.message.content; last = part;
  }
  const pulled = [];
  for await (const part of await client.pull({ model: "mistral", stream: true })) pulled.push(part.status);
  await client.copy({ source: "mistral", destination: "js" });
  const names = (await client.list()).models.map((model) => model.name);
  await client.delete({ model: "js" });
  const error = await client.show({ model: "js" }).catch((error) => error.message);
  const vectors = (await client.embed({ model: "nomic-embed-text", input: ["a", "b"] })).embeddings.length;
  console.log(JSON.stringify({ same: said === streamed, done: last.done, pulled, names, error, vectors }));
})();
"""


def test_official_javascript_client(cluster_url):
    node = shutil.which("node")
    if not node:
        pytest.skip("node is not installed")
    paths = [os.environ.get("NODE_PATH", ""), str(HERE / ".venv" / "npm" / "node_modules")]
    environ = {**os.environ, "NODE_PATH": os.pathsep.join(paths)}
    run = functools.partial(subprocess.run, env=environ, capture_output=True, text=True, timeout=60)
    if run([node, "-e", "require.resolve('ollama')"]).returncode:
        pytest.skip("npm ollama is not installed")
    done = run([node, "-e", OLLAMA_JS, cluster_url])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] and found["done"] and found["vectors"] == 2
    assert found["pulled"][-1] == "success" and found["pulled"].count("success") == 1
    assert "js:latest" in found["names"] and "not found" in found["error"]


# -----------------------------------------------------------------------------
# Simulated nodes: what real Ollama nodes do
# -----------------------------------------------------------------------------

def directly(node):
    """Return what stands for a gateway in `call`: the node itself."""
    listener, options = types.SimpleNamespace(address=("127.0.0.1", node.port)), types.SimpleNamespace(tls_cert=None)
    return types.SimpleNamespace(listener=listener, options=options)


def alone(hardware="rtx3060", **settings):
    """Let an async test(node) run on a simulated node without a gateway, in virtual time."""
    def decorate(test):
        async def serve():
            node = await bench.SimNode(hardware, **{"loaded": ("llama3.2",), **settings}).start()
            try:
                await test(node)
            finally:
                await node.stop()

        def run():
            bench.run_virtual(serve())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run
    return decorate


async def ask(node, path="/api/generate", value=None, method="POST", **fields):
    return await call(directly(node), method, path, generate() if value is None else value, **fields)


async def times_of_pieces(node, path, value):
    """Return (time, piece) of each chunk of a stream."""
    caller, now_s = await Caller.to(directly(node)), asyncio.get_running_loop().time
    caller.writer.write(posted(value, path.encode()))
    await caller.head()
    found = [(now_s(), piece) async for piece in caller.chunks()]
    caller.close()
    return found


async def loaded_names(node):
    return [row["name"] for row in (await call(directly(node), "GET", "/api/ps")).json()["models"]]


FUNCTION = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLING = {"messages": [{"role": "user", "content": "<call> <out=100>"}], "tools": [FUNCTION], "model": "llama3.2",
           "stream": True}


@table("path, value, told", [
    ("chat", "/api/chat", CALLING, b'"tool_calls":'), ("openai", "/v1/chat/completions", CALLING, b'"tool_calls"'),
    ("messages", "/v1/messages", CALLING | {"tools": [{"name": "look"}], "max_tokens": 500}, b'"tool_use"'),
    ("responses", "/v1/responses", {"model": "llama3.2", "input": "<call> <out=100>", "stream": True, "tools": [
        {"type": "function", "name": "look"}]}, b"function_call_arguments.done")])
def test_simulated_stream_shows_nothing_of_a_tool_call_before_it_is_whole(path, value, told):
    @alone()
    async def run(node):
        pieces = await times_of_pieces(node, path, value)
        assert len({at_s for at_s, _ in pieces}) == 1 and pieces[0][0] > 100 / 115
        text = b"".join(piece for _, piece in pieces)
        assert told in text and b'"look"' in text
        assert b"call" in (await ask(node, path, value | {"stream": False})).body
        spoken = await times_of_pieces(node, path, json.loads(json.dumps(value).replace("<call>", "")))
        assert len({at_s for at_s, _ in spoken}) > 50
    run()


@alone(slots=2)
async def test_simulated_prompt_stops_the_other_streams_of_its_runner_but_for_a_token_per_batch(node):
    stream = asyncio.create_task(times_of_pieces(node, "/api/generate", generate(tokens=60, stream=True)))
    await asyncio.sleep(0.2)
    prompt = bench.worded("<out=1> ", 4000)         # 3,450 tok/s
    await ask(node, value={"model": "llama3.2", "prompt": prompt, "stream": False})
    times = [at_s for at_s, _ in await stream]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert sum(gap > 0.1 for gap in gaps) in (4, 5) and 1.1 < sum(gap for gap in gaps if gap > 0.1) < 1.4


@alone(slots=2)
async def test_simulated_prompt_keeps_new_requests_waiting_for_the_end_of_its_batch(node):
    """Seen with llama-server: up to 2.5 s that no duration in the answer tells."""
    prompt = bench.worded("<out=1> ", 4000)         # 3,450 tok/s: a batch takes 0.3 s
    first = asyncio.create_task(ask(node, value={"model": "llama3.2", "prompt": prompt, "stream": False}))
    await asyncio.sleep(0.4)
    later = (await ask(node, value=generate(tokens=1))).json()
    await first
    waited_s = (later["total_duration"] - later.get("load_duration", 0) - later["prompt_eval_duration"]
                - later["eval_duration"]) / 1e9
    assert waited_s == pytest.approx(2 * 1024 / 3450 - 0.37, abs=0.05)


@alone(slots=4)
async def test_simulated_prompts_are_evaluated_one_after_the_other(node):
    bodies = [{"model": "llama3.2", "prompt": bench.worded(f"<out=1> {number} ", 3450), "stream": False}
              for number in range(3)]
    answers = await asyncio.gather(*(ask(node, value=body) for body in bodies))
    told = [answer.json() for answer in answers]
    took = sorted((answer["total_duration"] - answer["eval_duration"]) / 1e9 for answer in told)
    assert took == pytest.approx([1.0, 2.0, 3.0], rel=0.05)


def chat_turn(name):
    return {"model": "llama3.2", "stream": False, "prompt": bench.worded(f"<out=5> {name} {name * 300} ", 3000)}


@pytest.mark.parametrize("cache_gb, again_s", [(0.0, 0.8), (8.0, 0.0)])
def test_simulated_slot_holds_one_prompt_and_current_engines_keep_others_in_memory(cache_gb, again_s):
    @alone(slots=1, prompt_cache_gb=cache_gb)
    async def run(node):
        turns = [(await ask(node, value=chat_turn(name))).json() for name in "ABAA"]
        took = [turn["prompt_eval_duration"] / 1e9 for turn in turns]
        assert took == pytest.approx([0.87, 0.87, again_s or 0.0, 0.0], abs=0.1)
        assert {turn["prompt_eval_count"] for turn in turns} == {3000}      # cached tokens count
    run()


def test_simulated_prompt_cache_is_bounded():
    @alone(slots=1, prompt_cache_gb=0.5)            # 5,900 tokens of a 3B model
    async def run(node):
        for name in "ABCD":
            await ask(node, value=chat_turn(name))
        assert len(node.engine.resident["llama3.2:latest"].kept) == 1
    run()


@table("text, least, most", [
    ("English", "You may look at the house that was made for you, and then go home.", 15, 20),
    ("words at random", " ".join(f"{random.Random(n).getrandbits(16):x}" for n in range(100)), 315, 494),
    ("letters at random", " ".join("".join(random.Random(n).choices("bcdfghklmnpqrstvwxz", k=9)) for n in range(9)),
     27, 45), ("JSON", '{"type":"object","properties":{}}', 8, 20),
    ("filler", bench.worded("a ", 1234), 1234, 1234), ("picture", bench.picture("x"), 769, 775)])
def test_simulated_tokens_are_counted_as_real_ones(text, least, most):
    assert least <= bench.token_count(text) <= most


def test_tokens_of_a_long_prompt_are_counted_in_a_few_milliseconds():
    text = "".join(json.dumps({"name": f"tool{n}", "description": bench.worded("x ", 20)}) for n in range(1000))
    started_s = time.perf_counter()
    assert len(text) > 100_000 and bench.token_count(text) > 20_000
    assert time.perf_counter() - started_s < 0.1


@alone()
async def test_simulated_prompt_counts_tools_their_results_and_calls(node):
    def counted(answer):
        found = answer.json()
        return found.get("prompt_eval_count") or found["usage"]["input_tokens"]

    tools = [{**FUNCTION, "description": "some words of a schema " * 100}]
    messages = [{"role": "user", "content": "hello"}]
    plain, more = [counted(await ask(node, "/api/chat", {"model": "llama3.2", "stream": False, "messages": messages,
                                                         **extra})) for extra in ({}, {"tools": tools})]
    assert more > plain + 400
    given = [{"type": "text", "text": "word " * 500}]
    result = [{"role": "user", "content": [{"type": "tool_result", "content": given}]}]
    assert counted(await ask(node, "/v1/messages", {"model": "llama3.2", "max_tokens": 1, "messages": result})) >= 500
    output = [{"type": "function_call_output", "output": "word " * 500}]
    assert counted(await ask(node, "/v1/responses", {"model": "llama3.2", "input": output})) >= 500


@alone("cpu", models=("nomic-embed-text",), loaded=("nomic-embed-text",))
async def test_simulated_embeddings_cost_per_input(node):
    async def took_s(texts):
        started_s = asyncio.get_running_loop().time()
        assert (await ask(node, "/api/embed", {"model": "nomic-embed-text", "input": texts})).status == 200
        return asyncio.get_running_loop().time() - started_s

    assert 2.5 < await took_s(["short text"] * 1000) < 4.0
    assert await took_s(["short text " * 1000]) < 0.6


@pytest.mark.parametrize("blocks", [True, False])
def test_simulated_ps_and_tags_may_block_while_a_model_loads(blocks):
    @alone(loaded=(), ps_blocks=blocks)
    async def run(node):
        load = asyncio.create_task(ask(node))
        await asyncio.sleep(0.5)
        await call(directly(node), "GET", "/api/version")
        assert not load.done()
        for path in ("/api/ps", "/api/tags"):
            await call(directly(node), "GET", path)
            assert bool(node.loads) is blocks
        await load
    run()


@alone(slots=2)
async def test_simulated_keep_alive_of_zero_stays_with_a_busy_runner(node):
    long = asyncio.create_task(ask(node, value=generate(tokens=300, keep_alive=0)))
    await asyncio.sleep(0.1)
    await ask(node)
    assert await loaded_names(node) == ["llama3.2:latest"]
    await asyncio.gather(long, ask(node, value=generate(tokens=400)))
    assert await loaded_names(node) == []
    assert (await ask(node)).json()["load_duration"] > 2e9 and await loaded_names(node) == ["llama3.2:latest"]


@alone(loaded=(), slots=1)
async def test_simulated_tags_of_the_same_weights_share_a_runner(node):
    await ask(node, "/api/copy", {"source": "llama3.2", "destination": "twin"})
    await ask(node, "/api/create", {"model": "child", "from": "llama3.2", "stream": False})
    assert (await ask(node)).json()["load_duration"] > 2e9
    rows = (await call(directly(node), "GET", "/api/tags")).json()["models"]
    assert len({row["digest"] for row in rows}) == 3
    shows = [(await ask(node, "/api/show", {"model": name})).json()["modelfile"].splitlines()[0]
             for name in ("llama3.2", "twin", "child")]
    assert len(set(shows)) == 1 and re.fullmatch("FROM /root/.ollama/models/blobs/sha256-[0-9a-f]{64}", shows[0])
    one, two = await asyncio.gather(*(ask(node, value=generate(name, 115)) for name in ("twin", "child")))
    durations = [answer.json()["total_duration"] / 1e9 for answer in (one, two)]
    assert max(durations) > 1.8 * min(durations)        # one slot for both
    assert one.json().get("load_duration", 0) < 2e6 and await loaded_names(node) == ["llama3.2:latest"]
    await ask(node, value={"model": "twin", "keep_alive": 0})
    assert await loaded_names(node) == [] and node.loads == 1


FOUR = ("llama3.2:1b", "gemma3:4b", "mistral", "llama3.2")


@alone("rtx4090", models=FOUR, loaded=(), vram_gb=1000)
async def test_simulated_victim_has_the_shortest_keep_alive_whatever_was_used_last(node):
    for name, keep_alive in zip(FOUR[:3], ("9m", "3m", "5m"), strict=True):
        await ask(node, value=generate(name, keep_alive=keep_alive))
    await ask(node, value=generate("gemma3:4b"))        # the last used
    await ask(node, value=generate("llama3.2"))         # at most three, whatever the memory
    assert sorted(await loaded_names(node)) == ["llama3.2:1b", "llama3.2:latest", "mistral:latest"]
    assert node.evictions == 1


@alone("rtx4090", models=FOUR, loaded=(), max_loaded=2)
async def test_simulated_victim_is_waited_for_if_none_is_idle(node):
    await ask(node, value=generate(FOUR[0], keep_alive="1m"))
    await ask(node, value=generate(FOUR[1], keep_alive="9m"))
    busy = [asyncio.create_task(ask(node, value=generate(name, tokens)))
            for name, tokens in zip(FOUR[:2], (2000, 20), strict=True)]
    await asyncio.sleep(0.1)
    await ask(node, value=generate(FOUR[2]))
    assert all(task.done() for task in busy) and sorted(await loaded_names(node)) == ["gemma3:4b", "mistral:latest"]


@table("options, fields, loads", [
    ("the same window", {"num_ctx": 4096}, {}, 0), ("what runs anyway", {"use_mmap": False, "num_gpu": -1}, {}, 0),
    ("shift as it is", {}, {"shift": True}, 0), ("another shift", {}, {"shift": False}, 1),
    ("another window", {"num_ctx": 8192}, {}, 1), ("layers", {"num_gpu": 3}, {}, 1), ("nothing", {}, {}, 0)])
def test_simulated_model_is_loaded_again_only_for_another_value(options, fields, loads):
    @alone()
    async def run(node):
        await ask(node, value=generate(options=options, **fields))
        assert node.loads == loads
    run()


@alone(models=("phi4:14b",), loaded=(), vram_gb=24, context=16_384)
async def test_simulated_window_is_cut_to_the_models_own_and_none_means_the_servers(node):
    for num_ctx, loads in ((None, 1), (99_999, 1), (16_384, 1), (2048, 2), (2048, 2), (None, 3)):
        await ask(node, value=generate("phi4:14b", options={"num_ctx": num_ctx}))
        assert node.loads == loads
    for path in ("/api/ps", "/api/tags"):
        row, = (await call(directly(node), "GET", path)).json()["models"]
        assert row.get("context_length", row["details"]["context_length"]) == 16_384


@table("hardware, settings, window", [("small", "rtx3060", {}, 4096), ("24 GB", "rtx4090", {}, 32_768),
                                      ("80 GB", "rtx4090", {"vram_gb": 80}, 131_072), ("no card", "cpu", {}, 4096)])
def test_simulated_window_is_by_memory(hardware, settings, window):
    @alone(hardware, **settings)
    async def run(node):
        row, = (await call(directly(node), "GET", "/api/ps")).json()["models"]
        assert row["context_length"] == window
    run()


@table("too_long, status, text", [("refused", "refuse", 400, "input length exceeds the context length"),
                                  ("the engine's words", "exceed", 400, "exceed_context_size_error"),
                                  ("cut", "cut", 200, "")])
def test_simulated_prompt_that_does_not_fit_is_refused_at_once_or_cut(too_long, status, text):
    @alone(too_long=too_long)
    async def run(node):
        value = {"model": "llama3.2", "prompt": bench.worded("<out=1> ", 5000), "stream": False}
        answer = await ask(node, value=value)
        assert answer.status == status and text in answer.json().get("error", "")
        if status == 200:
            assert answer.json()["prompt_eval_count"] == 4096
        else:
            assert asyncio.get_running_loop().time() < 0.01
            answer = await ask(node, "/v1/completions", value)
            assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    run()


@table("path, value", [
    ("generate", "/api/generate", {"prompt": "what is it? <out=1>", "images": ["AAAA"]}),
    ("chat", "/api/chat", {"messages": [{"role": "user", "content": "what? <out=1>", "images": ["AAAA"]}]}),
    ("openai", "/v1/chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "<out=1>"}, {"type": "image_url", "image_url": {"url": "data:,A"}}]}]}),
    ("messages", "/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": [
        {"type": "text", "text": "<out=1>"}, {"type": "image", "source": {"type": "base64", "data": "A"}}]}]})])
def test_simulated_picture_takes_768_tokens_and_its_time(path, value):
    @alone("cpu", picture_s=40.0)
    async def run(node):
        answer = (await ask(node, path, {"model": "llama3.2", "stream": False, **value})).json()
        usage = answer.get("usage", {})
        tokens = answer.get("prompt_eval_count") or usage.get("prompt_tokens") or usage.get("input_tokens")
        assert 768 < tokens < 800 and 45 < asyncio.get_running_loop().time() < 55
    run()


@alone(slots=1)
async def test_simulated_direct_user_takes_a_slot_unseen(node):
    user = asyncio.create_task(node.direct_user(output_tokens=575, requests=2))     # 5 s each
    await asyncio.sleep(0.1)
    started_s = asyncio.get_running_loop().time()
    assert (await ask(node)).status == 200
    assert 4.5 < asyncio.get_running_loop().time() - started_s < 5.5
    await user


@alone()
async def test_simulated_completions_carry_a_zeroed_usage_on_every_chunk_and_the_real_one_at_the_end(node):
    value = {"model": "llama3.2", "prompt": "<out=5>", "stream": True, "stream_options": {"include_usage": True}}
    lines = (await ask(node, "/v1/completions", value)).body.split(b"\n\n")
    *chunks, last = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert all(chunk["usage"]["total_tokens"] == 0 for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5


@table("path, stream", [("stream", "/api/generate", True), ("whole", "/api/generate", False),
                        ("chat", "/api/chat", False), ("events", "/v1/completions", True)])
def test_simulated_answer_that_repeats_itself_ends_without_done(path, stream):
    @alone()
    async def run(node):
        prompt = "<out=5> <repeat>"
        value = {"model": "llama3.2", "prompt": prompt, "messages": [{"role": "user", "content": prompt}]}
        answer = await ask(node, path, {**value, "stream": stream})
        assert answer.status == 200 and b'"done":true' not in answer.body and b"[DONE]" not in answer.body
        assert b"eval_count" not in answer.body and answer.body.count(b" and") >= 30
        assert stream or answer.json()["done"] is False
    run()


@table("hardware, settings, in_vram", [("card", "rtx3060", {}, 1.0), ("spilled", "rtx3060", {"vram_gb": 2}, 0.6),
                                       ("no card", "cpu", {}, 0.0), ("slow", "cpu-small", {}, 0.0)])
def test_simulated_ps_tells_what_is_on_the_card(hardware, settings, in_vram):
    @alone(hardware, **settings)
    async def run(node):
        row, = (await call(directly(node), "GET", "/api/ps")).json()["models"]
        assert row["size_vram"] / row["size"] == pytest.approx(in_vram, abs=0.1)
    run()


@alone("cpu-small", models=("llama3.2:1b",), loaded=("llama3.2:1b",))
async def test_simulated_small_cpu_evaluates_100_tokens_a_second(node):
    value = {"model": "llama3.2:1b", "prompt": bench.worded("<out=1> ", 3500), "stream": False}
    assert (await ask(node, value=value)).json()["prompt_eval_duration"] / 1e9 == pytest.approx(35.0, rel=0.05)


def test_machines_of_a_benchmark_differ_and_those_of_tests_do_not():
    drawn = [bench.SimNode(seed=seed, drawn=True).engine.machine for seed in range(300)]
    for values, low, high in zip(zip(*drawn, strict=True), (0.5, 0.01, 0.5), (0.9, 0.2, 2.0), strict=True):
        assert low <= min(values) < 1.2 * low and 0.8 * high < max(values) <= high
    assert bench.SimNode(seed=1, drawn=True).engine.machine == drawn[1] != drawn[2]
    assert bench.SimNode(seed=1).engine.machine == bench.Machine()
    assert len({node.engine.machine for node in bench.cluster_nodes(bench.DEFAULT, 1)}) == 3


@listed("text", RUNNER_ERRORS)
def test_simulated_node_fails_with_any_of_ollamas_words(text):
    @alone()
    async def run(node):
        node.fail(500, text=text, kind="api_error")
        assert (await ask(node)).json() == {"error": text}
        assert (await ask(node, "/v1/completions")).json()["error"]["type"] == "api_error"
    run()


@alone(models=("llama3.2", "mistral"))
async def test_simulated_node_fails_as_proxies_and_broken_streams_do(node):
    for status in (302, 403, 502, 504, 520, 524, 530):
        node.fail(status, body=b"<html>no</html>", fields={"Location": "/login"})
        answer = await ask(node)
        assert (answer.status, answer.body, answer.fields["content-type"]) == (status, b"<html>no</html>", "text/html")
        assert answer.fields["location"] == "/login"
    node.fail(500, body=b"")
    assert ((await ask(node)).status, (await ask(node)).body) == (500, b"")
    node.fail(200, text="unexpected EOF")
    assert (await ask(node, value=generate(stream=True))).body == b'{"error":"unexpected EOF"}\n'
    node.fail(200, body=b"")
    answer = await ask(node, value=generate(stream=True))
    assert (answer.status, answer.body) == (200, b"")
    node.fail(429, text="too many", models=("mistral",))
    assert [(await ask(node, value=generate(name))).status for name in ("mistral", "llama3.2")] == [429, 200]


@alone(gzips=True, fields={"Access-Control-Allow-Origin": "*"})
async def test_simulated_tunnel_compresses_if_it_may_and_adds_fields(node):
    for stream in (True, False):
        plain = await ask(node, value=generate(stream=stream))
        packed = await ask(node, value=generate(stream=stream), Accept_Encoding="br, gzip")
        assert "content-encoding" not in plain.fields and plain.fields["access-control-allow-origin"] == "*"
        assert packed.fields["content-encoding"] == "gzip"
        assert len(gzip.decompress(packed.body).splitlines()) == len(plain.body.splitlines())


@alone(slots=2)
async def test_simulated_card_that_hangs_accepts_requests_and_answers_all_else(node):
    node.hang()
    stuck = asyncio.create_task(ask(node))
    for path in ("/api/version", "/api/tags", "/api/ps"):
        assert (await call(directly(node), "GET", path)).status == 200
    await asyncio.sleep(1000)
    assert not stuck.done() and node.in_flight == 1
    stuck.cancel()


@alone()
async def test_simulated_machine_vanishes_and_comes_back(node):
    node.kill()
    with pytest.raises(OSError):
        await ask(node)
    await node.restart(after_s=60.0)
    assert asyncio.get_running_loop().time() >= 60 and (await ask(node)).status == 200


@alone(lacks=("/v1/responses",))
async def test_simulated_v1_models_is_plain_json_and_unknown_routes_are_text(node):
    answer = await call(directly(node), "GET", "/v1/models")
    assert answer.fields["content-type"] == "application/json" and answer.body.endswith(b"}\n")
    for path in ("/v1/messages/count_tokens", "/v1/responses"):
        answer = await ask(node, path)
        assert (answer.status, answer.body) == (404, b"404 page not found")
        assert answer.fields["content-type"] == "text/plain"
    answer = await ask(node, "/api/copy", {"source": "llama3.2", "destination": ""})
    assert answer.status == 400 and answer.json() == {"error": 'destination "" is invalid'}


@alone(slots=4, mlx=True)
async def test_simulated_mlx_engine_serves_one_at_a_time(node):
    answers = await asyncio.gather(*(ask(node, value=generate(tokens=115)) for _ in range(2)))
    assert sum(answer.json()["total_duration"] for answer in answers) / 1e9 > 2.9
    row, = (await call(directly(node), "GET", "/api/tags")).json()["models"]
    assert row["details"]["format"] == "safetensors"


# -----------------------------------------------------------------------------
# bench.py: the proof itself
# -----------------------------------------------------------------------------

SHORT = bench.DEFAULT._replace(duration_s=4.0)


def test_same_seed_gives_the_same_figures():
    one, two = (bench.simulate(SHORT, seed=3) for _ in range(2))
    assert [run.samples for run in one] == [run.samples for run in two]
    assert bench.simulate(SHORT, seed=4, policies=("round-robin",))[0].samples != one[0].samples


def told(policy, slots=2, **models):
    """Return a Dispatcher with a rival of the benchmark: the first node has thrice the weight of the others."""
    dispatcher = cluster("least-inflight", resident=False, **models)
    truths = {name: bench.Truth("rtx3060", slots, 1.0 if number else 3.0) for number, name in enumerate(models)}
    dispatcher.policy = bench.TOLD[policy](random.Random(0), truths)
    return dispatcher


@table("policy, count, nodes", [
    ("a weight is a share, and the nodes queue", "weighted-least", 8, ["fast"] * 6 + ["slow"] * 2),
    ("one queue fills slots only", "central-queue", 8, ["fast", "fast", "slow", "slow"]),
    ("so with loaded models first", "resident-first", 8, ["fast", "fast", "slow", "slow"]),
    ("and with the shortest first", "shortest-first", 8, ["fast", "fast", "slow", "slow"]),
    ("a slow node stays idle beside a fast one", "central-queue", 1, ["fast"])])
def test_told_rival_sends_by_weight_and_fills_no_more_than_true_slots(policy, count, nodes):
    dispatcher = told(policy, fast=["m"], slow=["m"])
    tickets = [dispatcher.enter("9", want(), 0.0) for _ in range(count)]
    assert sorted(placed(dispatcher)) == sorted(nodes) and placed(dispatcher) == []
    assert [bool(ticket.lease) for ticket in tickets] == [True] * len(nodes) + [False] * (count - len(nodes))


@table("policy, first", [("first come", "central-queue", "300"), ("its model is loaded there", "resident-first", "90"),
                         ("the shortest of those", "shortest-first", "20")])
def test_told_rival_gives_a_free_slot_to_whom_it_promises(policy, first):
    dispatcher = told(policy, slots=1, n1=["m", "x"])
    dispatcher.cluster.nodes["n1"].take_ps(rows("x"), 0.0, 0.0)
    running = dispatcher.enter("5", want("x"), 0.0)
    assert placed(dispatcher) == ["n1"]
    waiting = [dispatcher.enter(id, want(model, priority=priority), 0.0)
               for id, model, priority in (("300", "m", 5), ("90", "x", 5), ("20", "x", 5), ("4", "m", 8))]
    assert placed(dispatcher) == []
    finish(dispatcher, running, 1.0)
    assert placed(dispatcher, 1.0) == ["n1"] and [ticket.id for ticket in waiting if ticket.lease] == [first]


def test_told_rival_loads_a_model_on_the_free_node_only_if_no_other_request_suits_it():
    dispatcher = told("resident-first", slots=1, n1=["m", "x"], n2=["m", "x"])
    for node, model in zip(dispatcher.cluster.nodes.values(), "mx", strict=True):
        node.take_ps(rows(model), 0.0, 0.0)
    loads, other, suits = enter(dispatcher, want("m"), want("m"), want("x"))
    assert sorted(placed(dispatcher)) == ["n1", "n2"] and loads.lease.node.name == "n1" and suits.lease
    finish(dispatcher, suits, 1.0)
    assert placed(dispatcher, 1.0) == ["n2"] and other.lease


def test_told_rival_keeps_a_conversation_on_its_node_as_long_as_that_lives():
    dispatcher = told("sticky", slots=1, n1=["m"], n2=["m"])
    first, other = (dispatcher.enter(id, want(), 0.0) for id in ("agent-0", "chat"))
    assert placed(dispatcher) == ["n1", "n2"]
    finish(dispatcher, other, 1.0)
    again, chat = (dispatcher.enter(id, want(), 1.0) for id in ("agent-0", "another chat"))
    assert placed(dispatcher, 1.0) == ["n2"] and chat.lease and not again.lease
    finish(dispatcher, chat, 2.0)
    assert placed(dispatcher, 2.0) == []
    finish(dispatcher, first, 3.0)
    assert placed(dispatcher, 3.0) == ["n1"] and again.lease
    finish(dispatcher, again, 4.0)
    dispatcher.cluster.nodes["n1"].lost(4.0)
    dispatcher.enter("agent-0", want(), 5.0)
    assert placed(dispatcher, 5.0) == ["n2"]


@listed("policy", bench.TOLD)
def test_told_rival_skips_dead_nodes_and_tries_another_as_a_plain_proxy_does(policy):
    dispatcher = told(policy, n1=["m"], n2=["m"])
    first = dispatcher.enter("9", want(), 0.0)
    assert placed(dispatcher) == ["n1"] and fail(dispatcher, first) and placed(dispatcher) == ["n2"]
    for node in dispatcher.cluster.nodes.values():
        node.missed(True, 10.0)
    waiting = [dispatcher.enter("9", want(model), 100.0) for model in ("m", "unknown", "m")]
    assert dispatcher.dispatch(249.9) == ([], [])
    assert set(dispatcher.dispatch(250.0)[1]) == set(waiting) and not any(dispatcher.waiting.tickets)


def test_agents_tell_a_sticky_rival_who_they_are_and_prefill_a_conversation_once(monkeypatch):
    monkeypatch.setattr(bench, "TURNS", 6)
    queue, sticky = (bench.run_virtual(bench.run_coding(2, "hom5", policy, 1))
                     for policy in ("central-queue", "sticky"))
    assert sticky.prefilled_tokens < 0.8 * queue.prefilled_tokens and sticky.turns.success == 1.0


def test_rival_that_knows_lengths_is_told_each_of_them():
    scenario = bench.load_scenario("burst", "hom3", arrivals="burst", requests=120)
    queue, shortest = bench.simulate(scenario, 1, ("central-queue", "shortest-first"))
    assert bench.figures(shortest).mean_s < 0.95 * bench.figures(queue).mean_s
    assert bench.figures(queue).success == bench.figures(shortest).success == 1.0


def test_matrix_says_what_rivals_were_told_and_where_sollol_loses(monkeypatch, capsys):
    good, bad = (bench.Figures(1.0, mean_s, 1.0, 2.0, 3.0, 0.5, 1.0) for mean_s in (1.0, 1.04))
    policies = (*bench.RIVALS, *bench.told_rivals(bench.SMALL), bench.SOLLOL)
    row = bench.MatrixRow(bench.DEFAULT, None, {**dict.fromkeys(policies, bad), "central-queue": good})
    monkeypatch.setattr(bench, "in_parallel", lambda run, jobs: {bench.DEFAULT.name: row})
    assert bench.main(["matrix", "seed/mild3"]) == 0
    out = capsys.readouterr().out
    assert all(f"{policy} was told {bench.TOLD[policy].told}." in out for policy in bench.told_rivals("mx"))
    cells, = re.findall(r"(?m)^seed/mild3 +1\.04 / .*", out)
    assert re.split(r"  +", cells)[2:] == ["+0 / +0 / +0 / +0 %", "+0 / +0 / +0 / +0 %", "+4 / +0 / +0 / +0 %", "-",
                                           "+0 / +0 / +0 / +0 %"]
    assert re.findall(r"(?m)^seed/mild3 +\S+ +1\.00 +2\.00 .*", out) == [
        "seed/mild3    central-queue        1.00   2.00         +4.0 %  +0.0 %"]


def test_wall_clock_agrees_with_the_virtual_one():
    """The gateway as a process of its own, in real time; one run is short, so that noise is large."""
    scenario = bench.DEFAULT._replace(duration_s=2.0)
    real = asyncio.run(bench.run_in_real_time(scenario, bench.SOLLOL, seed=1))
    virtual, = bench.simulate(scenario, 1, (bench.SOLLOL,))
    assert bench.figures(real).success == 1.0
    assert 0.6 < bench.figures(real).mean_s / bench.figures(virtual).mean_s < 1.6


@over_sockets
async def test_simulated_node_resets_garbles_and_tears():
    node = fixed(1, speed=2)
    async with gateway_for(node) as gateway:
        known_nodes = gateway.dispatcher.cluster.nodes
        for fault in (node.reset, lambda: node.garble(b"zz\r\n")):
            stream = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=400, stream=True)))
            await until(lambda: any(lease.lines > 3 for known in known_nodes.values() for lease in known.leases))
            fault()
            assert json.loads((await stream).body.splitlines()[-1])["error"].startswith("127.0.0.1:")
            node.recover()
        await asyncio.sleep(1.1)        # its breaker's first pause
        node.tear()
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 502
        node.recover()
        await asyncio.sleep(2.1)
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200


@pytest.mark.parametrize("seed", range(1, 11))
def test_everything_holds_under_random_faults(seed):
    outcomes, violations = bench.soak_once(seed, minutes=3.0)
    assert not violations
    assert sum(outcome.how == "whole" for outcome in outcomes) > 20


@listed("seed", [1, 3])             # a calibration under load; streams that slow down
def test_kept_offer_has_the_slots_and_speeds_of_a_new_one(seed, monkeypatch):
    known, agree = sollol.CompletionTime.candidates, []

    def compare(self, work, *more):
        found = known(self, work, *more)
        for it in (candidate.offer for candidate in found):
            new = sollol.Offer(it.runner, sollol.NodeSnapshot(it.runner.node, work.now), work.now, it.claims_at_s)
            agree.append((it.free, it.slow, it.prefill_s, it.decode_s)
                         == (new.free, new.slow, new.prefill_s, new.decode_s))
        return found

    monkeypatch.setattr(sollol.CompletionTime, "candidates", compare)
    bench.soak_once(seed, minutes=2.0)
    assert len(agree) > 500 and all(agree)


def test_soak_replays_from_its_seed():
    one, two = (bench.soak_once(17, minutes=1.0) for _ in range(2))
    assert one == two and bench.soak_once(18, minutes=1.0)[0] != one[0]


def leaks(release):
    """Lose a lease now and then."""
    return lambda self, lease, now: None if lease.ticket.id.endswith("7") else release(self, lease, now)


def forgets(settle):
    """Settle no account of a batch request."""
    return lambda self, spec: None if spec.priority == 1 else settle(self, spec)


def one_more(has_room):
    """Take a node for one with room as long as fewer than nine requests run there."""
    return lambda self, runner, now: len(runner.leases) < 9


def no_end(close_with):
    """End a broken stream as if it were whole."""
    return lambda self, text, family: self.write(sollol.LAST_CHUNK) or True


def late(expire):
    """Let tickets wait as long as they like."""
    return lambda self, now: []


def mixes_up(relayed):
    """Relay an answer with one letter changed."""
    return lambda self, payload, verbatim: relayed(self, payload.replace(b" the", b" thE"), None)


@pytest.mark.parametrize("owner, name, broken, complaint", [
    (sollol.Dispatcher, "release", leaks, "was never released"),
    (sollol.FairShare, "settle", forgets, "fair share still has an account of"),
    (sollol.ModelPass, "has_room", one_more, "at once on"), (sollol.Relay, "close_with", no_end, "stream has no end"),
    (sollol.Dispatcher, "expire", late, "has waited 61"), (sollol.Relay, "take", mixes_up, "wrong text"),
])
def test_soak_sees_what_is_broken(owner, name, broken, complaint, monkeypatch):
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    assert any(complaint in violation for seed in range(1, 11) for violation in bench.soak_once(seed, minutes=2.0)[1])


def test_failing_seed_is_told_and_makes_the_soak_fail(monkeypatch, capsys):
    monkeypatch.setattr(sollol.Dispatcher, "release", leaks(sollol.Dispatcher.release))
    assert bench.main(["--soak", "1", "--seed", "1", "--minutes", "1"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("seed 1 failed:") and "was never released" in out and "1 seeds of 1 minutes, 1 failed" in out
    monkeypatch.undo()
    assert bench.main(["--soak", "2", "--seed", "1", "--minutes", "0.2"]) == 0


def test_urgent_requests_in_bursts_take_at_most_half_as_long_as_the_others():
    assert bench.urgent_share(1) <= 0.5


def test_agents_prefill_less_and_wait_less_than_under_plain_policies(monkeypatch):
    monkeypatch.setattr(bench, "TURNS", 12)
    plain, ours = (bench.run_virtual(bench.run_coding(4, "mild5", policy, 1)) for policy in ("least-inflight",
                                                                                             bench.SOLLOL))
    assert ours.prefilled_tokens < 0.7 * plain.prefilled_tokens and ours.turns.mean_s < plain.turns.mean_s
    assert ours.turns.success == ours.chats.success == 1.0 and not ours.refused


def test_every_term_of_routing_can_be_switched_off_and_is_on_again_afterwards():
    scenario = bench.load_scenario("models5", "hom3", models=bench.FIVE_MODELS, requests=30)
    whole = bench.simulate(scenario, 1, (bench.SOLLOL,))
    for switch in bench.ABLATIONS:
        with bench.switched_off(switch.term):
            run, = bench.simulate(scenario, 1, (bench.SOLLOL,))
            assert bench.figures(run).success == 1.0
    assert bench.simulate(scenario, 1, (bench.SOLLOL,))[0].samples == whole[0].samples


def test_tradeoff_shows_the_median_and_the_tail_of_each_way(monkeypatch):
    monkeypatch.setattr(bench, "ABLATION_SEEDS", 1)
    monkeypatch.setattr(bench, "TRADE_ROWS", (bench.seed_scenario("mild3", duration_s=15.0),))
    head, *rows = bench.tradeoff_table(1)
    assert len(rows) == 2 + len(bench.TRADES) and sum("as SOLLOL does" in row[0] for row in rows) == 1
    assert head[1] == "seed/mild3" and all(len(row[1].split(" / ")) == 4 for row in rows)
    assert len({row[1] for row in rows}) > 8        # each does something else


def test_ablation_shows_what_a_term_is_worth(monkeypatch):
    monkeypatch.setattr(bench, "ABLATION_SEEDS", 1)
    scenario = bench.load_scenario("prio", "mild5", arrivals="burst", urgent=0.1, requests=300)
    rows = {row[0]: row[1] for row in bench.ablation_table((scenario,), 1)}
    assert rows["mean / P95"] == "prio/mild5 urgent" and rows["whole"].endswith(" s") and rows["no harm"] == ""
    assert int(rows["no hold"].split(" / ")[0]) > 5


def test_every_assumption_can_be_moved_and_stands_as_before_afterwards(monkeypatch):
    scenario = bench.load_scenario("models5", "mild3", models=bench.FIVE_MODELS, requests=25)
    monkeypatch.setattr(bench, "simulate", lambda *given, simulate=bench.simulate: simulate(*given[:2], given[2][-1:]))
    usual = bench.mismatched(scenario, bench.USUAL, "", 1)
    unseen = "earlier prompts kept in RAM", "characters per token", "a load evicts"     # in so few requests
    for assumption in bench.ASSUMPTIONS:
        for value in assumption.moved:
            found = bench.mismatched(scenario, assumption, value, 1)
            assert list(found) == [bench.SOLLOL]
            assert assumption.name in unseen or found != usual, (assumption.name, value)
    assert bench.mismatched(scenario, bench.USUAL, "", 1) == usual


@table("mean, p95, lost", [
    ("the same", 0.8, 0.5, 0), ("less of a gain", 0.99, 0.9, 0), ("as much as the other", 1.0, 1.0, 0),
    ("the mean is lost", 1.1, 0.5, 1), ("both are lost", 1.1, 1.1, 2)])
def test_gain_that_becomes_a_loss_is_seen(mean, p95, lost):
    scenario = bench.DEFAULT
    standings = {(scenario.name, "nothing moves", ""): bench.Standing(0.8, 0.5, 1.0, 1.0),
                 (scenario.name, "overhead", "9 s"): bench.Standing(mean, p95, 2.0, 2.0)}
    texts = bench.lost_gains(standings, [scenario])
    assert len(texts) == lost and all(text.startswith("overhead 9 s, seed/mild3: ") for text in texts)
    standings[scenario.name, "nothing moves", ""] = bench.Standing(0.91, 0.91, 1.0, 1.0)
    assert not bench.lost_gains(standings, [scenario])      # little was gained, so nothing is lost


@table("is_good, status", [("held", True, 0), ("a gain is lost", False, 1)])
def test_mismatch_shows_how_we_stand_and_fails_if_a_gain_becomes_a_loss(is_good, status, monkeypatch, capsys):
    scenario = bench.load_scenario("load0.6", "mild3", requests=40)
    found = bench.mismatched(scenario, bench.USUAL, "", 1)

    def made_up(scenario, name, value, seed):
        bad = name != bench.USUAL.name and not is_good
        ours = found["least-inflight"]._replace(mean_s=(2.0 if bad else 0.5) * found["least-inflight"].mean_s)
        return {**found, bench.SOLLOL: ours}

    monkeypatch.setattr(bench, "MISMATCHED", (scenario,))
    monkeypatch.setattr(bench, "in_parallel", lambda run, jobs: {name: made_up(*given) for name, given in jobs})
    assert bench.main(["mismatch", "overhead"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert " ".join(lines[2].split()).startswith("overhead of a request (10 to 200 ms) 10 ms ")
    assert lines[1].split()[-5:] == ["-50", "+0", *lines[1].split()[-3:]]
    lost = "a gain of over 10 % becomes a loss: overhead of a request 10 ms, load0.6/mild3: mean -50.0 % becomes +100.0"
    assert lines[-1].startswith("no assumption turns a gain" if is_good else lost)


def test_failed_requests_stay_in_every_figure():
    ok = bench.Sample(0.0, 0.0, 0.5, 1.0, "a", 200, True, 5, 10)
    lost = bench.Sample(0.0, 0.0, None, 60.0, "", 0, False, 5, 0)
    found = bench.figures(bench.Run("x", [ok] * 9 + [lost], 10.0))
    assert (found.success, found.mean_s, found.p50_s, found.p95_s, found.per_s) == (0.9, 6.9, 1.0, 60.0, 0.9)


@pytest.mark.parametrize("name", ["seed/hom5", "seed30/mild5", "load0.6/mild5"])
def test_nobody_beats_the_bound(name):
    scenario = next(one for one in bench.MATRIX if one.name == name)._replace(requests=60, duration_s=5.0)
    for run in bench.simulate(scenario, 1):
        assert bench.figures(run).mean_s > bench.bound_s(scenario, 1)


def test_report_is_written_as_json_and_as_one_page(tmp_path, capsys):
    files = tmp_path / "r.json", tmp_path / "r.html"
    assert bench.main(["--seed", "2", "--output", str(files[0]), "--html", str(files[1])]) == 0
    out = capsys.readouterr().out
    for word in ("Success Rate", "Avg Latency", "P50", "P95", "P99", "TTFT", "Requests/sec", "seed 2", "--seed 2",
                 "of what was predicted"):
        assert word in out
    report = json.loads(files[0].read_text())
    assert [run["policy"] for run in report["runs"]] == [
        "round-robin", "least-inflight", "weighted-least", "central-queue", "shortest-first", "latency-weighted"]
    for policy in ("weighted-least", "central-queue", "shortest-first"):
        sentence = f"{policy} was told {bench.TOLD[policy].told}."
        assert sentence in out and sentence in report["notes"]
    assert {"scheduled_s", "sent_s", "first_s", "end_s", "node", "status", "priority"} <= set(
        report["runs"][0]["samples"][0])
    page = files[1].read_text()
    assert page.count("<svg") >= 5 and not re.search(r'(src|href)="http', page)


@table("status, end, ok", [
    ("Ollama's", 200, b'"done":true}', True), ("another server's", 200, b'"done": true, "eval_count": 3}', True),
    ("cut", 200, b'"done": false}', False), ("refused", 400, b'"done":true}', False)])
def test_answer_counts_if_its_last_line_is_there(status, end, ok):
    class OneAnswer:
        async def call(self, *_):
            response = bench.Response(b"HTTP/1.1 %d X\r\n\r\n" % status)
            response.pieces = [b'{"message": {}, "done": false}\n{', end]
            return response
    sample = bench.run_virtual(bench.make_request(OneAnswer(), bench.Work(0, 0.0, "m", 10, 10), 0.0, 60.0))
    assert sample.ok is ok and sample.end_s == (0.0 if ok else 60.0)


def test_live_cluster_is_measured_against_round_robin_over_its_hosts(capsys):
    with program("bench.py", "--nodes", 2, "--port", 0, "--speed", 20) as nodes:
        urls = [read_until(nodes, r"http://\S+")[0] for _ in range(2)]
        with program("sollol.py", "--port", 0, "--node", urls[0], "--node", urls[1]) as gateway:
            url = read_until(gateway, r"event=start .*url=(\S+)")[1]
            hosts = ["--hosts", ",".join(urls), "--model", "llama3.2"]
            assert bench.main(["--sollol-url", url, *hosts, "--duration", "1", "--concurrency", "4"]) == 0
            assert re.search(r"Success Rate +100.0 % +100.0 %", capsys.readouterr().out)
            assert bench.main(["--baseline", "llama3.2", "3", *hosts[:2]]) == 0
            assert len(capsys.readouterr().out.splitlines()) == 3
            assert bench.main(["--overhead", url, *hosts]) == 0
            assert "gap between tokens, P99" in capsys.readouterr().out


OLD_AND_NEW = (
    ("", "compare"), ("--seed 2 --html x", "compare --seed 2 --html x"), ("--realtime", "compare --realtime"),
    ("--scenario seed/hom3", "compare --scenario seed/hom3"), ("--trace x --output y", "compare --trace x --output y"),
    ("--matrix", "matrix"), ("--matrix seed/ --seed 2", "matrix seed/ --seed 2"), ("--matrix=seed/", "matrix seed/"),
    ("--agents 10,40", "agents 10,40"), ("--ablate", "ablate"), ("--seed 3 --misled 9", "misled 9 --seed 3"),
    ("--mismatch", "mismatch"), ("--mismatch overhead --seed 2", "mismatch overhead --seed 2"),
    ("--check", "check"), ("--overhead --rounds 1", "overhead --rounds 1"), ("--decisions", "decisions"),
    ("--hosts a,b --model m --overhead http://c", "overhead http://c --hosts a,b --model m"),
    ("--rate 15 --streams 50 --waiting 9 --rounds 1", "streams 50 --rate 15 --waiting 9 --rounds 1"),
    ("--soak 60 --minutes 1 --realtime", "soak 60 --minutes 1 --realtime"), ("--siege", "siege"),
    ("--kills 60 --seed 2", "kills 60 --seed 2"), ("--rounds 1 --siege 10", "siege 10 --rounds 1"),
    ("--nodes 3", "serve 3"), ("--speed 2 --port 0 --nodes 3", "serve 3 --port 0 --speed 2"),
    ("--hosts a,b --sollol-url http://c --duration 60 --concurrency 9 --timeout 9 --model m --output x",
     "live http://c --hosts a,b --duration 60 --concurrency 9 --timeout 9 --model m --output x"),
    ("--timeout 9 --baseline m 3 --hosts a,b", "baseline m 3 --hosts a,b --timeout 9"))


@pytest.mark.parametrize("old, new", OLD_AND_NEW)
def test_old_flag_means_its_command(old, new):
    parser = bench.command_line()
    assert parser.parse_args(bench.with_command(old.split())) == parser.parse_args(new.split())
    assert bench.with_command(new.split()) == new.split()


def test_every_old_flag_has_a_test():
    assert bench.OLD_FLAGS.keys() <= {word.partition("=")[0] for old, _ in OLD_AND_NEW for word in old.split()}


@pytest.mark.parametrize("command, foreign", [("compare", "--minutes=1"), ("soak", "--html=x"), ("serve", "--seed=1")])
def test_command_of_bench_takes_only_options_of_its_own(command, foreign, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main([command, *foreign.split()])
    assert exit.value.code == 2 and "unrecognized arguments: " + foreign in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--sollol-url", "http://127.0.0.1:1", "--hosts", "127.0.0.1:1"], "127.0.0.1:1 cannot be reached"),
    (["--sollol-url", "http://127.0.0.1:1"], "which nodes? Give --hosts H,H"),
    (["--overhead", "ftp://x", "--hosts", "x"], "'ftp://x' is not the URL of a node"),
    (["--scenario", "none"], "there is no scenario 'none'"), (["--matrix", "none"], "no scenario matches 'none'"),
    (["--agents", "ten"], "agents: 'ten' is not a list of numbers"),
    (["--mismatch", "none"], "no assumption matches 'none'; there are: b requests at once do b^x of one; overhead of"),
    (["--trace", "/no/such/file"], "/no/such/file: No such file or directory"),
    (["--baseline", "m", "many", "--hosts", "x"], "baseline: 'many' is not a number"),
    (["--output", "/no/such/folder/x"], "/no/such/folder/x: No such file or directory"),
])
def test_mistake_is_one_clear_line(argv, message, capsys):
    assert bench.main(argv) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"bench.py: {message}")


def test_interrupted_benchmark_prints_what_it_has_and_leaves_no_process():
    # A shell ignores this signal for what it runs in the background, and so would every program from there on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with program("bench.py", "--realtime") as process:
        time.sleep(2.0)
        process.send_signal(signal.SIGINT)
        process.wait(10)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        assert not children.stdout.strip()
        assert "Traceback" not in all_output(process)
