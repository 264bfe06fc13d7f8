"""The fast loop: from texts to a posterior over latents, by steps on the ELBO with the decoder frozen (Algorithm 1).

Shapes: B batch, S tokens, T inference steps, L layers, N latents a layer, D hidden. The one gradient that the loop
needs from the decoder is g = ∂NLL/∂z; the KL's is known in closed form.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import contextmanager
from types import MethodType
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.utils import logging

from .cache_ltm import CACHE, kept_latents
from .configuration_ltm import InferenceSettings, whole_number
from .likelihood_ltm import Text, before_latents, negative_log_likelihood, read
from .memory_ltm import MemoryState, prior_state, state_of
from .methods_ltm import InferenceMethod, method_of, step_size
from .posterior_ltm import FIT, LatentPosterior, check_posterior, keyed_normal

logger = logging.get_logger(__name__)

# ------------------------------------------------------------------ the decoder as a fixed function


@contextmanager
def frozen(model):
    """The model as a fixed function: its weights ask for no gradient, and nothing in it is random as in training.

    Yields modules of its own around the same weights, so that other threads may train and use the model meanwhile.
    Where a weight is gathered or moved into the very module that needs it (FSDP2, ZeRO-3, accelerate's offloading), and
    where these are compiled, it is the model itself, which one thread at a time can have, and is set back after.
    """
    if all(map(_can_be_copied, model.modules())):
        yield _fixed_copy(model)
        return
    with _ONE_THREAD:
        trainable = {name: x for name, x in model.named_parameters() if x.requires_grad and not x.is_inference()}
        random = [module for module in model.modules() if module.training and not _stays_in_training(module)]
        for parameter in trainable.values():
            parameter.requires_grad_(False)
        for module in random:
            module.training = False
        try:
            yield model
        finally:
            now = dict(model.named_parameters())  # FSDP2 puts others in their place
            for name, parameter in trainable.items():
                parameter.requires_grad_(True)
                now[name].requires_grad_(True)
            for module in random:
                module.training = True


_ONE_THREAD = threading.RLock()


def _stays_in_training(module) -> bool:
    """Gradient checkpointing works in training mode only."""
    return module.training and getattr(module, "gradient_checkpointing", False)


def _can_be_copied(module) -> bool:
    """Whether a copy of the module's attributes around the same weights does what the module does."""
    forward = vars(module).get("forward")  # autocast binds another to the module; offloading and torch.compile wrap it
    bound = forward is None or getattr(forward, "__self__", None) is module
    gathered = hasattr(module, "unshard") or any(hasattr(x, "ds_id") for x in module.parameters(recurse=False))
    return bound and not gathered and module._compiled_call_impl is None


def _fixed_copy(model):
    copies = {module: copy.copy(module) for module in model.modules()}
    config = copy.copy(model.config)
    for module, made in copies.items():
        attributes = vars(made)
        for name, value in vars(module).items():
            if isinstance(value, MethodType) and value.__self__ is module:
                attributes[name] = MethodType(value.__func__, made)
            elif value is model.config:
                attributes[name] = config
            elif name.endswith("_hooks") and value is not None:  # transformers hangs some in when it needs them
                attributes[name] = value.copy()
        attributes["_parameters"] = {name: _fixed(x) for name, x in module._parameters.items()}
        attributes["_buffers"] = {name: _fixed(x) for name, x in module._buffers.items()}
        attributes["_modules"] = {name: copies.get(child) for name, child in module._modules.items()}
        attributes["training"] = _stays_in_training(module)
    return copies[model]


def _fixed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    if tensor.is_inference():  # of a model built in inference mode: autograd could not save it
        return tensor.detach().clone()
    # Not detach(): there, autograd would notice steps that an optimiser takes meanwhile, and raise.
    return tensor.data if tensor.requires_grad else tensor


@contextmanager
def _without_checkpointing(model):
    """Without a graph there is nothing to compute again; transformers keeps no cache under checkpointing."""
    checkpointed = [module for module in model.modules() if _stays_in_training(module)]
    for module in checkpointed:
        module.training = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.training = True


@contextmanager
def _differentiable_attention(model, device: torch.device):
    """torch's flex_attention has no backward on the CPU: sdpa there, which computes the same. Restored after."""
    if device.type != "cpu" or model.config._attn_implementation != "flex_attention":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("flex_attention")


# ------------------------------------------------------------------ what a row falls back on, and where it stops


class _BestFinite:
    """What each row falls back on: its posterior with the best finite ELBO so far, the prior before there is one."""

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor):
        self.mean, self.log_variance = torch.zeros_like(mean), torch.zeros_like(mean)
        self.is_point = log_variance.isneginf()  # from the start; later it is a failure
        self.elbo = torch.full_like(mean[:, 0, 0, 0], -torch.inf)
        self.alive = torch.ones_like(self.elbo, dtype=torch.bool)

    def observe(self, mean, log_variance, elbo, gradient) -> torch.Tensor:
        """Take note of a step. Returns its gradient, zero in the rows that have turned non-finite."""
        self.alive = self.alive & elbo.isfinite() & gradient.flatten(start_dim=1).isfinite().all(dim=1)
        better = self.alive & (elbo > self.elbo)
        self.elbo = torch.where(better, elbo, self.elbo)
        self.mean = torch.where(_rows(better), mean, self.mean)
        self.log_variance = torch.where(_rows(better), log_variance, self.log_variance)
        return gradient.masked_fill(~_rows(self.alive), 0.0)

    def replace(self, mean, log_variance) -> tuple[torch.Tensor, torch.Tensor]:
        """The final posterior, with the rows that are not finite replaced."""
        spread = log_variance.masked_fill(self.is_point, 0.0)
        self.alive = self.alive & (mean + spread.exp() + spread).flatten(start_dim=1).isfinite().all(dim=1)
        keep = _rows(self.alive)
        return torch.where(keep, mean, self.mean), torch.where(keep, log_variance, self.log_variance)


class _EarlyStop:
    """Holds each row's posterior from where its ELBO ceased to gain: a row stops at the same step in any batch."""

    WINDOW = 4  # steps: a single ELBO is too noisy to compare

    def __init__(self, tolerance: float, num_tokens: torch.Tensor):
        self.least_gain = tolerance * num_tokens
        self.stopped = num_tokens == 0
        self.mean = self.log_variance = None

    def observe(self, trace: list[torch.Tensor], mean, log_variance) -> None:
        """Take note of a step's outcome."""
        if self.mean is None:
            self.mean, self.log_variance = mean.clone(), log_variance.clone()
        running = _rows(~self.stopped)
        self.mean = torch.where(running, mean, self.mean)
        self.log_variance = torch.where(running, log_variance, self.log_variance)
        if len(trace) >= 2 * self.WINDOW:
            before, now = torch.stack(trace[-2 * self.WINDOW :]).unflatten(0, (2, self.WINDOW)).mean(dim=1)
            self.stopped = self.stopped | ~(now - before >= self.least_gain)


def processes_go_together(model) -> bool:
    """Whether all processes must take the same steps: in training, and where weights are sharded.

    Elsewhere each goes its own way, and one alone may infer.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    fsdp2 = any(hasattr(module, "unshard") for module in model.modules())
    return model.training or fsdp2 or any(hasattr(parameter, "ds_status") for parameter in model.parameters())


def _on_all_processes(together: bool, done: torch.Tensor) -> bool:
    """Whether no process needs another step, where they go together."""
    if together:
        done = done.to(torch.int32)
        torch.distributed.all_reduce(done, torch.distributed.ReduceOp.MIN)
    return bool(done)


def _rows(mask: torch.Tensor) -> torch.Tensor:
    return mask[:, None, None, None]


# ------------------------------------------------------------------ an encoder in place of steps


def amortized_posterior(model, text: Text) -> LatentPosterior:
    """q(z|x) as the model's encoder gives it, differentiable: what training by `inference_method="amortized"` needs.

    The encoder reads as far as the last token that is scored, which is as far as a fit could. A sequence with no token
    to score gets the prior. Raises ValueError for a model without an encoder.
    """
    encoder = getattr(model, "encoder", None)
    if encoder is None:
        raise ValueError(
            "inference_method='amortized' needs a model with an encoder, built with that inference_method in its "
            "configuration."
        )
    scored_later = text.is_scored.flip(1).cumsum(dim=1).flip(1) > 0  # than a position
    reads = F.pad(scored_later, (1, 0), value=True)[:, :-1]
    if text.mask is not None:
        reads = reads & text.mask.bool()
    mean, log_variance = encoder(model.get_input_embeddings()(text.input_ids), reads)
    nothing_to_explain = _rows(text.num_tokens == 0)
    mean, log_variance = (x.masked_fill(nothing_to_explain, 0.0) for x in (mean, log_variance))
    return LatentPosterior(mean, log_variance, mean.new_zeros((0, len(mean))), text.keys)


# ------------------------------------------------------------------ the loop


def infer_posterior(
    model,
    input_ids: torch.Tensor | Text,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_inference_steps: int | None = None,
    inference_method: str | None = None,
    inference_learning_rate: float | None = None,
    inference_lr_schedule: str | None = None,
    inference_noise: str | None = None,
    inference_kl_weight: float | None = None,
    inference_tolerance: float | None = None,
    seed: int | None = None,
    initial_posterior: LatentPosterior | None = None,
    epsilon: torch.Tensor | None = None,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> LatentPosterior:
    """Fit q(z|x) to each sequence by T steps on its ELBO (paper Algorithm 1, fast loop).

    A memory reads the sequence once and holds q(z|x) then; each further step starts there, with errors at its mean.

    input_ids, attention_mask, labels: (B, S); padding and labels of -100 are not explained. Default: all of input_ids.
    num_inference_steps … inference_tolerance: default to the model's configuration, where they are described.
    seed: default 0. Noise is a function of (seed, the sequence's tokens, step): a sequence gets the same posterior
        alone, in any batch, padded on either side. torch's generators are left alone.
    initial_posterior: where to start. epsilon: (B, L, N, D) noise for all steps, or (T, B, L, N, D), one for each;
        "lbfgs" has no use for any.
    callback: called after each step with (step, the step's latents (B, L, N, D), its ELBO (B,)).

    The decoder is frozen: no weight gradient is computed, `param.grad` is untouched. Works inside `torch.no_grad` and
    `torch.inference_mode`. Latents are float32 whatever the model's dtype. A sequence with no token to score gets the
    prior; one whose objective turns non-finite keeps its best finite posterior, and a warning counts them.
    Raises ValueError for bad input before any computation.
    """
    settings = InferenceSettings.of(
        model.config,
        num_inference_steps=num_inference_steps,
        inference_method=inference_method,
        inference_learning_rate=inference_learning_rate,
        inference_lr_schedule=inference_lr_schedule,
        inference_noise=inference_noise,
        inference_kl_weight=inference_kl_weight,
        inference_tolerance=inference_tolerance,
    )
    text = Text.of(model, input_ids, attention_mask, labels)
    seed = whole_number("seed", seed or 0)
    _check(model.config, settings, text, initial_posterior, epsilon)
    together = processes_go_together(model)
    # A caller's inference mode is left: what autograd saves must not be inference tensors.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        frozen(model) as decoder,
        _differentiable_attention(decoder, text.input_ids.device),
    ):
        text = text.outside_inference_mode()
        if decoder.config.has_memory:
            nothing = _on_all_processes(together, (text.num_tokens == 0).all())
            steps = 0 if nothing else settings.num_inference_steps
            return _remembered(decoder, text, steps, settings.inference_kl_weight, initial_posterior, callback)
        fit = _Fit(decoder, text, settings, seed, initial_posterior, epsilon, callback)
        return _counted(_fitted(fit, together))


def _fitted(fit: "_Fit", together: bool) -> LatentPosterior:
    """The posterior after the fast loop, which ends early where all sequences of all processes have stopped."""
    for step in range(0 if _on_all_processes(together, fit.done) else fit.num_steps):
        fit.step(step)
        if fit.early_stop is not None and _on_all_processes(together, fit.early_stop.stopped.all()):
            break
    return fit.posterior()


def _counted(posterior: LatentPosterior) -> LatentPosterior:
    if posterior.num_non_finite:
        logger.warning(
            f"The objective of {posterior.num_non_finite} of {len(posterior)} sequences turned non-finite during "
            "inference; they keep their best finite posterior."
        )
    return posterior


def _check(config, settings: InferenceSettings, text: Text, initial_posterior, epsilon) -> None:
    if not config.num_latents:
        raise ValueError("This model was built with num_latents=0: it has no latents to infer.")
    method, shape = method_of(settings), (len(text.input_ids), *config.latent_shape)
    if config.has_memory and epsilon is not None:
        raise ValueError("epsilon is noise for steps of inference, and a memory infers without any.")
    if initial_posterior is not None:
        check_posterior(initial_posterior, name="initial_posterior")
        if not method.takes_steps:
            raise ValueError(
                "initial_posterior is where inference starts, and inference_method="
                f"{settings.inference_method!r} takes no step."
            )
        if initial_posterior.mean.shape != shape:
            raise ValueError(
                f"initial_posterior must have the shape {shape} (batch, layers, latents a layer, hidden), "
                f"got {tuple(initial_posterior.mean.shape)}."
            )
        if not method.is_point and initial_posterior.log_variance.isneginf().any():
            raise ValueError(
                "initial_posterior is a point (log_variance of -inf): no Gaussian can be fitted from there."
            )
    steps = settings.num_inference_steps if method.takes_steps else 0
    if epsilon is not None and epsilon.shape not in (shape, (steps, *shape)):
        raise ValueError(f"epsilon must have the shape {shape} or {(steps, *shape)}, got {tuple(epsilon.shape)}.")


class _Fit:
    """One run of the loop over a batch: where it is, and how a step goes."""

    def __init__(self, decoder, text: Text, settings: InferenceSettings, seed, initial_posterior, epsilon, callback):
        self.decoder, self.text, self.settings, self.seed, self.callback = decoder, text, settings, seed, callback
        self.epsilon = epsilon.clone() if epsilon is not None and epsilon.is_inference() else epsilon
        self.keys, self.shape = text.keys, decoder.config.latent_shape
        self.nothing_to_explain = text.num_tokens == 0
        self.done = self.nothing_to_explain.all()
        kind = method_of(settings)
        self.num_steps = settings.num_inference_steps if kind.takes_steps else 0
        if not kind.takes_steps:
            initial_posterior = amortized_posterior(decoder, text)
        mean, log_variance = self._start(kind, initial_posterior)
        # ZeRO-3 learns the order of a forward pass's modules, to gather their weights ahead: it must not change.
        sharded = any(hasattr(parameter, "ds_status") for parameter in decoder.parameters())
        self.state = None
        if self.num_steps and not sharded and not self.done:
            with torch.no_grad():
                self.state = before_latents(decoder, text)
        self.method: InferenceMethod = kind(mean, log_variance)
        self.best = _BestFinite(mean, log_variance)
        tolerance = settings.inference_tolerance
        self.early_stop = None if tolerance is None or kind.is_point else _EarlyStop(tolerance, text.num_tokens)
        self.trace = []

    def _start(self, kind, initial) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of where the loop starts: the caller's posterior, or a sample of it for a point, or the method's."""
        if initial is None:
            return kind.start(self.keys, self.shape, self.seed)
        mean, log_variance = (x.detach().clone().float() for x in (initial.mean, initial.log_variance))
        if not kind.is_point:
            return mean, log_variance
        noise, point = kind.start(self.keys, self.shape, self.seed)
        return LatentPosterior(mean, log_variance).reparameterize(noise), point

    def step(self, step: int) -> None:
        method, noise = self.method, self._noise(step)
        now = LatentPosterior(method.mean, method.log_variance)
        latents = now.reparameterize(noise).detach().requires_grad_()
        if self.state is None:
            nll = negative_log_likelihood(self.decoder, self.text, latents)
        else:
            nll = read(self.decoder, self.state, self.text, latents)
        (gradient,) = torch.autograd.grad(nll.sum(), latents)
        with torch.no_grad():
            prior = now.mean.square().flatten(start_dim=1).sum(dim=1) / 2 if method.is_point else now.kl_divergence()
            self.trace.append(-(nll + prior))
            gradient = self.best.observe(now.mean, now.log_variance, self.trace[-1], gradient)
            if self.callback is not None:
                self.callback(step, latents.detach(), self.trace[-1])
            method.update(gradient / self.settings.inference_kl_weight, noise, step_size(self.settings, step))
            if self.early_stop is not None:
                self.early_stop.observe(self.trace, method.mean, method.log_variance)

    def _noise(self, step: int) -> torch.Tensor:
        if self.method.at_mean:
            return torch.zeros_like(self.method.mean)
        if self.epsilon is not None:
            return self.epsilon[step] if self.epsilon.ndim == 5 else self.epsilon
        draw = step if self.settings.inference_noise == "fresh" or self.method.is_point else 0
        return keyed_normal(self.keys, self.shape, self.seed, FIT, draw)

    @torch.no_grad()
    def posterior(self) -> LatentPosterior:
        fitted = self.method if self.early_stop is None or not self.trace else self.early_stop
        mean, log_variance = self.best.replace(fitted.mean, fitted.log_variance)
        mean, log_variance = (x.masked_fill(_rows(self.nothing_to_explain), 0.0) for x in (mean, log_variance))
        trace = torch.stack(self.trace) if self.trace else mean.new_zeros((0, len(mean)))
        return LatentPosterior(mean, log_variance, trace, self.keys, int((~self.best.alive).sum()))


# ------------------------------------------------------------------ of a memory


def _remembered(decoder, text: Text, steps: int, kl_weight: float, initial, callback) -> LatentPosterior:
    """What a memory holds after a text: reading it once is the first step, in closed form (see memory_ltm)."""
    rows, device = len(text.input_ids), text.input_ids.device
    trace = []

    def note(nll, mean):
        trace.append(-nll)
        if callback is not None:
            callback(len(trace) - 1, mean, trace[-1])

    if initial is None:
        state = prior_state(decoder.config, rows, device)
        posterior = MemoryState.of(state, decoder.config.hidden_size).posterior()
    else:
        state, posterior = state_of(initial, decoder.config.num_attention_heads), initial
    if steps:
        with torch.no_grad(), _without_checkpointing(decoder):
            output = decoder(
                input_ids=text.input_ids, attention_mask=text.mask, shift_labels=text.targets, loss_reduction="none",
                latent_state=state, latent_writes=F.pad(text.is_scored[:, :-1], (1, 0)), use_cache=True,
            )  # fmt: skip
        posterior = kept_latents(getattr(output, CACHE))["memory"].posterior()
        note(output.loss.sum(dim=1), posterior.mean)
    mean, log_variance = posterior.mean, posterior.log_variance
    if steps > 1:
        mean = _refined(decoder, text, steps, kl_weight, mean, log_variance.exp(), note)
    finite = (mean + log_variance).flatten(start_dim=1).isfinite().all(dim=1)
    keep = _rows(finite & (text.num_tokens > 0))
    mean, log_variance = (torch.where(keep, x, 0.0) for x in (mean, log_variance))
    trace = torch.stack(trace) if trace else mean.new_zeros((0, rows))
    return _counted(LatentPosterior(mean, log_variance, trace, text.keys, int((~finite).sum())))


class _Point(NamedTuple):
    """Where further steps of a memory are. objective: (B,) nats, -log p(x|mean) + κ|mean|²/2."""

    mean: torch.Tensor
    objective: torch.Tensor
    nll: torch.Tensor
    gradient: torch.Tensor  # (mean + g/κ)

    @classmethod
    def at(cls, decoder, text: Text, mean: torch.Tensor, kl_weight: float) -> "_Point":
        mean = mean.detach().requires_grad_()
        nll = negative_log_likelihood(decoder, text, mean)
        (gradient,) = torch.autograd.grad(nll.sum(), mean)
        mean, nll = mean.detach(), nll.detach()
        objective = nll + kl_weight * mean.square().flatten(start_dim=1).sum(dim=1) / 2
        return cls(mean, objective, nll, mean + gradient / kl_weight)

    def where(self, rows: torch.Tensor, other: "_Point") -> "_Point":
        """The other's rows where `rows` (B,) is False."""
        return _Point(
            *(torch.where(_rows(rows) if a.ndim == 4 else rows, a, b) for a, b in zip(self, other, strict=True))
        )


def _refined(decoder, text: Text, steps: int, kl_weight: float, mean, variance, note) -> torch.Tensor:
    """The mean after further steps: mean ← mean - ρ (mean + g/κ)/precision, with all errors at the mean of now.

    The precision is what reading gave. A step that raises what inference lowers is not taken; then ρ, 1 before, halves.
    """
    rate = mean.new_ones(len(mean))
    best = _Point.at(decoder, text, mean, kl_weight)
    for _ in range(steps - 1):
        note(best.nll, best.mean)
        tried = _Point.at(decoder, text, best.mean - _rows(rate) * best.gradient * variance, kl_weight)
        better = tried.objective <= best.objective
        best, rate = tried.where(better, best), torch.where(better, rate, rate / 2)
    return best.mean


__all__ = ["amortized_posterior", "infer_posterior"]
