"""What a model is worth: log-likelihoods, perplexity, two models beside each other, and the tasks of the papers."""

from __future__ import annotations

from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .likelihood import Perplexity as Perplexity
from .likelihood import perplexity as perplexity
from .likelihood import score as score
from .requests import Score as Score
