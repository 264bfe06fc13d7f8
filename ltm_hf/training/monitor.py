"""Watching a run: a progress bar that says how it goes, FLOPs in use, and warnings that name a cause."""

import logging
import math
import statistics

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..likelihood_ltm import Text, elbo
from ..posterior_ltm import LatentPosterior

logger = logging.getLogger(__name__)

# 10¹² dense bfloat16 FLOPs per second of one device, by the words of its name; of several that fit, the first.
PEAK_TFLOPS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312,
    "MI300X": 1307, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip

LATENTS_UNUSED = (0.01, 0.001)  # nats a token: a KL below the one, and a bound that gains less than the other by it
STILL_RISING = 0.01  # nats a token that the last inference step gained
VARIANCE_OFF = 0.01  # nats a token that variances e times as large, or as small, would gain
SPIKE = (6.0, 0.1)  # standard deviations, and nats a token, above the mean of
WINDOW = (5, 10)  # the last logged losses: the fewest to judge by, and the most


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOPs per second of a GPU as its maker states them; None for a CPU or a GPU not in the table."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if set(name.split()) <= set(words)), None)


def perplexity(nats: float) -> float:
    """exp, as far as a float goes."""
    return math.exp(min(nats, 700.0))  # the largest that a float holds is e⁷⁰⁹


def mean(total: float, count: float) -> float:
    """NaN of nothing."""
    return total / count if count else math.nan


# ---------------------------------------------------------------- what an evaluation says about the fast loop


def trace_sums(posterior: LatentPosterior, evidence: Text, num_steps: int, final=None) -> dict[str, float]:
    """The ELBO at each of `num_steps` steps, summed over rows, and the tokens in it; `final` (B,): after the last.

    A fit that stopped early stays where it stopped. Rows without tokens, and rows that turned non-finite, are left out.
    """
    num_tokens = evidence.num_tokens
    trace = posterior.elbo_trace
    if len(trace) == 0:
        trace = posterior.mean.new_zeros((1, len(num_tokens)))
    trace = torch.cat([trace, trace[-1:].expand(max(0, num_steps - len(trace)), -1)])[:num_steps]
    if final is not None:
        trace = torch.cat([trace, final[None]])
    rows = (num_tokens > 0) & trace.isfinite().all(dim=0)
    sums = {f"elbo_{step}": value for step, value in enumerate(trace[:, rows].sum(dim=1).tolist())}
    return sums | {"traced_tokens": num_tokens[rows].sum().item()}


def variance_sums(decoder, posterior: LatentPosterior, evidence: Text, seed: int) -> dict[str, float]:
    """What the ELBO gains, summed over rows and under the same noise, where all log-variances grow or shrink by one."""
    now, wider, narrower = (
        elbo(
            decoder,
            evidence,
            LatentPosterior(posterior.mean, posterior.log_variance + shift, keys=posterior.keys),
            seed=seed,
        )
        for shift in (0.0, 1.0, -1.0)
    )
    rows = (now.elbo + wider.elbo + narrower.elbo).isfinite()
    sums = {"wider": wider.elbo - now.elbo, "narrower": narrower.elbo - now.elbo, "probed_tokens": now.num_tokens}
    return {name: values[rows].sum().item() for name, values in sums.items()}


def fit_figures(sums: dict[str, float]) -> dict:
    """Nats a token, from the sums of both functions above."""
    trace = [mean(sums[f"elbo_{step}"], sums["traced_tokens"]) for step in range(len(sums)) if f"elbo_{step}" in sums]
    figures = {f"gain_if_{name}": mean(sums[name], sums["probed_tokens"]) for name in ("wider", "narrower")}
    if len(trace) > 1:
        figures |= {"elbo_trace": trace, "elbo_last_gain": trace[-1] - trace[-2]}
    return figures


# ---------------------------------------------------------------- warnings


def diagnose(logs: dict, losses: list[float], warmed_up: bool = True) -> dict[str, str]:
    """What is wrong by the logged figures, and what to do about it, by cause.

    logs: an entry of `log_history`, of training or of an evaluation. losses: those logged before it, latest last.
    warmed_up: whether latents could be expected to be of use by now.
    """
    found = {}
    if logs.get("non_finite_rows"):
        found["non-finite rows"] = (
            f"the fast loop of {logs['non_finite_rows']:g} sequences turned non-finite; they keep their best finite "
            "posterior. Lower inference_learning_rate, and train in bfloat16 instead of float16."
        )
    losses = [loss for loss in losses[-WINDOW[1] :] if math.isfinite(loss)]
    if "loss" in logs and len(losses) >= WINDOW[0]:
        mean, deviation = statistics.mean(losses), statistics.stdev(losses)
        if logs["loss"] > mean + max(SPIKE[0] * deviation, SPIKE[1]):
            found["loss spike"] = (
                f"the loss is {logs['loss']:.4g}, after {mean:.4g} ± {deviation:.2g} in the last {len(losses)} logs. "
                "If it stays there, resume from an earlier checkpoint with a lower learning_rate or max_grad_norm."
            )
    for prefix in [name.removesuffix("gain_if_wider") for name in logs if name.endswith("gain_if_wider")]:
        figures = {name.removeprefix(prefix): figure for name, figure in logs.items() if name.startswith(prefix)}
        found |= _diagnose_evaluation(figures, warmed_up)
    return found


def _diagnose_evaluation(figures: dict, warmed_up: bool) -> dict[str, str]:
    found = {}
    gain = figures["no_latents"] - figures["loss"]
    if warmed_up and figures["kl"] < LATENTS_UNUSED[0] and gain < LATENTS_UNUSED[1]:
        found["latents unused"] = (
            f"they hold {figures['kl']:.2g} nats a token, and the bound gains {gain:.2g} over no latents. Train "
            "longer, raise latent_gate_init, or give them more to say: a narrower window, longer blocks."
        )
    if figures.get("elbo_last_gain", 0.0) > STILL_RISING:
        found["fast loop not converged"] = (
            f"its last step still raised the ELBO by {figures['elbo_last_gain']:.2g} nats a token. Raise "
            "num_inference_steps or inference_learning_rate."
        )
    way = max(("wider", "narrower"), key=lambda way: figures[f"gain_if_{way}"])
    if figures[f"gain_if_{way}"] > VARIANCE_OFF:
        found["log-variance far from its optimum"] = (
            f"{way} by one everywhere, it would raise the ELBO by {figures[f'gain_if_{way}']:.2g} nats a token. Raise "
            "num_inference_steps, or use inference_method='natural', which starts at the prior."
        )
    return found


class Monitor(TrainerCallback):
    """Warns of each cause that `diagnose` finds, once a run."""

    def __init__(self):
        self._warned = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        before = [entry["loss"] for entry in state.log_history[-3 * WINDOW[1] : -1] if "loss" in entry]
        warmed_up = state.global_step > args.get_warmup_steps(state.max_steps)
        for cause, message in diagnose(logs, before, warmed_up).items():
            if cause not in self._warned:
                self._warned.add(cause)
                logger.warning("Step %d, %s: %s", state.global_step, cause, message)


# ---------------------------------------------------------------- the bar


class ProgressBar(ProgressCallback):
    """transformers' bar (steps, time left) with the last logged loss, bound, tokens per second and MFU beside it."""

    SHOWN = {
        "loss": ("loss", "{:.4g}"),
        "bound": ("bound", "{:.4g}"),
        "tokens/s": ("tokens_per_second", "{:,.0f}"),
        "MFU": ("mfu", "{:.1%}"),
    }

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:  # steps of before a resume took no time of this run
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            shown = {word: form.format(logs[name]) for word, (name, form) in self.SHOWN.items() if name in logs}
            self.training_bar.set_postfix(shown)


def watch(trainer) -> None:
    """Give a `Trainer` both callbacks; a bar that is not transformers' own stays as it is."""
    callbacks = trainer.callback_handler.callbacks
    for index, callback in enumerate(callbacks):
        if type(callback) is ProgressCallback:
            callbacks[index] = ProgressBar(callback.max_str_len)
    trainer.add_callback(Monitor)
