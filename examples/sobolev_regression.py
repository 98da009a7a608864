"""Sobolev training: a regression that also matches the known gradient of its target.

f is the soft distance of an image to the ten mean digits c_k, with s = 1:

    f(x) = -log sum_k exp(-||x - c_k||^2 / (2 s^2)),   df/dx = sum_k p_k (x - c_k) / s^2

with p the softmax of the exponents. The network g is fitted to a hundred digits (Czarnecki et al.,
NeurIPS 2017):

    L = E (g(x) - f(x))^2 + lambda * E ||dg(x)/dx - df(x)/dx||^2
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastjac import Scalar, jacobian_match_loss, with_jacobian

STEPS, SAMPLES = 500, 100
VALUE = Scalar(lambda output, y: output[:, 0])

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
means = torch.stack([x[labels == k].mean(0) for k in range(10)])


def function(x):
    exponents = -torch.cdist(x, means).square() / 2
    return -exponents.logsumexp(1), x - exponents.softmax(1) @ means


def train(x, weight):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus(), nn.Linear(128, 1)
    )
    values, gradients = function(x)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        out = with_jacobian(model, x, VALUE)
        loss = F.mse_loss(out.output[:, 0], values)
        loss = loss + weight * jacobian_match_loss(out.jacobian, gradients, normalize=False)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


values = function(x[SAMPLES:])[0]
for weight in (0.0, 10.0):
    model = train(x[:SAMPLES], weight)
    with torch.no_grad():
        error = F.mse_loss(model(x[SAMPLES:])[:, 0], values) / values.var()
    print(f"lambda {weight}: test error {error:.4f} of the variance")
