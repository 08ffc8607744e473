"""The command line. Results go to stdout; progress and errors, one sentence each, go to stderr."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import typer
import typer.core

from pipeline.commands import (
    bench_model,
    evaluate,
    experiments,
    export,
    inspect,
    models,
    share,
    stages,
    store,
    twig,
)

EXIT_CODES = """\
Exit codes: 0 done; 1 a check failed or the work could not be done; 2 a wrong command line or config;
3 the store's fingerprint differs from what the config asks for; 75 SIGTERM stopped the training after a checkpoint,
from which the same command with train.resume_from_checkpoint=true resumes; 130 interrupted by Ctrl-C, also with a
checkpoint.
"""

COMMANDS = {
    "Stages": (
        stages.init,
        stages.pack,
        models.make_student,
        stages.teacher_cache,
        stages.distill,
        evaluate.evaluate,
    ),
    "Experiments": (experiments.sweep, experiments.report),
    "Store": (store.plan, store.info, store.verify, store.check, store.gc),
    "Sharing": (share.push, share.pull, share.slice_, share.merge),
    "Phones": (bench_model.bench_model,),
}


class CommandGroups(typer.core.TyperGroup):
    """Lists the commands in groups, each with the whole first line of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = {heading: [_name(command) for command in group] for heading, group in COMMANDS.items()}
        names["Experiments"].append("inspect")
        names["Stages"].insert(0, "models")
        names["Phones"].insert(0, "export")
        names["Twigs"] = ["twig"]
        for heading, group in names.items():
            with formatter.section(heading):
                formatter.write_dl([(n, self.commands[n].get_short_help_str(limit=1000)) for n in group])


def _name(command: Callable[..., Any]) -> str:
    return command.__name__.strip("_").replace("_", "-")


app = typer.Typer(
    cls=CommandGroups,
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil a vision-language model in two offline stages: teacher-cache, then distill.\n\n"
    + EXIT_CODES,
)

for commands in COMMANDS.values():
    for command in commands:
        app.command(_name(command))(command)
app.add_typer(inspect.app, name="inspect")
app.add_typer(models.app, name="models")
app.add_typer(export.app, name="export")
app.add_typer(twig.app, name="twig")


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Also show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print versions and stop.")] = False,
) -> None:
    """Handle the options that stand before a command's name."""
    if version:
        print(_versions())
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)
    context.obj.debug = debug


def _versions() -> str:
    """Return the versions of alignkd, of Python and of the packages that decide numbers."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ", ".join(f"{name} {of(name)}" for name in ("torch", "transformers", "zarr"))
    return f"alignkd {of('alignkd')} (Python {platform.python_version()}, {packages})"


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. Expected errors print one sentence to stderr and set the exit code."""
    from cache import CacheError, FingerprintMismatch
    from pipeline.errors import ConfigError, PipelineError, TrainingStopped

    # In --option=~/file, no shell expands the ~.
    given = [
        re.sub(r"^(--[^=]*=)(~.*)$", lambda found: found[1] + os.path.expanduser(found[2]), argument)
        for argument in (sys.argv[1:] if arguments is None else arguments)
    ]
    asked = SimpleNamespace(debug=False)
    try:
        return app(given, obj=asked)
    except (TrainingStopped, CacheError, PipelineError, OSError) as error:
        if asked.debug:
            traceback.print_exc()
        print(f"alignkd: {error}", file=sys.stderr)
        code = 3 if isinstance(error, FingerprintMismatch) else 2 if isinstance(error, ConfigError) else 1
        if isinstance(error, TrainingStopped):
            code = error.exit_code
    # Not in the block above: the exit would keep the error, and the error the training's worker processes.
    sys.exit(code)


if __name__ == "__main__":
    main()
