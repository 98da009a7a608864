"""jacobian_match against its equation in float64."""

from __future__ import annotations

import hashlib

import pytest
import torch
from instruction_set import evaluate_on
from torch import Tensor

from fastjac import FastjacError
from fastjac.ops import jacobian_match, jacobian_match_ref

OP = torch.ops.fastjac.jacobian_match
NORMALIZE = pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
# Around the 32 lanes, the 4096 elements of a block, and the vectors of CUDA.
SAMPLES = [(), (1,), (7,), (31,), (33,), (4096,), (4097,), (3, 37, 41), (3, 224, 224)]


def jacobians(*shape: int, device="cpu", dtype=torch.float64, apart=1.0, seed=0):
    """Two batches of Jacobians, the second ``apart`` from the first, made on the CPU."""
    make = torch.Generator().manual_seed(seed)
    js = torch.randn(shape, generator=make, dtype=torch.float64)
    jt = js + apart * torch.randn(shape, generator=make, dtype=torch.float64)
    js, jt = js.to(device, dtype), jt.to(device, dtype)
    assert js.device.type == jt.device.type == device
    return js, jt


def autograd_truth(js: Tensor, jt: Tensor, normalize: bool, eps: float = 1e-12):
    """The loss as the paper writes it, and its gradient by autograd, in float64."""
    s, t = js.double().flatten(1).requires_grad_(), jt.double().flatten(1)
    if normalize:
        unit = [x / x.norm(dim=1, keepdim=True).clamp(min=eps) for x in (s, t)]
        loss = (unit[0] - unit[1]).pow(2).sum(1)
    else:
        loss = (s - t).pow(2).sum(1)
    (v,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), v.view(js.shape)


def check(got: tuple[Tensor, Tensor], js: Tensor, jt: Tensor, *args, **tolerance) -> None:
    loss, v = got
    expected_loss, expected_v = jacobian_match_ref(js.double(), jt.double(), *args)
    assert loss.device == v.device == js.device
    assert loss.shape == js.shape[:1]
    assert loss.dtype == (torch.float64 if js.dtype == torch.float64 else torch.float32)
    assert v.shape == js.shape
    assert v.dtype == js.dtype
    assert v.stride() == torch.empty_like(js).stride()
    torch.testing.assert_close(loss.double(), expected_loss, **tolerance)
    torch.testing.assert_close(v.double(), expected_v, **tolerance)


EXACT = {"rtol": 1e-11, "atol": 1e-13}


@NORMALIZE
@pytest.mark.parametrize("eps", [1e-12, 30.0], ids=["norms", "clamped"])
def test_the_reference_is_the_equation(normalize, eps):
    js, jt = jacobians(6, 3, 17, 19)
    js[::2] *= 0.5  # eps = 30 clamps these norms, and not the others
    loss, v = jacobian_match_ref(js, jt, normalize, eps)
    expected_loss, expected_v = autograd_truth(js, jt, normalize, eps)
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    torch.testing.assert_close(v, expected_v, **EXACT)


@NORMALIZE
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_matches_the_reference(device, sample, batch, normalize):
    js, jt = jacobians(batch, *sample, device=device)
    check(jacobian_match(js, jt, normalize), js, jt, normalize, **EXACT)


@NORMALIZE
def test_clamped_norms(device, normalize):
    js, jt = jacobians(6, 3, 17, 19, device=device)
    js[::2] *= 0.5
    jt[:3] *= 0.1
    check(jacobian_match(js, jt, normalize, 30.0), js, jt, normalize, 30.0, **EXACT)


def strided_views(device):
    js, jt = jacobians(4, 6, 12, 10, device=device)
    last = torch.channels_last
    js_last, jt_last = js.contiguous(memory_format=last), jt.contiguous(memory_format=last)
    far = torch.zeros(4, 1 << 20, device=device, dtype=torch.float64)
    far[:, :: 1 << 17] = js[:, 0, 0, :8]
    return {
        "channels-last": (js_last, jt_last),
        "js channels-last": (js_last, jt),
        "jt channels-last": (js, jt_last),
        "crop": (js[:, :, 2:9, 1:8], jt[:, :, 2:9, 1:8]),
        "batch innermost": (js.permute(1, 2, 3, 0), jt.permute(1, 2, 3, 0)),
        "batch in the middle": (js.transpose(0, 1), jt.transpose(0, 1)),
        "every other sample": (js[::2], jt[::2]),
        "expanded": (js[:1].expand(4, -1, -1, -1), jt),
        "far apart": (far[:, :: 1 << 17], jt[:, 0, 0, :8]),
        "one sample, transposed": (js[:1].transpose(1, 3), jt[:1].transpose(1, 3)),
    }


@NORMALIZE
@pytest.mark.parametrize("view", strided_views("cpu"))
def test_any_strides(device, view, normalize):
    js, jt = strided_views(device)[view]
    check(jacobian_match(js, jt, normalize), js, jt, normalize, **EXACT)


@NORMALIZE
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 0, 4), (0,)], ids=str)
def test_empty(device, shape, normalize):
    js, jt = jacobians(*shape, device=device)
    check(jacobian_match(js, jt, normalize), js, jt, normalize, **EXACT)


def errors(got, js, jt, normalize) -> tuple[float, float]:
    """Relative errors of loss (root mean square over samples) and v, against float64."""
    loss, v = jacobian_match_ref(js.double(), jt.double(), normalize)
    relative = (got[0].double() - loss) / loss
    return relative.square().mean().sqrt().item(), ((got[1].double() - v).norm() / v.norm()).item()


@NORMALIZE
@pytest.mark.parametrize("apart", [1.0, 1e-2], ids=["far", "near"])
@pytest.mark.parametrize(
    ("dtype", "norm"),
    [(torch.float32, norm) for norm in (1e-12, 1e-6, 1.0, 1e6, 1e12)]
    + [(torch.bfloat16, norm) for norm in (1e-6, 1.0, 1e12)]
    + [(torch.float16, norm) for norm in (1.0, 100.0)],
    ids=str,
)
def test_error_at_most_twice_the_references(device, dtype, norm, apart, normalize):
    js, jt = jacobians(16, 3, 61, 67, apart=apart)
    scale = norm / js[0].norm()
    js, jt = (scale * js).to(device, dtype), (scale * jt).to(device, dtype)
    ours = errors(jacobian_match(js, jt, normalize), js, jt, normalize)
    reference = errors(jacobian_match_ref(js, jt, normalize), js, jt, normalize)
    for got, allowed in zip(ours, reference, strict=True):
        assert got <= 2 * allowed + torch.finfo(torch.float32).eps


@NORMALIZE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_agreement_gives_exactly_zero(device, dtype, normalize):
    js, _ = jacobians(5, 3, 41, 43, device=device, dtype=dtype)
    others = [js.clone(), 4 * js] if normalize else [js.clone()]
    for jt in others:  # a power of two changes a norm without rounding
        loss, v = jacobian_match(js, jt, normalize)
        assert loss.count_nonzero() == 0
        assert v.count_nonzero() == 0


@NORMALIZE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_jacobians_stay_finite(device, dtype, normalize):
    js, jt = jacobians(4, 3, 9, 9, device=device, dtype=dtype)
    js[0], jt[1], js[2], jt[2] = 0, 0, 0, 0
    loss, v = jacobian_match(js, jt, normalize)
    assert loss.isfinite().all()
    assert v.isfinite().all()
    assert loss[2] == 0
    check((loss, v), js, jt, normalize, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def every_number(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_rounded_as_in_pytorch(device, dtype):
    js = every_number(dtype).to(device)
    shuffle = torch.randperm(len(js), generator=torch.Generator().manual_seed(0)).to(device)
    for jt in (torch.zeros_like(js), js.flip(0), js[shuffle]):
        _, v = jacobian_match(js[None], jt[None], normalize=False)
        expected = (2 * (js.float() - jt.float())).to(dtype)
        torch.testing.assert_close(v[0], expected, rtol=0, atol=0, equal_nan=True)


@NORMALIZE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate_as_in_pytorch(device, value, normalize):
    for which in (0, 1):
        pair = jacobians(3, 2, 5, 5, device=device)
        pair[which][1, 0, 2, 3] = value
        got, expected = jacobian_match(*pair, normalize), jacobian_match_ref(*pair, normalize)
        for x, y in zip(got, expected, strict=True):
            assert not x[1].isfinite().all()
            torch.testing.assert_close(x, y, equal_nan=True, **EXACT)


@NORMALIZE
@pytest.mark.parametrize("eps", [1e-12, 10.0], ids=["norms", "clamped"])
def test_gradcheck(device, normalize, eps):
    js, jt = jacobians(3, 2, 3, 5, device=device)
    weights = torch.tensor([1.0, -2.0, 0.5], device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: jacobian_match(x, jt, normalize, eps)[0] * weights, js.requires_grad_()
    )


@NORMALIZE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(device, dtype, normalize):
    js, jt = jacobians(3, 2, 5, 5, device=device, dtype=dtype)
    last = torch.channels_last
    for s, t in ((js, jt), (js.to(memory_format=last), jt), (js[:, :, 1:], jt[:, :, 1:])):
        torch.library.opcheck(OP.default, (s, t, normalize, 1e-12))
        torch.library.opcheck(OP.default, (s.clone().requires_grad_(), t, normalize, 1e-12))


def test_gradient_is_v_and_v_has_none(device):
    js, jt = jacobians(3, 2, 5, 5, device=device, dtype=torch.bfloat16)
    loss, v = jacobian_match(js.requires_grad_(), jt)
    assert not v.requires_grad
    (grad,) = torch.autograd.grad((loss * torch.tensor([2.0, 0.0, 1.0], device=device)).sum(), js)
    torch.testing.assert_close(grad, v * torch.tensor([2, 0, 1]).view(3, 1, 1, 1).to(v))
    assert grad.dtype == torch.bfloat16


def test_unsupported_derivatives_are_errors(device):
    js, jt = jacobians(3, 4, device=device)
    js.requires_grad_()
    with pytest.raises(FastjacError, match=r"jacobian_match: jt requires a gradient.*js only"):
        jacobian_match(js.detach(), jt.clone().requires_grad_())
    with torch.no_grad():
        jacobian_match(js, jt.clone().requires_grad_())

    (grad,) = torch.autograd.grad(jacobian_match(js, jt)[0].sum(), js, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(FastjacError, match="jacobian_match: its second derivative is not supp"):
        grad.sum().backward()


def test_forward_mode_is_an_error(device):
    js, jt = jacobians(3, 4, device=device)
    for f, x in (
        (lambda x: jacobian_match(x, jt)[0], js),
        (lambda x: jacobian_match(js, x)[0], jt),
    ):
        with pytest.raises(FastjacError, match=r"jacobian_match: forward-mode derivatives \(jvp\)"):
            torch.func.jvp(f, (x,), (x,))


BAD = {
    "js must be a tensor, got list": lambda s, t: ([1.0], t),
    "jt must be a tensor, got NoneType": lambda s, t: (s, None),
    r"js must be a strided tensor, got torch\.sparse_coo": lambda s, t: (s.to_sparse(), t),
    r"jt must be a strided tensor, got torch\.sparse_coo": lambda s, t: (s, t.to_sparse()),
    r"js must be one of torch\.float64, .*, got torch\.int64": lambda s, t: (s.long(), t.long()),
    r"js must be \[B, \.\.\.\], got a tensor with no dim": lambda s, t: (s.sum(), t.sum()),
    r"jt must have js's dtype, torch\.float64, got torch\.float32": lambda s, t: (s, t.float()),
    r"jt must have js's shape, \[3, 4\], got \[3, 3\]": lambda s, t: (s, t[:, 1:]),
    r"jt must have js's device, cpu, got meta": lambda s, t: (s, t.to("meta")),
    r"eps must be positive, .*, got 0\.0": lambda s, t: (s, t, True, 0.0),
    r"eps must be positive, .*, got -1": lambda s, t: (s, t, True, -1),
    r"eps must be positive, .*, got 1e-60": lambda s, t: (s, t, True, 1e-60),
    r"eps must be positive, .*, got nan": lambda s, t: (s, t, True, float("nan")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(FastjacError, match="^jacobian_match: " + message):
        jacobian_match(*BAD[message](*jacobians(3, 4)))


NATIVE_BAD = {
    "js must be Double, Float, BFloat16 or Half, got Long": lambda s, t: (s.long(), t.long()),
    r"js must be \[B, \.\.\.\], got a tensor with no dim": lambda s, t: (s.sum(), t.sum()),
    "jt must have js's dtype, Double, got Float": lambda s, t: (s, t.float()),
    r"jt must have js's shape, \[3, 4\], got \[3, 3\]": lambda s, t: (s, t[:, 1:]),
    "eps must be positive.*, got 0": lambda s, t: (s, t, True, 0.0),
}


@pytest.mark.parametrize("message", NATIVE_BAD)
def test_the_operator_itself_names_bad_input(device, message):
    args = NATIVE_BAD[message](*jacobians(3, 4, device=device))
    with pytest.raises(RuntimeError, match="jacobian_match: " + message):
        OP(*args, *(True, 1e-12)[len(args) - 2 :])


def digest(device: str) -> str:
    """Of the bits of results over sizes, layouts and dtypes."""
    bits = hashlib.sha256()
    for shape in ((1, 3, 224, 224), (2, 50_001), (9, 3, 33, 31), (64, 77)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for normalize in (True, False):
                pair = jacobians(*shape, device=device, dtype=dtype)
                for x in jacobian_match(*pair, normalize):
                    bits.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def test_bits_are_the_same_from_run_to_run_and_for_any_thread_count(device):
    first, threads = digest(device), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert digest(device) == first
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_bits_are_the_same_for_any_instruction_set(isa):
    assert evaluate_on(isa, __file__, "m.digest('cpu')") == digest("cpu")


def test_compiles_into_one_graph(device):
    js, jt = jacobians(3, 2, 5, 5, device=device)

    def step(scale: Tensor) -> Tensor:
        loss, v = jacobian_match(js * scale, jt)
        return loss.mean() + v.square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        scale = torch.tensor(1.5, device=device, dtype=torch.float64, requires_grad=True)
        value = run(scale)
        value.backward()
        results.append((value.detach(), scale.grad))
    torch.testing.assert_close(*results)


@NORMALIZE
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_captures_into_a_cuda_graph(device, normalize):
    js, jt = jacobians(5, 3, 33, 31, device=device, dtype=torch.float32)
    expected = jacobian_match(js, jt, normalize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on a synchronisation, and on a launch on another stream
        got = jacobian_match(js, jt, normalize)
    graph.replay()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
