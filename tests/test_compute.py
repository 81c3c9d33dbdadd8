"""Number formats, memory layout and compilation change how a step is computed, not what is saved or scored."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.loading.steps import Batch
from pipeline.training.classify import rows_per_class
from pipeline.training.compute import ComputeConfig, SyncBatchNorm2d, check_compiled
from pipeline.training.optim import OptimConfig
from pipeline.training.tasks import ClassifyConfig, Facts, GanConfig, make_task, predict
from pipeline.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = Facts(3, 16, ("a", "b", "c"), (0.4,) * 3, (0.3,) * 3)
SGD = OptimConfig(optimizer="sgd", lr=0.05, nesterov=True)


def batch(n=12):
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (n, 16, 16, 3), np.uint8))
    return Batch(images, torch.from_numpy(random.integers(0, 3, n)), torch.ones(n), np.arange(n))


def trained(compute, steps=3, config=None):
    """A task after some steps on one batch, and its losses."""
    task, losses = make_task(config or ClassifyConfig(), FACTS, SGD, 0, "cpu", compute), []
    (phase,) = task.phases
    for _ in range(steps):
        each, _ = phase.loss(batch())
        phase.optimizer.zero_grad()
        each.mean().backward()
        phase.optimizer.step()
        losses.append(each.mean().item())
    return task, losses


@pytest.mark.parametrize("compute", [ComputeConfig("bf16"), ComputeConfig("bf16", channels_last=True)])
def test_in_bfloat16_losses_are_near_and_weights_and_gradients_stay_float32(compute):
    (task, losses), (_, exact) = trained(compute), trained(ComputeConfig())
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.02)
    model = task.modules["model"]
    assert {t.dtype for p in model.parameters() for t in (p, p.grad)} == {torch.float32}


def test_scores_do_not_depend_on_how_the_model_was_trained():
    answers = [
        predict(make_task(ClassifyConfig(), FACTS, SGD, 0, "cpu", compute), FACTS, [batch()], 12, World())
        for compute in (ComputeConfig(), ComputeConfig("bf16"), ComputeConfig("fp16"))
    ]
    assert np.array_equal(answers[0].confidence, answers[1].confidence)
    assert np.array_equal(answers[0].confidence, answers[2].confidence)


def test_with_channels_last_kernels_and_images_lie_so_and_the_numbers_are_the_same():
    (task, losses), (_, plain) = trained(ComputeConfig(channels_last=True)), trained(ComputeConfig())
    kernel = task.modules["model"].features[3].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    seen = []
    task.modules["model"].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    task.phases[0].loss(batch())
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert losses == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_a_compiled_model_computes_the_same_under_the_same_names_and_the_result_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    config = ClassifyConfig(model="resnet9", width=8)
    (task, losses), (plain, exact) = (trained(ComputeConfig(compile=c), config=config) for c in (True, False))
    check(task)
    assert losses == pytest.approx(exact, rel=1e-3)
    assert task.state()["modules"]["model"].keys() == plain.state()["modules"]["model"].keys()
    assert any(tmp_path.iterdir())
    compiled, bare = (predict(t, FACTS, [batch()], 12, World()) for t in (task, plain))
    assert np.allclose(compiled.confidence, bare.confidence, atol=1e-4)


def check(task):
    (phase,) = task.phases
    before = {name: value.clone() for name, value in phase.module.state_dict().items()}
    check_compiled(phase.module, lambda: phase.loss(batch())[0].mean())
    after = phase.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_model_that_is_compiled_wrongly_is_refused_before_its_first_step():
    task = make_task(ClassifyConfig(model="resnet9", width=8), FACTS, SGD, 0, "cpu")
    check(task)  # nothing is compiled
    model = task.modules["model"]
    model._compiled_call_impl = model._call_impl
    check(task)
    model._compiled_call_impl = lambda images: model._call_impl(images) * 2
    with pytest.raises(ValueError, match=r"gradient of features\.0\.0\.weight is off by .*leave out --compile"):
        check(task)
    assert model._compiled_call_impl is not None

    def broken(images):
        raise type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    model._compiled_call_impl = broken
    with pytest.raises(ValueError, match=r"cannot compile the model .*leave it out"):
        check(task)


def test_a_gan_refuses_what_its_losses_cannot_bear():
    with pytest.raises(ValueError, match="bf16"):
        make_task(GanConfig(), FACTS, OptimConfig(), 0, "cpu", ComputeConfig("fp16"))
    with pytest.raises(ValueError, match="--r1"):
        make_task(GanConfig(r1=0.1), FACTS, OptimConfig(), 0, "cpu", ComputeConfig(compile=True))
    with pytest.raises(ValueError, match="fp32, bf16, fp16"):
        ComputeConfig("fp8")


def test_a_gans_penalty_keeps_all_its_digits_in_bfloat16():
    seen = []

    def d_of(compute, r1):
        task = make_task(GanConfig(latent=8, width=4, r1=r1), FACTS, OptimConfig(), 0, "cpu", compute)
        task.modules["discriminator"].score.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        torch.manual_seed(0)
        each, numbers = task.phases[0].loss(batch())
        each.mean().backward()
        return numbers["d_loss"].item()

    assert d_of(ComputeConfig("bf16"), 0.0) == pytest.approx(d_of(ComputeConfig(), 0.0), rel=0.02)
    d_of(ComputeConfig("bf16"), 0.5)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


# ---- freezing


def test_frozen_parts_keep_weights_and_running_statistics_and_the_last_layer_learns():
    config = ClassifyConfig(model="resnet18", stem="small", freeze="body", ema_half_life=100)
    task = make_task(config, FACTS, SGD, 0, "cpu")
    before = {name: value.clone() for name, value in task.modules["model"].state_dict().items()}
    (phase,) = task.phases
    for _ in range(2):
        phase.loss(batch())[0].mean().backward()
        phase.optimizer.step()
        predict(task, FACTS, [batch()], 12, World())  # which leaves it in training mode, but for what is frozen
    changed = [name for name, v in task.modules["model"].state_dict().items() if not torch.equal(v, before[name])]
    assert changed == ["fc.weight", "fc.bias"]
    assert sorted(rows_per_class(config, FACTS)) == ["fc.bias", "fc.weight"]


def test_what_cannot_be_frozen_is_said():
    def frozen(names):
        make_task(ClassifyConfig(freeze=names), FACTS, SGD, 0, "cpu")

    with pytest.raises(ValueError, match=r"freeze 'layer9'.*its parts are features, classifier"):
        frozen("features,layer9")
    with pytest.raises(ValueError, match="leaves nothing"):
        frozen("features,classifier")


# ---- batch norm over all ranks

RANK = """
import sys, torch, torch.distributed as dist
from pipeline.training.compute import SyncBatchNorm2d
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
images, weights = torch.load(out + "/given.pt")
norm = SyncBatchNorm2d(4)
mine = images[rank::2].clone().requires_grad_()
norm(mine).mul(weights[rank::2]).sum().backward()
for p in norm.parameters():
    dist.all_reduce(p.grad)
torch.save([mine.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var], f"{out}/{rank}.pt")
dist.destroy_process_group()
"""


def test_batch_norm_over_two_ranks_is_that_of_one_with_all_their_images(tmp_path):
    torch.manual_seed(0)
    images, weights = torch.randn(8, 4, 5, 5) * 3 + 1, torch.randn(8, 4, 5, 5)
    torch.save([images, weights], tmp_path / "given.pt")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), port, str(tmp_path)], env=env) for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    norm, whole = nn.BatchNorm2d(4), images.clone().requires_grad_()
    norm(whole).mul(weights).sum().backward()
    for rank in range(2):
        gradient, *others = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(gradient, whole.grad[rank::2], atol=1e-5)
        expected = norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(others, expected, strict=True))


def test_alone_it_is_plain_batch_norm_and_models_keep_their_names():
    images = torch.randn(6, 4, 5, 5)
    assert torch.equal(SyncBatchNorm2d(4)(images), nn.BatchNorm2d(4)(images))
    config = ClassifyConfig(model="resnet18", stem="small")
    task = make_task(config, FACTS, SGD, 0, "cpu", ComputeConfig(sync_bn=True))
    assert isinstance(task.modules["model"].bn1, SyncBatchNorm2d)
    plain = make_task(config, FACTS, SGD, 0, "cpu").modules["model"]
    assert task.modules["model"].state_dict().keys() == plain.state_dict().keys()
