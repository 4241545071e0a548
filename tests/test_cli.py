"""The command line: bad input, configuration files, and the commands on a finished run."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import fastmim
from fastmim import cli
from fastmim.cli import main
from fastmim.train import PRESETS, Pretrain, Trainer
from fastmim.train.config import to_dict
from tests.training import metrics, pretrain, saved_bytes, write_images

NANO = ["--recipe.model=nano", "--recipe.batch_size=8", "--efficiency.threads=1"]
SHORT = [*NANO, "--recipe.epochs=1", "--recipe.warmup_epochs=0", "--output.pictures=2"]


def run(folder: Path, *argv: str) -> int:
    """``fastmim pretrain`` of the smallest model, written to ``folder/run``."""
    return main(["pretrain", f"--output.folder={folder}", "--output.name=run", *SHORT, *argv])


def last_error(capsys) -> str:
    """The message, after checking that it is nothing else."""
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    return printed.err


def write_parquet(path: Path, photos: Path, labels: list[int]) -> None:
    """The images of a folder with their labels."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": photo.read_bytes()} for photo in sorted(photos.iterdir())]
    pq.write_table(pa.table({"img": images, "label": labels}), path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run on the digits."""
    folder = tmp_path_factory.mktemp("finished")
    Trainer(pretrain(folder, eval={"crop_ratio": 0.5, "k": 7})).run()
    return folder / "run"


@pytest.mark.parametrize(("option", "message"), [
    ("--data.path={tmp}/nowhere", "nowhere' does not exist"),
    ("--data.path={tmp}/empty", "no images in "),
    ("--data.path={tmp}/text", "saw 1 other files"),
    ("--data.path={tmp}/text/a.txt", "a file that is not .parquet"),
    ("--data.path={tmp}/broken.parquet", "not a readable parquet file"),
    ("--recipe.img_size=30", "divisible by the patch size, got 30 x 30"),
    ("--recipe.img_size=[16,30]", "divisible by the patch size, got 16 x 30"),
    ("--recipe.mask_ratio=0", "recipe.mask_ratio: expected between 0 and 1, got 0"),
    ("--recipe.mask_ratio=1", "recipe.mask_ratio: expected between 0 and 1, got 1"),
    ("--recipe.mask_ratio=1.5", "recipe.mask_ratio: expected between 0 and 1, got 1.5"),
    ("--recipe.mask_ratio=.nan", "recipe.mask_ratio: expected between 0 and 1, got nan"),
    ("--recipe.mask_ratio=0.99", "0.99 of 16 patches keeps 0 visible"),
    ("--recipe.mask_ratio=1e-20", "of 16 patches keeps 16 visible"),
    ("--method=rcmae", "unknown method 'rcmae'; did you mean rc_mae"),
    ("--recipe.model=mae_vit_bose_patch16", "did you mean mae_vit_base_patch16"),
    ("--preset=digit", "unknown preset 'digit'; did you mean digits?"),
    ("--recipe.batch_size=1798", "use a batch size of at most 1797"),
    ("--efficiency.micro_batch=3", "micro_batch 3 does not divide batch_size 8"),
    ("--efficiency.device=gpu", "expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    ("--efficiency.device=cuda:99", "efficiency.device: 'cuda:99' was asked for, but"),
    ("--efficiency.precision=fp16", 'Parser key "efficiency.precision"'),
    ("--eval.queries={tmp}/photos", "the images have 3 channels, the network takes 1"),
    ("--eval.bank={tmp}/nowhere", "nowhere' does not exist"),
    ("--recipe.epoch=3", "did you mean --recipe.epochs?"),
    ("--epochs=3", "did you mean --recipe.epochs?"),
    ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--recipe.epochs=many", 'Parser key "recipe.epochs"'),
    ("--config={tmp}/nowhere.yaml", "File does not exist"),
    ("--config={tmp}/bad.yaml", "bad.yaml: expected YAML"),
    ("--config={tmp}/broken.parquet", "broken.parquet: expected YAML"),
    ("--config={tmp}/unknown.yaml", "recipe.epoch"),
    ("--config={tmp}/list.yaml", "Unexpected config"),
    ("--config={tmp}/preset.yaml", "unknown preset 'smal32'; did you mean small32?"),
    ("--output.folder={tmp}/bad.yaml", "Not a directory"),
    ("--output.folder=/proc", "No such file or directory: '/proc/run'"),
])  # fmt: skip
def test_bad_input_is_refused_with_its_remedy(tmp_path, capsys, option, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1\xff\xfe")
    (tmp_path / "bad.yaml").write_text("recipe: [1\n")
    (tmp_path / "unknown.yaml").write_text("recipe: {epoch: 3}\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "preset.yaml").write_text("preset: smal32\n")
    write_images(tmp_path / "photos", 2)
    assert run(tmp_path / "runs", option.format(tmp=tmp_path)) == 2
    assert message in last_error(capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    assert run(tmp_path, "--efficiency.device=cuda") == 2
    assert "sees no GPU; use auto or cpu" in last_error(capsys)


def test_distributed_start_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run(tmp_path) == 2
    assert "WORLD_SIZE is 8" in last_error(capsys)


def test_accuracy_without_labels_is_refused_if_asked_for(tmp_path, capsys):
    write_images(tmp_path / "photos", 8)
    photos = f"--data.path={tmp_path / 'photos'}"
    assert run(tmp_path, photos, "--eval.knn_every=1") == 2
    assert "eval.knn_every: kNN accuracy cannot be measured: there are no labels in folder" in (
        last_error(capsys)
    )
    assert run(tmp_path, "--eval.knn_every=1", "--eval.limit=20") == 2
    assert "eval.k is 20, and there are 19 labelled neighbours" in last_error(capsys)


@pytest.mark.parametrize(("argv", "message"), [
    (["foo"], "invalid choice: 'foo'"),
    (["knn"], "required: knn.run"),
    (["knn", "{tmp}"], "holds no checkpoint; expected the folder of a run"),
    (["knn", "{tmp}/nowhere"], "holds no checkpoint; expected the folder of a run"),
    (["visualize", "{tmp}"], "holds no checkpoint; expected the folder of a run"),
    (["visualize", "{run}", "--count=0"], "count"),
    (["visualize", "{run}", "--images={tmp}/photos"], "have 3 channels, the network takes 1"),
    (["visualize", "{run}", "--out={tmp}/no/folder/a.png"], "No such file or directory"),
    (["knn", "{run}", "--eval.bank={tmp}/photos"], "have 3 channels, the network takes 1"),
    (["knn", "{run}", "--eval.k=1797"], "there are 1796 labelled neighbours"),
    (["knn", "{run}", "--eval.kk=3"], "did you mean --eval.k?"),
    (["knn", "{run}", "--eval.pool=max"], 'Parser key "eval.pool"'),
    (["linear", "{tmp}"], "holds no checkpoint; expected the folder of a run"),
    (["linear", "{run}", "--eval.k=3"], "unrecognized arguments: --eval.k"),
    (["linear", "{run}", "--eval.bank={tmp}/photos"], "have 3 channels, the network takes 1"),
])  # fmt: skip
def test_other_commands_refuse_bad_input(tmp_path, finished, capsys, argv, message):
    write_images(tmp_path / "photos", 2)
    assert main([word.format(tmp=tmp_path, run=finished) for word in argv]) == 2
    assert message in last_error(capsys)


def test_knn_needs_labels(tmp_path, capsys):
    write_images(tmp_path / "photos", 8)
    assert run(tmp_path, f"--data.path={tmp_path / 'photos'}") == 0
    capsys.readouterr()
    assert main(["knn", str(tmp_path / "run")]) == 2
    assert "knn: there are no labels in folder" in last_error(capsys)


def test_run_of_another_kind_is_refused_by_its_differences(tmp_path, capsys):
    assert run(tmp_path, "--stop_after=1") == 0
    capsys.readouterr()
    assert run(tmp_path, "--method=mae", "--recipe.img_size=8") == 2
    message = last_error(capsys)
    assert "method: checkpoint 'rc_mae', run 'mae'" in message
    assert "recipe.img_size: checkpoint None, run 8" in message
    assert f"--config {tmp_path / 'run' / 'config.yaml'}" in message


def test_ctrl_c_before_training_ends_without_a_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "Trainer", interrupted)
    assert run(tmp_path) == 130
    assert "stopped at once" in capsys.readouterr().err


def spoil(folder: Path, count: int) -> list[str]:
    """Make the first images unusable in three ways."""
    names = sorted(path.name for path in folder.iterdir())[:count]
    for i, name in enumerate(names):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes([data[: len(data) // 2], b"<html>", b""][i % 3])
    return names


def test_damaged_images_are_skipped_counted_and_named(tmp_path, capsys):
    write_images(tmp_path / "photos", 40)
    bad = spoil(tmp_path / "photos", 3)
    path = f"--data.path={tmp_path / 'photos'}"
    for workers in (0, 2):
        argv = (path, f"--efficiency.workers={workers}", f"--output.name=run{workers}")
        assert run(tmp_path, *argv) == 0
        printed = capsys.readouterr().err
        for name in bad:
            assert printed.count(f"warning: image skipped: {name}: ") == 1
        assert "3 images could not be read; others took their place" in printed
    assert saved_bytes(tmp_path / "run0") == saved_bytes(tmp_path / "run2")


def test_more_damaged_images_than_allowed_stop_the_run(tmp_path, capsys):
    write_images(tmp_path / "photos", 40)
    spoil(tmp_path / "photos", 20)
    assert run(tmp_path, f"--data.path={tmp_path / 'photos'}") == 4
    printed = capsys.readouterr().err
    assert "9 of 40 images cannot be used, 8 are allowed (max_bad_fraction)" in printed
    assert "Traceback" not in printed


def parsed(monkeypatch, argv: list[str]) -> Pretrain:
    """The configuration that a command line gives to the trainer."""
    found = []

    def keep(config):
        found.append(config)
        raise ValueError("no training here")

    monkeypatch.setattr(cli, "Trainer", keep)
    assert main(argv) == 2
    return found[0]


@pytest.mark.parametrize("argv", [
    [],
    ["--preset=mae_base_800"],
    ["--preset", "tiny224", "--method", "mae", "--recipe.img_size=[32,48]", "--data.path=a b"],
    ["--recipe.clip_grad=1", "--recipe.crop_scale=[0.5,1]", "--output.folder=/tmp/x",
     "--efficiency.micro_batch=8", "--eval.knn_at_end=false", "--stop_after=3"],
])  # fmt: skip
def test_printed_configuration_gives_the_same_run(tmp_path, capsys, monkeypatch, argv):
    with pytest.raises(SystemExit) as end:
        main(["pretrain", *argv, "--print_config"])
    assert end.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    direct = parsed(monkeypatch, ["pretrain", *argv])
    assert parsed(monkeypatch, ["pretrain", "--config", str(tmp_path / "printed.yaml")]) == direct
    (tmp_path / "dict.yaml").write_text(yaml.safe_dump(to_dict(direct)))
    assert parsed(monkeypatch, ["pretrain", f"--config={tmp_path / 'dict.yaml'}"]) == direct


def test_preset_gives_the_defaults_and_options_win(tmp_path, monkeypatch):
    preset = PRESETS["small32"]
    config = parsed(monkeypatch, ["pretrain", "--preset=small32", "--recipe.epochs=99"])
    assert vars(config.recipe) == {**vars(pretrain(tmp_path).recipe), **vars(config.recipe)}
    for name, value in preset.recipe.items():
        assert getattr(config.recipe, name) == (99 if name == "epochs" else value)
    assert config.method == preset.method
    assert parsed(monkeypatch, ["pretrain", "--preset=mae_base_800"]).method == "mae"
    (tmp_path / "c.yaml").write_text("preset: small32\nrecipe:\n  epochs: 7\n  warmup_epochs: 0\n")
    config = parsed(monkeypatch, ["pretrain", "--config", str(tmp_path / "c.yaml")])
    assert (config.recipe.batch_size, config.recipe.epochs) == (preset.recipe["batch_size"], 7)


def test_defaults_are_the_digits(monkeypatch):
    config = parsed(monkeypatch, ["pretrain"])
    assert (config.method, config.preset, config.data.path) == ("rc_mae", "digits", "digits")
    assert config.output.folder == Path("runs")


def test_end_of_a_run_compares_networks_and_pixels(tmp_path, capsys):
    assert run(tmp_path, "--recipe.batch_size=512", "--eval.k=5") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "kNN accuracy (k = 5, each of 1797 images against all others):"
    names = [line.rsplit(maxsplit=2)[0].strip() for line in lines[1:]]
    assert names == ["teacher", "student", "untrained network", "raw pixels, 16 x 16"]
    assert f"{tmp_path / 'run'} holds checkpoints, config.yaml, loss.png, metrics.jsonl, " in (
        printed.err
    )
    for name in ("loss.png", "reconstruction.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert min(picture.size) > 100


def test_accuracy_is_logged_during_the_run(tmp_path, capsys):
    options = ["--recipe.batch_size=512", "--recipe.epochs=2", "--eval.knn_every=1"]
    assert run(tmp_path, *options, "--eval.limit=200", "--eval.k=5") == 0
    logged = [line for line in metrics(tmp_path / "run") if "knn_accuracy" in line]
    assert [(line["step"], line["epoch"]) for line in logged] == [(3, 1), (6, 2)]
    last = 100 * logged[-1]["knn_accuracy"]
    printed = capsys.readouterr()
    assert f"epoch 2: kNN accuracy {last:.2f} %" in printed.err
    assert f"teacher{last:23.2f} %" in printed.out


def test_unlabelled_images_say_once_that_there_is_no_accuracy(tmp_path, capsys):
    write_images(tmp_path / "photos", 8)
    assert run(tmp_path, f"--data.path={tmp_path / 'photos'}") == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("no kNN accuracy: there are no labels in folder") == 1


def test_too_few_images_for_the_neighbours_are_told(tmp_path, capsys):
    for name in "ab":
        write_images(tmp_path / "photos" / name, 4)
    assert run(tmp_path, f"--data.path={tmp_path / 'photos'}") == 0
    assert "no kNN accuracy: eval.k is 20, and there are 7 labelled" in capsys.readouterr().err


def test_knn_takes_the_options_of_the_run_unless_told(finished, capsys):
    assert main(["knn", str(finished)]) == 0
    first = capsys.readouterr().out
    assert "k = 7, each of 1797" in first
    assert main(["knn", str(finished), "--eval.crop_ratio=1", "--eval.limit=300"]) == 0
    second = capsys.readouterr().out
    assert "k = 7, each of 300" in second
    assert main(["knn", str(finished), "--eval.bank=digits"]) == 0
    assert capsys.readouterr().out == first
    assert main(["knn", str(finished), "--eval.queries=digits"]) == 0
    assert "k = 7, 1797 images against 1797" in capsys.readouterr().out


def test_linear_probes_every_network_of_a_run(finished, capsys):
    assert main(["linear", str(finished)]) == 0
    first = capsys.readouterr().out
    assert "linear probe (trained on four fifths of 1797 images, tested on the others):" in first
    for name in ("teacher", "student", "untrained network", "raw pixels, 16 x 16"):
        assert f"  {name:24}" in first
    assert main(["linear", str(finished), "--eval.pool=cls"]) == 0
    assert capsys.readouterr().out != first
    assert main(["linear", str(finished), "--eval.queries=digits", "--eval.limit=500"]) == 0
    assert "trained on 500 images, tested on 1797" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_published_files_are_evaluated(tmp_path, finished, capsys, command):
    assert main([command, str(finished), "--eval.limit=300"]) == 0
    of_run = capsys.readouterr().out
    assert main(["convert", str(finished), f"--out={tmp_path / 'rc.pth'}", "--to=authors"]) == 0
    capsys.readouterr()
    options = ["--eval.bank=digits", "--eval.limit=300", "--eval.crop_ratio=0.5", "--eval.k=7"]
    options = options[: 4 if command == "knn" else 3]
    assert main([command, str(tmp_path / "rc.pth"), *options]) == 0
    of_file = capsys.readouterr().out
    trained = [line for line in of_run.splitlines() if "untrained" not in line]
    assert [line for line in of_file.splitlines() if "untrained" not in line] == trained
    assert "untrained network" in of_file
    assert main([command, str(tmp_path / "rc.pth")]) == 2
    assert "names no images; pass labelled ones by --eval.bank" in last_error(capsys)
    write_images(tmp_path / "photos", 2)
    assert main([command, str(tmp_path / "rc.pth"), f"--eval.bank={tmp_path / 'photos'}"]) == 2
    assert "have 3 channels, the network takes 1" in last_error(capsys)


def test_linear_needs_labels_of_two_classes(tmp_path, capsys):
    write_images(tmp_path / "photos", 8)
    assert run(tmp_path, f"--data.path={tmp_path / 'photos'}") == 0
    capsys.readouterr()
    assert main(["linear", str(tmp_path / "run")]) == 2
    assert "linear: there are no labels in folder" in last_error(capsys)
    write_parquet(tmp_path / "one.parquet", tmp_path / "photos", [3] * 8)
    assert main(["linear", str(tmp_path / "run"), f"--eval.bank={tmp_path / 'one.parquet'}"]) == 2
    assert "of one class; name other images" in last_error(capsys)


def test_commands_take_a_single_checkpoint(tmp_path, finished, capsys):
    checkpoint = max((finished / "checkpoints").iterdir())
    assert main(["knn", str(checkpoint), "--eval.limit=100"]) == 0
    picture = tmp_path / "a.png"
    assert main(["visualize", str(checkpoint), "--count=2", f"--out={picture}"]) == 0
    assert f"wrote {picture}" in capsys.readouterr().err
    with Image.open(picture) as opened:
        assert opened.size[1] > 256  # two rows
    assert main(["visualize", str(checkpoint), "--count=2"]) == 0
    assert (finished / "reconstruction.png").read_bytes() == picture.read_bytes()
    assert not (checkpoint / "reconstruction.png").exists()


def test_visualize_draws_other_masks_with_another_seed(tmp_path, finished):
    drawn = []
    for seed in (0, 0, 1):
        path = tmp_path / "a.png"
        assert main(["visualize", str(finished), f"--seed={seed}", f"--out={path}"]) == 0
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_colour_parquet(tmp_path, capsys):
    write_images(tmp_path / "photos", 48)
    write_parquet(tmp_path / "set.parquet", tmp_path / "photos", [0, 1] * 24)
    data = f"--data.path={tmp_path / 'set.parquet'}"
    assert run(tmp_path, data, "--recipe.img_size=[8,16]", "--method=mae") == 0
    printed = capsys.readouterr()
    assert "raw pixels, 8 x 16" in printed.out
    assert "mae on parquet" in printed.err
    assert "8 x 16 pixels, 8 patches, 2 visible" in printed.err


@pytest.mark.skipif("FASTMIM_SHARED" not in os.environ, reason="FASTMIM_SHARED is not set")
@pytest.mark.parametrize(
    ("path", "size"), [("cifar10-test-5k.parquet", 32), ("imagenet-sample", 64)]
)
def test_real_images(tmp_path, path, size):
    data = f"--data.path={os.environ['FASTMIM_SHARED']}/data/{path}"
    options = ("--stop_after=3", f"--recipe.img_size={size}", "--efficiency.workers=1")
    assert run(tmp_path, data, *options) == 0
    assert main(["visualize", str(tmp_path / "run"), "--count=3"]) == 0
    assert run(tmp_path, data, *options[1:], "--stop_after=4") == 0


def test_presets_are_listed_with_their_sources(capsys):
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert name in printed
        assert preset.source in printed


def test_info_is_printed_for_people_and_machines(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "argv",
    [[], ["--help"], *([name, "--help"] for name in ("pretrain", "knn", "linear", "convert"))],
)
def test_help_is_complete(capsys, argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: fastmim ")
    assert max(map(len, printed.splitlines())) <= 100
    if argv[:1] == ["pretrain"]:
        assert "\n  fastmim pretrain --config my.yaml\n" in printed


def test_every_option_of_pretrain_is_documented(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    flat = " ".join(capsys.readouterr().out.split())
    groups = [(f"{name}.", value) for name, value in to_dict(Pretrain()).items()]
    options = [p + k for p, group in groups if isinstance(group, dict) for k in group]
    assert len(options) > 35
    for option in options:
        about = [text.partition(" (type:") for text in flat.split(f" --{option} ")]
        assert any(len(words.split()) >= 3 and kind for words, kind, _ in about), option


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert fastmim.__version__ in capsys.readouterr().out


def test_module_is_the_command(tmp_path, capsys, monkeypatch):
    import runpy

    monkeypatch.setattr(sys, "argv", ["fastmim", "presets"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fastmim", run_name="__main__")
    assert end.value.code == 0
    assert "digits" in capsys.readouterr().out
