import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import leftovers, process
from lab.process import Process
from lab.report import LabError


def script(state: Path, name: str, text: str) -> Process:
    return Process(name, [sys.executable, "-u", "-c", text], state)


def until(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "deadline passed"
        time.sleep(0.02)


@pytest.fixture
def sleeper(tmp_path: Path):
    started = script(tmp_path, "sleeper", "import time; print('awake'); time.sleep(60)")
    started.start()
    yield started
    started.stop()


def test_a_later_command_finds_it_by_its_pidfile(sleeper: Process, tmp_path: Path) -> None:
    again = script(tmp_path, "sleeper", "")
    assert again.pid() == sleeper.pid() is not None


def test_start_leaves_a_running_one_alone(sleeper: Process) -> None:
    before = sleeper.pid()
    sleeper.start()
    assert sleeper.pid() == before


def test_a_number_that_went_to_another_process_is_not_ours(sleeper: Process) -> None:
    record = json.loads(sleeper.pidfile.read_text())
    record["started"] -= 1
    sleeper.pidfile.write_text(json.dumps(record))
    assert process.recorded(sleeper.pidfile) is None


def test_a_half_written_pidfile_counts_as_none(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"pid": ')
    assert process.recorded(file) is None


def test_stop_ends_what_ignores_sigterm_and_what_it_started(tmp_path: Path) -> None:
    text = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '60']); print(child.pid); time.sleep(60)"
    )
    stubborn = script(tmp_path, "stubborn", text)
    stubborn.start()
    until(lambda: stubborn.log.exists() and stubborn.log.read_text().strip())
    child = int(stubborn.log.read_text())
    pid = stubborn.pid()
    stubborn.stop(grace=0.2)
    assert pid is not None
    until(lambda: process.started(pid) is None and process.started(child) is None)
    assert not stubborn.pidfile.exists()


def test_one_that_ends_while_starting_is_told_with_its_last_words(tmp_path: Path) -> None:
    failing = script(tmp_path, "failing", "import sys; sys.exit('no such flag: --speed')")
    failing.start()
    with pytest.raises(LabError, match=r"(?s)failing ended while starting.*no such flag: --speed.*cat "):
        failing.wait(lambda: False, timeout=20)
    failing.stop()


def test_one_that_is_never_ready_is_told_after_the_deadline(sleeper: Process) -> None:
    with pytest.raises(LabError, match="sleeper is not ready after 0 s"):
        sleeper.wait(lambda: False, timeout=0.2)


def test_a_tied_one_dies_with_who_started_it(tmp_path: Path) -> None:
    text = (
        "import sys, time; from pathlib import Path; from lab.process import Process;"
        f"p = Process('tied', ['sleep', '60'], Path({str(tmp_path)!r}), tied=True); p.start(); time.sleep(60)"
    )
    parent = Process("parent", [sys.executable, "-c", text], tmp_path, env={"PYTHONPATH": str(Path.cwd())})
    parent.start()
    pidfile = tmp_path / "run" / "tied.json"
    until(pidfile.exists)
    tied = process.recorded(pidfile)
    pid = parent.pid()
    assert tied is not None
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: process.recorded(pidfile) is None)
    parent.stop()


def test_a_tied_one_whose_parent_is_gone_already_does_not_start(tmp_path: Path) -> None:
    gone = subprocess.run(["sh", "-c", "echo $$"], check=True, capture_output=True, text=True)
    late = subprocess.run([*process.tie(int(gone.stdout)), "touch", tmp_path / "started"], timeout=10)
    assert late.returncode != 0
    assert not (tmp_path / "started").exists()
    subprocess.run([*process.tie(os.getpid()), "touch", tmp_path / "started"], check=True, timeout=10)
    assert (tmp_path / "started").exists()


def test_leftovers_are_found_without_any_record(tmp_path: Path) -> None:
    binary = tmp_path / "bin" / "sleep"
    binary.parent.mkdir()
    binary.symlink_to("/bin/sleep")
    forgotten = Process("forgotten", [binary, "60"], tmp_path)
    forgotten.start()
    forgotten.pidfile.unlink()
    until(lambda: len(leftovers.processes(tmp_path)) == 1)
    found = leftovers.processes(tmp_path)
    process.end(found, grace=1)
    forgotten.stop()
    until(lambda: leftovers.processes(tmp_path) == [])
