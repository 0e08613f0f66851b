"""A server with the routes that VLLMServerEngine uses, and no model: what it draws depends on weights, seed and place alone.

    VLLM_API_KEY=... python fake_vllm_server.py --host 127.0.0.1 --port 8000 ...

It starts in a fraction of a second, so that it can be killed often.  In the working folder, a file named ``broken`` ends it at
its start, ``slow`` makes it take a second per answer, ``stale`` makes it keep the weights' old name.  ``stuck`` names a phase
(starting, loading, sampling) and a number: from that request of the phase on it answers nothing, and a file ``began`` says so.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

DESCRIPTION = {
    "version": "0.32.0",
    "dtype": "float32",
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": 20,
    "max_model_len": 512,
    "max_num_seqs": 64,
    "takes_seeds": True,
    "weight_transfer": None,
}
state: dict[str, Any] = {"label": "default", "weights": {}, "description": DESCRIPTION, "key": os.environ.get("VLLM_API_KEY")}
counting = threading.Lock()


def stand_in(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have every VLLMServerEngine of this process start this file in vLLM's place; ``patch`` may be a monkeypatch's."""
    from cppo_lightning.engines.vllm_server import engine, process

    patch(process, "SERVE", (__file__,))
    patch(engine, "check_installed", lambda _: None)


def logp(token: np.ndarray) -> np.ndarray:
    """About what a random model gives a token, so that a policy can be trained on what this server draws."""
    return -5.5 - token / 1000


def stick(phase: str) -> None:
    """Never returns, nor at any later request, if it is time for that."""
    with counting:  # of requests that come at once, each has a number of its own
        number = state[phase] = state.get(phase, 0) + 1
    if Path("stuck").exists() and Path("stuck").read_text() == f"{phase} {number}":
        Path("began").touch()
    while Path("began").exists():
        time.sleep(0.1)


def drawn(seed: int, length: int) -> list[int]:
    """Tokens below 256 that depend on the weights."""
    text = f"{sorted(state['weights'].items())}/{seed}"
    return list(hashlib.shake_128(text.encode()).digest(length))


def answer(params: dict[str, Any]) -> bytes:
    """The samples of one prompt, as the bytes of ``answers.Answer``."""
    n, length = params["n"], params["max_tokens"]
    ids = np.array([token for index in range(n) for token in drawn(params["seed"] + index, length)], np.int32)
    tokens = np.concatenate([ids[:, None], np.tile(np.arange(params["logprobs"], dtype=np.int32), (len(ids), 1))], axis=1)
    file = io.BytesIO()
    np.savez(
        file,
        lengths=np.full(n, length),
        reasons=np.full(n, "length"),
        labels=np.array([state["label"]]),
        ids=ids,
        tokens=tokens,
        logp=logp(tokens).astype(np.float32),
    )
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        stick("starting")
        self.answer({"/health": {}, "/weight_info": {"weight_version": state["label"]}}[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if state["key"] is not None and self.headers["Authorization"] != f"Bearer {state['key']}":
            self.answer({"error": "key"}, 401)
        elif self.path == "/cppo/generate":
            stick("sampling")
            time.sleep(1.0 if Path("slow").exists() else 0.02)
            self.send(answer(body["sampling_params"]))
        elif self.path == "/update_weight_version":
            if not Path("stale").exists():
                state["label"] = body["new_version"]
            self.answer({})
        elif self.path == "/reset_prefix_cache":
            self.answer({"success": True})
        elif body["method"] == "cppo_describe":
            self.answer({"results": [state["description"]]})
        else:
            stick("loading")
            folder, label = body["args"]
            manifest = json.loads(Path(folder, "manifest.json").read_text())
            assert manifest["label"] == label
            state["weights"] = manifest["checksums"]
            self.answer({"results": [manifest["checksums"]]})

    def answer(self, body: dict[str, Any], status: int = 200) -> None:
        self.send(json.dumps(body).encode(), status)

    def send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True


def main(arguments: list[str]) -> None:
    if Path("broken").exists():
        sys.exit("no memory for the model")
    host, port = (arguments[arguments.index(name) + 1] for name in ("--host", "--port"))
    print("serving", flush=True)
    Server((host, int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
