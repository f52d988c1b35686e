"""The search for a faster run: its order, its bound and its ranking; what it plans is made up."""

import dataclasses

import pytest

from dsjax.config import TrainConfig
from dsjax.configs.runs import v2_lite_v5e_16
from dsjax.plan.search import Trial, ranked, search

RUN = v2_lite_v5e_16.config


def made_up_plan(run: TrainConfig) -> dict[str, float]:
    """Expert = 8 is faster, as is twice the batch and keeping attention; "none" does not fit."""
    if run.runtime.remat == "none":
        raise ValueError("the step does not fit a chip of v5e:4x4")
    speed = 100.0 * (2 if run.mesh.expert == 8 else 1) * (run.batch.size / RUN.batch.size) ** 0.5
    speed *= 1.1 if run.runtime.remat == "save_attention" else 1.0
    speed /= run.runtime.kernels.exchange_chunks
    return {
        "tokens_per_second_per_chip": speed,
        "modelled_mfu": speed / 1000,
        "peak_bytes": 2**33,
        "compile_seconds": 1.0,
    }


def test_a_search_goes_on_from_the_fastest_and_ranks_what_fits():
    trials = list(search(RUN, 16, 100, made_up_plan))
    assert trials[0] == Trial(RUN, (), made_up_plan(RUN))
    best = ranked(trials)[0]
    assert best.changes == (
        "mesh.fsdp=2",
        "mesh.expert=8",
        "runtime.remat=save_attention",
        "batch.size=64",
    )
    assert best.speed == pytest.approx(200 * 1.1 * 2**0.5)
    refused = [each for each in trials if each.figures is None]
    assert [each.refusal for each in refused] == ["the step does not fit a chip of v5e:4x4"]
    assert len(ranked(trials)) == len(trials) - 1
    assert "does not fit" in str(refused[0])
    assert "tokens/s a chip" in str(best)
    # All meshes of 16 chips whose experts divide, none twice, the nearest to the run's first.
    meshes = [each.run.mesh for each in trials if "remat" not in str(each.changes)]
    sizes = list(dict.fromkeys((mesh.fsdp, mesh.expert) for mesh in meshes))
    assert sizes == [(4, 4), (8, 2), (2, 8), (16, 1), (1, 16)]
    assert len({each.run for each in trials}) == len(trials)


def test_a_search_is_bounded_and_plans_only_what_it_is_asked_for():
    planned: list[TrainConfig] = []

    def plan(run: TrainConfig) -> dict[str, float]:
        planned.append(run)
        return made_up_plan(run)

    trials = search(RUN, 16, 3, plan)
    next(trials)
    assert len(planned) == 1  # each as it is asked for, since each takes minutes
    assert len(list(trials)) == 2
    assert len(planned) == 3


def test_a_model_without_experts_keeps_them_undivided():
    dense = dataclasses.replace(RUN.model, moe=None, num_dense_layers=RUN.model.num_layers)
    run = dataclasses.replace(
        RUN, model=dense, mesh=dataclasses.replace(RUN.mesh, fsdp=16, expert=1)
    )
    meshes = {each.run.mesh.expert for each in search(run, 16, 100, made_up_plan)}
    assert meshes == {1}
