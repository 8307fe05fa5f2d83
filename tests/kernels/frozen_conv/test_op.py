"""Frozen convolution and linear layer: PyTorch's numbers, nothing kept but the weight."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from fastcraft_kernels.frozen_conv import frozen_conv2d, frozen_linear

CONVS = [
    # channels, out, kernel, H x W, options
    (6, 4, 3, (5, 7), {"padding": 1}),
    (4, 6, 3, (8, 5), {"stride": 2, "padding": (1, 0)}),
    (6, 9, (1, 3), (6, 6), {"groups": 3, "dilation": (1, 2), "stride": (2, 1)}),
    (8, 3, 1, (4, 4), {}),
]
FORMATS = [torch.contiguous_format, torch.channels_last]


def kept(op, *tensors):
    """Bytes of what ``op`` keeps besides its weight and bias."""
    own = {t.untyped_storage().data_ptr() for t in tensors[1:] if t is not None}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        op(*tensors)
    return sum(storages.values())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv_equals_pytorch(case, memory_format, trained):
    channels, out, kernel, size, options = case
    plain = torch.nn.Conv2d(channels, out, kernel, **options).double().to(memory_format=memory_format)
    plain.requires_grad_(trained)
    x = torch.randn(2, channels, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    wanted = [x, *(plain.parameters() if trained else ())]
    y, ours = plain(x), frozen_conv2d(x, plain.weight, plain.bias, **options)
    torch.testing.assert_close(ours, y, rtol=0, atol=0)
    assert ours.stride() == y.stride()
    for cotangent in (torch.randn_like(y), torch.ones((), dtype=y.dtype).expand(y.shape)):
        ours_grads = torch.autograd.grad(ours, wanted, cotangent, retain_graph=True)
        plain_grads = torch.autograd.grad(y, wanted, cotangent, retain_graph=True)
        for a, b in zip(ours_grads, plain_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 0, 6), (2, 5, 6)], ids=str)
def test_linear_equals_pytorch(shape, trained):
    plain = torch.nn.Linear(6, 4).double().requires_grad_(trained)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(plain.parameters() if trained else ())]
    y, ours = plain(x), frozen_linear(x, plain.weight, plain.bias)
    torch.testing.assert_close(ours, y, rtol=0, atol=0)
    cotangent = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, cotangent), torch.autograd.grad(y, wanted, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_is_kept_of_a_frozen_layer():
    x, weight, bias = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(6, 4, 3, 3), torch.randn(6)
    size = x.untyped_storage().nbytes()
    assert kept(lambda *t: frozen_conv2d(*t, padding=1), x, weight, bias) == 0
    assert kept(lambda *t: F.conv2d(*t, padding=1), x, weight, bias) == size  # why this op exists
    assert kept(lambda *t: frozen_conv2d(*t, padding=1), x, weight.requires_grad_(), bias) == size
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(6, 8)
    assert kept(frozen_linear, x, weight, bias) == kept(F.linear, x, weight, bias) == 0
    assert kept(frozen_linear, x, weight.requires_grad_(), bias) == x.untyped_storage().nbytes()


@pytest.mark.parametrize("trained", [False, True])
def test_registrations(trained):
    for memory_format in FORMATS:
        x = torch.randn(2, 4, 6, 6).to(memory_format=memory_format).requires_grad_()
        weight = torch.randn(6, 4, 3, 3).to(memory_format=memory_format).requires_grad_(trained)
        bias = torch.randn(6, requires_grad=trained)
        arguments = (x, weight, bias, [1, 2], [1, 1], [1, 1], 1)
        torch.library.opcheck(torch.ops.fastcraft.frozen_conv2d.default, arguments)
    x = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=trained)
    torch.library.opcheck(torch.ops.fastcraft.frozen_linear.default, (x, weight, bias))


def test_gradcheck():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: frozen_conv2d(*t, padding=1), (x, weight), fast_mode=True)
    assert torch.autograd.gradcheck(frozen_linear, (x, weight[0, :, :, 0].repeat(1, 2)[:, :4]), fast_mode=True)


def test_under_compile():
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    weight, bias, matrix = torch.randn(4, 4, 3, 3), torch.randn(4), torch.randn(3, 6)

    def call(x):
        return frozen_linear(frozen_conv2d(x, weight, bias, padding=1), matrix).square().sum()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(call(x), x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6, 6)}, "x and weight must have 4 dimensions, got (4, 6, 6)"),
        ({"x": torch.zeros(1, 3, 6, 6)}, "x must have 4 channels for weight (6, 4, 3, 3) and groups 1, got 3"),
        ({"x": torch.zeros(1, 4, 6, 6, dtype=torch.float16)}, "weight must have the dtype and device of x"),
        ({"bias": torch.zeros(5)}, "bias must have shape (6,), got (5,)"),
        ({"bias": torch.zeros(6, device="meta")}, "bias must have the dtype and device of x (torch.float32, cpu), got"),
        ({"padding": "same"}, "padding must be one or two whole numbers, got 'same'"),
        ({"stride": (1, 2, 3)}, "stride must be one or two whole numbers, got (1, 2, 3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_conv_refuses(change, message):
    arguments = {"x": torch.zeros(1, 4, 6, 6), "weight": torch.zeros(6, 4, 3, 3), "bias": None} | change
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is compared
        frozen_conv2d(**arguments)
    assert message in str(raised.value)
    assert str(raised.value).startswith("frozen_conv2d: ")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), "the last dimension of x must be that of weight (O, C), got (2, 3) and (6, 4)"),
        (torch.zeros(2, 4, dtype=torch.int64), "weight must have the dtype and device of x (torch.int64, cpu)"),
    ],
)
def test_linear_refuses(x, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is compared
        frozen_linear(x, torch.zeros(6, 4))
    assert message in str(raised.value)
