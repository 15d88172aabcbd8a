"""lm-eval's command line with the model `megagrow` and the task group `gstack` registered.

python -m megagrow.evaluation run --model megagrow --model_args checkpoint=PATH --tasks gstack
"""

import sys

from megagrow.errors import InputError


def main() -> None:
    """Run lm-eval's command line; an InputError is printed on one line, exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    import megagrow.evaluation.lm  # noqa: F401  (registers the model)

    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
