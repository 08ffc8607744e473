"""The vocabulary of a GGUF file, from the sentencepiece model of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor

from pipeline.errors import ConfigError
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.mobilevlm.processor import SYSTEM

UNUSED_SCORE = -10000.0
# llama.cpp puts its marker in the place of an image part and adds BOS itself, so the template must not. The text that
# follows an image begins with the line break that the original writes behind `<image>`.
CHAT_TEMPLATE = (
    "{%- if messages[0].role == 'system' -%}"
    "{{ messages[0].content }}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{{ '" + SYSTEM.replace("'", "\\'") + "' }}{%- set turns = messages -%}"
    "{%- endif -%}"
    "{{ ' ' }}"
    "{%- for turn in turns -%}"
    "{{ ('USER: ' if turn.role == 'user' else 'ASSISTANT: ') + turn.content }}"
    "{{ ' ' if turn.role == 'user' else '</s>' }}"
    "{%- endfor -%}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a tokenizer, their scores and kinds, one for each row of the embedding."""

    pieces: list[bytes]
    scores: list[float]
    kinds: list[TokenType]
    bos: int
    eos: int
    unknown: int

    @classmethod
    def of(cls, folder: Path, size: int) -> Vocabulary:
        """Read `tokenizer.model` and fill it up to `size` rows. Raises `ConfigError` if it has more pieces."""
        file = folder / "tokenizer.model"
        with named_if_broken(file, kind="a tokenizer"):
            model = SentencePieceProcessor(model_file=str(file))
        if len(model) > size:
            raise ConfigError(
                f"{file} has {len(model)} pieces, but the model's vocab_size is {size}; use the tokenizer that "
                "belongs to the checkpoint"
            )
        rest = range(len(model), size)
        return cls(
            [model.id_to_piece(n).encode() for n in range(len(model))] + [f"[PAD{n}]".encode() for n in rest],
            [model.get_score(n) for n in range(len(model))] + [UNUSED_SCORE] * len(rest),
            [_kind(model, n) for n in range(len(model))] + [TokenType.UNUSED] * len(rest),
            *(model.bos_id(), model.eos_id(), model.unk_id()),
        )

    def write(self, writer: GGUFWriter) -> None:
        """Add the tokenizer's fields: BOS is added to a text, EOS is not, and a text begins with a space."""
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.pieces)
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.kinds)
        writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        writer.add_unk_token_id(self.unknown)
        writer.add_pad_token_id(self.unknown)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(True)
        writer.add_chat_template(CHAT_TEMPLATE)


def _kind(model: SentencePieceProcessor, number: int) -> TokenType:
    kinds = {
        TokenType.UNKNOWN: model.is_unknown,
        TokenType.CONTROL: model.is_control,
        TokenType.UNUSED: model.is_unused,
        TokenType.BYTE: model.is_byte,
    }
    return next((kind for kind, is_one in kinds.items() if is_one(number)), TokenType.NORMAL)
