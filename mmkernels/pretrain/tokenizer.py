"""The tokenizer of a run: byte-pair encoding, trained on the training texts and kept in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

__all__ = ["BOS", "EOS", "IMAGE", "MASK", "PAD", "SEPARATOR", "SPECIAL", "TextTokenizer", "sentinel"]

PAD, MASK, BOS, EOS, SEPARATOR, IMAGE = range(6)
_SENTINELS = 32
_BROKEN = "\ufffd"  # what a part of a character is decoded to
SPECIAL = ["[PAD]", "[MASK]", "[BOS]", "[EOS]", "[SEP]", "[IMAGE]", *(f"[S{i}]" for i in range(_SENTINELS))]
"""Tokens that no text contains; ids 0, 1, ... in this order."""


def sentinel(n: int) -> int:
    """The id of the n-th placeholder of a corrupted span; they repeat after 32."""
    return IMAGE + 1 + n % _SENTINELS


class TextTokenizer:
    """Texts to ids and back.

    Args:
        tokenizer: a byte-level BPE of the tokenizers library whose first tokens are `SPECIAL`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> TextTokenizer:
        """Byte-pair merges of the texts, case-folded; any other text can be encoded too, byte by byte.

        Args:
            texts: to train on; none gives the bytes alone.
            vocabulary: most tokens, special ones included.
        """
        least = len(SPECIAL) + 256
        if vocabulary < least:
            raise ValueError(f"vocabulary: expected at least {least} (special tokens and bytes), got {vocabulary}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """From a file that `text` was written to. Raises ValueError if it is missing or damaged."""
        if not path.is_file():
            raise ValueError(f"{path}: expected the tokenizer of a run, which is missing: copy the whole folder again")
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:
            raise ValueError(f"{path}: expected the tokenizer of a run, got something else ({error})") from error

    def text(self) -> str:
        """The whole tokenizer, as JSON."""
        return json.dumps(json.loads(self._tokenizer.to_str()), ensure_ascii=True)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids without special tokens."""
        ids = self._cache.get(text)
        if ids is None:
            ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
            if len(self._cache) < 100_000:
                self._cache[text] = ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out."""
        return str(self._tokenizer.decode([i for i in ids if i >= len(SPECIAL)])).strip()

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """What each id adds to the text, spaces included; special tokens by their names. A character that several ids
        make comes with the last of them; of one that is cut off, the replacement character is there."""
        found: list[str] = []
        begun: list[int] = []  # ids whose text is not yet out
        for i in ids:
            if i < len(SPECIAL):
                found.append(SPECIAL[i])
                begun = []
                continue
            begun.append(i)
            text = str(self._tokenizer.decode(begun, skip_special_tokens=False))
            if len(begun) > 1:
                found[-1] = ""  # it goes on
            found.append(text)
            begun = begun if text.endswith(_BROKEN) else []
        return found

    def piece(self, i: int) -> str:
        """One id by itself: a word, "##" and the rest of one, a sign, bytes of a character, a special token,
        "␣" for space."""
        if i < len(SPECIAL):
            return SPECIAL[i]
        text = str(self._tokenizer.decode([i], skip_special_tokens=False))
        if _BROKEN in text:
            letters = {letter: byte for byte, letter in _letters().items()}
            return "".join(f"\\x{letters[letter]:02x}" for letter in str(self._tokenizer.id_to_token(i)))
        if not text.strip():
            return "␣"
        return f"##{text}" if text[0].isalnum() else text.strip()


def _letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level token: itself where it can be printed."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
