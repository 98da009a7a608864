"""A GAN on handwritten digits whose discriminator has the R1 penalty.

Discriminator D, generator G (Mescheder, Geiger & Nowozin, ICML 2018):

    L_D = E softplus(-D(x)) + E softplus(D(G(z))) + gamma / 2 * E ||dD(x)/dx||^2   (x: real images)
    L_G = E softplus(-D(G(z)))

D(x) and dD/dx come from one forward, and L_D needs no double backward.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastjac import Scalar, jacobian_norm_penalty, with_jacobian

STEPS, BATCH, LATENT = 250, 64, 16
REAL = Scalar(lambda output, y: output[:, 0])


def networks():
    generator = nn.Sequential(
        *(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))),
    )
    discriminator = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(8, 64), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(64 * 16, 1)),
    )
    return generator, discriminator


def train(images, gamma):
    torch.manual_seed(0)
    generator, discriminator = networks()
    adam_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    adam_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    for _ in range(STEPS):
        x = images[torch.randint(len(images), (BATCH,))]
        fake = generator(torch.randn(BATCH, LATENT))
        real = with_jacobian(discriminator, x, REAL)
        loss_d = F.softplus(-real.output).mean() + F.softplus(discriminator(fake.detach())).mean()
        adam_d.zero_grad()
        (loss_d + gamma / 2 * jacobian_norm_penalty(real.jacobian)).backward()
        adam_d.step()
        adam_g.zero_grad()
        F.softplus(-discriminator(fake)).mean().backward()
        adam_g.step()
    samples = generator(torch.randn(500, LATENT)).detach()
    nearest = torch.cdist(samples.flatten(1), images.flatten(1)).amin(1).mean()
    slope = jacobian_norm_penalty(with_jacobian(discriminator, images[:500], REAL).jacobian)
    return slope.item(), nearest.item()


images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
for gamma in (0.0, 1.0):
    slope, nearest = train(images, gamma)
    print(f"gamma {gamma}: E ||dD/dx||^2 {slope:.3f}, samples' nearest digit at {nearest:.3f}")
