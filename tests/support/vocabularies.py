"""Tiny GGUF models with a SentencePiece vocabulary: BOS, spaces as U+2581, one put in front of each piece of text.

The models of ``models.py`` have byte tokens and no BOS, so that tokens can be counted. These are for what depends on
how a text is tokenized: words of several characters, and what llama.cpp does around special tokens.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

UNKNOWN, BOS, EOS = 0, 1, 2
SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
SPACE = "\u2581"
# Later ones are merged later; each can be built from two that come before.
_WORDS = (
    *(
        "th",
        "in",
        "er",
        "an",
        "re",
        "on",
        "at",
        "or",
        "the",
        "ing",
        "and",
        "ion",
        "def",
        "self",
        "==",
        "()",
        "().",
    ),
    *(
        f"{SPACE}{SPACE}",
        f"{SPACE * 4}",
        f"{SPACE}t",
        f"{SPACE}a",
        f"{SPACE}th",
        f"{SPACE}the",
        f"{SPACE}and",
    ),
    *("de", "se", "lf", "ti", "io", f"{SPACE}s", f"{SPACE}self", f"{SPACE}x", f"{SPACE}w", f"{SPACE}or"),
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)
WIDTH = 32


def sentencepiece(
    directory: Path, *, name: str = "plain", adds_eos: bool = False, infill: tuple[str, ...] = ()
) -> Path:
    """One layer of a ``llama`` with random weights.

    ``name``: "phi-3" makes llama.cpp strip the spaces after most special tokens (it goes by general.name). ``adds_eos``
    makes it append EOS to each text tokenized with ``add_special``. ``infill``: the meanings for /infill of the special
    tokens, in their order (``models.INFILL``).
    """
    path = directory / f"spm-{name}{'-eos' if adds_eos else ''}-{len(infill)}.gguf"
    directory.mkdir(parents=True, exist_ok=True)
    characters = [chr(code) for code in range(0x21, 0x7F)] + [SPACE]
    texts = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *SPECIALS,
        *characters,
        *_WORDS,
    ]
    kinds = gguf.TokenType
    types = [
        kinds.UNKNOWN,
        kinds.CONTROL,
        kinds.CONTROL,
        *[kinds.BYTE] * 256,
        *[kinds.CONTROL] * len(SPECIALS),
    ]
    types += [kinds.NORMAL] * (len(texts) - len(types))
    scores = [0.0] * (len(texts) - len(_WORDS)) + [-float(rank) for rank in range(1, len(_WORDS) + 1)]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(65_536)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(texts))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(adds_eos)
    for token, mark in enumerate(infill, start=texts.index(SPECIALS[0])):
        writer.add_uint32(f"tokenizer.ggml.{mark}_token_id", token)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(1)

    def add(tensor: str, *shape: int) -> None:
        writer.add_tensor(tensor, (random.standard_normal(shape) * 0.1).astype(np.float32))

    add("token_embd.weight", len(texts), WIDTH)
    add("output.weight", len(texts), WIDTH)
    for vector in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        add(f"{vector}.weight", WIDTH)
    for matrix in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        add(f"blk.0.{matrix}.weight", WIDTH, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
