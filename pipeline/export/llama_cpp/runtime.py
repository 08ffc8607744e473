"""llama.cpp through its C interface. It ends the whole process over what it asserts: use `process`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.export.llama_cpp.opening import Opened

TEXT_CHUNK = 0  # MTMD_INPUT_CHUNK_TYPE_TEXT
IMAGE_MARK = "<image>"

Floats = NDArray[np.float32]


@dataclass
class Seconds:
    """How long the parts of an answer took."""

    image: float = 0.0
    prompt: float = 0.0
    answer: float = 0.0


@dataclass
class Answer:
    """What the runtime made of one prompt: `logits` 'S V' of the prompt, `embeddings` 'N D' of its image."""

    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    text: str = ""
    logits: Floats | None = None
    embeddings: Floats | None = None
    seconds: Seconds = field(default_factory=Seconds)


class Runtime(Opened):
    """A model of llama.cpp that answers prompts."""

    position = 0  # of what is run next

    # Text

    def tokens_of(self, text: str) -> list[int]:
        """Return the ids of a text, BOS first; special tokens in it are read as such."""
        data = text.encode()
        out = self.ffi.new("llama_token[]", len(data) + 8)
        count = self.lib.llama_tokenize(self.vocabulary, data, len(data), out, len(data) + 8, True, True)
        return [out[n] for n in range(count)]

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        size = 64 * (len(ids) + 1)
        out = self.ffi.new("char[]", size)
        given = self.ffi.new("llama_token[]", list(ids))
        count = self.lib.llama_detokenize(self.vocabulary, given, len(ids), out, size, True, False)
        return self.ffi.buffer(out, max(count, 0))[:].decode("utf-8", "replace")

    # Answers

    def answer(
        self,
        prompt: str | Sequence[int],
        *,
        image: NDArray[np.uint8] | None = None,
        embeddings: Floats | None = None,
        max_new_tokens: int = 0,
        all_logits: bool = True,
        ignore_end: bool = False,
    ) -> Answer:
        """Read a prompt, in which `<image>` stands for the image, and answer greedily.

        `image` uint8 'Y X C' goes through the file's own eyes; `embeddings` 'N D' were computed elsewhere. A prompt
        of ids has a negative number in the place of each row of `embeddings`. Without `all_logits` only the
        last of each part are computed. With `ignore_end` the answer has `max_new_tokens`, whatever they are.
        """
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.position, made = 0, Answer()
        logits: list[Floats] = []
        for kind, value in self._parts(prompt, image, embeddings):
            if kind == "text":
                made.prompt_ids += value
                logits.append(self._timed(made, "prompt", tokens=value, all_logits=all_logits))
                continue
            if kind == "image":
                start = time.perf_counter()
                value = self._embedded(value)
                made.seconds.image += time.perf_counter() - start
            made.embeddings = value
            made.prompt_ids += [-1] * len(value)
            logits.append(self._timed(made, "prompt", embeddings=value, all_logits=all_logits))
        made.logits = np.concatenate(logits)
        made.answer_ids = self._greedy(made, max_new_tokens, ignore_end=ignore_end)
        made.text = self.text_of(made.answer_ids)
        return made

    def image_embeddings(self, image: NDArray[np.uint8]) -> Floats:
        """Return what the file's own eyes make of an image uint8 'Y X C': 'N D'."""
        [chunk] = [value for kind, value in self._chunks(IMAGE_MARK, image) if kind == "image"]
        return self._embedded(chunk)

    def _parts(self, prompt: str | Sequence[int], image: Any, embeddings: Any) -> list[tuple[str, Any]]:
        """Return the prompt's parts: ids of text, an image of `mtmd`, or embeddings."""
        if not isinstance(prompt, str):
            return _parts_of_ids(prompt, embeddings)
        if image is None and embeddings is None:
            return [("text", self.tokens_of(prompt))]
        if embeddings is not None:
            before, _, after = prompt.partition(IMAGE_MARK)
            # BOS stands at the start of the whole alone.
            return [
                ("text", self.tokens_of(before)),
                ("embeddings", embeddings),
                ("text", self.tokens_of(after)[1:]),
            ]
        assert image is not None
        return self._chunks(prompt, image)

    def _chunks(self, prompt: str, image: NDArray[np.uint8]) -> list[tuple[str, Any]]:
        ffi, lib = self.ffi, self.lib
        image = np.ascontiguousarray(image, np.uint8)
        marker = ffi.string(lib.mtmd_default_marker()).decode()
        data = prompt.replace(IMAGE_MARK, marker).encode()
        bitmap = lib.mtmd_bitmap_init(
            image.shape[1], image.shape[0], ffi.from_buffer("unsigned char[]", image)
        )
        text = ffi.new("struct mtmd_input_text *")
        held = ffi.new("char[]", data)
        text.text, text.text_len, text.add_special, text.parse_special = held, len(data), True, True
        self._chunked = ffi.gc(lib.mtmd_input_chunks_init(), lib.mtmd_input_chunks_free)
        bitmaps = ffi.new("const mtmd_bitmap *[]", [bitmap])
        code = lib.mtmd_tokenize(self.eyes, self._chunked, text, bitmaps, 1)
        lib.mtmd_bitmap_free(bitmap)
        if code:
            raise PipelineError(f"llama.cpp does not take the prompt with its image (mtmd_tokenize: {code})")
        parts: list[tuple[str, Any]] = []
        for number in range(lib.mtmd_input_chunks_size(self._chunked)):
            chunk = lib.mtmd_input_chunks_get(self._chunked, number)
            if lib.mtmd_input_chunk_get_type(chunk) != TEXT_CHUNK:
                parts.append(("image", chunk))
                continue
            count = ffi.new("size_t *")
            ids = lib.mtmd_input_chunk_get_tokens_text(chunk, count)
            parts.append(("text", [ids[n] for n in range(count[0])]))
        return parts

    def _embedded(self, chunk: Any) -> Floats:
        """Run the tower and the projector: 'N D'."""
        if code := self.lib.mtmd_encode_chunk(self.eyes, chunk):
            raise PipelineError(f"llama.cpp cannot encode the image (mtmd_encode_chunk: {code})")
        if self.class_token:
            self.class_token.check_it_was_moved()
        count = self.lib.mtmd_input_chunk_get_n_tokens(chunk)
        buffer = self.ffi.buffer(self.lib.mtmd_get_output_embd(self.eyes), count * self.width * 4)
        return np.frombuffer(buffer, np.float32).reshape(count, self.width).copy()

    def _timed(self, made: Answer, part: str, **given: Any) -> Floats:
        start = time.perf_counter()
        logits = self._decoded(**given)
        setattr(made.seconds, part, getattr(made.seconds, part) + time.perf_counter() - start)
        return logits

    def _decoded(
        self,
        tokens: Sequence[int] | None = None,
        embeddings: Floats | None = None,
        *,
        all_logits: bool = True,
    ) -> Floats:
        """Run tokens or embeddings behind what was run before: logits 'S V', or the last alone."""
        count = len(tokens) if tokens is not None else len(embeddings)  # pyright: ignore[reportArgumentType]
        if count == 0:
            return np.empty((0, self.vocab_size), np.float32)
        batch = self.lib.llama_batch_init(count, 0 if embeddings is None else self.width, 1)
        batch.n_tokens = count
        for n in range(count):
            if tokens is not None:
                batch.token[n] = tokens[n]
            batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = self.position + n, 1, 0
            batch.logits[n] = all_logits or n == count - 1
        if embeddings is not None:
            values = np.ascontiguousarray(embeddings, np.float32)
            self.ffi.memmove(batch.embd, self.ffi.from_buffer(values), values.nbytes)
        code = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if code:
            raise PipelineError(
                f"llama.cpp cannot run {count} positions behind {self.position} (llama_decode: {code})"
            )
        self.position += count
        first = 0 if all_logits else count - 1
        rows = (self.lib.llama_get_logits_ith(self.context, n) for n in range(first, count))
        return np.stack(
            [np.frombuffer(self.ffi.buffer(row, self.vocab_size * 4), np.float32) for row in rows]
        )

    def _greedy(self, made: Answer, max_new_tokens: int, *, ignore_end: bool) -> list[int]:
        assert made.logits is not None
        ids: list[int] = []
        last = made.logits[-1]
        for _ in range(max_new_tokens):
            ids.append(int(last.argmax()))
            ends = not ignore_end and self.lib.llama_vocab_is_eog(self.vocabulary, ids[-1])
            if ends or len(ids) == max_new_tokens:
                break
            last = self._timed(made, "answer", tokens=[ids[-1]])[0]
        return ids


def _parts_of_ids(ids: Sequence[int], embeddings: Floats | None) -> list[tuple[str, Any]]:
    """Return runs of ids, and of rows of embeddings where the ids are negative."""
    parts: list[tuple[str, Any]] = []
    taken = 0
    for is_image, run in groupby(ids, key=lambda number: number < 0):
        run = list(run)
        if not is_image:
            parts.append(("text", run))
            continue
        assert embeddings is not None
        parts.append(("embeddings", embeddings[taken : taken + len(run)]))
        taken += len(run)
    return parts
