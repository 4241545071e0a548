"""What each operator computes, in plain PyTorch.

This file is the specification: it favours reading over speed.
Every kernel is tested against it.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF  # 32-bit words are held in int64


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit words."""
    product = b * a  # int64 wraps modulo 2**64: the bits are those of the unsigned product
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words for a counter of four words.

    Args:
        counter: Four int64 tensors of one shape, values in [0, 2**32), least significant first.
        key: Two words, least significant first.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def random_words(
    sample_ids: Tensor, seed: int, epoch: int, count: int, first_block: int = 0
) -> Tensor:
    """(B, count), int64: words of Philox for each sample, from a block of four words onward."""
    draws = -(-count // 4)  # four words a draw
    ids = sample_ids[:, None].expand(-1, draws)
    block = first_block + torch.arange(draws, device=sample_ids.device).expand_as(ids)
    words = philox(
        [block, torch.full_like(ids, epoch & _WORD), ids & _WORD, (ids >> 32) & _WORD],
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def sample_masks(
    sample_ids: Tensor, seed: int, epoch: int, num_patches: int
) -> tuple[Tensor, Tensor]:
    noise = random_words(sample_ids, seed, epoch, num_patches)
    ids_shuffle = noise.argsort(dim=1, stable=True)  # equal words: the lower position first
    return ids_shuffle, inverse_permutation(ids_shuffle)


def inverse_permutation(ids: Tensor) -> Tensor:
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.empty_like(ids).scatter_(1, ids, places)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def scatter_tokens(x: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    out = x.new_zeros(x.shape[0], num_tokens, x.shape[-1])
    return out.scatter_(1, ids.unsqueeze(-1).expand_as(x), x)


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _blocks(imgs: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, h, w, C, p, p), a view."""
    b, c, height, width = imgs.shape
    p = patch_size
    return imgs.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)


def _pick(imgs: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """The patches named by ``ids``: (B, K, C, p, p)."""
    blocks = _blocks(imgs, patch_size)
    image = torch.arange(ids.shape[0], device=ids.device)[:, None]
    row = torch.div(ids, blocks.shape[2], rounding_mode="floor")
    return blocks[image, row, ids - row * blocks.shape[2]]


def _normalize_pixels(pixels: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Channel-wise affine of (..., C, p, p), in float32 (float64 for float64 pixels)."""
    if pixels.dtype != torch.float64:
        pixels = pixels.float()
    if scale is not None:
        pixels = pixels * scale.to(pixels.dtype)[:, None, None]
    if shift is not None:
        pixels = pixels + shift.to(pixels.dtype)[:, None, None]
    return pixels


def gather_patches(
    imgs: Tensor,
    ids: Tensor,
    patch_size: int,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    pixels = _normalize_pixels(_pick(imgs, ids, patch_size), scale, shift)
    return pixels.flatten(2).to(dtype).contiguous()


def restore_tokens(x: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor) -> Tensor:
    b, n = ids_restore.shape
    cls_token, visible = x[:, :1], x[:, 1:]
    hidden = mask_token.to(x.dtype).expand(b, n - visible.shape[1], -1)
    tokens = gather_tokens(torch.cat([visible, hidden], dim=1), ids_restore)
    return torch.cat([cls_token, tokens], dim=1) + pos_embed


def restore_tokens_backward(
    grad: Tensor, ids_shuffle: Tensor, num_visible: int
) -> tuple[Tensor, Tensor]:
    tokens = gather_tokens(grad[:, 1:], ids_shuffle)
    grad_x = torch.cat([grad[:, :1], tokens[:, :num_visible]], dim=1)
    return grad_x, tokens[:, num_visible:].sum(dim=(0, 1)).reshape(1, 1, -1)


def _scores(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (B, H, M, D), k, v (B, H, N, D) and scale * q k^T, in float32 at least."""
    if q.dtype != torch.float64:
        q, kv = q.float(), kv.float()
    q, (k, v) = q.transpose(1, 2), kv.permute(2, 0, 3, 1, 4)
    return q, k, v, (q * scale) @ k.transpose(-1, -2)


def attention_queries(q: Tensor, kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _, _, v, scores = _scores(q, kv, scale)
    lse = scores.logsumexp(dim=-1)
    out = (scores - lse[..., None]).exp() @ v
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def attention_queries_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    q, k, v, scores = _scores(q, kv, scale)
    probabilities = (scores - lse[..., None]).exp()
    grad_out = grad.to(q.dtype).transpose(1, 2)
    grad_v = probabilities.transpose(-1, -2) @ grad_out
    delta = (grad_out * out.to(q.dtype).transpose(1, 2)).sum(dim=-1, keepdim=True)
    grad_scores = probabilities * (grad_out @ v.transpose(-1, -2) - delta) * scale
    grad_q = (grad_scores @ k).transpose(1, 2).to(dtype).contiguous()
    grads = grad_scores.transpose(-1, -2) @ q, grad_v
    return grad_q, torch.stack([g.transpose(1, 2) for g in grads], dim=2).to(dtype)


def attention(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention_queries(qkv[:, :, 0], qkv[:, :, 1:], scale)


def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    given = grad, qkv[:, :, 0], qkv[:, :, 1:], out, lse
    grad_q, grad_kv = attention_queries_backward(*given, scale)
    return torch.cat([grad_q[:, :, None], grad_kv], dim=2)


def sequences(cu_seqlens: Tensor, max_seqlen: int, rows: int) -> list[tuple[int, int]]:
    """First and last row + 1 of each sequence; refuses starts that do not cut the rows."""
    starts = cu_seqlens.tolist()
    pairs = list(itertools.pairwise(starts))
    if starts[0] != 0 or starts[-1] != rows or any(not 0 <= b - a <= max_seqlen for a, b in pairs):
        raise ValueError(
            "attention_varlen: expected cu_seqlens that rise from 0 to the number of rows, "
            f"{rows}, by at most max_seqlen, {max_seqlen}, each; got {cu_seqlens.tolist()}"
        )
    return pairs


def attention_varlen(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    pairs = sequences(cu_seqlens, max_seqlen, qkv.shape[0])
    parts = [attention(qkv[None, a:b], scale) for a, b in pairs]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def attention_varlen_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    pairs = sequences(cu_seqlens, max_seqlen, qkv.shape[0])
    return torch.cat(
        [
            attention_backward(
                *(grad[None, a:b], qkv[None, a:b], out[None, a:b], lse[None, :, a:b]), scale
            )[0]
            for a, b in pairs
        ]
    )


def patch_target(
    imgs: Tensor,
    ids: Tensor,
    patch_size: int,
    norm_pix: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """Pixels of the patches ``ids``, channel fastest, per-patch normalised if ``norm_pix``."""
    pixels = _normalize_pixels(_pick(imgs, ids, patch_size), scale, shift)
    target = pixels.permute(0, 1, 3, 4, 2).flatten(2)
    if norm_pix and target.numel():  # var_mean warns about empty tensors
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)  # unbiased
        target = (target - mean) / (variance + 1e-6).sqrt()
    return target


def patch_loss(
    pred: Tensor,
    imgs: Tensor,
    ids: Tensor,
    patch_size: int,
    norm_pix: bool,
    teacher_pred: Tensor | None,
    gamma: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    target = patch_target(imgs, ids, patch_size, norm_pix, scale, shift)
    wide = torch.promote_types(target.dtype, pred.dtype)
    error = pred.to(wide) - target
    count = max(pred.numel(), 1)
    pixel = error.square().sum() / count
    consistency = torch.zeros_like(pixel)
    if teacher_pred is not None:
        distance = pred.to(wide) - teacher_pred
        consistency = distance.square().sum() / count
        error = error + gamma * distance
    direction = error.to(pred.dtype).contiguous()  # of the gradient, without its factor 2 / count
    return pixel + gamma * consistency, pixel, consistency, direction


def scale(x: Tensor, factor: Tensor) -> Tensor:
    return (x.to(factor.dtype) * factor).to(x.dtype).contiguous()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x if branch is None else (_wide(x) + _wide(branch)).to(x.dtype)
    centred = _wide(total)
    mean = centred.mean(dim=-1)
    centred = centred - mean[..., None]
    rstd = (centred.square().mean(dim=-1) + eps).rsqrt()
    out = centred * rstd[..., None] * weight.to(mean.dtype) + bias.to(mean.dtype)
    kept = total.new_empty(0) if branch is None else total.contiguous()
    return out.to(dtype).contiguous(), kept, mean, rstd


def norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.to(mean.dtype)
    unit = (total.to(mean.dtype) - mean[..., None]) * rstd[..., None]
    scaled = grad * weight.to(mean.dtype)
    along = (scaled * unit).mean(dim=-1, keepdim=True)
    grad_x = (scaled - scaled.mean(dim=-1, keepdim=True) - unit * along) * rstd[..., None]
    if grad_total is not None:
        grad_x = grad_x + grad_total.to(mean.dtype)
    grad_weight = (grad * unit).reshape(-1, grad.shape[-1]).sum(dim=0)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0)
    return (
        grad_x.to(total.dtype).contiguous(),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )


def norm_linear(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, *kept = norm(x, branch, norm_weight, norm_bias, eps, weight.dtype)
    return F.linear(rows, weight, bias), *kept


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    wide = _wide(x)
    return F.gelu(wide + bias.to(wide.dtype)).to(x.dtype).contiguous()


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    z = wide + bias.to(wide.dtype)
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    cumulative = 0.5 * (1 + (z / math.sqrt(2)).erf())
    grad_x = grad.to(wide.dtype) * (cumulative + z * density)
    grad_bias = grad_x.reshape(-1, grad.shape[-1]).sum(dim=0)
    return grad_x.to(x.dtype).contiguous(), grad_bias.to(bias.dtype)


def bias_gelu_linear(x: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor | None) -> Tensor:
    return F.linear(bias_gelu(x, bias), weight, out_bias)


def feature_target(
    target: Tensor,
    ids: Tensor | None,
    normalize: bool,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The rows ``ids`` of the teacher's features, normalised per token, then the affine."""
    z = _wide(target if ids is None else gather_tokens(target, ids))
    if normalize and z.numel():  # var_mean warns about empty tensors
        variance, mean = torch.var_mean(z, dim=-1, keepdim=True)  # unbiased
        z = (z - mean) / (variance + 1e-6).sqrt()
    if weight is not None:
        z = z * weight.to(z.dtype)
    if bias is not None:
        z = z + bias.to(z.dtype)
    return z


def feature_loss(
    pred: Tensor,
    target: Tensor,
    ids: Tensor | None,
    normalize: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    z = feature_target(target, ids, normalize, weight, bias)
    x = pred.to(torch.promote_types(z.dtype, pred.dtype))
    z = z.to(x.dtype)
    if kind == "smooth_l1":
        count = max(pred.numel(), 1)
        d = x - z
        loss = torch.where(d.abs() < beta, d.square() * (0.5 / beta), d.abs() - 0.5 * beta)
        direction = (d / beta).clamp(-1.0, 1.0)  # of the gradient, without its factor 1 / count
        return loss.sum() / count, direction.to(pred.dtype).contiguous()
    dim = -1 if kind == "cosine" else 1
    count = max(pred.numel() // max(pred.shape[dim], 1), 1)
    # as torch's cosine_similarity: each norm at least 1e-8
    x_norm = x.square().sum(dim, keepdim=True).sqrt()
    z_norm = z.square().sum(dim, keepdim=True).sqrt().clamp(min=1e-8)
    inverse = 1 / x_norm.clamp(min=1e-8)
    similarity = (x * z).sum(dim, keepdim=True) * inverse / z_norm
    turning = torch.where(x_norm > 1e-8, similarity * inverse, 0.0) * x * inverse
    direction = turning - z * inverse / z_norm
    loss = float(pred.numel() > 0) - similarity.sum() / count
    return loss, direction.to(pred.dtype).contiguous()


def _multiply_64(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of the 128-bit product of two 64-bit words, held in int64."""
    a_high, a_low = a >> 32, a & _WORD
    b_high, b_low = (b >> 32) & _WORD, b & _WORD
    cross, other = a_low * b_high, a_high * b_low
    carry = ((b_low * a_low) >> 32) & _WORD
    middle = carry + (cross & _WORD) + (other & _WORD)
    high = a_high * b_high + ((cross >> 32) & _WORD) + ((other >> 32) & _WORD) + (middle >> 32)
    return high, b * _signed(a)


def _signed(word: int) -> int:
    """The int64 with the bits of a word in [0, 2**64)."""
    return (word + 2**63) % 2**64 - 2**63


def philox_64(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x64-10 (Salmon et al., SC 2011), NumPy's: four 64-bit words for a counter of four.

    Args:
        counter: Four int64 tensors of one shape, the bits of words, least significant first.
        key: Two words in [0, 2**64), least significant first.

    Returns:
        Four int64 tensors, the bits of words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_64(0xD2E7470EE14C6C93, c0)
        high1, low1 = _multiply_64(0xCA5A826395121157, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return [c0, c1, c2, c3]


def sample_crops(
    sample_ids: Tensor,
    seed: int,
    epoch: int,
    height: int,
    width: int,
    area_low: float,
    area_high: float,
    ratio_low: float,
    ratio_high: float,
    hflip: float,
) -> Tensor:
    ids = sample_ids[:, None].expand(-1, 6)
    block = torch.arange(1, 7, device=ids.device).expand_as(ids)  # NumPy counts before it draws
    zero = torch.zeros_like(ids)
    words = philox_64([block, zero + epoch, ids, zero], (seed % 2**64, 1))
    u = ((torch.stack(words, dim=-1).flatten(1) >> 11) & (2**53 - 1)).double() * 2.0**-53
    tries = u[:, 3:23]  # (area, ratio) ten times
    area = height * width * (area_low + (area_high - area_low) * tries[:, ::2])
    log_low, log_high = math.log(ratio_low), math.log(ratio_high)
    aspect = (log_low + (log_high - log_low) * tries[:, 1::2]).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # half to even
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    placed = torch.stack(
        [(u[:, 1:2] * (height - h + 1)).floor(), (u[:, 2:3] * (width - w + 1)).floor(), h, w], dim=2
    )
    h, w = height, width  # if none fits: the largest central box with the nearest ratio
    if width / height < ratio_low:
        h = min(height, max(1, round(width / ratio_low)))
    elif width / height > ratio_high:
        w = min(width, max(1, round(height * ratio_high)))
    central = placed.new_tensor([(height - h) // 2, (width - w) // 2, h, w])
    boxes = torch.cat([placed, central.expand(len(placed), 1, 4)], dim=1)
    tenth = torch.arange(10, device=ids.device)
    first = torch.where(fits, tenth, 10).amin(dim=1)
    box = boxes.take_along_dim(first[:, None, None], dim=1)[:, 0]
    return torch.cat([box, (u[:, :1] < hflip).double()], dim=1).int()


def _resampling(start: Tensor, size: Tensor, length: int, out_size: int) -> Tensor:
    """Weights (B, out_size, length), in units of 2**-22, that resize [start, start + size).

    The cubic of Keys (1981, a = -1/2), stretched when it scales down: Pillow's and PyTorch's.
    """
    start, size = (t.double()[:, None, None] for t in (start, size))
    scale = size / out_size
    stretch = scale.clamp(min=1.0)
    i = torch.arange(out_size, device=scale.device, dtype=torch.float64)[:, None]
    centre = (i + 0.5) * scale
    first = (centre - 2 * stretch + 0.5).trunc().clamp(min=0)
    last = torch.minimum((centre + 2 * stretch + 0.5).trunc(), size)
    j = torch.arange(length, device=scale.device, dtype=torch.float64) - start
    x = ((j - centre + 0.5) * (1 / stretch)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where((j >= first) & (j < last), weight, 0.0)
    weight = weight / weight.sum(dim=-1, keepdim=True) * 2**22
    return (weight + 0.5 * weight.sign()).trunc()  # half away from zero


def _to_pixels(sums: Tensor) -> Tensor:
    """Grey levels from sums of pixels with weights in units of 2**-22; exact in float64."""
    return ((sums + 2**21) / 2**22).floor().clamp(0, 255)


def crop_resize(
    imgs: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    top, left, h, w, flip = boxes.unbind(dim=1)
    across = _resampling(left, w, imgs.shape[3], width)
    across = torch.where(flip[:, None, None] != 0, across.flip(1), across)
    down = _resampling(top, h, imgs.shape[2], height)
    # Rounded between the passes, as Pillow and PyTorch do with uint8
    rows = _to_pixels(imgs.double() @ across.mT[:, None])
    pixels = _to_pixels(down[:, None] @ rows).to(torch.uint8)
    if dtype == torch.uint8:
        return pixels
    return _normalize_pixels(pixels, scale, shift).to(dtype)


def split_storage(master: Tensor) -> tuple[Tensor, Tensor]:
    bits = master.view(torch.int32)  # int32 arithmetic wraps modulo 2**32
    high = ((bits + 0x8000) >> 16).to(torch.int16)
    remainder = ((bits << 16) >> 16).to(torch.int16)
    return high.view(torch.bfloat16), remainder


def join_storage(high: Tensor, remainder: Tensor) -> Tensor:
    bits = (high.view(torch.int16).to(torch.int32) << 16) + remainder
    return bits.view(torch.float32)


def _masters(tensors: list[Tensor], remainders: list[Tensor]) -> list[Tensor]:
    """The tensors themselves, or the float32 values of split storage."""
    if not remainders:
        return tensors
    return [join_storage(*pair) for pair in zip(tensors, remainders, strict=True)]


def _store(
    masters: list[Tensor], tensors: list[Tensor], remainders: list[Tensor], copies: list[Tensor]
) -> None:
    """Write the masters to where they are not yet: to split storage, or to the copies."""
    for i, master in enumerate(masters):
        if remainders:
            # Only a canonical NaN is sure to be NaN in its high half as well.
            high, remainder = split_storage(master.masked_fill(master.isnan(), math.nan))
            tensors[i].copy_(high)
            remainders[i].copy_(remainder)
        if copies:
            copies[i].copy_(master)


def ema_update_(
    teachers: list[Tensor],
    students: list[Tensor],
    teacher_remainders: list[Tensor],
    student_remainders: list[Tensor],
    teacher_copies: list[Tensor],
    momentum: Tensor,
    skip: Tensor,
) -> None:
    if bool(skip):
        return
    masters = _masters(teachers, teacher_remainders)
    for teacher, student in zip(masters, _masters(students, student_remainders), strict=True):
        teacher.lerp_(student.to(teacher.dtype), 1.0 - float(momentum))
    _store(masters, teachers, teacher_remainders, teacher_copies)


def adamw_ema_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    teachers: list[Tensor],
    param_remainders: list[Tensor],
    teacher_remainders: list[Tensor],
    param_copies: list[Tensor],
    teacher_copies: list[Tensor],
    step: Tensor,
    lr: Tensor,
    momentum: Tensor,
    grad_scale: Tensor,
    clip: Tensor,
    skip: Tensor,
    weight_decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    if bool(skip) or not params:
        return
    step += 1
    rate, factor, count = float(lr), float(grad_scale) * float(clip), int(step)
    correction1, correction2 = 1 - beta1**count, 1 - beta2**count
    masters = _masters(params, param_remainders)
    followers = _masters(teachers, teacher_remainders)
    for i, (p, grad, m, v) in enumerate(zip(masters, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = grad.to(p.dtype) * factor
        p.mul_(1 - rate * float(weight_decay[i]))
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_(math.sqrt(correction2)).add_(eps), value=-rate / correction1)
        if followers:
            followers[i].lerp_(p.to(followers[i].dtype), 1.0 - float(momentum))
    _store(masters, params, param_remainders, param_copies)
    _store(followers, teachers, teacher_remainders, teacher_copies)
