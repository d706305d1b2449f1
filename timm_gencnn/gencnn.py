"""The entrypoints `gencnn_<arch>`, which `registry` puts here.

timm lists a model by the last part of its entrypoint's module, hence `timm.list_models(module='gencnn')`.
"""

from timm.models import DefaultCfg

default_cfgs: dict[str, DefaultCfg] = {}
__all__: list[str] = []
