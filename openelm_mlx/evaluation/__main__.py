"""`python -m openelm_mlx.evaluation`: lm-evaluation-harness's own command line, to which our model is known."""

from __future__ import annotations

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    from ..commands.output import error
    from ..errors import UserError
    from . import harness  # noqa: F401  (registers the model)

    try:
        cli_evaluate()
    except UserError as mistake:
        error("python -m openelm_mlx.evaluation", str(mistake))
        raise SystemExit(2) from None
