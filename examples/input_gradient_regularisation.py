"""Double backpropagation: a classifier of digits that noise disturbs less.

With l the cross-entropy of one sample (Drucker & LeCun, 1992; Ross & Doshi-Velez, AAAI 2018):

    L = E l(x, y) + lambda * E ||dl(x, y)/dx||^2
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastjac import Scalar, jacobian_norm_penalty, with_jacobian

STEPS, BATCH, NOISE = 300, 64, 0.4
LOSS = Scalar(lambda logits, y: F.cross_entropy(logits, y, reduction="none"))


def train(x, y, weight):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        out = with_jacobian(model, x[chosen], LOSS, y[chosen])
        loss = F.cross_entropy(out.output, y[chosen])
        loss = loss + weight * jacobian_norm_penalty(out.jacobian)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model.eval()


digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
train_x, train_y, test_x, test_y = x[:1000], y[:1000], x[1000:], y[1000:]
noisy_x = test_x + NOISE * torch.randn(test_x.shape, generator=torch.Generator().manual_seed(1))

for weight in (0.0, 1.0):
    model = train(train_x, train_y, weight)
    with torch.no_grad():
        clean, noisy = ((model(t).argmax(1) == test_y).float().mean() for t in (test_x, noisy_x))
    print(f"lambda {weight}: test accuracy {clean:.3f}, under noise {noisy:.3f}")
