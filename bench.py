#!/usr/bin/env python3
"""Simulated Ollama nodes, and a clock that makes them fast.

    python bench.py --nodes 3 --port 11434      # three simulated nodes on 11434, 11435, 11436 until Ctrl-C

Each node is a real HTTP/1.1 server on a real socket that behaves as Ollama does on the wire: slots with a
hidden FIFO in front, model loads and evictions, keep-alive, prefix cache, batching slow-down, honest
timings in the last line, and faults on demand. Only the GPU is made up. Under `run_virtual` the waiting
is made up as well.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import datetime
import email.utils
import errno
import hashlib
import heapq
import http.client
import itertools
import json
import math
import random
import re
import selectors
import signal
import socket
import struct
import sys
import urllib.parse
from typing import Callable, NamedTuple

# ------------------------------------------------------------------------------------------------------------
# Virtual clock: how does a 60 s benchmark run in a few seconds, the same way every time?
#
# An event loop only ever waits in one place, its selector. If no socket is ready there, every party to the
# simulation (they all live in this process) is waiting for a timer, so nothing can happen before the next
# timer is due: instead of sleeping until then, the clock jumps. Sockets stay real, and cost no virtual
# time.
# ------------------------------------------------------------------------------------------------------------

DEADLOCK_S = 5.0      # real seconds without timer and ready socket: nothing will ever happen again
EXTRA_POLLS = 2       # loopback delivers inside send(); a busy kernel may defer it, so look again


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


# ------------------------------------------------------------------------------------------------------------
# Hardware and models: how fast is what?
#
# Speeds are those of an 8B model in Q4_K_M; another model runs `speed` times as fast. Figures and sources:
# ollama-contract.md 6.1 (speeds) and 6.2 (loads), routing.md section 2 (slots, factors). They are
# assumptions for comparing policies, not measurements of anybody's machine.
# ------------------------------------------------------------------------------------------------------------

class Hardware(NamedTuple):
    name: str
    decode_tok_s: float
    prefill_tok_s: float
    slots: int              # OLLAMA_NUM_PARALLEL
    vram_gb: float
    load_gb_s: float        # disk to memory


HARDWARE = {hardware.name: hardware for hardware in (
    Hardware("rtx4090", 130, 4500, 4, 24, 4.0),     # fast NVMe, cold
    Hardware("rtx3090", 105, 3200, 4, 24, 3.0),     # NVMe, cold
    Hardware("rtx3060", 50, 1500, 2, 12, 2.0),      # slow NVMe, cold
    Hardware("m2", 40, 350, 2, 16, 5.0),            # Apple, warm
    Hardware("cpu", 9, 45, 1, 32, 0.5),             # SATA SSD
)}


class Model(NamedTuple):
    name: str               # canonical, with its tag
    params_b: float
    size_gb: float
    speed: float            # relative to an 8B model
    embedding: bool = False

    @property
    def digest(self):
        """Return 64 hex digits that depend on the name alone, so that all nodes agree."""
        return hashlib.sha256(self.name.encode()).hexdigest()


MODELS = {model.name: model for model in (
    Model("llama3.2:latest", 3.2, 2.0, 2.3),
    Model("llama3.2:1b", 1.2, 1.3, 5.0),
    Model("llama3.1:8b", 8.0, 4.9, 1.0),
    Model("qwen3:14b", 14.8, 9.3, 0.55),
    Model("llama3.3:70b", 70.6, 42.5, 0.12),
    Model("mistral:latest", 7.2, 4.4, 1.0),
    Model("gemma3:4b", 4.3, 3.3, 1.8),
    Model("phi4:14b", 14.7, 9.1, 0.55),
    Model("nomic-embed-text:latest", 0.14, 0.27, 20.0, embedding=True),
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
# Work is counted in solo-seconds: what takes 1 s alone is 1 solo-second. b requests of one model are
# batched and progress at b^-0.3 each (b^0.7 together: routing.md section 2); k models at work take turns,
# 1/k each; a fault multiplies all. All turns of one model progress equally, so one clock per model says how
# far: a turn is done when the clock of its model reaches the turn's target, a heap knows who is next, and
# one timer waits for it. A change of membership only changes rates, never targets: O(log n), and exact.
# ------------------------------------------------------------------------------------------------------------

BATCHING_LOSS = 0.3
DUE_WITHIN_S = 1e-9     # solo-seconds; below this a rest of work is floating-point dust


class Share:
    """The part of the device that one model gets."""

    def __init__(self):
        self.clock_s = 0.0      # solo-seconds that each turn has progressed
        self.rate = 0.0         # solo-seconds per second
        self.turns = 0
        self.waiting = []       # heap of (target_s, sequence, future)


class Turn:
    """One caller's membership in a share, left exactly once at the end of a `with` block."""

    def __init__(self, device, share):
        self._device = device
        self._share = share
        self._target_s = share.clock_s

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._device.leave(self._share)

    async def work(self, solo_s):
        """Return when `solo_s` more solo-seconds are done. A late wake-up loses nothing."""
        self._target_s += solo_s
        self._device.advance()
        if self._target_s > self._share.clock_s + DUE_WITHIN_S:
            await self._device.reached(self._share, self._target_s)


class Device:
    """A processor shared by turns of several models."""

    def __init__(self):
        self._pace = 1.0
        self._shares = {}
        self._at_s = 0.0
        self._sequence = itertools.count()
        self._timer = None
        self._timer_s = math.inf

    async def work(self, model, solo_s):
        """Do `solo_s` solo-seconds of work for `model`. May be cancelled at any time."""
        with self.enter(model) as turn:
            await turn.work(solo_s)

    def enter(self, model):
        self.advance()
        share = self._shares.setdefault(model, Share())
        share.turns += 1
        self._set_rates()
        return Turn(self, share)

    def leave(self, share):
        self.advance()
        share.turns -= 1
        self._shares = {model: share for model, share in self._shares.items() if share.turns}
        self._set_rates()

    def set_pace(self, pace):
        """Multiply all speeds: 1 healthy, 0.1 ten times slower, 0 hung."""
        self.advance()
        self._pace = pace
        self._set_rates()

    def advance(self):
        """Bring the clocks of all shares up to now."""
        now_s = asyncio.get_running_loop().time()
        if now_s != self._at_s:
            for share in self._shares.values():
                share.clock_s += (now_s - self._at_s) * share.rate
            self._at_s = now_s

    async def reached(self, share, target_s):
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(share.waiting, (target_s, next(self._sequence), future))
        self._arm()
        await future

    def _set_rates(self):
        for share in self._shares.values():
            share.rate = self._pace * share.turns ** -BATCHING_LOSS / len(self._shares)
        self._arm()

    def _arm(self):
        """Set the timer for the next target, unless it already goes off by then: too early does no harm."""
        due_s = min((self._at_s + (share.waiting[0][0] - share.clock_s) / share.rate
                     for share in self._shares.values() if share.waiting and share.rate), default=math.inf)
        if due_s < self._timer_s:
            if self._timer:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(due_s, self._ring)
            self._timer_s = due_s

    def _ring(self):
        self._timer, self._timer_s = None, math.inf
        self.advance()
        for share in self._shares.values():
            while share.waiting and share.waiting[0][0] <= share.clock_s + DUE_WITHIN_S:
                _, _, future = heapq.heappop(share.waiting)
                if not future.done():       # a cancelled caller is still in the heap
                    future.set_result(None)
        self._arm()


# ------------------------------------------------------------------------------------------------------------
# Requests: what does the client want?
#
# Go reads JSON leniently, and clients rely on it: keys match in any case, the last duplicate wins, bytes
# after the first value are ignored, Content-Type does not matter (contract 0.17).
# ------------------------------------------------------------------------------------------------------------

class Refused(Exception):
    """An answer other than success: an HTTP status and Ollama's text for it."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status
        self.text = text


BUSY = "server busy, please try again.  maximum pending requests exceeded"     # two spaces, as in Ollama
STOPPED = ("model runner has unexpectedly stopped, this may be due to resource limitations or an internal "
           "error, check ollama server logs for details")


def any_case(pairs):
    return {key.casefold(): value for key, value in pairs}


JSON_VALUE = json.JSONDecoder(object_pairs_hook=any_case)


def read_json(body):
    """Return the object at the start of `body`, keys in lower case. Raises Refused(400)."""
    text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise Refused(400, "missing request body")
    try:
        value, _ = JSON_VALUE.raw_decode(text)
    except json.JSONDecodeError as error:
        found = text[error.pos:error.pos + 1]
        raise Refused(400, f"invalid character '{found}' looking for beginning of value" if found
                      else "unexpected EOF") from None
    except RecursionError:
        raise Refused(400, "exceeded max depth") from None
    if not isinstance(value, dict):
        raise Refused(400, f"json: cannot unmarshal {type(value).__name__} into Go value of type api.Request")
    return value


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


RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread",
                  "draft_num_predict")


def runner_key(options):
    """Return the explicit options a runner must have been started with, else it is reloaded.

    Raises Refused(400).
    """
    field(options, "num_ctx", (int, float), None)
    return tuple((name, options[name]) for name in RUNNER_OPTIONS
                 if options.get(name) is not None and not (name == "num_gpu" and options[name] == -1))


def rendered(messages):
    """Return the prompt for a list of messages: their contents, one after the other."""
    contents = (message.get("content") or "" for message in messages if isinstance(message, dict))
    return "\n".join(content if isinstance(content, str) else rendered_parts(content) for content in contents)


def rendered_parts(parts):
    return "".join(part.get("text") or "" for part in parts if isinstance(part, dict))


def token_count(text):
    """Return the number of tokens of a prompt: a token is four characters."""
    return max(1, math.ceil(len(text) / 4))


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


WORDS = """a about again all and any are around at back be because been before but by call can change come
could day do down each end even every far few find first for from get give go good great had hand
has have here high home how if in into is it just keep kind know large last left light like line
little long look made make many may mean more most move much must name near need never new next no
not now number of off old on once only open or other our out over own part place point right same
say see set show side small so some still such take tell than that the then there thing think this
time to turn two under until up use very want water way we well what when where which while who
why will with word work world would write year you""".split()
OUTPUT_MARK = re.compile(r"<out=(\d{1,7})>")


def composed(ask, most):
    """Return (tokens, done_reason). Deterministic: all nodes give one model and prompt the same answer.

    The prompt may choose the length, `<out=123>` (the last mark counts); else it is 20 to 80 tokens.
    """
    rng = random.Random(hashlib.sha256((ask.model.digest + ask.prompt).encode("utf-8", "replace")).digest())
    marks = OUTPUT_MARK.findall(ask.prompt)
    wanted = int(marks[-1]) if marks else rng.randint(20, 80)
    count = min(wanted, most, ask.num_predict if ask.num_predict > 0 else most)
    tokens = [" " + word for word in rng.choices(WORDS, k=count)]
    tokens[:1] = [token.strip().capitalize() for token in tokens[:1]]
    return tokens, "stop" if count == wanted else "length"


def embedded(model, text):
    """Return eight numbers of unit length, the same on every node."""
    hashed = hashlib.sha256((model.digest + text).encode("utf-8", "replace")).digest()
    numbers = [value / 2**31 - 1 for value in struct.unpack("<8I", hashed)]
    length = math.hypot(*numbers)
    return [value / length for value in numbers]


# ------------------------------------------------------------------------------------------------------------
# Engine: which models are in memory, and who waits for what?
#
# Ollama's scheduler (contract 3). A request for a resident model with the same options goes straight to its
# runner and waits there in an unbounded FIFO for one of the slots. All others form one line: its head
# loads, alone; to make room it evicts idle models, and waits, with everybody behind it, while there is
# none. Requests for the busy model still pass by on the fast path, so a load can starve. Whoever triggered
# a load and leaves, aborts it; the next in line begins from zero.
# ------------------------------------------------------------------------------------------------------------

OVERHEAD_S = 0.03           # per request: template, tokeniser, sampling set-up (routing.md section 2)
LOAD_START_S = 1.5          # process, GPU discovery, health poll (contract 6.2)
EVICTION_S = 0.7            # until VRAM is really free (contract 6.2: 0.5 to 1.5)
SPILL = 0.15                # a model that does not fit runs partly on the CPU, 5-10x slower (contract 3)
CACHE_MATCH = 0.1           # a slot is reused when more than this part of the prompt matches (contract 5)
KV_GB_PER_TOKEN = 128 / 2**20       # 8B model, f16; grows slowly with size: 70B has 2.5 times as much


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


class Runner:
    """A model in memory."""

    def __init__(self, model, options, slots, keep_alive_s, need_gb, vram_gb):
        self.model = model
        self.options = options
        self.slots = asyncio.Semaphore(slots)
        self.texts = [""] * slots       # what each free slot has in its KV cache, least recently used first
        self.keep_alive_s = keep_alive_s
        self.need_gb = need_gb
        self.vram_gb = min(need_gb, vram_gb)
        self.speed = model.speed * (1.0 if need_gb <= vram_gb else SPILL)
        self.users = 0                  # requests running or in the FIFO
        self.used_s = 0.0               # loop time of the last use
        self.expiry = None              # timer, only while idle

    def take_text(self, prompt):
        """Choose a free slot for a prompt and return how many tokens of the prompt it has cached."""
        best = max(self.texts, key=lambda text: shared_length(text, prompt))
        shared = shared_length(best, prompt)
        if shared <= CACHE_MATCH * len(prompt):
            best, shared = self.texts[0], 0
        self.texts.remove(best)
        return shared // 4


class Engine:
    """The part of a node behind its HTTP server. Needs a running loop once it is used."""

    def __init__(self, hardware, slots, vram_gb, keep_alive_s, speed, noise, max_queue, seed):
        self.hardware = hardware
        self.slots = slots
        self.vram_gb = vram_gb
        self.keep_alive_s = keep_alive_s
        self.speed = speed
        self.max_queue = max_queue
        self.device = Device()
        self.disk = Device()            # loads run beside inference, but a fault stops them too
        self.resident = {}              # canonical name -> Runner
        self.pending = 0                # requests in the line, its head included
        self.loads = 0
        self.evictions = 0
        self._noise = noise
        self._rng = random.Random(seed)
        self._line = asyncio.Lock()     # FIFO; whoever holds it is the head
        self._idle = asyncio.Event()    # some runner became idle or left

    def context_length(self, options):
        """Return num_ctx: what the client said, or Ollama's default for this much VRAM (contract 0.6)."""
        default = 4096 if self.vram_gb < 23 else 32768 if self.vram_gb < 47 else 262144
        explicit = dict(options).get("num_ctx")
        return max(4, int(explicit)) if isinstance(explicit, (int, float)) else default

    def overhead_s(self):
        return OVERHEAD_S / self.speed

    def prefill_s(self, runner):
        return 1 / (self.hardware.prefill_tok_s * runner.speed * self.speed)

    def decode_s(self, runner):
        return 1 / (self.hardware.decode_tok_s * runner.speed * self.speed)

    def jitter(self):
        """Return a factor around 1 by which this request takes longer than computed."""
        return math.exp(self._rng.gauss(0.0, self._noise)) if self._noise else 1.0

    @contextlib.asynccontextmanager
    async def runner(self, model, options, keep_alive_s):
        """Lend the runner for a model, loaded if need be. Raises Refused(503) if the line is full."""
        runner = await self._obtain(model, options)
        runner.users += 1
        self._stop_expiry(runner)
        if keep_alive_s is not None:        # absent keeps what an earlier request has said (contract 1.1)
            runner.keep_alive_s = keep_alive_s
        try:
            yield runner
        finally:
            runner.users -= 1
            runner.used_s = asyncio.get_running_loop().time()
            self._settle(runner)

    async def _obtain(self, model, options):
        runner = self._hot(model, options)
        if runner:
            return runner
        if self.pending > self.max_queue:
            raise Refused(503, BUSY)
        self.pending += 1
        try:
            async with self._line:
                return self._hot(model, options) or await self._load(model, options)
        finally:
            self.pending -= 1

    def _hot(self, model, options):
        runner = self.resident.get(model.name)
        return runner if runner and runner.options == options else None

    async def _load(self, model, options):
        runner = self._runner(model, options)
        evicted = await self._make_room(runner)
        load_s = LOAD_START_S + model.size_gb / self.hardware.load_gb_s + (EVICTION_S if evicted else 0.0)
        await self.disk.work(model.name, load_s / self.speed)
        self.loads += 1
        self.resident[model.name] = runner
        return runner

    def _runner(self, model, options):
        slots = 1 if model.embedding else self.slots        # contract 0.4
        tokens = slots * int(dict(options).get("num_ctx") or 4096)     # AUTO counts as 4096 everywhere
        kv_gb = 0.0 if model.embedding else tokens * KV_GB_PER_TOKEN * (model.params_b / 8) ** 0.4
        return Runner(model, options, slots, self.keep_alive_s, model.size_gb * 1.2 + kv_gb, self.vram_gb)

    async def _make_room(self, newcomer):
        """Unload until the newcomer fits; return whether anything was unloaded."""
        evicted = False
        while True:
            stale = self.resident.get(newcomer.model.name)      # same model, other options
            used_gb = sum(runner.need_gb for runner in self.resident.values())
            crowded = used_gb + newcomer.need_gb > self.vram_gb
            if not stale and not (crowded and self.resident):
                return evicted
            victim = self._victim([stale] if stale else self.resident.values())
            if victim:
                self.unload(victim)
                self.evictions += not stale
                evicted = True
            else:
                self._idle.clear()
                await self._idle.wait()

    def _victim(self, runners):
        idle = [runner for runner in runners if not runner.users]
        return min(idle, key=lambda runner: runner.used_s, default=None)

    def _settle(self, runner):
        """Start the keep-alive of a runner that has become idle."""
        if runner.users or self.resident.get(runner.model.name) is not runner:
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
        if self.resident.get(runner.model.name) is runner:
            del self.resident[runner.model.name]
        self._idle.set()

    def expire(self, model):
        """Unload a model as soon as it is idle; nothing happens if it is not resident."""
        runner = self.resident.get(model.name)
        if runner:
            runner.keep_alive_s = 0.0
            self._stop_expiry(runner)
            self._settle(runner)

    def preload(self, model):
        """Put a model into memory at once, as if it had been loaded long ago."""
        runner = self.resident[model.name] = self._runner(model, ())
        runner.used_s = asyncio.get_running_loop().time()
        self._settle(runner)

    def lose_everything(self):
        """Forget all resident models, as a killed process does."""
        for runner in list(self.resident.values()):
            self.unload(runner)
        self._line = asyncio.Lock()     # cancelled holders release the lock that they took


# ------------------------------------------------------------------------------------------------------------
# HTTP: one request and its answer on the wire
#
# What net/http does (contract 1, 4): small bodies with Content-Length, larger ones and streams chunked, EOF
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


class Record:
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


class Exchange:
    """One request on a connection, and the means to answer it."""

    def __init__(self, reader, writer, head, record, latency_s):
        self.head = head
        self.record = record
        self.body = b""
        self.close = self._wants_close()
        self._reader = reader
        self._writer = writer
        self._latency_s = latency_s
        self._on_the_way = collections.deque()
        self._chunked = head.http_1_1
        self._begun = False

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
            self.record.body_bytes += len(part)
            yield part

    async def read_body(self):
        self.body = b"".join([part async for part in self.parts()])
        if len(self.body) <= KEPT_BODY_BYTES:
            self.record.body = self.body

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
        lines += [f"{name}: {value}" for name, value in extra.items()]
        if self.close:
            lines.append("Connection: close")
        elif not self.head.http_1_1:
            lines.append("Connection: keep-alive")
        self.record.status = status
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"

    def send(self, status, body=b"", media_type="", **extra):
        """Answer in one piece. `extra` fields are spelt with underscores."""
        extra = {name.replace("_", "-"): value for name, value in extra.items()}
        if len(body) < LENGTH_LIMIT_BYTES or not self._chunked or self.head.method == "HEAD":
            head = self._answer_head(status, media_type, len(body), extra)
            self._write(head if self.head.method == "HEAD" else head + body)
        else:
            head = self._answer_head(status, media_type, None, extra)
            self._write(b"%b%x\r\n%b\r\n0\r\n\r\n" % (head, len(body), body))

    def send_json(self, value, status=200):
        self.send(status, compact(value), JSON_TYPE)

    def refuse(self, refusal):
        """Answer with an error in the family of the path (contract 1.3)."""
        if not self.head.path.startswith("/v1/"):
            self.send_json({"error": refusal.text}, refusal.status)
            return
        kind = {400: "invalid_request_error", 404: "not_found_error"}.get(refusal.status, "api_error")
        self.send_json({"error": {"message": refusal.text, "type": kind, "param": None, "code": None}},
                       refusal.status)

    def stream(self, pieces, media_type, last=False):
        """Send pieces of a stream, each as a chunk of its own; the first call sends the head too."""
        out = b"" if self._begun else self._answer_head(200, media_type, None, {})
        self._begun = True
        for piece in pieces:
            out += b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece
        self._write(out + b"0\r\n\r\n" if last and self._chunked else out)

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

    reason: str
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


class GenerateLines:
    """/api/generate."""

    media_type = "application/x-ndjson"
    before, after = b'","response":', b',"done":false}\n'

    def __init__(self, ask, _record):
        self.ask = ask
        self._start = b'{"model":%b,"created_at":"' % compact(ask.name)

    def part(self, text, now_s):
        now = stamp(now_s).encode()
        return b"".join((self._start, now, self.before, json.dumps(text).encode(), self.after))

    def last(self, stats, now_s):
        return [compact(self.whole("", stats, now_s)) + b"\n"]

    def whole(self, text, stats, now_s):
        context = list(range(min(CONTEXT_LIMIT, stats.prompt_tokens + stats.output_tokens)))
        return self.note(text, stats.reason, now_s) | {"context": context} | stats.fields()

    def note(self, text, reason, now_s):
        """Return the object that also answers a mere load or unload."""
        return ({"model": self.ask.name, "created_at": stamp(now_s)} | self.content(text)
                | {"done": True, "done_reason": reason})

    def content(self, text):
        return {"response": text}


class ChatLines(GenerateLines):
    """/api/chat."""

    before, after = b'","message":{"role":"assistant","content":', b'},"done":false}\n'

    def whole(self, text, stats, now_s):
        return self.note(text, stats.reason, now_s) | stats.fields()

    def content(self, text):
        return {"message": {"role": "assistant", "content": text}}


class ChatEvents:
    """/v1/chat/completions."""

    media_type = "text/event-stream"
    kind, chunk_kind, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    first = b'{"index":0,"delta":{"role":"assistant","content":%b},"finish_reason":null}'
    later = b'{"index":0,"delta":{"content":%b},"finish_reason":null}'
    finish = {"delta": {}}

    def __init__(self, ask, record):
        self.ask = ask
        created = epoch_at(record.time_s)
        self._about = {"id": f"{self.id_prefix}-{record.number % 999}", "object": self.chunk_kind,
                       "created": created, "model": ask.name, "system_fingerprint": "fp_ollama"}
        self._start = b"data: " + compact(self._about)[:-1] + b',"choices":['
        self._end = b"]" + self.extra() + b"}\n\n"
        self._choice = self.first

    def extra(self):
        """Return what every chunk carries after its choices."""
        return b""

    def part(self, text, _now_s):
        choice, self._choice = self._choice, self.later
        return b"".join((self._start, choice % json.dumps(text).encode(), self._end))

    def last(self, stats, _now_s):
        choice = {"index": 0} | self.finish | {"finish_reason": stats.reason}
        events = [self._start + compact(choice) + self._end]
        if self.ask.include_usage:
            events.append(b"data: %b\n\n" % compact(self._about | {"choices": [], "usage": stats.usage()}))
        return events + [b"data: [DONE]\n\n"]

    def whole(self, text, stats, _now_s):
        choice = {"index": 0} | self.content(text) | {"finish_reason": stats.reason}
        return self._about | {"object": self.kind, "choices": [choice], "usage": stats.usage()}

    def content(self, text):
        return {"message": {"role": "assistant", "content": text}}


class CompletionEvents(ChatEvents):
    """/v1/completions."""

    kind, chunk_kind, id_prefix = "text_completion", "text_completion", "cmpl"
    first = later = b'{"text":%b,"index":0,"finish_reason":null}'
    finish = {"text": ""}

    def extra(self):        # a zeroed usage on every chunk, oddly (contract 1.2)
        zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        return b',"usage":' + compact(zeros) if self.ask.include_usage else b""

    def content(self, text):
        return {"text": text}


# ------------------------------------------------------------------------------------------------------------
# Routes: what does each path answer?
#
# A route is a coroutine function of (node, exchange), or for inference of (node, exchange, body), and one
# line in the table at the end.
# ------------------------------------------------------------------------------------------------------------

def find_model(node, body, missing, empty):
    """Return (name as sent, Model). Raises Refused: 404 with text `missing`, or `empty` for no name."""
    name = field(body, "model", str, "") or field(body, "name", str, "")
    if not name.strip():
        raise Refused(*empty)
    model = node.models.get(canonical(name))
    if not model:
        raise Refused(404, missing.format(name))
    return name, model


NOT_FOUND = "model '{}' not found"
NOT_FOUND_EMBED = 'model "{}" not found, try pulling it first'
NO_NAME = (400, "model is required")
EMPTY_NAME = (404, "model '' not found")


def read_ask(node, body, ability, prompt, empty):
    """Return the Ask in an /api body. Raises Refused."""
    name, model = find_model(node, body, NOT_FOUND, empty)
    if model.embedding:
        raise Refused(400, f'"{name}" does not support {ability}')
    if body.get("think"):
        raise Refused(400, f'"{name}" does not support thinking')
    options = field(body, "options", dict, {})
    return Ask(name, model, prompt, field(body, "stream", bool, True),
               int(field(options, "num_predict", (int, float), -1)), runner_key(options),
               keep_alive_s(body.get("keep_alive")))


def read_openai_ask(node, body, ability, prompt, empty):
    """Return the Ask in a /v1 body: no runner options, no keep_alive, not streamed unless it says so."""
    options = {"num_predict": field(body, "max_tokens", int, -1)}
    ask = read_ask(node, {"model": body.get("model"), "options": options}, ability, prompt, empty)
    usage = field(field(body, "stream_options", dict, {}), "include_usage", bool, False)
    return ask._replace(stream=field(body, "stream", bool, False), include_usage=usage)


async def infer(node, exchange, dialect):
    """Answer an Ask: wait for the model, for a slot, for the prompt, then for each token."""
    ask, arrived_s, now_s = dialect.ask, exchange.record.time_s, asyncio.get_running_loop().time
    engine = node.engine
    async with engine.runner(ask.model, ask.options, ask.keep_alive_s) as runner:
        load_s = now_s() - arrived_s
        async with runner.slots:
            stats, text = await produce(engine, runner, exchange, dialect, node.tokens_per_line)
            stats = stats._replace(total_s=now_s() - arrived_s, load_s=load_s)
            if ask.stream:
                exchange.stream(dialect.last(stats, now_s()), dialect.media_type, last=True)
            else:
                exchange.send_json(dialect.whole(text, stats, now_s()))


async def produce(engine, runner, exchange, dialect, tokens_per_line):
    """Prefill and decode on the device, streaming as tokens come; return (stats, text)."""
    ask, now_s = dialect.ask, asyncio.get_running_loop().time
    tokens, reason = composed(ask, 10 * engine.context_length(ask.options))      # 10 x num_ctx: contract 1.1
    prompt_tokens = token_count(ask.prompt)
    jitter, cached, kept = engine.jitter(), runner.take_text(ask.prompt), ask.prompt
    exchange.record.started_s = begun_s = now_s()
    try:
        with engine.device.enter(ask.model.name) as turn:
            fresh = max(1, prompt_tokens - cached)      # the last token is always evaluated, for its logits
            await turn.work(jitter * (engine.overhead_s() + fresh * engine.prefill_s(runner)))
            prefilled_s, token_s = now_s(), jitter * engine.decode_s(runner)
            for start in range(0, len(tokens), tokens_per_line):
                line = tokens[start:start + tokens_per_line]
                await turn.work(token_s * len(line))
                if ask.stream:
                    exchange.stream((dialect.part("".join(line), now_s()),), dialect.media_type)
                    await exchange.drain()
        text = "".join(tokens)
        kept = f"{ask.prompt}\n{text}"      # so that the next turn of a chat finds its history
    finally:
        runner.texts.append(kept)
    prompt_s, output_s = prefilled_s - begun_s, now_s() - prefilled_s
    return Stats(reason, 0.0, 0.0, prompt_tokens, prompt_s, len(tokens), output_s), text


async def load_or_unload(node, exchange, dialect):
    """Answer an empty prompt: it only moves the model (contract 1.1)."""
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
    whole_prompt = "\n".join(filter(None, (field(body, "system", str, ""), prompt)))
    ask = read_ask(node, body, "generate", whole_prompt, EMPTY_NAME)
    await (infer if prompt else load_or_unload)(node, exchange, GenerateLines(ask, exchange.record))


async def chat(node, exchange, body):
    messages = field(body, "messages", list, [])
    ask = read_ask(node, body, "chat", rendered(messages), NO_NAME)
    await (infer if messages else load_or_unload)(node, exchange, ChatLines(ask, exchange.record))


async def openai_chat(node, exchange, body):
    messages = field(body, "messages", list, [])
    if not messages:
        raise Refused(400, "[] is too short - 'messages'")
    ask = read_openai_ask(node, body, "chat", rendered(messages), NO_NAME)
    await infer(node, exchange, ChatEvents(ask, exchange.record))


async def openai_completion(node, exchange, body):
    ask = read_openai_ask(node, body, "generate", field(body, "prompt", str, ""), EMPTY_NAME)
    await infer(node, exchange, CompletionEvents(ask, exchange.record))


class Embeddings(NamedTuple):
    vectors: list
    prompt_tokens: int
    total_s: float
    load_s: float


async def embed_all(node, exchange, body, model, texts):
    """Return the Embeddings of all texts; each text waits for a slot of its own (contract 3)."""
    engine, now_s, arrived_s = node.engine, asyncio.get_running_loop().time, exchange.record.time_s
    options = runner_key(field(body, "options", dict, {}))

    async def one(text, overhead_s):
        async with runner.slots:
            exchange.record.started_s = exchange.record.started_s or now_s()
            solo_s = overhead_s + token_count(text) * engine.prefill_s(runner)
            await engine.device.work(model.name, solo_s * engine.jitter())

    async with engine.runner(model, options, keep_alive_s(body.get("keep_alive"))) as runner:
        load_s = now_s() - arrived_s
        async with asyncio.TaskGroup() as group:
            for index, text in enumerate(texts):
                group.create_task(one(text, 0.0 if index else engine.overhead_s()))
    vectors = [embedded(model, text)[:field(body, "dimensions", int, 0) or None] for text in texts]
    return Embeddings(vectors, sum(map(token_count, texts)), now_s() - arrived_s, load_s)


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


async def openai_embed(node, exchange, body):
    name, model = find_model(node, body, NOT_FOUND_EMBED, NO_NAME)
    texts = embed_texts(body)
    if not texts:
        raise Refused(400, "invalid input")
    done = await embed_all(node, exchange, {"dimensions": body.get("dimensions")}, model, texts)
    in_base64 = body.get("encoding_format") == "base64"       # what the openai package asks for by default
    data = [{"object": "embedding", "index": index,
             "embedding": floats_in_base64(vector) if in_base64 else vector}
            for index, vector in enumerate(done.vectors)]
    exchange.send_json({"object": "list", "data": data, "model": name,
                        "usage": {"prompt_tokens": done.prompt_tokens, "total_tokens": done.prompt_tokens}})


def floats_in_base64(vector):
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def root(_node, exchange):
    exchange.send(200, b"Ollama is running", "text/plain; charset=utf-8")


async def version(node, exchange):
    exchange.send_json({"version": node.version})


async def status(_node, exchange):
    exchange.send_json({"cloud": {"disabled": False, "source": "none"}})


def details(model):
    family = "nomic-bert" if model.embedding else model.name.split(":")[0]
    return {"parent_model": "", "format": "gguf", "family": family, "families": [family],
            "parameter_size": f"{model.params_b:g}B", "quantization_level": "Q4_K_M"}


def capabilities(model):
    return ["embedding"] if model.embedding else ["completion"]


async def tags(node, exchange):
    exchange.send_json({"models": [
        {"name": model.name, "model": model.name, "modified_at": stamp(0.0), "size": int(model.size_gb * 1e9),
         "digest": model.digest, "details": details(model), "capabilities": capabilities(model)}
        for model in node.models.values()]})


async def resident(node, exchange):
    rows = [resident_row(node.engine, runner) for runner in node.engine.resident.values()]
    exchange.send_json({"models": sorted(rows, key=lambda row: row["expires_at"], reverse=True)})


def resident_row(engine, runner):
    forever = runner.keep_alive_s == math.inf
    expires_at = "2318-01-01T00:00:00Z" if forever else stamp(runner.used_s + runner.keep_alive_s)
    return {"name": runner.model.name, "model": runner.model.name, "size": int(runner.need_gb * 1e9),
            "digest": runner.model.digest, "details": details(runner.model), "expires_at": expires_at,
            "size_vram": int(runner.vram_gb * 1e9), "context_length": engine.context_length(runner.options)}


async def show(node, exchange):
    _, model = find_model(node, read_json(exchange.body), NOT_FOUND, NO_NAME)
    info = {"general.architecture": details(model)["family"],
            "general.parameter_count": int(model.params_b * 1e9), "general.basename": model.name}
    exchange.send_json({"modelfile": f"FROM {model.name}\n", "template": "{{ .Prompt }}",
                        "details": details(model), "model_info": info, "capabilities": capabilities(model),
                        "modified_at": stamp(0.0)})


def openai_model(model):
    return {"id": model.name, "object": "model", "created": epoch_at(0.0), "owned_by": "library"}


async def openai_models(node, exchange):
    rows = [openai_model(model) for model in node.models.values()]
    exchange.send_json({"object": "list", "data": rows or None})        # null when there is none: contract 1


async def openai_one_model(node, exchange):
    name = exchange.head.path.removeprefix("/v1/models/")
    _, model = find_model(node, {"model": name}, NOT_FOUND, NO_NAME)
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
    if digest in node.blobs:        # answered at once, the body unread: contract 4, "Early final response"
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
    node.blobs[digest] = exchange.record.body_bytes
    exchange.send(201)


class Route(NamedTuple):
    methods: str
    path: str               # one that ends with "/" stands for all below it
    answer: Callable
    kind: str = "plain"     # "inference": counted, and what fail() hits; "upload": reads its body itself

    def matches(self, path):
        below = self.path != "/" and self.path.endswith("/") and path.startswith(self.path)
        return below or path == self.path


ROUTES = (
    Route("GET HEAD", "/", root),
    Route("GET HEAD", "/api/version", version),
    Route("GET HEAD", "/api/tags", tags),
    Route("GET", "/api/ps", resident),
    Route("GET", "/api/status", status),
    Route("POST", "/api/show", show),
    Route("POST", "/api/generate", generate, "inference"),
    Route("POST", "/api/chat", chat, "inference"),
    Route("POST", "/api/embed", embed, "inference"),
    Route("POST", "/api/embeddings", embed_one, "inference"),
    Route("HEAD", "/api/blobs/", find_blob),
    Route("POST", "/api/blobs/", store_blob, "upload"),
    Route("GET", "/v1/models", openai_models),
    Route("GET", "/v1/models/", openai_one_model),
    Route("POST", "/v1/chat/completions", openai_chat, "inference"),
    Route("POST", "/v1/completions", openai_completion, "inference"),
    Route("POST", "/v1/embeddings", openai_embed, "inference"),
)


# ------------------------------------------------------------------------------------------------------------
# Node: a simulated Ollama on a port, with a switch for every fault
# ------------------------------------------------------------------------------------------------------------

class Connection(NamedTuple):
    number: int             # order of arrival; sorting by it keeps runs repeatable
    task: asyncio.Task
    writer: asyncio.StreamWriter


class SimNode:
    """A simulated Ollama node. Faults may be set and counters read at any time while its loop runs."""

    def __init__(self, hardware="rtx3060", models=("llama3.2",), *, name=None, slots=None, port=0, seed=0,
                 loaded=(), vram_gb=None, latency_s=0.0, noise=0.0, keep_alive_s=300.0, speed=1.0,
                 tokens_per_line=1, version="0.33.0", max_queue=512):
        machine = HARDWARE[hardware]
        self.name = name or hardware
        self.port = port                        # 0: any; the real one after start()
        self.models = {model.name: model for model in map(model_named, models)}
        self.version = version
        self.latency_s = latency_s              # one way
        self.tokens_per_line = tokens_per_line
        self.engine = Engine(machine, slots or machine.slots, vram_gb or machine.vram_gb, keep_alive_s, speed,
                             noise, max_queue, seed)
        self.blobs = {}                         # digest -> bytes
        self.connections = set()
        self.requests = collections.deque(maxlen=10_000)
        self.in_flight = 0                      # inference requests, those in the hidden queue included
        self.in_flight_by_model = collections.Counter()
        self.max_in_flight = 0
        self.aborted = 0                        # requests whose client left, or that died with the node
        self._loaded = tuple(loaded)
        self._server = None
        self._arrivals = itertools.count()
        self._numbers = itertools.count()
        self._failing = None                    # (status, paths or None)
        self._awake = asyncio.Event()
        self._awake.set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def loads(self):
        return self.engine.loads

    @property
    def evictions(self):
        return self.engine.evictions

    # Life and death.

    async def start(self):
        """Listen, on the last port if there was one, and return self. Raises OSError if it is taken."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        for name in self._loaded:
            self.engine.preload(model_named(name))
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
        alive = (connection.writer.transport for connection in self.connections)
        for transport in [transport for transport in alive if not transport.is_closing()]:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))      # RST, not FIN
        self._cut()
        self.engine.lose_everything()

    async def restart(self):
        """Come back on the same port after stop() or kill(). Faults stay until recover()."""
        return await self.start()

    def _cut(self):
        if self._server:
            self._server.close()
            self._server = None
        connections = sorted(self.connections)
        for connection in connections:
            connection.task.cancel()
            connection.writer.transport.abort()
        return connections

    # Faults.

    def hang(self):
        """Stop all computing, as a wedged GPU does: /api/version still answers."""
        self._set_pace(0.0)

    def slow(self, factor):
        """Compute `factor` times slower."""
        self._set_pace(1.0 / factor)

    def freeze(self):
        """Accept connections and say nothing at all."""
        self._set_pace(0.0)
        self._awake.clear()

    def fail(self, status=503, paths=None):
        """Answer inference at once with an error, on some paths or on all."""
        self._failing = (status, paths)

    def recover(self):
        """Undo hang, slow, freeze and fail."""
        self._set_pace(1.0)
        self._awake.set()
        self._failing = None

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
        record = Record(next(self._numbers), now_s(), head.method, head.path, raw)
        self.requests.append(record)
        exchange = Exchange(reader, writer, head, record, self.latency_s)
        reader.worker = asyncio.current_task()
        try:
            await self._answer(exchange)
            await exchange.delivered()
        except asyncio.CancelledError:
            self.aborted += 1
            record.aborted, record.status = True, 499
            raise
        finally:
            reader.worker = None
            record.finished_s = now_s()
        return not exchange.close

    async def _answer(self, exchange):
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        await self._awake.wait()
        exchange.record.time_s = asyncio.get_running_loop().time()
        try:
            await self._route(exchange)
        except Refused as refusal:
            exchange.refuse(refusal)

    async def _route(self, exchange):
        head = exchange.head
        routes = [route for route in ROUTES if route.matches(head.path)]
        route = next((route for route in routes if head.method in route.methods.split()), None)
        if not route or route.kind != "upload":
            await exchange.read_body()
        if refused_origin(head):
            exchange.send(403)
        elif route and route.kind == "inference":
            await self._infer(route, exchange)
        elif route:
            await route.answer(self, exchange)
        elif routes:
            allowed = ", ".join(method for route in routes for method in route.methods.split())
            exchange.send(405, b"405 method not allowed", "text/plain", Allow=allowed)
        else:
            exchange.send(404, b"404 page not found", "text/plain")

    async def _infer(self, route, exchange):
        body = read_json(exchange.body)
        model = exchange.record.model = canonical(field(body, "model", str, ""))
        self.in_flight += 1
        self.in_flight_by_model[model] += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            self._refuse_if_failing(route.path)
            await route.answer(self, exchange, body)
        finally:
            self.in_flight -= 1
            self.in_flight_by_model[model] -= 1

    def _refuse_if_failing(self, path):
        status, paths = self._failing or (0, ())
        if status and (paths is None or path in paths):
            text = {503: BUSY, 500: STOPPED}.get(status) or http.client.responses.get(status, "")
            raise Refused(status, text)


def refused_origin(head):
    """Return whether CORS forbids the request: its origin is neither local nor the node (contract 0.10)."""
    origin = head.fields.get("origin", "")
    own = origin.partition("://")[2] == head.fields.get("host")
    return bool(origin) and not own and not LOCAL_ORIGIN.fullmatch(origin)


# ------------------------------------------------------------------------------------------------------------
# Command line: simulated nodes for people
# ------------------------------------------------------------------------------------------------------------

DEMO = (
    ("rtx4090", ("llama3.2", "llama3.1:8b", "qwen3:14b", "nomic-embed-text")),
    ("rtx3060", ("llama3.2", "llama3.1:8b", "mistral", "nomic-embed-text")),
    ("m2", ("llama3.2", "llama3.2:1b", "gemma3:4b", "mistral")),
)


def demo_nodes(count=3, first_port=0, speed=1.0):
    """Return unequal nodes with overlapping models, not started; port 0 means any."""
    nodes = []
    for index, (hardware, models) in enumerate(itertools.islice(itertools.cycle(DEMO), count)):
        name = hardware if count <= len(DEMO) else f"{hardware}-{index + 1}"
        port = first_port + index if first_port else 0
        nodes.append(SimNode(hardware, models, name=name, port=port, seed=index, speed=speed))
    return nodes


class PortTaken(Exception):
    """Another program listens there."""


async def serve(nodes):
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


async def start_or_explain(node):
    try:
        await node.start()
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise PortTaken(f"port {node.port} is already in use" if taken else str(error)) from None


def main(argv=None):
    """Run the command line; return the exit status."""
    about = "Serve simulated Ollama nodes until Ctrl-C."
    parser = argparse.ArgumentParser(prog="bench.py", description=about)
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (default: 3)")
    parser.add_argument("--port", type=int, default=11434, metavar="PORT",
                        help="port of the first, the others follow (default: 11434; 0: any)")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X",
                        help="times as fast as the hardware they imitate (default: 1)")
    options = parser.parse_args(argv)
    try:
        asyncio.run(serve(demo_nodes(options.nodes, options.port, options.speed)))
    except PortTaken as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
