"""Stage 2: train the student from one store or several, with transformers.Trainer, and without the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments, set_seed

from pipeline.config.config import Config
from pipeline.config.twig_settings import check_has_student
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.model.distiller import Distiller
from pipeline.distill.parts import build_distiller, load_student, open_dataset, open_held_out
from pipeline.distill.run import Job, train, training_arguments
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.distill.training.trained import TrainedStudent
from pipeline.distill.training.trainer import DistillTrainer
from pipeline.errors import building


def train_student(
    config: Config, folder: Path, *, overwrite: bool = False, callbacks: Sequence[TrainerCallback] = ()
) -> Path:
    """Train one student into `folder` and return the folder of its model, in its family's own layout, without heads.

    A finished run of the same config, store and first weights is left as it is. Another finished run is replaced only
    with `overwrite` (see `start_of`). Samples that the stores lack are reported on stderr. `callbacks` are added to
    the Trainer's. Raises `FingerprintMismatch`, before any weight is opened, if a store is not what this config would
    have cached, and `TrainingStopped` after a signal.
    """
    check_has_student(config)
    dataset, _ = open_dataset(config)
    held_out = open_held_out(config, dataset)
    identity = RunIdentity.of(config, dataset, held_out)
    return train(_job(config, dataset, held_out, identity), folder, overwrite=overwrite, callbacks=callbacks)


def build_trainer(
    config: Config,
    folder: Path,
    dataset: JoinedDataset,
    *,
    identity: RunIdentity,
    arguments: TrainingArguments | None = None,
    held_out: JoinedDataset | None = None,
) -> DistillTrainer:
    """Build student, heads, optimizer and data from the seed: runs that differ only in losses have one data order.

    The losses of `held_out` are logged by `train.eval_strategy`. `identity` is written into the run's checkpoints.
    """
    job = _job(config, dataset, held_out, identity)
    return job.trainer(arguments or training_arguments(config, folder))


def _job(
    config: Config, dataset: JoinedDataset, held_out: JoinedDataset | None, identity: RunIdentity
) -> Job:
    def build(arguments: TrainingArguments) -> Distiller:
        with building(
            f"student.model {config.student.model}", then="correct the `student` section, or train.seed"
        ):
            set_seed(arguments.seed)
            student = load_student(config, *dataset.stores.opened)
        return build_distiller(config, student, dataset, held_out=held_out, device=arguments.device)

    return Job(config, dataset, held_out, identity, TrainedStudent(config), build)
