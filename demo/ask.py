"""The OpenAI Python client against a ModelDeployment's Service."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator

from openai import OpenAI

from demo.cluster import Cluster, DemoError

QUESTION = "who are you?"


@contextlib.contextmanager
def client(cluster: Cluster, namespace: str, service: str) -> Iterator[OpenAI]:
    """A client of the Service, through kubectl's port-forward, which every cluster allows its users."""
    forward = subprocess.Popen(
        ["kubectl", "-n", namespace, "port-forward", f"service/{service}", ":80", "--address", "127.0.0.1"],
        env=dict(cluster.env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert forward.stdout is not None
        line = forward.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise DemoError(f"kubectl port-forward service/{service}: {line.strip() or 'ended without a word'}")
        with OpenAI(base_url=f"http://127.0.0.1:{found[1]}/v1", api_key="none", max_retries=3, timeout=60) as openai:
            yield openai
    finally:
        forward.terminate()
        forward.wait(timeout=10)
        if forward.stdout is not None:
            forward.stdout.close()


def answer(openai: OpenAI, model: str) -> str:
    """The answer to the question, at temperature 0."""
    reply = openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
    )
    return reply.choices[0].message.content or ""


def stream(openai: OpenAI, model: str) -> Iterator[str]:
    """The same, token by token."""
    chunks = openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40, stream=True
    )
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content
