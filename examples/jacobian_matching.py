"""Distillation of a digit classifier from few images, in a plain training loop.

phi_i is the logit of sample i's label, J = d(sum_i phi_i)/dx, of student and teacher (Srinivas &
Fleuret, ICML 2018, Proposition 1):

    L = E l(student(x), y) + lambda * E ||J_student - J_teacher||^2
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastjac import JacobianMatching, LabelLogit

STEPS, FEW, BATCH = 200, 30, 30


def network(width):
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * width, 10)),
    )


def train(model, x, y, objective):
    torch.manual_seed(1)
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(STEPS):
        chosen = torch.randperm(len(x))[:BATCH]
        adam.zero_grad()
        objective(x[chosen], y[chosen]).backward()
        adam.step()
    return model.eval()


def distilled(weight):
    torch.manual_seed(0)
    student = network(16)
    matcher = JacobianMatching(student, teacher, LabelLogit())

    def objective(x, y):
        out = matcher(x, y)
        return F.cross_entropy(out.student_logits, y) + weight * out.jacobian_loss

    return train(student, x[:FEW], y[:FEW], objective)


digits = load_digits()
x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
torch.manual_seed(0)
teacher = network(32)
train(teacher, x[:1000], y[:1000], lambda x, y: F.cross_entropy(teacher(x), y))
for name, weight in (("cross-entropy alone", 0.0), ("with Jacobian matching", 0.1)):
    student = distilled(weight)
    with torch.no_grad():
        accuracy = (student(x[1000:]).argmax(1) == y[1000:]).float().mean()
    print(f"{name}: test accuracy {accuracy:.3f} after {FEW} images")
