"""The cluster's object storage: rclone's S3 server on the node's address, with keys of this cluster's own."""

import json
import secrets
from pathlib import Path

from lab import network
from lab.process import Process

PORT = 9000
ENDPOINT = f"http://{network.ADDRESS}:{PORT}"
BUCKET = "trimtab"


def configure(state: Path) -> None:
    """Make the bucket and the keys, unless they are there."""
    (state / "s3" / BUCKET).mkdir(parents=True, exist_ok=True)
    if not _keys(state).exists():
        partial = _keys(state).with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text(json.dumps([f"lab{secrets.token_hex(8)}", secrets.token_hex(20)]))
        partial.rename(_keys(state))


def credentials(state: Path) -> tuple[str, str]:
    """Return the access key and the secret key."""
    access, secret = json.loads(_keys(state).read_text())
    return access, secret


def process(state: Path) -> Process:
    """Return the server's process. A folder below its root is a bucket."""
    argv = [
        state / "bin" / "rclone", "serve", "s3", "--addr", f"{network.ADDRESS}:{PORT}", "--config", "", state / "s3",
    ]  # fmt: skip
    # By environment, so that the keys stand in no process list; rclone reads it as a line of CSV.
    keys = {"RCLONE_AUTH_KEY": f'"{",".join(credentials(state))}"'} if _keys(state).exists() else {}
    return Process("s3", argv, state, env=keys)


def _keys(state: Path) -> Path:
    return state / "s3.json"
