"""The memory that training passes take turns with."""

import pytest
import torch

from bapo.training import arena as arena_module
from bapo.training.arena import LINE, ROOM, Arena


def taken(arena, lines, width):
    return arena.take(lines, width).fill_(1)


def test_the_next_pass_takes_the_memory_of_one_that_is_over():
    arena = Arena(24)
    lines = torch.zeros(4, 5)
    arena.open(lines)
    first, second = taken(arena, lines, 8), taken(arena, lines, 16)
    assert first.shape == (4, 8) and second.shape == (4, 16)
    assert first.is_contiguous() and not first._is_view(), "autograd treats views differently"
    assert second.data_ptr() - first.data_ptr() == 4 * 8 * 4, "one behind the other"
    place = first.data_ptr()
    del first, second
    for length in (2, 4 * ROOM):  # tokens, of a shorter pass and of a longer one
        lines = torch.zeros(length, 5)
        arena.open(lines)
        assert taken(arena, lines, 24).data_ptr() == place
    lines = torch.zeros(4 * ROOM + 2, 5)
    arena.open(lines)
    every = [taken(arena, lines, 8) for _ in range(3)]
    assert every[2].data_ptr() - every[0].data_ptr() == 2 * lines.shape[0] * 8 * 4, "memory of its own, in one piece"


@pytest.mark.parametrize("holder", [lambda tensor: tensor, lambda tensor: tensor[1:, 2], lambda tensor: tensor.numpy()])
def test_memory_in_use_is_not_given_out_again(holder):
    arena = Arena(8)
    lines = torch.zeros(4, 5)
    arena.open(lines)
    held = holder(taken(arena, lines, 8))
    for _ in range(2):
        arena.open(lines)
        taken(arena, lines, 8).zero_()
    assert (held == 1).all()


def test_every_tensor_starts_at_a_cache_line_and_none_overlap():
    arena = Arena(64)
    lines = torch.zeros(3, 5)
    arena.open(lines)
    tensors = [arena.take(lines, width) for width in (5, 1, 7, 16)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    starts = {(tensor.data_ptr() - tensors[0].data_ptr()) % LINE for tensor in tensors}
    assert starts == {0}
    assert [set(tensor.flatten().tolist()) for tensor in tensors] == [{0}, {1}, {2}, {3}]


def test_what_does_not_fit_is_allocated_as_usual():
    arena = Arena(8)
    lines = torch.zeros(4, 5)
    arena.open(lines)
    inside, outside, other = arena.take(lines, 8), arena.take(lines, 8 * ROOM), arena.take(lines.double(), 1)
    behind = arena.take(lines, 8)
    assert behind.data_ptr() - inside.data_ptr() == 4 * 8 * 4, "what was allocated elsewhere takes no room"
    assert outside.shape == (4, 8 * ROOM) and other.dtype == torch.float64
    for number, tensor in enumerate((inside, outside, other, behind)):
        tensor.fill_(number)
    for number, tensor in enumerate((inside, outside, other, behind)):
        assert (tensor == number).all()


def test_a_longer_pass_and_one_of_another_type_get_what_they_need():
    arena = Arena(32)
    for lines in (torch.zeros(4, 5), torch.zeros(4 * ROOM + 1, 5), torch.zeros(9, 5, dtype=torch.float64)):
        arena.open(lines)
        places = []
        for _ in range(2):
            tensor = arena.take(lines, 16)
            assert tensor.dtype == lines.dtype
            places.append(tensor.data_ptr())
            del tensor
        assert places[1] - places[0] == len(lines) * 16 * lines.itemsize


def test_where_there_is_no_room_a_pass_gets_what_it_needs(monkeypatch):
    monkeypatch.setattr(arena_module, "ROOM", 10**15)
    arena = Arena(32)
    lines = torch.zeros(4, 5)
    arena.open(lines)
    first, last = (taken(arena, lines, 16) for _ in range(2))
    assert last.data_ptr() - first.data_ptr() == 4 * 16 * 4


def test_nothing_is_lent_where_nothing_is_kept():
    arena = Arena(8)
    lines = torch.zeros(4, 5)
    arena.open(lines)
    place = arena.take(lines, 8).data_ptr()
    with torch.no_grad():
        arena.open(lines)
        assert arena.take(lines, 8).data_ptr() != place
