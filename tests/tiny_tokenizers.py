"""Byte-level tokenizers of a few hundred tokens, with the special tokens of each family."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

NUM_MERGES = 60  # tokens beyond the 256 bytes and the special tokens
TEXT = [
    "What colour is the circle in the image?",
    "Is there a triangle in this image, or is there only a rectangle?",
    "Describe the image. The image shows a red circle and a blue line.",
    "the first the second, a green shape, yes, no, 1234567890",
]
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
LFM2_TILES = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 11))
PALIGEMMA_TOKENS = (*(f"<loc{n:04}>" for n in range(1024)), *(f"<seg{n:03}>" for n in range(128)))


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a family.

    `named` are those that its processor reads as attributes of the tokenizer, `others` have no name.
    """

    image: str
    eos: str
    pad: str
    bos: str | None = None
    adds_bos: bool = False
    named: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def all(self) -> list[str]:
        """Every special token once: padding, begin and end of text first."""
        tokens = (self.pad, self.bos, self.eos, self.image, *self.named.values(), *self.others)
        return list(dict.fromkeys(token for token in tokens if token))


QWEN = SpecialTokens(
    image="<|image_pad|>",
    eos="<|im_end|>",
    pad="<|endoftext|>",
    others=("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
)
LLAVA = SpecialTokens(image="<image>", bos="<s>", eos="</s>", pad="<pad>", adds_bos=True, others=("<unk>",))
IDEFICS = ("<fake_token_around_image>", "<global-img>", *TILES)
SPECIAL_TOKENS = {
    "llava": LLAVA,
    "llava_next": LLAVA,
    "internvl": SpecialTokens(
        image="<IMG_CONTEXT>",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        others=("<|im_start|>",),
    ),
    "smolvlm": SpecialTokens(
        image="<image>",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        named={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        others=IDEFICS,
    ),
    "idefics3": SpecialTokens(
        image="<image>",
        bos="<|begin_of_text|>",
        eos="<end_of_utterance>",
        pad="<|end_of_text|>",
        adds_bos=True,
        others=IDEFICS,
    ),
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "gemma3": SpecialTokens(
        image="<image_soft_token>",
        bos="<bos>",
        eos="<end_of_turn>",
        pad="<pad>",
        adds_bos=True,
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        others=("<eos>", "<start_of_turn>"),
    ),
    "paligemma": SpecialTokens(
        image="<image>",
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        named={"image_token": "<image>"},
        others=PALIGEMMA_TOKENS,
    ),
    "lfm2_vl": SpecialTokens(
        image="<image>",
        bos="<|startoftext|>",
        eos="<|im_end|>",
        pad="<|pad|>",
        adds_bos=True,
        named={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
        },
        others=("<|im_start|>", "<|img_thumbnail|>", *LFM2_TILES),
    ),
}


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer on a few sentences. Every text has ids, and they decode to the same text."""
    special = SPECIAL_TOKENS[family]
    names = {"bos_token": special.bos, "eos_token": special.eos, "pad_token": special.pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special),
        **{name: token for name, token in names.items() if token},
        extra_special_tokens=special.named,
        padding_side="left",
        model_max_length=4096,
    )


def _byte_level(special: SpecialTokens) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special.all()) + len(alphabet) + NUM_MERGES,
        special_tokens=special.all(),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    begin = special.bos if special.bos and special.adds_bos else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A".strip(),
        pair=f"{begin} $A:0 $B:1".strip(),
        special_tokens=[(begin, tokenizer.token_to_id(begin))] if begin else [],
    )
    return tokenizer
