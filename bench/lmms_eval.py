"""Ask a checkpoint the same questions in lmms-eval and by `alignkd evaluate --suite`, and compare answer by answer.

python -m bench.lmms_eval                              the demo's teacher, in an environment below runs/
python -m bench.lmms_eval --model FOLDER --model ID    other checkpoints
python -m bench.lmms_eval --python BIN                 an environment that has lmms-eval and alignkd already

The environment needs torchvision, whose wheel on PyPI fits PyTorch's wheel on PyPI and no other. The questions ask
about drawn shapes, in the Parquet form of POPE, TextVQA and ScienceQA on the Hub. lmms-eval's own tasks read them:
only the path of the data and the longest answer are replaced. The exit code is 1 if an answer differs.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from PIL import Image, ImageDraw

from bench.tables import print_table
from pipeline.benchmarks.benchmark import Answered, Benchmark
from pipeline.benchmarks.suite import BENCHMARKS

ENVIRONMENT = Path("runs/bench_environments/lmms_eval")
OUTPUT = Path("runs/lmms_eval")
# lmms-eval's task -> ours, the folder and the split of its Parquet file, and the metric of a sample.
TASKS = {
    "pope": ("pope", "pope/data", "test", "pope_accuracy"),
    "textvqa_val": ("textvqa-no-ocr", "textvqa/data", "validation", "exact_match"),
    "scienceqa_img": ("scienceqa", "scienceqa/ScienceQA-IMG", "test", "exact_match"),
}
SHAPES = [("circle", "red"), ("rectangle", "blue"), ("triangle", "green"), ("circle", "gray")]
SHOWN = 20  # characters of an answer
app = typer.Typer(add_completion=False)


def environment() -> Path:
    """The interpreter of a virtual environment with lmms-eval and this checkout, made if it is not there."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        # `===`: not a build for CPUs alone, which a machine's own index may have; torchvision would not fit it.
        wanted = ["torch===2.13.0", "torchvision===0.28.0", "--editable", ".[datasets,lmms-eval]"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        (ENVIRONMENT / "installed").touch()
    return python


def drawn(shape: str, colour: str, size: tuple[int, int]) -> dict[str, Any]:
    """A picture of a shape, as the Hub's files hold it."""
    picture = Image.new("RGB", size, "white")
    (width, height), draw, file = size, ImageDraw.Draw(picture), io.BytesIO()
    box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
    if shape == "triangle":
        draw.polygon([(width // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    else:
        getattr(draw, {"circle": "ellipse", "rectangle": "rectangle"}[shape])(box, fill=colour)
    picture.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{shape}.png"}


def rows_of(task: str) -> list[dict[str, Any]]:
    """The questions of a task about every picture, two a picture; sizes differ, so that padding and cropping do."""
    rows = []
    for number, (shape, colour) in enumerate(SHAPES):
        image = drawn(shape, colour, (64 + 16 * number, 64))
        for turn in range(2):
            name = 2 * number + turn
            rows.append({**_row(task, name, shape, colour, turn), "image": image})
    return rows


def _row(task: str, number: int, shape: str, colour: str, turn: int) -> dict[str, Any]:
    if task == "pope":
        asked = shape if turn else SHAPES[(number // 2 + 1) % len(SHAPES)][0]
        answer = "yes" if asked == shape else "no"
        category = ("adversarial", "popular", "random")[number % 3]
        question = f"Is there a {asked} in the image?"
        return {"id": str(number), "question_id": str(number), "question": question, "answer": answer,
                "image_source": f"picture {number // 2}", "category": category}  # fmt: skip
    question = "what shape is in the image?" if turn else "what color is the shape?"
    right = shape if turn else colour
    if task == "textvqa_val":
        return {"image_id": f"picture {number // 2}", "question_id": number, "question": question,
                "answers": [right] * 7 + ["yes"] * 3, "ocr_tokens": []}  # fmt: skip
    choices = [right, "yes", "zebra"][:: -1 if turn else 1]
    return {"question": question, "choices": choices, "answer": choices.index(right), "hint": "Look." * turn}


def write_data(data: Path) -> None:
    """Write every task's questions in the Hub's form; `datasets` marks the column of images."""
    from datasets import Dataset
    from datasets import Image as ImageColumn

    for task, (_, folder, split, _) in TASKS.items():
        file = data / folder / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows_of(task)).cast_column("image", ImageColumn()).to_parquet(file)


def write_tasks(folder: Path, data: Path, installed: Path) -> None:
    """Write lmms-eval's own tasks with another path of the data, and with the suite's longest answer."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, (ours, files, _, _) in TASKS.items():
        [own] = installed.glob(f"tasks/*/{task}.yaml")
        changed = {
            "include": str(own),
            "task": f"{task}_drawn",
            "dataset_path": str((data / files).resolve()),
            "dataset_name": None,
            "dataset_kwargs": {},
            "generation_kwargs": {"max_new_tokens": BENCHMARKS[ours].max_new_tokens, "do_sample": False},
        }
        (folder / f"{task}_drawn.yaml").write_text(yaml.safe_dump(changed))


def run(python: Path, *arguments: object, **variables: str) -> str:
    """Run a module in the environment without network and GPU; its output."""
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = [str(python), *map(str, arguments)]
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout


def samples_of(python: Path, model: str, output: Path, tasks: Path) -> dict[str, list[dict[str, Any]]]:
    """Run lmms-eval; the samples that it logged, by task, in the order of the data."""
    names = ",".join(f"{task}_drawn" for task in TASKS)
    flags = ["--model", "alignkd", "--model_args", f"pretrained={model}", "--batch_size", 3, "--log_samples"]
    places = ["--tasks", names, "--include_path", tasks, "--output_path", output]
    said = run(python, "-m", "lmms_eval", *flags, *places, HF_HOME=str(output.resolve() / "cache"))
    print("\n".join(line for line in said.splitlines() if line.startswith("|")))  # its table of scores
    return {task: _logged(output, f"*_samples_{task}_drawn.jsonl") for task in TASKS}


def _logged(output: Path, name: str) -> list[dict[str, Any]]:
    if not (files := sorted(output.rglob(name))):
        sys.exit(f"{output}: lmms-eval wrote no {name}; its messages above say why (its exit code is 0)")
    return sorted(map(json.loads, files[-1].read_text().splitlines()), key=lambda sample: sample["doc_id"])


def answers_of(python: Path, model: str, output: Path, data: Path) -> dict[str, list[str]]:
    """Run `alignkd evaluate --suite`; its answers by task, in the order of the data."""
    only = ",".join(ours for ours, *_ in TASKS.values())
    flags = ["--suite", "align-kd", "--data", data, "--only", only, "--model", model, "--output", output]
    run(python, "-m", "cli", "evaluate", *flags)
    found = {}
    for task, (ours, *_) in TASKS.items():
        [file] = output.rglob(f"{ours}.jsonl")
        _, *rows = map(json.loads, file.read_text().splitlines())
        found[task] = [row["answer"] for row in rows]
    return found


def shortened(answer: str) -> str:
    """An answer in one short cell."""
    return repr(answer if len(answer) <= SHOWN else answer[:SHOWN] + "...")


def score_of_one(benchmark: Benchmark, answered: Answered) -> float:
    """Our score of one question: POPE counts hits, the others sum scores."""
    [counted] = benchmark.scorer.count([answered])
    return (
        counted.counts["score"] if "score" in counted.counts else float(next(iter(counted.counts))[-2] == "T")
    )


def compare(
    task: str, data: Path, samples: Sequence[Mapping[str, Any]], answers: Sequence[str]
) -> list[dict[str, Any]]:
    """A line for each question: both answers, and both scores."""
    ours, _, _, metric = TASKS[task]
    benchmark = BENCHMARKS[ours]
    folder = benchmark.folder(data)
    assert folder is not None
    rows = []
    for question, sample, answer in zip(benchmark.read(folder), samples, answers, strict=True):
        theirs, score = sample["filtered_resps"], sample[metric]
        rows.append({
            task: question.text.splitlines()[-4 if task == "scienceqa_img" else 0],
            "right": str(question.reference if isinstance(question.reference, str) else question.reference[0]),
            "in lmms-eval": shortened(theirs),
            "by --suite": shortened(answer),
            "equal": theirs == answer,
            "their score": float(score["score"] if isinstance(score, dict) else score),
            "our score": score_of_one(benchmark, Answered(question, answer)),
        })  # fmt: skip
    return rows


@app.command(help=__doc__.splitlines()[0])
def main(
    model: Annotated[list[str] | None, typer.Option()] = None,
    python: Path | None = None,
    output: Path = OUTPUT,
) -> None:
    python = python or environment()
    found = run(python, "-c", "import importlib.util as u; print(u.find_spec('lmms_eval').origin)")
    data, tasks, rows = output / "data", output / "tasks", []
    write_data(data)
    write_tasks(tasks, data, Path(found.strip()).parent)
    for number, name in enumerate(model or ["assets/demo_teacher"]):
        folder = output / str(number)
        samples = samples_of(python, name, folder / "lmms_eval", tasks)
        answers = answers_of(python, name, folder / "suite", data)
        for task in TASKS:
            rows += (table := compare(task, data, samples[task], answers[task]))
            print_table(table)
    equal, alike = (
        sum(row["equal"] for row in rows),
        sum(row["their score"] == row["our score"] for row in rows),
    )
    print(f"{len(rows)} questions: {equal} equal answers, {alike} equal scores")
    raise typer.Exit(equal < len(rows))


if __name__ == "__main__":
    app()
