"""The stand-ins for the authors' model files, called as the authors' scripts call them."""

import copy
import inspect
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn

from fastmim import DBOT, MAE, RCMAE, SdAE, create_model
from fastmim.compat import models_dbot, models_mae, models_rc, models_sdae
from fastmim.nn import MaskedAutoencoder
from fastmim.ops import masks_from_shuffle
from tests import accuracy

# (32, 8, 3, 64, 2, 2, 32, 1, 1, 4.0, norm_layer, norm_pix_loss): the authors' positional order
SIZES = (32, 8, 3, 64, 2, 2, 32, 1, 1, 4.0, partial(nn.LayerNorm, eps=1e-6))
MODULES = [models_mae, models_rc, models_dbot, models_sdae]
CLASSES = [module.MaskedAutoencoderViT for module in MODULES]


def build(cls, state, norm_pix, **kwargs):
    model = cls(*SIZES, norm_pix, **kwargs)
    model.load_state_dict(state)
    return model


def part(recorded, prefix):
    return {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}


def feed_noise(monkeypatch, noise):
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: noise.to(device))


def assert_gradients(model, recorded):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            accuracy.golden(parameter.grad, recorded[name])


@pytest.mark.parametrize("source", ["torch.rand", "ids_shuffle"])
@pytest.mark.parametrize("name", ["mae_pix", "mae_normpix"])
def test_mae_returns_the_recorded_loss_prediction_and_mask(name, source, golden_file, monkeypatch):
    recorded = golden_file(name)
    model = build(CLASSES[0], part(recorded, "model."), name == "mae_normpix")
    given = {}
    if source == "torch.rand":
        feed_noise(monkeypatch, recorded["noise"])
    else:
        given = {"ids_shuffle": recorded["ids_shuffle"]}
    loss, pred, mask = model(recorded["imgs"], mask_ratio=0.75, **given)
    accuracy.golden(loss.reshape(1), recorded["loss"])
    accuracy.golden(pred, recorded["pred"])
    accuracy.exact(mask, recorded["mask"])
    loss.backward()
    assert_gradients(model, part(recorded, "grad."))


def test_mae_helpers_return_the_recorded_values(golden_file, monkeypatch):
    recorded = golden_file("mae_normpix")
    model = build(CLASSES[0], part(recorded, "model."), True)
    feed_noise(monkeypatch, recorded["noise"])
    imgs = recorded["imgs"]
    latent, mask, ids_restore = model.forward_encoder(imgs, 0.75)
    accuracy.golden(latent, recorded["latent"])
    accuracy.exact(ids_restore, recorded["ids_restore"])
    pred = model.forward_decoder(latent, ids_restore)
    accuracy.golden(pred, recorded["pred"])
    accuracy.golden(model.forward_loss(imgs, pred, mask).reshape(1), recorded["loss"])
    accuracy.exact(model.patchify(imgs), recorded["patches"])
    accuracy.exact(model.unpatchify(recorded["patches"]), imgs)
    tokens, mask, ids_restore = model.random_masking(recorded["patches"], 0.75)
    accuracy.exact(mask, recorded["mask"])
    expected = torch.stack(
        [p[i] for p, i in zip(recorded["patches"], recorded["ids_keep"], strict=True)]
    )
    accuracy.exact(tokens, expected)


def test_rc_mae_as_the_training_loop_calls_it(golden_file, monkeypatch):
    recorded = golden_file("rc_mae")
    student = build(CLASSES[1], part(recorded, "model."), True, compute_loss=True)
    teacher = build(CLASSES[1], part(recorded, "teacher."), True, compute_loss=False).eval()
    feed_noise(monkeypatch, recorded["noise"])
    loss, pred, mask, ids_shuffle = student(recorded["imgs"], 0.75)
    accuracy.golden(loss.reshape(1), recorded["s_loss"])
    accuracy.exact(ids_shuffle, recorded["ids_shuffle"])
    with torch.no_grad():
        teacher_pred = teacher(recorded["imgs"], 0.75, ids_shuffle=ids_shuffle)
    accuracy.golden(teacher_pred, recorded["teacher_pred"])
    consistency = ((pred - teacher_pred) ** 2).mean(dim=-1)
    consistency = (consistency * mask).sum() / mask.sum()
    accuracy.golden(consistency.reshape(1), recorded["consistency_loss"])
    (loss + consistency).backward()
    assert_gradients(student, part(golden_file("rc_mae_grads"), "grad."))


@pytest.mark.parametrize("source", ["torch.rand", "ids_shuffle"])
@pytest.mark.parametrize("tlayernorm", [0, 1])
def test_dbot_as_the_training_loop_calls_it(source, tlayernorm, golden_file, monkeypatch):
    recorded = golden_file("dbot")
    student = models_dbot.MaskedAutoencoderViT(*SIZES, norm_feature_loss=True)
    student.load_state_dict(part(recorded, "model."))
    teacher = models_dbot.MaskedAutoencoderViT(*SIZES[:7], decoder_depth=0, norm_layer=SIZES[-1])
    teacher.load_state_dict(part(recorded, "teacher."))
    given = {"ids_shuffle": recorded["ids_shuffle"]} if source == "ids_shuffle" else {}
    feed_noise(monkeypatch, recorded["noise"])
    wrapped = nn.ModuleDict({"module": teacher})  # as DistributedDataParallel names it
    for of in (teacher, wrapped):
        loss, pred, mask = student(
            recorded["imgs"], of, mask_ratio=0.75, tlayernorm=tlayernorm, **given
        )
        name = "loss_target_final_norm" if tlayernorm else "loss"
        accuracy.golden(loss.reshape(1), recorded[name])
    accuracy.golden(pred, recorded["pred"])
    accuracy.exact(mask, recorded["mask"])
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    if not tlayernorm:
        assert_gradients(student, part(golden_file("dbot_grads"), "grad."))


@pytest.mark.parametrize("source", ["torch.rand", "ids_shuffle"])
def test_sdae_as_the_training_loop_calls_it(source, golden_file, monkeypatch):
    recorded = golden_file("sdae")
    student = models_sdae.MaskedAutoencoderViT(*SIZES)
    student.load_state_dict(part(recorded, "model."))
    teacher = models_sdae.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2
    )
    teacher.load_state_dict(part(recorded, "teacher."))
    given = {"ids_shuffle": recorded["ids_shuffle"]} if source == "ids_shuffle" else {}
    feed_noise(monkeypatch, recorded["noise"])
    imgs = recorded["imgs"]
    pred, mask, ids_unkeep = student(imgs, 0.75, **given)
    accuracy.golden(pred, recorded["pred"])
    accuracy.exact(mask, recorded["mask"])
    accuracy.exact(ids_unkeep, recorded["ids_mask"])
    accuracy.golden(teacher(imgs, ids_unkeep, 12, 3), recorded["teacher_output"])
    assert teacher(imgs, ids_unkeep).shape == (3, 16, 64)
    for name, count, folds in (
        ("single_fold.target", 12, None),
        ("truncated.target_folds", int(recorded["truncated.shrink_num"]), 3),
    ):
        tokens = teacher(imgs, ids_unkeep, count, folds)
        variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
        accuracy.golden((tokens - mean) / (variance + 1e-6).sqrt(), recorded[name])


def test_constructors_take_the_published_positions_and_defaults():
    published = dict(
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_layer=nn.LayerNorm,
        norm_pix_loss=False,
    )
    sizes = {name: value for name, value in published.items() if name != "norm_pix_loss"}
    for cls, expected in (
        (CLASSES[0], published),
        (CLASSES[1], {**published, "compute_loss": True}),
        (CLASSES[2], {**sizes, "norm_feature_loss": False, "drop_path_rate": 0.0}),
        (CLASSES[3], {**sizes, "drop_path": 0.0, "norm_pix_loss": False}),
    ):
        found = {n: p.default for n, p in inspect.signature(cls).parameters.items()}
        assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("module", "name", "millions"),
    [
        (models_mae, "mae_vit_base_patch16", 111.91),
        (models_mae, "mae_vit_large_patch16", 329.54),
        (models_mae, "mae_vit_huge_patch14", 657.07),
        (models_mae, "mae_vit_base_patch16_dec512d8b", 111.91),
        (models_mae, "mae_vit_large_patch16_dec512d8b", 329.54),
        (models_mae, "mae_vit_huge_patch14_dec512d8b", 657.07),
        (models_rc, "rc_vit_tiny_patch16", 6.07),
        (models_rc, "rc_vit_tiny_patch16_dec128d2b", 6.07),
        (models_rc, "rc_vit_small_patch16", 25.17),
        (models_rc, "rc_vit_small_patch16_dec256d4b", 25.17),
        (models_rc, "rc_vit_small_patch16_dec512d8b", 47.58),
        (models_rc, "rc_vit_base_patch16", 111.91),
        (models_rc, "rc_vit_base_patch16_dec512d8b", 111.91),
        (models_rc, "rc_vit_large_patch16", 329.54),
        (models_rc, "rc_vit_large_patch16_dec512d8b", 329.54),
        (models_rc, "rc_vit_huge_patch14", 657.07),
        (models_rc, "rc_vit_huge_patch14_dec512d8b", 657.07),
    ],
)
def test_factory_has_the_published_size_and_eps(module, name, millions):
    with torch.device("meta"):
        model = module.__dict__[name](norm_pix_loss=True)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert type(model) is module.MaskedAutoencoderViT
    assert model.norm_pix_loss
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        (module, f"mae_vit_{size}", shape)
        for module in (models_dbot, models_sdae)
        for size, shape in (
            ("base_patch16", (768, 12, 512, 8)),
            ("base_patch16_dec512d8b", (768, 12, 512, 8)),
            ("large_patch16", (1024, 24, 512, 8)),
            ("huge_patch14", (1280, 32, 512, 8)),
            ("small_patch16", (384, 12, 512, 8)),
            ("base_patch16_dec512d2b", (768, 12, 512, 2)),
            ("base_patch16_dec512d4b", (768, 12, 512, 4)),
            ("base_patch16_dec512d6b", (768, 12, 512, 6)),
        )
        if module is models_sdae or "small" not in size
        if module is models_sdae or size[-3:] not in ("d2b", "d4b", "d6b")
    ],
)
def test_factory_of_a_network_that_predicts_features(module, name, shape):
    with torch.device("meta"):
        model = module.__dict__[name]()
    assert shape == (
        model.embed_dim, len(model.blocks), model.decoder_embed.out_features,
        len(model.decoder_blocks),
    )  # fmt: skip
    assert model.head.out_features == model.embed_dim
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("module", MODULES)
def test_factories_are_found_by_their_names(module):
    """As ``getattr(module, args.model)`` and pickle find them."""
    names = [name for name in vars(module) if re.match(r"(mae_|rc_)?vit_", name)]
    assert len(names) >= 6
    for name in names:
        made = getattr(module, name)
        assert pickle.loads(pickle.dumps(made)) is made
        assert made.__name__ == name or made.__name__.startswith(f"{name}_dec")


@pytest.mark.parametrize("name", ["small_patch16", "base_patch16", "large_patch16", "huge_patch14"])
def test_sdae_teacher_has_the_encoder_of_its_student(name):
    with torch.device("meta"):
        teacher = models_sdae.__dict__[f"vit_{name}"]()
        student = models_sdae.__dict__[f"mae_vit_{name}"]()
    for key, tensor in teacher.state_dict().items():
        assert student.state_dict()[key].shape == tensor.shape


@pytest.mark.parametrize(("method", "cls"), [(DBOT, CLASSES[2]), (SdAE, CLASSES[3])])
def test_library_methods_train_networks_that_predict_features(method, cls):
    model = cls(*SIZES)
    plain = MaskedAutoencoder(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, decoder_embed_dim=32,
        decoder_depth=1, decoder_num_heads=1, target=method.target,
    )  # fmt: skip
    plain.load_state_dict(model.state_dict())
    assert list(model.state_dict()) == list(plain.state_dict())
    imgs = torch.randn(2, 3, 32, 32)
    masks = masks_from_shuffle(torch.rand(2, 16).argsort(dim=1), 4)
    accuracy.exact(method(model)(imgs, masks).total, method(plain)(imgs, masks).total)


@pytest.mark.parametrize("cls", CLASSES[:2])
def test_state_dict_is_that_of_the_library(cls):
    ours = MaskedAutoencoder(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, decoder_embed_dim=32,
        decoder_depth=1, decoder_num_heads=1,
    )  # fmt: skip
    theirs = cls(*SIZES)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("cls", CLASSES[:2])
def test_library_methods_train_it(cls):
    model = cls(*SIZES, True)
    plain = create_model(
        "mae_vit_micro_patch4", patch_size=8, embed_dim=64, depth=2, num_heads=2,
        decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=1, norm_pix_loss=True,
    )  # fmt: skip
    plain.load_state_dict(model.state_dict())
    imgs = torch.randn(2, 3, 32, 32)
    masks = masks_from_shuffle(torch.rand(2, 16).argsort(dim=1), 4)
    for method in (MAE, RCMAE):
        accuracy.exact(method(model)(imgs, masks).total, method(plain)(imgs, masks).total)
    accuracy.exact(model.encode(imgs).patch_tokens, plain.encode(imgs).patch_tokens)
    accuracy.exact(copy.deepcopy(model).predict(imgs, masks), plain.predict(imgs, masks))


def test_no_masking_encodes_whole_images():
    model = CLASSES[0](*SIZES)
    imgs = torch.randn(2, 3, 32, 32)
    order = torch.arange(16).expand(2, -1)
    latent, mask, ids_restore = model.forward_encoder(imgs, 0, ids_shuffle=order)
    accuracy.exact(latent[:, 1:], model.encode(imgs).patch_tokens)
    assert not mask.any()
    assert model.forward_decoder(latent, ids_restore).shape == (2, 16, 192)
    with pytest.raises(ValueError, match="mask_ratio"):
        model(imgs, 0)


def test_overridden_methods_are_the_ones_that_run():
    class Custom(models_mae.MaskedAutoencoderViT):
        def random_masking(self, x, mask_ratio):  # the first patches stay
            kept = int(x.shape[1] * (1 - mask_ratio))
            ids_restore = torch.arange(x.shape[1]).expand(len(x), -1)
            return x[:, :kept], (ids_restore >= kept).float(), ids_restore

        def forward_loss(self, imgs, pred, mask):
            return (pred * mask[..., None]).sum()

    model = Custom(*SIZES)
    loss, pred, mask = model(torch.randn(2, 3, 32, 32))
    assert mask.tolist() == [[0.0] * 4 + [1.0] * 12] * 2
    accuracy.exact(loss, (pred * mask[..., None]).sum())


def test_rectangular_images():
    model = models_mae.MaskedAutoencoderViT((16, 32), *SIZES[1:])
    imgs = torch.randn(2, 3, 16, 32)
    loss, pred, mask = model(imgs)
    assert pred.shape == (2, 8, 192)
    assert mask.sum(dim=1).tolist() == [6, 6]
    assert loss.isfinite()
    accuracy.exact(model.unpatchify(model.patchify(imgs)), imgs)
    accuracy.exact(torch.tensor(model.num_patches), torch.tensor(8))


def test_uint8_images_are_normalised_in_the_loss_too():
    model = models_mae.MaskedAutoencoderViT(*SIZES, True)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    order = torch.rand(2, 16).argsort(dim=1)
    normal = (pixels.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    loss, _, _ = model(pixels, ids_shuffle=order)
    expected, _, _ = model(normal.float(), ids_shuffle=order)
    accuracy.golden(loss.detach(), expected.detach())
