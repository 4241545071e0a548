"""The compiled operators torch.ops.fastmim_native.*, without the registry before them.

Their values are tested with those of every backend in test_ops.py; here, that nothing else decides
them: threads, instruction sets, devices, alignment, chunks.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

native = pytest.importorskip(
    "fastmim._C", reason="the compiled part is not built: python setup.py build_ext --inplace"
)
ops = torch.ops.fastmim_native

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and native.build_info()["cuda"] else [])
# Below, at and above one vector and one chunk (2**14 elements on the CPU), and many tensors.
SIZES = [(0,), (1,), (5,), (3, 0, 2), (16,), (7, 11), (40_000,), (3 * 2**14,)] + [(7,)] * 520
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8


def scalar(value, dtype=torch.float64, device="cpu"):
    return torch.tensor(value, dtype=dtype, device=device)


def split(master):
    """The halves of storage.h, in integers: bits = (high << 16) + remainder."""
    bits = master.view(torch.int32)
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return high, ((bits << 16) >> 16).to(torch.int16)


def join(high, remainder):
    bits = (high.view(torch.int16).to(torch.int32) << 16) + remainder
    return bits.view(torch.float32)


def shifted(x):
    """The same values one element into their memory, so aligned to no vector."""
    return torch.cat([x.view(-1)[:1], x.view(-1)])[-x.numel() :].view(x.shape) if x.numel() else x


def adamw_inputs(
    sizes,
    device="cpu",
    *,
    params="plain",
    teachers="plain",
    grads=torch.float32,
    skip=False,
    unaligned=False,
    step=4,
):
    """Arguments of adamw_ema_ before its constants; params and teachers plain, copied or split."""
    generator = torch.Generator().manual_seed(0)

    def tensors(scale, dtype=torch.float32):
        made = []
        for size in sizes:
            numel = torch.Size(size).numel()
            # Not randn: its values depend on the instruction set.
            flat = torch.randint(-(2**20), 2**20, (numel,), generator=generator) / 2**20
            made.append((flat * scale).to(dtype).view(size))
        return made

    def stored(storage):
        masters = tensors(1.0)
        if storage == "none":
            return [], [], []
        if storage == "split":
            pairs = [split(x) for x in masters]
            return [h for h, _ in pairs], [r for _, r in pairs], []
        copied = storage == "copied"
        return masters, [], [torch.zeros_like(x, dtype=torch.bfloat16) for x in masters if copied]

    def placed(tensors):
        return [shifted(x).to(device) if unaligned else x.to(device) for x in tensors]

    param_lists = stored(params)
    gradients = tensors(8.0, grads)
    exp_avgs = tensors(0.1)
    exp_avg_sqs = [x.square() for x in tensors(0.1)]
    teacher_lists = stored(teachers)
    return SimpleNamespace(
        params=placed(param_lists[0]),
        grads=placed(gradients),
        exp_avgs=placed(exp_avgs),
        exp_avg_sqs=placed(exp_avg_sqs),
        teachers=placed(teacher_lists[0]),
        param_remainders=placed(param_lists[1]),
        teacher_remainders=placed(teacher_lists[1]),
        param_copies=placed(param_lists[2]),
        teacher_copies=placed(teacher_lists[2]),
        step=scalar(step, torch.int64, device),
        lr=scalar(1e-2, device=device),
        momentum=scalar(0.9, device=device),
        grad_scale=scalar(0.125, device=device),
        clip=scalar(0.75, device=device),
        skip=scalar(skip, torch.bool, device),
        weight_decay=torch.arange(len(sizes), dtype=torch.float64, device=device) / 8192,
    )


def adamw_ema_(inputs):
    ops.adamw_ema_(*vars(inputs).values(), BETA1, BETA2, EPS)


def ema_update_(teachers, students, momentum, teacher_remainders=(), student_remainders=(),
                teacher_copies=(), skip=None):  # fmt: skip
    if skip is None:
        skip = scalar(False, torch.bool, momentum.device)
    lists = teachers, students, teacher_remainders, student_remainders, teacher_copies
    ops.ema_update_(*map(list, lists), momentum, skip)


def state(inputs):
    """Every byte the operator may write, on the CPU."""
    lists = [x if isinstance(x, list) else [x] for x in vars(inputs).values()]
    return [x.detach().cpu().clone() for xs in lists for x in xs]


def masters(inputs):
    """float32 values of params, moments and teachers, however stored."""
    lists = []
    for name in ("param", "teacher"):
        tensors, remainders = getattr(inputs, f"{name}s"), getattr(inputs, f"{name}_remainders")
        lists += map(join, tensors, remainders) if remainders else tensors
    return [x.cpu() for x in (*lists, *inputs.exp_avgs, *inputs.exp_avg_sqs)]


def assert_same_bytes(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        a, e = (x.contiguous().view(-1).view(torch.uint8) for x in (a, e))
        assert torch.equal(a, e)


STORAGES = [
    dict(params="plain", teachers="plain"),
    dict(params="plain", teachers="none"),
    dict(params="copied", teachers="copied"),
    dict(params="split", teachers="split"),
    dict(params="split", teachers="none"),
    dict(params="split", teachers="copied"),
    dict(params="plain", teachers="split"),
]
each_storage = pytest.mark.parametrize(
    "storage", STORAGES, ids=lambda storage: "-".join(storage.values())
)
each_device = pytest.mark.parametrize("device", DEVICES)


@each_device
def test_empty_lists_do_nothing(device):
    inputs = adamw_inputs([], device)
    adamw_ema_(inputs)
    assert inputs.step.item() == 4
    ema_update_([], [], scalar(0.5, device=device))


@each_device
def test_a_step_over_empty_tensors_counts(device):
    inputs = adamw_inputs([(0,), (3, 0)], device)
    adamw_ema_(inputs)
    assert inputs.step.item() == 5


LISTS = ["params", "grads", "exp_avgs", "exp_avg_sqs", "teachers"]
LISTS += ["param_remainders", "teacher_remainders", "param_copies", "teacher_copies"]


def in_pieces(inputs, length):
    """The same memory as views of at most ``length`` elements, one call for every 100 of them."""
    pieces = {
        name: [part for x in getattr(inputs, name) for part in x.view(-1).split(length)]
        for name in LISTS
    }
    counts = torch.tensor([len(x.view(-1).split(length)) for x in inputs.params])
    decays = inputs.weight_decay.repeat_interleave(counts.to(inputs.weight_decay.device))
    for i in range(0, len(decays), 100):
        part = SimpleNamespace(**vars(inputs))
        vars(part).update({name: tensors[i : i + 100] for name, tensors in pieces.items()})
        part.weight_decay = decays[i : i + 100]
        yield part


def follow(inputs):
    """ema_update_ towards the parameters, in the storage of ``inputs``."""
    ema_update_(
        inputs.teachers,
        inputs.params[: len(inputs.teachers)],
        inputs.momentum,
        inputs.teacher_remainders,
        inputs.param_remainders[: len(inputs.teachers)],
        inputs.teacher_copies,
    )


@each_device
@each_storage
def test_bits_do_not_depend_on_chunks_and_lists(device, storage):
    whole, cut = (adamw_inputs(SIZES, device, **storage) for _ in range(2))
    adamw_ema_(whole)
    follow(whole)
    for part in in_pieces(cut, 1000):  # none fills a chunk
        part.step.fill_(4)
        adamw_ema_(part)
        follow(part)
    assert_same_bytes(state(cut), state(whole))


@each_device
@each_storage
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unaligned", [False, True])
def test_bits_do_not_depend_on_the_storage(device, storage, grads, unaligned):
    sizes = [(5,), (3, 0), (1500,)]
    stored = adamw_inputs(sizes, device, grads=grads, unaligned=unaligned, **storage)
    plain = adamw_inputs(sizes, device)
    plain.grads = [x.float() for x in stored.grads]
    for inputs in (plain, stored):
        for _ in range(50):
            adamw_ema_(inputs)
            follow(inputs)
    for name in ("param", "teacher"):
        copies, of = getattr(stored, f"{name}_copies"), getattr(stored, f"{name}s")
        assert_same_bytes(copies, [x.bfloat16() for x in of[: len(copies)]])
    if not stored.teachers:
        plain.teachers = []
    assert_same_bytes(masters(stored), masters(plain))


def test_tiny_weights_keep_their_bits_in_split_storage():
    """Denormals, infinities and both zeros, and the ties where halves carry into each other."""
    bits = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF, 0x7F7FFFFF, 0x7F800000])
    bits = torch.cat([bits, bits - 2**31, 0x3F808000 + torch.arange(-2, 3)]).to(torch.int32)
    plain, stored = (adamw_inputs([bits.shape]) for _ in range(2))
    for inputs in (plain, stored):
        inputs.params = [bits.view(torch.float32).clone()]
        inputs.teachers = [-inputs.params[0]]
        inputs.grads = [torch.full(bits.shape, 2.0**-140)]
        for tensors in (inputs.exp_avgs, inputs.exp_avg_sqs):
            tensors[0].zero_()
        inputs.lr.fill_(2.0**-130)
    for name in ("param", "teacher"):
        high, remainder = split(getattr(stored, f"{name}s")[0])
        vars(stored).update({f"{name}s": [high], f"{name}_remainders": [remainder]})
    assert_same_bytes(masters(stored), masters(plain))
    for _ in range(3):
        for inputs in (plain, stored):
            adamw_ema_(inputs)
        # Infinity - infinity makes NaN, and of NaN split storage keeps one kind.
        finite = [torch.where(x.isnan(), torch.nan, x) for x in masters(plain)]
        assert_same_bytes([torch.where(x.isnan(), torch.nan, x) for x in masters(stored)], finite)


@each_device
def test_nan_shows_in_the_half_the_network_computes_with(device):
    """The NaN of GPUs, all ones, would round to -0."""
    inputs = adamw_inputs([(40,)], device, params="split", teachers="split")
    inputs.grads[0].view(torch.int32).fill_(0x7FFFFFFF)
    adamw_ema_(inputs)
    assert inputs.params[0].isnan().all()
    assert inputs.teachers[0].isnan().all()


@each_device
@each_storage
def test_skip_leaves_every_byte(device, storage):
    inputs = adamw_inputs(SIZES[:8], device, skip=True, **storage)
    for grad in inputs.grads:
        grad.fill_(float("nan"))
    before = state(inputs)
    adamw_ema_(inputs)
    ema_update_(
        inputs.exp_avgs,
        inputs.exp_avg_sqs,
        inputs.momentum,
        teacher_copies=inputs.teacher_copies,
        skip=inputs.skip,
    )
    assert_same_bytes(state(inputs), before)


@each_device
@pytest.mark.parametrize("storage", ["plain", "split"])
def test_ten_thousand_tensors_are_those_of_one(device, storage):
    numel = 40_000
    whole = adamw_inputs([(numel,)], device, params=storage, teachers=storage)
    many = adamw_inputs([(numel,)], device, params=storage, teachers=storage)
    sizes = [0, 1, 2, 3, 4, 5, 6, 7, 8, 4] * (numel // 40)  # 10 000, some of them empty
    for name in LISTS:
        setattr(many, name, [part for x in getattr(many, name) for part in x.split(sizes)])
    many.weight_decay = torch.zeros(len(sizes), dtype=torch.float64, device=device)
    for inputs in (whole, many):
        adamw_ema_(inputs)
        follow(inputs)
    for a, b in zip(vars(many).values(), vars(whole).values(), strict=True):
        if isinstance(a, list) and b:
            assert_same_bytes([torch.cat(a)], b)


@each_device
def test_bits_of_the_step_do_not_depend_on_the_teachers(device):
    alone, followed = (adamw_inputs(SIZES, device, teachers=t) for t in ("none", "plain"))
    for inputs in (alone, followed):
        adamw_ema_(inputs)
        inputs.teachers = []
    assert_same_bytes(state(alone), state(followed))


def values(shape, dtype=torch.float32, seed=1):
    """Sixteenths in [-8, 8); not randn, see adamw_inputs. uint8: pixels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 256, shape, generator=generator)
    return drawn.to(dtype) if dtype == torch.uint8 else (drawn / 16 - 8).to(dtype)


def orders(b, n):
    """(B, N), each row another permutation."""
    noise = torch.randint(2**40, (b, n), generator=torch.Generator().manual_seed(2))
    return noise.argsort(dim=1, stable=True)


def calls(b, rows, columns, kept, width, side, channels):
    """(operator, arguments) for every operator without state, in each pair of dtypes that differs.

    ``kept`` of the ``rows`` x ``columns`` tokens or patches of ``b`` images are visible.
    """
    n, size = rows * columns, channels * side * side
    ids = orders(b, n)
    scale, shift = (torch.arange(1, channels + 1, dtype=torch.float64) / k for k in (7, 3))
    made = [(ops.sample_masks, (torch.arange(b) * 2**33, -5, 7, n))]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        made += [
            (ops.gather_tokens, (values((b, n, width), dtype), ids[:, :kept])),
            (ops.scatter_tokens, (values((b, kept, width), dtype), ids[:, :kept], n)),
            (ops.restore_tokens_backward, (values((b, n + 1, width), dtype), ids, kept)),
        ]
        wide = dtype if dtype == torch.float64 else torch.float32
        for pos_dtype in dict.fromkeys((dtype, wide)):
            x, mask = values((b, kept + 1, width), dtype), values((1, 1, width), torch.float32, 3)
            pos = values((1, n + 1, width), pos_dtype, 4)
            made.append((ops.restore_tokens, (x, mask, ids, ids.argsort(1), pos)))
        imgs = values((b, channels, rows * side, columns * side), dtype)
        pixels = values(imgs.shape, torch.uint8)
        pred, teacher = (values((b, n - kept, size), dtype, seed) for seed in (5, 6))
        made += [
            (ops.gather_patches, (imgs, ids[:, :kept], side, None, None, dtype)),
            (ops.gather_patches, (imgs, ids[:, :kept], side, scale, shift, torch.float32)),
            (ops.gather_patches, (pixels, ids[:, :kept], side, scale, shift, dtype)),
            (ops.patch_loss, (pred, imgs, ids[:, kept:], side, False, None, 0.5, None, None)),
            (ops.patch_loss, (pred, pixels, ids[:, kept:], side, True, teacher, 0.5, scale, shift)),
        ]
    return made


def fused_calls(b, tokens, heads, width):
    """The same for the operators that fuse products and sums: their last bits depend on the CPU."""
    dim, made = heads * width, []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        qkv = values((b, tokens, 3, heads, width), dtype) / 8
        x, branch, grad = (values((b, tokens, dim), dtype, seed) for seed in (1, 2, 3))
        weight, bias = values((dim,), seed=4), values((dim,), seed=5)
        variance, mean = torch.var_mean(x.float(), dim=-1, correction=0)
        rstd = (variance + 1e-6).rsqrt()
        wide = torch.float32
        ids = orders(b, tokens)
        made += [
            (ops.feature_loss, (x, branch, given, normalize, weight, bias, kind, 0.7))
            for kind in ("smooth_l1", "cosine", "cosine_token")
            for given, normalize in ((None, True), (ids, False))
        ]
        made += [
            (ops.attention, (qkv, width**-0.5)),
            (
                ops.attention_backward,
                (
                    values((b, tokens, heads, width), dtype, 7),
                    qkv,
                    values((b, tokens, heads, width), dtype, 8),
                    values((b, heads, tokens), seed=9) + 20,
                    width**-0.5,
                ),
            ),
            (ops.norm, (x, branch, weight, bias, 1e-6, dtype)),
            (ops.norm, (x.to(wide), branch, weight.to(dtype), bias, 1e-6, dtype)),
            (ops.norm, (x, None, weight, bias, 1e-6, wide)),
            (ops.norm_backward, (grad, branch, x, mean, rstd, weight)),
            (ops.norm_backward, (grad, None, x.to(wide), mean, rstd, weight.to(dtype))),
            (ops.bias_gelu, (x, bias)),
            (ops.bias_gelu_backward, (grad, x, bias.to(dtype))),
        ]
    return made


# More than one thread's share of elements, no multiple of a vector, of four rows or of a group.
ODD = dict(b=5, rows=7, columns=9, kept=16, width=133, side=14, channels=3)
SMALL = dict(b=2, rows=2, columns=3, kept=1, width=3, side=1, channels=2)
FUSED_ODD = dict(b=5, tokens=67, heads=3, width=41)
FUSED_SMALL = dict(b=2, tokens=1, heads=1, width=3)


def outputs(made):
    results = []
    for op, args in made:
        out = op(*args)
        results += [out] if isinstance(out, torch.Tensor) else out
    return results


def run_on_threads(threads, unaligned):
    """Everything written in every storage, with gradients of every dtype."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    results = []
    try:
        for grads, storage in zip(
            [torch.float32, torch.float16, torch.bfloat16] * 3, STORAGES, strict=False
        ):
            sizes = [(100_003,), (17,), (2**14 + 1,)]
            inputs = adamw_inputs(sizes, unaligned=unaligned, grads=grads, **storage)
            adamw_ema_(inputs)
            follow(inputs)
            results += state(inputs)
        return results + outputs(calls(**ODD)) + outputs(calls(**SMALL))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_bits_do_not_depend_on_the_number_of_threads_or_on_alignment(threads):
    assert_same_bytes(run_on_threads(threads, unaligned=True), run_on_threads(1, unaligned=False))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_fused_bits_do_not_depend_on_the_number_of_threads(threads):
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(outputs(fused_calls(**FUSED_ODD)) + outputs(fused_calls(**FUSED_SMALL)))
    finally:
        torch.set_num_threads(before)
    assert_same_bytes(*results)


NANS = [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -0x400000]  # PyTorch's, another, a GPU's, negative


@pytest.mark.parametrize("bits", NANS)
def test_a_nan_of_any_kind_comes_through(bits):
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    qkv = values((1, 19, 3, 2, 8)) / 8
    out, lse = ops.attention(qkv, 0.3)
    qkv[0, 4, 1, 1, 3] = nan[0]
    assert qkv.isnan().sum() == 1
    got, _ = ops.attention(qkv, 0.3)
    assert got[0, :, 1].isnan().all()
    assert torch.equal(got[0, :, 0], out[0, :, 0])
    assert ops.attention_backward(values(out.shape), qkv, out, lse, 0.3)[0, 4, 1, 1].isnan().any()
    x, zero = torch.cat([nan, torch.zeros(16)])[None], torch.zeros(17)
    assert ops.bias_gelu(x, zero).isnan().sum() == 1
    assert ops.bias_gelu_backward(torch.ones(1, 17), x, zero)[0].isnan().sum() == 1


def test_gelu_of_huge_values_is_that_of_pytorch():
    size = torch.tensor([1e37, 1e34, 1e19, 1e4, 30.0, 13.5, 5.0])
    x = torch.cat([-size, size])[None]
    zero, grad = torch.zeros(14), torch.ones(1, 14)
    torch.testing.assert_close(ops.bias_gelu(x, zero), torch.nn.functional.gelu(x))
    expected = torch.ops.aten.gelu_backward(grad, x)
    torch.testing.assert_close(ops.bias_gelu_backward(grad, x, zero)[0], expected)


def test_sums_over_many_rows_keep_their_precision():
    x, grad = values((20_000, 5)), values((20_000, 5), seed=2).abs() + 3
    mean, rstd, weight = torch.zeros(20_000), torch.ones(20_000), torch.ones(5)
    _, grad_weight, grad_bias = ops.norm_backward(grad, None, x, mean, rstd, weight)
    exact = (grad.double() * x.double()).sum(0), grad.double().sum(0)
    for got, right in zip((grad_weight, grad_bias), exact, strict=True):
        assert torch.equal(got, right.float())


def relaid(argument, layout):
    """The same values in other memory."""
    if not isinstance(argument, torch.Tensor) or not argument.ndim:
        return argument
    if layout == "gaps":
        return torch.stack([argument, argument], dim=-1)[..., 0]
    if layout == "channels_last":
        return (
            argument.movedim(1, -1).contiguous().movedim(-1, 1) if argument.ndim > 1 else argument
        )
    memory = torch.cat([argument.flatten()[:1], argument.flatten()])
    return memory[1:].view_as(argument)


@pytest.mark.parametrize("layout", ["gaps", "channels_last", "unaligned"])
def test_bits_do_not_depend_on_the_layout(layout):
    for op, args in calls(**ODD) + fused_calls(**FUSED_ODD):
        expected, got = op(*args), op(*[relaid(a, layout) for a in args])
        if isinstance(expected, torch.Tensor):
            expected, got = [expected], [got]
        assert_same_bytes(got, expected)


@pytest.mark.parametrize("size", ["b", "kept", "width", "channels"])
def test_without_elements_there_is_nothing_to_do(size):
    for x in outputs(calls(**{**SMALL, size: 0})):
        assert x.isfinite().all()


@pytest.mark.parametrize("size", ["b", "tokens"])
def test_without_rows_there_is_nothing_to_do(size):
    for x in outputs(fused_calls(**{**FUSED_SMALL, size: 0})):
        assert x.isfinite().all()


def test_no_tokens_at_all():
    none = torch.empty(2, 0, dtype=torch.int64)
    assert ops.sample_masks(torch.arange(2), 0, 0, 0)[0].shape == (2, 0)
    assert ops.gather_tokens(torch.empty(2, 0, 3), none).shape == (2, 0, 3)
    assert ops.scatter_tokens(torch.empty(2, 0, 3), none, 0).shape == (2, 0, 3)
    cls_token = torch.ones(2, 1, 3)
    restored = ops.restore_tokens(cls_token, torch.ones(1, 1, 3), none, none, torch.ones(1, 1, 3))
    assert (restored == 2).all()
    grad_x, grad_mask = ops.restore_tokens_backward(cls_token, none, 0)
    assert (grad_x == 1).all()
    assert (grad_mask == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 257, 3001])
def test_masks_are_permutations_and_their_inverses(n):
    shuffle, restore = ops.sample_masks(torch.arange(3), 1, 2, n)
    assert torch.equal(shuffle.sort(dim=1).values, torch.arange(n).expand(3, n))
    assert torch.equal(shuffle.gather(1, restore), torch.arange(n).expand(3, n))


@pytest.mark.parametrize("wrong", [-1, 6, 2**62])
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("gather_tokens", 1),
        ("scatter_tokens", 1),
        ("restore_tokens", 3),
        ("restore_tokens_backward", 1),
        ("gather_patches", 1),
        ("patch_loss", 2),
        ("feature_loss", 2),
    ],
)
def test_a_position_out_of_range_is_named(name, position, wrong):
    x, ids, pred = torch.zeros(2, 7, 3), orders(2, 6), torch.zeros(2, 6, 4)
    imgs, row = torch.zeros(2, 1, 4, 6), torch.zeros(1, 1, 3)
    args = {
        "gather_tokens": [x[:, 1:], ids],
        "scatter_tokens": [x[:, 1:], ids, 6],
        "restore_tokens": [x[:, :3], row, ids, ids, torch.zeros(1, 7, 3)],
        "restore_tokens_backward": [x, ids, 2],
        "gather_patches": [imgs, ids, 2, None, None, torch.float32],
        "patch_loss": [pred, imgs, ids, 2, True, None, 1.0, None, None],
        "feature_loss": [pred, pred, ids, True, None, None, "cosine", 1.0],
    }[name]
    args[position] = args[position].clone()
    args[position][1, 4] = wrong
    expected = rf"{name}: ids\w*\[1, 4\] is {wrong}, expected a value in \[0, 6\)"
    with pytest.raises(RuntimeError, match=expected):
        getattr(ops, name)(*args)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("sample_masks", (torch.zeros(2), 0, 0, 4), "sample_ids cannot be Float"),
        ("sample_masks", (orders(1, 2)[0], 0, 0, -1), r"num_patches in \[0, 2\^32\), got -1"),
        (
            "gather_tokens",
            (torch.zeros(3, 4, 5), orders(2, 4)),
            r"expected ids to be \(3, K\) of Long \(int64\), got Long \(2, 4\)",
        ),
        ("gather_tokens", (torch.zeros(3, 4), orders(3, 4)), "expected x to have 3 dimensions"),
        (
            "scatter_tokens",
            (torch.zeros(2, 4, 5), orders(2, 3), 6),
            r"expected ids to have shape \(2, 4\), got \(2, 3\)",
        ),
        (
            "restore_tokens",
            (
                torch.zeros(2, 6, 5),
                torch.zeros(1, 1, 5),
                orders(2, 4),
                orders(2, 4),
                torch.zeros(5),
            ),
            r"expected x to have from 1 to 5 tokens an image, got \(2, 6, 5\)",
        ),
        (
            "restore_tokens_backward",
            (torch.zeros(2, 5, 5), orders(2, 4), 5),
            r"num_visible in \[0, 4\], got 5",
        ),
        (
            "gather_patches",
            (torch.zeros(2, 3, 4, 4), orders(2, 4), 3, None, None, torch.float32),
            r"H and W divisible by the patch size 3, got \(2, 3, 4, 4\)",
        ),
        (
            "gather_patches",
            (torch.zeros(2, 3, 4, 4), orders(2, 4), 2, torch.ones(2), None, torch.float32),
            r"expected scale to have shape \(3,\), got \(2,\)",
        ),
        (
            "gather_patches",
            (torch.zeros(2, 3, 4, 4).int(), orders(2, 4), 2, None, None, torch.float32),
            "imgs cannot be Int",
        ),
        ("norm", (torch.zeros(2, 0), None, *torch.zeros(2, 0), 1e-6, torch.float32), "at least 1"),
        (
            "norm_backward",
            (*torch.zeros(1, 2, 3), None, *torch.zeros(1, 2, 3), *torch.ones(2, 1), torch.ones(3)),
            "expected mean of one value a row",
        ),
        ("bias_gelu", (torch.zeros(2, 3), torch.zeros(2)), r"bias to have shape \(3,\)"),
        (
            "norm",
            (torch.zeros(2, 3), None, *torch.ones(2, 3).double(), 1e-6, torch.float32),
            "weight cannot be Double",
        ),
        ("bias_gelu", (torch.zeros(2, 3).double(), torch.zeros(3)), "x cannot be Double"),
        ("attention", (torch.zeros(2, 4, 2, 1, 8), 1.0), r"expected qkv \(B, N, 3, H, D\)"),
        (
            "patch_loss",
            (values((2, 4, 5)), values((2, 3, 4, 4)), orders(2, 4), 2, True, None, 1.0, None, None),
            r"expected pred to have shape \(2, 4, 12\), got \(2, 4, 5\)",
        ),
        (
            "feature_loss",
            (values((2, 4, 5)), values((2, 3, 5)), None, True, None, None, "cosine", 1.0),
            r"expected target to have shape \(2, 4, 5\), got \(2, 3, 5\)",
        ),
        (
            "feature_loss",
            (values((2, 4, 5)), values((2, 4, 5)), None, True, None, None, "l1", 1.0),
            "expected kind smooth_l1, cosine or cosine_token, got 'l1'",
        ),
        (
            "feature_loss",
            (values((1, 2, 3)).double(), values((1, 2, 3)), None, True, None, None, "cosine", 1.0),
            "pred cannot be Double",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, args, message):
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(ops, name)(*args)


IN_THIS_INSTRUCTION_SET = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("test_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
results = [
    module.run_on_threads(1, unaligned=False),
    module.outputs(module.fused_calls(**module.FUSED_ODD)),
]
torch.save(results, sys.argv[2])
print(module.native.build_info()["simd_in_use"])
"""


def test_instruction_sets_agree(tmp_path):
    """To the bit, or to rounding where products and sums are fused."""
    results = {}
    variants = native.build_info()["simd_variants"]
    # PyTorch takes what it is told to, and would die of a set that the processor has not.
    for variant in variants[: variants.index(native.build_info()["simd_in_use"]) + 1]:
        env = os.environ | {"ATEN_CPU_CAPABILITY": variant}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        file = tmp_path / f"{variant}.pt"
        command = [sys.executable, "-c", IN_THIS_INSTRUCTION_SET, __file__, str(file)]
        # Not in the checkout: "python -c" would look there for fastmim before anywhere else.
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        results[done.stdout.strip()] = torch.load(file, weights_only=True)
    exact, fused = results.pop("default")
    for others_exact, others_fused in results.values():
        assert_same_bytes(others_exact, exact)
        torch.testing.assert_close(others_fused, fused)


needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and CUDA kernels")


@needs_cuda
@each_storage
def test_gpu_and_cpu_give_the_same_bits(storage):
    cpu, gpu = adamw_inputs(SIZES, "cpu", **storage), adamw_inputs(SIZES, "cuda", **storage)
    for skip in (False, True, False):
        for inputs in (cpu, gpu):
            inputs.skip.fill_(skip)
            adamw_ema_(inputs)
            follow(inputs)
    assert_same_bytes(state(gpu), state(cpu))


@needs_cuda
@each_storage
def test_a_cuda_graph_replays_with_new_scalars(storage):
    captured, eager = (adamw_inputs(SIZES, "cuda", **storage) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_ema_(captured)
        follow(captured)
    for lr, skip in ((1e-3, False), (2e-3, True), (3e-3, False)):
        for inputs in (captured, eager):
            inputs.lr.fill_(lr)
            inputs.skip.fill_(skip)
        graph.replay()
        adamw_ema_(eager)
        follow(eager)
    assert captured.step.item() == 6
    assert_same_bytes(state(captured), state(eager))


@needs_cuda
def test_more_lists_than_are_remembered_and_two_streams():
    cases = [adamw_inputs([(7,), (20_000,)], "cuda") for _ in range(20)]
    expected = adamw_inputs([(7,), (20_000,)], "cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for stream in streams:
        stream.wait_stream(streams[0])
        stream.wait_stream(streams[1])
        with torch.cuda.stream(stream):
            for inputs in cases:
                adamw_ema_(inputs)
                follow(inputs)
    torch.cuda.synchronize()
    for _ in streams:
        adamw_ema_(expected)
        follow(expected)
    for inputs in cases:
        assert_same_bytes(state(inputs), state(expected))


@needs_cuda
def test_updates_do_not_wait_for_the_gpu():
    inputs = adamw_inputs(SIZES, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # with and without the upload of the tables
            adamw_ema_(inputs)
            follow(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex128])
@pytest.mark.parametrize("dim", [1, 3, 8, 768])
def test_token_copies_are_those_of_pytorch(dtype, dim):
    x = torch.randint(0, 99, (2, 7, dim), device="cuda").to(dtype)
    ids = torch.stack([torch.randperm(7)[:3] for _ in range(2)]).cuda()
    where = ids[..., None].expand(-1, -1, dim)
    for tokens in (x, x.mT.contiguous().mT):
        assert torch.equal(ops.gather_tokens(tokens, ids), x.gather(1, where))
    kept = x[:, :3]
    expected = torch.zeros_like(x).scatter(1, where, kept)
    assert torch.equal(ops.scatter_tokens(kept, ids, 7), expected)


@pytest.mark.parametrize("name", ["ema_update_", "adamw_ema_"])
def test_kernels_are_registered_for_the_devices_they_were_built_for(name):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert registered(f"fastmim_native::{name}", "CPU")
    built_with_cuda = native.build_info()["cuda"] is not None
    assert registered(f"fastmim_native::{name}", "CUDA") == built_with_cuda


@pytest.mark.parametrize("name", ["gather_tokens", "scatter_tokens"])
def test_token_copies_are_registered_for_cuda_if_built(name):
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmim_native::{name}", "CUDA")
    assert registered == (native.build_info()["cuda"] is not None)


def replace(name, value):
    def change(inputs):
        setattr(inputs, name, value(getattr(inputs, name)))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("grads", lambda x: x[:1]), "adamw_ema_: grads has 1 tensors, params has 2"),
        (replace("teachers", lambda x: x[:1]), "teachers has 1 tensors, params has 2"),
        (
            replace("exp_avgs", lambda x: [x[0], x[1].view(5, 3)]),
            r"exp_avgs\[1\] has shape \(5, 3\), params\[1\] has \(3, 5\)",
        ),
        (
            replace("params", lambda x: [x[0].double(), x[1]]),
            r"expected params\[0\] to be Float, got Double",
        ),
        (replace("exp_avg_sqs", lambda x: [x[0], x[1].bfloat16()]), r"exp_avg_sqs\[1\].*BFloat16"),
        (
            replace("grads", lambda x: [x[0], x[1].t().contiguous().t()]),
            r"grads\[1\] is not contiguous",
        ),
        (replace("lr", lambda x: x.float()), "expected lr to be a 0-d Double tensor, got Float"),
        (replace("step", lambda x: x[None]), r"step to be a 0-d Long tensor, got Long \(1,\)"),
        (replace("skip", lambda x: x.int()), "expected skip to be a 0-d Bool tensor, got Int"),
        (replace("clip", lambda x: x[None]), r"clip to be a 0-d Double tensor, got Double \(1,\)"),
        (
            replace("grads", lambda x: [g.double() for g in x]),
            "Float or BFloat16 or Half, got Double",
        ),
        (
            replace("params", lambda x: [p.bfloat16() for p in x]),
            r"params\[0\] to be Float, got BF",
        ),
        (
            replace("param_remainders", lambda x: [torch.zeros(4, dtype=torch.int16)]),
            r"expected params\[0\] to be BFloat16, got Float",
        ),
        (
            replace("param_copies", lambda x: [torch.zeros(4)]),
            "param_copies has 1 tensors, params has 2",
        ),
        (
            replace("teacher_copies", lambda x: [torch.zeros(4), torch.zeros(3, 5)]),
            r"expected teacher_copies\[0\] to be BFloat16, got Float",
        ),
        (
            replace("weight_decay", lambda x: x[:1]),
            r"weight_decay to be a contiguous Double tensor of shape \(2,\).*got Double \(1,\)",
        ),
    ],
)
def test_adamw_ema_refuses_by_name_and_changes_nothing(change, message):
    inputs = adamw_inputs([(4,), (3, 5)])
    change(inputs)
    before = state(inputs)
    with pytest.raises(RuntimeError, match=message):
        adamw_ema_(inputs)
    assert_same_bytes(state(inputs), before)


@pytest.mark.parametrize(
    ("teachers", "students", "momentum", "message"),
    [
        ([torch.zeros(2)], [], scalar(0.9), "ema_update_: students has 0 tensors, teachers has 1"),
        ([torch.zeros(2)], [torch.zeros(3)], scalar(0.9), r"students\[0\] has shape \(3,\)"),
        ([torch.zeros(2)], [torch.zeros(2)], scalar([0.9]), "momentum to be a 0-d Double tensor"),
        ([torch.zeros(2).half()], [torch.zeros(2)], scalar(0.9), r"teachers\[0\].*got Half"),
    ],
)
def test_ema_update_refuses_by_name(teachers, students, momentum, message):
    with pytest.raises(RuntimeError, match=message):
        ema_update_(teachers, students, momentum)


def test_copies_beside_split_storage_are_refused():
    inputs = adamw_inputs([(4,)], params="split")
    inputs.param_copies = [torch.zeros(4, dtype=torch.bfloat16)]
    with pytest.raises(RuntimeError, match="param_copies and param_remainders exclude each other"):
        adamw_ema_(inputs)


@needs_cuda
def test_tensors_on_two_devices_are_refused():
    with pytest.raises(RuntimeError, match=r"students\[0\] is on cpu, expected cuda:0"):
        ema_update_([torch.zeros(2, device="cuda")], [torch.zeros(2)], scalar(0.9, device="cuda"))


def test_build_info_says_what_was_built():
    info = native.build_info()
    assert info["torch_target"] == "2.10"
    assert info["simd_in_use"] in info["simd_variants"]
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
