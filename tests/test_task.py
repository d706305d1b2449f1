"""GenerativeTask: phases, intercepts, state, timm's own machinery around it, and several ranks."""

import copy
import gc
import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import assert_no_gloo_thread
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver, unwrap_model
from torch import nn

import timm_gencnn.task as task_module
from timm_gencnn.loss import GenerativeLoss
from timm_gencnn.task import GenerativeTask

N, C = 16, 3


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model('test_resnet', num_classes=C, in_chans=1)


class Linear(nn.Module):
    """Flattened pixels times a matrix: a timm-like classifier that is fast enough for many steps."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.num_classes = C
        self.fc = nn.Linear(16, C, bias=bias)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def batch(seed: int = 0, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(C, (n,), generator=generator)
    x = torch.randn(n, 1, 4, 4, generator=generator)
    return x + target[:, None, None, None], target


def make(**kwargs) -> GenerativeTask:
    torch.manual_seed(0)
    return GenerativeTask(Linear(), verbose=False, **kwargs)


def train(task: nn.Module, steps: int, first: int = 0, lr: float = 0.1, optimizer=None) -> torch.optim.Optimizer:
    optimizer = optimizer or torch.optim.SGD(task.parameters(), lr, momentum=0.9)
    for i in range(first, first + steps):
        loss = task(*batch(i))['loss']
        optimizer.zero_grad()
        loss.backward(create_graph=getattr(optimizer, 'is_second_order', False))
        optimizer.step()
    return optimizer


# Phases


def test_phases_use_their_losses():
    x, target = batch()
    for phase, criterion in (('DG', nn.CrossEntropyLoss()), ('GG', GenerativeLoss()), ('GG+DG', GenerativeLoss())):
        result = make(phase=phase)(x, target)
        torch.testing.assert_close(result['loss'], criterion(result['output'], target))


def test_a_step_on_a_batch_of_one_class_moves_its_weights_alone():
    """Towards equal scores of these images: their own E_p against their mean, nothing for the other classes."""
    x, y = batch()[0], 1
    target = torch.full((N,), y)
    task = make(phase='GG')
    fc, before = task.trainable_module.fc, copy.deepcopy(task.trainable_module.fc.state_dict())
    loss = task(x, target)['loss']
    pixels = x.flatten(1).double()
    scores = pixels @ before['weight'].double().T + before['bias'].double()
    log_z = scores.logsumexp(0) - math.log(N)
    weights = (scores[:, y] - log_z[y]).exp() / N  # of E_p; they sum to 1
    gradient = torch.zeros(C, 16, dtype=torch.float64)
    gradient[y] = weights @ pixels - pixels.mean(0)
    loss.backward()
    close = {'rtol': 0, 'atol': 1e-6, 'check_dtype': False}
    assert loss > 0.1  # log of a mean against the mean of the logarithms
    torch.testing.assert_close(loss, log_z[y] - scores[:, y].mean(), **close)
    torch.testing.assert_close(fc.weight.grad, gradient, **close)
    torch.testing.assert_close(fc.bias.grad, torch.zeros(C), **close)
    torch.optim.SGD(task.parameters(), 0.1).step()
    torch.testing.assert_close(fc.weight[y], before['weight'][y] - 0.1 * gradient[y], **close)
    others = torch.arange(C) != y
    assert torch.equal(fc.weight[others], before['weight'][others])
    torch.testing.assert_close(task.log_z, log_z, **close)  # of every class: they share the images
    assert task.class_counts.tolist() == [0, N, 0]
    assert task(x, target)['loss'] < loss
    discriminative = make(phase='DG')  # control: there the other classes are pushed away from these images
    discriminative(x, target)['loss'].backward()
    assert (discriminative.trainable_module.fc.weight.grad[others].abs().amax(1) > 0.1).all()


def test_switches_after_gen_steps_and_folds_the_intercepts():
    calls = []
    task = make(gen_steps=5, on_switch=lambda: calls.append(task.steps))
    train(task, 5)
    assert task.generative
    bias, alpha = task.trainable_module.fc.bias.detach().clone(), task.intercepts()
    result = task(*batch(5))
    assert not task.generative
    assert calls == [5]
    assert task.switch_step == 5
    torch.testing.assert_close(task.trainable_module.fc.bias.detach(), bias + alpha)
    torch.testing.assert_close(result['loss'], nn.functional.cross_entropy(result['output'], batch(5)[1]))


@pytest.mark.parametrize('name', ['lookahead_momentum', 'madgrad', 'adamw', 'adahessian'])
def test_the_optimizer_does_not_take_the_intercepts_back(name):
    moved = {}
    for known in (True, False):
        task = make(gen_steps=20)
        bias = task.trainable_module.fc.bias
        optimizer = create_optimizer_v2(task.trainable_module, opt=name, lr=1e-9)  # next to no training
        task.optimizer = optimizer if known else None
        before = bias.detach().clone()
        train(task, 40, optimizer=optimizer)
        moved[known] = (bias.detach() - before) / task.intercepts()
    torch.testing.assert_close(moved[True], torch.ones(C), rtol=0, atol=1e-3)
    if name in ('lookahead_momentum', 'madgrad'):  # control: those that keep a copy of the weights
        assert moved[False].max() < 0.6


@pytest.mark.parametrize('steps', [1, 40, 130])
def test_priors_come_from_more_than_the_first_batch(steps):
    task = make()
    train(task, steps)
    counts = torch.stack([batch(i)[1].bincount(minlength=C) for i in range(steps)]).sum(0)
    torch.testing.assert_close(task.class_counts, counts.float())
    priors = (counts + 1) / (counts + 1).sum()
    torch.testing.assert_close(task.intercepts(), priors.log() - task.log_z)


def test_hybrid_is_the_weighted_mean_of_both_losses():
    x, target = batch()
    result = make(hybrid=0.25)(x, target)
    output = result['output']
    expected = 0.75 * GenerativeLoss()(output, target) + 0.25 * nn.functional.cross_entropy(output, target)
    torch.testing.assert_close(result['loss'], expected)


def test_hybrid_learns_its_biases_so_that_none_are_added():
    task = make(hybrid=0.25)
    train(task, 3)
    assert task.get_eval_model() is task.trainable_module


def test_switches_when_the_ess_has_fallen(monkeypatch):
    monkeypatch.setattr(task_module, 'RECORD_EVERY', 5)
    task = make(switch_ess=9.0, momentum=0.5)
    train(task, 200, lr=0.03)
    assert not task.generative
    assert task.ess_history[-1] <= 9 < min(task.ess_history[1:-1])
    assert task.switch_step % 5 == 1  # at the step after the record


def test_switches_on_a_plateau_of_the_ess():
    task = make(switch_ess='plateau')
    falling = [10 * 0.98**i for i in range(30)]
    task.ess_history = falling
    assert not task._is_time_to_switch()
    task.ess_history = [*falling, *[falling[-1]] * 9]
    assert not task._is_time_to_switch()
    task.ess_history = [*falling, *[falling[-1]] * 10]
    assert task._is_time_to_switch()


@pytest.mark.parametrize('phase', ['DG', 'GG'])
def test_pure_phases_never_switch(phase):
    task = make(phase=phase, gen_steps=0, switch_ess=1e9)
    generative = task.generative
    train(task, 3)
    assert task.generative == generative


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'phase': 'dg'}, "phase 'dg' is not one of DG, GG"),
        ({'hybrid': 1.0}, 'hybrid 1.0 is outside'),
        ({'momentum': 0.0}, 'momentum 0.0 is outside'),
        ({'switch_ess': 'flat'}, "switch_ess 'flat' is neither"),
        ({'queue': -1}, 'queue -1'),
        ({'unlabeled_weight': -1.0}, r'unlabeled_weight -1.0 is outside \[0, inf\)'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


# Intercepts


def drifting(task: GenerativeTask, steps: int) -> torch.Tensor:
    """The running Z_y [steps, C] where that of step t is t + 1."""
    running = []
    for t in range(steps):
        with torch.no_grad():
            task.trainable_module.fc.weight.zero_()
            task.trainable_module.fc.bias.fill_(math.log(t + 1))
            task(*batch(t))
        running.append(task.log_z.exp())
    return torch.stack(running)


def test_running_log_z_lags_by_a_small_part_of_the_steps():
    """Batch s weighs binomial(s + 19, s), so that the mean of 0, ..., t is 20 t / 21; control: it was t / 2."""
    t = torch.arange(100.0)[:, None].expand(-1, C)
    torch.testing.assert_close(drifting(make(), 100), 1 + 20 / 21 * t)


def test_running_log_z_is_a_mean_over_1_by_momentum_in_the_long_run():
    """From step 60 on, where 20 / (t + 20) = 1/4: the lag tends to (1 - 1/4) / (1/4) = 3 steps."""
    t = torch.arange(200.0)[:, None].expand(-1, C)
    running = drifting(make(momentum=0.25), 200)
    torch.testing.assert_close(running[:61], 1 + 20 / 21 * t[:61])
    torch.testing.assert_close(running[100:], t[100:] - 2, rtol=1e-6, atol=1e-4)


def test_eval_model_has_the_intercepts_and_is_restored():
    """The generative loss leaves a wrong bias wrong; the intercepts make up for it, for validation only."""
    task = make(momentum=0.1)
    with torch.no_grad():
        task.trainable_module.fc.bias += torch.tensor([50.0, 0.0, 0.0])
    train(task, 200, lr=0.01)
    x, target = batch(1000, 1000)
    model = task.get_eval_model().eval()
    raw = task.trainable_module(x)
    assert (raw.argmax(1) == target).float().mean() < 0.5  # all images go to class 0
    assert (model(x).argmax(1) == target).float().mean() > 0.9
    torch.testing.assert_close(model(x), raw + task.intercepts())
    assert torch.equal(task.trainable_module(x), raw)
    assert unwrap_model(model) is task.trainable_module


def test_no_intercepts_after_a_discriminative_phase():
    task = make(phase='DG')
    train(task, 2)
    assert task.get_eval_model() is task.trainable_module


def test_checkpoint_weights_are_folded_and_the_task_state_is_not():
    task = make()
    train(task, 10)
    bias = task.trainable_module.fc.bias.detach().clone()
    state = task.get_checkpoint_state()
    torch.testing.assert_close(state['state_dict']['fc.bias'], bias + task.intercepts())
    assert torch.equal(task.trainable_module.fc.bias, bias)
    other = make()
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    assert torch.equal(other.trainable_module.fc.bias, bias)


def test_a_head_without_bias_is_calibrated_by_its_eval_model():
    torch.manual_seed(0)
    task = GenerativeTask(Linear(bias=False), verbose=False)
    train(task, 2)
    x, _ = batch()
    torch.testing.assert_close(task.get_eval_model()(x), task.trainable_module(x) + task.intercepts())
    assert 'fc.weight' in task.get_checkpoint_state()['state_dict']


# The image pool


def test_unlabeled_images_enter_the_softmax_only():
    task = make()
    x, target = batch()
    extra, _ = batch(1, 8)
    result = task(x, target, unlabeled=extra)
    assert result['output'].shape == (N, C)
    torch.testing.assert_close(
        result['loss'], GenerativeLoss()(task.trainable_module(x), target, pool=task.trainable_module(extra))
    )
    labeled = task(x, target)['loss']
    assert not torch.isclose(result['loss'], labeled)
    torch.testing.assert_close(make(phase='DG')(x, target, unlabeled=extra), make(phase='DG')(x, target))


def test_unlabeled_images_are_learned_as_of_their_most_probable_classes():
    task = make(unlabeled_weight=0.5, queue=24)
    train(task, 3)
    x, target = batch(3)
    extra, _ = batch(4, 8)
    with torch.no_grad():
        free = task.trainable_module(extra)
        images = torch.cat([task.trainable_module(x), free, task.queue])
    counts = task.class_counts + 1
    classes = (free - images.logsumexp(0) + counts.log()).argmax(1)
    assert len(classes.unique()) > 1
    result = task(x, target, unlabeled=extra)
    logits = task.trainable_module(torch.cat([x, extra]))
    log_ratio = logits - torch.cat([logits, images[-24:]]).logsumexp(0) + math.log(len(images))
    labeled, unlabeled = log_ratio[range(N), target].mean(), log_ratio[range(N, N + 8), classes].mean()
    torch.testing.assert_close(result['loss'], -labeled - 0.5 * unlabeled)
    assert result['output'].shape == (N, C)
    assert task.queue.shape == (24, C)


def test_hybrid_scales_the_loss_of_unlabeled_images_with_the_rest_of_the_generative_one():
    (x, target), (extra, _) = batch(), batch(1, 8)
    loss = make(hybrid=0.25, unlabeled_weight=0.5)(x, target, unlabeled=extra)['loss']
    generative = make(unlabeled_weight=0.5)(x, target, unlabeled=extra)['loss']
    torch.testing.assert_close(loss, 0.75 * generative + 0.25 * make(phase='DG')(x, target)['loss'])


def test_scores_of_further_images_must_be_finite():
    x, target = batch()
    extra = x[:8].index_fill(0, torch.tensor(3), math.nan)
    for task, more in ((make(), {'unlabeled': extra}), (make(bridge=lambda x: torch.cat([x, extra])), {})):
        with pytest.raises(ValueError, match='logits contain NaN or infinity'):
            task(x, target, **more)


def test_no_unlabeled_images_weigh_nothing():
    x, target = batch()
    losses = [make(unlabeled_weight=0.5)(x, target, unlabeled=none)['loss'] for none in (None, x[:0])]
    assert losses[0] == losses[1]


def test_unlabeled_images_improve_upon_a_few_labels():
    """Three labels a digit. In the softmax alone the other digits do harm; learned, they help."""
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.as_tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, rest = order[:500], order[500:]
    few = torch.cat([rest[labels[rest] == c][:3] for c in range(10)])

    def error(weight: float | None) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        task = GenerativeTask(model, phase='GG', verbose=False, unlabeled_weight=weight or 0.0)
        optimizer = torch.optim.SGD(task.parameters(), 0.1, momentum=0.9)
        for i in range(150):
            some = rest[torch.randint(len(rest), (64,), generator=torch.Generator().manual_seed(i))]
            loss = task(images[few], labels[few], unlabeled=None if weight is None else images[some])['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            wrong = task.get_eval_model()(images[test]).argmax(1) != labels[test]
        return wrong.float().mean().item()

    errors = {weight: error(weight) for weight in (None, 0.0, 1.0)}
    assert errors[1.0] + 0.02 < errors[None] < errors[0.0] - 0.02


def test_images_may_come_as_a_dict():
    """Of patches, as from timm's NaFlex loader."""

    class OfDict(Linear):
        def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().forward(x['patches'])

    x, target = batch()
    task = GenerativeTask(OfDict(), phase='GG', verbose=False)
    result = task({'patches': x, 'coordinates': x[:, 0]}, target)
    assert len(result['output']) == N
    torch.testing.assert_close(result['loss'], GenerativeLoss()(result['output'], target))


def test_bridge_gives_the_images_to_learn_and_more_of_the_pool():
    x, target = batch()
    task = make(bridge=lambda images: torch.cat([images + 1, -images, 2 * images]))
    result = task(x, target)
    first, pool = task.trainable_module(x + 1), task.trainable_module(torch.cat([-x, 2 * x]))
    torch.testing.assert_close(result['output'], first)
    torch.testing.assert_close(result['loss'], GenerativeLoss()(first, target, pool=pool))
    discriminative = make(phase='DG', bridge=lambda images: torch.cat([images + 1, -images]))
    torch.testing.assert_close(discriminative(x, target), make(phase='DG')(x, target))


def test_queue_holds_the_last_logits_detached():
    task = make(queue=24)
    outputs = [task(*batch(i))['output'] for i in range(3)]
    expected = torch.cat([outputs[2], outputs[1]])[:24]
    assert torch.equal(task.queue, expected)
    assert not task.queue.requires_grad
    x, target = batch(3)
    loss = task(x, target)['loss']
    torch.testing.assert_close(loss, GenerativeLoss()(task.trainable_module(x), target, pool=expected))


def test_running_log_z_weighs_the_images():
    task = make(running_log_z=True)
    train(task, 3)
    x, target = batch(3)
    before = task.log_z
    loss = task(x, target)['loss']
    new = (3 / 23 * before.exp() + 20 / 23 * task.trainable_module(x).exp().mean(0)).log()
    torch.testing.assert_close(task.log_z, new)
    torch.testing.assert_close(loss, GenerativeLoss()(task.trainable_module(x), target, log_z=new))


# State and timm's machinery


@pytest.mark.parametrize('kwargs', [{'gen_steps': 7}, {'queue': 20}, {'running_log_z': True}, {'phase': 'GG'}])
def test_a_resumed_run_is_bit_equal(tmp_path, kwargs, monkeypatch):
    monkeypatch.setattr(task_module, 'RECORD_EVERY', 2)
    straight = make(**kwargs)
    train(straight, 12)

    first = make(**kwargs)
    optimizer = train(first, 5)
    saver = CheckpointSaver(first.trainable_module, optimizer, task=first, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    second = make(**kwargs)
    train(second, 1)  # any other state
    optimizer = torch.optim.SGD(second.parameters(), 0.1, momentum=0.9)
    assert resume_task_checkpoint(second, str(tmp_path / 'last.pth.tar'), optimizer) == 1
    assert second.steps == 5
    train(second, 7, first=5, optimizer=optimizer)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in task_module._STATE:
        a, b = getattr(straight, name), getattr(second, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_later_steps_leave_a_state_alone():
    first, second = make(queue=20), make(queue=20)
    train(first, 3)
    state = first.get_task_state()
    before = copy.deepcopy(state)
    second.load_task_state(state)
    alpha, known = first.intercepts(), first.intercepts().clone()
    for task in (first, second):
        train(task, 3, first=3)
        assert task.class_counts.sum() == 6 * N
    assert torch.equal(alpha, known)
    for name, value in before.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: str(a) == str(b)
        assert same(state[name], value), name


def test_counts_that_a_rank_had_not_shared_are_kept():
    """By whatever number of ranks goes on."""
    first, second = make(), make()
    train(first, 2)
    second.load_task_state(first.get_task_state() | {'new_counts': torch.arange(C)})
    assert torch.equal(second.class_counts, first.class_counts + torch.arange(C))
    train(second, 1)
    assert second.get_task_state()['new_counts'] is None


def test_state_of_another_task_is_refused():
    with pytest.raises(ValueError, match='not written by a GenerativeTask'):
        make().load_task_state({'teacher': 1})
    make().load_task_state(None)  # a plain checkpoint starts a fresh generative phase


def test_a_run_goes_on_in_its_own_phase_only():
    for before, after, name in (('GG', 'DG', 'generative'), ('DG', 'GG', 'discriminative')):
        task = make(phase=before)
        train(task, 2)
        with pytest.raises(ValueError, match=f'in its {name} phase, where phase {after} cannot go on'):
            make(phase=after).load_task_state(task.get_task_state())
        both = make(phase='GG+DG', gen_steps=9)
        both.load_task_state(task.get_task_state())
        assert both.generative == (before == 'GG')


def test_averaged_weights_have_their_own_intercepts():
    """Scores that are biases, other ones at each step: log Z_y of their average is the averaged bias, exactly."""
    task = make(phase='GG', momentum=1.0)
    task.setup_ema(decay=0.9)
    x, target = torch.randn(3 * C, 1, 4, 4), torch.arange(3 * C) % C
    fc, generator = task.trainable_module.fc, torch.Generator().manual_seed(0)
    for i in range(20):
        with torch.no_grad():
            fc.weight.zero_()
            fc.bias.copy_(torch.randn(C, generator=generator))
        task(x, target)
        task.update_ema(step=i + 1)
    for ema in (False, True):
        torch.testing.assert_close(task.get_eval_model(ema=ema)(x), torch.full((3 * C, C), -math.log(C)))


def test_ema_is_calibrated_saved_and_folded_at_the_switch():
    task = make(gen_steps=4)
    task.setup_ema(decay=0.5)
    alpha = torch.zeros(C)
    for i in range(4):
        train(task, 1, first=i)
        task.update_ema(step=i + 1)
        alpha = (alpha + task.intercepts()) / 2 if i else task.intercepts()
    ema = task.get_trainable_module(ema=True).module
    x, _ = batch()
    torch.testing.assert_close(task.get_eval_model(ema=True)(x), ema(x) + alpha)
    assert (alpha - task.intercepts()).abs().max() > 0.1  # control: not those of the trained weights
    state = task.get_checkpoint_state(ema=True)
    torch.testing.assert_close(state['state_dict_ema']['fc.bias'], ema.fc.bias + alpha)
    bias = ema.fc.bias.clone()
    other = make()
    train(other, 1)
    other.setup_ema()
    other.load_checkpoint_state(state['state_dict_ema'], state['task_state_ema'], ema=True)
    assert torch.equal(other.intercepts(ema=True), task.intercepts(ema=True))
    assert torch.equal(other.get_trainable_module(ema=True).module.fc.bias, bias)  # as training had it
    task(*batch(4))
    torch.testing.assert_close(ema.fc.bias, bias + alpha)


def test_works_with_timm_evaluator_optimizer_compile_and_deepcopy():
    torch.manual_seed(0)
    task = GenerativeTask(small_model(), phase='GG', verbose=False)
    task.compile(backend='eager')
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=1e-3)
    x = torch.randn(8, 1, 32, 32)
    target = torch.arange(8) % C
    for _ in range(2):
        with torch.autocast('cpu', torch.bfloat16), task.no_sync():
            loss = task(x, target)['loss']
        assert loss.dtype == torch.float32
        loss.backward()
        nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    task.eval()
    evaluator = task.create_evaluator()
    with torch.inference_mode():
        evaluator.update(task.get_eval_model()(x), target)
    assert evaluator.compute()['top1'] <= 100
    assert '_orig_mod' not in ''.join(task.get_checkpoint_state()['state_dict'])
    copy.deepcopy(task)
    assert isinstance(task, ClassificationTask)


# Several ranks


def rank_batches(world: int, case: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, target = batch(5, 20)
    if case == 'uneven':
        sizes = {1: [20], 2: [13, 7], 4: [9, 6, 4, 1]}[world]
    else:  # each class lives on few ranks
        order = target.argsort()
        x, target, sizes = x[order], target[order], [20 // world] * world
    return list(zip(x.split(sizes), target.split(sizes), strict=True))


def start(mode: str) -> GenerativeTask:
    weight = 0.5 if mode == 'unlabeled' else 0.0
    task = make(
        phase='GG', running_log_z=mode == 'running', queue=24 if mode == 'resumed' else 0, unlabeled_weight=weight
    )
    if mode == 'resumed':
        first = make(phase='GG', queue=24)
        train(first, 2)
        task.load_task_state(first.get_task_state() | {'new_counts': torch.ones(C)})
    return task


def accumulate(task: GenerativeTask, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple:
    """The mean gradient of two micro-batches, synchronised once."""
    first, second = batches
    with task.no_sync():
        (task(*first)['loss'] / 2).backward()
    (task(*second)['loss'] / 2).backward()
    return unwrap_model(task.trainable_module).fc.weight.grad, task.log_z, task.class_counts


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    save_gradients(rank, world, folder)
    dist.destroy_process_group()
    gc.collect()
    assert_no_gloo_thread()


def save_gradients(rank: int, world: int, folder: str) -> None:
    results = {}
    for case in ('uneven', 'missing'):
        for mode in ('batch', 'running', 'resumed', 'unlabeled'):
            task = start(mode)
            task.prepare_distributed()
            x, target = rank_batches(world, case)[rank]
            loss = task(x, target, unlabeled=-x if mode == 'unlabeled' else None)['loss']
            loss.backward()
            model = unwrap_model(task.trainable_module)
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            results[case, mode] = (model.fc.weight.grad, mean / world, task.log_z, task.class_counts)
    task = make(phase='GG').prepare_distributed()
    accumulated = accumulate(task, [rank_batches(world, case)[rank] for case in ('uneven', 'missing')])
    if rank == world - 1:
        torch.save(accumulated, f'{folder}/accumulated.pt')
        torch.save(results, f'{folder}/results.pt')


def whole_batch(world: int, case: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(t) for t in zip(*rank_batches(world, case), strict=True))


@pytest.mark.parametrize('world', [1, 2, 4])
def test_ranks_give_the_gradient_of_one_big_batch(tmp_path, world):
    mp.start_processes(run_rank, args=(world, str(tmp_path)), nprocs=world, start_method='spawn')
    for (case, mode), got in torch.load(tmp_path / 'results.pt').items():
        task = start(mode)
        parts = rank_batches(world, case)
        x, target = whole_batch(world, case)
        loss = task(x, target, unlabeled=-x if mode == 'unlabeled' else None)['loss']
        loss.backward()
        expected = (task.trainable_module.fc.weight.grad, loss.detach(), task.log_z, task.class_counts)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if world > 1:  # control: softmax over each rank's own images is another gradient
            alone = make(phase='GG')
            losses = [alone(*part)['loss'] for part in parts if len(part[0]) > 1]
            torch.stack(losses).mean().backward()
            assert (alone.trainable_module.fc.weight.grad - got[0]).abs().max() > 1e-2
    expected = accumulate(make(phase='GG'), [whole_batch(world, case) for case in ('uneven', 'missing')])
    for a, b in zip(torch.load(tmp_path / 'accumulated.pt'), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
