"""What a model is worth: log-likelihoods, perplexity, two models beside each other, and the tasks of the papers."""

from __future__ import annotations

from .compare import Comparison as Comparison
from .compare import compare as compare
from .perplexity import Perplexity as Perplexity
from .perplexity import perplexity as perplexity
from .perplexity import score as score
from .requests import Score as Score
