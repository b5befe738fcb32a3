"""The promises of SOLLOL, in the order of sollol.py: pure parts by tables, the rest over real sockets.

    python -m pytest -q

Tests over sockets run twice: on plain asyncio with a virtual clock (waiting costs nothing) and on uvloop in real time.
The nodes are bench.py's simulated ones, or scripted ones where exact bytes matter.
"""

import asyncio
import contextlib
import functools
import inspect
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import bench
import sollol

HERE = pathlib.Path(__file__).parent


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

    async def start(self, port=0):
        self.server = await asyncio.start_server(self.converse, "127.0.0.1", port, limit=2**26)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
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
            return {"models": [{"name": name, "size": 2 * 10**9, "digest": name, "modified_at": "2026-01-01T00:00:00Z"}
                               for name in self.models]}
        return {"models": []} if path == b"/api/ps" else None

    async def converse(self, reader, writer):
        self.connections.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.I)
                raw = head + (await reader.readexactly(int(length[1])) if length else b"")
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


@contextlib.asynccontextmanager
async def gateway_for(*nodes, flags=(), hosts=None):
    """Start nodes and a gateway in front of them; stop all at the end. Nodes may be given not started."""
    for node in nodes:
        if not getattr(node, "port", 0):
            await node.start()
    named = [f"{node.url} {getattr(node, 'line', '')}" for node in nodes]
    argv = [*(["--hosts", str(hosts)] if hosts else []), "--port", "0", "--no-calibrate", "--seed", "1", *flags]
    options = sollol.parse_options(argv + ([] if hosts else ["--node", "http://127.0.0.1:1"]), {})
    settings = sollol.read_nodes(options) if hosts else sollol.parse_hosts("\n".join(named), "test")
    gateway = await sollol.Gateway(options, settings).start()
    try:
        yield gateway
    finally:
        await gateway.stop()
        for node in nodes:
            await node.stop()


class Answer:
    """A response as a client sees it."""

    def __init__(self, head, body):
        first, *lines = head[:-4].split(b"\r\n")
        self.status = int(first.split(b" ")[1])
        self.fields = {name.lower().decode(): value.strip().decode() for name, _, value in
                       (line.partition(b":") for line in lines)}
        self.head, self.body = head, body

    def json(self):
        return json.loads(self.body)


class Caller:
    """One client connection, on the test's own and simpler reading of HTTP."""

    @classmethod
    async def to(cls, gateway):
        self = cls()
        self.reader, self.writer = await asyncio.open_connection(*gateway.address, limit=2**26)
        return self

    async def head(self):
        return await self.reader.readuntil(b"\r\n\r\n")

    async def chunks(self):
        """Yield the chunks of a chunked body as they come."""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    async def answer(self, method="POST"):
        head = await self.head()
        answer = Answer(head, b"")
        if method == "HEAD" or answer.status in (204, 304):
            return answer
        if "content-length" in answer.fields:
            answer.body = await self.reader.readexactly(int(answer.fields["content-length"]))
        elif answer.fields.get("transfer-encoding") == "chunked":
            answer.body = b"".join([piece async for piece in self.chunks()])
        else:
            answer.body = await self.reader.read()
        return answer

    async def ask(self, method, path, value=None, **fields):
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items())]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return await self.answer(method)

    def close(self):
        self.writer.close()


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


def health(gateway):
    return json.loads(sollol.answer_health(gateway)[1])


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
        head = Answer(await caller.head(), b"")
        assert head.fields["content-type"].encode() == kind
        assert [piece async for piece in caller.chunks()] == list(pieces)
        assert node.requests[0].endswith(b"\r\n\r\n" + body)
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
        assert answer.fields["x-sollol-queue-ms"] == "0"
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


@over_sockets
async def test_slow_head_gets_408_but_a_slow_model_is_waited_for():
    node = bench.SimNode(speed=0.5)
    async with gateway_for(node, flags=["--header-timeout", "1"]) as gateway:
        caller = await Caller.to(gateway)
        caller.writer.write(b"GET / HTTP/1.1\r\nHo")
        slow = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=10)))
        assert (await caller.answer()).status == 408
        assert await caller.reader.read() == b""
        caller.close()
        assert (await slow).json()["eval_count"] == 10


# -----------------------------------------------------------------------------
# Back-pressure, uploads, disconnects
# -----------------------------------------------------------------------------

@over_sockets
async def test_slow_reader_slows_the_node_and_not_the_gateways_memory():
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
    async with gateway_for(ScriptedNode(lambda request: [head, flood, KEEP])) as gateway:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, gateway.address)
        reader, writer = await asyncio.open_connection(sock=raw, limit=65536)
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
    import hashlib
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
        assert (await caller.ask("GET", "/api/health")).status == 200      # the connection lives on
        caller.close()
        assert (await call(gateway, "HEAD", path)).status == 200
        node.blobs.clear()
        assert (await call(gateway, "POST", path, blob)).status == 201
        assert node.blobs == {digest: len(blob)}


@over_sockets
async def test_answer_before_the_end_of_an_upload_is_not_lost():
    import hashlib
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
        assert not gateway.dispatcher.fair.active
        answer = await call(gateway, "POST", "/api/generate", generate())
        assert answer.status == 200


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
    nodes = [bench.SimNode(slots=1, speed=8, loaded=("llama3.2",)), bench.SimNode(slots=2, speed=8, loaded=("llama3.2",)),
             bench.SimNode(slots=4, speed=8, loaded=("llama3.2",))]
    async with gateway_for(*nodes) as gateway:
        for _ in range(2):
            answers = await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate(tokens=200, stream=True))
                                             for _ in range(40)))
            assert {answer.status for answer in answers} == {200}
        learned = [node.runners["llama3.2:latest"].slots for node in gateway.dispatcher.nodes.values()]
        assert learned == [1, 2, 4]
        assert [node.max_in_flight for node in nodes] == [2, 3, 5]


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
    async with gateway_for(fixed(1, speed=1), flags=["--max-queue", "2", "--queue-timeout", "1"]) as gateway:
        async with contextlib.AsyncExitStack() as stack:
            running = asyncio.create_task(call(gateway, "POST", "/api/generate", generate(tokens=400)))
            stack.callback(running.cancel)
            await until(lambda: health(gateway)["inflight"] == 1)
            waiting = [asyncio.create_task(call(gateway, "POST", "/v1/completions", generate())) for _ in range(2)]
            await until(lambda: health(gateway)["queued"] == 2)
            answer = await call(gateway, "POST", "/api/generate", generate())
            assert answer.status == 503 and answer.json() == {"error": "the queue is full"}
            assert int(answer.fields["retry-after"]) >= 1
            for answer in await asyncio.gather(*waiting):
                assert answer.status == 503 and answer.json()["error"]["type"] == "api_error"
                assert int(answer.fields["retry-after"]) >= 1


@pytest.mark.parametrize("policy, expected", [("round-robin", [4, 4]), ("least-inflight", [4, 4])])
@over_sockets
async def test_plain_policies_send_at_once_and_share_evenly(policy, expected):
    nodes = [fixed(1, hardware="rtx4090", speed=5), fixed(1, hardware="cpu", speed=5)]
    async with gateway_for(*nodes, flags=["--policy", policy]) as gateway:
        await asyncio.gather(*(call(gateway, "POST", "/api/generate", generate()) for _ in range(8)))
        assert [node.requests for node in gateway.dispatcher.nodes.values()] == expected
        assert nodes[0].max_in_flight == nodes[1].max_in_flight == 4


@over_sockets
async def test_calibration_learns_an_idle_nodes_slots_and_speed():
    node = bench.SimNode("rtx4090", slots=4, models=("llama3.1:8b",), loaded=("llama3.1:8b",))
    async with gateway_for(node) as gateway:
        known = next(iter(gateway.dispatcher.nodes.values()))
        assert await sollol.calibrate(gateway, known)
        runner = known.runners["llama3.1:8b"]
        assert runner.slots == 4
        assert 1 / runner.decode_s == pytest.approx(130, rel=0.3)
        assert 1 / runner.prefill_s == pytest.approx(4500, rel=0.5)


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


@over_sockets
async def test_fixed_length_answer_whose_node_dies_is_cut_and_never_padded():
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"half"
    async with gateway_for(ScriptedNode(lambda request: [cut, 0.05])) as gateway:
        caller = await Caller.to(gateway)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await caller.ask("POST", "/api/generate", generate())
        caller.close()
        await until(lambda: health(gateway)["inflight"] == 0)


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
async def test_bytes_behind_an_answer_never_reach_the_next_one():
    node = ScriptedNode(lambda request: [OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", KEEP])
    async with gateway_for(node) as gateway:
        caller = await Caller.to(gateway)
        for _ in range(3):
            answer = await caller.ask("POST", "/api/generate", generate())
            assert answer.body == b'{"response":"fine","done":true}'
        caller.close()


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


@over_sockets
async def test_all_down_is_said_at_once_and_a_node_that_comes_back_is_used():
    node = bench.SimNode(**FAST)
    async with gateway_for(node, flags=["--probe-interval", "0.5"]) as gateway:
        node.kill()
        await until(lambda: health(gateway)["nodes"]["up"] == 0)
        now = asyncio.get_running_loop().time
        for method, path in (("POST", "/api/generate"), ("GET", "/api/tags"), ("POST", "/api/show")):
            started_s = now()
            answer = await call(gateway, method, path, generate())
            assert answer.status == 503 and int(answer.fields["retry-after"]) >= 1
            assert now() - started_s < 0.2
        assert (await call(gateway, "GET", "/api/health")).status == 503
        await node.restart()
        await asyncio.sleep(1.0)
        assert (await call(gateway, "POST", "/api/generate", generate())).status == 200


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
            first = next(iter(gateway.dispatcher.nodes.values()))
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
        assert (await call(gateway, "GET", "/v1/models/mistral")).status in (200, 404)
        answer = await call(gateway, "GET", "/no/such/path?x=%20y")
        assert (answer.status, answer.body) == (404, b"404 page not found")
        assert (await call(gateway, "PUT", "/api/chat")).status == 405


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


# -----------------------------------------------------------------------------
# Log, reload, drain, and the program as a process
# -----------------------------------------------------------------------------

LOG_KEYS = ("ts level event id client key method path model priority node attempts status queue_ms ttft_ms total_ms "
            "prompt_tokens output_tokens bytes reason").split()


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
async def test_saved_hosts_file_is_taken_over_and_a_bad_one_refused(tmp_path, caplog):
    sollol.LOG.propagate = True
    one, two = await bench.SimNode(**FAST).start(), await bench.SimNode(**FAST).start()
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"{one.url} name=one\n")
    async with gateway_for(one, two, hosts=hosts) as gateway:
        first = gateway.dispatcher.nodes["one"]
        hosts.write_text(f"{one.url} name=one\n{two.url} name=two slots=four\n")
        await until(lambda: f"{hosts}:2: slots must be a whole number from 1 to 64, not 'four'" in caplog.text)
        assert list(gateway.dispatcher.nodes) == ["one"]
        hosts.write_text(f"{one.url} name=one\n{two.url} name=two slots=4\n")
        await until(lambda: list(gateway.dispatcher.nodes) == ["one", "two"])
        assert gateway.dispatcher.nodes["one"] is first
        await until(lambda: health(gateway)["nodes"] == {"up": 2, "total": 2})
        hosts.write_text(f"{two.url} name=two slots=4\n")
        await until(lambda: list(gateway.dispatcher.nodes) == ["two"])
        assert (await call(gateway, "POST", "/api/generate", generate())).fields["x-sollol-node"] == "two"


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


def start_program(*argv, env=None):
    """Start a program of this folder; return (process, its first lines of output up to one with a URL)."""
    process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})})
    return process


def read_until(process, pattern):
    """Return the match of the first line of output that has the pattern."""
    for line in process.stdout:
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"{process.args} ended without {pattern}")


@contextlib.contextmanager
def program(*argv, **more):
    """Run a program of this folder, and leave nothing of it behind."""
    process = start_program(*argv, **more)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def curl(url, value=None, timeout_s=20):
    """Make a plain HTTP request with the standard library; return the body."""
    import urllib.request
    data = None if value is None else json.dumps(value).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=timeout_s) as answer:
        return answer.read()


def test_node_process_killed_under_load_costs_no_request(tmp_path):
    """SIGKILL to a real process, real time, the gateway a process of its own."""
    import concurrent.futures
    with program("bench.py", "--nodes", 1, "--port", 0, "--speed", 10) as one, \
         program("bench.py", "--nodes", 1, "--port", 0, "--speed", 10) as two:
        urls = [read_until(process, r"http://\S+")[0] for process in (one, two)]
        hosts = tmp_path / "hosts.txt"
        hosts.write_text("\n".join(f"{url} slots=2" for url in urls))
        with program("sollol.py", "--hosts", hosts, "--port", 0) as gateway:
            url = read_until(gateway, r"event=start .*url=(\S+)")[1]
            with concurrent.futures.ThreadPoolExecutor(12) as pool:
                tasks = [pool.submit(curl, f"{url}/api/generate", generate(tokens=40)) for _ in range(40)]
                time.sleep(0.4)
                one.send_signal(signal.SIGKILL)
                assert all(json.loads(task.result())["done"] for task in tasks)
            gateway.send_signal(signal.SIGTERM)
            assert gateway.wait(10) == 0


def test_demo_answers_and_sigterm_ends_it_cleanly():
    with program("sollol.py", "--demo", "--port", 0) as demo:
        url = read_until(demo, r"event=start .*url=(\S+)")[1]
        body = curl(f"{url}/api/chat", {"model": "llama3.2", "messages": [{"role": "user", "content": "hi <out=3>"}]})
        assert [json.loads(line)["done"] for line in body.splitlines()] == [False, False, False, True]
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(10) == 0


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
        assert status == 0 and re.search(r"good +http\S+ +up +\S+ .*llama3.2:latest", out)
        status, out = check(f"{url} name=good\nhttp://127.0.0.1:1 name=bad\n")
        assert status == 1 and re.search(r"bad +http://127.0.0.1:1 +down", out)
        status, out = check("# nothing\n\nhttp://x slots=four\n")
        assert (status, out) == (2, f"{hosts}:3: slots must be a whole number from 1 to 64, not 'four'\n")


def test_port_in_use_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "sollol.py", "--node", "127.0.0.1:1", "--port", str(port)], cwd=HERE,
                              capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert f"sollol.py: 127.0.0.1:{port}: " in done.stderr and "Traceback" not in done.stderr


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


# -----------------------------------------------------------------------------
# Official clients
# -----------------------------------------------------------------------------

@contextlib.contextmanager
def demo_url():
    with program("sollol.py", "--demo", "--port", 0, "--log-level", "warning", "--no-calibrate") as demo:
        port = None
        while port is None:
            port = re.search(r"http://127.0.0.1:(\d+)/api/tags", demo.stdout.readline())
        yield f"http://127.0.0.1:{port[1]}"


def test_official_ollama_client():
    ollama = pytest.importorskip("ollama", reason="PyPI ollama is not installed")
    with demo_url() as url:
        client = ollama.Client(url)
        messages = [{"role": "user", "content": "hi <out=4>"}]
        assert client.chat("llama3.2", messages).message.content
        parts = list(client.chat("llama3.2", messages, stream=True))
        assert parts[-1].done and parts[-1].eval_count == 4
        assert client.generate("llama3.2", "hi <out=4>").response
        assert list(client.generate("llama3.2", "hi <out=4>", stream=True))[-1].done
        assert len(client.embed("nomic-embed-text", ["one", "two"]).embeddings) == 2
        assert "llama3.2:latest" in [model.model for model in client.list().models]
        assert "llama3.2:latest" in [model.model for model in client.ps().models]
        assert client.show("llama3.2").details
        with pytest.raises(ollama.ResponseError, match="not found"):
            client.chat("no-such-model", messages)


def test_official_openai_client():
    openai = pytest.importorskip("openai", reason="PyPI openai is not installed")
    with demo_url() as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        messages = [{"role": "user", "content": "hi <out=4>"}]
        assert client.chat.completions.create(model="llama3.2", messages=messages).usage.completion_tokens == 4
        stream = client.chat.completions.create(model="llama3.2", messages=messages, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in stream)
        assert client.completions.create(model="llama3.2", prompt="hi <out=4>").choices[0].text
        assert len(client.embeddings.create(model="nomic-embed-text", input=["one"]).data) == 1
        assert "llama3.2:latest" in [model.id for model in client.models.list()]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="no-such-model", messages=messages)
