"""`alignkd` that writes down the samples that every step is made of: one line of JSON a step and process."""

from __future__ import annotations

import json
import os
from pathlib import Path

from watched import steps_of_training

import cli

FOLDER = "RECORDED_STEPS"  # the environment's variable that names where to

if __name__ == "__main__":
    with steps_of_training() as steps:
        try:
            cli.main()
        finally:
            file = Path(os.environ[FOLDER]) / f"{os.environ.get('RANK', 0)}.jsonl"
            file.write_text("".join(json.dumps(step) + "\n" for step in steps))
