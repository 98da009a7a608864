"""Subsets: balanced, seeded, nested. Batches: every image as often as any other."""

from collections import Counter
from itertools import chain

import pytest
import torch

from fastjac import FastjacError
from fastjac.data import class_balanced, epoch_batches

LABELS = torch.randint(3, (90,), generator=torch.Generator().manual_seed(0)).tolist()
CLASSES = ["a", "b", "c"]


@pytest.mark.parametrize("per_class", [1, 4, 20])
def test_balanced(per_class):
    chosen = class_balanced(LABELS, per_class, 0, CLASSES)
    assert len(set(chosen)) == len(chosen)
    assert Counter(LABELS[i] for i in chosen) == dict.fromkeys(range(3), per_class)


def test_seeded_and_nested():
    two, five = (set(class_balanced(LABELS, n, 7, CLASSES)) for n in (2, 5))
    assert two < five
    assert class_balanced(LABELS, 5, 7, CLASSES) == sorted(five)
    assert class_balanced(LABELS, 5, 8, CLASSES) != sorted(five)


def test_more_than_there_are():
    count = Counter(LABELS)[1]
    with pytest.raises(
        FastjacError, match=f"asked for {count + 1}, class 'b' has {count} training"
    ):
        class_balanced([*LABELS, *[0] * 90, *[2] * 90], count + 1, 0, CLASSES)
    with pytest.raises(FastjacError, match="at least 1, got 0"):
        class_balanced(LABELS, 0, 0, CLASSES)


def batches(images, size, steps, seed=0):
    return epoch_batches(images, size, steps, torch.Generator().manual_seed(seed))


def test_one_pass():
    epoch = batches(10, 3, None)
    assert [len(b) for b in epoch] == [3, 3, 3]
    assert len(set(chain(*epoch))) == 9
    assert batches(10, 3, None, seed=1) != epoch == batches(10, 3, None)


def test_a_set_smaller_than_a_batch_is_one_batch():
    assert [sorted(b) for b in batches(4, 16, 3)] == [[0, 1, 2, 3]] * 3


def test_passes_follow_one_another():
    epoch = batches(8, 4, 5)
    assert [len(b) for b in epoch] == [4] * 5
    assert sorted(chain(*epoch[:2])) == sorted(chain(*epoch[2:4])) == list(range(8))
    assert epoch[:2] != epoch[2:4]


def test_the_generator_goes_on():
    generator = torch.Generator().manual_seed(0)
    assert epoch_batches(50, 50, 1, generator) != epoch_batches(50, 50, 1, generator)
