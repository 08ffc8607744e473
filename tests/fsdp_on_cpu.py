"""`alignkd` with FSDP2 on CPUs: accelerate shards on accelerators alone, torch's `fully_shard` does on any device."""

from __future__ import annotations

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

import cli
from pipeline.distill.training.trainer import DistillTrainer

_initialise = PartialState.__init__


def _as_if_on_gpus(self, *arguments, **named):
    _initialise(self, *arguments, **named)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = _as_if_on_gpus

_save_trained = DistillTrainer.save_trained


def _tell_and_save(trainer, folder):
    modules = [module for module in trainer.distiller.modules() if isinstance(module, FSDPModule)]
    trained = trainer.trained.of(trainer.distiller)
    layers = trained.layers if trainer.trained.part == "twig" else trained.model.layers
    weight = layers[0].self_attn.q_proj.weight
    rows = f"{weight.to_local().shape[0]} of {weight.shape[0]}"
    print(f"sharded modules: {len(modules)}, rows of a matrix: {rows}", file=sys.stderr)
    return _save_trained(trainer, folder)


DistillTrainer.save_trained = _tell_and_save

if __name__ == "__main__":
    cli.main()
