"""Drafters: prompt look-up against a brute-force search, a draft model against a fresh one."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_mlx.decoder.drafts import MAX_LAG, SIZES, DraftModel, PromptLookup, Rate
from magistral_mlx.decoder.engine import decode
from magistral_mlx.decoder.prefix import Prefix
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from tests import models
from tests.decoder.test_cache import feed

FEW_IDS = st.lists(st.integers(0, 2), max_size=60)


def propose(drafter: PromptLookup | DraftModel, most: int = 7) -> list[int] | None:
    found = drafter.propose(most)
    return None if found is None else found.tolist()  # type: ignore[return-value]


def brute_force(ids: Sequence[int], most: int) -> list[int] | None:
    """The last index at which the longest n-gram at the end occurred before, by trying every index."""
    for size in SIZES:
        for place in range(len(ids) - 1, size - 1, -1):
            if list(ids[place - size : place]) == list(ids[-size:]):
                followed = list(ids)
                for at in range(most):
                    followed.append(followed[place + at])
                return followed[len(ids) :]
    return None


@given(prompt=FEW_IDS, reply=FEW_IDS, most=st.integers(1, 7))
def test_lookup_drafts_what_followed_the_longest_match(prompt: list[int], reply: list[int], most: int):
    drafter, ids = PromptLookup(prompt), [*prompt]
    for id_ in [None, *reply]:
        if id_ is not None:
            drafter.extend([id_])
            ids.append(id_)
        assert propose(drafter, most) == brute_force(ids, most)
        assert (drafter.chance() > 0) == (brute_force(ids, most) is not None)


@given(prompt=FEW_IDS, parts=st.lists(FEW_IDS, max_size=4))
def test_extending_by_several_ids_equals_one_by_one(prompt: list[int], parts: list[list[int]]):
    one, several = PromptLookup(prompt), PromptLookup(prompt)
    for part in parts:
        several.extend(part)
        for id_ in part:
            one.extend([id_])
    assert propose(one) == propose(several)
    assert one.chance() == several.chance()


@given(prompt=FEW_IDS, rewound=FEW_IDS, reply=FEW_IDS)
def test_lookup_after_rewind_drafts_only_known_ids(prompt: list[int], rewound: list[int], reply: list[int]):
    """Ids that were taken back may be drafted, ids that never occurred may not."""
    drafter = PromptLookup(prompt)
    drafter.extend(rewound)
    drafter.rewind(len(rewound))
    for id_ in reply:
        drafter.extend([id_])
        found = propose(drafter)
        assert found is None or set(found) <= {*prompt, *rewound, *reply}


def test_lookup_continues_a_repetition():
    assert propose(PromptLookup([9, 1, 2, 3, 1, 2, 3]), 7) == [1, 2, 3, 1, 2, 3, 1]


def test_chance_follows_the_acceptance_rate():
    good, bad = PromptLookup([1, 2, 3, 4] * 3), PromptLookup([1, 2, 3, 4] * 3)
    assert good.chance() == bad.chance() == 0.5  # nothing is known yet
    good.extend([1, 2, 3, 4] * 5)
    for n in range(20):
        bad.extend([100 + n, 1, 2, 3])
    assert good.chance() > 0.9
    assert bad.chance() < 0.1


def test_rate_weights_recent_outcomes():
    rate = Rate()
    for _ in range(200):
        rate.record(right=False)
    assert rate.value < 0.05
    for _ in range(40):
        rate.record(right=True)
    assert rate.value > 0.8


# ------------------------------------------------------------------ a draft model


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(open_checkpoint(models.write_hf(tmp_path_factory.mktemp("drafts"))), mx.float32)


def draft_model(real: Any, prompt: Sequence[int], sampler: Sampler) -> tuple[DraftModel, Prefix]:
    prefix = Prefix(real.new_caches())
    prefix.ids = [*prompt]
    feed(real, prompt[:-1], prefix.caches)
    return DraftModel(real, prefix, sampler), prefix


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0), Sampling(temperature=1.5, repetition_penalty=1.4)]
)
def test_draft_model_proposes_what_it_would_generate(real: Any, sampling: Sampling):
    """Whether all, some or none of its drafts were accepted, and however the ids are split."""
    sampler, rng = Sampler(sampling, 5), np.random.default_rng(3)
    drafter, prefix = draft_model(real, PROMPT, sampler)
    ids = [*PROMPT]
    for _ in range(12):
        most = int(rng.integers(1, 8))
        caches = real.new_caches()
        logits = feed(real, ids, caches)
        expected = list(decode(real, logits, caches, sampler=sampler, prompt=ids, limit=most))
        assert propose(drafter, most) == expected
        accepted = int(rng.integers(0, most + 1))
        emitted = [*expected[:accepted], int(rng.integers(320))]
        drafter.extend(emitted)
        ids += emitted
        assert prefix.ids == ids
        assert prefix.length <= len(ids)
        if rng.random() < 0.3:
            back = int(rng.integers(0, 3))
            drafter.rewind(back)
            ids = ids[: len(ids) - back]
            drafter.extend([7, 8, 9])
            ids += [7, 8, 9]
        assert {cache.offset for cache in prefix.caches} == {prefix.caches[0].offset}
        assert prefix.caches[0].offset < len(ids)


def test_draft_models_chance_follows_its_acceptance_rate(real: Any):
    drafter, _ = draft_model(real, PROMPT, Sampler(Sampling(temperature=0), 0))
    before = drafter.chance()
    for _ in range(5):
        found = propose(drafter, 4)
        drafter.extend([*found, 1])
    assert drafter.chance() > before
    for _ in range(30):
        found = propose(drafter, 4)
        drafter.extend([(found[0] + 1) % 320])
    assert drafter.chance() < 0.4


def test_draft_model_that_lags_too_far_stops_drafting(real: Any):
    drafter, _ = draft_model(real, PROMPT, Sampler(Sampling(), 0))
    drafter.extend([1] * (MAX_LAG - 1))
    assert drafter.chance() > 0
    drafter.extend([1])
    assert drafter.chance() == 0
