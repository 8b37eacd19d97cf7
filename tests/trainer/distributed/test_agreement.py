"""Errors of one rank reach all; results stay or are gathered."""

import torch.distributed as dist

from configs.errors import UserError
from tests.ranks import run_ranks
from trainer.distributed.agreement import on_all, on_each, on_main


def _agree(rank: int, world: int) -> list[object]:
    group = dist.group.WORLD
    assert group is not None

    def fail_on_1() -> int:
        if rank == 1:
            raise UserError("shard 7 is damaged")
        return rank

    told: list[object] = [on_each(group, lambda: rank), on_all(group, lambda: 10 * rank), on_main(group, lambda: rank)]
    for collect in (on_each, on_all):
        try:
            collect(group, fail_on_1)
        except UserError as error:
            told.append(str(error))
    return [*told, on_main(group, fail_on_1)]


def test_what_fails_on_one_rank_fails_on_all() -> None:
    failures = ["shard 7 is damaged"] * 2
    assert run_ranks(_agree, 2) == [[rank, [0, 10], 0, *failures, 0] for rank in (0, 1)]
