"""gencnn_<arch> for every architecture of timm: what a plain timm model does, the generative one does too."""

import argparse
import copy
import json
import pickle
import subprocess
import sys
import warnings
from collections import deque
from pathlib import Path

import pytest
import timm
import timm.models._hub as timm_hub
import torch
from safetensors.torch import load_file, save_file
from timm.models import _registry as timm_registry
from timm.models import get_model_input_config, save_for_hf
from timm.utils import ModelEmaV3
from torch import nn

from timm_gencnn import GenerativeMixin, as_generative, config_check, registry, zoo
from timm_gencnn.archs import LeNet

# the architecture with the fewest parameters of every timm module, counted on the meta device
# fmt: off
SMALLEST = [
    'beit_base_patch16_224', 'halonet_h1', 'test_byobnet', 'cait_xxs24_224', 'coat_tiny', 'convit_tiny',
    'convmixer_768_32', 'test_convnext', 'cpubone_nano', 'crossvit_tiny_240', 'csatv2', 'cs3darknet_focus_s',
    'cspnext_tiny', 'davit_tiny', 'deepseek_vit_412m', 'deit_tiny_patch16_224', 'densenet121', 'dla46x_c', 'dpn48b',
    'edgenext_xx_small', 'efficientformer_l1', 'efficientformerv2_s0', 'test_efficientnet', 'efficientvim_m1',
    'efficientvit_b0', 'efficientvit_m0', 'eva02_tiny_patch14_336', 'fasternet_t0', 'fastvit_t8',
    'focalnet_tiny_srf', 'gcvit_xxtiny', 'gemma4_vit_167m', 'ghostnet_050', 'hardcorenas_b', 'hgnetv2_b0',
    'hiera_tiny_224', 'hieradet_small', 'hrnet_w18_small', 'iformer_t', 'inception_next_atto',
    'inception_resnet_v2', 'inception_v3', 'inception_v4', 'lcnetv2_small', 'levit_128s', 'lowformer_b0',
    'test_mambaout', 'test_coatnet', 'poolformerv2_s12', 'gmlp_ti16_224', 'mobilenetv3_small_050',
    'mobilenetv5_base', 'mobilevit_xxs', 'mvitv2_tiny', 'naflexvit_base_patch16_parfac_gap', 'nasnetalarge',
    'nest_tiny', 'nextvit_small', 'test_nfnet', 'pit_ti_224', 'pnasnet5large', 'pvt_v2_b0', 'qwen3_vit_88m',
    'rdnet_tiny', 'regnetx_002', 'repghostnet_050', 'repvit_m1', 'res2next50', 'resnest14d', 'test_resnet',
    'resnetv2_18', 'rexnet_100', 'selecsls42', 'legacy_seresnet18', 'sequencer2d_s', 'shvit_s1', 'skresnet18',
    'starnet_s050', 'swiftformer_xs', 'swin_tiny_patch4_window7_224', 'swinv2_tiny_window8_256',
    'swinv2_cr_tiny_224', 'tiny_vit_5m_224', 'tnt_s_legacy_patch16_224', 'tresnet_m', 'twins_svt_small', 'vgg11',
    'visformer_tiny', 'test_vit', 'vit_tiny_r_s16_p8_224', 'test_vit_relpos', 'samvit_base_patch16_224',
    'vitamin_small_224', 'volo_d1_224', 'ese_vovnet19b_slim_dw', 'legacy_xception', 'xception41p',
    'xcit_nano_12_p8_224', 'lenet', 'alexnet', 'zfnet', 'alexnet_small', 'resnet10_w16',
]

# of those, the ones small enough to run with real weights each time: convolutions, attention, hybrids, NHWC, two heads
QUICK = [
    'test_byobnet', 'test_convnext', 'test_efficientnet', 'test_mambaout', 'test_coatnet', 'test_nfnet',
    'test_resnet', 'test_vit', 'test_vit_relpos', 'starnet_s050', 'levit_128s', 'mobilevit_xxs', 'lenet',
]
# fmt: on
SHALLOW = {'deepseek_vit_412m', 'gemma4_vit_167m', 'qwen3_vit_88m'}  # run with one block, for the memory's sake
SHARED_WEIGHTS = {'coat_tiny'}  # timm cannot write these as safetensors


def test_every_module_of_timm_is_covered():
    modules = {timm_registry._model_to_module[arch] for arch in SMALLEST}
    assert set(timm.list_modules()) - modules == {'gencnn'}


def test_every_architecture_is_listed_with_timms_own_cfgs():
    plain = timm.list_models(exclude_filters='gencnn_*')
    assert timm.list_models(module='gencnn') == [f'gencnn_{arch}' for arch in plain]
    assert len(plain) > 1300
    assert {'lenet', 'alexnet', 'zfnet'} < set(plain)
    tagged = timm.list_models(exclude_filters='gencnn_*', include_tags=True)
    assert timm.list_models(module='gencnn', include_tags=True) == [f'gencnn_{name}' for name in tagged]
    weights = timm.list_pretrained(exclude_filters='gencnn_*')
    assert timm.list_models(module='gencnn', pretrained=True) == [f'gencnn_{name}' for name in weights]
    for name in [*plain, *tagged]:
        cfg = timm.models.get_pretrained_cfg(name)
        twin = timm.models.get_pretrained_cfg(f'gencnn_{name}')
        if cfg is None:
            assert twin is None
        else:
            assert twin.architecture == f'gencnn_{timm.models.get_arch_name(name)}'
            twin.architecture = cfg.architecture
            assert twin == cfg


def test_deprecated_names_are_left_alone():
    assert timm.models.get_deprecated_models()
    for name in timm.models.get_deprecated_models():
        assert not timm.is_model(f'gencnn_{name}')


def test_import_is_quick_and_silent():
    program = """
import time, warnings
import timm, torch
warnings.simplefilter('error')
start = time.process_time()
from timm_gencnn import registry
print(time.process_time() - start)
"""
    run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.3
    assert run.stderr == ''


def build(arch, **kwargs):
    """The plain model and the generative one, with the same weights."""
    torch.manual_seed(0)
    plain = timm.create_model(arch, **kwargs)
    model = timm.create_model(f'gencnn_{arch}', **kwargs)
    model.load_state_dict(plain.state_dict())
    return plain.eval(), model.eval()


@pytest.mark.parametrize('arch', SMALLEST)
def test_structure_of_every_family(arch):
    """Without weights, so that every family is covered each time."""
    with torch.device('meta'):
        plain, model = timm.create_model(arch), timm.create_model(f'gencnn_{arch}')
        assert type(model).__mro__[1:3] == (GenerativeMixin, type(plain))
        shapes = {key: value.shape for key, value in plain.state_dict().items()}
        assert {key: value.shape for key, value in model.state_dict().items()} == shapes
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
        assert model.pretrained_cfg == {**plain.pretrained_cfg, 'architecture': f'gencnn_{arch}'}
        assert get_model_input_config(model) == get_model_input_config(plain)
        assert type(copy.deepcopy(model)) is type(model)
        if plain.num_classes:
            plain.reset_classifier(7)
            model.reset_classifier(7)
            assert model.num_classes == 7
            assert [v.shape for v in model.state_dict().values()] == [v.shape for v in plain.state_dict().values()]


@pytest.mark.parametrize(
    'arch',
    [*QUICK, *(pytest.param(arch, marks=pytest.mark.slow) for arch in SMALLEST if arch not in QUICK)],
)
def test_model_behaves_as_the_plain_one(arch, tmp_path):
    kwargs = {'depth': 1} if arch in SHALLOW else {}
    plain, model = build(arch, **kwargs)
    images = torch.randn(1, *get_model_input_config(plain)['input_size'])
    with torch.no_grad():
        logits = plain(images)
        assert torch.equal(model(images), logits)
        if hasattr(plain, 'forward_intermediates'):
            outputs = (m.forward_intermediates(images, intermediates_only=True) for m in (plain, model))
            assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))

        torch.save(model, tmp_path / 'model.pt')
        for duplicate in (
            lambda: copy.deepcopy(model),
            lambda: pickle.loads(pickle.dumps(model)),
            lambda: torch.load(tmp_path / 'model.pt', weights_only=False),
            lambda: ModelEmaV3(model).module,
        ):
            other = duplicate()
            assert type(other) is type(model)
            assert torch.equal(other(images), logits)

        log_z = torch.arange(model.num_classes) / 8 if model.num_classes else None
        model.set_log_z(log_z)
        save_for_hf(model, tmp_path / 'export', safe_serialization=arch not in SHARED_WEIGHTS)
        back = timm.create_model(f'local-dir:{tmp_path / "export"}', pretrained=True).eval()
        assert type(back) is type(model)
        assert torch.equal(back(images), logits)
        assert (back.log_z is None) if log_z is None else torch.equal(back.log_z, log_z)
        weights = 'pytorch_model.bin' if arch in SHARED_WEIGHTS else 'model.safetensors'
        fresh = timm.create_model(arch, checkpoint_path=tmp_path / 'export' / weights, **kwargs).eval()
        assert type(fresh) is type(plain)
        assert torch.equal(fresh(images), logits)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that serves `hub.files[filename]` for any repository and records what was asked of it."""
    calls = []

    def download(repo_id, filename, revision=None, cache_dir=None, **_):
        calls.append((repo_id, filename, revision, cache_dir))
        if filename not in served.files:
            raise timm_hub.EntryNotFoundError(filename, response=argparse.Namespace(headers={}, request=None))
        return str(served.files[filename])

    served = argparse.Namespace(files={}, calls=calls)
    monkeypatch.setattr(timm_hub, 'hf_hub_download', download)
    monkeypatch.setattr(config_check, 'hf_hub_download', download)
    return served


def weights_of(arch, path, **kwargs):
    torch.manual_seed(1)
    model = timm.create_model(arch, **kwargs)
    save_file({key: torch.rand_like(value.float()).to(value.dtype) for key, value in model.state_dict().items()}, path)
    return path


CFG = timm.models.get_pretrained_cfg('test_resnet.r160_in1k')
ARGUMENTS = [
    ('test_resnet', {}),
    ('test_resnet.r160_in1k', {}),
    ('test_resnet', {'pretrained_cfg': 'r160_in1k'}),
    ('test_resnet', {'pretrained_cfg': CFG}),
    ('test_resnet', {'pretrained_cfg': CFG.to_dict()}),
    ('test_resnet', {'pretrained_cfg_overlay': {'hf_hub_id': 'somebody/else', 'crop_pct': 0.5}}),
    ('test_resnet', {'num_classes': 5}),
    ('test_resnet', {'in_chans': 1}),
    ('test_resnet', {'cache_dir': 'elsewhere'}),
    ('test_resnet', {'features_only': True, 'out_indices': (1, 2)}),
    ('test_resnet', {'drop_rate': 0.3, 'global_pool': 'max'}),
    ('convnext_atto.d2_in1k', {}),
    ('convnextv2_atto.fcmae', {'num_classes': 5}),
]


@pytest.mark.parametrize(('name', 'kwargs'), ARGUMENTS)
def test_arguments_mean_what_they_mean_for_the_plain_model(name, kwargs, hub, tmp_path):
    arch = timm.models.get_arch_name(name)
    hub.files['model.safetensors'] = weights_of(arch, tmp_path / 'w.safetensors')
    models, calls = [], []
    for prefix in ('', 'gencnn_'):
        torch.manual_seed(0)
        models.append(timm.create_model(prefix + name, pretrained=True, **kwargs).eval())
        calls.append(copy.copy(hub.calls))
        hub.calls.clear()
    plain, model = models
    assert calls[0] == calls[1] != []
    for (key, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    features = kwargs.get('features_only', False)
    assert isinstance(model, GenerativeMixin) != features
    assert (type(model) is type(plain)) == features
    cfg = dict(model.pretrained_cfg)
    if not features:
        assert cfg.pop('architecture') == f'gencnn_{arch}'
        cfg['architecture'] = arch
    assert cfg == plain.pretrained_cfg


@pytest.mark.parametrize(
    ('name', 'kwargs', 'error', 'message'),
    [
        ('gencnn_nothing', {}, RuntimeError, 'Unknown model'),
        ('gencnn_test_resnet.nothing', {}, RuntimeError, r'Invalid pretrained tag \(nothing\)'),
        ('gencnn_alexnet', {'pretrained': True}, RuntimeError, 'No pretrained weights exist'),
        ('gencnn_lenet', {'log_z': [0.0] * 3}, ValueError, 'one finite number for each of its 10 classes'),
    ],
)
def test_wrong_names_and_arguments(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **kwargs)


def test_checkpoint_path(tmp_path):
    weights = weights_of('lenet', tmp_path / 'w.safetensors')
    model = timm.create_model('gencnn_lenet', checkpoint_path=weights)
    assert isinstance(model, GenerativeMixin)
    assert torch.equal(model.fc2.weight, load_file(weights)['fc2.weight'])


@pytest.fixture
def export(tmp_path):
    """A LeNet with a known log Z in a folder."""
    torch.manual_seed(0)
    model = timm.create_model('gencnn_lenet')
    model.set_log_z(torch.arange(10.0))
    save_for_hf(model, tmp_path / 'export', safe_serialization=True)
    return tmp_path / 'export'


def test_log_z_travels_with_its_weights_and_only_with_them(export):
    name = f'local-dir:{export}'
    kept = timm.create_model(name, pretrained=True, drop_rate=0.1)
    assert torch.equal(kept.log_z, torch.arange(10.0))
    assert timm.create_model(name, pretrained=False).log_z is None
    assert timm.create_model(name, pretrained=True, in_chans=3).log_z is None
    given = timm.create_model(name, pretrained=True, num_classes=3, log_z=[1.0, 2.0, 3.0])
    assert given.log_z.tolist() == [1, 2, 3]

    other = timm.create_model(name, pretrained=True, num_classes=3)
    assert other.log_z is None
    save_for_hf(other, export, safe_serialization=True)
    assert 'log_z' not in json.loads((export / 'config.json').read_text())['model_args']
    assert timm.create_model(name, pretrained=True).num_classes == 3


def test_log_z_is_an_argument_of_the_entrypoint():
    model = timm.create_model('gencnn_lenet', log_z=list(range(10)))
    assert model.log_z.tolist() == list(range(10))
    assert model._model_args['log_z'] == list(range(10))
    assert 'log_z' not in model.state_dict()


def test_hf_hub_name_serves_the_exported_model(export, hub, tmp_path):
    hub.files.update({path.name: path for path in export.iterdir()})
    model = timm.create_model('hf-hub:somebody/lenet', pretrained=True, cache_dir=tmp_path / 'cache')
    assert isinstance(model, GenerativeMixin)
    assert torch.equal(model.log_z, torch.arange(10.0))
    assert torch.equal(model.fc2.weight, load_file(export / 'model.safetensors')['fc2.weight'])
    assert {call[3] for call in hub.calls} == {tmp_path / 'cache'}


def damage(path, how):
    content = path.read_bytes()
    if how == 'truncated':
        path.write_bytes(content[: len(content) // 2])
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'pointer':
        path.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize('how', ['truncated', 'empty', 'pointer'])
def test_damaged_checkpoint_is_an_error_that_names_the_file(how, export, hub):
    weights = export / 'model.safetensors'
    torch.save(load_file(weights), export / 'other.bin')
    damage(weights, how)
    damage(export / 'other.bin', how)
    hub.files.update({path.name: path for path in export.iterdir()})
    for name, kwargs in (
        (f'local-dir:{export}', {}),
        ('gencnn_lenet', {'pretrained_cfg_overlay': {'file': str(weights)}}),
    ):
        with pytest.raises(ValueError, match=r'model\.safetensors .*(cannot be read|is damaged).*again'):
            timm.create_model(name, pretrained=True, **kwargs)
    with pytest.raises(ValueError, match=r'somebody/lenet|model\.safetensors'):
        timm.create_model('hf-hub:somebody/lenet', pretrained=True)
    with pytest.raises(ValueError, match=r'other\.bin cannot be read.*again'):
        registry.check_checkpoint(export / 'other.bin')


def test_check_checkpoint_accepts_whole_ones(export, tmp_path):
    registry.check_checkpoint(export)
    registry.check_checkpoint(export / 'model.safetensors')
    torch.save({'state_dict': {}, 'args': argparse.Namespace(lr=1)}, tmp_path / 'timm.pth.tar')
    registry.check_checkpoint(tmp_path / 'timm.pth.tar')
    with pytest.raises(ValueError, match=r'nothing\.pt .*no such file'):
        registry.check_checkpoint(tmp_path / 'nothing.pt')


@pytest.fixture
def own_registry(monkeypatch):
    """timm's registry, to be changed at will, without the tags that we ship."""
    for name, value in vars(timm_registry).items():
        if name.startswith(('_model', '_module')) and isinstance(value, dict | set):
            shallow = name in ('_model_entrypoints', '_model_pretrained_cfgs')
            monkeypatch.setattr(timm_registry, name, copy.copy(value) if shallow else copy.deepcopy(value))
    for arch in ('lenet', 'test_resnet'):
        module = sys.modules[timm.model_entrypoint(arch).__module__]
        monkeypatch.setattr(module, 'default_cfgs', copy.deepcopy(module.default_cfgs))
    bare = sys.modules[LeNet.__module__].default_cfgs['lenet']
    bare.tags, bare.cfgs, bare.is_pretrained = deque(['']), {'': bare.cfgs['']}, False
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        yield


@pytest.fixture
def own_zoo(own_registry, tmp_path, monkeypatch):
    """A zoo with a LeNet and a ResNet of another input size, registered."""
    monkeypatch.setattr(zoo, 'FOLDER', tmp_path / 'zoo')
    torch.manual_seed(0)
    for name, kwargs in (('gencnn_lenet', {}), ('gencnn_test_resnet', {'num_classes': 4, 'in_chans': 1})):
        model = timm.create_model(name, **kwargs)
        model.set_log_z(torch.arange(model.num_classes) / 8)
        labels = [f'label {i}' for i in range(model.num_classes)]
        data = {'input_size': (1, 28, 28), 'mean': (0.2,), 'std': (0.4,)} if kwargs else None
        path = zoo.save(
            model, 'gg_x', zoo.FOLDER, results={'error': 1}, recipe={'seed': 0}, data_config=data, label_names=labels
        )
        registry._register_tag(path.stem)
        registry.register(name.removeprefix('gencnn_'))
    return zoo.FOLDER


@pytest.mark.parametrize(('arch', 'classes'), [('lenet', 10), ('test_resnet', 4)])
def test_zoo_checkpoints_are_pretrained_tags(arch, classes, own_zoo):
    names = [f'{prefix}{arch}.gg_x' for prefix in ('', 'gencnn_')]
    assert set(names) <= set(timm.list_pretrained())
    assert zoo.names() == ['lenet.gg_x', 'test_resnet.gg_x']
    plain, model = (timm.create_model(name, pretrained=True) for name in names)
    for m in (plain, model):
        assert m.num_classes == classes
        assert m.in_chans == 1
        assert m.pretrained_cfg['input_size'] == (1, 28, 28)
        assert m.pretrained_cfg['label_names'] == tuple(f'label {i}' for i in range(classes))
        assert m.pretrained_cfg['tag'] == 'gg_x'
        assert isinstance(m.pretrained_cfg['mean'], tuple)
    weights = load_file(own_zoo / f'{arch}.gg_x.safetensors')
    for key, value in weights.items():
        assert torch.equal(plain.state_dict()[key], value)
        assert torch.equal(model.state_dict()[key], value)
    assert not isinstance(plain, GenerativeMixin)
    assert torch.equal(model.log_z, torch.arange(classes) / 8)
    assert timm.create_model(names[1], pretrained=False).log_z is None
    assert timm.create_model(names[1], pretrained=True, num_classes=3).log_z is None


def test_zoo_takes_a_configuration_as_timms_own_object(tmp_path):
    model = timm.create_model('lenet')
    zoo.save(model, 'x', tmp_path / 'dictionary')
    fields = {k: v for k, v in model.pretrained_cfg.items() if k in timm.models.PretrainedCfg.__dataclass_fields__}
    model.pretrained_cfg = cfg = timm.models.PretrainedCfg(**fields)
    zoo.save(model, 'x', tmp_path / 'object')
    assert model.pretrained_cfg is cfg
    records = [(tmp_path / folder / 'lenet.x.json').read_text() for folder in ('object', 'dictionary')]
    assert records[0] == records[1]


def test_zoo_takes_weights_in_channels_last_order(tmp_path):
    model = timm.create_model('lenet').to(memory_format=torch.channels_last)
    saved = load_file(zoo.save(model, 'x', tmp_path))
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_zoo_tag_is_the_default_only_where_there_is_no_other(own_zoo):
    assert timm.models.get_pretrained_cfg('gencnn_lenet').tag == 'gg_x'
    assert torch.equal(timm.create_model('gencnn_lenet', pretrained=True).log_z, torch.arange(10) / 8)
    assert timm.models.get_pretrained_cfg('gencnn_test_resnet').tag == CFG.tag


def test_zoo_tag_marked_as_the_default_is_it_whatever_the_order(own_zoo):
    for tag, default in (('a', False), ('marked', True), ('z', False)):
        registry._register_tag(zoo.save(timm.create_model('lenet'), tag, zoo.FOLDER, default=default).stem)
    assert timm.models.get_pretrained_cfg('lenet').tag == 'marked'
    assert {f'lenet.{tag}' for tag in ('a', 'gg_x', 'marked', 'z')} <= set(timm.list_pretrained())


def test_zoo_record(own_zoo):
    record = zoo.read('test_resnet.gg_x')
    assert record['architecture'] == 'test_resnet'
    assert record['tag'] == 'gg_x'
    assert record['model_args'].items() >= {'num_classes': 4, 'in_chans': 1}.items()
    assert record['pretrained_cfg']['mean'] == [0.2]
    assert record['log_z'] == [0, 0.125, 0.25, 0.375]
    assert record['results'] == {'error': 1}
    assert record['recipe'] == {'seed': 0}
    assert sorted(path.name for path in own_zoo.iterdir()) == [
        f'{arch}.gg_x.{suffix}' for arch in ('lenet', 'test_resnet') for suffix in ('json', 'safetensors')
    ]


@pytest.mark.parametrize('how', ['truncated', 'empty', 'pointer', 'one bit'])
def test_damaged_zoo_checkpoint(how, own_zoo):
    damage(own_zoo / 'lenet.gg_x.safetensors', how)
    with pytest.raises(ValueError, match=r'lenet\.gg_x\.safetensors .* again'):
        timm.create_model('gencnn_lenet.gg_x', pretrained=True)


@pytest.mark.parametrize('text', ['', '{', '[]', '{"architecture": "lenet"}', None])
def test_damaged_zoo_record(text, own_zoo):
    path = own_zoo / 'lenet.gg_x.json'
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=r'lenet\.gg_x\.json .* again'):
        zoo.read('lenet.gg_x')


@pytest.mark.parametrize('tag', ['', 'a.b', 'a/b', 'a*'])
def test_zoo_refuses_bad_tags_and_models(tag, tmp_path):
    with pytest.raises(ValueError, match='letters, digits'):
        zoo.save(timm.create_model('lenet'), tag, tmp_path)
    with pytest.raises(ValueError, match=r'timm\.create_model'):
        zoo.save(nn.Linear(1, 1), 'x', tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_architectures_registered_later(own_registry):
    def newcomer(pretrained=False, **kwargs):
        return timm.create_model('lenet', num_classes=3)

    newcomer.__module__ = __name__
    timm.models.register_model(newcomer)
    with pytest.raises(RuntimeError, match='Unknown model'):
        timm.create_model('gencnn_newcomer')
    assert isinstance(as_generative(timm.create_model('newcomer')), GenerativeMixin)
    registry.register('newcomer')
    assert isinstance(timm.create_model('gencnn_newcomer'), GenerativeMixin)
    for name in ('nothing', 'lenet.gg_x'):
        with pytest.raises(ValueError, match=f'{name!r} is not an architecture'):
            registry.register(name)


def test_shipped_checkpoints_are_whole():
    defaults = [zoo.read(name)['architecture'] for name in zoo.names() if zoo.read(name).get('default')]
    assert sorted(defaults) == sorted({zoo.read(name)['architecture'] for name in zoo.names()})  # one each
    for name in zoo.names():
        zoo.verify(name)
        record = zoo.read(name)
        assert name == f'{record["architecture"]}.{record["tag"]}'
        assert Path(timm.models.get_pretrained_cfg(f'gencnn_{name}').file).parent == zoo.FOLDER
