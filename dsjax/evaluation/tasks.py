"""lm-eval's tasks by name: found, run, and what they gave."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from dsjax.evaluation.engine_lm import EngineLM


def known_tasks(include: Path | None = None) -> TaskManager:
    """Lists lm-eval's tasks, and those of a folder; takes seconds.

    Raises:
        ValueError: there is no such folder.
    """
    if include is not None and not include.is_dir():
        raise ValueError(f"--include-path {include}: is no folder")
    return TaskManager(include_path=None if include is None else str(include))


def find_tasks(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """Finds tasks, groups and tags before anything heavy is loaded.

    Args:
        manager: knows the tasks.
        names: names, or patterns such as "mmlu_*"; or files of tasks (`.yaml`).

    Returns:
        The names.

    Raises:
        ValueError: a name that there is no task of; names the nearest.
    """
    found: list[str] = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not Path(name).is_file():
                raise ValueError(f"--tasks {name}: is no file")
            found.append(name)
            continue
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--tasks {name}: there is no such task{hint}")
        found += matches
    return list(dict.fromkeys(found))


def run_tasks(
    lm: EngineLM,
    manager: TaskManager,
    names: Sequence[str],
    *,
    output: Path | None = None,
    log_samples: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Runs tasks, as lm-eval's own command does.

    Args:
        lm: the model.
        manager: knows the tasks.
        names: what `find_tasks` gave.
        output: a folder for lm-eval's files of results and samples.
        log_samples: whether each question and answer is kept.
        **options: further arguments of lm-eval's `simple_evaluate`.

    Returns:
        lm-eval's results: "results", "configs", "versions" and so on.
    """
    tracker = None if output is None else EvaluationTracker(output_path=str(output))
    results = simple_evaluate(
        model=lm,
        tasks=list(names),
        task_manager=manager,
        evaluation_tracker=tracker,
        log_samples=log_samples,
        **options,
    )
    assert results is not None
    found: dict[str, Any] = dict(results)
    samples = found.pop("samples", None)
    if tracker is not None:
        tracker.save_results_aggregated(results=found, samples=samples)
        for name, some in (samples or {}).items():
            tracker.save_results_samples(task_name=name, samples=some)
    return found | ({"samples": samples} if samples is not None else {})
