"""What both families are: tokens in, logits out, and between them the one walk of the layers.

Every pass goes through the layers in the same way: what a layer does before its attention, the attention over its cache,
what it does after. Prompts, the plain step, the compiled step and the streamed one differ in how the two parts are
computed, and in nothing else (`LayerWalk.enter`, `LayerWalk.leave`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from ..specs import ModelSpec
from .adapter_sets import AdapterSet
from .attention import Mask, causal_mask
from .block import Block, LayerThrottle, Projected
from .cache import Cache, make_cache
from .precision import KernelChoices, default_choices
from .remote import RemoteLayers

# One token's masks may be None, so what has not been made yet needs a mark of its own.
_NOT_MADE: Any = object()


class LanguageModel(nn.Module):
    """A language model: tokens (B, L) -> logits (B, L, vocab_size). What is said here holds for every family.

    spec: its shapes. choices: which of equal ways its kernels take; the backend's defaults when it is None.
    """

    # What it has beyond its weights (openelm_mlx/runtime.py); None until it is loaded or first run.
    runtime: Any = None
    # 8: new caches keep their keys and values in 8 bits, in the layers that keep them all.
    kv_bits: int | None = None
    # Whether other machines go on where its own layers end: of a prompt they need every token.
    is_followed = False

    def __init__(self, spec: ModelSpec, choices: KernelChoices | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.model_type = spec.family
        self.context_length = spec.context_length
        self.choices = default_choices() if choices is None else choices
        # Adapters beside its matrices (models/adapters.py): those it serves, and the one in training.
        self.adapters = AdapterSet()
        self.attached: Any = None
        # How often parameters or modules were replaced through this module; see `decoding.pieces.weights_version`.
        self.num_updates = 0

    def __call__(self, tokens: mx.array, cache: Cache | None = None, left_padding: mx.array | None = None) -> mx.array:
        """Logits (B, L, V) of the next token after each of `tokens` (B, L); or (B, V) after (B,), one token a row.

        cache: from `make_cache`, extended in place; with it, `tokens` are only the new ones. left_padding (B,): how many
        tokens at the start of each row are padding; a cache has its own.
        """
        h = self.own(tokens, cache, left_padding)
        return h if self.remote is None else self.head(self.remote.whole(h, cache, left_padding))

    def own(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        left_padding: mx.array | None = None,
        throttle: LayerThrottle | None = None,
    ) -> mx.array:
        """What this machine computes in one go: the logits, or the residual stream where other machines go on with it."""
        return self.finish(self.run_layers(self.embed(tokens), cache, left_padding=left_padding, throttle=throttle))

    def finish(self, h: mx.array) -> mx.array:
        """The logits after the model's own layers; h itself where other machines go on with it."""
        return h if self.is_followed else self.head(h)

    @property
    def plan(self) -> Any:
        """The memory plan that loading followed (`om.plan` gives such plans too); None where nothing was planned."""
        return None if self.runtime is None else self.runtime.plan

    @property
    def residency(self) -> Any:
        """What reads experts that are not in memory; None when all are."""
        return None if self.runtime is None else self.runtime.residency

    @property
    def remote(self) -> RemoteLayers | None:
        """The layers after its own, on other machines; None when it has them all."""
        return None if self.runtime is None else self.runtime.remote

    def embed(self, tokens: mx.array) -> mx.array:
        """The residual stream before the first layer. (B, L) -> (B, L, hidden_size), (B,) -> (B, hidden_size)

        A part that has only layers is given the residual stream in the tokens' place, and gives it as it is.
        """
        raise NotImplementedError

    def head(self, h: mx.array) -> mx.array:
        """Logits of the residual stream after the last layer. (B, L, hidden_size) -> (B, L, vocab_size)"""
        raise NotImplementedError

    @property
    def layers(self) -> Sequence[Any]:
        """The layers, each a `Block`."""
        raise NotImplementedError

    def run_layers(
        self,
        h: mx.array,
        cache: Cache | None = None,
        start: int = 0,
        stop: int | None = None,
        left_padding: mx.array | None = None,
        throttle: LayerThrottle | None = None,
    ) -> mx.array:
        """The residual stream h (B, L, hidden_size) after layers start ... stop - 1; (B, hidden_size): one token a row.

        throttle: called after each part of a layer, with a cache of ours.
        """
        walk = PlainWalk(self, h, cache, left_padding, throttle)
        del h  # the walk has it, for as long as it is needed
        walk.run(start, len(self.spec.layers) if stop is None else stop)
        return walk.h

    def make_cache(
        self,
        window: int | None = None,
        left_padding: list[int] | None = None,
        kv_bits: int | None = None,
        room: int = 0,
    ) -> Cache:
        """An empty cache for each layer; `window` makes a ring of that many tokens where a layer would keep them all.

        After those of its own layers comes one for each machine that has others. kv_bits: 8 or 16 for the layers that keep
        everything; the model's own setting when it is None. room: how many tokens beyond its window a ring keeps, so that
        they can be taken back.
        """
        if kv_bits is None and window is None:
            kv_bits = self.kv_bits
        spare = self.choices.spare_places
        own = make_cache(self.spec, window, left_padding, room, self.context_length, kv_bits, spare)
        return own if self.remote is None else [*own, *self.remote.caches(window, left_padding, kv_bits, room)]

    def update(self, parameters: dict[str, Any], strict: bool = True) -> nn.Module:
        """As every module's; compiled steps learn of it, and are made anew with the new parameters."""
        self.num_updates += 1
        return super().update(parameters, strict)

    def update_modules(self, modules: dict[str, Any], strict: bool = True) -> nn.Module:
        """As every module's; compiled steps learn of it, and are made anew with the new modules."""
        self.num_updates += 1
        return super().update_modules(modules, strict)


class LayerWalk:
    """New tokens on their way through the layers of a model.

    model: with `layers` and `spec`. cache: one a layer, ours or mlx-lm's; None for a prompt that nothing comes after.
    length: how many new tokens a row has. left_padding (B,): of rows without a cache.
    """

    def __init__(
        self, model: LanguageModel, cache: Cache | None, length: int, left_padding: mx.array | None = None
    ) -> None:
        self.layers: Sequence[Block] = model.layers
        self.cache, self.length = cache, length
        self._specs = model.spec.layers
        self._left_padding = left_padding
        self._masks: dict[int | None, Mask] = {}  # one for the sliding layers and one for the full ones

    def run(self, start: int, stop: int) -> None:
        """Through layers start ... stop - 1."""
        for i in range(start, stop):
            x, queries, keys, values = self.enter(i)
            out = self.attend(i, queries, keys, values)
            del queries, keys, values  # nothing of a part is kept longer than the next one needs it
            self.leave(i, x, out)
            del x, out

    def enter(self, i: int) -> Projected:
        """What layer `i` begins with, (B, L, hidden_size), and its new tokens' queries, keys and values."""
        raise NotImplementedError

    def attend(self, i: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """What the attention of layer `i` gives, (B, H, L, D); the new keys and values are in its cache then."""
        cache = None if self.cache is None else self.cache[i]
        window = self._specs[i].window
        mask = self._masks.get(window, _NOT_MADE)
        if mask is _NOT_MADE:
            self._masks[window] = mask = self._make_mask(i, window)
        return self.layers[i].attention.attend(queries, keys, values, mask, cache)

    def leave(self, i: int, x: mx.array, out: mx.array) -> None:
        """Take the output of layer `i`'s attention, to be gone on from."""
        raise NotImplementedError

    def _make_mask(self, i: int, window: int | None) -> Mask:
        if self.cache is None:
            return causal_mask(self.length, 0, window, self._left_padding)
        # mlx-lm's caches, which may stand here too, need both words.
        return self.cache[i].make_mask(self.length, return_array=False, window_size=window)


class WalkInParts(LayerWalk):
    """A walk with nothing compiled: a layer is its two parts, called one after the other.

    h: the residual stream as far as the walk has come. throttle: told of each part that has been dispatched.
    """

    def __init__(
        self,
        model: LanguageModel,
        h: mx.array,
        cache: Cache | None,
        length: int,
        left_padding: mx.array | None = None,
        throttle: LayerThrottle | None = None,
    ) -> None:
        super().__init__(model, cache, length, left_padding)
        self.h = h
        self._throttle = throttle

    def enter(self, i: int) -> Projected:
        queries, keys, values = self.layers[i].before_attention(self.h, self._offset_in(i))
        if self._throttle is not None:
            self._throttle([queries, keys, values], False)
        return self.h, queries, keys, values

    def leave(self, i: int, x: mx.array, out: mx.array) -> None:
        if self._throttle is not None:
            self._throttle([out, *self._written_in(i)], False)
        self.h = self.layers[i].after_attention(x, out)
        if self._throttle is not None:
            self._throttle([self.h], True)

    def _offset_in(self, i: int) -> int | mx.array:
        """The position of the first of a row's new tokens in layer `i`, or one a row."""
        raise NotImplementedError

    def _written_in(self, i: int) -> list[mx.array]:
        """The buffers into which the attention of layer `i` has written."""
        raise NotImplementedError


class PlainWalk(WalkInParts):
    """The walk of rows of the same length, (B, L) tokens, or one a row."""

    def __init__(
        self,
        model: LanguageModel,
        h: mx.array,
        cache: Cache | None,
        left_padding: mx.array | None = None,
        throttle: LayerThrottle | None = None,
    ) -> None:
        length = 1 if h.ndim == 2 else h.shape[1]
        super().__init__(model, h, cache, length, left_padding, None if cache is None else throttle)

    def _offset_in(self, i: int) -> int | mx.array:
        return 0 if self.cache is None else self.cache[i].offset

    def _written_in(self, i: int) -> list[mx.array]:
        return [] if self.cache is None else self.cache[i].buffers
