"""An engine with vLLM's addresses and words over a real model: adapters by name, one answer a request, by its seed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@dataclass
class BesideEngine:
    """What it was asked, and how it goes wrong."""

    root: Path
    deaf: bool = False
    """It takes adapters in and answers without them."""
    fails_after: int | None = None
    """It answers so many requests for an answer."""
    adapters: dict[str, list[str]] = field(default_factory=dict)
    """The tensors of each adapter that was ever loaded."""
    reloaded: list[list[str]] = field(default_factory=list)
    """The tensors of all weights, each time that they were read anew."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The requests for answers."""
    told: dict[str, Any] = field(default_factory=dict)
    """What the trainer said of the model."""
    port: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, Any] = {}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        with self._lock:
            if path == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], Path(body["lora_path"]))
            if path == "/v1/unload_lora_adapter":
                return (200, "removed") if self._models.pop(body["lora_name"], None) else (404, "no such adapter")
            if path == "/collective_rpc" and body["method"] == "read_anew":
                return self._reload(Path(body["kwargs"]["folder"]))
            if path == "/reset_prefix_cache":
                return 200, '{"success":true}'
            return self._draw(body)

    def _reload(self, folder: Path) -> tuple[int, str]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.told["dtype"]))
        self._models["base"] = model.eval()
        self.reloaded.append(sorted(name for file in folder.glob("*.safetensors") for name in load_file(file)))
        return 200, '{"results":[null]}'

    def ready(self) -> bool:
        file = self.root / "base.json"
        if file.exists():
            self.told = json.loads(file.read_text())
        return bool(self.told)

    def _load(self, name: str, folder: Path) -> tuple[int, str]:
        if self._models or name in self.adapters:
            return 400, "one adapter at a time, each under a name of its own"
        base = AutoModelForCausalLM.from_pretrained(self.told["path"], dtype=getattr(torch, self.told["dtype"]))
        self._models[name] = base.eval() if self.deaf else PeftModel.from_pretrained(base, str(folder)).eval()
        self.adapters[name] = sorted(load_file(folder / "adapter_model.safetensors"))
        return 200, "added"

    def _draw(self, body: dict[str, Any]) -> tuple[int, str]:
        self.asked.append(body)
        if self.fails_after is not None and len(self.asked) > self.fails_after:
            return 500, "EngineCore encountered an issue."
        assert len(body["prompt"]) + body["max_tokens"] <= self.told["maxModelLen"]
        model, draw = self._models[body["model"]], torch.Generator().manual_seed(body["seed"])
        tokens, log_probs, past = [], [], None
        given = torch.tensor([body["prompt"]])
        with torch.no_grad():
            while len(tokens) < body["max_tokens"]:
                said = model(input_ids=given, past_key_values=past, use_cache=True)
                past = said.past_key_values
                spread = torch.log_softmax(said.logits[0, -1].float() / body["temperature"], dim=-1)
                token = int(torch.multinomial(spread.exp(), 1, generator=draw))
                tokens.append(token)
                log_probs.append(float(spread[token]))
                if token in body["stop_token_ids"]:
                    break
                given = torch.tensor([[token]])
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": log_probs}}
        return 200, json.dumps({"choices": [choice]})


@contextmanager
def serving(engine: BesideEngine) -> Iterator[BesideEngine]:
    """The engine on a free port of the loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200 if engine.ready() else 503, "")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._say(*engine.answer(self.path, body))

        def _say(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    engine.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
