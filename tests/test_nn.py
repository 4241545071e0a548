"""Modules: any size and channel count, published names and sizes, encode, compile, autocast."""

import copy
import math

import pytest
import torch
from torch import nn

from fastmim import MODELS, create_model
from fastmim.nn import Attention, EMATeacher, MaskedAutoencoder, PatchEmbed, sincos_pos_embed
from fastmim.ops import gather_tokens, masks_from_noise
from tests import accuracy


def micro(**kwargs) -> MaskedAutoencoder:
    return create_model("mae_vit_micro_patch4", **{"embed_dim": 64, "depth": 2, **kwargs})


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [16, (8, 20), (20, 8)])
def test_any_rectangle_and_channel_count(size, channels):
    model = micro(img_size=size, in_chans=channels)
    height, width = (size, size) if isinstance(size, int) else size
    patches = height * width // 16
    kept = int(patches * 0.25)
    out = model(torch.randn(2, channels, height, width))
    assert out.pred.shape == (2, patches - kept, 16 * channels)
    assert out.mask.sum(dim=1).tolist() == [patches - kept] * 2
    assert out.ids_keep.shape == (2, kept)
    out.loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_uint8_images_are_normalised_on_the_way(channels):
    mean, std = [0.1 * (c + 1) for c in range(channels)], [0.2 + 0.05 * c for c in range(channels)]
    model = micro(in_chans=channels, pixel_mean=mean, pixel_std=std, norm_pix_loss=True)
    pixels = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
    shape = (channels, 1, 1)
    normal = (pixels.double() / 255 - torch.tensor(mean).double().view(shape)) / torch.tensor(
        std
    ).double().view(shape)
    masks = model.random_masks(2, 0.75, pixels.device)
    got, expected = model(pixels, masks), model(normal.float(), masks)
    accuracy.golden(got.pred.detach(), expected.pred.detach())
    accuracy.golden(got.loss.detach(), expected.loss.detach())


def test_uint8_without_statistics_is_refused():
    model = micro(in_chans=5)
    with pytest.raises(ValueError, match="uint8 images with 5 channels need a mean"):
        model(torch.zeros(1, 5, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected pixel_mean and pixel_std of 5 channels"):
        micro(in_chans=5, pixel_mean=(0.5,), pixel_std=(0.5,))


@pytest.mark.parametrize("shape", [(1, 3, 32, 28), (1, 1, 32, 32), (3, 32, 32)])
def test_wrong_images_are_refused_by_name(shape):
    model = micro()
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 32, 32\), got"):
        model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected images \(B, 3, 32, 32\), got"):
        model.encode(torch.zeros(shape))


def test_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="33 x 32 pixels and patches of 4; 32 x 32 fits"):
        PatchEmbed((33, 32), 4, 3, 8)
    with pytest.raises(ValueError, match="width 10 is not divisible by 4 heads"):
        Attention(10, 4)
    with pytest.raises(ValueError, match="width divisible by 4, got 6"):
        sincos_pos_embed(6, (2, 2))


def test_patch_embedding_is_the_convolution():
    embed = PatchEmbed((8, 12), 4, 3, 16).double()
    imgs = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    ids = torch.arange(6).expand(2, -1)
    accuracy.golden(embed(imgs, ids), embed.proj(imgs).flatten(2).transpose(1, 2))


def test_position_table_of_a_rectangle_is_row_major_and_column_first():
    rows, columns, width = 3, 5, 16
    table = sincos_pos_embed(width, (rows, columns))[0]
    assert not table[0].any()
    for y in range(rows):
        for x in range(columns):
            expected = [
                f(t * 10000 ** (-k / 4))
                for t in (x, y)
                for f in (math.sin, math.cos)
                for k in range(4)
            ]
            formula = torch.tensor(expected, dtype=torch.float64)
            accuracy.golden(table[1 + y * columns + x], formula.float())


def test_encode_sees_every_patch_and_is_deterministic():
    model = micro()
    imgs = torch.randn(2, 3, 32, 32, requires_grad=True)
    features = model.encode(imgs)
    assert features.cls.shape == (2, 64)
    assert features.patch_tokens.shape == (2, 64, 64)
    again = model.encode(imgs)
    accuracy.exact(again.cls, features.cls)
    accuracy.exact(again.patch_tokens, features.patch_tokens)
    features.cls.square().sum().backward()
    blocks = imgs.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum(dim=(1, 4, 5))
    assert (blocks > 0).all()


def test_encoder_does_not_see_masked_patches():
    model = micro()
    imgs = torch.randn(2, 3, 32, 32, requires_grad=True)
    masks = model.random_masks(2, 0.75, imgs.device)
    model.predict(imgs, masks).square().sum().backward()
    blocks = imgs.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum(dim=(1, 4, 5)).flatten(1)
    assert torch.equal(blocks == 0, masks.mask)


def test_full_prediction_holds_the_masked_one():
    model = micro()
    imgs = torch.randn(3, 3, 32, 32)
    masks = model.random_masks(3, 0.75, imgs.device)
    masked = model(imgs, masks)
    full = model(imgs, masks, return_full_pred=True)
    assert full.pred.shape == (3, 64, 48)
    accuracy.golden(gather_tokens(full.pred, masks.ids_masked).detach(), masked.pred.detach())
    accuracy.golden(full.loss.detach(), masked.loss.detach())
    accuracy.exact(full.mask, masks.mask)


def test_masked_patches_alone_carry_the_loss():
    model = micro()
    imgs = torch.randn(2, 3, 32, 32)
    masks = model.random_masks(2, 0.75, imgs.device)
    pred = model.predict(imgs, masks).detach()
    loss = model.loss(pred, imgs, masks).total
    changed = imgs.unfold(2, 4, 4).unfold(3, 4, 4).clone()  # (B, C, h, w, p, p)
    visible = ~masks.mask.view(2, 1, 8, 8, 1, 1)
    changed = torch.where(visible, 7.0, changed).permute(0, 1, 2, 4, 3, 5).reshape(imgs.shape)
    accuracy.exact(model.loss(pred, changed, masks).total, loss)


def test_masks_from_the_global_generator_repeat_with_its_seed():
    model = micro()
    torch.manual_seed(5)
    first = model.random_masks(4, 0.75, torch.device("cpu"))
    torch.manual_seed(5)
    second = masks_from_noise(torch.rand(4, 64), 16)
    accuracy.exact(first.ids_shuffle, second.ids_shuffle)


def test_state_dict_of_vit_b_is_the_published_one():
    with torch.device("meta"):
        state = create_model("mae_vit_base_patch16").state_dict()
    layer = ["weight", "bias"]

    def block(name):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        return [f"{name}.{part}.{tensor}" for part in parts for tensor in layer]

    names = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"]
    names += [f"patch_embed.proj.{t}" for t in layer]
    names += [n for i in range(12) for n in block(f"blocks.{i}")]
    names += [f"{m}.{t}" for m in ("norm", "decoder_embed") for t in layer]
    names += [n for i in range(8) for n in block(f"decoder_blocks.{i}")]
    names += [f"{m}.{t}" for m in ("decoder_norm", "decoder_pred") for t in layer]
    assert len(names) == 254
    assert list(state) == names
    assert state["pos_embed"].shape == (1, 197, 768)
    assert state["decoder_pos_embed"].shape == (1, 197, 512)
    assert state["patch_embed.proj.weight"].shape == (768, 3, 16, 16)
    assert state["blocks.11.attn.qkv.weight"].shape == (2304, 768)
    assert state["decoder_pred.weight"].shape == (768, 512)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("mae_vit_base_patch16", 111.91),
        ("mae_vit_large_patch16", 329.54),
        ("mae_vit_huge_patch14", 657.07),
        ("rc_vit_small_patch16", 25.17),
        ("rc_vit_small_patch16_dec512d8b", 47.58),
        ("mae_vit_small_patch16", 47.58),
        ("rc_vit_tiny_patch16", 6.07),
    ],
)
def test_factory_has_the_published_size(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("patch", "patches", "head"), [(14, 256, 588), (16, 196, 768)])
def test_huge_comes_in_two_patch_sizes(patch, patches, head):
    with torch.device("meta"):
        model = create_model(f"mae_vit_huge_patch{patch}")
    assert (model.num_patches, model.decoder_pred.out_features) == (patches, head)
    assert (len(model.blocks), model.blocks[0].attn.num_heads) == (32, 16)


def test_create_model_suggests_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean mae_vit_base_patch16"):
        create_model("mae_vit_bas_patch16")
    with pytest.raises(TypeError, match="img_sze"):
        create_model("mae_vit_micro_patch4", img_sze=32)
    assert len(create_model("mae_vit_micro_patch4", depth=1).blocks) == 1
    assert MODELS["mae_vit_micro_patch4"]["depth"] == 4  # an argument does not change the table


def test_initialisation_is_that_of_the_papers():
    model = create_model("mae_vit_micro_patch4")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert (module.weight == 1).all()
    bound = math.sqrt(6 / (128 + 48))
    assert 0.9 * bound < model.patch_embed.proj.weight.abs().max() <= bound
    assert model.patch_embed.proj.bias.any()
    assert 0 < model.cls_token.std() < 0.03
    assert 0 < model.mask_token.std() < 0.03
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["pos_embed", "decoder_pos_embed"]


def test_compiled_model_equals_eager():
    eager = micro(norm_pix_loss=True)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    imgs = torch.randn(2, 3, 32, 32)
    masks = eager.random_masks(2, 0.75, imgs.device)
    loss, expected = call(imgs, masks).loss, eager(imgs, masks).loss
    accuracy.exact(loss, expected)
    loss.backward()
    expected.backward()
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        if p.requires_grad:
            accuracy.golden(p.grad, q.grad)


def test_autocast_stays_near_float32():
    model = micro(norm_pix_loss=True)
    imgs = torch.randn(4, 3, 32, 32)
    masks = model.random_masks(4, 0.75, imgs.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(imgs, masks)
    assert out.pred.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    accuracy.scalar(out.loss, model(imgs, masks).loss, torch.bfloat16)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_teacher_is_a_frozen_copy_in_evaluation_mode():
    student = micro().train()
    teacher = EMATeacher(student)
    assert nn.ModuleList([student, teacher]).train() is not None
    assert student.training
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    mine = {p.data_ptr() for p in teacher.parameters()}
    assert not mine & {p.data_ptr() for p in student.parameters()}
    for p, q in zip(teacher.module.parameters(), student.parameters(), strict=True):
        accuracy.exact(p, q.detach())


def test_teacher_moves_every_parameter_by_the_formula():
    student = micro()
    teacher = EMATeacher(student)
    before = {n: p.clone() for n, p in teacher.module.named_parameters()}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    teacher.update_(student, 0.75)
    for name, (mine, theirs) in teacher.pairs(student).items():
        formula = 0.75 * before[name].double() + 0.25 * theirs.detach().double()
        accuracy.golden(mine, formula.float())


def test_teacher_of_another_student_is_refused_by_name():
    teacher = EMATeacher(micro())
    with pytest.raises(ValueError, match=r"differ in 5 parameters: pos_embed, .*decoder_pred"):
        teacher.update_(micro(patch_size=8), 0.9)
    with pytest.raises(ValueError, match=r"differ in 12 parameters: blocks.1.norm1.weight"):
        teacher.update_(micro(depth=1), 0.9)


def test_masks_of_another_batch_are_refused():
    model = micro()
    masks = model.random_masks(3, 0.75, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"expected masks for \(2, \d+\) \(images, patches\)"):
        model(torch.zeros(2, 3, 32, 32), masks)


def test_norm_pix_needs_two_values_in_a_patch():
    with pytest.raises(ValueError, match="norm_pix_loss needs patches of at least two values"):
        micro(patch_size=1, in_chans=1, norm_pix_loss=True)
