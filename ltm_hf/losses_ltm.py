"""Losses of tokens from hidden states, without logits of a whole batch: they exist a chunk at a time."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

IGNORED = -100  # the label that is not scored, as everywhere in transformers
CHUNK_BYTES = 2**25  # of float32 logits, the most that the losses below hold at a time


class Scored(NamedTuple):
    """The tokens that are scored, M of them: rows and positions, and the targets there."""

    places: tuple[torch.Tensor, ...]
    targets: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(cls, targets: torch.Tensor) -> "Scored":
        """Of targets (B, S), -100 where nothing is scored. Waits for a GPU."""
        places = (targets != IGNORED).nonzero(as_tuple=True)
        return cls(places, targets[places].long(), targets.shape)


def token_losses(head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor | Scored) -> torch.Tensor:
    """(B, S) float32 nats, -log p of the targets (B, S) given hidden states (B, S, D); 0 where a target is -100.

    A head that is frozen, or used without a graph, gets the scored tokens alone, a chunk at a time. All tokens at once
    go to one that learns or is compiled, and to one with hooks, which may count calls or gather weights at each.
    """
    hooked = head._forward_hooks or head._forward_pre_hooks
    if torch.is_tensor(targets) and (learns(head) or hooked or torch.compiler.is_compiling()):
        logits = head(hidden_states)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            targets.to(logits.device).flatten().long(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return losses.view(targets.shape)
    scored = Scored.of(targets.to(hidden_states.device)) if torch.is_tensor(targets) else targets
    states = hidden_states[scored.places]
    if learns(head) or hooked:
        losses = F.cross_entropy(head(states).float(), scored.targets.to(states.device), reduction="none")
    else:
        losses = _FrozenHeadLosses.apply(states, scored.targets, head)
    return losses.new_zeros(scored.shape).index_put(scored.places, losses)


def mean_loss(
    head: nn.Module,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Scalar float32 nats: the sum of `token_losses`, divided by num_items or else by the number of scored tokens.

    A head that learns gets the scored tokens a chunk at a time, too: every token weighs the same in a mean, so that its
    gradients need not wait for the backward pass. But only a plain `nn.Linear` whose gradient is its own to compute:
    under adapters, hooks, sharding or torch.compile all tokens go to it at once.
    """
    if num_items is None:
        num_items = (targets != IGNORED).sum()
    if not (learns(head) and _is_plain_linear(head)) or torch.compiler.is_compiling():
        total = token_losses(head, hidden_states, targets).sum()
        return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)
    targets = targets.to(hidden_states.device)
    num_items = torch.as_tensor(num_items, dtype=torch.float32, device=hidden_states.device)
    scored = (targets != IGNORED).nonzero(as_tuple=True)
    return _LearningHeadLoss.apply(hidden_states[scored], targets[scored].long(), head.weight, num_items)


def learns(head: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether its output is input @ weight.T and nothing else happens, or is to be known, when it is called."""
    if type(head) is not nn.Linear:
        return False
    weight = head.weight
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return (
        head.bias is None
        and type(weight) in (nn.Parameter, torch.Tensor)  # no DTensor
        and not hasattr(weight, "ds_id")  # ZeRO-3's
        and "forward" not in vars(head)  # accelerate's way to offload
        and not any(hooks)
    )


def _in_float32(*tensors: torch.Tensor) -> bool:
    same = all(tensor.dtype == torch.float32 for tensor in tensors)
    return same and not torch.is_autocast_enabled(tensors[0].device.type)


def _chunks(vocab_size: int, *tensors: torch.Tensor):
    """Rows of all tensors, (M, …) each, in even chunks whose logits take at most `CHUNK_BYTES`."""
    rows = max(1, CHUNK_BYTES // (4 * vocab_size))
    num_chunks = max(1, -(-len(tensors[0]) // rows))
    return zip(*(x.chunk(num_chunks) for x in tensors), strict=True)


def _cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, out=None) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p (M, 1) of targets (M, 1), and its gradient with respect to the logits (M, V), both float32.

    out: (M, V) float32 for the gradient, of logits that are float32 too.
    """
    if out is None:
        log_probabilities = logits.log_softmax(dim=-1, dtype=torch.float32)
    else:
        log_probabilities = torch.log_softmax(logits, dim=-1, out=out)
    losses = -log_probabilities.gather(1, targets)
    excess = log_probabilities.exp_()  # probability less the target's one
    return losses, excess.scatter_add_(1, targets, excess.new_full(targets.shape, -1.0))


class _FrozenHeadLosses(torch.autograd.Function):
    """-log p (M,) of targets (M,) given hidden states (M, D). Forward has the logits, and takes the gradient too."""

    @staticmethod
    def forward(ctx, hidden_states, targets, head):
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden_states) if wants_gradient else hidden_states
        losses = []
        # Buffers for all chunks where no class of the head's own has a say: new pages take a twentieth of the time.
        reuses, buffers = _is_plain_linear(head) and _in_float32(head.weight, hidden_states), None
        for states, wanted, place in _chunks(head.out_features, hidden_states, targets[:, None], gradient):
            if reuses:
                if buffers is None:
                    buffers = states.new_empty(2, len(states), head.out_features)
                logits = torch.mm(states, head.weight.T, out=buffers[0, : len(states)])
                loss, excess = _cross_entropy_(logits, wanted, out=buffers[1, : len(states)])
                if wants_gradient:
                    torch.mm(excess, head.weight, out=place)
            else:
                with torch.set_grad_enabled(wants_gradient):
                    states = states.detach().requires_grad_(wants_gradient)
                    # By the head's own forward and backward, so that it may be of any class. It gets no leaf, which
                    # torch's FlopCounterMode could not watch.
                    logits = head(states.view_as(states))
                loss, excess = _cross_entropy_(logits.detach(), wanted.to(logits.device))
                if wants_gradient:
                    place.copy_(torch.autograd.grad(logits, states, excess.to(logits.dtype))[0])
            losses.append(loss.squeeze(1).to(place.device))  # accelerate may have put the head elsewhere
            del logits, excess  # before the next chunk's
        if wants_gradient:
            ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weights):
        (gradient,) = ctx.saved_tensors
        return weights[:, None].to(gradient.dtype) * gradient, None, None


class _LearningHeadLoss(torch.autograd.Function):
    """Σ -log p / num_items of targets (M,) given hidden states (M, D) and weight (V, D). Forward takes both gradients.

    The weight's is summed in float32 or better, over chunks that under autocast are multiplied in half precision.
    """

    @staticmethod
    def forward(ctx, hidden_states, targets, weight, num_items):
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        # Cast here once: autocast would do it for each chunk, or keep a copy that has lost its graph.
        matrix = weight.detach().to(dtype)
        state_gradient = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
        total = weight_gradient.new_zeros((), dtype=torch.float32)
        places = hidden_states if state_gradient is None else state_gradient
        with torch.autocast(kind, enabled=False):
            for states, wanted, place in _chunks(len(weight), hidden_states, targets[:, None], places):
                states = states.to(dtype)
                losses, excess = _cross_entropy_(F.linear(states, matrix), wanted)
                total += losses.sum()
                excess = excess.div_(num_items).to(dtype)
                if dtype == weight_gradient.dtype:
                    torch.addmm(weight_gradient, excess.T, states, out=weight_gradient)
                else:
                    weight_gradient += excess.T @ states
                if state_gradient is not None:
                    place.copy_(excess @ matrix)
                del excess  # before the next chunk's
        ctx.save_for_backward(state_gradient, weight_gradient.to(weight.dtype))
        return total / num_items

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, weight):
        state_gradient, weight_gradient = (None if x is None else weight.to(x.dtype) * x for x in ctx.saved_tensors)
        return state_gradient, None, weight_gradient, None


class HeadPass:
    """Nats of tokens and their gradients, a chunk after the other, from one pass over the logits of each.

    The gradient of the head's weight comes with them, of the sum of weighted nats, where it is the head's own to
    compute: `weight_gradient`, which is None for a head that does not learn, or under adapters, hooks and sharding.
    """

    def __init__(self, head: nn.Module):
        self.head = head
        self.weight_gradient = None
        if _is_plain_linear(head) and learns(head):
            kind = head.weight.device.type
            autocast = torch.is_autocast_enabled(kind)
            self._matrix = head.weight.detach().to(torch.get_autocast_dtype(kind) if autocast else head.weight.dtype)
            dtype = torch.promote_types(self._matrix.dtype, torch.float32)
            self.weight_gradient = torch.zeros_like(self._matrix, dtype=dtype)

    def __call__(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(M,) float32 nats of targets (M,) given hidden states (M, D), and their gradient in these; 0 for -100.

        weights: (M,), of the nats in the loss that the head's weight learns from; None for none.
        """
        known = targets != IGNORED
        wanted = targets.clamp(min=0).long()
        if self.weight_gradient is None:
            with torch.enable_grad():
                leaf = hidden_states.detach().requires_grad_()
                nats = _FrozenHeadLosses.apply(leaf, wanted, self.head)
                (gradient,) = torch.autograd.grad(nats, leaf, known.to(nats.dtype))
            return nats.detach() * known, gradient
        gradient, losses = torch.empty_like(hidden_states), []
        weights = torch.zeros_like(known, dtype=torch.float32) if weights is None else weights
        with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
            parts = _chunks(
                len(self._matrix), hidden_states, wanted[:, None], known[:, None], weights[:, None], gradient
            )
            for states, target, is_known, weight, place in parts:
                states = states.to(self._matrix.dtype)
                nats, excess = _cross_entropy_(F.linear(states, self._matrix), target)
                excess = (excess * is_known).to(states.dtype)
                losses.append((nats * is_known).squeeze(1))
                place.copy_(excess @ self._matrix)
                self.weight_gradient += (excess * weight.to(excess.dtype)).T @ states
        return torch.cat(losses), gradient


class KnownLoss(torch.autograd.Function):
    """A loss whose gradients in the hidden states and in the head's weight are known already."""

    @staticmethod
    def forward(ctx, hidden_states, weight, loss, state_gradient, weight_gradient):
        ctx.save_for_backward(state_gradient.to(hidden_states.dtype), weight_gradient.to(weight.dtype))
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        state_gradient, weight_gradient = (upstream.to(x.dtype) * x for x in ctx.saved_tensors)
        return state_gradient, weight_gradient, None, None, None
