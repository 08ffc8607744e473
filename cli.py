"""The command line: its commands, and errors as one sentence. Results on stdout, progress and errors on stderr."""

from __future__ import annotations

import sys
from typing import Any

import typer

from pipeline.commands import experiments, inspect, reshape, share, stages, store

EXIT_CODES = """\
Exit codes: 0 done; 1 a check failed or the work could not be done; 2 a wrong command line or config;
3 the store's fingerprint is not what the config asks for; 75 SIGTERM stopped the training, a checkpoint is
written and the same command with train.resume_from_checkpoint=true goes on; 130 interrupted.
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil a vision-language model in two offline stages: teacher-cache, then distill.\n\n"
    + EXIT_CODES,
)

for command in (
    stages.pack,
    stages.teacher_cache,
    stages.distill,
    stages.evaluate,
    experiments.sweep,
    experiments.report,
    store.info,
    store.verify,
    store.check,
    store.plan,
    share.push,
    share.pull,
    reshape.merge,
    reshape.gc,
):
    app.command()(command)
app.command("slice")(reshape.slice_)
app.add_typer(inspect.app, name="inspect")


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; what goes wrong outside the program is one sentence on stderr and an exit code."""
    from cache import CacheError, FingerprintMismatch
    from pipeline.errors import ConfigError, PipelineError, TrainingStopped

    try:
        return app(arguments)
    except TrainingStopped as stopped:
        code, message = 75, str(stopped)
    except FingerprintMismatch as error:
        code, message = 3, str(error)
    except ConfigError as error:
        code, message = 2, str(error)
    except (CacheError, PipelineError) as error:
        code, message = 1, str(error)
    except OSError as error:
        # Files, disks and networks: the system's own words name the file and the trouble.
        code, message = 1, str(error)
    print(f"alignkd: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
