"""The model as Hugging Face transformers know models: configs, ``generate``, ``Trainer``, ``from_pretrained``.

Importing this module registers both classes, so that ``AutoModelForCausalLM.from_pretrained`` reads checkpoints. There
is one format: ``save_pretrained`` writes what ``load_checkpoint`` reads, and ``save_checkpoint`` what
``from_pretrained`` does.

Shape letters: B batch, L tokens of the call, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hsa_compile.model.checkpoint import FORMAT, MODEL_TYPE, VERSION, CheckpointError
from hsa_compile.model.config import ModelConfig
from hsa_compile.model.model import HsaModel, sequence_loss
from hsa_compile.model.prefill import prefill
from hsa_compile.model.state import State

IGNORED = -100  # the label of what is not to be learnt, as everywhere in transformers


class HsaConfig(PreTrainedConfig):
    """The ``config.json`` of a checkpoint.

    Args:
        model: fields of ``ModelConfig``; those that are left out take its defaults, which make a very small model.
        training: JSON data on how the model was trained.
        kwargs: what every ``PreTrainedConfig`` takes.

    Raises:
        ConfigError: the fields of the model do not fit together.
        CheckpointError: the config is of a checkpoint that this program does not read.
    """

    model_type = MODEL_TYPE

    format: str = FORMAT
    version: int = VERSION
    model: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if (self.format, self.version) != (FORMAT, VERSION):
            raise CheckpointError(
                f"the config says {self.format!r}, version {self.version!r}; this program reads {FORMAT!r}, {VERSION}"
            )
        self.model = ModelConfig.from_dict(self.model or {}).to_dict()
        self.training = self.training or {}
        super().__post_init__(**kwargs)

    @property
    def sizes(self) -> ModelConfig:
        """The model's own config."""
        return ModelConfig.from_dict(self.model or {})

    # What tools of transformers ask of any config. The fields themselves are not spread out here: generation would take
    # ``top_k`` for its own.
    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.model = ModelConfig.from_dict((self.model or {}) | {"vocab_size": value}).to_dict()

    @property
    def hidden_size(self) -> int:
        return self.sizes.d_model

    @property
    def num_hidden_layers(self) -> int:
        return self.sizes.lower_layers + self.sizes.upper_layers

    @property
    def tie_word_embeddings(self) -> bool:
        return self.sizes.tie_embeddings


class HsaCache(Cache):
    """What ``generate`` carries from token to token: a ``State``, which any number of tokens leaves bounded but for the
    chunk memory.

    Rows may be repeated and reordered, as beam search does; tokens cannot be taken back.

    Args:
        offload: keep the chunk memory in the host's, where contexts outgrow the GPU; give such a cache to ``generate``
            as ``past_key_values``.

    Attributes:
        state: None before the first token.
        length: columns seen, padding included, which is what transformers count.
    """

    def __init__(self, offload: bool = False) -> None:
        super().__init__(layers=[])
        self.offload = offload
        self.reset()

    def reset(self) -> None:
        self.state: State | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.rows(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.state.position.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.position.shape[0]

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("tokens cannot be taken back from an HSA state: keep a copy.deepcopy of the cache instead")


class HsaForCausalLM(PreTrainedModel, GenerationMixin):
    """``HsaModel`` (the attribute ``model``) behind the interface of transformers; every architecture of it.

    ``generate`` decodes greedily, by sampling and by beams, from prompts padded on either side, with the numbers of
    ``hsa_compile.model.generate``. Assisted and speculative decoding are refused: they take tokens back. There are no
    ``inputs_embeds``, ``position_ids``, hidden states or attention maps.
    """

    config_class = HsaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _is_stateful = True  # by this transformers know that tokens cannot be taken back
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012 -- theirs

    def __init__(self, config: HsaConfig) -> None:
        super().__init__(config)
        self.model = HsaModel(config.sizes)
        self.register_load_state_dict_pre_hook(_with_prefix)
        self.post_init()

    def init_weights(self) -> None:
        """The model has initialized its weights; what is left are ties."""
        self.tie_weights(recompute_mapping=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Rows that ``resize_token_embeddings`` adds; nothing else is left to this."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """``PreTrainedModel.from_pretrained``, which would only warn of weights that are missing or unknown.

        Raises:
            CheckpointError: the weights are not those of the config's model.
        """
        model, found = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing", "unexpected"):
            if names := sorted(found[f"{kind}_keys"]):
                raise CheckpointError(
                    f"{names[0]} (of {len(names)}) is {kind} among the weights: they are not of this config's model"
                )
        return (model, found) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """``PreTrainedModel.save_pretrained``, with the names of ``save_checkpoint``, which have no prefix."""
        weights = self.state_dict() if state_dict is None else state_dict
        weights = {name.removeprefix("model."): x for name, x in weights.items()}
        if self.config.tie_word_embeddings:
            weights.pop("head.weight", None)
        super().save_pretrained(save_directory, *args, state_dict=weights, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        resized = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = self.config.sizes
        return resized

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are made again in the backward; what transformers set."""
        return self.model.recompute

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.model.recompute = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # ``forward`` makes its own

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: HsaCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and a loss where there are labels.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L] or, with a cache, of all columns so far; 0 at padding, anywhere in a row. Logits at
                padding are those after the last token before it, with ``logits_to_keep`` or a cache.
            past_key_values: to go on from; it is changed. Without gradients.
            use_cache: give a cache; by default only where one was given.
            labels: int64 [B, L], the tokens themselves: they are shifted here. -100 is not learnt.
            logits_to_keep: logits of only that many last columns; 0 gives all.
            num_items_in_batch: what the sum of the loss is divided by; by default the number of labels here.

        Raises:
            ValueError: the shapes do not fit, or a cache is used in training.
        """
        mask = _mask_of_call(input_ids, attention_mask)
        if past_key_values is not None or use_cache:
            if self.training and torch.is_grad_enabled():
                raise ValueError("a cache carries no gradients: train without use_cache and past_key_values")
            cache = HsaCache() if past_key_values is None else past_key_values
            logits = self._continue(input_ids, mask, cache, logits_to_keep)
        else:
            cache, logits = None, self._whole(input_ids, mask, logits_to_keep)
        loss = None
        if labels is not None:
            loss = _loss(logits, labels, mask, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _whole(self, ids_BL: Tensor, mask_BL: Tensor | None, keep: int) -> Tensor:
        if mask_BL is None:
            return self.model(ids_BL)[:, -keep:]
        logits = self.model(_left(ids_BL, mask_BL))
        if not keep and not (mask_BL[:, 1:] & ~mask_BL[:, :-1]).any():
            return logits  # padded on the right alone: each is in its place already
        return _in_place(logits, mask_BL, keep)

    def _continue(self, ids_BL: Tensor, mask_BL: Tensor | None, cache: HsaCache, keep: int) -> Tensor:
        if not isinstance(cache, HsaCache):
            raise ValueError(f"past_key_values must be an HsaCache, which forward gives, got {type(cache).__name__}")
        lengths = None
        if mask_BL is not None:
            ids_BL, lengths = _left(ids_BL, mask_BL), mask_BL.sum(1).tolist()
        if keep == 1:
            last, cache.state = prefill(self.model, ids_BL, lengths=lengths, state=cache.state, offload=cache.offload)
            logits = last[:, None]
        else:
            if cache.state is None:
                cache.state = self.model.start(ids_BL.shape[0], offload=cache.offload)
            logits, cache.state = self.model.step(ids_BL, cache.state, lengths)
            logits = logits[:, -keep:] if mask_BL is None else _in_place(logits, mask_BL, keep)
        cache.length += ids_BL.shape[1]
        return logits


def _with_prefix(module: HsaForCausalLM, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets ``load_state_dict`` take a checkpoint's names, as ``Trainer`` gives them when it resumes."""
    for name in list(weights):
        if not name.startswith(f"{prefix}model."):
            weights[f"{prefix}model.{name.removeprefix(prefix)}"] = weights.pop(name)
    if module.config.tie_word_embeddings and (source := weights.get(f"{prefix}model.embedding.weight")) is not None:
        weights.setdefault(f"{prefix}model.head.weight", source)


def _mask_of_call(ids_BL: Tensor, mask: Tensor | None) -> Tensor | None:
    """True at the tokens of this call, bool [B, L]; None where there is no padding."""
    if ids_BL.dim() != 2 or ids_BL.shape[1] < 1:
        raise ValueError(f"input_ids must be [B, L >= 1], got {list(ids_BL.shape)}")
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != ids_BL.shape[0] or mask.shape[1] < ids_BL.shape[1]:
        raise ValueError(f"attention_mask must be {list(ids_BL.shape)} or of all columns, got {list(mask.shape)}")
    mask = mask[:, -ids_BL.shape[1] :] != 0
    return None if mask.all() else mask


def _left(ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """The tokens of each row in order, then its padding."""
    return ids_BL.gather(1, (~mask_BL).byte().argsort(dim=1, stable=True))


def _in_place(logits_BLV: Tensor, mask_BL: Tensor, keep: int) -> Tensor:
    """Logits of the last ``keep`` columns from those of the rows that ``_left`` gave."""
    place = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -keep:]
    return logits_BLV.gather(1, place[..., None].expand(-1, -1, logits_BLV.shape[-1]))


def _loss(logits_BLV: Tensor, labels_BL: Tensor, mask_BL: Tensor | None, items: Tensor | int | None) -> Tensor:
    if labels_BL.shape != logits_BLV.shape[:2]:
        raise ValueError(f"labels must be {list(logits_BLV.shape[:2])} as the logits, got {list(labels_BL.shape)}")
    targets = labels_BL[:, 1:]
    learnt = targets != IGNORED
    if mask_BL is not None:
        learnt = learnt & mask_BL[:, :-1]  # nothing follows from padding
    total = None if items is None else torch.as_tensor(items, device=logits_BLV.device)
    return sequence_loss(logits_BLV[:, :-1], targets.clamp(min=0), learnt.float(), total)


AutoConfig.register(MODEL_TYPE, HsaConfig)
AutoModelForCausalLM.register(HsaConfig, HsaForCausalLM)
