"""`dsjax eval`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from dsjax.cli.arguments import CacheDType, Kernels, ModelDType, Quantize, Step, Verbose
from dsjax.config import EngineConfig, KernelConfig
from dsjax.config.load import override


def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Model folder, training run or Hub name.")],
    tasks: Annotated[
        str, typer.Option(help="lm-eval's tasks, groups, patterns or YAML files, by commas.")
    ],
    include_path: Annotated[Path | None, typer.Option(help="Folder of further tasks.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; else the task's.", min=0)
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="First so many questions of a task, or a share below 1.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Questions as a user's messages.")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="System message.")] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Of texts: do_sample=true,temperature=0.7,max_gen_toks=512")
    ] = None,
    add_bos: Annotated[bool, typer.Option(help="Begin texts with BOS.")] = True,
    output: Annotated[
        Path | None, typer.Option(help="Folder for lm-eval's files of results.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Keep each question and answer; with --output.")
    ] = False,
    use_cache: Annotated[
        Path | None, typer.Option(help="Keeps answers here (SQLite): a second run goes on.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the examples' choice and bootstrapping.")] = 0,
    max_batch: Annotated[int, typer.Option(help="Questions at once.")] = 64,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of question and answer; else the model's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON, no table.")] = False,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="For tasks that run answers as code.")
    ] = False,
    step: Step = None,
    dtype: ModelDType = "bfloat16",
    quantize: Quantize = None,
    latent_dtype: CacheDType = None,
    kernels: Kernels = None,
    verbose: Verbose = False,
) -> None:
    """Runs lm-eval's tasks over the engine."""
    named = override(KernelConfig(), kernels or ())
    if log_samples and output is None:
        raise ValueError("--log-samples needs --output: samples are written there")
    # A request has room for its last token, and prefixes are shared; nothing is compiled before it
    # is needed, as no user waits for one answer.
    config = EngineConfig(max_batch=max_batch, max_length=max_length, warm_up=False)
    try:
        from dsjax.evaluation.engine_lm import EngineLM
        from dsjax.evaluation.tasks import find_tasks, known_tasks, run_tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "dsjax":
            raise
        raise ImportError(
            f"dsjax eval needs lm-eval ({error.name} is missing): pip install 'dsjax[eval]'"
        ) from None
    from lm_eval.utils import handle_non_serializable, make_table

    for name in ("lm_eval", "datasets", "evaluate", "fsspec", "filelock"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    if not wanted:
        raise ValueError("--tasks: names no task")
    manager = known_tasks(include_path)
    names = find_tasks(manager, wanted)
    from dsjax.api import load
    from dsjax.engine import Engine

    model = load(
        checkpoint,
        dtype=dtype,
        kernels=named,
        step=step,
        quantize=quantize,
        latent_dtype=latent_dtype,
    )
    if model.tokenizer is None:
        raise ValueError(f"{model.source}: holds no tokenizer.json, so there is no text to score")
    options: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "system_instruction": system_instruction,
        "gen_kwargs": gen_kwargs,
        "use_cache": None if use_cache is None else str(use_cache),
        "confirm_run_unsafe_code": confirm_run_unsafe_code,
        "random_seed": seed,
        "numpy_random_seed": seed,
        "fewshot_random_seed": seed,
    }
    ends = model.generation_defaults.eos_ids
    with Engine(model, model.tokenizer, config, end_ids=ends) as engine:
        lm = EngineLM(engine, name=checkpoint, add_bos=add_bos)
        results = run_tasks(lm, manager, names, output=output, log_samples=log_samples, **options)
    if as_json:
        kept = {name: value for name, value in results.items() if name != "samples"}
        print(json.dumps(kept, default=handle_non_serializable, ensure_ascii=False, indent=2))
        return
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
