"""The original's tokenizer (slow LlamaTokenizer, legacy behaviour) on the fast backend, and SmolLM2's unchanged.

transformers 5 reads `tokenizer.model` too, but it drops a leading space and orders merges by id, not by score. That
changes the ids of ordinary text. So the sentencepiece file is converted here, and the result is compared with
sentencepiece before it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.errors import ConfigError
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.files.checkpoint import checkpoint_folder

TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # in order of preference, as in the original
SPACE = "\u2581"  # stands for a space in sentencepiece
PROBES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    " grabbed  two   spaces ",
    "\nWhat colour is it?\tWhy 1,200.50?",
    "Gr\u00f6\u00dfe \u4fa1\u683c\u306f \U0001f642 \ufb01 \uff11",
    "ASSISTANT: ",
)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint (local folder or hub id), of MobileVLM's family or SmolLM2's.

    MobileVLM's adds BOS, no EOS, and a space at the start of every text between special tokens; SmolLM2's adds
    nothing. Both pad on the right with the unknown token. Raises `ConfigError` for any other tokenizer.
    """
    folder = checkpoint_folder(str(path))
    file = next((file for name in TOKENIZERS if (file := folder / name).is_file()), None)
    if file is None:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"No tokenizer in {path}: it needs tokenizer.model or tokenizer.json, found {found}; "
            "name a folder that holds one."
        )
    with named_if_broken(file, kind="a tokenizer"):
        if file.suffix == ".model":
            tokenizer = _from_sentencepiece(file)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if is_chatml(tokenizer):
        _check_chatml(tokenizer, path)
    elif complaint := _unlike_llama(tokenizer):
        raise ConfigError(
            f"The tokenizer of {path} {complaint}, so prompts and labels would differ from MobileVLM's; "
            "use the checkpoint's own tokenizer.model."
        )
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer is of SmolLM2's family, for the template `chatml`; the others need LLaMA's."""
    return tokenizer.bos_token == "<|im_start|>"


def template_of(path: str | Path) -> Literal["chatml", "v1"]:
    """Return the dialogue template that fits a checkpoint's tokenizer."""
    return "chatml" if is_chatml(load_tokenizer(path)) else "v1"


def _from_sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import generate_merges

    model = SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(number) for number in range(len(model))]
    ids = {piece: number for number, piece in enumerate(pieces)}
    is_reserved = (model.is_control, model.is_unknown, model.is_byte)
    merged = {piece: n for piece, n in ids.items() if not any(test(n) for test in is_reserved)}
    special = (model.bos_id(), model.eos_id(), model.unk_id())
    if min(special) < 0:
        raise ConfigError(
            f"{file} lacks <s>, </s> or <unk>; a LLaMA tokenizer has all three: use the checkpoint's."
        )
    bos, eos, unknown = (pieces[n] for n in special)
    # sentencepiece merges the piece of the best score first, and ids are not always in order of score.
    merges = generate_merges(merged, {piece: model.get_score(number) for piece, number in merged.items()})
    backend = Tokenizer(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (unknown, bos, eos)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
    )
    for text in PROBES:
        if backend.encode(text, add_special_tokens=False).ids != model.encode(text):
            raise ConfigError(
                f"{file} is not a LLaMA-like sentencepiece model (BPE with byte fallback, no normalisation): "
                f"it reads {text!r} in another way; use the checkpoint's own file."
            )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unknown)


def _unlike_llama(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return how a tokenizer differs from what the label masking of `v1` needs, or None."""

    def ids(text: str) -> list[int]:
        return tokenizer(text).input_ids

    special = {"<s>": tokenizer.bos_token_id, "</s>": tokenizer.eos_token_id, "<unk>": tokenizer.unk_token_id}
    if missing := [name for name, number in special.items() if number is None]:
        return f"has no {' and no '.join(missing)} token"
    if ids("Yes")[:1] != [tokenizer.bos_token_id] or ids("Yes")[-1] == tokenizer.eos_token_id:
        return "does not begin texts with <s>, or ends them with </s>"
    eos = tokenizer.eos_token
    if ids(f"Yes.{eos}USER: No.") != [*ids("Yes."), tokenizer.eos_token_id, *ids("USER: No.")[1:]]:
        return "reads text after </s> in another way than at the start (legacy=False)"
    if ids(" Yes") == ids("Yes"):
        return "drops a leading space"
    if ids("ASSISTANT: ")[:-1] != ids("ASSISTANT:"):
        return "does not make one token of a trailing space"
    return None


def _check_chatml(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raise `ConfigError` unless the tokenizer does what the template `chatml` needs."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    found = tokenizer("<|im_start|><|im_end|>", add_special_tokens=False).input_ids
    if tokenizer.eos_token != "<|im_end|>" or tokenizer.unk_token is None or found != special:
        raise ConfigError(
            f"The tokenizer of {path} begins texts with <|im_start|>, but <|im_end|> is not its EOS, or they are "
            "not one token each, or no token is unknown to it; use the checkpoint's own tokenizer.json."
        )
