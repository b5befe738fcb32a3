#!/usr/bin/env python3
"""The proof: SOLLOL against plain proxies, told the truth by hand or not, on simulated Ollama nodes or on real ones.

    python bench.py                             # compare: the table, on three simulated nodes, in seconds
    python bench.py matrix                      # all scenarios: clusters, loads, models, bursts, faults; minutes
    python bench.py agents 10,40                # parallel agents against one call after the other
    python bench.py check                       # are the claims true? exit status 1 if one is not
    python bench.py soak 20                     # 20 seeds of random faults; exit status 1 if something did not hold
    python bench.py kills 60                    # node processes killed under load, likewise, on the wall clock
    python bench.py upgrades                    # new versions of the gateway under load, likewise
    python bench.py siege                       # what others notice of 300 half heads, 200 slow readers and worse
    python bench.py overhead                    # small calls and blobs beside nginx and HAProxy, on the wall clock
    python bench.py streams 300                 # so many token streams, likewise: CPU, gaps, memory
    python bench.py live http://localhost:8000 --hosts localhost:11434,localhost:11435 --output results.json
    python bench.py serve 3 --port 11434        # three simulated nodes on 11434, 11435, 11436 until Ctrl-C

The flags that stood for commands before, such as `--matrix` or `--nodes 3`, still do: see OLD_FLAGS.

Each simulated node is a real HTTP/1.1 server on a real socket that behaves as Ollama does on the wire: slots with a
hidden FIFO in front, model loads and evictions, keep-alive, prefix cache, batching slow-down, honest
timings in the last line, and faults on demand. Only the GPU is made up. Under `run_virtual` the waiting
is made up as well.
"""

import argparse
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import email
import email.utils
import errno
import functools
import gc
import gzip
import hashlib
import heapq
import html
import http.client
import importlib.util
import itertools
import json
import logging
import math
import os
import pathlib
import random
import re
import selectors
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse
import zlib
from typing import Callable, Iterable, NamedTuple

import sollol

# ------------------------------------------------------------------------------------------------------------
# Virtual clock: how does a 60 s benchmark run in a few seconds, the same way every time?
#
# An event loop only ever waits in one place, its selector. If no socket is ready there, every party to the
# simulation (they all live in this process) is waiting for a timer, so nothing can happen before the next
# timer is due: instead of sleeping until then, the clock jumps. Sockets stay real, and cost no virtual
# time.
# ------------------------------------------------------------------------------------------------------------

DEADLOCK_S = 5.0                    # real seconds without timer and ready socket: nothing will ever happen again
EXTRA_POLLS = 2                     # loopback delivers inside send(); a busy kernel may defer it, so look again


class JumpingSelector:
    """A selector that never sleeps: where a real one would wait, it moves `now_s`."""

    def __init__(self):
        self.now_s = 0.0
        self._real = selectors.DefaultSelector()

    def __getattr__(self, name):
        return getattr(self._real, name)

    def select(self, timeout=None):
        ready = self._real.select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            return self._wait_for_the_outside()
        for _ in range(EXTRA_POLLS):
            ready = self._real.select(0)
            if ready:
                return ready
        self._jump(timeout)
        return []

    def _jump(self, timeout_s):
        # now + (due - now) may round to just below due, and the loop would come back for ever smaller jumps.
        self.now_s = math.nextafter(self.now_s + timeout_s, math.inf)

    def _wait_for_the_outside(self):
        ready = self._real.select(DEADLOCK_S)
        if not ready:
            raise RuntimeError(f"virtual clock: no timer is set and no socket was ready for {DEADLOCK_S:g} "
                               f"real seconds, at {self.now_s:.3f} s virtual time: the program is deadlocked")
        return ready


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` starts at 0 s and jumps to the next timer when no socket is ready."""

    def __init__(self):
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)
        # Within this of now a timer counts as due. The platform's own value can be as coarse as 15 ms.
        self._clock_resolution = 1e-9

    def time(self):
        return self._jumping.now_s


def run_virtual(main_coroutine):
    """Run a coroutine to its end in virtual time and return its result.

    Leftover tasks are cancelled and asynchronous generators closed. Raises RuntimeError on a deadlock.
    """
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main_coroutine)


# ============================================================================================================
# Simulated nodes: `serve`, `demo`
#
# Ollama as it is on the wire. Only the GPU is made up.
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Hardware and models: how fast is what?
#
# Speeds are those of an 8B model in Q4_K_M; another model runs `speed` times as fast. Figures and sources:
# public benchmarks of llama.cpp and Ollama, and vendors' data of disks and buses. They are
# assumptions for comparing policies, not measurements of anybody's machine.
# ------------------------------------------------------------------------------------------------------------

class Hardware(NamedTuple):
    name: str
    decode_tok_s: float
    prefill_tok_s: float
    slots: int              # OLLAMA_NUM_PARALLEL
    vram_gb: float
    load_gb_s: float        # disk to memory
    on_cpu: bool = False    # no card: vram_gb is its RAM


HARDWARE = {hardware.name: hardware for hardware in (
    Hardware("rtx4090", 130, 4500, 4, 24, 4.0),     # fast NVMe, cold
    Hardware("rtx3090", 105, 3200, 4, 24, 3.0),     # NVMe, cold
    Hardware("rtx3060", 50, 1500, 2, 12, 2.0),      # slow NVMe, cold
    Hardware("m2", 40, 350, 2, 16, 5.0),            # Apple, warm
    Hardware("cpu", 9, 45, 1, 32, 0.5, True),       # SATA SSD
    Hardware("cpu-small", 4, 20, 1, 16, 0.5, True),     # four cores; 100 tok/s of a prompt for a model of 1B
)}


class Model(NamedTuple):
    name: str               # canonical, with its tag
    params_b: float
    size_gb: float
    speed: float            # relative to an 8B model
    embedding: bool = False
    weights: str = ""       # what the blob is of; the name if empty: a copy has that of its source
    max_context: int = 131_072      # tokens that it was trained for: a larger num_ctx is cut to it
    manifest: str = ""      # what the digest is of; name and weights if empty
    format: str = "gguf"    # or "safetensors"
    num_ctx: int = 0        # PARAMETER of its Modelfile: a request that asks for none gets this

    @property
    def blob(self):
        """Return 64 hex digits of the weights: tags that share them share a runner."""
        return hashlib.sha256((self.weights or self.name).encode()).hexdigest()

    @property
    def digest(self):
        """Return 64 hex digits of the manifest, the same on every node: two tags of the same weights differ in it."""
        return hashlib.sha256(f"manifest {self.manifest or f'{self.name} {self.weights}'}".encode()).hexdigest()


MODELS = {model.name: model for model in (
    Model("llama3.2:latest", 3.2, 2.0, 2.3),
    Model("llama3.2:1b", 1.2, 1.3, 5.0),
    Model("llama3.1:8b", 8.0, 4.9, 1.0),
    Model("qwen3:14b", 14.8, 9.3, 0.55, max_context=40_960),
    Model("llama3.3:70b", 70.6, 42.5, 0.12),
    Model("mistral:latest", 7.2, 4.4, 1.0, max_context=32_768),
    Model("gemma3:4b", 4.3, 3.3, 1.8),
    Model("phi4:14b", 14.7, 9.1, 0.55, max_context=16_384),
    Model("nomic-embed-text:latest", 0.14, 0.27, 100.0, embedding=True, max_context=2048),
)}


def canonical(name):
    """Return a model name as the node compares it: lower case, no default registry, always with a tag."""
    name = name.strip().lower().removeprefix("https://").removeprefix("http://")
    name = name.removeprefix("registry.ollama.ai/").removeprefix("library/").removesuffix(":local")
    has_tag = ":" in name.rpartition("/")[2]
    return name if has_tag or not name else name + ":latest"


def model_named(name):
    """Return a known model, or one of 8B class under any other name."""
    name = canonical(name)
    return MODELS.get(name) or Model(name, 8.0, 4.9, 1.0)


# ------------------------------------------------------------------------------------------------------------
# Device: how do requests share one processor?
#
# Work is counted in solo-seconds: what takes 1 s alone is 1 solo-second. b requests of one model that decode are
# batched and do b^exponent together; k models at work take turns, 1/k each; a fault multiplies all. Prompts of one
# model are evaluated one after the other, in batches of 1,024 tokens, and in between each stream of that model gets
# one token: as a flow here, at the same rates. All turns of one model that decode progress equally, so one clock
# says how far: a turn is done when the clock reaches the turn's target, a heap knows who is next, and one timer
# waits for it. A change of membership only changes rates, never targets: O(log n), and exact.
# ------------------------------------------------------------------------------------------------------------

BATCHING_EXPONENT = 0.7     # what nodes have around
SHARING_EXPONENT = 0.0      # k models at work do k^this of the work of one together: they take turns
PROMPT_BATCH = 1024         # tokens of a prompt between which other streams get a token each
SHORT_BATCH_S = 0.25        # a stop of this length is not worth a line for each token: fewer events
DUE_WITHIN_S = 1e-9     # solo-seconds; below this a rest of work is floating-point dust


def batch_gain(count, exponent=BATCHING_EXPONENT):
    """Return how many times the work of one request `count` requests of one model do together."""
    return count ** exponent


class WorkClock:
    """Solo-seconds that somebody has progressed, at a rate that changes, and who waits for how many."""

    def __init__(self):
        self.clock_s = 0.0
        self.rate = 0.0         # solo-seconds per second
        self.waiting = []       # heap of (target_s, sequence, future)

    def wake(self, until_s=math.inf):
        """Wake those whose target is not beyond `until_s`."""
        while self.waiting and self.waiting[0][0] <= until_s:
            _, _, future = heapq.heappop(self.waiting)
            if not future.done():       # a cancelled caller is still in the heap
                future.set_result(None)


class DeviceShare:
    """The part of the device that one model gets."""

    def __init__(self, token_s, batch_s):
        self.token_s = token_s          # solo-seconds of a token, and of a batch of a prompt
        self.batch_s = batch_s
        self.turns = 0
        self.decoders = 0               # turns that decode
        self.decode = WorkClock()       # of each of them
        self.prompts = asyncio.Lock()   # FIFO; its holder's prompt is evaluated
        self.prompt = WorkClock()       # of that one,
        self.span_s = (0.0, 0.0)        # and from where to where it goes on that clock


class DeviceTurn:
    """One caller's membership in a share, left exactly once at the end of a `with` block."""

    def __init__(self, device, share):
        self._device = device
        self._share = share
        self._decodes = False
        self._begun_s = self._target_s = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._device.leave(self._share, self._decodes)

    @property
    def stalled(self):
        """Return whether the prompt of another turn is being evaluated, in batches that take long."""
        return self._share.prompts.locked() and self._share.batch_s > SHORT_BATCH_S

    @property
    def done_s(self):
        """Return how many solo-seconds this turn has decoded."""
        self._device.advance()
        return self._share.decode.clock_s - self._begun_s + DUE_WITHIN_S

    async def admitted(self):
        """Return when the engine looks for new requests: between two batches of the prompt that it evaluates."""
        share = self._share
        if self.stalled:
            self._device.advance()
            begin_s, end_s = share.span_s
            batches = (share.prompt.clock_s - begin_s) // share.batch_s + 1
            await self._device.reached(share.prompt, min(begin_s + batches * share.batch_s, end_s))

    async def prefill(self, solo_s):
        """Return when `solo_s` of a prompt are done, after those of the prompts before it."""
        share = self._share
        try:
            async with share.prompts:
                self._device.change()
                if self.stalled:
                    share.decode.wake()     # streams tell what they have so far
                share.span_s = share.prompt.clock_s, share.prompt.clock_s + solo_s
                try:
                    await self._device.reached(share.prompt, share.span_s[1])
                finally:
                    share.prompt.wake()     # the batch that others wait for has ended, if its client has left, too
        finally:
            self._device.change()

    def decode(self):
        """Count as one that decodes from now on."""
        self._device.advance()
        self._decodes = True
        self._share.decoders += 1
        self._begun_s = self._target_s = self._share.decode.clock_s
        self._device.change()

    async def work(self, solo_s):
        """Return when `solo_s` more solo-seconds are done. A late wake-up loses nothing."""
        self._target_s += solo_s
        self._device.advance()
        while self._target_s > self._share.decode.clock_s + DUE_WITHIN_S:
            await self._device.reached(self._share.decode, self._target_s)

    async def progress(self, solo_s):
        """Return when this turn has decoded `solo_s` in all, or earlier if somebody's prompt begins."""
        if solo_s > self.done_s:
            await self._device.reached(self._share.decode, self._begun_s + solo_s)


class Device:
    """A processor shared by turns of several models."""

    def __init__(self, exponent=BATCHING_EXPONENT):
        self._exponent = exponent
        self._pace = 1.0
        self._shares = {}
        self._at_s = 0.0
        self._sequence = itertools.count()
        self._timer = None
        self._timer_s = math.inf

    async def work(self, model, solo_s):
        """Do `solo_s` solo-seconds of work for `model`. May be cancelled at any time."""
        with self.enter(model) as turn:
            turn.decode()
            await turn.work(solo_s)

    def enter(self, model, token_s=0.0, batch_s=1.0):
        self.advance()
        share = self._shares.setdefault(model, DeviceShare(token_s, batch_s))
        share.turns += 1
        return DeviceTurn(self, share)

    def leave(self, share, decodes):
        self.advance()
        share.turns -= 1
        share.decoders -= decodes
        self._shares = {model: share for model, share in self._shares.items() if share.turns}
        self._set_rates()

    def set_pace(self, pace):
        """Multiply all speeds: 1 healthy, 0.1 ten times slower, 0 hung."""
        self.advance()
        self._pace = pace
        self._set_rates()

    def change(self):
        """Bring clocks and rates up to date: a turn begins or ends something."""
        self.advance()
        self._set_rates()

    def advance(self):
        """Bring the clocks of all shares up to now."""
        now_s = asyncio.get_running_loop().time()
        if now_s != self._at_s:
            for progress in self._all_progress():
                progress.clock_s += (now_s - self._at_s) * progress.rate
            self._at_s = now_s

    async def reached(self, progress, target_s):
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(progress.waiting, (target_s, next(self._sequence), future))
        self._arm()
        await future

    def _all_progress(self):
        return [progress for share in self._shares.values() for progress in (share.decode, share.prompt)]

    def _set_rates(self):
        for share in self._shares.values():
            pace = self._pace * len(self._shares) ** (SHARING_EXPONENT - 1)
            each = share.decoders ** (self._exponent - 1) if share.decoders else 1.0
            share.decode.rate, share.prompt.rate = pace * each, 0.0
            if share.prompts.locked():
                tokens_s = share.token_s / each if share.decoders else 0.0      # a token for each stream
                share.decode.rate = pace * share.token_s / (share.batch_s + tokens_s)
                share.prompt.rate = pace * share.batch_s / (share.batch_s + tokens_s)
        self._arm()

    def _arm(self):
        """Set the timer for the next target, unless it already goes off by then: too early does no harm."""
        due_s = min((self._at_s + (progress.waiting[0][0] - progress.clock_s) / progress.rate
                     for progress in self._all_progress() if progress.waiting and progress.rate), default=math.inf)
        if due_s < self._timer_s:
            if self._timer:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(due_s, self._ring)
            self._timer_s = due_s

    def _ring(self):
        self._timer, self._timer_s = None, math.inf
        self.advance()
        for progress in self._all_progress():
            progress.wake(progress.clock_s + DUE_WITHIN_S)
        self._arm()


# ------------------------------------------------------------------------------------------------------------
# Requests: what does the client want?
#
# Go reads JSON leniently, and clients rely on it: keys match in any case, the last duplicate wins, bytes
# after the first value are ignored, Content-Type does not matter.
# ------------------------------------------------------------------------------------------------------------

class Refused(Exception):
    """An answer other than success: an HTTP status, Ollama's text for it, and a type of error if not the usual one."""

    def __init__(self, status, text, kind=None):
        super().__init__(text)
        self.status = status
        self.text = text
        self.kind = kind


BUSY = "server busy, please try again.  maximum pending requests exceeded"  # two spaces, as in Ollama
STOPPED = ("model runner has unexpectedly stopped, this may be due to resource limitations or an internal "
           "error, check ollama server logs for details")
INPUT_TOO_LONG = "input length exceeds the context length"



def any_case(pairs):
    return {key.casefold(): value for key, value in pairs}


LENIENT_JSON = json.JSONDecoder(object_pairs_hook=any_case)


def read_json(body):
    """Return the object at the start of `body`, keys in lower case. Raises Refused(400)."""
    text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise Refused(400, "missing request body")
    try:
        value, _ = LENIENT_JSON.raw_decode(text)
    except json.JSONDecodeError as error:
        letter = text[error.pos:error.pos + 1]
        raise Refused(400, f"invalid character '{letter}' looking for beginning of value" if letter
                      else "unexpected EOF") from None
    except RecursionError:
        raise Refused(400, "exceeded max depth") from None
    if not isinstance(value, dict):
        raise Refused(400, f"json: cannot unmarshal {type(value).__name__} into Go value of type api.Request")
    return value


def plain(data):
    """Return what a zstd frame holds: of one segment and raw blocks only, as tests write it. Raises Refused(400)."""
    if data[:5] != b"\x28\xb5\x2f\xfd\xa0":     # magic; single segment, a content size of four bytes
        raise Refused(400, "unsupported zstd frame")
    blocks, at, last = [], 9, False
    while not last:
        head = int.from_bytes(data[at:at + 3], "little")
        last, size = head & 1, head >> 3
        blocks.append(data[at + 3:at + 3 + size])
        at += 3 + size
    return b"".join(blocks)


MOST_OBJECTS = 500_000  # of a body; Go reads more in one of its threads, here that would stop the whole node


def read_fields(exchange):
    """Return the fields of a body, as JSON, JSON in zstd or a multipart form. Raises Refused(400)."""
    if exchange.body.count(b"{") > MOST_OBJECTS:
        raise Refused(400, "json: cannot unmarshal number into Go struct field .messages")
    kind = exchange.head.fields.get("content-type", "")
    if kind.startswith("multipart/form-data"):
        form = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + exchange.body)
        return {part.get_param("name", header="content-disposition"): part.get_payload() for part in form.get_payload()}
    packed = exchange.head.fields.get("content-encoding") == "zstd"
    return read_json(plain(exchange.body) if packed else exchange.body)


def field(body, name, kind, default):
    """Return a field of the given type; null counts as absent. Raises Refused(400)."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise Refused(400, f"json: cannot unmarshal {type(value).__name__} into Go struct field .{name}")
    return value


GO_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
GO_TERM = r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)"


def keep_alive_s(value):
    """Return seconds for a keep_alive field: a number or a Go duration, negative = forever, None = unsaid.

    Raises Refused(400) for what Go refuses too, such as "300" (no unit).
    """
    if value is None:
        return None
    if isinstance(value, str):
        magnitude = value.removeprefix("-").removeprefix("+")
        if magnitude != "0" and not re.fullmatch(f"({GO_TERM})+", magnitude):
            raise Refused(400, f'time: missing unit in duration "{value}"')
        seconds = sum(float(number) * GO_UNIT_S[unit] for number, unit in re.findall(GO_TERM, magnitude))
        value = -seconds if value.startswith("-") else seconds
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(400, f"invalid keep_alive: {value!r}")
    return math.inf if value < 0 else float(value)


RUNNER_DEFAULTS = {"num_ctx": 0, "num_batch": PROMPT_BATCH, "num_gpu": -1, "main_gpu": 0, "use_mmap": False,
                   "num_thread": 0, "draft_num_predict": 0, "shift": True}


def runner_key(options, shift=None):
    """Return the explicit options that a runner is started with: see Engine.settings. Raises Refused(400)."""
    field(options, "num_ctx", (int, float), None)
    explicit = options if shift is None else options | {"shift": shift}
    return tuple((name, explicit[name]) for name in RUNNER_DEFAULTS if explicit.get(name) is not None)


PICTURE = "\ufffc"                  # stands in a prompt for a picture, before what tells it from others
PICTURE_TOKENS = 768


def picture(data):
    return f"{PICTURE}{hashlib.sha1(str(data).encode()).hexdigest()[:6]} "


def rendered_part(part):
    """Return what one part of a message adds to the prompt: text, a picture, a tool's call or its result."""
    if not isinstance(part, dict):
        return ""
    source = part.get("image_url") or part.get("source")
    if source and part.get("type") in ("image_url", "input_image", "image"):
        return picture(source)
    inner = part.get("content")
    return "".join((part.get("text") or "", rendered_parts(inner) if isinstance(inner, list) else inner or "",
                    json.dumps(part["input"]) if "input" in part else ""))


def rendered_parts(parts):
    return "".join(map(rendered_part, parts))


def rendered_message(message):
    """Return a message's part of the prompt: its pictures, its content, and the calls of tools that it tells."""
    content = message.get("content") or ""
    calls = [message[name] for name in ("tool_calls", "arguments", "output") if message.get(name)]
    return "".join((*map(picture, message.get("images") or ()),
                    content if isinstance(content, str) else rendered_parts(content),
                    *(call if isinstance(call, str) else json.dumps(call) for call in calls)))


def rendered(messages, tools=None):
    """Return the prompt for a list of messages: the tools, then their contents, one after the other."""
    lead = [json.dumps(tools)] if tools else []
    return "\n".join([*lead, *(rendered_message(message) for message in messages if isinstance(message, dict))])


def tool_name(body):
    """Return the name of the first tool in a body, in any dialect's form, or "" if there is none."""
    tool = next(iter(field(body, "tools", list, [])), {})
    return (tool.get("function") or tool).get("name") or "tool" if tool else ""


WORDS = re.findall("[a-z]+", """
a about again all and any are around at back be because been before but by call can change come
could day do down each end even every far few find first for from get give go good great had hand
has have here high home how if in into is it just keep kind know large last left light like line
little long look made make many may mean more most move much must name near need never new next no
not now number of off old on once only open or other our out over own part place point right same
say see set show side small so some still such take tell than that the then there thing think this
time to turn two under until up use very want water way we well what when where which while who
why will with word work world would write year you""")
COMMON = frozenset(WORDS) | {"lorem"}
PIECE = re.compile(f"{PICTURE}|[A-Za-z0-9]+|[^\\sA-Za-z0-9{PICTURE}]{{1,2}}")
ODD_LETTERS = re.compile("[^aeiouy]{4}|[aeiou]{4}|q[^u]|^[^aeiouy]+$|[jkqvxz][b-df-hj-np-tv-xz]|[a-z][A-Z]")
LONG_RUN = 32               # characters: what is longer is hardly a word, and four of it are a token


@functools.lru_cache(1 << 16)
def piece_tokens(piece):
    """Return the tokens of one word, number or sign; letters at random cost more than English, hex digits most."""
    if piece == PICTURE:
        return PICTURE_TOKENS
    if piece.lower() in COMMON or not piece.isalnum():
        return 1
    if len(piece) > LONG_RUN:
        return math.ceil(len(piece) / 4)
    if piece.isdigit():
        return math.ceil(len(piece) / 3)
    has_digits = any(map(str.isdigit, piece))
    return math.ceil(len(piece) / (1.25 if has_digits else 2 if ODD_LETTERS.search(piece) else 6))


FILLERS = ("lorem is ",)    # of two tokens, about as in English; prompts take turns if there are more


def token_count(text):
    """Return the number of tokens of a prompt. Filler is counted apart: most prompts of benchmarks are nothing else."""
    filled = 0
    for filler in FILLERS:
        filled += 2 * text.count(filler)
        text = text.replace(filler, " ")
    counts = collections.Counter(PIECE.findall(text))
    return max(1, filled + sum(piece_tokens(piece) * count for piece, count in counts.items()))


def worded(lead, tokens):
    """Return a text that begins with `lead` and has so many tokens, if `lead` has not more."""
    pairs, single = divmod(max(0, tokens - token_count(lead)), 2)
    return lead + FILLERS[zlib.crc32(lead.encode()) % len(FILLERS)] * pairs + "lorem" * single


class Ask(NamedTuple):
    """One inference, whatever the dialect it was asked in."""

    name: str               # as the client wrote it: answers repeat it
    model: Model
    prompt: str
    stream: bool
    num_predict: int        # <= 0: until the model stops
    options: tuple          # see runner_key
    keep_alive_s: float | None
    include_usage: bool = False
    tool: str = ""          # what the answer calls, if it is a call

    @property
    def silent(self):
        """Return whether nothing is shown before the answer is whole."""
        return bool(self.tool) or not self.stream


OUTPUT_MARK = re.compile(r"<out=(\d{1,7})>")
CALL_MARK = "<call>"            # with tools in the body: the model answers with a call of the first one
REPEAT_MARK = "<repeat>"        # the model says one token again and again, until the node gives it up
MOST_EQUAL_TOKENS = 30

# What a node for people says in place of words at random: the first sentence, then some of the others.
SIMULATED = (
    "This answer is simulated: no model has read your question.",
    "The nodes here imitate the speed of real machines, and these words come as fast as they would there.",
    "The field X-SOLLOL-Node of the answer names the node, and X-SOLLOL-Reason tells why it was chosen.",
    "The gateway's page, /dashboard, shows where each request runs and which ones wait.",
    "Send ten requests at once to see how they are spread over the nodes.",
    "A model that is not in memory is loaded first, which takes seconds, as on a real machine.",
    "For real answers put the URLs of your Ollama servers into hosts.txt and start the gateway with it.",
)


def simulated_words(rng, count=None):
    """Return the words of an answer that says what it is: so many, or by default two to six whole sentences."""
    sentences = (SIMULATED[0], *rng.sample(SIMULATED[1:], rng.randint(1, 5)))
    words = " ".join(sentences).split()
    return words if count is None else list(itertools.islice(itertools.cycle(words), count))


def composed(ask, most, for_people=False):
    """Return (tokens, done_reason). Deterministic: all nodes give one model and prompt the same answer.

    The reason is None for an answer that is given up for its repetitions. The prompt may choose the length,
    `<out=123>` (the last mark counts); else it is 20 to 80 tokens, or whole sentences `for_people`.
    """
    rng = random.Random(hashlib.sha256((ask.model.blob + ask.prompt).encode("utf-8", "replace")).digest())
    marks = OUTPUT_MARK.findall(ask.prompt)
    said = simulated_words(rng, min(int(marks[-1]), most) if marks else None) if for_people else []
    wanted = int(marks[-1]) if marks else len(said) or rng.randint(20, 80)
    count = min(wanted, most, ask.num_predict if ask.num_predict > 0 else most)
    tokens = [" " + word for word in said[:count] or rng.choices(WORDS, k=count)]
    tokens[:1] = [token.strip().capitalize() for token in tokens[:1]]
    if REPEAT_MARK in ask.prompt:
        return tokens + [" and"] * MOST_EQUAL_TOKENS, None
    return tokens, "stop" if count == wanted else "length"


def embedded(model, text):
    """Return eight numbers of unit length, the same on every node."""
    hashed = hashlib.sha256((model.blob + text).encode("utf-8", "replace")).digest()
    numbers = [value / 2**31 - 1 for value in struct.unpack("<8I", hashed)]
    length = math.hypot(*numbers)
    return [value / length for value in numbers]


# ------------------------------------------------------------------------------------------------------------
# Engine: which models are in memory, and who waits for what?
#
# Ollama's scheduler. A runner is one file of weights in memory, whatever tags name it. A request for a resident
# model whose settings have the same values goes straight to its runner and waits there in an unbounded FIFO for one
# of the slots. All others form one line: its head loads, alone; to make room it evicts the model with the shortest
# keep-alive, an idle one first, and waits, with everybody behind it, until that one is idle. Requests for the busy
# model still pass by on the fast path, so a load can starve. Whoever triggered a load and leaves, aborts it; the
# next in line begins from zero.
# ------------------------------------------------------------------------------------------------------------

OVERHEAD_S = 0.03           # per request: template, tokeniser, sampling set-up
LOAD_START_S = 1.5          # process, GPU discovery, health poll
EVICTION_S = 0.7            # until VRAM is really free: 0.5 to 1.5 s were seen
SPILL = 0.15                # a model that does not fit runs partly on the CPU, 5-10x slower
CACHE_MATCH = 0.1           # a slot is reused when more than this part of the prompt matches
KV_GB_PER_TOKEN = 128 / 2**20       # 8B model, f16; grows slowly with size: 70B has 2.5 times as much
MAX_LOADED = 3              # OLLAMA_MAX_LOADED_MODELS: runners, whatever the memory
COUNTED_CONTEXT = 4096      # a server's own window counts as this much memory: Ollama chooses one that fits
EMBED_CALL_S = 0.0025       # per input on a CPU: Ollama calls its engine once for each
PICTURE_S = 15.0            # to encode a picture on a CPU: 15 to 82 s were seen
CONTEXT_SLOWS = 0.0         # a token takes so much longer for each 1,000 tokens of its prompt


def shared_length(one, other):
    """Return the length of the common prefix, by halving: comparing slices is far faster than characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def kv_gb_per_token(model):
    return 0.0 if model.embedding else KV_GB_PER_TOKEN * (model.params_b / 8) ** 0.4


class Machine(NamedTuple):
    """What differs between two nodes of the same hardware. Those of a benchmark draw it from their seeds."""

    exponent: float = BATCHING_EXPONENT     # b requests at once are b^exponent times as fast together
    overhead_s: float = OVERHEAD_S
    load_factor: float = 1.0                # loads take so many times as long


USUAL_MACHINE = Machine()


def drawn_machine(seed):
    """Return a node's own figures, the same for the same seed."""
    rng = random.Random(f"machine {seed}")
    return Machine(rng.triangular(0.5, 0.9, BATCHING_EXPONENT), 0.01 * 20 ** rng.random(), 0.5 * 4 ** rng.random())


class SimRunner:
    """A file of weights in memory."""

    def __init__(self, engine, model, settings):
        one_by_one = model.embedding or model.format == "safetensors"       # Ollama gives these one slot
        slots = 1 if one_by_one else engine.slots
        own_window = settings["num_ctx"] == engine.context_length(model)
        window = min(settings["num_ctx"], COUNTED_CONTEXT) if own_window else settings["num_ctx"]
        kv_gb = kv_gb_per_token(model)
        self.model = model              # the first tag that was asked for: the one that /api/ps lists
        self.settings = settings        # the values it was started with
        self.slots = asyncio.Semaphore(slots)
        self.texts = [""] * slots       # what each free slot has in its KV cache, least recently used first
        self.kept = []                  # (text, tokens) of the prompt cache in RAM, least recently used first
        self.cache_tokens = 0 if model.embedding else int(engine.traits.prompt_cache_gb / kv_gb)
        self.keep_alive_s = engine.traits.keep_alive_s
        self.need_gb = model.size_gb * 1.2 + slots * window * kv_gb
        self.vram_gb = min(self.need_gb, engine.vram_gb)
        self.speed = model.speed * (1.0 if self.need_gb <= engine.vram_gb else SPILL)
        self.users = 0                  # requests running or in the FIFO
        self.used_s = 0.0               # loop time of the last use
        self.expiry = None              # timer, only while idle

    @property
    def context_length(self):
        return self.settings["num_ctx"]

    def serves(self, settings):
        """Return whether a request with these settings needs no reload: layers on the GPU may be left open."""
        left_open = {"num_gpu": self.settings["num_gpu"]} if settings["num_gpu"] < 0 else {}
        return self.settings == settings | left_open

    def take_text(self, prompt):
        """Choose a free slot for a prompt and return how many characters of the prompt it has cached."""
        best = max(self.texts, key=lambda text: shared_length(text, prompt))
        shared = shared_length(best, prompt)
        if shared <= CACHE_MATCH * len(prompt):
            best, shared = self.texts[0], 0
        self.texts.remove(best)
        return shared if not self.cache_tokens else self._swap(best, shared, prompt)

    def _swap(self, text, shared, prompt):
        """Bring back from RAM what fits a prompt better, keep there what its slot loses; return what is cached."""
        again = max(self.kept, key=lambda entry: shared_length(entry[0], prompt), default=("", 0))
        if shared_length(again[0], prompt) > max(shared, CACHE_MATCH * len(prompt)):
            self.kept.remove(again)
            shared = shared_length(again[0], prompt)
            self._keep(text)
        elif shared < len(text) / 2:
            self._keep(text)
        return shared

    def _keep(self, text):
        self.kept.append((text, token_count(text)))
        while sum(tokens for _, tokens in self.kept) > self.cache_tokens:
            del self.kept[0]


class Traits(NamedTuple):
    """What may be chosen of a simulated node, beside its hardware and its models."""

    name: str = ""                  # the hardware's, if empty
    host: str = "127.0.0.1"
    port: int = 0                   # 0: any
    seed: int = 0
    slots: int | None = None        # None: the hardware's; so for vram_gb
    vram_gb: float | None = None
    loaded: tuple = ()              # models in memory at the start
    keep_alive_s: float = 300.0
    latency_s: float = 0.0          # one way
    noise: float = 0.0              # sigma of ln(time) of a request
    speed: float = 1.0              # times as fast as the hardware
    tokens_per_line: int = 1        # of a stream
    version: str = "0.33.0"
    max_queue: int = 512            # requests that wait for a load
    drawn: bool = False             # its Machine comes from the seed, else it is the usual one,
    machine: Machine | None = None  # or this one
    context: int | None = None      # tokens of a window; None: by memory
    too_long: str = "refuse"        # a prompt that does not fit; or "cut", or "exceed": the engine's own error
    max_loaded: int = MAX_LOADED
    prompt_cache_gb: float = 0.0    # of each runner, in RAM; newer versions have 8
    ps_blocks: bool = False         # /api/ps and /api/tags wait while a model loads
    silent_tools: bool = False      # every answer to a body with tools is a call, shown only when it is whole
    picture_s: float = PICTURE_S    # to encode a picture on a CPU
    for_people: bool = False        # answers are sentences that say they are simulated, not words at random
    mlx: bool = False               # one slot, whatever `slots` says
    lacks: tuple = ()               # paths that this version does not know
    gzips: bool = False             # a tunnel compresses answers,
    fields: dict = {}               # and adds these


class Engine:
    """The part of a node behind its HTTP server. Needs a running loop once it is used."""

    def __init__(self, hardware, traits):
        self.hardware = hardware
        self.traits = traits
        self.machine = traits.machine or (drawn_machine(traits.seed) if traits.drawn else USUAL_MACHINE)
        self.slots = traits.slots or hardware.slots
        self.vram_gb = traits.vram_gb or hardware.vram_gb
        self.speed = traits.speed
        self.device = Device(self.machine.exponent)
        self.host = Device(1.0)         # what is done beside the engine, for all requests at once
        self.disk = Device()            # loads run beside inference, but a fault stops them too
        self.runners = {}               # blob -> SimRunner
        self.moving = asyncio.Lock()    # held while a model is loaded: some versions' /api/ps waits for it
        self.pending = 0                # requests in the line, its head included
        self.loads = 0
        self.evictions = 0
        self.prefilled_tokens = 0       # of all prompts, what no cache held
        self._rng = random.Random(traits.seed)
        self._line = asyncio.Lock()     # FIFO; whoever holds it is the head
        self._idle = asyncio.Event()    # some runner became idle or left

    @property
    def resident(self):
        """Return the runners by the name of the tag that was loaded."""
        return {runner.model.name: runner for runner in self.runners.values()}

    def context_length(self, model, explicit=None):
        """Return the tokens of a window: those asked for or Ollama's default for so much VRAM, at most the model's."""
        vram_gb = 0 if self.hardware.on_cpu else self.vram_gb
        default = self.traits.context or (4096 if vram_gb < 23 else 32_768 if vram_gb < 47 else 262_144)
        explicit = explicit if isinstance(explicit, (int, float)) else model.num_ctx or None
        return min(model.max_context, default if explicit is None else max(4, int(explicit)))

    def settings(self, model, options):
        """Return the values that explicit options (see runner_key) come to for a model."""
        explicit = dict(options)
        return RUNNER_DEFAULTS | explicit | {"num_ctx": self.context_length(model, explicit.get("num_ctx"))}

    def overhead_s(self):
        return self.machine.overhead_s / self.speed

    def prefill_s(self, runner):
        return 1 / (self.hardware.prefill_tok_s * runner.speed * self.speed)

    def decode_s(self, runner):
        return 1 / (self.hardware.decode_tok_s * runner.speed * self.speed)

    def embed_call_s(self):
        return EMBED_CALL_S * math.sqrt(HARDWARE["cpu"].decode_tok_s / self.hardware.decode_tok_s) / self.speed

    def picture_s(self):
        return self.traits.picture_s * HARDWARE["cpu"].prefill_tok_s / self.hardware.prefill_tok_s / self.speed

    def gain(self):
        """Return how many times the decoding of one request full slots do together."""
        return batch_gain(self.slots, self.machine.exponent)

    def jitter(self):
        """Return a factor around 1 by which this request takes longer than computed."""
        return math.exp(self._rng.gauss(0.0, self.traits.noise)) if self.traits.noise else 1.0

    @contextlib.asynccontextmanager
    async def runner(self, model, options, keep_alive_s):
        """Lend the runner for a model, loaded if need be. Raises Refused(503) if the line is full."""
        runner = await self._obtain(model, self.settings(model, options))
        runner.users += 1
        self._stop_expiry(runner)
        if keep_alive_s is not None:        # absent keeps what an earlier request has said
            runner.keep_alive_s = keep_alive_s
        try:
            yield runner
        finally:
            runner.users -= 1
            runner.used_s = asyncio.get_running_loop().time()
            self._settle(runner)

    async def _obtain(self, model, settings):
        runner = self._hot(model, settings)
        if runner:
            return runner
        if self.pending > self.traits.max_queue:
            raise Refused(503, BUSY)
        self.pending += 1
        try:
            async with self._line:
                return self._hot(model, settings) or await self._load(model, settings)
        finally:
            self.pending -= 1

    def _hot(self, model, settings):
        runner = self.runners.get(model.blob)
        return runner if runner and runner.serves(settings) else None

    async def _load(self, model, settings):
        runner = SimRunner(self, model, settings)
        evicted = await self._make_room(runner)
        load_s = LOAD_START_S + model.size_gb / self.hardware.load_gb_s + (EVICTION_S if evicted else 0.0)
        async with self.moving:
            await self.disk.work(model.name, load_s * self.machine.load_factor / self.speed)
        self.loads += 1
        self.runners[model.blob] = runner
        return runner

    async def _make_room(self, newcomer):
        """Unload until the newcomer fits; return whether anything was unloaded."""
        evicted = False
        while True:
            stale = self.runners.get(newcomer.model.blob)       # same weights, other settings
            used_gb = sum(runner.need_gb for runner in self.runners.values())
            crowded = used_gb + newcomer.need_gb > self.vram_gb or len(self.runners) >= self.traits.max_loaded
            if not stale and not (crowded and self.runners):
                return evicted
            await self._evict(stale or self._victim())
            self.evictions += not stale
            evicted = True

    def _victim(self):
        return min(self.runners.values(), key=lambda runner: (runner.users > 0, runner.keep_alive_s, runner.model.blob))

    async def _evict(self, runner):
        """Unload a runner as soon as it is idle, whatever requests say of it meanwhile."""
        runner.keep_alive_s = 0.0
        while self.runners.get(runner.model.blob) is runner:
            if not runner.users:
                self.unload(runner)
                return
            self._idle.clear()
            await self._idle.wait()

    def _settle(self, runner):
        """Start the keep-alive of a runner that has become idle."""
        if runner.users or self.runners.get(runner.model.blob) is not runner:
            return
        self._idle.set()
        if runner.keep_alive_s <= 0:
            self.unload(runner)
        elif runner.keep_alive_s < math.inf:
            loop = asyncio.get_running_loop()
            runner.expiry = loop.call_later(runner.keep_alive_s, self.unload, runner)

    def _stop_expiry(self, runner):
        if runner.expiry:
            runner.expiry.cancel()
            runner.expiry = None

    def unload(self, runner):
        self._stop_expiry(runner)
        if self.runners.get(runner.model.blob) is runner:
            del self.runners[runner.model.blob]
        self._idle.set()

    def expire(self, model):
        """Unload a model, under whatever tag, as soon as it is idle; nothing happens if it is not resident."""
        runner = self.runners.get(model.blob)
        if runner:
            runner.keep_alive_s = 0.0
            self._stop_expiry(runner)
            self._settle(runner)

    def preload(self, model):
        """Put a model into memory at once, as if it had been loaded long ago."""
        runner = self.runners[model.blob] = SimRunner(self, model, self.settings(model, ()))
        runner.used_s = asyncio.get_running_loop().time()
        self._settle(runner)

    def lose_everything(self):
        """Forget all resident models, as a killed process does."""
        for runner in list(self.runners.values()):
            self.unload(runner)
        self._line = asyncio.Lock()     # cancelled holders release the lock that they took


# ------------------------------------------------------------------------------------------------------------
# HTTP: one request and its answer on the wire
#
# What net/http does: small bodies with Content-Length, larger ones and streams chunked, EOF
# from the client is a disconnect, 100 Continue when the body is first read, no chunks for HTTP/1.0.
# ------------------------------------------------------------------------------------------------------------

HEAD_LIMIT_BYTES = 1 << 20          # Go's DefaultMaxHeaderBytes
PART_BYTES = 1 << 16                # a body is read in parts of this size
LENGTH_LIMIT_BYTES = 2048           # Go buffers this much; a body that fits gets a Content-Length
HIGH_WATER_BYTES = 1 << 16          # asyncio's own mark: below it drain() would not wait anyway
KEPT_BODY_BYTES = 1 << 20           # larger request bodies are recorded by their length only
LINGER_S = 0.5                      # Go waits so long to close on an unread body: RST would eat the answer
JSON_TYPE = "application/json; charset=utf-8"
START_OF_TIME = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)     # the loop's time 0
LOCAL_ORIGIN = re.compile(r"(https?://(localhost|127\.0\.0\.1|0\.0\.0\.0)(:\d+)?|(app|file|tauri)://.*"
                          r"|vscode-(webview|file)://.*)")


def date_at(time_s):
    return START_OF_TIME + datetime.timedelta(seconds=time_s)


def epoch_at(time_s):
    """Return a loop time in whole seconds since 1970."""
    return int(date_at(time_s).timestamp())


def stamp(time_s):
    """Return a loop time as RFC 3339."""
    return date_at(time_s).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


class ClientStream(asyncio.StreamReader):
    """A stream that cancels the task which serves its client when the client goes away."""

    worker = None

    def feed_eof(self):
        super().feed_eof()
        self._gone()

    def set_exception(self, exception):
        super().set_exception(exception)
        self._gone()

    def _gone(self):
        if self.worker:
            self.worker.cancel()


class Head(NamedTuple):
    method: str
    path: str               # decoded, without query
    http_1_1: bool
    fields: dict            # lower-case name -> value


def read_head(raw):
    """Parse request line and header fields. Raises Refused(400)."""
    first, *lines = raw.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise Refused(400, "malformed HTTP request line")
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.lower()] = value.strip()
    target = urllib.parse.urlsplit(words[1] if "://" in words[1] else "//" + "host" + words[1])
    return Head(words[0], urllib.parse.unquote(target.path) or "/", words[2] != "HTTP/1.0", fields)


class Trace:
    """What a node remembers of one request, for tests and reports. Times are loop times in seconds."""

    __slots__ = ("number", "time_s", "method", "path", "head", "body", "body_bytes", "model", "status",
                 "started_s", "finished_s", "aborted")

    def __init__(self, number, time_s, method, path, head):
        self.number = number        # how many requests the node had before
        self.time_s = time_s
        self.method = method
        self.path = path
        self.head = head            # raw bytes
        self.body = b""             # raw bytes; empty if longer than KEPT_BODY_BYTES
        self.body_bytes = 0
        self.model = ""             # canonical
        self.status = 0             # 499: the client left first
        self.started_s = None       # a slot was obtained
        self.finished_s = None
        self.aborted = False


class SimExchange:
    """One request on a connection, and the means to answer it."""

    def __init__(self, reader, writer, head, trace, latency_s):
        self.head = head
        self.trace = trace
        self.body = b""
        self.close = self._wants_close()
        self._reader = reader
        self._writer = writer
        self._latency_s = latency_s
        self._on_the_way = collections.deque()
        self._chunked = head.http_1_1
        self._begun = False
        self.torn = False       # a fault: an answer in one piece ends in its middle
        self.extra = {}         # further fields of every answer
        self.compresses = False     # as a tunnel does, if the request allows it
        self._gzip = None

    def _wants_close(self):
        connection = self.head.fields.get("connection", "").lower()
        return "close" in connection if self.head.http_1_1 else "keep-alive" not in connection

    # The request's body.

    async def parts(self):
        """Yield the body as it arrives. Raises IncompleteReadError if it is cut short, Refused(400)."""
        if self.head.fields.get("expect", "").lower() == "100-continue":
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            if "chunked" in self.head.fields.get("transfer-encoding", "").lower():
                while size := int((await self._reader.readline()).partition(b";")[0], 16):
                    async for part in self._counted(size):
                        yield part
                    await self._reader.readline()
                while (await self._reader.readline()).strip():
                    pass        # trailers
            else:
                async for part in self._counted(int(self.head.fields.get("content-length", 0))):
                    yield part
        except ValueError:
            self.close = True
            raise Refused(400, "malformed request body") from None

    async def _counted(self, left):
        while left > 0:
            part = await self._reader.read(min(left, PART_BYTES))
            if not part:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(part)
            self.trace.body_bytes += len(part)
            yield part

    async def read_body(self):
        self.body = b"".join([part async for part in self.parts()])
        if len(self.body) <= KEPT_BODY_BYTES:
            self.trace.body = self.body

    # The answer.

    def _write(self, data):
        """Send, `latency_s` later; each timer delivers the oldest piece, so the order never changes."""
        if not self._latency_s:
            self._writer.write(data)
            return
        self._on_the_way.append(data)
        asyncio.get_running_loop().call_later(self._latency_s, self._deliver)

    def _deliver(self):
        data = self._on_the_way.popleft()
        if not self._writer.is_closing():
            self._writer.write(data)

    async def delivered(self):
        """Return when everything written is on the wire."""
        if self._on_the_way:
            await asyncio.sleep(self._latency_s)
        while self._on_the_way:
            await asyncio.sleep(0)

    async def linger(self):
        """Close our side after an answer to an unread body, and give the client time to read it."""
        self._reader.worker = None      # the answer is complete: a client that leaves now aborts nothing
        self._writer.write_eof()
        await asyncio.sleep(LINGER_S)

    def _answer_head(self, status, media_type, length, extra):
        date = date_at(asyncio.get_running_loop().time())
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}",
                 f"Date: {email.utils.format_datetime(date, usegmt=True)}"]
        lines += [f"Content-Type: {media_type}"] * bool(media_type)
        if length is not None:
            lines.append(f"Content-Length: {length}")
        elif self._chunked:
            lines.append("Transfer-Encoding: chunked")
        else:
            self.close = True
        origin = self.head.fields.get("origin")
        if origin and status != 403:
            lines += [f"Access-Control-Allow-Origin: {origin}", "Vary: Origin"]
        lines += [f"{name}: {value}" for name, value in (self.extra | extra).items()]
        if self.close:
            lines.append("Connection: close")
        elif not self.head.http_1_1:
            lines.append("Connection: keep-alive")
        self.trace.status = status
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"

    def send(self, status, body=b"", media_type="", **extra):
        """Answer in one piece. `extra` fields are spelt with underscores."""
        extra = {name.replace("_", "-"): value for name, value in extra.items()}
        if body and self._may_compress():
            body, extra = gzip.compress(body), extra | {"Content-Encoding": "gzip"}
        if len(body) < LENGTH_LIMIT_BYTES or not self._chunked or self.head.method == "HEAD":
            head = self._answer_head(status, media_type, len(body), extra)
            answer = head if self.head.method == "HEAD" else head + body
        else:
            head = self._answer_head(status, media_type, None, extra)
            answer = b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(body), body)
        self._write(answer[:len(answer) - len(body) // 2] if self.torn else answer)
        self.close = self.close or self.torn

    def send_json(self, value, status=200):
        if status == 200 and self.head.path.startswith("/v1/"):     # written by an encoder of its own
            self.send(status, compact(value) + b"\n", "application/json")
        else:
            self.send(status, compact(value), JSON_TYPE)

    def _may_compress(self):
        return self.compresses and "gzip" in self.head.fields.get("accept-encoding", "").lower()

    def send_garbage(self, data):
        """Send bytes that are no HTTP, and close."""
        self.close = True
        self._write(data)

    def refuse(self, refusal):
        """Answer with an error in the family of the path."""
        if not self.head.path.startswith("/v1/"):
            self.send_json({"error": refusal.text}, refusal.status)
            return
        kind = refusal.kind or {400: "invalid_request_error", 404: "not_found_error"}.get(refusal.status, "api_error")
        if self.head.path.startswith("/v1/messages"):
            self.send_json({"type": "error", "error": {"type": kind, "message": refusal.text},
                            "request_id": f"req_{self.trace.number}"}, refusal.status)
            return
        self.send_json({"error": {"message": refusal.text, "type": kind, "param": None, "code": None}},
                       refusal.status)

    def stream(self, pieces, media_type, last=False):
        """Send pieces of a stream, each as a chunk of its own; the first call sends the head too."""
        out = b"" if self._begun else self._begin_stream(media_type)
        self._begun = True
        pieces = [piece for piece in map(self._packed, pieces) if piece] if self._gzip else pieces
        if self._gzip and last:
            pieces.append(self._gzip.flush())
        for piece in pieces:
            out += b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece
        self._write(out + b"0\r\n\r\n" if last and self._chunked else out)

    def _begin_stream(self, media_type):
        if self._may_compress():
            self._gzip = zlib.compressobj(wbits=31)
        return self._answer_head(200, media_type, None, {"Content-Encoding": "gzip"} if self._gzip else {})

    def _packed(self, piece):
        return self._gzip.compress(piece) + self._gzip.flush(zlib.Z_SYNC_FLUSH)

    async def drain(self):
        """Wait while the client reads too slowly."""
        if self._writer.transport.get_write_buffer_size() > HIGH_WATER_BYTES:
            await self._writer.drain()


# ------------------------------------------------------------------------------------------------------------
# Dialects: how is one inference told to this client?
#
# A dialect turns text into the pieces of a stream, or into one object. `part` runs for every token, so all
# that stays the same is built beforehand.
# ------------------------------------------------------------------------------------------------------------

CONTEXT_LIMIT = 4096        # the final /api/generate line lists all token ids; enough to make it long


class Stats(NamedTuple):
    """The figures of the last line; durations in seconds of loop time."""

    reason: str | None      # None: given up without an end
    total_s: float
    load_s: float
    prompt_tokens: int      # cached ones included
    prompt_s: float         # cached ones not included
    output_tokens: int
    output_s: float

    def fields(self):
        """Return them as Ollama does: integer nanoseconds, zeros left out."""
        fields = {"total_duration": round(self.total_s * 1e9), "load_duration": round(self.load_s * 1e9),
                  "prompt_eval_count": self.prompt_tokens, "prompt_eval_duration": round(self.prompt_s * 1e9),
                  "eval_count": self.output_tokens, "eval_duration": round(self.output_s * 1e9)}
        return {name: value for name, value in fields.items() if value}

    def usage(self):
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.output_tokens,
                "total_tokens": self.prompt_tokens + self.output_tokens}


GIVEN_UP = Stats(None, 0.0, 0.0, 0, 0.0, 0, 0.0)


DRAWN_IDS = random.Random("ids")        # Ollama draws them at random: two nodes never say the same


def drawn_id(lead):
    """Return an id such as Ollama's, all of one length."""
    return f"{lead}_{DRAWN_IDS.randrange(100_000, 999_999)}"


class GenerateLines:
    """/api/generate."""

    media_type = "application/x-ndjson"
    before, after = b'","response":', b',"done":false}\n'

    def __init__(self, ask, _trace):
        self.ask = ask
        self._start = b'{"model":%b,"created_at":"' % compact(ask.name)

    def part(self, text, now_s):
        now = stamp(now_s).encode()
        return b"".join((self._start, now, self.before, json.dumps(text).encode(), self.after))

    def last(self, stats, now_s):
        return [compact(self.whole("", stats, now_s)) + b"\n"]

    def whole(self, text, stats, now_s):
        context = list(range(min(CONTEXT_LIMIT, stats.prompt_tokens + stats.output_tokens)))
        return self.note(text, stats.reason, now_s) | ({"context": context} if context else {}) | stats.fields()

    def note(self, text, reason, now_s):
        """Return the object that also answers a mere load or unload."""
        return ({"model": self.ask.name, "created_at": stamp(now_s)} | self.content(text)
                | ({"done": True, "done_reason": reason} if reason else {"done": False}))

    def content(self, text):
        return {"response": text}


class ChatLines(GenerateLines):
    """/api/chat."""

    before, after = b'","message":{"role":"assistant","content":', b'},"done":false}\n'

    def whole(self, text, stats, now_s):
        return self.note(text, stats.reason, now_s) | stats.fields()

    def call(self, text, now_s):
        """Return the piece of a stream that tells the call of a tool."""
        return compact(self.note(text, None, now_s)) + b"\n"

    def content(self, text):
        if not self.ask.tool or not text:
            return {"message": {"role": "assistant", "content": text}}
        call = {"id": drawn_id("call"), "function": {"index": 0, "name": self.ask.tool, "arguments": {"text": text}}}
        return {"message": {"role": "assistant", "content": "", "tool_calls": [call]}}


class ChatEvents:
    """/v1/chat/completions."""

    media_type = "text/event-stream"
    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    first = b'{"index":0,"delta":{"role":"assistant","content":%b},"finish_reason":null}'
    later = b'{"index":0,"delta":{"content":%b},"finish_reason":null}'
    finish = {"delta": {}}
    behind = ()             # what stands behind the choices of an event

    def __init__(self, ask, trace):
        self.ask = ask
        created = epoch_at(trace.time_s)
        self._about = {"id": f"{self.id_prefix}-{trace.number % 999}", "object": self.chunk_kind,
                       "created": created, "model": ask.name, "system_fingerprint": "fp_ollama"}
        self._start = b"data: " + compact({name: value for name, value in self._about.items()
                                           if name not in self.behind})[:-1] + b',"choices":['
        self._behind = b"".join(b',"%b":%b' % (name.encode(), compact(self._about[name])) for name in self.behind)
        self._end = b"]" + self._behind + self.extra() + b"}\n\n"
        self._choice = self.first

    def extra(self):
        """Return what every chunk carries after its choices."""
        return b""

    def part(self, text, _now_s):
        choice, self._choice = self._choice, self.later
        return b"".join((self._start, choice % json.dumps(text).encode(), self._end))

    def call(self, text, _now_s):
        choice = {"index": 0, "delta": self.content(text)["message"], "finish_reason": None}
        return self._start + compact(choice) + self._end

    def last(self, stats, _now_s):
        choice = {"index": 0} | self.finish | {"finish_reason": self.reason(stats)}
        events = [self._start + compact(choice) + self._end]
        if self.ask.include_usage:
            events.append(b'%b]%b,"usage":%b}\n\n' % (self._start, self._behind, compact(stats.usage())))
        return events + [b"data: [DONE]\n\n"]

    def whole(self, text, stats, _now_s):
        choice = {"index": 0} | self.content(text) | {"finish_reason": self.reason(stats)}
        return self._about | {"object": self.kind, "choices": [choice], "usage": stats.usage()}

    def reason(self, stats):
        return "tool_calls" if self.ask.tool and stats.reason else stats.reason

    def content(self, text):
        if not self.ask.tool:
            return {"message": {"role": "assistant", "content": text}}
        call = {"id": drawn_id("call"), "index": 0, "type": "function",
                "function": {"name": self.ask.tool, "arguments": json.dumps({"text": text})}}
        return {"message": {"role": "assistant", "content": "", "tool_calls": [call]}}


class CompletionEvents(ChatEvents):
    """/v1/completions."""

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl"
    first = later = b'{"text":%b,"index":0,"finish_reason":null}'
    finish = {"text": ""}
    behind = "model", "system_fingerprint"

    def extra(self):        # a zeroed usage on every chunk, oddly
        zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        return b',"usage":' + compact(zeros) if self.ask.include_usage else b""

    def content(self, text):
        return {"text": text}


def event(name, **fields):
    """Return a named server-sent event, its name repeated as the object's type."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), compact({"type": name} | fields))


class ResponseEvents:
    """/v1/responses (openai/responses.go)."""

    media_type = "text/event-stream"

    def __init__(self, ask, _trace):
        self.ask = ask
        self._id, self._call_id = drawn_id("resp"), drawn_id("call")
        self._item_id = f"{drawn_id('fc')}_0" if ask.tool else drawn_id("msg")
        self._text, self._numbers = [], itertools.count()

    def _response(self, status, output, now_s, usage=None):
        given = dict.fromkeys(("completed_at", "incomplete_details", "previous_response_id", "instructions", "error",
                               "reasoning", "max_output_tokens", "max_tool_calls", "safety_identifier",
                               "prompt_cache_key"))
        given |= {"presence_penalty": 0, "frequency_penalty": 0, "top_logprobs": 0, "top_p": 1, "temperature": 1}
        return given | {"id": self._id, "object": "response", "created_at": epoch_at(now_s), "status": status,
                        "model": self.ask.name, "output": output, "usage": usage, "parallel_tool_calls": True,
                        "tools": [], "tool_choice": "auto", "metadata": {}, "text": {"format": {"type": "text"}},
                        "truncation": "disabled", "store": False, "background": False, "service_tier": "default"}

    def _item(self, status, text):
        if self.ask.tool:
            return {"id": self._item_id, "type": "function_call", "status": status, "call_id": self._call_id,
                    "name": self.ask.tool, "arguments": text}
        content = [self._content(text)] if status == "completed" else []
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _event(self, name, **fields):
        """Return an event, its fields in the order of their names: Go sorts the keys of a map."""
        fields |= {"type": f"response.{name}", "sequence_number": next(self._numbers)}
        ordered = json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()
        return b"event: response.%b\ndata: %b\n\n" % (name.encode(), ordered)

    def _begin(self, now_s):
        running = self._response("in_progress", [], now_s)
        return b"".join((
            self._event("created", response=running), self._event("in_progress", response=running),
            self._event("output_item.added", output_index=0, item=self._item("in_progress", ""))))

    def _placed(self, name, **fields):
        return self._event(name, item_id=self._item_id, output_index=0, **fields)

    def part(self, text, now_s):
        begin = b"" if self._text else self._begin(now_s) + self._placed(
            "content_part.added", content_index=0, part=self._content(""))
        self._text.append(text)
        return begin + self._placed("output_text.delta", content_index=0, delta=text, logprobs=[])

    def call(self, text, now_s):
        arguments = json.dumps({"text": text})
        self._text.append(text)
        return b"".join((
            self._begin(now_s),
            self._placed("function_call_arguments.delta", delta=arguments),
            self._placed("function_call_arguments.done", arguments=arguments),
            self._event("output_item.done", output_index=0, item=self._item("completed", arguments))))

    def last(self, stats, now_s):
        text = "".join(self._text)
        closing = [] if self.ask.tool else [
            self._placed("output_text.done", content_index=0, text=text, logprobs=[]),
            self._placed("content_part.done", content_index=0, part=self._content(text)),
            self._event("output_item.done", output_index=0, item=self._item("completed", text))]
        return [*closing, self._event("completed", response=self.whole(text, stats, now_s))]

    def whole(self, text, stats, now_s):
        usage = {"input_tokens": stats.prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
                 "output_tokens": stats.output_tokens, "output_tokens_details": {"reasoning_tokens": 0},
                 "total_tokens": stats.prompt_tokens + stats.output_tokens}
        item = self._item("completed", json.dumps({"text": text}) if self.ask.tool else text)
        return self._response("completed", [item], now_s, usage) | {"completed_at": epoch_at(now_s)}

    def _content(self, text):
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class MessageEvents:
    """/v1/messages (anthropic/anthropic.go)."""

    media_type = "text/event-stream"

    def __init__(self, ask, _trace):
        self.ask = ask
        self._id, self._call_id, self._begun = drawn_id("msg"), drawn_id("call"), False

    def _message(self, content, input_tokens, output_tokens, **reason):
        return {"id": self._id, "type": "message", "role": "assistant", "model": self.ask.name, "content": content,
                **reason, "usage": {"input_tokens": input_tokens, "output_tokens": output_tokens}}

    def _begin(self, block):
        self._begun = True      # the real count is not known before the end
        return (event("message_start", message=self._message([], len(self.ask.prompt) // 4, 0))
                + event("content_block_start", index=0, content_block=block))

    def _tool_use(self, arguments):
        return {"type": "tool_use", "id": self._call_id, "name": self.ask.tool, "input": arguments}

    def part(self, text, _now_s):
        begin = b"" if self._begun else self._begin({"type": "text", "text": ""})
        return begin + event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def call(self, text, _now_s):
        delta = {"type": "input_json_delta", "partial_json": json.dumps({"text": text})}
        return self._begin(self._tool_use({})) + event("content_block_delta", index=0, delta=delta)

    def last(self, stats, _now_s):
        usage = {"input_tokens": stats.prompt_tokens, "output_tokens": stats.output_tokens}
        return [event("content_block_stop", index=0),
                event("message_delta", delta={"stop_reason": self._reason(stats)}, usage=usage), event("message_stop")]

    def whole(self, text, stats, _now_s):
        block = self._tool_use({"text": text}) if self.ask.tool else {"type": "text", "text": text}
        return self._message([block], stats.prompt_tokens, stats.output_tokens, stop_reason=self._reason(stats))

    def _reason(self, stats):
        reasons = {"length": "max_tokens", "stop": "tool_use" if self.ask.tool else "end_turn"}
        return reasons.get(stats.reason)


# ------------------------------------------------------------------------------------------------------------
# Endpoints: what does each path answer?
#
# An endpoint is a coroutine function of (node, exchange), or for inference of (node, exchange, body), and one
# line in the table at the end.
# ------------------------------------------------------------------------------------------------------------

def find_model(node, body, missing, empty):
    """Return (name as sent, Model). Raises Refused: 404 with text `missing`, or `empty` for no name."""
    name = field(body, "model", str, "") or field(body, "name", str, "")
    if not name.strip():
        raise Refused(*empty)
    model = node.models.get(canonical(name))
    if not model and node.account and canonical(name).endswith(("-cloud", ":cloud")):
        model = model_named(name)
    if not model:
        raise Refused(404, missing.format(name))
    return name, model


NOT_FOUND = "model '{}' not found"
NOT_FOUND_EMBED = 'model "{}" not found, try pulling it first'
NOT_FOUND_QUOTED = 'model "{}" not found'
NO_NAME = (400, "model is required")
EMPTY_NAME = (404, "model '' not found")


def read_ask(node, body, ability, prompt, empty):
    """Return the Ask in an /api body. Raises Refused."""
    name, model = find_model(node, body, NOT_FOUND, empty)
    if model.embedding:
        raise Refused(400, f'"{name}" does not support {ability}')
    if body.get("think"):
        raise Refused(400, f'"{name}" does not support thinking')
    options, tool = field(body, "options", dict, {}), tool_name(body) if ability == "chat" else ""
    calls = node.traits.silent_tools or CALL_MARK in prompt
    return Ask(name, model, prompt, field(body, "stream", bool, True),
               int(field(options, "num_predict", (int, float), -1)), runner_key(options, body.get("shift")),
               keep_alive_s(body.get("keep_alive")), tool=tool if calls else "")


def read_openai_ask(node, body, ability, prompt, empty):
    """Return the Ask in a /v1 body: no runner options, no keep_alive, not streamed unless it says so."""
    options = {"num_predict": field(body, "max_tokens", int, -1)}
    ask = read_ask(node, {name: body.get(name) for name in ("model", "tools")} | {"options": options}, ability, prompt,
                   empty)
    usage = field(field(body, "stream_options", dict, {}), "include_usage", bool, False)
    return ask._replace(stream=field(body, "stream", bool, False), include_usage=usage)


def fitting_tokens(node, runner, prompt):
    """Return the tokens of a prompt that its window takes. Raises Refused(400)."""
    tokens, window = token_count(prompt), runner.context_length
    if tokens <= window or node.traits.too_long == "cut":
        return min(tokens, window)
    error = {"code": 400, "message": f"request ({tokens} tokens) exceeds the available context size ({window} tokens), "
             "try increasing it", "type": "exceed_context_size_error", "n_prompt_tokens": tokens, "n_ctx": window}
    raise Refused(400, INPUT_TOO_LONG if node.traits.too_long == "refuse" else json.dumps({"error": error}))


async def decode(turn, token_s, tokens, exchange, dialect, tokens_per_line):
    """Stream tokens as they come: one a line while a neighbour's prompt stops all but one in a while."""
    now_s, sent = asyncio.get_running_loop().time, 0
    while sent < len(tokens):
        wanted = min(len(tokens), sent + (1 if turn.stalled else tokens_per_line))
        await turn.progress(wanted * token_s)
        done = min(wanted, int(turn.done_s / token_s + 1e-6))
        if done > sent:
            exchange.stream((dialect.part("".join(tokens[sent:done]), now_s()),), dialect.media_type)
            sent = done
            await exchange.drain()


async def produce(engine, runner, exchange, dialect, prompt_tokens, tokens_per_line):
    """Prefill and decode on the device, streaming as tokens come; return (stats, text)."""
    ask, now_s = dialect.ask, asyncio.get_running_loop().time
    tokens, reason = composed(ask, 10 * runner.context_length, engine.traits.for_people)    # Ollama ends there
    jitter, shared, kept = engine.jitter(), runner.take_text(ask.prompt), ask.prompt
    cached = min(token_count(ask.prompt[:shared]), prompt_tokens - 1) if shared else 0      # the last one is evaluated
    pictures = ask.prompt.count(PICTURE, shared)
    prompt_rate_s = engine.prefill_s(runner)
    token_s = jitter * engine.decode_s(runner) * (1 + CONTEXT_SLOWS * prompt_tokens / 1000)
    exchange.trace.started_s = now_s()
    try:
        await engine.host.work("", jitter * engine.overhead_s())
        with engine.device.enter(runner.model.blob, token_s, PROMPT_BATCH * prompt_rate_s) as turn:
            await turn.admitted()
            begun_s = now_s()
            fresh = max(1, prompt_tokens - cached)
            engine.prefilled_tokens += fresh
            await turn.prefill(jitter * (fresh * prompt_rate_s + pictures * engine.picture_s()))
            turn.decode()
            prefilled_s = now_s()
            if ask.silent:
                await turn.work(token_s * len(tokens))
            else:
                await decode(turn, token_s, tokens, exchange, dialect, tokens_per_line)
        text = "".join(tokens)
        kept = f"{ask.prompt}\n{text}"      # so that the next turn of a chat finds its history
    finally:
        runner.texts.append(kept)
    prompt_s, output_s = prefilled_s - begun_s, now_s() - prefilled_s
    return (Stats(reason, 0.0, 0.0, prompt_tokens, prompt_s, len(tokens), output_s) if reason else GIVEN_UP), text


async def infer(node, exchange, dialect):
    """Answer an Ask: wait for the model, for a slot, for the prompt, then for each token."""
    ask, arrived_s, now_s = dialect.ask, exchange.trace.time_s, asyncio.get_running_loop().time
    engine = node.engine
    async with engine.runner(ask.model, ask.options, ask.keep_alive_s) as runner:
        load_s = now_s() - arrived_s
        prompt_tokens = fitting_tokens(node, runner, ask.prompt)
        async with runner.slots:
            stats, text = await produce(engine, runner, exchange, dialect, prompt_tokens, node.traits.tokens_per_line)
            if stats.reason:
                stats = stats._replace(total_s=now_s() - arrived_s, load_s=load_s)
            if ask.stream:
                called = [dialect.call(text, now_s())] if ask.tool else []
                end = dialect.last(stats, now_s()) if stats.reason else []
                exchange.stream(called + end, dialect.media_type, last=True)
            else:
                exchange.send_json(dialect.whole(text, stats, now_s()))


async def load_or_unload(node, exchange, dialect):
    """Answer an empty prompt: it only moves the model."""
    ask = dialect.ask
    if ask.keep_alive_s == 0:
        node.engine.expire(ask.model)
        reason = "unload"
    else:
        async with node.engine.runner(ask.model, ask.options, ask.keep_alive_s):
            reason = "load"
    exchange.send_json(dialect.note("", reason, asyncio.get_running_loop().time()))


async def generate(node, exchange, body):
    prompt = field(body, "prompt", str, "")
    pictures = "".join(map(picture, field(body, "images", list, [])))
    whole_prompt = "\n".join(filter(None, (field(body, "system", str, ""), pictures + prompt)))
    ask = read_ask(node, body, "generate", whole_prompt, EMPTY_NAME)
    await (infer if prompt else load_or_unload)(node, exchange, GenerateLines(ask, exchange.trace))


async def chat(node, exchange, body):
    messages = field(body, "messages", list, [])
    ask = read_ask(node, body, "chat", rendered(messages, body.get("tools")), NO_NAME)
    await (infer if messages else load_or_unload)(node, exchange, ChatLines(ask, exchange.trace))


async def openai_chat(node, exchange, body):
    messages = field(body, "messages", list, [])
    if not messages:
        raise Refused(400, "[] is too short - 'messages'")
    ask = read_openai_ask(node, body, "chat", rendered(messages, body.get("tools")), NO_NAME)
    await infer(node, exchange, ChatEvents(ask, exchange.trace))


async def openai_completion(node, exchange, body):
    ask = read_openai_ask(node, body, "generate", field(body, "prompt", str, ""), EMPTY_NAME)
    await infer(node, exchange, CompletionEvents(ask, exchange.trace))


async def openai_response(node, exchange, body):
    items = body.get("input") or ""
    prompt = items if isinstance(items, str) else rendered(items, body.get("tools"))
    limit = {"max_tokens": body.get("max_output_tokens")}
    ask = read_openai_ask(node, body | limit, "chat", field(body, "instructions", str, "") + prompt, NO_NAME)
    await infer(node, exchange, ResponseEvents(ask, exchange.trace))


async def anthropic_message(node, exchange, body):
    if not field(body, "max_tokens", int, 0):
        raise Refused(400, "max_tokens is required and must be positive")
    system = body.get("system") or ""
    lead = system if isinstance(system, str) else rendered_parts(system)
    prompt = lead + rendered(field(body, "messages", list, []), body.get("tools"))
    ask = read_openai_ask(node, body, "chat", prompt, NO_NAME)
    await infer(node, exchange, MessageEvents(ask, exchange.trace))


async def work_for(node, body, solo_s):
    """Have a body's model work for so long, in a slot."""
    _, model = find_model(node, body, NOT_FOUND, NO_NAME)
    async with node.engine.runner(model, (), None) as runner, runner.slots:
        await node.engine.device.work(model.blob, solo_s)


async def transcribe(node, exchange, body):
    await work_for(node, body, node.engine.overhead_s())
    exchange.send_json({"text": f"{len(body.get('file') or '')} bytes of speech"})


async def draw(node, exchange, body):
    """Answer with one picture of a pixel."""
    await work_for(node, body, 1.0)
    exchange.send_json({"created": int(time.time()), "data": [{"b64_json": "iVBORw0KGgo="}]})


async def decide(node, exchange, body):
    """Answer as a decision model does."""
    await work_for(node, body, node.engine.overhead_s())
    exchange.send_json({"object": "systemone", "decision": "yes"})


class Embeddings(NamedTuple):
    vectors: list
    prompt_tokens: int
    total_s: float
    load_s: float


async def embed_all(node, exchange, body, model, texts):
    """Return the Embeddings of all texts; each text waits for a slot of its own."""
    engine, now_s, arrived_s = node.engine, asyncio.get_running_loop().time, exchange.trace.time_s
    options = runner_key(field(body, "options", dict, {}))

    async def one(count):
        async with runner.slots:
            exchange.trace.started_s = exchange.trace.started_s or now_s()
            solo_s = engine.embed_call_s() + count * engine.prefill_s(runner)
            await engine.device.work(model.blob, solo_s * engine.jitter())

    async with engine.runner(model, options, keep_alive_s(body.get("keep_alive"))) as runner:
        load_s = now_s() - arrived_s
        counts = [token_count(text) for text in texts]
        if body.get("truncate") is False and max(counts, default=0) > runner.context_length:
            raise Refused(400, f"the {INPUT_TOO_LONG}")
        counts = [min(count, runner.context_length) for count in counts]
        await engine.host.work("", engine.overhead_s() * engine.jitter())
        async with asyncio.TaskGroup() as group:
            for count in counts:
                group.create_task(one(count))
    vectors = [embedded(model, text)[:field(body, "dimensions", int, 0) or None] for text in texts]
    return Embeddings(vectors, sum(counts), now_s() - arrived_s, load_s)


def embed_texts(body):
    """Return the inputs of an embed body as a list. Raises Refused(400)."""
    value = body.get("input")
    texts = [value] if isinstance(value, str) and value else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "invalid input type")
    return texts


async def embed(node, exchange, body):
    name, model = find_model(node, body, NOT_FOUND_EMBED, EMPTY_NAME)
    done = await embed_all(node, exchange, body, model, embed_texts(body))
    stats = Stats("", done.total_s, done.load_s, done.prompt_tokens, 0.0, 0, 0.0)
    exchange.send_json({"model": name, "embeddings": done.vectors} | stats.fields())


async def embed_one(node, exchange, body):
    _, model = find_model(node, body, NOT_FOUND_EMBED, NO_NAME)
    prompt = field(body, "prompt", str, "")
    done = await embed_all(node, exchange, body, model, [prompt] if prompt else [])
    exchange.send_json({"embedding": done.vectors[0] if prompt else []})


def floats_in_base64(vector):
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def openai_embed(node, exchange, body):
    name, model = find_model(node, body, NOT_FOUND_EMBED, NO_NAME)
    texts = embed_texts(body)
    if not texts:
        raise Refused(400, "invalid input")
    done = await embed_all(node, exchange, {"dimensions": body.get("dimensions")}, model, texts)
    in_base64 = body.get("encoding_format") == "base64"     # what the openai package asks for by default
    data = [{"object": "embedding", "index": index,
             "embedding": floats_in_base64(vector) if in_base64 else vector}
            for index, vector in enumerate(done.vectors)]
    exchange.send_json({"object": "list", "data": data, "model": name,
                        "usage": {"prompt_tokens": done.prompt_tokens, "total_tokens": done.prompt_tokens}})


async def root(_node, exchange):
    exchange.send(200, b"Ollama is running", "text/plain; charset=utf-8")


async def version(node, exchange):
    exchange.send_json({"version": node.version})


async def status(_node, exchange):
    exchange.send_json({"cloud": {"disabled": False, "source": "none"}})


def details(model):
    family = "nomic-bert" if model.embedding else (model.weights or model.name).split(":")[0]     # of the weights
    return {"parent_model": "", "format": model.format, "family": family, "families": [family],
            "parameter_size": f"{model.params_b:g}B", "quantization_level": "Q4_K_M",
            "context_length": model.max_context}


def capabilities(model):
    return ["embedding"] if model.embedding else ["completion", "tools"]


async def when_it_answers(node):
    """Return when the scheduler's lock is free, for a version that takes it to answer."""
    if node.traits.ps_blocks:
        async with node.engine.moving:
            pass


async def tags(node, exchange):
    await when_it_answers(node)
    exchange.send_json({"models": [
        {"name": model.name, "model": model.name, "modified_at": stamp(node.modified_s.get(model.name, 0.0)),
         "size": int(model.size_gb * 1e9), "digest": model.digest, "details": details(model),
         "capabilities": capabilities(model)}
        for model in sorted(node.models.values(), key=lambda model: -node.modified_s.get(model.name, 0.0))]})


def resident_row(engine, runner):
    forever = runner.keep_alive_s == math.inf
    expires_at = "2318-01-01T00:00:00Z" if forever else stamp(runner.used_s + runner.keep_alive_s)
    return {"name": runner.model.name, "model": runner.model.name, "size": int(runner.need_gb * 1e9),
            "digest": runner.model.digest, "details": details(runner.model), "expires_at": expires_at,
            "size_vram": 0 if engine.hardware.on_cpu else int(runner.vram_gb * 1e9),
            "context_length": runner.context_length}


async def resident(node, exchange):
    await when_it_answers(node)
    rows = [resident_row(node.engine, runner) for runner in node.engine.runners.values()]
    exchange.send_json({"models": sorted(rows, key=lambda row: row["expires_at"], reverse=True)})


def shortest(name):
    """Return a name as /api/show tells it: without the default registry, with its tag, in its own case."""
    name = re.sub("^(registry.ollama.ai/)?(library/)?", "", name.strip(), flags=re.I)
    return name if not name or ":" in name.rpartition("/")[2] else name + ":latest"


async def show(node, exchange):
    body = read_json(exchange.body)
    name = field(body, "model", str, "") or field(body, "name", str, "")
    _, model = find_model(node, {"model": shortest(name)}, NOT_FOUND, NO_NAME)
    info = {"general.architecture": details(model)["family"],
            "general.parameter_count": int(model.params_b * 1e9), "general.basename": model.name}
    modelfile = f"FROM /root/.ollama/models/blobs/sha256-{model.blob}\nTEMPLATE {{{{ .Prompt }}}}\n"
    modelfile += f"PARAMETER num_ctx {model.num_ctx}\n" if model.num_ctx else ""
    exchange.send_json({"modelfile": modelfile, "template": "{{ .Prompt }}",
                        "details": details(model), "model_info": info, "capabilities": capabilities(model),
                        "modified_at": stamp(node.modified_s.get(model.name, 0.0))})


def openai_model(model):
    return {"id": model.name, "object": "model", "created": epoch_at(0.0), "owned_by": "library"}


async def openai_models(node, exchange):
    rows = [openai_model(model) for model in node.models.values()]
    exchange.send_json({"object": "list", "data": rows or None})        # null when there is none


async def openai_one_model(node, exchange):
    name = exchange.head.path.removeprefix("/v1/models/")
    _, model = find_model(node, {"model": shortest(name)}, NOT_FOUND, NO_NAME)
    exchange.send_json(openai_model(model) | {"id": name})


def blob_digest(exchange):
    """Return the 64 hex digits in the path; `sha256-` is accepted too. Raises Refused(400)."""
    match = re.fullmatch("/api/blobs/sha256[:-]([0-9a-fA-F]{64})", exchange.head.path)
    if not match:
        raise Refused(400, "invalid digest format")
    return match[1].lower()


async def find_blob(node, exchange):
    exchange.send(200 if blob_digest(exchange) in node.blobs else 404)


async def store_blob(node, exchange):
    digest = blob_digest(exchange)
    if digest in node.blobs:        # answered at once, the body unread
        exchange.close = True
        exchange.send(200)
        await exchange.delivered()
        await exchange.linger()
        return
    hashed = hashlib.sha256()
    async for part in exchange.parts():
        hashed.update(part)
    if hashed.hexdigest() != digest:
        raise Refused(400, f"digest mismatch, expected sha256:{digest}, got sha256:{hashed.hexdigest()}")
    node.blobs[digest] = exchange.trace.body_bytes
    exchange.send(201)


async def tell(exchange, body, lines):
    """Answer with progress as it comes: a line each, or without `stream` the last one alone.

    A Refused is told in-band once lines are out, as Ollama does with what goes wrong in a pull.
    """
    stream, last = field(body, "stream", bool, True), {}
    try:
        async for last in lines:
            if stream and last != SUCCESS:
                exchange.stream((compact(last) + b"\n",), "application/x-ndjson")
    except Refused as refusal:
        if not stream:
            raise
        last = {"error": refusal.text}
    if stream:
        exchange.stream((compact(last) + b"\n",), "application/x-ndjson", last=True)
    else:
        exchange.send_json(last)


SUCCESS = {"status": "success"}
PULL_GB_S = 1.0             # a registry over 10 Gbit/s
PULL_STEPS = 4              # lines that tell how far a layer is


async def pulled(node, name):
    """Yield the progress of a pull. Raises Refused."""
    yield {"status": "pulling manifest"}
    model = node.registry.get(canonical(name))
    if not model:
        raise Refused(500, "pull model manifest: file does not exist")
    total, have = int(model.size_gb * 1e9), node.models.get(model.name)
    layer = {"status": f"pulling {model.blob[:12]}", "digest": f"sha256:{model.blob}", "total": total}
    for step in range(1, PULL_STEPS + 1):
        if have is None or have.blob != model.blob:
            await node.engine.disk.work(f"pull {name}", model.size_gb / PULL_GB_S / PULL_STEPS / node.engine.speed)
            yield layer | {"completed": total * step // PULL_STEPS}
    yield layer | {"completed": total}
    yield {"status": "verifying sha256 digest"}
    yield {"status": "writing manifest"}
    node.keep(model)
    yield SUCCESS


async def pull(node, exchange):
    body = read_json(exchange.body)
    name = field(body, "model", str, "") or field(body, "name", str, "")
    if not name.strip():
        raise Refused(400, "invalid model name")
    await tell(exchange, body, pulled(node, name))


async def pushed(node, body):
    yield {"status": "retrieving manifest"}
    if not node.account:
        raise Refused(401, "you must be logged in to push models")
    find_model(node, body, NOT_FOUND_QUOTED, NO_NAME)
    yield SUCCESS


async def push(node, exchange):
    body = read_json(exchange.body)
    await tell(exchange, body, pushed(node, body))


async def created(node, name, body):
    """Yield the progress of a create: from a model, which is pulled if it is missing, or from uploaded files."""
    files, source = field(body, "files", dict, {}), field(body, "from", str, "")
    if source:
        if canonical(source) not in node.models:
            async for line in pulled(node, source):
                if line != SUCCESS:
                    yield line
        base = node.models[canonical(source)]
    elif files:
        missing = [digest for digest in files.values() if digest.removeprefix("sha256:") not in node.blobs]
        if missing:
            raise Refused(400, f"blob {missing[0]} does not exist")
        base = model_named(name)._replace(weights=",".join(sorted(files.values())))
    else:
        raise Refused(400, "neither 'from' or 'files' was specified")
    yield {"status": "creating new layer"}
    yield {"status": "writing manifest"}
    num_ctx = field(field(body, "parameters", dict, {}), "num_ctx", int, base.num_ctx)
    node.keep(base._replace(name=canonical(name), weights=base.weights or base.name, num_ctx=num_ctx))
    yield SUCCESS


async def create(node, exchange):
    body = read_json(exchange.body)
    name = field(body, "model", str, "") or field(body, "name", str, "")
    await tell(exchange, body, created(node, name, body))


async def copy(node, exchange):
    body = read_json(exchange.body)
    _, model = find_model(node, {"model": body.get("source")}, NOT_FOUND_QUOTED, (400, 'source "" is invalid'))
    name = canonical(field(body, "destination", str, ""))
    if not name:
        raise Refused(400, 'destination "" is invalid')
    node.keep(model._replace(name=name, weights=model.weights or model.name))
    exchange.send(200)


async def delete(node, exchange):
    _, model = find_model(node, read_json(exchange.body), NOT_FOUND, NO_NAME)
    del node.models[model.name]
    if all(other.blob != model.blob for other in node.models.values()):
        node.engine.expire(model)
    exchange.send(200)


async def me(node, exchange):
    if not node.account:
        exchange.send_json({"error": "unauthorized", "signin_url": f"https://ollama.com/connect?name={node.name}"}, 401)
    else:
        exchange.send_json({"id": "1", "name": node.account})


async def sign_out(node, exchange):
    node.account = ""
    exchange.send(200)


async def web_search(node, exchange):
    if not node.account:
        raise Refused(401, "unauthorized")
    exchange.send_json({"results": [{"title": "Llamas", "url": "https://llama.example/", "content": node.account}]})


class Endpoint(NamedTuple):
    methods: str
    path: str               # one that ends with "/" stands for all below it
    answer: Callable
    kind: str = "plain"     # "inference": counted, and what fail() hits; "upload": reads its body itself

    def matches(self, path):
        below = self.path != "/" and self.path.endswith("/") and path.startswith(self.path)
        return below or path == self.path


ENDPOINTS = (
    Endpoint("GET HEAD", "/", root),
    Endpoint("GET HEAD", "/api/version", version),
    Endpoint("GET HEAD", "/api/tags", tags),
    Endpoint("GET", "/api/ps", resident),
    Endpoint("GET", "/api/status", status),
    Endpoint("POST", "/api/show", show),
    Endpoint("POST", "/api/generate", generate, "inference"),
    Endpoint("POST", "/api/chat", chat, "inference"),
    Endpoint("POST", "/api/embed", embed, "inference"),
    Endpoint("POST", "/api/embeddings", embed_one, "inference"),
    Endpoint("HEAD", "/api/blobs/", find_blob),
    Endpoint("POST", "/api/blobs/", store_blob, "upload"),
    Endpoint("GET", "/v1/models", openai_models),
    Endpoint("GET", "/v1/models/", openai_one_model),
    Endpoint("POST", "/v1/chat/completions", openai_chat, "inference"),
    Endpoint("POST", "/v1/completions", openai_completion, "inference"),
    Endpoint("POST", "/v1/embeddings", openai_embed, "inference"),
    Endpoint("POST", "/v1/responses", openai_response, "inference"),
    Endpoint("POST", "/v1/messages", anthropic_message, "inference"),
    Endpoint("POST", "/v1/audio/transcriptions", transcribe, "inference"),
    Endpoint("POST", "/v1/systemone", decide, "inference"),
    Endpoint("POST", "/v1/images/generations", draw, "inference"),
    Endpoint("POST", "/v1/images/edits", draw, "inference"),
    Endpoint("POST", "/api/pull", pull),
    Endpoint("POST", "/api/push", push),
    Endpoint("POST", "/api/create", create),
    Endpoint("POST", "/api/copy", copy),
    Endpoint("DELETE", "/api/delete", delete),
    Endpoint("POST", "/api/me", me),
    Endpoint("POST", "/api/signout", sign_out),
    Endpoint("DELETE", "/api/user/keys/", sign_out),
    Endpoint("POST", "/api/experimental/web_search", web_search),
    Endpoint("POST", "/api/experimental/web_fetch", web_search),
    Endpoint("GET", "/api/experimental/model-recommendations", web_search),
)


# ------------------------------------------------------------------------------------------------------------
# Node: a simulated Ollama on a port, with a switch for every fault
# ------------------------------------------------------------------------------------------------------------

class Connection(NamedTuple):
    number: int             # order of arrival; sorting by it keeps runs repeatable
    task: asyncio.Task
    writer: asyncio.StreamWriter


def refused_origin(head):
    """Return whether CORS forbids the request: its origin is neither local nor the node."""
    origin = head.fields.get("origin", "")
    own = origin.partition("://")[2] == head.fields.get("host")
    return bool(origin) and not own and not LOCAL_ORIGIN.fullmatch(origin)


def reset_on_close(transport):
    """Let a connection end with RST, not FIN, and lose what is unsent."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Failing(NamedTuple):
    """What a node answers in place of its own answer."""

    status: int
    paths: tuple | None             # None: all inference
    models: tuple                   # canonical; empty: all
    text: str
    kind: str | None = None         # type of the error in /v1
    body: bytes | None = None       # in place of JSON, as a proxy's,
    media_type: str = "text/html"   # and what goes with it
    fields: dict = {}

    def hits(self, path, model):
        return (self.paths is None or path in self.paths) and (not self.models or model in self.models)


class SimNode:
    """A simulated Ollama node. Faults may be set and counters read at any time while its loop runs."""

    def __init__(self, hardware="rtx3060", models=("llama3.2",), **traits):
        self.traits = Traits(**traits)
        self.name = self.traits.name or hardware
        self.host = self.traits.host
        self.port = self.traits.port            # 0: any; the real one after start()
        self.format = "safetensors" if self.traits.mlx else "gguf"
        self.models = {model.name: model for model in map(self._model_named, models)}
        self.version = self.traits.version
        self.tls = None                         # the ssl.SSLContext that it speaks TLS with
        self.engine = Engine(HARDWARE[hardware], self.traits)
        self.registry = MODELS                  # what it can pull
        self.modified_s = {}                    # model -> loop time of the pull, copy or create that brought it
        self.account = ""                       # at ollama.com; "" = signed out
        self.blobs = {}                         # digest -> bytes
        self.connections = set()
        self.requests = collections.deque(maxlen=10_000)
        self.in_flight = 0                      # inference requests, those in the hidden queue included
        self.in_flight_by_model = collections.Counter()
        self.max_in_flight = 0
        self.aborted = 0                        # requests whose client left, or that died with the node
        self._loaded = self.traits.loaded
        self._server = None
        self._arrivals = itertools.count()
        self._numbers = itertools.count()
        self._failing = None                    # a Failing
        self._garbage = b""                     # sent in place of answers
        self._tearing = False
        self._awake = asyncio.Event()
        self._awake.set()

    @property
    def url(self):
        return f"http{'s' if self.tls else ''}://{self.host}:{self.port}"

    @property
    def loads(self):
        return self.engine.loads

    @property
    def evictions(self):
        return self.engine.evictions

    def _model_named(self, name):
        return model_named(name)._replace(format=self.format)

    def keep(self, model):
        """Have a model on disk from now on, in place of one of that name."""
        self.models[model.name] = model
        self.modified_s[model.name] = asyncio.get_running_loop().time()

    # Life and death.

    async def start(self):
        """Listen, on the last port if there was one, and return self. Raises OSError if it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, self.host, self.port, backlog=1024, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        for name in self._loaded:
            self.engine.preload(self._model_named(name))
        self._loaded = ()       # a killed node comes back empty
        return self

    async def stop(self):
        """Close the listener and all connections, and wait until every task has ended."""
        connections = self._cut()
        await asyncio.gather(*(connection.task for connection in connections), return_exceptions=True)
        self.engine.lose_everything()
        await asyncio.sleep(0)      # transports close their sockets one turn of the loop later

    def kill(self):
        """Die as a process does: listener gone, connections reset, memory lost."""
        self._prepare_reset()
        self._cut()
        self.engine.lose_everything()

    async def restart(self, after_s=0.0):
        """Come back on the same port after stop() or kill(), and so many seconds. Faults stay until recover()."""
        await asyncio.sleep(after_s)
        return await self.start()

    async def direct_user(self, output_tokens=200, prompt_tokens=100, model=None, requests=1):
        """Make requests one after the other past any gateway; cancel the task to end them at once."""
        caller = Caller(self.host, self.port)
        try:
            for number in range(requests):
                prompt = worded(f"<out={output_tokens}> direct {number} ", prompt_tokens)
                value = {"model": model or next(iter(self.models)), "prompt": prompt}
                await caller.call(json.dumps(value).encode(), path="/api/generate")
        finally:
            caller.close()

    def _prepare_reset(self):
        """Let connections that are cut end with RST, not FIN."""
        for transport in self._open_transports():
            reset_on_close(transport)

    def _open_transports(self):
        transports = [connection.writer.transport for connection in sorted(self.connections)]
        return [transport for transport in transports if not transport.is_closing()]

    def _cut(self):
        if self._server:
            self._server.close()
            self._server = None
        return self._cut_connections()

    def _cut_connections(self):
        connections = sorted(self.connections)
        for connection in connections:
            connection.task.cancel()
            connection.writer.transport.abort()
        return connections

    # Faults.

    def hang(self):
        """Stop all computing, as a wedged GPU does: inference is accepted, /api/version, tags and ps still answer."""
        self._set_pace(0.0)

    def slow(self, factor):
        """Compute `factor` times slower."""
        self._set_pace(1.0 / factor)

    def freeze(self):
        """Accept connections and say nothing at all."""
        self._set_pace(0.0)
        self._awake.clear()

    def fail(self, status=503, paths=None, text=None, *, models=(), **answer):
        """Answer inference at once with an error, on some paths or on all; other paths if they are named.

        `text` is Ollama's unless it is given; `answer` sets further fields of Failing. With status 200 the text is the
        first line of a stream, and an empty body is a stream without any.
        """
        usual = {503: BUSY, 500: STOPPED}.get(status) or http.client.responses.get(status, "")
        self._failing = Failing(status, paths, tuple(map(canonical, models)), usual if text is None else text, **answer)

    def reset(self):
        """Reset every connection, as a broken network does; the process lives on."""
        self._prepare_reset()
        self._cut_connections()

    def garble(self, data):
        """Send bytes that are no HTTP on every connection now, and in place of every answer to an inference."""
        self._garbage = data
        for transport in self._open_transports():
            transport.write(data)

    def tear(self):
        """Answer what is not streamed with half of its body, and close."""
        self._tearing = True

    def recover(self):
        """Undo hang, slow, freeze, fail, garble and tear."""
        self._set_pace(1.0)
        self._awake.set()
        self._failing, self._garbage, self._tearing = None, b"", False

    def _set_pace(self, pace):
        self.engine.device.set_pace(pace)
        self.engine.disk.set_pace(pace)

    # Service.

    def _protocol(self):
        return asyncio.StreamReaderProtocol(ClientStream(limit=HEAD_LIMIT_BYTES), self._converse)

    async def _converse(self, reader, writer):
        """Serve one connection until either side closes it."""
        connection = Connection(next(self._arrivals), asyncio.current_task(), writer)
        self.connections.add(connection)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass        # the client left, or the node dies: nobody to tell
        finally:
            self.connections.discard(connection)
            writer.close()

    async def _serve_one(self, reader, writer):
        """Serve one request; return whether the connection may carry another."""
        try:
            raw = await reader.readuntil(b"\r\n\r\n")
            head = read_head(raw)
        except (asyncio.LimitOverrunError, Refused) as error:
            malformed = isinstance(error, Refused)
            code = b"400 Bad Request" if malformed else b"431 Request Header Fields Too Large"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % code)
            return False
        now_s = asyncio.get_running_loop().time
        trace = Trace(next(self._numbers), now_s(), head.method, head.path, raw)
        self.requests.append(trace)
        exchange = SimExchange(reader, writer, head, trace, self.traits.latency_s)
        exchange.extra, exchange.compresses = self.traits.fields, self.traits.gzips
        reader.worker = asyncio.current_task()
        try:
            await self._answer(exchange)
            await exchange.delivered()
        except asyncio.CancelledError:
            self.aborted += 1
            trace.aborted, trace.status = True, 499
            raise
        finally:
            reader.worker = None
            trace.finished_s = now_s()
        return not exchange.close

    async def _answer(self, exchange):
        if self.traits.latency_s:
            await asyncio.sleep(self.traits.latency_s)
        await self._awake.wait()
        exchange.trace.time_s = asyncio.get_running_loop().time()
        try:
            await self._route(exchange)
        except Refused as refusal:
            exchange.refuse(refusal)

    async def _route(self, exchange):
        head = exchange.head
        endpoints = [endpoint for endpoint in ENDPOINTS if endpoint.matches(head.path)]
        endpoint = next((endpoint for endpoint in endpoints if head.method in endpoint.methods.split()), None)
        if not endpoint or endpoint.kind != "upload":
            await exchange.read_body()
        if refused_origin(head):
            exchange.send(403)
        elif head.path in self.traits.lacks:
            exchange.send(404, b"404 page not found", "text/plain")
        elif endpoint and endpoint.kind == "inference":
            await self._infer(endpoint, exchange)
        elif endpoint:
            if not (self._failing and self._failing.paths and self._fails(endpoint.path, "", exchange)):
                await endpoint.answer(self, exchange)
        elif endpoints:
            allowed = ", ".join(method for endpoint in endpoints for method in endpoint.methods.split())
            exchange.send(405, b"405 method not allowed", "text/plain", Allow=allowed)
        else:
            exchange.send(404, b"404 page not found", "text/plain")

    async def _infer(self, endpoint, exchange):
        body = read_fields(exchange)
        model = exchange.trace.model = canonical(field(body, "model", str, ""))
        self.in_flight += 1
        self.in_flight_by_model[model] += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            exchange.torn = self._tearing
            if self._fails(endpoint.path, model, exchange):
                pass
            elif self._garbage:
                exchange.send_garbage(self._garbage)
            else:
                await endpoint.answer(self, exchange, body)
        finally:
            self.in_flight -= 1
            self.in_flight_by_model[model] -= 1

    def _fails(self, path, model, exchange):
        """Answer as fail() says, if it does of this request; return whether it does. Raises Refused."""
        failing = self._failing
        if not failing or not failing.hits(path, model):
            return False
        if failing.status != 200 and failing.body is None:
            raise Refused(failing.status, failing.text, failing.kind)
        if failing.status != 200:
            exchange.send(failing.status, failing.body, failing.media_type, **failing.fields)
        elif failing.body is not None:
            exchange.stream((failing.body,) if failing.body else (), "application/x-ndjson", last=True)
        else:
            exchange.stream((compact({"error": failing.text}) + b"\n",), "application/x-ndjson", last=True)
        return True


# ------------------------------------------------------------------------------------------------------------
# Simulated nodes for people
# ------------------------------------------------------------------------------------------------------------

DEMO = (
    ("rtx4090", ("llama3.2", "llama3.1:8b", "qwen3:14b", "nomic-embed-text")),
    ("rtx3060", ("llama3.2", "llama3.1:8b", "mistral", "nomic-embed-text")),
    ("m2", ("llama3.2", "llama3.2:1b", "gemma3:4b", "mistral")),
)


DEMO_HINTS = """\
Three simulated nodes are running, and their answers say that they are. Try, in another terminal:

  curl -N {url}/api/chat -d '{{"model":"llama3.2","messages":[{{"role":"user","content":"hi"}}]}}'
  curl {url}/api/tags

and open {url}/dashboard

Ctrl-C ends it. With nodes of your own, written into hosts.txt:

  python3 sollol.py --hosts hosts.txt --check
  python3 sollol.py --hosts hosts.txt
"""

BENCH_CONTEXT = 65_536              # tokens: the longest chat of a benchmark fits; windows by memory would refuse it


def demo_nodes(count=3, first_port=0, speed=1.0, for_people=False):
    """Return unequal nodes with overlapping models, not started; port 0 means any.

    `for_people`: their answers say that they are simulated, and the first two models of each are in memory and stay
    there, so that the first request needs no load.
    """
    more = {"keep_alive_s": math.inf, "for_people": True} if for_people else {}
    nodes = []
    for index, (hardware, models) in enumerate(itertools.islice(itertools.cycle(DEMO), count)):
        name = hardware if count <= len(DEMO) else f"{hardware}-{index + 1}"
        port = first_port + index if first_port else 0
        nodes.append(SimNode(hardware, models, name=name, port=port, seed=index, speed=speed, drawn=True,
                             context=BENCH_CONTEXT, loaded=models[:2] if for_people else (), **more))
    return nodes


class PortTaken(Exception):
    """Another program listens there."""


async def start_or_explain(node):
    try:
        await node.start()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise PortTaken(f"port {node.port} is already in use" if taken else str(error)) from None


async def serve_nodes(nodes):
    """Serve until SIGINT or SIGTERM. Raises PortTaken."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        for node in nodes:
            await start_or_explain(node)
            print(f"{node.url}  {node.name}, {node.engine.slots} slots, {node.engine.vram_gb:g} GB: "
                  f"{', '.join(node.models)}", flush=True)
        await stopped.wait()
    finally:
        for node in nodes:
            await node.stop()


async def run_demo(options: argparse.Namespace, keys: list[sollol.KeySettings], tls: ssl.SSLContext | None) -> None:
    """Serve a gateway in front of three simulated nodes in this process: what `sollol.py --demo` calls."""
    nodes = demo_nodes(for_people=True)
    for node in nodes:
        await node.start()
    lines = "\n".join(f"{node.url} name={node.name}" for node in nodes)
    try:
        await sollol.run_gateway(options, sollol.parse_hosts(lines, "demo"), keys, tls, DEMO_HINTS)
    finally:
        for node in nodes:
            await node.stop()


# ============================================================================================================
# The benchmark: `compare`, `matrix`, `agents`, `ablate`, `misled`, `check`
#
# The same requests through each policy of the gateway, in virtual time; tables, JSON and a page of HTML.
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Workloads: what do real services ask for, and when?
#
# Token pairs (prompt, output) are a systematic sample of the Azure LLM inference traces 2023, conversation and
# code: github.com/Azure/AzurePublicDataset, CC BY 4.0; Patel et al., "Splitwise", ISCA 2024. Rows were ordered
# by output and prompt and every n-th was kept, so means and pairing are those of the whole (211 and 28 output
# tokens). `--trace FILE` reads a whole one. Prompts are distinct: no cache can win.
# ------------------------------------------------------------------------------------------------------------

CONVERSATION = """
120:12 120:12 237:14 245:14 91:16 309:18 317:18 331:18 4075:26 2383:28 4086:29 4083:31 4091:33 4076:35
4084:36 4077:37 4082:38 4082:39 4078:40 4081:41 2301:42 696:43 4085:43 4075:44 1201:45 4097:45 4078:46
1722:47 4145:47 2878:48 367:49 4075:49 1082:50 2444:50 380:51 4091:51 1358:52 211:53 2432:53 375:54 4086:54
2635:55 992:56 4075:56 387:57 371:58 4074:58 377:59 4623:59 892:60 375:61 4102:61 1872:62 383:63 4091:63
435:64 247:65 4098:65 439:66 4140:66 1786:67 372:68 1667:68 373:69 1912:69 374:70 2611:70 403:71 5277:71
765:72 4131:72 402:73 215:74 1156:74 317:75 1132:75 192:76 396:76 238:77 653:77 197:78 401:78 3783:78 395:79
2266:79 386:80 1048:80 373:81 408:81 2166:81 393:82 451:82 3243:82 393:83 439:83 181:84 394:84 438:84
4088:84 395:85 458:85 4089:85 393:86 409:86 1434:86 385:87 403:87 898:87 361:88 396:88 419:88 1662:88 390:89
401:89 426:89 2744:89 393:90 406:90 849:90 4098:90 394:91 406:91 910:91 373:92 397:92 411:92 1722:92 382:93
398:93 414:93 2108:93 391:94 405:94 687:94 181:95 395:95 409:95 697:95 222:96 401:96 429:96 220:97 399:97
428:97 172:98 404:98 435:98 374:99 400:99 422:99 2895:99 395:100 412:100 3185:100 395:101 415:101 2408:101
400:102 664:102 395:103 420:103 181:104 405:104 1240:104 398:105 1924:105 400:106 4463:106 403:107 1730:107
399:108 991:108 395:109 1593:109 391:110 844:110 391:111 1969:111 396:112 5588:112 420:113 398:114 3367:114
905:115 393:116 2754:116 806:117 400:118 399:119 404:120 396:121 187:122 1476:122 1331:123 886:124 403:125
394:126 398:127 391:128 407:129 396:130 22:131 40:132 2125:132 2593:133 2735:134 2402:135 2108:136 1785:137
413:138 1181:139 416:140 1316:141 1360:142 188:144 181:145 403:146 416:147 1394:148 404:150 2452:151 411:152
1503:153 409:155 163:157 442:158 1732:159 200:161 191:162 206:162 212:162 206:163 396:164 4145:165 203:167
218:168 4074:169 3751:171 194:174 181:176 126:178 206:179 181:180 209:181 200:183 212:183 1313:186 203:189
159:192 194:194 181:198 1315:200 1315:203 181:205 181:210 215:212 169:217 197:217 200:217 203:217 209:217
212:217 203:223 4079:232 72:245 181:267 4088:336 1028:366 959:373 1070:373 980:374 1007:375 1075:375
1168:375 1085:377 1059:378 1028:379 1123:380 1110:382 1113:383 1128:384 1068:385 1336:385 1125:386 1174:387
1035:388 1104:388 1035:389 1084:390 1043:391 987:392 949:393 1044:393 1099:393 975:394 1021:394 1067:394
1134:394 970:395 1034:395 1083:395 1223:395 1001:396 1028:396 1049:396 1073:396 1095:396 1116:396 1142:396
1192:396 918:397 1031:397 1062:397 1112:397 992:398 1055:398 1130:398 1009:399 1098:399 1026:400 1160:400
1039:401 1116:401 1268:401 1091:402 1005:403 1113:403 1104:404 1029:405 1161:405 1094:406 1044:407 1378:407
1124:408 1082:409 1041:410 977:411 1024:411 1055:411 1090:411 1147:411 1124:412 1053:413 972:414 1019:414
1047:414 1099:414 1190:414 1055:415 1123:415 1093:416 1065:417 1019:418 1144:418 1062:419 1009:420 1139:420
1091:421 1064:422 1243:423 1009:425 1069:426 985:427 1102:427 1063:428 962:429 1027:429 1063:429 1104:429
1193:429 1035:431 1032:433 1108:434 1034:437 1091:439 1084:441 966:443 1063:445 1120:447 1099:450 1101:453
1111:458 1109:462 1095:467 1065:474 1005:483 1015:498 1170:502 1038:514 1031:520 1044:527 983:536 1075:550
1020:565 1079:577 1182:595 964:609 1014:626 1090:662 1170:939
"""

CODE = """
55:6 180:6 359:6 726:6 1007:6 1310:6 1679:6 2001:6 2433:6 2951:6 3862:6 6077:6 22:7 178:7 446:7 836:7 1114:7
1429:7 1943:7 2366:7 2867:7 3760:7 6498:7 63:8 308:8 773:8 1077:8 1500:8 2039:8 2437:8 3690:8 7436:8 100:9
240:9 463:9 772:9 1011:9 1247:9 1503:9 1738:9 2128:9 2623:9 3043:9 3765:9 5847:9 7437:9 200:10 594:10
1020:10 1323:10 1702:10 2165:10 2764:10 4280:10 7436:10 175:11 603:11 1040:11 1475:11 2177:11 2891:11
5226:11 41:12 204:12 700:12 1205:12 1847:12 2412:12 3208:12 5708:12 50:13 195:13 697:13 1096:13 1708:13
2302:13 3089:13 6587:13 77:14 374:14 1016:14 1908:14 2846:14 6040:14 99:15 395:15 1118:15 2022:15 3324:15
62:16 518:16 1084:16 2044:16 6108:16 251:17 1370:17 3724:17 138:18 875:18 1861:18 3:19 586:19 1502:19
4181:19 158:20 1940:20 61:21 1649:21 7422:21 1021:22 3385:22 1008:23 201:24 2969:24 1050:25 46:26 3231:26
2215:27 1047:28 261:29 449:30 261:31 4746:31 1083:33 1911:34 321:36 2772:37 4749:39 997:41 1143:43 1225:45
7434:46 1637:49 746:52 1687:54 295:57 21:60 2480:63 1002:67 1663:72 2705:76 3435:82 1915:90 1969:100
2776:111 1333:128 581:153 2595:193 715:252 2276:470
"""


def read_pairs(text):
    """Return [(prompt tokens, output tokens)] of a table above."""
    return [tuple(map(int, pair.split(":"))) for pair in text.split()]


CONVERSATION_PAIRS = read_pairs(CONVERSATION)
LENGTHS = {
    "conversation": CONVERSATION_PAIRS,
    "code": read_pairs(CODE),
    "simple": [pair for pair in CONVERSATION_PAIRS if pair[1] <= 100],
    "medium": [pair for pair in CONVERSATION_PAIRS if 100 < pair[1] <= 300],
    "complex": [pair for pair in CONVERSATION_PAIRS if pair[1] > 300],
}
MIX = (("simple", 0.3), ("medium", 0.5), ("complex", 0.2))      # the 30/50/20 of the guide's benchmark
MOST_WORK = 50_000      # requests of closed-loop clients: far more than minutes of a cluster
BURST_S, PAUSE_S, BURST_RATE = 15.0, 45.0, 4.0      # bursts: 15 s at four times the mean rate, then silence


class Work(NamedTuple):
    """One request to be made."""

    number: int
    at_s: float                     # intended send time; closed-loop clients send when they are free
    model: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 5
    modest: bool = False            # of the second client


class Scenario(NamedTuple):
    """A cluster, what is asked of it, and what goes wrong."""

    name: str
    cluster: str
    lengths: str = "conversation"   # a key of LENGTHS, or "mixed"
    clients: int = 0                # closed loop with so many clients; 0: open loop
    load: float = 0.0               # open loop: share of the throughput with every slot busy
    arrivals: str = "poisson"       # or "burst", or "at once"
    models: tuple = ("llama3.1:8b",)
    urgent: float = 0.0             # share of requests with priority `high`
    modest: float = 0.0             # share of requests of a second client, with an address of its own
    latency_s: float = 0.0005       # one way: LAN 0.5 ms, WAN 40 ms, far 150 ms
    vram_gb: float = 0.0            # of every node, in place of its own
    fault: str = ""                 # kill, hang, slow or 503, of the cluster's second node
    chat: bool = False              # sessions of six turns with 15 s to think
    requests: int = 500
    duration_s: float = 60.0        # closed loop: how long new requests are made
    timeout_s: float = 120.0        # when clients give up, which counts as a failure of that latency
    about: str = ""                 # of a real cluster, in place of the description

    def __str__(self):
        if self.about:
            return self.about
        how = (f"closed loop, {self.clients} clients, {self.duration_s:g} s" if self.clients else
               "all at once" if self.arrivals == "at once" else f"{self.arrivals} arrivals at {self.load:.0%} load")
        extra = "".join([f", {self.urgent:.0%} urgent" if self.urgent else "",
                         f", {self.modest:.0%} of a second client" if self.modest else "",
                         ", six-turn chats" if self.chat else "",
                         f", one node: {self.fault}" if self.fault else ""])
        return (f"{self.name}: {self.cluster} ({' '.join(CLUSTERS[self.cluster])}), {' '.join(self.models)}, "
                f"{self.lengths} lengths, {how}{extra}")


CLUSTERS = {
    "hom3": ("rtx3060",) * 3, "hom5": ("rtx3060",) * 5, "hom10": ("rtx3060",) * 10,
    "mild3": ("rtx4090", "rtx3060", "m2"), "mild5": ("rtx4090", "rtx3090", "rtx3060", "rtx3060", "m2"),
    "het3": ("rtx4090", "rtx3060", "cpu"), "het5": ("rtx4090", "rtx3060", "rtx3060", "m2", "cpu"),
    "het10": ("rtx4090",) * 2 + ("rtx3060",) * 3 + ("m2",) * 3 + ("cpu",) * 2,
}
FIVE_MODELS = ("llama3.1:8b", "mistral:latest", "qwen2.5:7b", "gemma3:4b", "llama3.2:latest")


def pick_lengths(rng, lengths):
    """Return one (prompt, output) pair."""
    if lengths == "mixed":
        lengths = rng.choices([name for name, _ in MIX], [share for _, share in MIX])[0]
    return rng.choice(LENGTHS[lengths])


def prompt_s(hardware, model, tokens):
    """Return how long a prompt takes on hardware whose model is loaded."""
    return tokens / (HARDWARE[hardware].prefill_tok_s * model_named(model).speed)


def output_s(hardware, model, tokens):
    """Return how long an answer takes a lone request."""
    return tokens / (HARDWARE[hardware].decode_tok_s * model_named(model).speed)


def solo_s(hardware, model, prompt_tokens, output_tokens):
    """Return how long a lone request takes on idle hardware whose model is loaded."""
    return OVERHEAD_S + prompt_s(hardware, model, prompt_tokens) + output_s(hardware, model, output_tokens)


def mean_s(scenario, hardware):
    """Return the mean times of prompt and output over what a scenario asks for."""
    rng = random.Random(0)
    drawn = [(rng.choice(scenario.models), *pick_lengths(rng, scenario.lengths)) for _ in range(2000)]
    return (sum(prompt_s(hardware, model, prompt) for model, prompt, _ in drawn) / len(drawn),
            sum(output_s(hardware, model, output) for model, _, output in drawn) / len(drawn))


def rate_of(slots, mean_prompt_s, mean_output_s, machine=USUAL_MACHINE):
    """Return requests per second with so many slots busy: prompts are evaluated one after the other."""
    device_s = mean_prompt_s + mean_output_s / batch_gain(slots, machine.exponent)
    return slots / (machine.overhead_s + slots * device_s)


def capacity(scenario):
    """Return requests per second with every slot of the cluster busy, at nominal speed."""
    return sum(rate_of(HARDWARE[hardware].slots, *mean_s(scenario, hardware))
               for hardware in CLUSTERS[scenario.cluster])


def arrival_times(scenario, rng):
    """Yield intended send times."""
    rate = capacity(scenario) * scenario.load if scenario.load else math.inf
    at_s = 0.0
    while True:
        if scenario.arrivals == "at once":
            yield 0.0
            continue
        in_burst = scenario.arrivals == "burst"
        at_s += rng.expovariate(rate * BURST_RATE if in_burst else rate)
        if in_burst and at_s % (BURST_S + PAUSE_S) > BURST_S:
            at_s += BURST_S + PAUSE_S - at_s % (BURST_S + PAUSE_S)
        yield at_s


def make_work(scenario, seed):
    """Return the requests of a scenario: the same for every policy, from one seed."""
    rng = random.Random(f"{scenario.name} {seed}")
    times = arrival_times(scenario._replace(load=scenario.load or 0.5), rng)
    count = MOST_WORK if scenario.clients else scenario.requests
    return [Work(number, 0.0 if scenario.clients else next(times), rng.choice(scenario.models),
                 *pick_lengths(rng, scenario.lengths), 8 if rng.random() < scenario.urgent else 5,
                 scenario.modest > 0 and rng.random() < scenario.modest)
            for number in range(count)]


# ------------------------------------------------------------------------------------------------------------
# Clients: what do they see?
# ------------------------------------------------------------------------------------------------------------

class Sample(NamedTuple):
    """One request as its client saw it. Latency counts from the intended send time."""

    scheduled_s: float
    sent_s: float
    first_s: float | None
    end_s: float
    node: str
    status: int                     # 0 = no answer
    ok: bool
    priority: int
    output_tokens: int
    modest: bool = False

    @property
    def latency_s(self):
        return self.end_s - self.scheduled_s


class Response:
    """A response as far as its client has read it."""

    def __init__(self, head=b""):
        self.head = head            # raw; empty before it has come
        self.pieces = []            # chunks, or the whole body
        self.first_s = math.nan     # loop time of the head
        self.whole = False          # it has ended where its framing says
        self.node = ""              # which node it is from, where that is known

    @property
    def status(self):
        return int(self.head[9:12]) if self.head else 0

    @property
    def fields(self):
        """Return {lower-case name: value}."""
        lines = self.head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    @property
    def body(self):
        return b"".join(self.pieces)

    def json(self):
        return json.loads(self.body)


class HttpClient:
    """One connection of a client, with a reading of HTTP/1.1 that is its own and simpler than the gateway's."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, host, port, **settings):
        return cls(*await asyncio.open_connection(host, port, **settings))

    async def head(self):
        return await self.reader.readuntil(b"\r\n\r\n")

    async def chunk(self):
        """Return the next chunk of a chunked body, b"" at its end."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def chunks(self):
        """Yield the chunks of a chunked body as they come."""
        while piece := await self.chunk():
            yield piece

    async def read(self, response, method="POST", most=math.inf):
        """Read into a Response: all of it, or `most` chunks. Raises OSError, ValueError, IncompleteReadError."""
        response.head = await self.head()
        response.first_s = asyncio.get_running_loop().time()
        fields = response.fields
        if method == "HEAD" or response.status in (204, 304):
            pass
        elif "content-length" in fields:
            response.pieces.append(await self.reader.readexactly(int(fields["content-length"])))
        elif fields.get("transfer-encoding") == "chunked":
            while piece := await self.chunk():
                response.pieces.append(piece)
                if len(response.pieces) >= most:
                    return
        else:
            response.pieces.append(await self.reader.read())
            return                  # whether it is whole nobody can tell
        response.whole = True

    async def answer(self, method="POST"):
        """Return the next Response."""
        response = Response()
        await self.read(response, method)
        return response

    async def ask(self, method, path, value=None, **fields):
        """Make a request, with JSON or bytes for its body; return its Response."""
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        fields = {"Host": "localhost", **fields}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {text}" for name, text in fields.items())]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return await self.answer(method)

    def close(self):
        self.writer.close()


class Caller:
    """Make requests to one address over connections that are kept."""

    def __init__(self, host, port, source=None, id_of=None):
        self.host, self.port = host, port
        self.source = source and (source, 0)        # the address to call from
        self.id_of = id_of                          # body -> id that tells a policy what it has to know; None: nothing
        self.idle = []                              # HttpClients
        self.others = {}                            # Callers from other addresses, made when needed

    def at(self, source):
        """Return the Caller for another address of this machine."""
        if source not in self.others:
            self.others[source] = Caller(self.host, self.port, source, self.id_of)
        return self.others[source]

    async def call(self, body, priority=None, path="/api/chat"):
        """Make one request; return its Response. Raises OSError, ValueError, IncompleteReadError."""
        client, response = await self.connection(), Response()
        try:
            field = b"" if priority is None else b"X-Priority: %d\r\n" % priority
            if self.id_of:
                field += b"X-Request-Id: %b\r\n" % self.id_of(body).encode()
            client.writer.write(b"POST %b HTTP/1.1\r\nHost: %b:%d\r\n%bContent-Length: %d\r\n\r\n%b" % (
                path.encode(), self.host.encode(), self.port, field, len(body), body))
            await client.read(response)
            response.node = response.fields.get("x-sollol-node", "")
            return response
        finally:
            self.keep(client, response)

    async def connection(self):
        """Return a connection that the other side has not closed meanwhile."""
        while self.idle:
            client = self.idle.pop()
            if not client.reader.at_eof():
                return client
            client.writer.transport.abort()
        return await HttpClient.to(self.host, self.port, local_addr=self.source)

    def keep(self, client, response, resets=False):
        """Keep a connection for the next request if this one's response is whole, else end it, with RST if `resets`."""
        if response.whole and response.fields.get("connection") != "close":
            self.idle.append(client)
            return
        if resets:
            reset_on_close(client.writer.transport)
        client.writer.transport.abort()

    def close(self):
        for client in self.idle:
            client.writer.transport.abort()
        for other in self.others.values():
            other.close()


MODEST_ADDRESS = "127.0.0.2"


def chat_body(work, history=(), bounded=False):
    """Return the body of a chat request: as many tokens as the work says, none of them in another request.

    A simulated node reads the length of its answer from the prompt, so that no gateway knows it. A real one must be
    told (`bounded`).
    """
    words = f"<out={work.output_tokens}> request {work.number} of many: "
    prompt = worded(words, work.prompt_tokens)
    messages = [*history, {"role": "user", "content": prompt}]
    value = {"model": work.model, "messages": messages, "stream": True}
    if bounded:
        value["options"] = {"num_predict": work.output_tokens}
    return json.dumps(value).encode()


DONE = re.compile(rb'"done": ?true')        # Ollama writes no space, other servers of its API do


async def make_request(caller, work, scheduled_s, timeout_s, body=None):
    """Make one request and return its Sample, whatever comes of it."""
    loop, response = asyncio.get_running_loop(), Response()
    sent_s = loop.time()
    caller = caller.at(MODEST_ADDRESS) if work.modest else caller
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):      # TimeoutError is an OSError
        async with asyncio.timeout_at(scheduled_s + timeout_s):
            response = await caller.call(body or chat_body(work), work.priority)
    ok = response.status == 200 and DONE.search(response.body[-2000:]) is not None
    # A failure counts as the time-out: refusing fast must not look like answering fast.
    end_s = loop.time() if ok else scheduled_s + timeout_s
    return Sample(scheduled_s, sent_s, response.first_s if ok else None, end_s, response.node, response.status, ok,
                  work.priority, work.output_tokens if ok else 0, work.modest)


async def open_loop(caller, works, timeout_s):
    """Send every request at its time, whatever has become of those before it; return the Samples."""
    loop = asyncio.get_running_loop()
    start_s, tasks = loop.time(), []
    for work in works:
        await asyncio.sleep(start_s + work.at_s - loop.time())
        tasks.append(asyncio.create_task(make_request(caller, work, start_s + work.at_s, timeout_s)))
    return await asyncio.gather(*tasks)


async def closed_loop(caller, works, clients, duration_s, timeout_s, bounded=False):
    """Let each of `clients` send one request after the other for `duration_s`; return the Samples."""
    loop = asyncio.get_running_loop()
    start_s, samples, remaining = loop.time(), [], iter(works)

    async def client():
        while loop.time() - start_s < duration_s:
            work = next(remaining, None)
            if work is None:
                return
            body = chat_body(work, bounded=bounded)
            samples.append(await make_request(caller, work, loop.time(), timeout_s, body))
            if not samples[-1].ok:
                await asyncio.sleep(0.1)

    await asyncio.gather(*(client() for _ in range(clients)))
    return samples


async def chat_sessions(caller, works, timeout_s, think_s=15.0, turns=6):
    """Let sessions of six turns begin at the works' times, each turn sending all before it along."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()

    async def session(number, first):
        samples, history = [], []
        await asyncio.sleep(start_s + first.at_s * turns - loop.time())
        for turn, work in enumerate(works[number * turns:(number + 1) * turns]):
            if turn:
                await asyncio.sleep(think_s)
            body = chat_body(work, history)
            samples.append(await make_request(caller, work, loop.time(), timeout_s, body))
            sent = json.loads(body)["messages"]
            history = [*sent, {"role": "assistant", "content": worded("", work.output_tokens)}]
        return samples

    sessions = [session(number, works[number]) for number in range(len(works) // turns)]
    return [sample for samples in await asyncio.gather(*sessions) for sample in samples]


async def get_json(host, port, path):
    """Return the JSON at a path of a node or gateway. Raises OSError, or ValueError for what is none."""
    client = await HttpClient.to(host, port)
    try:
        return (await client.ask("GET", path, Host=f"{host}:{port}")).json()
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise ValueError("no HTTP") from error
    finally:
        client.close()


# ------------------------------------------------------------------------------------------------------------
# Processes: nodes and gateways on the wall clock, each with the memory and the CPU time that are its own
# ------------------------------------------------------------------------------------------------------------

class BadArgument(Exception):
    """A mistake in what was asked, in one line."""


def say(text):
    """Show progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


class Contender(NamedTuple):
    """A process that serves: a proxy under test, the gateway, or the node itself."""

    name: str
    port: int
    process: subprocess.Popen

    def cpu_s(self):
        """Return the CPU seconds that the process has used, user and system."""
        text = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self):
        """Return the memory that the process holds now."""
        return self._status_mib("VmRSS")

    def forget_peak(self):
        """Let the greatest memory held be counted anew."""
        pathlib.Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def peak_mib(self):
        """Return the most memory that the process has held since."""
        return self._status_mib("VmHWM")

    def _status_mib(self, name):
        text = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", text)[1]) / 1024


def free_port():
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def begin_process(stack, argv, stderr=subprocess.DEVNULL, **more):
    """Start a process that ends with `stack`."""
    process = subprocess.Popen(argv, stderr=stderr, cwd=pathlib.Path(__file__).parent, **more)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


LOW_PORTS = range(15_000, 32_000)       # below those that Linux gives to outgoing connections


def unused_low_port(rng):
    """Return a port that no outgoing connection can take while its node is dead.

    One number is drawn from `rng`, whatever is in use: nothing that is drawn later may change. The process counts, too,
    so that two that run the same seed do not take the port of each other's dead nodes.
    """
    drawn = rng.randrange(len(LOW_PORTS)) + 7919 * os.getpid()
    for number in itertools.count(drawn):
        port = LOW_PORTS[number % len(LOW_PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


class NodeProcess:
    """A simulated node as a process, which can be killed and come back on its port."""

    def __init__(self, stack, rng):
        self.port = unused_low_port(rng)
        self.argv = [sys.executable, "bench.py", "serve", "1", "--port", str(self.port)]
        self.process = None
        stack.callback(self.kill)

    async def start(self):
        """Start it, and wait until it listens. Returns self."""
        self.process = subprocess.Popen(self.argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        cwd=pathlib.Path(__file__).parent)
        if not await asyncio.to_thread(self.process.stdout.readline):
            raise BadArgument(f"no node on port {self.port}")
        return self

    def kill(self):
        """End it with SIGKILL."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


class GatewayProcess(Contender):
    """The gateway as a process, its hosts.txt and its log in a folder."""

    @classmethod
    def of(cls, stack, hosts, *flags):
        """Start it with a hosts.txt: a path, or the lines of one."""
        folder, port = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())), free_port()
        if isinstance(hosts, list):
            hosts, lines = folder / "hosts.txt", hosts
            hosts.write_text("\n".join(lines), encoding="utf-8")
        log = stack.enter_context((folder / "log").open("ab"))
        argv = [sys.executable, cls.program(folder), "--hosts", str(hosts), "--port", str(port), *flags]
        gateway = cls("SOLLOL", port, begin_process(stack, argv, log))
        gateway.folder = folder
        return gateway

    @staticmethod
    def program(_folder):
        """Return the path of what is run."""
        return "sollol.py"

    def reload(self):
        """Have it read its hosts.txt again."""
        self.process.send_signal(signal.SIGHUP)

    def descriptors(self):
        """Return how many files and sockets the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def log(self):
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    async def answers(self, path):
        """Return the JSON at a path of the gateway's own."""
        return await get_json("127.0.0.1", self.port, path)

    async def ready(self, nodes, patience_s=15.0):
        """Wait until so many nodes are up. Raises BadArgument."""
        deadline_s = time.monotonic() + patience_s
        while time.monotonic() < deadline_s:
            with contextlib.suppress(OSError, ValueError):
                if (await self.answers("/api/health"))["nodes"]["up"] == nodes:
                    return self
            await asyncio.sleep(0.05)
        raise BadArgument("the gateway or a node did not start")

    async def end(self):
        """Stop it with SIGTERM; return complaints: an exit status other than 0, and errors in its log."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, 30)
        complaints = [] if self.process.returncode == 0 else [f"the gateway ended with {self.process.returncode}"]
        return complaints + [line for line in self.log().splitlines() if "event=error" in line or "Traceback" in line]


# ------------------------------------------------------------------------------------------------------------
# Rivals that are told: what can a plain proxy do whose administrator knows all nodes by heart?
#
# They take the place of the gateway's policy, behind the same parser and relay. They skip nodes that are down and retry
# what was refused, as its own plain policies do. What they know is the truth of the simulation, from the first request
# on. A real administrator would have to measure it, and again after each change of models, workload or nodes.
# ------------------------------------------------------------------------------------------------------------

class Truth(NamedTuple):
    """What a plain proxy can be told of a node by hand."""

    hardware: str
    slots: int
    full_per_s: float               # requests/s of the scenario with all slots busy


def truth_of(node, scenario):
    """Return the Truth of a simulated node."""
    times_s, engine = mean_s(scenario, node.engine.hardware.name), node.engine
    return Truth(engine.hardware.name, engine.slots, rate_of(engine.slots, *times_s, engine.machine))


class WeightedLeast(sollol.EarlyBinding):
    """Weighted least-connections, as HAProxy's leastconn: the fewest requests for the weight, the new one included."""

    reason = "weighted_least"
    told = "each node's weight: how many of these requests it ends per second with all its slots busy"

    def __init__(self, rng, truths):
        super().__init__(rng)
        self.truths = truths        # {name of a node: Truth}

    def running(self, node):
        return sum(len(runner.leases) for runner in node.busy)

    def choose(self, nodes):
        return min(nodes, key=lambda node: (self.running(node) + 1) / self.truths[node.name].full_per_s)


class CentralQueue(WeightedLeast):
    """One queue, first come first served, before nodes that get as many requests as they have slots.

    The first one gets the node with a free slot that is the fastest for one request more. So does HAProxy's leastconn
    with weights and maxconn.
    """

    reason = "central_queue"
    told = "each node's weight and slots"
    rounds = (False,)               # of placing tickets: only where their model is loaded?

    def has_slot(self, node):
        return self.running(node) < self.truths[node.name].slots

    def order(self, ticket, cluster):
        """Return what the queue is ordered by, the least first."""
        return ticket.seq

    def suits(self, node, ticket, only_loaded):
        """Tell whether a node with a free slot is one for a ticket."""
        return not only_loaded or sollol.is_loaded_for(node.runners[ticket.spec.model], ticket.spec)

    def assign(self, waiting, cluster, now):
        work, entries = sollol.DispatchPass(waiting, cluster, now), []
        if any(self.has_slot(node) for node in cluster.nodes.values()):
            for model in list(waiting.heaps):
                while waiting.first(model):
                    entries.append(waiting.pop(model))
        entries.sort(key=lambda entry: self.order(entry[2], cluster))
        for only_loaded in self.rounds:
            entries = [entry for entry in entries if not self.place(work, entry, only_loaded)]
        for entry in entries:
            waiting.restore(entry)
        return work.leases, work.refused

    def place(self, work, entry, only_loaded):
        """Give the ticket of a popped entry a free node; tell whether the entry need not be restored."""
        ticket, model = entry[2], entry[2].spec.model
        nodes = sollol.untried(work.cluster.nodes_for(model), ticket)
        if not nodes or not work.cluster.holders.get(model):
            work.waiting.restore(entry)
            self.assign_model(work, model)      # refuses it, or lets it wait, as under every plain policy
            return True
        allowed = [node for node in nodes if node.breaker.allows(work.now)] or nodes
        free = [node for node in allowed if self.has_slot(node) and self.suits(node, ticket, only_loaded)]
        if free:
            node = self.choose(free)
            work.waiting.take(ticket)
            work.cluster.estimates.demand_of(ticket)
            work.leases.append(sollol.give_lease(ticket, node, node.runners[model], work.now, self.reason))
        return bool(free)


class ResidentFirst(CentralQueue):
    """A central queue that gives a free slot to the first whose model is loaded there; without one, to the first."""

    reason = "resident_first"
    told = "each node's weight and slots, and by /api/ps which models are loaded there"
    rounds = (True, False)


class ShortestFirst(ResidentFirst):
    """The same, but whoever would take least on the fastest node, without a cache, is first."""

    reason = "shortest_first"
    told = ("each node's weight and slots, which models are loaded there, and the length of every answer before it "
            "begins, which nobody can know: a bound, no rival")

    def order(self, ticket, cluster):
        fastest = max(self.truths.values(), key=lambda truth: truth.full_per_s)
        prompt_tokens, output_tokens = cluster.estimates.demand_of(ticket).prompt_tokens, int(ticket.id)
        return solo_s(fastest.hardware, ticket.spec.model, prompt_tokens, output_tokens), ticket.seq


class Sticky(CentralQueue):
    """A central queue in which a conversation waits for the node that it began on, as with HAProxy's stick-table."""

    reason = "sticky"
    told = "each node's weight and slots, and which agent each request is from"

    def __init__(self, rng, truths):
        super().__init__(rng, truths)
        self.homes = {}             # {id of a conversation: Node}

    def suits(self, node, ticket, only_loaded):
        home = self.homes.get(ticket.id, node)
        return node is home or not home.up or not ticket.may_use(home)

    def place(self, work, entry, only_loaded):
        placed, ticket = super().place(work, entry, only_loaded), entry[2]
        if ticket.lease:
            self.homes[ticket.id] = ticket.lease.node
        return placed


TOLD = {"weighted-least": WeightedLeast, "central-queue": CentralQueue, "resident-first": ResidentFirst,
        "shortest-first": ShortestFirst, "sticky": Sticky}


def told_rivals(models, agents=False):
    """Return the names of those worth running. One model is loaded everywhere: no node is preferred for it."""
    needless = {"resident-first": len(models) == 1, "sticky": not agents}
    return [name for name in TOLD if not needless.get(name)]


def id_for(policy, conversation=None):
    """Return what a Caller's ids tell a policy that has to know more than a proxy: body -> id; None for the others."""
    if policy == "shortest-first":
        return lambda body: OUTPUT_MARK.findall(body.decode())[-1]
    return (lambda body: conversation) if policy == "sticky" and conversation else None


def told_texts(names):
    """Return a sentence for each rival that was told: what."""
    return [f"{name} was told {TOLD[name].told}." for name in names if name in TOLD]


# ------------------------------------------------------------------------------------------------------------
# Comparison: the same requests through each policy
#
# Round-robin, least-inflight and SOLLOL are entries of the gateway's own table. The first two skip nodes that are down
# and retry what was refused, as a good plain proxy does, and send every request on at once.
# ------------------------------------------------------------------------------------------------------------

RIVALS, SOLLOL = ("round-robin", "least-inflight"), "latency-weighted"
NODE_NOISE = 0.08                   # of a request's time: sigma of its logarithm


class Run(NamedTuple):
    """What one policy made of a scenario."""

    policy: str
    samples: list
    elapsed_s: float
    ratios: sollol.Histogram | None = None     # actual over predicted times, where the gateway runs in this process


def cluster_nodes(scenario, seed):
    """Return a scenario's simulated nodes, not started. One model: it is loaded everywhere; more: none is."""
    loaded = scenario.models if len(scenario.models) == 1 else ()
    return [SimNode(hardware, scenario.models, name=f"{number + 1}-{hardware}", seed=seed * 100 + number, loaded=loaded,
                    noise=NODE_NOISE, latency_s=scenario.latency_s, vram_gb=scenario.vram_gb or None,
                    tokens_per_line=16, drawn=True, context=BENCH_CONTEXT)
            for number, hardware in enumerate(CLUSTERS[scenario.cluster])]


async def play_fault(scenario, node, span_s):
    """Let a node fail from a quarter to the half of the run."""
    await asyncio.sleep(span_s / 4)
    faults = {"kill": node.kill, "hang": node.hang, "slow": lambda: node.slow(10), "503": lambda: node.fail(503)}
    faults[scenario.fault]()
    await asyncio.sleep(span_s / 4)
    if scenario.fault == "kill":
        await node.restart()
    node.recover()


async def play(caller, scenario, works):
    """Make a scenario's requests; return the Samples."""
    if scenario.clients:
        return await closed_loop(caller, works, scenario.clients, scenario.duration_s, scenario.timeout_s)
    if scenario.chat:
        return await chat_sessions(caller, works, scenario.timeout_s)
    return await open_loop(caller, works, scenario.timeout_s)


@contextlib.asynccontextmanager
async def gateway_before(scenario, nodes, policy, seed):
    """Run a gateway in this process in front of nodes; it has finished what it measures at its start."""
    options = sollol.parse_options(["--node", "unused", "--port", "0", "--seed", str(seed), "--policy",
                                    RIVALS[1] if policy in TOLD else policy,
                                    "--max-queue", "100000", "--queue-timeout", "100000"], {})
    lines = "\n".join(f"{node.url} name={node.name}" for node in nodes)
    gateway = sollol.Gateway(options, sollol.parse_hosts(lines, "bench"))
    if policy in TOLD:
        truths = {node.name: truth_of(node, scenario) for node in nodes}
        gateway.dispatcher.policy = TOLD[policy](gateway.rng, truths)
    await gateway.start()
    level = sollol.LOG.level
    sollol.LOG.setLevel("CRITICAL")
    try:
        await asyncio.sleep(30.0)
        yield gateway
    finally:
        await gateway.stop()
        sollol.LOG.setLevel(level)


def moved(sample, by_s):
    """Return a Sample with its times moved."""
    first_s = None if sample.first_s is None else sample.first_s + by_s
    return sample._replace(scheduled_s=sample.scheduled_s + by_s, sent_s=sample.sent_s + by_s, first_s=first_s,
                           end_s=sample.end_s + by_s)


async def run_works(scenario, policy, seed, address, nodes):
    """Make a scenario's requests through a gateway, its fault included; return the Run."""
    caller, works = Caller(*address, id_of=id_for(policy)), make_work(scenario, seed)
    loop = asyncio.get_running_loop()
    start_s, span_s = loop.time(), scenario.duration_s if scenario.clients else works[-1].at_s
    fault = asyncio.create_task(play_fault(scenario, nodes[1], span_s)) if scenario.fault else None
    try:
        samples = await play(caller, scenario, works)
    finally:
        if fault:
            fault.cancel()
        caller.close()
    elapsed_s = max(sample.end_s for sample in samples) - start_s
    return Run(policy, [moved(sample, -start_s) for sample in samples], elapsed_s)


@contextlib.asynccontextmanager
async def running_nodes(scenario, seed):
    """Run a scenario's nodes."""
    nodes = cluster_nodes(scenario, seed)
    try:
        for node in nodes:
            await node.start()
        yield nodes
    finally:
        for node in nodes:
            await node.stop()


async def run_policy(scenario, policy, seed):
    """Run one scenario under one policy, on nodes and a gateway of its own in this process."""
    async with running_nodes(scenario, seed) as nodes, gateway_before(scenario, nodes, policy, seed) as gateway:
        run = await run_works(scenario, policy, seed, gateway.listener.address, nodes)
        return run._replace(ratios=gateway.dispatcher.ratios)


def simulate(scenario, seed, policies=(*RIVALS, SOLLOL)):
    """Return one Run a policy, in virtual time."""
    return [run_virtual(run_policy(scenario, policy, seed)) for policy in policies]


async def run_in_real_time(scenario, policy, seed):
    """Run one scenario under one policy on the wall clock, the gateway being a process of its own."""
    async with running_nodes(scenario, seed) as nodes:
        with contextlib.ExitStack() as stack:
            lines = [f"{node.url} name={node.name}" for node in nodes]
            gateway = await GatewayProcess.of(stack, lines, "--policy", policy, "--max-queue", "100000",
                                              "--queue-timeout", "100000").ready(len(nodes))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10):     # it measures idle nodes at its start
                    while gateway.log().count("event=calibrated") < len(nodes):
                        await asyncio.sleep(0.05)
            return await run_works(scenario, policy, seed, ("127.0.0.1", gateway.port), nodes)


# ------------------------------------------------------------------------------------------------------------
# Bounds: what could nobody beat?
# ------------------------------------------------------------------------------------------------------------

def at_most_per_s(node, count, prompt_time_s, output_time_s):
    """Return the most requests per second of a node with so many in it: each alone, or the device always busy.

    Its increments shrink as the count grows: it is the least of two concave functions.
    """
    engine = node.engine
    alone_s = engine.overhead_s() + prompt_time_s + output_time_s
    return min(count / alone_s, 1 / (prompt_time_s + output_time_s / batch_gain(count, engine.machine.exponent)))


def closed_loop_bound_s(scenario, nodes):
    """Return the least mean latency of a closed loop, by Little's law: clients x duration / requests that ended.

    The rate is highest when each client has one of the slots that add most to the rate of their nodes. At most rate x
    duration requests end within the duration, and one more for each client after it.
    """
    gains = []
    for node in nodes:
        times_s = mean_s(scenario, node.engine.hardware.name)
        rates = [at_most_per_s(node, count, *times_s) if count else 0.0 for count in range(node.engine.slots + 1)]
        gains += [more - less for less, more in itertools.pairwise(rates)]
    ended = sum(sorted(gains, reverse=True)[:scenario.clients]) * scenario.duration_s + scenario.clients
    return scenario.clients * scenario.duration_s / ended


def work_times_s(node, work):
    """Return how long prompt and output of a request take on a node."""
    name = node.engine.hardware.name
    return prompt_s(name, work.model, work.prompt_tokens), output_s(name, work.model, work.output_tokens)


def fastest_solo_s(nodes, work):
    """Return how long a request takes alone on the best of some nodes."""
    return min(node.engine.overhead_s() + sum(work_times_s(node, work)) for node in nodes)


def pooled_s(nodes, work):
    """Return how long the devices of all nodes together would need for a request, their slots full of others."""
    times_s = [(*work_times_s(node, work), node.engine.gain()) for node in nodes]
    return 1 / sum(1 / (first_s + rest_s / gain) for first_s, rest_s, gain in times_s)


def pooled_bound_s(nodes, works):
    """Return a lower bound of the mean latency of an open loop.

    All nodes pooled into one server that always works on the request with the least left (SRPT, optimal for the
    mean on one server); and no request is faster than alone on the fastest node. Loose under load: no request
    can really use the whole pool.
    """
    left, now_s, total_s = [], 0.0, 0.0
    for work in [*works, None]:
        until_s = work.at_s if work else math.inf
        while left and now_s + left[0][0] <= until_s:
            need, arrived_s = heapq.heappop(left)
            now_s += need
            total_s += now_s - arrived_s
        if work:
            if left:
                need, arrived_s = heapq.heappop(left)
                heapq.heappush(left, (need - (until_s - now_s), arrived_s))
            now_s = until_s
            heapq.heappush(left, (pooled_s(nodes, work), until_s))
    return max(total_s, sum(fastest_solo_s(nodes, work) for work in works)) / len(works)


def bound_s(scenario, seed):
    """Return a lower bound of a scenario's mean latency on its nodes, or None where none is known."""
    nodes = cluster_nodes(scenario, seed)
    if scenario.clients:
        return closed_loop_bound_s(scenario, nodes)
    return None if scenario.chat else pooled_bound_s(nodes, make_work(scenario, seed))


# ------------------------------------------------------------------------------------------------------------
# Report: the table of the guide, and what stands behind it
# ------------------------------------------------------------------------------------------------------------

def share_of(ordered, share):
    """Return the nearest-rank percentile of an ascending list; nan for an empty one."""
    value = sollol.percentile(ordered, share)
    return math.nan if value is None else value


class Figures(NamedTuple):
    """The figures of one run. Failed requests count with the time after which their client gave up."""

    success: float
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    ttft_s: float
    per_s: float


def figures(run, keep=lambda sample: True):
    """Return the Figures of a run, or of some of its samples."""
    samples = [sample for sample in run.samples if keep(sample)]
    latencies = sorted(sample.latency_s for sample in samples)
    firsts = [(sample.first_s if sample.ok else sample.end_s) - sample.scheduled_s for sample in samples]
    good = sum(sample.ok for sample in samples)
    return Figures(good / len(samples), sum(latencies) / len(latencies), share_of(latencies, 0.5),
                   share_of(latencies, 0.95), share_of(latencies, 0.99), sum(firsts) / len(firsts),
                   good / run.elapsed_s)


def change_text(new, old):
    """Return how much a figure has changed, as text."""
    return f"{(new / old - 1) * 100:+.1f} %" if old else "-"


ROWS = (("Success Rate", "success"), ("Avg Latency", "mean_s"), ("P50 Latency", "p50_s"), ("P95 Latency", "p95_s"),
        ("P99 Latency", "p99_s"), ("TTFT", "ttft_s"), ("Requests/sec", "per_s"))


def figure_text(name, value):
    """Return a figure with its unit."""
    if name == "success":
        return f"{value * 100:.1f} %"
    return f"{value:.2f}" if name == "per_s" else f"{value:.2f} s"


def comparison_table(runs):
    """Return rows of text: each figure under each policy that was told nothing, and SOLLOL's change to the others."""
    runs = [run for run in runs if run.policy not in TOLD]
    by_policy = {run.policy: figures(run) for run in runs}
    mine = by_policy[runs[-1].policy]
    rows = [["", *(run.policy if run.policy != SOLLOL else "SOLLOL" for run in runs),
             *(f"against {run.policy}" for run in runs[:-1])]]
    for label, name in ROWS:
        row = [label, *(figure_text(name, getattr(by_policy[run.policy], name)) for run in runs)]
        for run in runs[:-1]:
            old, new = getattr(by_policy[run.policy], name), getattr(mine, name)
            row.append(f"{(new - old) * 100:+.1f} points" if name == "success" else change_text(new, old))
        rows.append(row)
    return rows


TOLD_FIGURES = (("mean", "mean_s"), ("P50", "p50_s"), ("P95", "p95_s"), ("TTFT", "ttft_s"))


def told_table(runs):
    """Return rows of text: the figures of rivals that were told, and SOLLOL's change to each; [] if there are none."""
    told, mine = [run for run in runs if run.policy in TOLD], figures(runs[-1])
    rows = [["told by hand", *(name for name, _ in TOLD_FIGURES), *(f"SOLLOL's {name}" for name, _ in TOLD_FIGURES)]]
    for run in told:
        pairs = [(getattr(mine, field), getattr(figures(run), field)) for _, field in TOLD_FIGURES]
        rows.append([run.policy, *(f"{old:.2f} s" for _, old in pairs), *(change_text(*pair) for pair in pairs)])
    return rows if told else []


def node_table(runs):
    """Return rows of text: answered requests per node under each policy."""
    counts = [collections.Counter(sample.node for sample in run.samples if sample.ok) for run in runs]
    names = sorted({name for count in counts for name in count})
    return [["Requests", *names]] + [[run.policy, *(str(count[name]) for name in names)]
                                     for run, count in zip(runs, counts, strict=True)]


def class_table(runs):
    """Return rows of text: latency by priority under each policy, or [] if all had the same."""
    levels = sorted({sample.priority for run in runs for sample in run.samples}, reverse=True)
    if len(levels) < 2:
        return []
    rows = [["Mean / P95 latency", *(f"priority {level}" for level in levels)]]
    for run in runs:
        of_levels = [figures(run, lambda sample, level=level: sample.priority == level) for level in levels]
        rows.append([run.policy, *(f"{one.mean_s:.2f} / {one.p95_s:.2f} s" for one in of_levels)])
    return rows


def aligned(rows):
    """Return rows of text as lines with columns: the first to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width)
                               in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)


# ------------------------------------------------------------------------------------------------------------
# One page of HTML: the same report with its curves. No outside resource, no script; charts are SVG by hand.
# ------------------------------------------------------------------------------------------------------------

POLICY_LABELS = {"latency-weighted": "SOLLOL", "sollol": "SOLLOL"}
POLICY_CLASSES = {"round-robin": "rr", "least-inflight": "li", "latency-weighted": "lw", "sollol": "lw",
                  "weighted-least": "wl", "central-queue": "cq", "resident-first": "rf", "shortest-first": "sf"}
MOST_BARS = 400                     # requests of one run; more are unreadable as bars and are drawn as area
MOST_ROWS = 40                      # concurrent requests of one node, for the same reason
GRID = 1000  # charts stretch: paths count in thousandths of the width, texts and marks in percent
CDF_PX = 260                        # distribution chart
LANE_PX = 34                        # area of one node
TITLE_PX = 20                       # name above a lane or a priority class
ROW_PX = 18                         # one policy within a priority class

PAGE_CSS = """
:root{color-scheme:light dark;--page:#fbfbf9;--ink:#1d2126;--soft:#5c636d;--rule:#dcdfe3;--band:#f1f2f2;
 --rr:#7b818a;--li:#d47500;--lw:#1c5fd1;--other:#7a4fa3;--bad:#b0106b;
 --wl:#a8871a;--cq:#1a8a5a;--rf:#0f8fa3;--sf:#8a5a3c}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e8eaed;--soft:#a3abb6;--rule:#333a43;
 --band:#1c2026;--rr:#a0a7b1;--li:#f2a33a;--lw:#6da7ff;--other:#c39bea;--bad:#ff77bb;
 --wl:#d9bd55;--cq:#5fcf9b;--rf:#5cc8da;--sf:#c89a7c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
 font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1560px;margin:auto;padding:clamp(20px,3vw,48px) clamp(16px,3vw,48px)}
h1{font-size:clamp(26px,3.2vw,42px);line-height:1.15;letter-spacing:-.02em;margin:0 0 .5em}
h2{font-size:clamp(19px,1.6vw,24px);line-height:1.25;margin:0 0 4px}
h3{font-size:16px;margin:0}
p,ul{margin:0;max-width:95ch}
section{border-top:1px solid var(--rule);margin-top:36px;padding-top:24px}
.lead{font-size:clamp(16px,1.3vw,20px)}
.soft,figcaption{color:var(--soft);font-size:14px;max-width:130ch;text-wrap:pretty}
pre{margin:14px 0 6px;padding:8px 12px;background:var(--band);border-radius:6px;white-space:pre-wrap;
 overflow-wrap:anywhere;font:14px/1.5 ui-monospace,monospace}
.grid{display:grid;margin-top:20px;gap:32px clamp(28px,3vw,56px);
 grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr))}
.grid>*,figure{min-width:0;margin:0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;line-height:1.3}
th,td{padding:7px 0 7px 14px;text-align:right;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left;padding-left:0}
tbody th{font-weight:400}
thead th{color:var(--soft);font-size:14px;font-weight:600;vertical-align:bottom}
.main{width:100%;max-width:1100px}
.main td,.main tbody th{font-size:clamp(13px,1.3vw,20px)}
.main .lw{font-weight:650;color:var(--ink)}
.legend{width:100%;font-size:14px;margin-bottom:6px}
.legend th,.legend td{white-space:nowrap;padding-top:4px;padding-bottom:4px}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;background:var(--c);margin-right:7px}
.rr{--c:var(--rr)}.li{--c:var(--li)}.lw{--c:var(--lw)}.other{--c:var(--other)}
.wl{--c:var(--wl)}.cq{--c:var(--cq)}.rf{--c:var(--rf)}.sf{--c:var(--sf)}
.chart{container-type:inline-size;padding:24px 34px 42px 40px}
.flat{padding:4px 0 28px}.about{min-height:3em;margin-bottom:8px}
svg{display:block;width:100%;overflow:visible;font-size:12px;fill:var(--soft)}
path,line{fill:none;vector-effect:non-scaling-stroke}
.grid-line{stroke:var(--rule)}.limit{stroke:var(--soft);stroke-dasharray:2 4}
.bound{stroke:var(--ink);stroke-dasharray:6 4}.bound-text{fill:var(--ink)}
.curve{stroke:var(--c);stroke-width:2.5;stroke-linejoin:round}.never{stroke-width:1.5;stroke-dasharray:5 4}
.full{fill:var(--c)}.mean{fill:inherit;stroke:var(--page);stroke-width:1.5}
.dot{fill:var(--c);stroke:var(--page);stroke-width:2}.ring{fill:var(--page);stroke:var(--c);stroke-width:2.5}
.reach{stroke:var(--c);stroke-width:3;opacity:.45}
.lane{fill:var(--band)}.name{fill:var(--ink);font-weight:600}
.wait{fill:var(--c);opacity:.38}.work{fill:var(--c)}.area{fill:var(--c);opacity:.75}
.bad{stroke:var(--bad);stroke-width:2}.bad-text{color:var(--bad);fill:var(--bad);font-weight:600}
.start{text-anchor:start}.middle{text-anchor:middle}.end{text-anchor:end}
.defs{position:absolute;width:0;height:0}
@container(max-width:450px){.minor{display:none}}
@media(max-width:600px){th,td{padding-left:6px}thead th,.legend{font-size:13px}
 .main thead th{font-size:12px}.main .key{display:block;margin:0 0 4px auto}}
"""
MARKS = ('<svg class="defs" aria-hidden="true"><defs>'
         '<path id="failed" class="bad" d="M-3.5-3.5l7 7m0-7l-7 7"/>'
         '<path id="mean" class="mean" d="M0 0l-7-11h14z"/></defs></svg>')


def one_two_five(low, high):
    """Return the numbers 1, 2, 5, 10, 20, ... from the last one <= low to the first one >= high."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    return steps[bisect.bisect_right(steps, low) - 1:bisect.bisect_left(steps, high) + 1]


class Axis(NamedTuple):
    """A horizontal scale in seconds."""

    low_s: float
    high_s: float
    logarithmic: bool = False

    def percent(self, time_s):
        """Return how far right a time is drawn; what is off the scale is drawn at its end."""
        bend = math.log if self.logarithmic else float
        inside_s = min(max(time_s, self.low_s), self.high_s)
        return round(100 * (bend(inside_s) - bend(self.low_s)) / (bend(self.high_s) - bend(self.low_s)), 2)

    def grid(self, time_s):
        return round(self.percent(time_s) * GRID / 100)

    def ticks_s(self):
        """Return round times, few enough to be labelled."""
        if self.logarithmic:
            return one_two_five(self.low_s, self.high_s)
        step_s = next(step for step in one_two_five(self.high_s / 100, self.high_s * 10)
                      if step * 6 >= self.high_s)
        return [step_s * number for number in range(int(self.high_s / step_s + 1e-6) + 1)]


def fitting_axis(times_s):
    """Return a scale for all these times: logarithmic if the slowest took 20 times as long as the fast."""
    ordered_s = sorted(times_s) or [1.0]
    high_s = max(ordered_s[-1], 0.001)
    fast_s = max(ordered_s[len(ordered_s) // 50], 0.001)    # a few very fast ones are not worth half a chart
    if high_s > 20 * fast_s:
        steps_s = one_two_five(fast_s, high_s)
        return Axis(steps_s[0], steps_s[-1], True)
    ticks_s = Axis(0, high_s).ticks_s()
    return Axis(0, math.ceil(high_s / ticks_s[1] - 1e-6) * ticks_s[1])


# Numbers.

def quantile(times_s, share, count):
    """Return the nearest-rank quantile of count requests, None if it is a failed one: those never finish."""
    rank = max(1, math.ceil(share * count - 1e-9))
    return sorted(times_s)[rank - 1] if rank <= len(times_s) else None


def ok_samples(samples):
    return [sample for sample in samples if sample["ok"]]


def latencies_s(samples):
    return [sample["end_s"] - sample["scheduled_s"] for sample in ok_samples(samples)]


def first_tokens_s(samples):
    return [sample["first_s"] - sample["scheduled_s"] for sample in ok_samples(samples)]


def seconds(time_s):
    """Return a time for people."""
    if time_s is None:
        return "–"
    return f"{time_s:.{2 if time_s < 9.995 else 1 if time_s < 99.95 else 0}f} s"


def number_of(number, noun):
    return f"{number} {noun}{'' if number == 1 else 's'}"


def failures_text(samples):
    """Return how many failed, and how."""
    statuses = collections.Counter(sample["status"] for sample in samples if not sample["ok"])
    if not statuses:
        return "none failed"
    kinds = (f"{number} × {'status ' + str(status) if status else 'no answer'}"
             for status, number in statuses.most_common())
    return f"{statuses.total()} failed ({', '.join(kinds)})"


# Pieces of the page.

def escaped(value):
    return html.escape(str(value))


def policy_class(policy):
    return POLICY_CLASSES.get(policy.lower(), "other")


def policy_label(policy):
    return POLICY_LABELS.get(policy.lower(), policy)


def policy_key(policy):
    """Return the name of a policy with a patch of its colour."""
    return f'<span class="key {policy_class(policy)}"></span>{escaped(policy_label(policy))}'


def svg_text(percent, y_px, text, classes="middle"):
    return f'<text x="{percent}%" y="{y_px}" class="{classes}">{escaped(text)}</text>'


def svg_chart(height_px, label, content):
    return f'<svg role="img" aria-label="{escaped(label)}" style="height:{height_px}px">{content}</svg>'


def stretched(height_px, y_px, content):
    """Return paths on a grid of GRID x GRID as a layer that takes whatever width there is."""
    return (f'<svg y="{y_px}" width="100%" height="{height_px}" viewBox="0 0 {GRID} {GRID}" '
            f'preserveAspectRatio="none">{content}</svg>')


def axis_svg(axis, height_px):
    """Return vertical lines with times below; a narrow chart leaves out those it has no room for."""
    ticks_s = axis.ticks_s()
    parts = []
    for tick_s in ticks_s:
        percent = axis.percent(tick_s)
        is_last = tick_s == ticks_s[-1]
        spare = not is_last and (not f"{tick_s:e}".startswith("1.") or percent > 85)
        crowded = axis.logarithmic and len(ticks_s) > 7 and spare
        anchor = "start" if percent < 1 else "end" if percent > 97 else "middle"
        parts.append(f'<line class="grid-line" x1="{percent}%" x2="{percent}%" y2="{height_px}"/>')
        text = f"{tick_s:g}{' s' * is_last}"
        parts.append(svg_text(percent, height_px + 18, text, anchor + " minor" * crowded))
    return "".join(parts)


def table_row(scope, names, cells, classes=()):
    """Return a row: names (HTML) head their columns or the row, cells are text, a class is for either."""
    inner = [*names, *map(escaped, cells)]
    kinds = [f' class="{kind}"' if kind else "" for kind in classes] + [""] * (len(inner) - len(classes))
    heads = [f'<th scope="{scope}"{kind}>{name}</th>' for name, kind in zip(names, kinds, strict=False)]
    return "<tr>" + "".join(heads + [f"<td{kind}>{cell}</td>" for cell, kind in
                                     zip(inner[len(names):], kinds[len(names):], strict=True)]) + "</tr>"


def table_html(kind, head, rows):
    return f'<table class="{kind}"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def result_table(table):
    """Return the table of strings as HTML; a column knows its policy by its name."""
    head, *rows = table
    classes = [policy_class(name) if name.lower() in POLICY_CLASSES else "" for name in head]
    names = [policy_key(name) if kind else escaped(name) for name, kind in zip(head, classes, strict=True)]
    body = [table_row("row", [escaped(row[0])], row[1:], classes) for row in rows]
    whole = table_html("main", table_row("col", names, [], classes), body)
    return f'<div class="scroll" tabindex="0">{whole}</div>'


# Distribution of latency and time to first token.

class Spread(NamedTuple):
    """What one policy's requests took. Failed ones never finished; the mean counts them until they were given up."""

    policy: str
    times_s: list
    given_up_s: list

    @property
    def p50_s(self):
        return quantile(self.times_s, 0.50, self.count)

    @property
    def p95_s(self):
        return quantile(self.times_s, 0.95, self.count)

    @property
    def mean_s(self):
        all_s = self.times_s + self.given_up_s
        return sum(all_s) / len(all_s) if all_s else None

    @property
    def failed(self):
        return len(self.given_up_s)

    @property
    def count(self):
        return len(self.times_s) + len(self.given_up_s)

    def said(self, time_s):
        """Return a quantile for people."""
        return "never" if time_s is None and self.failed else seconds(time_s)


def spread_of(policy, samples, times_of):
    given_up_s = [sample["end_s"] - sample["scheduled_s"] for sample in samples if not sample["ok"]]
    return Spread(policy, times_of(samples), given_up_s)


def cdf_path(one, axis):
    """Return the share of requests finished by each time, as steps, and dashed on the level of the failed."""
    heights = {0: GRID}
    for rank, time_s in enumerate(sorted(one.times_s), 1):
        heights[axis.grid(time_s)] = GRID - round(GRID * rank / one.count)  # one step per column is enough
    steps = "".join(f"H{x}V{y}" for x, y in heights.items())
    path = f'<path class="curve" d="M0 {GRID}{steps}"/>' if one.times_s else ""
    if one.failed:
        path += f'<path class="curve never" d="M{max(heights)} {min(heights.values())}H{GRID}"/>'
    return path


def cdf_marks(one, axis):
    marks = ((one.p50_s, "50%"), (one.p95_s, "5%"))
    return "".join(f'<circle class="dot" cx="{axis.percent(time_s)}%" cy="{y}" r="5.5"/>'
                   for time_s, y in marks if time_s is not None)


def bound_svg(spreads, axis, bound_s, height_px):
    """Return a line at the lower bound of the mean, and a triangle at each mean."""
    percent = axis.percent(bound_s)
    anchor = "start" if percent < 35 else "end" if percent > 65 else "middle"   # stay above the chart
    means = "".join(f'<g class="{policy_class(one.policy)} full"><use href="#mean" y="{height_px}" '
                    f'x="{axis.percent(one.mean_s)}%"/></g>' for one in spreads if one.count)
    return (f'<line class="bound" x1="{percent}%" x2="{percent}%" y1="-4" y2="{height_px}"/>{means}'
            + svg_text(percent, -9, f"bound of the mean: {seconds(bound_s)}", "bound-text " + anchor))


def level_svg(share, left="", right=""):
    """Return a horizontal line at a share of all requests, in percent, with a text at either end."""
    y = f"{100 - share}%"
    return (f'<line class="{"limit" if right else "grid-line"}" x2="100%" y1="{y}" y2="{y}"/>'
            f'<text class="end" x="-8" y="{y}" dy="4">{left}</text>'
            f'<text x="100%" dx="8" y="{y}" dy="4">{right}</text>')


def cdf_svg(title, spreads, bound_s):
    """Return one curve per policy with dots at P50 and P95, and the bound of the mean if there is one."""
    times_s = [time_s for one in spreads for time_s in one.times_s]
    axis = fitting_axis(times_s if bound_s is None else [*times_s, bound_s])
    levels = "".join(level_svg(share, f"{share}%") for share in (0, 25, 75, 100))
    levels += level_svg(50, "50%", "P50") + level_svg(95, "", "P95")
    curves = "".join(f'<g class="{policy_class(one.policy)}">{cdf_path(one, axis)}</g>' for one in spreads)
    marks = "".join(f'<g class="{policy_class(one.policy)}">{cdf_marks(one, axis)}</g>' for one in spreads)
    bound = "" if bound_s is None else bound_svg(spreads, axis, bound_s, CDF_PX)
    said = "; ".join(f"{policy_label(one.policy)}: P50 {one.said(one.p50_s)}, P95 {one.said(one.p95_s)}"
                     for one in spreads)
    return svg_chart(CDF_PX, f"{title}, cumulative distribution. {said}",
                     axis_svg(axis, CDF_PX) + levels + stretched(CDF_PX, 0, curves) + bound + marks)


def spread_legend(spreads):
    """Return the colours, and the numbers behind the chart."""
    rows = [table_row("row", [policy_key(one.policy)], [one.said(one.p50_s), one.said(one.p95_s),
                      seconds(one.mean_s), one.failed]) for one in spreads]
    return table_html("legend", table_row("col", ["Policy", "P50", "P95", "Mean", "Failed"], []), rows)


def cdf_figure(title, runs, times_of, bound_s=None):
    spreads = [spread_of(run["policy"], run["samples"], times_of) for run in runs]
    notes = ["Triangles: means."] * (bound_s is not None)
    if any(one.failed for one in spreads):
        notes.append("Dashed: failed requests, which never finish; the mean counts them until they were given up.")
    return (f'<figure><h3>{title}</h3><div class="chart">{cdf_svg(title, spreads, bound_s)}</div>'
            f'{spread_legend(spreads)}<figcaption>{" ".join(notes)}</figcaption></figure>')


# Latency by priority class.

def priority_row_svg(one, axis, y_px):
    """Return one policy in one class: a dot at P50, a ring at P95; without end if more than 5 % failed."""
    start = axis.percent(one.p50_s) if one.p50_s is not None else 100
    stop = axis.percent(one.p95_s) if one.p95_s is not None else 100
    dots = f'<line class="reach" x1="{start}%" x2="{stop}%" y1="{y_px}" y2="{y_px}"/>'
    dots += f'<circle class="ring" cx="{stop}%" cy="{y_px}" r="4.5"/>' if one.p95_s is not None else ""
    dots += f'<circle class="dot" cx="{start}%" cy="{y_px}" r="6"/>' if one.p50_s is not None else ""
    return f'<g class="{policy_class(one.policy)}">{dots}</g>'


def priority_figure(priority, runs, axis):
    spreads = []
    for run in runs:
        samples = [sample for sample in run["samples"] if sample["priority"] == priority]
        spreads += [spread_of(run["policy"], samples, latencies_s)] * bool(samples)
    height_px = ROW_PX * len(spreads) + 10
    rows = "".join(priority_row_svg(one, axis, 14 + ROW_PX * number) for number, one in enumerate(spreads))
    label = f"Latency of priority {priority}"
    chart = svg_chart(height_px, label, axis_svg(axis, height_px) + rows)
    return (f'<figure><h3>Priority {escaped(priority)}</h3><div class="chart flat">{chart}</div>'
            f"{spread_legend(spreads)}</figure>")


def priority_section(runs):
    """Return latency by priority class, nothing if there is only one."""
    classes = sorted({sample["priority"] for run in runs for sample in run["samples"]}, reverse=True)
    if len(classes) < 2:
        return ""
    axis = fitting_axis([time_s for run in runs for time_s in latencies_s(run["samples"])])
    figures = "".join(priority_figure(priority, runs, axis) for priority in classes)
    return section("Latency by priority class", figures,
                   "Dot: P50. Ring: P95. All on one scale. Failed requests count as never finished.")


# Timeline.

class Lane(NamedTuple):
    """One node under one policy."""

    samples: list
    rows: list                      # for each sample, the lowest row that is free while it runs
    depth: int                      # how many rows that takes: the most requests at a time


def packed_lane(samples):
    """Return the lane of these samples."""
    ordered = sorted(samples, key=lambda sample: (sample["sent_s"], sample["end_s"]))
    free_at_s, rows = [], []
    for sample in ordered:
        free = (row for row, time_s in enumerate(free_at_s) if time_s <= sample["sent_s"])
        row = next(free, len(free_at_s))
        free_at_s[row:row + 1] = [sample["end_s"]]
        rows.append(row)
    return Lane(ordered, rows, len(free_at_s))


def bar_svg(sample, axis, y_px, height_px):
    left, right = axis.percent(sample["sent_s"]), axis.percent(sample["end_s"])
    first = axis.percent(sample["end_s"] if sample["first_s"] is None else sample["first_s"])
    status = "" if sample["ok"] else f", failed: {sample['status'] or 'no answer'}"
    said = (f"{sample['sent_s']:.2f}–{sample['end_s']:.2f} s, {number_of(sample['output_tokens'], 'token')}, "
            f"priority {sample['priority']}{status}")
    at = f'y="{y_px}" height="{height_px}"'
    parts = [f'<title>{escaped(said)}</title>',
             f'<rect class="wait" x="{left}%" width="{max(right - left, .3):.2f}%" {at}/>']
    if right > first:
        parts.append(f'<rect class="work" x="{first}%" width="{right - first:.2f}%" {at}/>')
    if not sample["ok"]:
        parts.append(f'<use href="#failed" x="{right}%" y="{y_px + height_px / 2}"/>')
    return f'<g>{"".join(parts)}</g>'


def bars_svg(lane, axis, y_px, row_px):
    """Return a bar per request: pale until the first token, full from there on."""
    return "".join(bar_svg(sample, axis, y_px + 2 + row * row_px, max(row_px - 1, 1))
                   for sample, row in zip(lane.samples, lane.rows, strict=True))


def area_svg(lane, axis, y_px, most):
    """Return requests in flight over time, and a stroke at the bottom for each failure."""
    changes = collections.Counter()
    for sample in lane.samples:
        changes[axis.grid(sample["sent_s"])] += 1
        changes[axis.grid(sample["end_s"])] -= 1
    in_flight, steps = 0, []
    for x, change in sorted(changes.items()):
        in_flight += change
        steps += [f"H{x}V{GRID - round(GRID * in_flight / most)}"] if change else []
    failed_x = sorted({axis.grid(sample["end_s"]) for sample in lane.samples if not sample["ok"]})
    failed = "".join(f"M{x} {GRID}v-220" for x in failed_x)
    return stretched(LANE_PX, y_px, f'<path class="area" d="M0 {GRID}{"".join(steps)}Z"/>'
                     + (f'<path class="bad" d="{failed}"/>' if failed else ""))


def node_label(node):
    """Return what a phone has room for beside the numbers."""
    name = node.removeprefix("http://") or "no node"
    return name if len(name) <= 24 else name[:23] + "…"


def lane_svg(node, lane, y_px, height_px, content):
    """Return a node's name, what it served, and its requests."""
    failed = len(lane.samples) - len(ok_samples(lane.samples))
    noun = number_of(len(lane.samples), "request").removeprefix(str(len(lane.samples)))
    bad = f'<tspan class="bad-text"> · {failed} failed</tspan>' if failed else ""
    return (f'<text class="name" y="{y_px + 14}">{escaped(node_label(node))}</text>'
            f'<text class="end" x="100%" y="{y_px + 14}">{len(lane.samples)}'
            f'<tspan class="minor">{noun}</tspan> · peak {lane.depth}{bad}</text>'
            f'<rect class="lane" y="{y_px + TITLE_PX}" width="100%" height="{height_px}"/>{content}')


def timeline_figure(run, lanes, depths, axis, as_bars):
    row_px = min(10, max(4, 60 // max(1, *depths.values()))) if depths else 0
    parts, y_px = [], 0
    for node, lane in lanes.items():
        height_px = depths[node] * row_px + 3 if as_bars else LANE_PX
        top_px = y_px + TITLE_PX
        content = (bars_svg(lane, axis, top_px, row_px) if as_bars
                   else area_svg(lane, axis, top_px, depths[node]))
        parts.append(lane_svg(node, lane, y_px, height_px, content))
        y_px = top_px + height_px + 8
    label = f"{policy_label(run['policy'])}: requests at each node over {run['elapsed_s']:.0f} s"
    chart = svg_chart(y_px, label, axis_svg(axis, y_px) + "".join(parts))
    about = (f"{number_of(len(run['samples']), 'request')} in {seconds(run['elapsed_s'])}, "
             f"{failures_text(run['samples'])}")
    return (f'<figure class="{policy_class(run["policy"])}"><h3>{policy_key(run["policy"])}</h3>'
            f'<figcaption class="about">{escaped(about)}</figcaption>'
            f'<div class="chart flat">{chart}</div></figure>')


def timeline_section(runs):
    """Return one figure per policy, with the same nodes at the same heights and the same scales."""
    names = {sample["node"] for run in runs for sample in run["samples"]}
    nodes = sorted(names, key=lambda node: (not node, node))
    lanes = [{node: packed_lane([sample for sample in run["samples"] if sample["node"] == node])
              for node in nodes} for run in runs]
    depths = {node: max(lane[node].depth for lane in lanes) for node in nodes}
    as_bars = (max(len(run["samples"]) for run in runs) <= MOST_BARS
               and max(depths.values(), default=0) <= MOST_ROWS)
    axis = Axis(0, max([0.001] + [run["elapsed_s"] for run in runs]
                       + [sample["end_s"] for run in runs for sample in run["samples"]]))
    figures = "".join(timeline_figure(run, lane, depths, axis, as_bars) for run, lane in zip(runs, lanes, strict=True))
    about = ("A bar is a request from sent to end, pale until the first token. ×: failed." if as_bars else
             "Requests in flight; full height is the node's highest peak under any policy. "
             "Strokes at the bottom: failed requests, when they ended.")
    return section("Timeline", figures, about + " Beside a node: its requests, and the most at a time.")


# Page.

def section(title, figures, about):
    return (f'\n<section><h2>{title}</h2><p class="soft">{escaped(about)}</p>'
            f'<div class="grid">{figures}</div></section>')


def notes_section(notes):
    items = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    return f"\n<section><h2>Notes</h2><ul>{items}</ul></section>" if notes else ""


def distribution_section(runs, bound_s):
    figures = cdf_figure("Latency", runs, latencies_s, bound_s)
    figures += cdf_figure("Time to first token", runs, first_tokens_s)
    return section("How long requests took", figures,
                   "Share of requests finished within a time, counted from when each was due. "
                   "Further left is faster.")


def html_page(report):
    """Return the whole report as one HTML page that needs nothing else."""
    runs = report["runs"]
    charts = (distribution_section(runs, report.get("bound_s")) + timeline_section(runs)
              + priority_section(runs)) if runs else ""
    run_by = f"Seed {report['seed']} · Python {report['python']} · {report['loop']}"
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>SOLLOL benchmark</title>'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<style>{PAGE_CSS}</style></head>\n<body>{MARKS}<main><h1>SOLLOL benchmark</h1>"
            f'<p class="lead">{escaped(report["scenario"])}</p><pre>{escaped(report["command"])}</pre>'
            f'<p class="soft">{escaped(run_by)}</p>\n'
            f"<section><h2>Result</h2>{''.join(map(result_table, filter(None, (report['table'], report['told']))))}"
            "</section>"
            f"{charts}{notes_section(report.get('notes', []))}</main></body></html>\n")


# What is printed and written.

def remarks(scenario, runs, bound):
    """Return what a reader must know of these figures, in sentences."""
    mine = figures(runs[-1])
    notes = ["Latency counts from the intended send time. A failed request counts as the time after which its client "
             f"gives up ({scenario.timeout_s:g} s), in every figure."]
    if bound:
        notes.append(f"At the nodes' mean speed no scheduler can bring the mean below {bound:.2f} s here; "
                     f"SOLLOL is {change_text(mine.mean_s, bound)} from that.")
    if runs[-1].policy == SOLLOL and runs[-1].ratios and any(runs[-1].ratios.counts):
        middle, most = (runs[-1].ratios.share(share) for share in (0.5, 0.9))
        notes.append("From sending to finish half of SOLLOL's requests took at most "
                     f"x{middle:g} of what was predicted, nine of ten at most x{most:g}.")
    if len(set(CLUSTERS.get(scenario.cluster, ()))) == 1:
        notes.append("These nodes are equal: there is little to gain by choosing among them.")
    return notes + told_texts(run.policy for run in runs)


def report_of(options, scenario, runs, bound):
    """Return everything about a comparison as plain data, for JSON and HTML."""
    real = scenario.about or options.realtime
    loop = "asyncio in real time" if real else "virtual clock: the same seed gives the same figures"
    return {
        "command": " ".join(["python", "bench.py", *options.argv]), "seed": options.seed,
        "python": sys.version.split()[0], "loop": loop, "scenario": str(scenario), "bound_s": bound,
        "runs": [{"policy": run.policy, "elapsed_s": run.elapsed_s,
                  "samples": [sample._asdict() for sample in run.samples]} for run in runs],
        "table": comparison_table(runs), "told": told_table(runs), "notes": remarks(scenario, runs, bound)}


def print_report(report, runs):
    """Print a comparison as text."""
    print(f"$ {report['command']}")
    print(f"seed {report['seed']}, Python {report['python']}, {report['loop']}")
    print(report["scenario"] + "\n")
    for rows in (report["table"], report["told"], node_table(runs), class_table(runs)):
        if rows:
            print(aligned(rows) + "\n")
    for note in report["notes"]:
        print(note)


def write_file(path, text, mode="w"):
    """Write a text file. Raises BadArgument if that cannot be done."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BadArgument(f"{path}: {error.strerror}") from None


def try_outputs(options):
    """Raise BadArgument if a file that is asked for cannot be written: better to know now than after minutes."""
    for path in filter(None, (options.output, options.html)):
        write_file(path, "", "a")


def finish(options, scenario, runs, bound):
    """Print a comparison and write the files that were asked for."""
    report = report_of(options, scenario, runs, bound)
    print_report(report, runs)
    if options.output:
        write_file(options.output, json.dumps(report, indent=1))
    if options.html:
        write_file(options.html, html_page(report))


# ------------------------------------------------------------------------------------------------------------
# Scenarios: one dimension at a time, and the crossings that matter
# ------------------------------------------------------------------------------------------------------------

SMALL = ("llama3.2:latest",)
DEFAULT = Scenario("seed/mild3", "mild3", "mixed", clients=10, models=SMALL, timeout_s=60.0)


def seed_scenario(cluster, clients=10, **more):
    """Return the guide's own benchmark on a cluster: closed loop, 60 s, a 3B model, a 30/50/20 mix."""
    name = f"seed{clients if clients != 10 else ''}/{cluster}"
    return DEFAULT._replace(name=name, cluster=cluster, clients=clients, **more)


def load_scenario(name, cluster, load=0.6, **more):
    """Return an open loop of conversation lengths on a cluster."""
    return Scenario(f"{name}/{cluster}", cluster, load=load, **more)


MATRIX = (
    *(seed_scenario(cluster) for cluster in ("hom3", "hom5", "hom10", "mild3", "mild5", "het3", "het5", "het10")),
    seed_scenario("hom5", 30), seed_scenario("mild5", 30), seed_scenario("het10", 30),
    *(load_scenario(f"load{load:g}", cluster, load) for cluster, loads in (
        ("hom5", (0.3, 0.6, 0.85)), ("mild5", (0.15, 0.3, 0.6, 0.85)), ("het5", (0.3, 0.6, 0.85)))
      for load in loads),
    load_scenario("load0.6", "hom3"), load_scenario("load0.6", "mild3"), load_scenario("load0.6", "hom10"),
    load_scenario("load0.6", "het10"),
    *(load_scenario(lengths, "mild5", lengths=lengths) for lengths in ("simple", "complex", "mixed", "code")),
    load_scenario("small1b", "mild5", models=("llama3.2:1b",), timeout_s=60.0),
    load_scenario("large70b", "mild5", models=("llama3.3:70b",), vram_gb=80.0, timeout_s=1000.0,
                  requests=300),
    *(load_scenario("models5", cluster, models=FIVE_MODELS) for cluster in ("hom10", "mild5", "het5")),
    *(load_scenario("burst", cluster, arrivals="burst") for cluster in ("hom5", "mild5")),
    load_scenario("prio", "hom5", 0.85, urgent=0.1), load_scenario("prio", "mild5", arrivals="burst", urgent=0.1),
    load_scenario("fair", "mild5", arrivals="burst", modest=0.1),
    load_scenario("chat", "hom5", chat=True), load_scenario("chat", "mild5", chat=True),
    seed_scenario("mild5", latency_s=0.04)._replace(name="wan/mild5"),
    seed_scenario("mild5", latency_s=0.15)._replace(name="far/mild5"),
    *(load_scenario(fault, "mild5", fault=fault) for fault in ("kill", "hang", "slow", "503")),
    *(load_scenario(fault, "hom5", fault=fault) for fault in ("kill", "hang", "slow")),
)


class MatrixRow(NamedTuple):
    """What the policies made of one scenario."""

    scenario: Scenario
    bound: float | None             # of the mean, in seconds
    figures: dict[str, Figures]     # by policy


def matrix_row(scenario, seed):
    """Run one scenario under all policies; return the MatrixRow."""
    runs = simulate(scenario, seed, (*RIVALS, *told_rivals(scenario.models), SOLLOL))
    return MatrixRow(scenario, bound_s(scenario, seed), {run.policy: figures(run) for run in runs})


MATRIX_HEAD = ["scenario", "success %", "RR mean s", "LI mean s", "SOLLOL mean s", "to RR", "to LI", "P95 s", "to RR",
               "to LI", "requests/s", "over bound"]


def matrix_texts(row):
    """Return the texts of one scenario's row in the matrix."""
    base, other, mine = (row.figures[policy] for policy in (*RIVALS, SOLLOL))
    return [row.scenario.name, f"{base.success * 100:.1f} > {mine.success * 100:.1f}", f"{base.mean_s:.2f}",
            f"{other.mean_s:.2f}", f"{mine.mean_s:.2f}", change_text(mine.mean_s, base.mean_s),
            change_text(mine.mean_s, other.mean_s), f"{mine.p95_s:.2f}", change_text(mine.p95_s, base.p95_s),
            change_text(mine.p95_s, other.p95_s), change_text(mine.per_s, base.per_s),
            change_text(mine.mean_s, row.bound) if row.bound else "-"]


def rival_texts(row):
    """Return the texts of one scenario's row beside all rivals but round-robin: SOLLOL's figures, and its changes."""
    mine = row.figures[SOLLOL]
    texts = [row.scenario.name, " / ".join(f"{getattr(mine, field):.2f}" for _, field in TOLD_FIGURES) + " s"]
    for policy in (RIVALS[1], *told_rivals(FIVE_MODELS)):
        other = row.figures.get(policy)
        texts.append(" / ".join(f"{(getattr(mine, field) / getattr(other, field) - 1) * 100:+.0f}"
                                for _, field in TOLD_FIGURES) + " %" if other else "-")
    return texts


LOSS = 0.03                         # a rival that is better by less is not listed


def loss_rows(rows):
    """Return rows of text: where a rival is better than SOLLOL by more than LOSS in the mean or the P95."""
    texts = [["SOLLOL loses", "to", "its mean s", "P95 s", "SOLLOL's mean", "P95"]]
    for row in rows:
        mine = row.figures[SOLLOL]
        texts += [[row.scenario.name, policy, f"{other.mean_s:.2f}", f"{other.p95_s:.2f}",
                   change_text(mine.mean_s, other.mean_s), change_text(mine.p95_s, other.p95_s)]
                  for policy, other in row.figures.items()
                  if max(mine.mean_s / other.mean_s, mine.p95_s / other.p95_s) > 1 + LOSS]
    return texts


def in_parallel(run, jobs):
    """Run each of [(name, arguments)] on all processors; return {name: result}, of those done at Ctrl-C."""
    results = {}
    with concurrent.futures.ProcessPoolExecutor() as pool:
        tasks = {pool.submit(run, *arguments): name for name, arguments in jobs}
        try:
            for task in concurrent.futures.as_completed(tasks):
                results[tasks[task]] = task.result()
                name = tasks[task] if isinstance(tasks[task], str) else " ".join(map(str, tasks[task]))
                say(f"{len(results)} of {len(jobs)}, {name} done")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            say(f"stopped after {len(results)} of {len(jobs)}")
    return results


def matrix_tables(seed, pattern):
    """Run every scenario whose name has the pattern, on all processors; return the tables."""
    chosen = [scenario for scenario in MATRIX if re.search(pattern, scenario.name)]
    if not chosen:
        raise BadArgument(f"no scenario matches {pattern!r}; there are {' '.join(one.name for one in MATRIX)}")
    results = in_parallel(matrix_row, [(scenario.name, (scenario, seed)) for scenario in chosen])
    rows = [results[scenario.name] for scenario in chosen if scenario.name in results]
    figures_head = " / ".join(name for name, _ in TOLD_FIGURES)
    return [[MATRIX_HEAD, *map(matrix_texts, rows)],
            [[figures_head, "SOLLOL", *(f"to {policy}" for policy in (RIVALS[1], *told_rivals(FIVE_MODELS)))],
             *map(rival_texts, rows)],
            loss_rows(rows)]


# Ablation: what is each term of routing worth? One is switched off at a time, on scenarios that can show it.

async def no_calibration(gateway, node):
    """Mark a node as measured without measuring it."""
    node.calibrates()


def charge_nothing(fair, spec, now, cost_s, charge=sollol.FairShare.charge):
    """Charge a client nothing, whatever it has had before."""
    return charge(fair, spec, now, 0.0)


class Switch(NamedTuple):
    """A term of routing, what stands in its place when it is off, by name in sollol.py, and where that can matter."""

    term: str
    values: dict
    where: str = "."                # pattern of scenarios


ABLATIONS = (
    Switch("hold", {"HOLD": math.inf}),
    Switch("look-ahead", {"LOOK_AHEAD": 1}, "load|models5|prio"),
    Switch("harm", {"HARM": 0.0}, "models5"),
    Switch("swap", {"SWAP": 0.0}, "models5"),
    Switch("patience before loads", {"LOAD_PATIENCE": 0.0}, "models5"),
    Switch("load and residency", {"Offer.load": lambda offer, now: (0.0, 0.0)}, "models5"),
    Switch("prefix affinity", {"AFFINITY": 0.0, "EVICTION": 0.0, "STAY": 0.0, "NEAR": 0.0}, "chat"),
    Switch("kept caches", {"STAY": 0.0, "NEAR": 0.0}, "chat"),
    Switch("lengths by kind", {"kind_of": lambda client, lead, fields: 0}, "chat"),
    Switch("head start", {"HEAD_START_S": 0.0}, "prio"),
    Switch("fairness", {"FairShare.charge": charge_nothing}, "fair"),
    Switch("watchdog", {"Dispatcher.watch": lambda dispatcher, now: ([], [])}, "models5|hang"),
    Switch("calibration", {"calibrate": no_calibration}, "seed|load"),
    Switch("learned batching", {"BatchingEstimate.learn": lambda batching, crowd, token_s: None}),
)
ABLATED = tuple(scenario._replace(duration_s=40.0) for scenario in (
    seed_scenario("het5"), load_scenario("load0.6", "het5", requests=250),
    load_scenario("models5", "hom10", models=FIVE_MODELS, requests=250),
    load_scenario("models5", "mild5", models=FIVE_MODELS, requests=250),
    load_scenario("chat", "hom5", chat=True, requests=240),
    load_scenario("prio", "mild5", arrivals="burst", urgent=0.1, requests=300),
    load_scenario("fair", "mild5", arrivals="burst", modest=0.1, requests=300),
    load_scenario("hang", "mild5", fault="hang", requests=400)))
ABLATION_SEEDS = 3                  # pooled: one alone is off by a tenth and more


@contextlib.contextmanager
def instead(values, module=sollol):
    """Run with other values of names in a module, sollol.py's. A name that is gone from it raises AttributeError."""
    with contextlib.ExitStack() as stack:
        for path, value in values.items():
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, module)
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def switched_off(term):
    """Return a context without a term of routing; None switches nothing off."""
    return instead(next((switch.values for switch in ABLATIONS if switch.term == term), {}))


def is_favoured(scenario, sample):
    """Tell whether a sample counts in the ablation: in some scenarios only the urgent or modest ones do."""
    return sample.modest if scenario.modest else sample.priority > 5 if scenario.urgent else True


def pooled(scenario, policy, seed, count=ABLATION_SEEDS):
    """Return the Runs of one policy over some seeds as one."""
    runs = [simulate(scenario, seed + number, (policy,))[0] for number in range(count)]
    return Run(policy, [sample for run in runs for sample in run.samples], sum(run.elapsed_s for run in runs))


def ablated(scenario, term, seed):
    """Return (mean, P95) of SOLLOL's counting requests without a term, or with all for None; some seeds pooled."""
    with switched_off(term):
        run = pooled(scenario, SOLLOL, seed)
    favoured = figures(run, lambda sample: is_favoured(scenario, sample))
    return favoured.mean_s, favoured.p95_s


def ablation_table(scenarios, seed):
    """Return rows of text: mean and P95 of the whole, and how they change without each term."""
    wanted = [(scenario, None) for scenario in scenarios] + [
        (scenario, switch.term) for switch in ABLATIONS for scenario in scenarios
        if re.search(switch.where, scenario.name)]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        tasks = {pool.submit(ablated, *names, seed): names for names in wanted}
        for count, _ in enumerate(concurrent.futures.as_completed(tasks), 1):
            if count % 10 == 0:
                say(f"{count} of {len(tasks)} runs")
    results = {names: task.result() for task, names in tasks.items()}

    def changed(scenario, term):
        if (scenario, term) not in results:
            return ""
        pairs = zip(results[scenario, term], results[scenario, None], strict=True)
        return " / ".join(f"{(new / old - 1) * 100:+.0f}" for new, old in pairs) + " %"

    names = [scenario.name + (" modest" if scenario.modest else " urgent" if scenario.urgent else "")
             for scenario in scenarios]
    return [["mean / P95", *names],
            ["whole", *("{:.2f} / {:.2f} s".format(*results[scenario, None]) for scenario in scenarios)],
            *([f"no {switch.term}", *(changed(scenario, switch.term) for scenario in scenarios)]
              for switch in ABLATIONS)]


# Trade-off: what would a lower median cost? A ticket can be held less, and a short one can go before a long one.

TRADE_ROWS = tuple(row for row in MATRIX if row.name in ("seed/mild3", "seed/het5", "load0.6/het5", "load0.85/mild5"))
LONG_LAST = 5, 20, 80               # times the seconds for which a request keeps the whole cluster busy


def long_last(times):
    """Return a FairShare.charge with which a request starts later by so many times what it costs."""
    charge = sollol.FairShare.charge
    return lambda fair, spec, now, cost_s: charge(fair, spec, now, cost_s) + times * cost_s


TRADES = {**{f"hold {hold:g}": {"HOLD": hold} for hold in (1.0, 1.2, 1.4, sollol.HOLD, 2.0, 3.0, math.inf)},
          **{f"long ones last, {times}": {"FairShare.charge": long_last(times)} for times in LONG_LAST}}


def traded(scenario, way, seed):
    """Return the Figures of one way to choose, or of a rival; some seeds pooled."""
    policy = SOLLOL if way in TRADES else way
    with instead(TRADES.get(way, {})):
        return figures(pooled(scenario, policy, seed))


def tradeoff_table(seed):
    """Return rows of text: mean, P50, P95 and time to the first token for each way, and those of two rivals."""
    ways = RIVALS[1], "central-queue", *TRADES
    results = in_parallel(traded, [((scenario, way), (scenario, way, seed)) for way in ways for scenario in TRADE_ROWS])
    return [["mean / P50 / P95 / TTFT, s", *(scenario.name for scenario in TRADE_ROWS)],
            *([way + ", as SOLLOL does" * (TRADES.get(way) == {"HOLD": sollol.HOLD}), *(
                " / ".join(f"{getattr(results[scenario, way], field):.2f}" for _, field in TOLD_FIGURES)
                for scenario in TRADE_ROWS)] for way in ways)]


# Wrong beliefs: what does it cost if all that the gateway believes at its start is nonsense?

MISLED = tuple(scenario._replace(requests=200, duration_s=40.0) for scenario in (
    seed_scenario("mild5"), seed_scenario("het3"), load_scenario("load0.6", "het5"), load_scenario("load0.6", "hom5"),
    load_scenario("load0.6", "mild5")))
MISLED_MOST = 1.15                  # times least-inflight's mean latency
IDLE_MOST_S = 6.0                   # of a card beside a waiting request, in nine of ten seeds
LOOK_S = 0.25


def mislead(dispatcher, rng):
    """Let a dispatcher believe speeds up to 100 times off, any number of slots, and lengths up to 50 times off."""
    for node in dispatcher.cluster.nodes.values():
        for runner in node.runners.values():
            runner.speeds.decode_s = runner.decode_s() * 100 ** rng.uniform(-1, 1)
            runner.speeds.prefill_s = runner.prefill_s() * 100 ** rng.uniform(-1, 1)
            runner.speeds.samples, runner.slots.origin = rng.choice((0, 3, 50)), "learned"
            runner.slots.count = runner.slots.proven = runner.slots.max_proven = rng.randint(1, 8)
            runner.slots.retry_at_s, runner.slots.rejections = 0.0, 0
            runner.speeds.confirmed_s = -math.inf
            lengths = dispatcher.cluster.estimates.lengths[runner.model]
            lengths.mean, lengths.samples = sollol.PRIOR_OUTPUT_TOKENS * 50 ** rng.uniform(-1, 1), rng.choice((0, 50))


async def watch_idle(dispatcher, longest_s):
    """Note in `longest_s`, {node: seconds}, for how long each stood idle beside a waiting request that it could serve.

    Nodes without a card are left out: waiting for a faster node is right there.
    """
    idle_s = collections.Counter()
    while True:
        waiting = {ticket.spec.model for ticket in dispatcher.waiting.tickets}
        for node in dispatcher.cluster.nodes.values():
            idle = node.up and not node.on_cpu and not any(runner.leases for runner in node.runners.values())
            idle_s[node] = idle_s[node] + LOOK_S if idle and waiting & node.rows.keys() else 0.0
            longest_s[node] = max(longest_s[node], idle_s[node])
        await asyncio.sleep(LOOK_S)


async def run_misled(scenario, seed):
    """Run a scenario through a gateway with wrong beliefs; return (Run, longest time that a card was idle in vain)."""
    longest_s = collections.Counter()
    async with running_nodes(scenario, seed) as nodes, gateway_before(scenario, nodes, SOLLOL, seed) as gateway:
        mislead(gateway.dispatcher, random.Random(seed))
        watching = asyncio.create_task(watch_idle(gateway.dispatcher, longest_s))
        try:
            run = await run_works(scenario, SOLLOL, seed, gateway.listener.address, nodes)
            return run, max(longest_s.values())
        finally:
            watching.cancel()


class Misled(NamedTuple):
    """What wrong beliefs of one seed cost."""

    scenario: str
    ratio: float                    # mean latency over that of least-inflight
    failed: int                     # requests
    idle_s: float                   # longest that a card stood idle beside a waiting request


def misled(seed):
    """Return the Misled of one seed."""
    scenario = MISLED[seed % len(MISLED)]
    rival, = simulate(scenario, seed, RIVALS[1:])
    run, idle_s = run_virtual(run_misled(scenario, seed))
    failed = sum(not sample.ok for sample in run.samples)
    return Misled(scenario.name, figures(run).mean_s / figures(rival).mean_s, failed, idle_s)


def misled_held(first, count):
    """Run seeds of wrong beliefs; print what they cost and tell whether it was little every time."""
    with concurrent.futures.ProcessPoolExecutor() as pool:
        seeds = list(pool.map(misled, range(first, first + count)))
    ratios, idle_s = sorted(seed.ratio for seed in seeds), sorted(seed.idle_s for seed in seeds)
    worst, failed = max(seeds, key=lambda seed: seed.ratio), sum(seed.failed for seed in seeds)
    print(f"{count} seeds of wrong beliefs: mean of least-inflight's x{share_of(ratios, 0.5):.2f} in the median, "
          f"x{worst.ratio:.2f} at the most ({worst.scenario}); {failed} requests failed; the longest that a card stood "
          f"idle beside waiting requests: {share_of(idle_s, 0.5):.1f} s in the median, {share_of(idle_s, 0.9):.1f} s "
          f"in nine of ten seeds, {idle_s[-1]:.1f} s at the most")
    return worst.ratio <= MISLED_MOST and not failed and share_of(idle_s, 0.9) <= IDLE_MOST_S


# Mismatch: what if nodes are not as simulation and gateway both take them to be? One assumption moves at a time.

class Assumption(NamedTuple):
    """Something of the simulation that routing may rely on, and how it moves."""

    name: str
    usual: str                      # as it is
    moved: dict                     # {value, as text: {path in this module, or field of Scenario: what stands there}}
    where: str = "seed|load|models5"        # pattern of scenarios in which that can matter


def machines(drawn=drawn_machine, **fields):
    """Return what lets all machines have some figures in common, the others drawn as ever."""
    return {"drawn_machine": lambda seed: drawn(seed)._replace(**fields)}


def written_with(*chars_per_token):
    """Return what gives a prompt so many characters per token; prompts take turns if there are several."""
    return {"FILLERS": tuple("lorem ipsum dolor"[:2 * count - 1] + " " for count in chars_per_token)}


def of_lengths(change):
    """Return what changes the token pairs of all kinds of requests."""
    return {"LENGTHS": {name: change(pairs) for name, pairs in LENGTHS.items()}}


def spread(power):
    """Return what raises the answers' lengths to a power; their mean over a conversation stays."""
    outputs = [output for _, output in CONVERSATION_PAIRS]
    scale = sum(outputs) / sum(output ** power for output in outputs)
    return of_lengths(lambda pairs: [(prompt, max(1, round(scale * output ** power))) for prompt, output in pairs])


def shuffled(pairs):
    """Return the same prompts and answers, each with any other."""
    outputs = [output for _, output in pairs]
    random.Random(0).shuffle(outputs)
    return [(prompt, output) for (prompt, _), output in zip(pairs, outputs, strict=True)]


def with_slots(**slots):
    """Return what gives kinds of hardware other numbers of slots; the load stays the same share of the capacity."""
    return {"HARDWARE": {name: one._replace(slots=slots.get(name, one.slots)) for name, one in HARDWARE.items()}}


def longest_idle(engine):
    """Return the runner that was used least recently, an idle one first."""
    return min(engine.runners.values(), key=lambda runner: (runner.users > 0, runner.used_s))


def in_ram(gigabytes, nodes_of=cluster_nodes):
    """Return what lets each runner keep so much of earlier prompts in RAM."""
    def nodes(scenario, seed):
        found = nodes_of(scenario, seed)
        for node in found:
            node.traits = node.engine.traits = node.traits._replace(prompt_cache_gb=gigabytes)
        return found
    return {"cluster_nodes": nodes}


ASSUMPTIONS = (
    Assumption("b requests at once do b^x of one", "x 0.5 to 0.9", {
        f"x {exponent:g}": machines(exponent=exponent) for exponent in (0.4, 1.0)}),
    Assumption("overhead of a request", "10 to 200 ms", {
        f"{1000 * overhead_s:g} ms": machines(overhead_s=overhead_s) for overhead_s in (0.01, 0.2)}),
    Assumption("times of loads", "x0.5 to 2", {
        f"x{factor:g}": machines(load_factor=factor) for factor in (0.2, 5.0)}, "models5"),
    Assumption("characters per token", "4.5", {
        **{f"{count}": written_with(count) for count in (1, 8)}, "1 or 8": written_with(1, 8)}),
    Assumption("noise of speeds", "8 %", {f"{noise:.0%}": {"NODE_NOISE": noise} for noise in (0.0, 0.5)}),
    Assumption("a prompt lets others go on after", "1024 tokens", {
        f"{count}": {"PROMPT_BATCH": count} for count in (128, 8192)}),
    Assumption("a token is slower per 1,000 of prompt", "by 0 %", {
        f"by {slows:.0%}": {"CONTEXT_SLOWS": slows} for slows in (0.1, 0.3)}),
    Assumption("slots", "4, 2 of the slower", {
        "1": with_slots(rtx4090=1, rtx3090=1, rtx3060=1, m2=1), "8": with_slots(rtx4090=8, rtx3090=8, rtx3060=8, m2=8),
        "1, 8 of the slower": with_slots(rtx4090=1, rtx3090=1, rtx3060=8, m2=8)}),
    Assumption("answers' lengths", "as traced", {
        "all alike": spread(0), "squared": spread(2), "not told by the prompt": of_lengths(shuffled)}),
    Assumption("latency of the network", "0.5 ms", {
        f"{1000 * latency_s:g} ms": {"latency_s": latency_s} for latency_s in (0.04, 0.15)}),
    Assumption("k models at once do k^y of one", "y 0", {
        f"y {exponent:g}": {"SHARING_EXPONENT": exponent} for exponent in (-0.3, 0.5)}, "models5"),
    Assumption("a load evicts", "the shortest keep-alive", {
        "the longest idle": {"Engine._victim": longest_idle}}, "models5"),
    Assumption("a prompt's cache in VRAM", "as llama3.1", {
        f"x{factor:g}": {"KV_GB_PER_TOKEN": factor * KV_GB_PER_TOKEN} for factor in (0.25, 4)}, "models5"),
    Assumption("earlier prompts kept in RAM", "0 GB", {f"{size} GB": in_ram(size) for size in (1, 8)}, "chat"),
)
MISMATCHED = (DEFAULT, load_scenario("load0.6", "mild5"), load_scenario("models5", "mild5", models=FIVE_MODELS),
              load_scenario("chat", "mild5", chat=True)._replace(requests=240))
MISMATCH_SEEDS = 3                  # in the median
GAIN = 0.9                          # times least-inflight's figure at the most: a gain that must not become a loss
USUAL = Assumption("nothing moves", "", {"": {}})


def mismatched(scenario, assumption, value, seed):
    """Return {policy: Figures} of a scenario where an assumption has another value: SOLLOL's, and its rivals'."""
    moved = assumption.moved[value]
    scenario = scenario._replace(**{name: moved[name] for name in moved.keys() & set(Scenario._fields)})
    rivals = ["central-queue", *(["resident-first"] if len(scenario.models) > 1 else [])]
    with instead({path: moved[path] for path in moved.keys() - set(Scenario._fields)}, sys.modules[__name__]):
        return {run.policy: figures(run) for run in simulate(scenario, seed, (RIVALS[1], *rivals, SOLLOL))}


def mismatched_by_name(scenario, name, value, seed):
    """Do the same in another process, to which a replacement cannot be sent."""
    assumption = next((one for one in ASSUMPTIONS if one.name == name), USUAL)
    return mismatched(scenario, assumption, value, seed)


class Standing(NamedTuple):
    """SOLLOL's figures over others', each the median of some seeds."""

    mean: float                     # over least-inflight's
    p95: float
    best_mean: float                # over the best rival's
    best_p95: float

    def __str__(self):
        return " ".join(f"{(ratio - 1) * 100:+.0f}" for ratio in self) + " %"


def standing(seeds):
    """Return the Standing of SOLLOL by [{policy: Figures}] of some seeds."""
    def ratio(of, field):
        return statistics.median(getattr(one[SOLLOL], field) / of(getattr(figures, field) for policy, figures
                                 in one.items() if policy != SOLLOL) for one in seeds)
    return Standing(ratio(next, "mean_s"), ratio(next, "p95_s"), ratio(min, "mean_s"), ratio(min, "p95_s"))


def lost_gains(standings, scenarios):
    """Return a text for each gain over least-inflight that becomes a loss when an assumption moves.

    `standings`: {(scenario's name, assumption's name, value): Standing}.
    """
    return [f"{name} {value}, {scenario.name}: {field} {change_text(getattr(usual, field), 1)} becomes "
            f"{change_text(getattr(moved, field), 1)}"
            for scenario in scenarios if (usual := standings.get((scenario.name, USUAL.name, "")))
            for (where, name, value), moved in standings.items() if where == scenario.name
            for field in ("mean", "p95") if getattr(usual, field) < GAIN and getattr(moved, field) > 1]


def mismatch_table(standings, scenarios, assumptions):
    """Return rows of text: each assumption, its values, and how SOLLOL stands there in each scenario."""
    def row(name, text, value):
        found = [standings.get((scenario.name, name, value)) for scenario in scenarios]
        return [text, value, *(str(one) if one else "" for one in found)] if any(found) else None

    rows = [["mean, P95 to least-inflight, to the best", "", *(scenario.name for scenario in scenarios)],
            row(USUAL.name, USUAL.name, "")]
    for one in assumptions:
        texts = itertools.chain([f"{one.name} ({one.usual})"], itertools.repeat(""))
        rows += [row(one.name, next(texts), value) for value in one.moved]
    return [one for one in rows if one]


def mismatch_held(scenarios, pattern, seed):
    """Move each assumption whose name has the pattern; print how SOLLOL stands, and tell whether it keeps its gains."""
    chosen = [one for one in ASSUMPTIONS if re.search(pattern, one.name)]
    if not chosen:
        raise BadArgument(f"no assumption matches {pattern!r}; there are: {'; '.join(one.name for one in ASSUMPTIONS)}")
    keys = [(scenario, one.name, value, number) for one in (USUAL, *chosen) for scenario in scenarios
            if re.search(one.where, scenario.name) and (one is not USUAL or any(
                re.search(other.where, scenario.name) for other in chosen))
            for value in one.moved for number in range(seed, seed + MISMATCH_SEEDS)]
    jobs = [((scenario.name, *rest), (scenario, *rest)) for scenario, *rest in keys]
    results, seeds = in_parallel(mismatched_by_name, jobs), collections.defaultdict(list)
    for (scenario, name, value, _), found in results.items():
        seeds[scenario, name, value].append(found)
    standings = {key: standing(found) for key, found in seeds.items()}
    print(aligned(mismatch_table(standings, scenarios, chosen)))
    lost = lost_gains(standings, scenarios)
    print("\n" + ("a gain of over 10 % becomes a loss: " + "; ".join(lost) if lost else
                  "no assumption turns a gain of over 10 % into a loss"))
    return not lost


async def one_by_one(scenario, hardware, seed):
    """Return how long the requests of a scenario take one after the other on one node of some hardware."""
    node = await SimNode(hardware, scenario.models, loaded=scenario.models, noise=0.08, seed=seed,
                         latency_s=scenario.latency_s, tokens_per_line=16, context=BENCH_CONTEXT).start()
    caller, loop = Caller("127.0.0.1", node.port), asyncio.get_running_loop()
    start_s = loop.time()
    for work in make_work(scenario, seed):
        await make_request(caller, work, loop.time(), math.inf)
    caller.close()
    await node.stop()
    return loop.time() - start_s


def makespan_bound_s(scenario, seed):
    """Return a lower bound of the time to the last answer: all work pooled, or the longest request alone.

    At mean speed: the nodes' noise of 8 % can undercut it a little.
    """
    nodes, works = cluster_nodes(scenario, seed), make_work(scenario, seed)
    longest_s = max(fastest_solo_s(nodes, work) for work in works)
    return max(sum(pooled_s(nodes, work) for work in works), longest_s)


def agents_table(counts, clusters, seed):
    """Return rows of text: makespan of parallel agents against the same calls one after the other."""
    rows = [["agents/cluster", "one by one, fastest", "median node", *RIVALS, "SOLLOL", "to fastest", "to median",
             "bound s"]]
    for count in counts:
        for cluster in clusters:
            scenario = Scenario(f"fan{count}/{cluster}", cluster, arrivals="at once", requests=count, timeout_s=600.0)
            names = sorted(CLUSTERS[cluster], key=lambda name: -HARDWARE[name].decode_tok_s)
            fastest_s, median_s = (run_virtual(one_by_one(scenario, name, seed))
                                   for name in (names[0], names[len(names) // 2]))
            spans_s = [run.elapsed_s for run in simulate(scenario, seed)]
            rows.append([scenario.name, *(f"{span_s:.1f} s" for span_s in (fastest_s, median_s, *spans_s)),
                         f"{fastest_s / spans_s[-1]:.1f}x", f"{median_s / spans_s[-1]:.1f}x",
                         f"{makespan_bound_s(scenario, seed):.1f}"])
            say(f"{scenario.name} done")
    return rows


# ------------------------------------------------------------------------------------------------------------
# Coding agents: is a conversation that grows sent back to the node that has it?
#
# An agent's turn sends all before it along: a system prompt and tools of 8,000 tokens that all agents of a program
# share, then what tools have answered, up to 60,000 tokens. Chats of people run beside. A node's cache holds what
# its slots had last.
# ------------------------------------------------------------------------------------------------------------

AGENTS_MODEL = "llama3.1:8b"
CODING_TERMS = "prefix affinity", "kept caches", "lengths by kind"      # of ABLATIONS
LEAD_TOKENS, LAST_TOKENS, TURNS = 8_000, 60_000, 40
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {
    "path": {"type": "string"}}}}} for name in ("read", "edit", "search", "run")]


class CodingRun(NamedTuple):
    """What one policy made of agents and of the chats beside them."""

    turns: Figures
    chats: Figures
    prefilled_tokens: int
    refused: int                    # answers 400


async def agent_turns(caller, number, rng):
    """Let an agent make its turns, with a few seconds for its tools between them; return the Samples."""
    loop, samples = asyncio.get_running_loop(), []
    messages = [{"role": "system", "content": worded("You are an agent. ", LEAD_TOKENS)},
                {"role": "user", "content": worded(f"Task {number}: ", 200)}]
    await asyncio.sleep(rng.uniform(0, 20))
    for turn in range(TURNS):
        output_tokens = rng.choice((60, 90, 150, 300))
        asked = {"role": "tool", "content": f"<out={output_tokens}> result {number} {turn}: "}
        body = json.dumps({"model": AGENTS_MODEL, "messages": [*messages, asked], "tools": TOOLS, "stream": True})
        work = Work(turn, 0.0, "", 0, output_tokens)
        samples.append(await make_request(caller, work, loop.time(), 600.0, body.encode()))
        answer = worded(f"answer {number} {turn} ", output_tokens)
        result = worded(f"file {number} {turn} ", (LAST_TOKENS - LEAD_TOKENS) // TURNS - output_tokens)
        messages += [asked, {"role": "assistant", "content": answer}, {"role": "tool", "content": result}]
        await asyncio.sleep(rng.expovariate(1 / 3.0))
    return samples


async def run_coding(agents, cluster, policy, seed):
    """Run agents and chats under one policy; return the CodingRun."""
    scenario = Scenario(f"coding{agents}/{cluster}", cluster, models=(AGENTS_MODEL,))
    rng = random.Random(f"{scenario.name} {seed}")
    at_s, chats = 0.0, []
    while at_s < 300.0:
        at_s += rng.expovariate(0.2)
        chats.append(Work(len(chats), at_s, AGENTS_MODEL, *pick_lengths(rng, "conversation")))
    async with running_nodes(scenario, seed) as nodes, gateway_before(scenario, nodes, policy, seed) as gateway:
        names = (None, *(f"agent-{number}" for number in range(agents)))       # the first one is for chats
        callers = [Caller(*gateway.listener.address, id_of=id_for(policy, name)) for name in names]
        try:
            seen, *turns = await asyncio.gather(
                open_loop(callers[0], chats, 600.0),
                *(agent_turns(caller, number, random.Random(f"{seed} {number}"))
                  for number, caller in enumerate(callers[1:])))
        finally:
            for caller in callers:
                caller.close()
        samples = [sample for some in turns for sample in some]
        return CodingRun(figures(Run(policy, samples, 1.0)), figures(Run(policy, seen, 1.0)),
                         sum(node.engine.prefilled_tokens for node in nodes),
                         sum(sample.status == 400 for sample in (*samples, *seen)))


def run_coding_without(count, cluster, policy, seed, without=None):
    """Run agents and chats under one policy, perhaps without a term of routing; return the CodingRun."""
    with switched_off(without):
        return run_virtual(run_coding(count, cluster, policy, seed))


def coding_table(counts, clusters, seed):
    """Return rows of text: what agents and the chats beside them see, by policy, and without prefix affinity."""
    policies = {**{policy: (policy,) for policy in (*RIVALS, *told_rivals([AGENTS_MODEL], agents=True))},
                "SOLLOL": (SOLLOL,), **{f"SOLLOL, no {term}": (SOLLOL, term) for term in CODING_TERMS}}
    jobs = [((f"{count}/{cluster}", name), (count, cluster, policy, seed, *without))
            for count in counts for cluster in clusters for name, (policy, *without) in policies.items()]
    rows = [["agents/cluster", "policy", "s per turn", "P95", "first byte", "prefilled", "400s", "chats: first byte",
             "P95"]]
    results = in_parallel(run_coding_without, jobs)
    for name, _ in jobs:
        if run := results.get(name):
            rows.append([*name, f"{run.turns.mean_s:.2f} s", f"{run.turns.p95_s:.2f} s", f"{run.turns.ttft_s:.2f} s",
                         f"{run.prefilled_tokens / 1e6:.2f} M", str(run.refused),
                         f"{run.chats.ttft_s:.2f} s", f"{run.chats.p95_s:.2f} s"])
    return rows


# ------------------------------------------------------------------------------------------------------------
# Gateways: what do two of them make of the same nodes, and what if one dies?
#
# Clients in a closed loop, half of them at each gateway; those of the second begin later, when the first has learned
# all slots. Measured from a minute after that on. Then the second dies, and its clients go to the first. One gateway
# alone gets the same clients at the same times. Two with --peer know of each other.
# ------------------------------------------------------------------------------------------------------------

ALONE_S, FAIR_S, SHARED_S, TAKEN_S, SURVIVED_S = 60.0, 60.0, 120.0, 30.0, 60.0    # phases, one after the other
RETRY_S = 0.2                       # a client whose gateway has died asks again so much later


class TwinRun(NamedTuple):
    """What gateways before the same nodes made of their clients."""

    shared: Figures                 # of all clients, while both lived
    survived: Figures               # from TAKEN_S after the death on
    counts: tuple[int, ...]         # requests answered by each gateway while both lived
    means_s: tuple[float, ...]
    lost: int                       # requests that failed although their client asked again


async def twin_client(callers, works, number, until_s, samples):
    """Make requests one after the other at the client's own gateway, and at the next one for good when that fails.

    Adds (number of the gateway, Sample) to `samples`.
    """
    loop = asyncio.get_running_loop()
    while loop.time() < until_s:
        work, begun_s = next(works), loop.time()
        for _ in range(10):
            own = number % len(callers)
            sample = await make_request(callers[own], work, begun_s, 600.0)
            if sample.ok:
                break
            number += 1
            await asyncio.sleep(RETRY_S)
        samples.append((own, sample))


async def run_twins(scenario, count, seed, peers):
    """Run a scenario's clients through `count` gateways, the last of which dies in the end; return the TwinRun.

    `peers`: they know of each other.
    """
    async with running_nodes(scenario, seed) as nodes, contextlib.AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(gateway_before(scenario, nodes, SOLLOL, seed + number))
                    for number in range(count)]
        callers = [Caller(*gateway.listener.address) for gateway in gateways]
        for gateway in gateways if peers else ():
            gateway.options.peer = [sollol.parse_peer(f"http://{caller.host}:{caller.port}") for caller in callers]
            gateway.join()
        loop, works, samples = asyncio.get_running_loop(), iter(make_work(scenario, seed)), []
        first_s = loop.time()
        shared_s = first_s + ALONE_S + FAIR_S
        dies_s = shared_s + SHARED_S
        taken_s = dies_s + TAKEN_S
        until_s = taken_s + SURVIVED_S

        async def client(number):
            await asyncio.sleep(ALONE_S * (number % 2))
            await twin_client(callers, works, number, until_s, samples)

        async def death():
            await asyncio.sleep(dies_s - loop.time())
            if count > 1:
                await gateways[-1].stop()

        await asyncio.gather(death(), *(client(number) for number in range(scenario.clients)))
        for caller in callers:
            caller.close()
        within = [[sample for one, sample in samples if one == own and shared_s <= sample.end_s < dies_s]
                  for own in range(count)]
        after = [sample for _, sample in samples if taken_s <= sample.end_s < until_s]
        return TwinRun(
            figures(Run(SOLLOL, [sample for some in within for sample in some], SHARED_S)),
            figures(Run(SOLLOL, after, SURVIVED_S)),
            tuple(len(some) for some in within),
            tuple(sum(sample.latency_s for sample in some) / max(1, len(some)) for some in within),
            sum(not sample.ok for _, sample in samples))


def simulate_twins(scenario, count, seed, peers=False):
    """Return the TwinRun of so many gateways, in virtual time."""
    return run_virtual(run_twins(scenario, count, seed, peers))


def twin_scenarios(clusters):
    """Return the scenarios for gateways before the same nodes."""
    return [Scenario(f"{clients} clients, {len(models)} model{'s' * (len(models) > 1)}/{cluster}", cluster, "mixed",
                     clients, models=models, timeout_s=600.0)
            for cluster in clusters for models in (SMALL, FIVE_MODELS[:4]) for clients in (20, 24)]


TWINS = {"one": (1, False), "two": (2, False), "two, --peer": (2, True)}       # how many gateways, are they peers?


def twins_table(clusters, pattern, rounds, seed):
    """Return rows of text: two gateways beside one, for every scenario whose name has the pattern."""
    scenarios = [scenario for scenario in twin_scenarios(clusters) if re.search(pattern, scenario.name)]
    jobs = [((scenario.name, seed + turn, name), (scenario, count, seed + turn, peers))
            for scenario in scenarios for turn in range(rounds) for name, (count, peers) in TWINS.items()]
    results = in_parallel(simulate_twins, jobs)
    rows = [["clients, models/cluster", "seed", "gateways", "req/s", "", "P95 s", "", "split", "mean s",
             "one dies: req/s", "", "lost"]]
    for scenario, turn, name in itertools.product(scenarios, range(rounds), TWINS):
        one, run = (results.get((scenario.name, seed + turn, which)) for which in ("one", name))
        if one and run:
            rows.append([scenario.name, str(seed + turn), name,
                         f"{run.shared.per_s:.2f}", change_text(run.shared.per_s, one.shared.per_s),
                         f"{run.shared.p95_s:.2f}", change_text(run.shared.p95_s, one.shared.p95_s),
                         ":".join(map(str, run.counts)), " / ".join(f"{mean_s:.2f}" for mean_s in run.means_s),
                         f"{run.survived.per_s:.2f}", change_text(run.survived.per_s, one.survived.per_s),
                         str(run.lost)])
    return rows


def read_trace(path):
    """Return the token pairs of a trace: CSV with context_tokens and generated_tokens. Raises BadArgument."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            pairs = [(int(row["context_tokens"]), int(row["generated_tokens"])) for row in csv.DictReader(file)]
    except OSError as error:
        raise BadArgument(f"{path}: {error.strerror}") from None
    except (KeyError, ValueError, TypeError):
        raise BadArgument(f"{path}: not a CSV with the columns context_tokens and generated_tokens") from None
    if not pairs:
        raise BadArgument(f"{path}: it has no rows")
    return pairs


def agree(scenario, runs, seed):
    """Print the wall clock's means over the virtual clock's: both must be equal within noise."""
    print("\nMean latency on the wall clock, over the virtual clock's:")
    for run, other in zip(runs, simulate(scenario, seed), strict=True):
        print(f"  {run.policy}: x{figures(run).mean_s / figures(other).mean_s:.2f}")


def compare(options):
    """Compare all policies on the default scenario, or another one."""
    try_outputs(options)
    named = {scenario.name: scenario for scenario in MATRIX}
    scenario = named.get(options.scenario)
    if scenario is None:
        raise BadArgument(f"there is no scenario {options.scenario!r}; there are {' '.join(named)}")
    if options.trace:
        scenario = scenario._replace(name="trace", clients=0, load=0.6, lengths="trace")
        LENGTHS["trace"] = read_trace(options.trace)
    runs = []
    try:
        for policy in (*RIVALS, *(() if options.realtime else told_rivals(scenario.models)), SOLLOL):
            if options.realtime:
                runs.append(asyncio.run(run_in_real_time(scenario, policy, options.seed)))
            else:
                runs += simulate(scenario, options.seed, (policy,))
            say(f"{policy} done")
    except KeyboardInterrupt:
        say("stopped")
    if runs:
        finish(options, scenario, runs, bound_s(scenario, options.seed))
    if options.realtime and len(runs) == 3:
        agree(scenario, runs, options.seed)
    return 0


# ------------------------------------------------------------------------------------------------------------
# Check: are the claims true, and has routing become worse?
#
# The claims are those published for this kind of gateway and never measured: mean latency -38 %, P95 -50 %,
# throughput +52 %, success no lower, agents four times as fast. They can only be true of unequal nodes. The rest
# guards routing itself; limits leave room for what a seed can change.
# ------------------------------------------------------------------------------------------------------------

class Claim(NamedTuple):
    text: str
    scenario: Scenario
    against: str                    # a policy
    figure: str
    limit: float                    # of SOLLOL's figure over the other's: the most, for per_s and success the least


CLAIMS = (
    Claim("mean latency -38 % on unequal nodes", DEFAULT, "round-robin", "mean_s", 0.62),
    Claim("P95 latency -50 % on unequal nodes", DEFAULT, "round-robin", "p95_s", 0.50),
    Claim("requests/s +52 % on unequal nodes", DEFAULT, "round-robin", "per_s", 1.52),
    Claim("success no lower on unequal nodes", DEFAULT, "round-robin", "success", 1.0),
    Claim("no worse than least-inflight in the mean", DEFAULT, "least-inflight", "mean_s", 1.03),
    Claim("P95 well below least-inflight's", DEFAULT, "least-inflight", "p95_s", 0.75),
    Claim("no loss on equal nodes", seed_scenario("hom5"), "least-inflight", "mean_s", 1.06),
    Claim("open loop, unequal: mean below least-inflight's", load_scenario("load0.6", "mild5", requests=300),
          "least-inflight", "mean_s", 0.85),
    Claim("five models on ten equal nodes: mean far below round-robin's",
          load_scenario("models5", "hom10", models=FIVE_MODELS, requests=300), "round-robin", "mean_s", 0.45),
    Claim("a hung node: mean below least-inflight's", load_scenario("hang", "mild5", fault="hang", requests=300),
          "least-inflight", "mean_s", 0.9),
)
URGENT = load_scenario("prio", "mild5", arrivals="burst", urgent=0.1, requests=300)
URGENT_CLAIM = 0.5                  # P95 of the 10 % urgent in bursts, over that of the others
AGENTS_CLAIM = 4.0                  # 10 agents at once on five equal nodes, against one by one on one of them


def urgent_share(seed):
    """Return the P95 of the urgent requests in bursts over that of the others, both SOLLOL's; some seeds pooled.

    Thirty of a run are urgent: the P95 of one is off by a fifth, that of three together by a tenth.
    """
    run = pooled(URGENT, SOLLOL, seed, 6)
    urgent, rest = (figures(run, lambda sample, is_urgent=is_urgent: (sample.priority > 5) == is_urgent).p95_s
                    for is_urgent in (True, False))
    return urgent / rest


def claim_held(held, text):
    """Print a line for a claim; return whether it holds."""
    print(f"{'held' if held else 'MISSED'}  {text}", flush=True)
    return held


def check_claims(seed):
    """Print a line per claim; return whether all hold."""
    runs, held = {}, []
    for claim in CLAIMS:
        if claim.scenario not in runs:
            runs[claim.scenario] = {run.policy: figures(run) for run in simulate(claim.scenario, seed)}
        mine, other = runs[claim.scenario][SOLLOL], runs[claim.scenario][claim.against]
        ratio = getattr(mine, claim.figure) / getattr(other, claim.figure)
        more_is_better = claim.figure in ("per_s", "success")
        held.append(claim_held(ratio >= claim.limit if more_is_better else ratio <= claim.limit,
                               f"{claim.text}: {claim.scenario.name}, {claim.figure} x{ratio:.2f}, at "
                               f"{'least' if more_is_better else 'most'} x{claim.limit:g}"))
    ratio = urgent_share(seed)
    held.append(claim_held(ratio <= URGENT_CLAIM, f"10 % urgent in bursts, P95 against the others': {URGENT.name}, "
                           f"x{ratio:.2f}, at most x{URGENT_CLAIM:g}"))
    scenario = Scenario("fan10/hom5", "hom5", arrivals="at once", requests=10, timeout_s=600.0)
    ratio = run_virtual(one_by_one(scenario, "rtx3060", seed)) / simulate(scenario, seed, (SOLLOL,))[0].elapsed_s
    held.append(claim_held(ratio >= 0.9 * AGENTS_CLAIM, f"10 agents on five equal nodes, against one by one: "
                           f"x{ratio:.2f}, at least x{AGENTS_CLAIM:g} within 10 %"))
    return all(held)


# ============================================================================================================
# The cost of the gateway: `overhead`, `streams`, `decisions`
#
# CPU time, memory and latency of the gateway itself, on the wall clock.
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Weight: what does the gateway cost, beside proxies written in C?
#
# The same requests to the same node through each contender, in turn (A B C A B C), in slices of a second or two, so
# that a change of the machine's speed hits all of them. The node computes nothing: it answers small calls at once and
# streams at a fixed rate, and with it the clients are as light as Python allows, or one would measure them. CPU time is
# the operating system's account of the process. nginx and HAProxy run with one worker, where they are installed; the
# pump is what Python costs at the least: bytes from socket to socket, nothing parsed, nothing decided.
# ------------------------------------------------------------------------------------------------------------

STREAM_S = 5.0                      # how long one lasts
RAMP_S = 1.0                        # over which streams are begun, so that their tokens do not come in step
SLICE_S = 2.0
NODE_SLOTS = 64                     # the most that a line of hosts.txt may say
FULL_LENGTH = re.compile(rb"content-length: *(\d+)", re.I)
LIGHT_TAGS = json.dumps({"models": [{"name": "llama3.2:latest", "model": "llama3.2:latest", "size": 2 * 10**9}]})
LIGHT_ANSWERS = {b"/api/version": b'{"version":"0.33.0"}', b"/api/tags": LIGHT_TAGS.encode(),
                 b"/api/ps": LIGHT_TAGS.encode()}
LIGHT_STATS = (b'"done":true,"done_reason":"stop","total_duration":52000000,"load_duration":1000000,'
               b'"prompt_eval_count":26,"prompt_eval_duration":20000000,"eval_count":9,"eval_duration":30000000}')
LIGHT_LEAD = b'{"model":"llama3.2","created_at":"2026-01-01T00:00:00.000000Z","message":{"role":"assistant","content":"'
LIGHT_OBJECT = LIGHT_LEAD + b'A short answer, all at once."},' + LIGHT_STATS
LIGHT_TOKEN = sollol.chunk(LIGHT_LEAD + b' token"},"done":false}\n')
LIGHT_LAST = sollol.chunk(LIGHT_LEAD + b'"},' + LIGHT_STATS + b"\n") + sollol.LAST_CHUNK


class LightNode(asyncio.Protocol):
    """Answer as an Ollama node, from constants: objects at once, streams of `num_predict` tokens, `gap_ms` apart."""

    answers = LIGHT_ANSWERS

    def connection_made(self, transport):
        self.transport, self.buffer, self.timer = transport, b"", None
        self.loop = asyncio.get_running_loop()

    def connection_lost(self, exc):
        if self.timer:
            self.timer.cancel()

    def data_received(self, data):
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n") + 4
        length = FULL_LENGTH.search(self.buffer, 0, end)
        whole = end + (int(length[1]) if length else 0)
        if end < 4 or len(self.buffer) < whole:
            return
        body, path = self.buffer[end:whole], self.buffer[:end].split(b" ", 2)[1]
        self.buffer = self.buffer[whole:]
        if b'"stream": true' in body:
            self.tokens = int(re.search(rb'"num_predict": (\d+)', body)[1])
            self.gap_s = int(re.search(rb'"gap_ms": (\d+)', body)[1]) / 1000
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
                                 b"Transfer-Encoding: chunked\r\n\r\n" + LIGHT_TOKEN)
            self.due_s = self.loop.time() + self.gap_s
            self.timer = self.loop.call_at(self.due_s, self.token)
        else:
            answer = self.answers.get(path, LIGHT_OBJECT)
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\n"
                                 b"Date: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: %d\r\n\r\n%b" % (
                                     len(answer), answer))

    def token(self):
        self.tokens -= 1
        if self.tokens <= 1:
            self.transport.write(LIGHT_LAST)
            return
        self.transport.write(LIGHT_TOKEN)
        self.due_s += self.gap_s
        self.timer = self.loop.call_at(self.due_s, self.token)


class EndlessNode(LightNode):
    """Stream tokens of another model without end, as fast as they are read."""

    answers = {path: answer.replace(b"llama3.2", b"endless") for path, answer in LIGHT_ANSWERS.items()}
    full = False

    def connection_made(self, transport):
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)

    def token(self):
        while not self.full and not self.transport.is_closing():
            self.transport.write(LIGHT_TOKEN * 64)

    def pause_writing(self):
        self.full = True

    def resume_writing(self):
        self.full = False
        self.loop.call_soon(self.token)


class BlobNode(LightNode):
    """Hash what is uploaded, as Ollama does, and forget it."""

    left = 0

    def data_received(self, data):
        if not self.left and not data.startswith(b"POST /api/blobs/"):
            super().data_received(data)
            return
        if not self.left:
            head, _, data = data.partition(b"\r\n\r\n")
            self.left, self.hashed = int(FULL_LENGTH.search(head)[1]), hashlib.sha256()
        self.hashed.update(data)
        self.left -= len(data)
        if not self.left:
            self.transport.write(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")


class Pump(asyncio.Protocol):
    """Hand bytes on between a client and a node: the least that a proxy in Python can do."""

    def __init__(self, address, other=None):
        self.address, self.other, self.early = address, other, b""

    def connection_made(self, transport):
        self.transport = transport
        if self.other is None:
            loop = asyncio.get_running_loop()
            self.opening = loop.create_task(loop.create_connection(lambda: Pump(None, self), *self.address))
        else:
            self.other.other = self
            transport.write(self.other.early)

    def data_received(self, data):
        if self.other is None:
            self.early += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc):
        if self.other is not None:
            self.other.transport.close()


async def serve_light(protocol, *address):
    """Serve a LightNode or a Pump until killed; print the port."""
    server = await asyncio.get_running_loop().create_server(functools.partial(protocol, *address), "127.0.0.1", 0,
                                                            backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class Calls(asyncio.Protocol):
    """Make one small call after the other on a connection; keep the round-trip times."""

    def __init__(self, requests):
        self.requests, self.times_s, self.buffer = requests, [], b""
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        self.send()

    def send(self):
        self.sent_s = time.perf_counter()
        self.transport.write(next(self.requests))

    def data_received(self, data):
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n") + 4
        length = FULL_LENGTH.search(self.buffer, 0, end)
        if end < 4 or len(self.buffer) < end + int(length[1]):
            return
        if self.buffer[9:12] != b"200":
            raise BadArgument(f"a proxy answered {self.buffer[:200]!r}")
        self.buffer = b""
        self.times_s.append(time.perf_counter() - self.sent_s)
        if not self.over.done():
            self.send()

    def connection_lost(self, exc):
        if not self.over.done():
            self.over.set_exception(exc or BadArgument("a proxy closed its connection"))


class Listening(asyncio.Protocol):
    """Ask for a stream and listen to its end; `over` holds (tokens, gaps between them in seconds)."""

    def __init__(self, request):
        self.request, self.tokens, self.gaps_s, self.last_s, self.tail = request, 0, [], None, b""
        self.loop = asyncio.get_running_loop()
        self.over = self.loop.create_future()

    def connection_made(self, transport):
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data):
        now_s = time.perf_counter()
        if self.last_s is not None:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s
        self.tokens += data.count(b"}\n")
        if data.endswith(b"0\r\n\r\n") and not self.over.done():
            self.over.set_result((self.tokens, self.gaps_s))
            self.transport.close()

    def connection_lost(self, exc):
        if not self.over.done():
            self.over.set_exception(exc or BadArgument("a proxy broke off a stream"))


def post_chat(number, **fields):
    """Return a whole chat request as a client sends it; its size differs from one to the next."""
    content = f"Question {number}: what is the answer?" + " And why?" * (number % 13)
    body = json.dumps({"model": "llama3.2", "messages": [{"role": "user", "content": content}], **fields}).encode()
    return (b"POST /api/chat HTTP/1.1\r\nHost: localhost:8000\r\nAccept: application/json\r\nUser-Agent: light/1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class Cost(NamedTuple):
    """What some traffic through a contender was, and what it cost."""

    rate: float                     # requests, tokens or MiB a second
    cpu_s: float                    # of the contender's process: for a request or token, or for a blob
    time_s: float = 0.0             # median round trip, or P99 gap between tokens
    mib: float = 0.0                # held, or for a blob grown by
    count: int = 0                  # tokens


async def small_calls(contender, connections, span_s):
    """Make small calls for a while; return their Cost."""
    loop = asyncio.get_running_loop()
    requests = itertools.cycle([post_chat(number, stream=False) for number in range(97)])
    start_s, cpu_s = time.perf_counter(), contender.cpu_s()
    callers = [(await loop.create_connection(lambda: Calls(requests), "127.0.0.1", contender.port))[1]
               for _ in range(connections)]
    await asyncio.wait([caller.over for caller in callers], timeout=span_s)
    for caller in callers:
        if caller.over.done():
            caller.over.result()
        caller.over.cancel()
        caller.transport.abort()
    times_s = sorted(itertools.chain.from_iterable(caller.times_s for caller in callers))
    return Cost(len(times_s) / (time.perf_counter() - start_s), (contender.cpu_s() - cpu_s) / len(times_s),
                share_of(times_s, 0.5))


async def many_streams(contender, count, rate):
    """Listen to `count` streams of `rate` tokens/s at once; return their Cost."""
    loop = asyncio.get_running_loop()
    cpu_s, listeners, options = contender.cpu_s(), [], {"num_predict": round(STREAM_S * rate), "gap_ms": 1000 // rate}
    begun_s = time.perf_counter()
    for number in range(count):
        request = post_chat(number, stream=True, options=options)
        listeners.append((await loop.create_connection(functools.partial(Listening, request), "127.0.0.1",
                                                       contender.port))[1])
        await asyncio.sleep(begun_s + RAMP_S * number / count - time.perf_counter())
    held_mib = contender.resident_mib()
    heard = await asyncio.gather(*(listener.over for listener in listeners))
    tokens = sum(tokens for tokens, _ in heard)
    gaps_s = sorted(itertools.chain.from_iterable(gaps for _, gaps in heard))
    return Cost(tokens / (time.perf_counter() - begun_s), (contender.cpu_s() - cpu_s) / tokens, share_of(gaps_s, 0.99),
                held_mib, tokens)


NGINX_CONF = """\
daemon off; master_process off; worker_processes 1; worker_rlimit_nofile 16384;
pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log {folder}/access.log; keepalive_requests 1000000000;
  client_max_body_size 0; proxy_request_buffering off;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream node {{ server 127.0.0.1:{node}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port} backlog=4096;
    location / {{ proxy_pass http://node; proxy_http_version 1.1; proxy_set_header Connection "";
                  proxy_buffering off; }} }}
}}
"""
HAPROXY_CONF = """\
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  http-reuse always
  timeout connect 5s
  timeout client 300s
  timeout server 300s
listen gateway
  bind 127.0.0.1:{port} backlog 4096
  server node 127.0.0.1:{node}
"""


def light_process(stack, name, call):
    """Start a LightNode or a Pump as a process; return its Contender."""
    program = f"import asyncio, bench, sollol; sollol.new_loop(True).run_until_complete({call})"
    process = begin_process(stack, [sys.executable, "-c", program], stdout=subprocess.PIPE)
    return Contender(name, int(process.stdout.readline()), process)


def proxy_process(stack, name, argv, config, node):
    """Start nginx or HAProxy in front of a node, if it is installed; return its Contender or None."""
    if not shutil.which(argv[0], path=os.environ.get("PATH", "") + ":/usr/sbin"):
        return None
    folder, port = stack.enter_context(tempfile.TemporaryDirectory()), free_port()
    path = pathlib.Path(folder, "config")
    path.write_text(config.format(folder=folder, port=port, node=node.port))
    return Contender(name, port, begin_process(stack, [*argv, str(path)], stdout=subprocess.DEVNULL))


def sollol_process(stack, name, node, count, *flags, slots=NODE_SLOTS):
    """Start SOLLOL in front of `count` names of a node; return its Contender."""
    port = free_port()
    argv = [sys.executable, "-m", "sollol", "--port", str(port), "--max-connections", "20000", *flags]
    for number in range(count):
        argv += ["--node", f"http://127.0.0.1:{node.port} name=n{number} slots={slots}"]
    return Contender(name, port, begin_process(stack, argv, stdout=subprocess.DEVNULL))


async def first_answer_s(contender, patience_s=10.0):
    """Wait until a contender just started answers; return how long that took, in seconds. Raises BadArgument."""
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < patience_s:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await Caller("127.0.0.1", contender.port).call(b'{"model": "llama3.2", "messages": [], "stream": false}')
            return time.perf_counter() - start_s
        await asyncio.sleep(0.002)
    raise BadArgument(f"{contender.name} does not answer")


async def contenders(stack, nodes, only=(), kind=LightNode):
    """Start a node and the proxies in front of it: those named in `only`, else all that are installed.

    SOLLOL knows the node by `nodes` names, so that it has slots enough. Return {Contender: seconds until it answered}.
    """
    node = light_process(stack, "node itself", f"bench.serve_light(bench.{kind.__name__})")
    starts = {
        "node itself": lambda name: node,
        "nginx": lambda name: proxy_process(stack, name, ["nginx", "-c"], NGINX_CONF, node),
        "HAProxy": lambda name: proxy_process(stack, name, ["haproxy", "-db", "-f"], HAPROXY_CONF, node),
        "pump": lambda name: light_process(stack, name, f"bench.serve_light(bench.Pump, ('127.0.0.1', {node.port}))"),
        "SOLLOL": lambda name: sollol_process(stack, name, node, nodes)}
    if importlib.util.find_spec("uvloop"):
        starts["on asyncio"] = lambda name: sollol_process(stack, name, node, nodes, "--no-uvloop")
    started = {}
    for name in only or starts:
        if contender := starts[name](name):
            started[contender] = await first_answer_s(contender)
    return started


async def in_turn(contenders, rounds, *measures):
    """Take every measure of one contender after the other, so many rounds; return {name: [Cost]} for each measure."""
    tables = [collections.defaultdict(list) for _ in measures]
    for turn in range(rounds):
        for contender in contenders:
            for costs, measure in zip(tables, measures, strict=True):
                costs[contender.name].append(await measure(contender))
        say(f"{turn + 1} of {rounds} rounds")
    return tables


def middle(values):
    """Return the median."""
    return share_of(sorted(values), 0.5)


def median_cost(costs, field):
    """Return the median over rounds of a field of Cost."""
    return middle(getattr(cost, field) for cost in costs)


def ratios_to(costs, base, field):
    """Return {name: median over rounds of a field over that of `base` in the same round}."""
    return {name: middle(getattr(cost, field) / getattr(other, field) for cost, other
                         in zip(costs[name], costs[base], strict=True)) for name in costs}


def run_quick(coroutine):
    """Run a coroutine on uvloop, if it is there."""
    with asyncio.Runner(loop_factory=lambda: sollol.new_loop(True)) as runner:
        return runner.run(coroutine)


def base_of(runs):
    """Return the name of the contender that the others are held against."""
    return next(name for name in ("nginx", "HAProxy", "pump") if name in runs)


async def measure_weight(rounds, span_s=SLICE_S):
    """Measure small calls through every contender, in turn; return rows of text."""
    with contextlib.ExitStack() as stack:
        many, one = await in_turn(await contenders(stack, nodes=3), rounds,
                                  lambda contender: small_calls(contender, 32, span_s),
                                  lambda contender: small_calls(contender, 1, span_s / 2))
    base = base_of(many)
    rates, trips = ratios_to(many, base, "rate"), ratios_to(one, base, "time_s")
    rows = [["small POST", "32 clients: /s", f"to {base}", "CPU us", "1 client: us", f"to {base}", "CPU us"]]
    for name in many:
        rows.append([name, f"{median_cost(many[name], 'rate'):.0f}", f"x{rates[name]:.2f}",
                     f"{median_cost(many[name], 'cpu_s') * 1e6:.0f}", f"{median_cost(one[name], 'time_s') * 1e6:.0f}",
                     f"x{trips[name]:.2f}", f"{median_cost(one[name], 'cpu_s') * 1e6:.0f}"])
    return rows


async def measure_streams(count, rate, rounds):
    """Measure `count` concurrent streams of `rate` tokens/s through every contender, in turn; return rows of text."""
    with contextlib.ExitStack() as stack:
        started = await contenders(stack, nodes=-(-count // NODE_SLOTS))
        idle = {contender.name: (start_s, contender.resident_mib()) for contender, start_s in started.items()}
        seen, = await in_turn(started, rounds, lambda contender: many_streams(contender, count, rate))
    base = base_of(seen)
    ratios, own_s = ratios_to(seen, base, "cpu_s"), median_cost(seen["node itself"], "time_s")
    rows = [[f"{count} streams, {rate}/s each", "tokens", "CPU us a token", f"to {base}", "P99 gap ms", "over node's",
             "start s", "MiB idle", "MiB"]]
    for name, costs in seen.items():
        gap_s = median_cost(costs, "time_s")
        rows.append([name, str(sum(cost.count for cost in costs)), f"{median_cost(costs, 'cpu_s') * 1e6:.1f}",
                     f"x{ratios[name]:.2f}", f"{gap_s * 1000:.1f}", f"{(gap_s - own_s) * 1000:+.1f}",
                     f"{idle[name][0]:.2f}", f"{idle[name][1]:.0f}", f"{max(cost.mib for cost in costs):.0f}"])
    return rows


class Customer(Listening):
    """Ask for one stream after the other on a connection."""

    def data_received(self, data):
        self.tokens += data.count(b"}\n")
        if data.endswith(b"0\r\n\r\n"):
            self.transport.write(self.request)


async def crowd_cost(contender, customers, rate, span_s):
    """Wait until a contender answers, and let `customers` ask it for streams without end; return their Cost."""
    await first_answer_s(contender)
    loop = asyncio.get_running_loop()
    options = {"num_predict": round(STREAM_S * rate), "gap_ms": 1000 // rate}
    crowd = [(await loop.create_connection(functools.partial(Customer, post_chat(number, stream=True, options=options)),
                                           "127.0.0.1", contender.port))[1] for number in range(customers)]
    await asyncio.sleep(STREAM_S)
    tokens, cpu_s, start_s = sum(one.tokens for one in crowd), contender.cpu_s(), time.perf_counter()
    await asyncio.sleep(span_s)
    tokens = sum(one.tokens for one in crowd) - tokens
    cost = Cost(tokens / (time.perf_counter() - start_s), (contender.cpu_s() - cpu_s) / tokens,
                mib=contender.resident_mib())
    for one in crowd:
        one.over.cancel()
        one.transport.abort()
    return cost


async def measure_waiting(streams, rate, waiting, rounds):
    """Measure what a long queue and many nodes cost the streams that run; return rows of text."""
    with contextlib.ExitStack() as stack:
        node = light_process(stack, "node itself", "bench.serve_light(bench.LightNode)")
        flags = "--max-queue", str(waiting + streams), "--queue-timeout", "100000", "--log-level", "warning"
        least = -(-streams // NODE_SLOTS)
        few = sollol_process(stack, f"{least} nodes, nobody waits", node, least, *flags)
        many = sollol_process(stack, f"50 nodes, {waiting} wait", node, 50, *flags, slots=-(-streams // 50))
        seen, = await in_turn((few, many), rounds, lambda contender: crowd_cost(
            contender, streams + (waiting if contender is many else 0), rate, 2 * STREAM_S))
    ratios = ratios_to(seen, few.name, "cpu_s")
    rows = [[f"{streams} streams, {rate}/s each", "tokens/s", "CPU us a token", "to the first", "MiB"]]
    for name, costs in seen.items():
        rows.append([name, f"{median_cost(costs, 'rate'):.0f}", f"{median_cost(costs, 'cpu_s') * 1e6:.1f}",
                     f"x{ratios[name]:.2f}", f"{max(cost.mib for cost in costs):.0f}"])
    return rows


BLOB_MIB = 1024


def upload_s(port):
    """Upload a blob; return how long that took, in seconds. Raises BadArgument."""
    block, start_s = bytes(2**20), time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /api/blobs/sha256:%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (
            b"0" * 64, BLOB_MIB * len(block)))
        for _ in range(BLOB_MIB):
            connection.sendall(block)
        if connection.recv(4096)[9:12] != b"201":
            raise BadArgument("a blob was not taken")
    return time.perf_counter() - start_s


async def blob(contender):
    """Upload a blob through a contender; return its Cost."""
    held_mib, cpu_s = contender.resident_mib(), contender.cpu_s()
    contender.forget_peak()
    taken_s = await asyncio.to_thread(upload_s, contender.port)
    return Cost(BLOB_MIB / taken_s, contender.cpu_s() - cpu_s, mib=contender.peak_mib() - held_mib)


async def measure_blobs(rounds):
    """Measure blobs through every contender, in turn; return rows of text."""
    with contextlib.ExitStack() as stack:
        seen, = await in_turn(await contenders(stack, 1, kind=BlobNode), rounds, blob)
    ratios = ratios_to(seen, "node itself", "rate")
    return [[f"blob of {BLOB_MIB} MiB", "MiB/s", "to node itself", "CPU s", "MiB grown"]] + [
        [name, f"{median_cost(costs, 'rate'):.0f}", f"x{ratios[name]:.2f}", f"{median_cost(costs, 'cpu_s'):.2f}",
         f"{max(cost.mib for cost in costs):.1f}"] for name, costs in seen.items()]


# Generous: machines that run checks are slow and shared. What is guarded is a step in the wrong direction.
LEAST_CALLS, MOST_TOKEN_CPU = 0.05, 4.0     # of the pump's


async def check_weight():
    """Print how SOLLOL compares with the bare pump; return whether it is as light as it should be."""
    with contextlib.ExitStack() as stack:
        pump, gateway = await contenders(stack, nodes=3, only=("pump", "SOLLOL"))
        calls, = await in_turn((pump, gateway), 2, lambda contender: small_calls(contender, 32, 1.0))
        streams, = await in_turn((pump, gateway), 1, lambda contender: many_streams(contender, 100, 20))
    rate = sum(cost.rate for cost in calls["SOLLOL"]) / sum(cost.rate for cost in calls["pump"])
    cpu = streams["SOLLOL"][0].cpu_s / streams["pump"][0].cpu_s
    held = [claim_held(rate >= LEAST_CALLS, f"small calls: x{rate:.2f} of a bare pump's, at least x{LEAST_CALLS:g}"),
            claim_held(cpu <= MOST_TOKEN_CPU, f"CPU a token: x{cpu:.2f} of a bare pump's, at most x{MOST_TOKEN_CPU:g}")]
    return all(held)


# ------------------------------------------------------------------------------------------------------------
# Decisions: what does one dispatch cost when the queue is long?
#
# No sockets: the gateway's own Dispatcher, every slot taken, and 10,000 tickets waiting. The lease that is predicted to
# end first ends, its answer is learned from, and a waiting ticket takes its place: that is one decision.
# ------------------------------------------------------------------------------------------------------------

DECISION_TICKETS, DECISIONS = 10_000, 300
LIKELY = sollol.Timings(total_s=5.0, prompt_s=1.0, prompt_tokens=500, output_s=4.0, output_tokens=150)


def crowded(nodes, models, held, rng):
    """Return a Dispatcher over `nodes` that hold `held` of `models` each, two of them loaded, and its full queue."""
    dispatcher = sollol.Dispatcher(max_queue=DECISION_TICKETS)
    dispatcher.cluster.configure([sollol.NodeSettings(f"n{number}", "host", 1) for number in range(nodes)])
    names = [f"m{number}:latest" for number in range(models)]
    for number, node in enumerate(dispatcher.cluster.nodes.values()):
        mine = [names[(number * held + place) % models] for place in range(held)]
        node.answered("0.33.0", 0.001, 0.0)
        dispatcher.cluster.take_tags(node, [{"name": name, "size": 4e9} for name in mine])
        node.take_ps([{"name": name, "size": 5e9} for name in rng.sample(mine, 2)], 0.0, 0.0)
        node.memory.limit_bytes = 14e9
        for runner in node.runners.values():
            slots = runner.slots
            slots.count, slots.proven, slots.origin, slots.retry_at_s = 2, 2, "learned", math.inf
            runner.speeds.decode_s, runner.speeds.prefill_s, runner.speeds.samples = 0.02 * (1 + number % 5), 0.0005, 5
    for number in range(DECISION_TICKETS):
        spec = sollol.RequestSpec(sollol.Family.OLLAMA, rng.choice(names), client=f"c{number % 7}", stream=True,
                             prompt_chars=rng.randint(100, 8000), prefix=((number, 100),))
        dispatcher.enter(str(number), spec, 1.0)
    return dispatcher


def decision_times_s(nodes, models, held, seed):
    """Return the ascending times that decisions took."""
    dispatcher, running, times_s, number = crowded(nodes, models, held, random.Random(seed)), [], [], itertools.count()

    def dispatch(now):
        for lease in dispatcher.dispatch(now)[0]:
            heapq.heappush(running, (max(now + 0.5, lease.predicted_end_s), next(number), lease))

    dispatch(1.0)
    gc.freeze()                     # else each collection would look through 10,000 tickets
    for _ in range(DECISIONS):
        now, _, lease = heapq.heappop(running)
        start_s = time.perf_counter()
        lease.heard(1, now)
        dispatcher.observe(lease, LIKELY, now)
        dispatcher.release(lease, now)
        dispatcher.leave(lease.ticket, now)
        dispatch(now)
        times_s.append(time.perf_counter() - start_s)
    return sorted(times_s)


def heap_step_s():
    """Return the time of one pop and push on a heap as long as the queue: a yardstick for this machine."""
    heap = [(number * 7919 % DECISION_TICKETS, number, None) for number in range(DECISION_TICKETS)]
    heapq.heapify(heap)
    start_s = time.perf_counter()
    for _ in range(DECISION_TICKETS):
        heapq.heapreplace(heap, (heap[0][0] + 5000, 0, None))
    return (time.perf_counter() - start_s) / DECISION_TICKETS


def measure_decisions(seed):
    """Return rows of text: what a decision costs, by size of the cluster."""
    step_s = heap_step_s()
    rows = [[f"{DECISION_TICKETS} tickets", "each holds", "median us", "mean us", "P99 us", "median, heap steps"]]
    for nodes, models, held in ((5, 5, 5), (12, 20, 5), (25, 20, 5), (50, 20, 5), (100, 20, 5), (50, 20, 20)):
        times_s = decision_times_s(nodes, models, held, seed)
        rows.append([f"{nodes} nodes, {models} models", str(held), f"{middle(times_s) * 1e6:.0f}",
                     f"{sum(times_s) / len(times_s) * 1e6:.0f}", f"{share_of(times_s, 0.99) * 1e6:.0f}",
                     f"{middle(times_s) / step_s:.0f}"])
    return rows


# ============================================================================================================
# Soaks and sieges: `soak`, `kills`, `siege`
#
# Random faults and hostile clients. Each returns what was violated; nothing may be.
# ============================================================================================================


# ------------------------------------------------------------------------------------------------------------
# Soak: does it hold under random faults?
#
# A seed draws a cluster, minutes of traffic, and for every node one trouble after the other. All of it runs through
# the real gateway on the virtual clock, so that a seed that fails will fail again. What must hold whatever happens:
# every client that stays gets one whole answer or is told why not, no node gets more than its slots, a node that is
# well is used, and nothing is left behind. Simulated nodes give a model and a prompt the same text wherever it runs,
# so every answer is known beforehand, and each is checked to its last word.
# ------------------------------------------------------------------------------------------------------------

SOAK_MINUTES = 4.0
SOAK_QUEUE, SOAK_WAIT_S = 100, 60.0     # --max-queue, --queue-timeout: so small that some seeds come to them
SETTLE_S = 900.0        # virtual time in which everything is answered after the last trouble
HEAL_S = 75.0           # without work after a trouble, at most: a breaker's longest pause, a probe, a sweep
INSTANT_S = 1e-6        # what happens within this happens at once
MOST_PROMPT_TOKENS = 1500       # with more, a slow node's requests outlast the soak
SOAK_MODELS = ("llama3.2:latest", "llama3.2:1b", "llama3.1:8b", "gemma3:4b", "mistral:latest")
EMBEDDER = "nomic-embed-text:latest"
CHAT_PATHS, PROMPT_PATHS = ("/api/chat", "/v1/chat/completions"), ("/api/generate", "/v1/completions")
EMBED_PATHS = ("/api/embed", "/v1/embeddings")
GET_PATHS = ("/api/tags", "/api/ps", "/v1/models")
LOOK_PATHS = ("/api/show", *GET_PATHS)              # take no slot
SEVERE = ("kill", "reset", "garble", "tear", "hang", "freeze")      # troubles that can break off a begun answer
TROUBLES = (*SEVERE, "slow", "busy", "broken", "drop", "drain")
NO_HTTP = (b"\x00\xff\x00\xff", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\n\n", b"HTTP/9.9 999 \r\n\r\n", b"zz\r\n",
           b"<html>\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n")
BAD_HOSTS = ("http://x slots=none\n", "", "http://x name=a\nhttp://y name=a\n")


class Violation(Exception):
    """Something that must never happen."""


class Trouble(NamedTuple):
    """A fault of one node, from when to when."""

    kind: str                       # one of TROUBLES
    at_s: float
    end_s: float


class Leaving(NamedTuple):
    """How a client gives up."""

    phase: str                      # sending, waiting or reading
    after: float                    # share of the request sent, seconds after it was sent, or pieces read
    resets: bool                    # with RST, not FIN


class Errand(NamedTuple):
    """One request of the soak, and the answer that every node gives it."""

    number: int
    at_s: float
    client: str                     # the source address
    path: str
    model: str
    stream: bool
    prompt_tokens: int
    output_tokens: int
    priority: int | None = None
    num_ctx: int | None = None
    leaving: Leaving | None = None
    seed: int | None = None         # 0 = temperature 0 instead

    @property
    def id(self):
        return f"errand-{self.number}"

    @property
    def prompt(self):
        """Return a text that no other errand has, and that asks for the output tokens."""
        return worded(f"<out={self.output_tokens}> errand {self.number} says ", self.prompt_tokens)

    @property
    def messages(self):
        return [{"role": "system", "content": f"You serve {self.client}. " * 20},
                {"role": "user", "content": self.prompt}]

    def request(self):
        """Return the bytes to send."""
        if self.path in GET_PATHS:
            return f"GET {self.path} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {self.id}\r\n\r\n".encode()
        key = "messages" if self.path in CHAT_PATHS else "prompt" if self.path in PROMPT_PATHS else "input"
        value = {"model": self.model, "stream": self.stream, key: getattr(self, key, self.prompt)}
        options = {"num_ctx": self.num_ctx} if self.num_ctx else {}
        if self.seed is not None:
            sampling = {"seed": self.seed} if self.seed else {"temperature": 0}
            (value if self.path.startswith("/v1/") else options).update(sampling)
        if options:
            value["options"] = options
        body = json.dumps(value).encode()
        priority = b"" if self.priority is None else b"X-Priority: %d\r\n" % self.priority
        return b"POST %b HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: %b\r\n%bContent-Length: %d\r\n\r\n%b" % (
            self.path.encode(), self.id.encode(), priority, len(body), body)

    def expected(self):
        """Return the text, or the vector, that a whole answer holds."""
        model = model_named(self.model)
        if self.path in EMBED_PATHS:
            return embedded(model, self.prompt)
        prompt = rendered(self.messages) if self.path in CHAT_PATHS else self.prompt
        tokens, _ = composed(Ask(self.model, model, prompt, self.stream, -1, (), None), math.inf)
        return "".join(tokens)


class Plan(NamedTuple):
    """What a seed draws. `nodes`: settings of SimNode; `fixed`: those whose slots hosts.txt tells."""

    nodes: list
    fixed: set
    errands: list
    troubles: dict                  # node: [Trouble], one after the other
    edits_s: list                   # when a bad hosts.txt is saved, and read again by force


class ErrandOutcome(NamedTuple):
    """What became of an errand. `how`: whole, refused, broken, cut or left."""

    number: int
    sent_s: float
    end_s: float
    status: int                     # 0 = no answer
    node: str
    how: str
    chars: int                      # of text


# Drawing a plan.

SOAK_HARDWARE = ("rtx4090", "rtx3090", "rtx3060", "m2", "cpu")


def draw_nodes(rng, seed, models):
    """Return the settings of three to six nodes; every model is on two of them at least."""
    count = rng.randint(3, 6)
    holders = {model: set(rng.sample(range(count), rng.randint(2, count))) for model in models}
    nodes = []
    for number in range(count):
        had = [model for model in models if number in holders[model]] or [models[0]]
        loaded = [model for model in had if rng.random() < 0.3][:1]
        nodes.append({"hardware": rng.choices(SOAK_HARDWARE, (2, 2, 4, 2, 1))[0], "models": had, "loaded": loaded,
                      "name": f"n{number + 1}", "seed": seed * 10 + number, "slots": rng.choice((1, 2, 2, 4)),
                      "latency_s": rng.choice((0.0, 0.0005, 0.0005, 0.04)), "noise": 0.08, "tokens_per_line": 16,
                      "vram_gb": rng.choice((None, 8, 16)), "keep_alive_s": rng.choice((300.0, 20.0)),
                      "drawn": True, "context": BENCH_CONTEXT})
    return nodes


def draw_leaving(rng):
    phase = rng.choice(("sending", "waiting", "waiting", "reading"))
    after = {"sending": rng.random(), "waiting": rng.choice((0.0, rng.uniform(0, 1), rng.expovariate(0.1))),
             "reading": rng.randint(1, 5)}
    return Leaving(phase, after[phase], rng.random() < 0.5)


def draw_errand(rng, beginning, models, hasty, reloads):
    """Return an errand from its `beginning`: (number, at_s, client).

    `hasty` and `reloads` are the shares of clients that leave and of unusual num_ctx.
    """
    if rng.random() < 0.1:
        path, model, stream = rng.choice(EMBED_PATHS), EMBEDDER, False
    elif rng.random() < 0.1:
        path, model, stream = rng.choice(LOOK_PATHS), rng.choice(models), False
    else:
        path = rng.choice(CHAT_PATHS + PROMPT_PATHS + ("/api/chat",))
        model, stream = rng.choice(models), rng.random() < 0.6
    prompt_tokens, output_tokens = pick_lengths(rng, "mixed")
    return Errand(*beginning, path, model, stream, min(prompt_tokens, MOST_PROMPT_TOKENS), output_tokens,
                  rng.choice((None, None, None, 1, 1, 3, 5, 8, 10)),
                  8192 if path.startswith("/api") and rng.random() < reloads else None,
                  draw_leaving(rng) if rng.random() < hasty else None,
                  rng.randint(0, 3) if path in CHAT_PATHS + PROMPT_PATHS and rng.random() < 0.3 else None)


def draw_errands(rng, models, span_s):
    """Return the errands of a few clients, some of them in bursts, in the order of their times."""
    clients = [f"127.0.0.{number + 2}" for number in range(rng.randint(1, 6))]
    hasty, reloads, rate = rng.choice((0.0, 0.1, 0.3)), rng.choice((0.0, 0.0, 0.02, 0.1)), rng.uniform(0.5, 3.0)
    errands, at_s = [], rng.expovariate(rate)
    while at_s < span_s:
        client, count = rng.choice(clients), 1 if rng.random() < 0.99 else rng.randint(5, 40)
        errands += [draw_errand(rng, (number, at_s, client), models, hasty, reloads)
                    for number in range(len(errands), len(errands) + count)]
        at_s += rng.expovariate(rate)
    return errands


def draw_troubles(rng, span_s):
    """Return the troubles of one node: mostly short or of some seconds, now and then of minutes."""
    troubles, at_s, gap_s = [], 0.0, rng.choice((20.0, 60.0, 200.0))
    while True:
        at_s += 5.0 + rng.expovariate(1 / gap_s)
        if at_s >= span_s:
            return troubles
        lasts_s = rng.choices((rng.uniform(0, 2), rng.uniform(3, 40), rng.uniform(60, 200)), (4, 5, 1))[0]
        troubles.append(Trouble(rng.choice(TROUBLES), at_s, min(at_s + lasts_s, span_s)))
        at_s = troubles[-1].end_s


def draw_plan(seed, minutes):
    """Return the plan of a seed. One in four has no troubles: there nothing may fail but for want of room."""
    rng, span_s = random.Random(f"soak {seed}"), 60 * minutes
    models = rng.sample(SOAK_MODELS, rng.randint(1, 3))
    nodes = draw_nodes(rng, seed, [*models, EMBEDDER])
    fixed = {node["name"] for node in nodes if rng.random() < 0.5}
    errands = draw_errands(rng, models, span_s)
    quiet, load = rng.random() < 0.25, rng.uniform(0.3, 1.1)
    solo = {node["name"]: sum(solo_s(node["hardware"], errand.model, errand.prompt_tokens, errand.output_tokens)
                              for errand in errands) / len(errands) for node in nodes}
    per_s = sum(batch_gain(node["slots"]) / solo[node["name"]] for node in nodes)
    speed = min(max(len(errands) / span_s / (load * per_s), 0.5), 3.0)
    troubles = {node["name"]: [] if quiet else draw_troubles(rng, span_s) for node in nodes}
    edits_s = sorted(rng.uniform(0, span_s) for _ in range(0 if quiet else rng.randint(0, 3)))
    return Plan([{**node, "speed": speed} for node in nodes], fixed, errands, troubles, edits_s)


# What a client sees.

class Visitor(Caller):
    """A client of the soak. It keeps its connections: bytes that nobody asked for show at the next head or the end."""

    async def visit(self, errand):
        """Run an errand; return (its Response, whatever came of it; whether the client left before its end)."""
        response, leaving, left = Response(), errand.leaving or Leaving("", 0.0, False), False
        client = await self.connection()
        data = errand.request()
        if leaving.phase == "sending":
            data = data[:int(leaving.after * len(data))]
        try:
            async with asyncio.timeout(0.5 if leaving.phase == "sending" else
                                       leaving.after if leaving.phase == "waiting" else None):
                client.writer.write(data)
                await client.read(response, most=leaving.after if leaving.phase == "reading" else math.inf)
                left = leaving.phase == "reading" and not response.whole
        except TimeoutError:
            left = True
        except (OSError, ValueError, asyncio.IncompleteReadError):
            pass                    # closed, or no chunk: `whole` tells
        if left and not leaving.resets:
            client.writer.close()
        else:
            self.keep(client, response, resets=True)
        return response, left

    async def farewell(self):
        """Close every connection; return the bytes that came unasked."""
        unasked = b""
        for client in self.idle:
            if not client.reader.at_eof():
                client.writer.write_eof()
                unasked += await client.reader.read()
            client.writer.transport.abort()
        self.idle.clear()
        return unasked


def text_in(value):
    """Return the text in one JSON object of an answer, in any dialect."""
    for choice in value.get("choices", ()):
        return choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content", "")
    return value.get("response") or value.get("message", {}).get("content", "")


def vector_in(value):
    """Return the vector in the answer to an embedding, in either dialect."""
    return value["embeddings"][0] if "embeddings" in value else value["data"][0]["embedding"]


def error_text(path, value):
    """Return the text of an error object in the shape of its path's family, or None."""
    error = value.get("error") if isinstance(value, dict) else None
    if path.startswith("/v1/"):
        error = error.get("message") if isinstance(error, dict) and error.get("type") else None
    return error if isinstance(error, str) else None


def json_object(data):
    """Return the JSON object that bytes are. Raises Violation."""
    try:
        return json.loads(data)
    except ValueError:
        raise Violation(f"no JSON: {data[:200]!r}") from None


def read_stream(path, body):
    """Return (text, how) of a stream that ended where its framing says. Raises Violation if it says neither end."""
    mark, lead = (b"\n\n", b"data: ") if path.startswith("/v1/") else (b"\n", b"")
    *lines, rest = body.split(mark)
    if rest or not lines or not all(line.startswith(lead) for line in lines):
        raise Violation(f"stream is no sequence of lines: ...{body[-200:]!r}")
    if lines[-1] == b"data: [DONE]":
        values, how = [json_object(line.removeprefix(lead)) for line in lines[:-1]], "whole"
    else:
        values = [json_object(line.removeprefix(lead)) for line in lines]
        done = not lead and values[-1].get("done") is True
        how = "whole" if done else "broken"
    if how == "broken" and error_text(path, values.pop()) is None:
        raise Violation(f"stream has no end: ...{body[-200:]!r}")
    if any(value.get("done") is True for value in (values[:-1] if how == "whole" else values)):
        raise Violation("stream goes on behind its last line")
    return "".join(map(text_in, values)), how


def verdict(errand, answer):
    """Return (how an errand ended, its text). Raises Violation if it may never end so, whatever the nodes did."""
    if not answer.head:
        raise Violation("connection closed without an answer")
    if answer.fields.get("x-request-id") != errand.id:
        raise Violation(f"got the answer to {answer.fields.get('x-request-id', 'nobody')}")
    if answer.status != 200:
        text = error_text(errand.path, json_object(answer.body)) if answer.whole else None
        if text is None or answer.status not in (500, 502, 503) and (answer.status, errand.path) != (404, "/api/show"):
            raise Violation(f"error answer {answer.status} of the wrong kind: {answer.body[:200]!r}")
        return "refused", text
    if not errand.stream and not answer.whole:
        return "cut", ""
    if not answer.whole:
        raise Violation(f"stream ended without a word: ...{answer.body[-200:]!r}")
    if errand.path in LOOK_PATHS:
        return "whole", str(len(json_object(answer.body)))
    expected = errand.expected()
    try:
        text, how = read_stream(errand.path, answer.body) if errand.stream else (
            (vector_in if errand.path in EMBED_PATHS else text_in)(json_object(answer.body)), "whole")
    except (KeyError, IndexError, AttributeError):
        raise Violation(f"an answer of another kind: {answer.body[:200]!r}") from None
    if text != expected and (how == "whole" or not expected.startswith(text)):
        raise Violation(f"wrong text: {str(text)[:80]!r} for {str(expected)[:80]!r}")
    return how, text


# What is left behind, and what was asked of the nodes.

def shunned(gateway):
    """Yield a sentence for every node, and every model on a node, that would get no work now."""
    now = gateway.loop.time()
    for node in gateway.dispatcher.cluster.nodes.values():
        if not node.is_usable(now):
            yield (f"{node.name} is shunned: {node.state(now)}, breaker {node.breaker.state(now)}"
                   f"{', its trial never ended' * node.breaker.trial}")
        for runner in node.runners.values():
            if not runner.breaker.allows(now):
                yield f"{runner.model} on {node.name} is shunned: {runner.breaker.state(now)}"


def leftovers(gateway, nodes):
    """Yield a sentence for everything that a gateway without requests and clients still holds of them."""
    dispatcher = gateway.dispatcher
    for node in (*dispatcher.cluster.nodes.values(), *dispatcher.cluster.leaving):
        for lease in node.leases:
            yield f"lease of {lease.ticket.id} on {node.name} was never released"
        for runner in node.busy:
            yield f"{runner.model} on {node.name} still counts as busy"
        for runner in node.runners.values():
            if runner.leases and runner not in node.busy:
                yield f"{runner.model} on {node.name} has leases and is not busy"
    for ticket in dispatcher.waiting.tickets:
        yield f"ticket of {ticket.id} still waits"
    for account in {*dispatcher.waiting.fair.active, *dispatcher.waiting.fair.next_s}:
        yield f"fair share still has an account of {account}"
    if dispatcher.cluster.leaving:
        yield f"dropped nodes are still leaving: {' '.join(node.name for node in dispatcher.cluster.leaving)}"
    for client in gateway.listener.clients:
        yield f"client connection of {client.address} is still open"
    idle = collections.Counter(node.name for node, pool in gateway.node_io.pools.items() for _ in pool.idle)
    for node in nodes:
        if len(node.connections) != idle[node.name]:
            yield f"{len(node.connections)} connections to {node.name}, {idle[node.name]} of them idle"
        if node.in_flight:
            yield f"{node.name} still computes"


def overgrown(gateway, nodes):
    """Yield a sentence for every container of an idle gateway that holds more than nodes and models account for."""
    dispatcher, known = gateway.dispatcher, set(gateway.dispatcher.cluster.nodes.values())
    models = {model for node in nodes for model in node.models}
    io = gateway.node_io
    for name, table in (("pools", io.pools), ("logged_states", io.logged_states), ("probes", io.probes),
                        ("since_s", io.since_s), ("reasons", io.reasons), ("jobs", {node for node, _ in io.jobs})):
        if extra := set(table) - known:
            yield f"{name} keeps {' '.join(sorted(node.name for node in extra))}"
    waiting, cluster = dispatcher.waiting, dispatcher.cluster
    for name, table in (("waiting.heaps", waiting.heaps), ("waiting.marked", waiting.marked),
                        ("estimates.lengths", cluster.estimates.lengths), ("holders", cluster.holders),
                        ("parked", dispatcher.policy.parked), ("changes", cluster.changes.models),
                        ("idle changes", cluster.changes.idle_models),
                        ("rates", dispatcher.rates.rates)):
        if extra := set(table) - models:
            yield f"{name} keeps {' '.join(map(str, extra))}"
    for model, heap in waiting.heaps.items():
        if len(heap) > 40:          # with no waiting ticket, 16 marked ones and half of the heap may be left
            yield f"waiting.heaps keeps {len(heap)} dead tickets of {model}"
    for node in known:
        if extra := set(node.runners) - models:
            yield f"{node.name} keeps runners {' '.join(extra)}"
        for runner in node.runners.values():
            if len(runner.prefixes.prompts) > 10 or len(runner.prefixes.parts) > 160:
                yield f"{runner.model} on {node.name} keeps {len(runner.prefixes.prompts)} prompts"
    if len(dispatcher.policy.decisions) > sollol.DECISIONS_KEPT or gateway.telemetry.finished:
        yield (f"{len(dispatcher.policy.decisions)} decisions, {len(gateway.telemetry.finished)} finished requests "
               "are kept")


def most_at_once(records):
    """Return how many of the requests that a node remembers ran, or stood in its queue, at once."""
    events = sorted([(record.time_s + INSTANT_S, 1) for record in records]
                    + [(record.finished_s, -1) for record in records])
    return max(itertools.accumulate(change for _, change in events), default=0)


OWN_REQUESTS = (b'"raw": true', b'"prompt": ""', b'"input": []')


def inferences(node):
    """Return the records of a node's inference requests, without the gateway's own, which measure or load."""
    return [record for record in node.requests if record.model and not any(own in record.body for own in OWN_REQUESTS)]


def is_troubled(troubles, kinds, since_s, until_s):
    """Tell whether a trouble of some kinds fell into a time."""
    return any(trouble.kind in kinds and trouble.at_s <= until_s and trouble.end_s >= since_s for trouble in troubles)


class OvertakingWatch:
    """Measure for how long the first ticket in line for a model is overtaken by tickets behind it.

    That happens while the dispatcher holds it back for a better node. A ticket with a smaller key is not behind it: its
    head start allows that it comes first.
    """

    def __init__(self, dispatcher):
        self.policy_assigns = dispatcher.policy.assign
        self.since_s = {}           # first in line: when it was overtaken first
        self.longest_s = 0.0
        dispatcher.policy.assign = self.assign

    def assign(self, waiting, cluster, now):
        """Give leases as the policy does."""
        leases, refused = self.policy_assigns(waiting, cluster, now)
        tickets = [lease.ticket for lease in leases]
        for number, ticket in enumerate(tickets):
            self.note(ticket, [*waiting.tickets, *tickets[number + 1:]], now)
        return leases, refused

    def note(self, ticket, waiting, now):
        """Note that a ticket got a lease while others waited."""
        self.longest_s = max(self.longest_s, now - self.since_s.pop(ticket, now))
        rivals = [other for other in waiting if other.spec.model == ticket.spec.model and not other.tried]
        first = min(rivals, key=lambda other: (other.key_s, other.seq), default=ticket)
        if (first.key_s, first.seq) < (ticket.key_s, ticket.seq):
            self.since_s.setdefault(first, now)
        else:
            for other in rivals:
                self.since_s.pop(other, None)


class SoakLog(logging.Handler):
    """Count the gateway's lines per request, and take its errors for what they are."""

    def __init__(self, soak):
        super().__init__()
        self.soak = soak

    def emit(self, record):
        if record.exc_info:
            self.soak.wrong(f"the gateway failed: {record.msg} {logging.Formatter().formatException(record.exc_info)}")
        for line in record.msg if isinstance(record.msg, list) else ():
            self.soak.logged[line["id"]] += 1


class Soak:
    """One run of a plan: the cluster, the gateway in front of it, and what was seen to be wrong."""

    def __init__(self, seed, plan, folder):
        self.seed, self.plan = seed, plan
        self.loop = asyncio.get_running_loop()
        self.rng = random.Random(f"soak order {seed}")
        self.hosts = pathlib.Path(folder, "hosts.txt")
        self.nodes = {node["name"]: SimNode(**node) for node in plan.nodes}
        self.listed = set(self.nodes)
        self.visitors, self.outcomes, self.violations = {}, [], []
        self.logged = collections.Counter()
        self.ignored = {}           # waiting ticket: since when all usable nodes for it are idle
        self.drained = {}           # drained node's name: since when
        self.gateway = self.line = self.address = self.reload = None

    def wrong(self, text):
        self.violations.append(f"{self.loop.time():.3f} s: {text}")

    # hosts.txt

    def save_hosts(self):
        """List the nodes that are not dropped, in any order."""
        lines = [f"{self.nodes[name].url} name={name}" + f" slots={self.nodes[name].engine.slots}" * (
                 name in self.plan.fixed) for name in sorted(self.listed)]
        self.rng.shuffle(lines)
        self.hosts.write_text("\n".join(lines), encoding="utf-8")

    def list_node(self, node, listed):
        """Add a node to hosts.txt or drop it, unless it is the last one with one of its models."""
        others = [self.nodes[name] for name in sorted(self.listed - {node.name})]
        if not listed and set(node.models) - {model for other in others for model in other.models}:
            return
        self.listed = self.listed | {node.name} if listed else self.listed - {node.name}
        self.save_hosts()
        self.reload()

    async def edit_hosts(self):
        """Save a bad hosts.txt now and then: the nodes stay as they are."""
        for at_s in self.plan.edits_s:
            await asyncio.sleep(at_s - self.loop.time())
            before = dict(self.gateway.dispatcher.cluster.nodes)
            self.hosts.write_text(self.rng.choice(BAD_HOSTS), encoding="utf-8")
            self.reload()
            if self.gateway.dispatcher.cluster.nodes != before:
                self.wrong("a bad hosts.txt changed the nodes")
            self.save_hosts()
            self.reload()

    # Troubles

    async def order(self, node, what):
        """Have a node drained or resumed."""
        if what == "resume":
            del self.drained[node.name]
        answer = await Caller(*self.address).call(b"{}", path=f"/api/nodes/{node.name}/{what}")
        if answer.status != 200:
            self.wrong(f"{what} of {node.name} was answered with {answer.status}")
        if what == "drain":
            self.drained[node.name] = self.loop.time()

    async def trouble(self, node):
        """Let a node have its troubles, one after the other."""
        begin = {"kill": node.kill, "reset": node.reset, "tear": node.tear, "hang": node.hang, "freeze": node.freeze,
                 "garble": lambda: node.garble(self.rng.choice(NO_HTTP)), "slow": lambda: node.slow(10),
                 "busy": node.fail, "broken": lambda: node.fail(500), "drop": lambda: self.list_node(node, False),
                 "drain": lambda: None}
        for trouble in self.plan.troubles[node.name]:
            await asyncio.sleep(trouble.at_s - self.loop.time())
            begin[trouble.kind]()
            if trouble.kind == "drain":
                await self.order(node, "drain")
            await asyncio.sleep(trouble.end_s - self.loop.time())
            node.recover()
            if trouble.kind == "kill":
                await node.restart()
            elif trouble.kind == "drop":
                self.list_node(node, True)
            elif trouble.kind == "drain":
                await self.order(node, "resume")

    # Errands

    async def run(self, errand):
        """Run an errand at its time, and judge what became of it."""
        await asyncio.sleep(errand.at_s - self.loop.time())
        sent_s = self.loop.time()
        answer, left = await self.visitors[errand.client].visit(errand)
        try:
            how, text = ("left", "") if left else verdict(errand, answer)
            outcome = ErrandOutcome(errand.number, sent_s, self.loop.time(), answer.status,
                                    answer.fields.get("x-sollol-node", ""), how, len(text))
            self.outcomes.append(outcome)
            self.judge(errand, answer, outcome, text)
        except Violation as violation:
            self.wrong(f"{errand.id} ({errand.path}): {violation}")

    def judge(self, errand, answer, outcome, text):
        """Raise Violation if no trouble of the nodes explains how an errand ended."""
        troubles = self.plan.troubles
        if outcome.how in ("broken", "cut") and not is_troubled(troubles[outcome.node], SEVERE, outcome.sent_s,
                                                                outcome.end_s):
            raise Violation(f"its answer was {outcome.how} although {outcome.node} was well: {answer.body[-200:]!r}")
        if outcome.how != "refused":
            return
        if not outcome.node and outcome.status == 503 and not answer.fields.get("retry-after", "").isdigit():
            raise Violation("503 without Retry-After")
        if text == "the queue is full" or text.startswith("no slot became free"):
            return
        able = {node.name for node in self.nodes.values() if errand.path in GET_PATHS or errand.model in node.models}
        ill = {name for name in able if is_troubled(troubles[name], TROUBLES, outcome.sent_s - HEAL_S, outcome.end_s)}
        well = able - ill
        if well and len(ill) < sollol.MAX_ATTEMPTS:
            raise Violation(f"{outcome.status} {text!r} although {' '.join(sorted(well))} had been well for "
                            f"{HEAL_S:g} s")

    # Watching

    def is_ignored(self, ticket, now):
        """Tell whether there are usable nodes for a ticket, and all of them are idle."""
        runners = [runner for runner in self.gateway.dispatcher.cluster.holders.get(ticket.spec.model, ())
                   if runner.node.is_usable(now) and runner.breaker.allows(now)
                   and runner.node.name not in ticket.tried]
        return bool(runners) and not any(runner.node.leases for runner in runners)

    def look(self):
        """Check what must hold at any time."""
        dispatcher, now = self.gateway.dispatcher, self.loop.time()
        waiting = sum(1 for ticket in dispatcher.waiting.tickets if not ticket.tried)     # others keep their place
        if waiting > SOAK_QUEUE:
            self.wrong(f"{waiting} requests wait, --max-queue is {SOAK_QUEUE}")
        for ticket in dispatcher.waiting.tickets:
            if now - ticket.since_s > SOAK_WAIT_S + 2 * sollol.SWEEP_S:
                self.wrong(f"{ticket.id} has waited {now - ticket.since_s:.1f} s")
        self.ignored = {ticket: self.ignored.get(ticket, now) for ticket in dispatcher.waiting.tickets
                        if self.is_ignored(ticket, now)}
        for ticket, since_s in self.ignored.items():
            if now - since_s > 2 * sollol.SWEEP_S:
                self.wrong(f"{ticket.id} waits although every node for it is idle")
        for node in dispatcher.cluster.nodes.values():
            if node.name in self.drained and not node.draining:
                self.wrong(f"{node.name} is not drained any more")
            sent = [lease for lease in node.leases
                    if lease.runner and lease.ticket.arrived_s > self.drained.get(node.name, math.inf)]
            if sent:
                self.wrong(f"{node.name} got {sent[0].ticket.id} while it was drained")
            for runner in node.runners.values():
                if node.name in self.plan.fixed and len(runner.leases) > runner.slots.count:
                    self.wrong(f"{len(runner.leases)} leases for {runner.model} on {node.name}, "
                               f"slots={runner.slots.count}")

    async def keep_looking(self):
        while True:
            await asyncio.sleep(0.5)
            self.look()

    # The run

    async def start_nodes(self):
        for node in self.nodes.values():
            node.port = unused_low_port(self.rng)
            await node.start()
        self.save_hosts()

    def open_for(self, address, reload):
        """Tell the clients where the gateway is, and the rest how it is made to read hosts.txt again."""
        self.address, self.reload = address, reload
        self.visitors = {client: Visitor(*address, source=client)
                         for client in sorted({errand.client for errand in self.plan.errands})}

    async def start(self):
        """Start the nodes and the gateway."""
        await self.start_nodes()
        options = sollol.parse_options(["--hosts", str(self.hosts), "--port", "0", "--seed", str(self.seed),
                                        "--max-queue", str(SOAK_QUEUE), "--queue-timeout", str(SOAK_WAIT_S)], {})
        self.gateway = await sollol.Gateway(options, sollol.read_nodes(options)).start()
        self.line = OvertakingWatch(self.gateway.dispatcher)
        self.open_for(self.gateway.listener.address, self.gateway.files.reload)

    async def play(self):
        """Run all errands through all troubles."""
        looking = asyncio.create_task(self.keep_looking())
        chaos = [asyncio.create_task(self.edit_hosts()), *(asyncio.create_task(self.trouble(node))
                                                           for node in self.nodes.values())]
        errands = {asyncio.create_task(self.run(errand)): errand for errand in self.plan.errands}
        await asyncio.gather(*chaos)
        last_s = max([self.loop.time(), *(errand.at_s for errand in self.plan.errands)])
        _, pending = await asyncio.wait(errands, timeout=last_s + SETTLE_S - self.loop.time())
        for task in pending:
            self.wrong(f"{errands[task].id} ({errands[task].path}) has no answer {SETTLE_S:g} s after the last trouble")
            task.cancel()
        looking.cancel()
        for task in errands.keys() - pending:
            task.result()           # a mistake of the soak's own

    async def settled(self, complaints, patience_s):
        """Wait until nothing is to be complained of any more; return what is after `patience_s`."""
        deadline_s = self.loop.time() + patience_s
        while (found := complaints()) and self.loop.time() < deadline_s:
            await asyncio.sleep(0.25)
        return found

    async def check_peace(self):
        """Check that every node gets work again, and each model is served."""
        for text in await self.settled(lambda: [*shunned(self.gateway)], HEAL_S):
            self.wrong(text)
        number = len(self.plan.errands)
        for model in sorted({errand.model for errand in self.plan.errands} - {EMBEDDER}):
            errand = Errand(number, self.loop.time(), self.plan.errands[0].client, "/api/chat", model, False, 10, 10)
            await self.run(errand)
            if self.outcomes[-1].number != number or self.outcomes[-1].how != "whole":
                self.wrong(f"{model} is not served although all is well")
            number += 1

    def left_behind(self):
        nodes = self.nodes.values()
        return [*leftovers(self.gateway, nodes), *overgrown(self.gateway, nodes)]

    async def check_leftovers(self):
        """Check that nothing is left behind once the clients have closed their connections.

        A check of a node may still run. A client that gave up while it connected may have left its socket open, by a
        fault of asyncio in Python 3.11.2: idle, it is closed after a while.
        """
        for client, visitor in self.visitors.items():
            if unasked := await visitor.farewell():
                self.wrong(f"{client} got what nobody asked for: {unasked[:200]!r}")
        for text in await self.settled(self.left_behind, max(sollol.CALIBRATION_S, sollol.KEEP_ALIVE_S) + 1):
            self.wrong(text)

    def check_requests(self):
        """Check what the nodes and the log remember of the requests."""
        for node in self.nodes.values():
            for model in sorted(node.models):
                most = most_at_once([record for record in inferences(node) if record.model == model])
                if node.name in self.plan.fixed and most > node.engine.slots:
                    self.wrong(f"{most} requests for {model} at once on {node.name}, slots={node.engine.slots}")
        longest_s = max(record.finished_s - record.time_s
                        for node in self.nodes.values() for record in inferences(node))
        if not any(self.plan.troubles.values()) and self.line.longest_s > longest_s:
            self.wrong(f"the first in line was overtaken for {self.line.longest_s:.1f} s; the longest request took "
                       f"{longest_s:.1f} s")
        for errand in self.plan.errands:
            lines = self.logged[errand.id]
            if lines > 1 or not lines and not (errand.leaving and errand.leaving.phase == "sending"):
                self.wrong(f"the log has {lines} lines for {errand.id}")

    async def stop(self):
        await self.gateway.stop()
        for node in self.nodes.values():
            await node.stop()
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            self.wrong(f"a task is left: {task.get_coro()}")


@contextlib.contextmanager
def log_sent_to(handler):
    """Send the gateway's log to a handler for a while."""
    log = sollol.LOG
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    log.handlers[:], log.propagate = [handler], False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


@contextlib.contextmanager
def mad_wall_clock(seed):
    """Let the wall clock jump at every call, between 1970 and 2096: nothing but the log may depend on it."""
    rng, real = random.Random(f"clock {seed}"), time.time
    time.time = lambda: rng.uniform(0.0, 4e9)
    try:
        yield
    finally:
        time.time = real


async def run_soak(seed, plan):
    """Run a plan; return its Soak."""
    with tempfile.TemporaryDirectory() as folder, mad_wall_clock(seed):
        soak = Soak(seed, plan, folder)
        soak.loop.set_exception_handler(lambda loop, context: soak.wrong(f"the loop caught: {context}"))
        with log_sent_to(SoakLog(soak)):
            await soak.start()
            await soak.play()
            await soak.check_peace()
            await soak.check_leftovers()
            await soak.stop()
            soak.check_requests()
    return soak


def soak_once(seed, minutes=SOAK_MINUTES):
    """Return (outcomes in the order of the errands, violations) of one seed, in virtual time."""
    soak = run_virtual(run_soak(seed, draw_plan(seed, minutes)))
    return sorted(soak.outcomes), soak.violations


def soak_seeds(first, count, minutes):
    """Run seeds, and print those that fail and what they violate; return whether none did."""
    failed, ends = 0, collections.Counter()
    for seed in range(first, first + count):
        outcomes, violations = soak_once(seed, minutes)
        ends.update(outcome.how for outcome in outcomes)
        if violations:
            failed += 1
            print(f"seed {seed} failed:", *violations, sep="\n  ", flush=True)
        if seed + 1 == first + count or (seed + 1 - first) % 10 == 0:
            say(f"{seed + 1 - first} of {count} seeds, {failed} failed")
    print(f"{count} seeds of {minutes:g} minutes, {failed} failed; {sum(ends.values())} requests: "
          + ", ".join(f"{number} {how}" for how, number in sorted(ends.items())))
    return not failed


# ------------------------------------------------------------------------------------------------------------
# Kills, siege, live soak: on the wall clock, the gateway being a process of its own
# ------------------------------------------------------------------------------------------------------------

HANG_S = 60.0                       # no request lasts so long here
KILL_GAP_S, RESTART_S = 4.0, 1.5    # from one SIGKILL to the next, and until its node is started again
KILL_CLIENTS = 4                    # of each kind
KINDS = {                           # (stream, deterministic): how its requests may end; the first is as it should be
    "stream:false": (False, False, ("whole",)),
    "deterministic streams": (True, True, ("whole",)),
    "other streams": (True, False, ("whole", "broken")),
}


async def ask_in_turn(front, kind, number, until_s, seen):
    """Make requests of a kind one after the other; add (kind, how, seconds, complaint) to `seen` for each."""
    stream, deterministic, allowed = KINDS[kind]
    rng, clock = random.Random(f"{kind} {number}"), asyncio.get_running_loop().time
    visitor = Visitor("127.0.0.1", front.port)
    for turn in itertools.count():
        if clock() >= until_s:
            return
        errand = Errand(number + 1000 * turn, 0.0, "kills", rng.choice(CHAT_PATHS + PROMPT_PATHS), "llama3.2:latest",
                        stream, rng.randint(10, 300), rng.randint(20, 400), seed=rng.randint(0, 3) if deterministic
                        else None)
        start_s, how, complaint = clock(), "hung", ""
        try:
            async with asyncio.timeout(HANG_S):
                answer, _ = await visitor.visit(errand)
            how, text = verdict(errand, answer)
            complaint = text if how == "refused" else ""
        except TimeoutError:
            pass
        except Violation as violation:
            how, complaint = "wrong", str(violation)
        if how not in allowed:
            complaint = f"{kind}: {errand.id} ({errand.path}) {how}: {complaint}"
        seen.append((kind, how, clock() - start_s, complaint if how not in allowed else ""))


async def kill_in_turn(front, nodes, until_s):
    """Kill one node after the other and start it again, with a reload of hosts.txt each time; return how often."""
    clock = asyncio.get_running_loop().time
    for kills, node in enumerate(itertools.cycle(nodes)):
        await asyncio.sleep(KILL_GAP_S - RESTART_S)
        if clock() + RESTART_S > until_s:
            return kills
        node.kill()
        await asyncio.sleep(RESTART_S)
        front.reload()
        await node.start()


async def run_kills(span_s, seed):
    """Kill nodes under load; return (rows of text, promises broken)."""
    rng = random.Random(f"kills {seed}")
    with contextlib.ExitStack() as stack:
        nodes = await asyncio.gather(*(NodeProcess(stack, rng).start() for _ in range(3)))
        lines = [f"http://127.0.0.1:{node.port} name=n{number}" for number, node in enumerate(nodes)]
        front = await GatewayProcess.of(stack, lines).ready(len(nodes))
        seen, until = [], asyncio.get_running_loop().time() + span_s
        _, kills = await asyncio.gather(
            asyncio.gather(*(ask_in_turn(front, kind, number, until, seen)
                             for number, kind in enumerate(list(KINDS) * KILL_CLIENTS))),
            kill_in_turn(front, nodes, until))
        health, stats = await front.answers("/api/health"), await front.answers("/api/stats")
        complaints = [complaint for *_, complaint in seen if complaint] + await front.end()
        if health["inflight"] or health["queued"]:
            complaints.append(f"left behind: {health}")
        if complaints:
            keep = pathlib.Path(tempfile.gettempdir(), "sollol-kills.log")
            keep.write_text(front.log(), encoding="utf-8")
            complaints.append(f"the gateway's log: {keep}")
    rescues = stats["rescues"]
    rows = [[f"{kills} kills in {span_s:g} s, {rescues['whole']} streams rescued", "requests", "whole", "error line",
             "else", "longest s"]]
    for kind in KINDS:
        hows = collections.Counter(how for one, how, *_ in seen if one == kind)
        longest_s = max((took_s for one, _, took_s, _ in seen if one == kind), default=0.0)
        other = hows.total() - hows["whole"] - hows["broken"]
        rows.append([kind, *map(str, (hows.total(), hows["whole"], hows["broken"], other)), f"{longest_s:.1f}"])
    return rows, complaints


def kills_held(span_s, seed):
    """Print what kills cost; return whether every promise was kept."""
    rows, complaints = run_quick(run_kills(span_s, seed))
    print(aligned(rows), *complaints, sep="\n", flush=True)
    return not complaints


UPGRADE_NODES, UPGRADE_SLOTS = 5, 10        # slow nodes, each with so many slots: as many streams run
UPGRADE_WAITING, UPGRADE_RATE = 42, 20      # requests that wait for a slot; new requests a second
UPGRADE_GAP_S = 2.0                 # from one upgrade to the next
BAD_VERSION = "this is no Python\n"


class Arrivals:
    """New requests at an even rate, each on a connection of its own: every other one for a token, the others for a
    list that the proxy may answer itself."""

    def __init__(self, port, rate=UPGRADE_RATE):
        self.port, self.rate = port, rate
        self.tasks, self.refused, self.failed = [], 0, []
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        for number in itertools.count():
            await asyncio.sleep(max(0.0, start_s + number / self.rate - loop.time()))
            path = "/api/tags" if number % 2 else "/api/chat"
            errand = Errand(10_000 + number, 0.0, "new", path, "mistral:latest", bool(number % 4), 20, 10)
            self.tasks.append(asyncio.create_task(self._ask(errand)))

    async def _ask(self, errand):
        visitor = Visitor("127.0.0.1", self.port)
        try:
            answer, _ = await visitor.visit(errand)
            if answer.status != 200 or not answer.whole:
                self.failed.append(f"{errand.id}: {answer.status}, whole: {answer.whole}")
        except OSError as error:
            self.refused += 1
            self.failed.append(f"{errand.id}: {error}")
        finally:
            for client in visitor.idle:
                client.writer.transport.abort()

    async def end(self):
        """Send no more; return (requests, refused, failed) once all have ended."""
        self.task.cancel()
        await asyncio.gather(*self.tasks)
        return len(self.tasks), self.refused, len(self.failed) - self.refused


class UpgradedGateway(GatewayProcess):
    """A gateway that runs a copy of sollol.py, which can be replaced."""

    @staticmethod
    def program(folder):
        return shutil.copy(sollol.__file__, str(folder / "sollol.py"))

    def lines(self, event):
        """Return the lines of the log about an event."""
        return [line for line in self.log().splitlines() if f"event={event}" in line]

    async def upgrade(self, patience_s=40.0):
        """Send SIGUSR2; return the log's line of what came of it."""
        before, deadline_s = len(self.lines("upgrade")), time.monotonic() + patience_s
        self.process.send_signal(signal.SIGUSR2)
        while len(self.lines("upgrade")) == before and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        return self.lines("upgrade")[-1] if len(self.lines("upgrade")) > before else "nothing"


async def visit_whole(port, errand, complaints):
    """Run an errand on a connection of its own; add a complaint unless its answer is whole."""
    visitor = Visitor("127.0.0.1", port)
    try:
        answer, _ = await visitor.visit(errand)
        how, text = verdict(errand, answer)
        if how != "whole":
            complaints.append(f"{errand.id}: {how} {text}")
    except (Violation, OSError) as violation:
        complaints.append(f"{errand.id}: {violation}")


async def until_true(holds, patience_s=30.0):
    """Wait until something holds. Raises BadArgument."""
    deadline_s = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise BadArgument("the gateway did not get so far")
        await asyncio.sleep(0.02)


async def run_upgrades(count, speed):
    """Upgrade a busy gateway again and again, and reload nginx as often; return (rows of text, promises broken)."""
    complaints, rows = [], [["", "upgrades", "new requests", "refused", "failed", "streams", "not whole",
                             "most on a node"]]
    slow = [await SimNode("rtx3060", loaded=("llama3.2",), slots=UPGRADE_SLOTS, speed=speed, seed=number).start()
            for number in range(UPGRADE_NODES)]
    fast = await SimNode("rtx4090", models=("mistral",), loaded=("mistral",), slots=4, speed=20).start()
    with contextlib.ExitStack() as stack:
        front = UpgradedGateway.of(stack, [f"{node.url} slots={node.engine.slots}" for node in (*slow, fast)])
        await front.ready(len(slow) + 1)
        streams = []
        for number in range(UPGRADE_NODES * UPGRADE_SLOTS + UPGRADE_WAITING):
            errand = Errand(number, 0.0, "old", "/api/chat", "llama3.2:latest", True, 50, 200 + 3 * number,
                            priority=1 + number % 10)
            streams.append(asyncio.create_task(visit_whole(front.port, errand, complaints)))
        await until_true(lambda: sum(node.in_flight for node in slow) == UPGRADE_NODES * UPGRADE_SLOTS)
        arrivals = Arrivals(front.port)
        for _ in range(count):
            await asyncio.sleep(UPGRADE_GAP_S)
            line = await front.upgrade()
            if "pid=" not in line:
                complaints.append(line)
        good = (front.folder / "sollol.py").read_text(encoding="utf-8")
        (front.folder / "sollol.py").write_text(good + BAD_VERSION, encoding="utf-8")
        before = len(front.log().splitlines())
        refusal = await front.upgrade()
        if "SyntaxError" not in refusal or len(front.lines("upgrade")) != count + 1:
            complaints.append(f"a bad version: {refusal}, {front.log().splitlines()[before:]}")
        ended = sum(task.done() for task in streams)
        await asyncio.gather(*streams)
        asked, refused, failed = await arrivals.end()
        most = max(node.max_in_flight for node in slow)
        rows.append(["SOLLOL", *map(str, (count, asked, refused, failed, len(streams), len(complaints),
                                          f"{most} of {UPGRADE_SLOTS}"))])
        say(f"{ended} of {len(streams)} streams had ended after the last upgrade")
        complaints += arrivals.failed[:5] + await front.end()
        if most > UPGRADE_SLOTS:
            complaints.append(f"a node got {most} requests for {UPGRADE_SLOTS} slots")
        if complaints:
            keep = pathlib.Path(tempfile.gettempdir(), "sollol-upgrades.log")
            keep.write_text(front.log(), encoding="utf-8")
            complaints.append(f"the gateway's log: {keep}")
        rows += await reload_nginx(stack, count, fast)
    for node in (*slow, fast):
        await node.stop()
    return rows, complaints


async def reload_nginx(stack, count, node):
    """Reload nginx in front of a node so many times; return a row of text, none if it is not installed."""
    config = NGINX_CONF.replace("master_process off; ", "")
    nginx = proxy_process(stack, "nginx", ["nginx", "-c"], config, node)
    if nginx is None:
        return []
    stack.callback(nginx.process.terminate)     # its workers end with it
    await first_answer_s(nginx)
    arrivals = Arrivals(nginx.port)
    for _ in range(count):
        await asyncio.sleep(UPGRADE_GAP_S)
        nginx.process.send_signal(signal.SIGHUP)
    await asyncio.sleep(UPGRADE_GAP_S)
    return [["nginx -s reload", str(count), *map(str, await arrivals.end()), "", "", ""]]


def upgrades_held(count, speed):
    """Print what upgrades cost; return whether every promise was kept."""
    rows, complaints = run_quick(run_upgrades(count, speed))
    print(aligned(rows), *complaints, sep="\n", flush=True)
    return not complaints


HALF_HEADS, SLOW_READERS = 300, 200
HALF_HEAD = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nX-Filler: "
BYTE_GAP_S, SIP_GAP_S, SIP_BYTES = 0.5, 1.0, 1024
SIEGE_CLIENTS, SIEGE_SETTLE_S = 8, 4.0
FILLED_S = 60.0                     # within which every buffer between node and slow reader is full
MOST_GROWN_MIB, MOST_LATER_S = 64.0, 0.2    # of the gateway, by one kind of hostility; the P95 of others during it
GIANT_MIB = 64                      # --max-body


class Siege:
    """Clients that send heads byte by byte and never finish, and clients that read a stream at 1 KB/s."""

    def __init__(self, port, count):
        self.port, self.count, self.read_bytes, self.refused = port, count, 0, 0
        self.halves, self.readers = [], []

    def connected(self, data=b"", most_bytes=None):
        """Return a socket that has sent some bytes."""
        client = socket.socket()
        if most_bytes:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, most_bytes)
        client.connect(("127.0.0.1", self.port))
        client.sendall(data)
        client.setblocking(False)
        return client

    async def lay(self):
        """Begin, and go on until cancelled."""
        request = post_chat(0, stream=True, options={"num_predict": 10**9, "gap_ms": 0})
        request = request.replace(b'"llama3.2"', b'"endless" ')
        for number in range(self.count):
            self.readers.append(self.connected(request, 4096))
            if number % 10 == 9:
                await asyncio.sleep(0.02)
        self.halves = [[self.connected(), 0] for _ in range(HALF_HEADS)]
        await asyncio.gather(self.drip(), self.sip())

    async def drip(self):
        for part in itertools.cycle(range(10)):
            for half in self.halves[part::10]:
                try:
                    half[0].send(HALF_HEAD[half[1]:half[1] + 1] or b"a")
                    half[1] += 1
                    if half[0].recv(1000):
                        raise ConnectionError
                except BlockingIOError:
                    pass
                except OSError:     # told 408: it comes again at once
                    self.refused += 1
                    half[0].close()
                    half[:] = self.connected(), 0
            await asyncio.sleep(BYTE_GAP_S / 10)

    async def sip(self):
        for part in itertools.cycle(range(10)):
            for reader in self.readers[part::10]:
                with contextlib.suppress(BlockingIOError):
                    self.read_bytes += len(reader.recv(SIP_BYTES))
            await asyncio.sleep(SIP_GAP_S / 10)

    def lift(self):
        """Close everything."""
        for client in [*self.readers, *(client for client, _ in self.halves)]:
            client.close()


def questions():
    """Return 5,000 requests that do not wait for their answers."""
    return [b"HEAD /api/stats HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000]


def crumbs():
    """Return requests in chunks of one byte: one that the gateway reads, one that it passes on."""
    return [b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % (
        path, b"1\r\nx\r\n" * 2**19) for path in (b"/api/chat", b"/api/blobs/sha256:" + b"0" * 64)]


def giant():
    """Return a request with a body of the largest size; read by json it would be ten times as large."""
    lead, tail = b'{"model":"m","messages":[0', b"]}"
    body = lead + b",{}" * ((GIANT_MIB * 2**20 - len(lead) - len(tail)) // 3) + tail
    return [b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)]


class Hostility(NamedTuple):
    """Connections that send the same bytes over and over, and discard the answers."""

    connections: int
    make: Callable[[], list[bytes]]     # what they send, in turn
    pause_s: float = 0.0            # before it is sent again
    body_mib: int = 0               # held of each by promise, beside MOST_GROWN_MIB


HOSTILITIES = {
    "and 20 that ask ahead": Hostility(20, questions),
    "and 4 with chunks of one byte": Hostility(4, crumbs),
    f"and 2 with bodies of {GIANT_MIB} MiB": Hostility(2, giant, body_mib=GIANT_MIB),
    "and 1000 that send nothing or empty lines": Hostility(1000, lambda: [b"", b"\r\n"], pause_s=2.0),
}


class Pest(asyncio.Protocol):
    """One connection of a Hostility. It connects again when it is closed."""

    def __init__(self, address, data, pause_s):
        self.address, self.data, self.pause_s = address, data, pause_s
        self.loop, self.transport, self.timer = asyncio.get_running_loop(), None, None
        self.times = 0

    async def come(self):
        """Connect, as soon as that is possible."""
        while True:
            with contextlib.suppress(OSError):
                return await self.loop.create_connection(lambda: self, *self.address)
            await asyncio.sleep(0.1)

    def connection_made(self, transport):
        self.transport, self.is_full = transport, False
        self.send()

    def connection_lost(self, exc):
        self.transport = None
        if self.timer:
            self.timer.cancel()
        self.coming = self.loop.create_task(self.come())

    def send(self):
        if self.data and self.transport and not self.is_full:
            self.transport.write(self.data)
            self.times += 1
            if not self.is_full:
                self.timer = self.loop.call_later(self.pause_s, self.send)

    def pause_writing(self):
        self.is_full = True

    def resume_writing(self):
        self.is_full = False
        self.send()

    def sent_bytes(self):
        return self.times * len(self.data) - (self.transport.get_write_buffer_size() if self.transport else 0)


async def pester(name, port):
    """Be hostile until killed; print each second how many connections there are, and how many bytes were taken."""
    hostility, pests = HOSTILITIES[name], []
    for _, data in zip(range(hostility.connections), itertools.cycle(hostility.make())):
        pests.append(Pest(("127.0.0.1", port), data, hostility.pause_s))
        await pests[-1].come()
    while True:
        print(sum(pest.transport is not None for pest in pests), sum(pest.sent_bytes() for pest in pests), flush=True)
        await asyncio.sleep(1.0)


async def siege_slice(front, span_s):
    """Return (P50, P95, requests/s) of ordinary clients."""
    caller = Caller("127.0.0.1", front.port)
    works = [Work(number, 0.0, "llama3.2:latest", 100, 40, 5) for number in range(100_000)]
    samples = await closed_loop(caller, works, SIEGE_CLIENTS, span_s, 60.0)
    caller.close()
    if not all(sample.ok for sample in samples):
        raise BadArgument("a request failed")
    times_s = sorted(sample.latency_s for sample in samples)
    return share_of(times_s, 0.5), share_of(times_s, 0.95), len(samples) / span_s


async def filled(front):
    """Wait until the gateway rests: the streams of the slow readers have filled every buffer, and cost no CPU time."""
    for _ in range(int(FILLED_S)):
        cpu_s = front.cpu_s()
        await asyncio.sleep(1.0)
        if front.cpu_s() - cpu_s < 0.1:
            return
    raise BadArgument("the gateway does not come to rest")


class Besieged(NamedTuple):
    """Latency of ordinary clients, and memory of the gateway, beside one kind of hostility."""

    p50_s: float
    p95_s: float
    rate: float
    held_mib: float                 # by the gateway at the most,
    grown_mib: float                # and how much more that is than when it began
    taken_mib: float = 0.0          # of what the hostile sent


async def besieged(front, span_s, name):
    """Measure ordinary clients beside a Hostility. Raises BadArgument if it was none."""
    with contextlib.ExitStack() as stack:
        await asyncio.sleep(1.0)        # what others held before is let go
        before_mib = front.resident_mib()
        front.forget_peak()
        program = f"import bench; bench.run_quick(bench.pester({name!r}, {front.port}))"
        process = begin_process(stack, [sys.executable, "-c", program], stdout=subprocess.PIPE)
        if not await asyncio.to_thread(process.stdout.readline):
            raise BadArgument(f"{name}: did not begin")
        seen = await siege_slice(front, span_s)
        process.kill()
        there, sent_bytes = map(int, process.stdout.read().splitlines()[-1].split())
    if there < HOSTILITIES[name].connections / 2 or not sent_bytes:
        raise BadArgument(f"{name}: {there} there, {sent_bytes} bytes sent")
    peak_mib = front.peak_mib()
    return Besieged(*seen, peak_mib, peak_mib - before_mib, sent_bytes / 2**20)


async def siege_round(front, span_s, names, readers, seen):
    """Add to `seen` a Besieged of ordinary clients alone, beside a Siege, and beside that and each Hostility.

    Raises BadArgument if it was no siege.
    """
    before_mib = front.resident_mib()
    seen["without"].append(Besieged(*await siege_slice(front, span_s), before_mib, 0.0))
    siege, before_mib = Siege(front.port, readers), front.resident_mib()
    laying = asyncio.create_task(siege.lay())
    try:
        front.forget_peak()
        await filled(front)
        alone = await siege_slice(front, span_s)
        seen["with"].append(Besieged(*alone, front.peak_mib(), front.peak_mib() - before_mib))
        for name in names:
            seen[name].append(await besieged(front, span_s, name))
        health = await front.answers("/api/health")
    finally:
        laying.cancel()
        siege.lift()
    if laying.done() and not laying.cancelled():
        laying.result()
    if health["inflight"] < readers or not siege.refused or not siege.read_bytes:
        raise BadArgument(f"no siege: {health}, {siege.refused} refused, {siege.read_bytes} bytes read")
    await asyncio.sleep(1.0)


async def run_siege(span_s, rounds, seed, names=tuple(HOSTILITIES), readers=SLOW_READERS, flags=()):
    """Measure ordinary clients without and with a siege, in turn; return {kind of hostility: [Besieged]}."""
    rng, seen = random.Random(f"siege {seed}"), collections.defaultdict(list)
    with contextlib.ExitStack() as stack:
        nodes = await asyncio.gather(*(NodeProcess(stack, rng).start() for _ in range(3)))
        endless = light_process(stack, "endless", "bench.serve_light(bench.EndlessNode)")
        lines = [f"http://127.0.0.1:{node.port} name=n{number} slots=4" for number, node in enumerate(nodes)]
        lines += [f"http://127.0.0.1:{endless.port} name=endless{number} slots={NODE_SLOTS}"
                  for number in range(-(-readers // NODE_SLOTS))]
        front = await GatewayProcess.of(stack, lines, "--no-calibrate", *flags).ready(len(lines))
        await siege_slice(front, SIEGE_SETTLE_S)
        for turn in range(rounds):
            await siege_round(front, span_s, names, readers, seen)
            say(f"{turn + 1} of {rounds} rounds")
    return seen


def allowed_mib(name):
    """Return how much the gateway may grow by a kind of hostility."""
    hostility = HOSTILITIES.get(name, Hostility(0, list))
    return MOST_GROWN_MIB + hostility.connections * hostility.body_mib


def siege_violations(seen):
    """Return a sentence for each kind of hostility that others noticed in its best round, or that took memory."""
    most_s = min(one.p95_s for one in seen["without"]) + MOST_LATER_S
    late = [f"{name}: the P95 of others was {min(one.p95_s for one in found):.3f} s, at most {most_s:.3f} s are right"
            for name, found in seen.items() if min(one.p95_s for one in found) > most_s]
    return late + [f"{name}: the gateway grew by {max(one.grown_mib for one in found):.1f} MiB"
                   for name, found in seen.items() if max(one.grown_mib for one in found) > allowed_mib(name)]


def siege_held(span_s, rounds, seed):
    """Print what a siege costs others, and what it violates; return whether that is nothing."""
    seen = run_quick(run_siege(span_s, rounds, seed))
    rows = [[f"{HALF_HEADS} half heads, {SLOW_READERS} slow readers", "P50 s", "P95 s", "requests/s", "MiB", "grown by",
             "allowed", "taken MiB"]]
    for name, found in seen.items():
        p50_s, p95_s, rate, held_mib, _, taken_mib = (middle(column) for column in zip(*found, strict=True))
        rows.append([name, f"{p50_s:.3f}", f"{p95_s:.3f}", f"{rate:.1f}", f"{held_mib:.0f}",
                     f"{max(one.grown_mib for one in found):.1f}", f"{allowed_mib(name):.0f}", f"{taken_mib:.2f}"])
    violations = siege_violations(seen)
    print(aligned(rows), f"the P95 of others may grow by {MOST_LATER_S} s in the best round", *violations, sep="\n",
          flush=True)
    return not violations


# The soak on the wall clock, the gateway a process of its own.

MOST_DRIFT_MIB, MOST_DRIFT_FILES = 16.0, 30     # from the first minute to the last; load differs from one to the next


class ClockFromZero(asyncio.SelectorEventLoop):
    """The wall clock, counted from the start of the loop as the times of a plan are."""

    def __init__(self):
        self.zero_s = time.monotonic()
        super().__init__()

    def time(self):
        return time.monotonic() - self.zero_s


class LiveSoak(Soak):
    """A soak whose gateway is a process of its own, seen from outside only."""

    async def edit_hosts(self):
        for at_s in self.plan.edits_s:
            await asyncio.sleep(at_s - self.loop.time())
            self.hosts.write_text(self.rng.choice(BAD_HOSTS), encoding="utf-8")
            self.reload()
            await asyncio.sleep(1.0)
            self.save_hosts()
            self.reload()

    def look(self):
        self.sizes.append((self.loop.time(), self.gateway.resident_mib(), self.gateway.descriptors()))

    async def begin(self, stack):
        """Start the nodes, and the gateway in front of them."""
        await self.start_nodes()
        self.sizes = []
        self.gateway = GatewayProcess.of(stack, self.hosts, "--max-queue", str(SOAK_QUEUE), "--queue-timeout",
                                         str(SOAK_WAIT_S))
        await self.gateway.ready(len(self.nodes))
        self.open_for(("127.0.0.1", self.gateway.port), self.gateway.reload)

    def drift(self):
        """Return rows of text, a minute each; complain if the last one is much above the first."""
        minutes = collections.defaultdict(list)
        for at_s, mib, files in self.sizes:
            minutes[int(at_s // 60)].append((mib, files))
        rows = [["minute", "MiB", "descriptors"]]
        medians = []                # (MiB, descriptors)
        for minute, sizes in sorted(minutes.items()):
            if len(sizes) >= 30:    # what is left of the last one is the end of the load
                medians.append([middle(column) for column in zip(*sizes, strict=True)])
                rows.append([str(minute + 1), f"{medians[-1][0]:.1f}", str(medians[-1][1])])
        if medians and (medians[-1][0] > medians[0][0] + MOST_DRIFT_MIB
                        or medians[-1][1] > medians[0][1] + MOST_DRIFT_FILES):
            self.wrong("memory or descriptors have grown")
        return rows


async def run_live_soak(seed, minutes):
    """Run a seed's plan on the wall clock; return its LiveSoak and rows of text."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        soak = LiveSoak(seed, draw_plan(seed, minutes), folder)
        await soak.begin(stack)
        before = soak.gateway.descriptors()
        await soak.play()
        for client, visitor in soak.visitors.items():
            if unasked := await visitor.farewell():
                soak.wrong(f"{client} got what nobody asked for: {unasked[:200]!r}")
        rows = soak.drift()
        after = await soak.settled(lambda: soak.gateway.descriptors() > before + 4 * len(soak.nodes), 100.0)
        rows.append(["all gone", f"{soak.gateway.resident_mib():.1f}", str(soak.gateway.descriptors())])
        if after:
            soak.wrong(f"{before} descriptors at the start, {soak.gateway.descriptors()} at the end")
        for text in await soak.gateway.end():
            soak.wrong(text)
        for node in soak.nodes.values():
            await node.stop()
    return soak, rows


def live_soak_held(first, count, minutes):
    """Run seeds on the wall clock, and print what they hold and violate; return whether they violate nothing."""
    held = True
    for seed in range(first, first + count):
        with asyncio.Runner(loop_factory=ClockFromZero) as runner:
            soak, rows = runner.run(run_live_soak(seed, minutes))
        ends = collections.Counter(outcome.how for outcome in soak.outcomes)
        outcomes = ", ".join(f"{count} {how}" for how, count in sorted(ends.items()))
        print(f"seed {seed}, {minutes:g} minutes: {outcomes}", aligned(rows), *soak.violations, sep="\n", flush=True)
        held = held and not soak.violations
    return held


# ============================================================================================================
# Live clusters: `live`, `baseline`, `overhead URL`
#
# A gateway and nodes that run already.
# ============================================================================================================


def read_address(text):
    """Return (host, port) of a node or gateway: `host`, `host:port` or a URL. Raises BadArgument."""
    try:
        host, port, tls, _ = sollol.parse_url(text)
    except ValueError as error:
        raise BadArgument(str(error)) from None
    if tls:
        raise BadArgument(f"{text}: only http is measured")
    return host, port


async def hosts_model(address, model):
    """Return the model to ask a host for: the one named, or the first it has. Raises BadArgument."""
    host, port = address
    try:
        async with asyncio.timeout(5):
            names = [row["name"] for row in (await get_json(host, port, "/api/tags"))["models"]]
    except (OSError, TimeoutError):
        raise BadArgument(f"{host}:{port} cannot be reached") from None
    except (ValueError, KeyError, TypeError):
        raise BadArgument(f"{host}:{port} does not answer as Ollama does") from None
    if model and sollol.canonical(model) not in map(sollol.canonical, names):
        raise BadArgument(f"{host}:{port} has no model {model!r}; it has {' '.join(names) or 'none'}")
    texts = [name for name in names if "embed" not in name]
    if not model and not texts:
        raise BadArgument(f"{host}:{port} has no model")
    return model or texts[0]


class Rotation:
    """Call several hosts in turn, as a client with a list of nodes does."""

    def __init__(self, addresses):
        self.callers = [Caller(*address) for address in addresses]
        self.names = [f"{host}:{port}" for host, port in addresses]
        self.turn = itertools.count()

    async def call(self, body, priority=None):
        number = next(self.turn) % len(self.callers)
        response = await self.callers[number].call(body)
        response.node = self.names[number]
        return response

    def close(self):
        for caller in self.callers:
            caller.close()


SMALL_WINDOW_TOKENS = 3500          # of Ollama's smallest default window, 4096; what does not fit is answered with 400


async def measure_cluster(options):
    """Measure a live gateway against round-robin over its hosts, in alternating slices; return the Runs."""
    gateway, hosts = read_address(options.url), [read_address(host) for host in options.hosts]
    model = await hosts_model(gateway, options.model)
    for host in hosts:
        await hosts_model(host, model)
    about = (f"{options.url} against round-robin over {' '.join(options.hosts)}, {model}, mixed lengths, "
             f"{options.concurrency} clients, in alternating slices")
    scenario = DEFAULT._replace(name="live", cluster="", models=(model,), clients=options.concurrency,
                                timeout_s=options.timeout, about=about)
    works = (work for work in make_work(scenario, options.seed)
             if work.prompt_tokens + work.output_tokens <= SMALL_WINDOW_TOKENS)
    callers = {"round-robin": Rotation(hosts), SOLLOL: Caller(*gateway)}
    for host in hosts:              # neither side is to pay for loading the model
        work = next(works)
        body = chat_body(work, bounded=True)
        await make_request(Caller(*host), work, asyncio.get_running_loop().time(), options.timeout, body)
    slice_s = max(1.0, min(15.0, options.duration / 4))
    samples, spent_s = {name: [] for name in callers}, dict.fromkeys(callers, 0.0)
    loop = asyncio.get_running_loop()
    try:
        for turn in itertools.count():
            if min(spent_s.values()) >= options.duration:
                break
            for name in sorted(callers, reverse=turn % 2 == 0):
                start_s = loop.time()
                slice_samples = await closed_loop(callers[name], works, options.concurrency, slice_s, options.timeout,
                                          bounded=True)
                shift_s = spent_s[name] - start_s
                samples[name] += [moved(sample, shift_s) for sample in slice_samples]
                spent_s[name] += loop.time() - start_s
                say(f"{name}: {len(samples[name])} requests in {spent_s[name]:.0f} s")
    except asyncio.CancelledError:          # Ctrl-C: what there is counts
        say("stopped")
    finally:
        for caller in callers.values():
            caller.close()
    return scenario, [Run(name, of_side, spent_s[name]) for name, of_side in samples.items() if of_side]


async def measure_baseline(options):
    """Measure each host alone, one request after the other; return rows of text."""
    rows = [["host", "requests", "mean s", "P95 s", "TTFT s", "tokens/s"]]
    for text in options.hosts:
        address = read_address(text)
        scenario = DEFAULT._replace(models=(await hosts_model(address, options.model),))
        works = make_work(scenario, options.seed)[:int(options.count)]
        caller, loop = Caller(*address), asyncio.get_running_loop()
        samples = [await make_request(caller, work, loop.time(), options.timeout, chat_body(work, bounded=True))
                   for work in works]
        caller.close()
        result = figures(Run(text, samples, 1.0))
        tokens = sum(sample.output_tokens for sample in samples)
        rows.append([text, options.count, f"{result.mean_s:.2f}", f"{result.p95_s:.2f}", f"{result.ttft_s:.2f}",
                     f"{tokens / sum(sample.latency_s for sample in samples):.1f}"])
        say(f"{text} done")
    return rows


async def small_calls_s(caller, path, body, count):
    """Return the ascending round-trip times of `count` small requests, one after the other."""
    loop, times_s = asyncio.get_running_loop(), []
    for _ in range(count):
        start_s = loop.time()
        await caller.call(body, path=path)
        times_s.append(loop.time() - start_s)
    return sorted(times_s)


async def token_gaps_s(caller, body):
    """Return the ascending times between the chunks of one stream."""
    loop, gaps_s = asyncio.get_running_loop(), []
    client = await HttpClient.to(caller.host, caller.port)
    client.writer.write(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body), body))
    await client.head()
    last_s = loop.time()
    while await client.chunk():
        gaps_s.append(loop.time() - last_s)
        last_s = loop.time()
    client.writer.transport.abort()
    return sorted(gaps_s[1:])


async def measure_overhead(url, host, model):
    """Measure what a gateway adds to small requests and between tokens; return rows of text.

    Direct and through, in turn, so that a change of the machine's speed hits both.
    """
    through, direct = read_address(url), read_address(host)
    model = await hosts_model(through, model)
    await hosts_model(direct, model)
    small = json.dumps({"model": model}).encode()
    stream = chat_body(Work(0, 0.0, model, 20, 100), bounded=True)
    callers = {"direct": Caller(*direct), "through": Caller(*through)}
    times_s, gaps_s = {name: [] for name in callers}, {name: [] for name in callers}
    for turn in range(5):
        for name, caller in callers.items():
            times_s[name] += await small_calls_s(caller, "/api/show", small, 200)
            gaps_s[name] += await token_gaps_s(caller, stream)
        say(f"{turn + 1} of 5 turns")
    rows = [["", "direct", "through", "added"]]
    for label, found in (("POST /api/show", times_s), ("gap between tokens", gaps_s)):
        for share in (0.5, 0.99):
            values = [share_of(sorted(found[name]), share) * 1000 for name in callers]
            rows.append([f"{label}, P{share * 100:.0f}", *(f"{value:.3f} ms" for value in values),
                         f"{values[1] - values[0]:+.3f} ms"])
    for caller in callers.values():
        caller.close()
    return rows


# ============================================================================================================
# Command line
# ============================================================================================================

def positive(text: str) -> float:
    """Return a positive number. Raises ValueError."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def named_hosts(options: argparse.Namespace) -> list[str]:
    """Return what --hosts says. Raises BadArgument if it says nothing."""
    if not options.hosts:
        raise BadArgument("which nodes? Give --hosts H,H")
    return options.hosts


def show(*tables: list[list[str]], notes: Iterable[str] = ()) -> int:
    """Print tables, and sentences under them; return the exit status of a command that cannot fail."""
    print("\n\n".join([*map(aligned, tables), *filter(None, ["\n".join(notes)])]))
    return 0


def run_matrix(options: argparse.Namespace) -> int:
    return show(*matrix_tables(options.seed, options.pattern), notes=told_texts(told_rivals(FIVE_MODELS)))


def run_agents(options: argparse.Namespace) -> int:
    counts = [int(count) for count in options.counts.split(",") if count.isdigit() and int(count)]
    if len(counts) != len(options.counts.split(",")):
        raise BadArgument(f"agents: {options.counts!r} is not a list of numbers")
    return show(agents_table(counts, ("hom5", "mild5", "het5", "hom10"), options.seed))


def run_coding_agents(options: argparse.Namespace) -> int:
    return show(coding_table(options.counts, options.clusters, options.seed),
                notes=told_texts(told_rivals([AGENTS_MODEL], agents=True)))


def run_gateways(options: argparse.Namespace) -> int:
    unknown = [cluster for cluster in options.clusters if cluster not in CLUSTERS]
    if unknown:
        raise BadArgument(f"no cluster {unknown[0]!r}; there are {' '.join(CLUSTERS)}")
    return show(twins_table(options.clusters, options.pattern, options.rounds, options.seed))


def run_check(options: argparse.Namespace) -> int:
    return int(not all([check_claims(options.seed), run_quick(check_weight())]))


def run_overhead(options: argparse.Namespace) -> int:
    if options.url:
        return show(asyncio.run(measure_overhead(options.url, named_hosts(options)[0], options.model)))
    return show(run_quick(measure_weight(options.rounds)), run_quick(measure_blobs(options.rounds)))


def run_streams(options: argparse.Namespace) -> int:
    if options.waiting:
        return show(run_quick(measure_waiting(options.count, options.rate, options.waiting, options.rounds)))
    return show(run_quick(measure_streams(options.count, options.rate, options.rounds)))


def run_soaks(options: argparse.Namespace) -> int:
    return int(not (live_soak_held if options.realtime else soak_seeds)(options.seed, options.count, options.minutes))


def run_live(options: argparse.Namespace) -> int:
    named_hosts(options)
    try_outputs(options)
    scenario, runs = asyncio.run(measure_cluster(options))
    finish(options, scenario, runs, None)
    return 0


def run_baseline(options: argparse.Namespace) -> int:
    named_hosts(options)
    if not options.count.isdigit() or not int(options.count):
        raise BadArgument(f"baseline: {options.count!r} is not a number of requests")
    return show(asyncio.run(measure_baseline(options)))


def run_serve(options: argparse.Namespace) -> int:
    asyncio.run(serve_nodes(demo_nodes(options.count, options.port, options.speed)))
    return 0


COUNT = {"nargs": "?", "type": sollol.parse_count, "metavar": "N"}
FLAGS = {                           # those of several commands
    "--seed": {"type": int, "default": 1, "metavar": "N", "help": "of lengths, arrivals and noise (%(default)s)"},
    "--realtime": {"action": "store_true", "help": "on the wall clock, the gateway being a process of its own"},
    "--output": {"metavar": "FILE", "help": "write every request as JSON"},
    "--html": {"metavar": "FILE", "help": "write one page with curves, timeline and table"},
    "--rounds": {"type": sollol.parse_count, "default": 3, "metavar": "N", "help": "turns of each (%(default)s)"},
    "--hosts": {"type": lambda text: text.split(","), "default": [], "metavar": "H,H", "help": "nodes, host:port"},
    "--model": {"metavar": "NAME", "help": "what to ask for (the first model there is)"},
    "--timeout": {"type": positive, "default": 120.0, "metavar": "S", "help": "when a client gives up (%(default)g)"},
}


def benchmark_commands(command: Callable[..., Callable[..., argparse.Action]]) -> None:
    """Add the commands that compare policies in virtual time."""
    add = command("compare", compare, "all policies on one scenario, in virtual time", "--seed", "--realtime",
                  "--output", "--html")
    add("--scenario", default=DEFAULT.name, metavar="NAME", help="a wrong name lists all (%(default)s)")
    add("--trace", metavar="FILE", help="take token lengths from a whole trace (CSV)")
    add = command("matrix", run_matrix, "all scenarios, or those that match; minutes", "--seed")
    add("pattern", nargs="?", default=".", metavar="PATTERN", help="of names of scenarios (all)")
    add = command("agents", run_agents, "parallel agents, against one call after the other", "--seed")
    add("counts", metavar="N,N", help="so many agents")
    add = command("coding", run_coding_agents, "agents whose prompts grow from 8,000 to 60,000 tokens in 40 turns, "
                  "beside chats; minutes", "--seed")
    add("counts", nargs="*", type=sollol.parse_count, default=[4, 12], metavar="N", help="agents (4 12)")
    add("--clusters", type=lambda text: text.split(","), default=["mild5"], metavar="C,C", help="of nodes (mild5)")
    add = command("gateways", run_gateways, "two gateways before the same nodes, beside one; minutes", "--seed",
                  "--rounds")
    add("pattern", nargs="?", default=".", metavar="PATTERN", help="of names of scenarios (all)")
    add("--clusters", type=lambda text: text.split(","), default=["mild3", "mild5"], metavar="C,C", help="of nodes "
        "(mild3,mild5)")
    command("ablate", lambda options: show(ablation_table(ABLATED, options.seed)),
            "switch off one term of routing at a time: what is each worth?", "--seed")
    command("tradeoff", lambda options: show(tradeoff_table(options.seed)), "what a lower median costs the slowest: a "
            "request is held back for less or for more, or long ones go last; minutes", "--seed")
    add = command("misled", lambda options: int(not misled_held(options.seed, options.count)), "wrong beliefs at the "
                  "start: exit status 1 if they cost more than 15 % or a request", "--seed")
    add("count", default=20, help="seeds (%(default)s)", **COUNT)
    add = command("mismatch", lambda options: int(not mismatch_held(MISMATCHED, options.pattern, options.seed)), "move "
                  "one assumption at a time that nodes and gateway share: exit status 1 if a gain becomes a loss; "
                  "minutes", "--seed")
    add("pattern", nargs="?", default=".", metavar="PATTERN", help="of names of assumptions (all)")
    command("check", run_check, "check the claims and guard routing: exit status 1 if one is missed", "--seed")


def other_commands(command: Callable[..., Callable[..., argparse.Action]]) -> None:
    """Add the commands of the other programs."""
    add = command("overhead", run_overhead, "what a gateway adds to small requests: SOLLOL, nginx and HAProxy on this "
                  "machine, or the one at URL beside --hosts", "--rounds", "--hosts", "--model")
    add("url", nargs="?", metavar="URL", help="a running gateway")
    add = command("streams", run_streams, "CPU, gaps and memory of token streams, beside nginx and HAProxy", "--rounds")
    add("count", default=300, help="streams (%(default)s)", **COUNT)
    add("--rate", type=sollol.parse_count, default=50, metavar="N", help="tokens/s of each (%(default)s)")
    add("--waiting", type=sollol.parse_count, metavar="N", help="what N waiting requests and 50 nodes cost them")
    command("decisions", lambda options: show(measure_decisions(options.seed)),
            "what a dispatch costs while 10,000 tickets wait", "--seed")
    add = command("soak", run_soaks, "random traffic and faults: exit status 1 if what must always hold does not",
                  "--seed", "--realtime")
    add("count", default=20, help="seeds, from --seed on (%(default)s)", **COUNT)
    add("--minutes", type=positive, default=SOAK_MINUTES, metavar="M", help="of each, virtual or real (%(default)g)")
    add = command("kills", lambda options: int(not kills_held(options.span_s, options.seed)), "SIGKILL to one node "
                  "process after the other: exit status 1 if a request is lost that must not be", "--seed")
    add("span_s", nargs="?", type=positive, default=60.0, metavar="S", help="seconds (%(default)g)")
    add = command("upgrades", lambda options: int(not upgrades_held(options.count, options.speed)), "SIGUSR2 to a busy "
                  "gateway, again and again: exit status 1 if a request is lost; beside nginx's reload")
    add("count", default=5, help="upgrades (%(default)s)", **COUNT)
    add("--speed", type=positive, default=0.3, metavar="X", help="of the slow nodes (%(default)g)")
    add = command("siege", lambda options: int(not siege_held(options.span_s, options.rounds, options.seed)), "clients "
                  "that never finish their head, slow readers, and worse: what do others notice?", "--seed", "--rounds")
    add("span_s", nargs="?", type=positive, default=12.0, metavar="S", help="seconds of a slice (%(default)g)")
    add = command("live", run_live, "a running gateway, against round-robin over its nodes", "--hosts", "--model",
                  "--timeout", "--seed", "--output", "--html")
    add("url", metavar="URL", help="the gateway")
    add("--duration", type=positive, default=60.0, metavar="S", help="seconds for each side (%(default)g)")
    add("--concurrency", type=sollol.parse_count, default=10, metavar="N", help="parallel clients (%(default)s)")
    add = command("baseline", run_baseline, "requests one by one on each node", "--hosts", "--timeout", "--seed")
    add("model", metavar="MODEL", help="what to ask for")
    add("count", metavar="N", help="requests")
    add = command("serve", run_serve, "serve simulated nodes until Ctrl-C")
    add("count", default=3, help="nodes (%(default)s)", **COUNT)
    add("--port", type=sollol.parse_port, default=11434, metavar="PORT", help="of the first, the others follow "
        "(%(default)s; 0: any)")
    add("--speed", type=positive, default=1.0, metavar="X", help="times as fast as what they imitate (%(default)g)")
    command("demo", None, "a gateway in front of three simulated nodes; takes the flags of sollol.py")   # see main


HELP_END = """\
bench.py COMMAND --help tells more.

The real gateway, parser and sockets run in front of simulated nodes: slots, a
hidden queue, loads, evictions, batching, prefills that stop the neighbours,
prefix caches, speeds of real cards, and what nobody can know drawn for each
node. Where everybody waits, the clock jumps: 60 s take about one, and the same
seed gives the same figures. Nothing here was measured on real cards; `live`
does that on yours.

A scenario is KIND/NODES. Kinds: seed is a closed loop, load0.6 an open one at
60 % of what the nodes can do, models5 that with five models, prio with
priorities, hang with a node that hangs. Nodes: homN are N equal ones, mild3 a
4090, a 3060 and a Mac M2, mild5 a 4090, a 3090, two 3060 and an M2, hetN such
ones and a CPU without a card. `compare --scenario x` lists all.

Round-robin (RR) and least-inflight (LI, least-connections) are good plain
proxies behind the same relay: they skip dead nodes and retry. Rivals told the
truth by hand say what they were told. `over bound`: how much longer than with
one server that has the speed of all; no real cluster reaches that."""


def command_line() -> argparse.ArgumentParser:
    """Return the parser: a command, and the options of its own."""
    about = "Measure SOLLOL against plain proxies. Without a command: compare, on three simulated nodes."
    parser = sollol.OneLineParser(prog="bench.py", description=about, epilog=HELP_END,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int] | None, about: str,
                *flags: str) -> Callable[..., argparse.Action]:
        """Add a command, with some of FLAGS; return what adds further options to it."""
        one = commands.add_parser(name, help=about.replace("%", "%%"), description=about)
        one.set_defaults(run=run)
        for flag in flags:
            one.add_argument(flag, **FLAGS[flag])
        return one.add_argument

    benchmark_commands(command)
    other_commands(command)
    return parser


# The flags that chose a program before there were commands. A flag's value is the first argument of its command.
OLD_FLAGS = {"--matrix": "matrix", "--agents": "agents", "--ablate": "ablate", "--misled": "misled",
             "--mismatch": "mismatch", "--check": "check", "--overhead": "overhead", "--streams": "streams",
             "--decisions": "decisions", "--soak": "soak", "--kills": "kills", "--siege": "siege",
             "--sollol-url": "live", "--baseline": "baseline", "--nodes": "serve"}


def with_command(argv: list[str]) -> list[str]:
    """Return a command line that begins with its command: the first one itself, that of an old flag, or compare."""
    if argv and (argv[0] in ("-h", "--help") or not argv[0].startswith("-")):
        return argv
    for number, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in OLD_FLAGS:
            return [OLD_FLAGS[flag], *argv[:number], *([value] if equals else []), *argv[number + 1:]]
    return ["compare", *argv]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["demo"]:
        return sollol.main(["--demo", *argv[1:]], run_demo)
    options = command_line().parse_args(with_command(argv))
    options.argv = argv
    try:
        return options.run(options)
    except (BadArgument, PortTaken) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        sollol.abandon_unwritten()
