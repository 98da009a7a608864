"""Right for the right reasons: a classifier that a confounding patch does not mislead.

In training, the grey of a corner pixel block tells the digit; in the test it is random. With the
mask A = 1 on the corner (Ross, Hughes & Doshi-Velez, IJCAI 2017), p the predicted probabilities:

    L = E l(x, y) + lambda * E ||A * d(sum_k log p_k(x))/dx||^2
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastjac import Scalar, masked_jacobian_penalty, with_jacobian

STEPS, BATCH = 300, 64
LOG_PROBABILITIES = Scalar(lambda logits, y: F.log_softmax(logits, 1).sum(1))


def with_patch(x, grey):
    x = x.clone()
    x[:, 0, :2, :2] = grey[:, None, None]
    return x


def train(x, y, weight):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., :2, :2] = 1
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        out = with_jacobian(model, x[chosen], LOG_PROBABILITIES)
        loss = F.cross_entropy(out.output, y[chosen])
        loss = loss + weight * masked_jacobian_penalty(out.jacobian, corner)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
train_x = with_patch(x[:1000], 2 * y[:1000] / 9)
generator = torch.Generator().manual_seed(1)
other = 2 * torch.randint(10, (len(x) - 1000,), generator=generator) / 9
test_x, test_y = with_patch(x[1000:], other), y[1000:]
for weight in (0.0, 10.0):
    model = train(train_x, y[:1000], weight)
    with torch.no_grad():
        fit = (model(train_x).argmax(1) == y[:1000]).float().mean()
        accuracy = (model(test_x).argmax(1) == test_y).float().mean()
    print(f"lambda {weight}: training accuracy {fit:.3f}, test accuracy {accuracy:.3f}")
