"""Writers and readers of one folder, interleaved by a scheduler between single operations of the file system.

Each actor is a thread that stops before every operation on the folder that another one's could change; the scheduler lets
one of them make one step at a time. All schedules in which an actor is interrupted once or twice are run (most faults of
concurrent programs need no more), and random ones beyond. After every step whoever read the folder, or
killed everybody, would find a whole adapter. A kill is a step like any other.
"""

import fcntl
import hashlib
import json
import os
import random
import threading

import pytest

from jlora.checkpoint import adapter, folder
from jlora.checkpoint.folder import NAME
from tests.tiers import thorough

RECORD = {"format": "jlora adapter", "version": 1, "base": "0" * 32, "method": {}, "sites": [], "extras": []}
OPERATIONS = ("open", "close", "listdir", "lstat", "stat", "unlink", "replace", "mkdir")


class Killed(BaseException):
    pass


class Actor:
    """A thread that makes one operation at a time."""

    def __init__(self, world, job):
        self.world, self.job, self.last, self.locks = world, job, "", set()
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.killed, self.done, self.error, self.result = False, False, None, None
        threading.Thread(target=self._run, daemon=True).start()
        self.stopped.acquire()

    def _run(self):
        self.world.actors[threading.get_ident()] = self
        try:
            self.result = self.job(self.world.place)
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        del self.world.actors[threading.get_ident()]
        self.done = True
        self.stopped.release()

    def pause(self):
        self.stopped.release()
        self.go.acquire()

    def step(self):
        self.go.release()
        self.stopped.acquire()

    def kill(self):
        """Kills the actor: none of its further operations happen, not even those that clean up."""
        self.killed = True
        while not self.done:
            self.step()


class World:
    """A folder, its actors, and the operations of the file system that they go through."""

    def __init__(self, root, monkeypatch):
        self.actors, self.place, self.root, self.number = {}, None, root, 0
        self.lstat = os.lstat
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        monkeypatch.setattr(fcntl, "flock", self.wrapped("flock", fcntl.flock))
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # it changes nothing that an actor sees

    def wrapped(self, name, operation):
        def call(of, *args, **kwargs):
            actor = self.actors.get(threading.get_ident())
            if actor is None or not (isinstance(of, int) or str(of).startswith(str(self.place))):
                return operation(of, *args, **kwargs)
            if not actor.killed and not self.commutes(name, of, actor):
                actor.pause()
            if actor.killed:
                if name == "close":
                    operation(of)  # as the system does
                raise Killed
            actor.last = name
            result = operation(of, *args, **kwargs)
            if name == "flock":
                actor.locks.add(of)
            elif name == "close":
                actor.locks.discard(of)
            return result

        return call

    def commutes(self, name, of, actor):
        """Whether it is all the same when an operation happens, as nobody else's changes what it does or tells."""
        if name in ("mkdir", "stat") or (name == "open" and str(of) == str(self.place)):
            return True  # the folder stays, and so does a JSON once it is there
        if name == "lstat":  # what kind of file it is; but after a flock, whether it is still the same
            return actor.last != "flock"
        if name == "close":
            return of not in actor.locks
        return name == "unlink" and not self.is_there(of)

    def is_there(self, path):
        try:
            self.lstat(path)
        except FileNotFoundError:
            return False
        return True

    def run(self, jobs, start, allowed, choose):
        """One schedule: `choose(moves)` says what happens next. The folder is checked after each step."""
        self.number += 1
        self.place = self.root / str(self.number)
        self.place.mkdir()
        start(self.place)
        actors, made = [Actor(self, job) for job in jobs], []
        while moves := [(i, what) for i, actor in enumerate(actors) if not actor.done for what in ("step", "kill")]:
            check(self.place, allowed)
            move = choose(moves, made)
            made.append(move)
            getattr(actors[move[0]], move[1])()
        check(self.place, allowed)
        for actor in actors:
            if not actor.done:
                actor.kill()
            assert actor.error is None, (made, actor.error)
            assert actor.result is not False, made
        check(self.place, allowed)
        write(self.place, b"the next")
        assert check(self.place, [b"the next"]) == b"the next"
        assert len(os.listdir(self.place)) == 2, (made, os.listdir(self.place))  # all that was left is swept
        return made

    def explore(self, jobs, start, allowed, *, interruptions, kills=0):
        """All schedules with at most so many interruptions and kills; their number."""
        before, waiting = self.number, [((), 0, 0)]
        while waiting:
            prefix, spent, dead = waiting.pop()

            def choose(moves, made, prefix=prefix, spent=spent, dead=dead):
                if len(made) < len(prefix):
                    return prefix[len(made)]
                last = (made[-1][0], "step") if made else None
                goes_on = last in moves  # else whoever comes next interrupts nobody
                chosen = last if goes_on else moves[0]
                for move in moves:
                    kill = move[1] == "kill"
                    cost = goes_on and not kill
                    if move != chosen and spent + cost <= interruptions and dead + kill <= kills:
                        waiting.append(((*made, move), spent + cost, dead + kill))
                return chosen

            self.run(jobs, start, allowed, choose)
        return self.number - before


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def write(place, content):
    digest = hashlib.sha256(content).hexdigest()
    text = lambda file: json.dumps(RECORD | {"tensors": {"file": file, "sha256": digest}}).encode()
    folder.replace(place, digest, content, text, lambda: adapter._named(place / NAME))


def writer(content):
    return lambda place: write(place, content)


def reader(place):
    record, opened = adapter._pair(place)
    with opened:
        return record["tensors"]["sha256"] == hashlib.sha256(opened.read()).hexdigest()


def check(place, allowed):
    """Asserts that a reader would find a whole adapter now, one of the allowed ones (None: no adapter yet)."""
    if not (place / NAME).exists():
        assert None in allowed
        return None
    record = json.loads((place / NAME).read_bytes())
    content = (place / record["tensors"]["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == record["tensors"]["sha256"] and content in allowed
    return content


def empty(place):
    pass


def holding(place):
    """An adapter, and what killed writers left."""
    write(place, b"old")
    (place / "factors-0123456789abcdef.safetensors").write_bytes(b"ha")
    (place / f".{NAME}.0123456789abcdef.tmp").write_bytes(b"{")
    (place / f".{NAME}.4321.tmp").write_bytes(b"{")
    (place / ".factors-0123456789abcdef.safetensors.4321.tmp").write_bytes(b"")


CASES = {
    "two writers": ([writer(b"one"), writer(b"two")], holding, [b"old", b"one", b"two"]),
    "two writers of the same": ([writer(b"one"), writer(b"one")], holding, [b"old", b"one"]),
    "two writers, one of what is there": ([writer(b"old"), writer(b"two")], holding, [b"old", b"two"]),
    "two first writers": ([writer(b"one"), writer(b"two")], empty, [None, b"one", b"two"]),
    "two first writers of the same": ([writer(b"one"), writer(b"one")], empty, [None, b"one"]),
    "a reader beside a writer": ([reader, writer(b"one")], holding, [b"old", b"one"]),
    "a reader beside two writers": ([reader, writer(b"one"), writer(b"two")], holding, [b"old", b"one", b"two"]),
    "three writers": ([writer(b"one"), writer(b"old"), writer(b"one")], holding, [b"old", b"one"]),
}


@pytest.mark.parametrize("case", CASES)
def test_random_schedules(case, world):
    jobs, start, allowed = CASES[case]
    for seed in range(60):
        rng = random.Random(seed)
        print(f"seed {seed}")  # pytest shows it where the test fails

        def choose(moves, made, rng=rng):
            kind = "kill" if rng.random() < 0.01 else "step"
            return rng.choice([move for move in moves if move[1] == kind])

        world.run(jobs, start, allowed, choose)


TWO = [case for case, (jobs, *_) in CASES.items() if len(jobs) == 2]  # three have seven times as many schedules


@pytest.mark.parametrize("case", thorough(CASES, "test_random_schedules", TWO))
def test_every_schedule_with_one_interruption(case, world):
    assert world.explore(*CASES[case], interruptions=1) > 10


@pytest.mark.thorough("test_every_schedule_with_one_interruption")
def test_every_schedule_with_two_interruptions(world):
    assert world.explore(*CASES["two writers"], interruptions=2) > 500


@pytest.mark.parametrize("case", ["two writers", "two first writers of the same", "a reader beside a writer"])
def test_a_kill_at_every_moment(case, world):
    assert world.explore(*CASES[case], interruptions=0, kills=1) > 10
