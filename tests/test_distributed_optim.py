"""The updates on the shards of FSDP2: two processes must make the bits of one."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fastmim.ops import adamw_ema_, ema_update_, join_storage, split_storage

RANKS = 2
STEPS = 3
LIMIT = 60  # seconds; 31 on 2 cores that four other jobs were using


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))  # shards of unequal sizes


def gradients(module: nn.Module, step: int) -> list[Tensor]:
    module.zero_grad()
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    module(x).square().sum().backward()
    return [p.grad for p in module.parameters()]


def numbers(count: int, step: Tensor) -> dict:
    return dict(
        step=step,
        lr=1e-2,
        momentum=0.9,
        grad_scale=0.5,
        skip=False,
        weight_decay=torch.full((count,), 0.05, dtype=torch.float64),
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
    )


def train(student: nn.Module, teacher: nn.Module) -> list[Tensor]:
    """Parameters, teachers and moments after some steps."""
    params, teachers = list(student.parameters()), list(teacher.parameters())
    moments = [[torch.zeros_like(p, requires_grad=False) for p in params] for _ in range(2)]
    step = torch.tensor(0)
    for k in range(STEPS):
        adamw_ema_(params, gradients(student, k), *moments, teachers, **numbers(len(params), step))
        ema_update_(teachers, params, 0.9)
    assert int(step) == STEPS
    return [*params, *teachers, *moments[0], *moments[1]]


def one_step(param: Tensor, remainders=(), **changed) -> None:
    """An update of one parameter with moments and gradient of its kind."""
    like = [torch.ones_like(param, dtype=torch.float32) for _ in range(3)]
    call = numbers(1, torch.tensor(0)) | dict(teachers=[], param_remainders=remainders) | changed
    adamw_ema_([param], *([x] for x in like), **call)


def check_shards() -> None:
    """What every rank runs."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    student = network()
    teacher = copy.deepcopy(student)
    expected = train(copy.deepcopy(student), copy.deepcopy(teacher))
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    for module in (student, teacher):
        fully_shard(module, mesh=mesh)
    for got, right in zip(train(student, teacher), expected, strict=True):
        assert isinstance(got, DTensor)
        assert torch.equal(got.full_tensor(), right)

    def placed(local: Tensor, placement=Shard(0)) -> DTensor:  # noqa: B008
        return DTensor.from_local(local.clone(), mesh, [placement])

    weight = torch.randn(
        3, 4, generator=torch.Generator().manual_seed(torch.distributed.get_rank())
    )
    plain, high, remainder = (placed(x) for x in (weight, *split_storage(weight)))
    version = plain._version
    one_step(plain)
    one_step(high, [remainder])
    assert plain._version > version
    joined = join_storage(high.to_local(), remainder.to_local())
    assert torch.equal(joined, plain.to_local())

    with pytest.raises(
        ValueError, match=r"expected teachers\[0\] placed like params\[0\].*Replicate"
    ):
        one_step(plain, teachers=[placed(torch.zeros(6, 4), Replicate())])
    with pytest.raises(ValueError, match=r"teachers\[0\] placed like .*, got no DTensor"):
        one_step(plain, teachers=[torch.zeros(6, 4)])
    with pytest.raises(ValueError, match=r"params\[0\] is a sum not yet made"):
        one_step(placed(weight, Partial()))
    with pytest.raises(ValueError, match=r"clip is a DTensor; pass clip.full_tensor\(\)"):
        one_step(plain, clip=placed(torch.tensor(1.0).double(), Replicate()))


def test_shards_take_the_step_of_the_whole(tmp_path):
    command = [sys.executable, __file__, (tmp_path / "rendezvous").as_uri()]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [rank.communicate(timeout=LIMIT)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=sys.argv[1], world_size=RANKS, rank=int(sys.argv[2])
    )
    check_shards()
    torch.distributed.destroy_process_group()
