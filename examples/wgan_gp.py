"""A Wasserstein GAN with gradient penalty on handwritten digits.

Critic D, generator G (Gulrajani et al., NeurIPS 2017), m = e x + (1 - e) G(z) with e ~ U(0, 1):

    L_D = E D(G(z)) - E D(x) + lambda * E (||dD(m)/dm|| - 1)^2,    L_G = -E D(G(z))
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastjac import Scalar, gradient_penalty, with_jacobian

STEPS, CRITIC_STEPS, BATCH, LATENT, LAMBDA = 150, 3, 64, 16, 10.0
VALUE = Scalar(lambda output, y: output[:, 0])

torch.manual_seed(0)
images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
generator = nn.Sequential(
    *(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
    *(nn.Linear(128, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))),
)
critic = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.LeakyReLU(0.2)),
    *(nn.Conv2d(32, 64, 3, 2, 1), nn.LeakyReLU(0.2)),
    *(nn.Flatten(), nn.Linear(64 * 16, 1)),
)
adam_g, adam_d = (torch.optim.Adam(n.parameters(), 1e-3, (0.5, 0.9)) for n in (generator, critic))


def batch():
    return images[torch.randint(len(images), (BATCH,))], generator(torch.randn(BATCH, LATENT))


def jacobian_on_mixtures(x, fake):
    mixed = torch.lerp(fake.detach(), x, torch.rand(len(x), 1, 1, 1))
    return with_jacobian(critic, mixed, VALUE).jacobian


@torch.no_grad()
def nearest_digit():
    samples = generator(torch.randn(500, LATENT)).flatten(1)
    return torch.cdist(samples, images.flatten(1)).amin(1).mean()


before = nearest_digit()
for _ in range(STEPS):
    for _ in range(CRITIC_STEPS):
        x, fake = batch()
        loss = critic(fake.detach()).mean() - critic(x).mean()
        adam_d.zero_grad()
        (loss + LAMBDA * gradient_penalty(jacobian_on_mixtures(x, fake))).backward()
        adam_d.step()
    adam_g.zero_grad()
    (-critic(batch()[1]).mean()).backward()
    adam_g.step()

norms = jacobian_on_mixtures(*batch()).flatten(1).norm(dim=1)
print(f"the critic's gradient norm: {norms.mean():.3f} (1 is wanted)")
print(f"samples' nearest digit at {nearest_digit():.3f}, before training at {before:.3f}")
