"""What bench/stage1.py and bench/stage2.py share: options, contestants in turns, the table, or a profile of one."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from side_by_side import Turns, Work, measure, save, table, take_turns

PASSED_ON = ("size", "tokens", "samples", "batch_size", "workers", "folder")
OPERATORS = 15


@dataclass(frozen=True)
class Bench:
    """A script's contestants, each a function of the options that prepares once and returns what to repeat.

    `prepare` makes what they all read, below `options.folder`; ratios are to `against`.
    """

    script: str
    about: str
    contestants: Mapping[str, Callable[[argparse.Namespace], Work]]
    against: str
    prepare: Callable[[argparse.Namespace], None]

    def main(self) -> int:
        """The command line."""
        options = self._options()
        if options.contestant:
            take_turns(self.contestants[options.contestant](options))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            options.folder = options.folder or folder
            self.prepare(options)
            if options.profile:
                print(profiled(self.contestants[options.profile](options)))
            else:
                self._compare(options)
        return 0

    def _compare(self, options: argparse.Namespace) -> None:
        facts = {name: getattr(options, name) for name in PASSED_ON}
        arguments = [f"--{name}={value}" for name, value in facts.items()]
        names = options.only.split(",")
        turns = measure(self.script, names, repeats=options.repeats, arguments=arguments)
        print(table(turns, against=self.against if self.against in names else names[0]))
        for one in turns:
            _tell_waiting(one)
        del facts["folder"]
        save(turns, options.output, **facts)

    def _options(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.about.splitlines()[0])
        parser.add_argument("--size", choices=["small", "wide", "full"], default="small")
        parser.add_argument(
            "--tokens", type=int, default=300, help="positions of a sample, vision tokens included"
        )
        parser.add_argument("--samples", type=int, default=16)
        parser.add_argument("--batch_size", type=int, default=8)
        parser.add_argument("--workers", type=int, default=2, help="that load data, in stage 2")
        parser.add_argument("--repeats", type=int, default=5)
        parser.add_argument("--only", default=",".join(self.contestants))
        parser.add_argument(
            "--output", type=Path, default=Path("runs/bench") / f"{Path(self.script).stem}.json"
        )
        parser.add_argument("--folder", help="where models and data are kept; default: a temporary one")
        parser.add_argument(
            "--profile", choices=list(self.contestants), help="instead: torch's profile of a turn of one"
        )
        parser.add_argument("--contestant", help=argparse.SUPPRESS)
        return parser.parse_args()


def _tell_waiting(turns: Turns) -> None:
    if "waiting" in turns.counted:
        print(f"{turns.name}: waiting for batches {100 * turns.counted['waiting']:.1f}% of the time")


def profiled(work: Work) -> str:
    """The operators that take the most time of their own in a second turn, by torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    work()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        work()
    by = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    return found.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=50)
