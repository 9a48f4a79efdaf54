"""The loss of DreamBooth as algebra."""

import torch

from dreambooth.module import prior_loss


def test_equals_two_separate_forward_passes() -> None:
    """One batch of both roles, in any order and number, has the loss and the gradient of a pass for each role."""
    torch.manual_seed(0)
    for instances, priors in [(1, 1), (2, 2), (1, 3), (5, 2)]:
        net = torch.nn.Linear(4, 4)
        x, target = torch.randn(2, instances + priors, 4)
        is_prior = (torch.arange(instances + priors) >= instances)[torch.randperm(instances + priors)]
        loss, instance, prior = prior_loss((net(x) - target).square().mean(1), is_prior, 0.7)
        together = torch.autograd.grad(loss, net.parameters())
        first, second = ((net(x[role]) - target[role]).square().mean() for role in (~is_prior, is_prior))
        apart = torch.autograd.grad(first + 0.7 * second, net.parameters())
        torch.testing.assert_close((instance, prior, loss), (first, second, first + 0.7 * second))
        torch.testing.assert_close(together, apart)


def test_weight_zero_equals_no_prior_at_all() -> None:
    per_example, is_prior = torch.tensor([1.0, 2.0, 30.0, 50.0]), torch.tensor([False, False, True, True])
    loss, instance, prior = prior_loss(per_example, is_prior, 0.0)
    assert (loss, instance, prior) == (1.5, 1.5, 40.0)
    assert prior_loss(per_example[:2], is_prior[:2], 1.0) == (1.5, 1.5, 0.0)
