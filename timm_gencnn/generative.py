"""The generative reading of a classifier: every class y is a density over images.

The logit f_y(x) of class y tilts a reference distribution q(x) over images (Dai, Lu, Wu, "Generative Modeling of
Convolutional Neural Networks", ICLR 2015, arXiv 1412.6296, equation 2):

    p_y(x) = exp(f_y(x)) q(x) / Z_y,      Z_y = E_q[exp f_y(x)]

`as_generative` gives any classifier these methods by swapping its class for a subclass that adds no parameter: the
state dict stays the plain model's, and so does `forward`. This module knows nothing of sampling or of training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

__all__ = ['GenerativeMixin', 'LogZEstimate', 'as_generative']


class LogZEstimate(NamedTuple):
    """What `GenerativeMixin.estimate_log_z` found.

    Attributes:
        log_z: log Z_y of each class, float64 [C].
        ess: Effective number of images behind each log Z_y, 1 / sum_j W_j^2 with W_j = softmax_j f_y(x_j): float64 [C],
            between 1 (one image carries all the weight, do not trust it) and `n`.
        n: Number of images.
    """

    log_z: Tensor
    ess: Tensor
    n: int


class GenerativeMixin(nn.Module):
    """The methods that `as_generative` adds to a classifier.

    Attributes:
        log_z: log Z_y of each class [num_classes], float32 until the model is converted, or None while unknown. A
            buffer outside the state dict: it travels as the model argument `log_z` in a config.json. It describes the
            weights it was estimated with, so estimate it again after training or after loading other weights.
    """

    if TYPE_CHECKING:  # torch.jit.script reads the annotations of a class, and knows neither these nor properties
        log_z: Tensor | None
        _before_fold: _Fold | None
        _image_shape: tuple[int, ...] | None

    __jit_unused_properties__ = ('folded', '_model_args')

    def score(self, x: Tensor, y: int | Tensor | None = None) -> Tensor:
        """Return the scores f_y(x), that is the logits.

        Args:
            x: Images [n, C, H, W], normalised for the model.
            y: Class of each image [n], or one class for all; None for all classes.

        Returns:
            float32 scores (float64 of a float64 model): [n] if y is given, else [n, num_classes].

        Raises:
            ValueError: If the model is in train mode, mixes the images of a batch or has no classifier, refuses the
                images or gives NaN, or if y is not a class.
        """
        return _take_class(self._logits(x), y)

    def log_ratio(self, x: Tensor, y: int | Tensor | None = None) -> Tensor:
        """Return the log density ratios log p_y(x) / q(x) = f_y(x) - log Z_y.

        Takes the arguments of `score`; shapes and errors are the same, and `log_z` must be known.
        """
        return _take_class(self._log_ratios(x), y)

    def energy(
        self, x: Tensor, y: int | Tensor | None = None, priors: Sequence[float] | Tensor | None = None
    ) -> Tensor:
        """Return the energy of images relative to the reference: low where the model expects images.

        For a class it is E_y(x) = -f_y(x), so that p_y(x) = exp(-E_y(x)) q(x) / Z_y. For no class in particular it
        is that of the mixture of the classes, which is normalised and so needs log Z_y:

            E(x) = -log sum_y rho_y exp(f_y(x) - log Z_y),      p(x) = sum_y rho_y p_y(x) = exp(-E(x)) q(x)

        Args:
            x: Images [n, C, H, W], normalised for the model.
            y: Class of each image [n], or one class for all; None for the mixture.
            priors: Class probabilities rho, or counts, [num_classes] (the mixture only); None for equal ones.

        Returns:
            Energies [n].

        Raises:
            ValueError: As `score`; without `y` also if `log_z` is unknown or the priors are not positive numbers.
        """
        if y is not None:
            return -self.score(x, y)
        log_ratios = self._log_ratios(x)
        return -(log_ratios + _log_priors(priors, log_ratios)).logsumexp(dim=1)

    def posterior(self, x: Tensor, priors: Sequence[float] | Tensor | None = None) -> Tensor:
        """Return the class probabilities p(y | x) = softmax_y(f_y(x) - log Z_y + log rho_y).

        They are the ordinary softmax of the logits only once the intercepts are folded (or were learned).

        Args:
            x: Images [n, C, H, W], normalised for the model.
            priors: Class probabilities rho, or counts, [num_classes]; None for equal ones.

        Returns:
            Probabilities [n, num_classes].

        Raises:
            ValueError: As `score`, and if `log_z` is unknown or the priors are not positive numbers.
        """
        log_ratios = self._log_ratios(x)
        return (log_ratios + _log_priors(priors, log_ratios)).softmax(dim=1)

    @torch.no_grad()
    def estimate_log_z(self, loader: Iterable[Any], progress: bool = True) -> LogZEstimate:
        """Estimate log Z_y = log mean_j exp f_y(x_j) in one pass over images of the reference, and keep it as `log_z`.

        The reference of a network trained with the generative gradient is its training set, whatever the classes.

        Args:
            loader: Batches of images [n, C, H, W], or tuples or lists that start with them; normalised for the model,
                and brought to its device and dtype here.
            progress: Show a progress bar.

        Returns:
            The estimate, with the effective sample size of each class.

        Raises:
            ValueError: As `score`, and if the loader has no images or gives something else.
        """
        from tqdm.auto import tqdm

        parameter = next(self.parameters())
        log_sum = log_sum_of_squares = torch.tensor(-torch.inf, dtype=torch.float64, device='cpu')
        n = 0
        for batch in tqdm(loader, desc='log Z', disable=not progress):
            images = batch[0] if isinstance(batch, tuple | list) and batch else batch
            if not isinstance(images, Tensor) or not images.is_floating_point():
                what = f'tensor of {images.dtype}' if isinstance(images, Tensor) else type(images).__name__
                raise ValueError(
                    f'the loader gives a {what} where normalised images [n, C, H, W] are needed: make its batches '
                    'float tensors, or tuples that start with one'
                )
            logits = self._logits(images.to(parameter)).double().cpu()
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(dim=0))
            log_sum_of_squares = torch.logaddexp(log_sum_of_squares, (2 * logits).logsumexp(dim=0))
            n += len(images)
            self._image_shape = tuple(images.shape[1:])
        if n == 0:
            raise ValueError('the loader has no images, so log Z cannot be estimated: give at least one batch')
        log_z = log_sum - math.log(n)
        self.set_log_z(log_z)
        return LogZEstimate(log_z, (2 * log_sum - log_sum_of_squares).exp(), n)

    def set_log_z(self, log_z: Sequence[float] | Tensor | None) -> None:
        """Set log Z_y of each class to known values, or forget it with None.

        Args:
            log_z: log Z_y of each class [num_classes], or None.

        Raises:
            ValueError: If there is not one finite number for each class.
        """
        if log_z is None:
            self.log_z = None
            return
        values = torch.as_tensor(log_z, dtype=torch.float32).detach().clone()
        classes = getattr(self, 'num_classes', values.numel())
        if values.shape != (classes,) or not values.isfinite().all():
            raise ValueError(
                f'log_z of shape {tuple(values.shape)} with {int((~values.isfinite()).sum())} non-finite values: '
                f'{type(self).__name__} needs one finite number for each of its {classes} classes (num_classes, to be '
                'set along with a head that is put in by hand)'
            )
        self.log_z = values.to(next(self.parameters()).device)

    @property
    def folded(self) -> bool:
        """Whether the classifier's bias is the one that `fold_intercepts` left, with the intercepts in it."""
        fold = self._before_fold
        if fold is None:
            return False
        try:
            biases = self._final_biases(len(fold.alpha))
        except ValueError:  # another head since
            return False
        return all(torch.equal(bias, after.to(bias)) for bias, after in zip(biases, fold.after, strict=True))

    @torch.no_grad()
    def fold_intercepts(self, priors: Sequence[float] | Tensor | None = None) -> None:
        """Add the intercepts alpha_y = log rho_y - log Z_y to the classifier's bias.

        The softmax of the logits is then the posterior, and their argmax the most probable class. The generative loss
        does not see a constant added to a class's logits, so a network trained with it alone needs this once; one
        trained (or fine-tuned) to discriminate has learned the intercepts and would be ruined by it. `log_z` becomes
        log rho_y, which leaves `log_ratio` and `posterior` as they are. A model that averages several heads gets the
        intercepts in each.

        Args:
            priors: Class probabilities rho, or counts, [num_classes]; None for equal ones.

        Raises:
            ValueError: If the intercepts are folded already, `log_z` is unknown, the model is in train mode, or its
                logits are not those of a linear layer with a bias (nothing is changed then).
        """
        if self.folded:
            raise ValueError('the intercepts are folded already: call unfold_intercepts() first')
        log_z = self._known_log_z().double().cpu()
        alpha = _log_priors(priors, log_z) - log_z
        biases, probe = self._final_biases(len(alpha)), self._probe_images()
        before = [bias.clone() for bias in biases]
        expected = self._logits(probe).double().cpu() + alpha
        for bias in biases:
            bias.copy_(bias.double().cpu() + alpha)
        error = (self._logits(probe).double().cpu() - expected).abs().max()
        if error > 32 * torch.finfo(biases[0].dtype).eps * (expected.abs().max() + alpha.abs().max()):
            for bias, original in zip(biases, before, strict=True):
                bias.copy_(original)
            raise ValueError(
                f'the logits of {type(self).__name__} do not follow the bias of its last linear layer, so the '
                'intercepts cannot be folded into it: use posterior(), which applies them to the logits'
            )
        self._before_fold = _Fold(alpha, before, [bias.clone() for bias in biases])
        self.set_log_z(log_z + alpha)

    @torch.no_grad()
    def unfold_intercepts(self) -> None:
        """Undo `fold_intercepts`: the bias is again bit for bit what it was.

        Raises:
            ValueError: If the intercepts are not folded, or the bias has changed since.
        """
        fold = self._before_fold
        if fold is None:
            raise ValueError('the intercepts are not folded, so they cannot be unfolded: call fold_intercepts() first')
        if not self.folded:
            raise ValueError(
                'the classifier bias has changed since fold_intercepts() (by training, or by loading weights), so it '
                'cannot be restored: load the weights you want and call estimate_log_z()'
            )
        for bias, before in zip(self._final_biases(len(fold.alpha)), fold.before, strict=True):
            bias.copy_(before)
        self._before_fold = None
        self.set_log_z(self._known_log_z().double().cpu() - fold.alpha)

    def _logits(self, x: Tensor) -> Tensor:
        """Run the model and check that what comes out are the logits of a fixed function of each image."""
        name = type(self).__name__
        if self.training or any(_is_random_or_coupled(module) for module in self.modules()):
            raise ValueError(f'{name} is in train mode, where it is not one function of an image: call .eval() first')
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in self.modules()):
            raise ValueError(
                f'{name} has a batch norm without running statistics, where the score of an image depends on the rest '
                'of its batch: make it with track_running_stats=True'
            )
        if getattr(self, 'num_classes', None) == 0:
            raise ValueError(f'{name} has no classifier (num_classes=0), hence no scores: create it with num_classes')
        try:
            logits = self(x)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f'{name} refuses images of shape {tuple(x.shape)}: {error}') from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f'{name} gives {shape} where logits [n, num_classes] are needed: is it a classifier?')
        if logits.isnan().any():
            raise ValueError(f'{name} gives NaN logits: check its weights and that the images are finite')
        return logits if logits.dtype == torch.float64 else logits.float()

    def _log_ratios(self, x: Tensor) -> Tensor:
        logits, log_z = self._logits(x), self._known_log_z()
        if log_z.shape != logits.shape[1:]:
            raise ValueError(
                f'log Z of {len(log_z)} classes is known, but {type(self).__name__} gives {logits.shape[1]} logits: '
                'call estimate_log_z(loader) again for the new head'
            )
        return logits - log_z.to(logits)

    def _known_log_z(self) -> Tensor:
        if self.log_z is None:
            raise ValueError(
                f'log Z of {type(self).__name__} is not known: call estimate_log_z(loader) with training images, or '
                'set_log_z(values)'
            )
        return self.log_z

    def _final_biases(self, classes: int) -> list[Tensor]:
        """The `head_biases`, one for each class."""
        heads = head_biases(self)
        biases = [bias for bias in heads if bias is not None and len(bias) == classes]
        if len(biases) < len(heads):
            raise ValueError(
                f'the classifier of {type(self).__name__} does not end in a linear layer with {classes} biases to '
                'fold the intercepts into: use posterior(), which applies them to the logits'
            )
        return biases

    def _probe_images(self) -> Tensor:
        shape = self._image_shape
        if shape is None and hasattr(self, 'pretrained_cfg'):
            shape = get_model_input_config(self)['input_size']
        if shape is None:
            raise ValueError(
                f'{type(self).__name__} does not tell its image size, needed to test the fold: call estimate_log_z()'
            )
        parameter = next(self.parameters())
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), device='cpu').to(parameter)

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm records for rebuilding the model from a config.json, with log Z always as it is now."""
        args = {k: v for k, v in self.__dict__.get('_model_args', {}).items() if k != 'log_z'}
        return args if self.log_z is None else {**args, 'log_z': self.log_z.tolist()}

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self.__dict__['_model_args'] = args

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the base class, since the dynamic subclass is in no module's namespace."""
        reduced: Any = super().__reduce_ex__(protocol)
        rebuild, (_, *args), *rest = reduced
        return _rebuild, (type(self).__bases__[1], rebuild, *args), *rest


class _Fold(NamedTuple):
    """What `unfold_intercepts` needs: the intercepts, and the biases before and after."""

    alpha: Tensor
    before: list[Tensor]
    after: list[Tensor]


def as_generative(model: nn.Module) -> GenerativeMixin:
    """Give a classifier the methods of `GenerativeMixin`, in place.

    The model's class becomes a subclass of what it was and of `GenerativeMixin`. Parameters, buffers in the state dict
    and `forward` are untouched, so checkpoints of the plain model load and the other way round.

    Args:
        model: Any module that maps images [n, C, H, W] to logits [n, num_classes]. Wrap it before `torch.compile`,
            distributed wrappers and the like.

    Returns:
        The same object; a model that is generative already is returned as it is.

    Raises:
        ValueError: If `model` is not a torch module, or a wrapper or script module whose class cannot be extended, or
            if it has something of its own by the name of what is added.
    """
    if isinstance(model, GenerativeMixin):
        return model
    if not isinstance(model, nn.Module):
        raise ValueError(f'{model!r} is not a torch module: give a model, e.g. timm.create_model("resnet50")')
    if isinstance(model, torch._dynamo.OptimizedModule | torch.jit.ScriptModule):
        raise ValueError(f'{type(model).__name__} is compiled: call as_generative on the plain model, then compile it')
    base: Any = type(model)
    hidden = [name for name in _ADDED if hasattr(model, name)]
    if hidden:
        raise ValueError(
            f'{base.__name__} has {", ".join(hidden)} of its own, which the generative class would hide: rename it, or '
            'give as_generative the wrapper nn.Sequential(model)'
        )
    model.__class__ = _generative_class(base)
    assert isinstance(model, GenerativeMixin)
    model.register_buffer('log_z', None, persistent=False)
    model._before_fold = None
    model._image_shape = None
    return model


def head_biases(model: nn.Module) -> list[Tensor | None]:
    """The bias, if any, of the classifier's last linear layer, or of each head's where the model averages several."""
    get_classifier = getattr(model, 'get_classifier', None)
    heads: Any = model if get_classifier is None else get_classifier()
    heads = heads if isinstance(heads, tuple | list | nn.ModuleList) else (heads,)
    layers = [[m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d)] for head in heads]
    return [linear[-1].bias if linear else None for linear in layers]


# All that `as_generative` adds; timm sets `_model_args` itself.
_ADDED = sorted(
    {name for name in vars(GenerativeMixin) if not hasattr(nn.Module, name) and not name.startswith('__')}
    - {'_model_args'}
    | {'log_z', '_before_fold', '_image_shape'}
)


@functools.cache
def _generative_class(base: Any) -> type[GenerativeMixin]:
    namespace: dict[str, Any] = {'__module__': __name__, '__doc__': base.__doc__}
    if hasattr(base, 'reset_classifier'):
        namespace['reset_classifier'] = _forget_log_z(base.reset_classifier)
    return type(f'Generative{base.__name__}', (GenerativeMixin, base), namespace)


def _forget_log_z(reset_classifier: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(reset_classifier)
    def reset_and_forget(self: GenerativeMixin, *args: Any, **kwargs: Any) -> None:
        reset_classifier(self, *args, **kwargs)
        self.set_log_z(None)
        self._before_fold = None

    return reset_and_forget


def _rebuild(base: Any, rebuild: Callable[..., nn.Module], *args: Any) -> nn.Module:
    return rebuild(_generative_class(base), *args)


def _is_random_or_coupled(module: nn.Module) -> bool:
    """Whether a layer in train mode makes the score of an image depend on chance or on the rest of the batch."""
    coupled = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return module.training and (coupled or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0))


def _take_class(values: Tensor, y: int | Tensor | None) -> Tensor:
    """Pick the class y of each image: [n, C] -> [n]; all classes if y is None."""
    if y is None:
        return values
    n, classes = values.shape
    target = torch.as_tensor(y, device=values.device)
    if target.is_floating_point() or target.dtype == torch.bool or target.shape not in ((), (n,)):
        raise ValueError(
            f'y of type {target.dtype} and shape {tuple(target.shape)}: give a class, or one for each of {n} images'
        )
    outside = (target < 0) | (target >= classes)
    if outside.any():
        raise ValueError(f'y has class {int(target[outside].flatten()[0])}, but the classes are 0 to {classes - 1}')
    return values.gather(1, target.long().expand(n)[:, None])[:, 0]


def _log_priors(priors: Sequence[float] | Tensor | None, like: Tensor) -> Tensor:
    """log rho_y [C] of probabilities or counts, on the device and in the dtype of `like` [..., C]."""
    classes = like.shape[-1]
    if priors is None:
        return like.new_full((classes,), 1 / classes).log()
    rho = torch.as_tensor(priors, dtype=torch.float64).cpu()
    if rho.shape != (classes,) or not (rho > 0).all() or not rho.isfinite().all():
        raise ValueError(f'priors {rho.tolist()}: give {classes} positive numbers, one for each class')
    return (rho / rho.sum()).log().to(like)
