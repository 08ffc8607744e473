"""Twigs: twig train, twig evaluate."""

from __future__ import annotations

import typer

from pipeline.commands.options import ConfigFile, Overrides, Overwrite, PrintConfig, load, say
from pipeline.commands.twig_evaluate import evaluate

app = typer.Typer(
    no_args_is_help=True, help="Train and measure a twig, by which a base model answers faster."
)
app.command()(evaluate)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    overwrite: Overwrite = False,
) -> None:
    """Train the config's twig from the store of its base's hidden states; no base is loaded.

    The twig lies in output_dir/twig, beside checkpoints and log. Ctrl-C and SIGTERM leave a checkpoint. An earlier
    training is only replaced with --overwrite.
    """
    settings = load(config, overrides, print_config)
    from pathlib import Path

    from pipeline.distill.training.processes import connected, is_first_process
    from pipeline.twig.training.summary import describe_training
    from pipeline.twig.training.train import train_twig

    folder = Path(settings.output_dir)
    with connected():
        if is_first_process():
            say(f"twig: {', '.join(settings.losses.active())} -> {folder}")
        made = train_twig(settings, folder, overwrite=overwrite)
    if is_first_process():
        print(describe_training(settings, made))
