"""Auxiliary heads: their loss is added in training, and they are no part of what is evaluated."""

import pytest
import torch
import torchvision
from PIL import Image
from torch.nn.functional import cross_entropy

from fastjac import JacobianMatching, LabelLogit
from fastjac.models import ModelSpec, create_model
from fastjac.train.auxiliary import AuxiliaryHeads
from fastjac.train.build import load_trained
from fastjac.train.objective import Classification, Objective, Step

GOOGLENET = ModelSpec("torchvision/googlenet", num_classes=3)
pytestmark = pytest.mark.filterwarnings("ignore:The default weight initialization")


@pytest.fixture
def network():
    """GoogLeNet with its heads, no dropout in them, and one of torchvision's with its weights."""
    torch.manual_seed(0)
    ours = create_model(GOOGLENET, auxiliary=True).double().train()
    theirs = torchvision.models.googlenet(num_classes=3, aux_logits=True, init_weights=False)
    theirs = theirs.double().train()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "normalize" not in k})
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return ours, theirs


def test_the_loss_is_the_librarys_outputs(network):
    ours, theirs = network
    torch.manual_seed(1)
    x, y = torch.rand(3, 3, 48, 48, dtype=torch.float64), torch.tensor([0, 2, -1])
    objective = AuxiliaryHeads(Plain(ours), ours, 0.3)
    step = objective(x, y)
    out = theirs(ours.normalize(x))
    # The sum over the labelled images, by the number of all: so pieces of a batch add up to it.
    heads = [cross_entropy(z[:2], y[:2]) * 2 / 3 for z in (out.aux_logits1, out.aux_logits2)]
    wanted = cross_entropy(out.logits[:2], y[:2]) + 0.3 * sum(heads)
    torch.testing.assert_close(step.loss, wanted, rtol=1e-10, atol=0)
    assert set(step.terms) == {"ce", "auxiliary"}
    step.loss.backward()
    wanted.backward()
    grads = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-7, atol=1e-10)


def test_labels_as_probabilities(network):
    ours, _ = network
    x, y = torch.rand(2, 3, 48, 48, dtype=torch.float64), torch.tensor([0, 2])
    objective = AuxiliaryHeads(Classification(ours), ours, 1.0)
    hard = objective(x, y).terms["auxiliary"]
    soft = objective(x, torch.nn.functional.one_hot(y, 3).double()).terms["auxiliary"]
    torch.testing.assert_close(soft, hard)
    none = AuxiliaryHeads(Plain(ours), ours, 1.0)(x, torch.tensor([-1, -1]))
    assert none.terms["auxiliary"] == 0


class Plain(Objective):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        logits = self.model(x)
        loss = cross_entropy(logits, y, ignore_index=-1)
        return Step(loss, logits, {"ce": loss})


class Matched(Objective):
    def __init__(self, matching):
        super().__init__()
        self.matching = matching

    def forward(self, x, y):
        out = self.matching(x, y)
        loss = cross_entropy(out.student_logits, y) + out.jacobian_loss
        return Step(loss, out.student_logits, {})


def test_in_eval_mode_there_are_none(network):
    ours, _ = network
    x, y = torch.rand(2, 3, 48, 48, dtype=torch.float64), torch.tensor([0, 2])
    with torch.no_grad():
        step = AuxiliaryHeads(Classification(ours.eval()), ours, 0.3)(x, y)
    assert set(step.terms) == {"ce"}


def test_beside_a_jacobian(network):
    """The heads run inside of the forward that the Jacobian is taken of: the gradients are exact."""
    ours, _ = network
    torch.manual_seed(2)
    teacher = create_model(GOOGLENET).double().eval()
    x, y = torch.rand(4, 3, 48, 48, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    gradients = []
    for strategy in ("dense", "autograd"):
        matching = JacobianMatching(ours, teacher, LabelLogit(), strategy=strategy)
        ours.train().zero_grad()
        step = AuxiliaryHeads(Matched(matching), ours, 0.3)(x, y)
        step.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in ours.parameters()]))
        for head in (ours.aux1, ours.aux2):
            head._forward_hooks.clear()
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[1].norm()
    assert all(p.grad.norm() > 0 for p in ours.aux1.parameters())


def write_images(folder):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (folder / "images" / part / name).mkdir(parents=True)
            for i in range(2):
                image = Image.effect_noise((48, 48), 60).convert("RGB")
                image.save(folder / "images" / part / name / f"{i}.png")


def run_of(folder):
    words = ["--dataset", "folder", "--data-dir", folder / "images", "--img-size", 48]
    return [*words, "--model", "torchvision/googlenet", "--batch-size", 2, "--threads", 1]


def test_a_run(trainer, tmp_path):
    write_images(tmp_path)
    words = ["teacher", *run_of(tmp_path), "--aux-weight", 0.3, "--model-ema", "--experiment", "x"]
    assert trainer(*words, "--epochs", 1)[0] == 0
    assert trainer(*words, "--epochs", 2, "--resume")[0] == 0
    folder = tmp_path / "runs" / "x"
    state = torch.load(folder / "last.pt", weights_only=True)
    assert all(row["train_auxiliary"] > 0 for row in state["history"])
    weight = state["model_ema"]["aux1.fc2.weight"]
    assert not torch.equal(weight, state["model"]["aux1.fc2.weight"])
    trained = load_trained(folder).model
    assert trained.aux1 is None
    assert torch.equal(trained.fc.weight, state["model_ema"]["fc.weight"])


def test_beside_terms_with_layers_of_their_own(trainer, tmp_path):
    """The convolution of ``--hints`` is trained, and is in the checkpoint, beside those too."""
    write_images(tmp_path)
    words = [*run_of(tmp_path), "--epochs", 1]
    assert trainer("teacher", *words, "--experiment", "t")[0] == 0
    words += ["--teacher", tmp_path / "runs" / "t", "--hints", 0.1, "--layer", "inception3a"]
    words += ["--teacher-layer", "inception3a", "--aux-weight", 0.3, "--experiment", "s"]
    heads = []
    for epochs in (1, 2):
        assert trainer("student", *words, "--epochs", epochs, *["--resume"][: epochs - 1])[0] == 0
        state = torch.load(tmp_path / "runs" / "s" / "last.pt", weights_only=True)
        heads.append(next(iter(state["heads"].values())))
    assert not torch.equal(*heads)
