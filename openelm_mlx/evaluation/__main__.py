"""`python -m openelm_mlx.evaluation`: lm-evaluation-harness's own command line, to which our model is known."""

from __future__ import annotations

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    from . import harness  # noqa: F401  (registers the model)

    cli_evaluate()
