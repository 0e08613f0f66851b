"""A server with the routes that VLLMServerEngine uses, and no model: what it draws depends on weights, seed and place alone.

    VLLM_API_KEY=... python fake_vllm_server.py --host 127.0.0.1 --port 8000 ...

It starts in a fraction of a second, so that it can be killed often.  In the working folder, a file named ``broken`` ends it at
its start, ``slow`` makes it take a second per answer, ``stale`` makes it keep the weights' old name.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DESCRIPTION = {
    "dtype": "float32",
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": 21,
    "max_model_len": 512,
    "max_num_seqs": 64,
    "takes_seeds": True,
}
state: dict[str, Any] = {"label": "default", "weights": {}, "description": DESCRIPTION, "key": os.environ.get("VLLM_API_KEY")}


def drawn(seed: int, length: int) -> list[int]:
    """Tokens below 256 that depend on the weights."""
    text = f"{sorted(state['weights'].items())}/{seed}"
    return list(hashlib.shake_128(text.encode()).digest(length))


def choice(params: dict[str, Any], index: int) -> dict[str, Any]:
    ids = drawn(params["seed"] + index, params["max_tokens"])
    tops = [{"token_id": i, "logprob": -1.0 - i} for i in range(params["logprobs"])]
    return {
        "index": index,
        "token_ids": ids,
        "finish_reason": "length",
        "weight_versions": [{"version": state["label"], "start": 0, "end": len(ids)}],
        "logprobs": {"content": [{"token_id": i, "logprob": -1.0 - i, "top_logprobs": tops} for i in ids]},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({"/health": {}, "/weight_info": {"weight_version": state["label"]}}[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if state["key"] is not None and self.headers["Authorization"] != f"Bearer {state['key']}":
            self.answer({"error": "key"}, 401)
        elif self.path == "/inference/v1/generate":
            time.sleep(1.0 if Path("slow").exists() else 0.02)
            params = body["sampling_params"]
            self.answer({"choices": [choice(params, i) for i in reversed(range(params["n"]))]})
        elif self.path == "/update_weight_version":
            if not Path("stale").exists():
                state["label"] = body["new_version"]
            self.answer({})
        elif self.path == "/reset_prefix_cache":
            self.answer({"success": True})
        elif body["method"] == "cppo_describe":
            self.answer({"results": [state["description"]]})
        else:
            folder, label = body["args"]
            manifest = json.loads(Path(folder, "manifest.json").read_text())
            assert manifest["label"] == label
            state["weights"] = manifest["checksums"]
            self.answer({"results": [manifest["checksums"]]})

    def answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
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
