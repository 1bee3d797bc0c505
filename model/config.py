"""The shape of a model: one frozen dataclass, checked when it is made, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hsa_compile.ir import ChunkAttention, ChunkSelect
from hsa_compile.ir.operators import Dtype

SlotWeights = Literal["softmax", "stick-breaking"]
Encoder = Literal["cls", "mean", "none"]
Architecture = Literal["hsa", "mamba-hsa", "nsa", "swa", "attention", "landmark", "mamba"]
# What reads a chunk memory through the operators; the others are baselines in plain PyTorch.
WITH_OPERATORS = ("hsa", "mamba-hsa")
WITH_MEMORY = (*WITH_OPERATORS, "nsa")
WITH_MAMBA = ("mamba", "mamba-hsa")


class ConfigError(ValueError):
    """A model was described with values that do not fit together; the message says which and what would do."""


# What no answer of a trained model depends on: training may go on from its weights with other values.
TRAINING_ONLY = ("train_top_k", "selection_noise")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model. The letters in brackets are those of the shape legends.

    Args:
        architecture: ``hsa``, or what it is compared with, in the same skeleton of as many layers:
            ``mamba-hsa`` has Mamba-2 in place of sliding windows; ``nsa`` reads its memory with one softmax over the
            tokens of the selected chunks, which it finds by mean-pooled keys; ``swa`` and ``mamba`` have no memory;
            ``attention`` sees every token before, and ``landmark`` does so through a landmark token after each chunk.
        vocab_size: [V] rows of the embedding; the byte tokenizer needs 260.
        d_model: [d] width of the residual stream.
        mlp_dim: inner width of every SwiGLU.
        lower_layers: sliding-window layers below the chunk memory.
        upper_layers: sliding-window layers above it, spread evenly over the groups.
        n_groups: retrievals, each followed by an HSA sub-layer and its share of the upper layers.
        swa_heads, swa_kv_heads, swa_head_dim: of the sliding-window layers and of the chunk encoder.
        window: [W] a token sees itself and the W - 1 tokens before it.
        chunk_size: [S] tokens a chunk.
        hsa_heads, hsa_kv_heads, hsa_head_dim: [Hq, Hkv, D] of the HSA sub-layers and of the chunk memory.
        retrieval_heads: [Hr] either hsa_kv_heads or 1 (then all kv heads share one selection).
        retrieval_dim: [Dr] width of one retrieval head.
        top_k: [K] chunks selected a token at inference.
        train_top_k: K while training; small, so that the model learns to reject chunks.
        selection_noise: scale of Gumbel noise that is added to the scores while training, in standard deviations of a
            token's scores: the right chunk must win by a margin, as it will have to among many more chunks.
        encoder: what a chunk's landmark is a linear function of, and what its keys and values come from.
            ``cls``: the encoder's output at a learned CLS vector, and its other outputs; ``mean``: the mean of the
            encoder's outputs, and these; ``none``: the mean of the hidden states, and the normed hidden states.
        encoder_layers: bidirectional layers of the chunk encoder, where there is one.
        bypass: what was retrieved reaches the residual stream only through the HSA sub-layer's MLP.
        weights: how the scores of the selected chunks become weights.
        rank_decay: softmax scores get gamma * k, k the rank of the chunk from the newest, gamma learned a retrieval.
        off_by_one: add 1 to the softmax denominators inside the chunks.
        qk_norm: RMSNorm on queries and keys of every attention, and on retrieval queries and landmarks.
        leave_window: chunks that the sliding window covers are not selected.
        tie_embeddings: the head shares the embedding's weight.
        rope_base: base of the rotary frequencies.
        ssm_state, ssm_head_dim: [N, P] state a channel and channels a head of Mamba-2.
        ssm_expand: channels of Mamba-2 as a multiple of d_model.
        ssm_conv: tokens that its convolution sees.

    Raises:
        ConfigError: a value is out of range or two values do not fit.
    """

    architecture: Architecture = "hsa"
    vocab_size: int = 260
    d_model: int = 128
    mlp_dim: int = 256
    lower_layers: int = 2
    upper_layers: int = 2
    n_groups: int = 1
    swa_heads: int = 4
    swa_kv_heads: int = 4
    swa_head_dim: int = 32
    window: int = 32
    chunk_size: int = 16
    hsa_heads: int = 4
    hsa_kv_heads: int = 1
    hsa_head_dim: int = 32
    retrieval_heads: int = 1
    retrieval_dim: int = 64
    top_k: int = 4
    train_top_k: int = 4
    selection_noise: float = 0.0
    encoder: Encoder = "cls"
    encoder_layers: int = 1
    bypass: bool = True
    weights: SlotWeights = "softmax"
    rank_decay: bool = False
    off_by_one: bool = False
    qk_norm: bool = True
    leave_window: bool = False
    tie_embeddings: bool = True
    rope_base: float = 10_000.0
    ssm_state: int = 64
    ssm_head_dim: int = 32
    ssm_expand: int = 2
    ssm_conv: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{field.name} must be a positive integer, got {value!r}")
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name} must be true or false, got {value!r}")
        self._check_heads()
        for name, kind in (("architecture", Architecture), ("encoder", Encoder), ("weights", SlotWeights)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.rank_decay and self.weights != "softmax":
            raise ConfigError(f"rank_decay is of softmax weights; these are {self.weights}")
        if not isinstance(self.selection_noise, int | float) or not 0 <= self.selection_noise < float("inf"):
            raise ConfigError(f"selection_noise must be a number of at least 0, got {self.selection_noise!r}")
        if not isinstance(self.rope_base, int | float) or not 1 < self.rope_base < float("inf"):
            raise ConfigError(f"rope_base must be a number above 1, got {self.rope_base!r}")
        if self.upper_layers % self.n_groups:
            raise ConfigError(f"upper_layers ({self.upper_layers}) must be a multiple of n_groups ({self.n_groups})")
        if self.leave_window and self.window < self.chunk_size:
            raise ConfigError(
                f"leave_window needs a window of at least chunk_size ({self.chunk_size}), got {self.window}: "
                "tokens between window and chunk would be seen by neither"
            )

    def _check_heads(self) -> None:
        for kind in ("swa", "hsa"):
            heads, kv_heads = getattr(self, f"{kind}_heads"), getattr(self, f"{kind}_kv_heads")
            if heads % kv_heads:
                raise ConfigError(f"{kind}_heads ({heads}) must be a multiple of {kind}_kv_heads ({kv_heads})")
        if self.swa_head_dim % 2:
            raise ConfigError(f"swa_head_dim must be even, RoPE turns pairs; got {self.swa_head_dim}")
        if self.architecture in WITH_MAMBA and self.ssm_expand * self.d_model % self.ssm_head_dim:
            raise ConfigError(
                f"ssm_expand * d_model ({self.ssm_expand * self.d_model}) must be a multiple of ssm_head_dim "
                f"({self.ssm_head_dim})"
            )
        if self.retrieval_heads not in (1, self.hsa_kv_heads):
            raise ConfigError(
                f"retrieval_heads must be 1 or hsa_kv_heads ({self.hsa_kv_heads}), got {self.retrieval_heads}"
            )

    @property
    def has_memory(self) -> bool:
        """Whether there is a chunk memory for the upper layers."""
        return self.architecture in WITH_MEMORY

    @property
    def landmark_shape(self) -> tuple[int, int]:
        """Heads and width of a landmark: [Hr, Dr], or those of the keys that NSA averages."""
        if self.architecture == "nsa":
            return self.hsa_kv_heads, self.hsa_head_dim
        return self.retrieval_heads, self.retrieval_dim

    @property
    def ssm_heads(self) -> int:
        """Heads of a Mamba-2 layer."""
        return self.ssm_expand * self.d_model // self.ssm_head_dim

    def require(self, purpose: str, architectures: tuple[str, ...]) -> None:
        """Refuses what only models of these architectures can do.

        Raises:
            ConfigError: the architecture is another.
        """
        if self.architecture not in architectures:
            raise ConfigError(
                f"{purpose} needs the architecture {' or '.join(architectures)}; {self.architecture} runs in PyTorch"
            )

    def problems(self, training: bool = False, dtype: Dtype = "float32") -> tuple[ChunkSelect, ChunkAttention]:
        """The problems that the model's operators pose, at inference or while training, on tensors of ``dtype``.

        Raises:
            ConfigError: the architecture does not use them.
        """
        self.require("building kernels", WITH_OPERATORS)
        top_k = self.train_top_k if training else self.top_k
        window = self.window if self.leave_window else 0
        heads, kv_heads, D, S = self.hsa_heads, self.hsa_kv_heads, self.hsa_head_dim, self.chunk_size
        return (
            ChunkSelect(kv_heads, self.retrieval_heads, self.retrieval_dim, S, top_k, window, dtype),
            ChunkAttention(heads, kv_heads, D, S, top_k, self.off_by_one, dtype),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``from_dict`` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of ``to_dict``. Missing fields take their defaults.

        Raises:
            ConfigError: ``data`` is not a mapping, has an unknown field, or a value is invalid.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"a model config must be a JSON object, got {type(data).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ConfigError(f"unknown model config fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**data)


def preset(name: str) -> ModelConfig:
    """The preset of that name.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def _large(d_model: int, layers: int, mlp_dim: int, **fields: Any) -> ModelConfig:
    """The reference family: windows of 512, chunks of 64, heads of 64, trained at 4 096 tokens with K = 8."""
    shape: dict[str, Any] = {
        "vocab_size": 50_304, "window": 512, "chunk_size": 64, "n_groups": 2,
        "lower_layers": layers // 2, "upper_layers": layers // 2,
        "swa_heads": d_model // 64, "swa_kv_heads": 2, "swa_head_dim": 64,
        "hsa_heads": d_model // 64, "hsa_kv_heads": 1, "hsa_head_dim": 64,
        "retrieval_dim": 128, "top_k": 8, "train_top_k": 8,
    }  # fmt: skip
    return ModelConfig(d_model=d_model, mlp_dim=mlp_dim, **(shape | fields))


PRESETS: dict[str, ModelConfig] = {
    # A window of half a key-value pair: a pair's value has to be looked up through the chunk memory from the first step
    # on. With windows of 8 most runs stay with copying any pair they have seen.
    "tiny": ModelConfig(
        d_model=64, mlp_dim=128, swa_heads=2, swa_kv_heads=2, hsa_heads=2, window=4, tie_embeddings=False
    ),
    "25m": _large(256, 8, 1024),
    "60m": _large(512, 8, 1536),
    "240m": _large(1024, 16, 2304),
    "345m": _large(1024, 16, 4096, top_k=32, train_top_k=32),
}
