"""dBOT's teachers of other sizes and from elsewhere."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmim import DBOT, create_model
from fastmim.cli import main
from fastmim.methods import METHODS
from fastmim.nn import FrozenTeacher, resize_pos_embed
from fastmim.train import Engine, Trainer
from fastmim.train.build import load_teacher, restore_run
from fastmim.train.checkpoint import CheckpointError
from tests import accuracy
from tests.test_stages import assert_same_run
from tests.training import MODELS, arguments, pretrain, recipe

MODELS["nano_wide"] = {**MODELS["nano"], "embed_dim": 48, "depth": 2}
MODELS["nano_coarse"] = {**MODELS["nano"], "embed_dim": 64, "patch_size": 8}
MODELS["nano_fine"] = {**MODELS["nano"], "img_size": 24}


class Convolutions(nn.Module):
    """Stands in for a ViT of another library."""

    def __init__(self, width: int, patch_size: int, with_cls: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)
        self.with_cls = with_cls


def tokens_of(module: Convolutions, imgs: torch.Tensor) -> torch.Tensor:
    tokens = module.proj(imgs).flatten(2).transpose(1, 2)
    return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], 1) if module.with_cls else tokens


def student(**options):
    return create_model("nano", target="tokens", **options)


def of_digits(**options):
    return student(in_chans=1, **options)


def saved_run(folder, model="nano_wide", method="rc_mae"):
    Trainer(pretrain(folder, method=method, recipe=recipe(model=model), stop_after=2)).run()
    return folder / "run"


@pytest.mark.parametrize("method", METHODS)
def test_teacher_of_a_run_gives_the_features_of_its_best_encoder(tmp_path, method):
    path = saved_run(tmp_path, method=method)
    teacher, model = load_teacher(path, of_digits()), restore_run(path)[1]
    imgs = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    expected = model.best_encoder().eval().encode_image(imgs, final_norm=False)
    accuracy.exact(teacher(imgs, of_digits()), expected)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().module.training


def test_teacher_with_another_patch_size_sees_resized_images(tmp_path):
    teacher = load_teacher(saved_run(tmp_path, "nano_coarse"), of_digits())
    assert teacher.module.patch_embed.img_size == (32, 32)
    assert teacher(torch.randn(2, 1, 16, 16), of_digits()).shape == (2, 17, 64)


def test_position_table_of_the_teacher_is_interpolated(tmp_path):
    path = saved_run(tmp_path, "nano_fine")
    teacher = load_teacher(path, of_digits())
    table = restore_run(path)[1].best_encoder().pos_embed
    expected = resize_pos_embed(table, (6, 6), (4, 4))
    accuracy.exact(teacher.module.pos_embed.detach(), expected.detach())
    with pytest.raises(ValueError, match=r"expected a table \(1, 26, D\) for 5 x 5"):
        resize_pos_embed(table, (5, 5), (4, 4))


def test_stages_mix_teachers_and_resume_exactly(tmp_path):
    path = saved_run(tmp_path / "larger")
    chosen = recipe(
        epochs=3,
        warmup_epochs=0,
        stage_epochs=(0, 1, 2, 3),
        stage_depths=(1, 1, 2),
        teachers=("own", "own", str(path)),
    )
    run = partial(pretrain, method="dbot", recipe=chosen)
    Trainer(run(tmp_path / "a")).run()
    for stop in (7, 15, None):
        trainer = Trainer(run(tmp_path / "b", stop_after=stop))
        trainer.run()
    assert trainer.method.student.head.out_features == 48
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")


@pytest.mark.parametrize("teachers", [("{}",), ("own", "{}")])
def test_run_is_evaluated_without_the_files_of_its_teachers(tmp_path, capsys, teachers):
    path = saved_run(tmp_path / "larger", "nano_coarse")
    named = tuple(name.format(path) for name in teachers)
    chosen = recipe(epochs=2, stage_epochs=(0, 1, 2), teachers=named)
    Trainer(pretrain(tmp_path, method="dbot", recipe=chosen)).run()
    method = restore_run(tmp_path / "run")[1]
    imgs = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    expected = method.teach(imgs, None)
    if len(teachers) == 2:
        accuracy.exact(expected, load_teacher(path, of_digits())(imgs, of_digits()))
    shutil.rmtree(tmp_path / "larger")
    accuracy.exact(restore_run(tmp_path / "run")[1].teach(imgs, None), expected)
    assert main(["knn", str(tmp_path / "run"), "--eval.limit=60", "--eval.k=3"]) == 0
    assert "teacher" in capsys.readouterr().out


def test_networks_of_other_patch_sizes_are_compared(tmp_path, capsys):
    path = saved_run(tmp_path / "larger", "nano_coarse")
    options = ["--method=dbot", f"--recipe.teachers=[{path}]", "--eval.knn_at_end=true"]
    options += ["--recipe.epochs=1", "--eval.limit=60", "--eval.k=3"]
    assert main(arguments(tmp_path, *options)) == 0
    at_end = capsys.readouterr().out
    for name in ("teacher", "student", "untrained network", "raw pixels, 16 x 16"):
        assert f"  {name:24}" in at_end
    assert main(["knn", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == at_end
    assert main(["linear", str(tmp_path / "run"), "--eval.limit=300"]) == 0


def test_run_does_not_go_on_with_a_teacher_that_has_changed(tmp_path):
    path = saved_run(tmp_path / "larger")
    later = recipe(stage_epochs=(0, 2, 4), teachers=("own", str(path)))
    Trainer(pretrain(tmp_path, method="dbot", recipe=later, stop_after=1)).run()
    Trainer(pretrain(tmp_path, method="dbot", recipe=later))
    trained = recipe(model="nano_wide")
    Trainer(pretrain(tmp_path / "larger", recipe=trained, stop_after=3)).run()
    with pytest.raises(CheckpointError, match=r"differ in\n  teachers: checkpoint \['own', "):
        Trainer(pretrain(tmp_path, method="dbot", recipe=later))


def test_width_of_the_teacher_needs_projection(tmp_path):
    path = saved_run(tmp_path / "larger")
    method = DBOT(of_digits(), teachers=[load_teacher(path, of_digits())])
    assert method.student.head.out_features == 48
    later = dict(stage_epochs=(0, 2, 4), teachers=("own", str(path)))
    chosen = recipe(**later, projection=False)
    with pytest.raises(ValueError, match=r"gives 48 features, the student predicts 32; allow proj"):
        Trainer(pretrain(tmp_path, method="dbot", recipe=chosen))
    DBOT(of_digits(target_dim=48), teachers=[load_teacher(path, of_digits())], projection=False)


def test_width_of_a_later_own_teacher_is_checked_at_the_start():
    teacher = FrozenTeacher(Convolutions(48, 4, True), tokens_of)
    options = dict(teachers=[teacher, None], projection=False)
    refusal = r"gives 32 features, the student predicts 48; allow proj"
    with pytest.raises(ValueError, match=refusal):
        DBOT(student(target_dim=48), **options)
    method = DBOT(student(target_dim=48), **{**options, "teachers": [teacher]})
    stages = recipe(stage_epochs=(0, 2, 4))
    with pytest.raises(ValueError, match=refusal):
        Engine(method, stages, precision="fp32", steps_per_epoch=2)
    Engine(method, recipe(), precision="fp32", steps_per_epoch=2)
    method = DBOT(student(target_dim=48), **{**options, "teachers": [teacher, teacher]})
    Engine(method, stages, precision="fp32", steps_per_epoch=2).begin_stage(1)


@pytest.mark.parametrize("with_cls", [True, False])
@pytest.mark.parametrize(("patch_size", "img_size"), [(4, None), (2, (8, 8)), (7, (28, 28))])
def test_any_module_teaches(with_cls, patch_size, img_size):
    module = Convolutions(40, patch_size, with_cls)
    teacher = FrozenTeacher(module, tokens_of, img_size=img_size)
    method = DBOT(student(), teachers=[teacher])
    imgs = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    loss = method(imgs).total
    loss.backward()
    assert loss.isfinite()
    assert method.teach(imgs, None).shape == (2, 16 + with_cls, 40)
    assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    method.begin_stage(1)  # then its own
    assert method.student.head.out_features == 32


def test_teacher_sees_images_normalised_as_the_students():
    seen = []
    module = Convolutions(40, 4, True)
    teacher = FrozenTeacher(module, lambda m, imgs: seen.append(imgs) or tokens_of(m, imgs))
    method = DBOT(student(), teachers=[teacher])
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    method.teach(pixels, None)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    accuracy.golden(seen[-1], expected.float())


@pytest.mark.parametrize("size", [16, 32])
def test_encoder_normalises_pixels_by_its_own_statistics(size):
    own = dict(in_chans=1, pixel_mean=(0.9,), pixel_std=(0.5,))
    patches = dict(img_size=size, patch_size=size // 4)
    encoder = create_model("nano", **own, **patches).fresh_encoder()
    teacher = FrozenTeacher(encoder, img_size=(size, size))
    pixels = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    found = teacher(pixels, of_digits(pixel_mean=(0.2,), pixel_std=(0.1,)))
    accuracy.golden(found, teacher((pixels.double() / 255 - 0.9).float() / 0.5, of_digits()))


def test_teacher_is_moved_to_the_device_of_the_student():
    def features(module, imgs):
        assert imgs.device == module.proj.weight.device
        return tokens_of(module, imgs)

    teachers = [FrozenTeacher(Convolutions(40, 4, True), features) for _ in range(2)]
    method = DBOT(student().to("meta"), teachers=teachers)
    assert {p.device.type for p in method.parameters()} == {"meta"}
    assert method.student.head.out_features == 40


def test_teacher_with_other_patches_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"expected features \(B, 16 or 17, D\).*give img_size"):
        DBOT(student(), teachers=[FrozenTeacher(Convolutions(32, 8, True), tokens_of)])


class Returns(nn.Module):
    """Gives what it is told to, as ViTs of other libraries do."""

    def __init__(self, output, **attributes) -> None:
        super().__init__()
        self.output = output
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, imgs):
        return self.output


class TimmLike(Returns):
    forward_features = Returns.forward

    def forward(self, imgs):
        raise AssertionError("the head is not asked")


TOKENS = torch.arange(2 * 20 * 32.0).reshape(2, 20, 32)  # cls, 3 others, 16 patches
WITHOUT = torch.cat([TOKENS[:, :1], TOKENS[:, 4:]], dim=1)


@pytest.mark.parametrize(("module", "expected"), [
    (TimmLike(TOKENS, num_prefix_tokens=4), WITHOUT),
    (TimmLike(WITHOUT, num_prefix_tokens=1), WITHOUT),
    (TimmLike(TOKENS[:, 4:], num_prefix_tokens=0), TOKENS[:, 4:]),
    (Returns(SimpleNamespace(last_hidden_state=WITHOUT), config=SimpleNamespace()), WITHOUT),
    (Returns(SimpleNamespace(last_hidden_state=TOKENS),
             config=SimpleNamespace(num_register_tokens=3)), WITHOUT),
    (TimmLike({"x_norm_clstoken": TOKENS[:, 0], "x_norm_patchtokens": TOKENS[:, 4:]}), WITHOUT),
])  # fmt: skip
def test_vits_of_other_libraries_teach_as_they_are(module, expected):
    method = DBOT(student(), teachers=[FrozenTeacher(module)])
    accuracy.exact(method.teach(torch.randn(2, 3, 16, 16), None), expected)


@pytest.mark.parametrize(
    ("output", "got"),
    [(torch.zeros(2, 32), r"\(2, 32\)"), ({"logits": 1}, "dict"), ((TOKENS,), "tuple")],
)
def test_a_module_that_gives_no_tokens_is_refused_with_the_remedy(output, got):
    with pytest.raises(ValueError, match=f"Returns gives {got}, expected tokens .* give features"):
        DBOT(student(), teachers=[FrozenTeacher(Returns(output))])


def test_a_vit_of_timm_teaches():
    timm = pytest.importorskip("timm")
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=10, reg_tokens=4
    )
    method = DBOT(student(), teachers=[FrozenTeacher(vit, img_size=(64, 64))])
    imgs = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    loss = method(imgs).total
    loss.backward()
    assert loss.isfinite()
    assert method.teach(imgs, None).shape == (2, 17, 192)


@pytest.mark.parametrize("name", ["CLIPVision", "Dinov2", "Dinov2WithRegisters"])
def test_a_vit_of_transformers_teaches(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=64, patch_size=16,
    )  # fmt: skip
    vit = getattr(transformers, f"{name}Model")(config)
    method = DBOT(student(), teachers=[FrozenTeacher(vit, img_size=(64, 64))])
    assert method.teach(torch.randn(2, 3, 16, 16), None).shape == (2, 17, 48)


def test_teacher_that_is_not_there_or_has_other_channels_is_refused(tmp_path):
    chosen = recipe(teachers=(str(tmp_path / "nowhere"),))
    with pytest.raises(CheckpointError, match="nowhere: holds no checkpoint"):
        Trainer(pretrain(tmp_path, method="dbot", recipe=chosen))
    path = saved_run(tmp_path)
    with pytest.raises(CheckpointError, match="of 1 channels for a student of 3"):
        load_teacher(path, student())


@pytest.mark.parametrize(("name", "target"), [("dbot", "tokens"), ("sdae", "features")])
def test_student_that_predicts_something_else_is_refused(name, target):
    with pytest.raises(ValueError, match=f"create the model with target='{target}'"):
        METHODS[name](create_model("nano"))
    with pytest.raises(ValueError, match=f"predicts {target} of a teacher, not pixels"):
        create_model("nano", target=target)(torch.randn(2, 3, 16, 16))


def published(path, method=None, **options):
    """A file of the authors, of an encoder of another width, depth and patch size."""
    sizes = dict(embed_dim=64, depth=2, patch_size=8, num_heads=2, img_size=40, in_chans=1)
    network = create_model("nano", **{**sizes, **options})
    torch.nn.init.normal_(network.blocks[1].mlp.fc2.bias)
    if method == "rc_mae":
        other = {name: torch.zeros_like(t) for name, t in network.state_dict().items()}
        torch.save({"student": other, "teacher": network.state_dict()}, path)
    else:
        torch.save({"model": network.state_dict()}, path)
    return network


@pytest.mark.parametrize(("method", "options"), [
    ("mae", {}), ("rc_mae", {}), ("dbot", dict(target="tokens")), ("sdae", dict(target="features")),
])  # fmt: skip
def test_a_file_of_the_authors_teaches(tmp_path, method, options):
    network = published(tmp_path / "a.pth", method, **options)
    teacher = load_teacher(tmp_path / "a.pth", of_digits())
    imgs = torch.randn(2, 1, 16, 16)
    expected = network.fresh_encoder(img_size=32)
    state = {n: network.state_dict()[n] for n in expected.state_dict()}
    state["pos_embed"] = resize_pos_embed(network.pos_embed, (5, 5), (4, 4))
    expected.load_state_dict(state)
    larger = F.interpolate(imgs, (32, 32), mode="bicubic", antialias=True)
    accuracy.exact(teacher(imgs, of_digits()), expected.encode_image(larger, final_norm=False))


def test_stages_with_a_file_resume_exactly_and_notice_another_file(tmp_path):
    path = tmp_path / "a.pth"
    published(path)
    chosen = recipe(epochs=2, warmup_epochs=0, stage_epochs=(0, 1, 2), teachers=("own", str(path)))
    run = partial(pretrain, method="dbot", recipe=chosen)
    Trainer(run(tmp_path / "a")).run()
    for stop in (5, 9, None):
        trainer = Trainer(run(tmp_path / "b", stop_after=stop))
        trainer.run()
    assert trainer.method.student.head.out_features == 64
    assert_same_run(tmp_path / "b" / "run", tmp_path / "a" / "run")
    published(path)  # other random weights
    with pytest.raises(CheckpointError, match=r"differ in\n  teachers"):
        Trainer(run(tmp_path / "b"))


def test_a_file_that_cannot_teach_is_refused(tmp_path):
    published(tmp_path / "a.pth", embed_dim=80)  # no model of this width tells its heads
    with pytest.raises(CheckpointError, match="does not tell the heads; name its model in"):
        load_teacher(tmp_path / "a.pth", of_digits())
    (tmp_path / "b.pth").write_bytes(b"no checkpoint")
    chosen = recipe(teachers=(str(tmp_path / "b.pth"),))
    with pytest.raises(CheckpointError, match=r"b\.pth: refused, nothing in it was run"):
        Trainer(pretrain(tmp_path, method="dbot", recipe=chosen))
