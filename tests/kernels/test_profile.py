"""What is known of a model is kept once, and goes with it."""

import gc
from threading import Barrier, Thread

from torch import nn

from specdec.kernels.model.profile import ModelProfile, all_profiles, profile_of


class Seconds(dict[int, float]):
    """A part."""


def test_a_profile_goes_with_its_model() -> None:
    model = nn.Linear(1, 1)
    profile_of(model).part(Seconds)[1] = 0.5
    assert profile_of(model).part(Seconds) == {1: 0.5}
    assert profile_of(nn.Linear(1, 1)).part(Seconds) == {}, "of another model"
    profile = profile_of(model)
    assert profile in all_profiles()
    del model
    gc.collect()
    assert profile not in all_profiles()


def test_threads_get_the_same_parts() -> None:
    model, found, barrier = nn.Linear(1, 1), list[tuple[ModelProfile, Seconds]](), Barrier(8)

    def ask() -> None:
        barrier.wait()
        found.append((profile_of(model), profile_of(model).part(Seconds)))

    threads = [Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(id(profile), id(part)) for profile, part in found}) == 1
