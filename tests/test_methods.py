"""MAE and RC-MAE as methods: what they compute, where gradients flow, what they refuse."""

import copy

import pytest
import torch

from fastmim import MAE, METHODS, RCMAE, SdAE, create_model
from fastmim.methods import Clock, cosine_momentum
from fastmim.ops import num_keep
from fastmim.train import Recipe
from fastmim.train.build import build_autoencoder, build_method
from tests import accuracy


def micro(**kwargs):
    return create_model("mae_vit_micro_patch4", embed_dim=64, depth=2, norm_pix_loss=True, **kwargs)


def build(name, drop_path=0.0, **kwargs):
    return METHODS[name](micro(**METHODS[name].student_options(drop_path)), **kwargs)


@pytest.fixture
def imgs():
    return torch.randn(2, 3, 32, 32)


def perturbed(method: RCMAE) -> RCMAE:
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return method


def test_mae_loss_is_that_of_its_model(imgs):
    method = MAE(micro())
    masks = method.student.random_masks(2, 0.75, imgs.device)
    losses = method(imgs, masks)
    accuracy.exact(losses.total, method.student(imgs, masks).loss)
    assert list(losses.terms) == ["pixel"]
    assert not losses.terms["pixel"].requires_grad
    assert method.teacher is None
    with pytest.raises(ValueError, match="MAE has no teacher"):
        method.teacher_momentum(Clock(2, 2, 2))
    with pytest.raises(ValueError, match="MAE is trained in one stage"):
        method.begin_stage(1)


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_drawn_with_the_ratio_of_the_method(name, imgs, monkeypatch):
    method = build(name, mask_ratio=0.5, **({"folds": 4} if name == "sdae" else {}))
    seen = []
    predict = method.student.predict
    monkeypatch.setattr(
        method.student,
        "predict",
        lambda imgs, masks, **more: seen.append(masks) or predict(imgs, masks, **more),
    )
    torch.manual_seed(1)
    first = method(imgs).total
    torch.manual_seed(1)
    accuracy.exact(method(imgs).total, first)
    assert seen[0].num_keep == num_keep(64, 0.5) == 32


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.999, float("nan")])
def test_ratio_without_visible_or_masked_patches_is_refused_at_construction(name, ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        build(name, mask_ratio=ratio)


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_drawn_without_seeding_gpus_or_leaving_a_seed(name, monkeypatch):
    def refuse(_seed):
        raise AssertionError("a generator of a GPU is seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    before = torch.random.get_rng_state()
    recipe = Recipe(model="rc_vit_micro_patch8", img_size=32, norm_pix=name == "mae", seed=2**40)
    method = build_method(name, recipe, build_autoencoder(name, recipe, 1, (0.5,), (0.5,)))
    if method.has_stages:
        method.begin_stage(1)
    accuracy.exact(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_momentum_outside_the_unit_interval_is_refused(momentum):
    with pytest.raises(ValueError, match=r"expected momentum in \[0, 1\] and a finite gamma"):
        RCMAE(micro(), momentum=momentum)


def test_rc_mae_total_is_the_weighted_sum_of_its_terms(imgs):
    method = perturbed(RCMAE(micro(), gamma=0.3))
    masks = method.student.random_masks(2, 0.75, imgs.device)
    losses = method(imgs, masks)
    pixel, consistency = losses.terms["pixel"], losses.terms["consistency"]
    accuracy.golden(losses.total.detach(), pixel + 0.3 * consistency)
    student, teacher = (
        m.predict(imgs, masks).detach() for m in (method.student, method.teacher.module)
    )
    accuracy.golden(consistency, (student - teacher).square().mean())
    accuracy.exact(pixel, method.student(imgs, masks).loss.detach())


def test_copied_teacher_agrees_with_its_student(imgs):
    losses = RCMAE(micro())(imgs)
    assert losses.terms["consistency"] == 0
    accuracy.exact(losses.total.detach(), losses.terms["pixel"])


def test_gradient_flows_through_the_student_only(imgs):
    method = perturbed(RCMAE(micro())).train()
    method(imgs).total.backward()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    assert all(p.grad is None for p in method.teacher.parameters())
    assert not method.teacher.module.training


@pytest.mark.parametrize("name", METHODS)
def test_images_of_any_shape_and_channels(name):
    options = METHODS[name].student_options(0.3)
    method = METHODS[name](micro(img_size=(16, 32), in_chans=5, **options))
    losses = method(torch.randn(2, 5, 16, 32))
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    if method.teacher is not None:
        assert all(p.grad is None for p in method.teacher.parameters())
        assert not method.train().teacher.module.training


@pytest.mark.parametrize("folds", [-1, 5, 7, 49])
def test_folds_that_do_not_divide_the_masked_patches_are_refused(folds):
    with pytest.raises(ValueError, match=rf"SdAE: {folds} folds do not divide 48 .* 1, 2, 3, 4, 6"):
        build("sdae", folds=folds)


@pytest.mark.parametrize("folds", [0, 1, 2, 3, 48])
def test_patches_of_a_fold_see_no_other_fold(folds, imgs):
    method = build("sdae", folds=folds)
    masks = method.masks_for(imgs)
    target = method.teach(imgs, masks)
    assert target.shape == ((2 * folds, 48 // folds, 64) if folds else (2, 64, 64))
    y, x = divmod(int(masks.ids_masked[0, 0]), 8)  # of the first image, in its first fold
    changed = imgs.clone()
    changed[0, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 1.0
    moved = (method.teach(changed, masks) != target).any(dim=2).any(dim=1)
    assert moved.tolist() == [True] + [False] * (len(target) - 1)


@pytest.mark.parametrize("name", ["momentum", "momentum_end", "momentum_start"])
def test_sdae_momentum_outside_the_unit_interval_is_refused(name):
    with pytest.raises(ValueError, match=rf"SdAE: expected {name} in \[0, 1\], got 1.5"):
        build("sdae", **{name: 1.5})


@pytest.mark.parametrize("options", [dict(momentum_warmup_epochs=-1), dict(teacher_every=0)])
def test_sdae_refuses_counts_that_are_none(options):
    with pytest.raises(ValueError, match="momentum_warmup_epochs of at least 0 and teacher_every"):
        build("sdae", **options)


def test_sdae_teacher_starts_from_its_own_weights_or_from_the_students():
    student = micro(target="features")
    own = SdAE(student).teacher.module
    assert not torch.equal(own.pos_embed, student.pos_embed)
    again, other = (SdAE(student, seed=seed).teacher.module.pos_embed for seed in (0, 1))
    accuracy.exact(again, own.pos_embed)
    assert not torch.equal(other, own.pos_embed)
    copied = SdAE(student, teacher_init="student").teacher
    assert all(torch.equal(mine, theirs) for mine, theirs in copied.pairs(student).values())
    with pytest.raises(ValueError, match=r"differ in \d+ parameters: pos_embed"):
        copied.pairs(micro(target="features", patch_size=8))


def test_dbot_student_of_another_depth_than_its_first_stage_is_refused():
    with pytest.raises(ValueError, match=r"expected a student of stage_depths\[0\] = 3 blocks"):
        build("dbot", stage_depths=(3, 2))


def test_stochastic_depth_needs_training_mode_and_fitting_draws(imgs):
    model = micro(drop_path=0.5, decoder_drop_path=0.5)
    masks = model.random_masks(2, 0.75, imgs.device)
    assert model.num_draws == 4  # two blocks each, the first with rate 0
    first, second = (model.predict(imgs, masks, draws=torch.full((2, 4), u)) for u in (0.4, 0.6))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    drawn = model.predict(imgs, masks)
    torch.manual_seed(3)
    accuracy.exact(model.predict(imgs, masks), drawn)
    with pytest.raises(ValueError, match=r"expected draws \(B, 4\), got \(2, 3\)"):
        model.predict(imgs, masks, draws=torch.rand(2, 3))
    plain = micro()
    plain.load_state_dict(model.state_dict())
    accuracy.exact(model.eval().predict(imgs, masks), plain.predict(imgs, masks))
    with pytest.raises(ValueError, match=r"drop_path: expected a rate in \[0, 1\), got 1.0"):
        micro(drop_path=1.0)


def test_update_teacher_follows_the_student(imgs):
    method = RCMAE(micro(), momentum=0.9)
    before = copy.deepcopy(method.teacher.module.state_dict())
    with torch.no_grad():
        method.student.decoder_pred.weight.add_(1.0)
    method.update_teacher()
    moved = method.teacher.module.decoder_pred.weight - before["decoder_pred.weight"]
    accuracy.scalar(moved.mean(), 0.1, torch.float32)
    method.update_teacher(momentum=0.0)
    accuracy.golden(
        method.teacher.module.decoder_pred.weight, method.student.decoder_pred.weight.detach()
    )


def test_momentum_rises_to_one_along_a_cosine():
    method = RCMAE(micro(), momentum=0.996)
    values = [method.teacher_momentum(Clock(i, 4, 25)) for i in range(101)]
    for step, expected in ((0, 0.996), (50, 0.998), (100, 1.0)):
        accuracy.scalar(values[step], expected, torch.float32)
    assert values == sorted(values)
    assert cosine_momentum(0.5, 1.0) == 1.0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_compiled_method_equals_eager(name, drop_path, imgs):
    torch.compiler.reset()
    eager = build(name, drop_path)
    if name == "rc_mae":
        perturbed(eager)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    masks = eager.student.random_masks(2, 0.75, imgs.device)
    draws = torch.rand(2, eager.student.num_draws)
    losses, expected = call(imgs, masks, draws=draws), eager(imgs, masks, draws=draws)
    accuracy.golden(losses.total.detach(), expected.total.detach())
    for term, value in expected.terms.items():
        accuracy.golden(losses.terms[term], value)
    losses.total.backward()
    expected.total.backward()
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            accuracy.golden(p.grad, q.grad)


@pytest.mark.parametrize("name", METHODS)
def test_autocast_stays_near_float32(name, imgs):
    method = build(name)
    masks = method.student.random_masks(2, 0.75, imgs.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method(imgs, masks)
    losses.total.backward()
    assert losses.total.dtype == torch.float32
    accuracy.scalar(losses.total, method(imgs, masks).total, torch.bfloat16)


def saved_bytes(forward) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, parameters too."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()  # kept alive, so that no address is used twice
    assert loss.requires_grad
    return sum(storages.values())


def test_loss_keeps_less_for_backward_than_plain_pytorch():
    model = micro()
    imgs = torch.randn(16, 3, 32, 32)
    masks = model.random_masks(16, 0.75, imgs.device)
    every = model.predict(imgs, masks, full=True).detach().requires_grad_()
    target = torch.randn_like(every)
    teacher = torch.randn_like(every)

    def plain():
        weight = masks.mask.float()
        pixel = ((every - target) ** 2).mean(dim=-1)
        consistency = ((every - teacher) ** 2).mean(dim=-1)
        return ((pixel + consistency) * weight).sum() / weight.sum()

    pred = every[:, : 64 - masks.num_keep].detach().requires_grad_()
    ours = saved_bytes(
        lambda: model.loss(pred, imgs, masks, teacher_pred=torch.randn_like(pred)).total
    )
    assert ours < saved_bytes(plain)
