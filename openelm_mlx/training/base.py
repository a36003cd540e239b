"""The model that is trained from: looked at before it is read, so that data and memory are checked first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ..adapters import stored_base_hash
from ..errors import TokenizerError
from ..hub import Progress
from ..memory.choices import stored_choices
from ..memory.machine import Machine, allow_open_files, this_machine
from ..memory.plan_types import Weights
from ..placement import Placement, parse_dtype
from ..platforms import keep_float32, use_device
from ..runtime import runtime_of
from ..sources import Source, SourceName
from ..specs import ModelSpec
from ..text.chat import TemplateChoice
from ..text.tokenizer import Tokenizer
from ..tokenizers import find_tokenizer, missing_tokenizer_message, resolve_chat_template
from ..weights import read_model
from .products import multiply_both_ways

if TYPE_CHECKING:
    from ..models import Model


@dataclass(frozen=True)
class Base:
    """A source that was opened. dtype: what is computed in. weights: the bytes it will take."""

    name: str
    source: Source
    placement: Placement
    tokenizer: Tokenizer
    template: TemplateChoice
    weights: Weights
    machine: Machine
    dtype: mx.Dtype
    trains_all: bool

    @classmethod
    def open(
        cls,
        source: SourceName,
        *,
        trains_all: bool,
        dtype: str | mx.Dtype | None = None,
        tokenizer: SourceName | None = None,
        chat_template: str | None = None,
        revision: str | None = None,
        progress: Progress | None = None,
    ) -> Base:
        """Everything but the tensors. trains_all: its weights are unpacked and read in float32, and computed with in `dtype`.

        Raises the errors of `load`, and TokenizerError where there is no tokenizer.
        """
        wanted = parse_dtype(dtype)
        allow_open_files()
        keep_float32()
        use_device()
        opened = Source.open(source, revision, progress)
        usual = Placement.of(opened.contents, wanted)
        placement = Placement.of(opened.contents, mx.float32, unpacks=True) if trains_all else usual
        template = resolve_chat_template(opened.config, chat_template, opened.template_name, opened.spec.family)
        found = find_tokenizer(opened.folder, opened.spec, tokenizer, progress, template.template)
        if found is None:
            raise TokenizerError(missing_tokenizer_message(opened.spec))
        return cls(
            name=str(source),
            source=opened,
            placement=placement,
            tokenizer=found,
            template=template,
            weights=placement.weights(opened.folder),
            machine=this_machine(),
            dtype=usual.dtype,
            trains_all=trains_all,
        )

    @property
    def spec(self) -> ModelSpec:
        """Its shapes."""
        return self.source.spec

    def hash(self) -> str:
        """Tells its weights from others."""
        return stored_base_hash(self.source.contents, self.source.checkpoint)

    def read(self) -> Model:
        """The model, with everything in memory and in training mode."""
        model = read_model(self.placement, self.source.checkpoint, None, stored_choices())
        runtime_of(model).tokenizer = self.tokenizer
        multiply_both_ways(model)
        model.train()
        if not self.trains_all:
            model.freeze()
        return model
