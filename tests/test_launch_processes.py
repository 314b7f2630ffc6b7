"""Processes side by side: their lines, their ends, and `jax.distributed` among them."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.configfile import ConfigError
from experiments.launch import distributed
from experiments.launch.exits import preemptible
from experiments.launch.local import environment, free_port
from experiments.launch.processes import Process, together

ROOT = Path(__file__).parent.parent


def python(text: str, **variables: str) -> Process:
    return Process((sys.executable, "-c", text), variables)


def test_lines_have_the_number_of_their_process():
    out = io.StringIO()
    programs = [python("import os; print('a', os.environ['N']); print('b')", N=str(n)) for n in range(3)]
    assert together(programs, out=out) == 0
    assert sorted(out.getvalue().splitlines()) == ["[0] a 0", "[0] b", "[1] a 1", "[1] b", "[2] a 2", "[2] b"]


def test_both_outputs_are_shown_and_bytes_that_are_no_text():
    out = io.StringIO()
    assert (
        together(
            [python("import sys; sys.stderr.write('wrong\\n'); sys.stdout.buffer.write(b'\\xff no newline')")], out=out
        )
        == 0
    )
    assert sorted(out.getvalue().splitlines()) == ["[0] wrong", "[0] \N{REPLACEMENT CHARACTER} no newline"]


@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(75)", 75)])
def test_when_one_fails_the_others_are_ended(end: str, code: int):
    out, begun = io.StringIO(), time.monotonic()
    failing = python(f"import os, sys, time; time.sleep(0.2); {end}")
    assert (
        together([python("import time; time.sleep(60)"), failing, python("import time; time.sleep(60)")], out=out)
        == code
    )
    assert time.monotonic() - begun < 5


def test_one_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path):
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    waiting = f"import os, sys, time\nwhile not os.path.exists({str(tmp_path / 'child')!r}): time.sleep(0.05)\ntime.sleep(0.1); sys.exit(1)"
    begun = time.monotonic()
    assert together([python(deaf), python(waiting)], out=io.StringIO(), grace=0.3) == 1
    assert time.monotonic() - begun < 10
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


LAUNCH = (  # a shell starts what runs in the background with SIGINT ignored, and children inherit that
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import sys; from experiments.launch.processes import Process, together; "
    "sys.exit(together([Process((sys.executable, '-c', {0!r}), {{}})] * 2, grace=2.0))"
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_ctrl_c_and_sigterm_end_all(number: signal.Signals, code: int):
    """SIGTERM is passed on: the processes end as preempted ones do, and so does the launcher."""
    program = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75)); print('begun'); time.sleep(60)"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH.format(program)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert launcher.stdout is not None
    try:
        assert sorted(launcher.stdout.readline() for _ in range(2)) == ["[0] begun\n", "[1] begun\n"]
        os.kill(launcher.pid, number)
        assert launcher.wait(timeout=50) == code  # before they would end by themselves
    finally:
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()


def test_sigterm_is_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with preemptible():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


# -- jax.distributed ---------------------------------------------------------------------------------------------------


def test_two_processes_of_jax_see_each_other():
    """Importing all of experiments.train first touches no device, or `initialise` would raise."""
    program = (
        "import experiments.train\n"
        "from experiments.launch.distributed import initialise\n"
        "several = initialise()\n"
        "import jax\n"
        "print(several, jax.process_count(), jax.process_index(), jax.device_count(), jax.local_device_count())"
    )
    out, port = io.StringIO(), str(free_port())
    flags = "--xla_force_host_platform_device_count=8"
    each = [python(program, PYTHONPATH=str(ROOT), **environment(n, 2, port, 3, flags)) for n in range(2)]
    assert together(each, out=out) == 0, out.getvalue()
    lines = {line for line in out.getvalue().splitlines() if "True" in line}
    assert lines == {"[0] True 2 0 6 3", "[1] True 2 1 6 3"}


def test_a_process_whose_peers_do_not_come_says_so():
    program = "from experiments.launch.distributed import initialise; initialise()"
    out, port = io.StringIO(), free_port()
    variables = {"PYTHONPATH": str(ROOT), "JLORA_TIMEOUT": "1", **environment(0, 2, str(port), 1, "")}
    assert together([python(program, **variables)], out=out) == 1
    assert (
        f"[0] error: process 0 of 2: not all processes came within 1 seconds (coordinator 127.0.0.1:{port}). Every process "
        "has to be started, all at about the same time and with the same number of them; the coordinator's address has to be "
        "one that the others reach (not localhost on several machines), its port free there and open in the firewall (TPUs: "
        "8482). JLORA_TIMEOUT is the number of seconds" in out.getvalue().splitlines()
    )  # fmt: skip


GIVEN = {"JLORA_COORDINATOR": "host:1", "JLORA_PROCESSES": "2", "JLORA_PROCESS": "1"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch):
    """Sets variables and nothing else of their kind; JAX is not to be asked."""

    def refuse(*arguments, **keywords):
        pytest.fail("JAX was asked")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", refuse)

    def use(values: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith("JLORA_") or "proxy" in name.lower()]:
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JLORA_PROCESS": ""}, "JLORA_PROCESS not set, though JLORA_COORDINATOR, JLORA_PROCESSES is: set JLORA_COORDINATOR, JLORA_PROCESSES and JLORA_PROCESS, or none"),
        ({"JLORA_COORDINATOR": "", "JLORA_PROCESSES": ""}, "JLORA_COORDINATOR, JLORA_PROCESSES not set, though JLORA_PROCESS is: set JLORA_COORDINATOR, JLORA_PROCESSES and JLORA_PROCESS, or none"),
        ({"JLORA_PROCESSES": "two"}, "JLORA_PROCESSES='two' is no whole number"),
        ({"JLORA_TIMEOUT": "-1"}, "JLORA_TIMEOUT='-1' is no whole number"),
        ({"JLORA_PROCESS": "2"}, "JLORA_PROCESS=2 is not below JLORA_PROCESSES=2: processes are numbered from 0"),
        ({"JLORA_COORDINATOR": "host"}, "JLORA_COORDINATOR='host' is no host:port"),
        ({"JLORA_COORDINATOR": "host:port"}, "JLORA_COORDINATOR='host:port' is no host:port"),
    ],
)  # fmt: skip
def test_variables_that_are_missing_or_wrong(changed: dict[str, str], message: str, variables):
    variables({name: value for name, value in (GIVEN | changed).items() if value})
    with pytest.raises(ConfigError) as error:
        distributed.initialise()
    assert str(error.value) == message


def test_one_process_needs_nothing(variables):
    variables({})
    assert not distributed.initialise()
    variables({**GIVEN, "JLORA_PROCESSES": "1", "JLORA_PROCESS": "0"})
    assert not distributed.initialise()


def test_a_coordinator_that_is_not_reached(variables):
    port = free_port()
    variables({**GIVEN, "JLORA_COORDINATOR": f"127.0.0.1:{port}", "JLORA_TIMEOUT": "1", "HTTPS_PROXY": "http://proxy"})
    with pytest.raises(TimeoutError) as error:
        distributed.initialise()
    assert str(error.value) == (
        f"the coordinator 127.0.0.1:{port} was not reached within 1 seconds ([Errno 111] Connection refused). Every process has "
        "to be started, all at about the same time and with the same number of them; the coordinator's address has to be one "
        "that the others reach (not localhost on several machines), its port free there and open in the firewall (TPUs: 8482). "
        "A proxy is set (HTTPS_PROXY), which breaks the connection: unset it. JLORA_TIMEOUT is the number of seconds"
    )  # fmt: skip


def test_where_jax_finds_no_cluster(variables, monkeypatch: pytest.MonkeyPatch):
    def nothing(**keywords):
        raise ValueError("coordinator_address should be defined.")

    variables({})
    monkeypatch.setattr(distributed.jax.distributed, "initialize", nothing)
    with pytest.raises(ConfigError) as error:
        distributed.initialise(detect=True)
    assert str(error.value) == (
        "--distributed: JAX finds no cluster here (coordinator_address should be defined.). It knows TPU VMs, GKE's TPUs, and "
        "processes of srun and mpirun; elsewhere set JLORA_COORDINATOR, JLORA_PROCESSES and JLORA_PROCESS, or leave "
        "--distributed out"
    )


def test_jax_looks_only_where_it_is_asked_to(variables, monkeypatch: pytest.MonkeyPatch):
    seen = []
    variables({"JLORA_TIMEOUT": "40"})
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *a, **k: seen.append((a, k)))
    assert not distributed.initialise(detect=True)  # this process is one
    variables({**GIVEN, "JLORA_PROCESS": "0"})
    assert distributed.initialise(detect=True)
    lost = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 60}
    assert seen == [
        ((), {"initialization_timeout": 100, **lost}),
        (("host:1", 2, 0), {"initialization_timeout": 360, "cluster_detection_method": "deactivate", **lost}),
    ]
