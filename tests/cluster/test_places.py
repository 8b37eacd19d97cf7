"""Where ranks run."""

from cluster.places import Place, ranks_on_one_gpu, threads_of


def test_two_ranks_on_one_gpu_are_found() -> None:
    apart = [Place("a", {0}, "GPU-1"), Place("a", {0}, "GPU-2"), Place("b", {0}, "GPU-3")]
    assert ranks_on_one_gpu(apart) is None
    assert ranks_on_one_gpu([*apart, Place("a", {0}, "GPU-2")]) == (1, 3)
    assert ranks_on_one_gpu([Place("a", {0}), Place("a", {0})]) is None


def test_ranks_of_a_machine_share_its_cores() -> None:
    cores = {0, 1, 2, 3}
    places = [Place("a", cores), Place("b", cores), Place("a", cores), Place("b", {0, 1})]
    assert [threads_of(rank, places) for rank in range(4)] == [2, 3, 2, 1]
