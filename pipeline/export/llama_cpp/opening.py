"""What llama.cpp opens: a model, a context for it, and its eyes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.export.llama_cpp.class_token import ClassTokenFirst
from pipeline.export.llama_cpp.library import load_library

F32_CACHE = 0  # GGML_TYPE_F32
LAST_LINES = 8


class Opened:
    """A model, and with `mmproj` its eyes. `exact` keeps keys and values in 32 bits, without flash attention.

    With `class_token_width` the class token is put first in the tower, see `class_token`.
    Raises `PipelineError` with llama.cpp's own last words if it refuses a file.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path | None = None,
        *,
        context: int,
        threads: int,
        exact: bool = True,
        class_token_width: int | None = None,
    ) -> None:
        self.ffi, self.lib, file = load_library()
        self.log: list[str] = []
        self._keep_log()
        self.lib.llama_backend_init()
        self.model = self._load_model(model)
        self.context = self._open_context(context, threads, exact=exact)
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.vocabulary)
        self.width = self.lib.llama_model_n_embd(self.model)
        self.class_token = ClassTokenFirst(self.ffi, file, class_token_width) if class_token_width else None
        self.eyes = self._load_eyes(mmproj, threads, exact=exact) if mmproj else None

    def _keep_log(self) -> None:
        @self.ffi.callback("void(int, const char *, void *)")
        def keep(level: int, text: Any, _: Any) -> None:
            self.log = [*self.log[-200:], self.ffi.string(text).decode("utf-8", "replace")]

        self._callback = self.ffi.cast("ggml_log_callback", keep)
        self._kept = keep
        for set_log in (self.lib.llama_log_set, self.lib.mtmd_helper_log_set, self.lib.mtmd_log_set):
            set_log(self._callback, self.ffi.NULL)

    def _load_model(self, file: Path) -> Any:
        parameters = self.lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        return self._opened(self.lib.llama_model_load_from_file(str(file).encode(), parameters), file)

    def _open_context(self, size: int, threads: int, *, exact: bool) -> Any:
        parameters = self.lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = size
        parameters.n_threads = parameters.n_threads_batch = threads
        if exact:
            parameters.flash_attn_type = 0
            parameters.type_k = parameters.type_v = F32_CACHE
        return self._opened(self.lib.llama_init_from_model(self.model, parameters), "a context")

    def _load_eyes(self, file: Path, threads: int, *, exact: bool) -> Any:
        parameters = self.lib.mtmd_context_params_default()
        parameters.use_gpu = parameters.print_timings = parameters.warmup = False
        parameters.n_threads = threads
        if exact:
            parameters.flash_attn_type = 0
        if self.class_token:
            parameters.cb_eval = self.class_token.callback
        return self._opened(self.lib.mtmd_init_from_file(str(file).encode(), self.model, parameters), file)

    def _opened(self, pointer: Any, what: Any) -> Any:
        if pointer == self.ffi.NULL:
            words = " ".join("".join(self.log[-LAST_LINES:]).split())
            raise PipelineError(f"llama.cpp cannot open {what}: {words}")
        return pointer
