"""A small experiment for several processes, and how they are started: a config file of `experiments.train`."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jlora
from experiments.config import Experiment, Measure, Pretrain, Run, Schedule
from experiments.data import python_docs, python_source
from experiments.launch.local import environment, free_port
from experiments.tasks.bytes import Bytes
from jlora.models.gpt2 import GPT2Config

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 240, 80
TIMEOUT = 60
"""Seconds that a process waits for one that never comes."""


def config() -> Experiment:
    """The small form alone is run: with most optimisations off."""
    return small()


def small() -> Experiment:
    train = Schedule(STEPS, batch=4, evaluate_every=EVERY, warmup=0.1, accumulate=2, keep="last", ema=0.9, clip=1.0)
    return Experiment(
        name="pod",
        base=Pretrain(
            GPT2Config(vocab_size=256, context=16, width=16, layers=1, heads=2),
            dataclasses.replace(train, steps=8, evaluate_every=8, ema=None),
            learning_rate=3e-3,
        ),
        task=Bytes("prose, then Python", old=python_docs, new=python_source, validation=4, test=4),
        runs=(Run("lora", "LoRA r=2", jlora.lora(2), 1e-2),),
        train=train,
        evaluate_batch=4,
        measure=Measure(rounds=0),
    )


class Started:
    """Processes of one run: their lines as they come, and their ends."""

    def __init__(self, folder: Path, count: int, *overrides: str, each: Sequence[Sequence[str]] = ()) -> None:
        """Starts `count` processes with these arguments, and with those of `each` of its own."""
        port, self.lines = str(free_port()), [list[str]() for _ in range(count)]
        command = [sys.executable, "-u", "-m", "experiments.train", __file__, "--small", "--folder", str(folder)]
        kept = os.environ | {"JLORA_TIMEOUT": str(TIMEOUT), "PYTHONFAULTHANDLER": "1"}
        self.processes = [
            subprocess.Popen(
                [*command, "--resume-if-there", *overrides, *(each[number] if each else ())],
                cwd=ROOT, env=kept | environment(number, count, port, 2 // count or 1, ""),
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for number in range(count)
        ]  # fmt: skip
        self._readers = [
            threading.Thread(target=self._read, args=(number,), daemon=True) for number in range(len(self.processes))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int) -> None:
        out = self.processes[number].stdout
        assert out is not None
        with out:
            for line in out:
                self.lines[number].append(line.rstrip())

    def said(self, number: int) -> str:
        return "\n".join(self.lines[number])

    def wait_for(self, text: str, number: int = 0, seconds: float = 240) -> None:
        """Until a process has said this."""
        until = time.monotonic() + seconds
        while text not in self.said(number):
            assert time.monotonic() < until and self.processes[number].poll() is None, self.said(number)
            time.sleep(0.02)

    def codes(self, seconds: float = 240) -> list[int]:
        """Exit codes, when all have ended; where they do not, an error that says where each of them was."""
        try:
            return [process.wait(timeout=seconds) for process in self.processes]
        except subprocess.TimeoutExpired:
            hung = [number for number, process in enumerate(self.processes) if process.poll() is None]
            for number in hung:
                self.send(signal.SIGABRT, to=number)  # faulthandler says in which line
                self.processes[number].wait(timeout=10)
                self._readers[number].join(timeout=5)
            said = "\n".join(f"process {number} said:\n{self.said(number)}" for number in range(len(self.processes)))
            raise AssertionError(f"processes {hung} had not ended after {seconds} s; {said}") from None
        finally:
            for process in self.processes:
                process.kill()
            for reader in self._readers:
                reader.join(timeout=5)

    def send(self, number: int, to: int) -> None:
        self.processes[to].send_signal(signal.Signals(number))
