"""Other programs, run to their end: with a time limit, and with their words in the error when they fail."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.report import LabError

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(
    argv: Sequence[object],
    *,
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    check: bool = True,
    log: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program and return what it printed.

    Args:
        argv: Program and arguments; each is written out by str().
        timeout: Seconds after which it is killed.
        env: Added to this process's environment.
        cwd: Folder to run in.
        stdin: Text for its standard input.
        check: Whether a non-zero exit is an error.
        log: A file that gets all output, for what is long or slow; the result's stdout is then empty.

    Raises:
        LabError: It failed or ran too long; the message ends with its last lines.
    """
    words = [str(word) for word in argv]
    environment = {**os.environ, **(env or {})}
    environment["PATH"] = f"{environment.get('PATH', '')}:{SYSTEM_PATH}"
    try:
        if log is None:
            done = subprocess.run(
                words,
                env=environment,
                cwd=cwd,
                input=stdin,
                text=True,
                timeout=timeout,
                capture_output=True,
                check=False,
            )
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as out:
                done = subprocess.run(
                    words, env=environment, cwd=cwd, input=stdin, text=True, timeout=timeout,
                    stdout=out, stderr=subprocess.STDOUT, check=False,
                )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(words)} did not end within {timeout:.0f} s") from None
    except FileNotFoundError:
        raise LabError(f"{words[0]} is not installed; run `python3 -m lab up` as root, which installs it") from None
    if check and done.returncode:
        said = tail(log.read_text(errors="replace") if log else done.stderr or done.stdout)
        more = f"\n  all of it: cat {log}" if log else ""
        raise LabError(f"{' '.join(words)} exited with {done.returncode}:\n{said}{more}")
    return done


def tail(text: str, lines: int = 15) -> str:
    """Return the last lines of a text, indented."""
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])
