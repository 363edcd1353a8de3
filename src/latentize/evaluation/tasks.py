"""Tasks of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), of a model and its source."""

from __future__ import annotations

import difflib
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentize.errors import DataError, OptionError
from latentize.evaluation.paired import DRAWS, Aggregate, Interval, around, of_difference, of_score
from latentize.evaluation.predict import longest_context
from latentize.modeling.fused import fuse
from latentize.modeling.load import load_model
from latentize.paths import expanded
from latentize.progress import Progress, silent
from latentize.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["TaskRow", "require", "rows_of", "run_tasks"]

_OPTION = "--tasks"
Aggregates = Mapping[str, Mapping[str, Aggregate]]
# Tasks draw nothing of their own but examples before a question, from lm-eval's usual seed.
_SEED = 1234


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task.

    Attributes:
        task: Name; of a group, that of the group.
        version: Of the task, as lm-eval has it.
        metric: With the filter of the answers, if it is not ``none``.
        higher_is_better: Which way is up; ``None`` if lm-eval does not say.
        examples: How many were asked.
        value, low, high: The model's score and its 95 % interval; no interval where neither lm-eval has a standard
            error nor the metric can be computed again on draws of the examples.
        reference_value, reference_low, reference_high: The source's.
        difference, difference_low, difference_high: The model's minus the source's; the interval from the two models'
            results on each example, and so absent for groups.
    """

    task: str
    version: str
    metric: str
    higher_is_better: bool | None
    examples: int
    value: float
    low: float | None
    high: float | None
    reference_value: float | None = None
    reference_low: float | None = None
    reference_high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


def require() -> None:
    """Raises:
    OptionError: lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise OptionError(
            "lm-eval is not installed", where=_OPTION, fix="pip install 'latentize[tasks]', or 'lm-eval[hf]'"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks on how it was called, and off a terminal without its bars, which are long there."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        log.setLevel(level)


def _manager(names: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """What knows all tasks that are named; lm-eval's own, thousands of files, only if one of them may be."""
    from lm_eval.tasks import TaskManager

    include_path = None if include_path is None else expanded(include_path)
    if include_path is not None and not include_path.is_dir():
        raise OptionError("no such folder", where=f"--include-path {include_path}", fix="a folder with .yaml of tasks")
    paths = [_file(name) for name in names if _is_path(name)]
    folders: list[str | Path] = [path if path.is_dir() else path.parent for path in paths]
    folders += [] if include_path is None else [include_path.resolve()]
    places = list(dict.fromkeys(folders))
    if places:
        own = TaskManager(include_path=places, include_defaults=False)
        # A group of the user's that is named may have tasks of lm-eval.
        if all(_is_path(name) or name in own.all_subtasks for name in names):
            return own
    return TaskManager(include_path=places or None, include_defaults=True)


def _is_path(name: str) -> bool:
    """No name of a task has a slash."""
    return name.endswith(".yaml") or name.startswith("~") or "/" in name


def _file(name: str) -> Path:
    path = expanded(name)
    if not path.exists():
        raise OptionError("no such task file", where=f"{_OPTION} {name}", fix="the .yaml of a task, or its folder")
    return path.resolve()


def _names_in(path: Path, manager: TaskManager) -> list[str]:
    """Tasks and groups of a file, or tasks of all files in a folder."""
    index = manager.task_index
    places = {name: Path(entry.yaml_path).resolve() for name, entry in index.items() if entry.yaml_path}
    if path.is_dir():
        found = [name for name in manager.all_subtasks if name in places and path in places[name].parents]
    else:
        found = [name for name, place in places.items() if place == path]
    if not found:
        raise OptionError(
            "there is no task in it", where=f"{_OPTION} {path}", fix="YAML with `task: NAME`, as lm-eval reads it"
        )
    return found


def _beside(config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """``dataset_kwargs`` with the data files that lie beside the task's; lm-eval looks in the current folder."""
    options = config.get("dataset_kwargs") or {}
    files = options.get("data_files")
    if files is None:
        return None

    def found(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {split: found(part) for split, part in value.items()}
        if isinstance(value, list):
            return [found(part) for part in value]
        return str(folder / value) if (folder / value).is_file() else value

    return {**options, "data_files": found(files)}


def _load(names: Sequence[str], manager: TaskManager) -> list[Any]:
    """Tasks and groups with their data, in the order given.

    Raises:
        OptionError: an unknown name, a file that is no task, or something that the task wants is not installed.
        DataError: its data is not here.
    """
    wanted: list[str] = []
    for name in names:
        wanted += _names_in(_file(name), manager) if _is_path(name) else [name]
    found: list[Any] = []
    for name in dict.fromkeys(wanted):
        entry = manager.task_index.get(name)
        if entry is None:
            known = sorted((other for other in manager.all_tasks if name.lower() in other.lower()), key=len)[:5]
            known = known or difflib.get_close_matches(name, manager.all_tasks, 5)
            near = f"did you mean {', '.join(known)}? " if known else ""
            fix = near + "`lm-eval ls tasks` lists them; one of your own is given as the path of its .yaml"
            raise OptionError(f"lm-eval knows no task '{name}'", where=_OPTION, fix=fix)
        options = _beside(entry.cfg or {}, Path(entry.yaml_path).parent) if entry.yaml_path else None
        spec: Any = name
        if options is not None and name in manager.all_subtasks:
            spec = {"group": f"{name}, its data", "task": [{"task": name, "dataset_kwargs": options}]}
        loaded = _loaded(name, spec, manager)
        # A group scores as one; the one that only carries an option does not.
        found += [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    return found


def _loaded(name: str, spec: Any, manager: TaskManager) -> dict[str, Any]:
    try:
        return dict(manager.load([spec]))
    except ImportError as error:
        raise OptionError(
            f"the task wants something that is not installed: {_first(error)}",
            where=f"{_OPTION} {name}",
            fix="pip install 'lm-eval[longbench]'" if "longbench" in name else "install what it names",
        ) from error
    except Exception as error:
        # Data sets raise what they like: of the network, the file system, or the format.
        raise DataError(
            f"the task cannot be loaded with its data: {_first(error)}",
            where=f"{_OPTION} {name}",
            fix="that of lm-eval's own tasks is on the hub: check the network, or carry ~/.cache/huggingface over from "
            "a machine that has fetched it; a task of your own reads files with `dataset_path: json` and "
            "`dataset_kwargs: {data_files: …}`",
        ) from error


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _answered(
    folder: Path, tasks: list[Any], manager: TaskManager, dtype: torch.dtype, device: str, options: dict[str, Any]
) -> Any:
    """What lm-eval returns for the model in a folder."""
    import lm_eval
    from lm_eval.models import huggingface

    model = fuse(load_model(folder, dtype=dtype, device=device))
    # Their decorators hide what they take.
    wrap: Any = huggingface.HFLM
    run: Any = lm_eval.simple_evaluate
    batch_size = options["batch_size"]
    lm = wrap(
        pretrained=model,
        tokenizer=load_tokenizer(folder),
        batch_size=batch_size,
        max_length=longest_context(model),
    )
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), _SEED)
    shared = {name: options[name] for name in ("limit", "num_fewshot")}
    # Without a manager it reads the thousands of files of lm-eval's own tasks once more.
    return run(lm, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=DRAWS, **shared, **seeds)


def _scores(found: Mapping[str, Any], task: str) -> Iterator[tuple[str, str, float, float | None]]:
    """Metric, filter, value and standard error of each score of a task or group."""
    entries = found["results"][task]
    for key, value in entries.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = entries.get(f"{metric}_stderr,{kind}")
            yield metric, kind, float(value), error if isinstance(error, int | float) else None


def _samples(found: Mapping[str, Any], task: str, metric: str, kind: str) -> list[Any]:
    """What each example gave, in the order of the examples; of a group nothing."""
    kept = [s for s in (found.get("samples") or {}).get(task, ()) if s["filter"] == kind and metric in s]
    return [s[metric] for s in sorted(kept, key=lambda s: s["doc_id"])]


def _count(found: Mapping[str, Any], task: str) -> int:
    """Examples of a task, or of all tasks of a group."""
    below = found.get("group_subtasks", {}).get(task)
    if below:
        return sum(_count(found, name) for name in below)
    return found["n-samples"][task]["effective"]


def rows_of(found: Mapping[str, Any], expected: Mapping[str, Any] | None, aggregates: Aggregates) -> list[TaskRow]:
    """What lm-eval returned, as rows; groups first.

    Args:
        found, expected: What ``simple_evaluate`` returned of the model and of the source, on the same tasks.
        aggregates: Of each task, by metric.
    """
    names = [*found.get("groups", {}), *(name for name in found["results"] if name not in found.get("groups", {}))]
    rows = []
    for task in names:
        others = {} if expected is None else {(m, k): (v, e) for m, k, v, e in _scores(expected, task)}
        for metric, kind, value, error in _scores(found, task):
            aggregate = aggregates.get(task, {}).get(metric)
            samples = _samples(found, task, metric, kind)
            row: dict[str, Any] = {"value": value, **_ends("", _interval(value, error, samples, aggregate))}
            if expected is not None:
                theirs = _samples(expected, task, metric, kind)
                other, other_error = others[metric, kind]
                row |= {"reference_value": other, "difference": value - other}
                row |= _ends("reference_", _interval(other, other_error, theirs, aggregate))
                if aggregate is not None:
                    mean = aggregate.__name__ == "mean"
                    row |= _ends("difference_", of_difference(samples, theirs, aggregate, mean=mean))
            label = metric if kind == "none" else f"{metric}, {kind}"
            up = found.get("higher_is_better", {}).get(task, {}).get(metric)
            edition, count = str(found.get("versions", {}).get(task, "")), _count(found, task)
            rows.append(TaskRow(task, edition, label, up, count, **{"low": None, "high": None, **row}))
    return rows


def _interval(value: float, error: float | None, samples: list[Any], aggregate: Any) -> Interval | None:
    """lm-eval's, where it has a standard error; else by draws of the examples."""
    return around(value, error) or (None if aggregate is None else of_score(samples, aggregate))


def _ends(prefix: str, interval: Interval | None) -> dict[str, float]:
    return {} if interval is None else {f"{prefix}low": interval.low, f"{prefix}high": interval.high}


def run_tasks(
    model: Path,
    reference: Path | None = None,
    *,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run tasks of lm-eval on a model, and on its source beside it.

    One of them at a time is in memory. Models of the native format are loaded as any other: lm-eval is handed the
    model, not its name.

    Args:
        model, reference: Folders.
        tasks: Names of tasks, groups or tags that lm-eval knows, paths of tasks' YAML, or folders of them.
        include_path: A folder more whose tasks have names.
        limit: Examples of each task, at most.
        num_fewshot: Solved examples before each question, where the task leaves that open.
        batch_size: Requests at a time.
        dtype: Precision to run in.
        device: Where.
        progress: Told after each model.

    Returns:
        ``lm_eval``, its version; ``limit``; ``num_fewshot``; ``draws``, of each bootstrap; and ``rows``, as
        :class:`TaskRow`.

    Raises:
        OptionError: lm-eval is not installed, or knows no such task.
        DataError: a task's data is not here and cannot be had.
        CheckpointError: a model cannot be loaded.
    """
    require()
    options = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    # Before any model is: most mistakes are made here.
    with _quiet():
        manager = _manager(tasks, include_path)
        loaded = _load(tasks, manager)
    found = []
    folders = [model] if reference is None else [model, reference]
    for number, folder in enumerate(folders, 1):
        with _quiet():
            found.append(_answered(folder, loaded, manager, dtype, device, options))
        progress("running tasks", number, len(folders), folder.name)
    aggregates = {name: task.aggregation() for name, task in _leaves(loaded)}
    rows = rows_of(found[0], found[1] if reference is not None else None, aggregates)
    settings = {"lm_eval": version("lm_eval"), "limit": limit, "num_fewshot": num_fewshot, "draws": DRAWS}
    return {**settings, "rows": [asdict(row) for row in rows]}


def _leaves(loaded: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for item in loaded:
        for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
            yield task.task_name, task
