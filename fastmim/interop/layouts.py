"""Which layout a file has, and its networks under their published names."""

import argparse
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmim.interop.hf import from_hf, is_hf
from fastmim.interop.measure import measure
from fastmim.interop.names import CLASSIFIER, ENCODER, SDAE
from fastmim.interop.read import File, read
from fastmim.train.checkpoint import CheckpointError

State = dict[str, Tensor]

METHOD_NAMES = {"mae": "MAE", "rc_mae": "RC-MAE", "dbot": "dBOT", "sdae": "SdAE"}
# Keys of the authors' files for one network, the one that is read first.
_STUDENT = ("student", "student_without_ddp", "model", "state_dict")
_TEACHER = ("teacher", "teacher_without_ddp", "model_teacher")
_RC_MAE = {"student", "student_without_ddp", "teacher", "teacher_without_ddp"}
TRAINING = ("optimizer", "epoch", "scaler", "args")
_TYPES = {"optimizer": dict, "epoch": int, "scaler": dict, "args": dict, "groups": list}
_BARE = (CLASSIFIER, ENCODER)  # their optimizers have other groups than those of pre-training
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
# Fields of args that one authors' script has and the others have not.
_ARGS = {"sdae": "shrink_num", "dbot": "stage_epochs", "rc_mae": "gamma"}
_DBOT_TEACHER = "checkpoint-teacher-"  # file written beside checkpoint-X.pth as -teacher-X.pth
# The released names say what nothing in the file does: methods.md, "MAE released".
_RELEASED = {r"mae_visualize_vit": False, r"mae_pretrain_vit_\w+_full": True}


@dataclass(frozen=True)
class Contents:
    """A file's networks and what goes with them.

    Attributes:
        layout: In words.
        method: mae, rc_mae, dbot or sdae; None if the file does not tell.
        networks: "student" and "teacher", or one of them, with published names.
        training: optimizer, epoch, scaler and args, as far as they are there; args as a dict. Of a
            checkpoint of fastmim "named" is the optimizer's state by name, with the options of its
            groups or the recipe they follow from.
        norm_pix: Whether the targets were normalised, None if the file does not tell.
        model: Name of the model by the file's own account, or None.
        heads: Of encoder and decoder by the file's own account.
        notes: What the user should know.
        left_out: Top-level keys that have no place in any output.
    """

    layout: str
    method: str | None
    networks: dict[str, State]
    training: dict[str, Any] = field(default_factory=dict)
    norm_pix: bool | None = None
    model: str | None = None
    heads: tuple[int | None, int | None] = (None, None)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def recognise(file: File) -> Contents:
    """Tell the layout of a file from its keys and shapes.

    Raises:
        CheckpointError: None that is known; lists the first keys.
    """
    if file.checkpoint is not None:
        return _of_fastmim(file)
    if file.header:
        return _of_header(file)
    notes: list[str] = []
    found, left_out = _networks(file, notes)
    if file.path.name.startswith(_DBOT_TEACHER) and "student" in found:
        notes.append("dBOT's teacher by the name of the file")
        found = {"teacher": found["student"]}
    networks = {name: _published(state, notes) for name, state in found.items()}
    training, odd = _training(file.contents)
    left_out += odd
    args = training.get("args", {})
    method = _method(file, networks, args, notes)
    if method == "dbot" and "teacher" not in networks:
        networks |= _dbot_teacher(file, notes)
    if "student" in networks and measure(networks["student"], method, file.path).kind in _BARE:
        left_out += [key for key in ("optimizer", "scaler") if training.pop(key, None) is not None]
    config = file.config
    return Contents(
        _in_words(file, networks, method),
        method,
        networks,
        training,
        _norm_pix(file, args, notes),
        _typed(args, "model", str),
        (
            _typed(config, "num_attention_heads", int),
            _typed(config, "decoder_num_attention_heads", int),
        ),
        notes + _hf_notes(config),
        left_out,
    )


def _typed(values: dict[str, Any], key: str, kind: type) -> Any:
    """A value of the file if it is of the type that it must be, else None."""
    value = values.get(key)
    return value if type(value) is kind else None


def _is_state(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in value.items())
    )


def _networks(file: File, notes: list[str]) -> tuple[dict[str, State], list[str]]:
    """Student and teacher under the names in the file, and the keys that are neither."""
    top = file.contents
    if _is_state(top):
        return {"student": top}, []
    found, copies = {}, []
    for role, keys in (("student", _STUDENT), ("teacher", _TEACHER)):
        there = [key for key in keys if _is_state(top.get(key))]
        if there:
            found[role] = top[there[0]]
            copies += [(there[0], key) for key in there[1:]]
    if not found:
        first = ", ".join(str(key) for key in list(top)[:8]) or "none"
        raise CheckpointError(
            f"{file.path}: unknown layout; its first keys are {first}. Expected a state_dict with "
            "cls_token, pos_embed, patch_embed.proj.weight, ..., or one under model, student, "
            "teacher, model_teacher or state_dict"
        )
    taken = {key for key in top if any(top[key] is state for state in found.values())}
    for name, copy in copies:
        if _same(_unwrapped(top[name])[0], _unwrapped(top[copy])[0]):
            notes.append(f"{copy} is equal to {name}")
            taken.add(copy)
    left_out = [str(key) for key in top if key not in taken and key not in TRAINING]
    return found, left_out


def _same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _unwrapped(state: State) -> tuple[State, list[str]]:
    removed = []
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            removed.append(prefix)
    return state, removed


def _published(state: State, notes: list[str]) -> State:
    state, removed = _unwrapped(state)
    notes += [f"the prefix {prefix} was removed" for prefix in removed]
    state = from_hf(state) if is_hf(state) else state
    return {name: tensor.detach() for name, tensor in state.items()}


def _training(top: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Training state of the authors' files, and those of its keys that hold something else."""
    if _is_state(top):
        return {}, []
    there = {key: top[key] for key in TRAINING if top.get(key) is not None}
    if isinstance(there.get("args"), argparse.Namespace):
        there["args"] = dict(vars(there["args"]))
    right = _right(there)
    return right, [key for key in there if key not in right]


def _right(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if type(value) is _TYPES.get(key)}


def _method(file: File, networks: dict, args: dict, notes: list[str]) -> str | None:
    """Told by the file's keys, then by the options of the run, then by the shapes."""
    names = {name for state in networks.values() for name in state}
    if "decoder_predp.weight" in names or file.path.name.startswith(_DBOT_TEACHER):
        return "dbot"
    if "model_teacher" in file.contents:
        return "sdae"
    if not _RC_MAE.isdisjoint(file.contents):
        return "rc_mae"
    told = [method for method, option in _ARGS.items() if option in args]
    if told:
        return told[0]
    if "decoder_pred.weight" not in names:
        return None
    sizes = measure(networks["student"], None, file.path)
    if sizes.kind == SDAE:
        return "sdae"
    if sizes.patch_values == sizes.embed_dim and not args and not file.config:
        notes.append(
            f"decoder_pred is {sizes.embed_dim} wide, which is a patch's pixels and the encoder's "
            "width: MAE, RC-MAE and SdAE look the same; taken as MAE"
        )
    return "mae"


def _dbot_teacher(file: File, notes: list[str]) -> dict[str, State]:
    """dBOT's scripts write the teacher beside checkpoint-X.pth, as checkpoint-teacher-X.pth."""
    path = file.path.with_name(file.path.name.replace("checkpoint-", _DBOT_TEACHER, 1))
    if path == file.path or not path.is_file():
        return {}
    notes.append(f"the teacher is that of {path.name}")
    return {"teacher": recognise(read(path)).networks["teacher"]}


def _norm_pix(file: File, args: dict, notes: list[str]) -> bool | None:
    for values in (args, file.config):
        told = _typed(values, "norm_pix_loss", bool)
        if told is not None:
            return told
    for name, normalised in _RELEASED.items():
        if re.match(name, file.path.name):
            notes.append("norm_pix_loss by the name of the released file")
            return normalised
    return None


def _hf_notes(config: dict[str, Any]) -> list[str]:
    eps = config.get("layer_norm_eps", 1e-6)
    if eps == 1e-6:
        return []
    return [f"config.json has layer_norm_eps {eps}; the networks here, as the authors', use 1e-6"]


def _in_words(file: File, networks: dict[str, State], method: str | None) -> str:
    state = next(iter(networks.values()))
    kind = measure(state, method, file.path).kind
    bare = _is_state(file.contents)
    if bare and is_hf(_unwrapped(file.contents)[0]):
        return "Hugging Face " + ("ViTMAE" if method else "ViT")
    if kind == CLASSIFIER:
        return "timm ViT with a head" if bare else "fine-tuned ViT"
    if kind == ENCODER and method is None:
        return "timm ViT without a head" if bare else "encoder only (MAE's released layout)"
    if kind == ENCODER:
        return f"{METHOD_NAMES[method]} weights, encoder only"
    written = "pre-training checkpoint" if "optimizer" in file.contents else "weights"
    return f"{METHOD_NAMES[method]} {written}, encoder and decoder"


def _of_fastmim(file: File) -> Contents:
    """A run of fastmim, or a folder that convert wrote."""
    state, parts = file.checkpoint.state, dict(file.checkpoint.parts)
    optimizer = parts.pop("optimizer", None)
    if not parts or not parts.keys() <= {"student", "teacher"}:
        raise CheckpointError(
            f"{file.path}: expected student and teacher, found {', '.join(parts) or 'nothing'}"
        )
    told, identity = (_typed(state, key, dict) or {} for key in ("converted", "identity"))
    recipe, data = (_typed(identity, key, dict) or {} for key in ("recipe", "data"))
    training = _right({key: told[key] for key in told if key != "optimizer"})
    if optimizer is not None:
        training |= {"named": optimizer, "recipe": recipe}
        per_epoch = (_typed(data, "images", int) or 0) // (_typed(recipe, "batch_size", int) or 1)
        if "epoch" not in training and 0 < per_epoch <= file.checkpoint.step:
            training["epoch"] = file.checkpoint.step // per_epoch - 1  # the last that is done
    method = _typed(identity, "method", str) or _typed(told, "method", str)
    return Contents(
        f"fastmim checkpoint{' of ' + METHOD_NAMES.get(method, method) if method else ''}",
        method,
        parts,
        training,
        _typed(told, "norm_pix_loss", bool) if told else _typed(recipe, "norm_pix", bool),
        _typed(told, "model", str) or _typed(recipe, "model", str),
    )


def _of_header(file: File) -> Contents:
    """A weights file that convert wrote."""
    header = file.header
    method = _typed(header, "method", str)
    return Contents(
        "fastmim weights",
        method if method in METHOD_NAMES else None,
        {"teacher" if header.get("network") == "teacher" else "student": file.contents},
        {},
        _typed(header, "norm_pix_loss", bool),
        _typed(header, "model", str),
        (_typed(header, "num_heads", int), _typed(header, "decoder_num_heads", int)),
    )
