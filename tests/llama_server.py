"""Asks llama.cpp's own server about an image: FOLDER IMAGE TEXT. Prints the first token's candidates as JSON.

In a process of its own: the marker of images must be known before the library is loaded, and it writes to stdout.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

BYTES = range(3, 259)  # the tokens of single bytes

os.environ["GGML_NO_BACKTRACE"] = "1"


def main(folder: str, image: str, text: str) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.mmproj.path = f"{folder}/model.gguf", f"{folder}/mmproj.gguf"
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 1024, 1, 1
    parameters.use_jinja, parameters.warmup, parameters.mmproj_use_gpu = True, False, False
    server = xllamacpp.Server(parameters)
    picture = base64.b64encode(Path(image).read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": text},
    ]
    asked = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 1,
        "logit_bias": [[number, False] for number in BYTES],  # an unfinished character has no probabilities
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
    }
    made = server.handle_chat_completions(asked)
    print("\n" + json.dumps(made["choices"][0]["logprobs"]["content"][0]["top_logprobs"]), flush=True)
    os._exit(0)  # the server's threads print while they end


main(*sys.argv[1:])
