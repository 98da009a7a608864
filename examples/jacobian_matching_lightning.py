"""Jacobian matching in a LightningModule, with its validation (Srinivas & Fleuret, ICML 2018):

    L = E l(student(x), y) + lambda * E ||J_student - J_teacher||^2,   J = d(sum_i logit_{i, y_i})/dx

Lightning validates in inference mode; the matcher gives its loss there too.
"""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastjac import JacobianMatching, LabelLogit


class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher, weight):
        super().__init__()
        self.matcher, self.weight = JacobianMatching(student, teacher, LabelLogit()), weight

    def training_step(self, batch, _):
        out = self.matcher(*batch)
        return F.cross_entropy(out.student_logits, batch[1]) + self.weight * out.jacobian_loss

    def validation_step(self, batch, _):
        assert torch.is_inference_mode_enabled()
        out = self.matcher(*batch)
        self.log("jacobian_loss", out.jacobian_loss)
        self.log("accuracy", (out.student_logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.matcher.student.parameters(), lr=2e-3)


digits = load_digits()
x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
lightning.seed_everything(0, verbose=False)
student, teacher = (
    nn.Sequential(nn.Conv2d(1, c, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * c, 10))
    for c in (16, 32)
)
adam = torch.optim.Adam(teacher.parameters(), lr=1e-2)
for _ in range(100):
    adam.zero_grad()
    F.cross_entropy(teacher(x[:1000]), y[:1000]).backward()
    adam.step()

few = DataLoader(TensorDataset(x[:60], y[:60]), batch_size=30, shuffle=True)
test = DataLoader(TensorDataset(x[1000:], y[1000:]), batch_size=200)
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
trainer = lightning.Trainer(max_epochs=100, accelerator="cpu", enable_model_summary=False, **quiet)
module = Distillation(student, teacher, weight=0.3)
(before,) = trainer.validate(module, test, verbose=False)
trainer.fit(module, few)
(after,) = trainer.validate(module, test, verbose=False)
for stage, found in (("before", before), ("after", after)):
    print(f"{stage} training: " + ", ".join(f"{name} {v:.3f}" for name, v in found.items()))
