"""Jacobian matching with Hugging Face Accelerate (Srinivas & Fleuret, ICML 2018):

    L = E l(student(x), y) + lambda * E ||J_student - J_teacher||^2,   J = d(sum_i logit_{i, y_i})/dx

Accelerate prepares the matcher, which holds both networks; the optimizer has the student's parameters.
Runs by itself, and on several processes by ``accelerate launch`` or ``torchrun``.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastjac import JacobianMatching, LabelLogit

EPOCHS, FEW, WEIGHT = 100, 60, 0.3

digits = load_digits()
x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
set_seed(0)
student, teacher = (
    nn.Sequential(nn.Conv2d(1, c, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * c, 10))
    for c in (16, 32)
)
adam = torch.optim.Adam(teacher.parameters(), lr=1e-2)
for _ in range(100):
    adam.zero_grad()
    F.cross_entropy(teacher(x[:1000]), y[:1000]).backward()
    adam.step()

accelerator = Accelerator(cpu=True, mixed_precision="bf16")
matcher, optimizer, loader = accelerator.prepare(
    JacobianMatching(student, teacher, LabelLogit()),
    torch.optim.Adam(student.parameters(), lr=2e-3),
    DataLoader(TensorDataset(x[:FEW], y[:FEW]), 30 // accelerator.num_processes, shuffle=True),
)


@torch.no_grad()
def validate():
    images, labels = x[1000:].to(accelerator.device), y[1000:].to(accelerator.device)
    matcher.eval()
    out = matcher(images, labels)
    matcher.train()
    accuracy = (out.student_logits.argmax(1) == labels).float().mean()
    return f"jacobian_loss {out.jacobian_loss:.3f}, accuracy {accuracy:.3f}"


accelerator.print("before training:", validate())
for _ in range(EPOCHS):
    for images, labels in loader:
        out = matcher(images, labels)
        loss = F.cross_entropy(out.student_logits, labels) + WEIGHT * out.jacobian_loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
accelerator.print("after training:", validate())
