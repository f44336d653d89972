"""Tiny GGUF models for the real llama.cpp, written on the spot: random weights, one token per byte, a ChatML template.

Token ids: 0..255 are the bytes themselves, then ``IM_START``, ``IM_END`` and ``END_OF_TEXT`` (control tokens). There
is no BOS token, so a prompt of n ASCII characters is n tokens. Answers consist of printable ASCII only and never end
by themselves: dimension 0 of the residual stream is a positive constant that no layer writes to, and the output rows
of every other token are strongly negative there. The same kind, shape and seed always give the same bytes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

IM_START, IM_END, END_OF_TEXT = 256, 257, 258
N_VOCAB = 259
N_CTX_TRAIN = 262_144
SLIDING_WINDOW = 512
RECIPE = 2  # raised with every change of the weights below: a cache must not serve those of before

Array = NDArray[np.float32]

# Tool calls in the notation that most ChatML models use, so that llama-server finds a parser for it. Reasoning of turns
# before the last user message is dropped, as real templates do, unless `chat_template_kwargs` says keep_reasoning.
CHAT_TEMPLATE = """\
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\nYou may call one or more functions.\\n\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n\\nFor each call return a json object within <tool_call></tool_call> tags:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content and (keep_reasoning or loop.index0 > ns.last_user) %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
{%- if call.function %}{%- set call = call.function %}{%- endif %}
{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


#: Tokens for /infill, as models that were trained for it have them: 1, 2, 3, and for several files 4 and 5.
INFILL = ("fim_pre", "fim_suf", "fim_mid")
INFILL_FILES = (*INFILL, "fim_rep", "fim_sep")


def dense(
    directory: Path, seed: int = 1, *, layers: int = 2, width: int = 64, infill: tuple[str, ...] = ()
) -> Path:
    """A ``llama``: full attention, so a slot can be cut back to any token. Another seed: same shape, other weights."""
    marks = f"-{len(infill)}" if infill else ""
    return _cached(
        directory / f"dense-{layers}x{width}-s{seed}{marks}-r{RECIPE}.gguf",
        lambda path: _dense(path, seed, layers, width, infill),
    )


def infill(directory: Path, marks: tuple[str, ...] = INFILL) -> Path:
    """``dense`` with fill-in-the-middle tokens, without which /infill is 501."""
    return dense(directory, infill=marks)


def draft(directory: Path, seed: int = 1) -> Path:
    """The first layer of ``dense(seed)`` alone: a draft model for speculative decoding that is sometimes right."""
    return dense(directory, seed, layers=1)


def lora(directory: Path, *, width: int = 64) -> Path:
    """An adapter for ``dense`` that changes the output of its first layer: other answers, and another KV cache."""
    return _cached(directory / f"lora-{width}-r{RECIPE}.gguf", lambda path: _lora(path, width))


def swa(directory: Path, seed: int = 1, *, width: int = 64) -> Path:
    """A ``gemma3`` with a sliding window of ``SLIDING_WINDOW`` tokens in five of six layers."""
    size = "" if width == 64 else f"-{width}"
    return _cached(directory / f"swa{size}-s{seed}-r{RECIPE}.gguf", lambda path: _swa(path, seed, width))


def recurrent(directory: Path, seed: int = 1, *, layers: int = 2, width: int = 64) -> Path:
    """A ``mamba``: one state per sequence, which can only move forward."""
    size = "" if (layers, width) == (2, 64) else f"-{layers}x{width}"
    return _cached(
        directory / f"recurrent{size}-s{seed}-r{RECIPE}.gguf",
        lambda path: _recurrent(path, seed, layers, width),
    )


def hybrid(directory: Path, seed: int = 1, *, width: int = 64) -> Path:
    """An ``lfm2``: four layers of short convolutions, whose state can only move forward, and two of full attention."""
    size = "" if width == 64 else f"-{width}"
    return _cached(
        directory / f"hybrid{size}-s{seed}-r{RECIPE}.gguf", lambda path: _hybrid(path, seed, width)
    )


def of_kind(kind: str, directory: Path) -> Path:
    """The model of this kind: ``dense``, ``swa``, ``recurrent`` or ``hybrid``."""
    return {"dense": dense, "swa": swa, "recurrent": recurrent, "hybrid": hybrid}[kind](directory)


def mrope(directory: Path, seed: int = 1) -> Path:
    """The language model of a ``qwen2vl``: full attention, positions of several dimensions."""
    return _cached(directory / f"mrope-s{seed}-r{RECIPE}.gguf", lambda path: _mrope(path, seed, 2, 64))


def _cached(path: Path, write: Callable[[Path], None]) -> Path:
    """Return ``path``; call ``write`` first if it is not there. The file is renamed into place, so processes may do
    this at the same time.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        os.close(handle)
        write(Path(name))
        os.replace(name, path)
    return path


class _Weights:
    """Random tensors that keep activations near 1 and never write to dimension 0 of the residual stream."""

    def __init__(self, writer: Any, seed: int, width: int) -> None:
        self.writer, self.width = writer, width
        self.random = np.random.default_rng(seed)

    def add(self, name: str, array: Array) -> None:
        self.writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))

    def matrix(self, name: str, n_out: int, n_in: int, scale: float = 1.0) -> None:
        self.add(name, self._normal(n_out, n_in, scale / np.sqrt(n_in)))

    def to_residual(self, name: str, n_in: int, scale: float) -> None:
        array = self._normal(self.width, n_in, scale / np.sqrt(n_in))
        array[0] = 0.0
        self.add(name, array)

    def norm(self, name: str, size: int | None = None, value: float = 1.0) -> None:
        self.add(name, np.full(size or self.width, value, dtype=np.float32))

    def post_norm(self, name: str, value: float) -> None:
        array = np.full(self.width, value, dtype=np.float32)
        array[0] = 0.0
        self.add(name, array)

    def ends(
        self, embedding_scale: float = 1.0, logit_scale: float = 6.0, norm: str = "output_norm.weight"
    ) -> None:
        """Token embeddings, final norm and output rows."""
        embedding = self._normal(N_VOCAB, self.width, 1.0)
        embedding[:, 0] = 2.0
        self.add("token_embd.weight", embedding * np.float32(embedding_scale))
        self.norm(norm)
        output = np.zeros((N_VOCAB, self.width), dtype=np.float32)
        printable = slice(0x20, 0x7F)
        output[:, 0] = -100.0
        output[printable] = self._normal(0x7F - 0x20, self.width, logit_scale / np.sqrt(self.width))
        self.add("output.weight", output)

    def _normal(self, n_out: int, n_in: int, deviation: float) -> Array:
        return (self.random.standard_normal((n_out, n_in)) * deviation).astype(np.float32)


def _lora(path: Path, width: int, rank: int = 4) -> None:
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(7)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    down = random.standard_normal((rank, width)).astype(np.float32)
    up = random.standard_normal((width, rank)).astype(np.float32)
    up[0] = 0.0
    writer.add_tensor("blk.0.attn_output.weight.lora_a", down)
    writer.add_tensor("blk.0.attn_output.weight.lora_b", up)
    _close(writer)


def _open(path: Path, arch: str, layers: int, width: int) -> Any:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"llamaslot-{arch}")
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    symbols = _byte_symbols()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*symbols, "<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3)
    # The format wants at least one merge: of two bytes that never occur in UTF-8.
    writer.add_token_merges([f"{symbols[0xFF]} {symbols[0xFE]}"])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(IM_END)
    writer.add_pad_token_id(END_OF_TEXT)
    writer.add_chat_template(CHAT_TEMPLATE)
    return writer


def _byte_symbols() -> list[str]:
    """The characters that stand for the 256 bytes in a GPT-2 vocabulary: printable Latin-1 for itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _feed_forward(weights: _Weights, block: str, width: int, hidden: int, scale: float) -> None:
    weights.norm(f"{block}.ffn_norm.weight")
    weights.matrix(f"{block}.ffn_gate.weight", hidden, width)
    weights.matrix(f"{block}.ffn_up.weight", hidden, width)
    weights.to_residual(f"{block}.ffn_down.weight", hidden, scale)


def _dense(path: Path, seed: int, layers: int, width: int, infill: tuple[str, ...]) -> None:
    heads = max(2, width // 32)
    writer = _open(path, "llama", layers, width)
    for token, name in enumerate(infill, start=1):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(N_VOCAB)
    weights = _Weights(writer, seed, width)
    weights.ends()
    for layer in range(layers):
        block = f"blk.{layer}"
        weights.norm(f"{block}.attn_norm.weight")
        # Scores so sharp that a few far tokens decide: answers depend on all of the context and do not go in circles.
        weights.matrix(f"{block}.attn_q.weight", width, width, 2.5)
        weights.matrix(f"{block}.attn_k.weight", width, width, 2.5)
        weights.matrix(f"{block}.attn_v.weight", width, width)
        weights.to_residual(f"{block}.attn_output.weight", width, 4.0)
        _feed_forward(weights, block, width, 2 * width, 1.0)
    _close(writer)


def _swa(path: Path, seed: int, width: int) -> None:
    layers, heads, head_size = 6, width // 32, 32
    writer = _open(path, "gemma3", layers, width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(SLIDING_WINDOW)
    weights = _Weights(writer, seed, width)
    weights.ends(embedding_scale=1 / np.sqrt(width))  # gemma multiplies the embeddings by sqrt(width)
    for layer in range(layers):
        block = f"blk.{layer}"
        weights.norm(f"{block}.attn_norm.weight")
        weights.matrix(f"{block}.attn_q.weight", heads * head_size, width)
        weights.matrix(f"{block}.attn_k.weight", head_size, width)
        weights.matrix(f"{block}.attn_v.weight", head_size, width)
        weights.norm(f"{block}.attn_q_norm.weight", head_size, 2.2)
        weights.norm(f"{block}.attn_k_norm.weight", head_size, 2.2)
        weights.matrix(f"{block}.attn_output.weight", width, heads * head_size)
        weights.post_norm(f"{block}.post_attention_norm.weight", 0.6)
        _feed_forward(weights, block, width, 2 * width, 1.0)
        weights.post_norm(f"{block}.post_ffw_norm.weight", 0.4)
    _close(writer)


def _recurrent(path: Path, seed: int, layers: int, width: int) -> None:
    inner, states, kernel, rank = 2 * width, 16, 4, width // 16
    writer = _open(path, "mamba", layers, width)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(states)
    writer.add_ssm_time_step_rank(rank)
    weights = _Weights(writer, seed, width)
    weights.ends()
    for layer in range(layers):
        block = f"blk.{layer}"
        weights.norm(f"{block}.attn_norm.weight")
        weights.matrix(f"{block}.ssm_in.weight", 2 * inner, width)
        weights.matrix(f"{block}.ssm_conv1d.weight", inner, kernel)
        weights.norm(f"{block}.ssm_conv1d.bias", inner, 0.1)
        weights.matrix(f"{block}.ssm_x.weight", rank + 2 * states, inner, 2.0)
        weights.matrix(f"{block}.ssm_dt.weight", inner, rank, 0.5)
        # softplus(-3) = 0.05 per step, and decays that make states last from one token to some thousands
        weights.norm(f"{block}.ssm_dt.bias", inner, -3.0)
        weights.add(
            f"{block}.ssm_a", np.tile(-np.geomspace(0.005, 16, states), (inner, 1)).astype(np.float32)
        )
        weights.norm(f"{block}.ssm_d", inner, 1.0)
        weights.to_residual(f"{block}.ssm_out.weight", inner, 3.0)
    _close(writer)


def _hybrid(path: Path, seed: int, width: int) -> None:
    heads, kernel, attention = width // 32, 3, (0, 0, 1, 0, 0, 1)
    writer = _open(path, "lfm2", len(attention), width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv([heads if is_attention else 0 for is_attention in attention])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_vocab_size(N_VOCAB)
    writer.add_shortconv_l_cache(kernel)
    weights = _Weights(writer, seed, width)
    weights.ends(norm="token_embd_norm.weight")
    for layer, is_attention in enumerate(attention):
        block = f"blk.{layer}"
        weights.norm(f"{block}.attn_norm.weight")
        if is_attention:
            weights.matrix(f"{block}.attn_q.weight", width, width)
            weights.matrix(f"{block}.attn_k.weight", width, width)
            weights.matrix(f"{block}.attn_v.weight", width, width)
            weights.norm(f"{block}.attn_q_norm.weight", width // heads, 2.2)
            weights.norm(f"{block}.attn_k_norm.weight", width // heads, 2.2)
            weights.to_residual(f"{block}.attn_output.weight", width, 4.0)
        else:
            weights.matrix(f"{block}.shortconv.conv.weight", width, kernel)
            weights.matrix(f"{block}.shortconv.in_proj.weight", 3 * width, width)
            weights.to_residual(f"{block}.shortconv.out_proj.weight", width, 1.0)
        _feed_forward(weights, block, width, 2 * width, 1.0)
    _close(writer)


def _mrope(path: Path, seed: int, layers: int, width: int) -> None:
    heads = 2
    writer = _open(path, "qwen2vl", layers, width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_rope_dimension_sections([4, 6, 6, 0])
    writer.add_vocab_size(N_VOCAB)
    weights = _Weights(writer, seed, width)
    weights.ends()
    for layer in range(layers):
        block = f"blk.{layer}"
        weights.norm(f"{block}.attn_norm.weight")
        for name, scale in (("q", 2.5), ("k", 2.5), ("v", 1.0)):
            weights.matrix(f"{block}.attn_{name}.weight", width, width, scale)
            weights.norm(f"{block}.attn_{name}.bias", value=0.0)
        weights.to_residual(f"{block}.attn_output.weight", width, 4.0)
        _feed_forward(weights, block, width, 2 * width, 1.0)
    _close(writer)


def eyes(directory: Path, seed: int = 1) -> Path:
    """A file that llama-server takes as ``--mmproj`` with any of these models of width 64. An image of 28 by 28 becomes
    four tokens' embeddings, which depend on its colours.
    """
    return _cached(directory / f"eyes-s{seed}-r{RECIPE}.gguf", lambda path: _eyes(path, seed))


def _eyes(path: Path, seed: int, width: int = 32, hidden: int = 64, patch: int = 14) -> None:
    writer, random = gguf.GGUFWriter(path, "clip"), np.random.default_rng(seed)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    numbers = {
        "image_size": 2 * patch, "patch_size": patch, "embedding_length": width, "feed_forward_length": hidden,
        "projection_dim": 64, "block_count": 1, "attention.head_count": 2,
    }  # fmt: skip
    for name, value in numbers.items():
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    writer.add_bool("clip.use_gelu", True)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(np.float32))

    def layer(name: str, n_out: int, n_in: int) -> None:
        tensor(f"{name}.weight", n_out, n_in)
        writer.add_tensor(f"{name}.bias", np.zeros(n_out, np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))

    tensor("v.patch_embd.weight", width, 3, patch, patch)
    tensor("v.class_embd", width)
    tensor("v.position_embd.weight", 5, width)
    for name in ("v.pre_ln", "v.blk.0.ln1", "v.blk.0.ln2"):
        norm(name)
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        layer(f"v.blk.0.{name}", width, width)
    layer("v.blk.0.ffn_up", hidden, width)
    layer("v.blk.0.ffn_down", width, hidden)
    layer("mm.0", 64, width)
    layer("mm.2", 64, 64)
    _close(writer)
