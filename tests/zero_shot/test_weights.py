"""Averaged weights against a loop, and the sharpest neighbour: where it stands, and that it is left exactly."""

import pytest
import torch
from torch import nn

from granq_plugin.zero_shot.weights import WeightAverage, at_sharpest_neighbour


def parameters(*shapes):
    return [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]


def test_the_average_is_that_of_a_loop_and_swapping_twice_is_nothing():
    params = parameters((3, 2), (4, ))
    average = WeightAverage(params, 0.8)
    expected = [p.detach().clone() for p in params]
    for n in range(1, 60):
        for i, p in enumerate(params):
            p.data = torch.randn_like(p)
            keep = min(0.8, n / (n + 9))
            expected[i] = keep * expected[i] + (1 - keep) * p.data
        average.update()
    present = [p.detach().clone() for p in params]
    average.swap()
    torch.testing.assert_close([p.data for p in params], expected)
    average.swap()
    torch.testing.assert_close([p.data for p in params], present, rtol=0, atol=0)


def test_the_average_goes_on_from_its_state_and_takes_up_a_parameter_that_grows():
    params = parameters((2, ), (0, ))
    average = WeightAverage(params, 0.5)
    average.update()
    params[1].data = torch.ones(3, dtype=torch.float64)
    average.update()
    other = WeightAverage(params, 0.5)
    other.load_state(average.state())
    for p in params:
        p.data += 1
    for a in (average, other):
        a.update()
    average.swap()
    first = [p.detach().clone() for p in params]
    average.swap()
    other.swap()
    torch.testing.assert_close([p.data for p in params], first, rtol=0, atol=0)
    assert first[1].shape == (3, )


@pytest.mark.parametrize("fails", [False, True])
def test_the_sharpest_neighbour_is_rho_away_and_left_exactly(fails):
    params, grads = parameters((3, 2), (5, )), [torch.randn(3, 2).double(), torch.randn(5).double()]
    before = [p.detach().clone() for p in params]
    try:
        with at_sharpest_neighbour(params, grads, 0.3):
            moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before)])
            if fails:
                raise KeyError
    except KeyError:
        pass
    direction = torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(moved, 0.3 * direction / direction.norm())
    torch.testing.assert_close([p.data for p in params], before, rtol=0, atol=0)
