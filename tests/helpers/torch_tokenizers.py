"""Small tokenizers of the kinds that language models have, built in memory."""

from __future__ import annotations

from typing import Any

CORPUS = [
    'the quick brown fox jumps over the lazy dog. {"name": "Ada", "age": 36, "tags": ["a", "b"]}',
    "Grüße aus Köln, 日本語のテキスト, emoji 👩‍👩‍👧 and 🦊, naïve café — done.\n\n  indented\ttext",
    "get_weather(city='Paris') true false null 0123456789 -1.5e10 <b>bold</b>",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<tool_call>", "</tool_call>", "｜begin｜"]


def byte_level(size: int = 400) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer


def sentencepiece(size: int = 400, *, strip: bool = True) -> Any:
    """Bytes for what it has no token for; blanks as U+2581."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = tokenizer.to_str()
    import json

    data = json.loads(spec)
    # Its bytes are tokens like any other.
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    data["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(data))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer
