"""Jacobian matching in the loop of timm's train.py, which gains what is marked ``# +``:

    L = E l(student(x), y) + lambda * E ||J_student - J_teacher||^2,   J = d(sum_i logit_{i, y_i})/dx

with x as timm's loader normalises it (Srinivas & Fleuret, ICML 2018)."""

import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm import create_model
from timm.data import create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler, accuracy, random_seed

from fastjac import JacobianMatching, LabelLogit  # +

WEIGHT, DIGITS, CPU = 0.03, load_digits(), torch.device("cpu")


class Images(list):
    def __getitem__(self, index):
        pixels, label = super().__getitem__(index)
        return self.transform(Image.fromarray((pixels * (255 / 16)).astype("uint8"))), label


def load(part, batch, training):
    images = Images(zip(DIGITS.images[part], DIGITS.target[part], strict=True))
    how = {"mean": 0.3, "std": 0.4, "num_workers": 0, "persistent_workers": False, "device": CPU}
    return create_loader(images, (1, 32, 32), batch, training, no_aug=True, **how)


def train(name, part, epochs, teacher=None):
    random_seed()
    model = create_model("test_resnet", in_chans=1, num_classes=10)
    matcher = None if teacher is None else JacobianMatching(model, teacher, LabelLogit())  # +
    optimizer = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", epochs, warmup_epochs=1)
    scaler, ema, loss_fn = NativeScaler("cpu"), ModelEmaV3(model, 0.8), LabelSmoothingCrossEntropy()
    for epoch in range(epochs):
        for x, y in load(part, 30, training=True):
            with torch.autocast("cpu", torch.bfloat16):
                if matcher is None:  # +
                    loss = loss_fn(model(x), y)
                else:  # +
                    out = matcher(x, y)  # +
                    loss = loss_fn(out.student_logits, y) + WEIGHT * out.jacobian_loss  # +
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            ema.update(model)
        scheduler.step(epoch + 1)
    ((x, y),) = load(slice(1000, None), 797, training=False)
    print(f"{name}: test accuracy {accuracy(ema.module.eval()(x), y)[0]:.1f} %")
    return ema.module


teacher = train("teacher", slice(1000), 3)
train("30 images", slice(30), 60)
train("30 images, with the Jacobian term", slice(30), 60, teacher)
